"""Prints the manual page of cdr-api, of what its commands say of themselves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from os import environ
from pathlib import Path

import click

sys.path.insert(0, str(Path.cwd()))
from cdr import __version__
from cdr.settings import ENVIRONMENT_FILE
from cdr_command import main


def escape(text: str) -> str:
    return text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")


def each_command(command: click.Command, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """Those that do something, with how they are called."""
    if not isinstance(command, click.Group):
        yield command, context
        return
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        if inner:
            yield from each_command(inner, click.Context(inner, parent=context, info_name=name))


def write_manual() -> Iterator[str]:
    day = datetime.fromtimestamp(int(environ["SOURCE_DATE_EPOCH"]), UTC)
    yield f'.TH CDR-API 1 "{day:%Y-%m-%d}" "cdr-api {__version__}" "CDR API for FusionPBX"'
    yield ".SH NAME\ncdr-api \\- set up, check and manage the CDR API for FusionPBX"
    yield ".SH SYNOPSIS\n.B cdr-api\n.I COMMAND\n.RI [ OPTIONS ]"
    yield f".SH DESCRIPTION\n{escape(main.help or '')}\nRun it as root."
    yield ".SH COMMANDS"
    for command, context in each_command(main, click.Context(main, info_name="cdr-api")):
        yield f".TP\n.B {escape(' '.join([context.command_path, *command.collect_usage_pieces(context)]))}"
        yield escape(command.help or "")
        for parameter in command.params:
            record = parameter.get_help_record(context)
            if record and record[1]:
                yield f".RS\n.TP\n.B {escape(record[0])}\n{escape(record[1])}\n.RE"
    yield f".SH FILES\n.TP\n.I {ENVIRONMENT_FILE}\nThe settings, and the password of the database's role."
    yield ".TP\n.I /opt/cdr\\-api/DEPLOYMENT.md\nInstallation, all settings, upgrades, failures, removal."
    yield ".SH SEE ALSO\n.BR journalctl (1),\n.BR nginx (8),\n.BR psql (1)"


for line in write_manual():
    click.echo(line)
