"""limit, after and the Link header: every call once, also while calls arrive."""

from __future__ import annotations

import json
import random
import re
import threading
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest
from psycopg.rows import dict_row

import cdr_api
from cdr.check_calls import find_plan
from cdr.selection import FILTERS, FIRST_UUID, LAST_UUID, Domains, Selection, Source, compose_select
from tests.conftest import Client, Database, DatabaseMaker, problem, wait_for

ALPHA_UUID = "00000000-0000-4000-8000-0000000000aa"


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    database = make_database(calls=1000, index=True)
    # Equal stamps in the way of a page's end, and calls that never got one.
    database.execute("UPDATE v_xml_cdr SET end_stamp = date_trunc('day', end_stamp) WHERE billsec = 0")
    for _ in range(7):
        database.insert_call(end_stamp=None)
    return database


def next_link(response: Any) -> str | None:
    if "Link" not in response.headers:
        return None
    match = re.fullmatch(r'<([^>]+)>; rel="next"', response.headers["Link"])
    assert match
    return match[1]


def read_pages(client: Client, path: str, **parameters: Any) -> list[list[str]]:
    """The uuids, page by page, along the Link headers."""
    pages = []
    response = client.get(path, domain_name="alpha.example.com", fields="xml_cdr_uuid", **parameters)
    while True:
        assert response.status_code == 200, response.text
        pages.append([call["xml_cdr_uuid"] for call in json.loads(response.data)])
        if (link := next_link(response)) is None:
            return pages
        response = client.send("GET", link)


@pytest.mark.parametrize("limit", [1, 7, 100, 599, 100_000])
@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("/api/calls", {}),
        ("/api/call_range", {"from": "2026-09-01", "to": "2026-10-31"}),
        ("/api/call_range", {"from": "2026-09-01", "to": "2026-10-31", "by": "start", "direction": "inbound"}),
    ],
    ids=["calls", "range", "range by start, inbound"],
)
def test_pages_are_the_whole_answer_in_its_order(
    client: Client, path: str, parameters: dict[str, str], limit: int
) -> None:
    if limit == 1:
        parameters = parameters | {"hangup_cause": "USER_BUSY"}
    whole = [call["xml_cdr_uuid"] for call in client.calls(path, **parameters)]
    pages = read_pages(client, path, limit=limit, **parameters)
    assert [uuid for page in pages for uuid in page] == whole
    assert all(len(page) <= limit for page in pages)
    assert all(pages[:-1]) or not whole


@pytest.mark.parametrize("kind", ["json", "csv"])
def test_pages_go_on_after_a_year_before_christ(make_database: DatabaseMaker, kind: str) -> None:
    database = make_database()
    stamps = ["0044-03-15 12:00:00+00 BC", "0044-03-15 12:00:01.5+00 BC", "2026-02-03 10:00:00+00", None]
    uuids = [database.insert_call(end_stamp=stamp) for stamp in stamps]
    client = database.client(database.account("alpha.example.com"))
    url: str | None = f"/api/calls?domain_name=alpha.example.com&fields=xml_cdr_uuid&limit=1&format={kind}"
    pages = []
    while url:
        response = client.send("GET", url)
        assert response.status_code == 200, response.text
        pages += re.findall(r"[0-9a-f-]{36}", response.text)
        url = next_link(response)
    assert pages == uuids


def test_link_is_there_exactly_when_there_is_more(client: Client) -> None:
    total = len(client.call_range("2000-01-01", "2099-01-01"))
    for limit, more in ((total - 1, True), (total, False), (total + 1, False)):
        parameters = {"domain_name": "alpha.example.com", "from": "2000-01-01", "to": "2099-01-01", "limit": limit}
        assert ("Link" in client.get("/api/call_range", **parameters).headers) is more
    # In /api/calls those without an end stamp follow.
    dated = client.get("/api/calls", domain_name="alpha.example.com", limit=total)
    assert len(dated.get_json()) == total
    assert len(client.send("GET", next_link(dated) or "").get_json()) == 7


def test_link_keeps_the_parameters_and_is_absolute(client: Client) -> None:
    query = {"domain_name": "alpha.example.com", "limit": "2", "fields": "billsec", "caller_id_number": "104"}
    link = urlsplit(next_link(client.get("/api/calls", **query)) or "")
    assert (link.scheme, link.netloc, link.path) == ("http", "localhost", "/api/calls")
    found = {name: values[0] for name, values in parse_qs(link.query).items()}
    after = found.pop("after")
    assert found == query
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", after)


def test_link_behind_a_proxy_is_what_the_client_would_write(database: Database) -> None:
    forged = {"X-Forwarded-Prefix": "/cdr-api", "X-Forwarded-Host": "pbx.example.com", "X-Forwarded-Proto": "https"}
    token = database.account("alpha.example.com")
    url = "/api/calls?domain_name=alpha.example.com&limit=1"
    for proxies, begin in (("1", "https://pbx.example.com/cdr-api/calls?"), ("0", "http://localhost/api/calls?")):
        client = database.client(token, database.app(CDR_API_PROXIES=proxies))
        assert (next_link(client.send("GET", url, headers=forged)) or "").startswith(begin)


@pytest.mark.parametrize("host", ["xn--80ak6aa92e.com", "pbx.example.com:8443", "[::1]:8000"])
def test_link_names_the_host_as_the_client_did(client: Client, host: str) -> None:
    response = client.send("GET", "/api/calls?domain_name=alpha.example.com&limit=1", headers={"Host": host})
    assert (next_link(response) or "").startswith(f"http://{host}/api/calls?")


def test_after_without_a_limit_is_all_the_rest(client: Client) -> None:
    response = client.get("/api/calls", domain_name="alpha.example.com", limit=10)
    after = parse_qs(urlsplit(next_link(response) or "").query)["after"][0]
    rest = client.calls(after=after)
    assert [call["xml_cdr_uuid"] for call in response.get_json() + rest] == [c["xml_cdr_uuid"] for c in client.calls()]


def test_format_fields_and_limit_may_change_from_page_to_page(client: Client) -> None:
    after = parse_qs(
        urlsplit(next_link(client.get("/api/calls", domain_name="alpha.example.com", limit=5)) or "").query
    )["after"][0]
    lines = client.get(
        "/api/calls", domain_name="alpha.example.com", after=after, limit=3, fields="xml_cdr_uuid", format="ndjson"
    )
    assert [json.loads(line)["xml_cdr_uuid"] for line in lines.text.splitlines()] == [
        call["xml_cdr_uuid"] for call in client.calls()[5:8]
    ]


def test_a_cursor_is_good_for_its_own_request_only(database: Database, client: Client) -> None:
    response = client.get(
        "/api/call_range",
        **{"domain_name": "alpha.example.com", "from": "2026-09-01", "to": "2026-10-31", "limit": "5"},
    )
    good = {name: values[0] for name, values in parse_qs(urlsplit(next_link(response) or "").query).items()}
    assert client.get("/api/call_range", **good).status_code == 200
    both = database.client(database.account("alpha.example.com", "beta.example.com"), client.app)
    cursor = good["after"]
    cases = {
        "another range": (client, "/api/call_range", good | {"to": "2026-10-30"}),
        "another stamp": (client, "/api/call_range", good | {"by": "start"}),
        "another filter": (client, "/api/call_range", good | {"direction": "local"}),
        "another route": (client, "/api/calls", {k: v for k, v in good.items() if k not in ("from", "to")}),
        "another account": (both, "/api/call_range", good),
        "another domain": (both, "/api/call_range", good | {"domain_name": "beta.example.com"}),
        "cut short": (client, "/api/call_range", good | {"after": cursor[:-1]}),
        "edited": (client, "/api/call_range", good | {"after": ("X" if cursor[0] != "X" else "Y") + cursor[1:]}),
        "empty": (client, "/api/call_range", good | {"after": ""}),
        "no cursor at all": (client, "/api/call_range", good | {"after": "2026-09-05"}),
        "another script": (client, "/api/call_range", good | {"after": "日本"}),
    }
    for name, (who, path, parameters) in cases.items():
        response = who.get(path, **parameters)
        assert response.status_code == 422, name
        assert list(problem(response)["data"]) == ["after"], name


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_paging_meets_every_call_once_while_calls_arrive(make_database: DatabaseMaker, order: str) -> None:
    database = make_database(calls=800, index=True)
    client = database.client(database.account("alpha.example.com"))
    before = {call["xml_cdr_uuid"] for call in client.calls()}
    stop = threading.Event()
    stored: list[str] = []

    def arrive() -> None:
        chance = random.Random(1)
        while not stop.is_set():
            day = chance.randint(1, 28)
            stored.append(database.insert_call(end_stamp=f"2026-09-{day:02} {chance.randint(0, 23):02}:00:00+00"))

    writer = threading.Thread(target=arrive)
    writer.start()
    try:
        uuids = [uuid for page in read_pages(client, "/api/calls", limit=20, order=order) for uuid in page]
    finally:
        stop.set()
        writer.join()
    assert stored
    assert len(uuids) == len(set(uuids))
    assert before <= set(uuids) <= before | set(stored)


@pytest.mark.parametrize("limit", ["0", "-1", "100001", "1e9", "1000000000", "", "ten", "1.5", "１"])
def test_bad_limits(client: Client, limit: str) -> None:
    response = client.get("/api/calls", domain_name="alpha.example.com", limit=limit)
    assert response.status_code == 422
    assert list(problem(response)["data"]) == ["limit"]


def test_the_index_finds_the_start_of_a_page(database: Database, client: Client) -> None:
    """The key is an index condition as a whole: a page far back costs what the first one costs."""
    with client.app.app_context(), database.connect() as connection:
        connection.row_factory = dict_row
        plan = find_plan(connection, "2026-10-05", "2026-10-06")
        conditions = [node["Index Cond"] for node in plan if "Index Cond" in node]
    assert len(conditions) == 2  # those that bear the domain's uuid, and those that have none
    for condition in conditions:
        assert re.search(r"ROW\((cdr\.)?end_stamp, (cdr\.)?xml_cdr_uuid\) > ROW", condition)


OLDEST = Selection(Domains([ALPHA_UUID], [""], [""]), part="dated", limit=10)


@pytest.mark.parametrize("zoned", [True, False], ids=["known to be zoned", "by folding"])
@pytest.mark.parametrize("form", ["calls_with_uuid", "calls_in_parts"])
def test_a_page_far_back_reads_no_more_of_the_index_than_the_first(
    make_database: DatabaseMaker, form: str, *, zoned: bool
) -> None:
    database = make_database(index=True)
    database.execute(
        "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_uuid, end_stamp) SELECT gen_random_uuid(), %s,"
        " timestamptz '2026-01-01 00:00Z' + i * interval '1 s' FROM generate_series(1, 20000) AS i",
        [ALPHA_UUID],
    )
    database.execute("VACUUM ANALYZE v_xml_cdr")
    source = Source(form, ordered=True, feed=False, distinct=False, zoned=zoned)

    def count_blocks(page: Selection) -> int:
        own = source._replace(backwards=page.newest_first, conditions=page.conditions)
        query = compose_select(("end_stamp", "xml_cdr_uuid"), own)
        with psycopg.connect(database.dsn, cursor_factory=psycopg.ClientCursor) as connection:
            connection.execute("SET enable_sort = off")
            connection.execute("SET random_page_cost = 1.1")
            explain = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {query}"
            plan = connection.execute(explain, page.parameters()).fetchall()[0][0][0]["Plan"]
        assert plan["Actual Rows"] == 10
        return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])

    begin, newest = replace(OLDEST, after=("2026-01-01 02:00Z", LAST_UUID)), replace(OLDEST, newest_first=True)
    middle = ("2026-01-01 03:00Z", FIRST_UUID)
    bounded = replace(begin, newest_first=True)
    for page in (begin, newest, newest.behind(middle), bounded, bounded.behind(middle)):
        assert count_blocks(page) <= count_blocks(OLDEST) + 5


@pytest.mark.direct  # PgBouncer's sessions go on
@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        ("/api/calls", {"domain_name": "alpha.example.com"}),
        ("/api/call_range", {"domain_name": "alpha.example.com", "from": "2020-01-01", "to": "2030-01-01"}),
        ("/api/calls", {"domain_name": "alpha.example.com", "direction": "inbound", "format": "csv"}),
        ("/api/call_feed", {"from": "2020-01-01"}),
    ],
)
def test_a_page_reads_the_table_once(make_database: DatabaseMaker, path: str, parameters: dict[str, str]) -> None:
    """Where no index leads to it, to read it once more for what follows would double its time."""
    database = make_database(calls=300)

    others = (
        "SELECT FROM pg_stat_activity WHERE datname = current_database()"
        " AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )

    def count_scans() -> int:
        wait_for(lambda: not database.execute(others))
        ((scans,),) = database.execute("SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'v_xml_cdr'")
        return int(scans)

    before = count_scans()
    app = database.app()
    response = database.client(database.account("alpha.example.com"), app).get(path, limit=5, **parameters)
    assert response.status_code == 200
    assert next_link(response)
    app.extensions["cdr_api"].close()  # a session tells all that it has read when it ends, or a moment later
    wait_for(lambda: count_scans() > before)
    assert count_scans() == before + 1


def test_a_release_that_adds_filters_and_fields_resets_no_cursor(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = client.get("/api/calls", domain_name="alpha.example.com", limit=5, direction="inbound")
    poll = client.get("/api/call_feed", **{"from": "2026-09-01", "limit": "5", "direction": "inbound"})
    monkeypatch.setitem(FILTERS, "new_filter", str)
    monkeypatch.setitem(cdr_api.CALLS, "new_filter", str)
    monkeypatch.setitem(cdr_api.FEED, "new_filter", str)
    for response in (page, poll):
        assert client.send("GET", next_link(response) or "").status_code == 200


@pytest.mark.parametrize("everything", [False, True], ids=["two domains", "everything"])
@pytest.mark.parametrize("limit", [1, 3, 50, 5000])
def test_pages_of_several_domains_are_all_of_their_calls_in_order(
    make_database: DatabaseMaker, limit: int, *, everything: bool
) -> None:
    """Over gaps of years, equal stamps, the far future, infinity, calls without an end, and of no domain."""
    database = make_database(index=True)
    seconds = [0, 0, 0, 1, 3599, 3600, 3600, 7200, 7201, 100_000, 100_000, 50_000_000, 200_000_000]
    for number, second in enumerate(seconds * (1 if limit == 1 else 3)):
        database.execute(
            "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_uuid, domain_name, end_stamp) SELECT gen_random_uuid(),"
            " domain_uuid, domain_name, timestamptz '2019-01-01 00:00Z' + %s * interval '1 s' FROM v_domains"
            " WHERE domain_name = %s",
            [second, ("alpha.example.com", "beta.example.com", "gamma.example.com")[number % 3]],
        )
    for end in ("2040-01-01 00:00Z", "infinity", None):
        database.insert_call(end_stamp=end, domain_name="beta.example.com")
    for number in range(0 if limit == 50 else 8):  # of two domains that are no more, and of none; or not
        uuid = [ALPHA_UUID, LAST_UUID, FIRST_UUID, None][number % 4]
        stamp = f"2019-01-01 0{number}:30:00+00"
        database.insert_call(end_stamp=stamp, domain_uuid=uuid, domain_name="gamma.example.com")
    names = ["alpha.example.com", "beta.example.com"]
    client = database.client(database.account(*names, all_domains=everything))
    where = {"from": "2019-01-01", "fields": "xml_cdr_uuid,domain_name"}
    whole = client.get("/api/call_feed", **where).get_json()
    expected = database.execute(
        "SELECT xml_cdr_uuid::text FROM v_xml_cdr WHERE %s OR domain_name <> 'gamma.example.com'"
        " ORDER BY end_stamp NULLS LAST, xml_cdr_uuid",
        [everything],
    )
    assert [call["xml_cdr_uuid"] for call in whole] == [uuid for (uuid,) in expected]
    found: list[dict[str, str]] = []
    response = client.get("/api/call_feed", limit=limit, **where)
    while len(found) < len(whole):
        page = response.get_json()
        assert len(page) <= limit
        found += page
        response = client.send("GET", next_link(response) or "")
        assert response.status_code == 200
    assert found == whole
