"""What running models does on the device: runs of one batch together, runs of a session, and their results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar, cast

import numpy as np
import onnxruntime as ort
import structlog

from device_operations.errors import OperationError, failure
from tasks.jobs.lifecycle import Outcome
from tasks.jobs.model import StoredRequest
from workers.devices.arrays import Array
from workers.devices.onnx.session import Over
from workers.devices.onnx.tensors import Feed
from workers.execution.claimed_job import ClaimedJob, Steps, named
from workers.execution.scheduler import Entry
from workers.operations import pipelines
from workers.operations.models import missing_model
from workers.operations.results import Took, outcome_of, serialise_now
from workers.operations.tensors import read_feeds, view
from workers.resident.residents import Resident, ResidentModel
from workers.resident.sessions import begun_session, fed_by, left_by
from workers.stored_tensors import InBase64, InTransient, decode_place

log = structlog.get_logger(__name__)

T = TypeVar("T")

Feeds = dict[str, Feed]

#: Bytes of inputs after which no further run's are read ahead.
AHEAD_BYTES = 64 << 20


def read_ahead(resident: Resident, works: Sequence[ClaimedJob]) -> None:
    """Reads what came with runs that get the device next, on another thread than the device's.

    What lies on the device, or may fail, or is more than a little to keep, is left to the run itself.
    """
    room = AHEAD_BYTES
    for work in works:
        if room <= 0:
            return
        places = [decode_place(tensor) for tensor in work.request.get("inputs", {}).values()]
        if places and all(isinstance(place, InTransient | InBase64) for place in places):
            with suppress(OperationError):
                work.feeds = _feeds(resident, work)
                room -= sum(array.nbytes for array in work.feeds.values() if isinstance(array, np.ndarray))


def join(resident: Resident, entry: Entry, request: StoredRequest) -> None:
    """Notes with which other runs a run may be joined: those of its model and shape, unless it moves a session on."""
    if request.get("session_id") or request.get("into"):
        return
    model = resident.models.get(request.get("model_id", ""))
    batch = model.batch_of_request(request) if model else None
    if model is not None and batch is not None:
        entry.batch_key, entry.batch_limit = batch
        entry.batch_delay_seconds = model.max_delay_ms / 1000


def run(resident: Resident, work: ClaimedJob) -> Outcome | Steps:
    """Runs a model once; a pipeline in steps."""
    model = resident.models.get(work.request["model_id"])
    if model is not None and pipelines.takes_steps(resident, work):
        return pipelines.run(resident, model, work)
    return run_batch(resident, [work])[0]


def run_batch(resident: Resident, works: list[ClaimedJob]) -> list[Outcome]:
    """Runs works of one batch together.

    What fails together is run alone, so that one bad input fails alone; who is cancelled leaves the others to run
    again. Raises `device_lost` only.
    """
    model = resident.models.get(works[0].request["model_id"])
    if model is None:
        missing = missing_model(resident, works[0].request["model_id"])
        return [_failed(work, missing) for work in works]
    if model.pipeline is not None:
        return pipelines.run_joined(resident, model, works)
    outcomes: dict[str, Outcome] = {}
    fed: list[tuple[ClaimedJob, Feeds]] = []
    for work in works:
        made = _guarded(resident, work, lambda work=work: _feeds(resident, work))  # type: ignore[misc]
        if isinstance(made, Outcome):
            outcomes[work.job_id] = made
        else:
            fed.append((work, made))
    while len(fed) > 1:
        try:
            outcomes |= _joined(resident, model, fed)
            fed = []
        except Exception as error:  # noqa: BLE001 - what fails together is tried alone
            known = _known(resident, error)
            stopped = [work for work, _ in fed if work.cancel.code is not None]
            outcomes |= {work.job_id: _stopped(work) for work in stopped}
            fed = [(work, feeds) for work, feeds in fed if work.cancel.code is None]
            if not stopped:
                log.info("batch failed, its jobs run alone", model=model.name, size=len(fed), error=known.message)
                break
    for work, feeds in fed:
        alone = _guarded(resident, work, lambda work=work, feeds=feeds: _alone(resident, model, work, feeds))  # type: ignore[misc]
        outcomes[work.job_id] = alone
    model.last_used = time.monotonic()
    return [outcomes[work.job_id] for work in works]


# ---- one run, or several as one


def _alone(resident: Resident, model: ResidentModel, work: ClaimedJob, feeds: Feeds) -> Outcome:
    request = work.request
    session_id = request.get("session_id")
    session = begun_session(resident, model, session_id) if session_id else None
    if session is not None:
        feeds = {**feeds, **fed_by(session, model, feeds)}
    into = {
        name: view(resident, place["allocation_id"], place.get("offset", 0))
        for name, place in (request.get("into") or {}).items()
    }
    keep = session.state_map if session else ()
    began = time.perf_counter()
    outputs = model.onnx.run(feeds, request.get("outputs"), into=into, keep=keep, cancel=work.cancel)
    took = Took(_since(began), model.onnx.graph_ms, model.onnx.staged_bytes)
    wanted = outputs
    if into or keep:
        wanted = {name: outputs[name] for name in request.get("outputs") or [spec.name for spec in model.onnx.outputs]}
        wanted |= {name: outputs[name] for name in into}
    model.device_ms = took.device_ms
    outcome = outcome_of(resident, work, wanted, 1, took, executions=1)
    if session is not None:
        # The state goes on only with a run whose result can be given.
        serialise_now(outcome)
        session.state = left_by(session, outputs)
    return outcome


def _joined(resident: Resident, model: ResidentModel, fed: Sequence[tuple[ClaimedJob, Feeds]]) -> dict[str, Outcome]:
    """One run over the rows of all works, each of which has as many."""
    feeds: Feeds = {}
    rows = 0
    for name, first in fed[0][1].items():
        assert isinstance(first, np.ndarray)
        if first.ndim:
            rows = first.shape[0]
            feeds[name] = _gathered(resident, name, cast("list[Array]", [one[name] for _, one in fed]))
        else:
            feeds[name] = first
    works = [work for work, _ in fed]
    together = _Together(works)
    began = time.perf_counter()
    outputs = model.onnx.run(feeds, works[0].request.get("outputs"), cancel=together)
    took = Took(_since(began), model.onnx.graph_ms)
    model.device_ms = took.device_ms
    for name, value in outputs.items():
        shape = np.shape(value)  # type: ignore[arg-type]
        if not shape or shape[0] != rows * len(works):
            raise failure("run_failed", f"output {name!r} has shape {list(shape)} for {rows * len(works)} rows")
    outcomes = {}
    for index, work in enumerate(works):
        own = {name: value[index * rows : (index + 1) * rows] for name, value in outputs.items()}  # type: ignore[index]
        outcomes[work.job_id] = outcome_of(resident, work, own, len(works), took, executions=int(index == 0))
    return outcomes


def _gathered(resident: Resident, name: str, arrays: list[Array]) -> Array:
    """The arrays' rows as one array: in pinned memory where the device copies fastest from there.

    Each input of a run has a place of its own: all of them are read by the same run.
    """
    first = arrays[0]
    if first.dtype.kind == "O" or resident.device.host_memory:
        joined: Array = np.concatenate(arrays)
        return joined
    shape = (sum(array.shape[0] for array in arrays), *first.shape[1:])
    size = first.dtype.itemsize * math.prod(shape)
    if len(resident.pinned.get(name, b"")) < size:
        resident.pinned[name] = resident.device.host_buffer(size)
    place = np.frombuffer(resident.pinned[name], first.dtype, math.prod(shape)).reshape(shape)
    np.concatenate(arrays, out=place)
    return place


class _Together:
    """The cancels of a batch's works as one: whichever is tripped stops the run, and the works say which."""

    def __init__(self, works: Sequence[ClaimedJob]) -> None:
        self._cancels = [work.cancel for work in works]

    def over(self, options: ort.RunOptions | ort.SessionOptions) -> Over:
        """While inside, each of the works' `trip` reaches `options`."""
        return Over(self._cancels, options)


# ---- what goes in and what comes out


def _feeds(resident: Resident, work: ClaimedJob) -> Feeds:
    work.cancel.check()
    if work.feeds is not None:
        return work.feeds
    return dict(read_feeds(resident, work.request["inputs"]))


# ---- failing


def _guarded(resident: Resident, work: ClaimedJob, step: Callable[[], T]) -> T | Outcome:
    """What `step` gives, or the outcome of a work that it failed for."""
    try:
        return step()
    except Exception as error:  # noqa: BLE001 - any failure of one run is that run's outcome
        return _failed(work, _known(resident, error))


def _failed(work: ClaimedJob, error: OperationError) -> Outcome:
    return work.failed(error, session_id=work.request.get("session_id"))


def _known(resident: Resident, error: Exception) -> OperationError:
    """The error with its code; the loss of the device affects all jobs, and is raised on."""
    known = named(error, resident.device)
    if known.code == "device_lost":
        raise known from error
    return known


def _stopped(work: ClaimedJob) -> Outcome:
    try:
        work.cancel.check()
    except OperationError as error:
        return _failed(work, error)
    raise AssertionError("the work was not stopped")


def _since(began: float) -> float:
    return (time.perf_counter() - began) * 1000
