"""The life of a job after its submission: claimed, ended, retried, requeued, or buried with its worker.

    claim ─▶ (the device works, no transaction open) ─▶ finish ─▶ announce
                                                     └▶ retry
    end, cancel, and tasks.jobs.rescue: what is done to jobs that no worker will end

Whoever ends a job runs its kind's effects (`tasks.jobs.effects`) in the same transaction, so a failed allocation gives
its reservation back whether a worker, a cancellation or a death ended it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import groupby

import structlog
from sqlalchemy import Connection, Engine

from device_operations.errors import OperationError, failure
from device_operations.jobs import CLAIMABLE, TERMINAL, State
from device_operations.wire.json_types import JsonObject
from tasks.database import dumps
from tasks.jobs import lost_ends as ends
from tasks.jobs import store
from tasks.jobs.model import ClaimedRow, Ending, Facts, FailedPredecessor, Fallen, JobRow, JobView, Outcome
from tasks.jobs.unflushed import Unflushed
from tasks.kinds import spec_of
from tasks.redis.publish import Publisher
from tasks.statements import transaction

__all__ = [
    "CANCELLED",
    "Outcome",
    "announce",
    "cancel",
    "cancel_successors",
    "end",
    "expired",
    "expired_on_receipt",
    "fail_needing",
    "finish",
    "leaves_nothing",
    "log_end",
    "predecessor_failed",
    "recover",
    "settle",
]

log = structlog.get_logger(__name__)

_CLAIMABLE = tuple(sorted(CLAIMABLE))


def finish(
    engine: Engine,
    outcomes: Sequence[Outcome],
    claimed: Mapping[str, ClaimedRow],
    epoch: int,
    unflushed: Unflushed | None = None,
) -> list[JobRow]:
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


def recover(engine: Engine, outcomes: Sequence[Outcome], claimed: Mapping[str, ClaimedRow], epoch: int) -> list[JobRow]:
    """The rows of jobs that `finish` did not find running, and that ended as `outcomes` say all the same.

    Either an earlier try was carried out although its connection broke before it said so; or PostgreSQL crashed and
    lost the claim, which had not waited for the disk, and perhaps the job's submission with it: then the end is
    recorded from there. What a worker's death put back, or another process ended, is not among them.
    """
    with engine.connect() as connection:
        found = store.get_many(connection, [outcome.job_id for outcome in outcomes])
    recorded: list[JobRow] = []
    unclaimed: list[JobRow] = []
    for outcome in outcomes:
        before, now = claimed[outcome.job_id], found.get(outcome.job_id)
        if now is not None and now["state"] in TERMINAL:
            if (now["state"], now["epoch"], now["attempt"]) == (outcome.state, epoch, before["attempt"]):
                recorded.append(now)
        elif leaves_nothing(before["kind"], before["needs"]):
            lost: ClaimedRow = {
                **before, "state": outcome.state.value, "result": outcome.result, "error": outcome.error,
                "device_ms": outcome.device_ms, "finished_at": None,
            }  # fmt: skip
            unclaimed.append(lost)
    if unclaimed:
        with engine.connect() as connection:
            again = ends.record_unclaimed(connection, dumps(unclaimed))
        if again:
            log.warning("PostgreSQL had lost the claims of jobs that ended; they are recorded", jobs=len(again))
        recorded += again
    return recorded


def _endings(outcomes: Sequence[Outcome], claimed: Mapping[str, ClaimedRow]) -> list[Ending]:
    return [outcome.ending(claimed[outcome.job_id]) for outcome in outcomes]


def leaves_nothing(kind: str, needs: Sequence[str]) -> bool:
    """Whether such a job changes nothing but its own record, so that it may be run again whatever came after it.

    A run that needs more than its model writes into an allocation, reads one, or moves a session on.
    """
    return len(needs) == 1 and spec_of(kind).leaves_nothing


def _finish_each(
    engine: Engine, outcomes: Sequence[Outcome], claimed: Mapping[str, ClaimedRow], epoch: int
) -> list[JobRow]:
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


def _end_alone(connection: Connection, outcome: Outcome, claimed: Mapping[str, ClaimedRow], epoch: int) -> list[JobRow]:
    row = claimed[outcome.job_id]
    end = spec_of(row["kind"]).ends_at_once(outcome.facts)
    assert end is not None
    return end(connection, outcome.ending(row), outcome.facts, epoch)


def settle(
    connection: Connection,
    rows: Sequence[JobRow],
    facts: Mapping[str, Facts] | None = None,
    epoch: int | None = None,
) -> list[JobRow]:
    """Runs the effects of jobs that have just ended, and ends those that cannot do without them; gives the latter."""
    fallen: list[JobRow] = []
    ended = list(rows)
    while ended:
        lost = _apply_effects(connection, ended, facts or {}, epoch)
        ended = cancel_successors(connection, ended)
        for error, together in groupby(lost, key=lambda one: one[1]):
            ended += fail_needing(connection, [resource_id for resource_id, _ in together], error)
        fallen += ended
    return fallen


def _apply_effects(
    connection: Connection, jobs: Sequence[JobRow], facts: Mapping[str, Facts], epoch: int | None
) -> Fallen:
    """Runs the effects of jobs that have just ended, with what the worker found out about each."""
    fallen: Fallen = []
    by_kind: dict[str, list[JobRow]] = {}
    for job in jobs:
        by_kind.setdefault(job["kind"], []).append(job)
    for kind, ended in by_kind.items():
        spec = spec_of(kind)
        if spec.joint_effect is not None:
            fallen += spec.joint_effect(connection, ended, facts, epoch)
        elif spec.effect is not None:
            for job in ended:
                fallen += spec.effect(connection, job, facts.get(job["id"], Facts()), epoch)
    return fallen


def cancel_successors(connection: Connection, rows: Sequence[FailedPredecessor]) -> list[JobRow]:
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


def _end_successors(engine: Engine, rows: Sequence[JobRow]) -> list[JobRow]:
    """The same where the ends of `rows` are recorded already, with all that falls then."""
    if all(row["state"] == State.SUCCEEDED for row in rows):
        return []
    with transaction(engine) as connection:
        cancelled = cancel_successors(connection, rows)
        return cancelled + settle(connection, cancelled)


def fail_needing(connection: Connection, resource_ids: Sequence[str], error: JsonObject) -> list[JobRow]:
    """Fails jobs that have not started and need any of the resources, with `error`. Effects are the caller's."""
    waiting = store.open_needing(connection, resource_ids)
    endings = [
        Ending(job["id"], State.FAILED.value, error=error) for job in waiting if not spec_of(job["kind"]).takes_away
    ]
    return store.end_open(connection, endings) if endings else []


def end(engine: Engine, endings: Sequence[Ending], leaving: Sequence[State]) -> list[JobRow]:
    """Ends jobs from the states `leaving`, with their effects, and gives every row that ended."""
    with transaction(engine) as connection:
        rows = store.end_open(connection, endings, leaving)
        return rows + settle(connection, rows)


def cancel(engine: Engine, publisher: Publisher, job_ids: Collection[str]) -> list[JobRow]:
    """Cancels those of `job_ids` that wait, and asks the workers of those that are claimed. Gives the open ones' rows.

    What a worker has claimed ahead of its device is the worker's to end: it alone knows that it will not begin it.
    """
    with engine.connect() as connection:
        rows = store.request_cancel(connection, job_ids)
    waiting = [row for row in rows if row["state"] in CLAIMABLE and not store.is_claimed(row)]
    ended: list[JobRow] = []
    if waiting:
        ended = end(engine, [Ending(row["id"], State.CANCELLED.value, error=CANCELLED) for row in waiting], _CLAIMABLE)
        announce(publisher, ended)
    for row in rows:
        if row["device_id"]:
            publisher.wake(row["device_id"], {"cancel": row["id"]})
    by_id = {row["id"]: row for row in rows} | {row["id"]: row for row in ended}
    return list(by_id.values())


def announce(publisher: Publisher, rows: Sequence[JobRow]) -> list[JobView]:
    """Publishes to all gateways, and to the log, that jobs have ended. Gives the jobs as callers see them."""
    views = [store.view(row) for row in rows]
    publisher.done(views)
    for row in rows:
        log_end(row)
    return views


def log_end(row: JobRow) -> None:
    """One line for a job that has ended."""
    timings = store.timings(row)
    log.info(
        "job",
        job_id=row["id"], kind=row["kind"], state=row["state"], device_id=row["device_id"], owner=row["owner"],
        attempt=row["attempt"], queued_ms=timings["queued_ms"], device_ms=row["device_ms"],
        total_ms=timings["total_ms"], error=(row["error"] or {}).get("code"),
    )  # fmt: skip


#: The error of a job that was cancelled.
CANCELLED = failure("cancelled", "The job was cancelled.").as_job_error()


def expired(job: JobRow) -> JsonObject:
    """The error of a job that waited past its expiry."""
    assert job["expires_at"] is not None
    seconds = round((job["expires_at"] - job["submitted_at"]).total_seconds(), 3)
    return failure(
        "expired",
        f"The job had not started when its time was up: job.expires_in_seconds was {seconds:g}.",
        detail={"expires_in_seconds": seconds},
    ).as_job_error()


def expired_on_receipt(seconds_ago: float) -> JsonObject:
    """The error of a Celery task whose message came after its `expires`."""
    return failure(
        "expired", f"The task had expired {seconds_ago:.3g} s before its message was received."
    ).as_job_error()


def predecessor_failed(before: FailedPredecessor) -> JsonObject:
    """The error of a job that requires `before` to succeed: a row with its id, kind, state and error."""
    why = (before["error"] or {}).get("message", "")
    return failure(
        "predecessor_failed",
        f"Job {before['id']} ({before['kind']}), which has to succeed first (job.after_success), is "
        f"{before['state']}{': ' + why if why else ''}",
        detail={"job_id": before["id"], "state": before["state"], "code": (before["error"] or {}).get("code")},
    ).as_job_error()
