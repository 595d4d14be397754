"""Jobs that are submitted and awaited within one request, whose answer is the job's result and not the job.

performed              while the client stays: its run is cancelled when it leaves
performed_to_the_end   also if the client leaves: loads, and what an Idempotency-Key may find again
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import orjson
from fastapi import Request
from starlette.concurrency import run_in_threadpool

from api_gateway.gateway import Gateway
from api_gateway.submission.answer import read_row
from device_operations.errors import OperationError, error_of, failure, from_job_error
from device_operations.jobs import TERMINAL, State
from device_operations.wire.json_types import FreeJson
from tasks.jobs import lifecycle, store
from tasks.jobs.submit import Plan, Promise
from tasks.statements import Row

#: Seconds for which the connection is not watched for a client that leaves.
UNWATCHED_SECONDS = 0.05

#: The status for a client that has left; it is never read.
CLIENT_CLOSED_REQUEST = 499


async def performed(request: Request, gateway: Gateway, made: Plan, patience_seconds: float | None) -> FreeJson | None:
    """The succeeded job; None where the client has left, whose run is cancelled. Raises what the job failed with."""
    job_id = made.job.id
    ended = gateway.waiters.expect(job_id)
    try:
        await gateway.submitter.submit_awaited(made, ended)
        try:
            text = await _ended(request, ended, patience_seconds)
        except _GivenUpError as given_up:
            if given_up.answer is None:
                return None
            raise given_up.answer from None
        finally:
            if not ended.done() or ended.cancelled() or isinstance(ended.exception(), _GivenUpError):
                await asyncio.shield(_cancel(gateway, job_id))
    finally:
        gateway.waiters.forget(job_id, ended)
    job: FreeJson = ended.job or orjson.loads(text)
    if job["state"] == State.EXPIRED:
        raise failure("timeout", f"the run had not started after {patience_seconds} s (parameters.timeout)")
    return _succeeded(job)


async def performed_to_the_end(gateway: Gateway, made: Plan, promise: Promise | None = None) -> FreeJson:
    """The succeeded job, which goes on if the client leaves. Raises what the job failed with.

    Under a `promise` that was used before it is the earlier job, and `made` is not submitted.
    """
    async with gateway.waiters.awaiting(made.job.id) as ended:
        row = (await gateway.submitter.submit([made], promise, awaited=promise is None))[0]
        if row["id"] == made.job.id:
            ended.recorded = True
            return _succeeded(orjson.loads(await ended))
    return await ended_job(gateway, row["id"])


async def ended_job(gateway: Gateway, job_id: str) -> FreeJson:
    """The succeeded job that was submitted before, once it has ended. Raises what it failed with."""
    async with gateway.waiters.awaiting(job_id) as ended:
        row = await read_row(gateway, job_id)
        return _succeeded({**store.view(row)} if row["state"] in TERMINAL else orjson.loads(await ended))


def cancel(gateway: Gateway, job_id: str) -> Row:
    """Cancels a job that waits, or wakes the worker of one that runs; `job_finished` once it has ended."""
    rows = lifecycle.cancel(gateway.engine, gateway.publisher, [job_id])
    gateway.outbox.cancelled(rows)
    for row in rows:
        if row["id"] == job_id:
            return row
    with gateway.engine.connect() as connection:
        ended = store.get(connection, job_id)
    raise failure("job_finished", f"job {job_id} has ended: it is {ended['state'] if ended else 'gone'}")


def _succeeded(job: FreeJson) -> FreeJson:
    if job["state"] != State.SUCCEEDED:
        raise from_job_error(error_of(job["error"], job["state"], "the job"))
    return job


async def _cancel(gateway: Gateway, job_id: str) -> None:
    """Cancels a run that is not awaited any more, once it is recorded: before, there is nothing to cancel."""
    with suppress(OperationError):
        await gateway.submitter.recorded()
        await run_in_threadpool(cancel, gateway, job_id)


class _GivenUpError(Exception):
    """The wait for the run's end is over: the client has left, or is given `answer`."""

    def __init__(self, answer: OperationError | None = None) -> None:
        super().__init__()
        self.answer = answer


async def _ended(request: Request, ended: asyncio.Future[bytes], patience_seconds: float | None) -> bytes:
    """Waits for the run's end, for the client to leave, or as long as it has patience.

    Most runs end so soon that looking out for a client that leaves would cost more than it could save.
    """
    loop = ended.get_loop()
    watch: list[asyncio.Task[None]] = []
    timers = [loop.call_later(UNWATCHED_SECONDS, _begin_to_watch, request, ended, watch)]
    if patience_seconds is not None:
        waited = f"{patience_seconds} s (parameters.timeout)"
        late = failure("timeout", f"the run had not ended after {waited}, and was cancelled")
        timers.append(loop.call_later(patience_seconds, _give_up, ended, late))
    try:
        return await ended
    finally:
        for timer in timers:
            timer.cancel()
        for task in watch:
            task.cancel()


def _begin_to_watch(request: Request, ended: asyncio.Future[bytes], watch: list[asyncio.Task[None]]) -> None:
    watch.append(ended.get_loop().create_task(_look_out(request, ended)))


async def _look_out(request: Request, ended: asyncio.Future[bytes]) -> None:
    """Gives up when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        continue
    _give_up(ended)


def _give_up(ended: asyncio.Future[bytes], answer: OperationError | None = None) -> None:
    if not ended.done():
        ended.set_exception(_GivenUpError(answer))
