"""The tables, one module for each noun, under one MetaData that migrations are checked against."""

from tasks.records.base import metadata
from tasks.records.blobs import blobs
from tasks.records.devices import device_budgets, device_samples, devices
from tasks.records.inference import graphs, inference_sessions, models
from tasks.records.jobs import idempotency, jobs, resource_order
from tasks.records.memory import allocations
from tasks.records.training import checkpoints, training_history, training_sessions, training_steps

__all__ = [
    "allocations",
    "blobs",
    "checkpoints",
    "device_budgets",
    "device_samples",
    "devices",
    "graphs",
    "idempotency",
    "inference_sessions",
    "jobs",
    "metadata",
    "models",
    "resource_order",
    "training_history",
    "training_sessions",
    "training_steps",
]
