"""Configurations of published models: named as their authors name them, checked by name, by type and against the weights."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, ParamSpec, TypeVar, Union

from srcflow.errors import ConfigError, Problems, UnknownNameError, WeightsError

P = ParamSpec("P")
T = TypeVar("T")


def names(function: Callable[..., Any]) -> list[str]:
    """The configuration names that a converter takes: its keyword-only arguments."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]


def check_names(function: Callable[..., Any], given: Iterable[str]) -> None:
    """Refuse configuration names that a converter does not take.

    Raises:
        UnknownNameError: names the nearest (ProblemsError for several).
    """
    problems, takes = Problems(), names(function)
    for name in given:
        if name not in takes:
            problems.add(UnknownNameError("config", name, takes, paths=False))
    problems.raise_if_any()


def known(function: Callable[P, T]) -> Callable[P, T]:
    """A converter whose configuration is checked before it is called: every name, and every value's type, all problems at once.

    None stands for the default. Whole floats are taken for integers, 0 and 1 for Booleans.

    Raises:
        UnknownNameError: a name is not among the converter's keyword-only arguments.
        ConfigError: a value is of another type.
    """
    own = names(function)
    other = inspect.signature(function).parameters.keys() - set(own)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        problems, values = Problems(), dict[str, Any]()
        hints = typing.get_type_hints(function)
        what = function.__name__
        with problems.collect():
            check_names(function, kwargs.keys() - other)
        for name, value in kwargs.items():
            if name in other:
                values[name] = value
            elif name in own and value is not None:
                with problems.collect():
                    values[name] = typed(f"{what}.{name}", value, hints[name])
        problems.raise_if_any()
        return function(*args, **values)

    return checked


def typed(key: str, value: Any, hint: Any) -> Any:
    """`value` as a `hint`: a plain type, a Literal, a Sequence or Mapping, or a union of these.

    >>> typed("heads", 4.0, int | None), typed("sos", 1, bool), typed("eps", 1, float)
    (4, True, 1.0)

    Raises:
        ConfigError: it is none.
    """
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        taken = _as(value, option)
        if taken is not _NOT:
            return taken
    expected = " or ".join(_named(o) for o in options if o is not type(None))
    cure = "YAML takes 1e-5 for a word; write 1.0e-5." if isinstance(value, str) and "a number" in expected else ""
    raise ConfigError(key, value, f"must be {expected}.", cure)


_NOT = object()


def _as(value: Any, hint: Any) -> Any:
    """`value` as one plain `hint`, or `_NOT`."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin is Literal:
        return value if value in typing.get_args(hint) else _NOT
    if hint is bool:
        return bool(value) if isinstance(value, bool | int) and value in (0, 1) else _NOT
    if hint is int:
        whole = (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())
        return int(value) if whole else _NOT
    if hint is float:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else _NOT
    if origin is not None and issubclass(origin, Sequence) and not issubclass(origin, str):
        if not isinstance(value, list | tuple):
            return _NOT
        inner = [_as(v, typing.get_args(hint)[0]) for v in value]
        return _NOT if any(v is _NOT for v in inner) else inner
    if (origin or hint) in (dict, Mapping):
        return dict(value) if isinstance(value, Mapping) else _NOT
    return value if isinstance(hint, type) and isinstance(value, hint) else _NOT


def _named(hint: Any) -> str:
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    origin = typing.get_origin(hint)
    if origin is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if origin is not None and issubclass(origin, Sequence):
        return f"a list ({_named(typing.get_args(hint)[0])} each)"
    return plain.get(hint, "a mapping" if (origin or hint) in (dict, Mapping) else str(hint))


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

    def raise_if_any(self, weights: WeightsError | None = None) -> None:
        """Raise what was collected, after what loading the weights had to say, if anything."""
        if weights is not None:
            self.problems.found.insert(0, weights)
        self.problems.raise_if_any()
