"""The argument parser of every command: jsonargparse's, with errors that name the key, the value and the known choices."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import typing
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import jsonargparse

from srcflow.cli import TRACEBACK
from srcflow.errors import ConfigError, SrcflowError, UnknownNameError

_KEY = re.compile(r'Parser key "([^"]+)":')
_CLASS_PATH = re.compile(r"Problem with given class_path '([^']+)'")
_UNKNOWN_NAME = re.compile(r"Expected a dot import path string: (\S+)")
_UNKNOWN_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_UNION = "Does not validate against any of the Union subtypes"


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser with readable errors: no usage text, the full key, the nearest names. Exit status 2.

    Nested parsers are of the same class; they raise, and the outermost one reports.
    """

    bases: Mapping[str, type] = MappingProxyType({})
    """Key -> the base class of the parts that can stand there, for parts whose type is not found in a constructor's annotations."""

    def instantiate(self, *args: Any, **kwargs: Any) -> Any:
        """As jsonargparse's; what a constructor raised as a SrcflowError stays one, however deep it was nested.

        Raises:
            SrcflowError: a constructor's, or one with its message where jsonargparse tried several types and kept only the text.
        """
        try:
            return super().instantiate(*args, **kwargs)
        except Exception as e:
            ours = user_error(e)
            if ours is None and not any(str(cause).startswith(_UNION) for cause in _causes(e)):
                raise
            caught = e
        if ours is None:
            raise SrcflowError(readable(str(caught), caught, self.bases)) from caught
        raise ours

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print `error: ...` and exit with status 2; a parser that is not to exit raises, as jsonargparse's does."""
        if not self.exit_on_error:
            super().error(message, ex)
        if ex is not None and traceback_wanted():
            raise ex
        command = (getattr(ex, "subcommand_parser", None) or self).prog.replace(" [options]", "")
        self.exit(2, f"error: {readable(message, ex, self.bases)}\nHelp: {command} --help\n")


def traceback_wanted() -> bool:
    """Whether errors are to be raised, not printed."""
    return os.environ.get(TRACEBACK, "0") not in ("", "0")


def user_error(error: BaseException | None) -> SrcflowError | None:
    """The SrcflowError that `error` is or was raised from (jsonargparse wraps what constructors raise)."""
    return next((e for e in _causes(error) if isinstance(e, SrcflowError)), None)


def readable(message: str, error: BaseException | None, bases: Mapping[str, type]) -> str:
    """One short message from jsonargparse's report of nested alternatives.

    Args:
        message: jsonargparse's own message.
        error: the exception it was made from; its causes lead to the innermost problem.
        bases: key -> base class at the top level.
    """
    if (ours := user_error(error)) is not None:
        return str(ours)
    chain = list(_causes(error))
    texts = [str(e) for e in chain] or [message]
    reason = texts[-1]
    parts: list[str] = []
    owner: str | None = None  # the class that the problem is in
    holder: str | None = None  # the class that holds it
    for text in texts:
        if (found := _KEY.match(text)) and (not parts or parts[-1] != found[1]):
            parts.append(found[1])
        if found := _CLASS_PATH.match(text):
            holder, owner = owner, found[1]
        if text.startswith(_UNION) and len(alternatives := _alternatives(text)) > 1:
            fitting = [a for a in alternatives if not a.startswith("Expected ")] or alternatives  # of the kind of value that was given
            reason = fitting[0] if len(fitting) == 1 else "none of the alternatives fits:\n" + "\n".join(f"  - {a}" for a in fitting)
            if found := _CLASS_PATH.match(reason):
                owner, reason = found[1], reason[found.end() :].lstrip(": ")
            break
    key = ".".join(parts)
    if found := _UNKNOWN_NAME.search(message):
        return str(UnknownNameError(key or "class_path", found[1], _known(parts, owner, bases)))
    if owner is not None and isinstance(chain[-1], ImportError | AttributeError):
        known = ", ".join(sorted(_known(parts, holder, bases)))
        return str(ConfigError(key or "class_path", owner, f"cannot be imported: {reason}.", f"Known: {known}." if known else ""))
    if found := _UNKNOWN_OPTION.search(reason):
        return _unknown_option(key, found[1], owner)
    if found := _KEY.match(reason):
        reason = reason[found.end() :].strip()
    reason = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", reason)
    reason = re.sub(r"typing\.Literal\[([^]]*)\]", r"one of \1", reason)
    reason = re.sub(r"^Expected an? (.+)\. Got value: (.*)$", r"expected \1, got \2.", reason.strip(), flags=re.S)
    return f"{key}: {reason}" if key else reason


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _alternatives(text: str) -> list[str]:
    """The reasons why each member of a union was refused, None and "it is no path" left out."""
    block = text.partition("\nErrors:\n")[2].rpartition("\nGiven value type:")[0]
    reasons = [" ".join(part.split()) for part in re.split(r"^  - ", block, flags=re.M)[1:]]
    return [r for r in reasons if r != "Expected a <class 'NoneType'>" and not r.startswith("Expected a path but")]


def _unknown_option(key: str, option: str, owner: str | None) -> str:
    cls = _import(owner) if owner else None
    if cls is None:
        return f"{key + '.' if key else ''}{option}: no such option."
    constructor = getattr(cls, "__init__") if isinstance(cls, type) else cls  # noqa: B009  # not inspect.signature(cls): metaclasses hide it
    taken = [name for name in inspect.signature(constructor).parameters if name != "self"]
    near = difflib.get_close_matches(option, taken, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{key + '.' if key else ''}{option}: {cls.__name__} has no such option.{hint} It takes: {', '.join(taken) or 'none'}."


def _bases_at(parts: list[str], owner: str | None, bases: Mapping[str, type]) -> list[type]:
    """The base classes that the option at the end of `parts` takes, found by its annotation in the class it belongs to."""
    name = parts[-1] if parts else ""
    if name in bases:
        return [bases[name]]
    holder: Any = _import(owner) if owner else None
    if holder is None:
        first, _, name = name.partition(".")
        holder = bases.get(first)
    if holder is None:
        return []
    try:
        hint = typing.get_type_hints(holder.__init__).get(name.partition(".")[0].rstrip("+"))
    except (NameError, TypeError):  # an annotation that exists for the type checker alone
        return []
    return list(_classes(hint))


def _known(parts: list[str], owner: str | None, bases: Mapping[str, type]) -> set[str]:
    return {c.__name__ for base in _bases_at(parts, owner, bases) for c in _concrete(base)}


def _classes(hint: Any) -> Iterator[type]:
    if isinstance(hint, type) and not typing.get_args(hint):
        if hint.__module__ != "builtins":
            yield hint
    else:
        for argument in typing.get_args(hint):
            yield from _classes(argument)


def _concrete(base: type) -> Iterator[type]:
    for cls in set(_descendants(base)) or {base}:
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            yield cls


def _descendants(base: type) -> Iterator[type]:
    direct: list[type] = type.__subclasses__(base)
    for cls in direct:
        yield cls
        yield from _descendants(cls)


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
