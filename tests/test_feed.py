"""The feed's contract: cursors, what they are bound to, and what they are refused for."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest

from cdr.cursors import read_cursor, write_cursor
from cdr.feed import FeedCursor, Window
from cdr.selection import Domains, Selection
from tests.conftest import Client, Database, DatabaseMaker, problem, wait_for


@pytest.fixture
def database(make_database: DatabaseMaker) -> Database:
    return make_database(calls=300, index=True)


@pytest.fixture
def client(database: Database) -> Client:
    return database.client(database.account("alpha.example.com", "beta.example.com"))


def poll(client: Client, cursor: str | None = None, **parameters: Any) -> tuple[list[str], str]:
    """The uuids of a poll that must succeed, and the next cursor."""
    start = {"from": "2026-01-01"} if cursor is None else {"cursor": cursor}
    response = client.get("/api/call_feed", fields="xml_cdr_uuid", **start, **parameters)
    assert response.status_code == 200, response.text
    return [call["xml_cdr_uuid"] for call in json.loads(response.data)], response.headers["X-Next-Cursor"]


def drain(client: Client, cursor: str, **parameters: Any) -> list[str]:
    """The uuids of all polls until two are empty: one may be where a window ends."""
    found: list[str] = []
    empty = 0
    while empty < 2:
        page, cursor = poll(client, cursor, **parameters)
        found += page
        empty = 0 if page else empty + 1
    return found


def stored(database: Database, where: str) -> set[str]:
    return {row[0] for row in database.execute(f"SELECT xml_cdr_uuid::text FROM v_xml_cdr WHERE {where}")}


def drain_as_told(client: Client, place: dict[str, str], **parameters: Any) -> tuple[list[str], str]:
    """The uuids of all polls while X-More-Waiting is true, and the last cursor."""
    found: list[str] = []
    while True:
        response = client.get("/api/call_feed", fields="xml_cdr_uuid", **place, **parameters)
        assert response.status_code == 200, response.text
        found += [call["xml_cdr_uuid"] for call in json.loads(response.data)]
        place = {"cursor": response.headers["X-Next-Cursor"]}
        if response.headers["X-More-Waiting"] == "false":
            return found, place["cursor"]
        assert response.headers["X-More-Waiting"] == "true"


MINE = "domain_name IN ('alpha.example.com', 'beta.example.com')"


def test_each_call_comes_once_however_late_and_old_it_is(database: Database, client: Client) -> None:
    first, cursor = poll(client)
    assert set(first) == stored(database, MINE)
    assert len(first) == len(set(first))
    assert poll(client, cursor)[0] == []
    late = database.insert_call(end_stamp="2026-11-01 00:00:00+00", domain_name="beta.example.com")
    undated = database.insert_call(end_stamp=None)
    database.insert_call(domain_name="gamma.example.com", end_stamp="2026-11-01 00:00:00+00")
    second, cursor = poll(client, cursor)
    assert set(second) == {late, undated}
    assert poll(client, cursor)[0] == []


def test_an_uncommitted_call_is_not_passed_over(database: Database, client: Client) -> None:
    _, cursor = poll(client)
    insert = "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_name, end_stamp) VALUES (%s, 'alpha.example.com', now())"
    slow_uuid = "aaaaaaaa-0000-4000-8000-000000000001"
    with psycopg.connect(database.server.get_uri(database=database.name)) as slow:
        slow.execute(insert, [slow_uuid])
        fast = database.insert_call(end_stamp="2026-11-20 00:00:00+00")
        seen, cursor = poll(client, cursor)
        assert slow_uuid not in seen
        slow.commit()
    rest, cursor = poll(client, cursor)
    assert sorted(seen + rest) == sorted([slow_uuid, fast])


def test_complete_through_waits_for_an_open_transaction(database: Database, client: Client) -> None:
    def through(cursor: str) -> tuple[str, str]:
        headers = client.get("/api/call_feed", cursor=cursor).headers
        return headers["X-Complete-Through"], headers["X-Next-Cursor"]

    _, cursor = poll(client)
    with psycopg.connect(database.server.get_uri(database=database.name)) as slow:
        slow.execute("UPDATE v_domains SET domain_description = 'x'")
        (wrote,) = slow.execute("SELECT to_json(clock_timestamp())").fetchall()[0]
        for _ in range(5):
            held, cursor = through(cursor)
            assert datetime.fromisoformat(held) < datetime.fromisoformat(wrote)

    def moved_on() -> bool:
        nonlocal cursor
        held, cursor = through(cursor)
        return datetime.fromisoformat(held) > datetime.fromisoformat(wrote)

    wait_for(moved_on)


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_pages_of_the_feed_are_the_whole_feed(database: Database, client: Client, limit: int) -> None:
    database.insert_call(end_stamp=None)
    database.insert_call(end_stamp=None)
    page, cursor = poll(client, limit=limit, hangup_cause="USER_BUSY")
    found = page + drain(client, cursor, limit=limit, hangup_cause="USER_BUSY")
    assert len(found) == len(set(found))
    assert set(found) == stored(database, f"{MINE} AND hangup_cause = 'USER_BUSY'")


def test_a_call_changed_between_pages_comes_again_and_none_is_lost(database: Database, client: Client) -> None:
    page, cursor = poll(client, limit=50)
    database.execute("UPDATE v_xml_cdr SET record_name = 'gone'")
    rest = drain(client, cursor, limit=50)
    assert set(rest) == stored(database, MINE)  # each is another row now
    assert len(rest) == len(set(rest))
    assert set(page) <= set(rest)


def test_links_and_formats(client: Client) -> None:
    response = client.get(
        "/api/call_feed", **{"from": "2026-01-01", "format": "ndjson", "direction": "inbound", "limit": "5"}
    )
    assert response.headers["Content-Type"] == "application/x-ndjson"
    assert all(json.loads(line)["direction"] == "inbound" for line in response.text.splitlines())
    link = response.headers["Link"]
    assert link.endswith('>; rel="next"')
    query = {name: values[0] for name, values in parse_qs(urlsplit(link[1:].partition(">")[0]).query).items()}
    assert query.pop("cursor") == response.headers["X-Next-Cursor"]
    assert query == {"format": "ndjson", "direction": "inbound", "limit": "5"}
    table = client.get("/api/call_feed", **{"from": "2099-01-01", "format": "csv", "fields": "billsec"})
    assert table.text == "billsec\n"


def test_from_takes_the_calls_that_ended_since(database: Database, client: Client) -> None:
    response = client.get("/api/call_feed", **{"from": "2026-10-01T12:00:00Z", "fields": "xml_cdr_uuid"})
    assert {call["xml_cdr_uuid"] for call in response.get_json()} == stored(
        database, f"{MINE} AND end_stamp >= '2026-10-01 12:00:00+00'"
    )


@pytest.mark.parametrize("parameters", [{}, {"from": "2026-01-01", "cursor": "x"}, {"from": "never"}, {"cursor": ""}])
def test_from_and_cursor_exclude_each_other(client: Client, parameters: dict[str, str]) -> None:
    response = client.get("/api/call_feed", **parameters)
    assert response.status_code == 422
    assert problem(response)["data"]


def test_a_cursor_that_was_tampered_with_is_422(client: Client) -> None:
    _, cursor = poll(client)
    for bad in (cursor[:-1], cursor[1:], cursor.swapcase(), "x", "x.y.z", cursor + "=", "é"):
        response = client.get("/api/call_feed", cursor=bad)
        assert response.status_code == 422, bad
        assert list(problem(response)["data"]) == ["cursor"]


def test_a_foreign_cursor_is_410_and_says_how_to_go_on(database: Database, client: Client) -> None:
    _, cursor = poll(client)
    other = database.client(database.account("alpha.example.com", "beta.example.com"), client.app)
    foreign = other.get("/api/call_feed", cursor=cursor)
    assert foreign.status_code == 410
    assert other.get("/api/call_feed", **{"from": problem(foreign)["data"]["from"]}).status_code == 200
    for parameters in ({"direction": "inbound"}, {"domain_name": "alpha.example.com"}):
        response = client.get("/api/call_feed", cursor=cursor, **parameters)
        assert response.status_code == 410
        data = problem(response)["data"]
        assert client.get("/api/call_feed", **{"from": data["from"]}).status_code == 200
    assert client.get("/api/call_feed", cursor=cursor, fields="billsec", format="csv", limit=3).status_code == 200


def test_a_grant_that_comes_ends_the_cursor_and_one_that_goes_does_not(database: Database, client: Client) -> None:
    _, cursor = poll(client)
    account = "(SELECT account_id FROM cdr_api.tokens ORDER BY token_id DESC LIMIT 1)"
    gamma = "(SELECT domain_uuid FROM v_domains WHERE domain_name = 'gamma.example.com')"
    grant = f"INSERT INTO cdr_api.grants (account_id, domain_uuid) VALUES ({account}, {gamma})"
    database.execute(grant)
    response = client.get("/api/call_feed", cursor=cursor)
    assert response.status_code == 410
    assert "domain" in problem(response)["message"]
    _, cursor = poll(client)
    database.execute(f"DELETE FROM cdr_api.grants WHERE domain_uuid = {gamma}")
    assert client.get("/api/call_feed", cursor=cursor).status_code == 200
    database.execute(grant)  # what was stored meanwhile was not delivered
    assert client.get("/api/call_feed", cursor=cursor).status_code == 410
    _, cursor = poll(client)
    database.execute("UPDATE v_domains SET domain_name = 'renamed.example.com' WHERE domain_name = 'beta.example.com'")
    assert client.get("/api/call_feed", cursor=cursor).status_code == 200  # a new name is no new domain
    database.execute("DELETE FROM v_domains WHERE domain_name = 'renamed.example.com'")
    assert client.get("/api/call_feed", cursor=cursor).status_code == 200


def test_who_may_read_all_keeps_the_cursor_when_a_domain_is_added(database: Database) -> None:
    everything = database.client(database.account(all_domains=True))
    _, cursor = poll(everything)
    database.execute("INSERT INTO v_domains (domain_uuid, domain_name) VALUES (gen_random_uuid(), 'delta.example.com')")
    new = database.insert_call(domain_name="delta.example.com", end_stamp="2026-11-20 00:00:00+00")
    assert poll(everything, cursor)[0] == [new]


def forge(client: Client, cursor: str, **changes: Any) -> str:
    """A cursor as this service would have signed it in another situation."""
    secret = client.app.extensions["cdr_api"].secret
    return write_cursor(secret, "feed", read_cursor(secret, "feed", "cursor", cursor) | changes)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"cluster": "1"}, id="another cluster"),
        pytest.param({"low": 2**40}, id="ahead of the database, as after a restore"),
        pytest.param({"low": -(2**31)}, id="too old"),
        pytest.param({"deep": -(2**31)}, id="too long without a sweep"),
        pytest.param({"version": 0}, id="another version"),
    ],
)
def test_a_cursor_that_cannot_be_continued_is_410(client: Client, changes: dict[str, Any]) -> None:
    _, cursor = poll(client)
    response = client.get("/api/call_feed", cursor=forge(client, cursor, **changes))
    assert response.status_code == 410
    data = problem(response)["data"]
    assert "from" in data
    assert client.get("/api/call_feed", **{"from": data["from"]}).status_code == 200


def test_the_look_back_counts_from_the_cursor_and_not_from_now(database: Database, client: Client) -> None:
    """A poller that was away for two months misses nothing."""
    _, cursor = poll(client)
    long_ago = "2026-02-01T00:00:00+00:00"
    cursor = forge(client, cursor, since=long_ago)
    old = database.insert_call(end_stamp="2026-02-01 00:00:00+00")
    database.insert_call(end_stamp="2026-01-31 23:59:59+00")
    assert poll(client, cursor)[0] == [old]


def test_domains_that_may_not_be_read(client: Client) -> None:
    assert client.get("/api/call_feed", **{"from": "2026-01-01", "domain_name": "gamma.example.com"}).status_code == 403
    assert (
        client.get("/api/call_totals", **{"from": "2026-01-01", "to": "2026-01-02", "domain_name": "no"}).status_code
        == 403
    )
    for path in ("/api/concurrent_calls_by_domain", "/api/active_calls_by_domain"):
        assert client.get(path, date="2026-01-01", domain_name="gamma.example.com").status_code == 403


@pytest.mark.parametrize(("low", "looks"), [(None, True), (99, True), (100, False)])
def test_where_no_transaction_has_ended_no_call_is_looked_at(low: int | None, *, looks: bool) -> None:
    now = datetime.now(UTC)
    cursor = FeedCursor(
        version=2,
        cluster="1.2",
        account_id=1,
        purpose="",
        grants=None,
        names=(),
        table=1,
        timeline=1,
        position="0/1",
        low=low,
        since=now.isoformat(),
        taken=now.isoformat(),
        through=now.isoformat(),
        high=100,
    )
    window = Window(cursor, Selection(Domains(everything=True)), {"now": now}, timedelta(days=45))
    for limit in (None, 5):
        assert {part.possible for part in window.parts(limit)} == {looks}


@pytest.mark.parametrize("limit", [1, 7, 100, 100_000])
def test_a_poller_is_told_whether_to_poll_again_at_once(database: Database, client: Client, limit: int) -> None:
    narrow = {"direction": "inbound"} if limit == 1 else {}
    found, cursor = drain_as_told(client, {"from": "2026-01-01"}, limit=limit, **narrow)
    expected = stored(database, f"{MINE} AND direction = 'inbound'" if narrow else MINE)
    assert sorted(found) == sorted(expected)
    assert drain_as_told(client, {"cursor": cursor}, limit=limit, **narrow)[0] == []
    late = database.insert_call(direction="inbound", domain_name="beta.example.com")
    assert drain_as_told(client, {"cursor": cursor}, limit=limit, **narrow)[0] == [late]


def test_what_is_stored_while_a_window_is_paged_through_is_told_to_be_waiting(
    database: Database, client: Client
) -> None:
    page = client.get("/api/call_feed", **{"from": "2026-01-01", "limit": "100"})
    late = database.insert_call()
    found, cursor = drain_as_told(client, {"cursor": page.headers["X-Next-Cursor"]}, limit=100)
    assert late in found
    whole = client.get("/api/call_feed", cursor=page.headers["X-Next-Cursor"])  # the rest of the window
    assert whole.headers["X-More-Waiting"] == "true"
    assert late not in whole.text
    assert poll(client, whole.headers["X-Next-Cursor"])[0] == [late]
    assert client.get("/api/call_feed", cursor=cursor).headers["X-More-Waiting"] == "false"


def test_what_an_open_transaction_holds_back_is_not_told_to_be_waiting(database: Database, client: Client) -> None:
    """Else a poller would poll without a pause until that has ended."""
    _, cursor = poll(client)
    with psycopg.connect(database.server.get_uri(database=database.name)) as writer:
        writer.execute("SELECT txid_current()")
        late = database.insert_call(end_stamp=datetime.now(UTC))
        for _ in range(3):
            response = client.get("/api/call_feed", cursor=cursor, limit="5")
            assert (response.get_json(), response.headers["X-More-Waiting"]) == ([], "false")
            cursor = response.headers["X-Next-Cursor"]
    assert drain_as_told(client, {"cursor": cursor}, limit=5)[0] == [late]
