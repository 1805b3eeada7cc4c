#!/usr/bin/env python3
"""Hands the calls of a PBX on to a billing engine: each once, and again when it changed.

    export CDR_URL=https://pbx.example.com/api CDR_TOKEN=cdr_… SINK_SECRET=…
    forward_feed.py --ledger l.sqlite --from 2026-01-01 csv /var/spool/cdr        # from cron; --gzip packs the files
    forward_feed.py --ledger l.sqlite --from 2026-01-01 webhook https://billing.example.com/calls
    forward_feed.py --ledger l.sqlite --from 2026-01-01 lago https://api.getlago.com/api/v1 --metric call_seconds
    forward_feed.py --ledger l.sqlite --from 2026-01-01 openmeter https://openmeter.cloud/api/v1 --metric call

The ledger is that of poll_feed.py, which must lie beside this program; its reconcile works on it, and
what it repairs is handed on by the next run. A batch is written down before it is sent, and sent again with the
same ids until the sink has it; only then is the cursor behind it kept. So a crash at any point loses no call, and
one that is sent again can be told by its id.

Exit status: as poll_feed.py's; 5 also if the sink is away, 6 also if it refuses.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import csv
import fcntl
import gzip
import hashlib
import hmac
import io
import itertools
import json
import os
import secrets
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from poll_feed import (
    FIELDS,
    REFUSED,
    TRY_AGAIN,
    WRONG_USE,
    Call,
    Ledger,
    Pbx,
    RunError,
    add_filter,
    find_pbx,
    open_ledger,
    poll,
    read_page,
    transaction,
)

COLUMNS = FIELDS.split(",")
BATCH = 10_000  # calls written down, and of a file
PIECE = 100  # calls or events of a request: as many as Lago takes
PAUSES = (1, 2, 5, 10, 20, 30)  # seconds before a request is repeated, if the sink does not say

# outbox: what has changed since it was sent. batch: what is being sent, frozen, so that a repetition is the same.
# sent: what the sink has.
CALL = f"json_array({', '.join(f'new.{name}' for name in COLUMNS)})"
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS outbox (xml_cdr_uuid TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS sent (xml_cdr_uuid TEXT PRIMARY KEY, revision INTEGER NOT NULL, call TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS batch (
    item INTEGER PRIMARY KEY, xml_cdr_uuid TEXT NOT NULL, revision INTEGER NOT NULL, call TEXT NOT NULL, before TEXT);
CREATE TABLE IF NOT EXISTS sink (
    id INTEGER PRIMARY KEY CHECK (id = 1), name TEXT NOT NULL, batch INTEGER NOT NULL, written TEXT);
CREATE TRIGGER IF NOT EXISTS new_call AFTER INSERT ON calls
BEGIN INSERT OR IGNORE INTO outbox VALUES (new.xml_cdr_uuid); END;
CREATE TRIGGER IF NOT EXISTS changed_call AFTER UPDATE ON calls
 WHEN {CALL} <> {CALL.replace("new.", "old.")}
BEGIN INSERT OR IGNORE INTO outbox VALUES (new.xml_cdr_uuid); END;
"""  # noqa: S608 (of constants)

# A call that came again as it was sent is not sent again.
FREEZE = f"""
INSERT INTO batch (xml_cdr_uuid, revision, call, before)
SELECT new.xml_cdr_uuid, coalesce(sent.revision, 0) + 1, {CALL}, sent.call
  FROM outbox JOIN calls AS new USING (xml_cdr_uuid) LEFT JOIN sent USING (xml_cdr_uuid)
 WHERE sent.call IS NULL OR sent.call <> {CALL}
 ORDER BY new.ended, new.xml_cdr_uuid
 LIMIT ?
"""  # noqa: S608 (of constants)


@dataclass(frozen=True)
class Item:
    """A call to be sent: its revision, 1 for the first, and what the sink has of it."""

    revision: int
    call: Call
    before: Call | None


class Sink(Protocol):
    def send(self, ledger: Ledger, name: str, items: list[Item]) -> None:
        """Hands a batch over, or raises RunError. Called again with the same if it did not come to its end."""


# Batches ----------------------------------------------------------------------


def as_call(text: str | None) -> Call | None:
    return dict(zip(COLUMNS, json.loads(text), strict=True)) if text else None


def prepare(ledger: Ledger) -> None:
    """The tables of this program; what poll_feed.py has put into the ledger before is to be sent."""
    ledger.executescript(SCHEMA)
    began = f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
    with transaction(ledger):
        if ledger.execute("INSERT OR IGNORE INTO sink VALUES (1, ?, 1, NULL)", (began,)).rowcount:
            ledger.execute("INSERT OR IGNORE INTO outbox SELECT xml_cdr_uuid FROM calls")


def freeze(ledger: Ledger) -> None:
    """Writes down the next batch, unless there is one that was not sent to its end."""
    with transaction(ledger):
        if ledger.execute("SELECT EXISTS (SELECT * FROM batch)").fetchone()[0]:
            return
        if ledger.execute(FREEZE, (BATCH,)).rowcount:
            ledger.execute("DELETE FROM outbox WHERE xml_cdr_uuid IN (SELECT xml_cdr_uuid FROM batch)")
        else:
            ledger.execute("DELETE FROM outbox")  # what changed, and changed back


def deliver(ledger: Ledger, sink: Sink) -> None:
    """Sends whatever has not been sent, batch by batch."""
    while True:
        freeze(ledger)
        rows = ledger.execute("SELECT revision, call, before FROM batch ORDER BY item").fetchall()
        if not rows:
            return
        items = [Item(revision, as_call(call) or {}, as_call(before)) for revision, call, before in rows]
        began, number = ledger.execute("SELECT name, batch FROM sink").fetchone()
        sink.send(ledger, f"{began}-{number:09d}", items)
        with transaction(ledger):
            ledger.execute("INSERT OR REPLACE INTO sent SELECT xml_cdr_uuid, revision, call FROM batch")
            ledger.execute("DELETE FROM batch")
            ledger.execute("UPDATE sink SET batch = batch + 1, written = NULL")
        print(f"{len(items)} calls sent, as batch {number}.")


def forward(pbx: Pbx, ledger: Ledger, arguments: argparse.Namespace, sink: Sink) -> int:
    def forward_page(pbx: Pbx, ledger: Ledger, first: str | None, limit: int) -> bool:
        with transaction(ledger):
            page = read_page(pbx, ledger, first, limit)
        deliver(ledger, sink)
        with transaction(ledger):
            page.keep(ledger)
        return page.more

    deliver(ledger, sink)  # what an earlier run, or reconcile, left
    return poll(pbx, ledger, arguments, forward_page)


# Files ------------------------------------------------------------------------


@dataclass(frozen=True)
class CsvFolder:
    """A file a batch, under a name that no other has or will have, renamed into place when it is whole."""

    folder: Path
    packed: bool

    def send(self, ledger: Ledger, name: str, items: list[Item]) -> None:
        # Whether it was renamed cannot be seen: whoever reads the folder may have taken the file away. So it is written
        # down that it is whole; from then on the part is there until it is renamed.
        (written,) = ledger.execute("SELECT written FROM sink").fetchone()
        file = Path(written or self.folder.absolute() / f"calls-{name}.csv{'.gz' if self.packed else ''}")
        part = file.with_name(f".{file.name}.part")
        if not written:
            self.write(part, items)
            with transaction(ledger):
                ledger.execute("UPDATE sink SET written = ?", (str(file),))
        if part.exists():
            part.replace(file)
            sync(file.parent)

    def write(self, part: Path, items: list[Item]) -> None:
        text = io.StringIO(newline="")
        # The first column is one that no header mark is taken for, and usage has a unit: a bare number is nanoseconds
        # to some engines.
        table = csv.writer(text, lineterminator="\n")
        table.writerow([*COLUMNS, "usage", "revision"])
        table.writerows([*item.call.values(), f"{item.call['billsec'] or 0}s", item.revision] for item in items)
        data = text.getvalue().encode()
        part.write_bytes(gzip.compress(data, mtime=0) if self.packed else data)
        sync(part)


def sync(path: Path) -> None:
    """Has a file, or the names in a folder, survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# HTTP -------------------------------------------------------------------------


def pieces(values: list[Any]) -> Iterator[list[Any]]:
    for i in range(0, len(values), PIECE):
        yield values[i : i + PIECE]


@dataclass(frozen=True)
class Post:
    """Where requests go; waits and repeats while the sink is away or busy, so many seconds in all."""

    url: str
    patience: int

    def __call__(self, body: bytes, headers: dict[str, str]) -> tuple[int, str]:
        """The status and the text of an answer that is neither a failure nor a request to wait; else RunError."""
        patience = self.patience
        for pause in itertools.chain(PAUSES, itertools.repeat(60)):
            status, text, after = self.try_once(body, headers)
            if 0 < status < 500 and status not in (408, 425, 429):
                return status, text
            seconds = int(after) if after.isdecimal() else pause
            if seconds > patience:
                break
            patience -= seconds
            print(f"The sink: {status or 'no answer'} {text}; waiting {seconds} s.", file=sys.stderr, flush=True)
            time.sleep(seconds)
        raise RunError(
            TRY_AGAIN, f"The sink does not take the calls ({status or 'no answer'} {text}): try again later."
        )

    def try_once(self, body: bytes, headers: dict[str, str]) -> tuple[int, str, str]:
        """Status, text and Retry-After; 0 and the reason if there is no whole answer."""
        parts = urlsplit(self.url)
        # http.client follows no redirect, so the secret goes to this host only.
        kind = {"https": HTTPSConnection, "http": HTTPConnection}[parts.scheme]
        path = f"{parts.path}?{parts.query}".rstrip("?") or "/"
        try:
            with closing(kind(parts.netloc, timeout=60)) as connection:
                connection.request("POST", path, body, headers)
                response = connection.getresponse()
                return (
                    response.status,
                    response.read(65536).decode(errors="replace"),
                    response.headers["Retry-After"] or "",
                )
        except (OSError, HTTPException) as error:
            return 0, repr(error), ""


def refuse(status: int, text: str) -> None:
    """Ends the run if the sink will not take a request: nothing is dropped, and nothing behind it is sent."""
    if not 200 <= status < 300:
        raise RunError(REFUSED, f"The sink refuses: {status} {text[:500]}")


@dataclass(frozen=True)
class Webhook:
    """Calls as JSON, signed as Standard Webhooks has it; the id stays when a request is repeated."""

    post: Post
    secret: bytes

    def send(self, _ledger: Ledger, name: str, items: list[Item]) -> None:
        for number, piece in enumerate(pieces(items), 1):
            message = f"msg_{name}_{number}"
            data = [item.call | {"revision": item.revision} for item in piece]
            body = json.dumps({"type": "calls", "data": data}, ensure_ascii=False).encode()
            refuse(*self.post(body, self.sign(message, body)))

    def sign(self, message: str, body: bytes) -> dict[str, str]:
        stamp = str(int(time.time()))
        signed = hmac.digest(self.secret, f"{message}.{stamp}.".encode() + body, hashlib.sha256)
        return {
            "Content-Type": "application/json",
            "webhook-id": message,
            "webhook-timestamp": stamp,
            "webhook-signature": f"v1,{base64.b64encode(signed).decode()}",
        }


# Meters -----------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """What a meter is told: an id that never stands for anything else, whose it is, and seconds to add or take back."""

    name: str
    customer: str | None
    seconds: int
    call: Call


def uses(item: Item, customer: str) -> Iterator[Use]:
    """What a call adds to meters, which never replace: of a call that changed, the difference.

    A call of no customer adds to none.
    """
    call, before = item.call, item.before or item.call | {"billsec": 0}
    name = call["xml_cdr_uuid"] if item.revision == 1 else f"{call['xml_cdr_uuid']}:{item.revision}"
    now, then = call["billsec"] or 0, before["billsec"] or 0
    if call[customer] != before[customer]:
        yield Use(f"{name}:back", before[customer], -then, before)
        yield Use(name, call[customer], now, call)
    elif item.before is None or now != then:
        yield Use(name, call[customer], now - then, call)


def all_uses(items: list[Item], customer: str) -> list[Use]:
    found = [use for item in items for use in uses(item, customer)]
    if strays := [use for use in found if not use.customer]:
        print(f"{len(strays)} calls have no {customer}, and are on no bill: {strays[0].name} …", file=sys.stderr)
    return [use for use in found if use.customer]


@dataclass(frozen=True)
class Lago:
    """Events of Lago, whose transaction_id is taken once: a batch in which one comes again is refused as a whole."""

    post: Post
    key: str
    customer: str
    metric: str

    def send(self, _ledger: Ledger, _name: str, items: list[Item]) -> None:
        for piece in pieces([self.event(use) for use in all_uses(items, self.customer)]):
            if (refused := self.try_piece(piece)) is not None:
                rest = [event for number, event in enumerate(piece) if number not in refused]
                if rest and self.try_piece(rest) is not None:
                    raise RunError(TRY_AGAIN, "Another run sends the same to Lago: try again later.")

    def try_piece(self, events: list[Any]) -> set[int] | None:
        """None if Lago has them; the places of those that it had already, if it took none for that reason."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        status, text = self.post(json.dumps({"events": events}).encode(), headers)
        if status == 422:
            try:
                details = json.loads(text)["error_details"]
                if all(reasons == {"transaction_id": ["value_already_exist"]} for reasons in details.values()):
                    return {int(place) for place in details}
            except (ValueError, KeyError, TypeError, AttributeError):
                pass
        refuse(status, text)
        return None

    def event(self, use: Use) -> dict[str, Any]:
        event = {
            "transaction_id": use.name,
            "external_subscription_id": use.customer,
            "code": self.metric,
            "properties": describe(use),
        }
        return event | ({"timestamp": f"{moment.timestamp():.3f}"} if (moment := find_moment(use.call)) else {})


@dataclass(frozen=True)
class OpenMeter:
    """CloudEvents, of which OpenMeter counts each id once."""

    post: Post
    key: str
    customer: str
    metric: str

    def send(self, _ledger: Ledger, _name: str, items: list[Item]) -> None:
        headers = {"Content-Type": "application/cloudevents-batch+json", "Authorization": f"Bearer {self.key}"}
        for piece in pieces([self.event(use) for use in all_uses(items, self.customer)]):
            refuse(*self.post(json.dumps(piece).encode(), headers))

    def event(self, use: Use) -> dict[str, Any]:
        event: dict[str, Any] = {"specversion": "1.0", "id": use.name, "source": "fusionpbx", "type": self.metric}
        event |= {"subject": use.customer, "data": describe(use)}
        return event | ({"time": moment.isoformat()} if (moment := find_moment(use.call)) else {})


def describe(use: Use) -> dict[str, Any]:
    names = ("direction", "accountcode", "extension_uuid", "caller_id_number", "destination_number", "hangup_cause")
    return {"billsec": use.seconds, **{name: use.call[name] for name in names}}


def find_moment(call: Call) -> datetime | None:
    """When a call ended; None leaves it to the engine, which takes the moment of arrival."""
    return datetime.fromisoformat(call["end_stamp"]).astimezone(UTC) if call["end_stamp"] else None


# Command line -----------------------------------------------------------------


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Hands calls on to a billing engine. CDR_URL, CDR_TOKEN and SINK_SECRET come from the environment."
    )
    parser.add_argument("--ledger", default="ledger.sqlite", help="the SQLite file (ledger.sqlite)")
    add_filter(parser)
    parser.add_argument("--from", dest="first", help="where the first poll begins: a date or a datetime")
    parser.add_argument("--resync", action="store_true", help="start again if the cursor cannot be continued")
    parser.add_argument("--limit", type=int, default=10_000, help="calls of a page (10000)")
    parser.add_argument("--patience", type=int, default=300, help="seconds to wait for a busy service or sink (300)")
    sinks = parser.add_subparsers(required=True, dest="sink")
    sink = sinks.add_parser("csv", help="a file a batch, renamed into place when it is whole")
    sink.add_argument("folder", type=Path)
    sink.add_argument("--gzip", action="store_true")
    sink = sinks.add_parser("webhook", help="signed requests; SINK_SECRET is whsec_…")
    sink.add_argument("url")
    for name in ("lago", "openmeter"):
        sink = sinks.add_parser(name, help="events; SINK_SECRET is the API key")
        sink.add_argument("url")
        sink.add_argument("--metric", required=True, help="the code of the billable metric, or the type of the event")
        sink.add_argument("--customer", choices=COLUMNS, default="domain_uuid", help="whose use it is (domain_uuid)")
    return parser.parse_args()


def find_sink(arguments: argparse.Namespace) -> Sink:
    if arguments.sink == "csv":
        if not arguments.folder.is_dir():
            raise RunError(WRONG_USE, f"{arguments.folder} is no folder.")
        return CsvFolder(arguments.folder, arguments.gzip)
    url, secret = arguments.url.rstrip("/"), os.environ.get("SINK_SECRET", "")
    if not url.startswith(("https://", "http://")) or not secret:
        raise RunError(WRONG_USE, "The sink needs a URL, and SINK_SECRET in the environment.")
    if arguments.sink == "webhook":
        try:
            return Webhook(
                Post(url, arguments.patience), base64.b64decode(secret.removeprefix("whsec_"), validate=True)
            )
        except binascii.Error:
            raise RunError(WRONG_USE, "SINK_SECRET is whsec_ and base64, as Standard Webhooks has it.") from None
    kind, route = (Lago, "events/batch") if arguments.sink == "lago" else (OpenMeter, "events")
    return kind(Post(f"{url}/{route}", arguments.patience), secret, arguments.customer, arguments.metric)


def main() -> int:
    arguments = read_arguments()
    try:
        pbx, sink = find_pbx(arguments.filter), find_sink(arguments)
        with Path(f"{arguments.ledger}.lock").open("w") as lock, closing(open_ledger(arguments.ledger)) as ledger:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(TRY_AGAIN, "Another run is still at it.") from None
            prepare(ledger)
            return forward(pbx, ledger, arguments, sink)
    except RunError as failed:
        print(failed, file=sys.stderr)
        return failed.status
    except (OSError, sqlite3.OperationalError) as error:
        print(f"{arguments.ledger} or the sink: {error}", file=sys.stderr)
        return TRY_AGAIN


if __name__ == "__main__":
    sys.exit(main())
