"""A round with KServe's own client, run by its own Python (`make kserve`): arguments are the address and the models.

    kserve_round.py URL '{"FP32": "identity-fp32", …}' SEVERAL

The models of the second give their input `x` back as `y`; SEVERAL gives `text_out`, `half_out` and `flag_out`.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

EXAMPLES: dict[str, list[Any]] = {
    "BOOL": [True, False, True], "UINT8": [0, 1, 255], "UINT16": [0, 1, 65535], "UINT32": [0, 1, 2**32 - 1],
    "UINT64": [0, 1, 2**64 - 1], "INT8": [-128, 0, 127], "INT16": [-(2**15), 0, 2**15 - 1],
    "INT32": [-(2**31), 0, 2**31 - 1], "INT64": [-(2**63), 0, 2**63 - 1], "FP16": [0.5, -65504, 0],
    "FP32": [0.1, -3.4e38, 1e-45], "FP64": [0.1, -1.7e308, 5e-324], "BYTES": ["déjà", "", "日本語"],
}  # fmt: skip
DTYPES = {
    "BOOL": "bool", "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "INT8": "int8",
    "INT16": "int16", "INT32": "int32", "INT64": "int64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
    "BYTES": "object",
}  # fmt: skip


def given(name: str, array: Any, datatype: str, *, binary: bool) -> Any:
    made = InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def plain(array: Any) -> list[Any]:
    """The elements, texts as str."""
    return [item.decode() if isinstance(item, bytes) else item for item in array.reshape(-1).tolist()]


class Round:
    def __init__(self, url: str) -> None:
        self.url = url
        self.client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0, timeout=30))

    async def echoed(self, model: str, datatype: str, array: Any, *, binary_in: bool, binary_out: bool) -> Any:
        outputs = [RequestedOutput("y", {"binary_data": binary_out})]
        request = InferRequest(
            model, [given("x", array, datatype, binary=binary_in)], request_id="mine", request_outputs=outputs
        )
        headers: dict[str, str] = {}
        answer = await self.client.infer(self.url, request, model_name=model, response_headers=headers)
        assert answer.id == "mine"
        assert ("inference-header-content-length" in headers) is binary_out, headers
        (output,) = answer.outputs
        assert (output.name, output.datatype, output.shape) == ("y", datatype, list(array.shape))
        return output.as_numpy()

    async def every_dtype(self, models: dict[str, str]) -> int:
        done = 0
        for datatype, model in models.items():
            for values in (EXAMPLES[datatype], []):
                array = np.array(values, DTYPES[datatype])
                for binary_in in (True, False):
                    for binary_out in (True, False):
                        if datatype == "FP16" and values and not (binary_in and binary_out):
                            continue  # the client itself sends these as binary only
                        back = await self.echoed(model, datatype, array, binary_in=binary_in, binary_out=binary_out)
                        assert plain(back) == plain(array), (datatype, back, array)
                        done += 1
        return done

    async def not_finite(self, models: dict[str, str]) -> None:
        for datatype in ("FP16", "FP32", "FP64"):
            array = np.array([np.nan, np.inf, -np.inf, 1], DTYPES[datatype])
            for binary_out in (True, False):
                back = await self.echoed(models[datatype], datatype, array, binary_in=True, binary_out=binary_out)
                assert np.array_equal(back, array, equal_nan=True), (datatype, back)
        words = {"name": "x", "shape": [4], "datatype": "FP32", "data": ["NaN", "Infinity", "-Infinity", 1]}
        answer = await self.client.infer(self.url, {"inputs": [words]}, model_name=models["FP32"])
        assert np.array_equal(answer.outputs[0].as_numpy(), [np.nan, np.inf, -np.inf, 1], equal_nan=True)

    async def several_outputs(self, model: str) -> None:
        inputs = [
            given("text", np.array(["a", "bc"], object), "BYTES", binary=True),
            given("half", np.ones((2, 2), np.float16), "FP16", binary=True),
            given("flag", np.array([True, False]), "BOOL", binary=False),
        ]
        outputs = [
            RequestedOutput("flag_out", {"binary_data": True}),
            RequestedOutput("text_out", {"binary_data": False}),
            RequestedOutput("half_out", {"binary_data": True}),
        ]
        request = InferRequest(model, inputs, request_outputs=outputs)
        answer = await self.client.infer(self.url, request, model_name=model)
        assert [output.name for output in answer.outputs] == ["flag_out", "text_out", "half_out"]
        assert plain(answer.get_output_by_name("text_out").as_numpy()) == ["a", "bc"]
        assert plain(answer.get_output_by_name("flag_out").as_numpy()) == [False, True]
        assert answer.get_output_by_name("half_out").as_numpy().shape == (2, 2)
        # All of them, where none is named; as binary where the request says so for all.
        request = InferRequest(model, inputs, parameters={"binary_data_output": True})
        answer = await self.client.infer(self.url, request, model_name=model)
        assert {output.name for output in answer.outputs} == {"flag_out", "text_out", "half_out"}

    async def health(self, model: str) -> None:
        assert await self.client.is_server_live(self.url) is True
        assert await self.client.is_server_ready(self.url) is True
        assert await self.client.is_model_ready(self.url, model) is True
        assert await self.client.is_model_ready(self.url, "nobody") is False
        wrong = InferRequest(model, [given("z", np.zeros(1, np.float32), "FP32", binary=True)])
        refused = None
        try:
            await self.client.infer(self.url, wrong, model_name=model)
        except httpx.HTTPStatusError as error:
            refused = error
        assert refused is not None, "an input that the model does not have was taken"
        assert refused.response.status_code == 422
        assert "unknown input 'z'" in str(refused)


async def main(url: str, models: dict[str, str], several: str) -> None:
    one = Round(url)
    done = await one.every_dtype(models)
    await one.not_finite(models)
    await one.several_outputs(several)
    await one.health(models["FP32"])
    await one.client.close()
    print(f"{done} tensors went round")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]))
