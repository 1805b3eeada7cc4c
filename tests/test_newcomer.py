"""make run and make test for who has never seen them: any user, any folder, any environment, and what fails."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import psycopg
import pytest

import demo
from demo.__main__ import show_lines
from demo.install import REMEDIES
from tests.clients import fetch
from tests.conftest import ROOT, DatabaseMaker, answers, free_port, need, serve, wait_for

pytestmark = pytest.mark.direct("runs servers of its own")


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Not pytest's, which another run of it closes to the user that PostgreSQL runs as."""
    folder = Path(tempfile.mkdtemp(prefix="cdr-api-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


# make run ---------------------------------------------------------------------


@dataclass
class Demo:
    """make run's program, at a terminal of its own."""

    process: subprocess.Popen[bytes]
    terminal: int
    data: Path
    port: int
    shown: bytes = b""

    def shows(self, text: str) -> bool:
        """Whether it has shown a text by now, or has ended."""
        if self.process.poll() is None:
            with suppress(BlockingIOError, OSError):
                self.shown += os.read(self.terminal, 65536)
        return text.encode() in self.shown or self.process.poll() is not None

    @property
    def pids(self) -> list[int]:
        """PostgreSQL, then what else it has started."""
        assert self.process.poll() is None, self.shown.decode()
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text("ascii")
        postmaster = (self.data / "postgresql/postmaster.pid").read_text("ascii").split()[0]
        return [int(pid) for pid in (postmaster, *children.split())]

    def close_terminal(self) -> None:
        os.close(self.terminal)
        self.terminal = -1


def take_terminal() -> None:
    """As a shell that people type at does; one that runs the tests in the background lets them ignore Ctrl-C."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def run_demo(data: Path, calls: int = 10, variables: dict[str, str] | None = None) -> Iterator[Demo]:
    port = free_port()
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("CDR_API_", "PG"))}
    command = [sys.executable, "-m", "demo", "--calls", str(calls), "--data", str(data)]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environ | {"PORT": str(port)} | (variables or {}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=take_terminal,  # noqa: PLW1509 (it takes no lock that a thread may hold)
    )
    os.close(theirs)
    os.set_blocking(ours, False)
    running = Demo(process, ours, data, port)
    try:
        yield running
    finally:
        process.terminate()
        process.wait(60)
        if running.terminal >= 0:
            os.close(ours)


def has_ended(pid: int) -> bool:
    """Also what nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("stage", ["Inventing", "Ready at"])
def test_a_closed_terminal_ends_the_service_and_postgresql(tmp_path: Path, stage: str) -> None:
    """While calls are invented, and later."""
    with run_demo(tmp_path / "data", calls=500_000 if stage == "Inventing" else 10) as running:
        wait_for(lambda: running.shows(stage))
        pids = running.pids
        assert len(pids) == (1 if stage == "Inventing" else 2), running.shown
        running.close_terminal()
        assert running.process.wait(60) != 0
        wait_for(lambda: all(has_ended(pid) for pid in pids))
    assert not answers(running.port)


def test_after_a_kill_the_next_run_finds_its_data(tmp_path: Path) -> None:
    with run_demo(tmp_path / "data") as running:
        wait_for(lambda: running.shows("Ready at"))
        postmaster, service = running.pids
        running.process.kill()
        running.process.wait(60)
        os.kill(service, signal.SIGTERM)
    with run_demo(tmp_path / "data") as running:
        wait_for(lambda: running.shows("Ready at"))
        assert b"Inventing" not in running.shown
        assert running.pids[0] != postmaster
        os.write(running.terminal, b"\x03")  # Ctrl-C
        assert running.process.wait(60) == 0
    assert has_ended(postmaster)


def test_a_strange_folder_and_a_strange_environment_are_no_hindrance(tmp_path: Path) -> None:
    """A blank, a comma, a quote and another script in the path; a locale that the system lacks; settings of others."""
    strange = {"LANG": "xx_XX.UTF-8", "LC_ALL": "xx_XX.UTF-8", "PYTHONIOENCODING": "ascii", "TMPDIR": "/nowhere"}
    others = {"PGPORT": "1", "PGOPTIONS": "-c nothing=1", "PGHOST": "nowhere", "PGUSER": "nobody", "HOME": ""}
    before = os.umask(0o077)
    try:
        with run_demo(tmp_path / "It's a folder, größer", variables=strange | others) as running:
            wait_for(lambda: running.shows("Ready at"))
            assert b"Traceback" not in running.shown
            assert fetch(f"http://127.0.0.1:{running.port}/api/health").status_code == 200
    finally:
        os.umask(before)


def run_to_its_end(*options: str, **variables: str) -> str:
    """What a run says that cannot go on."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("CDR_API_")} | variables
    command = [sys.executable, "-m", "demo", "--calls", "10", *options]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1, done
    return done.stderr


def test_a_port_that_is_taken_or_is_none_is_a_sentence(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = run_to_its_end("--data", str(tmp_path), PORT=str(port))
    assert re.fullmatch(rf"Port {port} is taken by another program: choose another, as in PORT=\d+ make run\.\n", said)
    for port in ("http", "0", "65536", "٣", "-1"):
        said = run_to_its_end("--data", str(tmp_path), PORT=port)
        assert said == f"PORT must be a number from 1 to 65535, not {port!r}.\n"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_in_use_is_a_sentence(tmp_path: Path) -> None:
    with closing(Lock(tmp_path)):
        said = run_to_its_end("--data", str(tmp_path), PORT=str(free_port()))
    assert re.fullmatch(rf"make run cannot go on. .* is in use by process {os.getpid()}: stop that first\.\n", said)


class Lock:
    """Holds a demo's folder, as a run of it does."""

    def __init__(self, folder: Path) -> None:
        self.server = demo.PostgresServer(folder / "postgresql")
        self.server.take_lock()

    def close(self) -> None:
        os.close(self.server.lock)


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=60m,mode=755", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a small disk takes the right to mount it")
    try:
        said = run_to_its_end("--calls", "200000", "--data", str(tmp_path / "data"), PORT=str(free_port()))
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
    assert re.search(r"[Nn]o space left on device|is full", said)
    assert said.endswith("and start again.\n")
    assert said.count("\n") == 1


def test_a_database_of_ones_own_that_is_away_is_a_sentence() -> None:
    said = run_to_its_end(CDR_API_DSN="host=/nowhere dbname=x", PORT=str(free_port()))
    assert said.startswith("CDR_API_DSN: connection ")
    assert said.count("\n") == 1


def test_the_lines_for_a_database_of_ones_own_work_when_pasted(make_database: DatabaseMaker) -> None:
    """Nothing is to be edited: the domain is one of the database's."""
    need("curl")
    database = make_database(calls=20)
    with serve(database.dsn) as running:
        lines = show_lines(running.url, demo.DOMAINS[0], own=False).partition("terminal:\n")[2]
        lines = lines.replace(".venv/bin/", f"{quote(sys.prefix)}/bin/")
        environ = os.environ | {"CDR_API_DSN": database.dsn, "CDR_API_SYSLOG": "off"}
        done = subprocess.run(
            ["bash", "-e"], cwd=ROOT, env=environ, input=lines, capture_output=True, text=True, check=True
        )
    assert '"domain_name":"alpha.example.com"' in done.stdout
    assert done.stdout.endswith('{"message":"Logged out: this token is deleted.","success":true}\n')


# PostgreSQL -------------------------------------------------------------------


def test_a_server_leaves_nothing_that_shuts_others_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the temporary folder, which all users of a machine share, it has a folder of its own, which it removes."""
    temporary = Path(tempfile.mkdtemp(prefix="cdr-api-"))  # shorter than pytest's
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    server = demo.start_server(tmp_path / ("long" * 30) / "with a blank" / "postgresql")
    try:
        (folder,) = temporary.iterdir()
        assert server.socket == folder
        assert folder.stat().st_mode & 0o777 == 0o700
        with demo.connect(server) as connection:
            assert connection.execute("SHOW data_directory").fetchone() == (str(server.data),)
    finally:
        server.stop()
    temporary.rmdir()
    with pytest.raises(psycopg.OperationalError):
        demo.connect(server)


def test_a_server_that_cannot_start_is_a_sentence(tmp_path: Path) -> None:
    server = demo.PostgresServer(tmp_path / "postgresql")
    server.data.mkdir(mode=0o700)
    (server.data / "PG_VERSION").write_text("18\n", "ascii")
    with pytest.raises(demo.PostgresError, match=r"PostgreSQL's pg_ctl failed: \S"):
        server.start()


# Installation -----------------------------------------------------------------

PIP = """#!/bin/sh
# As pip, as far as a test needs one.
case "$*" in
  *"import pip"*) exit 0 ;;
  *speedups/build.py) echo "Without the C encoder."; exit 2 ;;
  *) printf '%s\\n' "$SAID"; exit "$STATUS" ;;
esac
"""


def install(folder: Path, said: str, status: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """The installation, by a pip that says something."""
    python = folder / "bin/python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(PIP, "ascii")
    python.chmod(0o755)
    environ = {"PATH": os.environ["PATH"], "SAID": said, "STATUS": str(status)} | variables
    command = [sys.executable, str(ROOT / "demo/install.py"), str(folder), "run"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


def test_the_installation_says_what_it_will_do_and_how_far_it_is(tmp_path: Path) -> None:
    lines = ["Collecting click==8.5.1 (from -r …)", "  Using cached click.whl", "Requirement already satisfied: flask"]
    done = install(tmp_path, "\n".join([*lines, "Installing collected packages: click"]), PORT="8123")
    plan, *shown, end, encoder = done.stdout.splitlines()
    assert done.returncode == 0
    assert re.fullmatch(r"make run: 1\. installs .* 2\. starts a PostgreSQL .* on http://127\.0\.0\.1:8123\.", plan)
    assert "a minute or two" in shown[0]
    packages = len(re.findall("==", (ROOT / "demo/requirements.txt").read_text("ascii")))
    assert shown[1:3] == [f"Installing: 1 of {packages}: click", f"Installing: 2 of {packages}: flask"]
    assert re.fullmatch(rf"Installed {packages} packages in \d+ seconds\.", end)
    assert encoder == "Without the C encoder."
    said = install(tmp_path, "", CDR_API_DSN="dbname=x").stdout
    assert "serves the database of CDR_API_DSN" in said


# What pip and venv of Python 3.11 to 3.13 say.
FAILURES = {
    "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device": "disk is full",
    "Error: [Errno 30] Read-only file system: '/srv/cdr/.venv'": "cannot be written to",
    "ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: '/x'": "cannot be written to",
    "The virtual environment was not created successfully because ensurepip is not available.": "apt install",
    "ValueError: Refusing to create a venv in /a:b because it contains the PATH separator :.": "colon",
    "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.": "not the one that was locked",
    "WARNING: Retrying (…) after connection broken by 'NewConnectionError('… [Errno -3] Temporary failure in name"
    " resolution')': /simple/click/\nERROR: No matching distribution found for click==8.5.1": "is there a network?",
    "ERROR: No matching distribution found for psycopg-binary==3.3.9": "no ready-made package",
    "pip: something new": "pip: something new",
}


@pytest.mark.parametrize("said", FAILURES)
def test_behind_a_failed_installation_stands_one_sentence(tmp_path: Path, said: str) -> None:
    done = install(tmp_path, said, 1)
    assert done.returncode == 1
    (sentence,) = done.stderr.strip().splitlines()
    assert sentence.startswith("make cannot go on. ")
    assert FAILURES[said] in sentence
    assert (tmp_path / "install.log").read_text("utf-8") == f"{said}\n"


def test_every_remedy_has_a_failure_that_needs_it() -> None:
    assert all(any(re.search(pattern, said) for said in FAILURES) for pattern in REMEDIES)


def make(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    # Nothing of a make that runs the tests.
    environ = {name: value for name, value in os.environ.items() if "MAKE" not in name} | variables
    return subprocess.run(["make", *words], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


def test_without_a_network_the_first_run_says_so(tmp_path: Path) -> None:
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_CONFIG_FILE": os.devnull, "PIP_RETRIES": "1"}
    nowhere |= {"PIP_FIND_LINKS": "", "PIP_NO_CACHE_DIR": "1"}
    done = make("run", f"VENV={tmp_path}/venv", f"PYTHON={sys.executable}", **nowhere)
    assert done.returncode != 0
    assert "is there a network?" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("make run: 1. installs")


def test_an_old_python_or_none_is_a_sentence(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.9.2\nexit 1\n', "ascii")
    old.chmod(0o755)
    for goal in ("run", "test"):
        said = make(goal, f"VENV={tmp_path}/venv", f"PYTHON={old}").stdout
        assert said.startswith("Python 3.11 or newer is needed, and this is Python 3.9.2; PYTHON=python3.12 ")
        said = make(goal, f"VENV={tmp_path}/venv", "PYTHON=python3.99").stdout
        assert said.startswith("There is no python3.99: install Python 3.11 or newer, ")


def test_without_venv_the_first_run_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "venv.py").write_text("print('ensurepip is not available'); raise SystemExit(1)", "ascii")
    environ = {"PYTHONPATH": str(tmp_path)}
    done = make("run", f"VENV={tmp_path}/none", f"PYTHON={sys.executable}", **environ)
    assert "apt install python3-venv" in done.stderr
    assert not (tmp_path / "none").exists()


def test_make_test_says_what_it_runs() -> None:
    said = make("--dry-run", "test", "VENV=.venv").stdout
    assert 'echo "Running the ' in said
