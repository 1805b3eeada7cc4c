"""The examples that people copy and the commands of docs/migration.md, run against the service as shipped."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from werkzeug.security import check_password_hash

from tests.clients import Cable, Cut
from tests.conftest import PASSWORD, ROOT, Database, DatabaseMaker, Gunicorn, need, serve

pytestmark = pytest.mark.direct("is about the clients")

ALPHA, BETA = "alpha.example.com", "beta.example.com"
ZONE = "Europe/Berlin"
LARGE, SMALL, EMPTY = "2026-01", "2026-02", "2026-03"
KEYS = ("direction", "accountcode", "caller_id_number", "destination_number")
RISKY = (
    "=1+1",
    "+4930123",
    "-2",
    "@SUM(A1)",
    "\tx",
    'a "quote", a comma',
    "two\nlines",
    "030123",
    "",
    "ÄÖ€ 日本 😀",
    "'x",
)

# What month.gs has from Google. Like a careless client, fetch gives what came of an answer that broke off.
SHEETS = r"""
{
  const { spawnSync } = require("node:child_process");
  const { readFileSync, writeFileSync } = require("node:fs");
  const [script, domain, month, file] = process.argv.slice(1);
  const properties = { ...process.env, CDR_DOMAIN: domain, CDR_MONTH: month };
  globalThis.PropertiesService = { getScriptProperties: () => ({ getProperties: () => properties }) };
  globalThis.Utilities = {
    sleep(milliseconds) {
      console.error(`waiting ${milliseconds / 1000} s.`);
      spawnSync("sleep", [milliseconds / 1000]);
    },
  };
  globalThis.UrlFetchApp = {
    fetch(url, { headers }) {
      const input = Object.entries(headers).map(([name, value]) => `${name}: ${value}\n`).join("");
      const done = spawnSync("curl", ["-s", "-i", "-H", "@-", url], { input, maxBuffer: 2 ** 30, encoding: "utf-8" });
      const [head, ...body] = done.stdout.split("\r\n\r\n");
      const lines = head.split("\r\n");
      return {
        getResponseCode: () => Number(lines[0].split(" ")[1]),
        getAllHeaders: () => Object.fromEntries(lines.slice(1).map((line) => line.split(/: (.*)/s).slice(0, 2))),
        getContentText: () => body.join("\r\n\r\n"),
      };
    },
  };
  let cells;
  const range = { setValues: (values) => { cells = values; } };
  const sheet = { clearContents() {}, getRange: () => range };
  globalThis.SpreadsheetApp = { getActive: () => ({ getSheetByName: () => null, insertSheet: () => sheet }) };
  try {
    (0, eval)(`${readFileSync(script, "utf-8")}; month()`);
    writeFileSync(file, JSON.stringify(cells));
  } catch (error) {
    console.error(`Nothing is kept: ${error.message}`);
    process.exit(1);
  }
}
"""

PROGRAMS = {
    "month.sh": ["bash"],
    "month.py": [sys.executable],
    "month.php": ["php"],
    "month.mjs": ["node"],
    "month.gs": ["node", "-e", SHEETS],
}
NEEDS = {
    "month.sh": ["curl", "jq"],
    "month.py": [],
    "month.php": ["php"],
    "month.mjs": ["node"],
    "month.gs": ["node", "curl"],
}


def lacks(program: str) -> str:
    """What the machine has to have for a program, and has not."""
    missing = [tool for tool in NEEDS[program] if not shutil.which(tool)]
    if program == "month.php" and not missing:
        modules = subprocess.run(["php", "-m"], capture_output=True, text=True, check=True).stdout.split()
        missing = [] if "curl" in modules else ["php-curl"]
    return ", ".join(missing)


def name_cells(rows: list[list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


@dataclass
class Example:
    """One of the programs, and the folder that it writes to."""

    program: str
    folder: Path
    environ: dict[str, str]

    @property
    def file(self) -> Path:
        return self.folder / "calls"

    def start(self, month: str, domain: str = ALPHA) -> subprocess.Popen[str]:
        command = [*PROGRAMS[self.program], str(ROOT / "examples" / self.program), domain, month, str(self.file)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environ, stdout=pipe, stderr=pipe, text=True)

    def run(self, month: str, domain: str = ALPHA) -> tuple[int, str, str]:
        with self.start(month, domain) as process:
            out, err = process.communicate(timeout=60)
            return process.returncode, out, err

    def fails(self, month: str, domain: str = ALPHA) -> str:
        """What it says when it fails, with nothing left but a file that was there."""
        self.file.write_text("of an earlier run", "ascii")
        status, _, err = self.run(month, domain)
        assert status not in (0, -9), err
        assert err
        self.keeps_nothing()
        return err

    def keeps_nothing(self) -> None:
        assert list(self.folder.iterdir()) == [self.file]
        assert self.file.read_text("ascii") == "of an earlier run"

    def through(self, cable: Cable, month: str) -> str:
        own = self.environ["CDR_URL"]
        with cable.laid() as self.environ["CDR_URL"]:
            said = self.fails(month)
        self.environ["CDR_URL"] = own
        return said

    def rows(self) -> list[dict[str, Any]]:
        text = self.file.read_bytes().decode()
        if self.program == "month.sh":
            return name_cells(list(csv.reader(text.splitlines(keepends=True))))
        if self.program == "month.gs":
            return name_cells(json.loads(text))
        return [json.loads(line) for line in text.split("\n")[:-1]]


def add_calls(database: Database, month: str, calls: int, domain: str = ALPHA, leg: str = "a") -> None:
    """Calls of every hour of a month, and of its first and last moment."""
    database.execute(
        "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_uuid, domain_name, leg, end_stamp, billsec, direction,"
        "                       accountcode, caller_id_number, destination_number)"
        " SELECT gen_random_uuid(), md5('domain ' || %(domain)s)::uuid, %(domain)s, %(leg)s,"
        "        least(first + (i - 1) * (last - first) / greatest(%(calls)s - 1, 1), last), i %% 600,"
        "        (ARRAY['inbound', 'outbound', NULL])[i %% 3 + 1], nullif(i %% 50, 0)::text,"
        "        (%(risky)s::text[])[i %% %(count)s + 1], (%(risky)s::text[])[(i + 3) %% %(count)s + 1]"
        "   FROM generate_series(1, %(calls)s) AS i,"
        "        LATERAL (SELECT %(first)s::timestamp AT TIME ZONE %(zone)s AS first,"
        "                        (%(first)s::timestamp + interval '1 month') AT TIME ZONE %(zone)s"
        "                        - interval '1 microsecond' AS last) AS bounds",
        {
            "domain": domain,
            "leg": leg,
            "calls": calls,
            "first": f"{month}-01",
            "zone": ZONE,
            "risky": list(RISKY),
            "count": len(RISKY),
        },
    )


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    database = make_database(index=True)
    add_calls(database, LARGE, 10_050)
    add_calls(database, SMALL, 60)
    add_calls(database, LARGE, 20, BETA)
    add_calls(database, SMALL, 20, leg="b")
    database.execute("ANALYZE v_xml_cdr")
    database.execute(f'ALTER DATABASE "{database.name}" SET enable_sort = off')  # a stream from the first call on
    return database


@pytest.fixture(scope="module")
def gunicorn(database: Database) -> Iterator[Gunicorn]:
    with serve(database.dsn, CDR_API_POOL_TIMEOUT="200ms", CDR_API_TIMEZONE=ZONE) as running:
        yield running


@pytest.fixture(scope="module")
def token(database: Database) -> str:
    return database.account(ALPHA)


ExampleMaker = Callable[[str], Example]


@pytest.fixture
def make_example(gunicorn: Gunicorn, token: str, tmp_path: Path) -> ExampleMaker:
    def make(program: str) -> Example:
        if missing := lacks(program):
            pytest.skip(f"{program} needs {missing}")
        folder = tmp_path / program
        folder.mkdir()
        environ = {"PATH": os.environ["PATH"], "CDR_URL": f"{gunicorn.url}/api", "CDR_TOKEN": token, "LANG": "C.UTF-8"}
        return Example(program, folder, environ)

    return make


@pytest.fixture(params=PROGRAMS)
def example(make_example: ExampleMaker, request: Any) -> Example:
    return make_example(request.param)


@pytest.fixture
def all_examples(make_example: ExampleMaker) -> list[Example]:
    return [make_example(program) for program in PROGRAMS if not lacks(program)]


Row = tuple[Any, ...]


def stored(database: Database, month: str) -> list[Row]:
    """What a bill needs of the month's calls, the helper legs left out."""
    return database.execute(
        "SELECT xml_cdr_uuid::text, billsec::int, extract(epoch FROM end_stamp)::text, direction, accountcode,"
        "       caller_id_number, destination_number FROM v_xml_cdr"
        " WHERE domain_name = %s AND leg = 'a' AND date_trunc('month', end_stamp AT TIME ZONE %s) = %s::timestamp"
        " ORDER BY v_xml_cdr.end_stamp, xml_cdr_uuid",
        [ALPHA, ZONE, f"{month}-01"],
    )


def in_a_cell(value: str | None, program: str) -> str | None:
    """A text as a program's file has it. In CSV, null and an empty text are read alike."""
    if program == "month.sh":
        return f"'{value}" if value and value[0] in "=+-@\t\r\n" else value or ""
    return f"'{value}" if program == "month.gs" and value is not None else value


def read_row(row: dict[str, Any], program: str) -> Row:
    end = datetime.fromisoformat(row["end_stamp"].removeprefix("'")).timestamp()
    seconds = int(row["billsec"]) if program == "month.sh" else row["billsec"]
    return row["xml_cdr_uuid"].removeprefix("'"), seconds, f"{end:.6f}", *(row[key] for key in KEYS)


@pytest.mark.parametrize("month", [LARGE, SMALL, EMPTY])
def test_the_month_is_the_one_of_the_database(database: Database, example: Example, month: str) -> None:
    expected = stored(database, month)
    status, out, err = example.run(month)
    assert (status, err) == (0, "")
    if example.program != "month.gs":
        assert out == f"{len(expected)} calls, {sum(row[1] for row in expected)} seconds\n"
    found = [read_row(row, example.program) for row in example.rows()]
    assert found == [(*row[:3], *(in_a_cell(text, example.program) for text in row[3:])) for row in expected]
    assert list(example.folder.iterdir()) == [example.file]


@dataclass
class Line(Cable):
    """A cable that remembers requests, and lets so many answers through whole."""

    whole: int = 0
    requests: list[bytes] = field(default_factory=list)

    def carry(self, request: bytes) -> bytes:
        self.requests.append(request)
        cut, self.whole = self.keep, self.whole - 1
        if self.whole >= 0:
            self.keep = lambda answer: answer
        try:
            return super().carry(request)
        finally:
            self.keep = cut


CUTS: list[Cut] = [
    lambda answer: answer[:10],  # in the status line
    lambda answer: answer[: answer.index(b"\r\n\r\n") + 2],  # in the end of the head
    lambda answer: answer[:-5] if b"chunked" in answer else answer[:-2],  # before the end
    lambda answer: answer[: answer.rindex(b"\n", 0, -20) + 1],  # behind a call, or the head
    lambda answer: answer[: (answer.index(b"\r\n\r\n") + len(answer)) // 2],  # in the middle of the body
]


@pytest.mark.parametrize("whole", [0, 1, 2], ids=["first page", "second page", "totals"])
def test_an_answer_that_was_cut_leaves_no_file(gunicorn: Gunicorn, example: Example, whole: int) -> None:
    for cut in CUTS if whole == 0 else CUTS[-1:]:
        line = Line(gunicorn.url, cut, whole=whole)
        example.through(line, LARGE if whole else SMALL)
        assert len(line.requests) == whole + 1
        line.requests.clear()


@pytest.fixture
def deadly_call(database: Database) -> Iterator[None]:
    """A call in the middle of the month is an error as soon as its text is read."""
    middle = f"SELECT min(xml_cdr_uuid::text) FROM v_xml_cdr WHERE end_stamp::date = '{LARGE}-10'"
    text = f"kept || CASE WHEN 1 / (xml_cdr_uuid <> '{database.execute(middle)[0][0]}')::int = 1 THEN '' END"
    database.execute("ALTER TABLE v_xml_cdr RENAME accountcode TO kept")
    database.execute(f"ALTER TABLE v_xml_cdr ADD accountcode text GENERATED ALWAYS AS ({text}) VIRTUAL")
    yield
    database.execute("ALTER TABLE v_xml_cdr DROP accountcode")
    database.execute("ALTER TABLE v_xml_cdr RENAME kept TO accountcode")


@pytest.mark.usefixtures("deadly_call")
def test_a_page_that_cannot_be_read_leaves_no_file(example: Example) -> None:
    """A page is read as a whole before it is sent. (What breaks off on the way: the cable.)"""
    said = example.fails(LARGE)
    assert re.search(r"\b500\b", said) or example.program == "month.gs", said


def test_a_busy_service_is_waited_for_as_long_as_it_says(database: Database, all_examples: list[Example]) -> None:
    name = database.name
    with psycopg.connect(database.server.get_uri(), autocommit=True) as admin:
        admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        try:
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
            running = [example.start(SMALL) for example in all_examples]
            for process in running:
                assert process.stderr
                assert "waiting 5 s" in process.stderr.readline()
        finally:
            admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
    for example, process in zip(all_examples, running, strict=True):
        process.communicate(timeout=60)
        assert process.returncode == 0
        assert len(example.rows()) == 60


def test_a_refusal_is_told_and_leaves_no_file(example: Example) -> None:
    assert "403" in example.fails(SMALL, BETA) or example.program == "month.gs"
    example.environ["CDR_TOKEN"] = "cdr_unknown"
    assert "bearer token" in example.fails(SMALL)


@pytest.mark.parametrize("month", ["202601", "2026-13", "January", ""])
def test_what_is_no_month_is_told_in_a_sentence(example: Example, month: str) -> None:
    said = example.fails(month)
    assert not re.search(r"Traceback|Stack trace|^ +at ", said, re.MULTILINE), said
    assert "no calls" not in said


def test_a_call_that_comes_between_two_pages_is_noticed(
    database: Database, gunicorn: Gunicorn, example: Example
) -> None:
    def add(answer: bytes) -> bytes:
        if not cable.requests[1:]:
            database.insert_call(domain_name=ALPHA, end_stamp=f"{LARGE}-02 00:00:00+00", accountcode="late")
        return answer

    cable = Line(gunicorn.url, add)
    try:
        assert "again" in example.through(cable, LARGE)
    finally:
        database.execute("DELETE FROM v_xml_cdr WHERE accountcode = 'late'")


def test_the_token_goes_in_a_header_and_nowhere_else(gunicorn: Gunicorn, example: Example) -> None:
    """Not on a command line, not in a URL, and not to a host that an answer names."""
    moved = Line(gunicorn.url, lambda answer: answer.replace(b"<http://127.0.0.1:", b"<http://localhost:"))
    assert "elsewhere" in example.through(moved, LARGE)
    (request,) = moved.requests
    token = example.environ["CDR_TOKEN"]
    head, _, headers = request.partition(b"\r\n")
    assert f"Bearer {token}".encode() in headers
    assert token.encode() not in head
    assert example.program in moved.seen[0]
    assert token not in moved.seen[0]


def test_every_shell_script_passes_shellcheck() -> None:
    scripts = []
    for path in (path for folder in (".ci", "bench", "deploy", "examples") for path in (ROOT / folder).iterdir()):
        with suppress(UnicodeDecodeError, IsADirectoryError):
            if re.match(r"#!.*sh\n", path.read_text("utf-8")):
                scripts.append(str(path))
    assert len(scripts) >= 3
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([str(shellcheck), *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# docs/migration.md ------------------------------------------------------------

MIGRATION = (ROOT / "docs/migration.md").read_text("utf-8")
BLOCKS = re.findall(r"```sh\n(.*?)```", MIGRATION, re.DOTALL)
AFTER = [block.partition("# after\n")[2] for block in BLOCKS if "# after\n" in block]


def shell(script: str, **environ: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail"],
        input=script,
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (script, done.stdout, done.stderr)
    return done.stdout


OLD_KEYS = 26


@pytest.fixture(scope="module")
def places(gunicorn: Gunicorn, database: Database) -> dict[str, str]:
    """What the page's lines have in the environment. Where fusionapi is asked as well, this service stands in."""
    token = database.account(ALPHA, email="billing@example.com")
    url = f"{gunicorn.url}/api"
    return {"URL": url, "TOKEN": token, "OLD": url, "OLD_TOKEN": token, "PASSWORD": PASSWORD}


def test_the_lines_of_the_migration_page_work(database: Database, places: dict[str, str]) -> None:
    need("curl")
    (end_of_range, login, billsec, old_shape, compare), expected = AFTER, stored(database, LARGE)
    parts = [json.loads(shell(part, **places)) for part in end_of_range.split("# the same calls in both\n")]
    assert [[call["xml_cdr_uuid"] for call in calls] for calls in parts] == [[row[0] for row in expected]] * 2
    assert shell(login, **places).startswith("cdr_")
    query = "SELECT sum(billsec)::int FROM v_xml_cdr WHERE domain_name = %s"
    assert int(shell(billsec, **places)) == database.execute(query, [ALPHA])[0][0]
    calls = json.loads(shell(old_shape, **places))
    assert [(call["xml_cdr_uuid"], call["billsec"]) for call in calls] == [(row[0], str(row[1])) for row in expected]
    assert all(len(call) == OLD_KEYS for call in calls)
    assert re.fullmatch(r"2026-01-01 00:00:00(\.\d+)?\+01", calls[0]["end_stamp"])
    assert "2026-01-15 alpha.example.com: equal" in shell(compare, **places)


def test_a_password_of_laravel_is_no_password_here() -> None:
    """$2y$ is bcrypt: werkzeug does not know it, whatever the password."""
    with pytest.raises(ValueError, match="Invalid hash method"):
        check_password_hash("$2y$10$N9qo8uLOickgx2ZMRZoMyeIjZAgcfl7p92ldGxad68LJZdL17lhWy", PASSWORD)
