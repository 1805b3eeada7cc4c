"""A PBX in a folder that stands for the machine's /: FusionPBX's database, nginx, systemd, and commands run in it."""

from __future__ import annotations

import os
import pwd
import re
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

import demo
from tests.conftest import ROOT, answers, free_port, wait_for
from tests.deployment import INCLUDE, install_programs, read_blocks, stop
from tests.documents import DEPLOYMENT
from tests.nginx import FUSIONPBX, MAIN, NGINX, make_certificate
from tests.servers import Node

MISSING = [name for name in ("bash", "curl", "git", "openssl") if not shutil.which(name)] + ["nginx"] * (not NGINX)
needs_programs = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

ALPHA = "alpha.example.com"


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


@contextmanager
def run_node() -> Iterator[PasswordNode]:
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

    @property
    def tree(self) -> Path:
        return self.folder / "tree"

    @property
    def settings(self) -> Path:
        return self.tree / "etc/cdr-api/env"

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
        """What a root shell prints that takes what a document says; what it asks for is typed."""
        return self.shell(self.fill(text), typed, status)

    def shell(self, text: str, typed: str = "", status: int = 0) -> str:
        """What a root shell prints that goes on where the last one was."""
        place = self.folder / "place"
        text = f'cd "$(cat {place})"\ntrap "pwd > {place}" EXIT\n{text}'
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

    def ask(self, path: str = "/cdr-api/health", *options: str) -> str:
        """curl's answer through nginx, or nothing."""
        return self.run(shlex.join(["curl", "-s", *options, f"https://pbx.example.com{path}"]) + " || true").strip()

    def status(self) -> str:
        """That of an answer to the account's token."""
        bearer = ("-H", "Authorization: Bearer cdr_…")
        return self.ask("/cdr-api/domains", "-o", "/dev/null", "-w", "%{http_code}", *bearer)

    def read_password(self) -> str:
        """That of the service's role, from its settings."""
        (found,) = re.findall(r"^CDR_API_DSN=.*password=(\w+)", self.settings.read_text("utf-8"), re.MULTILINE)
        return str(found)

    def log_in(self, password: str) -> None:
        """As the service's role."""
        dsn = f"host=127.0.0.1 port={self.node.port} dbname={self.node.name} user=cdr_api password={password}"
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
    "/usr/local/sbin/", "/var/log/", "/etc/fusionpbx/", "/usr/local/etc/", "/var/www/", "/var/lib/dpkg/",
)  # fmt: skip


@contextmanager
def run_machine(node: PasswordNode, way: str) -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(prefix="cdr-api-") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        user = pwd.getpwuid(os.geteuid()).pw_name
        ports = {name: free_port() for name in ("http", "https", "own", "metrics")}
        words = {place: f"{folder}/tree{place}" for place in PLACES} | {
            "REPOSITORY": f"{folder}/repository",
            "host=127.0.0.1 ": f"host=127.0.0.1 port={node.port} ",
            "/var/run/postgresql": str(node.socket),
            # Users are lines in a file, who can own nothing: whoever runs the tests stands for all of them.
            "ROOT_UID = 0": f"ROOT_UID = {os.geteuid()}",
            'SERVICE_USER = "cdr-api"': f'SERVICE_USER = "{user}"',
            'SYSTEM_USER = "postgres"': f'SYSTEM_USER = "{user}"',
            "[::]:8443": f"127.0.0.1:{free_port()}",
            "listen 8443": f"listen 127.0.0.1:{ports['own']}",
            "127.0.0.1:9131": f"127.0.0.1:{ports['metrics']}",
            "checkout TAG": "checkout v2",
            "checkout OLD": "checkout v1",
        }
        if way == "port":
            words["//pbx.example.com"] = "//pbx.example.com:8443"
        syslog = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        machine = Machine(folder, node, way, words, syslog)
        make_tree(machine, ports)
        make_programs(machine, ports)
        make_release(machine, "v1")
        stack.enter_context(serve_nginx(machine, ports))
        stack.callback(stop, folder)
        yield machine


# As FusionPBX's installer writes it.
CONFIG = """
;database system settings
database.0.type = pgsql
database.0.path =
database.0.host = 127.0.0.1
database.0.port = PORT
database.0.sslmode = prefer
database.0.name = fusionpbx
database.0.username = fusionpbx
database.0.password = of-fusionpbx-itself
"""

FOLDERS = (
    "dev", "etc/fusionpbx", "etc/iptables", "etc/nginx/conf.d", "etc/nginx/sites-available", "etc/nginx/sites-enabled",
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
        "etc/fusionpbx/config.conf": CONFIG.replace("PORT", str(machine.node.port)),
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
OF_RELEASE = {"v1": '{"status": "ok"}', "v2": '{"status": "better"}'}


def make_release(machine: Machine, tag: str) -> None:
    """Puts the program, with its paths in the tree, into the repository that it is fetched from."""
    repository = machine.folder / "repository"
    for path in [
        *ROOT.glob("*.*"),
        ROOT / "Makefile",
        ROOT / "demo/install.py",
        *ROOT.glob("cdr/**/*.py"),
        *ROOT.glob("cdr_setup/*.py"),
        *ROOT.glob("deploy/*"),
    ]:
        # In a worktree .git is a file, which would make the repository's commits those of the real one.
        if path.is_file() and path.name != ".git":
            copy = repository / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(machine.fill(path.read_text("utf-8")).replace(OF_RELEASE["v1"], OF_RELEASE[tag]), "utf-8")
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


def install_program(machine: Machine) -> None:
    """As DEPLOYMENT.md does from a checkout."""
    blocks = read_blocks(DEPLOYMENT)
    for step in ("1", "2", "3", "4"):
        machine.run(blocks[step].text)


@contextmanager
def replaced(machine: Machine, program: str, text: str) -> Iterator[None]:
    """One of the machine's programs is another shell script for a while."""
    path = machine.folder / "bin" / program
    before = path.read_text("utf-8")
    path.write_text(f"#!/bin/sh\n{text}\n", "utf-8")
    try:
        yield
    finally:
        path.write_text(before, "utf-8")
