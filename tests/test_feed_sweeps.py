"""The feed with CDR_API_SWEEP_SECONDS: most polls look at some hours, a sweep at the rest; each call comes once."""

from __future__ import annotations

import json
import random
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

import demo
from cdr.feed import SHALLOW
from tests.conftest import Client, Database, DatabaseMaker, problem, wait_for

ALPHA, BETA = demo.DOMAINS[:2]


def days_ago(days: float) -> datetime:
    return datetime.now(UTC) - timedelta(days=days)


class Poller:
    """Follows one feed; of each poll it says whether that may leave something to a sweep.

    The two services, one with the setting and one without, go on from each other's cursors.
    """

    def __init__(self, database: Database, token: str, **query: str) -> None:
        self.shallow = database.client(token, database.app(CDR_API_SWEEP_SECONDS="3600"))
        self.deep = database.client(token, database.app())
        self.query = {"fields": "xml_cdr_uuid", **query}
        self.place = {"from": days_ago(40).isoformat()}
        self.through = datetime.min.replace(tzinfo=UTC)
        self.times: Counter[str] = Counter()

    def ask(self, client: Client) -> Any:
        return client.get("/api/call_feed", **self.query, **self.place)

    def poll(self, *, sweep: bool = False) -> list[str]:
        response = self.ask(self.deep if sweep else self.shallow)
        assert response.status_code == 200, response.text
        self.place = {"cursor": response.headers["X-Next-Cursor"]}
        self.through = datetime.fromisoformat(response.headers["X-Complete-Through"])
        found = [call["xml_cdr_uuid"] for call in json.loads(response.data)]
        self.times.update(found)
        return found

    def sweep_past(self, instant: datetime) -> bool:
        """Whether everything stored by then has been delivered, after one more sweep."""
        self.poll(sweep=True)
        return self.through > instant


@pytest.fixture
def database(make_database: DatabaseMaker) -> Database:
    return make_database(index=True)


def test_what_ended_long_ago_waits_for_the_sweep_and_comes_once(database: Database) -> None:
    poller = Poller(database, database.account(ALPHA))
    old = database.insert_call(end_stamp=days_ago(3))
    assert poller.poll() == [old]  # the first poll looks at everything
    swept = poller.through
    for _ in range(3):
        late, new = database.insert_call(end_stamp=days_ago(10)), database.insert_call(end_stamp=days_ago(0.1))
        assert poller.poll() == [new]
        assert poller.through == swept  # it vouches for nothing that waits
        assert poller.poll() == []
        without_end = database.insert_call(end_stamp=None)
        assert poller.poll(sweep=True) == [late, without_end]
        assert swept < poller.through <= datetime.now(UTC)
        assert poller.poll(sweep=True) == poller.poll() == []
        swept = poller.through


def test_a_sweep_is_made_when_the_last_one_is_as_old_as_the_setting_says(database: Database) -> None:
    token = database.account(ALPHA)
    poller = Poller(database, token)
    poller.poll()
    poller.poll(sweep=True)
    late = database.insert_call(end_stamp=days_ago(10))
    assert poller.poll() == []
    poller.shallow = database.client(token, database.app(CDR_API_SWEEP_SECONDS="1"))
    assert wait_for(poller.poll) == [late]


def test_a_sweep_that_has_to_wait_for_a_writer_promises_nothing_of_it(database: Database) -> None:
    poller = Poller(database, database.account(ALPHA))
    poller.poll()
    with database.connect() as writer, writer.transaction():
        writer.execute("UPDATE v_domains SET domain_description = 'held'")
        held = datetime.now(UTC)
        late = database.insert_call(end_stamp=days_ago(10))
        for sweep in (False, True, True, False):
            assert poller.poll(sweep=sweep) == []
            assert poller.through < held
    assert poller.poll() == []
    assert poller.through < held
    assert poller.poll(sweep=True) == [late]
    assert poller.through > held


def test_a_cursor_that_waits_for_a_sweep_starts_again_from_before_what_waits(database: Database) -> None:
    """410 tells from where; what had not been delivered lies behind it."""
    poller = Poller(database, database.account(ALPHA), direction="inbound")
    poller.poll()
    late = database.insert_call(end_stamp=days_ago(10), direction="inbound")
    assert poller.poll() == []
    poller.query |= {"direction": "inbound,outbound"}
    response = poller.ask(poller.shallow)
    assert response.status_code == 410
    poller.place = {"from": problem(response)["data"]["from"]}
    assert poller.poll() == [late]


# At random ---------------------------------------------------------------------


def choose_end() -> datetime | str | None:
    """Ends on both sides of where a sweep divides, some close to it, and some that are no instant."""
    edge = datetime.now(UTC) - SHALLOW + timedelta(seconds=random.uniform(-0.3, 0.3))
    return random.choice([days_ago(0), days_ago(0), edge, edge, days_ago(30), None, "-infinity"])


def store(connection: psycopg.Connection[Any], release: str) -> None:
    """A call of one of two domains, as a release stores it."""
    end = choose_end()
    key = "xml_cdr_uuid" if release == demo.NEWEST else "uuid"
    columns: dict[str, Any] = {key: uuid.uuid4(), "domain_name": random.choice((ALPHA, BETA)), "end_stamp": end}
    if release != demo.NEWEST:
        columns["end_stamp"] = None
        columns["end_epoch"] = end.timestamp() if isinstance(end, datetime) else None
    names, places = ", ".join(columns), ", ".join(["%s"] * len(columns))
    connection.execute(
        f"INSERT INTO v_xml_cdr (domain_uuid, {names})"
        f" SELECT domain_uuid, {places} FROM v_domains WHERE domain_name = %s",
        [*columns.values(), columns["domain_name"]],
    )


@contextmanager
def writers(database: Database, count: int) -> Iterator[list[psycopg.Connection[Any]]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(psycopg.connect(database.server.get_uri(database=database.name))) for _ in range(count)
        ]


PLAYS: list[tuple[str, dict[str, str], str]] = [
    (demo.NEWEST, {"domain_name": ALPHA}, ""),
    (demo.NEWEST, {}, ""),
    (demo.NEWEST, {"limit": "3"}, ""),
    (demo.NEWEST, {"domain_name": ALPHA, "limit": "2"}, ""),
    (demo.NEWEST, {"limit": "3"}, "ALTER TABLE v_xml_cdr DROP CONSTRAINT v_xml_cdr_pkey"),
    ("4.4.1", {"limit": "3"}, ""),
]


@pytest.mark.parametrize(("release", "query", "change"), PLAYS)
def test_every_call_comes_once_whatever_polls_sweep(
    make_database: DatabaseMaker, release: str, query: dict[str, str], change: str
) -> None:
    """Transactions that overlap and end in any order, polls of both kinds in between, also in the midst of pages."""
    database = make_database(release, index=release == demo.NEWEST)
    if change:
        database.execute(change)
    pollers = [Poller(database, database.account(ALPHA, BETA), **query) for _ in range(2)]
    for poller in pollers:
        poller.poll()
    with writers(database, 3) as connections:
        for _ in range(80):
            connection = random.choice(connections)
            store(connection, release)
            ending = random.random()
            if ending < 0.5:
                (connection.commit if ending < 0.3 else connection.rollback)()
            for poller in pollers:
                if random.random() < 0.4:
                    poller.poll(sweep=random.random() < 0.3)
    due = read_due(database, ALPHA if "domain_name" in query else None)
    assert due
    ended = datetime.now(UTC)
    for poller in pollers:
        wait_for(lambda: poller.sweep_past(ended))  # noqa: B023
        assert set(poller.times) == due
        assert not [call for call, times in poller.times.items() if times > 1]


def read_due(database: Database, domain: str | None) -> set[str]:
    key = "xml_cdr_uuid" if database.release == demo.NEWEST else "uuid"
    statement = f"SELECT {key} FROM v_xml_cdr WHERE %(domain)s::text IS NULL OR domain_name = %(domain)s"
    return {str(row[0]) for row in database.execute(statement, {"domain": domain})}
