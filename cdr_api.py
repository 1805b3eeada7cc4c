"""CDR API: the calls of a FusionPBX, as JSON, for a billing system.

Read this module from top to bottom; each part needs only those above it:

    Settings         the CDR_API_* environment
    SQL              the statements of queries.sql by name
    Errors           the one envelope for everything that is not 2xx
    Database         the pools of a worker
    Requests         the line in the log that each of them leaves
    Parameters       what a request says, parsed and refused in one place
    Time ranges      from and to, in the service's time zone
    Authentication   bearer tokens, and which domain an account may read
    Guessing         failed logins: slowed down, and told to syslog
    Accounts         register, login, logout
    Stream           rows of COPY as JSON, NDJSON or CSV, batch by batch
    Calls            calls, call_range, domains
    Feed             call_feed: each call once, in the order of becoming visible
    Totals           call_totals: counts, sums and digests to compare with
    Lookup           call_lookup: which calls of a list exist
    Concurrency      concurrent_calls_by_domain, active_calls_by_domain
    Health           health
    Description      openapi.json: all of these routes, for programs
    Pages            docs and usage: the static files of pages/
    Application      create_app

A request walks one way: parameters, account and domain, one named statement,
COPY stream (or few calls at once), response. "FACTS" in a comment stands for
what FusionPBX is known to store, collected in demo/README.md.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import ipaddress
import json
import logging
import logging.handlers
import os
import re
import secrets
import select
import socket
import threading
import time
import zoneinfo
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import parse_qsl, quote, urlencode
from uuid import UUID, uuid4

import itsdangerous
import psycopg
from flask import Blueprint, Flask, Response, current_app, g, request
from flask_httpauth import HTTPTokenAuth
from gunicorn.http.errors import ParseException
from psycopg import conninfo, generators, pq, sql
from psycopg.abc import RV, PQGen
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool, PoolTimeout
from werkzeug.datastructures import MIMEAccept
from werkzeug.exceptions import ClientDisconnected, HTTPException, NotFound, RequestEntityTooLarge
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.security import check_password_hash, generate_password_hash

__version__ = "0.1.0"

log = logging.getLogger("cdr_api")

# Settings ---------------------------------------------------------------------


class SettingError(Exception):
    """A CDR_API_* variable is wrong: its name, its fault and what is allowed."""


def read_dsn(text: str) -> str:
    try:
        conninfo.conninfo_to_dict(text)
    except psycopg.ProgrammingError as error:
        raise ValueError(f"is not a libpq connection string or URI ({str(error).strip()})") from None
    return text


def read_choice(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return read


def read_integer(lowest: int, highest: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text) or not lowest <= int(text) <= highest:
            raise ValueError(f"must be a whole number from {lowest} to {highest}")
        return int(text)

    return read


def read_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def read_zone(text: str) -> str:
    try:
        zoneinfo.ZoneInfo(text)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError("must be the name of a time zone such as Europe/Berlin or UTC") from None
    return text


def read_milliseconds(text: str) -> int:
    units = {"": 1000, "ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000}
    match = re.fullmatch(r"([0-9]{1,9}) ?(ms|s|min|h|)", text)
    if not match or not 1 <= int(match[1]) * units[match[2]] <= 2**31 - 1:
        raise ValueError("must be a time such as 30s, 500ms, 5min or 1h (a bare number means seconds), not zero")
    return int(match[1]) * units[match[2]]


def read_syslog(text: str) -> str:
    if text != "off" and not text.startswith("/"):
        raise ValueError("must be the path of syslog's socket, such as /dev/log, or off")
    return text


def read_origins(text: str) -> tuple[str, ...]:
    origins = read_names(text)
    if not all(re.fullmatch(r"https?://[a-z0-9.:\[\]-]+", origin) for origin in origins):
        raise ValueError("must be origins such as https://billing.example.com, with commas between them")
    return origins


@dataclass(frozen=True)
class Settings:
    """The CDR_API_* environment, checked. Times are in milliseconds."""

    dsn: str = field(metadata={"read": read_dsn})
    calls_dsn: str = field(default="", metadata={"read": read_dsn})
    registration: str = field(default="open", metadata={"read": read_choice("open", "closed")})
    register_domains: tuple[str, ...] = field(default=(), metadata={"read": read_names})
    token_days: int = field(default=365, metadata={"read": read_integer(0, 36500)})
    timezone: str = field(default="", metadata={"read": read_zone})
    proxies: int = field(default=0, metadata={"read": read_integer(0, 10)})
    statement_timeout: int = field(default=3_600_000, metadata={"read": read_milliseconds})
    pool_timeout: int = field(default=5_000, metadata={"read": read_milliseconds})
    workers: int = field(default=os.cpu_count() or 1, metadata={"read": read_integer(1, 256)})
    lookback_days: int = field(default=45, metadata={"read": read_integer(1, 3650)})
    threads: int = field(default=8, metadata={"read": read_integer(1, 256)})
    account_streams: int = field(default=8, metadata={"read": read_integer(1, 256)})
    client_timeout: int = field(default=60_000, metadata={"read": read_milliseconds})
    min_rate: int = field(default=16_384, metadata={"read": read_integer(1, 10**9)})  # bytes per second
    syslog: str = field(default="/dev/log", metadata={"read": read_syslog})
    log: str = field(default="text", metadata={"read": read_choice("text", "json", "off")})
    metrics: str = field(default="off", metadata={"read": read_choice("on", "off")})
    pages: str = field(default="on", metadata={"read": read_choice("on", "off")})
    cors_origins: tuple[str, ...] = field(default=(), metadata={"read": read_origins})

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """The settings of an environment; an empty variable counts as unset.

        Raises SettingError for the first wrong one. A CDR_API_* variable that
        is no setting is logged, since it may be a slip of the pen.
        """
        readers = {
            f"CDR_API_{name.upper()}": (name, f.metadata["read"]) for name, f in cls.__dataclass_fields__.items()
        }
        for variable in unknown_settings(environ):
            log.warning("%s is not a setting of this service and has no effect", variable)
        values = {}
        for variable, (name, read) in readers.items():
            if text := environ.get(variable, "").strip():
                try:
                    values[name] = read(text)
                except ValueError as error:
                    raise SettingError(f"{variable} {error}") from None
        if "dsn" not in values:
            raise SettingError("CDR_API_DSN is not set: it must be the libpq connection string of FusionPBX's database")
        return cls(**values)


def unknown_settings(environ: Mapping[str, str]) -> list[str]:
    """The variables that look like settings and are none."""
    known = {f"CDR_API_{name.upper()}" for name in Settings.__dataclass_fields__}
    return sorted(name for name in environ if name.startswith("CDR_API_") and name not in known)


# SQL --------------------------------------------------------------------------


def load_statements(path: Path) -> dict[str, sql.SQL]:
    """The statements of a file by name; the file's head explains its format."""
    statements = {}
    for part in re.split(r"^-- name: ", path.read_text("utf-8"), flags=re.MULTILINE)[1:]:
        name, _, text = part.partition("\n")
        lines = [line for line in text.splitlines() if line and not line.startswith("--")]
        statements[name.strip()] = sql.SQL("\n".join(lines).removesuffix(";"))
    return statements


STATEMENTS = load_statements(Path(__file__).with_name("queries.sql"))


# Errors -----------------------------------------------------------------------


class ApiError(Exception):
    """An answer that is not 2xx: status, one sentence, details, more headers."""

    def __init__(
        self, status: int, message: str, data: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.data = data or {}
        self.headers = headers or {}


def envelope(message: str, data: Mapping[str, Any] | None = None) -> str:
    """The body of every answer that is not 2xx; data is a string that holds JSON."""
    return json.dumps({"message": message, "success": False, "data": json.dumps(data or {})}) + "\n"


def answer_api_error(error: ApiError) -> Response:
    return Response(envelope(error.message, error.data), error.status, error.headers, mimetype="application/json")


def answer_http_exception(error: HTTPException) -> Response:
    """The framework's own errors (404, 405, 413, …), their headers kept."""
    headers = {name: value for name, value in error.get_headers() if name not in ("Content-Type", "Content-Length")}
    message = error.description or error.name
    return answer_api_error(ApiError(error.code or 500, message, headers=headers))


NOT_SET_UP = (
    psycopg.errors.UndefinedTable,
    psycopg.errors.UndefinedColumn,
    psycopg.errors.InvalidSchemaName,
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.InvalidParameterValue,  # a time zone that the server does not know
)
AWAY = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction)


def answer_database_error(error: psycopg.Error) -> Response:
    # QueryCanceled first: it is an OperationalError too.
    if isinstance(error, psycopg.errors.QueryCanceled):
        return answer_api_error(ApiError(504, "The database took too long: ask for a smaller range, or for pages."))
    log.error("database: %s", str(error).strip())
    if isinstance(error, NOT_SET_UP):
        reason = error.diag.message_primary or "not set up"
        message = f"The database is not set up for this service ({reason}): run flask check."
        return answer_api_error(ApiError(503, message, headers={"Retry-After": "60"}))
    if isinstance(error, AWAY):
        message = "The database is away or all its connections are busy: try again soon."
        return answer_api_error(ApiError(503, message, headers={"Retry-After": "5"}))
    if isinstance(error, psycopg.DataError):
        message = "The database holds a value that cannot be read: its log and ours say which."
        return answer_api_error(ApiError(500, message))
    return answer_unexpected(error)


def answer_unexpected(error: Exception) -> Response:
    log.error("unexpected error", exc_info=error)
    return answer_api_error(ApiError(500, "Something went wrong in this service; its log says what."))


# Database ---------------------------------------------------------------------


CONNECTION_DEFAULTS = {
    "application_name": "cdr_api",
    "connect_timeout": "5",  # seconds, as are the next two: a dead host is noticed within a minute
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
}


# How long the service waits for a statement that looks up a few rows, in seconds.
PATIENCE = 10.0
# How long a request waits for a server that is known to be away, in seconds.
BRIEFLY = 0.1
# So many statements are prepared on a connection: each takes PostgreSQL half a megabyte.
MOST_PREPARED = 10


Connection = psycopg.Connection[dict[str, Any]]


class PatientConnection(Connection):
    """A connection that gives up a server which says nothing for patience seconds.

    TCP notices a host that is gone, but not a server process that hangs.
    """

    patience = PATIENCE
    may_be_long = True  # whether the account has room for another long answer
    indexed = False  # whether an index brings a domain's calls in their order
    # The name of each statement that is prepared on it, by its text; None: there must be none.
    prepared: dict[str, str] | None = None

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        try:
            return super().wait(gen, interval, timeout or self.patience)
        except psycopg.errors._WaitTimeout:  # noqa: SLF001 (psycopg has no public name for it)
            self.close()
            raise psycopg.OperationalError("the server does not answer") from None


def is_alive(connection: Connection) -> bool:
    """Whether an idle connection still has its server, without a round trip.

    An idle server has nothing to say: bytes that wait, or the end of the
    stream, are its farewell.
    """
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return not poll.poll(0)


class Database:
    """The connections of one worker to one server, opened at first use.

    At first use and not before, so that no connection is shared over a fork.
    Nothing is set for longer than a transaction, and statements are prepared on
    the server only where it is ours alone, so that PgBouncer may pool transactions.
    """

    def __init__(self, dsn: str, settings: Settings) -> None:
        given = conninfo.conninfo_to_dict(dsn)
        defaults = {name: value for name, value in CONNECTION_DEFAULTS.items() if name not in given}
        self.timeout = settings.pool_timeout / 1000
        self.reachable = True
        self.pool: ConnectionPool[PatientConnection] = ConnectionPool(
            conninfo.make_conninfo(dsn, **defaults),
            connection_class=PatientConnection,
            kwargs={
                "autocommit": True,
                "prepare_threshold": None,
                "row_factory": dict_row,
                "client_encoding": "UTF8",
            },
            min_size=0,
            max_size=settings.threads,
            reconnect_timeout=0,
            configure=self.examine,
            reconnect_failed=lambda _pool: self.note(reachable=False),
            open=False,
        )

    def note(self, *, reachable: bool) -> None:
        """Keeps in mind how the last attempt to connect ended."""
        self.reachable = reachable

    def examine(self, connection: PatientConnection) -> None:
        """Looks for the index, and lets statements be prepared on a connection whose server process is its own.

        A PgBouncer tells a number of its own as that of the process.
        """
        self.note(reachable=True)
        found = run(connection, "examine_session")[0]
        connection.indexed = found["indexed"]
        connection.prepared = {} if found["pid"] == connection.pgconn.backend_pid else None

    @contextmanager
    def connection(self) -> Iterator[PatientConnection]:
        """A checked connection in autocommit mode.

        Raises psycopg.OperationalError when none is to be had in time.
        """
        connection = self.borrow()
        try:
            yield connection
        finally:
            self.give_back(connection)

    def borrow(self) -> PatientConnection:
        """A checked connection, to be handed back by give_back."""
        self.pool.open()
        while not is_alive(connection := self.take()):
            connection.close()
            self.pool.putconn(connection)  # which makes a new one
        return connection

    def take(self) -> PatientConnection:
        """A connection of the pool; while the server is away the wait is short.

        In pieces, since a failure to connect does not end the pool's wait.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                return self.pool.getconn(timeout=BRIEFLY)
            except PoolTimeout:
                if not self.reachable or time.monotonic() >= deadline:
                    raise

    def give_back(self, connection: PatientConnection) -> None:
        """Takes a connection in any state: cancels what runs on it, rolls back."""
        connection.patience = PATIENCE
        end_transaction(connection)
        self.pool.putconn(connection)

    def rows(self, statement: str, **values: Any) -> list[dict[str, Any]]:
        """The rows of one statement of queries.sql, run by itself."""
        with self.connection() as connection:
            return run(connection, statement, **values)


def run(connection: Connection, statement: str, **values: Any) -> list[dict[str, Any]]:
    """The rows of a statement of queries.sql on a connection in hand."""
    cursor = connection.execute(STATEMENTS[statement], values)
    return cursor.fetchall() if cursor.rownumber is not None else []


def prepare(connection: PatientConnection, prepared: dict[str, str], query: str) -> str:
    """The name of a query with $1, $2, … that the connection has prepared then.

    psycopg is not told: of its own prepared statements it leaves behind those that fail.
    """
    if query not in prepared:
        if len(prepared) >= MOST_PREPARED:
            oldest = next(iter(prepared))
            connection.execute(STATEMENTS["deallocate"].format(name=sql.Identifier(prepared[oldest])))
            del prepared[oldest]
        name = "cdr_api_" + hashlib.sha256(query.encode()).hexdigest()[:16]
        connection.execute(STATEMENTS["prepare"].format(name=sql.Identifier(name), query=sql.SQL(query)))
        prepared[query] = name
    return prepared[query]


def number_marks(query: str, names: Iterable[str], fixed: Mapping[str, str] | None = None) -> str:
    """A query with $1, $2, … for its parameters, but for those whose text is fixed."""
    numbers = {name: f"${n}" for n, name in enumerate(names, 1)}
    return str(query % {**numbers, **(fixed or {})})


class Service:
    """What a worker holds: its settings, its pools, room for long answers, the signing key."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Two connections are kept for short answers, as far as there are so many.
        self.room = threading.BoundedSemaphore(max(1, settings.threads - 2))
        self.auth_log = AuthLog(settings.syslog) if settings.syslog != "off" else None
        self.notices: dict[str, float] = {}  # when each was last written down, by time.monotonic()
        self.accounts = Database(settings.dsn, settings)
        self.calls = Database(settings.calls_dsn, settings) if settings.calls_dsn else self.accounts

    @functools.cached_property
    def time_zone(self) -> str:
        """The name of the zone that stamps are shown and read in."""
        if self.settings.timezone:
            return self.settings.timezone
        with self.calls.connection() as connection:
            return (connection.pgconn.parameter_status(b"TimeZone") or b"UTC").decode()

    @functools.cached_property
    def secret(self) -> bytes:
        """The key that signs cursors, the same on every worker and machine."""
        if not self.accounts.rows("find_secret", name="cursor"):
            self.accounts.rows("insert_secret", name="cursor", value=secrets.token_bytes(32))
        return bytes(self.accounts.rows("find_secret", name="cursor")[0]["value"])


def service() -> Service:
    found: Service = current_app.extensions["cdr_api"]
    return found


# Requests ---------------------------------------------------------------------

request_log = logging.getLogger("cdr_api.requests")


@dataclass
class Record:
    """What is told of a request when it is over. Nothing that a client could write anything into."""

    request_id: str
    address: str | None  # the client's, if it is one
    route: str
    begun: float  # by time.monotonic()
    account_id: int | None = None
    rows: int = 0  # calls sent otherwise than by the stream
    stream: CallStream | None = None


def record() -> Record:
    found: Record = request.environ["cdr_api.record"]
    return found


def open_record() -> None:
    """Before every request: its id, the client's if it sent a plain one."""
    given = request.headers.get("X-Request-ID", "")
    request_id = given if re.fullmatch(r"[A-Za-z0-9._=+/-]{1,128}", given) else uuid4().hex
    route = request.url_rule.rule if request.url_rule else "-"
    request.environ["cdr_api.record"] = Record(request_id, read_address(), route, time.monotonic())


def read_address() -> str | None:
    """The client's address, if it is known; a trusted proxy may pass on what is none."""
    try:
        return str(ipaddress.ip_address(request.remote_addr or ""))
    except ValueError:
        return None


def show_request_id(response: Response) -> Response:
    response.headers["X-Request-ID"] = record().request_id
    return response


def close_record(environ: Mapping[str, Any], status: int, sent: int, style: str) -> dict[str, Any]:
    """Logs a request whose last byte is sent, or that broke off; gives what it logged.

    gunicorn.conf.py calls it. sent is in bytes, seconds last until the client
    has taken the answer. style is that of CDR_API_LOG.
    """
    found: Record = environ["cdr_api.record"]
    stream, method = found.stream, environ["REQUEST_METHOD"]
    facts = {
        "request_id": found.request_id,
        "address": found.address,
        "account": found.account_id,
        "method": method,
        "route": found.route,
        "status": status,
        "rows": stream.rows if stream else found.rows,
        "bytes": sent,
        "seconds": round(time.monotonic() - found.begun, 6),
        "broken": bool(stream and not stream.complete and method != "HEAD"),
    }
    if style == "json":
        request_log.info(json.dumps(facts))
    elif style == "text":
        request_log.info(" ".join(f"{name}={'-' if value in (None, '') else value}" for name, value in facts.items()))
    return facts


NOTICE_SECONDS = 3600


def notice(name: str, text: str) -> None:
    """Writes down, once an hour, how requests come in that should come in otherwise; flask check tells it."""
    notices, now = service().notices, time.monotonic()
    if now - notices.get(name, -NOTICE_SECONDS) < NOTICE_SECONDS:
        return
    notices[name] = now
    log.warning("%s: %s", name, text)
    with suppress(psycopg.Error):
        service().accounts.rows("upsert_notice", name=name, text=text)


def examine_proxies() -> None:
    """Before every request: whether what stands in front is set up as CDR_API_PROXIES says."""
    forwarded = "X-Forwarded-For" in request.headers
    if forwarded and not service().settings.proxies:
        notice("proxies", "requests come by a proxy, and CDR_API_PROXIES is 0: all clients count as one address")
    if forwarded and request.environ.get("SERVER_PROTOCOL") == "HTTP/1.0":
        notice("HTTP version", "the proxy asks in HTTP/1.0, where a broken answer looks whole: proxy_http_version 1.1;")


# Parameters -------------------------------------------------------------------

Parsers = Mapping[str, Callable[[str], Any]]

SECRETS_IN_QUERY = {"password", "password_confirmation", "token", "access_token", "api_token", "api_key", "key"}


MOST_PARAMETERS = 200


class Faults:
    """What is wrong with a request, by parameter: all of it at once."""

    def __init__(self) -> None:
        self.by_name: dict[str, list[str]] = {}

    def add(self, name: str, fault: str) -> None:
        self.by_name.setdefault(name[:100], []).append(f"{name[:100]} {fault}.")

    def raise_if_any(self) -> None:
        """Raises ApiError 422 that names every fault."""
        if self.by_name:
            sentences = [sentence for faults in self.by_name.values() for sentence in faults]
            raise ApiError(422, " ".join(sentences[:5]), self.by_name)


def refuse(name: str, fault: str) -> NoReturn:
    """Raises ApiError 422 for one parameter."""
    raise ApiError(422, f"{name} {fault}.", {name: [f"{name} {fault}."]})


def parse_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("must not hold a NUL character")
    return text


def parse_uuid(text: str) -> str:
    # UUID() takes more: "+", "_", "0x" and digits of other scripts, which make another UUID.
    if not re.fullmatch(r"\{?[0-9a-f]{8}(-?[0-9a-f]{4}){3}-?[0-9a-f]{12}\}?", text, re.ASCII | re.IGNORECASE):
        raise ValueError("must be a UUID such as 0b9e2f6c-6a53-4c0e-9c5e-0d9c4b3f7a11")
    return str(UUID(text))


def parse_uuids(value: Any) -> list[str]:
    """UUIDs of a JSON list, each once."""
    if not isinstance(value, list) or not 1 <= len(value) <= 10_000:
        raise ValueError("must be a list of 1 to 10,000 UUIDs")
    return list(dict.fromkeys(parse_uuid(check_text(uuid)) for uuid in value))


def parse_flag(text: str) -> bool:
    return read_choice("true", "false")(text) == "true"


def read_pairs(query: bytes) -> list[tuple[str, str]]:
    """The pairs of a query string or form; ApiError 422 unless it is UTF-8."""
    try:
        return parse_qsl(query.decode(), keep_blank_values=True, errors="strict", max_num_fields=MOST_PARAMETERS)
    except UnicodeDecodeError:
        raise ApiError(422, "The parameters are not valid UTF-8.") from None
    except ValueError:
        raise ApiError(422, "There are too many parameters.") from None


def query_pairs() -> list[tuple[str, str]]:
    """Those of the request's query string, which several ask for."""
    if "query_pairs" not in g:
        g.query_pairs = read_pairs(request.query_string)
    found: list[tuple[str, str]] = g.query_pairs
    return found


def read_body() -> list[tuple[str, Any]]:
    """The pairs of a JSON object or a form; 400, 415 or 422 for anything else."""
    try:
        body = request.get_data()
    except (OSError, ParseException, ClientDisconnected):
        raise ApiError(400, "The body is not what its headers say, or did not arrive in time.") from None
    # gunicorn gives what came before the client closed: a part must not pass for the whole.
    if len(body) < (request.content_length or 0):
        raise ApiError(400, "The body is shorter than its Content-Length.")
    # Of a body that does not say its length, werkzeug reads so much and no more.
    if request.content_length is None and len(body) >= current_app.config["MAX_CONTENT_LENGTH"]:
        raise RequestEntityTooLarge
    if not body:
        return []
    if request.mimetype == "multipart/form-data":
        return read_parts()
    if request.mimetype == "application/json":
        return read_json_object(body)
    if request.mimetype == "application/x-www-form-urlencoded":
        return read_pairs(body)
    raise ApiError(415, "The body must be application/json or a form; Content-Type says which.")


def read_parts() -> list[tuple[str, Any]]:
    """The parts of a form, of which some may have no name; ApiError 422 if it cannot be read."""
    pairs = [*request.form.items(multi=True), *request.files.items(multi=True)]
    if not pairs:
        raise ApiError(422, "The form cannot be read.")
    return [(name or "", value) for name, value in pairs]


def read_json_object(body: bytes) -> list[tuple[str, Any]]:
    try:
        # Pairs, not a dict: a key given twice must not win in silence.
        found = json.loads(body.decode(), object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        raise ApiError(422, "The body is not valid JSON in UTF-8.") from None
    if not isinstance(found, tuple):
        raise ApiError(422, "The body must be a JSON object.")
    if len(found) > MOST_PARAMETERS:
        raise ApiError(422, "There are too many parameters.")
    return list(found)


def check_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        raise ValueError("must be a string")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("must be valid Unicode") from None
    if "\ufffd" in value:
        raise ValueError("must be valid UTF-8")
    return value


def parse_pairs(pairs: Iterable[tuple[str, Any]], parsers: Parsers, required: Collection[str]) -> dict[str, Any]:
    """The values by name, parsed; None for what was not given.

    Raises ApiError 422 naming every parameter that is unknown, given twice,
    missing or wrong.
    """
    faults = Faults()
    given: dict[str, Any] = {}
    for name, value in pairs:
        if name not in parsers:
            faults.add(name, "is not a parameter of this route")
        elif name in given:
            faults.add(name, "is given twice")
        given[name] = value
    values: dict[str, Any] = dict.fromkeys(parsers)
    for name, parse in parsers.items():
        try:
            if name in given:
                value = given[name]
                values[name] = parse(value if parse is parse_uuids else parse_text(check_text(value)))
            if name in required and values[name] in (None, ""):
                raise ValueError("is required")
        except ValueError as error:
            faults.add(name, str(error))
    faults.raise_if_any()
    return values


def read_query(parsers: Parsers, required: Collection[str] = ()) -> dict[str, Any]:
    return parse_pairs(query_pairs(), parsers, required)


def refuse_secrets_in_query() -> None:
    """Before every request: a query string ends up in logs and histories."""
    for name, _ in query_pairs():
        if name.lower() in SECRETS_IN_QUERY:
            where = "the body of a POST" if name.lower().startswith("password") else "the header Authorization: Bearer"
            refuse(name, f"must not stand in the URL, which proxies and servers log; it belongs in {where}")


# Time ranges ------------------------------------------------------------------

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
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        message = "The database's time zone is not a known one: set CDR_API_TIMEZONE."
        raise ApiError(503, message, headers={"Retry-After": "60"}) from None


def read_range(first: Moment, last: Moment, zone_name: str) -> tuple[datetime, datetime]:
    """The instants [from, to) of a range; ApiError 422 if it is the wrong way round."""
    zone = UTC if first.start.tzinfo and last.start.tzinfo else find_zone(zone_name)
    start, end = find_edge(first, first.first, zone), find_edge(last, last.end, zone)
    # A range within an hour that the clock skips is empty, not the wrong way round.
    local = first.start.tzinfo is None and last.start.tzinfo is None
    if start > end or (start == end and not (local and first.start <= last.start)):
        refuse("from", "must not be after to")
    return start, end


# Authentication ---------------------------------------------------------------

tokens = HTTPTokenAuth(scheme="Bearer")

UNAUTHENTICATED = {"WWW-Authenticate": "Bearer"}


@dataclass(frozen=True)
class Account:
    """Who asks: the account of the presented token.

    With it, in one round trip, what read_domains wants to know of the domain
    that the request names.
    """

    account_id: int
    token_id: int
    all_domains: bool
    domains: int = 0
    granted: int = 0
    domain_uuids: list[str] | None = None
    other_uuids: list[str] | None = None


def digest_token(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


@tokens.verify_token
def verify_token(token: str) -> Account | None:
    """The account of a live token, or None."""
    found = find_token(digest_token(token), dict(query_pairs()).get("domain_name", ""))
    if not found:
        if token:
            report_failure("token")
        return None
    record().account_id = found["account_id"]
    if found.pop("stale"):
        touch_token(found["token_id"])
    return Account(**found)


def find_token(digest: bytes, domain_name: str) -> dict[str, Any] | None:
    """What is known of a live token; and of a domain, unless the name is empty."""
    values = {"digest": b"\\x" + digest.hex().encode()}
    if domain_name and "\0" not in domain_name:  # else it will be refused
        values["domain_name"] = domain_name.encode()
    query = compose_authenticate(for_domain="domain_name" in values)
    with service().accounts.connection() as connection:
        if connection.prepared is None:
            row = connection.execute(query, {"digest": digest, "domain_name": domain_name}).fetchone()
            return json.loads(row["found"]) if row else None
        # Not by EXECUTE, to which a table that was being rewritten would look empty.
        name = prepare(connection, connection.prepared, number_marks(query, values))
        connection.pgconn.send_query_prepared(name.encode(), list(values.values()))
        result = check_results(connection.wait(generators.execute(connection.pgconn)))
        return json.loads(result.get_value(0, 0) or b"null") if result.ntuples else None


@functools.cache
def compose_authenticate(*, for_domain: bool) -> str:
    """The statement that find_token runs."""
    query: sql.Composable = STATEMENTS["authenticate"]
    if for_domain:
        query = STATEMENTS["authenticate_for_domain"].format(authenticate=query)
    return STATEMENTS["as_json"].format(query=query).as_string()


def touch_token(token_id: int) -> None:
    """Notes the token's use. Reading calls goes on where this cannot be written."""
    try:
        service().accounts.rows("touch_token", token_id=token_id)
    except psycopg.Error as error:
        log.warning("the use of token %s was not noted: %s", token_id, str(error).strip())


@tokens.error_handler
def answer_unauthenticated(_status: int) -> Response:
    message = "A valid bearer token is needed: send the header Authorization: Bearer and the token."
    return answer_api_error(ApiError(401, message, headers=UNAUTHENTICATED))


def current_account() -> Account:
    account: Account = tokens.current_user()
    return account


def read_domains(domain_name: str | None) -> dict[str, Any]:
    """The one place that decides which domains a request may read.

    One by its name, or (None) all of the account; as the values one_domain, domain_name,
    domain_names, domain_uuids and other_uuids of matching_calls (queries.sql).
    Raises ApiError 403, the same for a foreign domain and for none; 404 only
    for accounts that may read all. FusionPBX does not keep names unique
    (FACTS): a name is readable when every domain that bears it is.
    """
    account = current_account()
    if domain_name is None:
        values = {"account_id": account.account_id, "all_domains": account.all_domains}
        (row,) = service().accounts.rows("find_domains", **values)
        return {"one_domain": False, "domain_name": None} | {name: value or [] for name, value in row.items()}
    if account.all_domains and not account.domains:
        raise ApiError(404, "There is no such domain.")
    if not account.all_domains and not 0 < account.domains == account.granted:
        raise ApiError(403, "This account may not read this domain.")
    uuids = {"domain_uuids": account.domain_uuids or [], "other_uuids": account.other_uuids or []}
    return {"one_domain": True, "domain_name": domain_name, "domain_names": [domain_name]} | uuids


# Guessing ---------------------------------------------------------------------


class AuthLog(logging.handlers.SysLogHandler):
    """Failed logins in syslog, as FusionPBX writes its own and its fail2ban jail expects them (FACTS)."""

    ident = "FusionPBX: "

    def __init__(self, path: str) -> None:
        super().__init__(path, self.LOG_AUTH)

    def report(self, address: str, name: str) -> None:
        """One line. The name comes from outside: nothing in it can pass for a line, or for an address."""
        shown = re.sub(r"[^A-Za-z0-9@._+-]", "_", name[:100])
        line = {"msg": f"[{address}] authentication failed for {shown}", "levelno": logging.WARNING}
        self.handle(logging.makeLogRecord(line | {"levelname": "WARNING"}))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the library's name)
        log.warning("syslog (CDR_API_SYSLOG) is not to be had at %s: %s", self.address, record.getMessage())


def report_failure(name: str) -> None:
    """Tells syslog of a login or token that was wrong, if the client's address is known."""
    auth_log, address = service().auth_log, record().address
    if auth_log and address:
        auth_log.report(address, name)


def name_network(address: str) -> str:
    """What stands for one client: an IPv4 address, or the /64 that an IPv6 address lies in."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if found.version == 6 and found.ipv4_mapped:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64 if found.version == 6 else 32), strict=False))


@dataclass(frozen=True)
class Attempt:
    """One login: counted as failed, for its account and for its address, before it is made.

    Before, so that of many at the same time no more get through. Digests, since
    what stands in the field for an e-mail address may be a password.
    """

    account: bytes
    address: bytes | None

    @classmethod
    def count(cls, key: str) -> Attempt:
        """Counts an attempt; ApiError 429 if the account or the address has to wait."""
        address = record().address
        attempt = cls(
            digest_token("account " + key), digest_token("address " + name_network(address)) if address else None
        )
        keys = sorted(filter(None, (attempt.account, attempt.address)))
        with service().accounts.connection() as connection, connection.transaction():
            run(connection, "delete_old_attempts")
            if len(run(connection, "count_attempt", keys=keys)) < len(keys):
                seconds = run(connection, "find_wait", keys=keys)[0]["seconds"]
                report_failure(key)
                message = f"Too many logins failed: wait {seconds} seconds."
                raise ApiError(429, message, headers={"Retry-After": str(seconds)})
        return attempt

    def forgive(self, connection: Connection) -> None:
        """Takes a right login out of the count: all of the account's, this one of the address's.

        Else whoever has one account could guess at others for ever.
        """
        run(connection, "delete_attempts", key=self.account)
        run(connection, "undo_attempt", key=self.address)


# Accounts ---------------------------------------------------------------------

api = Blueprint("api", __name__, url_prefix="/api")


def email_key(email: str) -> str:
    """What addresses are compared by: no regard to case and outer blanks."""
    return email.strip().lower()


def parse_email(text: str) -> str:
    email = text.strip()
    if len(email) > 254 or not email.isprintable() or not re.fullmatch(r"[^@\s]+@[^@\s]+", email):
        raise ValueError("must be an e-mail address of at most 254 characters")
    return email


def parse_name(text: str) -> str:
    name = text.strip()
    if not 1 <= len(name) <= 255 or not name.isprintable():
        raise ValueError("must be 1 to 255 printable characters")
    return name


def check_password(password: str, email: str) -> None:
    """Raises ValueError unless the password keeps the rule of the README."""
    named = (str.islower, str.isupper, str.isdigit)
    kinds = (*named, lambda c: not any(kind(c) for kind in named))
    variety = sum(any(kind(c) for c in password) for kind in kinds)
    if len(password.encode()) > 1024:
        raise ValueError("must be at most 1024 bytes long")
    if not (len(password) >= 20 or (len(password) >= 12 and variety >= 3)):
        raise ValueError(
            "must have at least 12 characters with three of lower case, upper case, digits and others, "
            "or at least 20 of any kind"
        )
    local = email.partition("@")[0].lower()
    if len(local) >= 4 and local in password.lower():
        raise ValueError("must not contain the name part of the e-mail address")


def show_stamp(stamp: datetime) -> str:
    return stamp.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def new_token(connection: Connection, account_id: int, days: int) -> str | None:
    """Makes a token, good for so many days (0: for ever); None if disabled."""
    run(connection, "delete_expired_tokens", account_id=account_id)
    token = "cdr_" + secrets.token_urlsafe(32)
    made = run(connection, "insert_token", account_id=account_id, digest=digest_token(token), days=days)
    return token if made else None


def show_login(account: Mapping[str, Any], token: str) -> dict[str, Any]:
    user = {
        "id": account["account_id"],
        "name": account["name"],
        "email": account["email"],
        "email_verified_at": None,
        "created_at": show_stamp(account["created_at"]),
        "updated_at": show_stamp(account["updated_at"]),
    }
    return {"user": user, "token": token, "success": True}


def add_account(
    connection: Connection, name: str, email: str, password: str, *, all_domains: bool
) -> dict[str, Any] | None:
    """Makes an account; None if the address is taken."""
    made = run(
        connection,
        "insert_account",
        name=name,
        email=email,
        email_key=email_key(email),
        password_hash=generate_password_hash(password),
        all_domains=all_domains,
    )
    return made[0] if made else None


# What an unknown address is checked against: of a password that nobody knows, at the same cost as others.
ABSENT_HASH = (
    "scrypt:32768:8:1$zm4q2muSoARoYrL9$"
    "649443107f8f983995c1bcb79319afef05889bab7976471a89027bbd454f594b"
    "f05aacd60d049407b037e4467cf5e00f0e539d49c9410ca3e6dceb1985a0193a"
)


@api.post("/register")
def register() -> tuple[dict[str, Any], int]:
    settings = service().settings
    read_query({})
    if settings.registration == "closed":
        raise ApiError(403, "Registration is closed: ask the operator for an account.")
    parsers: Parsers = {"name": parse_name, "email": parse_email, "password": str, "password_confirmation": str}
    values = parse_pairs(read_body(), parsers, parsers)
    faults = Faults()
    try:
        check_password(values["password"], values["email"])
    except ValueError as error:
        faults.add("password", str(error))
    if values["password"] != values["password_confirmation"]:
        faults.add("password_confirmation", "is not the same as password")
    faults.raise_if_any()
    with service().accounts.connection() as connection, connection.transaction():
        all_domains = settings.register_domains == ("*",)
        account = add_account(connection, values["name"], values["email"], values["password"], all_domains=all_domains)
        if not account:
            refuse("email", "has already been taken")
        names = list(settings.register_domains)
        run(connection, "upsert_grants", account_id=account["account_id"], domain_names=names)
        token = new_token(connection, account["account_id"], settings.token_days)
    return show_login(account, token or ""), 201


@api.post("/login")
def login() -> dict[str, Any]:
    read_query({})
    values = parse_pairs(read_body(), {"email": str, "password": str}, {"email", "password"})
    key = email_key(values["email"])
    attempt = Attempt.count(key)
    found = service().accounts.rows("find_account", email_key=key)
    account: dict[str, Any] = found[0] if found else {"password_hash": ABSENT_HASH, "disabled_at": None}
    right = check_password_hash(account["password_hash"], values["password"])
    token = None
    if found and right and not account["disabled_at"]:
        with service().accounts.connection() as connection, connection.transaction():
            attempt.forgive(connection)
            token = new_token(connection, account["account_id"], service().settings.token_days)
    if not token:
        report_failure(key)
        raise ApiError(401, "The e-mail address or the password is wrong.", headers=UNAUTHENTICATED)
    return show_login(account, token)


@api.post("/logout")
@tokens.login_required
def logout() -> dict[str, Any]:
    pairs: list[tuple[str, Any]] = [*query_pairs(), *read_body()]
    everywhere = parse_pairs(pairs, {"all": parse_flag}, ())["all"]
    account = current_account()
    if everywhere:
        service().accounts.rows("delete_tokens", account_id=account.account_id)
        return {"message": "Logged out: every token of this account is deleted.", "success": True}
    service().accounts.rows("delete_token", token_id=account.token_id)
    return {"message": "Logged out: this token is deleted.", "success": True}


# Stream -----------------------------------------------------------------------

# The 66 keys of a call, in their order. Everything that is not named below is
# a string.
FIELDS = tuple(
    """
    xml_cdr_uuid domain_uuid extension_uuid sip_call_id domain_name accountcode direction default_language context
    caller_id_name caller_id_number caller_destination source_number destination_number start_epoch start_stamp
    answer_stamp answer_epoch end_epoch end_stamp duration mduration billsec billmsec bridge_uuid read_codec
    read_rate write_codec write_rate remote_media_ip network_addr record_path record_name leg originating_leg_uuid
    pdd_ms rtp_audio_in_mos last_app last_arg voicemail_message missed_call call_center_queue_uuid cc_side
    cc_member_uuid cc_queue_joined_epoch cc_queue cc_member_session_uuid cc_agent_uuid cc_agent cc_agent_type
    cc_agent_bridged cc_queue_answered_epoch cc_queue_terminated_epoch cc_queue_canceled_epoch cc_cancel_reason
    cc_cause waitsec conference_name conference_uuid conference_member_id digits_dialed pin_number hangup_cause
    hangup_cause_q850 sip_hangup_disposition xml
    """.split()  # noqa: SIM905 (a list would take 66 lines)
)
INTEGERS = {"duration", "billsec", "waitsec", "mduration", "billmsec", "pdd_ms"}
NUMBERS = {"rtp_audio_in_mos"}
BOOLEANS = {"voicemail_message", "missed_call"}
STRINGS = set(FIELDS) - INTEGERS - NUMBERS - BOOLEANS

FORMATS = {"json": "application/json", "ndjson": "application/x-ndjson", "csv": "text/csv"}

BATCH_BYTES = 32 * 1024  # of COPY output; larger batches leave the processor's cache

DEL = b"\x7f"
PRINTABLE = bytes(range(32, 256))
ESCAPES = {control: b"\\u%04x" % control for control in range(32)} | {
    8: b"\\b",
    9: b"\\t",
    10: b"\\n",
    12: b"\\f",
    13: b"\\r",
}
CELL = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[^\x7f"]+', re.DOTALL)


class JsonRows:
    """Turns rows of copy_json (queries.sql) into JSON objects, by the batch.

    Time goes by the cell (66 a call, half of them null), so nothing here
    handles a cell by itself: one split, one slice assignment and one join
    serve a batch.
    """

    def __init__(self, fields: Collection[str], separator: bytes) -> None:
        keys = [json.dumps(name).encode() + b":" for name in fields]
        self.width = len(fields)
        self.head = b"{" + keys[0]
        following = [b"}" + separator + self.head, *(b"," + key for key in keys[1:])]
        self.row = [piece for key in following for piece in (key, b"")]

    def encode(self, rows: list[memoryview], opening: bytes) -> bytes:
        """The objects of some rows, the separator between them, opening before them."""
        text = DEL.join([row[:-1] for row in rows])
        # Without the rows' own line ends, every control character left stands inside a string.
        for control in set(text.translate(None, PRINTABLE)):
            text = text.replace(bytes([control]), ESCAPES[control])
        cells = text.split(DEL)
        if len(cells) != self.width * len(rows):  # a value holds the delimiter
            cells = CELL.findall(text)
        pieces = self.row * len(rows)
        pieces[1::2] = cells
        pieces[0] = opening + self.head
        pieces.append(b"}")
        return b"".join(pieces)


def join_lines(rows: list[memoryview], _opening: bytes) -> bytes:
    return b"".join(rows)


def check_results(results: list[pq.abc.PGresult]) -> pq.abc.PGresult:
    """The last result of a query's statements so far; raises psycopg.Error if one failed."""
    for result in results:
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(result, encoding="utf-8")
    return results[-1]


def copy_rows(pgconn: pq.abc.PGconn, patience: int) -> Iterator[memoryview]:
    """The rows of the COPY that runs, its end of success or failure not yet read.

    Raises psycopg.OperationalError when nothing comes for patience milliseconds.
    """
    poll = select.poll()
    poll.register(pgconn.socket, select.POLLIN)
    while (found := pgconn.get_copy_data(1))[0] >= 0:
        if found[0]:
            yield found[1]
        elif poll.poll(patience):
            pgconn.consume_input()
        else:
            raise psycopg.OperationalError("the server stopped in the middle of its answer")


def copy_batches(connection: PatientConnection, query: bytes) -> Iterator[list[memoryview]]:
    """The rows of the COPYs in a query, some BATCH_BYTES of them at a time.

    The last batch comes only after PostgreSQL reported success for all of the
    query. Raises psycopg.Error when it reports anything else. Polling libpq for
    what has arrived already takes a third less time than psycopg's Copy, which
    comes back to Python's event loop for every row.
    """
    pgconn = connection.pgconn
    pgconn.send_query(query)
    results = connection.wait(generators.execute(pgconn))
    rows: list[memoryview] = []
    size = 0
    while check_results(results).status == pq.ExecStatus.COPY_OUT:
        for row in copy_rows(pgconn, int(connection.patience * 1000)):
            rows.append(row)
            size += len(row)
            if size >= BATCH_BYTES:
                yield rows
                rows, size = [], 0
        results = connection.wait(generators.fetch_many(pgconn))
    if rows:
        yield rows


def end_transaction(connection: Connection) -> None:
    """Makes a connection fit for the pool again: cancels what runs, rolls back."""
    pgconn = connection.pgconn
    try:
        if pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
            connection.cancel_safe(timeout=5)
            for _ in copy_rows(pgconn, patience=5_000):
                pass
            connection.wait(generators.fetch_many(pgconn), timeout=5)
        if pgconn.transaction_status != pq.TransactionStatus.IDLE:
            connection.rollback()
    except psycopg.Error:
        connection.close()


class Reader:
    """The client of a long answer: cut off when it takes the answer too slowly.

    In all it may keep the service waiting for CDR_API_CLIENT_TIMEOUT, and as
    long again as CDR_API_MIN_RATE allows for the bytes that it took.
    """

    def __init__(self) -> None:
        self.settings = service().settings
        self.address = record().address
        self.budget = self.settings.client_timeout / 1000  # seconds
        self.since = time.monotonic()
        self.poll = select.poll()
        self.socket: socket.socket | None = request.environ.get("gunicorn.socket")
        if self.socket:
            self.poll.register(self.socket, select.POLLOUT)

    def hand(self, chunk: bytes) -> bytes:
        """Passes a chunk on, whose time begins now."""
        self.budget += len(chunk) / self.settings.min_rate
        self.since = time.monotonic()
        return chunk

    def wait(self) -> None:
        """Waits until the client has room for another chunk.

        Raises ConnectionResetError, the connection being cut, if it takes too long.
        """
        left = self.budget - (time.monotonic() - self.since)
        if self.socket and not self.poll.poll(max(left, 0) * 1000):
            log.warning("%s takes its answer too slowly and was cut off", self.address or "a client")
            self.cut()
        self.budget -= time.monotonic() - self.since

    def cut(self) -> NoReturn:
        """Ends the connection without HTTP's last chunk; gunicorn passes over this error without a word."""
        if self.socket:
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
        raise ConnectionResetError(errno.ECONNRESET, "the answer was cut off")


def too_many_streams() -> ApiError:
    limit = service().settings.account_streams
    message = f"This account has {limit} long answers under way already: wait for one of them to end."
    return ApiError(429, message, headers={"Retry-After": "5"})


class CallStream:
    """The body of an answer: an iterator of chunks that owns a connection.

    The first chunk is read at once, so that a statement that fails does so
    before the headers are sent. The closing bracket is part of the last chunk,
    which is made after PostgreSQL reported success; complete says so. When
    anything fails before, the connection to the client is cut. close(), at any
    time, cancels what runs and gives the connection back to its pool.

    An answer that is not complete with its first chunk is a long one: it needs
    room in its worker (else ApiError 503) and one of the account's (else 429).
    """

    def __init__(
        self,
        connection: PatientConnection,
        query: bytes,
        kind: str,
        fields: Collection[str],
        ends: tuple[bytes, bytes] | None = None,
    ) -> None:
        self.complete = False
        self.rows = -1 if kind == "csv" else 0  # whose header comes as a row
        self.owned = False  # until the first chunk is made, the connection is the caller's to give back
        self.kind = kind
        self.database = service().calls
        self.connection = connection
        separator = b",\n" if kind == "json" else b"\n"
        encode = join_lines if kind == "csv" else JsonRows(fields, separator).encode
        opening, closing = ends or {"json": (b"[", b"]\n"), "ndjson": (b"", b"\n"), "csv": (b"", b"")}[kind]
        self.chunks = self.read(copy_batches(connection, query), encode, opening, separator, closing)
        self.first: bytes | None = next(self.chunks, b"")
        self.reader = Reader()
        if self.complete:
            return
        if not connection.may_be_long:
            raise too_many_streams()
        if not service().room.acquire(blocking=False):
            message = "Too many long answers are under way: try again soon."
            raise ApiError(503, message, headers={"Retry-After": "5"})
        self.room = service().room
        self.owned = True

    def read(
        self,
        batches: Iterator[list[memoryview]],
        encode: Callable[[list[memoryview], bytes], bytes],
        opening: bytes,
        separator: bytes,
        closing: bytes,
    ) -> Generator[bytes]:
        chunk = b""
        try:
            for rows in batches:
                self.rows += len(rows)
                if chunk:
                    yield chunk
                chunk = encode(rows, separator if chunk else opening)
            self.complete = True
        except psycopg.Error as error:
            if not self.owned:
                raise
            log.error("an answer broke off: %s", " ".join(str(error).split()))
            self.reader.cut()
        finally:
            if self.owned or self.complete:
                self.database.give_back(self.connection)
            if self.owned:
                self.room.release()
        if chunk or opening:
            yield (chunk or opening) + closing

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        if self.first is None:
            self.reader.wait()
            return self.reader.hand(next(self.chunks))
        first, self.first = self.first, None
        return self.reader.hand(first)

    def close(self) -> None:
        self.chunks.close()


# Calls ------------------------------------------------------------------------

FIRST_UUID = "00000000-0000-0000-0000-000000000000"
LAST_UUID = "ffffffff-ffff-ffff-ffff-ffffffffffff"


def read_list(known: Collection[str], noun: str, hint: str = "") -> Callable[[str], tuple[str, ...]]:
    """Reads names of a closed list, with commas between them, none twice."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"names unknown {noun}s: {', '.join(unknown)[:200]}{hint}")
        if len(set(names)) < len(names):
            raise ValueError(f"names a {noun} twice")
        return names

    return read


parse_fields = read_list(FIELDS, "field")

FILTERS: dict[str, Callable[[str], Any]] = {
    "direction": str,
    "leg": str,
    "accountcode": str,
    "extension_uuid": parse_uuid,
    "caller_id_name": str,
    "caller_id_number": str,
    "source_number": str,
    "destination_number": str,
    "hangup_cause": str,
    "answered": parse_flag,
    "min_billsec": read_integer(0, 10**12),
    "billable_only": parse_flag,
}
CALLS: dict[str, Callable[[str], Any]] = {
    "domain_name": str,
    "fields": parse_fields,
    "format": str,
    "csv_safe": parse_flag,
    "limit": read_integer(1, 100_000),
    "after": str,
    "by": read_choice("start", "end"),
    **FILTERS,
}
CALL_RANGE: Parsers = {**CALLS, "from": parse_moment, "to": parse_moment}


def choose_format(values: Mapping[str, Any]) -> str:
    """json, ndjson or csv, by format= or Accept; ApiError 406, 422 or 426."""
    wanted = values["format"]
    if wanted is None:
        # Without the parameters of a type, such as charset.
        accepted = MIMEAccept([(name.partition(";")[0].strip(), q) for name, q in request.accept_mimetypes])
        mimetype = accepted.best_match(FORMATS.values()) if accepted else FORMATS["json"]
        wanted = next((kind for kind, name in FORMATS.items() if name == mimetype), "")
    if wanted not in FORMATS:
        raise ApiError(406, f"The format must be one of {', '.join(FORMATS)}.", {"format": list(FORMATS)})
    if wanted != "json" and request.environ.get("SERVER_PROTOCOL") == "HTTP/1.0":
        message = (
            "CSV and NDJSON are not sent over HTTP/1.0, where a broken answer looks whole. "
            "Behind nginx this takes: proxy_http_version 1.1;"
        )
        raise ApiError(426, message, headers={"Upgrade": "HTTP/1.1", "Connection": "Upgrade"})
    if wanted != "csv" and values["csv_safe"] is not None:
        refuse("csv_safe", "is for format=csv")
    return str(wanted)


def bind(connection: Connection, statement: str, values: Mapping[str, Any]) -> bytes:
    """A statement with its values in it, quoted by psycopg, since COPY takes no parameters."""
    literals = {name: sql.Literal(values[name]).as_string(connection) for name in find_marks(statement)}
    return (statement % literals).encode()


@functools.lru_cache(maxsize=256)
def find_marks(statement: str) -> frozenset[str]:
    """The names of a statement's parameters."""
    return frozenset(re.findall(r"(?<!%)%\((\w+)\)s", statement))


def defuse(name: str) -> sql.Composable:
    """A column, its text such that no spreadsheet takes it for a formula."""
    if name not in STRINGS:
        return keep(name)
    return STATEMENTS["defuse"].format(column=sql.Identifier("calls", name), name=sql.Identifier(name))


def keep(name: str) -> sql.Composable:
    """A column as it is."""
    return sql.Identifier("calls", name)


def type_column(name: str) -> sql.Composable:
    """A column of the type that it has in JSON."""
    if name == "leg":  # char(1), of which a cast would take the blank
        return keep(name)
    kind = "text" if name in STRINGS else "boolean" if name in BOOLEANS else "numeric"
    return sql.SQL("calls.{0}::{1} AS {0}").format(sql.Identifier(name), sql.SQL(kind))


@functools.lru_cache(maxsize=256)
def compose_select(fields: tuple[str, ...], column: Callable[[str], sql.Composable] = keep) -> str:
    """select_calls with its columns."""
    columns = sql.SQL(", ").join(map(column, fields))
    return STATEMENTS["select_calls"].format(columns=columns, matching_calls=STATEMENTS["matching_calls"]).as_string()


@functools.lru_cache(maxsize=256)
def compose_copy(kind: str, fields: tuple[str, ...], *, safe: bool = False) -> str:
    """The COPY of some fields of the selected calls, in the kind that becomes a format."""
    strings = sql.SQL(", ").join(sql.Identifier(name) for name in fields if name in STRINGS)
    force_quote = sql.SQL(", FORCE_QUOTE ({})").format(strings) if strings.as_string() else sql.SQL("")
    statement = STATEMENTS["copy_csv" if kind == "csv" else "copy_json"]
    query = sql.SQL(compose_select(fields, defuse if safe else keep))
    return statement.format(query=query, force_quote=force_quote).as_string()


# End stamp and uuid of a call, what its page ends with; (None, None) stands
# before the calls that have no end stamp.
Key = tuple[str | None, str | None]


@dataclass(frozen=True)
class Window:
    """Which calls are asked for, as values of select_calls."""

    values: Mapping[str, Any]
    may_be_undated: bool

    def parts(self, key: Key | None, limit: int | None) -> list[dict[str, Any]]:
        """The values of each statement that answers a request.

        First the calls that have an end stamp, then those that have none;
        never both in one page.
        """
        dated = dict(self.values, limit=limit, part="dated", header=True)
        undated = dict(dated, part="undated", after_uuid=None, header=False)
        if key is not None:
            stamp, uuid = key
            if stamp is None:
                return [dict(undated, after_uuid=uuid, header=True)]
            dated.update(after_stamp=stamp, after_uuid=uuid)
        return [dated, undated] if self.may_be_undated and limit is None else [dated]

    def next_key(self, connection: Connection, page: Mapping[str, Any]) -> Key | None:
        """The key behind a page of page["limit"] calls; None if nothing follows."""
        keys = find_keys(connection, dict(page, limit=2, offset=page["limit"] - 1))
        if len(keys) == 2:
            return keys[0]
        undated = dict(page, limit=1, part="undated", after_uuid=None)
        if page["part"] == "dated" and self.may_be_undated and find_keys(connection, undated):
            return (None, None)
        return None


def find_keys(connection: Connection, values: Mapping[str, Any]) -> list[Key]:
    """The keys of the selected calls."""
    query = bind(connection, compose_select(("end_stamp", "xml_cdr_uuid")), values)
    return [(row["end_stamp"], str(row["xml_cdr_uuid"])) for row in connection.execute(query)]


def select_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of select_calls for a request's filters: every call of no domain yet."""
    found = {name: values[name] for name in FILTERS} | {"billable_only": bool(values["billable_only"])}
    found |= dict.fromkeys(("from", "to", "uuids", "low", "high", "limit"))
    return found | {"by": "", "part": "both", "after_stamp": "-infinity", "after_uuid": FIRST_UUID, "offset": 0}


def range_values(values: Mapping[str, Any], zone: str) -> dict[str, Any]:
    """The values of select_calls for a request's filters and range; ApiError 422 for a wrong range."""
    by = values["by"] or "end"
    start, end = read_range(values["from"], values["to"], zone)
    found = select_values(values) | {"by": by, "from": start.isoformat(), "to": end.isoformat()}
    if by == "end":  # the window begins behind the last possible key before it
        before = start - timedelta(microseconds=1)
        found |= {"part": "dated", "after_stamp": before.isoformat(), "after_uuid": LAST_UUID}
    return found


def write_cursor(purpose: Any, content: Any) -> str:
    """A signed text that is good for one purpose."""
    return str(find_signer(purpose).dumps(content))


def read_cursor(purpose: Any, parameter: str, text: str) -> Any:
    """The content of a signed text; ApiError 422 unless it is what write_cursor wrote."""
    signer = find_signer(purpose)
    try:
        content = signer.loads(text)
    except itsdangerous.BadData:
        content = None
    # Base64 reads some changed texts as the same bytes.
    if content is None or signer.dumps(content) != text:
        refuse(parameter, "is no cursor that this service gave for this request, or was changed")
    return content


def find_signer(purpose: Any) -> itsdangerous.URLSafeSerializer:
    return itsdangerous.URLSafeSerializer(
        service().secret, salt=json.dumps(purpose), signer_kwargs={"digest_method": hashlib.sha256}
    )


def answer_calls(values: Mapping[str, Any]) -> Response:
    """Streams the calls of a request's parameters."""
    kind = choose_format(values)
    domains = read_domains(values["domain_name"])
    in_range = "from" in values
    found = range_values(values, service().time_zone) if in_range else select_values(values)
    given = {name: value for name, value in found.items() if value is not None}
    purpose = [current_account().account_id, request.path, values["domain_name"], given]
    window = Window(found | domains, may_be_undated=not in_range or found["by"] == "start")
    key = None if values["after"] is None else read_cursor(purpose, "after", values["after"])
    parts = window.parts(key, values["limit"])
    headers = {}
    if kind != "csv" and not window.may_be_undated:
        few = find_few(parts[0], values["fields"] or FIELDS)
        if few is not None and len(few) <= (values["limit"] or FEW):
            return answer_few(few, kind)
    if values["limit"]:
        _ = service().secret  # before a connection is held: it may take one of its own
    with transaction(sort=found["by"] == "start") as connection:
        if values["limit"] and (key := window.next_key(connection, parts[0])):
            headers["Link"] = f'<{next_url("after", write_cursor(purpose, key))}>; rel="next"'
        stream = send_copies(connection, parts, kind, values)
    return answer_stream(stream, headers)


# So many calls are made JSON by PostgreSQL; more of them COPY brings in less time.
FEW = 20
# And no more bytes: the system takes them off our hands at once, however slow the client is.
FEW_BYTES = 64 * 1024
# What takes longer is not going to be few.
FEW_MILLISECONDS = 250
# Values that stand in the text of compose_few, as do NULL, true and false: its plan depends on them.
PLANNED = ("by", "part", "limit", "offset")


@functools.lru_cache(maxsize=256)
def compose_few(fields: tuple[str, ...], fixed: tuple[tuple[str, Any], ...], given: tuple[str, ...]) -> str:
    """Calls as_json, with the values that the plan depends on in it, and $1, $2, … for the others."""
    query = STATEMENTS["as_json"].format(query=sql.SQL(compose_select(fields, type_column))).as_string()
    return number_marks(query, given, {name: sql.Literal(value).as_string() for name, value in fixed})


def execute_few(
    connection: PatientConnection, prepared: dict[str, str], fields: tuple[str, ...], values: Mapping[str, Any]
) -> pq.abc.PGresult:
    """The rows of compose_few, in one round trip and without planning anew; psycopg.Error if that fails."""
    fixed = {
        name: value for name, value in values.items() if name in PLANNED or value is None or isinstance(value, bool)
    }
    given = tuple(name for name in values if name not in fixed)
    name = prepare(connection, prepared, compose_few(fields, tuple(fixed.items()), given))
    timeout = min(FEW_MILLISECONDS, service().settings.statement_timeout)
    values = {**values, **begin_values(sort=False), "timeout": timeout}
    connection.pgconn.send_query(bind(connection, compose_run_few(name, given), values))
    results: list[pq.abc.PGresult] = connection.wait(generators.execute(connection.pgconn))
    check_results(results)
    return results[-2]  # before that of COMMIT


@functools.lru_cache(maxsize=256)
def compose_run_few(name: str, given: tuple[str, ...]) -> str:
    """run_few for a prepared statement."""
    marks = sql.SQL(", ").join(map(sql.Placeholder, given))
    execute = STATEMENTS["execute"].format(name=sql.Identifier(name), values=marks)
    return STATEMENTS["run_few"].format(begin=STATEMENTS["begin_read"], execute=execute).as_string()


def find_few(values: Mapping[str, Any], fields: tuple[str, ...]) -> list[bytes] | None:
    """The calls of a request, each as JSON; None if they are not few, or that does not come to light at once.

    What stands in its way is left to the stream, which makes an answer of it, or the right error.
    """
    with service().calls.connection() as connection:
        # The first PostgreSQL with plan_cache_mode is 12.
        if connection.prepared is None or not connection.indexed or connection.pgconn.server_version < 120000:
            return None
        connection.patience = service().settings.statement_timeout / 1000 + PATIENCE
        try:
            rows = execute_few(connection, connection.prepared, fields, {**values, "limit": FEW + 1})
        except psycopg.Error:
            if connection.closed:
                raise
            return None
        calls = [rows.get_value(row, 0) or b"" for row in range(rows.ntuples)]
    return calls if len(calls) <= FEW and sum(map(len, calls)) <= FEW_BYTES else None


def answer_few(calls: list[bytes], kind: str) -> Response:
    """An answer like that of a stream."""
    record().rows = len(calls)
    body = b"[" + b",\n".join(calls) + b"]\n" if kind == "json" else b"".join(call + b"\n" for call in calls)
    return Response(body, content_type=FORMATS[kind])


def send_copies(
    connection: PatientConnection, parts: list[dict[str, Any]], kind: str, values: Mapping[str, Any]
) -> CallStream:
    """The stream of the calls of all parts, by a request's fields; the transaction ends with it."""
    fields = values["fields"] or FIELDS
    copy = compose_copy(kind, fields, safe=bool(values["csv_safe"]))
    copies = [bind(connection, copy, part) for part in parts]
    return CallStream(connection, b";".join([*copies, b"COMMIT"]), kind, fields)


@contextmanager
def transaction(*, sort: bool, zone: str | None = None) -> Iterator[PatientConnection]:
    """A connection for calls in a transaction of its own; both are the block's to end or hand on.

    Takes the connection back if the block fails. sort: whether the planner may
    sort instead of going through an index in its order. zone: that of stamps.

    Where the account has as many long answers under way as it may have, a
    statement gets a second; then ApiError 429.
    """
    examine_worker()
    settings = service().settings
    values = begin_values(sort=sort, zone=zone) | {
        "statement_timeout": settings.statement_timeout,
        "account_id": current_account().account_id,
        "streams": settings.account_streams,
    }
    connection = service().calls.borrow()
    try:
        connection.patience = settings.statement_timeout / 1000 + PATIENCE
        connection.may_be_long = begin(connection, {**values, "alone": connection.indexed and not sort})
        yield connection
    except BaseException as error:
        hurried = isinstance(error, psycopg.errors.QueryCanceled) and not connection.may_be_long
        service().calls.give_back(connection)  # from here on it may be another request's
        if hurried:
            raise too_many_streams() from None
        if isinstance(error, psycopg.errors.InvalidParameterValue) and zone not in (None, service().time_zone):
            refuse("tz", "is not a time zone that the database knows")
        raise


def begin_values(*, sort: bool, zone: str | None = None) -> dict[str, str]:
    """The values of begin_read; those of transaction."""
    return {"enable_sort": "on" if sort else "off", "time_zone": zone or service().time_zone}


def begin(connection: Connection, values: Mapping[str, Any]) -> bool:
    """Opens a transaction; whether the account has room for a long answer in it."""
    begin_read, take_place = (STATEMENTS[name].as_string() for name in ("begin_read", "take_place"))
    cursor = connection.execute(bind(connection, f"{begin_read};{take_place}", values))
    while cursor.nextset():
        pass
    return bool(cursor.fetchall()[0]["may_be_long"])


def answer_stream(stream: CallStream, headers: Mapping[str, str]) -> Response:
    """A stream as a response; with its length if it is complete already."""
    record().stream = stream
    content_type = FORMATS[stream.kind] + ("; charset=utf-8" if stream.kind == "csv" else "")
    body: bytes | CallStream = b"".join(stream) if stream.complete else stream
    return Response(body, 200, headers, content_type=content_type, direct_passthrough=not stream.complete)


def next_url(parameter: str, cursor: str) -> str:
    """The request's own URL with another cursor, as the client would write it.

    A trusted proxy says by X-Forwarded-Prefix what its public path is for /api.
    """
    superseded = ("cursor", "from") if parameter == "cursor" else (parameter,)
    kept = [pair for pair in query_pairs() if pair[0] not in superseded]
    path = request.script_root + request.path.removeprefix("/api") if request.script_root else request.path
    origin = f"{request.scheme}://{request.host}" if request.host else ""
    return f"{origin}{quote(path)}?{urlencode([*kept, (parameter, cursor)])}"


def examine_worker() -> None:
    """Before long answers: gunicorn's sync worker cuts them off at its time-out."""
    environ = request.environ
    if environ.get("SERVER_SOFTWARE", "").startswith("gunicorn") and not environ["wsgi.multithread"]:
        notice("workers", "gunicorn runs a sync worker, which kills long answers at its time-out: use gthread")


@api.get("/calls")
@tokens.login_required
def calls() -> Response:
    return answer_calls(read_query(CALLS, {"domain_name"}))


@api.get("/call_range")
@tokens.login_required
def call_range() -> Response:
    return answer_calls(read_query(CALL_RANGE, {"domain_name", "from", "to"}))


@api.get("/domains")
@tokens.login_required
def domains() -> list[dict[str, Any]]:
    read_query({})
    account = current_account()
    return service().accounts.rows("select_domains", account_id=account.account_id, all_domains=account.all_domains)


# Feed -------------------------------------------------------------------------

FEED: dict[str, Callable[[str], Any]] = {
    "cursor": str,
    "from": parse_moment,
    "domain_name": str,
    "fields": parse_fields,
    "format": str,
    "csv_safe": parse_flag,
    "limit": read_integer(1, 100_000),
    **FILTERS,
}
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


def digest_purpose(values: Mapping[str, Any], domain_uuids: list[str]) -> str:
    """What a cursor of the feed is bound to beside account and cluster.

    Only the filters that were given: a release that adds some resets nobody.

    The granted domains are part of it, by uuid: a grant that comes or goes must
    not let old calls slip in or out in silence. Who may read all is not bound
    to the domains of the day.
    """
    bound = "*" if current_account().all_domains else sorted(domain_uuids)
    filters = {name: values[name] for name in FILTERS if values[name] is not None}
    purpose = [values["domain_name"], bound, filters]
    return hashlib.sha256(json.dumps(purpose).encode()).hexdigest()[:32]


def read_feed_cursor(text: str) -> FeedCursor:
    """The cursor of a text; ApiError 422 unless this service wrote it."""
    found = read_cursor("feed", "cursor", text)
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
        raise ApiError(503, "This standby is behind the cursor: try again soon.", headers={"Retry-After": "5"})
    if ahead:
        gone(cursor.since, "This cursor is ahead of the database, as after the restore of a backup")
    if age > OLDEST_CURSOR:
        gone(cursor.since, "This cursor is too old")


def gone(since: str, reason: str) -> NoReturn:
    how = (
        "poll with this from and without a cursor; calls that you have come again; "
        "the older calls of a domain that is new to you need a from of their own"
    )
    resync = {"from": since, "how": how}
    raise ApiError(410, f"{reason}: begin anew with from=, calls that you have come again.", resync)


def find_horizon() -> int:
    """A transaction id: all below it have ended, and no crash undoes that."""
    with service().calls.connection() as connection:
        found = run(connection, "find_horizon")[0]
        if not found["durable"]:
            run(connection, "flush_wal")
    return int(found["horizon"])


def open_feed(values: Mapping[str, Any], purpose: str, snapshot: Mapping[str, Any]) -> FeedCursor:
    """The cursor of a request with its window [low, high) set, read in the transaction of the snapshot."""
    account_id = current_account().account_id
    if values["cursor"] is not None:
        cursor = read_feed_cursor(values["cursor"])
        check_feed_cursor(cursor, account_id, purpose, snapshot)
    else:
        since = find_edge(values["from"], values["from"].first, find_zone(service().time_zone)).isoformat()
        cursor = FeedCursor(
            FEED_VERSION, snapshot["cluster"], account_id, purpose, None, since, snapshot["seen"].isoformat(), since
        )
    if cursor.high is not None:  # in the middle of a window
        return cursor
    return replace(cursor, high=snapshot["horizon"], taken=snapshot["seen"].isoformat())


def close_feed(cursor: FeedCursor, snapshot: Mapping[str, Any]) -> FeedCursor:
    """The cursor behind a window that was delivered whole.

    Everything stored by an instant is delivered once every transaction that had
    begun to write by then lies below the horizon. So an instant is noted with
    the id of the next transaction, and waits until the horizon has reached it.
    """
    high, later = cursor.high or 0, snapshot["next"]
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
    look_back = datetime.fromisoformat(cursor.taken) - timedelta(days=service().settings.lookback_days)
    since = floor[0] if floor else look_back.isoformat()
    return replace(cursor, low=high, high=None, key=None, since=since, through=through, pending=pending, floor=floor)


def feed_window(cursor: FeedCursor, values: Mapping[str, Any], domains: Mapping[str, Any]) -> Window:
    before = datetime.fromisoformat(cursor.since) - timedelta(microseconds=1)
    found = {**select_values(values), **domains, "after_stamp": before.isoformat(), "after_uuid": LAST_UUID}
    found |= {"high": str((cursor.high or 0) % 2**32)}
    if cursor.low is not None:
        found |= {"low": str(cursor.low % 2**32)}
    return Window(found, may_be_undated=True)


@api.get("/call_feed")
@tokens.login_required
def call_feed() -> Response:
    """The calls that became visible since the cursor, each once; how: see FeedCursor."""
    values = read_query(FEED)
    if (values["cursor"] is None) == (values["from"] is None):
        refuse("cursor", "is needed, or from at the first poll; not both")
    kind = choose_format(values)
    domains = read_domains(values["domain_name"])
    purpose = digest_purpose(values, domains["domain_uuids"])
    horizon = find_horizon()
    _ = service().secret  # before a connection is held: it may take one of its own
    with transaction(sort=True) as connection:
        snapshot = run(connection, "find_snapshot")[0]
        # The two may come from different servers of one DSN.
        snapshot["horizon"] = min(horizon, snapshot["horizon"])
        cursor = open_feed(values, purpose, snapshot)
        window = feed_window(cursor, values, domains)
        parts = window.parts(cursor.key and (cursor.key[0], cursor.key[1]), values["limit"])
        key = window.next_key(connection, parts[0]) if values["limit"] else None
        following = replace(cursor, key=key) if key else close_feed(cursor, snapshot)
        text = write_cursor("feed", asdict(following))
        headers = {
            "X-Next-Cursor": text,
            "X-Complete-Through": following.through,
            "Link": f'<{next_url("cursor", text)}>; rel="next"',
        }
        stream = send_copies(connection, parts, kind, values)
    return answer_stream(stream, headers)


# Totals -----------------------------------------------------------------------

GROUPS = ("domain_name", "direction", "hangup_cause", "accountcode", "extension_uuid", "hour", "day", "month")
parse_groups = read_list(GROUPS, "group", f"; it knows {', '.join(GROUPS)}")

TOTALS: Parsers = {
    "from": parse_moment,
    "to": parse_moment,
    "by": read_choice("start", "end"),
    "domain_name": str,
    "group_by": parse_groups,
    "tz": read_zone,
    **FILTERS,
}


def read_rows(statement: str, values: Mapping[str, Any], *, zone: str, **names: sql.Composable) -> list[dict[str, Any]]:
    """The rows of a statement on matching_calls, in a transaction of its own."""
    text = STATEMENTS[statement].format(matching_calls=STATEMENTS["matching_calls"], **names).as_string()
    with transaction(sort=True, zone=zone) as connection:
        rows = connection.execute(bind(connection, text, values)).fetchall()
        connection.execute("COMMIT")
    service().calls.give_back(connection)
    return rows


@api.get("/call_totals")
@tokens.login_required
def call_totals() -> list[dict[str, Any]]:
    values = read_query(TOTALS, {"from", "to"})
    domains = read_domains(values["domain_name"])
    zone = values["tz"] or service().time_zone
    found = range_values(values, zone) | domains
    keys = [sql.Identifier(name) for name in values["group_by"] or ()]
    listed = sql.SQL(", ").join(keys)
    group_by = sql.SQL("GROUP BY {0} ORDER BY {0}").format(listed) if keys else sql.SQL("")
    return read_rows(
        "select_totals", found, zone=zone, keys=listed + sql.SQL(", ") if keys else listed, group_by=group_by
    )


# Lookup -----------------------------------------------------------------------


@api.post("/call_lookup")
@tokens.login_required
def call_lookup() -> Response:
    values = read_query({"fields": parse_fields})
    uuids = parse_pairs(read_body(), {"xml_cdr_uuid": parse_uuids}, {"xml_cdr_uuid"})["xml_cdr_uuid"]
    found = select_values(dict.fromkeys(FILTERS)) | read_domains(None) | {"uuids": uuids}
    with transaction(sort=True) as connection:
        there = {uuid for _, uuid in find_keys(connection, found)}
        closing = json.dumps([uuid for uuid in uuids if uuid not in there], separators=(",", ":"))
        fields = values["fields"] or FIELDS
        copy = bind(connection, compose_copy("json", fields), found)
        ends = (b'{"calls":[', b'],"not_found":' + closing.encode() + b"}\n")
        stream = CallStream(connection, copy + b";COMMIT", "json", fields, ends)
    return answer_stream(stream, {})


# Concurrency ------------------------------------------------------------------

CONCURRENCY: Parsers = {
    "date": parse_moment,
    "from": parse_moment,
    "to": parse_moment,
    "resolution": read_choice("1", "5", "15", "30", "60"),
    "domain_name": str,
    "tz": read_zone,
    **FILTERS,
}
LONGEST_RANGE = timedelta(days=31, hours=1)  # an hour for a change of the clock
# How long behind the range the end of a call that began in it is looked for.
LONGEST_CALL = timedelta(days=7)


def read_intervals(statement: str) -> list[dict[str, Any]]:
    """The rows of a statement about intervals, for the parameters of both routes."""
    values = read_query(CONCURRENCY)
    zone = values["tz"] or service().time_zone
    if (values["date"] is None) == (values["from"] is None and values["to"] is None):
        refuse("date", "is needed, or from and to instead; not both")
    first, last = (values["date"], values["date"]) if values["date"] else (values["from"], values["to"])
    if first is None or last is None:
        refuse("from" if first is None else "to", "is needed")
    start, until = read_range(first, last, zone)
    if until - start > LONGEST_RANGE:
        refuse("to", "must be at most 31 days behind from")
    ended = clamp(lambda: until + LONGEST_CALL, LATEST)
    found = {
        **select_values(values),
        **read_domains(values["domain_name"]),
        "by": "end",
        "part": "dated",
        "after_stamp": (start - timedelta(microseconds=1)).isoformat(),
        "after_uuid": LAST_UUID,
        "from": start.isoformat(),
        "to": ended.isoformat(),
        "until": until.isoformat(),
        "step": 60 * int(values["resolution"] or 1),
    }
    return read_rows(statement, found, zone=zone)


@api.get("/concurrent_calls_by_domain")
@tokens.login_required
def concurrent_calls_by_domain() -> list[dict[str, Any]]:
    return read_intervals("select_peaks")


@api.get("/active_calls_by_domain")
@tokens.login_required
def active_calls_by_domain() -> list[dict[str, Any]]:
    return read_intervals("select_activity")


# Health -----------------------------------------------------------------------


@api.get("/health")
def health() -> dict[str, str]:
    read_query({})
    service().accounts.rows("probe_accounts")
    service().calls.rows("probe_calls")
    return {"status": "ok"}


# Description ------------------------------------------------------------------

DESCRIPTION = json.loads(Path(__file__).with_name("openapi.json").read_text("utf-8"))


@functools.lru_cache(maxsize=16)
def describe(path: str) -> bytes:
    """The description of the service below a public path."""
    servers = [{**server, "url": path} for server in DESCRIPTION["servers"]]
    return json.dumps({**DESCRIPTION, "servers": servers}, ensure_ascii=False).encode() + b"\n"


@api.get("/openapi.json")
def openapi() -> Response:
    """The description. A trusted proxy says by X-Forwarded-Prefix what its public path is for /api."""
    read_query({})
    response = Response(describe(quote(request.script_root) or "/api"), mimetype="application/json")
    response.headers["Cache-Control"] = "no-cache"  # kept, and asked about
    response.add_etag()
    response.make_conditional(request)
    return response


# Pages ------------------------------------------------------------------------

pages = Blueprint("pages", __name__, url_prefix="/api")

PAGES = Path(__file__).with_name("pages")
LIBRARIES = ("vendor/chart.umd.min.js", "vendor/swagger-ui-bundle.js", "vendor/swagger-ui.css")
# The only files of pages/ that are served, by their last names.
ASSETS = {Path(name).name: name for name in ("docs.js", "icon.svg", "pages.css", "session.js", "usage.js", *LIBRARIES)}
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

PAGE_HEADERS = {
    # Nothing from elsewhere and nothing inline. Swagger UI's icons are data: images. Forms are sent by scripts
    # only, so that a password cannot get into a URL should these not load.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    # Kept, and asked for anew each time by its ETag: an upgrade never mixes old files with new ones.
    "Cache-Control": "no-cache",
}


@functools.cache
def read_page(name: str) -> tuple[bytes, str]:
    """A file of pages/ and its ETag."""
    content = (PAGES / name).read_bytes()
    return content, hashlib.sha256(content).hexdigest()[:32]


def answer_page(name: str) -> Response:
    read_query({})
    content, etag = read_page(name)
    response = Response(content, headers=PAGE_HEADERS, mimetype=MEDIA_TYPES[Path(name).suffix])
    response.set_etag(etag)
    response.make_conditional(request)
    return response


@pages.get("/docs")
def docs() -> Response:
    return answer_page("docs.html")


@pages.get("/usage")
def usage() -> Response:
    return answer_page("usage.html")


@pages.get("/assets/<name>")
def assets(name: str) -> Response:
    if name not in ASSETS:
        raise NotFound
    return answer_page(ASSETS[name])


# Application ------------------------------------------------------------------


def limit_patience() -> None:
    """Before every request: a client that sends or takes nothing for so long is given up."""
    client = request.environ.get("gunicorn.socket")
    if client:
        client.settimeout(service().settings.client_timeout / 1000)


def harden(response: Response) -> Response:
    """What is personal is not kept by caches, and JSON is not taken for a page."""
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def share(response: Response) -> Response:
    """Lets pages of the configured origins, and of no others, read the answer (CORS)."""
    origins = service().settings.cors_origins
    if origins:
        response.vary.add("Origin")
    if request.headers.get("Origin") in origins:
        response.headers |= {
            "Access-Control-Allow-Origin": request.headers["Origin"],
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": "Authorization, Content-Type",
            "Access-Control-Expose-Headers": "Link, Retry-After, X-Complete-Through, X-Next-Cursor, X-Request-ID",
        }
    return response


def register_handlers(app: Flask) -> None:
    """What runs before and after every request, and what makes the envelope of an error."""
    app.register_error_handler(ApiError, answer_api_error)
    app.register_error_handler(HTTPException, answer_http_exception)
    app.register_error_handler(psycopg.Error, answer_database_error)
    app.register_error_handler(Exception, answer_unexpected)
    for before in (open_record, limit_patience, examine_proxies, refuse_secrets_in_query):
        app.before_request(before)
    for after in (show_request_id, harden, share):
        app.after_request(after)


def create_app(environ: Mapping[str, str] = os.environ) -> Flask:
    """The application for an environment of CDR_API_* settings.

    Ends the program with one line for a wrong setting. Connects to nothing.
    """
    try:
        settings = Settings.from_environ(environ)
    except SettingError as error:
        raise SystemExit(str(error)) from None
    app = Flask("cdr_api", static_folder=None)
    app.extensions["cdr_api"] = Service(settings)
    app.config["MAX_CONTENT_LENGTH"] = 1024 * 1024
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.merge_slashes = False
    app.register_blueprint(api)
    if settings.pages == "on":
        app.register_blueprint(pages)
    register_handlers(app)
    if settings.proxies:
        n = settings.proxies
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=n, x_proto=n, x_host=n, x_prefix=n)  # type: ignore[method-assign]
    if settings.metrics == "on":
        from cdr_metrics import register_metrics  # noqa: PLC0415 (only who asks for it)

        register_metrics(app)
    from cdr_admin import register_commands  # noqa: PLC0415 (it needs this module whole)

    register_commands(app)
    return app
