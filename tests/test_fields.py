"""Further fields on request, and the zone that stamps are shown in."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

import demo
from cdr.selection import MORE_FIELDS
from tests.conftest import Client, DatabaseMaker, problem

ALPHA = "alpha.example.com"
STORED: dict[str, Any] = {
    "status": "no_answer",
    "insert_date": "2026-02-03 10:00:01.5+00",
    "update_date": None,
    "record_length": "61.7",
    "hold_accum_seconds": 7,
    "provider_uuid": "0b9e2f6c-6a53-4c0e-9c5e-0d9c4b3f7a11",
    "ring_group_uuid": "0b9e2f6c-6a53-4c0e-9c5e-0d9c4b3f7a12",
    "ivr_menu_uuid": "0b9e2f6c-6a53-4c0e-9c5e-0d9c4b3f7a13",
    "call_disposition": 'said "later"',
}
SHOWN = {**STORED, "insert_date": "2026-02-03T15:30:01.5+05:30", "record_length": 62}


@pytest.mark.parametrize("release", demo.RELEASES)
def test_further_fields_are_shown_where_a_release_has_them(make_database: DatabaseMaker, release: str) -> None:
    database = make_database(release)
    there = {name: value for name, value in STORED.items() if name in demo.read_columns(release)}
    database.insert_call(**there)
    expected = {name: value if name in there else None for name, value in SHOWN.items()}
    client = database.client(database.account(ALPHA), database.app(CDR_API_TIMEZONE="Asia/Kolkata"))
    fields = ",".join(MORE_FIELDS)
    assert list(expected) == list(MORE_FIELDS)
    day = {"from": "2026-02-03", "to": "2026-02-03"}
    for path, parameters in (("calls", {}), ("call_range", day), ("call_feed", {"from": "2026-01-01"})):
        query = {"domain_name": ALPHA, "fields": fields, **parameters}
        assert client.get(f"/api/{path}", **query).get_json() == [expected]
        assert json.loads(client.get(f"/api/{path}", format="ndjson", **query).data) == expected
        (row,) = csv.DictReader(io.StringIO(client.get(f"/api/{path}", format="csv", **query).text))
        assert row == {name: "" if value is None else str(value) for name, value in expected.items()}
    assert len(client.calls()[0]) == 66
    assert client.calls(status="no_answer") == client.calls() * ("status" in there)
    assert client.calls(status="answered") == []


def test_what_came_again_is_told_from_what_is_new(make_database: DatabaseMaker) -> None:
    database = make_database()
    client = database.client(database.account(ALPHA))
    database.insert_call()
    poll = client.get("/api/call_feed", **{"from": "2026-01-01", "fields": "update_date"})
    assert poll.get_json() == [{"update_date": None}]
    database.execute("UPDATE v_xml_cdr SET record_name = NULL, update_date = '2026-02-04 00:00:00+00'")
    again = client.get("/api/call_feed", cursor=poll.headers["X-Next-Cursor"], fields="update_date", tz="UTC")
    assert again.get_json() == [{"update_date": "2026-02-04T00:00:00+00:00"}]


# The zone ---------------------------------------------------------------------------


@pytest.fixture
def client(make_database: DatabaseMaker) -> Client:
    """Three calls, at 18:29, 18:30 and 18:31 UTC of 3 February: in Kolkata the day ends between."""
    database = make_database(index=True)
    for minute in (29, 30, 31):
        stamp = f"2026-02-03 18:{minute}:00+00"
        database.insert_call(end_stamp=stamp, start_stamp=stamp, answer_stamp=stamp)
    return database.client(database.account(ALPHA), database.app(CDR_API_TIMEZONE="UTC"))


@pytest.mark.parametrize("kind", ["json", "ndjson"])
def test_stamps_and_bare_ranges_are_of_the_zone_that_is_asked_for(client: Client, kind: str) -> None:
    query = {"domain_name": ALPHA, "tz": "Asia/Kolkata", "format": kind}
    day = client.get("/api/call_range", **query, **{"from": "2026-02-04", "to": "2026-02-04"}).text
    calls = [json.loads(line.strip("[],")) for line in day.splitlines()]
    assert [call["end_stamp"] for call in calls] == ["2026-02-04T00:00:00+05:30", "2026-02-04T00:01:00+05:30"]
    assert calls[0]["start_stamp"] == calls[0]["answer_stamp"] == calls[0]["end_stamp"]
    every = client.get("/api/calls", **query).text
    assert "2026-02-03T23:59:00+05:30" in every
    feed = client.get("/api/call_feed", tz="Asia/Kolkata", **{"from": "2026-02-04"}).get_json()
    assert feed == calls


def test_pages_may_change_the_zone(client: Client) -> None:
    page = client.get("/api/calls", domain_name=ALPHA, limit="1", fields="end_stamp", tz="Asia/Kolkata")
    assert page.get_json() == [{"end_stamp": "2026-02-03T23:59:00+05:30"}]
    link = page.headers["Link"].partition("<")[2].partition(">")[0]
    assert client.send("GET", link).get_json() == [{"end_stamp": "2026-02-04T00:00:00+05:30"}]
    elsewhere = client.send("GET", link.replace("Asia%2FKolkata", "America%2FCaracas"))
    assert elsewhere.get_json() == [{"end_stamp": "2026-02-03T14:30:00-04:00"}]


@pytest.mark.parametrize("zone", ["Mars/Olympus", "", "+05:30", "localtime2"])
def test_a_zone_that_is_not_one_is_refused(client: Client, zone: str) -> None:
    for path, parameters in (
        ("calls", {"domain_name": ALPHA}),
        ("call_range", {"domain_name": ALPHA, "from": "2026-02-03", "to": "2026-02-03"}),
        ("call_feed", {"from": "2026-02-03"}),
    ):
        response = client.get(f"/api/{path}", tz=zone, **parameters)
        assert response.status_code == 422, path
        assert list(problem(response)["data"]) == ["tz"]
