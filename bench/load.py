"""A small load generator: python -m bench.load PORT CONNECTIONS SECONDS PATH TOKEN.

Each connection is kept alive and has one request on its way at any time. Prints
how many answers came per second (requests per second) and stops at the first
answer that is not of the status of the first one.
"""

from __future__ import annotations

import socket
import sys
import threading
import time


def read_answer(client: socket.socket) -> bytes:
    """The status line of one answer, which is read whole, by its Content-Length or its chunks."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += receive(client)
    head, _, body = data.partition(b"\r\n\r\n")
    _, found, length = head.lower().partition(b"content-length:")
    if not found:
        # The answers are JSON, which never has the last chunk's line breaks within.
        while not body.endswith(b"0\r\n\r\n"):
            body += receive(client)
        return head.split(b"\r\n")[0]
    left = int(length.split(b"\r\n")[0]) - len(body)
    while left > 0:
        left -= len(receive(client))
    return head.split(b"\r\n")[0]


def receive(client: socket.socket) -> bytes:
    data = client.recv(65536)
    if not data:
        raise ConnectionError("the server closed the connection")
    return data


def ask(port: int, request: bytes, until: float, counts: list[int]) -> None:
    """Asks over one connection until a moment (seconds of time.monotonic)."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        statuses = set()
        count = 0
        while time.monotonic() < until:
            client.sendall(request)
            statuses.add(read_answer(client))
            count += 1
        if len(statuses) == 1:
            counts.append(count)


def main(port: str, connections: str, seconds: str, path: str, token: str) -> None:
    request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
    counts: list[int] = []
    start = time.monotonic()
    arguments = (int(port), request, start + float(seconds), counts)
    threads = [threading.Thread(target=ask, args=arguments) for _ in range(int(connections))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(counts) < len(threads):
        sys.exit("a connection failed or had answers of different statuses")
    print(sum(counts) / (time.monotonic() - start))


if __name__ == "__main__":
    main(*sys.argv[1:])
