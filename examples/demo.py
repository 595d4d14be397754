"""The main job, end to end: a real model reads a line of text, as a job over HTTP.

Starts PostgreSQL, Valkey, the gateway, a worker for each device and Flower; loads RapidOCR's reader; draws a line of
text; submits it; polls the job; prints what the model read; stops everything.
"""

from __future__ import annotations

import base64
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
from PIL import Image, ImageDraw, ImageFont

from device_operations.settings import load
from examples.models import READER_SHA256, fetch_reader
from examples.running import stack

TEXT = "Any DirectX 12 GPU reads 42 lines"

#: The reader takes lines of this height, in pixels.
LINE_HEIGHT = 48


def main() -> None:
    """Runs the demo; exits with a message where a step fails."""
    began = time.perf_counter()
    print("fetching the model (once) …", flush=True)
    file = fetch_reader(load().model_cache_path)
    print(f"  {file.name}: {file.stat().st_size:,} bytes, sha256 {READER_SHA256[:16]}… is right")
    print("starting everything …", flush=True)
    with stack() as running, httpx.Client(base_url=running["http_url"], timeout=70) as client:
        print(f"  ready at {running['http_url']} after {time.perf_counter() - began:.1f} s")
        show_devices(client)
        load_model(client)
        job = submit(client, draw(TEXT))
        done = poll(client, job)
        scores = decode_tensor(client, next(iter(done["result"]["outputs"].values())))
        read = as_text(scores, characters(file))
        print(f"drawn: {TEXT!r}\nread:  {read!r}")
        print(f"jobs:    {running['http_url']}/api/jobs   dashboard: {running['http_url']}/")
        print(f"API:     {running['http_url']}/docs")
        print(
            f"Flower:  {running['flower_url']} (user {running['flower_user']}, password in stack.json of the data folder)"
        )
        if read.replace(" ", "") != TEXT.replace(" ", ""):
            raise SystemExit("the model read something else")


def show_devices(client: httpx.Client) -> None:
    for device in client.get("/api/devices").json()["devices"]:
        free = (device["free_bytes"] or 0) / 2**30
        print(
            f"  {device['device_id']}: {device['name']} ({device['backend']}), {free:.1f} GiB free, {device['state']}"
        )


def load_model(client: httpx.Client) -> None:
    body = {"name": "reader", "source": {"path": "reader/model.onnx"}, "sha256": READER_SHA256}
    answer = client.post("/api/inference/load-model", json=body)
    answer.raise_for_status()
    done = poll(client, answer.json())
    print(f"  the model takes {done['result']['memory_bytes'] / 2**20:.0f} MiB, provider {done['result']['provider']}")


def draw(text: str) -> np.ndarray[Any, Any]:
    """The text as the reader takes it: float32 [1, 3, 48, width], from -1 to 1."""
    font = ImageFont.truetype(str(font_file()), 34)
    width = int(font.getlength(text)) + 24
    image = Image.new("RGB", (width, LINE_HEIGHT), "white")
    ImageDraw.Draw(image).text((12, 2), text, fill="black", font=font)
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None]
    return (pixels / 255 - 0.5) / 0.5


def submit(client: httpx.Client, image: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Submits one run. The image is sent as a blob, as anything above some kilobytes should be."""
    blob = client.post("/api/blobs", content=image.astype("<f4").tobytes()).json()
    tensor = {"dtype": "float32", "shape": list(image.shape), "blob_id": blob["blob_id"]}
    answer = client.post("/api/inference/run", json={"model_name": "reader", "inputs": {"x": tensor}})
    answer.raise_for_status()
    job: dict[str, Any] = answer.json()
    print(f"submitted inference.run {job['job_id']}: {answer.status_code} {job['state']}")
    return job


def poll(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    """Polls the job's id until it has ended, printing each state that it is seen in."""
    seen = None
    while True:
        current: dict[str, Any] = client.get(f"/api/jobs/{job['job_id']}").json()
        if current["state"] != seen:
            seen = current["state"]
            print(f"  {current['kind']}: {seen} ({current['celery_state']})")
        if current["finished_at"] is not None:
            break
        time.sleep(0.02)
    if current["state"] != "succeeded":
        raise SystemExit(f"the job failed: {current['error']}")
    timings = current["timings"]
    print(f"  queued {timings['queued_ms']} ms, device {timings['device_ms']} ms, total {timings['total_ms']} ms")
    return current


def decode_tensor(client: httpx.Client, tensor: dict[str, Any]) -> np.ndarray[Any, Any]:
    """A result's tensor, wherever its elements are."""
    if "blob_id" in tensor:
        raw = client.get(f"/api/blobs/{tensor['blob_id']}").content
    elif "base64" in tensor:
        raw = base64.b64decode(tensor["base64"])
    else:
        return np.array(tensor["data"], tensor["dtype"]).reshape(tensor["shape"])
    return np.frombuffer(raw, tensor["dtype"]).reshape(tensor["shape"])


def characters(file: Path) -> list[str]:
    """The characters that the reader's classes stand for; the model carries them, class 0 means none, the last a space."""
    properties = {entry.key: entry.value for entry in onnx.load(str(file)).metadata_props}
    return ["", *properties["character"].splitlines(), " "]


def as_text(scores: np.ndarray[Any, Any], alphabet: list[str]) -> str:
    """Greedy CTC: the best class at each step [1, steps, classes], repeats joined, none dropped."""
    best = scores[0].argmax(-1)
    kept = [index for at, index in enumerate(best) if index and (at == 0 or index != best[at - 1])]
    return "".join(alphabet[index] for index in kept)


def font_file() -> Path:
    """A font that a package of ours carries."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


if __name__ == "__main__":
    main()
