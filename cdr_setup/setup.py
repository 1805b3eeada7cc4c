"""cdr-api setup: everything between the program's installation and the first call, and back again.

It looks first, and changes nothing until it has said what it is going to do. Each step
finds out whether it has been done: after any interruption the next run goes on.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import psycopg

from cdr import accounts
from cdr.check import run_checks
from cdr.database import run
from cdr.passwords import hash_password
from cdr.settings import ENVIRONMENT_FILE, SettingError, read_environment
from cdr_admin import change_grants, print_findings, transaction
from cdr_api import create_app
from cdr_setup import nginx
from cdr_setup.database import (
    ROOT_UID,
    SERVICE_USER,
    TEMPLATE,
    Site,
    build_index,
    change_password,
    drop_everything,
    find_site,
    run_schema,
    write_settings,
)
from cdr_setup.fusionpbx import Failure, acting_as

SERVICE_SOCKET = "/run/cdr-api/socket"
JOURNAL = "journalctl -u cdr-api -n 20 --no-pager"
WAIT_SECONDS = 30
WAYS = ("path", "port", "none")  # through nginx


@dataclass(frozen=True)
class Answers:
    """What the operator chose, by options or when asked."""

    way: str | None = None
    email: str | None = None
    domains: Sequence[str] = ()  # "*": all
    host: str | None = None
    assume_yes: bool = False


@dataclass(frozen=True)
class Step:
    text: str
    do: Callable[[Site], object]
    done: bool = False


# The service ------------------------------------------------------------------


def systemctl(*words: str) -> None:
    try:
        subprocess.run(["systemctl", *words], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise Failure("this machine has no systemctl", "apt install systemd") from None
    except subprocess.CalledProcessError as error:
        remedy = JOURNAL if "cdr-api" in words else f"systemctl status {words[-1]}"
        raise Failure(f"systemctl {' '.join(words)}: {error.stderr.strip()}", remedy) from None


class SocketConnection(http.client.HTTPConnection):
    """To the service, without nginx."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(SERVICE_SOCKET)


def is_healthy() -> bool:
    connection = SocketConnection("localhost", timeout=10)
    with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
        connection.request("GET", "/api/health")
        return connection.getresponse().status == 200
    return False


def start_service(_site: Site) -> None:
    if path := find_unreadable(Path(__file__).parent.parent):
        raise Failure(f"the service may not read {path}", f"chmod -R a+rX {Path(__file__).parent.parent}")
    systemctl("daemon-reload")
    systemctl("enable", "cdr-api")
    systemctl("restart", "cdr-api")
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_healthy():
        if time.monotonic() > deadline:
            raise Failure(f"the service does not answer on {SERVICE_SOCKET}", JOURNAL)
        time.sleep(0.2)


def find_unreadable(folder: Path) -> Path | None:
    """The first of the program's files and folders that others than root may not read, as a umask of 077 makes them."""
    for path in (folder, *folder.rglob("*")):
        needed = 0o005 if path.is_dir() else 0o004
        if not {".git", "__pycache__"} & set(path.parts) and path.exists() and path.stat().st_mode & needed != needed:
            return path
    return None


def is_enabled() -> bool:
    done = subprocess.run(["systemctl", "is-enabled", "cdr-api"], check=False, capture_output=True)
    return done.returncode == 0 or is_healthy()


def install_front(way: str) -> None:
    if not shutil.which("nginx"):
        raise Failure("nginx is not installed", "apt install nginx  # or: cdr-api setup --nginx none")
    site = nginx.FUSIONPBX_SITE
    if way == "path" and not (site.is_file() and nginx.add_include(site.read_text("utf-8"))):
        raise Failure(f"{site} has no server that listens with ssl", "cdr-api setup --nginx port")
    with explain_nginx():
        nginx.install(way)


@contextlib.contextmanager
def explain_nginx() -> Iterator[None]:
    try:
        yield
    except nginx.NginxError as error:
        raise Failure(f"nginx refuses its files, and goes on with those it had:\n{error}", "nginx -t") from None
    except subprocess.CalledProcessError as error:
        raise Failure(f"nginx cannot be reloaded: {error.stderr.strip()}", "systemctl status nginx") from None


# The first account ------------------------------------------------------------


def make_account(site: Site, answers: Answers) -> None:
    """With a password that nobody knows (cdr-api user password sets one), and a token."""
    email = answers.email or ""
    with create_app(read_environment(ENVIRONMENT_FILE)).app_context(), transaction() as connection:
        found = run(connection, "find_account", email_key=accounts.email_key(email))
        if found:
            account = found[0]
        else:
            password, name = hash_password(secrets.token_urlsafe(32)), email.partition("@")[0]
            account = accounts.add_account(connection, name, email, password, all_domains=False) or {}
        change_grants(connection, account, answers.domains, grant=True)
        site.token = accounts.new_token(connection, account["account_id"], site.settings().token_days) or ""
    if not site.token:
        raise Failure(f"{email} is disabled", shlex.join(["cdr-api", "user", "enable", email]))


def print_first_call(site: Site, answers: Answers) -> None:
    """What a shell on this machine needs for yesterday's calls."""
    port = nginx.find_port()
    host = answers.host or nginx.find_host(port)
    if not nginx.wait_for_health(host, port):
        raise Failure(f"nginx does not lead to the service on port {port}", f"tail /var/log/nginx/error.log; {JOURNAL}")
    options = nginx.curl_options(host, port)
    if "--insecure" in options:
        click.echo("! nginx's certificate is not one that clients believe: get one before tokens cross the internet.")
    click.echo("\nYesterday's calls, as the billing system asks for them; the token is shown only this once:\n")
    click.echo(f"TOKEN={site.token or '$(cdr-api token create EMAIL)'}")
    domain = next((name for name in (*answers.domains, *site.domains()) if name != "*"), "")
    yesterday = "$(date -d yesterday +%F)"
    query = f"domain_name={quote(domain)}&from={yesterday}&to={yesterday}"
    url = f"https://{host}{'' if port == 443 else f':{port}'}/cdr-api/call_range?{query}"
    click.echo(f'{shlex.join(["curl", "-sS", *options])} -H "Authorization: Bearer $TOKEN" "{url}"')


# Undo -------------------------------------------------------------------------


def remove_front(_site: Site) -> None:
    with explain_nginx():
        nginx.remove()


def stop_service(_site: Site) -> None:
    systemctl("disable", "--now", "cdr-api")


def reset_settings(_site: Site) -> None:
    """As the package installed them; without the package the file goes."""
    if nginx.PACKAGE.exists():
        write_settings(TEMPLATE.read_text("utf-8"))
    else:
        ENVIRONMENT_FILE.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what else lies in it is not ours
            ENVIRONMENT_FILE.parent.rmdir()


def is_reset() -> bool:
    if not ENVIRONMENT_FILE.exists():
        return True
    return nginx.PACKAGE.exists() and ENVIRONMENT_FILE.read_text("utf-8") == TEMPLATE.read_text("utf-8")


# The command ------------------------------------------------------------------


def ask(site: Site, answers: Answers) -> Answers:
    """What options left open: the way through nginx, and the first account if there is none yet."""
    way = answers.way or nginx.find_way()
    if not way:
        click.echo("Through nginx: path (FusionPBX's own server, port 443), port (one of its own, 8443), or none.")
        way = click.prompt("Which way", type=click.Choice(WAYS), default="path")
    if site.has_accounts() and not answers.email:
        return replace(answers, way=way)
    email = answers.email or click.prompt("E-mail address of the first account, for the billing system")
    domains = list(answers.domains)
    if not domains:
        click.echo(f"FusionPBX's domains: {', '.join(site.domains()) or 'none yet'}")
        domains = click.prompt("Which ones may it read (with blanks between them; * for all)").split()
    return replace(answers, way=way, email=email, domains=domains)


def plan_setup(site: Site, answers: Answers) -> list[Step]:
    """What there is to do, in an order in which nothing runs before what it needs."""
    mb, reason, apart = site.examine()["mb"], site.why_no_login(), site.find_apart()
    made = f"role cdr_api, {'database ' + apart if apart else 'schema cdr_api'}"
    way = answers.way or "path"
    include = f"add one line to {nginx.FUSIONPBX_SITE}, {nginx.INCLUDE}"
    front = include if way == "path" else f"let nginx serve on port {nginx.OWN_PORT}"
    who = f"{answers.email or 'the billing system'}, which reads {', '.join(answers.domains) or 'the domains you name'}"
    steps = [
        Step(f"run schema.sql: {made}, the right to read v_xml_cdr and v_domains", run_schema),
        Step(f"give the role a password, and write it into {ENVIRONMENT_FILE}", change_password, done=not reason),
        Step(
            f"build the index cdr_api_calls on v_xml_cdr ({mb} MB or so); new calls do not wait for it",
            build_index,
            done=site.missing_index() is None,
        ),
        Step("start the service, now and with the machine", start_service, done=not reason and is_healthy()),
    ]
    if way != "none":
        install = Step(f"{front}, and reload it", lambda _site: install_front(way), done=nginx.find_way() == way)
        steps.append(install)
    done = site.has_accounts() and not answers.email
    steps.append(Step(f"make an account for {who}, and a token", lambda site: make_account(site, answers), done=done))
    return steps


def plan_undo(site: Site) -> list[Step]:
    found = site.examine()
    nothing = found["may_log_in"] is None and not found["has_schema"] and not found["has_index"]
    front = nginx.find_way() is None and (nginx.PACKAGE.exists() or not nginx.has_files())
    return [
        Step("take our files and our line out of nginx's, and reload it", remove_front, done=front),
        Step("stop the service for good", stop_service, done=not is_enabled()),
        Step(
            "drop the index cdr_api_calls, the schema cdr_api WITH ALL ACCOUNTS AND TOKENS, and the role cdr_api",
            drop_everything,
            done=nothing,
        ),
        Step(f"put {ENVIRONMENT_FILE} back as it was installed", reset_settings, done=is_reset()),
    ]


def carry_out(site: Site, steps: Sequence[Step], *, dry_run: bool, assume_yes: bool) -> bool:
    """Says what is to be done, and does it; whether it did."""
    for number, step in enumerate(steps, 1):
        click.echo(f"  {number}. {step.text}{' (done already)' if step.done else ''}")
    if dry_run:
        click.echo("Nothing was changed.")
        return False
    if not assume_yes and not all(step.done for step in steps):
        click.confirm("Go on?", abort=True)
    for number, step in enumerate(steps, 1):
        if not step.done:
            click.echo(f"{number} of {len(steps)} …")
            try:
                step.do(site)
            except (psycopg.Error, OSError, SettingError) as error:
                raise Failure(f"step {number}, {step.text}: {' '.join(str(error).split())}") from None
    return True


@click.command("setup")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option("--undo", is_flag=True, help="Take everything back that setup has done.")
@click.option("--schema", "only_schema", is_flag=True, help="Only run schema.sql, as after an upgrade.")
@click.option("--yes", "assume_yes", is_flag=True, help="Go on without asking.")
@click.option("--nginx", "way", type=click.Choice(WAYS), help="FusionPBX's server, a port of its own (8443), or none.")
@click.option("--email", help="Of the first account.")
@click.option("--domain", "domains", multiple=True, help="One that it may read ('*': all); may be given again.")
@click.option("--host", help="The name in the address of the first call.")
@click.option("--config", type=click.Path(exists=True, path_type=Path), help="FusionPBX's config.conf or config.php.")
@click.option("--superuser", help="libpq connection string of PostgreSQL's superuser, without its password.")
def setup(
    *, dry_run: bool, undo: bool, only_schema: bool, config: Path | None, superuser: str | None, **given: Any
) -> None:
    """Do everything between the installation and the first call, or take it back."""
    if os.geteuid() != ROOT_UID:
        raise Failure("setup must be run by root", "sudo cdr-api setup")
    answers = Answers(**given)
    site = find_site(config, superuser)
    if not (dry_run or undo or only_schema):
        answers = ask(site, answers)
    steps = plan_undo(site) if undo else plan_setup(site, answers)
    if only_schema:
        steps, answers = steps[:1], replace(answers, assume_yes=True)
    if carry_out(site, steps, dry_run=dry_run, assume_yes=answers.assume_yes) and not (undo or only_schema):
        finish(site, answers)


def finish(site: Site, answers: Answers) -> None:
    """All that flask check looks at, and the first call."""
    with acting_as(SERVICE_USER):
        good = print_findings(run_checks(site.settings()))
    if answers.way != "none":
        print_first_call(site, answers)
    if not good:
        raise Failure("a line above says ✗, and what mends it")
