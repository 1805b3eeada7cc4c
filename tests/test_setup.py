"""cdr-api setup: it goes on wherever it was interrupted, names what mends a failure, and is taken back whole."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from cdr_setup.fusionpbx import FusionPbx, read_fusionpbx
from cdr_setup.nginx import INCLUDE, add_include, has_include, remove_include
from tests.conftest import wait_for
from tests.machine import (
    Machine,
    PasswordNode,
    install_program,
    needs_programs,
    replaced,
    run_machine,
    run_node,
)

pytestmark = [pytest.mark.direct("runs a server of its own"), needs_programs]

SETUP = "cdr-api setup --yes --nginx path --email billing@example.com --domain alpha.example.com"


@pytest.fixture
def node() -> Iterator[PasswordNode]:
    with run_node() as node:
        yield node


@pytest.fixture
def machine(node: PasswordNode) -> Iterator[Machine]:
    with run_machine(node, "path") as machine:
        install_program(machine)
        yield machine


def fail(machine: Machine, command: str = SETUP, typed: str = "") -> tuple[str, str]:
    """Why a command fails, and the line that it says mends it."""
    output = machine.shell(f"{command} 2>&1", typed, status=1)
    reason, _, remedy = output.partition("Error: ")[2].partition("\nRun this, then cdr-api setup again:\n    ")
    return reason, remedy.strip()


def break_off_the_index(machine: Machine) -> None:
    """As a power cut does: while it is built, which waits for a transaction that has seen the table."""
    with machine.node.connect() as writer:
        writer.execute("BEGIN; LOCK TABLE v_xml_cdr IN ROW EXCLUSIVE MODE")
        process = subprocess.Popen(
            ["bash", "-c", f"exec {SETUP}"],
            env=machine.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout
        building = b"waiting for writers before build, 0 %"
        assert any(building in line for line in process.stdout), "its progress is not told"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
        process.stdout.close()
        end = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_progress_create_index"
        assert machine.node.value(end)
        writer.execute("ROLLBACK")
    wait_for(lambda: not machine.node.value("SELECT count(*) FROM pg_stat_progress_create_index"))


def test_after_every_interruption_it_goes_on(machine: Machine) -> None:
    node, dump = machine.node, machine.dump()
    files = {name: about for name, about in machine.files().items() if "__pycache__" not in name}

    # pg_hba.conf lets nobody in by TCP.
    access = node.data / "pg_hba.conf"
    lines = access.read_text("ascii")
    access.write_text(lines.replace("host all all", "#"), "ascii")
    node.execute("SELECT pg_reload_conf()")
    reason, remedy = fail(machine)
    assert 'no pg_hba.conf entry for host "127.0.0.1", user "cdr_api"' in reason
    machine.shell(remedy)

    break_off_the_index(machine)
    assert node.value("SELECT NOT indisvalid FROM pg_index WHERE indexrelid = 'cdr_api_calls'::regclass")

    # The program's folder was made with a umask of 077.
    machine.shell(f"chmod -R go= {machine.tree}/opt/cdr-api/cdr")
    reason, remedy = fail(machine)
    assert "the service may not read" in reason
    machine.shell(remedy)
    assert node.value("SELECT indisvalid FROM pg_index WHERE indexrelid = 'cdr_api_calls'::regclass")

    with replaced(machine, "systemctl", '[ "$1" != restart ] || { echo "it does not start" >&2; exit 1; }'):
        reason, remedy = fail(machine)
    assert "it does not start" in reason
    assert remedy == "journalctl -u cdr-api -n 20 --no-pager"

    # FusionPBX's file has a location of this name already.
    site = machine.tree / "etc/nginx/sites-available/fusionpbx"
    text = site.read_text("utf-8")
    twice = text.replace("    location / {", "    location ^~ /cdr-api/ { return 404; }\n    location / {")
    site.write_text(twice, "utf-8")
    reason, remedy = fail(machine)
    assert "duplicate location" in reason
    assert remedy == "nginx -t"
    machine.shell(remedy)
    assert site.read_text("utf-8") == twice
    assert not (machine.tree / "etc/nginx/snippets/cdr-api.conf").exists()
    site.write_text(text, "utf-8")

    output = machine.shell(SETUP)
    assert output.count("(done already)") == 3
    calls = json.loads(machine.shell("\n".join(output.splitlines()[-2:])))
    assert calls
    assert node.value("SELECT array_agg(email) FROM cdr_api.accounts") == ["billing@example.com"]
    secrets = machine.read_password(), re.findall(r"TOKEN=(\S+)", output)[0]
    log = (node.data / "log").read_text("utf-8", "replace") + (machine.folder / "journal").read_text("utf-8")
    assert [secret for secret in secrets if secret in log] == []

    undo_with_interruptions(machine)
    access.write_text(lines, "ascii")
    assert machine.dump() == dump
    found = {name: about for name, about in machine.files().items() if "__pycache__" not in name}
    assert found == files | {name: found[name] for name in ("/var/log/nginx/cdr-api.log",)}


def undo_with_interruptions(machine: Machine) -> None:
    """What of the role is in another database is named, with what mends it."""
    with replaced(machine, "systemctl", 'echo "no bus" >&2; exit 1'):
        assert "no bus" in fail(machine, "cdr-api setup --undo --yes")[0]
    machine.node.execute("CREATE DATABASE archive")
    other = machine.node.dsn().replace("dbname=fusionpbx", "dbname=archive")
    machine.shell(
        f"{machine.node.server.bin_path}/psql '{other}' -qc 'CREATE TABLE t (); GRANT SELECT ON t TO cdr_api'"
    )
    reason, remedy = fail(machine, "cdr-api setup --undo --yes")
    assert "1 object in database archive" in reason
    machine.shell(remedy.replace("DATABASE", "archive"))
    machine.shell("cdr-api setup --undo --yes")
    machine.node.execute("DROP DATABASE archive")


def test_where_a_publication_takes_all_tables_the_side_tables_get_a_database(machine: Machine) -> None:
    node = machine.node
    node.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    dump = machine.dump()
    for _ in range(2):
        output = machine.shell(SETUP)
        assert "role cdr_api, database cdr_api, the right" in output
        assert "✓ replication        no publication takes the side tables" in output
    assert json.loads(machine.shell("\n".join(output.splitlines()[-2:])))
    assert node.value("SELECT to_regclass('cdr_api.accounts') IS NULL")
    assert node.value("SELECT count(*) FROM pg_publication_tables WHERE schemaname = 'cdr_api'") == 0
    assert "alpha.example.com" in machine.shell("cdr-api user list")
    assert machine.shell("cdr-api setup --yes").count("(done already)") == 5
    machine.shell("cdr-api setup --undo --yes")
    assert machine.dump() == dump
    assert node.value("SELECT array_agg(datname) FROM pg_database WHERE datname = 'cdr_api'") is None


def test_what_it_cannot_do_it_says_before_it_changes_anything(machine: Machine) -> None:
    node, dump = machine.node, machine.dump()
    config = machine.tree / "etc/fusionpbx/config.conf"
    text = config.read_text("utf-8")

    def fail_with(old: str, new: str) -> tuple[str, str]:
        config.write_text(text.replace(old, new), "utf-8")
        try:
            return fail(machine)
        finally:
            config.write_text(text, "utf-8")

    reason, remedy = fail_with(f"port = {node.port}", "port = 1")
    assert "Connection refused" in reason or "No such file" in reason
    assert "systemctl start postgresql; pg_lsclusters" in reason
    assert remedy.startswith("cdr-api setup --superuser 'host=127.0.0.1 user=NAME'")
    assert "has no tables v_xml_cdr and v_domains" in fail_with("name = fusionpbx", "name = postgres")[0]
    assert "in sqlite; only PostgreSQL" in fail_with("type = pgsql", "type = sqlite")[0]
    assert "names no database" in fail_with("name = fusionpbx", "name =")[0]

    node.execute("CREATE ROLE plain LOGIN PASSWORD 'a plain one'")
    node.execute("CREATE ROLE boss SUPERUSER LOGIN PASSWORD 'for the boss'")
    chosen = f"cdr-api setup --dry-run --superuser 'host=127.0.0.1 port={node.port} user={{}}'"
    reason, _ = fail(machine, chosen.format("plain"), "a plain one\n")
    assert "plain is no superuser" in reason
    assert "password authentication failed" in fail(machine, chosen.format("boss"), "guessed\n")[0]
    assert "everybody can read" in fail(machine, chosen.format("boss password=for"))[0]
    assert "Nothing was changed." in machine.shell(chosen.format("boss"), "for the boss\n")
    node.execute("DROP ROLE plain; DROP ROLE boss")
    config.unlink()
    assert fail(machine)[1] == "cdr-api setup --config FILE"
    assert machine.dump() == dump
    assert not machine.settings.exists()


# The parts --------------------------------------------------------------------

CONF = """
;database system settings
database.0.type = pgsql
database.0.path =
database.0.host = db.example.com
database.0.port = 5433
database.0.sslmode = require
database.0.name = "fusion pbx"
database.0.username = fusionpbx
database.0.password = a/b#c=d
database.1.host = other
"""
PHP = """<?php
//	$db_host = 'commented.example.com';
	$db_type = 'pgsql'; //sqlite, mysql, pgsql, others with a manually created PDO connection
	$db_host = "db.example.com"; //set the host only if the database is not local
	$db_port = '5433';
	$db_name = 'fusion pbx';
	$db_username = 'fusionpbx';
	$db_password = 'a/b#c=d';
?>
"""


@pytest.mark.parametrize(("text", "sslmode"), [(CONF, "require"), (PHP, "")], ids=["config.conf", "config.php"])
def test_both_configurations_of_fusionpbx_are_read(tmp_path: Path, text: str, sslmode: str) -> None:
    file = tmp_path / "config"
    file.write_text(text, "utf-8")
    found = read_fusionpbx(file)
    assert found == FusionPbx(file, "db.example.com", "5433", "fusion pbx", "fusionpbx", "a/b#c=d", sslmode)
    assert "a/b#c=d" not in repr(found)
    ssl = f" sslmode={sslmode}" if sslmode else ""
    assert found.dsn("cdr_api") == f"host=db.example.com dbname='fusion pbx' user=cdr_api port=5433{ssl}"


def test_a_database_of_this_machine_is_asked_by_tcp(tmp_path: Path) -> None:
    """Its socket would ask who the system's user is."""
    file = tmp_path / "config"
    for host in ("", "localhost", "127.0.0.1", "/var/run/postgresql"):
        file.write_text(f"database.0.host = {host}\ndatabase.0.name = fusionpbx\ndatabase.0.sslmode=prefer\n", "utf-8")
        assert read_fusionpbx(file).dsn("cdr_api") == "host=127.0.0.1 dbname=fusionpbx user=cdr_api"


def test_no_configuration_is_told(tmp_path: Path) -> None:
    with pytest.raises(click.ClickException, match=r"names no database"):
        read_fusionpbx(Path("/dev/null"))


SITE = """
server { # listen 443 ssl;
\tlisten 80;
\tserver_name fusionpbx;
\tif ($uri !~* "provision") {
\t\treturn 301 https://$host$request_uri;
\t}
}
server {
\tlisten 443 ssl; # http2
\tlisten [::]:443 ssl;
%s\tssl_certificate /etc/ssl/certs/nginx.crt;
\tlocation / { try_files $uri =404; }
}
"""


@pytest.mark.parametrize("name", ["\tserver_name fusionpbx;\n", ""])
def test_the_line_goes_into_the_server_for_https(name: str) -> None:
    site = SITE % name
    changed = add_include(site)
    assert changed
    block = changed[changed.index("server", changed.index("\n}\n") + 1) :]
    assert block.count(INCLUDE) == changed.count(INCLUDE) == 1
    assert block.index(INCLUDE) < block.index("ssl_certificate")
    assert has_include(changed)
    assert not has_include(changed.replace("    include", "    # include"))
    assert remove_include(changed) == site


def test_where_nothing_listens_with_tls_there_is_no_place_for_the_line() -> None:
    assert add_include("server { listen 80; # ssl\n}\n") is None
