"""A database on another machine, asked by TLS with its certificate checked: sslmode=verify-full from end to end."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

import cdr_api
import demo
from tests.commands import check
from tests.conftest import ROOT, free_port, serve

# The embedded PostgreSQL is built without TLS.
PROGRAMS = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), Path("/nowhere"))
pytestmark = [
    pytest.mark.direct("runs a server of its own"),
    pytest.mark.skipif(not (PROGRAMS / "initdb").exists(), reason="no PostgreSQL of Debian's: apt install postgresql"),
    pytest.mark.skipif(not shutil.which("openssl"), reason="not installed: openssl"),
]

# An authority signs the server's certificate; another one signs nothing.
CERTIFICATES = """
for name in ca other; do
  openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout $name.key -out $name.crt -subj /CN=$name
done
openssl req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=db.example.com
printf 'subjectAltName=DNS:db.example.com\n' > names
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.crt
chmod 0600 server.key
"""


@dataclass
class Server:
    folder: Path
    user: str | None  # not root, as which PostgreSQL refuses to run
    port: int

    def run(self, program: str, *options: str) -> None:
        command = [str(PROGRAMS / program), "-D", str(self.folder / "data"), *options]
        quiet = subprocess.DEVNULL
        subprocess.run(command, check=True, user=self.user, cwd="/", stdout=quiet, stderr=quiet, timeout=120)

    def dsn(self, *, host: str = "db.example.com", mode: str = "verify-full", authority: str = "ca") -> str:
        """The service's; the name is that of another machine, its address this one's."""
        tls = f"sslmode={mode} sslrootcert={self.folder}/{authority}.crt"
        return f"host={host} hostaddr=127.0.0.1 port={self.port} dbname=fusionpbx user=cdr_api password=secret {tls}"

    def connect(self, name: str = "fusionpbx") -> psycopg.Connection[Any]:
        return psycopg.connect(f"host={self.folder} port={self.port} user=postgres dbname={name}", autocommit=True)

    def check(self, **options: str) -> str:
        """The line about the database."""
        return check(cdr_api.create_app({"CDR_API_DSN": self.dsn(**options), "CDR_API_SYSLOG": "off"}))[1][
            "CDR_API_DSN"
        ]


@pytest.fixture(scope="module")
def tls(server: demo.PostgresServer) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="cdr-api-") as name:
        found = Server(Path(name), server.system_user, free_port())
        subprocess.run(["bash", "-eu", "-c", CERTIFICATES], cwd=name, check=True, capture_output=True)
        if found.user:
            for path in (found.folder, *found.folder.iterdir()):
                shutil.chown(path, found.user)
        found.run("initdb", "-U", "postgres", "-E", "UTF8", "--locale=C", "-A", "trust", "-N")
        access = "local all postgres trust\nhostssl fusionpbx cdr_api 127.0.0.1/32 scram-sha-256\n"
        (found.folder / "data/pg_hba.conf").write_text(access, "ascii")
        listen = f"-h 127.0.0.1 -p {found.port} -k {name} -F"
        tls = f"-c ssl=on -c ssl_cert_file={name}/server.crt -c ssl_key_file={name}/server.key"
        found.run("pg_ctl", "-w", "-o", f"{listen} {tls}", "-l", f"{name}/log", "start")
        try:
            fill(found)
            yield found
        finally:
            found.run("pg_ctl", "-w", "-m", "immediate", "stop")


def fill(server: Server) -> None:
    with server.connect("postgres") as connection:
        connection.execute("CREATE DATABASE fusionpbx")
    with server.connect() as connection:
        demo.create_tables(connection, demo.NEWEST)
        demo.add_domain(connection, "alpha.example.com")
        connection.execute((ROOT / "schema.sql").read_text("utf-8"))
        connection.execute("ALTER ROLE cdr_api LOGIN PASSWORD 'secret'")


def test_every_connection_is_encrypted_and_to_the_right_server(tls: Server) -> None:
    assert tls.check().startswith("✓")
    with serve(tls.dsn()) as gunicorn:
        health = f"{gunicorn.url}/api/health"
        done = subprocess.run(
            ["curl", "-sS", "--noproxy", "*", "-w", "%{http_code}", health], capture_output=True, check=True
        )
        assert done.stdout.endswith(b"200")
        with tls.connect() as connection:
            query = "SELECT ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = 'cdr_api'"
            found = connection.execute(query).fetchall()
    assert set(found) == {(True,)}


def test_a_wrong_certificate_is_told_with_what_shows_the_right_one(tls: Server) -> None:
    look = f"; run openssl s_client -starttls postgres -connect {{}}:{tls.port}"
    wrong = {"authority": "other"}, {"host": "elsewhere.example.com"}, {"authority": "missing"}
    for options, sentence in zip(
        wrong, ("certificate verify failed", "does not match host name", "does not exist"), strict=True
    ):
        line = tls.check(**options)
        assert line.startswith("✗")
        assert sentence in line
        assert look.format(options.get("host", "db.example.com")) in line
        assert "secret" not in line


def test_a_server_that_wants_tls_is_told(tls: Server) -> None:
    line = tls.check(mode="disable")
    assert 'no pg_hba.conf entry for host "127.0.0.1"' in line
    assert "no encryption" in line
    assert tls.check(mode="require").startswith("✓")
