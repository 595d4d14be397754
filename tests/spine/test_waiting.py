"""What a gateway hears by Redis: ends and events wake who waits, and what is neither stops nobody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from api_gateway.submission import waiting
from api_gateway.submission.waiting import Waiters
from tasks.database import open_engine
from tasks.kinds import KINDS
from tasks.redis.publish import Publisher, connect
from tasks.redis.queues import DONE_CHANNEL, job_channel

SECONDS = 10


def view(job_id: str, state: str = "succeeded") -> dict[str, Any]:
    return {"job_id": job_id, "kind": "memory.allocate", "state": state, "result": {"text": "a}\nb"}}


@asynccontextmanager
async def listening(
    redis_url: str, database_url: str, on_models_changed: Callable[[], None] = lambda: None
) -> AsyncIterator[tuple[Waiters, Any]]:
    engine = open_engine(database_url)
    waiters = Waiters(redis_url, engine, on_models_changed)
    client = connect(redis_url)
    waiters.start()
    try:
        async with waiters.awaiting("heard") as heard:
            while not heard.done():
                Publisher(client).done([view("heard")])
                await asyncio.sleep(0.01)
        yield waiters, client
    finally:
        await waiters.stop()
        client.close()
        engine.dispose()


@pytest.fixture(autouse=True)
def _only_by_announcement(monkeypatch: pytest.MonkeyPatch) -> None:
    """The look into the records, which would answer too, is further away than any test waits."""
    monkeypatch.setattr(waiting, "LOOK_SECONDS", 10 * SECONDS)


GARBAGE = [
    b"", b"garbage", b"\xff\xfe\n\0", b"{}", b"5", b"[" * 100_000, b"\n" * 100_000, b"the-job", b"the-job ",
    b"the-job garbage", b"the-job {}", b'the-job {"job_id":"the-job"}', b'the-job x {"job_id":"the-job","kind":"x",',
    b"the-job " + orjson.dumps(view("the-job")), b"the-job x " + orjson.dumps(view("other-job")),
    b"the-job x " + orjson.dumps(view("the-job", "running")), b"the-job x " + orjson.dumps(view("the-job"))[:-1],
    b'the-job x {"job_id":"the-job","kind":"x","state":[]}', b'the-job x {"job_id":["the-job"],"state":"failed"}',
]  # fmt: skip


def test_an_end_wakes_who_waits_whatever_was_announced_before(redis_url: str, database_url: str) -> None:
    async def run() -> None:
        async with listening(redis_url, database_url) as (waiters, client), waiters.awaiting("the-job") as ended:
            for told in GARBAGE:
                client.publish(DONE_CHANNEL, told)
            Publisher(client).done([view("another-job"), view("the-job")])
            assert orjson.loads(await asyncio.wait_for(ended, SECONDS)) == view("the-job")

    asyncio.run(run())


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled", "expired"])
def test_every_way_to_end_is_one(redis_url: str, database_url: str, state: str) -> None:
    async def run() -> None:
        async with listening(redis_url, database_url) as (waiters, client), waiters.awaiting("the-job") as ended:
            Publisher(client).done([view("the-job", state)])
            assert orjson.loads(await asyncio.wait_for(ended, SECONDS))["state"] == state

    asyncio.run(run())


@pytest.mark.parametrize(
    "garbage",
    [
        b"", b"garbage", b"\xff", b"5", b"[]", b"[" * 100_000, b"{}", b'{"event": 5, "data": {}}',
        b'{"event": "state"}', b'{"event": "state", "data": []}', b'{"event": "state\\ndata: x", "data": {}}',
    ],
)  # fmt: skip
def test_an_event_reaches_who_follows_whatever_was_announced_before(
    redis_url: str, database_url: str, garbage: bytes
) -> None:
    async def run() -> None:
        async with (
            listening(redis_url, database_url) as (waiters, client),
            waiters.following("the-job") as told,
            waiters.awaiting("the-job") as ended,
        ):
            while not client.pubsub_numsub(job_channel("the-job"))[0][1]:
                await asyncio.sleep(0.01)
            client.publish(job_channel("the-job"), garbage)
            event = {"event": "progress", "data": {"step": 1}}
            Publisher(client).progress([("the-job", event)])
            assert await asyncio.wait_for(told.get(), SECONDS) == event
            Publisher(client).done([view("the-job")])
            await asyncio.wait_for(ended, SECONDS)

    asyncio.run(run())


def break_subscriptions(client: Any) -> None:
    """Closes the connections that subscribe from this test's database; others share the server."""
    number = client.connection_pool.connection_kwargs["db"]
    mine = [one["id"] for one in client.client_list(_type="pubsub") if int(one["db"]) == number]
    assert mine
    for one in mine:
        client.client_kill_filter(_id=one)


async def until_followed(client: Any, job_id: str) -> None:
    async with asyncio.timeout(SECONDS):
        while not client.pubsub_numsub(job_channel(job_id))[0][1]:
            await asyncio.sleep(0.01)


def test_what_is_followed_and_awaited_is_heard_after_the_connection_broke(redis_url: str, database_url: str) -> None:
    async def run() -> None:
        async with (
            listening(redis_url, database_url) as (waiters, client),
            waiters.following("the-job") as told,
            waiters.awaiting("the-job") as ended,
        ):
            await until_followed(client, "the-job")
            break_subscriptions(client)
            await until_followed(client, "the-job")
            event = {"event": "progress", "data": {"step": 1}}
            Publisher(client).progress([("the-job", event)])
            assert await asyncio.wait_for(told.get(), SECONDS) == event
            Publisher(client).done([view("the-job")])
            await asyncio.wait_for(ended, SECONDS)

    asyncio.run(run())


def test_who_follows_while_there_is_no_connection_is_subscribed_with_the_next(
    redis_url: str, database_url: str
) -> None:
    async def run() -> None:
        async with listening(redis_url, database_url) as (waiters, client):
            break_subscriptions(client)
            async with waiters.following("the-job"):
                await until_followed(client, "the-job")
            async with asyncio.timeout(SECONDS):
                while client.pubsub_numsub(job_channel("the-job"))[0][1]:
                    await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_subscription_that_redis_refuses_is_tried_again(redis_url: str, database_url: str) -> None:
    """As where a user of Redis may not use the channel yet."""

    async def run() -> None:
        with connect(redis_url) as admin:
            admin.execute_command("ACL", "SETUSER", "waiter", "on", "nopass", "~*", "resetchannels", "+@all")
            publisher = Publisher(admin)
            engine = open_engine(database_url)
            waiters = Waiters(redis_url.replace("://", "://waiter:any@"), engine, lambda: None)
            waiters.start()
            try:
                async with waiters.awaiting("the-job") as ended:
                    publisher.done([view("the-job")])
                    await asyncio.wait([ended], timeout=0.3)
                    assert not ended.done()
                    admin.execute_command("ACL", "SETUSER", "waiter", "allchannels")
                    while not ended.done():
                        publisher.done([view("the-job")])
                        await asyncio.wait([ended], timeout=0.05)
            finally:
                await waiters.stop()
                admin.acl_deluser("waiter")
                engine.dispose()

    asyncio.run(asyncio.wait_for(run(), SECONDS))


def test_a_long_announcement_is_heard_that_comes_in_many_pieces(redis_url: str, database_url: str) -> None:
    async def run() -> None:
        async with listening(redis_url, database_url) as (waiters, client), waiters.awaiting("the-job") as ended:
            long = {**view("the-job"), "result": {"text": "x" * (8 << 20)}}
            Publisher(client).done([view("another-job"), long])
            assert orjson.loads(await asyncio.wait_for(ended, SECONDS)) == long

    asyncio.run(run())


def test_stopping_leaves_no_connection(redis_url: str, database_url: str) -> None:
    async def run() -> None:
        async with listening(redis_url, database_url) as (_, client):
            assert client.pubsub_numsub(DONE_CHANNEL)[0][1] == 1
        with connect(redis_url) as again:
            async with asyncio.timeout(SECONDS):
                while again.pubsub_numsub(DONE_CHANNEL)[0][1]:
                    await asyncio.sleep(0.01)

    asyncio.run(run())


@pytest.mark.parametrize("kind", [kind for kind, spec in KINDS.items() if spec.changes_models])
def test_a_load_or_unload_that_no_request_awaits_makes_models_be_read_anew(
    redis_url: str, database_url: str, kind: str
) -> None:
    changed: list[None] = []

    async def run() -> None:
        async with (
            listening(redis_url, database_url, lambda: changed.append(None)) as (waiters, client),
            waiters.awaiting("the-job") as ended,
        ):
            before = len(changed)
            # Neither the order of the view's fields counts nor what a result has in it.
            Publisher(client).done([{"state": "succeeded", "kind": kind, "job_id": "a-load"}])
            Publisher(client).done([{**view("the-job"), "result": {"job_id": "x", "kind": kind}}])
            await asyncio.wait_for(ended, SECONDS)
            assert len(changed) == before + 1

    asyncio.run(run())
