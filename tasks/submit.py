"""Submitting: one transaction records jobs with their predecessors, then their messages are published.

A job that names an exclusive resource (allocation, inference session, training session) waits for the job that named
it last; the resources are locked in order of id, so several gateways agree and cannot deadlock (DESIGN, invariant 3).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson
from sqlalchemy import Connection, Engine

from device_operations.errors import failure
from device_operations.jobs import OPEN, State
from tasks.publish import Publisher
from tasks.store import jobs as store
from tasks.store import order, queue_limit
from tasks.store.connection import Row, execute, transaction
from tasks.store.jobs import NewJob


@dataclass(frozen=True, slots=True)
class Plan:
    """A job ready to be recorded, and what goes with it.

    `exclusive` are the resources whose jobs take effect in order of submission. `record` writes what the job makes
    (a model, a session) in the same transaction, and may refuse. `together` does so for all plans of a submission that
    share it, before their jobs are written; `makes` is what it needs to know of this one.
    """

    job: NewJob
    exclusive: tuple[str, ...] = ()
    record: Callable[[Connection], None] | None = None
    together: Callable[[Connection, Sequence[Plan]], Recorded] | None = None
    makes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recorded:
    """What came to light while plans were recorded together, by job id.

    `answered` names the earlier job that already does what this one was to do: the caller is given that one instead.
    `dropped` are not needed any more, and nobody waits for them. `after` adds predecessors.
    """

    answered: dict[str, str] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    after: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Promise:
    """An idempotency key: the same key and body of the same owner and route gives the first jobs again."""

    owner: str
    route: str
    key: str
    body_sha256: str


def body_hash(body: Any) -> str:
    """The hash by which two bodies count as the same: of their canonical JSON."""
    return hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()


def submit(
    engine: Engine,
    publisher: Publisher,
    plans: Sequence[Plan],
    promise: Promise | None = None,
    *,
    relaxed: bool = False,
) -> list[Row]:
    """Records all of `plans` or none, publishes them, and gives their rows in order.

    `relaxed` does not wait for the disk: only where the caller is promised nothing before the job has ended. Raises
    `job_not_found` for a predecessor that does not exist, `queue_full`, and whatever a plan's `record` refuses with.
    """
    with transaction(engine) as connection:
        if relaxed:
            execute(connection, "SET LOCAL synchronous_commit = off")
        rows = record(connection, plans, promise)
    publish(publisher, plans, rows)
    return rows


def record(connection: Connection, plans: Sequence[Plan], promise: Promise | None = None) -> list[Row]:
    """Records plans inside the caller's transaction."""
    if promise is not None:
        earlier = _keep(connection, promise, [plan.job.id for plan in plans])
        if earlier is not None:
            return earlier
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
    return _with_answered(connection, plans, rows, known.answered) if known.answered else rows


def _record_together(connection: Connection, plans: Sequence[Plan]) -> Recorded:
    groups: dict[Any, list[Plan]] = {}
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
    connection: Connection, plans: Sequence[Plan], rows: Sequence[Row], answered: dict[str, str]
) -> list[Row]:
    """The rows in the order of `plans`, with the earlier jobs where those answer."""
    by_id = {row["id"]: row for row in rows} | store.get_many(connection, set(answered.values()))
    gone = sorted(set(answered.values()) - by_id.keys())
    if gone:
        raise failure("allocation_exists", f"jobs {', '.join(gone)} did this already and are no longer kept")
    return [by_id[answered.get(plan.job.id, plan.job.id)] for plan in plans]


def publish(publisher: Publisher, plans: Sequence[Plan], rows: Sequence[Row]) -> None:
    """Publishes what was recorded and is due."""
    requests = {plan.job.id: plan.job.request for plan in plans}
    publisher.jobs(
        [(row, requests[row["id"]]) for row in rows if row["state"] == State.QUEUED and row["id"] in requests]
    )


def _keep(connection: Connection, promise: Promise, job_ids: list[str]) -> list[Row] | None:
    earlier = order.remember_key(connection, promise.owner, promise.route, promise.key, promise.body_sha256, job_ids)
    if earlier is None:
        return None
    if earlier["body_sha256"] != promise.body_sha256:
        raise failure(
            "idempotency_conflict",
            f"Idempotency-Key {promise.key!r} was used with another body on this route; use a new key",
            detail={"job_ids": earlier["job_ids"]},
        )
    known = store.get_many(connection, earlier["job_ids"])
    return [known[job_id] for job_id in earlier["job_ids"] if job_id in known]


def _with_predecessors(
    connection: Connection, plans: Sequence[Plan], last: dict[str, str | None], more: dict[str, list[str]]
) -> list[NewJob]:
    """The jobs with what they must wait for: the callers' own predecessors, and the order of each resource.

    `last` is the last job of each resource, which is locked; `more` are predecessors that came to light.
    """
    own = {plan.job.id for plan in plans}
    named = {job_id for plan in plans for job_id in plan.job.after}.union(*more.values())
    before = {job_id for job_id in last.values() if job_id is not None}
    known = store.states(connection, (named | before) - own) if (named | before) - own else {}
    missing = sorted(named - own - known.keys())
    if missing:
        raise failure("job_not_found", f"after names jobs that do not exist: {', '.join(missing)}")
    still_open = {job_id for job_id, state in known.items() if state in OPEN}
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
