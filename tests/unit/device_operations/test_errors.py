"""Errors come from the error table: no dictionary of the source is one by hand, so `retryable` cannot drift."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from device_operations.errors import CODES, error_of, failure, from_job_error

ROOT = Path(__file__).parents[3]
SOURCES = ("device_operations", "tasks", "workers", "api_gateway", "migrations", "benchmarks", "examples", "tests")

#: What makes a dictionary an error: any of these sets of keys.
ERROR_KEYS = ({"retryable"}, {"code", "message"})

#: The functions that write such a dictionary: the constructor, and the command line's form on standard error.
WRITERS = {
    ("device_operations/errors.py", "as_job_error"),
    ("device_operations/cli/output.py", "complain"),
    # OpenAI's form of one.
    ("api_gateway/openai/errors.py", "answer"),
}

#: Where an error is known to be retryable, or not, against its table: the file and the code.
OVERRIDES = {
    # Planned on what changed meanwhile: the same request is planned anew.
    ("tasks/inference/plan.py", "model_in_use"),
    # A name that does not resolve may resolve later; the delivery is tried again.
    ("api_gateway/background/webhooks.py", "validation_failed"),
    # The same input kills the CUDA context again.
    ("workers/devices/cuda.py", "device_lost"),
}


def written_by_hand(tree: ast.AST, function: str = "") -> Iterator[tuple[int, str]]:
    """Line and enclosing function of each error that `tree` writes as a dictionary, changes by key or builds in SQL."""
    for node in ast.iter_child_nodes(tree):
        inside = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        if _is_error(node):
            yield getattr(node, "lineno", 0), inside
        yield from written_by_hand(node, inside)


def _is_error(node: ast.AST) -> bool:
    if isinstance(node, ast.Dict):
        keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
        # A copy of another dictionary with a code of its own is an error as well.
        return any(wanted <= keys for wanted in ERROR_KEYS) or (None in node.keys and "code" in keys)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        keys = {keyword.arg for keyword in node.keywords}
        return any(wanted <= keys for wanted in ERROR_KEYS)
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
        return isinstance(node.slice, ast.Constant) and node.slice.value == "retryable"
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return "json" in node.value and "_build_object(" in node.value and "'code'" in node.value
    return False


@pytest.mark.parametrize("package", SOURCES)
def test_no_error_is_written_by_hand(package: str) -> None:
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        found += [
            f"{name}:{line}"
            for line, function in written_by_hand(ast.parse(path.read_text()))
            if (name, function) not in WRITERS and path != Path(__file__)
        ]
    assert not found, f"make these by failure(code, message).as_job_error(): {found}"


@pytest.mark.parametrize(
    "source",
    [
        "ERROR = {'code': 'poison', 'message': 'x', 'retryable': False, 'detail': None}",
        "ERROR = {'code': job['state'], 'message': 'x'}",
        "ERROR = {**error.as_job_error(), 'code': 'session_lost'}",
        "ERROR = dict(code='poison', message='x')",
        "error['retryable'] = True",
        "SQL = \"UPDATE jobs SET error = jsonb_build_object('code', 'poison')\"",
    ],
)
def test_the_search_finds_each_way_to_write_one(source: str) -> None:
    assert list(written_by_hand(ast.parse(source)))


def test_only_named_places_say_other_than_the_table_whether_to_try_again() -> None:
    found = set()
    for package in ("device_operations", "tasks", "workers", "api_gateway"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or not any(one.arg == "retryable" for one in node.keywords):
                    continue
                called = node.func.id if isinstance(node.func, ast.Name) else ""
                if called == "failure" and name != "device_operations/errors.py":
                    found.add((name, node.args[0].value if isinstance(node.args[0], ast.Constant) else None))
    assert found == OVERRIDES


@pytest.mark.parametrize("code", sorted(CODES))
def test_a_recorded_error_reads_back_as_it_was_raised(code: str) -> None:
    raised = failure(code, "why", detail={"asked": 1})
    recorded = raised.as_job_error()
    assert recorded == {"code": code, "message": "why", "retryable": CODES[code].retryable, "detail": {"asked": 1}}
    read = from_job_error(recorded)
    assert (type(read), read.as_job_error()) == (type(raised), recorded)


@pytest.mark.parametrize(
    ("state", "code"), [("cancelled", "cancelled"), ("expired", "expired"), ("failed", "internal_error")]
)
def test_a_job_that_recorded_no_error_has_one_of_its_state(state: str, code: str) -> None:
    made = error_of(None, state, "The load")
    assert (made["code"], made["retryable"]) == (code, CODES[code].retryable)
    kept = failure("poison", "x").as_job_error()
    assert error_of(kept, state, "The load") == kept
