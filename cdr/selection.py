"""Which calls are asked for, and the statement that selects them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from psycopg import sql

from cdr.database import PooledConnection
from cdr.parsing import Parser, integer_between, list_of, parse_choices, parse_flag, parse_prefix, parse_uuid
from cdr.statements import STATEMENTS, can_hold, mogrify, show_text

# Fields -----------------------------------------------------------------------

# The 66 keys of a call, in their order. Everything that is not named below is
# a string.
FIELDS = tuple(
    """
    xml_cdr_uuid domain_uuid extension_uuid sip_call_id domain_name accountcode direction default_language context
    caller_id_name caller_id_number caller_destination source_number destination_number start_epoch start_stamp
    answer_stamp answer_epoch end_epoch end_stamp duration mduration billsec billmsec bridge_uuid read_codec
    read_rate write_codec write_rate remote_media_ip network_addr record_path record_name leg originating_leg_uuid
    pdd_ms rtp_audio_in_mos last_app last_arg voicemail_message missed_call call_center_queue_uuid cc_side
    cc_member_uuid cc_queue_joined_epoch cc_queue cc_member_session_uuid cc_agent_uuid cc_agent cc_agent_type
    cc_agent_bridged cc_queue_answered_epoch cc_queue_terminated_epoch cc_queue_canceled_epoch cc_cancel_reason
    cc_cause waitsec conference_name conference_uuid conference_member_id digits_dialed pin_number hangup_cause
    hangup_cause_q850 sip_hangup_disposition xml
    """.split()  # noqa: SIM905 (a list would take 66 lines)
)
# What fields= takes besides; null in releases that lack them.
MORE_FIELDS = (
    "status",
    "insert_date",
    "update_date",
    "record_length",
    "hold_accum_seconds",
    "provider_uuid",
    "ring_group_uuid",
    "ivr_menu_uuid",
    "call_disposition",
    "conversation_uuid",  # no column, but made of some
)
INTEGERS = {"duration", "billsec", "waitsec", "mduration", "billmsec", "pdd_ms", "record_length", "hold_accum_seconds"}
NUMBERS = {"rtp_audio_in_mos"}
BOOLEANS = {"voicemail_message", "missed_call"}
STRINGS = {*FIELDS, *MORE_FIELDS} - INTEGERS - NUMBERS - BOOLEANS

parse_fields = list_of((*FIELDS, *MORE_FIELDS), "field")

# Each is a placeholder of matching_calls (queries.sql), or the name of a condition that it takes besides.
FILTERS: dict[str, Parser] = {
    "direction": parse_choices,
    "leg": str,
    "accountcode": str,
    "extension_uuid": parse_uuid,
    "caller_id_name": str,
    "caller_id_number": str,
    "source_number": str,
    "destination_number": str,
    "hangup_cause": str,
    "status": str,
    "answered": parse_flag,
    "min_billsec": integer_between(0, 10**12),
    "billable_only": parse_flag,
    "destination_prefix": parse_prefix,
    "source_prefix": parse_prefix,
}
PREFIXES = ("destination_prefix", "source_prefix")


# Selection --------------------------------------------------------------------

FIRST_UUID = "00000000-0000-0000-0000-000000000000"
LAST_UUID = "ffffffff-ffff-ffff-ffff-ffffffffffff"

# End stamp and uuid of a call, which a page ends with; (None, None) stands
# before the calls that have no end stamp.
Key = tuple[str | None, str | None]
FIRST_KEY: Key = ("-infinity", FIRST_UUID)


@dataclass(frozen=True)
class Domains:
    """Whose calls a request may read: those of some domains, or every call, those of no domain too.

    A call belongs to the domain of its domain_uuid; one without a uuid to the
    domain that bears its domain_name, if no other domain bears it (FACTS).
    """

    uuids: Sequence[str] = ()
    names: Sequence[str | None] = ()  # of the uuids
    lone_names: Sequence[str | None] = ()  # those that no other domain bears
    everything: bool = False
    strays: Sequence[str] | None = None  # of everything: the uuids of deleted domains, where they have been looked for
    named: bool = False  # whether the request names them
    chosen_uuids: Sequence[str] | None = None  # of all that the token was made for
    newest_grant: int | None = None  # of the account's grants, when all of them count
    absent: Sequence[str] = ()  # the uuids that the account or the token was given, and no domain has
    codec: str | None = None  # of the database that the names are from, which read_text has read

    def fit(self, codec: str | None) -> Domains:
        """The same for calls in a database of another codec: what that cannot hold, none of its calls can bear."""
        if codec == self.codec:
            return self
        encoding = codec or "utf-8"
        shown = [show_text(name, self.codec) for name in self.names]
        names = [None if name is None else name.encode(encoding, "replace").decode(encoding) for name in shown]
        lone_names = [name if name is not None and can_hold(codec, name) else None for name in self.lone_names]
        return replace(self, names=names, lone_names=lone_names, codec=codec)

    def statement(self, connection: PooledConnection) -> str:
        """Of queries.sql: what selects their calls, in the connection's transaction."""
        if self.everything:
            return "calls_of_all" if self.strays is None else "calls_of_all_in_parts"
        if len(self.uuids) != 1 or len(self.lone_names) > 1:
            return "calls_of_domains"
        if not (self.lone_names and connection.nameless):
            return "calls_with_uuid"
        return "calls_in_parts" if connection.indexed or connection.epochs_indexed else "calls_of_domain"

    def parameters(self) -> dict[str, Any]:
        return {
            "domain_uuid": self.uuids[0] if len(self.uuids) == 1 else None,
            "domain_uuids": [*self.uuids, *(self.strays or ())],
            "domain_names": [*self.names, *[None] * len(self.strays or ())],
            "lone_names": list(self.lone_names),
            "lone_name": self.lone_names[0] if len(self.lone_names) == 1 else None,
        }


LATEST_EPOCH = 253_402_300_800  # the end of the year 9999


def find_epoch(stamp: str | None, otherwise: int) -> int:
    """The whole epoch second in which an instant in ISO 8601 lies."""
    try:
        return int(datetime.fromisoformat(stamp or "").timestamp() // 1)
    except ValueError:  # infinity, or a year that Python does not know
        return otherwise


@dataclass(frozen=True)
class Selection:
    """Which calls a request asks for: what becomes the parameters of select_calls (queries.sql).

    Without a range or a key it is every call of the domains that the filters let through.
    """

    domains: Domains
    filters: Mapping[str, Any] = field(default_factory=dict)  # those that were given
    by: str = ""  # the stamp that start and end are for: "start", "end", or none
    start: datetime | None = None
    end: datetime | None = None  # excluded
    part: str = "both"
    newest_first: bool = False
    after: Key = FIRST_KEY
    before: Key | None = None
    uuids: Sequence[str] | None = None
    low: str | None = None  # of the transactions that wrote the calls, see written
    high: str | None = None
    deep: str | None = None  # in the place of low for what ended before boundary
    boundary: datetime | None = None
    possible: bool = True
    zone: str = "UTC"  # the service's, of stamps without one, as 4.x has
    limit: int | None = None

    @classmethod
    def of(cls, domains: Domains, values: Mapping[str, Any], zone: str, codec: str | None = None) -> Selection:
        """The calls that a request's filters let through.

        zone: the service's. codec: Python's name of the database's encoding (None: it
        holds all text); what it cannot hold no call can have.
        """
        filters = {name: values[name] for name in FILTERS if values.get(name) is not None}
        held = {name: value for name, value in filters.items() if can_hold(codec, value)}
        possible = len(held) == len(filters) and (domains.everything or bool(domains.uuids))
        return cls(domains.fit(codec), held, possible=possible, zone=zone)

    def within(self, start: datetime, end: datetime, by: str) -> Selection:
        """Only calls whose stamp lies in [start, end)."""
        ranged = replace(self, by=by, start=start, end=end)
        return ranged.ending_since(start) if by == "end" else ranged

    def ending_since(self, instant: datetime) -> Selection:
        """Only calls that end at an instant or later: after the last possible key before it."""
        before = instant - timedelta(microseconds=1)
        return replace(self, part="dated", after=(before.isoformat(), LAST_UUID))

    def identity(self) -> dict[str, Any]:
        """What a cursor is bound to. Only what was given, so that a release that adds a filter resets nobody."""
        edges = {"from": self.start and self.start.isoformat(), "to": self.end and self.end.isoformat()}
        given = {**edges, "order": "desc" if self.newest_first else None}
        return {**self.filters, **{name: value for name, value in given.items() if value}, "by": self.by}

    def parts(self, key: Key | None, limit: int | None) -> list[Selection]:
        """The selection of each statement that answers a request, after a key.

        First the calls that have an end stamp, then those that have none, in
        either order; never both in one page.
        """
        dated = replace(self, limit=limit, part="dated")
        undated = replace(dated, part="undated", after=(None, None))
        if key is not None:
            if key[0] is None:
                return [undated.behind(key)]
            dated = dated.behind(key)
        return [dated, undated] if self.may_be_undated and limit is None else [dated]

    def behind(self, key: Key) -> Selection:
        """Only calls that come after a key in their order."""
        return replace(self, before=key) if self.newest_first else replace(self, after=key)

    @property
    def directions(self) -> list[str]:
        return str(self.filters.get("direction") or "").split(",")

    @property
    def conditions(self) -> tuple[str, ...]:
        """Of queries.sql: those that matching_calls takes besides."""
        asked = [name for name in PREFIXES if name in self.filters]
        if len(self.directions) > 1:
            asked.append("directions")
        if self.before and self.before[1]:
            asked.append("before_uuid" if self.before[0] is None else "before_key")
        return tuple(asked)

    @property
    def needs_sort(self) -> bool:
        """Whether no index brings these in their order: those of some uuids are found by these."""
        return self.uuids is not None or self.by == "start" or len(self.domains.uuids) != 1 or self.domains.everything

    @property
    def takes_windows(self) -> bool:
        """Whether no index brings these in their order, but one finds those of a window of ends."""
        several = len(self.domains.uuids) > 1 or self.domains.everything
        return several and self.possible and self.part == "dated" and not self.newest_first

    @property
    def may_be_undated(self) -> bool:
        """Whether calls without an end stamp can be among these."""
        return self.by != "end"

    @property
    def may_be_followed(self) -> bool:
        """Whether these are a part that calls without an end stamp can follow."""
        return self.part == "dated" and self.may_be_undated

    def source(self, connection: PooledConnection) -> Source:
        """What select_calls reads from, in this connection's transaction."""
        return Source(
            self.domains.statement(connection),
            ordered=connection.indexed and self.part == "dated" and not self.needs_sort,
            feed=self.high is not None,
            distinct=connection.doubled,
            zoned=connection.zoned,
            backwards=self.newest_first,
            conditions=self.conditions,
        )

    def parameters(self) -> dict[str, Any]:
        """Those of select_calls."""
        (stamp, uuid), (before_stamp, before_uuid) = self.after, self.before or (None, None)
        to = self.end.isoformat() if self.end else None
        return {
            **dict.fromkeys(FILTERS),
            **self.filters,
            "direction": self.filters.get("direction") if len(self.directions) == 1 else None,
            "directions": self.directions,
            **self.domains.parameters(),
            "by": self.by,
            "from": self.start and self.start.isoformat(),
            "to": to,
            "from_epoch": max(find_epoch(stamp, 0) - 1, 0),  # less: an instant is rounded to microseconds
            "to_epoch": find_epoch(to, LATEST_EPOCH) + 1 if self.by == "end" else LATEST_EPOCH,
            "possible": self.possible,
            "zone": self.zone,
            "part": self.part,
            "after_stamp": stamp,
            "after_uuid": uuid,
            "before_stamp": before_stamp,
            "before_uuid": before_uuid,
            "uuids": None if self.uuids is None else list(self.uuids),
            "low": self.low,
            "high": self.high,
            "deep": self.deep,
            "boundary": self.boundary and self.boundary.isoformat(),
            "limit": self.limit,
        }


def find_keys(connection: PooledConnection, selection: Selection) -> list[Key]:
    """The keys of the selected calls."""
    query = compose_select(("end_stamp", "xml_cdr_uuid"), selection.source(connection))
    rows = connection.execute(mogrify(connection, query, selection.parameters()))
    return [(row["end_stamp"], str(row["xml_cdr_uuid"])) for row in rows]


def find_parts(connection: PooledConnection, domains: Domains) -> Domains:
    """The same domains, such that an index on domain_uuid serves them."""
    if not domains.everything:
        return domains
    query = STATEMENTS["find_strays"].format(each_domain_uuid=STATEMENTS["each_domain_uuid"])
    return replace(domains, strays=connection.execute(query, {"known": list(domains.uuids)}).fetchall()[0]["uuids"])


FIRST_WINDOW = timedelta(hours=1)


def find_windows(
    connection: PooledConnection, page: Selection, page_before: timedelta | None = None
) -> list[Selection]:
    """The calls among which a page may be found, fewer first; the last are all that are left.

    No index brings the calls of several domains in their order: without an upper
    edge each page would sort all that is left. So it is looked for in windows that
    double until one holds more than the page. What ends at the edge or later comes
    after all of the page, so nothing is passed over.

    page_before is the time between the first and the last call of the page before:
    the next is likely to be as wide. Of what was written since the last poll there is
    little, and its first page is looked for among all: to look in windows would read
    everything once more.
    """
    width = page_before * 1.5 if page_before else FIRST_WINDOW
    widths: list[timedelta] = []
    if page.takes_windows and connection.indexed and (page.low is None or page_before):
        with suppress(ValueError, OverflowError):  # -infinity, or beyond the year 9999
            start, now = datetime.fromisoformat(page.after[0] or ""), datetime.now(UTC)
            while start + width < now:
                widths.append(width)
                width *= 2
    if not widths:
        return [page]
    narrow = replace(page, domains=find_parts(connection, page.domains), by="end")
    return [*(replace(narrow, end=start + width) for width in widths), page]


# Statements -------------------------------------------------------------------


class Source(NamedTuple):
    """What selected calls are read from."""

    own_calls: str  # the statement that selects the calls of some domains
    ordered: bool  # whether an index brings them in the order of their key
    feed: bool  # whether by the transactions that wrote them
    distinct: bool  # whether a key may be stored twice
    zoned: bool = False  # whether stamps are known to be timestamptz
    backwards: bool = False  # whether in the reverse of that order
    conditions: tuple[str, ...] = ()  # that the calls must meet besides


def compose_direction(source: Source) -> sql.SQL:
    return sql.SQL(" DESC") if source.backwards else sql.SQL("")


@functools.lru_cache(maxsize=64)
def compose_matching(source: Source) -> sql.Composed:
    """matching_calls for a source."""
    columns = sql.SQL("cdr.*, cdr.xmin AS written_by" if source.feed else "cdr.*")
    in_order = STATEMENTS["in_order"].format(backwards=compose_direction(source))
    order = sql.SQL("\n") + in_order if source.ordered else sql.SQL("")
    more = [sql.SQL("\n") + STATEMENTS[name] for name in source.conditions]
    own_calls: sql.Composable = STATEMENTS[source.own_calls].format(columns=columns, order=order)
    instants = {f"{name}_at": compose_instant(name, zoned=source.zoned) for name in ("start", "answer", "end")}
    written: sql.Composable = sql.SQL("")
    if source.feed:
        written = STATEMENTS["written"].format(end_at=instants["end_at"])
    if source.distinct:
        own_calls = STATEMENTS["distinct_calls"].format(own_calls=own_calls, written=written)
        written = sql.SQL("")
    end_is_zoned = sql.SQL("true") if source.zoned else compose_moment("zoned", "end")
    return STATEMENTS["matching_calls"].format(
        own_calls=own_calls, written=written, more=sql.SQL("").join(more), end_is_zoned=end_is_zoned, **instants
    )


def compose_moment(statement: str, name: str) -> sql.Composed:
    """zoned or readable, for the start, the answer or the end."""
    return STATEMENTS[statement].format(stamp=sql.Identifier(f"{name}_stamp"))


def compose_instant(name: str, *, zoned: bool = False) -> sql.Composed:
    """instant, for the start, the answer or the end; zoned: it is known to be a timestamptz."""
    stamp = sql.Identifier(f"{name}_stamp")
    if zoned:
        return STATEMENTS["zoned_instant"].format(stamp=stamp)
    return STATEMENTS["instant"].format(
        stamp=stamp,
        epoch=sql.Identifier(f"{name}_epoch"),
        zoned=compose_moment("zoned", name),
        readable=compose_moment("readable", name),
    )


def plain_column(name: str) -> sql.Composable:
    """A column as it is."""
    return sql.Identifier("calls", name)


def escaped_column(name: str) -> sql.Composable:
    """A column, its text such that no spreadsheet takes it for a formula."""
    return escape_text(name) if name in STRINGS else plain_column(name)


def escape_text(name: str) -> sql.Composed:
    return STATEMENTS["escape_formula"].format(column=sql.Identifier("calls", name), name=sql.Identifier(name))


def typed_column(name: str) -> sql.Composable:
    """A column of the type that it has in JSON."""
    if name == "leg":  # a char(1), of which a cast would take the blank
        return plain_column(name)
    type_name = "text" if name in STRINGS else "boolean" if name in BOOLEANS else "numeric"
    return sql.SQL("calls.{0}::{1} AS {0}").format(sql.Identifier(name), sql.SQL(type_name))


@functools.lru_cache(maxsize=256)
def compose_select(
    fields: tuple[str, ...], source: Source, column: Callable[[str], sql.Composable] = plain_column
) -> str:
    """select_calls with its columns."""
    return compose_calls(map(column, fields), source).as_string()


def compose_calls(columns: Iterable[sql.Composable], source: Source) -> sql.Composed:
    """select_calls with some columns, as they are written."""
    return STATEMENTS["select_calls"].format(
        columns=sql.SQL(", ").join(columns),
        matching_calls=compose_matching(source),
        backwards=compose_direction(source),
    )


@functools.lru_cache(maxsize=256)
def compose_copy(statement: str, fields: tuple[str, ...], source: Source, *, csv_safe: bool = False) -> str:
    """The COPY of some fields of the selected calls, by copy_json or copy_csv."""
    query = sql.SQL(compose_select(fields, source, escaped_column if csv_safe else plain_column))
    return compose_rows(statement, query, [name for name in fields if name in STRINGS]).as_string()


@functools.lru_cache(maxsize=256)
def compose_page(statement: str, fields: tuple[str, ...], source: Source, *, csv_safe: bool = False) -> str:
    """The COPY of a page: the same with what select_page tells of it before the fields of each row."""
    column = escaped_column if csv_safe else plain_column
    told = [sql.SQL("calls.end_stamp AS told_stamp"), sql.SQL("calls.xml_cdr_uuid AS told_uuid")]
    page = compose_calls([*told, *map(column, fields)], source)
    columns = sql.SQL(", ").join(sql.Identifier("page", name) for name in fields)
    query = STATEMENTS["select_page"].format(query=page, columns=columns)
    return compose_rows(statement, query, [name for name in fields if name in STRINGS]).as_string()


def escape_rows(query: sql.Composable, columns: Mapping[str, bool]) -> sql.Composed:
    """A query's rows, their text such that no spreadsheet runs it as a formula. columns: of each whether it is text."""
    listed = (escape_text(name) if is_text else plain_column(name) for name, is_text in columns.items())
    return STATEMENTS["escape_rows"].format(columns=sql.SQL(", ").join(listed), query=query)


def compose_rows(statement: str, query: sql.Composable, strings: Sequence[str]) -> sql.Composed:
    """The COPY of a query's rows by copy_json or copy_csv. strings: its columns of text."""
    listed = sql.SQL(", ").join(map(sql.Identifier, strings))
    force_quote = sql.SQL(", FORCE_QUOTE ({})").format(listed) if strings else sql.SQL("")
    return STATEMENTS[statement].format(query=query, force_quote=force_quote)
