"""Opening an inference session: no job, but a record that says what its state is made of."""

from __future__ import annotations

from device_operations.errors import OperationError, failure
from device_operations.jobs import new_id
from device_operations.requests.base import JobOptions
from device_operations.requests.inference import OpenSession
from device_operations.wire.json_types import FreeJson
from tasks.inference import session_store as store
from tasks.inference.residents import find_model, require_graph, unfit
from tasks.inference.rows import KnownModel, SessionRow
from tasks.jobs.submit import Promise, keep, recall
from tasks.memory.named import check_tensors
from tasks.planning.context import Context, owner_of, store_tensors
from tasks.statements import transaction


def open_session(context: Context, request: OpenSession, promise: Promise | None = None) -> SessionRow:
    """Records a session with a model and gives its row; under a key that was used before, the session of that time.

    Raises `input_mismatch` where a state output cannot feed its input, `too_many_sessions` over the device's limit,
    `idempotency_conflict` where the key was used with another body, and what `check_tensors` raises for `initial`
    tensors in allocations.
    """
    try:
        return _open_session(context, request, promise)
    except OperationError:
        earlier = _earlier(context, promise) if promise else None
        if earlier is None:
            raise
        return earlier


def _earlier(context: Context, promise: Promise) -> SessionRow | None:
    with context.engine.connect() as connection:
        made = recall(connection, promise)
        return None if made is None else store.get_session(connection, made[0])


def _open_session(context: Context, request: OpenSession, promise: Promise | None) -> SessionRow:
    owner = owner_of(context, JobOptions(owner=request.owner))
    model = find_model(context, request.model_id, request.model_name, owner=owner)
    require_graph(model, "sessions")
    device_id = model["device_id"]
    device = context.directory.snapshot().devices.get(device_id) or context.directory.device(device_id)
    context.directory.require_online(device)
    _check_state(model, request)
    allocations, staged = check_tensors(context, request.initial, device_id, "initial {!r}")
    tensors, blob_ids = store_tensors(context, request.initial, owner, allocations)
    initial = {name: tensor.model_dump(mode="json", exclude_unset=True) for name, tensor in tensors.items()}
    for name, elsewhere in staged.items():
        initial[name]["device_id"] = elsewhere
    session_id = new_id()
    limits = context.settings.inference
    row = {
        "session_id": session_id, "model_id": model["model_id"], "device_id": device_id, "owner": owner,
        "state_map": request.state, "blob_ids": blob_ids, "timeout_seconds": limits.session_timeout_minutes * 60,
        "initial": initial,
    }  # fmt: skip
    with transaction(context.engine) as connection:
        earlier = keep(connection, promise, [session_id]) if promise else None
        if earlier is not None:
            session_id = earlier[0]
        elif not store.open_session(connection, row, limits.max_concurrent_sessions):
            raise failure(
                "too_many_sessions",
                f"{limits.max_concurrent_sessions} sessions are open on {device_id} "
                "(INFERENCE__MAX_CONCURRENT_SESSIONS); close one, or wait until an idle one expires",
                retry_after_seconds=min(60, max(1, int(limits.session_timeout_minutes * 60))),
            )
        made = store.get_session(connection, session_id)
    assert made is not None
    return made


def _check_state(model: KnownModel, request: OpenSession) -> None:
    """Refuses state that the model cannot go round with; a model that is still loading is checked by its runs."""
    fed = list(request.state.values())
    if len(set(fed)) != len(fed):
        raise failure("validation_failed", "state feeds one input from two outputs")
    if not model["inputs"]:
        return
    inputs = {spec["name"]: spec for spec in model["inputs"]}
    outputs = {spec["name"]: spec for spec in model["outputs"] or ()}
    wrong = [f"unknown output {name!r}" for name in request.state if name not in outputs]
    wrong += [f"unknown input {name!r}" for name in fed if name not in inputs]
    for output, name in request.state.items():
        if output in outputs and name in inputs:
            wrong += _unlike(outputs[output], inputs[name])
    for name, tensor in request.initial.items():
        if name in inputs:
            wrong += unfit(inputs[name], tensor, f"initial {name!r}")
    if wrong:
        raise failure(
            "input_mismatch",
            f"{'; '.join(wrong)} (model {model['name']!r})",
            detail={"errors": wrong, "inputs": model["inputs"], "outputs": model["outputs"]},
        )


def _unlike(output: FreeJson, wanted: FreeJson) -> list[str]:
    """Why an output can never feed an input: another dtype, another rank, or two numbers that differ."""
    pair = f"output {output['name']!r} cannot feed input {wanted['name']!r}"
    if output["dtype"] == "json":
        return [f"{pair}: only tensors stay with a session"]
    if output["dtype"] != wanted["dtype"]:
        return [f"{pair}: {output['dtype']} is not {wanted['dtype']}"]
    sides = list(zip(output["shape"], wanted["shape"], strict=False))
    differ = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in sides)
    if differ or len(output["shape"]) != len(wanted["shape"]):
        return [f"{pair}: {output['shape']} is not {wanted['shape']}"]
    return []
