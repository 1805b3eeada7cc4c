"""flask user, flask token, flask check: what the operator types."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zoneinfo
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

import cdr_admin
import demo
from tests.commands import check, flask
from tests.conftest import PASSWORD, ROOT, Client, Database, DatabaseMaker


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    return make_database(calls=300, index=True)


@pytest.fixture(scope="module")
def app(database: Database) -> Flask:
    return database.app()


def login(app: Flask, email: str, password: str = PASSWORD) -> Any:
    return Client(app).post("/api/login", json={"email": email, "password": password})


def test_an_account_from_the_cradle_to_the_grave(app: Flask) -> None:
    result = flask(
        app,
        "user",
        "add",
        "Ops@Example.com",
        "--name",
        "Ops",
        "--domain",
        "alpha.example.com",
        "--password-stdin",
        stdin=PASSWORD + "\n",
    )
    assert (result.exit_code, result.output) == (0, "Account 1 for Ops@Example.com made.\n")
    token = login(app, "ops@example.com").get_json()["token"]
    client = Client(app, token)
    assert [row["domain_name"] for row in client.get("/api/domains").get_json()] == ["alpha.example.com"]

    assert flask(app, "user", "grant", "OPS@example.com", "beta.example.com", "gamma.example.com").exit_code == 0
    assert len(client.get("/api/domains").get_json()) == 3
    assert flask(app, "user", "revoke", "ops@example.com", "alpha.example.com").exit_code == 0
    assert [row["domain_name"] for row in client.get("/api/domains").get_json()] == [
        "beta.example.com",
        "gamma.example.com",
    ]
    assert flask(app, "user", "grant", "ops@example.com", "*").exit_code == 0
    assert client.calls()
    listed = flask(app, "user", "list").output.splitlines()
    assert re.fullmatch(r"ID  E-MAIL +NAME  DOMAINS  TOKENS  STATE", listed[0])
    assert re.fullmatch(r"1   Ops@Example.com  Ops   \*        1       enabled", listed[1])
    assert flask(app, "user", "revoke", "ops@example.com", "*").exit_code == 0
    assert client.get("/api/domains").get_json() == []

    new = "another-good-password-2"
    assert flask(app, "user", "password", "ops@example.com", "--password-stdin", stdin=new).exit_code == 0
    assert login(app, "ops@example.com").status_code == 401
    assert login(app, "ops@example.com", new).status_code == 200
    assert client.get("/api/domains").status_code == 200

    assert flask(app, "user", "disable", "ops@example.com").exit_code == 0
    assert client.get("/api/domains").status_code == 401
    assert login(app, "ops@example.com", new).status_code == 401
    assert "disabled" in flask(app, "user", "list").output
    refused = flask(app, "token", "create", "ops@example.com")
    assert (refused.exit_code, refused.output) == (1, "Error: ops@example.com is disabled\n")
    assert flask(app, "user", "enable", "ops@example.com").exit_code == 0
    assert client.get("/api/domains").status_code == 401  # the old token stays dead
    token = login(app, "ops@example.com", new).get_json()["token"]
    assert flask(app, "user", "delete", "ops@example.com").exit_code == 0
    assert Client(app, token).get("/api/domains").status_code == 401
    assert login(app, "ops@example.com", new).status_code == 401
    assert "ops@example.com" not in flask(app, "user", "list").output.lower()


def test_no_address_passes_for_another_in_a_list(database: Database, app: Flask) -> None:
    """And each can be named as the list shows it."""
    shown = {
        "boss@example.com": "boss@example.com",
        "b\u043ess@example.com": r"b\u043ess@example.com",
        "boss\u3164@example.com": r"boss\u3164@example.com",
        "jos\u00e9@example.com": r"jos\xe9@example.com",
        r"b\u043ess@old.example.com": r"b\\u043ess@old.example.com",
    }
    for email in shown:
        database.account(email=email)
    for command in ("user", "token"):
        listed = flask(app, command, "list").output
        assert listed.isascii()
        assert {line.split()[1] for line in listed.splitlines()} >= set(shown.values())
    for i, (email, text) in enumerate(shown.items()):
        for written in (email, text):
            name = demo.DOMAINS[i % 3]
            assert flask(app, "user", "grant", written, name).exit_code == 0
            query = "SELECT count(*) FROM cdr_api.grants JOIN cdr_api.accounts USING (account_id) WHERE email = %s"
            assert database.execute(query, [email]) == [(1,)]
            assert flask(app, "user", "revoke", written, name).exit_code == 0
            assert database.execute(query, [email]) == [(0,)]
    missing = flask(app, "user", "grant", r"\ud800@example.com", "*")
    assert (missing.exit_code, missing.output) == (1, "Error: there is no account \\ud800@example.com\n")
    refused = flask(app, "user", "add", "b\u043es@example.com", "--name", "x", "--password-stdin", stdin=PASSWORD)
    assert (refused.exit_code, "must be an e-mail address" in refused.output) == (1, True)


def test_a_token_is_printed_alone_and_can_be_revoked(database: Database, app: Flask) -> None:
    database.account("alpha.example.com", email="tokens@example.com")
    made = flask(app, "token", "create", "tokens@example.com", "--days", "3")
    assert made.exit_code == 0
    assert re.fullmatch(r"cdr_[\w-]{43}\n", made.output)
    client = Client(app, made.output.strip())
    assert client.calls()
    listed = flask(app, "token", "list", "tokens@example.com").output
    assert made.output.strip() not in listed
    assert len(listed.splitlines()) == 3
    token_id = listed.splitlines()[-1].split()[0]
    assert listed in flask(app, "token", "list").output or "tokens@example.com" in flask(app, "token", "list").output
    assert flask(app, "token", "revoke", token_id).exit_code == 0
    assert client.get("/api/domains").status_code == 401
    again = flask(app, "token", "revoke", token_id)
    assert (again.exit_code, again.output) == (1, f"Error: there is no token {token_id}\n")


def test_a_prompted_password_is_typed_twice(app: Flask) -> None:
    result = flask(
        app, "user", "add", "typed@example.com", "--name", "T", "--all-domains", stdin=f"{PASSWORD}\n{PASSWORD}\n"
    )
    assert result.exit_code == 0
    assert PASSWORD not in result.output
    assert len(Client(app, login(app, "typed@example.com").get_json()["token"]).get("/api/domains").get_json()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["user", "add", "nobody", "--name", "x", "--password-stdin"], "must be an e-mail address"),
        (["user", "add", "weak@example.com", "--name", "x", "--password-stdin"], "the password must have at least"),
        (["user", "grant", "who@example.com", "alpha.example.com"], "there is no account who@example.com"),
        (["user", "grant", "here@example.com", "no.such.domain"], "there is no domain no.such.domain"),
        (["user", "revoke", "here@example.com", "gamma.example.com"], "there is no grant for gamma.example.com"),
        (["user", "delete", "who@example.com"], "there is no account"),
        (["token", "create", "who@example.com"], "there is no account"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_one_line(database: Database, app: Flask, arguments: list[str], message: str) -> None:
    if not database.execute("SELECT 1 FROM cdr_api.accounts WHERE email_key = 'here@example.com'"):
        database.account("alpha.example.com", email="here@example.com")
    before = database.execute("SELECT count(*), (SELECT count(*) FROM cdr_api.grants) FROM cdr_api.accounts")
    result = flask(app, *arguments, stdin="weak\n")
    assert result.exit_code == 1
    assert result.output.startswith("Error: ")
    assert message in result.output
    assert result.output.count("\n") == 1
    assert database.execute("SELECT count(*), (SELECT count(*) FROM cdr_api.grants) FROM cdr_api.accounts") == before


def test_of_several_grants_all_or_none_are_made(database: Database, app: Flask) -> None:
    database.account(email="several@example.com")
    assert flask(app, "user", "grant", "several@example.com", "alpha.example.com", "zz.no.such").exit_code == 1
    rows = database.execute(
        "SELECT 1 FROM cdr_api.grants JOIN cdr_api.accounts USING (account_id) WHERE email = 'several@example.com'"
    )
    assert rows == []


def test_a_grant_of_a_domain_that_is_no_more_goes_by_its_uuid(make_database: DatabaseMaker) -> None:
    database = make_database()
    app = database.app()
    database.account("beta.example.com", email="old@example.com")
    uuid = database.execute("DELETE FROM v_domains WHERE domain_name = 'beta.example.com' RETURNING domain_uuid::text")[
        0
    ][0]
    assert uuid in flask(app, "user", "list").output
    assert flask(app, "user", "revoke", "old@example.com", uuid).exit_code == 0
    assert uuid not in flask(app, "user", "list").output


# Check ------------------------------------------------------------------------


def test_check_is_content_with_a_good_installation(make_database: DatabaseMaker) -> None:
    database = make_database(calls=300, index=True)
    database.account(days=10)
    database.account(days=0)
    status, lines = check(database.app())
    assert status == 0
    assert list(lines) == [
        "registration",
        "CDR_API_DSN",
        "role",
        "connections",
        "replication",
        "side tables",
        "accounts",
        "requests",
        "calls",
        "columns",
        "tables",
        "row security",
        "key",
        "index",
        "lost calls",
        "late calls",
        "durations",
        "importer",
        "stamps",
        "text",
        "feed",
        "timeline",
        "time zone",
        "DateStyle",
        "clock",
    ]
    assert re.match(r"✓ CDR_API_DSN        PostgreSQL \d+", lines["CDR_API_DSN"])
    assert lines["accounts"] == "! accounts           2; 2 live tokens, 1 of them expire within 30 days"
    assert lines["columns"] == "✓ columns            all 66 fields"
    assert lines["time zone"].startswith("✓")
    assert lines["registration"] == "✓ registration       open; a new account may read no domain"
    everybody = check(database.app(CDR_API_REGISTER_DOMAINS="*"))[1]["registration"]
    assert everybody.startswith("! registration       open, and a new account may read EVERY domain")


def test_check_prints_the_index_that_is_missing_and_it_helps(make_database: DatabaseMaker) -> None:
    database = make_database(calls=300)
    status, lines = check(database.app())
    assert status == 1
    create = re.search(r"CREATE INDEX CONCURRENTLY .*;", lines["index"])
    assert lines["index"].startswith("✗")
    assert create
    database.execute(create[0])
    assert check(database.app())[0] == 0
    database.execute("DROP INDEX cdr_api_calls")
    database.execute("CREATE INDEX some_other_name ON v_xml_cdr USING brin (end_stamp)")
    assert check(database.app())[1]["index"].startswith("✓")


def test_check_names_an_index_where_there_are_many_domains(make_database: DatabaseMaker) -> None:
    database = make_database()
    assert "domains" not in check(database.app())[1]
    database.execute(
        "INSERT INTO v_domains (domain_uuid, domain_name)"
        " SELECT gen_random_uuid(), 'other-' || i FROM generate_series(1, 2100) AS i"
    )
    line = check(database.app())[1]["domains"]
    create = re.search(r"CREATE INDEX CONCURRENTLY .*;", line)
    assert line.startswith("!")
    assert create
    database.execute(create[0])
    assert "domains" not in check(database.app())[1]


def test_check_names_an_index_whose_build_was_interrupted(make_database: DatabaseMaker) -> None:
    database = make_database(calls=300, index=True)
    # As an interrupted CREATE INDEX CONCURRENTLY leaves it.
    database.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'cdr_api_calls'::regclass")
    status, lines = check(database.app())
    assert status == 1
    output = flask(database.app(), "check").output
    assert "✗ index              cdr_api_calls is left over from a build that was interrupted" in output
    assert lines["index"].startswith("✗ index              no index serves ranges")


def test_check_counts_the_calls_that_came_too_late_for_the_feed(make_database: DatabaseMaker) -> None:
    database = make_database(calls=30, index=True)
    assert check(database.app())[1]["late calls"].startswith("✓")
    database.insert_call(end_stamp="2026-01-01 00:00:00+00", insert_date="2026-02-14 00:00:00+00")
    database.insert_call(end_stamp="2026-01-01 00:00:00+00", insert_date="2026-02-16 00:00:00+00")
    assert check(database.app())[1]["late calls"].startswith("! late calls         1 were stored")
    assert check(database.app(CDR_API_LOOKBACK_DAYS="60"))[1]["late calls"].startswith("✓")


def test_check_prints_an_index_for_4_x_too(make_database: DatabaseMaker) -> None:
    database = make_database("4.2.2", calls=300)
    status, lines = check(database.app())
    assert status == 1
    assert "sip_call_id" in lines["columns"]
    assert "xml_cdr_uuid" not in lines["columns"]
    create = re.search(r"CREATE INDEX CONCURRENTLY .*;", lines["index"])
    assert create
    database.execute(create[0])
    assert check(database.app())[0] == 0


def test_check_names_what_is_wrong(make_database: DatabaseMaker) -> None:
    database = make_database(calls=300, index=True)
    app = database.app()
    database.execute("GRANT UPDATE ON v_xml_cdr TO cdr_api")
    assert check(app)[1]["role"].startswith("✗ role               cdr_api may write v_xml_cdr or v_domains")
    database.execute("REVOKE UPDATE ON v_xml_cdr FROM cdr_api")
    database.execute("GRANT UPDATE (domain_name) ON v_domains TO cdr_api")
    assert "may write" in check(app)[1]["role"]
    database.execute("REVOKE UPDATE (domain_name) ON v_domains FROM cdr_api")
    assert "localtime" in check(database.app(CDR_API_TIMEZONE="localtime"))[1]["time zone"]
    reads_as_superuser = database.app(CDR_API_CALLS_DSN=database.server.get_uri(database=database.name))
    assert "is a superuser" in check(reads_as_superuser)[1]["role"]
    superuser = database.app(CDR_API_DSN=database.server.get_uri(database=database.name))
    assert "is a superuser" in check(superuser)[1]["role"]
    database.execute("UPDATE cdr_api.version SET version = 0")
    assert check(app)[1]["side tables"].endswith(f"-f {ROOT}/schema.sql")
    database.execute("DROP SCHEMA cdr_api CASCADE")
    status, lines = check(app)
    assert status == 1
    assert lines["side tables"].startswith("✗")
    database.execute("ALTER TABLE v_xml_cdr RENAME TO gone")
    status, lines = check(app)
    assert status == 1
    assert 'relation "v_xml_cdr" does not exist' in lines["role"] or "no table v_xml_cdr" in lines["columns"]
    assert "is this FusionPBX's database?" in lines["columns"]


def test_check_tells_of_two_rules_of_one_time_zone(database: Database, tmp_path: Path) -> None:
    """As when tzdata is older on one of two machines: a range goes by Python's rules, a day by PostgreSQL's."""
    (tmp_path / "Atlantic").mkdir()
    here = next((path for path in map(Path, zoneinfo.TZPATH) if (path / "Atlantic/Azores").is_file()), None)
    if not here:
        pytest.skip("needs the files of time zones; on Debian and Ubuntu: apt install tzdata")
    shutil.copy(here / "Atlantic/Cape_Verde", tmp_path / "Atlantic/Azores")
    app = database.app(CDR_API_TIMEZONE="Atlantic/Azores")
    assert check(app)[1]["time zone"] == "✓ time zone          Atlantic/Azores, by CDR_API_TIMEZONE"
    try:
        zoneinfo.reset_tzpath([str(tmp_path)])
        zoneinfo.ZoneInfo.clear_cache(only_keys=["Atlantic/Azores"])
        line = check(app)[1]["time zone"]
    finally:
        zoneinfo.reset_tzpath()
        zoneinfo.ZoneInfo.clear_cache(only_keys=["Atlantic/Azores"])
    assert line.startswith("✗ time zone          PostgreSQL's rules of Atlantic/Azores differ from ours on ")


def test_check_of_a_server_that_is_away(database: Database) -> None:
    status, lines = check(database.app(CDR_API_CALLS_DSN="host=/nowhere dbname=x"))
    assert status == 1
    assert lines["CDR_API_DSN"].startswith("✓")
    assert lines["CDR_API_CALLS_DSN"].startswith("✗")


def test_flask_finds_the_application_by_itself(database: Database) -> None:
    environ = os.environ | {"CDR_API_DSN": database.dsn}
    done = subprocess.run(
        [sys.executable, "-m", "flask", "check"], cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "✓ index" in done.stdout


def test_every_command_has_a_help_text(app: Flask) -> None:
    for group in (cdr_admin.user, cdr_admin.token):
        for name, command in group.commands.items():
            assert command.help, name
    assert demo.RELEASES[0] == "4.2.2"
