"""Whose a call is when domains are renamed, deleted or copied to an archive, with the index and without."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.commands import check
from tests.conftest import Client, Database, DatabaseMaker, problem

ALPHA, BETA = "alpha.example.com", "beta.example.com"
UNKNOWN = "99999999-0000-4000-8000-000000000000"
DAY = {"from": "2026-02-03", "to": "2026-02-03"}


def uuid_of(database: Database, name: str) -> str:
    return str(database.execute("SELECT domain_uuid FROM v_domains WHERE domain_name = %s", [name])[0][0])


def read_everywhere(client: Client, uuids: list[str], **domain: str) -> dict[str, Any]:
    """What each route gives of the calls of 2026-02-03: their uuids, or how many."""
    found: dict[str, Any] = {}
    for path, parameters in (("calls", {}), ("call_range", DAY), ("call_feed", {"from": "2026-02-03"})):
        if path != "call_feed" and not domain:
            continue
        response = client.get(f"/api/{path}", fields="xml_cdr_uuid", **parameters, **domain)
        assert response.status_code == 200, response.text
        found[path] = sorted(call["xml_cdr_uuid"] for call in response.get_json())
    (total,) = client.get("/api/call_totals", **DAY, **domain).get_json()
    found["call_totals"] = total["calls"]
    activity = client.get("/api/active_calls_by_domain", date="2026-02-03", resolution="60", **domain).get_json()
    found["active_calls_by_domain"] = sum(row["total"] for row in activity)
    peaks = client.get("/api/concurrent_calls_by_domain", date="2026-02-03", resolution="60", **domain).get_json()
    found["concurrent_calls_by_domain"] = sum(row["active_calls"] for row in peaks)
    if not domain:
        body = client.post("/api/call_lookup", json={"xml_cdr_uuid": uuids}).get_json()
        found["call_lookup"] = sorted(call["xml_cdr_uuid"] for call in body["calls"])
    return found


def expected(uuids: list[str], *, named: bool) -> dict[str, Any]:
    """The same where just these calls are read. They last for a minute, one after the other, in one hour."""
    lists = ("calls", "call_range", "call_feed") if named else ("call_feed", "call_lookup")
    counts = {"call_totals": len(uuids), "active_calls_by_domain": len(uuids)}
    return {**dict.fromkeys(lists, sorted(uuids)), **counts, "concurrent_calls_by_domain": min(len(uuids), 1)}


class Stored:
    """Stores calls of a minute, one after the other, that end from 10:02 on."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.minute = 0

    def call(self, domain_uuid: str | None, domain_name: str | None, **more: Any) -> str:
        self.minute += 2
        times = {"start_stamp": f"2026-02-03 10:{self.minute - 1:02}:00+00"}
        times["end_stamp"] = f"2026-02-03 10:{self.minute:02}:00+00"
        return self.database.insert_call(domain_uuid=domain_uuid, domain_name=domain_name, **times, **more)


@pytest.fixture(params=[True, False], ids=["index", "no index"])
def database(make_database: DatabaseMaker, request: pytest.FixtureRequest) -> Database:
    return make_database(index=request.param)


def test_the_uuid_decides_whatever_name_the_importer_found(database: Database) -> None:
    stored, alpha, beta = Stored(database), uuid_of(database, ALPHA), uuid_of(database, BETA)
    names = [ALPHA, "203.0.113.5", "old.example.com", "Alpha.Example.com", f"{ALPHA} ", None, BETA]
    ours = [stored.call(alpha, name) for name in names]
    ours.append(stored.call(None, ALPHA))
    foreign = [stored.call(beta, ALPHA), stored.call(None, BETA), stored.call(None, f"{ALPHA} ")]
    nobody = [stored.call(UNKNOWN, ALPHA), stored.call(None, "gone.example.com"), stored.call(None, None)]
    every = ours + foreign + nobody
    client = database.client(database.account(ALPHA))
    for domain in ({"domain_name": ALPHA}, {"domain_uuid": alpha}):
        assert read_everywhere(client, every, **domain) == expected(ours, named=True)
    assert read_everywhere(client, every) == expected(ours, named=False)
    # The answer shows the domain's name, and of every other field what is stored.
    shown = client.calls(fields="domain_name,domain_uuid")
    assert [call["domain_name"] for call in shown] == [ALPHA] * len(ours)
    assert [call["domain_uuid"] for call in shown] == [alpha] * len(names) + [None]


def test_calls_of_no_domain_are_for_accounts_that_read_everything(database: Database) -> None:
    stored, alpha = Stored(database), uuid_of(database, ALPHA)
    ours = [stored.call(alpha, "203.0.113.5"), stored.call(None, ALPHA)]
    nobody = [stored.call(UNKNOWN, ALPHA, billsec=7), stored.call(None, "gone.example.com"), stored.call(None, None)]
    everything = database.client(database.account(all_domains=True))
    found = read_everywhere(everything, ours + nobody)
    assert found["call_feed"] == found["call_lookup"] == sorted(ours + nobody)
    assert found["call_totals"] == 5
    assert read_everywhere(everything, ours + nobody, domain_name=ALPHA) == expected(ours, named=True)
    assert everything.get("/api/calls", domain_uuid=UNKNOWN).status_code == 404
    groups = everything.get("/api/call_totals", group_by="domain_name", **DAY).get_json()
    assert {(row["domain_name"], row["calls"]) for row in groups} == {(ALPHA, 3), ("gone.example.com", 1), (None, 1)}
    groups = everything.get("/api/call_totals", group_by="domain_uuid", **DAY).get_json()
    assert {(row["domain_uuid"], row["calls"], row["billsec"]) for row in groups} == {
        (alpha, 1, 1),
        (UNKNOWN, 1, 7),
        (None, 3, 3),
    }
    peaks = everything.get("/api/concurrent_calls_by_domain", date="2026-02-03", resolution="60").get_json()
    assert {row["domain_name"] for row in peaks} >= {ALPHA, "gone.example.com", None}
    for name in ("gone.example.com", None):
        assert [row["active_calls"] for row in peaks if row["domain_name"] == name].count(1) == 1


def test_a_call_without_uuid_belongs_to_no_domain_where_two_bear_its_name(database: Database) -> None:
    stored, alpha, beta = Stored(database), uuid_of(database, ALPHA), uuid_of(database, BETA)
    database.execute("UPDATE v_domains SET domain_name = %s WHERE domain_uuid = %s", [ALPHA, beta])
    first, second, nobody = stored.call(alpha, ALPHA), stored.call(beta, ALPHA), stored.call(None, ALPHA)
    both = database.client(database.account(ALPHA))
    every = [first, second, nobody]
    assert read_everywhere(both, every, domain_uuid=alpha) == expected([first], named=True)
    found = read_everywhere(both, every, domain_name=ALPHA)
    assert (found["calls"], found["call_totals"]) == (sorted([first, second]), 2)
    assert read_everywhere(both, every)["call_lookup"] == sorted([first, second])
    everything = database.client(database.account(all_domains=True))
    assert read_everywhere(everything, every)["call_totals"] == 3


def test_a_rename_changes_the_name_and_loses_nothing(database: Database) -> None:
    stored, alpha = Stored(database), uuid_of(database, ALPHA)
    client = database.client(database.account(ALPHA))
    calls = [stored.call(alpha, ALPHA)]
    poll = client.get("/api/call_feed", domain_uuid=alpha, **{"from": "2026-02-03"})
    database.execute("UPDATE v_domains SET domain_name = 'new.example.com' WHERE domain_uuid = %s", [alpha])
    calls.append(stored.call(alpha, ALPHA))  # a call that was under way keeps the old name
    late = client.get("/api/call_feed", domain_uuid=alpha, cursor=poll.headers["X-Next-Cursor"])
    assert [call["xml_cdr_uuid"] for call in late.get_json()] == [calls[1]]
    for domain in ({"domain_name": "new.example.com"}, {"domain_uuid": alpha}):
        assert read_everywhere(client, calls, **domain) == expected(calls, named=True)
    assert client.get("/api/calls", domain_name=ALPHA).status_code == 403
    assert {call["domain_name"] for call in client.calls(domain_name="new.example.com")} == {"new.example.com"}


def test_who_takes_a_freed_name_gets_none_of_its_calls(database: Database) -> None:
    stored, old = Stored(database), uuid_of(database, ALPHA)
    for _ in range(3):
        stored.call(old, ALPHA)
    database.execute("DELETE FROM v_domains WHERE domain_uuid = %s", [old])
    database.execute("INSERT INTO v_domains (domain_uuid, domain_name) VALUES (gen_random_uuid(), %s)", [ALPHA])
    own = stored.call(uuid_of(database, ALPHA), ALPHA)
    client = database.client(database.account(ALPHA))
    assert read_everywhere(client, [own], domain_name=ALPHA) == expected([own], named=True)


@pytest.mark.parametrize("domains", ["stale", "none"])
def test_an_archive_is_read_by_the_domains_beside_the_accounts(make_database: DatabaseMaker, domains: str) -> None:
    """FusionPBX's archive keeps the names of the day when a call was copied, and need not have v_domains."""
    database, archive = make_database(), make_database(index=True)
    alpha = uuid_of(database, ALPHA)
    stored = Stored(archive)
    calls = [stored.call(alpha, ALPHA), stored.call(None, ALPHA)]
    if domains == "none":
        archive.execute("DROP TABLE v_domains")
    client = database.client(database.account(ALPHA), database.app(CDR_API_CALLS_DSN=archive.dsn))
    assert read_everywhere(client, calls, domain_name=ALPHA) == expected(calls, named=True)
    database.execute("UPDATE v_domains SET domain_name = 'new.example.com' WHERE domain_uuid = %s", [alpha])
    found = read_everywhere(client, calls, domain_name="new.example.com")
    assert found["call_range"] == [calls[0]]  # the other one names a domain that is no more
    assert client.calls(domain_name="new.example.com", fields="domain_name") == [{"domain_name": "new.example.com"}]


WITH_A_DOMAIN: dict[str, dict[str, str]] = {
    "calls": {},
    "call_range": DAY,
    "call_feed": {"from": "2026-02-03"},
    "call_totals": DAY,
    "concurrent_calls_by_domain": {"date": "2026-02-03"},
    "active_calls_by_domain": {"date": "2026-02-03"},
}


@pytest.mark.parametrize("path", WITH_A_DOMAIN)
def test_a_uuid_tells_no_more_than_a_name(database: Database, path: str) -> None:
    client = database.client(database.account(ALPHA))
    alpha, beta = uuid_of(database, ALPHA), uuid_of(database, BETA)
    asked = [{"domain_name": BETA}, {"domain_name": "nowhere"}, {"domain_uuid": beta}, {"domain_uuid": UNKNOWN}]
    refused = [
        client.send(
            "GET", f"/api/{path}", query_string={**WITH_A_DOMAIN[path], **domain}, headers={"X-Request-ID": "1"}
        )
        for domain in asked
    ]
    assert {response.status_code for response in refused} == {403}
    assert len({response.data for response in refused}) == 1
    for parameters in (
        {"domain_uuid": "not-a-uuid"},
        {"domain_uuid": ""},
        {"domain_uuid": alpha, "domain_name": ALPHA},
        {"domain_uuid": alpha, "domain_name": BETA},
    ):
        response = client.get(f"/api/{path}", **WITH_A_DOMAIN[path], **parameters)
        assert response.status_code == 422
        assert list(problem(response)["data"]) == ["domain_uuid"]
    for written in (alpha.upper(), f"{{{alpha}}}", alpha.replace("-", "")):
        assert client.get(f"/api/{path}", **WITH_A_DOMAIN[path], domain_uuid=written).status_code == 200


@pytest.mark.parametrize("name", ["new.example.com", ALPHA])
def test_a_domain_that_is_stored_twice_has_each_call_once(database: Database, name: str) -> None:
    """As without its primary key, which a restored or replicated table may lack."""
    stored, alpha = Stored(database), uuid_of(database, ALPHA)
    ours = [stored.call(alpha, ALPHA), stored.call(None, ALPHA)]
    database.execute("ALTER TABLE v_domains DROP CONSTRAINT v_domains_pkey")
    database.execute("INSERT INTO v_domains (domain_uuid, domain_name) VALUES (%s, %s)", [alpha, name])
    more = [] if name == ALPHA else [stored.call(None, name)]
    tokens = [database.account(ALPHA), database.account(ALPHA, BETA), database.account(all_domains=True)]
    for token in tokens:
        client = database.client(token)
        peaks = {"concurrent_calls_by_domain": 1 + len(more)}  # by the name, of which there are two
        assert read_everywhere(client, ours + more) == expected(ours + more, named=False) | peaks
        for naming in ({"domain_name": ALPHA}, {"domain_uuid": alpha}):
            assert read_everywhere(client, ours + more, **naming) == expected(ours, named=True)
    assert check(client.app)[1]["domains"].startswith("✗ domains            v_domains has 1 rows of a domain that has")


def test_links_of_pages_by_uuid_go_on(make_database: DatabaseMaker) -> None:
    database = make_database(calls=300, index=True)
    alpha = uuid_of(database, ALPHA)
    database.execute("UPDATE v_xml_cdr SET domain_uuid = NULL WHERE right(xml_cdr_uuid::text, 1) IN ('0', '1')")
    client = database.client(database.account(ALPHA))
    whole = [call["xml_cdr_uuid"] for call in client.calls(fields="xml_cdr_uuid")]
    where = f"domain_uuid = '{alpha}' OR domain_uuid IS NULL AND domain_name = '{ALPHA}'"
    stored = database.execute(
        f"SELECT xml_cdr_uuid::text FROM v_xml_cdr WHERE {where} ORDER BY end_stamp, xml_cdr_uuid"
    )
    assert whole == [row[0] for row in stored]
    assert len({row[0][-1] for row in stored} & {"0", "1"}) == 2
    url, pages = f"/api/calls?domain_uuid={alpha}&fields=xml_cdr_uuid&limit=7", []
    while url:
        response = client.send("GET", url)
        pages += [call["xml_cdr_uuid"] for call in json.loads(response.data)]
        url = response.headers.get("Link", "").partition("<")[2].partition(">")[0]
    assert pages == whole
