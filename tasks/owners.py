"""Whose what is: one function that every look-up for a caller goes through.

What belongs to another owner is reported like what does not exist: same code, same words, same status, and after the
same reads, so that the time taken says nothing either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from device_operations.errors import OperationError, failure

#: A row with an `owner`.
Owned = TypeVar("Owned", bound=Mapping[str, object])


class Asker(Protocol):
    """On whose behalf something is looked up: a gateway's caller or a planner's context."""

    @property
    def owner(self) -> str: ...
    @property
    def admin(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Owner:
    """An owner who asks for what is their own, where no caller is at hand: a job that was planned for them."""

    owner: str
    admin: bool = False


@dataclass(frozen=True, slots=True)
class _Noun:
    """The error code of a noun that has owners, and what may have become of one that is not found."""

    code: str
    hint: str = ""


_NOUNS = {
    "job": _Noun("job_not_found", ", or it is no longer kept (JOBS__RETENTION_DAYS)"),
    "allocation": _Noun("allocation_not_found"),
    "model": _Noun("model_not_found"),
    "inference session": _Noun("session_not_found"),
    "training session": _Noun("session_not_found"),
    "checkpoint": _Noun("checkpoint_not_found"),
    "blob": _Noun("blob_not_found", ", or it was deleted or has expired"),
}


def may_see(asker: Asker, row: Mapping[str, object], *, shared: bool = False) -> bool:
    """Whether `asker` may use what `row` records. With `shared`, also what its owner shares for reading and running."""
    return asker.admin or row["owner"] == asker.owner or (shared and bool(row.get("shared")))


def found(asker: Asker, row: Owned | None, noun: str, thing_id: str, *, shared: bool = False) -> Owned:
    """`row`, if it exists and is the asker's; else the noun's not-found error, the same in both cases."""
    if row is None or not may_see(asker, row, shared=shared):
        raise absent(noun, thing_id)
    return row


def absent(noun: str, thing_id: str) -> OperationError:
    """The error for a thing that does not exist, or that is another owner's."""
    about = _NOUNS[noun]
    return failure(about.code, f"there is no {noun} {thing_id!r}{about.hint}")
