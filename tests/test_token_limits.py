"""Tokens that were made for some of their account's domains, and for clients of some networks."""

from __future__ import annotations

import json
from typing import Any

import pytest
from flask import Flask

from tests.conftest import Client, Database, DatabaseMaker, problem

ALPHA, BETA, GAMMA = (f"{name}.example.com" for name in ("alpha", "beta", "gamma"))
DAY = {"from": "2026-02-03", "to": "2026-02-03"}
EMAIL = "limited@example.com"


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    database = make_database(index=True)
    for name in (ALPHA, BETA, GAMMA, "nobody.example.com"):
        database.insert_call(domain_name=name, start_stamp="2026-02-03 09:59:00+00", accountcode=name)
    database.account(ALPHA, BETA, email=EMAIL)
    database.account(email="everything@example.com", all_domains=True)
    return database


@pytest.fixture(scope="module")
def app(database: Database) -> Flask:
    return database.app(CDR_API_PROXIES="1")


def create(app: Flask, *options: str, email: str = EMAIL) -> str:
    made = app.test_cli_runner().invoke(args=["token", "create", email, *options])
    assert made.exit_code == 0, made.output
    return made.stdout.strip()


def seen(client: Client) -> dict[str, Any]:
    """Of whom each route without a domain tells."""
    lookup = [f"00000000-0000-4000-8000-{i:012d}" for i in range(1, 5)]
    found = client.post("/api/call_lookup", json={"xml_cdr_uuid": lookup}).get_json()
    assert len(found["calls"]) + len(found["not_found"]) == 4
    return {
        "domains": {row["domain_name"] for row in client.get("/api/domains").get_json()},
        "feed": {call["accountcode"] for call in client.get("/api/call_feed", **{"from": "2026-01-01"}).get_json()},
        "totals": {row["accountcode"] for row in totals(client)},
        "lookup": {call["accountcode"] for call in found["calls"]},
        "peaks": {row["domain_name"] for row in intervals(client, "concurrent") if row["active_calls"]},
        "activity": {row["domain"] for row in intervals(client, "active") if row["total"]},
    }


def totals(client: Client) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(client.get("/api/call_totals", group_by="accountcode", **DAY).data)
    return rows


def intervals(client: Client, kind: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(client.get(f"/api/{kind}_calls_by_domain", **DAY).data)
    return rows


@pytest.mark.parametrize("email", [EMAIL, "everything@example.com"])
def test_a_token_for_some_domains_reads_those_and_nothing_else(database: Database, app: Flask, email: str) -> None:
    client = Client(app, create(app, "--domain", BETA, email=email))
    assert seen(client) == {key: {BETA} for key in seen(client)}
    assert len(client.calls(domain_name=BETA)) == 1
    for name in (ALPHA, GAMMA, "no.such.domain"):  # as to any account that may not read it
        response = client.get("/api/calls", domain_name=name)
        assert response.status_code == 403
        assert problem(response)["message"] == "This account may not read this domain."
    ((uuid,),) = database.execute("SELECT domain_uuid::text FROM v_domains WHERE domain_name = %s", [ALPHA])
    assert client.get("/api/call_range", domain_uuid=uuid, **DAY).status_code == 403
    whole = Client(app, create(app, email=email))
    assert {ALPHA, BETA} <= seen(whole)["feed"]


def test_a_token_for_several_domains_by_name_and_by_uuid(database: Database, app: Flask) -> None:
    ((uuid,),) = database.execute("SELECT domain_uuid::text FROM v_domains WHERE domain_name = %s", [ALPHA])
    client = Client(app, create(app, "--domain", BETA, "--domain", uuid))
    assert seen(client) == {key: {ALPHA, BETA} for key in seen(client)}


def test_a_grant_that_is_taken_is_taken_from_its_tokens(database: Database, app: Flask) -> None:
    database.account(ALPHA, BETA, email="shrinking@example.com")
    client = Client(app, create(app, "--domain", BETA, email="shrinking@example.com"))
    assert len(client.calls(domain_name=BETA)) == 1
    assert app.test_cli_runner().invoke(args=["user", "revoke", "shrinking@example.com", BETA]).exit_code == 0
    assert client.get("/api/calls", domain_name=BETA).status_code == 403
    assert seen(client) == {key: set() for key in seen(client)}


def test_a_cursor_is_not_good_for_a_token_that_reads_other_domains(app: Flask) -> None:
    """What the first did not show would never come."""
    some, other, whole = (
        Client(app, create(app, *options)) for options in (["--domain", BETA], ["--domain", ALPHA], [])
    )
    for first in (some, whole):
        cursor = first.get("/api/call_feed", **{"from": "2026-01-01"}).headers["X-Next-Cursor"]
        for second in (some, other, whole):
            expected = 200 if second is first else 410
            assert second.get("/api/call_feed", cursor=cursor).status_code == expected


NETWORKS = [
    (["203.0.113.0/24"], {"203.0.113.9": 200, "::ffff:203.0.113.9": 200, "203.0.114.9": 401, "2001:db8::1": 401}),
    (["203.0.113.9", "2001:db8::/32"], {"203.0.113.9": 200, "2001:db8::1": 200, "203.0.113.8": 401, "unknown": 401}),
]


@pytest.mark.parametrize(("networks", "expected"), NETWORKS)
def test_a_token_is_good_from_its_networks_alone(app: Flask, networks: list[str], expected: dict[str, int]) -> None:
    token = create(app, *(option for network in networks for option in ("--from", network)))
    unknown = Client(app, "cdr_unknown").get("/api/domains")
    for address, status in expected.items():
        headers = {"X-Forwarded-For": address}
        response = Client(app, token).send("GET", "/api/domains", headers=headers)
        assert response.status_code == status, address
        if status == 401:
            assert response.data == unknown.data
    # What a client says itself counts for nothing; the last proxy's word does.
    headers = {"X-Forwarded-For": "203.0.113.9, 198.51.100.7"}
    assert Client(app, token).send("GET", "/api/domains", headers=headers).status_code == 401


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--domain", GAMMA], f"this account may not read {GAMMA}"),
        (["--domain", BETA, "--domain", "no.such.domain"], "this account may not read no.such.domain"),
        (["--from", "203.0.113.9/24"], "203.0.113.9/24 has host bits set"),
        (["--from", "billing.example.com"], "does not appear to be an IPv4 or IPv6 network"),
    ],
)
def test_a_limit_that_means_nothing_makes_no_token(
    database: Database, app: Flask, options: list[str], message: str
) -> None:
    before = database.execute("SELECT count(*) FROM cdr_api.tokens")
    made = app.test_cli_runner().invoke(args=["token", "create", EMAIL, *options])
    assert made.exit_code == 1
    assert message in made.output
    assert database.execute("SELECT count(*) FROM cdr_api.tokens") == before


def test_the_list_shows_the_limits(database: Database, app: Flask) -> None:
    database.account(ALPHA, BETA, email="listed@example.com")
    create(
        app,
        "--domain",
        BETA,
        "--domain",
        ALPHA,
        "--from",
        "203.0.113.7",
        "--from",
        "2001:db8::/32",
        email="listed@example.com",
    )
    create(app, "--days", "0", email="listed@example.com")
    head, _, limited, plain = (
        app.test_cli_runner().invoke(args=["token", "list", "listed@example.com"]).stdout.splitlines()
    )
    assert head.split()[-2:] == ["DOMAINS", "FROM"]
    assert limited.endswith(f"{ALPHA}, {BETA}  203.0.113.7/32, 2001:db8::/32")
    assert plain.split()[-3:] == ["-", "-", "-"]  # nor does it expire


def test_a_domain_that_is_no_more_leaves_its_tokens_nothing(make_database: DatabaseMaker) -> None:
    database = make_database()
    database.account(ALPHA, BETA, email=EMAIL)
    app = database.app()
    client = Client(app, create(app, "--domain", BETA))
    cursor = client.get("/api/call_feed", **{"from": "2026-01-01"}).headers["X-Next-Cursor"]
    ((uuid,),) = database.execute("DELETE FROM v_domains WHERE domain_name = %s RETURNING domain_uuid::text", [BETA])
    assert client.get("/api/domains").get_json() == []
    assert client.get("/api/calls", domain_name=BETA).status_code == 403
    assert client.get("/api/call_feed", cursor=cursor).status_code == 200  # nothing can have been missed
    assert uuid in app.test_cli_runner().invoke(args=["token", "list", EMAIL]).stdout
