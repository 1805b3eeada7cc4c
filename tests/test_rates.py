"""How many requests a minute a token may make."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cdr.rates import SLOTS, Buckets
from tests.clients import fetch
from tests.conftest import ROOT, Client, Database, DatabaseMaker, problem, serve


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    return make_database()


def test_a_bucket_fills_steadily(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    buckets = Buckets()
    left = [buckets.take(7, 60) for _ in range(61)]
    assert [found.remaining for found in left] == [*range(59, -1, -1), 0]
    assert [found.wait for found in left] == [0] * 60 + [1]
    assert (left[0].reset, left[59].reset) == (1, 60)
    now += 0.5
    assert buckets.take(7, 60).wait == 1  # half a request; being refused costs nothing
    now += 0.5
    assert buckets.take(7, 60).wait == 0
    assert buckets.take(7, 60).wait == 1
    now += 3600
    assert buckets.take(7, 60).remaining == 59  # never more than a minute's worth
    assert buckets.take(7, 1).remaining == 0  # the setting was changed
    assert buckets.take(7, 1).wait == 60


def test_tokens_do_not_share_a_bucket_and_those_unused_longest_give_theirs_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    buckets = Buckets()
    for token in range(1, SLOTS + 1):
        now += 1
        assert buckets.take(token, 1).wait == 0
    assert buckets.take(SLOTS, 1).wait
    assert buckets.take(SLOTS + 1, 1).wait == 0
    assert buckets.take(SLOTS, 1).wait  # still has its own


def statuses(client: Client, number: int) -> list[int]:
    return [client.get("/api/domains").status_code for _ in range(number)]


def test_each_token_has_its_own_limit_and_is_told(database: Database) -> None:
    app = database.app(CDR_API_RATE="5")
    one, other = (Client(app, database.account("alpha.example.com")) for _ in range(2))
    response = one.get("/api/domains")
    assert {name: response.headers[f"RateLimit-{name}"] for name in ("Limit", "Remaining", "Reset")} == {
        "Limit": "5",
        "Remaining": "4",
        "Reset": "12",
    }
    assert statuses(one, 6) == [200] * 4 + [429] * 2
    refused = one.get("/api/calls")  # whatever is asked for
    assert refused.status_code == 429
    assert 0 < int(refused.headers["Retry-After"]) <= 12
    assert refused.headers["RateLimit-Remaining"] == "0"
    assert "5 requests a minute" in problem(refused)["message"]
    assert statuses(other, 5) == [200] * 5
    assert Client(app).get("/api/health").status_code == 200
    assert Client(app, "cdr_unknown").get("/api/domains").status_code == 401


def test_by_default_there_is_no_limit(database: Database) -> None:
    client = database.client(database.account("alpha.example.com"))
    assert statuses(client, 100) == [200] * 100
    assert "RateLimit-Limit" not in client.get("/api/domains").headers


def test_all_workers_count_together(database: Database) -> None:
    token = database.account("alpha.example.com")
    with serve(database.dsn, CDR_API_WORKERS="4", CDR_API_RATE="30") as gunicorn:
        begun = time.monotonic()

        def ask(_: Any) -> int:
            return fetch(f"{gunicorn.url}/api/domains", token).status_code

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(ask, range(80)))
        refilled = int((time.monotonic() - begun) / 2) + 1
    assert 30 <= found.count(200) <= 30 + refilled
    assert found.count(200) + found.count(429) == 80


def test_a_process_that_dies_keeps_no_lock() -> None:
    code = """
import os, signal
from cdr.rates import buckets
if not os.fork():
    with buckets.locked():
        os.kill(os.getpid(), signal.SIGKILL)
os.wait()
print(buckets.take(1, 5).remaining)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "4\n"
