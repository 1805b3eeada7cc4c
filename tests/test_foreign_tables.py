"""Calls on another server, by postgres_fdw: every route but the feed gives what a plain table gives."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

import demo
from cdr_api import create_app
from tests.commands import check
from tests.conftest import UNTIL, Client, Database, problem

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


@pytest.fixture(scope="module")
def folder(server: demo.PostgresServer) -> Iterator[Path]:
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

    @property
    def dsn(self) -> str:
        return f"postgresql://cdr_api:@/{self.name}?host={self.folder}"

    def connect(self) -> psycopg.Connection[Any]:
        return connect(self.folder, self.name)


@pytest.fixture(scope="module")
def remote(server: demo.PostgresServer, folder: Path) -> Remote:
    """Two databases: elsewhere holds the calls, pbx sees one half of them there and has the other itself."""
    remote = Remote(server, "pbx")
    remote.folder = folder
    with connect(folder) as connection:
        connection.execute("CREATE DATABASE elsewhere")
        connection.execute("CREATE DATABASE pbx")
    for name in ("elsewhere", "pbx"):
        with connect(folder, name) as connection:
            demo.create_tables(connection, demo.NEWEST)
            for domain in demo.DOMAINS:
                demo.add_domain(connection, domain)
            connection.execute((Path(demo.HERE).parent / "schema.sql").read_text("utf-8"))
            connection.execute("ALTER ROLE cdr_api LOGIN")
    with remote.connect() as connection:
        demo.add_calls(connection, 600, until=UNTIL)
        connection.execute("ALTER TABLE v_xml_cdr RENAME TO plain")
        connection.execute("CREATE EXTENSION postgres_fdw")
        source = f"host '{folder}', dbname 'elsewhere'"
        connection.execute(f"CREATE SERVER elsewhere FOREIGN DATA WRAPPER postgres_fdw OPTIONS ({source})")
        login = "user 'postgres', password_required 'false'"
        connection.execute(f"CREATE USER MAPPING FOR PUBLIC SERVER elsewhere OPTIONS ({login})")
        columns = ", ".join(f"{column[0]} {column[1]}" for column in demo.read_release(demo.NEWEST)["v_xml_cdr"])
        connection.execute(
            f"CREATE FOREIGN TABLE far ({columns}) SERVER elsewhere OPTIONS (table_name 'v_xml_cdr');"
            "ALTER FOREIGN TABLE far ALTER xml_cdr_uuid SET NOT NULL"
        )
        connection.execute("INSERT INTO far SELECT * FROM plain")
    return remote


def read_all(remote: Remote, token: str) -> list[bytes]:
    client = Client(create_app({"CDR_API_DSN": remote.dsn, "CDR_API_SYSLOG": "off", "CDR_API_TIMEZONE": "UTC"}), token)
    remote.apps.append(client.app)
    mine = {"domain_name": ALPHA}
    found = [
        client.get("/api/calls", **mine),
        client.get("/api/calls", format="csv", **mine),
        client.get("/api/calls", limit="7", fields="xml_cdr_uuid", **mine),
        client.get("/api/call_range", **mine, **EVER),
        client.get("/api/call_totals", group_by="domain_uuid,day", **EVER),
        client.get("/api/concurrent_calls_by_domain", date="2026-11-02", resolution="60"),
        client.get("/api/active_calls_by_domain", date="2026-11-02", resolution="60"),
    ]
    assert [response.status_code for response in found] == [200] * len(found), found[0].text
    return [response.data for response in found]


WAYS = {
    "a foreign table": "ALTER FOREIGN TABLE far RENAME TO v_xml_cdr",
    "foreign partitions": """
        CREATE TABLE v_xml_cdr (LIKE plain) PARTITION BY RANGE (end_stamp);
        CREATE TABLE new PARTITION OF v_xml_cdr FOR VALUES FROM ('2026-11-01') TO (MAXVALUE);
        INSERT INTO new SELECT * FROM plain WHERE end_stamp >= '2026-11-01';
        DELETE FROM far WHERE end_stamp >= '2026-11-01';
        ALTER TABLE v_xml_cdr ATTACH PARTITION far FOR VALUES FROM (MINVALUE) TO ('2026-11-01')""",
}


def test_every_route_but_the_feed_gives_what_a_plain_table_gives(remote: Remote) -> None:
    remote.execute("ALTER TABLE plain RENAME TO v_xml_cdr")
    remote.execute("GRANT SELECT ON v_xml_cdr TO cdr_api")
    token = remote.account(ALPHA)
    expected = read_all(remote, token)
    assert len(expected[0]) > 50_000
    remote.execute("ALTER TABLE v_xml_cdr RENAME TO plain")
    for way, change in WAYS.items():
        remote.execute(change)
        remote.execute("GRANT SELECT ON v_xml_cdr TO cdr_api")
        assert read_all(remote, token) == expected, way
        client = Client(remote.apps[-1], token)
        refused = client.get("/api/call_feed", **{"from": "2026-01-01"})
        assert refused.status_code == 409
        assert "a foreign table" in problem(refused)["message"]
        assert check(client.app)[1]["tables"].startswith("✗ tables             ")
        if way == "a foreign table":
            remote.execute("ALTER FOREIGN TABLE v_xml_cdr RENAME TO far")
    remote.close()
