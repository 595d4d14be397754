"""From a checked request to a plan: placed on a device, its resources and predecessors named, one module a noun.

`plan` serves every way in: HTTP, bulk, the Open Inference Protocol, and messages of direct callers, where the worker
plans on receipt with itself as the device.
"""

from __future__ import annotations

from typing import Any

from device_operations.errors import failure
from device_operations.jobs import Kind, new_id
from device_operations.requests.base import JobRequest
from tasks.plans import inference, memory, training
from tasks.plans.base import Context
from tasks.submit import Plan

PLANNERS: dict[Kind, Any] = {**inference.PLANNERS, **memory.PLANNERS, **training.PLANNERS}


def plan(context: Context, kind: Kind, request: JobRequest, job_id: str | None = None) -> Plan:
    """The plan for `request`, or the refusal. May read the database, never writes it."""
    planner = PLANNERS.get(kind)
    if planner is None:
        raise failure("validation_failed", f"jobs of kind {kind.value} cannot be taken here")
    made: Plan = planner(context, request, job_id or new_id())
    return made
