"""Which training session and which checkpoint a request names, and what became of those that are gone."""

from __future__ import annotations

from sqlalchemy import Connection

from device_operations.errors import failure
from device_operations.wire.json_types import FreeJson
from tasks.devices.rows import DeviceRow
from tasks.owners import absent, found
from tasks.planning.context import Context
from tasks.training import checkpoints as checkpoint_store
from tasks.training import sessions as store
from tasks.training.rows import CheckpointRow, EndedSession, KnownSession, SessionPlace


def find_session(context: Context, session_id: str) -> KnownSession:
    """The open session of that id, if it is the caller's: else `session_not_found`, or what became of it."""
    session = session_of(context, session_id)
    if session["state"] not in store.OPEN:
        raise failure(*gone(session))
    return session


def check_open(connection: Connection, session_id: str) -> None:
    """Raises what became of the session where it is not open any more, in the transaction that records a job on it."""
    session = store.standing(connection, session_id)
    if session is None:
        raise absent("training session", session_id)
    if session["state"] not in store.OPEN:
        raise failure(*gone(session))


def gone(session: EndedSession) -> tuple[str, str]:
    """The code and message for a session that is not open any more."""
    session_id, state, why = session["session_id"], session["state"], (session["error"] or {}).get("message", "")
    if state == "lost":
        return "session_lost", f"training session {session_id} is lost: {why}"
    remedy = "resume a checkpoint of it in a new one (resume_from), or initialize anew"
    outline = f"training session {session_id} is {state}" + (f": {why}" if why else "")
    return "session_closed", f"{outline}; {remedy}"


def find_checkpoint(context: Context, checkpoint_id: str) -> CheckpointRow:
    """The recorded checkpoint of that id, if it is the caller's; else `checkpoint_not_found`."""
    with context.engine.connect() as connection:
        row = checkpoint_store.get(connection, checkpoint_id)
    return found(context, row, "checkpoint", checkpoint_id)


def known_session(context: Context, session_id: str) -> SessionPlace:
    """What never changes of a session that is the caller's, mostly without a read: a step costs one less."""
    row = context.directory.training_session(session_id, context)
    return found(context, row, "training session", session_id)


def session_of(context: Context, session_id: str) -> KnownSession:
    """The record of a session that is the caller's, open or ended, or made by an earlier entry of the submission."""
    if context.earlier is not None and session_id in context.earlier.training_sessions:
        return context.earlier.training_sessions[session_id]
    with context.engine.connect() as connection:
        row = store.get(connection, session_id)
    return found(context, row, "training session", session_id)


def device_of(context: Context, session: SessionPlace) -> DeviceRow:
    """The device of a session, which must take jobs unless it plans for itself."""
    device_id = session["device_id"]
    device = context.directory.snapshot().devices.get(device_id) or context.directory.device(device_id)
    if context.device_id != device_id:
        context.directory.require_online(device)
    return device


def resumed_from(context: Context, checkpoint_id: str) -> tuple[FreeJson, int, int]:
    """What a session starts from, with the sequence and step there; one that is being made names its job."""
    with context.engine.connect() as connection:
        # In this order: a job that ends between the two reads has made its checkpoint by the second.
        making = checkpoint_store.being_made(connection, checkpoint_id)
        kept = checkpoint_store.get(connection, checkpoint_id)
    if kept is None:
        making = found(context, making, "checkpoint", checkpoint_id)
        request = making["request"]
        begun = {"checkpoint_id": checkpoint_id, "blob_id": None, "sha256": None, "job_id": making["id"],
                 "session_id": request["session_id"]}  # fmt: skip
        return begun, request["at_sequence"], request["at_step"]
    kept = found(context, kept, "checkpoint", checkpoint_id)
    resumed = {"checkpoint_id": checkpoint_id, "session_id": kept["session_id"], "blob_id": kept["blob_id"],
               "sha256": kept["sha256"]}  # fmt: skip
    return resumed, kept["sequence"], kept["step"]
