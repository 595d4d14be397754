"""A job as its callers see it, made from its row."""

from __future__ import annotations

from datetime import datetime

from device_operations.jobs import State
from tasks.jobs.model import JobRow, JobView, ResourceView, TimingsView


def is_claimed(job: JobRow) -> bool:
    """Whether a worker has claimed the job and not ended it."""
    return job["epoch"] is not None and job["finished_at"] is None


def _milliseconds(start: datetime | None, end: datetime | None) -> float | None:
    return None if start is None or end is None else round((end - start).total_seconds() * 1000, 3)


def timings(job: JobRow) -> TimingsView:
    """Milliseconds from submission to start, on the device, and from submission to the end."""
    return {
        "queued_ms": _milliseconds(job["submitted_at"], job["started_at"]),
        "device_ms": job["device_ms"],
        "total_ms": _milliseconds(job["submitted_at"], job["finished_at"]),
    }


def view(job: JobRow, queue_position: int | None = None) -> JobView:
    """The job as every caller sees it: the fields of `device_operations.jobs.Job`. Times are aware datetimes."""
    resource: ResourceView | None = None
    if job["resource_id"]:
        resource = {"type": job["resource_type"], "id": job["resource_id"]}
    return {
        "job_id": job["id"],
        "kind": job["kind"],
        "state": job["state"],
        "celery_state": State(job["state"]).celery,
        "device_id": job["device_id"],
        "queue": job["queue"],
        "priority": job["priority"],
        "attempt": job["attempt"],
        "max_attempts": job["max_attempts"],
        "queue_position": queue_position,
        "progress": job["progress"],
        "resource": resource,
        "submitted_at": job["submitted_at"],
        "started_at": job["started_at"],
        "finished_at": job["finished_at"],
        "expires_at": job["expires_at"],
        "timings": timings(job),
        "result": job["result"],
        "error": job["error"],
        "owner": job["owner"],
        "labels": job["labels"],
        "deaths": job["deaths"],
        "retried_from": job["retried_from"],
    }
