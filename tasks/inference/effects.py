"""What ended jobs do to models, their reservations, and inference sessions."""

from __future__ import annotations

from collections.abc import Collection
from itertools import groupby

from sqlalchemy import Connection

from device_operations.errors import error_of, failure
from device_operations.jobs import State
from device_operations.settings import load
from device_operations.wire.json_types import JsonObject
from tasks.devices import store as devices
from tasks.inference import graphs, models, session_store
from tasks.inference.facts import LoadFacts, ModelFacts, RunFacts, UnloadFacts
from tasks.jobs.model import Fallen, JobRow, resource_of

#: The error of jobs that need a session whose state died with its worker.
SESSION_LOST = failure(
    "session_lost", "The session's state was lost with its worker; open a new session."
).as_job_error()


#: The error of jobs that were submitted for a session after what closed it.
SESSION_CLOSED = failure(
    "session_closed", "The session was closed by a job submitted before; open a new session."
).as_job_error()


def loaded(connection: Connection, job: JobRow, facts: LoadFacts, epoch: int | None) -> Fallen:
    """An `inference.load_model` ended: the model is loaded as measured, or failed and its reservation given back."""
    model_id = resource_of(job)
    if job["state"] == State.SUCCEEDED:
        if "model" not in facts:
            return []  # the same content was there already
        assert epoch is not None
        settled(connection, model_id, epoch, facts["model"])
        return []
    error = error_of(job["error"], job["state"], "The load")
    row = models.get(connection, model_id)
    if row is None or row["load_job_id"] != job["id"]:
        return []
    return _end_models(connection, [model_id], "failed", ("loading",), error=error)


def settled(connection: Connection, model_id: str, epoch: int, facts: ModelFacts) -> None:
    """A model is on its device: what was estimated for its graph becomes what was measured, and its name means it.

    What the name and version meant before is replaced: it takes no new runs, and its worker lets it go once it is idle.
    """
    model = models.get(connection, model_id)
    if model is None:
        return
    devices.lock_budget(connection, model["device_id"])
    models.lock_namesakes(connection, model)
    if not models.settle(connection, model_id, epoch, facts):
        return
    models.replace_namesakes(connection, model["owner"], model["name"], model["version"])
    more = graphs.settle(connection, model["device_id"], model["content_key"], facts["memory_bytes"])
    devices.adjust_reservation(connection, model["device_id"], more)


def lost(connection: Connection, model_id: str, error: JsonObject) -> None:
    """A model could not be brought back by a new epoch."""
    _end_models(connection, [model_id], "failed", ("lost",), error=error)


def unloaded(connection: Connection, job: JobRow, facts: UnloadFacts, epoch: int | None) -> Fallen:
    """An `inference.unload_model` ended: its graph's reservation is free unless shared; its sessions are closed."""
    if job["state"] != State.SUCCEEDED:
        return []
    model_id = job["needs"][0]
    _end_models(connection, [model_id], "unloaded", ("loaded", "lost"), freed_bytes=facts.get("freed_bytes"))
    still_open = [session["session_id"] for session in session_store.open_sessions(connection, model_id)]
    gone = session_store.end_sessions(connection, still_open, "closed")
    return [(session_id, SESSION_CLOSED) for session_id in gone]


def let_go(connection: Connection, model_ids: Collection[str], state: str) -> None:
    """A worker takes idle models off its device: `evicted` for room, or `unloaded` (idle for long, or replaced)."""
    _end_models(connection, model_ids, state, ("loaded", "lost"))


def ran(connection: Connection, job: JobRow, facts: RunFacts, epoch: int | None) -> Fallen:
    """An `inference.run` of a session ended: the session counts it."""
    session_id = facts.get("session_id") or session_of(job)
    if session_id is None:
        return []
    won = job["state"] == State.SUCCEEDED
    session_store.use_session(
        connection, session_id, job["id"], epoch if won else None, succeeded=int(won), failed=int(not won),
        timeout_seconds=load().inference.session_timeout_minutes * 60,
    )  # fmt: skip
    return []


def closed(connection: Connection, job: JobRow, facts: object, epoch: int | None) -> Fallen:
    """An `inference.close_session` ended: what was submitted for the session after it fails."""
    if job["state"] != State.SUCCEEDED:
        return []
    gone = session_store.end_sessions(connection, [job["needs"][0]], "closed")
    return [(session_id, SESSION_CLOSED) for session_id in gone]


def session_of(job: JobRow) -> str | None:
    """The inference session that a run belongs to; None for a run alone, whose session is only its job's id."""
    return job["resource_id"] if job["resource_id"] != job["id"] else None


def lose_models(connection: Connection, device_id: str) -> list[str]:
    """A worker died: its models are lost until the next epoch brings them back; they keep their reservations."""
    devices.lock_budget(connection, device_id)
    return [row["model_id"] for row in models.lose(connection, device_id)]


def lose_sessions(connection: Connection, device_id: str, epoch: int) -> list[str]:
    """A worker died: sessions whose state tensors lay on the device are lost."""
    return session_store.end_sessions(connection, session_store.stateful_sessions(connection, device_id, epoch), "lost")


def _end_models(
    connection: Connection,
    model_ids: Collection[str],
    state: str,
    leaving: tuple[str, ...],
    *,
    error: JsonObject | None = None,
    freed_bytes: int | None = None,
) -> Fallen:
    for device_id in models.devices_of(connection, model_ids):
        devices.lock_budget(connection, device_id)
    gone = models.end(connection, model_ids, state, leaving=leaving, error=error, freed_bytes=freed_bytes)
    gone.sort(key=lambda model: str(model["device_id"]))
    for device_id, left in groupby(gone, key=lambda model: str(model["device_id"])):
        freed = graphs.leave(connection, device_id, [model["content_key"] for model in left])
        devices.adjust_reservation(connection, device_id, -freed)
    return [(model["model_id"], error) for model in gone] if error else []
