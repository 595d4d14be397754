"""Model files that cannot or must not be loaded: each is refused by name, and the next load succeeds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from device_operations.errors import OperationError
from tests.devices import graphs
from workers.devices import Device, SessionOptions
from workers.devices.onnx.file import inspect

Save = Callable[..., Path]


def refused(device: Device, path: Path, options: SessionOptions | None = None) -> str:
    with pytest.raises(OperationError) as error:
        device.open_model(path, options)
    assert error.value.code == "model_invalid"
    assert str(path.parent) not in error.value.message, "a caller need not learn where the folder lies"
    return error.value.message


def test_an_empty_file(device: Device, save: Save) -> None:
    assert "model.onnx is empty (0 bytes)" in refused(device, save(b""))


def test_a_missing_file_and_a_folder(device: Device, tmp_path: Path) -> None:
    assert "cannot be read" in refused(device, tmp_path / "none.onnx")
    (tmp_path / "folder.onnx").mkdir()
    assert "is not a file" in refused(device, tmp_path / "folder.onnx")


@pytest.mark.parametrize("content", [b"not a model at all", b"\x00" * 100, b"\xff" * 100, b"PK\x03\x04" + b"z" * 60])
def test_bytes_that_are_no_model(device: Device, save: Save, content: bytes) -> None:
    assert "is not an ONNX model" in refused(device, save(content))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_model_that_is_cut_off(device: Device, save: Save, share: float) -> None:
    whole = graphs.convnet()
    refused(device, save(whole[: int(len(whole) * share)]))


def test_an_operator_set_from_the_future(device: Device, save: Save) -> None:
    message = refused(device, save(graphs.build(*_doubling(), opset=99)))
    assert "pset 99" in message or "opset" in message.lower()


def test_a_custom_operator(device: Device, save: Save) -> None:
    nodes = [graphs.node("Conjure", "x", "y", domain="org.example")]
    inputs, outputs = _doubling()[1:]
    assert "Conjure" in refused(device, save(graphs.build(nodes, inputs, outputs, domain="org.example")))


def test_weights_beside_the_model_are_loaded(device: Device, save: Save, tmp_path: Path) -> None:
    weights = np.arange(16, dtype=np.float32)
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "w.bin").write_bytes(weights.tobytes())
    model = device.open_model(save(graphs.external("parts/w.bin")))
    got = model.run({"x": np.ones((1, 16), np.float32)})["y"]
    assert float(got[0, 0]) == weights.sum()  # type: ignore[index]
    assert model.file_bytes > 64
    model.close()


def test_weights_outside_the_folder_are_never_read(device: Device, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    (tmp_path / "inside" / "w.bin").write_bytes(bytes(64))
    path = tmp_path / "inside" / "model.onnx"
    locations = [
        "../secret.bin", "../inside/../secret.bin", str(tmp_path / "secret.bin"), "missing.bin", "", ".", "a\0b",
        "*/_ORT_MEM_ADDR_/*", "/etc/passwd",
    ]  # fmt: skip
    for location in locations:
        path.write_bytes(graphs.external(location))
        assert "not a file inside the model's folder" in refused(device, path), location


def test_an_absolute_path_is_refused_even_where_it_leads_into_the_folder(device: Device, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(64))
    path = tmp_path / "model.onnx"
    path.write_bytes(graphs.external(str(tmp_path / "w.bin")))
    with pytest.raises(OperationError, match="under a relative path"):
        device.open_model(path)


@pytest.mark.skipif(os.name == "nt", reason="making links needs a right on Windows that tests do not have")
def test_a_link_out_of_the_folder_is_not_followed_unless_it_stays_below_the_given_root(
    device: Device, tmp_path: Path
) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    (tmp_path / "inside" / "w.bin").symlink_to("../secret.bin")
    path = tmp_path / "inside" / "model.onnx"
    path.write_bytes(graphs.external("w.bin"))
    refused(device, path)
    assert inspect(path, tmp_path).size_bytes > 64, "a link that stays below the root that was given is fine"


def test_weights_that_are_shorter_than_their_shape(device: Device, save: Save, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(63))
    assert "needs 64 bytes of w.bin, which has 63" in refused(device, save(graphs.external("w.bin")))


def test_a_location_hidden_in_a_subgraph_is_found(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    tensor = TensorProto(name="t", data_type=graphs.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret.bin")
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["v"], value=tensor)], "b", [],
        [helper.make_tensor_value_info("v", graphs.FLOAT, [1])],
    )  # fmt: skip
    nodes = [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)]
    path = tmp_path / "model.onnx"
    path.write_bytes(graphs.build(nodes, [("c", TensorProto.BOOL, [])], [("y", graphs.FLOAT, [1])]))
    with pytest.raises(OperationError, match="not a file inside"):
        inspect(path)


def test_bytes_load_as_their_file_does_and_refer_to_no_other(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = device.open_model(graphs.build(*_doubling()))
    assert model.run({"x": np.full((2, 3), 5, np.float32)})["y"].sum() == 30  # type: ignore[union-attr]
    model.close()
    (tmp_path / "w.bin").write_bytes(bytes(64))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OperationError, match="not a file inside"):
        device.open_model(graphs.external("w.bin"))
    with pytest.raises(OperationError, match="is not an ONNX model"):
        device.open_model(b"nonsense")


def test_a_file_says_its_operator_sets_and_symbols(save: Save) -> None:
    about = inspect(save(graphs.linear()))
    assert about.opsets == {"": 17}
    assert about.symbols == {"n"}
    assert about.size_bytes == len(graphs.linear())


def test_after_every_refusal_a_good_model_loads(device: Device, save: Save) -> None:
    refused(device, save(b"nonsense"))
    model = device.open_model(save(graphs.build(*_doubling())))
    assert model.run({"x": np.full((2, 3), 5, np.float32)})["y"].sum() == 30  # type: ignore[union-attr]
    model.close()


def _doubling() -> tuple[list[object], graphs.Named, graphs.Named]:
    return [graphs.node("Identity", "x", "y")], [("x", graphs.FLOAT, ["n", 3])], [("y", graphs.FLOAT, ["n", 3])]
