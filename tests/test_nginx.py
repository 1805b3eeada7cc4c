"""Through nginx as shipped: every route by both ways, and nothing that breaks looks whole."""

from __future__ import annotations

import contextlib
import csv
import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from flask import Flask
from werkzeug.test import TestResponse

import demo
from tests.conftest import PASSWORD, Database, DatabaseMaker, Gunicorn, free_port, problem, serve, wait_for
from tests.nginx import NGINX, Nginx, read_response, run_nginx

pytestmark = [
    pytest.mark.direct("is about nginx"),
    pytest.mark.skipif(not NGINX, reason="nginx is not installed (apt install nginx-light)"),
    pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed"),
]

ALPHA = "alpha.example.com"
HUGE = "huge.example.com"
HUGE_CALLS = 6500  # of 50 kB each: more than the 256 MB that nginx takes ahead of its client


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    """3,000 invented calls, and 325 MB of a fourth domain's that gzip makes hardly smaller."""
    database = make_database(calls=3000, index=True)
    with database.connect() as connection:
        demo.add_domain(connection, HUGE)
        connection.execute("ALTER TABLE v_xml_cdr ALTER xml SET STORAGE EXTERNAL")
        connection.execute("ALTER TABLE v_xml_cdr SET UNLOGGED")
        connection.execute(
            "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_name, end_stamp, xml)"
            " SELECT gen_random_uuid(), %s, now() - i * interval '1 s', %s FROM generate_series(1, %s) AS i",
            [HUGE, random.Random(1).randbytes(25_000).hex(), HUGE_CALLS],
        )
    return database


@pytest.fixture(scope="module")
def token(database: Database) -> str:
    return database.account(ALPHA, HUGE)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="cdr-api-run-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def syslog(folder: Path) -> Iterator[socket.socket]:
    """What the service tells syslog."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(folder / "syslog"))
        server.settimeout(30)
        yield server


@pytest.fixture(scope="module")
def gunicorn(database: Database, folder: Path, syslog: socket.socket) -> Iterator[Gunicorn]:
    settings = {"CDR_API_THREADS": "20", "CDR_API_SYSLOG": str(syslog.getsockname())}
    with serve_socket(database.dsn, folder / "socket", **settings) as running:
        yield running


@contextlib.contextmanager
def serve_socket(dsn: str, path: Path, **settings: str) -> Iterator[Gunicorn]:
    with serve(dsn, "--bind", f"unix:{path}", CDR_API_PROXIES="1", **settings) as running:
        wait_for(path.exists)
        yield running


@pytest.fixture(scope="module")
def nginx(gunicorn: Gunicorn, folder: Path) -> Iterator[Nginx]:
    with run_nginx(folder / "socket") as running:
        yield running


def proxied_calls(nginx: Nginx, domain_name: str = HUGE, **parameters: str) -> str:
    return nginx.url("https", "/cdr-api/calls", domain_name=domain_name, **parameters)


# Every route ------------------------------------------------------------------

both_ways = pytest.mark.parametrize("way", ["https", "own"])

RANGE = {"from": "2026-09-01", "to": "2026-09-30"}
QUERIES = {
    "/api/calls": {"domain_name": ALPHA, "limit": "5"},
    "/api/call_range": {"domain_name": ALPHA, **RANGE},
    "/api/call_feed": {"domain_name": ALPHA, "from": "2026-11-01", "format": "csv"},
    "/api/call_totals": RANGE,
    "/api/concurrent_calls_by_domain": {"date": "2026-11-01", "resolution": "60"},
    "/api/active_calls_by_domain": {"date": "2026-11-01", "resolution": "60"},
}
FORM = {"name": "Billing", "email": "EMAIL", "password": PASSWORD, "password_confirmation": PASSWORD}
BODIES = {
    "/api/register": FORM,
    "/api/login": {"email": "EMAIL", "password": PASSWORD},
    "/api/call_lookup": {"xml_cdr_uuid": ["00000000-0000-4000-8000-000000000000"]},
}


NO_CALL = "00000000-0000-4000-8000-0000000000db"  # FusionPBX's own server refuses what ends in db


def routes(app: Flask) -> list[tuple[str, str]]:
    rules = list(app.url_map.iter_rules())
    return [
        (method, rule.rule.replace("<name>", "docs.js").replace("<uuid>", NO_CALL))
        for rule in rules
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})
    ]


def send_route(nginx: Nginx, way: str, method: str, path: str, email: str, token: str) -> TestResponse:
    url = nginx.url(way, path.replace("/api/", "/cdr-api/", 1), **QUERIES.get(path, {}))
    if method == "GET":
        return nginx.send(url, token=token)
    body = json.dumps(BODIES.get(path, {})).replace("EMAIL", email).encode()
    return nginx.send(url, "-H", "Content-Type: application/json", "--data-binary", "@-", body=body, token=token)


@both_ways
def test_every_route_answers_as_it_does_without_nginx(database: Database, nginx: Nginx, way: str) -> None:
    app = database.app()
    found = routes(app)
    assert ("GET", "/api/calls") in found
    for method, path in found:
        email = f"{way}{path.replace('/', '-')}@example.com"
        token = database.account(ALPHA, email=f"new{email}" if path == "/api/register" else email)
        response = send_route(nginx, way, method, path, email, token)
        expected = 201 if path == "/api/register" else 404 if NO_CALL in path else 200
        assert response.status_code == expected, (path, response.text)
        if path in QUERIES:
            assert response.data == database.client(token, app).get(path, **QUERIES.get(path, {})).data


@both_ways
@pytest.mark.parametrize(
    ("path", "parameters"),
    [("/cdr-api/calls", {}), ("/cdr-api/call_range", RANGE), ("/cdr-api/call_feed", {"from": "2026-09-01"})],
)
def test_a_link_is_followed_as_it_is(
    database: Database, nginx: Nginx, token: str, way: str, path: str, parameters: dict[str, str]
) -> None:
    asked = parameters | {"domain_name": ALPHA, "fields": "xml_cdr_uuid", "limit": "100"}
    url = nginx.url(way, path, **asked)
    pages: list[list[str]] = []
    while len(pages) < 3:
        response = nginx.send(url, token=token)
        pages.append([call["xml_cdr_uuid"] for call in json.loads(response.data)])
        link = re.fullmatch(r'<([^>]+)>; rel="next"', response.headers["Link"])
        assert link
        assert link[1].startswith(nginx.url(way, f"{path}?"))
        url = link[1]
    whole = database.client(token).calls(path.replace("/cdr-api/", "/api/"), **asked | {"limit": "300"})
    assert list(itertools.chain(*pages)) == [call["xml_cdr_uuid"] for call in whole]
    assert len(set(map(tuple, pages))) == 3


FORGED = ["X-Forwarded-Host: evil.example.com", "X-Forwarded-Proto: http", "X-Forwarded-Prefix: /evil"]


@pytest.mark.parametrize("header", FORGED)
def test_a_client_cannot_forge_a_link(nginx: Nginx, token: str, header: str) -> None:
    response = nginx.send(proxied_calls(nginx, ALPHA, limit="1"), "-H", header, token=token)
    assert response.headers["Link"].startswith(f"<{nginx.url('https', '/cdr-api/calls?')}")


@pytest.mark.parametrize("host", ["pbx.example.com", "198.51.100.7", "[2001:db8::7]:8443"])
def test_a_link_names_the_host_as_the_client_does(nginx: Nginx, token: str, host: str) -> None:
    response = nginx.send(proxied_calls(nginx, ALPHA, limit="1"), "-H", f"Host: {host}", token=token)
    assert response.headers["Link"].startswith(f"<https://{host}/cdr-api/calls?")


def test_a_uuid_that_ends_in_db_is_no_file(database: Database, nginx: Nginx, token: str) -> None:
    extension = "0b9e2f6c-6a53-4c0e-9c5e-0d9c4b3f7adb"
    uuid = database.insert_call(extension_uuid=extension)
    for way in ("https", "own"):
        url = nginx.url(way, "/cdr-api/calls", domain_name=ALPHA, fields="xml_cdr_uuid", extension_uuid=extension)
        assert json.loads(nginx.send(url, token=token).data) == [{"xml_cdr_uuid": uuid}]


THEIRS = {"/{}/nothing-db": 403, "/{}/.git": 403, "/{}/index.php": 200, "/{}/api/calls": 200}


@pytest.mark.parametrize("path", THEIRS)
def test_fusionpbx_rules_end_where_the_service_begins(nginx: Nginx, path: str) -> None:
    theirs = nginx.send(nginx.url("https", path.format("app")))
    assert theirs.status_code == THEIRS[path]
    assert theirs.mimetype != "application/json"
    for way in ("https", "own"):
        ours = nginx.send(nginx.url(way, path.format("cdr-api")))
        assert ours.status_code == 404
        problem(ours)


def test_plain_http_is_sent_to_https_and_reads_nothing(nginx: Nginx, token: str) -> None:
    response = nginx.send(nginx.url("http", "/cdr-api/calls", domain_name=ALPHA), token=token)
    assert response.status_code == 301
    assert response.headers["Location"].startswith("https://")
    assert b"xml_cdr_uuid" not in response.data


def test_gzip_is_for_those_who_ask_and_the_same(nginx: Nginx, token: str) -> None:
    plain = nginx.send(proxied_calls(nginx, limit="5"), token=token)
    zipped = nginx.send(proxied_calls(nginx, limit="5"), "--compressed", token=token)
    assert plain.headers.get("Content-Encoding") is None
    assert zipped.headers["Content-Encoding"] == "gzip"
    assert zipped.data == plain.data


# What breaks ------------------------------------------------------------------


def backends(database: Database, condition: str) -> list[int]:
    """The service's connections to the database in a state."""
    query = f"SELECT pid FROM pg_stat_activity WHERE datname = %s AND usename = 'cdr_api' AND {condition}"
    return [row[0] for row in database.execute(query, [database.name])]


BUSY = "state <> 'idle'"
LOCKED = "wait_event_type = 'Lock'"


def terminate_backend(database: Database, gunicorn: Gunicorn) -> None:
    (pid,) = wait_for(lambda: backends(database, "state = 'active'"))
    assert database.execute("SELECT pg_terminate_backend(%s)", [pid]) == [(True,)]


def kill_worker(database: Database, gunicorn: Gunicorn) -> None:
    (pid,) = gunicorn.worker_pids()
    os.kill(pid, signal.SIGKILL)


Fault = Callable[[], None]


@pytest.fixture(params=[terminate_backend, kill_worker])
def fault(request: pytest.FixtureRequest, database: Database, gunicorn: Gunicorn) -> Fault:
    """What is to happen to the one answer that is under way then."""
    wait_for(lambda: not backends(database, BUSY))
    return functools.partial(request.param, database, gunicorn)


def break_off(command: list[str], fault: Fault) -> tuple[int, bytes]:
    """curl's exit status, and what it got of an answer that a fault befell in the middle.

    While curl is not read from, it does not read either; so the answer, which is
    longer than what nginx takes ahead, cannot have come to its end.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        begin = process.stdout.read(100_000)
        fault()
        body = begin + process.stdout.read()
    return process.returncode, body


@pytest.mark.parametrize("encoding", [[], ["--compressed"]], ids=["plain", "gzip"])
@pytest.mark.parametrize("kind", ["json", "ndjson", "csv"])
def test_an_answer_that_breaks_off_is_an_error_of_the_client(
    nginx: Nginx, token: str, kind: str, encoding: list[str], fault: Fault
) -> None:
    status, body = break_off(nginx.command(proxied_calls(nginx, format=kind), *encoding, token=token), fault)
    assert status == 18  # curl: partial file
    assert 100_000 < len(body) < 50_000 * HUGE_CALLS
    with pytest.raises(json.JSONDecodeError):
        json.loads(body)
    assert nginx.send(proxied_calls(nginx, limit="1"), token=token).status_code == 200


@pytest.fixture(scope="module")
def old_nginx(gunicorn: Gunicorn, folder: Path) -> Iterator[Nginx]:
    """One that asks in HTTP/1.0, as nginx long did by default."""
    with run_nginx(folder / "socket", {"proxy_http_version 1.1;": "proxy_http_version 1.0;"}) as running:
        yield running


def test_json_that_breaks_off_in_http_1_0_has_no_end(old_nginx: Nginx, token: str, fault: Fault) -> None:
    _, body = break_off(old_nginx.command(proxied_calls(old_nginx), token=token), fault)
    assert body.startswith(b'[{"xml_cdr_uuid":')
    assert not body.rstrip().endswith(b"]")
    with pytest.raises(json.JSONDecodeError):
        json.loads(body)


@pytest.mark.parametrize("kind", ["ndjson", "csv"])
def test_what_has_no_end_is_refused_in_http_1_0(old_nginx: Nginx, token: str, kind: str) -> None:
    response = old_nginx.send(proxied_calls(old_nginx, format=kind), token=token)
    assert response.status_code == 426
    assert "proxy_http_version 1.1" in problem(response)["message"]


@contextlib.contextmanager
def locked_calls(database: Database) -> Iterator[None]:
    """Nobody can read calls meanwhile, as while FusionPBX is upgraded."""
    with database.connect() as connection, connection.transaction():
        connection.execute("LOCK TABLE v_xml_cdr IN ACCESS EXCLUSIVE MODE")
        yield


def test_a_fault_before_the_first_byte_is_503(database: Database, nginx: Nginx, token: str, fault: Fault) -> None:
    command = nginx.command(proxied_calls(nginx), "-i", token=token)
    with locked_calls(database), subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        wait_for(lambda: backends(database, LOCKED))
        fault()
        response = read_response(process.communicate()[0])
    assert_away(response)


def test_what_nobody_waits_for_is_cancelled_behind_nginx_too(database: Database, nginx: Nginx, token: str) -> None:
    """nginx hangs up when its client does (proxy_ignore_client_abort is off)."""
    command = nginx.command(proxied_calls(nginx), "-i", token=token)
    with locked_calls(database):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            wait_for(lambda: backends(database, LOCKED))
            process.kill()
        wait_for(lambda: not backends(database, LOCKED))


def assert_away(response: TestResponse, message: str = "again soon") -> None:
    assert response.status_code == 503
    assert int(response.headers["Retry-After"]) > 0
    assert message in problem(response)["message"]


def test_503_is_of_the_service_without_its_database_and_of_nginx_without_the_service(folder: Path) -> None:
    path = folder / "another"
    with run_nginx(path) as nginx:
        url = nginx.url("own", "/cdr-api/health")
        assert_away(nginx.send(url), "The service is away")
        dsn = f"host=127.0.0.1 port={free_port()} dbname=x"
        with serve_socket(dsn, path, CDR_API_POOL_TIMEOUT="200ms"):
            assert_away(nginx.send(url), "The database is away")
        assert_away(nginx.send(url), "The service is away")


def test_a_socket_that_nobody_listens_to_is_503(folder: Path) -> None:
    path = folder / "left-behind"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    with run_nginx(path) as nginx:
        assert_away(nginx.send(nginx.url("own", "/cdr-api/health")), "The service is away")


# What nginx refuses itself ----------------------------------------------------


@pytest.mark.parametrize("size", [1_500_000, 3_000_000], ids=["more than the service takes", "more than nginx takes"])
@both_ways
def test_a_body_that_is_too_large_is_413(nginx: Nginx, token: str, way: str, size: int) -> None:
    url = nginx.url(way, "/cdr-api/call_lookup")
    response = nginx.send(url, "--data-binary", "@-", token=token, body=b"x" * size)
    assert response.status_code == 413
    problem(response)


@both_ways
def test_a_client_of_http_1_0_is_told_so(nginx: Nginx, token: str, way: str) -> None:
    response = nginx.send(nginx.url(way, "/cdr-api/domains"), "--http1.0", token=token)
    assert response.status_code == 426
    assert "HTTP/1.1" in problem(response)["message"]


def test_what_is_not_of_the_service_is_404_on_its_own_server(nginx: Nginx) -> None:
    for path in ("/", "/api/health", "/metrics", "/cdr-api/..%2fmetrics"):
        response = nginx.send(nginx.url("own", path), "--path-as-is")
        assert response.status_code == 404
        problem(response)


def test_a_stranger_is_told_so_where_only_billing_may_in(folder: Path, gunicorn: Gunicorn) -> None:
    only_billing = {"# allow 203.0.113.7;": "allow 203.0.113.7;", "# deny all;": "deny all;"}
    with run_nginx(folder / "socket", only_billing) as nginx:
        response = nginx.send(nginx.url("https", "/cdr-api/health"))
    assert response.status_code == 403
    problem(response)


UNREADABLE = [
    pytest.param("/cdr-api/calls?domain_name=" + "x" * 9_000, [], 414, id="a URL of 9 kB"),
    pytest.param("/cdr-api/domains", ["-H", "X: " + "y" * 9_000], 400, id="a header of 9 kB"),
    pytest.param("/cdr-api/../../domains", ["--path-as-is"], 400, id="a path that leaves the root"),
    pytest.param("/cdr-api/domains", ["-H", "Transfer-Encoding: nonsense"], 501, id="an unknown encoding"),
    pytest.param("/cdr-api/domains", ["-X", "TRACE"], 405, id="TRACE"),
]


@pytest.mark.parametrize(("path", "options", "status"), UNREADABLE)
def test_what_nginx_cannot_read_is_refused_in_the_envelope_by_its_own_server(
    nginx: Nginx, path: str, options: list[str], status: int
) -> None:
    response = nginx.send(nginx.url("own", path), *options)
    assert response.status_code == status
    problem(response)


def test_http_to_the_port_of_https_is_refused_in_the_envelope(nginx: Nginx) -> None:
    response = nginx.send(nginx.url("own", "/cdr-api/domains").replace("https:", "http:"))
    assert response.status_code == 400
    problem(response)


def assert_too_many(response: TestResponse) -> None:
    assert response.status_code == 429
    assert int(response.headers["Retry-After"]) > 0
    assert "Too many requests" in problem(response)["message"]


def test_guesses_are_429_after_the_burst_and_reading_goes_on(folder: Path, gunicorn: Gunicorn, token: str) -> None:
    with run_nginx(folder / "socket") as nginx:
        paths = ["/cdr-api/login", "/cdr-api/register"] * 20
        responses = [nginx.send(nginx.url("https", path), "-X", "POST") for path in paths]
        statuses = [response.status_code for response in responses]
        assert statuses[:11] == [422] * 11
        assert 429 in statuses
        assert_too_many(responses[statuses.index(429)])
        assert nginx.send(proxied_calls(nginx, ALPHA, limit="1"), token=token).status_code == 200


@pytest.mark.parametrize("path", ["/cdr-api/login", "/cdr-api/register"])
def test_an_ipv6_client_is_its_network_and_an_ipv4_client_its_address(
    folder: Path, gunicorn: Gunicorn, path: str
) -> None:
    """Whatever bytes stand in it. A header tells nginx here where a client comes from."""
    claimed = "set_real_ip_from 127.0.0.1; real_ip_header X-Client;\n"
    one = [f"2001:db8:0:a0a:{i:x}::{i:x}" for i in range(1, 21)]  # with line ends in its first half
    with run_nginx(folder / "socket", {"log_format": claimed + "log_format"}) as nginx:

        def status(address: str) -> int:
            return nginx.send(nginx.url("https", path), "-X", "POST", "-H", f"X-Client: {address}").status_code

        assert [status(address) for address in one[:11]] == [422] * 11
        assert 429 in [status(address) for address in one]
        others = ["2001:db8:0:a0b::1", "2001:db8:0:b0a::1", "::1"]
        others += [f"192.0.2.{i}" for i in range(12)] + [f"::ffff:198.51.100.{i}" for i in range(12)]
        assert [status(address) for address in others] == [422] * len(others)


SMALL = {"/api/health", "/api/login", "/api/register", "/api/logout", "/api/openapi.json"}


def test_the_ninth_answer_at_once_is_429(database: Database, nginx: Nginx, token: str) -> None:
    """Of every route whose answers can be large."""
    large = [
        (m, path)
        for m, path in routes(database.app())
        if path not in SMALL and not re.match("/api/(docs|usage|assets)", path)
    ]
    assert len(large) == 11
    url = proxied_calls(nginx, ALPHA, limit="1")
    # Of several accounts, since the service counts by account.
    commands = [nginx.command(url, "-i", token=database.account(ALPHA)) for _ in range(8)]
    with contextlib.ExitStack() as stack:
        with locked_calls(database):
            processes = [stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE)) for command in commands]
            wait_for(lambda: len(backends(database, LOCKED)) == 8)
            for method, path in large:
                assert_too_many(send_route(nginx, "own", method, path, "", token))
            assert nginx.send(nginx.url("own", "/cdr-api/openapi.json"), token=token).status_code == 200
        responses = [read_response(process.communicate()[0]) for process in processes]
    assert [response.status_code for response in responses] == [200] * 8


# Logs -------------------------------------------------------------------------


def test_no_token_and_no_password_is_logged(database: Database, gunicorn: Gunicorn, folder: Path) -> None:
    token = database.account(ALPHA, HUGE, email="logged@example.com")
    form = {"email": "logged@example.com", "password": PASSWORD}
    with run_nginx(folder / "socket") as nginx:
        # Of an answer that breaks off nginx writes the request into its log of errors.
        break_off(nginx.command(proxied_calls(nginx), token=token), lambda: kill_worker(database, gunicorn))
        post = functools.partial(nginx.send, nginx.url("https", "/cdr-api/login"), "--data-binary", "@-")
        logins = [post("-H", "Content-Type: application/json", body=json.dumps(form).encode())]
        logins += [post(body=urlencode(form).encode())]
        tokens = [token, *(json.loads(login.data)["token"] for login in logins)]
        assert nginx.send(nginx.url("https", "/cdr-api/logout"), "-X", "POST", token=tokens[1]).status_code == 200
        mistaken = nginx.send(nginx.url("https", f"/cdr-api/domains?token={token}"), token=token)
        assert mistaken.status_code == 422
        wait_for(lambda: "/cdr-api/domains" in nginx.logs())
        assert "while reading upstream" in nginx.logs()
        assert [secret for secret in (PASSWORD, *tokens) if secret in nginx.logs()] == []


# Addresses --------------------------------------------------------------------

FORGED_ADDRESSES = ["X-Forwarded-For: 203.0.113.9", "X-Real-IP: 203.0.113.9", "Forwarded: for=203.0.113.9"]


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2"])
@pytest.mark.parametrize("way", ["https", "own"])
def test_the_service_sees_the_address_of_the_client(
    nginx: Nginx, syslog: socket.socket, way: str, address: str
) -> None:
    headers = [option for header in FORGED_ADDRESSES for option in ("-H", header)]
    options = [*headers, "--interface", address]
    assert nginx.send(nginx.url(way, "/cdr-api/domains"), *options, token="wrong").status_code == 401
    assert f"[{address}] authentication failed for " in syslog.recv(4096).decode()
    form = urlencode({"email": f"{way}@example.com", "password": PASSWORD}).encode()
    response = nginx.send(nginx.url(way, "/cdr-api/login"), *options, "--data-binary", "@-", body=form)
    assert response.status_code == 401
    assert f"[{address}] authentication failed for {way}@example.com" in syslog.recv(4096).decode()


# Slow readers -----------------------------------------------------------------

READERS: dict[str, Callable[[str], Iterable[Any]]] = {
    "json": json.loads,
    "ndjson": lambda text: map(json.loads, text.splitlines()),
    "csv": lambda text: csv.DictReader(text.splitlines()),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_slow_reader_keeps_no_connection_and_gets_all(
    database: Database, nginx: Nginx, token: str, kind: str
) -> None:
    wait_for(lambda: not backends(database, BUSY))
    url = proxied_calls(nginx, limit="3000", format=kind)  # 150 MB: less than nginx takes ahead
    with subprocess.Popen(nginx.command(url, token=token), stdout=subprocess.PIPE) as process:
        assert process.stdout
        begin = process.stdout.read(100_000)
        wait_for(lambda: not backends(database, BUSY))
        assert process.poll() is None
        body = begin + process.stdout.read()
    assert process.returncode == 0
    where = f"WHERE domain_name = '{HUGE}' ORDER BY end_stamp, xml_cdr_uuid LIMIT 3000"
    stored = database.execute(f"SELECT xml_cdr_uuid::text, xml FROM v_xml_cdr {where}")
    assert [(call["xml_cdr_uuid"], call["xml"]) for call in READERS[kind](body.decode())] == stored


def test_an_export_of_a_gigabyte_frees_its_worker_long_before_a_slow_client_is_done(
    make_database: DatabaseMaker, folder: Path
) -> None:
    """With the shipped files as they are: nginx keeps up to 1.1 GB of an answer."""
    database = make_database()
    database.execute(
        "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_name, end_stamp, xml)"
        " SELECT gen_random_uuid(), %s, now() - i * interval '1 s', repeat('0123456789', 5000)"
        " FROM generate_series(1, 21000) AS i",
        [ALPHA],
    )
    token, shipped = database.account(ALPHA), {"temp_file_size 1100m": "temp_file_size 1100m"}
    with serve_socket(database.dsn, folder / "large"), run_nginx(folder / "large", shipped) as nginx:
        command = nginx.command(proxied_calls(nginx, ALPHA, format="ndjson"), token=token)
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout
            begin = process.stdout.read(100_000)
            assert begin
            wait_for(lambda: not backends(database, BUSY), 60)
            assert process.poll() is None  # the client has next to nothing yet
            size, lines = len(begin), begin.count(b"\n")
            while chunk := process.stdout.read(1 << 20):
                size, lines = size + len(chunk), lines + chunk.count(b"\n")
    assert process.returncode == 0
    assert lines == 21_000
    assert size > 1_050_000_000
