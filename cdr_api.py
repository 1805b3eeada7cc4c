"""CDR API: the calls of a FusionPBX, as JSON, for a billing system.

This is the Flask module; the engine, which knows no Flask, is the package cdr.
Read it from top to bottom, as a request goes:

    Application      create_app: settings in, the service made, handlers and routes registered
    Every request    its log entry before, headers after; what a trusted proxy in front must be
    Errors           the one envelope for everything that is not 2xx
    Parameters       what the query string and the body say
    Tenant gate      the bearer token's account, and which domains it may read
    Auth routes      register, login, logout
    Answers          calls as a stream, or in one piece if they are few
    Call routes      calls, call, call_legs, call_range, domains, extensions, feed, totals, lookup, peaks, activity
    Health           health

A route is three steps: its parameters, one named statement of queries.sql, the answer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any
from urllib.parse import quote, urlencode
from uuid import uuid4

import psycopg
from flask import Blueprint, Flask, Response, current_app, g, request
from flask_httpauth import HTTPTokenAuth
from gunicorn.http.errors import ParseException
from psycopg import sql
from werkzeug.datastructures import MIMEAccept
from werkzeug.exceptions import ClientDisconnected, HTTPException, RequestEntityTooLarge
from werkzeug.middleware.proxy_fix import ProxyFix

from cdr import accounts, feed, ranges
from cdr.accounts import UNAUTHENTICATED, Account
from cdr.clients import Client
from cdr.cursors import read_cursor, write_cursor
from cdr.database import PooledConnection
from cdr.errors import ApiError, envelope, from_database, refuse, unexpected
from cdr.legs import find_legs
from cdr.parsing import (
    ABSENT_IF_EMPTY,
    BLANKS,
    Parsers,
    integer_between,
    is_uuid,
    list_of,
    one_of,
    parse_flag,
    parse_pairs,
    parse_uuid,
    parse_uuids,
    parse_zone,
    read_json_object,
    read_pairs,
    refuse_secrets,
)
from cdr.ranges import Moment, parse_moment, parse_month
from cdr.rates import Allowance, buckets
from cdr.requestlog import Entry, read_address
from cdr.selection import (
    FIELDS,
    FILTERS,
    Domains,
    Key,
    Selection,
    compose_matching,
    escape_rows,
    find_keys,
    find_windows,
    parse_fields,
)
from cdr.service import Service
from cdr.settings import SettingError, Settings
from cdr.short import find_short
from cdr.statements import STATEMENTS, can_hold
from cdr.stream import FORMATS, CallStream, Format, Rows, copy_calls, copy_nothing, copy_page, copy_query
from cdr_admin import register_commands
from cdr_metrics import register_metrics
from cdr_pages import register_pages

# Application ------------------------------------------------------------------

api = Blueprint("api", __name__, url_prefix="/api")


def create_app(environ: Mapping[str, str] = os.environ) -> Flask:
    """The application for an environment of CDR_API_* settings.

    Ends the program with one line for a wrong setting. Connects to nothing.
    """
    try:
        settings = Settings.from_environ(environ)
    except SettingError as error:
        raise SystemExit(str(error)) from None
    app = Flask("cdr_api", static_folder=None)
    app.extensions["cdr_api"] = Service(settings)
    app.config["MAX_CONTENT_LENGTH"] = 1024 * 1024
    app.json.sort_keys = False  # type: ignore[attr-defined]
    app.url_map.merge_slashes = False
    app.register_blueprint(api)
    register_pages(app, settings)
    register_handlers(app)
    register_commands(app)
    if settings.metrics == "on":
        register_metrics(app, app.extensions["cdr_api"])
    if settings.proxies:
        n = settings.proxies
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=n, x_proto=n, x_host=n, x_prefix=n)  # type: ignore[method-assign]
    return app


def register_handlers(app: Flask) -> None:
    """What runs before and after every request, and what makes the envelope of an error."""
    app.register_error_handler(ApiError, answer_api_error)
    app.register_error_handler(HTTPException, answer_http_exception)
    app.register_error_handler(psycopg.Error, lambda error: answer_api_error(from_database(error)))
    app.register_error_handler(Exception, lambda error: answer_api_error(unexpected(error)))
    for before in (open_entry, limit_silence, examine_front, refuse_secrets_in_query):
        app.before_request(before)
    for after in (show_request_id, show_allowance, harden, share):
        app.after_request(after)


def service() -> Service:
    found: Service = current_app.extensions["cdr_api"]
    return found


# Every request ----------------------------------------------------------------


def entry() -> Entry:
    """The request's log entry, which gunicorn.conf.py closes."""
    found: Entry = request.environ["cdr_api.entry"]
    return found


def open_entry() -> None:
    """Before every request: its id, the client's if it sent a plain one."""
    given = request.headers.get("X-Request-ID", "")
    request_id = given if re.fullmatch(r"[A-Za-z0-9._=+/-]{1,128}", given) else uuid4().hex
    route = request.url_rule.rule if request.url_rule else "-"
    request.environ["cdr_api.request_log"] = service().request_log
    request.environ["cdr_api.entry"] = Entry(request_id, read_address(request.remote_addr or ""), request.method, route)


def limit_silence() -> None:
    """Before every request: a client that sends or takes nothing for so long is given up."""
    if client := request.environ.get("gunicorn.socket"):
        client.settimeout(service().settings.client_timeout / 1000)


def examine_front() -> None:
    """Before every request: whether the proxy and the server in front are set up as they should be."""
    forwarded, environ = "X-Forwarded-For" in request.headers, request.environ
    if forwarded:
        count, given = service().settings.proxies, request.headers.get("X-Forwarded-For", "").count(",") + 1
        judge_front("proxies", PROXIES, good=count > 0)
        judge_front("proxy count", PROXY_COUNT.format(count=count, given=given), good=count <= given)
        judge_front("HTTP version", HTTP_VERSION, good=environ.get("SERVER_PROTOCOL") != "HTTP/1.0")
    if "gunicorn.socket" in environ:
        judge_front("workers", SYNC_WORKER, good=environ["wsgi.multithread"])


PROXIES = "requests come through a proxy, and CDR_API_PROXIES is 0: all clients count as one address"
PROXY_COUNT = (
    "CDR_API_PROXIES is {count}, and requests come through {given}: what they say of the client is not believed"
)
HTTP_VERSION = "the proxy asks in HTTP/1.0, where a broken answer looks whole: proxy_http_version 1.1;"
SYNC_WORKER = "gunicorn runs a sync worker, which kills long answers at its time-out: use gthread"


def judge_front(name: str, text: str, *, good: bool) -> None:
    if good:
        service().settle(name)
    else:
        service().warn(name, text)


def show_request_id(response: Response) -> Response:
    response.headers["X-Request-ID"] = entry().request_id
    return response


def harden(response: Response) -> Response:
    """What is personal is not kept by caches, and JSON is not taken for a page."""
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


EXPOSED_HEADERS = (
    "Link, RateLimit-Limit, RateLimit-Remaining, RateLimit-Reset, Retry-After, "
    "X-Complete-Through, X-More-Waiting, X-Next-Cursor, X-Request-ID, X-Restart-From"
)


def share(response: Response) -> Response:
    """Lets pages of the configured origins, and of no others, read the answer (CORS)."""
    origins = service().settings.cors_origins
    if origins:
        response.vary.add("Origin")
    if request.headers.get("Origin") in origins:
        response.headers |= {
            "Access-Control-Allow-Origin": request.headers["Origin"],
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": "Authorization, Content-Type",
            "Access-Control-Expose-Headers": EXPOSED_HEADERS,
        }
    return response


# Errors -----------------------------------------------------------------------


def answer_api_error(error: ApiError) -> Response:
    return Response(envelope(error.message, error.data), error.status, error.headers, mimetype="application/json")


def answer_http_exception(error: HTTPException) -> Response:
    """The framework's own errors (404, 405, 413, …), their headers kept."""
    headers = {name: value for name, value in error.get_headers() if name not in ("Content-Type", "Content-Length")}
    message = error.description or error.name
    if error.code == 404:
        message = describe_routes()
    elif error.code == 405:
        message = f"This route does not take {request.method}: Allow names what it takes."
    return answer_api_error(ApiError(error.code or 500, message, headers=headers))


def describe_routes() -> str:
    """What to tell whoever asks for a route that is not there, such as / alone."""
    root = request.script_root or "/api"
    page = f"{root}/docs shows those that there are, " if service().settings.pages == "on" else ""
    return f"There is no such route: {page}{root}/openapi.json describes them."


# Parameters -------------------------------------------------------------------


def query_pairs() -> list[tuple[str, str]]:
    """The pairs of the request's query string, parsed once."""
    if "query_pairs" not in g:
        g.query_pairs = read_pairs(request.query_string)
    found: list[tuple[str, str]] = g.query_pairs
    return found


def refuse_secrets_in_query() -> None:
    """Before every request: a query string ends up in logs and histories."""
    refuse_secrets(query_pairs())


# What a parameter makes unnecessary.
STANDS_FOR = {"domain_uuid": {"domain_name"}, "month": {"from", "to"}}


def read_query(parsers: Parsers, required: Collection[str] = ()) -> dict[str, Any]:
    """The values of the route's parameters; ApiError 422 names everything that is wrong."""
    for name, value in query_pairs():
        if value.strip(BLANKS) or name not in ABSENT_IF_EMPTY:
            required = set(required) - STANDS_FOR.get(name, set())
    return parse_pairs(query_pairs(), parsers, required)


def read_body() -> list[tuple[str, Any]]:
    """The pairs of a JSON object or a form; 400, 415 or 422 for anything else."""
    try:
        body = request.get_data()
    except (OSError, ParseException, ClientDisconnected):
        raise ApiError(400, "The body is not what its headers say, or did not arrive in time.") from None
    # gunicorn gives what came before the client closed: a part must not pass for the whole.
    if len(body) < (request.content_length or 0):
        raise ApiError(400, "The body is shorter than its Content-Length.")
    # Of a body that does not say its length, werkzeug reads so much and no more.
    if request.content_length is None and len(body) >= current_app.config["MAX_CONTENT_LENGTH"]:
        raise RequestEntityTooLarge
    if not body:
        return []
    if request.mimetype == "multipart/form-data":
        return read_parts()
    if request.mimetype == "application/json":
        return read_json_object(body)
    if request.mimetype == "application/x-www-form-urlencoded":
        return read_pairs(body)
    raise ApiError(415, "The body must be application/json or a form; Content-Type says which.")


def read_parts() -> list[tuple[str, Any]]:
    """The parts of a form, of which some may have no name; ApiError 422 if it cannot be read."""
    pairs = [*request.form.items(multi=True), *request.files.items(multi=True)]
    if not pairs:
        raise ApiError(422, "The form cannot be read.")
    return [(name or "", value) for name, value in pairs]


# Tenant gate ------------------------------------------------------------------

tokens = HTTPTokenAuth(scheme="Bearer")


@tokens.verify_token
def verify_token(token: str) -> Account | None:
    """The account of a live token, or None."""
    account = accounts.authenticate(service(), token, read_naming(), entry().address)
    if account:
        entry().account_id = account.account_id
        limit_rate(account.token_id)
    elif token:
        service().report_failure("token", entry().address)
    return account


def limit_rate(token_id: int) -> None:
    """Counts a request of a token; ApiError 429 if there were too many. What is left stands in the answer's headers."""
    limit = service().settings.rate
    if limit:
        g.allowance = found = buckets.take(token_id, limit)
        if found.wait:
            message = f"This token may make {limit} requests a minute: wait {found.wait} seconds."
            raise ApiError(429, message, headers={"Retry-After": str(found.wait)})


def show_allowance(response: Response) -> Response:
    found: Allowance | None = g.get("allowance")
    if found:
        response.headers["RateLimit-Limit"] = str(found.limit)
        response.headers["RateLimit-Remaining"] = str(found.remaining)
        response.headers["RateLimit-Reset"] = str(found.reset)
    return response


@tokens.error_handler
def answer_unauthenticated(_status: int) -> Response:
    message = "A valid bearer token is needed: send the header Authorization: Bearer and the token."
    if request.authorization and request.authorization.token:
        message = "A valid bearer token is needed: this one is unknown, expired, revoked or not for your address."
    return answer_api_error(ApiError(401, message, headers=UNAUTHENTICATED))


def current_account() -> Account:
    account: Account = tokens.current_user()
    return account


def read_naming() -> dict[str, str]:
    """The domain that the request names, by domain_name or domain_uuid, unless that is going to be refused."""
    for name, given in query_pairs():
        value = given.strip(BLANKS)
        if name == "domain_uuid" and is_uuid(value):
            return {name: value}
        if name == "domain_name" and value and can_hold(service().domains.codec, value) and "\0" not in value:
            return {name: value}
    return {}


def read_domains(values: Mapping[str, Any], *, fresh: bool = False) -> Domains:
    """The one place that decides which domains a request may read: those that it names, or all of the account.

    Raises ApiError 403, the same for a foreign domain and for none; 404 only
    for accounts that may read all. fresh: as they are now, and not when the token was looked up.
    """
    account = current_account()
    if values["domain_name"] is None and values["domain_uuid"] is None:
        return accounts.find_domains(service(), account)
    if values["domain_name"] is not None and values["domain_uuid"] is not None:
        refuse("domain_uuid", "names the domain instead of domain_name, not beside it")
    naming = read_naming()
    if fresh and naming:
        account = accounts.find_named(service(), account, naming)
    return accounts.select_domains(service(), account, values["domain_uuid"])


# Auth routes ------------------------------------------------------------------


@api.post("/register")
def register() -> tuple[dict[str, Any], int]:
    read_query({})
    if service().settings.registration == "closed":
        raise ApiError(403, "Registration is closed: ask the operator for an account.")
    parsers: Parsers = {
        "name": accounts.parse_name,
        "email": accounts.parse_email,
        "password": str,
        "password_confirmation": str,
    }
    values = parse_pairs(read_body(), parsers, parsers)
    accounts.check_new_account(service(), values)
    return accounts.show_login(*accounts.register(service(), values, entry().address)), 201


@api.post("/login")
def login() -> dict[str, Any]:
    read_query({})
    values = parse_pairs(read_body(), {"email": str, "password": str}, {"email", "password"})
    return accounts.show_login(*accounts.log_in(service(), values["email"], values["password"], entry().address))


@api.post("/logout")
@tokens.login_required
def logout() -> dict[str, Any]:
    pairs: list[tuple[str, Any]] = [*query_pairs(), *read_body()]
    everywhere = parse_pairs(pairs, {"all": parse_flag})["all"]
    account = current_account()
    if everywhere:
        service().accounts.rows("delete_tokens", account_id=account.account_id)
        return {"message": "Logged out: every token of this account is deleted.", "success": True}
    service().accounts.rows("delete_token", token_id=account.token_id)
    return {"message": "Logged out: this token is deleted.", "success": True}


# Answers ----------------------------------------------------------------------


def choose_format(values: Mapping[str, Any]) -> Format:
    """The format of format= or Accept; ApiError 406, 422 or 426."""
    wanted = values["format"]
    if wanted is None:
        # Without the parameters of a type, such as charset.
        accepted = MIMEAccept([(name.partition(";")[0].strip(), q) for name, q in request.accept_mimetypes])
        offered = {found.media_type: name for name, found in FORMATS.items()}
        wanted = offered.get(accepted.best_match(offered) or "", "") if accepted else "json"
    if wanted not in FORMATS:
        raise ApiError(406, f"The format must be one of {', '.join(FORMATS)}.", {"format": list(FORMATS)})
    output = FORMATS[wanted]
    if not output.shows_end and request.environ.get("SERVER_PROTOCOL") == "HTTP/1.0":
        message = (
            "CSV and NDJSON are not sent over HTTP/1.0, where a broken answer looks whole. "
            "Behind nginx this takes: proxy_http_version 1.1;"
        )
        raise ApiError(426, message, headers={"Upgrade": "HTTP/1.1", "Connection": "Upgrade"})
    if output.name != "csv" and values["csv_safe"] is not None:
        refuse("csv_safe", "is for format=csv")
    return output


def client() -> Client:
    return Client(entry().address, request.environ.get("gunicorn.socket"))


def answer_stream(stream: CallStream, headers: Mapping[str, str]) -> Response:
    """A stream as a response; with its length if it is complete already."""
    entry().stream = stream
    body: bytes | CallStream = b"".join(stream) if stream.complete else stream
    content_type = stream.output.content_type
    return Response(body, 200, headers, content_type=content_type, direct_passthrough=not stream.complete)


def answer_short(calls: list[bytes], output: Format, headers: Mapping[str, str]) -> Response:
    """An answer like that of a stream, of calls that are encoded already."""
    entry().rows = len(calls)
    return Response(output.enclose(calls), 200, headers, content_type=output.content_type)


def answer_rows(
    statement: str,
    selection: Selection,
    columns: Mapping[str, bool],
    values: Mapping[str, Any],
    parameters: Mapping[str, Any] | None = None,
    **names: sql.Composable,
) -> Response:
    """The rows of a statement on matching_calls, as a stream. columns: of each whether it is text."""
    output = choose_format(values)
    with service().reading(current_account().account_id, client(), sort=True, zone=values["tz"]) as connection:
        matching_calls = compose_matching(selection.source(connection))
        query = STATEMENTS[statement].format(matching_calls=matching_calls, **names)
        if values["csv_safe"]:
            query = escape_rows(query, columns)
        all_parameters = {**selection.parameters(), **(parameters or {})}
        rows = copy_query(connection, query, all_parameters, output, columns)
        stream = CallStream(service(), connection, rows, output, list(columns), calls=False)
    return answer_stream(stream, {})


def next_url(parameter: str, cursor: str) -> str:
    """The request's own URL with another cursor, as the client would write it.

    A trusted proxy says by X-Forwarded-Prefix what its public path is for /api.
    """
    superseded = ("cursor", "from") if parameter == "cursor" else (parameter,)
    kept = [pair for pair in query_pairs() if pair[0] not in superseded]
    path = request.script_root + request.path.removeprefix("/api") if request.script_root else request.path
    scheme = "https" if request.is_secure else "http"
    origin = f"{scheme}://{request.host}" if request.host else ""
    return f"{origin}{quote(path)}?{urlencode([*kept, (parameter, cursor)])}"


def link(parameter: str, cursor: str) -> dict[str, str]:
    return {"Link": f'<{next_url(parameter, cursor)}>; rel="next"'}


# Call routes ------------------------------------------------------------------

parse_limit = integer_between(1, 100_000)
parse_by = one_of("start", "end")

DOMAIN: dict[str, Any] = {"domain_name": str, "domain_uuid": parse_uuid}
FORMAT: dict[str, Any] = {"format": str, "csv_safe": parse_flag}
CALLS: dict[str, Any] = {
    **DOMAIN,
    "tz": parse_zone,
    "fields": parse_fields,
    **FORMAT,
    "limit": parse_limit,
    "after": str,
    "order": one_of("asc", "desc"),
    "by": parse_by,
    **FILTERS,
}
RANGE: dict[str, Any] = {"from": parse_moment, "to": parse_moment, "month": parse_month}
CALL_RANGE: dict[str, Any] = {**CALLS, **RANGE}


@api.get("/calls")
@tokens.login_required
def calls() -> Response:
    values = read_query(CALLS, {"domain_name"})
    return answer_calls(values, select(values))


@api.get("/call_range")
@tokens.login_required
def call_range() -> Response:
    values = read_query(CALL_RANGE, {"domain_name", "from", "to"})
    return answer_calls(values, select_range(values))


def select(values: Mapping[str, Any], *, fresh: bool = False) -> Selection:
    """The calls of a request's domains and filters."""
    return Selection.of(read_domains(values, fresh=fresh), values, service().time_zone, service().calls.codec)


def select_range(values: Mapping[str, Any]) -> Selection:
    """The calls of a request's domains, filters and range; ApiError 422 for a wrong range."""
    start, end = ranges.find_range(*read_edges(values), read_zone(values))
    return select(values).within(start, end, values["by"] or "end")


def read_edges(values: Mapping[str, Any]) -> tuple[Moment, Moment]:
    """The first and the last moment of a request's range, however it is named; ApiError 422 unless in one way."""
    for name in ("month", "date"):
        if whole := values.get(name):
            if any(values.get(other) for other in ("from", "to", "date") if other != name):
                refuse(name, "is the whole range already: leave out from, to and any other")
            return whole, whole
    for name in ("from", "to"):
        if not values[name]:
            refuse(name, "is needed")
    return values["from"], values["to"]


def read_zone(values: Mapping[str, Any]) -> str:
    """The zone that stamps are shown in, and from and to without an offset read in."""
    return values["tz"] or service().time_zone


def answer_calls(values: Mapping[str, Any], selection: Selection) -> Response:
    """The selected calls by a request's format, fields and page: few at once, more as a stream."""
    output, fields, limit = choose_format(values), values["fields"] or FIELDS, values["limit"]
    selection = replace(selection, newest_first=values["order"] == "desc")
    account_id = current_account().account_id
    purpose = [account_id, request.path, sorted(selection.domains.uuids), selection.identity()]
    key = read_cursor(service().secret, purpose, "after", values["after"]) if values["after"] is not None else None
    parts = selection.parts(key, limit)
    _ = limit and service().secret  # before a connection is held: it may take one of its own
    if output.statement == "copy_json":
        short = find_short(service(), parts[0], fields, values["tz"])
        if short:
            return answer_short(short.calls, output, link_after(short.key, purpose))
    with service().reading(account_id, client(), sort=selection.needs_sort, zone=values["tz"]) as connection:
        rows, key = read_calls(connection, parts, values, output)
        stream = CallStream(service(), connection, rows, output, fields)
    return answer_stream(stream, link_after(key, purpose))


def link_after(key: Key | None, purpose: list[Any]) -> dict[str, str]:
    """The header that leads to the calls behind a key, if more follow."""
    return link("after", write_cursor(service().secret, purpose, key)) if key else {}


def read_calls(
    connection: PooledConnection,
    parts: Sequence[Selection],
    values: Mapping[str, Any],
    output: Format,
    page_before: timedelta | None = None,
) -> tuple[Rows, Key | None]:
    """The calls of all parts, or a page of the first; and the key that ends it, None if nothing follows."""
    fields, csv_safe = values["fields"] or FIELDS, bool(values["csv_safe"])
    if not parts[0].possible:
        return copy_nothing(connection, output, fields), None
    if not values["limit"]:
        return copy_calls(connection, parts, output, fields, csv_safe=csv_safe), None
    return copy_page(connection, find_windows(connection, parts[0], page_before), output, fields, csv_safe=csv_safe)


CALL: dict[str, Any] = {"tz": parse_zone, "fields": parse_fields, **FORMAT}


@api.get("/calls/<uuid>")
@tokens.login_required
def call(uuid: str) -> Response:
    values = read_query(CALL)
    output = choose_format(values)
    alone = replace(output, opening=b"", closing=b"\n") if output.shows_end else output
    return answer_belonging(uuid, values, alone, find_call)


def find_call(connection: PooledConnection, own: Selection) -> list[str]:
    """The uuid of the one call; ApiError 409 if it is stored more than once, which no object can tell."""
    uuids = [str(key) for _, key in find_keys(connection, own)]
    if len(uuids) > 1:
        raise ApiError(409, f"This call is stored {len(uuids)} times: call_lookup gives each of them.")
    return uuids


@api.get("/calls/<uuid>/legs")
@tokens.login_required
def call_legs(uuid: str) -> Response:
    values = read_query(CALL)
    return answer_belonging(uuid, values, choose_format(values), find_legs)


def answer_belonging(
    uuid: str,
    values: Mapping[str, Any],
    output: Format,
    find: Callable[[PooledConnection, Selection], list[str]],
) -> Response:
    """The calls whose uuids are found for a call; ApiError 404, the same for a foreign one, if there are none."""
    fields, csv_safe = values["fields"] or FIELDS, bool(values["csv_safe"])
    key = parse_uuid(uuid) if is_uuid(uuid) else None
    selection = replace(select(dict.fromkeys(CALLS)), uuids=[key] if key else [])
    with service().reading(current_account().account_id, client(), sort=True, zone=values["tz"]) as connection:
        uuids = find(connection, selection) if key else []
        if not uuids:
            raise ApiError(404, "There is no such call among those that this account may read.")
        parts = replace(selection, uuids=uuids).parts(None, None)
        stream = CallStream(
            service(), connection, copy_calls(connection, parts, output, fields, csv_safe=csv_safe), output, fields
        )
    return answer_stream(stream, {})


@api.get("/domains")
@tokens.login_required
def domains() -> Response:
    return answer_listing("select_domains", ("domain_uuid", "domain_name"), read_query(FORMAT), {})


EXTENSIONS: dict[str, Any] = {**DOMAIN, **FORMAT}
EXTENSION_COLUMNS = (
    "extension_uuid",
    "domain_uuid",
    "domain_name",
    "extension",
    "number_alias",
    "effective_caller_id_name",
)


@api.get("/extensions")
@tokens.login_required
def extensions() -> Response:
    values = read_query(EXTENSIONS)
    named = values["domain_name"] is not None or values["domain_uuid"] is not None
    uuids = list(read_domains(values).uuids) if named else None
    return answer_listing("select_extensions", EXTENSION_COLUMNS, values, {"domain_uuids": uuids})


def answer_listing(
    statement: str, names: Sequence[str], values: Mapping[str, Any], parameters: Mapping[str, Any]
) -> Response:
    """The rows of a statement about the account's domains; all columns are text."""
    output, columns, account = choose_format(values), dict.fromkeys(names, True), current_account()
    listed: sql.Composable = accounts.compose_listing(statement, apart=service().is_apart)
    query = escape_rows(listed, columns) if values["csv_safe"] else listed
    parameters = {**account.domain_parameters(), **parameters}
    with service().listing(account.account_id, client()) as connection:
        connection.execute(STATEMENTS["lock_listed"].format(listed=listed), parameters)
        rows = copy_query(connection, query, parameters, output, columns)
        stream = CallStream(service(), connection, rows, output, list(columns), calls=False)
    return answer_stream(stream, {})


FEED: dict[str, Any] = {
    "cursor": str,
    "from": parse_moment,
    **DOMAIN,
    "tz": parse_zone,
    "fields": parse_fields,
    **FORMAT,
    "limit": parse_limit,
    **FILTERS,
}


@api.get("/call_feed")
@tokens.login_required
def call_feed() -> Response:
    """The calls that became visible since the cursor, each once; how: see cdr/feed.py."""
    values = read_query(FEED)
    if (values["cursor"] is None) == (values["from"] is None):
        refuse("cursor", "is needed, or from at the first poll; not both")
    output, fields, account = choose_format(values), values["fields"] or FIELDS, current_account()
    horizon = feed.find_horizon(service())
    selection = select(values, fresh=True)  # after the horizon: a domain that has calls below it is seen
    _ = service().secret  # before a connection is held: it may take one of its own
    zone = values["tz"]
    with service().reading(account.account_id, client(), sort=True, zone=zone, elsewhere=False) as connection:
        window, is_known = feed.read_window(service(), connection, account, selection, horizon, values)
        rows, key = read_calls(connection, window.parts(values["limit"]), values, output, window.page_before)
        stream = CallStream(service(), connection, rows, output, fields)
    following = window.following(key)
    text = write_cursor(service().secret, "feed", asdict(following))
    more_waiting = "true" if window.may_be_continued(key) else "false"
    headers = {"X-Next-Cursor": text, "X-More-Waiting": more_waiting, **link("cursor", text)}
    if is_known:
        headers["X-Complete-Through"] = following.complete or following.through
    return answer_stream(stream, headers)


GROUPS = (
    "domain_name",
    "domain_uuid",
    "direction",
    "hangup_cause",
    "accountcode",
    "extension_uuid",
    "hour",
    "day",
    "month",
    "destination_prefix",
)
parse_groups = list_of(GROUPS, "group", f"; it knows {', '.join(GROUPS)}")

TOTALS: dict[str, Any] = {
    **RANGE,
    "by": parse_by,
    **DOMAIN,
    "group_by": parse_groups,
    "prefix_length": integer_between(1, 32),
    "tz": parse_zone,
    **FORMAT,
    **FILTERS,
}


USUAL_PREFIX = 3  # digits
TOTALS_COLUMNS = {"calls": False, "answered": False, "billsec": False, "billmsec": False, "digest": True}


@api.get("/call_totals")
@tokens.login_required
def call_totals() -> Response:
    values = read_query(TOTALS, {"from", "to"})
    names = values["group_by"] or ()
    if values["prefix_length"] and "destination_prefix" not in names:
        refuse("prefix_length", "is for group_by=destination_prefix")
    selection = select_range(values)
    made = {"destination_prefix": STATEMENTS["first_digits"].format()}
    keys = sql.SQL("").join(made.get(name, sql.Identifier(name)) + sql.SQL(", ") for name in names)
    listed = sql.SQL(", ").join(map(sql.Identifier, names))
    # Hours by time: as text, the two of the night in which the clocks go back would change places.
    order = sql.SQL(", ").join(
        sql.SQL("hour::timestamptz") if name == "hour" else sql.Identifier(name) for name in names
    )
    group_by = sql.SQL("GROUP BY {0} ORDER BY {1}").format(listed, order) if names else sql.SQL("")
    columns = {**dict.fromkeys(names, True), **TOTALS_COLUMNS}
    more = {"prefix_length": values["prefix_length"] or USUAL_PREFIX}
    return answer_rows("select_totals", selection, columns, values, more, keys=keys, group_by=group_by)


@api.post("/call_lookup")
@tokens.login_required
def call_lookup() -> Response:
    values = read_query({"fields": parse_fields})
    uuids = parse_pairs(read_body(), {"xml_cdr_uuid": parse_uuids}, {"xml_cdr_uuid"})["xml_cdr_uuid"]
    fields = values["fields"] or FIELDS
    selection = replace(select(dict.fromkeys(CALLS)), uuids=uuids)
    with service().reading(current_account().account_id, client(), sort=True) as connection:
        there = {uuid for _, uuid in find_keys(connection, selection)}
        not_found = json.dumps([uuid for uuid in uuids if uuid not in there], separators=(",", ":")).encode()
        output = replace(FORMATS["json"], opening=b'{"calls":[', closing=b'],"not_found":' + not_found + b"}\n")
        rows = copy_calls(connection, [selection], output, fields)
        stream = CallStream(service(), connection, rows, output, fields)
    return answer_stream(stream, {})


CONCURRENCY: dict[str, Any] = {
    "date": parse_moment,
    **RANGE,
    "resolution": one_of("1", "5", "15", "30", "60"),
    "active_only": parse_flag,
    **DOMAIN,
    "tz": parse_zone,
    **FORMAT,
    **FILTERS,
}
LONGEST_RANGE = timedelta(days=31, hours=1)  # an hour for a change of the clock
# How long after the range the end of a call that began in it is looked for.
LONGEST_CALL = timedelta(days=7)


@api.get("/concurrent_calls_by_domain")
@tokens.login_required
def concurrent_calls_by_domain() -> Response:
    columns = {"domain_name": True, "start_interval": True, "end_interval": True, "active_calls": False}
    return answer_intervals("select_peaks", columns)


@api.get("/active_calls_by_domain")
@tokens.login_required
def active_calls_by_domain() -> Response:
    texts = dict.fromkeys(("start_interval", "end_interval", "domain"), True)
    numbers = dict.fromkeys(("inbound", "outbound", "internal", "total"), False)
    return answer_intervals("select_activity", {**texts, **numbers})


def answer_intervals(statement: str, columns: Mapping[str, bool]) -> Response:
    """The rows of a statement about intervals, for the parameters of both routes."""
    values = read_query(CONCURRENCY)
    if not any(values[name] for name in ("date", *RANGE)):
        refuse("date", "is needed, or month, or from and to")
    start, until = ranges.find_range(*read_edges(values), read_zone(values))
    if until - start > LONGEST_RANGE:
        refuse("to", "must be at most 31 days after from")
    ended = ranges.clamp(lambda: until + LONGEST_CALL, ranges.LATEST)
    selection = select(values).within(start, ended, "end")
    step = 60 * int(values["resolution"] or 5)
    parameters = {"until": until.isoformat(), "step": step, "active_only": bool(values["active_only"])}
    return answer_rows(statement, selection, columns, values, parameters)


# Health -----------------------------------------------------------------------


@api.get("/health")
def health() -> dict[str, str]:
    read_query({})
    service().accounts.rows("probe_accounts")
    service().domains.rows("probe_domains")
    service().calls.rows("probe_calls")
    return {"status": "ok"}
