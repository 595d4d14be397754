"""docs/lifecycle.md has every arrow of the state machine, and no other."""

from __future__ import annotations

import re

from device_operations.jobs import FOLLOWING, OPEN, TERMINAL, TRANSITIONS, State, Transition
from tests.support.stack import REPOSITORY

TEXT = (REPOSITORY / "docs" / "lifecycle.md").read_text(encoding="utf-8")


def states_in(cell: str) -> frozenset[State]:
    return frozenset(State(name) for name in re.findall(r"`(\w+)`", cell))


def test_the_table_is_the_codes_table() -> None:
    rows = [line.split("|")[1:4] for line in TEXT.splitlines() if re.match(r"\| `\w+` \| `", line)]
    told = {name.strip(" `"): Transition(states_in(leaving), states_in(entering)) for name, leaving, entering in rows}
    assert told == TRANSITIONS
    assert len(rows) == len(TRANSITIONS)


def test_the_drawing_has_every_arrow_between_open_states() -> None:
    drawn = re.findall(r"^ +(\w+) --> (\w+)$", TEXT, re.MULTILINE)
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == {(one, after) for one, following in FOLLOWING.items() for after in following - TERMINAL}


def test_every_open_state_may_end_in_every_way_as_the_page_says() -> None:
    assert all(FOLLOWING[state] >= TERMINAL for state in OPEN)
    assert all(not FOLLOWING[state] for state in TERMINAL)
    (sentence,) = re.findall(r"each of the five open states.*?\.", TEXT, re.DOTALL)
    opened, ended = sentence.split("may be followed by")
    assert (states_in(opened), states_in(ended)) == (OPEN, TERMINAL)
