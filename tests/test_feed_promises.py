"""What the feed vouches for: nothing that is stored is left out in silence, whatever comes between two polls."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from cdr.feed import MOST_NAMES
from cdr.statements import STATEMENTS
from tests.commands import check
from tests.conftest import Client, Database, DatabaseMaker, problem, wait_for

ALPHA, BETA = "alpha.example.com", "beta.example.com"


def days_ago(days: float) -> str:
    return (datetime.now(UTC) - timedelta(days=days)).isoformat()


class Poller:
    """Keeps the cursor of one feed, and everything that came."""

    def __init__(self, client: Client, since: str, **parameters: str) -> None:
        self.client = client
        self.parameters = parameters
        self.place = {"from": since}
        self.headers: dict[str, str] = {}
        self.found: list[str] = []

    def ask(self) -> Any:
        return self.client.get("/api/call_feed", fields="xml_cdr_uuid", **self.place, **self.parameters)

    def poll(self) -> list[str]:
        response = self.ask()
        assert response.status_code == 200, response.text
        self.headers = dict(response.headers)
        self.place = {"cursor": response.headers["X-Next-Cursor"]}
        new = [call["xml_cdr_uuid"] for call in json.loads(response.data)]
        self.found += new
        return new

    def refused(self) -> str:
        """The sentence of a 410, which says where to start again."""
        response = self.ask()
        assert response.status_code == 410, response.text
        assert problem(response)["data"]["from"] == response.headers["X-Restart-From"]
        return str(problem(response)["message"])


@pytest.fixture
def database(make_database: DatabaseMaker) -> Database:
    return make_database(index=True)


@pytest.fixture
def client(database: Database) -> Client:
    return database.client(database.account(ALPHA, BETA))


@contextmanager
def open_writer(database: Database) -> Iterator[psycopg.Connection[Any]]:
    """A transaction that has written and does not end: it holds the horizon."""
    with psycopg.connect(database.server.get_uri(database=database.name)) as writer:
        writer.execute("UPDATE v_domains SET domain_description = 'held'")
        yield writer


# What lies before the first poll, and how far the feed looks back ---------------


@pytest.mark.parametrize("held", [False, True], ids=["", "with a writer left open"])
@pytest.mark.parametrize("since", [0.001, 1, 30], ids=["a minute", "a day", "30 days"])
def test_calls_that_ended_before_a_recent_from_and_are_stored_after_it_come(
    database: Database, client: Client, since: float, *, held: bool
) -> None:
    before = database.insert_call(end_stamp=days_ago(since + 1))
    poller = Poller(client, days_ago(since))

    def store_late_calls() -> list[str]:
        return [database.insert_call(end_stamp=days_ago(since + days)) for days in (0.01, 2, 10, 14)]

    if held:
        with open_writer(database):
            assert poller.poll() == []
            late = store_late_calls()
            poller.poll()
            late += store_late_calls()
            poller.poll()
    else:
        assert poller.poll() == []
        late = store_late_calls()
    poller.poll()
    poller.poll()
    assert sorted(poller.found) == sorted(late)
    assert before not in poller.found  # stored before the first poll, which did not ask for it


def test_the_look_back_counts_from_what_was_delivered(database: Database) -> None:
    """While a writer holds the horizon nothing is delivered, so the look-back stands still too."""
    app = database.app(CDR_API_LOOKBACK_DAYS="1")
    poller = Poller(database.client(database.account(ALPHA), app), days_ago(30))
    poller.poll()
    with open_writer(database):
        late = database.insert_call(end_stamp=days_ago(0.999))
        for _ in range(3):
            poller.poll()
    wait_for(lambda: late in poller.poll() or late in poller.found)
    assert poller.found == [late]


def test_a_clock_that_was_ahead_for_one_poll_costs_nothing(database: Database) -> None:
    """The server's now() is 60 days ahead: of the service's clock and of it the earlier counts."""
    poller = Poller(database.client(database.account(ALPHA, days=0)), days_ago(30))
    poller.poll()
    database.execute("CREATE SCHEMA ahead")
    for name in ("now", "clock_timestamp"):
        database.execute(
            f"CREATE FUNCTION ahead.{name}() RETURNS timestamptz LANGUAGE sql AS"
            f" $$SELECT pg_catalog.{name}() + interval '60 days'$$"
        )
    database.execute("GRANT USAGE ON SCHEMA ahead TO cdr_api")
    path = "ALTER ROLE cdr_api IN DATABASE {} {} search_path"
    database.execute(path.format(f'"{database.name}"', "SET") + " = ahead, pg_catalog, public")
    database.close()
    other = Poller(database.client(poller.client.token), "")
    other.place = poller.place
    other.poll()
    through = datetime.fromisoformat(other.headers["X-Complete-Through"])
    assert through < datetime.now(UTC) + timedelta(minutes=1)
    database.execute(path.format(f'"{database.name}"', "RESET"))
    database.close()
    late = [database.insert_call(end_stamp=days_ago(days)) for days in (1, 10, 20, 30, 40)]
    last = Poller(database.client(poller.client.token), "")
    last.place = other.place
    assert sorted(last.poll()) == sorted(late)


# Domains ------------------------------------------------------------------------


def test_what_becomes_of_domains_ends_no_cursor(database: Database, client: Client) -> None:
    poller, everything = (
        Poller(client, days_ago(30)),
        Poller(database.client(database.account(all_domains=True)), "2026"),
    )
    everything.place = {"from": days_ago(30)}
    poller.poll()
    everything.poll()
    alpha = str(database.execute("SELECT domain_uuid FROM v_domains WHERE domain_name = %s", [ALPHA])[0][0])
    named = Poller(client, days_ago(30), domain_uuid=alpha)
    named.poll()
    database.execute("UPDATE v_domains SET domain_name = 'new.example.com' WHERE domain_name = %s", [ALPHA])
    database.execute("DELETE FROM v_domains WHERE domain_name = %s", [BETA])
    call = database.insert_call(domain_uuid=alpha, domain_name=ALPHA, end_stamp=days_ago(1))
    assert poller.poll() == named.poll() == everything.poll() == [call]


def test_a_name_given_to_older_calls_without_uuid_is_told(database: Database, client: Client) -> None:
    """They belong to the domain now, and were stored before the cursor."""
    database.insert_call(domain_uuid=None, domain_name="new.example.com", end_stamp=days_ago(1))
    poller = Poller(client, days_ago(30))
    poller.poll()
    database.execute("UPDATE v_domains SET domain_name = 'other.example.com' WHERE domain_name = %s", [BETA])
    assert poller.poll() == []
    database.execute("UPDATE v_domains SET domain_name = 'new.example.com' WHERE domain_name = %s", [ALPHA])
    assert "name of older calls" in poller.refused()


def test_a_domain_that_was_missing_and_is_back_is_told(database: Database) -> None:
    """As while v_domains is loaded again: what was stored meanwhile was passed over."""
    some, chosen = (database.client(database.account(ALPHA, BETA)), database.client(database.account(all_domains=True)))
    uuids = dict(database.execute("SELECT domain_name, domain_uuid FROM v_domains"))
    database.execute(
        "UPDATE cdr_api.tokens SET domain_uuids = %s WHERE token_id = (SELECT max(token_id) FROM cdr_api.tokens)",
        [[uuids[ALPHA], uuids[BETA]]],
    )
    pollers = [Poller(client, days_ago(30), limit="1") for client in (some, chosen)]
    for domain, pages in ((ALPHA, 1), (BETA, 2)):
        for poller in pollers:
            poller.place = {"from": days_ago(30)}
            poller.poll()
        database.execute("CREATE TABLE gone AS SELECT * FROM v_domains WHERE domain_name = %s", [domain])
        calls = [database.insert_call(domain_uuid=uuids[name], end_stamp=days_ago(1)) for name in (ALPHA, BETA)]
        calls += [database.insert_call(domain_uuid=uuids[domain], end_stamp=days_ago(0.5))]
        for poller in pollers if pages == 2 else []:
            assert poller.poll() == calls[:1]
        database.execute("DELETE FROM v_domains WHERE domain_name = %s", [domain])
        for poller in pollers:
            poller.poll()
        database.execute("INSERT INTO v_domains SELECT * FROM gone")
        assert ["is there again" in poller.refused() for poller in pollers] == [True, True]
        database.execute("DROP TABLE gone; DELETE FROM v_xml_cdr")


def test_many_domains_that_were_missing_are_told_too(database: Database) -> None:
    uuids = [f"10000000-0000-4000-8000-{number:012d}" for number in range(MOST_NAMES + 1)]
    client = database.client(database.account(ALPHA, email="many@example.com"))
    database.execute(
        "INSERT INTO cdr_api.grants (account_id, domain_uuid) SELECT account_id, unnest(%s::uuid[])"
        " FROM cdr_api.accounts WHERE email = 'many@example.com'",
        [uuids],
    )
    database.insert_call(domain_uuid=uuids[0], end_stamp=days_ago(1))
    poller = Poller(client, days_ago(30))
    assert poller.poll() == poller.poll() == []
    come_back = "INSERT INTO v_domains (domain_uuid, domain_name) VALUES (%s, %s)"
    database.execute(come_back, [uuids[1], "without.example.com"])  # which has no calls
    assert poller.poll() == []
    database.execute(come_back, [uuids[0], "back.example.com"])
    assert "is there again" in poller.refused()


def test_what_an_account_could_not_read_for_one_page_is_told(database: Database) -> None:
    """It could when the window was opened, and can again."""
    token = database.account(all_domains=True, email="less@example.com")
    poller = Poller(database.client(token), days_ago(30), limit="1")
    poller.poll()
    uuids = dict(database.execute("SELECT domain_name, domain_uuid FROM v_domains"))
    calls = [
        database.insert_call(domain_uuid=uuids[name], end_stamp=days_ago(days))
        for name, days in ((ALPHA, 3), (BETA, 2), (ALPHA, 1))
    ]
    assert poller.poll() == calls[:1]
    database.execute(
        "INSERT INTO cdr_api.grants (account_id, domain_uuid) SELECT account_id, %s FROM cdr_api.accounts"
        " WHERE email = 'less@example.com'",
        [uuids[ALPHA]],
    )
    rights = "UPDATE cdr_api.accounts SET all_domains = {} WHERE email = 'less@example.com'"
    database.execute(rights.format("false"))
    assert poller.poll() == calls[2:]
    database.execute(rights.format("true"))
    assert "granted a domain" in poller.refused()


def test_a_name_that_was_another_for_one_page_is_told(database: Database, client: Client) -> None:
    poller = Poller(client, days_ago(30), limit="1")
    poller.poll()
    alpha = database.execute("SELECT domain_uuid FROM v_domains WHERE domain_name = %s", [ALPHA])[0][0]
    calls = [
        database.insert_call(domain_uuid=uuid, end_stamp=days_ago(days))
        for uuid, days in ((alpha, 3), (None, 2), (alpha, 1))
    ]
    assert poller.poll() == calls[:1]
    database.execute("UPDATE v_domains SET domain_name = 'new.example.com' WHERE domain_uuid = %s", [alpha])
    assert poller.poll() == calls[2:]
    database.execute("UPDATE v_domains SET domain_name = %s WHERE domain_uuid = %s", [ALPHA, alpha])
    assert "name of older calls" in poller.refused()


def test_of_two_grants_at_once_none_is_missed(database: Database) -> None:
    """The ids of grants are given out in the order in which the grants are seen."""
    token = database.account(ALPHA, email="two@example.com")
    (account_id,) = database.execute("SELECT account_id FROM cdr_api.accounts WHERE email = 'two@example.com'")[0]
    uuids = dict(database.execute("SELECT domain_name, domain_uuid FROM v_domains"))
    database.insert_call(domain_uuid=uuids[BETA], end_stamp=days_ago(1))
    poller = Poller(database.client(token), days_ago(30))

    def grant(connection: psycopg.Connection[Any], domain: str) -> None:
        connection.execute(STATEMENTS["upsert_grants"], {"account_id": account_id, "domain_uuids": [uuids[domain]]})

    waiting = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
    with database.connect() as first, database.connect() as second, ThreadPoolExecutor() as pool:
        with first.transaction():
            grant(first, BETA)
            future = pool.submit(grant, second, "gamma.example.com")
            wait_for(lambda: future.done() or database.execute(waiting, [database.name]))
            assert poller.poll() == []
        future.result()
    assert "granted a domain" in poller.refused()


# Rows that nobody may see ---------------------------------------------------------

ROUTES: list[tuple[str, dict[str, str]]] = [
    ("/api/calls", {"domain_name": ALPHA}),
    ("/api/calls", {"domain_name": ALPHA, "limit": "1"}),
    ("/api/call_range", {"domain_name": ALPHA, "from": "2026-02-03", "to": "2026-02-03"}),
    ("/api/call_feed", {"from": "2026-02-03"}),
    ("/api/call_totals", {"from": "2026-02-03", "to": "2026-02-03"}),
    ("/api/concurrent_calls_by_domain", {"date": "2026-02-03"}),
    ("/api/active_calls_by_domain", {"date": "2026-02-03"}),
]


@pytest.mark.parametrize("policy", [None, "USING (true)", "USING (billsec > 100)"])
def test_a_policy_that_may_hide_rows_is_an_error(database: Database, client: Client, policy: str | None) -> None:
    database.insert_call()
    database.execute("ALTER TABLE v_xml_cdr ENABLE ROW LEVEL SECURITY")
    if policy:
        database.execute(f"CREATE POLICY hidden ON v_xml_cdr {policy}")
    for path, parameters in ROUTES:
        response = client.get(path, **parameters)
        assert response.status_code == 503, path
        assert "row-level security" in problem(response)["message"]
    assert client.post("/api/call_lookup", json={"xml_cdr_uuid": [days_uuid()]}).status_code == 503
    assert check(client.app)[1]["row security"].startswith("✗ row security       a policy may hide rows of v_xml_cdr")


def days_uuid() -> str:
    return "00000000-0000-4000-8000-000000000001"


def test_a_policy_of_the_domains_is_an_error_too(database: Database, client: Client) -> None:
    database.execute("ALTER TABLE v_domains ENABLE ROW LEVEL SECURITY")
    database.close()  # a new session has the role's settings
    for path, parameters in ROUTES:
        assert Client(database.app(), client.token).get(path, **parameters).status_code == 503
    assert check(client.app)[1]["row security"].startswith("✗ row security       a policy may hide rows of v_domains")


# Tables ---------------------------------------------------------------------------

Change = Callable[[Database], None]


def as_view(database: Database) -> None:
    database.execute("ALTER TABLE v_xml_cdr RENAME TO real")
    database.execute("CREATE VIEW v_xml_cdr AS SELECT * FROM real")


def as_materialized_view(database: Database) -> None:
    database.execute("ALTER TABLE v_xml_cdr RENAME TO real")
    database.execute("CREATE MATERIALIZED VIEW v_xml_cdr AS SELECT * FROM real")


def as_distributed(database: Database) -> None:
    """As Citus lists what it distributes."""
    database.execute("CREATE TABLE pg_dist_partition (logicalrelid regclass)")
    database.execute("INSERT INTO pg_dist_partition VALUES ('v_xml_cdr')")
    database.execute("GRANT SELECT ON pg_dist_partition TO cdr_api")


def as_child(database: Database) -> None:
    """With a partition that is a view's like: a foreign table, which nobody needs to reach to be told."""
    database.execute("CREATE FOREIGN DATA WRAPPER nowhere")
    database.execute("CREATE SERVER elsewhere FOREIGN DATA WRAPPER nowhere")
    database.execute("CREATE FOREIGN TABLE remote () INHERITS (v_xml_cdr) SERVER elsewhere")
    database.execute("GRANT SELECT ON remote TO cdr_api")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (as_view, "a view"),
        (as_materialized_view, "a materialized view"),
        (as_distributed, "a distributed table"),
        (as_child, "a foreign table"),
    ],
)
def test_where_a_row_does_not_tell_who_wrote_it_the_feed_is_refused(
    make_database: DatabaseMaker, change: Change, kind: str
) -> None:
    database = make_database(calls=300, index=True)
    client = database.client(database.account(ALPHA))
    every = {"domain_name": ALPHA, "from": "2026-01-01", "to": "2026-12-31"}
    rest = [(path, every) for path in ("/api/call_range", "/api/call_totals")]
    rest += [("/api/calls", {"domain_name": ALPHA}), ("/api/concurrent_calls_by_domain", {"date": "2026-11-02"})]
    before = [client.get(path, **parameters).data for path, parameters in rest]
    assert all(len(text) > 50 for text in before)
    change(database)
    database.execute("GRANT SELECT ON v_xml_cdr TO cdr_api")
    database.close()
    client = database.client(client.token)
    response = client.get("/api/call_feed", **{"from": "2026-01-01"})
    assert response.status_code == 409
    assert kind in problem(response)["message"]
    assert kind in check(client.app)[1]["tables"]
    assert check(client.app)[1]["tables"].startswith("✗")
    if change is not as_child:  # whose server is not there
        assert [client.get(path, **parameters).data for path, parameters in rest] == before


PARTITIONED = """
    ALTER TABLE v_xml_cdr RENAME TO plain;
    CREATE TABLE v_xml_cdr (LIKE plain) PARTITION BY RANGE (end_stamp);
    ALTER TABLE v_xml_cdr ADD PRIMARY KEY (xml_cdr_uuid, end_stamp);
    CREATE TABLE february PARTITION OF v_xml_cdr FOR VALUES FROM ('2026-02-01') TO ('2026-03-01');
    GRANT SELECT ON v_xml_cdr TO cdr_api;
"""


@pytest.fixture
def partitioned(make_database: DatabaseMaker) -> Database:
    database = make_database()
    database.execute(PARTITIONED)
    return database


def test_a_new_partition_ends_no_cursor_and_one_with_older_calls_does(partitioned: Database) -> None:
    database = partitioned
    poller = Poller(database.client(database.account(ALPHA)), "2026-01-01")
    first = database.insert_call()
    assert poller.poll() == [first]
    database.execute("CREATE TABLE march PARTITION OF v_xml_cdr FOR VALUES FROM ('2026-03-01') TO ('2026-04-01')")
    second = database.insert_call(end_stamp="2026-03-03 10:00:00+00")
    assert poller.poll() == [second]
    database.execute("CREATE TABLE april (LIKE v_xml_cdr INCLUDING ALL)")
    database.execute(
        "INSERT INTO april (xml_cdr_uuid, domain_name, end_stamp) VALUES (gen_random_uuid(), %s, '2026-04-04')", [ALPHA]
    )
    assert poller.poll() == []
    database.execute("ALTER TABLE v_xml_cdr ATTACH PARTITION april FOR VALUES FROM ('2026-04-01') TO ('2026-05-01')")
    assert "older calls" in poller.refused()
    again = Poller(poller.client, "2026-01-01")
    assert len(again.poll()) == 3
    database.execute("ALTER TABLE v_xml_cdr DETACH PARTITION february")  # an old month goes to the archive
    assert again.poll() == []
    assert check(poller.client.app)[1]["tables"] == "✓ tables             v_xml_cdr is a plain table of 2 partitions"


def test_a_table_that_takes_the_place_of_another_is_told_if_it_has_older_calls(database: Database) -> None:
    poller = Poller(database.client(database.account(ALPHA)), "2026-01-01")
    calls = [database.insert_call() for _ in range(3)]
    assert sorted(poller.poll()) == sorted(calls)
    swap = "BEGIN; ALTER TABLE v_xml_cdr RENAME TO before; {}; GRANT SELECT ON v_xml_cdr TO cdr_api; COMMIT"
    database.execute(swap.format("CREATE TABLE v_xml_cdr (LIKE before INCLUDING ALL)"))
    database.execute("INSERT INTO v_xml_cdr SELECT * FROM before")  # as a restored dump does
    assert sorted(poller.poll()) == sorted(calls)  # each is another row
    database.execute("ALTER TABLE v_xml_cdr RENAME TO after; ALTER TABLE before RENAME TO v_xml_cdr")
    assert "older calls" in poller.refused()


def test_a_new_partition_with_partitions_of_older_calls_is_told(partitioned: Database) -> None:
    database = partitioned
    poller = Poller(database.client(database.account(ALPHA)), "2026-01-01")
    database.execute("CREATE TABLE april (LIKE v_xml_cdr) PARTITION BY RANGE (end_stamp)")
    database.execute("CREATE TABLE week PARTITION OF april FOR VALUES FROM ('2026-04-01') TO ('2026-04-08')")
    insert = "INSERT INTO april (xml_cdr_uuid, domain_name, end_stamp) VALUES (gen_random_uuid(), %s, '2026-04-04')"
    database.execute(insert, [ALPHA])
    assert poller.poll() == poller.poll() == []
    database.execute("ALTER TABLE v_xml_cdr ATTACH PARTITION april FOR VALUES FROM ('2026-04-01') TO ('2026-05-01')")
    assert "older calls" in poller.refused()


def test_a_partitioned_table_of_older_calls_in_the_place_of_another_is_told(database: Database) -> None:
    poller = Poller(database.client(database.account(ALPHA)), "2026-01-01")
    database.execute(PARTITIONED)
    database.insert_call()
    database.execute("ALTER TABLE v_xml_cdr RENAME TO later; ALTER TABLE plain RENAME TO v_xml_cdr")
    assert poller.poll() == poller.poll() == []
    database.execute("ALTER TABLE v_xml_cdr RENAME TO plain; ALTER TABLE later RENAME TO v_xml_cdr")
    assert "older calls" in poller.refused()


@pytest.mark.parametrize("is_first", [True, False], ids=["the first", "a later one"])
def test_what_becomes_a_part_in_the_middle_of_a_window_is_told(partitioned: Database, *, is_first: bool) -> None:
    """Pages of the window have passed over the place of its calls."""
    database = partitioned
    poller = Poller(database.client(database.account(ALPHA)), "2026-01-01", limit="1")
    if not is_first:
        poller.poll()
    calls = [database.insert_call(end_stamp=f"2026-02-03 10:00:0{second}+00") for second in range(3)]
    database.execute("CREATE TABLE january (LIKE v_xml_cdr INCLUDING ALL)")
    insert = "INSERT INTO january (xml_cdr_uuid, domain_name, end_stamp) VALUES (gen_random_uuid(), %s, '2026-01-04')"
    database.execute(insert, [ALPHA])
    assert poller.poll() == calls[:1]
    database.execute("CREATE TABLE march PARTITION OF v_xml_cdr FOR VALUES FROM ('2026-03-01') TO ('2026-04-01')")
    assert poller.poll() == calls[1:2]
    database.execute("ALTER TABLE v_xml_cdr ATTACH PARTITION january FOR VALUES FROM ('2026-01-01') TO ('2026-02-01')")
    assert "older calls" in poller.refused()


def test_a_table_that_was_another_for_one_page_is_told(database: Database) -> None:
    poller = Poller(database.client(database.account(ALPHA)), "2026-01-01", limit="1")
    calls = [database.insert_call(end_stamp=f"2026-02-03 10:00:0{second}+00") for second in range(3)]
    assert poller.poll() == calls[:1]
    database.execute("ALTER TABLE v_xml_cdr RENAME TO before; CREATE TABLE v_xml_cdr (LIKE before INCLUDING ALL)")
    database.execute("GRANT SELECT ON v_xml_cdr TO cdr_api")
    assert poller.poll() == []
    database.execute("ALTER TABLE v_xml_cdr RENAME TO after; ALTER TABLE before RENAME TO v_xml_cdr")
    assert "older calls" in poller.refused()


def test_a_part_that_was_away_for_one_page_is_told(partitioned: Database) -> None:
    database = partitioned
    poller = Poller(database.client(database.account(ALPHA)), "2026-01-01", limit="1")
    database.execute("CREATE TABLE march PARTITION OF v_xml_cdr FOR VALUES FROM ('2026-03-01') TO ('2026-04-01')")
    calls = [database.insert_call(end_stamp=f"2026-0{month}-03 10:00:00+00") for month in (2, 2, 3)]
    assert poller.poll() == calls[:1]
    database.execute("ALTER TABLE v_xml_cdr DETACH PARTITION february")
    assert poller.poll() == calls[2:]
    database.execute("ALTER TABLE v_xml_cdr ATTACH PARTITION february FOR VALUES FROM ('2026-02-01') TO ('2026-03-01')")
    assert "older calls" in poller.refused()


def test_a_name_given_to_older_calls_between_pages_is_told(database: Database, client: Client) -> None:
    alpha = database.execute("SELECT domain_uuid FROM v_domains WHERE domain_name = %s", [ALPHA])[0][0]
    database.insert_call(domain_uuid=None, domain_name="new.example.com", end_stamp=days_ago(3))
    calls = [database.insert_call(domain_uuid=alpha, end_stamp=days_ago(days)) for days in (2, 1)]
    poller = Poller(client, days_ago(30), limit="1")
    assert poller.poll() == calls[:1]
    database.execute("UPDATE v_domains SET domain_name = 'new.example.com' WHERE domain_uuid = %s", [alpha])
    assert "name of older calls" in poller.refused()
