"""A part's map over an image that is too large for one run, so that it is what the whole would have been.

Each tile is run twice: first its normalisations measure their statistics, then all tiles are normalised by those of the
whole (`normalisations`). Where a graph has none of a known form, once. What attention takes from the whole image, it
takes from the tile.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from device_operations.tensors import numpy_dtype
from workers.devices.arrays import Array
from workers.devices.onnx.runtime import Cancel, LoadedGraph
from workers.pipelines.base import Parts
from workers.pipelines.diffusion import normalisations as norms
from workers.pipelines.diffusion.tiles import Tiling, mapped


@dataclass(frozen=True, slots=True)
class Tiled:
    """How one part is run in tiles; `given` is its input, `scale` how its output's sides stand to that one's."""

    parts: Parts
    name: str
    given: str
    tiling: Tiling
    scale: tuple[int, int]
    cancel: Cancel

    def map(self, values: Array) -> Generator[None, None, Array]:
        """The part's output for `[1, c, h, w]` as float32; yields between runs."""
        part = self.parts[self.name]
        output = next(iter(part.outputs))
        typed = np.ascontiguousarray(values, numpy_dtype(part.inputs[self.given].dtype))
        changed = norms.rewritten(part.file)
        if changed is None:
            model = self.parts.get(self.name, self.cancel)
            return (
                yield from _last(
                    mapped(
                        typed, self.tiling, self.scale, lambda tile: self._run(model, {self.given: tile}, [output])[0]
                    )
                )
            )
        model = self.parts.open_apart(self.name, changed.content, self.cancel)
        try:
            statistics = yield from self._measured(model, typed, changed)

            def normalised(tile: Array) -> Array:
                return self._run(model, self._feeds(tile, statistics), [output])[0]

            return (yield from _last(mapped(typed, self.tiling, self.scale, normalised)))
        finally:
            model.close()

    def _measured(
        self, model: LoadedGraph, values: Array, changed: norms.Rewritten
    ) -> Generator[None, None, list[Array]]:
        """The statistics of the whole image for each normalisation."""
        height, width = values.shape[2:]
        cuts, cores = self.tiling.cuts(height, width), self.tiling.cores(height, width)
        areas = [(down.stop - down.start) * (across.stop - across.start) for down, across in cores]
        wanted = [f"{norms.MEASURED}{number}" for number in range(len(changed.groups))]
        found = []
        for cut, core in zip(cuts, cores, strict=True):
            tile = np.ascontiguousarray(values[:, :, cut[0], cut[1]])
            within = [slice(own.start - at.start, own.stop - at.start) for own, at in zip(core, cut, strict=True)]
            found.append(self._run(model, self._feeds(tile, changed.statistics(), within), wanted))
            yield
        return norms.pooled(found, areas)

    def _feeds(self, tile: Array, statistics: Sequence[Array], core: Sequence[slice] | None = None) -> dict[str, Array]:
        """What a run takes: with `core` the tile is normalised by that, and measured; without, by `statistics`."""
        within = core or [slice(0, side) for side in tile.shape[2:]]
        return {
            self.given: tile,
            norms.OWN: np.array(core is not None),
            norms.FIRST: np.array([one.start for one in within], np.int64),
            norms.LAST: np.array([one.stop for one in within], np.int64),
            norms.SIDES: np.array(tile.shape[2:], np.int64),
            **{f"{norms.GIVEN}{number}": each for number, each in enumerate(statistics)},
        }

    def _run(self, model: LoadedGraph, feeds: dict[str, Array], wanted: Sequence[str]) -> list[Array]:
        made = model.run(feeds, list(wanted), cancel=self.cancel)
        return [np.asarray(made[name]) for name in wanted]


def _last(tiles: Generator[Array | None, None, None]) -> Generator[None, None, Array]:
    for made in tiles:
        if made is not None:
            return made
        yield
    raise AssertionError("an image has at least one tile")
