"""Clients that speak real HTTP: whole answers, curl, those that stop reading, and connections that are cut."""

from __future__ import annotations

import io
import socket
import socketserver
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from prometheus_client.parser import text_string_to_metric_families
from werkzeug.datastructures import Headers
from werkzeug.test import EnvironBuilder, TestResponse

from tests.conftest import Client, Database, Gunicorn, wait_for


def calls_url(gunicorn: Gunicorn, **parameters: Any) -> str:
    return f"{gunicorn.url}/api/calls?{urlencode({'domain_name': 'alpha.example.com'} | parameters)}"


Answer = TestResponse  # by another name, lest pytest take it for a class of tests


def fetch(url: str, token: str | None = None, *, method: str = "GET", body: str = "", seconds: float = 60) -> Answer:
    """A whole answer, by a connection of its own; OSError or HTTPException if there is none in so many seconds."""
    parts = urlsplit(url)
    headers = {"Content-Type": "application/json" if body[:1] == "{" else "application/x-www-form-urlencoded"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    with closing(HTTPConnection(parts.netloc, timeout=seconds)) as connection:
        connection.request(method, f"{parts.path}?{parts.query}".rstrip("?"), body or None, headers)
        response = connection.getresponse()
        content = response.read()
    status = f"{response.status} {response.reason}"
    return Answer([content], status, Headers(response.getheaders()), EnvironBuilder(parts.path).get_request())


Request = tuple[str, str, str]  # method, path and body


def ask(gunicorn: Gunicorn, token: str | None, request: Request, seconds: float = 60) -> Answer:
    method, path, body = request
    return fetch(gunicorn.url + path, token, method=method, body=body, seconds=seconds)


def curl(url: str, token: str, *options: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["curl", "-sS", *options, "-H", f"Authorization: Bearer {token}", url], capture_output=True, check=False
    )


def scrape(gunicorn: Gunicorn) -> dict[tuple[str, ...], float]:
    """The value of each metric, by its name and the values of its labels."""
    text = curl(f"{gunicorn.url}/metrics", "").stdout.decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Download:
    """curl, which goes on receiving an answer only when its output is read; with ends it."""

    def __init__(self, url: str, token: str) -> None:
        command = ["curl", "-sS", "-H", f"Authorization: Bearer {token}", url]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.output = self.process.stdout or io.BytesIO()
        self.begin = self.output.read(10_000)

    def finish(self) -> tuple[int, bytes]:
        """curl's exit status, 18 for an answer that broke off, and the body."""
        body = self.begin + self.output.read()
        return self.process.wait(60), body

    def __enter__(self) -> Download:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.output.close()
        self.process.wait(60)


@contextmanager
def downloads(gunicorn: Gunicorn, token: str, *formats: str) -> Iterator[list[Download]]:
    """Every call of alpha.example.com in some formats, at the same time."""
    with ExitStack() as stack:
        yield [stack.enter_context(Download(calls_url(gunicorn, format=kind), token)) for kind in formats]


def reach(gunicorn: Gunicorn) -> socket.socket:
    """A connection to the service, for what no HTTP library would send."""
    parts = urlsplit(gunicorn.url)
    return socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=60)


def open_stream(gunicorn: Gunicorn, token: str, buffer: int = 4096, **parameters: Any) -> tuple[socket.socket, bytes]:
    """A client that reads the first bytes of an answer and then stops reading."""
    parts = urlsplit(calls_url(gunicorn, **parameters))
    client = reach(gunicorn)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    client.sendall(
        f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    )
    return client, client.recv(2000)


Cut = Callable[[bytes], bytes]


def command_lines() -> str:
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_text("utf-8", "replace"))
        except OSError:  # it ended meanwhile
            continue
    return "\n".join(lines)


@dataclass
class Cable:
    """Between a client and the service: hands on what keep lets through, and cuts the connection.

    Like some proxies it puts the length first, so that a cut head can look whole.
    """

    url: str
    keep: Callable[[bytes], bytes]
    seen: list[str] = field(default_factory=list)  # what ran meanwhile
    answer: bytes = b""

    def carry(self, request: bytes) -> bytes:
        """The service's raw answer to a raw request, as far as it gets through."""
        self.seen.append(command_lines())
        address = urlsplit(self.url)
        line, _, rest = request.partition(b"\r\n")
        connection = HTTPConnection(address.hostname or "", address.port)
        with closing(connection):
            connection.connect()
            connection.send(line + b"\r\nConnection: close\r\n" + rest)
            self.answer = b""
            while piece := connection.sock.recv(65536):
                self.answer += piece
        head, _, body = self.answer.partition(b"\r\n\r\n")
        status, *headers = head.split(b"\r\n")
        headers.sort(key=lambda header: not header.lower().startswith((b"content-length", b"transfer-encoding")))
        return self.keep(b"\r\n".join([status, *headers, b"", body]))

    @contextmanager
    def laid(self) -> Iterator[str]:
        """The URL of the cable's other end."""
        carry = self.carry

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                request = b""
                while not request.endswith(b"\r\n\r\n"):
                    request += self.request.recv(65536)
                self.request.sendall(carry(request))

        with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=[0.01])
            thread.start()
            try:
                yield f"http://127.0.0.1:{server.server_address[1]}/api"
            finally:
                server.shutdown()
                thread.join()


def get_while_rewritten(database: Database, table: str, client: Client, path: str, **parameters: str) -> Any:
    """The body of an answer that has waited for a table which was being rewritten."""
    waiting = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
    with ThreadPoolExecutor() as pool:
        with database.connect() as connection, connection.transaction():
            connection.execute(f"ALTER TABLE {table} ADD again timestamptz DEFAULT clock_timestamp()")
            future = pool.submit(client.get, path, **parameters)
            wait_for(lambda: future.done() or database.execute(waiting, [database.name]))
        response = future.result()
    database.execute(f"ALTER TABLE {table} DROP again")
    assert response.status_code == 200, response.text
    return response.get_json()
