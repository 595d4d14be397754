"""What commands print: tables for people, JSON for machines, complaints on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import click

_Function = TypeVar("_Function", bound=Callable[..., object])


def json_option(command: _Function) -> _Function:
    """Gives a command the option `--json`; it arrives as the argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")(command)


def print_json(value: object) -> None:
    """One JSON value on a line of its own, at once: a reader may be waiting for it."""
    click.echo(json.dumps(value, default=str, ensure_ascii=False))
    sys.stdout.flush()


def print_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Left-aligned columns; None shows as a dash."""
    texts = [["-" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [list(heads), *texts]) for column in range(len(heads))]
    for row in [[head.upper() for head in heads], *texts]:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_object(value: dict[str, object]) -> None:
    """One line for each field; what is nested as JSON."""
    width = max((len(name) for name in value), default=0)
    for name, field in value.items():
        text = field if isinstance(field, str) else json.dumps(field, default=str, ensure_ascii=False)
        click.echo(f"{name.ljust(width)}  {text}")


def complain(code: str, message: str, detail: object = None) -> None:
    """Says on standard error what went wrong: as JSON where `--json` was given, for a person otherwise."""
    if "--json" in sys.argv:
        click.echo(json.dumps({"error": {"code": code, "message": message, "detail": detail}}, default=str), err=True)
    else:
        click.echo(f"device-operations: {message}", err=True)
