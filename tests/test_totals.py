"""Totals, lookup and the counts of simultaneous calls: checked against the calls themselves."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import hypothesis
import pytest
from hypothesis import strategies as st

import demo
from tests.conftest import Client, Database, DatabaseMaker, problem

Call = dict[str, Any]
EVER = {"from": "2026-01-01", "to": "2026-12-31"}


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    return make_database(calls=3000, index=True)


@pytest.fixture(scope="module")
def client(database: Database) -> Client:
    return database.client(database.account("alpha.example.com", "beta.example.com"))


@pytest.fixture(scope="module")
def calls(client: Client) -> list[Call]:
    both = [
        client.call_range("2026-01-01", "2026-12-31", domain_name=f"{name}.example.com") for name in ("alpha", "beta")
    ]
    return both[0] + both[1]


def total(calls: list[Call]) -> dict[str, Any]:
    """What docs/billing.md says the totals of some calls are."""
    hashes = (hashlib.md5(f"{call['xml_cdr_uuid']} {call['billsec'] or 0}".encode()).hexdigest() for call in calls)
    return {
        "calls": len(calls),
        "answered": sum(call["billsec"] > 0 for call in calls),
        "billsec": sum(call["billsec"] for call in calls),
        "billmsec": sum(call["billmsec"] for call in calls),
        "digest": f"{sum(int(found[:12], 16) for found in hashes) % 2**48:012x}",
    }


def get_totals(client: Client, **parameters: Any) -> list[dict[str, Any]]:
    response = client.get("/api/call_totals", **EVER | parameters)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = json.loads(response.data)
    return found


def test_without_groups_there_is_one_total(client: Client, calls: list[Call]) -> None:
    assert len(calls) > 2000
    assert get_totals(client) == [total(calls)]
    assert get_totals(client, direction="nowhere") == [
        {"calls": 0, "answered": 0, "billsec": 0, "billmsec": 0, "digest": "000000000000"}
    ]
    assert get_totals(client, direction="nowhere", group_by="day") == []


KEYS = ("domain_name", "direction", "hangup_cause", "accountcode", "extension_uuid", "hour", "day", "month")
FILTERS = st.fixed_dictionaries(
    {},
    optional={
        "domain_name": st.sampled_from(["alpha.example.com", "beta.example.com"]),
        "direction": st.sampled_from(["inbound", "outbound", "local"]),
        "answered": st.sampled_from(["true", "false"]),
        "billable_only": st.just("true"),
        "min_billsec": st.integers(0, 400).map(str),
        "hangup_cause": st.sampled_from(["NORMAL_CLEARING", "USER_BUSY", "LOSE_RACE"]),
    },
)


@hypothesis.given(
    FILTERS,
    st.lists(st.sampled_from(KEYS), unique=True, max_size=4),
    st.sampled_from(["UTC", "Asia/Kolkata", "Europe/Berlin"]),
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_totals_are_those_of_the_streamed_calls(
    database: Database, client: Client, filters: dict[str, str], keys: list[str], tz: str
) -> None:
    """For random filters, groups and zones; the calls come from the other route."""
    names = [filters["domain_name"]] if "domain_name" in filters else ["alpha.example.com", "beta.example.com"]
    zone = ZoneInfo(tz)
    start = datetime(2026, 9, 1, tzinfo=zone)
    bounds = {"from": start.isoformat(), "to": (start + timedelta(days=60)).isoformat()}
    groups: dict[tuple[Any, ...], list[Call]] = defaultdict(list)
    for name in names:
        for call in client.call_range(bounds["from"], bounds["to"], **filters | {"domain_name": name}):
            end = datetime.fromisoformat(call["end_stamp"]).astimezone(zone)
            hour = end.astimezone(zone).replace(minute=0, second=0, microsecond=0, fold=end.fold)
            found = call | {"hour": hour.isoformat(), "day": f"{end:%Y-%m-%d}", "month": f"{end:%Y-%m}"}
            groups[tuple(found[key] for key in keys)].append(call)
    parameters = filters | bounds | ({"group_by": ",".join(keys)} if keys else {})
    rows = get_totals(client, tz=tz, **parameters)
    assert [list(row) for row in rows] == [[*keys, "calls", "answered", "billsec", "billmsec", "digest"]] * len(rows)
    expected = {group: total(found) for group, found in groups.items()} if keys else {(): total(groups[()])}
    assert {tuple(row.pop(key) for key in keys): row for row in rows} == expected


def test_the_digest_changes_with_a_call_and_with_its_billsec(make_database: DatabaseMaker) -> None:
    database = make_database(calls=30)
    client = database.client(database.account("alpha.example.com"))
    digests = {get_totals(client)[0]["digest"]}
    last = "(SELECT max(xml_cdr_uuid::text)::uuid FROM v_xml_cdr WHERE domain_name = 'alpha.example.com')"
    database.execute(f"UPDATE v_xml_cdr SET billsec = billsec + 1 WHERE xml_cdr_uuid = {last}")
    digests.add(get_totals(client)[0]["digest"])
    database.insert_call()
    digests.add(get_totals(client)[0]["digest"])
    assert len(digests) == 3


def test_hours_and_days_follow_the_calendar_of_the_zone(make_database: DatabaseMaker) -> None:
    database = make_database()
    client = database.client(database.account("alpha.example.com"))
    # Berlin, 2026-10-25: 02:30 comes twice, at 00:30 and at 01:30 UTC.
    for stamp in (
        "2026-10-24 21:59:59",
        "2026-10-25 00:30:00",
        "2026-10-25 01:30:00",
        "2026-10-25 22:59:59",
        "2026-10-25 23:00:00",
    ):
        database.insert_call(end_stamp=f"{stamp}+00")
    hours = get_totals(client, group_by="hour", tz="Europe/Berlin", **{"from": "2026-10-25", "to": "2026-10-25"})
    assert [(row["hour"], row["calls"]) for row in hours] == [
        ("2026-10-25T02:00:00+02:00", 1),
        ("2026-10-25T02:00:00+01:00", 1),
        ("2026-10-25T23:00:00+01:00", 1),
    ]
    days = get_totals(client, group_by="day", tz="Europe/Berlin", **{"from": "2026-10-01", "to": "2026-10-31"})
    assert [(row["day"], row["calls"]) for row in days] == [("2026-10-24", 1), ("2026-10-25", 3), ("2026-10-26", 1)]


@pytest.mark.parametrize("tz", ["Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Pacific/Auckland"])
def test_hours_come_in_the_order_of_time_beside_any_other_key(make_database: DatabaseMaker, tz: str) -> None:
    """Over a year, with both changes of the clock; other keys keep the order that the database gives text."""
    database = make_database()
    database.execute(
        "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_name, direction, end_stamp)"
        " SELECT gen_random_uuid(), 'alpha.example.com', direction, end_stamp"
        " FROM generate_series(timestamptz '2026-01-02', '2026-12-30', '30 min') AS end_stamp,"
        " unnest(ARRAY['outbound', 'inbound']) AS direction"
    )
    client = database.client(database.account("alpha.example.com"))
    hours = [row["hour"] for row in get_totals(client, group_by="hour", tz=tz)]
    assert hours == sorted(hours, key=datetime.fromisoformat)
    pairs = [(row["hour"], row["direction"]) for row in get_totals(client, group_by="hour,direction", tz=tz)]
    assert pairs == [(hour, direction) for hour in hours for direction in ("inbound", "outbound")]
    pairs = [(row["direction"], row["hour"]) for row in get_totals(client, group_by="direction,hour", tz=tz)]
    assert pairs == [(direction, hour) for direction in ("inbound", "outbound") for hour in hours]


def test_totals_by_start_take_the_calls_that_started_then(make_database: DatabaseMaker) -> None:
    database = make_database()
    client = database.client(database.account("alpha.example.com"))
    database.insert_call(start_stamp="2026-05-31 23:59:00+00", end_stamp="2026-06-01 00:01:00+00", billsec=60)
    database.insert_call(start_stamp="2026-05-31 23:59:30+00", end_stamp=None, billsec=5)
    may = {"from": "2026-05-31", "to": "2026-05-31", "group_by": "day"}
    assert get_totals(client, **may) == []
    assert [(row["day"], row["billsec"]) for row in get_totals(client, by="start", **may)] == [("2026-05-31", 65)]


@pytest.mark.parametrize(
    ("parameters", "faulty"),
    [
        ({"group_by": "weekday"}, ["group_by"]),
        ({"group_by": "day,day"}, ["group_by"]),
        ({"group_by": ""}, ["group_by"]),
        ({"tz": "Mars/Olympus"}, ["tz"]),
        ({"tz": "../../etc/passwd", "limit": "5"}, ["limit", "tz"]),
        ({"from": "2026-02-30"}, ["from"]),
    ],
)
def test_bad_totals(client: Client, parameters: dict[str, str], faulty: list[str]) -> None:
    response = client.get("/api/call_totals", **EVER | parameters)
    assert response.status_code == 422
    assert sorted(problem(response)["data"]) == faulty


# Lookup -----------------------------------------------------------------------

UNKNOWN = "0b9e2f6c-6a53-4c0e-9c5e-0d9c4b3f7a11"


def test_lookup_tells_which_calls_exist(database: Database, client: Client, calls: list[Call]) -> None:
    foreign = database.execute(
        "SELECT xml_cdr_uuid::text FROM v_xml_cdr WHERE domain_name = 'gamma.example.com' LIMIT 1"
    )[0][0]
    mine = calls[7]
    asked = [UNKNOWN, mine["xml_cdr_uuid"].upper(), foreign, mine["xml_cdr_uuid"]]
    response = client.post("/api/call_lookup", json={"xml_cdr_uuid": asked})
    assert response.status_code == 200
    assert response.get_json() == {"calls": [mine], "not_found": [UNKNOWN, foreign]}
    some = client.post("/api/call_lookup?fields=billsec", json={"xml_cdr_uuid": [mine["xml_cdr_uuid"]]})
    assert some.get_json() == {"calls": [{"billsec": mine["billsec"]}], "not_found": []}
    assert client.post("/api/call_lookup", json={"xml_cdr_uuid": [UNKNOWN]}).get_json() == {
        "calls": [],
        "not_found": [UNKNOWN],
    }


def test_lookup_takes_ten_thousand(client: Client, calls: list[Call]) -> None:
    known = [call["xml_cdr_uuid"] for call in calls]
    asked = known + [f"{i:032x}" for i in range(10_000 - len(known))]
    found = client.post("/api/call_lookup", json={"xml_cdr_uuid": asked}).get_json()
    assert {call["xml_cdr_uuid"] for call in found["calls"]} == set(known)
    assert len(found["not_found"]) == 10_000 - len(known)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"xml_cdr_uuid": []},
        {"xml_cdr_uuid": UNKNOWN},
        {"xml_cdr_uuid": ["101"]},
        {"xml_cdr_uuid": [UNKNOWN, 5]},
        {"xml_cdr_uuid": [[UNKNOWN]]},
        {"xml_cdr_uuid": [UNKNOWN] * 10_001},
        {"xml_cdr_uuid": [UNKNOWN + "\0"]},
        {"xml_cdr_uuid": None},
    ],
    ids=lambda body: str(body)[:60],
)
def test_bad_lookups(client: Client, body: dict[str, Any]) -> None:
    response = client.post("/api/call_lookup", json=body)
    assert response.status_code == 422
    assert list(problem(response)["data"]) == ["xml_cdr_uuid"]


# Concurrency ------------------------------------------------------------------


def span(database: Database, start: str, end: str, **values: Any) -> None:
    database.insert_call(start_stamp=f"2026-03-10 {start}+00", end_stamp=f"2026-03-10 {end}+00", **values)


@pytest.fixture(scope="module")
def few(make_database: DatabaseMaker) -> Client:
    """Calls of one morning, counted by hand below."""
    database = make_database()
    span(database, "10:00:00", "10:10:00", direction="inbound")
    span(database, "10:04:00", "10:05:00", direction="outbound")
    span(database, "10:04:30", "10:20:00", direction="local")
    span(database, "10:05:00", "10:06:00", direction="local")  # begins when the second ends
    span(database, "10:30:00", "10:30:00", direction="inbound")  # never lasted
    database.insert_call(start_stamp="2026-03-09 23:50:00+00", end_stamp="2026-03-10 00:10:00+00", direction="inbound")
    database.insert_call(start_stamp="2026-03-10 23:50:00+00", end_stamp="2026-03-11 00:10:00+00", direction="odd")
    return database.client(database.account("alpha.example.com"))


def intervals(client: Client, kind: str, **parameters: Any) -> list[dict[str, Any]]:
    response = client.get(f"/api/{kind}_calls_by_domain", **parameters)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = json.loads(response.data)
    return found


def test_peaks_counted_by_hand(few: Client) -> None:
    rows = intervals(few, "concurrent", date="2026-03-10", resolution="15")
    assert len(rows) == 96
    assert list(rows[0]) == ["domain_name", "start_interval", "end_interval", "active_calls"]
    assert rows[0] == {
        "domain_name": "alpha.example.com",
        "start_interval": "2026-03-10T00:00:00+00:00",
        "end_interval": "2026-03-10T00:15:00+00:00",
        "active_calls": 1,
    }
    peaks = {row["start_interval"][11:16]: row["active_calls"] for row in rows if row["active_calls"]}
    # From 10:04:30 to 10:06:00 three at once: as one ends another begins.
    assert peaks == {"00:00": 1, "10:00": 3, "10:15": 1, "23:45": 1}
    assert rows[-1]["end_interval"] == "2026-03-11T00:00:00+00:00"


def test_activity_counted_by_hand(few: Client) -> None:
    rows = intervals(few, "active", date="2026-03-10", resolution="5")
    assert len(rows) == 288
    assert list(rows[0]) == ["start_interval", "end_interval", "domain", "inbound", "outbound", "internal", "total"]
    found = {
        row["start_interval"][11:16]: (row["inbound"], row["outbound"], row["internal"], row["total"])
        for row in rows
        if row["total"]
    }
    assert found == {
        "00:00": (1, 0, 0, 1),
        "00:05": (1, 0, 0, 1),
        "10:00": (1, 1, 1, 3),
        "10:05": (1, 0, 2, 3),
        "10:10": (0, 0, 1, 1),
        "10:15": (0, 0, 1, 1),
        "10:30": (1, 0, 0, 1),
        "23:50": (0, 0, 0, 1),
        "23:55": (0, 0, 0, 1),
    }


def as_time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


@pytest.mark.parametrize("resolution", ["1", "5", "60"])
def test_peaks_and_activity_are_those_of_the_calls(client: Client, calls: list[Call], resolution: str) -> None:
    """The obvious way: every call against every interval, the peak at the starts of calls and of the interval."""
    day = {"date": "2026-10-12", "resolution": resolution, "domain_name": "alpha.example.com"}
    spans = [
        (as_time(c["start_stamp"]), as_time(c["end_stamp"]), c["direction"])
        for c in calls
        if c["domain_name"] == "alpha.example.com" and "2026-10-11" <= c["end_stamp"][:10] <= "2026-10-13"
    ]
    for row in intervals(client, "concurrent", **day):
        start, end = as_time(row["start_interval"]), as_time(row["end_interval"])
        moments = [start, *(s for s, _, _ in spans if start <= s < end)]
        peak = max(sum(s <= moment < e for s, e, _ in spans) for moment in moments)
        assert row["active_calls"] == peak, row
    for row in intervals(client, "active", **day):
        start, end = as_time(row["start_interval"]), as_time(row["end_interval"])
        overlapping = [d for s, e, d in spans if s < end and (e > start or s >= start)]
        assert row["total"] == len(overlapping)
        assert row["internal"] == overlapping.count("local")


@pytest.mark.parametrize("kind", ["concurrent", "active"])
@pytest.mark.parametrize(
    "range_",
    [
        {"date": "2026-10-12", "resolution": "1"},
        {"date": "2026-10-25", "resolution": "60", "tz": "Europe/Berlin"},
        {"from": "2026-10-01", "to": "2026-10-31", "resolution": "15"},
        {"date": "2026-03-10", "resolution": "5"},
        {"date": "2026-03-10T10", "resolution": "60"},
        {"date": "2026-03-11T00:05", "resolution": "1"},
    ],
)
def test_only_the_intervals_with_calls(client: Client, few: Client, kind: str, range_: dict[str, str]) -> None:
    number = "active_calls" if kind == "concurrent" else "total"
    for reader in (client, few):
        rows = intervals(reader, kind, **range_)
        assert intervals(reader, kind, active_only="true", **range_) == [row for row in rows if row[number]]
        assert intervals(reader, kind, active_only="false", **range_) == rows


SUMS = [
    ("/api/call_totals", EVER | {"group_by": "domain_name,accountcode,day"}),
    ("/api/call_totals", EVER),
    ("/api/call_totals", {"from": "2020-01-01", "to": "2020-01-01", "group_by": "day"}),
    ("/api/concurrent_calls_by_domain", {"date": "2026-10-12", "resolution": "60"}),
    ("/api/active_calls_by_domain", {"date": "2026-10-12", "resolution": "60"}),
]


@pytest.mark.parametrize(("path", "parameters"), SUMS)
def test_sums_are_the_same_in_every_format(client: Client, path: str, parameters: dict[str, str]) -> None:
    rows = json.loads(client.get(path, **parameters).data)
    lines = client.get(path, format="ndjson", **parameters).data.decode().splitlines()
    assert list(map(json.loads, lines)) == rows
    response = client.send("GET", path, query_string=parameters, headers={"Accept": "text/csv"})
    assert response.content_type == "text/csv; charset=utf-8"
    table = list(csv.DictReader(response.text.splitlines()))
    assert table == [{name: "" if value is None else str(value) for name, value in row.items()} for row in rows]


def test_a_group_is_no_formula(make_database: DatabaseMaker) -> None:
    database = make_database()
    for code in ("=1+1", "-2", "plain"):
        database.insert_call(accountcode=code, billsec=-7)
    client = database.client(database.account("alpha.example.com"))
    for csv_safe, expected in (("false", {"=1+1", "-2", "plain"}), ("true", {"'=1+1", "'-2", "plain"})):
        response = client.get("/api/call_totals", format="csv", csv_safe=csv_safe, group_by="accountcode", **EVER)
        table = list(csv.DictReader(response.text.splitlines()))
        assert {row["accountcode"] for row in table} == expected
        assert {row["billsec"] for row in table} == {"-7"}  # a number is none
    assert client.get("/api/call_totals", csv_safe="true", **EVER).status_code == 422


def test_a_day_of_25_hours_and_ranges(few: Client) -> None:
    rows = intervals(few, "concurrent", date="2026-10-25", resolution="60", tz="Europe/Berlin")
    assert len(rows) == 25
    assert rows[2]["start_interval"] == "2026-10-25T02:00:00+02:00"
    assert rows[3]["start_interval"] == "2026-10-25T02:00:00+01:00"
    assert len(intervals(few, "active", resolution="60", **{"from": "2026-03-01", "to": "2026-03-31"})) == 31 * 24
    assert (
        len(intervals(few, "active", resolution="60", tz="Europe/Berlin", **{"from": "2026-10-01", "to": "2026-10-31"}))
        == 745
    )


def test_a_time_that_the_clock_skips_has_no_interval(make_database: DatabaseMaker) -> None:
    database = make_database()
    database.insert_call(start_stamp="2026-03-29 00:50+00", end_stamp="2026-03-29 01:10+00")
    client = database.client(database.account("alpha.example.com"))
    for kind in ("concurrent", "active"):
        for active_only in ("false", "true"):
            skipped = {"date": "2026-03-29T02:30", "tz": "Europe/Berlin", "active_only": active_only}
            assert intervals(client, kind, **skipped) == []


def test_every_domain_of_the_account_is_there(client: Client) -> None:
    rows = intervals(client, "concurrent", date="2026-10-12", resolution="60")
    assert len(rows) == 48
    assert {row["domain_name"] for row in rows} == {"alpha.example.com", "beta.example.com"}


@pytest.mark.parametrize(
    ("parameters", "faulty"),
    [
        ({}, ["date"]),
        ({"date": "2026-03-10", "from": "2026-03-10"}, ["date"]),
        ({"from": "2026-03-10"}, ["to"]),
        ({"to": "2026-03-10"}, ["from"]),
        ({"from": "2026-03-01", "to": "2026-04-01"}, ["to"]),
        ({"date": "2026-02-30"}, ["date"]),
        ({"date": "2026-03-10", "resolution": "10"}, ["resolution"]),
        ({"date": "2026-03-10", "tz": "Mars"}, ["tz"]),
    ],
)
def test_bad_intervals(few: Client, parameters: dict[str, str], faulty: list[str]) -> None:
    for kind in ("concurrent", "active"):
        response = few.get(f"/api/{kind}_calls_by_domain", **parameters)
        assert response.status_code == 422
        assert list(problem(response)["data"]) == faulty


@pytest.mark.parametrize("release", demo.RELEASES)
def test_totals_by_the_first_digits_of_the_destination(make_database: DatabaseMaker, release: str) -> None:
    database = make_database(release)
    numbers = ["4930123", "4930456", "49401", "+4930123", "+49", "49", "7", "*98", "voicemail", "", None, "٤٩"]
    for power, number in enumerate(numbers):
        database.insert_call(destination_number=number, billsec=2**power)
    client = database.client(database.account("alpha.example.com"))
    february = {"month": "2026-02", "group_by": "destination_prefix"}

    def totals(**parameters: str) -> dict[str | None, int]:
        rows = client.get("/api/call_totals", **february | parameters).get_json()
        assert all(row["calls"] == row["billsec"].bit_count() for row in rows)
        return {row["destination_prefix"]: row["billsec"] for row in rows}

    other = 128 + 256 + 512 + 1024 + 2048
    assert totals(prefix_length="4") == {"4930": 3, "4940": 4, "+4930": 8, "+49": 16, "49": 32, "7": 64, None: other}
    assert totals() == {"493": 3, "494": 4, "+493": 8, "+49": 16, "49": 32, "7": 64, None: other}
    assert totals(prefix_length="1") == {"4": 39, "+4": 24, "7": 64, None: other}
    assert totals(prefix_length="4", destination_prefix="493") == {"4930": 3}
    table = client.get("/api/call_totals", **february, prefix_length="2", format="csv", csv_safe="true").text
    assert "'+49,2,0" not in table  # a number of calls, of answered calls
    assert "'+49,2,2,24,0," in table
    both = client.get("/api/call_totals", **february | {"group_by": "day,destination_prefix"}).get_json()
    assert {row["day"] for row in both} == {"2026-02-03"}


@pytest.mark.parametrize(
    "parameters", [{"prefix_length": "3"}, {"prefix_length": "3", "group_by": "day"}, {"prefix_length": "0"}]
)
def test_bad_prefix_lengths(few: Client, parameters: dict[str, str]) -> None:
    response = few.get("/api/call_totals", month="2026-02", **parameters)
    assert response.status_code == 422
    assert list(problem(response)["data"]) == ["prefix_length"]
