"""The life of a job after its submission: claimed, ended, retried, requeued, or buried with its worker.

    claim ─▶ (the device works, no transaction open) ─▶ finish ─▶ announce
                                                     └▶ retry
    end, rescue, put_back: what is done to jobs that no worker will end

Whoever ends a job runs its kind's effects (`tasks.jobs.effects`) in the same transaction, so a failed allocation gives
its reservation back whether a worker, a cancellation or a death ended it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import structlog
from sqlalchemy import Connection, Engine

from device_operations.errors import OperationError, failure
from device_operations.jobs import CLAIMABLE, TERMINAL, State
from tasks.database import dumps
from tasks.devices import store as device_store
from tasks.jobs import effects, store
from tasks.jobs import lost_ends as ends
from tasks.jobs.effects import Fallen
from tasks.jobs.store import Ending
from tasks.jobs.unflushed import Unflushed
from tasks.kinds import spec_of
from tasks.redis.publish import Publisher
from tasks.statements import Row, transaction

log = structlog.get_logger(__name__)

_CLAIMABLE = tuple(sorted(CLAIMABLE))

#: Deaths of a worker on one job after which the job itself is suspected.
POISON_DEATHS = 3


@dataclass(slots=True)
class Outcome:
    """What came of a job on a device. `facts` are for the kind's effects: measured sizes, shapes, hashes."""

    job_id: str
    state: State
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    device_ms: float | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    #: Where making the result takes time that the device need not wait for: called once, before the end is recorded.
    pending: Callable[[], dict[str, Any]] | None = None

    def ending(self, claimed: Row) -> Ending:
        """The same, as the store records it; `claimed` is the job's row as the worker has it."""
        device_ms = None if self.device_ms is None else round(self.device_ms, 3)
        # Only who claimed ahead of the device knows when that began.
        started_at = claimed["started_at"] if "claimed_at" in claimed else None
        return Ending(self.job_id, self.state.value, self.result, self.error, device_ms, started_at)


def finish(
    engine: Engine,
    outcomes: Sequence[Outcome],
    claimed: Mapping[str, Row],
    epoch: int,
    unflushed: Unflushed | None = None,
) -> list[Row]:
    """Ends jobs that ran under `epoch`, and everything that falls with them. Gives all rows that ended.

    `claimed` are the jobs' rows as they were claimed. A job that is not among the rows had been ended by someone else:
    its outcome is dropped (but see `recover`). Kinds without effects take one statement in autocommit, which does not
    wait for the disk where they leave nothing behind and `unflushed` keeps their ends meanwhile.
    """
    specs = {job_id: spec_of(row["kind"]) for job_id, row in claimed.items()}
    if not any(specs[outcome.job_id].changes_records(outcome.facts) for outcome in outcomes):
        endings = _endings(outcomes, claimed)
        if unflushed is not None and all(leaves_nothing(row["kind"], row["needs"]) for row in claimed.values()):
            rows = unflushed.end(endings, epoch, claimed)
        else:
            with engine.connect() as connection:
                rows = store.end_running(connection, endings, epoch, claimed)
        return rows + _end_successors(engine, rows)
    alone = [outcome for outcome in outcomes if specs[outcome.job_id].ends_at_once(outcome.facts)]
    if alone:
        rest = [outcome for outcome in outcomes if outcome not in alone]
        return _finish_each(engine, alone, claimed, epoch) + (finish(engine, rest, claimed, epoch) if rest else [])
    with transaction(engine) as connection:
        rows = store.end_running(connection, _endings(outcomes, claimed), epoch, claimed)
        facts = {outcome.job_id: outcome.facts for outcome in outcomes}
        return rows + settle(connection, rows, facts, epoch)


def recover(engine: Engine, outcomes: Sequence[Outcome], claimed: Mapping[str, Row], epoch: int) -> list[Row]:
    """The rows of jobs that `finish` did not find running, and that ended as `outcomes` say all the same.

    Either an earlier try was carried out although its connection broke before it said so; or PostgreSQL crashed and
    lost the claim, which had not waited for the disk, and perhaps the job's submission with it: then the end is
    recorded from there. What a worker's death put back, or somebody else ended, is not among them.
    """
    with engine.connect() as connection:
        found = store.get_many(connection, [outcome.job_id for outcome in outcomes])
    recorded: list[Row] = []
    unclaimed: list[Row] = []
    for outcome in outcomes:
        before, now = claimed[outcome.job_id], found.get(outcome.job_id)
        if now is not None and now["state"] in TERMINAL:
            if (now["state"], now["epoch"], now["attempt"]) == (outcome.state, epoch, before["attempt"]):
                recorded.append(now)
        elif leaves_nothing(before["kind"], before["needs"]):
            unclaimed.append(
                {
                    **before, "state": outcome.state.value, "result": outcome.result, "error": outcome.error,
                    "device_ms": outcome.device_ms, "finished_at": None,
                }
            )  # fmt: skip
    if unclaimed:
        with engine.connect() as connection:
            again = ends.record_unclaimed(connection, dumps(unclaimed))
        if again:
            log.warning("PostgreSQL had lost the claims of jobs that ended; they are recorded", jobs=len(again))
        recorded += again
    return recorded


def _endings(outcomes: Sequence[Outcome], claimed: Mapping[str, Row]) -> list[Ending]:
    return [outcome.ending(claimed[outcome.job_id]) for outcome in outcomes]


def leaves_nothing(kind: str, needs: Sequence[str]) -> bool:
    """Whether such a job changes nothing but its own record, so that it may be run again whatever came after it.

    A run that needs more than its model writes into an allocation, reads one, or moves a session on.
    """
    return len(needs) == 1 and spec_of(kind).leaves_nothing


def _finish_each(engine: Engine, outcomes: Sequence[Outcome], claimed: Mapping[str, Row], epoch: int) -> list[Row]:
    """Ends jobs whose kind has one statement for all of it. One that is refused has failed, and changed nothing.

    Those of one resource that waited together commit together, so that a slow disk does not slow them; each alone
    where one is refused. Not those of several: who submits to these locks their rows in an order of its own.
    """
    rows = []
    for _, together in groupby(outcomes, key=lambda outcome: claimed[outcome.job_id]["resource_id"]):
        waiting = list(together)
        if len(waiting) > 1:
            with suppress(OperationError), transaction(engine) as connection:
                rows += [row for outcome in waiting for row in _end_alone(connection, outcome, claimed, epoch)]
                waiting = []
        for outcome in waiting:
            try:
                with engine.connect() as connection:
                    rows += _end_alone(connection, outcome, claimed, epoch)
            except OperationError as error:
                log.error("an outcome was refused", job_id=outcome.job_id, error=error.message)
                refused = Outcome(outcome.job_id, State.FAILED, error=error.as_job_error())
                rows += finish(engine, [refused], claimed, epoch)
    return rows + _end_successors(engine, rows)


def _end_alone(connection: Connection, outcome: Outcome, claimed: Mapping[str, Row], epoch: int) -> list[Row]:
    row = claimed[outcome.job_id]
    end = spec_of(row["kind"]).ends_at_once(outcome.facts)
    assert end is not None
    return end(connection, outcome.ending(row), outcome.facts, epoch)


def settle(
    connection: Connection,
    rows: Sequence[Row],
    facts: dict[str, dict[str, Any]] | None = None,
    epoch: int | None = None,
) -> list[Row]:
    """Runs the effects of jobs that have just ended, and ends those that cannot do without them; gives the latter."""
    fallen: list[Row] = []
    ended = list(rows)
    while ended:
        lost = _apply_effects(connection, ended, facts or {}, epoch)
        ended = cancel_successors(connection, ended)
        for error, together in groupby(lost, key=lambda one: one[1]):
            ended += fail_needing(connection, [resource_id for resource_id, _ in together], error)
        fallen += ended
    return fallen


def _apply_effects(
    connection: Connection, jobs: Sequence[Row], facts: dict[str, dict[str, Any]], epoch: int | None
) -> Fallen:
    """Runs the effects of jobs that have just ended, with what the worker found out about each."""
    fallen: Fallen = []
    by_kind: dict[str, list[Row]] = {}
    for job in jobs:
        by_kind.setdefault(job["kind"], []).append(job)
    for kind, ended in by_kind.items():
        spec = spec_of(kind)
        if spec.joint_effect is not None:
            fallen += spec.joint_effect(connection, ended, facts, epoch)
        elif spec.effect is not None:
            for job in ended:
                fallen += spec.effect(connection, job, facts.get(job["id"], {}), epoch)
    return fallen


def cancel_successors(connection: Connection, rows: Sequence[Row]) -> list[Row]:
    """Cancels what requires those of `rows` to succeed that ended otherwise. Effects, and their own, are the caller's.

    A worker that dies before it comes to this leaves it to the claim, which refuses such a job.
    """
    failed = {row["id"]: row for row in rows if row["state"] != State.SUCCEEDED}
    if not failed:
        return []
    endings = []
    for job in store.open_requiring(connection, list(failed)):
        before = next(failed[job_id] for job_id in job["requires"] if job_id in failed)
        endings.append(Ending(job["id"], State.CANCELLED.value, error=predecessor_failed(before)))
    return store.end_open(connection, endings, sorted(CLAIMABLE)) if endings else []


def _end_successors(engine: Engine, rows: Sequence[Row]) -> list[Row]:
    """The same where the ends of `rows` are recorded already, with all that falls then."""
    if all(row["state"] == State.SUCCEEDED for row in rows):
        return []
    with transaction(engine) as connection:
        cancelled = cancel_successors(connection, rows)
        return cancelled + settle(connection, cancelled)


def fail_needing(connection: Connection, resource_ids: Sequence[str], error: dict[str, Any]) -> list[Row]:
    """Fails jobs that have not started and need any of the resources, with `error`. Effects are the caller's."""
    waiting = store.open_needing(connection, resource_ids)
    endings = [
        Ending(job["id"], State.FAILED.value, error=error) for job in waiting if not spec_of(job["kind"]).takes_away
    ]
    return store.end_open(connection, endings) if endings else []


def end(engine: Engine, endings: Sequence[Ending], leaving: Sequence[State]) -> list[Row]:
    """Ends jobs from the states `leaving`, with their effects, and gives every row that ended."""
    with transaction(engine) as connection:
        rows = store.end_open(connection, endings, leaving)
        return rows + settle(connection, rows)


def cancel(engine: Engine, publisher: Publisher, job_ids: Collection[str]) -> list[Row]:
    """Cancels those of `job_ids` that wait, and asks the workers of those that are claimed. Gives the open ones' rows.

    What a worker has claimed ahead of its device is the worker's to end: it alone knows that it will not begin it.
    """
    with engine.connect() as connection:
        rows = store.request_cancel(connection, job_ids)
    waiting = [row for row in rows if row["state"] in CLAIMABLE and not store.is_claimed(row)]
    ended: list[Row] = []
    if waiting:
        ended = end(engine, [Ending(row["id"], State.CANCELLED.value, error=CANCELLED) for row in waiting], _CLAIMABLE)
        announce(publisher, ended)
    for row in rows:
        if row["device_id"]:
            publisher.wake(row["device_id"], {"cancel": row["id"]})
    by_id = {row["id"]: row for row in rows} | {row["id"]: row for row in ended}
    return list(by_id.values())


def announce(publisher: Publisher, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Publishes to all gateways, and to the log, that jobs have ended. Gives the jobs as callers see them."""
    views = [store.view(row) for row in rows]
    publisher.done(views)
    for row in rows:
        log_end(row)
    return views


def log_end(row: Row) -> None:
    """One line for a job that has ended."""
    timings = store.timings(row)
    log.info(
        "job",
        job_id=row["id"], kind=row["kind"], state=row["state"], device_id=row["device_id"], owner=row["owner"],
        attempt=row["attempt"], queued_ms=timings["queued_ms"], device_ms=row["device_ms"],
        total_ms=timings["total_ms"], error=(row["error"] or {}).get("code"),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rescue:
    """What a worker's death led to."""

    ended: list[Row]
    requeued: list[Row]
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
    connection: Connection, device_id: str, claimed: Sequence[Row], died: Collection[str]
) -> tuple[list[Row], list[Row]]:
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
    requeued: list[Row] = []
    for counts in (True, False):
        ids = [job_id for job_id in again if (job_id in died) is counts]
        requeued += store.requeue(connection, ids, died=counts) if ids else []
    return requeued, store.end_open(connection, endings) if endings else []


def _may_have_begun(claimed: Sequence[Row]) -> set[str]:
    """The jobs that a worker which died may have had on its device.

    `running` is recorded a little after the device began with a job that was claimed ahead. So where nothing stands as
    running, any of those that were claimed ahead may have been on the device, and killed the worker.
    """
    running = {job["id"] for job in claimed if job["state"] == State.RUNNING}
    return running or {job["id"] for job in claimed}


#: The error of a job that was cancelled.
CANCELLED = failure("cancelled", "The job was cancelled.").as_job_error()


def expired(job: Row) -> dict[str, Any]:
    """The error of a job that waited past its expiry."""
    seconds = round((job["expires_at"] - job["submitted_at"]).total_seconds(), 3)
    return failure(
        "expired",
        f"The job had not started when its time was up: job.expires_in_seconds was {seconds:g}.",
        detail={"expires_in_seconds": seconds},
    ).as_job_error()


def expired_on_receipt(seconds_ago: float) -> dict[str, Any]:
    """The error of a Celery task whose message came after its `expires`."""
    return failure(
        "expired", f"The task had expired {seconds_ago:.3g} s before its message was received."
    ).as_job_error()


def predecessor_failed(before: Row) -> dict[str, Any]:
    """The error of a job that requires `before` to succeed: a row with its id, kind, state and error."""
    why = (before["error"] or {}).get("message", "")
    return failure(
        "predecessor_failed",
        f"Job {before['id']} ({before['kind']}), which has to succeed first (job.after_success), is "
        f"{before['state']}{': ' + why if why else ''}",
        detail={"job_id": before["id"], "state": before["state"], "code": (before["error"] or {}).get("code")},
    ).as_job_error()


def _worker_lost(device_id: str) -> dict[str, Any]:
    return failure(
        "worker_lost",
        f"The worker of {device_id} died while the job ran, and the job is not safe to repeat by itself; "
        "what it changed on the device is lost. Submit it again.",
        detail={"device_id": device_id},
    ).as_job_error()


def _poison(job: Row) -> dict[str, Any]:
    return failure(
        "poison",
        f"{job['deaths'] + 1} workers died while they ran this job; it is not tried again.",
        detail={"deaths": job["deaths"] + 1},
    ).as_job_error()
