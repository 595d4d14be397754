"""Adapters: three libraries count them, and we say which is which."""

from __future__ import annotations

import sys

import pytest

from device_operations.errors import OperationError
from workers.devices import Device, enumerate_devices, open_device
from workers.devices.adapters import dxgi
from workers.devices.directml import DirectMLDevice, _torch_index


def test_this_is_windows_with_the_directml_provider() -> None:
    import onnxruntime

    assert sys.platform == "win32"
    assert "DmlExecutionProvider" in onnxruntime.get_available_providers()


def test_an_adapter_has_a_name_a_luid_and_its_memory(device: Device) -> None:
    adapter = dxgi.adapters()[0]
    about = device.describe()
    assert about.name == adapter.name
    assert about.name
    assert "\0" not in about.name
    assert about.vendor == adapter.vendor
    assert about.total_bytes
    assert about.total_bytes >= adapter.dedicated_bytes
    assert about.providers == ("DmlExecutionProvider",)
    assert about.capabilities["luid"] == f"{adapter.luid:016x}"


def test_the_dxgi_index_and_luid_are_those_that_onnx_runtime_reports() -> None:
    import onnxruntime

    told = {
        (int(found.device.metadata["DxgiAdapterNumber"]), int(found.device.metadata["LUID"]))
        for found in onnxruntime.get_ep_devices()
        if found.ep_name == "DmlExecutionProvider"
    }
    assert told
    assert told <= {(adapter.index, adapter.luid) for adapter in dxgi.adapters()}


def test_torch_has_the_same_adapter_at_the_index_that_is_used(device: Device) -> None:
    import torch_directml

    index = device.torch_device().index
    assert torch_directml.device_name(index).rstrip("\0") == device.describe().name


def test_equal_adapters_are_told_apart_by_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def adapter(index: int, name: str, software: bool = False) -> dxgi.Adapter:
        return dxgi.Adapter(index, name, index, None, None, 1, 1, software)

    here = [adapter(0, "A"), adapter(1, "B"), adapter(2, "Microsoft Basic Render Driver", True), adapter(3, "A")]
    monkeypatch.setattr(dxgi, "adapters", lambda: here)
    in_dxcores_order = ["B", "A", "A"]
    assert [_torch_index(here[n], in_dxcores_order) for n in (0, 1, 3)] == [1, 0, 2]
    with pytest.raises(OperationError, match="torch-directml does not list A"):
        _torch_index(here[3], ["B", "A"])
    assert DirectMLDevice(2).provider().options == {"device_id": "3"}, "ONNX Runtime counts the software adapter too"


def test_an_adapter_that_does_not_exist_is_refused_with_those_that_do(device: Device) -> None:
    with pytest.raises(OperationError) as refused:
        open_device("directml", 5)
    assert refused.value.code == "device_unavailable"
    assert device.describe().name in refused.value.message


def test_the_process_sees_its_own_use_of_the_adapters_memory_and_what_windows_lets_it_have(device: Device) -> None:
    reading = device.memory()
    assert reading.budget_bytes
    assert reading.process_bytes is not None
    assert reading.free_bytes == max(0, reading.budget_bytes - reading.process_bytes)
    assert reading.used_bytes is None, "DXGI does not tell what other processes use"


def test_the_adapter_is_listed_before_the_cpu(device: Device) -> None:
    found = enumerate_devices()
    assert [one.backend for one in found] == ["directml"] * (len(found) - 1) + ["cpu"]
    assert found[0].name == device.describe().name
