"""The request that goes to a place with a given id: everything else in it is the caller's own, and fits."""

from __future__ import annotations

import copy
import re
from typing import Any

import httpx

from tests.owners.places import BULK, Place
from tests.owners.things import BATCH, FLOATS, LATENTS, NETWORK, Things

#: What the addresses need as well as the id that is tried.
_ADDRESS = {"model_version": "1"}


def send(things: Things, place: Place, thing_id: str) -> httpx.Response:
    """Asks as the owner of `things`, naming `thing_id` in the place."""
    method, address = place.route.split(" ")
    noun_of = {"allocation_id": "allocation", "session_id": "training session"}
    for name in re.findall(r"{(\w+)}", address):
        own = _ADDRESS.get(name) or things.ids.get(noun_of.get(name, "model name"), "")
        value = thing_id if place.where == "path" and place.keys == (name,) else own
        address = address.replace(f"{{{name}}}", value)
    query = {place.keys[0]: thing_id} if place.where == "query" else None
    content = _content(things, place, thing_id)
    if content is None:
        return things.client.request(method, address, params=query, content=b"" if method == "GET" else None)
    return things.client.request(method, address, params=query, json=content)


def _content(things: Things, place: Place, thing_id: str) -> Any:
    """The JSON body; None where the route takes none."""
    if place.where == "body":
        body = _changed(things, place, thing_id)
        return {"jobs": [{"kind": place.kind, "request": body}]} if place.route == BULK else body
    if place.route.endswith("/infer"):
        return _infer()
    if place.route.startswith("POST /api/memory/renew/"):
        return {"ttl_seconds": 5}
    return {} if place.route.startswith("POST ") else None


def _changed(things: Things, place: Place, thing_id: str) -> dict[str, Any]:
    """A body that fits, with the id put into its place."""
    body = _base(things, place)
    at: Any = body
    for key, following in zip(place.keys[:-1], place.keys[1:], strict=True):
        if key == "[]":
            at.append({})
            at = at[-1]
            continue
        name = next(iter(at)) if key == "{}" else key
        at = at.setdefault(name, [] if following == "[]" else {})
    last = place.keys[-1]
    if "dtype" in at:
        for source in ("data", "blob_id", "allocation_id"):
            at.pop(source, None)
    if last == "[]":
        at.append(thing_id)
    elif last == "{}":
        at["model.onnx"] = thing_id
    else:
        at[last] = thing_id
    return body


def _base(things: Things, place: Place) -> dict[str, Any]:
    """The body of a request of the owner's own things, less what cannot go with the place."""
    ids = things.ids
    if place.route.endswith("/infer"):
        return _infer()
    at_allocation = {"allocation_id": ids["allocation"]}
    in_training, own_model = {"session_id": ids["training session"]}, {"model_id": ids["model"]}
    bodies: dict[str, dict[str, Any]] = {
        "Allocate": {"size_bytes": 16},
        "Copy": {"source": {**at_allocation}, "destination": {**at_allocation}},
        "Clear": at_allocation, "Read": at_allocation, "Deallocate": at_allocation,
        "Write": at_allocation | {"blob_id": ids["blob"]},
        "LoadModel": {"name": "another", "source": {"blob_id": ids["blob"]}},
        "Run": own_model | {"inputs": {"x": FLOATS, "before": FLOATS}},
        "VaeRun": {"model_id": ids["vae"]} | ({} if place.keys[0].startswith("image") else {"latents": LATENTS}),
        "SdxlRun": {"model_id": ids["sdxl"], "prompt": "a cat", "steps": 1},
        "TextEmbeddingRun": {"model_id": ids["text_embedding"], "texts": ["a text"]},
        "UnloadModel": own_model | {"force": True},
        "OpenSession": own_model | {"state": {"total": "before"}, "initial": {"before": FLOATS}},
        "CloseSession": {"session_id": ids["inference session"]},
        "Initialize": NETWORK,
        "Step": in_training | BATCH,
        "Checkpoint": in_training,
        "Validate": in_training | BATCH,
        "EndSession": in_training,
        "EmbeddingsRequest": {"model": ids["model name"], "input": "a text"},
        "ImagesRequest": {"model": ids["model name"], "prompt": "a lighthouse"},
    }  # fmt: skip
    # Routes whose body is nothing but `job` have no schema of their own; the address names the rest.
    body = copy.deepcopy(bodies[place.request] if place.request else {})
    if place.route.startswith("POST /api/memory/clear/"):
        body = {}
    if place.keys[0] == "into":
        body["into"] = {"total": {}}
    elif place.keys[0] == "dataset":
        content = {name: body.pop(name) for name in BATCH}
        body["dataset"] = {"batch_size": 1, "epochs": 1} | ({} if place.keys[1] == "blob_id" else content)
    elif place.keys[0] == "source" and place.request == "LoadModel":
        body["source"] = {}
    elif place.request == "Initialize" and place.keys[0] == "model":
        body["model"] = {"kind": "onnx"}
    elif place.request == "VaeRun" and place.keys == ("image", "allocation_id"):
        body["image"] = copy.deepcopy(LATENTS)
    elif place.keys == ("checkpoint_id",):
        del body["session_id"]
    elif place.keys == ("model_name",):
        del body["model_id"]
    return body


def _infer() -> dict[str, Any]:
    tensor = {"shape": [1], "datatype": "FP32", "data": [1.0]}
    return {"inputs": [{"name": "x", **tensor}, {"name": "before", **tensor}]}
