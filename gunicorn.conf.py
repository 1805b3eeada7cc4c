"""How gunicorn serves the application; it finds this file without a flag.

The CDR_API_* environment is checked before any worker starts, so that a wrong
setting ends the start with one line.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import gunicorn.http.parser
import gunicorn.util
import gunicorn.workers.gthread
import psycopg
from gunicorn.http.errors import NoMoreData
from gunicorn.http.unreader import SocketUnreader

for name in [name for name in sys.modules if name.split(".")[0] == "cdr" or name.startswith("cdr_")]:
    del sys.modules[name]  # a reload takes the new code, which this process would keep otherwise

import cdr.rates  # noqa: E402 (its buckets are made before the fork: workers share them)
import cdr.service  # noqa: E402
from cdr.errors import envelope  # noqa: E402 (see above)
from cdr.remedies import explain_failure  # noqa: E402
from cdr.requestlog import request_log  # noqa: E402
from cdr.settings import SettingError, Settings  # noqa: E402

if TYPE_CHECKING:
    from gunicorn.arbiter import Arbiter
    from gunicorn.workers.base import Worker

try:
    settings = Settings.from_environ(os.environ)
except SettingError as error:
    raise SystemExit(str(error)) from None

wsgi_app = "wsgi:app"

# A sync worker would be killed in the middle of a long answer; gthread beats
# its heart beside its threads.
worker_class = "gthread"
workers = settings.workers
# More than there are connections: while an account waits for its own requests to end,
# or all wait for a connection, others are heard, and 503 is said to who has waited too long.
threads = 4 * settings.threads + 4
timeout = 60
graceful_timeout = 30
keepalive = 15
limit_request_line = 8190
control_socket_disable = True
# No header is believed here, not even by a unix socket; that is CDR_API_PROXIES' part.
forwarded_allow_ips = ""
forwarder_headers = ""
secure_scheme_headers: dict[str, str] = {}


def when_ready(server: Arbiter) -> None:
    """Finds the time zone of the calls' database, for all workers.

    Says once, in one line, if a database cannot be reached. Serving goes on: it may come back.
    """
    dsns = {
        "CDR_API_ACCOUNTS_DSN": settings.accounts_dsn,
        "CDR_API_DSN": settings.dsn,
        "CDR_API_CALLS_DSN": settings.calls_dsn,
    }
    for variable, dsn in dsns.items():
        try:
            if dsn:
                with psycopg.connect(dsn, connect_timeout=5) as connection:
                    if variable != "CDR_API_ACCOUNTS_DSN":
                        cdr.service.zone_at_start = connection.info.parameter_status("TimeZone") or ""
        except psycopg.Error as error:
            reason = explain_failure(error, dsn)
            server.log.error(
                "%s: no connection (%s); every request is answered 503 until there is one", variable, reason
            )


on_reload = when_ready


def worker_exit(_server: Arbiter, worker: Worker) -> None:
    """Ends the pools' threads while they still can be: at its end Python 3.13 waits 5 s for each of them."""
    app = getattr(worker, "wsgi", None)
    if app and "cdr_api" in app.extensions:  # the benchmark has others
        app.extensions["cdr_api"].close()


def write_error(client: socket.socket, status: int, reason: str, _message: str) -> None:
    """gunicorn's answer to what is not HTTP or too long for it, in our envelope.

    The message is left out: it quotes the request, where a token or a password may stand.
    """
    if status not in (414, 431, 500):  # it also has 403, 417, 501, which our clients do not know
        status, reason = 400, "Bad Request"
    body = envelope(f"{reason}: the request could not be read.").encode()
    head = (
        f"HTTP/1.1 {status} {reason}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
    )
    gunicorn.util.write_nonblock(client, head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)


def hide_request(record: logging.LogRecord) -> bool:
    """gunicorn logs what is not HTTP, where a token or a password may stand: its kind is enough."""
    if isinstance(record.msg, str) and record.msg.startswith("Invalid request from ip="):
        record.msg = record.msg.partition("'")[0]
    return True


logging.getLogger("gunicorn.error").addFilter(hide_request)
gunicorn.util.write_error = write_error


class TimedUnreader(SocketUnreader):  # type: ignore[misc]
    """Reads a request, all of which must have arrived within CDR_API_CLIENT_TIMEOUT.

    gunicorn bounds no read, and a socket's own time-out only the single one: whoever
    sends a byte now and then would hold a thread for ever.
    """

    deadline: float | None = None  # by time.monotonic(), from the first read of a request on

    def chunk(self, size_hint: int | None = None) -> bytes:
        if self.deadline is None:
            self.deadline = time.monotonic() + settings.client_timeout / 1000
        before = self.sock.gettimeout()
        self.sock.settimeout(max(self.deadline - time.monotonic(), 0.001))
        try:
            found: bytes = super().chunk(size_hint)
        except TimeoutError:
            raise NoMoreData from None  # which gunicorn takes for a client that is gone
        finally:
            with suppress(OSError):
                self.sock.settimeout(before)
        return found


class PatientConnection(gunicorn.workers.gthread.TConn):  # type: ignore[misc]
    """Holds a thread for its first byte no longer than the byte usually takes; then the worker's main thread waits.

    gunicorn's own 5 seconds let a few connections that ask nothing hold all threads.
    """

    def wait_for_data(self, timeout: float) -> bool:
        return bool(super().wait_for_data(min(timeout, 0.05)))

    def init(self) -> None:
        """Comes before each request of the connection, whose time begins with its first byte."""
        super().init()
        unreader = getattr(self.parser, "unreader", None)
        if isinstance(unreader, TimedUnreader):
            unreader.deadline = None


gunicorn.http.parser.SocketUnreader = TimedUnreader
gunicorn.workers.gthread.TConn = PatientConnection


def post_request(_worker: Worker, _request: Any, environ: dict[str, Any], response: Any) -> None:
    """When the client has the whole answer, or has not got it: the request's line, and its metrics."""
    if response and "cdr_api.entry" in environ:
        environ["cdr_api.request_log"].close(environ["cdr_api.entry"], response.status_code or 0, response.sent)


if settings.metrics == "on":
    # Before prometheus_client is loaded; a reload comes by here again.
    folder = os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", tempfile.mkdtemp(prefix="cdr-api-metrics-"))
    from prometheus_client.multiprocess import mark_process_dead

    def child_exit(_server: Arbiter, worker: Worker) -> None:
        mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]

    def on_exit(_server: Arbiter) -> None:
        shutil.rmtree(folder, ignore_errors=True)


# One line for each request, without a time: the journal has its own.
handler = logging.StreamHandler(sys.stdout)
handler.setFormatter(logging.Formatter("%(message)s"))
request_log.handlers = [handler]
request_log.propagate = False
request_log.setLevel(logging.INFO)


class OneLine(logging.Formatter):
    """libpq's messages have several lines; a line of the log is a message."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.exc_info else " ".join(text.split())


messages = logging.StreamHandler()
messages.setFormatter(OneLine("[%(asctime)s] [%(process)d] [%(levelname)s] %(name)s: %(message)s"))
logging.basicConfig(level=logging.WARNING, handlers=[messages])
