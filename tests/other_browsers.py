"""The two pages in Firefox, and in WebKit, the engine of Safari: the way through them from the login to a file.

make test-browsers runs it (Debian: firefox-esr, webkit2gtk-driver and xvfb); test_usage.py and test_pages.py do the
same and much more in Chromium.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.browsers import READER, download_of
from tests.conftest import PASSWORD, Client, Database, DatabaseMaker, Gunicorn, need, serve, wait_for
from tests.relay import relaying
from tests.webdriver import FIREFOX, MINI_BROWSER, Driven, run_firefox, run_webkit

ALPHA = "alpha.example.com"
NOVEMBER = "month=2026-11"
CONTROL_V, TAB = "\ue009v\ue000", "\ue004"  # by WebDriver's names of keys
LOADED = "document.querySelector('#report').getAttribute('aria-busy') === 'false'"


@pytest.fixture(scope="module")
def database(make_database: DatabaseMaker) -> Database:
    return make_database(calls=3000, index=True)


@pytest.fixture(scope="module")
def gunicorn(database: Database) -> Iterator[Gunicorn]:
    database.account(ALPHA, "beta.example.com", email=READER)
    with serve(database.dsn, CDR_API_TIMEZONE="UTC") as running:
        yield running


@pytest.fixture(scope="module")
def client(database: Database, gunicorn: Gunicorn) -> Client:
    return database.client(database.account(ALPHA))


@pytest.fixture(scope="module", params=["firefox", "webkit"])
def browser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driven]:
    """WebKit on a system without a language; Firefox in German, and dark."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "webkit":
        need("WebKitWebDriver")
        need("Xvfb")
        assert MINI_BROWSER, "WebKitWebDriver came without MiniBrowser"
        with run_webkit(folder) as webkit:
            yield webkit
    elif not FIREFOX:
        pytest.skip("needs firefox-esr")
    else:
        german = {"intl.accept_languages": "de", "ui.systemUsesDarkTheme": 1}
        with run_firefox(folder, german) as firefox:
            yield firefox


def log_in(browser: Driven) -> None:
    browser.type("//form[@id='login']//input[@name='email']", READER)
    browser.type("//form[@id='login']//input[@name='password']", PASSWORD)
    browser.press("Log in", "login")
    browser.wait("!document.querySelector('#session').hidden")


def open_usage(browser: Driven, url: str, fragment: str) -> None:
    browser.go("about:blank")  # for a fragment alone loads no page
    browser.go(f"{url}/api/usage#{fragment}")
    browser.wait("document.querySelector('[name=zone]').options.length")
    log_in(browser)
    wait_until_read(browser, "destinations" if "domain=" in fragment else "domain-rows")


def wait_until_read(browser: Driven, table: str) -> None:
    browser.wait(f"{LOADED} && document.querySelector('#{table} tbody').rows.length")


def take_file(browser: Driven, expected: bytes) -> None:
    """Waits until there is one file, of these bytes, and takes it away."""
    wait_for(lambda: browser.files() == [expected])
    browser.remove_files()


def read_rows(browser: Driven, table: str) -> list[list[str]]:
    script = (
        f"return [...document.querySelector('#{table} tbody').rows].map(row => [...row.cells].map(c => c.innerText))"
    )
    rows: list[list[str]] = browser.run(script)
    return rows


def test_from_the_login_to_a_file(browser: Driven, gunicorn: Gunicorn, client: Client) -> None:
    open_usage(browser, gunicorn.url, NOVEMBER)
    assert {row[0] for row in read_rows(browser, "domain-rows")} == {ALPHA, "beta.example.com"}
    browser.press("Domain", "domain-rows")
    browser.type("//input[@id='find']", "ALPHA")
    browser.click(f"//table[@id='domain-rows']//a[.='{ALPHA}']")
    wait_until_read(browser, "destinations")
    (totals,) = client.calls("/api/call_totals", month="2026-11", billable_only="true", domain_name=ALPHA)
    assert browser.run("return document.querySelector('#calls').textContent.replace(/\\D/g, '')") == str(
        totals["calls"]
    )
    browser.press("Download calls", "actions")
    browser.wait("document.querySelector('#saving').textContent.includes('complete.')")
    take_file(browser, download_of(client, ALPHA))
    browser.click("//button[@id='save-days']")
    wait_for(lambda: [file.count(b"\n") for file in browser.files()] == [1 + len(read_rows(browser, "days"))])
    browser.remove_files()


def test_another_month_zone_and_rounding(browser: Driven, gunicorn: Gunicorn) -> None:
    open_usage(browser, gunicorn.url, f"{NOVEMBER}&domain={ALPHA}")
    browser.click("//button[@id='previous']")
    browser.wait("document.querySelector('#days tbody').rows.length === 31")
    wait_until_read(browser, "destinations")
    for name, value in (("zone", "Asia/Tokyo"), ("rounding", "60/60")):
        browser.choose(name, value)
        wait_until_read(browser, "destinations")
    assert browser.run("return location.hash").endswith(
        "month=2026-10&domain=alpha.example.com&tz=Asia%2FTokyo&round=60%2F60"
    )
    assert "rounded up 60/60" in browser.run("return document.querySelector('#outbound-note').textContent")
    browser.run("history.back()")
    browser.wait("document.querySelector('[name=rounding]').value === ''")


def test_a_download_that_breaks_off_leaves_no_file(browser: Driven, gunicorn: Gunicorn, client: Client) -> None:
    with relaying(gunicorn.url) as relay:
        open_usage(browser, relay.url, f"{NOVEMBER}&domain={ALPHA}")
        relay.cut("/api/call_range", 20_000)
        browser.press("Download calls", "actions")
        browser.wait("document.querySelector('#saving [role=alert]').textContent.includes('No file was saved.')")
        relay.release()
        browser.press("Try again", "saving")
        browser.wait("document.querySelector('#saving').textContent.includes('complete.')")
        take_file(browser, download_of(client, ALPHA))


def test_a_token_that_is_no_longer_good_is_asked_for_in_place(
    browser: Driven, gunicorn: Gunicorn, database: Database
) -> None:
    open_usage(browser, gunicorn.url, f"{NOVEMBER}&domain={ALPHA}")
    accounts = "SELECT account_id FROM cdr_api.accounts WHERE email = %s"
    database.execute(f"DELETE FROM cdr_api.tokens WHERE account_id = ({accounts})", [READER])
    browser.click("//button[@id='previous']")
    browser.type("//dialog//input[@name='password']", PASSWORD)
    browser.press("Go on", "again")
    browser.wait("document.querySelector('#days tbody').rows.length === 31")
    assert not browser.run("return document.querySelector('#again').open")


@pytest.mark.parametrize("browser", ["firefox"], indirect=True)  # which has no field for months
def test_a_month_is_typed_as_text(browser: Driven, gunicorn: Gunicorn) -> None:
    open_usage(browser, gunicorn.url, NOVEMBER)
    month = "document.querySelector('[name=month]')"
    browser.run(f"{month}.addEventListener('invalid', () => document.body.append('told'))")
    for text in ("October", "2026-10"):
        browser.run(f"{month}.select()")
        browser.type("//input[@name='month']", text + TAB)
        if text == "October":
            browser.wait("document.body.lastChild.data === 'told'")
            assert browser.run("return location.hash") == f"#{NOVEMBER}"
    browser.wait("document.querySelector('h1').textContent === 'All domains, Oktober 2026'")


def unpack(pdf: bytes) -> bytes:
    """What is compressed in a PDF; its pages are described there."""
    found = b""
    for part in re.findall(rb"stream\n(.*?)\nendstream", pdf, re.DOTALL):
        with suppress(zlib.error):
            found += zlib.decompressobj().decompress(part)
    return found


@pytest.mark.parametrize("browser", ["firefox"], indirect=True)  # the other prints by a window only
def test_it_prints_on_one_sheet(browser: Driven, gunicorn: Gunicorn) -> None:
    open_usage(browser, gunicorn.url, f"month=2026-10&domain={ALPHA}&round=60%2F60")
    for width, height in ((21, 29.7), (21.59, 27.94)):
        assert len(re.findall(rb"/Type\s*/Page\b", unpack(browser.print(width, height)))) == 1


def test_the_docs_page_tries_a_route_with_the_login_of_the_other(
    browser: Driven, gunicorn: Gunicorn, client: Client
) -> None:
    open_usage(browser, gunicorn.url, NOVEMBER)
    browser.click("//nav/a[@href='docs']")
    browser.wait("document.title.startsWith('Try it') && document.querySelector('#who').textContent")
    browser.wait("document.querySelector('.route') && document.querySelector('#loading').innerText === ''")
    browser.click("//details[@id='route-domains']/summary")
    browser.press("Send", "route-domains")
    shown = browser.wait("document.querySelector('#route-domains .body')?.textContent")
    assert {domain["domain_name"] for domain in json.loads(shown)} == {ALPHA, "beta.example.com"}
    browser.press("Copy curl", "route-domains")
    browser.wait("document.querySelector('#route-domains').textContent.includes('Copied')")
    browser.click("//details[@id='route-calls']/summary")
    browser.type("//details[@id='route-calls']//input[@name='fields']", CONTROL_V)
    line = browser.run("return document.querySelector('#route-domains .curl').textContent")
    assert line.startswith("curl -s ")
    browser.wait(f"document.querySelector('#route-calls [name=fields]').value === {json.dumps(line)}")
    browser.press("Log out")
    browser.click("//form[@id='login']//summary")
    browser.type("//input[@id='pasted']", client.token or "")
    browser.press("Use it", "login")
    browser.press("Send", "route-domains")
    shown = browser.wait("document.querySelector('#route-domains .body')?.textContent")
    assert [domain["domain_name"] for domain in json.loads(shown)] == [ALPHA]
