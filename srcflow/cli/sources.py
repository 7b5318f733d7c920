"""The YAML files that a command reads: checked as all others, and remembered, so that an error can say where it is."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from srcflow import registry, yaml_files
from srcflow.errors import ConfigError

_texts: dict[str, str] = {}
"""Files that this command has read -> their texts, in order."""
_original = jsonargparse.get_loader("yaml")


def forget() -> None:
    """A new command begins."""
    _texts.clear()


def read(path: str | os.PathLike[str], key: str = "config") -> dict[str, Any]:
    """What a configuration holds, with today's class paths (`registry.MOVED`); its text is remembered for messages.

    Args:
        path: the file.
        key: the option that names it.

    Raises:
        ConfigError: it cannot be read, is not YAML, is empty, has a key twice, or is not a mapping.
    """
    text = yaml_files.read(path, key)
    content = yaml_files.parse(text, key, path)
    if content is None:
        raise ConfigError(key, str(path), "is empty.", "A configuration maps names to values, as the files in configs/ do.")
    if not isinstance(content, dict):
        kind = "list" if isinstance(content, list) else "single value"
        raise ConfigError(key, str(path), f"holds a {kind}; a configuration maps names to values.")
    _texts.pop(str(path), None)
    _texts[str(path)] = text
    return dict(_todays(content, text))


def place(key: str, file: str | None = None) -> str | None:
    """Where a value stands: "FILE, line N", or "FILE" for one that is not in it; None if it was given on the command line, or nowhere.

    Args:
        key: dotted, as on the command line.
        file: the file that is being read; None: the last that has the key.
    """
    if file is None and _on_command_line(key):
        return None
    for name, text in reversed([*_texts.items()] if file is None else [(file, _texts.get(file, ""))]):
        for length in range(len(parts := tuple(key.split("."))), 0, -1):  # an option without its key: where its owner stands
            lines = [line for path, line, _ in yaml_files.keys_of(text) if path == parts[:length]]
            if lines:
                return f"{name}, line {lines[0]}"
    return file


def place_of_value(error: ConfigError) -> str | None:
    """Where the value stands that a constructor refused; None unless one file has it under this key, once."""
    parts = tuple(error.key.split("."))
    found = [
        f"{name}, line {line}"
        for name, text in _texts.items()
        for path, line, value in yaml_files.keys_of(text)
        if path[-len(parts) :] == parts and value is not None and value == error.value
    ]
    return found[0] if len(found) == 1 and not _on_command_line(error.key, anywhere=True) else None


def _on_command_line(key: str, *, anywhere: bool = False) -> bool:
    """Whether an argument gives this key, a part of it, or what it is a part of."""
    for argument in sys.argv[1:]:
        name = argument.partition("=")[0].lstrip("-").rstrip("+").replace("init_args.", "")
        if not (argument.startswith("--") or "=" in argument) or name in ("config", ""):  # plan's --set has KEY=VALUE
            continue
        if name == key or key.startswith(f"{name}.") or name.startswith(f"{key}.") or (anywhere and name.endswith(f".{key}")):
            return True
    return False


def _load(text: str) -> Any:
    """jsonargparse's own reading, after a look for keys that stand twice; class paths of earlier versions become today's."""
    try:
        yaml_files.check_keys(text, "value")
    except (yaml.YAMLError, ConfigError) as e:
        if (file := _being_read(text)) is None:  # a value that is not YAML is taken as it is
            raise
        if isinstance(e, ConfigError):
            yaml_files.check_keys(text, "config", file)
        raise yaml_files.not_yaml(e, text, "config", file) from e  # type: ignore[arg-type]
    return _todays(_original(text), text)


def _todays(content: Any, text: str) -> Any:
    """What a text holds, with today's class paths."""
    return registry.moved(content) if any(old in text for old in registry.MOVED) else content


def _being_read(text: str) -> str | None:
    """The file that jsonargparse is reading, if the text is its content and not a value in it."""
    with suppress(ImportError, OSError, UnicodeDecodeError):
        from jsonargparse._util import config_load_stack

        for absolute, shown in config_load_stack.get()[-1:]:
            if Path(absolute).read_text() == text:
                return str(shown)
    return None


jsonargparse.set_loader("yaml", _load, (yaml.YAMLError,))
