"""What running a pipeline does on the device: its steps, with the scheduler between them, and its result as JSON."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence

import numpy as np

from device_operations.errors import OperationError, failure
from device_operations.tensors import numpy_dtype
from device_operations.wire.json_types import JsonObject
from tasks.blobs import records as blob_store
from tasks.database import until_reachable
from tasks.jobs.lifecycle import Outcome
from workers.devices.arrays import Array, BufferView
from workers.execution.claimed_job import ClaimedJob, Detached, Steps, named
from workers.operations.tensors import feed, give, hand_over, keep
from workers.pipelines.base import Pipeline, PixelImage, Result, RunContext
from workers.resident.residents import Resident, ResidentModel
from workers.stored_tensors import InBase64, InBlob, decode_place, decode_tensor

#: Bytes of a picture's file; more are not read.
MAX_PICTURE_BYTES = 64 << 20


def run(resident: Resident, model: ResidentModel, work: ClaimedJob) -> Steps:
    """Runs a pipeline in steps. Encoding and storing what it made happens without the device."""
    pipeline = pipeline_of(model)
    device_seconds = 0.0
    steps = pipeline.run(context(resident, model, work))
    try:
        while True:
            began = time.perf_counter()
            try:
                progress = next(steps)
            except StopIteration as stop:
                made: Result = stop.value
                break
            finally:
                device_seconds += time.perf_counter() - began
            yield progress
    finally:
        steps.close()
        pipeline.parts.rest()
        model.last_used = time.monotonic()
    model.device_ms = device_seconds * 1e3
    # Nothing waits for a job's own id: what is submitted for the model goes on only after the end is recorded.
    return Detached(lambda: _outcome(resident, work, made, device_seconds * 1e3, 1), work.job_id)


def run_joined(resident: Resident, model: ResidentModel, works: Sequence[ClaimedJob]) -> list[Outcome]:
    """Runs works that take no steps, together."""
    pipeline = pipeline_of(model)
    began = time.perf_counter()
    try:
        made = pipeline.run_joined([context(resident, model, work) for work in works])
    except Exception as error:
        known = named(error, resident.device)
        if known.code == "device_lost":
            raise known from error
        if len(works) > 1:  # what fails together is tried alone
            return [outcome for work in works for outcome in run_joined(resident, model, [work])]
        return [works[0].failed(known)]
    finally:
        pipeline.parts.rest()
        model.last_used = time.monotonic()
    model.device_ms = (time.perf_counter() - began) * 1e3
    outcomes = []
    for index, (work, one) in enumerate(zip(works, made, strict=True)):
        if isinstance(one, OperationError):
            outcomes.append(work.failed(one))
        else:
            executions = int(index == 0)
            outcomes.append(_pending(resident, work, one, model.device_ms, len(works), executions=executions))
    return outcomes


def takes_steps(resident: Resident, work: ClaimedJob) -> bool:
    """Whether a run is one of a pipeline that goes in steps."""
    model = resident.models.get(work.request.get("model_id", ""))
    pipeline = model.pipeline if model is not None else None
    return model is not None and pipeline is not None and pipeline.takes_steps(work.request, model.max_batch_size)


def pipeline_of(model: ResidentModel) -> Pipeline:
    """The model's pipeline, which it must have."""
    assert model.pipeline is not None
    return model.pipeline


def context(resident: Resident, model: ResidentModel, work: ClaimedJob) -> RunContext:
    """What a run may reach: its own tensors and pictures, and the blobs of its job's owner."""

    def tensor(name: str) -> Array:
        found = feed(resident, name, decode_tensor(work.request[name]))
        if not isinstance(found, BufferView):
            return found
        flat = resident.device.read(found.buffer, found.offset, found.size_bytes)
        return np.frombuffer(flat, numpy_dtype(found.dtype or "")).reshape(found.shape or ())

    def picture(stored: Mapping[str, object]) -> bytes:
        place = decode_place(stored)
        if isinstance(place, InBase64):
            return base64.b64decode(place.text)
        assert isinstance(place, InBlob)
        blob_id = place.blob_id
        about = resident.read(blob_store.get, blob_id)
        if about is None:
            raise failure("blob_not_found", f"blob {blob_id!r} has expired since the run was submitted")
        if about["size_bytes"] > MAX_PICTURE_BYTES:
            raise failure(
                "input_mismatch", f"blob {blob_id!r} has {about['size_bytes']} bytes; a picture has {MAX_PICTURE_BYTES}"
            )
        return bytes(resident.blobs.read(blob_id, 0, None))

    def kept(data: bytes) -> str:
        # A preview waits for a database that is away, as everything of a job does.
        return until_reachable(lambda: keep(resident, data, work.row["owner"]))

    return RunContext(work.request, work.cancel, tensor, picture, kept, max_rows=model.max_batch_size)


def _pending(
    resident: Resident, work: ClaimedJob, made: Result, device_ms: float, batch_size: int, *, executions: int
) -> Outcome:
    """The outcome of a short run, whose result is serialised off the device's thread."""
    outcome = work.succeeded({}, device_ms=device_ms, batch_size=batch_size, executions=executions)
    outcome.pending = lambda: _result(resident, work, made, device_ms, batch_size)
    return outcome


def _outcome(resident: Resident, work: ClaimedJob, made: Result, device_ms: float, batch_size: int) -> Outcome:
    result = _result(resident, work, made, device_ms, batch_size)
    return work.succeeded(result, device_ms=device_ms, batch_size=batch_size, executions=1)


def _result(resident: Resident, work: ClaimedJob, made: Result, device_ms: float, batch_size: int) -> JsonObject:
    owner = work.row["owner"]
    form = work.request.get("form", "auto")
    outputs: Mapping[str, object]
    if form == "transient":  # for a request that waits: it reads the bytes and drops them
        outputs = hand_over(resident, dict(made.outputs))
    else:
        outputs = {name: give(resident, value, form, owner) for name, value in made.outputs.items()}
    result: JsonObject = {"session_id": work.job_id, "outputs": outputs}
    if made.images:
        result["images"] = [_image(resident, image, owner) for image in made.images]
    return {**result, **made.facts, "batch_size": batch_size, "device_ms": round(device_ms, 3)}


def _image(resident: Resident, image: PixelImage, owner: str) -> JsonObject:
    from workers.pipelines import images

    data = images.encode(image.pixels, image.format)
    height, width = image.pixels.shape[:2]
    return {
        "blob_id": keep(resident, data, owner),
        "media_type": f"image/{image.format}",
        "width": width,
        "height": height,
        "size_bytes": len(data),
        **image.facts,
    }
