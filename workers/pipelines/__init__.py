"""Pipelines: models made of several graphs and what stands between them. One file each, one entry in `PIPELINES`.

    read      the configuration and each graph's head are read and checked; nothing is loaded
    open      the graphs (parts) are opened on the device
    run       a generator of steps: between two of them the device's thread may run something more urgent

What a run of each type gives is said in `device_operations.requests.pipelines.RUNS`, which the gateway checks. A
pipeline's module is imported when the first of its type is loaded: it may need libraries of the extra `pipelines`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from device_operations.errors import failure

if TYPE_CHECKING:
    from workers.pipelines.base import Pipeline

#: Where the class of each type of model is.
PIPELINES: dict[str, str] = {
    "vae": "workers.pipelines.vae:VaePipeline",
    "sdxl": "workers.pipelines.sdxl:SdxlPipeline",
    "text_embedding": "workers.pipelines.text_embedding:TextEmbeddingPipeline",
}


def read(model_type: str, source: Path, root: Path, options: Mapping[str, Any]) -> Pipeline:
    """The pipeline whose folder, or single graph, is `source`, read and checked; nothing of it is loaded.

    No file outside `root` is read. Raises `model_invalid`.
    """
    return _class_of(model_type).read(source, root, options)


def _class_of(model_type: str) -> type[Pipeline]:
    place = PIPELINES.get(model_type)
    if place is None:
        raise failure("model_invalid", f"this worker cannot load models of type {model_type!r}")
    module, _, name = place.partition(":")
    try:
        found: type[Pipeline] = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise failure(
            "model_invalid",
            f"models of type {model_type!r} need {error.name}, which is not installed on this worker: "
            "pip install 'device-operations-server[pipelines]'",
        ) from error
    except AttributeError as error:  # diffusers 0.41 and later with torch before 2.6
        raise failure(
            "model_invalid",
            f"models of type {model_type!r}: the libraries of this worker do not go together: {error}. Install the "
            "versions of its lock file (requirements/)",
        ) from error
    return found
