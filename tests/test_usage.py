"""/api/usage in a real browser: what it shows is what the database holds, and it says what it does not know."""

from __future__ import annotations

import csv
import io
import math
import re
from codecs import BOM_UTF8
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from playwright.sync_api import Browser, Download, Page, expect

from tests.browsers import (
    DESKTOP,
    OF_NOVEMBER,
    PHONE,
    READER,
    Opener,
    Visit,
    download_of,
    in_a_browser,
    launch,
    opening,
)
from tests.conftest import PASSWORD, Client, Database, DatabaseMaker, Gunicorn, serve, wait_for
from tests.relay import Relay, relaying

pytestmark = [pytest.mark.direct("is about browsers"), in_a_browser]

ALPHA, BETA, ONE, NONE, LONG = (f"{name}.example.com" for name in ("alpha", "beta", "one", "none", "long"))
NOVEMBER = {"month": "2026-11"}
ALPHAS = {"month": "2026-11", "domain": ALPHA}


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    """The usual calls; a domain with one call, one with none, and one with 20,000 of a day."""
    database = make_database(calls=3000, index=True)
    database.execute(
        "INSERT INTO v_domains (domain_uuid, domain_name, domain_enabled)"
        " SELECT md5(name)::uuid, name, 'true' FROM unnest(%s::text[]) AS name",
        [[ONE, NONE, LONG]],
    )
    columns = "xml_cdr_uuid, domain_uuid, domain_name, direction, destination_number, start_stamp, end_stamp, billsec"
    database.execute(
        f"""INSERT INTO v_xml_cdr ({columns})
            SELECT md5('one')::uuid, md5('{ONE}')::uuid, '{ONE}', NULL, NULL, ended - interval '61 s', ended, 61
              FROM (SELECT timestamptz '2026-11-02 08:00:00+00' AS ended) AS one
             UNION ALL
            SELECT md5('long ' || i)::uuid, md5('{LONG}')::uuid, '{LONG}', 'outbound', i::text, NULL,
                   timestamptz '2026-11-02 08:00:00+00' + i * interval '1 s', i
              FROM generate_series(1, 20000) AS i"""
    )
    database.execute("ANALYZE v_xml_cdr")
    return database


@pytest.fixture(scope="module")
def gunicorn(database: Database) -> Iterator[Gunicorn]:
    database.account(ALPHA, BETA, ONE, NONE, LONG, email=READER)
    with serve(database.dsn, CDR_API_TIMEZONE="UTC") as running:
        yield running


@pytest.fixture(scope="module")
def client(database: Database, gunicorn: Gunicorn) -> Client:
    """Reads what the page reads."""
    return database.client(database.account(ALPHA, BETA, ONE, NONE, LONG))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launch() as chromium:
        yield chromium


@pytest.fixture
def visit(browser: Browser, gunicorn: Gunicorn) -> Iterator[Opener]:
    with opening(browser, gunicorn.url) as opener:
        yield opener


@pytest.fixture
def relay(gunicorn: Gunicorn) -> Iterator[Relay]:
    """Another way to the service, which may stop half-way."""
    with relaying(gunicorn.url) as way:
        yield way


def open_usage(opener: Opener, fragment: dict[str, str] = NOVEMBER, email: str = READER, **options: Any) -> Visit:
    """The page, logged in, with a view of it."""
    opened: Visit = opener("/api/usage", **options)
    opened.log_in(email)
    expect(opened.page.get_by_role("button", name="Log out")).to_be_visible()
    opened.wait_until_read()
    opened.show(**fragment)
    return opened


@pytest.fixture(scope="module")
def november(browser: Browser, gunicorn: Gunicorn) -> Iterator[Visit]:
    """For tests that only look."""
    with opening(browser, gunicorn.url) as opener:
        yield open_usage(opener)


# All domains ------------------------------------------------------------------

HELPERS = """(coalesce(leg::text, 'a') <> 'a' OR coalesce(hangup_cause, '') = 'LOSE_RACE'
              OR (coalesce(cc_side, '') = 'agent' OR originating_leg_uuid IS NOT NULL)
             AND NOT (direction = 'outbound' AND coalesce(billsec, 0) > 0))"""
IN_NOVEMBER = "end_stamp >= '2026-11-01' AND end_stamp < '2026-12-01'"


def minutes(seconds: int) -> str:
    return f"{math.floor(seconds / 6 + 0.5) / 10:,.1f}"


def sum_domains(database: Database) -> dict[str, list[int]]:
    """Of each domain in November: outbound, inbound, local, other and all seconds, calls, answered calls."""
    seconds = "coalesce(sum(billsec) FILTER (WHERE direction = '{}'), 0)::int"
    by_direction = ", ".join(seconds.format(name) for name in ("outbound", "inbound", "local"))
    query = f"""SELECT domain_name, {by_direction},
                coalesce(sum(billsec) FILTER (WHERE direction IS NULL), 0)::int, sum(billsec)::int,
                count(*), count(*) FILTER (WHERE billsec > 0)
                FROM v_xml_cdr
                WHERE {IN_NOVEMBER} AND NOT {HELPERS} AND domain_name <> 'gamma.example.com' GROUP BY 1"""
    return {name: numbers for name, *numbers in database.execute(query)}


def test_all_domains_of_a_month_stand_in_one_table_with_their_sum(database: Database, november: Visit) -> None:
    november.show(**NOVEMBER)
    expected = sum_domains(database)
    shown = {row[0]: row for row in november.rows("domain-rows")}
    assert set(shown) == set(expected) == {ALPHA, BETA, ONE, LONG}
    for name, numbers in expected.items():
        *by_direction, seconds, calls, answered = numbers
        assert shown[name][1:6] == [minutes(number) for number in (seconds, *by_direction)]
        assert shown[name][8:10] == [f"{calls:,}", f"{answered:,}"]
    *by_direction, seconds, calls, answered = (sum(column) for column in zip(*expected.values(), strict=True))
    (foot,) = november.rows("domain-rows", "tFoot")
    assert foot[0] == "4 domains"
    assert foot[1:7] == [*(minutes(number) for number in (seconds, *by_direction)), "100.0%"]
    assert foot[8:] == [f"{calls:,}", f"{answered:,}", "–"]  # peaks cannot be added
    assert "1 more domain has no calls in either month" in november.text("domains-note")


def test_a_domain_is_compared_with_its_month_before(database: Database, november: Visit) -> None:
    november.show(**NOVEMBER)
    query = """SELECT sum(billsec) FILTER (WHERE end_stamp >= '2026-11-01')::float
                    / sum(billsec) FILTER (WHERE end_stamp >= '2026-10-01' AND end_stamp < '2026-11-01') - 1
               FROM v_xml_cdr WHERE domain_name = 'alpha.example.com' AND NOT """
    ((change,),) = database.execute(query + HELPERS)
    shown = {row[0]: row[7] for row in november.rows("domain-rows")}
    assert shown == {ALPHA: f"{change:+.1%}", BETA: shown[BETA], ONE: "new", LONG: "new"}


def test_a_month_that_is_not_over_is_not_compared(november: Visit) -> None:
    november.show(month="2026-12")
    assert "Change" not in november.rows("domain-rows", "tHead")[0]
    assert "This month is not over yet, so it is not compared with November 2026." in november.text("domains-note")


def test_one_request_brings_the_table(visit: Opener) -> None:
    opened = visit("/api/usage#month=2026-11")
    opened.log_in()
    expect(opened.page.locator("#domain-rows tbody tr")).to_have_count(4)
    opened.wait_until_read()
    asked = [url.partition("/api/")[2].partition("?")[0] for url in opened.asked]
    assert [name for name in asked if "/" not in name] == [
        "usage", "login", "domains", "call_totals", "concurrent_calls_by_domain",
    ]  # fmt: skip


def test_the_table_is_sorted_searched_and_leads_to_a_domain_and_back(november: Visit) -> None:
    page = november.page
    november.show(**NOVEMBER)
    assert november.rows("domain-rows")[0][0] == LONG
    page.get_by_role("button", name="Domain", exact=True).click()
    assert [row[0] for row in november.rows("domain-rows")] == [ALPHA, BETA, LONG, ONE]
    page.get_by_role("button", name="Answered", exact=True).click()
    answered = [int(row[9].replace(",", "")) for row in november.rows("domain-rows")]
    assert answered == sorted(answered, reverse=True)
    expect(page.get_by_role("columnheader", name="Answered")).to_have_attribute("aria-sort", "descending")
    page.get_by_label("Find").fill("NE.ex")
    assert [row[0] for row in november.rows("domain-rows")] == [ONE, NONE]
    page.get_by_label("Find").fill("nothing")
    expect(page.get_by_text("No domain's name contains nothing.")).to_be_visible()
    page.get_by_label("Find").fill("beta")
    page.get_by_role("link", name=BETA).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(f"{BETA}, November 2026")
    november.wait_until_read()
    page.go_back()
    november.wait_until_read()
    assert [row[0] for row in november.rows("domain-rows")] == [BETA]
    expect(page.get_by_label("Find")).to_have_value("beta")


def test_twenty_thousand_domains_are_drawn_a_page_at_a_time(make_database: DatabaseMaker, browser: Browser) -> None:
    database = make_database(index=True)
    database.execute(
        "INSERT INTO v_domains (domain_uuid, domain_name, domain_enabled)"
        " SELECT md5('d' || i)::uuid, 'd' || i || '.example.com', 'true' FROM generate_series(1, 20000) AS i"
    )
    database.execute(
        "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_uuid, domain_name, direction, end_stamp, billsec)"
        " SELECT md5('c' || i)::uuid, domain_uuid, domain_name, 'outbound', '2026-11-02 08:00Z', i"
        " FROM v_domains CROSS JOIN LATERAL (SELECT split_part(substr(domain_name, 2), '.', 1)::int AS i) AS number"
        " WHERE domain_name LIKE 'd%'"
    )
    database.account(email=READER, all_domains=True)
    with serve(database.dsn) as gunicorn, opening(browser, gunicorn.url) as opener:
        opened = open_usage(opener)
        assert opened.rows("domain-rows", "tFoot")[0][:2] == ["20,000 domains", minutes(sum(range(1, 20_001)))]
        names = [row[0] for row in opened.rows("domain-rows")]
        assert names == [f"d{number}.example.com" for number in range(20_000, 19_950, -1)]
        expect(opened.page.get_by_text("1 to 50 of 20,000")).to_be_visible()
        opened.page.get_by_role("button", name="More").click()
        assert opened.rows("domain-rows")[0][0] == "d19950.example.com"
        opened.page.get_by_label("Find").fill("d777.")
        assert [row[0] for row in opened.rows("domain-rows")] == ["d777.example.com"]
        opened.page.get_by_role("button", name="Work out the peaks").click()
        opened.wait_until_read()
        assert opened.rows("domain-rows")[0][-1] == "0"  # calls without a start
        assert opened.rows("domain-rows", "tFoot")[0][-1] == "0"
        opened.page.keyboard.press("Escape")
        opened.page.get_by_label("Find").focus()
        opened.page.keyboard.press("Enter")
        expect(opened.page.get_by_role("heading", level=1)).to_contain_text("d777.example.com")


# One domain -------------------------------------------------------------------


def count_days(database: Database, condition: str) -> dict[int, list[str]]:
    """The calls of each day of November as the page writes them, without the peaks."""
    query = f"""SELECT extract(day FROM end_stamp)::int,
                coalesce(sum(billsec) FILTER (WHERE direction = 'outbound'), 0)::int, coalesce(sum(billsec), 0)::int,
                count(*), count(*) FILTER (WHERE NOT coalesce(billsec, 0) > 0)
                FROM v_xml_cdr WHERE domain_name = '{ALPHA}' AND {IN_NOVEMBER} AND {condition} GROUP BY 1"""
    return {
        day: [minutes(outbound), minutes(seconds), *(f"{number:,}" for number in numbers)]
        for day, outbound, seconds, *numbers in database.execute(query)
    }


def count_peaks(database: Database, condition: str) -> dict[int, str]:
    """The most calls at once of each day of November: looked at when any of them begins, and at midnight."""
    query = f"""SELECT start_stamp, end_stamp FROM v_xml_cdr WHERE domain_name = '{ALPHA}'
                AND end_stamp >= '2026-11-01' AND start_stamp < '2026-12-01' AND {condition}"""
    calls = database.execute(query)
    first = datetime.fromisoformat("2026-11-01T00:00Z")
    moments = {first + timedelta(days=day) for day in range(30)} | {start for start, _ in calls if start >= first}
    peaks: dict[int, int] = defaultdict(int)
    for moment in moments:
        day = moment.astimezone(first.tzinfo).day
        peaks[day] = max(peaks[day], sum(start <= moment < end for start, end in calls))
    return {day: str(peak) for day, peak in peaks.items()}


@pytest.mark.parametrize(("calls", "condition"), [("billable", f"NOT {HELPERS}"), ("all", "true")])
def test_a_domains_month_shows_what_the_database_holds(
    database: Database, november: Visit, calls: str, condition: str
) -> None:
    november.show(**ALPHAS, calls=calls)
    days, peaks = count_days(database, condition), count_peaks(database, condition)
    assert len(days) > 5
    expected = [
        [*days.get(day, ["0.0", "0.0", "0", "0"]), peaks.get(day, "0")] for day in range(1, 31)
    ]  # fmt: skip
    shown = november.rows("days")
    last = max(days)  # the month is not over: days that are still to come have no rows of zeros
    assert [row[1:] for row in shown] == expected[: len(shown)]
    assert last <= len(shown) <= 30
    assert shown[0][0] == "Sun, Nov 1"
    drawn = november.page.evaluate("Chart.getChart('calls-plot').data.datasets.map(set => set.data)")
    query = f"""SELECT count(*) FILTER (WHERE billsec > 0), count(*) FILTER (WHERE NOT coalesce(billsec, 0) > 0)
                FROM v_xml_cdr WHERE domain_name = '{ALPHA}' AND {IN_NOVEMBER} AND {condition}"""
    ((answered, missed),) = database.execute(query)
    assert [sum(series) for series in drawn] == [answered, missed]
    expect(november.page.get_by_role("img", name=f"{answered:,} answered and {missed:,} not answered")).to_be_visible()
    assert november.text("peak") == str(max(map(int, peaks.values())))


def test_minutes_by_direction_come_first(database: Database, november: Visit) -> None:
    november.show(**ALPHAS)
    outbound, inbound, local, _, seconds, calls, answered = sum_domains(database)[ALPHA]
    assert [november.text(name) for name in ("outbound", "inbound", "local")] == [
        minutes(number) for number in (outbound, inbound, local)
    ]
    assert [row[4] for row in november.rows("directions")] == [f"{number:,}" for number in (outbound, inbound, local)]
    (foot,) = november.rows("directions", "tFoot")
    assert foot == [
        "All",
        f"{calls:,}",
        f"{answered:,}",
        f"{calls - answered:,}",
        f"{seconds:,}",
        minutes(seconds),
        "100.0%",
    ]


def test_not_answered_stands_beside_what_fusionpbx_calls_missed(database: Database, november: Visit) -> None:
    november.show(**ALPHAS)
    query = f"""SELECT count(*) FILTER (WHERE billsec = 0), count(*) FILTER (WHERE missed_call)
                FROM v_xml_cdr WHERE domain_name = '{ALPHA}' AND {IN_NOVEMBER} AND NOT {HELPERS}"""
    ((unanswered, missed),) = database.execute(query)
    assert unanswered != missed
    assert november.text("missed") == f"{unanswered:,}"
    assert f"(FusionPBX itself calls {missed:,} missed)" in november.text("missed-note")


DIRECTIONS = {"outbound": "Outbound", "inbound": "Inbound", "local": "Internal"}


def day_of(row: list[str]) -> str:
    """The day of November that a row of the table speaks of."""
    return f"2026-11-{int(row[0].split()[-1]):02}"


def round_days(database: Database, rounding: str) -> dict[tuple[str, str], int]:
    """The seconds of each day of November and direction, each call rounded up by itself."""
    first, step = map(int, rounding.split("/"))
    expected: dict[tuple[str, str], int] = defaultdict(int)
    query = f"""SELECT end_stamp::date::text, direction, billsec FROM v_xml_cdr
                WHERE domain_name = '{ALPHA}' AND {IN_NOVEMBER} AND billsec > 0 AND NOT {HELPERS}"""
    for day, direction, billsec in database.execute(query):
        rounded = first
        while rounded < billsec:
            rounded += step
        expected[day, direction] += rounded
    return expected


@pytest.mark.parametrize("rounding", ["60/60", "30/6", "6/6", "1/1"])
def test_every_call_is_rounded_up_by_itself(database: Database, november: Visit, rounding: str) -> None:
    november.show(**ALPHAS)
    november.page.get_by_label("Round up").select_option(rounding)
    expected = round_days(database, rounding)
    of_month: dict[str, int] = defaultdict(int)
    for (_, direction), seconds in expected.items():
        of_month[direction] += seconds
    shown = {row[0]: row[-1] for row in november.rows("directions")}
    assert shown == {DIRECTIONS[direction]: minutes(seconds) for direction, seconds in of_month.items()}
    assert november.rows("directions", "tFoot")[0][-1] == minutes(sum(of_month.values()))
    for direction, counted in zip(DIRECTIONS, sum_domains(database)[ALPHA], strict=False):
        assert november.text(direction) == minutes(of_month[direction])
        assert f"rounded up {rounding}; counted: {minutes(counted)}; " in november.text(f"{direction}-note")
    for row in november.rows("days"):
        assert row[2] == minutes(expected[day_of(row), "outbound"])
    assert november.rows("days", "tFoot")[0][2] == minutes(of_month["outbound"])
    assert f"round={rounding.replace('/', '%2F')}" in november.page.url


def test_what_was_called_longest_is_shown(database: Database, november: Visit) -> None:
    november.show(**ALPHAS)
    query = f"""SELECT destination_number, count(*), sum(coalesce(billsec, 0))::int FROM v_xml_cdr
                WHERE domain_name = '{ALPHA}' AND {IN_NOVEMBER} AND NOT {HELPERS} AND direction = 'outbound'
                GROUP BY 1 ORDER BY sum(billsec) DESC, 2 DESC, destination_number COLLATE "C" LIMIT 10"""
    expected = [[number, f"{calls:,}", minutes(seconds)] for number, calls, seconds in database.execute(query)]
    assert len(expected) == 10
    assert november.rows("destinations") == expected


# Nothing to show --------------------------------------------------------------


@pytest.mark.parametrize(
    ("fragment", "sentence"),
    [
        ({"month": "2020-02", "domain": ALPHA}, "No calls ended in February 2020."),
        ({"month": "2020-02"}, "No calls of any domain ended in February 2020."),
        ({"month": "2199-12", "domain": ALPHA}, "December 2199 has not begun yet. Show December 2026"),
        ({"month": "2026-11", "domain": "x.example.com"}, "This account reads no domain called x.example.com."),
    ],
    ids=["a month", "any domain", "a future month", "a domain"],
)
def test_nothing_to_show_is_one_sentence(november: Visit, fragment: dict[str, str], sentence: str) -> None:
    november.show(**fragment)
    expect(november.page.get_by_role("status").first).to_have_text(sentence)
    assert not november.page.locator("#numbers").is_visible()
    assert not november.page.locator("#domains").is_visible()
    assert november.rows("days") == november.rows("domain-rows") == []


def test_from_a_future_month_a_link_leads_to_the_present_one(november: Visit) -> None:
    november.show(month="2199-12")
    november.page.get_by_role("link", name="Show December 2026").click()
    november.wait_until_read()
    expect(november.page.get_by_role("heading", level=1)).to_have_text("All domains, December 2026")


def test_one_call_is_one_call(november: Visit) -> None:
    november.show(month="2026-11", domain=ONE, round="6/6")
    assert [november.text(name) for name in ("calls", "calls-note", "missed-note")] == [
        "1",
        "1 answered (100.0%)",
        "0.0% of the calls",
    ]
    assert november.rows("directions") == [["Other", "1", "1", "0", "61", "1.0", "100.0%", "1.1"]]
    assert november.text("destinations-note") == "No outbound calls."


def test_an_account_without_domains_is_told_who_grants_them(database: Database, visit: Opener) -> None:
    database.account(email="none@example.com")
    opened = visit("/api/usage")
    opened.log_in("none@example.com")
    opened.wait_until_read()
    expect(opened.page.get_by_role("heading", level=1)).to_have_text("No domain yet")
    expect(opened.page.get_by_role("status").first).to_have_text(
        "Ask the operator of the telephone system for access."
        " The command on the PBX: cdr-api user grant none@example.com DOMAIN"
    )
    assert not opened.page.get_by_label("Month", exact=True).is_visible()


def test_an_account_with_one_domain_sees_that(database: Database, visit: Opener) -> None:
    database.account(BETA, email="beta@example.com")
    opened = visit("/api/usage#month=2026-11")
    opened.log_in("beta@example.com")
    opened.wait_until_read()
    expect(opened.page.get_by_role("heading", level=1)).to_have_text(f"{BETA}, November 2026")
    assert not opened.page.get_by_role("link", name="All domains").is_visible()


# While it reads, and when it fails --------------------------------------------


def reads(database: Database) -> int:
    """How many statements of the service wait for the calls' table."""
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND usename = 'cdr_api' AND wait_event_type = 'Lock'"
    )
    return int(database.execute(query, [database.name])[0][0])


def test_what_is_read_speaks_of_one_month_and_can_be_cancelled_on_the_server_too(
    database: Database, visit: Opener
) -> None:
    opened = open_usage(visit, ALPHAS)
    page = opened.page
    assert opened.rows("days") != []
    with database.connect() as connection, connection.transaction():
        connection.execute("LOCK TABLE v_xml_cdr IN ACCESS EXCLUSIVE MODE")
        page.get_by_role("button", name="Previous month").click()
        expect(page.get_by_role("heading", level=1)).to_have_text(f"{ALPHA}, October 2026")
        expect(page.get_by_role("status").first).to_have_text(f"Reading {ALPHA}, October 2026 …")
        expect(page.get_by_role("progressbar")).to_be_visible()
        assert not page.locator("#numbers").is_visible()
        assert opened.rows("days") == opened.rows("destinations") == opened.rows("directions") == []
        assert page.evaluate("Chart.getChart('calls-plot').data.labels") == []
        wait_for(lambda: reads(database) == 2)
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_role("status").first).to_have_text("Cancelled.")
        wait_for(lambda: reads(database) == 0)
    page.get_by_role("button", name="Try again").click()
    opened.wait_until_read()
    assert len(opened.rows("days")) == 31


def test_how_far_the_calls_are_is_shown_and_the_totals_stay_when_they_are_cancelled(
    visit: Opener, relay: Relay
) -> None:
    opened = open_usage(visit, url=relay.url)
    page = opened.page
    relay.hold("/api/call_range", 500_000)
    page.evaluate(f"location.hash = 'month=2026-11&domain={LONG}'")
    expect(page.locator("#reading .note")).to_have_text(re.compile(r"^[1-9][\d,]* of 20,000 calls$"))
    assert 0 < page.evaluate("document.querySelector('#reading progress').position") < 1
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("status").first).to_have_text("Cancelled.")
    relay.release()
    assert opened.text("calls") == "20,000"
    assert opened.text("destinations-note") == "The calls were not read."
    page.get_by_role("button", name="Try again").click()
    opened.wait_until_read()
    assert opened.rows("destinations")[0][0] == "20000"


def test_without_a_connection_there_is_a_sentence_and_a_way_on(visit: Opener) -> None:
    opened = open_usage(visit)
    opened.page.context.set_offline(True)
    opened.page.get_by_role("button", name="Previous month").click()
    expect(opened.page.get_by_role("alert").filter(has_text="The service cannot be reached.")).to_be_visible()
    assert opened.rows("domain-rows") == []
    opened.page.context.set_offline(False)
    opened.page.get_by_role("button", name="Try again").click()
    opened.wait_until_read()
    expect(opened.page.get_by_role("heading", level=1)).to_have_text("All domains, October 2026")
    assert opened.rows("domain-rows") != []


def test_of_an_answer_that_breaks_off_nothing_is_shown(visit: Opener, relay: Relay) -> None:
    relay.cut("/api/call_range", 500_000)
    opened = open_usage(visit, {"month": "2026-11", "domain": LONG, "round": "60/60"}, url=relay.url)
    expect(opened.page.get_by_role("alert").filter(has_text="The answer broke off before its end")).to_be_visible()
    assert opened.rows("destinations") == []
    assert [row[-1] for row in opened.rows("directions")] == ["…"]
    assert opened.text("outbound-note") == "not rounded yet; 20,000 calls"
    for name in ("days", "directions"):
        expect(opened.page.locator(f"#save-{name}")).to_be_disabled()
    expect(opened.page.locator("#save-destinations")).to_be_hidden()
    assert opened.text("destinations-note") == "The calls were not read."


def test_a_token_that_is_no_longer_good_is_asked_for_in_place(database: Database, visit: Opener) -> None:
    email = "again@example.com"
    database.account(ALPHA, email=email)
    opened = open_usage(visit, ALPHAS, email=email)
    page = opened.page
    accounts = "SELECT account_id FROM cdr_api.accounts WHERE email = %s"
    database.execute(f"DELETE FROM cdr_api.tokens WHERE account_id = ({accounts})", [email])
    page.get_by_role("button", name="Previous month").click()
    dialog = page.get_by_role("dialog", name="Log in again")
    expect(dialog.get_by_label("E-mail address")).to_have_value(email)
    expect(dialog.get_by_label("Password")).to_be_focused()
    assert opened.violations() == []
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_have_text("The e-mail address or the password is wrong.")
    dialog.get_by_label("Password").fill(PASSWORD)
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    opened.wait_until_read()
    expect(page.get_by_role("heading", level=1)).to_have_text(f"{ALPHA}, October 2026")
    assert len(opened.rows("days")) == 31
    database.execute(f"DELETE FROM cdr_api.tokens WHERE account_id = ({accounts})", [email])
    page.get_by_role("button", name="Next month").click()
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#login").get_by_label("E-mail address")).to_be_focused()
    assert opened.rows("days") == []


# Take it along ----------------------------------------------------------------


def read_csv(download: Download) -> list[dict[str, str]]:
    """What Excel knows to be UTF-8."""
    data = download.path().read_bytes()
    assert data.startswith(BOM_UTF8)
    return list(csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline="")))


def save(opened: Visit, name: str) -> Download:
    """What the button of a table gives."""
    with opened.page.expect_download() as download:
        opened.page.locator(f"#save-{name}").click()
    return download.value


def test_the_tables_are_downloaded_in_whole_numbers(database: Database, november: Visit, client: Client) -> None:
    november.show(**NOVEMBER)
    domains = save(november, "domains")
    assert domains.suggested_filename == "domains_2026-11_each-conversation-once_UTC.csv"
    expected = sum_domains(database)
    for row in read_csv(domains):
        outbound, inbound, local, other, seconds, calls, answered = expected.pop(row["domain"])
        shown = [row[f"{name}_seconds"] for name in ("outbound", "inbound", "local", "other")]
        assert [*shown, row["seconds"], row["calls"], row["answered"]] == [
            str(number) for number in (outbound, inbound, local, other, seconds, calls, answered)
        ]
    assert expected == {}
    november.show(**ALPHAS)
    saved = save(november, "days")
    assert saved.suggested_filename == f"days_{ALPHA}_2026-11_each-conversation-once_UTC.csv"
    days = {row["day"]: [int(row[name]) for name in ("calls", "answered", "seconds")] for row in read_csv(saved)}
    totals = client.calls("/api/call_totals", **OF_NOVEMBER, group_by="day", billable_only="true")
    assert {day: numbers for day, numbers in days.items() if numbers[0]} == {
        row["day"]: [row["calls"], row["answered"], row["billsec"]] for row in totals
    }


def test_a_name_of_a_file_tells_which_calls_and_which_zone(november: Visit) -> None:
    november.show(**ALPHAS, calls="all", tz="Europe/Berlin", round="30/6")
    assert save(november, "days").suggested_filename == f"days_{ALPHA}_2026-11_every-record_Europe-Berlin_30-6.csv"


def test_what_is_rounded_up_is_in_the_files_too(database: Database, november: Visit, client: Client) -> None:
    november.show(**ALPHAS, round="60/60")
    expected = round_days(database, "60/60")
    for row in read_csv(save(november, "days")):
        rounded = {direction: expected[row["day"], direction] for direction in DIRECTIONS}
        assert {name: int(row[f"{name}_seconds_60_60"]) for name in DIRECTIONS} == rounded
        assert int(row["seconds_60_60"]) == sum(rounded.values())
    totals = client.calls(
        "/api/call_totals", **OF_NOVEMBER, group_by="direction", billable_only="true", domain_name=ALPHA
    )
    assert {
        row["direction"]: [int(row[name]) for name in ("calls", "answered", "seconds", "seconds_60_60")]
        for row in read_csv(save(november, "directions"))
    } == {
        row["direction"]: [
            row["calls"], row["answered"], row["billsec"],
            sum(seconds for (_, direction), seconds in expected.items() if direction == row["direction"]),
        ]
        for row in totals
    }  # fmt: skip
    called: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for call in client.call_range(*OF_NOVEMBER.values(), billable_only="true", direction="outbound"):
        seconds = call["billsec"]
        counted = called[call["destination_number"]]
        called[call["destination_number"]] = [
            have + more for have, more in zip(counted, (1, seconds, math.ceil(seconds / 60) * 60), strict=True)
        ]
    assert {
        row["destination_number"].removeprefix("'"): [int(row[name]) for name in ("calls", "seconds", "seconds_60_60")]
        for row in read_csv(save(november, "destinations"))
    } == called


def test_calls_are_downloaded_as_the_route_sends_them(november: Visit, client: Client) -> None:
    """By a browser that collects a file and then saves it."""
    november.page.evaluate("delete window.showSaveFilePicker")
    november.show(**ALPHAS)
    with november.page.expect_download() as download:
        november.page.get_by_role("button", name="Download calls").click()
    assert download.value.suggested_filename == f"calls_{ALPHA}_2026-11_each-conversation-once_UTC.csv"
    expected = download_of(client, ALPHA)
    assert download.value.path().read_bytes() == expected
    assert b"\n" in expected
    calls = len(list(csv.reader(io.StringIO(expected.decode(), newline="")))) - 1
    expect(november.page.locator("#saving")).to_contain_text(f"{calls} calls, complete.")


# A file of the browser's own, since nobody is there to choose one.
PICKER = """
window.showSaveFilePicker = async ({ suggestedName }) => {
  window.chosen = suggestedName;
  return (await navigator.storage.getDirectory()).getFileHandle(suggestedName, { create: true });
};
window.readChosen = async () => {
  const folder = await navigator.storage.getDirectory();
  const file = await (await folder.getFileHandle(window.chosen)).getFile();
  return new TextDecoder("utf-8", { ignoreBOM: true }).decode(await file.arrayBuffer()); // as it is
};
null
"""


def test_calls_are_streamed_to_a_file_where_the_browser_can(visit: Opener, client: Client) -> None:
    opened = open_usage(visit, {"month": "2026-11", "domain": LONG})
    opened.page.evaluate(PICKER)
    opened.page.get_by_role("button", name="Download calls").click()
    expect(opened.page.locator("#saving")).to_contain_text("20,000 calls, complete.")
    assert opened.page.evaluate("readChosen()") == download_of(client, LONG).decode()


def test_a_download_that_breaks_off_leaves_no_file(visit: Opener, relay: Relay) -> None:
    opened = open_usage(visit, {"month": "2026-11", "domain": LONG}, url=relay.url)
    relay.cut("/api/call_range", 500_000)
    opened.page.evaluate(PICKER)
    opened.page.get_by_role("button", name="Download calls").click()
    alert = opened.page.locator("#saving").get_by_role("alert")
    expect(alert).to_contain_text("The answer broke off before its end")
    expect(alert).to_contain_text("No file was saved.")
    assert opened.page.evaluate("readChosen()") == ""
    opened.page.evaluate("delete window.showSaveFilePicker")
    downloads: list[Download] = []
    opened.page.on("download", lambda download: downloads.append(download))  # noqa: PLW0108 (a builtin is refused)
    opened.page.locator("#saving").get_by_role("button", name="Try again").click()
    expect(alert).to_contain_text("No file was saved.")
    assert downloads == []


def test_a_download_of_too_few_calls_is_thrown_away(visit: Opener) -> None:
    """An answer that is cut short and looks whole, as by a proxy that talks HTTP/1.0."""
    opened = open_usage(visit, ALPHAS)
    opened.page.evaluate(PICKER)
    cut = b"xml_cdr_uuid\n00000000-0000-4000-8000-000000000000\n"
    opened.page.route("**/call_range?*", lambda route: route.fulfill(body=cut, content_type="text/csv"))
    opened.page.get_by_role("button", name="Download calls").click()
    expect(opened.page.locator("#saving").get_by_role("alert")).to_contain_text(
        "The file was thrown away: 1 call came, but there are"
    )
    assert opened.page.evaluate("readChosen()") == ""


# For everybody ----------------------------------------------------------------


def test_a_link_shows_the_same_view_and_holds_no_token(visit: Opener) -> None:
    opened = open_usage(visit, ALPHAS)
    opened.page.get_by_label("Time zone").select_option("Asia/Tokyo")
    opened.wait_until_read()
    opened.page.get_by_label("Round up").select_option("60/60")
    opened.page.get_by_label("Which calls").select_option("Every record, leg by leg")
    opened.wait_until_read()
    link = opened.page.url
    assert "cdr_" not in link
    again = visit("/api/usage" + link.partition("/api/usage")[2])
    again.log_in()
    expect(again.page.locator("#destinations tbody tr")).to_have_count(10)
    again.wait_until_read()
    for table in ("days", "directions", "destinations"):
        assert again.rows(table) == opened.rows(table) != []
    assert again.page.get_by_label("Time zone").input_value() == "Asia/Tokyo"


def test_months_are_those_of_the_zone_that_is_named(database: Database, november: Visit, client: Client) -> None:
    november.show(**ALPHAS)
    assert "(time zone UTC)" in november.text("meaning")
    november.show(**ALPHAS, tz="Pacific/Auckland")
    assert "(time zone Pacific/Auckland)" in november.text("meaning")
    totals = client.calls(
        "/api/call_totals", **OF_NOVEMBER, tz="Pacific/Auckland", group_by="day", billable_only="true"
    )
    shown = {day_of(row): row[3] for row in november.rows("days") if row[3] != "0"}
    assert shown == {row["day"]: f"{row['calls']:,}" for row in totals}


def test_numbers_dates_and_axes_are_those_of_the_browsers_language(database: Database, visit: Opener) -> None:
    opened = open_usage(visit, ALPHAS, locale="de-DE")
    seconds = sum_domains(database)[ALPHA][4]
    in_german = minutes(seconds).translate(str.maketrans(",.", ".,"))
    assert opened.rows("days", "tFoot")[0][2] == in_german
    assert opened.rows("days")[0][0] == "So., 1. Nov."
    expect(opened.page.get_by_role("heading", level=1)).to_have_text(f"{ALPHA}, November 2026")
    ticks = opened.page.evaluate("(scale => scale.getLabelForValue(1234.5))(Chart.getChart('minutes-plot').scales.y)")
    assert ticks == "1.234,5"


def test_a_system_without_a_language_is_no_obstacle(visit: Opener) -> None:
    """WebKit calls its language C then, of which Intl wants to know nothing."""
    opened = visit("/api/usage")
    opened.page.add_init_script("Object.defineProperty(navigator, 'language', { value: 'C' })")
    opened.page.reload()
    opened.log_in()
    opened.wait_until_read()
    opened.show(**ALPHAS)
    assert opened.page.evaluate("navigator.language") == "C"
    assert len(opened.rows("destinations")) == 10


@pytest.mark.parametrize(("viewport", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desk", "phone"])
def test_the_page_keeps_the_rules_of_accessibility(visit: Opener, viewport: dict[str, int], scheme: str) -> None:
    opened = visit("/api/usage", viewport, color_scheme=scheme)
    assert opened.violations() == []
    opened.log_in()
    expect(opened.page.locator("#report")).to_be_visible()
    opened.wait_until_read()
    dark = opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 24, 31)"
    assert dark == (scheme == "dark")
    for fragment in (NOVEMBER, ALPHAS, {"month": "2020-02"}):
        opened.show(**fragment)
        assert opened.violations() == []
        assert not opened.is_too_wide()


# What a screen reader calls the place that the keyboard is at.
FOCUSED = "(e => e.ariaLabel || e.labels?.[0]?.innerText || e.innerText || '')(document.activeElement)"


def tab_to(page: Page, name: str) -> None:
    for _ in range(25):
        page.keyboard.press("Tab")
        if page.evaluate(FOCUSED).strip().startswith(name):
            return
    pytest.fail(f"no way to {name}")


def test_by_keyboard_alone(visit: Opener) -> None:
    opened = visit("/api/usage#month=2026-11")
    page = opened.page
    expect(page.get_by_label("E-mail address").first).to_be_focused()
    page.keyboard.type(READER)
    tab_to(page, "Password")
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Enter")
    expect(page.get_by_label("Find")).to_be_focused()
    opened.wait_until_read()
    tab_to(page, "Calls")  # a head of the table
    page.keyboard.press("Enter")
    expect(page.get_by_role("columnheader", name="Calls", exact=True)).to_have_attribute("aria-sort", "descending")
    assert page.evaluate(FOCUSED) == "Calls"
    tab_to(page, BETA)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_have_text(f"{BETA}, November 2026")
    opened.wait_until_read()
    expect(page.get_by_role("heading", level=1)).to_be_focused()
    tab_to(page, "Previous month")
    page.keyboard.press("Enter")
    opened.wait_until_read()
    expect(page.get_by_role("heading", level=1)).to_have_text(f"{BETA}, October 2026")


def test_on_a_phone_no_field_takes_the_focus(visit: Opener) -> None:
    """It would open the keyboard."""
    opened = visit("/api/usage#month=2026-11", PHONE)
    assert opened.page.evaluate("document.activeElement === document.body")
    opened.log_in()
    expect(opened.page.get_by_role("heading", level=1)).to_be_focused()


@pytest.mark.parametrize("fragment", [ALPHAS, NOVEMBER], ids=["a domain", "all domains"])
def test_it_prints_on_one_sheet(visit: Opener, fragment: dict[str, str]) -> None:
    opened = open_usage(
        visit,
        {**fragment, "month": "2026-10", "round": "60/60"} if "domain" in fragment else fragment,
        color_scheme="dark",
    )
    for paper in ("A4", "Letter"):
        pdf = opened.page.pdf(format=paper, prefer_css_page_size=True)
        assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == 1, paper
    opened.page.emulate_media(media="print")
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not opened.page.get_by_role("button", name="Log out").is_visible()
    assert not opened.page.get_by_label("Month", exact=True).is_visible()
    for name in ("calls", "minutes", "peak") if "domain" in fragment else ():
        expect(opened.page.locator(f"#{name}-plot")).to_be_visible()
        attributes = opened.page.evaluate(f"Chart.getChart('{name}-plot').ctx.getContextAttributes()")
        assert attributes["willReadFrequently"]  # or it is black from WebKit, which no driver lets us print from
