"""What belongs to a run is what the classes of its parts do not declare to be free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning as L
import pytest

from srcflow import cli
from srcflow.cli import run_identity
from srcflow.datamodules.base import DataModule
from srcflow.datamodules.image_folder import ImageFolder
from srcflow.tasks.base import Task
from srcflow.tasks.flow import FlowTask
from srcflow.tasks.optimization import Optimization

ROOT = Path(__file__).parents[2]
KINDS = ("free_options", "place_options", "earlier_options", "null_options")


class Head:
    """A part of somebody else's task."""

    free_options: ClassVar[frozenset[str]] = frozenset({"chunk"})

    def __init__(self, width: int = 8, chunk: int = 1) -> None: ...


class OtherTask(FlowTask):
    """A task of somebody else, with options of its own and without a list in srcflow."""

    free_options: ClassVar[frozenset[str]] = frozenset({"picture_every"})
    place_options: ClassVar[frozenset[str]] = frozenset({"teachers"})
    earlier_options: ClassVar[Mapping[str, Any]] = {"loss": "l1"}

    def __init__(
        self, flow: Any, codec: str, picture_every: int = 0, teachers: Any = None, loss: str = "l2", heads: Any = None, **kwargs: Any
    ) -> None: ...


class OtherData(ImageFolder):
    """A datamodule of somebody else."""

    free_options: ClassVar[frozenset[str]] = frozenset({"cache"})

    def __init__(self, cache: str | None = None, shuffle: bool = True, **kwargs: Any) -> None: ...


def path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def identity_of(cls: type, **options: Any) -> dict[str, Any]:
    """The options of a task that belong to a run's identity."""
    config = {"model": {"class_path": path(cls), "init_args": options}, "trainer": {}, "seed_everything": 0}
    trainer = SimpleNamespace(datamodule=None, world_size=1, accumulate_grad_batches=1)
    return run_identity.identity(config, trainer)["model"]["init_args"]  # type: ignore[no-any-return]


def data_identity(cls: type, batch_size: int, accumulate: int, **options: Any) -> dict[str, Any]:
    data = {"class_path": path(cls), "init_args": {"batch_size": batch_size, **options}}
    config = {"model": {"class_path": path(FlowTask)}, "data": data, "trainer": {}}
    trainer = SimpleNamespace(datamodule=SimpleNamespace(batch_size=batch_size), world_size=2, accumulate_grad_batches=accumulate)
    return run_identity.identity(config, trainer)["data"]  # type: ignore[no-any-return]


def test_what_a_class_and_its_bases_declare_is_left_out() -> None:
    free = {"artifact": "a", "metrics_file": "m", "weights": "raw", "temperature": 0.9, "guidance": {"class_path": "x"}, "codec": "there"}
    kept = {"seed": 3, "label_dropout": 0.1}
    assert identity_of(FlowTask, **free, **kept) == kept
    assert identity_of(OtherTask, **free, **kept, picture_every=5, teachers=["a", "b"]) == kept
    assert identity_of(FlowTask, **kept, picture_every=5) == {**kept, "picture_every": 5}  # another class's declaration is not its


def test_a_place_is_left_out_and_a_specification_in_its_stead_is_not() -> None:
    spec = {"class_path": path(Head), "init_args": {"width": 4, "chunk": 2}}
    assert identity_of(OtherTask, teachers=spec) == {"teachers": {"class_path": path(Head), "init_args": {"width": 4}}}
    assert identity_of(OtherTask, teachers=None) == {}


def test_parts_declare_their_own_wherever_they_stand() -> None:
    heads = [{"class_path": path(Head), "init_args": {"width": w, "chunk": w}} for w in (1, 2)]
    kept = [{"class_path": path(Head), "init_args": {"width": w}} for w in (1, 2)]
    assert identity_of(OtherTask, heads=heads) == {"heads": kept}
    assert identity_of(OtherTask, heads={"first": heads[0]}) == {"heads": {"first": kept[0]}}
    for role in ("optimization", "discriminator"):
        settings = {"learning_rate": 0.1, "max_bad_steps": 3, "dump_bad_steps": 2}
        task = "srcflow.tasks.autoencoder.AutoencoderTask"
        assert identity_of(run_identity.imported(task) or object, **{role: settings}) == {role: {"learning_rate": 0.1}}


def test_data_count_by_the_global_batch_and_not_by_their_place() -> None:
    a = data_identity(OtherData, 8, 1, train="here", val=None, cache="there", size=32, shuffle=False, num_workers=3)
    b = data_identity(OtherData, 4, 2, train="elsewhere", val="this", cache=None, size=32, shuffle=False, num_workers=0)
    assert a == b == {"class_path": path(OtherData), "init_args": {"size": 32, "shuffle": False}, "global_batch": 16}
    assert data_identity(OtherData, 8, 2, size=32)["global_batch"] == 32


def test_what_null_stands_for_is_no_difference_and_another_optimizer_is() -> None:
    old = identity_of(FlowTask, optimization={"betas": [0.9, 0.95], "min_learning_rate": 1e-6, "learning_rate": 0.1})
    new = identity_of(
        FlowTask, optimization={"betas": None, "min_learning_rate": None, "learning_rate": 0.1, "optimizer": None, "schedule": None}
    )
    assert run_identity.differences(old, new) == {}
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
    wsd = {"class_path": "srcflow.learning_rates.WSD", "init_args": {"decay_share": 0.2}}
    other = identity_of(FlowTask, optimization={"learning_rate": 0.1, "betas": None, "optimizer": sgd, "schedule": wsd})
    assert run_identity.differences(new, other, one_sided=False) == {
        "optimization.optimizer": (None, sgd),
        "optimization.schedule": (None, wsd),
    }


def test_a_record_of_before_is_the_same_run(tmp_path: Path) -> None:
    """Revision 4b9018b's own record, against today's identity of its configuration; and what it lists as free by name stays free."""
    record = json.loads((ROOT / "tests/reference/revision_4b9018b/flow/run.json").read_text())
    trainer = SimpleNamespace(datamodule=SimpleNamespace(batch_size=record["identity"]["data"]["global_batch"]), world_size=1)
    trainer.accumulate_grad_batches = 1
    wanted = run_identity.identity(record["config"], trainer)
    stored = run_identity.essential(record["identity"])
    run_identity.complete(stored, wanted)
    found = run_identity.differences(stored, wanted)
    assert {k for k in found if not k.startswith(run_identity.LATER)} == set()
    assert wanted["model"]["init_args"]["optimization"]["betas"] == [0.9, 0.95]
    assert not {"codec", "evaluation", "artifact"} & wanted["model"]["init_args"].keys()


def test_an_older_record_may_hold_what_is_free_by_now() -> None:
    options = {"discriminator": {"learning_rate": 0.1, "max_bad_steps": 20}}
    old = {"model": {"class_path": "srcflow.tasks.autoencoder.AutoencoderTask", "init_args": options}, "data": {"init_args": {}}}
    kept = run_identity.essential(old)
    assert kept["model"]["init_args"] == {"discriminator": {"learning_rate": 0.1}}
    assert options["discriminator"]["max_bad_steps"] == 20  # the record itself is left as it was


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_an_option_that_older_records_lack_is_completed_and_said(loss: str) -> None:
    stored: dict[str, Any] = {"model": {"class_path": path(OtherTask), "init_args": {"seed": 0}}}
    wanted = {"model": {"class_path": path(OtherTask), "init_args": {"seed": 0, "loss": loss}}}
    lines = run_identity.complete(stored, wanted)
    assert stored == wanted
    said = "model.init_args.loss = 'l2': this run began before there was a choice, with what is now 'l1'."
    assert lines == ([] if loss == "l1" else [said])


def test_the_description_of_older_data_is_completed_in_silence() -> None:
    stored: dict[str, Any] = {"data": {"class_path": path(OtherData), "init_args": {}, "content": {"transform": {"size": 32}}}}
    wanted = {
        "data": {"class_path": path(OtherData), "init_args": {}, "content": {"transform": {"size": 32, "exif": "transpose", "new": 1}}}
    }
    assert run_identity.complete(stored, wanted) == []
    assert stored["data"]["content"]["transform"] == {"size": 32, "exif": "transpose"}


def test_a_class_that_is_gone_declares_nothing() -> None:
    for name in ("srcflow.tasks.gone.Task", "srcflow.tasks.flow.Gone", "Gone", "srcflow.flows.presets.srcflow"):
        assert run_identity.imported(name) is None
        record = {"model": {"class_path": name, "init_args": {"artifact": "a"}}}
        assert run_identity.essential(record) == record


def test_configurations_of_other_versions_are_compared_in_what_both_know() -> None:
    old = {"model": {"class_path": "A", "guidance": None, "gone": 1, "list": [1, {"a": 2}]}}
    new = {"model": {"class_path": "A", "guidance": {"class_path": "B"}, "added": 0, "list": [1, {"a": 3}]}}
    assert run_identity.differences(old, new, one_sided=False) == {
        "model.guidance": (None, {"class_path": "B"}),
        "model.list.1.a": (2, 3),
    }
    assert set(run_identity.differences(old, new)) == {"model.guidance", "model.list.1.a", "model.gone", "model.added"}


def test_every_name_that_a_class_declares_is_an_option_of_it() -> None:
    """A name that nobody has any more would hide nothing."""
    import inspect

    cli.load_parts()

    def subclasses(base: type) -> list[type]:
        return [base, *(c for s in base.__subclasses__() for c in subclasses(s))]

    classes = [c for base in (Task, DataModule, Optimization) for c in subclasses(base)]
    own = [(c, kind) for c in classes for kind in KINDS if kind in vars(c)]
    assert {c.__name__ for c, _ in own} >= {
        "Task",
        "FlowTask",
        "CompressorTask",
        "DataModule",
        "ImageShards",
        "FeatureStore",
        "Optimization",
    }
    wrong = {f"{c.__name__}.{kind}": left for c, kind in own if (left := set(vars(c)[kind]) - run_identity.options(c))}
    assert not wrong
    assert set(run_identity.TRAINER) <= set(inspect.signature(L.Trainer.__init__).parameters)
