"""The two wheels, built from a copy of the tree, and Python environments of their own that they are installed into."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

from tests.support.stack import REPOSITORY

#: What the wheels are made of. A copy is built, so that neither an earlier build nor this checkout gets into them.
SOURCES = (
    *("LICENSE", "README.md", "pyproject.toml", "server"),
    *("api_gateway", "device_operations", "migrations", "tasks", "workers"),
)

#: Installing may download; a loaded machine builds slowly.
SECONDS = 300


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment, and a folder outside of the repository where its programs run."""

    folder: Path
    elsewhere: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def program(self) -> Path:
        """Its `device-operations`."""
        return self.python.with_name("device-operations.exe" if os.name == "nt" else "device-operations")

    def run(self, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command outside of the repository, with nothing of ours in its environment but `environment`."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [str(part) for part in command],
            cwd=self.elsewhere,
            env=inherited | environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    def evaluate(self, code: str, **environment: str) -> str:
        """What a piece of Python prints there."""
        done = self.run(self.python, "-c", code, **environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def install(self, *what: object) -> None:
        """Installs by this Python's pip: the environment has none."""
        pip("--python", self.python, "install", "--quiet", *what)


def build_wheels(scratch: Path) -> tuple[Path, Path]:
    """The client's wheel and the server's, built by the one command of `make wheels`."""
    tree, found = scratch / "tree", scratch / "dist"
    for name in SOURCES:
        source, target = REPOSITORY / name, tree / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
        else:
            tree.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    pip("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", found, tree, tree / "server")
    (client,) = found.glob("device_operations-*.whl")
    (server,) = found.glob("device_operations_server-*.whl")
    return client, server


def make_environment(scratch: Path, name: str) -> Environment:
    """An empty environment."""
    elsewhere = scratch / f"{name}-elsewhere"
    elsewhere.mkdir()
    venv.create(scratch / name, with_pip=False, symlinks=os.name != "nt")
    return Environment(scratch / name, elsewhere)


def lend_libraries(environment: Environment) -> None:
    """Lets the environment import the libraries of this one, after its own, and nothing that is installed editable.

    A folder that a `.pth` file names is searched, but `.pth` files in it are not read.
    """
    target = environment.evaluate("import sysconfig; print(sysconfig.get_path('purelib'))")
    Path(target, "lent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")


def pip(*arguments: object) -> None:
    """Runs this environment's pip."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
