"""What is told of a request when it is over, and of failed logins in syslog."""

from __future__ import annotations

import ipaddress
import json
import logging
import logging.handlers
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

log = logging.getLogger("cdr_api")
request_log = logging.getLogger("cdr_api.requests")


def read_address(text: str) -> str | None:
    """The IP address of a text as logs show it; None if it is none.

    Without a scope id (fe80::1%eth0): that may be any text, also one that passes for
    another line, and a proxy that is trusted may pass on what a client wrote.
    """
    try:
        return str(ipaddress.ip_address(text.partition("%")[0]))
    except ValueError:
        return None


class Progress(Protocol):
    """How far an answer has come."""

    rows: int
    complete: bool


class Observer(Protocol):
    """Who counts what happens, such as the metrics."""

    def request(self, facts: Mapping[str, Any]) -> None:
        """A request is over; facts are those of RequestLog.close."""

    def fallback(self, statement: str, reason: str) -> None:
        """A statement failed when it was run as a prepared one, and is answered by a stream."""


@dataclass
class Entry:
    """A request's log entry. Nothing that a client could write anything into."""

    request_id: str
    address: str | None  # the client's, if it is one
    method: str
    route: str
    begun: float = field(default_factory=time.monotonic)
    account_id: int | None = None
    rows: int = 0  # calls sent otherwise than by the stream
    stream: Progress | None = None


class RequestLog:
    """Writes the entries in a style of CDR_API_LOG: text, json or off."""

    def __init__(self, style: str) -> None:
        self.style = style
        self.observers: list[Observer] = []

    def close(self, entry: Entry, status: int, sent: int) -> None:
        """Logs a request whose last byte is sent, or that broke off; tells the observers.

        sent is in bytes, seconds last until the client has taken the answer.
        """
        stream = entry.stream
        facts = {
            "request_id": entry.request_id,
            "address": entry.address,
            "account": entry.account_id,
            "method": entry.method,
            "route": entry.route,
            "status": status,
            "rows": stream.rows if stream else entry.rows,
            "bytes": sent,
            "seconds": round(time.monotonic() - entry.begun, 6),
            "broken": bool(stream and not stream.complete and entry.method != "HEAD"),
        }
        if self.style == "json":
            request_log.info(json.dumps(facts))
        elif self.style == "text":
            shown = (f"{name}={'-' if value in (None, '') else value}" for name, value in facts.items())
            request_log.info(" ".join(shown))
        for observer in self.observers:
            observer.request(facts)


class AuthLog(logging.handlers.SysLogHandler):
    """Failed logins in syslog, as FusionPBX writes its own and its fail2ban jail expects them (FACTS)."""

    ident = "FusionPBX: "

    def __init__(self, path: str) -> None:
        super().__init__(path, self.LOG_AUTH)

    def report(self, address: str, name: str) -> None:
        """One line, if the address is one. Nothing that comes from outside can pass for a line, or for an address."""
        if not (shown_address := read_address(address)):
            return
        shown = re.sub(r"[^A-Za-z0-9@._+-]", "_", name[:100])
        line = {"msg": f"[{shown_address}] authentication failed for {shown}", "levelno": logging.WARNING}
        self.handle(logging.makeLogRecord(line | {"levelname": "WARNING"}))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the library's name)
        log.warning("syslog (CDR_API_SYSLOG) does not take messages at %s: %s", self.address, record.getMessage())
