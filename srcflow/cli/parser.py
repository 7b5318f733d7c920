"""The argument parser of every command: jsonargparse's, with errors that name the key, the value and the known choices."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import os
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import jsonargparse
import yaml

import srcflow
from srcflow import registry
from srcflow.cli import TRACEBACK, TRAINER_COMMANDS, sources
from srcflow.errors import ConfigError, ProblemsError, SrcflowError, UnknownNameError

_KEY = re.compile(r'Parser key "([^"]+)":')
_CLASS_PATH = re.compile(r"Problem with given class_path '([^']+)'")
_UNKNOWN_NAME = re.compile(r"Expected a dot import path string: (\S+)")
_UNKNOWN_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_UNKNOWN_KEY = re.compile(r"(?:Subcommand|Group) '([^']+)' does not accept option '([^']+)'")
_UNKNOWN_ARGUMENT = re.compile(r"unrecognized arguments: --([^\s=]+)")
_REQUIRED = re.compile(r"the following arguments are required: (.+)")
_NO_CLASS = r"Not a valid subclass of (\w+)(?:\. Got value: .*?)?\s+Subclass types expect one of:.*"
_UNION = "Does not validate against any of the Union subtypes"


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser with readable errors: no usage text, the full key, the nearest names. Exit status 2.

    Nested parsers are of the same class; they raise, and the outermost one reports.
    """

    bases: Mapping[str, type] = MappingProxyType({})
    """Key -> the base class of the parts that can stand there, for parts whose type is not found in a constructor's annotations."""
    _reading: str | None = None
    """The configuration file that is being parsed."""

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

    def parse_args(  # type: ignore[override]  # as jsonargparse's, which takes more than argparse's
        self, args: Sequence[str] | None = None, *positional: Any, **kwargs: Any
    ) -> Any:
        """As jsonargparse's, except that null reaches an option two levels deep, which jsonargparse hands down as the word None, and that
        class paths of earlier versions become today's.

        Raises:
            ConfigError: a file that an argument names is not text.
        """
        if not self.exit_on_error and args is not None and len(args) == 1 and args[0].startswith("--") and args[0].endswith("=None"):
            args = [args[0].removesuffix("None") + "null"]
        if args is not None and len(args) == 1 and kwargs.get("namespace") is not None:
            args = [_replacing(args[0], kwargs["namespace"])]
        args = [_todays(a) for a in (sys.argv[1:] if args is None else args)]
        try:
            return super().parse_args(args, *positional, **kwargs)
        except UnicodeDecodeError as e:  # a file of a part; --config's are read by parse_path
            raise SrcflowError(f"a configuration file is not text in UTF-8: {e}. Save it as UTF-8, or name another.") from e

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """As jsonargparse's, for a file that `sources.read` has passed, with names that there are.

        Raises:
            SrcflowError: it has not, or a name at its top is none of the options.
        """
        if str(path) == "-":
            return super().parse_path(path, *args, **kwargs)
        for name in sources.read(str(path)):
            if not any(name.rstrip("+") in (a.dest, a.dest.partition(".")[0]) for a in self._actions) and name not in TRAINER_COMMANDS:
                near = self._near(str(name))
                hint = f" Did you mean {near}?" if near else ""
                raise SrcflowError(f"{sources.place(str(name), str(path))}: {name}: no such option.{hint}")
        before, self._reading = self._reading, str(path)
        try:
            return super().parse_path(path, *args, **kwargs)
        finally:
            self._reading = before

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print `error: ...` and exit with status 2; a parser that is not to exit raises, as jsonargparse's does."""
        parser: Parser = getattr(ex, "subcommand_parser", None) or self
        message += parser._nearest(message)
        if not self.exit_on_error:
            super().error(message, ex)
        if ex is not None and traceback_wanted():
            raise ex
        command = parser.prog.replace(" [options]", "")
        if found := _REQUIRED.fullmatch(message):
            command, text = self._missing(found[1].split(", "), command)
        else:
            text = readable(message, ex, self.bases, file=self._reading)
        self.exit(2, f"error: {text}\nHelp: {command} --help\n")

    def _nearest(self, message: str) -> str:
        """A proposal for an unknown option, to be added to the message."""
        if found := _UNKNOWN_ARGUMENT.search(message):
            option, dashes = found[1], "--"
        elif found := _UNKNOWN_KEY.search(message):
            option, dashes = found[2] if found[1] == getattr(self, "subcommand", None) else ".".join(found.groups()), ""
        elif (found := _UNKNOWN_OPTION.search(message)) and message.startswith(found[0]):
            option, dashes = found[1], ""
        elif found := re.search(r"unrecognized arguments: ([^-\s]\S*\.ya?ml)\b", message):
            return f". Did you mean --config {found[1]}?"
        else:
            return ""
        near = self._near(option)
        return "" if near is None else f"{'.' if dashes else ''} Did you mean {dashes}{near}?"

    def _near(self, option: str) -> str | None:
        """The option most like one that there is not; where its first part is wrong, that with another first part."""
        known = [o.removeprefix("--") for a in self._actions for o in a.option_strings if o.startswith("--") and not o.endswith(".help")]
        first, dot, rest = option.partition(".")
        sections = {o.partition(".")[0] for o in known}
        if dot and first not in sections:
            return next((f"{n}.{rest}" for n in difflib.get_close_matches(first, sections, n=1)), None)
        return next(iter(difflib.get_close_matches(option, known, n=1, cutoff=0.7)), None)

    def _missing(self, keys: list[str], command: str) -> tuple[str, str]:
        """The command and what to say where required arguments are missing."""
        owner, _, _ = keys[0].partition(".")
        if owner not in TRAINER_COMMANDS:
            missing = [k.upper() for k in keys if not self._is_option(k)] + sorted(f"--{k}" for k in keys if self._is_option(k))
            return command, f"missing: {', '.join(missing)}."
        sections = " and ".join(k.removeprefix(f"{owner}.") for k in sorted(keys, reverse=True))
        shipped = Path(srcflow.__file__).resolve().parents[1] / "configs"
        where = str(shipped) if shipped.is_dir() else "the folder configs/ of srcflow's source tree"
        text = f"{sections}: required, and not given. Name a configuration: srcflow {owner} --config FILE"
        return f"srcflow {owner}", f"{text}, e.g. --config configs/flow/fashion_mnist.yaml. Those that are shipped are in {where}."

    def _is_option(self, key: str) -> bool:
        return any(a.dest == key and a.option_strings for a in self._actions)


def _replacing(argument: str, given: Any) -> str:
    """An argument that changes a mapping which names a class (an optimizer), as one that gives all of it.

    jsonargparse takes such a mapping for a part of its own, and fails where one stands already; that is taken out of `given`.
    """
    option, equals, value = argument.partition("=")
    keys = option.removeprefix("--").split(".")
    for n in range(len(keys), 0, -1):
        holder = ".".join(keys[:n])
        before = given.get(holder) if equals else None
        if not (isinstance(before, dict) and "class_path" in before):
            continue
        given[holder] = None
        if n == len(keys):
            return argument
        rest = keys[n + 1 :] if keys[n] == "init_args" else keys[n:]
        if rest == ["class_path"]:
            after: dict[str, Any] = {"class_path": value}
        else:
            after = {**before, "init_args": dict(before.get("init_args") or {}) if rest else _value(value)}
            if rest:
                after["init_args"][".".join(rest)] = _value(value)
        return f"--{holder}={json.dumps(after)}"
    return argument


def _value(text: str) -> Any:
    """A value as jsonargparse reads it: YAML, with 1e-8 a number."""
    try:
        return float(text) if isinstance(value := yaml.safe_load(text), str) else value
    except (ValueError, yaml.YAMLError):
        return text


def _todays(argument: str) -> str:
    """An argument of the command line; a class path of an earlier version becomes today's."""
    option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    return option + equals + str(registry.moved(value))


def traceback_wanted() -> bool:
    """Whether errors are to be raised, not printed."""
    return os.environ.get(TRACEBACK, "0") not in ("", "0")


def user_error(error: BaseException | None) -> SrcflowError | None:
    """The SrcflowError that `error` is or was raised from (jsonargparse wraps what constructors raise)."""
    return next((e for e in _causes(error) if isinstance(e, SrcflowError)), None)


def located(error: SrcflowError) -> str:
    """The error's message, with the file and line where the refused value stands, if it stands in one."""
    if isinstance(error, ProblemsError):
        return error.text(located(p) if isinstance(p, SrcflowError) else str(p) for p in error.problems)
    place = sources.place_of_value(error) if isinstance(error, ConfigError) else None
    return str(error) if place is None else f"{place}: {error}"


def readable(message: str, error: BaseException | None, bases: Mapping[str, type], *, file: str | None = None) -> str:
    """One short message from jsonargparse's report of nested alternatives, with the file and line of a value that stands in one.

    Args:
        message: jsonargparse's own message.
        error: the exception it was made from; its causes lead to the innermost problem.
        bases: key -> base class at the top level.
        file: the configuration that is being read.
    """
    if (ours := user_error(error)) is not None:
        return str(ours)
    key, text = _explained(message, error, bases)
    place = sources.place(key, file) if key else file
    return text if place is None else f"{place}: {text}"


def _explained(message: str, error: BaseException | None, bases: Mapping[str, type]) -> tuple[str, str]:
    """The key that has the problem, "" if none is known, and the message."""
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
            fitting = [a for a in fitting if _CLASS_PATH.match(a)] or [a for a in fitting if not re.match(_NO_CLASS, a)] or fitting[:1]
            reason = fitting[0] if len(fitting) == 1 else _none_fits(fitting, text)
            if found := _CLASS_PATH.match(reason):
                owner, reason = found[1], reason[found.end() :].lstrip(": ")
                if inner := _KEY.match(reason):
                    parts.append(inner[1])
                    reason = reason[inner.end() :].strip()
                reason = _flat(reason)
            break
    key = ".".join(parts)
    if found := _UNKNOWN_NAME.search(message):
        return key, str(UnknownNameError(key or "class_path", found[1], _known(parts, owner, bases)))
    if owner is not None and isinstance(chain[-1], ImportError | AttributeError):
        known = ", ".join(sorted(_known(parts, holder, bases)))
        return key, str(ConfigError(key or "class_path", owner, f"cannot be imported: {reason}.", f"Known: {known}." if known else ""))
    if found := _UNKNOWN_KEY.search(message):
        full = found[2] if found[1] in TRAINER_COMMANDS else ".".join(found.groups())
        return full, f"{full}: no such option.{message[found.end() :]}"
    if found := _UNKNOWN_OPTION.search(reason):
        unknown = f"{key}.{found[1]}" if key else found[1]
        return unknown, _unknown_option(key, found[1], owner) + (message[message.find(found[0]) + len(found[0]) :] if not owner else "")
    if (found := _UNKNOWN_ARGUMENT.search(reason)) and key:
        near = re.search(r" Did you mean --([\w.]+)\?", reason[found.end() :])
        return "", f"--{key}.{found[1]}: no such option." + (f" Did you mean --{key}.{near[1]}?" if near else "")
    if not chain:
        return "", message
    if found := _KEY.match(reason):
        reason = reason[found.end() :].strip()
    reason = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", reason)
    reason = re.sub(r"typing\.Literal\[([^]]*)\]", r"one of \1", reason)
    reason = re.sub(_NO_CLASS, r"expected a \1: the name of its class, or class_path and init_args.", reason, flags=re.S)
    reason = re.sub(r"^Expected an? (.+)\. Got value: (.*)$", r"expected \1, got \2.", reason.strip(), flags=re.S)
    return key, f"{key}: {reason}" if key else reason


def _none_fits(reasons: list[str], text: str) -> str:
    """What was expected and what was given, if that is all that the reasons say; or else all of them."""
    expected = [re.fullmatch(r"Expected an? (.+?)\.?", r) for r in reasons]
    given = re.search(r"\nGiven value: (.*)", text)
    if given and all(expected):
        names = " or ".join(dict.fromkeys(m[1] for m in expected if m))
        return f"Expected a {names}. Got value: {given[1]}"
    return "none of the alternatives fits:\n" + "\n".join(f"  - {a}" for a in reasons)


def _flat(reason: str) -> str:
    """A union's report that is one line already."""
    found = re.match(rf"{_UNION} Subtypes: .* Errors: - (?:Expected an? )?(.*) Given value type: .* Given value: (.*)$", reason)
    return reason if found is None else f"Expected a {re.sub(' - (?:Expected an? )?', ' or ', found[1])}. Got value: {found[2]}"


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
