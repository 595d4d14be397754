"""`AsyncClient`: the same methods as `Client`, awaited; files are read and written on threads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import TypeVar

import httpx

from device_operations.client.blobs import Blobs
from device_operations.client.devices import Devices
from device_operations.client.embeddings import Embedding
from device_operations.client.images import Images
from device_operations.client.inference import Inference
from device_operations.client.jobs import Jobs
from device_operations.client.memory import Memory
from device_operations.client.training import Training
from device_operations.client.transport import connection
from device_operations.client.transport.calls import Call, Command, Content, Do, Emit, Flow, Next, Sleep
from device_operations.client.transport.exchange import FlowRun, Policy
from device_operations.client.transport.operations import Async

T = TypeVar("T")


class AsyncClient(Jobs[Async], Embedding[Async]):
    """The HTTP client for asyncio; its arguments are those of `Client`. It belongs to one event loop."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        timeout: float = 30.0,
        *,
        retries: int = 5,
        idempotency_keys: bool = True,
    ) -> None:
        target = connection.Target(base_url, api_key, timeout)
        self._driver: _Driver = _Driver(target, Policy(retries, idempotency_keys))
        self.blobs: Blobs[Async] = Blobs(self._driver)
        self.devices: Devices[Async] = Devices(self._driver)
        self.memory: Memory[Async] = Memory(self._driver)
        self.inference: Inference[Async] = Inference(self._driver)
        self.images: Images[Async] = Images(self._driver)
        self.training: Training[Async] = Training(self._driver)

    @property
    def base_url(self) -> str:
        """Where the gateway is."""
        return str(self._driver.http.base_url)

    async def close(self) -> None:
        """Closes the connections."""
        await self._driver.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *raised: object) -> None:
        await self.close()


class _Driver:
    def __init__(self, target: connection.Target, policy: Policy) -> None:
        self._target = target
        self._policy = policy
        self._http: httpx.AsyncClient | None = None

    @property
    def http(self) -> httpx.AsyncClient:
        if self._http is None:
            self._http = httpx.AsyncClient(**self._target.options())
        return self._http

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()

    async def run(self, flow: Flow[T]) -> T:
        async with AsyncExitStack() as opened:
            flow_run = self._set_out(flow, opened)
            await self._advance(flow_run, opened)
            return flow_run.result

    async def iterate(self, flow: Flow[None]) -> AsyncIterator[object]:
        async with AsyncExitStack() as opened:
            flow_run = self._set_out(flow, opened)
            while True:
                await self._advance(flow_run, opened)
                if not isinstance(flow_run.wants, Emit):
                    return
                yield flow_run.wants.value
                flow_run.go_on(None)

    def _set_out(self, flow: Flow[T], opened: AsyncExitStack) -> FlowRun[T]:
        flow_run = FlowRun(flow, self._policy)
        opened.callback(flow_run.close)
        return flow_run

    async def _advance(self, flow_run: FlowRun[T], opened: AsyncExitStack) -> None:
        """Carries the flow on until it emits a value or is over."""
        while flow_run.wants is not None and not isinstance(flow_run.wants, Emit):
            try:
                answer = await self._carry_out(flow_run.wants, opened)
            except Exception as error:  # noqa: BLE001 - raised again inside the flow
                flow_run.fail(error)
            else:
                flow_run.go_on(answer)

    async def _carry_out(self, command: Command, opened: AsyncExitStack) -> object:
        if isinstance(command, Call):
            return await self._send(command, opened)
        if isinstance(command, Next):
            return await anext(command.response.extensions[connection.PIECES], None)
        if isinstance(command, Do):
            return await asyncio.to_thread(command.function)
        if isinstance(command, Sleep):
            await asyncio.sleep(command.seconds)
        return None

    async def _send(self, call: Call, opened: AsyncExitStack) -> httpx.Response:
        pieces = None if call.content is None else _pieces(call.content)
        request = self.http.build_request(**connection.request_options(call, self._target.timeout, pieces))
        response = await self.http.send(request, stream=call.stream is not None)
        if call.stream is None:
            return response
        opened.push_async_callback(response.aclose)
        if response.status_code >= 400:
            await response.aread()
        else:
            body = response.aiter_lines() if call.stream is str else response.aiter_bytes()
            response.extensions[connection.PIECES] = body
        return response


async def _pieces(content: Content) -> AsyncIterator[bytes | memoryview]:
    chunks = content.chunks()
    while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
        yield chunk
