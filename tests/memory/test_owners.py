"""Whose memory is whose: keys stand for owners, and what is another's is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.memory.calls import Memory, refused
from tests.support.stack import RunningStack

KEYS = "ada:key-of-ada,bob:key-of-bob,root:key-of-root:admin"


Of = Callable[[str], Memory]


@pytest.fixture(scope="module")
def of(databases: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Of]:
    """The memory routes as one owner sees them."""
    with databases.migrated() as url:
        folder = tmp_path_factory.mktemp("owners")
        running = RunningStack(folder, url, databases.redis_url(), "cpu:1", settings={"API_KEYS": KEYS})
        try:
            running.start()
            running.wait_ready()
            with ExitStack() as closing:

                def seen_by(owner: str) -> Memory:
                    headers = {"X-API-Key": f"key-of-{owner}"}
                    client = httpx.Client(base_url=running.http_url, headers=headers, timeout=60, trust_env=False)
                    return Memory(running, closing.enter_context(client))

                yield seen_by
        finally:
            running.close()


def test_anothers_allocation_is_not_found_on_any_route(of: Of) -> None:
    ada, bob, root = of("ada"), of("bob"), of("root")
    mine, his = ada.made(size_bytes=64, allocation_id="adas", label="secret"), bob.made(size_bytes=64)
    place = {"allocation_id": mine}
    client = bob.client
    for answer in (
        client.delete(f"/api/memory/deallocate/{mine}"),
        client.post(f"/api/memory/clear/{mine}"),
        client.put(f"/api/memory/data/{mine}", content=b"x"),
        client.get(f"/api/memory/data/{mine}"),
        client.get(f"/api/memory/allocations/{mine}"),
        client.post(f"/api/memory/renew/{mine}", json={"ttl_seconds": 5}),
        client.post("/api/memory/copy", json={"source": place, "destination": {"allocation_id": his}}),
        client.post("/api/memory/copy", json={"source": {"allocation_id": his}, "destination": place}),
    ):
        refused(answer, 404, "allocation_not_found")
    taken = refused(client.post("/api/memory/allocate", json={"size_bytes": 64, "allocation_id": mine}), 409,
                    "allocation_exists")  # fmt: skip
    assert "ada" not in taken["detail"].replace("'adas'", "")
    assert [one["allocation_id"] for one in client.get("/api/memory/allocations").json()["allocations"]] == [his]
    refused(client.get("/api/memory/allocations", params={"owner": "ada"}), 403, "forbidden")
    seen = client.get("/api/memory/device/cpu_0", params={"map": True}).json()
    assert [(thing["owner"], thing["id"], thing["label"]) for thing in seen["map"]] == [("bob", his, None)]
    assert (seen["by_owner"], seen["others_bytes"], seen["allocated_bytes"]) == ({"bob": 64}, 64, 128)
    (listed,) = client.get("/api/memory/status").json()["devices"]
    assert (listed["by_owner"], listed["others_bytes"]) == ({"bob": 64}, 64)
    everything = root.client.get("/api/memory/device/cpu_0", params={"map": True}).json()
    assert {(thing["owner"], thing["id"], thing["label"]) for thing in everything["map"]} == {
        ("ada", mine, "secret"), ("bob", his, None),
    }  # fmt: skip
    assert (everything["by_owner"], everything["others_bytes"]) == ({"ada": 64, "bob": 64}, 0)
    assert root.read(mine) == bytes(64)
    root.done(root.deallocate(mine))
    bob.done(bob.deallocate(his))


def test_an_admin_allocates_for_an_owner_and_nobody_else_does(of: Of) -> None:
    ada, bob, root = of("ada"), of("bob"), of("root")
    body = {"size_bytes": 10, "job": {"owner": "ada"}}
    refused(bob.client.post("/api/memory/allocate", json=body), 403, "forbidden")
    allocation = root.made(**body)
    assert ada.allocation(allocation)["owner"] == "ada"
    ada.done(ada.deallocate(allocation))


def test_what_a_freed_allocation_held_is_not_what_the_next_owner_reads(of: Of) -> None:
    ada, bob = of("ada"), of("bob")
    for size in (16, 4096, 1 << 20, 24 << 20):
        mine = ada.allocate(size_bytes=size, fill=0x5A)["resource"]["id"]
        ada.done(ada.deallocate(mine))
        his = bob.allocate(size_bytes=size)["resource"]["id"]
        assert bob.read(his) == bytes(size)
        bob.done(bob.deallocate(his))


def test_anothers_blob_cannot_be_written_into_ones_own_allocation(of: Of) -> None:
    ada, bob = of("ada"), of("bob")
    blob = ada.client.post("/api/blobs", content=b"secret").json()["blob_id"]
    his = bob.made(size_bytes=6)
    job = {"kind": "memory.write", "request": {"allocation_id": his, "blob_id": blob}}
    refused(bob.client.post("/api/jobs", json={"jobs": [job]}), 404, "blob_not_found")
    bob.done(bob.deallocate(his))
