"""cdr-api, the command of an installed PBX: setup, and flask's commands with the settings of the service.

deploy/cdr-api starts it: for setup as root, for all others as the service's user.
"""

from __future__ import annotations

import os

import click
from flask import Flask
from flask.cli import ScriptInfo

from cdr import __version__
from cdr.settings import ENVIRONMENT_FILE, SettingError, read_environment
from cdr_admin import check, token, user
from cdr_api import create_app
from cdr_setup.setup import setup


def load_app() -> Flask:
    """The application as systemd starts it: of the CDR_API_* variables only those of the settings file count."""
    for name in [name for name in os.environ if name.startswith("CDR_API_")]:
        del os.environ[name]
    try:
        os.environ.update(read_environment(ENVIRONMENT_FILE))
    except FileNotFoundError:
        raise click.ClickException(f"there is no {ENVIRONMENT_FILE}: run cdr-api setup") from None
    except PermissionError:
        raise click.ClickException(f"only root and the service may read {ENVIRONMENT_FILE}: use sudo") from None
    except SettingError as error:
        raise click.ClickException(str(error)) from None
    return create_app()


@click.group("cdr-api")
@click.version_option(__version__)
@click.pass_context
def main(context: click.Context) -> None:
    """The CDR API for FusionPBX: set it up, check it, and manage who may read calls."""
    context.obj = ScriptInfo(create_app=load_app)


for command in (setup, check, user, token):
    main.add_command(command)

if __name__ == "__main__":
    main(prog_name="cdr-api")
