"""make run: serve CDR_API_DSN's database, or one of our own with invented calls.

python -m demo [--calls N] [--release R] [--data FOLDER]

However it is ended (Ctrl-C, a closed terminal, SIGTERM), the service and PostgreSQL end with it.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import date, timedelta
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import psycopg

from demo import (
    DOMAINS,
    INDEX,
    NEWEST,
    RELEASES,
    PostgresError,
    add_calls,
    connect,
    create_database,
    service_dsn,
    start_server,
)

ROOT = Path(__file__).parent.parent
FULL = 40_000_000  # bytes that are left of a disk on which PostgreSQL can make no more files of its log
PATIENCE = 60  # seconds that the service may take to answer, or to end

READY = """
Ready at {url} (Ctrl-C stops it). In a browser, with the account that is made below:
{url}/api/usage shows a month, {url}/api/docs the routes. In another terminal:
"""
REGISTER = """
# the first time:
curl -s {url}/api/register -d name=Billing -d email=billing@example.com \\
  -d password=correct-horse-battery -d password_confirmation=correct-horse-battery
# then, and later too:
TOKEN=$(curl -s {url}/api/login -d email=billing@example.com -d password=correct-horse-battery \\
  | sed 's/.*"token":"\\([^"]*\\)".*/\\1/')
"""
# Where registering grants nothing, unless the operator wants it to.
ADD_USER = """
# with the same CDR_API_DSN as here, in {root}:
head -c 18 /dev/urandom | base64 | .venv/bin/flask user add billing@example.com --name Billing --all-domains \
  --password-stdin
TOKEN=$(.venv/bin/flask token create billing@example.com)
"""
READ = """
curl -s -H "Authorization: Bearer $TOKEN" '{url}/api/calls?domain_name={domain}&limit=2'

curl -s -H "Authorization: Bearer $TOKEN" \\
  '{url}/api/call_range?domain_name={domain}&from={day}&to={day}&fields=end_stamp,direction,caller_id_number,destination_number,billsec&format=csv&limit=10'

curl -s -X POST -H "Authorization: Bearer $TOKEN" {url}/api/logout
"""
NO_CURL = "\n(These lines need curl, which is not installed; the two pages need a browser only.)"


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description="Serve a FusionPBX with invented calls.")
    parser.add_argument("--calls", type=int, default=100_000, help="how many calls to invent (default 100,000)")
    parser.add_argument("--release", choices=RELEASES, default=NEWEST, help=f"FusionPBX's release (default {NEWEST})")
    parser.add_argument("--data", type=Path, default=ROOT / ".demo", help="where the database is kept (default .demo)")
    return parser.parse_args()


def find_address() -> tuple[str, int]:
    """The local address, IPv4 where there is one, with PORT, free; ends the program with a sentence otherwise."""
    text = os.environ.get("PORT") or "8000"
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text) <= 65535:
        sys.exit(f"PORT must be a number from 1 to 65535, not {text!r}.")
    try:
        return try_address(socket.AF_INET, "127.0.0.1", int(text))
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
    return try_address(socket.AF_INET6, "::1", int(text))


def try_address(family: socket.AddressFamily, host: str, port: int) -> tuple[str, int]:
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                why = "taken by another program" if error.errno == errno.EADDRINUSE else "not for ordinary users"
                other = port + 1 if 1023 < port < 65535 else 8001
                sys.exit(f"Port {port} is {why}: choose another, as in PORT={other} make run.")
            raise
    return host, port


def prepare_demo(arguments: argparse.Namespace) -> dict[str, str]:
    """The settings for a database of our own; makes it where it is not there yet."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]  # another server's: PGPORT, PGOPTIONS, …
    print(f"Starting PostgreSQL, with its data in {arguments.data} …", flush=True)
    name = f"fusionpbx_{arguments.release}"
    server = start_server(arguments.data / "postgresql")
    with connect(server) as connection:
        row = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone()
    if row is None:
        # Under another name until it is whole: an interrupted start begins again.
        unfinished = f"{name}_unfinished"
        with connect(server) as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{unfinished}"')
        create_database(server, unfinished, arguments.release)
        with (
            connect(server, unfinished) as connection,
            click.progressbar(length=arguments.calls, label=f"Inventing {arguments.calls:,} calls") as bar,
        ):
            add_calls(connection, arguments.calls, arguments.release, progress=bar.update)
            if arguments.release[0] != "4":
                connection.execute(INDEX)
        with connect(server) as connection:
            connection.execute(f'ALTER DATABASE "{unfinished}" RENAME TO "{name}"')
    return {"CDR_API_DSN": service_dsn(server, name), "CDR_API_REGISTER_DOMAINS": "*", "CDR_API_SYSLOG": "off"}


def find_settings(arguments: argparse.Namespace) -> dict[str, str]:
    """Those of prepare_demo; ends the program with a sentence if the disk is full."""
    try:
        return prepare_demo(arguments)
    except (psycopg.Error, OSError):  # PostgreSQL may end without a word: it cannot write its log
        folder = arguments.data if arguments.data.exists() else ROOT
        if shutil.disk_usage(folder).free < FULL:
            sys.exit(f"The disk of {folder} is full: free 500 MB and start again.")
        raise


def find_domain(dsn: str) -> str:
    """A domain of a database; ends the program with a sentence if it is not reached."""
    try:
        with psycopg.connect(dsn, connect_timeout=5) as connection:
            row = connection.execute("SELECT domain_name FROM v_domains ORDER BY 1 LIMIT 1").fetchone()
        return str(row[0]) if row else "DOMAIN"
    except psycopg.OperationalError as error:
        sys.exit(f"CDR_API_DSN: {' '.join(str(error).split())}")
    except psycopg.Error as error:
        why = str(error).partition("\n")[0]
        print(f"This database is not prepared ({why}): see DEPLOYMENT.md. flask check tells more.", flush=True)
        return "DOMAIN"


def answers(address: tuple[str, int]) -> bool:
    """Whether a worker answers a request; that a connection is taken up says only that there will be one."""
    with closing(HTTPConnection(*address, timeout=5)) as connection, suppress(OSError, HTTPException):
        connection.request("GET", "/api/health")
        return connection.getresponse().status > 0
    return False


@contextmanager
def serving(address: tuple[str, int], environ: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """The service, once it answers; it has ended when the block has."""
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    command = [sys.executable, "-m", "gunicorn", "--bind", f"{host}:{address[1]}", "--log-level", "warning"]
    # A session of its own, for Ctrl-C is ours to hand on.
    process = subprocess.Popen(command, cwd=ROOT, env=environ, start_new_session=True)
    try:
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and not answers(address):
            if time.monotonic() > deadline:
                sys.exit(f"The service does not answer after {PATIENCE} seconds; flask check tells more.")
            time.sleep(0.05)
        if process.returncode is not None:
            sys.exit("The service did not start: see above.")
        yield process
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def end(number: int, _frame: Any) -> None:
    """Ends the program in order: a second signal changes nothing. Ctrl-C is how it is meant to end."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(0 if number == signal.SIGINT else 128 + number)


def show_lines(url: str, domain: str, *, own: bool) -> str:
    """What is to be pasted, for our own database or the operator's."""
    text = READY + (REGISTER if own else ADD_USER) + READ + ("" if shutil.which("curl") else NO_CURL)
    day = date.today() - timedelta(days=1)
    return text.format(url=url, domain=quote(domain), day=day, root=ROOT)


def main() -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal may know no "…"
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, end)
    arguments = read_arguments()
    address = find_address()
    own = not os.environ.get("CDR_API_DSN")
    settings = find_settings(arguments) if own else {}
    environ = settings | {name: value for name, value in os.environ.items() if value}
    domain = DOMAINS[0] if own else find_domain(environ["CDR_API_DSN"])
    with serving(address, environ) as process:
        host = f"[{address[0]}]" if ":" in address[0] else address[0]
        print(show_lines(f"http://{host}:{address[1]}", domain, own=own), flush=True)
        return process.wait()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (PostgresError, psycopg.Error, OSError) as error:
        sys.exit(f"make run cannot go on. {' '.join(str(error).split())}")
