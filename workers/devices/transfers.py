"""How a model's tensors move between the host's arrays and a device whose runs bind addresses, separate from its runs.

A backend that does this faster than ONNX Runtime does it by itself gives each model one of these; the others give none,
and ONNX Runtime takes arrays and gives arrays.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from workers.devices.arrays import Array
from workers.devices.onnx.tensors import RuntimeValue


class TensorTransfers(ABC):
    """The host side of one model's runs, in this order: `put` for each input, `begin`, the run, `end`, `fetch`.

    Used by one thread at a time, as the model is.
    """

    @abstractmethod
    def put(self, name: str, array: Array) -> int:
        """Starts the array's way to the device and gives the address where it will lie, until `name` is put again.

        The array must stay as it is until `fetch` returned; what runs on the device's stream from now on sees it there.
        """

    @abstractmethod
    def begin(self) -> None:
        """Notes on the device's own clock that the graph begins."""

    @abstractmethod
    def end(self) -> None:
        """Notes on the device's own clock that the graph is over."""

    @abstractmethod
    def fetch(self, values: Sequence[tuple[RuntimeValue, str]]) -> list[Array]:
        """The values (`onnxruntime.OrtValue` on the device, dtype) as arrays of the host, once all are there.

        Each array owns its memory: it stays as it is through later runs.
        """

    @abstractmethod
    def graph_ms(self) -> float:
        """Milliseconds on the device's clock between the last `begin` and `end`; to be asked after `fetch`."""

    @abstractmethod
    def close(self) -> None:
        """Lets the memory on the device go."""
