"""Checkpoint files: whole or not there, verified before they are read, written while steps go on."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from device_operations.errors import OperationError
from tests.training.sessions import batch, carried_over, digest, start, train
from workers.training import checkpoints
from workers.training.checkpoints import Snapshot
from workers.training.outcomes import StepOptions


def test_the_file_is_plain_safetensors_with_one_metadata_key(tmp_path: Path) -> None:
    session = start()
    train(session, 2)
    snapshot = session.snapshot()
    written = checkpoints.write(snapshot, tmp_path / "a" / "new" / "folder" / "c.safetensors")
    with safe_open(written.path, framework="pt") as file:
        assert set(file.metadata()) == {"state"}
        assert set(file.keys()) == set(snapshot.tensors)
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            assert torch.equal(file.get_tensor(name), snapshot.tensors[name])


_DTYPES = st.sampled_from(list(checkpoints._DTYPES))


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda t: t.isprintable() and t != "__metadata__"),
        st.tuples(_DTYPES, st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_any_tensors_come_back_from_a_file_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, described: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    tensors = {name: (torch.randn(shape) * 9).to(dtype) for name, (dtype, shape) in described.items()}
    written = checkpoints.write(Snapshot(tensors, {"format": 1, "step": 3}), tmp_path_factory.mktemp("any") / "file")
    read = checkpoints.read(written.path, written.sha256)
    assert read.state == {"format": 1, "step": 3}
    assert set(read.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor)


@pytest.mark.parametrize("damage", ["a bit", "the end", "nothing left"])
def test_a_damaged_file_is_refused_by_its_name(damage: str, tmp_path: Path) -> None:
    written = checkpoints.write(start().snapshot(), tmp_path / "epoch-3.safetensors")
    content = bytearray(written.path.read_bytes())
    if damage == "a bit":
        content[len(content) // 2] ^= 1
    written.path.write_bytes({"a bit": content, "the end": content[:-1], "nothing left": b""}[damage])
    with pytest.raises(OperationError, match=r"epoch-3\.safetensors has sha256") as caught:
        checkpoints.read(written.path, written.sha256)
    assert caught.value.code == "checksum_mismatch"


def test_a_missing_file_and_a_file_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OperationError) as caught:
        checkpoints.read(tmp_path / "gone", "0" * 64)
    assert caught.value.code == "checkpoint_not_found"
    other = checkpoints.write_tensors({"weights": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(OperationError, match="no checkpoint") as caught:
        checkpoints.read(other.path, other.sha256)
    assert caught.value.code == "model_invalid"
    later = checkpoints.write(Snapshot({}, {"format": 99, "step": 0}), tmp_path / "later")
    with pytest.raises(OperationError, match="format 99") as caught:
        checkpoints.read(later.path, later.sha256)
    assert caught.value.code == "model_invalid"


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on the size of files is POSIX's")
def test_a_full_disk_fails_the_checkpoint_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    import resource

    session = start()
    train(session, 2)
    kept = checkpoints.write(session.snapshot(), tmp_path / "checkpoint")
    train(session, 2, first=3)
    before = digest(session)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OperationError, match="free space") as caught:
            checkpoints.write(session.snapshot(), tmp_path / "checkpoint")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == "storage_full"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert checkpoints.read(kept.path, kept.sha256).step == 2
    assert digest(session) == before
    train(session, 1, first=5)


def test_a_folder_that_cannot_be_written_has_its_own_code(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OperationError) as caught:
        checkpoints.write(start().snapshot(), tmp_path / "file" / "checkpoint")
    assert caught.value.code == "storage_unavailable"


def test_gradients_accumulated_are_part_of_the_file(tmp_path: Path) -> None:
    session = start()
    session.perform(batch(1), StepOptions(mode="gradients"), 1)
    resumed = carried_over(session, tmp_path)
    assert digest(resumed) == digest(session)
    assert resumed.perform(None, StepOptions(mode="apply"), 2) == session.perform(None, StepOptions(mode="apply"), 2)


@pytest.mark.serial
def test_steps_hardly_wait_while_half_a_gigabyte_is_written(tmp_path: Path) -> None:
    """The stall is what a step takes beyond its usual time while the writer, on its own thread, hashes and writes.

    The best of three, as whatever else the machine does stalls steps too.
    """
    session = start()
    train(session, 20)
    large = {f"parameter/{index}": torch.ones(12_500_000) for index in range(10)}
    snapshot = Snapshot({**session.snapshot().tensors, **large}, session.snapshot().state)

    def timed() -> float:
        number = session.sequence + 1
        begun = time.perf_counter()
        session.perform(batch(number), StepOptions(), number)
        return time.perf_counter() - begun

    def stall(attempt: int) -> float:
        usual = statistics.median(timed() for _ in range(50))
        writer = threading.Thread(target=checkpoints.write, args=(snapshot, tmp_path / f"large-{attempt}"))
        writer.start()
        steps = []
        while writer.is_alive():
            steps.append(timed())
        writer.join()
        assert len(steps) > 20
        return max(steps) - usual

    assert any(stall(attempt) < 0.2 for attempt in range(3))
