"""Values as old releases, other encodings and odd settings store them: each call is delivered, and counts once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

import demo
from tests.commands import check, flask
from tests.conftest import PASSWORD, Client, Database, DatabaseMaker, problem

ALPHA = "alpha.example.com"
DAY = {"from": "2026-01-15", "to": "2026-01-15"}
EVER = {"from": "2026-01-01", "to": "2026-12-31"}
NOON = 1768478400  # 2026-01-15T12:00:00Z


def read(client: Client, path: str = "/api/call_range", **parameters: Any) -> list[dict[str, Any]]:
    defaults = {"domain_name": ALPHA} | (DAY if path == "/api/call_range" else {})
    response = client.get(path, **defaults | parameters)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = json.loads(response.data)
    return found


# FusionPBX 4.x ------------------------------------------------------------------

TEXTS = ["", " ", "0000-00-00 00:00:00", "N/A", "(null)", "2026-01-15%2012:00:00", str(NOON), "2026-02-30 10:00:00"]
TEXTS += ["infinity", "2026-13-01", "yesterday", "15.01.2026 12:00", "2026-01-15 25:00:00", "2026-01-15 12:00:00 Mars"]


@pytest.mark.parametrize("release", ["4.2.2", "4.4.1"])
def test_the_epochs_are_the_times_of_4_x_whatever_the_texts_say(make_database: DatabaseMaker, release: str) -> None:
    database = make_database(release)
    epochs = {"start_epoch": NOON - 70, "answer_epoch": NOON - 61, "end_epoch": NOON}
    with_epoch = [database.insert_call(end_stamp=text, start_stamp=None, **epochs) for text in [*TEXTS, None]]
    without = [database.insert_call(end_stamp=text, start_stamp=None, end_epoch=0) for text in [*TEXTS, None]]
    readable = [
        database.insert_call(end_stamp=text, start_stamp=None, end_epoch=None)
        for text in ("2026-01-15 12:00:00", "2026-01-15T12:00:00.5", "2026-01-15 12:00:00Z", "2026-01-15")
    ]
    client = database.client(database.account(ALPHA), database.app(CDR_API_TIMEZONE="Asia/Kolkata"))
    found = read(client)
    assert {call["xml_cdr_uuid"] for call in found} == {*with_epoch, *readable}
    call = next(call for call in found if call["xml_cdr_uuid"] == with_epoch[0])
    assert (call["start_stamp"], call["answer_stamp"], call["end_stamp"]) == (
        "2026-01-15T17:28:50+05:30",
        "2026-01-15T17:28:59+05:30",
        "2026-01-15T17:30:00+05:30",
    )
    every = read(client, "/api/calls")
    assert [call["xml_cdr_uuid"] for call in every if call["end_stamp"] is None] == sorted(without)
    assert len(every) == len(with_epoch) + len(without) + len(readable)
    feed = client.get("/api/call_feed", **{"from": "2026-01-01"}).get_json()
    assert {call["xml_cdr_uuid"] for call in feed} == {call["xml_cdr_uuid"] for call in every}
    (total,) = client.get("/api/call_totals", **DAY).get_json()
    assert total["calls"] == len(with_epoch) + len(readable)
    pages = client.get("/api/calls", domain_name=ALPHA, limit="5", fields="xml_cdr_uuid")
    assert len(pages.get_json()) == 5
    assert "Link" in pages.headers


def test_the_doubled_hour_of_4_x_is_two(make_database: DatabaseMaker) -> None:
    """25 October 2026, when Berlin's clocks go back: the same text twice, and two epochs."""
    database = make_database("4.2.2")
    first, second = 1792888200, 1792891800  # 00:30Z and 01:30Z, both 02:30 in Berlin
    for epoch in (second, first):
        database.insert_call(end_stamp="2026-10-25 02:30:00", end_epoch=epoch, start_epoch=epoch - 60)
    client = database.client(database.account(ALPHA), database.app(CDR_API_TIMEZONE="Europe/Berlin"))
    found = read(client, **{"from": "2026-10-25", "to": "2026-10-25"})
    assert [call["end_stamp"] for call in found] == ["2026-10-25T02:30:00+02:00", "2026-10-25T02:30:00+01:00"]
    hours = client.get("/api/call_totals", group_by="hour", **EVER).get_json()
    assert [row["calls"] for row in hours] == [1, 1]


def test_check_compares_stamps_with_epochs(make_database: DatabaseMaker) -> None:
    database = make_database(calls=300, index=True)
    assert check(database.app())[1]["stamps"] == (
        "✓ stamps             of 300 calls all end_stamps are the instants of their end_epochs"
    )
    database.execute(
        "UPDATE v_xml_cdr SET end_stamp = end_stamp + interval '5 hours' WHERE right(xml_cdr_uuid::text, 1) = '0'"
    )
    ((moved,),) = database.execute("SELECT count(*) FROM v_xml_cdr WHERE right(xml_cdr_uuid::text, 1) = '0'")
    line = check(database.app())[1]["stamps"]
    assert line.startswith(f"! stamps             end_stamp is another instant than end_epoch in {moved} of 300 calls")
    assert "most by +18000 s" in line
    old = make_database("4.2.2")
    old.insert_call(end_stamp="2026-01-15 13:00:00", end_epoch=NOON)
    line = check(old.app(CDR_API_TIMEZONE="UTC"))[1]["stamps"]
    assert line.startswith(
        "! stamps             end_stamp is in another zone than UTC in 1 of 1 calls, most by +3600 s"
    )


# Encodings -----------------------------------------------------------------------

ENCODINGS = {"SQL_ASCII": b"Andr\xe9", "LATIN1": b"Andr\xe9", "WIN1252": b"Andr\x81\xe9", "EUC_JP": b"\xa5\xa2"}
SHOWN = {"SQL_ASCII": "Andr\ufffd", "LATIN1": "André", "WIN1252": "Andr\ufffdé", "EUC_JP": "ア"}


@pytest.fixture(params=ENCODINGS)
def encoded(server: demo.PostgresServer, request: pytest.FixtureRequest) -> Iterator[Database]:
    """A database in another encoding, with a call whose caller's name is stored in its own bytes."""
    encoding = request.param
    name = f"test_stored_{encoding.lower()}"
    demo.create_database(server, name, "5.1.0", encoding=encoding)
    database = Database(server, name, "5.1.0")
    with database.connect() as connection:
        connection.execute(demo.INDEX)
    yield database
    database.close()
    with demo.connect(server) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.direct("makes databases of other encodings")
def test_a_byte_that_is_not_text_ends_no_answer(encoded: Database) -> None:
    encoding = encoded.name.removeprefix("test_stored_").upper()
    for number in range(5):
        encoded.insert_call(end_stamp=f"2026-01-15 12:00:0{number}+00", caller_id_name="plain", accountcode="a")
    name = ENCODINGS[encoding]
    with encoded.connect() as connection:
        connection.execute(f"SET client_encoding = '{encoding}'")
        update = b"UPDATE v_xml_cdr SET caller_id_name = '" + name + b"' WHERE end_stamp = '2026-01-15 12:00:02+00'"
        connection.execute(update)
    client = encoded.client(encoded.account(ALPHA))
    names = ["plain", "plain", SHOWN[encoding], "plain", "plain"]
    assert [call["caller_id_name"] for call in read(client)] == names  # a short answer
    assert [call["caller_id_name"] for call in read(client, "/api/calls")] == names
    assert [call["caller_id_name"] for call in read(client, by="start", **{"from": "1970-01-01"})] == []
    feed = client.get("/api/call_feed", **{"from": "2026-01-01"})
    assert [call["caller_id_name"] for call in feed.get_json()] == names
    assert client.get("/api/call_feed", cursor=feed.headers["X-Next-Cursor"]).get_json() == []
    for kind in ("ndjson", "csv"):
        text = client.get("/api/calls", domain_name=ALPHA, format=kind, fields="caller_id_name").data.decode()
        assert SHOWN[encoding] in text
    page = client.get("/api/calls", domain_name=ALPHA, limit="3")
    assert len(page.get_json()) == 3
    (total,) = client.get("/api/call_totals", **EVER).get_json()
    assert total["calls"] == 5


@pytest.mark.direct("makes databases of other encodings")
def test_what_the_database_cannot_hold_is_found_nowhere_and_stored_nowhere(encoded: Database) -> None:
    encoded.insert_call(end_stamp="2026-01-15 12:00:00+00", accountcode="a")
    client = encoded.client(encoded.account(ALPHA))
    everything = encoded.client(encoded.account(all_domains=True), client.app)
    chinese = "中文 😀"
    assert read(client, accountcode=chinese) == []
    assert read(client, "/api/calls", caller_id_name=chinese, limit="1") == []
    assert client.get("/api/call_totals", direction=chinese, **EVER).get_json()[0]["calls"] == 0
    assert client.get("/api/call_feed", hangup_cause=chinese, **{"from": "2026-01-01"}).get_json() == []
    assert client.get("/api/calls", domain_name=chinese).status_code == 403
    assert everything.get("/api/calls", domain_name=chinese).status_code == 404
    body = {"name": chinese, "email": "a@example.com", "password": PASSWORD, "password_confirmation": PASSWORD}
    registered = client.post("/api/register", json=body)
    login = client.post("/api/login", json={"email": f"{chinese}@example.com", "password": PASSWORD})
    assert login.status_code == 401
    if encoded.name.endswith("sql_ascii"):  # which holds anything
        assert registered.get_json()["user"]["name"] == chinese
        return
    assert registered.status_code == 422
    assert list(problem(registered)["data"]) == ["name"]


ODD = "0dd00000-0000-4000-8000-000000000001"  # of a domain whose name is stored in bytes of its own


def add_odd_domain(database: Database, encoding: str, name: bytes) -> list[str]:
    """A domain whose name is some bytes, with a call by its uuid, one by its name alone, and one of alpha."""
    times = {"start_stamp": "2026-01-15 11:59:00+00", "end_stamp": "2026-01-15 12:00:00+00", "billsec": 7}
    uuids = [database.insert_call(domain_uuid=ODD, domain_name="203.0.113.5", **times)]
    uuids += [database.insert_call(domain_uuid=None, domain_name=name, **times) for name in (None, ALPHA)]
    with database.connect() as connection:
        connection.execute(f"SET client_encoding = '{encoding}'")
        stored = b"'" + name + b"'"
        insert = b"INSERT INTO v_domains (domain_uuid, domain_name) VALUES ('" + ODD.encode() + b"', " + stored + b")"
        connection.execute(insert)
        connection.execute(b"UPDATE v_xml_cdr SET domain_name = " + stored + b" WHERE domain_name IS NULL")
    return uuids


def shown_names(client: Client, path: str, column: str = "domain_name", **parameters: str) -> set[str | None]:
    response = client.get(path, **parameters)
    assert response.status_code == 200, response.text
    return {row[column] for row in json.loads(response.data)}


@pytest.mark.direct("makes databases of other encodings")
def test_a_domain_whose_name_is_not_text_is_shown_and_has_its_calls_by_uuid(encoded: Database) -> None:
    encoding = encoded.name.removeprefix("test_stored_").upper()
    odd = f"{SHOWN[encoding]}'\\.example.com"
    calls = add_odd_domain(encoded, encoding, ENCODINGS[encoding] + rb"''\.example.com")
    app = encoded.app()
    everything = encoded.client(encoded.account(all_domains=True), app)
    token = encoded.account(email="odd@example.com")
    assert flask(app, "user", "grant", "odd@example.com", ODD).exit_code == 0
    assert odd in flask(app, "user", "list").output
    theirs, alpha = Client(app, token), Client(app, encoded.account(ALPHA))
    assert shown_names(theirs, "/api/domains") == {odd}
    assert odd in shown_names(everything, "/api/domains")
    feed = {"from": "2026-01-01"}
    for client in (everything, theirs):
        found = read(client, domain_name=[], domain_uuid=ODD)
        assert [(call["xml_cdr_uuid"], call["domain_name"]) for call in found] == [(uuid, odd) for uuid in calls[:2]]
        for path in ("/api/calls", "/api/call_feed"):
            values = feed if path.endswith("feed") else {}
            assert shown_names(client, path, domain_uuid=ODD, **values) == {odd}
        page = client.get("/api/calls", domain_uuid=ODD, limit="1", fields="domain_name")
        assert page.get_json() == [{"domain_name": odd}]
        assert "Link" in page.headers
        text = client.get("/api/calls", domain_uuid=ODD, format="csv", fields="domain_name").data.decode()
        assert text == f"domain_name\n{odd}\n{odd}\n"
        (total,) = client.get("/api/call_totals", group_by="domain_name", domain_uuid=ODD, **EVER).get_json()
        assert (total["domain_name"], total["calls"]) == (odd, 2)
        for kind, column in (("concurrent", "domain_name"), ("active", "domain")):
            day = {"date": "2026-01-15", "resolution": "60"}
            assert shown_names(client, f"/api/{kind}_calls_by_domain", column, domain_uuid=ODD, **day) == {odd}
            assert odd in shown_names(client, f"/api/{kind}_calls_by_domain", column, **day)
    for client, mine in ((everything, calls), (theirs, calls[:2]), (alpha, calls[2:])):
        first = client.get("/api/call_feed", **feed)
        assert {call["xml_cdr_uuid"] for call in first.get_json()} == set(mine)
        assert client.get("/api/call_feed", cursor=first.headers["X-Next-Cursor"]).get_json() == []
        assert client.get("/api/call_totals", **EVER).get_json()[0]["calls"] == len(mine)
        groups = client.get("/api/call_totals", group_by="domain_name", **EVER).get_json()
        assert sum(row["calls"] for row in groups) == len(mine)
        found = client.post("/api/call_lookup", json={"xml_cdr_uuid": calls}).get_json()
        assert len(found["calls"]) == len(mine)
    assert len(read(alpha)) == 1
    if "\ufffd" not in odd:
        assert len(read(theirs, domain_name=odd)) == 2
    status, lines = check(app)
    assert status == 0, lines
    assert lines["lost calls"].startswith("✓ ")
    assert flask(app, "user", "revoke", "odd@example.com", ODD).exit_code == 0
    assert shown_names(theirs, "/api/domains") == set()


@pytest.mark.direct("makes databases of other encodings")
def test_a_name_given_to_an_odd_domain_is_seen_by_a_cursor(encoded: Database) -> None:
    """As of any other name: an older call without a domain_uuid bears it."""
    encoding = encoded.name.removeprefix("test_stored_").upper()
    calls = add_odd_domain(encoded, encoding, ENCODINGS[encoding])
    encoded.execute("UPDATE v_domains SET domain_name = 'for now' WHERE domain_uuid = %s", [ODD])
    client = encoded.client(encoded.account(ODD))
    first = client.get("/api/call_feed", **{"from": "2026-01-01"})
    assert {call["xml_cdr_uuid"] for call in first.get_json()} == {calls[0]}
    with encoded.connect() as connection:
        connection.execute(f"SET client_encoding = '{encoding}'")
        connection.execute(
            b"UPDATE v_domains SET domain_name = '" + ENCODINGS[encoding] + b"' WHERE domain_name = 'for now'"
        )
    assert client.get("/api/call_feed", cursor=first.headers["X-Next-Cursor"]).status_code == 410


@pytest.mark.direct("makes databases of other encodings")
def test_an_archive_in_another_encoding_shows_what_it_can_hold_of_a_name(
    encoded: Database, make_database: DatabaseMaker
) -> None:
    """Of either the domains, beside the accounts, and of the other the calls."""
    encoding = encoded.name.removeprefix("test_stored_").upper()
    plain = make_database(index=True)
    name = "中文.example.com"
    plain.execute("INSERT INTO v_domains (domain_uuid, domain_name) VALUES (%s, %s)", [ODD, name])
    mine = encoded.insert_call(domain_uuid=ODD, end_stamp="2026-01-15 12:00:00+00")
    for token in (plain.account(name), plain.account(all_domains=True)):
        client = Client(plain.app(CDR_API_CALLS_DSN=encoded.dsn), token)
        (call,) = read(client, domain_name=name)
        assert call["xml_cdr_uuid"] == mine
        assert call["domain_name"] == (name if encoding in ("SQL_ASCII", "EUC_JP") else "??.example.com")
        assert client.get("/api/call_totals", **EVER).get_json()[0]["calls"] == 1
        assert len(client.get("/api/call_feed", **{"from": "2026-01-01"}).get_json()) == 1
        assert name in shown_names(client, "/api/domains")
        assert "importer" in check(client.app)[1]
    encoded.execute("DELETE FROM v_xml_cdr")
    add_odd_domain(encoded, encoding, ENCODINGS[encoding])
    theirs = plain.insert_call(domain_uuid=ODD, end_stamp="2026-01-15 12:00:00+00")
    for token in (encoded.account(ODD), encoded.account(all_domains=True)):
        client = Client(encoded.app(CDR_API_CALLS_DSN=plain.dsn), token)
        (call,) = read(client, domain_name=[], domain_uuid=ODD)
        assert (call["xml_cdr_uuid"], call["domain_name"]) == (theirs, SHOWN[encoding])
        assert client.get("/api/call_totals", **EVER).get_json()[0]["calls"] == 1
        assert "importer" in check(client.app)[1]


@pytest.mark.direct("makes databases of other encodings")
def test_check_tells_the_encoding(encoded: Database) -> None:
    line = check(encoded.app())[1]["text"]
    if not encoded.name.endswith("sql_ascii"):
        assert line.startswith("✓ text               the database's encoding is")
        return
    assert line.startswith("✓ text               the database's encoding is SQL_ASCII")
    assert "0 of a sample of 0 calls" in line
    encoded.insert_call(caller_id_name="plain")
    encoded.insert_call(caller_id_name="André")
    with encoded.connect() as connection:
        connection.execute("SET client_encoding = 'SQL_ASCII'")
        connection.execute(b"UPDATE v_xml_cdr SET caller_id_name = 'Andr\xe9' WHERE caller_id_name = 'plain'")
    line = check(encoded.app())[1]["text"]
    assert line.startswith("! text ")
    assert "; 1 of a sample of 2 calls hold bytes that are not UTF-8, which are shown as U+FFFD" in line


# Of RFC 3629, and what lies just beside it.
SEQUENCES = [
    b"\xc2\x80",
    b"\xdf\xbf",
    b"\xe0\xa0\x80",
    b"\xed\x9f\xbf",
    b"\xee\x80\x80",
    b"\xef\xbf\xbf",
    b"\xf0\x90\x80\x80",
]
SEQUENCES += [b"\xf4\x8f\xbf\xbf", b"\xf3\xbf\xbf\xbf", b"\xe1\x80\xbf", b"\x7f", b"\x01", b""]
SEQUENCES += [
    b"\x80",
    b"\xbf",
    b"\xc0\x80",
    b"\xc1\xbf",
    b"\xe0\x9f\xbf",
    b"\xed\xa0\x80",
    b"\xf0\x8f\xbf\xbf",
    b"\xf4\x90\x80\x80",
]
SEQUENCES += [b"\xf5\x80\x80\x80", b"\xff", b"\xc2", b"\xe2\x82", b"\xf0\x9f\x93", b"\xc2a", b"\xe2\x82\xac\xac"]


@pytest.mark.direct("makes databases of other encodings")
@pytest.mark.parametrize("encoded", ["SQL_ASCII"], indirect=True)
def test_check_counts_what_is_not_utf_8_in_a_sample(encoded: Database) -> None:
    """What PostgreSQL counts is what Python cannot decode; many calls cost no more than the sample."""
    fill = "INSERT INTO v_xml_cdr (xml_cdr_uuid, caller_id_name) SELECT gen_random_uuid(), 'Andr\xe9'"
    with encoded.connect() as connection:
        connection.execute("SET client_encoding = 'SQL_ASCII'")
        for text in SEQUENCES:
            insert = b"INSERT INTO v_xml_cdr (xml_cdr_uuid, caller_id_name) VALUES (gen_random_uuid(), E'a%sz')"
            connection.execute(insert % b"".join(b"\\x%02x" % byte for byte in text))
    broken = sum("\ufffd" in text.decode("utf-8", "replace") for text in SEQUENCES)
    assert f"{broken} of a sample of {len(SEQUENCES)} calls" in check(encoded.app())[1]["text"]
    with encoded.connect() as connection:
        connection.execute("SET client_encoding = 'SQL_ASCII'")
        connection.execute(f"{fill} FROM generate_series(1, 30000)".encode("latin-1"))
    for statement in ("SELECT", "ANALYZE v_xml_cdr"):  # before and after PostgreSQL knows how many there are
        encoded.execute(statement)
        looked_at = int(re.findall(r"of a sample of (\d+) calls", check(encoded.app())[1]["text"])[0])
        assert 10_000 < looked_at <= 20_000
    encoded.execute("ALTER TABLE v_xml_cdr RENAME TO stored")
    encoded.execute("CREATE VIEW v_xml_cdr AS SELECT * FROM stored")
    encoded.execute("GRANT SELECT ON v_xml_cdr TO cdr_api")
    assert check(encoded.app())[1]["text"].endswith("SQL_ASCII, which checks nothing")


# Settings of the database -----------------------------------------------------------

# Each changes how values are written, read or compared; those that we set are set back by nobody.
SETTINGS = [
    "DateStyle = 'SQL, DMY'",
    "DateStyle = 'German'",
    "DateStyle = 'Postgres, MDY'",
    "IntervalStyle = 'sql_standard'",
    "TimeZone = 'America/Caracas'",
    "extra_float_digits = -15",
    "bytea_output = 'escape'",
    "xmloption = 'document'",
    "standard_conforming_strings = off",
    "backslash_quote = off",
    "transform_null_equals = on",
    "quote_all_identifiers = on",
    "array_nulls = off",
    "lc_numeric = 'C'",
    "default_transaction_isolation = 'serializable'",
    "default_transaction_deferrable = on",
    "row_security = on",
    "synchronous_commit = off",
    "jit = on",
    "plan_cache_mode = 'force_custom_plan'",
    "enable_indexscan = off",
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_setting_of_a_database_changes_an_answer(make_database: DatabaseMaker, setting: str) -> None:
    database = make_database(calls=60, index=True)
    database.insert_call(caller_id_name="a\\b'c\n\x7f", end_stamp="2026-11-02 10:00:00.25+00", pdd_ms="1.5")
    token = database.account(ALPHA, days=0)

    def answers() -> list[bytes]:
        app = database.app(CDR_API_TIMEZONE="Asia/Kolkata")
        client = Client(app, token)
        feed = client.get("/api/call_feed", **{"from": "2026-01-01"})
        following = client.get("/api/call_feed", cursor=feed.headers["X-Next-Cursor"])
        found = [
            client.get("/api/calls", domain_name=ALPHA),
            client.get("/api/calls", domain_name=ALPHA, caller_id_name="a\\b'c\n\x7f"),
            client.get("/api/call_range", domain_name=ALPHA, format="csv", **EVER),
            client.get("/api/call_range", domain_name=ALPHA, **{"from": "2026-11-02", "to": "2026-11-02"}),
            client.get("/api/call_totals", group_by="day,hour,domain_uuid,direction", **EVER),
            client.get("/api/concurrent_calls_by_domain", date="2026-11-02", resolution="60"),
            client.get("/api/active_calls_by_domain", date="2026-11-02", resolution="60"),
            client.get("/api/domains"),
            feed,
            following,
        ]
        assert [response.status_code for response in found] == [200] * len(found)
        return [response.data for response in found]

    before = answers()
    database.execute(f'ALTER DATABASE "{database.name}" SET {setting}')
    database.close()
    assert answers() == before
    body = {"name": "N", "email": "n@example.com", "password": PASSWORD, "password_confirmation": PASSWORD}
    client = Client(database.app(CDR_API_REGISTER_DOMAINS="*"))
    registered = client.post("/api/register", json=body)
    assert registered.status_code == 201, registered.text
    stamp = registered.get_json()["user"]["created_at"]
    assert stamp.endswith("Z")
    assert len(stamp) == len("2026-11-23T10:46:04.077363Z")
    login = client.post("/api/login", json={"email": "n@example.com", "password": PASSWORD})
    assert login.get_json()["user"] == registered.get_json()["user"]
    status, lines = check(client.app)
    assert status == 0, lines


@pytest.mark.parametrize("epoch", ["0.000001", "1770112800.5", "253402300799.7"])
def test_a_fraction_of_an_epoch_leaves_no_call_out(make_database: DatabaseMaker, epoch: str) -> None:
    """Lists look at the epochs of ends by whole seconds first."""
    database = make_database("4.4.1")
    uuid = database.insert_call(start_epoch=1_770_112_800, end_epoch=epoch)
    client = database.client(database.account(ALPHA), database.app(CDR_API_TIMEZONE="UTC"))
    started = {"domain_name": ALPHA, "by": "start", "from": "2026-02-03", "to": "2026-02-03"}
    assert [call["xml_cdr_uuid"] for call in client.get("/api/call_range", **started).get_json()] == [uuid]
    assert client.get("/api/call_totals", **started).get_json()[0]["calls"] == 1
    if epoch == "1770112800.5":
        ended = {"domain_name": ALPHA, "from": "2026-02-03T10:00:00.5", "to": "2026-02-03T10:00:00.5"}
        assert [call["xml_cdr_uuid"] for call in client.get("/api/call_range", **ended).get_json()] == [uuid]


def test_an_epoch_that_is_rounded_up_to_a_second_is_not_between_two_pages(make_database: DatabaseMaker) -> None:
    database = make_database("4.4.1")
    uuids = [database.insert_call(end_epoch=epoch) for epoch in ("1770112800", "1770112799.9999996")]
    client = database.client(database.account(ALPHA), database.app(CDR_API_TIMEZONE="UTC"))
    first = client.get("/api/calls", domain_name=ALPHA, limit="1")
    second = client.send("GET", first.headers["Link"].partition("<")[2].partition(">")[0])
    assert [call["xml_cdr_uuid"] for page in (first, second) for call in page.get_json()] == uuids


# Rows stored twice -------------------------------------------------------------------


@pytest.mark.parametrize("release", ["4.4.1", "5.5.7"])
def test_a_call_that_is_stored_twice_counts_once_everywhere(make_database: DatabaseMaker, release: str) -> None:
    database = make_database(release)
    key = "uuid" if release[0] == "4" else "xml_cdr_uuid"
    for number in range(4):
        epoch = NOON + number
        stamp = f"2026-01-15 12:00:0{number}+00"
        database.insert_call(end_stamp=stamp, end_epoch=epoch, start_epoch=epoch - 60, start_stamp=stamp, billsec=10)
    database.execute("ALTER TABLE v_xml_cdr DROP CONSTRAINT v_xml_cdr_pkey")
    database.execute("INSERT INTO v_xml_cdr SELECT * FROM v_xml_cdr")
    database.execute("INSERT INTO v_xml_cdr SELECT * FROM v_xml_cdr")
    client = database.client(database.account(ALPHA))
    assert len(read(client)) == len(read(client, "/api/calls")) == 4
    (total,) = client.get("/api/call_totals", **DAY).get_json()
    assert (total["calls"], total["billsec"]) == (4, 40)
    assert len(client.get("/api/call_feed", **{"from": "2026-01-01"}).get_json()) == 4
    for path, start in (("/api/calls", {"domain_name": ALPHA}), ("/api/call_feed", {"from": "2026-01-01"})):
        url, found = "", []
        response = client.get(path, limit="3", fields="xml_cdr_uuid", **start)
        for _ in range(5):
            found += [call["xml_cdr_uuid"] for call in response.get_json()]
            url = response.headers.get("Link", "").partition("<")[2].partition(">")[0]
            if not url:
                break
            response = client.send("GET", url)
        assert len(found) == len(set(found)) == 4
    status, lines = check(client.app)
    assert status == 1
    assert lines["key"].startswith(
        "✗ key                v_xml_cdr has no primary key, and 4 calls are stored more than once"
    )
    assert f"ADD PRIMARY KEY ({key})" in lines["key"]


def test_calls_that_are_doubled_under_the_service_count_once(make_database: DatabaseMaker) -> None:
    """As while a backup is restored, which makes the key last: connections know the table of before."""
    database = make_database(calls=60, index=True)
    app, token = database.app(), database.account(ALPHA)
    client = Client(app, token)
    requests = [{}, {"limit": "5"}, {"limit": "5", "order": "desc"}, {"format": "csv"}]
    before = [client.get("/api/calls", domain_name=ALPHA, **request).data for request in requests]
    database.execute("ALTER TABLE v_xml_cdr DROP CONSTRAINT v_xml_cdr_pkey")
    database.execute("INSERT INTO v_xml_cdr SELECT * FROM v_xml_cdr")
    assert [client.get("/api/calls", domain_name=ALPHA, **request).data for request in requests] == before


def test_a_call_that_a_child_without_a_key_stores_again_counts_once(make_database: DatabaseMaker) -> None:
    database = make_database(index=True)
    database.insert_call(end_stamp="2026-01-15 12:00:00+00")
    database.execute("CREATE TABLE archive () INHERITS (v_xml_cdr); INSERT INTO archive SELECT * FROM v_xml_cdr")
    client = database.client(database.account(ALPHA))
    assert len(read(client)) == len(read(client, "/api/calls")) == 1
    assert client.get("/api/call_totals", **DAY).get_json()[0]["calls"] == 1
    assert len(client.get("/api/call_feed", **{"from": "2026-01-01"}).get_json()) == 1
    assert check(client.app)[1]["key"].startswith("✗ key                archive has no primary key, and 1 calls are")


PARTS = {
    "a child": """
        CREATE TABLE archive () INHERITS (v_xml_cdr);
        ALTER TABLE archive ADD PRIMARY KEY (xml_cdr_uuid)""",
    "a partition": """
        ALTER TABLE v_xml_cdr RENAME TO plain;
        CREATE TABLE v_xml_cdr (LIKE plain) PARTITION BY RANGE (end_stamp);
        CREATE UNIQUE INDEX ON v_xml_cdr (xml_cdr_uuid, end_stamp);
        CREATE TABLE rest PARTITION OF v_xml_cdr DEFAULT;
        INSERT INTO v_xml_cdr SELECT * FROM plain;
        CREATE VIEW archive AS SELECT * FROM v_xml_cdr""",
    "a view": """
        ALTER TABLE v_xml_cdr RENAME TO plain;
        CREATE TABLE archive (LIKE plain INCLUDING ALL);
        CREATE VIEW v_xml_cdr AS SELECT * FROM plain UNION ALL SELECT * FROM archive""",
}


@pytest.mark.parametrize("way", PARTS)
def test_check_tells_of_a_call_that_two_parts_hold(make_database: DatabaseMaker, way: str) -> None:
    database = make_database(index=True)
    uuid = database.insert_call()
    database.execute(PARTS[way])
    database.execute("GRANT SELECT ON v_xml_cdr TO cdr_api")
    app = database.app()
    assert check(app)[1]["key"] == "✓ key                no call is stored twice"
    database.execute(
        "INSERT INTO archive (xml_cdr_uuid, domain_name, end_stamp) VALUES (%s, %s, '2026-03-03')", [uuid, ALPHA]
    )
    assert check(app)[1]["key"].startswith("✗ key                1 calls are stored more than once, in partitions,")
    client = database.client(database.account(ALPHA), app)
    response = client.get(f"/api/calls/{uuid}")  # one object cannot tell of two
    assert response.status_code == 409
    assert problem(response)["message"].startswith("This call is stored 2 times")
    assert len(client.post("/api/call_lookup", json={"xml_cdr_uuid": [uuid]}).get_json()["calls"]) == 2


# Numbers that cannot be ---------------------------------------------------------------


def test_sums_of_absurd_numbers_are_sums(make_database: DatabaseMaker) -> None:
    database = make_database(index=True)
    numbers = [-1_768_478_339, 10**30, 10**30, 61]
    for number in numbers:
        database.insert_call(billsec=number, billmsec=number * 1000, end_stamp="2026-01-15 12:00:00+00")
    client = database.client(database.account(ALPHA))
    (total,) = client.get("/api/call_totals", **DAY).get_json()
    assert (total["calls"], total["answered"]) == (4, 3)
    assert (total["billsec"], total["billmsec"]) == (sum(numbers), sum(numbers) * 1000)
    assert sorted(call["billsec"] for call in read(client)) == sorted(numbers)
    assert len(read(client, min_billsec="0")) == 3
    line = check(client.app)[1]["durations"]
    assert line.startswith("! durations          3 have a billsec below 0 or over 31 days")


# The importer ---------------------------------------------------------------------------


def test_check_warns_when_the_newest_call_is_unusually_old(make_database: DatabaseMaker) -> None:
    database = make_database(index=True)
    assert check(database.app())[1]["importer"].startswith("✓ importer           too few calls")
    fill = (
        "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_name, end_stamp)"
        " SELECT gen_random_uuid(), %s, now() - n * interval '10 minutes' FROM generate_series(%s, 9000) AS n"
    )
    database.execute(fill, [ALPHA, 1])
    assert check(database.app())[1]["importer"].startswith("✓ importer           the newest call ended 0.2 h ago")
    database.execute("DELETE FROM v_xml_cdr WHERE end_stamp > now() - interval '13 hours'")
    assert check(database.app())[1]["importer"].startswith("! importer           the newest call ended 13.")
