"""Measures the service beside what others would build of well-kept parts: python -m bench.peers.

One database, one machine, one run, the contestants in turns. The tables and the
plot go into ../README.md, between its markers, unless --dry says otherwise;
what is measured, and how, stands there too. Times are in seconds and sizes in
bytes until they are shown.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import demo
from bench.__main__ import (
    CEILING,
    CONNECTIONS,
    PEER,
    SAME_WORK,
    Ceiling,
    Page,
    Range,
    compare,
    compose_variables,
    describe_machine,
    fill_database,
    find_range,
    forget_peak,
    load,
    open_server,
    read_options,
    register,
    serve,
    set_index,
    tell,
)
from bench.peers.plot import Line, Panel, draw
from bench.peers.servers import HERE, Rival, find_php, prepare_venv, serve_gunicorn, serve_php, serve_uvicorn
from bench.peers.values import plain

if TYPE_CHECKING:
    from demo import PostgresServer

README = HERE.parent / "README.md"
PLOT = HERE.parent / "peers.svg"
BEGIN, END = "<!-- peers: made by python -m bench.peers -->\n", "<!-- peers: end -->\n"
SERVICE = "the service"
NOTHING = "the service, a path that is not there (404)"
SIZES = (1_000, 10_000, 100_000, 1_000_000)  # rows
SAMPLE = 1_000  # rows whose values are compared
NO_PHP = "PHP is left out: php-fpm with pdo_pgsql, or nginx, is not installed here."


# The contestants --------------------------------------------------------------


def enter_own(stack: ExitStack, variables: Mapping[str, str]) -> list[Rival]:
    """The service and the hand-written peer, which need nothing beyond the test requirements."""
    service = stack.enter_context(serve(variables))
    peer = stack.enter_context(serve(variables, "bench.jsonify_app:app"))
    token = register(service.port)
    return [
        Rival(SERVICE, Page(service, "/api/call_range", {"format": "json"}, token)),
        Rival(f"Flask, psycopg: {PEER}", Page(peer, "/call_range", {}, token)),
    ]


def enter_others(stack: ExitStack, variables: Mapping[str, str], token: str) -> list[Rival]:
    """Each on a server of its own, so that one that is stopped takes no other with it."""
    programs = prepare_venv()
    fastapi, django, flask = (f"bench.peers.{name}_app:app" for name in ("fastapi", "django", "flask_sqlalchemy"))
    servers = [
        ("FastAPI, asyncpg, orjson: streamed", "/streamed", serve_uvicorn(programs, fastapi, variables)),
        ("FastAPI, asyncpg, orjson: all at once", "/all", serve_uvicorn(programs, fastapi, variables)),
        ("Flask, SQLAlchemy, jsonify", "/call_range", serve_gunicorn(programs, flask, variables)),
        ("Django REST framework", "/call_range", serve_gunicorn(programs, django, variables)),
    ]
    if php := find_php():
        servers.append(("PHP, PDO, json_encode", "/", serve_php(php, HERE / "calls.php", variables)))
    return [Rival(name, Page(stack.enter_context(web), route, {}, token)) for name, route, web in servers]


def admit(rivals: Sequence[Rival], sample: Range, one: Range) -> None:
    """Ends the program unless all give the same values as the first; then each has its imports behind it."""
    for rival in rivals:
        compare(rivals[0].page, rival.page, sample, plain)
    for rival in [*rivals] * 10:
        rival.read(one)


# Measuring --------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """Medians of a contestant for a size; share is of the ceiling's speed, within each turn."""

    name: str
    rows: int
    seconds: float
    share: float
    first: float
    peak: int


def count_turns(rows: int, runs: int) -> int:
    return runs * 4 if rows <= 1_000 else runs if rows <= 10_000 else min(runs, 3)


def measure(ceiling: Ceiling, rivals: Sequence[Rival], wanted: Range, turns: int) -> list[Score]:
    """Lets the ceiling and all who still take part take turns; scores those who finished every one."""
    seconds: dict[str, list[float]] = {name: [] for name in (CEILING, *(rival.name for rival in rivals))}
    firsts: dict[str, list[float]] = {name: [] for name in seconds}
    peaks = dict.fromkeys(seconds, 0)
    for _ in range(turns):
        reading = ceiling.read(wanted)
        seconds[CEILING].append(reading.seconds)
        firsts[CEILING].append(reading.first)
        for rival in rivals:
            if rival.stopped:
                continue
            forget_peak(rival.page.web)
            if found := rival.read(wanted):
                seconds[rival.name].append(found.seconds)
                firsts[rival.name].append(found.first)
                peaks[rival.name] = max(peaks[rival.name], rival.peak())
    whole = [name for name, taken in seconds.items() if len(taken) == turns]
    return [score(name, wanted.rows, seconds, firsts[name], peaks[name]) for name in whole]


def score(name: str, rows: int, seconds: Mapping[str, Sequence[float]], firsts: Sequence[float], peak: int) -> Score:
    shares = [best / own for best, own in zip(seconds[CEILING], seconds[name], strict=True)]
    return Score(
        name, rows, statistics.median(seconds[name]), statistics.median(shares), statistics.median(firsts), peak
    )


def measure_sizes(ceiling: Ceiling, rivals: Sequence[Rival], ranges: Sequence[Range], runs: int) -> list[Score]:
    """Of each range, the smallest first."""
    ceiling.read(ranges[-1])  # the table is in memory from here on
    scores = []
    for wanted in ranges:
        tell(f"  {wanted.rows:,} rows")
        scores += measure(ceiling, rivals, wanted, count_turns(wanted.rows, runs))
    return scores


def measure_rates(rivals: Sequence[Rival], one: Range, turns: int, seconds: float) -> dict[str, float]:
    """Answers per second for one call, in turns; first for a path that does not exist."""
    tell("  requests per second")
    routes = {NOTHING: (rivals[0].page, "/api/nothing-here")}
    routes |= {rival.name: (rival.page, rival.page.path(one)) for rival in rivals}
    rates: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(turns):
        for name, route in routes.items():
            rates[name].append(load(*route, seconds))
    return {name: statistics.median(found) for name, found in rates.items()}


# Telling ----------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """All that was measured; stopped says of a contestant why it has no further scores."""

    rows: Sequence[int]
    scores: Sequence[Score]
    rates: Mapping[str, float]
    same_rates: Mapping[str, float]  # when all do the same work
    stopped: Mapping[str, str]

    @property
    def names(self) -> list[str]:
        """Who took part."""
        first = [score for score in self.scores if score.rows == min(self.rows) and score.name != CEILING]
        return [score.name for score in first]

    def find(self, name: str, rows: int) -> Score | None:
        return next((score for score in self.scores if (score.name, score.rows) == (name, rows)), None)


def show_table(title: str, head: Sequence[str], lines: Mapping[str, Sequence[str]]) -> str:
    rule = "|---|" + "---:|" * len(head)
    body = "".join(f"| {name} | {' | '.join(cells)} |\n" for name, cells in lines.items())
    return f"| {title} | {' | '.join(head)} |\n{rule}\n{body}"


def show_sizes(result: Result) -> str:
    """A table of speed, of memory and of the first byte, by the number of rows."""
    shown: dict[str, Callable[[Score], str]] = {
        "rows per second, of the ceiling": lambda score: f"{score.share:.0%} ({score.rows / score.seconds:,.0f})",
        "memory of the largest process, MB": lambda score: f"{score.peak / 1e6:,.0f}",
        "first byte after, ms": lambda score: f"{score.first * 1000:,.0f}",
    }
    head = [f"{rows:,} rows" for rows in result.rows]
    tables = []
    for title, show in shown.items():
        lines = {}
        for name in [CEILING, *result.names]:
            found = [result.find(name, rows) for rows in result.rows]
            lines[name] = [show(score) if score else result.stopped.get(name, "–") for score in found]
        if title.startswith("memory"):
            del lines[CEILING]
        tables.append(show_table(title, head, lines))
    return "\n".join(tables)


def show_rates(rates: Mapping[str, float], same_rates: Mapping[str, float]) -> str:
    """Of both runs the rate and its share of the service's in that run."""
    lines = {}
    for name in rates:
        found = [(run.get(name), run[SERVICE]) for run in (rates, same_rates)]
        lines[name] = [f"{rate:,.0f} ({rate / service:.0%})" if rate else "–" for rate, service in found]
    head = ["requests/s", "requests/s, all doing the same work"]
    return show_table(f"one call, {CONNECTIONS} connections kept alive", head, lines)


def plot(result: Result) -> str:
    """The figures of the tables as a picture."""

    def lines(show: str, factor: float) -> list[Line]:
        found = {name: [score for score in result.scores if score.name == name] for name in result.names}
        return [
            Line(name, [(score.rows, getattr(score, show) * factor) for score in scores], name in result.stopped)
            for name, scores in found.items()
        ]

    return draw(
        [
            Panel("Rows per second, % of the ceiling", lines("share", 100), logarithmic=False),
            Panel("Memory of the largest process, MB", lines("peak", 1e-6)),
            Panel("First byte after, ms", lines("first", 1000)),
        ]
    )


def show_versions() -> str:
    """The peers' own, as their requirements pin them, and PHP's."""
    pins = re.findall(r"^([a-z-]+)(?:\[.*\])?==(\S+)$", (HERE / "requirements.txt").read_text(), re.MULTILINE)
    found = [f"{name} {version}" for name, version in pins]
    if php := find_php():
        told = subprocess.run([php, "-v"], stdout=subprocess.PIPE, text=True, check=True).stdout
        found.append("PHP " + told.split()[1])
    return "Peers: " + ", ".join(found) + "."


def write_readme(text: str, readme: Path = README) -> None:
    """Puts a text between the markers."""
    before, begin, rest = readme.read_text("utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        sys.exit(f"{readme} lacks the lines {BEGIN}{END}")
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}", "utf-8")


# All of it --------------------------------------------------------------------


def run(server: PostgresServer, options: argparse.Namespace) -> Result:
    name = f"peers_{options.rows}"
    fill_database(server, name, options.rows, 0)
    set_index(server, name, wanted=True)
    with demo.connect(server, name) as connection:
        # The service says so in each request. So all have the same plan, the index's order.
        connection.execute(f"ALTER ROLE cdr_api IN DATABASE {name} SET enable_sort = off")
    ranges = [
        find_range(server, name, size) for size in sorted({n for n in SIZES if n < options.rows} | {options.rows})
    ]
    one = find_range(server, name, 1)
    variables = compose_variables(demo.service_dsn(server, name))
    turns, seconds = min(options.runs, 3), 1 if options.quick else 5
    same_rates = measure_same(variables, find_range(server, name, SAMPLE), one, turns, seconds)
    with ExitStack() as stack:
        rivals = enter_own(stack, variables)
        rivals += enter_others(stack, variables, rivals[0].page.token)
        admit(rivals, find_range(server, name, SAMPLE), one)
        rates = measure_rates(rivals, one, turns, seconds)
        scores = measure_sizes(Ceiling(variables["BENCH_DSN"]), rivals, ranges, options.runs)
    stopped = {rival.name: rival.stopped for rival in rivals if rival.stopped}
    return Result([wanted.rows for wanted in ranges], scores, rates, same_rates, stopped)


def measure_same(
    variables: Mapping[str, str], sample: Range, one: Range, turns: int, seconds: float
) -> dict[str, float]:
    """measure_rates where the peers look up the grant as well, and read in a transaction of their own."""
    tell("the same work")
    with ExitStack() as stack:
        rivals = enter_own(stack, {**variables, **SAME_WORK})
        rivals += enter_others(stack, {**variables, **SAME_WORK}, rivals[0].page.token)
        admit(rivals, sample, one)
        return measure_rates(rivals, one, turns, seconds)


def compose(machine: str, loads: str, result: Result, options: argparse.Namespace) -> str:
    parts = [
        f"{machine} {show_versions()} Medians of up to {options.runs * 4} turns. {loads}\n",
        "![Speed, memory and first byte of each, from 1,000 rows on](peers.svg)\n",
        show_sizes(result),
        show_rates(result.rates, result.same_rates),
    ]
    return "\n".join(parts if find_php() else [*parts, f"{NO_PHP}\n"])


def main() -> None:
    own = ("--dry", "leave README.md and the plot as they are")
    options = read_options("python -m bench.peers", 1_000_000, SAMPLE * 2, 20_000, own)
    try:
        server = open_server(options)
        before = os.getloadavg()[0]
        result = run(server, options)
        loads = f"The machine's load before the run was {before:.1f}."
        text = compose(describe_machine(server), loads, result, options)
    except KeyboardInterrupt:
        sys.exit("interrupted")
    print(text, flush=True)
    if not options.dry:
        write_readme(text)
        PLOT.write_text(plot(result), "utf-8")


if __name__ == "__main__":
    main()
