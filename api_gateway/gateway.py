"""What one gateway process is made of, made once at its start and handed to every route."""

from __future__ import annotations

from dataclasses import dataclass

import redis
from fastapi import Request
from sqlalchemy import Engine

from api_gateway.streams.rings import Rings
from api_gateway.submission.rates import Rates
from api_gateway.submission.submitter import Submitter
from api_gateway.submission.waiting import Waiters
from device_operations.settings import Settings
from tasks.blobs.store import BlobStore
from tasks.blobs.transients import Transients
from tasks.celery_bridge.outbox import Outbox
from tasks.database import open_engine
from tasks.devices.directory import Directory
from tasks.planning.context import Context
from tasks.redis.publish import Publisher, connect


@dataclass(frozen=True, slots=True)
class Caller:
    """The owner that an API key stands for. Without keys every caller is the owner `default`, and may act for any."""

    owner: str
    admin: bool


@dataclass(slots=True)
class Gateway:
    """One process's connections and helpers."""

    settings: Settings
    engine: Engine
    redis: redis.Redis
    publisher: Publisher
    directory: Directory
    blobs: BlobStore
    transients: Transients
    waiters: Waiters
    submitter: Submitter
    rings: Rings
    rates: Rates
    outbox: Outbox

    def context(self, caller: Caller) -> Context:
        """What planners need to know of the caller and the world."""
        return Context(self.engine, self.settings, self.directory, self.blobs, caller.owner, caller.admin)


def build(settings: Settings) -> Gateway:
    """Opens everything; nothing connects before it is used."""
    engine = open_engine(settings.require_database_url(), pool_size=10, max_overflow=30)
    client = connect(settings.require_redis_url())
    publisher = Publisher(client)
    blobs = BlobStore(str(settings.blobs.url))
    directory = Directory(engine, settings)
    return Gateway(
        settings=settings,
        engine=engine,
        redis=client,
        publisher=publisher,
        directory=directory,
        blobs=blobs,
        transients=Transients(blobs),
        waiters=Waiters(settings.require_redis_url(), engine, directory.expire),
        submitter=Submitter(engine, publisher),
        rings=Rings(settings.require_database_url()),
        rates=Rates(settings.http.rate_limit_per_second),
        outbox=Outbox(engine, settings.require_redis_url()),
    )


def of(request: Request) -> Gateway:
    """The gateway of a request's process."""
    found: object = request.app.state.gateway
    assert isinstance(found, Gateway)
    return found
