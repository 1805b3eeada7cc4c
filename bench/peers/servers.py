"""How each peer is served, the way its documentation has it, and stopped when it takes too much.

All have as many workers as there are cores, as the service has, and six
connections to the database in each.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from bench.__main__ import ROOT, Page, Range, Reading, Web, find_port, launch, peak_memory, tell, understand

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

HERE = Path(__file__).parent
# Below a folder of the name .venv nobody looks for sources and documents of the project.
VENV = ROOT / ".bench" / ".venv"
WORKERS = str(os.cpu_count() or 1)
BYTES_AT_MOST = 4 * 10**9
SECONDS_AT_MOST = 180
WATCH_EVERY = 0.05  # seconds


def prepare_venv() -> Path:
    """Where the programs of the peers are; installs them when their requirements have changed."""
    requirements = HERE / "requirements.txt"
    stamp, wanted = VENV / "requirements.sha256", hashlib.sha256(requirements.read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        tell(f"installing the peers into {VENV} …")
        subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
        pip = [str(VENV / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(requirements)], check=True)
        stamp.write_text(wanted)
    return VENV / "bin"


# The servers ------------------------------------------------------------------


@contextmanager
def serve_gunicorn(programs: Path, application: str, variables: Mapping[str, str]) -> Iterator[Web]:
    """With threads and keep-alive like ours, and without a timeout for long answers."""
    port = find_port()
    options = ["--worker-class", "gthread", "--threads", "8", "--keep-alive", "15", "--timeout", "600"]
    options += ["--log-level", "warning", "--no-control-socket", "--pythonpath", str(ROOT)]
    command = [str(programs / "gunicorn"), "-b", f"127.0.0.1:{port}", "--workers", WORKERS, *options, application]
    # Elsewhere, since it would take the project's gunicorn.conf.py here.
    with launch(command, port, variables, VENV) as web:
        yield web


@contextmanager
def serve_uvicorn(programs: Path, application: str, variables: Mapping[str, str]) -> Iterator[Web]:
    port = find_port()
    options = ["--workers", WORKERS, "--port", str(port), "--log-level", "warning", "--no-access-log"]
    with launch([str(programs / "uvicorn"), *options, application], port, variables) as web:
        yield web


def find_php() -> str:
    """PHP's FastCGI process manager; nothing if it, its PDO driver or nginx are missing."""
    found = sorted(str(path) for path in Path("/usr/sbin").glob("php-fpm*"))
    if not found or not shutil.which("nginx", path="/usr/sbin:/usr/bin"):
        return ""
    modules = subprocess.run([found[-1], "-m"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return found[-1] if "pdo_pgsql" in modules else ""


FPM = """
[global]
error_log = /dev/stderr
log_level = error
[www]
listen = {folder}/php.sock
{user}
pm = static
pm.max_children = 8
clear_env = no
php_admin_value[memory_limit] = -1
php_admin_value[max_execution_time] = 0
"""
NGINX = """
daemon off; worker_processes {workers}; pid {folder}/nginx.pid; error_log stderr error; {user}
events {{}}
http {{
    access_log off; keepalive_requests 1000000;
    client_body_temp_path {folder}/body; fastcgi_temp_path {folder}/fastcgi; proxy_temp_path {folder}/proxy;
    scgi_temp_path {folder}/scgi; uwsgi_temp_path {folder}/uwsgi;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            fastcgi_pass unix:{folder}/php.sock; fastcgi_read_timeout 600; include /etc/nginx/fastcgi_params;
            fastcgi_param SCRIPT_FILENAME {script};
        }}
    }}
}}
"""


@contextmanager
def serve_php(php: str, script: Path, variables: Mapping[str, str]) -> Iterator[Web]:
    """PHP-FPM behind nginx, below one process."""
    port, root = find_port(), os.getuid() == 0
    url = urlsplit(variables["BENCH_DSN"])
    pdo = f"pgsql:host={parse_qs(url.query)['host'][0]};dbname={url.path[1:]};user={url.username}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        values = {"folder": folder, "port": port, "script": script, "workers": WORKERS}
        me = getpass.getuser()
        users = (f"user = {me}\ngroup = {me}", f"user {me};") if root else ("", "")
        (folder / "fpm.conf").write_text(FPM.format(user=users[0], **values))
        (folder / "nginx.conf").write_text(NGINX.format(user=users[1], **values))
        fpm = f"{php} --nodaemonize --allow-to-run-as-root --fpm-config fpm.conf"
        shell = f"{fpm} & until test -S php.sock; do sleep 0.05; done; exec nginx -p . -c nginx.conf"
        path = f"{os.environ['PATH']}:/usr/sbin"
        with launch(["sh", "-c", shell], port, {**variables, "BENCH_PDO": pdo, "PATH": path}, folder) as web:
            yield web


# The limits -------------------------------------------------------------------


class TooMuchError(Exception):
    """A peer that needs more than there is: in a word or two, what."""


@dataclass
class Rival:
    """A contestant; stopped says why it no longer takes part."""

    name: str
    page: Page
    most_bytes: int = BYTES_AT_MOST
    most_seconds: float = SECONDS_AT_MOST
    stopped: str = ""

    def read(self, wanted: Range) -> Reading | None:
        """An answer; None, and its server is no more, when it took too much or broke."""
        with subprocess.Popen(self.page.curl(wanted), stdout=subprocess.PIPE, text=True) as curl:
            try:
                self.watch(curl)
                told = curl.communicate()[0]
                return understand(told, curl.returncode)
            except (TooMuchError, ConnectionError) as error:
                self.stopped = str(error)
                self.page.web.kill()
                tell(f"    {self.name}: stopped, {error}")
            finally:
                curl.kill()  # if it still runs, this program being interrupted too
        return None

    def watch(self, curl: subprocess.Popen[str]) -> None:
        """Waits until curl has the answer; TooMuchError when that takes too much."""
        until = time.monotonic() + self.most_seconds
        while True:
            try:
                curl.wait(WATCH_EVERY)
            except subprocess.TimeoutExpired:
                self.check(until)
            else:
                return

    def check(self, until: float) -> None:
        if self.peak() > self.most_bytes:
            raise TooMuchError(f"> {self.most_bytes / 1e9:g} GB")
        if time.monotonic() > until:
            raise TooMuchError(f"> {self.most_seconds:g} s")

    def peak(self) -> int:
        """The most resident bytes of the largest of its processes since forget_peak."""
        return max(peak_memory(self.page.web).values(), default=0)
