"""gunicorn's workers killed, stopped and reloaded, and clients that go away: nobody else notices."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import demo
from tests.clients import Download, calls_url, fetch
from tests.conftest import ROOT, UNTIL, Database, DatabaseMaker, Gunicorn, need, serve, wait_for
from tests.servers import active_copies, slow

CALLS = 5000


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    """Some 30 MB of calls of alpha.example.com."""
    database = make_database(index=True)
    with database.connect() as connection:
        demo.add_calls(connection, CALLS, domains=["alpha.example.com"], until=UNTIL, xml_bytes=4000)
    return database


@pytest.fixture(scope="module")
def token(database: Database) -> str:
    return database.account("alpha.example.com")


def is_whole(stream: Download) -> bool:
    status, body = stream.finish()
    return status == 0 and len(json.loads(body)) == CALLS


def attempt(url: str, token: str, seconds: float = 60) -> str:
    """What became of a request: its status or its error."""
    try:
        return str(fetch(url, token, seconds=seconds).status_code)
    except (OSError, HTTPException) as error:
        return repr(error)


# One worker -------------------------------------------------------------------


@contextmanager
def paused(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def other_worker(gunicorn: Gunicorn, pid: int) -> int:
    """A worker that is not this one, waited for."""
    found: list[int] = wait_for(lambda: [other for other in gunicorn.worker_pids() if other != pid])
    return found[0]


def test_a_killed_worker_breaks_its_own_streams_and_no_others(database: Database, token: str) -> None:
    with serve(database.dsn, CDR_API_WORKERS="2") as gunicorn:
        first = other_worker(gunicorn, 0)
        second = other_worker(gunicorn, first)
        with paused(second):
            broken = Download(calls_url(gunicorn), token)
        with paused(first):
            whole = Download(calls_url(gunicorn), token)
        with broken, whole:
            wait_for(lambda: len(active_copies(database)) == 2)
            os.kill(first, signal.SIGKILL)
            assert broken.finish()[0] == 18
            wait_for(lambda: len(active_copies(database)) == 1)
            assert is_whole(whole)
        other_worker(gunicorn, second)


def test_a_killed_worker_leaves_no_statement_running(database: Database, token: str) -> None:
    """One that has no row to send yet, and so does not notice by a write that nobody reads."""
    path = "/api/calls?domain_name=alpha.example.com&hangup_cause=NOTHING"
    running = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND wait_event = 'PgSleep'"
    with slow(database.execute, 0.02), serve(database.dsn) as gunicorn, ThreadPoolExecutor() as pool:
        future = pool.submit(attempt, gunicorn.url + path, token)
        wait_for(lambda: database.execute(running, [database.name]))
        os.kill(gunicorn.worker_pids()[0], signal.SIGKILL)
        wait_for(lambda: not active_copies(database), 20)
        assert future.result() != "200"


# All of gunicorn --------------------------------------------------------------


def test_sigterm_lets_a_stream_end_and_nobody_in(database: Database, token: str, tmp_path: Path) -> None:
    """nginx, which comes by a unix socket, is refused; of TCP the kernel takes connections that nobody serves."""
    path = tmp_path / "socket"
    with serve(database.dsn, "--bind", f"unix:{path}") as gunicorn, Download(calls_url(gunicorn), token) as stream:
        gunicorn.process.terminate()
        wait_for(lambda: not path.exists())
        wait_for(lambda: not attempt(f"{gunicorn.url}/api/health", token, seconds=2).isdigit())
        assert is_whole(stream)
        assert gunicorn.process.wait(60) == 0


@contextmanager
def load(gunicorn: Gunicorn, token: str) -> Iterator[Counter[str]]:
    """Clients that ask all the time, with a connection for each request; counts what became of these."""
    outcomes: Counter[str] = Counter()
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            outcomes[attempt(calls_url(gunicorn, limit=5), token)] += 1

    with ThreadPoolExecutor() as pool:
        clients = [pool.submit(ask) for _ in range(4)]
        try:
            yield outcomes
        finally:
            over.set()
    for client in clients:
        client.result()


def reload_all(gunicorn: Gunicorn) -> None:
    gone = set(gunicorn.worker_pids())
    gunicorn.process.send_signal(signal.SIGHUP)
    wait_for(lambda: not gone & set(gunicorn.worker_pids()))


def stop_one(gunicorn: Gunicorn) -> None:
    pid = gunicorn.worker_pids()[0]

    def is_gone() -> bool:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)  # once more: a worker that has just been made may not have heard it
        return pid not in gunicorn.worker_pids()

    wait_for(is_gone)


@pytest.mark.parametrize("replace", [reload_all, stop_one])
def test_no_request_fails_while_workers_are_replaced(
    database: Database, token: str, replace: Callable[[Gunicorn], None]
) -> None:
    need("curl")
    with serve(database.dsn, CDR_API_WORKERS="2") as gunicorn, load(gunicorn, token) as outcomes:
        for _ in range(5):
            wait_for(lambda: len(gunicorn.worker_pids()) == 2)
            enough = outcomes.total() + 50
            replace(gunicorn)
            wait_for(lambda: outcomes.total() > enough)  # noqa: B023
    assert set(outcomes) == {"200"}, outcomes


@pytest.mark.direct("PgBouncer's sessions keep the zone that they began with")
def test_all_workers_answer_in_the_zone_of_the_start(make_database: DatabaseMaker) -> None:
    """Also a worker that is made after the database's zone was changed; a reload takes the new zone."""
    database = make_database()
    database.insert_call()
    token, zone = database.account("alpha.example.com"), "ALTER DATABASE %s SET timezone = '%s'"
    database.execute(zone % (database.name, "Asia/Tokyo"))

    def offsets(gunicorn: Gunicorn) -> set[str]:
        stamps = (fetch(calls_url(gunicorn, fields="end_stamp"), token).get_json() for _ in range(20))
        return {found[0]["end_stamp"][-6:] for found in stamps}

    with serve(database.dsn, CDR_API_WORKERS="2") as gunicorn:
        assert offsets(gunicorn) == {"+09:00"}
        database.execute(zone % (database.name, "America/Lima"))
        stop_one(gunicorn)
        wait_for(lambda: len(gunicorn.worker_pids()) == 2)
        assert offsets(gunicorn) == {"+09:00"}
        reload_all(gunicorn)
        wait_for(lambda: len(gunicorn.worker_pids()) == 2)
        assert offsets(gunicorn) == {"-05:00"}


# Clients that go away ---------------------------------------------------------


def go_away(gunicorn: Gunicorn, token: str, times: int) -> None:
    """Takes the first hundredth of a large answer, so many times."""
    parts = urlsplit(calls_url(gunicorn))
    while times:
        with closing(HTTPConnection(parts.netloc, timeout=60)) as connection:
            connection.request("GET", f"{parts.path}?{parts.query}", headers={"Authorization": f"Bearer {token}"})
            response = connection.getresponse()
            if response.status == 200:  # not 503 because those before are still being cleared up
                response.read(300_000)
                times -= 1


def count_resources(database: Database, gunicorn: Gunicorn) -> tuple[set[int], int, int]:
    """The idle sessions, file descriptors and threads of the only worker."""
    query = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND usename = 'cdr_api' AND state = 'idle'"
    sessions = {row[0] for row in database.execute(query, [database.name])}
    folder = Path(f"/proc/{gunicorn.worker_pids()[0]}")
    return sessions, len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir()))


def use_everything(database: Database, gunicorn: Gunicorn, threads: int) -> None:
    """Has more requests in a worker than it has threads, as many as it can with a connection to PostgreSQL."""
    with ThreadPoolExecutor(3 * threads) as pool, database.connect() as connection, connection.transaction():
        connection.execute("LOCK TABLE v_xml_cdr IN ACCESS EXCLUSIVE MODE")
        for _ in range(3 * threads):
            pool.submit(attempt, f"{gunicorn.url}/api/health", "")
        waiting = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
        wait_for(lambda: len(database.execute(waiting, [database.name])) == threads)


def test_a_thousand_clients_that_go_away_leave_nothing_behind(database: Database) -> None:
    tokens = [database.account("alpha.example.com") for _ in range(4)]
    with serve(database.dsn, CDR_API_THREADS="8") as gunicorn, ThreadPoolExecutor() as pool:
        use_everything(database, gunicorn, 8)
        list(pool.map(lambda token: go_away(gunicorn, token, 10), tokens))
        wait_for(lambda: len(count_resources(database, gunicorn)[0]) == 8)
        sessions, files, threads = count_resources(database, gunicorn)
        list(pool.map(lambda token: go_away(gunicorn, token, 250), tokens))

        # gunicorn.conf.py's, which start as they are needed, and those of the main program and the pool.
        most = max(threads, 4 * 8 + 4 + 5)

        def nothing_is_left() -> bool:
            found = count_resources(database, gunicorn)
            return found[0] == sessions and found[1] <= files and found[2] <= most

        # The very sessions that were there before: none was given up, none made again.
        wait_for(nothing_is_left)


CHANGES = [
    ("cdr_api.py", '{"status": "ok"}', '{"status": "new"}'),
    ("cdr/parsing.py", "is not a parameter of this route", "is new in parsing"),
    ("cdr/errors.py", '"success": False', '"success": "new in errors"'),
]


def test_a_reload_takes_new_code_of_every_file(database: Database, tmp_path: Path) -> None:
    """The engine's files too, of which gunicorn's own process has loaded some."""
    for pattern in ("*.py", "*.sql", "openapi.json", "cdr", "pages"):
        for source in ROOT.glob(pattern):
            (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / source.name)
    with serve(database.dsn, folder=str(tmp_path)) as gunicorn:

        def answers() -> str:
            paths = ("/api/health", "/api/health?nonsense=1")
            return "".join(fetch(gunicorn.url + path).text for path in paths)

        assert "new" not in answers()
        for name, old, new in CHANGES:
            text = (tmp_path / name).read_text("utf-8")
            assert text.count(old) == 1
            (tmp_path / name).write_text(text.replace(old, new), "utf-8")
        gunicorn.process.send_signal(signal.SIGHUP)
        wait_for(lambda: all(part in answers() for part in ('"new"', "is new in parsing", "new in errors")))
