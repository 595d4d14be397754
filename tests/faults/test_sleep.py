"""A machine that slept: whichever part wakes first, no lease counts as run out until its worker could renew it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from api_gateway.background.awake import Awake
from tests.support.stack import REPOSITORY, RunningStack, eventually

LEASE_SECONDS = 4

TELLING = """
import sys
from api_gateway.background.awake import Awake
awake = Awake()
{start}
for line in sys.stdin:
    print(awake.seconds(), flush=True)
"""


@pytest.mark.slow
def test_a_gateway_that_wakes_before_the_workers_waits_a_lease_for_them(
    start_stack: Callable[..., RunningStack],
) -> None:
    stack = start_stack(LEASE_SECONDS=LEASE_SECONDS)
    made = stack.client.post(
        "/api/memory/allocate", json={"size_bytes": 64, "allocation_id": "kept"}, headers={"Prefer": "wait=20"}
    )
    assert made.json()["state"] == "succeeded"
    epoch = stack.client.get("/api/devices/cpu_0").json()["epoch"]
    time.sleep(LEASE_SECONDS + 1)  # the patience that a gateway has from its start is over
    for name in ("gateway", "cpu_0"):
        stack.process(name).send_signal(signal.SIGSTOP)
    time.sleep(2.5 * LEASE_SECONDS)
    stack.process("gateway").send_signal(signal.SIGCONT)
    time.sleep(0.6 * LEASE_SECONDS)
    stack.process("cpu_0").send_signal(signal.SIGCONT)
    eventually(lambda: stack.client.get("/api/devices/cpu_0").json()["state"] == "online")
    assert stack.client.get("/api/devices/cpu_0").json()["epoch"] == epoch
    assert stack.client.get("/api/memory/allocations/kept").json()["state"] == "active"
    assert stack.is_running("cpu_0")
    # And a death after that is found as before.
    stack.kill("cpu_0")
    eventually(lambda: stack.client.get("/api/memory/allocations/kept").json()["state"] == "lost", 2 * LEASE_SECONDS)


def test_a_process_that_was_stopped_has_been_awake_since_it_went_on() -> None:
    for start in ("awake.start()", ""):
        code = TELLING.format(start=start)
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(process: subprocess.Popen[str] = process) -> float:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        with process:
            ask()
            for _ in range(4):
                time.sleep(0.5)
                before = ask()
            process.send_signal(signal.SIGSTOP)
            time.sleep(2)
            process.send_signal(signal.SIGCONT)
            after = ask()
            process.stdin.close()
        assert before > 1.9
        assert after < 1.0, "found at the very question, whether or not the thread came first"


def test_a_machine_whose_time_of_day_went_on_alone_was_asleep() -> None:
    awake = Awake()
    awake._since -= 100.0
    assert awake.seconds() > 100.0
    monotonic, of_day = awake._ticked
    awake._ticked = (monotonic, of_day - 40.0)
    assert awake.seconds() < 1.0
