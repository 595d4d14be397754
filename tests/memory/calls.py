"""Short ways to ask for memory over HTTP in tests."""

from __future__ import annotations

from typing import Any

import httpx

from tests.support.stack import RunningStack


class Memory:
    """The memory routes of one gateway. Submitting calls answer the job; `done` waits for its end."""

    def __init__(self, stack: RunningStack, client: httpx.Client | None = None) -> None:
        self.client = client or stack.client

    def allocate(self, **body: Any) -> dict[str, Any]:
        return self._job(self.client.post("/api/memory/allocate", json=body))

    def write(self, allocation_id: str, data: bytes, offset: int = 0, **more: Any) -> dict[str, Any]:
        address = f"/api/memory/data/{allocation_id}"
        return self._job(self.client.put(address, content=data, params={"offset": offset}, **more))

    def copy(self, source: str, destination: str, size: int | None = None, at: int = 0, to: int = 0) -> dict[str, Any]:
        body: dict[str, Any] = {
            "source": {"allocation_id": source, "offset": at},
            "destination": {"allocation_id": destination, "offset": to},
        }
        return self._job(self.client.post("/api/memory/copy", json=body | ({"size_bytes": size} if size else {})))

    def clear(self, allocation_id: str, **body: Any) -> dict[str, Any]:
        return self._job(self.client.post(f"/api/memory/clear/{allocation_id}", json=body))

    def deallocate(self, allocation_id: str) -> dict[str, Any]:
        return self._job(self.client.delete(f"/api/memory/deallocate/{allocation_id}"))

    def read(self, allocation_id: str, **parameters: Any) -> bytes:
        answer = self.client.get(f"/api/memory/data/{allocation_id}", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.content

    def allocation(self, allocation_id: str) -> dict[str, Any]:
        return self.client.get(f"/api/memory/allocations/{allocation_id}").json()

    def device(self, device_id: str = "cpu_0") -> dict[str, Any]:
        return self.client.get(f"/api/memory/device/{device_id}").json()

    def done(self, job: dict[str, Any], state: str = "succeeded") -> dict[str, Any]:
        ended = self.client.get(f"/api/jobs/{job['job_id']}", params={"wait": 30}).json()
        assert ended["state"] == state, ended
        return ended

    def failed(self, job: dict[str, Any], code: str) -> dict[str, Any]:
        ended = self.done(job, "failed")
        assert ended["error"]["code"] == code, ended
        return ended

    def made(self, **body: Any) -> str:
        """The id of an allocation that is there."""
        job = self.allocate(**body)
        self.done(job)
        return str(job["resource"]["id"])

    @staticmethod
    def _job(answer: httpx.Response) -> dict[str, Any]:
        assert answer.status_code in (200, 202), answer.text
        return dict(answer.json())


def refused(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The problem that a refusal carries, once it is the one expected."""
    assert (answer.status_code, answer.json().get("code")) == (status, code), answer.text
    assert answer.headers["content-type"].startswith("application/problem+json")
    return dict(answer.json())
