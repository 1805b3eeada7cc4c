"""from and to: their precision, their zones, and the days when the clock changes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit
from zoneinfo import ZoneInfo

import hypothesis
import pytest
from hypothesis import strategies as st

from cdr.ranges import offset, parse_moment
from tests.conftest import Client, Database, DatabaseMaker, problem


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    return make_database(index=True)


def in_zone(database: Database, zone: str) -> Client:
    return database.client(database.account("alpha.example.com"), database.app(CDR_API_TIMEZONE=zone))


def uuids(client: Client, start: str, end: str, **parameters: str) -> list[str]:
    return [call["xml_cdr_uuid"] for call in client.call_range(start, end, **parameters)]


# A call that ended at a moment; a range that holds it; one that ends just before
# it; one that begins just after it. All in UTC.
PRECISION = [
    ("2031-01-31 23:59:59.999999", "2031-01-31", "2031-01-30", "2031-02-01"),
    ("2031-01-31 00:00:00", "2031-01-31", "2031-01-30", "2031-02-01"),
    ("2028-02-29 12:00:00", "2028-02-29", "2028-02-28", "2028-03-01"),
    ("2032-01-31 10:59:59.5", "2032-01-31T10", "2032-01-31T09", "2032-01-31T11"),
    ("2033-01-31 10:20:59.5", "2033-01-31T10:20", "2033-01-31T10:19", "2033-01-31T10:21"),
    ("2034-01-31 10:20:30.999999", "2034-01-31 10:20:30", "2034-01-31 10:20:29", "2034-01-31 10:20:31"),
    ("2035-01-31 10:20:30.59", "2035-01-31T10:20:30.5Z", "2035-01-31T10:20:30.4Z", "2035-01-31T10:20:30.6Z"),
    ("2036-01-31 10:20:30", "2036-01-31T15:50:30+05:30", "2036-01-31T15:50:29+05:30", "2036-01-31T15:50:31+05:30"),
    ("2037-01-31 10:20:30", "2037-01-31T11:20:30 01:00", "2037-01-31T11:20:29 0100", "2037-01-31t11:20:31 01:00"),
    ("2037-02-01 10:20:30", "2037-02-01T11:20:30+01", "2037-02-01T11:20:29+01", "2037-02-01T11:20:31+01"),
    ("2024-05-02 08:00:20.7", "1714636820", "1714636819", "1714636821"),
    ("2024-05-02 08:00:21.25", "1714636821.2", "1714636821.1", "1714636821.3"),
]


@pytest.mark.parametrize(("ended", "inside", "before", "behind"), PRECISION, ids=[p[1] for p in PRECISION])
def test_both_ends_are_inclusive_at_the_precision_they_are_written_in(
    database: Database, ended: str, inside: str, before: str, behind: str
) -> None:
    client = in_zone(database, "UTC")
    uuid = database.insert_call(end_stamp=f"{ended}+00")
    assert uuid in uuids(client, inside, inside)
    assert uuid in uuids(client, "2000-01-01", inside)
    assert uuid in uuids(client, inside, "2099-01-01")
    assert uuid not in uuids(client, "2000-01-01", before)
    assert uuid not in uuids(client, behind, "2099-01-01")


def test_january_is_all_of_january(database: Database) -> None:
    client = in_zone(database, "UTC")
    stamps = ["2025-12-31 23:59:59.999999", "2026-01-01 00:00:00", "2026-01-31 23:59:59.999999", "2026-02-01 00:00:00"]
    ids = [database.insert_call(end_stamp=f"{stamp}+00") for stamp in stamps]
    assert uuids(client, "2026-01-01", "2026-01-31") == ids[1:3]


def test_by_start_takes_the_calls_that_started_then(database: Database) -> None:
    client = in_zone(database, "UTC")
    over_midnight = database.insert_call(start_stamp="2026-04-30 23:50:00+00", end_stamp="2026-05-01 00:10:00+00")
    not_ended = database.insert_call(start_stamp="2026-04-30 23:55:00+00", end_stamp=None)
    assert uuids(client, "2026-04-30", "2026-04-30") == []
    assert uuids(client, "2026-05-01", "2026-05-01", by="end") == [over_midnight]
    assert uuids(client, "2026-04-30", "2026-04-30", by="start") == [over_midnight, not_ended]
    assert uuids(client, "2026-05-01", "2026-05-01", by="start") == []


# Zone, first and last day, and when in UTC the day begins and ends, by hand:
# Berlin's 2026-03-29 has 23 hours and its 2026-10-25 has 25; Beirut's clock goes
# from 00:00 to 01:00 on 2026-03-29; Kolkata is 5:30 ahead.
DAYS = [
    ("UTC", "2024-02-29", "2024-02-29 00:00", "2024-03-01 00:00"),
    ("Asia/Kolkata", "2026-06-01", "2026-05-31 18:30", "2026-06-01 18:30"),
    ("Europe/Berlin", "2026-03-29", "2026-03-28 23:00", "2026-03-29 22:00"),
    ("Europe/Berlin", "2026-10-25", "2026-10-24 22:00", "2026-10-25 23:00"),
    ("Asia/Beirut", "2026-03-29", "2026-03-28 22:00", "2026-03-29 21:00"),
    ("Asia/Beirut", "2026-03-28", "2026-03-27 22:00", "2026-03-28 22:00"),
    ("America/Havana", "2026-11-01", "2026-11-01 04:00", "2026-11-02 05:00"),
    # An hour that comes twice is taken whole: 02:30 first in summer, last in winter time.
    ("Europe/Berlin", "2026-10-25T02:30", "2026-10-25 00:30", "2026-10-25 01:31"),
]


@pytest.mark.parametrize(("zone", "day", "begin", "end"), DAYS, ids=[f"{d[0]} {d[1]}" for d in DAYS])
def test_a_day_is_the_day_of_the_zone(database: Database, zone: str, day: str, begin: str, end: str) -> None:
    first, behind = (datetime.fromisoformat(text).replace(tzinfo=UTC) for text in (begin, end))
    microsecond = timedelta(microseconds=1)
    ids = [
        database.insert_call(end_stamp=stamp) for stamp in (first - microsecond, first, behind - microsecond, behind)
    ]
    try:
        assert uuids(in_zone(database, zone), day, day) == ids[1:3]
    finally:
        database.execute("DELETE FROM v_xml_cdr WHERE xml_cdr_uuid = ANY(%s::uuid[])", [ids])


def test_a_skipped_hour_is_the_moment_of_the_change(database: Database) -> None:
    client = in_zone(database, "Europe/Berlin")  # 02:00 becomes 03:00 at 01:00 UTC
    before = database.insert_call(end_stamp="2026-03-29 00:59:59.999999+00")
    at = database.insert_call(end_stamp="2026-03-29 01:00:00+00")
    assert uuids(client, "2026-03-29T02:30", "2026-03-29T03:00") == [at]
    assert uuids(client, "2026-03-29T01:59", "2026-03-29T02:30") == [before]
    assert uuids(client, "2026-03-29T02:15", "2026-03-29T02:45") == []


ZONES = st.sampled_from(
    ["UTC", "Europe/Berlin", "Asia/Kolkata", "America/New_York", "Asia/Beirut", "Australia/Lord_Howe", "America/Havana"]
)
MINUTES = st.datetimes(datetime(2024, 1, 1), datetime(2027, 1, 1)).map(lambda t: t.replace(second=0, microsecond=0))


@hypothesis.given(ZONES, MINUTES)
@hypothesis.example("Europe/Berlin", datetime(2026, 3, 29, 1, 59))
@hypothesis.example("Europe/Berlin", datetime(2026, 3, 29, 2, 59))
@hypothesis.example("Australia/Lord_Howe", datetime(2026, 10, 4, 1, 59))
@hypothesis.settings(max_examples=400)
def test_ranges_written_one_after_the_other_leave_no_gap(name: str, minute: datetime) -> None:
    """What a range ends with, the range of the next minute begins with; they overlap only in a doubled hour."""
    zone = ZoneInfo(name)
    last = parse_moment(minute.isoformat(" ", "minutes"))
    following = parse_moment((minute + timedelta(minutes=1)).isoformat(" ", "minutes"))
    end, start = last.end(zone), following.first(zone)
    doubled = offset(minute, zone, 0) > offset(minute, zone, 1)
    next_doubled = offset(following.start, zone, 0) > offset(following.start, zone, 1)
    assert start == end or ((doubled or next_doubled) and start < end)
    assert last.first(zone) <= end


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "Europe/Berlin", "America/St_Johns", "Pacific/Chatham"])
def test_stamps_are_those_of_to_json_in_every_zone(database: Database, zone: str) -> None:
    client = in_zone(database, zone)
    for stamp in ("2026-03-29 01:30:00+00", "2026-10-25 00:30:00.125+00", "2026-07-01 12:00:00.000001+00"):
        database.insert_call(end_stamp=stamp, start_stamp=stamp, answer_stamp=stamp)
    with database.connect() as connection:
        connection.execute(f"SET TimeZone = '{zone}'")
        query = """SELECT to_json(end_stamp), to_json(start_stamp), to_json(answer_stamp)
                     FROM v_xml_cdr WHERE end_stamp IS NOT NULL ORDER BY end_stamp, xml_cdr_uuid"""
        expected = [list(row) for row in connection.execute(query)]
    found = client.calls(fields="end_stamp,start_stamp,answer_stamp")
    shown = [[call["end_stamp"], call["start_stamp"], call["answer_stamp"]] for call in found if call["end_stamp"]]
    assert shown == expected


def test_without_a_setting_the_zone_is_the_databases(make_database: DatabaseMaker) -> None:
    database = make_database()
    database.execute(f'ALTER DATABASE "{database.name}" SET timezone = "Asia/Kolkata"')
    client = database.client(database.account("alpha.example.com"))
    database.insert_call(end_stamp="2026-01-31 18:29:59+00")
    database.insert_call(end_stamp="2026-01-31 18:30:00+00")
    assert [call["end_stamp"] for call in client.call_range("2026-01-31", "2026-01-31")] == [
        "2026-01-31T23:59:59+05:30"
    ]


@pytest.mark.parametrize(
    ("start", "end", "faulty"),
    [
        ("2026-02-30", "2026-03-01", ["from"]),
        ("2026-01-01", "2025-12-31", ["from"]),
        ("2026-01-01T10:00:01", "2026-01-01T10:00:00", ["from"]),
        ("2026-13-01", "today", ["from", "to"]),
        ("2026-01-01T25:00", "2026-01-01T10:60", ["from", "to"]),
        ("2024-05", "02/05/2024", ["from", "to"]),
        ("2024", "20240502", ["from", "to"]),
        ("@1714636820", "1714636820000", ["from", "to"]),
        ("", "2026-01-01T10:00:00.1234567", ["from", "to"]),
        ("2026-01-01T10:00+99:00", "2026-01-01T10:00+01:99", ["from", "to"]),
        ("0000-01-01", "2026-01-01\x00", ["from", "to"]),
        ("２０２６-01-01", "2026-01-01 x", ["from", "to"]),
        ("2026-01-01+01:00", "2026-W01-1", ["from", "to"]),
    ],
)
def test_dates_that_do_not_exist_are_422(database: Database, start: str, end: str, faulty: list[str]) -> None:
    parameters = {"domain_name": "alpha.example.com", "from": start, "to": end}
    response = in_zone(database, "UTC").get("/api/call_range", **parameters)
    assert response.status_code == 422
    assert list(problem(response)["data"]) == faulty


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/New_York"])
@pytest.mark.parametrize(
    ("start", "end"), [("0001-01-01", "9999-12-31"), ("0001-01-01T00:00+15:00", "9999-12-31T23:59-15:00")]
)
def test_the_whole_calendar_is_a_range(database: Database, zone: str, start: str, end: str) -> None:
    assert (
        len(uuids(in_zone(database, zone), start, end))
        == database.execute("SELECT count(*) FROM v_xml_cdr WHERE end_stamp IS NOT NULL")[0][0]
    )


# Zone, month, and when in UTC it begins and ends, by hand: Berlin's clock goes an hour ahead on 2026-03-29 and back on
# 2026-10-25.
MONTHS = [
    ("UTC", "2026-01", "2026-01-01 00:00", "2026-02-01 00:00"),
    ("UTC", "2028-02", "2028-02-01 00:00", "2028-03-01 00:00"),
    ("UTC", "2025-12", "2025-12-01 00:00", "2026-01-01 00:00"),
    ("Europe/Berlin", "2026-03", "2026-02-28 23:00", "2026-03-31 22:00"),
    ("Europe/Berlin", "2026-10", "2026-09-30 22:00", "2026-10-31 23:00"),
]


@pytest.mark.parametrize(("zone", "month", "begin", "end"), MONTHS, ids=[f"{m[1]} in {m[0]}" for m in MONTHS])
def test_a_month_is_all_of_it_on_every_route(
    make_database: DatabaseMaker, zone: str, month: str, begin: str, end: str
) -> None:
    database = make_database(index=True)
    client = database.client(database.account("alpha.example.com"), database.app(CDR_API_TIMEZONE="UTC"))
    first, after = (datetime.fromisoformat(f"{stamp}+00:00") for stamp in (begin, end))
    microsecond = timedelta(microseconds=1)
    ends = [first - microsecond, first, after - microsecond, after]
    ids = [database.insert_call(start_stamp=stamp - timedelta(seconds=5), end_stamp=stamp) for stamp in ends]
    asked = {"domain_name": "alpha.example.com", "month": month, "tz": zone}
    assert [call["xml_cdr_uuid"] for call in client.get("/api/call_range", **asked).get_json()] == ids[1:3]
    (total,) = client.get("/api/call_totals", **asked, group_by="month").get_json()
    assert (total["month"], total["calls"]) == (month, 2)
    for kind in ("concurrent", "active"):
        rows = client.get(f"/api/{kind}_calls_by_domain", **asked, resolution="60").get_json()
        assert len(rows) == (after - first) / timedelta(hours=1)
        bounds = [
            datetime.fromisoformat(rows[place][f"{edge}_interval"]) for place, edge in ((0, "start"), (-1, "end"))
        ]
        assert bounds == [first, after]


@pytest.mark.parametrize(
    "month", ["2026-13", "2026-00", "0000-01", "2026-1", "202610", "2026-10-01", "２０２６-10", "x"]
)
def test_bad_months(client: Client, month: str) -> None:
    for path in ("/api/call_range", "/api/call_totals", "/api/concurrent_calls_by_domain"):
        response = client.get(path, domain_name="alpha.example.com", month=month)
        assert response.status_code == 422
        assert list(problem(response)["data"]) == ["month"]


def test_a_range_is_named_in_one_way(client: Client) -> None:
    for other in ("from", "to"):
        response = client.get(
            "/api/call_range", **{"domain_name": "alpha.example.com", "month": "2026-10", other: "2026-10-01"}
        )
        assert (response.status_code, list(problem(response)["data"])) == (422, ["month"])
    response = client.get("/api/active_calls_by_domain", month="2026-10", date="2026-10-01")
    assert (response.status_code, list(problem(response)["data"])) == (422, ["month"])
    for path in ("/api/calls", "/api/call_feed"):  # which take no range
        response = client.get(path, month="2026-10")
        assert "month is not a parameter of this route." in problem(response)["message"]


def test_pages_of_a_month_and_of_its_dates_are_the_same(database: Database) -> None:
    client = in_zone(database, "UTC")
    for day in (1, 2, 3):
        database.insert_call(end_stamp=f"2040-02-0{day} 12:00+00")
    page = client.get("/api/call_range", domain_name="alpha.example.com", month="2040-02", limit="2")
    after = parse_qs(urlsplit(page.headers["Link"].partition(">")[0][1:]).query)["after"][0]
    assert len(page.get_json()) == 2
    assert len(client.call_range("2040-02-01", "2040-02-29", after=after)) == 1
