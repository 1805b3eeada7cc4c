"""What is asked for beside the 66 fields: fields=, filters on them, and tz= for how stamps are shown and read."""

from __future__ import annotations

import csv
import io
import json
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

import demo
from tests.conftest import Client, Database, DatabaseMaker, problem

FURTHER = (
    "status", "insert_date", "update_date", "record_length", "hold_accum_seconds", "provider_uuid",
    "ring_group_uuid", "ivr_menu_uuid", "call_disposition",
)  # fmt: skip
DEFAULT = [
    "xml_cdr_uuid", "domain_uuid", "extension_uuid", "sip_call_id", "domain_name", "accountcode", "direction",
    "default_language", "context", "caller_id_name", "caller_id_number", "caller_destination", "source_number",
    "destination_number", "start_epoch", "start_stamp", "answer_stamp", "answer_epoch", "end_epoch", "end_stamp",
    "duration", "mduration", "billsec", "billmsec", "bridge_uuid", "read_codec", "read_rate", "write_codec",
    "write_rate", "remote_media_ip", "network_addr", "record_path", "record_name", "leg", "originating_leg_uuid",
    "pdd_ms", "rtp_audio_in_mos", "last_app", "last_arg", "voicemail_message", "missed_call",
    "call_center_queue_uuid", "cc_side", "cc_member_uuid", "cc_queue_joined_epoch", "cc_queue",
    "cc_member_session_uuid", "cc_agent_uuid", "cc_agent", "cc_agent_type", "cc_agent_bridged",
    "cc_queue_answered_epoch", "cc_queue_terminated_epoch", "cc_queue_canceled_epoch", "cc_cancel_reason",
    "cc_cause", "waitsec", "conference_name", "conference_uuid", "conference_member_id", "digits_dialed",
    "pin_number", "hangup_cause", "hangup_cause_q850", "sip_hangup_disposition", "xml",
]  # fmt: skip
# What FACTS says each release added; what came before stays.
ADDED = {
    "5.1.0": {"insert_date", "update_date", "record_length"},
    "5.2.0": {"status", "provider_uuid"},
    "5.3.0": {"hold_accum_seconds"},
    "5.4.4": {"ring_group_uuid", "ivr_menu_uuid"},
    "5.5.7": {"call_disposition"},
}
STORED: dict[str, Any] = {
    "status": "no_answer",
    "insert_date": "2026-02-03 10:00:01.25+00",
    "update_date": "2026-02-03 23:30:00+00",
    "record_length": "61.4",
    "hold_accum_seconds": 7,
    "provider_uuid": "0b9e2f6c-6a53-4c0e-9c5e-0d9c4b3f7a11",
    "ring_group_uuid": "0b9e2f6c-6a53-4c0e-9c5e-0d9c4b3f7a12",
    "ivr_menu_uuid": "0b9e2f6c-6a53-4c0e-9c5e-0d9c4b3f7a13",
    "call_disposition": 'sold, "twice"\n=1',
}
SHOWN: dict[str, Any] = STORED | {
    "insert_date": "2026-02-03T10:00:01.25+00:00",
    "update_date": "2026-02-03T23:30:00+00:00",
    "record_length": 61,
}
MINE = {"domain_name": "alpha.example.com"}
RANGE = {"from": "2026-02-03", "to": "2026-02-03"}
LISTS = {"/api/calls": MINE, "/api/call_range": MINE | RANGE, "/api/call_feed": MINE | {"from": "2026-01-01"}}


def known(release: str) -> set[str]:
    releases = demo.RELEASES[: demo.RELEASES.index(release) + 1]
    return {name for one in releases for name in ADDED.get(one, set())}


def rows_of(text: str, kind: str) -> list[dict[str, Any]]:
    if kind == "csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    found: list[dict[str, Any]] = (
        json.loads(text) if kind == "json" else [json.loads(line) for line in text.splitlines()]
    )
    return found


def answer(client: Client, path: str, **parameters: str) -> list[dict[str, Any]]:
    response = client.get(path, **parameters)
    assert response.status_code == 200, response.text
    return rows_of(response.text, parameters.get("format", "json"))


def read_all(client: Client, **parameters: str) -> list[dict[str, Any]]:
    return answer(client, "/api/calls", **MINE | parameters)


@pytest.fixture(scope="module")
def shared(make_database: DatabaseMaker) -> tuple[Database, Client]:
    database = make_database()
    return database, database.client(database.account("alpha.example.com"))


@pytest.fixture
def newest(shared: tuple[Database, Client]) -> tuple[Database, Client]:
    """Of the newest release, without a call."""
    shared[0].execute("TRUNCATE v_xml_cdr")
    return shared


@pytest.mark.parametrize("release", demo.RELEASES)
def test_further_fields_come_when_asked_for_and_are_null_where_a_release_lacks_them(
    make_database: DatabaseMaker, release: str
) -> None:
    database = make_database(release)
    there = {name: value for name, value in STORED.items() if name in known(release)}
    uuid = database.insert_call(**there)
    empty = database.insert_call()
    client = database.client(database.account("alpha.example.com"))
    expected = {name: SHOWN[name] if name in there else None for name in FURTHER} | {"xml_cdr_uuid": uuid}
    nothing = dict.fromkeys(FURTHER) | {"xml_cdr_uuid": empty}
    asked = [*reversed(FURTHER), "xml_cdr_uuid"]
    for path, parameters in LISTS.items():
        for kind in ("json", "ndjson"):
            found = answer(client, path, **parameters, fields=",".join(asked), format=kind)
            assert found == [expected, nothing]
            assert [list(call) for call in found] == [asked] * 2
        found = answer(client, path, **parameters, fields=",".join(asked), format="csv")
        as_text = {name: "" if value is None else str(value) for name, value in expected.items()}
        assert found == [as_text, dict.fromkeys(FURTHER, "") | {"xml_cdr_uuid": empty}]
        assert list(found[0]) == asked
        for name in FURTHER:  # one by one, since each may be the first and the last column
            assert answer(client, path, **parameters, fields=name, limit="1") == [{name: expected[name]}]
        assert [list(call) for call in answer(client, path, **parameters)] == [DEFAULT] * 2
    body = {"xml_cdr_uuid": [uuid]}
    found = client.post(f"/api/call_lookup?fields={','.join(asked)}", json=body).get_json()["calls"]
    assert found == [expected]
    assert len(DEFAULT) == 66


@pytest.mark.parametrize(
    ("stored", "shown"),
    [
        ({"record_length": 0, "hold_accum_seconds": 0}, {"record_length": 0, "hold_accum_seconds": 0}),
        ({"record_length": "12.5", "hold_accum_seconds": "12.4"}, {"record_length": 13, "hold_accum_seconds": 12}),
        ({"record_length": "NaN"}, {"record_length": None, "hold_accum_seconds": None}),
        ({"hold_accum_seconds": "Infinity"}, {"hold_accum_seconds": None}),
        ({"record_length": 10**20}, {"record_length": 10**20, "hold_accum_seconds": None}),
        ({"insert_date": "infinity"}, {"insert_date": "infinity", "update_date": None}),
        ({"insert_date": "1970-01-01 00:00:00+00"}, {"insert_date": "1970-01-01T00:00:00+00:00"}),
        ({"insert_date": "2026-02-03 10:00:00.123456+05:30"}, {"insert_date": "2026-02-03T04:30:00.123456+00:00"}),
        ({"status": "", "call_disposition": "null"}, {"status": "", "call_disposition": "null"}),
        ({"status": "\x7f\x01é😀", "call_disposition": "\\N"}, {"status": "\x7f\x01é😀", "call_disposition": "\\N"}),
    ],
)  # fmt: skip
def test_further_fields_have_the_types_of_the_others(
    newest: tuple[Database, Client], stored: dict[str, Any], shown: dict[str, Any]
) -> None:
    """Lengths are whole seconds, dates are shown as the stamps are, text is text: by pages and by the stream."""
    database, client = newest
    database.insert_call(**stored)
    for path, parameters in LISTS.items():
        for kind in ("json", "ndjson"):
            for limit in ({}, {"limit": "5"}):
                found = answer(client, path, **parameters, **limit, fields=",".join(shown), format=kind)
                assert found == [shown]
                assert [type(value) for value in found[0].values()] == [type(value) for value in shown.values()]


def test_what_an_upgrade_adds_is_there_without_a_restart(make_database: DatabaseMaker) -> None:
    database = make_database("5.0.1")
    client = database.client(database.account("alpha.example.com"))
    database.insert_call()
    assert read_all(client, fields="status,record_length") == [{"status": None, "record_length": None}]
    database.execute("ALTER TABLE v_xml_cdr ADD status text, ADD record_length numeric")
    database.execute("UPDATE v_xml_cdr SET status = 'answered', record_length = 5")
    assert read_all(client, fields="status,record_length") == [{"status": "answered", "record_length": 5}]


def test_safe_csv_defuses_the_further_fields_too(newest: tuple[Database, Client]) -> None:
    database, client = newest
    database.insert_call(status="=1+1", call_disposition="@x")
    asked = {"fields": "status,call_disposition", "format": "csv"}
    assert read_all(client, **asked) == [{"status": "=1+1", "call_disposition": "@x"}]
    assert read_all(client, **asked, csv_safe="true") == [{"status": "'=1+1", "call_disposition": "'@x"}]


def test_a_field_that_is_not_served_is_refused(
    newest: tuple[Database, Client],
) -> None:
    _, client = newest
    for name in ("json", "call_flow", "insert_user", "update_user", "record_transcription", "status ", "STATUS", ""):
        for path, parameters in LISTS.items():
            response = client.get(path, **parameters, fields=f"billsec,{name}")
            assert response.status_code == 422
            assert list(problem(response)["data"]) == ["fields"]
    assert client.get("/api/calls", **MINE, fields="status,status").status_code == 422


# Filters ----------------------------------------------------------------------


@pytest.mark.parametrize("release", demo.RELEASES)
def test_status_and_caller_id_name_are_filters_on_every_route(make_database: DatabaseMaker, release: str) -> None:
    """Equal to the letter. A release without the column has no call of any status."""
    database = make_database(release)
    statuses = ("answered", "Answered", "answered ", "missed", None)
    stored = {"start_stamp": "2026-02-03 09:59:00+00"}
    for number, status in enumerate(statuses):
        column = {"status": status} if "status" in known(release) else {}
        database.insert_call(**stored, **column, caller_id_name=["Ann", "ann", "Ann ", "O'Hara %", None][number])
    client = database.client(database.account("alpha.example.com"))
    has = "status" in known(release)
    filters = {"status": {"answered": has, "missed": has, "busy": False, "answer%": False}}
    filters["caller_id_name"] = {"Ann": True, "O'Hara %": True, "A%": False, "Bob": False}
    for name, values in filters.items():
        for value, found in values.items():
            for path, parameters in LISTS.items():
                assert len(answer(client, path, **parameters, **{name: value})) == found, (path, name, value)
            (total,) = answer(client, "/api/call_totals", **RANGE, **{name: value})
            assert total["calls"] == found
            for kind, count in (("concurrent", "active_calls"), ("active", "total")):
                path, day = f"/api/{kind}_calls_by_domain", {"date": "2026-02-03", "resolution": "60"}
                assert sum(row[count] for row in answer(client, path, **day, **{name: value})) == found


# Zones ------------------------------------------------------------------------

# 18:30Z is midnight in Kolkata, 18:15Z in Kathmandu, 03:30Z in St. John's, 23:00Z in Berlin.
ENDS = (
    "2026-02-02 18:14:59+00", "2026-02-02 18:15:00+00", "2026-02-02 18:29:59+00", "2026-02-02 18:30:00+00",
    "2026-02-02 22:59:59+00", "2026-02-02 23:00:00+00", "2026-02-03 03:29:59+00", "2026-02-03 03:30:00+00",
    "2026-02-03 18:14:59+00", "2026-02-03 18:29:59.5+00", "2026-02-03 22:59:59+00", "2026-02-04 03:29:59+00",
    "2026-02-04 03:30:00+00",
)  # fmt: skip
# Which of them are on 3 February there, by their numbers, and how the first of these is shown.
ZONES = {
    "Asia/Kolkata": (range(3, 10), "2026-02-03T00:00:00+05:30"),
    "Asia/Kathmandu": (range(1, 9), "2026-02-03T00:00:00+05:45"),
    "America/St_Johns": (range(7, 12), "2026-02-03T00:00:00-03:30"),
    "Europe/Berlin": (range(5, 11), "2026-02-03T00:00:00+01:00"),
    "UTC": (range(6, 11), "2026-02-03T03:29:59+00:00"),
}


@pytest.fixture(scope="module", params=["4.2.2", "4.4.1", "5.0.1", demo.NEWEST])
def zoned(make_database: DatabaseMaker, request: pytest.FixtureRequest) -> tuple[Client, list[str]]:
    """The calls of ENDS. 4.x stores them without a zone, so in that of the service, which is New York."""
    database = make_database(request.param)
    shown = "to_char(%s::timestamptz AT TIME ZONE 'America/New_York', 'YYYY-MM-DD HH24:MI:SS.US')"
    uuids = []
    for end in ENDS:
        wall = database.execute(f"SELECT {shown}", [end])[0][0] if request.param[0] == "4" else end
        uuids.append(database.insert_call(start_stamp=wall, answer_stamp=wall, end_stamp=wall))
    app = database.app(CDR_API_TIMEZONE="America/New_York")
    return database.client(database.account("alpha.example.com"), app), uuids


@pytest.mark.parametrize("zone", ZONES)
def test_bare_dates_are_read_and_stamps_are_shown_in_the_zone_that_is_asked_for(
    zoned: tuple[Client, list[str]], zone: str
) -> None:
    client, uuids = zoned
    numbers, first = ZONES[zone]
    for by in ("end", "start"):
        for kind in ("json", "ndjson", "csv"):
            found = answer(client, "/api/call_range", **MINE, **RANGE, tz=zone, by=by, format=kind)
            assert [call["xml_cdr_uuid"] for call in found] == [uuids[number] for number in numbers]
            assert [found[0][f"{name}_stamp"] for name in ("start", "answer", "end")] == [first] * 3
            assert {call["end_stamp"][-6:] for call in found} == {first[-6:]}
    fields = {"fields": "end_stamp"}
    assert answer(client, "/api/call_range", **MINE, **RANGE, **fields, tz=zone)[0] == {"end_stamp": first}
    assert answer(client, "/api/calls", **MINE, **fields, tz=zone)[numbers[0]] == {"end_stamp": first}
    (total,) = answer(client, "/api/call_totals", **RANGE, tz=zone)
    assert total["calls"] == len(numbers)


@pytest.mark.parametrize("zone", ZONES)
def test_an_offset_that_is_written_counts_whatever_the_zone(zoned: tuple[Client, list[str]], zone: str) -> None:
    client, uuids = zoned
    bounds = {"from": "2026-02-02T18:30:00Z", "to": "2026-02-03T04:29:59+01:00"}
    found = answer(client, "/api/call_range", **MINE, **bounds, tz=zone)
    assert [call["xml_cdr_uuid"] for call in found] == uuids[3:7]


@pytest.mark.parametrize("zone", ZONES)
def test_the_feed_begins_and_shows_stamps_in_the_zone_that_is_asked_for(
    zoned: tuple[Client, list[str]], zone: str
) -> None:
    client, uuids = zoned
    numbers, first = ZONES[zone]
    response = client.get("/api/call_feed", **MINE, **{"from": "2026-02-03"}, tz=zone)
    assert response.status_code == 200, response.text
    found = response.get_json()
    assert [call["xml_cdr_uuid"] for call in found] == uuids[numbers[0] :]
    assert found[0]["end_stamp"] == first
    # A zone hides no call: the same cursor serves another one.
    for other in ({}, {"tz": "Asia/Tokyo"}):
        assert answer(client, "/api/call_feed", **MINE, cursor=response.headers["X-Next-Cursor"], **other) == []


@pytest.mark.parametrize(
    ("path", "parameters"),
    [("/api/calls", {}), ("/api/call_range", RANGE), ("/api/call_feed", {"from": "2026-02-03"})],
)
def test_links_keep_the_zone(zoned: tuple[Client, list[str]], path: str, parameters: dict[str, str]) -> None:
    client, _ = zoned
    asked = MINE | parameters | {"tz": "Asia/Kolkata"}
    whole = answer(client, path, **asked)
    found: list[dict[str, Any]] = []
    asked |= {"limit": "2"}
    while len(found) < len(whole):
        response = client.get(path, **asked)
        assert response.status_code == 200, response.text
        page = response.get_json()
        assert page
        found += page
        link = response.headers.get("Link", "").partition("<")[2].partition(">")[0]
        asked = dict(parse_qsl(urlsplit(link).query))
        assert not link or asked["tz"] == "Asia/Kolkata"
    assert found == whole
    assert {call["end_stamp"][-6:] for call in found} == {"+05:30"}


def test_further_dates_are_shown_in_the_zone_too(newest: tuple[Database, Client]) -> None:
    database, client = newest
    database.insert_call(insert_date="2026-02-03 10:00:01.25+00", update_date="2026-02-03 23:30:00+00")
    for path, parameters in LISTS.items():
        assert answer(client, path, **parameters, tz="Asia/Kolkata", fields="insert_date,update_date") == [
            {"insert_date": "2026-02-03T15:30:01.25+05:30", "update_date": "2026-02-04T05:00:00+05:30"}
        ]


def test_an_hour_that_comes_twice_is_taken_whole_and_shown_with_its_offset(newest: tuple[Database, Client]) -> None:
    database, client = newest
    for end in ("2026-10-24 23:59:59+00", "2026-10-25 00:30:00+00", "2026-10-25 01:30:00+00", "2026-10-25 01:30:01+00"):
        database.insert_call(end_stamp=end)
    bounds = {"from": "2026-10-25T02:30:00", "to": "2026-10-25T02:30:00", "fields": "end_stamp"}
    assert answer(client, "/api/call_range", **MINE, **bounds, tz="Europe/Berlin") == [
        {"end_stamp": "2026-10-25T02:30:00+02:00"},
        {"end_stamp": "2026-10-25T02:30:00+01:00"},
    ]


def zones_4_x(database: Database, **stamps: Any) -> list[str]:
    """When one call started and ended, and the hours it counts in, in a zone that is not the service's."""
    database.insert_call(**stamps)
    app = database.app(CDR_API_TIMEZONE="Europe/Berlin")
    client = database.client(database.account("alpha.example.com"), app)
    day = {"from": "2026-01-15", "to": "2026-01-15", "tz": "Asia/Kolkata"}
    (call,) = answer(client, "/api/call_range", **MINE, **day)
    (total,) = answer(client, "/api/call_totals", **day, group_by="hour")
    (busy,) = (
        row
        for row in answer(client, "/api/active_calls_by_domain", date="2026-01-15", resolution="60", tz="Asia/Kolkata")
        if row["total"]
    )
    return [call["start_stamp"], call["end_stamp"], total["hour"], busy["start_interval"]]


@pytest.mark.parametrize("release", ["4.2.2", "4.4.1"])
@pytest.mark.parametrize("epochs", [True, False], ids=["with epochs", "without"])
def test_a_zone_changes_how_a_stamp_without_one_is_shown_and_not_when_it_was(
    make_database: DatabaseMaker, release: str, *, epochs: bool
) -> None:
    """What 4.x stores is in the zone of the service, whoever asks: 12:00 in Berlin is 16:30 in Kolkata."""
    stamps: dict[str, Any] = {"start_stamp": "2026-01-15 11:59:00", "end_stamp": "2026-01-15 12:00:00"}
    if epochs:
        stamps |= {"start_epoch": 1768474740, "end_epoch": 1768474800}
    found = zones_4_x(make_database(release), **stamps)
    assert found[:2] == ["2026-01-15T16:29:00+05:30", "2026-01-15T16:30:00+05:30"]
    assert found[2:] == ["2026-01-15T16:00:00+05:30"] * 2


@pytest.mark.parametrize("zone", ["", "Mars/Olympus", "../../etc/passwd", "Asia/Kolkata ", "+05:30", "UTC\0", "Asia"])
def test_a_zone_that_does_not_exist_is_refused(zoned: tuple[Client, list[str]], zone: str) -> None:
    client, _ = zoned
    for path, parameters in LISTS.items():
        response = client.get(path, **parameters, tz=zone)
        assert response.status_code == 422
        assert list(problem(response)["data"]) == ["tz"]
