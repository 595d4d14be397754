"""What the vae pipeline computes: tiles and the whole, halves alone, scales, formats of pictures, fp16, big weights."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from device_operations.errors import OperationError, failure
from tests.pipelines.conftest import png
from tests.pipelines.driving import context, made, opened
from tests.support.pipelines import export_vae, tiny_vae, write_json
from workers.devices.cpu import CpuDevice
from workers.devices.onnx.runtime import LoadedGraph
from workers.pipelines import images
from workers.pipelines.base import Pipeline
from workers.pipelines.diffusion import normalisations
from workers.pipelines.diffusion.tiles import Tiling, mapped


@pytest.fixture(scope="module")
def pipeline(vae_folder: Path) -> Pipeline:
    return opened("vae", vae_folder)


def latents_of(height: int, width: int, count: int = 1) -> np.ndarray:
    """Latents of the scale that a diffusion model leaves."""
    return torch.randn(count, 4, height, width, generator=torch.Generator().manual_seed(3)).numpy() * 0.2


def decoded(pipeline: Pipeline, latents: np.ndarray, **more: Any) -> np.ndarray:
    run = context({"output_format": "tensor", **more}, {"latents": latents})
    return np.asarray(made(pipeline, run).outputs["image"])


def encoded(pipeline: Pipeline, picture: np.ndarray, **more: Any) -> np.ndarray:
    run = context({"image": {"blob_id": "b"}, **more}, files={"b": png(picture)})
    return np.asarray(made(pipeline, run).outputs["latents"])


def smooth(height: int, width: int) -> np.ndarray:
    """A picture with colours that change slowly, and edges."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 17) + np.cos(y / 23), np.sin((x + y) / 31), (x // 40 + y // 30) % 2], axis=2)
    return ((waves - waves.min()) / np.ptp(waves) * 255).astype(np.uint8)


@pytest.mark.parametrize("seed", [0, 1])
def test_tiles_make_the_image_that_the_whole_makes(seed: int, tmp_path: Path) -> None:
    pipeline = opened("vae", export_vae(tiny_vae(seed, shift_factor=0.05), tmp_path, encoder=False))
    latents = latents_of(84, 112)
    whole = decoded(pipeline, latents, tile="never")
    tiled = decoded(pipeline, latents, tile="always", tile_size=128)
    assert tiled.shape == whole.shape == (1, 3, 168, 224)
    pixels = [images.to_pixels(one[0]).astype(int) for one in (whole, tiled)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 2
    assert pixels[0].std() > 30
    # Seams would show as steps from one column to the next that the whole does not have.
    steps = [np.abs(np.diff(one, axis=1)).mean(axis=(0, 2)) for one in pixels]
    assert np.abs(steps[0] - steps[1]).max() < 0.5


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """An autoencoder of SDXL's depth: eight pixels a side for each latent, attention in its middle block."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8, 16, 16), layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4,
        sample_size=64,
    )  # fmt: skip
    return opened("vae", export_vae(vae.eval(), tmp_path_factory.mktemp("deep")))


@pytest.mark.parametrize("tile_size", [640, 512, 256])
def test_tiles_are_the_whole_whatever_their_size(tile_size: int, deep: Pipeline) -> None:
    latents = latents_of(96, 80)
    whole, tiled = (
        images.to_pixels(decoded(deep, latents, tile=tile, tile_size=tile_size)[0]).astype(int)
        for tile in ("never", "always")
    )
    assert whole.std() > 30
    assert np.abs(whole - tiled).max() <= 2
    assert np.abs(whole - tiled).mean() < 0.2
    picture = smooth(768, 640)
    there, by_tiles = (encoded(deep, picture, tile=tile, tile_size=tile_size) for tile in ("never", "always"))
    differences = np.abs(there - by_tiles) / np.ptp(there) * 255
    assert differences.max() <= 2
    assert differences.mean() < 0.2


def test_attention_that_does_not_fit_on_the_whole_takes_from_its_tile(
    deep: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents, picture = latents_of(48, 40), smooth(384, 320)
    whole, there = decoded(deep, latents, tile="never"), encoded(deep, picture, tile="never")
    reading = CpuDevice.memory
    # Each of 1920 latents by each, as scores and as shares.
    needed = 2 * 4 * (48 * 40) ** 2

    def distances(free: int) -> list[float]:
        monkeypatch.setattr(CpuDevice, "memory", lambda self: replace(reading(self), free_bytes=free))
        by_tiles = decoded(deep, latents, tile="always", tile_size=256)
        latents_by_tiles = encoded(deep, picture, tile="always", tile_size=256)
        return [float(np.abs(whole - by_tiles).max()), float(np.abs(there - latents_by_tiles).max())]

    fits, does_not = distances(needed), distances(needed - 1)
    assert all(2 * near < far for near, far in zip(fits, does_not, strict=True)), (fits, does_not)


def test_tiles_make_the_latents_that_the_whole_makes(pipeline: Pipeline) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (168, 224, 3), np.uint8)
    whole = encoded(pipeline, picture, tile="never")
    tiled = encoded(pipeline, picture, tile="always", tile_size=128)
    assert tiled.shape == whole.shape == (1, 4, 84, 112)
    assert np.abs(whole - tiled).max() < 0.02 * np.abs(whole).max()


@pytest.mark.parametrize("opset", [18, 21])
def test_tiles_of_later_operator_sets_and_of_half_precision(opset: int, vae: Any, tmp_path: Path) -> None:
    folder = export_vae(tiny_vae(shift_factor=0.05).half() if opset == 21 else vae, tmp_path, encoder=False)
    place = folder / "vae_decoder" / "model.onnx"
    onnx.save(onnx.version_converter.convert_version(onnx.load(place), opset), place)
    pipeline = opened("vae", folder)
    latents = latents_of(40, 72)
    whole, tiled = (decoded(pipeline, latents, tile=tile, tile_size=96) for tile in ("never", "always"))
    assert np.abs(images.to_pixels(whole[0]).astype(int) - images.to_pixels(tiled[0])).max() <= 6


def test_a_decoder_without_a_normalisation_that_is_known_goes_in_plain_tiles(vae: Any, tmp_path: Path) -> None:
    folder = export_vae(vae, tmp_path, encoder=False)
    place = folder / "vae_decoder" / "model.onnx"
    model = onnx.load(place)
    for node in model.graph.node:
        if node.op_type == "InstanceNormalization":
            del node.input[1:]
            node.op_type = "Identity"
            del node.attribute[:]
    onnx.save(model, place)
    assert normalisations.rewritten(onnx.load(place)) is None
    assert decoded(opened("vae", folder), latents_of(40, 72), tile="always", tile_size=96).shape == (1, 3, 80, 144)


def test_an_image_that_does_not_fit_goes_in_tiles_that_do(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = latents_of(40, 150)
    whole = decoded(pipeline, latents)
    run = LoadedGraph.run
    sizes: list[int] = []

    def out_of_memory(self: LoadedGraph, feeds: Any, *more: Any, **named: Any) -> Any:
        given = feeds["latent_sample"]
        sizes.append(given.shape[3])
        if given.shape[3] > 128:
            raise failure("out_of_memory", "it does not fit")
        return run(self, feeds, *more, **named)

    monkeypatch.setattr(LoadedGraph, "run", out_of_memory)
    tiled = decoded(pipeline, latents)
    # The whole, for which larger tiles would be too large as well; the half with the attention, on the whole; then, not
    # cut, two tiles of 128 latents, measured and normalised.
    assert sizes == [150] * 2 + [128] * 4
    assert np.abs(images.to_pixels(whole[0]).astype(int) - images.to_pixels(tiled[0])).max() <= 3
    with pytest.raises(OperationError, match="does not fit"):
        decoded(pipeline, latents, tile="never")


@pytest.mark.parametrize("side", [1, 7, 8, 9, 13, 15, 16, 17, 24, 25])
@pytest.mark.parametrize("scale", [(2, 1), (1, 1)])
def test_any_side_is_covered_by_tiles(side: int, scale: tuple[int, int]) -> None:
    values = np.random.default_rng(side).standard_normal((1, 2, side, 11)).astype(np.float32)

    def larger(tile: np.ndarray) -> np.ndarray:
        return tile.repeat(scale[0], axis=2).repeat(scale[0], axis=3)

    tiling = Tiling(8, 4)
    covered = np.zeros((side, 11), int)
    for down, across in tiling.cores(side, 11):
        covered[down, across] += 1
    assert (covered == 1).all()
    *_, whole = mapped(values, tiling, scale, larger)
    assert whole is not None
    assert np.allclose(whole, larger(values), atol=1e-6)


def test_one_half_alone_is_known_for_what_it_is(vae_folder: Path, vae: Any, pipeline: Pipeline) -> None:
    latents, picture = latents_of(16, 16), smooth(32, 32)
    decoder = opened("vae", vae_folder / "vae_decoder" / "model.onnx")
    encoder = opened("vae", vae_folder / "vae_encoder" / "model.onnx")
    assert np.array_equal(decoded(decoder, latents), decoded(pipeline, latents))
    assert np.array_equal(encoded(encoder, picture), encoded(pipeline, picture))
    with pytest.raises(OperationError, match="loaded without"):
        decoded(encoder, latents)
    with pytest.raises(OperationError, match="loaded without"):
        encoded(decoder, picture)


def test_a_half_without_a_configuration_takes_the_models_own_latents(
    vae_folder: Path, vae: Any, tmp_path: Path
) -> None:
    lone = tmp_path / "lone.onnx"
    lone.write_bytes((vae_folder / "vae_decoder" / "model.onnx").read_bytes())
    pipeline = opened("vae", lone)
    latents = latents_of(16, 16)
    scaled = latents / np.float32(vae.config.scaling_factor) + np.float32(vae.config.shift_factor)
    wanted = decoded(opened("vae", vae_folder), latents)
    assert np.abs(decoded(pipeline, scaled) - wanted).max() < 1e-5
    given = {"scaling_factor": vae.config.scaling_factor, "shift_factor": vae.config.shift_factor}
    assert np.abs(decoded(pipeline, latents, **given) - wanted).max() < 1e-5
    assert decoded(pipeline, scaled, tile="always", tile_size=64).shape == wanted.shape


def test_a_seed_draws_from_the_encoders_distribution_as_diffusers_does(pipeline: Pipeline, vae: Any) -> None:
    picture = smooth(32, 32)
    values = torch.from_numpy(images.to_signed(picture))
    with torch.no_grad():
        drawn = vae.encode(values).latent_dist.sample(torch.Generator().manual_seed(5))
    wanted = ((drawn - vae.config.shift_factor) * vae.config.scaling_factor).numpy()
    assert np.abs(encoded(pipeline, picture, seed=5) - wanted).max() < 1e-5
    assert np.abs(encoded(pipeline, picture) - wanted).max() > 1e-3


def test_means_and_deviations_of_latents_are_applied(vae: Any, vae_folder: Path, tmp_path: Path) -> None:
    folder = export_vae(vae, tmp_path)
    mean, std = [0.1, -0.2, 0.3, 0.0], [1.5, 0.5, 1.0, 2.0]
    for half in ("vae_decoder", "vae_encoder"):
        write_json(folder / half / "config.json", {**vae.config, "latents_mean": mean, "latents_std": std})
    pipeline, plain = opened("vae", folder), opened("vae", vae_folder / "vae_decoder" / "model.onnx")
    latents = latents_of(8, 8)
    by_channel = [np.array(one, np.float32).reshape(1, 4, 1, 1) for one in (mean, std)]
    own = latents * by_channel[1] / vae.config.scaling_factor + by_channel[0]
    assert np.abs(decoded(pipeline, latents) - decoded(plain, own, scaling_factor=1.0, shift_factor=0.0)).max() < 1e-5
    picture = smooth(16, 16)
    there = encoded(pipeline, picture)
    model = encoded(opened("vae", vae_folder), picture) / vae.config.scaling_factor + vae.config.shift_factor
    assert np.abs(there - (model - by_channel[0]) * vae.config.scaling_factor / by_channel[1]).max() < 1e-5


def test_float16_and_weights_outside_the_graph_are_as_the_files_have_them(vae: Any, tmp_path: Path) -> None:
    half = export_vae(tiny_vae(shift_factor=0.05).half(), tmp_path / "half")
    pipeline = opened("vae", half)
    assert {part["dtype"] for part in pipeline.parts.facts()} == {"float16"}
    folder = export_vae(vae, tmp_path / "outside")
    for part in ("vae_decoder", "vae_encoder"):
        place = folder / part / "model.onnx"
        model = onnx.load(place)
        place.unlink()
        onnx.save(model, place, save_as_external_data=True, location="weights.bin", size_threshold=0)
    outside = opened("vae", folder)
    frugal = opened("vae", folder, low_memory=True)
    assert outside.parts.file_bytes >= sum(file.stat().st_size for file in folder.rglob("weights.bin"))
    latents = latents_of(16, 16)
    exact = decoded(opened("vae", export_vae(vae, tmp_path / "whole")), latents)
    assert np.array_equal(decoded(outside, latents), exact)
    assert 0 < np.abs(decoded(pipeline, latents.astype(np.float16)) - exact).max() < 0.02
    assert np.array_equal(decoded(frugal, latents), exact)
    frugal.parts.rest()
    (folder / "vae_decoder" / "weights.bin").write_bytes(bytes(10))
    with pytest.raises(OperationError, match="has changed since the load"):
        decoded(frugal, latents)


NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (b"", "neither"),
        (b"GIF89a", "neither"),
        (png(NOISE)[:2000], "damaged"),
        (png(np.zeros((64, 64, 3), np.uint8), "JPEG")[:300], "damaged"),
        (png(np.zeros((5000, 4000, 3), np.uint8)), "16777216 at most"),
        (bytes((64 << 20) + 1), "67108864 at most"),
    ],
)
def test_pictures_that_are_none_are_refused(file: bytes, says: str) -> None:
    with pytest.raises(OperationError, match=says) as raised:
        images.decode(file, "image 0")
    assert raised.value.code == "input_mismatch"


def test_pictures_of_every_kind_are_read_and_written() -> None:
    picture = smooth(24, 32)
    assert np.array_equal(images.decode(png(picture), "p"), picture)
    assert np.abs(images.decode(png(picture, "JPEG", quality=95), "p").astype(int) - picture).mean() < 4
    for form in ("png", "webp"):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(images.encode(picture, form))).convert("RGB")), picture)  # type: ignore[arg-type]
    grey = images.decode(_png_of(picture[..., 0]), "p")
    assert np.array_equal(grey[..., 1], picture[..., 0])
    deep = images.decode(_png_of(picture[..., 0].astype(np.uint16) * 257), "p")
    assert np.array_equal(deep[..., 2], picture[..., 0])


def _png_of(values: np.ndarray) -> bytes:
    written = io.BytesIO()
    Image.fromarray(values).save(written, "PNG")
    return written.getvalue()


def test_what_one_run_takes_is_bounded(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.pipelines.vae.MAX_RUN_PIXELS", 32 * 32 * 3)
    files = {str(number): png(smooth(32, 32)) for number in range(8)}
    read: list[str] = []

    def request(count: int) -> Any:
        run = context({"images": [{"blob_id": str(number)} for number in range(count)]}, files=files)
        run.picture = lambda place: (read.append(place["blob_id"]), files[place["blob_id"]])[1]
        return run

    assert made(pipeline, request(3)).outputs["latents"].shape == (3, 4, 16, 16)
    read.clear()
    with pytest.raises(OperationError, match="in one run"):
        made(pipeline, request(8))
    assert len(read) == 4, "what is too much is not decoded"
    with pytest.raises(OperationError, match="in one run"):
        decoded(pipeline, latents_of(16, 16, 4))
    with pytest.raises(OperationError, match="1 to 64 images"):
        decoded(pipeline, np.zeros((65, 4, 1, 1), np.float32))
    with pytest.raises(OperationError, match="of one size"):
        given = context(
            {"images": [{"blob_id": "a"}, {"blob_id": "b"}]}, files={"a": png(smooth(8, 8)), "b": png(smooth(8, 16))}
        )
        made(pipeline, given)
    with pytest.raises(OperationError, match="multiples of 2"):
        encoded(pipeline, smooth(32, 33))
    for wrong in (
        np.zeros((4, 8, 8), np.float32),
        np.zeros((1, 3, 8, 8), np.float32),
        np.zeros((1, 4, 8, 8), np.int32),
    ):
        with pytest.raises(OperationError, match="latents are"):
            decoded(pipeline, wrong)
