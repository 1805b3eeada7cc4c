"""The stream: rows of COPY become JSON, NDJSON or CSV, batch by batch, for a client that may be slow.

To add a format, add an entry to FORMATS, with an encoder if it needs one of its own.
"""

from __future__ import annotations

import json
import logging
import re
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import psycopg
from psycopg import sql

from cdr.clients import Client, ClientBudget
from cdr.database import Database, PooledConnection, copy_batches
from cdr.errors import ApiError
from cdr.selection import Key, Selection, compose_copy, compose_page, compose_rows, compose_select
from cdr.service import Service, set_encoding
from cdr.statements import STATEMENTS, decode, mogrify

try:
    from cdr_encoder import encode as encode_rows
except ImportError:  # speedups/ has it; a machine without a C compiler does not
    encode_rows = None

log = logging.getLogger("cdr_api")

# Formats ----------------------------------------------------------------------

DEL = b"\x7f"
PRINTABLE = bytes(range(32, 256))
ESCAPES = {control: b"\\u%04x" % control for control in range(32)} | {
    8: b"\\b",
    9: b"\\t",
    10: b"\\n",
    12: b"\\f",
    13: b"\\r",
}
CELL = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[^\x7f"]+', re.DOTALL)

# Rows of COPY, some at a time.
Rows = Iterator[list[memoryview]]
# Makes bytes of some rows of COPY; the second is what stands before the first row.
Encode = Callable[[list[memoryview], bytes], bytes]


class JsonEncoder:
    """Turns rows of copy_json (queries.sql) into JSON objects, by the batch.

    Time goes by the cell (66 a call, half of them null), so nothing here
    handles a cell by itself: one split, one slice assignment and one join
    serve a batch.
    """

    def __init__(self, fields: Sequence[str], separator: bytes) -> None:
        keys = [json.dumps(name).encode() + b":" for name in fields]
        self.width = len(fields)
        self.head = b"{" + keys[0]
        following = [b"}" + separator + self.head, *(b"," + key for key in keys[1:])]
        self.row = [piece for key in following for piece in (key, b"")]

    def __call__(self, rows: list[memoryview], opening: bytes) -> bytes:
        """The objects of some rows, the separator between them, opening before them."""
        text = DEL.join([row[:-1] for row in rows])
        # Without the rows' own line ends, every control character left stands inside a string.
        for control in set(text.translate(None, PRINTABLE)):
            text = text.replace(bytes([control]), ESCAPES[control])
        cells = text.split(DEL)
        if len(cells) != self.width * len(rows):  # a value holds the delimiter
            cells = CELL.findall(text)
        pieces = self.row * len(rows)
        pieces[1::2] = cells
        pieces[0] = opening + self.head
        pieces.append(b"}")
        return b"".join(pieces)


class CompiledJsonEncoder(JsonEncoder):
    """The same in C (speedups/cdr_encoder.c). A batch with a row that COPY would not write goes the way above."""

    def __init__(self, fields: Sequence[str], separator: bytes) -> None:
        super().__init__(fields, separator)
        self.keys = tuple(self.row[::2])

    def __call__(self, rows: list[memoryview], opening: bytes) -> bytes:
        encoded: bytes | None = encode_rows(rows, opening + self.head, self.keys, b"}")
        return super().__call__(rows, opening) if encoded is None else encoded


def join_lines(_fields: Sequence[str], _separator: bytes) -> Encode:
    """For a format whose lines PostgreSQL has written as they are to be."""
    return lambda rows, _opening: b"".join(rows)


@dataclass(frozen=True)
class Format:
    """How calls are written: what stands around and between them, and who encodes a batch."""

    name: str  # of format=
    media_type: str
    encoder: Callable[[Sequence[str], bytes], Encode]  # made of fields and separator
    opening: bytes = b""
    separator: bytes = b""
    closing: bytes = b""
    statement: str = "copy_json"  # of queries.sql: what writes the rows
    header_rows: int = 0  # rows of the COPY that are not calls
    shows_end: bool = False  # whether a client sees by the body alone that it is whole

    @property
    def content_type(self) -> str:
        return self.media_type + ("; charset=utf-8" if self.media_type.startswith("text/") else "")

    def enclose(self, calls: Sequence[bytes]) -> bytes:
        """A whole body of calls that are encoded already."""
        return self.opening + self.separator.join(calls) + self.closing if calls or self.opening else b""


QuickestJsonEncoder = CompiledJsonEncoder if encode_rows else JsonEncoder
FORMATS = {
    found.name: found
    for found in (
        Format("json", "application/json", QuickestJsonEncoder, b"[", b",\n", b"]\n", shows_end=True),
        Format("ndjson", "application/x-ndjson", QuickestJsonEncoder, separator=b"\n", closing=b"\n"),
        Format("csv", "text/csv", join_lines, statement="copy_csv", header_rows=1),
    )
}


# Stream -----------------------------------------------------------------------


class CallStream:
    """The body of an answer: an iterator of chunks that owns a connection.

    The rows are those of COPY, in the connection's transaction. The first chunk
    is read at once, so that a statement that fails does so before the headers are
    sent. The closing bracket is part of the last chunk, which is made after
    PostgreSQL reported success; complete says so. When anything fails before, the
    connection to the client is cut. close(), at any time, cancels what runs and
    gives the connection back to its pool.

    An answer that is not complete with its first chunk is a long one: it needs
    a slot of its worker (else ApiError 503) and one of the account's (else 429).
    """

    def __init__(
        self,
        service: Service,
        connection: PooledConnection,
        rows: Rows,
        output: Format,
        fields: Sequence[str],
        *,
        calls: bool = True,
    ) -> None:
        self.complete = False
        self.calls = calls  # whether its rows are calls, which are counted
        self.rows = -output.header_rows if calls else 0
        self.owned = False  # until the first chunk is made, the connection is the caller's to give back
        self.output = output
        self.service = service
        self.connection = connection
        encode = output.encoder(fields, output.separator)
        self.chunks = self.read(rows, encode)
        self.first: bytes | None = next(self.chunks, b"")
        self.budget = ClientBudget(service.settings, connection.watch.client if connection.watch else Client())
        if self.complete:
            return
        if not connection.has_stream_slot:
            raise service.too_many_streams()
        if connection.watch:
            connection.watch.take_slot()
        self.owned = True

    def read(self, batches: Rows, encode: Encode) -> Generator[bytes]:
        chunk = b""
        try:
            for rows in batches:
                self.rows += len(rows) if self.calls else 0
                if chunk:
                    yield chunk
                encoded = encode(rows, self.output.separator if chunk else self.output.opening)
                chunk = decode(encoded, self.connection.home.codec)
            self.complete = True
        except (psycopg.Error, ApiError) as error:
            if not self.owned:
                raise
            if isinstance(error, psycopg.Error):
                log.error("an answer broke off: %s", " ".join(str(error).split()))
            self.budget.cut()
        finally:
            if self.owned or self.complete:
                self.connection.give_back()
        if chunk or self.output.opening:
            yield (chunk or self.output.opening) + self.output.closing

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self.first is None:
            self.budget.wait()
            return self.budget.hand(next(self.chunks))
        first, self.first = self.first, None
        return self.budget.hand(first)

    def close(self) -> None:
        self.chunks.close()


def copy_calls(
    connection: PooledConnection,
    parts: Sequence[Selection],
    output: Format,
    fields: tuple[str, ...],
    *,
    csv_safe: bool = False,
) -> Rows:
    """The calls of all parts, by a query that ends the transaction."""
    copies, source = [], parts[0].source(connection)
    for part in parts:
        own = source._replace(conditions=part.conditions)
        copy = compose_copy(output.statement, fields, own, csv_safe=csv_safe)
        copies.append(mogrify(connection, copy, part.parameters() | {"header": part is parts[0]}))
    return copy_batches(connection, finish(connection.home, b";".join(copies)))


def copy_query(
    connection: PooledConnection,
    query: sql.Composable,
    parameters: Mapping[str, Any],
    output: Format,
    columns: Mapping[str, bool],
) -> Rows:
    """The rows of a statement, by a query that ends the transaction. columns: of each whether it is text."""
    strings = [name for name, is_text in columns.items() if is_text]
    copy = compose_rows(output.statement, query, strings).as_string()
    return copy_batches(connection, finish(connection.home, mogrify(connection, copy, {**parameters, "header": True})))


def copy_nothing(connection: PooledConnection, output: Format, fields: Sequence[str]) -> Rows:
    """No call, by a query that ends the transaction."""
    columns = [sql.SQL("NULL AS {}").format(sql.Identifier(name)) for name in fields]
    query = STATEMENTS["select_nothing"].format(columns=sql.SQL(", ").join(columns))
    return copy_query(connection, query, {}, output, dict.fromkeys(fields, False))


def finish(database: Database, copies: bytes, *, commit: bool = True) -> bytes:
    return set_encoding(database).encode() + copies + (b";COMMIT" if commit else b"")


# Pages ------------------------------------------------------------------------


def copy_page(
    connection: PooledConnection,
    windows: Sequence[Selection],
    output: Format,
    fields: tuple[str, ...],
    *,
    csv_safe: bool = False,
) -> tuple[Rows, Key | None]:
    """The calls of a page, of the first window that holds more of them, or else the last; and the key that ends it.

    The key is None if nothing follows. The last window's query ends the transaction.
    """

    def copy(window: Selection, *, is_last: bool) -> tuple[Rows, Key | None]:
        page = compose_page(output.statement, fields, window.source(connection), csv_safe=csv_safe)
        query = mogrify(connection, page, page_parameters(connection, window) | {"header": True, "whole": not is_last})
        return read_told(copy_batches(connection, finish(connection.home, query, commit=is_last)), output)

    for window in windows[:-1]:
        rows, key = copy(window, is_last=False)
        if key:
            return rows, key
        deque(rows, maxlen=0)
    return copy(windows[-1], is_last=True)


def page_parameters(connection: PooledConnection, page: Selection) -> dict[str, Any]:
    """Those of compose_page for a page."""
    size = page.limit or 0
    undated: sql.Composable = sql.SQL("false")
    if page.may_be_followed:
        part = replace(page, part="undated", after=(None, None), before=None, limit=1)
        select = mogrify(connection, compose_select(("xml_cdr_uuid",), part.source(connection)), part.parameters())
        undated = STATEMENTS["exists"].format(query=sql.SQL(select.decode()))
    return {**replace(page, limit=size + 1).parameters(), "page_size": size, "undated": undated}


def read_told(batches: Rows, output: Format) -> tuple[Rows, Key | None]:
    """The rows of select_page without the column that tells of the page; and the key that it tells."""
    batch, first = next(batches), output.header_rows
    told = bytes(batch[first]).partition(b"," if output.statement == "copy_csv" else DEL)[0]
    has_calls, _, key = told.decode().partition(" ")
    header = [row[len("told,") :] for row in batch[:first]]

    def cut() -> Rows:
        calls = batch[first:] if has_calls == "true" else []
        if found := header + [row[len(told) + 1 :] for row in calls]:
            yield found
        for rows in batches:
            yield [row[len(told) + 1 :] for row in rows]

    stamp, _, uuid = (None if word == "-" else word for word in key.rpartition(" "))  # a stamp may end with " BC"
    return cut(), (stamp, uuid) if key else None
