"""The FastAPI application: routes put together, and what starts and stops with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version

import structlog
from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from api_gateway import documents, gateway, problems
from api_gateway.background.reaper import Reaper
from api_gateway.oip import service as oip
from api_gateway.openai import routes as openai_routes
from api_gateway.routes import blobs, devices, health, inference, jobs, memory, pages, training
from device_operations import collector
from device_operations.settings import Settings

log = structlog.get_logger(__name__)

#: Seconds between two refreshes of what planners know of devices and models.
REFRESH_SECONDS = 0.5


def create_app(settings: Settings) -> FastAPI:
    """The application for one process."""
    app = FastAPI(
        title="device-operations",
        version=_version(),
        description="Jobs on GPUs for a whole team: memory, inference, training.",
        lifespan=_lifespan,
    )
    app.state.settings = settings
    problems.install(app)
    documents.install(app)
    for part in (health, jobs, devices, memory, inference, training, blobs, pages):
        app.include_router(part.router)
    oip.install(app)
    openai_routes.install(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    made = gateway.build(app.state.settings)
    app.state.gateway = made
    reaper = Reaper(made.engine, made.publisher, made.blobs, made.settings, made.outbox)
    made.submitter.start()
    made.outbox.start()
    made.waiters.start()
    reaper.start()
    refresher = asyncio.create_task(_refresh(made))
    collector.spare()
    try:
        yield
    finally:
        refresher.cancel()
        await run_in_threadpool(reaper.stop)
        await made.waiters.stop()
        await run_in_threadpool(made.submitter.stop)
        await run_in_threadpool(made.outbox.stop)
        made.redis.close()
        made.engine.dispose()


async def _refresh(made: gateway.Gateway) -> None:
    """Keeps the directory fresh, so that requests plan without a read."""
    while True:
        try:
            await run_in_threadpool(made.directory.refresh)
        except SQLAlchemyError as error:
            log.warning("directory not refreshed", error=str(error).splitlines()[0])
        await asyncio.sleep(REFRESH_SECONDS)


def _version() -> str:
    try:
        return version("device-operations")
    except PackageNotFoundError:
        return "0"
