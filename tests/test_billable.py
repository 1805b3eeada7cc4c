"""What a number means: which legs can cost money, and how each figure of FusionPBX's pages is had from here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

import demo
from tests.conftest import Client, Database, DatabaseMaker
from tests.documents import BILLING

A, E = "a0000000-0000-4000-8000-000000000001", "e0000000-0000-4000-8000-000000000001"
CALLER = "0b9e2f6c-6a53-4c0e-9c5e-0d9c4b3f7a11"  # the leg that originated legs were made for
EVER = {"from": "2026-01-01", "to": "2026-12-31"}
NO_ORIGIN = ("4.2.2", "4.4.1")  # do not store originating_leg_uuid

ORIGIN = {"originating_leg_uuid": CALLER}
AGENT = {"cc_side": "agent"}
OUT = {"direction": "outbound"}
IN = {"direction": "inbound"}
TALKED = {"billsec": 61}
SILENT = {"billsec": 0}
# A leg as it is stored, and whether it can cost money.
LEGS: dict[str, tuple[dict[str, Any], bool]] = {
    "inbound, answered": (IN | TALKED, True),
    "inbound, not answered": (IN | SILENT, True),
    "outbound, answered": (OUT | TALKED, True),
    "outbound, busy": (OUT | SILENT | {"hangup_cause": "USER_BUSY"}, True),
    "local, answered": (TALKED | {"direction": "local"}, True),
    "without a direction": (TALKED, True),
    "without a hangup cause": (IN | TALKED | {"hangup_cause": None}, True),
    "without a leg": (IN | TALKED | {"leg": None}, True),
    "b leg": (IN | TALKED | {"leg": "b"}, False),
    "b leg, outbound and answered": (OUT | TALKED | {"leg": "b"}, False),
    "lost race": (IN | SILENT | {"hangup_cause": "LOSE_RACE"}, False),
    "lost race, outbound and answered": (OUT | TALKED | {"hangup_cause": "LOSE_RACE"}, False),
    "queue's caller": (IN | TALKED | {"cc_side": "member"}, True),
    "blank side of a queue": (IN | TALKED | {"cc_side": ""}, True),
    "agent, inbound, answered": (AGENT | IN | TALKED, False),
    "agent, local, answered": (AGENT | TALKED | {"direction": "local"}, False),
    "agent without a direction, answered": (AGENT | TALKED, False),
    "agent, outbound, answered": (AGENT | OUT | TALKED, True),
    "agent, outbound, not answered": (AGENT | OUT | SILENT, False),
    "agent, outbound, NULL for 0": (AGENT | OUT | {"billsec": None}, False),
    "agent, outbound, rounds to 0": (AGENT | OUT | {"billsec": "0.4"}, False),
    "agent, outbound, rounds to 1": (AGENT | OUT | {"billsec": "0.6"}, True),
    "agent, outbound, no number": (AGENT | OUT | {"billsec": "NaN"}, False),
    "agent, outbound, below 0": (AGENT | OUT | {"billsec": -5}, False),
    "agent, outbound, answered, lost race": (AGENT | OUT | TALKED | {"hangup_cause": "LOSE_RACE"}, False),
    "agent, outbound, answered, b leg": (AGENT | OUT | TALKED | {"leg": "b"}, False),
    "originated, inbound, answered": (ORIGIN | IN | TALKED, False),
    "originated, local, answered": (ORIGIN | TALKED | {"direction": "local"}, False),
    "originated without a direction": (ORIGIN | TALKED, False),
    "originated, outbound, answered": (ORIGIN | OUT | TALKED, True),
    "originated, outbound, not answered": (ORIGIN | OUT | SILENT, False),
    "originated, outbound, NULL for 0": (ORIGIN | OUT | {"billsec": None}, False),
    "originated, outbound, rounds to 0": (ORIGIN | OUT | {"billsec": "0.4"}, False),
    "originated, outbound, rounds to 1": (ORIGIN | OUT | {"billsec": "0.6"}, True),
    "originated, outbound, answered, lost race": (ORIGIN | OUT | TALKED | {"hangup_cause": "LOSE_RACE"}, False),
    "originated, outbound, answered, b leg": (ORIGIN | OUT | TALKED | {"leg": "b"}, False),
    "originated agent, outbound, answered": (ORIGIN | AGENT | OUT | TALKED, True),
    "originated agent, inbound, answered": (ORIGIN | AGENT | IN | TALKED, False),
}


def answer(client: Client, path: str, **parameters: str) -> list[dict[str, Any]]:
    response = client.get(path, **parameters)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = json.loads(response.data)
    return found


@pytest.mark.parametrize("release", demo.RELEASES)
def test_billable_legs_are_those_that_can_cost_money(make_database: DatabaseMaker, release: str) -> None:
    database = make_database(release)
    legs = {
        database.insert_call(**{"hangup_cause": "NORMAL_CLEARING", "start_stamp": "2026-02-03 09:59:00"} | leg): name
        for name, (leg, _) in LEGS.items()
        if release not in NO_ORIGIN or not ORIGIN.items() <= leg.items()
    }
    client = database.client(database.account("alpha.example.com"))
    billable = {name for name in legs.values() if LEGS[name][1]}
    mine = {"domain_name": "alpha.example.com"}
    lists = {"/api/calls": mine, "/api/call_range": mine | EVER, "/api/call_feed": mine | {"from": "2026-01-01"}}
    for path, parameters in lists.items():
        for kind in ("true", "false"):
            found = [legs[call["xml_cdr_uuid"]] for call in answer(client, path, **parameters, billable_only=kind)]
            assert len(found) == len(set(found))
            assert set(found) == (billable if kind == "true" else set(legs.values()))
        calls = answer(client, path, **parameters, billable_only="true", answered="true", direction="outbound")
        expected = {name for name in billable if LEGS[name][0].get("direction") == "outbound"} - {"outbound, busy"}
        assert {legs[call["xml_cdr_uuid"]] for call in calls} == expected
    (total,) = answer(client, "/api/call_totals", **EVER, billable_only="true")
    assert total["calls"] == len(billable)
    for count in ("concurrent", "active"):
        rows = answer(client, f"/api/{count}_calls_by_domain", date="2026-02-03", resolution="60", billable_only="true")
        assert sum(row.get("active_calls", 0) + row.get("total", 0) for row in rows) == len(billable)


def test_a_leg_to_a_mobile_is_billed_and_a_lost_race_is_not(make_database: DatabaseMaker) -> None:
    """An enterprise ring group and a queue that ring mobiles through the gateway, which the carrier bills."""
    database = make_database()
    client = database.client(database.account("alpha.example.com"))
    inbound = database.insert_call(direction="inbound", billsec=300)
    database.insert_call(direction="outbound", billsec=290, originating_leg_uuid=inbound)
    database.insert_call(direction="outbound", billsec=200, cc_side="agent")
    database.insert_call(direction="outbound", billsec=0, originating_leg_uuid=inbound, hangup_cause="LOSE_RACE")
    (total,) = answer(client, "/api/call_totals", **EVER, billable_only="true")
    assert (total["calls"], total["billsec"]) == (3, 790)


def test_answered_within_the_same_second_counts_as_not_answered(make_database: DatabaseMaker) -> None:
    """billsec is a difference of whole seconds. Whoever bills a fee for each connection looks at answer_epoch."""
    database = make_database()
    client = database.client(database.account("alpha.example.com"))
    short = {"billsec": 0, "billmsec": 900, "answer_epoch": 1770112800, "answer_stamp": "2026-02-03 10:00:00+00"}
    plain = database.insert_call(**short, direction="outbound")
    database.insert_call(**short, direction="outbound", originating_leg_uuid=CALLER)
    mine = {"domain_name": "alpha.example.com"}
    assert answer(client, "/api/calls", **mine, answered="true") == []
    billable = answer(client, "/api/calls", **mine, billable_only="true", fields="xml_cdr_uuid,billmsec,answer_epoch")
    assert billable == [{"xml_cdr_uuid": plain, "billmsec": 900, "answer_epoch": "1770112800"}]
    (total,) = answer(client, "/api/call_totals", **EVER)
    assert (total["calls"], total["answered"], total["billsec"], total["billmsec"]) == (2, 0, 0, 1800)


@pytest.mark.parametrize("release", demo.RELEASES)
def test_ringing_and_talking_together_is_a_difference_of_epochs(make_database: DatabaseMaker, release: str) -> None:
    """duration is that or the talk alone, by the release and the importer; it is given as it is stored."""
    database = make_database(release)
    client = database.client(database.account("alpha.example.com"))
    epochs = {"start_epoch": 1770112730, "answer_epoch": 1770112740, "end_epoch": 1770112800}
    for duration in (70, 60):
        database.insert_call(**epochs, billsec=60, duration=duration)
    fields = "duration,billsec,start_epoch,end_epoch"
    for call in answer(client, "/api/calls", domain_name="alpha.example.com", fields=fields):
        assert call["duration"] in (70, 60)
        assert int(call["end_epoch"]) - int(call["start_epoch"]) - call["billsec"] == 10


# FusionPBX's pages ------------------------------------------------------------

BRIDGED = {"bridge_uuid": "0b9e2f6c-0000-4000-8000-000000000002", "status": "answered", "missed_call": False}
ALONE = {"status": "answered", "missed_call": False}  # answered by FreeSWITCH itself, so there is no bridge
MINE = {"extension_uuid": E}
MISSED = {"billsec": 0, "missed_call": True, "status": "missed", "hangup_cause": "ORIGINATOR_CANCEL"}
UNHEARD = {"billsec": 0, "missed_call": False, "status": "no_answer"}
LOST = {"hangup_cause": "LOSE_RACE"}
DAY = "2026-02-03"
# A day of one domain, as FusionPBX's importer would store it. The seconds differ, so that a sum tells whose it is.
ROWS: dict[str, dict[str, Any]] = {
    "inbound, ends the day after": IN | BRIDGED | MINE | {"billsec": 1, "start_stamp": f"{DAY} 23:59:59+00"},
    "outbound": OUT | BRIDGED | MINE | {"billsec": 2},
    "local": BRIDGED | MINE | {"billsec": 4, "direction": "local"},
    "missed": IN | MISSED | MINE,
    "voicemail": IN | MINE | {"billsec": 8, "missed_call": True, "status": "voicemail", "voicemail_message": True},
    "fax": IN | ALONE | {"billsec": 16},
    "conference": IN | ALONE | {"billsec": 32, "conference_name": "c", "missed_call": None},
    "echo": ALONE | MINE | {"billsec": 64, "direction": "local"},
    "outbound, busy": OUT | UNHEARD | MINE | {"hangup_cause": "USER_BUSY", "status": "busy"},
    "inbound, busy": IN | UNHEARD | MINE | {"hangup_cause": "USER_BUSY", "status": "busy"},
    "queue's caller": IN | BRIDGED | {"billsec": 128, "cc_side": "member"},
    "agent at a phone": IN | BRIDGED | AGENT | MINE | {"billsec": 256},
    "agent, did not answer": IN | UNHEARD | AGENT | MINE | {"hangup_cause": "NO_ANSWER"},
    "agent at a mobile": IN | BRIDGED | AGENT | {"billsec": 512, "destination_number": "4915100000001"},
    "lost race": IN | UNHEARD | LOST | MINE,
    "originated, lost race": IN | UNHEARD | LOST | MINE | ORIGIN,
    "originated, at a mobile": OUT | BRIDGED | ORIGIN | {"billsec": 1024},
    "originated, at a phone": IN | BRIDGED | ORIGIN | MINE | {"billsec": 2048},
    "inbound, forwarded": OUT | BRIDGED | MINE | {"billsec": 4096, "caller_destination": "18005550100"},
    "b leg": IN | BRIDGED | MINE | {"billsec": 8192, "leg": "b"},
    "bridged in early media, not answered": OUT | UNHEARD | MINE | BRIDGED | {"billsec": 0, "status": "no_answer"},
    "without a hangup cause": IN | ALONE | {"billsec": 16384, "hangup_cause": None},
    "began the day before": IN | BRIDGED | MINE | {"billsec": 32768, "start_stamp": "2026-02-02 23:59:59+00"},
}
Kept = Callable[[dict[str, Any]], bool]
OF_E, E_ONLY = f"leg = 'a' AND extension_uuid = '{E}'", {"leg": "a", "extension_uuid": E}
NOT_AGENT = "(cc_side IS NULL OR cc_side <> 'agent')"
CAN_COST = f"(direction = 'outbound' AND billsec > 0 OR originating_leg_uuid IS NULL AND {NOT_AGENT})"


def not_lost(row: dict[str, Any]) -> bool:
    return row["hangup_cause"] not in (None, "LOSE_RACE")


def trunk(row: dict[str, Any]) -> bool:
    return row["direction"] in ("inbound", "outbound")


# A figure of FusionPBX's; its calls and seconds, counted by hand in ROWS; what the page counts, in SQL; the request
# that gives it here, and which rows of the answer count (all, if the filters say it already). With group_by it is one
# for totals, else one for calls.
FIGURES: dict[str, tuple[int, int, str, dict[str, str], Kept | None]] = {
    "list, admin": (
        15,
        1 + 2 + 4 + 8 + 16 + 32 + 64 + 128 + 1024 + 2048 + 4096,
        f"leg = 'a' AND hangup_cause <> 'LOSE_RACE' AND {NOT_AGENT}",
        {"leg": "a", "fields": "billsec,hangup_cause,cc_side"},
        lambda row: not_lost(row) and row["cc_side"] != "agent",
    ),
    "list, superadmin": (
        19,
        1 + 2 + 4 + 8 + 16 + 32 + 64 + 128 + 256 + 512 + 1024 + 2048 + 4096 + 8192,
        "hangup_cause <> 'LOSE_RACE'",
        {"group_by": "hangup_cause"},
        not_lost,
    ),
    "statistics, volume and minutes, admin": (
        18,
        1 + 2 + 4 + 8 + 16 + 32 + 64 + 128 + 256 + 512 + 4096 + 16384,
        "leg = 'a' AND originating_leg_uuid IS NULL",
        {"leg": "a", "fields": "billsec,originating_leg_uuid"},
        lambda row: row["originating_leg_uuid"] is None,
    ),
    "statistics, volume and minutes, superadmin": (
        19,
        1 + 2 + 4 + 8 + 16 + 32 + 64 + 128 + 256 + 512 + 4096 + 8192 + 16384,
        "originating_leg_uuid IS NULL",
        {"fields": "billsec,originating_leg_uuid"},
        lambda row: row["originating_leg_uuid"] is None,
    ),
    "statistics, answered, admin": (
        6,
        1 + 2 + 4 + 128 + 4096,
        f"leg = 'a' AND originating_leg_uuid IS NULL AND bridge_uuid IS NOT NULL AND {NOT_AGENT}",
        {"leg": "a", "fields": "billsec,originating_leg_uuid,bridge_uuid,cc_side"},
        lambda row: row["originating_leg_uuid"] is None and row["bridge_uuid"] and row["cc_side"] != "agent",
    ),
    "statistics, missed, admin": (
        2,
        8,
        "leg = 'a' AND originating_leg_uuid IS NULL AND missed_call",
        {"leg": "a", "fields": "billsec,originating_leg_uuid,missed_call"},
        lambda row: row["originating_leg_uuid"] is None and row["missed_call"],
    ),
    "extension summary, answered": (
        5,
        1 + 2 + 256 + 2048 + 4096,
        f"{OF_E} AND status = 'answered' AND direction IN ('inbound', 'outbound')",
        E_ONLY | {"status": "answered", "group_by": "direction"},
        trunk,
    ),
    "extension summary, answered inbound": (
        3,
        1 + 256 + 2048,
        f"{OF_E} AND status = 'answered' AND direction = 'inbound'",
        E_ONLY | {"status": "answered", "direction": "inbound", "group_by": "direction"},
        None,
    ),
    "extension summary, missed": (
        1,
        0,
        f"{OF_E} AND status = 'missed' AND {NOT_AGENT} AND direction <> 'local'",
        E_ONLY | {"status": "missed", "group_by": "direction"},
        trunk,
    ),
    "extension summary, voicemail": (
        1,
        8,
        f"{OF_E} AND status = 'voicemail' AND direction <> 'local'",
        E_ONLY | {"status": "voicemail", "group_by": "direction"},
        trunk,
    ),
    "extension summary, no answer": (
        1,
        0,
        f"{OF_E} AND status = 'no_answer' AND cc_side IS NOT NULL AND direction = 'inbound'",
        E_ONLY | {"status": "no_answer", "direction": "inbound", "fields": "billsec,cc_side"},
        lambda row: row["cc_side"] is not None,
    ),
    "extension summary, busy": (
        1,
        0,
        f"{OF_E} AND status = 'busy' AND direction = 'inbound'",
        E_ONLY | {"status": "busy", "direction": "inbound", "group_by": "direction"},
        None,
    ),
    "extension summary, inbound calls": (
        5,
        1 + 8,
        f"{OF_E} AND direction = 'inbound' AND originating_leg_uuid IS NULL AND {NOT_AGENT}",
        E_ONLY | {"direction": "inbound", "fields": "billsec,originating_leg_uuid,cc_side"},
        lambda row: row["originating_leg_uuid"] is None and row["cc_side"] != "agent",
    ),
    "extension summary, inbound duration": (
        9,
        1 + 8 + 256 + 2048,
        f"{OF_E} AND direction = 'inbound'",
        E_ONLY | {"direction": "inbound", "group_by": "direction"},
        None,
    ),
    "extension summary, outbound calls and duration": (
        4,
        2 + 4096,
        f"{OF_E} AND direction = 'outbound'",
        E_ONLY | {"direction": "outbound", "group_by": "direction"},
        None,
    ),
    "here, billable": (
        15,
        1 + 2 + 4 + 8 + 16 + 32 + 64 + 128 + 1024 + 4096 + 16384,
        f"leg = 'a' AND coalesce(hangup_cause, '') <> 'LOSE_RACE' AND {CAN_COST}",
        {"billable_only": "true", "group_by": "direction"},
        None,
    ),
}


@pytest.fixture(scope="module", params=["5.4.4", "5.5.7", "master"])
def pages(make_database: DatabaseMaker, request: pytest.FixtureRequest) -> Database:
    database = make_database(request.param)
    database.execute("UPDATE v_domains SET domain_uuid = %s WHERE domain_name = 'alpha.example.com'", [A])
    stored = {"domain_uuid": A, "start_stamp": f"{DAY} 12:00:00+00", "end_stamp": "2026-02-04 12:00:00+00"}
    for row in ROWS.values():
        database.insert_call(**stored | {"hangup_cause": "NORMAL_CLEARING"} | row)
    return database


@pytest.mark.parametrize("figure", FIGURES)
def test_a_figure_of_fusionpbxs_pages_is_had_by_a_request(pages: Database, figure: str) -> None:
    calls, seconds, condition, parameters, keep = FIGURES[figure]
    where = f"domain_uuid = '{A}' AND start_stamp BETWEEN '{DAY} 00:00+00' AND '{DAY} 23:59:59.999+00' AND {condition}"
    counted = pages.execute(f"SELECT count(*), coalesce(sum(billsec), 0)::bigint FROM v_xml_cdr WHERE {where}")[0]
    assert tuple(counted) == (calls, seconds)  # what the page shows
    client = pages.client(pages.account("alpha.example.com"))
    path = "/api/call_totals" if "group_by" in parameters else "/api/call_range"
    rows = answer(client, path, domain_uuid=A, by="start", **{"from": DAY, "to": DAY}, **parameters)
    kept = [row for row in rows if keep is None or keep(row)]
    found = sum(row.get("calls", 1) for row in kept), sum(row["billsec"] for row in kept)
    assert found == (calls, seconds)


def test_the_importer_stores_what_the_figures_go_by(make_database: DatabaseMaker) -> None:
    """On rows that FusionPBX's own importer wrote: of plain calls, bridged ones are those with billsec > 0."""
    database = make_database()
    with database.connect() as connection:
        demo.add_imported_calls(connection)
        demo.add_domain(connection, "pbx.example.com")
        uuid = "SELECT DISTINCT domain_uuid FROM v_xml_cdr"
        connection.execute(f"UPDATE v_domains SET domain_uuid = ({uuid}) WHERE domain_name = 'pbx.example.com'")
    client = database.client(database.account("pbx.example.com"))
    mine = {"domain_name": "pbx.example.com", "fields": "xml_cdr_uuid,bridge_uuid,status"}
    answered = answer(client, "/api/calls", **mine, answered="true")
    assert len(answered) == 37
    assert all(call["bridge_uuid"] for call in answered)
    assert answered == answer(client, "/api/calls", **mine, status="answered")
    rest = answer(client, "/api/calls", **mine, status="no_answer")
    assert [call["bridge_uuid"] for call in rest] == [None] * 23


def test_a_query_lists_the_agents_legs_that_rang_a_mobile(make_database: DatabaseMaker) -> None:
    """The importer calls them inbound, so that billable_only leaves them out."""
    database = make_database()
    extension = (
        "INSERT INTO v_extensions (extension_uuid, domain_uuid, extension, number_alias) VALUES (%s, %s, %s, %s)"
    )
    database.execute(extension, [E, A, "101", "4930000101"])
    leg: dict[str, Any] = {"domain_uuid": A, **AGENT, **IN, **TALKED}
    mobiles = {
        database.insert_call(**leg, destination_number="4915100000001"),
        database.insert_call(**leg, destination_number="+4915100000001", **MINE),  # the agent's id is an extension
        database.insert_call(**leg, destination_number="101", last_app="bridge", last_arg="[x=y]sofia/gateway/g/4915"),
    }
    database.insert_call(**leg, destination_number="101", **MINE)
    database.insert_call(**leg, destination_number="4930000101", **MINE)  # by the alias of the extension
    database.insert_call(**leg | SILENT, destination_number="4915100000001")
    database.insert_call(**leg | {"cc_side": "member"}, destination_number="4915100000001")
    section = BILLING.partition("cannot know")[2]
    (query,) = re.findall(r"```sql\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    assert {row[0] for row in database.execute(query)} == mobiles
