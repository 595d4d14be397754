"""What the service writes is its own account's alone: folders 0700, files 0600, under any umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from device_operations.folders import private_folder
from device_operations.stack import processes, services
from tasks.blobs.ring import Ring, segment_name
from tasks.blobs.store import BlobStore
from tasks.blobs.transients import Transients
from tests.owners.things import Things, done, make_things
from tests.support.stack import RunningStack

pytestmark = pytest.mark.skipif(os.name != "posix", reason="Windows has no such permissions")


@pytest.fixture
def open_umask() -> Iterator[None]:
    """Files that are made without further ado are everybody's to read and write."""
    before = os.umask(0)
    yield
    os.umask(before)


def too_open(folder: Path) -> list[str]:
    """What lies in the folder, itself among it, and is not its owner's alone."""
    there = [folder, *folder.rglob("*")]
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in there if not path.is_symlink()}
    return [f"{path} {mode:o}" for path, mode in modes.items() if mode != (0o700 if path.is_dir() else 0o600)]


@pytest.mark.usefixtures("open_umask")
def test_all_that_a_used_service_has_written_is_private(
    start_stack: Callable[..., RunningStack], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where gateway and worker are started by hand, and not by `up`.
    monkeypatch.setattr(processes, "PRIVATE_UMASK", 0)
    stack = start_stack()
    things = make_things(stack.client, "default", 0.5)
    _use(stack, things)
    data, checkpoints = stack.folder / "data", stack.folder / "checkpoints"
    assert {path.name for path in (data / "blobs").iterdir()} == {"blobs", "partial", "transient"}
    assert any((data / "blobs" / "transient").iterdir())
    assert any((data / "models").rglob("*.onnx")), "no model of several files was fetched"
    assert too_open(data) + too_open(checkpoints) == []


def _use(stack: RunningStack, things: Things) -> None:
    """Passes bytes by every way there is: blobs, transient files, a read and a write, a model of several files."""
    client, ids = things.client, things.ids
    done(client, client.put(f"/api/memory/data/{ids['allocation']}", content=bytes(4096)))
    assert client.get(f"/api/memory/data/{ids['allocation']}").content == bytes(4096)
    blobs = {"model.onnx": ids["blob"], "sub/more.bin": ids["blob"]}
    done(client, client.post("/api/inference/load-model", json={"name": "several", "source": {"blobs": blobs}}))
    from tests.inference.graphs import FLOAT, build, node

    wide = build([node("Relu", "x", "y")], [("x", FLOAT, ["n"])], [("y", FLOAT, ["n"])])
    blob = client.post("/api/blobs", content=wide).json()["blob_id"]
    done(client, client.post("/api/inference/load-model", json={"name": "wide", "source": {"blob_id": blob}}))
    numbers = np.ones(100_000, np.float32).tolist()
    sent = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [100_000], "data": numbers}]}
    assert client.post("/v2/models/wide/infer", json=sent).status_code == 200
    assert stack.client.get("/readyz").status_code == 200


@pytest.mark.usefixtures("open_umask")
def test_folders_that_an_earlier_version_left_open_are_closed(tmp_path: Path) -> None:
    for name in ("blobs", "partial", "transient"):
        (tmp_path / "store" / name).mkdir(parents=True)
    tmp_path.joinpath("store").chmod(0o755)
    Transients(BlobStore((tmp_path / "store").as_uri()))
    assert [f"{stat.S_IMODE(path.stat().st_mode):o}" for path in (tmp_path / "store").iterdir()] == ["700"] * 3
    # The store's own folder was the operator's to make, and stays as it is.
    assert stat.S_IMODE((tmp_path / "store").stat().st_mode) == 0o755


@pytest.mark.usefixtures("open_umask")
def test_a_folder_is_private_with_all_that_is_missing_above_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    private_folder(tmp_path / "a" / "b" / "c")
    assert too_open(tmp_path / "a") == []
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


@pytest.mark.usefixtures("open_umask")
@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory shows as files on Linux only")
def test_shared_memory_is_private() -> None:
    name = segment_name(f"test of {os.getpid()}", 1, 1)
    ring = Ring.make(name, 1)
    try:
        assert stat.S_IMODE((Path("/dev/shm") / name).stat().st_mode) == 0o600
    finally:
        ring.forget_name()
        ring.close()


@pytest.mark.usefixtures("open_umask")
def test_what_a_child_writes_is_private_and_so_is_its_log(tmp_path: Path) -> None:
    script = "open('file', 'w').close(); __import__('os').mkdir('folder'); print('said')"
    command = processes.Command("child", services.python("-c", script), folder=tmp_path)
    tmp_path.chmod(0o700)
    assert processes.start(command, tmp_path / "child.log").wait(30) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder", "child.log"}
    assert too_open(tmp_path) == []
