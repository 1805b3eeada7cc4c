"""A client of fusionapi, written in curl from its README alone, meets what docs/migration.md says and no more."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from cdr.selection import FIELDS
from tests.conftest import Client, Database, DatabaseMaker, Gunicorn, problem, serve

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed (apt install curl)")
ALPHA = "alpha.example.com"
PASSWORD_OF_TWELVE = "Secret-12-chars"
# What its README has of each route: parameters in tables, the token in the header Authorization. It shows no command;
# these are what its tables say, as a form and as a query.
SCRIPT = """
ask() { curl -sS -w '\\n%{http_code}\\n' -H 'Accept: application/json' "$@"; echo ---; }
login=(-d email=billing@example.com -d "password=$SECRET")
ask -X POST "$URL/api/register" -d name=Billing "${login[@]}" -d "password_confirmation=$SECRET"
ask -X POST "$URL/api/login" "${login[@]}"
TOKEN=$(curl -sS -X POST "$URL/api/login" "${login[@]}" | sed 's/.*"token":"\\([^"]*\\)".*/\\1/')
get() { ask -G -H "Authorization: Bearer $TOKEN" "$@"; }
get "$URL/api/calls?domain_name=alpha.example.com"
get "$URL/api/call_range" -d domain_name=alpha.example.com \\
  --data-urlencode "from=2026-02-01 00:00:00" --data-urlencode "to=2026-02-28 23:59:59"
get "$URL/api/call_range" --data-urlencode "domain_name= alpha.example.com " \\
  --data-urlencode "from= 2026-02-03 " -d to=2026-02-03
get "$URL/api/concurrent_calls_by_domain" -d date=2026-02-03 -d resolution=
get "$URL/api/active_calls_by_domain" -d date=2026-02-03
ask -X POST -H "Authorization: Bearer $TOKEN" "$URL/api/logout"
get "$URL/api/calls?domain_name=alpha.example.com"
"""


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    database = make_database(index=True)
    start = "2026-02-03 10:00:00+00"
    database.insert_call(start_stamp=start, end_stamp="2026-02-03 10:07:00+00", direction="local", billsec=420)
    database.insert_call(start_stamp=start, end_stamp="2026-02-03 10:01:00+00", direction="inbound", billsec=60)
    return database


@pytest.fixture(scope="module")
def gunicorn(database: Database) -> Iterator[Gunicorn]:
    with serve(database.dsn, CDR_API_REGISTER_DOMAINS=ALPHA, CDR_API_TIMEZONE="UTC") as running:
        yield running


@pytest.fixture(scope="module")
def replies(gunicorn: Gunicorn) -> list[tuple[int, Any]]:
    """Status and body of each request of the script."""
    environ = {"URL": gunicorn.url, "SECRET": PASSWORD_OF_TWELVE, "PATH": "/usr/bin:/bin:/usr/local/bin"}
    done = subprocess.run(["bash", "-eu"], input=SCRIPT, env=environ, capture_output=True, text=True, check=True)
    found = [part.rstrip("\n").rpartition("\n") for part in done.stdout.split("---\n")[:-1]]
    return [(int(status), json.loads(body)) for body, _, status in found]


def test_each_request_of_its_readme_is_answered(replies: list[tuple[int, Any]]) -> None:
    assert [status for status, _ in replies] == [201, 200, 200, 200, 200, 200, 200, 200, 401]


def test_accounts_look_as_they_did(replies: list[tuple[int, Any]]) -> None:
    for _, body in replies[:2]:
        assert set(body) == {"user", "token", "success"}
        assert set(body["user"]) == {"id", "name", "email", "email_verified_at", "created_at", "updated_at"}
        assert body["user"]["email_verified_at"] is None
        assert body["success"] is True
    assert replies[7][1]["message"]
    assert {"message", "success", "data"} == set(replies[8][1])


def test_calls_have_the_keys_that_its_readme_lists(replies: list[tuple[int, Any]]) -> None:
    for _, calls in replies[2:5]:
        assert [call["billsec"] for call in calls] == [60, 420]
        assert all(tuple(call) == FIELDS for call in calls)


def test_intervals_are_five_minutes(replies: list[tuple[int, Any]]) -> None:
    _, peaks = replies[5]
    assert len(peaks) == 24 * 12
    assert list(peaks[0]) == ["domain_name", "start_interval", "end_interval", "active_calls"]
    found = {peak["start_interval"][11:16]: peak["active_calls"] for peak in peaks if peak["active_calls"]}
    assert found == {"10:00": 2, "10:05": 1}
    _, activity = replies[6]
    assert list(activity[0]) == ["start_interval", "end_interval", "domain", "inbound", "outbound", "internal", "total"]
    found = {row["start_interval"][11:16]: (row["inbound"], row["internal"]) for row in activity if row["total"]}
    assert found == {"10:00": (1, 1), "10:05": (0, 1)}


@pytest.fixture(scope="module")
def client(database: Database) -> Client:
    return database.client(database.account(ALPHA))


DAY = {"from": "2026-02-03", "to": "2026-02-03"}


@pytest.mark.parametrize("domain", [f" {ALPHA}", f"{ALPHA} ", f"\t{ALPHA}\r\n"])
def test_blanks_around_a_domain_do_not_count(client: Client, domain: str) -> None:
    for path, more in (("calls", {}), ("call_range", DAY), ("call_feed", {"from": "2026-01-01"}), ("call_totals", DAY)):
        plain = client.get(f"/api/{path}", domain_name=ALPHA, **more)
        assert plain.status_code == 200
        assert client.get(f"/api/{path}", domain_name=domain, **more).data == plain.data
    inside = client.get("/api/calls", domain_name="alpha. example.com")
    assert inside.status_code == 403


def test_blanks_in_a_filter_count(database: Database, client: Client) -> None:
    database.insert_call(accountcode=" x ")
    assert client.calls(accountcode="x") == []
    assert len(client.calls(accountcode=" x ")) == 1


def test_a_parameter_without_a_value_is_as_if_it_were_not_there(client: Client) -> None:
    mine = {"domain_name": ALPHA}
    for path, given in (
        ("call_range", {**DAY, "month": ""}),
        ("call_range", {"month": "2026-02", "from": "", "to": " "}),
        ("concurrent_calls_by_domain", {"date": "2026-02-03", "resolution": "", "from": "", "to": ""}),
    ):
        kept = {name: value for name, value in given.items() if value.strip()}
        assert client.get(f"/api/{path}", **mine, **given).data == client.get(f"/api/{path}", **mine, **kept).data
    missing = client.get("/api/call_range", **mine, **{"from": "", "to": "2026-02-03"})
    assert problem(missing) == {"message": "from is required.", "data": {"from": ["from is required."]}}
    assert list(problem(client.get("/api/call_range", **mine, month=""))["data"]) == ["from", "to"]


@pytest.mark.parametrize("path", ["call_totals", "call_feed", "concurrent_calls_by_domain"])
def test_a_domain_without_a_name_is_not_all_domains(client: Client, path: str) -> None:
    """As of a client that forgot to fill it in."""
    needed = {"call_totals": DAY, "call_feed": {"from": "2026-01-01"}}.get(path, {"date": "2026-02-03"})
    assert client.get(f"/api/{path}", **needed).status_code == 200
    for name in ("", " "):
        assert client.get(f"/api/{path}", domain_name=name, **needed).status_code == 403


# What was ignored or read there, and what it is here, by the table of docs/migration.md.
REFUSED: dict[str, tuple[str, dict[str, str], int]] = {
    "a cache buster": ("/api/calls", {"domain_name": ALPHA, "_": "1700000000"}, 422),
    "a token in the URL": ("/api/calls", {"domain_name": ALPHA, "token": "x"}, 422),
    "a date without dashes": ("/api/call_range", {"domain_name": ALPHA, "from": "20261124", "to": "20261124"}, 422),
    "a date with slashes": ("/api/call_range", {"domain_name": ALPHA, "from": "2026/11/24", "to": "2026/11/24"}, 422),
    "a word": ("/api/call_range", {"domain_name": ALPHA, "from": "yesterday", "to": "today"}, 422),
    "a slash at the end": ("/api/calls/", {"domain_name": ALPHA}, 404),
    "calls under way": ("/api/active_calls", {}, 404),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_here_is_refused_with_a_sentence(client: Client, name: str) -> None:
    path, parameters, status = REFUSED[name]
    response = client.get(path, **parameters)
    assert response.status_code == status
    assert re.fullmatch(r".+\.", problem(response)["message"], re.DOTALL)


def test_a_browsers_accept_header_alone_is_406(client: Client) -> None:
    asked = {"query_string": {"domain_name": ALPHA}}
    assert client.send("GET", "/api/calls", headers={"Accept": "text/html"}, **asked).status_code == 406
    assert client.send("GET", "/api/calls", headers={"Accept": "text/html, */*;q=0.1"}, **asked).status_code == 200
