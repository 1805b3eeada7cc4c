"""A day in minutes: everything at once, with failures in between; nothing is lost and nothing leaks.

DAY_SECONDS says how long (make day: an hour). The figures are printed at the end.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import itertools
import json
import os
import random
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import pytest

import demo
from cdr.accounts import digest_token
from tests.clients import Answer, Download, fetch, reach
from tests.conftest import PASSWORD, PASSWORD_HASH, Gunicorn, need, serve, wait_for
from tests.servers import AWAY, Node, own_node

SECONDS = float(os.environ.get("DAY_SECONDS", "40"))
ALPHA = "alpha.example.com"
PAUSE = 0.2  # seconds between two requests of everybody, which leaves other tests some of the processors
BROKEN = (http.client.HTTPException, OSError)  # how an answer looks that did not end


@dataclass
class Day:
    """What everybody shares, and what they saw."""

    node: Node
    gunicorn: Gunicorn
    token: str
    attacker: str  # a token of another account
    over: threading.Event = field(default_factory=threading.Event)
    seen: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    stored: set[str] = field(default_factory=set)
    delivered: list[str] = field(default_factory=list)
    cursor: str = ""

    def ask(self, name: str, path: str, *allowed: int, body: str = "") -> Answer | None:
        """A whole answer of status 200; None for one that broke off, or that tells to come again."""
        try:
            answer = fetch(self.gunicorn.url + path, self.token, method="POST" if body else "GET", body=body)
        except BROKEN:
            self.seen[f"{name}: broke off"] += 1
            return None
        self.seen[f"{name}: {answer.status_code}"] += 1
        if answer.status_code not in (200, 429, 503, *allowed):
            self.faults.append(f"{name}: {answer.status_code} {answer.text[:300]}")
        return answer if answer.status_code == 200 else None


# What everybody does, once ------------------------------------------------------


def store(day: Day) -> None:
    """Stores some calls in one transaction; whether a crash swallowed it is looked up."""
    uuids = [str(uuid.uuid4()) for _ in range(random.randint(1, 20))]
    insert = "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_name, end_stamp, billsec) VALUES (%s, %s, now(), 1)"
    try:
        with day.node.connect() as connection, connection.transaction(), connection.cursor() as cursor:
            cursor.executemany(insert, [(one, ALPHA) for one in uuids])
    except AWAY:
        day.seen["store: unsure"] += 1
    else:
        day.stored.update(uuids)


def poll(day: Day) -> None:
    where = f"cursor={day.cursor}" if day.cursor else "from=2020-01-01"
    answer = day.ask("feed", f"/api/call_feed?{where}&fields=xml_cdr_uuid,billsec&limit=5000")
    if answer:
        day.delivered += [call["xml_cdr_uuid"] for call in json.loads(answer.data)]
        day.cursor = answer.headers["X-Next-Cursor"]


def read_range(day: Day) -> None:
    first = random.randint(1, 28)
    values = {"domain_name": ALPHA, "from": f"2026-10-{first:02d}", "to": f"2026-10-{first:02d}", "limit": 500}
    answer = day.ask("range", f"/api/call_range?{urlencode(values)}")
    if answer:
        assert {call["end_stamp"][:10] for call in json.loads(answer.data)} <= {f"2026-10-{first:02d}"}


def add_up(day: Day) -> None:
    day.ask("totals", "/api/call_totals?from=2026-10-01&to=2026-10-31&group_by=day,direction")
    day.ask("peaks", "/api/concurrent_calls_by_domain?date=2026-10-05&resolution=15")


def export(day: Day) -> None:
    answer = day.ask("export", f"/api/calls?domain_name={ALPHA}&format={random.choice(['json', 'ndjson', 'csv'])}")
    if answer and answer.mimetype == "application/json":
        assert len(json.loads(answer.data)) > 10_000


def give_up(day: Day) -> None:
    """Takes the begin of an export and goes away."""
    with Download(f"{day.gunicorn.url}/api/calls?domain_name={ALPHA}", day.token) as download:
        day.seen["give up: " + ("begun" if download.begin[:1] == b"[" else "refused")] += 1


def log_in(day: Day) -> None:
    name = random.choice(["billing", "nobody"])
    day.ask("login", "/api/login", 401, body=urlencode({"email": f"{name}@example.com", "password": PASSWORD}))
    day.over.wait(0.5)


def look(day: Day) -> None:
    day.ask("health", "/api/health")
    day.ask("domains", "/api/domains")


# What attackers do, once; none of it brings them anything ------------------------


def ask_for(day: Day, path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {day.attacker}\r\n\r\n".encode()


HEAVY = "/api/concurrent_calls_by_domain?from=2026-10-01&to=2026-10-31&resolution=1"


def add_up_all(day: Day) -> None:
    fetch(day.gunicorn.url + HEAVY, day.attacker)


def hang_up(day: Day) -> None:
    """While PostgreSQL works for it."""
    with reach(day.gunicorn) as client:
        client.sendall(ask_for(day, HEAVY))
        day.over.wait(0.3)


def stall(day: Day) -> None:
    """Takes the begin of an export and nothing more."""
    with reach(day.gunicorn) as client:
        client.sendall(ask_for(day, f"/api/calls?domain_name={ALPHA}"))
        client.recv(100)
        day.over.wait(3)


def dribble(day: Day) -> None:
    with reach(day.gunicorn) as client:
        client.sendall(b"POST /api/login HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        while not day.over.wait(0.5):
            client.sendall(b"x")


def guess(day: Day) -> None:
    body = urlencode({"email": f"{random.random()}@example.com", "password": "wrong"})
    fetch(f"{day.gunicorn.url}/api/login", method="POST", body=body)


ATTACKS = [add_up_all, hang_up, stall, dribble, guess]
WORK = [store, poll, read_range, add_up, export, give_up, give_up, log_in, look]


def attack(day: Day, work: Callable[[Day], None]) -> None:
    """Whatever comes of it; the connection may well be cut, the server killed."""
    with contextlib.suppress(*BROKEN):
        work(day)


def end_a_session(day: Day) -> None:
    with day.node.connect() as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'cdr_api' ORDER BY random() LIMIT 2"
        )


def hang(day: Day) -> None:
    with day.node.paused():
        day.over.wait(1)


def crash(day: Day) -> None:
    day.node.crash()


def kill_a_worker(day: Day) -> None:
    os.kill(random.choice(day.gunicorn.worker_pids()), signal.SIGKILL)


def reload(day: Day) -> None:
    day.gunicorn.process.send_signal(signal.SIGHUP)


# The day ------------------------------------------------------------------------


def keep_on(day: Day, work: Callable[[Day], None]) -> None:
    while not day.over.wait(PAUSE):
        try:
            work(day)
        except Exception as error:  # noqa: BLE001 (a thread's error would not fail the test)
            day.faults.append(f"{work}: {error!r}")


@contextlib.contextmanager
def busy(day: Day, *works: Callable[[Day], None]) -> Iterator[None]:
    """Somebody for each of these keeps on doing it."""
    day.over.clear()
    threads = [threading.Thread(target=keep_on, args=[day, work]) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        day.over.set()
        for thread in threads:
            thread.join()


def attackers(times: int) -> list[Callable[[Day], None]]:
    return [functools.partial(attack, work=work) for work in ATTACKS * times]


def live(day: Day, seconds: float, failures: list[Callable[[Day], None]]) -> None:
    """Everybody works for so long, while one failure follows the other."""
    with busy(day, *WORK, *attackers(1)):
        fail(day, seconds, failures)


def fail(day: Day, seconds: float, failures: list[Callable[[Day], None]]) -> None:
    end = time.monotonic() + seconds
    for failure in itertools.cycle(failures):
        day.over.wait(min(5, seconds / len(failures)))
        if time.monotonic() > end:
            break
        day.seen[f"failure: {failure.__name__}"] += 1
        failure(day)


@dataclass(frozen=True)
class Figures:
    """Of one worker at rest."""

    pid: int
    files: int
    threads: int
    bytes: int


def measure(day: Day) -> list[Figures]:
    """When nothing runs any more."""
    wait_for(lambda: not day.node.sessions("state <> 'idle'"), 60)
    found = []
    for pid in sorted(day.gunicorn.worker_pids()):
        folder = Path(f"/proc/{pid}")
        pages = int((folder / "statm").read_text("ascii").split()[1])
        files, threads = len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir()))
        found.append(Figures(pid, files, threads, pages * os.sysconf("SC_PAGE_SIZE")))
    return found


def has_all(day: Day) -> bool:
    poll(day)
    return day.stored <= set(day.delivered)


@contextlib.contextmanager
def morning() -> Iterator[Day]:
    """A server with 20,000 calls, and the service on it with two workers."""
    with own_node("fsync = off") as node:
        with node.connect() as connection:
            demo.add_calls(connection, 20_000, until=1_793_000_000)  # 2026-10-26
            connection.execute(demo.INDEX)
            tokens = [f"cdr_of-{name}" for name in ("billing", "an-attacker")]
            for token in tokens:
                connection.execute(
                    "WITH made AS (INSERT INTO cdr_api.accounts (name, email, email_key, password_hash, all_domains)"
                    " VALUES ('x', %(email)s, %(email)s, %(hash)s, true) RETURNING account_id)"
                    " INSERT INTO cdr_api.tokens (account_id, digest) SELECT account_id, %(digest)s FROM made",
                    {
                        "email": token.removeprefix("cdr_of-") + "@example.com",
                        "hash": PASSWORD_HASH,
                        "digest": digest_token(token),
                    },
                )
        with serve(node.dsn("cdr_api"), CDR_API_WORKERS="2") as gunicorn:
            yield Day(node, gunicorn, tokens[0], tokens[1])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc to count files and threads")
@pytest.mark.direct("runs a server of its own")
def test_a_day_with_failures_loses_nothing_and_leaks_nothing() -> None:
    need("curl")
    with morning() as day:
        live(day, SECONDS / 4, [end_a_session, kill_a_worker, reload, hang, crash])
        wait_for(lambda: len(day.gunicorn.worker_pids()) == 2)
        before = measure(day)
        live(day, SECONDS * 3 / 4, [end_a_session, end_a_session, crash, end_a_session, hang])
        after = measure(day)
        day.over.clear()
        wait_for(lambda: has_all(day), 120)
        sessions = len(day.node.sessions())
    seen = [f"{name:<28} {count}" for name, count in sorted(day.seen.items())]
    print(*seen, f"stored and delivered: {len(day.stored)}", f"connections: {sessions}", *before, *after, sep="\n")  # noqa: T201
    assert day.faults == []
    assert [one for one, times in Counter(day.delivered).items() if times > 1] == []
    assert sessions <= 2 * 8
    for old, new in zip(before, after, strict=True):
        assert new.pid == old.pid
        assert new.files <= old.files + 8  # a connection for each thread
        assert new.threads <= old.threads + 20  # gunicorn makes one only when it is needed
        assert new.bytes - old.bytes < 32 * 1024 * 1024


def count_answers(day: Day, seconds: float) -> float:
    """How many small answers a second somebody gets who asks for one after the other; each must be one."""
    number, begun = 0, time.monotonic()
    while (spent := time.monotonic() - begun) < seconds:
        path = f"/api/call_range?domain_name={ALPHA}&from=1792980000&to=1792980100"
        answer = fetch(day.gunicorn.url + path, day.token)
        assert answer.status_code == 200, answer.text
        number += 1
    return number / spent


@pytest.mark.direct("runs a server of its own")
def test_who_behaves_gets_every_answer_while_others_attack() -> None:
    with morning() as day:
        count_answers(day, 1)
        print(f"quiet: {count_answers(day, SECONDS / 60):.0f} answers a second")  # noqa: T201
        for work in ATTACKS:
            with busy(day, *[functools.partial(attack, work=work)] * 8):
                print(f"{work.__name__}: {count_answers(day, SECONDS / 60):.0f} a second")  # noqa: T201
        with busy(day, *attackers(4)):
            print(f"all of it: {count_answers(day, SECONDS / 60):.0f} a second")  # noqa: T201
    assert day.faults == []
