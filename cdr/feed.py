"""The feed: each call once, in the order of becoming visible. What its cursor holds, and the arithmetic on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, NoReturn

from cdr.accounts import Account
from cdr.cursors import read_cursor
from cdr.database import Connection, run
from cdr.errors import ApiError, unavailable
from cdr.ranges import find_edge, find_zone
from cdr.selection import Key, Selection
from cdr.service import Service

FEED_VERSION = 1
# Transaction ids are compared by 32 bits: a cursor may be almost half of them old.
OLDEST_CURSOR = 2**31 - 10_000_000


@dataclass(frozen=True)
class FeedCursor:
    """Where a poller stands: it has what transactions below low wrote.

    While it pages through [low, high), key is the last call that it has. taken
    is when high, before that low, was read; since bounds the end stamps that are
    looked at. All instants are in ISO 8601.

    Between two pages of a window a call may be changed, and so fall into a later
    window; that has to look as far back. So may every call during the first poll,
    by an upgrade that rewrites the table. floor is that since, with the id of the
    next transaction when the last page was read: it holds until the horizon has
    reached that id.
    """

    version: int
    cluster: str  # PostgreSQL's system identifier and the database's oid
    account_id: int
    purpose: str  # a digest of the filters and of the domains
    low: int | None  # None: everything below high
    since: str
    taken: str
    through: str  # everything stored up to here has been delivered
    pending: tuple[str, int] | None = None  # an instant, and the next transaction's id then
    floor: tuple[str, int] | None = None
    high: int | None = None
    key: Key | None = None


def digest_purpose(selection: Selection, *, all_domains: bool) -> str:
    """What a cursor of the feed is bound to beside account and cluster.

    The granted domains are part of it, by uuid: a grant that comes or goes must
    not let old calls slip in or out in silence. Who may read all is not bound
    to the domains of the day.
    """
    bound = "*" if all_domains else sorted(selection.domains.uuids)
    purpose = [selection.domains.name, bound, selection.identity()]
    return hashlib.sha256(json.dumps(purpose).encode()).hexdigest()[:32]


def read_feed_cursor(secret: bytes, text: str) -> FeedCursor:
    """The cursor of a text; ApiError 422 unless this service wrote it."""
    found = read_cursor(secret, "feed", "cursor", text)
    if found["version"] != FEED_VERSION:
        gone(found["since"], "This cursor is of another version of the service")
    return FeedCursor(**found)


def check_feed_cursor(cursor: FeedCursor, account_id: int, purpose: str, snapshot: Mapping[str, Any]) -> None:
    """Raises ApiError 410, with where to begin anew, for a cursor that cannot be continued."""
    ahead = (cursor.high or cursor.low or 0) > snapshot["horizon"]
    age = snapshot["horizon"] - (cursor.low or cursor.high or 0)
    if cursor.account_id != account_id:
        gone(cursor.since, "This cursor was given to another account")
    if cursor.cluster != snapshot["cluster"]:
        gone(cursor.since, "This cursor is of another database or cluster")
    if cursor.purpose != purpose:
        gone(cursor.since, "This cursor was made with other filters, or the account's domains have changed since")
    if ahead and snapshot["in_recovery"]:
        raise unavailable("This standby is behind the cursor: try again soon.")
    if ahead:
        gone(cursor.since, "This cursor is ahead of the database, as after the restore of a backup")
    if age > OLDEST_CURSOR:
        gone(cursor.since, "This cursor is too old")


def gone(since: str, reason: str) -> NoReturn:
    """Raises ApiError 410, which says where to begin anew."""
    how = (
        "poll with this from and without a cursor; calls that you have come again; "
        "the older calls of a domain that is new to you need a from of their own"
    )
    resync = {"from": since, "how": how}
    raise ApiError(410, f"{reason}: begin anew with from=, calls that you have come again.", resync)


def find_horizon(service: Service) -> int:
    """A transaction id: all below it have ended, and no crash undoes that."""
    with service.calls.connection() as connection:
        found = run(connection, "find_horizon")[0]
        if not found["durable"]:
            run(connection, "flush_wal")
    return int(found["horizon"])


@dataclass(frozen=True)
class Window:
    """What one poll reads: the calls of a selection that transactions in [low, high) wrote."""

    cursor: FeedCursor  # with high set
    selection: Selection
    snapshot: Mapping[str, Any]  # a row of find_snapshot
    lookback: timedelta

    def parts(self, limit: int | None) -> list[Selection]:
        """The selection of each statement that answers the poll."""
        cursor = self.cursor
        since = self.selection.ending_since(datetime.fromisoformat(cursor.since))
        low = None if cursor.low is None else str(cursor.low % 2**32)
        written = replace(since, low=low, high=str((cursor.high or 0) % 2**32))
        return written.parts(cursor.key and (cursor.key[0], cursor.key[1]), limit)

    def following(self, key: Key | None) -> FeedCursor:
        """The cursor of the next poll: behind a key, or (None) behind the window, which was delivered whole.

        Everything stored by an instant is delivered once every transaction that had
        begun to write by then lies below the horizon. So an instant is noted with
        the id of the next transaction, and waits until the horizon has reached it.
        """
        cursor = self.cursor
        if key:
            return replace(cursor, key=key)
        high, later = cursor.high or 0, self.snapshot["next"]
        through, pending, floor = cursor.through, cursor.pending, cursor.floor
        if pending and high >= pending[1]:
            through, pending = pending[0], None
        if high >= later:
            through, pending = cursor.taken, None
        elif pending is None:
            pending = (cursor.taken, later)
        if cursor.key or cursor.low is None:
            floor = (cursor.since, later)
        elif floor and high >= floor[1]:
            floor = None
        look_back = datetime.fromisoformat(cursor.taken) - self.lookback
        since = floor[0] if floor else look_back.isoformat()
        return replace(
            cursor, low=high, high=None, key=None, since=since, through=through, pending=pending, floor=floor
        )


def read_window(
    service: Service,
    connection: Connection,
    account: Account,
    selection: Selection,
    horizon: int,
    values: Mapping[str, Any],
) -> Window:
    """The window of a poll by its cursor or from, in the transaction that reads it; ApiError 410, 422 or 503."""
    snapshot = run(connection, "find_snapshot")[0]
    # The two may come from different servers of one DSN.
    snapshot["horizon"] = min(horizon, snapshot["horizon"])
    purpose = digest_purpose(selection, all_domains=account.all_domains)
    if values["cursor"] is not None:
        cursor = read_feed_cursor(service.secret, values["cursor"])
        check_feed_cursor(cursor, account.account_id, purpose, snapshot)
    else:
        since = find_edge(values["from"], values["from"].first, find_zone(service.time_zone))
        cursor = first_cursor(account.account_id, purpose, since, snapshot)
    if cursor.high is None:  # else it is in the middle of a window
        cursor = replace(cursor, high=snapshot["horizon"], taken=snapshot["seen"].isoformat())
    return Window(cursor, selection, snapshot, timedelta(days=service.settings.lookback_days))


def first_cursor(account_id: int, purpose: str, since: datetime, snapshot: Mapping[str, Any]) -> FeedCursor:
    """The cursor of a first poll, which takes whatever ended since an instant."""
    start, seen = since.isoformat(), snapshot["seen"].isoformat()
    return FeedCursor(FEED_VERSION, snapshot["cluster"], account_id, purpose, None, start, seen, start)
