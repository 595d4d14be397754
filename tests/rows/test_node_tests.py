"""ONNX's own tests of its operators, with their first axis left open: what is proven of them, ONNX Runtime keeps."""

from __future__ import annotations

import collections
import copy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import pytest
from onnx import numpy_helper

from tests.rows.joined import difference, session_of
from workers.rows.proof import Proof, prove

DATA = Path(onnx.backend.test.__file__).parent / "data" / "node"


def cases() -> Iterator[tuple[str, onnx.ModelProto, dict[str, np.ndarray]]]:
    """Each model with its inputs' values, in up to three forms: which inputs carry rows, the others being constants."""
    for folder in sorted(DATA.iterdir()):
        model = onnx.load(folder / "model.onnx")
        given = _inputs(model, folder / "test_data_set_0")
        arrays = [name for name, array in given.items() if array.ndim]
        if not arrays:
            continue
        lead = given[arrays[0]].shape[0]
        alike = [name for name in arrays if given[name].shape[0] == lead]
        for form in dict.fromkeys((tuple(arrays[:1]), tuple(alike), tuple(arrays))):
            opened = _opened(model, given, form)
            yield folder.name, opened, {name: array for name, array in given.items() if name in form or not array.ndim}


def _inputs(model: onnx.ModelProto, folder: Path) -> dict[str, np.ndarray]:
    given = {}
    for index, declared in enumerate(model.graph.input):
        path = folder / f"input_{index}.pb"
        if not declared.type.HasField("tensor_type") or not path.exists():
            return {}
        tensor = onnx.TensorProto.FromString(path.read_bytes())
        if tensor.data_type not in _TAKEN:
            return {}
        given[declared.name] = numpy_helper.to_array(tensor)
    return given


_TAKEN = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13}


def _opened(model: onnx.ModelProto, given: dict[str, np.ndarray], rows: tuple[str, ...]) -> onnx.ModelProto:
    opened = copy.deepcopy(model)
    graph = opened.graph
    kept = [declared for declared in graph.input if declared.name in rows or not given[declared.name].ndim]
    graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in given.items() if array.ndim and name not in rows
    )
    del graph.input[:]
    graph.input.extend(kept)
    for declared in graph.input:
        if declared.name in rows:
            declared.type.tensor_type.shape.dim[0].Clear()
            declared.type.tensor_type.shape.dim[0].dim_param = "rows"
    for declared in graph.output:
        for side in declared.type.tensor_type.shape.dim:
            side.Clear()
    return opened


def drawn(random: np.random.Generator, like: np.ndarray, rows: int) -> np.ndarray:
    """Rows of that kind, from the values that a test itself has."""
    values = random.choice(like.reshape(-1), (rows, *like.shape[1:]))
    if like.dtype.kind == "f":
        values = values * random.choice([1, 1, 10]) + random.standard_normal(values.shape) * random.choice([0, 1])
    return np.asarray(values).astype(like.dtype)


def survey() -> tuple[collections.Counter[str], list[str]]:
    """How many forms got which verdict, and what is wrong."""
    random = np.random.default_rng(0)
    counts: collections.Counter[str] = collections.Counter()
    wrong = []
    for name, model, given in cases():
        try:
            session = session_of(model)
        except Exception:
            counts["not run by ONNX Runtime"] += 1
            continue
        verdict = prove(model)
        counts[verdict.proof] += 1
        if verdict.proof is not Proof.PROVEN:
            continue
        compared = False
        for count in (1, 1, 2, given and next(len(array) for array in given.values() if array.ndim)):
            scalars = {key: array for key, array in given.items() if not array.ndim}
            callers = [
                {key: drawn(random, array, count) for key, array in given.items() if array.ndim and array.size}
                | scalars
                for _ in range(3)
            ]
            found = difference(session, callers)
            if found:
                wrong.append(f"{name} {sorted(given)} x{count}: {found[:200]}")
            compared = compared or found is None
        counts["proven and compared"] += compared
    return counts, wrong


@pytest.mark.slow
def test_what_is_proven_of_onnxs_own_operator_tests_holds_in_onnx_runtime() -> None:
    counts, wrong = survey()
    assert wrong == []
    assert counts["proven and compared"] > 500, counts


if __name__ == "__main__":
    found, errors = survey()
    print(found)
    print("\n".join(errors))
