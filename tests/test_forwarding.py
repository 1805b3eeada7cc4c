"""examples/forward_feed.py: calls into files, webhooks and meters, by the rules of those who take them.

The sinks are servers of the tests' own that refuse what the engine refuses (for Lago: getlago/lago-api,
Events::CreateBatchService; for OpenMeter and Standard Webhooks: their documents).
"""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import hmac
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, Database, DatabaseMaker, Gunicorn, serve

pytestmark = pytest.mark.direct("is about the clients")

ALPHA, BETA = "alpha.example.com", "beta.example.com"
TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
FIRST = str((TODAY - timedelta(days=60)).date())
KEY = b"a key of thirty-two bytes or so."
SECRET = f"whsec_{base64.b64encode(KEY).decode()}"
KILLS = 6

Reply = tuple[int, str]


# Sinks ------------------------------------------------------------------------


@dataclass
class Sink:
    """A server that takes calls by an engine's rules, and fails now and then if it is told to."""

    faulty: bool = False  # every fourth request gets no good answer, although it may have been taken
    taken: int = 0
    refusals: list[str] = field(default_factory=list)
    uses: dict[str, tuple[str, int]] = field(default_factory=dict)  # by id: customer and seconds

    def take(self, path: str, headers: Any, body: bytes) -> Reply:
        raise NotImplementedError

    def answer(self, path: str, headers: Any, body: bytes) -> Reply | None:
        """None: the connection ends without an answer."""
        self.taken += 1
        if self.faulty and self.taken % 4 == 0:
            if self.taken % 3 == 0:
                return 503, "later"
            self.take(path, headers, body)  # it has it, and does not get to say so
            return None if self.taken % 3 == 1 else (500, "failed behind it")
        status, text = self.take(path, headers, body)
        if status >= 400:
            self.refusals.append(f"{status} {text}")
        return status, text

    def totals(self) -> Counter[str]:
        """Seconds by customer, as a meter with the aggregation sum shows them."""
        found: Counter[str] = Counter()
        for customer, seconds in self.uses.values():
            found[customer] += seconds
        return found

    @contextmanager
    def listening(self) -> Iterator[str]:
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if (found := sink.answer(self.path, self.headers, body)) is None:
                    return
                self.send_response(found[0])
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(found[1])))
                self.end_headers()
                self.wfile.write(found[1].encode())

            def log_message(self, *_: object) -> None:
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=[0.01])
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_address[1]}"
            finally:
                server.shutdown()
                thread.join()


@dataclass
class Receiver(Sink):
    """Verifies as Standard Webhooks says, and takes each id once."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    bodies: dict[str, bytes] = field(default_factory=dict)

    def take(self, path: str, headers: Any, body: bytes) -> Reply:
        name, stamp = headers["webhook-id"], headers["webhook-timestamp"]
        signed = base64.b64encode(hmac.digest(KEY, f"{name}.{stamp}.".encode() + body, hashlib.sha256)).decode()
        if headers["webhook-signature"] != f"v1,{signed}" or abs(time.time() - int(stamp)) > 300:
            return 401, "signature"
        if self.bodies.setdefault(name, body) is not body:
            return (200, "again") if self.bodies[name] == body else (409, "another body under the same id")
        self.calls += json.loads(body)["data"]
        return 204, ""


@dataclass
class LagoApi(Sink):
    """Takes a batch as a whole or not at all."""

    def take(self, path: str, headers: Any, body: bytes) -> Reply:
        if path != "/api/v1/events/batch" or headers["Authorization"] != f"Bearer {SECRET}":
            return 401, "{}"
        events = json.loads(body)["events"]
        if not 1 <= len(events) <= 100:
            return 422, json.dumps({"error_details": {"events": ["too_many_events"]}})
        errors = {}
        for place, event in enumerate(events):
            float(event["timestamp"])
            assert event["code"] == "call_seconds"
            if event["transaction_id"] in self.uses:
                errors[str(place)] = {"transaction_id": ["value_already_exist"]}
        if errors:
            return 422, json.dumps({"status": 422, "code": "validation_errors", "error_details": errors})
        for event in events:
            seconds = event["properties"]["billsec"]
            self.uses[event["transaction_id"]] = (event["external_subscription_id"], seconds)
        return 200, "{}"


@dataclass
class OpenMeterApi(Sink):
    """Takes what is not yet there, by source and id, and says nothing of the rest."""

    def take(self, path: str, headers: Any, body: bytes) -> Reply:
        if path != "/api/v1/events" or headers["Content-Type"] != "application/cloudevents-batch+json":
            return 400, "{}"
        for event in json.loads(body):
            assert event["specversion"] == "1.0"
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00", event["time"])
            assert event["type"] == "call_seconds"
            self.uses.setdefault(f"{event['source']} {event['id']}", (event["subject"], event["data"]["billsec"]))
        return 204, ""


# The program ------------------------------------------------------------------


@dataclass
class Forwarder:
    folder: Path
    environ: dict[str, str]
    sink: list[str]  # the end of the command line
    options: tuple[str, ...] = ()

    def command(self, *more: str) -> list[str]:
        program, ledger = str(ROOT / "examples/forward_feed.py"), str(self.folder / "ledger.sqlite")
        numbers = ["--from", FIRST, "--limit", "150", *self.options, *more]
        return [sys.executable, program, "--ledger", ledger, *numbers, *self.sink]

    def run(self, *more: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*more), env=self.environ, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        return done

    def reconcile(self) -> str:
        program, ledger = str(ROOT / "examples/poll_feed.py"), str(self.folder / "ledger.sqlite")
        days = ["--from", FIRST, "--to", str(TODAY.date())]
        command = [sys.executable, program, "--ledger", ledger, *self.options, "reconcile", *days]
        done = subprocess.run(command, env=self.environ, capture_output=True, text=True, check=True)
        return done.stdout

    def kill_often(self, database: Database) -> None:
        """Starts runs and kills them at random points while calls come and change; the last comes to its end."""
        begun = time.monotonic()
        self.run()
        span, kills = time.monotonic() - begun, 0
        while kills < KILLS:
            add_calls(database, 60)
            database.execute("UPDATE v_xml_cdr SET billsec = billsec + 7 WHERE random() < 0.05")
            database.execute("UPDATE v_xml_cdr SET accountcode = 'changed' WHERE random() < 0.05")
            quiet, begun = subprocess.DEVNULL, time.monotonic()
            with subprocess.Popen(self.command(), env=self.environ, stdout=quiet, stderr=quiet) as process:
                try:
                    process.wait(random.uniform(0, span))
                    span = min(span, time.monotonic() - begun)
                except subprocess.TimeoutExpired:
                    process.kill()
            assert process.returncode in (0, -9)
            kills += process.returncode == -9
        self.run()


def add_calls(database: Database, calls: int, domain: str = ALPHA) -> None:
    database.execute(
        "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_uuid, domain_name, end_stamp, billsec, leg, destination_number)"
        " SELECT gen_random_uuid(), md5('domain ' || %(domain)s)::uuid, %(domain)s,"
        "        now() - random() * interval '20 days', i %% 600, 'a', '0030, \"' || i"
        "   FROM generate_series(1, %(calls)s) AS i",
        {"domain": domain, "calls": calls},
    )


State = dict[str, tuple[int, str]]  # by uuid: seconds and account code


def stored(database: Database) -> State:
    rows = database.execute("SELECT xml_cdr_uuid::text, billsec::int, coalesce(accountcode, '') FROM v_xml_cdr")
    return {uuid: (seconds, code) for uuid, seconds, code in rows}


def replay(calls: list[dict[str, Any]]) -> State:
    """What a ledger has in which a later revision replaces an earlier; no revision comes twice, none is left out."""
    found: State = {}
    revisions: Counter[str] = Counter()
    for call in calls:
        revisions[call["xml_cdr_uuid"]] += 1
        assert int(call["revision"]) == revisions[call["xml_cdr_uuid"]]
        found[call["xml_cdr_uuid"]] = (int(call["billsec"]), call["accountcode"] or "")
    return found


def read_file(file: Path) -> list[dict[str, Any]]:
    data = file.read_bytes()
    text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
    return list(csv.DictReader(text.splitlines()))


def read_files(folder: Path) -> list[dict[str, Any]]:
    """The calls of the files, in the order of their names."""
    return [call for file in sorted(folder.glob("calls-*")) for call in read_file(file)]


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    return make_database(index=True)


@pytest.fixture(scope="module")
def gunicorn(database: Database) -> Iterator[Gunicorn]:
    with serve(database.dsn) as running:
        yield running


Maker = Callable[..., Forwarder]


@pytest.fixture
def make(database: Database, gunicorn: Gunicorn, tmp_path: Path) -> Maker:
    """Makes a program that hands calls on to a sink, and 300 calls."""
    database.execute("TRUNCATE v_xml_cdr")
    add_calls(database, 300)
    token = database.account(ALPHA, BETA)
    environ = {"PATH": os.environ["PATH"], "CDR_URL": f"{gunicorn.url}/api", "CDR_TOKEN": token}
    (tmp_path / "out").mkdir()

    def make(*sink: str, options: tuple[str, ...] = ()) -> Forwarder:
        return Forwarder(tmp_path, environ | {"SINK_SECRET": SECRET}, list(sink), options)

    return make


# Each once, and again when it changed -----------------------------------------


def test_files_have_each_call_once_however_often_the_program_is_killed(
    database: Database, make: Maker, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    forwarder = make("csv", str(folder), "--gzip")
    forwarder.kill_often(database)
    assert replay(read_files(folder)) == stored(database)
    assert not list(folder.glob(".*")), "nothing unfinished is left"
    files = len(list(folder.iterdir()))
    forwarder.run()
    assert len(list(folder.iterdir())) == files, "nothing new, no file"


def test_a_file_that_was_taken_away_does_not_come_again(database: Database, make: Maker, tmp_path: Path) -> None:
    """Whoever imports it may remove it before the program knows that it is there."""
    folder, calls = tmp_path / "out", list[dict[str, Any]]()
    forwarder = make("csv", str(folder))
    stop = threading.Event()

    def take_away() -> None:
        while not stop.wait(0.001):
            for file in sorted(folder.glob("calls-*")):
                calls.extend(read_file(file))
                file.unlink()

    taker = threading.Thread(target=take_away)
    taker.start()
    try:
        forwarder.kill_often(database)
    finally:
        stop.set()
        taker.join()
    calls.extend(read_files(folder))
    assert replay(calls) == stored(database)


def test_a_webhook_gets_each_call_under_an_id_that_stays(database: Database, make: Maker) -> None:
    receiver = Receiver(faulty=True)
    with receiver.listening() as url:
        make("webhook", f"{url}/calls").kill_often(database)
    assert receiver.refusals == []
    assert replay(receiver.calls) == stored(database)


@pytest.mark.parametrize("kind", [LagoApi, OpenMeterApi])
def test_meters_have_the_seconds_of_the_pbx(database: Database, make: Maker, kind: type[Sink]) -> None:
    """What changed is added or taken back, for meters never replace."""
    add_calls(database, 40, BETA)
    sink, name = kind(faulty=True), "lago" if kind is LagoApi else "openmeter"
    with sink.listening() as url:
        forwarder = make(name, f"{url}/api/v1", "--metric", "call_seconds")
        forwarder.kill_often(database)
        database.execute("UPDATE v_xml_cdr SET billsec = 0 WHERE domain_name = %s", [BETA])
        forwarder.run()
    if kind is OpenMeterApi:
        assert sink.refusals == []
    assert all('["value_already_exist"]' in refusal for refusal in sink.refusals)
    query = "SELECT domain_uuid::text, sum(billsec)::int FROM v_xml_cdr GROUP BY 1"
    assert dict(sink.totals()) == dict(database.execute(query))


# What each takes --------------------------------------------------------------


def test_a_file_is_what_importers_take(database: Database, make: Maker, tmp_path: Path) -> None:
    """CGRateS: the first cell names the header line, usage has a unit (a bare number is nanoseconds), stamps RFC 3339.

    Splynx: a name is never used again, and a file never changes.
    """
    folder = tmp_path / "out"
    forwarder = make("csv", str(folder))
    forwarder.run()
    add_calls(database, 5)
    forwarder.run()
    first, *_ = files = sorted(folder.iterdir())
    assert len(files) >= 3
    assert all(re.fullmatch(r"calls-\d{8}T\d{6}Z-[0-9a-f]{6}-\d{9}\.csv", file.name) for file in files)
    assert first.read_text("utf-8").startswith("xml_cdr_uuid,domain_uuid,")
    (call,) = read_files(folder)[:1]
    assert call["usage"] == f"{call['billsec']}s"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?[+-]\d\d:\d\d", call["end_stamp"])
    assert call["destination_number"].startswith('0030, "')
    again = make("csv", str(folder))
    (tmp_path / "ledger.sqlite").unlink()
    again.run()
    assert set(folder.iterdir()) > set(files), "also a new ledger takes other names"


def test_what_reconcile_repairs_is_handed_on(database: Database, make: Maker, tmp_path: Path) -> None:
    """A call that the feed does not find; one that was deleted stays, for it was made."""
    folder = tmp_path / "out"
    forwarder = make("csv", str(folder), options=("--filter", "leg=a"))
    forwarder.run()
    database.insert_call(leg="b", end_stamp=TODAY - timedelta(days=3))
    late = database.insert_call(end_stamp=TODAY - timedelta(days=59), billsec=11)
    ((gone,),) = database.execute(
        "DELETE FROM v_xml_cdr WHERE ctid = (SELECT min(ctid) FROM v_xml_cdr) RETURNING xml_cdr_uuid::text"
    )
    assert "equals" in forwarder.reconcile()
    forwarder.run()
    found = replay(read_files(folder))
    assert late in found
    assert gone in found
    assert len(found) == 301
    assert "equals" in forwarder.reconcile()


def test_a_ledger_that_was_polled_before_is_handed_on_whole(database: Database, make: Maker, tmp_path: Path) -> None:
    forwarder = make("csv", str(tmp_path / "out"))
    program, ledger = str(ROOT / "examples/poll_feed.py"), str(tmp_path / "ledger.sqlite")
    command = [sys.executable, program, "--ledger", ledger, "poll", "--from", FIRST]
    subprocess.run(command, env=forwarder.environ, check=True, stdout=subprocess.DEVNULL)
    forwarder.run()
    assert replay(read_files(tmp_path / "out")) == stored(database)


def test_a_call_of_no_customer_is_told_and_holds_nothing_up(database: Database, make: Maker) -> None:
    sink = LagoApi()
    with sink.listening() as url:
        forwarder = make("lago", f"{url}/api/v1", "--metric", "call_seconds", "--customer", "accountcode")
        database.execute("UPDATE v_xml_cdr SET accountcode = 'acme' WHERE billsec > 100")
        done = forwarder.run()
        assert "calls have no accountcode" in done.stderr
        assert set(sink.totals()) == {"acme"}
        database.execute("UPDATE v_xml_cdr SET accountcode = 'other' WHERE billsec > 200")
        forwarder.run()
    query = "SELECT accountcode, sum(billsec)::int FROM v_xml_cdr WHERE accountcode <> '' GROUP BY 1"
    assert dict(sink.totals()) == dict(database.execute(query)), "a call that changed hands is taken back first"


# What fails -------------------------------------------------------------------


def test_a_sink_that_refuses_or_is_away_holds_the_cursor(database: Database, make: Maker) -> None:
    """Nothing is dropped: it comes when the sink takes it."""
    receiver = Receiver()
    with receiver.listening() as url:
        forwarder = make("webhook", url)
        forwarder.environ["SINK_SECRET"] = "whsec_AAAA"
        assert "401 signature" in forwarder.run(status=6).stderr
        assert receiver.taken == 1
    assert "try again later" in forwarder.run("--patience", "0", status=5).stderr
    with receiver.listening() as url:
        make("webhook", url).run()
    assert replay(receiver.calls) == stored(database)


def test_wrong_use_is_told(make: Maker, tmp_path: Path) -> None:
    assert "is no folder" in make("csv", str(tmp_path / "none")).run(status=2).stderr
    forwarder = make("webhook", "https://billing.example.com")
    forwarder.environ["SINK_SECRET"] = "not base64!"
    assert "Standard Webhooks" in forwarder.run(status=2).stderr
    forwarder.environ["SINK_SECRET"] = ""
    assert "SINK_SECRET" in forwarder.run(status=2).stderr
    forwarder.environ["CDR_TOKEN"] = ""
    assert "CDR_TOKEN" in forwarder.run(status=2).stderr


def test_two_runs_at_once_do_not_send_twice(database: Database, make: Maker, tmp_path: Path) -> None:
    forwarder = make("csv", str(tmp_path / "out"))
    runs = [subprocess.Popen(forwarder.command(), env=forwarder.environ, stderr=subprocess.DEVNULL) for _ in range(3)]
    assert {process.wait(60) for process in runs} <= {0, 5}
    forwarder.run()
    assert replay(read_files(tmp_path / "out")) == stored(database)
