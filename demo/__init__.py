"""A PostgreSQL of our own with a FusionPBX of any release in it.

make run, the tests and the benchmark use it. What each release stores, and how,
is told in README.md beside this file.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from demo.postgres import PostgresError, PostgresServer

__all__ = ["PostgresError", "PostgresServer"]  # what start_server raises and gives

HERE = Path(__file__).parent
RELEASES = ("4.2.2", "4.4.1", "5.0.1", "5.1.0", "5.2.0", "5.3.0", "5.4.4", "5.5.7", "master")
NEWEST = "5.5.7"
DOMAINS = ("alpha.example.com", "beta.example.com", "gamma.example.com")
STEP = 10_000  # rows of one INSERT
INDEX = "CREATE INDEX cdr_api_calls ON v_xml_cdr (domain_uuid, end_stamp, xml_cdr_uuid)"

Connection = psycopg.Connection[Any]


def start_server(folder: Path, programs: Path | None = None) -> PostgresServer:
    """The embedded PostgreSQL, or another one's programs, with its data in a folder; it stops with us."""
    server = PostgresServer(folder, programs)
    server.start()
    return server


def connect(server: PostgresServer, database: str = "postgres") -> Connection:
    """A superuser's connection, in autocommit mode."""
    return psycopg.connect(server.get_uri(database), autocommit=True)


def service_dsn(server: PostgresServer, database: str) -> str:
    """How the service connects: as the role of schema.sql, not as a superuser."""
    return server.get_uri(database, user="cdr_api")


def create_database(
    server: PostgresServer,
    name: str,
    release: str = NEWEST,
    domains: Sequence[str] = DOMAINS,
    *,
    encoding: str = "",
) -> None:
    """A database with the tables of a FusionPBX release, its domains, and schema.sql."""
    other = sql.SQL(" ENCODING {} LOCALE 'C' TEMPLATE template0").format(encoding) if encoding else sql.SQL("")
    with connect(server) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)) + other)
    with connect(server, name) as connection:
        create_tables(connection, release)
        for domain in domains:
            add_domain(connection, domain)
        connection.execute((HERE.parent / "schema.sql").read_text("utf-8"))
        connection.execute("ALTER ROLE cdr_api LOGIN")


def read_columns(release: str, table: str = "v_xml_cdr") -> list[str]:
    return [column[0] for column in read_release(release)[table]]


def read_release(release: str) -> dict[str, list[list[str]]]:
    """The tables of a release: for each its columns as name, type and constraint."""
    tables: dict[str, list[list[str]]] = json.loads((HERE / "releases" / f"{release}.json").read_text("utf-8"))[
        "tables"
    ]
    return tables


def create_tables(connection: Connection, release: str) -> None:
    for table, columns in read_release(release).items():
        body = sql.SQL(", ").join(
            sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(" ".join(rest))) for name, *rest in columns
        )
        connection.execute(sql.SQL("CREATE TABLE {} ({})").format(sql.Identifier(table), body))


def add_domain(connection: Connection, name: str) -> None:
    connection.execute(
        "INSERT INTO v_domains (domain_uuid, domain_name, domain_enabled)"
        " VALUES (md5('domain ' || %(n)s)::uuid, %(n)s, 'true')",
        {"n": name},
    )


def habits(release: str) -> dict[str, str]:
    """What a release writes instead of the plain value: column -> SQL expression."""
    number = RELEASES.index(release)
    length = "billsec" if number >= RELEASES.index("5.2.0") else "billsec + ring_seconds"
    milliseconds = "billmsec" if number >= RELEASES.index("5.2.0") else "billmsec + ring_seconds * 1000"
    found = {"duration": length, "mduration": milliseconds}
    stamps = ("start", "answer", "end")
    if number >= RELEASES.index("5.0.1"):
        # Unanswered: 1970-01-01 as answer_stamp.
        found |= {f"{stamp}_stamp": f"to_timestamp({stamp}_epoch)" for stamp in stamps}
    else:
        # FreeSWITCH's wall clock without a zone, in 4.x's types.
        wall = "to_char(to_timestamp({0}_epoch), 'YYYY-MM-DD HH24:MI:SS')"
        found |= {f"{stamp}_stamp": f"{wall.format(stamp)}::timestamp" for stamp in stamps}
        found["answer_stamp"] = f"CASE WHEN answer_epoch > 0 THEN {found['answer_stamp']} END"
        found["end_stamp"] = wall.format("end")
        found["uuid"] = "xml_cdr_uuid"
    if release in ("5.1.0", "5.2.0"):  # they drop every empty value, 0 among them
        for column in ("duration", "mduration", "billsec", "billmsec", "answer_epoch", "waitsec"):
            found[column] = f"nullif({found.get(column, column)}, 0)"
    if release == "4.2.2":
        found["cc_queue_joined_epoch"] = "cc_queue_joined_epoch::text"
    return found


def add_calls(
    connection: Connection,
    calls: int,
    release: str = NEWEST,
    *,
    domains: Sequence[str] = DOMAINS,
    days: int = 90,
    until: float | None = None,
    xml_bytes: int = 0,
    progress: Callable[[int], object] = lambda _rows: None,
) -> None:
    """Invents calls that end within so many days before an epoch second (now).

    xml_bytes is the length of each call's xml (0: none, as FusionPBX does by
    default). progress is told the rows of each step.
    """
    insert = compose_insert(connection, release)
    values = {
        "total": calls,
        "days": days,
        "until": int(until or time.time()),
        "domains": list(domains),
        "xml_bytes": xml_bytes,
    }
    for first in range(1, calls + 1, STEP):
        last = min(first + STEP - 1, calls)
        connection.execute(insert, {**values, "first": first, "last": last})
        progress(last - first + 1)
    connection.execute("VACUUM (ANALYZE) v_xml_cdr")


def compose_insert(connection: Connection, release: str) -> str:
    """calls.sql into the columns that a release has, with its habits."""
    query = (HERE / "calls.sql").read_text("utf-8")
    no_rows = {"first": 1, "last": 0, "total": 1, "days": 1, "until": 0, "domains": [""], "xml_bytes": 0}
    description = connection.execute(query, no_rows).description or ()
    expressions = {column.name: column.name for column in description} | habits(release)
    columns = [column for column in read_columns(release) if column in expressions]
    selected = ", ".join(expressions[column] for column in columns)
    return f"INSERT INTO v_xml_cdr ({', '.join(columns)}) SELECT {selected} FROM ({query}) AS call"


def add_imported_calls(connection: Connection, name: str = "imported-5.5.7.csv") -> None:
    """The rows that FusionPBX 5.5.7's own importer wrote, from a file that README.md describes."""
    table = (HERE / name).read_text("utf-8")
    header = table.partition("\n")[0].strip()
    with connection.cursor().copy(f"COPY v_xml_cdr ({header}) FROM STDIN (FORMAT csv, HEADER)") as copy:
        copy.write(table)
