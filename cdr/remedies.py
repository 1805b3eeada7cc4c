"""What mends a connection that fails, and how a remedy is written: as a line that a root shell takes.

A remedy for PostgreSQL is run by psql as its superuser: by the local socket where
the server is on this machine, otherwise by the network.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg import conninfo

from cdr.settings import ENVIRONMENT_FILE

SCHEMA_FILE = Path(__file__).parent.parent / "schema.sql"


@dataclass(frozen=True)
class Place:
    """A database as remedies name it; no host is this machine."""

    host: str = ""
    port: str = "5432"
    database: str = ""
    user: str = ""

    @classmethod
    def of_dsn(cls, dsn: str) -> Place:
        """The first of a connection string's hosts."""
        given = conninfo.conninfo_to_dict(dsn)
        words = {name: str(given.get(name) or "").partition(",")[0] for name in ("host", "port", "dbname", "user")}
        return cls(words["host"], words["port"] or "5432", words["dbname"] or words["user"], words["user"])

    @classmethod
    def of(cls, connection: psycopg.Connection[Any]) -> Place:
        """The one that a connection leads to."""
        info = connection.info
        return cls(info.host, str(info.port), info.dbname, info.user)

    def __str__(self) -> str:
        return f"{self.database} on {self.host or 'this machine'}, port {self.port}"

    @property
    def is_here(self) -> bool:
        return self.host in ("", "localhost", "127.0.0.1", "::1") or self.host.startswith(("/", "@"))

    def psql(self, *options: str, database: str | None = None) -> str:
        """A line that runs psql as the superuser, in this database if no other is named."""
        name = self.database if database is None else database
        if self.is_here:
            port = [] if self.port == "5432" else ["-p", self.port]
            words = ["sudo", "-u", "postgres", "psql", *port, "-d", name, *options]
        else:
            dsn = conninfo.make_conninfo(host=self.host, port=self.port, dbname=name, user="postgres")
            words = ["psql", "-d", dsn, *options]
        return shlex.join(words)

    def execute(self, *statements: str) -> str:
        return self.psql(*(word for statement in statements for word in ("-c", statement)))

    def run_schema(self) -> str:
        return self.psql("-v", "ON_ERROR_STOP=1", "-f", str(SCHEMA_FILE))


def change_setting(name: str, value: object) -> str:
    """A line that sets a setting where DEPLOYMENT.md keeps them."""
    file = ENVIRONMENT_FILE
    return f"sed -i /^{name}=/d {file} && echo {name}={value} >> {file} && systemctl restart cdr-api"


# Connections ------------------------------------------------------------------

EDIT = f"editor {ENVIRONMENT_FILE} && systemctl restart cdr-api"


def start_server(place: Place, _found: re.Match[str]) -> str:
    if place.is_here:
        return "systemctl start postgresql; pg_lsclusters  # which port it has"
    return f"ssh {place.host} systemctl start postgresql  # whose listen_addresses must name an address of it"


def allow_login(place: Place, found: re.Match[str]) -> str:
    """The line that pg_hba.conf lacks, above all others, since the first that fits decides."""
    address = found["address"]
    if address == "[local]":
        line = f"local {place.database} {place.user} scram-sha-256"
    else:
        bits = 128 if ":" in address else 32
        line = f"host {place.database} {place.user} {address}/{bits} scram-sha-256"
    there = Place(port=place.port).psql("-tAc", "SHOW hba_file", database="postgres")
    reload = Place(port=place.port).psql("-c", "SELECT pg_reload_conf()", database="postgres")
    whole = f"""sed -i {shlex.quote(f"1i {line}")} "$({there})" && {reload}"""
    return whole if place.is_here else f"ssh {place.host} {shlex.quote(whole)}"


def list_databases(place: Place, _found: re.Match[str]) -> str:
    return f"{place.psql('-l', database='postgres')}; {EDIT}"


def set_up(_place: Place, _found: re.Match[str]) -> str:
    return "cdr-api setup  # gives the role another password and writes it down"


def allow_connections(place: Place, _found: re.Match[str]) -> str:
    return place.execute(f"GRANT CONNECT ON DATABASE {place.database} TO {place.user}")


def find_connections(place: Place, _found: re.Match[str]) -> str:
    return place.execute("SELECT usename, state, count(*) FROM pg_stat_activity GROUP BY 1, 2 ORDER BY 3 DESC")


def find_host(place: Place, _found: re.Match[str]) -> str:
    return f"getent hosts {place.host}; {EDIT}"


def open_port(place: Place, _found: re.Match[str]) -> str:
    return f"nc -vz -w 5 {place.host} {place.port}  # a firewall, or a host that is off"


def find_certificate(place: Place, _found: re.Match[str]) -> str:
    look = f"openssl s_client -starttls postgres -connect {place.host}:{place.port} -showcerts </dev/null"
    return f"{look}  # sslrootcert= names the file of who signed it, host= the name in it"


def switch_ssl_on(place: Place, _found: re.Match[str]) -> str:
    return place.execute("ALTER SYSTEM SET ssl = on", "SELECT pg_reload_conf()")


# A sentence of libpq's or the server's, and what mends its cause. The server's are in
# its own language; what is not known is told as it is.
CAUSES = (
    ('no pg_hba.conf entry for host "(?P<address>[^"]+)"', allow_login),
    ('pg_hba.conf rejects connection for host "(?P<address>[^"]+)"', allow_login),
    ("(Peer|Ident|password) authentication failed|no password supplied", set_up),
    ('is not permitted to log in|role "[^"]*" does not exist', set_up),
    ('database "[^"]*" does not exist', list_databases),
    ("permission denied for database", allow_connections),
    ("too many connections|connection slots are reserved|too many clients", find_connections),
    ("failed to resolve host|could not translate host name", find_host),
    ("certificate|does not match host name|SSL error", find_certificate),
    ("does not support SSL", switch_ssl_on),
    ("[Tt]imeout|timed out|No route to host|Network is unreachable", open_port),
    ("Connection refused|No such file or directory", start_server),
)


def explain_failure(error: Exception, dsn: str) -> str:
    """Why there is no connection, in one line, and what to run."""
    reason = " ".join(str(error).split())
    for pattern, mend in CAUSES:
        if found := re.search(pattern, reason):
            return f"{reason}; run {mend(Place.of_dsn(dsn), found)}"
    return reason
