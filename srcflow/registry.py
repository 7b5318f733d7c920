"""Families of swappable parts: entry points, look-up by class name, building from a plain specification and back.

A *family* is an abstract base class. A *member* is a subclass, registered under its own class name by an entry point of the group
`srcflow.<family>`; the parts that srcflow ships register in the same way. A *specification* is `{"class_path": name, "init_args": {...}}`,
as in the YAML files and in an artifact's config.json. Every instance of a family remembers its constructor's arguments, so `spec_of` gives
the specification back, whether the object was built from YAML, by `build`, or in plain Python.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from abc import ABCMeta
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from srcflow.errors import ConfigError, DuplicateNameError, SrcflowError, UnknownNameError
from srcflow.lazy import defined_at

T = TypeVar("T")
P = ParamSpec("P")
Spec = dict[str, Any]

FAMILIES: dict[str, str] = {
    "encoders": "srcflow.encoders.base:Encoder",
    "autoencoders": "srcflow.autoencoders.base:Autoencoder",
    "compressors": "srcflow.compressors.base:Compressor",
    "conditioners": "srcflow.conditioners.base:Conditioner",
    "couplings": "srcflow.couplings.base:Coupling",
    "guidance": "srcflow.guidance.base:Guidance",
    "schedules": "srcflow.guidance.schedules:Schedule",
    "solvers": "srcflow.solvers.base:Solver",
    "noises": "srcflow.noise:Noise",
    "learning_rate_schedules": "srcflow.learning_rates:LearningRateSchedule",
    "extractors": "srcflow.metrics.features.base:Extractor",
    "positions": "srcflow.flows.positions:Positions",
    "normalizations": "srcflow.flows.normalization:Normalization",
    "decoders": "srcflow.autoencoders.vit_decoder:ViTDecoder",
    "perceptual": "srcflow.losses.perceptual:Perceptual",
    "adversarial": "srcflow.losses.adversarial:Adversarial",
}
"""Family name -> its abstract base. encoders, couplings and guidance are the ones third parties are invited to extend."""

MOVED: dict[str, str] = {
    "srcflow.flows.conditioners.ClassTable": "srcflow.conditioners.class_table.ClassTable",
    "srcflow.flows.conditioners.ClassToken": "srcflow.conditioners.class_token.ClassToken",
    "srcflow.flows.conditioners.Conditioner": "srcflow.conditioners.base.Conditioner",
    "srcflow.flows.conditioners.TextPrefix": "srcflow.conditioners.text_prefix.TextPrefix",
}
"""Class path of an earlier version -> where the class is now. Artifacts and configurations that have the old one stay valid."""


class PluginWarning(UserWarning):
    """A plug-in could not be loaded; the others were."""


class Recorded(ABCMeta):
    """Metaclass: an instance remembers the arguments it was constructed with (see `spec_of`)."""

    @property
    def __signature__(cls) -> inspect.Signature:
        """The constructor's, for help() and documentation; `__call__` would hide it."""
        return _signature(cls).replace(parameters=list(_signature(cls).parameters.values())[1:])

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        obj = super().__call__(*args, **kwargs)
        if "_recorded_spec" not in obj.__dict__:
            bound = _signature(cls).bind(None, *args, **kwargs)
            bound.apply_defaults()
            arguments = dict(list(bound.arguments.items())[1:])
            object.__setattr__(obj, "_recorded_spec", (f"{cls.__module__}.{cls.__qualname__}", arguments))
        return obj


@functools.cache
def _signature(cls: type) -> inspect.Signature:
    if cls.__init__ is object.__init__:  # type: ignore[misc]  # no constructor of its own; object's pretends to take anything
        return inspect.Signature([inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)])
    return inspect.signature(cls.__init__)  # type: ignore[misc]  # the class's own constructor, whatever it is


def preset(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function that builds a member: what it returns remembers the call, so its specification stays short."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        obj = function(*args, **kwargs)
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        object.__setattr__(obj, "_recorded_spec", (f"{function.__module__}.{function.__qualname__}", dict(bound.arguments)))
        return obj

    call.__srcflow_preset__ = True  # type: ignore[attr-defined]  # what `build` accepts besides classes
    return call


def spec_of(obj: Any) -> Spec:
    """The specification `{"class_path", "init_args"}` that builds an equal (untrained) object.

    Raises:
        SrcflowError: `obj`, or an argument it was built with, is not described by plain values.
    """
    recorded = getattr(obj, "_recorded_spec", None)
    if recorded is None:
        raise SrcflowError(f"{type(obj).__name__} does not record its arguments; derive it from a family's base class.")
    path, arguments = recorded
    return {"class_path": path, "init_args": {k: _plain(v, f"{path}.{k}") for k, v in arguments.items()}}


def _plain(value: Any, where: str) -> Any:
    if hasattr(value, "_recorded_spec"):
        return spec_of(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    raise SrcflowError(f"{where}: a {type(value).__name__} cannot be written to a configuration file.")


def build(spec: Spec | str, base: type[T], *, key: str = "") -> T:
    """Build the member that `spec` describes, nested members included; no jsonargparse involved.

    Args:
        spec: `{"class_path": ..., "init_args": {...}}` or a class name. A class path is a registered class name or a full import path.
        base: the family's base class (or any class the result must be an instance of).
        key: what to call this place in error messages.

    Raises:
        UnknownNameError: no registered class has this name.
        ConfigError: the arguments do not fit, or the class is not a `base`.
    """
    key = key or base.__name__
    if isinstance(spec, str):
        spec = {"class_path": spec}
    if not isinstance(spec, Mapping):
        raise ConfigError(key, spec, "a specification has the keys class_path and init_args.")
    unknown = set(spec) - {"class_path", "init_args"}
    if "class_path" not in spec or unknown:
        cure = f"Remove {sorted(unknown)}." if unknown else ""
        raise ConfigError(key, spec, "a specification has the keys class_path and init_args.", cure)
    if not isinstance(spec.get("init_args") or {}, Mapping):
        raise ConfigError(f"{key}.init_args", spec["init_args"], "arguments are a mapping of names to values.")
    target = resolve(str(spec["class_path"]), base, key=key)
    init = {k: _built(v, f"{key}.{k}") for k, v in (spec.get("init_args") or {}).items()}
    try:
        if isinstance(target, type):
            _signature(target).bind(None, **init)
        else:
            inspect.signature(target).bind(**init)
    except TypeError as e:
        raise ConfigError(f"{key}.init_args", init, f"{spec['class_path']} does not take these: {e}.") from e
    obj = target(**init)
    if not isinstance(obj, base):
        raise ConfigError(key, spec["class_path"], f"is not a {base.__name__}.")
    return obj


def _built(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        if "class_path" in value:
            return build(dict(value), object, key=key)
        return {k: _built(v, f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, list):
        return [_built(v, f"{key}[{i}]") for i, v in enumerate(value)]
    return value


def resolve(name: str, base: type[T], *, key: str = "") -> Callable[..., T]:
    """The class (or preset function) called `name`: a registered class name within `base`'s family, or a full import path (see `MOVED`)."""
    key = key or base.__name__
    name = MOVED.get(name, name)
    if "." not in name:
        known = members(base)
        own = [m.cls for f in FAMILIES if issubclass(base_of(f), base) or base is object for m in registered(f).values() if m.name == name]
        found = own or [c for c in known if c.__name__ == name]
        if not found:
            raise UnknownNameError(key, name, {c.__name__ for c in known})
        if len(found) > 1:
            paths = ", ".join(f"{c.__module__}.{c.__qualname__}" for c in found)
            raise ConfigError(key, name, "several classes have this name.", f"Give the full path: {paths}.")
        return cast("Callable[..., T]", found[0])
    module, _, attribute = name.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        known_paths = {c.__name__ for c in members(base)}
        raise ConfigError(key, name, f"cannot be imported: {e}.", f"Known names: {', '.join(sorted(known_paths))}.") from e
    is_member = isinstance(target, Recorded) and issubclass(target, base)
    if not (is_member or getattr(target, "__srcflow_preset__", False)):
        raise ConfigError(key, name, f"is neither a {base.__name__} of srcflow's families nor a preset.")
    return cast("Callable[..., T]", target)


def canonical(path: str) -> str:
    """The import path under which a class is defined now: what was moved is followed, and a package's short name is spelled out.

    >>> canonical("srcflow.flows.conditioners.ClassTable"), canonical("srcflow.conditioners.ClassTable")
    ('srcflow.conditioners.class_table.ClassTable', 'srcflow.conditioners.class_table.ClassTable')
    """
    return defined_at(MOVED.get(path, path))


def moved(value: Any) -> Any:
    """A configuration, or a part of it, with the class paths of earlier versions (`MOVED`) replaced by today's."""
    if isinstance(value, str):
        return MOVED.get(value, value)
    if isinstance(value, dict):
        return {k: moved(v) for k, v in value.items()}
    if isinstance(value, list):
        return [moved(v) for v in value]
    return value


@dataclass(frozen=True)
class Member:
    """One registered part."""

    family: str
    name: str
    distribution: str
    cls: type

    @property
    def description(self) -> str:
        """First line of the class's docstring."""
        return (inspect.getdoc(self.cls) or "").split("\n", 1)[0]


@dataclass(frozen=True)
class Broken:
    """A plug-in that could not be loaded, and why."""

    family: str
    name: str
    distribution: str
    error: str


@functools.cache
def _load(family: str) -> tuple[dict[str, Member], list[Broken]]:
    base = base_of(family)
    found: dict[str, Member] = {}
    broken: list[Broken] = []
    for ep in sorted(entry_points(group=f"srcflow.{family}"), key=lambda e: (_distribution(e) != "srcflow", _distribution(e), e.name)):
        dist = _distribution(ep)
        try:
            cls = ep.load()
        except Exception as e:  # a plug-in may fail in any way while it is imported; it is reported, and the rest goes on
            broken.append(Broken(family, ep.name, dist, f"{type(e).__name__}: {e}"))
            continue
        if not (isinstance(cls, type) and issubclass(cls, base)):
            broken.append(Broken(family, ep.name, dist, f"{ep.value} is not a subclass of {base.__module__}.{base.__name__}"))
        elif ep.name != cls.__name__:
            broken.append(Broken(family, ep.name, dist, f"the entry point's name must be the class's own, {cls.__name__}"))
        elif ep.name in found and found[ep.name].cls is not cls:
            raise DuplicateNameError(
                f"{family}: the name {ep.name} is registered by {found[ep.name].distribution} ({found[ep.name].cls.__module__}) "
                f"and by {dist} ({ep.value}). Rename one, or uninstall one of the two."
            )
        else:
            found[ep.name] = Member(family, ep.name, dist, cls)
    for b in broken:
        warnings.warn(f"plug-in {b.distribution}: srcflow.{family} {b.name} could not be loaded: {b.error}", PluginWarning, stacklevel=3)
    return found, broken


def _distribution(ep: EntryPoint) -> str:
    return ep.dist.name if ep.dist is not None else "?"


def base_of(family: str) -> type:
    """The abstract base class of a family."""
    if family not in FAMILIES:
        raise UnknownNameError("family", family, FAMILIES)
    module, _, name = FAMILIES[family].partition(":")
    return cast(type, getattr(importlib.import_module(module), name))


def registered(family: str) -> dict[str, Member]:
    """Every loadable member of a family by name. A broken plug-in is warned about once and listed by `broken`."""
    return dict(_load(family)[0])


def broken(family: str) -> list[Broken]:
    """The plug-ins of a family that could not be loaded."""
    return list(_load(family)[1])


def load_plugins(families: Iterable[str] | None = None) -> None:
    """Import every registered part of some families (None: of all), so that class names resolve in YAML and on the command line."""
    for family in FAMILIES if families is None else families:
        _load(family)


def members(base: type[T]) -> list[type[T]]:
    """Every concrete, imported subclass of `base`, after loading the entry points of the families that `base` covers."""
    for family in FAMILIES:
        if issubclass(base_of(family), base):
            _load(family)
    found: dict[str, type[T]] = {}
    todo = list(base.__subclasses__()) if base is not object else []
    while todo:
        cls = todo.pop()
        todo.extend(cls.__subclasses__())
        if not inspect.isabstract(cls):
            found.setdefault(f"{cls.__module__}.{cls.__qualname__}", cls)
    if base is object:  # a nested specification with a short name: any family will do, if only one knows it
        for family in FAMILIES:
            found.update({f"{m.cls.__module__}.{m.cls.__qualname__}": m.cls for m in _load(family)[0].values()})
    return list(found.values())
