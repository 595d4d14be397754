"""The autoencoder of a pipeline: latents to images and back by two of its parts, whole or tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from device_operations.errors import OperationError, failure
from device_operations.tensors import numpy_dtype
from workers.devices.arrays import Array
from workers.devices.onnx.runtime import Cancel
from workers.pipelines.base import Parts
from workers.pipelines.diffusion.tiled import Tiled
from workers.pipelines.diffusion.tiles import Tiling
from workers.pipelines.files import number

#: The names of the parts.
DECODER, ENCODER = "vae_decoder", "vae_encoder"

#: Pixels above which images go in tiles unless a run says otherwise, a tile's side in pixels, and its share of overlap.
AUTO_TILE_PIXELS = 1536 * 1536
TILE_SIZE = 1024
TILE_OVERLAP = 0.25
#: Tiles that do not fit are halved until they have this side.
SMALLEST_TILE = 256

#: The side in latents of the image that is decoded to find the factor where no configuration says it.
_PROBE = 8


@dataclass(frozen=True, slots=True)
class Scale:
    """How the model's latents stand to those of callers: `model = caller * std / scaling + mean + shift`."""

    scaling: float = 1.0
    shift: float = 0.0
    mean: Array | None = None
    std: Array | None = None

    def to_model(self, latents: Array) -> Array:
        """The latents as the decoder takes them."""
        scaled: Array = latents.astype(np.float32)
        if self.mean is not None and self.std is not None:
            return scaled * self.std / np.float32(self.scaling) + self.mean
        return scaled / np.float32(self.scaling) + np.float32(self.shift)

    def from_model(self, latents: Array) -> Array:
        """What the encoder gives, as callers take it."""
        scaled: Array = latents.astype(np.float32)
        if self.mean is not None and self.std is not None:
            return (scaled - self.mean) * np.float32(self.scaling) / self.std
        return (scaled - np.float32(self.shift)) * np.float32(self.scaling)


def read_scale(config: Mapping[str, Any], where: str) -> Scale:
    """The scale that a configuration of diffusers' `AutoencoderKL` says. Raises `model_invalid`."""
    scaling = number(config, "scaling_factor", 0.18215 if config else 1.0, where) or 0.0
    shift = number(config, "shift_factor", 0.0, where) or 0.0
    if scaling <= 0:
        raise failure("model_invalid", f"{where}: scaling_factor is {scaling}, and must be above 0")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return Scale(scaling, shift)
    try:
        of_channels = [np.asarray(one, np.float32).reshape(1, -1, 1, 1) for one in (mean, std)]
    except (TypeError, ValueError) as error:
        raise failure("model_invalid", f"{where}: latents_mean and latents_std are not lists of numbers") from error
    return Scale(scaling, shift, *of_channels)


class Autoencoder:
    """The decoder and the encoder among `parts`, or one of the two."""

    def __init__(self, parts: Parts, config: Mapping[str, Any], where: str = "config.json") -> None:
        """Raises `model_invalid` where the graphs and the configuration do not fit each other."""
        self._parts = parts
        self.scale = read_scale(config, where)
        blocks = config.get("block_out_channels")
        if blocks is not None and not (isinstance(blocks, list) and 1 <= len(blocks) <= 8):
            raise failure("model_invalid", f"{where}: block_out_channels is not a list of up to 8 numbers")
        #: Pixels of a side for each latent; None until it is known.
        self._factor: int | None = 2 ** (len(blocks) - 1) if blocks else None
        said = config.get("latent_channels")
        channels = said if isinstance(said, int) and not isinstance(said, bool) else None
        if DECODER in parts:
            latents = parts[DECODER].input("latent_sample", "latents", "sample")
            _require_rank(latents.shape, f"{DECODER}: {latents.name}")
            in_graph = latents.shape[1]
            if isinstance(in_graph, int):
                if channels not in (None, in_graph):
                    raise failure(
                        "model_invalid",
                        f"{where}: latent_channels is {channels}, and {DECODER} takes {in_graph} channels",
                    )
                channels = in_graph
        if ENCODER in parts:
            image = parts[ENCODER].input("sample", "image", "pixel_values")
            _require_rank(image.shape, f"{ENCODER}: {image.name}")
            moments = parts[ENCODER].output("latent_parameters", "latent_sample", "latents", "moments").shape
            gives = moments[1] if len(moments) == 4 else None
            if channels is not None and isinstance(gives, int) and gives not in (channels, 2 * channels):
                raise failure(
                    "model_invalid",
                    f"{ENCODER} gives {gives} channels, and {DECODER if DECODER in parts else where} has {channels} "
                    "of latents",
                )
        self.channels = channels
        for name, stat in (("latents_mean", self.scale.mean), ("latents_std", self.scale.std)):
            if stat is not None and channels is not None and stat.shape[1] != channels:
                raise failure("model_invalid", f"{where}: {name} has {stat.shape[1]} numbers for {channels} channels")

    def factor(self, cancel: Cancel | None = None) -> int:
        """Pixels of a side for each latent: as configured, or as a small image that is decoded or encoded shows."""
        if self._factor is None:
            if DECODER in self._parts:
                made = self._decoded(np.zeros((1, self.channels or 4, _PROBE, _PROBE), np.float32), cancel)
                self._factor = max(1, made.shape[2] // _PROBE)
            else:
                side = _PROBE * 8
                made = self._encoded(np.zeros((1, 3, side, side), np.float32), cancel)
                self._factor = max(1, side // made.shape[2])
        return self._factor

    def decode(
        self,
        latents: Array,
        cancel: Cancel,
        *,
        tile: str = "auto",
        tile_size: int | None = None,
        scale: Scale | None = None,
    ) -> Generator[None, None, Array]:
        """One image `[1, 3, H, W]` of float32 from -1 to 1 of latents `[1, c, h, w]`; yields between tiles.

        Raises `cancelled`, `timeout`, `out_of_memory` where even tiles do not fit.
        """
        model = (scale or self.scale).to_model(latents)
        factor = self.factor(cancel)
        pixels = latents.shape[2] * latents.shape[3] * factor * factor
        given = self._parts[DECODER].input("latent_sample", "latents", "sample").name

        def tiled(side: int) -> Tiled:
            return Tiled(self._parts, DECODER, given, _tiling(side, factor, 1), (factor, 1), cancel)

        return (yield from _whole_or_tiles(model, pixels, tile, tile_size, lambda: self._decoded(model, cancel), tiled))

    def encode(
        self, image: Array, cancel: Cancel, *, tile: str = "auto", tile_size: int | None = None
    ) -> Generator[None, None, Array]:
        """What the encoder gives of one image `[1, 3, H, W]` from -1 to 1: moments or latents; yields between tiles."""
        factor = self.factor(cancel)
        pixels = image.shape[2] * image.shape[3]
        given = self._parts[ENCODER].input("sample", "image", "pixel_values").name

        def tiled(side: int) -> Tiled:
            return Tiled(self._parts, ENCODER, given, _tiling(side, 1, factor), (1, factor), cancel)

        return (yield from _whole_or_tiles(image, pixels, tile, tile_size, lambda: self._encoded(image, cancel), tiled))

    def latents_of(
        self, encoded: Array, noise: Callable[[tuple[int, ...]], Array] | None, scale: Scale | None = None
    ) -> Array:
        """The latents of what the encoder gave: the mean of its distribution, or drawn from it with `noise`."""
        channels = self.channels if self.channels is not None else encoded.shape[1]
        if encoded.shape[1] == 2 * channels:
            mean, log_variance = np.split(encoded, 2, axis=1)
            encoded = mean
            if noise is not None:
                encoded = mean + np.exp(np.float32(0.5) * log_variance.clip(-30, 20)) * noise(mean.shape)
        return (scale or self.scale).from_model(encoded)

    def check_sides(self, height: int, width: int, what: str, cancel: Cancel | None = None) -> None:
        """Raises `input_mismatch` for an image whose sides are no multiples of the factor."""
        factor = self.factor(cancel)
        if height % factor or width % factor:
            raise failure("input_mismatch", f"{what} has {width}x{height} pixels; sides are multiples of {factor}")

    def _decoded(self, latents: Array, cancel: Cancel | None) -> Array:
        part = self._parts[DECODER]
        return _run(self._parts, DECODER, part.input("latent_sample", "latents", "sample").name, latents, cancel)

    def _encoded(self, image: Array, cancel: Cancel | None) -> Array:
        part = self._parts[ENCODER]
        return _run(self._parts, ENCODER, part.input("sample", "image", "pixel_values").name, image, cancel)


def _run(parts: Parts, name: str, given: str, values: Array, cancel: Cancel | None) -> Array:
    part = parts[name]
    output = next(iter(part.outputs))
    model = parts.get(name, cancel)
    feed = np.ascontiguousarray(values, numpy_dtype(part.inputs[given].dtype))
    made: Array = np.asarray(model.run({given: feed}, [output], cancel=cancel)[output])
    return made.astype(np.float32)


def _whole_or_tiles(
    values: Array,
    pixels: int,
    tile: str,
    tile_size: int | None,
    whole: Callable[[], Array],
    tiled: Callable[[int], Tiled],
) -> Generator[None, None, Array]:
    """The map of the whole where that is asked for or fits, else of tiles, which are made smaller until they fit."""
    if tile == "never" or (tile == "auto" and pixels <= AUTO_TILE_PIXELS):
        try:
            return whole()
        except OperationError as error:
            if tile == "never" or error.code != "out_of_memory":
                raise
    side = tile_size or TILE_SIZE
    while True:
        try:
            return (yield from tiled(side).map(values))
        except OperationError as error:
            if error.code != "out_of_memory" or tile_size is not None or side <= SMALLEST_TILE:
                raise
        side //= 2


def _tiling(side: int, factor: int, step: int) -> Tiling:
    """Tiles of `side` pixels, in elements of `factor` pixels that begin at multiples of `step`."""
    size = max(step, max(8, side // factor) // step * step)
    return Tiling(size, max(step, int(size * TILE_OVERLAP) // step * step), step)


def _require_rank(shape: tuple[int | str | None, ...], what: str) -> None:
    if len(shape) != 4:
        raise failure(
            "model_invalid", f"{what} has {len(shape)} sides, and must have 4: batch, channels, height, width"
        )
