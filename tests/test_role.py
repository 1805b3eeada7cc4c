"""The role of schema.sql reads two tables of FusionPBX's and writes its own, no more."""

from __future__ import annotations

import psycopg
import pytest

import demo
from tests.commands import check
from tests.conftest import ROOT, Database, DatabaseMaker


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    return make_database(calls=30)


def test_the_suite_runs_as_this_role(database: Database) -> None:
    with psycopg.connect(database.dsn) as connection:
        row = connection.execute("SELECT current_user, rolsuper FROM pg_roles WHERE rolname = current_user").fetchone()
    assert row == ("cdr_api", False)


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO v_xml_cdr (xml_cdr_uuid) VALUES (gen_random_uuid())",
        "UPDATE v_xml_cdr SET billsec = 0",
        "DELETE FROM v_xml_cdr",
        "TRUNCATE v_xml_cdr",
        "ALTER TABLE v_xml_cdr ADD x text",
        "DROP TABLE v_xml_cdr",
        "CREATE INDEX ON v_xml_cdr (billsec)",
        "UPDATE v_domains SET domain_name = 'x'",
        "DELETE FROM v_domains",
        "SELECT * FROM v_extensions",
        "SELECT password FROM v_extensions",
        "SELECT description FROM v_extensions",
        "UPDATE v_extensions SET extension = 'x'",
        "SELECT * FROM v_xml_cdr_json",
        "CREATE TABLE public.mine (x int)",
        "CREATE VIEW cdr_api.mine AS SELECT 1",
        "DROP TABLE cdr_api.tokens",
        "UPDATE cdr_api.version SET version = 2",
        "COPY (SELECT 1) TO PROGRAM 'true'",
        "SELECT pg_read_file('/etc/passwd')",
        "CREATE ROLE friend",
    ],
)
def test_what_the_role_may_not_do(database: Database, statement: str) -> None:
    with psycopg.connect(database.dsn) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute(statement)


def test_the_schema_may_be_run_again_and_loses_nothing(database: Database) -> None:
    token = database.account("alpha.example.com")
    tables = ("accounts", "grants", "tokens", "secrets", "version")
    before = [database.execute(f"TABLE cdr_api.{table}") for table in tables]
    with database.connect() as connection:
        connection.execute((ROOT / "schema.sql").read_text("utf-8"))
    assert [database.execute(f"TABLE cdr_api.{table}") for table in tables] == before
    assert database.client(token).calls()


def test_the_schema_fails_whole_where_there_is_no_fusionpbx(server: demo.PostgresServer) -> None:
    with demo.connect(server) as connection:
        connection.execute("CREATE DATABASE empty_of_fusionpbx")
    with demo.connect(server, "empty_of_fusionpbx") as connection, pytest.raises(psycopg.errors.UndefinedTable):
        connection.execute((ROOT / "schema.sql").read_text("utf-8"))
    with demo.connect(server, "empty_of_fusionpbx") as connection:
        assert connection.execute("SELECT 1 FROM pg_namespace WHERE nspname = 'cdr_api'").fetchone() is None


def test_an_archive_without_domains_takes_the_schema_and_serves_the_feed(make_database: DatabaseMaker) -> None:
    """As DEPLOYMENT.md has it; a database without domains is no place for accounts, which flask check tells."""
    database, archive = make_database(calls=30), make_database(calls=60, index=True)
    archive.execute("DROP TABLE v_domains")
    archive.execute("DROP OWNED BY cdr_api")
    archive.execute("DROP SCHEMA cdr_api CASCADE")
    for _ in range(2):
        with archive.connect() as connection:
            connection.execute((ROOT / "schema.sql").read_text("utf-8"))
    app = database.app(CDR_API_CALLS_DSN=archive.dsn)
    client = database.client(database.account("alpha.example.com"), app)
    feed = client.get("/api/call_feed", **{"from": "2026-01-01"})
    assert feed.status_code == 200, feed.text
    assert len(feed.get_json()) == len(client.calls()) > 10
    assert client.get("/api/call_feed", cursor=feed.headers["X-Next-Cursor"]).get_json() == []
    status, lines = check(app)
    assert status == 0, lines
    assert lines["role"].endswith("cdr_api reads v_xml_cdr and writes nothing")
    status, lines = check(archive.app())
    assert status == 1
    assert lines["domains"].startswith("✗ domains            there is no table v_domains")
