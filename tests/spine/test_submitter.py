"""The gateway's submitter: what is recorded together, and who is told what came of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from api_gateway.submission.submitter import Submitter
from api_gateway.submission.waiting import Awaited
from device_operations.errors import OperationError
from device_operations.jobs import new_id
from tasks.database import open_engine
from tasks.jobs.store import NewJob
from tasks.jobs.submit import Plan
from tasks.redis.publish import Publisher, connect
from tasks.statements import execute, rows


@asynccontextmanager
async def submitter(database_url: str, redis_url: str) -> AsyncIterator[Submitter]:
    client = connect(redis_url)
    made = Submitter(open_engine(database_url), Publisher(client))
    made.start()
    try:
        yield made
    finally:
        await asyncio.to_thread(made.stop)
        client.close()


def plan() -> Plan:
    """A run that takes its planner a while, in which the interpreter is free for others."""
    time.sleep(0.005)
    return Plan(
        NewJob(id=new_id(), kind="inference.run", device_id="cpu_0", queue="device.cpu_0", request={}, owner="default")
    )


def test_requests_that_arrive_in_one_turn_are_recorded_by_one_statement(database_url: str, redis_url: str) -> None:
    async def scenario() -> list[str]:
        async def ask() -> str:
            made = plan()
            await made_with.submit_awaited(made, Awaited())
            return made.job.id

        async with submitter(database_url, redis_url) as made_with:
            ids = await asyncio.gather(*(ask() for _ in range(8)))
            await made_with.recorded()
            return ids

    ids = asyncio.run(scenario())
    with open_engine(database_url).connect() as connection:
        found = rows(connection, "SELECT xmin::text AS by FROM jobs WHERE id = ANY(%(ids)s)", {"ids": ids})
    assert len(found) == 8
    assert len({row["by"] for row in found}) == 1


def test_who_waits_for_the_end_is_told_why_a_job_could_not_be_recorded(databases: object, redis_url: str) -> None:
    async def scenario(url: str) -> None:
        async with submitter(url, redis_url) as made_with:
            ended = Awaited()
            await made_with.submit_awaited(plan(), ended)
            await made_with.recorded()
            assert not ended.done()
            with open_engine(url).connect() as connection:
                execute(connection, "ALTER TABLE jobs RENAME TO elsewhere")
            await made_with.submit_awaited(plan(), ended)
            with pytest.raises(Exception, match="jobs"):
                await asyncio.wait_for(ended, 10)

    with databases.migrated() as url:  # type: ignore[attr-defined]
        asyncio.run(scenario(url))


def test_an_answer_that_is_not_recorded_names_the_database(redis_url: str) -> None:
    async def scenario() -> None:
        async with submitter("postgresql://nobody@127.0.0.1:1/nothing", redis_url) as made_with:
            ended = Awaited()
            await made_with.submit_awaited(plan(), ended)
            with pytest.raises(OperationError) as refused:
                await asyncio.wait_for(ended, 20)
            assert refused.value.code == "database_unavailable"

    asyncio.run(scenario())
