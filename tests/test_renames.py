"""What moves while its calls stay: a domain's name (renamed, freed, given twice), and calls to an archive."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

import demo
from tests.conftest import Client, Database, DatabaseMaker
from tests.shapes import (
    LIST,
    NAMED,
    ROUTE,
    UA,
    B,
    Shape,
    add_shapes,
    granted,
    set_domains,
    uuids_of,
)

NEW = "new.example.com"
EVER = {"from": "2026-01-01"}
WIDE_RANGE = EVER | {"to": "2100-01-01"}


def rename(database: Database, uuid: str, name: str) -> None:
    """The first statement of FusionPBX's rename; the second, for the calls, comes after it."""
    database.execute("UPDATE v_domains SET domain_name = %s WHERE domain_uuid = %s", [name, uuid])


def add_domain(database: Database, uuid: str, name: str) -> None:
    database.execute("INSERT INTO v_domains (domain_uuid, domain_name) VALUES (%s, %s)", [uuid, name])


def poller(client: Client, **parameters: str) -> Callable[[], dict[str, str | None]]:
    """Polls from where it was; gives the new calls with the domain's name in them."""
    position: dict[str, str] = dict(EVER)

    def poll() -> dict[str, str | None]:
        response = client.get("/api/call_feed", **parameters, **position)
        assert response.status_code == 200, response.text
        position.clear()
        position["cursor"] = response.headers["X-Next-Cursor"]
        return {call["xml_cdr_uuid"]: call["domain_name"] for call in json.loads(response.data)}

    return poll


def totals(client: Client, **parameters: str) -> list[dict[str, Any]]:
    response = client.get("/api/call_totals", **WIDE_RANGE, **parameters)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = json.loads(response.data)
    return found


def by_name(client: Client) -> dict[str | None, int]:
    return {row["domain_name"]: row["calls"] for row in totals(client, group_by="domain_name")}


@pytest.mark.parametrize("release", ["4.2.2", demo.NEWEST])
def test_a_rename_changes_the_name_and_loses_nothing(make_database: DatabaseMaker, release: str) -> None:
    database = make_database(release)
    set_domains(database)
    app = database.app()
    wide = dict(zip(LIST, ({}, WIDE_RANGE, EVER), strict=True))
    ours, everything = Client(app, granted(database, UA)), Client(app, database.account(all_domains=True))
    pollers = [
        poller(ours),
        poller(ours, domain_uuid=UA),
        poller(everything),
        poller(everything, domain_uuid=UA),
    ]

    def store(uuid: str | None = UA, name: str = NAMED[UA]) -> str:
        # UA feed looks for late calls among those that ended lately.
        return database.insert_call(domain_uuid=uuid, domain_name=name, end_stamp=f"{datetime.now(UTC):%F %T}")

    before = store()
    assert [poll() for poll in pollers] == [{before: NAMED[UA]}] * 4

    rename(database, UA, NEW)
    within = store()  # by an importer that read the name from the channel
    assert [poll() for poll in pollers] == [{within: NEW}] * 4
    for path in LIST:
        for given in ({"domain_name": NEW}, {"domain_uuid": UA}):
            assert uuids_of(ours, path, **wide[path], **given) == {before, within}
        assert ours.get(path, **wide[path], domain_name=NAMED[UA]).status_code == 403
    assert by_name(ours) == by_name(everything) == {NEW: 2}

    sql = "UPDATE v_xml_cdr SET domain_name = %s WHERE domain_name = %s AND domain_uuid = %s"
    database.execute(sql, [NEW, NAMED[UA], UA])  # which brings them again: rows that were written again
    after = store()
    assert [poll() for poll in pollers] == [dict.fromkeys((before, within, after), NEW)] * 4

    taken = "a9000000-0000-4000-8000-000000000001"  # the name that is free again, by another customer
    add_domain(database, taken, NAMED[UA])
    theirs = Client(app, granted(database, taken))
    last, other, other_by_name = store(), store(taken), store(None)
    assert [poll() for poll in pollers[:2]] == [{last: NEW}] * 2
    assert pollers[2]() == {last: NEW, other: NAMED[UA], other_by_name: NAMED[UA]}
    assert uuids_of(ours, "/api/calls", domain_name=NEW) == {before, within, after, last}
    assert ours.get("/api/calls", domain_name=NAMED[UA]).status_code == 403
    assert uuids_of(theirs, "/api/calls", domain_name=NAMED[UA]) == {other, other_by_name}
    assert by_name(theirs) == {NAMED[UA]: 2}
    assert by_name(everything) == {NEW: 4, NAMED[UA]: 2}
    assert by_name(ours) == {NEW: 4}


def test_a_name_given_back_brings_the_old_name_back(make_database: DatabaseMaker) -> None:
    """Two renames, and two domains that swap their names: the uuid stays whose the calls are."""
    database = make_database()
    set_domains(database)
    client = Client(database.app(), granted(database, UA))
    mine = {database.insert_call(domain_uuid=UA, domain_name=name) for name in (NAMED[UA], NAMED[B], NEW)}
    database.insert_call(domain_uuid=B, domain_name=NAMED[B])
    for name, others in (
        (NEW, NAMED[B]),
        (NAMED[B], NAMED[UA]),
        (NAMED[UA], NAMED[B]),
    ):
        rename(database, UA, name)
        rename(database, B, others)
        assert uuids_of(client, "/api/calls", domain_name=name) == mine
        assert by_name(client) == {name: 3}
        assert client.get("/api/calls", domain_name=others).status_code == 403


@pytest.mark.parametrize("separate", [False, True], ids=["the same database", "an archive"])
def test_who_takes_a_freed_name_gets_none_of_the_old_calls(make_database: DatabaseMaker, *, separate: bool) -> None:
    database = make_database()
    archive = make_database() if separate else database
    set_domains(database)
    app = database.app(**({"CDR_API_CALLS_DSN": archive.dsn} if separate else {}))
    deleted = Client(app, granted(database, UA))
    old = {archive.insert_call(domain_uuid=UA, billsec=61) for _ in range(3)}
    database.execute("DELETE FROM v_domains WHERE domain_uuid = %s", [UA])  # the calls stay: it did not finish
    new_uuid = "a9000000-0000-4000-8000-000000000001"
    add_domain(database, new_uuid, NAMED[UA])
    new = {archive.insert_call(domain_uuid=new_uuid)}
    customer = Client(app, database.account(NAMED[UA]))  # granted by name, as the command does
    everything = Client(app, database.account(all_domains=True))
    for path in LIST:
        for client in (customer, everything):
            assert uuids_of(client, path, **ROUTE[path], domain_name=NAMED[UA]) == new
            assert uuids_of(client, path, **ROUTE[path], domain_uuid=new_uuid) == new
        assert everything.get(path, **ROUTE[path], domain_uuid=UA).status_code == 404
        for client in (customer, deleted):
            assert client.get(path, **ROUTE[path], domain_uuid=UA).status_code == 403
        assert deleted.get(path, **ROUTE[path], domain_name=NAMED[UA]).status_code == 403
    assert uuids_of(customer, "/api/call_feed", **EVER) == new
    assert uuids_of(deleted, "/api/call_feed", **EVER) == set()
    assert uuids_of(everything, "/api/call_feed", **EVER) == old | new
    assert [totals(client)[0]["calls"] for client in (customer, deleted, everything)] == [1, 0, 4]
    assert totals(everything)[0]["billsec"] == 3 * 61 + 1
    assert {row["domain_uuid"]: row["calls"] for row in totals(everything, group_by="domain_uuid")} == {
        UA: 3,
        new_uuid: 1,
    }
    found = customer.post("/api/call_lookup", json={"xml_cdr_uuid": sorted(old | new)}).get_json()
    assert ({call["xml_cdr_uuid"] for call in found["calls"]}, set(found["not_found"])) == (new, old)


def test_a_call_without_a_uuid_belongs_to_the_one_domain_that_bears_its_name(make_database: DatabaseMaker) -> None:
    """To nobody while there is none, and to nobody again when there are two."""
    database = make_database()
    set_domains(database)
    app = database.app()
    everything = Client(app, database.account(all_domains=True))
    call = database.insert_call(domain_uuid=None, domain_name=NEW)
    first, second = "a8000000-0000-4000-8000-000000000001", "a9000000-0000-4000-8000-000000000001"
    clients = [Client(app, granted(database, first)), Client(app, granted(database, second))]
    assert [totals(client)[0]["calls"] for client in (*clients, everything)] == [0, 0, 1]
    add_domain(database, first, NEW)
    assert [totals(client)[0]["calls"] for client in (*clients, everything)] == [1, 0, 1]
    assert uuids_of(clients[0], "/api/calls", domain_uuid=first) == {call}
    add_domain(database, second, NEW)
    assert [totals(client)[0]["calls"] for client in (*clients, everything)] == [0, 0, 1]
    assert uuids_of(clients[0], "/api/calls", domain_uuid=first) == set()
    assert uuids_of(everything, "/api/calls", domain_name=NEW) == set()
    database.execute("DELETE FROM v_domains WHERE domain_uuid = %s", [first])
    assert [totals(client)[0]["calls"] for client in (*clients, everything)] == [0, 1, 1]


ARCHIVES = {
    "with the same domains": [],
    "with stale names": ["UPDATE v_domains SET domain_name = 'stale.' || domain_name"],
    "with the names of other domains": [
        f"UPDATE v_domains SET domain_name = '{NAMED[B]}' WHERE domain_uuid = '{UA}'",
        f"UPDATE v_domains SET domain_name = '{NAMED[UA]}' WHERE domain_uuid = '{B}'",
    ],
    "with other uuids": ["UPDATE v_domains SET domain_uuid = gen_random_uuid()"],
    "with every name twice": [
        "INSERT INTO v_domains (domain_uuid, domain_name) SELECT gen_random_uuid(), domain_name FROM v_domains"
    ],
    "with no domain in v_domains": ["DELETE FROM v_domains"],
    "without a right on v_domains": ["REVOKE ALL ON v_domains FROM cdr_api"],
    "without v_domains": ["DROP TABLE v_domains"],
    "with v_xml_cdr alone": ["DROP TABLE v_domains", "DROP TABLE IF EXISTS v_extensions"],
}


@pytest.fixture(scope="module")
def databases(make_database: DatabaseMaker) -> tuple[Database, Database, dict[str, Shape]]:
    """That of the accounts, an archive, and the calls that are in the archive alone."""
    database, archive = make_database(), make_database()
    set_domains(archive)
    archive.execute("CREATE TABLE saved AS TABLE v_domains")
    database.insert_call(domain_uuid=UA)
    return database, archive, add_shapes(archive)


@pytest.mark.parametrize("kind", ARCHIVES)
def test_the_domains_beside_the_accounts_say_whose_the_calls_of_an_archive_are(
    databases: tuple[Database, Database, dict[str, Shape]], kind: str
) -> None:
    database, archive, calls = databases
    set_domains(database)
    archive.execute("DROP TABLE IF EXISTS v_domains")
    archive.execute("CREATE TABLE v_domains AS TABLE saved")
    archive.execute("GRANT SELECT ON v_domains TO cdr_api")
    for statement in ARCHIVES[kind]:
        archive.execute(statement)
    mine = {uuid for uuid, call in calls.items() if call.owner == UA}
    app = database.app(CDR_API_CALLS_DSN=archive.dsn)
    ours, everything = Client(app, granted(database, UA)), Client(app, database.account(all_domains=True))

    def check(name: str, expected: set[str]) -> None:
        for path in LIST:
            for given in ({"domain_name": name}, {"domain_uuid": UA}):
                assert uuids_of(ours, path, **ROUTE[path], **given) == expected
        assert uuids_of(ours, "/api/call_feed", **EVER) == expected
        assert by_name(ours) == {name: len(expected)}
        found = ours.post("/api/call_lookup", json={"xml_cdr_uuid": sorted(calls)}).get_json()
        assert {(call["xml_cdr_uuid"], call["domain_name"]) for call in found["calls"]} == {(u, name) for u in expected}
        assert uuids_of(everything, "/api/call_feed", **EVER) == set(calls)
        total = totals(everything)[0]
        assert (total["calls"], total["billsec"]) == (len(calls), 2 ** len(calls) - 1)

    check(NAMED[UA], mine)
    # UA rename does not reach an archive, which keeps serving the whole history. Only a call that has no uuid, and
    # nothing but the old name, is nobody's from now on.
    rename(database, UA, NEW)
    check(NEW, {uuid for uuid in mine if calls[uuid].uuid})


def test_the_feed_of_an_archive_goes_on_over_a_rename(make_database: DatabaseMaker) -> None:
    database, archive = make_database(), make_database()
    set_domains(database)
    archive.execute("DROP TABLE v_domains")
    client = Client(database.app(CDR_API_CALLS_DSN=archive.dsn), granted(database, UA))
    polls = [poller(client), poller(client, domain_uuid=UA)]
    first = archive.insert_call(domain_uuid=UA)
    assert [poll() for poll in polls] == [{first: NAMED[UA]}] * 2
    rename(database, UA, NEW)
    second = archive.insert_call(domain_uuid=UA)
    assert [poll() for poll in polls] == [{second: NEW}] * 2
    assert by_name(client) == {NEW: 2}
