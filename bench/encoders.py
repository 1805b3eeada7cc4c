"""What a row of a stream costs, by either encoder: python -m bench.encoders [--rows 300000] [--runs 5].

Time of processors per row, of the service and of its PostgreSQL processes, the least of some runs: it depends less
than the wall clock on what else the machine does. The contestants take turns; of the ceiling is the median.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import demo
from bench.__main__ import (
    ROOT,
    XML_BYTES,
    Ceiling,
    Page,
    Range,
    Web,
    compose_variables,
    describe_machine,
    fill_database,
    find_range,
    open_server,
    read_options,
    register,
    serve,
    set_index,
)


def processor_time(pids: Sequence[int]) -> float:
    """Seconds of processors that processes have taken so far."""
    files = [file for pid in pids for file in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(file.read_text("ascii").split()[0]) for file in files) / 1e9


@dataclass
class Contestant:
    """Who reads a range, and what that took each time: seconds of the service, of PostgreSQL, of the wall clock."""

    name: str
    source: Page | Ceiling
    web: Web | None
    costs: list[tuple[float, float, float]] = field(default_factory=list)

    def read(self, wanted: Range, connection: demo.Connection) -> None:
        sessions = connection.execute("SELECT pid FROM pg_stat_activity WHERE usename = 'cdr_api'").fetchall()
        groups = (self.web.workers() if self.web else [], [pid for (pid,) in sessions])
        before = [processor_time(pids) for pids in groups]
        seconds = self.source.read(wanted).seconds
        service, database = (processor_time(pids) - was for pids, was in zip(groups, before, strict=True))
        self.costs.append((service, database, seconds))

    def show(self, rows: int, ceiling: Sequence[tuple[float, float, float]]) -> str:
        service, database = (min(cost[part] for cost in self.costs) / rows * 1e6 for part in (0, 1))
        shares = (best[2] / cost[2] for best, cost in zip(ceiling, self.costs, strict=True))
        return f"| {self.name} | {service:.2f} | {database:.2f} | {statistics.median(shares):.2f} |"


@contextmanager
def choose_encoder(*, compiled: bool) -> Iterator[str]:
    """A folder for PYTHONPATH with the C encoder, or one that hides it."""
    with tempfile.TemporaryDirectory(prefix="cdr-api-") as folder:
        if compiled:
            command = [sys.executable, str(ROOT / "speedups/build.py"), folder]
            if subprocess.run(command, check=False, stdout=sys.stderr).returncode:
                sys.exit("the C encoder is needed: gcc, libc6-dev and python3-dev")
        else:
            Path(folder, "cdr_encoder.py").write_text("raise ImportError\n", "ascii")
        yield folder


def run(server: demo.PostgresServer, rows: int, runs: int, xml_bytes: int) -> Iterator[str]:
    """The lines of the result."""
    name = f"xml_{rows}" if xml_bytes else f"calls_{rows}"
    fill_database(server, name, rows, xml_bytes)
    set_index(server, name, wanted=True)
    wanted, one = find_range(server, name, rows), find_range(server, name, 1)
    dsn = demo.service_dsn(server, name)
    variables = compose_variables(dsn)
    with (
        choose_encoder(compiled=True) as with_it,
        choose_encoder(compiled=False) as without,
        serve(variables | {"PYTHONPATH": with_it}) as compiled,
        serve(variables | {"PYTHONPATH": without}) as plain,
        demo.connect(server, name) as connection,
    ):
        contestants, token = [Contestant("COPY CSV, thrown away", Ceiling(dsn), None)], register(plain.port)
        for label, web, kind in (("JSON, Python", plain, "json"), ("JSON, C", compiled, "json"), ("CSV", plain, "csv")):
            page = Page(web, "/api/call_range", {"format": kind}, token)
            contestants.append(Contestant(label, page, web))
        for contestant in contestants * 10:  # every worker has its imports and connections behind it
            contestant.source.read(one)
        for _ in range(runs):
            for contestant in contestants:
                contestant.read(wanted, connection)
    yield f"{describe_machine(server)} {rows:,} rows, {runs} runs.\n"
    yield "| read | service, µs a row | PostgreSQL, µs a row | of the ceiling |\n|---|---:|---:|---:|"
    for contestant in contestants:
        yield contestant.show(rows, contestants[0].costs)


def main() -> None:
    own = ("--xml", f"with {XML_BYTES // 1024} KB of xml in every call")
    options = read_options("python -m bench.encoders", 300_000, 1_000, 50_000, own)
    for line in run(open_server(options), options.rows, options.runs, XML_BYTES if options.xml else 0):
        print(line, flush=True)


if __name__ == "__main__":
    main()
