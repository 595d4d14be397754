"""Every file that a document names or links to exists, and so does every function that it names in a file."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.stack import REPOSITORY

_LISTED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    check=True,
)
DOCUMENTS = [path for name in _LISTED.stdout.splitlines() if (path := REPOSITORY / name).exists()]

#: Those in which each `path/file.py` is a promise, not an example or a caller's own file.
NAMING_FILES = [
    path
    for path in DOCUMENTS
    if path.parent.name == "decisions"
    or path.name in ("architecture.md", "contract.md", "CONTRIBUTING.md", "glossary.md", "lifecycle.md", "README.md")
]

_FOLDERS = "api_gateway|benchmarks|device_operations|docs|examples|migrations|requirements|server|tasks|tests|workers"
_FILE = re.compile(rf"(?<![\w/.])((?:{_FOLDERS})/[\w./-]*\w(?:\.\w+)?/?)(?:::([\w.]+))?")


def name_of(document: Path) -> str:
    return document.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_relative_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        there = document if not path else document.parent / path
        assert there.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(there), f"{target}: no such heading"


def anchors(document: Path) -> set[str]:
    """The anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", NAMING_FILES, ids=name_of)
def test_files_and_functions_that_are_named_exist(document: Path) -> None:
    wrong = []
    for path, function in _FILE.findall(document.read_text(encoding="utf-8")):
        there = REPOSITORY / path
        if not there.exists() or (function and function not in defined_in(there)):
            wrong.append(f"{path}::{function}" if function else path)
    assert not wrong


def test_threads_that_the_architecture_names_are_started_under_those_names() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("| process | thread | does |") : text.index("## Where bytes lie")]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("|")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[2])}
    code = "".join(
        path.read_text() for one in ("api_gateway", "tasks", "workers") for path in (REPOSITORY / one).rglob("*.py")
    )
    assert named - set(re.findall(r'name="([\w-]+)"', code)) == {"MainThread"}


def defined_in(module: Path) -> set[str]:
    """The functions, classes and methods (`Class.method`) of a module, and its constants."""
    found: set[str] = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [one for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
            found |= {f"{node.name}.{one.name}" for one in methods}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_the_readme_lists_every_page() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    pages = [path for path in DOCUMENTS if path.parent == REPOSITORY / "docs"]
    assert len(pages) > 10
    assert [path.name for path in pages if f"](docs/{path.name})" not in text] == []
