"""`python -m migrations upgrade|downgrade|current|check [REVISION]`: brings the database to a revision."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError

from device_operations.settings import SettingsError, load


def main(arguments: list[str] | None = None) -> int:
    """Runs the Alembic command; exit status 1 when it fails, with one line that says why."""
    parser = argparse.ArgumentParser(prog="python -m migrations", description=__doc__)
    parser.add_argument("command", choices=["upgrade", "downgrade", "current", "check"], nargs="?", default="upgrade")
    parser.add_argument("revision", nargs="?")
    given = parser.parse_args(arguments)
    try:
        url = load().database_url
        if not url:
            raise SettingsError("DEVICE_OPERATIONS_DATABASE_URL is not set, and no `device-operations up` noted one")
        config = configuration(str(url))
        if given.command == "upgrade":
            command.upgrade(config, given.revision or "head")
        elif given.command == "downgrade":
            command.downgrade(config, given.revision or "-1")
        elif given.command == "current":
            command.current(config)
        else:
            command.check(config)
    except (CommandError, SettingsError) as error:
        print(f"migrations: {error}", file=sys.stderr)
        return 1
    return 0


def configuration(url: str) -> Config:
    """Alembic's configuration for the database at `url`."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["url"] = url
    return config


if __name__ == "__main__":
    sys.exit(main())
