"""The programs in examples/, run as cron would against the service as shipped."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.clients import Cable, Cut
from tests.conftest import ROOT, Database, DatabaseMaker, Gunicorn, serve

pytestmark = pytest.mark.direct("is about the clients")

ALPHA, BETA = "alpha.example.com", "beta.example.com"
TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)  # midnight
FIRST = str((TODAY - timedelta(days=30)).date())
KILLS = 12

Rows = dict[str, tuple[str, int, str]]  # by uuid: domain, billsec, end in UTC


def utc(stamp: datetime) -> str:
    return stamp.astimezone(UTC).isoformat()


def table(database: Database, *domains: str) -> Rows:
    """The calls that the PBX has of some domains."""
    rows = database.execute(
        "SELECT xml_cdr_uuid::text, domain_name, billsec, end_stamp FROM v_xml_cdr WHERE domain_name = ANY(%s)",
        [list(domains) or [ALPHA]],
    )
    return {uuid: (domain, int(billsec), utc(end)) for uuid, domain, billsec, end in rows}


def add_calls(database: Database, calls: int, domain: str = ALPHA, days: int = 20) -> None:
    """Calls that ended within so many days, one of them this day."""
    database.execute(
        "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_uuid, domain_name, end_stamp, billsec, billmsec, leg)"
        " SELECT gen_random_uuid(), md5('domain ' || %(domain)s)::uuid, %(domain)s,"
        " %(today)s - i %% %(days)s * interval '1 day' - i * interval '1 second', i %% 600, i %% 600 * 1000, 'a'"
        " FROM generate_series(1, %(calls)s) AS i",
        {"domain": domain, "today": TODAY, "days": days, "calls": calls},
    )


@dataclass
class Poller:
    """One of the two programs, with a folder and an environment of its own."""

    program: str
    folder: Path
    environ: dict[str, str]

    def command(self, *options: str, limit: int = 10_000, patience: int = 0) -> list[str]:
        if self.program == "poll_feed.sh":
            self.environ |= {"CDR_LIMIT": str(limit), "CDR_PATIENCE": str(patience)}
            return ["bash", str(ROOT / "examples/poll_feed.sh"), *options, str(self.folder)]
        numbers = ["--limit", str(limit), "--patience", str(patience)]
        return self.python("poll", "--from", self.environ["FROM"], *numbers, *options)

    def python(self, *arguments: str) -> list[str]:
        return [sys.executable, str(ROOT / "examples/poll_feed.py"), "--ledger", str(self.ledger), *arguments]

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.sqlite"

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environ, stdout=subprocess.DEVNULL, stderr=pipe, text=True)

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environ, capture_output=True, text=True, check=False, timeout=120)

    def poll(self, *options: str, status: int = 0, limit: int = 10_000) -> subprocess.CompletedProcess[str]:
        done = self.run(self.command(*options, limit=limit))
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        return done

    def through(self, url: str) -> subprocess.CompletedProcess[str]:
        """A poll by way of another URL."""
        own, self.environ["CDR_URL"] = self.environ["CDR_URL"], url
        done = self.run(self.command())
        self.environ["CDR_URL"] = own
        return done

    def reconcile(self, *options: str, status: int = 0, first: str = FIRST) -> str:
        done = self.run(self.python("reconcile", "--from", first, "--to", str(TODAY.date()), *options))
        assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        return done.stdout

    def execute(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        with closing(sqlite3.connect(self.ledger)) as ledger, ledger:
            return ledger.execute(statement, values).fetchall()

    def rows(self) -> Rows:
        if self.program == "poll_feed.sh":
            calls = self.spooled()
        elif self.ledger.exists():
            names = ("xml_cdr_uuid", "domain_name", "billsec", "end_stamp")
            found = self.execute(f"SELECT {', '.join(names)} FROM calls WHERE gone_at IS NULL")
            calls = [dict(zip(names, row, strict=True)) for row in found]
        else:
            calls = []
        return {
            call["xml_cdr_uuid"]: (
                call["domain_name"],
                call["billsec"],
                utc(datetime.fromisoformat(call["end_stamp"])),
            )
            for call in calls
        }

    def spooled(self) -> list[dict[str, Any]]:
        """The calls of the spool, those of later files last."""
        files = sorted(self.folder.glob("spool/*.ndjson"))
        return [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]


@dataclass
class Stage:
    """A database, the service on it, and a poller whose account may read alpha.example.com."""

    database: Database
    gunicorn: Gunicorn
    poller: Poller
    email: str

    def flask(self, *arguments: str) -> None:
        result = self.database.app().test_cli_runner().invoke(args=arguments)
        assert result.exit_code == 0, result.output

    def grant(self, domain: str) -> None:
        self.flask("user", "grant", self.email, domain)

    def revoke(self, domain: str) -> None:
        self.flask("user", "revoke", self.email, domain)


StageMaker = Callable[[str], Stage]


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    return make_database(index=True)


@pytest.fixture(scope="module")
def gunicorn(database: Database) -> Iterator[Gunicorn]:
    with serve(database.dsn, CDR_API_POOL_TIMEOUT="200ms") as running:
        yield running


@pytest.fixture
def make_stage(database: Database, gunicorn: Gunicorn, tmp_path: Path) -> StageMaker:
    """Makes a stage without calls, and a poller that has not polled yet."""

    def make(program: str) -> Stage:
        if program == "poll_feed.sh" and not (shutil.which("jq") and shutil.which("curl")):
            pytest.skip("poll_feed.sh needs curl and jq")
        database.execute("TRUNCATE v_xml_cdr")
        email = f"billing{next(database.numbers)}@example.com"
        token = database.account(ALPHA, email=email)
        environ = {"PATH": os.environ["PATH"], "CDR_URL": f"{gunicorn.url}/api", "CDR_TOKEN": token, "FROM": FIRST}
        return Stage(database, gunicorn, Poller(program, tmp_path, environ), email)

    return make


@pytest.fixture(params=["poll_feed.sh", "poll_feed.py"])
def stage(make_stage: StageMaker, request: Any) -> Stage:
    return make_stage(request.param)


@pytest.fixture
def python_stage(make_stage: StageMaker) -> Stage:
    return make_stage("poll_feed.py")


def test_polls_bring_every_call_the_late_and_the_changed_too(stage: Stage) -> None:
    add_calls(stage.database, 230)
    add_calls(stage.database, 5, BETA)
    stage.poller.poll(limit=100)
    assert len(stage.poller.rows()) == 230
    assert stage.poller.rows() == table(stage.database)

    late = stage.database.insert_call(end_stamp=TODAY - timedelta(days=25))
    stage.database.execute(
        "UPDATE v_xml_cdr SET billsec = 4711 WHERE xml_cdr_uuid ="
        " (SELECT xml_cdr_uuid FROM v_xml_cdr WHERE domain_name = %s ORDER BY end_stamp DESC LIMIT 1)",
        [ALPHA],
    )
    assert "2 calls" in stage.poller.poll().stdout
    assert late in stage.poller.rows()
    assert stage.poller.rows() == table(stage.database)
    assert "0 calls" in stage.poller.poll().stdout


def test_what_an_open_transaction_holds_back_comes_later(stage: Stage) -> None:
    add_calls(stage.database, 10)
    with stage.database.connect() as slow, slow.transaction():
        slow.execute(
            "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_uuid, domain_name, end_stamp, billsec)"
            " VALUES (gen_random_uuid(), md5('domain ' || %(d)s)::uuid, %(d)s, %(end)s, 7)",
            {"d": ALPHA, "end": TODAY - timedelta(days=3)},
        )
        stage.poller.poll()
        assert len(stage.poller.rows()) == 10
    stage.poller.poll()
    assert stage.poller.rows() == table(stage.database)
    assert len(stage.poller.rows()) == 11


def write_calls(database: Database, stop: threading.Event) -> None:
    """Calls that arrive until stop, in transactions of all lengths, and calls that change."""
    with database.connect() as connection:
        while not stop.is_set():
            with connection.transaction():
                for _ in range(random.randint(1, 5)):
                    connection.execute(
                        "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_uuid, domain_name, end_stamp, billsec)"
                        " VALUES (gen_random_uuid(), md5('domain ' || %(d)s)::uuid, %(d)s, %(end)s, %(b)s)",
                        {
                            "d": ALPHA,
                            "end": TODAY - timedelta(hours=random.randint(0, 500)),
                            "b": random.randint(0, 99),
                        },
                    )
                stop.wait(random.uniform(0, 0.2))
            connection.execute(
                "UPDATE v_xml_cdr SET billsec = billsec + 1 WHERE xml_cdr_uuid ="
                " (SELECT xml_cdr_uuid FROM v_xml_cdr TABLESAMPLE BERNOULLI (1) LIMIT 1)"
            )


@contextmanager
def traffic(database: Database) -> Iterator[None]:
    stop = threading.Event()
    writers = [threading.Thread(target=write_calls, args=[database, stop]) for _ in range(3)]
    for writer in writers:
        writer.start()
    try:
        yield
    finally:
        stop.set()
        for writer in writers:
            writer.join()


def test_a_poller_that_is_killed_again_and_again_loses_nothing(stage: Stage) -> None:
    begun = time.monotonic()
    stage.poller.poll()
    span = time.monotonic() - begun  # of a run that finds nothing
    add_calls(stage.database, 2000)
    kills = 0
    with traffic(stage.database):
        while kills < KILLS or not stage.poller.rows():
            assert kills < 10 * KILLS, "no run stored anything"
            with stage.poller.start(stage.poller.command(limit=40)) as process:
                try:
                    process.wait(timeout=random.uniform(0, 3 * span))
                except subprocess.TimeoutExpired:
                    process.kill()
            assert process.returncode in (0, -9), process.returncode
            kills += process.returncode == -9
    stage.poller.poll(limit=40)
    stage.poller.poll()
    assert stage.poller.rows() == table(stage.database)


def test_two_runs_at_once_do_not_get_in_each_others_way(stage: Stage) -> None:
    add_calls(stage.database, 500)
    runs = [stage.poller.start(stage.poller.command(limit=50)) for _ in range(4)]
    for process in runs:
        with process:
            assert process.wait(60) == 0
    assert stage.poller.rows() == table(stage.database)


def test_a_cursor_that_is_gone_stops_the_poller_until_it_may_begin_again(stage: Stage) -> None:
    add_calls(stage.database, 30)
    add_calls(stage.database, 5, BETA)
    stage.poller.poll()
    before = stage.poller.rows()
    stage.grant(BETA)
    assert "--resync" in stage.poller.poll(status=3).stderr or stage.poller.program == "poll_feed.py"
    assert stage.poller.rows() == before
    assert "Beginning again" in stage.poller.poll("--resync").stderr
    assert stage.poller.rows() == table(stage.database, ALPHA, BETA)
    assert "0 calls" in stage.poller.poll("--resync").stdout


def test_a_token_that_is_refused_changes_nothing(stage: Stage) -> None:
    add_calls(stage.database, 3)
    stage.poller.poll()
    before = stage.poller.rows()
    add_calls(stage.database, 3)
    good = stage.poller.environ["CDR_TOKEN"]
    stage.poller.environ["CDR_TOKEN"] = "cdr_unknown"
    assert "401" in stage.poller.poll(status=4).stderr
    assert stage.poller.rows() == before
    stage.poller.environ["CDR_TOKEN"] = good
    stage.poller.poll()
    assert stage.poller.rows() == table(stage.database)


def test_the_first_poll_needs_to_know_where_to_begin(stage: Stage) -> None:
    del stage.poller.environ["FROM"]
    command = stage.poller.command() if stage.poller.program == "poll_feed.sh" else stage.poller.python("poll")
    assert stage.poller.run(command).returncode == 2
    stage.poller.environ["FROM"] = "yesterday"
    assert "422" in stage.poller.poll(status=6).stderr


def test_a_busy_service_is_waited_for_as_long_as_it_says(stage: Stage) -> None:
    add_calls(stage.database, 3)
    stage.poller.poll()
    add_calls(stage.database, 3)
    name = stage.database.name
    with psycopg.connect(stage.database.server.get_uri(), autocommit=True) as admin:
        admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        try:
            assert "503" in stage.poller.poll(status=5).stderr
            process = stage.poller.start(stage.poller.command(patience=60))
            assert process.stderr
            assert "Waiting 5 s" in process.stderr.readline()
        finally:
            admin.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
    with process:
        assert process.wait(60) == 0
    assert stage.poller.rows() == table(stage.database)


CUTS: dict[str, Cut] = {
    "in the status line": lambda answer: answer[:10],
    "in a header": lambda answer: answer[: answer.lower().index(b"x-next-cursor") + 40],
    "behind a header": lambda answer: answer[: answer.index(b"\r\n", answer.lower().index(b"x-next-cursor")) + 2],
}
CUTS_OF_CALLS: dict[str, Cut] = {
    "in the end of the head": lambda answer: answer[: answer.index(b"\r\n\r\n") + 2],
    "behind the head": lambda answer: answer[: answer.index(b"\r\n\r\n") + 4],
    "in the middle": lambda answer: answer[: len(answer) // 2],
    "behind a line": lambda answer: answer[: answer.rindex(b"}\n", 0, len(answer) - 20) + 2],
    # The last chunk is 0\r\n\r\n; behind its first three bytes the calls are whole.
    "before the end": lambda answer: answer[:-5] if b"chunked" in answer else answer[:-1],
}


@pytest.mark.parametrize("calls", [0, 10, 2000], ids=["empty", "with a length", "in chunks"])
def test_of_an_answer_that_was_cut_nothing_is_kept(stage: Stage, calls: int) -> None:
    add_calls(stage.database, calls)
    for name, cut in (CUTS | CUTS_OF_CALLS if calls else CUTS).items():
        cable = Cable(stage.gunicorn.url, cut)
        with cable.laid() as url:
            done = stage.poller.through(url)
        assert (done.returncode, stage.poller.rows()) == (5, {}), (name, done.stderr)
        assert (b"chunked" in cable.answer) == (calls == 2000)
    stage.poller.poll()
    assert stage.poller.rows() == table(stage.database)


def test_the_token_is_on_no_command_line(stage: Stage) -> None:
    add_calls(stage.database, 3)
    cable = Cable(stage.gunicorn.url, lambda answer: answer)
    with cable.laid() as url:
        assert stage.poller.through(url).returncode == 0
    assert stage.poller.rows() == table(stage.database)
    (seen,) = cable.seen
    assert stage.poller.program in seen
    assert stage.poller.environ["CDR_TOKEN"] not in seen


def test_a_poll_that_crashed_before_its_cursor_was_kept_repeats_the_same_file(make_stage: StageMaker) -> None:
    stage = make_stage("poll_feed.sh")
    add_calls(stage.database, 10)
    stage.poller.poll()
    before = (stage.poller.folder / "cursor").read_text("ascii")
    add_calls(stage.database, 5)
    stage.poller.poll()
    (stage.poller.folder / "cursor").write_text(before, "ascii")
    add_calls(stage.database, 2)
    stage.poller.poll()
    files = sorted(stage.poller.folder.glob("spool/*"))
    assert [len(file.read_text("utf-8").splitlines()) for file in files] == [10, 7]
    assert not list(stage.poller.folder.glob("tmp.*"))


def test_reconcile_repairs_a_ledger_that_was_damaged(python_stage: Stage) -> None:
    stage = python_stage
    add_calls(stage.database, 500)
    stage.poller.poll()
    assert "equals" in stage.poller.reconcile()
    right = stage.poller.rows()
    missing, changed, moved, *_ = sorted(right)
    stage.poller.execute("DELETE FROM calls WHERE xml_cdr_uuid = ?", (missing,))
    stage.poller.execute("UPDATE calls SET billsec = billsec + 60 WHERE xml_cdr_uuid = ?", (changed,))
    stage.poller.execute("UPDATE calls SET ended = '2099' || substr(ended, 5) WHERE xml_cdr_uuid = ?", (moved,))
    extra = "ffffffff-0000-4000-8000-000000000001"
    stage.poller.execute(
        "INSERT INTO calls (xml_cdr_uuid, domain_name, billsec, billmsec, end_stamp, ended)"
        " VALUES (?, ?, 9, 9000, ?, ?)",
        (extra, ALPHA, f"{FIRST}T12:00:00+00:00", f"{FIRST}T12:00:00.000000Z"),
    )
    said = stage.poller.reconcile()
    assert "0 added or corrected, 0 moved elsewhere, 1 gone" in said
    assert stage.poller.rows() == right
    assert stage.poller.execute("SELECT count(*) FROM calls WHERE gone_at IS NOT NULL") == [(1,)]
    assert said.count("\n") <= 5, "only the days that differ were read again"
    assert stage.poller.reconcile().startswith("The ledger equals the PBX")


def test_reconcile_finds_what_the_feed_cannot_know(python_stage: Stage) -> None:
    """Calls that were deleted, moved to another day or out of the range, or stored later than the feed looks back."""
    stage = python_stage
    add_calls(stage.database, 50)
    stage.poller.poll()
    deleted, moved, away, *_ = sorted(stage.poller.rows())
    stage.database.execute("DELETE FROM v_xml_cdr WHERE xml_cdr_uuid = %s", [deleted])
    for uuid, days in ((moved, 1), (away, 200)):
        stage.database.execute(
            "UPDATE v_xml_cdr SET end_stamp = end_stamp - %s * interval '1 day' WHERE xml_cdr_uuid = %s", [days, uuid]
        )
    stage.database.insert_call(end_stamp=TODAY - timedelta(days=80))
    stage.poller.reconcile(first=str((TODAY - timedelta(days=90)).date()))
    assert stage.poller.rows() == table(stage.database)
    assert stage.poller.execute("SELECT xml_cdr_uuid FROM calls WHERE gone_at IS NOT NULL") == [(deleted,)]


@pytest.mark.parametrize("zone", ["America/Caracas", "Asia/Kolkata", "Pacific/Auckland"])
def test_reconcile_agrees_about_the_days_of_a_zone(python_stage: Stage, zone: str) -> None:
    stage = python_stage
    add_calls(stage.database, 300, days=28)
    for seconds in (-0.000001, 0, 0.000001):
        for hours in range(-12, 13):
            stage.database.insert_call(end_stamp=TODAY - timedelta(days=4, hours=hours, seconds=seconds))
    stage.poller.poll()
    assert stage.poller.reconcile("--tz", zone).startswith("The ledger equals")
    stage.poller.execute("DELETE FROM calls WHERE rowid % 7 = 0")
    assert "The ledger equals" in stage.poller.reconcile("--tz", zone, "--domain", ALPHA)
    assert stage.poller.rows() == table(stage.database)


def test_a_domain_that_is_gone_is_told_once_and_its_calls_stay(python_stage: Stage) -> None:
    """Deleted in FusionPBX, or taken from the account, which a client cannot tell apart: the month can be closed."""
    stage = python_stage
    stage.grant(BETA)
    add_calls(stage.database, 20)
    add_calls(stage.database, 20, BETA, days=2)
    stage.poller.poll()
    stage.revoke(BETA)
    assert "10 gone" in stage.poller.reconcile()
    assert "gone" not in stage.poller.reconcile()
    gone = "SELECT count(*) FROM calls WHERE gone_at IS NOT NULL"
    assert stage.poller.execute(gone) == [(20,)]
    stage.grant(BETA)
    assert "10 added or corrected" in stage.poller.reconcile()
    assert stage.poller.execute(gone) == [(0,)]
    assert stage.poller.rows() == table(stage.database, ALPHA, BETA)


def test_a_renamed_domain_is_the_same_domain(python_stage: Stage) -> None:
    stage = python_stage
    add_calls(stage.database, 20)
    stage.poller.poll()
    rename = "UPDATE v_domains SET domain_name = %s WHERE domain_name = %s"
    stage.database.execute(rename, ["new.example.com", ALPHA])
    try:
        assert stage.poller.reconcile().startswith("The ledger equals the PBX")
    finally:
        stage.database.execute(rename, [ALPHA, "new.example.com"])


GONE = "99999999-0000-4000-8000-000000000000"  # of a domain that was deleted
# What is stored of calls of no domain: several names with one domain_uuid, names with none, and neither.
STRAYS: list[tuple[str | None, str | None]] = [
    (GONE, "gone.example.com"),
    (GONE, "203.0.113.5"),
    (GONE, None),
    (GONE, ""),
    (GONE, ALPHA),
]
STRAYS += [(None, "gone.example.com"), (None, "twin.example.com"), (None, ""), (None, None)]


@contextmanager
def domains_as_they_were(database: Database) -> Iterator[None]:
    """Whatever is done to v_domains within is undone."""
    database.execute("CREATE TABLE saved AS TABLE v_domains")
    try:
        yield
    finally:
        database.execute("DELETE FROM v_domains")
        database.execute("INSERT INTO v_domains SELECT * FROM saved")
        database.execute("DROP TABLE saved")


def add_strays(database: Database) -> None:
    for number, (uuid, name) in enumerate(STRAYS * 2):
        end = TODAY - timedelta(days=2 + number % 2, hours=number)
        database.insert_call(domain_uuid=uuid, domain_name=name, end_stamp=end, billsec=number, billmsec=number * 1000)


def test_calls_of_no_domain_are_compared_and_repaired_for_who_reads_everything(python_stage: Stage) -> None:
    stage = python_stage
    stage.grant("*")
    add_calls(stage.database, 20)
    add_strays(stage.database)
    stage.database.execute(
        "INSERT INTO v_domains (domain_uuid, domain_name)"
        " SELECT gen_random_uuid(), 'twin.example.com' FROM generate_series(1, 2)"
    )
    stage.poller.poll()
    assert stage.poller.reconcile().startswith("The ledger equals the PBX")
    before = stage.poller.execute("SELECT * FROM calls ORDER BY 1")
    assert len(before) == 20 + 2 * len(STRAYS)
    stage.poller.execute("DELETE FROM calls WHERE billsec % 2 = 0")
    stage.poller.execute("UPDATE calls SET billsec = billsec + 60 WHERE billsec % 3 = 0")
    assert "The ledger equals the PBX" in stage.poller.reconcile()
    assert stage.poller.execute("SELECT * FROM calls ORDER BY 1") == before
    stage.poller.execute("DELETE FROM calls WHERE domain_name = 'gone.example.com'")
    assert "The ledger equals the PBX" in stage.poller.reconcile("--domain", "gone.example.com")
    assert stage.poller.execute("SELECT * FROM calls ORDER BY 1") == before
    stage.database.execute("DELETE FROM v_domains WHERE domain_name = 'twin.example.com'")


@pytest.mark.parametrize("options", [(), ("--domain", ALPHA)])
@pytest.mark.parametrize("calls", ["deleted", "left behind"])
@pytest.mark.parametrize("grant", [ALPHA, "*"])
def test_a_domain_that_was_deleted_leaves_a_month_that_can_be_closed(
    python_stage: Stage, grant: str, calls: str, options: tuple[str, ...]
) -> None:
    """Whether or not its calls went with it, and also when its name is named, or was given to another domain."""
    stage = python_stage
    stage.grant(grant)
    add_calls(stage.database, 40, days=2)
    stage.database.execute("UPDATE v_xml_cdr SET domain_name = '203.0.113.5' WHERE billsec % 4 = 0")
    stage.poller.poll()
    stored = stage.poller.execute("SELECT xml_cdr_uuid, billsec FROM calls ORDER BY 1")
    all_gone = calls == "deleted" or grant != "*"
    with domains_as_they_were(stage.database):
        stage.database.execute("DELETE FROM v_domains WHERE domain_name = %s", [ALPHA])
        if calls == "deleted":
            stage.database.execute("DELETE FROM v_xml_cdr WHERE domain_name IN (%s, '203.0.113.5')", [ALPHA])
        said = stage.poller.reconcile(*options)
        assert len(re.findall(r"\b20 gone", said)) == (2 if all_gone else 0), said
        assert said.endswith(f"equals the PBX from {FIRST} to {TODAY.date()}.\n")
        assert stage.poller.reconcile(*options).startswith("The ledger equals")
        stage.database.execute(
            "INSERT INTO v_domains (domain_uuid, domain_name) VALUES (gen_random_uuid(), %s)", [ALPHA]
        )
        if grant == "*":
            stage.database.insert_call(
                domain_uuid=stage.database.execute("SELECT domain_uuid FROM v_domains WHERE domain_name = %s", [ALPHA])[
                    0
                ][0],
                end_stamp=TODAY - timedelta(days=1),
                billsec=7,
                billmsec=7000,
            )
        assert "The ledger equals" in stage.poller.reconcile(*options)
        assert stage.poller.reconcile(*options).startswith("The ledger equals")
    gone = stage.poller.execute("SELECT count(*) FROM calls WHERE gone_at IS NOT NULL")
    assert gone == [(40 if all_gone else 0,)]
    assert set(stored) <= set(stage.poller.execute("SELECT xml_cdr_uuid, billsec FROM calls")), "what was made stays"


def test_a_ledger_with_two_names_of_one_domain_is_compared_by_its_uuid(python_stage: Stage) -> None:
    """As a rename leaves it, under both names and under none."""
    stage = python_stage
    add_calls(stage.database, 30)
    stage.poller.poll()
    with domains_as_they_were(stage.database):
        stage.database.execute("UPDATE v_domains SET domain_name = 'new.example.com' WHERE domain_name = %s", [ALPHA])
        add_calls(stage.database, 10)
        stage.poller.poll()
        names = stage.poller.execute("SELECT DISTINCT domain_name FROM calls ORDER BY 1")
        assert names == [(ALPHA,), ("new.example.com",)]
        assert stage.poller.reconcile().startswith("The ledger equals the PBX")
        for name in (ALPHA, "new.example.com"):
            assert "The ledger equals the PBX" in stage.poller.reconcile("--domain", name)
        assert stage.poller.execute("SELECT DISTINCT domain_name, gone_at FROM calls") == [("new.example.com", None)]


def test_a_domain_that_nobody_knows_is_told(python_stage: Stage) -> None:
    stage = python_stage
    add_calls(stage.database, 3)
    stage.poller.poll()
    for name in ("nowhere", BETA):
        assert stage.poller.reconcile("--domain", name, status=4) == ""
    stage.grant(BETA)
    assert stage.poller.reconcile("--domain", BETA).startswith("The ledger equals")


def test_a_reconciliation_that_was_cut_keeps_nothing(python_stage: Stage) -> None:
    stage = python_stage
    add_calls(stage.database, 20, days=1)
    with Cable(stage.gunicorn.url, lambda answer: answer[:-1] if b"ndjson" in answer else answer).laid() as url:
        stage.poller.environ["CDR_URL"] = url
        stage.poller.reconcile(status=5)
    assert stage.poller.rows() == {}
