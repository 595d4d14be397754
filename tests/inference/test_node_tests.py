"""ONNX's backend node tests over `/v2`: what ONNX Runtime runs in process is neither refused nor answered otherwise."""

from __future__ import annotations

import pytest

from tests.inference import node_tests
from tests.inference.conftest import Api


@pytest.fixture(scope="module")
def tests() -> list[node_tests.NodeTest]:
    found = list(node_tests.collected())
    assert len(found) > 1500, "onnx brings its node tests, and ONNX Runtime loads nearly all of them"
    return found


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_none_is_refused_and_none_differs(api: Api, tests: list[node_tests.NodeTest]) -> None:
    report = node_tests.compare(api.http, tests)
    print(f"\n{len(report.agree)} of {len(tests)} agree; {len(report.unofferable)} have elements of four bits")
    assert report.refused == {}
    assert report.differ == {}
    # All but those whose elements Python cannot pass to ONNX Runtime, and at most a few that it loads and does not run.
    assert len(report.agree) >= len(tests) - len(report.unofferable) - 5


def test_what_cannot_be_passed_is_refused_with_its_reason(api: Api, tests: list[node_tests.NodeTest]) -> None:
    of_four_bits = [test for test in tests if test.unofferable]
    assert of_four_bits
    for test in of_four_bits[:4]:
        error = api.load_job(test.graph)["error"]
        assert error["code"] == "model_invalid"
        assert test.unofferable in error["message"]
        assert "fewer than eight bits" in error["message"]
