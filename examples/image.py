"""From a prompt to a PNG: a pipeline like Stable Diffusion XL in the small, whose weights are random.

Makes the pipeline on the spot (nothing is downloaded), starts everything, loads it, submits a prompt, follows the
steps with the time left, and writes the image. Since the weights are random, the image shows nothing: it shows the way.
`SDXL=/path` takes a real one instead: a folder as diffusers and Optimum export it to ONNX.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from device_operations.client import Client
from device_operations.jobs import Job
from device_operations.settings import load
from examples.running import stack

PROMPT = "an astronaut riding a green horse"


def main() -> None:
    """Runs the demo; exits with a message where a step fails."""
    real = os.environ.get("SDXL")
    folder = Path(real).resolve() if real else make_tiny(load().data_dir / "demo-image" / "tiny-sdxl")
    if not folder.is_dir():
        raise SystemExit(f"SDXL={real}: there is no such folder")
    print("starting everything …", flush=True)
    with stack(MODEL_CACHE_PATH=folder.parent) as running, Client(running["http_url"]) as client:
        print(f"  ready at {running['http_url']}")
        load_pipeline(client, folder.name)
        options: dict[str, Any] = {"seed": 42, "preview_every": 5}
        if not real:
            options |= {"width": 128, "height": 128, "steps": 20}
        began = time.perf_counter()
        job = client.images.submit(PROMPT, model_name="demo", options=options)
        print(f"submitted {job.job_id}: {PROMPT!r}")
        follow(client, job)
        result = client.images.result(job)
        (image,) = result.images
        file = image.save(Path("demo-image.png").resolve())
        print(
            f"{file}: {image.width}x{image.height}, seed {image.seed}, {result.facts['steps']} steps of "
            f"{result.facts['scheduler']}, {time.perf_counter() - began:.1f} s"
        )
        if not real:
            print("The weights are random, so it is a picture of noise. SDXL=/path make demo-image takes real ones.")


def make_tiny(folder: Path) -> Path:
    """A pipeline of SDXL's parts with a few thousand random weights each, exported to ONNX; kept for the next time."""
    if (folder / "model_index.json").is_file():
        print(f"the tiny pipeline with random weights is there: {folder}")
        return folder
    print("making a tiny pipeline with random weights (once) …", flush=True)
    from diffusers import EulerDiscreteScheduler

    from tests.support.pipelines import export_sdxl, tiny_sdxl

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    export_sdxl(tiny_sdxl(), folder, scheduler)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"  {folder}: {size / 2**20:.1f} MiB")
    return folder


def load_pipeline(client: Client, path: str) -> None:
    """Loads the folder and prints what each part takes."""
    job = client.inference.load_model("demo", path, model_type="sdxl")
    result = client.result(client.wait(job))
    for part in result["parts"]:
        print(f"  {part['name']}: {part['memory_bytes'] / 2**20:.1f} MiB, {part['dtype']}, {part['load_ms']:.0f} ms")
    print(f"  loaded on {result['device_id']}, provider {result['provider']}")


def follow(client: Client, job: Job) -> None:
    """Prints the steps as they come, and where the previews are."""
    for event in client.events(job):
        if event.name == "progress" and "done" in event.data:
            told = event.data
            preview = f"   preview: GET /api/blobs/{told['preview']['blob_id']}" if "preview" in told else ""
            print(f"  step {told['done']} of {told['total']}, {told['seconds_left']:.1f} s left{preview}", flush=True)


if __name__ == "__main__":
    main()
