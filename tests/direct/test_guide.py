"""docs/celery.md, run as it stands: every block against one stack, without this project where the page says so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from device_operations.stack.state import free_port
from tests.inference.graphs import busy
from tests.support.stack import REPOSITORY, RunningStack

GUIDE = REPOSITORY / "docs" / "celery.md"


class Page:
    """The page's blocks, with this stack's addresses in place of the page's."""

    def __init__(self, stack: RunningStack, flower: httpx.Client, folder: Path) -> None:
        self.folder = folder
        found = re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        for theirs, ours in (
            ("redis://localhost:6379/0", stack.redis_url),
            ("localhost:8000", stack.http_url.removeprefix("http://")),
            ("localhost:5555", f"{flower.base_url.host}:{flower.base_url.port}"),
            ("localhost:8001", f"localhost:{free_port()}"),
        ):
            found = [(language, text.replace(theirs, ours)) for language, text in found]
        python = [text for language, text in found if language == "python"]
        self.files = {text.split("\n", 1)[0].removeprefix("# "): text for text in python if text.startswith("# ")}
        rest = [text for text in python if not text.startswith("# ")]
        self.importing = [text for text in rest if "device_operations import" in text]
        self.bare = [text for text in rest if text not in self.importing]
        shell = [text for language, text in found if language == "bash"]
        self.django = [text for text in shell if "django" in text]
        self.flower = [text for text in shell if text not in self.django]

    def run(self, *command: str, **environment: str) -> None:
        tools = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(
            command, cwd=self.folder, env=os.environ | tools | environment, capture_output=True, text=True, timeout=90,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"

    def bash(self, text: str, **environment: str) -> None:
        self.run("bash", "-euo", "pipefail", "-c", text, **environment)


@pytest.fixture(scope="module")
def page(stack: RunningStack, flower: httpx.Client, tmp_path_factory: pytest.TempPathFactory) -> Page:
    (stack.folder / "models").mkdir(exist_ok=True)
    (stack.folder / "models" / "slow.onnx").write_bytes(busy(6000, 384))
    made = Page(stack, flower, tmp_path_factory.mktemp("page"))
    counted = [len(blocks) for blocks in (made.bare, made.importing, made.files, made.flower, made.django)]
    assert counted == [24, 1, 5, 1, 1]
    return made


def test_a_bare_app_runs_every_block_of_the_guide(page: Page) -> None:
    names = []
    for number, text in enumerate(page.bare, 1):
        path = page.folder / f"block-{number}.py"
        path.write_text(text, "utf-8")
        names.append(str(path))
    page.run(sys.executable, "-I", str(REPOSITORY / "tests" / "direct" / "guide_runner.py"), *names)


def test_the_producer_of_the_guide(page: Page) -> None:
    for text in page.importing:
        page.run(sys.executable, "-c", text)


def test_flower_of_the_guide(page: Page) -> None:
    for text in page.flower:
        page.bash(text, FLOWER_PASSWORD="a-secret")


def test_the_django_service_of_the_guide(page: Page) -> None:
    for name, text in page.files.items():
        path = page.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    for text in page.django:
        page.bash(text)
