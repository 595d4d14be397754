"""docs/contract.md says what the code does: its tables are the code's, its lists of names are complete."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import pytest

from device_operations.jobs import Job, State
from tasks.jobs.store import view
from tests.docs.tables import PAGE, TABLES, in_page
from tests.docs.test_links import DOCUMENTS

TEXT = PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_what_the_code_says(name: str) -> None:
    assert in_page(name, TEXT) == TABLES[name](), "run `python -m tests.docs.tables`"


def first_cells(head: str) -> list[str]:
    """The names in the first column of the table that begins with this line."""
    lines = TEXT[TEXT.index(head) :].splitlines()[2:]
    rows = lines[: next(number for number, line in enumerate(lines) if not line.startswith("|"))]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]


def test_every_field_of_a_job_is_described_once() -> None:
    now = datetime.now(UTC)
    row = dict.fromkeys(("resource_type", "resource_id", "started_at", "finished_at", "device_ms")) | {
        name: None for name in view.__code__.co_consts if isinstance(name, str) and name.isidentifier()
    }
    shown = view(row | {"state": "queued", "submitted_at": now})
    assert Job.model_fields.keys() <= shown.keys()
    assert sorted(first_cells("| field | is |")) == sorted(shown)


def test_every_state_is_described_with_celerys_name() -> None:
    assert first_cells("| state | Celery's name | means |") == [state.value for state in State]
    for state in State:
        assert f"| `{state.value}` | `{state.celery}` |" in TEXT


def test_a_route_that_is_named_in_any_document_exists() -> None:
    known = {re.sub(r"\{.*?\}", "{}", route) for route in re.findall(r"`([A-Z]+ /[^`]*)`", TABLES["routes"]())}
    unknown = []
    for document in DOCUMENTS:
        for method, path in re.findall(r"`(GET|POST|PUT|DELETE|HEAD) (/(?:api|v1|v2)/?[^`?\s]*)", document.read_text()):
            without_options = re.sub(r"\[.*?\]", "", path)
            route = f"{method} {re.sub(r'{.*?}|[A-Z]{2,}[A-Z_]*', '{}', without_options)}"
            if route not in known and not any(one.startswith(f"{route}/") for one in known):
                unknown.append(f"{document.name}: {method} {path}")
    assert not unknown
