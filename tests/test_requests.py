"""The line that each request leaves in the log, its id, the metrics, and what flask check learns from requests."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cdr.check import check_files
from tests.clients import calls_url, curl, open_stream, scrape
from tests.commands import check
from tests.conftest import PASSWORD, Client, Database, DatabaseMaker, Gunicorn, serve, wait_for
from tests.servers import active_copies


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    """20,000 calls, of which alpha.example.com has 12,000: 20 MB."""
    return make_database(calls=20_000, index=True)


@pytest.fixture(scope="module")
def token(database: Database) -> str:
    return database.account("alpha.example.com", email="logged@example.com")


def find_line(gunicorn: Gunicorn, request_id: str) -> dict[str, Any]:
    """The JSON line of a request, which is written behind the answer."""

    def look() -> dict[str, Any] | None:
        for line in gunicorn.log.read_text("utf-8").splitlines():
            if line.startswith("{") and (found := json.loads(line))["request_id"] == request_id:
                return dict(found)
        return None

    return dict(wait_for(look))


def ask_with_id(
    gunicorn: Gunicorn, path: str, token: str, request_id: str, *options: str
) -> subprocess.CompletedProcess[bytes]:
    return curl(f"{gunicorn.url}{path}", token, "-H", f"X-Request-ID: {request_id}", *options)


def test_a_request_leaves_one_line_with_what_it_was(database: Database, token: str) -> None:
    account = database.execute("SELECT account_id FROM cdr_api.accounts WHERE email = 'logged@example.com'")[0][0]
    stored = database.execute("SELECT count(*) FROM v_xml_cdr WHERE domain_name = 'alpha.example.com'")[0][0]
    login = ["-d", f"email=logged@example.com&password={PASSWORD}"]
    alpha = "domain_name=alpha.example.com"
    requests: list[tuple[str, list[str], dict[str, Any]]] = [
        (f"/api/calls?{alpha}&limit=7", [], {"route": "/api/calls", "account": account, "status": 200, "rows": 7}),
        (f"/api/calls?{alpha}&limit=7&format=csv", [], {"route": "/api/calls", "status": 200, "rows": 7}),
        (f"/api/calls?{alpha}", [], {"route": "/api/calls", "account": account, "status": 200, "rows": stored}),
        ("/api/calls?domain_name=beta.example.com", [], {"route": "/api/calls", "account": account, "status": 403}),
        ("/api/nowhere", [], {"route": "-", "account": None, "status": 404, "rows": 0}),
        ("/api/login", login, {"route": "/api/login", "method": "POST", "account": None, "status": 200}),
        ("/api/health", ["-I"], {"route": "/api/health", "method": "HEAD", "status": 200, "bytes": 0}),
    ]
    with serve(database.dsn, CDR_API_LOG="json") as gunicorn:
        for i, (path, options, expected) in enumerate(requests):
            answer = ask_with_id(gunicorn, path, token, f"test-{i}", *options).stdout
            found = find_line(gunicorn, f"test-{i}")
            assert found | expected == found
            assert list(found) == (
                "request_id address account method route status rows bytes seconds broken".split()  # noqa: SIM905
            )
            assert found["address"] == "127.0.0.1"
            assert found["bytes"] == (0 if "-I" in options else len(answer))
            assert found["seconds"] > 0
            assert found["broken"] is False
        lines = [line for line in gunicorn.log.read_text("utf-8").splitlines() if line.startswith("{")]
        assert len(lines) == len(requests)
        assert token not in gunicorn.log.read_text("utf-8")
        assert PASSWORD not in gunicorn.log.read_text("utf-8")


def test_a_broken_answer_is_marked(database: Database, token: str) -> None:
    with serve(database.dsn, CDR_API_LOG="json") as gunicorn:
        client, _ = open_stream(gunicorn, token)
        (pid,) = wait_for(lambda: active_copies(database))
        database.execute("SELECT pg_terminate_backend(%s)", [pid])
        client.close()
        wait_for(lambda: '"broken": true' in gunicorn.log.read_text("utf-8"))


def test_the_line_is_text_or_nothing_too(database: Database, token: str) -> None:
    with serve(database.dsn) as gunicorn:
        ask_with_id(gunicorn, "/api/domains", token, "as-text")
        line = wait_for(lambda: re.search(r"^request_id=as-text .*$", gunicorn.log.read_text("utf-8"), re.MULTILINE))
        assert re.fullmatch(
            r"request_id=as-text address=127\.0\.0\.1 account=\d+ method=GET route=/api/domains status=200 rows=0 "
            r"bytes=\d+ seconds=[\d.e-]+ broken=False",
            line[0],
        )
    with serve(database.dsn, CDR_API_LOG="off") as gunicorn:
        ask_with_id(gunicorn, "/api/domains", token, "not-there")
        ask_with_id(gunicorn, "/api/domains", token, "not-there")
        assert "not-there" not in gunicorn.log.read_text("utf-8")


@pytest.mark.parametrize(
    ("given", "kept"),
    [("plain-id_1.2/3+4=", True), ("a" * 128, True), ("a" * 129, False), ("two words", False), ('"quote', False)],
)
def test_a_plain_request_id_is_kept_and_any_other_replaced(database: Database, given: str, *, kept: bool) -> None:
    for path in ("/api/health", "/api/nowhere"):
        shown = Client(database.app()).send("GET", path, headers={"X-Request-ID": given}).headers["X-Request-ID"]
        assert shown == given if kept else re.fullmatch(r"[0-9a-f]{32}", shown)
    assert re.fullmatch(r"[0-9a-f]{32}", Client(database.app()).get("/api/health").headers["X-Request-ID"])


def test_check_tells_how_requests_come_in(make_database: DatabaseMaker) -> None:
    database = make_database(calls=30, index=True)
    app = database.app()
    assert check(app)[1]["requests"].startswith("✓")
    by_proxy = {"headers": {"X-Forwarded-For": "192.0.2.1"}}
    Client(database.app(CDR_API_PROXIES="1")).send("GET", "/api/health", **by_proxy)
    assert check(app)[1]["requests"].startswith("✓")
    Client(app).send("GET", "/api/health", **by_proxy, environ_overrides={"SERVER_PROTOCOL": "HTTP/1.0"})
    status, lines = check(app)
    assert status == 1
    assert "CDR_API_PROXIES is 0" in lines["proxies"]
    assert "proxy_http_version 1.1" in lines["HTTP version"]
    # What the settings have mended is not told any more; and what a request shows to be mended goes.
    assert "proxies" not in check(database.app(CDR_API_PROXIES="1"))[1]
    Client(database.app(CDR_API_PROXIES="1")).send("GET", "/api/health", **by_proxy)
    assert check(app)[0] == 0
    Client(app).send("GET", "/api/health", **by_proxy, environ_overrides={"SERVER_PROTOCOL": "HTTP/1.0"})
    database.execute("UPDATE cdr_api.warnings SET seen_at = now() - interval '25 hours'")
    assert check(app)[0] == 0


def test_check_tells_who_holds_the_feed_back(make_database: DatabaseMaker) -> None:
    database = make_database(calls=30, index=True)
    app = database.app()
    assert check(app)[1]["feed"].startswith("✓ feed               held back by 0 s")
    with database.connect() as connection, connection.transaction():
        connection.execute("CREATE TABLE held (x int)")
        found = database.execute("SELECT holder, seconds FROM cdr_api.oldest_writer()")[0]
        assert found[0].startswith(f"pid {connection.info.backend_pid}, role postgres, ")
        assert 0 < found[1] < 60
        database.execute(
            "CREATE OR REPLACE FUNCTION cdr_api.oldest_writer(OUT holder text, OUT seconds double precision)"
            " LANGUAGE sql AS $$ SELECT 'pid 7, role x, y', 4000 $$"  # nobody waits an hour for a test
        )
        status, lines = check(app)
    assert status == 1
    assert "pg_terminate_backend(7)" in lines["feed"]


def test_check_finds_the_calls_of_domains_that_are_no_more(make_database: DatabaseMaker) -> None:
    database = make_database(calls=30, index=True)
    database.insert_call(domain_name="gone.example.com", domain_uuid="00000000-0000-4000-8000-00000000dead")
    assert check(database.app())[1]["lost calls"].startswith("! lost calls         1 belong to no domain")


def test_check_looks_at_the_files_of_a_deployment(tmp_path: Path) -> None:
    file = tmp_path / "env"
    assert list(check_files(file)) == []
    file.touch(mode=0o640)
    file.chmod(0o640)
    assert "✗" not in [mark for mark, _, text in check_files(file) if "password" in text]
    file.chmod(0o644)
    assert [text for _, _, text in check_files(file) if f"chmod 0640 {file}" in text]


def test_check_speaks_json(database: Database) -> None:
    result = database.app().test_cli_runner().invoke(args=["check", "--json"])
    found = json.loads(result.output)
    assert {tuple(line) for line in found} == {("state", "subject", "text")}
    assert {"state": "good", "subject": "columns", "text": "all 66 fields"} in found


# Metrics ------------------------------------------------------------------------


def test_metrics_are_right_over_several_workers(database: Database, token: str) -> None:
    with serve(database.dsn, CDR_API_WORKERS="3", CDR_API_METRICS="on") as gunicorn:
        for _ in range(30):
            assert curl(calls_url(gunicorn, limit=5), token, "--fail").returncode == 0
        curl(f"{gunicorn.url}/api/domains", "cdr_wrong")
        curl(f"{gunicorn.url}/api/login", "", "-d", "email=a@example.com&password=x")
        calls, before = "/api/calls", scrape(gunicorn)
        assert before["cdr_api_requests_total", calls, "200"] == 30
        assert before["cdr_api_rows_total", calls] == 150
        assert before["cdr_api_bytes_total", calls] > 150 * 1000
        assert before["cdr_api_request_seconds_count", calls] == 30
        assert before["cdr_api_failed_logins_total", "token"] == 1
        assert before["cdr_api_failed_logins_total", "login"] == 1
        assert before["cdr_api_feed_lag_seconds",] >= 0
        assert before["cdr_api_pool_connections", "accounts", "idle"] >= 1
        assert ("cdr_api_broken_streams_total", calls) not in before
        client, _ = open_stream(gunicorn, token)
        client.close()
        wait_for(lambda: scrape(gunicorn).get(("cdr_api_broken_streams_total", calls)) == 1)
        # A worker that ends takes its counts with it as little as its connections stay.
        gunicorn.process.send_signal(1)
        wait_for(lambda: scrape(gunicorn)["cdr_api_requests_total", calls, "200"] == 31)


def test_metrics_are_off_by_default_and_never_below_api(database: Database) -> None:
    assert Client(database.app()).get("/metrics").status_code == 404
    app = database.app(CDR_API_METRICS="on")
    assert Client(app).get("/api/metrics").status_code == 404
    assert not [rule.rule for rule in app.url_map.iter_rules() if "metrics" in rule.rule and "/api" in rule.rule]
