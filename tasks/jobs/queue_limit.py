"""The limit on jobs that wait for a device, exact for any number of gateways and not in the way far from it.

    far     under one of the device's slots, a few jobs at a time: the INSERT counts what waits, and records nothing
            where fewer than `RESERVE` places are left; or it does not count, where `_Look` says that it need not
    near    under all of the device's slots: what waits is counted, then what fits is recorded

Slots are advisory locks that end with their transaction. Each transaction that counted under a slot may have at most
`SLOT_JOBS` jobs of a device that others do not see yet, and there are `SLOTS` of them, so `RESERVE` places are enough
for all. A count under all slots sees everything, and no other count runs meanwhile.

Jobs are numbered in one sequence. So a queue has grown, since it was counted, by no more jobs than the sequence by
numbers, whichever gateway took them and whatever device they are for. While that leaves more than two reserves (one for
what the count did not see yet, one for what others are about to number), an INSERT compares two numbers and counts
nothing: counting takes as long as recording one job does.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sqlalchemy import Connection

from device_operations.errors import OperationError, failure
from tasks.jobs import store
from tasks.jobs.model import JobRow, NewJob
from tasks.statements import execute, rows

#: Transactions that may count one device's queue at once, and the jobs for it that each may record.
SLOTS, SLOT_JOBS = 8, 100
RESERVE = SLOTS * SLOT_JOBS

#: Seconds between two looks that a connection takes at one queue.
LOOK_SECONDS = 0.05

#: Devices whose jobs may be recorded together without a count.
MOST_DEVICES = 8

#: Where a connection keeps its looks. They end with it: a crash of PostgreSQL may take numbers back.
_LOOKS = "queue_looks"

#: Seconds after which a caller whose job found no place is asked to come again.
RETRY_AFTER_SECONDS = 5

_ALL_SLOTS = """
    SELECT pg_advisory_xact_lock(key, slot) FROM (
        SELECT key, slot FROM unnest(%(keys)s::int[]) AS key, generate_series(0, {slots} - 1) AS slot
        ORDER BY key, slot) AS ordered
"""


@dataclass(frozen=True, slots=True)
class _Look:
    """What a connection saw of a queue: while jobs have numbers up to `highest`, one more needs no count."""

    #: 0 where each needs one.
    highest: int
    seen_at: float


#: By device and limit.
_Looks = dict[tuple[str, int], _Look]


def insert(connection: Connection, jobs: Sequence[NewJob]) -> list[JobRow]:
    """Records jobs in their order, all or none, inside a transaction. `queue_full` where a queue has no place for them.

    Ids that exist are left as they are and not returned.
    """
    found = insert_far(connection, [jobs], savepoint=True)
    recorded = found[0] if found is not None else insert_near(connection, [jobs])[0]
    if isinstance(recorded, OperationError):
        raise recorded
    return recorded


def insert_far(
    connection: Connection, groups: Sequence[Sequence[NewJob]], *, savepoint: bool = False
) -> list[list[JobRow]] | None:
    """Records all jobs of all groups if every queue is far from its limit; else None, and nothing is recorded.

    With `savepoint`, for a connection inside a transaction, the slot is given up where nothing is recorded. Without, on
    a connection in autocommit, most calls do not count.
    """
    jobs = groups[0] if len(groups) == 1 else [job for group in groups for job in group]
    limits = _limits(jobs)
    if not limits:
        return _grouped(groups, store.insert(connection, jobs))
    if not savepoint and len(jobs) <= SLOT_JOBS:
        recorded = _insert_uncounted(connection, jobs, limits)
        if recorded:
            return _grouped(groups, recorded)
    wanted: Mapping[str | None, int]
    if len(limits) == 1:
        wanted = dict.fromkeys(limits, len(jobs))
    else:
        wanted = Counter(job.device_id for job in jobs if job.device_id in limits)
    room = {device_id: limit - RESERVE - wanted[device_id] for device_id, limit in limits.items()}
    if min(room.values()) < 0 or max(wanted.values()) > SLOT_JOBS:
        return None
    before = _take_slots(tuple(limits))
    recorded = store.insert_where(connection, jobs, room, f"SAVEPOINT queue_slot; {before}" if savepoint else before)
    if recorded:
        return _grouped(groups, recorded)
    if savepoint:
        execute(connection, "ROLLBACK TO SAVEPOINT queue_slot")
    return None


def _insert_uncounted(connection: Connection, jobs: Sequence[NewJob], limits: Mapping[str, int]) -> list[JobRow]:
    """Records jobs where the looks at their queues say that there are places; else nothing."""
    if len(limits) > MOST_DEVICES:
        return []
    looks: _Looks = connection.connection.info.setdefault(_LOOKS, {})
    for last_try in (False, True):
        highest = min([looks[queue].highest if queue in looks else 0 for queue in limits.items()])
        if highest:
            recorded = store.insert_up_to(connection, jobs, highest - len(jobs), _keys(tuple(limits)), SLOTS)
            if recorded:
                return recorded
        if last_try or not _look(connection, limits, looks):
            break
    return []


def _look(connection: Connection, limits: Mapping[str, int], looks: _Looks) -> bool:
    """Counts queues, unless it did just now. Running jobs count: one that is put back waits without a new number."""
    now = time.monotonic()
    if any(queue in looks and now - looks[queue].seen_at < LOOK_SECONDS for queue in limits.items()):
        # No more than one statement in vain for each look.
        looks.update({queue: _Look(0, now) for queue in limits.items()})
        return False
    # The number before the count: what has a number by then and is not seen yet is held by a slot.
    last = store.last_number(connection)
    counted = store.open_counts(connection, limits, before=_take_slots(tuple(limits)))
    for queue in limits.items():
        left = queue[1] - 2 * RESERVE - counted[queue[0]]
        looks[queue] = _Look(last + left if left > 0 else 0, now)
    return True


def insert_near(connection: Connection, groups: Sequence[Sequence[NewJob]]) -> list[list[JobRow] | OperationError]:
    """Records, in a transaction, each group that finds a place for all of its jobs; `queue_full` for each other."""
    limits = _limits([job for group in groups for job in group])
    waiting: Counter[str | None] = Counter()
    if limits:
        rows(connection, _ALL_SLOTS.format(slots=SLOTS), {"keys": _keys(tuple(limits))})
        waiting.update(store.waiting_counts(connection, limits))
    answers: list[list[JobRow] | OperationError] = []
    admitted: list[Sequence[NewJob]] = []
    for group in groups:
        wanted = Counter(job.device_id for job in group if job.queue_limit is not None)
        full = next((one for one, count in wanted.items() if waiting[one] + count > limits[str(one)]), None)
        if full is not None:
            answers.append(_full(str(full), waiting[full], limits[str(full)], wanted[full]))
            continue
        waiting.update(wanted)
        admitted.append(group)
        answers.append([])
    recorded = store.insert(connection, [job for group in admitted for job in group]) if admitted else []
    by_group = iter(_grouped(admitted, recorded))
    return [answer if isinstance(answer, OperationError) else next(by_group) for answer in answers]


def _limits(jobs: Sequence[NewJob]) -> dict[str, int]:
    """The limit of each device whose queue is counted."""
    return {job.device_id: job.queue_limit for job in jobs if job.device_id and job.queue_limit is not None}


@lru_cache(1024)
def _take_slots(device_ids: tuple[str, ...]) -> str:
    """The statement that takes a slot of each device."""
    # Evaluated from left to right: in the order in which every process takes slots.
    locks = ", ".join(f"pg_advisory_xact_lock({key}, mod(pg_backend_pid(), {SLOTS}))" for key in _keys(device_ids))
    return f"SELECT {locks}; "


@lru_cache(1024)
def _keys(device_ids: tuple[str, ...]) -> list[int]:
    """The numbers of the devices' slots, in the order in which every process takes them."""
    return sorted({zlib.crc32(device_id.encode()) - 2**31 for device_id in device_ids})


def _grouped(groups: Sequence[Sequence[NewJob]], recorded: list[JobRow]) -> list[list[JobRow]]:
    if len(groups) == 1:
        return [recorded]
    by_id = {row["id"]: row for row in recorded}
    return [[by_id[job.id] for job in group if job.id in by_id] for group in groups]


def _full(device_id: str, waiting: int, limit: int, wanted: int) -> OperationError:
    return failure(
        "queue_full",
        f"QUEUE__MAX_LENGTH is {limit}: {max(0, limit - waiting)} more jobs may wait for {device_id}, and {wanted} "
        "were sent",
        retry_after_seconds=RETRY_AFTER_SECONDS,
    )
