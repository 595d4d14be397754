"""Device memory over HTTP, as a user meets it."""

from __future__ import annotations

import base64
import hashlib
import random

import httpx
import pytest

from tests.memory.calls import Memory, refused
from tests.support.stack import RunningStack, eventually

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def memory(stack: RunningStack) -> Memory:
    return Memory(stack)


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def test_everything_submitted_without_waiting_takes_effect_in_order(memory: Memory) -> None:
    before = memory.device()
    data = noise(70_000)
    first = memory.allocate(size_bytes=100_000)["resource"]["id"]
    second = memory.allocate(shape=[100, 500], dtype="uint16", fill=7)["resource"]["id"]
    memory.write(first, data, offset=10)
    memory.copy(first, second, 70_000, at=10, to=100)
    memory.clear(second, value=0xAB, offset=50, size_bytes=100)
    expected = bytes([7] * 50 + [0xAB] * 100) + data[50:] + bytes([7] * (100_000 - 70_100))
    content = memory.read(second)
    jobs = [memory.deallocate(first), memory.deallocate(second)]
    assert content == expected
    for job in jobs:
        memory.done(job)
    after = memory.device()
    for figure in ("reserved_bytes", "used_bytes", "allocation_count"):
        assert after[figure] == before[figure]


def test_what_is_allocated_is_zeroed_or_filled_whatever_was_there_before(memory: Memory) -> None:
    for size in (1, 4097, 3 << 20):
        first = memory.made(size_bytes=size, fill=0xEE)
        assert memory.read(first) == b"\xee" * size
        memory.done(memory.deallocate(first))
        second = memory.made(size_bytes=size)
        assert memory.read(second) == bytes(size)
        memory.done(memory.deallocate(second))


def test_ranges_are_read_with_their_digest_and_only_ranges_that_lie_inside(memory: Memory) -> None:
    data = noise(9_000_001)
    allocation = memory.made(size_bytes=len(data))
    memory.done(memory.write(allocation, data))
    assert memory.allocation(allocation)["sha256"] == hashlib.sha256(data).hexdigest()
    address = f"/api/memory/data/{allocation}"
    answer = memory.client.get(address, params={"offset": 4_000_000, "size_bytes": 4_500_000})
    part = data[4_000_000:8_500_000]
    assert answer.content == part
    digest = base64.b64encode(hashlib.sha256(part).digest()).decode()
    assert answer.headers["digest"] == f"sha-256={digest}"
    assert memory.client.get(address).content == data
    memory.done(memory.clear(allocation, offset=5, size_bytes=1, value=1))
    assert memory.allocation(allocation)["sha256"] is None
    assert memory.read(allocation, offset=4, size_bytes=3) == data[4:5] + b"\x01" + data[6:7]
    for outside in ({"offset": len(data)}, {"offset": 1, "size_bytes": len(data)}, {"offset": 2**63 - 1}):
        refused(memory.client.get(address, params=outside), 422, "out_of_range")
    refused(memory.client.put(address, params={"offset": 1}, content=data), 422, "out_of_range")
    memory.deallocate(allocation)


@pytest.mark.parametrize("change", ["clear", "write", "copy"])
def test_a_digest_that_was_known_is_never_told_of_bytes_that_changed(memory: Memory, change: str) -> None:
    allocation, other = memory.made(size_bytes=5000), memory.made(size_bytes=5000, fill=1)
    memory.done(memory.write(allocation, noise(5000)))
    if change == "clear":
        memory.clear(allocation, offset=1, size_bytes=1, value=9)
    elif change == "write":
        memory.write(allocation, b"other", offset=7)
    else:
        memory.copy(other, allocation, 10)
    answer = memory.client.get(f"/api/memory/data/{allocation}")
    assert answer.headers["x-content-sha256"] == hashlib.sha256(answer.content).hexdigest()
    assert memory.allocation(allocation)["sha256"] == answer.headers["x-content-sha256"]
    for one in (allocation, other):
        memory.done(memory.deallocate(one))


def test_overlapping_copies_within_one_allocation_are_as_memmove(memory: Memory) -> None:
    data = noise(1000)
    allocation = memory.made(size_bytes=1000)
    memory.write(allocation, data)
    memory.copy(allocation, allocation, 900, at=0, to=50)
    expected = bytearray(data)
    expected[50:950] = data[:900]
    assert memory.read(allocation) == expected
    memory.copy(allocation, allocation, 900, at=100, to=0)
    expected[0:900] = bytes(expected[100:1000])
    assert memory.read(allocation) == expected
    memory.copy(allocation, allocation)
    assert memory.read(allocation) == expected
    memory.deallocate(allocation)


def test_a_wrong_digest_writes_nothing(memory: Memory) -> None:
    allocation = memory.made(size_bytes=5)
    address = f"/api/memory/data/{allocation}"
    wrong = base64.b64encode(hashlib.sha256(b"other").digest()).decode()
    for headers in ({"Digest": f"sha-256={wrong}"}, {"Content-Digest": f"sha-256=:{wrong}:"}):
        refused(memory.client.put(address, content=b"hello", headers=headers), 422, "checksum_mismatch")
    refused(memory.client.put(address, content=b"hello", params={"sha256": "00" * 32}), 422, "checksum_mismatch")
    assert memory.read(allocation) == bytes(5)
    right = hashlib.sha256(b"hello").hexdigest()
    answer = memory.client.put(address, content=b"hello", params={"sha256": right}, headers={"Prefer": "wait=20"})
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")
    assert memory.read(allocation) == b"hello"
    blob = memory.client.post("/api/blobs", content=b"world").json()
    job = {"kind": "memory.write", "request": {"allocation_id": allocation, "blob_id": blob["blob_id"]}}
    job["request"] |= {"sha256": right}
    refused(memory.client.post("/api/jobs", json={"jobs": [job]}), 422, "checksum_mismatch")
    memory.deallocate(allocation)


def test_a_callers_own_id_is_idempotent_while_the_allocation_lives(memory: Memory) -> None:
    first = memory.allocate(size_bytes=4096, allocation_id="mine", label="cache")
    again = memory.allocate(size_bytes=4096, allocation_id="mine", label="cache")
    assert again["job_id"] == first["job_id"]
    other = memory.client.post("/api/memory/allocate", json={"size_bytes": 4097, "allocation_id": "mine"})
    refused(other, 409, "allocation_exists")
    memory.done(first)
    waited = memory.client.post(
        "/api/memory/allocate",
        json={"size_bytes": 4096, "allocation_id": "mine", "label": "cache"},
        headers={"Prefer": "wait=5"},
    )
    assert (waited.status_code, waited.json()["job_id"]) == (200, first["job_id"])
    memory.done(memory.deallocate("mine"))
    anew = memory.allocate(size_bytes=4096, allocation_id="mine", label="cache")
    assert anew["job_id"] != first["job_id"]
    memory.done(anew)
    memory.done(memory.deallocate("mine"))


def test_freeing_twice_is_the_first_job_again_or_not_found(memory: Memory) -> None:
    allocation = memory.made(size_bytes=64)
    first = memory.deallocate(allocation)
    again = memory.client.delete(f"/api/memory/deallocate/{allocation}")
    assert again.status_code == 404 or again.json()["job_id"] == first["job_id"]
    memory.done(first)
    refused(memory.client.delete(f"/api/memory/deallocate/{allocation}"), 404, "allocation_not_found")
    refused(memory.client.get(f"/api/memory/data/{allocation}"), 404, "allocation_not_found")
    refused(memory.client.post(f"/api/memory/clear/{allocation}"), 404, "allocation_not_found")
    assert memory.allocation(allocation)["state"] == "freed"


def test_what_was_queued_after_a_deallocation_fails_as_not_found(memory: Memory) -> None:
    allocation = memory.allocate(size_bytes=64)["resource"]["id"]
    freed = memory.deallocate(allocation)
    late = memory.client.post(f"/api/memory/clear/{allocation}")
    memory.done(freed)
    if late.status_code == 202:
        memory.failed(late.json(), "allocation_not_found")
    else:
        refused(late, 404, "allocation_not_found")


def test_the_quota_and_the_budget_refuse_before_anything_is_queued(memory: Memory) -> None:
    too_large = memory.client.post("/api/memory/allocate", json={"size_bytes": 25 * 2**30})
    assert refused(too_large, 422, "allocation_too_large")["detail"].count(str(24 * 2**30)) == 1
    budget = memory.device()["budget_bytes"]
    jobs = [{"kind": "memory.allocate", "request": {"size_bytes": 2**30}}] * (budget // 2**30 + 1)
    before = memory.device()["reserved_bytes"]
    told = refused(memory.client.post("/api/jobs", json={"jobs": jobs}), 507, "insufficient_memory")
    assert str(len(jobs) * 2**30) in told["detail"]
    assert memory.device()["reserved_bytes"] == before


def test_a_failed_allocation_fails_what_needs_it_with_its_code_at_once(memory: Memory, stack: RunningStack) -> None:
    held = memory.made(size_bytes=1 << 20)
    doomed = memory.allocate(size_bytes=4096, job={"delay_seconds": 3600})
    allocation = doomed["resource"]["id"]
    needing = [memory.write(allocation, b"x"), memory.copy(allocation, held, 10), memory.clear(allocation)]
    needing.append(memory.deallocate(allocation))
    assert memory.client.delete(f"/api/jobs/{doomed['job_id']}").status_code == 202
    for job in needing:
        memory.failed(job, "cancelled")
    assert memory.allocation(allocation)["state"] == "failed"
    refused(memory.client.get(f"/api/memory/data/{allocation}"), 409, "cancelled")
    memory.done(memory.deallocate(held))
    assert memory.device()["reserved_bytes"] == 0


def test_an_allocation_whose_time_is_up_is_freed_unless_renewed(memory: Memory) -> None:
    short = memory.made(size_bytes=4096, ttl_seconds=1)
    kept = memory.made(size_bytes=4096, ttl_seconds=1.5)
    renewed = memory.client.post(f"/api/memory/renew/{kept}", json={"ttl_seconds": 600})
    assert renewed.status_code == 200
    assert renewed.json()["expires_at"] > memory.allocation(short)["expires_at"]
    eventually(lambda: memory.allocation(short)["state"] == "freed", seconds=15)
    eventually(lambda: memory.device()["allocation_count"] == 1, seconds=5)
    assert memory.allocation(kept)["state"] == "active"
    assert memory.read(kept) == bytes(4096)
    memory.done(memory.deallocate(kept))
    refused(memory.client.post(f"/api/memory/renew/{kept}", json={"ttl_seconds": 1}), 404, "allocation_not_found")


def test_status_map_and_list_tell_what_lies_where(memory: Memory) -> None:
    large, small = memory.made(size_bytes=1 << 20, label="large"), memory.made(size_bytes=1 << 10)
    device = memory.client.get("/api/memory/device/cpu_0", params={"map": True}).json()
    assert [(thing["type"], thing["id"], thing["size_bytes"], thing["label"]) for thing in device["map"]] == [
        ("allocation", large, 1 << 20, "large"),
        ("allocation", small, 1 << 10, None),
    ]
    status = memory.client.get("/api/memory/status").json()["devices"]
    assert [entry["device_id"] for entry in status] == ["cpu_0"]
    entry = status[0]
    assert entry["state"] == "online"
    assert entry["reserved_bytes"] == entry["used_bytes"] == (1 << 20) + (1 << 10)
    assert entry["by_owner"] == {"default": (1 << 20) + (1 << 10)}
    assert entry["peak_bytes"] >= entry["reserved_bytes"]
    assert (entry["models_bytes"], entry["training_bytes"], entry["allocation_count"]) == (0, 0, 2)
    listed = memory.client.get("/api/memory/allocations", params={"state": "active", "limit": 1}).json()
    assert [one["allocation_id"] for one in listed["allocations"]] == [small]
    following = {"state": "active", "limit": 1, "cursor": listed["next_cursor"]}
    rest = memory.client.get("/api/memory/allocations", params=following).json()
    assert ([one["allocation_id"] for one in rest["allocations"]], rest["next_cursor"]) == ([large], None)
    refused(memory.client.get("/api/memory/device/gpu_9"), 404, "device_not_found")
    for allocation in (large, small):
        memory.done(memory.deallocate(allocation))


def test_a_read_as_a_job_gives_a_blob_that_can_be_written_elsewhere(memory: Memory) -> None:
    data = noise(200_000)
    first, second = memory.made(size_bytes=len(data)), memory.made(size_bytes=len(data))
    memory.write(first, data)
    job = {"kind": "memory.read", "request": {"allocation_id": first, "offset": 10, "size_bytes": 100_000}}
    read = memory.client.post("/api/jobs", json={"jobs": [job]}).json()["jobs"][0]
    told = memory.done(read)["result"]
    assert told["sha256"] == hashlib.sha256(data[10:100_010]).hexdigest()
    assert memory.client.get(f"/api/blobs/{told['blob_id']}").content == data[10:100_010]
    write = {"allocation_id": second, "offset": 3, "blob_id": told["blob_id"], "sha256": told["sha256"]}
    answer = memory.client.post("/api/jobs", json={"jobs": [{"kind": "memory.write", "request": write}]})
    memory.done(answer.json()["jobs"][0])
    assert memory.read(second, size_bytes=100_003) == bytes(3) + data[10:100_010]
    memory.deallocate(first)
    memory.deallocate(second)


def test_bytes_that_only_pass_through_leave_no_blob_behind(memory: Memory, stack: RunningStack) -> None:
    folder = stack.folder / "data" / "blobs"
    data = noise(3_000_000)
    allocation = memory.made(size_bytes=len(data))
    memory.done(memory.write(allocation, data))
    read = {path.name for path in folder.glob("blobs/*/*")}
    assert memory.read(allocation) == data
    eventually(lambda: {path.name for path in folder.glob("blobs/*/*")} <= read, seconds=5)
    memory.deallocate(allocation)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"size_bytes": 0},
        {"size_bytes": -1},
        {"size_bytes": 2**63},
        {"size_bytes": 10**30},
        {"size_bytes": 1.5},
        {"size_bytes": "1"},
        {"size_bytes": 16, "shape": [4], "dtype": "float32"},
        {"shape": [4]},
        {"dtype": "float32"},
        {"shape": [0], "dtype": "float32"},
        {"shape": [2**40, 2**40], "dtype": "float64"},
        {"shape": [2], "dtype": "string"},
        {"size_bytes": 16, "fill": 256},
        {"size_bytes": 16, "fill": -1},
        {"size_bytes": 16, "ttl_seconds": 0},
        {"size_bytes": 16, "allocation_id": ""},
        {"size_bytes": 16, "allocation_id": "a/b"},
        {"size_bytes": 16, "allocation_id": "x" * 101},
        {"size_bytes": 16, "label": "\x00"},
        {"size_bytes": 16, "surprise": 1},
    ],
)
def test_a_bad_allocation_is_refused_by_name(memory: Memory, body: dict[str, object]) -> None:
    refused(memory.client.post("/api/memory/allocate", json=body), 422, "validation_failed")


def test_ranges_that_overflow_64_bits_are_refused(memory: Memory) -> None:
    allocation = memory.made(size_bytes=100)
    most = 2**63 - 1
    for body, code in [
        ({"offset": most, "size_bytes": most}, "out_of_range"),
        ({"offset": 1, "size_bytes": most}, "out_of_range"),
        ({"offset": 100}, "out_of_range"),
        ({"offset": 2**63}, "validation_failed"),
        ({"offset": -1}, "validation_failed"),
        ({"size_bytes": 0}, "validation_failed"),
        ({"value": 256}, "validation_failed"),
    ]:
        refused(memory.client.post(f"/api/memory/clear/{allocation}", json=body), 422, code)
    place = {"allocation_id": allocation, "offset": most}
    for body in (
        {"source": place, "destination": {"allocation_id": allocation}, "size_bytes": most},
        {"source": {"allocation_id": allocation}, "destination": place},
        {"source": {"allocation_id": allocation}, "destination": {"allocation_id": allocation}, "size_bytes": 101},
    ):
        refused(memory.client.post("/api/memory/copy", json=body), 422, "out_of_range")
    for parameters in ({"offset": 2**63}, {"offset": -1}, {"size_bytes": 0}):
        answer = memory.client.get(f"/api/memory/data/{allocation}", params=parameters)
        refused(answer, 422, "validation_failed")
    memory.deallocate(allocation)


def test_unknown_ids_are_not_found_on_every_route(memory: Memory) -> None:
    client = memory.client
    known = memory.made(size_bytes=10)
    unknown = {"allocation_id": "nobody-has-this"}
    for answer in (
        client.delete("/api/memory/deallocate/nobody-has-this"),
        client.post("/api/memory/clear/nobody-has-this"),
        client.put("/api/memory/data/nobody-has-this", content=b"x"),
        client.get("/api/memory/data/nobody-has-this"),
        client.get("/api/memory/allocations/nobody-has-this"),
        client.post("/api/memory/renew/nobody-has-this", json={"ttl_seconds": 5}),
        client.post("/api/memory/copy", json={"source": unknown, "destination": {"allocation_id": known}}),
        client.post("/api/memory/copy", json={"destination": unknown, "source": {"allocation_id": known}}),
    ):
        refused(answer, 404, "allocation_not_found")
    refused(client.post("/api/memory/allocate", json={"size_bytes": 1, "device_id": "gpu_7"}), 404, "device_not_found")
    memory.deallocate(known)


def test_a_write_with_an_idempotency_key_is_made_once(memory: Memory) -> None:
    allocation = memory.made(size_bytes=10)
    address, key = f"/api/memory/data/{allocation}", {"Idempotency-Key": "write-1"}
    first = memory.client.put(address, content=b"0123456789", headers=key).json()
    again = memory.client.put(address, content=b"0123456789", headers=key).json()
    assert again["job_id"] == first["job_id"]
    refused(memory.client.put(address, content=b"9876543210", headers=key), 409, "idempotency_conflict")
    memory.done(first)
    assert memory.read(allocation) == b"0123456789"
    memory.deallocate(allocation)


def test_an_offline_gateway_is_not_needed_to_see_that_every_figure_is_a_number_or_null(memory: Memory) -> None:
    entry = memory.client.get("/api/memory/status").json()["devices"][0]
    for figure, value in entry.items():
        if figure.endswith("_bytes"):
            assert value is None or value >= 0
    assert isinstance(memory.client, httpx.Client)
