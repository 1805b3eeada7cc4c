"""Few calls: brought by a prepared statement, and the same to the byte as by the stream."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import hypothesis
import pytest
from hypothesis import strategies as st

from cdr.database import MOST_PREPARED
from cdr.short import SHORT_BYTES, SHORT_ROWS
from tests.clients import ask, get_while_rewritten
from tests.conftest import Client, Database, DatabaseMaker, Gunicorn, serve, wait_for
from tests.values import ANYTHING, FIXED, NASTY

pytestmark = pytest.mark.direct("through PgBouncer nothing is prepared; test_pgbouncer.py shows it")

NUMBERS = st.sampled_from(["0", "7", "12.5", "12.4999", "-0.4", "12.00", "NaN", "1e20", "1714636820.9"])
COLUMNS: dict[str, Any] = {
    "caller_id_name": NASTY | ANYTHING | FIXED,
    "xml": NASTY | ANYTHING | FIXED,
    "leg": st.sampled_from(["a", "b", "", " "]),
    "extension_uuid": st.uuids().map(str),
    "billsec": NUMBERS,
    "mduration": NUMBERS,
    "start_epoch": NUMBERS,
    "rtp_audio_in_mos": NUMBERS,
    "cc_queue_joined_epoch": NUMBERS,
    "hangup_cause_q850": NUMBERS,
    "missed_call": st.booleans(),
    "start_stamp": st.sampled_from(["2026-02-03 10:00:00.25+00", "0044-03-15 12:00:00+00 BC", "infinity"]),
    "answer_stamp": st.sampled_from(
        ["1970-01-01 00:00:00+00", "1970-01-01 20:00+00", "1970-01-02 01:00+00", "2026-02-03 10:00:00+05:30"]
    ),
}
ROWS = st.lists(st.tuples(*[st.none() | values for values in COLUMNS.values()]), max_size=8)
DAY = {"from": "2026-02-03", "to": "2026-02-03"}


@pytest.fixture
def database(make_database: DatabaseMaker) -> Iterator[Database]:
    """Without a call, and with the index."""
    database = make_database(index=True)
    yield database
    database.close()


@pytest.fixture
def client(database: Database) -> Client:
    return database.client(database.account("alpha.example.com"))


def range_and_calls(client: Client, **parameters: Any) -> tuple[bytes, bytes]:
    """All calls by way of few, if they are, and by the stream."""
    few = client.get("/api/call_range", domain_name="alpha.example.com", **DAY, **parameters)
    stream = client.get("/api/calls", domain_name="alpha.example.com", **parameters)
    assert few.status_code == stream.status_code == 200, few.text
    assert few.headers["Content-Type"] == stream.headers["Content-Type"]
    return few.data, stream.data


def executed(database: Database) -> int:
    """How many of the service's connections gave a short answer last: only that ends with a COMMIT by itself."""
    query = "SELECT query FROM pg_stat_activity WHERE datname = %s AND usename = 'cdr_api'"
    return sum(sent.strip() == "COMMIT" for (sent,) in database.execute(query, [database.name]))


def prepared(client: Client) -> int:
    """How many statements for few calls a connection has prepared; PostgreSQL must have those that we know of."""
    with client.app.extensions["cdr_api"].calls.connection() as connection:
        found = connection.execute("SELECT name, statement FROM pg_prepared_statements").fetchall()
        assert len(found) == len(connection.prepared) <= MOST_PREPARED
        return sum("FROM v_xml_cdr AS cdr" in query for query in connection.prepared)


@hypothesis.given(ROWS)
@hypothesis.settings(
    max_examples=100, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_few_calls_are_those_of_the_stream(database: Database, client: Client, rows: list[tuple[Any, ...]]) -> None:
    columns, marks = ", ".join(COLUMNS), ", ".join(["%s"] * len(COLUMNS))
    with database.connect() as connection, connection.cursor() as cursor:
        cursor.execute("TRUNCATE v_xml_cdr")
        cursor.executemany(
            f"INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_name, end_stamp, {columns})"
            f" VALUES (gen_random_uuid(), 'alpha.example.com', '2026-02-03 10:00:00+00', {marks})",
            rows,
        )
    for kind in ("json", "ndjson"):
        few, stream = range_and_calls(client, format=kind)
        assert executed(database) == 0  # the stream came last, on the same connection
        assert few == stream
        assert few.count(b'"xml_cdr_uuid"') == len(rows)
    few, stream = range_and_calls(client, fields="missed_call,billsec,xml_cdr_uuid")
    assert few == stream


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
def test_few_calls_are_those_of_the_stream_in_every_zone(database: Database, zone: str) -> None:
    """A statement is prepared in the zone of the session, and run in that of the service."""
    for stamp in ("1970-01-01 00:00+00", "1970-01-01 20:00+00", "1970-01-02 01:00+00", "2026-02-03 09:59:59.5+00"):
        database.insert_call(answer_stamp=stamp, start_stamp=stamp)
    client = database.client(database.account("alpha.example.com"), database.app(CDR_API_TIMEZONE=zone))
    few, stream = range_and_calls(client)
    assert few == stream
    assert [call["answer_stamp"] is None for call in json.loads(few)] == [True, True, False, False]


@pytest.mark.parametrize("calls", [0, 1, SHORT_ROWS, SHORT_ROWS + 1])
@pytest.mark.parametrize("limit", [None, 1, SHORT_ROWS - 1, SHORT_ROWS, SHORT_ROWS + 1])
def test_pages_meet_every_call_once(database: Database, client: Client, calls: int, limit: int | None) -> None:
    uuids = [database.insert_call() for _ in range(calls)]
    database.insert_call(end_stamp="2026-02-04 00:00:00+00")
    parameters = {"domain_name": "alpha.example.com", **DAY} | ({"limit": str(limit)} if limit else {})
    found: list[str] = []
    pages = 0
    while True:
        pages += 1
        response = client.get("/api/call_range", **parameters)
        page = json.loads(response.data)
        found += [call["xml_cdr_uuid"] for call in page]
        if "Link" not in response.headers:
            break
        assert len(page) == limit
        following = response.headers["Link"].removeprefix("<").removesuffix('>; rel="next"')
        parameters = dict(parse_qsl(urlsplit(following).query))
    assert found == sorted(uuids)
    assert pages == max(1, -(-calls // (limit or 100)))


def test_the_statement_is_prepared_once_on_a_connection(database: Database, client: Client) -> None:
    database.insert_call()
    for day in ("2026-02-03", "2026-02-04", "2026-02-05"):
        client.call_range(day, day)
    assert executed(database) == prepared(client) == 1


@pytest.mark.parametrize("parameters", [{"format": "csv"}, {"by": "start"}])
def test_other_answers_are_streamed(database: Database, client: Client, parameters: dict[str, str]) -> None:
    client.get("/api/call_range", domain_name="alpha.example.com", **DAY, **parameters)
    assert executed(database) == 0


def test_without_the_index_answers_are_streamed(make_database: DatabaseMaker) -> None:
    database = make_database()
    uuid = database.insert_call()
    client = database.client(database.account("alpha.example.com"))
    assert [call["xml_cdr_uuid"] for call in client.call_range("2026-02-03", "2026-02-03")] == [uuid]
    assert executed(database) == 0
    with client.app.extensions["cdr_api"].calls.connection() as connection:
        assert not connection.indexed


def test_calls_of_many_bytes_are_streamed(database: Database, client: Client) -> None:
    database.insert_call(xml="x" * SHORT_BYTES)
    assert len(client.call_range("2026-02-03", "2026-02-03")) == 1
    assert executed(database) == 0


def test_filters_and_domains_are_values_of_one_statement(database: Database) -> None:
    client = database.client(database.account("alpha.example.com", "beta.example.com"))
    for domain, cause in itertools.product(("alpha.example.com", "beta.example.com"), ("NORMAL_CLEARING", "USER_BUSY")):
        database.insert_call(domain_name=domain, hangup_cause=cause)
    for domain, cause in itertools.product(("alpha.example.com", "beta.example.com"), ("NORMAL_CLEARING", "USER_BUSY")):
        (call,) = client.call_range(
            "2026-02-03", "2026-02-03", domain_name=domain, hangup_cause=cause, min_billsec=int(cause == "USER_BUSY")
        )
        assert (call["domain_name"], call["hangup_cause"]) == (domain, cause)
    assert executed(database) == prepared(client) == 1


def test_a_connection_keeps_only_so_many_statements(database: Database, client: Client) -> None:
    uuid = database.insert_call()
    read_in_many_orders(client, uuid)
    assert executed(database) == 1
    assert prepared(client) == MOST_PREPARED - 2  # and one for the token, one for the tables


def read_in_many_orders(client: Client, uuid: str) -> None:
    """The one call of the day, by more statements than a connection may have prepared."""
    for fields in itertools.permutations(["xml_cdr_uuid", "leg", "billsec", "xml"]):
        (call,) = client.call_range("2026-02-03", "2026-02-03", fields=",".join(fields))
        assert list(call) == list(fields)
        assert call["xml_cdr_uuid"] == uuid


def test_a_download_that_is_given_up_leaves_nothing_amiss(database: Database, client: Client) -> None:
    """Its connection was cancelled and rolled back, and is asked again and again."""
    uuid = database.insert_call()
    for _ in range(30):
        database.insert_call(end_stamp="2026-02-05 10:00:00+00", xml="x" * 200_000)
    for _ in range(3):
        client.call_range("2026-02-03", "2026-02-03")
        response = client.get("/api/calls", domain_name="alpha.example.com", fields="xml")
        next(response.iter_encoded())
        response.close()
        read_in_many_orders(client, uuid)
        assert prepared(client) == MOST_PREPARED - 2
        assert client.get("/api/domains").status_code == 200


def test_a_database_of_calls_of_its_own(database: Database) -> None:
    client = database.client(
        database.account("alpha.example.com"), database.app(CDR_API_CALLS_DSN=database.dsn, CDR_API_THREADS="1")
    )
    uuid = database.insert_call()
    for _ in range(3):
        assert client.get("/api/call_feed", **{"from": "2026-02-03"}).status_code == 200
        read_in_many_orders(client, uuid)
    assert prepared(client) == MOST_PREPARED - 1


def test_statements_that_fail_leave_nothing_on_the_server(database: Database, client: Client) -> None:
    """The use of a token is noted by each request for as long as that fails."""
    database.execute("REVOKE UPDATE ON cdr_api.tokens FROM cdr_api")
    for _ in range(5):
        assert client.get("/api/domains").status_code == 200
    assert prepared(client) == 0


def test_only_a_named_domain_needs_the_table_of_domains(database: Database, client: Client) -> None:
    database.execute("REVOKE SELECT ON v_domains FROM cdr_api")
    assert database.client("cdr_wrong", client.app).post("/api/logout").status_code == 401
    assert client.get("/api/call_range", domain_name="alpha.example.com", **DAY).status_code == 503
    assert client.post("/api/logout").status_code == 200


CHANGES = [
    "ALTER TABLE v_xml_cdr DROP COLUMN sip_call_id",
    "ALTER TABLE v_xml_cdr ADD COLUMN sip_call_id text DEFAULT 'a'",
    "ALTER TABLE v_xml_cdr ALTER COLUMN billsec TYPE bigint",
    "ALTER TABLE v_xml_cdr ALTER COLUMN mduration TYPE double precision",
    "ALTER TABLE v_xml_cdr ALTER COLUMN hangup_cause TYPE varchar(40)",
    "ALTER TABLE v_xml_cdr ALTER COLUMN leg TYPE char(1)",
    "ALTER TABLE v_xml_cdr ALTER COLUMN domain_name TYPE varchar(200)",
    "ALTER TABLE v_xml_cdr ALTER COLUMN end_stamp TYPE timestamp USING end_stamp AT TIME ZONE 'UTC'",
    "DROP INDEX cdr_api_calls",
    "ALTER TABLE v_domains ALTER COLUMN domain_name TYPE varchar(200)",
    (
        "ALTER TABLE v_xml_cdr RENAME TO v_xml_cdr_old; CREATE TABLE v_xml_cdr (LIKE v_xml_cdr_old);"
        " GRANT SELECT ON v_xml_cdr TO cdr_api; INSERT INTO v_xml_cdr SELECT * FROM v_xml_cdr_old"
    ),
]


def test_a_change_of_the_tables_is_seen_at_once(database: Database, client: Client) -> None:
    database.insert_call(billsec="12.5", sip_call_id="b", leg="a", hangup_cause="NORMAL_CLEARING")
    few, stream = range_and_calls(client)
    assert few == stream
    for change in CHANGES:
        database.execute(change)
        few, stream = range_and_calls(client)
        assert few == stream, change
        assert few.count(b'"xml_cdr_uuid"') == 1
        assert client.get("/api/domains").status_code == client.get("/api/call_totals", **DAY).status_code == 200


TABLES = ["v_xml_cdr", "v_domains", "cdr_api.tokens", "cdr_api.accounts", "cdr_api.grants"]


@pytest.mark.parametrize("table", TABLES)
def test_a_table_that_was_being_rewritten_does_not_look_empty(database: Database, client: Client, table: str) -> None:
    """As it does to every snapshot from before the end of ALTER TABLE; that of EXECUTE may be."""
    uuid = database.insert_call()
    waiting = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
    for number in range(2):
        assert len(client.call_range("2026-02-03", "2026-02-03")) == 1
        with ThreadPoolExecutor() as pool:
            with database.connect() as connection, connection.transaction():
                connection.execute(f"ALTER TABLE {table} ADD new_{number} timestamptz DEFAULT clock_timestamp()")
                future = pool.submit(client.call_range, "2026-02-03", "2026-02-03")
                wait_for(lambda: database.execute(waiting, [database.name]))
            assert [call["xml_cdr_uuid"] for call in future.result()] == [uuid]


@pytest.mark.parametrize("table", ["v_domains", "cdr_api.grants"])
def test_nor_does_one_of_domains_where_transactions_are_isolated(database: Database, table: str) -> None:
    """At those levels the snapshot of every statement is older than its locks."""
    uuid = database.insert_call()
    database.execute(f"ALTER DATABASE \"{database.name}\" SET default_transaction_isolation = 'repeatable read'")
    client = database.client(database.account("alpha.example.com"))
    (total,) = get_while_rewritten(database, table, client, "/api/call_totals", **DAY)
    assert total["calls"] == 1
    since = {"from": "2026-02-03"}
    (call,) = get_while_rewritten(database, table, client, "/api/call_feed", fields="xml_cdr_uuid", **since)
    assert call == {"xml_cdr_uuid": uuid}


class Recorder:
    """Keeps what the metrics would count."""

    def __init__(self) -> None:
        self.fallbacks: list[tuple[str, str]] = []

    def request(self, facts: Any) -> None:
        pass

    def fallback(self, statement: str, reason: str) -> None:
        self.fallbacks.append((statement, reason))


def test_an_answer_that_cannot_be_prepared_is_logged_once_and_counted(
    database: Database, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """It is right, and costs twice for ever: somebody should know."""
    database.insert_call()
    recorder = Recorder()
    client.app.extensions["cdr_api"].request_log.observers.append(recorder)
    database.execute(SLOW_NUMBER)
    database.execute("ALTER TABLE v_xml_cdr ALTER waitsec TYPE slow USING '1'")
    for _ in range(2):
        database.insert_call()
        assert client.call_range("2026-02-03", "2026-02-03")
    told = [record for record in caplog.records if "cannot be run prepared" in record.message]
    assert len(told) == 1
    assert "(57014)" in told[0].message  # it took too long
    assert recorder.fallbacks == [("select_calls", "57014")] * 2


# A type that is a number 0.2 s after it is asked.
SLOW_NUMBER = """
    CREATE TYPE slow;
    CREATE FUNCTION slow_in(cstring) RETURNS slow LANGUAGE internal IMMUTABLE STRICT AS 'int4in';
    CREATE FUNCTION slow_out(slow) RETURNS cstring LANGUAGE internal IMMUTABLE STRICT AS 'int4out';
    CREATE TYPE slow (INPUT = slow_in, OUTPUT = slow_out, LIKE = int4, CATEGORY = 'N');
    CREATE FUNCTION slow_number(slow) RETURNS numeric LANGUAGE sql AS 'SELECT length(pg_sleep(0.2)::text)::numeric';
    CREATE CAST (slow AS numeric) WITH FUNCTION slow_number(slow) AS IMPLICIT;
"""


def test_what_takes_long_is_left_to_the_stream(database: Database, client: Client) -> None:
    """Each row that is looked at takes 0.2 s: eight of them more than the second that few may take.

    psycopg takes back all that is prepared on the connection when it rolls back.
    """
    uuids = [database.insert_call() for _ in range(8)]
    database.execute(SLOW_NUMBER)
    database.execute("ALTER TABLE v_xml_cdr ALTER pdd_ms TYPE slow USING '1'")
    for _ in range(2):
        assert [call["xml_cdr_uuid"] for call in client.call_range("2026-02-03", "2026-02-03")] == uuids
        assert executed(database) == 0
    database.execute("ALTER TABLE v_xml_cdr ALTER pdd_ms TYPE numeric USING 1")
    client.call_range("2026-02-03", "2026-02-03")
    assert executed(database) == 1


@pytest.fixture
def gunicorn(database: Database) -> Iterator[Gunicorn]:
    with serve(database.dsn) as running:
        yield running


def test_the_log_tells_the_rows(database: Database, gunicorn: Gunicorn) -> None:
    uuids = [database.insert_call() for _ in range(3)]
    path = "/api/call_range?domain_name=alpha.example.com&from=2026-02-03&to=2026-02-03"
    answer = ask(gunicorn, database.account("alpha.example.com"), ("GET", path, ""))
    assert len(json.loads(answer.text)) == len(uuids)
    assert executed(database) == 1
    wait_for(lambda: "route=/api/call_range status=200 rows=3 " in gunicorn.log.read_text())
