"""FusionPBX upgraded under the running service, which is asked all the time: no restart, no 500, the same calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

import demo
from tests.clients import Request, ask
from tests.conftest import Database, DatabaseMaker, Gunicorn, serve, wait_for

OLD = "4.4.1"
DOMAIN = "domain_name=alpha.example.com"
RANGE = "from=2026-11-01&to=2026-11-18"
REQUESTS: list[Request] = [
    ("GET", "/api/domains", ""),
    ("GET", "/api/extensions", ""),
    ("GET", f"/api/calls?{DOMAIN}", ""),
    ("GET", f"/api/calls?{DOMAIN}&format=csv&limit=100&by=start", ""),
    ("GET", f"/api/call_range?{DOMAIN}&{RANGE}", ""),
    ("GET", f"/api/call_totals?{RANGE}&group_by=domain_name", ""),
    ("GET", f"/api/concurrent_calls_by_domain?{DOMAIN}&date=2026-11-17&resolution=60", ""),
    ("GET", f"/api/active_calls_by_domain?{DOMAIN}&date=2026-11-17&resolution=60", ""),
]


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    made = make_database(OLD, calls=6000)
    made.execute(
        "INSERT INTO v_extensions (extension_uuid, domain_uuid, extension)"
        " SELECT gen_random_uuid(), domain_uuid, '1001' FROM v_domains"
    )
    return made


@pytest.fixture(scope="module")
def token(database: Database) -> str:
    return database.account(*demo.DOMAINS)


@pytest.fixture(scope="module")
def gunicorn(database: Database) -> Iterator[Gunicorn]:
    with serve(database.dsn, CDR_API_TIMEZONE="UTC") as running:
        yield running


READ = {"/api/domains": ["v_domains"], "/api/extensions": ["v_domains", "v_extensions"]}


@contextmanager
def rewriting(database: Database, table: str = "v_xml_cdr") -> Iterator[None]:
    """A table, and until a request waits for it."""
    waiting = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
    with database.connect() as connection, connection.transaction():
        connection.execute(f"ALTER TABLE {table} ADD rewritten timestamptz DEFAULT clock_timestamp()")
        connection.execute(f"ALTER TABLE {table} DROP rewritten")
        yield
        wait_for(lambda: database.execute(waiting, [database.name]))


@pytest.mark.parametrize(
    ("request_", "table"),
    [(request, table) for request in REQUESTS for table in READ.get(request[1], ["v_xml_cdr"])],
    ids=lambda value: value if isinstance(value, str) else value[1][5:40],
)
def test_a_table_that_was_being_rewritten_does_not_look_empty(
    database: Database, gunicorn: Gunicorn, token: str, request_: Request, table: str
) -> None:
    """As it does to every snapshot from before the end of ALTER TABLE."""
    expected = ask(gunicorn, token, request_).text
    assert demo.DOMAINS[0] in expected
    with ThreadPoolExecutor() as pool:
        with rewriting(database, table):
            future = pool.submit(ask, gunicorn, token, request_)
        assert future.result().text == expected


def test_a_feed_that_begins_while_the_table_is_rewritten_delivers_every_call(
    database: Database, gunicorn: Gunicorn, token: str
) -> None:
    """The oldest calls, too, which ended before the days that later polls look back."""
    path = "/api/call_feed?fields=xml_cdr_uuid&"
    with ThreadPoolExecutor() as pool:
        with rewriting(database):
            future = pool.submit(ask, gunicorn, token, ("GET", f"{path}from=2026-01-01", ""))
        answers = [future.result()]
    while len(answers) < 4:
        answers.append(ask(gunicorn, token, ("GET", f"{path}cursor={answers[-1].headers['X-Next-Cursor']}", "")))
    found = {call["xml_cdr_uuid"] for answer in answers for call in answer.get_json()}
    assert found == {str(row[0]) for row in database.execute("SELECT uuid FROM v_xml_cdr")}


# The whole way from an old release to the newest ------------------------------


def steps_of_upgrade() -> list[str]:
    """What FusionPBX's upgrade does to the two tables that are read: key renamed, types converted, columns added."""
    steps = ["ALTER TABLE v_xml_cdr RENAME uuid TO xml_cdr_uuid"]
    for table in ("v_xml_cdr", "v_domains"):
        before = {name: kind for name, kind, *_ in demo.read_release(OLD)[table]} | {"xml_cdr_uuid": "uuid"}
        after = {name: kind for name, kind, *_ in demo.read_release(demo.NEWEST)[table]}
        for name, kind in after.items():
            if name not in before:
                steps.append(f"ALTER TABLE {table} ADD {name} {kind}")
            elif kind != before[name]:
                steps.append(f"ALTER TABLE {table} ALTER {name} TYPE {kind} USING {name}::{kind}")
    return steps


@dataclass(frozen=True)
class Outcome:
    request: Request
    begin: float
    end: float
    status: int
    text: str


@contextmanager
def questions(gunicorn: Gunicorn, token: str) -> Iterator[list[Outcome]]:
    """Asks everything all the time, beside the block; gives what came of it."""
    outcomes: list[Outcome] = []
    over = threading.Event()

    def go_on(request: Request) -> None:
        while not over.is_set():
            begin = time.monotonic()
            answer = ask(gunicorn, token, request)
            outcomes.append(Outcome(request, begin, time.monotonic(), answer.status_code, answer.text))

    with ThreadPoolExecutor() as pool:
        threads = [pool.submit(go_on, request) for request in REQUESTS]
        try:
            yield outcomes
        finally:
            over.set()
    for thread in threads:
        thread.result()


def test_an_upgrade_under_the_service_changes_no_answer(database: Database, gunicorn: Gunicorn, token: str) -> None:
    expected = {request: ask(gunicorn, token, request).text for request in REQUESTS}
    locked: list[tuple[float, float]] = []
    with questions(gunicorn, token) as outcomes, database.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        for step in steps_of_upgrade():
            begin, enough = time.monotonic(), len(outcomes) + len(REQUESTS)
            connection.execute(step)
            locked.append((begin, time.monotonic()))
            wait_for(lambda: len(outcomes) > enough)  # noqa: B023
    columns = "SELECT count(*) FROM information_schema.columns WHERE table_name = 'v_xml_cdr'"
    assert database.execute(columns)[0][0] >= len(demo.read_columns(demo.NEWEST))
    refused = [o for o in outcomes if o.status != 200]
    assert all(any(o.begin < end and o.end > begin for begin, end in locked) for o in refused), refused
    assert {o.status for o in outcomes} <= {200, 503, 504}
    assert not [o for o in outcomes if o.status == 200 and o.text != expected[o.request]]


@pytest.mark.parametrize("page", [{}, {"limit": "5"}], ids=["a list", "a short answer"])
def test_a_connection_that_knows_the_tables_of_before_is_given_up(
    make_database: DatabaseMaker, page: dict[str, str]
) -> None:
    """What has to be locked before it is read is told when a connection is made."""
    database = make_database(index=bool(page))
    database.insert_call()
    client = database.client(database.account("alpha.example.com"))

    def status() -> int:
        return client.get("/api/calls", domain_name="alpha.example.com", **page).status_code

    def first_status() -> int:
        """Of requests until one is 200: more than one connection may have to be given up."""
        first = status()
        wait_for(lambda: status() == 200)
        return first

    assert first_status() == 200
    database.execute("CREATE FOREIGN DATA WRAPPER nowhere; CREATE SERVER elsewhere FOREIGN DATA WRAPPER nowhere")
    database.execute("CREATE TABLE near (); CREATE FOREIGN TABLE far () INHERITS (near) SERVER elsewhere")
    assert first_status() == 503
    database.execute("ALTER TABLE v_xml_cdr RENAME TO plain; CREATE MATERIALIZED VIEW v_xml_cdr AS SELECT * FROM plain")
    database.execute("GRANT SELECT ON v_xml_cdr TO cdr_api")
    assert first_status() == 503
    database.execute("DROP MATERIALIZED VIEW v_xml_cdr; ALTER TABLE plain RENAME TO v_xml_cdr")
    assert first_status() == 503


def test_what_a_function_of_a_view_reads_does_not_look_empty(make_database: DatabaseMaker) -> None:
    """While it is loaded anew, as it does to every snapshot from before."""
    database = make_database(calls=60)
    database.execute("""
        ALTER TABLE v_xml_cdr RENAME TO stored;
        CREATE FUNCTION all_calls() RETURNS SETOF stored LANGUAGE sql STABLE AS 'SELECT * FROM stored';
        CREATE VIEW v_xml_cdr AS SELECT * FROM all_calls();
        GRANT SELECT ON v_xml_cdr, stored TO cdr_api""")
    client = database.client(database.account("alpha.example.com"))
    waiting = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
    expected = client.calls()
    assert expected
    with ThreadPoolExecutor() as pool:
        with database.connect() as connection, connection.transaction():
            connection.execute("CREATE TEMP TABLE kept ON COMMIT DROP AS TABLE stored")
            connection.execute("TRUNCATE stored; INSERT INTO stored SELECT * FROM kept")
            future = pool.submit(client.calls)
            wait_for(lambda: database.execute(waiting, [database.name]))
        assert future.result() == expected
