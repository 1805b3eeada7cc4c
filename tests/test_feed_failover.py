"""The feed after a failover, a restore and on a logical replica: it goes on, or it says that calls may be missing."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from uuid import uuid4

import psycopg
import pytest
from psycopg.rows import dict_row

from cdr.accounts import new_token
from cdr.database import run
from cdr_api import create_app
from tests.clients import Answer, fetch
from tests.commands import check
from tests.conftest import PASSWORD_HASH, Client, Gunicorn, problem, serve, wait_for
from tests.servers import Node, has_replayed, last_position, own_node, standby_of

pytestmark = pytest.mark.direct("runs servers of its own, which fail over")
ALPHA = "alpha.example.com"


@pytest.fixture
def node() -> Iterator[Node]:
    with own_node("wal_keep_size = '256MB'", "hot_standby = on") as node:
        yield node


def make_token(node: Node) -> str:
    with psycopg.connect(node.dsn(), row_factory=dict_row, autocommit=True) as connection:
        values = {"name": "T", "email": "t@example.com", "email_key": "t@example.com", "password_hash": PASSWORD_HASH}
        account = run(connection, "insert_account", **values, all_domains=True)[0]["account_id"]
        return str(new_token(connection, account, 1))


def insert(node: Node, calls: int = 1) -> set[str]:
    uuids = {str(uuid4()) for _ in range(calls)}
    with node.connect() as connection:
        for uuid in uuids:
            connection.execute(
                "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_name, end_stamp) VALUES (%s, %s, now())", [uuid, ALPHA]
            )
    return uuids


class Poller:
    """One feed over servers that come and go."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.place = "from=2026-01-01"
        self.found: list[str] = []
        self.through: str | None = None

    def ask(self, node: Node) -> Answer:
        with serve(node.dsn("cdr_api")) as gunicorn:
            return self.ask_service(gunicorn)

    def ask_service(self, gunicorn: Gunicorn) -> Answer:
        return fetch(f"{gunicorn.url}/api/call_feed?fields=xml_cdr_uuid&{self.place}", self.token)

    def poll(self, node: Node) -> None:
        self.take(self.ask(node))

    def take(self, answer: Answer) -> None:
        assert answer.status_code == 200, answer.text
        self.place = f"cursor={answer.headers['X-Next-Cursor']}"
        self.through = answer.headers.get("X-Complete-Through")
        self.found += [call["xml_cdr_uuid"] for call in answer.get_json()]


def switch_over(node: Node, standby: Node) -> None:
    """A clean one: the primary is stopped, and the standby has everything."""
    node.stop()
    wait_for(lambda: has_replayed(standby, last_position(node)))
    standby.control("promote")


def lag_and_fail(node: Node, standby: Node, poller: Poller) -> set[str]:
    """The standby does not get the last calls, which are delivered before the primary dies."""
    standby.execute("ALTER SYSTEM SET primary_conninfo = 'host=/nowhere'")
    standby.execute("SELECT pg_reload_conf()")
    wait_for(lambda: standby.value("SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'") == 0)
    lost = insert(node, 5)
    poller.poll(node)
    node.control("-m", "immediate", "stop")
    standby.control("promote")
    return lost


def test_a_clean_switchover_costs_nothing_and_no_call_comes_twice(node: Node) -> None:
    poller = Poller(make_token(node))
    with standby_of(node) as standby:
        calls = insert(node, 5)
        poller.poll(node)
        calls |= insert(node, 5)  # not polled before the switch
        switch_over(node, standby)
        calls |= insert(standby, 5)
        poller.poll(standby)
        calls |= insert(standby, 5)
        poller.poll(standby)
    assert sorted(poller.found) == sorted(calls)


def test_a_failover_to_a_standby_that_lacked_what_was_delivered_is_410(node: Node) -> None:
    """Its transaction ids are given out again, below the cursor: comparing them proves nothing."""
    poller = Poller(make_token(node))
    with standby_of(node) as standby:
        kept = insert(node, 5)
        poller.poll(node)
        lost = lag_and_fail(node, standby, poller)
        new = insert(standby, 20)  # more than were lost, so that the ids have been passed
        answer = poller.ask(standby)
        assert answer.status_code == 410
        assert "failed over" in answer.get_json()["message"]
        again = Poller(poller.token)
        again.poll(standby)
    assert set(poller.found) == kept | lost
    assert set(again.found) == kept | new


def test_a_standby_that_lagged_only_behind_what_nobody_has_goes_on(node: Node) -> None:
    poller = Poller(make_token(node))
    with standby_of(node) as standby:
        kept = insert(node, 5)
        poller.poll(node)
        wait_for(lambda: has_replayed(standby, node.value("SELECT pg_current_wal_lsn()")))
        standby.execute("ALTER SYSTEM SET primary_conninfo = 'host=/nowhere'")
        standby.execute("SELECT pg_reload_conf()")
        wait_for(lambda: standby.value("SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'") == 0)
        insert(node, 5)  # lost, and delivered to nobody
        node.control("-m", "immediate", "stop")
        standby.control("promote")
        kept |= insert(standby, 10)
        poller.poll(standby)
    assert sorted(poller.found) == sorted(kept)


def test_two_switchovers_in_a_row_and_a_cascaded_standby(node: Node) -> None:
    """The second standby follows the first over its promotion, and is promoted itself."""
    poller = Poller(make_token(node))
    with standby_of(node) as first, standby_of(first, "cascade") as second:
        calls = insert(node, 3)
        poller.poll(node)
        switch_over(node, first)
        calls |= insert(first, 3)
        wait_for(lambda: second.value("SELECT count(*) FROM v_xml_cdr") == 6)
        with serve(first.dsn("cdr_api"), CDR_API_CALLS_DSN=second.dsn("cdr_api")) as gunicorn:
            wait_for(lambda: poller.ask_service(gunicorn).status_code == 200)
            poller.take(poller.ask_service(gunicorn))
        switch_over(first, second)
        calls |= insert(second, 3)
        poller.poll(second)
        poller.poll(second)
        first_cursor = Poller(poller.token)
        first_cursor.poll(second)
    assert sorted(poller.found) == sorted(calls) == sorted(first_cursor.found)


def test_a_backup_that_was_restored_and_has_outgrown_the_cursor_is_410(node: Node) -> None:
    """Recovery to a point in time begins a timeline before the cursor's position."""
    poller = Poller(make_token(node))
    with standby_of(node) as backup:
        kept = insert(node, 3)
        poller.poll(node)
        wait_for(lambda: has_replayed(backup, node.value("SELECT pg_current_wal_lsn()")))
        backup.stop()
        lost = insert(node, 3)
        poller.poll(node)
        node.stop()
        backup_configuration = backup.data / "postgresql.auto.conf"
        text = backup_configuration.read_text("utf-8") + "primary_conninfo = ''\n"
        backup_configuration.write_text(text, "utf-8")
        backup.start()
        backup.control("promote")
        new = insert(backup, 30)
        answer = poller.ask(backup)
        assert answer.status_code == 410
        again = Poller(poller.token)
        again.poll(backup)
    assert set(poller.found) == kept | lost
    assert set(again.found) == kept | new


# Failovers at random ----------------------------------------------------------------

ROUNDS = max(3, int(float(os.environ.get("TORTURE_SECONDS", "20")) / 20))


class Ledger:
    """A poller that starts again where it is told to, in this process; and what it has by one line of cursors."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.place = {"from": "2026-01-01"}
        self.times: Counter[str] = Counter()
        self.resyncs = 0

    def poll(self, node: Node) -> None:
        app = create_app({"CDR_API_DSN": node.dsn("cdr_api"), "CDR_API_SYSLOG": "off"})
        response = Client(app, self.token).get("/api/call_feed", fields="xml_cdr_uuid", limit=7, **self.place)
        app.extensions["cdr_api"].close()
        if response.status_code == 410:
            self.resyncs += 1
            self.place, self.times = {"from": problem(response)["data"]["from"]}, Counter()
            return
        assert response.status_code == 200, response.text
        self.place = {"cursor": response.headers["X-Next-Cursor"]}
        self.times.update(call["xml_cdr_uuid"] for call in response.get_json())


def stored(node: Node) -> set[str]:
    with node.connect() as connection:
        return {str(row[0]) for row in connection.execute("SELECT xml_cdr_uuid FROM v_xml_cdr")}


def work(node: Node, ledger: Ledger) -> None:
    """Stores calls and polls, in any order."""
    for step in random.choices(["store", "poll"], k=random.randint(2, 12)):
        if step == "store":
            insert(node, random.randint(1, 10))
        else:
            ledger.poll(node)


def fail_over(node: Node, standby: Node, ledger: Ledger, *, lags: bool) -> None:
    """What the primary does after it was cut off from its standby is lost with it."""
    work(node, ledger)
    if lags:
        wait_for(lambda: has_replayed(standby, node.value("SELECT pg_current_wal_lsn()")))
        standby.execute("ALTER SYSTEM SET primary_conninfo = 'host=/nowhere'")
        standby.execute("SELECT pg_reload_conf()")
        wait_for(lambda: standby.value("SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming'") == 0)
        work(node, ledger)
        node.control("-m", "immediate", "stop")
        standby.control("promote")
    else:
        switch_over(node, standby)
    standby.execute("ALTER SYSTEM RESET primary_conninfo")


def test_failovers_at_random_lose_nothing_in_silence(node: Node) -> None:
    """One after another, most to a standby that lags: at the end the ledger is the table, and no call came twice.

    A call that was delivered and is lost means 410; a clean switchover never does.
    """
    ledger = Ledger(make_token(node))
    ledger.poll(node)  # else a standby could lack the key that signs cursors
    told = []
    with ExitStack() as stack:
        for number in range(ROUNDS):
            standby = stack.enter_context(standby_of(node, f"standby{number}"))
            lags = random.random() < 0.7
            fail_over(node, standby, ledger, lags=lags)
            gone = set(ledger.times) - stored(standby)
            before = ledger.resyncs
            if random.random() < 0.5:  # ids that were given out again are passed, or not yet
                insert(standby, random.randint(1, 30))
            ledger.poll(standby)
            resynced = ledger.resyncs > before
            assert resynced or not gone
            assert lags or not resynced
            told.append((lags, len(gone), resynced))
            node = standby
        for _ in range(2 + len(stored(node)) // 7):  # pages of 7
            ledger.poll(node)
        assert stored(node) == set(ledger.times)
    assert set(ledger.times.values()) <= {1}
    print(*told, sep="\n")  # noqa: T201


# Logical replication ----------------------------------------------------------------


@contextmanager
def subscribed(replica: Node, publisher: Node) -> Iterator[None]:
    source = f"host={publisher.socket} dbname=fusionpbx user=postgres"
    replica.execute(f"CREATE SUBSCRIPTION calls CONNECTION '{source}' PUBLICATION calls")
    try:
        yield
    finally:
        replica.execute("ALTER SUBSCRIPTION calls DISABLE")
        replica.execute("ALTER SUBSCRIPTION calls SET (slot_name = NONE)")
        replica.execute("DROP SUBSCRIPTION calls")


def test_a_logical_replica_vouches_for_no_more_than_it_has_applied() -> None:
    count, running = "SELECT count(*) FROM v_xml_cdr", "SELECT count(*) FROM pg_stat_subscription WHERE pid IS NOT NULL"
    with own_node("wal_level = logical") as publisher, own_node() as replica:
        publisher.execute("CREATE PUBLICATION calls FOR TABLE v_xml_cdr")
        poller = Poller(make_token(replica))
        app = create_app({"CDR_API_DSN": replica.dsn("cdr_api"), "CDR_API_SYSLOG": "off"})
        with subscribed(replica, publisher), serve(replica.dsn("cdr_api")) as gunicorn:

            def through() -> str | None:
                poller.take(poller.ask_service(gunicorn))
                return poller.through

            calls = insert(publisher, 5)
            wait_for(lambda: replica.value(count) == 5)
            wait_for(through)
            assert set(poller.found) == calls
            wait_for(lambda: check(app)[1]["subscription"].startswith("✓"))
            replica.execute("ALTER SUBSCRIPTION calls DISABLE")
            wait_for(lambda: replica.value(running) == 0)
            calls |= insert(publisher, 5)
            assert through() is None  # it cannot be known
            assert check(app)[1]["subscription"].startswith("✗ subscription       fills v_xml_cdr and does not run")
            replica.execute("ALTER SUBSCRIPTION calls ENABLE")
            wait_for(lambda: replica.value(count) == 10)
            through()
            assert set(poller.found) == calls
        app.extensions["cdr_api"].close()
