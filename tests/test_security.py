"""What gets out, and what does not: headers, tokens, columns, cells that a spreadsheet would run."""

from __future__ import annotations

import csv
import io
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest

from cdr.accounts import digest_token
from cdr.stream import FORMATS
from tests.clients import curl
from tests.conftest import PASSWORD, ROOT, Client, Database, DatabaseMaker, need, problem, serve, wait_for


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    return make_database(calls=300)


# Headers ----------------------------------------------------------------------

ANSWERS = [
    ("GET", "/api/calls?domain_name=alpha.example.com", 200),
    ("GET", "/api/calls?domain_name=alpha.example.com&format=csv", 200),
    ("GET", "/api/domains", 200),
    ("GET", "/api/calls?domain_name=nobody", 403),
    ("GET", "/api/nowhere", 404),
    ("POST", "/api/calls", 405),
    ("POST", "/api/login", 422),
    ("POST", "/api/logout", 200),
]


@pytest.mark.parametrize(("method", "path", "status"), ANSWERS)
def test_no_answer_is_kept_sniffed_shared_or_tells_a_version(
    database: Database, method: str, path: str, status: int
) -> None:
    token = database.account("alpha.example.com")
    with serve(database.dsn) as gunicorn:
        head = curl(f"{gunicorn.url}{path}", token, "-X", method, "-D", "-", "-o", "/dev/null").stdout.decode()
    lines = head.splitlines()
    assert lines[0].split()[1] == str(status)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["server"] == "gunicorn"
    assert not [name for name in headers if name.startswith("access-control") or name == "x-powered-by"]


def test_only_configured_origins_may_read_answers(database: Database) -> None:
    token = database.account("alpha.example.com")
    app = database.app(CDR_API_CORS_ORIGINS="https://billing.example.com, http://localhost:3000")
    for origin, allowed in [
        ("https://billing.example.com", True),
        ("http://localhost:3000", True),
        ("https://billing.example.com.evil.example", False),
        ("https://BILLING.example.com", False),
        ("null", False),
    ]:
        for method, path in [("GET", "/api/domains"), ("OPTIONS", "/api/call_range"), ("GET", "/api/nowhere")]:
            response = Client(app, token).send(method, path, headers={"Origin": origin})
            assert response.headers.get("Access-Control-Allow-Origin") == (origin if allowed else None)
            assert "Access-Control-Allow-Credentials" not in response.headers
            assert "Origin" in response.headers["Vary"]


def test_a_preflight_needs_no_token_and_runs_nothing(database: Database) -> None:
    app = database.app(CDR_API_CORS_ORIGINS="https://billing.example.com")
    response = Client(app).send("OPTIONS", "/api/call_feed", headers={"Origin": "https://billing.example.com"})
    assert response.status_code == 200
    assert response.data == b""
    assert "Authorization" in response.headers["Access-Control-Allow-Headers"]
    assert "X-Next-Cursor" in response.headers["Access-Control-Expose-Headers"]


# Tokens -----------------------------------------------------------------------


def log_out(client: Client, _run: Callable[..., Any], _email: str) -> None:
    assert client.post("/api/logout").status_code == 200


def disable(_client: Client, run: Callable[..., Any], email: str) -> None:
    run("user", "disable", email)


def delete(_client: Client, run: Callable[..., Any], email: str) -> None:
    run("user", "delete", email)


def change_password(_client: Client, run: Callable[..., Any], email: str) -> None:
    run("user", "password", email, "--password-stdin", "--revoke-tokens", input="another-long-password-1\n")


def expire(client: Client, _run: Callable[..., Any], _email: str) -> None:
    accounts = client.app.extensions["cdr_api"].accounts
    with accounts.connection() as connection:
        connection.execute(
            "UPDATE cdr_api.tokens SET expires_at = now() WHERE digest = %s", [digest_token(client.token or "")]
        )


@pytest.mark.parametrize("end", [log_out, disable, delete, change_password, expire])
def test_a_token_is_dead_on_every_worker_at_once(database: Database, end: Callable[..., None]) -> None:
    need("curl")
    """Every worker has answered with it before, and none answers after."""
    email = f"{end.__name__}@example.com"
    token = database.account("alpha.example.com", email=email)
    app = database.app()
    run = app.test_cli_runner().invoke
    with serve(database.dsn, CDR_API_WORKERS="3", CDR_API_THREADS="4") as gunicorn:
        url = f"{gunicorn.url}/api/domains"

        def ask(times: int) -> set[bytes]:
            found = set()

            def one() -> None:
                found.add(curl(url, token, "-o", "/dev/null", "-w", "%{http_code}").stdout)

            threads = [threading.Thread(target=one) for _ in range(times)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return found

        assert ask(24) == {b"200"}
        end(Client(app, token), lambda *args, **options: run(args=list(args), **options), email)
        assert ask(24) == {b"401"}


def test_a_new_password_leaves_tokens_alone_unless_told_otherwise(database: Database) -> None:
    token = database.account("alpha.example.com", email="kept@example.com")
    app = database.app()
    args = ["user", "password", "kept@example.com", "--password-stdin"]
    assert app.test_cli_runner().invoke(args=args, input="another-long-password-1\n").exit_code == 0
    assert Client(app, token).get("/api/domains").status_code == 200


def test_a_dump_of_the_side_tables_holds_nothing_that_opens_a_door(database: Database) -> None:
    token = database.account("alpha.example.com", email="dumped@example.com")
    tables = ("accounts", "grants", "tokens", "secrets", "attempts", "version")
    dump = "".join(str(database.execute(f"SELECT t::text FROM cdr_api.{table} AS t")) for table in tables)
    assert "dumped@example.com" in dump
    for secret in (token, token.removeprefix("cdr_"), PASSWORD):
        assert secret not in dump
    digest = digest_token(token).hex()
    assert digest in dump
    for tried in (digest, f"cdr_{digest}", f"\\x{digest}"):
        assert database.client(tried).get("/api/domains").status_code == 401


def test_tokens_and_passwords_are_in_no_log_and_no_error(database: Database) -> None:
    token = database.account("alpha.example.com", email="logged@example.com")
    secret = "My-Secret-Pass-99"
    with serve(database.dsn, "--access-logfile", "-", "--log-level", "debug") as gunicorn:
        answers = [
            curl(f"{gunicorn.url}/api/calls?domain_name=alpha.example.com&limit=1", token),
            curl(f"{gunicorn.url}/api/calls?domain_name=alpha.example.com&token={token}", token),
            curl(f"{gunicorn.url}/api/calls?nonsense=1", token),
            curl(f"{gunicorn.url}/api/domains", token + "x"),
            curl(f"{gunicorn.url}/api/login", "", "-d", f"email=logged@example.com&password={secret}"),
            curl(f"{gunicorn.url}/api/login", "", "-d", f"email={secret}@example.com&password={secret}&x=1"),
            curl(
                f"{gunicorn.url}/api/login",
                "",
                "-H",
                "Content-Type: application/json",
                "-d",
                f'{{"password":"{secret}"',
            ),
        ]
        with database.connect() as connection:  # a statement that fails, with a token in hand
            connection.execute("ALTER TABLE cdr_api.tokens RENAME TO away")
            answers.append(curl(f"{gunicorn.url}/api/domains", token))
            connection.execute("ALTER TABLE cdr_api.away RENAME TO tokens")
        wait_for(lambda: "database: relation" in gunicorn.log.read_text("utf-8"))
        # gunicorn's access log shows the URL as it came; the token in it was refused, but it was sent.
        log = gunicorn.log.read_text("utf-8").replace(f"&token={token}", "")
    for text in [log, *(answer.stdout.decode() for answer in answers)]:
        assert token not in text
        assert secret not in text


# Fields -----------------------------------------------------------------------


def test_a_column_that_fusionpbx_adds_is_not_served(make_database: DatabaseMaker) -> None:
    database = make_database(calls=30)
    client = database.client(database.account("alpha.example.com"))
    database.execute("ALTER TABLE v_xml_cdr ADD internal_margin text DEFAULT 'a secret of tomorrow'")
    for kind in FORMATS:
        response = client.get("/api/calls", domain_name="alpha.example.com", format=kind)
        assert response.status_code == 200
        assert b"tomorrow" not in response.data
    response = client.get("/api/calls", domain_name="alpha.example.com", fields="internal_margin")
    assert response.status_code == 422


FORMULAS = ["=1+1", "+49301234", "-2", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "'quoted", "plain = text", "", "a\n=1"]


def test_cells_that_a_spreadsheet_would_run_are_defused_on_request(make_database: DatabaseMaker) -> None:
    database = make_database()
    client = database.client(database.account("alpha.example.com"))
    for i, text in enumerate(FORMULAS):
        database.insert_call(caller_id_name=text, end_stamp=f"2026-02-03 10:00:{i:02d}+00", billsec=7, waitsec=-5)

    def read(**parameters: str) -> list[list[str]]:
        wanted = {"domain_name": "alpha.example.com", "format": "csv", "fields": "caller_id_name,billsec,waitsec"}
        text = client.get("/api/calls", **wanted | parameters).data.decode()
        return list(csv.reader(io.StringIO(text, newline="")))[1:]

    assert [row[0] for row in read()] == FORMULAS
    assert [row[0] for row in read(csv_safe="false")] == FORMULAS
    defused = [f"'{text}" if text[:1] in "=+-@\t\r\n" and text else text for text in FORMULAS]
    assert [row[0] for row in read(csv_safe="true")] == defused
    # Numbers stay numbers, however they begin.
    assert {(row[1], row[2]) for row in read(csv_safe="true")} == {("7", "-5")}


def test_defusing_is_for_csv_alone(database: Database) -> None:
    client = database.client(database.account("alpha.example.com"))
    for path in ("/api/calls?", "/api/call_feed?from=2026-01-01&"):
        response = client.send("GET", f"{path}domain_name=alpha.example.com&csv_safe=true")
        assert response.status_code == 422
        assert list(problem(response)["data"]) == ["csv_safe"]
    by_header = client.send(
        "GET", "/api/calls?domain_name=alpha.example.com&csv_safe=true", headers={"Accept": "text/csv"}
    )
    assert by_header.status_code == 200


# The documents ------------------------------------------------------------------


@pytest.mark.parametrize("document", ["SECURITY.md", "DEPLOYMENT.md", "docs/scaling.md"])
def test_every_test_that_a_document_names_exists(document: str) -> None:
    text = (ROOT / document).read_text("utf-8")
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", text)
    assert named
    for file, test in named:
        source = (ROOT / "tests" / file).read_text("utf-8")
        assert not test or re.search(rf"def {test}\b", source), (file, test)
