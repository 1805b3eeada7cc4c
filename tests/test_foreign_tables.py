"""Calls on another server, by postgres_fdw: every route but the feed gives what a plain table gives."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

import demo
from cdr.check_calls import RANGE_INDEX
from cdr_api import create_app
from tests.commands import check
from tests.conftest import UNTIL, Client, Database, problem, wait_for

SHARE = Path("/usr/share/postgresql")
BIN = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), Path("/nowhere"))
pytestmark = [
    pytest.mark.direct("runs a server of its own"),
    pytest.mark.skipif(
        not (
            BIN.parent.parent.parent.parent / f"share/postgresql/{BIN.parent.name}/extension/postgres_fdw.control"
        ).exists(),
        reason="postgres_fdw is not here; on Debian and Ubuntu: apt install postgresql",
    ),
]
ALPHA = "alpha.example.com"
EVER = {"from": "2026-01-01", "to": "2026-12-31"}


@contextmanager
def start_cluster(server: demo.PostgresServer) -> Iterator[Path]:
    """Where a cluster of Debian's PostgreSQL listens on a socket; the embedded one has no postgres_fdw."""
    folder = Path(tempfile.mkdtemp(prefix="cdr-api-"))
    user = server.system_user  # not root, as which PostgreSQL refuses to run
    if user:
        shutil.chown(folder, user)

    def run(program: str, *options: str) -> None:
        command = [str(BIN / program), "-D", str(folder / "data"), *options]
        quiet = subprocess.DEVNULL
        subprocess.run(command, check=True, user=user, cwd="/", stdout=quiet, stderr=quiet, timeout=120)

    run("initdb", "-U", "postgres", "-E", "UTF8", "--locale=C", "-A", "trust", "-N")
    run("pg_ctl", "-w", "-o", f"-h '' -k {folder} -F", "-l", str(folder / "log"), "start")
    yield folder
    run("pg_ctl", "-w", "-m", "immediate", "stop")
    shutil.rmtree(folder, ignore_errors=True)


def connect(folder: Path, name: str = "postgres") -> psycopg.Connection[Any]:
    return psycopg.connect(f"host={folder} user=postgres dbname={name}", autocommit=True)


class Remote(Database):
    """A database of that cluster, filled like those of the embedded server."""

    folder: Path
    there: Path  # where the other server listens

    @property
    def dsn(self) -> str:
        return f"postgresql://cdr_api:@/{self.name}?host={self.folder}"

    def connect(self) -> psycopg.Connection[Any]:
        return connect(self.folder, self.name)


@pytest.fixture(scope="module")
def remote(server: demo.PostgresServer) -> Iterator[Remote]:
    """Two servers: one holds a table of calls, the other has FusionPBX's database and sees that table as far."""
    with start_cluster(server) as here, start_cluster(server) as there:
        for folder, name in ((here, "pbx"), (there, "elsewhere")):
            with connect(folder) as connection:
                connection.execute(f"CREATE DATABASE {name}")
            with connect(folder, name) as connection:
                demo.create_tables(connection, demo.NEWEST)
                for domain in demo.DOMAINS:
                    demo.add_domain(connection, domain)
                connection.execute((Path(demo.HERE).parent / "schema.sql").read_text("utf-8"))
                connection.execute("ALTER ROLE cdr_api LOGIN")
        with connect(there, "elsewhere") as connection:
            connection.execute(demo.INDEX)
        remote = Remote(server, "pbx")
        remote.folder, remote.there = here, there
        remote.execute("ALTER TABLE v_xml_cdr RENAME TO plain")
        link(remote, there)
        yield remote


def link(remote: Remote, there: Path) -> None:
    """As docs/clusters.md has it."""
    columns = ", ".join(f"{column[0]} {column[1]}" for column in demo.read_release(demo.NEWEST)["v_xml_cdr"])
    options = f"host '{there}', dbname 'elsewhere', fetch_size '5000', batch_size '1000'"
    remote.execute(f"""
        CREATE EXTENSION postgres_fdw;
        CREATE SERVER elsewhere FOREIGN DATA WRAPPER postgres_fdw OPTIONS ({options});
        CREATE USER MAPPING FOR PUBLIC SERVER elsewhere OPTIONS (user 'postgres', password_required 'false');
        CREATE FOREIGN TABLE far ({columns}) SERVER elsewhere OPTIONS (table_name 'v_xml_cdr');
        ALTER FOREIGN TABLE far ALTER xml_cdr_uuid SET NOT NULL""")


def fill(remote: Remote, calls: int) -> None:
    """New calls, the same in the plain table here and in the one there."""
    with remote.connect() as connection:
        connection.execute("TRUNCATE plain")
        connection.execute("DELETE FROM far")
        connection.execute("ALTER TABLE plain RENAME TO v_xml_cdr")
        demo.add_calls(connection, calls, until=UNTIL)
        connection.execute("ALTER TABLE v_xml_cdr RENAME TO plain")
        connection.execute("INSERT INTO far SELECT * FROM plain")


def read_all(remote: Remote, token: str) -> list[bytes]:
    client = Client(create_app({"CDR_API_DSN": remote.dsn, "CDR_API_SYSLOG": "off", "CDR_API_TIMEZONE": "UTC"}), token)
    remote.apps.append(client.app)
    mine = {"domain_name": ALPHA}
    some = [call["xml_cdr_uuid"] for call in client.calls()[::20]]
    found = [
        client.get("/api/calls", **mine),
        client.get("/api/calls", format="csv", **mine),
        client.get("/api/calls", limit="7", fields="xml_cdr_uuid", **mine),
        client.get("/api/call_range", **mine, **EVER),
        client.get("/api/call_totals", group_by="domain_uuid,day", **EVER),
        client.get("/api/concurrent_calls_by_domain", date="2026-11-02", resolution="60"),
        client.get("/api/active_calls_by_domain", date="2026-11-02", resolution="60"),
        client.get("/api/domains"),
        client.post("/api/call_lookup?fields=xml_cdr_uuid,billsec", json={"xml_cdr_uuid": some}),
    ]
    assert [response.status_code for response in found] == [200] * len(found), found[0].text
    return [response.data for response in found]


WAYS = {
    "a foreign table": "ALTER FOREIGN TABLE far RENAME TO v_xml_cdr",
    "foreign partitions": """
        CREATE TABLE v_xml_cdr (LIKE plain) PARTITION BY RANGE (end_stamp);
        CREATE TABLE new PARTITION OF v_xml_cdr FOR VALUES FROM ('2026-11-01') TO (MAXVALUE);
        ALTER TABLE new ADD PRIMARY KEY (xml_cdr_uuid);
        INSERT INTO new SELECT * FROM plain WHERE end_stamp >= '2026-11-01';
        DELETE FROM far WHERE end_stamp >= '2026-11-01';
        ALTER TABLE v_xml_cdr ATTACH PARTITION far FOR VALUES FROM (MINVALUE) TO ('2026-11-01');
        CREATE INDEX ON v_xml_cdr (domain_uuid, end_stamp, xml_cdr_uuid)""",
    "foreign partitions by domain": """
        CREATE TABLE v_xml_cdr (LIKE plain) PARTITION BY LIST (domain_uuid);
        CREATE TABLE new PARTITION OF v_xml_cdr DEFAULT;
        ALTER TABLE new ADD PRIMARY KEY (xml_cdr_uuid);
        INSERT INTO new SELECT * FROM plain WHERE domain_name <> 'alpha.example.com';
        DELETE FROM far WHERE domain_name <> 'alpha.example.com';
        DO $$ BEGIN
            EXECUTE format('ALTER TABLE v_xml_cdr ATTACH PARTITION far FOR VALUES IN (%L)',
                           (SELECT domain_uuid FROM v_domains WHERE domain_name = 'alpha.example.com'));
        END $$;
        CREATE INDEX ON v_xml_cdr (domain_uuid, end_stamp, xml_cdr_uuid)""",
    "a view of a domain there": """
        CREATE TABLE new (LIKE plain INCLUDING INDEXES);
        INSERT INTO new SELECT * FROM plain WHERE domain_name <> 'alpha.example.com';
        DELETE FROM far WHERE domain_name <> 'alpha.example.com';
        DO $$ BEGIN
            EXECUTE format('CREATE VIEW v_xml_cdr AS SELECT * FROM new'
                           ' UNION ALL SELECT * FROM far WHERE domain_uuid = %L',
                           (SELECT domain_uuid FROM v_domains WHERE domain_name = 'alpha.example.com'));
        END $$""",
}

BACK = {
    "a foreign table": "ALTER FOREIGN TABLE v_xml_cdr RENAME TO far",
    "foreign partitions": "ALTER TABLE v_xml_cdr DETACH PARTITION far; DROP TABLE v_xml_cdr",
    "foreign partitions by domain": "ALTER TABLE v_xml_cdr DETACH PARTITION far; DROP TABLE v_xml_cdr",
    "a view of a domain there": "DROP VIEW v_xml_cdr; DROP TABLE new",
}


@contextmanager
def calls_elsewhere(remote: Remote, way: str) -> Iterator[None]:
    """With v_xml_cdr as one of the WAYS, within the block."""
    remote.execute(WAYS[way])
    remote.execute("GRANT SELECT ON v_xml_cdr TO cdr_api")
    yield
    remote.close()
    remote.execute(BACK[way])


INDEX = RANGE_INDEX.format(key="xml_cdr_uuid")
EXPECTED = {
    "a foreign table": f"! index              v_xml_cdr is on another server, where this index has to be: {INDEX}",
    "foreign partitions": f"! index              far is on another server, where this index has to be: {INDEX}",
}
EXPECTED["foreign partitions by domain"] = EXPECTED["foreign partitions"]
EXPECTED["a view of a domain there"] = (
    f"! index              v_xml_cdr is a view, and what it reads has to have this index: {INDEX}"
)


def test_every_route_but_the_feed_gives_what_a_plain_table_gives(remote: Remote) -> None:
    fill(remote, 600)
    remote.execute("ALTER TABLE plain RENAME TO v_xml_cdr")
    remote.execute("GRANT SELECT ON v_xml_cdr TO cdr_api")
    token = remote.account(ALPHA)
    expected = read_all(remote, token)
    assert len(expected[0]) > 50_000
    remote.execute("ALTER TABLE v_xml_cdr RENAME TO plain")
    for way in WAYS:
        fill(remote, 600)
        with calls_elsewhere(remote, way):
            assert read_all(remote, token) == expected, way
            client = Client(remote.apps[-1], token)
            refused = client.get("/api/call_feed", **{"from": "2026-01-01"})
            assert refused.status_code == 409
            assert ("is a view" if "view" in way else "a foreign table") in problem(refused)["message"]
            lines = check(client.app)[1]
            assert lines["tables"].startswith("✗ tables             ")
            assert lines["index"] == EXPECTED[way]


REQUESTS: list[tuple[str, dict[str, str]]] = [
    ("/api/calls", {"domain_name": ALPHA}),
    ("/api/call_range", {"domain_name": ALPHA, "from": "2026-10-01", "to": "2026-10-01"}),  # a short answer
    ("/api/call_totals", EVER),
    ("/api/active_calls_by_domain", {"date": "2026-10-01", "resolution": "60"}),
]


@contextmanager
def rewriting(remote: Remote) -> Iterator[None]:
    """The table on the other server, and until a request waits for it."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    writer, observer = (connect(remote.there, "elsewhere") for _ in range(2))
    with writer, observer, writer.transaction():
        writer.execute("ALTER TABLE v_xml_cdr ALTER waitsec TYPE numeric USING waitsec + 0")
        yield
        wait_for(lambda: observer.execute(waiting).fetchall())


def test_calls_that_are_being_rewritten_on_the_other_server_do_not_look_gone(remote: Remote) -> None:
    """As they do to postgres_fdw, whose snapshot is older than its lock."""
    for way in WAYS:
        fill(remote, 600)
        with calls_elsewhere(remote, way):
            client = Client(remote.app(CDR_API_TIMEZONE="UTC"), remote.account(ALPHA))
            for path, values in REQUESTS:
                expected = client.get(path, **values).data
                with ThreadPoolExecutor() as pool:
                    with rewriting(remote):
                        future = pool.submit(client.get, path, **values)
                    assert future.result().data == expected


def test_check_tells_of_domains_on_another_server(remote: Remote) -> None:
    """They look gone while that rewrites them; nothing locks them there."""
    columns = ", ".join(f"{name} {kind}" for name, kind, *_ in demo.read_release(demo.NEWEST)["v_domains"])
    remote.execute("ALTER TABLE v_domains RENAME TO plain_domains")
    remote.execute(f"CREATE FOREIGN TABLE v_domains ({columns}) SERVER elsewhere OPTIONS (table_name 'v_domains')")
    remote.execute("GRANT SELECT ON v_domains TO cdr_api")
    line = check(remote.app())[1]["domains"]
    remote.execute("DROP FOREIGN TABLE v_domains; ALTER TABLE plain_domains RENAME TO v_domains")
    assert line.startswith("✗ domains            v_domains is a foreign table: while its server rewrites it")
    assert "CDR_API_CALLS_DSN" in line


# How long it takes ------------------------------------------------------------

TIMED: list[tuple[str, dict[str, str]]] = [
    ("/api/call_range", {"domain_name": ALPHA, "from": "2026-09-02", "to": "2026-09-02"}),
    ("/api/call_range", {"domain_name": ALPHA, "from": "2026-11-12", "to": "2026-11-12"}),
    ("/api/call_range", {"domain_name": ALPHA, "from": "2026-09-01", "to": "2026-09-30"}),
    ("/api/calls", {"domain_name": ALPHA, "limit": "1000"}),
    ("/api/call_totals", {"from": "2026-09-01", "to": "2026-09-30"}),
    ("/api/concurrent_calls_by_domain", {"date": "2026-09-02", "resolution": "60"}),
]


def measure(remote: Remote, token: str) -> list[tuple[int, float]]:
    """The bytes of each answer, and the milliseconds of the fastest of five."""
    client = remote.client(token, remote.app(CDR_API_TIMEZONE="UTC"))
    found = []
    for path, values in TIMED:
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            response = client.get(path, **values)
            size = len(response.data)
            times.append(time.perf_counter() - begun)
            assert response.status_code == 200
        found.append((size, 1000 * min(times)))
    return found


@pytest.mark.cluster
def test_how_long_two_servers_take(remote: Remote) -> None:
    """Prints the figures of docs/clusters.md; the answers are the same."""
    fill(remote, 30_000)
    remote.execute("ALTER TABLE plain RENAME TO v_xml_cdr")
    remote.execute("GRANT SELECT ON v_xml_cdr TO cdr_api")
    remote.execute("CREATE INDEX ON v_xml_cdr (domain_uuid, end_stamp, xml_cdr_uuid)")
    token = remote.account(ALPHA)
    one = measure(remote, token)
    remote.close()
    remote.execute("ALTER TABLE v_xml_cdr RENAME TO plain")
    with calls_elsewhere(remote, "foreign partitions"):
        remote.execute("ANALYZE v_xml_cdr")
        two = measure(remote, token)
    assert [size for size, _ in two] == [size for size, _ in one]
    for (path, values), (size, alone), (_, both) in zip(TIMED, one, two, strict=True):
        print(f"{path} {values} {size / 1000:.0f} kB: {alone:.0f} ms, over two servers {both:.0f} ms")  # noqa: T201
