"""Whether the process lives, whether the service can work, and figures for Prometheus."""

from __future__ import annotations

import os
from collections.abc import Iterator

import psutil
import structlog
from fastapi import APIRouter, Request
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry
from redis.exceptions import RedisError
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from api_gateway.gateway import Gateway, of
from api_gateway.submission.answer import json_response
from tasks.jobs import store
from tasks.statements import row

router = APIRouter(tags=["health"])
log = structlog.get_logger(__name__)


@router.get("/healthz")
async def alive() -> Response:
    """The process answers."""
    return json_response({"status": "ok"})


@router.get("/readyz")
async def ready(request: Request) -> Response:
    """200 where PostgreSQL, Redis and at least one device are there, else 503; each part's state in both."""
    parts = await run_in_threadpool(_parts, of(request))
    well = all(part["ok"] for part in parts.values())
    return json_response({"status": "ready" if well else "not ready", **parts}, 200 if well else 503)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Figures in Prometheus' text format, read from the records at each scrape."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(of(request)))
    return Response(await run_in_threadpool(generate_latest, registry), media_type=CONTENT_TYPE_LATEST)


def _parts(gateway: Gateway) -> dict[str, dict[str, object]]:
    parts: dict[str, dict[str, object]] = {}
    try:
        with gateway.engine.connect() as connection:
            row(connection, "SELECT 1")
        devices = gateway.directory.refresh().devices.values()
        parts["postgresql"] = {"ok": True}
        online = [device["device_id"] for device in devices if device["state"] == "online"]
        parts["devices"] = {"ok": bool(online), "online": online, "known": len(devices)}
    except SQLAlchemyError as error:
        parts["postgresql"] = {"ok": False, "error": _line(error)}
        parts["devices"] = {"ok": False, "online": [], "known": None}
    try:
        gateway.redis.ping()
        parts["redis"] = {"ok": True}
    except RedisError as error:
        parts["redis"] = {"ok": False, "error": _line(error)}
    return parts


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


class _Figures(Collector):
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def collect(self) -> Iterator[Metric]:
        """Jobs by kind and state, devices with their queues and memory, this process."""
        with self._gateway.engine.connect() as connection:
            totals = store.totals(connection)
        snapshot = self._gateway.directory.snapshot()
        jobs = GaugeMetricFamily("device_operations_jobs", "Jobs kept, by kind and state.", labels=["kind", "state"])
        for entry in totals:
            jobs.add_metric([entry["kind"], entry["state"]], entry["jobs"])
        yield jobs
        gauges = {
            "online": GaugeMetricFamily("device_operations_device_online", "1 where it takes jobs.", labels=["device"]),
            "queued": GaugeMetricFamily("device_operations_device_queued", "Jobs that wait.", labels=["device"]),
            "running": GaugeMetricFamily("device_operations_device_running", "Jobs that run.", labels=["device"]),
            "free": GaugeMetricFamily("device_operations_device_free_bytes", "Free memory.", labels=["device"]),
            "reserved": GaugeMetricFamily("device_operations_device_reserved_bytes", "Reserved.", labels=["device"]),
            "budget": GaugeMetricFamily("device_operations_device_budget_bytes", "Budget.", labels=["device"]),
        }
        for device_id, device in snapshot.devices.items():
            counts = snapshot.counts.get(device_id, {})
            gauges["online"].add_metric([device_id], float(device["state"] == "online"))
            gauges["queued"].add_metric([device_id], counts.get("queued", 0))
            gauges["running"].add_metric([device_id], counts.get("running", 0))
            sizes: dict[str, int | None] = {
                "free": device["free_bytes"], "reserved": device["reserved_bytes"], "budget": device["budget_bytes"],
            }  # fmt: skip
            for name, size in sizes.items():
                if size is not None:
                    gauges[name].add_metric([device_id], size)
        yield from gauges.values()
        resident = GaugeMetricFamily("device_operations_gateway_resident_bytes", "Memory of this process.")
        resident.add_metric([], psutil.Process(os.getpid()).memory_info().rss)
        yield resident
