"""Settings: each wrong one stops the program with its name, its value and what is allowed; secrets never show."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from device_operations.devices import NamedDevice, device_ids, name_devices, parse_devices, spell_devices
from device_operations.settings import Settings, SettingsError, describe, gateway_url, names, read, stack_file
from device_operations.settings.api_keys import ApiKey
from tests.support.stack import REPOSITORY

Read = Callable[..., Settings]

#: The contract's names, section 11, with the defaults it gives.
CONTRACT = {
    "DATABASE_URL": None,
    "REDIS_URL": None,
    "NODE": None,
    "HTTP__HOST": "127.0.0.1",
    "HTTP__PORT": 8000,
    "HTTP__RATE_LIMIT_PER_SECOND": None,
    "HTTP__MAX_CONNECTIONS": 1000,
    "HTTP__MAX_BODY_BYTES_IN_FLIGHT": 512 * 2**20,
    "HTTP__FAST_PATH": True,
    "FLOWER__PORT": 5555,
    "DEVICES": "auto",
    "API_KEYS": "",
    "MAX_MEMORY_ALLOCATION_GB": 24,
    "DEFAULT_DEVICE": "gpu_0",
    "ENABLE_GPU_SCHEDULING": True,
    "INFERENCE__MAX_CONCURRENT_SESSIONS": 5,
    "INFERENCE__SESSION_TIMEOUT_MINUTES": 30,
    "TRAINING__MAX_BATCH_SIZE": 32,
    "TRAINING__TRUST_PROGRAMS": False,
    "QUEUE__MAX_LENGTH": 10_000,
    "BLOBS__TTL_HOURS": 24,
    "WEBHOOK__SECRET": None,
    "WEBHOOK__ALLOW_PRIVATE": False,
    "JOBS__RETENTION_DAYS": 7,
    "LEASE_SECONDS": 15,
}


def test_every_name_of_the_contract_is_there_with_its_default(settings: Read) -> None:
    in_force = {one.name.removeprefix("DEVICE_OPERATIONS_"): one.value for one in describe(settings())}
    assert {name: in_force[name] for name in CONTRACT} == CONTRACT
    without_value = {"DATA_DIR", "MODEL_CACHE_PATH", "TRAINING__CHECKPOINT_PATH", "BLOBS__URL", "BLOBS__MAX_BYTES"}
    assert without_value <= set(in_force)


def test_folders_default_below_the_working_directory(settings: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEVICE_OPERATIONS_DATA_DIR")
    here = Path.cwd()
    found = settings()
    assert (found.data_dir, found.model_cache_path) == (here / ".device-operations", here / "models")
    assert found.training.checkpoint_path == here / "checkpoints"
    assert found.blobs.url == (here / ".device-operations" / "blobs").as_uri()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("HTTP__PORT", "abc", ["DEVICE_OPERATIONS_HTTP__PORT", "'abc'", "to 65535"]),
        ("HTTP__PORT", "70000", ["DEVICE_OPERATIONS_HTTP__PORT", "'70000'", "to 65535"]),
        ("LEASE_SECONDS", "0", ["DEVICE_OPERATIONS_LEASE_SECONDS", "'0'", "1 to 3600"]),
        ("LEASE_SECONDS", "nan", ["DEVICE_OPERATIONS_LEASE_SECONDS", "'nan'", "1 to 3600"]),
        ("MAX_MEMORY_ALLOCATION_GB", "inf", ["DEVICE_OPERATIONS_MAX_MEMORY_ALLOCATION_GB", "'inf'", "above 0"]),
        ("DEVICES", "gpu:0", ["DEVICE_OPERATIONS_DEVICES", "'gpu:0'", "cuda:0,cuda:1"]),
        ("DEVICES", "cuda:0,cuda:0", ["DEVICE_OPERATIONS_DEVICES", "given twice"]),
        ("DEVICES", "cpu:0", ["DEVICE_OPERATIONS_DEVICES", "not 1 to 64"]),
        ("NODE", "Node A", ["DEVICE_OPERATIONS_NODE", "'Node A'", "lower-case"]),
        ("DATABASE_URL", "mysql://u@h/d", ["DEVICE_OPERATIONS_DATABASE_URL", "mysql://u@h/d", "postgresql://"]),
        ("REDIS_URL", "localhost:6379", ["DEVICE_OPERATIONS_REDIS_URL", "redis://"]),
        (
            "TRAINING__TRUST_PROGRAMS",
            "maybe",
            ["DEVICE_OPERATIONS_TRAINING__TRUST_PROGRAMS", "'maybe'", "true or false"],
        ),
        ("API_KEYS", "alice", ["DEVICE_OPERATIONS_API_KEYS", "owner:key"]),
        ("API_KEYS", "alice:longenough,bob:longenough", ["DEVICE_OPERATIONS_API_KEYS", "twice"]),
        ("HTTP__PROT", "80", ["DEVICE_OPERATIONS_HTTP__PROT", "did you mean DEVICE_OPERATIONS_HTTP__PORT"]),
        ("HTTP", "80", ["DEVICE_OPERATIONS_HTTP is no setting", "DEVICE_OPERATIONS_HTTP__PORT"]),
        ("CONFIG", "/nowhere.toml", ["DEVICE_OPERATIONS_CONFIG", "/nowhere.toml", "TOML"]),
    ],
)
def test_a_wrong_value_is_refused_with_name_value_and_what_is_allowed(
    settings: Read, name: str, value: str, said: list[str]
) -> None:
    with pytest.raises(SettingsError) as refused:
        settings(**{name: value})
    for part in said:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("DATABASE_URL", "mysql://user:open sesame@host/d", "open sesame"),
        ("DATABASE_URL", "mysql://user:pass/word@host/d", "pass/word"),
        ("REDIS_URL", "rediss2://:open-sesame@host/0?password=again", "again"),
        ("API_KEYS", "alice:sesame", "sesame"),
        ("API_KEYS", '[{"owner": "alice", "key": "open-sesame", "admin": 3}]', "open-sesame"),
        ("WEBHOOK__SECRET", "sesame", "sesame"),
        ("FLOWER__PASSWORD", "open,sesame", "open,sesame"),
    ],
)
def test_a_wrong_secret_is_refused_without_showing_it(settings: Read, name: str, value: str, secret: str) -> None:
    with pytest.raises(SettingsError) as refused:
        settings(**{name: value})
    assert name in str(refused.value)
    assert secret not in str(refused.value)


def test_secrets_show_neither_in_the_repr_nor_in_what_is_described(settings: Read) -> None:
    found = settings(
        DATABASE_URL="postgresql://user:sesame-1/@host/d",
        REDIS_URL="redis://:sesame-2@host/0",
        API_KEYS="alice:sesame-3,bob:sesame-4:admin",
        WEBHOOK__SECRET="sesame-5",
        FLOWER__PASSWORD="sesame-6",
        BLOBS__URL="s3://key:sesame-7@bucket/p",
    )
    shown = repr(found) + json.dumps([one.shown for one in describe(found)])
    assert "sesame" not in shown
    assert "postgresql://user:********@host/d" in shown
    assert "alice:********,bob:********:admin" in shown


def test_api_keys_are_read_from_text_and_from_json(settings: Read) -> None:
    wanted = (ApiKey("alice", "open-sesame"), ApiKey("bob", "shut-sesame", admin=True))
    assert settings(API_KEYS="alice:open-sesame,bob:shut-sesame:admin").api_keys == wanted
    listed = [{"owner": "alice", "key": "open-sesame"}, {"owner": "bob", "key": "shut-sesame", "admin": True}]
    assert settings(API_KEYS=json.dumps(listed)).api_keys == wanted


def test_the_toml_file_is_read_and_the_environment_wins(settings: Read, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(
        'lease_seconds = 3\ndevices = "cpu:2"\n[http]\nport = 81\n[[api_keys]]\nowner = "a"\nkey = "12345678"\n'
    )
    found = settings(CONFIG=file, HTTP__HOST="::1", LEASE_SECONDS=4)
    assert (found.lease_seconds, found.http.host, found.http.port) == (4, "::1", 81)
    assert found.api_keys == (ApiKey("a", "12345678"),)
    assert len(found.devices) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[http]\nport = 99999\n", "DEVICE_OPERATIONS_HTTP__PORT is 99999"),
        ("[http]\nprot = 1\n", "did you mean DEVICE_OPERATIONS_HTTP__PORT"),
        ("http = 3\n", "DEVICE_OPERATIONS_HTTP must be a table"),
        ("lease = = 3\n", "TOML"),
    ],
)
def test_a_wrong_toml_file_is_refused(settings: Read, tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as refused:
        settings(CONFIG=file)
    assert said in str(refused.value)


def test_an_empty_value_is_as_good_as_none(settings: Read) -> None:
    assert settings(LEASE_SECONDS="", API_KEYS="").lease_seconds == 15


def test_what_kubernetes_injects_for_a_service_of_our_name_is_no_mistake(settings: Read) -> None:
    settings(SERVICE_HOST="10.0.0.1", SERVICE_PORT="8000", PORT="tcp://10.0.0.1:8000", PORT_8000_TCP_ADDR="10.0.0.1")


def test_one_reading_does_not_leak_into_the_next(settings: Read, tmp_path: Path) -> None:
    first = settings(DATA_DIR=tmp_path / "one").blobs.url
    assert settings(DATA_DIR=tmp_path / "two").blobs.url != first


def test_urls_that_a_running_stack_noted_are_used_where_none_is_set(settings: Read, tmp_path: Path) -> None:
    noted = {"database_url": "postgresql://a@b/c", "redis_url": "redis://b/0", "http_url": "http://127.0.0.1:8123"}
    stack_file(tmp_path).write_text(json.dumps(noted))
    found = settings(DATA_DIR=tmp_path, REDIS_URL="redis://mine/0")
    assert (found.database_url, found.redis_url) == ("postgresql://a@b/c", "redis://mine/0")
    assert gateway_url(found) == "http://127.0.0.1:8123"
    assert read().database_url is None, "a new stack must not take the addresses of one that is gone"
    assert gateway_url(settings(HTTP__PORT=9000)) == "http://127.0.0.1:9000"


def test_a_missing_url_says_how_to_get_one(settings: Read) -> None:
    with pytest.raises(SettingsError, match=r"DEVICE_OPERATIONS_DATABASE_URL is not set.*device-operations up"):
        settings().require_database_url()


def test_devices_get_the_names_that_callers_use() -> None:
    def named(text: str, node: str | None = None) -> list[str]:
        return [one.device_id for one in name_devices(parse_devices(text), node)]

    assert named("cuda:0,cuda:1") == ["gpu_0", "gpu_1"]
    assert named("cuda:1") == ["gpu_1"]
    assert named("cuda:0,directml:0,cpu") == ["gpu_0", "gpu_1", "cpu_0"]
    assert named("cpu:2") == ["cpu_0", "cpu_1"]
    assert named("cpu", "node-a") == ["node-a.cpu_0"]


@pytest.mark.parametrize("text", ["auto", "cuda:0,cuda:1", "directml:0", "cpu:2", "cuda:0,cpu:1"])
def test_devices_written_out_again_are_the_same_devices(text: str) -> None:
    assert spell_devices(parse_devices(text)) == text


def test_auto_finds_this_machines_devices(settings: Read) -> None:
    found = device_ids(settings())
    assert found
    assert all(one.device_id.startswith("gpu_") for one in found) or found == [NamedDevice("cpu_0", "cpu", 0)]


def test_the_public_face_loads_no_device_library_and_no_web_framework() -> None:
    heavy = ["torch", "onnxruntime", "fastapi", "sqlalchemy", "numpy", "celery"]
    modules = "device_operations.settings, device_operations.devices, device_operations.cli, device_operations.stack.up"
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]"


def test_every_setting_says_what_is_allowed(settings: Read) -> None:
    assert all(one.allowed for one in describe(settings()))
    assert len(set(names())) == len(names())
