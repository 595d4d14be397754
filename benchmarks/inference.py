"""Inference over HTTP beside the model servers of the field, on the same model files, driven by the same client.

Each contender has one ONNX Runtime thread and the same batch limit, and is spoken to in the form that is cheapest for
it. Outputs are compared with ONNX Runtime's own before anything is timed. Rounds are interleaved: each measures every
contender once, and the model alone in this process as the yardstick of what there is to gain.

    python -m benchmarks.inference [--quick] [--cases minilm,image,tiny] [--clients 1,4,16,32] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import running
from benchmarks.measure import ROUNDS, Figure, compare, machine, percentile, table, versions
from benchmarks.peers import contenders
from benchmarks.peers.cases import Case, all_cases
from benchmarks.peers.client import Answer
from benchmarks.peers.contenders import OURS, REWRITTEN, Contender, NotHere

#: The level at which contenders are judged.
JUDGED_CLIENTS = 16

ALONE = "onnxruntime, in process"


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    rounds: int = ROUNDS
    clients: tuple[int, ...] = (1, 4, 16, 32)
    seconds: float = 3.0
    warm_seconds: float = 0.7
    #: At `JUDGED_CLIENTS`, where a percentile of a few hundred requests would be a matter of one or two.
    judged_seconds: float = 8.0

    def at(self, clients: int) -> float:
        """Seconds for which a contender is driven by so many clients."""
        return self.judged_seconds if clients == JUDGED_CLIENTS else self.seconds


QUICK = Effort(rounds=1, clients=(JUDGED_CLIENTS,), warm_seconds=1.0, judged_seconds=4.0)


@dataclass(frozen=True, slots=True)
class Taken:
    """One measurement: rows a second, and percentiles of the latency in ms (None where nothing was waited for)."""

    case: str
    contender: str
    clients: int
    round: int
    per_second: float
    p50_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None


def run(effort: Effort = Effort(), names: Sequence[str] = ("minilm", "image", "tiny")) -> list[Figure]:
    """All cases; prints a table of every contender at each number of clients."""
    return measure(effort, names)[0]


def measure(effort: Effort, names: Sequence[str]) -> tuple[list[Figure], list[Taken], dict[str, str]]:
    """The figures, everything that was measured, and the peers that could not be, with the reason."""
    figures: list[Figure] = []
    taken: list[Taken] = []
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        cases = all_cases(Path(folder))
        for name in names:
            got = _case(cases[name], effort, Path(folder) / name, missing)
            print(f"\n{cases[name].title}, batches of at most {cases[name].batch}\n\n{_levels(got)}\n", flush=True)
            figures += _judged(cases[name], got)
            taken += got
    for peer, why in missing.items():
        print(f"{peer} was not measured: {why}\n", flush=True)
    return figures, taken, missing


def _case(case: Case, effort: Effort, folder: Path, missing: dict[str, str]) -> list[Taken]:
    rows = case.rows(max(effort.clients))
    expected = [case.expected(row) for row in rows]
    taken: list[Taken] = []
    with ExitStack() as running_ones:
        servers = running_ones.enter_context(running.servers())
        standing = [*running_ones.enter_context(contenders.product(servers, case))]
        for name, start in contenders.PEERS.items():
            home = folder / name
            home.mkdir(parents=True)
            try:
                standing.append(running_ones.enter_context(start(case, home)))
            except NotHere as reason:
                missing[name] = str(reason)
        requests = {one.name: [one.wire.request(row) for row in rows] for one in standing}
        for one in standing:
            _check(one, one.ask_each(requests[one.name]), expected, case.tolerance)
        for turn in range(effort.rounds):
            for clients in effort.clients:
                taken.append(_alone(case, rows, effort, clients, turn))
                # Another order each round, so that nobody always runs after the same one.
                for one in [*standing[turn % len(standing) :], *standing[: turn % len(standing)]]:
                    answer = one.drive(requests[one.name][:clients], effort.at(clients), effort.warm_seconds)
                    _check(one, answer, expected, case.tolerance_in_batches)
                    taken.append(_taken(case, one.name, clients, turn, answer))
    return taken


def _taken(case: Case, name: str, clients: int, turn: int, answer: Answer) -> Taken:
    ms = sorted(seconds * 1000 for seconds in answer.latencies)
    if not ms:
        return Taken(case.name, name, clients, turn, 0.0)
    quantiles = (percentile(ms, 0.5), percentile(ms, 0.95), percentile(ms, 0.99))
    return Taken(case.name, name, clients, turn, len(ms) / answer.seconds, *quantiles)


def _alone(case: Case, rows: list[dict[str, Any]], effort: Effort, clients: int, turn: int) -> Taken:
    """The model in this process, in batches as large as that many clients could fill."""
    size = min(case.batch, clients)
    batch = {name: np.concatenate([row[name] for row in rows[:size]]) for name in rows[0]}
    case.session.run(case.outputs, batch)
    began = time.perf_counter()
    count = 0
    while time.perf_counter() - began < effort.at(clients) - effort.warm_seconds:
        case.session.run(case.outputs, batch)
        count += size
    return Taken(case.name, ALONE, clients, turn, count / (time.perf_counter() - began))


def _check(one: Contender, answer: Answer, expected: list[Any], tolerance: float) -> None:
    """Raises where an answer is not what ONNX Runtime gives for that row."""
    for number, (head, body) in enumerate(answer.last):
        for got, wanted in zip(one.wire.outputs(head, body), expected[number], strict=True):
            if got.shape != wanted.shape:
                raise AssertionError(f"{one.name}: an output has {got.size} elements, and {wanted.size} were expected")
            apart = float(np.abs(got - wanted).max() / np.abs(wanted).max())
            if apart > tolerance:
                raise AssertionError(
                    f"{one.name}: an output lies {apart:.2g} from ONNX Runtime's, {tolerance:g} allowed"
                )


# ---- judging


def _judged(case: Case, taken: list[Taken]) -> list[Figure]:
    """The product beside the best peer and beside the model alone; judged at `JUDGED_CLIENTS`."""
    figures = []
    ours = [name for name in (OURS, REWRITTEN) if any(one.contender == name for one in taken)]
    peers = sorted({one.contender for one in taken} - {*ours, ALONE})
    for clients, name in itertools.product(sorted({one.clients for one in taken}), ours):
        at = [one for one in taken if one.clients == clients]
        judged = clients == JUDGED_CLIENTS
        what = f"{case.title}, {clients} clients" + (", rewrite" if name == REWRITTEN else "")
        tiny = case.name == "tiny"
        if peers:
            best = max(peers, key=lambda peer, at=at: _median(at, peer, "per_second"))  # type: ignore[misc]
            figures.append(_beside(f"{what}: throughput", "rows/s", at, name, best, "per_second",
                                   at_least=(0.7 if tiny else 1.0) if judged else None))  # fmt: skip
            quickest = min(peers, key=lambda peer, at=at: _median(at, peer, "p99_ms"))  # type: ignore[misc]
            figures.append(_beside(f"{what}: p99", "ms", at, name, quickest, "p99_ms",
                                   at_most=1.0 if judged and not tiny else None))  # fmt: skip
        if not tiny:
            figures.append(_beside(f"{what}: throughput", "rows/s", at, name, ALONE, "per_second",
                                   at_least=0.85 if judged else None))  # fmt: skip
    return figures


def _beside(
    name: str, unit: str, at: list[Taken], ours: str, yardstick: str, what: str, **bounds: float | None
) -> Figure:
    figure, base = _turns(at, ours, what), _turns(at, yardstick, what)
    return compare(name, unit, _next(figure), _next(base), yardstick, rounds=len(figure), **bounds)


def _turns(at: list[Taken], name: str, what: str) -> list[float]:
    """One value a round. Where nothing was answered, a latency is the longest that there is."""
    found = sorted((one for one in at if one.contender == name), key=lambda one: one.round)
    return [float("inf") if getattr(one, what) is None else getattr(one, what) for one in found]


def _next(values: list[float]) -> Callable[[], float]:
    return iter(values).__next__


def _median(at: list[Taken], name: str, what: str) -> float:
    return statistics.median(_turns(at, name, what))


def _levels(taken: list[Taken]) -> str:
    """Every contender at each number of clients, as Markdown: medians of the rounds, and the ratio to ours."""
    lines = ["| clients | contender | rows/s | p50 ms | p95 ms | p99 ms | ours / theirs |", "|" + " --- |" * 7]
    for clients, group in itertools.groupby(sorted(taken, key=lambda one: one.clients), lambda one: one.clients):
        at = list(group)
        for name in dict.fromkeys(one.contender for one in at):
            ratios = zip(_turns(at, OURS, "per_second"), _turns(at, name, "per_second"), strict=True)
            ratio = statistics.median(ours / theirs for ours, theirs in ratios if theirs)
            waits = [_median(at, name, what) for what in ("p50_ms", "p95_ms", "p99_ms")]
            told = ["" if wait == float("inf") else f"{wait:.2f}" for wait in waits]
            speed = _median(at, name, "per_second")
            lines.append(f"| {clients} | {name} | {speed:.1f} | {' | '.join(told)} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> int:
    """Prints the tables; exit status 1 where a figure falls short."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one short round with 16 clients, for tuning")
    parser.add_argument("--cases", default="minilm,image,tiny", help="which, with commas (default: all)")
    parser.add_argument("--clients", help="how many, with commas (default: 1,4,16,32)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    given = parser.parse_args()
    effort = QUICK if given.quick else Effort()
    if given.clients:
        effort = replace(effort, clients=tuple(map(int, given.clients.split(","))))
    print(f"machine: {machine()}")
    figures, taken, missing = measure(effort, given.cases.split(","))
    print(table(figures))
    if given.json is not None:
        report = {
            "machine": machine(), "versions": versions(), "effort": asdict(effort), "missing": missing,
            "figures": [asdict(one) for one in figures], "taken": [asdict(one) for one in taken],
        }  # fmt: skip
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    raise SystemExit(main())
