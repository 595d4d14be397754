"""What every command takes that calls a gateway: where it is, and the key."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import click

from device_operations.client import Client

T = TypeVar("T")


def with_client(command: Callable[..., T]) -> Callable[..., T]:
    """Gives a command `--url` and `--api-key`, and calls it with an open `client`.

    Without them, the gateway is the one that the settings or a running `up` name, and the key the settings' first.
    """

    @click.option("--url", metavar="URL", help="The gateway's address; by default the one of the settings or of `up`.")
    @click.option("--api-key", metavar="KEY", help="An API key; by default the first of DEVICE_OPERATIONS_API_KEYS.")
    @functools.wraps(command)
    def call(*args: object, url: str | None, api_key: str | None, **options: object) -> T:
        with Client(url, api_key) as client:
            return command(*args, client=client, **options)

    return call
