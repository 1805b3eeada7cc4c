"""What the documents say is there, and what is there they say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any
from uuid import UUID

import click
import pytest

import cdr_admin
import cdr_api
import demo
from cdr.check_calls import EPOCH_INDEX, RANGE_INDEX
from cdr.selection import FIELDS
from cdr.settings import Settings
from cdr_setup.setup import setup
from demo.__main__ import show_lines
from tests.conftest import ROOT, SOURCES, Database, DatabaseMaker, Gunicorn, answers, free_port, need, serve, wait_for
from tests.documents import API, BILLING, DEPLOYMENT, DOCUMENTS, ERRORS, README, read_section, shape


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    database = make_database()
    with database.connect() as connection:
        demo.add_calls(connection, 3000)
    return database


@pytest.fixture(scope="module")
def gunicorn(database: Database) -> Iterator[Gunicorn]:
    with serve(database.dsn, CDR_API_REGISTER_DOMAINS="*") as running:
        yield running


def test_the_transcript_is_what_a_shell_shows(gunicorn: Gunicorn) -> None:
    need("curl")
    (transcript,) = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    steps = re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", transcript, re.MULTILINE)
    assert len(steps) == 5
    script = "".join(f"{command}\necho ---\n" for command, _ in steps).replace("http://127.0.0.1:8000", gunicorn.url)
    done = subprocess.run(["bash", "-e"], input=script, capture_output=True, text=True, check=True)
    shown = [part.lstrip("\n") for part in done.stdout.split("---\n")[:-1]]
    for (command, expected), found in zip(steps, shown, strict=True):
        assert shape(found.strip()) == shape(expected.strip()), command


def test_the_lines_that_make_run_prints_work_when_pasted(gunicorn: Gunicorn) -> None:
    need("curl")
    lines = show_lines(gunicorn.url, demo.DOMAINS[0], own=True).partition("terminal:\n")[2]
    lines = lines.replace("billing@example.com", "pasted@example.com")
    done = subprocess.run(["bash", "-e"], input=lines, capture_output=True, text=True, check=True)
    registered, calls, rest = done.stdout.partition("\n[")[0], *done.stdout.partition("\n[")[1:]
    assert json.loads(registered)["success"] is True
    assert calls
    assert "end_stamp,direction,caller_id_number,destination_number,billsec\n" in rest
    assert "Logged out" in rest


def test_who_reads_the_readme_starts_the_service_before_asking_it() -> None:
    run, ask = README.index("\nmake run "), README.index("curl -s http")
    assert run < ask
    assert "**In the demo everybody reads every domain**" in README[run:ask]


@pytest.mark.direct("runs a server of its own")
def test_the_lines_that_reach_the_demos_database_work(tmp_path: Path) -> None:
    (lines,) = re.findall(r"```sh\n(demo=.*?)```", README, re.DOTALL)
    port = free_port()
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("CDR_API_", "PG"))}
    command = [sys.executable, "-m", "demo", "--calls", "10", "--data", str(tmp_path / ".demo")]
    with subprocess.Popen(command, cwd=ROOT, env={**environ, "PORT": str(port)}) as process:
        try:
            wait_for(lambda: process.poll() is not None or answers(port))
            script = lines.replace(".demo/", f"{tmp_path}/.demo/").replace(".venv/", f"{quote(sys.prefix)}/").rstrip()
            script += " -At <<< 'SELECT count(*) FROM v_xml_cdr'"
            done = subprocess.run(
                ["bash", "-eu", "-c", script], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
            )
        finally:
            process.terminate()
    assert done.returncode == 0, done.stderr
    accounts, calls = done.stdout.splitlines()
    assert accounts.split() == ["ID", "E-MAIL", "NAME", "DOMAINS", "TOKENS", "STATE"]
    assert calls == "10"


THREE = [
    ("0b9e2f6c-6a53-4c0e-9c5e-0d9c4b3f7a11", 60),
    ("51424551-36f8-fa7b-19d8-7c8438867033", 0),
    (str(UUID(int=7)), 7200),
]


def test_the_digests_of_the_billing_page_are_those_of_the_service(make_database: DatabaseMaker) -> None:
    database = make_database()
    for uuid, billsec in THREE:
        database.insert_call(xml_cdr_uuid=uuid, billsec=billsec)
    client = database.client(database.account("alpha.example.com"))
    digest = client.get("/api/call_totals", **{"from": "2026-01-01", "to": "2026-12-31"}).get_json()[0]["digest"]
    names: dict[str, Any] = {}
    exec(BILLING.partition("```python\n")[2].partition("```")[0], names)
    assert names["digest"](THREE) == digest
    (statement,) = re.findall(r"```sql\n(.*?)```", BILLING.partition("## The digest")[2], re.DOTALL)
    assert database.execute(statement.replace("FROM ledger", "FROM v_xml_cdr")) == [(digest,)]
    (function,) = re.findall(r"```php\n(.*?)```", BILLING, re.DOTALL)
    if php := shutil.which("php"):
        code = f"{function} echo digest(json_decode('{json.dumps(THREE)}'));"
        done = subprocess.run([php, "-r", code], capture_output=True, text=True, check=True)
        assert done.stdout == digest


def test_every_route_is_in_the_readme_and_every_route_of_the_readme_is_there(database: Database) -> None:
    routes = set()
    for rule in database.app().url_map.iter_rules():
        method = "POST" if "POST" in (rule.methods or set()) else "GET"
        routes.add(f"{method} {rule.rule}")
    assert set(re.findall(r"`((?:GET|POST) [^`]+)`", read_section(README, "Routes"))) == routes


PARAMETERS = {
    "Parameters": cdr_api.CALL_RANGE,
    "The feed": cdr_api.FEED,
    "Totals": cdr_api.TOTALS,
    "Simultaneous calls": cdr_api.CONCURRENCY,
}


@pytest.mark.parametrize("title", PARAMETERS)
def test_every_parameter_is_in_the_reference_where_its_route_is(title: str) -> None:
    section = read_section(API, title)
    if "the filters" in section:
        parameters = read_section(API, "Parameters")
        section += parameters[parameters.index("| `direction`") :]
    for name in PARAMETERS[title]:
        assert f"`{name}`" in section or f"`{name}=`" in section, name


def test_the_fields_are_in_the_reference_in_their_order() -> None:
    assert f"`{' '.join(FIELDS)}`" in API


SETTINGS_ROW = r"^\| `(CDR_API_\w+)` \| (.+?) \| (.+?) \| (.+?) \|$"


def test_every_setting_has_one_row_in_one_document() -> None:
    rows = re.findall(SETTINGS_ROW, DEPLOYMENT, re.MULTILINE)
    fields = Settings.__dataclass_fields__
    assert sorted(name for name, *_ in rows) == sorted(f"CDR_API_{name.upper()}" for name in fields)
    for name, document in DOCUMENTS.items():
        if name != "DEPLOYMENT.md":
            assert "| `CDR_API_" not in document, name
        for setting in set(re.findall(r"CDR_API_[A-Z_]+[A-Z]", document)):
            assert setting.removeprefix("CDR_API_").lower() in fields, (name, setting)


def test_every_command_is_in_the_reference() -> None:
    section = read_section(API, "Operator's commands")
    for group in (cdr_admin.user, cdr_admin.token):
        for name, command in group.commands.items():
            assert f"`flask {group.name} {name}" in section, name
            for parameter in command.params:
                if isinstance(parameter, click.Option):
                    assert parameter.opts[0] in section, parameter.opts
    assert "`flask check`" in section
    assert "`cdr-api setup`" in section
    assert all(option.opts[0] in section for option in (*cdr_admin.check.params, *setup.params))


def test_every_status_is_in_the_reference() -> None:
    code = "".join(path.read_text("utf-8") for path in SOURCES)
    statuses = set(re.findall(r"ApiError\(\s*(\d{3})\b", code))
    assert statuses
    for status in statuses:
        assert re.search(rf"^\| [\d, ]*{status}[\d, ]* \|", ERRORS, re.MULTILINE), status


# What the table says where a default is not a value that can be written down.
IN_WORDS = {
    "dsn": "none, required",
    "accounts_dsn": "that of `CDR_API_DSN`",
    "calls_dsn": "that of `CDR_API_DSN`",
    "register_domains": "none",
    "timezone": "the database's",
    "cors_origins": "none",
    "workers": "number of processors",
}


def test_the_settings_table_tells_the_defaults() -> None:
    settings = Settings.from_environ({"CDR_API_DSN": "dbname=x"})
    rows = {name: default for name, default, *_ in re.findall(SETTINGS_ROW, DEPLOYMENT, re.MULTILINE)}
    for name in Settings.__dataclass_fields__:
        variable = f"CDR_API_{name.upper()}"
        if name in IN_WORDS:
            assert rows[variable] == IN_WORDS[name]
        else:
            assert re.fullmatch("`[^`]+`", rows[variable])
            said = Settings.from_environ({"CDR_API_DSN": "dbname=x", variable: rows[variable].strip("`")})
            assert said == settings, name


def test_the_index_of_the_documents_is_the_one_that_check_prints() -> None:
    index = RANGE_INDEX.format(key="xml_cdr_uuid")
    assert index in DEPLOYMENT
    assert EPOCH_INDEX.format(key="uuid") in DEPLOYMENT
    assert demo.INDEX.partition(" ON ")[2] + ";" == index.partition(" ON ")[2]


def read_anchors(document: str) -> set[str]:
    """Where links into a document may lead: its headings, as GitHub makes anchors of them."""
    prose = re.sub(r"^ *```.*?^ *```$", "", document, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_of_a_document_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^):]+)\)", DOCUMENTS[name]):
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        assert not anchor or anchor in read_anchors(path.read_text("utf-8")), target


def test_the_readme_leads_to_every_document() -> None:
    section = read_section(README, "Where to read on")
    led = set(re.findall(r"\]\(([^)]+)\)", section)) | {"README.md", "pages/vendor/README.md"}
    assert led == set(DOCUMENTS)


def test_files_that_documents_and_other_texts_name_are_there() -> None:
    for name in re.findall(r"\bdeploy/[\w.-]+\w", DEPLOYMENT):
        assert (ROOT / name).is_file(), name
    documents = {name.rpartition("/")[2] for name in DOCUMENTS} | {"RESULT.md"}  # which make bench writes
    patterns = ("*.[jmpst]*", "[cdep]*/*.*", "Makefile", ".ci/run")
    for path in [path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()]:
        for name in re.findall(r"\b\w+\.md\b", path.read_text("utf-8")):
            assert name in documents, (path, name)


def test_the_layout_of_the_readme_is_the_tree() -> None:
    (layout,) = re.findall(r"```\n(.*?)```", read_section(README, "How it is built"), re.DOTALL)
    named, folder = set(), ""
    for line in layout.splitlines():
        indent, names = re.findall(r"^( *)(\S+(?:, \S+)*)  +\S", line)[0]
        folder = folder if indent else ""
        named |= {folder + name for name in names.split(", ")}
        folder = names if names.endswith("/") else folder
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    programs = {path.relative_to(ROOT).as_posix() for path in SOURCES if path.name != "__init__.py"}
    assert named >= programs | {f"{path.parent.name}/" for path in ROOT.glob("[a-z]*/*.*")}


def test_the_modules_head_lists_its_parts() -> None:
    text = Path(cdr_api.__file__).read_text("utf-8")
    listed = re.findall(r"^    ([A-Z][A-Za-z ]*?)  +\S", text.partition("A route is three steps")[0], re.MULTILINE)
    assert re.findall(r"^# ([A-Z][A-Za-z ]*?) -+$", text, re.MULTILINE) == listed


def test_nothing_is_announced_to_end_that_the_page_of_promises_does_not_name() -> None:
    announced = '"deprecated"' in (ROOT / "openapi.json").read_text("utf-8")
    announced |= any(word in file.read_text("utf-8") for file in SOURCES for word in ("Sunset", "Deprecation"))
    assert announced != ("Nothing is announced today" in DOCUMENTS["docs/promises.md"])
