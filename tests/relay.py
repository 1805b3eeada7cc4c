"""A way between a client and a service that stops half-way: a network's, a proxy's or a server's fault."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Relay:
    """Hands bytes on to a service and back. Of answers to one path it may let only so many through."""

    upstream: tuple[str, int]
    listener: socket.socket
    path: bytes = b""  # of the answers that are stopped
    limit: int = 0  # the bytes of such an answer that are let through
    holds: bool = False  # whether the rest has to wait, and is not cut off
    go_on: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def cut(self, path: str, limit: int) -> None:
        self.path, self.limit, self.holds = path.encode(), limit, False

    def hold(self, path: str, limit: int) -> None:
        self.path, self.limit, self.holds = path.encode(), limit, True
        self.go_on.clear()

    def release(self) -> None:
        self.path = b""
        self.go_on.set()

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:  # closed: the test is over
                return
            server = socket.create_connection(self.upstream)
            stopped = threading.Event()
            threading.Thread(target=self.send, args=(client, server, stopped), daemon=True).start()
            threading.Thread(target=self.answer, args=(client, server, stopped), daemon=True).start()

    def send(self, client: socket.socket, server: socket.socket, stopped: threading.Event) -> None:
        """What the client asks; marks the connection whose answer is to be stopped."""
        with suppress(OSError):
            while data := client.recv(65_536):
                if self.path and b" " + self.path in data:
                    stopped.set()
                server.sendall(data)
        close(server)

    def answer(self, client: socket.socket, server: socket.socket, stopped: threading.Event) -> None:
        count = 0
        with suppress(OSError):
            while data := server.recv(4096):
                if stopped.is_set() and count >= self.limit:
                    if not self.holds:
                        break
                    self.go_on.wait()
                    stopped.clear()
                count = count + len(data) if stopped.is_set() else 0
                client.sendall(data)
        close(client)


def close(connection: socket.socket) -> None:
    """Ends a connection that another thread may be reading from."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextmanager
def relaying(url: str) -> Iterator[Relay]:
    """A relay in front of the service that has a URL."""
    there = urlsplit(url)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        relay = Relay((there.hostname or "", there.port or 0), listener)
        threading.Thread(target=relay.accept, daemon=True).start()
        yield relay
        relay.release()
        listener.shutdown(socket.SHUT_RDWR)
