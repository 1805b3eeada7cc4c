"""One call by its uuid, and the legs that belong together with it, in rows as FusionPBX's importer writes them."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

import demo
from cdr.legs import MOST_LEGS
from tests.conftest import Client, Database, DatabaseMaker, problem
from tests.shapes import T1, T2, UA, B, granted, set_domains

NOBODY = "00000000-0000-4000-8000-0000000000ff"
NOT_STORED = (
    "00000000-0000-4000-8000-0000000000ee"  # a channel whose leg FreeSWITCH does not log, as it has an originator
)


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    database = make_database(index=True)
    set_domains(database)
    return database


@pytest.fixture(scope="module")
def client(database: Database) -> Client:
    return database.client(granted(database, UA))


def insert(database: Database, span: str, **values: Any) -> str:
    """A leg of the 3rd of February, from one time to another."""
    start, end = (f"2026-02-03 {time}+00" for time in span.split(" "))
    return database.insert_call(**{"domain_uuid": UA, "start_stamp": start, "end_stamp": end} | values)


def legs(client: Client, uuid: str, **parameters: str) -> list[str]:
    response = client.get(f"/api/calls/{uuid}/legs", **parameters)
    assert response.status_code == 200, response.text
    return [call["xml_cdr_uuid"] for call in json.loads(response.data)]


# One call ---------------------------------------------------------------------


def test_a_call_is_the_one_that_lists_have(database: Database, client: Client) -> None:
    uuid = insert(database, "01:00 01:01", caller_id_name='Bob "B", x\n', xml="<a/>", end_stamp=None)
    (listed,) = [call for call in client.calls() if call["xml_cdr_uuid"] == uuid]
    for way in (uuid, uuid.upper(), uuid.replace("-", ""), f"{{{uuid}}}"):
        response = client.get(f"/api/calls/{way}")
        assert (response.status_code, response.mimetype) == (200, "application/json")
        assert json.loads(response.data) == listed
    fields = {"fields": "xml_cdr_uuid,caller_id_name"}
    assert client.get(f"/api/calls/{uuid}", **fields).get_json() == {
        "xml_cdr_uuid": uuid,
        "caller_id_name": 'Bob "B", x\n',
    }
    lines = client.get(f"/api/calls/{uuid}", **fields, format="ndjson").text
    assert [json.loads(line)["xml_cdr_uuid"] for line in lines.splitlines()] == [uuid]
    table = client.get(f"/api/calls/{uuid}", **fields, format="csv").text
    assert list(csv.reader(io.StringIO(table))) == [["xml_cdr_uuid", "caller_id_name"], [uuid, 'Bob "B", x\n']]


def test_a_stamp_is_shown_in_the_zone_asked_for(database: Database, client: Client) -> None:
    uuid = insert(database, "02:00 02:01")
    found = client.get(f"/api/calls/{uuid}", tz="Asia/Kolkata", fields="end_stamp").get_json()
    assert found == {"end_stamp": "2026-02-03T07:31:00+05:30"}


@pytest.mark.parametrize("suffix", ["", "/legs"])
def test_a_foreign_call_and_none_are_the_same_404(database: Database, client: Client, suffix: str) -> None:
    foreign = insert(database, "03:00 03:01", domain_uuid=B)
    answers = {client.get(f"/api/calls/{uuid}{suffix}").text for uuid in (foreign, NOBODY, "nonsense", "%", "x" * 500)}
    assert len(answers) == 1
    response = client.get(f"/api/calls/{foreign}{suffix}")
    assert response.status_code == 404
    assert problem(response)["message"] == "There is no such call among those that this account may read."
    assert database.client(database.account(all_domains=True)).get(f"/api/calls/{foreign}{suffix}").status_code == 200


@pytest.mark.parametrize("suffix", ["", "/legs"])
def test_parameters_of_one_call(client: Client, suffix: str) -> None:
    for name, value in {
        "limit": "1",
        "domain_name": "alpha.example.com",
        "order": "desc",
        "direction": "local",
    }.items():
        response = client.get(f"/api/calls/{NOBODY}{suffix}", **{name: value})
        assert (response.status_code, list(problem(response)["data"])) == (422, [name])
    assert client.get(f"/api/calls/{NOBODY}{suffix}", format="xml").status_code == 406


# Legs -------------------------------------------------------------------------


def test_a_plain_call_is_its_own_conversation(database: Database, client: Client) -> None:
    uuid = insert(database, "04:00 04:05", bridge_uuid=NOT_STORED)
    insert(database, "04:00 04:05")  # at the same time, with nobody in common
    insert(database, "04:00 04:05", bridge_uuid="")
    insert(database, "04:00 04:05", bridge_uuid="no uuid")
    assert legs(client, uuid) == [uuid]


def test_legs_that_a_ring_group_originated(database: Database, client: Client) -> None:
    """An enterprise ring group: each leg is a call of its own, one wins the race (and is stored with log-b-leg)."""
    caller = insert(database, "05:00:00 05:10:00", direction="inbound")
    won = insert(database, "05:00:01 05:10:00", originating_leg_uuid=caller, bridge_uuid=caller)
    lost = insert(database, "05:00:01 05:00:09", originating_leg_uuid=caller, hangup_cause="LOSE_RACE")
    busy = insert(database, "05:00:01 05:00:02", originating_leg_uuid=caller, hangup_cause="USER_BUSY")
    for uuid in (caller, won, lost, busy):
        assert legs(client, uuid) == [busy, lost, *sorted([caller, won])]


def test_a_queues_caller_and_the_agents_that_it_rang(database: Database, client: Client) -> None:
    caller = insert(database, "06:00:00 06:20:00", cc_side="member", cc_member_session_uuid=None)
    tried = [
        insert(database, f"06:0{n}:00 06:0{n}:20", cc_side="agent", cc_member_session_uuid=caller) for n in (1, 2, 3)
    ]
    agent = insert(database, "06:04:00 06:19:59", cc_side="agent", cc_member_session_uuid=caller, bridge_uuid=caller)
    insert(database, "06:01:00 06:02:00", cc_side="agent", cc_member_session_uuid=NOBODY)  # of another caller
    for uuid in (caller, agent, *tried):
        assert legs(client, uuid) == [*tried, agent, caller]


def test_a_transfer_by_way_of_a_call_that_ended_before_it(database: Database, client: Client) -> None:
    """Attended: the agent asks a colleague first. The legs have only the colleague's channel in common."""
    colleague = NOT_STORED.replace("ee", "ed")
    caller = insert(database, "07:00:00 08:30:00", bridge_uuid=colleague)
    consultation = insert(database, "07:05:00 07:06:00", bridge_uuid=colleague)
    later = insert(database, "07:50:00 08:40:00", bridge_uuid=caller)
    last = insert(database, "08:50:00 08:55:00", originating_leg_uuid=colleague)  # when all the others have ended
    for uuid in (caller, consultation, later, last):
        assert legs(client, uuid) == [consultation, caller, later, last]


def test_legs_are_followed_until_nothing_more_comes(database: Database, client: Client) -> None:
    chain = [insert(database, "09:00:00 09:00:01")]
    for number in range(1, 15):
        chain.append(insert(database, f"09:{number:02}:00 09:{number:02}:30", originating_leg_uuid=chain[-1]))
    assert legs(client, chain[7]) == chain


def test_a_leg_without_an_end_is_found_by_its_name(database: Database, client: Client) -> None:
    open_leg = insert(database, "10:00 10:01", end_stamp=None, start_stamp=None)
    named = insert(database, "10:00 10:01", originating_leg_uuid=open_leg)
    assert legs(client, named) == [named, open_leg]
    assert legs(client, open_leg) == [open_leg]  # when it took place nobody can say


def test_legs_stay_within_the_domain(make_database: DatabaseMaker) -> None:
    database = make_database(index=True)
    set_domains(database)
    mine = insert(database, "11:00 11:10")
    own = insert(database, "11:00 11:09", originating_leg_uuid=mine)
    foreign = insert(database, "11:00 11:10", domain_uuid=B, originating_leg_uuid=mine)
    nameless = insert(database, "11:00 11:08", domain_uuid=None, bridge_uuid=mine)
    lost = insert(database, "11:00 11:07", domain_uuid=None, domain_name="gone.example.com", bridge_uuid=mine)
    strays = [
        insert(database, "12:00 12:01", domain_uuid=NOBODY, domain_name="gone.example.com", bridge_uuid=NOT_STORED)
        for _ in range(2)
    ]
    for token in (granted(database, UA), granted(database, UA, B), database.account(all_domains=True)):
        client = database.client(token)
        assert legs(client, mine) == [nameless, own, mine]
        assert legs(client, nameless) == [nameless, own, mine]
    everything = database.client(database.account(all_domains=True))
    assert legs(everything, foreign) == [foreign]
    assert legs(everything, lost) == [lost]
    assert legs(everything, strays[0]) == strays
    found = everything.get(f"/api/calls/{strays[0]}/legs", fields="domain_name").get_json()
    assert found == [{"domain_name": "gone.example.com"}] * 2
    twins = [insert(database, "13:00 13:01", domain_uuid=uuid, bridge_uuid=NOT_STORED) for uuid in (T1, T2)]
    assert legs(database.client(granted(database, T1, T2)), twins[0]) == [twins[0]]


def test_too_many_legs_are_an_error_and_not_some_of_them(make_database: DatabaseMaker) -> None:
    database = make_database(index=True)
    client = database.client(database.account("alpha.example.com"))
    caller = database.insert_call(start_stamp="2026-02-03 09:00+00")
    database.execute(
        "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_name, start_stamp, end_stamp, originating_leg_uuid) SELECT"
        " gen_random_uuid(), 'alpha.example.com', '2026-02-03 09:00Z', '2026-02-03 09:01Z', %s"
        " FROM generate_series(2, %s)",
        [caller, MOST_LEGS],
    )
    assert len(legs(client, caller, fields="xml_cdr_uuid")) == MOST_LEGS
    database.insert_call(originating_leg_uuid=caller)
    response = client.get(f"/api/calls/{caller}/legs")
    assert response.status_code == 409
    assert problem(response)["message"].startswith("More legs belong together with this call than are followed (1,000")


def test_legs_that_are_stored_twice_do_not_push_others_out(make_database: DatabaseMaker) -> None:
    database = make_database(index=True)
    client = database.client(database.account("alpha.example.com"))
    caller = database.insert_call(start_stamp="2026-02-03 09:00+00")
    database.execute("CREATE TABLE old (LIKE v_xml_cdr INCLUDING INDEXES) INHERITS (v_xml_cdr)")
    database.execute(
        "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_name, end_stamp, originating_leg_uuid) SELECT"
        " gen_random_uuid(), 'alpha.example.com', '2026-02-03 09:01Z', %s FROM generate_series(1, %s)",
        [caller, MOST_LEGS * 6 // 10],
    )
    database.execute("INSERT INTO old SELECT * FROM v_xml_cdr")
    assert client.get(f"/api/calls/{caller}/legs").status_code == 409


# What demo/imported-legs-5.5.7.csv has, by shape and leg: those that were made for the leg 0001 of their shape, and
# those that name no channel that another one names.
MADE = (
    "02-0002 05-0003 05-0004 06-0002 06-0003 07-0002 08-0002 08-0003 09-0002 09-0003 10-0003 12-0002 13-0002 15-0002"
    " 17-0002 18-0003 24-0002 24-0003 26-0003"
)
ALONE = {"18-0004", "21-0001", "21-0002", "25-0003"}


def test_legs_that_fusionpbxs_own_importer_wrote(make_database: DatabaseMaker) -> None:
    """All legs of a shape and no foreign ones, and the first of them where it is named."""
    database = make_database(index=True)
    with database.connect() as connection:
        demo.add_imported_calls(connection, "imported-legs-5.5.7.csv")
        domain = "(SELECT domain_uuid FROM v_xml_cdr LIMIT 1)"  # they all have it
        connection.execute(f"UPDATE v_domains SET domain_uuid = {domain} WHERE domain_name = 'alpha.example.com'")
    client = database.client(database.account("alpha.example.com"))
    stored = client.calls(fields="xml_cdr_uuid,conversation_uuid")
    assert len(stored) == 51
    conversations = {call["xml_cdr_uuid"]: call["conversation_uuid"] for call in stored}
    assert conversations == {
        uuid: uuid[:9] + "0001" + uuid[13:] if uuid[6:13] in MADE else uuid for uuid in conversations
    }
    for uuid in conversations:
        whole = {other for other in conversations if other[:8] == uuid[:8] and other[6:13] not in ALONE}
        assert set(legs(client, uuid, fields="xml_cdr_uuid")) == ({uuid} if uuid[6:13] in ALONE else whole)


@pytest.mark.parametrize("release", demo.RELEASES)
def test_it_works_in_every_release(make_database: DatabaseMaker, release: str) -> None:
    database = make_database(release)
    span = {"start_stamp": "2026-02-03 09:00:00", "end_stamp": "2026-02-03 09:05:00"}
    caller = database.insert_call(**span)
    agent = database.insert_call(**span, cc_side="agent", cc_member_session_uuid=caller)
    bridged = database.insert_call(**span, bridge_uuid=agent)
    database.insert_call(**span)
    client = database.client(database.account("alpha.example.com"))
    assert legs(client, bridged) == [caller, agent, bridged]
    assert client.get(f"/api/calls/{agent}").get_json() in client.calls()
    for format_name in ("ndjson", "csv"):
        lines = client.get(f"/api/calls/{bridged}/legs", format=format_name, fields="xml_cdr_uuid").text.splitlines()
        assert len(lines) == (4 if format_name == "csv" else 3)


@pytest.mark.parametrize("release", demo.RELEASES)
def test_a_call_tells_the_leg_that_began_its_conversation(make_database: DatabaseMaker, release: str) -> None:
    """By each shape in which FusionPBX's importer stores a conversation, as docs/api.md has them in a table."""
    database = make_database(release)
    caller = database.insert_call(cc_side="", bridge_uuid=NOT_STORED)
    queued = database.insert_call(cc_side="member", cc_member_uuid=NOBODY)
    expected = {caller: caller, queued: queued}
    for number in (1, 2):  # agents that were rung
        expected[database.insert_call(cc_side="agent", cc_member_session_uuid=queued, billsec=number)] = queued
    consultation = database.insert_call(bridge_uuid=NOT_STORED)
    expected[consultation] = consultation
    if release[0] != "4":
        ringing = [database.insert_call(originating_leg_uuid=caller, hangup_cause=c) for c in ("LOSE_RACE", "NORMAL")]
        second = database.insert_call(originating_leg_uuid=ringing[1])
        expected |= {**dict.fromkeys(ringing, caller), second: ringing[1]}
    client = database.client(database.account("alpha.example.com"))
    fields = {"fields": "xml_cdr_uuid,conversation_uuid"}
    for more in ({}, {"limit": "100"}, {"order": "desc"}):
        found = client.calls(**fields, **more)
        assert {call["xml_cdr_uuid"]: call["conversation_uuid"] for call in found} == expected
    ranged = client.call_range("2026-02-03", "2026-02-03", **fields)  # a short answer
    assert {call["xml_cdr_uuid"]: call["conversation_uuid"] for call in ranged} == expected
    mine = {"domain_name": "alpha.example.com", "format": "csv", **fields}
    for safe in ("true", "false"):
        rows = list(csv.reader(io.StringIO(client.get("/api/calls", **mine, csv_safe=safe).text)))
        assert {row[0]: row[1] for row in rows[1:]} == expected
    assert client.get(f"/api/calls/{queued}", **fields).get_json()["conversation_uuid"] == queued
