"""How a method that is written once serves both clients: its body is a flow, and the client at hand carries it out.

`client.memory.status()` gives the answer where `client` is a `Client`, and a coroutine of it where it is an
`AsyncClient`; type checkers see the same.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Concatenate, Generic, Never, ParamSpec, Protocol, TypeVar, overload

from device_operations.client.transport.calls import Flow


class Sync:
    """Marks nouns whose methods give the answer."""


class Async:
    """Marks nouns whose methods are awaited."""


Mode = TypeVar("Mode")
P = ParamSpec("P")
T = TypeVar("T")


class Driver(Protocol):
    """What carries flows out."""

    def run(self, flow: Flow[T]) -> T | Coroutine[object, object, T]:
        """The flow's result, or a coroutine of it."""

    def iterate(self, flow: Flow[None]) -> Iterator[object] | AsyncIterator[object]:
        """The values that the flow emits, as an iterator or an asynchronous one."""


class Noun(Generic[Mode]):
    """A group of methods on one client."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver


class operation(Generic[P, T]):  # noqa: N801 - used as a decorator
    """A method whose flow has one result."""

    def __init__(self, function: Callable[Concatenate[Never, P], Flow[T]]) -> None:
        self._function = function
        functools.update_wrapper(self, function)  # type: ignore[arg-type]

    @overload
    def __get__(self, noun: None, owner: type) -> operation[P, T]: ...
    @overload
    def __get__(self, noun: Noun[Sync], owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, noun: Noun[Async], owner: type) -> Callable[P, Coroutine[object, object, T]]: ...
    def __get__(self, noun: Noun[Sync] | Noun[Async] | None, owner: type) -> object:
        if noun is None:
            return self

        @functools.wraps(self._function)
        def method(*args: P.args, **kwargs: P.kwargs) -> T | Coroutine[object, object, T]:
            return noun._driver.run(self._function(noun, *args, **kwargs))  # type: ignore[arg-type]

        return method


class iteration(Generic[P, T]):  # noqa: N801 - used as a decorator
    """A method whose flow emits values, one after another; `T` is one of them."""

    def __init__(self, function: Callable[Concatenate[Never, P], Flow[None]], of: type[T]) -> None:
        self._function = function
        functools.update_wrapper(self, function)  # type: ignore[arg-type]

    @overload
    def __get__(self, noun: None, owner: type) -> iteration[P, T]: ...
    @overload
    def __get__(self, noun: Noun[Sync], owner: type) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, noun: Noun[Async], owner: type) -> Callable[P, AsyncIterator[T]]: ...
    def __get__(self, noun: Noun[Sync] | Noun[Async] | None, owner: type) -> object:
        if noun is None:
            return self

        @functools.wraps(self._function)
        def method(*args: P.args, **kwargs: P.kwargs) -> Iterator[object] | AsyncIterator[object]:
            return noun._driver.iterate(self._function(noun, *args, **kwargs))  # type: ignore[arg-type]

        return method


def emits(of: type[T]) -> Callable[[Callable[Concatenate[Never, P], Flow[None]]], iteration[P, T]]:
    """Marks a method whose flow emits values of a type."""

    def mark(function: Callable[Concatenate[Never, P], Flow[None]]) -> iteration[P, T]:
        return iteration(function, of)

    return mark
