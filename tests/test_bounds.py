"""What one client can take of a worker: connections, threads and statements have a bound, whatever the route."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import pytest

from tests.clients import Request, ask, fetch, reach
from tests.conftest import Database, DatabaseMaker, Gunicorn, serve, wait_for
from tests.servers import slow

ALPHA, BETA = "alpha.example.com", "beta.example.com"
UUID = "00000000-0000-4000-8000-00000000b0b0"
SHORT: Request = ("GET", f"/api/call_range?domain_name={ALPHA}&from=2026-02-03&to=2026-02-03", "")
LONG: dict[str, Request] = {  # of beta, whose every call takes PostgreSQL a minute
    "calls": ("GET", f"/api/calls?domain_name={BETA}", ""),
    "a page": ("GET", f"/api/calls?domain_name={BETA}&limit=1", ""),
    "range": ("GET", f"/api/call_range?domain_name={BETA}&from=2026-02-03&to=2026-02-03&by=start", ""),
    "totals": ("GET", f"/api/call_totals?domain_name={BETA}&from=2026-02-01&to=2026-02-28", ""),
    "peaks": ("GET", f"/api/concurrent_calls_by_domain?domain_name={BETA}&date=2026-02-03", ""),
    "activity": ("GET", f"/api/active_calls_by_domain?domain_name={BETA}&date=2026-02-03", ""),
    "lookup": ("POST", "/api/call_lookup", f'{{"xml_cdr_uuid": ["{UUID}"]}}'),
}
pytestmark = pytest.mark.direct("what sleeps is seen by PostgreSQL alone")


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Iterator[Database]:
    database = make_database(index=True)
    database.insert_call()
    start = "2026-02-03 09:59:00+00"
    database.insert_call(domain_name=BETA, xml_cdr_uuid=UUID, start_stamp=start, end_stamp="2026-02-03 10:00:00+00")
    # Whoever asks for other domains does not meet it, in whatever order conditions are looked at.
    with slow(database.execute, 60, f"domain_name = '{BETA}' AND current_query() LIKE '%{BETA}%'"):
        yield database


@pytest.fixture
def gunicorn(database: Database) -> Iterator[Gunicorn]:
    with serve(database.dsn, CDR_API_THREADS="4", CDR_API_CLIENT_TIMEOUT="1s") as gunicorn:
        yield gunicorn


def waiting(database: Database, event: str) -> int:
    """How many of the service's sessions wait for something, by PostgreSQL's name of it."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND usename = 'cdr_api' AND wait_event = %s"
    return int(database.execute(query, [database.name, event])[0][0])


def send(gunicorn: Gunicorn, token: str, request: Request) -> socket.socket:
    """A client that has asked; it reads nothing yet."""
    method, path, body = request
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n"
    client = reach(gunicorn)
    client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return client


@pytest.mark.parametrize("route", LONG)
def test_slow_statements_leave_connections_for_short_answers(
    database: Database, gunicorn: Gunicorn, route: str
) -> None:
    """Of four connections two are kept, before a first byte as after it; what finds no place is told so."""
    theirs, ours = database.account(ALPHA, BETA), database.account(ALPHA)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(send(gunicorn, theirs, LONG[route])) for _ in range(4)]
        wait_for(lambda: waiting(database, "PgSleep"))
        # An account has one connection until its answer has become a long one, so others never wait.
        assert ask(gunicorn, ours, SHORT).status_code == 200
        assert waiting(database, "PgSleep") == 1
        wait_for(lambda: sum(map(is_readable, clients)) == 2)
        assert waiting(database, "PgSleep") == 2
        assert ask(gunicorn, ours, SHORT).status_code == 200
        for client in filter(is_readable, clients):
            answer = client.recv(4096)
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"Retry-After: " in answer
            assert b"Too many long answers" in answer
    wait_for(lambda: not waiting(database, "PgSleep"))  # the clients have gone
    assert ask(gunicorn, ours, SHORT).status_code == 200


def test_an_account_waits_for_itself_and_not_for_ever(database: Database) -> None:
    """Its requests run one after the other; who waits too long is told so, and nobody else waits."""
    theirs, ours = database.account(ALPHA, BETA), database.account(ALPHA)
    settings = {"CDR_API_THREADS": "4", "CDR_API_POOL_TIMEOUT": "1500ms"}
    with serve(database.dsn, **settings) as gunicorn, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(send(gunicorn, theirs, LONG["totals"])) for _ in range(8)]
        wait_for(lambda: waiting(database, "PgSleep"))
        assert ask(gunicorn, ours, SHORT).status_code == 200
        wait_for(lambda: sum(map(is_readable, clients)) == 6)  # two have become long answers
        statuses = {client.recv(4096).split(b" ")[1] for client in clients if is_readable(client)}
        assert b"429" in statuses
        assert statuses <= {b"429", b"503"}
        assert ask(gunicorn, ours, SHORT).status_code == 200
    wait_for(lambda: not waiting(database, "PgSleep"))


def is_readable(client: socket.socket) -> bool:
    client.settimeout(0)
    try:
        return bool(client.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


@pytest.mark.parametrize("route", LONG)
def test_what_nobody_waits_for_is_cancelled(database: Database, gunicorn: Gunicorn, route: str) -> None:
    """Long before its minute is over; its connection is used again."""
    token = database.account(ALPHA, BETA)
    with send(gunicorn, token, LONG[route]):
        wait_for(lambda: waiting(database, "PgSleep"))
    wait_for(lambda: not waiting(database, "PgSleep"), seconds=20)
    wait_for(lambda: "status=499" in gunicorn.log.read_text("utf-8"))
    assert ask(gunicorn, token, SHORT).status_code == 200
    assert "Traceback" not in gunicorn.log.read_text("utf-8")


def test_an_account_without_a_domain_reads_no_call(make_database: DatabaseMaker) -> None:
    """Here each call would take a minute."""
    database = make_database()
    database.insert_call(xml_cdr_uuid=UUID)
    client = database.client(database.account(), database.app(CDR_API_STATEMENT_TIMEOUT="10s"))
    day = {"from": "2026-02-03", "to": "2026-02-03"}
    with slow(database.execute, 60):
        assert [row["calls"] for row in client.get("/api/call_totals", **day).get_json()] == [0]
        assert client.get("/api/call_totals", group_by="day", **day).get_json() == []
        for kind in ("concurrent", "active"):
            assert client.get(f"/api/{kind}_calls_by_domain", **day).get_json() == []
        assert client.post("/api/call_lookup", json={"xml_cdr_uuid": [UUID]}).get_json()["not_found"] == [UUID]
    assert client.get("/api/call_feed", **{"from": "2026-01-01"}).get_json() == []


def test_a_feed_that_nobody_waits_for_is_cancelled(make_database: DatabaseMaker) -> None:
    """It refuses views, and waits for a lock here."""
    database = make_database()
    token = database.account(ALPHA)
    with serve(database.dsn) as gunicorn, database.connect() as connection, connection.transaction():
        connection.execute("LOCK TABLE v_xml_cdr")
        with send(gunicorn, token, ("GET", f"/api/call_feed?domain_name={ALPHA}&from=2026-01-01", "")):
            wait_for(lambda: waiting(database, "relation"))
        wait_for(lambda: not waiting(database, "relation"), seconds=5)  # PostgreSQL's own time-out is an hour


def test_a_stream_that_nobody_waits_for_is_cancelled_between_two_rows(make_database: DatabaseMaker) -> None:
    """The third of three large calls takes a minute: it has no end, and is read when the others have been sent."""
    database = make_database()
    for end in ("2026-01-01 00:00:00+00", "2026-01-01 01:00:00+00", None):
        database.insert_call(end_stamp=end, xml="x" * 400_000)
    database.execute("ALTER TABLE v_xml_cdr RENAME TO calls")
    database.execute(
        "CREATE FUNCTION nap(stamp timestamptz, xml text) RETURNS text IMMUTABLE COST 1000000 LANGUAGE plpgsql AS"
        " $$BEGIN IF stamp IS NULL THEN PERFORM pg_sleep(60); END IF; RETURN xml; END$$"
    )
    listed = database.execute("SELECT attname FROM pg_attribute WHERE attnum > 0 AND attrelid = 'calls'::regclass")
    columns = ", ".join("nap(end_stamp, xml) AS xml" if name == "xml" else name for (name,) in listed)
    database.execute(f"CREATE VIEW v_xml_cdr AS SELECT {columns} FROM calls")
    database.execute("GRANT SELECT ON v_xml_cdr TO cdr_api")
    token = database.account(ALPHA)
    with serve(database.dsn) as gunicorn:
        with send(gunicorn, token, ("GET", f"/api/calls?domain_name={ALPHA}&fields=xml", "")) as client:
            assert client.recv(100).startswith(b"HTTP/1.1 200 ")
            wait_for(lambda: waiting(database, "PgSleep"))
        wait_for(lambda: not waiting(database, "PgSleep"), seconds=20)
        wait_for(lambda: "broken=True" in gunicorn.log.read_text("utf-8"))
        assert "Traceback" not in gunicorn.log.read_text("utf-8")


def dribble(gunicorn: Gunicorn, begin: bytes) -> bytes:
    """The answer to a client that sends a byte now and then, as long as it is listened to."""
    with reach(gunicorn) as client:
        client.sendall(begin)
        client.settimeout(0.3)
        while True:
            try:
                return client.recv(4096)
            except TimeoutError:
                client.sendall(b"x")
            except ConnectionError:
                return b""


def test_a_request_that_dribbles_in_is_given_up_in_time(gunicorn: Gunicorn) -> None:
    """The whole of it has a second here; that each byte comes in time is not enough."""
    head = b"POST /api/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    begins = [head, b"GET /api/health HTTP/1.1\r\nHost: x\r\nX-Long: "] * 6
    with ThreadPoolExecutor(len(begins)) as pool:
        answers = list(pool.map(lambda begin: dribble(gunicorn, begin), begins))
    assert [answer.split(b" ")[1:2] for answer in answers] == [[b"400"], []] * 6
    assert fetch(f"{gunicorn.url}/api/health").status_code == 200
    assert "Traceback" not in gunicorn.log.read_text("utf-8")


def test_a_connection_that_asks_nothing_holds_no_thread(gunicorn: Gunicorn) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(reach(gunicorn))
        assert fetch(f"{gunicorn.url}/api/health", seconds=10).status_code == 200


def test_each_request_of_a_connection_has_its_own_time(gunicorn: Gunicorn) -> None:
    """A connection that is kept open is not cut for its age."""
    address = gunicorn.url.removeprefix("http://")
    with contextlib.closing(HTTPConnection(address, timeout=60)) as connection:
        connection.connect()
        connection.auto_open = 0  # the same connection, or an error
        connection.request("POST", "/api/call_lookup", "{}")  # refused before its body is read
        response = connection.getresponse()
        assert (response.status, b"bearer token" in response.read()) == (401, True)
        for _ in range(3):
            dribble(gunicorn, b"GET ")  # for as long as a request may take to arrive
            connection.request("GET", "/api/health")
            response = connection.getresponse()
            assert (response.status, response.read()) == (200, b'{"status":"ok"}\n')
