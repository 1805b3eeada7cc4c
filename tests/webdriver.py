"""Firefox and WebKit (the engine of Safari) as Debian has them, driven by the commands of W3C's WebDriver.

WebKit brings a server for them, which talks HTTP. Firefox takes the same commands by its own protocol, Marionette, so
that no further program is needed.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from tests.conftest import answers, free_port, wait_for

FIREFOX = next(filter(None, map(shutil.which, ("firefox-esr", "firefox"))), None)
WEBKIT = shutil.which("WebKitWebDriver")
MINI_BROWSER = next(Path("/usr/lib").glob("*/webkit*gtk-*/MiniBrowser"), None)

# Marionette's name for a command, and where WebDriver over HTTP has it.
COMMANDS = {
    "NewSession": ("POST", ""),
    "Navigate": ("POST", "/url"),
    "ExecuteScript": ("POST", "/execute/sync"),
    "FindElement": ("POST", "/element"),
    "ElementClick": ("POST", "/element/{id}/click"),
    "ElementSendKeys": ("POST", "/element/{id}/value"),
}
Send = Callable[[str, Mapping[str, Any]], Any]


@dataclass
class Driven:
    """A browser with a page. Elements are named by XPath."""

    send: Send
    downloads: Path

    def run(self, script: str, *arguments: Any) -> Any:
        return self.send("ExecuteScript", {"script": script, "args": arguments})

    def wait(self, condition: str) -> Any:
        """For an expression of JavaScript to become true; gives its value."""
        return wait_for(lambda: self.run(f"return {condition}"))

    def go(self, url: str) -> None:
        self.send("Navigate", {"url": url})

    def find(self, xpath: str) -> str:
        (element,) = self.send("FindElement", {"using": "xpath", "value": xpath}).values()
        return str(element)

    def wait_for(self, xpath: str) -> str:
        """An element, once it can be seen."""
        self.wait(f"document.evaluate({json.dumps(xpath)}, document, null, 9, null).singleNodeValue?.checkVisibility()")
        return self.find(xpath)

    def click(self, xpath: str) -> None:
        self.send("ElementClick", {"id": self.wait_for(xpath)})

    def choose(self, name: str, value: str) -> None:
        """A value of a select."""
        self.send("ElementClick", {"id": self.find(f"//select[@name='{name}']/option[@value='{value}']")})

    def press(self, name: str, place: str = "") -> None:
        """A button, by its text, within the element that has an id."""
        self.click(f"{place and f'//*[@id={place!r}]'}//button[.='{name}']")

    def type(self, xpath: str, text: str) -> None:
        self.send("ElementSendKeys", {"id": self.wait_for(xpath), "text": text})

    def files(self) -> list[bytes]:
        """What was downloaded, and what is being downloaded."""
        with suppress(FileNotFoundError):  # renamed meanwhile
            return [file.read_bytes() for file in self.downloads.iterdir()]
        return []

    def remove_files(self) -> None:
        for file in self.downloads.iterdir():
            file.unlink()

    def print(self, width: float, height: float) -> bytes:
        """A PDF on paper of so many centimetres. WebKit has no such command."""
        return base64.b64decode(self.send("Print", {"page": {"width": width, "height": height}}))


@contextmanager
def running(command: list[str], folder: Path, **environ: str) -> Iterator[None]:
    """A program whose home is a folder of ours."""
    home = {"HOME": str(folder), "XDG_RUNTIME_DIR": str(folder), "LANG": "C.UTF-8", **environ}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **home},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # WebKit's server leaves its browser behind
            process.wait(60)


def receive(stream: Any) -> Any:
    """A message of Marionette's: its length, a colon, JSON."""
    length = b""
    while (byte := stream.read(1)) != b":":
        assert byte, "Firefox is gone"
        length += byte
    return json.loads(stream.read(int(length)))


@contextmanager
def run_firefox(folder: Path, preferences: Mapping[str, Any]) -> Iterator[Driven]:
    """Without a window."""
    profile, downloads = folder / "profile", folder / "downloads"
    profile.mkdir(parents=True)
    downloads.mkdir()
    set_up = {
        "marionette.port": 0,  # a free one, which stands in a file then
        "browser.download.folderList": 2,
        "browser.download.dir": str(downloads),
        "datareporting.policy.dataSubmissionEnabled": False,
        **preferences,
    }
    lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in set_up.items()]
    (profile / "user.js").write_text("".join(lines), "utf-8")
    command = [str(FIREFOX), "--headless", "--marionette", "--no-remote", "--profile", str(profile)]
    with running(command, folder):
        port = int(wait_for(lambda: read_text(profile / "MarionetteActivePort")))
        with socket.create_connection(("127.0.0.1", port), 60) as connection, connection.makefile("rb") as stream:
            assert receive(stream)["marionetteProtocol"] == 3

            def send(name: str, parameters: Mapping[str, Any]) -> Any:
                message = json.dumps([0, 1, f"WebDriver:{name}", parameters]).encode()
                connection.sendall(b"%d:%b" % (len(message), message))
                _, _, error, result = receive(stream)
                assert error is None, error
                return result["value"] if [*result] == ["value"] else result

            send("NewSession", {"capabilities": {"alwaysMatch": {}}})
            yield Driven(send, downloads)


def read_text(path: Path) -> str:
    with suppress(FileNotFoundError):
        return path.read_text("ascii")
    return ""


@contextmanager
def run_display(folder: Path) -> Iterator[str]:
    """The name of an X display without a screen."""
    (folder / "display").mkdir(parents=True)
    with (folder / "display/number").open("w+", encoding="ascii") as number:
        command = ["Xvfb", "-displayfd", str(number.fileno()), "-screen", "0", "1400x1000x24", "-nolisten", "tcp"]
        process = subprocess.Popen(command, pass_fds=[number.fileno()], stderr=subprocess.DEVNULL)
        try:
            yield ":" + wait_for(lambda: read_text(folder / "display/number").strip())
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def run_webkit(folder: Path, **environ: str) -> Iterator[Driven]:
    """WebKitGTK's MiniBrowser, on a display of its own."""
    port, downloads = free_port(), folder / "Downloads"
    downloads.mkdir(parents=True)
    (folder / ".config").mkdir()
    (folder / ".config/user-dirs.dirs").write_text('XDG_DOWNLOAD_DIR="$HOME/Downloads"\n', "ascii")
    with (
        run_display(folder) as display,
        running([str(WEBKIT), f"--port={port}"], folder, DISPLAY=display, GDK_BACKEND="x11", **environ),
    ):
        wait_for(lambda: answers(port))
        session = ""

        def send(name: str, parameters: Mapping[str, Any]) -> Any:
            method, path = COMMANDS[name]
            path = f"/session{session}{path}".format(**parameters)
            body = json.dumps({key: value for key, value in parameters.items() if key != "id"}).encode()
            connection = HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request(method, path, body)
            value = json.loads(connection.getresponse().read())["value"]
            connection.close()
            assert not (isinstance(value, dict) and "error" in value), value
            return value

        options = {"binary": str(MINI_BROWSER), "args": ["--automation"]}
        made = send("NewSession", {"capabilities": {"alwaysMatch": {"webkitgtk:browserOptions": options}}})
        session = f"/{made['sessionId']}"
        yield Driven(send, downloads)
