"""make run: serve CDR_API_DSN's database, or one of our own with invented calls.

python -m demo [--calls N] [--release R] [--data FOLDER]
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import click
import psycopg

from demo import DOMAINS, INDEX, NEWEST, RELEASES, add_calls, connect, create_database, service_dsn, start_server

ROOT = Path(__file__).parent.parent

CURL = """
Ready at {url} (Ctrl-C stops it). In a browser, with the account that is made below:
{url}/api/usage shows a month, {url}/api/docs the routes. In another terminal:

curl -s {url}/api/register -d name=Billing -d email=billing@example.com \\
  -d password=correct-horse-battery -d password_confirmation=correct-horse-battery

TOKEN=$(curl -s {url}/api/login -d email=billing@example.com -d password=correct-horse-battery \\
  | sed 's/.*"token":"\\([^"]*\\)".*/\\1/')

curl -s -H "Authorization: Bearer $TOKEN" '{url}/api/calls?domain_name={domain}&limit=2'

curl -s -H "Authorization: Bearer $TOKEN" \\
  '{url}/api/call_range?domain_name={domain}&from={day}&to={day}&fields=end_stamp,direction,caller_id_number,destination_number,billsec&format=csv&limit=10'

curl -s -X POST -H "Authorization: Bearer $TOKEN" {url}/api/logout
"""


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description="Serve a FusionPBX with invented calls.")
    parser.add_argument("--calls", type=int, default=100_000, help="how many calls to invent (default 100,000)")
    parser.add_argument("--release", choices=RELEASES, default=NEWEST, help=f"FusionPBX's release (default {NEWEST})")
    parser.add_argument("--data", type=Path, default=ROOT / ".demo", help="where the database is kept (default .demo)")
    return parser.parse_args()


def read_port() -> int:
    """PORT, free on 127.0.0.1; ends the program with a sentence otherwise."""
    text = os.environ.get("PORT") or "8000"
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        sys.exit(f"PORT must be a number from 1 to 65535, not {text!r}.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(text)))
        except OSError as error:
            sys.exit(f"Port {text} cannot be used ({error.strerror}): choose another, as in PORT=8001 make run.")
    return int(text)


def prepare_demo(arguments: argparse.Namespace) -> dict[str, str]:
    """The settings for a database of our own; makes it where it is not there yet."""
    name = f"fusionpbx_{arguments.release}"
    print("Starting the embedded PostgreSQL …", flush=True)
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


def check_dsn(dsn: str) -> None:
    try:
        psycopg.connect(dsn, connect_timeout=5).close()
    except psycopg.Error as error:
        sys.exit(f"CDR_API_DSN: {' '.join(str(error).split())}")


def main() -> int:
    arguments = read_arguments()
    port = read_port()
    environ = dict(os.environ)
    if environ.get("CDR_API_DSN"):
        check_dsn(environ["CDR_API_DSN"])
        domain = "DOMAIN"
    else:
        environ = {**prepare_demo(arguments), **{k: v for k, v in environ.items() if v}}
        domain = DOMAINS[0]
    gunicorn = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--log-level", "warning"]
    with subprocess.Popen(gunicorn, cwd=ROOT, env=environ, start_new_session=True) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        day = date.today() - timedelta(days=1)
        print(CURL.format(url=f"http://127.0.0.1:{port}", domain=domain, day=day), flush=True)
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            return process.wait()


if __name__ == "__main__":
    sys.exit(main())
