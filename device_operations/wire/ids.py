"""What an id may be that a caller chooses: one bound for HTTP and for messages.

A job's id travels in addresses, headers, Redis channels and log lines, so it has no spaces and nothing invisible.
"""

from __future__ import annotations

from typing import TypeGuard

#: Characters that a job's id, which is also its Celery task id, may have at most.
JOB_ID_CHARACTERS = 255


def is_job_id(value: object) -> TypeGuard[str]:
    """Whether `value` may be a job's id: a string of 1 to 255 visible characters."""
    return type(value) is str and 0 < len(value) <= JOB_ID_CHARACTERS and value.isprintable() and " " not in value


def job_id(value: str) -> str:
    """`value` if it may be a job's id, else `ValueError`: for pydantic."""
    if not is_job_id(value):
        raise ValueError(f"a job's id is 1 to {JOB_ID_CHARACTERS} visible characters")
    return value
