"""The environment: what is right, what stops the start, and with which line."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cdr.settings import SettingError, Settings
from cdr.statements import STATEMENTS
from tests.conftest import ROOT, SOURCES, free_port, serve, wait_for

DSN = {"CDR_API_DSN": "dbname=fusionpbx"}


def test_defaults() -> None:
    settings = Settings.from_environ(DSN | {"CDR_API_TIMEZONE": " "})
    assert (settings.dsn, settings.calls_dsn, settings.registration, settings.register_domains) == (
        "dbname=fusionpbx",
        "",
        "open",
        (),
    )
    assert (settings.token_days, settings.timezone, settings.proxies) == (365, "", 0)
    assert settings.statement_timeout == 3_600_000


def test_values_are_read_as_strings() -> None:
    settings = Settings.from_environ(
        {
            "CDR_API_DSN": "postgresql://u:123@h/d",
            "CDR_API_REGISTER_DOMAINS": " a.example , b.example,",
            "CDR_API_STATEMENT_TIMEOUT": "5min",
        }
    )
    assert settings.dsn == "postgresql://u:123@h/d"
    assert settings.register_domains == ("a.example", "b.example")
    assert settings.statement_timeout == 300_000


WRONG = [
    ({}, "CDR_API_DSN"),
    ({"CDR_API_DSN": "not a dsn"}, "CDR_API_DSN"),
    ({"CDR_API_DSN": "postgresql://h/d?nonsense=1"}, "CDR_API_DSN"),
    (DSN | {"CDR_API_CALLS_DSN": "nonsense=1"}, "CDR_API_CALLS_DSN"),
    (DSN | {"CDR_API_ACCOUNTS_DSN": "dbname"}, "CDR_API_ACCOUNTS_DSN"),
    (DSN | {"CDR_API_REGISTRATION": "yes"}, "CDR_API_REGISTRATION"),
    (DSN | {"CDR_API_TOKEN_DAYS": "1.5"}, "CDR_API_TOKEN_DAYS"),
    (DSN | {"CDR_API_TOKEN_DAYS": "-1"}, "CDR_API_TOKEN_DAYS"),
    (DSN | {"CDR_API_TIMEZONE": "Mars/Olympus"}, "CDR_API_TIMEZONE"),
    (DSN | {"CDR_API_TIMEZONE": "../etc/passwd"}, "CDR_API_TIMEZONE"),
    (DSN | {"CDR_API_PROXIES": "one"}, "CDR_API_PROXIES"),
    (DSN | {"CDR_API_STATEMENT_TIMEOUT": "0"}, "CDR_API_STATEMENT_TIMEOUT"),
    (DSN | {"CDR_API_STATEMENT_TIMEOUT": "soon"}, "CDR_API_STATEMENT_TIMEOUT"),
    (DSN | {"CDR_API_POOL_TIMEOUT": "-5s"}, "CDR_API_POOL_TIMEOUT"),
    (DSN | {"CDR_API_LOOKBACK_DAYS": "0"}, "CDR_API_LOOKBACK_DAYS"),
    (DSN | {"CDR_API_SWEEP_SECONDS": "often"}, "CDR_API_SWEEP_SECONDS"),
    (DSN | {"CDR_API_ACCOUNT_STREAMS": "0"}, "CDR_API_ACCOUNT_STREAMS"),
    (DSN | {"CDR_API_RATE": "10/s"}, "CDR_API_RATE"),
    (DSN | {"CDR_API_CLIENT_TIMEOUT": "0s"}, "CDR_API_CLIENT_TIMEOUT"),
    (DSN | {"CDR_API_MIN_RATE": "16 KB"}, "CDR_API_MIN_RATE"),
    (DSN | {"CDR_API_SYSLOG": "no"}, "CDR_API_SYSLOG"),
    (DSN | {"CDR_API_CORS_ORIGINS": "*"}, "CDR_API_CORS_ORIGINS"),
    (DSN | {"CDR_API_LOG": "yes"}, "CDR_API_LOG"),
    (DSN | {"CDR_API_METRICS": "1"}, "CDR_API_METRICS"),
    (DSN | {"CDR_API_PAGES": "no"}, "CDR_API_PAGES"),
    (DSN | {"CDR_API_WORKERS": "0"}, "CDR_API_WORKERS"),
    (DSN | {"CDR_API_THREADS": "many"}, "CDR_API_THREADS"),
]


@pytest.mark.parametrize(("environ", "name"), WRONG, ids=[str(list(w[0].items())[-1:]) for w in WRONG])
def test_a_wrong_value_is_named_with_what_is_allowed(environ: dict[str, str], name: str) -> None:
    with pytest.raises(SettingError) as raised:
        Settings.from_environ(environ)
    assert str(raised.value).startswith(f"{name} ")
    assert "must" in str(raised.value) or "is not" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_setting_has_a_wrong_value_above() -> None:
    taking_anything = {"CDR_API_REGISTER_DOMAINS"}
    assert {f"CDR_API_{name.upper()}" for name in Settings.__dataclass_fields__} == {
        w[1] for w in WRONG
    } | taking_anything


def test_a_slip_of_the_pen_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Settings.from_environ(DSN | {"CDR_API_REGISTER_DOMAIN": "*"})
    assert "CDR_API_REGISTER_DOMAIN is not a setting" in caplog.text


@pytest.mark.parametrize(
    "command", [["gunicorn", "--bind", "127.0.0.1:0"], ["flask", "check"]], ids=["gunicorn", "flask"]
)
def test_a_wrong_value_stops_the_start_with_one_line(command: list[str]) -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("CDR_API_")} | {"CDR_API_DSN": "nonsense"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environ, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode != 0
    assert done.stderr.startswith("CDR_API_DSN is not a libpq connection string")
    assert done.stderr.count("\n") == 1


def test_a_database_that_cannot_be_reached_is_one_line_in_the_log() -> None:
    with serve(f"host=127.0.0.1 port={free_port()} dbname=x", CDR_API_POOL_TIMEOUT="200ms") as gunicorn:
        wait_for(lambda: "CDR_API_DSN: no connection" in gunicorn.log.read_text("utf-8"))
        done = subprocess.run(
            ["curl", "-s", "-w", "%{http_code}", f"{gunicorn.url}/api/health"], capture_output=True, check=False
        )
        assert done.stdout.endswith(b"503")


def test_statements_are_used_and_defined_once() -> None:
    text = Path(ROOT / "queries.sql").read_text("utf-8")
    names = re.findall(r"^-- name: (.*)$", text, re.MULTILINE)
    assert len(names) == len(set(names)) == len(STATEMENTS)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", name) for name in names)
    code = "".join(path.read_text("utf-8") for path in SOURCES)
    unused = [name for name in names if f'"{name}"' not in code]
    assert unused == []
    used = set(re.findall(r'(?:\.rows\(|STATEMENTS\[|\brun\(connection, )\s*"(\w+)"', code))
    assert len(used) > 30
    assert used <= set(names)
    # One ";" closes each; anything behind it would be lost.
    for name, statement in STATEMENTS.items():
        assert not statement.as_string().rstrip().endswith(";"), name
