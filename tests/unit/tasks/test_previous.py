"""Where a request asks for the result before it, that is what it gets, whole or in part."""

from __future__ import annotations

from typing import Any

import pytest

from device_operations.errors import OperationError
from tasks.celery_bridge.previous import filled

RESULT = {"allocation_id": "a-1", "outputs": {"y": {"data": [1, 2]}}, "parts": [{"size": 3}, {"size": 4}]}


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("", RESULT),
        ("allocation_id", "a-1"),
        ("outputs.y.data", [1, 2]),
        ("outputs.y.data.1", 2),
        ("parts.0.size", 3),
        ("parts.-1.size", 4),
    ],
)
def test_a_path_names_a_part(path: str, wanted: Any) -> None:
    request = {"source": {"$previous": path}, "others": [1, {"deep": {"$previous": path}}]}
    assert filled(request, [RESULT]) == {"source": wanted, "others": [1, {"deep": wanted}]}


def test_a_request_without_a_mark_is_taken_as_it_is() -> None:
    request = {"a": [1, {"b": None}], "$previous": "beside others, no mark", "c": 1}
    assert filled(request, []) == request


@pytest.mark.parametrize(
    ("request_", "passed", "message"),
    [
        ({"a": 1}, [RESULT], "does not say where it goes"),
        ({"a": {"$previous": "x"}}, [], "no result came before"),
        ({"a": {"$previous": "x"}}, [RESULT], "nothing is at 'x'"),
        ({"a": {"$previous": "parts.7"}}, [RESULT], "nothing is at '7'"),
        ({"a": {"$previous": "parts.size"}}, [RESULT], "nothing is at 'size'"),
        ({"a": {"$previous": "allocation_id.x"}}, [RESULT], "nothing is at 'x'"),
        ({"a": {"$previous": 3}}, [RESULT], "is a text"),
        ({"a": {"$previous": ""}}, [RESULT, RESULT], "at most, not 2"),
    ],
)
def test_what_cannot_be_filled_is_refused(request_: dict[str, Any], passed: list[Any], message: str) -> None:
    with pytest.raises(OperationError, match=message) as raised:
        filled(request_, passed)
    assert raised.value.code == "validation_failed"
