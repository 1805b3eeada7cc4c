"""A headless Chromium on the two pages of a service, under watch."""

from __future__ import annotations

import shutil
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from tests.conftest import PASSWORD, Client
from tests.nginx import NAME

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed (apt install chromium)")

READER = "anna@example.com"
PHONE = {"width": 390, "height": 800}
NOW = "2026-12-03T12:00:00Z"  # on every page, so that the invented calls are of the month before
DESKTOP = {"width": 1280, "height": 900}

OF_NOVEMBER = {"from": "2026-11-01", "to": "2026-11-30"}
FILE_FIELDS = (
    "xml_cdr_uuid,domain_name,direction,start_stamp,answer_stamp,end_stamp,duration,billsec,caller_id_name,"
    "caller_id_number,source_number,caller_destination,destination_number,accountcode,leg,missed_call,hangup_cause"
)

# The browser itself writes a line for each answer that is not 2xx, and for each that it does not get.
EXPECTED = (
    "the server responded with a status of",
    "net::ERR_INCOMPLETE_CHUNKED_ENCODING",
    "net::ERR_INTERNET_DISCONNECTED",
)
# Comes back when the page has heard of it.
GO = """view => new Promise(done => {
  const before = location.hash;
  addEventListener("hashchange", done, { once: true });
  location.hash = new URLSearchParams(view);
  if (location.hash === before) done();
})"""

expect.set_options(timeout=20_000)  # as for everything else, for machines that are busy


@dataclass
class Visit:
    """A page under watch: what its console says, and what it asks of which hosts."""

    page: Page
    errors: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self.note_message)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self.note_request)

    def note_message(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(text in message.text for text in EXPECTED):
            self.errors.append(message.text)

    def note_request(self, request: Request) -> None:
        if not request.url.startswith(("data:", "blob:")):
            self.asked.append(request.url)

    def hosts(self) -> set[str]:
        return {urlsplit(url).netloc for url in self.asked}

    def log_in(self, email: str = READER, password: str = PASSWORD) -> None:
        form = self.page.locator("#login")
        form.get_by_label("E-mail address").fill(email)
        form.get_by_label("Password").fill(password)
        form.get_by_role("button", name="Log in", exact=True).click()

    def show(self, **fragment: str) -> None:
        """Leads a page of usage that is logged in to a view, and waits until it is there."""
        self.page.evaluate(GO, fragment)
        self.wait_until_read()

    def wait_until_read(self) -> None:
        expect(self.page.locator("#report")).to_have_attribute("aria-busy", "false")

    def rows(self, table: str, part: str = "tBodies[0]") -> list[list[str]]:
        rows = f"[...document.getElementById('{table}').{part}.rows]"
        script = f"{rows}.map(row => [...row.cells].map(cell => cell.textContent))"
        found: list[list[str]] = self.page.evaluate(script)
        return found

    def text(self, name: str) -> str:
        return self.page.locator(f"#{name}").text_content() or ""

    def violations(self) -> list[tuple[str, Any]]:
        found = Axe().run(self.page).response["violations"]
        return [(violation["id"], [node["target"] for node in violation["nodes"]]) for violation in found]

    def is_too_wide(self) -> bool:
        wide: bool = self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        return wide


@contextmanager
def launch() -> Iterator[Browser]:
    # Started by root, as in a container, Chromium wants no sandbox.
    options = ["--no-sandbox", f"--host-resolver-rules=MAP {NAME} 127.0.0.1"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


Opener = Callable[..., Visit]


@contextmanager
def opening(browser: Browser, url: str) -> Iterator[Opener]:
    """Opens pages; in the end none may have asked another host, complained, or broken the policy."""
    made: list[Visit] = []

    def open_page(path: str, viewport: dict[str, int] = DESKTOP, url: str = url, **options: Any) -> Visit:
        context = browser.new_context(viewport=viewport, ignore_https_errors=True, **{"locale": "en-US", **options})  # type: ignore[arg-type]
        context.set_default_timeout(20_000)
        context.clock.set_fixed_time(NOW)
        made.append(Visit(context.new_page()))
        made[-1].page.goto(url + path)
        return made[-1]

    yield open_page
    for opened in made:
        opened.page.context.close()
        assert opened.errors == []
        assert len(opened.hosts()) == 1


def download_of(client: Client, domain: str) -> bytes:
    """What the page's file of a domain's calls in OF_NOVEMBER holds: a BOM, and what the route sends."""
    query = {
        **OF_NOVEMBER,
        "domain_name": domain,
        "billable_only": "true",
        "fields": FILE_FIELDS,
        "format": "csv",
        "csv_safe": "true",
    }
    data: bytes = client.get("/api/call_range", **query).data
    return BOM_UTF8 + data
