"""The Debian package's life in a bare Debian, made by debootstrap and booted with its own systemd, with a FusionPBX.

make test-deb runs it, for each of DEB_SUITES. It takes root and some minutes; DEB_CACHE is where the bare roots
are kept that debootstrap has made.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

import demo
from tests.conftest import ROOT
from tests.machine import CONFIG
from tests.nginx import FUSIONPBX, NAME

# What a PBX has beside FusionPBX, and what building and judging the package takes.
PACKAGES = "adduser ca-certificates curl dbus lintian nginx-light openssl postgresql python3-venv systemd-sysv"
PROGRAMS = ("debootstrap", "nsenter", "systemd-nspawn", "unshare")
# What an installation and its removal leave in no case as it was: the records of dpkg, PostgreSQL, journal and logs.
RECORDS = re.compile(
    r"/(proc|sys|dev|run|tmp|root|debs|src|wheels)(/|$)"
    r"|/var/(cache|log|tmp|lib/(apt|dpkg|postgresql|systemd|private))(/|$)|/etc/(\.pwd\.lock|(passwd|group|shadow|gshadow)-)$"
    r"|/etc/subuid-?$|/etc/subgid-?$|/usr/share/man/|/var/lib/nginx"
)


def why_not() -> str:
    """Why no Debian can be booted here; nothing if one can."""
    if missing := [name for name in PROGRAMS if not shutil.which(name)]:
        return f"not installed: {', '.join(missing)}"
    if os.geteuid() or subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode:
        return "it takes root and the right to mount"
    return ""


def find_mirror() -> str:
    """The one that this machine's apt uses."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Origin: Debian", "Identifier: Packages"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return next(uri for uri in found if "security" not in uri)


@dataclass
class Debian:
    folder: Path
    leader: int = 0  # the process that is systemd in there

    def chroot(self, *command: str, environ: Mapping[str, str], log: IO[bytes] | None = None) -> None:
        """Before it is booted."""
        clean = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "HOME": "/root", **environ}
        subprocess.run(
            ["chroot", str(self.folder), *command], check=True, env=clean, stdin=subprocess.DEVNULL, stdout=log
        )

    def run(self, script: str, typed: str = "", status: int | None = 0) -> str:
        """What a root shell prints in there, when it is booted; errors too."""
        command = ["nsenter", "-t", str(self.leader), "-m", "-u", "-i", "-n", "-p", "-r", "-w", "env", "-i"]
        clean = ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "HOME=/root", "DEBIAN_FRONTEND=noninteractive"]
        done = subprocess.run(
            [*command, *clean, "bash", "-eu", "-c", script],
            check=False, input=typed, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600,
        )  # fmt: skip
        assert status is None or done.returncode == status, f"{script}\n{done.stdout}"
        return done.stdout

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")

    def dump(self) -> list[str]:
        """Everything in FusionPBX's database, and every role."""
        lines = self.run("runuser -u postgres -- sh -c 'pg_dump fusionpbx; pg_dumpall --globals-only'").splitlines()
        return [line for line in lines if not re.match(r"\\(un)?restrict |-- (Started|Completed) ", line)]

    def files(self) -> dict[str, str]:
        """Every file with its mode, its owner and a digest, but for records."""
        kernel = "-path /proc -o -path /sys -o -path /tmp -o -path /var/cache"
        listing = self.run(f"find / -xdev \\( {kernel} \\) -prune -o -printf '%p\\t%M %u:%g %l\\t%y\\n'")
        rows = [line.split("\t") for line in listing.splitlines()]
        kept = {name: about for name, about, _ in rows if not RECORDS.match(name)}
        for name, _, kind in rows:
            if kind == "f" and name in kept and name.startswith(("/etc/", "/opt/")):
                kept[name] += self.digest(name)
        return kept

    def digest(self, name: str) -> str:
        with suppress(FileNotFoundError):
            return f" {hash((self.folder / name[1:]).read_bytes())}"
        return ""


def make_base(suite: str, cache: Path) -> Path:
    """A root of debootstrap's with PACKAGES, made once, with this machine's network."""
    base = cache / suite
    if (base / "done").exists():
        return base
    shutil.rmtree(base, ignore_errors=True)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{suite}.log").open("wb") as log:
        command = ["debootstrap", "--variant=minbase", suite, str(base), find_mirror()]
        subprocess.run(command, check=True, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        shutil.copy("/etc/resolv.conf", base / "etc/resolv.conf")
        (base / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n", "ascii")
        (base / "usr/sbin/policy-rc.d").chmod(0o755)
        install = f"apt-get update && apt-get install -y --no-install-recommends {PACKAGES}"
        Debian(base).chroot("sh", "-c", install, environ={"DEBIAN_FRONTEND": "noninteractive"}, log=log)
        (base / "usr/sbin/policy-rc.d").unlink()
    (base / "done").touch()
    return base


@contextmanager
def boot(debian: Debian) -> Iterator[None]:
    """With a network of its own that leads nowhere: what is not in the package cannot be had."""
    # nspawn makes folders in /run/systemd, which must be on a file system of its own.
    script = "mkdir -p /run/systemd && mount -t tmpfs none /run/systemd && exec systemd-nspawn --quiet --register=no"
    script += f" --keep-unit --private-network --console=pipe --boot -D {shlex.quote(str(debian.folder))}"
    with (debian.folder.parent / "console").open("wb") as console:
        process = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", script], stdin=subprocess.DEVNULL, stdout=console, stderr=console
        )
        try:
            debian.leader = wait_for_systemd(process)
            yield
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            process.wait()


def wait_for_systemd(process: subprocess.Popen[bytes]) -> int:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the machine did not boot: see its console"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("ascii").split()
        if children:
            probe = ["nsenter", "-t", children[0], "-m", "-p", "-r", "-w", "systemctl", "is-system-running"]
            state = subprocess.run(probe, check=False, capture_output=True, text=True).stdout.strip()
            if state in ("running", "degraded"):
                return int(children[0])
        time.sleep(0.5)
    raise AssertionError("the machine did not boot in time")


# The package ------------------------------------------------------------------


def download_wheels(folder: Path, minor: int) -> None:
    """For another Python: the machine that is built in has no network."""
    tags = [
        word
        for glibc in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")
        for word in ("--platform", f"{glibc}_x86_64")
    ]
    python = ["--python-version", f"3.{minor}", "--implementation", "cp", *tags]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--only-binary",
        ":all:",
    ]
    command += [*python, "--require-hashes", "-r", str(ROOT / "requirements.txt"), "-d", str(folder)]
    subprocess.run(command, check=True)


def build_packages(debian: Debian, versions: Mapping[str, Mapping[str, str]]) -> None:
    """Into /debs, one of each version; what of the shipped files is changed in it: old text -> new."""
    (python,) = debian.folder.glob("usr/bin/python3.[0-9][0-9]")
    download_wheels(debian.folder / "wheels", int(python.name.partition(".")[2]))
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels", "TARGET": "/debs"}
    for version, changes in versions.items():
        copy_program(debian.folder / "src", changes)
        debian.chroot("sh", "/src/deploy/debian/build.sh", environ={**offline, "VERSION": version})


def copy_program(folder: Path, changes: Mapping[str, str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    named = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in named.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    for path in (folder / "deploy").glob("nginx-*"):
        text = path.read_text("utf-8")
        for old, new in changes.items():
            text = text.replace(old, new)
        path.write_text(text, "utf-8")


# FusionPBX --------------------------------------------------------------------


def write_tables(calls: int) -> str:
    """SQL: FusionPBX's tables, a domain, and calls of yesterday."""
    tables = demo.read_release(demo.NEWEST)
    lines = [
        f'CREATE TABLE "{table}" ({", ".join(" ".join((chr(34) + name + chr(34), *rest)) for name, *rest in columns)});'
        for table, columns in tables.items()
    ]
    uuid = "'0b9e2f6c-6a53-4c0e-9c5e-0d9c4b3f7a11'"
    lines.append(f"INSERT INTO v_domains (domain_uuid, domain_name) VALUES ({uuid}, 'alpha.example.com');")
    lines.append(
        "INSERT INTO v_xml_cdr (xml_cdr_uuid, domain_uuid, domain_name, start_stamp, end_stamp, end_epoch, billsec)"
        f" SELECT gen_random_uuid(), {uuid}, 'alpha.example.com', t, t, extract(epoch FROM t), 61"
        f" FROM generate_series(1, {calls}),"
        " LATERAL (SELECT date_trunc('day', now()) - interval '12 hours' AS t) AS yesterday;"
    )
    return "\n".join(lines)


def install_fusionpbx(debian: Debian, calls: int) -> None:
    """Its database, its nginx and its configuration, as its installer leaves them."""
    site = FUSIONPBX.replace("    include snippets/cdr-api[.]conf;\n", "").replace("127.0.0.1:HTTP_PORT", "80")
    site = site.replace("127.0.0.1:HTTPS_PORT", "443").replace("FOLDER/nginx.crt", "/etc/ssl/certs/nginx.crt")
    debian.write("etc/nginx/sites-available/fusionpbx", site.replace("FOLDER/nginx.key", "/etc/ssl/private/nginx.key"))
    debian.write("etc/fusionpbx/config.conf", CONFIG.replace("PORT", "5432"))
    debian.write("root/tables.sql", write_tables(calls))
    debian.run(f"""
        systemctl start postgresql
        cd /etc/ssl
        openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout private/nginx.key -out certs/nginx.crt \\
          -subj /CN={NAME} -addext subjectAltName=DNS:{NAME} 2>/dev/null
        ln -s ../sites-available/fusionpbx /etc/nginx/sites-enabled/fusionpbx
        rm -f /etc/nginx/sites-enabled/default
        systemctl restart nginx
        runuser -u postgres -- psql -qc "CREATE ROLE fusionpbx SUPERUSER LOGIN PASSWORD 'of-fusionpbx-itself'"
        runuser -u postgres -- createdb -O fusionpbx fusionpbx
        runuser -u postgres -- psql -q -v ON_ERROR_STOP=1 fusionpbx < /root/tables.sql
    """)


# The tests --------------------------------------------------------------------

SUITES = os.environ.get("DEB_SUITES", "bookworm trixie").split()
CACHE = Path(os.environ.get("DEB_CACHE", "/var/tmp/cdr-api-debian"))
OLD, NEW = "0.1.0", "0.2.0"
CHANGE = {"proxy_connect_timeout 5s;": "proxy_connect_timeout 6s;"}  # of a conffile, from one version to the next
ANSWERS = "path\nbilling@example.com\nalpha.example.com\ny\n"
CALLS = 2000


@pytest.fixture(params=SUITES)
def debian(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Debian]:
    """Booted, with FusionPBX, and both versions of the package in /debs."""
    if reason := why_not():
        pytest.skip(reason)
    base = make_base(request.param, CACHE)
    debian = Debian(tmp_path / request.param)
    subprocess.run(["cp", "-a", str(base), str(debian.folder)], check=True)
    build_packages(debian, {OLD: {}, NEW: CHANGE})
    with boot(debian):
        install_fusionpbx(debian, CALLS)
        yield debian
    shutil.rmtree(debian.folder)


def tell(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def apt(debian: Debian, *words: str) -> str:
    # Of a conffile that was changed here, the installed one stays, as if Enter were pressed.
    return debian.run(f"apt-get -q -y -o Dpkg::Use-Pty=0 {' '.join(words)} 2>&1 </dev/null")


def install(debian: Debian, version: str) -> str:
    return apt(debian, "install", "--allow-downgrades", f"/debs/cdr-api_{version}~deb*.deb")


def status(debian: Debian) -> str:
    """Of health through nginx."""
    ask = (
        f"curl -sk -o /dev/null -w '%{{http_code}}' --connect-to {NAME}:443:127.0.0.1:443 https://{NAME}/cdr-api/health"
    )
    return debian.run(ask, status=None)


def count_calls(debian: Debian, lines: str) -> int:
    return len(json.loads(debian.run(lines)))


def test_a_life_in_a_bare_debian(debian: Debian) -> None:
    debian.run("lintian --fail-on error /debs/*.deb")
    dump, bare = debian.dump(), debian.files()

    began = time.monotonic()
    assert "run cdr-api setup" in install(debian, OLD)
    installed, at_rest = time.monotonic(), debian.files()
    assert "-rw-r----- root:cdr-api" in at_rest["/etc/cdr-api/env"]
    asked = time.monotonic()
    output = debian.run("cdr-api setup", ANSWERS)
    done = time.monotonic()
    call = "\n".join(output.splitlines()[-2:])
    assert count_calls(debian, call) == CALLS
    tell(f"install {installed - began:.0f} s, setup {done - asked:.0f} s, {ANSWERS.count(chr(10))} questions")
    assert debian.run("systemctl is-active cdr-api").strip() == "active"
    assert "✗" not in debian.run("cdr-api check")

    debian.run("sed -i 's/CDR_API_WORKERS=2/CDR_API_WORKERS=1/' /etc/cdr-api/env")
    install(debian, NEW)
    assert count_calls(debian, call) == CALLS
    assert "6s" in debian.run("grep proxy_connect_timeout /etc/nginx/snippets/cdr-api.conf")
    assert "CDR_API_WORKERS=1" in debian.run("cat /etc/cdr-api/env")
    assert NEW in debian.run("dpkg-query -W cdr-api")
    assert "older version" in install(debian, OLD)
    assert count_calls(debian, call) == CALLS
    assert "5s" in debian.run("grep proxy_connect_timeout /etc/nginx/snippets/cdr-api.conf")

    # Removed, the settings stay, and it comes back as it was.
    apt(debian, "remove", "cdr-api")
    assert status(debian) == "503"
    install(debian, OLD)
    assert count_calls(debian, call) == CALLS

    for _ in range(2):
        debian.run("cdr-api setup --undo --yes")
    assert debian.dump() == dump
    assert differ(debian.files(), at_rest) == {}
    apt(debian, "purge", "cdr-api")
    assert differ(debian.files(), bare) == {}


def test_purged_before_it_was_undone_it_does_no_harm(debian: Debian) -> None:
    dump = debian.dump()
    install(debian, OLD)
    debian.run("cdr-api setup --yes --nginx port --email billing@example.com --domain '*'")
    debian.run("cdr-api setup --undo --yes")
    debian.run("cdr-api setup --yes --nginx path --email billing@example.com --domain '*'")
    apt(debian, "purge", "cdr-api")
    debian.run("nginx -t && systemctl reload nginx")
    assert status(debian) == "200"  # a page of FusionPBX, which answers everything
    assert "cdr-api" not in debian.run("cat /etc/passwd")
    install(debian, OLD)
    debian.run("cdr-api setup --undo --yes")
    assert debian.dump() == dump
    assert "cdr-api" not in debian.run("cat /etc/nginx/sites-available/fusionpbx")

    # What a umask of 077 makes unreadable is told, whoever asks.
    debian.run("chmod -R go= /opt/cdr-api/cdr")
    told = debian.run("cdr-api check", status=1)
    assert "may not read /opt/cdr-api/cdr/settings.py; run: chmod -R a+rX /opt/cdr-api" in told
    debian.run(told.rpartition("run: ")[2])
    assert "CDR_API_DSN is not set" in debian.run("cdr-api check", status=1)
    assert "use sudo" in debian.run("runuser -u nobody -- cdr-api check", status=1)
    assert "Usage: cdr-api" in debian.run("runuser -u nobody -- cdr-api --help")


def differ(found: dict[str, str], before: dict[str, str]) -> dict[str, tuple[str | None, str | None]]:
    """What is not as before, but for Python's bytecode, and /opt itself, which dpkg removes when it is empty."""
    names = {name for name in found.keys() | before.keys() if "__pycache__" not in name} - {"/opt"}
    return {name: (before.get(name), found.get(name)) for name in names if before.get(name) != found.get(name)}
