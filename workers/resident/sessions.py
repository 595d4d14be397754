"""Sessions on the device: what a run is fed from the run before, and what it leaves for the next.

A session's record says what its state is made of; the state itself exists only here. A run that fails leaves
the state as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np

from device_operations.errors import failure
from device_operations.tensors import numpy_dtype
from tasks.inference import session_store
from tasks.inference.effects import SESSION_LOST
from tasks.inference.residents import ended_session
from tasks.memory import allocations
from tasks.owners import absent
from tasks.statements import Row
from workers.devices.arrays import Array
from workers.devices.onnx.tensors import Feed, Fetched, TensorSpec
from workers.operations.tensors import read_feeds
from workers.resident.residents import Resident, ResidentModel, ResidentSession
from workers.stored_tensors import InAllocation, decode_place


def begun_session(resident: Resident, model: ResidentModel, session_id: str) -> ResidentSession:
    """The session, begun from its record where this is its first run here.

    Raises `session_lost` where its state lay with an epoch that is gone, what became of it where it has ended, and
    `allocation_not_found` where an allocation that `initial` names was freed since the session was opened.
    """
    known = resident.sessions.get(session_id)
    if known is not None:
        return known
    row = resident.read(session_store.get_session, session_id)
    if row is None:
        raise failure("session_not_found", f"there is no inference session {session_id!r}")
    if row["state"] != "active":
        raise failure(*ended_session(session_id, row["state"]))
    if row["epoch"] is not None and row["state_map"]:
        raise failure("session_lost", str(SESSION_LOST["message"]))
    _check_initial(resident, row)
    begun = ResidentSession(session_id, model.model_id, dict(row["state_map"]))
    begun.state = dict(read_feeds(resident, row["initial"]))
    resident.sessions[session_id] = begun
    return begun


def _check_initial(resident: Resident, session: Row) -> None:
    """Refuses allocations that are not those which were the caller's when the session was opened.

    An id may name another allocation by now, of another owner even: one that was made since. One that stands as
    pending may be there already: its job's end is still to be recorded.
    """
    places = [decode_place(tensor) for tensor in session["initial"].values()]
    named = sorted({place.allocation_id for place in places if isinstance(place, InAllocation)})
    known = resident.read(allocations.get_many, named) if named else {}
    for allocation_id in named:
        there = known.get(allocation_id)
        if there is None or there["state"] not in ("pending", "active") or there["created_at"] > session["opened_at"]:
            raise absent("allocation", allocation_id)


def fed_by(session: ResidentSession, model: ResidentModel, given: dict[str, Feed]) -> dict[str, Feed]:
    """The state inputs that the caller did not give: from the run before, the session's beginning, or zeros."""
    sizes = _sizes(model, given)
    state: dict[str, Feed] = {}
    for spec in (*model.onnx.inputs, *model.onnx.optional_inputs):
        if spec.name in given or spec.name not in session.state_map.values():
            continue
        if spec.name in session.state:
            state[spec.name] = session.state[spec.name]
        elif not spec.optional:  # else it begins with the model's own value
            state[spec.name] = _zeros(spec, sizes)
    return state


def left_by(session: ResidentSession, outputs: Mapping[str, Fetched]) -> dict[str, Feed]:
    """The state that the session goes on with after a run that gave `outputs`."""
    # What a model keeps between runs is a tensor: the planner refuses a state of anything else.
    return {name: cast("Feed", outputs[output]) for output, name in session.state_map.items()}


def _sizes(model: ResidentModel, given: dict[str, Feed]) -> dict[str, int]:
    """The sizes of named axes, as the inputs given show them."""
    sizes: dict[str, int] = {}
    for spec in model.onnx.inputs:
        shape = getattr(given.get(spec.name), "shape", None) or ()
        sizes |= {side: size for side, size in zip(spec.shape, shape, strict=False) if isinstance(side, str)}
    return sizes


def _zeros(spec: TensorSpec, sizes: dict[str, int]) -> Array:
    shape = [side if isinstance(side, int) else sizes.get(side or "", -1) for side in spec.shape]
    if -1 in shape:
        raise failure(
            "input_mismatch",
            f"state input {spec.name!r} begins with zeros, but its shape {list(spec.shape)} is open: give it as "
            "initial when the session is opened, or among the inputs of the first run",
        )
    return np.full(shape, "", object) if spec.dtype == "string" else np.zeros(shape, numpy_dtype(spec.dtype))
