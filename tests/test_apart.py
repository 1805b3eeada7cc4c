"""Side tables in a database of their own: every route and command as where they stand beside FusionPBX's tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import psycopg
import pytest
from flask import Flask

import demo
from tests.commands import check, flask
from tests.conftest import PASSWORD, Client, Database, DatabaseMaker, problem, serve, wait_for
from tests.servers import run_schema

ALPHA, BETA, GAMMA = demo.DOMAINS
EVER = {"from": "2026-01-01", "to": "2026-12-31"}
NAMELESS = str(UUID(int=7))  # a call of alpha without a domain_uuid
DROP = (
    "DROP TABLE cdr_api.accounts, cdr_api.grants, cdr_api.tokens, cdr_api.secrets, cdr_api.attempts,"
    " cdr_api.warnings, cdr_api.version;"
)


def side_tables_of(database: Database) -> int:
    return int(database.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'cdr_api'")[0][0])


@dataclass
class Pair:
    """FusionPBX's database, the one of the side tables, and a service with both."""

    fusionpbx: Database
    aside: Database

    def app(self, **settings: str) -> Flask:
        return self.fusionpbx.app(CDR_API_ACCOUNTS_DSN=self.aside.dsn, **settings)

    def run(self, *arguments: str, stdin: str = "") -> str:
        done = flask(self.app(), *arguments, stdin=stdin)
        assert done.exit_code == 0, done.output
        return done.stdout

    def account(self, email: str, *options: str) -> str:
        """A token of a new account, made by the commands."""
        self.run("user", "add", email, "--name", "A", *options, "--password-stdin", stdin=f"{PASSWORD}\n")
        return self.run("token", "create", email).strip()

    def client(self, token: str) -> Client:
        return Client(self.app(), token)


@pytest.fixture(scope="module")
def pair(make_database: DatabaseMaker) -> Pair:
    """FusionPBX has a second gamma.example.com and a call without a domain_uuid; nothing of ours but functions."""
    fusionpbx, aside = make_database(calls=900, index=True), make_database()
    for database in (fusionpbx, aside):
        database.execute("DROP SCHEMA cdr_api CASCADE")
    aside.execute("DROP TABLE v_xml_cdr, v_domains")
    fusionpbx.execute("INSERT INTO v_domains (domain_uuid, domain_name) VALUES (gen_random_uuid(), %s)", [GAMMA])
    fusionpbx.insert_call(xml_cdr_uuid=NAMELESS)
    assert run_schema(fusionpbx, "none") == run_schema(aside, "only") == []
    assert (side_tables_of(fusionpbx), side_tables_of(aside)) == (0, 7)
    return Pair(fusionpbx, aside)


REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/api/domains", {}),
    ("/api/domains", {"format": "csv", "csv_safe": "true"}),
    ("/api/calls", {"domain_name": ALPHA}),
    ("/api/calls", {"domain_uuid": ALPHA}),
    ("/api/calls", {"domain_name": BETA}),
    ("/api/calls", {"domain_name": GAMMA}),
    ("/api/calls", {"domain_name": "no.such.domain"}),
    ("/api/call_range", {"domain_name": ALPHA, "limit": "1000", "fields": "xml_cdr_uuid", **EVER}),
    ("/api/call_totals", {"group_by": "domain_name", **EVER}),
    (f"/api/calls/{NAMELESS}", {}),
    (f"/api/calls/{NAMELESS}/legs", {}),
    ("/api/concurrent_calls_by_domain", {"date": "2026-11-02", "resolution": "60"}),
    ("/api/call_feed", {"from": "2026-01-01", "fields": "xml_cdr_uuid"}),
    ("/api/call_feed", {"from": "2026-01-01", "fields": "xml_cdr_uuid", "domain_name": ALPHA}),
]
READERS = {
    "nothing@example.com": (),
    "alpha@example.com": ("--domain", ALPHA),
    "several@example.com": ("--domain", ALPHA, "--domain", GAMMA),
    "everything@example.com": ("--all-domains",),
}


def ask_all(client: Client, uuids: dict[str, str]) -> list[tuple[int, bytes]]:
    found = []
    for path, values in REQUESTS:
        if "domain_uuid" in values:
            values = {**values, "domain_uuid": uuids[values["domain_uuid"]]}  # noqa: PLW2901 (named by its name above)
        response = client.get(path, **values)
        found.append((response.status_code, response.data))
    return found


def test_every_answer_is_that_of_side_tables_beside(pair: Pair) -> None:
    """Asked of the one service, and then of another whose side tables stand in FusionPBX's database."""
    rows = pair.fusionpbx.execute("SELECT domain_name, domain_uuid::text FROM v_domains")
    uuids: dict[str, str] = dict(rows)
    tokens = {email: pair.account(email, *options) for email, options in READERS.items()}
    apart = {email: ask_all(pair.client(token), uuids) for email, token in tokens.items()}
    run_schema(pair.fusionpbx, "")
    assert side_tables_of(pair.fusionpbx) == 7
    for email, options in READERS.items():
        beside = pair.fusionpbx.app()
        named = ["user", "add", email, "--name", "A", *options, "--password-stdin"]
        assert flask(beside, *named, stdin=f"{PASSWORD}\n").exit_code == 0
        token = flask(beside, "token", "create", email).stdout.strip()
        assert ask_all(Client(beside, token), uuids) == apart[email], email
    assert flask(pair.app(), "user", "list").stdout == flask(pair.fusionpbx.app(), "user", "list").stdout
    pair.fusionpbx.execute(DROP)
    statuses = {email: [status for status, _ in found] for email, found in apart.items()}
    assert statuses["nothing@example.com"] == [200, 200, 403, 403, 403, 403, 403, 403, 200, 404, 404, 200, 200, 403]
    assert statuses["alpha@example.com"] == [200, 200, 200, 200, 403, 403, 403, 200, 200, 200, 200, 200, 200, 200]
    assert statuses["everything@example.com"] == [200, 200, 200, 200, 200, 200, 404, 200, 200, 200, 200, 200, 200, 200]
    calls = [len(json.loads(apart[email][12][1])) for email in READERS]
    assert calls[0] == 0 < calls[1] < calls[2] < calls[3] == 901


def test_grants_and_tokens_are_changed_by_the_commands(pair: Pair) -> None:
    token = pair.account("changed@example.com", "--domain", ALPHA)
    client = pair.client(token)
    assert client.get("/api/calls", domain_name=BETA).status_code == 403
    pair.run("user", "grant", "changed@example.com", BETA)
    assert client.get("/api/calls", domain_name=BETA).status_code == 200
    narrow = pair.client(pair.run("token", "create", "changed@example.com", "--domain", BETA).strip())
    assert [found["domain_name"] for found in narrow.get("/api/domains").get_json()] == [BETA]
    assert narrow.get("/api/calls", domain_name=ALPHA).status_code == 403
    listed = [line for line in pair.run("token", "list", "changed@example.com").splitlines() if BETA in line]
    assert len(listed) == 1
    pair.run("user", "revoke", "changed@example.com", ALPHA)
    assert client.get("/api/calls", domain_name=ALPHA).status_code == 403
    refused = flask(pair.app(), "token", "create", "changed@example.com", "--domain", ALPHA)
    assert "this account may not read alpha.example.com" in refused.output
    refused = flask(pair.app(), "user", "grant", "changed@example.com", "no.such.domain")
    assert "there is no domain no.such.domain" in refused.output


def test_a_grant_ends_the_cursors_from_before_it(pair: Pair) -> None:
    client = pair.client(pair.account("fed@example.com", "--domain", ALPHA))
    cursor = client.get("/api/call_feed", **{"from": "2026-11-18"}).headers["X-Next-Cursor"]
    assert client.get("/api/call_feed", cursor=cursor).status_code == 200
    pair.run("user", "grant", "fed@example.com", BETA)
    answer = client.get("/api/call_feed", cursor=cursor)
    assert answer.status_code == 410
    assert "granted a domain" in problem(answer)["message"]


def test_accounts_are_registered_with_the_domains_of_the_settings(pair: Pair) -> None:
    app = pair.app(CDR_API_REGISTER_DOMAINS=f"{BETA},no.such.domain")
    body = {"name": "R", "email": "r@example.com", "password": PASSWORD, "password_confirmation": PASSWORD}
    made = Client(app).post("/api/register", json=body)
    assert made.status_code == 201, made.text
    client = Client(app, made.get_json()["token"])
    assert [found["domain_name"] for found in client.get("/api/domains").get_json()] == [BETA]
    again = Client(app).post("/api/login", json={"email": "r@example.com", "password": PASSWORD})
    assert again.status_code == 200
    assert client.post("/api/logout").status_code == 200
    assert client.get("/api/domains").status_code == 401


def test_check_looks_at_both(pair: Pair) -> None:
    status, lines = check(pair.app())
    assert status == 0, lines
    subjects = [found["subject"] for found in json.loads(pair.run("check", "--json"))]
    assert subjects.index("CDR_API_ACCOUNTS_DSN") < subjects.index("side tables") < subjects.index("CDR_API_DSN")
    assert lines["side tables"] == "✓ side tables        version 6"
    assert lines["role"].endswith("cdr_api reads v_xml_cdr and v_domains and writes neither")
    wanted = 2 * 2 * 3  # both databases are on one server
    _, lines = check(pair.app(CDR_API_WORKERS="2", CDR_API_THREADS="3"))
    assert f"the service wants up to {wanted};" in lines["connections"]


def test_health_asks_each_database(pair: Pair) -> None:
    app = pair.app()
    assert Client(app).get("/api/health").status_code == 200
    pair.aside.execute("ALTER TABLE cdr_api.tokens RENAME TO away")
    assert Client(app).get("/api/health").status_code == 503
    pair.aside.execute("ALTER TABLE cdr_api.away RENAME TO tokens")
    pair.fusionpbx.execute("ALTER TABLE v_domains RENAME TO away")
    assert Client(app).get("/api/health").status_code == 503
    pair.fusionpbx.execute("ALTER TABLE away RENAME TO v_domains")
    assert Client(app).get("/api/health").status_code == 200


def test_under_gunicorn_one_line_names_the_database_that_is_away(pair: Pair) -> None:
    with serve(pair.fusionpbx.dsn, CDR_API_ACCOUNTS_DSN="host=/nowhere dbname=x") as gunicorn:
        wait_for(lambda: "CDR_API_ACCOUNTS_DSN: no connection" in gunicorn.log.read_text("utf-8"))


# What schema.sql makes --------------------------------------------------------


def test_with_a_publication_of_all_tables_no_side_tables_are_made_beside(make_database: DatabaseMaker) -> None:
    database = make_database()
    database.execute("DROP SCHEMA cdr_api CASCADE")
    database.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    for _ in range(2):
        (warning,) = run_schema(database, "")
        assert warning.startswith("No side tables are made here, since the publication everything takes all tables")
        assert side_tables_of(database) == 0
    status, lines = check(database.app())
    assert status == 1
    assert "publication everything would replicate the side tables" in lines["replication"]
    assert "sudo -u postgres createdb cdr_api && sudo -u postgres psql" in lines["replication"]


def test_every_side_table_has_a_key_and_a_published_one_is_told(make_database: DatabaseMaker) -> None:
    """Side tables from before the publication: the program and schema.sql go on, and check says what to do."""
    database = make_database(index=True)
    query = "SELECT relname FROM pg_class WHERE relnamespace = 'cdr_api'::regnamespace AND relkind = 'r' AND {}"
    no_key = "NOT EXISTS (SELECT FROM pg_index WHERE indrelid = pg_class.oid AND indisprimary)"
    assert database.execute(query.format(no_key)) == []
    assert len(database.execute(query.format("true"))) == 7
    assert check(database.app())[0] == 0
    database.execute("CREATE PUBLICATION ours FOR TABLE cdr_api.accounts, cdr_api.grants")
    token = database.account(ALPHA)
    assert database.client(token).get("/api/domains").status_code == 200
    assert run_schema(database, "") == []
    status, lines = check(database.app())
    assert status == 1
    assert "publication ours replicates the side tables" in lines["replication"]
    aside = make_database()
    status, lines = check(database.app(CDR_API_ACCOUNTS_DSN=aside.dsn))
    assert status == 1
    assert DROP in lines["replication"]
    database.execute(DROP)
    assert check(database.app(CDR_API_ACCOUNTS_DSN=aside.dsn))[0] == 0


def test_an_older_table_of_the_version_gets_its_key(make_database: DatabaseMaker) -> None:
    database = make_database()
    database.execute("DROP TABLE cdr_api.version")
    database.execute("CREATE TABLE cdr_api.version (version integer NOT NULL)")
    database.execute("INSERT INTO cdr_api.version VALUES (4)")
    run_schema(database, "")
    assert check(database.app())[1]["side tables"] == "✓ side tables        version 6"


def test_a_wrong_word_stops_schema_sql(make_database: DatabaseMaker) -> None:
    with pytest.raises(psycopg.errors.RaiseException, match="must be only or none, not elsewhere"):
        run_schema(make_database(), "elsewhere")
