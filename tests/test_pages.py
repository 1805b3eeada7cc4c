"""/api/docs and /api/usage in a real browser: what they show, and what they never do."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from cdr_pages import ASSETS, LIBRARIES
from tests.conftest import PASSWORD, ROOT, Client, Database, Gunicorn, problem, serve, wait_for
from tests.nginx import NAME, NGINX, run_nginx

pytestmark = pytest.mark.direct("is about browsers")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed (apt install chromium)")

ALPHA = "alpha.example.com"
EMAIL = "anna@example.com"
PHONE = {"width": 360, "height": 700}
DESKTOP = {"width": 1280, "height": 900}

# Files ------------------------------------------------------------------------

PAGES = ("/api/docs", "/api/usage")
FILES = (*PAGES, *(f"/api/assets/{name}" for name in ASSETS))


def test_the_libraries_are_the_files_that_their_readme_names() -> None:
    folder = ROOT / "pages" / "vendor"
    named = dict(
        re.findall(r"^\| `([^`]+)` .*`([0-9a-f]{64})` \|$", (folder / "README.md").read_text("utf-8"), re.MULTILINE)
    )
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert named == {name: digest for name, digest in found.items() if name not in ("README.md", "fetch.sh")}
    assert {Path(name).name for name in LIBRARIES} <= set(named)


@pytest.mark.parametrize("path", FILES)
def test_a_file_is_served_with_a_strict_policy_and_kept_until_it_changes(database: Database, path: str) -> None:
    client = database.client()
    response = client.get(path)
    assert response.status_code == 200
    assert "unsafe" not in response.headers["Content-Security-Policy"]
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    again = client.send("GET", path, headers={"If-None-Match": response.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


def test_no_page_names_a_place_elsewhere_or_holds_a_script() -> None:
    for path in (ROOT / "pages").glob("*.*"):
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"""https?:|["'(]//|\bstyle=|\bon\w+=|(src|href)="/""", text), path
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style", text), path


@pytest.mark.parametrize(
    "name", ["nothing.js", "docs.html", "README.md", "fetch.sh", "..%2fcdr_api.py", "vendor/README.md"]
)
def test_no_other_file_is_served(database: Database, name: str) -> None:
    assert database.client().get(f"/api/assets/{name}").status_code == 404


def test_switched_off_nothing_of_it_is_there(database: Database) -> None:
    client = database.client(app=database.app(CDR_API_PAGES="off"))
    for path in FILES:
        response = client.get(path)
        assert response.status_code == 404
        assert problem(response) == problem(client.get("/api/nothing"))


# The browser ------------------------------------------------------------------


@dataclass
class Visit:
    """A page under watch: what its console says and which hosts it asks."""

    page: Page
    errors: list[str] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.page.on("console", self.note_message)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", self.note_request)

    def note_message(self, message: ConsoleMessage) -> None:
        # The browser itself writes a line for each answer that is not 2xx.
        if message.type in ("error", "warning") and "the server responded with a status of" not in message.text:
            self.errors.append(message.text)

    def note_request(self, request: Request) -> None:
        if not request.url.startswith(("data:", "blob:")):
            self.hosts.add(urlsplit(request.url).netloc)

    def log_in(self, email: str = EMAIL, password: str = PASSWORD) -> None:
        self.page.get_by_label("E-mail address").fill(email)
        self.page.get_by_label("Password").fill(password)
        self.page.get_by_role("button", name="Log in", exact=True).click()

    def choose_month(self, month: str = "2026-11") -> None:
        self.page.get_by_label("Month", exact=True).fill(month)
        self.wait_until_read(datetime.fromisoformat(f"{month}-01").strftime("%B %Y"))

    def wait_until_read(self, title: str) -> None:
        expect(self.page.get_by_role("heading", level=1)).to_contain_text(title)
        expect(self.page.locator("#report")).to_have_attribute("aria-busy", "false")

    def rows(self, table: str, part: str = "tBodies[0]") -> list[list[str]]:
        script = f"[...{table}.{part}.rows].map(row => [...row.cells].map(cell => cell.textContent))"
        found: list[list[str]] = self.page.evaluate(script)
        return found

    def violations(self) -> list[tuple[str, Any]]:
        found = Axe().run(self.page).response["violations"]
        return [(violation["id"], [node["target"] for node in violation["nodes"]]) for violation in found]

    def is_too_wide(self) -> bool:
        wide: bool = self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        return wide


@pytest.fixture(scope="module")
def gunicorn(database: Database) -> Iterator[Gunicorn]:
    database.account(ALPHA, "beta.example.com", email=EMAIL)
    with serve(database.dsn) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    # Started by root, as in a container, Chromium wants no sandbox.
    options = ["--no-sandbox", f"--host-resolver-rules=MAP {NAME} 127.0.0.1"]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield chromium
        chromium.close()


@contextmanager
def opening(browser: Browser, url: str) -> Iterator[Opener]:
    """Opens pages; in the end none may have asked another host, complained, or broken the policy."""
    made: list[Visit] = []

    def open_page(path: str, viewport: dict[str, int] = DESKTOP, url: str = url) -> Visit:
        context = browser.new_context(viewport=viewport, ignore_https_errors=True)  # type: ignore[arg-type]
        context.set_default_timeout(20_000)
        made.append(Visit(context.new_page()))
        made[-1].page.goto(url + path)
        return made[-1]

    yield open_page
    for opened in made:
        opened.page.context.close()
        assert opened.errors == []
        assert len(opened.hosts) == 1


Opener = Callable[..., Visit]


@pytest.fixture
def visit(browser: Browser, gunicorn: Gunicorn) -> Iterator[Opener]:
    with opening(browser, gunicorn.url) as opener:
        yield opener


def open_november(opener: Opener) -> Visit:
    """/api/usage, logged in, with November 2026 of alpha.example.com."""
    opened: Visit = opener("/api/usage")
    opened.log_in()
    opened.choose_month()
    return opened


@pytest.fixture
def usage(visit: Opener) -> Visit:
    return open_november(visit)


@pytest.fixture(scope="module")
def november(browser: Browser, gunicorn: Gunicorn) -> Iterator[Visit]:
    """For tests that only look."""
    with opening(browser, gunicorn.url) as opener:
        yield open_november(opener)


def tokens(database: Database) -> int:
    query = "SELECT count(*) FROM cdr_api.tokens JOIN cdr_api.accounts USING (account_id) WHERE email = %s"
    count: int = database.execute(query, [EMAIL])[0][0]
    return count


# docs -------------------------------------------------------------------------

FIELDS = "end_stamp,destination_number,billsec"
DAY = {"from": "2026-11-17", "to": "2026-11-17"}


def try_call_range(page: Page) -> Any:
    """Fills in and executes call_range; gives what it answers."""
    block = page.locator("[id$=-call_range]")
    block.locator(".opblock-summary-control").click()
    for name, value in {"domain_name": ALPHA, **DAY, "fields": FIELDS}.items():
        block.locator(f"tr[data-param-name={name}] input").fill(value)
    with page.expect_response(lambda response: "/call_range?" in response.url) as answer:
        block.get_by_role("button", name="Execute").click()
    expect(block.locator(".live-responses-table .response .response-col_status")).to_contain_text(
        str(answer.value.status)
    )
    expect(block.locator(".live-responses-table .response-col_description code").first).to_contain_text("{")
    return answer.value.json()


@in_a_browser
def test_docs_log_in_and_try_a_route(database: Database, client: Client, visit: Opener) -> None:
    docs = visit("/api/docs")
    docs.log_in()
    expect(docs.page.get_by_text(EMAIL, exact=True)).to_be_visible()
    calls = client.call_range("2026-11-17", "2026-11-17", fields=FIELDS)
    assert try_call_range(docs.page) == calls != []
    expect(docs.page.locator(".live-responses-table")).to_contain_text(calls[0]["end_stamp"])
    docs.page.get_by_role("button", name="Log out").click()
    expect(docs.page.get_by_label("E-mail address")).to_be_focused()
    docs.page.get_by_role("button", name="Execute").click()
    expect(docs.page.locator(".live-responses-table")).to_contain_text("A valid bearer token is needed")


@in_a_browser
def test_docs_take_a_pasted_token(database: Database, client: Client, visit: Opener) -> None:
    page = visit("/api/docs").page
    page.get_by_role("button", name="Authorize").click()
    dialog = page.locator(".dialog-ux")
    dialog.locator("input").fill(client.token or "")
    dialog.locator("button.authorize").click()
    dialog.get_by_role("button", name="Close").last.click()
    assert try_call_range(page) == client.call_range("2026-11-17", "2026-11-17", fields=FIELDS)


# usage ------------------------------------------------------------------------

HELPERS = """(coalesce(leg::text, 'a') <> 'a' OR coalesce(hangup_cause, '') = 'LOSE_RACE'
              OR (coalesce(cc_side, '') = 'agent' OR originating_leg_uuid IS NOT NULL)
             AND NOT (direction = 'outbound' AND coalesce(billsec, 0) > 0))"""
NOVEMBER = "domain_name = 'alpha.example.com' AND end_stamp >= '2026-11-01' AND end_stamp < '2026-12-01'"


def count_days(database: Database, condition: str) -> dict[int, list[str]]:
    """The calls of each day of November as the page writes them, without the peaks."""
    query = f"""SELECT extract(day FROM end_stamp)::int, count(*), count(*) FILTER (WHERE billsec > 0),
                count(*) FILTER (WHERE NOT coalesce(billsec, 0) > 0), round(sum(coalesce(billsec, 0)) / 60.0, 1)
                FROM v_xml_cdr WHERE {NOVEMBER} AND {condition} GROUP BY 1"""
    return {day: [*(f"{number:,}" for number in numbers), f"{minutes:,.1f}"]
            for day, *numbers, minutes in database.execute(query)}  # fmt: skip


def count_peaks(database: Database, condition: str) -> dict[int, str]:
    """The most calls at once of each day of November: looked at when any of them begins, and at midnight."""
    query = f"""SELECT start_stamp, end_stamp FROM v_xml_cdr WHERE domain_name = 'alpha.example.com'
                AND end_stamp >= '2026-11-01' AND start_stamp < '2026-12-01' AND {condition}"""
    calls = database.execute(query)
    first = datetime.fromisoformat("2026-11-01T00:00Z")
    moments = {first + timedelta(days=day) for day in range(30)} | {start for start, _ in calls if start >= first}
    peaks: dict[int, int] = defaultdict(int)
    for moment in moments:
        day = moment.astimezone(first.tzinfo).day
        peaks[day] = max(peaks[day], sum(start <= moment < end for start, end in calls))
    return {day: str(peak) for day, peak in peaks.items()}


@in_a_browser
def test_usage_sums_the_month_and_draws_it(database: Database, november: Visit) -> None:
    query = f"""SELECT count(*), count(*) FILTER (WHERE billsec > 0), round(sum(billsec) / 60.0, 1)
                FROM v_xml_cdr WHERE {NOVEMBER} AND NOT {HELPERS}"""
    ((calls, answered, minutes),) = database.execute(query)
    expected = [f"{calls:,}", f"{answered:,}", f"{calls - answered:,}", f"{minutes:,.1f}"]
    assert november.rows("days", "tFoot")[0][1:5] == expected
    assert [
        november.page.locator(f"#{name}").text_content() for name in ("calls", "answered", "missed", "minutes")
    ] == expected
    peak = max(map(int, count_peaks(database, f"NOT {HELPERS}").values()))
    assert november.page.locator("#peak").text_content() == str(peak)
    drawn = november.page.evaluate("Chart.getChart('calls-plot').data.datasets.map(set => set.data)")
    assert [sum(series) for series in drawn] == [answered, calls - answered]
    expect(
        november.page.get_by_role("img", name=f"{answered:,} answered and {calls - answered:,} missed")
    ).to_be_visible()


@in_a_browser
def test_usage_shows_what_was_called_longest(database: Database, november: Visit) -> None:
    query = f"""SELECT destination_number, count(*), round(sum(coalesce(billsec, 0)) / 60.0, 1) FROM v_xml_cdr
                WHERE {NOVEMBER} AND NOT {HELPERS} AND direction = 'outbound'
                GROUP BY 1 ORDER BY sum(billsec) DESC, 2 DESC, destination_number COLLATE "C" LIMIT 10"""
    expected = [[number, f"{calls:,}", f"{minutes:,.1f}"] for number, calls, minutes in database.execute(query)]
    assert len(expected) == 10
    assert november.rows("destinations") == expected


@in_a_browser
@pytest.mark.parametrize(("billable_only", "condition"), [(True, f"NOT {HELPERS}"), (False, "true")])
def test_usage_shows_what_the_database_holds(
    database: Database, november: Visit, *, billable_only: bool, condition: str
) -> None:
    november.page.get_by_label("What can cost money").set_checked(billable_only)
    november.wait_until_read("November 2026")
    days, peaks = count_days(database, condition), count_peaks(database, condition)
    assert len(days) > 5
    expected = [[*days.get(day, ["0", "0", "0", "0.0"]), peaks.get(day, "0")] for day in range(1, 31)]
    shown = november.rows("days")
    assert [row[1:] for row in shown] == expected
    assert (shown[0][0], shown[-1][0]) == ("Sun 1", "Mon 30")


@in_a_browser
def test_an_answer_that_breaks_off_is_told_and_its_numbers_are_not_shown(usage: Visit) -> None:
    usage.page.route(
        "**/call_range?*", lambda route: route.fulfill(body='{"destination_number":"1","billsec":1}\n{"dest')
    )
    usage.page.get_by_role("button", name="Previous month").click()
    expect(usage.page.get_by_role("alert").filter(has_text="The answer broke off")).to_be_visible()
    expect(usage.page.locator("#numbers")).to_be_hidden()
    assert usage.rows("days") == usage.rows("destinations") == []


@in_a_browser
def test_a_month_without_calls_says_so(usage: Visit) -> None:
    usage.choose_month("2020-02")
    expect(usage.page.get_by_role("status")).to_have_text(f"{ALPHA}, February 2020: no calls.")
    assert len(usage.rows("days")) == 29
    expect(usage.page.get_by_text("No outbound calls.")).to_be_visible()


# The session ------------------------------------------------------------------


@in_a_browser
def test_a_wrong_password_is_told(visit: Opener) -> None:
    opened = visit("/api/usage")
    opened.log_in(password="wrong")
    expect(opened.page.get_by_role("alert")).to_have_text("The e-mail address or the password is wrong.")
    assert not opened.page.get_by_label("Domain").is_visible()


@in_a_browser
def test_the_token_is_stored_nowhere_and_deleted_at_the_end(database: Database, usage: Visit) -> None:
    before = tokens(database)
    stored = "[localStorage.length, sessionStorage.length, document.cookie, location.search + location.hash]"
    assert usage.page.evaluate(stored) == [0, 0, "", ""]
    usage.page.get_by_role("button", name="Log out").click()
    expect(usage.page.get_by_label("Password")).to_have_value("")
    assert tokens(database) == before - 1
    assert usage.rows("days") == []


@in_a_browser
@pytest.mark.parametrize("path", PAGES)
def test_leaving_a_page_logs_out(database: Database, visit: Opener, path: str) -> None:
    before = tokens(database)
    opened = visit(path)
    opened.log_in()
    expect(opened.page.get_by_role("button", name="Log out")).to_be_visible()
    assert tokens(database) == before + 1
    opened.page.goto("about:blank")
    wait_for(lambda: tokens(database) == before)


@in_a_browser
def test_a_token_that_was_revoked_leads_back_to_the_form(database: Database, usage: Visit) -> None:
    accounts = "SELECT account_id FROM cdr_api.accounts WHERE email = %s"
    database.execute(f"DELETE FROM cdr_api.tokens WHERE account_id = ({accounts})", [EMAIL])
    usage.page.get_by_role("button", name="Previous month").click()
    expect(usage.page.get_by_role("alert").filter(has_text="Your session has ended")).to_be_visible()
    expect(usage.page.get_by_label("E-mail address")).to_be_focused()


# For everybody ----------------------------------------------------------------


@in_a_browser
def test_usage_keeps_the_rules_of_accessibility_on_a_desk_and_on_a_phone(visit: Opener) -> None:
    opened = visit("/api/usage")
    assert opened.violations() == []
    opened.log_in()
    opened.choose_month()
    assert opened.violations() == []
    opened.page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    assert opened.violations() == []
    assert not opened.is_too_wide()


@in_a_browser
def test_docs_keep_them_but_for_what_swagger_ui_does(visit: Opener) -> None:
    opened = visit("/api/docs", PHONE)
    expect(opened.page.locator("[id$=-call_range]")).to_be_visible()
    theirs = {"heading-order", "nested-interactive", "region"}
    assert [found for found in opened.violations() if found[0] not in theirs] == []
    try_call_range(opened.page)
    assert not opened.is_too_wide()


# What a screen reader calls the place that the keyboard is at.
FOCUSED = "(e => e.ariaLabel || e.labels?.[0]?.innerText || e.innerText)(document.activeElement)"


@in_a_browser
def test_usage_by_keyboard_alone(visit: Opener) -> None:
    opened = visit("/api/usage")
    keyboard = opened.page.keyboard

    def tab_to(name: str) -> None:
        for _ in range(12):
            keyboard.press("Tab")
            if opened.page.evaluate(FOCUSED).strip() == name:
                return
        pytest.fail(f"no way to {name}")

    tab_to("E-mail address")
    keyboard.type(EMAIL)
    tab_to("Password")
    keyboard.type(PASSWORD)
    keyboard.press("Enter")
    expect(opened.page.get_by_label("Domain")).to_be_focused()
    keyboard.type("beta")
    tab_to("Month")
    keyboard.type("112026")
    opened.wait_until_read("beta.example.com, November 2026")
    tab_to("Previous month")
    keyboard.press("Enter")
    opened.wait_until_read("beta.example.com, October 2026")


@in_a_browser
def test_usage_prints_on_one_sheet(usage: Visit) -> None:
    for paper in ("A4", "Letter"):
        pdf = usage.page.pdf(format=paper, prefer_css_page_size=True)
        assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == 1, paper
    usage.page.emulate_media(media="print")
    assert not usage.page.get_by_role("button", name="Log out").is_visible()
    assert not usage.page.get_by_label("Domain").is_visible()
    for name in ("calls", "minutes", "peak"):
        expect(usage.page.locator(f"#{name}-plot")).to_be_visible()


# nginx ------------------------------------------------------------------------


@in_a_browser
@pytest.mark.skipif(not NGINX, reason="nginx is not installed (apt install nginx-light)")
@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_behind_nginx_both_pages_work_below_its_path(database: Database, client: Client, visit: Opener) -> None:
    with tempfile.TemporaryDirectory(prefix="cdr-api-run-") as name:
        Path(name).chmod(0o755)
        socket = Path(name) / "socket"
        with serve(database.dsn, "--bind", f"unix:{socket}", CDR_API_PROXIES="1"), run_nginx(socket) as nginx:
            wait_for(socket.exists)
            url = nginx.url("https", "/cdr-api")
            docs = visit("/docs", url=url)
            docs.log_in()
            expect(docs.page.get_by_role("button", name="Log out")).to_be_visible()
            assert try_call_range(docs.page) == client.call_range("2026-11-17", "2026-11-17", fields=FIELDS)
            usage = visit("/usage", url=url)
            usage.log_in()
            usage.choose_month()
            assert usage.rows("days", "tFoot")[0][1] == str(
                len(client.call_range("2026-11-01", "2026-11-30", billable_only="true"))
            )
