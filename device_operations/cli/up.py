"""The command `up`: the whole product on this machine."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from device_operations.cli.output import json_option, print_json
from device_operations.settings import read
from device_operations.stack.installed import require_servers

if TYPE_CHECKING:
    from device_operations.stack.up import Addresses


@click.command()
@json_option
def up(as_json: bool) -> None:
    """Run everything on this machine: PostgreSQL and Redis where no URL is set, gateway, workers, Flower."""
    settings = read()
    require_servers()
    from device_operations.stack.up import up as run

    began = time.monotonic()

    def say(message: str) -> None:
        if as_json:
            print_json({"event": "message", "message": message})
        else:
            click.echo(message)

    def ready(addresses: Addresses) -> None:
        if as_json:
            print_json(
                {
                    "event": "ready",
                    "url": addresses.http_url,
                    "flower_url": addresses.flower_url,
                    "flower_user": addresses.flower_user,
                    "flower_password": addresses.flower_password,
                    "logs": str(settings.data_dir / "logs"),
                    "seconds": round(time.monotonic() - began, 2),
                }
            )
            return
        click.echo(f"ready {addresses.http_url}")
        click.echo(f"  dashboard  {addresses.http_url}/")
        click.echo(f"  API docs   {addresses.http_url}/docs")
        click.echo(f"  Flower     {addresses.flower_url}/ (user {addresses.flower_user}, ", nl=False)
        click.echo(f"password {addresses.flower_password})")
        click.echo(f"  logs       {settings.data_dir / 'logs'}")
        click.echo(f"up after {time.monotonic() - began:.1f} s; Ctrl-C stops everything")

    run(settings, say, ready)
