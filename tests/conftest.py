"""One embedded PostgreSQL for the run; a database per module; the service as role cdr_api.

With --pgbouncer the service reaches PostgreSQL through a PgBouncer in transaction
mode; what a test does as a superuser never goes through it. With --postgresql another
version's programs take the place of the embedded PostgreSQL's.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
from flask import Flask
from psycopg.rows import dict_row
from werkzeug.test import TestResponse

import cdr_api
import demo
from cdr.accounts import email_key, new_token
from cdr.database import run
from tests.encoders import build_encoder, hide_encoder

ROOT = Path(__file__).parent.parent
PLACES = ("*.py", "cdr/*.py", "cdr_setup/*.py")
SOURCES = [file for place in PLACES for file in sorted(ROOT.glob(place))]  # of the program
# Debian keeps it where only root's PATH leads.
PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin") or ""
UNTIL = 1_795_000_000  # 2026-11-18T11:06:40Z, when the last invented call ended
PASSWORD = "correct-horse-battery-staple"
PASSWORD_HASH = (  # of PASSWORD, so that not every account costs a scrypt
    "scrypt:32768:8:1$gVU6FlkVyjvAq2lI$"
    "145866eafcfd103cc937d0ba6c3d93357bd4374addd69a9f5f7e9892be4a56d4"
    "2e7fdcfc16a47cffed94cebc9cce567c06eb869708510afd0b1f5ecf7dc00cd6"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pgbouncer", action="store_true", help="put a PgBouncer between the service and PostgreSQL")
    parser.addoption("--clusters", action="store_true", help="run only what makes a cluster, which takes minutes")
    parser.addoption("--postgresql", type=Path, help="the folder of another PostgreSQL's programs (initdb, pg_ctl, …)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "direct(reason): is left out under --pgbouncer, for a reason")
    config.addinivalue_line("markers", "cluster: is run by --clusters, which runs nothing else")
    if config.getoption("pgbouncer") and not PGBOUNCER:
        raise pytest.UsageError("--pgbouncer needs the program pgbouncer; on Debian and Ubuntu: apt install pgbouncer")
    programs = config.getoption("postgresql")
    if programs and not (programs / "initdb").is_file():
        raise pytest.UsageError(f"--postgresql needs the folder of PostgreSQL's programs; {programs} has no initdb")


def need(program: str) -> None:
    """Skips a test for whose shell or threads the machine lacks a program."""
    if not shutil.which(program):
        pytest.skip(f"needs {program}")


def skip_without_program() -> Generator[None, Any, Any]:
    """A test that starts a program which the machine lacks skips; all that is needed is Python and make."""
    try:
        return (yield)
    except FileNotFoundError as error:
        if isinstance(error.filename, str) and "/" not in error.filename:
            need(error.filename)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, Any, Any]:
    return (yield from skip_without_program())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    return (yield from skip_without_program())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    others = [item for item in items if bool(item.get_closest_marker("cluster")) != config.getoption("clusters")]
    if config.getoption("pgbouncer"):
        others += [item for item in items if item.get_closest_marker("direct")]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]
    items.sort(key=lambda item: item.path.stem != "test_torture")  # long, and by its name among the last
    seen: Counter[str] = Counter()
    for item in items:  # schemathesis names all of its tests alike, and of those pytest-xdist runs one
        seen[item.nodeid] += 1
        if seen[item.nodeid] > 1:
            item._id = replace(item.id, params=str(seen[item.nodeid]))  # noqa: SLF001


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[demo.PostgresServer]:
    folder = Path(tempfile.mkdtemp(prefix="cdr-api-"))
    server = demo.start_server(folder / "postgresql", request.config.getoption("postgresql"))
    with demo.connect(server) as connection:
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class PgBouncer:
    """PgBouncer in transaction mode, for every database of a server; it listens on a socket in its folder."""

    server: demo.PostgresServer
    folder: Path
    pool_size: int  # connections to the server, for each database
    patience: int = 5  # seconds that a transaction waits for one of them
    process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def dsn(self, database: str) -> str:
        return f"postgresql://cdr_api:@/{database}?host={self.folder}"

    def configure(self) -> None:
        settings = {
            "pool_mode": "transaction",
            "default_pool_size": self.pool_size,
            "max_client_conn": 500,
            "auth_type": "trust",
            "auth_file": self.folder / "users",
            "unix_socket_dir": self.folder,
            "listen_port": 5432,  # the name of the socket; there is no listen_addr
            # PgBouncer's own are 2 minutes and 15 seconds: so long would requests hang that begin while PostgreSQL is
            # away, and be refused when it is back.
            "query_wait_timeout": self.patience,
            "server_login_retry": 1,
        }
        lines = [f"{name} = {value}" for name, value in settings.items()]
        (self.folder / "users").write_text('"cdr_api" ""\n', "ascii")
        (self.folder / "ini").write_text(
            "\n".join(["[databases]", f"* = host={self.server.socket}", "[pgbouncer]", *lines]), "utf-8"
        )

    def start(self) -> None:
        user = self.server.system_user  # not root, as which PgBouncer refuses to run
        with self.log.open("ab") as log:
            command = [PGBOUNCER, str(self.folder / "ini")]
            self.process = subprocess.Popen(command, user=user, cwd="/", stdout=log, stderr=log)
        wait_for(self.answers)

    def answers(self) -> bool:
        assert self.process
        assert self.process.poll() is None, self.log.read_text("utf-8")
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.folder / ".s.PGSQL.5432")) == 0

    def kill(self) -> None:
        assert self.process
        self.process.kill()
        self.process.wait(60)


@contextmanager
def run_pgbouncer(server: demo.PostgresServer, **options: Any) -> Iterator[PgBouncer]:
    folder = Path(tempfile.mkdtemp(prefix="cdr-api-"))
    if server.system_user:
        shutil.chown(folder, server.system_user)
    bouncer = PgBouncer(server, folder, **options)
    bouncer.configure()
    try:
        bouncer.start()
        yield bouncer
    finally:
        bouncer.kill()
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def pgbouncer(server: demo.PostgresServer, request: pytest.FixtureRequest) -> Iterator[PgBouncer | None]:
    """What --pgbouncer asks for, with connections for everything that the service does at once."""
    if request.config.getoption("pgbouncer"):
        with run_pgbouncer(server, pool_size=40) as bouncer:
            yield bouncer
    else:
        yield None


@dataclass
class Database:
    """A FusionPBX database, and the service's application on it."""

    server: demo.PostgresServer
    name: str
    release: str = demo.NEWEST
    pgbouncer: PgBouncer | None = None
    apps: list[Flask] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def dsn(self) -> str:
        """How the service connects, by way of PgBouncer if there is one."""
        return self.pgbouncer.dsn(self.name) if self.pgbouncer else demo.service_dsn(self.server, self.name)

    def connect(self) -> demo.Connection:
        """A superuser's connection, in autocommit mode."""
        return demo.connect(self.server, self.name)

    def execute(self, statement: str, values: Any = None) -> list[Any]:
        with self.connect() as connection:
            cursor = connection.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def insert_call(self, **values: Any) -> str:
        """Stores a call as a superuser; gives its uuid back. Ends on 2026-02-03 10:00:00Z if not said."""
        key = "uuid" if self.release[0] == "4" else "xml_cdr_uuid"
        call: dict[str, Any] = {
            key: f"00000000-0000-4000-8000-{next(self.numbers):012d}",
            "domain_name": "alpha.example.com",
        }
        call |= {"end_stamp": "2026-02-03 10:00:00+00", "billsec": 1, "leg": "a"} | values
        columns, marks = ", ".join(call), ", ".join(["%s"] * len(call))
        self.execute(f"INSERT INTO v_xml_cdr ({columns}) VALUES ({marks})", list(call.values()))
        return str(call[key])

    def app(self, **settings: str) -> Flask:
        """A new application, as a worker would make it."""
        app = cdr_api.create_app({"CDR_API_DSN": self.dsn, "CDR_API_SYSLOG": "off", **settings})
        app.testing = True
        self.apps.append(app)
        return app

    def account(self, *domains: str, email: str | None = None, all_domains: bool = False, days: int = 1) -> str:
        """Makes an account that may read some domains; gives a token of it."""
        email = email or f"user{next(self.numbers)}@example.com"
        with self.connect() as connection:
            connection.execute("SET ROLE cdr_api")
            connection.execute("SET client_encoding = 'UTF8'")  # as the service's own
            connection.row_factory = dict_row
            row = run(
                connection,
                "insert_account",
                name="Test",
                email=email,
                email_key=email_key(email),
                password_hash=PASSWORD_HASH,
                all_domains=all_domains,
            )[0]
            uuids = [found["domain_uuid"] for found in run(connection, "find_uuids", domain_names=list(domains))]
            run(connection, "upsert_grants", account_id=row["account_id"], domain_uuids=uuids)
            token = new_token(connection, row["account_id"], days)
        assert token
        return token

    def client(self, token: str | None = None, app: Flask | None = None) -> Client:
        return Client(app or self.app(), token)

    def close(self) -> None:
        for app in self.apps:
            if auth_log := app.extensions["cdr_api"].auth_log:
                auth_log.close()
            app.extensions["cdr_api"].close()
        self.apps.clear()
        if self.pgbouncer:  # which would keep its connections to the server
            ours = "datname = current_database() AND usename = 'cdr_api'"
            self.execute(f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE {ours}")


@dataclass
class Client:
    """Sends requests to an application, with a token if it has one."""

    app: Flask
    token: str | None = None

    def send(self, method: str, path: str, **options: Any) -> TestResponse:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        headers |= options.pop("headers", {})
        return self.app.test_client().open(path, method=method, headers=headers, **options)

    def get(self, path: str, **parameters: Any) -> TestResponse:
        return self.send("GET", path, query_string=parameters)

    def post(self, path: str, **options: Any) -> TestResponse:
        return self.send("POST", path, **options)

    def calls(self, path: str = "/api/calls", **parameters: Any) -> list[dict[str, Any]]:
        """The calls of an answer that must be 200; of alpha.example.com if not said."""
        response = self.get(path, **{"domain_name": "alpha.example.com"} | parameters)
        assert response.status_code == 200, response.text
        found: list[dict[str, Any]] = json.loads(response.data)
        return found

    def call_range(self, start: str, end: str, **parameters: Any) -> list[dict[str, Any]]:
        return self.calls("/api/call_range", **{"from": start, "to": end} | parameters)


DatabaseMaker = Callable[..., Database]


@pytest.fixture(scope="session")
def templates(server: demo.PostgresServer) -> Callable[[str], str]:
    """Gives the name of a database to clone: a release with its tables and nothing else."""
    made: dict[str, str] = {}

    def template(release: str) -> str:
        if release not in made:
            made[release] = f"template_{release}"
            demo.create_database(server, made[release], release)
        return made[release]

    return template


@pytest.fixture(scope="module")
def make_database(
    server: demo.PostgresServer, templates: Callable[[str], str], pgbouncer: PgBouncer | None, request: Any
) -> Iterator[DatabaseMaker]:
    """Makes databases that last for a module: make_database(release=…, calls=…)."""
    made: list[Database] = []

    def make(release: str = demo.NEWEST, calls: int = 0, *, index: bool = False) -> Database:
        name = f"{request.module.__name__}_{len(made)}".rpartition(".")[2]
        with demo.connect(server) as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{templates(release)}"')
        database = Database(server, name, release, pgbouncer)
        made.append(database)
        with database.connect() as connection:
            if calls:
                demo.add_calls(connection, calls, release, until=UNTIL)
            if index:
                connection.execute(demo.INDEX)
        return database

    yield make
    for database in made:
        database.close()
        with demo.connect(server) as connection:
            connection.execute(f'DROP DATABASE "{database.name}" WITH (FORCE)')


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    """The newest release with 3,000 invented calls of three domains, and the index."""
    return make_database(calls=3000, index=True)


@pytest.fixture(scope="module")
def client(database: Database) -> Client:
    """Reads alpha.example.com."""
    return database.client(database.account("alpha.example.com"))


@pytest.fixture(scope="session")
def speedups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the C encoder as it is now, whatever is installed."""
    folder = tmp_path_factory.mktemp("speedups")
    if lacking := build_encoder(folder):
        pytest.skip(lacking)
    return folder


@pytest.fixture(scope="session", params=["Python", "C"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that, in PYTHONPATH, makes a service take the Python encoder or the C one."""
    if request.param == "C":
        return cast(Path, request.getfixturevalue("speedups"))
    return hide_encoder(tmp_path_factory.mktemp("without"))


@dataclass
class Gunicorn:
    """The service as shipped, in processes of its own."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def worker_pids(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text("ascii")
        return [int(pid) for pid in children.split()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Waits until a condition holds; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)
    return found


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def serve(dsn: str, *options: str, folder: str = "", **settings: str) -> Iterator[Gunicorn]:
    """Runs gunicorn as a sysadmin would, on a free port."""
    port = free_port()
    environ = {name: value for name, value in os.environ.items() if not name.startswith("CDR_API_")}
    environ |= {"CDR_API_DSN": dsn, "CDR_API_WORKERS": "1", "CDR_API_SYSLOG": "off", **settings}
    command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", *options]
    with tempfile.NamedTemporaryFile(prefix="cdr-api-", suffix=".log") as log:
        process = subprocess.Popen(command, cwd=folder or ROOT, env=environ, stdout=log, stderr=log)
        try:
            wait_for(lambda: process.poll() is not None or answers(port))
            yield Gunicorn(process, f"http://127.0.0.1:{port}", Path(log.name))
        finally:
            process.terminate()
            process.wait(60)


def problem(response: TestResponse) -> dict[str, Any]:
    """The envelope of an answer that is not 2xx, checked; data as what its string holds."""
    assert response.mimetype == "application/json", response.text
    body = json.loads(response.data)
    assert set(body) == {"message", "success", "data"}, body
    assert body["success"] is False
    assert isinstance(body["message"], str)
    assert body["message"]
    assert isinstance(body["data"], str)
    data: dict[str, Any] = json.loads(body["data"])
    return {"message": body["message"], "data": data}
