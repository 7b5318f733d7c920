"""Configurations of published models: named as their authors name them, checked by name and against the weights."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from srcflow.errors import ConfigError, Problems, UnknownNameError

P = ParamSpec("P")
T = TypeVar("T")


def names(function: Callable[..., Any]) -> list[str]:
    """The configuration names that a converter takes: its keyword-only arguments."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]


def known(function: Callable[P, T]) -> Callable[P, T]:
    """A converter that refuses configuration names which are not among its keyword-only arguments with `UnknownNameError`, all at once."""
    takes = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        problems = Problems()
        for name in kwargs:
            if name not in takes:
                problems.add(UnknownNameError("config", name, names(function), paths=False))
        problems.raise_if_any()
        return function(*args, **kwargs)

    return checked


class Sizes:
    """Configured values beside what the weights show: takes the weights' where none was given, and collects every contradiction.

    >>> sizes = Sizes("tarflow")
    >>> sizes.take("channels", None, 64), sizes.take("channels", 64, 64)
    (64, 64)
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.problems = Problems()

    def take(self, key: str, given: T | None, shown: T, where: str = "the weights") -> T:
        """`given`, or what the weights show if nothing was given; a contradiction is noted and `shown` returned."""
        if given is not None and given != shown:
            self.problems.add(ConfigError(f"{self.what}.{key}", given, f"{where} have {shown!r}.", f"Write {shown!r}, or leave it out."))
        return shown

    def only(self, key: str, given: Any, allowed: tuple[Any, ...], why: str) -> None:
        """Refuse a value of an argument that is accepted at some values only."""
        if given not in allowed:
            self.problems.add(ConfigError(f"{self.what}.{key}", given, why, f"Only {' or '.join(map(repr, allowed))} can be converted."))

    def raise_if_any(self) -> None:
        """Raise what was collected."""
        self.problems.raise_if_any()
