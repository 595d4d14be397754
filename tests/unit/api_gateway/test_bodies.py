"""Room for requests' bodies: taken in order, given back, and never more than there is."""

from __future__ import annotations

import asyncio

import pytest

from api_gateway.submission import bodies
from api_gateway.submission.bodies import Bodies, Room
from device_operations.errors import OperationError

MIB = 1 << 20


def test_who_finds_no_room_waits_for_it_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "WAIT_SECONDS", 1.0)

    async def scenario() -> None:
        room = Bodies(10 * MIB)
        await room.take(8 * MIB)
        large = asyncio.create_task(room.take(9 * MIB))
        await asyncio.sleep(0.5)
        # It would fit, and does not overtake.
        small = asyncio.create_task(room.take(MIB))
        with pytest.raises(OperationError) as refused:
            await large
        assert refused.value.code == "overloaded"
        # Who waited behind it gets its turn as soon as it has given up.
        await small
        assert room.held_bytes == 9 * MIB
        waiting = [asyncio.create_task(room.take(5 * MIB)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        room.give_back(9 * MIB)
        await asyncio.gather(*waiting[1:])
        assert room.held_bytes == 10 * MIB
        room.give_back(10 * MIB)
        assert room.held_bytes == 0

    asyncio.run(scenario())


def test_a_body_of_unknown_length_takes_room_as_it_comes() -> None:
    async def scenario() -> None:
        all_ = Bodies(3 * MIB)
        one, other, tiny = Room(all_), Room(all_), Room(all_)
        await one.announced(None, 64 * MIB)
        await other.announced("2097152", 64 * MIB)
        assert all_.held_bytes == 2 * MIB
        one.came(500_000)
        assert all_.held_bytes == 3 * MIB
        with pytest.raises(OperationError, match="MAX_BODY_BYTES_IN_FLIGHT"):
            one.came(2 * MIB)
        await tiny.announced("60000", 64 * MIB)
        tiny.came(60_000)
        for room in (one, other, tiny, one):
            room.close()
        assert all_.held_bytes == 0
        # A body that is larger than all the room is taken alone.
        await one.announced(str(64 * MIB), 64 * MIB)
        one.came(64 * MIB)
        assert all_.held_bytes == 3 * MIB

    asyncio.run(scenario())
