"""The commands on models and their files: `upload`, `load-model` and `run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from device_operations.cli.gateway_options import with_client
from device_operations.cli.output import json_option, print_json, print_object
from device_operations.cli.progress import follow, opened, require_success
from device_operations.client import Client
from device_operations.requests.pipelines import RUNS
from device_operations.wire.json_types import FreeJson

if TYPE_CHECKING:
    from device_operations.tensors import Array

_EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_EXISTING = click.Path(exists=True, path_type=Path)

#: Outputs with more elements than this are summed up, not printed; `--output` writes them whole.
PRINTED_ELEMENTS = 32


@click.command()
@click.argument("file", type=_EXISTING_FILE)
@json_option
@with_client
def upload(client: Client, file: Path, as_json: bool) -> None:
    """Upload FILE to the blob store and print its blob id."""
    with opened(file, quiet=as_json) as source:
        blob = client.blobs.upload(source)
    if as_json:
        print_json({"blob_id": blob.blob_id, "sha256": blob.sha256, "size_bytes": blob.size_bytes})
    else:
        click.echo(blob.blob_id)


@click.command("load-model")
@click.argument("file", type=_EXISTING)
@click.option("--name", help="The model's name; by default the file's, without its ending.")
@click.option("--version", default="1", show_default=True)
@click.option("--type", "model_type", type=click.Choice(["onnx", *RUNS]), default="onnx", show_default=True)
@click.option("--device", "device_id", metavar="ID")
@click.option("--pin", is_flag=True, help="Keep it loaded, however long it is not run.")
@click.option("--shared", is_flag=True, help="Let other owners run it.")
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="As in the request's `options`.")
@click.option("--no-wait", is_flag=True, help="Do not wait until it is loaded.")
@json_option
@with_client
def load_model(
    client: Client,
    file: Path,
    name: str | None,
    version: str,
    model_type: str,
    device_id: str | None,
    pin: bool,
    shared: bool,
    options: tuple[str, ...],
    no_wait: bool,
    as_json: bool,
) -> None:
    """Upload FILE (or a folder, for models of several files) and load it on a device."""
    job = client.inference.load_model(
        name or file.stem,
        _upload_source(client, file, quiet=as_json),
        version=version,
        model_type=model_type,
        device_id=device_id,
        pin=pin or None,
        shared=shared or None,
        options={key: _value(value) for key, value in (_split(text, "--option") for text in options)},
    )
    if not no_wait:
        job = follow(client, job, quiet=as_json)
    if as_json:
        print_json(job.model_dump(mode="json"))
    else:
        model_id = job.resource.id if job.resource else "-"
        print_object({"model_id": model_id, "job_id": job.job_id, "state": str(job.state), "device_id": job.device_id})
    if not no_wait:
        require_success(job)


def _upload_source(client: Client, path: Path, *, quiet: bool) -> FreeJson:
    """The model's source: one blob for a file, or each file of a folder under its place in it."""
    if path.is_file():
        with opened(path, quiet=quiet) as source:
            return {"blob_id": client.blobs.upload(source).blob_id}
    blobs = {}
    for one in sorted(found for found in path.rglob("*") if found.is_file()):
        with opened(one, quiet=quiet) as source:
            blobs[one.relative_to(path).as_posix()] = client.blobs.upload(source).blob_id
    if not blobs:
        raise click.BadParameter(f"the folder {path} holds no files", param_hint="FILE")
    return {"blobs": blobs}


@click.command()
@click.argument("model")
@click.option("--input", "inputs", multiple=True, required=True, metavar="NAME=@FILE.npy|JSON", help="An input tensor.")
@click.option(
    "--output",
    "outputs",
    multiple=True,
    metavar="NAME=FILE.npy",
    help="Write this output to a file; what is no tensor as JSON.",
)
@click.option("--session", "session_id", metavar="ID")
@json_option
@with_client
def run(
    client: Client,
    model: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    session_id: str | None,
    as_json: bool,
) -> None:
    """Run MODEL, given by its name or its id, and print its outputs."""
    import numpy as np

    targets = {name: Path(value) for name, value in (_split(text, "--output") for text in outputs)}
    arrays = {name: _read_array(name, value) for name, value in (_split(text, "--input") for text in inputs)}
    by_id = any(known["model_id"] == model for known in client.inference.models())
    job = client.inference.submit_run(
        arrays, model_id=model if by_id else None, model_name=None if by_id else model, session_id=session_id
    )
    require_success(follow(client, job, quiet=as_json))
    result = client.inference.run_result(job)
    unknown = sorted(set(targets) - set(result.outputs))
    if unknown:
        raise click.BadParameter(
            f"there is no output {unknown[0]!r}, but {sorted(result.outputs)}", param_hint="--output"
        )
    for name, path in targets.items():
        value = result.outputs[name]
        if not isinstance(value, np.ndarray):  # a sequence or a map has no form in a .npy file
            path.write_text(json.dumps(value))
            continue
        with path.open("wb") as file:
            np.save(file, value, allow_pickle=False)
    shown = {name: _printable(array, whole=as_json and name not in targets) for name, array in result.outputs.items()}
    if as_json:
        print_json({"job_id": job.job_id, "outputs": shown, "device_ms": result.device_ms})
    else:
        print_object({"job_id": job.job_id, "device_ms": result.device_ms, **shown})


def _split(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise click.BadParameter(f"{text!r} is not NAME=…", param_hint=option)
    return name, value


def _value(text: str) -> object:
    """The text as JSON where it is that, else as it stands."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _read_array(name: str, value: str) -> Array:
    """An array from a `.npy` file, or from JSON (numbers with a point are float32, whole ones int64, texts strings)."""
    import numpy as np

    try:
        if value.startswith("@"):
            loaded: Array = np.load(value[1:], allow_pickle=False)
            return loaded
        array = np.asarray(json.loads(value))
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{name}: neither a .npy file nor JSON: {error}", param_hint="--input") from None
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _printable(array: Array | FreeJson | list[object] | None, *, whole: bool) -> object:
    if array is None or isinstance(array, (dict, list)):
        return array
    about = {"dtype": array.dtype.name, "shape": list(array.shape)}
    if whole or array.size <= PRINTED_ELEMENTS:
        about["data"] = array.tolist()
    return about
