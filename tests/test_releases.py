"""Every FusionPBX from 4.2 to master, and rows that its own importer wrote."""

from __future__ import annotations

import csv
from typing import Any

import pytest

import demo
from cdr.selection import BOOLEANS, FIELDS, INTEGERS, NUMBERS
from tests.conftest import Database, DatabaseMaker, problem


def read_calls(database: Database) -> list[dict[str, Any]]:
    return database.client(database.account("alpha.example.com")).calls()


@pytest.fixture(scope="module")
def newest(make_database: DatabaseMaker) -> list[dict[str, Any]]:
    return read_calls(make_database("master", calls=600))


# FACTS: what a release does not store, or stores otherwise.
NOT_IN_4_4 = {"sip_call_id", "originating_leg_uuid", "voicemail_message", "missed_call", "call_center_queue_uuid"}
NOT_IN_4_2 = NOT_IN_4_4 | {
    "caller_destination", "record_path", "record_name", "cc_agent_uuid", "cc_agent_bridged", "cc_queue_answered_epoch",
    "cc_queue_terminated_epoch", "cc_queue_canceled_epoch", "cc_cancel_reason", "cc_cause",
}  # fmt: skip
LACKING = {"4.2.2": NOT_IN_4_2, "4.4.1": NOT_IN_4_4}
LENGTH_WITH_RINGING = {"4.2.2", "4.4.1", "5.0.1", "5.1.0"}
NULL_FOR_ZERO = {"5.1.0", "5.2.0"}  # in these the service gives 0 for four fields only


@pytest.mark.parametrize("release", demo.RELEASES)
def test_the_same_calls_give_the_same_json(
    make_database: DatabaseMaker, newest: list[dict[str, Any]], release: str
) -> None:
    expected = []
    for stored in newest:
        call = stored | dict.fromkeys(LACKING.get(release, ()))
        if release in LENGTH_WITH_RINGING:
            ringing = int(call["end_epoch"]) - int(call["start_epoch"]) - call["billsec"]
            call |= {"duration": call["duration"] + ringing, "mduration": call["mduration"] + ringing * 1000}
        if release in NULL_FOR_ZERO:
            call |= {name: None for name in ("answer_epoch", "waitsec") if call[name] in (0, "0")}
        expected.append(call)
    found = read_calls(make_database(release, calls=600))
    assert len(found) > 300
    assert found == expected


@pytest.mark.parametrize("release", demo.RELEASES)
def test_ranges_pages_and_filters_work_in_every_release(make_database: DatabaseMaker, release: str) -> None:
    database = make_database(release, calls=600)
    client = database.client(database.account("alpha.example.com"))
    october = client.call_range("2026-10-01", "2026-10-31")
    assert october
    assert all(call["end_stamp"].startswith("2026-10-") for call in october)
    answered = client.call_range("2026-10-01", "2026-10-31", answered="true", billable_only="true", by="start")
    assert answered
    assert all(call["answer_stamp"] and call["billsec"] > 0 for call in answered)
    page = client.get("/api/calls", domain_name="alpha.example.com", limit=10)
    after = page.headers["Link"].partition("after=")[2].partition(">")[0]
    assert page.get_json() + client.calls(after=after) == client.calls()


def test_4_x_keeps_wall_clock_stamps_in_the_zone_of_the_setting(make_database: DatabaseMaker) -> None:
    database = make_database("4.2.2")
    uuid = database.insert_call(start_stamp="2026-07-01 11:59:00", end_stamp="2026-07-01 12:00:00")
    client = database.client(database.account("alpha.example.com"), database.app(CDR_API_TIMEZONE="Europe/Berlin"))
    (call,) = client.call_range("2026-07-01T12:00+02:00", "2026-07-01T12:00+02:00")
    assert (call["xml_cdr_uuid"], call["end_stamp"]) == (uuid, "2026-07-01T12:00:00+02:00")
    assert call["start_stamp"] == "2026-07-01T11:59:00+02:00"


def test_4_x_calls_with_a_blank_end_stamp_are_not_lost(make_database: DatabaseMaker) -> None:
    database = make_database("4.4.1")
    client = database.client(database.account("alpha.example.com"))
    dated = database.insert_call(end_stamp="2026-07-01 12:00:00")
    blank = database.insert_call(end_stamp="")
    missing = database.insert_call(end_stamp=None)
    assert [(call["xml_cdr_uuid"], call["end_stamp"]) for call in client.calls()] == [
        (dated, "2026-07-01T12:00:00+00:00"),
        (blank, None),
        (missing, None),
    ]
    assert [call["xml_cdr_uuid"] for call in client.call_range("2026-07-01", "2026-07-01")] == [dated]


def test_upgraded_types_need_no_restart(make_database: DatabaseMaker) -> None:
    """As FusionPBX's upgrade from 4.4 does: the key renamed, the types converted, columns added."""
    database = make_database("4.4.1", calls=90)
    client = database.client(database.account("alpha.example.com"))
    before = client.calls()
    database.execute("ALTER TABLE v_xml_cdr RENAME uuid TO xml_cdr_uuid")
    assert client.calls() == before
    for stamp in ("start_stamp", "answer_stamp", "end_stamp"):
        database.execute(f"ALTER TABLE v_xml_cdr ALTER {stamp} TYPE timestamptz USING {stamp}::timestamptz")
    database.execute(
        "ALTER TABLE v_xml_cdr ADD missed_call boolean, ADD sip_call_id text, ADD tomorrow text DEFAULT 'leak'"
    )
    assert client.calls() == before
    database.execute("UPDATE v_xml_cdr SET missed_call = false")
    assert client.calls() == [call | {"missed_call": False} for call in before]


IMPORTED = "e15af291-8fb3-49e8-939b-4597781e8426"  # the domain of the imported calls


def test_rows_of_fusionpbxs_own_importer(make_database: DatabaseMaker) -> None:
    database = make_database()
    with database.connect() as connection:
        demo.add_imported_calls(connection)
        demo.add_domain(connection, "pbx.example.com")
        connection.execute("UPDATE v_domains SET domain_uuid = %s WHERE domain_name = 'pbx.example.com'", [IMPORTED])
    client = database.client(database.account("pbx.example.com"), database.app(CDR_API_TIMEZONE="UTC"))
    found = {call["xml_cdr_uuid"]: call for call in client.calls(domain_name="pbx.example.com")}
    with (demo.HERE / "imported-5.5.7.csv").open(encoding="utf-8", newline="") as file:
        stored = {row["xml_cdr_uuid"]: row for row in csv.DictReader(file)}
    assert len(stored) == 60
    assert set(found) == set(stored)
    for uuid, row in stored.items():
        call = found[uuid]
        assert call["billsec"] == int(row["billsec"])
        assert call["end_stamp"] == row["end_stamp"].replace(" ", "T") + ":00"
        assert call["answer_stamp"] == (
            row["answer_stamp"].replace(" ", "T") + ":00" if row["answer_epoch"] != "0" else None
        )
        assert call["missed_call"] == {"f": False, "t": True, "": None}[row["missed_call"]]
        assert call["rtp_audio_in_mos"] == 4.5
        strings = set(FIELDS) & set(row) - INTEGERS - NUMBERS - BOOLEANS
        for name in strings - {"start_stamp", "answer_stamp", "end_stamp"}:
            assert (call[name] or "") == row[name], name


def test_a_schema_that_is_no_fusionpbx_is_an_error_not_an_answer(make_database: DatabaseMaker) -> None:
    database = make_database(calls=30)
    client = database.client(database.account("alpha.example.com"))
    database.execute("ALTER TABLE v_xml_cdr DROP end_stamp")
    response = client.get("/api/calls", domain_name="alpha.example.com")
    assert response.status_code == 503
    assert "end_stamp" in problem(response)["message"]
