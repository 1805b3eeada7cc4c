"""What flask check looks at in the database that holds the calls."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import psycopg
from psycopg import sql

from cdr.database import Connection, codec_of, run
from cdr.parsing import parse_zone
from cdr.remedies import EDIT, Place
from cdr.selection import (
    FIELDS,
    FIRST_UUID,
    STRINGS,
    Domains,
    Selection,
    Source,
    compose_instant,
    compose_moment,
    compose_select,
)
from cdr.settings import Settings
from cdr.statements import STATEMENTS, mogrify

Finding = tuple[str, str, str]  # a mark, the subject, what was found and what mends it
GOOD, NOTE, BAD = "✓", "!", "✗"

RANGE_INDEX = "CREATE INDEX CONCURRENTLY IF NOT EXISTS cdr_api_calls ON v_xml_cdr (domain_uuid, end_stamp, {key});"
EPOCH_INDEX = "CREATE INDEX CONCURRENTLY IF NOT EXISTS cdr_api_calls ON v_xml_cdr (domain_uuid, end_epoch, {key});"
NAMELESS_INDEX = (
    "CREATE INDEX CONCURRENTLY IF NOT EXISTS cdr_api_nameless ON v_xml_cdr (domain_name, end_stamp, xml_cdr_uuid)"
    " WHERE domain_uuid IS NULL;"
)
SHOW_ROWS = "ALTER TABLE {name} DISABLE ROW LEVEL SECURITY;"
SHOW_DOUBLES = "SELECT {key} FROM v_xml_cdr GROUP BY 1 HAVING count(*) > 1;"
MANY_NAMELESS = 10_000
WEEK = 7 * 86400  # seconds
SAMPLE_ROWS = 20_000  # spread over the table
NO_SAMPLES = (psycopg.errors.WrongObjectType, psycopg.errors.FeatureNotSupported)  # of a view or a foreign table


@dataclass(frozen=True)
class Subject:
    """What the checks are told: the settings, and FusionPBX's domains as they stand beside the accounts."""

    settings: Settings
    domains: Domains


# Tables -----------------------------------------------------------------------


def find_columns(connection: Connection) -> dict[str, str]:
    """The types of v_xml_cdr's columns by name."""
    return {row["column_name"]: row["data_type"] for row in run(connection, "select_columns")}


def check_columns(_subject: Subject, connection: Connection) -> Iterator[Finding]:
    columns = find_columns(connection)
    if not columns:
        look = Place.of(connection).psql("-c", "\\dt *.v_xml_cdr")
        yield BAD, "columns", f"there is no table v_xml_cdr: is this FusionPBX's database? Run {look}"
        return
    renamed = {"xml_cdr_uuid"} if "uuid" in columns and "xml_cdr_uuid" not in columns else set()  # 4.x's key
    columns |= dict.fromkeys(renamed, "uuid")
    lacking = [name for name in FIELDS if name not in columns]
    if {"uuid", "xml_cdr_uuid"} <= columns.keys() - renamed:
        count = Place.of(connection).execute("SELECT count(uuid), count(xml_cdr_uuid) FROM v_xml_cdr;")
        text = "there are both uuid and xml_cdr_uuid: which one is the key cannot be told"
        yield BAD, "columns", f"{text}; drop the one that is empty: run {count}"
    text = f"{len(lacking)} of the 66 fields are always null here: {', '.join(lacking)}" if lacking else "all 66 fields"
    yield GOOD, "columns", text


def check_tables(_subject: Subject, connection: Connection) -> Iterator[Finding]:
    """Whether the feed can tell which transaction wrote a row."""
    found = run(connection, "find_tables")[0]
    odd = found["odd"]
    if not odd and found["has_distributed"]:
        odd = run(connection, "find_distributed", members=found["members"])[0]["odd"]
    parts = len(found["members"] or ()) - 1
    if odd:
        yield BAD, "tables", f"{odd}: the feed is refused with 409, the other routes go on"
    else:
        yield GOOD, "tables", "v_xml_cdr is a plain table" + (f" of {parts} partitions" if parts else "")


def check_row_security(_subject: Subject, connection: Connection) -> Iterator[Finding]:
    names = [row["name"] for row in run(connection, "find_row_security")]
    if names:
        mend = Place.of(connection).execute(*(SHOW_ROWS.format(name=name) for name in names))
        yield BAD, "row security", f"a policy may hide rows of {', '.join(names)}, so every answer is 503; run {mend}"
    else:
        yield GOOD, "row security", "no policy hides a row"


def check_key(_subject: Subject, connection: Connection) -> Iterator[Finding]:
    key = "uuid" if "uuid" in find_columns(connection) else "xml_cdr_uuid"
    keyless = run(connection, "examine_tables")[0]["keyless"]
    loose = run(connection, "examine_session")[0]["loose"]
    doubles = run(connection, "count_doubles")[0]["calls"] if keyless or loose else 0
    if keyless:
        text = f"{keyless} has no primary key, and {doubles} calls are stored more than once"
        mend = Place.of(connection).execute(f"ALTER TABLE {keyless} ADD PRIMARY KEY ({key});")
        yield BAD, "key", f"{text}; each counts once, and every answer is slow; run {mend}"
    elif doubles:
        text = f"{doubles} calls are stored more than once, in partitions, children or what a view puts together"
        find = Place.of(connection).execute(SHOW_DOUBLES.format(key=key))
        yield BAD, "key", f"{text}, and come that often; delete all but one of each: run {find}"
    else:
        yield GOOD, "key", "no call is stored twice" if loose else "no call can be stored twice"


def check_index(_subject: Subject, connection: Connection) -> Iterator[Finding]:
    """Whether an index serves the range of a day: of the table, or of its parts by the plan of the real statement."""
    place = Place.of(connection)
    for row in run(connection, "select_invalid_indexes"):
        drop = place.execute(f"DROP INDEX CONCURRENTLY {row['index_name']};")
        yield BAD, "index", f"{row['index_name']} is left over from a build that was interrupted; run {drop}"
    index, served = find_index(connection)
    parts = run(connection, "find_parts")[0]
    far = ", ".join(parts["far"])
    if far and (served or far == "v_xml_cdr"):
        yield NOTE, "index", f"{far} is on another server, where this index has to be: {index}"
    elif served:
        yield GOOD, "index", "an index serves ranges"
    elif parts["viewed"]:
        yield NOTE, "index", f"v_xml_cdr is a view, and what it reads has to have this index: {index}"
    elif parts["partitioned"]:  # of which PostgreSQL makes no index concurrently; the name may be an older table's
        index = place.execute(f"CREATE INDEX ON {index.partition(' ON ')[2]}")
        yield BAD, "index", f"no index serves ranges; run {index}  # meanwhile no call is stored"
    else:
        yield BAD, "index", f"no index serves ranges; run {place.execute(index)}"


def find_index(connection: Connection) -> tuple[str, bool]:
    """The statement that makes the index for the range of a day, and whether one serves it already."""
    columns, found = find_columns(connection), run(connection, "examine_session")[0]
    if columns.get("end_stamp") != "timestamp with time zone":  # as in 4.x, where the epochs count
        index, served = EPOCH_INDEX, found["epochs_indexed"]
    else:
        # Of a table that is distributed (Citus) the plan does not tell; the catalog does.
        index, served = RANGE_INDEX, found["indexed"] or is_range_planned(connection)
    return index.format(key="xml_cdr_uuid" if "xml_cdr_uuid" in columns else "uuid"), served


def find_missing_index(connection: Connection) -> str | None:
    """The statement for an index that is missing, if it can be made while calls are stored."""
    parts = run(connection, "find_parts")[0]
    index, served = find_index(connection)
    return None if served or parts["far"] or parts["partitioned"] or parts["viewed"] else index


def is_range_planned(connection: Connection) -> bool:
    """Whether the plan for the range of a domain goes by the end of calls in an index."""
    nodes = find_plan(connection, "2026-01-01", "2026-01-02")
    return any("end_stamp" in node.get("Index Cond", "") for node in nodes)


def find_plan(connection: Connection, start: str, end: str) -> Iterator[dict[str, Any]]:
    """The nodes of the plan for the range of a domain, of the statement that serves it."""
    domains, until = Domains([FIRST_UUID], [""], [""]), datetime.fromisoformat(end)
    selection = Selection(domains, by="end", part="dated", after=(start, FIRST_UUID), end=until)
    select_calls = compose_select(FIELDS, Source("calls_in_parts", ordered=True, feed=False, distinct=False))
    explain = STATEMENTS["explain"].as_string()
    query = mogrify(connection, f"{explain} {select_calls}", selection.parameters())
    with connection.transaction(force_rollback=True):
        run(connection, "forbid_scans")
        nodes = [connection.execute(query).fetchall()[0]["QUERY PLAN"][0]["Plan"]]
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        yield node


# Calls ------------------------------------------------------------------------


def check_domains_of_calls(subject: Subject, connection: Connection) -> Iterator[Finding]:
    """Calls that belong to no domain, in one pass with whatever else takes a look at every call."""
    days = subject.settings.lookback_days
    query = STATEMENTS["examine_calls"].format(end_at=compose_instant("end"))
    domains = subject.domains.fit(codec_of(connection))
    parameters = {"days": days, "zone": find_zone(subject, connection), **domains.parameters()}
    found = connection.execute(mogrify(connection, query.as_string(), parameters)).fetchall()[0]
    yield from check_nameless(found["nameless"], connection)
    if found["of_no_domain"]:
        text = f"{found['of_no_domain']} belong to no domain that exists; only accounts that read everything get them"
        yield NOTE, "lost calls", text
    else:
        yield GOOD, "lost calls", "every call belongs to a domain"
    if found["late"]:
        text = f"{found['late']} were stored more than {days} days after their end; the feed left them out"
        yield NOTE, "late calls", f"{text}, the totals show them"
    else:
        yield GOOD, "late calls", f"none was stored more than {days} days after its end"
    if found["odd"]:
        text = f"{found['odd']} have a billsec below 0 or over 31 days, as a clock that was set back makes"
        yield NOTE, "durations", f"{text}; they are summed as stored (min_billsec=0 leaves out the negative)"
    else:
        yield GOOD, "durations", "none is negative or absurd"
    yield from judge_importer(found["gaps"])


def check_nameless(calls: int, connection: Connection) -> Iterator[Finding]:
    """Calls without a domain_uuid are few, or need an index of their own: no other brings them in their order."""
    if calls > MANY_NAMELESS and not run(connection, "examine_session")[0]["nameless_indexed"]:
        mend = Place.of(connection).execute(NAMELESS_INDEX)
        yield NOTE, "nameless calls", f"{calls} have no domain_uuid, which makes pages slow; run {mend}"


def find_zone(subject: Subject, connection: Connection) -> str:
    return subject.settings.timezone or connection.info.parameter_status("TimeZone") or "UTC"


def judge_importer(gaps: Sequence[float | None]) -> Iterator[Finding]:
    """Whether the newest call is unusually old. gaps: seconds since the newest call, now and one to eight weeks ago."""
    now, *weeks = gaps
    # Weeks that lie in the gap itself would make it usual.
    usual = [gap for week, gap in enumerate(weeks, 1) if gap is not None and now and now < week * WEEK]
    if now is None or (not usual and now < len(weeks) * WEEK):
        yield GOOD, "importer", "too few calls are stored to tell how old the newest usually is"
    elif now > 900 + 2 * max(usual, default=0):
        text = f"the newest call ended {now / 3600:.1f} h ago"
        if usual:
            text += f", at this hour of other weeks at most {max(usual) / 3600:.1f} h"
        look = "ls /var/log/freeswitch/xml_cdr | wc -l; systemctl status xml_cdr"
        text += f": if files wait, FusionPBX's import sleeps: {look}"
        yield NOTE, "importer", f"{text} (X-Complete-Through speaks of what is stored)"
    else:
        yield GOOD, "importer", f"the newest call ended {now / 3600:.1f} h ago"


def check_stamps(subject: Subject, connection: Connection) -> Iterator[Finding]:
    """Whether stamps and epochs are the same instants, by a sample that is spread over the table."""
    zone = find_zone(subject, connection)
    conditions = {"end_is_zoned": compose_moment("zoned", "end"), "readable": compose_moment("readable", "end")}
    query = STATEMENTS["compare_stamps"].format(sample=STATEMENTS["sample"], **conditions)
    with connection.transaction(force_rollback=True):
        run(connection, "try_time_zone", time_zone=zone)
        try:
            found = connection.execute(query, {"rows": SAMPLE_ROWS}).fetchall()[0]
        except NO_SAMPLES:
            return
    if not found["differ"]:
        yield GOOD, "stamps", f"of {found['looked_at']} calls all end_stamps are the instants of their end_epochs"
        return
    share = f"{found['differ']} of {found['looked_at']} calls, most by {found['seconds']:+.0f} s"
    if found["is_text"]:
        yield NOTE, "stamps", f"end_stamp is in another zone than {zone} in {share}; the epochs count here"
    else:
        text = f"end_stamp is another instant than end_epoch in {share}"
        yield NOTE, "stamps", f"{text}: stamps count, so such calls may lie in another day or month"


def check_text(_subject: Subject, connection: Connection) -> Iterator[Finding]:
    """The encoding; in SQL_ASCII, which checks nothing, of how many calls of a sample some text is not UTF-8."""
    encoding = connection.info.parameter_status("server_encoding") or "UTF8"
    if encoding != "SQL_ASCII":
        yield GOOD, "text", f"the database's encoding is {encoding}"
        return
    shown = "the database's encoding is SQL_ASCII, which checks nothing"
    # Without xml, which is as long as all others a hundred times over, and says again what they do.
    columns = [name for name in find_columns(connection) if name in STRINGS - {"xml"}]
    listed = sql.SQL(", ").join(sql.Identifier("cdr", name) for name in columns)
    query = STATEMENTS["count_broken_text"].format(sample=STATEMENTS["sample"], columns=listed)
    try:
        found = connection.execute(query, {"rows": SAMPLE_ROWS}).fetchall()[0]
    except NO_SAMPLES:
        yield GOOD, "text", shown
        return
    share = f"{found['broken']} of a sample of {found['looked_at']} calls hold bytes that are not UTF-8"
    yield NOTE if found["broken"] else GOOD, "text", f"{shown}; {share}, which are shown as U+FFFD"


# Feed -------------------------------------------------------------------------


def check_feed(_subject: Subject, connection: Connection) -> Iterator[Finding]:
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
    place = Place.of(connection)
    end = place.execute(f"SELECT pg_terminate_backend({pid});" if pid else "SELECT * FROM pg_prepared_xacts;")
    text = f"held back by {seconds:.0f} s: {found['holder']} has written and not ended; if that is wrong, run {end}"
    yield NOTE if seconds < 3600 else BAD, "feed", text


def check_standby(_subject: Subject, connection: Connection) -> Iterator[Finding]:
    found = run(connection, "find_standby_lag")[0]
    if not found["in_recovery"]:
        return
    lag = found["seconds"]
    text = f"a standby, {lag:.0f} s behind" if lag is not None else "a standby that has replayed nothing yet"
    if lag is None or lag > 300:
        look = Place.of(connection).execute("SELECT * FROM pg_stat_wal_receiver;")
        text += f"; run {look}"
    yield GOOD if lag is not None and lag < 60 else NOTE if lag is not None and lag <= 300 else BAD, "standby", text


def check_timeline(_subject: Subject, connection: Connection) -> Iterator[Finding]:
    """Without the function a cursor cannot be compared with what the server has been through."""
    found = run(connection, "find_timeline")[0]
    yield GOOD, "timeline", str(found["timeline"])


def check_subscription(_subject: Subject, connection: Connection) -> Iterator[Finding]:
    """Where a subscription fills the table, up to when it has applied what its publisher wrote."""
    members = run(connection, "find_tables")[0]["members"]
    found = run(connection, "find_subscriptions", members=members)[0]
    if not found["subscriptions"]:
        return
    if found["known"] and found["applied"]:
        yield GOOD, "subscription", f"fills v_xml_cdr, has applied everything up to {found['applied']}"
    else:
        text = "fills v_xml_cdr and does not run, or copies still: the feed comes without X-Complete-Through"
        look = Place.of(connection).execute("SELECT * FROM pg_stat_subscription;")
        yield BAD, "subscription", f"{text}; run {look}"


# Time -------------------------------------------------------------------------


def check_time_zone(subject: Subject, connection: Connection) -> Iterator[Finding]:
    chosen = subject.settings.timezone
    zone = chosen or connection.info.parameter_status("TimeZone") or "UTC"
    try:
        parse_zone(zone)
        with connection.transaction(force_rollback=True):
            run(connection, "try_time_zone", time_zone=zone)
        rows = run(connection, "select_offsets", time_zone=zone)
    except (ValueError, psycopg.DataError):
        yield BAD, "time zone", f"{zone} is not a time zone that both sides know; set CDR_API_TIMEZONE: run {EDIT}"
        return
    days = [datetime.fromtimestamp(row["epoch"], ZoneInfo(zone)) for row in rows]
    odd = sum(day.utcoffset() != timedelta(seconds=row["seconds"]) for day, row in zip(days, rows, strict=True))
    if odd:
        text = f"PostgreSQL's rules of {zone} differ from ours on {odd} of {len(days)} days"
        mend = "apt-get install --only-upgrade tzdata  # on both machines, then restart both programs"
        yield BAD, "time zone", f"{text}: there a range and a day of the totals are not the same; run {mend}"
    else:
        yield GOOD, "time zone", f"{zone}, by {'CDR_API_TIMEZONE' if chosen else 'the database'}"


def check_clock(_subject: Subject, connection: Connection) -> Iterator[Finding]:
    before = time.time()
    server = float(run(connection, "read_clock")[0]["epoch"])
    difference = server - (before + time.time()) / 2
    text = f"the server's differs from ours by {difference:+.1f} s"
    if abs(difference) < 5:
        yield GOOD, "clock", text
    else:
        yield BAD, "clock", f"{text}; run timedatectl set-ntp true  # there and here"


def check_date_style(_subject: Subject, connection: Connection) -> Iterator[Finding]:
    style = connection.info.parameter_status("DateStyle")
    yield GOOD, "DateStyle", f"{style}; no answer depends on it"


CHECKS = (
    check_columns,
    check_tables,
    check_row_security,
    check_key,
    check_index,
    check_domains_of_calls,
    check_stamps,
    check_text,
    check_feed,
    check_timeline,
    check_subscription,
    check_standby,
    check_time_zone,
    check_date_style,
    check_clock,
)
