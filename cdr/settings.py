"""The CDR_API_* environment, checked before anything starts."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from psycopg import conninfo

from cdr.parsing import integer_between, one_of, parse_names, parse_zone

log = logging.getLogger("cdr_api")

ENVIRONMENT_FILE = Path("/etc/cdr-api/env")  # where DEPLOYMENT.md keeps them


class SettingError(Exception):
    """A CDR_API_* variable is wrong: its name, its fault and what is allowed."""


def parse_dsn(text: str) -> str:
    try:
        conninfo.conninfo_to_dict(text)
    except psycopg.ProgrammingError as error:
        raise ValueError(f"is not a libpq connection string or URI ({str(error).strip()})") from None
    return text


def parse_milliseconds(text: str) -> int:
    units = {"": 1000, "ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000}
    match = re.fullmatch(r"([0-9]{1,9}) ?(ms|s|min|h|)", text)
    if not match or not 1 <= int(match[1]) * units[match[2]] <= 2**31 - 1:
        raise ValueError("must be a time such as 30s, 500ms, 5min or 1h (a bare number means seconds), not zero")
    return int(match[1]) * units[match[2]]


def parse_syslog(text: str) -> str:
    if text != "off" and not text.startswith("/"):
        raise ValueError("must be the path of syslog's socket, such as /dev/log, or off")
    return text


def parse_origins(text: str) -> tuple[str, ...]:
    origins = parse_names(text)
    if not all(re.fullmatch(r"https?://[a-z0-9.:\[\]-]+", origin) for origin in origins):
        raise ValueError("must be origins such as https://billing.example.com, with commas between them")
    return origins


@dataclass(frozen=True)
class Settings:
    """The CDR_API_* environment, checked. Times are in milliseconds."""

    dsn: str = field(metadata={"parse": parse_dsn})
    accounts_dsn: str = field(default="", metadata={"parse": parse_dsn})
    calls_dsn: str = field(default="", metadata={"parse": parse_dsn})
    registration: str = field(default="open", metadata={"parse": one_of("open", "closed")})
    register_domains: tuple[str, ...] = field(default=(), metadata={"parse": parse_names})
    token_days: int = field(default=365, metadata={"parse": integer_between(0, 36500)})
    timezone: str = field(default="", metadata={"parse": parse_zone})
    proxies: int = field(default=0, metadata={"parse": integer_between(0, 10)})
    statement_timeout: int = field(default=3_600_000, metadata={"parse": parse_milliseconds})
    pool_timeout: int = field(default=5_000, metadata={"parse": parse_milliseconds})
    workers: int = field(default=os.cpu_count() or 1, metadata={"parse": integer_between(1, 256)})
    lookback_days: int = field(default=45, metadata={"parse": integer_between(1, 3650)})
    sweep_seconds: int = field(default=0, metadata={"parse": integer_between(0, 86_400)})
    threads: int = field(default=8, metadata={"parse": integer_between(1, 256)})
    rate: int = field(default=0, metadata={"parse": integer_between(0, 10**6)})  # requests a minute; 0: no limit
    account_streams: int = field(default=8, metadata={"parse": integer_between(1, 256)})
    client_timeout: int = field(default=60_000, metadata={"parse": parse_milliseconds})
    min_rate: int = field(default=16_384, metadata={"parse": integer_between(1, 10**9)})  # bytes per second
    syslog: str = field(default="/dev/log", metadata={"parse": parse_syslog})
    log: str = field(default="text", metadata={"parse": one_of("text", "json", "off")})
    metrics: str = field(default="off", metadata={"parse": one_of("on", "off")})
    pages: str = field(default="on", metadata={"parse": one_of("on", "off")})
    cors_origins: tuple[str, ...] = field(default=(), metadata={"parse": parse_origins})

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Settings:
        """The settings of an environment; an empty variable counts as unset.

        Raises SettingError for the first wrong one. A CDR_API_* variable that
        is not a setting is logged, since it may be misspelt.
        """
        parsers = {
            f"CDR_API_{name.upper()}": (name, f.metadata["parse"]) for name, f in cls.__dataclass_fields__.items()
        }
        for variable in unknown_settings(environ):
            log.warning("%s is not a setting of this service and has no effect", variable)
        values = {}
        for variable, (name, parse) in parsers.items():
            if text := environ.get(variable, "").strip():
                try:
                    values[name] = parse(text)
                except ValueError as error:
                    raise SettingError(f"{variable} {error}") from None
        if "dsn" not in values:
            raise SettingError("CDR_API_DSN is not set: it must be the libpq connection string of FusionPBX's database")
        return cls(**values)


def unknown_settings(environ: Mapping[str, str]) -> list[str]:
    """The variables that look like settings and are not."""
    known = {f"CDR_API_{name.upper()}" for name in Settings.__dataclass_fields__}
    return sorted(name for name in environ if name.startswith("CDR_API_") and name not in known)


# A line of the file as systemd reads it (EnvironmentFile=): blanks need no quotation marks.
ASSIGNMENT = re.compile(r"""\s*(\w+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)'|((?!["']).*[^\\]|))\s*""", re.ASCII)


def read_environment(path: Path) -> dict[str, str]:
    """The variables of a file that systemd reads as EnvironmentFile=, one in each line.

    Raises SettingError for a line that is none, and OSError where the file cannot be read.
    """
    found = {}
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip() or line.lstrip()[0] in "#;":
            continue
        match = ASSIGNMENT.fullmatch(line)
        if not match:
            name = line.partition("=")[0].strip()
            raise SettingError(f'{path}, line {number} ({name}) is wrong: a setting must be one line, NAME="VALUE"')
        name, quoted, literal, plain = match.groups()
        value = plain.rstrip() if plain is not None else quoted
        found[name] = literal if value is None else re.sub(r"\\(.)", r"\1", value)
    return found
