"""The command line against a running stack: what it prints for people and for machines, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper

from device_operations.cli import COMMANDS, program
from device_operations.stack import services
from tests.support.stack import REPOSITORY, RunningStack, eventually

HUGE_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"


def asks_for_huge_pages(process: psutil.Process) -> bool:
    """Whether a process was started so. The C library may cut the settings apart where it reads them."""
    told = process.environ()
    return told["GLIBC_TUNABLES"] == HUGE_PAGES or (
        told["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1" and told["glibc.malloc.arena_max"] == "1"
    )


class Cli:
    """Runs the program as a user does, in a process of its own, against one stack."""

    def __init__(self, stack: RunningStack) -> None:
        self.environment = stack.environment | {"DEVICE_OPERATIONS_HTTP__PORT": stack.http_url.rpartition(":")[2]}

    def __call__(self, *arguments: object, status: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "device_operations", *map(str, arguments)],
            env=self.environment,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            input=stdin,
            timeout=120,
        )
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def json(self, *arguments: object, status: int = 0) -> Any:
        done = self(*arguments, "--json", status=status)
        return json.loads(done.stdout or done.stderr)


@pytest.fixture(scope="module")
def cli(stack: RunningStack) -> Cli:
    return Cli(stack)


@pytest.fixture(scope="module")
def doubling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that gives its input twice over."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "doubling", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path_factory.mktemp("model") / "doubling.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def loaded(cli: Cli, doubling: Path) -> str:
    return str(cli.json("load-model", doubling)["resource"]["id"])


def test_every_command_explains_itself(cli: Cli) -> None:
    text = cli("--help").stdout
    with program.make_context("device-operations", ["--help"], resilient_parsing=True) as context:
        for name in COMMANDS:
            command = program.get_command(context, name)
            assert command is not None
            assert command.help
            assert f"  {name} " in text


def test_the_commands_of_the_contract_are_there() -> None:
    wanted = [
        "up",
        "gateway",
        "worker",
        "migrate",
        "devices",
        "settings",
        "jobs",
        "submit",
        "upload",
        "load-model",
        "run",
    ]
    assert set(wanted) <= set(COMMANDS)


def test_a_model_is_loaded_and_run_from_files(cli: Cli, loaded: str, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(3, dtype=np.float32))
    result = cli.json("run", "doubling", "--input", f"x=@{tmp_path / 'x.npy'}")
    assert result["outputs"]["y"] == {"dtype": "float32", "shape": [3], "data": [0.0, 2.0, 4.0]}
    cli("run", loaded, "--input", "x=[1.5]", "--output", f"y={tmp_path / 'y.npy'}")
    assert np.load(tmp_path / "y.npy").tolist() == [3.0]
    assert "[3.0]" in cli("run", loaded, "--input", "x=[1.5]").stdout


def test_options_of_a_load_are_said_by_name(cli: Cli, doubling: Path, loaded: str) -> None:
    said = ("--option", "graph_optimization=rewrite", "--option", "max_batch_size=3")
    job = cli.json("load-model", doubling, "--name", "anew", *said)
    assert job["resource"]["id"] != loaded
    assert cli.json("run", "anew", "--input", "x=[1.5]")["outputs"]["y"]["data"] == [3.0]
    for wrong, told in (("max_batch_size", "is not NAME="), ("max_batch_size=many", "max_batch_size")):
        assert told in cli("load-model", doubling, "--option", wrong, status=2 if "is not" in told else 1).stderr


def test_a_load_says_whether_others_may_run_the_model_and_keeps_what_it_does_not_say(
    cli: Cli, stack: RunningStack, doubling: Path
) -> None:
    told = []
    for said in ((), ("--shared",), ("--pin",), ()):
        model_id = cli.json("load-model", doubling, "--name", "said-so", *said)["resource"]["id"]
        model = stack.client.get(f"/api/inference/models/{model_id}").json()
        told.append((model["shared"], model["pinned"]))
    assert told == [(False, False), (True, False), (True, True), (True, True)]


def test_a_run_that_fails_fails_the_command_with_its_code(cli: Cli, loaded: str) -> None:
    refused = cli.json("run", loaded, "--input", "z=[1.0]", status=1)
    assert refused["error"]["code"] == "input_mismatch"
    assert "device-operations: " in cli("run", "no-such-model", "--input", "x=[1.0]", status=1).stderr


def test_a_job_is_submitted_waited_for_and_shown(cli: Cli) -> None:
    submitted = cli.json("submit", "memory.allocate", "--request", '{"size_bytes": 1024, "label": "cli"}', "--wait")
    assert submitted["state"] == "succeeded"
    shown = cli.json("jobs", submitted["job_id"])
    assert (shown["job_id"], shown["state"]) == (submitted["job_id"], "succeeded")
    assert submitted["job_id"] in [job["job_id"] for job in cli.json("jobs", "--kind", "memory.allocate")["jobs"]]
    table = cli("jobs", "--limit", 5).stdout
    assert table.splitlines()[0].split()[:4] == ["JOB", "KIND", "STATE", "DEVICE"]
    assert submitted["job_id"] in table


def test_a_request_is_read_from_a_file_and_from_standard_input(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "request.json"
    file.write_text('{"size_bytes": 64}')
    for source, text in ((f"@{file}", ""), ("@-", '{"size_bytes": 64}')):
        assert "memory.allocate" in cli("submit", "memory.allocate", "--request", source, stdin=text).stdout


def test_the_same_key_gives_the_same_job(cli: Cli) -> None:
    arguments = ("submit", "memory.allocate", "--request", '{"size_bytes": 64}', "--idempotency-key", "cli-1")
    assert cli.json(*arguments)["job_id"] == cli.json(*arguments)["job_id"]


def test_a_job_that_fails_fails_the_command_with_its_code(cli: Cli, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"this is no model")
    done = cli("load-model", broken, "--json", status=1)
    assert json.loads(done.stdout)["state"] == "failed"
    assert json.loads(done.stderr)["error"]["code"] == "model_invalid"


def test_a_file_is_uploaded_and_its_id_printed(cli: Cli, stack: RunningStack, tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(os.urandom(3_000_000))
    blob_id = cli("upload", file).stdout.strip()
    assert stack.client.get(f"/api/blobs/{blob_id}").content == file.read_bytes()
    assert cli.json("upload", file)["size_bytes"] == 3_000_000


@pytest.mark.skipif(os.name != "posix", reason="a terminal to look at is had from pty")
def test_long_work_shows_a_bar_on_a_terminal_and_only_the_result_on_standard_output(cli: Cli, doubling: Path) -> None:
    import pty

    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "device_operations", "load-model", str(doubling), "--name", "again"]
    with subprocess.Popen(command, env=cli.environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=end) as process:
        os.close(end)
        assert process.stdout is not None
        shown = b""
        try:
            while piece := os.read(terminal, 4096):
                shown += piece
        except OSError:  # Linux' way of saying that the other end is closed.
            pass
        result = process.stdout.read()
    os.close(terminal)
    assert process.returncode == 0
    assert b"doubling.onnx" in shown
    assert b"100%" in shown
    assert b"inference.load_model" in shown
    assert b"%" not in result
    assert b"model_id" in result


def test_devices_are_shown(cli: Cli) -> None:
    assert [(one["device_id"], one["state"]) for one in cli.json("devices")["devices"]] == [("cpu_0", "online")]
    assert "cpu_0" in cli("devices").stdout
    assert cli.json("devices", "--local")["devices"] == [{"device_id": "cpu_0", "backend": "cpu", "ordinal": 0}]


def test_settings_are_shown_with_secrets_masked_unless_asked_for_by_name(cli: Cli, stack: RunningStack) -> None:
    password = stack.database_url.split(":")[2].split("@")[0]
    assert password not in cli("settings").stdout
    assert password not in cli("settings", "--json").stdout
    assert cli("settings", "DATABASE_URL").stdout.strip() == stack.database_url
    assert cli.json("settings", "device_operations_lease_seconds") == 15.0
    assert "did you mean DEVICE_OPERATIONS_DATABASE_URL" in cli("settings", "DATABSE_URL", status=2).stderr


def test_jobs_are_watched_until_interrupted(cli: Cli) -> None:
    command = [sys.executable, "-m", "device_operations", "jobs", "--watch", "--json", "--label", "seen:watch"]
    with subprocess.Popen(command, env=cli.environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as watching:
        request = '{"size_bytes": 64, "job": {"labels": {"seen": "watch"}}}'
        job_id = cli.json("submit", "memory.allocate", "--request", request, "--wait")["job_id"]
        assert watching.stdout is not None
        assert json.loads(watching.stdout.readline())["job_id"] == job_id
        watching.terminate()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["submit", "memory.alocate", "--request", "{}"], "memory.allocate"),
        (["submit", "memory.allocate", "--request", "{"], "neither JSON nor a file"),
        (["submit", "memory.allocate", "--request", "[]"], "a JSON object"),
        (["submit", "memory.allocate", "--request", "@/no/such/file"], "No such file"),
        (["upload", "/no/such/file"], "does not exist"),
        (["run", "doubling", "--input", "x"], "NAME=…"),
        (["run", "doubling", "--input", "x=@/no/such.npy"], "No such file"),
        (["worker"], "--device"),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_wrong_arguments_are_refused_with_status_2(cli: Cli, arguments: list[str], said: str) -> None:
    assert said in cli(*arguments, status=2).stderr


def test_a_gateway_that_is_not_there_is_said(cli: Cli) -> None:
    done = cli("devices", "--url", "http://127.0.0.1:9", status=1)
    assert "gateway" in done.stderr


def test_the_service_commands_become_the_services(cli: Cli, stack: RunningStack, tmp_path: Path) -> None:
    assert "(head)" in cli("migrate", "current").stdout
    assert "no device 'gpu_7'" in cli("worker", "--device", "gpu_7", status=2).stderr
    port = stack.http_url.rpartition(":")[2]
    assert port in cli("gateway", status=3).stderr, "the stack's gateway has this port"


def test_a_worker_asks_for_huge_pages_unless_told_otherwise(stack: RunningStack) -> None:
    assert asks_for_huge_pages(stack.process("cpu_0"))
    told = services.worker("cpu_0", {"GLIBC_TUNABLES": "glibc.malloc.check=1"}).command.environment
    assert told == {"GLIBC_TUNABLES": "glibc.malloc.check=1"}


@pytest.mark.skipif(os.name != "posix", reason="elsewhere a process cannot become another")
def test_a_service_command_is_the_service_itself_so_that_signals_reach_it(start_stack: Any) -> None:
    stack = start_stack()
    stack.stop("cpu_0")
    command = [sys.executable, "-m", "device_operations", "worker", "--device", "cpu_0"]
    device = lambda: stack.client.get("/api/devices/cpu_0").json()  # noqa: E731
    with subprocess.Popen(command, env=stack.environment, cwd=REPOSITORY, stderr=subprocess.DEVNULL) as worker:
        try:
            eventually(lambda: device()["epoch"] == 2 and device()["state"] == "online")
            job = stack.client.post("/api/memory/allocate", json={"size_bytes": 64}, headers={"Prefer": "wait=30"})
            assert job.json()["state"] == "succeeded"
            assert asks_for_huge_pages(psutil.Process(worker.pid))
            worker.terminate()
            assert worker.wait(30) == 0
        finally:
            worker.kill()
    eventually(lambda: device()["state"] == "offline")
