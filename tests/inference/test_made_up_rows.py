"""Runs on made-up rows, at a load and after a death: bounded, cancellable, and not repeated where they failed."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from device_operations.errors import OperationError
from tests.inference import graphs
from tests.inference.conftest import Api
from tests.rows.graphs import const, model, node, value
from tests.support.stack import eventually
from workers.devices import open_device
from workers.devices.onnx.runtime import Cancel, LoadedGraph
from workers.devices.onnx.tensors import TensorSpec
from workers.devices.values import SessionOptions
from workers.resident import batching, warmup
from workers.resident.batching import MADE_UP_BYTES, find_out, made_up_bytes, too_large

HUGE = 1_000_000_000


def huge(side: int = HUGE) -> bytes:
    """y = max(x, 0) on rows of so many numbers: a hundred bytes that ask for gigabytes."""
    return graphs.build([graphs.node("Relu", "x", "y")], [("x", graphs.FLOAT, ["n", side])],
                        [("y", graphs.FLOAT, ["n", side])])  # fmt: skip


def huge_inside() -> bytes:
    """The same in the middle of a graph that takes and gives little."""
    nodes = [
        node("Shape", ["x"], ["s"], start=0, end=1), node("Concat", ["s", "many"], ["t"], axis=0),
        node("Expand", ["x", "t"], ["e"]), node("ReduceMax", ["e"], ["y"], axes=[1], keepdims=1),
    ]  # fmt: skip
    made = model(nodes, [value("x", ["n", 1])], [value("y", ["n", 1])], [const("many", [HUGE], "i8")])
    return bytes(made.SerializeToString())


def endless() -> bytes:
    """A million matrix products of each row, in a loop: hours, in a graph of a few hundred bytes."""
    body = helper.make_graph(
        [node("MatMul", ["state", "w"], ["next"]), node("Identity", ["on"], ["still"])], "body",
        [value("i", [], TensorProto.INT64), value("on", [], TensorProto.BOOL), value("state", None)],
        [value("still", [], TensorProto.BOOL), value("next", None)],
    )  # fmt: skip
    made = model([node("Loop", ["rounds", "yes", "x"], ["y"], body=body)], [value("x", ["n", 256, 256])],
                 [value("y", ["n", 256, 256])],
                 [const("w", np.eye(256), "f4"), const("rounds", 1_000_000, "i8"), const("yes", True, "?")])  # fmt: skip
    return bytes(made.SerializeToString())


def opened(folder: Path, content: bytes) -> LoadedGraph:
    """A model on the CPU device."""
    path = folder / "model.onnx"
    path.write_bytes(content)
    return LoadedGraph(open_device("cpu", 0), path, SessionOptions())


@pytest.mark.parametrize("content", [huge(), huge_inside()], ids=["input", "inside"])
@pytest.mark.parametrize("options", [{}, {"max_batch_size": 4}, {"warmup": True}], ids=str)
def test_a_model_of_huge_rows_is_loaded_without_making_any(
    api: Api, content: bytes, options: dict[str, object]
) -> None:
    content += b"\x12\x06" + repr(options).encode().rjust(6)[-6:]  # a producer's name: other bytes are another model
    worker = api.stack.process("cpu_0")
    before = worker.memory_info().rss
    began = time.monotonic()
    loaded = api.load(content, options=options)
    assert time.monotonic() - began < 10
    assert "not tried: " in loaded["batching"]["trial"]
    assert loaded["batching"]["enabled"]  # proven, whether or not it is tried
    if "warmup" in options:
        assert loaded["batching"]["warmup"].startswith("left out: ")
    assert worker.memory_info().rss - before < 2 * MADE_UP_BYTES


@pytest.mark.parametrize("dtype", [TensorProto.DOUBLE, TensorProto.INT64, TensorProto.FLOAT16], ids=str)
def test_the_limit_counts_bytes_of_every_dtype_and_of_outputs(tmp_path: Path, dtype: int) -> None:
    made = model([node("Identity", ["x"], ["y"])], [value("x", ["n", 10], dtype)], [value("y", ["n", 10], dtype)])
    size = {TensorProto.DOUBLE: 8, TensorProto.INT64: 8, TensorProto.FLOAT16: 2}[dtype]
    assert made_up_bytes(opened(tmp_path, made.SerializeToString()), 4, 3) == 3 * 10 * size * 2


def test_what_just_fits_is_tried_and_what_does_not_is_not(tmp_path: Path) -> None:
    fits = MADE_UP_BYTES // (4 * 2 * 4)  # four rows of four-byte numbers, in and out
    assert find_out(opened(tmp_path, huge(fits)), 2).trial == "joined rows are what they are alone"
    found = find_out(opened(tmp_path, huge(fits + 1)), 2)
    assert found.trial == "not tried: made-up rows would take 64 MiB, more than 64 MiB"
    assert too_large(opened(tmp_path, huge(fits + 1)), 4, 4) is not None


def test_made_up_rows_are_drawn_in_single_precision() -> None:
    spec = TensorSpec("x", "float32", ("n", 1 << 22))
    tracemalloc.start()
    try:
        made = batching._made_up(spec, 4, 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert made.dtype == np.float32
    assert peak < made.nbytes * 1.1


def test_the_trial_and_the_warm_up_can_be_cancelled(tmp_path: Path) -> None:
    slow = opened(tmp_path, endless())
    for run in (lambda cancel: find_out(slow, 4, cancel), lambda cancel: warmup.warm_up(slow, cancel, False, {})):
        cancel = Cancel()
        timer = threading.Timer(0.2, cancel.trip)
        timer.start()
        began = time.monotonic()
        with pytest.raises(OperationError, match=r"[Ss]topped|cancelled"):
            run(cancel)
        assert time.monotonic() - began < 5
        timer.join()


def test_a_trial_that_takes_long_is_stopped_and_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "TRIAL_SECONDS", 0.2)
    began = time.monotonic()
    found = find_out(opened(tmp_path, endless()), 4)
    assert (found.enabled, found.trial) == (True, "stopped after 0.2 s")
    assert time.monotonic() - began < 3


# ---- after a death


def test_a_trial_is_not_repeated_where_one_is_recorded(tmp_path: Path) -> None:
    one = opened(tmp_path, graphs.affine())
    first = find_out(one, None)
    one.close()  # from here on no run of it succeeds
    assert find_out(one, None, earlier=first.as_json()) == first
    assert find_out(one, None, may_try=False).trial == "not tried at a restart"
    assert find_out(one, None).trial == "the model does not run on made-up rows"


def test_what_a_recorded_trial_took_away_stays_away(tmp_path: Path) -> None:
    one = opened(tmp_path, graphs.affine())
    earlier = {"proof": "proven", "enabled": False, "trial": "rows of one batch change each other"}
    assert not find_out(one, None, earlier=earlier).enabled
    # Of another proof, by an older table, it says nothing.
    assert find_out(one, None, earlier=earlier | {"proof": "unknown"}).enabled


def test_a_warm_up_that_fails_at_a_restart_leaves_the_model_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = opened(tmp_path, endless())
    monkeypatch.setattr(warmup, "WARMUP_AGAIN_SECONDS", 0.2)
    began = time.monotonic()
    said = warmup.warm_up(slow, None, True, {"warmup": "done"})
    assert said.startswith("failed at a restart: ")
    assert time.monotonic() - began < 5
    slow.close()  # a run would fail with another message
    assert warmup.warm_up(slow, None, True, {"warmup": said}) == said


def test_a_model_comes_back_with_what_was_found_of_it(start_api: Callable[..., Api]) -> None:
    api = start_api()
    loaded = api.load(graphs.affine(71.0), "comes-back", options={"warmup": True})
    api.stack.kill("cpu_0")
    api.stack.start("cpu_0")
    api.stack.wait_ready()
    back = eventually(lambda: (found := api.model(loaded["model_id"]))["state"] == "loaded" and found, 30)
    assert back["batching"] == loaded["batching"]
    assert (back["batching"]["warmup"], back["batching"]["enabled"]) == ("done", True)
