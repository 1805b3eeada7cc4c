"""Patroni from Debian with three nodes, whose leader is killed under load (make test-clusters shows the counts)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest

import demo
from cdr_api import create_app
from tests.clients import fetch
from tests.commands import flask
from tests.conftest import PASSWORD, ROOT, Gunicorn, free_port, serve, wait_for
from tests.servers import AWAY

BIN = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), Path("/nowhere"))
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(
        not (shutil.which("patroni") and shutil.which("etcd") and BIN.is_dir()),
        reason="Patroni is not here; on Debian and Ubuntu: apt install patroni etcd-server postgresql",
    ),
]
ALPHA = demo.DOMAINS[0]
TTL = 20  # seconds that a leader is not heard until another takes its place; Patroni takes no less


@dataclass
class Member:
    name: str
    port: int
    folder: Path
    process: subprocess.Popen[bytes] | None = None

    def role(self) -> str | None:
        """What PostgreSQL says that it is, not what Patroni thinks."""
        with suppress(*AWAY), psycopg.connect(f"host=127.0.0.1 port={self.port} user=postgres") as connection:
            row = connection.execute("SELECT pg_is_in_recovery()").fetchone()
            return "standby" if row and row[0] else "leader"
        return None

    def kill(self) -> None:
        """As a machine that loses its power: Patroni and PostgreSQL at once."""
        if self.process:
            self.process.kill()
            self.process.wait(60)
        with suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((self.folder / "data/postmaster.pid").read_text("ascii").split()[0]), signal.SIGKILL)


@dataclass
class Cluster:
    """Three members and one etcd, on ports of this machine."""

    folder: Path
    user: str | None
    etcd_port: int = field(default_factory=free_port)
    members: list[Member] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def run(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, user=self.user, cwd=self.folder, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def start_etcd(self) -> None:
        client, peer = f"http://127.0.0.1:{self.etcd_port}", f"http://127.0.0.1:{free_port()}"
        urls = ("--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer)
        cluster = ("--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}")
        self.run("etcd", "etcd", "--data-dir", str(self.folder / "etcd"), *urls, *cluster)

    def start(self, member: Member) -> None:
        """JSON is YAML, which Patroni reads."""
        path = self.folder / f"{member.name}.yml"
        path.write_text(json.dumps(self.configuration(member)), "utf-8")
        member.process = self.run(member.name, "patroni", str(path))

    def configuration(self, member: Member) -> dict[str, object]:
        """What docs/clusters.md names, and fewer seconds than Patroni's own defaults."""
        rest, address = f"127.0.0.1:{free_port()}", f"127.0.0.1:{member.port}"
        dcs = {"ttl": TTL, "loop_wait": 2, "retry_timeout": 3, "synchronous_mode": True}
        everybody = [f"host {database} all 127.0.0.1/32 trust" for database in ("all", "replication")]
        return {
            "scope": "cdr",
            "name": member.name,
            "restapi": {"listen": rest, "connect_address": rest},
            "etcd3": {"host": f"127.0.0.1:{self.etcd_port}"},
            "bootstrap": {"dcs": dcs, "initdb": [{"encoding": "UTF8"}, {"locale": "C"}, {"auth": "trust"}]},
            "postgresql": {
                "listen": address,
                "connect_address": address,
                "data_dir": str(member.folder / "data"),
                "bin_dir": str(BIN),
                "pgpass": str(member.folder / "pgpass"),
                "pg_hba": everybody,
                "authentication": {"superuser": {"username": "postgres"}, "replication": {"username": "replicator"}},
                "parameters": {"unix_socket_directories": str(member.folder)},
            },
        }

    def add_members(self, *names: str) -> None:
        for name in names:
            member = Member(name, free_port(), self.folder / name)
            member.folder.mkdir(mode=0o700)
            if self.user:
                shutil.chown(member.folder, self.user)
            self.members.append(member)
            self.start(member)

    def leader(self) -> Member | None:
        return next((member for member in self.members if member.role() == "leader"), None)

    def is_whole(self) -> bool:
        roles = [member.role() for member in self.members]
        return roles.count("leader") == 1 and roles.count("standby") == len(roles) - 1 and self.has_synchronous()

    def has_synchronous(self) -> bool:
        with psycopg.connect(self.dsn()) as connection:
            row = connection.execute("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'").fetchone()
        return bool(row and row[0])

    def dsn(self, user: str = "postgres", name: str = "postgres") -> str:
        """Every member by name, of which the one is chosen that writes."""
        hosts, ports = ",".join("127.0.0.1" for _ in self.members), ",".join(str(m.port) for m in self.members)
        chosen = "target_session_attrs=read-write connect_timeout=3"
        return f"host={hosts} port={ports} user={user} dbname={name} {chosen}"

    def connect(self) -> demo.Connection:
        return psycopg.connect(self.dsn(name="fusionpbx"), autocommit=True)


@pytest.fixture
def cluster(server: demo.PostgresServer) -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="cdr-api-"))
    if server.system_user:
        shutil.chown(folder, server.system_user)
    cluster = Cluster(folder, server.system_user)
    try:
        cluster.start_etcd()
        cluster.add_members("one", "two", "three")
        wait_for(cluster.leader, 60)
        wait_for(cluster.is_whole, 90)
        set_up(cluster)
        yield cluster
    finally:
        for member in cluster.members:
            member.kill()
        for process in cluster.processes:
            process.kill()
            process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def set_up(cluster: Cluster) -> None:
    with psycopg.connect(cluster.dsn(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE fusionpbx")
    with cluster.connect() as connection:
        demo.create_tables(connection, demo.NEWEST)
        demo.add_domain(connection, ALPHA)
        connection.execute((ROOT / "schema.sql").read_text("utf-8"))
        connection.execute("ALTER ROLE cdr_api LOGIN")
        connection.execute(demo.INDEX)


@dataclass
class Load:
    """A writer, readers and a poller until they are told to stop: what they saw, and when."""

    cluster: Cluster
    gunicorn: Gunicorn
    token: str
    over: threading.Event = field(default_factory=threading.Event)
    committed: set[str] = field(default_factory=set)
    doubtful: set[str] = field(default_factory=set)  # the answer to their COMMIT was lost
    seen: Counter[str] = field(default_factory=Counter)  # route and status
    failed: list[float] = field(default_factory=list)  # when an answer was not 200, by time.monotonic()
    delivered: Counter[str] = field(default_factory=Counter)
    place: str = "from=2026-01-01"

    def write(self) -> None:
        while not self.over.is_set():
            with suppress(*AWAY), self.cluster.connect() as connection:
                while not self.over.is_set():
                    uuid = str(uuid4())
                    self.doubtful.add(uuid)
                    connection.execute(
                        "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_uuid, domain_name, end_stamp)"
                        " SELECT %s, domain_uuid, domain_name, now() FROM v_domains",
                        [uuid],
                    )
                    self.doubtful.discard(uuid)
                    self.committed.add(uuid)
                    self.over.wait(0.02)

    def ask(self, path: str) -> dict[str, object]:
        """An answer of 200, or nothing and a note of what came instead."""
        try:
            answer = fetch(f"{self.gunicorn.url}/api/{path}", self.token, seconds=30)
        except (OSError, HTTPException):
            self.note(path, "broken")
            return {}
        self.note(path, answer.status_code)
        return {"headers": answer.headers, "body": answer.get_json()} if answer.status_code == 200 else {}

    def note(self, path: str, status: object) -> None:
        self.seen[f"{path.partition('?')[0]} {status}"] += 1
        if status != 200:
            self.failed.append(time.monotonic())

    def read(self) -> None:
        while not self.over.is_set():
            self.ask(f"calls?domain_name={ALPHA}&limit=50&fields=xml_cdr_uuid")

    def poll(self) -> None:
        found = self.ask(f"call_feed?fields=xml_cdr_uuid&{self.place}")
        if found:
            self.place = f"cursor={found['headers']['X-Next-Cursor']}"  # type: ignore[index]
            self.delivered.update(call["xml_cdr_uuid"] for call in found["body"])  # type: ignore[attr-defined]

    def poll_on(self) -> None:
        while not self.over.is_set():
            self.poll()
            self.over.wait(0.2)

    def run(self, play: Callable[[], None]) -> None:
        threads = [threading.Thread(target=work) for work in (self.write, self.read, self.read, self.poll_on)]
        for thread in threads:
            thread.start()
        try:
            play()
        finally:
            self.over.set()
            for thread in threads:
                thread.join(60)


def test_when_the_leader_is_killed_nothing_that_was_committed_is_lost(cluster: Cluster) -> None:
    dsn = cluster.dsn("cdr_api", "fusionpbx")
    app = create_app({"CDR_API_DSN": dsn, "CDR_API_SYSLOG": "off"})
    named = ("user", "add", "b@example.com", "--name", "B", "--domain", ALPHA, "--password-stdin")
    assert flask(app, *named, stdin=f"{PASSWORD}\n").exit_code == 0
    token = flask(app, "token", "create", "b@example.com").stdout.strip()
    with serve(dsn, CDR_API_WORKERS="2") as gunicorn:
        load = Load(cluster, gunicorn, token)
        killed: list[float] = []

        def play() -> None:
            wait_for(lambda: len(load.committed) > 100 and len(load.delivered) > 50, 60)
            before = len(load.committed)
            leader = cluster.leader()
            assert leader
            killed.append(time.monotonic())
            leader.kill()
            wait_for(lambda: len(load.committed) > before + 100, 90)  # another one takes writes
            cluster.start(leader)  # and the one that was killed comes back, as a standby
            wait_for(cluster.is_whole, 120)

        load.run(play)
        load.poll()
    with cluster.connect() as connection:
        stored = {str(row[0]) for row in connection.execute("SELECT xml_cdr_uuid FROM v_xml_cdr")}
    assert load.committed - stored == set()  # by the synchronous standby
    assert stored - load.committed <= load.doubtful
    assert set(load.delivered) == stored
    assert set(load.delivered.values()) == {1}
    assert {status.split()[-1] for status in load.seen} <= {"200", "503", "broken"}
    away = max(load.failed) - killed[0]
    assert away < TTL + 20
    print(f"\n{dict(load.seen)}; last failure {away:.1f} s after the kill;")  # noqa: T201
    print(f"{len(load.committed)} calls committed, {len(load.delivered)} delivered, {len(stored)} stored")  # noqa: T201
