"""Torch tensors over allocations, as training takes its inputs."""

from __future__ import annotations

import numpy as np
import pytest

from device_operations.errors import OperationError
from workers.devices import Device

torch = pytest.importorskip("torch", reason="torch is not installed; the cpu device works without it")


def test_a_tensor_has_the_values_of_its_allocation_and_lies_there_unless_the_device_says_otherwise(
    device: Device,
) -> None:
    values = np.arange(12, dtype=np.float32)
    buffer = device.allocate(64)
    device.write(buffer, 8, values.data.cast("B"))
    tensor = device.tensor_view(buffer, "float32", (3, 4), offset=8)
    assert tensor.device.type == device.torch_device().type
    assert torch.equal(tensor.cpu(), torch.from_numpy(values.reshape(3, 4)))
    tensor[1, 2] = -1.0
    device.synchronize()
    written_through = np.frombuffer(device.read(buffer, 8, 48), np.float32)[6] == -1.0
    assert written_through == device.describe().capabilities["zero_copy"]


@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8", "int32"])
def test_a_tensor_has_the_dtype_asked_for(device: Device, dtype: str) -> None:
    if dtype not in device.describe().capabilities["dtypes"]:
        pytest.skip(f"{device.backend} has no {dtype}")
    buffer = device.allocate(64)
    values = np.arange(4).astype(dtype)
    device.write(buffer, 0, values.data.cast("B"))
    assert device.tensor_view(buffer, dtype, (2, 2)).cpu().tolist() == [[0, 1], [2, 3]]


def test_an_unaligned_tensor_is_a_right_copy(device: Device) -> None:
    values = np.arange(4, dtype=np.float32)
    buffer = device.allocate(32)
    device.write(buffer, 3, values.data.cast("B"))
    assert device.tensor_view(buffer, "float32", (4,), offset=3).cpu().tolist() == [0, 1, 2, 3]


def test_a_tensor_that_reaches_out_of_its_allocation_is_refused(device: Device) -> None:
    buffer = device.allocate(64)
    for shape, offset in [((17,), 0), ((16,), 4), ((1,), -4), ((2**40, 2**40), 0)]:
        with pytest.raises(OperationError) as refused:
            device.tensor_view(buffer, "float32", shape, offset)
        assert refused.value.code == "out_of_range"


@pytest.mark.parametrize("dtype", ["string", "float128", "nn", "complex64"])
def test_a_dtype_that_the_device_does_not_have_is_refused(device: Device, dtype: str) -> None:
    with pytest.raises(OperationError) as refused:
        device.tensor_view(device.allocate(64), dtype, (1,))
    assert refused.value.code == "dtype_unsupported"


def test_a_gradient_can_be_taken_through_a_view(device: Device) -> None:
    buffer = device.allocate(64)
    device.write(buffer, 0, np.ones(16, np.float32).data.cast("B"))
    x = device.tensor_view(buffer, "float32", (4, 4))
    weight = torch.full((4, 2), 0.5).to(device.torch_device()).requires_grad_()
    (x @ weight).sum().backward()
    assert weight.grad.cpu().tolist() == [[4.0, 4.0]] * 4
