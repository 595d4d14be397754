"""`HTTP__RATE_LIMIT_PER_SECOND`: an owner's submissions, by whatever route; others and look-ups are not in its way."""

from __future__ import annotations

from collections.abc import Callable

from tests.support.stack import RunningStack


def test_too_many_submissions_are_told_when_to_come_again(start_stack: Callable[..., RunningStack]) -> None:
    stack = start_stack(HTTP__RATE_LIMIT_PER_SECOND=0.5, API_KEYS="alice:key-of-alice,bob:key-of-bob")
    body = {"size_bytes": 16}
    assert stack.client.post("/api/memory/allocate", json=body).status_code == 202
    infer = {"inputs": []}
    entry = {"kind": "memory.allocate", "request": body}
    for path, sent in (
        ("/api/memory/allocate", body),
        ("/api/jobs", {"jobs": [entry] * 3}),
        ("/api/inference/sessions", {"model_name": "none"}),
        ("/v2/models/none/infer", infer),
    ):
        answer = stack.client.post(path, json=sent)
        assert answer.status_code == 429, (path, answer.text)
        assert 1 <= int(answer.headers["Retry-After"]) <= 2
        if not path.startswith("/v2"):
            assert answer.json()["code"] == "rate_limited"
    assert stack.client.get("/api/jobs").status_code == 200
    others = {"X-API-Key": "key-of-bob"}
    assert stack.client.post("/api/memory/allocate", json=body, headers=others).status_code == 202
