"""How many requests a token may make: a bucket for each, in memory that all workers of the machine share.

A bucket holds as many requests as a minute allows, and fills steadily. It lies in
a file that gunicorn's master opens before it forks, since it loads this module.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SLOTS = 4096  # of the tokens that asked last; a token that has lost its slot has a full bucket again
PROBES = 8  # so many slots may be a token's
SLOT = struct.Struct("=qdd")  # token_id, the requests left, and when that was so, by time.monotonic()


@dataclass(frozen=True)
class Allowance:
    """What a token has left after a request."""

    limit: int  # requests a minute
    remaining: int  # requests
    reset: int  # seconds until the bucket is full
    wait: int  # seconds until a request is allowed; 0 if this one was


class Buckets:
    """The buckets of all tokens. A lock of the file guards them, which no process that dies can keep."""

    def __init__(self) -> None:
        self.file, path = tempfile.mkstemp(prefix="cdr-api-")  # open for as long as the process lives
        Path(path).unlink()
        os.ftruncate(self.file, SLOTS * SLOT.size)
        self.memory = mmap.mmap(self.file, SLOTS * SLOT.size)
        self.threads = threading.Lock()  # a lock of a file is a process's

    @contextmanager
    def locked(self) -> Iterator[None]:
        with self.threads:
            fcntl.lockf(self.file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self.file, fcntl.LOCK_UN)

    def find(self, token_id: int) -> tuple[int, float, float | None]:
        """A token's slot, with what was left and when (None: it had none); the longest unused one is given away."""
        places = [(token_id + probe) % SLOTS * SLOT.size for probe in range(PROBES)]
        found = {place: SLOT.unpack_from(self.memory, place) for place in places}
        for place, (owner, left, since) in found.items():
            if owner == token_id:
                return place, left, since
        return min(places, key=lambda place: found[place][2]), 0, None

    def take(self, token_id: int, limit: int) -> Allowance:
        """Counts a request of a token that may make so many a minute, if there is room for it."""
        with self.locked():
            now = time.monotonic()
            place, left, since = self.find(token_id)
            left = limit if since is None else min(limit, left + (now - since) * limit / 60)
            allowed = left >= 1
            left -= allowed
            SLOT.pack_into(self.memory, place, token_id, left, now)
        seconds = 60 / limit
        wait = 0 if allowed else math.ceil((1 - left) * seconds)
        return Allowance(limit, int(left), math.ceil((limit - left) * seconds), wait)


buckets = Buckets()
