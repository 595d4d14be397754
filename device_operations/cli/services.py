"""The commands that are one service each, as containers and service managers run them.

They need the servers' distribution, and load what runs them only when called: a client's `--help` does without.
"""

from __future__ import annotations

import os
import subprocess
import sys

import click

from device_operations.settings import load
from device_operations.stack.installed import require_servers


@click.command()
def gateway() -> None:
    """Run the HTTP gateway."""
    load()
    require_servers()
    from device_operations.stack import services

    _become(*services.GATEWAY)


@click.command()
@click.option("--device", "device_id", required=True, metavar="ID", help="The device to own, such as gpu_0.")
def worker(device_id: str) -> None:
    """Run the worker of one device."""
    load()
    require_servers()
    from device_operations.stack import services

    for name, value in services.WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _become(*services.worker_arguments(device_id))


@click.command()
@click.argument("action", type=click.Choice(["upgrade", "downgrade", "current", "check"]), default="upgrade")
@click.argument("revision", required=False)
def migrate(action: str, revision: str | None) -> None:
    """Bring the database to the newest revision (or another, or only show it)."""
    load()
    require_servers()
    _become("-m", "migrations", action, *([revision] if revision else []))


@click.command()
def flower() -> None:
    """Run Flower, every page behind its password."""
    load()
    require_servers()
    from device_operations.stack import services

    _become(*services.FLOWER)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the report for machines.")
@click.option("--report", type=click.Path(dir_okay=False), help="Where the report is written.")
def doctor(as_json: bool, report: str | None) -> None:
    """Try this machine: its services, and memory, inference and training on each device."""
    require_servers()
    _become("-m", "workers.doctor", *(["--json"] if as_json else []), *(["--report", report] if report else []))


def _become(*arguments: str) -> None:
    """Turns this process into the service, so that signals reach it; on Windows, which cannot, waits for it."""
    command = [sys.executable, *arguments]
    sys.stdout.flush()
    if os.name == "posix":
        os.execv(command[0], command)
    child = subprocess.Popen(command)
    while True:
        try:
            sys.exit(child.wait())
        except KeyboardInterrupt:  # Ctrl-C reached the child too; it stops in good order.
            continue
