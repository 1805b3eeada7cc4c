"""What is in the Debian package (make test-package); tests/bare_debian.py tries its life, to its purge."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cdr import __version__
from tests.conftest import ROOT
from tests.encoders import build_encoder

SCRIPTS = ("postinst", "prerm", "postrm")


def why_not_here() -> str:
    """Why the package cannot be built on this machine; nothing if it can."""
    if not shutil.which("dpkg-deb"):
        return "not installed: dpkg-deb"
    probe = ["/usr/bin/python3", "-c", "import sys, ensurepip; sys.exit(sys.version_info < (3, 11))"]
    if not Path(probe[0]).exists() or subprocess.run(probe, check=False, capture_output=True).returncode:
        return "Debian's own Python is older than 3.11, or lacks venv"
    return ""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := why_not_here():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("dist")
    environ = os.environ | {"TARGET": str(folder)}
    done = subprocess.run(["make", "-s", "deb"], cwd=ROOT, env=environ, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def read_package(package: Path, *words: str) -> str:
    return subprocess.run(["dpkg-deb", *words, str(package)], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def unpacked(package: Path) -> Path:
    folder = package.parent / "unpacked"
    subprocess.run(["dpkg-deb", "-R", str(package), str(folder)], check=True)
    return folder


def test_its_name_tells_its_debian(package: Path) -> None:
    release = re.findall(r'^VERSION_ID="?(\d+)', Path("/etc/os-release").read_text("utf-8"), re.MULTILINE)[0]
    assert package.name.startswith(f"cdr-api_{__version__}~deb{release}_")
    assert read_package(package, "-f").splitlines()[1] == f"Version: {__version__}~deb{release}"


def test_its_files_are_roots_and_only_the_settings_are_closed(package: Path) -> None:
    modes = set()
    for line in read_package(package, "-c").splitlines():
        mode, owner, *_, name = line.partition(" -> ")[0].split()
        assert owner == "root/root", line
        if name == "./etc/cdr-api/env":
            assert mode == "-rw-r-----"
        elif mode[0] != "l":
            modes.add(mode)
    assert modes == {"drwxr-xr-x", "-rw-r--r--", "-rwxr-xr-x"}


def test_it_has_what_the_service_loads_and_nothing_of_the_build(unpacked: Path) -> None:
    opt = unpacked / "opt/cdr-api"
    for name in (
        "wsgi.py",
        "cdr/service.py",
        "queries.sql",
        "schema.sql",
        "openapi.json",
        "deploy/env",
        "pages/docs.html",
    ):
        assert (opt / name).read_bytes() == (ROOT / name).read_bytes()
    assert not list(unpacked.rglob("__pycache__"))
    assert not [name for name in ("tests", "demo", ".git", "deploy/debian") if (opt / name).exists()]
    for script in (opt / ".venv/bin").iterdir():
        if not script.is_symlink():
            assert script.read_bytes().startswith(b"#!/opt/cdr-api/.venv/bin/python\n"), script
    assert (opt / ".venv/bin/python3").readlink() == Path("/usr/bin/python3")
    built = str(opt).encode()
    texts = [path for path in opt.rglob("*") if path.is_file() and path.suffix not in (".so", ".js")]
    assert not [path for path in texts if built in path.read_bytes() or b"/tmp/tmp." in path.read_bytes()]


def test_it_has_the_c_encoder_if_it_could_be_built(unpacked: Path, tmp_path: Path) -> None:
    opt = unpacked / "opt/cdr-api"
    code = "from cdr.stream import FORMATS; print(FORMATS['json'].encoder.__name__)"
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [opt / ".venv/bin/python", "-B", "-c", code], cwd=opt, env=environ, check=True, capture_output=True, text=True
    )
    lacking = build_encoder(tmp_path, python="/usr/bin/python3")
    assert done.stdout == ("JsonEncoder\n" if lacking else "CompiledJsonEncoder\n")


def test_everything_in_etc_is_a_conffile(unpacked: Path) -> None:
    found = sorted(f"/{path.relative_to(unpacked)}" for path in (unpacked / "etc").rglob("*") if path.is_file())
    assert (unpacked / "DEBIAN/conffiles").read_text("ascii").split() == found
    assert found == [
        "/etc/cdr-api/env",
        "/etc/nginx/conf.d/cdr-api.conf",
        "/etc/nginx/sites-available/cdr-api",
        "/etc/nginx/snippets/cdr-api.conf",
    ]


@pytest.mark.parametrize("name", [*SCRIPTS, "build.sh", "../cdr-api"])
def test_its_scripts_are_sound(name: str) -> None:
    script = ROOT / "deploy/debian" / name
    subprocess.run(["sh", "-n", str(script)], check=True)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    subprocess.run([str(shellcheck), "--severity=warning", str(script)], check=True)
    assert os.access(script, os.X_OK)


def test_its_manual_and_its_completion_know_every_command(unpacked: Path) -> None:
    manual = subprocess.run(
        ["gzip", "-dc", str(unpacked / "usr/share/man/man1/cdr-api.1.gz")], check=True, capture_output=True, text=True
    ).stdout.replace("\\-", "-")
    for command in ("setup", "check", "user add", "user password", "token create", "token revoke"):
        assert f".B cdr-api {command} " in manual
    for option in ("--dry-run", "--undo", "--json", "--password-stdin", "--from"):
        assert f".B {option}" in manual
    completion = (unpacked / "usr/share/bash-completion/completions/cdr-api").read_text("utf-8")
    assert "_CDR_API_COMPLETE=bash_complete" in completion
    subprocess.run(["bash", "-n"], input=completion, text=True, check=True)


def test_lintian_finds_no_error(package: Path) -> None:
    if not shutil.which("lintian"):
        pytest.skip("not installed: lintian")
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error", str(package)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
