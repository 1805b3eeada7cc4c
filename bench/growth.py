"""What grows with what: python -m bench.growth [--calls 1000000] [--domains 0,500,5000,50000].

Each line is a request whose cost should follow one thing and no other: a page the
calls in it, an empty poll nothing, a call the one domain that it is of. It stands
beside its ideal, so that the next cost that grows with the wrong thing shows. Costs are
time of processors, of the service and of its PostgreSQL processes, which depends less
than the wall clock on what else the machine does.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import demo
from cdr.check import DOMAINS_INDEX, MANY_DOMAINS
from cdr_api import create_app

DOMAINS = [f"bench{number}.example.com" for number in range(20)]
PAGE = 1_000
PASSWORD = "bench-bench-bench-bench"
FILL = """
    INSERT INTO v_domains (domain_uuid, domain_name, domain_enabled)
    SELECT md5('other ' || i)::uuid, 'other-' || i || '.example.com', true FROM generate_series(1, {number}) AS i
     WHERE NOT EXISTS (SELECT FROM v_domains WHERE domain_uuid = md5('other ' || i)::uuid)"""
GRANT = """
    INSERT INTO cdr_api.grants (account_id, domain_uuid)
    SELECT a.account_id, d.domain_uuid
      FROM cdr_api.accounts AS a
     CROSS JOIN v_domains AS d
     WHERE a.name = 'all' OR a.name = 'half' AND d.domain_uuid < '80000000-0000-0000-0000-000000000000'
        OR a.name IN ('one', 'half') AND d.domain_name = 'bench0.example.com'
        ON CONFLICT DO NOTHING"""


@dataclass(frozen=True)
class Cost:
    """Processor time of a request in the service and in PostgreSQL, in milliseconds: the least of some runs."""

    service: float
    database: float

    def show(self, ideal: float | None = None) -> str:
        total = self.service + self.database
        beside = f"{total / ideal:.1f}" if ideal else "-"
        return f"{self.service:.2f} | {self.database:.2f} | {total:.2f} | {beside} |"

    @property
    def total(self) -> float:
        return self.service + self.database


class Site:
    """A database, the service on it in this process, and tokens for one, half and all of its domains."""

    def __init__(self, server: demo.PostgresServer, name: str, where: str = "", **settings: str) -> None:
        self.where = where  # what its lines add to a request
        self.connection = demo.connect(server, name)
        own = {"CDR_API_DSN": demo.service_dsn(server, name), "CDR_API_REGISTER_DOMAINS": DOMAINS[0]}
        self.settings = {**own, "CDR_API_REGISTRATION": "open", "CDR_API_SYSLOG": "off", **settings}
        self.app = create_app(self.settings)
        self.client = self.app.test_client()
        self.connection.execute(
            "DELETE FROM v_domains WHERE domain_name LIKE 'other-%'; DROP INDEX IF EXISTS cdr_api_domains"
        )
        self.connection.execute("DELETE FROM cdr_api.attempts; DELETE FROM cdr_api.accounts")
        self.tokens = {name: self.register(name) for name in ("one", "half", "all")}
        self.connection.execute(GRANT)

    @contextmanager
    def with_settings(self, **settings: str) -> Iterator[None]:
        """Another service on the same database, within the block."""
        client, other = self.client, create_app(self.settings | settings)
        self.client = other.test_client()
        yield
        self.client = client
        other.extensions["cdr_api"].close()

    def register(self, name: str) -> str:
        person = {"name": name, "email": f"{name}-{time.time_ns()}@example.com", "password": PASSWORD}
        answer = self.client.post("/api/register", json=person | {"password_confirmation": PASSWORD})
        return str(answer.get_json()["token"])

    def get(self, who: str, path: str, **parameters: Any) -> Any:
        headers = {"Authorization": f"Bearer {self.tokens[who]}"}
        response = self.client.get(path, query_string=parameters, headers=headers)
        assert response.status_code == 200, response.text
        assert response.data
        return response

    def database_time(self) -> float:
        """Milliseconds of processors that the service's server processes have taken so far."""
        sessions = self.connection.execute("SELECT pid FROM pg_stat_activity WHERE usename = 'cdr_api'").fetchall()
        files = [Path(f"/proc/{pid}/schedstat") for (pid,) in sessions]
        return sum(int(file.read_text("utf-8").split()[0]) / 1e6 for file in files)

    def measure(self, work: Callable[[], object], runs: int = 9) -> Cost:
        work()
        found = []
        for _ in range(runs):
            database, service = self.database_time(), time.process_time()
            work()
            service = time.process_time() - service
            found.append((service * 1e3, self.database_time() - database))
        return Cost(*map(min, zip(*found, strict=True)))

    def close(self) -> None:
        self.app.extensions["cdr_api"].close()
        self.connection.close()


def has_database(server: demo.PostgresServer, name: str) -> bool:
    with demo.connect(server) as connection:
        return bool(connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone())


def make_database(server: demo.PostgresServer, name: str, calls: int) -> None:
    """A database with calls of some domains, unless it is there from an earlier run."""
    if has_database(server, name):
        return
    print(f"inventing {calls:,} calls …", file=sys.stderr)
    demo.create_database(server, f"{name}_unfinished", domains=DOMAINS)
    with demo.connect(server, f"{name}_unfinished") as connection:
        demo.add_calls(connection, calls, domains=DOMAINS, days=40)
        connection.execute(demo.INDEX)
        connection.execute("VACUUM (ANALYZE) v_xml_cdr")
    with demo.connect(server) as connection:
        connection.execute(f"ALTER DATABASE {name}_unfinished RENAME TO {name}")


def measure_pages(site: Site) -> Iterator[str]:
    """The pages of a first poll: the last should cost what the first do, and those of all domains what one's do."""
    query = "SELECT percentile_disc(%s) WITHIN GROUP (ORDER BY end_stamp) FROM v_xml_cdr"
    ideal = 0.0
    for who in ("one", "all"):
        for place, share in (("the second", 0.0), ("half-way", 0.5), ("after nine tenths", 0.9)):
            start = site.connection.execute(query, [share]).fetchall()[0][0].isoformat()
            page = site.get(who, "/api/call_feed", **{"from": start, "limit": PAGE})
            following = {"cursor": page.headers["X-Next-Cursor"], "limit": PAGE}
            cost = site.measure(partial(site.get, who, "/api/call_feed", **following))
            ideal = ideal or cost.total
            yield f"| a page of {PAGE:,} calls of {who}, {place} | {cost.show(ideal)}"


class Poller:
    """Polls the feed, each time from where the last poll ended."""

    def __init__(self, site: Site, who: str) -> None:
        self.site, self.who = site, who
        self.cursor = site.get(who, "/api/call_feed", **{"from": "2099-01-01"}).headers["X-Next-Cursor"]

    def __call__(self) -> None:
        self.cursor = self.site.get(self.who, "/api/call_feed", cursor=self.cursor).headers["X-Next-Cursor"]


def measure_polls(site: Site) -> Iterator[str]:
    """Polls that find nothing: free where nothing was written, else by the calls of the look-back or of some hours."""
    poll = Poller(site, "all")
    free = site.measure(poll)
    yield f"| a poll, when nothing was written | {free.show(free.total)}"
    site.connection.execute("SELECT txid_current()")
    cost = site.measure(partial(site.get, "all", "/api/call_feed", cursor=poll.cursor))
    yield f"| a poll, when something else was written | {cost.show(free.total)}"
    with site.with_settings(CDR_API_SWEEP_SECONDS="86400"):
        cost = site.measure(partial(site.get, "all", "/api/call_feed", cursor=poll.cursor))
    yield f"| the same between two sweeps | {cost.show(free.total)}"


def measure_domains(site: Site, numbers: Sequence[int]) -> Iterator[str]:
    """Requests beside more and more domains, from some thousands on with the index that flask check names then.

    Those of one domain should not feel the others.
    """
    ideals: dict[str, float] = {}
    call = {"domain_name": DOMAINS[0], "from": "2020-01-01", "to": "2099-01-01", "limit": 1}
    for number in numbers:
        for statement in (FILL, GRANT):
            site.connection.execute(statement.replace("{number}", str(number)))
        if number > MANY_DOMAINS:
            site.connection.execute(DOMAINS_INDEX)
        site.connection.execute("ANALYZE v_domains")
        site.connection.execute("ANALYZE cdr_api.grants")
        for who in ("one", "half", "all"):
            ask = partial(site.get, who, "/api/call_range", **call)
            for name, work in (("a call", ask), ("a poll", Poller(site, who))):
                cost = site.measure(work)
                ideal = ideals.setdefault(f"{name} {who}", cost.total)
                beside = f"beside {number:,} other domains{site.where}"
                yield f"| {name}, by an account of {who}, {beside} | {cost.show(ideal)}"


def open_apart(server: demo.PostgresServer, calls: str) -> Site:
    """A site whose domains and accounts are in a database of their own; calls: the name of that of the calls."""
    name = f"{calls}_domains"
    if not has_database(server, name):
        demo.create_database(server, name, domains=DOMAINS)
    return Site(server, name, ", calls elsewhere", CDR_API_CALLS_DSN=demo.service_dsn(server, calls))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.growth")
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--domains", default="0,500,5000,50000", help="how many others there are, in growing order")
    parser.add_argument("--data", type=Path, default=Path(".demo/bench-growth"))
    options = parser.parse_args()
    server = demo.start_server(options.data / "postgresql")
    name = f"bench_growth_{options.calls}"
    make_database(server, name, options.calls)
    print("| request | service, ms | PostgreSQL, ms | both | of the ideal |\n|---|---:|---:|---:|---:|")
    site = Site(server, name)
    for line in (*measure_pages(site), *measure_polls(site)):
        print(line, flush=True)
    for place in (site, open_apart(server, name)):
        for line in measure_domains(place, [int(number) for number in options.domains.split(",")]):
            print(line, flush=True)
        place.close()


if __name__ == "__main__":
    main()
