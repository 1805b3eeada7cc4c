"""What a worker holds, handed to whatever needs it; and the transaction that an answer reads in."""

from __future__ import annotations

import functools
import logging
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import psycopg
from psycopg import sql

from cdr.clients import Client, Shares, Watch
from cdr.database import LOOKUP_SECONDS, Database, PooledConnection, run, run_planned
from cdr.errors import ApiError, refuse, unavailable
from cdr.passwords import Passwords
from cdr.requestlog import AuthLog, RequestLog
from cdr.settings import Settings
from cdr.statements import STATEMENTS, mogrify

log = logging.getLogger("cdr_api")

# The database's time zone when the service started. gunicorn's master sets it before it
# forks: so all workers answer in one zone, whatever the database is set to meanwhile.
zone_at_start = ""
REPEAT_SECONDS = 3600  # until the same warning is written again


@functools.cache
def compose_begin(*, lockable: bool) -> sql.Composed:
    """begin_read, with the lock where v_xml_cdr can be locked."""
    lock = sql.SQL("\n") + STATEMENTS["lock_calls"] + sql.SQL(";") if lockable else sql.SQL("")
    return STATEMENTS["begin_read"].format(lock=lock)


def set_encoding(database: Database) -> str:
    """What stands before a query whose rows we decode; nothing where PostgreSQL gives UTF-8."""
    if database.codec is None:
        return ""
    encoding = sql.Literal(database.encoding)
    return STATEMENTS["set_encoding"].format(encoding=encoding).as_string() + ";\n"


class Service:
    """The settings, the pools, the stream slots, the passwords, the logs and the signing key of a worker."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # Two connections are kept for short answers, as far as there are so many.
        self.long_slots = threading.BoundedSemaphore(max(1, settings.threads - 2))
        self.shares = Shares(max(1, settings.threads // 4), settings.pool_timeout / 1000)
        self.passwords = Passwords(settings.threads)
        self.request_log = RequestLog(settings.log)
        self.auth_log = AuthLog(settings.syslog) if settings.syslog != "off" else None
        self.warned: dict[str, float] = {}  # when each warning was last written, by time.monotonic()
        self.settled: set[str] = set()  # the warnings whose cause is not there
        self.fallbacks: set[tuple[str, str]] = set()
        self.domains = Database(settings.dsn, settings)
        self.accounts = Database(settings.accounts_dsn, settings) if settings.accounts_dsn else self.domains
        self.calls = Database(settings.calls_dsn, settings) if settings.calls_dsn else self.domains

    @property
    def known_zone(self) -> str:
        """The name of the service's zone, "" where the database would have to be asked for it."""
        return self.settings.timezone or zone_at_start

    @functools.cached_property
    def time_zone(self) -> str:
        """The name of the zone that stamps are shown and read in."""
        if self.known_zone:
            return self.known_zone
        with self.calls.connection() as connection:
            return connection.info.parameter_status("TimeZone") or "UTC"

    @functools.cached_property
    def secret(self) -> bytes:
        """The key that signs cursors, the same on every worker and machine."""
        if not self.accounts.rows("find_secret", name="cursor"):
            self.accounts.rows("insert_secret", name="cursor", value=secrets.token_bytes(32))
        return bytes(self.accounts.rows("find_secret", name="cursor")[0]["value"])

    @property
    def is_apart(self) -> bool:
        """Whether the side tables are in another database than v_domains."""
        return self.accounts is not self.domains

    @property
    def databases(self) -> dict[str, Database]:
        """Each once, by the first that it is for."""
        found = {"accounts": self.accounts}
        for name, database in (("domains", self.domains), ("calls", self.calls)):
            if database not in found.values():
                found[name] = database
        return found

    def close(self) -> None:
        """Ends the pools, and with them their threads."""
        for database in self.databases.values():
            database.close()

    # Told to the operator

    def warn(self, name: str, text: str) -> None:
        """Writes down, once an hour, that requests arrive in another way than they should; flask check tells it."""
        now = time.monotonic()
        if now - self.warned.get(name, -REPEAT_SECONDS) < REPEAT_SECONDS:
            return
        self.warned[name] = now
        self.settled.discard(name)
        log.warning("%s: %s", name, text)
        with suppress(psycopg.Error):
            self.accounts.rows("upsert_warning", name=name, text=text)

    def settle(self, name: str) -> None:
        """Takes a warning back, once: a request has arrived as it should."""
        if name not in self.settled:
            self.settled.add(name)
            self.warned.pop(name, None)
            with suppress(psycopg.Error):
                self.accounts.rows("delete_warning", name=name)

    def report_failure(self, name: str, address: str | None) -> None:
        """Tells syslog of a login or token that was wrong, if the client's address is known."""
        if self.auth_log and address:
            self.auth_log.report(address, name)

    def note_fallback(self, statement: str, error: psycopg.Error) -> None:
        """Counts that a prepared statement failed, and logs it the first time for each reason.

        An answer that always falls back costs twice, and looks right.
        """
        reason = error.sqlstate or type(error).__name__
        if (statement, reason) not in self.fallbacks:
            self.fallbacks.add((statement, reason))
            log.warning("%s cannot be run prepared and is streamed instead (%s): %s", statement, reason, error)
        for observer in self.request_log.observers:
            observer.fallback(statement, reason)

    # Reading calls

    @contextmanager
    def reading(
        self, account_id: int, client: Client, *, sort: bool, zone: str | None = None, elsewhere: bool = True
    ) -> Iterator[PooledConnection]:
        """A connection for calls in a transaction of its own; both are the block's to end or hand on.

        Takes the connection back if the block fails. sort: whether the planner may
        sort instead of going through an index in its order. zone: that of stamps. elsewhere:
        whether calls on other servers are read.

        While it waits, the client is watched, and what takes longer than a second
        takes one of the worker's slots for long answers: ApiError 499 or 503.

        Where the account has as many long answers under way as it may have, a
        statement gets a second; then ApiError 429.
        """
        parameters = self.reading_parameters(sort=sort, zone=zone)
        _ = self.calls.codec  # before a connection is held: it may take one of its own
        connection = self.lend(self.calls, account_id, client)
        try:
            connection.silence_seconds = self.settings.statement_timeout / 1000 + LOOKUP_SECONDS
            with self.holding_foreign_calls(connection) if elsewhere else nullcontext():
                alone = connection.indexed and not sort
                self.begin(connection, {**parameters, "account_id": account_id, "alone": alone})
            yield connection
        except BaseException as error:
            if isinstance(error, psycopg.errors.WrongObjectType):
                connection.close()  # the next one looks again at what kind of table there is
            out_of_slots = isinstance(error, psycopg.errors.QueryCanceled) and not connection.has_stream_slot
            self.calls.give_back(connection)  # from here on it may be another request's
            if out_of_slots:
                raise self.too_many_streams() from None
            if isinstance(error, psycopg.errors.InvalidParameterValue) and zone not in (None, self.time_zone):
                refuse("tz", "is not a time zone that the database knows")
            raise

    @contextmanager
    def holding_foreign_calls(self, connection: PooledConnection) -> Iterator[None]:
        """Keeps calls on other servers from being rewritten while the block begins the connection's transaction.

        And calls that a view reads by a function. LOCK TABLE does not reach them, and a snapshot that was taken before
        their table is locked, as postgres_fdw takes it, finds that empty after an ALTER TABLE that it waited for. So
        another transaction locks it before this one's snapshot is taken.
        """
        if not connection.foreign:
            yield
            return
        with self.calls.connection() as holder:
            run(holder, "begin_list")
            run(holder, "touch_calls")
            yield
            patience, connection.silence_seconds = connection.silence_seconds, LOOKUP_SECONDS
            run(connection, "touch_calls")
            connection.silence_seconds = patience

    def lend(self, database: Database, account_id: int, client: Client) -> PooledConnection:
        """A connection with a watch, of the account's share, which Database.give_back takes."""
        self.shares.take(account_id)
        watch = Watch(self.long_slots, client, functools.partial(self.shares.give_back, account_id))
        try:
            connection = database.borrow()
        except BaseException:
            watch.release()
            raise
        connection.watch = watch
        return connection

    @contextmanager
    def listing(self, account_id: int, client: Client) -> Iterator[PooledConnection]:
        """A connection for a long list of domains, in a transaction: as that of reading, without its slots."""
        _ = self.domains.codec  # before a connection is held: it may take one of its own
        connection = self.lend(self.domains, account_id, client)
        connection.has_stream_slot = True
        try:
            run(connection, "begin_list")
            yield connection
        except BaseException:
            connection.give_back()
            raise

    def reading_parameters(self, *, sort: bool, zone: str | None = None) -> dict[str, Any]:
        """The parameters of begin_read and take_stream_slot that do not depend on the connection."""
        return {
            "enable_sort": "on" if sort else "off",
            "time_zone": zone or self.time_zone,
            "statement_timeout": self.settings.statement_timeout,
            "streams": self.settings.account_streams,
        }

    def begin(self, connection: PooledConnection, parameters: Mapping[str, Any]) -> None:
        """Opens a transaction, with one of the account's stream slots if there is one left."""
        parameters = {**parameters, "probed": connection.probed}
        begin_read = compose_begin(lockable=connection.lockable).as_string()
        take_stream_slot = STATEMENTS["take_stream_slot"].as_string()
        cursor = connection.execute(mogrify(connection, f"{begin_read};{take_stream_slot}", parameters))
        while cursor.nextset():
            pass
        found = cursor.fetchall()[0]
        connection.has_stream_slot, connection.nameless = found["has_slot"], found["nameless"]
        tables = run_planned(connection, "examine_tables")[0]
        if (tables["foreign"] and not connection.foreign) or tables["lockable"] != connection.lockable:
            connection.close()  # the next one looks again at what has to be locked
            raise unavailable("The tables of calls have just been changed: try again.", seconds=1)
        connection.doubled, connection.zoned = tables["keyless"] is not None, tables["zoned"]

    def too_many_streams(self) -> ApiError:
        limit = self.settings.account_streams
        message = f"This account has {limit} long answers under way already: wait for one of them to end."
        return ApiError(429, message, headers={"Retry-After": "5"})
