"""Random sequences of every operation against a model of plain bytes: same contents, no leak, an honest ledger."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from device_operations.errors import OperationError
from device_operations.jobs import Kind, State
from device_operations.settings import Settings
from tests.memory.bench import Bench
from tests.support.repetitions import FACTOR, repetitions

BUDGET = 10_000

#: How many sequences are tried.
SEQUENCES = repetitions(200)


@pytest.fixture
def bench(database_url: str, settings: Callable[..., Settings], tmp_path: Path) -> Iterator[Bench]:
    made = Bench(database_url, settings(DATABASE_URL=database_url), tmp_path, BUDGET)
    yield made
    made.close()


@pytest.mark.timeout(600 * FACTOR)
@pytest.mark.slow
def test_any_sequence_does_to_the_device_what_it_does_to_plain_bytes(bench: Bench) -> None:
    Machine.bench = bench
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=SEQUENCES,
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )


class Machine(RuleBasedStateMachine):
    """Jobs are submitted in rules and run whenever `run` says so: what is queued takes effect in order all the same.

    `content` is what each live allocation will hold once everything submitted has run.
    """

    bench: ClassVar[Bench]
    allocations = Bundle("allocations")

    @initialize()
    def begin(self) -> None:
        self.content: dict[str, bytearray] = {}
        self.freed: set[str] = set()
        self.reads: dict[str, bytes] = {}
        self.jobs: list[str] = []
        assert self.bench.standing()["reserved_bytes"] == 0

    def submit(self, kind: Kind, **request: Any) -> dict[str, Any]:
        row = self.bench.submit([(kind, request)])[0]
        self.jobs.append(row["id"])
        return row

    def allocated(self, sizes: list[int], fill: int) -> list[str]:
        """The ids of new allocations; none where together they do not fit."""
        requests = [(Kind.MEMORY_ALLOCATE, {"size_bytes": size, "fill": fill}) for size in sizes]
        rows, refusal = self.bench.attempt(requests)
        if rows is None:
            assert refusal is not None
            assert refusal.code == "insufficient_memory"
            assert sum(map(len, self.content.values())) + sum(sizes) > BUDGET
            return []
        self.jobs += [row["id"] for row in rows]
        ids = [str(row["resource_id"]) for row in rows]
        self.content |= {one: bytearray([fill]) * size for one, size in zip(ids, sizes, strict=True)}
        return ids

    @rule(target=allocations, size=st.integers(1, 4000), fill=st.integers(0, 255))
    def allocate(self, size: int, fill: int) -> Any:
        return multiple(*self.allocated([size], fill))

    @rule(target=allocations, sizes=st.lists(st.integers(1, 500), min_size=2, max_size=6))
    def allocate_many(self, sizes: list[int]) -> Any:
        return multiple(*self.allocated(sizes, 0))

    @rule(allocation=consumes(allocations))
    def deallocate(self, allocation: str) -> None:
        first = self.submit(Kind.MEMORY_DEALLOCATE, allocation_id=allocation)
        again = self.bench.submit([(Kind.MEMORY_DEALLOCATE, {"allocation_id": allocation})])[0]
        assert again["id"] == first["id"]
        del self.content[allocation]
        self.freed.add(allocation)

    @rule(allocation=allocations, data=st.data())
    def write(self, allocation: str, data: st.DataObject) -> None:
        size = len(self.content[allocation])
        offset = data.draw(st.integers(0, size))
        content = data.draw(st.binary(max_size=size - offset + 1))
        blob = self.bench.blob(content)
        fits = offset + len(content) <= size
        if self.accepted(fits, Kind.MEMORY_WRITE, allocation_id=allocation, offset=offset, blob_id=blob):
            self.content[allocation][offset : offset + len(content)] = content

    @rule(allocation=allocations, data=st.data(), value=st.integers(0, 255))
    def clear(self, allocation: str, data: st.DataObject, value: int) -> None:
        size = len(self.content[allocation])
        offset, count = data.draw(st.integers(0, size)), data.draw(st.integers(1, size + 1))
        fits = offset + count <= size
        if self.accepted(
            fits, Kind.MEMORY_CLEAR, allocation_id=allocation, offset=offset, size_bytes=count, value=value
        ):
            self.content[allocation][offset : offset + count] = bytes([value]) * count

    @rule(source=allocations, destination=allocations, data=st.data())
    def copy(self, source: str, destination: str, data: st.DataObject) -> None:
        from_, to = self.content[source], self.content[destination]
        at, onto = data.draw(st.integers(0, len(from_))), data.draw(st.integers(0, len(to)))
        count = data.draw(st.integers(1, min(len(from_), len(to)) + 1))
        fits = at + count <= len(from_) and onto + count <= len(to)
        places = {
            "source": {"allocation_id": source, "offset": at},
            "destination": {"allocation_id": destination, "offset": onto},
        }
        if self.accepted(fits, Kind.MEMORY_COPY, size_bytes=count, **places):
            to[onto : onto + count] = bytes(from_[at : at + count])

    @rule(allocation=allocations, data=st.data())
    def read(self, allocation: str, data: st.DataObject) -> None:
        size = len(self.content[allocation])
        offset, count = data.draw(st.integers(0, size)), data.draw(st.integers(1, size + 1))
        row = self.accepted(
            offset + count <= size, Kind.MEMORY_READ, allocation_id=allocation, offset=offset, size_bytes=count
        )
        if row:
            self.reads[row["id"]] = bytes(self.content[allocation][offset : offset + count])

    @rule(allocation=allocations, value=st.integers(0, 255))
    def write_and_read_all(self, allocation: str, value: int) -> None:
        """Whole allocations have hashes that are remembered, and must be forgotten with the next change."""
        content = bytes([value]) * len(self.content[allocation])
        self.submit(Kind.MEMORY_WRITE, allocation_id=allocation, blob_id=self.bench.blob(content))
        self.content[allocation][:] = content
        self.read_all(allocation)

    @rule(allocation=allocations)
    def read_all(self, allocation: str) -> None:
        row = self.submit(Kind.MEMORY_READ, allocation_id=allocation)
        self.reads[row["id"]] = bytes(self.content[allocation])

    def accepted(self, fits: bool, kind: Kind, **request: Any) -> dict[str, Any] | None:
        """The job where the range lies inside; where it does not, that is what is said."""
        rows, refusal = self.bench.attempt([(kind, request)])
        assert (refusal is None) == fits, refusal
        if rows is None:
            assert refusal is not None
            assert refusal.code == "out_of_range"
            return None
        self.jobs.append(rows[0]["id"])
        return rows[0]

    @rule(count=st.integers(1, 5))
    def run(self, count: int) -> None:
        self.bench.run(limit=count)

    @invariant()
    def the_ledger_agrees_with_itself(self) -> None:
        standing = self.bench.standing()
        assert standing["reserved_bytes"] <= BUDGET
        assert standing["used_bytes"] <= standing["allocated_bytes"]
        assert standing["used_bytes"] == self.bench.resident.device.allocated_bytes

    def teardown(self) -> None:
        if not hasattr(self, "content"):
            return
        self.bench.run()
        for job_id in self.jobs:
            job = self.bench.job(job_id)
            assert job["state"] == State.SUCCEEDED, (job["kind"], job["error"])
            if job_id in self.reads:
                told = job["result"]
                assert bytes(self.bench.blobs.read(told["blob_id"])) == self.reads[job_id]
                assert told["sha256"] == hashlib.sha256(self.reads[job_id]).hexdigest()
        device = self.bench.resident.device
        assert set(self.bench.resident.allocations) == set(self.content)
        for allocation, content in self.content.items():
            assert bytes(device.read(self.bench.resident.allocations[allocation])) == content
            self.bench.submit([(Kind.MEMORY_DEALLOCATE, {"allocation_id": allocation})])
        self.bench.run()
        assert (device.allocated_bytes, device.buffer_count) == (0, 0)
        standing = self.bench.standing()
        assert (standing["reserved_bytes"], standing["used_bytes"], standing["awaiting_bytes"]) == (0, 0, 0)
        for allocation in self.freed:
            with pytest.raises(OperationError, match="freed"):
                self.bench.submit([(Kind.MEMORY_CLEAR, {"allocation_id": allocation})])
