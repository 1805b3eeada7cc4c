"""DEPLOYMENT.md's commands, and what stands for the machine's programs when they are run in a folder.

The shell runs it in place of editor, systemctl and so on, as deployment.py FOLDER PROGRAM ARGUMENTS…, so it
imports nothing but the standard library. FOLDER/tree is that machine's /.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import textwrap
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

# The document -----------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    name: str  # the title above it, and a number from the second block on
    kind: str  # what stands behind the fence: nothing for commands
    text: str


# A title is a heading, a step's number, or the bold words that a paragraph begins with.
PARTS = re.compile(
    r"^ *```(?P<kind>\w*)\n(?P<text>.*?)^ *```$|^(?:#+ ([^\n]+)|(\d+)\. |\*\*([^\n]+?)[.:]?\*\*)",
    re.MULTILINE | re.DOTALL,
)


def read_blocks(document: str) -> dict[str, Block]:
    """Every fenced block by its name, in the document's order."""
    blocks: dict[str, Block] = {}
    title, number = "", 0
    for part in PARTS.finditer(document):
        if part["text"] is None:
            title, number = part[part.lastindex or 0], 0
            continue
        number += 1
        name = f"{title} ({number})" if number > 1 else title
        blocks[name] = Block(name, part["kind"], textwrap.dedent(part["text"]))
    return blocks


# The machine's programs -------------------------------------------------------

# Those of a few lines. Nobody can make users here: a user is a line in a file, and the service runs as whoever runs
# the tests. While it is another user its program's folder is closed to writing.
SHELL = {
    "adduser": 'for user; do :; done; echo "$user" >> TREE/etc/passwd',
    "apt": '[ "$1" = install ]',
    "deluser": 'grep -qx "$2" TREE/etc/passwd && sed -i "/^$2$/d" TREE/etc/passwd',
    "getent": '[ "$1" = passwd ] && grep -qx "$2" TREE/etc/passwd',
    "iptables": """
        rule="${*#-?}"
        [ "$1" = -I ] && echo "$rule" >> TREE/run/iptables && exit
        grep -qxF -- "$rule" TREE/run/iptables && sed -i "/^$rule$/d" TREE/run/iptables""",
    "netfilter-persistent": "cp TREE/run/iptables TREE/etc/iptables/rules.v4",
    "nginx": 'exec NGINX -p TREE/etc/nginx -c nginx.conf -e stderr "$@"',
    "runuser": """
        [ "$1 $3" = "-u --" ] && grep -qx "$2" TREE/etc/passwd || exit 1
        shift 3
        chmod a-w TREE/opt/cdr-api
        "$@"
        status=$?
        chmod u+w TREE/opt/cdr-api
        exit $status""",
    "sudo": """
        [ "$1 $2" = "-u postgres" ] || exit 1
        export PGHOST=PG_HOST PGPORT=PG_PORT PGUSER=postgres
        program=$3
        shift 3
        exec "PG_BIN/$program" "$@" """,
}


def install_programs(folder: Path, words: Mapping[str, str]) -> None:
    """Into FOLDER/bin; words are what the scripts above name in capitals."""
    programs = SHELL | {name: f'exec {sys.executable} -I {__file__} {folder} {name} "$@"' for name in PYTHON}
    (folder / "bin").mkdir()
    for name, text in programs.items():
        for word, other in words.items():
            text = text.replace(word, other)  # noqa: PLW2901
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{textwrap.dedent(text)}\n", "utf-8")
        (folder / "bin" / name).chmod(0o755)


INCLUDE = "    include snippets/cdr-api[.]conf;\n"


def editor(folder: Path, name: str) -> None:
    """Writes what the document tells to write into the settings: the new password."""
    before = Path(name).read_text("utf-8")
    password = (folder / "password").read_text("ascii")
    after = re.sub(r"(?<=password=)\w+", password, before)
    assert after != before, f"{name} is not as the document says"
    Path(name).write_text(after, "utf-8")


SCRIPT = """#!{python}
import sys
from importlib.metadata import entry_points

(found,) = entry_points(group="console_scripts", name="{name}")
sys.exit(found.load()())
"""


def python3(_folder: Path, *arguments: str) -> None:
    """A virtual environment that has the packages already which the tests run with: make install needs no network."""
    if arguments[0] != "demo/install.py":
        subprocess.run([sys.executable, *arguments], check=True)
        return
    made = Path(arguments[1]).absolute()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made)], check=True)
    (site,) = made.glob("lib/python*/site-packages")
    (site / "installed.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    for name in ("gunicorn",):
        script = made / "bin" / name
        script.write_text(SCRIPT.format(python=made / "bin" / "python", name=name), "utf-8")
        script.chmod(0o755)


# systemd ----------------------------------------------------------------------


def systemctl(folder: Path, action: str, *words: str) -> None:
    link = folder / "tree/etc/systemd/system/multi-user.target.wants/cdr-api.service"
    if action == "reload" and words == ("nginx",):
        os.kill(int((folder / "nginx/nginx.pid").read_text("ascii")), signal.SIGHUP)
        return
    assert action == "daemon-reload" or words[-1] == "cdr-api"
    if action == "is-enabled":
        sys.exit(not link.is_symlink())
    if action == "enable" and not link.is_symlink():
        link.symlink_to("../cdr-api.service")
    if action == "disable":
        link.unlink(missing_ok=True)
    if action in ("stop", "restart") or "--now" in words:
        stop(folder)
    if action in ("start", "restart"):
        start(folder, read_unit(folder))


def read_unit(folder: Path) -> dict[str, str]:
    """The settings of the unit and of what systemctl edit puts beside it."""
    units = folder / "tree/etc/systemd/system"
    files = [units / "cdr-api.service", *units.glob("cdr-api.service.d/*.conf")]
    lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
    return {name: value for name, sign, value in (line.partition("=") for line in lines) if sign}


def start(folder: Path, unit: Mapping[str, str]) -> None:
    """Runs the service as its unit says, until it says that it is ready."""
    (folder / "tree/run" / unit["RuntimeDirectory"]).mkdir(int(unit["RuntimeDirectoryMode"], 8))
    address = folder / "notify"
    words = shlex.split(Path(unit["EnvironmentFile"]).read_text("utf-8"), comments=True)
    settings = dict(word.split("=", 1) for word in words)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, (folder / "journal").open("ab") as journal:
        notify.bind(str(address))
        notify.settimeout(30)
        process = subprocess.Popen(
            shlex.split(unit["ExecStart"]),
            cwd=unit["WorkingDirectory"],
            env={"PATH": os.defpath, "NOTIFY_SOCKET": str(address), **settings},
            umask=int(unit["UMask"], 8),
            stdin=subprocess.DEVNULL,
            stdout=journal,
            stderr=journal,
            start_new_session=True,
        )
        (folder / "pid").write_text(str(process.pid), "ascii")
        wait_until_ready(notify)
    address.unlink()


def wait_until_ready(notify: socket.socket) -> None:
    while b"READY=1" not in notify.recv(4096):
        pass


def stop(folder: Path) -> None:
    """Ends the service, if it runs."""
    if not (folder / "pid").exists():
        return
    pid = int((folder / "pid").read_text("ascii"))
    os.kill(pid, signal.SIGTERM)
    while is_running(pid):
        time.sleep(0.02)
    (folder / "pid").unlink()
    shutil.rmtree(folder / "tree/run/cdr-api")


def is_running(pid: int) -> bool:
    """A process that has ended and not been waited for has no command line any more."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except (FileNotFoundError, ProcessLookupError):
        return False


# fail2ban ---------------------------------------------------------------------

# The pattern of FusionPBX's jail, <HOST> as fail2ban replaces it (for IPv4).
JAIL = re.compile(r".* FusionPBX: \[(?P<host>[\d.]+)\] authentication failed for")


# What SHELL starts ------------------------------------------------------------

PYTHON: dict[str, Callable[..., None]] = {"editor": editor, "python3": python3, "systemctl": systemctl}

if __name__ == "__main__":
    PYTHON[sys.argv[2]](Path(sys.argv[1]), *sys.argv[3:])
