"""Past one machine: a partitioned table, several copies of the service, big exports."""

from __future__ import annotations

import json
import re
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from cdr.check_calls import find_plan
from tests.commands import check
from tests.conftest import ROOT, Client, Database, DatabaseMaker

# The statements of docs/scaling.md that make v_xml_cdr a partitioned table.
PARTITION = (ROOT / "docs/scaling.md").read_text("utf-8").partition("```sql\n")[2].partition("```")[0]

MONTH = {"from": "2026-10-01", "to": "2026-10-31"}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/api/calls", {"domain_name": "alpha.example.com"}),
    ("/api/calls", {"domain_name": "alpha.example.com", "limit": 40, "fields": "xml_cdr_uuid,end_stamp"}),
    ("/api/call_range", {"domain_name": "beta.example.com", **MONTH}),
    ("/api/call_range", {"domain_name": "beta.example.com", "by": "start", "format": "csv", **MONTH}),
    ("/api/call_totals", {"group_by": "domain_name,day", **MONTH}),
    ("/api/concurrent_calls_by_domain", {"date": "2026-10-05", "resolution": 60}),
    ("/api/active_calls_by_domain", {"date": "2026-10-05", "resolution": 60}),
]


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    """6,000 calls in the 90 days up to 2026-11-18, and two without an end stamp."""
    database = make_database(calls=6000, index=True)
    database.insert_call(end_stamp=None)
    database.insert_call(end_stamp=None, domain_name="beta.example.com")
    return database


@pytest.fixture(scope="module")
def client(database: Database) -> Client:
    names = ("alpha.example.com", "beta.example.com", "gamma.example.com")
    return database.client(database.account(*names))


def feed(client: Client) -> list[str]:
    calls = client.get("/api/call_feed", **{"from": "2020-01-01"}).get_json()
    return sorted(call["xml_cdr_uuid"] for call in calls)


def read_partitions(database: Database, start: str, end: str) -> set[str]:
    """The partitions in the plan of a range of one domain, which an index serves."""
    with psycopg.connect(database.dsn, row_factory=dict_row) as connection:
        nodes = list(find_plan(connection, start, end))
    assert "end_stamp" in " ".join(node.get("Index Cond", "") for node in nodes)
    return {node["Relation Name"] for node in nodes if "Relation Name" in node}


def test_a_table_partitioned_by_month_gives_the_same_answers(database: Database, client: Client) -> None:
    before = [client.get(path, **values).data for path, values in REQUESTS]
    fed = feed(client)
    with database.connect() as connection:
        connection.execute(PARTITION)
        connection.execute("ANALYZE v_xml_cdr")
    assert database.execute("SELECT relkind FROM pg_class WHERE oid = 'v_xml_cdr'::regclass") == [("p",)]
    client = database.client(client.token)  # with connections that have looked at this table
    after = [client.get(path, **values).data for path, values in REQUESTS]
    assert after == before
    assert check(client.app)[1]["key"].startswith("✓ ")  # else each of them would have sorted the whole domain
    assert min(map(len, before)) > 1000
    assert feed(client) == fed
    assert read_partitions(database, "2026-10-05", "2026-10-06") == {"v_xml_cdr_2026_10"}
    assert read_partitions(database, "2026-09-30", "2026-10-02") == {"v_xml_cdr_2026_09", "v_xml_cdr_2026_10"}


def test_check_tells_an_index_that_a_partitioned_table_takes(make_database: DatabaseMaker) -> None:
    database = make_database(calls=300, index=True)
    database.execute(PARTITION)
    app = database.app()
    assert check(app)[1]["index"] == "✓ index              an index serves ranges"
    names = database.execute("SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = 'v_xml_cdr'::regclass")
    database.execute(f"DROP INDEX {', '.join(name for (name,) in names)}")
    line = check(app)[1]["index"]
    assert line.startswith("✗ index              no index serves ranges; run ")
    create = re.search(r"CREATE INDEX ON v_xml_cdr \(domain_uuid, .*?;", line)
    assert create
    database.execute(create[0])
    assert check(app)[1]["index"].startswith("✓ ")


def test_copies_of_the_service_take_each_others_tokens_and_cursors(database: Database) -> None:
    one, other = database.app(), database.app()
    token = database.account("alpha.example.com")
    path, found = "/api/calls?domain_name=alpha.example.com&limit=1000&fields=xml_cdr_uuid", []
    for app in [one, other] * 10:
        response = Client(app, token).send("GET", path)
        found += [call["xml_cdr_uuid"] for call in json.loads(response.data)]
        if "Link" not in response.headers:
            break
        path = "/api/" + response.headers["Link"].partition("/api/")[2].partition(">")[0]
    stored = database.execute("SELECT count(*) FROM v_xml_cdr WHERE domain_name = 'alpha.example.com'")[0][0]
    assert len(found) == len(set(found)) == stored
