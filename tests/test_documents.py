"""What the documents say is there, and what is there they say."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import click
import pytest

import cdr_admin
import cdr_api
import demo
from cdr.check import RANGE_INDEX
from cdr.selection import FIELDS
from cdr.settings import Settings, parse_milliseconds
from demo.__main__ import CURL
from tests.conftest import ROOT, SOURCES, Database, DatabaseMaker, Gunicorn, serve

README = (ROOT / "README.md").read_text("utf-8")
DEPLOYMENT = (ROOT / "DEPLOYMENT.md").read_text("utf-8")


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


def shape(text: str) -> str:
    """An answer without what differs from one run to the next."""
    text = re.sub(r"cdr_[\w-]{43}", "TOKEN", text)
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "UUID", text)
    return re.sub(r"\+?\d+", "N", text)


def test_the_transcript_is_what_a_shell_shows(gunicorn: Gunicorn) -> None:
    (transcript,) = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    steps = re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", transcript, re.MULTILINE)
    assert len(steps) == 5
    script = "".join(f"{command}\necho ---\n" for command, _ in steps).replace("http://127.0.0.1:8000", gunicorn.url)
    done = subprocess.run(["bash", "-e"], input=script, capture_output=True, text=True, check=True)
    shown = [part.lstrip("\n") for part in done.stdout.split("---\n")[:-1]]
    for (command, expected), found in zip(steps, shown, strict=True):
        assert shape(found.strip()) == shape(expected.strip()), command


def test_the_lines_that_make_run_prints_work_when_pasted(gunicorn: Gunicorn) -> None:
    lines = CURL.format(url=gunicorn.url, domain=demo.DOMAINS[0], day="2026-01-01").partition("terminal:\n")[2]
    lines = lines.replace("billing@example.com", "pasted@example.com")
    done = subprocess.run(["bash", "-e"], input=lines, capture_output=True, text=True, check=True)
    registered, calls, rest = done.stdout.partition("\n[")[0], *done.stdout.partition("\n[")[1:]
    assert json.loads(registered)["success"] is True
    assert calls
    assert "end_stamp,direction,caller_id_number,destination_number,billsec\n" in rest
    assert "Logged out" in rest


THREE = [
    ("0b9e2f6c-6a53-4c0e-9c5e-0d9c4b3f7a11", 60),
    ("51424551-36f8-fa7b-19d8-7c8438867033", 0),
    (str(UUID(int=7)), 7200),
]


def test_the_digests_of_the_readme_are_those_of_the_service(make_database: DatabaseMaker) -> None:
    database = make_database()
    for uuid, billsec in THREE:
        database.insert_call(xml_cdr_uuid=uuid, billsec=billsec)
    client = database.client(database.account("alpha.example.com"))
    digest = client.get("/api/call_totals", **{"from": "2026-01-01", "to": "2026-12-31"}).get_json()[0]["digest"]
    section = README.partition("## How to bill")[2]
    names: dict[str, Any] = {}
    exec(section.partition("```python\n")[2].partition("```")[0], names)
    assert names["digest"](THREE) == digest
    (statement,) = re.findall(r"```sql\n(.*?)```", section, re.DOTALL)
    assert database.execute(statement.replace("FROM ledger", "FROM v_xml_cdr")) == [(digest,)]


def test_every_route_is_in_the_readme(database: Database) -> None:
    for rule in database.app().url_map.iter_rules():
        method = "POST" if "POST" in (rule.methods or set()) else "GET"
        assert f"`{method} {rule.rule}`" in README, rule.rule


def test_every_parameter_is_in_the_readme() -> None:
    for name in {**cdr_api.CALL_RANGE, **cdr_api.FEED, **cdr_api.TOTALS, **cdr_api.CONCURRENCY}:
        assert f"`{name}`" in README, name


def test_the_fields_are_in_the_readme_in_their_order() -> None:
    assert f"`{' '.join(FIELDS)}`" in README


def test_every_setting_is_in_both_documents() -> None:
    for name in Settings.__dataclass_fields__:
        for text in (README, DEPLOYMENT):
            assert f"`CDR_API_{name.upper()}`" in text, name
    for name in set(re.findall(r"CDR_API_[A-Z_]+[A-Z]", README + DEPLOYMENT)):
        assert name.removeprefix("CDR_API_").lower() in Settings.__dataclass_fields__, name


def test_every_command_is_in_the_readme() -> None:
    for group in (cdr_admin.user, cdr_admin.token):
        for name, command in group.commands.items():
            assert f"flask {group.name} {name}" in README, name
            for parameter in command.params:
                if isinstance(parameter, click.Option):
                    assert parameter.opts[0] in README, parameter.opts
    assert "`flask check`" in README


def test_every_status_is_in_the_readme() -> None:
    code = "".join(path.read_text("utf-8") for path in SOURCES)
    for status in set(re.findall(r"ApiError\(\s*(\d{3}),", code)):
        assert re.search(rf"^\| [\d, ]*{status}[\d, ]* \|", README, re.MULTILINE), status


def test_the_settings_table_tells_the_defaults() -> None:
    settings = Settings.from_environ({"CDR_API_DSN": "dbname=x"})
    rows = dict(re.findall(r"^\| `(CDR_API_\w+)` \| `?([^`|]+?)`? \|", README, re.MULTILINE))
    assert rows["CDR_API_TOKEN_DAYS"] == str(settings.token_days)
    assert rows["CDR_API_PROXIES"] == str(settings.proxies)
    assert rows["CDR_API_THREADS"] == str(settings.threads)
    assert rows["CDR_API_ACCOUNT_STREAMS"] == str(settings.account_streams)
    assert rows["CDR_API_MIN_RATE"] == str(settings.min_rate)
    assert rows["CDR_API_SYSLOG"] == settings.syslog
    assert parse_milliseconds(rows["CDR_API_CLIENT_TIMEOUT"]) == settings.client_timeout
    assert rows["CDR_API_REGISTRATION"] == settings.registration
    assert parse_milliseconds(rows["CDR_API_STATEMENT_TIMEOUT"]) == settings.statement_timeout
    assert parse_milliseconds(rows["CDR_API_POOL_TIMEOUT"]) == settings.pool_timeout


def test_the_index_of_the_documents_is_the_one_that_check_prints() -> None:
    index = RANGE_INDEX.format(key="xml_cdr_uuid")
    assert index in DEPLOYMENT
    assert demo.INDEX.partition(" ON ")[2] + ";" == index.partition(" ON ")[2]


def test_links_and_files_that_documents_name_are_there() -> None:
    for document in ROOT.glob("**/*.md"):
        if ".venv" in document.parts or ".demo" in document.parts:
            continue
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text("utf-8")):
            assert (document.parent / target).exists(), (document, target)
    for name in re.findall(r"\bdeploy/[\w.-]+\w", DEPLOYMENT):
        assert (ROOT / name).is_file(), name


def test_the_modules_head_lists_its_parts() -> None:
    text = Path(cdr_api.__file__).read_text("utf-8")
    listed = re.findall(r"^    ([A-Z][A-Za-z ]*?)  +\S", text.partition("A route is three steps")[0], re.MULTILINE)
    assert re.findall(r"^# ([A-Z][A-Za-z ]*?) -+$", text, re.MULTILINE) == listed
