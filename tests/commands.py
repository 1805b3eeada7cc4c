"""The operator's commands, run in this process."""

from __future__ import annotations

from click.testing import Result
from flask import Flask


def flask(app: Flask, *arguments: str, stdin: str = "") -> Result:
    return app.test_cli_runner().invoke(args=arguments, input=stdin)


def check(app: Flask) -> tuple[int, dict[str, str]]:
    """The exit status, and the lines by subject."""
    result = flask(app, "check")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, {line[2:20].strip(): line for line in result.output.splitlines()}
