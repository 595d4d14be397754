"""Strings as raw bytes: what is packed is unpacked, and bytes that add up to no strings are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_operations.errors import OperationError
from device_operations.wire.texts import pack_texts, unpack_texts


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_what_is_packed_is_unpacked(texts: list[str]) -> None:
    assert unpack_texts(pack_texts(texts), len(texts)) == texts


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1), st.data())
def test_a_part_of_the_bytes_is_never_taken_for_all_of_them(texts: list[str], data: st.DataObject) -> None:
    packed = pack_texts(texts)
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(OperationError, match="y: ") as raised:
        unpack_texts(packed[:cut], len(texts), "y")
    assert raised.value.code == "input_mismatch"


@pytest.mark.parametrize(
    ("raw", "count", "message"),
    [
        (b"", 1, "holds 1 strings, but 0"),
        (pack_texts(["a", "b"]), 1, "holds 1 strings, but 2"),
        (b"\x01\x00\x00", 1, "cut off after 0"),
        (b"\x05\x00\x00\x00ab", 1, "announced with 5 bytes, 2 are left"),
        (b"\xff\xff\xff\xff", 1, "announced with 4294967295 bytes"),
        (pack_texts([b"\xff"]), 1, "is not UTF-8"),
    ],
)
def test_what_is_wrong_is_named(raw: bytes, count: int, message: str) -> None:
    with pytest.raises(OperationError, match=message):
        unpack_texts(raw, count)
