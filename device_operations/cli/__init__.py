"""The command line `device-operations`: the table of its commands, and how their failures end the program.

Exit status: 0 done, 1 failed (a job that failed, a service that does not answer), 2 a wrong setting or argument,
130 interrupted. The commands on one noun share a file here, which is loaded only when one of them is called.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

from device_operations.cli.output import complain
from device_operations.errors import OperationError
from device_operations.settings import SettingsError
from device_operations.stack.errors import StackError

#: Command -> where it is. The order is that of `--help`.
COMMANDS = {
    "up": "device_operations.cli.up:up",
    "gateway": "device_operations.cli.services:gateway",
    "worker": "device_operations.cli.services:worker",
    "migrate": "device_operations.cli.services:migrate",
    "flower": "device_operations.cli.services:flower",
    "devices": "device_operations.cli.devices:devices",
    "doctor": "device_operations.cli.services:doctor",
    "settings": "device_operations.cli.settings:settings",
    "jobs": "device_operations.cli.jobs:jobs",
    "submit": "device_operations.cli.jobs:submit",
    "retry": "device_operations.cli.jobs:retry",
    "upload": "device_operations.cli.models:upload",
    "load-model": "device_operations.cli.models:load_model",
    "run": "device_operations.cli.models:run",
    "image": "device_operations.cli.images:image",
    "embed": "device_operations.cli.embed:embed",
    "train": "device_operations.cli.train:train",
}


class _Commands(click.Group):
    """Loads a command when it is called, and all of them for `--help`."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="device-operations")
def program() -> None:
    """Jobs on GPUs for a whole team: device memory, inference and training over HTTP and Celery."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits."""
    try:
        status = program.main(args=None if arguments is None else list(arguments), standalone_mode=False)
    except click.exceptions.Abort:
        status = 130
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except SettingsError as error:
        complain("wrong_setting", str(error))
        status = 2
    except StackError as error:
        complain("stack_failed", str(error))
        status = 1
    except TimeoutError as error:
        complain("timeout", str(error))
        status = 1
    except OperationError as error:
        complain(error.code, error.message, error.detail)
        status = 1
    except BrokenPipeError:  # The reader, such as `head`, has enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status if isinstance(status, int) else 0)
