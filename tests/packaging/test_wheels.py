"""Both wheels outside of the repository: a client's environment gets one package; a server's runs the whole product."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest

from device_operations.settings import PREFIX
from tests.packaging.environments import Environment, build_wheels, lend_libraries, make_environment
from tests.support.folders import reachable_folder
from tests.support.stack import REPOSITORY, RunningStack, eventually

DECLARED = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
SERVERS = ("api_gateway", "migrations", "tasks", "workers")

#: Libraries whose import name is not their distribution's.
IMPORTED_AS = {"pillow": "PIL", "ml-dtypes": "ml_dtypes", "pydantic-settings": "pydantic_settings"}


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with reachable_folder() as made:
        yield made


@pytest.fixture(scope="module")
def wheels(scratch: Path) -> tuple[Path, Path]:
    return build_wheels(scratch)


@pytest.fixture(scope="module")
def client(scratch: Path, wheels: tuple[Path, Path]) -> Environment:
    """What `pip install device-operations` makes of an empty environment, beside NumPy 2, which servers cannot have."""
    made = make_environment(scratch, "client")
    locked = (REPOSITORY / "requirements" / "dev.lock").read_text(encoding="utf-8")
    constraints = scratch / "constraints.txt"
    constraints.write_text(re.sub(r"^numpy==.*$", "numpy>=2", locked, flags=re.MULTILINE), encoding="utf-8")
    made.install("--constraint", constraints, wheels[0])
    return made


@pytest.fixture(scope="module")
def server(scratch: Path, wheels: tuple[Path, Path]) -> Environment:
    """Both wheels, with the libraries of the environment that runs the tests."""
    made = make_environment(scratch, "server")
    lend_libraries(made)
    made.install("--no-deps", *wheels)
    return made


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as opened:
        (name,) = [one for one in opened.namelist() if one.endswith(".dist-info/METADATA")]
        return message_from_string(opened.read(name).decode())


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as opened:
        return {name for name in opened.namelist() if ".dist-info/" not in name}


def test_each_package_is_in_one_wheel_with_all_its_files(wheels: tuple[Path, Path]) -> None:
    def tracked(*folders: str) -> set[str]:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
        return {name for name in listed.stdout.splitlines() if (REPOSITORY / name).exists()}

    assert files(wheels[0]) == tracked("device_operations")
    assert files(wheels[1]) == tracked(*SERVERS)


def test_the_server_is_installed_with_the_client_of_its_own_version(wheels: tuple[Path, Path]) -> None:
    client, server = map(metadata, wheels)
    assert client["Version"] == server["Version"] == DECLARED["project"]["version"]
    assert f"device-operations=={client['Version']}" in server.get_all("Requires-Dist", [])


@pytest.mark.parametrize("which", [0, 1])
def test_metadata_names_licence_authors_and_python(wheels: tuple[Path, Path], which: int) -> None:
    found = metadata(wheels[which])
    assert found["License-Expression"] == "MIT"
    assert found["License-File"] == "LICENSE"
    assert found["Author"] == "device-operations contributors"
    assert found["Requires-Python"]
    assert found["Summary"]
    assert found["Keywords"]
    assert found["Description-Content-Type"] == "text/markdown"
    assert "Programming Language :: Python :: 3.11" in found.get_all("Classifier", [])


def test_both_licences_are_the_same_text() -> None:
    assert (REPOSITORY / "LICENSE").read_bytes() == (REPOSITORY / "server" / "LICENSE").read_bytes()


def test_the_clients_dependencies_are_what_its_package_imports() -> None:
    """A dependency of the servers that slipped into the client's list would be installed by every caller."""
    imported: set[str] = set()
    for path in (REPOSITORY / "device_operations").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    listed = [re.split(r"[<>=\[;]", one)[0].strip() for one in DECLARED["project"]["dependencies"]]
    assert {IMPORTED_AS.get(name, name) for name in listed} <= imported


def test_a_client_gets_one_package_and_no_server(client: Environment) -> None:
    code = "from importlib.util import find_spec as f; print([n for n in {!r} if f(n)])"
    absent = (*SERVERS, "fastapi", "sqlalchemy", "celery", "psycopg2", "torch", "onnxruntime")
    assert client.evaluate(code.format(absent)) == "[]"
    found = client.evaluate("import device_operations; print(device_operations.__file__)")
    assert Path(found).is_relative_to(client.folder)


def test_a_clients_command_line_helps_and_tells_its_version(client: Environment) -> None:
    helped = client.run(client.program, "--help")
    assert helped.returncode == 0, helped.stderr
    assert "load-model" in helped.stdout
    version = client.run(client.program, "--version")
    assert DECLARED["project"]["version"] in version.stdout


@pytest.mark.parametrize(
    "command", [["up"], ["gateway"], ["worker", "--device", "cpu_0"], ["migrate"], ["flower"], ["doctor"]]
)
def test_a_client_that_starts_a_server_is_given_the_remedy(client: Environment, command: list[str]) -> None:
    done = client.run(client.program, *command)
    assert done.returncode == 1
    assert "pip install 'device-operations-server[cpu,local]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_producer_names_the_extra_that_it_needs(client: Environment) -> None:
    done = client.run(client.python, "-c", "from device_operations import Producer")
    assert "pip install 'device-operations[celery]'" in done.stderr


def test_a_client_submits_and_reads_jobs(client: Environment, stack: RunningStack) -> None:
    code = """
from device_operations import Client
import numpy as np
with Client() as client:
    made = client.memory.allocate(shape=[6], dtype="float32").resource.id
    client.memory.write(made, np.arange(6, dtype="float32"))
    print(np.__version__.partition(".")[0], client.memory.read_array(made, "float32", [6]).tolist())
"""
    url = {f"{PREFIX}HTTP__PORT": stack.http_url.rpartition(":")[2]}
    assert client.evaluate(code, **url) == "2 [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]"
    devices = client.run(client.program, "devices", "--json", **url)
    assert "cpu_0" in devices.stdout, devices.stderr


USER_PROGRAM = """
from device_operations import Client, Job

def load(client: Client) -> Job:
    job: Job = client.job("some-id")
    reveal_type(client.memory)
    return job
"""


def test_a_users_program_is_type_checked_against_the_wheel(client: Environment) -> None:
    script = client.elsewhere / "program.py"

    def check(text: str) -> subprocess.CompletedProcess[str]:
        script.write_text(text, encoding="utf-8")
        options = ["--strict", "--python-executable", client.python, "--cache-dir", client.elsewhere / "cache"]
        return client.run(sys.executable, "-m", "mypy", *options, script)

    right = check(USER_PROGRAM)
    assert right.returncode == 0, right.stdout
    assert 'Revealed type is "device_operations.client.memory.Memory' in right.stdout
    wrong = check(USER_PROGRAM.replace('"some-id"', "7"))
    assert wrong.returncode == 1, "the wheel's types are not read"
    assert "arg-type" in wrong.stdout


@contextlib.contextmanager
def everything_up(server: Environment, data: Path) -> Iterator[str]:
    """`device-operations up` from the wheels, outside of the repository; answers its URL."""
    settings = {"DATA_DIR": data, "HTTP__PORT": 0, "FLOWER__PORT": 0, "DEVICES": "cpu:1"}
    log = server.elsewhere / "up.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [server.program, "up", "--json"],
            cwd=server.elsewhere,
            env=dict(os.environ) | {PREFIX + name: str(value) for name, value in settings.items()},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:

        def url() -> str | None:
            said = log.read_text(encoding="utf-8")
            assert process.poll() is None, said
            events = [json.loads(line) for line in said.splitlines() if line.startswith("{") and line.endswith("}")]
            return next((one["url"] for one in events if one["event"] == "ready"), None)

        yield eventually(url, seconds=180)
    finally:
        process.terminate()
        process.wait(60)


def test_the_wheels_run_the_whole_product_outside_of_the_repository(server: Environment, scratch: Path) -> None:
    where = server.evaluate(f"import {', '.join(SERVERS)}; print(*[m.__file__ for m in ({', '.join(SERVERS)})])")
    assert all(Path(one).is_relative_to(server.folder) for one in where.split()), where
    with everything_up(server, scratch / "data") as url:
        asked = json.dumps({"size_bytes": 16, "fill": 7})
        done = server.run(
            *(server.program, "submit", "memory.allocate", "--request", asked, "--wait", "--json"),
            **{f"{PREFIX}HTTP__PORT": url.rpartition(":")[2]},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["state"] == "succeeded"
