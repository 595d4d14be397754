"""How figures are taken: contenders in turn, several rounds, medians, and the ratio to the yardstick of the same run.

Machines are noisy, so a figure never stands alone: each round measures the yardstick and the product one after the
other, and the ratio is taken round by round.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

#: Rounds of which the median is told.
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure beside its yardstick. `ratio` is figure / yardstick; `wanted` bounds it, or the figure."""

    name: str
    unit: str
    figure: float
    yardstick: float | None
    yardstick_is: str
    ratio: float | None
    wanted: str
    holds: bool
    rounds: list[tuple[float, float | None]] = field(default_factory=list)


def compare(
    name: str,
    unit: str,
    figure: Callable[[], float],
    yardstick: Callable[[], float],
    yardstick_is: str,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    rounds: int = ROUNDS,
) -> Figure:
    """Measures both in turn, `rounds` times, and judges the median of the ratios."""
    taken: list[tuple[float, float | None]] = []
    for _ in range(rounds):
        base = yardstick()
        taken.append((figure(), base))
    ratio = statistics.median(one / base for one, base in taken if base)
    wanted, holds = _judge(ratio, at_most, at_least, "x")
    return Figure(
        name, unit, statistics.median(one for one, _ in taken), statistics.median(base for _, base in taken if base),
        yardstick_is, ratio, wanted, holds, taken,
    )  # fmt: skip


def absolute(
    name: str, unit: str, figure: float, *, at_most: float | None = None, at_least: float | None = None
) -> Figure:
    """A figure with a bound of its own, such as resident memory."""
    wanted, holds = _judge(figure, at_most, at_least, " " + unit)
    return Figure(name, unit, figure, None, "", None, wanted, holds)


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def seconds_of(step: Callable[[], object]) -> float:
    """How long `step` takes."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def report(figures: list[Figure]) -> dict[str, Any]:
    """Everything for a machine to read: when, where, with which versions."""
    return {
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "figures": [asdict(figure) for figure in figures],
    }


def table(figures: list[Figure]) -> str:
    """The figures as Markdown."""
    lines = ["| figure | measured | yardstick | ratio | wanted | holds |", "| --- | --- | --- | --- | --- | --- |"]
    for one in figures:
        base = "" if one.yardstick is None else f"{one.yardstick:.4g} {one.unit} ({one.yardstick_is})"
        ratio = "" if one.ratio is None else f"{one.ratio:.2f}"
        holds = "yes" if one.holds else "**no**"
        lines.append(f"| {one.name} | {one.figure:.4g} {one.unit} | {base} | {ratio} | {one.wanted} | {holds} |")
    return "\n".join(lines)


def machine() -> str:
    """The processor, its cores, memory and system."""
    import psutil

    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return f"{name}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, {platform.system()}"


def versions() -> dict[str, str]:
    """The versions of what the figures depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("celery", "kombu", "redis", "onnxruntime", "torch", "numpy", "fastapi", "uvicorn", "sqlalchemy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _judge(value: float, at_most: float | None, at_least: float | None, unit: str) -> tuple[str, bool]:
    if at_most is not None:
        return f"at most {at_most:g}{unit}", value <= at_most
    if at_least is not None:
        return f"at least {at_least:g}{unit}", value >= at_least
    return "", True
