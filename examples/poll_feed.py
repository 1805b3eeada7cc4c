#!/usr/bin/env python3
"""Keeps a ledger of a PBX's calls in SQLite.

    export CDR_URL=https://pbx.example.com/api CDR_TOKEN=cdr_…
    poll_feed.py poll --from 2026-01-01                        # from cron; --from counts the first time only
    poll_feed.py reconcile --from 2026-01-01 --to 2026-01-31   # before a month is billed

poll reads the feed. A page and the cursor behind it are stored in one
transaction, so a crash at any point loses nothing and stores nothing twice.
reconcile compares the ledger with the PBX's totals by domain and day, and
repairs the days that differ.

Exit status: 0 all is well, 2 wrong use, 3 the cursor cannot be continued
(--resync begins again), 4 the token may not, 5 try again later, 6 the service
refuses the request, 7 the ledger still differs from the PBX.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sqlite3
import sys
import time
import zoneinfo
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection, IncompleteRead
from typing import Any
from urllib.parse import urlencode, urlsplit

WRONG_USE, CURSOR_GONE, NOT_ALLOWED, TRY_AGAIN, REFUSED, DIFFERS = 2, 3, 4, 5, 6, 7

TIMEOUT = 600  # seconds of silence; the first byte waits for the database
PIECE = 64 * 1024  # bytes read at a time
FILTERED = ("call_feed", "call_range", "call_totals")
LOOKUP = 1_000  # uuids asked for at a time; the service takes up to 10,000

Call = dict[str, Any]
Ledger = sqlite3.Connection

# What is kept of a call: the columns of the ledger's table. Add yours to both, and to UPSERT.
FIELDS = (
    "xml_cdr_uuid,domain_uuid,domain_name,direction,accountcode,extension_uuid,caller_id_number,destination_number,"
    "start_stamp,answer_stamp,end_stamp,billsec,billmsec,hangup_cause"
)

# ended: end_stamp in UTC and of one length, so that it sorts as text.
# gone_at: when reconcile found that the PBX has the call no longer.
SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    xml_cdr_uuid TEXT PRIMARY KEY, domain_uuid TEXT, domain_name TEXT, direction TEXT, accountcode TEXT,
    extension_uuid TEXT, caller_id_number TEXT, destination_number TEXT, start_stamp TEXT, answer_stamp TEXT,
    end_stamp TEXT, billsec INTEGER, billmsec INTEGER, hangup_cause TEXT, ended TEXT, gone_at TEXT);
CREATE INDEX IF NOT EXISTS calls_ended ON calls (ended);
CREATE TABLE IF NOT EXISTS position (
    id INTEGER PRIMARY KEY CHECK (id = 1), parameter TEXT NOT NULL, value TEXT NOT NULL, complete_through TEXT);
"""

UPSERT = """
INSERT INTO calls
VALUES (:xml_cdr_uuid, :domain_uuid, :domain_name, :direction, :accountcode, :extension_uuid, :caller_id_number,
        :destination_number, :start_stamp, :answer_stamp, :end_stamp, :billsec, :billmsec, :hangup_cause, :ended, NULL)
ON CONFLICT (xml_cdr_uuid) DO UPDATE
SET (domain_uuid, domain_name, direction, accountcode, extension_uuid, caller_id_number, destination_number,
     start_stamp, answer_stamp, end_stamp, billsec, billmsec, hangup_cause, ended, gone_at)
  = (excluded.domain_uuid, excluded.domain_name, excluded.direction, excluded.accountcode, excluded.extension_uuid,
     excluded.caller_id_number, excluded.destination_number, excluded.start_stamp, excluded.answer_stamp,
     excluded.end_stamp, excluded.billsec, excluded.billmsec, excluded.hangup_cause, excluded.ended, NULL)
"""


# Asking the service -----------------------------------------------------------


class RunError(Exception):
    """The run ends: a sentence, and the exit status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RefusedError(RunError):
    """An answer other than 200, with what its body says."""

    def __init__(self, response: HTTPResponse) -> None:
        self.answer = response.status
        self.data: dict[str, Any] = {}
        message = response.reason  # a proxy's own page says no more
        try:
            problem = json.loads(response.read(PIECE))
            message, self.data = problem["message"], json.loads(problem["data"])
        except (ValueError, KeyError, TypeError):
            pass
        after = response.headers.get("Retry-After", "")
        self.retry_after = int(after) if after.isdecimal() else 30
        statuses = {401: NOT_ALLOWED, 403: NOT_ALLOWED, 410: CURSOR_GONE, 429: TRY_AGAIN}
        super().__init__(
            statuses.get(self.answer, TRY_AGAIN if self.answer >= 500 else REFUSED), f"{self.answer}: {message}"
        )


@dataclass(frozen=True)
class Pbx:
    """The service at a URL such as https://pbx.example.com/api."""

    url: str
    token: str
    filters: tuple[tuple[str, str], ...] = ()  # of the calls that are read and compared

    @contextmanager
    def ask(self, route: str, body: Any = None, **parameters: str) -> Iterator[HTTPResponse]:
        """An answer of 200; RefusedError for another, RunError when it cannot be read to its end."""
        if route in FILTERED:
            parameters |= dict(self.filters)
        parts = urlsplit(self.url)
        # http.client follows no redirect, so the token goes to this host only.
        kind = {"https": HTTPSConnection, "http": HTTPConnection}[parts.scheme]
        path = f"{parts.path.rstrip('/')}/{route}?{urlencode(parameters)}"
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        try:
            with closing(kind(parts.netloc, timeout=TIMEOUT)) as connection:
                connection.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
                with connection.getresponse() as response:
                    if response.status != 200:
                        raise RefusedError(response)
                    yield response
        except (OSError, HTTPException) as error:
            raise RunError(TRY_AGAIN, f"No whole answer ({error!r}): nothing of it is kept.") from None


def read_pieces(response: HTTPResponse) -> Iterator[bytes]:
    """The body, piece by piece; IncompleteRead if it was cut.

    Iterating over the response would not tell: http.client takes a cut between
    two chunks for the end there, and anywhere a body that is too short.
    """
    if response.length is None and not response.chunked:
        raise IncompleteRead(b"")  # HTTP/1.0: a cut cannot be seen
    while piece := response.read(PIECE):
        yield piece
    if response.length:
        raise IncompleteRead(b"", response.length)


def read_calls(response: HTTPResponse) -> Iterator[Call]:
    """The calls of an NDJSON answer, one at a time."""
    rest = b""
    for piece in read_pieces(response):
        *lines, rest = (rest + piece).split(b"\n")
        yield from map(json.loads, lines)
    if rest:
        raise IncompleteRead(rest)


def read_json(response: HTTPResponse) -> Any:
    return json.loads(b"".join(read_pieces(response)))


# The ledger -------------------------------------------------------------------


def open_ledger(path: str) -> Ledger:
    ledger = sqlite3.connect(path, timeout=30, isolation_level=None)
    ledger.execute("PRAGMA journal_mode = WAL")  # whoever reads it does not hold up a poll
    ledger.executescript(SCHEMA)
    return ledger


@contextmanager
def transaction(ledger: Ledger) -> Iterator[None]:
    """All of the block or nothing. It waits for another run's, so nothing older is written over something newer."""
    ledger.execute("BEGIN IMMEDIATE")
    with ledger:
        yield


def show_utc(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def find_end(call: Call) -> str | None:
    """When a call ended, for the ledger; None for what has no end, or none in the years 1 to 9999."""
    try:
        return show_utc(datetime.fromisoformat(call["end_stamp"])) if call["end_stamp"] else None
    except (ValueError, OverflowError):
        return None


def store(ledger: Ledger, call: Call) -> None:
    ledger.execute(UPSERT, call | {"ended": find_end(call)})


# Poll -------------------------------------------------------------------------


def set_position(ledger: Ledger, parameter: str, value: str, through: str | None) -> None:
    ledger.execute("INSERT OR REPLACE INTO position VALUES (1, ?, ?, ?)", (parameter, value, through))


@dataclass(frozen=True)
class Page:
    """What a page of the feed had: calls, the cursor behind it, up to when everything is delivered, is there more."""

    calls: int
    cursor: str
    through: str | None
    more: bool

    def keep(self, ledger: Ledger) -> None:
        set_position(ledger, "cursor", self.cursor, self.through)


def read_page(pbx: Pbx, ledger: Ledger, first: str | None, limit: int) -> Page:
    """Stores the calls of the next page, in the caller's transaction; the cursor is the caller's to keep."""
    found = ledger.execute("SELECT parameter, value FROM position").fetchone()
    parameter, value = found or ("from", first)
    if value is None:
        raise RunError(WRONG_USE, "The first poll needs --from: the day that the ledger begins with.")
    where = {parameter: value, "fields": FIELDS, "format": "ndjson", "limit": str(limit)}
    calls = 0
    with pbx.ask("call_feed", **where) as response:
        for call in read_calls(response):
            store(ledger, call)
            calls += 1
        cursor, through = response.headers["X-Next-Cursor"], response.headers["X-Complete-Through"]
    # http.client takes a head that was cut for a whole one; Link says the cursor again.
    if not cursor or f"cursor={cursor}>" not in response.headers.get("Link", ""):
        raise RunError(TRY_AGAIN, "The answer has no whole X-Next-Cursor; if that remains: is CDR_URL right?")
    return Page(calls, cursor, through, response.headers.get("X-More-Waiting") == "true")


def poll_page(pbx: Pbx, ledger: Ledger, first: str | None, limit: int) -> bool:
    """Stores a page of the feed and the cursor behind it; tells whether more may be waiting."""
    with transaction(ledger):
        page = read_page(pbx, ledger, first, limit)
        page.keep(ledger)
    rest = "more are waiting" if page.more else f"everything stored up to {page.through} is here"
    print(f"{page.calls} calls; {rest}.")
    return page.more


def begin_again(ledger: Ledger, refused: RefusedError, first: str | None) -> None:
    """After 410: polls from the instant that the answer names. Calls that are here already come again."""
    start = refused.data.get("from") or first
    if start is None:
        raise RunError(CURSOR_GONE, f"{refused} Say where, with --from.")
    with transaction(ledger):
        set_position(ledger, "from", start, None)
    print(f"{refused} Beginning again with {start}.", file=sys.stderr)


PollPage = Callable[[Pbx, Ledger, str | None, int], bool]


def poll(pbx: Pbx, ledger: Ledger, arguments: argparse.Namespace, poll_page: PollPage = poll_page) -> int:
    """Polls until nothing more is waiting, and waits where the service asks for it."""
    patience, resync = arguments.patience, arguments.resync
    more = True
    while more:
        try:
            more = poll_page(pbx, ledger, arguments.first, arguments.limit)
        except RefusedError as refused:
            if refused.answer == 410 and resync:
                resync = False
                begin_again(ledger, refused, arguments.first)
            elif refused.answer in (429, 503) and refused.retry_after <= patience:
                patience -= refused.retry_after
                print(f"{refused} Waiting {refused.retry_after} s.", file=sys.stderr, flush=True)
                time.sleep(refused.retry_after)
            else:
                raise
    return 0


# Reconcile --------------------------------------------------------------------


def digest(xml_cdr_uuid: str, billsec: int | None) -> int:
    """What a call adds to the digest of its group, modulo 2^48."""
    text = f"{xml_cdr_uuid} {billsec or 0}"
    return int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()[:12], 16)


@dataclass
class Total:
    """What the calls of a domain and day come to."""

    calls: int = 0
    billsec: int = 0
    billmsec: int = 0
    digest: int = 0

    def add(self, xml_cdr_uuid: str, billsec: int | None, billmsec: int | None) -> None:
        self.calls += 1
        self.billsec += billsec or 0
        self.billmsec += billmsec or 0
        self.digest = (self.digest + digest(xml_cdr_uuid, billsec)) % 2**48

    def join(self, row: dict[str, Any]) -> None:
        """Adds a group of call_totals."""
        self.calls += row["calls"]
        self.billsec += row["billsec"]
        self.billmsec += row["billmsec"]
        self.digest = (self.digest + int(row["digest"], 16)) % 2**48


# By domain and day. A domain is its uuid, which stays when it is renamed; for calls that are stored without one,
# "name " and the name.
Totals = dict[tuple[str, str], Total]


def show_domain(domain_uuid: str | None, domain_name: str | None) -> str:
    return domain_uuid or f"name {domain_name or ''}"


@dataclass(frozen=True)
class Scope:
    """The calls that a reconciliation is about: days of a time zone, under one domain_name or (None) under any."""

    first: date
    last: date
    domain: str | None
    zone: zoneinfo.ZoneInfo

    def begin(self, day: date) -> datetime:
        return datetime(day.year, day.month, day.day, tzinfo=self.zone)

    def bounds(self, first: date, last: date) -> tuple[datetime, datetime]:
        """The first instant of a day and the first behind another."""
        return self.begin(first), self.begin(last + timedelta(days=1))


def pbx_totals(pbx: Pbx, scope: Scope) -> Totals:
    """By what calls show as their domain: a name that is deleted, or given to another domain, is compared as well.

    Calls of a domain that was deleted show the names that are stored, so of one domain_uuid there may be several.
    """
    groups = "domain_uuid,domain_name,day"
    where = {"from": str(scope.first), "to": str(scope.last), "group_by": groups, "tz": scope.zone.key}
    totals: Totals = {}
    with pbx.ask("call_totals", **where) as response:
        rows = read_json(response)
    for row in rows:
        if scope.domain in (None, row["domain_name"]):
            group = (show_domain(row["domain_uuid"], row["domain_name"]), row["day"])
            totals.setdefault(group, Total()).join(row)
    return totals


def ledger_totals(ledger: Ledger, scope: Scope) -> Totals:
    totals: Totals = {}
    start, end = scope.bounds(scope.first, scope.last)
    rows = ledger.execute(
        "SELECT domain_uuid, domain_name, ended, xml_cdr_uuid, billsec, billmsec FROM calls"
        " WHERE gone_at IS NULL AND ended >= ? AND ended < ? AND (? IS NULL OR domain_name = ?)",
        (show_utc(start), show_utc(end), scope.domain, scope.domain),
    )
    for domain_uuid, domain_name, ended, *values in rows:
        day = datetime.fromisoformat(ended).astimezone(scope.zone).date()
        totals.setdefault((show_domain(domain_uuid, domain_name), str(day)), Total()).add(*values)
    return totals


def is_known(pbx: Pbx, ledger: Ledger, scope: Scope) -> bool:
    """Whether either side knows the name. The PBX need not: a domain may have been deleted."""
    found = ledger.execute("SELECT EXISTS (SELECT * FROM calls WHERE domain_name = ?)", (scope.domain,)).fetchone()
    if found[0] or pbx_totals(pbx, scope):
        return True
    with pbx.ask("domains") as response:
        return any(row["domain_name"] == scope.domain for row in read_json(response))


def compare(pbx: Pbx, ledger: Ledger, scope: Scope) -> list[tuple[str, date]]:
    """The domains and days that differ."""
    there, here = pbx_totals(pbx, scope), ledger_totals(ledger, scope)
    return [
        (domain, date.fromisoformat(day))
        for domain, day in sorted({**there, **here})
        if there.get((domain, day)) != here.get((domain, day))
    ]


def repair(pbx: Pbx, ledger: Ledger, scope: Scope, domain: str, day: date) -> str:
    """Makes a day of a domain in the ledger what it is in the PBX; says what that took."""
    start, end = map(show_utc, scope.bounds(day, day))
    corrected = 0
    with transaction(ledger):
        rows = ledger.execute(
            "SELECT domain_uuid, domain_name, xml_cdr_uuid, billsec, billmsec FROM calls"
            " WHERE gone_at IS NULL AND ended >= ? AND ended < ?",
            (start, end),
        )
        extra = {uuid: values for uid, name, uuid, *values in rows if show_domain(uid, name) == domain}
        for call in read_day(pbx, domain, *scope.bounds(day, day)):
            corrected += extra.pop(call["xml_cdr_uuid"], None) != [call["billsec"], call["billmsec"]]
            store(ledger, call)
        gone = look_up(pbx, ledger, list(extra))
    return f"{corrected} added or corrected, {len(extra) - gone} moved elsewhere, {gone} gone"


def read_day(pbx: Pbx, domain: str, start: datetime, end: datetime) -> Iterator[Call]:
    """The calls of a day; none of a domain that is deleted, or that this token may read no longer.

    Its calls in the ledger are marked as gone then, which is told once. They stay in
    it, and are what they were again if the domain can be read again.
    """
    if domain.startswith("name "):
        yield from read_strays(pbx, domain, start, end)
        return
    last = show_utc(end - timedelta(microseconds=1))  # both ends of a range are inclusive
    where = {"from": show_utc(start), "to": last, "fields": FIELDS, "format": "ndjson"}
    try:
        with pbx.ask("call_range", domain_uuid=domain, **where) as response:
            yield from read_calls(response)
    except RefusedError as refused:
        if refused.answer == 404:  # which only a token that reads everything gets: also what a deletion left behind
            yield from read_strays(pbx, domain, start, end)
        elif refused.answer != 403:
            raise


def read_strays(pbx: Pbx, domain: str, start: datetime, end: datetime) -> Iterator[Call]:
    """The calls of a day that no domain can be named for: from a first poll of the feed, whose cursor is not kept.

    It brings them in the order of their ends, those without an end last, so it is read to the end of the day.
    """
    where = {"from": show_utc(start), "fields": FIELDS, "format": "ndjson"}
    with pbx.ask("call_feed", **where) as response:
        for call in read_calls(response):
            ended = find_end(call)
            if ended is None or ended >= show_utc(end):
                break
            if show_domain(call["domain_uuid"], call["domain_name"]) == domain:
                yield call


def look_up(pbx: Pbx, ledger: Ledger, uuids: list[str]) -> int:
    """Updates calls that the PBX has under another day or domain, marks those that it lacks; gives their number."""
    gone = 0
    for i in range(0, len(uuids), LOOKUP):
        with pbx.ask("call_lookup", {"xml_cdr_uuid": uuids[i : i + LOOKUP]}, fields=FIELDS) as response:
            found = read_json(response)
        for call in found["calls"]:
            store(ledger, call)
        marks = [(show_utc(datetime.now(UTC)), uuid) for uuid in found["not_found"]]
        ledger.executemany("UPDATE calls SET gone_at = ? WHERE xml_cdr_uuid = ?", marks)
        gone += len(marks)
    return gone


def reconcile(pbx: Pbx, ledger: Ledger, arguments: argparse.Namespace) -> int:
    scope = Scope(arguments.first, arguments.last, arguments.domain, arguments.tz)
    if scope.domain is not None and not is_known(pbx, ledger, scope):
        raise RunError(NOT_ALLOWED, f"This token may not read {scope.domain}, and the ledger has no call of it.")
    for _ in range(3):  # repairs can move calls into a group that was equal; and calls arrive meanwhile
        if not (different := compare(pbx, ledger, scope)):
            print(f"The ledger equals the PBX from {scope.first} to {scope.last}.")
            return 0
        for domain, day in different:
            print(f"{domain} {day}: {repair(pbx, ledger, scope, domain, day)}")
    different = compare(pbx, ledger, scope)
    print(f"{len(different)} groups still differ.", file=sys.stderr)
    return DIFFERS if different else 0


# Command line -----------------------------------------------------------------


def read_zone(name: str) -> zoneinfo.ZoneInfo:
    try:
        return zoneinfo.ZoneInfo(name)
    except (KeyError, OSError):
        raise ValueError(name) from None


def read_filter(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found:
        raise ValueError(text)
    return name, value


def add_filter(parser: argparse.ArgumentParser) -> None:
    about = "only such calls, for instance billable_only=true; may be given again. One ledger, always the same filters"
    parser.add_argument("--filter", type=read_filter, action="append", default=[], metavar="NAME=VALUE", help=about)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Keeps a ledger of a PBX's calls in SQLite. CDR_URL and CDR_TOKEN come from the environment."
    )
    parser.add_argument("--ledger", default="ledger.sqlite", help="the SQLite file (ledger.sqlite)")
    add_filter(parser)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("poll", help="read the feed from where the last run ended")
    command.set_defaults(run=poll)
    command.add_argument("--from", dest="first", help="where the first poll begins: a date or a datetime")
    command.add_argument("--resync", action="store_true", help="start again if the cursor cannot be continued")
    command.add_argument("--limit", type=int, default=10_000, help="calls of a page (10000)")
    command.add_argument("--patience", type=int, default=300, help="seconds to wait for a busy service (300)")
    command = commands.add_parser("reconcile", help="compare with the PBX, and repair")
    command.set_defaults(run=reconcile)
    command.add_argument("--from", dest="first", type=date.fromisoformat, required=True, help="the first day")
    command.add_argument("--to", dest="last", type=date.fromisoformat, required=True, help="the last day")
    command.add_argument("--domain", help="only calls under this domain_name")
    command.add_argument("--tz", type=read_zone, default="UTC", help="whose days are meant (UTC)")
    return parser.parse_args()


def find_pbx(filters: list[tuple[str, str]]) -> Pbx:
    """The service that the environment names."""
    pbx = Pbx(os.environ.get("CDR_URL", ""), os.environ.get("CDR_TOKEN", ""), tuple(filters))
    if not pbx.url.startswith(("https://", "http://")) or not pbx.token:
        raise RunError(WRONG_USE, "CDR_URL (such as https://pbx.example.com/api) and CDR_TOKEN must be set.")
    return pbx


def main() -> int:
    arguments = read_arguments()
    try:
        pbx = find_pbx(arguments.filter)
        with closing(open_ledger(arguments.ledger)) as ledger:
            status: int = arguments.run(pbx, ledger, arguments)
            return status
    except RunError as failed:
        print(failed, file=sys.stderr)
        return failed.status
    except sqlite3.OperationalError as error:
        print(f"{arguments.ledger}: {error}", file=sys.stderr)
        return TRY_AGAIN


if __name__ == "__main__":
    sys.exit(main())
