"""flask check: an operator's mistakes are made, the line that is read is pasted into a root shell, and all is good."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from cdr.remedies import Place, explain_failure
from cdr.settings import SettingError, read_environment
from cdr_api import create_app
from tests.commands import flask
from tests.conftest import ROOT, wait_for
from tests.machine import Machine, install_program, needs_programs, run_machine, run_node

pytestmark = pytest.mark.direct("runs a server of its own")

SETUP = "cdr-api setup --yes --nginx path --email billing@example.com --domain alpha.example.com"


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    """A PBX with everything set up."""
    with run_node() as node, run_machine(node, "path") as machine:
        install_program(machine)
        machine.shell(SETUP)
        yield machine


def complaints(machine: Machine) -> list[str]:
    """The lines of cdr-api check that say ✗, or what it says instead of lines."""
    output = machine.shell("cdr-api check 2>&1 || true")
    return [line for line in output.splitlines() if not line.startswith(("✓", "!"))]


def look(machine: Machine) -> list[str]:
    """The same in this process, which takes less time."""
    app = create_app({**read_environment(machine.settings), "CDR_API_SYSLOG": "off"})
    return [line for line in flask(app, "check").output.splitlines() if not line.startswith(("✓", "!"))]


def paste(machine: Machine, line: str) -> None:
    """Runs what a line says is to be run; what that asks for is confirmed."""
    remedy = line.partition("; run ")[2] or line.partition("Run ")[2]
    assert remedy, line
    machine.shell(remedy, "y\n")


@contextmanager
def changed(path: Path, old: str, new: str) -> Iterator[None]:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")
    try:
        yield
    finally:
        if old not in path.read_text("utf-8"):
            path.write_text(text, "utf-8")


MOVE = """
CREATE SCHEMA pbx; GRANT USAGE ON SCHEMA pbx TO cdr_api;
ALTER TABLE v_xml_cdr SET SCHEMA pbx; ALTER TABLE v_domains SET SCHEMA pbx
"""
# As FusionPBX makes it, whatever of it was mended in another way.
AS_BEFORE = """
GRANT USAGE ON SCHEMA public TO PUBLIC; GRANT CONNECT ON DATABASE fusionpbx TO PUBLIC;
ALTER TABLE IF EXISTS pbx.v_xml_cdr SET SCHEMA public; ALTER TABLE IF EXISTS pbx.v_domains SET SCHEMA public;
DROP SCHEMA IF EXISTS pbx; ALTER ROLE cdr_api IN DATABASE fusionpbx RESET search_path
"""
# What is wrong by SQL: how it is made, and how the one line begins that is read then.
BY_SQL = {
    "no right to read": ("REVOKE SELECT ON v_xml_cdr FROM cdr_api", "✗ role               cdr_api may not read"),
    "a right to write": ("GRANT UPDATE ON v_domains TO cdr_api", "✗ role               cdr_api may write v_xml_cdr or"),
    "no right in our schema": ("REVOKE USAGE ON SCHEMA cdr_api FROM cdr_api", "✗ side tables        permission denied"),
    "older side tables": ("UPDATE cdr_api.version SET version = 0", "✗ side tables        version 0 instead of"),
    "no right to use public": (
        "REVOKE USAGE ON SCHEMA public FROM PUBLIC",
        "✗ CDR_API_DSN        cdr_api may not use the schema public, where v_xml_cdr is",
    ),
    "another schema": (
        MOVE,
        "✗ CDR_API_DSN        v_xml_cdr is in the schema pbx, where cdr_api does not look",
    ),
    "no right to connect": (
        "REVOKE CONNECT ON DATABASE fusionpbx FROM PUBLIC",
        "✗ CDR_API_DSN        connection failed: .* permission denied for database",
    ),
    "another password": (
        "ALTER ROLE cdr_api PASSWORD 'another'",
        "✗ CDR_API_DSN        connection failed: .* password authentication failed",
    ),
    "no login": ("ALTER ROLE cdr_api NOLOGIN", "✗ CDR_API_DSN        connection failed: .* is not permitted to log in"),
    "row security": (
        "ALTER TABLE v_domains ENABLE ROW LEVEL SECURITY",
        "✗ domains            query would be affected by row-level security",
    ),
    "no key": ("ALTER TABLE v_xml_cdr DROP CONSTRAINT v_xml_cdr_pkey", "✗ key                v_xml_cdr has no primary"),
    "no index": ("DROP INDEX cdr_api_calls", "✗ index              no index serves ranges"),
}


@needs_programs
@pytest.mark.parametrize("name", BY_SQL)
def test_what_is_wrong_in_the_database_is_mended_by_the_line(machine: Machine, name: str) -> None:
    statement, start = BY_SQL[name]
    machine.node.execute(statement)
    lines = look(machine)
    try:
        paste(machine, lines[0])
        assert look(machine) == []
    finally:
        machine.node.execute(AS_BEFORE)
    assert re.match(start, lines[0]), lines


@needs_programs
def test_a_login_that_pg_hba_forbids_is_mended_by_the_line(machine: Machine) -> None:
    node = machine.node
    with changed(node.data / "pg_hba.conf", "host all all", "host fusionpbx nobody"):
        node.execute("SELECT pg_reload_conf()")
        (line,) = look(machine)
        assert 'no pg_hba.conf entry for host "127.0.0.1", user "cdr_api", database "fusionpbx"' in line
        paste(machine, line)
        wait_for(lambda: look(machine) == [])
    node.execute("SELECT pg_reload_conf()")


# What is wrong in the settings file: old text, new text, and what the one line says.
IN_SETTINGS: dict[str, tuple[str, str, str]] = {
    "another database": ("dbname=fusionpbx", "dbname=postgres", "the database postgres has none of FusionPBX's tables"),
    "no such database": ("dbname=fusionpbx", "dbname=fusion", 'database "fusion" does not exist'),
    "no such host": ("host=127.0.0.1", "host=pbx.invalid", "failed to resolve host"),
    "a socket that is not there": ("host=127.0.0.1", "host=/nowhere", "No such file or directory"),
    "a quotation mark that does not close": ('"\n', "\n", "line 4 (CDR_API_DSN) is wrong: a setting must be one line"),
    "a word that is no setting": ("CDR_API_PROXIES=1", "CDR_API_PROXIES 1", "is wrong: a setting must be one line"),
    "a wrong value": ("CDR_API_WORKERS=2", "CDR_API_WORKERS=two", "CDR_API_WORKERS must be a whole number"),
}


@needs_programs
@pytest.mark.parametrize("name", IN_SETTINGS)
def test_what_is_wrong_in_the_settings_is_the_one_line_that_is_read(machine: Machine, name: str) -> None:
    old, new, told = IN_SETTINGS[name]
    with changed(machine.settings, old, new):
        (line,) = complaints(machine)
    assert told in line
    assert "password=" not in line
    assert line.count(" run ") == line.startswith("✗")


@needs_programs
def test_quotation_marks_may_be_missing(machine: Machine) -> None:
    """As for systemd, which reads the same file."""
    text = machine.settings.read_text("utf-8")
    with changed(machine.settings, text, text.replace('"', "")):
        assert complaints(machine) == []


@needs_programs
def test_settings_that_everybody_may_read_are_closed_by_the_line(machine: Machine) -> None:
    machine.settings.chmod(0o644)
    (line,) = complaints(machine)
    assert line.startswith("✗ files              everybody may read the password")
    paste(machine, line)
    assert complaints(machine) == []


@needs_programs
@pytest.mark.parametrize(("number", "told"), [(0, "CDR_API_PROXIES is 0"), (2, "CDR_API_PROXIES is 2, and requests")])
def test_a_wrong_number_of_proxies_is_mended_by_the_line(machine: Machine, number: int, told: str) -> None:
    with changed(machine.settings, "CDR_API_PROXIES=1", f"CDR_API_PROXIES={number}"):
        machine.shell("systemctl restart cdr-api")
        assert machine.ask()
        (line,) = complaints(machine)
        assert told in line
        paste(machine, line)
        assert machine.ask()
        assert complaints(machine) == []


def test_a_python_that_is_too_old_is_told_before_pip_is_asked(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\n[ $1 != -c ] && echo Python 3.9.2 || exit 1\n", "ascii")
    old.chmod(0o755)
    command = ["make", "-s", "install", f"PYTHON={old}", f"VENV={tmp_path}/venv"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode
    told = "Python 3.11 or newer is needed, and this is Python 3.9.2; PYTHON=python3.12 make … names another.\n"
    assert done.stdout == told


# Without a server -------------------------------------------------------------

FAR = "host=db.example.com port=5433 dbname=fusionpbx user=cdr_api"
SENTENCES = [
    ('FATAL: no pg_hba.conf entry for host "fe80::1", user "cdr_api"', "ssh db.example.com 'sed -i"),
    ('FATAL: pg_hba.conf rejects connection for host "10.0.0.5", user "cdr_api"', "cdr_api 10.0.0.5/32 scram-sha-256"),
    ('FATAL: Peer authentication failed for user "cdr_api"', "cdr-api setup"),
    ('FATAL: role "cdr_api" does not exist', "cdr-api setup"),
    ('FATAL: too many connections for role "cdr_api"', "FROM pg_stat_activity"),
    ("Connection refused Is the server running on that host", "ssh db.example.com systemctl start postgresql"),
    ("connection timeout expired", "nc -vz -w 5 db.example.com 5433"),
    ("server does not support SSL, but SSL was required", "ALTER SYSTEM SET ssl = on"),
    ("SSL error: certificate verify failed", "openssl s_client -starttls postgres -connect db.example.com:5433"),
    ('server certificate for "db" does not match host name "db.example.com"', "openssl s_client"),
]


@pytest.mark.parametrize(("sentence", "remedy"), SENTENCES, ids=[sentence[:40] for sentence, _ in SENTENCES])
def test_a_sentence_of_postgresqls_has_its_remedy(sentence: str, remedy: str) -> None:
    told = explain_failure(psycopg.OperationalError(f"connection failed:\n {sentence}"), FAR)
    assert told.startswith(f"connection failed: {sentence}; run ")
    assert remedy in told
    subprocess.run(["bash", "-n"], input=told.partition("; run ")[2], text=True, check=True)


def test_what_is_not_known_is_told_as_it_is() -> None:
    assert explain_failure(psycopg.OperationalError("FATAL: Datenbank ist weg\n"), FAR) == "FATAL: Datenbank ist weg"


def test_a_line_is_one_whatever_a_name_holds() -> None:
    place = Place("db.example.com", "5432", "it's $HOME")
    words = place.execute("SELECT 'x'")
    done = subprocess.run(["bash", "-c", f"printf '%s|' {words}"], capture_output=True, text=True, check=True)
    assert done.stdout == "psql|-d|host=db.example.com port=5432 dbname='it\\'s $HOME' user=postgres|-c|SELECT 'x'|"


SHOWN = """
# a comment
; another
A=plain with blanks  \t
B="quoted \\"twice\\" and a \\\\"
C='literal "$x" \\n'
 D = 1
E=
"""


def test_the_settings_file_is_read_as_systemd_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text(SHOWN, "utf-8")
    assert read_environment(file) == {
        "A": "plain with blanks",
        "B": 'quoted "twice" and a \\',
        "C": 'literal "$x" \\n',
        "D": "1",
        "E": "",
    }
    for wrong in ('A="x', "A='x", 'A="x" y', "A", "A=x\\"):
        file.write_text(f"B=1\n{wrong}\n", "utf-8")
        with pytest.raises(SettingError, match=r"line 2 \(A\) is wrong"):
            read_environment(file)
