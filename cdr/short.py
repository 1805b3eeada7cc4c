"""Short answers: a few calls by a prepared statement, in one round trip.

PostgreSQL plans 66 columns longer than it takes to read some calls, and COPY
cannot be prepared. What the prepared way cannot answer is left to the stream,
which makes an answer of it, or the right error.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from cdr.database import LOOKUP_SECONDS, PooledConnection, prepare, prepare_planned, select_short
from cdr.selection import Key, Selection, Source, compose_select, typed_column
from cdr.service import Service
from cdr.statements import STATEMENTS, decode, find_placeholders, number_placeholders, write_array

# So many calls are made JSON by PostgreSQL; more of them COPY brings in less time.
SHORT_ROWS = 20
# And no more bytes: so many the system's buffers hold, however slow the client is.
SHORT_BYTES = 64 * 1024
# What takes longer is not going to be short.
SHORT_MILLISECONDS = 250
# Parameters whose values stand in the text, as do NULL, true and false: the plan depends on them.
PLANNED = ("by", "part", "limit")


@functools.lru_cache(maxsize=256)
def compose_short(
    fields: tuple[str, ...], source: Source, fixed: tuple[tuple[str, Any], ...], given: tuple[str, ...]
) -> str:
    """Calls as_json, with the values that the plan depends on in it, and $1, $2, … for the others."""
    query = STATEMENTS["as_json"].format(query=sql.SQL(compose_select(fields, source, typed_column))).as_string()
    return number_placeholders(query, given, {name: sql.Literal(value).as_string() for name, value in fixed})


def encode(value: Any, codec: str | None) -> bytes:
    """A value as the text of a parameter, in the encoding of the database that holds it."""
    text = write_array(value) if isinstance(value, list) else str(value)
    return text.encode(codec or "utf-8", "surrogateescape")


def execute_short(
    service: Service, connection: PooledConnection, selection: Selection, fields: tuple[str, ...], zone: str | None
) -> list[bytes] | None:
    """The rows of compose_short, in one round trip and without planning again; psycopg.Error if that fails.

    None where the tables turn out to be others than the statement was made for.
    """
    source, codec = selection.source(connection), service.calls.codec
    used = find_placeholders(compose_select(fields, source, typed_column))
    parameters = {name: value for name, value in selection.parameters().items() if name in used}
    fixed = {
        name: value for name, value in parameters.items() if name in PLANNED or value is None or isinstance(value, bool)
    }
    given = [name for name in parameters if name not in fixed]
    name = prepare(connection, compose_short(fields, source, tuple(fixed.items()), tuple(given)))
    values = [encode(parameters[name], codec) for name in given]
    settings = write_settings(service, connection, zone or service.time_zone)
    after = prepare_planned(connection, "confirm_plain" if connection.plain else "examine_tables")
    calls, found = select_short(connection, settings, name, values, after)
    if has_changed(connection, found):
        return None
    return [decode(call, codec) for call in calls]


def has_changed(connection: PooledConnection, found: list[bytes]) -> bool:
    """Whether the tables are others than the connection knew, by a row of confirm_plain or examine_tables."""
    if connection.plain:
        connection.plain = bool(found)
        return not connection.plain
    _, foreign, keyless, _ = found
    before, connection.doubled = connection.doubled, bool(keyless)
    return foreign == b"t" or connection.doubled != before


def write_settings(service: Service, connection: PooledConnection, zone: str) -> list[bytes]:
    """The statements that set what the transaction of a short answer needs."""
    timeout = sql.Literal(min(SHORT_MILLISECONDS, service.settings.statement_timeout))
    settings: list[sql.Composable] = [STATEMENTS["forbid_sorts"], STATEMENTS["plan_once"]]
    settings.append(STATEMENTS["set_timeout"].format(timeout=timeout))
    if zone != connection.info.parameter_status("TimeZone"):
        settings.append(STATEMENTS["set_time_zone"].format(time_zone=sql.Literal(zone)))
    if service.calls.codec:
        settings.append(STATEMENTS["set_encoding"].format(encoding=sql.Literal(service.calls.encoding)))
    return [setting.as_string(connection).encode() for setting in settings]


class Short(NamedTuple):
    """The calls of a request, each as JSON, and the key that ends the page if more follow."""

    calls: list[bytes]
    key: Key | None = None


def find_short(service: Service, page: Selection, fields: tuple[str, ...], zone: str | None = None) -> Short | None:
    """The calls of a request or of its page; None if they are not few, or that is not known at once."""
    size = min(page.limit or SHORT_ROWS, SHORT_ROWS)
    if not page.possible or len(page.domains.uuids) != 1 or (page.may_be_followed and page.limit != size):
        return None
    with service.calls.connection() as connection:
        # The first PostgreSQL with plan_cache_mode is 12.
        can_prepare = connection.prepared is not None and connection.info.server_version >= 120000
        if not can_prepare or not connection.indexed or connection.foreign:
            return None
        connection.silence_seconds = service.settings.statement_timeout / 1000 + LOOKUP_SECONDS
        try:
            calls = execute_short(service, connection, replace(page, limit=size + 1), fields, zone)
        except psycopg.Error as error:
            if connection.closed:
                raise
            service.note_fallback("select_calls", error)
            return None
    return None if calls is None else judge(calls, page, size, fields)


def judge(calls: list[bytes], page: Selection, size: int, fields: tuple[str, ...]) -> Short | None:
    """The answer that the first size + 1 calls of a page are, if they are one."""
    if len(calls) <= size:
        short = None if page.may_be_followed else Short(calls)
    elif page.limit == size and {"end_stamp", "xml_cdr_uuid"} <= set(fields):
        last = json.loads(calls[size - 1])
        short = Short(calls[:size], (last["end_stamp"], last["xml_cdr_uuid"]))
    else:
        short = None
    return short if sum(map(len, calls)) <= SHORT_BYTES else None
