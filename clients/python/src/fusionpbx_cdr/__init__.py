"""A client of the CDR API for FusionPBX.

    with Client("https://pbx.example.com/api", token) as api:
        for call in api.call_range(domain_name="alpha.example.com", month="2026-01"):
            print(call["end_stamp"], call["billsec"])

Calls come one at a time, however many there are, and an answer that broke off raises BrokenAnswerError: what came of it
may be a part. 429 and 503 are waited for as long as the service says, up to patience seconds in all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypedDict

import httpx

__all__ = [
    "ActiveCalls",
    "ApiError",
    "BrokenAnswerError",
    "BusyError",
    "Call",
    "Client",
    "ConcurrentCalls",
    "CursorGoneError",
    "Domain",
    "Extension",
    "Page",
    "Total",
    "log_in",
]

LOOKUP = 10_000  # uuids that the service takes at a time


class Call(TypedDict, total=False):
    """A call: the fields that were asked for, null as None. docs/api.md says what each means."""

    xml_cdr_uuid: str
    domain_uuid: str | None
    extension_uuid: str | None
    sip_call_id: str | None
    domain_name: str | None
    accountcode: str | None
    direction: str | None
    default_language: str | None
    context: str | None
    caller_id_name: str | None
    caller_id_number: str | None
    caller_destination: str | None
    source_number: str | None
    destination_number: str | None
    start_epoch: str | None
    start_stamp: str | None
    answer_stamp: str | None
    answer_epoch: str | None
    end_epoch: str | None
    end_stamp: str | None
    duration: int
    mduration: int
    billsec: int
    billmsec: int
    bridge_uuid: str | None
    read_codec: str | None
    read_rate: str | None
    write_codec: str | None
    write_rate: str | None
    remote_media_ip: str | None
    network_addr: str | None
    record_path: str | None
    record_name: str | None
    leg: str | None
    originating_leg_uuid: str | None
    pdd_ms: int | None
    rtp_audio_in_mos: float | None
    last_app: str | None
    last_arg: str | None
    voicemail_message: bool | None
    missed_call: bool | None
    call_center_queue_uuid: str | None
    cc_side: str | None
    cc_member_uuid: str | None
    cc_queue_joined_epoch: str | None
    cc_queue: str | None
    cc_member_session_uuid: str | None
    cc_agent_uuid: str | None
    cc_agent: str | None
    cc_agent_type: str | None
    cc_agent_bridged: str | None
    cc_queue_answered_epoch: str | None
    cc_queue_terminated_epoch: str | None
    cc_queue_canceled_epoch: str | None
    cc_cancel_reason: str | None
    cc_cause: str | None
    waitsec: int | None
    conference_name: str | None
    conference_uuid: str | None
    conference_member_id: str | None
    digits_dialed: str | None
    pin_number: str | None
    hangup_cause: str | None
    hangup_cause_q850: str | None
    sip_hangup_disposition: str | None
    xml: str | None
    status: str | None
    insert_date: str | None
    update_date: str | None
    record_length: int | None
    hold_accum_seconds: int | None
    provider_uuid: str | None
    ring_group_uuid: str | None
    ivr_menu_uuid: str | None
    call_disposition: str | None
    conversation_uuid: str | None


class Domain(TypedDict):
    domain_uuid: str
    domain_name: str


class Extension(TypedDict):
    """The number of an extension_uuid of calls."""

    extension_uuid: str
    domain_uuid: str
    domain_name: str
    extension: str | None
    number_alias: str | None
    effective_caller_id_name: str | None


class Total(TypedDict, total=False):
    """A group of calls: what was grouped by, then counts and sums."""

    domain_uuid: str | None
    domain_name: str | None
    direction: str | None
    hangup_cause: str | None
    accountcode: str | None
    extension_uuid: str | None
    hour: str
    day: str
    month: str
    destination_prefix: str | None
    calls: int
    answered: int
    billsec: int
    billmsec: int
    digest: str


class ConcurrentCalls(TypedDict):
    """The peak of simultaneous calls in an interval."""

    domain_name: str | None
    start_interval: str
    end_interval: str
    active_calls: int


class ActiveCalls(TypedDict):
    """How many calls overlap an interval, by direction."""

    start_interval: str
    end_interval: str
    domain: str | None
    inbound: int
    outbound: int
    internal: int
    total: int


# What goes wrong --------------------------------------------------------------


class ApiError(Exception):
    """An answer that is not 2xx: its status, the service's sentence, and its details by parameter."""

    def __init__(self, status: int, message: str, data: dict[str, Any], request_id: str = "") -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message
        self.data = data
        self.request_id = request_id  # stands in the service's log, too


class BusyError(ApiError):
    """429 or 503, and patience has ended: try again later."""

    retry_after: int = 30


class CursorGoneError(ApiError):
    """410: the cursor cannot be continued. Poll again with restart_from; calls that you have come again."""

    restart_from: str = ""


class BrokenAnswerError(Exception):
    """An answer that did not come to its end: throw away what came of it, and ask again."""


def read_problem(response: httpx.Response) -> ApiError:
    """What an answer that is not 2xx means."""
    message, data = response.reason_phrase, {}  # all that a proxy's own page says
    try:
        body = json.loads(response.read())
        message, data = str(body["message"]), dict(json.loads(body["data"]))
    except (ValueError, KeyError, TypeError):
        pass
    kind = {410: CursorGoneError, 429: BusyError, 503: BusyError}.get(response.status_code, ApiError)
    problem = kind(response.status_code, message, data, response.headers.get("X-Request-ID", ""))
    if isinstance(problem, CursorGoneError):
        problem.restart_from = response.headers.get("X-Restart-From") or str(data.get("from", ""))
    elif isinstance(problem, BusyError):
        after = response.headers.get("Retry-After", "")
        problem.retry_after = int(after) if after.isdecimal() else BusyError.retry_after
    return problem


# Asking -----------------------------------------------------------------------


def write_query(parameters: dict[str, Any]) -> dict[str, str]:
    """Parameters as the service takes them: lists with commas, true and false, moments with their offset.

    from is a word of Python's, so it is written from_.
    """
    query = {}
    for name, value in parameters.items():
        if value is None:
            continue
        if isinstance(value, bool):
            text = "true" if value else "false"
        elif isinstance(value, list | tuple):
            text = ",".join(map(str, value))
        elif isinstance(value, datetime):
            text = value.isoformat()
        else:
            text = str(value)
        query[name.removesuffix("_")] = text
    return query


@dataclass(frozen=True)
class Page:
    """A page of the feed. Keep the calls and next_cursor together, in one transaction."""

    calls: list[Call]
    next_cursor: str
    complete_through: str | None  # everything stored up to then has been delivered
    more: bool  # poll again at once


class Client:
    """The service at a URL that ends with /api, with a token. It may be used by several threads."""

    def __init__(
        self, url: str, token: str, *, patience: float = 300, timeout: float = 600, http: httpx.Client | None = None
    ) -> None:
        self.url = url.rstrip("/")
        self.patience = patience
        self.sleep: Callable[[float], object] = time.sleep
        self._headers = {"Authorization": f"Bearer {token}"}
        # No redirect is followed: the token goes to this host only.
        self._http = http or httpx.Client(timeout=httpx.Timeout(timeout, connect=10), follow_redirects=False)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Calls

    def calls(self, **parameters: Any) -> Iterator[Call]:
        """Every call of domain_name= or domain_uuid=, with the filters, fields=, tz=, limit= of docs/api.md."""
        return self._stream("calls", parameters)

    def call_range(self, **parameters: Any) -> Iterator[Call]:
        """The calls of month=, or that ended from from_= to to=, likewise."""
        return self._stream("call_range", parameters)

    def call(self, xml_cdr_uuid: str, **parameters: Any) -> Call:
        """One call; ApiError with the status 404 if there is none that this token may read."""
        found: Call = self._read("GET", f"calls/{xml_cdr_uuid}", parameters)
        return found

    def legs(self, xml_cdr_uuid: str, **parameters: Any) -> list[Call]:
        """The legs of a call's conversation."""
        found: list[Call] = self._read("GET", f"calls/{xml_cdr_uuid}/legs", parameters)
        return found

    def look_up(self, uuids: Iterable[str], **parameters: Any) -> tuple[list[Call], list[str]]:
        """The calls of a list, and the uuids of which there is none that this token may read."""
        wanted, calls, missing = list(uuids), list[Call](), list[str]()
        for first in range(0, len(wanted), LOOKUP):
            body = {"xml_cdr_uuid": wanted[first : first + LOOKUP]}
            found = self._read("POST", "call_lookup", parameters, body)
            calls += found["calls"]
            missing += found["not_found"]
        return calls, missing

    # The feed

    def poll(self, **parameters: Any) -> Page:
        """A page of the feed: from_= the first time, then cursor=; of 10,000 calls, if limit= says nothing else."""
        query = {"limit": 10_000, **parameters, "format": "ndjson"}
        with self._ask("GET", "call_feed", query) as response:
            calls = list(read_lines(response))
            headers = response.headers
        if "X-Next-Cursor" not in headers:
            raise BrokenAnswerError("the answer has no X-Next-Cursor: is the URL that of the API?")
        more = headers.get("X-More-Waiting") == "true"
        return Page(calls, headers["X-Next-Cursor"], headers.get("X-Complete-Through"), more)

    def feed(self, cursor: str | None = None, **parameters: Any) -> Iterator[Page]:
        """Pages until nothing more is waiting; begin with the cursor that you kept, or with from_=.

        A page comes after the one before it has been dealt with, so keep its calls and next_cursor before you take
        the next. CursorGoneError says where to begin again.
        """
        start = parameters.pop("from_", None)
        more = True
        while more:
            page = self.poll(**parameters, **({"cursor": cursor} if cursor else {"from_": start}))
            yield page
            cursor, more = page.next_cursor, page.more

    # Sums

    def totals(self, **parameters: Any) -> list[Total]:
        """Counts and sums of month=, or from_= and to=, by group_by=[…], such as domain_uuid and day."""
        found: list[Total] = self._read("GET", "call_totals", parameters)
        return found

    def concurrent_calls(self, **parameters: Any) -> Iterator[ConcurrentCalls]:
        """The peaks of date=, month=, or from_= to to=, in intervals of resolution= minutes."""
        return self._stream("concurrent_calls_by_domain", parameters)

    def active_calls(self, **parameters: Any) -> Iterator[ActiveCalls]:
        """The calls that overlap each interval, by direction, likewise."""
        return self._stream("active_calls_by_domain", parameters)

    def domains(self) -> list[Domain]:
        """The domains that this token may read."""
        found: list[Domain] = self._read("GET", "domains", {})
        return found

    def extensions(self, **parameters: Any) -> list[Extension]:
        """The extensions of the domains that this token may read, or of domain_name= or domain_uuid=."""
        found: list[Extension] = self._read("GET", "extensions", parameters)
        return found

    def log_out(self, *, everywhere: bool = False) -> None:
        """Deletes the token; everywhere: every token of the account."""
        self._read("POST", "logout", {}, {"all": everywhere})

    # HTTP

    def _stream(self, route: str, parameters: dict[str, Any]) -> Iterator[Any]:
        with self._ask("GET", route, {**parameters, "format": "ndjson"}) as response:
            yield from read_lines(response)

    def _read(self, method: str, route: str, parameters: dict[str, Any], body: Any = None) -> Any:
        with self._ask(method, route, {**parameters, "format": None}, body) as response, no_part():
            return json.loads(response.read())

    @contextmanager
    def _ask(self, method: str, route: str, parameters: dict[str, Any], body: Any = None) -> Iterator[httpx.Response]:
        """An answer of 2xx, to be read within the block; waits while the service is busy."""
        patience = self.patience
        while True:
            request = self._http.build_request(
                method, f"{self.url}/{route}", params=write_query(parameters), json=body, headers=self._headers
            )
            with no_part():
                response = self._http.send(request, stream=True)
            try:
                if response.is_success:
                    yield response
                    return
                with no_part():
                    problem = read_problem(response)
            finally:
                response.close()
            if not isinstance(problem, BusyError) or problem.retry_after > patience:
                raise problem
            patience -= problem.retry_after
            self.sleep(problem.retry_after)


@contextmanager
def no_part() -> Iterator[None]:
    """What httpx says of an answer that broke off or never came, as BrokenAnswerError."""
    try:
        yield
    except (httpx.TransportError, json.JSONDecodeError) as error:
        raise BrokenAnswerError(f"no whole answer: {error!r}") from error


def read_lines(response: httpx.Response) -> Iterator[Any]:
    """The objects of an answer, one a line, as they come; BrokenAnswerError if it did not come to its end."""
    if "Content-Length" not in response.headers and "Transfer-Encoding" not in response.headers:
        raise BrokenAnswerError("HTTP/1.0: a cut could not be seen")
    rest = b""
    with no_part():
        for piece in response.iter_bytes():
            *lines, rest = (rest + piece).split(b"\n")
            yield from map(json.loads, lines)
    if rest:
        yield json.loads(rest)


def log_in(url: str, email: str, password: str) -> str:
    """A token for an account, to be kept like a password; ApiError with the status 401 if it is not accepted."""
    with no_part(), httpx.Client(timeout=60) as http:
        response = http.post(f"{url.rstrip('/')}/login", json={"email": email, "password": password})
        if not response.is_success:
            raise read_problem(response)
        return str(response.json()["token"])
