"""The tiny random SDXL on the genuine DirectML provider: each graph and the whole pipeline, beside the CPU provider.

`run.sh` has `tests.directml.exports` make the pipeline on Linux and names the folder in PIPELINES.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.directml.exports import REQUESTS
from workers.devices import Device
from workers.devices.onnx.runtime import LoadedGraph

if "PIPELINES" not in os.environ:
    pytest.skip("make test-directml runs it, with the exports of tests.directml.exports", allow_module_level=True)

FOLDER = Path(os.environ["PIPELINES"])
PARTS = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder")

#: Largest difference from the CPU provider's output, as a share of that output's largest value.
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray[Any, Any]]:
    with np.load(FOLDER / "expected.npz") as kept:
        return {name: kept[name] for name in kept.files}


@pytest.fixture(scope="module", params=PARTS)
def part(request: pytest.FixtureRequest, device: Device) -> Iterator[tuple[str, LoadedGraph]]:
    model = device.open_model(FOLDER / "sdxl" / request.param / "model.onnx")
    yield request.param, model
    model.close()


def test_a_part_gives_what_it_gives_on_the_cpu(
    part: tuple[str, LoadedGraph], expected: dict[str, np.ndarray[Any, Any]]
) -> None:
    name, model = part
    assert model.provider == "DmlExecutionProvider"
    cases = {key.split("/")[1] for key in expected if key.startswith(f"{name}/")}
    assert cases
    for case in sorted(cases):
        given, wanted = (
            {key.split("/", 3)[3]: value for key, value in expected.items() if key.startswith(f"{name}/{case}/{way}/")}
            for way in ("in", "out")
        )
        came = model.run(given)
        assert came.keys() == wanted.keys()
        for output, value in wanted.items():
            apart = np.abs(np.asarray(came[output], np.float32) - value).max() / np.abs(value).max()
            print(f"{name} {case} {output}: {apart:.2e} of the largest; {model.cpu_fallback_ops} operators on the CPU")
            assert value.std() > 0
            assert apart < TOLERANCE


@pytest.mark.parametrize("low_memory", [False, True])
def test_the_whole_pipeline_makes_the_image_that_it_makes_on_the_cpu(
    low_memory: bool, device: Device, expected: dict[str, np.ndarray[Any, Any]]
) -> None:
    from tests.pipelines.driving import context, made, opened

    pipeline = opened("sdxl", FOLDER / "sdxl", device, low_memory=low_memory)
    try:
        for case, request in REQUESTS.items():
            image = made(pipeline, context(request)).images[0].pixels.astype(int)
            apart = np.abs(image - expected[f"image/{case}"])
            print(f"{case}: {apart.max()} of 255 at most, {apart.mean():.4f} on average")
            assert image.std() > 5
            assert apart.max() <= 1
    finally:
        pipeline.close()
