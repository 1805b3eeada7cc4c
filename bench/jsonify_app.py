"""What people would write by hand: fetchall() and jsonify.

It gives the same calls with the same values as the service, without filters or
other formats, and asks one query whether the token is good, of the service's own
accounts. BENCH_DSN is the database's libpq connection string, BENCH_TOKEN_QUERY
that query; where it has two placeholders, the second is the domain's name. BENCH_BEGIN,
if not empty, asks for a transaction of its own for the calls.
"""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from flask import Flask, Response, abort, jsonify, request
from psycopg import IsolationLevel
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool

from cdr.selection import FIELDS, INTEGERS, NUMBERS

QUERY = f"""
SELECT {", ".join(FIELDS)}
  FROM v_xml_cdr
 WHERE domain_uuid = md5('domain ' || %s)::uuid AND end_stamp >= %s AND end_stamp < %s
 ORDER BY end_stamp, xml_cdr_uuid
"""
app = Flask(__name__)
pool = ConnectionPool(os.environ["BENCH_DSN"], min_size=0, max_size=8, open=False)


def show(name: str, value: Any) -> Any:
    """A column's value as JSON has it; jsonify itself knows UUIDs."""
    if isinstance(value, datetime):
        return value.isoformat() if value.timestamp() > 86400 else None
    if isinstance(value, Decimal):
        return float(value) if name in NUMBERS else int(value) if name in INTEGERS else str(value)
    return value


@app.before_request
def check_token() -> None:
    token = request.authorization.token if request.authorization else None
    digest = hashlib.sha256((token or "").encode()).digest()
    pool.open()
    with pool.connection() as connection:
        query = os.environ["BENCH_TOKEN_QUERY"]
        values = [digest, request.args.get("domain_name")][: query.count("%s")]
        if not connection.execute(query, values).fetchone():
            abort(401)


@app.get("/call_range")
def call_range() -> Response:
    """The calls that end from "from" to "to", in epoch seconds, both included."""
    start = datetime.fromtimestamp(int(request.args["from"]), UTC)
    end = datetime.fromtimestamp(int(request.args["to"]) + 1, UTC)
    with pool.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
        if os.environ["BENCH_BEGIN"]:
            connection.isolation_level, connection.read_only = IsolationLevel.REPEATABLE_READ, True
        rows = cursor.execute(QUERY, (request.args["domain_name"], start, end)).fetchall()
    return jsonify([{name: show(name, value) for name, value in row.items()} for row in rows])
