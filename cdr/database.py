"""The connections of a worker to PostgreSQL, and all that is done below psycopg's own surface.

Whatever uses libpq directly (pgconn, generators) or a name that psycopg keeps to
itself stands in this file, so that a new psycopg is looked at in one place.
"""

from __future__ import annotations

import functools
import hashlib
import select
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import psycopg
from psycopg import conninfo, generators, pq, sql
from psycopg._encodings import pg2pyenc
from psycopg.abc import RV, PQGen
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool, PoolTimeout

from cdr.clients import Watch
from cdr.settings import Settings
from cdr.statements import STATEMENTS

CONNECTION_DEFAULTS = {
    "application_name": "cdr_api",
    "connect_timeout": "5",  # seconds, as are the next two: a dead host is noticed within a minute
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
}
# How long a server may say nothing when it looks up a few rows, in seconds.
LOOKUP_SECONDS = 10.0
# How long a request waits for a server that is known to be away, in seconds.
AWAY_SECONDS = 0.1
# So many statements are prepared on a connection: each takes PostgreSQL half a megabyte.
MOST_PREPARED = 10
WATCH_MILLISECONDS = 100  # while nothing comes, an answer's watch looks around so often
BEGIN_SHORT, COMMIT = (STATEMENTS[name].as_string().encode() for name in ("begin_short", "commit"))
BATCH_BYTES = 32 * 1024  # of COPY output; larger batches leave the processor's cache

Connection = psycopg.Connection[dict[str, Any]]


class PooledConnection(Connection):
    """A connection that gives up a server which says nothing for silence_seconds.

    TCP notices a host that is gone, but not a server process that hangs.
    """

    silence_seconds = LOOKUP_SECONDS
    has_stream_slot = True  # whether its transaction holds one of the account's
    indexed = False  # whether an index brings a domain's calls in their order
    epochs_indexed = False  # whether an index brings those of a range by its epochs, in 4.x
    probed = (
        False  # whether one of the two tells at once, of all of the table, if there are calls without a domain_uuid
    )
    lockable = True  # whether LOCK TABLE takes v_xml_cdr, which may be a foreign table
    foreign = False  # whether calls may be where LOCK TABLE does not reach, as on another server
    plain = False  # whether it was a plain table with a key when it was last looked at
    doubled = False  # whether nothing kept v_xml_cdr from holding a call twice when it was last looked at
    nameless = True  # whether there may be calls without a domain_uuid; in a transaction that take_stream_slot began
    zoned = False  # whether stamps are known to be timestamptz; in such a transaction
    isolated = False  # whether the snapshot of a statement by itself is older than its locks
    watch: Watch | None = None  # of the answer that it is read for
    home: Database  # whose pool it belongs to
    # The name of each statement that is prepared on it, by its text; None: there must be none.
    prepared: dict[str, str] | None = None

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        if self.watch:
            gen = watched(gen, self.watch)
        try:
            return super().wait(gen, interval, timeout or self.silence_seconds)
        except psycopg.errors._WaitTimeout:  # noqa: SLF001 (psycopg has no public name for it)
            self.close()
            raise psycopg.OperationalError("the server does not answer") from None

    def reading_committed(self) -> AbstractContextManager[object]:
        """A block in which each statement sees what was committed before it ran, whatever the role is set to.

        At another isolation level a table for whose ALTER TABLE it waited looks empty.
        """
        return self.transaction() if self.isolated else nullcontext()

    def give_back(self) -> None:
        """Puts the connection into its pool again, in any state."""
        self.home.give_back(self)


def watched(gen: PQGen[RV], watch: Watch) -> PQGen[RV]:
    """A generator of psycopg's, with a look at what else matters as often as it is resumed."""
    try:
        awaited = next(gen)
        while True:
            ready = yield awaited
            watch()
            awaited = gen.send(ready)
    except StopIteration as end:
        found: RV = end.value
        return found


def connect(dsn: str) -> Connection:
    """A connection outside a pool, for commands."""
    # Prepared statements would conflict with PgBouncer.
    return psycopg.connect(dsn, row_factory=dict_row, connect_timeout=5, client_encoding="UTF8", prepare_threshold=None)


def encrypt_password(connection: Connection, password: str, role: str) -> str:
    """What PostgreSQL keeps of a role's password (SCRAM): so the password itself reaches no log of it."""
    return connection.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256").decode()


def run(connection: Connection, statement: str, **parameters: Any) -> list[dict[str, Any]]:
    """The rows of a statement of queries.sql on a connection in hand."""
    cursor = connection.execute(STATEMENTS[statement], parameters)
    return cursor.fetchall() if cursor.rownumber is not None else []


def find_codec(encoding: str | None) -> str | None:
    """Python's name of one of PostgreSQL's encodings; None for UTF8, and for those that Python does not know.

    In SQL_ASCII PostgreSQL knows of no encoding: what is there is UTF-8 for the most part.
    """
    if encoding == "SQL_ASCII":
        return "utf-8"
    try:
        return pg2pyenc(encoding.encode()) if encoding and encoding != "UTF8" else None
    except psycopg.NotSupportedError:
        return None


def codec_of(connection: Connection) -> str | None:
    """That of a connection's database."""
    return find_codec(connection.info.parameter_status("server_encoding"))


# Pools ------------------------------------------------------------------------


class Database:
    """The connections of one worker to one server, opened at first use.

    At first use and not before, so that no connection is shared over a fork. So
    that PgBouncer may pool transactions, nothing is set for longer than one and no
    statement is prepared unless the server process is ours alone.
    """

    def __init__(self, dsn: str, settings: Settings) -> None:
        given = conninfo.conninfo_to_dict(dsn)
        defaults = {name: value for name, value in CONNECTION_DEFAULTS.items() if name not in given}
        self.timeout = settings.pool_timeout / 1000
        self.reachable = True
        self.pool: ConnectionPool[PooledConnection] = ConnectionPool(
            conninfo.make_conninfo(dsn, **defaults),
            connection_class=PooledConnection,
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

    def examine(self, connection: PooledConnection) -> None:
        """Looks for the index, and lets statements be prepared on a connection whose server process is its own.

        A PgBouncer tells a number of its own as that of the process.
        """
        self.note(reachable=True)
        found = run(connection, "examine_session")[0]
        for name in ("indexed", "epochs_indexed", "probed"):
            setattr(connection, name, found[name])
        is_own = found["pid"] == connection.info.backend_pid
        if is_own:
            run(connection, "set_session")
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED  # of its transactions
        connection.isolated = found["isolated"] and not is_own
        connection.prepared = {} if is_own else None
        tables = run_planned(connection, "examine_tables")[0]
        connection.lockable, connection.foreign = tables["lockable"], tables["foreign"]
        connection.doubled = tables["keyless"] is not None
        connection.plain = bool(run_planned(connection, "confirm_plain"))

    @contextmanager
    def connection(self) -> Iterator[PooledConnection]:
        """A checked connection in autocommit mode.

        Raises psycopg.OperationalError when none is to be had in time.
        """
        connection = self.borrow()
        try:
            yield connection
        finally:
            self.give_back(connection)

    def borrow(self) -> PooledConnection:
        """A checked connection, to be handed back by give_back."""
        self.pool.open()
        while not is_alive(connection := self.take()):
            connection.close()
            self.pool.putconn(connection)  # which makes a new one
        connection.home = self
        return connection

    def take(self) -> PooledConnection:
        """A connection of the pool; while the server is away the wait is short.

        In pieces, since a failure to connect does not end the pool's wait.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                return self.pool.getconn(timeout=AWAY_SECONDS)
            except PoolTimeout:
                if not self.reachable or time.monotonic() >= deadline:
                    raise

    def give_back(self, connection: PooledConnection) -> None:
        """Takes a connection in any state: cancels what runs on it, rolls back."""
        connection.silence_seconds = LOOKUP_SECONDS
        connection.nameless, connection.zoned = True, False
        watch, connection.watch = connection.watch, None
        if watch:
            watch.release()
        end_transaction(connection)
        self.pool.putconn(connection)

    def rows(self, statement: str, **parameters: Any) -> list[dict[str, Any]]:
        """The rows of one statement of queries.sql, run by itself."""
        with self.connection() as connection, connection.reading_committed():
            return run(connection, statement, **parameters)

    @functools.cached_property
    def encoding(self) -> str:
        """PostgreSQL's name of what the database's text is encoded in."""
        with self.connection() as connection:
            return connection.info.parameter_status("server_encoding") or "UTF8"

    @functools.cached_property
    def codec(self) -> str | None:
        """Python's name of it, where text has to be decoded by us; None where PostgreSQL gives UTF-8.

        PostgreSQL gives up an answer at the first byte that cannot be converted.
        """
        return find_codec(self.encoding)

    def close(self) -> None:
        self.pool.close()


# libpq ------------------------------------------------------------------------


def is_alive(connection: Connection) -> bool:
    """Whether an idle connection still has its server, without a round trip.

    An idle server says nothing: bytes that wait, or the end of the stream, mean
    that it has closed the connection.
    """
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return not poll.poll(0)


def end_transaction(connection: PooledConnection) -> None:
    """Makes a connection fit for the pool again: cancels what runs, rolls back."""
    pgconn = connection.pgconn
    try:
        if pgconn.transaction_status == pq.TransactionStatus.ACTIVE:
            connection.cancel_safe(timeout=5)
            results = connection.wait(generators.fetch_many(pgconn), timeout=5)
            while results and results[-1].status == pq.ExecStatus.COPY_OUT:
                for _ in copy_rows(connection, milliseconds=5_000):
                    pass
                results = connection.wait(generators.fetch_many(pgconn), timeout=5)
        if pgconn.transaction_status != pq.TransactionStatus.IDLE:
            try:
                connection.rollback()
            except psycopg.errors.QueryCanceled:  # the cancellation came late, and met this
                connection.rollback()
    except psycopg.Error:
        connection.close()


def prepare(connection: PooledConnection, query: str) -> str:
    """The name under which a query with $1, $2, … is prepared on the connection, now at the latest.

    psycopg is not told: of its own prepared statements it leaves behind those that fail.
    """
    prepared = connection.prepared
    if prepared is None:
        raise psycopg.NotSupportedError("this connection may get another server process")
    name = prepared.pop(query, None)
    if name is None:
        if len(prepared) >= MOST_PREPARED:
            unused = next(iter(prepared))  # for longest
            connection.execute(STATEMENTS["deallocate"].format(name=sql.Identifier(prepared[unused])))
            del prepared[unused]
        name = "cdr_api_" + hashlib.sha256(query.encode()).hexdigest()[:16]
        connection.execute(STATEMENTS["prepare"].format(name=sql.Identifier(name), query=sql.SQL(query)))
    prepared[query] = name
    return name


def prepare_planned(connection: PooledConnection, statement: str) -> str:
    """The name under which a statement of queries.sql without parameters is prepared."""
    return prepare(connection, STATEMENTS[statement].as_string().replace("%%", "%"))


def run_planned(connection: PooledConnection, statement: str) -> list[dict[str, Any]]:
    """The rows of a statement of queries.sql without parameters on catalogs, planned once for the connection.

    Not for tables: to EXECUTE one that was being rewritten would look empty.
    """
    if connection.prepared is None:
        return run(connection, statement)
    name = sql.Identifier(prepare_planned(connection, statement))
    return connection.execute(STATEMENTS["execute_planned"].format(name=name)).fetchall()


def select_prepared(connection: PooledConnection, name: str, parameters: Sequence[bytes]) -> list[bytes]:
    """The only column of a prepared statement's rows, by the extended protocol.

    Not by EXECUTE, to which a table that was being rewritten would look empty.
    """
    connection.pgconn.send_query_prepared(name.encode(), list(parameters))
    return first_column(check_results(connection.wait(generators.execute(connection.pgconn))))


def select_short(
    connection: PooledConnection, settings: Sequence[bytes], name: str, parameters: Sequence[bytes], after: str
) -> tuple[list[bytes], list[bytes]]:
    """The only column of a prepared statement's rows, in one round trip with a transaction of its own.

    And the first row of another one, which comes after it, if it has one. settings: statements that come before it.
    Raises psycopg.Error if one of them fails.
    """
    pgconn = connection.pgconn
    pgconn.enter_pipeline_mode()
    try:
        for statement in (BEGIN_SHORT, *settings):
            pgconn.send_query_params(statement, None)
        pgconn.send_query_prepared(name.encode(), parameters)
        pgconn.send_query_prepared(after.encode(), [])
        pgconn.send_query_params(COMMIT, None)
        pgconn.pipeline_sync()
        results = connection.wait(read_pipeline(pgconn))
        pgconn.exit_pipeline_mode()
    except BaseException:
        connection.close()  # in the middle of a pipeline it is of no more use
        raise
    check_results(results)
    calls, last = results[len(settings) + 1 : len(settings) + 3]
    return first_column(calls), [last.get_value(0, column) or b"" for column in range(last.nfields) if last.ntuples]


def read_pipeline(pgconn: pq.abc.PGconn) -> PQGen[list[pq.abc.PGresult]]:
    """The results of a pipeline's statements, when all of it is done."""
    found = yield from generators.execute(pgconn)
    results = list(found)
    while found[-1].status != pq.ExecStatus.PIPELINE_SYNC:
        found = yield from generators.fetch_many(pgconn)
        results += found
    return results


def first_column(result: pq.abc.PGresult) -> list[bytes]:
    return [result.get_value(row, 0) or b"" for row in range(result.ntuples)]


def check_results(results: list[pq.abc.PGresult]) -> pq.abc.PGresult:
    """The last result of a query's statements so far; raises psycopg.Error if one failed."""
    for result in results:
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(result, encoding="utf-8")
    return results[-1]


def copy_rows(connection: PooledConnection, milliseconds: int) -> Iterator[memoryview]:
    """The rows of the COPY that runs, its end of success or failure not yet read.

    Raises psycopg.OperationalError when nothing comes for so long.
    """
    pgconn, silent = connection.pgconn, 0
    poll = select.poll()
    poll.register(pgconn.socket, select.POLLIN)
    while (found := pgconn.get_copy_data(1))[0] >= 0:
        if found[0]:
            silent = 0
            yield found[1]
        elif poll.poll(WATCH_MILLISECONDS):
            pgconn.consume_input()
        elif (silent := silent + WATCH_MILLISECONDS) >= milliseconds:
            raise psycopg.OperationalError("the server stopped in the middle of its answer")
        elif connection.watch:
            connection.watch()


def copy_batches(connection: PooledConnection, query: bytes) -> Iterator[list[memoryview]]:
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
        for row in copy_rows(connection, int(connection.silence_seconds * 1000)):
            rows.append(row)
            size += len(row)
            if size >= BATCH_BYTES:
                yield rows
                rows, size = [], 0
        results = connection.wait(generators.fetch_many(pgconn))
    if rows:
        yield rows
