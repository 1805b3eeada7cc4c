"""Which calls are asked for, and the statement that selects them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from psycopg import sql

from cdr.database import Connection
from cdr.parsing import Parser, integer_between, list_of, parse_flag, parse_uuid
from cdr.statements import STATEMENTS, mogrify

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
INTEGERS = {"duration", "billsec", "waitsec", "mduration", "billmsec", "pdd_ms"}
NUMBERS = {"rtp_audio_in_mos"}
BOOLEANS = {"voicemail_message", "missed_call"}
STRINGS = set(FIELDS) - INTEGERS - NUMBERS - BOOLEANS

parse_fields = list_of(FIELDS, "field")

# Each is a placeholder of matching_calls (queries.sql).
FILTERS: dict[str, Parser] = {
    "direction": str,
    "leg": str,
    "accountcode": str,
    "extension_uuid": parse_uuid,
    "caller_id_name": str,
    "caller_id_number": str,
    "source_number": str,
    "destination_number": str,
    "hangup_cause": str,
    "answered": parse_flag,
    "min_billsec": integer_between(0, 10**12),
    "billable_only": parse_flag,
}


# Selection --------------------------------------------------------------------

FIRST_UUID = "00000000-0000-0000-0000-000000000000"
LAST_UUID = "ffffffff-ffff-ffff-ffff-ffffffffffff"

# End stamp and uuid of a call, which a page ends with; (None, None) stands
# before the calls that have no end stamp.
Key = tuple[str | None, str | None]
FIRST_KEY: Key = ("-infinity", FIRST_UUID)


@dataclass(frozen=True)
class Domains:
    """The domains whose calls a request may read: one that it names, or all of the account (name None)."""

    name: str | None
    names: Sequence[str] = ()
    uuids: Sequence[str] = ()
    other_uuids: Sequence[str] = ()

    def parameters(self) -> dict[str, Any]:
        return {
            "one_domain": self.name is not None,
            "domain_name": self.name,
            "domain_names": list(self.names),
            "domain_uuids": list(self.uuids),
            "other_uuids": list(self.other_uuids),
        }


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
    after: Key = FIRST_KEY
    uuids: Sequence[str] | None = None
    low: str | None = None  # of the transactions that wrote the calls, see matching_calls
    high: str | None = None
    limit: int | None = None
    offset: int = 0

    @classmethod
    def of(cls, domains: Domains, values: Mapping[str, Any]) -> Selection:
        """The calls that a request's filters let through."""
        return cls(domains, {name: values[name] for name in FILTERS if values.get(name) is not None})

    def within(self, start: datetime, end: datetime, by: str) -> Selection:
        """Only calls whose stamp lies in [start, end)."""
        ranged = replace(self, by=by, start=start, end=end)
        return ranged.ending_since(start) if by == "end" else ranged

    def ending_since(self, instant: datetime) -> Selection:
        """Only calls that end at an instant or later: behind the last possible key before it."""
        before = instant - timedelta(microseconds=1)
        return replace(self, part="dated", after=(before.isoformat(), LAST_UUID))

    def identity(self) -> dict[str, Any]:
        """What a cursor is bound to. Only what was given, so that a release that adds a filter resets nobody."""
        edges = {"from": self.start and self.start.isoformat(), "to": self.end and self.end.isoformat()}
        return {**self.filters, **{name: edge for name, edge in edges.items() if edge}, "by": self.by}

    def parts(self, key: Key | None, limit: int | None) -> list[Selection]:
        """The selection of each statement that answers a request, from behind a key on.

        First the calls that have an end stamp, then those that have none;
        never both in one page.
        """
        dated = replace(self, limit=limit, part="dated")
        undated = replace(dated, part="undated", after=(None, None))
        if key is not None:
            if key[0] is None:
                return [replace(undated, after=key)]
            dated = replace(dated, after=key)
        return [dated, undated] if self.may_be_undated and limit is None else [dated]

    @property
    def may_be_undated(self) -> bool:
        """Whether calls without an end stamp can be among these."""
        return self.by != "end"

    def parameters(self) -> dict[str, Any]:
        """Those of select_calls."""
        stamp, uuid = self.after
        return {
            **dict.fromkeys(FILTERS),
            **self.filters,
            **self.domains.parameters(),
            "by": self.by,
            "from": self.start and self.start.isoformat(),
            "to": self.end and self.end.isoformat(),
            "part": self.part,
            "after_stamp": stamp,
            "after_uuid": uuid,
            "uuids": None if self.uuids is None else list(self.uuids),
            "low": self.low,
            "high": self.high,
            "limit": self.limit,
            "offset": self.offset,
        }


def find_keys(connection: Connection, selection: Selection) -> list[Key]:
    """The keys of the selected calls."""
    query = mogrify(connection, compose_select(("end_stamp", "xml_cdr_uuid")), selection.parameters())
    return [(row["end_stamp"], str(row["xml_cdr_uuid"])) for row in connection.execute(query)]


def find_next_key(connection: Connection, page: Selection) -> Key | None:
    """The key behind a page of page.limit calls; None if nothing follows."""
    keys = find_keys(connection, replace(page, limit=2, offset=(page.limit or 0) - 1))
    if len(keys) == 2:
        return keys[0]
    undated = replace(page, limit=1, part="undated", after=(None, None))
    if page.part == "dated" and page.may_be_undated and find_keys(connection, undated):
        return (None, None)
    return None


# Statements -------------------------------------------------------------------


def plain_column(name: str) -> sql.Composable:
    """A column as it is."""
    return sql.Identifier("calls", name)


def escaped_column(name: str) -> sql.Composable:
    """A column, its text such that no spreadsheet takes it for a formula."""
    if name not in STRINGS:
        return plain_column(name)
    return STATEMENTS["escape_formula"].format(column=sql.Identifier("calls", name), name=sql.Identifier(name))


def typed_column(name: str) -> sql.Composable:
    """A column of the type that it has in JSON."""
    if name == "leg":  # char(1), of which a cast would take the blank
        return plain_column(name)
    type_name = "text" if name in STRINGS else "boolean" if name in BOOLEANS else "numeric"
    return sql.SQL("calls.{0}::{1} AS {0}").format(sql.Identifier(name), sql.SQL(type_name))


@functools.lru_cache(maxsize=256)
def compose_select(fields: tuple[str, ...], column: Callable[[str], sql.Composable] = plain_column) -> str:
    """select_calls with its columns."""
    columns = sql.SQL(", ").join(map(column, fields))
    return STATEMENTS["select_calls"].format(columns=columns, matching_calls=STATEMENTS["matching_calls"]).as_string()


@functools.lru_cache(maxsize=256)
def compose_copy(statement: str, fields: tuple[str, ...], *, csv_safe: bool = False) -> str:
    """The COPY of some fields of the selected calls, by copy_json or copy_csv."""
    strings = sql.SQL(", ").join(sql.Identifier(name) for name in fields if name in STRINGS)
    force_quote = sql.SQL(", FORCE_QUOTE ({})").format(strings) if strings.as_string() else sql.SQL("")
    query = sql.SQL(compose_select(fields, escaped_column if csv_safe else plain_column))
    return STATEMENTS[statement].format(query=query, force_quote=force_quote).as_string()
