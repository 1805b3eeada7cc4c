"""PostgreSQL servers of a test's own, to be stopped, killed, paused and replicated; what a server is busy with."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg

import demo
from tests.conftest import ROOT, Database, wait_for

AWAY = (psycopg.OperationalError, psycopg.InterfaceError)  # what a crash looks like from a session


@dataclass
class Node:
    """A PostgreSQL with one FusionPBX; server is where its programs come from."""

    server: demo.PostgresServer
    data: Path
    socket: Path
    name = "fusionpbx"

    def run(self, program: str, *options: str) -> None:
        # No pipes: a postmaster would inherit them, and they would never end. PostgreSQL refuses to run as root.
        quiet, user = subprocess.DEVNULL, self.server.system_user
        command = [str(self.server.bin_path / program), *options]
        subprocess.run(command, check=True, user=user, cwd="/", stdout=quiet, stderr=quiet, timeout=120)

    def control(self, *options: str) -> None:
        self.run("pg_ctl", "-w", "-D", str(self.data), *options)

    def start(self) -> None:
        self.control("-o", f'-h "" -k {shlex.quote(str(self.socket))}', "-l", str(self.data / "log"), "start")

    def stop(self) -> None:
        """Without waiting for sessions to end, but for standbys to have everything."""
        if (self.data / "postmaster.pid").exists():
            self.control("-m", "fast", "stop")

    def crash(self) -> None:
        """Stops without writing anything that is still in memory, and recovers."""
        self.control("-m", "immediate", "stop")
        self.start()

    def kill(self) -> None:
        """As the kernel does when memory runs out."""
        os.kill(self.postmaster(), signal.SIGKILL)

    def recover(self) -> None:
        """Starts after a kill, once the orphans have noticed it."""

        def started() -> bool:
            with suppress(subprocess.CalledProcessError):
                self.start()
                return True
            return False

        wait_for(started, 60)

    def postmaster(self) -> int:
        return int((self.data / "postmaster.pid").read_text("ascii").split()[0])

    def send_all(self, number: int) -> None:
        """Sends a signal to every process of the server, its postmaster first."""
        pid = self.postmaster()
        os.kill(pid, number)
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split():
            with suppress(ProcessLookupError):  # it may end by itself
                os.kill(int(child), number)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """As on a machine that hangs: connections stay, and nothing is said on them."""
        self.send_all(signal.SIGSTOP)
        try:
            yield
        finally:
            self.send_all(signal.SIGCONT)

    def dsn(self, user: str = "postgres", *others: Node) -> str:
        """Of this server, and then of others that are tried in turn."""
        hosts = ",".join(quote(str(node.socket)) for node in (self, *others))
        return f"postgresql://{user}:@/{self.name}?host={hosts}"

    def connect(self) -> demo.Connection:
        return psycopg.connect(self.dsn(), autocommit=True)

    def execute(self, statement: str) -> None:
        with self.connect() as connection:
            connection.execute(statement)

    def sessions(self, condition: str = "true") -> list[int]:
        """The processes that serve the service's connections, those that wait for a client and so on."""
        with self.connect() as connection:
            query = f"SELECT pid FROM pg_stat_activity WHERE usename = 'cdr_api' AND {condition}"
            return [row[0] for row in connection.execute(query)]

    def value(self, query: str) -> Any:
        with self.connect() as connection:
            row = connection.execute(query).fetchone()
        return row and row[0]


def run_schema(database: Database | Node, side_tables: str = "") -> list[str]:
    """Runs schema.sql, with a word as its head says if there is one; gives what it warns of."""
    warnings: list[str] = []
    with database.connect() as connection:
        connection.add_notice_handler(
            lambda notice: warnings.append(notice.message_primary or "") if notice.severity == "WARNING" else None
        )
        if side_tables:
            connection.execute(f"SET cdr_api.side_tables = '{side_tables}'")
        connection.execute((ROOT / "schema.sql").read_text("utf-8"))
    return warnings


@contextmanager
def own_node(*settings: str) -> Iterator[Node]:
    """A server with the database of a FusionPBX that has no calls, and settings such as "fsync = off"."""
    folder = Path(tempfile.mkdtemp(prefix="cdr-api-"))
    server = demo.start_server(folder / "postgresql")
    node = Node(server, server.data, server.socket)
    with demo.connect(server) as connection:
        for setting in settings:
            connection.execute(f"ALTER SYSTEM SET {setting}")
    node.stop()
    node.start()
    demo.create_database(server, node.name)
    yield node
    node.stop()
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def standby_of(node: Node, name: str = "standby") -> Iterator[Node]:
    """A streaming standby, of a standby too, made by a base backup, that has caught up."""
    folder = node.data.parent / name
    folder.mkdir(mode=0o700)
    if node.server.system_user:
        shutil.chown(folder, node.server.system_user)
    source = ("-h", str(node.socket), "-U", "postgres")
    node.run("pg_basebackup", *source, "-D", str(folder), "-c", "fast", "-X", "stream", "-R")
    for copied in folder.glob(".s.PGSQL*"):
        copied.unlink()
    standby = Node(node.server, folder, folder)
    standby.start()
    wait_for(lambda: has_replayed(standby, written(node)))
    try:
        yield standby
    finally:
        standby.stop()


def written(node: Node) -> str:
    """Up to where a server has written its WAL, or a standby replayed it."""
    replayed, current = "pg_last_wal_replay_lsn()", "pg_current_wal_lsn()"
    return str(node.value(f"SELECT CASE WHEN pg_is_in_recovery() THEN {replayed} ELSE {current} END"))


def is_stuck(standby: Node) -> bool:
    """Whether replay stands still behind what was received, as it does where a query is in its way."""
    behind = "pg_last_wal_replay_lsn() < pg_last_wal_receive_lsn()"
    looks = {standby.value(f"SELECT CASE WHEN {behind} THEN pg_last_wal_replay_lsn()::text END") for _ in range(10)}
    return len(looks) == 1 and None not in looks


def has_replayed(standby: Node, position: str) -> bool:
    return bool(standby.value(f"SELECT pg_last_wal_replay_lsn() >= '{position}'"))


def last_position(node: Node) -> str:
    """Where the checkpoint of a server that was stopped lies: the last that it wrote."""
    command = [str(node.server.bin_path / "pg_controldata"), "-D", str(node.data)]
    user, english = node.server.system_user, {"LC_ALL": "C"}
    output = subprocess.run(command, check=True, user=user, cwd="/", env=english, stdout=subprocess.PIPE).stdout
    lines = output.decode().splitlines()
    return next(line.split()[-1] for line in lines if line.startswith("Latest checkpoint location"))


def active_copies(database: Database) -> list[int]:
    """The processes of PostgreSQL that are sending the service something."""
    query = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND usename = 'cdr_api' AND state = 'active'"
    return [row[0] for row in database.execute(query, [database.name])]


def peak_memory(pid: int) -> int:
    """The peak of a process's resident memory since it was last reset, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


@contextmanager
def slow(execute: Callable[[str], object], seconds: float = 0.001, calls: str = "true") -> Iterator[None]:
    """Every call, or those of a condition, takes PostgreSQL so long, in the database that is told to execute.

    The service finds a view before the table; whatever connection it has ends, so that it does.
    """
    end = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = current_database()"
    setting = "ALTER ROLE cdr_api IN DATABASE %I {} search_path"
    execute("CREATE SCHEMA slow")
    sleeps = f"CASE WHEN {calls} THEN pg_sleep({seconds}) IS NOT NULL ELSE true END"
    execute(f"CREATE VIEW slow.v_xml_cdr AS SELECT * FROM v_xml_cdr WHERE {sleeps}")
    execute("GRANT USAGE ON SCHEMA slow TO cdr_api")
    execute("GRANT SELECT ON slow.v_xml_cdr TO cdr_api")
    execute(f"DO $$BEGIN EXECUTE format('{setting.format('SET')} = slow, public', current_database()); END$$")
    execute(f"{end} AND usename = 'cdr_api'")
    try:
        yield
    finally:
        execute(f"DO $$BEGIN EXECUTE format('{setting.format('RESET')}', current_database()); END$$")
        execute(f"{end} AND usename = 'cdr_api'")
        execute("DROP SCHEMA slow CASCADE")
