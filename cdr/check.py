"""flask check: what an operator should know of the databases, the settings, the files and how requests arrive."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path

import psycopg
from psycopg import conninfo

from cdr.accounts import list_domains
from cdr.check_calls import BAD, CHECKS, GOOD, NOTE, SHOW_ROWS, Finding, Subject
from cdr.database import Connection, connect, run
from cdr.passwords import AT_ONCE
from cdr.remedies import EDIT, Place, change_setting, explain_failure
from cdr.selection import Domains
from cdr.settings import ENVIRONMENT_FILE, Settings, unknown_settings

Check = Callable[[Subject, Connection], Iterator[Finding]]

SCHEMA_VERSION = 6
# Where DEPLOYMENT.md puts it, and where the package does; of two systemd takes the first.
UNIT_FILES = (Path("/etc/systemd/system/cdr-api.service"), Path("/lib/systemd/system/cdr-api.service"))

# So many domains are looked through in half a millisecond.
MANY_DOMAINS = 2_000
DOMAINS_INDEX = "CREATE INDEX CONCURRENTLY IF NOT EXISTS cdr_api_domains ON v_domains (domain_name);"

# What makes a database of their own for the side tables, and what removes those that it has replaced.
MAKE_APART = (
    "sudo -u postgres createdb cdr_api && sudo -u postgres psql -v ON_ERROR_STOP=1 -d cdr_api"
    f" -c \"SET cdr_api.side_tables = 'only'\" -f {Path(__file__).parent.parent / 'schema.sql'}"
)
DROP_BESIDE = (
    "DROP TABLE cdr_api.accounts, cdr_api.grants, cdr_api.tokens, cdr_api.secrets, cdr_api.attempts,"
    " cdr_api.warnings, cdr_api.version;"
)


def run_checks(settings: Settings) -> Iterator[Finding]:
    """Every check's finding. What cannot be looked at because a server is away is left out."""
    yield from check_settings(settings, os.environ)
    yield from check_files(ENVIRONMENT_FILE)
    yield from check_memory(settings, next((unit for unit in UNIT_FILES if unit.is_file()), UNIT_FILES[0]))
    subject = Subject(settings, find_domains(settings))
    beside: tuple[Check, ...] = (check_publications, check_side_tables, check_accounts, check_warnings)
    if settings.accounts_dsn:
        checks = (check_superuser, check_connections, *beside)
        yield from check_server("CDR_API_ACCOUNTS_DSN", subject, settings.accounts_dsn, checks)
        beside = (check_leftovers,)
    checks = (check_role, check_connections, check_domains, *beside)
    found = yield from check_server("CDR_API_DSN", subject, settings.dsn, checks)
    if not (found or settings.calls_dsn):
        return
    variable = "CDR_API_CALLS_DSN" if settings.calls_dsn else "calls"
    calls_checks = (check_role, check_connections, *CHECKS) if settings.calls_dsn else CHECKS
    yield from check_server(variable, subject, settings.calls_dsn or settings.dsn, calls_checks)


def find_domains(settings: Settings) -> Domains:
    """FusionPBX's domains, as the service knows them; none where that cannot be told."""
    try:
        with connect(settings.dsn) as connection:
            return list_domains(connection, all_domains=True)
    except psycopg.Error:  # which is told by the checks of that server
        return Domains()


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
        faults.append(f"everybody may read the password in {environment_file}; run chmod 0640 {environment_file}")
    folder = Path(__file__).parent.parent
    if os.geteuid() != 0 and os.access(folder, os.W_OK, effective_ids=True):
        faults.append(f"the service may change its own program; run chown -R root:root {folder}")
    for fault in faults:
        yield BAD, "files", fault
    if not faults:
        yield GOOD, "files", "the program and its settings are closed to others"


# What docs/limits.md reckons with, in MB.
WORKER_MB, PASSWORD_MB, ANSWER_MB = 80, 32, 16
UNITS = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024 * 1024}


def find_memory_limit(unit: Path) -> float | None:
    """MemoryMax of a systemd unit's file and what was added to it, in MB; None: there is none, or not as a number."""
    added = unit.parent if unit != UNIT_FILES[1] else UNIT_FILES[0].parent  # as systemctl edit does
    files = [unit, *sorted((added / f"{unit.name}.d").glob("*.conf"))]
    texts = [path.read_text("utf-8", "replace") for path in files if path.is_file()]
    found = re.findall(r"^MemoryMax=(?:([0-9]+)([KMGT]?)\s*)?", "\n".join(texts), re.MULTILINE)
    number, letter = found[-1] if found else ("", "")
    return int(number) * (UNITS[letter] if letter else 1 / 1024 / 1024) if number else None


def check_memory(settings: Settings, unit: Path) -> Iterator[Finding]:
    """Whether all that the workers may take at once fits into the unit's limit."""
    limit = find_memory_limit(unit)
    if limit is None:
        return
    each = WORKER_MB + AT_ONCE * PASSWORD_MB + settings.threads * ANSWER_MB
    sum_, workers = each * settings.workers, settings.workers
    text = f"{workers} workers with {settings.threads} threads take {sum_} MB at most, of MemoryMax {limit:.0f} MB"
    if sum_ > limit:
        mend = f"systemctl set-property cdr-api MemoryMax={sum_}M"
        yield BAD, "memory", f"{text}; fewer workers or threads take less, or run {mend}"
    else:
        yield GOOD, "memory", text


def find_place(dsn: str) -> tuple[str, str]:
    """The server that a connection string names."""
    found = conninfo.conninfo_to_dict(dsn)
    return str(found.get("host", "")), str(found.get("port", 5432))


def count_pools(settings: Settings, connection: Connection) -> int:
    """How many of the service's databases are on the server of a connection, as the settings name it."""
    dsns = {settings.dsn, settings.accounts_dsn, settings.calls_dsn} - {""}
    return max(1, [find_place(dsn) for dsn in dsns].count(find_place(connection.info.dsn)))


def check_connections(subject: Subject, connection: Connection) -> Iterator[Finding]:
    """Whether PostgreSQL lets the service have the connections that it may ask for."""
    wanted = subject.settings.workers * subject.settings.threads * count_pools(subject.settings, connection)
    found = run(connection, "find_connection_limits")[0]
    text = f"the service wants up to {wanted}; the role may have {found['role']}, the server {found['server']} in all"
    if wanted > min(found["role"], found["server"]):
        yield NOTE, "connections", f"{text}: under load requests wait, and then are 503"
    else:
        yield GOOD, "connections", text


def check_server(variable: str, subject: Subject, dsn: str, checks: Iterable[Check]) -> Generator[Finding, None, bool]:
    """Connects and runs the checks of one server, if it is one that can be read: whether it is."""
    try:
        connection = connect(dsn)
    except psycopg.Error as error:
        yield BAD, variable, explain_failure(error, dsn)
        return False
    with connection:
        connection.autocommit = True
        version = connection.info.server_version
        shown = f"PostgreSQL {connection.info.parameter_status('server_version')}, database {connection.info.dbname}"
        if version < 110000:
            yield BAD, variable, f"{shown}: PostgreSQL 11 or newer is needed"
            return False
        if variable != "CDR_API_ACCOUNTS_DSN" and (wrong := find_wrong_database(connection, variable)):
            yield BAD, variable, wrong
            return False
        yield GOOD, variable, shown
        for examine in checks:
            try:
                yield from examine(subject, connection)
            except psycopg.Error as error:
                reason = error.diag.message_primary or " ".join(str(error).split())
                reason += find_mend(error, connection)
                yield BAD, examine.__name__.removeprefix("check_").replace("_", " "), reason
    return True


# What schema.sql makes, or lets the role have.
LACKING = (
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.InvalidSchemaName,
    psycopg.errors.UndefinedFunction,
    psycopg.errors.UndefinedTable,
)


def find_mend(error: psycopg.Error, connection: Connection) -> str:
    """What to run where a check could not look; nothing if that is not known."""
    place, names = Place.of(connection), [row["name"] for row in run(connection, "find_row_security")]
    if names:
        return f"; run {place.execute(*(SHOW_ROWS.format(name=name) for name in names))}"
    return f"; run {place.run_schema()}" if isinstance(error, LACKING) else ""


def find_wrong_database(connection: Connection, variable: str) -> str:
    """Why none of FusionPBX's tables is found; nothing if one is. Every other check would fail for this."""
    place, tables = Place.of(connection), run(connection, "find_schemas")
    if any(table["found"] for table in tables):
        return ""
    if not tables:
        name = "CDR_API_DSN" if variable == "calls" else variable
        databases = place.psql("-l", database="postgres")
        text = f"the database {place.database} has none of FusionPBX's tables"
        return f"{text}; name the right one in {name}: run {databases}; {EDIT}"
    schema = tables[0]["schema"]
    if not tables[0]["usable"]:
        mend = place.execute(f"GRANT USAGE ON SCHEMA {schema} TO {place.user}")
        return f"{place.user} may not use the schema {schema}, where v_xml_cdr is; run {mend}"
    mend = place.execute(f"ALTER ROLE {place.user} IN DATABASE {place.database} SET search_path = {schema}, public")
    return f"v_xml_cdr is in the schema {schema}, where {place.user} does not look; run {mend}"


def check_role(_subject: Subject, connection: Connection) -> Iterator[Finding]:
    found = run(connection, "check_role")[0]
    role, tables, place = found["role"], found["tables"], Place.of(connection)
    if found["superuser"]:
        yield BAD, "role", f"{role} is a superuser: log in as cdr_api, the role that schema.sql makes; run {EDIT}"
    elif found["may_write"]:
        revoke = place.execute(f"REVOKE INSERT, UPDATE, DELETE, TRUNCATE ON {', '.join(tables)} FROM {role};")
        yield BAD, "role", f"{role} may write {' or '.join(tables)}; run {revoke}"
    elif not found["may_read"]:
        yield BAD, "role", f"{role} may not read {' and '.join(tables)}; run {place.run_schema()}"
    else:
        yield GOOD, "role", f"{role} reads {' and '.join(tables)} and writes {'neither' if tables[1:] else 'nothing'}"


def check_superuser(_subject: Subject, connection: Connection) -> Iterator[Finding]:
    """Who we are where the side tables are alone."""
    found = run(connection, "check_role")[0]
    if found["superuser"]:
        yield BAD, "role", f"{found['role']} is a superuser: log in as cdr_api, the role that schema.sql makes"
    else:
        yield GOOD, "role", f"{found['role']} is no superuser"


def check_domains(_subject: Subject, connection: Connection) -> Iterator[Finding]:
    """Domains are read beside the accounts; an archive, where calls are read, need not have them."""
    if "v_domains" not in run(connection, "check_role")[0]["tables"]:
        look = Place.of(connection).psql("-c", "\\dt *.v_domains")
        yield BAD, "domains", f"there is no table v_domains: is this FusionPBX's database? Run {look}"
        return
    found = run(connection, "examine_domains")[0]
    if found["doubles"]:
        mend = Place.of(connection).execute("ALTER TABLE v_domains ADD PRIMARY KEY (domain_uuid);")
        text = f"v_domains has {found['doubles']} rows of a domain that has another, so that its name cannot be told"
        yield BAD, "domains", f"{text}; delete them, and run {mend}"
    if found["far"]:
        text = "v_domains is a foreign table: while its server rewrites it, as an upgrade does, accounts have no domain"
        yield BAD, "domains", f"{text}; set CDR_API_DSN to that server, and CDR_API_CALLS_DSN to this; run {EDIT}"
    if found["domains"] > MANY_DOMAINS and not found["indexed"]:
        text = f"there are {found['domains']:,}, which each request looks through for a name"
        yield NOTE, "domains", f"{text}; run {Place.of(connection).execute(DOMAINS_INDEX)}"


def check_publications(_subject: Subject, connection: Connection) -> Iterator[Finding]:
    """Side tables that are replicated: rows of their own on two nodes stop the replication, of calls too."""
    found = run(connection, "find_publications")
    names = " and ".join(row["name"] for row in found)
    if found:
        does = "replicates" if found[0]["are_here"] else "would replicate"
        text = f"{names} {does} the side tables, and two nodes that write them stop it; put them into a database of"
        how = f"{MAKE_APART}  # and set CDR_API_ACCOUNTS_DSN (docs/clusters.md)"
        yield BAD, "replication", f"{text} their own; run {how}"
    else:
        yield GOOD, "replication", "no publication takes the side tables"


def check_leftovers(_subject: Subject, connection: Connection) -> Iterator[Finding]:
    """Replicated side tables that another database has taken the place of."""
    found = run(connection, "find_publications")
    if found and found[0]["are_here"]:
        names = " and ".join(row["name"] for row in found)
        drop = Place.of(connection).execute(DROP_BESIDE)
        yield BAD, "replication", f"{names} replicates side tables that are of no use here any more; run {drop}"


def check_side_tables(_subject: Subject, connection: Connection) -> Iterator[Finding]:
    version = run(connection, "find_version")[0]["version"]
    if version == SCHEMA_VERSION:
        yield GOOD, "side tables", f"version {version}"
    else:
        mend = Place.of(connection).run_schema()
        yield BAD, "side tables", f"version {version} instead of {SCHEMA_VERSION}; run {mend}"


def check_accounts(_subject: Subject, connection: Connection) -> Iterator[Finding]:
    found = run(connection, "count_accounts")[0]
    text = f"{found['accounts']}; {found['tokens']} live tokens, {found['expiring']} of them expire within 30 days"
    yield NOTE if found["expiring"] else GOOD, "accounts", text


# What mends each warning of the service.
MENDS = {
    "proxies": change_setting("CDR_API_PROXIES", 1),
    "proxy count": change_setting("CDR_API_PROXIES", 1),
    "HTTP version": f"cp {Path(__file__).parent.parent}/deploy/nginx-path.conf /etc/nginx/snippets/cdr-api.conf"
    " && nginx -t && systemctl reload nginx",
    "workers": "systemctl cat cdr-api  # no --worker-class must be there",
}


def check_warnings(subject: Subject, connection: Connection) -> Iterator[Finding]:
    """What the running service saw of how requests arrive, in the last day; not what the settings have mended since."""
    mended = "proxies" if subject.settings.proxies else "proxy count"
    rows = [row for row in run(connection, "select_warnings") if row["name"] != mended]
    for row in rows:
        mend = MENDS.get(row["name"])
        yield BAD, row["name"], f"{row['text']} (seen {row['seen_at']})" + (f"; run {mend}" if mend else "")
    if not rows:
        yield GOOD, "requests", "arrive as the settings say, as far as the service has seen"
