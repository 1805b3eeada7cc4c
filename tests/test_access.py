"""Who may read what: every token against every domain on every protected route and format."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from flask import Flask

from tests.conftest import Client, Database, DatabaseMaker, problem

PUBLIC = {
    *{("POST", "/api/register"), ("POST", "/api/login"), ("GET", "/api/health"), ("GET", "/api/openapi.json")},
    *{("GET", "/api/docs"), ("GET", "/api/usage"), ("GET", "/api/assets/<name>")},
}


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    return make_database(calls=600, index=True)


@dataclass
class Cast:
    app: Flask
    tokens: dict[str, str | None]


@pytest.fixture(scope="module")
def cast(database: Database) -> Cast:
    tokens: dict[str, str | None] = {
        "a": database.account("alpha.example.com"),
        "b": database.account("beta.example.com"),
        "both": database.account("alpha.example.com", "beta.example.com"),
        "nothing": database.account(),
        "all": database.account(all_domains=True),
        "none": None,
        "garbage": "cdr_" + "x" * 43,
        "revoked": database.account("alpha.example.com", email="revoked@example.com"),
        "expired": database.account("alpha.example.com", email="expired@example.com"),
        "disabled": database.account("alpha.example.com", email="disabled@example.com"),
        "deleted": database.account("alpha.example.com", email="deleted@example.com"),
    }
    account = "(SELECT account_id FROM cdr_api.accounts WHERE email = '{}@example.com')"
    database.execute(f"DELETE FROM cdr_api.tokens WHERE account_id = {account.format('revoked')}")
    database.execute(f"UPDATE cdr_api.tokens SET expires_at = now() WHERE account_id = {account.format('expired')}")
    database.execute("UPDATE cdr_api.accounts SET disabled_at = now() WHERE email = 'disabled@example.com'")
    database.execute("DELETE FROM cdr_api.accounts WHERE email = 'deleted@example.com'")
    return Cast(database.app(), tokens)


def protected_routes(app: Flask) -> list[tuple[str, str]]:
    routes = [
        (method, rule.rule)
        for rule in app.url_map.iter_rules()
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"})
    ]
    return [route for route in routes if route not in PUBLIC]


def test_every_protected_route_refuses_every_dead_token(cast: Cast) -> None:
    routes = protected_routes(cast.app)
    assert ("GET", "/api/calls") in routes
    assert ("POST", "/api/logout") in routes
    for method, path in routes:
        for who in ("none", "garbage", "revoked", "expired", "disabled", "deleted"):
            response = Client(cast.app, cast.tokens[who]).send(method, path)
            assert response.status_code == 401, (method, path, who)
            assert response.headers["WWW-Authenticate"] == "Bearer"
            problem(response)


READING = {
    "/api/calls": {},
    "/api/call_range": {"from": "2020-01-01", "to": "2030-01-01"},
    "/api/call_feed": {"from": "2020-01-01"},
}
ALLOWED = {
    "a": {"alpha"},
    "b": {"beta"},
    "both": {"alpha", "beta"},
    "nothing": set(),
    "all": {"alpha", "beta", "gamma"},
}


@pytest.mark.parametrize("kind", ["json", "ndjson", "csv"])
@pytest.mark.parametrize("path", READING)
@pytest.mark.parametrize("who", ALLOWED)
def test_an_account_reads_its_domains_and_no_other(
    database: Database, cast: Cast, who: str, path: str, kind: str
) -> None:
    client = Client(cast.app, cast.tokens[who])
    for domain in ("alpha", "beta", "gamma"):
        parameters = {"domain_name": f"{domain}.example.com", "format": kind, "fields": "xml_cdr_uuid"} | READING[path]
        response = client.get(path, **parameters)
        if domain in ALLOWED[who]:
            assert response.status_code == 200
            uuids = {
                row[0]
                for row in database.execute(
                    "SELECT xml_cdr_uuid::text FROM v_xml_cdr WHERE domain_name = %s", [f"{domain}.example.com"]
                )
            }
            assert {line.strip('{}[]",').rpartition('"')[2] for line in response.text.split()} - {
                "xml_cdr_uuid"
            } == uuids
        else:
            assert response.status_code == 403


def test_a_foreign_domain_looks_like_one_that_does_not_exist(cast: Cast) -> None:
    client = Client(cast.app, cast.tokens["a"])
    for path, parameters in READING.items():
        foreign, unknown = (
            client.send("GET", path, query_string={"domain_name": name} | parameters, headers={"X-Request-ID": "1"})
            for name in ("beta.example.com", "no.such.domain")
        )
        assert (foreign.status_code, foreign.data, foreign.headers) == (403, unknown.data, unknown.headers)
        problem(foreign)


def test_who_may_read_all_is_told_that_a_domain_does_not_exist(cast: Cast) -> None:
    response = Client(cast.app, cast.tokens["all"]).get("/api/calls", domain_name="no.such.domain")
    assert response.status_code == 404
    problem(response)


def test_names_are_compared_exactly(cast: Cast) -> None:
    client = Client(cast.app, cast.tokens["a"])
    for name in ("ALPHA.example.com", "alpha .example.com", "alpha.example.co_", "%", "alpha.example.com'--"):
        assert client.get("/api/calls", domain_name=name).status_code == 403


def test_a_grant_follows_a_renamed_domain_and_does_not_stay_with_the_name(make_database: DatabaseMaker) -> None:
    database = make_database(calls=60)
    client = database.client(database.account("alpha.example.com"))
    # As FusionPBX renames a domain (FACTS): the row of v_domains and its calls.
    database.execute("UPDATE v_domains SET domain_name = 'new.example.com' WHERE domain_name = 'alpha.example.com'")
    database.execute("UPDATE v_xml_cdr SET domain_name = 'new.example.com' WHERE domain_name = 'alpha.example.com'")
    database.execute("INSERT INTO v_domains (domain_uuid, domain_name) VALUES (gen_random_uuid(), 'alpha.example.com')")
    assert client.calls(domain_name="new.example.com")
    assert client.get("/api/calls", domain_name="alpha.example.com").status_code == 403


def test_a_name_of_two_domains_takes_both_grants(make_database: DatabaseMaker) -> None:
    database = make_database(calls=60)
    client = database.client(database.account("alpha.example.com"))
    # FusionPBX does not check a rename against the names that there are (FACTS).
    database.execute("UPDATE v_domains SET domain_name = 'alpha.example.com' WHERE domain_name = 'beta.example.com'")
    assert client.get("/api/calls", domain_name="alpha.example.com").status_code == 403
    assert database.client(database.account("alpha.example.com")).calls()


def test_a_call_of_another_domain_that_bears_our_name_is_not_ours(make_database: DatabaseMaker) -> None:
    """FusionPBX may import a call under a domain's old name after a rename, and another may have taken the name."""
    database = make_database(calls=30)
    old = "SELECT domain_uuid FROM v_domains WHERE domain_name = 'alpha.example.com'"
    uuid = database.execute(old)[0][0]
    database.execute("UPDATE v_domains SET domain_name = 'renamed.example.com' WHERE domain_name = 'alpha.example.com'")
    database.execute("UPDATE v_xml_cdr SET domain_name = 'renamed.example.com' WHERE domain_name = 'alpha.example.com'")
    database.execute("INSERT INTO v_domains (domain_uuid, domain_name) VALUES (gen_random_uuid(), 'alpha.example.com')")
    stray = database.insert_call(domain_uuid=uuid)
    own = database.insert_call(domain_uuid=None)
    unknown = database.insert_call(domain_uuid="99999999-0000-4000-8000-000000000000")
    client = database.client(database.account("alpha.example.com"))
    assert {call["xml_cdr_uuid"] for call in client.calls()} == {own}
    feed = client.get("/api/call_feed", **{"from": "2026-01-01"})
    assert {call["xml_cdr_uuid"] for call in feed.get_json()} == {own}
    found = client.post("/api/call_lookup", json={"xml_cdr_uuid": [stray, unknown]}).get_json()
    assert found == {"calls": [], "not_found": [stray, unknown]}
