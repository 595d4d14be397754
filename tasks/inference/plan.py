"""Plans for models, runs and inference sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from sqlalchemy import Connection

from device_operations.errors import failure
from device_operations.jobs import Kind, new_id
from device_operations.requests.base import JobOptions
from device_operations.requests.inference import CloseSession, LoadModel, Run, UnloadModel
from device_operations.requests.pipelines import RUNS, AnyPipelineRun, PipelineRun
from device_operations.wire.json_types import FreeJson
from tasks.devices import store as device_store
from tasks.devices.directory import Directory
from tasks.inference import graphs as graph_store
from tasks.inference import models as model_store
from tasks.inference import session_store
from tasks.inference.content import content_of, load_key
from tasks.inference.pipelines import stored_run
from tasks.inference.residents import (
    allocations_of,
    check_against_model,
    check_allocations,
    find_model,
    find_session,
    no_model,
    state_inputs,
)
from tasks.inference.rows import KnownModel, SessionRow
from tasks.jobs import store as job_store
from tasks.jobs.options import asked_of
from tasks.memory.admission import reserve
from tasks.memory.named import forget_hashes
from tasks.owners import Asker, found, may_see
from tasks.planning.context import Context, new_job, new_stored_job, owner_of, place, store_tensors
from tasks.planning.earlier import Earlier
from tasks.planning.plan import Plan, Recorded

#: The types of model that can be loaded: a graph, or a pipeline (`workers.pipelines`).
MODEL_TYPES = ("onnx", *RUNS)


def plan_load(context: Context, request: LoadModel, job_id: str) -> Plan:
    """Loads a model of the owner's; its name and version mean it from the moment in which the load has ended.

    Loading the same again (name, version, content, options) on the same device gives the model that is there. Models of
    equal content and session options share a graph, those of other owners too.
    """
    if request.model_type not in MODEL_TYPES:
        raise failure(
            "validation_failed", f"model_type {request.model_type!r} is not known; there are: {', '.join(MODEL_TYPES)}"
        )
    if request.options.low_memory and request.model_type == "onnx":
        raise failure("validation_failed", "low_memory is for pipelines, and model_type is 'onnx': it is of one part")
    owner = owner_of(context, request.job)
    key, sha256, estimate = content_of(context, request)
    options = request.options.recorded()
    same = {"owner": owner, "name": request.name, "version": request.version, "load_key": load_key(key, options)}
    device = place(context, request.device_id, size_bytes=estimate, holding=_holding(context, key, same))
    device_id = device["device_id"]
    after: list[str] = []
    with context.engine.connect() as connection:
        there = model_store.same_load(connection, device_id, **same)
        if there is not None:
            # A load under way is shared, and an unload under way is waited for.
            after = job_store.open_ids_of(connection, there["model_id"])
    model_id = there["model_id"] if there else new_id()
    blob_ids = request.blob_ids()
    job = new_job(
        context, Kind.INFERENCE_LOAD_MODEL, request, job_id, device,
        payload={**request.payload(), "model_id": model_id, "estimate_bytes": estimate},
        resource_type="model", resource_id=model_id, needs=[model_id], blob_ids=blob_ids, after=after,
    )  # fmt: skip
    makes = {
        **same, "model_id": model_id, "model_type": request.model_type, "device_id": device_id, "content_key": key,
        "sha256": sha256, "source": request.source.model_dump(mode="json", exclude_none=True), "options": options,
        "pinned": request.pin, "shared": _is_shared(context, request), "load_job_id": job_id, "blob_ids": blob_ids,
        "estimate_bytes": estimate, "is_there": there is not None, "given": request.model_fields_set,
    }  # fmt: skip
    return Plan(job, together=record_loads, makes=makes)


def foresee(earlier: Earlier, made_id: str, makes: FreeJson) -> None:
    """Notes the model that an entry loads; its inputs and outputs are known once it is loaded."""
    earlier.models[made_id] = {
        "model_id": made_id, "name": makes["name"], "version": makes["version"], "model_type": makes["model_type"],
        "device_id": makes["device_id"], "state": "loading", "load_key": makes["load_key"], "owner": makes["owner"],
        "load_job_id": makes["load_job_id"], "inputs": None, "outputs": None, "error": None, "replaced_by": None,
    }  # fmt: skip


def record_loads(connection: Connection, plans: Sequence[Plan]) -> Recorded:
    """Records the models of loads in their order, and reserves the memory of graphs that are not there yet.

    Of equal loads in one submission the first answers for the others. Raises `insufficient_memory`, and `model_in_use`
    (retryable) where what a plan was made upon has changed meanwhile.
    """
    for device_id in sorted({plan.makes["device_id"] for plan in plans}):
        device_store.lock_budget(connection, device_id)
    model_store.lock(connection, {plan.makes["model_id"] for plan in plans})
    first: dict[tuple[str, ...], Plan] = {}
    answered = {}
    for plan in plans:
        model = plan.makes
        same = first.setdefault(tuple(model[key] for key in _SAME_LOAD), plan)
        if same is not plan:
            model = {**model, "model_id": same.makes["model_id"]}
            answered[plan.job.id] = same.job.id
        if not (_load_again if model["is_there"] or same is not plan else _load)(connection, model):
            raise failure("model_in_use", "the same name is being loaded at this moment; submit the request again",
                          retryable=True)  # fmt: skip
    return Recorded(answered)


#: What equal loads have in common.
_SAME_LOAD = ("device_id", "owner", "name", "version", "load_key")


def _load(connection: Connection, model: FreeJson) -> bool:
    device_id, estimate = model["device_id"], model["estimate_bytes"]
    if graph_store.join(connection, device_id, model["content_key"], estimate):
        reserve(connection, device_id, estimate, "the model")
    return model_store.insert(connection, model)


def _load_again(connection: Connection, model: FreeJson) -> bool:
    return model_store.load_again(
        connection, model["model_id"], source=model["source"], blob_ids=model["blob_ids"],
        pin=model["pinned"] if "pin" in model["given"] else None,
        shared=model["shared"] if "shared" in model["given"] else None,
    )  # fmt: skip


def _is_shared(context: Context, request: LoadModel) -> bool:
    """What the request says; else whether an admin's key loads it, and not for an owner that the admin names."""
    by_admin = context.admin and bool(context.settings.api_keys) and request.job.owner is None
    return by_admin if request.shared is None else request.shared


def _holding(context: Context, content_key: str, same: dict[str, str]) -> list[str]:
    """The devices that hold the same load; where none does, those that hold its graph."""
    models = context.directory.snapshot().models.values()
    loads = [m["device_id"] for m in models if m["replaced_by"] is None and same.items() <= m.items()]
    return loads or [model["device_id"] for model in models if model["content_key"] == content_key]


def plan_run(context: Context, request: Run | PipelineRun, job_id: str) -> Plan:
    """Runs a model where it is. A run without a session has one of its own, whose id is the job's."""
    if isinstance(request, PipelineRun):
        return plan_pipeline_run(context, request, job_id)
    owner = owner_of(context, request.job)
    session = find_session(context, request.session_id) if request.session_id else None
    model = find_model(
        context, session["model_id"] if session else request.model_id, request.model_name,
        owner=owner, in_session=session is not None,
    )  # fmt: skip
    check_against_model(model, request.inputs, request.outputs, state_inputs(session))
    if session and set(request.into or ()) & set(session["state_map"]):
        raise failure("validation_failed", "into names a state output; state stays with the session")
    allocations = allocations_of(request)
    staged = check_allocations(context, request, model["device_id"]) if allocations else {}
    inputs, blob_ids = store_tensors(context, request.inputs, owner, allocations)
    payload = request.payload()
    payload["inputs"] = {name: tensor.model_dump(mode="json", exclude_unset=True) for name, tensor in inputs.items()}
    for name, device_id in staged.items():
        payload["inputs"][name]["device_id"] = device_id
    made = plan_stored_run(
        context, request.job, job_id, model, payload, session=session, allocations=allocations, blob_ids=blob_ids,
        asked=asked_of(request),
    )  # fmt: skip
    written = {place.allocation_id for place in (request.into or {}).values()}
    # The hash of what is written into an allocation is not known.
    return replace(made, record=partial(forget_hashes, allocation_ids=written)) if written else made


def plan_pipeline_run(context: Context, request: PipelineRun, job_id: str) -> Plan:
    """Runs a pipeline where it is.

    Raises `validation_failed` where the fields are not those of the model's type, and what `stored_run` raises.
    """
    owner = owner_of(context, request.job)
    model = find_model(context, request.model_id, request.model_name, owner=owner)
    run = request.fitted(model["model_type"]) if isinstance(request, AnyPipelineRun) else request
    payload, allocations, blob_ids = stored_run(context, run, model, owner)
    return plan_stored_run(
        context, run.job, job_id, model, payload, allocations=allocations, blob_ids=blob_ids, asked=asked_of(run)
    )


def is_light(directory: Directory, asker: Asker, request: Run | PipelineRun) -> bool:
    """Whether a run names nothing but its model, and brings its tensors along. A pipeline's are decoded and stored."""
    if isinstance(request, PipelineRun):
        return False
    return (
        request.session_id is None
        and not request.into
        and all(tensor.blob_id is None and tensor.allocation_id is None for tensor in request.inputs.values())
    )


def plan_stored_run(
    context: Context,
    options: JobOptions,
    job_id: str,
    model: KnownModel,
    payload: FreeJson,
    *,
    session: SessionRow | None = None,
    allocations: tuple[str, ...] = (),
    blob_ids: list[str] | None = None,
    asked: FreeJson | None = None,
) -> Plan:
    """The plan of a run whose tensors are checked and stored; touches no database where the model is known."""
    device = context.directory.snapshot().devices.get(model["device_id"])
    if device is None:
        device = context.directory.device(model["device_id"])
    if context.device_id != device["device_id"]:
        context.directory.require_online(device)
    payload["model_id"] = model["model_id"]
    needs = [model["model_id"], *allocations]
    if session:
        needs.append(session["session_id"])
    job = new_stored_job(
        context, Kind.INFERENCE_RUN, options, job_id, device, payload,
        resource_type="inference_session", resource_id=session["session_id"] if session else job_id,
        needs=needs, blob_ids=blob_ids or [], asked=asked,
        after=[model["load_job_id"]] if model["state"] == "loading" else [],
    )  # fmt: skip
    return Plan(job, exclusive=(*allocations, session["session_id"]) if session else allocations)


def plan_unload(context: Context, request: UnloadModel, job_id: str) -> Plan:
    """Unloads a model once the runs submitted before have ended; `force` cancels them, and closes its sessions."""
    model_id = request.model_id
    with context.engine.connect() as connection:
        model: KnownModel | None = model_store.get(connection, model_id)
        if model is None and context.earlier is not None:
            model = context.earlier.model(model_id, None, None, context.owner)
        model = found(context, model, "model", model_id)
        if model["state"] not in ("loading", "loaded", "lost"):
            raise no_model(model_id, model)
        before = job_store.open_ids_needing(connection, model_id)
        if context.earlier is not None:
            before += context.earlier.job_ids_needing(model_id)
        sessions = session_store.open_sessions(connection, model_id)
    if sessions and not request.force:
        # Other owners' sessions with a shared model are counted, not named.
        known = [session["session_id"] for session in sessions if may_see(context, session)]
        named = f": {', '.join(known[:3])}{', …' if len(known) > 3 else ''}" if known else ""
        raise failure(
            "model_in_use",
            f"{len(sessions)} open sessions hold state of model {model_id}{named}; close them, or unload with "
            "force=true",
            detail={"sessions": known},
        )
    device = context.directory.device(model["device_id"])
    job = new_job(
        context, Kind.INFERENCE_UNLOAD_MODEL, request, job_id, device,
        resource_type="model", resource_id=model_id, needs=[model_id], after=before,
    )  # fmt: skip

    def cancel_runs(connection: Connection) -> None:
        job_store.request_cancel_of(connection, before, but_not_of=model_id)

    return Plan(job, record=cancel_runs if request.force and before else None)


def plan_close(context: Context, request: CloseSession, job_id: str) -> Plan:
    """Closes a session after the runs submitted before."""
    session = find_session(context, request.session_id)
    device = context.directory.device(session["device_id"])
    job = new_job(
        context, Kind.INFERENCE_CLOSE_SESSION, request, job_id, device,
        resource_type="inference_session", resource_id=session["session_id"], needs=[session["session_id"]],
    )  # fmt: skip
    return Plan(job, exclusive=(session["session_id"],))
