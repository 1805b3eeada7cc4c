"""flask check: what an operator should know of the databases, the settings, the files and how requests arrive."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg

from cdr.database import Connection, connect, run
from cdr.parsing import parse_zone
from cdr.selection import FIELDS, FIRST_UUID, Domains, Selection, compose_select
from cdr.settings import Settings, unknown_settings
from cdr.statements import STATEMENTS, mogrify

Finding = tuple[str, str, str]  # a mark, the subject, what was found and what mends it
Check = Callable[[Settings, Connection], Iterator[Finding]]
GOOD, NOTE, BAD = "✓", "!", "✗"

SCHEMA_VERSION = 3
ENVIRONMENT_FILE = Path("/etc/cdr-api/env")  # where DEPLOYMENT.md puts it
RANGE_INDEX = "CREATE INDEX CONCURRENTLY IF NOT EXISTS cdr_api_calls ON v_xml_cdr (domain_name, end_stamp, {key});"
DOMAIN_INDEX = "CREATE INDEX CONCURRENTLY IF NOT EXISTS cdr_api_calls ON v_xml_cdr (domain_name);"


def run_checks(settings: Settings) -> Iterator[Finding]:
    """Every check's finding. What cannot be looked at because a server is away is left out."""
    yield from check_settings(settings, os.environ)
    yield from check_files(ENVIRONMENT_FILE)
    accounts_checks = (check_role, check_side_tables, check_accounts, check_warnings)
    yield from check_server("CDR_API_DSN", settings, settings.dsn, accounts_checks)
    variable = "CDR_API_CALLS_DSN" if settings.calls_dsn else "calls"
    calls_checks: list[Check] = [
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
    yield from check_server(variable, settings, settings.calls_dsn or settings.dsn, calls_checks)


def check_settings(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    for name in unknown_settings(environ):
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
    folder = Path(__file__).parent.parent
    if os.geteuid() != 0 and os.access(folder, os.W_OK):
        faults.append(f"the service may change its own program: chown -R root:root {folder}")
    for fault in faults:
        yield BAD, "files", fault
    if not faults:
        yield GOOD, "files", "the program and its settings are closed to others"


def check_server(variable: str, settings: Settings, dsn: str, checks: Iterable[Check]) -> Iterator[Finding]:
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
                yield from examine(settings, connection)
            except psycopg.Error as error:
                reason = error.diag.message_primary or " ".join(str(error).split())
                yield BAD, examine.__name__.removeprefix("check_").replace("_", " "), reason


def check_role(settings: Settings, connection: Connection) -> Iterator[Finding]:
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


def check_side_tables(settings: Settings, connection: Connection) -> Iterator[Finding]:
    version = run(connection, "find_version")[0]["version"]
    if version == SCHEMA_VERSION:
        yield GOOD, "side tables", f"version {version}"
    else:
        yield BAD, "side tables", f"version {version} instead of {SCHEMA_VERSION}: run schema.sql"


def check_accounts(settings: Settings, connection: Connection) -> Iterator[Finding]:
    found = run(connection, "count_accounts")[0]
    text = f"{found['accounts']}; {found['tokens']} live tokens, {found['expiring']} of them expire within 30 days"
    yield NOTE if found["expiring"] else GOOD, "accounts", text


def check_warnings(settings: Settings, connection: Connection) -> Iterator[Finding]:
    """What the running service saw of how requests arrive, in the last day."""
    rows = run(connection, "select_warnings")
    for row in rows:
        yield BAD, row["name"], f"{row['text']} (seen {row['seen_at'].isoformat(' ', 'seconds')})"
    if not rows:
        yield GOOD, "requests", "arrive as the settings say, as far as the service has seen"


def find_columns(connection: Connection) -> dict[str, str]:
    """The types of v_xml_cdr's columns by name."""
    return {row["column_name"]: row["data_type"] for row in run(connection, "select_columns")}


def check_columns(settings: Settings, connection: Connection) -> Iterator[Finding]:
    columns = find_columns(connection)
    if not columns:
        yield BAD, "columns", "there is no table v_xml_cdr: is this FusionPBX's database?"
        return
    renamed = {"xml_cdr_uuid"} if "uuid" in columns and "xml_cdr_uuid" not in columns else set()  # 4.x's key
    columns |= dict.fromkeys(renamed, "uuid")
    lacking = [name for name in FIELDS if name not in columns]
    if {"uuid", "xml_cdr_uuid"} <= columns.keys() - renamed:
        yield BAD, "columns", "there are both uuid and xml_cdr_uuid: which one is the key cannot be told"
    text = f"{len(lacking)} of the 66 fields are always null here: {', '.join(lacking)}" if lacking else "all 66 fields"
    yield GOOD, "columns", text


def check_index(settings: Settings, connection: Connection) -> Iterator[Finding]:
    """Whether an index serves the range of a day, from the plan of the real statement."""
    for row in run(connection, "select_invalid_indexes"):
        drop = f"DROP INDEX CONCURRENTLY {row['index_name']};"
        yield BAD, "index", f"{row['index_name']} is left over from a build that was interrupted: run {drop}"
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
    domains = Domains(name="", names=[], uuids=[], other_uuids=[])
    selection = Selection(domains, by="end", part="dated", after=(start, FIRST_UUID), end=datetime.fromisoformat(end))
    select_calls = compose_select(FIELDS)
    explain = STATEMENTS["explain"].as_string()
    query = mogrify(connection, f"{explain} {select_calls}", selection.parameters())
    with connection.transaction(force_rollback=True):
        run(connection, "forbid_scans")
        nodes = [connection.execute(query).fetchall()[0]["QUERY PLAN"][0]["Plan"]]
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        yield node


def check_stray_calls(settings: Settings, connection: Connection) -> Iterator[Finding]:
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


def check_lost_calls(settings: Settings, connection: Connection) -> Iterator[Finding]:
    """Calls of a domain that FusionPBX has deleted: in no answer, for no account."""
    if not run(connection, "find_table", name="v_domains")[0]["found"]:
        return
    calls = run(connection, "count_lost_calls")[0]["calls"]
    if calls:
        yield NOTE, "lost calls", f"{calls} bear the name of no domain that exists; nobody is shown them"
    else:
        yield GOOD, "lost calls", "every call's domain exists"


def check_feed(settings: Settings, connection: Connection) -> Iterator[Finding]:
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


def check_standby(settings: Settings, connection: Connection) -> Iterator[Finding]:
    found = run(connection, "find_standby_lag")[0]
    if not found["in_recovery"]:
        return
    lag = found["seconds"]
    text = f"a standby, {lag:.0f} s behind" if lag is not None else "a standby that has replayed nothing yet"
    if lag is None or lag > 300:
        text += ": SELECT * FROM pg_stat_replication on the primary tells why"
    yield GOOD if lag is not None and lag < 60 else NOTE if lag is not None and lag <= 300 else BAD, "standby", text


def check_late_calls(settings: Settings, connection: Connection) -> Iterator[Finding]:
    days = settings.lookback_days
    calls = run(connection, "count_late_calls", days=days)[0]["calls"]
    if calls:
        text = (
            f"{calls} were stored more than {days} days after their end; the feed left them out, the totals show them"
        )
        yield NOTE, "late calls", text
    else:
        yield GOOD, "late calls", f"none was stored more than {days} days after its end"


def check_time_zone(settings: Settings, connection: Connection) -> Iterator[Finding]:
    chosen = settings.timezone
    zone = chosen or connection.info.parameter_status("TimeZone") or "UTC"
    try:
        parse_zone(zone)
        with connection.transaction(force_rollback=True):
            run(connection, "try_time_zone", time_zone=zone)
    except (ValueError, psycopg.DataError):
        yield BAD, "time zone", f"{zone} is not a time zone that both sides know: set CDR_API_TIMEZONE"
    else:
        yield GOOD, "time zone", f"{zone}, by {'CDR_API_TIMEZONE' if chosen else 'the database'}"


def check_clock(settings: Settings, connection: Connection) -> Iterator[Finding]:
    before = time.time()
    server = float(run(connection, "read_clock")[0]["epoch"])
    difference = server - (before + time.time()) / 2
    yield GOOD if abs(difference) < 5 else BAD, "clock", f"the server's differs from ours by {difference:+.1f} s"
