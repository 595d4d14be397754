"""Submitting: one transaction records jobs with their predecessors, then their messages are published.

A job that names an exclusive resource (allocation, inference session, training session) waits for the job that named
it last; the resources are locked in order of id, so several gateways agree and cannot deadlock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import Connection, Engine

from device_operations.errors import failure
from device_operations.jobs import OPEN, State
from tasks.jobs import lifecycle, order, queue_limit, store
from tasks.jobs.model import JobRow, KeyAnswer, NewJob, Predecessor
from tasks.owners import Owner, may_see
from tasks.planning.plan import Plan, Recorded, Together, body_hash
from tasks.redis.publish import Publisher
from tasks.statements import execute, transaction

__all__ = ["Plan", "Promise", "Recorded", "body_hash", "keep", "publish", "recall", "recall_jobs", "record", "submit"]


@dataclass(frozen=True, slots=True)
class Promise:
    """An idempotency key: the same key and body of the same owner and route gives the first jobs again."""

    owner: str
    route: str
    key: str
    body_sha256: str


def submit(
    engine: Engine,
    publisher: Publisher,
    plans: Sequence[Plan],
    promise: Promise | None = None,
    *,
    relaxed: bool = False,
) -> list[JobRow]:
    """Records all of `plans` or none, publishes them, and gives their rows in order.

    `relaxed` does not wait for the disk: only where the caller is promised nothing before the job has ended, or is
    written there (`ends.on_disk`). Raises `job_not_found` for a predecessor that does not exist, `queue_full`, and
    whatever a plan's `record` refuses with.
    """
    with transaction(engine) as connection:
        if relaxed:
            execute(connection, "SET LOCAL synchronous_commit = off")
        rows = record(connection, plans, promise)
    publish(publisher, plans, rows)
    return rows


def record(connection: Connection, plans: Sequence[Plan], promise: Promise | None = None) -> list[JobRow]:
    """Records plans inside the caller's transaction."""
    if promise is not None:
        earlier = keep(connection, promise, [plan.job.id for plan in plans])
        if earlier is not None:
            return _in_order(connection, earlier)
    resources = {resource for plan in plans for resource in plan.exclusive}
    last = order.lock_order(connection, resources) if resources else {}
    known = _record_together(connection, plans)
    new = [plan for plan in plans if plan.job.id not in known.answered and plan.job.id not in known.dropped]
    ordered = _with_predecessors(connection, new, last, known.after)
    for plan in new:
        if plan.record is not None:
            plan.record(connection)
    rows = queue_limit.insert(connection, ordered) if ordered else []
    if len(rows) != len(ordered):
        taken = sorted({job.id for job in ordered} - {row["id"] for row in rows})
        raise failure("idempotency_conflict", f"job ids are taken: {', '.join(taken)}")
    if any(job.requires for job in ordered):
        rows = _without_those_in_vain(connection, ordered, rows)
    if known.answered:
        rows = _with_answered(connection, plans, rows, known.answered)
        if promise is not None:
            order.amend_key(connection, promise.owner, promise.route, promise.key, [row["id"] for row in rows])
    return rows


def _without_those_in_vain(connection: Connection, jobs: Sequence[NewJob], rows: list[JobRow]) -> list[JobRow]:
    """The rows, where those of jobs whose predecessors have failed already end at once, and what falls with them."""
    failed = store.failed_before(connection, [job.id for job in jobs if job.requires])
    cancelled = lifecycle.cancel_successors(connection, list(failed.values()))
    ended = {row["id"]: row for row in [*cancelled, *lifecycle.settle(connection, cancelled)]}
    return [ended.get(row["id"], row) for row in rows]


def _record_together(connection: Connection, plans: Sequence[Plan]) -> Recorded:
    groups: dict[Together, list[Plan]] = {}
    for plan in plans:
        if plan.together is not None:
            groups.setdefault(plan.together, []).append(plan)
    known = Recorded()
    for together, group in groups.items():
        found = together(connection, group)
        known.answered.update(found.answered)
        known.dropped.update(found.dropped)
        known.after.update(found.after)
    return known


def _with_answered(
    connection: Connection, plans: Sequence[Plan], rows: Sequence[JobRow], answered: dict[str, str]
) -> list[JobRow]:
    """The rows in the order of `plans`, with the earlier jobs where those answer."""
    by_id = {row["id"]: row for row in rows} | store.get_many(connection, set(answered.values()))
    gone = sorted(set(answered.values()) - by_id.keys())
    if gone:
        raise failure("allocation_exists", f"jobs {', '.join(gone)} did this already and are no longer kept")
    return [by_id[answered.get(plan.job.id, plan.job.id)] for plan in plans]


def publish(publisher: Publisher, plans: Sequence[Plan], rows: Sequence[JobRow]) -> None:
    """Publishes what was recorded and is due, and announces what ended as it was recorded."""
    requests = {plan.job.id: plan.job.request for plan in plans}
    publisher.jobs(
        [(row, requests[row["id"]]) for row in rows if row["state"] == State.QUEUED and row["id"] in requests]
    )
    in_vain = [row for row in rows if row["finished_at"] is not None and row["id"] in requests]
    if in_vain:
        lifecycle.announce(publisher, in_vain)


def keep(connection: Connection, promise: Promise, made_ids: list[str]) -> list[str] | None:
    """Keeps what is made under a key, in the transaction that makes it; gives what was made under it before.

    Raises `idempotency_conflict` where that was for another body.
    """
    earlier = order.remember_key(connection, promise.owner, promise.route, promise.key, promise.body_sha256, made_ids)
    return None if earlier is None else _same_body(promise, earlier)


def recall(connection: Connection, promise: Promise) -> list[str] | None:
    """What was made under a key: the ids in order; None where the key is new.

    For submissions that cannot be planned: what the first one named may be gone, and its answer stands all the same.
    Raises `idempotency_conflict` as `keep` does.
    """
    earlier = order.recall_key(connection, promise.owner, promise.route, promise.key)
    return None if earlier is None else _same_body(promise, earlier)


def recall_jobs(engine: Engine, promise: Promise | None) -> list[JobRow] | None:
    """The jobs that were made under a key, as they stand; None where the key is new, or there is none."""
    if promise is None:
        return None
    with engine.connect() as connection:
        job_ids = recall(connection, promise)
        return None if job_ids is None else _in_order(connection, job_ids)


def _same_body(promise: Promise, earlier: KeyAnswer) -> list[str]:
    if earlier["body_sha256"] != promise.body_sha256:
        raise failure(
            "idempotency_conflict",
            f"Idempotency-Key {promise.key!r} was used with another body on this route; use a new key",
            detail={"job_ids": earlier["job_ids"]},
        )
    made: list[str] = earlier["job_ids"]
    return made


def _in_order(connection: Connection, job_ids: list[str]) -> list[JobRow]:
    known = store.get_many(connection, job_ids)
    return [known[job_id] for job_id in job_ids if job_id in known]


def _with_predecessors(
    connection: Connection, plans: Sequence[Plan], last: dict[str, str | None], more: dict[str, list[str]]
) -> list[NewJob]:
    """The jobs with what they must wait for: the callers' own predecessors, and the order of each resource.

    `last` is the last job of each resource, which is locked; `more` are predecessors that came to light.
    """
    own = {plan.job.id for plan in plans}
    named = {job_id for plan in plans for job_id in plan.job.after}.union(*more.values())
    before = {job_id for job_id in last.values() if job_id is not None}
    known = store.predecessors(connection, (named | before) - own) if (named | before) - own else {}
    missing = sorted((named - own - known.keys()) | _others(plans, known))
    if missing:
        raise failure("job_not_found", f"after names jobs that do not exist: {', '.join(missing)}")
    still_open = {job_id for job_id, row in known.items() if row["state"] in OPEN}
    seen: set[str] = set()
    jobs = []
    for plan in plans:
        wanted = [*plan.job.after, *more.get(plan.job.id, ())]
        after = {job_id for job_id in wanted if job_id in still_open or job_id in seen}
        for resource in plan.exclusive:
            previous = last.get(resource)
            if previous in still_open or previous in seen:
                after.add(str(previous))
            last[resource] = plan.job.id
        seen.add(plan.job.id)
        jobs.append(replace(plan.job, after=sorted(after)))
    used = {resource for plan in plans for resource in plan.exclusive}
    if used:
        order.set_order(connection, {resource: str(last[resource]) for resource in used})
    return jobs


def _others(plans: Sequence[Plan], known: Mapping[str, Predecessor]) -> set[str]:
    """Predecessors that callers have named and that are other owners' jobs."""
    return {
        job_id
        for plan in plans
        for job_id in plan.job.own_after
        if job_id in known and not may_see(Owner(plan.job.owner), known[job_id])
    }
