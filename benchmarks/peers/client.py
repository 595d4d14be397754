"""The client that drives every contender alike: a closed loop of raw sockets in a process of its own.

Requests are made beforehand, and of an answer only its status and length are read, so that the client costs a few tens
of microseconds for each.
"""

from __future__ import annotations

import pickle
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

_ROOM = 1 << 21


@dataclass(frozen=True, slots=True)
class Plan:
    """What to send: each of `requests` (whole HTTP requests) has a connection, and is sent again once answered.

    Stops after `seconds`, of which the first `warm_seconds` are not counted. With `one_by_one` each is sent once, the
    next when the last is answered.
    """

    host: str
    port: int
    requests: list[bytes]
    seconds: float = 0.0
    warm_seconds: float = 0.0
    one_by_one: bool = False


@dataclass(slots=True)
class Answer:
    """What came of it: seconds that each counted request took, how long was counted, each connection's last answer."""

    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0
    last: list[tuple[bytes, bytes]] = field(default_factory=list)
    client_cpu_seconds: float = 0.0


def drive(plan: Plan) -> Answer:
    """Runs a plan in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        given, got = Path(folder) / "plan", Path(folder) / "answer"
        given.write_bytes(pickle.dumps(plan))
        # Not by `-m`, so that what is pickled has the same class on both sides.
        program = "from benchmarks.peers.client import main; main()"
        command = [sys.executable, "-c", program, str(given), str(got)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=plan.seconds + 120)
        if done.returncode:
            raise RuntimeError(f"the client failed: {done.stderr[-2000:]}")
        answer: Answer = pickle.loads(got.read_bytes())
        return answer


class _Connection:
    """One client: its request, what of it is sent, and the answer as far as it came."""

    def __init__(self, address: tuple[str, int], request: bytes) -> None:
        self.socket = socket.create_connection(address, timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.request = memoryview(request)
        self.room = bytearray(_ROOM)
        self.view = memoryview(self.room)
        self.sent = self.got = self.head = self.needed = 0
        self.began = 0.0

    def begin(self) -> bool:
        """Starts a request; whether all of it could be sent at once."""
        self.sent = self.got = self.needed = 0
        self.began = time.perf_counter()
        return self.send()

    def send(self) -> bool:
        """Sends on; whether all is sent."""
        while self.sent < len(self.request):
            try:
                self.sent += self.socket.send(self.request[self.sent :])
            except BlockingIOError:
                return False
        return True

    def receive(self) -> bool:
        """Receives on; whether the answer is whole. Raises where it is no 200."""
        try:
            count = self.socket.recv_into(self.view[self.got :])
        except BlockingIOError:
            return False
        if count == 0:
            raise RuntimeError(f"the server hung up after {bytes(self.room[: self.got])[:500]!r}")
        self.got += count
        if not self.needed:
            self._read_head()
        return bool(self.needed) and self.got >= self.needed

    def answer(self) -> tuple[bytes, bytes]:
        """Head and body of the last answer."""
        return bytes(self.room[: self.head]), bytes(self.room[self.head : self.got])

    def _read_head(self) -> None:
        end = self.room.find(b"\r\n\r\n", 0, self.got)
        if end < 0:
            return
        head = bytes(self.room[:end]).lower()
        at = head.find(b"\r\ncontent-length:")
        if not head.startswith(b"http/1.1 200") or at < 0:
            raise RuntimeError(f"not a 200 with a length: {bytes(self.room[: self.got])[:2000]!r}")
        self.head = end + 4
        self.needed = self.head + int(head[at + 17 :].split(b"\r\n", 1)[0])


def perform(plan: Plan) -> Answer:
    """Runs a plan in this process."""
    if not plan.one_by_one:
        return _perform(plan)
    alone = [_perform(Plan(plan.host, plan.port, [request])) for request in plan.requests]
    return Answer(last=[answer.last[0] for answer in alone])


def _perform(plan: Plan) -> Answer:
    answer = Answer()
    connections = [_Connection((plan.host, plan.port), request) for request in plan.requests]
    with selectors.DefaultSelector() as selector:
        start = time.perf_counter()
        counted_from = start + plan.warm_seconds
        until = start + plan.seconds
        cpu_before = time.process_time()
        reading = selectors.EVENT_READ
        for one in connections:
            selector.register(one.socket, reading if one.begin() else selectors.EVENT_WRITE, one)
        open_ones = len(connections)
        while open_ones:
            events = selector.select(60)
            if not events:
                raise RuntimeError("no answer for 60 s")
            for key, _ in events:
                one: _Connection = key.data
                if key.events != reading:
                    if one.send():
                        selector.modify(one.socket, reading, one)
                    continue
                if not one.receive():
                    continue
                now = time.perf_counter()
                # By its end alone: who asked for the beginning too would leave out a turn of every client.
                if counted_from <= now <= until:
                    answer.latencies.append(now - one.began)
                if now >= until:
                    open_ones -= 1
                    selector.unregister(one.socket)
                elif not one.begin():
                    selector.modify(one.socket, selectors.EVENT_WRITE, one)
        answer.seconds = plan.seconds - plan.warm_seconds
        answer.client_cpu_seconds = time.process_time() - cpu_before
    for one in connections:
        answer.last.append(one.answer())
        one.socket.close()
    return answer


def main() -> None:
    """What `drive` starts: reads the plan's file and writes the answer's."""
    Path(sys.argv[2]).write_bytes(pickle.dumps(perform(pickle.loads(Path(sys.argv[1]).read_bytes()))))
