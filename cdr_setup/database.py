"""What cdr-api setup does in PostgreSQL and in the settings file."""

from __future__ import annotations

import os
import pwd
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psycopg
from psycopg import conninfo, sql

from cdr.check_calls import find_missing_index
from cdr.database import Connection, codec_of, connect, encrypt_password, run
from cdr.remedies import SCHEMA_FILE, Place, explain_failure
from cdr.settings import ENVIRONMENT_FILE, SettingError, Settings, read_environment
from cdr.statements import STATEMENTS, show_name
from cdr_setup.fusionpbx import Failure, FusionPbx, Login, find_superuser, read_fusionpbx

ROOT_UID = 0
SERVICE_USER = "cdr-api"
TEMPLATE = Path(__file__).parent.parent / "deploy/env"
APART = "cdr_api"  # a database for the side tables alone
NOT_THERE = (psycopg.OperationalError, psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName)


@dataclass
class Site:
    """This machine: FusionPBX, its PostgreSQL, and what of ours is there already."""

    fusionpbx: FusionPbx
    login: Login
    token: str = ""  # of the first account, once it is made

    def superuser(self, database: str = "") -> Connection:
        return self.login.connect(database)

    def examine(self) -> dict[str, Any]:
        with self.superuser() as connection:
            return run(connection, "examine_server")[0]

    def read_dsn(self, name: str = "CDR_API_DSN") -> str:
        """The service's, if the settings file has one already."""
        try:
            return read_environment(ENVIRONMENT_FILE).get(name, "") if ENVIRONMENT_FILE.exists() else ""
        except SettingError as error:
            raise Failure(str(error), f"editor {ENVIRONMENT_FILE}") from None

    def find_apart(self) -> str:
        """The database of the side tables, if they are not beside FusionPBX's tables: a publication would take them."""
        if dsn := self.read_dsn("CDR_API_ACCOUNTS_DSN"):
            return Place.of_dsn(dsn).database
        found = self.examine()
        return APART if found["publication"] and not found["has_side_tables"] else ""

    def settings(self) -> Settings:
        return Settings.from_environ(read_environment(ENVIRONMENT_FILE))

    def why_no_login(self) -> str:
        """Why the service could not connect with its settings; nothing if it could."""
        if not (dsn := self.read_dsn()):
            return f"{ENVIRONMENT_FILE} has no CDR_API_DSN"
        try:
            connect(dsn).close()
        except psycopg.Error as error:
            return explain_failure(error, dsn)
        return ""

    def missing_index(self) -> str | None:
        with self.superuser() as connection:
            return find_missing_index(connection)

    def has_accounts(self) -> bool:
        try:
            with self.superuser(self.find_apart()) as connection:
                return bool(run(connection, "count_accounts")[0]["accounts"])
        except NOT_THERE:
            return False

    def domains(self) -> list[str]:
        with self.superuser() as connection:
            return [show_name(row["name"], codec_of(connection)) for row in run(connection, "select_domain_names")]


def find_site(config: Path | None, superuser: str | None) -> Site:
    """Failure if FusionPBX's database is not where its configuration says, or nobody is a superuser there."""
    fusionpbx = read_fusionpbx(config)
    site = Site(fusionpbx, find_superuser(fusionpbx, superuser))
    click.echo(f"FusionPBX's database, by {fusionpbx.file}: {fusionpbx.place}")
    found = site.examine()
    if not (found["has_calls"] and found["has_domains"]):
        look = fusionpbx.place.psql("-c", "\\dt *.v_*")
        raise Failure(f"the database {fusionpbx.name} has no tables v_xml_cdr and v_domains: is it FusionPBX's?", look)
    return site


# PostgreSQL -------------------------------------------------------------------


def run_schema(site: Site) -> None:
    """In FusionPBX's database, and in that of the side tables if there is one."""
    schema = sql.SQL(SCHEMA_FILE.read_text("utf-8"))
    apart = site.find_apart()
    with site.superuser() as connection:
        run(connection, "choose_side_tables", where="none" if apart else "")
        connection.execute(schema)
        if not apart:
            return
        if not run(connection, "find_database", name=apart):
            connection.execute(STATEMENTS["create_database"].format(name=sql.Identifier(apart)))
    with site.superuser(apart) as connection:
        run(connection, "choose_side_tables", where="only")
        connection.execute(schema)


def change_password(site: Site) -> None:
    """A new one, of which PostgreSQL and its log see only a hash; first into the settings, lest it be lost."""
    password, apart = secrets.token_hex(24), site.find_apart()
    dsn = conninfo.make_conninfo(site.read_dsn() or site.fusionpbx.dsn("cdr_api"), password=password)
    settings = {"CDR_API_DSN": dsn}
    if apart:
        settings["CDR_API_ACCOUNTS_DSN"] = conninfo.make_conninfo(dsn, dbname=apart)
    write_settings(change_lines(settings))
    with site.superuser() as connection:
        secret = sql.Literal(encrypt_password(connection, password, "cdr_api"))
        connection.execute(STATEMENTS["set_role_password"].format(secret=secret))
    if reason := site.why_no_login():
        raise Failure(*reason.split("; run ", 1))


def change_lines(settings: Mapping[str, str]) -> str:
    """The settings file with other values, each in the place of the line that has it, or a comment with it."""
    lines = (ENVIRONMENT_FILE if ENVIRONMENT_FILE.exists() else TEMPLATE).read_text("utf-8").splitlines()
    for name, value in settings.items():
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        line = f'{name}="{escaped}"'
        old = [row for row in lines if row.lstrip("# ").startswith(f"{name}=")]
        place = lines.index(old[-1]) if old else 0
        lines[place : place + len(old[-1:])] = [line]
        lines = [row for row in lines if row == line or row not in old]
    return "\n".join(lines) + "\n"


def write_settings(text: str) -> None:
    ENVIRONMENT_FILE.parent.mkdir(mode=0o755, exist_ok=True)
    new = ENVIRONMENT_FILE.with_name(".env.new")
    new.unlink(missing_ok=True)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640), "w", encoding="utf-8") as file:  # noqa: PTH123
        os.fchmod(file.fileno(), 0o640)
        os.fchown(file.fileno(), ROOT_UID, pwd.getpwnam(SERVICE_USER).pw_gid)
        file.write(text)
    new.replace(ENVIRONMENT_FILE)


def build_index(site: Site) -> None:
    """Tells how far it is. If it is interrupted, nothing stays but an unusable index, which the next run drops."""
    with site.superuser() as builder, site.superuser() as watcher, ThreadPoolExecutor(1) as pool:
        told = ""
        while find_progress(watcher):  # PostgreSQL builds on, if only setup was interrupted
            told = tell_progress(watcher, told)
            time.sleep(1)
        statement = find_missing_index(watcher)
        if not statement:
            return
        if any(row["index_name"].endswith("cdr_api_calls") for row in run(watcher, "select_invalid_indexes")):
            run(watcher, "drop_index")
        building = pool.submit(builder.execute, sql.SQL(statement))
        try:
            while not wait([building], timeout=1).done:
                told = tell_progress(watcher, told)
        except BaseException:
            builder.cancel_safe()
            raise
        building.result()


def find_progress(watcher: Connection) -> list[dict[str, Any]]:
    """Of an index that is being built; PostgreSQL 11 does not tell."""
    return run(watcher, "find_index_progress") if watcher.info.server_version >= 120000 else []


def tell_progress(watcher: Connection, told: str) -> str:
    """A line for each tenth, and for each phase."""
    for row in find_progress(watcher):
        text = f"     {row['phase']}, {row['percent'] // 10 * 10} %"
        if text != told:
            click.echo(text)
        told = text
    return told


def drop_everything(site: Site) -> None:
    """All of ours in the database. What is there of the role in others keeps it, and is named."""
    with site.superuser() as connection:
        for statement in ("drop_index", "drop_nameless_index", "drop_domains_index", "drop_database"):
            run(connection, statement)
        if site.examine()["may_log_in"] is not None:
            run(connection, "drop_rights")
        run(connection, "drop_schema")
        if site.examine()["may_log_in"] is not None:
            try:
                run(connection, "drop_role")
            except psycopg.errors.DependentObjectsStillExist as error:
                drop = site.fusionpbx.place.psql("-c", "DROP OWNED BY cdr_api", database="DATABASE")
                reason = f"{error.diag.message_primary}: {error.diag.message_detail}"
                raise Failure(reason, f"{drop}  # in each of these") from None
