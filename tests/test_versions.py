"""What has to hold on every PostgreSQL: schema.sql, the routes, the feed, the commands (make test-versions)."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

import demo
from tests.commands import check, flask
from tests.conftest import PASSWORD, UNTIL, Client, Database, DatabaseMaker
from tests.servers import run_schema

ALPHA, BETA, _ = demo.DOMAINS
EVER = {"from": "2026-01-01", "to": "2026-12-31"}
DAY = "2026-11-02"
EPOCHS = "CREATE INDEX ON v_xml_cdr (domain_uuid, end_epoch, uuid)"  # for 4.x


@pytest.fixture(scope="module", params=["4.2.2", demo.NEWEST])
def database(make_database: DatabaseMaker, request: pytest.FixtureRequest) -> Database:
    found = make_database(request.param, calls=600, index=request.param == demo.NEWEST)
    if request.param != demo.NEWEST:
        found.execute(EPOCHS)
    assert run_schema(found) == []
    return found


@pytest.fixture(scope="module")
def client(database: Database) -> Client:
    app = database.app(CDR_API_TIMEZONE="UTC")
    return Client(app, database.account(ALPHA, BETA))


def stored(database: Database) -> dict[str, int]:
    """The calls of alpha and beta with their seconds, by uuid."""
    key = "uuid" if database.release[0] == "4" else "xml_cdr_uuid"
    query = f"SELECT {key}::text, coalesce(billsec, 0)::integer FROM v_xml_cdr WHERE domain_name IN (%s, %s)"
    return dict(database.execute(query, [ALPHA, BETA]))


def read(client: Client, path: str, **parameters: Any) -> Any:
    response = client.get(f"/api/{path}", **parameters)
    assert response.status_code == 200, response.text
    return json.loads(response.data)


def test_calls_pages_and_formats_are_what_is_stored(database: Database, client: Client) -> None:
    expected = stored(database)
    assert len(expected) > 300
    found = [call for name in (ALPHA, BETA) for call in read(client, "calls", domain_name=name)]
    assert {call["xml_cdr_uuid"]: call["billsec"] for call in found} == expected
    ranged = [call for name in (ALPHA, BETA) for call in read(client, "call_range", domain_name=name, **EVER)]
    assert ranged == found
    text = client.get("/api/call_range", domain_name=ALPHA, format="csv", **EVER).text
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert [row["xml_cdr_uuid"] for row in rows] == [c["xml_cdr_uuid"] for c in ranged if c["domain_name"] == ALPHA]
    url, paged = f"/api/calls?domain_name={ALPHA}&limit=50&fields=xml_cdr_uuid", []
    while url:
        response = client.send("GET", url)
        paged += json.loads(response.data)
        url = response.headers.get("Link", "").partition("<")[2].partition(">")[0]
    assert [call["xml_cdr_uuid"] for call in paged] == [row["xml_cdr_uuid"] for row in rows]
    few = read(client, "call_range", domain_name=ALPHA, **{"from": DAY, "to": DAY})
    assert few == [call for call in ranged if call["domain_name"] == ALPHA and call["end_stamp"][:10] == DAY] != []


def test_the_newest_first_a_month_a_prefix_and_one_call_are_of_the_same_calls(
    database: Database, client: Client
) -> None:
    whole = read(client, "calls", domain_name=ALPHA)
    assert read(client, "calls", domain_name=ALPHA, order="desc") == whole[::-1]
    october = [call for call in whole if call["end_stamp"][:7] == "2026-10"]
    assert read(client, "call_range", domain_name=ALPHA, month="2026-10") == october != []
    prefix = whole[0]["destination_number"][:2]
    found = read(client, "calls", domain_name=ALPHA, destination_prefix=prefix)
    assert found == [call for call in whole if call["destination_number"].startswith(prefix)] != []
    uuid = whole[-1]["xml_cdr_uuid"]
    assert read(client, f"calls/{uuid}") == whole[-1]
    assert uuid in [call["xml_cdr_uuid"] for call in read(client, f"calls/{uuid}/legs")]


def test_sums_are_those_of_the_calls(database: Database, client: Client) -> None:
    expected = stored(database)
    totals = read(client, "call_totals", group_by="domain_name,day", **EVER)
    assert sum(row["calls"] for row in totals) == len(expected)
    assert sum(row["billsec"] for row in totals) == sum(expected.values())
    whole = read(client, "call_totals", **EVER)[0]
    assert (whole["calls"], whole["billsec"]) == (len(expected), sum(expected.values()))
    some = sorted(expected)[:3]
    looked_up = json.loads(client.post("/api/call_lookup", json={"xml_cdr_uuid": some}).data)
    assert sorted(call["xml_cdr_uuid"] for call in looked_up["calls"]) == some
    peaks = read(client, "concurrent_calls_by_domain", date=DAY, resolution="60")
    activity = read(client, "active_calls_by_domain", date=DAY, resolution="60")
    assert len(peaks) == len(activity) == 2 * 24
    assert all(row["inbound"] + row["outbound"] + row["internal"] <= row["total"] for row in activity)
    assert 0 < max(row["active_calls"] for row in peaks) <= max(row["total"] for row in activity)


def test_the_feed_gives_each_call_once(database: Database, client: Client) -> None:
    response = client.get("/api/call_feed", **{"from": "2026-01-01", "fields": "xml_cdr_uuid"})
    found = [call["xml_cdr_uuid"] for call in response.get_json()]
    epochs = {"end_epoch": UNTIL} if database.release[0] == "4" else {}
    new = [database.insert_call(domain_uuid=None, **epochs), database.insert_call(domain_name=BETA, **epochs)]
    response = client.get("/api/call_feed", cursor=response.headers["X-Next-Cursor"], fields="xml_cdr_uuid")
    assert response.headers["X-Complete-Through"]
    following = [call["xml_cdr_uuid"] for call in response.get_json()]
    assert sorted(following) == sorted(new)
    assert sorted(found + following) == sorted(stored(database))
    again = client.get("/api/call_feed", cursor=response.headers["X-Next-Cursor"], fields="xml_cdr_uuid")
    assert again.get_json() == []


def test_accounts_commands_and_check(database: Database) -> None:
    app = database.app(CDR_API_REGISTER_DOMAINS=ALPHA)
    body = {"name": "R", "email": "r@example.com", "password": PASSWORD, "password_confirmation": PASSWORD}
    assert Client(app).post("/api/register", json=body).status_code == 201
    login = Client(app).post("/api/login", json={"email": "r@example.com", "password": PASSWORD})
    client = Client(app, login.get_json()["token"])
    assert [found["domain_name"] for found in read(client, "domains")] == [ALPHA]
    assert client.get("/api/calls", domain_name=BETA).status_code == 403
    assert flask(app, "user", "grant", "r@example.com", BETA).exit_code == 0
    assert read(client, "calls", domain_name=BETA)
    assert client.post("/api/logout").status_code == 200
    assert client.get("/api/domains").status_code == 401
    status, lines = check(app)
    assert status == 0, lines
    ((version,),) = database.execute("SHOW server_version")
    assert f"PostgreSQL {version}," in lines["CDR_API_DSN"]
