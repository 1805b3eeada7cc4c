"""A real nginx that serves with the files of deploy/, beside a FusionPBX's own rules; nothing under /etc is touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from werkzeug.datastructures import Headers
from werkzeug.test import TestResponse
from werkzeug.wrappers import Request

from tests.conftest import ROOT, answers, free_port, wait_for

# /usr/sbin is not on everybody's path.
NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin")

NAME = "pbx.example.com"

# Where each shipped file is installed, seen from nginx.conf.
FILES = {
    "nginx-http.conf": "conf.d/cdr-api.conf",
    "nginx-path.conf": "snippets/cdr-api.conf",
    "nginx-server.conf": "sites-enabled/cdr-api",
}

MAIN = """
daemon off;
worker_processes 1;
pid FOLDER/nginx.pid;
error_log FOLDER/error.log;
events {}
http {
    access_log FOLDER/access.log;
    client_body_temp_path FOLDER/temp/body;
    proxy_temp_path FOLDER/temp/proxy;
    fastcgi_temp_path FOLDER/temp/fastcgi;
    scgi_temp_path FOLDER/temp/scgi;
    uwsgi_temp_path FOLDER/temp/uwsgi;
    include conf.d/*.conf;
    include sites-enabled/*;
}
"""

# What of FusionPBX's file could come between a client and the service (FACTS).
FUSIONPBX = """
server {
    listen 127.0.0.1:HTTP_PORT;
    server_name fusionpbx;
    if ($uri !~* "provision|xml_cdr|firmware") {
        return 301 https://$host$request_uri;
    }
}

server {
    listen 127.0.0.1:HTTPS_PORT ssl;
    server_name fusionpbx;
    include snippets/cdr-api[.]conf;
    ssl_certificate FOLDER/nginx.crt;
    ssl_certificate_key FOLDER/nginx.key;
    rewrite ^(.*)/api/ $1/api/index.php last;
    location / { return 200 "a page of FusionPBX"; }
    location ~ \\.php$ { return 200 "a program of FusionPBX"; }
    location ~^.+.(db)$ { deny all; }
    location ~ /\\. { deny all; }
}
"""


def read_response(text: bytes) -> TestResponse:
    """What curl -i prints, as the responses that other tests look at."""
    head, _, body = text.partition(b"\r\n\r\n")
    version_and_status, *lines = head.decode().split("\r\n")
    headers = Headers()
    for line in lines:
        headers.add(*line.split(": ", 1))
    return TestResponse([body], version_and_status.partition(" ")[2], headers, Request({}))


@dataclass
class Nginx:
    """A running nginx; https is FusionPBX's server with our path in it, own our server, http FusionPBX's plain one."""

    folder: Path
    ports: dict[str, int]

    def url(self, way: str, path: str, **parameters: str) -> str:
        scheme = "http" if way == "http" else "https"
        query = f"?{urlencode(parameters)}" if parameters else ""
        return f"{scheme}://{NAME}:{self.ports[way]}{path}{query}"

    def command(self, url: str, *options: str, token: str | None = None) -> list[str]:
        """curl's, as a client that checks the certificate."""
        bearer = ["-H", f"Authorization: Bearer {token}"] if token else []
        here = ["--noproxy", "*", "--connect-to", f"{NAME}::127.0.0.1:"]
        return ["curl", "-sS", "--cacert", str(self.folder / "nginx.crt"), *here, *bearer, *options, url]

    def send(self, url: str, *options: str, token: str | None = None, body: bytes = b"") -> TestResponse:
        command = self.command(url, "-i", "-H", "Expect:", *options, token=token)
        return read_response(subprocess.run(command, input=body, stdout=subprocess.PIPE, check=True).stdout)

    def logs(self) -> str:
        return "".join(path.read_text("utf-8") for path in sorted(self.folder.glob("*.log")))


def make_certificate(folder: Path) -> None:
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -keyout nginx.key"
    names = ["-out", "nginx.crt", "-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}"]
    subprocess.run([*command.split(), *names], cwd=folder, check=True, capture_output=True)


def install(folder: Path, words: Mapping[str, str]) -> None:
    """What a sysadmin copies, with other words where it would meet the machine's own nginx."""
    texts = {place: (ROOT / "deploy" / name).read_text("utf-8") for name, place in FILES.items()}
    missing = [word for word in words if not any(word in text for text in [MAIN, FUSIONPBX, *texts.values()])]
    assert missing == [], "these files have changed: what stands for a path or port in them?"
    texts |= {"nginx.conf": MAIN, "sites-enabled/fusionpbx": FUSIONPBX}
    for place, text in texts.items():
        for word, other in words.items():
            text = text.replace(word, other)  # noqa: PLW2901
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text(text, "utf-8")
    (folder / "temp").mkdir()


@contextmanager
def run_nginx(socket: Path, changes: Mapping[str, str] | None = None) -> Iterator[Nginx]:
    """nginx in front of the service's socket; changes are made to the shipped files' text."""
    assert NGINX
    ports = {way: free_port() for way in ("http", "https", "own")}
    words = {
        "/run/cdr-api/socket": str(socket),
        "/etc/ssl/certs/nginx.crt": "FOLDER/nginx.crt",
        "/etc/ssl/private/nginx.key": "FOLDER/nginx.key",
        "/var/log/nginx/": "FOLDER/",
        "[::]:8443": f"127.0.0.1:{free_port()}",  # not every machine has IPv6
        "listen 8443": f"listen 127.0.0.1:{ports['own']}",
        # So that less than a gigabyte is more than nginx takes ahead of its client.
        "temp_file_size 1100m": "temp_file_size 256m",
        "HTTP_PORT": str(ports["http"]),
        "HTTPS_PORT": str(ports["https"]),
        **(changes or {}),
    }
    with tempfile.TemporaryDirectory(prefix="cdr-api-nginx-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # started by root, nginx works as nobody
        make_certificate(folder)
        install(folder, words | {"FOLDER": name})
        process = subprocess.Popen([NGINX, "-p", name, "-c", "nginx.conf", "-e", "stderr"])
        try:
            wait_for(lambda: process.poll() is not None or all(map(answers, ports.values())))
            assert process.poll() is None, "nginx did not start"
            yield Nginx(folder, ports)
        finally:
            process.terminate()
            process.wait(60)
