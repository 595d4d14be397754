"""The autoencoder of a pipeline: latents to images and back by two of its parts, whole or tile by tile."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from device_operations.errors import OperationError, failure
from device_operations.tensors import numpy_dtype
from workers.devices.arrays import Array
from workers.devices.onnx.runtime import Cancel
from workers.devices.onnx.tensors import Kept
from workers.pipelines import images
from workers.pipelines.base import Parts
from workers.pipelines.diffusion.tiled import Tiled
from workers.pipelines.diffusion.tiles import Tiling
from workers.pipelines.files import number

T = TypeVar("T")

#: The names of the parts.
DECODER, ENCODER = "vae_decoder", "vae_encoder"

#: Pixels above which images go in tiles unless a run says otherwise.
AUTO_TILE_PIXELS = 1536 * 1536
#: A tile's side in pixels, the next where one does not fit. Large ones need fewer runs, and are nearer to the whole
#: where attention sees its tile alone.
TILE_SIZES = (1536, 1024, 512, 256)
#: The share of a tile that overlaps with the next, and latents of it at least, up to half of the tile: with fewer,
#: tiles of 32 latents a side were seen to be three times as far from the whole.
TILE_OVERLAP, LEAST_OVERLAP = 0.25, 16

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
        whole = functools.partial(self._decoded, model, cancel)
        return (yield from self._decode(model, cancel, tile, tile_size, whole, lambda made: made))

    def decode_pixels(
        self,
        latents: Array,
        cancel: Cancel,
        *,
        tile: str = "auto",
        tile_size: int | None = None,
        scale: Scale | None = None,
    ) -> Generator[None, None, images.Pixels]:
        """The same as pixels `[H, W, 3]` of uint8, which the device makes itself where the backend binds tensors."""
        model = (scale or self.scale).to_model(latents)
        whole = functools.partial(self._decoded_pixels, model, cancel)
        return (yield from self._decode(model, cancel, tile, tile_size, whole, lambda made: images.pixels_of(made[0])))

    def _decode(
        self,
        model: Array,
        cancel: Cancel,
        tile: str,
        tile_size: int | None,
        whole: Callable[[], T],
        of_tiles: Callable[[Array], T],
    ) -> Generator[None, None, T]:
        factor = self.factor(cancel)
        given = self._parts[DECODER].input("latent_sample", "latents", "sample").name

        def tiled(side: int) -> Generator[None, None, T]:
            tiles = Tiled(self._parts, DECODER, given, _tiling(side, factor, 1), (factor, 1), cancel)
            return of_tiles((yield from tiles.map(model)))

        sides = model.shape[2] * factor, model.shape[3] * factor
        return (yield from _whole_or_tiles(sides, tile, tile_size, whole, tiled))

    def encode(
        self, image: Array, cancel: Cancel, *, tile: str = "auto", tile_size: int | None = None
    ) -> Generator[None, None, Array]:
        """What the encoder gives of one image `[1, 3, H, W]` from -1 to 1: moments or latents; yields between tiles."""
        factor = self.factor(cancel)
        given = self._parts[ENCODER].input("sample", "image", "pixel_values").name

        def tiled(side: int) -> Generator[None, None, Array]:
            return Tiled(self._parts, ENCODER, given, _tiling(side, 1, factor), (1, factor), cancel).map(image)

        whole = functools.partial(self._encoded, image, cancel)
        return (yield from _whole_or_tiles(image.shape[2:], tile, tile_size, whole, tiled))

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

    def _decoded_pixels(self, latents: Array, cancel: Cancel) -> images.Pixels:
        if not self._parts.binds:
            return images.pixels_of(self._decoded(latents, cancel)[0])
        part = self._parts[DECODER]
        output = next(iter(part.outputs))
        given = part.input("latent_sample", "latents", "sample")
        feed = np.ascontiguousarray(latents, numpy_dtype(given.dtype))
        made = self._parts.get(DECODER, cancel).run({given.name: feed}, [], keep=[output], cancel=cancel)[output]
        assert isinstance(made, Kept)
        device = self._parts.device
        with device.queue():
            return images.pixels_on_device(device.tensor_of(made)[0])

    def _encoded(self, image: Array, cancel: Cancel | None) -> Array:
        part = self._parts[ENCODER]
        return _run(self._parts, ENCODER, part.input("sample", "image", "pixel_values").name, image, cancel)


def _run(parts: Parts, name: str, given: str, values: Array, cancel: Cancel | None) -> Array:
    part = parts[name]
    output = next(iter(part.outputs))
    model = parts.get(name, cancel)
    feed = np.ascontiguousarray(values, numpy_dtype(part.inputs[given].dtype))
    made: Array = np.asarray(model.run({given: feed}, [output], cancel=cancel)[output])
    return made.astype(np.float32, copy=False)


def _whole_or_tiles(
    image: tuple[int, ...],
    tile: str,
    tile_size: int | None,
    whole: Callable[[], T],
    tiled: Callable[[int], Generator[None, None, T]],
) -> Generator[None, None, T]:
    """The map of the whole where that is asked for or fits, else of tiles, which are made smaller until they fit.

    `image` is its height and width in pixels.
    """
    sizes: tuple[int, ...] = TILE_SIZES if tile_size is None else (tile_size,)
    if tile == "never" or (tile == "auto" and math.prod(image) <= AUTO_TILE_PIXELS):
        try:
            return whole()
        except OperationError as error:
            # A tile that is the whole fits no better.
            sizes = tuple(size for size in sizes if size < max(image))
            if tile == "never" or error.code != "out_of_memory" or not sizes:
                raise
    *larger, smallest = sizes
    for size in larger:
        try:
            return (yield from tiled(size))
        except OperationError as error:
            if error.code != "out_of_memory":
                raise
    return (yield from tiled(smallest))


def _tiling(side: int, factor: int, step: int) -> Tiling:
    """Tiles of `side` pixels, in elements of `factor` pixels that begin at multiples of `step`."""
    size = max(step, max(8, side // factor) // step * step)
    overlap = min(max(int(size * TILE_OVERLAP), LEAST_OVERLAP * step), size // 2)
    return Tiling(size, max(step, overlap // step * step), step)


def _require_rank(shape: tuple[int | str | None, ...], what: str) -> None:
    if len(shape) != 4:
        raise failure(
            "model_invalid", f"{what} has {len(shape)} sides, and must have 4: batch, channels, height, width"
        )
