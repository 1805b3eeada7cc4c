"""Passwords as scrypt hashes: what one costs, and how many are computed at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from werkzeug.security import check_password_hash, generate_password_hash

from cdr.errors import unavailable

# One takes 32 MB and a tenth of a second of a processor. So many at once in a worker:
# without a bound, as many as it has threads would take the memory that all of it may have.
AT_ONCE = 2
WAIT_SECONDS = 2.0  # in line; then there are more than we can compute


def hash_password(password: str) -> str:
    """What is kept of a password. For commands, which compute one."""
    return generate_password_hash(password)


class Passwords:
    """The passwords of a worker. Not to be asked while a connection is held: others need it meanwhile.

    Few wait, so that most threads are free for what needs no password; ApiError 503
    for all others.
    """

    def __init__(self, threads: int) -> None:
        self.places = threading.BoundedSemaphore(AT_ONCE + max(1, threads // 4))
        self.slots = threading.BoundedSemaphore(AT_ONCE)

    def hash(self, password: str) -> str:
        """What is kept of a password."""
        with self.turn():
            return hash_password(password)

    def is_right(self, password_hash: str, password: str) -> bool:
        """Whether a password is the one that a hash was made of."""
        with self.turn():
            return check_password_hash(password_hash, password)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One of the few computations at once, after WAIT_SECONDS at most; ApiError 503 beyond."""
        if not self.places.acquire(blocking=False):
            raise unavailable(BUSY)
        try:
            if not self.slots.acquire(timeout=WAIT_SECONDS):
                raise unavailable(BUSY)
            try:
                yield
            finally:
                self.slots.release()
        finally:
            self.places.release()


BUSY = "Too many passwords are being checked: try again soon. This attempt does not count."
