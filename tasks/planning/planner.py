"""From a checked request to a plan: placed on a device, its resources and predecessors named.

`plan` serves every way in: HTTP, bulk, the Open Inference Protocol, and messages of direct callers, where the worker
plans on receipt with itself as the device. The planners are the `plan` modules of `tasks.memory`, `tasks.inference` and
`tasks.training`.
"""

from __future__ import annotations

from device_operations.jobs import Kind, new_id
from device_operations.requests.base import JobRequest
from tasks.kinds import KINDS
from tasks.planning.context import Context
from tasks.planning.plan import Plan


def plan(context: Context, kind: Kind, request: JobRequest, job_id: str | None = None) -> Plan:
    """The plan for `request`, or the refusal. May read the database, never writes it."""
    return KINDS[kind].planner(context, request, job_id or new_id())
