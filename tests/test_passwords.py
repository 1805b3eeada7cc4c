"""Passwords cost memory and time: few are computed at once, few wait, and none while a connection is held."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask import Flask
from werkzeug.security import check_password_hash, generate_password_hash
from werkzeug.test import TestResponse

from cdr.passwords import AT_ONCE
from tests.conftest import PASSWORD, Client, Database, DatabaseMaker, problem, serve, wait_for
from tests.servers import peak_memory

WAITING = 2  # of eight threads a quarter


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    return make_database(calls=30)


@pytest.fixture
def app(database: Database) -> Flask:
    database.execute("TRUNCATE cdr_api.attempts")
    return database.app(CDR_API_THREADS=str(4 * WAITING))


class Scrypt:
    """In the place of scrypt: each computation, counted, ends when it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lock = threading.Lock()
        self.let_go = threading.Event()
        self.running = self.most = self.all = 0
        monkeypatch.setattr("cdr.passwords.WAIT_SECONDS", 60)
        monkeypatch.setattr("cdr.passwords.check_password_hash", self.hold(check_password_hash))
        monkeypatch.setattr("cdr.passwords.generate_password_hash", self.hold(generate_password_hash))

    def hold(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def held(*values: str) -> Any:
            with self.lock:
                self.running, self.all = self.running + 1, self.all + 1
                self.most = max(self.most, self.running)
            try:
                assert self.let_go.wait(60)
                return compute(*values)
            finally:
                with self.lock:
                    self.running -= 1

        return held


@pytest.fixture
def scrypt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scrypt]:
    found = Scrypt(monkeypatch)
    yield found
    found.let_go.set()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(20) as found:
        yield found


def log_in(app: Flask, email: str, password: str = PASSWORD, address: str = "192.0.2.1") -> TestResponse:
    environ = {"REMOTE_ADDR": address}
    return Client(app).post("/api/login", json={"email": email, "password": password}, environ_base=environ)


def register(app: Flask, email: str) -> TestResponse:
    body = {"name": "Ann", "email": email, "password": PASSWORD, "password_confirmation": PASSWORD}
    return Client(app).post("/api/register", json=body)


def is_taken(places: threading.Semaphore, left: int) -> bool:
    return places._value == left  # noqa: SLF001 (it tells it nowhere else)


def fill(app: Flask, scrypt: Scrypt, pool: ThreadPoolExecutor) -> list[Future[TestResponse]]:
    """Logins until nobody may wait any more, each of an account and an address of its own."""
    passwords = app.extensions["cdr_api"].passwords
    logins = []
    for i in range(AT_ONCE + WAITING):
        logins.append(pool.submit(log_in, app, f"nobody{i}@example.com", address=f"198.51.100.{i}"))
        wait_for(functools.partial(is_taken, passwords.places, AT_ONCE + WAITING - 1 - i))
    wait_for(lambda: scrypt.running == AT_ONCE)
    return logins


def assert_busy(response: TestResponse) -> None:
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) > 0
    assert "passwords" in problem(response)["message"]


def test_two_are_computed_at_once_a_few_wait_and_the_others_are_503_at_once(
    database: Database, app: Flask, scrypt: Scrypt, pool: ThreadPoolExecutor
) -> None:
    token = database.account("alpha.example.com", email="right@example.com")
    logins = fill(app, scrypt, pool)
    for response in (log_in(app, "right@example.com"), register(app, "new@example.com")):
        assert_busy(response)  # though nobody has been let go
    assert Client(app, token).calls()  # short reads go on
    assert scrypt.all == AT_ONCE
    scrypt.let_go.set()
    assert [login.result().status_code for login in logins] == [401] * len(logins)
    assert scrypt.most == AT_ONCE
    assert log_in(app, "right@example.com").status_code == 200
    assert register(app, "new@example.com").status_code == 201


def test_who_has_waited_too_long_is_503(
    app: Flask, scrypt: Scrypt, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdr.passwords.WAIT_SECONDS", 0.01)
    held = [pool.submit(log_in, app, f"nobody{i}@example.com", address=f"198.51.100.{i}") for i in range(AT_ONCE)]
    wait_for(lambda: scrypt.running == AT_ONCE)
    assert_busy(log_in(app, "waiting@example.com"))
    assert_busy(register(app, "waiting@example.com"))
    scrypt.let_go.set()
    assert [login.result().status_code for login in held] == [401] * AT_ONCE


FREE = 10  # attempts before the first delay


def test_a_login_that_nobody_looked_at_does_not_count(
    database: Database, app: Flask, scrypt: Scrypt, pool: ThreadPoolExecutor
) -> None:
    """And gives nobody one more guess: as many passwords are compared as without it."""
    database.account(email="guessed@example.com")
    logins = fill(app, scrypt, pool)
    before = database.execute("SELECT count(*), sum(failures) FROM cdr_api.attempts WHERE failures > 0")
    for _ in range(3 * FREE):
        assert_busy(log_in(app, "guessed@example.com", "wrong"))
    assert database.execute("SELECT count(*), sum(failures) FROM cdr_api.attempts WHERE failures > 0") == before
    scrypt.let_go.set()
    for login in logins:
        login.result()
    compared = scrypt.all
    statuses = [log_in(app, "guessed@example.com", "wrong").status_code for _ in range(FREE + 3)]
    assert statuses == [401] * FREE + [429] * 3
    assert scrypt.all == compared + FREE


def test_who_has_to_wait_is_told_so_however_busy_we_are(
    database: Database, app: Flask, scrypt: Scrypt, pool: ThreadPoolExecutor
) -> None:
    """The delay stays: a login that finds the line full takes nothing of it away."""
    scrypt.let_go.set()
    for _ in range(FREE):
        log_in(app, "guessed@example.com", "wrong")
    database.execute("UPDATE cdr_api.attempts SET next_at = clock_timestamp() + interval '40 s'")
    scrypt.let_go.clear()
    logins = fill(app, scrypt, pool)
    assert log_in(app, "guessed@example.com", "wrong").status_code == 429
    scrypt.let_go.set()
    assert [login.result().status_code for login in logins] == [401] * len(logins)
    assert log_in(app, "guessed@example.com", "wrong").status_code == 429


def test_no_connection_is_held_while_a_password_is_computed(
    database: Database, app: Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def watched(compute: Callable[..., Any]) -> Callable[..., Any]:
        def computed(*values: str) -> Any:
            stats = app.extensions["cdr_api"].accounts.pool.get_stats()
            held.append(stats["pool_size"] - stats["pool_available"])
            return compute(*values)

        return computed

    monkeypatch.setattr("cdr.passwords.check_password_hash", watched(check_password_hash))
    monkeypatch.setattr("cdr.passwords.generate_password_hash", watched(generate_password_hash))
    assert register(app, "held@example.com").status_code == 201
    assert log_in(app, "held@example.com").status_code == 200
    assert log_in(app, "held@example.com", "wrong").status_code == 401
    assert held == [0, 0, 0]


def guess(url: str, address: str) -> int:
    """The status of one wrong login, on a connection of its own."""
    parts = urlsplit(url)
    connection = HTTPConnection(str(parts.hostname), parts.port)
    body = f"email={address}@example.com&password=wrong"
    headers = {"Content-Type": "application/x-www-form-urlencoded", "X-Forwarded-For": address}
    connection.request("POST", "/api/login", body, headers)
    status = connection.getresponse().status
    connection.close()
    return status


def test_many_logins_at_once_cost_a_worker_little_memory(database: Database) -> None:
    """Of twelve addresses, ten of each: all within what is free."""
    database.execute("TRUNCATE cdr_api.attempts")
    with serve(database.dsn, CDR_API_THREADS="40", CDR_API_PROXIES="1") as gunicorn:
        (pid,) = wait_for(gunicorn.worker_pids)
        assert guess(gunicorn.url, "192.0.2.99") == 401
        before = peak_memory(pid)
        addresses = [f"192.0.2.{i % 12}" for i in range(120)]
        with ThreadPoolExecutor(len(addresses)) as pool:
            statuses = Counter(pool.map(lambda address: guess(gunicorn.url, address), addresses))
        grown = peak_memory(pid) - before
    assert statuses.total() == 120
    assert set(statuses) == {401, 503}
    assert grown < 150 << 20
