"""Which allocations a request names, whether they are its caller's and usable, and whether its ranges lie inside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection

from device_operations.errors import failure, from_job_error
from device_operations.tensors import FIXED_DTYPES, Tensor
from tasks.memory import allocations as store
from tasks.memory.rows import KnownAllocation
from tasks.owners import absent, found
from tasks.planning.context import Context


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes of an allocation that a job will use; `size_bytes` None is the rest from `offset`."""

    allocation_id: str
    offset: int = 0
    size_bytes: int | None = None


def check_allocations(context: Context, ranges: Iterable[Range]) -> Mapping[str, KnownAllocation]:
    """The allocations that another noun's request names, by id, once owner, state and every range are known to fit.

    Raises `allocation_not_found`, `allocation_lost`, `out_of_range`. Whether they lie on the job's device is for the
    caller to see (`device_id`).
    """
    wanted = list(ranges)
    known = find_many(context, [one.allocation_id for one in wanted])
    for one in wanted:
        check_range(known[one.allocation_id], one)
    return known


def ranges_of(tensors: Mapping[str, Tensor], what: str = "input {!r}") -> dict[str, Range]:
    """The range of each tensor that lies in an allocation, by the tensor's name, which errors put into `what`.

    Raises `dtype_unsupported` for text, whose elements have no fixed size.
    """
    ranges = {}
    for name, tensor in tensors.items():
        if tensor.allocation_id is None:
            continue
        if tensor.dtype not in FIXED_DTYPES:
            raise failure("dtype_unsupported", f"{what.format(name)}: {tensor.dtype} has no place in an allocation")
        ranges[name] = Range(tensor.allocation_id, tensor.offset, tensor.size_bytes)
    return ranges


def check_tensors(
    context: Context, tensors: Mapping[str, Tensor], device_id: str, what: str = "input {!r}"
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The allocations that hold tensors, in order of id, and the device of each tensor that lies elsewhere, by name.

    Raises for allocations that are not the caller's, are gone, or end before their tensor does.
    """
    ranges = ranges_of(tensors, what)
    if not ranges:
        return (), {}
    known = check_allocations(context, ranges.values())
    lying = {name: str(known[one.allocation_id]["device_id"]) for name, one in ranges.items()}
    return tuple(sorted(known)), {name: there for name, there in lying.items() if there != device_id}


def forget_hashes(connection: Connection, allocation_ids: Iterable[str]) -> None:
    """Another noun's job is about to change these allocations' bytes."""
    store.forget_sha256(connection, list(allocation_ids))


def find(context: Context, allocation_id: str) -> KnownAllocation:
    """A usable allocation of the caller's: pending or active."""
    return find_many(context, [allocation_id])[allocation_id]


def find_many(context: Context, allocation_ids: Sequence[str]) -> Mapping[str, KnownAllocation]:
    """Several usable allocations of the caller's, by id; the first that is not usable is refused by its code."""
    if not allocation_ids:
        return {}
    with context.engine.connect() as connection:
        known: Mapping[str, KnownAllocation] = store.get_many(connection, set(allocation_ids))
    if context.earlier is not None:
        known = {**context.earlier.allocations, **known}
    for allocation_id in allocation_ids:
        there = found(context, known.get(allocation_id), "allocation", allocation_id)
        if there["state"] not in ("pending", "active"):
            raise gone(allocation_id, there)
    return known


def check_range(allocation: KnownAllocation, wanted: Range) -> int:
    """The bytes of the range, known to lie inside the allocation; else `out_of_range`."""
    there = allocation["size_bytes"]
    size = int(there - wanted.offset) if wanted.size_bytes is None else wanted.size_bytes
    if wanted.offset + size > there or (wanted.size_bytes is None and size <= 0):
        raise failure(
            "out_of_range",
            f"allocation {allocation['allocation_id']} has {there} bytes; {max(size, 0)} from offset {wanted.offset} "
            "do not lie inside",
            detail={"offset": wanted.offset, "size_bytes": max(size, 0), "allocation_bytes": there},
        )
    return size


def gone(allocation_id: str, there: KnownAllocation | None) -> Exception:
    """Why an allocation cannot be used."""
    if there is None:
        return absent("allocation", allocation_id)
    if there["state"] == "lost":
        return failure(
            "allocation_lost",
            f"allocation {allocation_id} was lost with the worker of {there['device_id']}; allocate and write it again",
        )
    if there["state"] == "failed" and there["error"]:
        error = from_job_error(there["error"])
        error.message = f"allocation {allocation_id} failed: {error.message}"
        error.args = (error.message,)
        return error
    return failure("allocation_not_found", f"allocation {allocation_id} was freed")
