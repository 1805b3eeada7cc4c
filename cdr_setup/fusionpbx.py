"""What cdr-api setup learns from FusionPBX: where its database is, and how to be a superuser there."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import psycopg
from psycopg import conninfo

from cdr.database import Connection, connect, run
from cdr.remedies import Place, explain_failure

SUPERUSER = "postgres"  # of PostgreSQL
SYSTEM_USER = "postgres"  # who may be it, by PostgreSQL's own socket
SOCKET_FOLDER = "/var/run/postgresql"  # Debian's
CONFIGS = (
    Path("/etc/fusionpbx/config.conf"),
    Path("/usr/local/etc/fusionpbx/config.conf"),
    Path("/etc/fusionpbx/config.php"),
    Path("/usr/local/etc/fusionpbx/config.php"),
    Path("/var/www/fusionpbx/resources/config.php"),
)
# config.conf has "database.0.host = 127.0.0.1", config.php "$db_host = '127.0.0.1';".
ENTRY = re.compile(
    r"""^\s*(?:database\.0\.|\$db_)(\w+)[ \t]*=[ \t]*(?:"([^"\n]*)"|'([^'\n]*)'|([^;\n]*))""", re.MULTILINE
)


class Failure(click.ClickException):
    """What keeps a step from being done, and the line that mends it."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason + (f"\nRun this, then cdr-api setup again:\n    {remedy}" if remedy else ""))


@dataclass(frozen=True)
class FusionPbx:
    """Where FusionPBX's configuration says that its database is."""

    file: Path
    host: str
    port: str
    name: str
    user: str
    password: str = field(repr=False)
    sslmode: str

    @property
    def place(self) -> Place:
        return Place(self.host, self.port, self.name)

    def dsn(self, user: str, **others: str) -> str:
        """For libpq, of a role."""
        here = self.place.is_here
        given = {"host": "127.0.0.1" if here else self.host, "dbname": self.name, "user": user}
        if self.port != "5432":
            given["port"] = self.port
        if self.sslmode and not here:
            given["sslmode"] = self.sslmode
        return conninfo.make_conninfo(**(given | others))


def read_fusionpbx(chosen: Path | None) -> FusionPbx:
    """The configuration of a file, or of the first place where one is found."""
    file = chosen or next((path for path in CONFIGS if path.is_file()), None)
    if not file:
        raise Failure(f"there is no {' and no '.join(map(str, CONFIGS[:3]))}", "cdr-api setup --config FILE")
    text = file.read_text("utf-8", "replace")
    found = {name: (double or single or plain).strip() for name, double, single, plain in ENTRY.findall(text)}
    if found.get("type", "pgsql") != "pgsql":
        raise Failure(f"{file} says that FusionPBX keeps its data in {found['type']}; only PostgreSQL can be read")
    if not found.get("name"):
        raise Failure(f"{file} names no database of PostgreSQL", f"grep database {file}")
    values = {name: found.get(name, "") for name in ("host", "name", "password", "sslmode")}
    return FusionPbx(file=file, port=found.get("port") or "5432", user=found.get("username", ""), **values)


# The superuser ----------------------------------------------------------------


@contextmanager
def acting_as(name: str | None) -> Iterator[None]:
    """As another user of the system: PostgreSQL's own socket asks the kernel who connects."""
    uid, gid = os.geteuid(), os.getegid()
    user = pwd.getpwnam(name) if name else None
    if user:
        os.setegid(user.pw_gid)
        os.seteuid(user.pw_uid)
    try:
        yield
    finally:
        os.seteuid(uid)
        os.setegid(gid)


@dataclass(frozen=True)
class Login:
    """A way to be a superuser of FusionPBX's PostgreSQL."""

    dsn: str = field(repr=False)
    user: str | None = None  # of the system

    def connect(self, database: str = "") -> Connection:
        """A connection in autocommit mode, to another database if one is named. KeyError if there is no such user."""
        dsn = conninfo.make_conninfo(self.dsn, dbname=database) if database else self.dsn
        with acting_as(self.user):
            connection = connect(dsn)
        connection.autocommit = True
        return connection


def each_login(fusionpbx: FusionPbx, chosen: str | None) -> Iterator[Login]:
    """The ways to be a superuser, the best first: one that was chosen, otherwise the system's, and FusionPBX's role."""
    if chosen:
        given = conninfo.conninfo_to_dict(chosen)
        if "password" in given:
            raise Failure("everybody can read a password on a command line: leave it out, it is asked for")
        yield Login(conninfo.make_conninfo(fusionpbx.dsn(SUPERUSER), **given))
        return
    if fusionpbx.place.is_here:
        folder = fusionpbx.host if fusionpbx.host.startswith("/") else SOCKET_FOLDER
        yield Login(fusionpbx.dsn(SUPERUSER, host=folder), SYSTEM_USER)
    if fusionpbx.user:
        yield Login(fusionpbx.dsn(fusionpbx.user, password=fusionpbx.password))


def ask_password(login: Login) -> Login:
    password = click.prompt("Password of PostgreSQL's superuser", hide_input=True, err=True)
    return replace(login, dsn=conninfo.make_conninfo(login.dsn, password=password))


def find_superuser(fusionpbx: FusionPbx, chosen: str | None) -> Login:
    """The first way that leads to a superuser; Failure with the reasons of all."""
    reasons = []
    for login in each_login(fusionpbx, chosen):
        try:
            try:
                connection = login.connect()
            except psycopg.OperationalError as error:
                if not chosen or "no password supplied" not in str(error):
                    raise
                login = ask_password(login)  # noqa: PLW2901
                connection = login.connect()
            with connection:
                found = run(connection, "examine_server")[0]
        except KeyError:
            reasons.append(f"this machine has no user {login.user}")
        except psycopg.Error as error:
            reasons.append(explain_failure(error, login.dsn))
        else:
            if found["superuser"]:
                return login
            reasons.append(f"{found['role']} is no superuser")
    how = f"cdr-api setup --superuser 'host={fusionpbx.host or SOCKET_FOLDER} user=NAME'  # its password is asked for"
    raise Failure(f"nobody could log in as a superuser of PostgreSQL: {'; '.join(reasons)}", how)
