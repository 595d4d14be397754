"""The command `train`: a session from a JSON description, trained on a dataset's file, measured and kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

import click

from device_operations.cli.gateway_options import with_client
from device_operations.cli.output import json_option, print_json, print_object
from device_operations.cli.progress import follow, opened, require_success
from device_operations.client import Client
from device_operations.errors import OperationError
from device_operations.jobs import Job, Kind
from device_operations.wire.json_types import FreeJson

_EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.argument("spec", type=click.File(encoding="utf-8"), required=False)
@click.option("--session", "session_id", metavar="ID", help="Train this session further, in place of a new one.")
@click.option("--dataset", type=_EXISTING_FILE, help="A safetensors file: each input by its name, and `targets`.")
@click.option("--epochs", type=click.IntRange(min=1), help="How often to go through it; 1 unless --steps is given.")
@click.option("--steps", type=click.IntRange(min=1), help="How many batches to take, in place of --epochs.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--evaluate", "held_out", type=_EXISTING_FILE, help="At the end, measure the session on this file.")
@click.option("--checkpoint", "name", metavar="NAME", help="At the end, keep a checkpoint of this name.")
@click.option("--end", is_flag=True, help="At the end, end the session; otherwise it stays for more.")
@json_option
@with_client
def train(
    client: Client,
    spec: TextIO | None,
    session_id: str | None,
    dataset: Path | None,
    epochs: int | None,
    steps: int | None,
    batch_size: int,
    held_out: Path | None,
    name: str | None,
    end: bool,
    as_json: bool,
) -> None:
    """Train the model that SPEC describes: a JSON file (or -) as the body of POST /api/training/initialize."""
    if (spec is None) == (session_id is None):
        raise click.UsageError("give either SPEC, for a new session, or --session")
    if epochs and steps:
        raise click.UsageError("give either --epochs or --steps")

    def done(job: Job) -> FreeJson:
        ended = follow(client, job, quiet=as_json)
        require_success(ended)
        return dict(ended.result or {})

    outcomes: dict[str, object] = {}
    with ExitStack() as leaving:
        if spec is not None:
            made = done(client.submit(Kind.TRAINING_INITIALIZE, _described(spec)))
            session_id = str(made["session_id"])
            leaving.enter_context(_ended_if_untrained(client, session_id, made["step"], quiet=as_json))
            if not as_json:
                click.echo(f"session {session_id} on {made['device_id']}", err=True)
        outcomes["session_id"] = session_id = str(session_id)
        plan = {"batch_size": batch_size, **({"steps": steps} if steps else {"epochs": epochs or 1})}
        if dataset is not None:
            given = plan | {"blob_id": _uploaded(client, dataset, quiet=as_json)}
            outcomes["trained"] = done(client.training.step(session_id, dataset=given))
        if held_out is not None:
            given = {"batch_size": batch_size, "epochs": 1, "blob_id": _uploaded(client, held_out, quiet=as_json)}
            outcomes["evaluated"] = done(client.training.step(session_id, mode="evaluate", dataset=given))
        if name is not None:
            outcomes["checkpoint"] = done(client.training.checkpoint(session_id, name=name))
        if end:
            outcomes["ended"] = done(client.training.end_session(session_id))
    if as_json:
        print_json(outcomes)
    else:
        print_object(_flat(outcomes))


@contextmanager
def _ended_if_untrained(client: Client, session_id: str, step: int, *, quiet: bool) -> Iterator[None]:
    """Ends the session that this command made, where what follows fails before anything was trained into it.

    A session that has learned something stays, also if something failed then: only its owner knows whether it can go.
    """
    try:
        yield
    except BaseException:
        try:
            if client.training.status(session_id)["step"] == step:
                client.wait(client.training.end_session(session_id))
            elif not quiet:
                click.echo(f"session {session_id} stays; go on with --session {session_id}", err=True)
        except OperationError as error:
            # The first failure is the one reported; the session ends with its lease, or by hand.
            click.echo(f"session {session_id} was not ended: {error.message}", err=True)
        raise


def _described(spec: TextIO) -> dict[str, object]:
    try:
        described = json.load(spec)
    except ValueError as error:
        raise click.BadParameter(f"{spec.name} is not JSON: {error}", param_hint="SPEC") from None
    if not isinstance(described, dict):
        raise click.BadParameter(f"{spec.name} holds no JSON object", param_hint="SPEC")
    return described


def _uploaded(client: Client, file: Path, *, quiet: bool) -> str:
    with opened(file, quiet=quiet) as source:
        return client.blobs.upload(source).blob_id


def _flat(outcomes: FreeJson) -> FreeJson:
    """What a person wants to know of each job."""
    shown: FreeJson = {"session_id": outcomes["session_id"]}
    for part, names in {
        "trained": ("steps", "samples", "last_loss", "step"),
        "evaluated": ("samples", "loss", "accuracy"),
        "checkpoint": ("checkpoint_id", "blob_id", "size_bytes"),
        "ended": ("freed_bytes",),
    }.items():
        shown |= {
            f"{part} {name}": outcomes[part][name] for name in names if outcomes.get(part, {}).get(name) is not None
        }
    return shown
