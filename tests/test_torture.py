"""The feed while writers, crashes and a promotion do their worst: no call is lost, none is invented.

TORTURE_SECONDS is how long the writers of the first test write (12 if not said;
make torture says 600); the next two tests take less. pytest -s shows the counts.
"""

from __future__ import annotations

import json
import math
import os
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlencode, urlsplit

import psycopg
import pytest

import demo
from tests.conftest import Client, Database, DatabaseMaker, serve, wait_for
from tests.servers import AWAY, Node, has_replayed, last_position, own_node, standby_of

SECONDS = float(os.environ.get("TORTURE_SECONDS", "12"))
LESS = 0.3 * SECONDS  # for the tests behind it
ROUNDS = max(1, int(SECONDS / 60))  # of crashes
PACE = max(1, SECONDS / 40)  # a longer play is a slower one: every page of a poll scans the whole table
WRITERS = 20
DIRECTIONS = ("inbound", "outbound", "local")


@pytest.fixture
def node() -> Iterator[Node]:
    with own_node("max_prepared_transactions = 100", "max_connections = 120") as found:
        yield found


def make_token(node: Node, *domains: str) -> str:
    """A token for some domains, or for all."""
    return Database(node.server, node.name).account(
        *domains, email=f"{uuid.uuid4()}@example.com", all_domains=not domains
    )


# Writers ----------------------------------------------------------------------


@dataclass
class Call:
    uuid: str
    domain: str
    direction: str
    written: float = 0  # when its INSERT had returned, in epoch seconds


@dataclass
class Book:
    """What the writers know of their calls, by uuid, and how far the play has gone.

    One method of a dictionary is atomic in CPython: the threads need no lock.
    """

    dsn: str  # whom the writers write to
    deadline: float = math.inf  # of the pollers, by time.monotonic(); known when nothing is written any more
    committed: dict[str, Call] = field(default_factory=dict)
    undone: dict[str, Call] = field(default_factory=dict)
    doubtful: dict[str, Call] = field(default_factory=dict)  # the answer to COMMIT was lost, or is still to come
    deleted: set[str] = field(default_factory=set)  # or about to be: seen by a DELETE, so committed before
    prepared: dict[str, list[Call]] = field(default_factory=dict)  # by gid
    crashes: int = 0
    survivors: int = 0  # transactions that were prepared before a crash, and still are
    over: threading.Event = field(default_factory=threading.Event)  # writers stop
    settled: threading.Event = field(default_factory=threading.Event)  # nothing is open or prepared any more
    end: float = 0  # when it was settled, in epoch seconds

    def doubt(self, calls: Iterable[Call]) -> None:
        self.doubtful.update({call.uuid: call for call in calls})

    def settle(self, calls: Iterable[Call], *, committed: bool) -> None:
        for call in calls:
            (self.committed if committed else self.undone)[call.uuid] = call
            self.doubtful.pop(call.uuid, None)

    def wait(self, longest: float) -> None:
        self.over.wait(random.uniform(0, longest))


def keep_on(book: Book, work: Callable[[Book, demo.Connection], None]) -> None:
    """Repeats some work until the play is over, with a new connection after every crash."""
    while not book.over.is_set():
        try:
            with psycopg.connect(book.dsn, autocommit=True) as connection:
                while not book.over.is_set():
                    work(book, connection)
        except AWAY:
            book.wait(0.1)


def new_call(domains: Sequence[str]) -> Call:
    return Call(str(uuid.uuid4()), random.choice(domains), random.choice(DIRECTIONS))


def new_end_stamp() -> datetime | None:
    """Mostly of now; late imports reach 30 days back, and a few calls have none."""
    chance = random.random()
    days = 0.01 if chance < 0.8 else 30
    return None if chance > 0.97 else datetime.now(UTC) - timedelta(days=random.uniform(0, days))


# What the importer finds in a call's variables beside the right domain_uuid.
STORED_NAMES = (*demo.DOMAINS, "203.0.113.5", "old.example.com", None)


def insert_calls(connection: demo.Connection, count: int, domains: Sequence[str] = demo.DOMAINS) -> list[Call]:
    calls = [new_call(domains) for _ in range(count)]
    rows = ", ".join(["(%s, md5('domain ' || %s)::uuid, %s, %s, %s, now(), 'a', 0)"] * count)
    values = [
        value
        for call in calls
        for value in (call.uuid, call.domain, random.choice(STORED_NAMES), call.direction, new_end_stamp())
    ]
    connection.execute(
        "INSERT INTO v_xml_cdr"
        " (xml_cdr_uuid, domain_uuid, domain_name, direction, end_stamp, start_stamp, leg, billsec)"
        f" VALUES {rows}",
        values,
    )
    written = time.time()
    for call in calls:
        call.written = written
    return calls


def insert_some(book: Book, connection: demo.Connection, depth: int = 0) -> list[Call]:
    """The calls that stand if what is around them does: some plain, some in savepoints within savepoints."""
    if depth == 3 or random.random() < 0.6:
        return insert_calls(connection, random.choice((1, 1, 1, 2, 5)))
    connection.execute(f"SAVEPOINT level_{depth}")
    calls = insert_some(book, connection, depth + 1) + insert_some(book, connection, depth + 1)
    if random.random() < 0.3:
        connection.execute(f"ROLLBACK TO SAVEPOINT level_{depth}")
        book.settle(calls, committed=False)
        calls = []
    connection.execute(f"RELEASE SAVEPOINT level_{depth}")
    return calls


def write(book: Book, connection: demo.Connection) -> None:
    """One transaction, ended in one of the three ways."""
    connection.execute("BEGIN")
    calls: list[Call] = []
    try:
        for _ in range(random.randint(1, 3)):
            calls += insert_some(book, connection)
        book.wait(PACE * random.choice((0, 0.05, 0.3)))
    except AWAY:
        book.settle(calls, committed=False)
        raise
    ending = random.random()
    if ending < 0.15:
        book.settle(calls, committed=False)
        connection.execute("ROLLBACK")
    elif ending < 0.25:
        gid = str(uuid.uuid4())
        book.doubt(calls)
        book.prepared[gid] = calls
        connection.execute(f"PREPARE TRANSACTION '{gid}'")
    else:
        book.doubt(calls)
        connection.execute("COMMIT")
        book.settle(calls, committed=True)


def end_prepared(book: Book, connection: demo.Connection) -> None:
    """Commits or rolls back some of the prepared transactions, which may be older than the last crash."""
    book.wait(0.1)
    for (gid,) in connection.execute("SELECT gid FROM pg_prepared_xacts").fetchall():
        if random.random() < 0.07 or book.over.is_set():
            commits = random.random() < 0.7
            connection.execute(f"{'COMMIT' if commits else 'ROLLBACK'} PREPARED '{gid}'")
            book.settle(book.prepared[gid], committed=commits)


def disturb(book: Book, connection: demo.Connection) -> None:
    """What administrators and FusionPBX do to rows that stand already."""
    book.wait(0.5)
    some = "SELECT xml_cdr_uuid FROM v_xml_cdr ORDER BY random() LIMIT"
    action = random.random()
    if action < 0.5:
        connection.execute(f"UPDATE v_xml_cdr SET billsec = billsec + 1 WHERE xml_cdr_uuid IN ({some} 50)")
    elif action < 0.8:
        found = [str(row[0]) for row in connection.execute(f"{some} 5")]
        book.deleted.update(found)
        connection.execute("DELETE FROM v_xml_cdr WHERE xml_cdr_uuid = ANY(%s::uuid[])", [found])
    else:
        connection.execute("VACUUM FREEZE v_xml_cdr")


def change_domains(book: Book, connection: demo.Connection) -> None:
    """Renames a domain to and fro; another one, that an account was granted, comes and is deleted."""
    alpha = "md5('domain alpha.example.com')::uuid"
    book.wait(0.3)
    connection.execute(
        f"UPDATE v_domains SET domain_name = CASE domain_name WHEN '{demo.DOMAINS[0]}' THEN 'renamed.example.com'"
        f" ELSE '{demo.DOMAINS[0]}' END WHERE domain_uuid = {alpha}"
    )
    if not connection.execute("DELETE FROM v_domains WHERE domain_name = 'delta.example.com'").rowcount:
        demo.add_domain(connection, "delta.example.com")


def persist(book: Book, statement: str) -> None:
    """A statement that must happen: whatever crash or wait for a lock comes between, it is tried again."""

    def done() -> bool:
        with suppress(*AWAY), psycopg.connect(book.dsn, autocommit=True) as connection:
            # It stands in the queue for the table before all writers: not for long, if a prepared transaction
            # keeps it from having it.
            connection.execute("SET lock_timeout = '3s'")
            connection.execute(statement)
            return True
        return False

    wait_for(done, 300)  # the table is locked for as long, and by now it may be large


# Pollers ----------------------------------------------------------------------


class PollError(Exception):
    """A poll failed in a way that a billing system is told to repeat it after."""


@dataclass
class Poller:
    """A billing system: follows the feed from cursor to cursor with a ledger by uuid."""

    url: str
    token: str
    query: dict[str, str]
    wants: Callable[[Call], bool]
    days: float = 40  # how far back its first poll looks
    forgetful: bool = False  # crashes at times between keeping the calls and keeping the cursor
    cursor: str = ""
    through: float = 0  # what X-Complete-Through has promised so far
    times: Counter[str] = field(default_factory=Counter)
    promised: dict[str, float] = field(default_factory=dict)  # what the promise was when a call first came
    polls: int = 0
    failures: int = 0

    def run(self, book: Book) -> None:
        """Polls until all is over, and the feed vouches for having delivered it."""
        while not (book.settled.is_set() and self.through > book.end):
            assert time.monotonic() < book.deadline, "the feed did not come to an end in time"
            try:
                self.poll()
            except PollError:
                self.failures += 1
            time.sleep(random.uniform(0, 0.05))

    def poll(self) -> None:
        """Asks once, and keeps what came."""
        since = (datetime.now(UTC) - timedelta(days=self.days)).isoformat()
        place = {"cursor": self.cursor} if self.cursor else {"from": since}
        body, headers = self.get("/api/call_feed?" + urlencode(self.query | place))
        if self.query.get("format") == "ndjson":
            calls = [json.loads(line) for line in body.splitlines()]
        else:
            calls = json.loads(body)
        for call in calls:
            self.times[call["xml_cdr_uuid"]] += 1
            self.promised.setdefault(call["xml_cdr_uuid"], self.through)
        self.polls += 1
        if not (self.forgetful and random.random() < 0.2):
            self.cursor = headers["X-Next-Cursor"]
        self.through = max(self.through, datetime.fromisoformat(headers["X-Complete-Through"]).timestamp())

    def get(self, path: str) -> tuple[bytes, dict[str, str]]:
        """A whole answer with 200; PollError for one to ask again for."""
        with closing(HTTPConnection(urlsplit(self.url).netloc, timeout=60)) as connection:
            try:
                connection.request("GET", path, headers={"Authorization": f"Bearer {self.token}"})
                response = connection.getresponse()
                body = response.read()
            except (OSError, HTTPException) as error:
                raise PollError from error
        if response.status == 503:
            raise PollError
        assert response.status == 200, body
        return body, dict(response.headers)


def make_pollers(node: Node, *urls: str, forgetful: bool = False) -> list[Poller]:
    """Three of each service."""
    with node.connect() as connection:
        demo.add_domain(connection, "delta.example.com")
    return [poller for url in urls for poller in pollers_of(node, url, forgetful=forgetful)]


def pollers_of(node: Node, url: str, *, forgetful: bool) -> list[Poller]:
    """The second begins with a recent from, before anything is stored: what ended earlier comes as it is stored."""
    alpha, beta, gamma = demo.DOMAINS
    uuid_of_alpha = node.value(f"SELECT md5('domain {alpha}')::uuid::text")
    pollers = [
        Poller(url, make_token(node), {"fields": "xml_cdr_uuid"}, lambda call: True),
        Poller(
            url,
            make_token(node, alpha),
            {"domain_uuid": uuid_of_alpha, "format": "ndjson"},
            lambda call: call.domain == alpha,
            days=0.001,
        ),
        Poller(
            url,
            make_token(node, alpha, beta, gamma, "delta.example.com"),
            {"direction": "inbound", "limit": "50"},
            lambda call: call.direction == "inbound",
        ),
    ]
    pollers[1].poll()
    pollers[1].forgetful = forgetful
    return pollers


SWEEPING = {"CDR_API_SWEEP_SECONDS": "2"}


# The play ---------------------------------------------------------------------

Work = Callable[[Book, demo.Connection], None]


@contextmanager
def play(book: Book, works: Iterable[Work], pollers: Iterable[Poller]) -> Iterator[list[Future[None]]]:
    """Works on the database and polls in threads, beside the block; gives the works. Passes on what threads raise."""
    with ThreadPoolExecutor(64) as pool:
        working = [pool.submit(keep_on, book, work) for work in works]
        polling = [pool.submit(poller.run, book) for poller in pollers]
        try:
            yield working
        except BaseException:
            book.deadline = 0  # so that no poller waits for what does not come any more
            raise
        finally:
            book.over.set()
            book.settled.set()
        for future in working + polling:
            future.result()


def settle(book: Book, node: Node, working: Iterable[Future[None]]) -> None:
    """Waits for the writers, ends what is prepared, and tells the pollers that no call comes any more."""
    book.over.set()
    for future in working:
        future.result(60)
    with node.connect() as connection:
        end_prepared(book, connection)
        row = connection.execute("SELECT txid_current()").fetchone()
    # Not even an autovacuum that began before may hold the horizon back.
    wait_for(lambda: node.value(f"SELECT txid_snapshot_xmin(txid_current_snapshot()) > {row and row[0]}"), 60)
    book.end, book.deadline = time.time(), time.monotonic() + 180
    book.settled.set()


def tell(text: str) -> None:
    print(text)  # noqa: T201 (for pytest -s)


def read_table(node: Node) -> set[str]:
    with node.connect() as connection:
        return {str(row[0]) for row in connection.execute("SELECT xml_cdr_uuid FROM v_xml_cdr")}


def compare(book: Book, node: Node, pollers: Iterable[Poller], *, once: bool) -> None:
    """Compares what was delivered with what was committed; once: that no call came twice or late."""
    table = read_table(node)
    sure = {key: call for key, call in book.doubtful.items() if key in table or key in book.deleted}
    committed = book.committed | sure
    assert table <= committed.keys()
    assert committed.keys() - book.deleted <= table  # or PostgreSQL itself has lost some
    tell(
        f"\n{len(committed)} calls committed ({len(sure)} of {len(book.doubtful)} in doubt), {len(table)} in the table,"
        f" {len(book.deleted)} deleted, {len(book.undone)} rolled back; {book.crashes} crashes and promotions,"
        f" which {book.survivors} prepared transactions survived"
    )
    reports = [report(poller, committed, book.deleted, once=once) for poller in pollers]
    assert not any(reports), reports
    assert len(committed) > 100 * min(SECONDS, 20)


def report(poller: Poller, committed: dict[str, Call], deleted: set[str], *, once: bool) -> dict[str, list[Any]]:
    """Prints the counts of a poller; what is wrong with its ledger, by kind."""
    due = {key for key, call in committed.items() if poller.wants(call)}
    got = set(poller.times)
    again = [key for key, times in poller.times.items() if times > 1]
    early = [committed[key] for key, past in poller.promised.items() if key in due and committed[key].written < past]
    kinds: dict[str, list[Any]] = {
        "lost": [committed[key] for key in due - got - deleted],
        "invented": list(got - due),
        "again": again if once else [],
        # Who changes a call before it was delivered delays it: it comes with what was written last.
        "promised too early": early if once else [],
    }
    tell(
        f"{poller.query}: {len(due)} due, {len(got)} delivered, {len(again)} again, {poller.polls} polls,"
        f" {poller.failures} failures; " + ", ".join(f"{len(found)} {kind}" for kind, found in kinds.items())
    )
    return {kind: found[:5] for kind, found in kinds.items() if found}


def kill(node: Node) -> None:
    node.kill()
    node.recover()


def survive(book: Book, node: Node, catastrophe: Callable[[], None]) -> None:
    """Lets a catastrophe happen, and counts what a server that goes on after it must have kept."""
    catastrophe()
    book.crashes += 1
    book.survivors += node.value("SELECT count(*) FROM pg_prepared_xacts")


def act(book: Book, seconds: float, *scenes: Callable[[], None]) -> None:
    """Lets the writers write for so long, with scenes at equal distances in between."""
    for scene in scenes:
        book.over.wait(seconds / (len(scenes) + 1))
        scene()
    book.over.wait(seconds / (len(scenes) + 1))


@pytest.mark.direct("runs a server of its own, which crashes")
def test_the_feed_delivers_every_call_through_crashes_and_rewrites(node: Node) -> None:
    book = Book(node.dsn())
    works = [*[write] * WRITERS, end_prepared, disturb, change_domains]
    scenes = [
        lambda: survive(book, node, node.crash),
        lambda: persist(book, "VACUUM FULL v_xml_cdr"),
        lambda: survive(book, node, lambda: kill(node)),
    ]
    mass_update = "UPDATE v_xml_cdr SET billsec = billsec + 1"
    with serve(node.dsn("cdr_api")) as plain, serve(node.dsn("cdr_api"), **SWEEPING) as sweeping:
        pollers = make_pollers(node, plain.url, sweeping.url, forgetful=True)
        with play(book, works, pollers) as working:
            act(book, SECONDS, lambda: persist(book, mass_update), *scenes * ROUNDS)
            settle(book, node, working)
    compare(book, node, pollers, once=False)


@pytest.mark.direct("runs a server of its own, which crashes")
def test_no_call_is_delivered_twice_when_none_is_changed(node: Node) -> None:
    book = Book(node.dsn())
    works = [*[write] * WRITERS, end_prepared]
    with serve(node.dsn("cdr_api")) as plain, serve(node.dsn("cdr_api"), **SWEEPING) as sweeping:
        pollers = make_pollers(node, plain.url, sweeping.url)
        with play(book, works, pollers) as working:
            act(book, LESS, *(lambda fall=fall: survive(book, node, fall) for fall in (node.crash, lambda: kill(node))))
            settle(book, node, working)
    compare(book, node, pollers, once=True)


def promote(book: Book, node: Node, standby: Node) -> None:
    """Stops the primary under its writers, and sends them to the standby once that has everything and is promoted."""
    node.stop()
    wait_for(lambda: has_replayed(standby, last_position(node)))
    standby.control("promote")
    book.dsn = standby.dsn()


@pytest.mark.direct("runs a server of its own, which crashes")
def test_the_feed_of_a_standby_goes_on_after_its_promotion(node: Node) -> None:
    book = Book(node.dsn())
    works = [*[write] * 16, end_prepared]
    with (
        standby_of(node) as standby,
        serve(node.dsn("cdr_api"), CDR_API_CALLS_DSN=standby.dsn("cdr_api"), **SWEEPING) as before,
        serve(standby.dsn("cdr_api"), **SWEEPING) as after,
    ):
        pollers = make_pollers(node, before.url)
        with play(book, works, pollers) as working:
            act(book, LESS / 2)
            survive(book, standby, lambda: promote(book, node, standby))
            for poller in pollers:
                poller.url = after.url
            act(book, LESS / 2)
            settle(book, standby, working)
        compare(book, standby, pollers, once=True)


@dataclass
class Feed:
    """One poller inside this process."""

    database: Database
    client: Client
    cursor: str = ""

    def poll(self) -> tuple[list[str], datetime]:
        """The uuids that came, and what is complete through when."""
        place = {"cursor": self.cursor} if self.cursor else {"from": "2026-01-01"}
        response = self.client.get("/api/call_feed", fields="xml_cdr_uuid", **place)
        assert response.status_code == 200, response.text
        self.cursor = response.headers["X-Next-Cursor"]
        through = datetime.fromisoformat(response.headers["X-Complete-Through"])
        return [call["xml_cdr_uuid"] for call in response.get_json()], through

    def insert(self) -> str:
        return self.database.insert_call(end_stamp=datetime.now(UTC))

    def now(self) -> datetime:
        found: datetime = self.database.execute("SELECT clock_timestamp()")[0][0]
        return found


@pytest.fixture
def feed(make_database: DatabaseMaker) -> Feed:
    database = make_database()
    return Feed(database, database.client(database.account("alpha.example.com")))


@pytest.mark.direct("runs a server of its own, which crashes")
def test_an_id_that_is_given_out_again_after_a_crash_hides_no_call(node: Node) -> None:
    """A rollback is not flushed at once: a crash forgets it, and its id goes to the next transaction."""
    database = Database(node.server, node.name)
    feed = Feed(database, database.client(make_token(node, "alpha.example.com")))
    with node.connect() as connection:
        connection.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
        connection.execute("SELECT pg_reload_conf()")
        feed.poll()
        with connection.transaction(force_rollback=True):
            insert_calls(connection, 1)
        assert feed.poll()[0] == []
        node.crash()
    calls = [feed.insert() for _ in range(2)]
    found = feed.poll()[0]
    database.close()
    assert found == calls


@pytest.mark.parametrize("others", [0, 2], ids=["alone", "among others"])
def test_an_open_transaction_holds_complete_through_back_until_it_has_ended(feed: Feed, others: int) -> None:
    feed.insert()
    feed.poll()
    since = feed.now()
    with feed.database.connect() as connection:
        with connection.transaction():
            (call,) = insert_calls(connection, 1, ["alpha.example.com"])
            expected = []
            found = []
            for _ in range(5):
                expected += [feed.insert() for _ in range(others)]
                calls, through = feed.poll()
                found += calls
                assert through <= since
                assert call.uuid not in found
        committed = feed.now()
    answers = [feed.poll() for _ in range(3)]
    for calls, _ in answers:
        found += calls
    assert answers[1][1] > committed
    assert sorted(found) == sorted([*expected, call.uuid])
    tell(f"\nheld at {since:%H:%M:%S.%f}, then {[f'{through:%H:%M:%S.%f}' for _, through in answers]}")
