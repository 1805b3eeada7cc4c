"""GET /metrics: counters for Prometheus, with CDR_API_METRICS=on.

Not below /api/, so that no nginx file of ours leads there. The counts of all
workers meet in files in a folder, PROMETHEUS_MULTIPROC_DIR, which
gunicorn.conf.py makes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psycopg
from flask import Flask, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from cdr.database import Database, run
from cdr.errors import ApiError
from cdr.service import Service
from cdr.statements import STATEMENTS

REQUESTS = Counter("cdr_api_requests", "Answers.", ["route", "status"])
SECONDS = Histogram(
    "cdr_api_request_seconds",
    "From the request to the last byte that the client took.",
    ["route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 30, 120, 600, 3600),
)
ROWS = Counter("cdr_api_rows", "Calls sent.", ["route"])
BYTES = Counter("cdr_api_bytes", "Bytes sent, without headers.", ["route"])
BROKEN = Counter("cdr_api_broken_streams", "Answers that ended before they were whole.", ["route"])
FALLBACKS = Counter(
    "cdr_api_fallbacks", "Statements that failed when run prepared, and were streamed instead.", ["statement", "reason"]
)
REFUSED = Counter("cdr_api_failed_logins", "Wrong logins, and tokens that are unknown.", ["kind"])
CONNECTIONS = Gauge(
    "cdr_api_pool_connections", "Connections to PostgreSQL.", ["pool", "state"], multiprocess_mode="livesum"
)


class Counters:
    """Counts what the request log tells."""

    def request(self, facts: Mapping[str, Any]) -> None:
        route = facts["route"]
        REQUESTS.labels(route, str(facts["status"])).inc()
        SECONDS.labels(route).observe(facts["seconds"])
        ROWS.labels(route).inc(facts["rows"])
        BYTES.labels(route).inc(facts["bytes"])
        if facts["broken"]:
            BROKEN.labels(route).inc()
        if facts["status"] == 401:
            REFUSED.labels("login" if route == "/api/login" else "token").inc()

    def fallback(self, statement: str, reason: str) -> None:
        FALLBACKS.labels(statement, reason).inc()


def count_connections(name: str, database: Database) -> None:
    found = database.pool.get_stats()
    idle = found.get("pool_available", 0)
    CONNECTIONS.labels(name, "idle").set(idle)
    CONNECTIONS.labels(name, "used").set(found.get("pool_size", 0) - idle)


# What the databases are asked at each scrape. What one of them cannot tell is left out.
GAUGES = {
    "cdr_api_feed_lag_seconds": "Age of the oldest writing transaction.",
    "cdr_api_newest_call_age_seconds": "Since the end of the newest call.",
    "cdr_api_standby_lag_seconds": "How far the standby that calls are read from is behind.",
    "cdr_api_subscription_running": "Whether the subscription that fills v_xml_cdr runs (0 or 1).",
    "cdr_api_subscription_lag_seconds": "Since the last message that the subscription applied.",
    "cdr_api_live_tokens": "Tokens that are good.",
    "cdr_api_expiring_tokens": "Of these, those that expire within 30 days.",
}
Found = dict[str, float]


def read_newest_call(service: Service) -> Found:
    """By the index alone; without it this would read the whole table."""
    with service.calls.connection() as connection:
        query = STATEMENTS["find_newest_call"].format(each_domain_uuid=STATEMENTS["each_domain_uuid"])
        found = connection.execute(query).fetchall()[0]["seconds"] if connection.indexed else None
    return {} if found is None else {"cdr_api_newest_call_age_seconds": float(found)}


def read_standby(service: Service) -> Found:
    found = service.calls.rows("find_standby_lag")[0]
    is_known = found["in_recovery"] and found["seconds"] is not None
    return {"cdr_api_standby_lag_seconds": found["seconds"]} if is_known else {}


def read_subscription(service: Service) -> Found:
    with service.calls.connection() as connection:
        members = run(connection, "find_tables")[0]["members"]
        found = run(connection, "find_subscriptions", members=members)[0]
    if not found["subscriptions"]:
        return {}
    lag = {} if found["lag"] is None else {"cdr_api_subscription_lag_seconds": float(found["lag"])}
    return {"cdr_api_subscription_running": float(found["known"] or 0), **lag}


def read_tokens(service: Service) -> Found:
    found = service.accounts.rows("count_accounts")[0]
    return {"cdr_api_live_tokens": found["tokens"], "cdr_api_expiring_tokens": found["expiring"]}


def ask_databases(service: Service, registry: CollectorRegistry) -> None:
    """Sets the gauges, and who holds the feed back as a label of its own gauge."""
    found: Found = {}
    for read in (read_newest_call, read_standby, read_subscription, read_tokens):
        with suppress(psycopg.Error):
            found |= read(service)
    with suppress(psycopg.Error):
        writer = service.calls.rows("find_oldest_writer")[0]
        found["cdr_api_feed_lag_seconds"] = writer["seconds"] or 0
        holder = Gauge("cdr_api_feed_holder_seconds", "The same by who it is.", ["holder"], registry=registry)
        if writer["holder"]:
            holder.labels(writer["holder"]).set(writer["seconds"])
    for name, value in found.items():
        Gauge(name, GAUGES[name], registry=registry).set(value)


def register_metrics(app: Flask, service: Service) -> None:
    """Counts every request, and serves the counts."""

    def look_at_pools(response: Response) -> Response:
        for name, database in service.databases.items():
            count_connections(name, database)
        return response

    def metrics() -> Response:
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            raise ApiError(503, "Metrics are counted under gunicorn alone, with its gunicorn.conf.py.")
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        ask_databases(service, registry)
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)

    service.request_log.observers.append(Counters())
    app.after_request(look_at_pools)
    app.add_url_rule("/metrics", "metrics", metrics)
