"""Slow and stalled clients: room is kept for others, and who is too slow is cut off."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import calls_url, curl, open_stream, reach
from tests.conftest import Client, Database, DatabaseMaker, Gunicorn, problem, serve, wait_for
from tests.servers import active_copies, peak_memory, slow


@pytest.fixture(scope="module")
def large(make_database: DatabaseMaker) -> Database:
    """20,000 calls of alpha.example.com with 4 KB of xml each: 120 MB, more than sockets keep."""
    database = make_database(calls=300, index=True)
    database.execute(
        "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_name, end_stamp, xml)"
        " SELECT gen_random_uuid(), 'alpha.example.com', now() - i * interval '1 s', repeat('x', 4000)"
        " FROM generate_series(1, 20000) AS i"
    )
    return database


@pytest.fixture(scope="module")
def token(large: Database) -> str:
    return large.account("alpha.example.com")


@contextlib.contextmanager
def stalled(gunicorn: Gunicorn, tokens: list[str]) -> Iterator[list[bytes]]:
    """Clients that ask for everything and take next to nothing; gives the begin of each answer."""
    with contextlib.ExitStack() as stack:
        opened = [open_stream(gunicorn, token) for token in tokens]
        for client, _ in opened:
            stack.enter_context(client)
        yield [begin for _, begin in opened]


def statuses(answers: list[bytes]) -> list[int]:
    return sorted(int(answer.split()[1]) for answer in answers)


def test_an_account_has_so_many_long_answers_at_once_in_all_workers(large: Database, token: str) -> None:
    with (
        serve(large.dsn, CDR_API_WORKERS="2", CDR_API_ACCOUNT_STREAMS="3") as gunicorn,
        stalled(gunicorn, [token] * 5) as answers,
    ):
        assert statuses(answers) == [200, 200, 200, 429, 429]
        refused = next(answer for answer in answers if b" 429 " in answer)
        assert b"Retry-After: " in refused
        assert b"Content-Type: application/json" in refused
        # Short answers of the account, and everybody else's, go on.
        assert curl(calls_url(gunicorn, limit=2), token, "--fail").returncode == 0
        with stalled(gunicorn, [large.account("alpha.example.com")]) as other:
            assert statuses(other) == [200]


def test_a_statement_without_room_has_a_second(large: Database, token: str) -> None:
    client = large.client(token, large.app(CDR_API_ACCOUNT_STREAMS="1"))
    with large.connect() as connection, connection.transaction():
        # As a long answer of each account would hold it.
        connection.execute("SELECT pg_advisory_xact_lock(1667527681, account_id) FROM cdr_api.accounts")
        assert len(client.calls(limit=2)) == 2
        with slow(large.execute, seconds=30):
            response = client.get("/api/calls", domain_name="alpha.example.com", limit=2)
        assert response.status_code == 429
        assert "long answers" in problem(response)["message"]
    assert len(client.calls(limit=2)) == 2


def test_fifty_readers_that_stall_leave_room_for_everybody_else(large: Database) -> None:
    tokens = [large.account("alpha.example.com") for _ in range(50)]
    with serve(large.dsn, CDR_API_WORKERS="2", CDR_API_THREADS="4") as gunicorn:
        assert curl(calls_url(gunicorn, limit=1), tokens[0], "--fail").returncode == 0
        before = [peak_memory(pid) for pid in gunicorn.worker_pids()]
        with stalled(gunicorn, tokens) as answers:
            # Of four threads in each worker two are kept for short answers.
            assert statuses(answers) == [200] * 4 + [503] * 46
            assert len(active_copies(large)) == 4
            for path in ("health", "domains", "call_range?domain_name=alpha.example.com&from=2020-01-01&to=2020-01-31"):
                done = curl(f"{gunicorn.url}/api/{path}", tokens[0], "--fail", "--max-time", "20")
                assert done.returncode == 0, done.stderr
            if Path("/proc/self/clear_refs").exists():
                after = [peak_memory(pid) for pid in gunicorn.worker_pids()]
                assert max(after) - min(before) < 32 * 1024 * 1024
        wait_for(lambda: not active_copies(large))
        with stalled(gunicorn, tokens[:1]) as answers:
            assert statuses(answers) == [200]


def test_who_takes_an_answer_too_slowly_is_cut_off_and_logged(large: Database, token: str) -> None:
    with serve(large.dsn, CDR_API_CLIENT_TIMEOUT="1s", CDR_API_MIN_RATE="1000000000") as gunicorn:
        client, begin = open_stream(gunicorn, token, buffer=1 << 20)
        assert statuses([begin]) == [200]
        wait_for(lambda: "takes its answer too slowly" in gunicorn.log.read_text("utf-8"))
        wait_for(lambda: not active_copies(large))
        body = begin
        with contextlib.suppress(ConnectionError):
            while chunk := client.recv(1 << 20):
                body += chunk
        assert not body.endswith(b"0\r\n\r\n")
        client.close()
        assert "127.0.0.1 takes" in gunicorn.log.read_text("utf-8")
        assert "Traceback" not in gunicorn.log.read_text("utf-8")
        assert len(json.loads(curl(calls_url(gunicorn), token).stdout)) > 20_000  # a quick one gets all


def test_a_slow_reader_above_the_floor_gets_its_whole_answer(large: Database, token: str) -> None:
    """As slow as its time-out allows three times over: what was taken counts."""
    with serve(large.dsn, CDR_API_CLIENT_TIMEOUT="1s", CDR_API_MIN_RATE="10000000") as gunicorn:
        done = curl(calls_url(gunicorn), token, "--limit-rate", "30M")
        assert done.returncode == 0
        assert len(json.loads(done.stdout)) > 20_000
        assert "too slowly" not in gunicorn.log.read_text("utf-8")


def test_a_body_that_does_not_arrive_is_given_up(large: Database) -> None:
    with serve(large.dsn, CDR_API_CLIENT_TIMEOUT="200ms") as gunicorn:
        with reach(gunicorn) as client:
            client.sendall(b"POST /api/login HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            client.sendall(b"Content-Length: 100\r\n\r\n{")
            client.settimeout(60)
            answer = b"".join(iter(lambda: client.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b'"success": false' in answer
        assert "Traceback" not in gunicorn.log.read_text("utf-8")


def test_readers_in_many_threads_share_the_accounts_limit(large: Database, token: str) -> None:
    """However they race, no more than the limit run, and afterwards all room is free again."""
    app = large.app(CDR_API_ACCOUNT_STREAMS="2", CDR_API_THREADS="16")
    found: list[int] = []
    barrier = threading.Barrier(8)

    def read() -> None:
        response = Client(app, token).get("/api/calls", domain_name="alpha.example.com")
        found.append(response.status_code)
        barrier.wait(60)
        response.close()

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [200] * 2 + [429] * 6
    assert Client(app, token).get("/api/calls", domain_name="alpha.example.com").status_code == 200
