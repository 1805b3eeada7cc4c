"""Who takes an answer: whether the client is still there, and how long it may keep the service waiting."""

from __future__ import annotations

import errno
import logging
import select
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from cdr.errors import ApiError, unavailable
from cdr.settings import Settings

log = logging.getLogger("cdr_api")

# An answer that takes longer, until its last row is read, is a long one.
SHORT_SECONDS = 1.0
GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


@dataclass(frozen=True)
class Client:
    """Who takes an answer; the socket only where the server tells it."""

    address: str | None = None
    socket: socket.socket | None = None

    def is_gone(self) -> bool:
        """Whether the client has closed the connection: nobody is going to read the answer.

        One that has only closed its sending side cannot be told from that; nginx does not tell them apart either.
        """
        if not self.socket:
            return False
        poll = select.poll()
        poll.register(self.socket, select.POLLRDHUP)
        return any(event & GONE for _, event in poll.poll(0))


class ClientGoneError(ApiError):
    """The client went away before its answer was made; the status is the one that nginx logs for this."""

    def __init__(self) -> None:
        super().__init__(499, "The client has closed the connection.")


class Shares:
    """How many connections of a worker each account has, apart from those of long answers.

    Without a bound one account's slow statements would take all of them, each for the
    second that it may be a short answer.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self.most = most
        self.seconds = seconds  # that a request waits for a share
        self.held: Counter[int] = Counter()  # by account
        self.changed = threading.Condition()

    def take(self, account_id: int) -> None:
        """Waits until the account has a share left; ApiError 429 if that takes too long."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.held[account_id] < self.most, self.seconds):
                message = "This account has too many requests under way: wait for some of them to end."
                raise ApiError(429, message, headers={"Retry-After": "5"})
            self.held[account_id] += 1

    def give_back(self, account_id: int) -> None:
        with self.changed:
            self.held[account_id] -= 1
            if not self.held[account_id]:
                del self.held[account_id]
            self.changed.notify_all()


class Watch:
    """What is looked at while PostgreSQL works for an answer: whether its client is there, and whether it is long.

    A long answer needs one of its worker's slots, whatever it is waiting for, so
    that some connections are left for short ones. Without a slot it ends: ApiError 503.
    """

    def __init__(self, slots: threading.BoundedSemaphore, client: Client, give_share_back: Callable[[], None]) -> None:
        self.slots = slots
        self.client = client
        self.shared: Callable[[], None] | None = give_share_back  # until it is a long answer
        self.begun = time.monotonic()
        self.has_slot = False

    def __call__(self) -> None:
        """Now and then, while nothing comes. Raises ApiError: 499 if the client is gone, 503 without a slot."""
        if self.client.is_gone():
            raise ClientGoneError
        if time.monotonic() - self.begun > SHORT_SECONDS:
            self.take_slot()

    def take_slot(self) -> None:
        """Makes it a long answer, if it is not one already; ApiError 503 if there are enough of them."""
        if not self.has_slot and not self.slots.acquire(blocking=False):
            raise unavailable("Too many long answers are under way: try again soon.")
        self.has_slot = True
        self.release_share()

    def release_share(self) -> None:
        give_back, self.shared = self.shared, None
        if give_back:
            give_back()

    def release(self) -> None:
        self.release_share()
        if self.has_slot:
            self.has_slot = False
            self.slots.release()


class ClientBudget:
    """The time that the client of a long answer may take: it is cut off when it takes too long.

    In all it may keep the service waiting for CDR_API_CLIENT_TIMEOUT, and as
    long again as CDR_API_MIN_RATE allows for the bytes that it took.
    """

    def __init__(self, settings: Settings, client: Client) -> None:
        self.client = client
        self.min_rate = settings.min_rate
        self.seconds = settings.client_timeout / 1000
        self.since = time.monotonic()
        self.poll = select.poll()
        if client.socket:
            self.poll.register(client.socket, select.POLLOUT)

    def hand(self, chunk: bytes) -> bytes:
        """Passes a chunk on, whose time begins now."""
        self.seconds += len(chunk) / self.min_rate
        self.since = time.monotonic()
        return chunk

    def wait(self) -> None:
        """Waits until the client has room for another chunk.

        Raises ConnectionResetError, the connection being cut, if it takes too long.
        """
        left = self.seconds - (time.monotonic() - self.since)
        if self.client.socket and not self.poll.poll(max(left, 0) * 1000):
            log.warning("%s takes its answer too slowly and was cut off", self.client.address or "a client")
            self.cut()
        self.seconds -= time.monotonic() - self.since

    def cut(self) -> NoReturn:
        """Ends the connection without HTTP's last chunk; gunicorn passes over this error without a word."""
        if self.client.socket:
            with suppress(OSError):
                self.client.socket.shutdown(socket.SHUT_RDWR)
        raise ConnectionResetError(errno.ECONNRESET, "the answer was cut off")
