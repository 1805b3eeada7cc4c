"""order=desc: the same calls, the newest first, by the same index read backwards."""

from __future__ import annotations

import json
from typing import Any

import pytest

import demo
from tests.conftest import Client, Database, DatabaseMaker, problem
from tests.shapes import T1, T2, granted, set_domains

MINE = {"domain_name": "alpha.example.com", "fields": "xml_cdr_uuid,end_stamp"}
AUTUMN = {"from": "2026-09-01", "to": "2026-10-31"}


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    database = make_database(calls=1000, index=True)
    # Equal stamps in the way of a page's end, and calls that never got one.
    database.execute("UPDATE v_xml_cdr SET end_stamp = date_trunc('day', end_stamp) WHERE billsec = 0")
    for _ in range(7):
        database.insert_call(end_stamp=None)
    return database


def read_descending(client: Client, path: str, **parameters: Any) -> list[str]:
    """The uuids along the Link headers."""
    found: list[str] = []
    response = client.get(path, **MINE | {"order": "desc"} | parameters)
    while True:
        assert response.status_code == 200, response.text
        page = [call["xml_cdr_uuid"] for call in json.loads(response.data)]
        assert len(page) <= int(parameters.get("limit", 10**6))
        found += page
        if "Link" not in response.headers:
            return found
        response = client.send("GET", response.headers["Link"].partition(">")[0][1:])


def turn_round(calls: list[dict[str, Any]]) -> list[str]:
    """The uuids of calls in the usual order, the newest first; those without an end stamp still come last."""
    dated = [call["xml_cdr_uuid"] for call in calls if call["end_stamp"]]
    undated = [call["xml_cdr_uuid"] for call in calls if not call["end_stamp"]]
    return dated[::-1] + undated[::-1]


@pytest.mark.parametrize("limit", [None, 1, 3, 100, 100_000])
@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("/api/calls", {}),
        ("/api/call_range", AUTUMN),
        ("/api/call_range", AUTUMN | {"by": "start", "direction": "inbound"}),
        ("/api/call_range", {"from": "2026-11-18", "to": "2026-11-18"}),
    ],
    ids=["calls", "range", "range by start, inbound", "few"],
)
def test_pages_are_the_whole_answer_from_its_end(
    client: Client, path: str, parameters: dict[str, str], limit: int | None
) -> None:
    if limit == 1:
        parameters = parameters | {"hangup_cause": "USER_BUSY"}
    whole = client.get(path, **MINE | parameters).get_json()
    assert whole == client.get(path, **MINE | parameters, order="asc").get_json()
    more = {"limit": limit} if limit else {}
    assert read_descending(client, path, **parameters, **more) == turn_round(whole)


def test_the_newest_calls_of_a_domain_are_one_short_page(client: Client) -> None:
    newest = client.get("/api/calls", **MINE, order="desc", limit="20").get_json()
    assert len(newest) == 20
    stamps = [call["end_stamp"] for call in newest]
    assert stamps == sorted(stamps, reverse=True)
    assert stamps[0] == max(call["end_stamp"] or "" for call in client.calls())


def test_after_without_a_limit_is_all_the_rest(client: Client) -> None:
    page = client.get("/api/calls", **MINE, order="desc", limit="10")
    after = page.headers["Link"].partition("after=")[2].partition(">")[0]
    rest = client.get("/api/calls", **MINE, order="desc", after=after).get_json()
    assert page.get_json() + rest == client.get("/api/calls", **MINE, order="desc").get_json()


def test_every_format_has_the_same_order(client: Client) -> None:
    expected = read_descending(client, "/api/call_range", **AUTUMN)
    lines = client.get("/api/call_range", **MINE | AUTUMN, order="desc", format="ndjson").text.splitlines()
    assert [json.loads(line)["xml_cdr_uuid"] for line in lines] == expected
    rows = client.get("/api/call_range", **MINE | AUTUMN, order="desc", format="csv").text.splitlines()
    assert [row.partition(",")[0] for row in rows] == ["xml_cdr_uuid", *expected]


def test_a_cursor_belongs_to_its_order(client: Client) -> None:
    for order, other in (("asc", "desc"), ("desc", "asc")):
        page = client.get("/api/calls", **MINE, order=order, limit="10")
        after = page.headers["Link"].partition("after=")[2].partition(">")[0]
        response = client.get("/api/calls", **MINE, order=other, limit="10", after=after)
        assert (response.status_code, list(problem(response)["data"])) == (422, ["after"])


def test_what_has_no_order_refuses_one(client: Client) -> None:
    for order in ("", "newest", "DESC"):
        response = client.get("/api/calls", **MINE, order=order)
        assert (response.status_code, list(problem(response)["data"])) == (422, ["order"])
    for path in ("/api/call_feed", "/api/call_totals", "/api/concurrent_calls_by_domain"):
        assert "order is not a parameter of this route." in problem(client.get(path, order="desc"))["message"]


@pytest.mark.parametrize("release", demo.RELEASES)
def test_it_works_in_every_release(make_database: DatabaseMaker, release: str) -> None:
    database = make_database(release, calls=300)
    database.insert_call(end_stamp=None)
    client = database.client(database.account("alpha.example.com"))
    for path, parameters in (("/api/calls", {}), ("/api/call_range", AUTUMN)):
        whole = client.get(path, **MINE | parameters).get_json()
        assert len(whole) > 20
        assert read_descending(client, path, **parameters, limit=15) == turn_round(whole)


def test_a_name_that_two_domains_bear_is_one_list(make_database: DatabaseMaker) -> None:
    database = make_database(index=True)
    set_domains(database)
    for number in range(9):
        uuid = (T1, T2)[number % 2]
        database.insert_call(domain_uuid=uuid, domain_name="x", end_stamp=f"2026-02-03 10:00:0{number % 4}+00")
    client = database.client(granted(database, T1, T2))
    twins = {"domain_name": "twin.example.com"}
    whole = client.get("/api/calls", **MINE | twins).get_json()
    assert len(whole) == 9
    assert read_descending(client, "/api/calls", **twins, limit=2) == turn_round(whole)
