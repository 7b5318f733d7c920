"""Reading YAML: one loader for every file that is read, which refuses a key that stands twice and says where an error is.

PyYAML takes the last of several equal keys, so that a second `trainer:` at the end of a file would silently drop the first one's callbacks
and logger.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from srcflow.errors import ConfigError

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FLOAT, _TIME, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("float", "timestamp", "merge"))
COMMANDS = ("fit", "validate", "test", "predict")
"""Keys that may hold a whole configuration."""
SHOWN = 60
"""Characters of a text that an error shows."""


class Loader(_Base):  # type: ignore[misc]
    """PyYAML's safe loader with YAML 1.2's numbers (2e-3 is one) and without dates."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_FLOAT, _TIME)]
    for first, resolvers in _Base.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(?:inf|Inf|INF))$|\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def load(path: str | os.PathLike[str], key: str = "config") -> Any:
    """What a YAML file holds; None if it is empty.

    Args:
        path: the file, in UTF-8.
        key: the option that names it, for the message.

    Raises:
        ConfigError: the file cannot be read, is no text, is not YAML (with the line), or has a key twice (with both lines).
    """
    return parse(read(path, key), key, path)


def read(path: str | os.PathLike[str], key: str = "config") -> str:
    """The text of a file.

    Raises:
        ConfigError: it cannot be read, or is not UTF-8.
    """
    file = Path(path)
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as e:
        raise ConfigError(key, str(path), "there is no such file.") from e
    except IsADirectoryError as e:
        raise ConfigError(key, str(path), "is a directory, and a YAML file is wanted.") from e
    except UnicodeDecodeError as e:
        line = e.object.count(b"\n", 0, e.start) + 1
        raise ConfigError(key, str(path), f"line {line}: is not text in UTF-8.", "Name a YAML file, or save it as UTF-8.") from e
    except (OSError, ValueError) as e:
        raise ConfigError(key, str(path), f"cannot be read: {getattr(e, 'strerror', None) or e}.") from e


def parse(text: str, key: str = "config", source: str | os.PathLike[str] | None = None) -> Any:
    """What a YAML text holds; None if it is empty.

    Args:
        text: the text.
        key: the option that it stands in, or that names its file.
        source: its file.

    Raises:
        ConfigError: as `load`.
    """
    try:
        check_keys(text, key, source)
        return yaml.load(text, Loader=Loader)  # derived from the safe one
    except yaml.YAMLError as e:
        raise not_yaml(e, text, key, source) from e
    except (ValueError, TypeError, RecursionError) as e:  # an integer or a key that Python cannot make
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(key, _named(text, source), f"is not YAML: {e}.") from e


def not_yaml(error: yaml.YAMLError, text: str, key: str, source: str | os.PathLike[str] | None = None) -> ConfigError:
    """PyYAML's error as one line with the place."""
    mark = getattr(error, "problem_mark", None)
    what = ". ".join(part for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part) or str(error)
    where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
    tab = mark is not None and text.splitlines()[mark.line : mark.line + 1] and "\t" in text.splitlines()[mark.line][: mark.column + 1]
    cure = "Indent with spaces, not with tabs." if tab else "Look at that line and the ones before it." if where else ""
    return ConfigError(key, _named(text, source), f"{where}is not YAML: {what}.", cure)


def check_keys(text: str, key: str = "config", source: str | os.PathLike[str] | None = None) -> None:
    """Refuse a mapping that has a key twice.

    Raises:
        ConfigError: names the key and both lines.
        yaml.YAMLError: the text is not YAML.
    """
    for path, first, second in _twice(yaml.compose(text, Loader=Loader)):
        lines = f"in line {first} and again in line {second}" if first != second else f"twice in line {first}"
        problem = f"the key {'.'.join(path)} stands {lines}; the second would replace the first."
        raise ConfigError(key, _named(text, source), problem, "Keep one of them, with all that is wanted.")


def keys_of(text: str) -> list[tuple[tuple[str, ...], int, Any]]:
    """Every key of a configuration: its path as on the command line, the line it stands on, and its value, where that is a scalar.

    `init_args` and `dict_kwargs`, the name of a command and a list's numbers are no part of a path. Empty where the text is not YAML.

    >>> keys_of("model:\\n  class_path: FlowTask\\n  init_args:\\n    seed: 1")[-1]
    (('model', 'seed'), 4, 1)
    """
    try:
        root = yaml.compose(text, Loader=Loader)
    except yaml.YAMLError:
        return []
    return list(_keys(root, (), frozenset()))


def _keys(node: Any, path: tuple[str, ...], above: frozenset[int]) -> Iterator[tuple[tuple[str, ...], int, Any]]:
    if id(node) in above:  # an alias of what it stands in
        return
    above |= {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _keys(item, path, above)
    elif isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            key = str(name.value).rstrip("+")
            left_out = key in ("init_args", "dict_kwargs") or (not path and key in COMMANDS)
            here = path if left_out else (*path, key)
            if not left_out:
                yield here, name.start_mark.line + 1, _scalar(value)[1] if isinstance(value, yaml.ScalarNode) else None
            yield from _keys(value, here, above)


def _twice(root: Any) -> Iterator[tuple[list[str], int, int]]:
    """Path and lines of every key that stands twice in one mapping."""
    waiting: list[tuple[Any, list[str]]] = [(root, [])]
    seen: set[int] = set()
    while waiting:
        node, path = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(item, [*path, str(i)]) for i, item in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            lines: dict[Any, int] = {}
            for name, value in node.value:
                waiting.append((value, [*path, str(name.value)]))
                if not isinstance(name, yaml.ScalarNode) or name.tag == _MERGE:
                    continue
                key, line = _scalar(name), name.start_mark.line + 1
                if key in lines:
                    yield [*path, str(name.value)], lines[key], line
                lines[key] = line


def _scalar(node: Any) -> tuple[type, Any]:
    """What a scalar becomes, with its type: as keys 1 and 0x1 are one, 1 and "1" are two."""
    try:
        value = yaml.constructor.SafeConstructor().construct_object(node)
    except (yaml.YAMLError, ValueError):
        value = node.value
    return type(value), value


def _named(text: str, source: str | os.PathLike[str] | None) -> str:
    if source is not None:
        return str(source)
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."
