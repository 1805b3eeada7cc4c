"""openapi.json says what the code does, and the code does what it says."""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import hypothesis
import pytest
import schemathesis
from flask import Flask
from hypothesis import strategies as st
from openapi_schema_validator import OAS31Validator, oas31_format_checker
from openapi_spec_validator import OpenAPIV31SpecValidator
from schemathesis.specs.openapi.checks import positive_data_acceptance
from werkzeug.test import TestResponse

import cdr
import cdr_api
from cdr.parsing import SECRETS_IN_QUERY, Parsers, parse_choices, parse_flag, parse_prefix, parse_uuid, parse_zone
from cdr.ranges import parse_moment, parse_month
from cdr.selection import BOOLEANS, FIELDS, FILTERS, INTEGERS, MORE_FIELDS, NUMBERS, STRINGS, parse_fields
from cdr.stream import FORMATS
from tests.conftest import ROOT, SOURCES, Client, Database, DatabaseMaker, Gunicorn, serve, wait_for
from tests.documents import API, ERRORS, shape
from tests.nginx import NGINX, run_nginx
from tests.servers import slow

pytestmark = pytest.mark.direct("is about the description")

ALPHA = "alpha.example.com"
DESCRIPTION = json.loads((ROOT / "openapi.json").read_text("utf-8"))
COMPONENTS = DESCRIPTION["components"]
SCHEMAS = COMPONENTS["schemas"]
# Pages for people, and what they load, are no part of the API.
PAGES = re.compile(r"/api/(docs|usage|assets)(/.*)?")  # what browsers load


def resolve(node: dict[str, Any]) -> dict[str, Any]:
    """What a reference leads to, or the node itself."""
    while "$ref" in node:
        found: Any = DESCRIPTION
        for part in node["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        node = found
    return node


@dataclass(frozen=True)
class Operation:
    """A method of a path, with references resolved."""

    path: str
    method: str
    content: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.content["operationId"])

    @property
    def rule(self) -> str:
        """The path as Flask writes it."""
        return self.path.replace("{", "<").replace("}", ">")

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        return {p["name"]: p for p in map(resolve, self.content["parameters"]) if p["in"] == "query"}

    @property
    def bodies(self) -> dict[str, Any]:
        found: dict[str, Any] = self.content.get("requestBody", {"content": {}})["content"]
        return found

    @property
    def fields(self) -> dict[str, Any]:
        """The properties of the body."""
        schema = resolve(self.bodies["application/json"]["schema"]) if self.bodies else {"properties": {}}
        return dict(schema["properties"])

    @property
    def responses(self) -> dict[int, dict[str, Any]]:
        return {int(status): resolve(response) for status, response in self.content["responses"].items()}


OPERATIONS = [
    Operation("/api" + path, method, content)
    for path, methods in DESCRIPTION["paths"].items()
    for method, content in methods.items()
]
BY_NAME = {operation.name: operation for operation in OPERATIONS}
each_operation = pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)


def walk(node: Any, path: str = "#") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of the description, with where it stands."""
    if isinstance(node, dict):
        yield path, node
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in children:
        yield from walk(child, f"{path}/{name}")


def faults(value: Any, schema: dict[str, Any]) -> list[str]:
    whole = {**schema, "components": COMPONENTS}
    return [error.message for error in OAS31Validator(whole, format_checker=oas31_format_checker).iter_errors(value)]


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    """Two calls of alpha.example.com: the one that the description shows, and one that was missed."""
    database = make_database()
    (call,) = BY_NAME["calls"].responses[200]["content"]["application/json"]["examples"]["all_fields"]["value"]
    database.insert_call(**{name: value for name, value in call.items() if value is not None})
    names = "extension_uuid, domain_uuid, extension, effective_caller_id_name, password"
    extension = [call["extension_uuid"], call["domain_uuid"], "101", "Alice Example", "secret"]
    database.execute(f"INSERT INTO v_extensions ({names}) VALUES (%s, %s, %s, %s, %s)", extension)
    missed = {"xml_cdr_uuid": "0b9e2f6c-6a53-4c0e-9c5e-0d9c4b3f7a11", "billsec": 0, "billmsec": 0}
    stamps = {"start_stamp": "2026-01-31 15:02:01+00", "end_stamp": "2026-01-31 15:02:31+00"}
    database.insert_call(**missed, **stamps, direction="inbound", destination_number="101")
    return database


@pytest.fixture(scope="module")
def app(database: Database) -> Flask:
    return database.app(CDR_API_TIMEZONE="UTC", CDR_API_REGISTER_DOMAINS=ALPHA)


@pytest.fixture(scope="module")
def client(database: Database, app: Flask) -> Client:
    return database.client(database.account(ALPHA), app)


# The document -----------------------------------------------------------------


def test_it_is_valid() -> None:
    assert list(OpenAPIV31SpecValidator(DESCRIPTION).iter_errors()) == []


def test_every_reference_is_used() -> None:
    used = {node["$ref"] for _, node in walk(DESCRIPTION) if isinstance(node.get("$ref"), str)}
    kinds = ("parameters", "headers", "responses", "schemas")
    assert used == {f"#/components/{kind}/{name}" for kind in kinds for name in COMPONENTS[kind]}


def test_everything_is_told_in_words() -> None:
    for operation in OPERATIONS:
        assert operation.content["summary"], operation
        assert operation.content["description"], operation
        assert operation.content["tags"][0] in {tag["name"] for tag in DESCRIPTION["tags"]}
        for told in [*operation.parameters.values(), *operation.responses.values(), *operation.fields.values()]:
            assert resolve(told)["description"], told
    for name, schema in SCHEMAS.items():
        for field, told in schema.get("properties", {}).items():
            assert resolve(told)["description"], (name, field)


def test_its_version_is_that_of_the_service() -> None:
    assert DESCRIPTION["info"]["version"] == cdr.__version__


# Against the code -------------------------------------------------------------


def test_it_has_every_route_and_method_and_no_other(app: Flask) -> None:
    routes = {
        (rule.rule, method.lower())
        for rule in app.url_map.iter_rules()
        for method in rule.methods or set()
        if method not in ("HEAD", "OPTIONS") and not PAGES.fullmatch(rule.rule)
    }
    assert {(operation.rule, operation.method) for operation in OPERATIONS} == routes


def test_operations_are_named_as_the_functions(app: Flask) -> None:
    named = {rule.rule: rule.endpoint.rpartition(".")[2] for rule in app.url_map.iter_rules()}
    assert {operation.rule: operation.name for operation in OPERATIONS}.items() <= named.items()


PARSERS: dict[str, Parsers] = {
    "calls": cdr_api.CALLS,
    "call": cdr_api.CALL,
    "call_legs": cdr_api.CALL,
    "call_range": cdr_api.CALL_RANGE,
    "call_feed": cdr_api.FEED,
    "call_totals": cdr_api.TOTALS,
    "concurrent_calls_by_domain": cdr_api.CONCURRENCY,
    "active_calls_by_domain": cdr_api.CONCURRENCY,
    "call_lookup": {"fields": parse_fields},
    "domains": cdr_api.FORMAT,
    "extensions": cdr_api.EXTENSIONS,
    "logout": {"all": parse_flag},
}
EVERY_NAME = {name for found in OPERATIONS for name in (*found.parameters, *found.fields)}
EVERY_NAME |= {name for parsers in PARSERS.values() for name in parsers}


@each_operation
def test_it_has_every_parameter_and_no_other(operation: Operation) -> None:
    assert set(operation.parameters) == set(PARSERS.get(operation.name, {}))


def unknown(response: TestResponse) -> set[str]:
    """The parameters that an answer says the route does not know."""
    told: dict[str, list[str]] = json.loads(response.get_json()["data"])
    return {name for name, sentences in told.items() if any("not a parameter" in text for text in sentences)}


@each_operation
def test_a_route_knows_the_parameters_that_are_described_and_no_other(client: Client, operation: Operation) -> None:
    names = EVERY_NAME - SECRETS_IN_QUERY
    query = dict.fromkeys([*names, "nonsense"], "")
    response = client.send(operation.method.upper(), operation.path, query_string=query)
    assert response.status_code == 422
    assert unknown(response) == {*names, "nonsense"} - set(operation.parameters)


@pytest.mark.parametrize("name", ["register", "login", "logout", "call_lookup"])
def test_a_body_has_the_fields_that_are_described_and_no_other(client: Client, name: str) -> None:
    operation = BY_NAME[name]
    for options in ({"json": dict.fromkeys(EVERY_NAME, "x")}, {"data": dict.fromkeys(EVERY_NAME, "x")}):
        response = client.post(operation.path, **options)
        assert response.status_code == 422
        assert unknown(response) == EVERY_NAME - set(operation.fields)


def test_bodies_are_described_where_they_are_read(client: Client) -> None:
    for operation in OPERATIONS:
        assert bool(operation.bodies) == (operation.method == "post")
        for kind in operation.bodies:
            response = client.post(operation.path, data="?", content_type=kind)
            assert response.status_code == 422, kind  # and not 415


@pytest.mark.parametrize("name", ["register", "login", "call_lookup"])
def test_what_a_body_must_have(client: Client, name: str) -> None:
    operation = BY_NAME[name]
    response = client.post(operation.path, json={})
    assert response.status_code == 422
    schema = resolve(operation.bodies["application/json"]["schema"])
    assert set(json.loads(response.get_json()["data"])) == set(schema["required"])


# What another parameter may stand for: domain_uuid, month.
ONE_OF_SEVERAL = {"calls": {"domain_name"}, "call_range": {"domain_name", "from", "to"}, "call_totals": {"from", "to"}}


@each_operation
def test_what_a_query_must_have(client: Client, operation: Operation) -> None:
    required = {name for name, parameter in operation.parameters.items() if parameter.get("required")}
    response = client.send(operation.method.upper(), operation.path, query_string={"nonsense": "1"})
    either = ONE_OF_SEVERAL.get(operation.name, set())
    assert set(json.loads(response.get_json()["data"])) - {"nonsense"} == required | either


def accepts(parse: Callable[[str], Any], text: str) -> bool:
    try:
        parse(text)
    except ValueError:
        return False
    return True


def check_kind(parse: Callable[[str], Any], schema: dict[str, Any]) -> None:
    """That a parameter's schema is what its parser takes."""
    named = {
        parse_flag: {"type": "boolean"},
        parse_moment: SCHEMAS["Moment"],
        parse_month: SCHEMAS["Month"],
        parse_prefix: SCHEMAS["Prefix"],
        parse_choices: COMPONENTS["parameters"]["Direction"]["schema"],
        parse_fields: SCHEMAS["FieldList"],
        cdr_api.parse_groups: SCHEMAS["GroupList"],
        parse_uuid: {"type": "string", "format": "uuid"},
    }
    if parse in named:
        assert named[parse].items() <= schema.items()
    elif "enum" in schema and parse is not str:
        with pytest.raises(ValueError, match="must be one of") as refused:
            parse("nonsense")
        assert set(map(str, schema["enum"])) == set(str(refused.value).partition("one of ")[2].split(", "))
    elif schema["type"] == "integer":
        low, high = schema["minimum"], schema["maximum"]
        assert [accepts(parse, str(n)) for n in (low - 1, low, high, high + 1)] == [False, True, True, False]
    else:
        assert schema["type"] == "string"
        assert parse is str or parse is parse_zone


@each_operation
def test_parameters_have_the_types_of_their_parsers(operation: Operation) -> None:
    for name, parse in PARSERS.get(operation.name, {}).items():
        check_kind(parse, resolve(operation.parameters[name]["schema"]))


def test_defaults_are_what_the_code_does_without_them(client: Client) -> None:
    """Only where sending it is the same as leaving it out: generators send defaults."""
    parameters = [(o.name, name, p["schema"]) for o in OPERATIONS for name, p in o.parameters.items()]
    described = {(route, name): schema["default"] for route, name, schema in parameters if "default" in schema}
    assert {name for _, name in described} == {"by", "order", "resolution"}
    for (name, parameter), value in described.items():
        operation = BY_NAME[name]
        query = {n: p["example"] for n, p in operation.parameters.items() if "example" in p}
        there, absent = (client.get(operation.path, **query, **more) for more in ({parameter: value}, {}))
        assert there.status_code == 200
        assert there.data == absent.data


def listed(schema: str) -> list[str]:
    """The names in the pattern of a list."""
    found = re.fullmatch(r"\^\(\?:\(\?:([a-z_|0-9]+)\)\(\?:,\\b\|\$\)\)\+\$", SCHEMAS[schema]["pattern"])
    assert found
    return found[1].split("|")


def test_closed_lists_are_those_of_the_code() -> None:
    assert COMPONENTS["parameters"]["Format"]["schema"]["enum"] == list(FORMATS)
    assert listed("GroupList") == list(cdr_api.GROUPS)
    assert listed("FieldList") == [*FIELDS, *MORE_FIELDS]
    keys = [name for name in SCHEMAS["Total"]["properties"] if name not in SCHEMAS["Total"]["required"]]
    assert keys == list(cdr_api.GROUPS)


@hypothesis.settings(max_examples=200, deadline=None, database=None)
@hypothesis.given(st.lists(st.sampled_from(["billsec", "xml", "bill", "sec", ""]), max_size=4).map(",".join))
def test_a_list_of_fields_matches_its_pattern_if_it_is_taken(text: str) -> None:
    names = text.split(",")
    doubled = len(set(names)) < len(names)  # what no pattern says
    matches = bool(re.search(SCHEMAS["FieldList"]["pattern"], text))
    assert accepts(parse_fields, text) == (matches and not doubled)


MOMENT = re.compile(SCHEMAS["Moment"]["pattern"])
PARTS = [
    "2026-01-31",
    "2024-02-29",
    "T",
    "t",
    " ",
    "23",
    ":59",
    ":60",
    "24",
    ".5",
    ".1234567",
    "Z",
    "z",
    "+",
    "-",
    "15",
]
PARTS += ["16", "1769900399", "176990039", "17699003990", "0000-01-01"]


@hypothesis.settings(max_examples=500, deadline=None, database=None)
@hypothesis.given(st.from_regex(MOMENT) | st.lists(st.sampled_from(PARTS), max_size=8).map("".join))
def test_a_moment_matches_its_pattern_if_it_is_taken(text: str) -> None:
    possible = not re.search(r"0000|02-(29|30)|02-31|(04|06|09|11)-31", text)  # no pattern knows the calendar
    assert accepts(parse_moment, text) == bool(MOMENT.fullmatch(text)) or not possible


def test_a_call_has_its_fields_in_their_order_and_types() -> None:
    described = SCHEMAS["Call"]["properties"]
    assert list(described) == [*FIELDS, *MORE_FIELDS]
    kinds = {"integer": INTEGERS, "number": NUMBERS, "boolean": BOOLEANS}
    for kind, names in {**kinds, "string": STRINGS}.items():
        found = {name for name, schema in described.items() if kind in schema["type"]}
        assert found == names, kind
    never_null = {name for name, schema in described.items() if "null" not in schema["type"]}
    assert never_null == {"xml_cdr_uuid"}


def test_units_are_those_of_the_reference() -> None:
    text = API.partition("## A call\n")[2]
    found = re.findall(r"`([a-z_ ]+)`\s+in (seconds|milliseconds)", text)
    assert len(found) == 3
    for names, unit in found:
        for name in names.split():
            assert re.search(rf"\b{unit}\b", SCHEMAS["Call"]["properties"][name]["description"].lower()), name


# Statuses ---------------------------------------------------------------------

CODE = Path(cdr_api.__file__).read_text("utf-8")
PROTECTED = {name for name in BY_NAME if re.search(rf"@tokens\.login_required\ndef {name}\(", CODE)}


def test_statuses_are_those_of_the_reference_and_of_the_code() -> None:
    described = {status for operation in OPERATIONS for status in operation.responses if status >= 400}
    rows = re.findall(r"^\| (\d{3}(?:, \d{3})*) \|", ERRORS, re.MULTILINE)
    assert described == {int(status) for row in rows for status in row.split(", ")}
    code = "".join(path.read_text("utf-8") for path in SOURCES)
    assert described >= {int(status) for status in re.findall(r"ApiError\(\s*(\d{3})", code)}


@each_operation
def test_each_route_has_the_statuses_of_what_it_does(operation: Operation) -> None:
    found, names = set(operation.responses), set(operation.parameters)
    protected = operation.name in PROTECTED
    assert (operation.content.get("security", DESCRIPTION["security"]) == []) == (not protected)
    assert {400, 405, 414, 422, 429, 431, 500, 503} <= found
    assert (401 in found) == (protected or operation.name == "login")
    assert (403 in found) == ("domain_name" in names or operation.name == "register")
    assert (404 in found) == ("domain_name" in names or "{uuid}" in operation.path)
    assert ({406, 426} <= found) == ("format" in names)
    assert (410 in found) == ("cursor" in names)
    assert ({413, 415} <= found) == bool(operation.bodies)
    assert (504 in found) == bool(names & {"fields", "tz"})
    assert {status for status in found if status < 400} <= {200, 201, 304}


@each_operation
def test_each_status_has_its_headers(operation: Operation) -> None:
    for status, response in operation.responses.items():
        headers = {name: resolve(header) for name, header in response["headers"].items()}
        assert "X-Request-ID" in headers
        more = {401: "WWW-Authenticate", 405: "Allow", 426: "Upgrade", 429: "Retry-After", 503: "Retry-After"}
        if status in more:
            assert headers[more[status]]["required"]
        if status >= 400:
            (content,) = response["content"].values()
            assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
    paged = "Link" in operation.responses.get(200, {"headers": {}})["headers"]
    assert paged == ("limit" in operation.parameters)


def test_formats_have_their_media_types() -> None:
    for operation in OPERATIONS:
        if "format" in operation.parameters:
            assert set(operation.responses[200]["content"]) == {found.media_type for found in FORMATS.values()}


# Examples ---------------------------------------------------------------------


def response_examples() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Of each example of an answer its name, its value and the schema beside it."""
    for operation in OPERATIONS:
        for status, response in operation.content["responses"].items():
            for content in response.get("content", {}).values():
                for name, example in content.get("examples", {}).items():
                    yield f"{operation.name} {status} {name}", example["value"], content["schema"]
    for component in COMPONENTS["responses"].values():
        for content in component["content"].values():
            for name, example in content["examples"].items():
                yield name, example["value"], content["schema"]


EXAMPLES = {name: value for name, value, _ in response_examples()}


def test_examples_are_as_described() -> None:
    for name, value, schema in response_examples():
        assert faults(value, schema) == [], name
    for operation in OPERATIONS:
        for content in operation.bodies.values():
            for example in content["examples"].values():
                assert faults(example["value"], content["schema"]) == [], operation.name


def test_examples_of_parameters_and_headers_are_as_described() -> None:
    for path, node in walk(DESCRIPTION):
        if "schema" in node and "example" in node:
            assert faults(node["example"], node["schema"]) == [], path
        if "type" in node and isinstance(node.get("examples"), list):
            assert [faults(example, node) for example in node["examples"]] == [[]] * len(node["examples"]), path


@dataclass
class Stage:
    """Where the answers of the examples come from."""

    database: Database
    app: Flask
    client: Client
    gunicorn: Gunicorn
    make_database: DatabaseMaker


@pytest.fixture(scope="module")
def gunicorn(database: Database) -> Iterator[Gunicorn]:
    with serve(database.dsn, CDR_API_TIMEZONE="UTC") as running:
        yield running


@pytest.fixture(scope="module")
def stage(database: Database, app: Flask, client: Client, gunicorn: Gunicorn, make_database: DatabaseMaker) -> Stage:
    return Stage(database, app, client, gunicorn, make_database)


def send_raw(stage: Stage, data: bytes) -> TestResponse:
    """What gunicorn itself refuses."""
    parts = urlsplit(stage.gunicorn.url)
    with socket.create_connection((str(parts.hostname), int(parts.port or 0))) as connection:
        connection.settimeout(20)
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        response = http.client.HTTPResponse(connection)
        response.begin()
        return TestResponse([response.read()], f"{response.status} x", dict(response.headers), None)  # type: ignore[arg-type]


def body_of(name: str) -> Any:
    """The example of a body."""
    (example,) = BY_NAME[name].bodies["application/json"]["examples"].values()
    return example["value"]


def log_in(stage: Stage, body: Any = None) -> TestResponse:
    stage.client.post("/api/register", json=body_of("register"))
    stage.database.execute("TRUNCATE cdr_api.attempts")
    return Client(stage.app).post("/api/login", json=body or body_of("login"))


def log_out(stage: Stage, **options: Any) -> TestResponse:
    return stage.database.client(stage.database.account(), stage.app).post("/api/logout", **options)


def ask_as_another(stage: Stage) -> TestResponse:
    with stage.database.connect() as writer, writer.transaction():
        # As any other program of the cluster may: what it will store is not delivered, so from is earlier.
        writer.execute("SELECT txid_current()")
        first = stage.client.get("/api/call_feed", **{"from": "2026-01-01"})
    another = stage.database.client(stage.database.account(ALPHA), stage.app)
    return another.get("/api/call_feed", cursor=first.headers["X-Next-Cursor"])


def ask_for_too_many(stage: Stage) -> TestResponse:
    """A long answer, while the account has all that it may have."""
    database = stage.make_database()
    for _ in range(3):
        database.insert_call(xml="x" * 40_000)
    client = database.client(database.account(ALPHA))
    with database.connect() as connection:
        connection.execute("SELECT pg_advisory_lock(1667527680 + i, 1) FROM generate_series(1, 8) AS i")
        return client.get("/api/calls", domain_name=ALPHA)


def ask_for_nonsense(stage: Stage) -> TestResponse:
    database = stage.make_database()
    database.execute("ALTER TABLE v_xml_cdr ALTER rtp_audio_in_mos TYPE text")
    database.insert_call(rtp_audio_in_mos="not a number")
    return database.client(database.account(ALPHA)).get("/api/calls", domain_name=ALPHA)


def ask_a_view(stage: Stage) -> TestResponse:
    database = stage.make_database()
    database.execute("ALTER TABLE v_xml_cdr RENAME TO calls; CREATE VIEW v_xml_cdr AS SELECT * FROM calls")
    database.execute("GRANT SELECT ON v_xml_cdr TO cdr_api")
    return database.client(database.account(ALPHA)).get("/api/call_feed", **{"from": "2026-01-01"})


def ask_for_a_call_stored_twice(stage: Stage) -> TestResponse:
    database = stage.make_database()
    uuid = database.insert_call()
    database.execute("CREATE TABLE old (PRIMARY KEY (xml_cdr_uuid)) INHERITS (v_xml_cdr)")
    database.execute("INSERT INTO old SELECT * FROM v_xml_cdr")
    return database.client(database.account(ALPHA)).get(f"/api/calls/{uuid}")


def ask_for_too_many_legs(stage: Stage) -> TestResponse:
    database = stage.make_database()
    caller = database.insert_call()
    database.execute(
        "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_name, end_stamp, originating_leg_uuid)"
        " SELECT gen_random_uuid(), %s, '2026-02-03 10:00Z', %s FROM generate_series(1, 1000)",
        [ALPHA, caller],
    )
    return database.client(database.account(ALPHA)).get(f"/api/calls/{caller}/legs")


def ask_when_it_is_slow(stage: Stage) -> TestResponse:
    client = Client(stage.database.app(CDR_API_STATEMENT_TIMEOUT="50ms"), stage.client.token)
    with slow(stage.database.execute, 0.1):
        return client.get("/api/calls", domain_name=ALPHA)


def get(path: str, **parameters: Any) -> Callable[[Stage], TestResponse]:
    return lambda stage: stage.client.get(path, **parameters)


FEW = {"domain_name": ALPHA, "fields": "end_stamp,direction,destination_number,billsec"}
ONE = "8e65cddc-bc3b-c3af-ec1e-26f2eed41062"
JANUARY = {"from": "2026-01-01", "to": "2026-01-31"}
NOON = {"date": "2026-01-31T12", "domain_name": ALPHA}
NO_DATABASE = {"CDR_API_DSN": "host=127.0.0.1 port=9 dbname=x", "CDR_API_POOL_TIMEOUT": "500ms"}

# How each example of an answer is had.
REQUESTS: dict[str, Callable[[Stage], TestResponse]] = {
    "register 201 session": lambda stage: Client(stage.app).post("/api/register", json=body_of("register")),
    "login 200 session": log_in,
    "logout 200 logged_out": log_out,
    "logout 200 logged_out_everywhere": lambda stage: log_out(stage, json=body_of("logout")),
    "domains 200 domains": get("/api/domains"),
    "extensions 200 extensions": get("/api/extensions"),
    "calls 200 all_fields": get("/api/calls", domain_name=ALPHA, answered="true"),
    "calls 200 ndjson": get("/api/calls", **FEW, format="ndjson"),
    "calls 200 csv": get("/api/calls", **FEW, format="csv"),
    "call 200 call": get(f"/api/calls/{ONE}", fields="xml_cdr_uuid,end_stamp,billsec"),
    "call_legs 200 legs": get(f"/api/calls/{ONE}/legs", fields="xml_cdr_uuid,originating_leg_uuid"),
    "call_range 200 some_fields": get("/api/call_range", **FEW, **JANUARY),
    "call_range 200 ndjson": get("/api/call_range", **FEW, **JANUARY, format="ndjson"),
    "call_range 200 csv": get("/api/call_range", **FEW, **JANUARY, format="csv"),
    "call_feed 200 some_fields": get("/api/call_feed", **FEW, **{"from": "2026-01-01"}),
    "call_feed 200 ndjson": get("/api/call_feed", **FEW, **{"from": "2026-01-01"}, format="ndjson"),
    "call_feed 200 csv": get("/api/call_feed", **FEW, **{"from": "2026-01-01"}, format="csv"),
    "call_totals 200 totals": get("/api/call_totals", **JANUARY, group_by="domain_name,day"),
    "call_lookup 200 found": lambda stage: stage.client.post(
        "/api/call_lookup?fields=xml_cdr_uuid,billsec", json=body_of("call_lookup")
    ),
    "concurrent_calls_by_domain 200 peaks": get("/api/concurrent_calls_by_domain", **NOON, resolution=30),
    "active_calls_by_domain 200 activity": get("/api/active_calls_by_domain", **NOON, resolution=60),
    "health 200 health": get("/api/health"),
    "bad_request": lambda stage: send_raw(stage, b"GET /api/health HTTP/1.1\r\nHost: x\r\nBad Header: 1\r\n\r\n"),
    "no_token": lambda stage: Client(stage.app).get("/api/domains"),
    "wrong_login": lambda stage: log_in(stage, {"email": "nobody@example.com", "password": "wrong"}),
    "registration_closed": lambda stage: Client(stage.database.app(CDR_API_REGISTRATION="closed")).post(
        "/api/register"
    ),
    "forbidden": get("/api/calls", domain_name="beta.example.com"),
    "not_found": lambda stage: stage.database.client(stage.database.account(all_domains=True)).get(
        "/api/calls", domain_name="nowhere.example.com"
    ),
    "no_such_call": get("/api/calls/00000000-0000-4000-8000-000000000000"),
    "stored_twice": ask_for_a_call_stored_twice,
    "too_many_legs": ask_for_too_many_legs,
    "method_not_allowed": lambda stage: stage.client.post("/api/calls"),
    "not_acceptable": get("/api/calls", domain_name=ALPHA, format="xml"),
    "conflict": ask_a_view,
    "gone": ask_as_another,
    "too_large": lambda stage: stage.client.post("/api/login", data={"email": "x" * 2_000_000}),
    "uri_too_long": lambda stage: send_raw(stage, b"GET /api/health?" + b"x" * 9_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
    "unsupported": lambda stage: stage.client.post("/api/login", data="x", content_type="text/plain"),
    "unprocessable": get("/api/domains", pretty="1"),
    "upgrade": lambda stage: stage.client.send(
        "GET",
        "/api/calls",
        query_string={**FEW, "format": "csv"},
        environ_overrides={"SERVER_PROTOCOL": "HTTP/1.0"},
    ),
    "too_many": ask_for_too_many,
    "headers_too_large": lambda stage: send_raw(
        stage, b"GET /api/health HTTP/1.1\r\nHost: x\r\nA: " + b"y" * 100_000 + b"\r\n\r\n"
    ),
    "fault": ask_for_nonsense,
    "unavailable": lambda stage: Client(cdr_api.create_app({**NO_DATABASE, "CDR_API_SYSLOG": "off"})).get(
        "/api/health"
    ),
    "timed_out": ask_when_it_is_slow,
}


def test_every_example_has_a_request() -> None:
    assert sorted(REQUESTS) == sorted(EXAMPLES)


@pytest.mark.parametrize("name", REQUESTS)
def test_examples_are_real_answers(stage: Stage, name: str) -> None:
    response, example = REQUESTS[name](stage), EXAMPLES[name]
    if name.endswith("session"):  # a token, a number, the time
        assert shape(json.dumps(response.get_json())) == shape(json.dumps(example))
    elif isinstance(example, str):
        assert response.text == example
    else:
        assert response.get_json() == example


def test_real_calls_are_as_described(make_database: DatabaseMaker) -> None:
    for release in ("4.2.2", "5.2.0", "5.5.7"):
        database = make_database(release, calls=200)
        calls = database.client(database.account(ALPHA)).calls()
        assert len(calls) > 50
        assert faults(calls, {"type": "array", "items": {"$ref": "#/components/schemas/Call"}}) == []
        assert all(list(call) == list(SCHEMAS["Call"]["properties"])[:66] for call in calls)


# As it is served --------------------------------------------------------------


def test_it_is_served_with_an_etag_and_needs_no_token(app: Flask) -> None:
    client = Client(app)
    response = client.get("/api/openapi.json")
    assert response.status_code == 200
    assert response.mimetype == "application/json"
    assert response.get_json() == DESCRIPTION
    again = client.send("GET", "/api/openapi.json", headers={"If-None-Match": response.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
    assert again.headers["ETag"] == response.headers["ETag"]
    other = client.send("GET", "/api/openapi.json", headers={"If-None-Match": '"another"'})
    assert (other.status_code, other.data) == (200, response.data)


def test_it_needs_no_database() -> None:
    client = Client(cdr_api.create_app({**NO_DATABASE, "CDR_API_SYSLOG": "off"}))
    assert client.get("/api/openapi.json").status_code == 200


def served_path(app: Flask, prefix: str) -> str:
    response = Client(app).send("GET", "/api/openapi.json", headers={"X-Forwarded-Prefix": prefix})
    (server,) = response.get_json()["servers"]
    return str(server["url"])


def test_its_server_is_the_public_path_that_a_trusted_proxy_names(database: Database, app: Flask) -> None:
    assert served_path(app, "/evil") == "/api"
    trusting = database.app(CDR_API_PROXIES="1")
    assert served_path(trusting, "/cdr-api") == "/cdr-api"
    assert served_path(trusting, "") == "/api"
    assert served_path(trusting, "/a b") == "/a%20b"


@pytest.mark.skipif(not NGINX, reason="nginx is not installed (apt install nginx-light)")
@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_its_server_leads_to_the_service_behind_nginx(database: Database) -> None:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cdr-api-")))
        folder.chmod(0o755)  # nginx works as nobody
        stack.enter_context(serve(database.dsn, "--bind", f"unix:{folder}/socket", CDR_API_PROXIES="1"))
        nginx = stack.enter_context(run_nginx(folder / "socket"))
        wait_for(lambda: nginx.send(nginx.url("https", "/cdr-api/health")).status_code == 200)
        found = nginx.send(nginx.url("https", "/cdr-api/openapi.json")).get_json()
        for path in ("/health", "/openapi.json"):
            assert nginx.send(nginx.url("https", found["servers"][0]["url"] + path)).status_code == 200


# By generated requests --------------------------------------------------------


class Gate:
    """The application that generated requests go to, which is there when the tests run."""

    app: Flask

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        return self.app(environ, start_response)


GATE = Gate()
GENERATED = schemathesis.openapi.from_dict(DESCRIPTION)  # from_wsgi would leave out /openapi.json
GENERATED.app = GATE

# What no schema can say, and so a request that is as described may be refused for.
RULES = [
    r"\w+ must not be after to\.",
    r"\w+ is not a date and time that exists\.",
    r"\w+ names a (field|group) twice\.",
    r"\w+ must not hold a NUL character\.",
    r"\w+ must be valid (UTF-8|Unicode)\.",
    r"to must be at most 31 days after from\.",
    r"direction must be one value, or different ones with commas between them\.",
    r"month must be a month such as 2026-10\.",  # of the year 0
    r"name must be 1 to 255 printable characters\.",
    r"email must be an e-mail address of at most 254 ASCII characters\.",
    r"email has already been taken\.",
    r"password must (have|be|not contain) .*",
    r"all is given twice\.",
]


def make_range_possible(path: str, query: dict[str, Any]) -> None:
    """Leaves one way of naming the range."""
    ways = [name for name in ("month", "date") if name in query]
    if path == "/call_feed":
        query.setdefault("from", "2026-01-01")
    elif ways:
        for name in {"month", "date", "from", "to"} - {ways[0]}:
            query.pop(name, None)
    elif path.endswith("_by_domain"):
        query |= {"from": "2026-01-30", "to": "2026-01-31"}
    elif path in ("/call_range", "/call_totals"):
        query |= {"from": query.get("from", "2026-01-01"), "to": query.get("to", "9999-01-01")}


def make_possible(case: Any) -> None:
    """Changes a request that is as described by the rules that no schema can say."""
    query = case.query
    for name in ("after", "cursor"):  # signed
        query.pop(name, None)
    make_range_possible(case.path, query)
    if "destination_prefix" not in query.get("group_by", ""):
        query.pop("prefix_length", None)
    if query.get("format") != "csv":
        query.pop("csv_safe", None)
    if "tz" in query:
        query["tz"] = "Europe/Berlin"
    query.pop("domain_uuid", None)  # or the name, not both
    if "domain_name" in query or case.path in ("/calls", "/call_range"):
        query["domain_name"] = ALPHA
    if case.path == "/register" and isinstance(case.body, dict):
        case.body["password_confirmation"] = case.body["password"]


# The same wherever they are, and tried once.
SHARED = {"fields", "format", "csv_safe", "limit", *FILTERS}


def is_repeated(case: Any) -> bool:
    return case.path != "/calls" and getattr(case.meta.phase.data, "parameter", None) in SHARED


def check_refusal(path: str, response: Any) -> None:
    """That a request as described was refused for a rule that no schema can say, or not at all."""
    refusals = {401, 403, 422, 429} | ({404} if "{uuid}" in path else set())  # no call has a uuid by chance
    assert response.status_code < 400 or response.status_code in refusals, response.text
    if response.status_code == 422:
        for sentences in json.loads(response.json()["data"]).values():
            for sentence in sentences:
                assert any(re.fullmatch(rule, sentence, re.DOTALL) for rule in RULES), sentence


@pytest.fixture(scope="module")
def generated_database(make_database: DatabaseMaker) -> Database:
    database = make_database(calls=300, index=True)
    GATE.app = database.app(CDR_API_REGISTER_DOMAINS="*", CDR_API_TIMEZONE="UTC")
    return database


@pytest.fixture(scope="module")
def generated_token(generated_database: Database) -> str:
    return generated_database.account(ALPHA)


@GENERATED.parametrize()
@hypothesis.settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)
def test_nothing_is_outside_the_description(case: Any, generated_database: Database, generated_token: str) -> None:
    if is_repeated(case):
        return
    token = generated_database.account(ALPHA) if case.path == "/logout" else generated_token
    headers = {"Authorization": f"Bearer {token}"}
    positive = case.meta.generation.mode.is_positive
    if positive:
        make_possible(case)
    response = case.call(headers=headers)
    assert response.status_code < 500
    assert "x-request-id" in response.headers
    case.validate_response(response, headers=headers, excluded_checks=[positive_data_acceptance])
    if positive:
        check_refusal(case.path, response)


# Generated clients ------------------------------------------------------------


@pytest.fixture(scope="module")
def python_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a package that openapi-python-client made of the description."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "config.yml").write_text("post_hooks: []\n", "utf-8")
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--fail-on-warning", "--meta", "none"]
    options = ["--path", str(ROOT / "openapi.json"), "--config", "config.yml", "--output-path", "generated_client"]
    done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    sys.path.insert(0, str(folder))
    yield "generated_client"
    sys.path.remove(str(folder))


def test_a_generated_python_client_has_every_route(python_client: str) -> None:
    for operation in OPERATIONS:
        tag = operation.content["tags"][0].lower().replace(" ", "_")
        assert callable(importlib.import_module(f"{python_client}.api.{tag}.{operation.name}").sync)


@dataclass
class PythonClient:
    """The generated package, logged in."""

    package: str
    client: Any

    def function(self, name: str) -> Any:
        return importlib.import_module(f"{self.package}.api.{name}")

    def model(self, name: str) -> Any:
        return getattr(importlib.import_module(f"{self.package}.models"), name)

    def ask(self, name: str, **values: Any) -> Any:
        return self.function(name).sync(client=self.client, **values)


@pytest.fixture
def logged_in(python_client: str, stage: Stage) -> PythonClient:
    log_in(stage)  # which makes the account
    package = importlib.import_module(python_client)
    made = PythonClient(python_client, package.Client(f"{stage.gunicorn.url}/api"))
    with made.client:
        session = made.ask("accounts.login", body=made.model("Login")(**body_of("login")))
    assert session.user.email == "billing@example.com"
    made.client = package.AuthenticatedClient(f"{stage.gunicorn.url}/api", session.token)
    return made


ASKED = {"domain_name": ALPHA, "from_": "2026-01-01", "to": "2026-01-31"}


def test_a_generated_python_client_reads_calls(logged_in: PythonClient) -> None:
    with logged_in.client:
        (whole,) = logged_in.ask("calls.call_range", **ASKED, limit=1)
        assert whole.to_dict() == EXAMPLES["calls 200 all_fields"][0]
        calls = logged_in.ask("calls.call_range", **ASKED, fields="end_stamp,billsec", answered=True)
        assert [call.to_dict() for call in calls] == [{"end_stamp": "2026-01-31T12:45:10+00:00", "billsec": 61}]
        refused = logged_in.ask("calls.call_range", **ASKED | {"domain_name": "beta.example.com"})
        assert refused.message == "This account may not read this domain."


def test_a_generated_python_client_bills(logged_in: PythonClient) -> None:
    with logged_in.client as client:
        first = logged_in.function("billing.call_feed").sync_detailed(client=client, from_="2026-01-01")
        assert len(first.parsed) == 2
        assert logged_in.ask("billing.call_feed", cursor=first.headers["X-Next-Cursor"]) == []
        body = logged_in.model("Lookup").from_dict(body_of("call_lookup"))
        found = logged_in.ask("billing.call_lookup", body=body)
        assert [len(found.calls), len(found.not_found)] == [1, 1]
        assert logged_in.ask("accounts.logout", body=logged_in.model("Logout")(all_=True)).success
        assert logged_in.ask("calls.domains").message.startswith("A valid bearer token is needed")


TYPESCRIPT = """
import type { components, paths } from "./generated";

type Query = paths["/call_range"]["get"]["parameters"]["query"];
type Answer = paths["/call_range"]["get"]["responses"][200]["content"]["application/json"];
type Call = components["schemas"]["Call"];

export const query: Query = { domain_name: "alpha.example.com", from: "2026-01-01", to: "2026-01-31", answered: true };
export const seconds = (calls: Answer): number => calls.reduce((sum, call) => sum + (call.billsec ?? 0), 0);
// @ts-expect-error: a range is no number
export const wrong: Query = { domain_name: "alpha.example.com", from: 20260101 };
// @ts-expect-error: not a field of a call
export const nothing = (call: Call) => call.nothing;
"""


def run_npx(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    packages = ["--yes", "--package=openapi-typescript@7", "--package=typescript@5"]
    return subprocess.run(["npx", *packages, *command], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not shutil.which("npx"), reason="npx is not installed (apt install nodejs npm)")
def test_generated_typescript_has_the_types_of_the_description(tmp_path: Path) -> None:
    done = run_npx(tmp_path, "openapi-typescript", str(ROOT / "openapi.json"), "--output", "generated.ts")
    assert done.returncode == 0, done.stderr
    (tmp_path / "use.ts").write_text(TYPESCRIPT, "utf-8")
    done = run_npx(tmp_path, "tsc", "--strict", "--noEmit", "--skipLibCheck", "--target", "es2022", "use.ts")
    assert done.returncode == 0, done.stdout
