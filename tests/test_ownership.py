"""Whose a call is: its domain_uuid decides, whatever name is stored beside it, on every route that tells of calls."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from flask import Flask

import demo
from cdr.check_calls import EPOCH_INDEX
from tests.conftest import Client, Database, DatabaseMaker, problem
from tests.shapes import (
    ACCOUNTS_READ,
    HOURS_OF_A_DAY,
    LIST,
    NAMED,
    NO_UUID,
    ROUTE,
    T1,
    T2,
    UA,
    WIDE_SHAPE,
    B,
    C,
    Shape,
    X,
    add_shapes,
    granted,
    set_domains,
    uuids_of,
)


@dataclass
class World:
    app: Flask
    database: Database
    calls: dict[str, Shape]
    undated: str  # a call of alpha without an end, stored with an IP address as its name
    clients: dict[str, Client]

    def of(self, owners: set[str] | None) -> set[str]:
        """The calls with an end of some domains; of everybody and nobody (None)."""
        return {uuid for uuid, call in self.calls.items() if owners is None or call.owner in owners}

    def seconds(self, owners: set[str] | None) -> int:
        return sum(self.calls[uuid].billsec for uuid in self.of(owners))


INDEXES = {"end_stamp": demo.INDEX, "end_epoch": EPOCH_INDEX.format(key="uuid")}


@pytest.fixture(
    scope="module",
    params=[
        ("4.2.2", None),
        ("4.2.2", "end_epoch"),
        ("5.0.1", "end_stamp"),
        (demo.NEWEST, None),
        (demo.NEWEST, "end_stamp"),
    ],
    ids=lambda param: f"{param[0]}, index on {param[1]}",
)
def world(make_database: DatabaseMaker, request: pytest.FixtureRequest) -> World:
    release, index = request.param
    database = make_database(release)
    if index:
        database.execute(INDEXES[index])
    set_domains(database)
    calls = add_shapes(database)
    undated = database.insert_call(domain_uuid=UA, domain_name="203.0.113.5", end_stamp=None, billsec=0)
    app = database.app()
    clients = {who: Client(app, granted(database, *uuids)) for who, uuids in ACCOUNTS_READ.items()}
    clients["all"] = Client(app, database.account(all_domains=True))
    return World(app, database, calls, undated, clients)


def answer(client: Client, path: str, **parameters: str) -> list[dict[str, Any]]:
    response = client.get(path, **parameters)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = json.loads(response.data)
    return found


def readers(world: World) -> Iterator[tuple[Client, set[str] | None]]:
    for who, client in world.clients.items():
        yield client, ACCOUNTS_READ.get(who)


# Without a domain: the calls of the account's domains; of everything for who reads everything


def test_the_feed_brings_the_calls_of_the_granted_domains_and_everything_to_who_reads_everything(world: World) -> None:
    for client, owners in readers(world):
        undated = {world.undated} if owners is None or UA in owners else set()
        assert uuids_of(client, "/api/call_feed", **{"from": "2026-01-01"}) == world.of(owners) | undated


def test_totals_count_the_calls_of_the_granted_domains(world: World) -> None:
    for client, owners in readers(world):
        for by in ("end", "start"):
            (total,) = answer(client, "/api/call_totals", **WIDE_SHAPE, by=by)
            assert (total["calls"], total["billsec"]) == (len(world.of(owners)), world.seconds(owners))


def test_totals_over_everything_equal_the_table(world: World) -> None:
    """However they are grouped: a carrier's invoice counts the calls of no domain too."""
    for by in ("end", "start"):
        where = f"WHERE {by}_stamp IS NOT NULL"
        stored = world.database.execute(f"SELECT count(*), sum(billsec)::bigint FROM v_xml_cdr {where}")[0]
        for group_by in ("domain_uuid", "domain_name", "domain_name,domain_uuid", "domain_uuid,day", "direction,hour"):
            rows = answer(world.clients["all"], "/api/call_totals", **WIDE_SHAPE, by=by, group_by=group_by)
            assert (sum(row["calls"] for row in rows), sum(row["billsec"] for row in rows)) == tuple(stored)


@pytest.mark.parametrize("group_by", ["domain_uuid", "domain_name", "domain_name,domain_uuid"])
def test_totals_group_by_what_the_calls_of_the_feed_say(world: World, group_by: str) -> None:
    """So that a ledger made from the feed can be compared with them."""
    keys = group_by.split(",")
    for client, _ in readers(world):
        ledger: Counter[tuple[Any, ...]] = Counter()
        for call in answer(client, "/api/call_feed", **{"from": "2026-01-01"}):
            if call["end_stamp"]:
                ledger[tuple(call[key] for key in keys)] += call["billsec"]
        rows = answer(client, "/api/call_totals", **WIDE_SHAPE, group_by=group_by)
        assert {tuple(row[key] for key in keys): row["billsec"] for row in rows} == ledger


def test_lookup_finds_the_calls_of_the_granted_domains(world: World) -> None:
    asked = [*sorted(world.calls), world.undated]
    for client, owners in readers(world):
        mine = world.of(owners) | ({world.undated} if owners is None or UA in owners else set())
        found = client.post("/api/call_lookup", json={"xml_cdr_uuid": asked}).get_json()
        assert {call["xml_cdr_uuid"] for call in found["calls"]} == mine
        assert found["not_found"] == [uuid for uuid in asked if uuid not in mine]


def test_peaks_and_activity_count_the_calls_of_the_granted_domains(world: World) -> None:
    """All calls are up at 12:00:30. Those of no domain count under the name that they are stored with."""
    for client, owners in readers(world):
        for path, name, count in (("concurrent", "domain_name", "active_calls"), ("active", "domain", "total")):
            rows = answer(client, f"/api/{path}_calls_by_domain", **HOURS_OF_A_DAY)
            found: Counter[str | None] = Counter()
            for row in rows:
                if row["start_interval"].startswith("2026-02-03T12:00:00"):
                    found[row[name]] += row[count]
            expected: Counter[str | None] = Counter()
            for uuid in world.of(owners):
                call = world.calls[uuid]
                expected[NAMED[call.owner] if call.owner else call.name] += 1
            assert +found == expected
            assert sum(row[count] for row in rows) == len(world.of(owners))


def test_an_answer_shows_the_present_name_of_the_domain_and_the_stored_text_where_there_is_none(world: World) -> None:
    for call in answer(world.clients["all"], "/api/call_feed", **{"from": "2026-01-01"}):
        if call["xml_cdr_uuid"] != world.undated:
            shape = world.calls[call["xml_cdr_uuid"]]
            assert call["domain_name"] == (NAMED[shape.owner] if shape.owner else shape.name), shape
            assert call["domain_uuid"] == shape.uuid, shape


# With a domain ----------------------------------------------------------------

WHOSE = [("alpha", UA), ("beta", B), ("alpha and beta", B), ("capital", C), ("all", UA), ("all", C)]


@pytest.mark.parametrize(("kind", "name"), [("concurrent", "domain_name"), ("active", "domain")])
def test_each_name_has_every_interval_also_that_of_calls_of_no_domain(world: World, kind: str, name: str) -> None:
    rows = answer(world.clients["all"], f"/api/{kind}_calls_by_domain", **HOURS_OF_A_DAY)
    nobodys = {call.name for call in world.calls.values() if not call.owner}
    assert {None, "", "gone.example.com"} <= nobodys
    assert Counter(row[name] for row in rows) == dict.fromkeys(nobodys | set(NAMED.values()), 24)


@pytest.mark.parametrize(("who", "uuid"), WHOSE)
@pytest.mark.parametrize("path", LIST)
def test_a_domain_has_the_calls_with_its_uuid_by_name_and_by_uuid(world: World, path: str, who: str, uuid: str) -> None:
    expected = world.of({uuid}) | ({world.undated} if uuid == UA and path != "/api/call_range" else set())
    for given in ({"domain_name": NAMED[uuid]}, {"domain_uuid": uuid}, {"domain_uuid": f"{{{uuid.upper()}}}"}):
        parameters = ROUTE[path] | given
        assert uuids_of(world.clients[who], path, **parameters) == expected
        for kind in ("ndjson", "csv"):
            response = world.clients[who].get(path, **parameters, format=kind)
            assert response.status_code == 200, response.text
            lines = response.text.splitlines()[kind == "csv" :]
            assert {re.search(r"[-0-9a-f]{36}", line)[0] for line in lines} == expected  # type: ignore[index]
        for call in answer(world.clients[who], path, **parameters, fields="domain_name"):
            assert call == {"domain_name": NAMED[uuid]}


@pytest.mark.parametrize(("who", "uuid"), WHOSE)
def test_counts_of_a_domain_are_those_of_its_calls_by_name_and_by_uuid(world: World, who: str, uuid: str) -> None:
    client = world.clients[who]
    for given in ({"domain_name": NAMED[uuid]}, {"domain_uuid": uuid}):
        (total,) = answer(client, "/api/call_totals", **WIDE_SHAPE, **given)
        assert (total["calls"], total["billsec"]) == (len(world.of({uuid})), world.seconds({uuid}))
        for kind, name, count in (("concurrent", "domain_name", "active_calls"), ("active", "domain", "total")):
            rows = answer(client, f"/api/{kind}_calls_by_domain", **HOURS_OF_A_DAY, **given)
            assert {row[name] for row in rows} == {NAMED[uuid]}
            assert [row[count] for row in rows] == [0] * 12 + [len(world.of({uuid}))] + [0] * 11


@pytest.mark.parametrize("path", ["/api/calls", "/api/call_range"])
@pytest.mark.parametrize("given", [{"domain_name": NAMED[UA]}, {"domain_uuid": UA}])
def test_pages_bring_calls_with_and_without_a_uuid_in_one_order(world: World, path: str, given: dict[str, str]) -> None:
    client = world.clients["alpha"]
    found: list[str] = []
    parameters = ROUTE[path] | given | {"limit": "2"}
    while True:
        page = client.get(path, **parameters)
        found += [call["xml_cdr_uuid"] for call in page.get_json()]
        if "Link" not in page.headers:
            break
        parameters = dict(parse_qsl(urlsplit(page.headers["Link"].partition("<")[2].partition(">")[0]).query))
        assert parameters.items() >= given.items()
    expected = sorted(world.of({UA}), key=lambda uuid: world.calls[uuid].billsec)  # in the order of their ends
    assert found == expected + ([world.undated] if path == "/api/calls" else [])


def test_two_domains_of_one_name_are_told_apart_by_uuid_and_the_name_takes_both_grants(world: World) -> None:
    one, both, everything = (world.clients[who] for who in ("one twin", "both twins", "all"))
    for path in LIST:
        assert uuids_of(one, path, **ROUTE[path], domain_uuid=T1) == world.of({T1})
        assert one.get(path, **ROUTE[path], domain_uuid=T2).status_code == 403
        assert one.get(path, **ROUTE[path], domain_name=NAMED[T1]).status_code == 403
        for client in (both, everything):
            assert uuids_of(client, path, **ROUTE[path], domain_uuid=T2) == world.of({T2})
            # UA call without a uuid that bears the name is nobody's: nothing tells whose.
            assert uuids_of(client, path, **ROUTE[path], domain_name=NAMED[T1]) == world.of({T1, T2})


@pytest.mark.parametrize("path", ROUTE)
def test_every_domain_that_is_not_ours_is_refused_with_the_same_bytes(world: World, path: str) -> None:
    """Foreign ones, unknown ones, names that differ by capitals or by a blank within; by name and by uuid."""
    given = [
        {"domain_name": name} for name in ("beta.example.com", "no.such.domain", "gone.example.com", "203.0.113.5")
    ]
    given += [{"domain_name": name} for name in ("ALPHA.example.com", "alpha .example.com", "alpha.example.com.", "*")]
    given += [{"domain_uuid": uuid} for uuid in (B, T1, X, NO_UUID)]
    for who in ("alpha", "nothing"):
        answers = [
            world.clients[who].send("GET", path, query_string=ROUTE[path] | one, headers={"X-Request-ID": "1"})
            for one in given
        ]
        assert {(found.status_code, found.data, str(found.headers)) for found in answers} == {
            (403, answers[0].data, str(answers[0].headers))
        }
        problem(answers[0])


@pytest.mark.parametrize("path", ROUTE)
def test_our_name_beside_a_uuid_that_is_not_ours_does_not_tell_whether_that_exists(world: World, path: str) -> None:
    answers = [
        world.clients["alpha"].send(
            "GET",
            path,
            query_string=ROUTE[path] | {"domain_name": NAMED[UA], "domain_uuid": uuid},
            headers={"X-Request-ID": "1"},
        )
        for uuid in (B, T1, X, NO_UUID)
    ]
    assert len({(found.status_code, found.data, str(found.headers)) for found in answers}) == 1
    assert answers[0].status_code in (403, 422)


@pytest.mark.parametrize("path", ROUTE)
def test_who_reads_everything_is_told_that_a_domain_does_not_exist(world: World, path: str) -> None:
    """Also where there are calls with its uuid: they belong to no domain."""
    for given in ({"domain_name": "gone.example.com"}, {"domain_uuid": X}, {"domain_uuid": NO_UUID}):
        response = world.clients["all"].get(path, **ROUTE[path], **given)
        assert response.status_code == 404
        problem(response)


@pytest.mark.parametrize("path", ROUTE)
def test_a_name_and_a_uuid_that_disagree_are_refused(world: World, path: str) -> None:
    for who in ("alpha and beta", "all"):
        response = world.clients[who].get(path, **ROUTE[path], domain_name=NAMED[UA], domain_uuid=B)
        assert response.status_code == 422, response.text
        assert "domain_uuid" in problem(response)["data"]


@pytest.mark.parametrize("path", ROUTE)
@pytest.mark.parametrize("text", ["", "alpha.example.com", UA[:-1], f"{UA} x", f"+{UA[1:]}", "null"])
def test_a_domain_uuid_must_be_a_uuid(world: World, path: str, text: str) -> None:
    response = world.clients["alpha"].get(path, **ROUTE[path], domain_uuid=text)
    assert response.status_code == 422
    assert "domain_uuid" in problem(response)["data"]


def test_a_domain_must_be_named_once_where_one_is_needed(world: World) -> None:
    client = world.clients["alpha"]
    for path in ("/api/calls", "/api/call_range"):
        assert client.get(path, **ROUTE[path]).status_code == 422
        twice = client.send("GET", path, query_string=[*ROUTE[path].items(), ("domain_uuid", UA), ("domain_uuid", UA)])
        assert twice.status_code == 422
        assert list(problem(twice)["data"]) == ["domain_uuid"]


@pytest.mark.parametrize("index", [True, False])
def test_the_first_call_without_a_uuid_is_seen_by_connections_that_saw_none(
    make_database: DatabaseMaker, *, index: bool
) -> None:
    database = make_database(calls=60, index=index)
    client = database.client(database.account("alpha.example.com"))
    paths = [("/api/calls", {}), ("/api/call_range", {"from": "2026-02-03", "to": "2026-02-03"})]
    before = [len(client.calls(path, **range_)) for path, range_ in paths]
    database.insert_call(domain_uuid=None)
    assert [len(client.calls(path, **range_)) for path, range_ in paths] == [number + 1 for number in before]
