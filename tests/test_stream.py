"""The stream: equal to PostgreSQL's own JSON, flat in memory, and visibly broken when it breaks."""

from __future__ import annotations

import csv
import http.client
import io
import json
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import hypothesis
import pytest
from hypothesis import strategies as st

from cdr.stream import FORMATS, CompiledJsonEncoder, JsonEncoder
from tests.clients import calls_url, curl, open_stream
from tests.conftest import Client, Database, DatabaseMaker, Gunicorn, need, problem, serve, wait_for
from tests.encoders import load_encoder, write_string
from tests.servers import active_copies, peak_memory
from tests.values import ANYTHING, FIXED, NASTY

TEXT_COLUMNS = ("caller_id_name", "last_arg", "xml", "accountcode")

ROWS = st.lists(st.tuples(*[st.none() | NASTY | ANYTHING | FIXED] * len(TEXT_COLUMNS)), min_size=1, max_size=8)


@pytest.fixture(scope="module")
def nasty(make_database: DatabaseMaker) -> Database:
    return make_database()


@pytest.fixture(scope="module")
def nasty_client(nasty: Database) -> Client:
    return nasty.client(nasty.account("alpha.example.com"))


@pytest.fixture(params=["Python", "C"])
def encoder_class(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[JsonEncoder]:
    """Each encoder, for the formats of this process too."""
    chosen: type[JsonEncoder] = JsonEncoder
    if request.param == "C":
        monkeypatch.setattr("cdr.stream.encode_rows", load_encoder(request.getfixturevalue("speedups")))
        chosen = CompiledJsonEncoder
    for name in ("json", "ndjson"):
        monkeypatch.setitem(FORMATS, name, replace(FORMATS[name], encoder=chosen))
    return chosen


@hypothesis.given(ROWS)
@hypothesis.example([("\x7f", "\x01", "\n", "\t")])
@hypothesis.example([("".join(map(chr, range(1, 128))), None, "", "plain"), ("a", "b", "c", "d")])
@hypothesis.settings(
    max_examples=100, deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_values_are_those_of_row_to_json(
    nasty: Database,
    nasty_client: Client,
    encoder_class: type[JsonEncoder],
    rows: list[tuple[str | None, ...]],
) -> None:
    columns = ", ".join(TEXT_COLUMNS)
    with nasty.connect() as connection:
        connection.execute("TRUNCATE v_xml_cdr")
        for i, row in enumerate(rows):
            connection.execute(
                f"INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_name, end_stamp, {columns})"
                " VALUES (gen_random_uuid(), 'alpha.example.com', to_timestamp(%s), %s, %s, %s, %s)",
                [i, *row],
            )
        query = f"SELECT row_to_json(r)::text FROM (SELECT {columns} FROM v_xml_cdr ORDER BY end_stamp) AS r"
        expected = [json.loads(row[0]) for row in connection.execute(query)]
    fields = ",".join(TEXT_COLUMNS)
    assert nasty_client.calls(fields=fields) == expected
    lines = nasty_client.get("/api/calls", domain_name="alpha.example.com", fields=fields, format="ndjson").data
    assert [json.loads(line) for line in lines.split(b"\n")[:-1]] == expected
    table = nasty_client.get("/api/calls", domain_name="alpha.example.com", fields=fields, format="csv").data.decode()
    assert list(csv.DictReader(io.StringIO(table, newline=""))) == [
        {name: value or "" for name, value in row.items()} for row in expected
    ]


@hypothesis.given(st.lists(st.lists(NASTY | FIXED, min_size=3, max_size=3), min_size=1, max_size=5))
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_rows_are_taken_apart_by_cells(encoder_class: type[JsonEncoder], rows: list[list[str]]) -> None:
    """Without a database: what copy_json writes (queries.sql), written by hand."""
    encoder = encoder_class(["a", "b", "c"], b",\n")
    lines = [b"\x7f".join(write_string(text.encode()) for text in row) + b"\n" for row in rows]
    text = encoder([memoryview(line) for line in lines], b"[")
    assert json.loads(text + b"]") == [dict(zip("abc", row, strict=True)) for row in rows]


@pytest.fixture(scope="module")
def large(make_database: DatabaseMaker) -> Database:
    """30,000 calls of alpha.example.com in some 50 MB of JSON."""
    return make_database(calls=50_000, index=True)


@pytest.fixture(scope="module")
def token(large: Database) -> str:
    return large.account("alpha.example.com")


@pytest.fixture(scope="module")
def gunicorn(large: Database, encoder: Path) -> Iterator[Gunicorn]:
    with serve(large.dsn, PYTHONPATH=str(encoder)) as running:
        yield running


@pytest.mark.parametrize("kind", ["json", "ndjson", "csv"])
def test_a_large_answer_is_whole(large: Database, gunicorn: Gunicorn, token: str, kind: str) -> None:
    done = curl(calls_url(gunicorn, format=kind), token)
    assert done.returncode == 0
    text = done.stdout.decode()
    if kind == "json":
        calls = json.loads(text)
    elif kind == "ndjson":
        calls = [json.loads(line) for line in text.splitlines()]
    else:
        calls = list(csv.DictReader(io.StringIO(text, newline="")))
    where = "WHERE domain_name = 'alpha.example.com' ORDER BY end_stamp, xml_cdr_uuid"
    stored = large.execute(f"SELECT xml_cdr_uuid::text FROM v_xml_cdr {where}")
    assert [call["xml_cdr_uuid"] for call in calls] == [row[0] for row in stored]


@pytest.mark.parametrize("kind", ["json", "ndjson", "csv"])
def test_a_killed_backend_is_a_visibly_broken_answer(
    large: Database, gunicorn: Gunicorn, token: str, kind: str
) -> None:
    command = [
        "curl",
        "-sS",
        "--limit-rate",
        "2M",
        "-H",
        f"Authorization: Bearer {token}",
        calls_url(gunicorn, format=kind),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        begin = process.stdout.read(100_000)
        (pid,) = wait_for(lambda: active_copies(large))
        assert large.execute("SELECT pg_terminate_backend(%s)", [pid]) == [(True,)]
        body = begin + process.stdout.read()
    assert process.returncode == 18, process.returncode  # curl: partial file
    with pytest.raises(json.JSONDecodeError):
        json.loads(body)
    assert curl(calls_url(gunicorn, limit=3), token).returncode == 0


def test_a_client_that_goes_away_frees_its_connection(large: Database, gunicorn: Gunicorn, token: str) -> None:
    for _ in range(3):
        client, begin = open_stream(gunicorn, token)
        assert begin.startswith(b"HTTP/1.1 200 OK")
        wait_for(lambda: active_copies(large))
        client.close()
        wait_for(lambda: not active_copies(large))
    idle = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND usename = 'cdr_api' AND state LIKE 'idle in%%'"
    assert large.execute(idle, [large.name]) == [(0,)]


def test_closing_a_stream_cancels_the_query_and_keeps_the_connection(large: Database, token: str) -> None:
    client = large.client(token)
    pool = client.app.extensions["cdr_api"].calls.pool
    for _ in range(5):
        response = client.get("/api/calls", domain_name="alpha.example.com")
        next(iter(response.response))
        assert pool.get_stats()["pool_available"] == 0
        response.close()
        assert pool.get_stats()["pool_available"] == 1
    assert pool.get_stats()["connections_num"] == 1  # the same one, all the time
    assert len(client.calls(limit=5)) == 5


@pytest.mark.parametrize(("alone", "others"), [(True, "0"), (False, "2")])
def test_the_transaction_is_read_only_and_at_one_snapshot(
    large: Database, token: str, *, alone: bool, others: str
) -> None:
    service = large.app(CDR_API_STATEMENT_TIMEOUT="5s", CDR_API_TIMEZONE="Asia/Kolkata").extensions["cdr_api"]
    with service.calls.connection() as connection:
        values = {**service.reading_parameters(sort=True), "account_id": 1, "alone": alone}
        service.begin(connection, values)
        assert connection.has_stream_slot is True
        for name, value in [
            ("transaction_read_only", "on"),
            ("transaction_isolation", "repeatable read"),
            ("statement_timeout", "5s"),
            ("TimeZone", "Asia/Kolkata"),
            ("max_parallel_workers_per_gather", others),
        ]:
            assert connection.execute(f"SHOW {name}").fetchone() == {name: value}


def test_a_statement_that_fails_does_so_before_the_headers(make_database: DatabaseMaker) -> None:
    database = make_database()
    client = database.client(database.account("alpha.example.com"))
    database.execute("ALTER TABLE v_xml_cdr ALTER rtp_audio_in_mos TYPE text")
    database.insert_call(rtp_audio_in_mos="not a number")
    response = client.get("/api/calls", domain_name="alpha.example.com")
    assert response.status_code == 500
    assert "cannot be read" in problem(response)["message"]
    assert client.calls(domain_name="alpha.example.com", fields="billsec", limit=1, direction="inbound") == []


def test_a_statement_that_takes_too_long_is_504(large: Database, token: str) -> None:
    client = large.client(token, large.app(CDR_API_STATEMENT_TIMEOUT="1ms"))
    response = client.get("/api/calls", domain_name="alpha.example.com", hangup_cause="NOTHING")
    assert response.status_code == 504
    problem(response)
    assert client.get("/api/domains").status_code == 200


@pytest.mark.parametrize("kind", ["ndjson", "csv"])
def test_what_has_no_closing_bracket_is_refused_over_http_1_0(gunicorn: Gunicorn, token: str, kind: str) -> None:
    done = curl(calls_url(gunicorn, format=kind), token, "--http1.0", "-w", "%{http_code}")
    assert done.stdout.endswith(b"426")
    envelope = json.loads(done.stdout.removesuffix(b"426"))
    assert envelope["success"] is False
    assert "proxy_http_version 1.1" in envelope["message"]
    assert len(json.loads(curl(calls_url(gunicorn), token, "--http1.0").stdout)) > 29_000


def read_all(url: str, token: str) -> int:
    """The bytes of an answer, thrown away as they come."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port)
    connection.request("GET", f"{parts.path}?{parts.query}", headers={"Authorization": f"Bearer {token}"})
    response = connection.getresponse()
    assert response.status == 200
    size = 0
    while chunk := response.read(1 << 20):
        size += len(chunk)
    connection.close()
    return size


in_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc to see a process's peak memory"
)
DOMAINS = 150
MANY_ROWS = {
    "concurrent_calls_by_domain?date=2026-02-03&resolution=1": 22_000_000,
    "active_calls_by_domain?date=2026-02-03&resolution=1": 22_000_000,
    "call_totals?from=2026-02-03&to=2026-02-03&group_by=domain_name,accountcode,day,hour": 20_000_000,
}


@pytest.fixture(scope="module")
def wide(make_database: DatabaseMaker) -> Database:
    """150 domains, and 100,000 calls each with an accountcode of its own."""
    database = make_database()
    database.execute(
        "INSERT INTO v_domains (domain_uuid, domain_name)"
        f" SELECT gen_random_uuid(), i || '.example.com' FROM generate_series(1, {DOMAINS}) AS i"
    )
    database.execute(
        "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_uuid, domain_name, start_stamp, end_stamp, accountcode)"
        " SELECT gen_random_uuid(), domain_uuid, domain_name, '2026-02-03 10:00+00', '2026-02-03 10:01+00',"
        "        repeat('x', 100) || i"
        "   FROM generate_series(1, 100000) AS i JOIN v_domains ON domain_name = '1.example.com'"
    )
    return database


@in_linux
@pytest.mark.parametrize(("request_", "kind"), [*zip(MANY_ROWS, ["json", "ndjson", "csv"], strict=True)])
def test_memory_does_not_grow_with_the_rows_of_an_aggregate(wide: Database, request_: str, kind: str) -> None:
    """200,000 intervals, or as many groups as calls."""
    token = wide.account(all_domains=True)
    with serve(wide.dsn, CDR_API_WORKERS="1") as gunicorn:
        read_all(f"{gunicorn.url}/api/call_totals?from=2026-02-03&to=2026-02-03&format={kind}", token)
        (pid,) = gunicorn.worker_pids()
        Path(f"/proc/{pid}/clear_refs").write_text("5", "ascii")
        before = peak_memory(pid)
        size = read_all(f"{gunicorn.url}/api/{request_}&format={kind}", token)
        assert size > MANY_ROWS[request_] / (1 if kind == "json" else 3)
        assert peak_memory(pid) - before < 16 * 1024 * 1024


@in_linux
def test_memory_does_not_grow_with_the_number_of_domains(make_database: DatabaseMaker) -> None:
    database = make_database()
    token = database.account(all_domains=True)
    with serve(database.dsn, CDR_API_WORKERS="1") as gunicorn:
        assert read_all(f"{gunicorn.url}/api/domains", token) < 1000
        database.execute(
            "INSERT INTO v_domains (domain_uuid, domain_name)"
            " SELECT gen_random_uuid(), i || '.example.com' FROM generate_series(1, 200000) AS i"
        )
        (pid,) = gunicorn.worker_pids()
        Path(f"/proc/{pid}/clear_refs").write_text("5", "ascii")
        before = peak_memory(pid)
        assert read_all(f"{gunicorn.url}/api/domains", token) > 18_000_000
        assert peak_memory(pid) - before < 16 * 1024 * 1024


@in_linux
@pytest.mark.parametrize("kind", ["json", "ndjson", "csv"])
def test_memory_does_not_grow_with_the_answer(make_database: DatabaseMaker, encoder: Path, kind: str) -> None:
    """Some 300 MB of JSON in 30,000 rows: a worker may grow by 16 MB."""
    database = make_database()
    with database.connect() as connection:
        connection.execute(
            "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_name, end_stamp, caller_id_name, xml)"
            " SELECT gen_random_uuid(), 'alpha.example.com', now() - i * interval '1 s', E'tab\\there',"
            " repeat('0123456789', 1000)"
            " FROM generate_series(1, 30000) AS i"
        )
    token = database.account("alpha.example.com")
    with serve(database.dsn, PYTHONPATH=str(encoder)) as gunicorn:
        read_all(calls_url(gunicorn, format=kind, limit=200), token)  # whatever is loaded once is loaded now
        (pid,) = gunicorn.worker_pids()
        Path(f"/proc/{pid}/clear_refs").write_text("5", "ascii")
        before = peak_memory(pid)
        assert read_all(calls_url(gunicorn, format=kind), token) > 290_000_000
        assert peak_memory(pid) - before < 16 * 1024 * 1024


def test_many_readers_at_once_get_their_own_answers(large: Database, gunicorn: Gunicorn) -> None:
    need("curl")
    tokens = {name: large.account(f"{name}.example.com") for name in ("alpha", "beta", "gamma")}
    wrong: list[str] = []

    def read(name: str) -> None:
        url = f"{gunicorn.url}/api/calls?domain_name={name}.example.com&limit=500&fields=domain_name"
        for _ in range(5):
            calls = json.loads(curl(url, tokens[name]).stdout)
            if len(calls) != 500 or {call["domain_name"] for call in calls} != {f"{name}.example.com"}:
                wrong.append(name)

    threads = [threading.Thread(target=read, args=[name]) for name in tokens for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_sync_worker_is_named_in_the_log(large: Database, token: str) -> None:
    with serve(large.dsn, "--worker-class", "sync", "--threads", "1") as gunicorn:
        curl(calls_url(gunicorn, limit=1), token)
        wait_for(lambda: "sync worker" in gunicorn.log.read_text("utf-8"))
