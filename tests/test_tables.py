"""docs/engines.md: the lines that read calls into tables of other programs, and the webhook's signature."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import zipfile
from codecs import BOM_UTF8
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.conftest import Client, Database, DatabaseMaker, need
from tests.documents import DOCUMENTS, read_section

ENGINES = DOCUMENTS["docs/engines.md"]
FIELDS = "xml_cdr_uuid,end_stamp,caller_id_name,destination_number,billsec"
# What loses its type where a reader guesses: caller's name, destination, seconds.
RISKY: list[tuple[str | None, str | None, int]] = [
    ("NA", "0030123", 61),
    ("null", "004930123456789012345678", 7),
    ("true", "1e5", 1),
    ('a "quote", a comma', "+4930123", 60),
    ("two\nlines", "20261001", 3),
    ("", "2026-10-01", 5),
    ("ÄÖ€ 日本 😀", "nan", 0),
    ("=1+1", "12345678901234567890", 3600),
    (None, None, 9),
]
SECONDS = sum(seconds for _, _, seconds in RISKY)


def blocks(language: str, title: str = "Into a table") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", read_section(ENGINES, title), re.DOTALL)


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    database = make_database()
    for name, number, seconds in RISKY:
        database.insert_call(caller_id_name=name, destination_number=number, billsec=seconds)
    return database


@pytest.fixture(scope="module")
def client(database: Database) -> Client:
    return database.client(database.account("alpha.example.com"))


@pytest.fixture
def folder(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where calls.csv and calls.ndjson are, and the test is."""
    for kind in ("csv", "ndjson"):
        response = client.get("/api/calls", domain_name="alpha.example.com", fields=FIELDS, format=kind)
        (tmp_path / f"calls.{kind}").write_bytes(response.data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(name: str) -> Any:
    """A library, which make test installs; whoever tests without it skips."""
    return pytest.importorskip(name, reason=f"needs {name}")


@pytest.mark.usefixtures("folder")
def test_pandas_reads_text_as_text() -> None:
    lines = blocks("python")[0].splitlines()
    from_csv, from_json, stamps = (line for line in lines if not line.startswith("#"))
    for line in (from_csv, from_json):
        names: dict[str, Any] = {"pandas": load("pandas")}
        exec(f"{line}\n{stamps}", names)
        calls = names["calls"]
        assert int(calls["billsec"].sum()) == SECONDS
        texts = calls[["caller_id_name", "destination_number"]].fillna("").values.tolist()  # null and "" alike
        assert texts == [[name or "", number or ""] for name, number, _ in RISKY]
        assert {str(stamp) for stamp in calls["end_stamp"]} == {"2026-02-03 10:00:00+00:00"}


@pytest.mark.usefixtures("folder")
def test_duckdb_reads_text_as_text() -> None:
    duckdb = load("duckdb")
    expected = {(number, seconds) for _, number, seconds in RISKY}
    for statement in blocks("sql")[0].splitlines():
        assert set(duckdb.sql(statement).fetchall()) == expected


def test_jq_adds_up_one_call_at_a_time(folder: Path) -> None:
    need("jq")
    line = blocks("sh")[0]
    done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == f"{SECONDS}\n"


def test_postgresql_tells_null_from_an_empty_text(database: Database, folder: Path) -> None:
    (statement,) = [block for block in blocks("sql") if block.startswith("COPY")]
    with database.connect() as connection:
        connection.execute("CREATE TEMPORARY TABLE calls (LIKE v_xml_cdr)")
        columns = f"calls ({FIELDS})"
        with connection.cursor().copy(statement.rstrip(";\n").replace("calls", columns)) as copy:
            copy.write((folder / "calls.csv").read_bytes())
        query = "SELECT caller_id_name, destination_number, billsec::int FROM calls ORDER BY xml_cdr_uuid"
        assert connection.execute(query).fetchall() == RISKY


SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"


def read_sheet(path: Path) -> list[dict[str, str | float]]:
    """The rows of a workbook by the names in the first: texts, numbers, and no entry for an empty cell."""
    with zipfile.ZipFile(path) as book:
        strings, sheet = (
            ElementTree.fromstring(book.read(f"xl/{name}.xml")) for name in ("sharedStrings", "worksheets/sheet1")
        )
    texts = ["".join(part.text or "" for part in item.iter(f"{SHEET}t")) for item in strings.iter(f"{SHEET}si")]
    rows: list[dict[str, str | float]] = []
    for row in sheet.iter(f"{SHEET}row"):
        cells: dict[str, str | float] = {}
        for cell in row.iter(f"{SHEET}c"):
            assert cell.find(f"{SHEET}f") is None, "a formula"
            if value := cell.findtext(f"{SHEET}v"):
                cells[cell.attrib["r"].rstrip("0123456789")] = (
                    texts[int(value)] if cell.get("t") == "s" else float(value)
                )
        rows.append(cells)
    return [{str(rows[0][column]): value for column, value in cells.items()} for cells in rows[1:]]


@pytest.mark.parametrize("safe", ["false", "true"], ids=["as it is", "as the usage page saves it"])
def test_libreoffice_reads_text_as_text(client: Client, folder: Path, safe: str) -> None:
    """Each cell is what the route sends as JSON, but for the apostrophes of csv_safe."""
    need("soffice")
    query = {"domain_name": "alpha.example.com", "fields": FIELDS}
    begin = BOM_UTF8 if safe == "true" else b""
    (folder / "calls.csv").write_bytes(begin + client.get("/api/calls", **query, format="csv", csv_safe=safe).data)
    program = ["soffice", f"-env:UserInstallation={(folder / 'profile').as_uri()}"]
    words = blocks("sh")[1].split()
    assert words[0] == program[0]
    subprocess.run([*program, *words[1:]], cwd=folder, capture_output=True, check=True, timeout=120)
    expected = [
        {name: value for name, value in call.items() if value not in (None, "")}
        for call in client.calls("/api/calls", **query)
    ]
    if safe == "true":
        for call in expected:
            call |= {name: f"'{value}" for name, value in call.items() if str(value).startswith(("=", "+"))}
    assert read_sheet(folder / "calls.xlsx") == expected


def test_the_function_that_verifies_knows_ours_from_others() -> None:
    """By the example of Standard Webhooks' own specification."""
    names: dict[str, Any] = {}
    exec(blocks("python", "A program of your own")[0], names)
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    body = json.dumps({"test": 2432232314}).encode()
    headers = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    assert names["verify"](headers, body, secret)
    assert not names["verify"](headers, body + b" ", secret)
    assert not names["verify"](headers, body, f"whsec_{base64.b64encode(b'another').decode()}")
