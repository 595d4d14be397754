"""A map over an image that is too large to be mapped at once: by overlapping tiles, whose seams are blended.

Tiles see beyond their seams: the outer `MARGIN` of each overlap is dropped, the rest fades linearly from one tile to
the next. What a graph takes from the whole image (a normalisation's mean, attention) it takes from the tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np

from workers.devices.arrays import Array

#: The share of an overlap at a tile's edge that is not used, unless said.
MARGIN = 0.25


@dataclass(frozen=True, slots=True)
class Tiling:
    """How an input of `[1, c, h, w]` is cut: `size` and `overlap` are sides in its own elements."""

    size: int
    overlap: int
    #: Tiles and their cores begin at multiples of this.
    step: int = 1
    #: The share of an overlap at a tile's edge that is not used.
    margin: float = MARGIN

    def cuts(self, height: int, width: int) -> list[tuple[slice, slice]]:
        """The tiles, row by row."""
        return [(down, across) for down in self._spans(height) for across in self._spans(width)]

    def cores(self, height: int, width: int) -> list[tuple[slice, slice]]:
        """What of the whole is each tile's own: up to the middle of its overlaps. Together they are the whole, once."""
        return [(down, across) for down in self._cores(height) for across in self._cores(width)]

    def _cores(self, side: int) -> list[slice]:
        spans = self._spans(side)
        middles = [
            (before.stop + after.start) // 2 // self.step * self.step for before, after in itertools.pairwise(spans)
        ]
        return [slice(*ends) for ends in zip([0, *middles], [*middles, side], strict=True)]

    def _spans(self, side: int) -> list[slice]:
        if side <= self.size:
            return [slice(0, side)]
        starts = [*range(0, side - self.size, self.size - self.overlap), side - self.size]
        return [slice(start, start + self.size) for start in starts]


def mapped(
    values: Array, tiling: Tiling, scale: tuple[int, int], step: Callable[[Array], Array]
) -> Generator[Array | None, None, None]:
    """Maps `[1, c, h, w]` tile by tile with `step`, and yields None after each but the last, then the whole.

    `scale` is (a, b) where a side of n elements becomes n * a // b.
    """
    a, b = scale
    height, width = values.shape[2:]
    cuts = tiling.cuts(height, width)
    whole = weight = np.zeros(0, np.float32)
    for number, (down, across) in enumerate(cuts, 1):
        made = step(np.ascontiguousarray(values[:, :, down, across])).astype(np.float32)
        if not whole.size:
            whole = np.zeros((1, made.shape[1], height * a // b, width * a // b), np.float32)
            weight = np.zeros((height * a // b, width * a // b), np.float32)
        fade = np.outer(_fade(down, height, tiling, scale), _fade(across, width, tiling, scale))
        at = (_scaled(down, scale), _scaled(across, scale))
        whole[:, :, at[0], at[1]] += made * fade
        weight[at] += fade
        if number < len(cuts):
            yield None
    yield whole / weight


def _scaled(span: slice, scale: tuple[int, int]) -> slice:
    return slice(span.start * scale[0] // scale[1], span.stop * scale[0] // scale[1])


def _fade(span: slice, side: int, tiling: Tiling, scale: tuple[int, int]) -> Array:
    """The weights along one side of a tile: 1, and down to 0 over the overlaps with its neighbours."""
    made = _scaled(span, scale)
    weights = np.ones(made.stop - made.start, np.float32)
    length = tiling.overlap * scale[0] // scale[1]
    margin = length * tiling.margin
    ramp = ((np.arange(length, dtype=np.float32) + 0.5 - margin) / max(length - 2 * margin, 1e-6)).clip(0, 1)
    if span.start > 0:
        weights[:length] *= ramp
    if span.stop < side:
        weights[len(weights) - length :] *= ramp[::-1]
    return weights
