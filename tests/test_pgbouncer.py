"""The service through PgBouncer in transaction mode, with fewer connections to PostgreSQL than clients."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlencode

import psycopg
import pytest
from werkzeug.datastructures import Headers

import demo
from tests.clients import Download, calls_url, fetch, get_while_rewritten
from tests.conftest import (
    PASSWORD,
    PGBOUNCER,
    Client,
    Database,
    DatabaseMaker,
    Gunicorn,
    PgBouncer,
    problem,
    run_pgbouncer,
    serve,
    wait_for,
)
from tests.servers import active_copies

pytestmark = pytest.mark.skipif(not PGBOUNCER, reason="needs the program pgbouncer")
own = pytest.mark.direct("runs a PgBouncer of its own")

CONNECTIONS = 2
CLIENTS = 8
BIG = "gamma.example.com"
EVER = {"from": "2020-01-01", "to": "2030-01-01"}


@pytest.fixture(scope="module")
def bouncer(server: demo.PostgresServer) -> Iterator[PgBouncer]:
    with run_pgbouncer(server, pool_size=CONNECTIONS, patience=30) as running:
        yield running


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker, bouncer: PgBouncer) -> Database:
    """6,000 calls of alpha.example.com, 3,000 of beta.example.com, and 1,000 of gamma.example.com in 30 MB."""
    database = make_database(calls=10_000, index=True)
    database.execute("UPDATE v_xml_cdr SET xml = repeat('0123456789', 3000) WHERE domain_name = %s", [BIG])
    database.pgbouncer = bouncer
    return database


@pytest.fixture(scope="module")
def gunicorn(database: Database) -> Iterator[Gunicorn]:
    with serve(database.dsn, CDR_API_THREADS="16") as running:
        yield running


def test_the_option_puts_pgbouncer_between(make_database: DatabaseMaker, request: pytest.FixtureRequest) -> None:
    """Only PgBouncer tells its clients another process id than PostgreSQL's own."""
    with psycopg.connect(make_database().dsn) as connection:
        row = connection.execute("SELECT pg_backend_pid()").fetchone()
        between = row != (connection.info.backend_pid,)
    assert between == request.config.getoption("pgbouncer")


def test_nothing_is_prepared_through_pgbouncer(make_database: DatabaseMaker, request: pytest.FixtureRequest) -> None:
    app = make_database(index=True).app()
    with app.extensions["cdr_api"].calls.connection() as connection:
        assert (connection.prepared is None) == request.config.getoption("pgbouncer")


# Many clients -----------------------------------------------------------------


class Caller:
    """A billing system with an account of its own for one domain."""

    def __init__(self, gunicorn: Gunicorn, email: str, domain: str) -> None:
        self.url = gunicorn.url
        self.domain = domain
        self.token = wait_for(lambda: self.log_in(email))

    def log_in(self, email: str) -> str:
        """A token, or "" where many logins at once are told to wait."""
        body = urlencode({"email": email, "password": PASSWORD})
        response = fetch(f"{self.url}/api/login", method="POST", body=body)
        assert response.status_code in (200, 429, 503), response.text
        return str(response.get_json().get("token", ""))

    def read(self, path: str, **parameters: str) -> tuple[list[str], Headers]:
        """The uuids of an answer that must be 200, and its headers."""
        return self.follow(f"{self.url}{path}?" + urlencode({"domain_name": self.domain} | parameters))

    def follow(self, url: str) -> tuple[list[str], Headers]:
        response = fetch(url, self.token, seconds=120)
        assert response.status_code == 200, response.text
        return [call["xml_cdr_uuid"] for call in json.loads(response.data)], response.headers

    def pages(self) -> list[str]:
        found, headers = self.read("/api/calls", limit="700", fields="xml_cdr_uuid")
        while "Link" in headers:
            page, headers = self.follow(headers["Link"][1:].partition(">")[0])
            found += page
        return found

    def feed(self) -> list[str]:
        found, headers = self.read("/api/call_feed", fields="xml_cdr_uuid", **{"from": EVER["from"]})
        return found + self.read("/api/call_feed", cursor=headers["X-Next-Cursor"])[0]

    def everything(self) -> dict[str, list[str]]:
        return {
            "stream": self.read("/api/calls")[0],
            "range": self.read("/api/call_range", **EVER)[0],
            "pages": self.pages(),
            "feed": sorted(self.feed()),
        }


def backends(database: Database) -> list[tuple[int, str]]:
    """The process id and the state of each connection that PgBouncer has for the service."""
    query = "SELECT pid, state FROM pg_stat_activity WHERE datname = %s AND usename = 'cdr_api'"
    return database.execute(query, [database.name])


@own
def test_many_clients_on_few_connections_get_their_own_calls(database: Database, gunicorn: Gunicorn) -> None:
    domains = [demo.DOMAINS[i % 3] for i in range(CLIENTS)]
    for i, domain in enumerate(domains):
        database.account(domain, email=f"client{i}@example.com")
    query = "SELECT xml_cdr_uuid::text FROM v_xml_cdr WHERE domain_name = %s ORDER BY end_stamp, xml_cdr_uuid"
    stored = {domain: [row[0] for row in database.execute(query, [domain])] for domain in demo.DOMAINS}

    def work(i: int) -> dict[str, list[str]]:
        return Caller(gunicorn, f"client{i}@example.com", domains[i]).everything()

    with ThreadPoolExecutor(CLIENTS) as pool:
        for domain, found in zip(domains, pool.map(work, range(CLIENTS)), strict=True):
            expected = stored[domain]
            assert found == dict.fromkeys(("stream", "range", "pages"), expected) | {"feed": sorted(expected)}
    assert [state for _, state in backends(database)] == ["idle"] * CONNECTIONS
    assert "prepared statement" not in gunicorn.log.read_text("utf-8")
    assert "ERROR" not in gunicorn.log.read_text("utf-8")


@own
@pytest.mark.parametrize(
    "path",
    [
        "/api/health",
        "/api/domains",
        "/api/calls?domain_name=alpha.example.com",
        "/api/calls?domain_name=alpha.example.com&limit=3",
        "/api/call_feed?from=2020-01-01&fields=billsec",
        "/api/call_totals?from=2020-01-01&to=2030-01-01",
        "/api/concurrent_calls_by_domain?date=2026-10-01",
    ],
)
def test_a_request_never_waits_for_a_second_connection(database: Database, path: str) -> None:
    """On few connections requests that hold one and wait for another would wait for each other."""
    app = database.app(CDR_API_THREADS="1", CDR_API_POOL_TIMEOUT="500ms")
    response = database.client(database.account("alpha.example.com"), app).send("GET", path)
    assert response.status_code == 200, response.text
    response.close()


# Settings ---------------------------------------------------------------------


def read_whole(client: Client) -> None:
    assert len(client.calls()) > 5000


def read_page(client: Client) -> None:
    assert len(client.calls(limit=5)) == 5


def go_away(client: Client) -> None:
    response = client.get("/api/calls", domain_name="alpha.example.com")
    next(iter(response.response))
    response.close()


def read_totals_of_a_zone(client: Client) -> None:
    assert client.get("/api/call_totals", tz="America/Caracas", **EVER).status_code == 200


def fail(client: Client) -> None:
    response = client.get("/api/call_totals", **EVER)
    assert response.status_code == 504
    problem(response)


def log_in(client: Client) -> None:
    assert client.post("/api/login", json={"email": "a@b.c", "password": "wrong"}).status_code == 401


def connect(dsn: str) -> psycopg.Connection[Any]:
    return psycopg.connect(dsn, application_name="next client")


def read_settings(connection: psycopg.Connection[Any]) -> set[tuple[str, str]]:
    return set(connection.execute("SELECT name, setting FROM pg_settings").fetchall())


@own
@pytest.mark.parametrize(
    ("act", "timeout"),
    [
        (read_whole, "77s"),
        (read_page, "77s"),
        (go_away, "77s"),
        (read_totals_of_a_zone, "77s"),
        (fail, "1ms"),
        (log_in, "77s"),
    ],
)
def test_the_next_client_meets_no_setting_of_ours(
    database: Database, bouncer: PgBouncer, act: Callable[[Client], None], timeout: str
) -> None:
    app = database.app(CDR_API_TIMEZONE="Asia/Kolkata", CDR_API_STATEMENT_TIMEOUT=timeout)
    act(database.client(database.account("alpha.example.com"), app))
    with connect(demo.service_dsn(database.server, database.name)) as direct:
        usual = read_settings(direct)
    # Two transactions at once take all connections of the pool, so also the one that the service had.
    with connect(bouncer.dsn(database.name)) as one, connect(bouncer.dsn(database.name)) as two:
        assert [read_settings(one) - usual, read_settings(two) - usual] == [set(), set()]
        pids = [connection.execute("SELECT pg_backend_pid()").fetchall()[0][0] for connection in (one, two)]
    assert sorted(pids) == sorted(pid for pid, _ in backends(database))


# Failures ---------------------------------------------------------------------


@own
def test_pgbouncer_may_be_killed_and_started_again(database: Database, bouncer: PgBouncer, gunicorn: Gunicorn) -> None:
    token = database.account("alpha.example.com")
    workers = gunicorn.worker_pids()
    paths = ("/api/health", "/api/domains", "/api/calls?domain_name=alpha.example.com&limit=3")

    def answers() -> list[int]:
        return [fetch(gunicorn.url + path, token).status_code for path in paths]

    assert answers() == [200, 200, 200]
    bouncer.kill()
    for path in paths:
        response = fetch(gunicorn.url + path, token)
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) > 0
        problem(response)
    bouncer.start()
    wait_for(lambda: answers() == [200, 200, 200])
    assert gunicorn.worker_pids() == workers


@own
@pytest.mark.parametrize("kind", ["json", "ndjson", "csv"])
@pytest.mark.parametrize("victim", ["connection to the server", "PgBouncer"])
def test_a_stream_that_loses_its_connection_is_visibly_broken(
    database: Database, bouncer: PgBouncer, gunicorn: Gunicorn, victim: str, kind: str
) -> None:
    token = database.account(BIG)
    with Download(calls_url(gunicorn, domain_name=BIG, format=kind), token) as download:
        (pid,) = wait_for(lambda: active_copies(database))
        if victim == "PgBouncer":
            bouncer.kill()
            bouncer.start()
        else:
            assert database.execute("SELECT pg_terminate_backend(%s)", [pid]) == [(True,)]
        status, body = download.finish()
    assert status == 18  # curl: partial file
    assert body.count(b"\n") < 1000  # calls
    wait_for(lambda: fetch(f"{gunicorn.url}/api/health").status_code == 200)


@own
def test_domains_that_are_rewritten_do_not_look_gone_where_transactions_are_isolated(
    make_database: DatabaseMaker, bouncer: PgBouncer
) -> None:
    """There the session cannot be set to anything."""
    database = make_database(index=True)
    database.insert_call()
    database.execute(f"ALTER DATABASE \"{database.name}\" SET default_transaction_isolation = 'repeatable read'")
    database.pgbouncer = bouncer
    beside = database.client(database.account("alpha.example.com"))
    apart = database.client(beside.token, database.app(CDR_API_ACCOUNTS_DSN=database.dsn))
    for client, table in ((beside, "v_domains"), (beside, "cdr_api.grants"), (apart, "cdr_api.grants")):
        (total,) = get_while_rewritten(database, table, client, "/api/call_totals", **EVER)
        assert total["calls"] == 1
