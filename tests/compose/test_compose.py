"""docker-compose.yml says what the program understands: its commands, its settings, its ports; and no secret."""

from __future__ import annotations

import http.server
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import redis
import yaml

from device_operations.cli import program
from device_operations.devices import device_ids
from device_operations.settings import PREFIX, Settings, names
from device_operations.stack import postgres, processes, valkey
from device_operations.stack.processes import Command
from device_operations.stack.state import free_port
from tests.support.stack import REPOSITORY, RunningStack, eventually

COMPOSE = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ["migrate", "gateway", "worker-cpu", "worker-cuda", "flower"]

#: What a person puts into `.env`.
DOTENV = {
    "POSTGRES_PASSWORD": "open-sesame-1",
    "REDIS_PASSWORD": "open-sesame-2",
    "FLOWER_PASSWORD": "open-sesame-3",
    "API_KEYS": "alice:open-sesame-4",
}


def interpolated(value: object) -> str:
    """As Compose fills in `${NAME:?message}` and `${NAME:-default}`."""

    def fill(match: re.Match[str]) -> str:
        name, operator, rest = match[1], match[2], match[3]
        assert operator in (":?", ":-"), f"{name}: unset must be an error or have a default"
        return DOTENV[name] if operator == ":?" else DOTENV.get(name, rest)

    return re.sub(r"\$\{(\w+)(:[?-])?([^}]*)\}", fill, str(value))


def environment(name: str) -> dict[str, str]:
    return {key: interpolated(value) for key, value in SERVICES[name].get("environment", {}).items()}


def test_all_services_of_the_product_are_there() -> None:
    assert set(SERVICES) == {"postgres", "redis", *OURS}
    assert [name for name in SERVICES if SERVICES[name].get("profiles")] == ["worker-cuda"]


@pytest.mark.parametrize("name", OURS)
def test_each_command_is_one_of_the_command_line(name: str) -> None:
    command, *arguments = SERVICES[name]["command"]
    with program.make_context("device-operations", [command, *arguments], resilient_parsing=False) as context:
        found = program.get_command(context, command)
        assert found is not None, f"there is no command {command!r}"
        found.make_context(command, list(arguments)).close()  # Raises for an option or argument that it does not take.


def test_a_command_that_the_program_does_not_know_would_be_found() -> None:
    worker = program.get_command(click.Context(program), "worker")
    assert worker is not None
    with pytest.raises(click.UsageError):
        worker.make_context("worker", ["--devise", "cpu_0"])


@pytest.mark.parametrize("name", OURS)
def test_each_setting_is_known_and_its_value_allowed(name: str, settings: Callable[..., Settings]) -> None:
    given = environment(name)
    assert {key for key in given if key.startswith(PREFIX)} == set(given)
    assert set(given) <= set(names())
    settings(**{key.removeprefix(PREFIX): value for key, value in given.items()})


@pytest.mark.parametrize("name", ["worker-cpu", "worker-cuda"])
def test_each_worker_owns_a_device_that_its_settings_offer(name: str, settings: Callable[..., Settings]) -> None:
    in_force = settings(**{key.removeprefix(PREFIX): value for key, value in environment(name).items()})
    wanted = SERVICES[name]["command"][-1]
    assert wanted in [one.device_id for one in device_ids(in_force)]
    assert f'"{wanted}@$$HOSTNAME"' in SERVICES[name]["healthcheck"]["test"][1]


def test_the_urls_lead_to_the_services_and_their_accounts() -> None:
    own = environment("postgres")
    for name in OURS:
        given = environment(name)
        user, password, database = own["POSTGRES_USER"], own["POSTGRES_PASSWORD"], own["POSTGRES_DB"]
        assert given[f"{PREFIX}DATABASE_URL"] == f"postgresql://{user}:{password}@postgres:5432/{database}"
        assert given[f"{PREFIX}REDIS_URL"] == f"redis://:{environment('redis')['REDIS_PASSWORD']}@redis:6379/0"
    assert SERVICES["postgres"]["image"] == f"postgres:{postgres.MAJOR_VERSION}"


@pytest.mark.parametrize(("name", "setting"), [("gateway", "HTTP__PORT"), ("flower", "FLOWER__PORT")])
def test_ports_are_published_on_loopback_and_are_those_listened_on(name: str, setting: str) -> None:
    port = environment(name)[PREFIX + setting]
    assert SERVICES[name]["ports"] == [f"127.0.0.1:{port}:{port}"]
    assert port in " ".join(SERVICES[name]["healthcheck"]["test"])
    assert environment(name)[PREFIX + setting.replace("PORT", "HOST")] == "0.0.0.0"


def test_nothing_else_is_published() -> None:
    assert [name for name in SERVICES if "ports" in SERVICES[name]] == ["gateway", "flower"]


def test_dependencies_exist_and_can_be_waited_for() -> None:
    for name, service in SERVICES.items():
        for target, options in service.get("depends_on", {}).items():
            assert target in SERVICES, f"{name} waits for {target}"
            if options["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[target]
            else:
                assert options["condition"] == "service_completed_successfully"
                assert SERVICES[target]["restart"] == "no", "what is started again never completes"
    for name in ("gateway", "worker-cpu", "worker-cuda"):
        assert set(SERVICES[name]["depends_on"]) == {"migrate", "redis"}
    assert "postgres" in SERVICES["migrate"]["depends_on"]


def test_every_service_that_stays_has_a_health_check_and_comes_back() -> None:
    for name in set(SERVICES) - {"migrate"}:
        assert SERVICES[name]["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
        assert SERVICES[name]["restart"] == "unless-stopped", name


def test_volumes_are_declared_and_used() -> None:
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service["volumes"]}
    assert used == set(COMPOSE["volumes"])


def test_folders_of_the_settings_lie_on_volumes() -> None:
    mounts = [volume.split(":")[1] for volume in SERVICES["gateway"]["volumes"]]
    for name in ("DATA_DIR", "MODEL_CACHE_PATH", "TRAINING__CHECKPOINT_PATH"):
        assert any(environment("gateway")[PREFIX + name].startswith(mount) for mount in mounts), name


def test_no_secret_is_in_the_file() -> None:
    """Whatever is named like a secret, or stands in a URL before an @, is filled in from outside."""
    for service in SERVICES.values():
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|KEY|SECRET|TOKEN", key):
                assert re.fullmatch(r"\$\{\w+:\?[^}]*\}", str(value)), key
            for userinfo in re.findall(r"://([^@/]*)@", str(value)):
                assert re.fullmatch(r"\w*:\$\{\w+:\?[^}]*\}", userinfo), key


def test_the_gateways_health_check_tells_a_live_one_from_a_dead_one(stack: RunningStack) -> None:
    python, option, code = SERVICES["gateway"]["healthcheck"]["test"][1:]
    assert (python, option) == ("python", "-c")
    for port, well in ((stack.http_url.rpartition(":")[2], True), (free_port(), False)):
        done = subprocess.run([sys.executable, "-c", code.replace("8000", str(port))], capture_output=True)
        assert (done.returncode == 0) == well


@pytest.mark.parametrize(("status", "well"), [(401, True), (500, False)])
def test_flowers_health_check_wants_to_be_asked_for_the_password(status: int, well: bool) -> None:
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

    code = SERVICES["flower"]["healthcheck"]["test"][3]
    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.handle_request).start()
        command = [sys.executable, "-c", code.replace("5555", str(server.server_port))]
        assert (subprocess.run(command, capture_output=True).returncode == 0) == well


@pytest.mark.skipif(os.name != "posix", reason="there is no Valkey of our own on Windows")
def test_the_redis_command_starts_a_server_with_a_password_that_never_evicts(tmp_path: Path) -> None:
    (tmp_path / "valkey-server").symlink_to(valkey._program())
    port = free_port()
    text = SERVICES["redis"]["command"][2].replace("$$", "$").replace("dir /data", f"dir {tmp_path}\\nport {port}")
    given = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "REDIS_PASSWORD": "open-sesame"}
    process = processes.start(Command("redis", ["sh", "-c", text], given), tmp_path / "log")
    try:
        client = redis.Redis(port=port, password="open-sesame")
        eventually(lambda: valkey._answers(f"redis://:open-sesame@127.0.0.1:{port}/0"))
        assert client.config_get("maxmemory-policy", "appendonly") == {
            "maxmemory-policy": "noeviction",
            "appendonly": "yes",
        }
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=port).ping()
    finally:
        processes.end_tree(process)


def test_the_workers_health_check_tells_a_live_one_from_a_dead_one(stack: RunningStack) -> None:
    text = SERVICES["worker-cpu"]["healthcheck"]["test"][1].replace("$$HOSTNAME", socket.gethostname())
    command = [sys.executable, "-m", *shlex.split(text)]
    assert subprocess.run(command, cwd=REPOSITORY, env=stack.environment, capture_output=True).returncode == 0
    absent = [part.replace("cpu_0@", "cpu_7@") for part in command]
    assert subprocess.run(absent, cwd=REPOSITORY, env=stack.environment, capture_output=True).returncode != 0


def test_the_image_is_made_of_what_is_there() -> None:
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    for source in re.findall(r"^COPY (.+) \S+$", dockerfile, re.MULTILINE):
        for path in source.split():
            for lock in ("cpu", "cuda"):
                assert (REPOSITORY / path.replace("${LOCK}", lock)).exists(), path
    locks = {SERVICES[name]["build"]["args"]["LOCK"] for name in OURS}
    assert locks == {"cpu", "cuda"}
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*", "nothing gets into the image, such as .env, that is not named"
