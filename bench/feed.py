"""What the feed and the counts of simultaneous calls cost: python -m bench.feed.

An empty poll looks at every call of the look-back window (45 days) once, so it is
compared with counting the same window; in a table of ten times as many calls it
must cost the same. The peaks of a day are compared with the obvious self-join, in
which each call counts the calls that are under way as it starts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import demo
from cdr_api import create_app

DOMAIN = "bench.example.com"
WINDOW_DAYS = 45
JOINED = 20_000  # calls; the join of more takes minutes
SELF_JOIN = """
    SELECT max(active) FROM (
        SELECT count(*) AS active
          FROM v_xml_cdr AS a
          JOIN v_xml_cdr AS b ON b.start_stamp <= a.start_stamp AND b.end_stamp > a.start_stamp
         WHERE a.end_stamp > a.start_stamp
         GROUP BY a.xml_cdr_uuid) AS starts"""


def measure(work: Callable[[], object], runs: int) -> float:
    """The median of some runs, in seconds."""
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def make_database(server: demo.PostgresServer, name: str, calls: int, days: int) -> None:
    with demo.connect(server) as connection:
        if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone():
            return
    print(f"inventing {calls:,} calls …", file=sys.stderr)
    demo.create_database(server, f"{name}_unfinished", domains=[DOMAIN])
    with demo.connect(server, f"{name}_unfinished") as connection:
        demo.add_calls(connection, calls, domains=[DOMAIN], days=days)
        connection.execute(demo.INDEX)
        connection.execute("VACUUM (ANALYZE) v_xml_cdr")
    with demo.connect(server) as connection:
        connection.execute(f"ALTER DATABASE {name}_unfinished RENAME TO {name}")


class Poller:
    """A client of the service in this process, with a token for the one domain."""

    def __init__(self, server: demo.PostgresServer, name: str) -> None:
        app = create_app({"CDR_API_DSN": demo.service_dsn(server, name), "CDR_API_REGISTER_DOMAINS": "*"})
        self.client = app.test_client()
        password = "bench-bench-bench-bench"
        person = {"name": "Bench", "email": f"{time.time_ns()}@example.com", "password": password}
        answer = self.client.post("/api/register", json=person | {"password_confirmation": password}).get_json()
        self.headers = {"Authorization": f"Bearer {answer['token']}"}
        self.cursor = ""

    def get(self, path: str, **parameters: str) -> bytes:
        response = self.client.get(path, query_string=parameters, headers=self.headers)
        assert response.status_code == 200, response.text
        self.cursor = response.headers.get("X-Next-Cursor", self.cursor)
        return bytes(response.data)


def measure_polls(server: demo.PostgresServer, name: str, runs: int) -> tuple[float, float, int]:
    """Seconds of an empty poll and of counting its window, and the window's calls."""
    poller = Poller(server, name)
    poller.get("/api/call_feed", **{"from": "2099-01-01"})
    with demo.connect(server, name) as connection:

        def poll() -> None:
            connection.execute("SELECT txid_current()")  # else the window of ids is empty
            assert poller.get("/api/call_feed", cursor=poller.cursor) == b"[]\n"

        poll()
        empty = measure(poll, runs)
        window = f"domain_uuid = md5('domain {DOMAIN}')::uuid AND end_stamp > now() - interval '{WINDOW_DAYS} days'"
        query = f"SELECT count(*) FROM v_xml_cdr WHERE {window}"
        (calls,) = connection.execute(query).fetchall()[0]
        # As the poll, it looks at the rows and goes by the index.
        connection.execute("SET enable_indexonlyscan = off")
        connection.execute("SET random_page_cost = 1.1")
        return empty, measure(lambda: connection.execute(query).fetchall(), runs), calls


def measure_peaks(server: demo.PostgresServer, calls: int, runs: int) -> str:
    name = f"bench_day_{calls}"
    make_database(server, name, calls, days=1)
    poller = Poller(server, name)
    day = {"from": "2020-01-01", "to": "2099-01-01"}
    with demo.connect(server, name) as connection:
        connection.execute("SET jit = off")
        (first, last) = connection.execute("SELECT min(start_stamp), max(end_stamp) FROM v_xml_cdr").fetchall()[0]
        day = {"from": first.isoformat(), "to": last.isoformat(), "resolution": "60"}
        rows = poller.client.get("/api/concurrent_calls_by_domain", query_string=day, headers=poller.headers).get_json()
        peak = max(row["active_calls"] for row in rows)
        sweep = measure(lambda: poller.get("/api/concurrent_calls_by_domain", **day), runs)
        if calls > JOINED:
            return f"| {calls:,} | {peak:,} | {sweep:.2f} | - | - |"
        found: list[int] = []
        joined = measure(lambda: found.append(connection.execute(SELF_JOIN).fetchall()[0][0]), 1)
    assert found[0] == peak, (found, peak)
    return f"| {calls:,} | {peak:,} | {sweep:.2f} | {joined:.2f} | {joined / sweep:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.feed")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--window", type=int, default=1_000_000, help="calls in the look-back window")
    parser.add_argument("--data", type=Path, default=Path(".demo/bench-feed"))
    arguments = parser.parse_args()
    server = demo.start_server(arguments.data / "postgresql")
    print("| calls in the table | in the window | empty poll, s | counting the window, s | ratio |")
    print("|---:|---:|---:|---:|---:|")
    for factor in (1, 10):
        name = f"bench_feed_{factor}"
        make_database(server, name, arguments.window * factor, WINDOW_DAYS * factor)
        poll, count, calls = measure_polls(server, name, arguments.runs)
        total = arguments.window * factor
        print(f"| {total:,} | {calls:,} | {poll:.2f} | {count:.2f} | {poll / count:.2f} |", flush=True)
    print("\n| calls of the day | peak | concurrent_calls_by_domain, s | self-join, s | ratio |")
    print("|---:|---:|---:|---:|---:|")
    for calls in (10_000, 20_000, 100_000):
        print(measure_peaks(server, calls, arguments.runs), flush=True)


if __name__ == "__main__":
    main()
