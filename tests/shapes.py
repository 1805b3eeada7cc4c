"""Calls of every shape that an importer stores them in, with the domain that each belongs to."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tests.conftest import Client, Database

UA, B, C = (f"{letter}0000000-0000-4000-8000-000000000001" for letter in "abc")
T1, T2 = "d1000000-0000-4000-8000-000000000001", "d2000000-0000-4000-8000-000000000001"
X = "e0000000-0000-4000-8000-000000000001"  # of a domain that was deleted
NO_UUID = "f0000000-0000-4000-8000-000000000001"  # of no domain and of no call
NAMED = {
    UA: "alpha.example.com",
    B: "beta.example.com",
    C: "Capital.Example.com",
    T1: "twin.example.com",
    T2: "twin.example.com",
}
# The domain that a call belongs to, by its uuid; what is stored as its domain_uuid and as its domain_name.
SHAPES = (
    (UA, UA, "alpha.example.com"),
    (UA, UA, "203.0.113.5"),
    (UA, UA, "old.example.com"),
    (UA, UA, "Alpha.Example.com"),
    (UA, UA, "alpha.example.com "),
    (UA, UA, None),
    (UA, UA, ""),
    (UA, UA, "beta.example.com"),
    (UA, None, "alpha.example.com"),
    (B, B, "beta.example.com"),
    (B, B, "alpha.example.com"),
    (B, None, "beta.example.com"),
    (C, C, "capital.example.com"),
    (C, None, "Capital.Example.com"),
    (T1, T1, "twin.example.com"),
    (T2, T2, "twin.example.com"),
    (T2, T2, None),
    (None, None, "twin.example.com"),
    (None, None, "capital.example.com"),
    (None, None, "ALPHA.example.com"),
    (None, None, "alpha.example.com "),
    (None, None, " alpha.example.com"),
    (None, None, "gone.example.com"),
    (None, None, ""),
    (None, None, None),
    (None, X, "alpha.example.com"),
    (None, X, "gone.example.com"),
    (None, X, None),
)
ACCOUNTS_READ: dict[str, set[str]] = {
    "alpha": {UA},
    "beta": {B},
    "alpha and beta": {UA, B},
    "capital": {C},
    "one twin": {T1},
    "both twins": {T1, T2},
    "a deleted domain": {X},
    "nothing": set(),
}
WIDE_SHAPE = {"from": "2026-01-01", "to": "2026-12-31"}
HOURS_OF_A_DAY = {"date": "2026-02-03", "resolution": "60"}
# Every route that takes a domain, and what else it needs.
ROUTE: dict[str, dict[str, str]] = {
    "/api/calls": {},
    "/api/call_range": WIDE_SHAPE,
    "/api/call_feed": {"from": "2026-01-01"},
    "/api/call_totals": WIDE_SHAPE,
    "/api/concurrent_calls_by_domain": HOURS_OF_A_DAY,
    "/api/active_calls_by_domain": HOURS_OF_A_DAY,
}
LIST = ("/api/calls", "/api/call_range", "/api/call_feed")


def set_domains(database: Database) -> None:
    database.execute("DELETE FROM v_domains")
    for uuid, name in NAMED.items():
        database.execute("INSERT INTO v_domains (domain_uuid, domain_name) VALUES (%s, %s)", [uuid, name])


def add_shapes(database: Database) -> dict[str, Shape]:
    """UA call of each shape; the sum of their billsec tells which of them were counted."""
    return {
        database.insert_call(
            domain_uuid=uuid,
            domain_name=name,
            start_stamp="2026-02-03 12:00:00+00",
            end_stamp=f"2026-02-03 12:01:{number:02}+00",
            billsec=2**number,
            direction="inbound",
        ): Shape(owner, uuid, name, 2**number)
        for number, (owner, uuid, name) in enumerate(SHAPES)
    }


def granted(database: Database, *uuids: str) -> str:
    """UA token of a new account with grants as they are stored: also of one of two domains with the same name."""
    email = f"granted{next(database.numbers)}@example.com"
    token = database.account(email=email)
    for uuid in uuids:
        grant = "INSERT INTO cdr_api.grants SELECT account_id, %s FROM cdr_api.accounts WHERE email = %s"
        database.execute(grant, [uuid, email])
    return token


@dataclass(frozen=True)
class Shape:
    owner: str | None
    uuid: str | None
    name: str | None
    billsec: int


def uuids_of(client: Client, path: str, **parameters: str) -> set[str]:
    response = client.get(path, **parameters)
    assert response.status_code == 200, response.text
    found = [call["xml_cdr_uuid"] for call in json.loads(response.data)]
    assert len(found) == len(set(found))
    return set(found)
