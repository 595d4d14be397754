"""The command `devices`: what the gateway knows, or what this machine offers."""

from __future__ import annotations

import click

from device_operations.cli.gateway_options import with_client
from device_operations.cli.output import json_option, print_json, print_table
from device_operations.client import Client
from device_operations.devices import device_ids
from device_operations.settings import load


@click.command()
@click.option("--local", is_flag=True, help="Look at this machine instead: which devices `up` would start workers for.")
@json_option
@with_client
def devices(client: Client, local: bool, as_json: bool) -> None:
    """Show the devices, their state, memory and queues."""
    if local:
        here = device_ids(load())
        if as_json:
            found = [{"device_id": one.device_id, "backend": one.backend, "ordinal": one.ordinal} for one in here]
            print_json({"devices": found})
        else:
            print_table(["device", "backend", "ordinal"], [(one.device_id, one.backend, one.ordinal) for one in here])
        return
    known = client.devices.list()
    if as_json:
        print_json({"devices": known})
        return
    print_table(
        ["device", "backend", "name", "state", "epoch", "free", "total", "queued", "running"],
        [
            (
                one["device_id"],
                one["backend"],
                one["name"],
                one["state"],
                one["epoch"],
                _gib(one["free_bytes"]),
                _gib(one["total_bytes"]),
                one["queued"],
                one["running"],
            )
            for one in known
        ],
    )


def _gib(size_bytes: int | None) -> str | None:
    return None if size_bytes is None else f"{size_bytes / 2**30:.1f} GiB"
