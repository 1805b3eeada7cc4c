"""The feed: each call once, in the order of becoming visible. What its cursor holds, and the arithmetic on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

from cdr.accounts import Account
from cdr.cursors import read_cursor
from cdr.database import Connection, PooledConnection, run, run_planned
from cdr.errors import ApiError, unavailable
from cdr.ranges import EARLIEST, clamp, find_edge, find_zone
from cdr.selection import Domains, Key, Selection
from cdr.service import Service
from cdr.statements import STATEMENTS, mogrify

FEED_VERSION = 2
# Transaction ids are compared by 32 bits: a cursor may be almost half of them old.
OLDEST_CURSOR = 2**31 - 10_000_000
# So many names a cursor tells apart; of more it knows only whether they are others now.
MOST_NAMES = 200
# What ended so long before a sweep is left to the next one.
SHALLOW = timedelta(hours=6)


@dataclass(frozen=True)
class FeedCursor:
    """Where a poller stands: it has what transactions below low wrote.

    While it pages through [low, high), key is the last call that it has. taken
    is when high, before that low, was read; since bounds the ends that are looked
    at. All instants are in ISO 8601. timeline and position (of the WAL) are those
    of high, before that low: where the server's history does not contain them,
    transaction ids have been given out again.

    Between two pages of a window a call may be changed, and so fall into a later
    window; that has to look as far back. So may every call during the first poll,
    by an upgrade that rewrites the table. floor is that since, with the id of the
    next transaction when the last page was read: it holds until the horizon has
    reached that id.

    With CDR_API_SWEEP_SECONDS most polls are shallow: of what transactions in [low, high)
    wrote they deliver what ended at the boundary or later. The rest waits
    for a sweep, which delivers of what ended before it all that those in [deep, high) wrote.
    The boundary changes only at a sweep, behind which nothing waits: so each row, whose
    writer and end never change, is in one window of one of the two.
    """

    version: int
    cluster: str  # PostgreSQL's system identifier and the database's oid
    account_id: int
    purpose: str  # a digest of the filters and of the domains that were named
    grants: int | str | None  # the newest of the account's grants; "*": it read everything; None: domains were named
    names: Sequence[str]  # of the domains, as find_marks shows them
    table: int  # the oid of v_xml_cdr when the last page was read
    timeline: int
    position: str
    low: int | None  # None: everything below high
    since: str
    taken: str
    through: str  # everything stored up to here has been delivered, but for what waits for a sweep
    pending: tuple[str, int] | None = None  # an instant, and the next transaction's id then
    floor: tuple[str, int] | None = None
    high: int | None = None
    key: Key | None = None
    width: float | None = None  # seconds between the first and the last call of the page before
    shallow: bool = False  # whether the window leaves something to a sweep
    deep: int | None = (
        None  # what ended before the boundary has been delivered as far as transactions below this wrote it
    )
    swept: str | None = None  # the taken of the last sweep
    complete: str | None = None  # the through of the last sweep
    absent: Sequence[str] = ()  # of the account's domains, those that v_domains lacked, as find_absent shows them
    parts: str | None = None  # what v_xml_cdr consisted of then, as digest_parts shows it

    @property
    def boundary(self) -> datetime | None:
        """What ended before it a shallow poll leaves; None: nothing."""
        return datetime.fromisoformat(self.swept) - SHALLOW if self.swept else None

    @property
    def lowest(self) -> int | None:
        """No transaction below it wrote anything that the window has; None: any may have."""
        return self.low if self.shallow or self.deep is None else self.deep


@dataclass(frozen=True)
class Horizon:
    """A transaction id: all below it have ended, and no crash undoes that; and where in the WAL that is told."""

    xid: int
    timeline: int
    position: str


def find_horizon(service: Service) -> Horizon:
    with service.calls.connection() as connection:
        found = run_planned(connection, "find_horizon")[0]
        if not found["durable"]:
            connection.execute(STATEMENTS["flush_wal"])
    return Horizon(int(found["horizon"]), found["timeline"], found["position"])


def parse_position(text: str) -> int:
    """A position in the WAL, such as 0/16B3748, in bytes."""
    high, low = text.split("/")
    return (int(high, 16) << 32) + int(low, 16)


# What a cursor is bound to ----------------------------------------------------


def digest_purpose(selection: Selection) -> str:
    """The filters, and the domains if the request names them or the token was made for some.

    By uuid: a rename changes nothing.
    """
    domains = selection.domains
    chosen = domains.uuids if domains.named else domains.chosen_uuids
    uuids = None if chosen is None else sorted(chosen)
    return hashlib.sha256(json.dumps([uuids, selection.identity()]).encode()).hexdigest()[:32]


def show_grants(domains: Domains) -> int | str | None:
    if domains.named:
        return None
    return "*" if domains.everything else domains.newest_grant or 0


def find_marks(domains: Domains) -> list[str]:
    """What tells the names of domains apart: calls without a uuid belong to them by name."""
    if domains.everything:
        return []
    return shorten(str(name).encode("utf-8", "surrogateescape") for name in domains.lone_names)


def find_absent(domains: Domains) -> list[str]:
    """What tells the domains apart that the account may read and v_domains lacks: their calls are passed over."""
    return [] if domains.everything else shorten(uuid.encode() for uuid in domains.absent)


def shorten(texts: Iterable[bytes]) -> list[str]:
    """A mark for each text, or one for all of them where they are many."""
    marks = sorted(hashlib.sha256(text).hexdigest()[:6] for text in texts)
    return marks if len(marks) <= MOST_NAMES else [hashlib.sha256("".join(marks).encode()).hexdigest()[:16]]


def find_returned(cursor: FeedCursor, domains: Domains) -> list[str]:
    """The domains that v_domains lacked and has again; of many, all if others are lacking now."""
    if all(len(mark) == 6 for mark in cursor.absent):
        return [uuid for uuid in domains.uuids if shorten([uuid.encode()])[0] in cursor.absent]
    return [] if list(cursor.absent) == find_absent(domains) else list(domains.uuids)


def read_feed_cursor(secret: bytes, text: str) -> FeedCursor:
    """The cursor of a text; ApiError 422 unless this service wrote it."""
    found = read_cursor(secret, "feed", "cursor", text)
    if found["version"] != FEED_VERSION:
        gone(found["since"], "This cursor is of another version of the service")
    return FeedCursor(**found)


def gone(since: str, reason: str) -> NoReturn:
    """Raises ApiError 410, which says where to start again."""
    how = (
        "poll with this from and without a cursor; calls that you have come again; "
        "the older calls of a domain that is new to you need a from of their own"
    )
    resync = {"from": since, "how": how}
    headers = {"X-Restart-From": since}
    raise ApiError(410, f"{reason}: start again with from=; calls that you have come again.", resync, headers)


def check_purpose(cursor: FeedCursor, account: Account, selection: Selection, snapshot: Mapping[str, Any]) -> None:
    """Raises ApiError 410 for a cursor of another question. What can hide no call is not another question."""
    present = show_grants(selection.domains)
    if cursor.account_id != account.account_id:
        gone(cursor.since, "This cursor was given to another account")
    if cursor.cluster != snapshot["cluster"]:
        gone(cursor.since, "This cursor is of another database or cluster")
    if cursor.purpose != digest_purpose(selection) or (cursor.grants is None) != (present is None):
        gone(cursor.since, "This cursor was made with other filters or for other domains")
    if isinstance(cursor.grants, int) and (present == "*" or cursor.grants < int(present or 0)):
        gone(cursor.since, "This account has been granted a domain since this cursor was made")


def check_history(connection: Connection, cursor: FeedCursor, snapshot: Mapping[str, Any]) -> None:
    """Raises ApiError 410 where the server's history does not contain the cursor's position; 503 where not yet."""
    present, position = snapshot["timeline"], parse_position(cursor.position)
    if present != cursor.timeline:
        found = run(connection, "find_timeline_end", present=present, past=cursor.timeline)[0]["position"]
        if present < cursor.timeline and snapshot["in_recovery"]:
            raise unavailable("This standby is behind the cursor: try again soon.")
        if found is None or parse_position(found) < position:
            gone(
                cursor.since, "Since this cursor the database has failed over to a server that lacked, or was restored"
            )
    if position > parse_position(snapshot["position"]) or (cursor.high or cursor.low or 0) > snapshot["horizon"]:
        if snapshot["in_recovery"]:
            raise unavailable("This standby is behind the cursor: try again soon.")
        gone(cursor.since, "This cursor is ahead of the database, as after the restore of a backup")
    oldest = min(xid for xid in (cursor.deep, cursor.low, cursor.high, snapshot["horizon"]) if xid is not None)
    if snapshot["horizon"] - oldest > OLDEST_CURSOR:
        gone(cursor.since, "This cursor is too old")


def check_rows(connection: Connection, cursor: FeedCursor, selection: Selection, tables: Mapping[str, Any]) -> None:
    """Raises ApiError 410 where rows that are older than the cursor have come to be among the calls asked for.

    In the middle of a window those that belong to it are older too: a page may have passed over them.
    """
    if cursor.high is None and cursor.low is None:
        return
    low = show_xid(cursor.low if cursor.high is None else cursor.high)
    if cursor.high is None or cursor.parts not in (None, digest_parts(tables)):
        attached = run(connection, "find_attached", members=tables["members"], low=low)[0]["attached"] or []
        joined = tables["members"] if cursor.table != tables["root"] else attached
        if joined and run(connection, "find_older_rows", tables=joined, low=low)[0]["found"]:
            gone(cursor.since, "A table with older calls has become a part of v_xml_cdr since this cursor was made")
    returned = find_returned(cursor, selection.domains) if cursor.absent else []
    if returned and run(connection, "find_older_calls", domain_uuids=returned, low=low)[0]["found"]:
        gone(cursor.since, "A domain with older calls that was missing is there again since this cursor was made")
    marks = find_marks(selection.domains)
    if marks == list(cursor.names):
        return
    names = [] if selection.domains.everything else selection.domains.lone_names
    new = [name for name in names if not set(find_marks(Domains(lone_names=[name]))) <= set(cursor.names)]
    find_nameless = mogrify(connection, STATEMENTS["find_nameless"].as_string(), {"names": new})
    if new and connection.execute(find_nameless).fetchall()[0]["found"]:
        gone(cursor.since, "A domain has been given the name of older calls that have no domain_uuid")


# Windows ----------------------------------------------------------------------


def check_tables(connection: PooledConnection) -> dict[str, Any]:
    """v_xml_cdr and its partitions; ApiError 409 where the transactions that wrote rows cannot be told."""
    found = run_planned(connection, "find_tables")[0]
    odd = found["odd"]
    if not odd and found["has_distributed"]:
        odd = run(connection, "find_distributed", members=found["members"])[0]["odd"]
    if odd:
        message = f"The feed needs plain tables of this server, and {odd}: read call_range instead."
        raise ApiError(409, message)
    return found


def digest_parts(tables: Mapping[str, Any]) -> str:
    """What tells whether v_xml_cdr consists of other tables now."""
    return hashlib.sha256(json.dumps(sorted(tables["members"])).encode()).hexdigest()[:16]


def find_width(first: str | None, last: str | None) -> float | None:
    """The seconds between two instants; None where one is not known."""
    try:
        return (datetime.fromisoformat(last or "") - datetime.fromisoformat(first or "")).total_seconds()
    except ValueError:
        return None


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
        written = replace(
            self.selection.ending_since(self.since),
            low=show_xid(cursor.low),
            high=show_xid(cursor.high),
            deep=show_xid(cursor.lowest),
            boundary=cursor.boundary if cursor.lowest != cursor.low else None,  # else there is but one window
        )
        if cursor.lowest == cursor.high:  # no transaction has ended meanwhile: nothing needs to be looked at
            written = replace(written, possible=False)
        return written.parts(cursor.key and (cursor.key[0], cursor.key[1]), limit)

    @property
    def since(self) -> datetime:
        """From which ends on the poll looks."""
        cursor = self.cursor
        if cursor.shallow and cursor.boundary:
            return cursor.boundary
        since = datetime.fromisoformat(cursor.since)
        if cursor.low is None:
            return since
        # No later than the clocks of today allow: one may have been wrong when the cursor was made.
        now: datetime = min(self.snapshot["now"], datetime.now(UTC))
        return min(since, now - self.lookback)

    @property
    def page_before(self) -> timedelta | None:
        """The time between the first and the last call of the page before, if there was one."""
        return timedelta(seconds=self.cursor.width) if self.cursor.width else None

    def may_be_continued(self, key: Key | None) -> bool:
        """Whether a poll right after this one may find calls: the rest of the window after a key, or newer ones."""
        return key is not None or self.snapshot["horizon"] > (self.cursor.high or 0)

    def following(self, key: Key | None) -> FeedCursor:
        """The cursor of the next poll: after a key, or (None) after the window, which was delivered whole.

        Everything stored by an instant is delivered once every transaction that had
        begun to write by then lies below the horizon. So an instant is noted with
        the id of the next transaction, and waits until the horizon has reached it.

        What has not been delivered was stored after through, so it may have ended
        as long before that as the look-back is. Of two polls the earlier instant
        counts: a clock that was wrong for one of them costs nothing.
        """
        cursor = self.cursor
        if key:
            return replace(cursor, key=key, width=find_width(cursor.key[0] if cursor.key else None, key[0]))
        high, later = cursor.high or 0, self.snapshot["next"]
        through, pending = cursor.through, cursor.pending
        if pending and high >= pending[1]:
            through, pending = pending[0], None
        if high >= later:
            through, pending = cursor.taken, None
        elif pending is None:
            pending = (cursor.taken, later)
        following = replace(cursor, low=high, high=None, key=None, width=None, through=through, pending=pending)
        return replace(following, shallow=False) if cursor.shallow else self.swept(following)

    def swept(self, following: FeedCursor) -> FeedCursor:
        """The cursor of the next poll, where nothing waits for a sweep."""
        cursor, floor, later = self.cursor, self.cursor.floor, self.snapshot["next"]
        if cursor.key or cursor.low is None:
            floor = (cursor.since, later)
        elif floor and (following.low or 0) >= floor[1]:
            floor = None
        instants = [following.through] if cursor.low is None else [following.through, cursor.complete or cursor.through]
        since = clamp(lambda: min(map(datetime.fromisoformat, instants)) - self.lookback, EARLIEST)
        since = min(since, datetime.fromisoformat(floor[0])) if floor else since
        return replace(
            following,
            since=since.isoformat(),
            floor=floor,
            deep=following.low,
            swept=cursor.taken,
            complete=following.through,
        )


def show_xid(xid: int | None) -> str | None:
    """The 32 bits of a transaction's id that rows keep."""
    return None if xid is None else str(xid % 2**32)


def find_taken(connection: Connection, snapshot: Mapping[str, Any], tables: Mapping[str, Any]) -> datetime | None:
    """The instant of what the snapshot sees; None where a subscription fills the table and says nothing.

    By the earlier of the two clocks, so that neither can be ahead.
    """
    seen: datetime = min(snapshot["seen"], datetime.now(UTC))
    found = run(connection, "find_subscriptions", members=tables["members"])[0]
    if not found["subscriptions"]:
        return seen
    return min(seen, datetime.fromisoformat(found["applied"])) if found["known"] and found["applied"] else None


def read_window(
    service: Service,
    connection: PooledConnection,
    account: Account,
    selection: Selection,
    horizon: Horizon,
    values: Mapping[str, Any],
) -> tuple[Window, bool]:
    """The window of a poll by its cursor or from, in the transaction that reads it; ApiError 409, 410, 422 or 503.

    And whether it is known up to which instant everything is delivered.
    """
    snapshot = run_planned(connection, "find_snapshot")[0]
    horizon = choose_horizon(horizon, snapshot)
    snapshot["horizon"] = horizon.xid
    tables = check_tables(connection)
    taken = find_taken(connection, snapshot, tables)
    if values["cursor"] is not None:
        cursor = read_feed_cursor(service.secret, values["cursor"])
        check_purpose(cursor, account, selection, snapshot)
        check_history(connection, cursor, snapshot)
        check_rows(connection, cursor, selection, tables)
    else:
        since = find_edge(values["from"], values["from"].first, find_zone(values["tz"] or service.time_zone))
        cursor = first_cursor(account, selection, snapshot, since, min(since, taken or since))
    if cursor.high is None:  # else it is in the middle of a window
        cursor = open_window(cursor, selection, horizon, tables, taken.isoformat() if taken else cursor.through)
        cursor = replace(cursor, shallow=is_shallow(cursor, service.settings.sweep_seconds))
    else:
        cursor = narrow(cursor, selection.domains, tables)
    return Window(cursor, selection, snapshot, timedelta(days=service.settings.lookback_days)), taken is not None


def open_window(
    cursor: FeedCursor, selection: Selection, horizon: Horizon, tables: Mapping[str, Any], taken: str
) -> FeedCursor:
    """The cursor with its window [low, high) set, and what that was read under."""
    return replace(
        cursor,
        high=horizon.xid,
        taken=taken,
        timeline=horizon.timeline,
        position=horizon.position,
        grants=show_grants(selection.domains),
        names=find_marks(selection.domains),
        absent=find_absent(selection.domains),
        table=tables["root"],
        parts=digest_parts(tables),
    )


def narrow(cursor: FeedCursor, domains: Domains, tables: Mapping[str, Any]) -> FeedCursor:
    """The cursor in the middle of a window, with the least that its pages were read under.

    A page passes over what the account may not read just then, though it might when the window was opened, and
    what is no part of v_xml_cdr just then.
    """
    marks = find_marks(domains)
    return replace(
        cursor,
        grants=show_grants(domains) if cursor.grants == "*" else cursor.grants,
        names=[name for name in cursor.names if name in marks],
        absent=sorted({*cursor.absent, *find_absent(domains)}),
        table=tables["root"],
        parts=digest_parts(tables),
    )


def is_shallow(cursor: FeedCursor, seconds: int) -> bool:
    """Whether the poll may leave something to a sweep: one was made less than so many seconds ago."""
    if cursor.low is None or cursor.swept is None:
        return False
    age = datetime.fromisoformat(cursor.taken) - datetime.fromisoformat(cursor.swept)
    return timedelta() <= age < timedelta(seconds=seconds)


def choose_horizon(horizon: Horizon, snapshot: Mapping[str, Any]) -> Horizon:
    """The lower one of the horizon and the snapshot's: the two may come from different servers of one DSN."""
    if snapshot["timeline"] != horizon.timeline:
        raise unavailable("The database has just failed over: try again soon.")
    if horizon.xid <= snapshot["horizon"]:
        return horizon
    return Horizon(snapshot["horizon"], snapshot["timeline"], snapshot["position"])


def first_cursor(
    account: Account, selection: Selection, snapshot: Mapping[str, Any], since: datetime, through: datetime
) -> FeedCursor:
    """The cursor of a first poll, which takes whatever ended since an instant."""
    return FeedCursor(
        version=FEED_VERSION,
        cluster=snapshot["cluster"],
        account_id=account.account_id,
        purpose=digest_purpose(selection),
        grants=None,
        names=(),
        table=0,
        timeline=snapshot["timeline"],
        position=snapshot["position"],
        low=None,
        since=since.isoformat(),
        taken=through.isoformat(),
        through=through.isoformat(),
    )
