"""The files of pages/, /api/docs in a real browser, and a visit to both pages; /api/usage: see test_usage.py."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from cdr_pages import ASSETS, DESCRIPTION, LIBRARIES
from tests.browsers import DESKTOP, PHONE, READER, Opener, Visit, in_a_browser, launch, opening
from tests.conftest import PASSWORD, ROOT, Client, Database, Gunicorn, problem, serve, wait_for
from tests.nginx import NGINX, run_nginx

pytestmark = pytest.mark.direct("is about browsers")

ALPHA = "alpha.example.com"

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


def test_every_script_is_served() -> None:
    assert {path.name for path in (ROOT / "pages").glob("*.js")} == {
        name for name in ASSETS if name.endswith(".js")
    } - {Path(name).name for name in LIBRARIES}


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


def test_the_page_is_told_the_name_of_the_services_zone(database: Database) -> None:
    page = database.client(app=database.app(CDR_API_TIMEZONE="Asia/Tokyo")).get("/api/usage").text
    assert '<html lang="en" data-zone="Asia/Tokyo">' in page


def test_switched_off_nothing_of_it_is_there(database: Database) -> None:
    client = database.client(app=database.app(CDR_API_PAGES="off"))
    for path in FILES:
        response = client.get(path)
        assert response.status_code == 404
        assert problem(response) == problem(client.get("/api/nothing"))


@pytest.mark.parametrize("path", ["/", "/api", "/api/", "/api/nothing"])
def test_where_there_is_no_route_the_answer_says_where_they_are(database: Database, path: str) -> None:
    def ask(**settings: str) -> str:
        response = database.client(app=database.app(**settings)).send(
            "GET", path, headers={"X-Forwarded-Prefix": "/cdr-api"}
        )
        assert response.status_code == 404
        message: str = problem(response)["message"]
        return message

    assert ask() == ("There is no such route: /api/docs shows those that there are, /api/openapi.json describes them.")
    assert ask(CDR_API_PAGES="off") == "There is no such route: /api/openapi.json describes them."
    assert "/cdr-api/docs shows" in ask(CDR_API_PROXIES="1")


# The browser ------------------------------------------------------------------


@pytest.fixture(scope="module")
def gunicorn(database: Database) -> Iterator[Gunicorn]:
    database.account(ALPHA, "beta.example.com", email=READER)
    with serve(database.dsn) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launch() as chromium:
        yield chromium


@pytest.fixture
def visit(browser: Browser, gunicorn: Gunicorn) -> Iterator[Opener]:
    with opening(browser, gunicorn.url) as opener:
        yield opener


def tokens(database: Database) -> int:
    query = "SELECT count(*) FROM cdr_api.tokens JOIN cdr_api.accounts USING (account_id) WHERE email = %s"
    count: int = database.execute(query, [READER])[0][0]
    return count


# docs -------------------------------------------------------------------------

FIELDS = "end_stamp,destination_number,billsec"
DAY = {"from": "2026-11-17", "to": "2026-11-17"}


def open_docs(opener: Opener) -> Visit:
    """The page, logged in, when it has found what to fill in."""
    docs: Visit = opener("/api/docs")
    docs.log_in()
    expect(docs.page.locator("#domain-names option")).not_to_have_count(0)
    expect(docs.page.locator("#loading progress")).to_be_hidden()
    return docs


def open_route(page: Page, name: str) -> Locator:
    route = page.locator(f"#route-{name}")
    route.locator("summary").first.click()
    return route


def send(route: Locator) -> str:
    """Sends what a route's form holds; gives the answer as it is shown."""
    route.get_by_role("button", name="Send").click()
    return route.locator(".answer .body").text_content() or ""


def try_call_range(page: Page) -> Any:
    """Fills in and sends call_range; gives what it answers."""
    route = open_route(page, "call_range")
    for name, value in {"domain_name": ALPHA, **DAY, "fields": FIELDS, "limit": ""}.items():
        route.get_by_label(name, exact=False).and_(route.locator(f"[name={name}]")).fill(value)
    return json.loads(send(route))


@in_a_browser
def test_docs_log_in_and_try_a_route(database: Database, client: Client, visit: Opener) -> None:
    docs = visit("/api/docs")
    docs.log_in()
    expect(docs.page.get_by_text(READER, exact=True)).to_be_visible()
    calls = client.call_range("2026-11-17", "2026-11-17", fields=FIELDS)
    assert try_call_range(docs.page) == calls != []
    expect(docs.page.locator("#route-call_range .answer")).to_contain_text("200 OK after")
    docs.page.get_by_role("button", name="Log out").click()
    expect(docs.page.get_by_label("E-mail address").first).to_be_focused()
    assert "A valid bearer token is needed" in send(docs.page.locator("#route-call_range"))


@in_a_browser
def test_docs_take_a_pasted_token(database: Database, client: Client, visit: Opener) -> None:
    page = visit("/api/docs").page
    page.get_by_text("I have a token").click()
    page.get_by_label("Token").fill(client.token or "")
    page.get_by_role("button", name="Use it").click()
    expect(page.get_by_label("Token")).not_to_be_visible()
    calls = client.call_range("2026-11-17", "2026-11-17", fields=FIELDS)
    assert try_call_range(page) == calls
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_text("I have a token")).to_be_visible()
    page.goto("about:blank")
    assert client.call_range("2026-11-17", "2026-11-17", fields=FIELDS) == calls  # it is as good as before


@in_a_browser
def test_a_trial_finds_calls_and_stays_small(database: Database, client: Client, visit: Opener) -> None:
    """The fields are filled in with a domain and a day that have calls (this month has none), and with a limit."""
    docs = open_docs(visit)
    route = open_route(docs.page, "call_range")
    expect(route.locator("[name=from]")).to_have_value("2026-11-18")
    calls = json.loads(send(route))
    assert calls == client.call_range("2026-11-18", "2026-11-18", limit=20) != []
    expect(route).to_contain_text("limit is set to 20 here")
    found = json.loads(send(open_route(docs.page, "call_lookup")))
    assert [call["xml_cdr_uuid"] for call in found["calls"]] == [call["xml_cdr_uuid"] for call in calls[:2]]
    assert len(json.loads(send(open_route(docs.page, "calls")))) == 20


@in_a_browser
def test_a_month_takes_the_place_of_a_range(database: Database, visit: Opener) -> None:
    docs = open_docs(visit)
    route = open_route(docs.page, "call_totals")
    expect(route.locator("[name=from]")).to_have_value("2026-11-18")
    expect(route.locator("[name=month]")).to_be_visible()
    route.locator("[name=month]").fill("2026-11")
    for name in ("from", "to"):
        expect(route.locator(f"[name={name}]")).to_have_value("")
    assert json.loads(send(route))[0]["calls"] > 0


@in_a_browser
def test_an_answer_is_shown_with_a_line_for_each_member(visit: Opener) -> None:
    """Whatever is in its texts: they, and the numbers, are those of the answer."""
    docs = open_docs(visit)
    route = open_route(docs.page, "call_totals")
    answer = r'[{"a":"x: [1, {\"2\"}]\\","b":12345678901234567890.10,"c":[],"d":{}},' + "\n" + r'{"a":null}]' + "\n"
    docs.page.route("**/call_totals?*", lambda way: way.fulfill(body=answer, content_type="application/json"))
    assert send(route).splitlines() == [
        "[",
        "  {",
        r'    "a": "x: [1, {\"2\"}]\\",',
        '    "b": 12345678901234567890.10,',
        '    "c": [],',
        '    "d": {}',
        "  },",
        "  {",
        '    "a": null',
        "  }",
        "]",
    ]


@in_a_browser
def test_every_route_answers_to_what_is_filled_in(database: Database, visit: Opener) -> None:
    extension = "SELECT gen_random_uuid(), domain_uuid, '101' FROM v_domains"
    database.execute(f"INSERT INTO v_extensions (extension_uuid, domain_uuid, extension) {extension}")
    docs = open_docs(visit)
    names = [operation["operationId"] for path in DESCRIPTION["paths"].values() for operation in path.values()]
    assert docs.page.locator(".route").count() == len(names)
    for name in names:
        if name not in ("register", "login", "logout"):
            route = open_route(docs.page, name)
            assert send(route) != "[]" or name == "extensions", name  # of which there are none
            expect(route.locator(".answer")).to_contain_text("200 OK after")


@in_a_browser
def test_a_large_answer_is_not_drawn_as_a_whole(database: Database, visit: Opener) -> None:
    docs = open_docs(visit)
    route = open_route(docs.page, "calls")
    expect(route.locator("[name=domain_name]")).to_have_value(ALPHA)
    route.locator("[name=limit]").fill("")
    read = re.sub(r"\n *|(?<=\":) ", "", send(route))  # without what the page indents it by
    assert 65_000 < len(read) <= 65_536  # of UTF-16
    expect(route.locator(".answer")).to_contain_text("The first 65,536 characters are shown, and the rest was not read")


@in_a_browser
def test_a_line_of_curl_that_is_copied_works_when_it_is_pasted(database: Database, visit: Opener) -> None:
    docs = open_docs(visit)
    docs.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    lines = []
    for name in ("login", "calls", "call_range", "call_totals", "call_lookup", "call_feed", "domains", "health"):
        route = open_route(docs.page, name)
        if name == "login":
            route.locator("[name=email]").fill(READER)
            route.locator("[name=password]").fill(PASSWORD)
        else:
            send(route)
        if name == "calls":
            route.locator("summary", has_text="more parameters").click()
            route.locator("[name=caller_id_name]").fill("""O'Brien, "Bob" & Sons""")
            assert json.loads(send(route)) != []
        route.get_by_role("button", name="Copy curl").click()
        expect(route.get_by_role("button", name="Copied")).to_be_visible()
        lines.append(docs.page.evaluate("navigator.clipboard.readText()"))
    assert not any(re.search(r"\bcdr_[\w-]{43}", line) for line in lines)
    done = subprocess.run(["bash", "-eu"], input="\necho\n".join(lines), capture_output=True, text=True, check=True)
    shown = docs.page.locator(".answer .body").all_text_contents()
    printed = re.sub(r"\s", "", done.stdout)
    for answer in shown:
        assert re.sub(r"\s", "", answer) in printed
    assert len(shown) == 7


@in_a_browser
@pytest.mark.parametrize(("viewport", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desk", "phone"])
def test_docs_keep_the_rules_of_accessibility(visit: Opener, viewport: dict[str, int], scheme: str) -> None:
    docs = visit("/api/docs#call_feed", viewport, color_scheme=scheme)
    expect(docs.page.locator("#route-call_feed")).to_have_attribute("open", "")
    docs.log_in()
    try_call_range(docs.page)
    for name in ("register", "call_lookup"):
        open_route(docs.page, name)
    for fold in docs.page.locator("#route-call_range details > summary").all():
        fold.click()
    assert docs.violations() == []
    assert not docs.is_too_wide()
    height = docs.page.locator("#route-call_feed").bounding_box()
    assert height
    assert height["height"] < 2_000


# A visit ----------------------------------------------------------------------


@in_a_browser
@pytest.mark.parametrize("path", PAGES)
def test_a_wrong_password_is_told(visit: Opener, path: str) -> None:
    opened = visit(path)
    opened.log_in(password="wrong")
    expect(opened.page.locator("#login-error")).to_have_text("The e-mail address or the password is wrong.")
    expect(opened.page.locator("#login").get_by_label("Password")).to_be_focused()
    assert not opened.page.get_by_role("button", name="Log out").is_visible()


@in_a_browser
def test_without_a_connection_logging_in_and_out_says_so(database: Database, visit: Opener) -> None:
    opened = visit("/api/usage")
    opened.page.context.set_offline(True)
    opened.log_in()
    expect(opened.page.locator("#login-error")).to_have_text(
        "The service cannot be reached. Look at your connection, then try again."
    )
    opened.page.context.set_offline(False)
    opened.log_in()
    opened.wait_until_read()
    opened.page.context.set_offline(True)
    opened.page.get_by_role("button", name="Log out").click()
    expect(opened.page.locator("#login-error")).to_contain_text(
        "so the token stays valid: The service cannot be reached."
    )


STORED = "[localStorage.length, sessionStorage.length, document.cookie, location.href.includes('cdr_')]"


@in_a_browser
def test_the_token_is_stored_nowhere_and_deleted_at_the_end(database: Database, visit: Opener) -> None:
    before = tokens(database)
    usage = visit("/api/usage")
    usage.log_in()
    usage.wait_until_read()
    assert tokens(database) == before + 1
    assert usage.page.evaluate(STORED) == [0, 0, "", False]
    usage.page.get_by_role("button", name="Log out").click()
    wait_for(lambda: tokens(database) == before)
    expect(usage.page.locator("#login").get_by_label("Password")).to_have_value("")
    assert usage.rows("domain-rows") == []


@in_a_browser
def test_one_login_is_enough_for_both_pages(database: Database, visit: Opener) -> None:
    before = tokens(database)
    opened = visit("/api/usage")
    opened.log_in()
    opened.wait_until_read()
    for name in ("Try it", "Usage"):
        opened.page.get_by_role("link", name=name, exact=True).click()
        expect(opened.page.get_by_text(READER, exact=True)).to_be_visible()
        assert opened.page.evaluate(STORED) == [0, 0, "", False]
    opened.wait_until_read()
    opened.page.go_back()
    expect(opened.page.get_by_text(READER, exact=True)).to_be_visible()
    assert len(try_call_range(opened.page)) > 0
    assert tokens(database) == before + 1
    opened.page.get_by_role("button", name="Log out").click()
    wait_for(lambda: tokens(database) == before)


@in_a_browser
def test_a_token_that_was_left_lying_is_not_taken_up(database: Database, visit: Opener) -> None:
    """It was handed over to a page that did not come for a long time."""
    left = json.dumps({"token": database.account(ALPHA, email="left@example.com"), "email": READER, "at": 0})
    opened = visit("/api/usage")
    opened.page.evaluate("left => sessionStorage.setItem('cdr-api-handed-over', left)", left)
    opened.page.reload()
    expect(opened.page.locator("#login")).to_be_visible()
    assert opened.page.evaluate(STORED) == [0, 0, "", False]
    of_left = "SELECT count(*) FROM cdr_api.tokens JOIN cdr_api.accounts USING (account_id) WHERE email = %s"
    wait_for(lambda: database.execute(of_left, ["left@example.com"]) == [(0,)])


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
            opened: Visit = visit("/docs", url=nginx.url("https", "/cdr-api"))
            opened.log_in()
            expect(opened.page.get_by_role("button", name="Log out")).to_be_visible()
            assert try_call_range(opened.page) == client.call_range("2026-11-17", "2026-11-17", fields=FIELDS)
            opened.page.get_by_role("link", name="Usage", exact=True).click()
            expect(opened.page.get_by_text(READER, exact=True)).to_be_visible()
            opened.show(month="2026-11", domain=ALPHA)
            calls = client.call_range("2026-11-01", "2026-11-30", billable_only="true")
            assert opened.text("calls") == str(len(calls))
