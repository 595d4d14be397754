"""Flower with every page behind its password: `python -m device_operations.stack.flower`.

Flower's own `--basic-auth` leaves `/metrics` and `/healthcheck` open, and both show jobs. Here one check, run before
any page, covers all of them; only its static files (style sheets, scripts) stay open.
"""

from __future__ import annotations

import os
import sys

import flower.urls
from celery.bin.celery import celery
from flower.views import BaseHandler
from flower.views.auth import LoginHandler
from tornado.web import HTTPError

from device_operations.settings import Settings, SettingsError, load

USER = "admin"

#: Flower keeps so many tasks in memory; PostgreSQL has them all.
MAX_TASKS = 10_000


def main() -> None:
    """Runs Flower until it is stopped; exit status 2 for a wrong setting."""
    try:
        arguments = prepare(load())
    except SettingsError as error:
        print(f"flower: {error}", file=sys.stderr)
        sys.exit(2)
    ask_everywhere()
    celery(arguments, auto_envvar_prefix="CELERY")


def prepare(settings: Settings) -> list[str]:
    """Celery's arguments; the password goes by the environment, since anyone who lists processes reads arguments.

    Raises `SettingsError` where no password or no Redis is set.
    """
    if settings.flower.password is None:
        raise SettingsError("DEVICE_OPERATIONS_FLOWER__PASSWORD is not set: Flower shows every job's arguments")
    settings.require_redis_url()
    for name in [name for name in os.environ if name.startswith("FLOWER_")]:
        del os.environ[name]
    os.environ["FLOWER_BASIC_AUTH"] = f"{USER}:{settings.flower.password}"
    return [
        *("-A", "tasks.app", "flower"),
        f"--address={settings.flower.host}",
        f"--port={settings.flower.port}",
        f"--max-tasks={MAX_TASKS}",
    ]


def ask_everywhere() -> None:
    """Makes every page of Flower's ask for the password before it does anything."""
    for entry in flower.urls.handlers:
        page = entry.handler_class if hasattr(entry, "handler_class") else entry[1]
        if isinstance(page, type) and issubclass(page, BaseHandler) and page is not LoginHandler:
            page.prepare = _ask  # type: ignore[attr-defined]


def _ask(page: BaseHandler) -> None:
    if not page.get_current_user():
        raise HTTPError(401)


if __name__ == "__main__":
    main()
