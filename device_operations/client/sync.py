"""`Client`: carries flows out with httpx, one request after another; safe to share between threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
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
from device_operations.client.transport.calls import Call, Command, Do, Emit, Flow, Next, Sleep
from device_operations.client.transport.exchange import FlowRun, Policy
from device_operations.client.transport.operations import Sync

T = TypeVar("T")


class Client(Jobs[Sync], Embedding[Sync]):
    """The HTTP client.

    Without `base_url` it finds the gateway that this machine's settings or a running `up` name, at the first request,
    and takes the first of the settings' API keys. `timeout` is in seconds, for each answer; waits come on top. Calls
    that are safe to repeat are sent `retries` times more; submissions get an Idempotency-Key, which makes them safe,
    unless `idempotency_keys` is False.
    """

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
        self.blobs: Blobs[Sync] = Blobs(self._driver)
        self.devices: Devices[Sync] = Devices(self._driver)
        self.memory: Memory[Sync] = Memory(self._driver)
        self.inference: Inference[Sync] = Inference(self._driver)
        self.images: Images[Sync] = Images(self._driver)
        self.training: Training[Sync] = Training(self._driver)

    @property
    def base_url(self) -> str:
        """Where the gateway is."""
        return str(self._driver.http.base_url)

    def close(self) -> None:
        """Closes the connections."""
        self._driver.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


class _Driver:
    def __init__(self, target: connection.Target, policy: Policy) -> None:
        self._target = target
        self._policy = policy
        self._http: httpx.Client | None = None
        self._opening = threading.Lock()

    @property
    def http(self) -> httpx.Client:
        with self._opening:
            if self._http is None:
                self._http = httpx.Client(**self._target.options())
            return self._http

    def close(self) -> None:
        if self._http is not None:
            self._http.close()

    def run(self, flow: Flow[T]) -> T:
        with ExitStack() as opened:
            flow_run = self._set_out(flow, opened)
            self._advance(flow_run, opened)
            return flow_run.result

    def iterate(self, flow: Flow[None]) -> Iterator[object]:
        with ExitStack() as opened:
            flow_run = self._set_out(flow, opened)
            while True:
                self._advance(flow_run, opened)
                if not isinstance(flow_run.wants, Emit):
                    return
                yield flow_run.wants.value
                flow_run.go_on(None)

    def _set_out(self, flow: Flow[T], opened: ExitStack) -> FlowRun[T]:
        flow_run = FlowRun(flow, self._policy)
        opened.callback(flow_run.close)
        return flow_run

    def _advance(self, flow_run: FlowRun[T], opened: ExitStack) -> None:
        """Carries the flow on until it emits a value or is over."""
        while flow_run.wants is not None and not isinstance(flow_run.wants, Emit):
            try:
                answer = self._carry_out(flow_run.wants, opened)
            except Exception as error:  # noqa: BLE001 - raised again inside the flow
                flow_run.fail(error)
            else:
                flow_run.go_on(answer)

    def _carry_out(self, command: Command, opened: ExitStack) -> object:
        if isinstance(command, Call):
            return self._send(command, opened)
        if isinstance(command, Next):
            return next(command.response.extensions[connection.PIECES], None)
        if isinstance(command, Do):
            return command.function()
        if isinstance(command, Sleep):
            time.sleep(command.seconds)
        return None

    def _send(self, call: Call, opened: ExitStack) -> httpx.Response:
        pieces = None if call.content is None else call.content.chunks()
        request = self.http.build_request(**connection.request_options(call, self._target.timeout, pieces))
        response = self.http.send(request, stream=call.stream is not None)
        if call.stream is None:
            return response
        opened.callback(response.close)
        if response.status_code >= 400:
            response.read()
        else:
            body = response.iter_lines() if call.stream is str else response.iter_bytes()
            response.extensions[connection.PIECES] = body
        return response
