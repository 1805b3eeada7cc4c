"""The numbers of extensions beside their uuids, and nothing else of them."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

import demo
from tests.conftest import Database, DatabaseMaker, problem

COLUMNS = ["extension_uuid", "domain_uuid", "domain_name", "extension", "number_alias", "effective_caller_id_name"]


def add_extension(database: Database, domain: str, number: str, **values: Any) -> str:
    uuid = f"e0000000-0000-4000-8000-{next(database.numbers):012d}"
    stored = {"extension_uuid": uuid, "extension": number, "password": "secret", **values}
    names, marks = ", ".join(stored), ", ".join(["%s"] * len(stored))
    query = f"INSERT INTO v_extensions ({names}, domain_uuid) SELECT {marks}, domain_uuid FROM v_domains"
    database.execute(f"{query} WHERE domain_name = %s", [*stored.values(), domain])
    return uuid


@pytest.mark.parametrize("release", demo.RELEASES)
def test_an_account_sees_the_extensions_of_its_domains(make_database: DatabaseMaker, release: str) -> None:
    database = make_database(release)
    second = add_extension(database, "alpha.example.com", "102", number_alias="4930102", accountcode="x")
    first = add_extension(database, "alpha.example.com", "101", effective_caller_id_name="=Alice")
    third = add_extension(database, "beta.example.com", "101")
    add_extension(database, "nowhere.example.com", "101")  # of no domain: not even stored
    client = database.client(database.account("alpha.example.com"))
    response = client.get("/api/extensions")
    found = json.loads(response.data)
    assert [list(row) for row in found] == [COLUMNS] * 2
    assert [row["extension_uuid"] for row in found] == [first, second]
    assert [row["extension"] for row in found] == ["101", "102"]
    assert [row["number_alias"] for row in found] == [None, "4930102"]
    assert "secret" not in response.text
    for names in (["alpha.example.com", "beta.example.com"], []):
        both = database.client(database.account(*names, all_domains=not names))
        assert [row["extension_uuid"] for row in both.get("/api/extensions").get_json()] == [first, second, third]
        (named,) = both.get("/api/extensions", domain_name="beta.example.com").get_json()
        assert named["extension_uuid"] == third
        by_uuid = both.get("/api/extensions", domain_uuid=named["domain_uuid"]).get_json()
        assert by_uuid == [named]
    table = client.get("/api/extensions", format="csv", csv_safe="true").text
    assert next(csv.DictReader(io.StringIO(table)))["effective_caller_id_name"] == "'=Alice"
    assert [json.loads(line) for line in client.get("/api/extensions", format="ndjson").text.splitlines()] == found
    refused = client.get("/api/extensions", domain_name="beta.example.com")
    assert (refused.status_code, problem(refused)["message"]) == (403, "This account may not read this domain.")


def test_without_the_right_to_read_them_the_operator_is_told(make_database: DatabaseMaker) -> None:
    """As before schema.sql was run again."""
    database = make_database()
    client = database.client(database.account("alpha.example.com"))
    database.execute(f"REVOKE SELECT ({', '.join(COLUMNS[:2])}) ON v_extensions FROM cdr_api")
    response = client.get("/api/extensions")
    assert response.status_code == 503
    assert problem(response)["message"].endswith("run flask check.")
    assert client.get("/api/domains").status_code == 200
