"""PostgreSQL and Valkey of our own: private, remembered from start to start, and gone when the block ends."""

from __future__ import annotations

import json
import os
import random
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psutil
import psycopg2
import pytest
import redis

from device_operations.stack import postgres, state
from device_operations.stack.errors import StackError
from device_operations.stack.servers import Servers, running
from tests.support.accounts import as_nobody
from tests.support.folders import reachable_folder
from tests.support.stack import REPOSITORY, is_running


@pytest.fixture
def folder() -> Iterator[Path]:
    with reachable_folder() as made:
        yield made / "data"


def query(url: str, statement: str) -> object:
    connection = psycopg2.connect(url)
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement)
            row = cursor.fetchone() if cursor.description else None
            return row[0] if row else None
    finally:
        connection.close()


def without_password(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}@{parts.hostname}:{parts.port}"))


def test_data_passwords_and_ports_stay_from_one_start_to_the_next(folder: Path) -> None:
    with running(folder, durable=True) as first:
        query(first.database_url, "CREATE TABLE kept AS SELECT 42 AS answer")
        with redis.Redis.from_url(first.redis_url) as client:
            client.set("kept", "42")
    with running(folder, durable=True) as second:
        assert second == first
        assert query(second.database_url, "SELECT answer FROM kept") == 42
        with redis.Redis.from_url(second.redis_url) as client:
            assert client.get("kept") == b"42"


def test_a_remembered_port_that_is_taken_is_given_up_for_another(folder: Path) -> None:
    with running(folder) as first:
        pass
    ports = [urlsplit(url).port for url in (first.database_url, first.redis_url)]
    taken = [socket.create_server(("127.0.0.1", port or 0)) for port in ports]
    with taken[0], taken[1], running(folder) as second:
        assert query(second.database_url, "SELECT 1") == 1
    assert not set(ports) & {urlsplit(url).port for url in (second.database_url, second.redis_url)}


def test_nobody_gets_in_without_the_password(servers: Servers) -> None:
    with pytest.raises(psycopg2.OperationalError, match="password"):
        query(without_password(servers.database_url), "SELECT 1")
    with redis.Redis.from_url(without_password(servers.redis_url)) as client, pytest.raises(redis.AuthenticationError):
        client.ping()


def test_both_listen_on_loopback_only(servers: Servers) -> None:
    ports = {urlsplit(url).port for url in (servers.database_url, servers.redis_url)}
    found = [one.laddr for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert {address[0] for address in found if address and address[1] in ports} == {"127.0.0.1"}


def test_valkey_never_evicts(servers: Servers) -> None:
    with redis.Redis.from_url(servers.redis_url) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}


@pytest.mark.skipif(os.name != "posix", reason="Windows has access lists, not modes")
def test_passwords_are_in_private_files_and_in_no_argument(folder: Path) -> None:
    with running(folder) as started:
        passwords = [urlsplit(url).password for url in (started.database_url, started.redis_url)]
        arguments = " ".join(" ".join(one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"]))
        assert not [password for password in passwords if password and password in arguments]
    for path in folder.rglob("*"):
        if path.is_file() and any(password and password in path.read_text(errors="replace") for password in passwords):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_no_process_is_left_when_the_block_ends(folder: Path) -> None:
    with running(folder):
        started = [entry["pid"] for entry in json.loads((folder / "processes.json").read_text())["processes"]]
        below = [child.pid for pid in started for child in psutil.Process(pid).children(recursive=True)]
        assert len(started) == 2
    assert not [pid for pid in started + below if is_running(pid)]


def test_a_folder_in_use_is_refused_by_name(folder: Path) -> None:
    refused = pytest.raises(StackError, match=rf"process {os.getpid()}\) runs with the data folder {folder}")
    with running(folder), refused, running(folder):
        pass


def test_another_versions_cluster_is_refused_not_damaged(folder: Path) -> None:
    with running(folder):
        pass
    version = folder / "postgres" / "PG_VERSION"
    version.write_text("16\n")
    with pytest.raises(StackError, match="is PostgreSQL 16's"), running(folder):
        pass


def test_an_interrupted_first_start_is_begun_again(folder: Path) -> None:
    (folder / "postgres.unfinished").mkdir(parents=True)
    (folder / "postgres.unfinished" / "PG_VERSION").write_text("18")
    with running(folder) as started:
        assert query(started.database_url, "SELECT 1") == 1


def test_a_lost_password_is_said(folder: Path) -> None:
    with running(folder):
        pass
    (folder / "remembered.json").unlink()
    with pytest.raises(StackError, match="refuses our password"), running(folder):
        pass


def test_a_lock_file_with_a_stranger_in_it_does_not_keep_postgresql_from_starting(folder: Path) -> None:
    """As after a restart of a container, where the same small ids go to other programs of the same user."""
    with running(folder):
        pass
    account = postgres._account()
    same_user = {} if account is None else {"user": account.user_id, "group": account.group_id, "extra_groups": []}
    with subprocess.Popen(["sleep", "600"], cwd="/", **same_user) as stranger:
        lock = folder / "postgres" / "postmaster.pid"
        lock.write_text(f"{stranger.pid}\n{folder / 'postgres'}\n1\n1\n\n\n\n")
        try:
            with running(folder) as started:
                assert query(started.database_url, "SELECT 1") == 1
        finally:
            stranger.kill()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root has to run it as somebody else")
def test_where_nobody_cannot_get_in_binaries_and_data_go_elsewhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir(mode=0o700, parents=True)
    folder.parent.chmod(0o700)  # As /root is.
    with reachable_folder() as elsewhere:
        name = str(elsewhere)
        monkeypatch.setattr(postgres, "SHARED_FOLDER", elsewhere / "shared")
        runs = postgres._runs
        monkeypatch.setattr(postgres, "_runs", lambda program, account: name in str(program) and runs(program, account))
        with running(folder) as started:
            assert query(started.database_url, "SELECT 1") == 1
            data = query(started.database_url, "SHOW data_directory")
        assert str(data).startswith(name)
        copies = list((elsewhere / "shared").glob("postgresql-18-*"))
        assert len(copies) == 1
        with running(folder) as again:
            assert again == started


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="it takes root to become somebody else")
def test_an_ordinary_user_runs_the_servers_as_well(folder: Path) -> None:
    folder.parent.chmod(0o777)
    code = f"""
import os, pathlib
from device_operations.stack.servers import running
with running(pathlib.Path({str(folder)!r})) as started:
    import psycopg2
    with psycopg2.connect(started.database_url).cursor() as cursor:
        cursor.execute("SELECT 1")
        print("answered", cursor.fetchone(), "user", os.geteuid())
"""
    options = as_nobody()
    done = subprocess.run(
        [*options.pop("python"), "-c", code], capture_output=True, text=True, cwd=REPOSITORY, **options
    )
    assert f"answered (1,) user {options['user']}" in done.stdout, done.stderr


def test_free_ports_lie_where_no_outgoing_connection_takes_them() -> None:
    assert state.free_port() in range(20_000, 32_000)


def test_no_port_is_given_to_two(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(parents=True)
    # As chance has it once in twelve thousand times: both look at the same ports first, and neither listens yet.
    drawn = random.sample(state.PORTS, 200)
    monkeypatch.setattr(random, "sample", lambda _ports, _count: drawn)
    ports = {state.free_port(), state.free_port()}
    remembered = state.Remembered(folder)
    ports |= {remembered.port("postgres_port"), remembered.port("valkey_port")}
    assert len(ports) == 4
    assert state.Remembered(folder).port("valkey_port") in ports
    remembered.put("valkey_port", remembered.port("postgres_port"))
    assert remembered.port("valkey_port") != remembered.port("postgres_port")
