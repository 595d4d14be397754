"""A name stands for the model that was loaded under it last, from the moment in which its load has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest
from celery import Celery

from tests.inference import graphs
from tests.inference.conftest import Api, as_tensor
from tests.support.databases import Databases
from tests.support.stack import RunningStack

ONES = np.ones((1, 4), np.float32)


@pytest.fixture(scope="module")
def two_gateways(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """The inference routes of a stack of two gateways, by the first."""
    with databases.migrated() as url:
        stack = RunningStack(tmp_path_factory.mktemp("names"), url, databases.redis_url(), gateways=2)
        try:
            stack.start()
            stack.wait_ready()
            yield Api(stack)
        finally:
            stack.close()


@pytest.fixture(scope="module", params=["by the gateway that loads", "by another gateway"])
def answers(request: pytest.FixtureRequest, two_gateways: Api) -> Iterator[Callable[[str, bool], float]]:
    """Runs a model by its name on ones, over the one protocol or the other, and gives the first number of the answer."""
    url = two_gateways.stack.gateway_urls["another" in request.param]
    client = httpx.Client(base_url=url, timeout=30, trust_env=False)

    def run(name: str, over_v2: bool) -> float:
        if over_v2:
            tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0] * 4}
            answer = client.post(f"/v2/models/{name}/infer", json={"inputs": [tensor]})
            assert answer.status_code == 200, answer.text
            return float(answer.json()["outputs"][0]["data"][0])
        body = {"model_name": name, "inputs": {"x": as_tensor(ONES)}}
        job = client.post("/api/inference/run", json=body, headers={"Prefer": "wait=30"}).json()
        assert job.get("state") == "succeeded", job
        return float(two_gateways.arrays(job)["y"][0, 0])

    yield run
    client.close()


@pytest.mark.parametrize("over_v2", [False, True], ids=["/api/inference/run", "/v2/models/NAME/infer"])
def test_a_name_that_is_loaded_again_is_run_at_once(
    two_gateways: Api, answers: Callable[[str, bool], float], over_v2: bool
) -> None:
    loaded = two_gateways.load(graphs.affine(1), "again")
    assert answers("again", over_v2) == 2
    for scale in (1, 2, 3, 3, 4, 5):
        two_gateways.unload(loaded["model_id"])
        loaded = two_gateways.load(graphs.affine(scale), "again")
        assert answers("again", over_v2) == scale + 1
    two_gateways.unload(loaded["model_id"])


def test_a_message_that_names_it_reaches_what_was_loaded_last(two_gateways: Api) -> None:
    stack = two_gateways.stack
    app = Celery(broker=stack.redis_url, backend=stack.redis_url)

    def run() -> float:
        request = {"model_name": "direct", "inputs": {"x": as_tensor(ONES)}}
        sent = app.send_task(
            "device_operations.inference.run", kwargs={"request": request}, queue="device.cpu_0", ignore_result=False
        )
        return float(sent.get(timeout=30)["outputs"]["y"]["data"][0])

    loaded = two_gateways.load(graphs.affine(1), "direct")
    assert run() == 2
    for scale in (1, 2, 3):
        two_gateways.unload(loaded["model_id"])
        loaded = two_gateways.load(graphs.affine(scale), "direct")
        assert run() == scale + 1
    two_gateways.unload(loaded["model_id"])
    app.close()
