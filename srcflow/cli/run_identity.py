"""What makes a run: what must stay the same between two starts of one, as the classes of its parts declare it.

Everything that `fit` is configured with belongs to the run, except what a class declares about its own options. Tasks, datamodules and the
parts inside them may have these class attributes; a subclass adds to those of its bases:

- `free_options`: names of options that may change: where and how something is evaluated, written or computed.
- `place_options`: names of options that say where something is, as text or a list of texts: what is there counts, not where.
- `earlier_options`: name -> what was done before there was the option; a record that lacks it continues, with a warning where the run in
  hand does something else. A datamodule's also holds for the `transform` that describes its content.
- `null_options`: name -> the value that null stands for, so that writing it out changes nothing.
"""

from __future__ import annotations

import importlib
import inspect
import json
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from srcflow import registry

TRAINER = ("max_steps", "max_epochs", "precision", "limit_train_batches", "overfit_batches")
"""Keys of `trainer` that belong to what a run is; besides them, the EMA among its callbacks."""
LATER = ("data.content", "built_on")
"""What is known of a run only once its data and artifacts are open."""


def identity(config: Mapping[str, Any], trainer: Any) -> dict[str, Any]:
    """What must stay the same between two starts of one run: model, optimisation and data, but not how and where they are computed.

    Args:
        config: the resolved configuration of `fit`.
        trainer: for the number of ranks and the datamodule.
    """
    settings, module = config["trainer"], trainer.datamodule
    model, data = ({**part, "init_args": part.get("init_args") or {}} for part in (config["model"], config.get("data") or {}))
    batch = getattr(module, "batch_size", None)
    data["global_batch"] = None if batch is None else batch * trainer.world_size * trainer.accumulate_grad_batches
    callbacks = settings.get("callbacks") or []
    averages = [c for c in (callbacks if isinstance(callbacks, list) else [callbacks]) if str(c.get("class_path")).endswith(".EMA")]
    kept = {"seed_everything": config.get("seed_everything"), "model": model, "data": data}
    kept["trainer"] = {**{k: settings.get(k) for k in TRAINER}, "ema": [c.get("init_args") for c in averages]}
    return essential(json.loads(json.dumps(kept)))


def essential(record: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without what its classes declare to be free by now, which may be more than when it was written."""
    return {k: _essential(v, None) if k in ("model", "data") else v for k, v in record.items()}


def _essential(value: Any, cls: type | None) -> Any:
    """A part's specification, or the options of a class, without what is free; in lists, too."""
    if isinstance(value, list):
        return [_essential(v, None) for v in value]
    if not isinstance(value, Mapping):
        return value
    if "class_path" in value:
        options = value.get("init_args")
        kept = {} if options is None else {"init_args": _essential(options, imported(value["class_path"]))}
        return {**value, **kept}
    free, places, nulls = (declared(cls, f"{kind}_options") for kind in ("free", "place", "null"))
    found = {}
    for name, option in value.items():
        if name in free or (name in places and _is_place(option)):
            continue
        option = json.loads(json.dumps(nulls[name])) if option is None and name in nulls else option
        found[name] = _essential(option, _annotated(cls, name) if isinstance(option, Mapping) else None)
    return found


def _is_place(option: Any) -> bool:
    return option is None or isinstance(option, str) or (isinstance(option, list) and all(isinstance(p, str) for p in option))


def imported(path: Any) -> type | None:
    """The class of a class path; None if there is none (any more), or if it is a function."""
    module, _, name = str(path).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if isinstance(found, type) else None


def declared(cls: type | None, attribute: str) -> dict[str, Any]:
    """What a class and its bases declare about their options: name -> value, or None where names alone are declared."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__ if cls is not None else ()):
        names = vars(base).get(attribute, ())
        found.update(names if isinstance(names, Mapping) else dict.fromkeys(names))
    return found


def options(cls: type) -> set[str]:
    """The names of a class's options, those that it hands on to its bases included."""
    return {name for c in cls.__mro__ if c is not object and "__init__" in vars(c) for name in inspect.signature(c.__init__).parameters}  # type: ignore[misc]  # the class's own constructor


def _annotated(cls: type | None, name: str) -> type | None:
    """The class of an option that is given by its options alone, from its annotation."""
    for base in cls.__mro__ if cls is not None else ():
        if "__init__" in vars(base) and name in inspect.signature(base.__init__).parameters:  # type: ignore[misc]  # the class's own constructor
            try:
                hint = typing.get_type_hints(base.__init__).get(name)  # type: ignore[misc]  # the class's own constructor
            except NameError:  # an annotation that exists for the type checker alone
                return None
            return next((c for c in (hint, *typing.get_args(hint)) if isinstance(c, type) and c is not type(None)), None)
    return None


def differences(stored: Any, wanted: Any, key: str = "", *, one_sided: bool = True) -> dict[str, tuple[Any, Any]]:
    """Where two configurations differ: dotted key -> (stored, wanted).

    Args:
        stored: the one.
        wanted: the other.
        key: where both stand.
        one_sided: whether a key that only one has is a difference.

    >>> differences({"a": {"b": 1, "c": [2]}}, {"a": {"b": 3, "c": [2]}, "d": None})
    {'a.b': (1, 3)}
    """
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        names = dict.fromkeys([*stored, *wanted])
        found: dict[str, tuple[Any, Any]] = {}
        for name in names if one_sided else (n for n in names if n in stored and n in wanted):
            found.update(differences(stored.get(name), wanted.get(name), f"{key}.{name}" if key else name, one_sided=one_sided))
        return found
    if isinstance(stored, list) and isinstance(wanted, list) and len(stored) == len(wanted):
        found = {}
        for i, (a, b) in enumerate(zip(stored, wanted, strict=True)):
            found.update(differences(a, b, f"{key}.{i}", one_sided=one_sided))
        return found
    if key.rpartition(".")[2] == "class_path" and isinstance(stored, str) and isinstance(wanted, str):
        return {} if registry.canonical(stored) == registry.canonical(wanted) else {key: (stored, wanted)}
    return {} if stored == wanted else {key: (stored, wanted)}


def complete(stored: dict[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Add to `stored` the `earlier_options` that it lacks, where the run in hand has them.

    Returns:
        a line for each option of the run in hand that does something else than the run did before there was a choice.
    """
    lines = []
    for section in ("model", "data"):
        old, new = stored.get(section), wanted.get(section)
        for key, mine, its, before in _earlier(old, new, section, None):
            for name in (n for n in before if n in its and n not in mine):
                mine[name] = its[name]
                if its[name] != before[name]:
                    then = f"this run began before there was a choice, with what is now {before[name]!r}."
                    lines.append(f"{key}.{name} = {its[name]!r}: {then}")
        if section == "data" and isinstance(old, Mapping) and isinstance(new, Mapping):
            contents = [d["content"].get("transform") if isinstance(d.get("content"), Mapping) else None for d in (old, new)]
            if isinstance(contents[0], dict) and isinstance(contents[1], Mapping):
                for name in declared(imported(new.get("class_path")), "earlier_options").keys() & contents[1].keys():
                    contents[0].setdefault(name, contents[1][name])
    return lines


def _earlier(old: Any, new: Any, key: str, cls: type | None) -> Iterator[tuple[str, dict[str, Any], Mapping[str, Any], dict[str, Any]]]:
    """Every pair of options of one class in both records: key, the stored, those in hand, and what the class declares."""
    if isinstance(old, list) and isinstance(new, list):
        for i, (a, b) in enumerate(zip(old, new, strict=False)):
            yield from _earlier(a, b, f"{key}.{i}", None)
    if not (isinstance(old, dict) and isinstance(new, Mapping)):
        return
    if "class_path" in new:
        yield from _earlier(old.get("init_args"), new.get("init_args"), f"{key}.init_args", imported(new["class_path"]))
        return
    if before := declared(cls, "earlier_options"):
        yield key, old, new, before
    for name in old.keys() & new.keys():
        yield from _earlier(old[name], new[name], f"{key}.{name}", _annotated(cls, name))
