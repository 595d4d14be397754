"""Training, end to end: a small network learns to read handwritten digits, through the API alone.

Starts everything; uploads the digits; initializes a session; trains it in one job of several epochs; measures it on
digits that it has never seen; keeps a checkpoint; checks the exported ONNX model against the trained one; draws the
loss; stops everything. Fails where fewer than 97 % of the held-out digits are read.
"""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from device_operations import Client, Job, State
from device_operations.settings import load as load_settings
from examples import digits
from examples.digits import Digits
from examples.running import stack

EPOCHS = 8
BATCH_SIZE = 32

#: The share of held-out digits that must be read.
WANTED_ACCURACY = 0.97

#: The curve in the terminal: columns, and eighths of a line's height.
CURVE_COLUMNS, CURVE_ROWS = 72, 6
BLOCKS = " ▁▂▃▄▅▆▇█"


def main() -> None:
    """Runs the demo; exits with a message where a step fails."""
    learned, held_out = digits.load()
    print(
        f"{len(learned.labels)} digits to learn from, {len(held_out.labels)} held out\nstarting everything …",
        flush=True,
    )
    # So small a network gains nothing from more threads, and on a busy machine it would wait for each of them.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with stack() as running, Client(running["http_url"], timeout=70) as client:
        print(f"  ready at {running['http_url']}")
        session_id = initialize(client)
        train(client, session_id, upload(client, learned))
        accuracy = evaluate(client, session_id, held_out)
        keep_and_validate(client, session_id, held_out)
        losses = [one["loss"] for one in client.training.status(session_id, history=100_000)["history"]]
        print("\n".join(["loss, step by step:", *curve(losses)]))
        picture = draw(losses, load_settings().data_dir / "loss.png")
        print(f"  drawn to {picture}")
        done(client, client.training.end_session(session_id))
        print(f"accuracy on held-out digits: {accuracy:.1%}")
        if accuracy < WANTED_ACCURACY:
            raise SystemExit(f"fewer than {WANTED_ACCURACY:.0%} of the held-out digits were read")


def initialize(client: Client) -> str:
    """A session on the default device."""
    model = {"kind": "layers", "layers": digits.LAYERS}
    job = client.training.initialize(
        model,
        loss="cross_entropy",
        optimizer={"type": "adamw", "learning_rate": 0.002},
        seed=1,
        more={"schedule": {"type": "cosine", "warmup_steps": 20, "total_steps": 360}},
    )
    result = done(client, job)
    print(
        f"session {result['session_id']} on {result['device_id']}: {result['parameters']:,} parameters, "
        f"{result['memory_bytes'] / 2**20:.1f} MiB"
    )
    return str(result["session_id"])


def upload(client: Client, given: Digits) -> dict[str, Any]:
    """The digits as one safetensors blob, and how to go through it."""
    blob = client.blobs.upload(save(given.as_tensors()))
    return {"blob_id": blob.blob_id, "batch_size": BATCH_SIZE}


def train(client: Client, session_id: str, dataset: dict[str, Any]) -> None:
    """Submits the epochs as one job, and polls it until it has ended."""
    job = client.training.step(session_id, sequence=1, dataset={**dataset, "epochs": EPOCHS})
    print(f"submitted training.step {job.job_id}: {EPOCHS} epochs")
    shown = 0.0
    while not (current := client.job(job.job_id)).terminal:
        told = current.progress or {}
        if told.get("total") and told["done"] / told["total"] >= shown:
            print(f"  {told['done']:>4} of {told['total']} steps, loss {told['loss']:.3f}", flush=True)
            shown = told["done"] / told["total"] + 0.2
        time.sleep(0.02)
    result = done(client, current)
    print(f"  {result['steps']} steps, {result['samples']} samples, last loss {result['last_loss']:.4f}, ", end="")
    print(f"{client.training.status(session_id)['steps_per_second']:.0f} steps/s")


def evaluate(client: Client, session_id: str, held_out: Digits) -> float:
    """The share of held-out digits that the session reads. Nothing of it changes."""
    dataset = {**upload(client, held_out), "epochs": 1, "shuffle": False}
    result = done(client, client.training.step(session_id, mode="evaluate", dataset=dataset))
    print(f"held-out digits: loss {result['loss']:.4f}, {result['accuracy']:.1%} read")
    return float(result["accuracy"])


def keep_and_validate(client: Client, session_id: str, held_out: Digits) -> None:
    """A checkpoint with the model as ONNX, and that model beside the trained one."""
    kept = done(client, client.training.checkpoint(session_id, name="digits", export=["onnx"]))
    print(f"checkpoint {kept['checkpoint_id']} at step {kept['step']}: {kept['size_bytes']:,} bytes")
    job = client.training.validate({"input": held_out.images}, held_out.labels, checkpoint_id=kept["checkpoint_id"])
    found = done(client, job)
    print(
        f"as ONNX (blob {kept['onnx_blob_id']}): {found['accuracy']:.1%} read, "
        f"at most {found['largest_difference']:.1e} from the trained model"
    )


def done(client: Client, job: Job) -> dict[str, Any]:
    """The result of a job, once it has ended; exits where it failed."""
    ended = client.wait(job)
    if ended.state is not State.SUCCEEDED:
        raise SystemExit(f"{ended.kind} failed: {ended.error}")
    return dict(ended.result or {})


def curve(losses: list[float]) -> list[str]:
    """The curve as lines of block characters, from 0 to the highest mean of a column."""
    columns = min(CURVE_COLUMNS, len(losses))
    edges = [round(index * len(losses) / columns) for index in range(columns + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in pairwise(edges)]
    top = max(means) or 1.0
    eighths = [round(mean / top * CURVE_ROWS * 8) for mean in means]
    lines = []
    for row in reversed(range(CURVE_ROWS)):
        label = f"{top * (row + 1) / CURVE_ROWS:5.2f}"
        lines.append(f"  {label} ┤" + "".join(BLOCKS[max(0, min(8, height - row * 8))] for height in eighths).rstrip())
    return lines


def draw(losses: list[float], path: Path) -> Path:
    """The curve as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, linewidth=1)
    axes.set(xlabel="step", ylabel="loss (cross entropy)", title="Handwritten digits", ylim=(0, None))
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    main()
