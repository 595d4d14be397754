"""Pixels that the device makes itself are the host's, bit for bit, and no values come to the host for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from device_operations.errors import OperationError
from tests.devices.torch_on_cpu import TorchOnCpu
from tests.pipelines.driving import context, made, opened
from tests.support.pipelines import export_vae, tiny_vae
from workers.devices.base import Device
from workers.devices.cpu import CpuDevice
from workers.pipelines import images
from workers.pipelines.base import Parts

EVERY_HALF = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
SINGLES = np.concatenate(
    [np.linspace(-1.5, 1.5, (1 << 16) - 4, dtype=np.float32), np.float32([np.nan, np.inf, -np.inf, -0.0])]
)


@pytest.mark.parametrize("values", [EVERY_HALF, SINGLES], ids=["every float16", "float32"])
def test_a_device_makes_the_pixels_that_the_host_makes(values: np.ndarray) -> None:
    image = np.stack([values, values[::-1], np.roll(values, 7)]).reshape(3, 128, 512)
    kept = image.copy()
    there = images.pixels_on_device(torch.from_numpy(image))
    assert (there.values.dtype, there.values.shape) == (np.uint8, (128, 512, 3))
    assert np.array_equal(there.values, images.to_pixels(image))
    assert len(np.unique(there.values)) == 256
    assert np.array_equal(image.view(np.uint8), kept.view(np.uint8)), "what the graph gave is left as it was"
    assert there.finite is images.pixels_of(image).finite is False
    numbers = np.nan_to_num(image, posinf=1, neginf=-1)
    assert images.pixels_on_device(torch.from_numpy(numbers)).finite is images.pixels_of(numbers).finite is True


@pytest.mark.parametrize("device", [CpuDevice, TorchOnCpu])
@pytest.mark.parametrize("half", [False, True])
def test_a_decoders_image_is_the_same_by_the_device_and_by_the_host(
    half: bool, device: type[Device], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = tiny_vae(shift_factor=0.05)
    pipeline = opened("vae", export_vae(vae.half() if half else vae, tmp_path, encoder=False), device())
    latents = np.random.default_rng(4).standard_normal((2, 4, 16, 24), np.float32) * np.float32(0.3)

    def decoded(**more: Any) -> list[np.ndarray]:
        return [image.pixels for image in made(pipeline, context(more, {"latents": latents})).images]

    there = decoded()
    with monkeypatch.context() as patch:
        patch.setattr(images, "pixels_of", _never)
        assert np.array_equal(decoded(), there), "the device makes the pixels"
    monkeypatch.setattr(Parts, "binds", False)
    monkeypatch.setattr(images, "pixels_on_device", _never)
    assert np.array_equal(decoded(), there)
    assert np.std(there) > 5
    assert np.abs(np.stack(decoded(tile="always", tile_size=16)).astype(int) - np.stack(there)).mean() < 20


def test_a_decoder_that_overflows_is_said_where_the_device_makes_the_pixels(
    sdxl_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = opened("sdxl", sdxl_folder)
    asked = {"prompt": "a cat", "seed": 1, "steps": 2, "width": 32, "height": 32}
    made(pipeline, context(asked))
    through = images.pixels_on_device

    def overflown(values: torch.Tensor) -> images.Pixels:
        broken = values.clone()
        broken[1, 3, 5] = float("inf")
        return through(broken)

    monkeypatch.setattr(images, "pixels_on_device", overflown)
    with pytest.raises(OperationError, match="not finite"):
        made(pipeline, context(asked))


def _never(values: object) -> images.Pixels:
    raise AssertionError("the other way makes the pixels")
