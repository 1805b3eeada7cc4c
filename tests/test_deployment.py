"""DEPLOYMENT.md is followed from its first command to its last, in a folder that stands for the machine's /."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import psycopg
import pytest

import demo
from tests.conftest import PASSWORD, ROOT, SOURCES, answers, free_port, wait_for
from tests.deployment import INCLUDE, JAIL, install_programs, read_blocks, stop
from tests.nginx import FUSIONPBX, MAIN, NGINX, make_certificate
from tests.servers import Node

pytestmark = pytest.mark.direct("runs a server of its own")

MISSING = [name for name in ("bash", "curl", "git", "openssl") if not shutil.which(name)] + ["nginx"] * (not NGINX)
needs_programs = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

DOCUMENT = (ROOT / "DEPLOYMENT.md").read_text("utf-8")
BLOCKS = read_blocks(DOCUMENT)
ALPHA = "alpha.example.com"

# Blocks of one of the two ways through nginx.
WAYS = {
    "16": "path",
    "16 (2)": "own",
    "Inside FusionPBX's server": "path",
    "On a port of its own": "own",
}

NOT_RUN = {
    "fail2ban (3)": "needs fail2ban and its rights; what its filter looks for is compared in the block before",
    "FusionPBX 4.x": "is for another release, and its index has the name of step 11's",
}


# The machine ------------------------------------------------------------------


@dataclass
class PasswordNode(Node):
    """A PostgreSQL as a PBX has it: by TCP everybody needs a password."""

    port: int

    def start(self) -> None:
        access = "local all postgres trust\nhost all all 127.0.0.1/32 scram-sha-256\n"
        (self.data / "pg_hba.conf").write_text(access, "ascii")
        options = f"-h 127.0.0.1 -p {self.port} -k {self.socket}"
        self.control("-o", options, "-l", str(self.data / "log"), "start")

    def dsn(self, user: str = "postgres", *_others: Node) -> str:
        return f"host={self.socket} port={self.port} user={user} dbname={self.name}"


@pytest.fixture
def node() -> Iterator[PasswordNode]:
    """FusionPBX's database without a trace of the service, and calls of the last three days in it."""
    with tempfile.TemporaryDirectory(prefix="cdr-api-") as name:
        server = demo.start_server(Path(name, "postgresql"))
        node = PasswordNode(server, server.data, server.socket, free_port())
        with demo.connect(server) as connection:
            connection.execute("ALTER SYSTEM SET fsync = off")
            connection.execute(f"CREATE DATABASE {node.name}")
        node.stop()
        node.start()
        with node.connect() as connection:
            demo.create_tables(connection, demo.NEWEST)
            demo.add_domain(connection, ALPHA)
            demo.add_calls(connection, 300, domains=[ALPHA], days=3)
        yield node
        node.stop()
        server.stop()


@dataclass
class Machine:
    folder: Path
    node: PasswordNode
    way: str
    words: dict[str, str]  # what the document and the files that it installs say -> what stands for it here
    syslog: socket.socket
    password: str = ""

    @property
    def tree(self) -> Path:
        return self.folder / "tree"

    @property
    def environ(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if not name.startswith(("CDR_API_", "PG", "GIT"))} | {
            "PATH": f"{self.tree}/usr/local/sbin:{self.folder}/bin:{os.environ['PATH']}:/usr/sbin",
            "HOME": str(self.folder),
            "CURL_HOME": str(self.folder),
            "PIP_NO_INDEX": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }

    def fill(self, text: str) -> str:
        words = sorted(self.words, key=len, reverse=True)
        return re.sub("|".join(map(re.escape, words)), lambda found: self.words[found[0]], text)

    def run(self, text: str, typed: str = "", status: int = 0) -> str:
        """What a root shell prints that goes on where the last one was; what it asks for is typed."""
        place = self.folder / "place"
        text = f'cd "$(cat {place})"\ntrap "pwd > {place}" EXIT\n{self.fill(text)}'
        done = subprocess.run(
            ["bash", "-eu", "-c", text],
            check=False,
            input=typed,
            env=self.environ,
            capture_output=True,
            text=True,
            start_new_session=True,  # no terminal: passwords are read from what is typed
            timeout=120,
        )
        assert done.returncode == status, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def block(self, name: str, typed: str = "", status: int = 0) -> str:
        return self.run(BLOCKS[name].text, typed, status)

    def ask(self, path: str = "/cdr-api/health", *options: str) -> str:
        """curl's answer through nginx, or nothing."""
        return self.run(shlex.join(["curl", "-s", *options, f"https://pbx.example.com{path}"]) + " || true").strip()

    def status(self) -> str:
        """That of an answer to the account's token."""
        bearer = ("-H", "Authorization: Bearer cdr_…")
        return self.ask("/cdr-api/domains", "-o", "/dev/null", "-w", "%{http_code}", *bearer)

    def choose_password(self) -> None:
        self.password = self.block("6").strip()
        assert re.fullmatch(r"[0-9a-f]{48}", self.password)
        (self.folder / "password").write_text(self.password, "ascii")

    def type_password(self, name: str) -> None:
        self.block(name, f"{self.password}\n{self.password}\n")

    def log_in(self) -> None:
        """As the service does by its settings."""
        dsn = f"host=127.0.0.1 port={self.node.port} dbname={self.node.name} user=cdr_api password={self.password}"
        psycopg.connect(dsn).close()

    def dump(self) -> list[str]:
        """Everything in the database, and every role; without what pg_dump makes up again each time."""
        lines = self.run("sudo -u postgres pg_dump fusionpbx; sudo -u postgres pg_dumpall --globals-only")
        return [line for line in lines.splitlines() if not re.match(r"\\(un)?restrict |-- (Started|Completed) ", line)]

    def files(self) -> dict[str, tuple[str, bytes]]:
        """Every file and folder but the log that is not ours."""
        paths = [path for path in self.tree.rglob("*") if path.name != "auth.log"]
        return {f"/{path.relative_to(self.tree)}": describe(path) for path in paths}


def describe(path: Path) -> tuple[str, bytes]:
    mode = path.lstat().st_mode
    if path.is_symlink():
        return "link", os.fsencode(path.readlink())
    return stat.filemode(mode), path.read_bytes() if stat.S_ISREG(mode) else b""


# Everything of the machine's that the commands and the installed files name.
PLACES = (
    "/dev/log", "/etc/cdr-api", "/etc/nginx/", "/etc/ssl/", "/etc/systemd/", "/opt/cdr-api", "/root/", "/run/cdr-api",
    "/usr/local/sbin/", "/var/log/",
)  # fmt: skip


@contextmanager
def run_machine(node: PasswordNode, way: str) -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(prefix="cdr-api-") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        ports = {name: free_port() for name in ("http", "https", "own", "metrics")}
        words = {place: f"{folder}/tree{place}" for place in PLACES} | {
            "REPOSITORY": f"{folder}/repository",
            "host=127.0.0.1 ": f"host=127.0.0.1 port={node.port} ",
            " -o root -g cdr-api": "",  # a user who is only a line in a file can own nothing
            "[::]:8443": f"127.0.0.1:{free_port()}",
            "listen 8443": f"listen 127.0.0.1:{ports['own']}",
            "127.0.0.1:9131": f"127.0.0.1:{ports['metrics']}",
            "checkout TAG": "checkout v2",
        }
        if way == "own":
            words["//pbx.example.com"] = "//pbx.example.com:8443"
        syslog = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        machine = Machine(folder, node, way, words, syslog)
        make_tree(machine, ports)
        make_programs(machine, ports)
        make_release(machine, "v1")
        stack.enter_context(serve_nginx(machine, ports))
        stack.callback(stop, folder)
        yield machine


FOLDERS = (
    "dev", "etc/iptables", "etc/nginx/conf.d", "etc/nginx/sites-available", "etc/nginx/sites-enabled",
    "etc/nginx/snippets", "etc/ssl/certs", "etc/ssl/private", "etc/systemd/system/multi-user.target.wants", "opt",
    "root", "run", "usr/local/sbin", "var/log/nginx",
)  # fmt: skip
RULE = "INPUT -p tcp --dport 22 -j ACCEPT\n"


def make_tree(machine: Machine, ports: dict[str, int]) -> None:
    """What a PBX has: a firewall, and nginx with FusionPBX's file and a self-made certificate."""
    tree = machine.tree
    for name in FOLDERS:
        (tree / name).mkdir(parents=True)
    machine.syslog.bind(f"{tree}/dev/log")
    machine.syslog.settimeout(30)
    make_certificate(tree / "etc/ssl")
    certificate = (tree / "etc/ssl/nginx.crt").rename(tree / "etc/ssl/certs/nginx.crt")
    key = (tree / "etc/ssl/nginx.key").rename(tree / "etc/ssl/private/nginx.key")
    site = FUSIONPBX.replace("HTTP_PORT", str(ports["http"])).replace("HTTPS_PORT", str(ports["https"]))
    site = site.replace("FOLDER/nginx.crt", str(certificate)).replace("FOLDER/nginx.key", str(key))
    texts = {
        "etc/passwd": "root\n",
        "run/iptables": RULE,
        "etc/iptables/rules.v4": RULE,
        # nginx's workers may go into the service's folder: for www-data there is no other user here.
        "etc/nginx/nginx.conf": "user root;" * (os.geteuid() == 0) + MAIN.replace("FOLDER", f"{machine.folder}/nginx"),
        "etc/nginx/sites-available/fusionpbx": site.replace(INCLUDE, ""),
    }
    for name, text in texts.items():
        (tree / name).write_text(text, "utf-8")
    (tree / "etc/nginx/sites-enabled/fusionpbx").symlink_to("../sites-available/fusionpbx")


def make_programs(machine: Machine, ports: dict[str, int]) -> None:
    """Programs as the document's reader has them; curl finds the machine and believes its certificate."""
    words = {
        "TREE": str(machine.tree),
        "NGINX": str(NGINX),
        "PG_HOST": str(machine.node.socket),
        "PG_PORT": str(machine.node.port),
        "PG_BIN": str(machine.node.server.bin_path),
    }
    install_programs(machine.folder, words)
    lines = ['noproxy = "*"', f'cacert = "{machine.tree}/etc/ssl/certs/nginx.crt"']
    for port, here in ((443, ports["https"]), (8443, ports["own"])):
        lines.append(f'connect-to = "pbx.example.com:{port}:127.0.0.1:{here}"')
    (machine.folder / ".curlrc").write_text("\n".join(lines), "utf-8")
    (machine.folder / "place").write_text(f"{machine.tree}/root", "utf-8")


# What a release changes, so that it can be told from the one before.
HEALTH = {"v1": '{"status": "ok"}', "v2": '{"status": "better"}'}


def make_release(machine: Machine, tag: str) -> None:
    """Puts the program, with its paths in the tree, into the repository that it is fetched from."""
    repository = machine.folder / "repository"
    for path in [*ROOT.glob("*.*"), *ROOT.glob("cdr/**/*.py"), *ROOT.glob("deploy/*")]:
        # In a worktree .git is a file, which would make the repository's commits those of the real one.
        if path.is_file() and path.name != ".git":
            copy = repository / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(machine.fill(path.read_text("utf-8")).replace(HEALTH["v1"], HEALTH[tag]), "utf-8")
    git = f"git -C {repository} -c user.name=Test -c user.email=test@example.com -c init.defaultBranch=main"
    machine.run(f"{git} init -q; {git} add -A; {git} commit -q -m {tag}; {git} tag {tag}")


@contextmanager
def serve_nginx(machine: Machine, ports: dict[str, int]) -> Iterator[None]:
    (machine.folder / "nginx/temp").mkdir(parents=True)
    process = subprocess.Popen([f"{machine.folder}/bin/nginx"])
    try:
        wait_for(lambda: process.poll() is not None or answers(ports["https"]))
        yield
    finally:
        process.terminate()
        process.wait(60)


# Steps that ask for something, or whose end is looked at ------------------------


def lack_the_index(machine: Machine) -> None:
    lines = [line for line in machine.block("10", status=1).splitlines() if line[0] != "✓"]
    assert [line[:7] for line in lines] == ["✗ index"]
    assert lines[0].rpartition("; run ")[2] in BLOCKS["11"].text


def find_all_good(machine: Machine) -> None:
    """And as the document shows it, but for versions and numbers."""
    found, shown = machine.block("12").splitlines(), BLOCKS["12 (2)"].text.splitlines()
    assert [line[:20] for line in found] == [line[:20] for line in shown]
    assert {line[0] for line in found} == {"✓"}


def write_settings(machine: Machine) -> None:
    machine.block("8")
    file = machine.tree / "etc/cdr-api/env"
    assert stat.filemode(file.stat().st_mode) == "-rw-r-----"
    assert f"password={machine.password}" in file.read_text("utf-8")
    machine.log_in()


def ask_the_service(machine: Machine) -> None:
    assert json.loads(machine.block("14")) == json.loads(HEALTH["v1"])


def reload_nginx(machine: Machine) -> None:
    assert machine.ask() in ("a page of FusionPBX", "")
    machine.block("17")
    wait_for(lambda: machine.ask() == HEALTH["v1"].replace(" ", ""))


def take_the_token(machine: Machine) -> None:
    machine.words["cdr_…"] = machine.block("19").strip()


def make_the_first_call(machine: Machine) -> None:
    """The calls of yesterday, which is another day if midnight comes in between."""
    days = [datetime.now() - timedelta(days=1)]
    calls = json.loads(machine.block("20"))
    days.append(datetime.now() - timedelta(days=1))
    (day,) = {call["end_stamp"][:10] for call in calls}
    assert day in {f"{day:%F}" for day in days}
    query = "SELECT array_agg(xml_cdr_uuid::text ORDER BY end_stamp, xml_cdr_uuid) FROM v_xml_cdr"
    assert [call["xml_cdr_uuid"] for call in calls] == machine.node.value(f"{query} WHERE end_stamp::date = '{day}'")


def upgrade(machine: Machine) -> None:
    make_release(machine, "v2")
    machine.block("Upgrade")
    assert json.loads(machine.ask()) == json.loads(HEALTH["v2"])


def roll_back(machine: Machine) -> None:
    machine.block("Rollback")
    assert json.loads(machine.ask()) == json.loads(HEALTH["v1"])
    assert [path.name for path in (machine.tree / "opt").iterdir()] == ["cdr-api"]


def restore(machine: Machine) -> None:
    """After a night in which role and side tables went away."""
    assert machine.status() == "200"
    machine.node.execute("DROP OWNED BY cdr_api; DROP SCHEMA cdr_api CASCADE; DROP ROLE cdr_api")
    machine.node.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'cdr_api'")
    assert machine.status() == "503"
    machine.block("5")
    machine.type_password("7")
    machine.block("Restore")
    machine.block("5")
    wait_for(lambda: machine.status() == "200")  # the first request learns that the database is there again


def change_the_password(machine: Machine) -> None:
    old = machine.password
    machine.choose_password()
    machine.type_password("A new database password")
    machine.log_in()
    machine.password, new = old, machine.password
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        machine.log_in()
    machine.password = new
    assert machine.status() == "200"


def list_tokens(machine: Machine) -> None:
    (line,) = machine.block("Somebody leaves, or a token leaks").splitlines()[1:]
    machine.words["revoke ID"] = f"revoke {line.split()[0]}"


def revoke_the_token(machine: Machine) -> None:
    machine.block("Somebody leaves, or a token leaks (2)")
    assert machine.status() == "401"


def monitor(machine: Machine) -> None:
    assert {line["state"] for line in json.loads(machine.block("Monitoring"))} == {"good"}


def find_the_failure(machine: Machine) -> None:
    """In the file where rsyslog writes it, as FusionPBX's jail looks for it."""
    line = machine.syslog.recv(4096).decode().partition(">")[2].rstrip("\0")
    (machine.tree / "var/log/auth.log").write_text(f"2026-11-23T13:48:48.635408+00:00 pbx {line}\n", "utf-8")
    assert JAIL.match(machine.block("fail2ban (2)"))


def edit_the_unit(machine: Machine) -> None:
    """As systemctl edit does, and switches metrics on."""
    folder = machine.tree / "etc/systemd/system/cdr-api.service.d"
    folder.mkdir()
    (folder / "override.conf").write_text(machine.fill(BLOCKS["Metrics"].text), "utf-8")
    with (machine.tree / "etc/cdr-api/env").open("a") as file:
        file.write("CDR_API_METRICS=on\n")


def read_metrics(machine: Machine) -> None:
    assert "# TYPE cdr_api_feed_lag_seconds gauge\n" in machine.block("Metrics (2)")


def remove(machine: Machine) -> None:
    machine.block("Then, in both cases")
    wait_for(lambda: machine.ask() == ("a page of FusionPBX" if machine.way == "path" else ""))
    # Nor was a start or a stop on the way one that the service had to be helped with.
    journal = (machine.folder / "journal").read_text("utf-8")
    assert [line for line in journal.splitlines() if re.search("Traceback|couldn't stop|SIGKILL", line)] == []


STEPS: dict[str, Callable[[Machine], object]] = {
    "6": Machine.choose_password,
    "7": lambda machine: machine.type_password("7"),
    "8": write_settings,
    "10": lack_the_index,
    "12": find_all_good,
    "12 (2)": lambda _machine: None,  # what the block before it prints
    "14": ask_the_service,
    "17": reload_nginx,
    "18": lambda machine: machine.block("18", f"{PASSWORD}\n{PASSWORD}\n"),
    "19": take_the_token,
    "20": make_the_first_call,
    "Upgrade": upgrade,
    "Rollback": roll_back,
    "Restore": restore,
    "A new database password": change_the_password,
    "Somebody leaves, or a token leaks": list_tokens,
    "Somebody leaves, or a token leaks (2)": revoke_the_token,
    "Monitoring": monitor,
    "fail2ban (2)": find_the_failure,
    "Metrics": edit_the_unit,
    "Metrics (2)": read_metrics,
    "Then, in both cases": remove,
}


# The tests --------------------------------------------------------------------


def test_no_block_and_no_name_of_one_is_overlooked() -> None:
    assert 2 * len(BLOCKS) == len(re.findall(r"^ *(```|~~~)", DOCUMENT, re.MULTILINE))
    assert sorted({*STEPS, *WAYS, *NOT_RUN} - set(BLOCKS)) == []
    assert all(block.kind == "" or name in STEPS for name, block in BLOCKS.items())


LEFT = {"path": {"/root/cdr-api.dump", "/root/nginx-fusionpbx.before-cdr-api"}, "own": {"/root/cdr-api.dump"}}


@needs_programs
@pytest.mark.parametrize("way", ["path", "own"])
def test_from_the_first_command_to_the_last_and_all_is_as_before(node: PasswordNode, way: str) -> None:
    with run_machine(node, way) as machine:
        check_words(machine)
        dump, files = machine.dump(), machine.files()
        for name in BLOCKS:
            if name not in NOT_RUN and WAYS.get(name, way) == way:
                STEPS.get(name, lambda machine, name=name: machine.block(name))(machine)
        assert machine.dump() == dump
        found = machine.files()
    left = LEFT[way] | {"/var/log/nginx/cdr-api.log"}
    assert found == files | {name: found[name] for name in left}
    assert [name for name in left if name not in DOCUMENT.rpartition("\n## ")[2]] == []


def check_words(machine: Machine) -> None:
    """That the document and its files still say what stands for something else here."""
    texts = [block.text for block in BLOCKS.values()]
    texts += [path.read_text("utf-8") for path in SOURCES]
    texts += [path.read_text("utf-8") for path in ROOT.glob("deploy/*")]
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
