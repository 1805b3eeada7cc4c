"""from and to: dates and datetimes as they are written, and the instants that they mean in a time zone."""

from __future__ import annotations

import calendar
import re
import zoneinfo
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone, tzinfo

from cdr.errors import refuse, unavailable

MOMENT = re.compile(
    r"(?P<day>\d{4}-\d\d-\d\d)"
    r"([T ](?P<hour>\d\d)(:(?P<minute>\d\d)(:(?P<second>\d\d)(\.(?P<fraction>\d{1,6}))?)?)?"
    # A "+" that was not escaped in a URL arrives as a blank.
    r"((?P<utc>Z)|(?P<sign>[-+ ])(?P<hours>\d\d)(:?(?P<minutes>\d\d))?)?)?",
    re.ASCII | re.IGNORECASE,
)
EPOCH = re.compile(r"(?P<second>\d{9,10})(\.(?P<fraction>\d{1,6}))?", re.ASCII)
MOMENT_HELP = (
    "must be a date (2026-01-31), a datetime (2026-01-31T23:59:59, with Z or an offset such as +01:00 if you like) "
    "or epoch seconds (1769900399)"
)


@dataclass(frozen=True)
class Moment:
    """A date or datetime as it was written: its first moment and its length.

    2026-01-31 is 24 hours long, 2026-01-31T23:59 a minute. Without an offset
    (start.tzinfo is None) it is meant in a zone that first and end are told.
    """

    start: datetime
    length: timedelta

    def first(self, zone: tzinfo) -> datetime:
        """The first instant; of two, which a change of the clock makes, the earlier."""
        return instant(self.start, zone, fold=0)

    def end(self, zone: tzinfo) -> datetime:
        """The instant after the last microsecond; of two, the later."""
        microsecond = timedelta(microseconds=1)
        last = self.start + (self.length - microsecond)
        skipped = last.tzinfo is None and is_skipped(last, zone)
        return instant(last, zone, fold=1) + (timedelta() if skipped else microsecond)


def is_skipped(local: datetime, zone: tzinfo) -> bool:
    return offset(local, zone, 0) < offset(local, zone, 1)


def offset(local: datetime, zone: tzinfo, fold: int) -> timedelta:
    return local.replace(tzinfo=zone, fold=fold).utcoffset() or timedelta()


def instant(local: datetime, zone: tzinfo, fold: int) -> datetime:
    """The instant of a local time; for one that the clock skipped, the change."""
    if local.tzinfo:
        return local.astimezone(UTC)
    if not is_skipped(local, zone):
        return (local - offset(local, zone, fold)).replace(tzinfo=UTC)
    before = offset(local, zone, 0)
    low, high = local - offset(local, zone, 1), local - before
    while high - low > timedelta(microseconds=1):
        middle = low + (high - low) // 2
        if middle.replace(tzinfo=UTC).astimezone(zone).utcoffset() == before:
            low = middle
        else:
            high = middle
    return high.replace(tzinfo=UTC)


def parse_moment(text: str) -> Moment:
    """A Moment from ISO 8601 or epoch seconds; ValueError says what is allowed."""
    if match := EPOCH.fullmatch(text):
        found = datetime.fromtimestamp(int(match["second"]), UTC)
        return Moment(found + read_fraction(match["fraction"]), read_length(match))
    if not (match := MOMENT.fullmatch(text)):
        raise ValueError(MOMENT_HELP)
    try:
        hour, minute, second = (int(match[part] or 0) for part in ("hour", "minute", "second"))
        found = datetime.fromisoformat(match["day"]).replace(hour=hour, minute=minute, second=second)
        found = found.replace(tzinfo=read_offset(match)) + read_fraction(match["fraction"])
        return Moment(found, read_length(match))
    except ValueError:
        raise ValueError("is not a date and time that exists") from None


def parse_month(text: str) -> Moment:
    """A calendar month, such as 2026-10, as a Moment in a zone that is told later; ValueError says what is allowed."""
    if not re.fullmatch(r"[0-9]{4}-(0[1-9]|1[0-2])", text) or text < "0001":
        raise ValueError("must be a month such as 2026-10")
    first = datetime.fromisoformat(f"{text}-01")
    return Moment(first, timedelta(days=calendar.monthrange(first.year, first.month)[1]))


def read_offset(match: re.Match[str]) -> tzinfo | None:
    if match["utc"]:
        return UTC
    if not match["sign"]:
        return None
    distance = timedelta(hours=int(match["hours"]), minutes=int(match["minutes"] or 0))
    if int(match["hours"]) > 15 or int(match["minutes"] or 0) > 59:
        raise ValueError
    return timezone(-distance if match["sign"] == "-" else distance)


def read_fraction(digits: str | None) -> timedelta:
    return timedelta(microseconds=int((digits or "").ljust(6, "0")))


def read_length(match: re.Match[str]) -> timedelta:
    """How long a moment is at the precision that it is written in."""
    parts = match.groupdict()
    if parts["fraction"]:
        return timedelta(microseconds=10 ** (6 - len(parts["fraction"])))
    lengths = {"second": timedelta(seconds=1), "minute": timedelta(minutes=1), "hour": timedelta(hours=1)}
    return next((length for part, length in lengths.items() if parts.get(part)), timedelta(days=1))


EARLIEST = datetime(1, 1, 2, tzinfo=UTC)
LATEST = datetime.max.replace(tzinfo=UTC)


def clamp(find: Callable[[], datetime], limit: datetime) -> datetime:
    """What was found, or the limit if it lies outside Python's years 1 to 9999."""
    try:
        return find()
    except OverflowError:
        return limit


def find_edge(moment: Moment, find: Callable[[tzinfo], datetime], zone: tzinfo) -> datetime:
    """A moment's first or end, or the nearest instant that a datetime can hold with something before it."""
    return max(clamp(lambda: find(zone), LATEST if moment.start.year > 5000 else EARLIEST), EARLIEST)


def find_zone(name: str) -> tzinfo:
    """The zone of a name; ApiError 503 if it is the database's and Python does not know it."""
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise unavailable("The database's time zone is not a known one: set CDR_API_TIMEZONE.", 60) from None


def find_range(first: Moment, last: Moment, zone_name: str) -> tuple[datetime, datetime]:
    """The instants [from, to) of a range; ApiError 422 if it is the wrong way round."""
    zone = UTC if first.start.tzinfo and last.start.tzinfo else find_zone(zone_name)
    start, end = find_edge(first, first.first, zone), find_edge(last, last.end, zone)
    # A range within an hour that the clock skips is empty, not the wrong way round.
    local = first.start.tzinfo is None and last.start.tzinfo is None
    if start > end or (start == end and not (local and first.start <= last.start)):
        refuse("from", "must not be after to")
    return start, end
