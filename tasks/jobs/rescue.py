"""What happens to the jobs, and to what lay on the device, when their worker is gone."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from device_operations.errors import failure
from device_operations.jobs import State
from device_operations.wire.json_types import JsonObject
from tasks.devices import store as device_store
from tasks.jobs import effects, store
from tasks.jobs.lifecycle import CANCELLED, fail_needing, settle
from tasks.jobs.model import ClaimedRow, Ending, JobRow
from tasks.kinds import spec_of

#: Deaths of a worker on one job after which the job itself is suspected.
POISON_DEATHS = 3


@dataclass(frozen=True, slots=True)
class Rescue:
    """What a worker's death led to."""

    ended: list[JobRow]
    requeued: list[ClaimedRow]
    lost_allocations: list[str]
    lost_models: list[str]
    lost_sessions: list[str]


def rescue(connection: Connection, device_id: str, epoch: int, begun: Collection[str] | None = None) -> Rescue:
    """Declares lost what `device_id` held up to `epoch`, in the caller's transaction, which holds the device's lock.

    Jobs that the device had begun and that are safe to repeat go back to the queue, the others fail with
    `worker_lost`; the third death on one job makes it `poison`. What was claimed and not begun goes back as if nothing
    had happened. Jobs that need what was lost fail with its code.

    `begun` are the ids of the jobs that the device had begun, where the worker itself says so.
    """
    lost = effects.lose(connection, device_id, epoch)
    claimed = store.claimed_under(connection, device_id, epoch)
    died = _may_have_begun(claimed) if begun is None else set(begun)
    requeued, ended = _give_up(connection, device_id, claimed, died)
    for resource_ids, error in lost.failing():
        ended += fail_needing(connection, resource_ids, error)
    ended += settle(connection, ended)
    gone = {row["id"] for row in ended}
    device_store.mark_buried(connection, device_id, epoch)
    return Rescue(
        ended,
        [row for row in requeued if row["id"] not in gone],
        lost.allocations,
        lost.models,
        lost.sessions,
    )


def put_back(connection: Connection, device_id: str, epoch: int, job_ids: Collection[str]) -> Rescue | None:
    """Treats jobs claimed under a living epoch, and that its worker does not hold, as if the worker had died.

    Those of `job_ids` that are still claimed so, in the caller's transaction; None when `epoch` no longer stands. What
    the epoch holds on the device stays.
    """
    device = device_store.lock(connection, device_id)
    if device is None or device["epoch"] != epoch or device["buried"]:
        return None
    unheld = [job for job in store.claimed_under(connection, device_id, epoch) if job["id"] in job_ids]
    died = {job["id"] for job in unheld if job["state"] == State.RUNNING}
    requeued, ended = _give_up(connection, device_id, unheld, died)
    ended += settle(connection, ended)
    return Rescue(ended, requeued, [], [], [])


def _give_up(
    connection: Connection, device_id: str, claimed: Sequence[JobRow], died: Collection[str]
) -> tuple[list[ClaimedRow], list[JobRow]]:
    """Claimed jobs that no worker will end: those that went back to the queue, and those that ended.

    `died` are the ids of those that the device had begun, for which this counts as a death.
    """
    endings: list[Ending] = []
    again: list[str] = []
    for job in claimed:
        if job["id"] in died and job["deaths"] + 1 >= POISON_DEATHS:
            endings.append(Ending(job["id"], State.FAILED.value, error=_poison(job)))
        elif job["cancel_requested"]:
            endings.append(Ending(job["id"], State.CANCELLED.value, error=CANCELLED))
        elif job["id"] not in died or spec_of(job["kind"]).repeatable:
            again.append(job["id"])
        else:
            endings.append(Ending(job["id"], State.FAILED.value, error=_worker_lost(device_id)))
    requeued: list[ClaimedRow] = []
    for counts in (True, False):
        ids = [job_id for job_id in again if (job_id in died) is counts]
        requeued += store.requeue(connection, ids, died=counts) if ids else []
    return requeued, store.end_open(connection, endings) if endings else []


def _may_have_begun(claimed: Sequence[JobRow]) -> set[str]:
    """The jobs that a worker which died may have had on its device.

    `running` is recorded a little after the device began with a job that was claimed ahead. So where nothing stands as
    running, any of those that were claimed ahead may have been on the device, and killed the worker.
    """
    running = {job["id"] for job in claimed if job["state"] == State.RUNNING}
    return running or {job["id"] for job in claimed}


def _worker_lost(device_id: str) -> JsonObject:
    return failure(
        "worker_lost",
        f"The worker of {device_id} died while the job ran, and the job is not safe to repeat by itself; "
        "what it changed on the device is lost. Submit it again.",
        detail={"device_id": device_id},
    ).as_job_error()


def _poison(job: JobRow) -> JsonObject:
    return failure(
        "poison",
        f"{job['deaths'] + 1} workers died while they ran this job; it is not tried again.",
        detail={"deaths": job["deaths"] + 1},
    ).as_job_error()
