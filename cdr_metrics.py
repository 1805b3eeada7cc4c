"""GET /metrics: counters for Prometheus, with CDR_API_METRICS=on.

Not below /api/, so that no nginx file of ours leads there. The counts of all
workers meet in files in a folder, PROMETHEUS_MULTIPROC_DIR, which
gunicorn.conf.py makes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import psycopg
from flask import Flask, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from cdr.database import Database
from cdr.errors import ApiError
from cdr.service import Service

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


def find_lag(service: Service, registry: CollectorRegistry) -> None:
    """How far the feed is held back, if the database with the calls can tell."""
    try:
        found = service.calls.rows("find_oldest_writer")[0]
    except psycopg.Error:
        return
    lag = Gauge("cdr_api_feed_lag_seconds", "Age of the oldest writing transaction.", registry=registry)
    lag.set(found["seconds"] or 0)


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
        find_lag(service, registry)
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)

    service.request_log.observers.append(Counters())
    app.after_request(look_at_pools)
    app.add_url_rule("/metrics", "metrics", metrics)
