"""The command `embed`: texts from the command line or a file, vectors to the screen or a file."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

import click

from device_operations.cli.gateway_options import with_client
from device_operations.cli.output import json_option, print_json, print_table
from device_operations.cli.progress import follow, require_success
from device_operations.client import Client

#: Numbers of a vector that are printed for a person.
SHOWN = 4


@click.command()
@click.argument("model")
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option("--file", "source", type=click.File(encoding="utf-8"), help="Texts, one a line; - is standard input.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.npy", help="Write vectors.")
@click.option("--normalize/--no-normalize", default=None, help="Vectors of length 1; by default as the model has it.")
@click.option("--dimensions", type=click.IntRange(min=1), help="Cut vectors to so many numbers.")
@json_option
@with_client
def embed(
    client: Client,
    model: str,
    texts: tuple[str, ...],
    source: TextIO | None,
    output: Path | None,
    normalize: bool | None,
    dimensions: int | None,
    as_json: bool,
) -> None:
    """Embed texts with MODEL, given by its name or its id, and print their vectors."""
    given = [*texts, *((line.rstrip("\r\n") for line in source) if source is not None else ())]
    if not given:
        raise click.UsageError("give a TEXT, or --file")
    if output is not None and not output.resolve().parent.is_dir():
        raise click.BadParameter(f"there is no folder {output.resolve().parent}", param_hint="--output")
    by_id = any(known["model_id"] == model for known in client.inference.models())
    job = client.submit_embed(
        given, None if by_id else model, model_id=model if by_id else None, normalize=normalize, dimensions=dimensions
    )
    require_success(follow(client, job, quiet=as_json))
    found = client.embedded(job)
    if output is not None:
        import numpy as np

        with output.open("wb") as file:
            np.save(file, found.vectors, allow_pickle=False)
    if as_json:
        shown = {} if output is not None else {"vectors": found.vectors.tolist()}
        shape = list(found.vectors.shape)
        print_json(
            {"job_id": job.job_id, "shape": shape, "tokens": found.tokens, "truncated": found.truncated, **shown}
        )
        return
    if output is not None:
        click.echo(f"{output}: {found.vectors.shape[0]} vectors of {found.vectors.shape[1]} numbers")
    else:
        numbers = [" ".join(f"{number:.4f}" for number in vector[:SHOWN]) + " …" for vector in found.vectors]
        print_table(["text", "vector"], [(text[:40], vector) for text, vector in zip(given, numbers, strict=True)])
    if found.truncated:
        click.echo(f"cut at the model's limit of tokens: {', '.join(map(str, found.truncated))}", err=True)
