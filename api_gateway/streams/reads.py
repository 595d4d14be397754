"""A read's bytes on their way to the caller: through a ring from a worker of this machine, or from a blob.

    offer a ring ─▶ submit ─▶ the first piece is the hash ─▶ pieces ─▶ (the rest from a blob, where the caller is slow)
                          └─▶ no worker attached: the job's result names a blob

A worker elsewhere, or one that cannot attach, writes a blob as any other read does.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import orjson
import structlog
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from api_gateway.gateway import Gateway
from api_gateway.submission.answer import accepted, promised_row
from device_operations.errors import OperationError, error_of, from_job_error
from device_operations.wire.json_types import FreeJson
from tasks.blobs import records as blob_store
from tasks.blobs.ring import Ring
from tasks.blobs.store import CHUNK_BYTES
from tasks.jobs.submit import Plan

log = structlog.get_logger(__name__)

#: Pieces whose bytes the server may still have to send once it asks for the next: it waits until nearly all of the
#: last is out before it takes another, so the one before that is out.
HELD = 2

#: Seconds between two looks at an empty ring: at first, and at most, where the device has other work.
LOOK_SECONDS = (0.0002, 0.02)


async def answer(gateway: Gateway, plan: Plan, wait_seconds: float) -> Response:
    """Submits a read and streams what it reads; 202 with the job where the device does not get to it in time."""
    ring = None
    if plan.job.request["size_bytes"] > CHUNK_BYTES:
        ring = await run_in_threadpool(gateway.rings.offer)
    async with AsyncExitStack() as held:
        if ring is not None:
            held.callback(gateway.rings.take_back, ring)
            plan.job.request["ring"] = ring.name
        ended = await held.enter_async_context(gateway.waiters.awaiting(plan.job.id))
        await gateway.submitter.submit([plan], None, awaited=True)
        ended.recorded = True
        if not await _came(ring, ended, wait_seconds) and (ring is None or ring.withdraw()):
            return accepted(await promised_row(gateway, plan.job.id))
        await _came(ring, ended, None)
        piece = ring.piece() if ring is not None else None
        if ring is not None and piece is not None:
            sha256 = bytes(piece).decode()
            piece.release()
            ring.forget_name()
            ring.taken()
        else:
            sha256 = _result(ended)["sha256"]
            ring = None
        return Passing(gateway, plan, ring, ended, sha256, held.pop_all())


class Passing(StreamingResponse):
    """A read's bytes. However the connection ends, nothing of them is left behind."""

    def __init__(
        self, gateway: Gateway, plan: Plan, ring: Ring | None, ended: asyncio.Future[bytes], sha256: str,
        held: AsyncExitStack,
    ) -> None:  # fmt: skip
        self._gateway = gateway
        self._ring = ring
        self._ended = ended
        self._plan = plan
        self._size = plan.job.request["size_bytes"]
        self._held = held
        digest = base64.b64encode(bytes.fromhex(sha256)).decode()
        headers = {
            "Content-Length": str(self._size),
            "Digest": f"sha-256={digest}",
            "Repr-Digest": f"sha-256=:{digest}:",
            "X-Content-SHA256": sha256,
            "X-Job-Id": plan.job.id,
        }
        super().__init__(self._bytes(), 200, headers, "application/octet-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends everything. Nothing in the clean-up is waited for: the caller may have left."""
        try:
            await super().__call__(scope, receive, send)
        except OperationError as error:
            # The head is out. The server cuts off a body that ends short of its length.
            log.warning("a read broke off", job_id=self._plan.job.id, code=error.code, error=error.message)
        finally:
            await self._held.aclose()
            if self._ended.done() and self._ended.exception() is None:
                job_result = orjson.loads(self._ended.result())["result"] or {}
                if job_result.get("blob_id"):
                    asyncio.get_running_loop().run_in_executor(None, _drop, self._gateway, job_result["blob_id"])

    async def _bytes(self) -> AsyncIterator[bytes | memoryview]:
        done = 0
        if self._ring is not None:
            async for piece in self._pieces(self._ring):
                done += len(piece)
                yield piece
        if done < self._size:
            job_result = _result(self._ended)
            async for block in self._gateway.blobs.stream(job_result["blob_id"], 0, self._size - done):
                yield block

    async def _pieces(self, ring: Ring) -> AsyncIterator[memoryview]:
        """What comes through the ring, until all has come or the job has ended."""
        done = held = 0
        while done < self._size:
            if not await _came(ring, self._ended, None, held):
                return
            piece = ring.piece(held)
            if piece is None:
                return
            done += len(piece)
            yield piece
            held += 1
            if held > HELD:
                ring.taken()
                held -= 1


async def _came(ring: Ring | None, ended: asyncio.Future[bytes], seconds: float | None, ahead: int = 0) -> bool:
    """Waits for the ring's next piece or the job's end; False where the time is up first."""
    if ring is not None and ring.piece(ahead) is not None:
        return True
    began = time.monotonic()
    pause, longest = LOOK_SECONDS
    while not ended.done():
        left = None if seconds is None else seconds - (time.monotonic() - began)
        if left is not None and left <= 0:
            return False
        if ring is None:
            await asyncio.wait([ended], timeout=left)
            continue
        await asyncio.wait([ended], timeout=pause)
        if ring.piece(ahead) is not None:
            return True
        pause = min(longest, pause * 1.1)
    return True


def _result(ended: asyncio.Future[bytes]) -> FreeJson:
    """The ended job's result, or what it failed with."""
    job = orjson.loads(ended.result())
    if job["state"] != "succeeded":
        raise from_job_error(error_of(job["error"], job["state"], "the read"))
    job_result: FreeJson = job["result"]
    return job_result


def _drop(gateway: Gateway, blob_id: str) -> None:
    with gateway.engine.connect() as connection:
        if blob_store.delete(connection, blob_id):
            gateway.blobs.delete(blob_id)
