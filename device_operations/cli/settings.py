"""The command `settings`: what is in force."""

from __future__ import annotations

import click

from device_operations.cli.output import json_option, print_json, print_table
from device_operations.settings import SettingsError, describe, load
from device_operations.settings.names import PREFIX, nearest


@click.command()
@click.argument("name", required=False)
@json_option
def settings(name: str | None, as_json: bool) -> None:
    """Show the settings in force, or the value of one by NAME (secrets are masked unless asked for by name)."""
    everything = describe(load())
    if name is not None:
        wanted = PREFIX + name.upper().removeprefix(PREFIX)
        found = next((one for one in everything if one.name == wanted), None)
        if found is None:
            raise SettingsError(f"{name} is no setting{nearest(wanted, [one.name for one in everything])}")
        if as_json:
            print_json(found.value)
        else:
            click.echo("" if found.value is None else str(_text(found.value)))
    elif as_json:
        print_json({one.name: one.shown for one in everything})
    else:
        print_table(["setting", "value", "allowed"], [(one.name, _text(one.shown), one.allowed) for one in everything])


def _text(value: object) -> object:
    """As the environment would have it."""
    return str(value).lower() if isinstance(value, bool) else value
