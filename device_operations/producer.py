"""Enqueuing without HTTP: `Producer` sends jobs through Redis as any Celery caller may, from typed requests."""

from __future__ import annotations

from device_operations.jobs import Kind, new_id
from device_operations.queues import ANY_QUEUE, PRIORITY_STEPS, celery_priority, device_queue, short
from device_operations.requests.base import JobRequest
from device_operations.requests.kinds import REQUESTS, parse, requests_of
from device_operations.settings import load
from device_operations.wire.json_types import FreeJson

try:
    from celery import Celery
    from celery.result import AsyncResult
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        f"the producer needs Celery, and {missing.name} is not installed: pip install 'device-operations[celery]'",
        name=missing.name,
    ) from missing

_KINDS: dict[type[JobRequest], Kind] = {request: kind for kind in REQUESTS for request in requests_of(kind)}


class Producer:
    """Sends jobs to the workers' queues.

    Without `redis_url`, the Redis of this machine's settings or of a running `up` is used. Every program that reaches
    Redis is fully trusted: no API key is needed, and `job.owner` may be any owner.
    """

    def __init__(self, redis_url: str | None = None) -> None:
        url = redis_url or load().require_redis_url()
        self._app = Celery("device_operations.producer", broker=url, backend=url, set_as_current=False)
        self._app.conf.update(
            accept_content=["json"],
            task_serializer="json",
            result_serializer="json",
            broker_transport_options={
                "priority_steps": PRIORITY_STEPS,
                "socket_timeout": 10,
                "socket_connect_timeout": 5,
                "socket_keepalive": True,
            },
            redis_socket_timeout=10,
            task_default_exchange="",
            task_default_queue=ANY_QUEUE,
        )

    def send(
        self,
        request: JobRequest,
        *,
        device_id: str | None = None,
        task_id: str | None = None,
        ignore_result: bool = False,
    ) -> AsyncResult[FreeJson]:
        """Enqueues a job; its kind is the request's type, its options are the request's `job`.

        It goes to the queue of `device_id`, else of the request's own, else to the one that any device reads; a job
        that names an allocation, model or session is passed on to the device that holds it. The task's id is the
        job's: `GET /api/jobs/{id}` shows it once a worker has received it. `.get()` gives the job's result.
        """
        kind = _KINDS[type(request)]
        checked = parse(kind, request.model_dump(mode="json", exclude_unset=True))
        fields = checked.model_dump(mode="json", exclude_unset=True)
        options = fields.pop("job", {})
        device_id = device_id or fields.get("device_id")
        sent: AsyncResult[FreeJson] = self._app.send_task(
            kind.task,
            kwargs={"request": fields, "job": options} if options else {"request": fields},
            kwargsrepr=short(fields),
            queue=device_queue(device_id) if device_id else ANY_QUEUE,
            priority=celery_priority(checked.job.priority),
            task_id=task_id or new_id(),
            ignore_result=ignore_result,
        )
        return sent

    def result(self, task_id: str) -> AsyncResult[FreeJson]:
        """The result of a job sent earlier, by its id."""
        found: AsyncResult[FreeJson] = AsyncResult(task_id, app=self._app)
        return found

    def close(self) -> None:
        """Closes the connections."""
        self._app.close()

    def __enter__(self) -> Producer:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()
