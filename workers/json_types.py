"""Names for JSON that passes through the worker, so that a signature says which form it takes."""

from __future__ import annotations

from typing import Any, TypeAlias

#: A JSON object that the worker writes and does not read: a result, a job's error, progress, facts of a record.
JsonObject: TypeAlias = dict[str, object]

#: A request as its job's record holds it: checked at submission against the kind's model, and completed by its planner.
StoredRequest: TypeAlias = dict[str, Any]
