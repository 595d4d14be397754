"""The results of runs: how long they had the device, and their outputs as JSON, serialised off the device thread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from device_operations.wire.json_types import JsonObject
from tasks.jobs.lifecycle import Outcome
from workers.devices.arrays import BufferView
from workers.devices.onnx.tensors import Fetched
from workers.execution.claimed_job import ClaimedJob
from workers.operations.tensors import give, hand_over, staged_bytes
from workers.resident.residents import Resident
from workers.stored_tensors import decode_tensor


@dataclass(slots=True)
class Took:
    """How long a run, or the batch that it was part of, had the device.

    `device_ms` counts from the moment all inputs are together on the host until all outputs are: transfers and graph.
    `graph_ms` is the graph alone by the device's own clock, if the backend measures it. `staged_bytes` went through
    the host for the sake of buffers.
    """

    device_ms: float
    graph_ms: float | None
    staged_bytes: int = 0


def outcome_of(
    resident: Resident,
    work: ClaimedJob,
    outputs: Mapping[str, Fetched],
    batch_size: int,
    took: Took,
    *,
    executions: int,
) -> Outcome:
    """The outcome of a run, whose outputs are serialised later, off the device's thread."""
    session_id = work.request.get("session_id")
    outcome = work.succeeded(
        {}, device_ms=took.device_ms, session_id=session_id, batch_size=batch_size, executions=executions
    )

    def serialise() -> JsonObject:
        result: JsonObject = {
            "session_id": session_id or work.job_id,
            "outputs": _outputs(resident, work, outputs),
            "batch_size": batch_size,
            "device_ms": round(took.device_ms, 3),
        }
        if took.graph_ms is not None:
            result["graph_ms"] = round(took.graph_ms, 3)
        staged = took.staged_bytes + staged_bytes(decode_tensor(tensor) for tensor in work.request["inputs"].values())
        if staged:
            result["staged_bytes"] = staged
        return result

    outcome.pending = serialise
    return outcome


def serialise_now(outcome: Outcome) -> None:
    assert outcome.pending is not None
    outcome.result, outcome.pending = outcome.pending(), None


def _outputs(resident: Resident, work: ClaimedJob, outputs: Mapping[str, Fetched]) -> JsonObject:
    form = work.request.get("form", "auto")
    if form == "transient":
        return dict(hand_over(resident, outputs))
    wanted: JsonObject = {}
    for name, value in outputs.items():
        if isinstance(value, BufferView):
            place = work.request["into"][name]
            wanted[name] = {
                "dtype": value.dtype,
                "shape": list(value.shape or ()),
                "allocation_id": place["allocation_id"],
                "offset": place.get("offset", 0),
            }
        else:
            wanted[name] = give(resident, value, form, work.row["owner"])
    return wanted
