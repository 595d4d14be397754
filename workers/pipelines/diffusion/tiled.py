"""A part's map over an image that is too large for one run, so that it is what the whole would have been.

A part is cut in two where its tensors have the latents' sides (`cuts`): the half with the attention runs once on the
whole, the other in tiles. Each tile is run twice: first its normalisations measure their statistics, then all tiles are
normalised by those of the whole (`normalisations`). Small tiles measure once for each normalisation, since one's
statistics follow from those before it. Where a graph has no such cut, or attention on the whole does not fit, the part
is not cut, and attention takes from its tile alone; where no normalisation has a known form, each tile is run once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from device_operations.errors import OperationError
from device_operations.tensors import numpy_dtype
from workers.devices.arrays import Array
from workers.devices.onnx.runtime import Cancel, LoadedGraph
from workers.pipelines.base import Parts
from workers.pipelines.diffusion import cuts
from workers.pipelines.diffusion import normalisations as norms
from workers.pipelines.diffusion.tiles import Tiling, mapped

#: Latents a side below which a tile measures once for each normalisation. With one run in all, tiles of 64 were within
#: 1 of 255 from the whole, tiles of 32 within 3; three to nine runs made the latter no better.
SMALL_TILE = 64
#: The share of an overlap that is not used where a part is cut: with the least overlap, 7 of 16 latents, and the
#: convolutions of SDXL's decoder behind its cut see 6.25 latents to each side.
CUT_MARGIN = 0.45


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
        graph = norms.read(part.file)
        if graph is None:
            model = self.parts.get(self.name, self.cancel)
            return (yield from self._plain(model, self.given, output, typed))
        larger = self.scale[0] >= self.scale[1]
        halves = cuts.before_upsampling(graph) if larger else cuts.after_downsampling(graph)
        if halves is None or not self._attention_fits(typed):
            return (yield from self._uncut(graph, output, typed))
        try:
            exact = replace(self, tiling=replace(self.tiling, margin=CUT_MARGIN))
            if larger:
                between = self._whole(halves.first, self.given, halves.at, typed)
                yield
                return (yield from exact._half(halves.second, halves.at, output, between))
            between = yield from exact._half(halves.first, self.given, halves.at, typed)
            # The graph may be of another dtype within than its input is.
            within = onnx.helper.tensor_dtype_to_np_dtype(halves.second.graph.input[0].type.tensor_type.elem_type)
            return self._whole(halves.second, halves.at, output, between.astype(within)).astype(np.float32)
        except OperationError as error:
            if error.code != "out_of_memory":
                raise
        return (yield from self._uncut(graph, output, typed))

    def _uncut(self, graph: onnx.ModelProto, output: str, values: Array) -> Generator[None, None, Array]:
        changed = norms.rewritten(graph)
        if changed is None:
            model = self.parts.get(self.name, self.cancel)
            return (yield from self._plain(model, self.given, output, values))
        return (yield from self._tiles(changed, 1, self.given, output, values))

    def _half(self, graph: onnx.ModelProto, given: str, output: str, values: Array) -> Generator[None, None, Array]:
        changed = norms.rewritten(graph)
        if changed is not None:
            small = self.tiling.size // self.scale[1] < SMALL_TILE
            runs = len(changed.groups) if small else 1
            return (yield from self._tiles(changed, runs, given, output, values))
        model = self.parts.open_apart(self.name, graph.SerializeToString(), self.cancel)
        try:
            return (yield from self._plain(model, given, output, values))
        finally:
            model.close()

    def _attention_fits(self, values: Array) -> bool:
        """Whether the whole's attention, if it is not fused, fits: each latent by each, twice."""
        free = self.parts.device.memory().free_bytes
        a, b = (1, 1) if self.scale[0] >= self.scale[1] else self.scale
        latents = (values.shape[2] * a // b) * (values.shape[3] * a // b)
        return free is None or 2 * latents**2 * values.itemsize <= free

    def _whole(self, graph: onnx.ModelProto, given: str, output: str, values: Array) -> Array:
        model = self.parts.open_apart(self.name, graph.SerializeToString(), self.cancel)
        try:
            return self._run(model, {given: values}, [output])[0]
        finally:
            model.close()

    def _plain(self, model: LoadedGraph, given: str, output: str, values: Array) -> Generator[None, None, Array]:
        return (yield from self._mapped(values, lambda tile: self._run(model, {given: tile}, [output])[0]))

    def _tiles(
        self, changed: norms.Rewritten, measuring: int, given: str, output: str, values: Array
    ) -> Generator[None, None, Array]:
        model = self.parts.open_apart(self.name, changed.content, self.cancel)
        try:
            statistics = changed.statistics()
            for number in range(measuring):
                statistics = yield from self._measured(model, given, values, statistics, number)

            def normalised(tile: Array) -> Array:
                return self._run(model, _feeds(given, tile, statistics), [output])[0]

            return (yield from self._mapped(values, normalised))
        finally:
            model.close()

    def _mapped(self, values: Array, step: Callable[[Array], Array]) -> Generator[None, None, Array]:
        for made in mapped(values, self.tiling, self.scale, step):
            if made is not None:
                return made
            yield
        raise AssertionError("an image has at least one tile")

    def _measured(
        self, model: LoadedGraph, given: str, values: Array, statistics: Sequence[Array], own: int
    ) -> Generator[None, None, list[Array]]:
        """The whole image's statistics for each normalisation, where those before `own` are given."""
        height, width = values.shape[2:]
        tiles, cores = self.tiling.cuts(height, width), self.tiling.cores(height, width)
        areas = [(down.stop - down.start) * (across.stop - across.start) for down, across in cores]
        wanted = [f"{norms.MEASURED}{number}" for number in range(len(statistics))]
        found = []
        for cut, core in zip(tiles, cores, strict=True):
            tile = np.ascontiguousarray(values[:, :, cut[0], cut[1]])
            within = [slice(mine.start - at.start, mine.stop - at.start) for mine, at in zip(core, cut, strict=True)]
            found.append(self._run(model, _feeds(given, tile, statistics, within, own), wanted))
            yield
        return norms.pooled(found, areas)

    def _run(self, model: LoadedGraph, feeds: dict[str, Array], wanted: Sequence[str]) -> list[Array]:
        made = model.run(feeds, list(wanted), cancel=self.cancel)
        return [np.asarray(made[name]) for name in wanted]


def _feeds(
    given: str, tile: Array, statistics: Sequence[Array], core: Sequence[slice] | None = None, own: int | None = None
) -> dict[str, Array]:
    """What a run takes: normalisations before `own` use `statistics` (all unless said), the rest the `core`'s own."""
    within = core or [slice(0, side) for side in tile.shape[2:]]
    return {
        given: tile,
        norms.OWN: np.array(len(statistics) if own is None else own),
        norms.FIRST: np.array([one.start for one in within], np.int64),
        norms.LAST: np.array([one.stop for one in within], np.int64),
        norms.SIDES: np.array(tile.shape[2:], np.int64),
        **{f"{norms.GIVEN}{number}": each for number, each in enumerate(statistics)},
    }
