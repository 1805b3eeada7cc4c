"""Whatever a client sends gets an answer that docs/api.md promises, and nobody else's calls."""

from __future__ import annotations

import contextlib
import functools
import gc
import http.client
import io
import itertools
import json
import re
import socket
import zoneinfo
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, AnyStr
from urllib.parse import quote, quote_plus, urlencode, urlsplit
from uuid import UUID

import hypothesis
import pytest
from flask import Flask
from hypothesis import strategies as st
from psycopg import conninfo, sql
from werkzeug.test import TestResponse, create_environ, run_wsgi_app
from werkzeug.wrappers import Request

import cdr_api
import demo
from cdr.accounts import check_password, parse_email, parse_name
from cdr.cursors import read_cursor, write_cursor
from cdr.errors import ApiError
from cdr.feed import FEED_VERSION, read_feed_cursor
from cdr.parsing import (
    check_text,
    integer_between,
    one_of,
    parse_choices,
    parse_flag,
    parse_names,
    parse_pairs,
    parse_prefix,
    parse_text,
    parse_uuid,
    parse_uuids,
    parse_zone,
    read_json_object,
    read_pairs,
)
from cdr.ranges import EARLIEST, LATEST, Moment, find_range, find_zone, parse_moment, parse_month
from cdr.selection import FIELDS, MORE_FIELDS, parse_fields
from cdr.settings import parse_dsn, parse_milliseconds, parse_origins, parse_syslog
from cdr.statements import load_statements
from cdr.stream import FORMATS
from tests.conftest import PASSWORD, Client, Database, DatabaseMaker, Gunicorn, problem, serve, wait_for
from tests.documents import ERRORS

# Of a part of a form that is broken behind it, a file is closed late, by the garbage collector.
unclosed = pytest.mark.filterwarnings("ignore:Unclosed file <tempfile:ResourceWarning")
pytestmark = [unclosed, pytest.mark.direct("is about what clients send, and takes long")]

PROMISED = {int(status) for row in re.findall(r"^\| ([\d, ]+) \|", ERRORS, re.MULTILINE) for status in row.split(",")}


def tries(number: int) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=number,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
    )


def edited(samples: Sequence[AnyStr], pieces: st.SearchStrategy[AnyStr]) -> st.SearchStrategy[AnyStr]:
    """A sample with up to three pieces put in somewhere, or put in the place of something."""

    def edit(sample: AnyStr, edits: list[tuple[int, int, AnyStr]]) -> AnyStr:
        for place, length, piece in edits:
            at = place % (len(sample) + 1)
            sample = sample[:at] + piece + sample[at + length :]
        return sample

    return st.builds(
        edit,
        st.sampled_from(samples),
        st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 5), pieces), max_size=3),
    )


# Parsers ----------------------------------------------------------------------


def attempt(parse: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    """What a parser gives, and 0; or None and the status that it refuses with, which for a ValueError is 422."""
    try:
        return parse(*arguments), 0
    except ApiError as error:
        return None, error.status
    except ValueError:
        return None, 422


UUID_TEXT = "0b9e2f6c-6a53-4c0e-9c5e-0d9c4b3f7a11"
FOREIGN_UUID = "0b9e2f6c-6a53-4c0e-9c5e-0d9c4b3f7a12"
PIECES = st.text(max_size=3) | st.sampled_from(list("0123456789+-:.,/ TZ\x00\x1b\x9b\u202e\u0661é漢📞'\"%\n\t"))


def is_as_long_as_it_is_written(_text: str, moment: Moment) -> bool:
    with contextlib.suppress(OverflowError):  # outside of the years 1 to 9999
        return moment.end(UTC) - moment.first(UTC) == moment.length > timedelta()
    return True


def is_a_list_of(known: Collection[str]) -> Callable[[str, Any], bool]:
    return lambda text, value: ",".join(value) == text and len(set(value)) == len(value) and set(value) <= set(known)


@dataclass(frozen=True)
class Parser:
    parse: Callable[[str], Any]
    samples: Sequence[str]  # which it takes
    promise: Callable[[str, Any], bool]  # about a text that it took, and what it made of it


PARSERS = {
    "parse_moment": Parser(
        parse_moment,
        ["2026-01-31", "2026-01-31t23:59z", "2026-01-31T23:59:59.5 0100", "1769900399.5", "9999-12-31T23-12"],
        is_as_long_as_it_is_written,
    ),
    "parse_month": Parser(
        parse_month,
        ["2026-10", "0001-01", "9999-12"],
        lambda text, value: f"{value.start:%d %H:%M}" == "01 00:00" and value.start.isoformat().startswith(text),
    ),
    "parse_uuid": Parser(
        parse_uuid,
        [UUID_TEXT, UUID_TEXT.upper(), UUID_TEXT.replace("-", ""), f"{{{UUID_TEXT}}}"],
        lambda text, value: str(UUID(value)) == value and re.sub("[{}-]", "", text).lower() == value.replace("-", ""),
    ),
    "parse_fields": Parser(parse_fields, ["xml", ",".join(FIELDS)], is_a_list_of([*FIELDS, *MORE_FIELDS])),
    "parse_groups": Parser(cdr_api.parse_groups, ["day", "domain_name,hour"], is_a_list_of(cdr_api.GROUPS)),
    "parse_prefix": Parser(
        parse_prefix,
        ["49", "+4930", " 49", "+", "0" * 32],
        lambda text, value: bool(re.fullmatch("[+]?[0-9]{0,32}", value)) and value == text.replace(" ", "+") != "",
    ),
    "parse_choices": Parser(
        parse_choices,
        ["", "inbound", "inbound,local"],
        lambda text, value: value == text and ("," not in text or all(text.split(","))),
    ),
    "parse_flag": Parser(parse_flag, ["true", "false"], lambda text, value: text == str(value).lower()),
    "parse_text": Parser(parse_text, ["", "a"], lambda text, value: value == text and "\0" not in value),
    "parse_email": Parser(
        parse_email,
        ["a@b.c", "  Juergen.O'Neill+cdr@mail.example.com "],
        # Printable ASCII: an address stands in lists on terminals and in logs, and nothing may look like it.
        lambda text, value: value == text.strip() and bool(re.fullmatch("[!-?A-~]{1,64}@[!-?A-~]{1,252}", value)),
    ),
    "parse_name": Parser(
        parse_name,
        ["Ann", " Ann Lee 漢 "],
        lambda text, value: value == text.strip() and value.isprintable() and 1 <= len(value) <= 255,
    ),
    "read_choice": Parser(
        one_of("start", "end"), ["start", "end"], lambda text, value: text == value in ("start", "end")
    ),
    "read_integer": Parser(
        integer_between(-5, 10**12),
        ["0", "-5", "+7", "1000000000000"],
        lambda text, value: -5 <= value <= 10**12 and int(text) == value,
    ),
    "read_names": Parser(
        parse_names,
        ["a.example.com", " a , b,", ""],
        lambda text, value: all(name and name == name.strip() and "," not in name for name in value),
    ),
    "read_zone": Parser(
        parse_zone,
        ["UTC", "Europe/Berlin", "America/Argentina/Buenos_Aires"],
        lambda text, value: zoneinfo.ZoneInfo(value).key == text,
    ),
    "find_zone": Parser(find_zone, ["UTC", "Europe/Berlin"], lambda text, value: value.key == text),
    "read_milliseconds": Parser(
        parse_milliseconds, ["500ms", "30s", "5 min", "1h", "7"], lambda text, value: 1 <= value < 2**31
    ),
    "read_syslog": Parser(parse_syslog, ["off", "/dev/log"], lambda text, value: value == text and text[:1] in "o/"),
    "read_origins": Parser(
        parse_origins,
        ["https://a.example.com", "http://localhost:3000, http://[::1]"],
        lambda text, value: all(re.fullmatch(r"https?://[^\s/,\"<>]+", name) and name in text for name in value),
    ),
    "read_dsn": Parser(
        parse_dsn,
        ["host=/tmp dbname=x", "postgresql://u:p@h:5432/d?connect_timeout=5", "dbname='a b'"],
        lambda text, value: value == text and isinstance(conninfo.conninfo_to_dict(value), dict),
    ),
}


@pytest.mark.parametrize("name", PARSERS)
@hypothesis.given(data=st.data())
@tries(80)
def test_a_parser_keeps_its_promise_or_refuses(name: str, data: st.DataObject) -> None:
    parser = PARSERS[name]
    text = data.draw(edited(parser.samples, PIECES) | st.text())
    value, status = attempt(parser.parse, text)
    assert text not in parser.samples if status else parser.promise(text, value), value


LONG = "x" * 5000
NOT_TAKEN = {
    "parse_moment": ["2026-02-30", "0000-01-01", "２０２６-01-01", "2026-01-01T24:00", "2026-01-01T00+16", "now", LONG],
    "parse_uuid": ["", "0x" + "1" * 30, " +" + "1" * 28 + "_1", "１" * 32, "1" * 31, "1" * 33, LONG],
    "parse_fields": ["", "*", ",", "billsec,", "billsec,billsec", "BILLSEC", " billsec", "start_at", LONG],
    "parse_flag": ["", "1", "yes", "TRUE", "true\n"],
    "parse_text": ["\0", "a\0b"],
    "parse_email": [
        "",
        "@",
        "a@b@c",
        "a b@c",
        "a@b\r\nBcc: c",
        "\x1b@b",
        "a\x9b31m@b",
        "a\u202eb@c",
        "a\u200b@b",
        "Jürgen@example.com",
        LONG,
    ],
    "parse_name": ["", " ", "a\x1b", "a\u202e", "\ud800", LONG],
    "read_integer": ["", "١", "1_0", " 1", "1\n", "0x1", "1e3", "1.0", "--1", "-6", "1000000000001", "9" * 5000],
    "read_zone": ["", ".", "..", "Europe", "Europe/", "../UTC", "/etc/localtime", "UTC\0", "é/é", "\udcff", LONG],
    "find_zone": ["", "Europe", "UTC\0", LONG],
    "read_milliseconds": ["", "0", "0ms", "-1", "1 d", "９s", "597h", "1.5s", "1s\n", "9" * 10],
    "read_dsn": ["nonsense", "host", "postgresql://[", "unknown=1", "dbname='"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in NOT_TAKEN.items() for text in texts])
def test_a_parser_refuses(name: str, text: str) -> None:
    assert attempt(PARSERS[name].parse, text)[1] in {422, 503}


ZONES = ["UTC", "Europe/Berlin", "Australia/Lord_Howe", "Pacific/Apia", "Africa/Monrovia", "America/New_York"]
MOMENTS = st.builds(
    lambda stamp, length, offset: stamp.isoformat(timespec="microseconds")[:length] + offset * (length > 10),
    st.datetimes() | st.sampled_from([datetime.min, datetime.max, datetime(2026, 3, 29, 2, 30)]),
    st.sampled_from([10, 13, 16, 19, 26]),
    st.sampled_from(["", "Z", "+15:59", "-15:59", "+05:30", " 01"]),
)


def plain(moment: datetime) -> datetime:
    return moment.replace(tzinfo=None)


@hypothesis.given(MOMENTS, MOMENTS, st.sampled_from(ZONES))
@hypothesis.example("0001-01-01T00:00+15:59", "9999-12-31T23:59-15:59", "UTC")
@hypothesis.example("9999-12-31T23:59:59-15:59", "9999-12-31", "UTC")  # not all of the calls there ever were
@tries(300)
def test_a_range_lies_where_it_is_written_or_is_the_wrong_way_round(first: str, last: str, zone: str) -> None:
    some = timedelta(days=2)  # offsets, a day's length, the years where Python's calendar ends
    begin, finish = parse_moment(first), parse_moment(last)
    found, status = attempt(find_range, begin, finish, zone)
    if status:
        assert status == 422
        assert plain(finish.start) - plain(begin.start) < timedelta(days=1) + some
    else:
        start, end = found
        assert EARLIEST <= start <= end <= LATEST
        assert abs(plain(start) - plain(begin.start)) <= some
        assert abs(plain(end) - plain(finish.start)) <= some


NAMES = sorted(
    {
        name
        for found in vars(cdr_api).values()
        if isinstance(found, dict) and all(map(callable, found.values()))
        for name in found
    }
    | {"name", "email", "password", "password_confirmation", "all", "xml_cdr_uuid", "token", "_method"}
)
ODD_NAMES = ["", "a[b]", "from[]", "domain_name[]", "domain_name[0][x]", "FROM", "from\0", "__proto__", "é", "x" * 3000]
ODD_TEXTS = ["", "\0", "a\0b", "\ud800", "\ufffd", "\u202e", "' OR 1=1 --", "%s", "%(from)s", "{columns}", "x" * 3000]
TEXTS = st.sampled_from(ODD_TEXTS) | st.text(max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**400) | st.just(UUID_TEXT) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | TEXTS, inner, max_size=3),
    max_leaves=6,
)


@hypothesis.given(JSON)
@tries(200)
def test_only_strings_of_valid_unicode_are_texts(value: Any) -> None:
    text, status = attempt(check_text, value)
    if status:
        assert not isinstance(value, bool)
        assert not isinstance(value, str) or not value.isascii()
    else:
        assert text == (str(value).lower() if isinstance(value, bool) else value)
        assert "\ufffd" not in text.encode().decode()


UUIDS = [UUID_TEXT, UUID_TEXT.upper(), "f" * 32, str(UUID(int=2**128 - 1))]


@hypothesis.given(JSON | st.lists(st.sampled_from(UUIDS) | st.just("") | st.just(5), max_size=5))
@tries(200)
def test_a_list_of_uuids_is_of_uuids_each_once(value: Any) -> None:
    uuids, status = attempt(parse_uuids, value)
    if status:
        assert not isinstance(value, list) or not value or not {str(uuid) for uuid in value} <= set(UUIDS)
    else:
        assert uuids == list(dict.fromkeys(str(UUID(uuid)) for uuid in value))


@hypothesis.given(st.text(min_size=8, max_size=40) | st.sampled_from([PASSWORD, "é" * 513]), st.text(max_size=8))
@tries(200)
def test_a_password_that_is_taken_keeps_the_rule(password: str, local: str) -> None:
    _, status = attempt(check_password, password, f"{local}@example.com")
    if status:
        assert password != PASSWORD or (len(local) >= 4 and local.lower() in PASSWORD)
    else:
        assert 12 <= len(password) <= len(password.encode()) <= 1024
        assert len(set(password)) >= 3 or len(password) >= 20
        assert len(local) < 4 or local not in password


@hypothesis.given(edited([b"a=1&b=%C3%A9&c=+", b"a=&a=&=", b"%FF=1", b"a;b&c"], st.binary(max_size=3)) | st.binary())
@tries(200)
def test_pairs_of_a_query_are_the_same_when_they_are_written_again(query: bytes) -> None:
    pairs, status = attempt(read_pairs, query)
    assert status == 422 or read_pairs(urlencode(pairs).encode()) == pairs


OBJECTS = [b'{"a": [{"b": 1}], "a": "\\ud83d\\ude00"}', b'{"a": 1e5, "b": NaN}']


@hypothesis.given(
    JSON.map(lambda value: json.dumps(value).encode()) | edited(OBJECTS, st.binary(max_size=3)) | st.binary()
)
@tries(200)
def test_pairs_of_a_json_object_are_those_of_the_object(body: bytes) -> None:
    pairs, status = attempt(read_json_object, body)
    assert status == 422 or {name for name, _ in pairs} == set(json.loads(body.decode()))


PARAMETERS = {"a": str, "b": integer_between(0, 9), "c": parse_uuids}


@hypothesis.given(st.lists(st.tuples(st.sampled_from("abcd") | TEXTS, JSON | st.just("5")), max_size=4))
@tries(200)
def test_every_parameter_has_a_value_unless_one_is_wrong(pairs: list[tuple[str, Any]]) -> None:
    values, status = attempt(parse_pairs, pairs, PARAMETERS, {"a"})
    if status:
        assert status == 422
        assert len(pairs) != 1 or pairs[0] != ("a", "5")
    else:
        assert values["a"] == check_text(dict(pairs)["a"])
        assert values.keys() == PARAMETERS.keys() >= dict(pairs).keys()
        assert len(dict(pairs)) == len(pairs)


ACCEPT_PIECES = ["text/csv", "application/json", "*/*", "*", "/", ";", "q=", "0", "0.5", "nan", ",", '"', "\xff", " "]
ACCEPTS = st.lists(st.sampled_from(ACCEPT_PIECES), max_size=8).map("".join)


@hypothesis.given(ACCEPTS, st.sampled_from(["HTTP/1.0", "HTTP/1.1"]), st.none() | TEXTS | st.sampled_from(["csv"]))
@tries(200)
def test_a_format_is_one_that_is_offered(accept: str, protocol: str, wanted: str | None) -> None:
    environ = {"HTTP_ACCEPT": accept, "SERVER_PROTOCOL": protocol}
    with Flask("test").test_request_context(environ_overrides=environ):
        found, status = attempt(cdr_api.choose_format, {"format": wanted, "csv_safe": None})
    if status:
        assert status in {406, 426}
        assert wanted != "csv" or protocol == "HTTP/1.0"
    else:
        assert found is FORMATS[found.name]
        assert found.name == "json" or protocol == "HTTP/1.1"
        assert wanted in (None, found.name)


STATEMENT_NAMES = st.from_regex("[a-z_]+", fullmatch=True)


@hypothesis.given(st.dictionaries(STATEMENT_NAMES, st.text(), max_size=4), st.text())
@tries(50)
def test_statements_are_found_by_their_names(tmp_path: Path, statements: dict[str, str], head: str) -> None:
    hypothesis.assume("-- name" not in head + "".join(statements.values()))
    text = head + "".join(f"\n-- name: {name}\n-- What.\nSELECT {body}\n" for name, body in statements.items())
    (tmp_path / "some.sql").write_text(text, "utf-8", newline="")
    found = load_statements(tmp_path / "some.sql")
    assert list(found) == list(statements)
    assert all(isinstance(statement, sql.SQL) for statement in found.values())
    assert all(statement.as_string().startswith("SELECT ") for statement in found.values())


# Cursors ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def app(database: Database) -> Flask:
    return database.app()


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    return make_database(calls=60)


@pytest.fixture(scope="module")
def feed_cursor(client: Client) -> str:
    return client.get("/api/call_feed", **{"from": "2026-01-01"}).headers["X-Next-Cursor"]


@hypothesis.given(data=st.data())
@tries(150)
def test_a_changed_cursor_is_422(app: Flask, feed_cursor: str, data: st.DataObject) -> None:
    secret = app.extensions["cdr_api"].secret
    cursors = {"cursor": feed_cursor, "after": write_cursor(secret, ["calls"], ["2026-01-01", UUID_TEXT])}
    readers: dict[str, Callable[[str], Any]] = {
        "cursor": lambda text: read_feed_cursor(secret, text),
        "after": lambda text: read_cursor(secret, ["calls"], "after", text),
    }
    name = data.draw(st.sampled_from(sorted(cursors)))
    text = data.draw(edited([cursors[name]], PIECES) | st.text())
    if text == cursors[name]:
        assert readers[name](text)
        return
    with pytest.raises(ApiError) as refusal:
        readers[name](text)
    assert (refusal.value.status, list(refusal.value.data)) == (422, [name])


def test_a_cursor_that_was_cut_off_is_422(app: Flask, feed_cursor: str) -> None:
    secret = app.extensions["cdr_api"].secret
    for length in range(len(feed_cursor)):
        with pytest.raises(ApiError) as refusal:
            read_feed_cursor(secret, feed_cursor[:length])
        assert refusal.value.status == 422
    assert read_feed_cursor(secret, feed_cursor).version == FEED_VERSION


# Requests ---------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """A request as a server hands it to the application, however wrong it is."""

    method: str = "GET"
    path: str = "/"
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def environ(self) -> dict[str, Any]:
        found = create_environ("/", input_stream=io.BytesIO(self.body))
        found |= {"REQUEST_METHOD": self.method, "PATH_INFO": self.path, "QUERY_STRING": self.query}
        found |= {"CONTENT_LENGTH": str(len(self.body))}
        bare = ("CONTENT_TYPE", "CONTENT_LENGTH", "REMOTE_ADDR", "SERVER_PROTOCOL")
        for name, value in self.headers.items():
            key = name.upper().replace("-", "_")
            found[key if key in bare else f"HTTP_{key}"] = value
        return found


def send(app: Flask, attack: Attack, token: str | None = None) -> TestResponse:
    """The answer to an attack, which keeps every promise about answers."""
    if token:
        attack = replace(attack, headers={"Authorization": f"Bearer {token}", **attack.headers})
    environ = attack.environ()
    response = TestResponse(*run_wsgi_app(app, environ, buffered=True), request=Request(environ))
    assert response.status_code < 500, response.text
    # What is the same for everybody has an ETag, and may be kept.
    assert response.headers["Cache-Control"] == ("no-cache" if "ETag" in response.headers else "no-store")
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert all(re.fullmatch(r"[ -~\xa0-\xff]*", value) for value in response.headers.values()), response.headers
    assert not token or token not in response.text
    if response.status_code >= 300 and response.status_code != 304:
        assert response.status_code in PROMISED
        assert response.content_type == "application/json"
        assert not response.data if attack.method == "HEAD" else problem(response)
    return response


@dataclass(frozen=True)
class Route:
    """A route of the application, with parameters that it takes."""

    method: str
    path: str
    values: Mapping[str, Any]
    needed: Collection[str]  # of these parameters
    is_open: bool  # to requests without a token

    def attack(self) -> Attack:
        """A plain request, for attacks to begin with."""
        if self.method == "GET":
            return Attack(self.method, self.path, urlencode(self.values))
        body = json.dumps(dict(self.values)).encode()
        return Attack(self.method, self.path, "", {"Content-Type": "application/json"}, body)

    def without(self, *names: str) -> Route:
        return replace(self, values={name: value for name, value in self.values.items() if name not in names})


GOOD = {
    "domain_name": "alpha.example.com",
    "from": "2026-11-10",
    "to": "2026-11-10",
    "date": "2026-11-10",
    "name": "Ann",
    "email": "ann@example.com",
    "password": PASSWORD,
    "password_confirmation": PASSWORD,
    "xml_cdr_uuid": [UUID_TEXT, FOREIGN_UUID],
    "all": "true",
    "fields": "xml_cdr_uuid,end_stamp,billsec",
    "format": "csv",
    "limit": "5",
    "by": "start",
    "group_by": "domain_name,day",
    "tz": "Europe/Berlin",
    "resolution": "60",
    "direction": "inbound",
    "answered": "true",
    "min_billsec": "5",
    "billable_only": "true",
    "destination_prefix": "1",
    "source_prefix": "1",
    "order": "desc",
}


def find_routes(database: Database) -> Iterator[Route]:
    """Every route of the application, with those of the GOOD parameters that it takes."""
    app = database.app()
    for rule in app.url_map.iter_rules():
        for method in sorted((rule.methods or set()) - {"HEAD", "OPTIONS"}):
            found = Route(
                method, rule.rule.replace("<name>", "docs.js").replace("<uuid>", UUID_TEXT), GOOD, (), is_open=True
            )
            is_open = send(app, replace(found, values={}).attack()).status_code != 401
            token = database.account("alpha.example.com")
            while faulty := refused(app, found, token):
                found = found.without(*faulty)
            needed = [name for name in found.values if refused(app, found.without(name), token)]
            yield replace(found, needed=needed, is_open=is_open)


def refused(app: Flask, route: Route, token: str) -> set[str]:
    """The parameters that the route refuses, or misses."""
    response = send(app, route.attack(), token)
    return set(problem(response)["data"]) if response.status_code == 422 else set()


@dataclass
class Stage:
    """The service, and for each account a twin of it whose database has the account's calls and no others."""

    app: Flask
    twins: Mapping[str, Flask]  # by token
    routes: Sequence[Route]
    databases: Sequence[Database]
    rows: Sequence[Any]  # of the tokens

    def revive(self) -> None:
        """Undoes a logout, and the delays that failed logins make."""
        for database in self.databases:
            with database.connect() as connection:
                connection.execute("DELETE FROM cdr_api.attempts")
                for row in self.rows:
                    connection.execute(
                        "INSERT INTO cdr_api.tokens (account_id, digest) VALUES (%s, %s) ON CONFLICT DO NOTHING", row
                    )


def clone(database: Database, name: str, *domains: str) -> Database:
    """A copy of a database with the calls of some domains only."""
    with demo.connect(database.server) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{database.name}"')
    twin = Database(database.server, name, pgbouncer=database.pgbouncer)
    twin.execute("DELETE FROM v_xml_cdr WHERE domain_name <> ALL(%s)", [list(domains)])
    return twin


def is_idle(app: Flask) -> bool:
    stats = app.extensions["cdr_api"].accounts.pool.get_stats()
    return bool(stats["pool_available"] == stats["pool_size"])


@pytest.fixture(scope="module")
def stage(make_database: DatabaseMaker) -> Iterator[Stage]:
    whole = make_database(calls=60)
    for stamp in ("start_stamp", "end_stamp"):
        whole.execute(f"UPDATE v_xml_cdr SET {stamp} = '2026-11-10Z'::timestamptz + ({stamp} - {stamp}::date)")
    for uuid, name in ((UUID_TEXT, "alpha"), (FOREIGN_UUID, "beta")):
        whole.insert_call(xml_cdr_uuid=uuid, domain_name=f"{name}.example.com", end_stamp="2026-11-10 10:00Z")
    routes = list(find_routes(whole))
    tokens = {whole.account("alpha.example.com"): ["alpha.example.com"], whole.account(): []}
    rows = whole.execute("SELECT account_id, digest FROM cdr_api.tokens")
    whole.close()
    databases = [clone(whole, f"{whole.name}_{len(domains)}", *domains) for domains in tokens.values()]
    apps = [database.app(CDR_API_PROXIES="1") for database in [whole, *databases]]
    found = Stage(apps[0], dict(zip(tokens, apps[1:], strict=True)), routes, [whole, *databases], rows)
    yield found
    for app in apps:
        wait_for(functools.partial(is_idle, app))  # no connection was lost
    for database in databases:
        database.close()
    gc.collect()  # while the warning that is told above is ignored


NUMBERS = ["0", "1", "-1", "60", "100000", "1e9", "9" * 40, "true", "false", "null", "infinity", "NaN"]
DATES = ["0001-01-01", "0001-01-01T00:00Z", "9999-12-31", "9999-12-31T23:59:59-12:00", "2026-02-30", "1769900399"]
DOMAINS = ["alpha.example.com", "beta.example.com", "ALPHA.example.com", "alpha.example.com ", "%.example.com", "*"]
ZONE_NAMES = ["UTC", "Europe/Berlin", "right/UTC", "posix/UTC", "localtime", "posixrules", "Factory", "../UTC"]
WORDS = ["csv", "ndjson", "day,hour", "billsec", "start", "inbound", "a@b.c", PASSWORD, UUID_TEXT]
MONTHS = ["2026-11", "0001-01", "9999-12", "2026-13"]
LIKELY = {
    "month": MONTHS,
    "from": DATES,
    "to": DATES,
    "date": DATES,
    "domain_name": DOMAINS,
    "tz": ZONE_NAMES,
    "limit": NUMBERS,
}
VALUES = TEXTS | st.sampled_from([*NUMBERS, *DATES, *DOMAINS, *ZONE_NAMES, *WORDS])
METHODS = ["GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "PROPFIND", "BREW"]
SUFFIXES = ["/", "//", "/..", "/x", ";x", ".json", " ", "\0", "\r\n", "%00", "\xff", "\xc0\xaf", "\xed\xa0\x80"]
TAILS = ["&", "&&=&", "&;", "&%", "&%zz=%", "&a=%FF", "&a=%C0%AF", "&a=%ED%A0%80", "&a=%00", "&\xff=\xfe", "&+=+", "#a"]


def quote_in_small_letters(text: str) -> str:
    return re.sub("%..", lambda found: found[0].lower(), quote(text, safe=""))


QUOTES: list[Callable[[str], str]] = [quote, quote_plus, quote_in_small_letters]


@st.composite
def pairs_like(draw: st.DrawFn, route: Route, *, wild: bool) -> list[tuple[str, Any]]:
    """Parameters that the route takes; if wild, some are dropped, replaced, doubled, nested or new."""
    names = [name for name in route.values if name in route.needed or not draw(st.integers(0, 3))]
    pairs = [(name, route.values[name]) for name in names]
    if not wild:
        return pairs
    dropped = draw(st.sets(st.sampled_from(names), max_size=1)) if names else set()
    new_names = draw(st.lists(st.sampled_from([*route.values] * 6 + NAMES + ODD_NAMES), min_size=1, max_size=2))
    new = [(name, draw(st.sampled_from(LIKELY[name]) if name in LIKELY else VALUES)) for name in new_names]
    replaced = dropped if draw(st.booleans()) else {name for name, _ in new}
    return [pair for pair in pairs if pair[0] not in replaced] + new


@st.composite
def queries(draw: st.DrawFn, pairs: list[tuple[str, Any]], *, wild: bool) -> str:
    quoted = draw(st.sampled_from(QUOTES))
    text = "&".join(f"{quoted(name)}={quoted(fit(value))}" for name, value in pairs)
    return text + draw(st.sampled_from(TAILS)) if wild else text


def fit(value: Any) -> str:
    """A value as text that UTF-8 can write."""
    return str(value).encode(errors="replace").decode()


DISPOSITIONS = [
    'form-data; name="{}"',
    'form-data; name="{}"; filename="a"',
    "form-data; name=\"{}\"; filename*=utf-16''%ff",
    "form-data; name*=utf-8''{}",
    'form-data; name="{}',
    "form-data",
    "form-data; filename=a",
    "attachment",
    "",
]
CHARSETS = ["ascii", "utf-8", "iso-8859-1", "utf-16", "utf-7", "nonsense", ""]


@st.composite
def multiparts(draw: st.DrawFn, pairs: list[tuple[str, Any]], *, wild: bool) -> bytes:
    body = ""
    for name, value in pairs:
        disposition = draw(st.sampled_from(DISPOSITIONS if wild else DISPOSITIONS[:1])).format(fit(name))
        body += f"--x\r\nContent-Disposition: {disposition}\r\n"
        if wild:
            body += f"Content-Type: text/plain; charset={draw(st.sampled_from(CHARSETS))}\r\n"
        body += f"\r\n{fit(value)}\r\n"
    return body.encode() + draw(st.sampled_from(ENDS if wild else ENDS[:1]))


ENDS = [b"--x--\r\n", b"", b"--x", b"--x\r\n", b"\xff"]
TYPES = {
    "json": "application/json",
    "form": "application/x-www-form-urlencoded",
    "multipart": "multipart/form-data; boundary=x",
}
FORM_DATA = "multipart/form-data; boundary="
ODD_TYPES = [
    "",
    ";/;",
    "text/plain",
    "application/json; charset=utf-16",
    "application/json; charset=",
    "multipart/mixed",
]
BOUNDARIES = ["multipart/form-data", FORM_DATA, FORM_DATA + "\xff", FORM_DATA + '"\\"', FORM_DATA + "x" * 9999]
DEEP = [b"[" * 100_000, b'{"a":' * 50_000, b'{"email": ' + b"9" * 99_999 + b"}", b"--x" * 9999]
ODD_BODIES = [
    b"\0",
    b"{",
    b"\xef\xbb\xbf{}",
    b'{"email": NaN}',
    b'{"\\ud800": "\\udfff"}',
    "{}".encode("utf-16"),
    *DEEP,
]


@st.composite
def bodies(draw: st.DrawFn, pairs: list[tuple[str, Any]], *, wild: bool) -> tuple[str, bytes]:
    """A content type and a body."""
    kind = draw(st.sampled_from(list(TYPES)))
    if kind == "json":
        values = [(name, draw(JSON) if wild and draw(st.booleans()) else value) for name, value in pairs]
        body = ("{" + ",".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values) + "}").encode()
    elif kind == "form":
        body = draw(queries(pairs, wild=wild)).encode("latin-1")
    else:
        body = draw(multiparts(pairs, wild=wild))
    if wild and draw(st.booleans()):
        body = draw(edited([body], st.binary(max_size=3)) | st.sampled_from(ODD_BODIES))
        return draw(st.sampled_from([*TYPES.values(), *ODD_TYPES, *BOUNDARIES])), body
    return TYPES[kind], body


ODD_HEADERS = {
    "Accept": ["", "*", "*/*", "text/csv", "application/x-ndjson;q=0", ";q=1", "a/b" * 2000, "text/csv;q=nan", "\xff"],
    "Connection": ["close", "Upgrade", "Authorization"],
    "Content-Encoding": ["gzip", "identity, nonsense"],
    "Content-Length": ["", "-1", "+5", "0x5", "1e3", "5, 5", "1", "999", "9" * 30, "\xb2"],
    "Content-Type": [*ODD_TYPES, *BOUNDARIES],
    "Cookie": ["a=b; " * 500, "session=\xff", "=;=;"],
    "Expect": ["100-continue", "nonsense"],
    "Host": ["", "a..b", "a>b", "[::1", "a:b:c", "x" * 300, "xn--zzzzzz---", "\xff", "a,b", "user@host", "a b"],
    "If-Modified-Since": ["Thu, 01 Jan 2099 00:00:00 GMT", "now"],
    "If-None-Match": ["*", '"x"', "\xff"],
    "Origin": ["null", "\xff", "https://evil.example"],
    "Range": ["bytes=0-0", "bytes=-1", "bytes=9-1", "lines=\xff"],
    "Remote-Addr": ["", "::1", "not an address", "fe80::1%eth0"],
    "Server-Protocol": ["HTTP/1.0", "HTTP/0.9", "HTTP/2", ""],
    "Transfer-Encoding": ["chunked", "gzip"],
    "Upgrade": ["h2c", "websocket"],
    "X-Forwarded-For": ["", "\xff", "::1", "1.2.3.4, 5.6.7.8", "'; --", "x" * 8000, "fe80::1%eth0", "1.2.3.4:5", "_x"],
    "X-Forwarded-Host": ["a..b", "[::1", "a>; rel=x", "\xff", "xn--zzzzzz---", "a,b", ","],
    "X-Forwarded-Port": ["-1", "99999999", "x"],
    "X-Forwarded-Prefix": ["/\xff", '/a>; rel="x"', "//evil", "/a b", "/\xc3\xa4", "x", "/%0d%0a"],
    "X-Forwarded-Proto": ["javascript", "\xff", "a b", "https,http", ""],
    "X-HTTP-Method-Override": ["DELETE", "POST", "\xff"],
    "X-Request-ID": ["", "a b", "x" * 129, "\xff", 'a"b', "a\tb"],
    "X-Long": ["x" * 100_000],
}


def headers() -> st.SearchStrategy[dict[str, str]]:
    one = st.sampled_from([(name, value) for name, values in ODD_HEADERS.items() for value in values])
    printable = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=20)
    anything = st.tuples(st.sampled_from(list(ODD_HEADERS)), printable)
    return st.lists(one | one | one | anything, min_size=1, max_size=2).map(dict)


WILD = st.sets(st.sampled_from(["method", "path", "parameters", "query", "body", "headers"]), min_size=1, max_size=2)


@st.composite
def attacks(draw: st.DrawFn, routes: Sequence[Route]) -> tuple[Route, Attack]:
    """A request to a route, in one or two respects a wild one."""
    route, wild = draw(st.sampled_from(routes)), draw(WILD)
    method = draw(st.sampled_from(METHODS)) if "method" in wild else route.method
    path = route.path + (draw(st.sampled_from(SUFFIXES)) if "path" in wild else "")
    pairs = draw(pairs_like(route, wild="parameters" in wild))
    in_body = route.method != "GET"
    query = draw(queries([] if in_body else pairs, wild="query" in wild))
    content_type, body = draw(bodies(pairs if in_body else [], wild="body" in wild))
    found = Attack(method, path, query, {"Content-Type": content_type} if in_body else {}, body if in_body else b"")
    return route, replace(found, headers={**found.headers, **draw(headers())}) if "headers" in wild else found


def compare(stage: Stage, route: Route, attack: Attack, token: str | None) -> TestResponse:
    """The answer to an attack, which is the same where the others have no calls."""
    answer = send(stage.app, attack, token)
    if token and not route.is_open:
        twin = send(stage.twins[token], attack, token)
        assert (answer.status_code, answer.data) == (twin.status_code, twin.data)
    if attack.method == "POST":
        stage.revive()
    return answer


def test_plain_requests_succeed_and_are_answered_the_same_whatever_calls_others_have(stage: Stage) -> None:
    """So the attacks, which are made of them, get past what refuses wrong parameters."""
    assert len(stage.routes) >= 12
    for route, token in itertools.product(stage.routes, stage.twins):
        for kept in (route.values, route.needed):
            plain_route = route.without(*(name for name in route.values if name not in kept))
            answer = compare(stage, route, plain_route.attack(), token)
            refused_by = 404 if UUID_TEXT in route.path else 403  # whoever may not read the domain, or the call
            assert answer.status_code in {200, refused_by} or route.path == "/api/register", answer.text


@hypothesis.given(data=st.data())
@tries(300)
def test_attacks_get_promised_answers_and_the_same_whatever_calls_others_have(
    stage: Stage, data: st.DataObject
) -> None:
    route, attack = data.draw(attacks(stage.routes))
    compare(stage, route, attack, data.draw(st.sampled_from([*stage.twins, None])))


def part(disposition: str, *more: str) -> Attack:
    """A login whose form has a part with such a head."""
    head = "\r\n".join([f"Content-Disposition: {disposition}", *more])
    body = f"--x\r\n{head}\r\n\r\na@b.c\r\n--x--\r\n"
    return Attack("POST", "/api/login", "", {"Content-Type": TYPES["multipart"]}, body.encode("latin-1"))


def json_body(path: str, body: bytes) -> Attack:
    return Attack("POST", path, "", {"Content-Type": "application/json"}, body)


def calls_with(header: str, value: str) -> Attack:
    return Attack("GET", "/api/calls", "domain_name=alpha.example.com&limit=1", {header: value})


TOTALS = "from=2026-11-10&to=2026-11-10"
KNOWN = {
    "the first day of Python's calendar": (Attack("GET", "/api/call_feed", "from=0001-01-01"), 200),
    "the first moment of Python's calendar": (Attack("GET", "/api/call_feed", "from=0001-01-01T00:00Z"), 200),
    "a moment before it": (Attack("GET", "/api/call_feed", "from=0001-01-01T00:00%2B14"), 200),
    "a moment behind its end": (Attack("GET", "/api/call_feed", "from=9999-12-31T23-12"), 200),
    "the first day of it, by the minute": (Attack("GET", "/api/active_calls_by_domain", "date=0001-01-02"), 200),
    "the last day of it, by the minute": (Attack("GET", "/api/active_calls_by_domain", "date=9999-12-31"), 200),
    "a zone with leap seconds": (Attack("GET", "/api/call_totals", f"{TOTALS}&tz=right/UTC"), 422),
    "a zone that Python alone has": (Attack("GET", "/api/call_totals", f"{TOTALS}&tz=posixrules"), 422),
    "a folder of zones": (Attack("GET", "/api/call_totals", f"{TOTALS}&tz=Europe"), 422),
    "a part without a name": (part("form-data"), 422),
    "a file without a name": (part("form-data; filename=a"), 422),
    "a part's name that is not UTF-8": (part('form-data; name="\xff"'), 422),
    "a part's name in UTF-16": (part("form-data; name*=utf-16''%ff"), 422),
    "a part in a charset of its own": (
        part('form-data; name="email"', "Content-Type: text/plain; charset=utf-16"),
        422,
    ),
    "a part of a negative length": (part('form-data; name="email"; filename="a"', "Content-Length: -5"), 422),
    "200,000 brackets": (json_body("/api/login", b'{"email":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), 422),
    "an integer of 100,000 digits": (json_body("/api/login", b'{"email":' + b"9" * 100_000 + b"}"), 422),
    "half of a surrogate as a name": (json_body("/api/login", b'{"\\udfff": 1}'), 422),
    "a NUL in an address": (json_body("/api/login", b'{"email": "\\u0000", "password": "x"}'), 422),
    "a list of lists": (json_body("/api/call_lookup", b'{"xml_cdr_uuid": [[["x"]]]}'), 422),
    "a list in itself": (json_body("/api/call_lookup", b'{"xml_cdr_uuid": {"0": "x"}}'), 422),
    "a prefix that is not UTF-8": (calls_with("X-Forwarded-Prefix", "/\xff"), 200),
    "a prefix with a quote": (calls_with("X-Forwarded-Prefix", '/a>; rel="next", <http://evil'), 200),
    "a host with a quote": (calls_with("Host", 'a>; rel="next", <http://evil'), 200),
    "a host of two dots": (calls_with("Host", "a..b"), 400),
    "a broken Punycode host": (calls_with("Host", "xn--zzzzzz---"), 200),
    "10,000 wishes": (calls_with("Accept", "text/csv;q=0.1," * 10_000), 200),
    "a forged method": (Attack("GET", "/api/login", "", {"X-HTTP-Method-Override": "POST"}), 405),
    "a NUL in the path": (Attack("GET", "/api/health\0"), 404),
    "a path that is overlong UTF-8": (Attack("GET", "/api/\xc0\xaf"), 404),
    "two dots in the path": (Attack("GET", "/api/../api/health"), 404),
    "a nested parameter": (Attack("GET", "/api/calls", "domain_name[]=alpha.example.com"), 422),
    "a parameter twice": (
        Attack("GET", "/api/calls", "domain_name=alpha.example.com&domain_name=beta.example.com"),
        422,
    ),
    "a domain in capitals": (Attack("GET", "/api/calls", "domain_name=BETA.example.com"), 403),
    "a domain with a blank": (Attack("GET", "/api/calls", "domain_name=beta.example.com%20"), 403),
    "a domain with a soft hyphen": (Attack("GET", "/api/calls", "domain_name=beta%C2%AD.example.com"), 403),
    "two domains": (Attack("GET", "/api/calls", "domain_name=alpha.example.com,beta.example.com"), 403),
    "all domains": (Attack("GET", "/api/calls", "domain_name=%25"), 403),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_attacks(stage: Stage, name: str) -> None:
    attack, status = KNOWN[name]
    answer = send(stage.app, attack, next(iter(stage.twins)))
    assert answer.status_code == status, answer.text
    if "Link" in answer.headers:
        assert re.fullmatch(r'<[!-~]+>; rel="next"', answer.headers["Link"])
        assert "<" not in answer.headers["Link"][1:]


def credentials(token: str) -> list[str]:
    """What is no Authorization, though it resembles one."""
    schemes = ["", "Basic ", "Digest ", "Bearer", "Bearer Bearer ", "Token ", "Bearer\t", "Bearer,", "Bearer token="]
    tokens = [token[:-1], token + "x", token.upper(), token.removeprefix("cdr_"), f'"{token}"', f"{token},{token}"]
    tokens += ["", "a=b", "=", 'a="', "\0", "\xff", "x" * 99_999, "a*=utf-16''%ff", "' OR true --", f"{token}\0"]
    return [scheme + token for scheme in schemes] + [f"Bearer {wrong}" for wrong in tokens]


def test_what_resembles_credentials_opens_no_route(stage: Stage) -> None:
    token = next(iter(stage.twins))
    for route in stage.routes:
        for value in credentials(token) if not route.is_open else ():
            attack = replace(route.attack(), headers={**route.attack().headers, "Authorization": value})
            answer = send(stage.app, attack)
            assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer"), value
            assert token.lower() not in answer.text.lower()


def test_no_header_breaks_a_route(stage: Stage) -> None:
    """Each value on every third route, so that it takes a third of the time."""
    token = next(iter(stage.twins))
    routes = [route for route in stage.routes if route.method == "GET" or not route.is_open]  # a login takes its time
    pairs = [(name, value) for name, values in ODD_HEADERS.items() for value in values]
    for number, (name, value) in enumerate(pairs):
        for route in routes[number % 3 :: 3]:
            attack = route.attack()
            answer = send(stage.app, replace(attack, headers={**attack.headers, name: value}), token)
            if answer.status_code == 200 and route.method == "POST":
                stage.revive()


ODD_JSON: list[Any] = [None, 5, -1.5, 10**400, [], {}, [[]], {"a": 1}, [None], "\ud800", float("nan")]


def test_no_value_breaks_a_parameter(stage: Stage) -> None:
    """Of the values that are not made for the parameter every second, so that it takes half of the time."""
    parameters = [(route, name) for route in stage.routes for name in route.values]
    for number, (route, name) in enumerate(parameters):
        odd = [*ODD_TEXTS, *(ODD_JSON if route.method == "POST" else ())]
        for value in [*odd[number % 2 :: 2], *LIKELY.get(name, [])]:
            values = {**route.values, name: fit(value) if route.method == "GET" else value}
            send(stage.app, replace(route, values=values).attack(), next(iter(stage.twins)))
        if route.method == "POST":
            stage.revive()


def test_head_and_options_tell_what_get_tells_and_no_more(stage: Stage) -> None:
    for route, token in itertools.product(stage.routes, [*stage.twins, None]):
        attack = route.attack()
        options = send(stage.app, replace(attack, method="OPTIONS"), token)
        assert (options.status_code, options.data) == (200, b"")
        assert route.method in options.headers["Allow"].split(", ")
        if route.method == "GET":
            got = send(stage.app, attack, token)
            head = send(stage.app, replace(attack, method="HEAD"), token)
            assert (head.status_code, head.data) == (got.status_code, b"")
            assert set(head.headers.keys()) == set(got.headers.keys())


# Bytes ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gunicorn(database: Database) -> Iterator[Gunicorn]:
    with serve(database.dsn, CDR_API_PROXIES="1") as running:
        wait_for(running.worker_pids)
        yield running


@dataclass(frozen=True)
class RawAnswer:
    status: int
    headers: Mapping[str, str]
    body: bytes


def read_answers(data: bytes) -> Iterator[RawAnswer]:
    """The answers that stand one behind the other on a connection."""
    while data:
        head, end, data = data.partition(b"\r\n\r\n")
        version, status, *_ = head.split(b" ", 2)
        assert version in {b"HTTP/1.0", b"HTTP/1.1"}, head
        assert end
        fields = dict(http.client.parse_headers(io.BytesIO(head.partition(b"\r\n")[2] + end)))
        # An answer to HEAD names a length and has none.
        length = 0 if data.startswith(b"HTTP/1.1 ") else int(fields.get("Content-Length", 0))
        yield RawAnswer(int(status), fields, data[:length])
        data = data[length:]


def exchange(gunicorn: Gunicorn, request: bytes) -> list[RawAnswer]:
    """Sends bytes, says that no more will come, and reads to the end."""
    parts = urlsplit(gunicorn.url)
    received = b""
    with socket.create_connection((str(parts.hostname), int(parts.port or 0)), 30) as client:
        with contextlib.suppress(OSError):  # the server need not read to the end
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while data := client.recv(65536):
                received += data
    return list(read_answers(received))


def check_exchange(gunicorn: Gunicorn, request: bytes) -> list[RawAnswer]:
    """Its answers, each of which is promised; the worker lives on, and there is no fault in its log."""
    pids = gunicorn.worker_pids()
    answers = exchange(gunicorn, request)
    for answer in answers:
        assert answer.status < 500, answer
        if answer.status >= 300:
            assert answer.status in PROMISED | {499}, answer  # its client has closed its sending side
            assert answer.headers.get("Content-Type") == "application/json"
            assert answer.headers.get("Cache-Control") == "no-store"
            assert answer.headers.get("X-Content-Type-Options") == "nosniff"
            assert not answer.body or json.loads(answer.body).keys() == {"message", "success", "data"}
    assert [answer.status for answer in exchange(gunicorn, HEALTH)] == [200]
    assert gunicorn.worker_pids() == pids
    assert "Traceback" not in gunicorn.log.read_text("utf-8")
    return answers


HEALTH = b"GET /api/health HTTP/1.1\r\nHost: x\r\n\r\n"


def get(path: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([b"GET " + path + b" HTTP/1.1", b"Host: x", *headers, b"", b""])


def post(body: bytes, *headers: bytes, path: bytes = b"/api/login", kind: str = "form") -> bytes:
    lines = [b"POST " + path + b" HTTP/1.1", b"Host: x", b"Content-Type: " + TYPES[kind].encode(), *headers, b""]
    return b"\r\n".join([*lines, body])


def chunked(body: bytes, path: bytes = b"/api/login") -> bytes:
    return post(body, b"Transfer-Encoding: chunked", path=path)


def sized(size: int, body: bytes, path: bytes = b"/api/login") -> bytes:
    return post(body, b"Content-Length: %d" % size, path=path)


RAW = {
    "nothing": (b"", []),
    "half a line": (b"GET /api/hea", []),
    "an empty line first": (b"\r\n" + HEALTH, [200]),
    "three empty lines first": (b"\r\n" * 3 + HEALTH, [400]),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"a" * 100, []),
    "HTTP/0.9": (b"GET /api/health\r\n\r\n", [400]),
    "HTTP/1.0": (b"GET /api/health HTTP/1.0\r\n\r\n", [200]),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [400]),
    "an upgrade to HTTP/2": (
        get(b"/api/health", b"Connection: Upgrade", b"Upgrade: h2c", b"HTTP2-Settings: AAMA"),
        [200],
    ),
    "a proxy's greeting": (b"PROXY TCP4 1.1.1.1 2.2.2.2 1 2\r\n" + HEALTH, [400]),
    "line feeds alone": (HEALTH.replace(b"\r", b""), [400]),
    "a NUL in the path": (get(b"/api/\0"), [400]),
    "a NUL in a header": (get(b"/api/health", b"A: \0"), [400]),
    "bytes of UTF-8 in the path": (get("/api/é".encode()), [400]),
    "a header without a colon": (get(b"/api/health", b"nonsense"), [400]),
    "a header of two lines": (get(b"/api/health", b"A: b", b" c"), [400]),
    "a blank before the colon": (post(b"0\r\n\r\n", b"Transfer-Encoding : chunked"), [400]),
    "a method in small letters": (HEALTH.replace(b"GET", b"get"), [400]),
    "a method of 9,000 letters": (HEALTH.replace(b"GET", b"A" * 9000), [414]),
    "an unknown method": (HEALTH.replace(b"GET", b"BREW"), [405]),
    "CONNECT": (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
    "TRACE": (HEALTH.replace(b"GET", b"TRACE"), [405]),
    "an asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", [404]),
    "10,000 headers": (get(b"/api/health", *(b"A%d: b" % i for i in range(10_000))), [431]),
    "a URL of 100 KB": (get(b"/api/health?" + b"a" * 100_000), [414]),
    "a URL of 8,000 characters": (get(b"/api/health?" + b"a" * 8000), [422]),
    "two hosts": (get(b"/api/health", b"Host: y"), [400]),
    "no host": (HEALTH.replace(b"Host: x\r\n", b""), [200]),
    "a host of two dots": (HEALTH.replace(b": x", b": a..b"), [400]),
    "an unknown expectation": (post(b"", b"Expect: nonsense", b"Content-Length: 0"), [400]),
    "an expectation": (post(b"", b"Expect: 100-continue", b"Content-Length: 0"), [100, 422]),
    "an absolute URL": (get(b"http://evil.example:99999/api/health"), [200]),
    "an absolute URL of another scheme": (get(b"file:///api/health"), [200]),
    "a broken absolute URL": (get(b"http://[evil/api/health"), [400]),
    "another host's path": (get(b"//evil.example/api/health"), [404]),
    "a path of two slashes": (get(b"//"), [404]),
    "two dots": (get(b"/api/../api/health"), [404]),
    "two dots, encoded": (get(b"/api/%2e%2E/api/health"), [404]),
    "two dots behind a slash, encoded": (get(b"/api/health/%2e%2e%2fdomains"), [404]),
    "a line break, encoded": (get(b"/api/health%0d%0aX:%20y"), [404]),
    "a NUL, encoded": (get(b"/api/health%00"), [404]),
    "bytes that are no UTF-8, encoded": (get(b"/api/%FF%FE"), [404]),
    "a percent sign alone": (get(b"/api/%zz%"), [404]),
    "names of the server's own variables": (get(b"/x", b"SCRIPT_NAME: /x", b"PATH_INFO: /api/health"), [404]),
    "a forged script name": (get(b"/api/health", b"SCRIPT_NAME: /x", b"Script-Name: /x"), [200]),
    "three requests": (HEALTH * 3, [200, 200, 200]),
    "a body with a GET, and a request": (get(b"/api/health", b"Content-Length: 5") + b"hello" + HEALTH, [200, 200]),
    "a body nobody reads, and a request": (chunked(b"5\r\nhello\r\n0\r\n\r\n", b"/api/x") + HEALTH, [404, 200]),
    "a broken body nobody reads, and a request": (chunked(b"zz\r\n", b"/api/x") + HEALTH, [404, 400]),
    "a length and chunks": (post(b"0\r\n\r\n" + HEALTH, b"Content-Length: 5", b"Transfer-Encoding: chunked"), [400]),
    "chunks and a length": (post(b"0\r\n\r\n" + HEALTH, b"Transfer-Encoding: chunked", b"Content-Length: 5"), [400]),
    "two lengths": (post(b"abcde", b"Content-Length: 4", b"Content-Length: 5"), [400]),
    "two lengths in one": (post(b"abcd", b"Content-Length: 4, 4"), [400]),
    "a negative length": (post(b"", b"Content-Length: -1"), [400]),
    "a length with a sign": (post(b"abcd", b"Content-Length: +4"), [400]),
    "a length of 20 digits": (post(b"abcd", b"Content-Length: " + b"9" * 20), [413]),
    "a length of 2 MB, and nothing": (sized(2_000_000, b""), [413]),
    "2 MB, and a request": (sized(2_000_000, b"a" * 2_000_000) + HEALTH, [413]),
    "a length that is too long": (sized(100, b"email=a@b.c&password=x"), [400]),
    "a length that is too long, of nothing": (sized(100, b"", b"/api/login"), [400]),
    "a length that is too short": (sized(5, b"email=a@b.c&password=x\r\n\r\n"), [422, 400]),
    "chunks, twice": (post(b"0\r\n\r\n", b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"), [400]),
    "chunks in HTTP/1.0": (chunked(b"0\r\n\r\n").replace(b"1.1", b"1.0"), [400]),
    "an unknown coding": (post(b"", b"Transfer-Encoding: nonsense"), [400]),
    "what is nearly chunked": (post(b"0\r\n\r\n", b"Transfer-Encoding: xchunked"), [400]),
    "chunked behind a vertical tab": (post(b"0\r\n\r\n", b"Transfer-Encoding: \x0bchunked"), [400]),
    "a chunk's size that is no number": (chunked(b"zz\r\n"), [400]),
    "a chunk's size below zero": (chunked(b"-1\r\n"), [400]),
    "a chunk's size of 20 digits": (chunked(b"f" * 20 + b"\r\nabc"), [400]),
    "a chunk's size of 20,000 digits": (chunked(b"0" * 20_000 + b"\r\n\r\n"), [400]),
    "a chunk's size with 0x": (chunked(b"0x5\r\nemail\r\n0\r\n\r\n"), [400]),
    "a chunk that breaks off": (chunked(b"ff\r\nemail=a"), [400]),
    "a chunk without an end": (chunked(b"5\r\nemailXX0\r\n\r\n"), [400]),
    "chunks with line feeds": (chunked(b"5\nemail\n0\n\n"), [400]),
    "chunks without an end": (chunked(b"5\r\nemail\r\n"), [400]),
    "no chunks": (chunked(b""), [400]),
    "a chunk's extension": (chunked(b'5;a="b"\r\nemail\r\n0\r\n\r\n'), [422]),
    "a token behind the body": (chunked(b"0\r\nAuthorization: Bearer x\r\n\r\n"), [400]),
}


@pytest.mark.parametrize("name", RAW)
def test_raw_attacks(gunicorn: Gunicorn, name: str) -> None:
    request, statuses = RAW[name]
    answers = [answer.status for answer in check_exchange(gunicorn, request)]
    # Behind so many bytes that nobody reads, the end of the connection may overtake the answer.
    assert answers == statuses or (len(request) > 65_536 and not answers)


RAW_PIECES = [
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b"\t",
    b":",
    b"%00",
    b"%",
    b"/",
    b"//",
    b"..",
    b"?",
    b"&",
    b"#",
]
RAW_LINES = [b"\r\nHost: y", b"\r\nContent-Length: 5", b"\r\nTransfer-Encoding: chunked", b"\r\n folded", HEALTH]


@hypothesis.given(data=st.data())
@tries(150)
def test_bytes_get_a_promised_answer_or_none(
    gunicorn: Gunicorn, database: Database, client: Client, data: st.DataObject
) -> None:
    token = str(client.token).encode()
    samples = [
        HEALTH + HEALTH,
        get(b"/api/calls?domain_name=alpha.example.com&limit=1", b"Authorization: Bearer " + token),
        sized(22, b"email=a@b.c&password=x", b"/api/register"),
        chunked(b"5\r\nemail\r\n0\r\n\r\n"),
    ]
    pieces = st.binary(max_size=3) | st.sampled_from(RAW_PIECES + RAW_LINES)
    request = data.draw(edited(samples, pieces))
    for answer in check_exchange(gunicorn, request):
        assert token not in answer.body


def test_a_body_that_breaks_off_is_not_taken_for_whole(gunicorn: Gunicorn, database: Database) -> None:
    """Nor its last parameter: someone would have an account that is nearly the one asked for."""
    body = f"name=Ann&password={PASSWORD}&password_confirmation={PASSWORD}&email=ann@example.com".encode()
    for missing in (1, len("&email=ann@example.com"), len(body)):
        answers = check_exchange(gunicorn, sized(len(body), body[:-missing], b"/api/register"))
        assert [answer.status for answer in answers] == [400]
    assert database.execute("SELECT email FROM cdr_api.accounts WHERE email LIKE 'ann@%'") == []


@pytest.mark.parametrize(
    "request_of",
    [
        pytest.param(lambda token: get(b"/api/domains", b"Authorization Bearer " + token), id="no colon"),
        pytest.param(lambda token: get(b"/api/domains", b"Authorization Bearer " + token + b": x"), id="a late colon"),
        pytest.param(lambda token: get(b"/api/domains", b"Authorization: Bearer", b" " + token), id="two lines"),
        pytest.param(lambda token: b"GET /api/domains?token=" + token + b"\r\n\r\n", id="no version"),
        pytest.param(lambda token: b"Bearer " + token + b"\r\n\r\n", id="alone"),
        pytest.param(lambda token: sized(5, b"all=x\r\ntoken=" + token + b"\r\n\r\n"), id="behind a body"),
        pytest.param(lambda token: chunked(token + b"\r\n"), id="a chunk's size"),
        pytest.param(lambda token: get(b"/api/health", b"Transfer-Encoding: " + token), id="a coding"),
        pytest.param(lambda token: get(b"/api/health", b"Expect: " + token), id="an expectation"),
    ],
)
def test_a_token_at_a_wrong_place_is_neither_sent_back_nor_logged(
    gunicorn: Gunicorn, database: Database, request_of: Callable[[bytes], bytes]
) -> None:
    token = database.account("alpha.example.com")
    answers = exchange(gunicorn, request_of(token.encode()))
    assert answers[-1].status >= 400
    assert all(token.encode() not in answer.body for answer in answers)
    assert token.lower() not in gunicorn.log.read_text("utf-8").lower()
