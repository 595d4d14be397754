"""One table of kinds: each has its request, its operation, its row in the documents, and nothing else asks for a kind."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

from api_gateway.answers import ANSWERS
from device_operations.client.submission import _ROUTES
from device_operations.jobs import Kind
from device_operations.requests.base import JobRequest
from device_operations.requests.kinds import REQUESTS
from tasks.kinds import KINDS, spec_of
from workers.operations import SPECS

ROOT = Path(__file__).parents[3]

#: Modules that name kinds: the tables, and what submits or plans jobs of a kind of its own.
NAME_KINDS = {
    "device_operations/jobs.py",
    "device_operations/requests/kinds.py",
    "device_operations/client/embeddings.py",
    "device_operations/client/images.py",
    "device_operations/client/submission.py",
    "device_operations/client/memory.py",
    "device_operations/client/inference.py",
    "device_operations/client/training.py",
    "device_operations/cli/train.py",
    "tasks/kinds.py",
    "tasks/memory/plan.py",
    "tasks/inference/plan.py",
    "tasks/training/plan.py",
    "workers/operations/__init__.py",
    "api_gateway/routes/memory.py",
    "api_gateway/routes/inference.py",
    "api_gateway/routes/training.py",
    "api_gateway/oip/repository.py",
    "api_gateway/openai/runs.py",
    # Whether a session is `stepping`, in SQL.
    "tasks/training/sessions.py",
}


def documented() -> dict[str, list[str]]:
    """The cells of each kind's row in the documents."""
    text = (ROOT / "docs" / "operations.md").read_text()
    lines = re.findall(r"^\| `(\w+\.\w+)` \| (`[A-Z]+ /.*) \|$", text, re.MULTILINE)
    assert len({kind for kind, _ in lines}) == len(lines)
    return {kind: [cell.strip() for cell in cells.split(" | ")] for kind, cells in lines}


def test_every_kind_has_one_entry_one_request_and_one_operation() -> None:
    assert list(KINDS) == list(Kind)
    assert set(REQUESTS) == set(SPECS) == set(Kind)
    assert len(set(REQUESTS.values())) == len(REQUESTS), "two kinds share a request"
    assert all(KINDS[kind].kind is kind for kind in Kind)


@pytest.mark.parametrize("kind", Kind)
def test_an_entry_fits_its_operation_and_its_request(kind: Kind) -> None:
    spec, operation = KINDS[kind], SPECS[kind]
    assert issubclass(spec.request, JobRequest)
    assert spec.joined == (operation.run_joined is not None) == (operation.join is not None)
    assert spec.joined or not spec.claimed_ahead
    assert spec.effect is None or spec.joint_effect is None
    assert spec.effect_fact is None or spec.effect is not None
    assert spec.request.chosen_id is None or spec.request.chosen_id in spec.request.model_fields
    # What changes nothing but its own record may be run again in any case.
    assert spec.repeatable or not spec.leaves_nothing


def test_the_operations_that_load_torch_are_there() -> None:
    training = importlib.import_module("workers.operations.training.jobs")
    for kind in Kind:
        if kind.startswith("training."):
            assert callable(getattr(training, kind.removeprefix("training.")))


@pytest.mark.parametrize("kind", Kind)
def test_every_kind_has_one_row_in_the_documents_that_says_what_its_entry_says(kind: Kind) -> None:
    rows = documented()
    assert set(rows) == set(Kind)
    route, again, joined, takes_away = rows[kind]
    spec = KINDS[kind]
    assert again.startswith("yes") == spec.repeatable
    assert joined.startswith("yes") == spec.joined
    assert (takes_away == "yes") == spec.takes_away
    assert route.strip("`") in ANSWERS
    assert kind not in _ROUTES or route.strip("`") == _ROUTES[kind].partition("?")[0]


def test_the_dashboard_lists_every_kind() -> None:
    script = (ROOT / "api_gateway" / "static" / "views.js").read_text()
    assert re.findall(r'"((?:memory|inference|training)\.\w+)"', script)[: len(Kind)] == list(Kind)


def test_a_kind_of_a_newer_version_has_no_effect_and_is_not_repeated() -> None:
    spec = spec_of("memory.defragment")
    assert not spec.changes_records({"session_id": "x"})
    assert spec.ends_at_once({"applied": {}}) is None
    assert not (spec.repeatable or spec.leaves_nothing or spec.takes_away or spec.changes_models or spec.runs_model)


def asks_for_a_kind(tree: ast.AST) -> list[int]:
    """The lines that name a kind, as a member of the enum or as a text."""
    lines = []
    for node in ast.walk(tree):
        member = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Kind"
        text = isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in set(Kind)
        if (member and node.attr.isupper()) or text:
            lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("package", ["device_operations", "tasks", "workers", "api_gateway"])
def test_nothing_but_the_tables_and_what_makes_jobs_asks_for_a_kind(package: str) -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / package).rglob("*.py")
        if asks_for_a_kind(ast.parse(path.read_text()))
    }
    # An example in the API's document.
    found.discard("api_gateway/documents.py")
    assert found == {name for name in NAME_KINDS if name.startswith(f"{package}/")}


@pytest.mark.parametrize("name", sorted(NAME_KINDS - {"tasks/kinds.py"}))
def test_no_branch_asks_for_a_kind(name: str) -> None:
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Compare):
            assert not asks_for_a_kind(node), f"{name}:{node.lineno} asks for a kind: read tasks.kinds"
