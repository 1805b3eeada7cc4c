"""clients/python against the service as shipped: every call, and nothing that only looks whole."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any, get_type_hints

import psycopg
import pytest
from fusionpbx_cdr import (
    ActiveCalls,
    ApiError,
    BrokenAnswerError,
    BusyError,
    Call,
    Client,
    ConcurrentCalls,
    CursorGoneError,
    Domain,
    Extension,
    Total,
    log_in,
)

import cdr_api
from cdr.selection import FIELDS, MORE_FIELDS
from tests.clients import Cable, Cut
from tests.conftest import PASSWORD, Database, DatabaseMaker, Gunicorn, serve
from tests.documents import DOCUMENTS

pytestmark = pytest.mark.direct("is about a client")

ALPHA, BETA = "alpha.example.com", "beta.example.com"
NOW = datetime.now(UTC)
GUIDE = re.findall(r"```python\n(.*?)```", DOCUMENTS["clients/python/README.md"], re.DOTALL)


def add_calls(database: Database, calls: int, days: int = 20) -> None:
    database.execute(
        "INSERT INTO v_xml_cdr"
        " (xml_cdr_uuid, domain_uuid, domain_name, start_stamp, end_stamp, billsec, leg, direction)"
        " SELECT gen_random_uuid(), md5('domain ' || %(domain)s)::uuid, %(domain)s,"
        "        ended - i %% 60 * interval '1 second', ended, i %% 60, 'a', 'outbound'"
        "   FROM (SELECT i, now() - random() * %(days)s * interval '1 day' AS ended"
        "           FROM generate_series(1, %(calls)s) AS i) AS calls",
        {"domain": ALPHA, "calls": calls, "days": days},
    )


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    database = make_database(index=True)
    add_calls(database, 2500)
    return database


@pytest.fixture(scope="module")
def gunicorn(database: Database) -> Iterator[Gunicorn]:
    with serve(database.dsn, CDR_API_POOL_TIMEOUT="200ms", CDR_API_TIMEZONE="UTC") as running:
        yield running


@pytest.fixture(scope="module")
def token(database: Database) -> str:
    return database.account(ALPHA, email="client@example.com")


@pytest.fixture
def api(gunicorn: Gunicorn, token: str) -> Iterator[Client]:
    with Client(f"{gunicorn.url}/api", token, patience=0) as api:
        yield api


Seconds = dict[str, int]


def stored(database: Database) -> Seconds:
    return dict(database.execute("SELECT xml_cdr_uuid::text, billsec::int FROM v_xml_cdr"))


def seconds(calls: Iterator[Call] | list[Call]) -> Seconds:
    return {call["xml_cdr_uuid"]: call["billsec"] for call in calls}


# What it reads ----------------------------------------------------------------


def test_calls_are_those_of_the_database(api: Client, database: Database) -> None:
    expected = stored(database)
    assert seconds(api.calls(domain_name=ALPHA)) == expected
    begin = NOW - timedelta(days=30)
    assert seconds(api.call_range(domain_name=ALPHA, from_=begin, to=NOW + timedelta(days=1))) == expected
    answered = seconds(api.calls(domain_name=ALPHA, answered=True, fields=["xml_cdr_uuid", "billsec"]))
    assert answered == {uuid: length for uuid, length in expected.items() if length > 0}
    (call,) = api.calls(domain_name=ALPHA, limit=1, order="desc")
    assert tuple(call) == tuple(FIELDS)


def test_one_call_its_legs_and_a_list(api: Client, database: Database) -> None:
    uuid = next(iter(stored(database)))
    none = "00000000-0000-4000-8000-00000000dead"
    assert api.call(uuid)["xml_cdr_uuid"] == uuid
    assert [leg["xml_cdr_uuid"] for leg in api.legs(uuid)] == [uuid]
    with pytest.raises(ApiError) as refused:
        api.call(none)
    assert refused.value.status == 404
    calls, missing = api.look_up([uuid, none] + [none[:-4] + f"{n:04x}" for n in range(12_000)], fields="xml_cdr_uuid")
    assert [call["xml_cdr_uuid"] for call in calls] == [uuid]
    assert len(missing) == 12_001


def test_totals_and_domains(api: Client, database: Database) -> None:
    begin, end = NOW - timedelta(days=30), NOW + timedelta(days=1)
    totals = api.totals(from_=begin, to=end, group_by=["domain_name", "direction"])
    (total,) = totals
    assert (total["domain_name"], total["direction"], total["calls"]) == (ALPHA, "outbound", 2500)
    assert total["billsec"] == sum(stored(database).values())
    assert [domain["domain_name"] for domain in api.domains()] == [ALPHA]
    database.execute(
        "INSERT INTO v_extensions (extension_uuid, domain_uuid, extension)"
        " SELECT gen_random_uuid(), domain_uuid, '101' FROM v_domains WHERE domain_name = %s",
        [ALPHA],
    )
    (extension,) = api.extensions(domain_name=ALPHA)
    assert set(extension) == set(get_type_hints(Extension))
    assert extension["extension"] == "101"


def test_simultaneous_calls(api: Client) -> None:
    day = {"date": (NOW - timedelta(days=1)).date().isoformat(), "resolution": 60, "domain_name": ALPHA, "tz": "UTC"}
    peaks, active = list(api.concurrent_calls(**day)), list(api.active_calls(**day))
    assert len(peaks) == len(active) == 24
    assert all(set(peak) == set(get_type_hints(ConcurrentCalls)) for peak in peaks)
    assert all(set(count) == set(get_type_hints(ActiveCalls)) for count in active)
    assert [peak["active_calls"] > 0 for peak in peaks] == [count["total"] > 0 for count in active]
    busy = list(api.concurrent_calls(**day, active_only=True))
    assert busy == [peak for peak in peaks if peak["active_calls"]] != []


@pytest.mark.parametrize("kind", ["Call", "Total", "Domain"])
def test_its_types_are_those_of_the_description(kind: str) -> None:
    if kind == "Call":
        assert tuple(get_type_hints(Call)) == (*FIELDS, *MORE_FIELDS)
    elif kind == "Total":
        assert set(get_type_hints(Total)) == {*cdr_api.GROUPS, "calls", "answered", "billsec", "billmsec", "digest"}
    else:
        assert set(get_type_hints(Domain)) == {"domain_uuid", "domain_name"}


def test_a_token_from_logging_in_to_logging_out(gunicorn: Gunicorn, token: str) -> None:
    url = f"{gunicorn.url}/api"
    with pytest.raises(ApiError, match="401"):
        log_in(url, "client@example.com", "wrong")
    with Client(url, log_in(url, "client@example.com", PASSWORD)) as api:
        assert api.domains()
        api.log_out()
        with pytest.raises(ApiError, match="401"):
            api.domains()


# The feed ---------------------------------------------------------------------


def test_the_feed_gives_each_call_once_and_what_comes_later(api: Client, database: Database) -> None:
    found: Seconds = {}
    cursor = None
    for page in api.feed(from_="2026-01-01", limit=700, fields="xml_cdr_uuid,billsec"):
        assert not found.keys() & seconds(page.calls).keys()
        found |= seconds(page.calls)
        cursor = page.next_cursor
    assert found == stored(database)
    add_calls(database, 3)
    for page in api.feed(cursor, limit=700):
        found |= seconds(page.calls)
        assert page.complete_through
    assert found == stored(database)


def test_a_cursor_that_is_gone_says_where_to_begin_again(gunicorn: Gunicorn, database: Database) -> None:
    email = "grants@example.com"
    with Client(f"{gunicorn.url}/api", database.account(ALPHA, email=email)) as api:
        (*_, page) = api.feed(from_="2026-01-01", limit=5000)
        done = database.app().test_cli_runner().invoke(args=["user", "grant", email, BETA])
        assert done.exit_code == 0
        with pytest.raises(CursorGoneError) as gone:
            api.poll(cursor=page.next_cursor)
        assert sum(len(page.calls) for page in api.feed(from_=gone.value.restart_from)) > 0


def test_the_guide_works_as_it_is_written(
    gunicorn: Gunicorn, token: str, database: Database, capsys: pytest.CaptureFixture[str]
) -> None:
    first, feed = GUIDE
    names: dict[str, Any] = {"token": token}
    exec(first.replace("https://pbx.example.com", gunicorn.url).replace("2026-01", f"{NOW:%Y-%m}"), names)
    ((expected,),) = database.execute(
        "SELECT count(*) FROM v_xml_cdr WHERE date_trunc('month', end_stamp AT TIME ZONE 'UTC') ="
        " date_trunc('month', now() AT TIME ZONE 'UTC')"
    )
    assert len(capsys.readouterr().out.splitlines()) == expected
    exec(feed, names)
    with closing(sqlite3.connect(":memory:")) as ledger, Client(f"{gunicorn.url}/api", token) as api:
        ledger.execute("CREATE TABLE calls (xml_cdr_uuid TEXT PRIMARY KEY, destination_number TEXT, billsec INTEGER)")
        ledger.execute("CREATE TABLE position (id INTEGER PRIMARY KEY, cursor TEXT)")
        for _ in range(2):
            names["poll"](api, ledger)
            assert dict(ledger.execute("SELECT xml_cdr_uuid, billsec FROM calls")) == stored(database)


# What goes wrong --------------------------------------------------------------

CUTS: dict[str, Cut] = {
    "in the status line": lambda answer: answer[:10],
    "in the head": lambda answer: answer[: answer.index(b"\r\n\r\n") - 3],
    "behind the head": lambda answer: answer[: answer.index(b"\r\n\r\n") + 4],
    "in the middle": lambda answer: answer[: len(answer) // 2],
    "behind a call": lambda answer: answer[: answer.rindex(b"}\n", 0, len(answer) - 20) + 2],
    "before the end": lambda answer: answer[:-5] if b"chunked" in answer else answer[:-1],
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("limit", [3, 5000], ids=["with a length", "in chunks"])
def test_an_answer_that_was_cut_is_an_error(gunicorn: Gunicorn, token: str, cut: str, limit: int) -> None:
    cable = Cable(gunicorn.url, CUTS[cut])
    with cable.laid() as url, Client(url, token) as api:
        with pytest.raises(BrokenAnswerError):
            list(api.calls(domain_name=ALPHA, limit=limit))
        with pytest.raises(BrokenAnswerError):
            api.poll(from_="2026-01-01", limit=limit)
        with pytest.raises(BrokenAnswerError):
            api.domains()


def test_a_service_that_is_not_there_is_an_error() -> None:
    with Client("http://127.0.0.1:9/api", "cdr_x") as api, pytest.raises(BrokenAnswerError):
        api.domains()


def test_a_refusal_says_what_and_which(api: Client) -> None:
    with pytest.raises(ApiError) as refused:
        list(api.call_range(domain_name=ALPHA, from_="2026-02-30", to="soon", colour="red"))
    assert refused.value.status == 422
    assert {"from", "to", "colour"} <= set(refused.value.data)
    assert refused.value.request_id
    with pytest.raises(ApiError, match="403"):
        list(api.calls(domain_name=BETA))


def test_a_busy_service_is_waited_for_as_long_as_it_says(
    gunicorn: Gunicorn, database: Database, token: str, api: Client
) -> None:
    waited: list[float] = []
    with psycopg.connect(database.server.get_uri(), autocommit=True) as admin:

        def open_again(pause: float) -> None:
            waited.append(pause)
            admin.execute(f'ALTER DATABASE "{database.name}" ALLOW_CONNECTIONS true')

        admin.execute(f'ALTER DATABASE "{database.name}" ALLOW_CONNECTIONS false')
        try:
            admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [database.name])
            with pytest.raises(BusyError) as busy:
                api.domains()
            assert busy.value.retry_after == 5
            with Client(f"{gunicorn.url}/api", token, patience=60) as patient:
                patient.sleep = open_again
                assert patient.domains()
        finally:
            admin.execute(f'ALTER DATABASE "{database.name}" ALLOW_CONNECTIONS true')
    assert set(waited) == {5}


def test_the_token_goes_nowhere_else(gunicorn: Gunicorn, token: str) -> None:
    """A redirect is an error and is not followed."""
    moved = Cable(gunicorn.url, lambda _: b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n")
    with moved.laid() as url, Client(url, token) as api, pytest.raises(ApiError, match="302"):
        api.domains()
    assert len(moved.seen) == 1
