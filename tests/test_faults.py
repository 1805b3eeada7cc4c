"""PostgreSQL away, killed, paused, busy, full or read-only: every error comes in the open, and none needs a restart."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import psycopg
import pytest

import demo
from tests.clients import Answer, Request, ask, downloads
from tests.commands import check
from tests.conftest import PASSWORD, UNTIL, Database, Gunicorn, problem, serve, wait_for
from tests.servers import Node, has_replayed, is_stuck, own_node, slow, standby_of

FORMATS = ("json", "ndjson", "csv")
EMAIL = "billing@example.com"
NEVER = "2min"  # a time-out of the pool that no answer here waits for
AT_ONCE = 20.0  # in seconds, on a machine that does other things, too: much less than that

pytestmark = pytest.mark.direct("stops and kills servers of its own")


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    """A server of its own with 25 MB of calls and more; whoever waits for a lock there waits long."""
    with own_node("fsync = off") as found:
        with found.connect() as connection:
            demo.add_calls(connection, 5000, domains=["alpha.example.com"], until=UNTIL, xml_bytes=5000)
            connection.execute(demo.INDEX)
            connection.execute(f"ALTER ROLE cdr_api IN DATABASE {found.name} SET lock_timeout = '5min'")
        yield found


@pytest.fixture(scope="module")
def database(node: Node) -> Database:
    return Database(node.server, node.name)


@pytest.fixture(scope="module")
def token(database: Database) -> str:
    return database.account(*demo.DOMAINS, email=EMAIL)


@pytest.fixture(scope="module")
def gunicorn(node: Node) -> Iterator[Gunicorn]:
    """One worker, whose requests would wait for a connection for long."""
    with serve(node.dsn("cdr_api"), CDR_API_POOL_TIMEOUT=NEVER, CDR_API_LOG="off") as running:
        yield running


RANGE = "from=2026-11-01&to=2026-11-02"
UUID = "00000000-0000-4000-8000-000000000000"
CALLS = ("GET", "/api/calls?domain_name=alpha.example.com&limit=3", "")
NOTHING = ("GET", "/api/calls?domain_name=alpha.example.com&hangup_cause=NOTHING", "")  # a look at every call
DAY = ("GET", f"/api/call_range?domain_name=alpha.example.com&{RANGE}&fields=billsec", "")
HEALTH = ("GET", "/api/health", "")
DOMAINS = ("GET", "/api/domains", "")
LOGIN = ("POST", "/api/login", f"email={EMAIL}&password={PASSWORD}")
LOGOUT = ("POST", "/api/logout", "")
REGISTER = ("POST", "/api/register", f"name=New&email=new@a.b&password={PASSWORD}&password_confirmation={PASSWORD}")
READING = [
    CALLS,
    DOMAINS,
    DAY,
    ("GET", "/api/call_feed?from=2026-11-01&limit=3", ""),
    ("GET", f"/api/call_totals?{RANGE}", ""),
    ("POST", "/api/call_lookup", json.dumps({"xml_cdr_uuid": [UUID]})),
    ("GET", "/api/concurrent_calls_by_domain?date=2026-11-01", ""),
    ("GET", "/api/active_calls_by_domain?date=2026-11-01", ""),
]
WITHOUT_DATABASE = [
    (("GET", "/api/nowhere", ""), 404),
    (("POST", "/api/calls", ""), 405),
    (("GET", "/api/calls", ""), 401),
    (("GET", "/api/health?pretty=1", ""), 422),
    (("POST", "/api/login", "{"), 422),
    (("POST", "/api/register", "password=short"), 422),
]


def ask_all(gunicorn: Gunicorn, token: str, requests: Collection[Request]) -> list[Answer]:
    """All at the same time."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: ask(gunicorn, token, request), requests))


def works(gunicorn: Gunicorn, token: str) -> bool:
    return {answer.status_code for answer in ask_all(gunicorn, token, [CALLS, HEALTH])} == {200}


def check_unavailable(answer: Answer) -> None:
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["Retry-After"]) > 0
    problem(answer)


def check_what_needs_no_database(gunicorn: Gunicorn) -> None:
    for request, status in WITHOUT_DATABASE:
        answer = ask(gunicorn, None, request, AT_ONCE)
        assert answer.status_code == status, answer.text
        problem(answer)


# Restarted and away -----------------------------------------------------------


def fill_pool(node: Node, gunicorn: Gunicorn, token: str, connections: int, name: str = "cdr_api") -> None:
    """Leaves so many connections at least in the pool of the only worker, which calls itself by a name there."""
    with downloads(gunicorn, token, *["json"] * connections):
        pass
    wait_for(lambda: len(node.sessions(f"state = 'idle' AND application_name = '{name}'")) >= connections)


def test_every_pooled_connection_survives_a_restart_of_postgresql(node: Node, gunicorn: Gunicorn, token: str) -> None:
    fill_pool(node, gunicorn, token, 4)
    node.stop()
    node.start()
    assert [answer.status_code for answer in ask_all(gunicorn, token, READING)] == [200] * len(READING)


@contextmanager
def away(node: Node) -> Iterator[None]:
    node.stop()
    try:
        yield
    finally:
        node.start()


def test_while_postgresql_is_away_whoever_needs_it_gets_503_at_once(node: Node, gunicorn: Gunicorn, token: str) -> None:
    assert works(gunicorn, token)
    with away(node):
        for request in [*READING, HEALTH, LOGIN, REGISTER, LOGOUT]:
            check_unavailable(ask(gunicorn, token, request, AT_ONCE))
    wait_for(lambda: works(gunicorn, token))


def test_while_postgresql_is_away_whatever_needs_no_database_is_answered(node: Node, gunicorn: Gunicorn) -> None:
    with away(node):
        check_what_needs_no_database(gunicorn)


# Killed -----------------------------------------------------------------------


def kill_postmaster(node: Node) -> Callable[[], None]:
    node.kill()
    return node.recover


def kill_backend(node: Node) -> Callable[[], None]:
    """PostgreSQL then ends all other sessions, too, and recovers by itself."""
    os.kill(node.sessions("state = 'active'")[0], signal.SIGKILL)
    return lambda: None


Kill = Callable[[Node], Callable[[], None]]  # gives what must be done to have PostgreSQL back
KILLS = [pytest.param(kill_postmaster, id="the postmaster"), pytest.param(kill_backend, id="a backend")]


@contextmanager
def locked(node: Node) -> Iterator[None]:
    """Whoever reads calls waits meanwhile."""
    connection = node.connect()
    try:
        connection.execute("BEGIN; LOCK TABLE v_xml_cdr IN ACCESS EXCLUSIVE MODE")
        yield
    finally:
        connection.close()  # which is no error after a crash


def recover_and_check_log(
    gunicorn: Gunicorn, token: str, recover: Callable[[], None], before: int, complaints: int
) -> None:
    """Behind so many bytes of the log every line is a message, and so many of them are the service's own."""
    lines = gunicorn.log.read_bytes()[before:].decode().splitlines()
    recover()
    wait_for(lambda: works(gunicorn, token))
    assert all(line.startswith("[") for line in lines), lines
    assert len([line for line in lines if "[ERROR] cdr_api: " in line]) == complaints, lines


@pytest.mark.parametrize("kill", KILLS)
def test_postgresql_killed_before_the_first_byte_is_503(node: Node, gunicorn: Gunicorn, token: str, kill: Kill) -> None:
    before = gunicorn.log.stat().st_size
    with ThreadPoolExecutor() as pool, locked(node):
        future = pool.submit(ask, gunicorn, token, CALLS)
        wait_for(lambda: node.sessions("wait_event_type = 'Lock'"))
        recover = kill(node)
        answer = future.result()
    recover_and_check_log(gunicorn, token, recover, before, complaints=1)
    check_unavailable(answer)


@pytest.mark.parametrize("kill", KILLS)
def test_postgresql_killed_in_mid_stream_is_a_visibly_broken_answer(
    node: Node, gunicorn: Gunicorn, token: str, kill: Kill
) -> None:
    before = gunicorn.log.stat().st_size
    with downloads(gunicorn, token, *FORMATS) as streams:
        wait_for(lambda: len(node.sessions("wait_event = 'ClientWrite'")) == len(FORMATS))
        recover = kill(node)
        answers = [stream.finish() for stream in streams]
    recover_and_check_log(gunicorn, token, recover, before, complaints=len(FORMATS))
    assert [status for status, _ in answers] == [18] * len(FORMATS)


# Paused, busy and out of time -------------------------------------------------


def test_a_postgresql_that_hangs_is_503_and_then_all_is_well(node: Node, token: str) -> None:
    """On pooled connections, where a statement hangs, and on new ones."""
    with serve(node.dsn("cdr_api") + "&application_name=paused", CDR_API_THREADS="8") as gunicorn:
        fill_pool(node, gunicorn, token, 3, "paused")
        with node.paused():
            for answer in ask_all(gunicorn, token, [*READING[:5], HEALTH, LOGIN, LOGOUT]):
                check_unavailable(answer)
        wait_for(lambda: works(gunicorn, token))
        wait_for(lambda: len(node.sessions("application_name = 'paused'")) <= 8)


def test_an_empty_pool_is_503_in_time_and_keeps_nobody_else_waiting(node: Node, token: str) -> None:
    settings = {"CDR_API_THREADS": "2", "CDR_API_POOL_TIMEOUT": "1s"}
    with serve(node.dsn("cdr_api"), **settings) as gunicorn, ThreadPoolExecutor() as pool:
        with locked(node):
            holders = [pool.submit(ask, gunicorn, token, DAY) for _ in range(2)]
            wait_for(lambda: len(node.sessions("wait_event_type = 'Lock'")) == 2)
            check_unavailable(ask(gunicorn, token, DOMAINS, AT_ONCE))
            check_what_needs_no_database(gunicorn)
        assert [holder.result().status_code for holder in holders] == [200, 200]


def test_one_connection_is_enough_for_every_route(node: Node, token: str) -> None:
    """No request waits for a second one while it holds the first: all would wait for each other."""
    with serve(node.dsn("cdr_api"), CDR_API_THREADS="1", CDR_API_POOL_TIMEOUT="2s") as gunicorn:
        assert [ask(gunicorn, token, request).status_code for request in READING] == [200] * len(READING)


def test_a_statement_out_of_time_is_504(node: Node, token: str) -> None:
    with slow(node.execute), serve(node.dsn("cdr_api"), CDR_API_STATEMENT_TIMEOUT="500ms") as gunicorn:
        answer = ask(gunicorn, token, NOTHING)
        assert ask(gunicorn, token, HEALTH).status_code == 200
    assert answer.status_code == 504
    problem(answer)


def test_a_statement_out_of_time_in_mid_stream_is_a_visibly_broken_answer(node: Node, token: str) -> None:
    """The time goes by while the client does not read; then it reads on."""
    overdue = "state <> 'idle' AND query_start < clock_timestamp() - interval '2 s'"
    with (
        serve(node.dsn("cdr_api"), CDR_API_STATEMENT_TIMEOUT="2s") as gunicorn,
        downloads(gunicorn, token, *FORMATS) as streams,
    ):
        wait_for(lambda: len(node.sessions(overdue)) == len(FORMATS))
        assert [stream.finish()[0] for stream in streams] == [18] * len(FORMATS)


# A standby --------------------------------------------------------------------


@pytest.fixture(scope="module")
def standby(node: Node) -> Iterator[Node]:
    """It lets no reader hold replay back."""
    with standby_of(node) as found:
        found.execute("ALTER SYSTEM SET max_standby_streaming_delay = 0")
        found.execute("SELECT pg_reload_conf()")
        yield found


@pytest.fixture
def replicated(node: Node, standby: Node) -> Iterator[Gunicorn]:
    """Reads calls from the standby, or from the primary when the standby is away."""
    with serve(node.dsn("cdr_api"), CDR_API_CALLS_DSN=standby.dsn("cdr_api", node)) as running:
        yield running


def test_when_the_standby_stops_calls_come_from_the_next_host(
    node: Node, standby: Node, replicated: Gunicorn, token: str
) -> None:
    fill_pool(standby, replicated, token, 3)
    before = [answer.text for answer in ask_all(replicated, token, READING[:3])]
    with away(standby):
        answers = ask_all(replicated, token, READING)
    assert [answer.status_code for answer in answers] == [200] * len(READING)
    assert [answer.text for answer in answers[:3]] == before


def test_check_tells_how_far_a_standby_is_behind(database: Database, node: Node, standby: Node) -> None:
    def line() -> str:
        return check(database.app(CDR_API_CALLS_DSN=standby.dsn("cdr_api")))[1]["standby"]

    node.execute("CREATE TABLE IF NOT EXISTS replayed AS SELECT 1")  # a standby that replayed nothing cannot tell
    wait_for(lambda: has_replayed(standby, last_written(node)))
    # What the server writes for itself can be on its way at any time.
    wait_for(lambda: line() == "✓ standby            a standby, 0 s behind")
    standby.execute("SELECT pg_wal_replay_pause()")
    try:
        node.execute("CREATE TABLE IF NOT EXISTS written AS SELECT 1")
        wait_for(lambda: re.search(r"a standby, [1-9]\d* s behind", line()))
    finally:
        standby.execute("SELECT pg_wal_replay_resume()")


def last_written(node: Node) -> str:
    return str(node.value("SELECT pg_current_wal_lsn()"))


def vacuum(node: Node) -> None:
    node.execute("DELETE FROM v_xml_cdr WHERE domain_name = 'beta.example.com'")
    node.execute("VACUUM v_xml_cdr")


def alter(node: Node) -> None:
    node.execute("ALTER TABLE v_xml_cdr ADD IF NOT EXISTS later text")


CONFLICTS = pytest.mark.parametrize("conflict", [vacuum, alter])


@CONFLICTS
def test_a_recovery_conflict_before_the_first_byte_is_503(
    database: Database, node: Node, standby: Node, replicated: Gunicorn, token: str, conflict: Callable[[Node], None]
) -> None:
    database.insert_call(domain_name="beta.example.com")
    with slow(node.execute), ThreadPoolExecutor() as pool:
        wait_for(lambda: has_replayed(standby, node.value("SELECT pg_current_wal_lsn()")))
        future = pool.submit(ask, replicated, token, NOTHING)
        wait_for(lambda: standby.sessions("wait_event = 'PgSleep'"))
        conflict(node)
        check_unavailable(future.result())
    wait_for(lambda: has_replayed(standby, last_written(node)))  # the end of slow() conflicts as well
    assert works(replicated, token)


@CONFLICTS
def test_a_recovery_conflict_in_mid_stream_is_a_visibly_broken_answer(
    database: Database, node: Node, standby: Node, replicated: Gunicorn, token: str, conflict: Callable[[Node], None]
) -> None:
    database.insert_call(domain_name="beta.example.com")
    wait_for(lambda: has_replayed(standby, node.value("SELECT pg_current_wal_lsn()")))
    with downloads(replicated, token, *FORMATS) as streams:
        wait_for(lambda: len(standby.sessions("wait_event = 'ClientWrite'")) == len(FORMATS))
        conflict(node)
        # Cancelled already, or as soon as it is read on.
        wait_for(lambda: not standby.sessions("state = 'active'") or is_stuck(standby))
        assert [stream.finish()[0] for stream in streams] == [18] * len(FORMATS)
    wait_for(lambda: has_replayed(standby, last_written(node)))  # until then any statement may conflict
    assert works(replicated, token)


# Side tables that cannot be written -------------------------------------------


def test_with_read_only_side_tables_reading_goes_on_and_the_rest_is_503(
    database: Database, node: Node, gunicorn: Gunicorn, token: str
) -> None:
    assert works(gunicorn, token)  # and has written the key that signs cursors
    counts = "SELECT (SELECT count(*) FROM cdr_api.accounts), (SELECT count(*) FROM cdr_api.tokens)"
    before = database.execute(counts)
    setting = f"ALTER ROLE cdr_api IN DATABASE {node.name}"
    node.execute(f"{setting} SET default_transaction_read_only = on")
    try:
        with serve(node.dsn("cdr_api")) as reader:
            for request in (LOGIN, REGISTER, LOGOUT):
                check_unavailable(ask(reader, token, request))
            answers = ask_all(reader, token, READING)
    finally:
        node.execute(f"{setting} RESET default_transaction_read_only")
    assert [answer.status_code for answer in answers] == [200] * len(READING)
    assert database.execute(counts) == before


def move_side_tables(node: Node, tablespace: str) -> None:
    with node.connect() as connection:
        query = "SELECT relkind, oid::regclass::text FROM pg_class WHERE relnamespace = 'cdr_api'::regnamespace"
        for kind, name in connection.execute(f"{query} AND relkind IN ('r', 'i')").fetchall():
            connection.execute(f"ALTER {'TABLE' if kind == 'r' else 'INDEX'} {name} SET TABLESPACE {tablespace}")


@pytest.fixture
def small_disk(node: Node) -> Iterator[None]:
    """The side tables lie on half a megabyte."""
    folder = node.data.parent / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a small disk takes the right to mount it")
    try:
        shutil.chown(folder, node.server.system_user or os.getuid())
        node.execute(f"CREATE TABLESPACE small LOCATION '{folder}'")
        move_side_tables(node, "small")
        yield
        move_side_tables(node, "pg_default")
        node.execute("DROP TABLESPACE small")
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_disk(database: Database) -> None:
    """With tokens, until there is no room for a single one."""
    insert = "INSERT INTO cdr_api.tokens (account_id, digest, expires_at)"
    select = "SELECT account_id, sha256(gen_random_uuid()::text::bytea), 'infinity' FROM cdr_api.accounts"
    for count in (1000, 100, 10, 1):
        with suppress(psycopg.errors.DiskFull):
            while True:
                database.execute(f"{insert} {select} CROSS JOIN generate_series(1, %s) LIMIT %s", [count, count])


def test_with_a_full_disk_reading_goes_on_and_login_is_503(
    database: Database, small_disk: None, gunicorn: Gunicorn, token: str
) -> None:
    assert works(gunicorn, token)  # and has written the key that signs cursors
    fill_disk(database)
    try:
        check_unavailable(ask(gunicorn, token, LOGIN))
        answers = ask_all(gunicorn, token, READING)
    finally:
        database.execute("DELETE FROM cdr_api.tokens WHERE expires_at = 'infinity'")
    assert [answer.status_code for answer in answers] == [200] * len(READING)
