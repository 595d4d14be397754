"""What the cuda backend decides without a GPU; everything else of it is the conformance suite's, on a GPU."""

from __future__ import annotations

import pytest

from device_operations.errors import OperationError
from workers.devices.adapters import nvml
from workers.devices.adapters.nvml import visible
from workers.devices.cuda import CudaDevice, names_cuda

UUIDS = ["GPU-aaaa-1", "GPU-aabb-2", "GPU-cccc-3"]


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    """A device of which only the description is there: nothing of it may be run."""
    monkeypatch.setattr(nvml, "gpus", lambda: [nvml.Gpu(0, 2, UUIDS[2], "A GPU", "580.1", 80 << 30)])
    return CudaDevice(0)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("1", [1]),
        ("2,0", [2, 0]),
        (" 2 , 1 ", [2, 1]),
        ("0,7,1", [0]),
        ("-1", []),
        ("1,1", [1]),
        ("GPU-cccc", [2]),
        ("GPU-aabb,GPU-aaaa-1", [1, 0]),
        ("GPU-aa", []),
        ("NoDevFiles", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(setting: str | None, expected: list[int]) -> None:
    assert visible(setting, UUIDS) == expected


@pytest.mark.parametrize(
    ("text", "code", "retryable"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 79.19 GiB", "out_of_memory", True),
        ("Failed to allocate memory for requested buffer of size 4294967296", "out_of_memory", True),
        ("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0", "out_of_memory", True),
        ("CUDA error: an illegal memory access was encountered", "device_lost", True),
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=x", "device_lost", True),
        ("CUDA error: unspecified launch failure", "device_lost", True),
        ("CUDA failure 214: uncorrectable ECC error encountered", "device_lost", True),
        ("NVRM: Xid (PCI:0000:0b:00): 79, GPU has fallen off the bus.", "device_lost", True),
        ("CUDA error: device-side assert triggered", "device_lost", False),
        ("CUDA error: invalid argument", "internal_error", False),
    ],
)
def test_each_failure_of_cuda_has_its_code(described: CudaDevice, text: str, code: str, retryable: bool) -> None:
    named = described.classify(RuntimeError(text))
    assert (named.code, named.retryable) == (code, retryable)


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(described: CudaDevice) -> None:
    with pytest.raises(OperationError) as refused:
        CudaDevice(1)
    assert refused.value.code == "device_unavailable"
    assert "0: A GPU" in refused.value.message


def test_sessions_give_their_memory_back_and_lie_on_the_devices_own_ordinal(described: CudaDevice) -> None:
    provider = described.provider()
    assert provider.options["device_id"] == "0"
    assert provider.options["arena_extend_strategy"] == "kSameAsRequested"
    assert provider.settings == {"session.use_device_allocator_for_initializers": "1"}
    assert (provider.binding, provider.device_id) == ("cuda", 0)


def test_a_build_of_torch_without_cuda_is_told_apart_without_importing_it() -> None:
    assert names_cuda("debug = False\ncuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n")
    assert names_cuda("cuda = '13.0'\n")
    assert not names_cuda("cuda: Optional[str] = None\nhip: Optional[str] = None\n")
