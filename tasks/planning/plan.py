"""A plan: a job ready to be recorded, with what is recorded along with it. `tasks.jobs.submit` carries it out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import orjson
from sqlalchemy import Connection

from device_operations.wire.json_types import FreeJson
from tasks.jobs.model import NewJob


@dataclass(frozen=True, slots=True)
class Plan:
    """A job ready to be recorded, and what goes with it.

    `exclusive` are the resources whose jobs take effect in order of submission. `together` and `record` run in the
    transaction that records the job, before its row is written, and may refuse. `together` runs first, once for all
    plans of a submission that share it: it records what they make (models, sessions, allocations), of which `makes`
    says what it needs to know of this one. `record` is this job's own.
    """

    job: NewJob
    exclusive: tuple[str, ...] = ()
    record: Callable[[Connection], None] | None = None
    together: Together | None = None
    makes: FreeJson = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recorded:
    """What came to light while plans were recorded together, by job id.

    `answered` names the earlier job that already does what this one was to do: the caller is given that one instead.
    `dropped` are not needed any more, and no caller waits for them. `after` adds predecessors.
    """

    answered: dict[str, str] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    after: dict[str, list[str]] = field(default_factory=dict)


#: Records what several plans make, in the transaction that records their jobs.
Together: TypeAlias = Callable[[Connection, Sequence[Plan]], Recorded]


def body_hash(body: object) -> str:
    """The hash by which two bodies count as the same: of their canonical JSON."""
    return hashlib.sha256(orjson.dumps(body, option=orjson.OPT_SORT_KEYS)).hexdigest()
