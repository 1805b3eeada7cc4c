"""examples/rate_month.py: what a month costs, by calls and prices whose sums are worked out by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients import Cable
from tests.conftest import ROOT, Database, DatabaseMaker, Gunicorn, serve

pytestmark = pytest.mark.direct("is about a client")

ALPHA = "alpha.example.com"
PRICES = """prefix,name,per_minute,first,next,minimum
49,Germany,0.0120,60,60,0
4915,Germany mobile,0.0900,30,6,0.05
1,"USA, Canada",0.003,1,1,0
88,satellite,0.1,1,1,0
0,national,0.0600,60,1,0
"""
# number, seconds -> billed seconds, money
CALLS: list[tuple[str, int, int, str]] = [
    ("+4930123", 1, 60, "0.0120"),
    ("4930123", 60, 60, "0.0120"),
    ("004930123", 61, 120, "0.0240"),
    ("+4915201", 1, 30, "0.0500"),  # 0.0450, below the minimum
    ("+4915201", 31, 36, "0.0540"),
    ("+4915201", 36, 36, "0.0540"),
    ("+4915201", 37, 42, "0.0630"),
    ("15550100", 1, 1, "0.0001"),  # 0.00005 is rounded up
    ("15550100", 59, 59, "0.0030"),  # 0.00295 too
    ("15550100", 7, 7, "0.0004"),  # 0.00035 too
    ("8812345", 1, 1, "0.0017"),  # 0.001666…
    ("8812345", 2, 2, "0.0033"),  # 0.003333…
    ("030123", 59, 60, "0.0600"),
    ("030123", 61, 61, "0.0610"),
]
BILL = """prefix,name,calls,seconds,billed,money
0,national,2,120,121,0.1210
1,"USA, Canada",3,67,67,0.0035
49,Germany,3,122,240,0.0480
4915,Germany mobile,4,105,144,0.2210
88,satellite,2,3,3,0.0050
,total,14,417,575,0.3985
"""
# What is no outbound call that costs money, or not of the month.
OTHERS: list[dict[str, Any]] = [
    {"direction": "inbound"},
    {"billsec": 0},
    {"leg": "b"},
    {"hangup_cause": "LOSE_RACE"},
    {"domain_name": "beta.example.com"},
    {"end_stamp": "2026-01-31 22:59:59.999+00"},  # still January in Berlin
    {"end_stamp": "2026-02-28 23:00:00+00"},  # March
]


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    database = make_database(index=True)
    for number, seconds, _, _ in CALLS:
        database.insert_call(destination_number=number, billsec=seconds, direction="outbound")
    for other in OTHERS:
        database.insert_call(**{"destination_number": "4930123", "billsec": 600, "direction": "outbound"} | other)
    return database


@pytest.fixture(scope="module")
def gunicorn(database: Database) -> Iterator[Gunicorn]:
    with serve(database.dsn, CDR_API_TIMEZONE="Europe/Berlin") as running:
        yield running


@pytest.fixture(scope="module")
def token(database: Database) -> str:
    return database.account(ALPHA)


Done = subprocess.CompletedProcess[str]


@pytest.fixture
def environ(gunicorn: Gunicorn, token: str) -> dict[str, str]:
    client = str(ROOT / "clients/python/src")
    return {"PATH": os.environ["PATH"], "PYTHONPATH": client, "CDR_URL": f"{gunicorn.url}/api", "CDR_TOKEN": token}


def rate_month(environ: dict[str, str], folder: Path, prices: str = PRICES, month: str = "2026-02") -> Done:
    (folder / "prices.csv").write_text(prices, "utf-8")
    command = [sys.executable, str(ROOT / "examples/rate_month.py"), ALPHA, month, str(folder / "prices.csv")]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=60)


def fails(done: Done) -> str:
    """What it says when it fails, with nothing printed that could pass for a bill."""
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_the_sums_are_those_that_were_worked_out_by_hand(environ: dict[str, str], tmp_path: Path) -> None:
    done = rate_month(environ, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, BILL, "")


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_each_call_is_rated_as_the_table_says(
    database: Database, environ: dict[str, str], tmp_path: Path, call: tuple[str, int, int, str]
) -> None:
    """By itself, in a month of its own."""
    number, seconds, billed, money = call
    database.execute("DELETE FROM v_xml_cdr WHERE end_stamp > '2026-06-01'")
    database.insert_call(
        destination_number=number, billsec=seconds, direction="outbound", end_stamp="2026-06-15 12:00:00+00"
    )
    done = rate_month(environ, tmp_path, month="2026-06")
    assert done.stdout.endswith(f",total,1,{seconds},{billed},{money}\n"), done


def test_a_month_without_calls_costs_nothing(environ: dict[str, str], tmp_path: Path) -> None:
    done = rate_month(environ, tmp_path, month="2026-12")
    assert done.stdout == "prefix,name,calls,seconds,billed,money\n,total,0,0,0,0.0000\n"


FAULTS = {
    "no price": PRICES.replace("88,satellite,0.1,1,1,0\n", ""),
    "a prefix twice": PRICES + "49,again,1,1,1,0\n",
    "a comma for a point": PRICES.replace("0.0120", '"0,0120"'),
    "no step": PRICES.replace(",60,60,", ",60,0,"),
    "a column that lacks": PRICES.replace("minimum", "least"),
    "a cell that lacks": PRICES.replace("49,Germany,0.0120,60,60,0", "49,Germany,0.0120"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_table_that_does_not_do_rates_nothing(environ: dict[str, str], tmp_path: Path, fault: str) -> None:
    assert fails(rate_month(environ, tmp_path, FAULTS[fault])).startswith("Nothing is rated: ")


@pytest.mark.parametrize("month", ["202602", "2026-13", ""])
def test_what_is_no_month_is_told(environ: dict[str, str], tmp_path: Path, month: str) -> None:
    assert fails(rate_month(environ, tmp_path, month=month)).startswith("usage: ")


def test_an_answer_that_lacks_calls_rates_nothing(
    environ: dict[str, str], tmp_path: Path, gunicorn: Gunicorn, token: str
) -> None:
    cable = Cable(gunicorn.url, lambda answer: answer[: answer.rindex(b"\n", 0, -20) + 1])
    with cable.laid() as url:
        said = fails(rate_month(environ | {"CDR_URL": url}, tmp_path))
    assert "Nothing is rated" in said
    assert token not in cable.seen[0]


def test_a_refusal_is_told(environ: dict[str, str], tmp_path: Path) -> None:
    assert "401" in fails(rate_month(environ | {"CDR_TOKEN": "cdr_unknown"}, tmp_path))
