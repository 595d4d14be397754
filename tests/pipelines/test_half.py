"""A whole pipeline in float16 on the CPU, text encoders too; and the export of it that no runtime takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_operations.errors import OperationError
from tests.pipelines.conftest import base_scheduler
from tests.pipelines.driving import context, made, opened
from tests.support.pipelines import export_sdxl, tiny_sdxl

ASKED: dict[str, Any] = {"prompt": "a photo of a cat", "seed": 1, "steps": 4, "width": 32, "height": 32}


def exported(folder: Path, attention: str) -> Path:
    """The tiny pipeline with all its modules in float16; `attention` is how its text encoders compute theirs."""
    modules = {name: module.half() for name, module in tiny_sdxl().items()}
    for name in ("text_encoder", "text_encoder_2"):
        modules[name].set_attn_implementation(attention)
    return export_sdxl(modules, folder, base_scheduler())


def test_a_pipeline_in_float16_makes_nearly_the_image_of_float32(sdxl_folder: Path, tmp_path: Path) -> None:
    pipeline = opened("sdxl", exported(tmp_path, "eager"))
    assert {part["dtype"] for part in pipeline.parts.facts()} == {"float16"}
    half, whole = (
        made(one, context(ASKED)).images[0].pixels.astype(int) for one in (pipeline, opened("sdxl", sdxl_folder))
    )
    assert whole.std() > 5
    assert 0 < np.abs(half - whole).mean() < 2
    assert np.abs(half - whole).max() <= 16
    frugal = opened("sdxl", tmp_path, low_memory=True)
    assert np.array_equal(made(frugal, context(ASKED)).images[0].pixels, half)


def test_text_encoders_that_were_exported_with_mixed_types_are_refused_by_name(tmp_path: Path) -> None:
    # torch's tracer writes the scale of its fused attention in float32 into a graph of float16.
    folder = exported(tmp_path, "sdpa")
    with pytest.raises(OperationError, match=r"^text_encoder: .*float16") as raised:
        opened("sdxl", folder)
    assert raised.value.code == "model_invalid"
