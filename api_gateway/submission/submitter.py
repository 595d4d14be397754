"""Submitting from many requests at once: what arrived while the last statement committed shares the next one.

Plans without resources to order, predecessors or records of their own (an inference run, mostly) go through one
thread: one INSERT for all that wait, one pipelined publish. Everything else is a transaction of its own.

What the event loop read in one turn is handed in together: a statement, a message and a claim for one job alone cost
three processes several times what a job more in each does.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import Engine
from starlette.concurrency import run_in_threadpool

from api_gateway.submission.waiting import Awaited
from device_operations.errors import OperationError, failure
from tasks.database import unavailable
from tasks.jobs import queue_limit, store, submit
from tasks.jobs.model import JobRow
from tasks.jobs.store import NewJob
from tasks.jobs.submit import Plan, Promise
from tasks.redis.publish import Publisher
from tasks.statements import Relaxed, Row, execute, transaction

log = structlog.get_logger(__name__)

#: Jobs in one INSERT at most.
AT_ONCE = 500


@dataclass(slots=True)
class _Waiting:
    plans: Sequence[Plan]
    #: Whether the caller waits for the end in this very request: nothing was promised before the answer.
    awaited: bool
    loop: asyncio.AbstractEventLoop
    #: What is given the rows, or the reason why there are none.
    future: asyncio.Future[Any]
    #: Whether the future is given the rows; the one of a job's end is not.
    wants_rows: bool = True


class Submitter:
    """Records and publishes plans. `submit` may be awaited by any number of requests at once."""

    def __init__(self, engine: Engine, publisher: Publisher) -> None:
        self._engine = engine
        self._publisher = publisher
        self._arrived: list[_Waiting] = []
        #: What arrived in each turn of the event loop; None at last.
        self._queue: queue.SimpleQueue[list[_Waiting] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._record_until_stopped, name="submitter", daemon=True)
        self._relaxed = Relaxed(engine)

    def start(self) -> None:
        """Begins to take plans."""
        self._thread.start()

    def stop(self) -> None:
        """Records what is left, then ends."""
        self._queue.put(None)
        self._thread.join(timeout=10)

    async def submit(self, plans: Sequence[Plan], promise: Promise | None, *, awaited: bool = False) -> list[Row]:
        """Records all of `plans` or none, publishes them, and gives their rows in order."""
        if promise is None and all(_is_simple(plan) for plan in plans) and len(plans) <= AT_ONCE:
            loop = asyncio.get_running_loop()
            future: asyncio.Future[list[Row]] = loop.create_future()
            self._arrive(_Waiting(plans, awaited, loop, future))
            return await future
        try:
            return await run_in_threadpool(
                submit.submit, self._engine, self._publisher, plans, promise, relaxed=awaited and promise is None
            )
        except Exception as error:
            raise unavailable(error) from error

    async def submit_awaited(self, plan: Plan, ended: Awaited) -> None:
        """The same for one whose caller waits for the job's end in this very request.

        May come back before the job is recorded: `ended` is given the error if it cannot be. `recorded` waits for that.
        """
        if _is_simple(plan):
            self._arrive(_Waiting([plan], True, ended.get_loop(), ended, wants_rows=False))
        else:
            await self.submit([plan], None, awaited=True)
            ended.recorded = True

    async def recorded(self) -> None:
        """Returns once what was submitted before is recorded, or refused."""
        await self.submit([], None, awaited=True)

    def _arrive(self, waiting: _Waiting) -> None:
        """Hands in at the end of the event loop's turn: what arrives together is recorded together."""
        self._arrived.append(waiting)
        if len(self._arrived) == 1:
            waiting.loop.call_soon(self._hand_in)

    def _hand_in(self) -> None:
        arrived, self._arrived = self._arrived, []
        self._queue.put(arrived)

    def _record_until_stopped(self) -> None:
        stopped = False
        while not stopped:
            arrived = self._queue.get()
            waiting: list[_Waiting] = []
            # All that is there, in statements of a bounded size.
            while arrived is not None:
                waiting += arrived
                try:
                    arrived = self._queue.get_nowait()
                except queue.Empty:
                    break
            else:
                stopped = True
            while waiting:
                together = _first(waiting)
                del waiting[: len(together)]
                try:
                    answers: list[list[JobRow] | OperationError] | list[Exception] = self._record(together)
                except Exception as error:  # noqa: BLE001 - handed to each of the requests that wait
                    answers = [unavailable(error)] * len(together)
                _answer(together, answers)

    def _record(self, together: list[_Waiting]) -> list[list[Row] | OperationError]:
        plans = [plan for waiting in together for plan in waiting.plans]
        relaxed = all(waiting.awaited for waiting in together)
        groups = [[plan.job for plan in waiting.plans] for waiting in together]
        recorded = self._insert(groups, relaxed) if plans else [[] for _ in groups]
        submit.publish(self._publisher, plans, [row for rows in recorded if isinstance(rows, list) for row in rows])
        answers: list[list[JobRow] | OperationError] = []
        for waiting, rows in zip(together, recorded, strict=True):
            if isinstance(rows, OperationError):
                answers.append(rows)
                continue
            if len(rows) != len(waiting.plans):
                raise failure("internal_error", "a new job's id was taken")
            if isinstance(waiting.future, Awaited):
                waiting.future.recorded = True
            by_id = {row["id"]: row for row in rows} if len(rows) > 1 else {}
            answers.append([by_id[plan.job.id] for plan in waiting.plans] if by_id else rows)
        return answers

    def _insert(self, groups: list[list[NewJob]], relaxed: bool) -> list[list[Row] | OperationError]:
        """One INSERT, once more after a broken connection. A 202 never comes from a relaxed one."""
        for attempt in (1, 2):
            try:
                if relaxed:
                    found = self._relaxed.run(lambda connection: queue_limit.insert_far(connection, groups))
                else:
                    with self._engine.connect() as connection:
                        found = queue_limit.insert_far(connection, groups)
                answers: list[list[JobRow] | OperationError] = [] if found is None else list(found)
                if found is None:
                    with transaction(self._engine) as connection:
                        if relaxed:
                            execute(connection, "SET LOCAL synchronous_commit = off")
                        answers = queue_limit.insert_near(connection, groups)
                return answers if attempt == 1 else self._completed(groups, answers)
            except Exception as error:
                if attempt == 2 or unavailable(error) is error:
                    raise
        raise AssertionError("unreachable")

    def _completed(
        self, groups: list[list[NewJob]], answers: list[list[JobRow] | OperationError]
    ) -> list[list[Row] | OperationError]:
        """The answers, with what an earlier attempt recorded before its connection broke. The ids are ours alone."""
        with self._engine.connect() as connection:
            known = store.get_many(connection, [job.id for group in groups for job in group])
        return [
            [known[job.id] for job in group] if all(job.id in known for job in group) else answer
            for group, answer in zip(groups, answers, strict=True)
        ]


def _first(waiting: list[_Waiting]) -> list[_Waiting]:
    """Those of `waiting` that go into the next statement: the first, and more up to `AT_ONCE` jobs."""
    count = 0
    for number, one in enumerate(waiting):
        if count >= AT_ONCE:
            return waiting[:number]
        count += len(one.plans)
    return waiting[:]


def _is_simple(plan: Plan) -> bool:
    return plan.record is None and plan.together is None and not plan.exclusive and not plan.job.after


def _answer(together: list[_Waiting], answers: Sequence[list[Row] | Exception]) -> None:
    """Hands each request its rows or its error, with one wake-up of the event loop; none if no request waits."""
    handed = [
        (waiting, answer)
        for waiting, answer in zip(together, answers, strict=True)
        if waiting.wants_rows or isinstance(answer, BaseException)
    ]

    def hand_over() -> None:
        for waiting, answer in handed:
            if waiting.future.done():
                continue
            if isinstance(answer, BaseException):
                waiting.future.set_exception(answer)
            else:
                waiting.future.set_result(answer)

    if handed:
        together[0].loop.call_soon_threadsafe(hand_over)
