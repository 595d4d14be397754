"""The HTTP client of device-operations: `Client`, and `AsyncClient` with the same methods to be awaited.

with Client() as client:
    job = client.inference.load_model("minilm", {"path": "minilm/model.onnx"})
    outputs = client.inference.run({"input_ids": ids}, model_id=job.resource.id).outputs

calls.py          what one request to the gateway is made of, and the commands of flows
exchange.py       one call until it is answered: retries, and errors by their code
operations.py     how a method that is written once serves both clients
submission.py     how a job is submitted and awaited
jobs.py           jobs: submit, wait, list, follow, cancel
blobs.py, devices.py, memory.py, inference.py, embeddings.py, images.py, training.py      one file per noun
arrays.py         NumPy arrays as tensors, and back
sync.py, asynchronous.py    the two clients
"""

from __future__ import annotations

from device_operations.client.asynchronous import AsyncClient
from device_operations.client.blobs import Blob
from device_operations.client.embeddings import Embedded
from device_operations.client.images import ImagesResult, MadeImage
from device_operations.client.inference import RunResult
from device_operations.client.jobs import Event
from device_operations.client.sync import Client

__all__ = ["AsyncClient", "Blob", "Client", "Embedded", "Event", "ImagesResult", "MadeImage", "RunResult"]
