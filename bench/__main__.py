"""Measures the service against what is possible and what is usual; see README.md.

    python -m bench [--runs 5] [--rows 500000] [--keep-data FOLDER] [--quick] [--all]

Prints Markdown tables, writes them to RESULT.md beside this file too, and tells
its progress on stderr. Times are in seconds and sizes in bytes until they are shown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import psycopg
from psycopg import pq, sql

import demo
from cdr.selection import FIELDS
from cdr.stream import FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from demo import PostgresServer

ROOT = Path(__file__).parent.parent
RESULT = Path(__file__).with_name("RESULT.md")
DOMAIN = "bench.example.com"
UNTIL = 1_790_000_000  # epoch seconds; every run invents the same calls
SIZES = (1, 1_000, 50_000, 500_000)  # rows
PEER_ROWS = 50_000  # more takes the hand-written peer gigabytes of memory
XML_BYTES = 12 * 1024
CONNECTIONS = 8
LOAD_SECONDS = 5
CEILING = "COPY CSV, thrown away"
PEER = "fetchall + jsonify"
# How every peer looks a token up, in one query: the account of its digest, or no row.
TOKEN_QUERY = """
    SELECT t.account_id
      FROM cdr_api.tokens AS t
      JOIN cdr_api.accounts AS a USING (account_id)
     WHERE t.digest = %s AND a.disabled_at IS NULL AND (t.expires_at IS NULL OR t.expires_at > now())"""
# The same, and whether the account may read a domain.
GRANT_QUERY = f"""{TOKEN_QUERY}
       AND EXISTS (SELECT FROM v_domains AS d
                     LEFT JOIN cdr_api.grants AS g ON g.account_id = a.account_id AND g.domain_uuid = d.domain_uuid
                    WHERE d.domain_name = %s AND (a.all_domains OR g.domain_uuid IS NOT NULL))"""
# What a peer does that does the same work: it looks the grant up too, and reads in a transaction of its own.
SAME_WORK = {"BENCH_TOKEN_QUERY": GRANT_QUERY, "BENCH_BEGIN": "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"}


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Data -------------------------------------------------------------------------


def fill_database(server: PostgresServer, name: str, rows: int, xml_bytes: int) -> None:
    """Makes a database of one domain with so many calls, unless it is there and whole."""
    with demo.connect(server) as connection:
        if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
            if count_calls(server, name) == rows:
                return
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
    demo.create_database(server, name, domains=[DOMAIN])
    done = 0

    def progress(step: int) -> None:
        nonlocal done
        done += step
        print(f"\r{name}: {done:,} of {rows:,} calls", end="", file=sys.stderr, flush=True)

    with demo.connect(server, name) as connection:
        demo.add_calls(connection, rows, domains=[DOMAIN], until=UNTIL, xml_bytes=xml_bytes, progress=progress)
    tell("")


def count_calls(server: PostgresServer, name: str) -> int:
    with demo.connect(server, name) as connection:
        row = connection.execute("SELECT to_regclass('v_xml_cdr') IS NOT NULL").fetchone()
        found = row and row[0] and connection.execute("SELECT count(*) FROM v_xml_cdr").fetchone()
    return int(found[0]) if found else 0


def set_index(server: PostgresServer, name: str, *, wanted: bool) -> None:
    with demo.connect(server, name) as connection:
        connection.execute("DROP INDEX IF EXISTS cdr_api_calls")
        if wanted:
            connection.execute(demo.INDEX)
        connection.execute("VACUUM (ANALYZE) v_xml_cdr")


@dataclass(frozen=True)
class Range:
    """So many calls, those that end from first to last (epoch seconds, both included)."""

    rows: int
    first: int
    last: int


def find_range(server: PostgresServer, name: str, rows: int) -> Range:
    """The range in the middle of the database's calls that holds just so many rows.

    Calls may end in the same second, so the middle is moved on until both ends fit.
    """
    query = """
        WITH call AS (SELECT end_epoch, row_number() OVER moments AS place,
                             lag(end_epoch) OVER moments AS before, lead(end_epoch) OVER moments AS behind
                        FROM v_xml_cdr WINDOW moments AS (ORDER BY end_epoch, xml_cdr_uuid))
        SELECT first.end_epoch, last.end_epoch
          FROM call AS first JOIN call AS last ON last.place = first.place + %(rows)s - 1
         WHERE first.place > ((SELECT count(*) FROM v_xml_cdr) - %(rows)s) / 2
           AND first.end_epoch IS DISTINCT FROM first.before AND last.end_epoch IS DISTINCT FROM last.behind
         ORDER BY first.place LIMIT 1"""
    with demo.connect(server, name) as connection:
        found = connection.execute(query, {"rows": rows}).fetchone()
    if not found:
        sys.exit(f"{name}: no range holds exactly {rows} rows")
    return Range(rows, int(found[0]), int(found[1]))


# Serving ----------------------------------------------------------------------


@dataclass(frozen=True)
class Web:
    """A server of ours: its port and the process id of its master."""

    port: int
    pid: int

    def workers(self) -> list[int]:
        """The process ids of all below the master; none where /proc does not tell."""
        return descendants(self.pid)

    def kill(self) -> None:
        """Ends it and its workers at once, whatever they are doing."""
        kill([self.pid, *self.workers()])


def kill(pids: Iterable[int]) -> None:
    """Not by their group, which some leave (PHP-FPM does)."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    children = [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in read(path).split()]
    return children + [below for child in children for below in descendants(child)]


def read(path: Path) -> str:
    """A file of /proc; nothing if its process has just ended."""
    with suppress(OSError):
        return path.read_text()
    return ""


def find_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def launch(command: Sequence[str], port: int, variables: Mapping[str, str], folder: Path = ROOT) -> Iterator[Web]:
    """A server that is started in a folder and listens on a port, until the block ends."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CDR_API_")}
    process = subprocess.Popen(command, cwd=folder, env={**inherited, **variables}, stdout=subprocess.DEVNULL)
    web = Web(port, process.pid)
    try:
        await_port(port, process)
        yield web
    finally:
        workers = web.workers()
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        kill([process.pid, *workers] if process.poll() is None else workers)
        process.wait()


def compose_variables(dsn: str) -> dict[str, str]:
    """The environment of the service, and of its peers."""
    return {
        "CDR_API_DSN": dsn,
        "CDR_API_REGISTER_DOMAINS": "*",
        "CDR_API_SYSLOG": "off",
        "BENCH_DSN": dsn,
        "BENCH_COLUMNS": ", ".join(FIELDS),
        "BENCH_TOKEN_QUERY": TOKEN_QUERY,
        "BENCH_BEGIN": "",
    }


@contextmanager
def serve(variables: Mapping[str, str], *application: str) -> Iterator[Web]:
    """A gunicorn with the project's gunicorn.conf.py, until the block ends."""
    port = find_port()
    gunicorn = Path(sys.executable).with_name("gunicorn")
    command = [str(gunicorn), "-b", f"127.0.0.1:{port}", "--log-level", "warning", *application]
    with launch(command, port, variables) as web:
        yield web


def await_port(port: int, process: subprocess.Popen[bytes], patience: float = 20) -> None:
    """Waits so many seconds at most; ends the program if nothing listens then."""
    until = time.monotonic() + patience
    while time.monotonic() < until and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    sys.exit(f"{process.args!r} did not start; its messages stand above")


def register(port: int) -> str:
    """The token of a new account of the service."""
    password = secrets.token_urlsafe(24)
    account = {"name": "Benchmark", "email": f"{secrets.token_hex(8)}@bench.example.com", "password": password}
    body = json.dumps({**account, "password_confirmation": password}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/register", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return str(json.load(response)["token"])


# Contestants ------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """One answer: seconds until all of it and until its first byte, its bytes."""

    seconds: float
    first: float
    size: int


class Ceiling:
    """Reads COPY's CSV of the bare columns with libpq and throws it away.

    Over a connection that stays open, as the same role, in the same order and
    with the same enable_sort as the service: the planner by itself may choose a
    slower plan, which would be no ceiling.
    """

    def __init__(self, dsn: str) -> None:
        self.pgconn = pq.PGconn.connect(dsn.encode())
        if self.pgconn.status != pq.ConnStatus.OK:
            sys.exit(f"no connection: {self.pgconn.get_error_message()}")
        self.pgconn.exec_(b"SET enable_sort = off")

    def read(self, wanted: Range) -> Reading:
        query = (
            f"COPY (SELECT {', '.join(FIELDS)} FROM v_xml_cdr WHERE domain_uuid = md5('domain {DOMAIN}')::uuid"
            f" AND end_stamp >= to_timestamp({wanted.first}) AND end_stamp < to_timestamp({wanted.last + 1})"
            " ORDER BY end_stamp, xml_cdr_uuid) TO STDOUT (FORMAT csv)"
        )
        start = time.perf_counter()
        self.pgconn.send_query(query.encode())
        result = self.pgconn.get_result()
        if not result or result.status != pq.ExecStatus.COPY_OUT:
            sys.exit(f"COPY failed: {self.pgconn.get_error_message()}")
        size = self.pgconn.get_copy_data(0)[0]
        first = time.perf_counter() - start
        while (more := self.pgconn.get_copy_data(0)[0]) > 0:
            size += more
        while (result := self.pgconn.get_result()) is not None:
            if result.status != pq.ExecStatus.COMMAND_OK:
                sys.exit(f"COPY failed: {self.pgconn.get_error_message()}")
        return Reading(time.perf_counter() - start, first, size)


@dataclass(frozen=True)
class Page:
    """A route that answers a range, asked over a connection of its own."""

    web: Web
    route: str
    parameters: Mapping[str, str]
    token: str = ""

    def path(self, wanted: Range) -> str:
        values = {"domain_name": DOMAIN, "from": wanted.first, "to": wanted.last, **self.parameters}
        return f"{self.route}?{urlencode(values)}"

    def url(self, wanted: Range) -> str:
        return f"http://127.0.0.1:{self.web.port}{self.path(wanted)}"

    def read(self, wanted: Range) -> Reading:
        """Asks with curl, which throws the answer away; ends the program unless it is a whole 200."""
        done = subprocess.run(self.curl(wanted), stdout=subprocess.PIPE, text=True, check=False)
        try:
            return understand(done.stdout, done.returncode)
        except ConnectionError as error:
            sys.exit(f"{self.url(wanted)}: {error}")

    def curl(self, wanted: Range) -> list[str]:
        told = "%{http_code} %{time_total} %{time_starttransfer} %{size_download}"
        command = ["curl", "-sS", "-o", os.devnull, "-w", told, "-H", f"Authorization: Bearer {self.token}"]
        return [*command, self.url(wanted)]

    def calls(self, wanted: Range) -> list[dict[str, Any]]:
        request = urllib.request.Request(self.url(wanted), headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=60) as response:
            found: list[dict[str, Any]] = json.load(response)
        return found


def understand(told: str, returncode: int) -> Reading:
    """What curl told of an answer; ConnectionError unless it was a whole 200."""
    status, seconds, first, size = told.split() or ["000", "0", "0", "0"]
    if returncode or status != "200":
        raise ConnectionError(f"status {status}, curl's exit status {returncode}")
    return Reading(float(seconds), float(first), int(size))


def as_it_is(_name: str, value: Any) -> Any:
    return value


def compare(page: Page, peer: Page, wanted: Range, plain: Callable[[str, Any], Any] = as_it_is) -> None:
    """Ends the program unless both give the same calls with the same fields and values.

    plain makes values alike that mean the same.
    """
    ours, theirs = page.calls(wanted), peer.calls(wanted)
    if not len(ours) == len(theirs) == wanted.rows:
        sys.exit(f"{wanted.rows} calls expected: the service gives {len(ours)}, {peer.route} {len(theirs)}")
    for our, their in zip(ours, theirs, strict=True):
        if our.keys() != their.keys():
            sys.exit(f"{peer.route} has other fields: {sorted(our.keys() ^ their.keys())}")
        pairs = {name: (plain(name, our[name]), plain(name, their[name])) for name in FIELDS}
        if differences := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
            sys.exit(f"service and {peer.route} differ in call {our['xml_cdr_uuid']}: {differences}")


# Memory -----------------------------------------------------------------------


def forget_peak(web: Web | None) -> None:
    for pid in web.workers() if web else []:
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_memory(web: Web | None) -> dict[int, int]:
    """The most resident bytes of each worker since forget_peak; empty where /proc does not tell."""
    found = {}
    for pid in web.workers() if web else []:
        if match := re.search(r"VmHWM:\s+(\d+) kB", read(Path(f"/proc/{pid}/status"))):
            found[pid] = int(match[1]) * 1024
    return found


# Measuring --------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """Who reads a range; idle is the resident bytes of each worker before the first large answer."""

    name: str
    read: Callable[[Range], Reading]
    web: Web | None
    idle: Mapping[int, int]


@dataclass(frozen=True)
class Score:
    """A contestant's medians (seconds, bytes) and the most that a worker's memory grew (bytes)."""

    name: str
    rows: int
    seconds: float
    first: float
    size: int
    growth: int | None


@dataclass(frozen=True)
class Arena:
    """The contestants on one database."""

    ceiling: Ceiling
    pages: Mapping[str, Page]
    peer: Page

    def contestants(self) -> list[Contestant]:
        pages = {**{f"service, {kind}": page for kind, page in self.pages.items()}, PEER: self.peer}
        for page in pages.values():
            forget_peak(page.web)
        found = [Contestant(name, page.read, page.web, peak_memory(page.web)) for name, page in pages.items()]
        return [Contestant(CEILING, self.ceiling.read, None, {}), *found]


@contextmanager
def open_arena(server: PostgresServer, name: str) -> Iterator[Arena]:
    """Starts service and peer again, so that their memory is that of a fresh start."""
    dsn = demo.service_dsn(server, name)
    variables = compose_variables(dsn)
    with serve(variables) as service, serve(variables, "bench.jsonify_app:app") as peer:
        token = register(service.port)
        pages = {kind: Page(service, "/api/call_range", {"format": kind}, token) for kind in FORMATS}
        arena = Arena(Ceiling(dsn), pages, Page(peer, "/call_range", {}, token))
        compare(pages["json"], arena.peer, find_range(server, name, 1_000))
        one = find_range(server, name, 1)
        for page in [*pages.values(), arena.peer] * 10:  # every worker has its imports and connections behind it
            page.read(one)
        yield arena


def measure(contestants: Sequence[Contestant], wanted: Range, runs: int) -> list[Score]:
    """Lets the contestants take turns, so many times; four times as many for short answers."""
    readings: dict[str, list[Reading]] = {one.name: [] for one in contestants}
    growth: dict[str, list[int]] = {one.name: [] for one in contestants}
    for _ in range(runs * 4 if wanted.rows <= 1_000 else runs):
        for one in contestants:
            forget_peak(one.web)
            readings[one.name].append(one.read(wanted))
            growth[one.name] += [peak - one.idle.get(pid, peak) for pid, peak in peak_memory(one.web).items()]
    return [score(one.name, wanted.rows, readings[one.name], growth[one.name]) for one in contestants]


def score(name: str, rows: int, readings: Sequence[Reading], growth: Sequence[int]) -> Score:
    sizes = {reading.size for reading in readings}
    if len(sizes) > 1:
        sys.exit(f"{name}: answers of different sizes to the same request: {sizes}")
    seconds = statistics.median(reading.seconds for reading in readings)
    first = statistics.median(reading.first for reading in readings)
    return Score(name, rows, seconds, first, sizes.pop(), max(growth, default=None))


def measure_sizes(arena: Arena, ranges: Sequence[Range], options: argparse.Namespace) -> list[Score]:
    """The scores of each range, the smallest first; the peer stays out of very large ones."""
    contestants = arena.contestants()
    arena.ceiling.read(ranges[-1])  # the table is in memory from here on
    found = []
    for wanted in ranges:
        tell(f"  {wanted.rows:,} rows")
        with_peer = options.all or wanted.rows <= PEER_ROWS
        found += measure([one for one in contestants if with_peer or one.name != PEER], wanted, options.runs)
    return found


def load(page: Page, path: str, seconds: float = LOAD_SECONDS) -> float:
    """Answers per second, asked by two processes with half of the connections each."""
    numbers = [str(page.web.port), str(CONNECTIONS // 2), str(seconds)]
    command = [sys.executable, "-m", "bench.load", *numbers, path, page.token or "none"]
    generators = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        answers = [generator.communicate()[0] for generator in generators]
    finally:
        for generator in generators:
            generator.kill()
    if any(generator.returncode for generator in generators):
        sys.exit(f"{path}: the load generator failed; its message stands above")
    return sum(float(answer) for answer in answers)


def measure_load(arena: Arena, one: Range, runs: int) -> dict[str, float]:
    """Median answers per second for one call, and for a route that does nothing, in turns."""
    tell("  requests per second")
    page = arena.pages["json"]
    routes = {
        "service, a path that is not there (404)": (page, "/api/nothing-here"),
        "service, one call": (page, page.path(one)),
        f"{PEER}, one call": (arena.peer, arena.peer.path(one)),
    }
    found: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(runs):
        for name, route in routes.items():
            found[name].append(load(*route))
    return {name: statistics.median(rates) for name, rates in found.items()}


# Telling ----------------------------------------------------------------------

HEAD = """\
| rows | contestant | seconds | rows/s | MB/s | of the ceiling | first byte, ms | memory, MB |
|---:|---|---:|---:|---:|---:|---:|---:|
"""


def show_scores(scores: Sequence[Score]) -> str:
    """A table and its reading."""
    ceilings = {score.rows: score.seconds for score in scores if score.name == CEILING}
    lines = []
    for score in scores:
        growth = "-" if score.growth is None else f"{score.growth / 1e6:,.1f}"
        speed = f"{score.rows / score.seconds:,.0f} | {score.size / score.seconds / 1e6:,.1f}"
        share = f"{ceilings[score.rows] / score.seconds:.0%}"
        times = f"{score.seconds:.4f} | {speed} | {share} | {score.first * 1000:.1f}"
        lines.append(f"| {score.rows:,} | {score.name} | {times} | {growth} |\n")
    return HEAD + "".join(lines) + "\n" + read_scores(scores, ceilings) + "\n"


def read_scores(scores: Sequence[Score], ceilings: Mapping[int, float]) -> str:
    """One line that says what a table shows."""
    service = [score for score in scores if score.name.startswith("service")]
    largest = [score for score in service if score.rows == max(ceilings)]
    shares = ", ".join(f"{ceilings[s.rows] / s.seconds:.0%} ({s.name.removeprefix('service, ')})" for s in largest)
    first = f"the first byte after {largest[0].first * 1000:.0f} ms"
    text = f"{largest[0].rows:,} rows come at {shares} of the ceiling, {first}"
    if growths := [score.growth for score in service if score.growth is not None]:
        text += f"; the service's workers never grow by more than {max(growths) / 1e6:.1f} MB"
    peers = [score for score in scores if score.name == PEER]
    if peers:
        last = peers[-1]
        ours = next(score for score in service if score.rows == last.rows)
        text += f"; {last.rows:,} rows as JSON take {PEER} {last.seconds / ours.seconds:.1f} times as long"
        text += f" and {last.growth / 1e6:,.0f} MB" if last.growth is not None else ""
    return text + "."


def show_load(rates: Mapping[str, float]) -> str:
    nothing, call, _ = rates.values()
    head = f"| {CONNECTIONS} connections kept alive | requests/s | of the first line |\n|---|---:|---:|\n"
    lines = "".join(f"| {name} | {rate:,.0f} | {rate / nothing:.0%} |\n" for name, rate in rates.items())
    text = f"A call with its token, domain and transaction takes {nothing / call:.1f} times what a 404 takes."
    return f"{head}{lines}\n{text}\n"


def describe_machine(server: PostgresServer) -> str:
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        match = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        cpu = match[1] if match else cpu
    with demo.connect(server) as connection:
        row = connection.execute("SHOW server_version").fetchone()
    return (
        f"{os.cpu_count()} cores ({cpu}), {platform.system()}, PostgreSQL {row[0] if row else '?'} with its"
        f" default settings, Python {platform.python_version()}, psycopg {psycopg.__version__} ({pq.__impl__});"
        " database, service and client on one machine."
    )


def run(server: PostgresServer, options: argparse.Namespace) -> Iterator[str]:
    """The parts of the result, one after the other."""
    calls, with_xml, rows = f"calls_{options.rows}", f"xml_{min(options.rows, PEER_ROWS)}", options.rows
    fill_database(server, calls, rows, 0)
    fill_database(server, with_xml, min(rows, PEER_ROWS), XML_BYTES)
    ranges = [find_range(server, calls, size) for size in sorted({n for n in SIZES if n < rows} | {rows})]
    yield f"{describe_machine(server)} Medians of {options.runs} runs.\n"
    for wanted, title in ((True, "With the index"), (False, "Without the index")):
        tell(title)
        set_index(server, calls, wanted=wanted)
        with open_arena(server, calls) as arena:
            yield f"### {title}: {rows:,} calls\n\n{show_scores(measure_sizes(arena, ranges, options))}"
            if wanted:
                rates = measure_load(arena, ranges[0], options.runs)
    tell("With XML")
    set_index(server, with_xml, wanted=True)
    with open_arena(server, with_xml) as arena:
        scores = measure_sizes(arena, [find_range(server, with_xml, min(rows, PEER_ROWS))], options)
        yield f"### With the index and 12 KB of xml in every call\n\n{show_scores(scores)}"
    yield f"### Requests for one call\n\n{show_load(rates)}"


def read_options(name: str, rows: int, least: int, quick: int, flag: tuple[str, str]) -> argparse.Namespace:
    """The options of a benchmark: how many calls by itself, at least and with --quick; its own flag and its help."""
    parser = argparse.ArgumentParser(prog=name, description="Measures the service; see bench/README.md.")
    parser.add_argument("--runs", type=int, default=5, help="turns of each contestant, whose median counts (5)")
    parser.add_argument("--rows", type=int, default=rows, help=f"calls in the database, {least:,} at least ({rows})")
    parser.add_argument("--keep-data", type=Path, default=ROOT / ".demo/bench", metavar="FOLDER", help="(.demo/bench)")
    parser.add_argument("--quick", action="store_true", help=f"2 runs, and {quick:,} calls at most")
    parser.add_argument(flag[0], action="store_true", help=flag[1])
    options = parser.parse_args()
    if options.quick:
        options.runs, options.rows = 2, min(options.rows, quick)
    if options.runs < 1 or options.rows < least:
        parser.error(f"at least 1 run and {least} rows")
    return options


def open_server(options: argparse.Namespace) -> PostgresServer:
    """The database server of a benchmark, which from here on may be told to stop."""
    if not shutil.which("curl"):
        sys.exit("curl is needed")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    return demo.start_server(options.keep_data)


def main() -> None:
    own = ("--all", f"let {PEER} answer more than {PEER_ROWS:,} rows too")
    options = read_options("python -m bench", 500_000, 1_000, 50_000, own)
    try:
        server = open_server(options)
        parts = []
        for part in run(server, options):
            print(part, flush=True)
            parts.append(part)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    RESULT.write_text("\n".join(parts), "utf-8")


if __name__ == "__main__":
    main()
