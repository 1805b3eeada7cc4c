"""The legs of a conversation: which calls of one domain belong together, by the channels that they name.

A leg names a channel where its originating_leg_uuid, its bridge_uuid or its
cc_member_session_uuid is the channel's uuid, which is also the xml_cdr_uuid of the
channel's own leg, if that is stored. Legs that name the same channel belong
together, and so do theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from cdr.database import PooledConnection
from cdr.errors import ApiError
from cdr.ranges import EARLIEST, LATEST, clamp
from cdr.selection import Domains, Selection, compose_matching
from cdr.statements import STATEMENTS, mogrify, read_text

MOST_LEGS = 1000
MOST_STEPS = 20  # from one leg to the next
# How far apart the ends of two legs are at most of which one is found by what both name.
REACH = timedelta(days=1)


@dataclass(frozen=True)
class Leg:
    """A row of select_links."""

    uuid: str
    domain_uuid: str | None
    domain_name: str | None  # as its bytes in hex
    channels: frozenset[str]  # that it names, its own among them
    end: datetime | None


def find_legs(connection: PooledConnection, call: Selection) -> list[str]:
    """The uuids of the legs of the conversation of one call, its own among them; none if there is no such call.

    Raises ApiError 409 if there are too many.
    """
    found = {leg.uuid: leg for leg in select_links(connection, call)}
    if not found:
        return []
    searched = replace(call, uuids=None, domains=narrow(call.domains, next(iter(found.values()))))
    asked = set(found)
    for _ in range(MOST_STEPS):
        channels = {channel for leg in found.values() for channel in leg.channels}
        legs = select_links(connection, replace(searched, uuids=sorted(channels - asked))) if channels - asked else []
        if window := find_window(found.values()):
            legs += select_links(connection, searched.within(*window, by="end"), channels)
        asked |= channels
        new = {leg.uuid: leg for leg in legs if leg.uuid not in found}
        if not new:
            return list(found)
        found |= new
        if len(found) > MOST_LEGS:
            break
    raise too_many()


def too_many() -> ApiError:
    message = (
        f"More legs belong together with this call than are followed ({MOST_LEGS:,}, or {MOST_STEPS} from one to "
        "the next): read call_range of its day instead."
    )
    return ApiError(409, message)


def select_links(
    connection: PooledConnection, selection: Selection, channels: Collection[str] | None = None
) -> list[Leg]:
    """The selected calls as legs; with channels only those that name one of them.

    Raises ApiError 409 for more rows than legs are followed: of legs that are stored twice, too.
    """
    matching_calls = compose_matching(selection.source(connection))
    query = STATEMENTS["select_links"].format(matching_calls=matching_calls).as_string()
    parameters: dict[str, Any] = {"channels": None if channels is None else sorted(channels), "most": MOST_LEGS + 1}
    rows = connection.execute(mogrify(connection, query, selection.parameters() | parameters)).fetchall()
    if len(rows) > MOST_LEGS:
        raise too_many()
    return [Leg(**row | {"channels": frozenset(row["channels"])}) for row in rows]


def narrow(domains: Domains, leg: Leg) -> Domains:
    """The one domain of a leg; of one that belongs to none, what is stored with it as its domain."""
    name = read_text(leg.domain_name, domains.codec)
    pairs = zip(domains.uuids, domains.names, strict=True)
    own = [pair for pair in pairs if leg.domain_uuid == pair[0] or (leg.domain_uuid is None and name == pair[1])]
    if leg.domain_uuid is None and name not in domains.lone_names:
        return Domains(lone_names=[name], codec=domains.codec)
    uuid, name = own[0] if own else (leg.domain_uuid or "", None)
    return Domains([uuid], [name], [name] if name in domains.lone_names else [], codec=domains.codec)


def find_window(legs: Iterable[Leg]) -> tuple[datetime, datetime] | None:
    """In which other legs end that name one of some legs; None if no end is known."""
    ends = [leg.end for leg in legs if leg.end]
    return (shift(min(ends), -REACH), shift(max(ends), REACH)) if ends else None


def shift(instant: datetime, distance: timedelta) -> datetime:
    return clamp(lambda: instant + distance, LATEST if distance > timedelta() else EARLIEST)
