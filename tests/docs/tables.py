"""The tables of docs/contract.md, made from the code: `python -m tests.docs.tables` writes them anew.

Each stands in the page between `<!-- NAME -->` and `<!-- end of NAME -->`. A test compares the page with what is made
here, so that a route, an error, a task or a setting that is added or changed is in the contract or fails the build.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import click

from api_gateway.app import create_app
from device_operations.cli import program
from device_operations.errors import CODES
from device_operations.jobs import Kind
from device_operations.requests.base import JobOptions
from device_operations.requests.kinds import requests_of
from device_operations.settings import PREFIX, Settings
from device_operations.settings.names import is_secret, leaves
from tests.support.stack import REPOSITORY

PAGE = REPOSITORY / "docs" / "contract.md"


@functools.cache
def routes() -> str:
    """Every route of `/openapi.json`, with its operation's first sentence."""
    settings = {"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none", "REDIS_URL": "redis://127.0.0.1:1/0"}
    with mock.patch.dict(os.environ, {PREFIX + name: value for name, value in settings.items()}):
        paths = create_app(Settings()).openapi()["paths"]
    rows = [
        (f"`{method.upper()} {path}`", _first_sentence(operation["description"]))
        for path, methods in paths.items()
        for method, operation in methods.items()
    ]
    return _table(("route", "does"), rows)


def tasks() -> str:
    """Every kind of job, its Celery task, and the fields of its request."""
    rows = []
    for kind in Kind:
        fields = dict.fromkeys(name for request in requests_of(kind)[:1] for name in request.model_fields)
        rows.append((f"`{kind.value}`", f"`{kind.task}`", ", ".join(f"`{name}`" for name in fields if name != "job")))
    return _table(("kind", "Celery task", "fields of the request"), rows)


def options() -> str:
    """The fields of `job`, which every submission takes."""
    said = {
        "webhook_url": "is sent the ended job by POST, signed",
        "owner": "whose the job is; only an admin's key may name another than its own",
        "labels": "names and values of the caller's own, by which jobs can be listed",
    }
    rows = [
        (f"`{name}`", _value(field.get_default(call_default_factory=True)), said.get(name) or str(field.description))
        for name, field in JobOptions.model_fields.items()
    ]
    return _table(("option", "default", "means"), rows)


def errors() -> str:
    """Every error code, in the order of the table in the code."""
    rows = [
        (f"`{code}`", str(known.status), known.title, "yes" if known.retryable else "no")
        for code, known in CODES.items()
    ]
    return _table(("code", "status", "title", "trying again can help"), rows)


def settings() -> str:
    """Every setting, by its name without the prefix."""
    found_out = {"DEVICES": "`auto`", "BLOBS__URL": "a folder below `DATA_DIR`"}
    rows = []
    for path, field in leaves(Settings):
        name = "__".join(path).upper()
        default = found_out.get(name) or _value(field.get_default(call_default_factory=True))
        allowed = str(field.description) + (" (secret)" if is_secret(field) else "")
        rows.append((f"`{name}`", default, allowed.replace("|", "or")))
    return _table(("setting", "default", "allowed"), rows)


def commands() -> str:
    """Every command of the command line, in the order of `--help`."""
    with click.Context(program) as context:
        found = {name: program.get_command(context, name) for name in program.list_commands(context)}
    rows = [
        (f"`device-operations {name}`", command.get_short_help_str(200).removesuffix("."))
        for name, command in found.items()
        if command is not None
    ]
    return _table(("command", "does"), rows)


TABLES = {
    "routes": routes,
    "tasks": tasks,
    "options": options,
    "errors": errors,
    "settings": settings,
    "commands": commands,
}


def in_page(name: str, text: str) -> str:
    """The table as it stands in the page."""
    found = _place(name).search(text)
    assert found is not None, f"{PAGE.name} has no place for the table {name!r}"
    return found[1]


def _place(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=<!-- {name} -->\n)(.*?)(?=<!-- end of {name} -->)", re.DOTALL)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[.])\s", " ".join(text.split()), maxsplit=1)[0].removesuffix(".").replace("|", "or")


def _value(value: Any) -> str:
    if value is None or value in ((), [], {}):
        return "none"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value.as_posix() if isinstance(value, Path) else value}`"


def main() -> None:
    """Writes all tables into the page."""
    text = PAGE.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        in_page(name, text)
        made = make()
        text = _place(name).sub(lambda _, made=made: made, text)  # type: ignore[misc]
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
