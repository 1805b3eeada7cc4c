"""The commands of the operator: flask user, flask token, flask check.

A command that fails says why in one line and exits with status 1.
"""

from __future__ import annotations

import functools
import ipaddress
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import click
import psycopg
from flask import Flask, current_app
from flask.cli import AppGroup, with_appcontext

from cdr import accounts
from cdr.check import run_checks
from cdr.check_calls import BAD, GOOD, NOTE, Finding
from cdr.database import Connection, codec_of, connect, run
from cdr.passwords import hash_password
from cdr.settings import Settings
from cdr.statements import show_name

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


def settings() -> Settings:
    found: Settings = current_app.extensions["cdr_api"].settings
    return found


@contextmanager
def transaction() -> Iterator[Connection]:
    """A connection to the side tables, in a transaction: all of a command, or nothing."""
    with connect(settings().accounts_dsn or settings().dsn) as connection:
        yield connection


@contextmanager
def fusionpbx() -> Iterator[Connection]:
    """A connection to FusionPBX's database, where the domains are."""
    with connect(settings().dsn) as connection:
        yield connection


def name_domains(uuids: Iterable[str]) -> dict[str, str]:
    """The names of domains by their uuids; a uuid that no domain has stands for itself."""
    listed = list(uuids)
    with fusionpbx() as connection:
        codec, found = codec_of(connection), run(connection, "find_names", domain_uuids=listed)
    return {uuid: uuid for uuid in listed} | {row["domain_uuid"]: show_name(row["name"], codec) for row in found}


def show_email(email: str) -> str:
    """An address as lists show it: what is not ASCII as \\u0430, lest an account pass for another."""
    return email.encode("unicode_escape").decode("ascii")


def find_account(connection: Connection, email: str) -> dict[str, Any]:
    """The account of an address as lists show it, or as it is."""
    if "\\" in email:
        shown = {show_email(row["email"]): row["email"] for row in run(connection, "select_accounts")}
        email = shown.get(email, email)
    found = run(connection, "find_account", email_key=accounts.email_key(email))
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
        accounts.check_password(password, email)
    except ValueError as error:
        raise click.ClickException(f"the password {error}") from None
    return password


def find_uuids(name: str) -> list[str]:
    """Of the domains that have a name, or of the one that has it as its uuid."""
    with fusionpbx() as connection:
        return [row["domain_uuid"] for row in run(connection, "find_uuids", domain_names=[name])]


def change_grants(connection: Connection, account: Mapping[str, Any], domains: Iterable[str], *, grant: bool) -> None:
    """Grants or revokes domains by name or uuid; "*" stands for all of them, also those to come.

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
        uuids = find_uuids(name)
        if grant:
            changed = run(connection, "upsert_grants", **values, domain_uuids=uuids)
        else:  # by uuid also that of a domain that is no more
            changed = run(connection, "delete_grants", **values, domain_uuids=[*uuids, name])
        if not changed:
            raise click.ClickException(f"there is no {'domain' if grant else 'grant for'} {name}")


def print_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Columns as wide as their widest cell."""
    lines = [tuple(head), *(tuple("-" if cell is None else str(cell) for cell in row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


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
        email, name = accounts.parse_email(email), accounts.parse_name(name)
    except ValueError as error:
        raise click.ClickException(f"the e-mail address or the name {error}") from None
    password_hash = hash_password(read_new_password(email, password_stdin))
    with transaction() as connection:
        account = accounts.add_account(connection, name, email, password_hash, all_domains=all_domains)
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
    names = name_domains(uuid for row in rows for uuid in row["domain_uuids"])
    print_table(
        ("ID", "E-MAIL", "NAME", "DOMAINS", "TOKENS", "STATE"),
        (
            (
                row["account_id"],
                show_email(row["email"]),
                row["name"],
                "*" if row["all_domains"] else ", ".join(sorted(names[uuid] for uuid in row["domain_uuids"])) or None,
                row["tokens"],
                "disabled" if row["disabled"] else "enabled",
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
    password_hash = hash_password(read_new_password(email, password_stdin))
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
@click.option("--domain", "domains", multiple=True, help="Only this domain of the account; may be given again.")
@click.option("--from", "networks", multiple=True, help="Only from this address or network; may be given again.")
@one_line_errors
def create_token(email: str, days: int | None, domains: Sequence[str], networks: Sequence[str]) -> None:
    """Make a token and print it, this once, alone on standard output."""
    with transaction() as connection, fusionpbx() as other:
        account = find_account(connection, email)
        try:
            uuids = accounts.choose_domains(connection, other, account, domains) if domains else None
            clients = [str(ipaddress.ip_network(network)) for network in networks] or None
        except ValueError as error:
            raise click.ClickException(str(error)) from None
        good_for = settings().token_days if days is None else days
        made = accounts.new_token(connection, account["account_id"], good_for, uuids, clients)
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
    names = name_domains(uuid for row in rows for uuid in row["domain_uuids"] or ())
    print_table(
        ("ID", "E-MAIL", "CREATED", "LAST USED", "EXPIRES", "DOMAINS", "FROM"),
        (
            (
                row["token_id"],
                show_email(row["email"]),
                *(row[name] for name in ("created_at", "last_used_at", "expires_at")),
                None if row["domain_uuids"] is None else ", ".join(sorted(names[uuid] for uuid in row["domain_uuids"])),
                ", ".join(row["networks"]) if row["networks"] else None,
            )
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


def print_findings(found: Iterable[Finding]) -> bool:
    """A line for each, as it is found; whether none is bad."""
    good = True
    for mark, subject, text in found:
        click.echo(f"{mark} {subject:<18} {text}")
        good = good and mark != BAD
    return good


@click.command("check")
@click.option("--json", "as_json", is_flag=True, help="A JSON array for monitoring instead of a table.")
@with_appcontext
def check(as_json: bool) -> None:
    """Look at the databases, the settings and the files; exit status 1 if a line says ✗."""
    found = list(run_checks(settings()))
    if as_json:
        words = {GOOD: "good", NOTE: "note", BAD: "bad"}
        click.echo(json.dumps([{"state": words[m], "subject": s, "text": t} for m, s, t in found], indent=1))
    else:
        print_findings(found)
    if any(mark == BAD for mark, _, _ in found):
        sys.exit(1)


def register_commands(app: Flask) -> None:
    for command in (user, token, check):
        app.cli.add_command(command)
