"""Every memory operation, against plain bytes, on every backend that this machine has."""

from __future__ import annotations

import mmap
import random

import numpy as np
import pytest

from device_operations.errors import OperationError
from workers.devices import Buffer, Device, open_device
from workers.devices.torch_memory import host_tensor

SIZE = 4099  # a prime, so that nothing is aligned by luck


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def filled(device: Device) -> tuple[Buffer, bytes]:
    content = noise(SIZE)
    buffer = device.allocate(SIZE)
    device.write(buffer, 0, content)
    return buffer, content


def content_of(device: Device, buffer: Buffer) -> bytes:
    return bytes(device.read(buffer))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 4096, SIZE, (1 << 20) + 1])
def test_a_new_allocation_is_all_zero_even_where_another_held_bytes_before(device: Device, size: int) -> None:
    for _ in range(3):
        buffer = device.allocate(size)
        assert content_of(device, buffer) == bytes(size)
        device.fill(buffer, 0xA5)
        device.release(buffer)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 7, 255, 4093])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_what_was_written_at_any_offset_is_read_back_and_nothing_else_changed(
    device: Device, filled: tuple[Buffer, bytes], offset: int, size: int
) -> None:
    buffer, before = filled
    data = noise(size, seed=1)
    device.write(buffer, offset, data)
    assert bytes(device.read(buffer, offset, size)) == data
    assert content_of(device, buffer) == before[:offset] + data + before[offset + size :]


def test_bytes_move_through_memory_that_is_pinned_where_it_lies_and_after_it_was_let_go(device: Device) -> None:
    memory = memoryview(mmap.mmap(-1, 1 << 20))
    let_go = device.pin(memory)
    if device.backend == "cuda":
        assert let_go is not None
        assert host_tensor(memory).is_pinned()
    first, second = device.allocate(len(memory)), device.allocate(len(memory))
    for seed in range(2):
        memory[:] = data = noise(len(memory), seed)
        device.write(first, 0, memory)
        device.copy(second, 0, first, 0, len(memory))
        memory[:] = bytes(len(memory))
        assert device.read(second, into=memory) == data
        if let_go is not None and seed == 0:
            let_go()
            assert not host_tensor(memory).is_pinned()
    for buffer in (first, second):
        device.release(buffer)


def test_sixteen_mebibytes_go_there_and_back(device: Device) -> None:
    data = noise(16 << 20)
    buffer = device.allocate(len(data))
    device.write(buffer, 0, data)
    assert content_of(device, buffer) == data
    device.release(buffer)


def test_any_contiguous_array_can_be_written(device: Device) -> None:
    array = np.arange(24, dtype=np.float64).reshape(2, 3, 4)
    buffer = device.allocate(array.nbytes)
    device.write(buffer, 0, memoryview(array))
    assert np.array_equal(np.frombuffer(device.read(buffer), np.float64), array.ravel())


def test_reading_fills_the_memory_that_the_caller_gives(device: Device, filled: tuple[Buffer, bytes]) -> None:
    buffer, before = filled
    mine = bytearray(100)
    device.read(buffer, 11, 100, into=memoryview(mine))
    assert bytes(mine) == before[11:111]


def test_what_was_read_is_a_copy(device: Device, filled: tuple[Buffer, bytes]) -> None:
    buffer, before = filled
    read = device.read(buffer)
    device.fill(buffer, 0)
    assert bytes(read) == before


def test_what_was_written_may_be_changed_by_its_owner_afterwards(device: Device) -> None:
    data = bytearray(noise(SIZE))
    kept = bytes(data)
    buffer = device.allocate(SIZE)
    device.write(buffer, 0, data)
    data[:] = bytes(SIZE)
    assert content_of(device, buffer) == kept


def test_reading_into_memory_of_another_size_is_refused(device: Device, filled: tuple[Buffer, bytes]) -> None:
    with pytest.raises(OperationError):
        device.read(filled[0], 0, 10, into=memoryview(bytearray(11)))


def test_a_range_is_filled_with_every_kind_of_byte(device: Device) -> None:
    buffer = device.allocate(515)
    expected = bytearray(515)
    for value in range(256):
        device.fill(buffer, value, 1 + value, 3)
        expected[1 + value : 4 + value] = bytes([value]) * 3
    assert content_of(device, buffer) == bytes(expected)


def test_a_whole_allocation_is_filled_where_no_range_is_given(device: Device) -> None:
    buffer = device.allocate(SIZE)
    device.fill(buffer, 255)
    assert content_of(device, buffer) == b"\xff" * SIZE
    device.fill(buffer, 7, offset=SIZE - 2)
    assert content_of(device, buffer) == b"\xff" * (SIZE - 2) + b"\x07\x07"


@pytest.mark.parametrize(("to", "source", "size"), [(0, 0, SIZE), (1, 0, 17), (0, 1, 17), (4098, 3, 1), (5, 4094, 5)])
def test_a_range_is_copied_between_allocations_and_nothing_else_changed(
    device: Device, filled: tuple[Buffer, bytes], to: int, source: int, size: int
) -> None:
    buffer, content = filled
    destination = device.allocate(SIZE)
    device.fill(destination, 9)
    device.copy(destination, to, buffer, source, size)
    assert content_of(device, destination) == b"\x09" * to + content[source : source + size] + b"\x09" * (
        SIZE - to - size
    )
    assert content_of(device, buffer) == content


@pytest.mark.parametrize("shift", [1, 2, 3, 16, 1000, 2047, 2048, 4000])
@pytest.mark.parametrize("forward", [True, False])
def test_overlapping_ranges_are_copied_as_memmove_does(
    device: Device, filled: tuple[Buffer, bytes], shift: int, forward: bool
) -> None:
    buffer, content = filled
    size = SIZE - shift
    to, source = (shift, 0) if forward else (0, shift)
    device.copy(buffer, to, buffer, source, size)
    expected = bytearray(content)
    expected[to : to + size] = content[source : source + size]
    assert content_of(device, buffer) == bytes(expected)


def test_an_overlapping_copy_of_several_mebibytes_is_right_too(device: Device) -> None:
    content = noise(5 << 20)
    buffer = device.allocate(len(content))
    device.write(buffer, 0, content)
    device.copy(buffer, 4097, buffer, 0, len(content) - 4097)
    assert content_of(device, buffer) == content[:4097] + content[:-4097]
    device.release(buffer)


def test_copying_an_allocation_onto_itself_changes_nothing(device: Device, filled: tuple[Buffer, bytes]) -> None:
    buffer, content = filled
    device.copy(buffer, 0, buffer, 0, SIZE)
    device.copy(buffer, 5, buffer, 5, 100)
    assert content_of(device, buffer) == content


OUTSIDE = [
    (-1, 1),
    (0, SIZE + 1),
    (SIZE, 1),
    (SIZE + 1, 0),
    (1, SIZE),
    (0, -1),
    (2**63, 1),
    (1, 2**64),
    (-(2**63), 2**63),
]


@pytest.mark.parametrize(("offset", "size"), OUTSIDE)
def test_a_range_outside_the_allocation_is_refused_and_changes_nothing(
    device: Device, filled: tuple[Buffer, bytes], offset: int, size: int
) -> None:
    buffer, content = filled
    other = device.allocate(SIZE)
    attempts = [
        lambda: device.fill(buffer, 1, offset, size),
        lambda: device.read(buffer, offset, size),
        lambda: device.copy(buffer, offset, other, 0, size),
        lambda: device.copy(other, 0, buffer, offset, size),
        lambda: device.host_view(buffer, offset, size),
    ]
    if 0 <= size < 2**32:
        attempts.append(lambda: device.write(buffer, offset, bytes(size)))
    for attempt in attempts:
        with pytest.raises(OperationError) as refused:
            attempt()
        assert refused.value.code == "out_of_range"
    assert content_of(device, buffer) == content
    assert content_of(device, other) == bytes(SIZE)


@pytest.mark.parametrize("value", [-1, 256, 1 << 40])
def test_a_fill_that_is_no_byte_is_refused(device: Device, filled: tuple[Buffer, bytes], value: int) -> None:
    with pytest.raises(OperationError) as refused:
        device.fill(filled[0], value)
    assert refused.value.code == "out_of_range"


def test_empty_ranges_are_allowed_up_to_the_very_end(device: Device, filled: tuple[Buffer, bytes]) -> None:
    buffer, content = filled
    device.fill(buffer, 1, SIZE, 0)
    device.copy(buffer, SIZE, buffer, 0, 0)
    device.write(buffer, SIZE, b"")
    assert bytes(device.read(buffer, SIZE, 0)) == b""
    assert content_of(device, buffer) == content


@pytest.mark.parametrize("size", [0, -1, -(2**63)])
def test_an_allocation_without_a_byte_is_refused(device: Device, size: int) -> None:
    with pytest.raises(OperationError) as refused:
        device.allocate(size)
    assert refused.value.code == "out_of_range"


@pytest.mark.parametrize("size", [1 << 50, 1 << 62, 1 << 80])
def test_running_out_of_memory_is_named_and_leaves_the_device_usable(device: Device, size: int) -> None:
    count, held = device.buffer_count, device.allocated_bytes
    with pytest.raises(OperationError) as refused:
        device.allocate(size)
    assert refused.value.code == "out_of_memory"
    assert str(device) in refused.value.message
    assert (device.buffer_count, device.allocated_bytes) == (count, held)
    buffer = device.allocate(16)
    assert content_of(device, buffer) == bytes(16)


def test_the_device_counts_what_is_allocated_and_not_released(device: Device) -> None:
    count, held = device.buffer_count, device.allocated_bytes
    buffers = [device.allocate(size) for size in (1, 10, 100)]
    assert (device.buffer_count, device.allocated_bytes) == (count + 3, held + 111)
    device.release(buffers[1])
    device.release(buffers[1])
    assert (device.buffer_count, device.allocated_bytes) == (count + 2, held + 101)
    device.release(buffers[0])
    device.release(buffers[2])
    assert (device.buffer_count, device.allocated_bytes) == (count, held)


def test_a_released_allocation_is_never_readable_again(device: Device, filled: tuple[Buffer, bytes]) -> None:
    buffer, _ = filled
    other = device.allocate(SIZE)
    device.release(buffer)
    for attempt in (
        lambda: device.read(buffer),
        lambda: device.write(buffer, 0, b"x"),
        lambda: device.fill(buffer, 1),
        lambda: device.copy(other, 0, buffer, 0, 1),
        lambda: device.tensor_view(buffer, "uint8", (1,)),
    ):
        with pytest.raises(OperationError) as refused:
            attempt()
        assert refused.value.code == "allocation_not_found"


def test_releasing_gives_the_memory_back_to_the_system_or_the_device_says_that_it_does_not(device: Device) -> None:
    before, held = device.memory().process_bytes, device.allocated_bytes
    size = 192 << 20
    buffers = [device.allocate(size // 12) for _ in range(12)]
    grown = (device.memory().process_bytes or 0) - (before or 0)
    assert device.allocated_bytes == held + size
    for buffer in buffers:
        device.release(buffer)
    assert device.allocated_bytes == held
    kept = (device.memory().process_bytes or 0) - (before or 0)
    if before is None or not device.describe().capabilities["returns_memory"]:
        # Freed or not, the process holds it; our own count is the truth there, and the room can be had again.
        for buffer in [device.allocate(size // 12) for _ in range(12)]:
            device.release(buffer)
        assert device.allocated_bytes == held
        return
    assert grown > 0.9 * size
    assert kept < 0.1 * size


def test_a_buffer_of_another_device_is_refused(device: Device) -> None:
    stranger = open_device("cpu", 7).allocate(8)
    mine = device.allocate(8)
    for attempt in (
        lambda: device.fill(stranger, 1),
        lambda: device.copy(mine, 0, stranger, 0, 8),
        lambda: device.copy(stranger, 0, mine, 0, 8),
        lambda: device.release(stranger),
    ):
        with pytest.raises(OperationError):
            attempt()


def test_host_memory_is_shared_and_other_memory_has_no_host_view(device: Device) -> None:
    buffer = device.allocate(64)
    view = device.host_view(buffer, 8, 16)
    if not device.host_memory:
        assert view is None
        return
    assert view is not None
    view[:] = b"\x42" * 16
    assert content_of(device, buffer) == bytes(8) + b"\x42" * 16 + bytes(40)


@pytest.mark.parametrize("seed", range(12))
def test_random_sequences_of_operations_agree_with_plain_bytes(device: Device, seed: int) -> None:
    dice = random.Random(seed)
    sizes = [dice.randint(1, 300) for _ in range(3)]
    buffers = [device.allocate(size) for size in sizes]
    plain = [bytearray(size) for size in sizes]
    for _ in range(60):
        at = dice.randrange(3)
        offset = dice.randint(0, sizes[at])
        size = dice.randint(0, sizes[at] - offset)
        operation = dice.choice(["fill", "write", "copy", "renew"])
        if operation == "fill":
            value = dice.randrange(256)
            device.fill(buffers[at], value, offset, size)
            plain[at][offset : offset + size] = bytes([value]) * size
        elif operation == "write":
            data = dice.randbytes(size)
            device.write(buffers[at], offset, data)
            plain[at][offset : offset + size] = data
        elif operation == "copy":
            source = dice.randrange(3)
            size = min(size, sizes[source])
            start = dice.randint(0, sizes[source] - size)
            device.copy(buffers[at], offset, buffers[source], start, size)
            plain[at][offset : offset + size] = bytes(plain[source][start : start + size])
        else:
            device.release(buffers[at])
            buffers[at], plain[at] = device.allocate(sizes[at]), bytearray(sizes[at])
        for buffer, expected in zip(buffers, plain, strict=True):
            assert content_of(device, buffer) == bytes(expected), operation
    for buffer in buffers:
        device.release(buffer)


def test_an_array_of_nothing_can_be_written(device: Device) -> None:
    device.write(device.allocate(4), 4, memoryview(np.zeros((0, 3), np.float32)))
