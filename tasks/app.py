"""The Celery application: its settings, and one named task for each job kind.

The tasks' bodies never run: the worker's own pool (`workers.celery_bridge.pool`) takes each message into the scheduler,
where jobs run in order of priority and one device call at a time. They are registered so that Celery, Flower and every
Celery tool know the names.
"""

from __future__ import annotations

from celery import Celery, Task
from kombu.entity import Exchange, Queue

from device_operations.jobs import Kind
from device_operations.settings import Settings, load
from tasks.redis.queues import ANY_QUEUE, device_queue

#: Messages that one worker may hold unacknowledged, and eligible jobs in its scheduler above which it reads no more.
#: Far more than the scheduler runs at once, so that a high priority is seen early. The messages of jobs that wait for
#: predecessors are acknowledged at once and do not count.
PREFETCH = 1024

#: Redis must not hand a message out again while a worker holds it: PostgreSQL says what is to be run again.
VISIBILITY_TIMEOUT_SECONDS = 86_400


def make_app(settings: Settings, device_id: str | None = None) -> Celery:
    """The application for a client, for Flower, or (with `device_id`) for that device's worker."""
    url = settings.require_redis_url()
    app = Celery("device_operations", broker=url, backend=url)
    options: dict[str, object] = {
        "visibility_timeout": VISIBILITY_TIMEOUT_SECONDS,
        "socket_timeout": 10,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 30,
        "retry_on_timeout": True,
        "priority_steps": list(range(10)),
        "queue_order_strategy": "priority",
    }
    if device_id is not None:
        # Each worker restores its own device's at its start (`workers.celery_bridge.consumer`), and no other's.
        options["unacked_key"] = f"device-operations.unacked.{device_id}"
        options["unacked_index_key"] = f"device-operations.unacked-index.{device_id}"
        options["unacked_mutex_key"] = f"device-operations.unacked-mutex.{device_id}"
        options["home_queue"] = device_queue(device_id)
        app.conf.broker_transport = "tasks.celery_bridge.transport:Transport"
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        broker_transport_options=options,
        **result_options(),
        broker_connection_retry_on_startup=True,
        broker_channel_error_retry=True,
        broker_connection_max_retries=None,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=False,
        worker_concurrency=PREFETCH,
        worker_send_task_events=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_enable_remote_control=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        task_acks_late=False,
        # A client may name any device's queue.
        task_create_missing_queues=device_id is None,
        task_default_queue=ANY_QUEUE,
        task_default_exchange="",
        task_default_priority=4,
        task_track_started=True,
        task_send_sent_event=False,
        task_queues=[_queue(ANY_QUEUE)] if device_id is None else [_queue(device_queue(device_id))],
        event_queue_expires=60,
    )
    for kind in Kind:
        app.task(_never_runs, name=kind.task, bind=True, shared=False, Strategy="workers.celery_bridge.pool:strategy")
    return app


def result_options() -> dict[str, object]:
    """The settings of Celery's result backend, for every process that writes there."""
    return {
        "result_expires": 86_400,
        "result_backend_transport_options": {"socket_timeout": 10, "retry_policy": {"timeout": 5.0}},
        "redis_socket_timeout": 10,
        "redis_socket_keepalive": True,
    }


def _queue(name: str) -> Queue:
    return Queue(name, exchange=Exchange("", type="direct"), routing_key=name, no_declare=False)


def _never_runs(self: Task, *arguments: object, **named: object) -> None:
    raise RuntimeError(f"{self.name} runs only in a worker started by `device-operations worker`, whose pool takes it")


def __getattr__(name: str) -> Celery:
    """`celery -A tasks.app …` finds `app` here, made from the settings when it is asked for."""
    if name in ("app", "celery"):
        application = make_app(load())
        globals()["app"] = globals()["celery"] = application
        return application
    raise AttributeError(name)
