"""Whose what is: one function that every look-up for a caller goes through.

What belongs to another owner is reported like what does not exist: same code, same words, same status.
"""

from __future__ import annotations

from typing import Protocol

from device_operations.errors import OperationError, failure
from tasks.store.connection import Row


class Asker(Protocol):
    """On whose behalf something is looked up: a gateway's caller or a planner's context."""

    @property
    def owner(self) -> str: ...
    @property
    def admin(self) -> bool: ...


#: The error code of each noun that has owners.
_CODES = {
    "job": "job_not_found",
    "allocation": "allocation_not_found",
    "model": "model_not_found",
    "inference session": "session_not_found",
    "training session": "session_not_found",
    "checkpoint": "checkpoint_not_found",
    "blob": "blob_not_found",
}


def may_see(asker: Asker, row: Row, *, shared: bool = False) -> bool:
    """Whether `asker` may use what `row` records. With `shared`, also what its owner shares for reading and running."""
    return asker.admin or row["owner"] == asker.owner or (shared and bool(row.get("shared")))


def found(asker: Asker, row: Row | None, noun: str, thing_id: str, *, shared: bool = False) -> Row:
    """`row`, if it exists and is the asker's; else the noun's not-found error, the same in both cases."""
    if row is None or not may_see(asker, row, shared=shared):
        raise absent(noun, thing_id)
    return row


def absent(noun: str, thing_id: str) -> OperationError:
    """The error for a thing that does not exist, or that is another owner's."""
    return failure(_CODES[noun], f"there is no {noun} {thing_id!r}")
