"""Families, entry points, specifications."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from srcflow import registry, trust
from srcflow.conditioners import Conditioner
from srcflow.couplings.additive import Additive
from srcflow.couplings.affine import Affine
from srcflow.couplings.base import Coupling
from srcflow.encoders.base import Encoder
from srcflow.errors import ConfigError, DuplicateNameError, SrcflowError, UnknownNameError
from srcflow.guidance.base import Guidance, Negative
from srcflow.guidance.linear import Linear
from srcflow.guidance.schedules import Annealed, Interval, Schedule
from srcflow.noise import Noise
from srcflow.registry import PluginWarning, Recorded, build, preset, registered, spec_of


class Part(metaclass=Recorded):
    """A family of this test's own."""

    def __init__(self, size: int = 3, name: str = "x", inner: Part | None = None, options: dict[str, Any] | None = None) -> None:
        self.size, self.name, self.inner, self.options = size, name, inner, options


class PlainPart(Part):
    """Inherits its constructor."""


class PositionalPart(Part):
    def __init__(self, *, paths: list[Path | str]) -> None:
        super().__init__(len(paths))
        self.paths = paths


class ModulePart(nn.Module, metaclass=Recorded):
    def __init__(self, width: int, coupling: Coupling) -> None:
        super().__init__()
        self.coupling = coupling
        self.map = nn.Linear(width, width)


class Bare(metaclass=Recorded):
    """No constructor at all."""


class Failing(Part):
    def __init__(self, size: int) -> None:
        raise KeyError("missing")


@preset
def big_part(scale: int, name: str = "big") -> Part:
    """A published size."""
    return Part(100 * scale, name, PlainPart(7))


def not_a_preset(scale: int) -> Part:
    return Part(scale)


# --- specifications -----------------------------------------------------------------------------------------------------------------------


def test_specification_holds_every_argument_with_defaults() -> None:
    spec = spec_of(Part(5))
    assert spec["class_path"].endswith("test_registry.Part")
    assert spec["init_args"] == {"size": 5, "name": "x", "inner": None, "options": None}


@pytest.mark.parametrize(
    "part",
    [
        Part(),
        Part(4, "y", PlainPart(2, inner=Part(1)), {"a": [1, 2.5, None], "b": {"c": True}}),
        PositionalPart(paths=["a", "b"]),
        ModulePart(3, Affine()),
        Bare(),
        Linear(Annealed(2.0), what="shift", blocks="deep", negative=Negative(attention_temperature=1.5)),
        Linear(1.5),
        big_part(2),
        big_part(2, name="other"),
    ],
    ids=lambda p: type(p).__name__,
)
def test_round_trip_through_json(part: Any) -> None:
    spec = spec_of(part)
    again = build(json.loads(json.dumps(spec)), type(part))
    assert type(again) is type(part)
    assert spec_of(again) == spec


def test_nested_members_are_built() -> None:
    again = build(json.loads(json.dumps(spec_of(Linear(Interval(2.0, 0.1, 0.9), negative=Negative(attention_temperature=3.0))))), Guidance)
    assert isinstance(again.strength, Interval)
    assert (again.strength.start, again.strength.stop) == (0.1, 0.9)
    assert again.negative.attention_temperature == 3.0
    nested = build(spec_of(Part(options={"parts": [Part(8), {"deep": Part(9)}]})), Part)
    assert nested.options is not None
    assert nested.options["parts"][0].size == 8
    assert nested.options["parts"][1]["deep"].size == 9


def test_a_preset_keeps_its_short_specification() -> None:
    part = big_part(2)
    spec = spec_of(part)
    assert spec["class_path"].endswith("test_registry.big_part")
    assert spec["init_args"] == {"scale": 2, "name": "big"}
    again = build(spec, Part)
    assert (again.size, again.name) == (200, "big")
    assert again.inner is not None
    assert again.inner.size == 7
    assert spec_of(Part(1, inner=part))["init_args"]["inner"] == spec


def test_only_presets_are_called() -> None:
    path = f"{__name__}.not_a_preset"
    with pytest.raises(ConfigError, match="neither a Part of srcflow's families nor a preset"):
        build({"class_path": path, "init_args": {"scale": 1}}, Part)
    with pytest.raises(ConfigError, match="neither"):
        build({"class_path": "os.system", "init_args": {"command": "true"}}, Part)
    with pytest.raises(ConfigError, match="neither a Guidance"):
        build("srcflow.couplings.affine.Affine", Guidance)


@pytest.mark.parametrize("copier", [copy.deepcopy, copy.copy, lambda p: pickle.loads(pickle.dumps(p))], ids=["deepcopy", "copy", "pickle"])
@pytest.mark.parametrize("part", [Part(4, inner=PlainPart(2)), ModulePart(3, Affine()), big_part(3)], ids=["plain", "module", "preset"])
def test_specification_survives_copies(copier: Callable[[Any], Any], part: Any) -> None:
    assert spec_of(copier(part)) == spec_of(part)


def test_a_module_keeps_its_specification_when_it_is_moved() -> None:
    part = ModulePart(3, Affine())
    spec = spec_of(part)
    assert spec_of(part.double().eval().requires_grad_(False)) == spec
    assert list(part.state_dict()) == ["map.weight", "map.bias"], "the specification leaks into the weights"


def test_what_no_file_can_hold_is_refused_with_its_place() -> None:
    with pytest.raises(SrcflowError, match=r"Part\.options\.mask: a Tensor cannot be written"):
        spec_of(Part(options={"mask": torch.ones(2)}))
    with pytest.raises(SrcflowError, match="Linear does not record its arguments"):
        spec_of(nn.Linear(2, 2))


def test_paths_become_text() -> None:
    spec = spec_of(PositionalPart(paths=[Path("a") / "b", "c"]))
    assert spec["init_args"] == {"paths": [str(Path("a/b")), "c"]}


# --- building -----------------------------------------------------------------------------------------------------------------------------


def test_short_names_and_full_paths_name_the_same_class() -> None:
    for name in ("Affine", "srcflow.couplings.affine.Affine", {"class_path": "Affine"}, {"class_path": "Affine", "init_args": None}):
        assert type(build(name, Coupling)) is Affine  # type: ignore[arg-type]
    assert isinstance(build({"class_path": "Constant", "init_args": {"strength": 2.0}}, Schedule), Schedule)
    assert isinstance(build({"class_path": "Constant", "init_args": {"sigma": 0.1}}, Noise), Noise), "one name in two families"


@pytest.mark.parametrize("old", registry.MOVED)
def test_a_class_path_of_an_earlier_version_finds_the_class(old: str) -> None:
    new = registry.MOVED[old]
    target = registry.resolve(old, Conditioner)
    assert f"{target.__module__}.{target.__qualname__}" == new, "the table names another place than where the class is defined"
    assert registry.canonical(old) == registry.canonical(new) == new
    assert trust.foreign({"class_path": old}, ()) is None, "an artifact may name it"


def test_a_stored_specification_of_an_earlier_version_is_built() -> None:
    part = build({"class_path": "srcflow.flows.conditioners.ClassTable", "init_args": {"num_classes": 3, "width": 4}}, Conditioner)
    assert spec_of(part)["class_path"] == "srcflow.conditioners.class_table.ClassTable"
    nested = registry.moved({"a": [{"class_path": "srcflow.flows.conditioners.TextPrefix"}, 1], "b": "srcflow.flows.conditioners"})
    assert nested == {"a": [{"class_path": "srcflow.conditioners.text_prefix.TextPrefix"}, 1], "b": "srcflow.flows.conditioners"}


def test_a_packages_short_path_is_spelled_out() -> None:
    assert registry.canonical("srcflow.guidance.Linear") == "srcflow.guidance.linear.Linear"
    assert registry.canonical("srcflow.Flow") == "srcflow.flows.flow.Flow"
    for unchanged in ("srcflow.guidance.linear.Linear", "srcflow.guidance.Nothing", "srcflow.nowhere.Linear", "torch.nn.Linear", "Linear"):
        assert registry.canonical(unchanged) == unchanged


def test_an_unknown_name_lists_the_known_and_the_nearest() -> None:
    with pytest.raises(UnknownNameError) as raised:
        build("Afine", Coupling, key="model.flow.coupling")
    message = str(raised.value)
    assert message.startswith("model.flow.coupling = 'Afine'")
    assert "Did you mean Affine" in message
    assert {"Additive", "Affine", "SoftplusAffine"} <= set(raised.value.known)
    assert "Coupling" not in raised.value.known, "the abstract base is no choice"


@pytest.mark.parametrize("path", ["srcflow.couplings.affine.Afine", "srcflow.couplings.nowhere.Affine", "no_such_package.Affine"])
def test_a_path_that_cannot_be_imported_says_why(path: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be imported.*Known names: .*Affine"):
        build(path, Coupling)


def test_arguments_that_do_not_fit_are_named() -> None:
    with pytest.raises(ConfigError, match=r"rule\.init_args = \{'strenght': 1\.0\}: Linear does not take these"):
        build({"class_path": "Linear", "init_args": {"strenght": 1.0}}, Guidance, key="rule")
    with pytest.raises(ConfigError, match="does not take these"):
        build({"class_path": "Affine", "init_args": {"limit": 1.0}}, Coupling)
    with pytest.raises(ConfigError, match=r"keys class_path and init_args.*Remove \['args'\]"):
        build({"class_path": "Affine", "args": {}}, Coupling)
    with pytest.raises(ConfigError, match=r"guidance\.strength"):
        build({"class_path": "Linear", "init_args": {"strength": {"class_path": "Anealed"}}}, Guidance, key="guidance")


def test_an_error_inside_a_constructor_is_not_taken_for_an_unknown_name() -> None:
    with pytest.raises(KeyError, match="missing"):
        build({"class_path": f"{__name__}.Failing", "init_args": {"size": 1}}, Part)


def test_two_classes_of_one_name_ask_for_the_full_path() -> None:
    def make() -> type[Part]:
        class PlainPart(Part):
            """Another one."""

        return PlainPart

    other = make()
    with pytest.raises(ConfigError, match=r"several classes have this name.*Give the full path"):
        build("PlainPart", Part)
    assert other.__name__ == "PlainPart"


def test_building_needs_no_jsonargparse_and_no_lightning() -> None:
    code = """
import sys, warnings
warnings.simplefilter("ignore")
from srcflow.registry import build, spec_of
from srcflow.guidance.base import Guidance
strength = {"class_path": "Annealed", "init_args": {"strength": 2.0}}
build(spec_of(build({"class_path": "Linear", "init_args": {"strength": strength}}, Guidance)), Guidance)
print(sorted({m.partition(".")[0] for m in sys.modules} & {"jsonargparse", "lightning", "pytorch_lightning"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- entry points -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_every_built_in_part_loads_under_its_class_name(family: str) -> None:
    own = [m for m in registered(family).values() if m.distribution == "srcflow"]
    assert own, f"srcflow registers nothing in {family}"
    base = registry.base_of(family)
    for member in own:
        assert member.name == member.cls.__name__
        assert member.family == family
        assert issubclass(member.cls, base)
        assert member.description.endswith((".", ":", ")")), f"{member.name}'s docstring has no first sentence: {member.description!r}"
    assert [b for b in registry.broken(family) if b.distribution == "srcflow"] == []


def test_an_unknown_family_lists_the_known() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean couplings.*Known: .*encoders"):
        registered("coupling")


PLUGIN = {"encoders": ["PatchProjection"], "couplings": ["BoundedAffine", "SinhArcsinh"], "guidance": ["Power"]}


@pytest.mark.parametrize("family", PLUGIN)
def test_an_installed_plug_in_registers_like_a_built_in_part(family: str) -> None:
    """`make test` installs tests/plugins; without that this test fails rather than passing vacuously."""
    for name in PLUGIN[family]:
        member = registered(family)[name]
        assert member.distribution == "srcflow-goodplugin"
        assert member.cls.__module__.startswith("srcflow_goodplugin.")
        assert member.description


def test_an_installed_part_is_built_by_its_short_name() -> None:
    coupling = build({"class_path": "BoundedAffine", "init_args": {"limit": 2.0}}, Coupling)
    assert spec_of(coupling) == {"class_path": "srcflow_goodplugin.couplings.BoundedAffine", "init_args": {"limit": 2.0}}
    assert spec_of(build(spec_of(coupling), Coupling)) == spec_of(coupling)
    assert build({"class_path": "PatchProjection", "init_args": {"dim": 6}}, Encoder).dim == 6
    with pytest.raises(ConfigError, match=r"coupling\.limit = -1"):
        build({"class_path": "BoundedAffine", "init_args": {"limit": -1}}, Coupling)


def test_a_broken_plug_in_is_reported_and_stops_nothing() -> None:
    registry._load.cache_clear()
    with pytest.warns(PluginWarning) as caught:
        registry.load_plugins()
    messages = [str(w.message) for w in caught]
    broken = [b for family in registry.FAMILIES for b in registry.broken(family)]
    reported = {(b.family, b.name): b.error for b in broken if b.distribution == "srcflow-brokenplugin"}
    assert set(reported) == {("encoders", "NeedsMore"), ("couplings", "Alias"), ("guidance", "NotARule")}
    assert reported["encoders", "NeedsMore"] == "ModuleNotFoundError: No module named 'srcflow_brokenplugin_missing_library'"
    assert reported["couplings", "Alias"] == "the entry point's name must be the class's own, Misnamed"
    assert "NotARule is not a subclass of srcflow.guidance.base.Guidance" in reported["guidance", "NotARule"]
    for (family, name), error in reported.items():
        assert any(f"srcflow-brokenplugin: srcflow.{family} {name} could not be loaded: {error}" in m for m in messages)
        assert name not in registered(family)
    assert registered("couplings")["Sound"].distribution == "srcflow-brokenplugin", "its sound part loads all the same"
    assert "Affine" in registered("couplings")
    assert "PatchProjection" in registered("encoders")


def test_a_broken_plug_in_is_warned_about_once() -> None:
    registry.load_plugins()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.load_plugins()
        registered("couplings")
        build("Affine", Coupling)


@pytest.fixture
def more_entry_points(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that further distributions are installed: (distribution, family, name, value)."""
    real = registry.entry_points

    def pretend(*entries: tuple[str, str, str, str]) -> None:
        def entry_points(group: str) -> list[Any]:
            more = []
            for distribution, family, name, value in entries:
                entry = EntryPoint(name, value, f"srcflow.{family}")
                more.append(SimpleNamespace(name=name, value=value, load=entry.load, dist=SimpleNamespace(name=distribution)))
            return [*real(group=group), *(e for e, (_, family, _, _) in zip(more, entries, strict=True) if group == f"srcflow.{family}")]

        monkeypatch.setattr(registry, "entry_points", entry_points)
        registry._load.cache_clear()

    return pretend


class Rival(Additive):
    """A plug-in's part."""


@contextmanager
def called(name: str) -> Iterator[None]:
    """Rival under another name, for a moment only: `build` would ask every other test which of the two it means."""
    Rival.__name__ = name
    try:
        yield
    finally:
        Rival.__name__ = "Rival"


def test_a_duplicate_name_is_refused_naming_both(more_entry_points: Callable[..., None]) -> None:
    more_entry_points(("a-rival", "couplings", "Affine", f"{__name__}:Rival"))
    with called("Affine"), pytest.raises(DuplicateNameError) as raised:
        registered("couplings")
    for part in ("couplings: the name Affine", "srcflow (srcflow.couplings.affine)", "a-rival", f"{__name__}:Rival", "uninstall"):
        assert part in str(raised.value)
    assert "Annealed" in registered("schedules"), "other families are not affected"


def test_two_plug_ins_of_one_name_are_refused(more_entry_points: Callable[..., None]) -> None:
    more_entry_points(("a-rival", "couplings", "BoundedAffine", f"{__name__}:Rival"))
    with (
        called("BoundedAffine"),
        pytest.raises(DuplicateNameError, match=r"by a-rival .* and by srcflow-goodplugin"),
    ):
        registered("couplings")


def test_one_class_registered_twice_is_no_conflict(more_entry_points: Callable[..., None]) -> None:
    more_entry_points(("a-friend", "couplings", "BoundedAffine", "srcflow_goodplugin.couplings:BoundedAffine"))
    assert registered("couplings")["BoundedAffine"].cls.__module__ == "srcflow_goodplugin.couplings"


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("no_such_module:Thing", "ModuleNotFoundError"),
        ("srcflow.couplings.affine:Thing", "AttributeError"),
        (f"{__name__}:not_a_preset", "is not a subclass"),
        (f"{__name__}:EXPLODES", "AttributeError"),
    ],
)
def test_whatever_an_entry_point_does_it_is_reported(more_entry_points: Callable[..., None], value: str, error: str) -> None:
    more_entry_points(("careless", "couplings", "Thing", value))
    with pytest.warns(PluginWarning, match=f"plug-in careless: srcflow.couplings Thing could not be loaded: .*{error}"):
        members = registered("couplings")
    assert "Thing" not in members
    assert "Affine" in members
    assert [b.name for b in registry.broken("couplings") if b.distribution == "careless"] == ["Thing"]
