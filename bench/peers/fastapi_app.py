# mypy: ignore-errors
"""FastAPI with asyncpg and orjson: /all fetches all, /streamed reads by a cursor.

As the documentation has it: a pool made by the lifespan, HTTPBearer as a
dependency, and, since the rows are JSON's already, a Response returned directly.
"""

import hashlib
import os
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated

import asyncpg
import orjson
from fastapi import Depends, FastAPI, HTTPException, Query, Response
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

TOKEN = os.environ["BENCH_TOKEN_QUERY"].replace("%s", "$1", 1).replace("%s", "$2")
OWN_TRANSACTION = {"isolation": "repeatable_read", "readonly": True} if os.environ["BENCH_BEGIN"] else {}
CALLS = (
    f"SELECT {os.environ['BENCH_COLUMNS']} FROM v_xml_cdr"
    " WHERE domain_uuid = md5('domain ' || $1)::uuid AND end_stamp >= $2 AND end_stamp < $3"
    " ORDER BY end_stamp, xml_cdr_uuid"
)
BATCH = 500  # rows; one by one, each would be a message of its own to the server


@asynccontextmanager
async def lifespan(app):
    async with asyncpg.create_pool(os.environ["BENCH_DSN"], min_size=1, max_size=8) as pool:
        app.state.pool = pool
        yield


app = FastAPI(lifespan=lifespan)


async def check_token(
    credentials: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())], domain_name: str
) -> None:
    values = [hashlib.sha256(credentials.credentials.encode()).digest(), domain_name][: TOKEN.count("$")]
    if not await app.state.pool.fetchval(TOKEN, *values):
        raise HTTPException(401)


def read_range(domain_name: str, first: Annotated[int, Query(alias="from")], last: Annotated[int, Query(alias="to")]):
    start, end = (datetime.fromtimestamp(moment, UTC) for moment in (first, last))
    return domain_name, start, end + timedelta(seconds=1)


Range = Annotated[tuple, Depends(read_range)]


@app.get("/all", dependencies=[Depends(check_token)])
async def fetch_all(wanted: Range) -> Response:
    if OWN_TRANSACTION:
        async with app.state.pool.acquire() as connection, connection.transaction(**OWN_TRANSACTION):
            rows = await connection.fetch(CALLS, *wanted)
    else:
        rows = await app.state.pool.fetch(CALLS, *wanted)
    return Response(orjson.dumps([dict(row) for row in rows], default=str), media_type="application/json")


@app.get("/streamed", dependencies=[Depends(check_token)])
async def stream(wanted: Range) -> StreamingResponse:
    return StreamingResponse(write_rows(wanted), media_type="application/json")


async def write_rows(wanted):
    separator = b"["
    async with app.state.pool.acquire() as connection, connection.transaction(**OWN_TRANSACTION):
        cursor = await connection.cursor(CALLS, *wanted)
        while rows := await cursor.fetch(BATCH):
            yield separator + orjson.dumps([dict(row) for row in rows], default=str)[1:-1]
            separator = b","
    yield b"]" if separator == b"," else b"[]"
