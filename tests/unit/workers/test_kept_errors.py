"""What a failed job held is freed with it, whoever keeps its error."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from device_operations.errors import failure
from workers.devices import open_device
from workers.execution.claimed_job import clear_calls


def fail(held: list[weakref.ref[np.ndarray[tuple[int], np.dtype[np.uint8]]]]) -> None:
    tensor = np.zeros(8, np.uint8)
    held.append(weakref.ref(tensor))
    raise MemoryError("no room")


def test_an_error_that_is_kept_keeps_nothing_that_its_calls_held() -> None:
    held: list[weakref.ref[np.ndarray[tuple[int], np.dtype[np.uint8]]]] = []
    with pytest.raises(Exception, match="told") as caught:
        try:
            fail(held)
        except MemoryError as error:
            raise failure("out_of_memory", "told") from error
    gc.collect()
    assert held[0]() is not None, "the error's traceback holds it"
    clear_calls(caught.value, open_device("cpu", 0))
    assert held[0]() is None
