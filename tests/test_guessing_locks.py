"""Logins at once: whatever rows of the attempts they share, none waits for another that waits for it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from flask import Flask
from werkzeug.security import check_password_hash

from cdr.accounts import digest_token, name_network
from tests.conftest import PASSWORD, Client, Database, DatabaseMaker, wait_for

ADDRESS = "192.0.2.1"
NETWORK = digest_token("address " + name_network(ADDRESS))
LOCK = "SELECT FROM cdr_api.attempts WHERE key = %s FOR UPDATE"


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    return make_database()


@pytest.fixture
def app(database: Database) -> Flask:
    database.execute("TRUNCATE cdr_api.attempts")
    return database.app(CDR_API_THREADS="16")


def log_in(app: Flask, email: str) -> int:
    body = {"email": email, "password": PASSWORD}
    return Client(app).post("/api/login", json=body, environ_base={"REMOTE_ADDR": ADDRESS}).status_code


def key_of(email: str) -> bytes:
    return digest_token("account " + email)


def find_email(fits: Callable[[bytes], bool]) -> str:
    """An e-mail address whose key stands as it should to that of the client's address."""
    names = (f"name{i}@example.com" for i in itertools.count())
    return next(name for name in names if fits(key_of(name)))


def waiting(database: Database, count: int) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
    return database.execute(query, [database.name]) == [(count,)]


ORDERS = {"the account's row first": NETWORK.__gt__, "the address's row first": NETWORK.__lt__}


@pytest.mark.parametrize("order", ORDERS)
def test_two_right_logins_of_an_account_do_not_lock_each_other_out(
    database: Database, app: Flask, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """The first is over its password when the second is counted, and both come to the rows that they share."""
    email = find_email(ORDERS[order])
    database.account(email=email)
    counted, go = threading.Event(), threading.Event()

    def check(*values: str) -> bool:
        counted.set()
        assert go.wait(60)
        return check_password_hash(*values)

    monkeypatch.setattr("cdr.passwords.check_password_hash", check)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(log_in, app, email)
        assert counted.wait(60)
        with database.connect() as holder, holder.transaction():
            holder.execute(LOCK, [key_of(email)])
            go.set()
            wait_for(lambda: waiting(database, 1))
            second = pool.submit(log_in, app, email)
            wait_for(lambda: waiting(database, 2))
        assert [first.result(), second.result()] == [200, 200]


def test_whoever_sweeps_up_keeps_nobody_from_being_counted(database: Database, app: Flask) -> None:
    """One login deletes a row that is old, which another needs that has what the first needs."""
    old, other = (find_email(fits) for fits in (NETWORK.__lt__, NETWORK.__gt__))
    for email in (old, other):
        database.execute("DELETE FROM cdr_api.accounts WHERE email = %s", [email])
        database.account(email=email)
    insert = "INSERT INTO cdr_api.attempts (key, next_at) VALUES (%s, now() - %s * interval '1 minute')"
    with database.connect() as connection:
        connection.cursor().executemany(insert, [(key_of(old), 120), (NETWORK, 1)])
    with ThreadPoolExecutor() as pool:
        with database.connect() as holder, holder.transaction():
            holder.execute(LOCK, [NETWORK])
            with database.connect() as another, another.transaction():
                another.execute(LOCK, [key_of(old)])  # which the first login cannot delete then
                first = pool.submit(log_in, app, old)
                wait_for(lambda: waiting(database, 1))
            second = pool.submit(log_in, app, other)
            wait_for(lambda: waiting(database, 2))
        assert [first.result(), second.result()] == [200, 200]


def test_a_login_and_who_disables_its_account_do_not_lock_each_other_out(database: Database, app: Flask) -> None:
    email = "leaves@example.com"
    database.account(email=email)
    account = f"account_id = (SELECT account_id FROM cdr_api.accounts WHERE email = '{email}')"
    database.execute(f"UPDATE cdr_api.tokens SET expires_at = now() - interval '1 day' WHERE {account}")
    with ThreadPoolExecutor() as pool:
        with database.connect() as operator, operator.transaction():
            operator.execute(f"UPDATE cdr_api.accounts SET disabled_at = now() WHERE {account}")
            login = pool.submit(log_in, app, email)
            wait_for(lambda: waiting(database, 1))
            operator.execute(f"DELETE FROM cdr_api.tokens WHERE {account}")
        assert login.result() == 401
    assert database.execute(f"SELECT FROM cdr_api.tokens WHERE {account}") == []
