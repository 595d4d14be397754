"""The graphics adapters of a Windows machine and their memory, asked of DXGI by ctypes.

ONNX Runtime counts adapters in this order. Nothing here loads torch or ONNX Runtime; on other systems there is no DXGI,
and `adapters()` is empty.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

#: Vendors by their PCI number.
_VENDORS = {
    0x10DE: "NVIDIA", 0x1002: "AMD", 0x1022: "AMD", 0x8086: "Intel", 0x5143: "Qualcomm", 0x4D4F4351: "Qualcomm",
    0x1414: "Microsoft",
}  # fmt: skip

#: Places in the method tables of dxgi.h and dxgi1_4.h: what a class inherits comes first.
_QUERY_INTERFACE, _RELEASE = 0, 2
_ENUM_ADAPTERS_1, _CHECK_INTERFACE_SUPPORT, _GET_DESC_1, _QUERY_VIDEO_MEMORY_INFO = 12, 9, 10, 14

_IID_FACTORY_1 = "770aae78-f26f-4dba-a829-253c83d1b387"
_IID_ADAPTER_3 = "645967a4-1392-4310-a798-8053ce3e93fd"
_IID_DEVICE = "54ec77fa-1377-44e6-8c32-88fd5f44c84c"
_FLAG_SOFTWARE = 2
_SEGMENT_LOCAL = 0


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter: its place in DXGI's order, and what it says of itself."""

    index: int
    name: str
    luid: int
    vendor: str | None
    driver: str | None
    dedicated_bytes: int
    shared_bytes: int
    software: bool


@dataclass(frozen=True, slots=True)
class VideoMemory:
    """What Windows lets this process have of an adapter's own memory, and what the process has of it."""

    budget_bytes: int
    usage_bytes: int


class _Guid(ctypes.Structure):
    _fields_ = [("data", ctypes.c_ubyte * 16)]

    @classmethod
    def of(cls, text: str) -> _Guid:
        import uuid

        return cls.from_buffer_copy(uuid.UUID(text).bytes_le)


class _Description(ctypes.Structure):
    """DXGI_ADAPTER_DESC1."""

    _fields_ = [
        ("description", ctypes.c_wchar * 128),
        ("vendor_id", ctypes.c_uint),
        ("device_id", ctypes.c_uint),
        ("subsystem_id", ctypes.c_uint),
        ("revision", ctypes.c_uint),
        ("dedicated_video_memory", ctypes.c_size_t),
        ("dedicated_system_memory", ctypes.c_size_t),
        ("shared_system_memory", ctypes.c_size_t),
        ("luid", ctypes.c_int64),
        ("flags", ctypes.c_uint),
    ]


class _MemoryInfo(ctypes.Structure):
    """DXGI_QUERY_VIDEO_MEMORY_INFO."""

    _fields_ = [
        ("budget", ctypes.c_uint64),
        ("current_usage", ctypes.c_uint64),
        ("available_for_reservation", ctypes.c_uint64),
        ("current_reservation", ctypes.c_uint64),
    ]


def adapters() -> list[Adapter]:
    """Every adapter in DXGI's order, software ones too; none where there is no DXGI."""
    if sys.platform != "win32":
        return []
    with _factory() as factory:
        found = []
        while True:
            with _adapter(factory, len(found)) as adapter:
                if adapter is None:
                    return found
                found.append(_described(adapter, len(found)))


def video_memory(index: int) -> VideoMemory | None:
    """This process's share of the adapter's own memory; None if DXGI cannot say."""
    if sys.platform != "win32":
        return None
    with _factory() as factory, _adapter(factory, index) as adapter:
        if adapter is None:
            return None
        newer = ctypes.c_void_p()
        if _call(adapter, _QUERY_INTERFACE, ctypes.byref(_Guid.of(_IID_ADAPTER_3)), ctypes.byref(newer)) != 0:
            return None
        info = _MemoryInfo()
        status = _call(
            newer, _QUERY_VIDEO_MEMORY_INFO, ctypes.c_uint(0), ctypes.c_uint(_SEGMENT_LOCAL), ctypes.byref(info)
        )
        _call(newer, _RELEASE)
        return VideoMemory(info.budget, info.current_usage) if status == 0 and info.budget else None


def _described(adapter: ctypes.c_void_p, index: int) -> Adapter:
    about = _Description()
    _call(adapter, _GET_DESC_1, ctypes.byref(about))
    version = ctypes.c_uint64()
    known = _call(adapter, _CHECK_INTERFACE_SUPPORT, ctypes.byref(_Guid.of(_IID_DEVICE)), ctypes.byref(version)) == 0
    parts = [str(version.value >> shift & 0xFFFF) for shift in (48, 32, 16, 0)]
    return Adapter(
        index=index,
        name=about.description.rstrip("\0 "),
        luid=about.luid,
        vendor=_VENDORS.get(about.vendor_id),
        driver=".".join(parts) if known and version.value else None,
        dedicated_bytes=about.dedicated_video_memory,
        shared_bytes=about.shared_system_memory,
        software=bool(about.flags & _FLAG_SOFTWARE),
    )


@contextmanager
def _factory() -> Iterator[ctypes.c_void_p]:
    # getattr, because type checkers on other systems know no WinDLL
    dll: Any = getattr(ctypes, "WinDLL")("dxgi")  # noqa: B009
    factory = ctypes.c_void_p()
    status = dll.CreateDXGIFactory1(ctypes.byref(_Guid.of(_IID_FACTORY_1)), ctypes.byref(factory))
    if status != 0 or not factory.value:
        raise OSError(f"CreateDXGIFactory1 answered {status & 0xFFFFFFFF:08X}")
    try:
        yield factory
    finally:
        _call(factory, _RELEASE)


@contextmanager
def _adapter(factory: ctypes.c_void_p, index: int) -> Iterator[ctypes.c_void_p | None]:
    adapter = ctypes.c_void_p()
    if _call(factory, _ENUM_ADAPTERS_1, ctypes.c_uint(index), ctypes.byref(adapter)) != 0:
        yield None
        return
    try:
        yield adapter
    finally:
        _call(adapter, _RELEASE)


def _call(thing: ctypes.c_void_p, place: int, *arguments: Any) -> int:
    """Calls the method at `place` of a COM object's table; its HRESULT (or count)."""
    table = ctypes.cast(thing, ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p))).contents
    function_type: Any = getattr(ctypes, "WINFUNCTYPE")  # noqa: B009
    types = [ctypes.c_uint if isinstance(argument, ctypes.c_uint) else ctypes.c_void_p for argument in arguments]
    method = function_type(ctypes.c_long, ctypes.c_void_p, *types)(table[place])
    result: int = method(thing, *arguments)
    return result
