"""Which loaded model, which session and which allocations a run is for, and whether the run fits them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from device_operations.errors import OperationError, failure
from device_operations.requests.inference import Run
from device_operations.requests.pipelines import RUNS, PipelineRun
from device_operations.tensors import carries
from device_operations.wire.json_types import FreeJson
from tasks.devices.directory import DirectorySnapshot
from tasks.inference import models as model_store
from tasks.inference import session_store
from tasks.inference.rows import KnownModel, ModelRow, SessionRow
from tasks.memory.named import Range, ranges_of
from tasks.memory.named import check_allocations as find_ranges
from tasks.owners import absent, found
from tasks.planning.context import Context

#: How old what is known of a model may be while it loads, in seconds.
LOADING_SECONDS = 0.05


class Shaped(Protocol):
    """What a tensor says of itself before its elements are read."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> list[int]: ...


def find_model(
    context: Context,
    model_id: str | None,
    name: str | None,
    version: str | None = None,
    *,
    owner: str | None = None,
    in_session: bool = False,
) -> KnownModel:
    """The model to run: by id, or what the name stands for: on a device that is online, has it loaded, and the shortest
    queue.

    On behalf of `owner`, where an admin says so: its models come first. A model that was replaced is run by the
    sessions that it has (`in_session`), and by nothing else any more. Raises `model_not_found`.
    """
    if context.earlier is not None:
        made = context.earlier.model(model_id, name, version, owner or context.owner)
        if made is not None:
            return made
    if model_id is not None:
        return _model_of_id(context, model_id, in_session=in_session)
    assert name is not None
    asker = context if owner in (None, context.owner) else replace(context, owner=str(owner))
    meant = context.directory.meant(asker, name, version)
    if not meant:
        raise nothing_named(name, version)
    if context.device_id is not None:
        meant = [model for model in meant if model["device_id"] == context.device_id] or meant
    if len(meant) == 1:
        return meant[0]
    snapshot = context.directory.snapshot()
    return min(meant, key=lambda model: _readiness(model, snapshot))


def _model_of_id(context: Context, model_id: str, *, in_session: bool) -> ModelRow:
    model = context.directory.model(context, model_id)
    if model is None:
        with context.engine.connect() as connection:
            gone = model_store.get(connection, model_id)
        raise no_model(model_id, found(context, gone, "model", model_id, shared=True))
    if model["replaced_by"] is not None and not in_session:
        raise no_model(model_id, model)
    if model["state"] == "loading":
        # By now it may be there, with inputs to be held to: a run that does not fit is refused, not failed later.
        return context.directory.snapshot(LOADING_SECONDS).models.get(model_id, model)
    return model


def nothing_named(name: str, version: str | None) -> OperationError:
    """The error for a name, or a version of it, that stands for nothing that the caller can run."""
    which = f"{name!r}" if version is None else f"{name!r}, version {version!r},"
    return failure("model_not_found", f"no model named {which} is loaded; load it with POST /api/inference/load-model")


def no_model(model_id: str, gone: KnownModel | None) -> OperationError:
    """Why a model cannot be run: it was never there, failed to load, was replaced, or has left its device."""
    if gone is None:
        return absent("model", model_id)
    error = gone["error"]
    if gone["state"] == "failed" and error:
        return failure(
            "model_not_found", f"model {model_id} failed to load: {error['message']}", detail={"error": error}
        )
    if gone["replaced_by"] is not None:
        return failure(
            "model_not_found",
            f"model {model_id} was replaced: {gone['name']!r}, version {gone['version']!r}, was loaded again and is "
            f"{gone['replaced_by']} now; run it by its name",
        )
    return failure("model_not_found", f"model {model_id} is {gone['state']}; load it again")


def find_session(context: Context, session_id: str) -> SessionRow:
    """The open session of that id, if it is the caller's: else `session_not_found`, or what became of it."""
    with context.engine.connect() as connection:
        session = found(context, session_store.get_session(connection, session_id), "inference session", session_id)
    if session["state"] != "active":
        raise failure(*ended_session(session_id, session["state"]))
    return session


def ended_session(session_id: str, state: str) -> tuple[str, str]:
    """The code and message for a session that is not open any more."""
    code = {"expired": "session_expired", "lost": "session_lost"}.get(state, "session_closed")
    why = {"expired": "it was idle too long", "lost": "its worker died and its state with it"}.get(state, "")
    return code, f"session {session_id} is {state}{': ' + why if why else ''}; open a new one"


def state_inputs(session: SessionRow | None) -> set[str]:
    """The inputs that the session itself feeds."""
    return set(session["state_map"].values()) if session else set()


def check_against_model(
    model: KnownModel, inputs: Mapping[str, Shaped], outputs: Sequence[str] | None, fed: Collection[str] = ()
) -> None:
    """Refuses names, dtypes and shapes that the loaded model does not take, with all that is wrong at once."""
    require_graph(model, "runs with inputs")
    if not model["inputs"]:
        return
    specs = {spec["name"]: spec for spec in model["inputs"]}
    wrong = [f"unknown input {name!r}" for name in inputs if name not in specs]
    wrong += [
        f"missing input {name!r}"
        for name, spec in specs.items()
        if name not in inputs and name not in fed and not spec.get("optional")
    ]
    for name, tensor in inputs.items():
        if name in specs:
            wrong += unfit(specs[name], tensor, f"input {name!r}")
    known = {spec["name"] for spec in model["outputs"] or ()}
    wrong += [f"unknown output {name!r}" for name in outputs or () if name not in known]
    if wrong:
        takes = [{key: spec[key] for key in ("name", "dtype", "shape")} for spec in model["inputs"]]
        raise failure(
            "input_mismatch",
            f"{'; '.join(wrong)} (model {model['name']!r})",
            detail={"errors": wrong, "inputs": takes, "outputs": sorted(known)},
        )


def require_graph(model: KnownModel, what: str) -> None:
    """Refuses `what` of a pipeline, which has no inputs and outputs of its own. Raises `validation_failed`."""
    if model["model_type"] in RUNS:
        fields = RUNS[model["model_type"]].model_fields
        takes = ", ".join(name for name in fields if name not in PipelineRun.model_fields)
        raise failure(
            "validation_failed",
            f"model {model['name']!r} is of type {model['model_type']!r}, which has no {what}: its runs "
            f"(POST /api/inference/run) give {takes}",
        )


def unfit(spec: FreeJson, tensor: Shaped, what: str) -> list[str]:
    """What is wrong with a tensor for one of a model's inputs."""
    wrong = []
    if tensor.dtype != spec["dtype"] and not carries(tensor.dtype, spec["dtype"]):
        wrong.append(f"{what} is {tensor.dtype}, the model takes {spec['dtype']}")
    wanted = spec["shape"]
    fits = len(wanted) == len(tensor.shape) and all(
        not isinstance(side, int) or side == given for side, given in zip(wanted, tensor.shape, strict=True)
    )
    if not fits:
        wrong.append(f"{what} has shape {tensor.shape}, the model takes {wanted}")
    return wrong


def allocations_of(request: Run) -> tuple[str, ...]:
    """The allocations that a run reads or writes, in order of id."""
    named = {tensor.allocation_id for tensor in request.inputs.values() if tensor.allocation_id}
    return tuple(sorted(named | {into.allocation_id for into in (request.into or {}).values()}))


def check_allocations(context: Context, request: Run, device_id: str) -> dict[str, str]:
    """Refuses allocations that are not the caller's, are gone, or end before the tensor does.

    Gives the inputs that lie on another device than the model, by name, with that device: they are staged. An output
    cannot be written to another device.
    """
    ranges = ranges_of(request.inputs)
    places = [Range(place.allocation_id, place.offset, 1) for place in (request.into or {}).values()]
    known = find_ranges(context, [*ranges.values(), *places])
    for place in places:
        there = known[place.allocation_id]["device_id"]
        if there != device_id:
            raise failure(
                "validation_failed",
                f"into names allocation {place.allocation_id} on {there}, and the model is on {device_id}; write the "
                f"output into an allocation on {device_id} and copy it (POST /api/memory/copy)",
            )
    lying = {name: known[one.allocation_id]["device_id"] for name, one in ranges.items()}
    return {name: there for name, there in lying.items() if there != device_id}


def _readiness(model: ModelRow, snapshot: DirectorySnapshot) -> tuple[bool, bool, int, float]:
    device = snapshot.devices.get(model["device_id"])
    return (
        device is None or device["state"] != "online",
        model["state"] != "loaded",
        snapshot.load_of(model["device_id"]),
        -model["named_at"].timestamp(),
    )
