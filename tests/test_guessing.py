"""Guessing passwords, and registering: slowed down per account and per address, and told to fail2ban."""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from flask import request

from cdr.accounts import Attempt, name_network
from cdr.errors import ApiError, unavailable
from cdr.requestlog import AuthLog, Entry, RequestLog
from tests.conftest import PASSWORD, Client, Database, DatabaseMaker, problem, serve
from tests.deployment import JAIL

FREE = 10  # attempts before the first delay
PATIENCE = 60  # seconds that the longest delay takes


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    return make_database(calls=30)


@pytest.fixture
def client(database: Database) -> Client:
    database.execute("TRUNCATE cdr_api.attempts")
    return database.client()


def log_in(client: Client, email: str, password: str = "wrong", **options: Any) -> Any:
    return client.post("/api/login", json={"email": email, "password": password}, **options)


def let_time_pass(database: Database, seconds: float) -> None:
    database.execute("UPDATE cdr_api.attempts SET next_at = next_at - %s * interval '1 s'", [seconds])


def from_address(address: str) -> dict[str, Any]:
    return {"environ_base": {"REMOTE_ADDR": address}}


def test_failures_of_an_account_make_it_wait_longer_and_longer(database: Database, client: Client) -> None:
    email = "guessed@example.com"
    token = database.account("alpha.example.com", email=email)
    query = "SELECT max(extract(epoch FROM next_at - %s)) FROM cdr_api.attempts"
    for i, delay in enumerate([*[0] * 9, 1, 2, 4, 8, 16, 32, 60, 60, 60]):
        (begun,) = database.execute("SELECT clock_timestamp()")[0]
        assert log_in(client, email, **from_address(f"192.0.2.{i}")).status_code == 401
        (ended,) = database.execute("SELECT clock_timestamp()")[0]
        (found,) = database.execute(query, [begun])[0]
        assert delay <= found <= delay + (ended - begun).total_seconds()
        let_time_pass(database, PATIENCE)
    assert database.client(token).calls()  # whoever has a token is not held up


def test_who_has_to_wait_is_told_how_long_whatever_the_password(database: Database, client: Client) -> None:
    email = "waiting@example.com"
    database.account(email=email)
    for i in range(FREE + 3):
        log_in(client, email, **from_address(f"198.51.100.{i}"))
        let_time_pass(database, PATIENCE if i < FREE + 2 else 0)
    for password in (PASSWORD, "wrong"):
        response = log_in(client, email, password, **from_address("203.0.113.1"))
        assert response.status_code == 429
        assert int(response.headers["Retry-After"]) in range(1, 9)
        assert "wait" in problem(response)["message"]
    let_time_pass(database, 8)
    assert log_in(client, email, PASSWORD, **from_address("203.0.113.1")).status_code == 200
    assert log_in(client, email, **from_address("203.0.113.1")).status_code == 401  # and begins from nothing


def test_an_address_waits_whichever_accounts_it_tries(database: Database, client: Client) -> None:
    statuses = [log_in(client, f"nobody{i}@example.com").status_code for i in range(FREE + 2)]
    assert statuses == [401] * FREE + [429] * 2
    assert log_in(client, "nobody0@example.com", **from_address("192.0.2.99")).status_code == 401


def test_a_right_login_does_not_wash_an_address_clean(database: Database, client: Client) -> None:
    database.account(email="own@example.com")
    for _ in range(FREE - 1):
        assert log_in(client, "other@example.com").status_code == 401
        let_time_pass(database, PATIENCE)
    for _ in range(3):
        assert log_in(client, "own@example.com", PASSWORD).status_code == 200
    assert log_in(client, "another@example.com").status_code == 401
    assert log_in(client, "own@example.com", PASSWORD).status_code == 429


def test_ten_right_logins_at_once_get_ten_tokens(
    database: Database, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdr.passwords.WAIT_SECONDS", 60)
    database.account(email="parallel@example.com")
    app, statuses = database.app(CDR_API_THREADS="32"), []  # so that all ten may wait for their password

    def work() -> None:
        statuses.append(log_in(Client(app), "parallel@example.com", PASSWORD).status_code)

    threads = [threading.Thread(target=work) for _ in range(FREE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * FREE


def test_an_attempt_that_is_taken_back_takes_no_delay_of_another_with_it(database: Database) -> None:
    database.execute("TRUNCATE cdr_api.attempts")
    service = database.app().extensions["cdr_api"]
    for _ in range(FREE + 1):
        first = Attempt.count(service, ["account a@example.com"], "Too many")
        let_time_pass(database, PATIENCE)
    Attempt.count(service, ["account a@example.com"], "Too many")
    with pytest.raises(ApiError, match="busy"), first.unless_busy(service):
        raise unavailable("busy")
    with pytest.raises(ApiError, match="Too many: wait"):
        Attempt.count(service, ["account a@example.com"], "Too many")


def test_an_unknown_account_waits_like_a_known_one(database: Database, client: Client) -> None:
    database.account(email="known@example.com")
    answers = {}
    for name in ("known", "unknown"):
        database.execute("TRUNCATE cdr_api.attempts")
        answers[name] = [log_in(client, f"{name}@example.com") for _ in range(FREE + 1)]
    for one, other in zip(answers["known"], answers["unknown"], strict=True):
        assert (one.status_code, one.data, one.headers.get("Retry-After")) == (
            other.status_code,
            other.data,
            other.headers.get("Retry-After"),
        )


def test_what_failed_long_ago_is_forgotten(database: Database, client: Client) -> None:
    for _ in range(FREE + 1):
        log_in(client, "forgotten@example.com")
    let_time_pass(database, 3700)
    assert log_in(client, "other@example.com").status_code == 401
    assert database.execute("SELECT count(*), max(failures) FROM cdr_api.attempts") == [(2, 1)]


def test_the_table_of_attempts_holds_nothing_that_was_typed(database: Database, client: Client) -> None:
    log_in(client, "my-password-by-mistake")
    stored = str(database.execute("TABLE cdr_api.attempts"))
    assert "mistake" not in stored
    assert "127.0.0.1" not in stored


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7/32"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_an_ipv6_client_is_its_network(address: str, network: str) -> None:
    assert name_network(address) == network


# Registrations ----------------------------------------------------------------


def register(client: Client, email: str, address: str = "127.0.0.1") -> Any:
    body = {"name": "Ann", "email": email, "password": PASSWORD, "password_confirmation": PASSWORD}
    return client.post("/api/register", json=body, **from_address(address))


def test_registrations_from_a_network_wait_longer_and_longer(database: Database, client: Client) -> None:
    """An IPv6 client is its /64; others, and those who log in, go on."""
    addresses = [f"2001:db8:1:2::{i}" for i in range(FREE + 2)]
    answers = [register(client, f"new{i}@example.com", address) for i, address in enumerate(addresses)]
    assert [answer.status_code for answer in answers] == [201] * FREE + [429] * 2
    assert int(answers[-1].headers["Retry-After"]) == 1
    assert problem(answers[-1])["message"] == "Too many registrations from this address: wait 1 seconds."
    assert database.execute("SELECT 1 FROM cdr_api.accounts WHERE email = 'new10@example.com'") == []
    assert register(client, "neighbour@example.com", "2001:db8:1:3::1").status_code == 201
    assert log_in(client, "new1@example.com", PASSWORD, **from_address(addresses[0])).status_code == 200
    let_time_pass(database, 1)
    assert register(client, "later@example.com", addresses[-1]).status_code == 201
    assert register(client, "much-later@example.com", addresses[-1]).status_code == 429


def test_whoever_may_not_register_yet_learns_nothing_of_an_e_mail_address(database: Database, client: Client) -> None:
    database.account(email="taken@example.com")
    statuses = [register(client, "taken@example.com").status_code for _ in range(FREE + 1)]
    assert statuses == [422] * FREE + [429]


def test_what_cannot_be_registered_anyhow_does_not_count(database: Database, client: Client) -> None:
    assert [register(client, "nobody").status_code for _ in range(2 * FREE)] == [422] * 2 * FREE
    assert database.execute("TABLE cdr_api.attempts") == []


def test_an_office_may_register_while_its_logins_wait(database: Database, client: Client) -> None:
    for i in range(FREE + 1):
        log_in(client, f"nobody{i}@example.com")
    assert log_in(client, "nobody@example.com").status_code == 429
    assert [register(client, f"office{i}@example.com").status_code for i in range(5)] == [201] * 5


def test_registrations_that_have_to_wait_are_no_failed_logins(database: Database, syslog: Syslog) -> None:
    database.execute("TRUNCATE cdr_api.attempts")
    client = Client(database.app(CDR_API_SYSLOG=str(syslog.path)))
    database.account(email="held@example.com")
    assert [register(client, "held@example.com").status_code for _ in range(FREE + 1)][-1] == 429
    assert syslog.lines(0) == []


# Many at once -----------------------------------------------------------------


def guess(url: str, times: int, statuses: Counter[int], **headers: str) -> None:
    """Logs in with a wrong password, again and again, on one connection."""
    parts = urlsplit(url)
    connection = HTTPConnection(str(parts.hostname), parts.port)
    for i in range(times):
        body = f"email=target@example.com&password=guess-{threading.get_ident()}-{i}"
        connection.request("POST", "/api/login", body, {"Content-Type": "application/x-www-form-urlencoded", **headers})
        response = connection.getresponse()
        response.read()
        statuses[response.status] += 1
    connection.close()


def test_of_2000_guesses_at_once_few_are_tried(database: Database) -> None:
    """Over several workers, from one address that claims to be another each time."""
    database.execute("TRUNCATE cdr_api.attempts")
    database.account("alpha.example.com", email="target@example.com")
    found = [Counter[int]() for _ in range(20)]
    with serve(database.dsn, CDR_API_WORKERS="3") as gunicorn:
        begun = time.monotonic()
        threads = [
            threading.Thread(target=guess, args=[gunicorn.url, 100, one], kwargs={"X-Forwarded-For": f"192.0.2.{i}"})
            for i, one in enumerate(found)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - begun
    statuses = sum(found, Counter[int]())
    assert statuses.total() == 2000
    assert {401, 429} <= set(statuses) <= {401, 429, 503}  # and few of them at once
    delays = [2**i for i in range(6)] + [60] * 100  # seconds, after the tenth, the eleventh … failure
    allowed = FREE + next(i for i in range(len(delays)) if sum(delays[: i + 1]) > seconds)
    assert FREE <= statuses[401] <= allowed


class Syslog:
    """A socket like syslog's, and what came in by it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))

    def lines(self, count: int) -> list[str]:
        """So many messages as rsyslog writes them to auth.log; no more have come."""
        messages = [self.socket.recv(4096, socket.MSG_DONTWAIT).decode() for _ in range(count)]
        with pytest.raises(BlockingIOError):
            self.socket.recv(1, socket.MSG_DONTWAIT)
        # 36 is facility 4 (auth) and severity 4 (warning).
        assert all(message.startswith("<36>") and message.endswith("\0") for message in messages)
        return [f"Nov 23 12:00:00 pbx {message[4:-1]}" for message in messages]


@pytest.fixture
def syslog(tmp_path: Path) -> Iterator[Syslog]:
    found = Syslog(tmp_path / "log")
    yield found
    found.socket.close()


def test_every_failed_login_is_told_as_fusionpbx_tells_its_own(database: Database, syslog: Syslog) -> None:
    database.execute("TRUNCATE cdr_api.attempts")
    database.account(email="syslog@example.com")
    client = Client(database.app(CDR_API_SYSLOG=str(syslog.path)))
    log_in(client, "Syslog@example.com", **from_address("192.0.2.1"))
    log_in(client, "nobody@example.com", **from_address("192.0.2.2"))
    client.send("GET", "/api/domains", headers={"Authorization": "Bearer cdr_x"}, **from_address("192.0.2.3"))
    client.send("GET", "/api/domains", **from_address("192.0.2.4"))  # no token is no guess
    assert log_in(client, "syslog@example.com", PASSWORD, **from_address("192.0.2.5")).status_code == 200
    lines = syslog.lines(3)
    assert [line.partition("FusionPBX: ")[2] for line in lines] == [
        "[192.0.2.1] authentication failed for syslog@example.com",
        "[192.0.2.2] authentication failed for nobody@example.com",
        "[192.0.2.3] authentication failed for token",
    ]
    matches = [JAIL.match(line) for line in lines]
    assert [match and match["host"] for match in matches] == ["192.0.2.1", "192.0.2.2", "192.0.2.3"]


FORGERIES = [
    "x\nNov 23 12:00:00 pbx FusionPBX: [198.51.100.9] authentication failed for y",
    "x\r\n<36>FusionPBX: [198.51.100.9] authentication failed for y",
    "x FusionPBX: [198.51.100.9] authentication failed for y",
    "\x1b[2J\x1b]0;x\x07@example.com",
    "a@example.com\u2028[198.51.100.9]\u0085",
    "x" * 100_000,
]


@pytest.mark.parametrize("email", FORGERIES, ids=range(len(FORGERIES)))
def test_no_e_mail_address_forges_a_line(database: Database, syslog: Syslog, email: str) -> None:
    database.execute("TRUNCATE cdr_api.attempts")
    client = Client(database.app(CDR_API_SYSLOG=str(syslog.path)))
    assert log_in(client, email, **from_address("192.0.2.1")).status_code == 401
    (line,) = syslog.lines(1)
    assert len(line) < 200
    assert re.fullmatch(r"[ -~]*", line)
    found = JAIL.match(line)
    assert found
    assert found["host"] == "192.0.2.1"


FORGED_SCOPES = [
    "fe80::1%1] authentication failed for x [203.0.113.9",
    "fe80::1%x FusionPBX: [203.0.113.9] authentication failed for y",
    "fe80::1%\u2028FusionPBX: [203.0.113.9",
    "::ffff:198.51.100.1%[203.0.113.9]",
]


@pytest.mark.parametrize("forged", FORGED_SCOPES, ids=range(len(FORGED_SCOPES)))
def test_no_scope_of_an_address_forges_a_line(
    database: Database, syslog: Syslog, caplog: pytest.LogCaptureFixture, forged: str
) -> None:
    """Which a proxy passes on as the client wrote it."""
    database.execute("TRUNCATE cdr_api.attempts")
    app = database.app(CDR_API_SYSLOG=str(syslog.path), CDR_API_PROXIES="1")
    entries: list[Entry] = []
    app.before_request(lambda: entries.append(request.environ["cdr_api.entry"]))
    headers = {"X-Forwarded-For": f'"{forged}"'}
    assert log_in(Client(app), "nobody@example.com", headers=headers).status_code == 401
    address = str(ipaddress.ip_address(forged.partition("%")[0]))
    (line,) = syslog.lines(1)
    assert line.partition("FusionPBX: ")[2] == f"[{address}] authentication failed for nobody@example.com"
    with caplog.at_level(logging.INFO, "cdr_api.requests"):
        RequestLog("text").close(entries[0], 401, 0)
    assert f" address={address} " in caplog.text
    assert "203.0.113.9" not in caplog.text


def test_whoever_is_told_to_syslog_is_an_address(syslog: Syslog) -> None:
    log = AuthLog(str(syslog.path))
    for address in ("203.0.113.9] x [", "fe80::1%] x [", "nonsense"):
        log.report(address, "a@example.com")
    log.close()
    assert [line.partition("FusionPBX: ")[2] for line in syslog.lines(1)] == [
        "[fe80::1] authentication failed for a@example.com"
    ]


def test_a_syslog_that_is_away_is_a_line_in_our_log_and_no_more(
    database: Database, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    database.execute("TRUNCATE cdr_api.attempts")
    client = Client(database.app(CDR_API_SYSLOG=str(tmp_path / "nothing")))
    assert log_in(client, "a@example.com").status_code == 401
    assert "CDR_API_SYSLOG" in caplog.text
    assert capsys.readouterr().err == ""


def test_the_address_behind_trusted_proxies_counts_and_a_claimed_one_does_not(
    database: Database, syslog: Syslog
) -> None:
    database.execute("TRUNCATE cdr_api.attempts")
    for proxies in ("0", "1"):
        client = Client(database.app(CDR_API_SYSLOG=str(syslog.path), CDR_API_PROXIES=proxies))
        headers = {"X-Forwarded-For": "198.51.100.1, 203.0.113.7"}
        log_in(client, "a@example.com", headers=headers, **from_address("192.0.2.1"))
    hosts = [match["host"] for line in syslog.lines(2) if (match := JAIL.match(line))]
    assert hosts == ["192.0.2.1", "203.0.113.7"]
