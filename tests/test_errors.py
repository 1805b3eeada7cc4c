"""Everything that is not 2xx comes in one envelope and says what to do."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

import demo
from tests.conftest import Client, Database, DatabaseMaker, Gunicorn, free_port, problem, serve


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    return make_database(calls=30)


BAD_QUERIES = [
    ("", ["domain_name"]),
    ("domain_name=", ["domain_name"]),
    ("domain_name=alpha.example.com&domain_name=alpha.example.com", ["domain_name"]),
    ("domain_name=alpha.example.com&domain=x&Limit=5", ["domain", "Limit"]),
    ("domain_name=alpha.example.com&fields=billsec,nope", ["fields"]),
    ("domain_name=alpha.example.com&fields=billsec,billsec", ["fields"]),
    ("domain_name=alpha.example.com&fields=", ["fields"]),
    ("domain_name=alpha.example.com&fields=*", ["fields"]),
    (
        "domain_name=alpha.example.com&limit=0&answered=yes&min_billsec=-1&billable_only=1",
        ["limit", "answered", "min_billsec", "billable_only"],
    ),
    ("domain_name=alpha.example.com&extension_uuid=101", ["extension_uuid"]),
    ("domain_name=alpha%00.example.com", ["domain_name"]),
    ("domain_name=alpha.example.com&direction=in%00bound", ["direction"]),
    ("domain_name=alpha.example.com&by=middle", ["by"]),
    ("domain_name=alpha.example.com&from=2026-01-01", ["from"]),
    ("domain_name=alpha.example.com&" + "&".join(f"x{i}=1" for i in range(50)), [f"x{i}" for i in range(50)]),
]


@pytest.mark.parametrize(("query", "faulty"), BAD_QUERIES, ids=[q[0][:60] or "nothing" for q in BAD_QUERIES])
def test_bad_parameters_are_422_and_all_named(client: Client, query: str, faulty: list[str]) -> None:
    response = client.send("GET", f"/api/calls?{query}")
    assert response.status_code == 422, response.text
    assert sorted(problem(response)["data"]) == sorted(faulty)


@pytest.mark.parametrize(
    "query",
    ["domain_name=%FF%FE", "%C3%28=1", "domain_name=\xff", "&".join(["a=1"] * 300)],
    ids=["escaped", "a name", "raw", "300 parameters"],
)
def test_invalid_utf_8_and_hundreds_of_parameters_are_422(client: Client, query: str) -> None:
    response = client.send("GET", "/api/calls", environ_overrides={"QUERY_STRING": query})
    assert response.status_code == 422
    problem(response)


@pytest.mark.parametrize("path", ["/api/health", "/api/domains", "/api/login", "/api/register", "/api/logout"])
def test_no_route_ignores_a_parameter(client: Client, path: str) -> None:
    method = "GET" if path in ("/api/health", "/api/domains") else "POST"
    response = client.send(method, f"{path}?pretty=1")
    assert response.status_code == 422
    assert list(problem(response)["data"]) == ["pretty"]


@pytest.mark.parametrize("name", ["password", "token", "access_token", "api_key", "TOKEN"])
def test_secrets_in_the_url_are_refused_with_the_reason(database: Database, name: str) -> None:
    for path in ("/api/login", "/api/calls", "/api/nowhere"):
        response = database.client().send("POST" if path == "/api/login" else "GET", f"{path}?{name}=secret")
        assert response.status_code == 422
        assert "must not stand in the URL" in problem(response)["message"]
        assert "secret" not in response.text


BODIES = [
    pytest.param(b"{", "application/json", 422, id="not JSON"),
    pytest.param(b"", "application/json", 422, id="empty JSON"),
    pytest.param(b"[]", "application/json", 422, id="array"),
    pytest.param(b'[["email", "a@b.c"], ["password", "x"]]', "application/json", 422, id="array of pairs"),
    pytest.param(b"null", "application/json", 422, id="null"),
    pytest.param(b'"text"', "application/json", 422, id="string"),
    pytest.param(b"\xff\xfe", "application/json", 422, id="not UTF-8"),
    pytest.param(b'{"email": 1, "password": 2}', "application/json", 422, id="numbers"),
    pytest.param(b'{"email": "a@b.c", "email": "b@b.c", "password": "x"}', "application/json", 422, id="key twice"),
    pytest.param(b"[" * 100_000, "application/json", 422, id="deep"),
    pytest.param(b'{"a":' * 50_000, "application/json", 422, id="deep objects"),
    pytest.param(b'{"email": NaN, "password": 1e999}', "application/json", 422, id="NaN"),
    pytest.param(b"email=%FF&password=x", "application/x-www-form-urlencoded", 422, id="form not UTF-8"),
    pytest.param(b"email=a&email=b&password=x", "application/x-www-form-urlencoded", 422, id="form twice"),
    pytest.param(b'{"email": "a@b.c", "password": "x"}', "application/x-www-form-urlencoded", 422, id="JSON as a form"),
    pytest.param(b"email=a@b.c&password=x", "application/json", 422, id="a form as JSON"),
    pytest.param(b"email=a@b.c&password=x", "text/plain", 415, id="text"),
    pytest.param(b"<a/>", "application/xml", 415, id="XML"),
    pytest.param(b"email=a@b.c&password=x", None, 415, id="no type"),
    pytest.param(b"--x\r\ngarbage", "multipart/form-data; boundary=x", 422, id="broken parts"),
    pytest.param(b"email=a&password=" + b"x" * 2_000_000, "application/x-www-form-urlencoded", 413, id="2 MB"),
]


@pytest.mark.parametrize(("body", "content_type", "status"), BODIES)
def test_bad_bodies(database: Database, body: bytes, content_type: str | None, status: int) -> None:
    response = database.client().post("/api/login", data=body, content_type=content_type)
    assert response.status_code == status, response.text
    problem(response)


def test_a_chunked_body_over_the_limit_is_413(gunicorn: Gunicorn) -> None:
    """Not cut where the limit is: what stands before might pass for the whole."""
    parts = urlsplit(gunicorn.url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port)
    body = [b'{"email": "a@b.c", "password": "x"}'.ljust(1024 * 1024), b"garbage"]
    connection.request("POST", "/api/login", iter(body), {"Content-Type": "application/json"}, encode_chunked=True)
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["success"] is False
    connection.close()


def test_a_file_where_text_belongs(database: Database) -> None:
    form = {"email": (io.BytesIO(b"a@b.c"), "email.txt"), "password": "x"}
    response = database.client().post("/api/login", data=form, content_type="multipart/form-data")
    assert response.status_code == 422
    assert list(problem(response)["data"]) == ["email"]


@pytest.mark.parametrize(
    "path", ["/", "/api", "/api/", "/api/nowhere", "/api/calls/", "//api//calls", "/api/calls/../x", "/api/%00"]
)
def test_404(client: Client, path: str) -> None:
    response = client.send("GET", path)
    assert response.status_code == 404
    problem(response)


def test_405_names_the_methods(client: Client) -> None:
    for method, path, allow in [
        ("POST", "/api/calls", "GET, HEAD, OPTIONS"),
        ("GET", "/api/login", "OPTIONS, POST"),
        ("BREW", "/api/health", "GET, HEAD, OPTIONS"),
    ]:
        response = client.send(method, path)
        assert response.status_code == 405
        assert ", ".join(sorted(response.headers["Allow"].split(", "))) == allow
        problem(response)


def test_500_says_nothing_about_the_inside(database: Database, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret inside")

    monkeypatch.setattr("cdr_api.read_domains", fail)
    response = client.get("/api/calls", domain_name="alpha.example.com")
    assert response.status_code == 500
    assert "secret" not in response.text
    problem(response)


def test_a_database_that_is_away_is_503(database: Database) -> None:
    dsn = f"host=127.0.0.1 port={free_port()} dbname=x user=cdr_api"
    app = database.app(CDR_API_DSN=dsn, CDR_API_POOL_TIMEOUT="500ms")
    for response in (Client(app).get("/api/health"), Client(app, "cdr_x").get("/api/domains")):
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) > 0
        problem(response)
    # What needs no database is answered all the same.
    assert Client(app).get("/api/nowhere").status_code == 404
    assert Client(app).get("/api/calls").status_code == 401
    assert Client(app).post("/api/login", json={}).status_code == 422


def test_busy_connections_are_503(database: Database) -> None:
    app = database.app(CDR_API_THREADS="1", CDR_API_POOL_TIMEOUT="100ms")
    with app.extensions["cdr_api"].calls.connection():
        response = Client(app).get("/api/health")
    assert response.status_code == 503
    assert "Retry-After" in response.headers
    assert Client(app).get("/api/health").status_code == 200


def test_a_database_without_fusionpbx_is_503_and_says_so(
    server: demo.PostgresServer, make_database: DatabaseMaker
) -> None:
    database = make_database()
    client = database.client(database.account("alpha.example.com"))
    database.execute("ALTER TABLE v_xml_cdr RENAME TO gone")
    for response in (client.get("/api/health"), client.get("/api/calls", domain_name="alpha.example.com")):
        assert response.status_code == 503
        assert 'relation "v_xml_cdr" does not exist' in problem(response)["message"]
    database.execute("ALTER TABLE gone RENAME TO v_xml_cdr")
    assert client.get("/api/health").status_code == 200
    database.execute("REVOKE SELECT ON v_xml_cdr FROM cdr_api")
    response = client.get("/api/calls", domain_name="alpha.example.com")
    assert response.status_code == 503
    assert "permission denied" in problem(response)["message"]


@pytest.fixture(scope="module")
def gunicorn(database: Database) -> Iterator[Gunicorn]:
    with serve(database.dsn) as running:
        yield running


RAW = [
    pytest.param(b"GET /api/calls?" + b"x" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414, id="a query of 1 MB"),
    pytest.param(b"NONSENSE\r\n\r\n", 400, id="not HTTP"),
    pytest.param(b"GET / HTTP/9.9\r\nHost: x\r\n\r\n", 400, id="a version of the future"),
    pytest.param(
        b"GET /api/health HTTP/1.1\r\nHost: x\r\nA: " + b"y" * 100_000 + b"\r\n\r\n", 431, id="a header of 100 kB"
    ),
    pytest.param(b"GET /api/health HTTP/1.1\r\nHost: x\r\nBad Header: 1\r\n\r\n", 400, id="a bad header"),
    pytest.param(b"POST /api/login HTTP/1.1\r\nHost: x\r\nContent-Length: ten\r\n\r\n", 400, id="a bad length"),
]


@pytest.mark.parametrize(("request_bytes", "status"), RAW)
def test_gunicorns_own_refusals_are_in_the_envelope(gunicorn: Gunicorn, request_bytes: bytes, status: int) -> None:
    parts = urlsplit(gunicorn.url)
    with socket.create_connection((str(parts.hostname), int(parts.port or 0))) as client:
        client.settimeout(20)
        with contextlib.suppress(ConnectionError):  # it need not read a megabyte to the end
            client.sendall(request_bytes)
        response = http.client.HTTPResponse(client)
        response.begin()
        body = json.loads(response.read())
    assert response.status == status
    assert response.headers["Content-Type"] == "application/json"
    assert body["success"] is False
    assert json.loads(body["data"]) == {}
