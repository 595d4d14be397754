"""How an ONNX Runtime session comes to be: the provider, never silently another; the settings; errors of loading."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import onnxruntime as ort

from device_operations.errors import OperationError, failure
from workers.devices.libraries import tidy
from workers.devices.values import Provider, SessionOptions

if TYPE_CHECKING:
    from workers.devices.base import Device

#: The level at which a graph is written anew before ONNX Runtime reads it.
REWRITE = "rewrite"

#: The level at which the operators of a diffusion model are joined for CUDA before that; see `onnx_diffusion`.
FUSED = "fused"

_OPTIMIZATION = {
    "disable": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    REWRITE: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
    FUSED: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}

#: ONNX Runtime reports its errors by exceptions; these levels keep it from printing them as well.
_QUIET = 4


#: One for all: a batch attaches hundreds at once, and each holds it for an assignment.
_CANCELLING = threading.Lock()


class Cancel:
    """Stops runs and loads from another thread: `trip` ends the one in progress at its next node, and later ones."""

    def __init__(self) -> None:
        self._running: ort.RunOptions | ort.SessionOptions | None = None
        self.code: str | None = None
        self._why = ""

    def trip(self, code: str = "cancelled", why: str = "The job was cancelled.") -> None:
        """From now on runs raise `code` (`cancelled` or `timeout`) and say `why`; returns at once, from any thread."""
        with _CANCELLING:
            if self.code is None:
                # The reason first: who finds a code finds its reason too.
                self._why = why
                self.code = code
            if isinstance(self._running, ort.RunOptions):
                self._running.terminate = True
            elif self._running is not None:
                self._running.set_load_cancellation_flag(True)

    def check(self) -> None:
        """Raises the failure where `trip` was called."""
        if self.code is not None:
            raise failure(self.code, self._why)

    def over(self, options: ort.RunOptions | ort.SessionOptions) -> Over:
        """While inside, `trip` reaches `options`; an error of the body after a trip raises the trip's failure."""
        return Over([self], options)


class Stoppable(Protocol):
    """What may stop a run: one job's `Cancel`, or several as one."""

    def over(self, options: ort.RunOptions | ort.SessionOptions) -> Over:
        """While inside, a trip reaches `options`."""


class Over:
    """The same for several cancels at once: any of them stops what runs with `options`."""

    __slots__ = ("_cancels", "_options")

    def __init__(self, cancels: Sequence[Cancel], options: ort.RunOptions | ort.SessionOptions) -> None:
        self._cancels = cancels
        self._options = options

    def __enter__(self) -> None:
        with _CANCELLING:
            for cancel in self._cancels:
                cancel.check()
            for cancel in self._cancels:
                cancel._running = self._options

    def __exit__(self, _kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        with _CANCELLING:
            for cancel in self._cancels:
                cancel._running = None
        if isinstance(error, Exception):
            for cancel in self._cancels:
                if cancel.code is not None:
                    raise failure(cancel.code, cancel._why) from error


def resolve_provider(name: str) -> str:
    """`name` where the ONNX Runtime installed here has that provider.

    Serves onnxruntime, onnxruntime-gpu, onnxruntime-directml and onnxruntime-windowsml alike: whichever is installed is
    asked by name. Raises `device_unavailable` with the remedy.
    """
    offered = ort.get_available_providers()
    if name in offered:
        return name
    remedy = {
        "DmlExecutionProvider": "onnxruntime-directml (or onnxruntime-windowsml), on Windows",
        "CUDAExecutionProvider": "onnxruntime-gpu",
    }.get(name, "onnxruntime")
    raise failure(
        "device_unavailable",
        f"ONNX Runtime {ort.__version__} here offers {', '.join(offered)}, and {name} was asked. Install {remedy}, and "
        "no other package of ONNX Runtime beside it: two in one environment hide each other's providers.",
    )


def session_settings(
    options: SessionOptions, provider: Provider, symbols: Collection[str], name: str
) -> ort.SessionOptions:
    """The session's options. Raises `model_invalid` for a free dimension that the model does not have."""
    if options.graph_optimization not in _OPTIMIZATION:
        raise failure("validation_failed", f"graph_optimization is one of {', '.join(_OPTIMIZATION)}.")
    unknown = sorted(set(options.free_dimensions) - set(symbols))
    if unknown:
        raise failure(
            "model_invalid",
            f"{name} has no free dimension {', '.join(unknown)}; it has {', '.join(sorted(symbols)) or 'none'}.",
        )
    settings = ort.SessionOptions()
    settings.log_severity_level = _QUIET
    settings.graph_optimization_level = _OPTIMIZATION[options.graph_optimization]
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.enable_mem_pattern = provider.memory_pattern
    settings.use_deterministic_compute = options.deterministic
    if options.intra_op_threads is not None:
        settings.intra_op_num_threads = options.intra_op_threads
    for symbol, size in options.free_dimensions.items():
        settings.add_free_dimension_override_by_name(symbol, size)
    # Threads that spin after a run take the processor from the gateway on the same machine.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    settings.add_session_config_entry("session.load_model_format", "ONNX")
    for entry, value in provider.settings.items():
        settings.add_session_config_entry(entry, value)
    if provider.name != "CPUExecutionProvider":
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return settings


def load_session(
    device: Device,
    source: Path | bytes,
    name: str,
    settings: ort.SessionOptions,
    provider: Provider,
    cancel: Cancel | None,
) -> ort.InferenceSession:
    """A session on the provider asked for; ONNX Runtime's own fallback to another is off, and checked."""
    chosen = [(provider.name, dict(provider.options))]
    model = str(source) if isinstance(source, Path) else source
    try:
        with provider.lock or contextlib.nullcontext(), (cancel or Cancel()).over(settings):
            session = ort.InferenceSession(model, settings, providers=chosen, enable_fallback=0)
    except OperationError:
        raise
    except Exception as error:
        named = device.classify(error)
        of_the_device = "hresult" in (named.detail or {})
        if of_the_device or named.code not in ("run_failed", "internal_error"):
            raise named from error
        text = tidy(error).replace(str(source), name) if isinstance(source, Path) else tidy(error)
        raise failure("model_invalid", f"{name} cannot be loaded: {text}") from error
    got = session.get_providers()[0]
    if got != provider.name:
        raise failure(
            "device_unavailable",
            f"{name} was to run on {provider.name} and ONNX Runtime chose {got}: it could not load the provider's "
            "libraries. The doctor command names it.",
        )
    return session


def cpu_fallbacks(session: ort.InferenceSession, provider: str) -> int | None:
    """How many nodes went to the CPU in spite of the provider; None if this ONNX Runtime cannot say."""
    if provider == "CPUExecutionProvider":
        return 0
    assignment = getattr(session, "get_provider_graph_assignment_info", None)
    if assignment is None:
        return None
    return sum(len(part.get_nodes()) for part in assignment() if part.ep_name == "CPUExecutionProvider")
