"""The statements on `jobs`, one module for each thing that happens to a job. Every UPDATE of a state is guarded.

Open jobs are found by `finished_at IS NULL`, which a constraint ties to the states: no index names a state, so a claim
touches none (PostgreSQL's heap-only update). Which states an UPDATE may leave, and for which, stands in
`device_operations.jobs.TRANSITIONS`, and only there.
"""

from tasks.jobs.model import Ending, NewJob
from tasks.jobs.store.claiming import (
    CLAIMED_UNDER,
    Claims,
    claim,
    claimed_under,
    mark_reserved,
    requeue,
    retry,
    set_progress,
)
from tasks.jobs.store.columns import SELECTED
from tasks.jobs.store.ending import end_open, end_running
from tasks.jobs.store.listing import (
    asked_of,
    counts,
    forget,
    get,
    get_many,
    open_counts,
    page,
    predecessors,
    queue_position,
    request_of,
    states,
    totals,
    waiting_counts,
)
from tasks.jobs.store.open_jobs import (
    expired,
    expired_among,
    failed_before,
    make_due,
    open_ids_needing,
    open_ids_of,
    open_needing,
    open_requiring,
    request_cancel,
    request_cancel_of,
    to_be_cancelled,
    waiting,
)
from tasks.jobs.store.recording import insert, insert_up_to, insert_where, last_number
from tasks.jobs.store.views import is_claimed, timings, view

__all__ = [
    "CLAIMED_UNDER",
    "SELECTED",
    "Claims",
    "Ending",
    "NewJob",
    "asked_of",
    "claim",
    "claimed_under",
    "counts",
    "end_open",
    "end_running",
    "expired",
    "expired_among",
    "failed_before",
    "forget",
    "get",
    "get_many",
    "insert",
    "insert_up_to",
    "insert_where",
    "is_claimed",
    "last_number",
    "make_due",
    "mark_reserved",
    "open_counts",
    "open_ids_needing",
    "open_ids_of",
    "open_needing",
    "open_requiring",
    "page",
    "predecessors",
    "queue_position",
    "request_cancel",
    "request_cancel_of",
    "request_of",
    "requeue",
    "retry",
    "set_progress",
    "states",
    "timings",
    "to_be_cancelled",
    "totals",
    "view",
    "waiting",
    "waiting_counts",
]
