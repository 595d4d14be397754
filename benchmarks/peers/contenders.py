"""Servers of one model that are started, paused, driven and stopped: the product, and its peers beside it.

While one is driven the peers are stopped (SIGSTOP), so that no idle server's polling takes from it. The product is
not: its worker holds a lease.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import httpx
import psutil

from benchmarks import running
from benchmarks.peers.cases import Case
from benchmarks.peers.client import Answer, Plan, drive
from benchmarks.peers.wire import Array, Arrays, MlServer, OpenInference, Raw
from device_operations.stack import processes
from device_operations.stack.servers import Servers
from device_operations.stack.state import free_port
from tests.support.stack import RunningStack

REPOSITORY = Path(__file__).parents[2]
PYTHON = REPOSITORY / ".cache" / "peers-venv" / "bin" / "python"

#: The product, and the same with the graph written anew at its loading.
OURS = "device-operations"
REWRITTEN = "device-operations, rewrite"

START_SECONDS = 90


class Wire(Protocol):
    """How a contender is spoken to."""

    def request(self, row: Arrays) -> bytes:
        """One HTTP request for one row."""

    def outputs(self, head: bytes, body: bytes) -> list[Array]:
        """The outputs of an answer."""


@dataclass(slots=True)
class Contender:
    """A server that has the model loaded. `processes` are those that may be paused."""

    name: str
    port: int
    wire: Wire
    processes: list[psutil.Process] = field(default_factory=list)

    def drive(self, requests: list[bytes], seconds: float, warm_seconds: float) -> Answer:
        """Sends the requests, each in a closed loop of its own."""
        return self._driven(Plan("127.0.0.1", self.port, requests, seconds, warm_seconds))

    def ask_each(self, requests: list[bytes]) -> Answer:
        """Sends each request once, one after the other."""
        return self._driven(Plan("127.0.0.1", self.port, requests, one_by_one=True))

    def _driven(self, plan: Plan) -> Answer:
        self.go_on()
        try:
            return drive(plan)
        finally:
            self.pause()

    def pause(self) -> None:
        """Holds it still, if it may be."""
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    def go_on(self) -> None:
        """Lets it go on."""
        for process in self.processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


class NotHere(Exception):
    """Raised when a peer cannot be installed or run on this machine; says why."""


@contextmanager
def product(servers: Servers, case: Case) -> Iterator[list[Contender]]:
    """device-operations with the model loaded on one CPU device, and once more written anew where the case says so."""
    with running.stack(servers) as stack:
        models = stack.folder / "models"
        models.mkdir(exist_ok=True)
        shutil.copy(case.model, models / "model.onnx")
        loaded = [_loaded(stack, OURS, "model", case)]
        if case.rewrite:
            loaded.append(_loaded(stack, REWRITTEN, "rewritten", case, graph_optimization="rewrite"))
        yield loaded


def _loaded(stack: RunningStack, contender: str, name: str, case: Case, **more: str) -> Contender:
    options = {"max_batch_size": case.batch, "intra_op_threads": 1, **more}
    body = {"name": name, "source": {"path": "model.onnx"}, "options": options}
    answer = stack.client.post("/api/inference/load-model", json=body, headers={"Prefer": "wait=60"}).raise_for_status()
    assert answer.json()["state"] == "succeeded", answer.text
    port = int(stack.http_url.rpartition(":")[2])
    return Contender(contender, port, OpenInference(f"/v2/models/{name}/infer", case.outputs, as_json=case.as_json))


@contextmanager
def litserve(case: Case, folder: Path) -> Iterator[Contender]:
    """LitServe, one worker, ZeroMQ queue."""
    sizes = [output.size for output in case.expected(case.rows(1)[0])]
    command = ["-m", "benchmarks.peers.litserve_server", str(folder / "litserve.json")]
    with _serving("litserve", case, folder, command, "/health", Raw(sizes)) as contender:
        yield contender


@contextmanager
def mlserver(case: Case, folder: Path, workers: int = 1) -> Iterator[Contender]:
    """MLServer with the custom runtime; `workers` 0 runs it in the server's own process."""
    home = folder / f"mlserver-{workers}"
    home.mkdir()
    batching = {"max_batch_size": case.batch, "max_batch_time": 0.001} if case.batch > 1 else {}
    model = {"name": "model", "implementation": "benchmarks.peers.mlserver_runtime.OnnxRuntime", **batching}
    (home / "model-settings.json").write_text(json.dumps(model))

    def settle(port: int) -> dict[str, str]:
        server = {
            "host": "127.0.0.1", "http_port": port, "grpc_port": free_port(), "metrics_port": free_port(),
            "metrics_endpoint": None, "debug": False, "gzip_enabled": False, "parallel_workers": workers,
            "logging_settings": {"version": 1, "disable_existing_loggers": False, "root": {"level": "WARNING"}},
        }  # fmt: skip
        (home / "settings.json").write_text(json.dumps(server))
        return {"PEER_CASE": str(folder / "mlserver.json")}

    command = ["-c", "import mlserver.cli; mlserver.cli.main()", "start", str(home)]
    wire = MlServer(case.outputs, as_json=case.as_json)
    with _serving("mlserver", case, folder, command, "/v2/models/model/ready", wire, settle) as contender:
        yield contender


@contextmanager
def pytriton(case: Case, folder: Path) -> Iterator[Contender]:
    """PyTriton: Triton's server and a Python process behind it."""
    command = ["-m", "benchmarks.peers.pytriton_server", str(folder / "pytriton.json")]
    wire = OpenInference("/v2/models/model/infer", case.outputs, as_json=case.as_json)

    def settle(port: int) -> dict[str, str]:
        # Triton's stub links to libpython by name, and must not meet the system's beside this Python's own modules.
        return {"LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR")}

    with _serving("pytriton", case, folder, command, "/v2/models/model/ready", wire, settle) as contender:
        yield contender


PEERS = {"litserve": litserve, "mlserver": mlserver, "pytriton": pytriton}


@contextmanager
def _serving(
    name: str,
    case: Case,
    folder: Path,
    command: list[str],
    ready_path: str,
    wire: Wire,
    settle: Callable[[int], dict[str, str]] | None = None,
) -> Iterator[Contender]:
    """A peer's process and those below it, from its start until it is ready, and ended at last."""
    if not PYTHON.exists():
        raise NotHere(f"{PYTHON.relative_to(REPOSITORY)} is missing: run `make peers`")
    port = free_port()
    told = {
        "model": str(case.model), "batch": case.batch, "port": port, "outputs": case.outputs,
        "inputs": [[tensor, dtype, shape] for tensor, (dtype, shape) in case.row.items()],
    }  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(told))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    environment |= settle(port) if settle else {}
    log = folder / f"{name}.log"
    with log.open("wb") as file:
        process = psutil.Popen(
            [str(PYTHON), *command], cwd=folder, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
    try:
        _await_ready(name, process, f"http://127.0.0.1:{port}{ready_path}", log)
        contender = Contender(name, port, wire, [process, *process.children(recursive=True)])
        contender.pause()
        yield contender
        contender.go_on()
    finally:
        below = process.children(recursive=True) if process.is_running() else []
        for one in [process, *below]:
            with suppress(psutil.NoSuchProcess):
                one.resume()
        with suppress(psutil.NoSuchProcess):
            process.terminate()
        processes.await_end([process], 5)
        processes.end_tree(process, also=below)


def _await_ready(name: str, process: psutil.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise NotHere(f"{name} ended with status {process.returncode}: {_tail(log)}")
        with suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    raise NotHere(f"{name} was not ready after {START_SECONDS} s: {_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-1500:]
