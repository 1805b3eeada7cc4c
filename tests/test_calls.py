"""What a call looks like: its keys, their types, their order; which calls come, and in which order."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

import cdr.selection
import demo
from cdr.selection import FIELDS
from cdr.statements import STATEMENTS
from tests.conftest import Client, Database, DatabaseMaker, problem, wait_for

# One row as FusionPBX would store it, and by hand what the contract makes of it.
UUID = "0b9e2f6c-6a53-4c0e-9c5e-0d9c4b3f7a11"
STORED = {
    "xml_cdr_uuid": UUID,
    "domain_uuid": "35bbdef6-fa63-6c31-739d-e4d4e81ad692",
    "extension_uuid": "22222222-2222-4222-8222-222222222222",
    "sip_call_id": "abc@10.0.0.1",
    "domain_name": "alpha.example.com",
    "accountcode": "acme",
    "direction": "inbound",
    "default_language": "en",
    "caller_id_name": 'O\'Brien, "Bob" \\ Söhne',
    "caller_id_number": "+15551230001",
    "source_number": "",
    "destination_number": "101",
    "start_epoch": 1714636820,
    "start_stamp": "2024-05-02 08:00:20+00",
    "answer_stamp": "2024-05-02 08:00:30.25+00",
    "answer_epoch": 1714636830,
    "end_epoch": "1714636890.9",
    "end_stamp": "2024-05-02 08:01:30+00",
    "duration": 70,
    "mduration": 70123,
    "billsec": "60.4",
    "billmsec": 60400,
    "bridge_uuid": "b-1",
    "read_codec": "PCMU",
    "read_rate": "8000",
    "leg": "a",
    "originating_leg_uuid": None,
    "pdd_ms": 340,
    "rtp_audio_in_mos": "4.50",
    "voicemail_message": False,
    "missed_call": True,
    "cc_queue_joined_epoch": 1714636821,
    "waitsec": 10,
    "hangup_cause": "NORMAL_CLEARING",
    "hangup_cause_q850": 16,
    "xml": "<a>\n\t</a>",
}
EXPECTED = {
    **dict.fromkeys(FIELDS),
    **STORED,
    "start_epoch": "1714636820",
    "start_stamp": "2024-05-02T08:00:20+00:00",
    "answer_stamp": "2024-05-02T08:00:30.25+00:00",
    "answer_epoch": "1714636830",
    "end_epoch": "1714636890",
    "end_stamp": "2024-05-02T08:01:30+00:00",
    "billsec": 60,
    "rtp_audio_in_mos": 4.5,
    "cc_queue_joined_epoch": "1714636821",
    "hangup_cause_q850": "16",
}


@pytest.fixture(scope="module")
def stored(database: Database) -> None:
    database.insert_call(**STORED)


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("kind", ["json", "ndjson"])
def test_a_call_is_served_as_the_contract_says(client: Client, kind: str) -> None:
    response = client.get(
        "/api/call_range",
        **{"domain_name": "alpha.example.com", "from": "2024-05-02", "to": "2024-05-02", "format": kind},
    )
    assert response.status_code == 200
    text = response.data.decode()
    found = json.loads(text) if kind == "json" else [json.loads(line) for line in text.splitlines()]
    assert found == [EXPECTED]
    assert list(found[0]) == list(FIELDS)
    assert len(found[0]) == 66
    assert response.headers["Content-Type"] == {"json": "application/json", "ndjson": "application/x-ndjson"}[kind]
    assert int(response.headers["Content-Length"]) == len(response.data)


@pytest.mark.usefixtures("stored")
def test_csv_has_a_header_and_the_same_values(client: Client) -> None:
    response = client.get(
        "/api/call_range",
        **{"domain_name": "alpha.example.com", "from": "2024-05-02", "to": "2024-05-02", "format": "csv"},
    )
    assert response.headers["Content-Type"] == "text/csv; charset=utf-8"
    rows = list(csv.DictReader(io.StringIO(response.data.decode(), newline="")))
    as_text = {True: "true", False: "false", None: ""}
    expected = {k: as_text[v] if v is None or isinstance(v, bool) else str(v) for k, v in EXPECTED.items()}
    assert rows == [expected | {"rtp_audio_in_mos": "4.50"}]
    # NULL and the empty string stay apart.
    assert ',"",101,' in response.text


def test_every_field_has_its_type(client: Client) -> None:
    types: dict[str, tuple[type, ...]] = dict.fromkeys(FIELDS, (str,))
    types |= dict.fromkeys(("duration", "billsec", "waitsec", "mduration", "billmsec", "pdd_ms"), (int,))
    types |= {"rtp_audio_in_mos": (int, float), "voicemail_message": (bool,), "missed_call": (bool,)}
    never_filled = {
        "context",
        "xml",
        "conference_name",
        "conference_uuid",
        "conference_member_id",
        "digits_dialed",
        "pin_number",
    }
    seen = set()
    for call in client.calls():
        for name, value in call.items():
            if value is not None:
                assert type(value) in types[name], (name, value)
                seen.add(name)
    assert seen >= set(FIELDS) - never_filled


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        pytest.param({"answer_stamp": "1970-01-01 00:00:00+00"}, {"answer_stamp": None}, id="1970 is not answered"),
        pytest.param({"answer_stamp": None}, {"answer_stamp": None}, id="no answer stamp"),
        pytest.param(
            {"duration": None, "mduration": None, "billsec": None, "billmsec": None},
            {"duration": 0, "mduration": 0, "billsec": 0, "billmsec": 0},
            id="NULL for 0, as 5.1 and 5.2 write it",
        ),
        pytest.param({"waitsec": None, "pdd_ms": None}, {"waitsec": None, "pdd_ms": None}, id="other NULLs stay"),
        pytest.param(
            {"billsec": "NaN", "pdd_ms": "Infinity", "rtp_audio_in_mos": "-Infinity", "start_epoch": "NaN"},
            {"billsec": None, "pdd_ms": None, "rtp_audio_in_mos": None, "start_epoch": None},
            id="what JSON cannot say is null",
        ),
        pytest.param(
            {"billsec": "12.5", "duration": "12.4"}, {"billsec": 13, "duration": 12}, id="seconds are rounded"
        ),
        pytest.param({"billsec": 10**30}, {"billsec": 10**30}, id="huge"),
        pytest.param({"end_epoch": "1714636890.999"}, {"end_epoch": "1714636890"}, id="an epoch has no decimals"),
        pytest.param({"start_stamp": "infinity"}, {"start_stamp": "infinity"}, id="infinity"),
        pytest.param(
            {"start_stamp": "0044-03-15 12:00:00+00 BC"}, {"start_stamp": "0044-03-15T12:00:00+00:00 BC"}, id="BC"
        ),
        pytest.param({"cc_queue_joined_epoch": "NaN"}, {"cc_queue_joined_epoch": None}, id="nor an epoch"),
        pytest.param({"leg": None}, {"leg": None}, id="no leg"),
        pytest.param({"caller_id_name": "null"}, {"caller_id_name": "null"}, id="the word null"),
    ],
)
def test_repairs_and_their_limits(
    database: Database, client: Client, stored: dict[str, Any], expected: dict[str, Any]
) -> None:
    uuid = database.insert_call(**stored)
    found = {call["xml_cdr_uuid"]: call for call in client.call_range("2026-02-03", "2026-02-03")}
    assert {name: found[uuid][name] for name in expected} == expected


def test_order_is_end_stamp_then_uuid_and_nothing_is_left_out(database: Database, client: Client) -> None:
    first = database.insert_call(
        end_stamp="2026-02-04 10:00:00+00", xml_cdr_uuid="00000000-0000-4000-8000-0000000000ff"
    )
    second = database.insert_call(
        end_stamp="2026-02-04 10:00:00+00", xml_cdr_uuid="f0000000-0000-4000-8000-000000000000"
    )
    undated = database.insert_call(end_stamp=None)
    where = "WHERE domain_name = 'alpha.example.com' ORDER BY end_stamp, xml_cdr_uuid"
    stored = database.execute(f"SELECT xml_cdr_uuid::text FROM v_xml_cdr {where}")
    found = [call["xml_cdr_uuid"] for call in client.calls()]
    assert found == [row[0] for row in stored]
    assert found.index(first) + 1 == found.index(second)
    assert found[-1] == undated
    assert undated not in [call["xml_cdr_uuid"] for call in client.call_range("0001-01-01", "9999-12-31")]


def test_fields_are_pruned_and_ordered(client: Client) -> None:
    call = client.calls(fields="billsec,xml_cdr_uuid,missed_call")[0]
    assert list(call) == ["billsec", "xml_cdr_uuid", "missed_call"]
    assert client.get("/api/calls", domain_name="alpha.example.com", fields="billsec", format="csv").text.startswith(
        "billsec\n"
    )
    assert list(client.calls(fields="missed_call")[0]) == ["missed_call"]


# What FusionPBX's own list shows to users.
BILLABLE = """coalesce(leg, 'a') = 'a' AND coalesce(hangup_cause, '') <> 'LOSE_RACE'
  AND (coalesce(cc_side, '') <> 'agent' AND originating_leg_uuid IS NULL
       OR direction = 'outbound' AND billsec <> 'NaN' AND round(billsec) > 0)"""

ANSWERED = "billsec <> 'NaN' AND round(billsec) > 0"

# Each filter, and the same in SQL.
FILTERS = [
    ("direction", "inbound", "direction = 'inbound'"),
    ("direction", "inbound,local", "direction IN ('inbound', 'local')"),
    ("direction", "inbound,outbound,local", "direction IS NOT NULL"),
    ("leg", "b", "leg = 'b'"),
    ("accountcode", "alpha.example.com", "accountcode = 'alpha.example.com'"),
    ("caller_id_name", 'O\'Brien, "Bob" & Sons', "caller_id_name = 'O''Brien, \"Bob\" & Sons'"),
    ("caller_id_number", "104", "caller_id_number = '104'"),
    ("source_number", "104", "source_number = '104'"),
    ("destination_number", "105", "destination_number = '105'"),
    ("hangup_cause", "USER_BUSY", "hangup_cause = 'USER_BUSY'"),
    ("status", "voicemail", "status = 'voicemail'"),
    ("answered", "true", ANSWERED),
    ("answered", "false", f"({ANSWERED}) IS NOT TRUE"),
    ("min_billsec", "60", "billsec <> 'NaN' AND billsec >= 60"),
    ("min_billsec", "0", "true"),
    ("destination_prefix", "1", "destination_number LIKE '1%'"),
    ("destination_prefix", "1555", "destination_number LIKE '1555%'"),
    ("source_prefix", "+1", "source_number LIKE '+1%'"),
    ("source_prefix", " 1555", "source_number LIKE '+1555%'"),  # a "+" that was not escaped in a URL
    ("source_prefix", "10", "source_number LIKE '10%'"),
    ("billable_only", "false", "true"),
    (
        "billable_only",
        "true",
        BILLABLE,
    ),
]


@pytest.mark.parametrize(("name", "value", "condition"), FILTERS, ids=[f"{f[0]}={f[1]}" for f in FILTERS])
def test_filters_say_the_same_as_sql(database: Database, client: Client, name: str, value: str, condition: str) -> None:
    where = f"domain_name = 'alpha.example.com' AND ({condition})"
    expected = {row[0] for row in database.execute(f"SELECT xml_cdr_uuid::text FROM v_xml_cdr WHERE {where}")}
    found = [call["xml_cdr_uuid"] for call in client.calls(**{name: value})]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert expected


def test_every_filter_is_a_placeholder_of_the_statement_that_reads_calls() -> None:
    """One that is not would be accepted and ignored: every call, as if it had not been asked for."""
    statement = STATEMENTS["matching_calls"].as_string()
    for name in cdr.selection.FILTERS:
        assert f"%({name})s" in (STATEMENTS[name].as_string() if name in cdr.selection.PREFIXES else statement), name


def test_every_filter_has_a_value_above_that_separates_calls(database: Database, client: Client) -> None:
    every = len(client.calls(fields="xml_cdr_uuid"))
    extension = next(call["extension_uuid"] for call in client.calls() if call["extension_uuid"])
    tried = [*((name, value) for name, value, _ in FILTERS), ("extension_uuid", extension)]
    separating = {
        name for name, value in tried if 0 < len(client.calls(fields="xml_cdr_uuid", **{name: value})) < every
    }
    assert separating == set(cdr.selection.FILTERS)


@pytest.mark.parametrize("name", cdr.selection.PREFIXES)
@pytest.mark.parametrize(
    "prefix", ["", "%", "4%", "_", "49_", "\\", "+-1", "++1", "1+", "abc", "*98", "４９", "1" * 33]
)
def test_bad_prefixes(client: Client, name: str, prefix: str) -> None:
    response = client.get("/api/calls", domain_name="alpha.example.com", **{name: prefix})
    assert response.status_code == 422
    assert list(problem(response)["data"]) == [name]


@pytest.mark.parametrize("directions", ["inbound,", ",inbound", ",", "inbound,,local", "inbound,inbound"])
def test_bad_lists_of_directions(client: Client, directions: str) -> None:
    response = client.get("/api/calls", domain_name="alpha.example.com", direction=directions)
    assert response.status_code == 422
    assert list(problem(response)["data"]) == ["direction"]


def test_a_cursor_belongs_to_its_prefix_and_directions(client: Client) -> None:
    asked = {"domain_name": "alpha.example.com", "destination_prefix": "1", "direction": "inbound,outbound"}
    page = client.get("/api/calls", **asked, limit="1")
    following = page.headers["Link"].partition(">")[0][1:]
    assert client.send("GET", following).status_code == 200
    after = following.partition("after=")[2]
    for other in ({"destination_prefix": "15"}, {"direction": "inbound"}, {"source_prefix": "1"}):
        assert client.get("/api/calls", **asked | other, limit="1", after=after).status_code == 422
    feed = {"from": "2026-01-01", "destination_prefix": "1"}
    cursor = client.get("/api/call_feed", **feed).headers["X-Next-Cursor"]
    assert client.get("/api/call_feed", cursor=cursor, destination_prefix="1").status_code == 200
    assert client.get("/api/call_feed", cursor=cursor, destination_prefix="15").status_code == 410


@pytest.mark.parametrize("release", demo.RELEASES)
def test_prefixes_and_directions_count_on_every_route(make_database: DatabaseMaker, release: str) -> None:
    database = make_database(release)
    for number, source, direction in (
        ("4930123", "101", "outbound"),
        ("4940123", "+49891", "outbound"),
        ("+4930123", "102", "outbound"),
        ("493", "103", "local"),
        ("0049", "104", "inbound"),
        ("%", "_", "inbound"),
        (None, None, None),
    ):
        values = {"destination_number": number, "source_number": source, "direction": direction}
        database.insert_call(**values, start_stamp="2026-02-03 09:59:00+00", billsec=60)
    client = database.client(database.account("alpha.example.com"))
    february = {"month": "2026-02", "domain_name": "alpha.example.com"}
    hours = {"date": "2026-02-03T09", "resolution": "60"}
    filters: dict[str, dict[str, str]] = {
        "2": {"destination_prefix": "493"},
        "1": {"destination_prefix": "493", "direction": "local"},
        "3": {"source_prefix": "10", "direction": "outbound,local"},
    }
    for count, asked in filters.items():
        assert len(client.calls(**asked)) == int(count)
        assert len(client.get("/api/call_range", **february, **asked).get_json()) == int(count)
        assert len(client.get("/api/call_feed", **{"from": "2026-01-01"}, **asked).get_json()) == int(count)
        assert client.get("/api/call_totals", **february, **asked).get_json()[0]["calls"] == int(count)
        for kind, column in (("concurrent", "active_calls"), ("active", "total")):
            rows = client.get(f"/api/{kind}_calls_by_domain", **hours, **asked).get_json()
            assert [row[column] for row in rows] == [int(count)]


def test_answered_means_what_billsec_shows(database: Database) -> None:
    client = database.client(database.account("gamma.example.com"))
    for billsec in ("0.4", "NaN", "0.6"):
        database.insert_call(domain_name="gamma.example.com", billsec=billsec, accountcode="fractions")
    mine = {"domain_name": "gamma.example.com", "accountcode": "fractions", "fields": "billsec"}
    assert client.calls(answered="true", **mine) == [{"billsec": 1}]
    assert client.calls(answered="false", **mine) == [{"billsec": 0}, {"billsec": None}]


def test_extension_uuid_and_filters_together(client: Client) -> None:
    extension = next(call["extension_uuid"] for call in client.calls() if call["extension_uuid"])
    mine = client.calls(extension_uuid=extension.upper())
    assert mine
    assert {call["extension_uuid"] for call in mine} == {extension}
    answered = client.calls(extension_uuid=extension, answered="true", direction="outbound")
    assert [c["xml_cdr_uuid"] for c in answered] == [
        c["xml_cdr_uuid"] for c in mine if c["billsec"] > 0 and c["direction"] == "outbound"
    ]


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("application/json", "application/json"),
        ("*/*", "application/json"),
        ("text/html, application/*;q=0.8", "application/json"),
        ("text/csv", "text/csv; charset=utf-8"),
        ("application/json; charset=utf-8", "application/json"),
        ("text/csv; header=present; q=0.9, text/html", "text/csv; charset=utf-8"),
        ("application/x-ndjson, application/json;q=0.1", "application/x-ndjson"),
    ],
)
def test_accept_chooses_the_format(client: Client, accept: str, content_type: str) -> None:
    response = client.send("GET", "/api/calls?domain_name=alpha.example.com&limit=1", headers={"Accept": accept})
    assert response.headers["Content-Type"] == content_type


def test_unknown_formats_are_406(client: Client) -> None:
    assert client.get("/api/calls", domain_name="alpha.example.com", format="xml").status_code == 406
    response = client.send("GET", "/api/calls?domain_name=alpha.example.com", headers={"Accept": "text/html"})
    assert response.status_code == 406
    assert problem(response)["data"] == {"format": ["json", "ndjson", "csv"]}


@pytest.mark.parametrize(("kind", "body"), [("json", b"[]\n"), ("ndjson", b""), ("csv", b"billsec,leg\n")])
def test_no_calls_is_an_empty_answer(client: Client, kind: str, body: bytes) -> None:
    parameters = {"domain_name": "alpha.example.com", "from": "1999-01-01", "to": "1999-01-01"}
    response = client.get("/api/call_range", format=kind, fields="billsec,leg", **parameters)
    assert response.status_code == 200
    assert response.data == body


def test_domains_are_those_of_the_account(database: Database, client: Client) -> None:
    listed = client.get("/api/domains").get_json()
    uuid = database.execute("SELECT domain_uuid::text FROM v_domains WHERE domain_name = 'alpha.example.com'")[0][0]
    assert listed == [{"domain_uuid": uuid, "domain_name": "alpha.example.com"}]
    everyone = database.client(database.account(all_domains=True), client.app).get("/api/domains").get_json()
    assert [row["domain_name"] for row in everyone] == ["alpha.example.com", "beta.example.com", "gamma.example.com"]


def test_health_needs_no_token(database: Database) -> None:
    response = database.client().get("/api/health")
    assert (response.status_code, response.get_json()) == (200, {"status": "ok"})


def test_head_sends_no_body_and_frees_its_connection(client: Client) -> None:
    response = client.send("HEAD", "/api/calls?domain_name=alpha.example.com")
    assert (response.status_code, response.data) == (200, b"")
    response.close()
    pool = client.app.extensions["cdr_api"].calls.pool
    wait_for(lambda: pool.get_stats()["pool_available"] == pool.get_stats()["pool_size"])


def test_answers_are_not_cached_or_sniffed(client: Client) -> None:
    for path in ("/api/domains", "/api/calls?domain_name=alpha.example.com&limit=1", "/nowhere"):
        headers = client.send("GET", path).headers
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Content-Type-Options"] == "nosniff"
