"""A tensor of a recorded request is read from its JSON form in one place, whatever says where its elements are."""

from __future__ import annotations

from typing import Any

import pytest

from workers.stored_tensors import InAllocation, InBase64, InBlob, Inline, InTransient, Place, decode_tensor


@pytest.mark.parametrize(
    ("stored", "place"),
    [
        ({"data": [[1, 2]]}, Inline([[1, 2]])),
        ({"data": []}, Inline([])),
        ({"data": 0, "base64": None, "blob_id": None, "allocation_id": None, "offset": 0}, Inline(0)),
        ({"base64": ""}, InBase64("")),
        ({"base64": "AAA="}, InBase64("AAA=")),
        ({"blob_id": "b"}, InBlob("b")),
        ({"blob_id": "b", "offset": 8, "size_bytes": 16}, InBlob("b", 8, 16)),
        ({"transient_id": "t", "offset": 4, "size_bytes": 12}, InTransient("t", 4, 12)),
        ({"transient_id": "t"}, InTransient("t")),
        ({"allocation_id": "a"}, InAllocation("a")),
        ({"allocation_id": "a", "offset": 4, "device_id": "cpu_1"}, InAllocation("a", 4, "cpu_1")),
    ],
)
def test_each_form_has_its_place(stored: dict[str, Any], place: Place) -> None:
    tensor = decode_tensor({"dtype": "float32", "shape": [1, 2], **stored})
    assert (tensor.dtype, tensor.shape, tensor.place) == ("float32", [1, 2], place)
    assert tensor.size_bytes == 8


def test_an_allocation_without_a_device_is_on_the_jobs_own() -> None:
    assert InAllocation("a").is_on("cpu_0")
    assert InAllocation("a", device_id="cpu_0").is_on("cpu_0")
    assert not InAllocation("a", device_id="cpu_1").is_on("cpu_0")
