"""The garbage collector of a process that serves: kept from walking over everything that was loaded at its start."""

from __future__ import annotations

import gc

#: Objects made and not yet freed before the youngest are looked at; Python's own 700 is passed with every request.
YOUNG_OBJECTS = 20_000


def spare() -> None:
    """To be called once the process is up: what lives now is taken to live for ever.

    A full collection walks over every object that is no such one; the libraries alone have hundreds of thousands, and
    each walk holds the interpreter for tens of milliseconds.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 20, 20)
