"""What lies in a pipeline's folder, read before anything is loaded: configurations, and each graph's head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import orjson

from device_operations.errors import failure
from device_operations.tensors import NUMPY_DTYPES
from workers.devices.libraries import tidy
from workers.devices.onnx.file import inspect
from workers.devices.onnx.graph import read_graph
from workers.devices.onnx.tensors import TensorSpec

#: Bytes of a configuration, and of a tokenizer's file.
MAX_CONFIG_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """One graph of a pipeline, read and not loaded. `dtype` is that of its floating-point inputs."""

    name: str
    file: Path
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    symbols: frozenset[str]
    file_bytes: int
    dtype: str
    #: The sizes and times of the file and of its external data.
    stamp: Mapping[Path, tuple[int, int] | None]

    def check_unchanged(self) -> None:
        """Raises `model_invalid` where a file is another than the one that was read."""
        if any(_stamp(file) != stamp for file, stamp in self.stamp.items()):
            raise failure("model_invalid", f"the file of {self.name} has changed since the load; load it again")

    def input(self, *names: str) -> TensorSpec:
        """The input of one of these names. Raises `model_invalid`."""
        return _one(self, self.inputs, names, "input")

    def output(self, *names: str) -> TensorSpec:
        """The output of one of these names. Raises `model_invalid`."""
        return _one(self, self.outputs, names, "output")


def _one(part: Part, specs: Mapping[str, TensorSpec], names: Iterable[str], what: str) -> TensorSpec:
    for name in names:
        if name in specs:
            return specs[name]
    raise failure(
        "model_invalid",
        f"{part.name} has no {what} {' or '.join(names)}; it has {', '.join(sorted(specs))}",
    )


def inside(root: Path, file: Path) -> Path:
    """`file` with its links followed. Raises `model_invalid` where it leads out of `root`."""
    try:
        resolved = file.resolve()
    except (OSError, RuntimeError) as error:
        raise failure("model_invalid", f"{file.name} cannot be followed: {error}") from error
    if not resolved.is_relative_to(root.resolve()):
        raise failure("model_invalid", f"{file.name} leads out of the model's folder")
    return resolved


def read_part(name: str, file: Path, root: Path) -> Part:
    """The head of a part's graph. Raises `model_invalid`, which names the part."""
    resolved = inside(root, file)
    try:
        about = inspect(resolved, root)
        graph = read_graph(resolved).graph
        given = {one.name for one in graph.initializer}
        inputs = {one.name: _spec(one) for one in graph.input if one.name not in given}
        outputs = {one.name: _spec(one) for one in graph.output}
    except Exception as error:
        raise failure("model_invalid", f"{name}: {tidy(error)}") from error
    for spec in (*inputs.values(), *outputs.values()):
        if spec.dtype not in NUMPY_DTYPES:
            raise failure("model_invalid", f"{name}: {spec.name} is {spec.dtype}; parts have float16 or float32 values")
    floats = [spec.dtype for spec in (*inputs.values(), *outputs.values()) if "float" in spec.dtype]
    return Part(
        name, resolved, inputs, outputs, frozenset(about.symbols), about.size_bytes, floats[0] if floats else "float32",
        {one: _stamp(one) for one in (resolved, *(resolved.parent / name for name in about.locations))},
    )  # fmt: skip


def find_graph(folder: Path, *places: str) -> Path | None:
    """The first of `places` (paths below the folder, of a file or of a folder with one graph) that is there."""
    for place in places:
        there = folder / place
        if there.is_file():
            return there
        if there.is_dir():
            named = there / "model.onnx"
            graphs = [named] if named.is_file() else sorted(there.glob("*.onnx"))
            if len(graphs) > 1:
                raise failure("model_invalid", f"{place}/ has {len(graphs)} graphs and none named model.onnx")
            if graphs:
                return graphs[0]
    return None


def read_config(root: Path, *places: str) -> dict[str, Any]:
    """The first of these JSON files that is there; empty without one. Raises `model_invalid`."""
    for place in places:
        file = root / place
        if file.is_file():
            return read_json(file, root)
    return {}


def read_json(file: Path, root: Path, most_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object. Raises `model_invalid` where it is none, too large, or names a file outside its folder."""
    place = file.relative_to(root) if file.is_relative_to(root) else file.name
    resolved = inside(root, file)
    size = resolved.stat().st_size
    if size > most_bytes:
        raise failure("model_invalid", f"{place} has {size} bytes; {most_bytes} at most")
    try:
        value = orjson.loads(resolved.read_bytes())
    except ValueError as error:
        raise failure("model_invalid", f"{place} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise failure("model_invalid", f"{place} is not a JSON object")
    _refuse_places_elsewhere(value, str(place))
    return value


def number(config: Mapping[str, Any], name: str, default: float | None, where: str) -> float | None:
    """A finite number of a configuration. Raises `model_invalid` for anything else."""
    value = config.get(name, default)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e12:
        raise failure("model_invalid", f"{where}: {name} is {str(value)[:50]!r}, and must be a number")
    return value


def _refuse_places_elsewhere(config: Mapping[str, Any], place: str) -> None:
    """Raises `model_invalid` where an entry that names a file names one outside the folder."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _refuse_places_elsewhere(value, place)
        elif isinstance(value, str) and (key.endswith(("_file", "_path")) or key in ("file", "path", "location")):
            if key == "_name_or_path":  # where it came from, which nothing here reads
                continue
            pure = PurePosixPath(value.replace("\\", "/"))
            if pure.is_absolute() or ".." in pure.parts or ":" in value or "\0" in value:
                raise failure("model_invalid", f"{place}: {key} names {value[:100]!r}, which is outside the folder")


def _spec(value: Any) -> TensorSpec:
    import onnx

    kind = value.type.tensor_type
    dtype = "string" if kind.elem_type == onnx.TensorProto.STRING else ""
    if not dtype:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name if kind.elem_type else "?"
    sides = [side.dim_value if side.HasField("dim_value") else (side.dim_param or None) for side in kind.shape.dim]
    return TensorSpec(value.name, dtype, tuple(sides))


def _stamp(file: Path) -> tuple[int, int] | None:
    """The file's size and time; None where it is gone."""
    try:
        about = file.stat()
    except OSError:
        return None
    return about.st_size, about.st_mtime_ns
