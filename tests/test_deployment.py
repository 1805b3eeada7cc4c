"""DEPLOYMENT.md is followed from its first command to its last, in a folder that stands for the machine's /."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import psycopg
import pytest

from tests.conftest import ROOT, SOURCES, wait_for
from tests.deployment import JAIL, read_blocks
from tests.documents import shape
from tests.machine import OF_RELEASE, Machine, PasswordNode, make_release, needs_programs, run_machine, run_node

pytestmark = pytest.mark.direct("runs a server of its own")

DOCUMENT = (ROOT / "DEPLOYMENT.md").read_text("utf-8")
BLOCKS = read_blocks(DOCUMENT)
CHECKOUT = ("1", "2", "3", "4")  # of whose steps the rest of the document makes use

# Blocks of one of the two ways through nginx.
WAYS = {
    "The set-up (3)": "port",
    "The ways through nginx": "port",
    "Without questions": "path",
    "Undoing the set-up (2)": "port",
}

PACKAGE = "needs dpkg: tests/bare_debian.py does it in a bare Debian"
NOT_RUN = {
    "The package": PACKAGE,
    "Upgrade": PACKAGE,
    "Removing the package": PACKAGE,
    "fail2ban (3)": "needs fail2ban and its rights; what its filter looks for is compared in the block before",
    "FusionPBX 4.x": "is for another release, and its index has the name of the one before",
}


@pytest.fixture
def node() -> Iterator[PasswordNode]:
    with run_node() as node:
        yield node


def run_block(machine: Machine, name: str, typed: str = "", status: int = 0) -> str:
    return machine.run(BLOCKS[name].text, typed, status)


# Steps that ask for something, or whose end is looked at ------------------------


def look_first(machine: Machine) -> None:
    """As the document shows it, but for numbers and places; and nothing is changed."""
    dump, files = machine.dump(), machine.files()
    found = run_block(machine, "The set-up").replace(str(machine.tree), "")
    assert shape(found) == shape(BLOCKS["The set-up (2)"].text)
    assert (machine.dump(), machine.files()) == (dump, files)


def set_up_with_questions(machine: Machine) -> None:
    judge_setup(machine, run_block(machine, "The set-up (3)", "port\nbilling@example.com\nalpha.example.com\ny\n"))


def set_up(machine: Machine) -> None:
    judge_setup(machine, run_block(machine, "Without questions"))


def judge_setup(machine: Machine, found: str) -> None:
    """The lines of check as the document shows them, but for versions and numbers; a token, and a first call."""
    lines, shown = re.findall("^[✓!✗] .*", found, re.MULTILINE), BLOCKS["The set-up (4)"].text.splitlines()
    assert [line[:20] for line in lines] == [line[:20] for line in shown]
    assert {line[0] for line in lines} == {"✓"}
    assert stat.filemode(machine.settings.stat().st_mode) == "-rw-r-----"
    machine.log_in(machine.read_password())
    token, call = found.splitlines()[-2:]
    machine.words["cdr_…"] = token.removeprefix("TOKEN=")
    make_the_first_call(machine, f"{token}\n{call}")


def make_the_first_call(machine: Machine, lines: str) -> None:
    """The calls of yesterday, which is another day if midnight comes in between."""
    days = [datetime.now() - timedelta(days=1)]
    calls = json.loads(machine.shell(lines))
    days.append(datetime.now() - timedelta(days=1))
    (day,) = {call["end_stamp"][:10] for call in calls}
    assert day in {f"{day:%F}" for day in days}
    query = "SELECT array_agg(xml_cdr_uuid::text ORDER BY end_stamp, xml_cdr_uuid) FROM v_xml_cdr"
    assert [call["xml_cdr_uuid"] for call in calls] == machine.node.value(f"{query} WHERE end_stamp::date = '{day}'")


def set_up_again(machine: Machine) -> None:
    """Everything is there, so it asks nothing and makes nothing."""
    dump = machine.dump()
    found = run_block(machine, "5", "y\n")
    assert found.count("(done already)") == 5
    assert "TOKEN=$(cdr-api token create EMAIL)\n" in found
    assert machine.dump() == dump


def give_a_password(machine: Machine) -> None:
    password = machine.read_password()
    run_block(machine, "A password", f"{password}\n{password}\n")
    machine.log_in(password)


def upgrade(machine: Machine) -> None:
    make_release(machine, "v2")
    run_block(machine, "Upgrade (2)")
    assert json.loads(machine.ask()) == json.loads(OF_RELEASE["v2"])


def roll_back(machine: Machine) -> None:
    run_block(machine, "Rollback")
    assert json.loads(machine.ask()) == json.loads(OF_RELEASE["v1"])


def restore(machine: Machine) -> None:
    """After a night in which role and side tables went away."""
    assert machine.status() == "200"
    machine.node.execute("DROP OWNED BY cdr_api; DROP SCHEMA cdr_api CASCADE; DROP ROLE cdr_api")
    machine.node.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'cdr_api'")
    assert machine.status() == "503"
    machine.run(f"cdr-api setup --yes --nginx {machine.way} --email other@example.com --domain alpha.example.com")
    run_block(machine, "Restore")
    wait_for(lambda: machine.status() == "200")  # the first request learns that the database is there again


def change_the_password(machine: Machine) -> None:
    old, new = machine.read_password(), "0123456789abcdef" * 3
    (machine.folder / "password").write_text(new, "ascii")
    run_block(machine, "A new database password", f"{new}\n{new}\n")
    machine.log_in(new)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        machine.log_in(old)
    assert machine.status() == "200"


def list_tokens(machine: Machine) -> None:
    (line,) = run_block(machine, "Somebody leaves, or a token leaks").splitlines()[1:]
    machine.words["revoke ID"] = f"revoke {line.split()[0]}"


def revoke_the_token(machine: Machine) -> None:
    run_block(machine, "Somebody leaves, or a token leaks (2)")
    assert machine.status() == "401"


def monitor(machine: Machine) -> None:
    assert {line["state"] for line in json.loads(run_block(machine, "Monitoring"))} == {"good"}


def find_the_failure(machine: Machine) -> None:
    """In the file where rsyslog writes it, as FusionPBX's jail looks for it."""
    line = machine.syslog.recv(4096).decode().partition(">")[2].rstrip("\0")
    (machine.tree / "var/log/auth.log").write_text(f"2026-11-23T13:48:48.635408+00:00 pbx {line}\n", "utf-8")
    assert JAIL.match(run_block(machine, "fail2ban (2)"))


def edit_the_unit(machine: Machine) -> None:
    """As systemctl edit does, and switches metrics on."""
    folder = machine.tree / "etc/systemd/system/cdr-api.service.d"
    folder.mkdir()
    (folder / "override.conf").write_text(machine.fill(BLOCKS["Metrics"].text), "utf-8")
    with (machine.tree / "etc/cdr-api/env").open("a") as file:
        file.write("CDR_API_METRICS=on\n")


def read_metrics(machine: Machine) -> None:
    assert "# TYPE cdr_api_feed_lag_seconds gauge\n" in run_block(machine, "Metrics (2)")


def undo(machine: Machine) -> None:
    """Twice, which is once."""
    run_block(machine, "Undoing the set-up", "y\n")
    again = run_block(machine, "Undoing the set-up")
    assert again.count("(done already)") == 4
    wait_for(lambda: machine.ask() == ("a page of FusionPBX" if machine.way == "path" else ""))
    # Nor was a start or a stop on the way one that the service had to be helped with.
    journal = (machine.folder / "journal").read_text("utf-8")
    assert [line for line in journal.splitlines() if re.search("Traceback|couldn't stop|SIGKILL", line)] == []


def remove(machine: Machine) -> None:
    """Twice, too."""
    for _ in range(2):
        run_block(machine, "Removing the checkout")


STEPS: dict[str, Callable[[Machine], object]] = {
    "The set-up": look_first,
    "The set-up (2)": lambda _machine: None,  # what the block before it prints
    "The set-up (3)": set_up_with_questions,
    "The set-up (4)": lambda _machine: None,  # what it prints
    "Without questions": set_up,
    "5": set_up_again,
    "A password": give_a_password,
    "Upgrade (2)": upgrade,
    "Rollback": roll_back,
    "Restore": restore,
    "A new database password": change_the_password,
    "Somebody leaves, or a token leaks": list_tokens,
    "Somebody leaves, or a token leaks (2)": revoke_the_token,
    "Monitoring": monitor,
    "fail2ban (2)": find_the_failure,
    "Metrics": edit_the_unit,
    "Metrics (2)": read_metrics,
    "Undoing the set-up": undo,
    "Removing the checkout": remove,
}


# The tests --------------------------------------------------------------------


def test_no_block_and_no_name_of_one_is_overlooked() -> None:
    assert 2 * len(BLOCKS) == len(re.findall(r"^ *(```|~~~)", DOCUMENT, re.MULTILINE))
    assert sorted({*STEPS, *WAYS, *NOT_RUN} - set(BLOCKS)) == []
    assert all(block.kind == "" or name in STEPS for name, block in BLOCKS.items())


LEFT = ("/root/cdr-api.dump", "/var/log/nginx/cdr-api.log")


@needs_programs
@pytest.mark.parametrize("way", ["path", "port"])
def test_from_the_first_command_to_the_last_and_all_is_as_before(node: PasswordNode, way: str) -> None:
    with run_machine(node, way) as machine:
        check_words(machine)
        dump, files = machine.dump(), machine.files()
        for name in (*CHECKOUT, *(name for name in BLOCKS if name not in CHECKOUT)):
            if name not in NOT_RUN and WAYS.get(name, way) == way:
                STEPS.get(name, lambda machine, name=name: run_block(machine, name))(machine)
        assert machine.dump() == dump
        found = machine.files()
    assert found == files | {name: found[name] for name in LEFT}
    assert [name for name in LEFT if name not in DOCUMENT.rpartition("\n## ")[2]] == []


def check_words(machine: Machine) -> None:
    """That the document and its files still say what stands for something else here."""
    texts = [block.text for block in BLOCKS.values()]
    texts += [path.read_text("utf-8") for path in SOURCES]
    texts += [path.read_text("utf-8") for path in ROOT.glob("deploy/*") if path.is_file()]
    assert [word for word in machine.words if not any(word in text for text in texts)] == []


# systemd ----------------------------------------------------------------------

UNIT = ROOT / "deploy/cdr-api.service"


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if not program:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run([program, "--no-pager", *arguments], check=False, capture_output=True, text=True, timeout=60)


def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path) -> None:
    program = tmp_path / "gunicorn"
    program.touch(0o755)
    (tmp_path / UNIT.name).write_text(
        UNIT.read_text("utf-8").replace("/opt/cdr-api/.venv/bin/gunicorn", str(program)), "utf-8"
    )
    done = analyze("verify", str(tmp_path / UNIT.name))
    assert (done.returncode, [line for line in done.stderr.splitlines() if UNIT.name in line]) == (0, [])


def test_systemd_counts_little_that_the_service_could_harm() -> None:
    """Its scale goes from 0 to 10; what is left is the network, and sockets."""
    done = analyze("security", "--offline=true", "--threshold=15", str(UNIT))
    if "Overall exposure level" not in done.stdout:
        pytest.skip(f"systemd-analyze cannot tell: {done.stderr}")
    assert done.returncode == 0, done.stdout
