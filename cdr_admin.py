"""The commands of the operator: flask user, flask token, flask check.

They are part of the application of cdr_api.py and use its statements and
settings. A command that fails says why in one line and exits with status 1.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import click
import psycopg
from flask import Flask
from flask.cli import AppGroup, with_appcontext
from psycopg.rows import dict_row
from werkzeug.security import generate_password_hash

import cdr_api
from cdr_api import Connection, run, service

user = AppGroup("user", help="Accounts: who may log in, and which domains they read.")
token = AppGroup("token", help="Bearer tokens.")

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def one_line_errors(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A database error ends a command with one line instead of a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except (psycopg.Error, UnicodeError) as error:
            raise click.ClickException(" ".join(str(error).split())) from None

    return wrapped


@contextmanager
def transaction() -> Iterator[Connection]:
    """A connection of its own, in a transaction: all of a command, or nothing."""
    with connect(service().settings.dsn) as connection:
        yield connection


def connect(dsn: str) -> Connection:
    # Prepared statements would stand in the way of PgBouncer.
    return psycopg.connect(dsn, row_factory=dict_row, connect_timeout=5, client_encoding="UTF8", prepare_threshold=None)


def find_account(connection: Connection, email: str) -> dict[str, Any]:
    found = run(connection, "find_account", email_key=cdr_api.email_key(email))
    if not found:
        raise click.ClickException(f"there is no account {email}")
    return found[0]


def read_new_password(email: str, from_stdin: bool) -> str:
    """A password typed twice, or one line of standard input; must keep the rule."""
    if from_stdin:
        password = sys.stdin.readline().rstrip("\r\n")
    else:
        password = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    try:
        cdr_api.check_password(password, email)
    except ValueError as error:
        raise click.ClickException(f"the password {error}") from None
    return password


def change_grants(connection: Connection, account: Mapping[str, Any], domains: Iterable[str], *, grant: bool) -> None:
    """Grants or revokes domains by name; "*" stands for all of them, also those to come.

    Raises ClickException for a name that grants or revokes nothing.
    """
    values = {"account_id": account["account_id"]}
    names = set(domains)
    if "*" in names:
        run(connection, "set_all_domains", **values, all_domains=grant)
        if not grant:
            run(connection, "delete_all_grants", **values)
            return
    elif account["all_domains"] and not grant:
        raise click.ClickException("this account may read all domains: revoke '*' first, then grant single ones")
    for name in sorted(names - {"*"}):
        if not run(connection, "upsert_grants" if grant else "delete_grants", **values, domain_names=[name]):
            raise click.ClickException(f"there is no {'domain' if grant else 'grant for'} {name}")


def print_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Columns as wide as their widest cell."""
    lines = [tuple(head), *(tuple("-" if cell is None else str(cell) for cell in row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def show(stamp: Any) -> str | None:
    return stamp.isoformat(" ", "seconds") if stamp else None


# Accounts ---------------------------------------------------------------------


@user.command("add")
@click.argument("email")
@click.option("--name", required=True, help="Who or what it is for.")
@click.option("--domain", "domains", multiple=True, help="A domain it may read; may be given again.")
@click.option("--all-domains", is_flag=True, help="It may read every domain, also those to come.")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")
@one_line_errors
def add_user(email: str, name: str, domains: Sequence[str], all_domains: bool, password_stdin: bool) -> None:
    """Make an account."""
    try:
        email, name = cdr_api.parse_email(email), cdr_api.parse_name(name)
    except ValueError as error:
        raise click.ClickException(f"the e-mail address or the name {error}") from None
    password = read_new_password(email, password_stdin)
    with transaction() as connection:
        account = cdr_api.add_account(connection, name, email, password, all_domains=all_domains)
        if not account:
            raise click.ClickException(f"there is an account {email} already")
        change_grants(connection, account, domains, grant=True)
    click.echo(f"Account {account['account_id']} for {email} made.")


@user.command("list")
@one_line_errors
def list_users() -> None:
    """Show every account with what it may read."""
    with transaction() as connection:
        rows = run(connection, "select_accounts")
    print_table(
        ("ID", "E-MAIL", "NAME", "DOMAINS", "TOKENS", "STATE"),
        (
            (
                row["account_id"],
                row["email"],
                row["name"],
                "*" if row["all_domains"] else ", ".join(row["domain_names"]) or None,
                row["tokens"],
                "disabled" if row["disabled_at"] else "enabled",
            )
            for row in rows
        ),
    )


@user.command("grant")
@click.argument("email")
@click.argument("domains", nargs=-1, required=True)
@one_line_errors
def grant(email: str, domains: Sequence[str]) -> None:
    """Let an account read domains ('*': all)."""
    with transaction() as connection:
        change_grants(connection, find_account(connection, email), domains, grant=True)
    click.echo(f"{email} may now read {', '.join(domains)}.")


@user.command("revoke")
@click.argument("email")
@click.argument("domains", nargs=-1, required=True)
@one_line_errors
def revoke(email: str, domains: Sequence[str]) -> None:
    """Take domains from an account ('*': every one of them)."""
    with transaction() as connection:
        change_grants(connection, find_account(connection, email), domains, grant=False)
    click.echo(f"{email} may no longer read {', '.join(domains)}.")


@user.command("password")
@click.argument("email")
@click.option("--password-stdin", is_flag=True, help="Read the password from standard input.")
@click.option("--revoke-tokens", is_flag=True, help="Delete every token of the account, too.")
@one_line_errors
def change_password(email: str, password_stdin: bool, revoke_tokens: bool) -> None:
    """Set a new password. Tokens stay good, unless --revoke-tokens is given."""
    password_hash = generate_password_hash(read_new_password(email, password_stdin))
    with transaction() as connection:
        account_id = find_account(connection, email)["account_id"]
        run(connection, "set_password", account_id=account_id, password_hash=password_hash)
        if revoke_tokens:
            run(connection, "delete_tokens", account_id=account_id)
    click.echo(f"The password of {email} is changed{' and its tokens are deleted' if revoke_tokens else ''}.")


@user.command("disable")
@click.argument("email")
@one_line_errors
def disable(email: str) -> None:
    """Keep an account from logging in and delete its tokens."""
    with transaction() as connection:
        account_id = find_account(connection, email)["account_id"]
        run(connection, "set_disabled", account_id=account_id, disabled=True)
        run(connection, "delete_tokens", account_id=account_id)
    click.echo(f"{email} is disabled and its tokens are deleted.")


@user.command("enable")
@click.argument("email")
@one_line_errors
def enable(email: str) -> None:
    """Let a disabled account log in again."""
    with transaction() as connection:
        run(connection, "set_disabled", account_id=find_account(connection, email)["account_id"], disabled=False)
    click.echo(f"{email} is enabled.")


@user.command("delete")
@click.argument("email")
@one_line_errors
def delete(email: str) -> None:
    """Delete an account with its grants and tokens."""
    with transaction() as connection:
        run(connection, "delete_account", account_id=find_account(connection, email)["account_id"])
    click.echo(f"{email} is deleted.")


# Tokens -----------------------------------------------------------------------


@token.command("create")
@click.argument("email")
@click.option("--days", type=click.IntRange(0, 36500), help="How long it is good for (0: for ever).")
@one_line_errors
def create_token(email: str, days: int | None) -> None:
    """Make a token and print it, this once, alone on standard output."""
    with transaction() as connection:
        account = find_account(connection, email)
        good_for = service().settings.token_days if days is None else days
        made = cdr_api.new_token(connection, account["account_id"], good_for)
    if not made:
        raise click.ClickException(f"{email} is disabled")
    click.echo(made)


@token.command("list")
@click.argument("email", required=False)
@one_line_errors
def list_tokens(email: str | None) -> None:
    """Show tokens (never the secret itself), of one account or of all."""
    with transaction() as connection:
        account_id = find_account(connection, email)["account_id"] if email else None
        rows = run(connection, "select_tokens", account_id=account_id)
    print_table(
        ("ID", "E-MAIL", "CREATED", "LAST USED", "EXPIRES"),
        (
            (row["token_id"], row["email"], show(row["created_at"]), show(row["last_used_at"]), show(row["expires_at"]))
            for row in rows
        ),
    )


@token.command("revoke")
@click.argument("token_id", type=int)
@one_line_errors
def revoke_token(token_id: int) -> None:
    """Delete the token of an ID that flask token list shows."""
    with transaction() as connection:
        if not run(connection, "delete_token", token_id=token_id):
            raise click.ClickException(f"there is no token {token_id}")
    click.echo(f"Token {token_id} is deleted.")


# Check ------------------------------------------------------------------------

Finding = tuple[str, str, str]  # a mark, the subject, what was found and what mends it
GOOD, NOTE, BAD = "✓", "!", "✗"

SCHEMA_VERSION = 2
ENVIRONMENT_FILE = Path("/etc/cdr-api/env")  # where DEPLOYMENT.md puts it
RANGE_INDEX = "CREATE INDEX CONCURRENTLY IF NOT EXISTS cdr_api_calls ON v_xml_cdr (domain_name, end_stamp, {key});"
DOMAIN_INDEX = "CREATE INDEX CONCURRENTLY IF NOT EXISTS cdr_api_calls ON v_xml_cdr (domain_name);"


@click.command("check")
@click.option("--json", "as_json", is_flag=True, help="A JSON array for monitoring instead of a table.")
@with_appcontext
def check(as_json: bool) -> None:
    """Look at the databases, the settings and the files; exit status 1 if a line says ✗."""
    found = list(run_checks())
    if as_json:
        words = {GOOD: "good", NOTE: "note", BAD: "bad"}
        click.echo(json.dumps([{"state": words[m], "subject": s, "text": t} for m, s, t in found], indent=1))
    else:
        for mark, subject, text in found:
            click.echo(f"{mark} {subject:<18} {text}")
    if any(mark == BAD for mark, _, _ in found):
        sys.exit(1)


def run_checks() -> Iterator[Finding]:
    """Every check's finding. What cannot be looked at because a server is away is left out."""
    settings = service().settings
    yield from check_settings(settings, os.environ)
    yield from check_files(ENVIRONMENT_FILE)
    yield from check_server("CDR_API_DSN", settings.dsn, (check_role, check_side_tables, check_accounts, check_notices))
    variable = "CDR_API_CALLS_DSN" if settings.calls_dsn else "calls"
    calls_checks = [
        check_columns,
        check_index,
        check_stray_calls,
        check_lost_calls,
        check_late_calls,
        check_feed,
        check_standby,
        check_time_zone,
        check_clock,
    ]
    if settings.calls_dsn:
        calls_checks.insert(0, check_role)
    yield from check_server(variable, settings.calls_dsn or settings.dsn, calls_checks)


def check_settings(settings: cdr_api.Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    for name in cdr_api.unknown_settings(environ):
        yield NOTE, "settings", f"{name} is not a setting of this service and has no effect"
    granted = ", ".join(settings.register_domains) or "no domain"
    if settings.registration == "open" and settings.register_domains == ("*",):
        yield (
            NOTE,
            "registration",
            "open, and a new account may read EVERY domain: anybody who gets here reads all calls",
        )
    else:
        yield GOOD, "registration", f"{settings.registration}; a new account may read {granted}"


def check_files(environment_file: Path) -> Iterator[Finding]:
    """Whether the service could change itself, or others read its password, where it is deployed."""
    if not environment_file.exists():
        return
    faults = []
    if environment_file.stat().st_mode & 0o007:
        faults.append(f"everybody may read the password in {environment_file}: chmod 0640 {environment_file}")
    folder = Path(cdr_api.__file__).parent
    if os.geteuid() != 0 and os.access(folder, os.W_OK):
        faults.append(f"the service may change its own program: chown -R root:root {folder}")
    for fault in faults:
        yield BAD, "files", fault
    if not faults:
        yield GOOD, "files", "the program and its settings are closed to others"


def check_server(
    variable: str, dsn: str, checks: Iterable[Callable[[Connection], Iterator[Finding]]]
) -> Iterator[Finding]:
    """Connects and runs the checks of one server."""
    try:
        connection = connect(dsn)
    except psycopg.Error as error:
        yield BAD, variable, " ".join(str(error).split())
        return
    with connection:
        connection.autocommit = True
        version = connection.info.server_version
        shown = f"PostgreSQL {connection.info.parameter_status('server_version')}, database {connection.info.dbname}"
        if version < 110000:
            yield BAD, variable, f"{shown}: PostgreSQL 11 or newer is needed"
            return
        yield GOOD, variable, shown
        for examine in checks:
            try:
                yield from examine(connection)
            except psycopg.Error as error:
                reason = error.diag.message_primary or " ".join(str(error).split())
                yield BAD, examine.__name__.removeprefix("check_").replace("_", " "), reason


def check_role(connection: Connection) -> Iterator[Finding]:
    found = run(connection, "check_role")[0]
    role = found["role"]
    if found["superuser"]:
        yield BAD, "role", f"{role} is a superuser: log in as cdr_api, the role that schema.sql makes"
    elif found["may_write"]:
        revoke = f"REVOKE INSERT, UPDATE, DELETE, TRUNCATE ON v_xml_cdr, v_domains FROM {role};"
        yield BAD, "role", f"{role} may write v_xml_cdr or v_domains: {revoke}"
    elif not found["may_read"]:
        yield BAD, "role", f"{role} may not read v_xml_cdr and v_domains: run schema.sql"
    else:
        yield GOOD, "role", f"{role} reads v_xml_cdr and v_domains and writes neither"


def check_side_tables(connection: Connection) -> Iterator[Finding]:
    version = run(connection, "find_version")[0]["version"]
    if version == SCHEMA_VERSION:
        yield GOOD, "side tables", f"version {version}"
    else:
        yield BAD, "side tables", f"version {version} instead of {SCHEMA_VERSION}: run schema.sql"


def check_accounts(connection: Connection) -> Iterator[Finding]:
    found = run(connection, "count_accounts")[0]
    text = f"{found['accounts']}; {found['tokens']} live tokens, {found['expiring']} of them expire within 30 days"
    yield NOTE if found["expiring"] else GOOD, "accounts", text


def check_notices(connection: Connection) -> Iterator[Finding]:
    """What the running service saw of the requests that come in, in the last day."""
    rows = run(connection, "select_notices")
    for row in rows:
        yield BAD, row["name"], f"{row['text']} (seen {show(row['seen_at'])})"
    if not rows:
        yield GOOD, "requests", "come in as the settings say, as far as the service has seen"


def find_columns(connection: Connection) -> dict[str, str]:
    """The types of v_xml_cdr's columns by name."""
    return {row["column_name"]: row["data_type"] for row in run(connection, "select_columns")}


def check_columns(connection: Connection) -> Iterator[Finding]:
    columns = find_columns(connection)
    if not columns:
        yield BAD, "columns", "there is no table v_xml_cdr: is this FusionPBX's database?"
        return
    renamed = {"xml_cdr_uuid"} if "uuid" in columns and "xml_cdr_uuid" not in columns else set()  # 4.x's key
    columns |= dict.fromkeys(renamed, "uuid")
    lacking = [name for name in cdr_api.FIELDS if name not in columns]
    if {"uuid", "xml_cdr_uuid"} <= columns.keys() - renamed:
        yield BAD, "columns", "there are both uuid and xml_cdr_uuid: which one is the key cannot be told"
    text = f"{len(lacking)} of the 66 fields are always null here: {', '.join(lacking)}" if lacking else "all 66 fields"
    yield GOOD, "columns", text


def check_index(connection: Connection) -> Iterator[Finding]:
    """Whether an index serves the range of a day, from the plan of the real statement."""
    for row in run(connection, "select_invalid_indexes"):
        drop = f"DROP INDEX CONCURRENTLY {row['index_name']};"
        yield BAD, "index", f"{row['index_name']} is the rest of a build that was interrupted: run {drop}"
    columns = find_columns(connection)
    conditions = " ".join(node.get("Index Cond", "") for node in find_plan(connection, "2026-01-01", "2026-01-02"))
    if columns.get("end_stamp") == "timestamp with time zone":
        index = RANGE_INDEX.format(key="xml_cdr_uuid" if "xml_cdr_uuid" in columns else "uuid")
        served, what = "end_stamp" in conditions, "ranges"
    else:  # 4.x keeps end_stamp as text, whose order is not that of time
        index, served, what = (
            DOMAIN_INDEX,
            "domain_name" in conditions,
            "domains (end_stamp is text: none serves ranges)",
        )
    yield (
        GOOD if served else BAD,
        "index",
        f"{'an' if served else 'no'} index serves {what}" + ("" if served else f"; run {index}"),
    )


def find_plan(connection: Connection, start: str, end: str) -> Iterator[dict[str, Any]]:
    """The nodes of the plan for the range of a domain, of the statement that serves it."""
    values = cdr_api.select_values(dict.fromkeys(cdr_api.FILTERS)) | {
        "one_domain": True,
        "domain_name": "",
        "domain_names": [],
        "domain_uuids": [],
        "other_uuids": [],
        "by": "end",
        "part": "dated",
        "after_stamp": start,
        "to": end,
    }
    select_calls = cdr_api.compose_select(cdr_api.FIELDS)
    explain = cdr_api.STATEMENTS["explain"].as_string()
    query = cdr_api.bind(connection, f"{explain} {select_calls}", values)
    with connection.transaction(force_rollback=True):
        run(connection, "forbid_scans")
        nodes = [connection.execute(query).fetchall()[0]["QUERY PLAN"][0]["Plan"]]
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        yield node


def check_stray_calls(connection: Connection) -> Iterator[Finding]:
    """Calls imported after FusionPBX renamed their domain: nobody is shown them."""
    if not run(connection, "find_table", name="v_domains")[0]["found"]:
        return  # an archive need not have it
    calls = run(connection, "count_stray_calls")[0]["calls"]
    if calls:
        update = (
            "UPDATE v_xml_cdr AS c SET domain_name = d.domain_name FROM v_domains AS d"
            " WHERE c.domain_uuid = d.domain_uuid AND c.domain_name IS DISTINCT FROM d.domain_name;"
        )
        yield BAD, "stray calls", f"{calls} bear another name than their domain has; as FusionPBX does: {update}"
    else:
        yield GOOD, "stray calls", "every call bears the name of its domain"


def check_lost_calls(connection: Connection) -> Iterator[Finding]:
    """Calls of a domain that FusionPBX has deleted: in no answer, for no account."""
    if not run(connection, "find_table", name="v_domains")[0]["found"]:
        return
    calls = run(connection, "count_lost_calls")[0]["calls"]
    if calls:
        yield NOTE, "lost calls", f"{calls} bear the name of no domain that exists; nobody is shown them"
    else:
        yield GOOD, "lost calls", "every call's domain exists"


def check_feed(connection: Connection) -> Iterator[Finding]:
    """Who holds the feed back: it waits for every transaction that began to write earlier."""
    try:
        found = run(connection, "find_oldest_writer")[0]
    except (psycopg.errors.InvalidSchemaName, psycopg.errors.UndefinedFunction):
        return  # an archive need not have it
    seconds = found["seconds"] or 0
    if seconds < 60:
        yield GOOD, "feed", f"held back by {seconds:.0f} s"
        return
    pid = found["holder"].partition("pid ")[2].partition(",")[0]
    end = f"SELECT pg_terminate_backend({pid});" if pid else "ROLLBACK PREPARED or COMMIT PREPARED it"
    text = f"held back by {seconds:.0f} s: {found['holder']} has written and not ended; if that is wrong: {end}"
    yield NOTE if seconds < 3600 else BAD, "feed", text


def check_standby(connection: Connection) -> Iterator[Finding]:
    found = run(connection, "find_standby_lag")[0]
    if not found["in_recovery"]:
        return
    lag = found["seconds"]
    text = f"a standby, {lag:.0f} s behind" if lag is not None else "a standby that has replayed nothing yet"
    if lag is None or lag > 300:
        text += ": SELECT * FROM pg_stat_replication on the primary tells why"
    yield GOOD if lag is not None and lag < 60 else NOTE if lag is not None and lag <= 300 else BAD, "standby", text


def check_late_calls(connection: Connection) -> Iterator[Finding]:
    days = service().settings.lookback_days
    calls = run(connection, "count_late_calls", days=days)[0]["calls"]
    if calls:
        text = (
            f"{calls} were stored more than {days} days after their end; the feed left them out, the totals show them"
        )
        yield NOTE, "late calls", text
    else:
        yield GOOD, "late calls", f"none was stored more than {days} days after its end"


def check_time_zone(connection: Connection) -> Iterator[Finding]:
    chosen = service().settings.timezone
    zone = chosen or connection.info.parameter_status("TimeZone") or "UTC"
    try:
        cdr_api.read_zone(zone)
        with connection.transaction(force_rollback=True):
            run(connection, "try_time_zone", time_zone=zone)
    except (ValueError, psycopg.DataError):
        yield BAD, "time zone", f"{zone} is not a time zone that both sides know: set CDR_API_TIMEZONE"
    else:
        yield GOOD, "time zone", f"{zone}, by {'CDR_API_TIMEZONE' if chosen else 'the database'}"


def check_clock(connection: Connection) -> Iterator[Finding]:
    before = time.time()
    server = float(run(connection, "read_clock")[0]["epoch"])
    difference = server - (before + time.time()) / 2
    yield GOOD if abs(difference) < 5 else BAD, "clock", f"the server's differs from ours by {difference:+.1f} s"


def register_commands(app: Flask) -> None:
    for command in (user, token, check):
        app.cli.add_command(command)
