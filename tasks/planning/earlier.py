"""What earlier entries of one submission make, which later entries may name although no record shows it yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeGuard

from device_operations.errors import failure
from device_operations.wire.json_types import FreeJson
from tasks.inference.rows import KnownModel
from tasks.memory.rows import KnownAllocation
from tasks.planning.plan import Plan
from tasks.training.rows import KnownSession

#: How an entry names what an earlier one makes: `{"$entry": 0}` is the id of the first entry's resource, and in
#: `job.after` the id of its job.
REFERENCE = "$entry"

#: Where no entry is named, and a million numbers may stand.
_NUMBERS = "data"


@dataclass(slots=True)
class Earlier:
    """The plans of the entries before, and what they make as rows that planners look up by id."""

    plans: list[Plan] = field(default_factory=list)
    allocations: dict[str, KnownAllocation] = field(default_factory=dict)
    training_sessions: dict[str, KnownSession] = field(default_factory=dict)
    models: dict[str, KnownModel] = field(default_factory=dict)

    def add(self, plan: Plan, foresee: Callable[[Earlier, str, FreeJson], None] | None) -> None:
        """An entry was planned; `foresee` notes what it makes, as its kind says (`tasks.kinds`)."""
        self.plans.append(plan)
        if foresee is not None:
            foresee(self, str(plan.job.resource_id), plan.makes)

    def model(self, model_id: str | None, name: str | None, version: str | None, owner: str) -> KnownModel | None:
        """The model of `owner` that an entry loads, by its id or by the name that it gives last; None without one."""
        if model_id is not None:
            return self.models.get(model_id)
        named = [
            one
            for one in self.models.values()
            if (one["name"], one["owner"]) == (name, owner) and version in (None, one["version"])
        ]
        return named[-1] if named else None

    def job_ids_needing(self, resource_id: str) -> list[str]:
        """The jobs of earlier entries that need a resource."""
        return [plan.job.id for plan in self.plans if resource_id in plan.job.needs]

    def resolved(self, request: FreeJson) -> FreeJson:
        """An entry's request with ids in place of what it names by entry.

        Raises `validation_failed` for what is no earlier entry.
        """
        resolved: FreeJson = {name: self._resolved(value) for name, value in request.items() if name != "job"}
        options = request.get("job")
        if isinstance(options, dict) and isinstance(options.get("after"), list):
            after = [self._entry(one).job.id if _is_reference(one) else one for one in options["after"]]
            resolved["job"] = {**options, "after": after}
        elif "job" in request:
            resolved["job"] = options
        return resolved

    def _resolved(self, value: object) -> object:
        if isinstance(value, list):
            return [self._resolved(inner) for inner in value]
        if not isinstance(value, dict):
            return value
        if _is_reference(value):
            return self._entry(value).job.resource_id
        return {name: inner if name == _NUMBERS else self._resolved(inner) for name, inner in value.items()}

    def _entry(self, reference: Mapping[str, object]) -> Plan:
        number = reference[REFERENCE]
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(self.plans):
            raise failure(
                "validation_failed",
                f"{{'{REFERENCE}': {number!r}}} names no earlier entry; there are {len(self.plans)}, counted from 0",
            )
        return self.plans[number]


def _is_reference(value: object) -> TypeGuard[dict[str, object]]:
    return isinstance(value, dict) and value.keys() == {REFERENCE}
