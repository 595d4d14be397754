"""How often each model ran, and for how long: counted as runs end, written once a second."""

from __future__ import annotations

from device_operations.jobs import State
from device_operations.wire.json_types import JsonObject
from tasks.jobs.lifecycle import Outcome
from tasks.kinds import spec_of
from workers.execution.claimed_job import ClaimedJob


class Uses:
    """Counts since they were last taken. One thread's."""

    def __init__(self) -> None:
        self._by_model: dict[str, dict[str, int]] = {}

    def add(self, work: ClaimedJob, outcome: Outcome) -> None:
        """Counts a run that has ended; any other kind of job is no use of a model."""
        if not spec_of(work.kind).runs_model:
            return
        counts = self._by_model.setdefault(work.request.get("model_id") or "", {})

        def count(name: str, by: int) -> None:
            counts[name] = counts.get(name, 0) + by

        won = outcome.state == State.SUCCEEDED
        ran_ns = int((outcome.device_ms or 0) * 1e6)
        count("succeeded" if won else "failed", 1)
        count("device_ns" if won else "failed_ns", ran_ns)
        if work.row["started_at"] is not None:
            waited = work.row["started_at"] - work.row["submitted_at"]
            count("queue_ns", max(0, int(waited.total_seconds() * 1e9)))
        executions = outcome.facts.get("executions", 0)
        if executions:
            count("executions", executions)
            count(f"batch_{outcome.facts['batch_size']}", executions)
            count(f"batch_{outcome.facts['batch_size']}_ns", ran_ns)

    def take(self) -> list[JsonObject]:
        """What was counted, as the store adds it; counting begins anew."""
        taken, self._by_model = self._by_model, {}
        return [
            {
                "model_id": model_id,
                "succeeded": counts.pop("succeeded", 0),
                "failed": counts.pop("failed", 0),
                "statistics": counts,
            }
            for model_id, counts in taken.items()
        ]
