"""The command that makes images from a prompt."""

from __future__ import annotations

from pathlib import Path

import click

from device_operations.cli.gateway_options import with_client
from device_operations.cli.output import json_option, print_json, print_object
from device_operations.cli.progress import follow, require_success
from device_operations.client import Client

_SIZE_HELP = "Width and height in pixels, as 1024x1024; by default what the model was made for."


@click.command()
@click.argument("prompt")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), default="image.png", show_default=True)
@click.option("--model", help="The model's name or id; by default the one of type sdxl that is loaded.")
@click.option("--negative", "negative_prompt", help="What the image is not to show.")
@click.option("--size", metavar="WxH", help=_SIZE_HELP)
@click.option("--steps", type=int)
@click.option("--guidance", "guidance_scale", type=float)
@click.option("--seed", type=int, help="The same seed makes the same image; by default one that is printed.")
@click.option("--images", type=int, help="How many; each further one has the next seed.")
@click.option("--scheduler", help="euler, euler_ancestral, dpmpp_2m_karras, ddim, unipc or lcm.")
@click.option("--image", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The image to start from.")
@click.option("--strength", type=float, help="How much of it is changed, above 0 to 1.")
@json_option
@with_client
def image(
    client: Client,
    prompt: str,
    output: Path,
    model: str | None,
    size: str | None,
    image: Path | None,
    as_json: bool,
    **more: object,
) -> None:
    """Make an image from PROMPT with a loaded model, and write it to a file."""
    if not output.absolute().parent.is_dir():
        raise click.BadParameter(f"the folder {output.absolute().parent} is not there", param_hint="--output")
    form = {".png": "png", ".webp": "webp"}.get(output.suffix.lower())
    if form is None:
        raise click.BadParameter("a file's name ends in .png or .webp", param_hint="--output")
    width, height = _size(size)
    options = {"width": width, "height": height, "output_format": form, **more}
    options = {name: value for name, value in options.items() if value is not None}
    job = client.images.submit(prompt, model_id=_model(client, model), image=image, options=options)
    require_success(follow(client, job, quiet=as_json))
    result = client.images.result(job)
    files = []
    for number, made in enumerate(result.images):
        name = output if len(result.images) == 1 else output.with_stem(f"{output.stem}-{number + 1}")
        files.append({"file": str(made.save(name)), "seed": made.seed, "width": made.width, "height": made.height})
    if as_json:
        print_json({"job_id": result.job_id, "images": files, **result.facts})
        return
    for file in files:
        print_object({**file, "steps": result.facts["steps"], "scheduler": result.facts["scheduler"]})
    for cut in result.facts["truncated"]:
        message = f"{cut['field']} has {cut['tokens']} tokens for {cut['text_encoder']}, which takes {cut['kept']}"
        click.echo(f"{message}: the rest is left out", err=True)


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    width, times, height = text.lower().partition("x")
    if not (times and width.isdecimal() and height.isdecimal() and len(text) < 20):
        raise click.BadParameter(f"{text!r} is not WIDTHxHEIGHT", param_hint="--size")
    return int(width), int(height)


def _model(client: Client, named: str | None) -> str:
    """The id of the model of that name or id, or of the only one of type sdxl."""
    known = [one for one in client.inference.models(state="loaded") if one["replaced_by"] is None]
    if named is not None:
        found = [one for one in known if named in (one["model_id"], one["name"])]
        if not found:
            raise click.BadParameter(f"no model {named!r} is loaded", param_hint="--model")
        return str(found[0]["model_id"])
    found = [one for one in known if one["model_type"] == "sdxl"]
    if not found:
        raise click.UsageError("no model of type sdxl is loaded: device-operations load-model FOLDER --type sdxl")
    if len({one["name"] for one in found}) > 1:
        names = ", ".join(sorted({one["name"] for one in found}))
        raise click.BadParameter(f"several are loaded, name one: {names}", param_hint="--model")
    return str(found[0]["model_id"])
