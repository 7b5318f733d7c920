"""Which modules a stored specification may have imported: srcflow's, and those of distributions that register parts for it.

A directory of weights can come from anybody. What its config.json names is looked at before anything is imported, so that opening it runs
no code but that of packages which were installed as parts for srcflow.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import Distribution, entry_points
from pathlib import PurePosixPath
from typing import Any


def class_paths(spec: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every class path in a specification, nested ones included, with the key it stands under.

    >>> list(class_paths({"class_path": "a.B", "init_args": {"parts": [{"class_path": "c.D"}]}}, "flow"))
    [('flow', 'a.B'), ('flow.parts[0]', 'c.D')]
    """
    if isinstance(spec, Mapping):
        if "class_path" in spec:
            yield key, str(spec["class_path"])
        for name, value in spec.items():
            inner = "class_path" in spec and name == "init_args"
            yield from class_paths(value, key if inner else f"{key}.{name}".lstrip("."))
    elif isinstance(spec, list | tuple):
        for i, value in enumerate(spec):
            yield from class_paths(value, f"{key}[{i}]")


def foreign(spec: Any, groups: Iterable[str], *, key: str = "", imported: bool = True) -> tuple[str, str] | None:
    """The first class path of a specification, with its key, whose module may not be imported for it; None if all may. Imports nothing.

    A name without dots is that of a registered class. A module that the program has imported itself is not imported again.

    Args:
        spec: the specification.
        groups: the entry-point groups in which distributions register parts.
        key: where it stands.
        imported: whether modules that the program has imported itself are taken as they are.
    """
    known: set[str] | None = None
    for where, path in class_paths(spec, key):
        module = path.rpartition(".")[0]
        if not module or _within(module, ("srcflow",)) or (imported and module in sys.modules):
            continue
        known = registered(groups) if known is None else known
        if not _within(module, known):
            return where, path
    return None


def registered(groups: Iterable[str]) -> set[str]:
    """The packages (and single modules) of the distributions that have entry points in some of the groups."""
    found: set[str] = set()
    seen: set[str] = set()
    for entry in (e for group in groups for e in entry_points(group=group)):
        module = entry.value.partition(":")[0].strip()
        found.add(_package(module))
        if entry.dist is not None and entry.dist.name not in seen:
            seen.add(entry.dist.name)
            found |= _modules(entry.dist)
    return found


def _within(module: str, packages: Iterable[str]) -> bool:
    return any(module == p or module.startswith(f"{p}.") for p in packages)


def _package(module: str) -> str:
    """A module's top-level package; the module itself where that is a namespace package, which any folder on the path can add to."""
    top = module.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top)  # of a top-level name: imports nothing
    except (ImportError, ValueError):
        return module
    return top if spec is not None and spec.origin is not None else module


def _modules(distribution: Distribution) -> set[str]:
    """What a distribution installed that can be imported: the outermost packages, and modules outside of any."""
    files = [PurePosixPath(f) for f in distribution.files or [] if f.suffix == ".py" and ".." not in f.parts]
    packages = {f.parent for f in files if f.name == "__init__.py" and f.parent.parts}
    found = set()
    for file in files:
        outermost = next((p for p in reversed(file.parents) if p in packages), file.with_suffix(""))
        if all(part.isidentifier() for part in outermost.parts):
            found.add(".".join(outermost.parts))
    return found
