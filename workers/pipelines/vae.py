"""The `vae` pipeline: latents to images, images to latents, by an exported `AutoencoderKL` or one half of it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np

from device_operations.errors import failure
from workers.devices.arrays import Array
from workers.execution.claimed_job import Progress
from workers.pipelines import images
from workers.pipelines.base import Pace, Parts, Pipeline, PixelImage, Result, RunContext, Steps
from workers.pipelines.diffusion.autoencoder import DECODER, ENCODER, Autoencoder, Scale
from workers.pipelines.files import Part, find_graph, read_config, read_part

T = TypeVar("T")

#: Images of one run, and pixels of one image, that are decoded or encoded at most.
MAX_BATCH = 64
MAX_PIXELS = images.MAX_PIXELS
MAX_RUN_PIXELS = 4 * MAX_PIXELS

#: Where each half lies in a folder.
PLACES = {
    DECODER: ("vae_decoder", "decoder", "vae_decoder.onnx", "decoder.onnx"),
    ENCODER: ("vae_encoder", "encoder", "vae_encoder.onnx", "encoder.onnx"),
}
CONFIGS = (
    "config.json",
    *(f"{place}/config.json" for place in ("vae", "vae_decoder", "vae_encoder", "decoder", "encoder")),
)


class VaePipeline(Pipeline):
    """A decoder, an encoder, or both."""

    model_type: ClassVar[str] = "vae"

    def __init__(self, parts: Parts, config: Mapping[str, Any], where: str) -> None:
        super().__init__(parts)
        self._autoencoder = Autoencoder(parts, config, where)

    @classmethod
    def read(cls, source: Path, root: Path, options: Mapping[str, Any]) -> Self:
        """See `Pipeline.read`. A single file's `config.json` lies next to it."""
        if source.is_dir():
            found = {name: find_graph(source, *places) for name, places in PLACES.items()}
            parts = [read_part(name, file, root) for name, file in found.items() if file is not None]
            if not parts:
                raise failure(
                    "model_invalid",
                    "a vae has vae_decoder/model.onnx, vae_encoder/model.onnx or both; neither is there",
                )
        else:
            parts = [_single(read_part("the graph", source, root))]
        config = read_config(source if source.is_dir() else root, *CONFIGS)
        return cls(Parts(parts, root, options), config, "config.json")

    def about(self) -> dict[str, Any]:
        scale = self._autoencoder.scale
        return {
            "latent_channels": self._autoencoder.channels,
            "scaling_factor": scale.scaling,
            "shift_factor": scale.shift,
        }

    def run(self, run: RunContext) -> Steps:
        """One step an image, or one a tile."""
        if "latents" in run.request:
            return (yield from self._decode(run))
        return (yield from self._encode(run))

    def _decode(self, run: RunContext) -> Steps:
        self._require(DECODER, "latents are decoded")
        latents = run.tensor("latents")
        channels = self._autoencoder.channels
        if latents.ndim != 4 or latents.dtype.kind != "f" or channels not in (None, latents.shape[1]):
            raise failure(
                "input_mismatch",
                f"latents are {latents.dtype.name} {list(latents.shape)}, and must be floats "
                f"[n, {channels or 'c'}, h, w]",
            )
        factor = self._autoencoder.factor(run.cancel)
        _check_size(len(latents), latents.shape[2] * factor, latents.shape[3] * factor, "latents")
        pace = Pace(len(latents))
        form = run.request.get("output_format", "png")
        tensors: list[Array] = []
        made: list[PixelImage] = []
        for number in range(len(latents)):
            latent = latents[number : number + 1]
            how = {**_tile(run), "scale": self._scale(run)}
            if form == "tensor":
                tensors.append((yield from _in_steps(self._autoencoder.decode(latent, run.cancel, **how), pace)))
            else:
                work = self._autoencoder.decode_pixels(latent, run.cancel, **how)
                made.append(PixelImage((yield from _in_steps(work, pace)).values, form))
            yield from pace.step()
        return Result(outputs={"image": np.concatenate(tensors)} if tensors else {}, images=made)

    def _encode(self, run: RunContext) -> Steps:
        self._require(ENCODER, "images are encoded")
        pictures = self._pictures(run)
        height, width = pictures[0].shape[2:] if pictures[0].ndim == 4 else pictures[0].shape[:2]
        _check_size(len(pictures), height, width, "the image")
        self._autoencoder.check_sides(height, width, "the image", run.cancel)
        pace = Pace(len(pictures))
        encoded = []
        for number, picture in enumerate(pictures):
            values = picture.astype(np.float32) if picture.ndim == 4 else images.to_signed(picture)
            moments = yield from _in_steps(self._autoencoder.encode(values, run.cancel, **_tile(run)), pace)
            seed = run.request.get("seed")
            noise = None if seed is None else _Noise(seed + number)
            encoded.append(self._autoencoder.latents_of(moments, noise, self._scale(run)))
            yield from pace.step()
        return Result(outputs={"latents": np.concatenate(encoded)})

    def _pictures(self, run: RunContext) -> list[Array]:
        """The images of a run: `[1, 3, H, W]` of floats each, or `[H, W, 3]` of uint8."""
        given = run.request.get("images") or [run.request["image"]]
        if "dtype" in given[0]:
            values = run.tensor("image")
            if values.ndim != 4 or values.dtype.kind != "f" or values.shape[1] != 3 or not len(values):
                raise failure(
                    "input_mismatch",
                    f"image is {values.dtype.name} {list(values.shape)}, and must be floats [n, 3, H, W] from -1 to 1",
                )
            return [values[number : number + 1] for number in range(len(values))]
        decoded: list[Array] = []
        for number, one in enumerate(given):
            decoded.append(images.decode(run.picture(one), f"image {number}"))
            if decoded[-1].shape != decoded[0].shape:
                sizes = " and ".join(f"{each.shape[1]}x{each.shape[0]}" for each in (decoded[0], decoded[-1]))
                raise failure("input_mismatch", f"the images of one run are of one size; these have {sizes} pixels")
            # Before the next is decoded: many pictures of the largest size would take gigabytes.
            height, width = decoded[-1].shape[:2]
            _check_size(number + 1, height, width, "the images")
        return decoded

    def _scale(self, run: RunContext) -> Scale:
        scale = self._autoencoder.scale
        given = run.request.get("scaling_factor"), run.request.get("shift_factor")
        scaling = scale.scaling if given[0] is None else given[0]
        return replace(scale, scaling=scaling, shift=scale.shift if given[1] is None else given[1])

    def _require(self, part: str, what: str) -> None:
        if part not in self.parts:
            raise failure("input_mismatch", f"{what} by {part}, which this model was loaded without")


class _Noise:
    """Standard normal numbers of a seed, as torch draws them on the CPU."""

    def __init__(self, seed: int) -> None:
        self._seed = seed % 2**63

    def __call__(self, shape: tuple[int, ...]) -> Array:
        import torch

        drawn: Array = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(self._seed)).numpy()
        return drawn


def _single(part: Part) -> Part:
    """A lone graph as the half that it is: the decoder gives three channels, the encoder takes them.

    Raises `model_invalid` where it is neither.
    """
    takes, gives = next(iter(part.inputs.values()), None), next(iter(part.outputs.values()), None)
    if takes is not None and gives is not None and len(takes.shape) == 4:
        if takes.shape[1] == 3:
            return replace(part, name=ENCODER)
        if takes.name in ("latent_sample", "latents") or (len(gives.shape) == 4 and gives.shape[1] == 3):
            return replace(part, name=DECODER)
    raise failure(
        "model_invalid", "the graph is neither a decoder (latents [n, c, h, w]) nor an encoder (images [n, 3, H, W])"
    )


def _in_steps(work: Generator[None, None, T], pace: Pace) -> Generator[Progress, None, T]:
    """What `work` gives, with a pause where it yields."""
    while True:
        try:
            next(work)
        except StopIteration as stop:
            made: T = stop.value
            return made
        yield from pace.pause()


def _tile(run: RunContext) -> dict[str, Any]:
    return {"tile": run.request.get("tile", "auto"), "tile_size": run.request.get("tile_size")}


def _check_size(count: int, height: int, width: int, what: str) -> None:
    if not 1 <= count <= MAX_BATCH:
        raise failure("input_mismatch", f"{what}: a run takes 1 to {MAX_BATCH} images, not {count}")
    if not 1 <= height * width <= MAX_PIXELS:
        raise failure("input_mismatch", f"{what}: an image has 1 to {MAX_PIXELS} pixels, not {width}x{height}")
    if count * height * width > MAX_RUN_PIXELS:
        raise failure("input_mismatch", f"{what}: {count} of {width}x{height} pixels; {MAX_RUN_PIXELS} in one run")
