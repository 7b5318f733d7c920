"""A checkpoint of something else is refused in one line that says what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.callbacks.ema import EMA
from srcflow.cli import main
from srcflow.cli.run_directory import RunTrainer
from srcflow.errors import ArtifactError, CheckpointError, ConfigError, ForeignCheckpointError
from srcflow.flows import presets
from srcflow.tasks import artifact, checkpoint
from srcflow.tasks.flow import FlowTask

from . import test_flow as parts
from .test_autoencoder import stage_0

ROOT = Path(__file__).parents[2]
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(artifacts.save(tmp_path_factory.mktemp("stage") / "codec", PixelPatches(12, 6)))


@pytest.fixture(scope="module")
def whole(codec: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a flow after three steps, with a weights-only one beside it."""
    folder = tmp_path_factory.mktemp("run")
    run = parts.trainer(folder, steps=3, callbacks=[EMA(0.9)], limit_val_batches=0)
    run.fit(parts.make(codec), parts.SquaresData())
    run.save_checkpoint(folder / "step-3.ckpt")
    run.save_checkpoint(folder / "light.ckpt", weights_only=True)
    return folder / "step-3.ckpt"


def wider(codec: str) -> FlowTask:
    return parts.make(codec, flow=presets.srcflow((2, 2), 108, 96, [1, 2], num_classes=3, head_dim=32))


def trainer(folder: Path, **more: Any) -> RunTrainer:
    settings = {"logger": False, "enable_checkpointing": False, "callbacks": [EMA(0.9)], "enable_progress_bar": False, **more}
    return RunTrainer(accelerator="cpu", max_steps=4, default_root_dir=folder, enable_model_summary=False, **settings)


class Untouched(parts.SquaresData):
    """Data that must not be asked for."""

    def setup(self, stage: str) -> None:
        raise AssertionError("the data were opened before the checkpoint was looked at")


def refused(command: str, task: Any, path: Path, folder: Path, match: str) -> str:
    with pytest.raises(CheckpointError, match=match) as e:
        getattr(trainer(folder), command)(task, datamodule=Untouched(), ckpt_path=str(path))
    assert str(path) in str(e.value)
    assert len(str(e.value).replace(str(path), "")) < 600
    return str(e.value)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_another_width_names_the_first_shape_before_data_are_opened(tmp_path: Path, codec: str, whole: Path, command: str) -> None:
    said = refused(
        command, wider(codec), whole, tmp_path, r"holds a FlowTask of other settings; flow\.\S+ has shape \(.*64.*\) there, \(.*96"
    )
    assert "the first of" in said
    assert "config.yaml beside" in said


def test_another_stage_is_named(tmp_path: Path, codec: str, whole: Path, autoencoder: Make, pictures: Make) -> None:
    for command in ("fit", "test"):
        said = refused(command, stage_0(autoencoder()), whole, tmp_path, r"not a checkpoint of AutoencoderTask.*holds one of FlowTask")
        assert "start with the configuration of the flow stage" in said
    with pytest.raises(ForeignCheckpointError, match=r"holds one of FlowTask \(the flow stage\)"):
        artifact.export(stage_0(autoencoder()), str(whole), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_one_missing_tensor_is_enough(tmp_path: Path, codec: str, whole: Path) -> None:
    content = torch.load(whole, weights_only=True)
    key = next(reversed(content["state_dict"]))
    del content["state_dict"][key]
    torch.save(content, tmp_path / "less.ckpt")
    said = refused("test", parts.make(codec), tmp_path / "less.ckpt", tmp_path, f"missing {key}")
    assert "the first of" not in said


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "holds a list"),
        ({}, r"holds no state_dict, only something \(nothing\)"),
        ({"weight": torch.zeros(2), "bias": torch.zeros(2)}, r"holds bare weights \(weight, bias\).*srcflow convert"),
        ({"optimizer_states": [], "global_step": 3}, r"only something of an optimizer \(optimizer_states, global_step\)"),
        ({"state": {}, "param_groups": []}, "only something of an optimizer"),
        ({"state_dict": {}}, "holds no weights"),
        ({"state_dict": {"a": "text"}}, "holds no weights"),
        ({"state_dict": {"a": torch.zeros(1)}, "epoch": 1}, "holds weights, but not what goes with them"),
        ({"state_dict": {"a": torch.zeros(1)}, "pytorch-lightning_version": "2.6.6"}, "one of another model; missing"),
        ({"state_dict": {"a": torch.zeros(1)}, "srcflow": {"task": 5}}, "holds one of 5"),
    ],
)
def test_files_of_torch_that_are_something_else(tmp_path: Path, codec: str, content: Any, match: str) -> None:
    torch.save(content, tmp_path / "a.ckpt")
    for command in ("fit", "predict"):
        refused(command, parts.make(codec), tmp_path / "a.ckpt", tmp_path, match)
    with pytest.raises(ForeignCheckpointError, match=match):
        artifact.export(parts.make(codec), str(tmp_path / "a.ckpt"), str(tmp_path / "out"))


def test_files_that_are_no_checkpoint_at_all(tmp_path: Path, codec: str, whole: Path) -> None:
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "text.ckpt").write_text("seed_everything: 0")
    (tmp_path / "folder.ckpt").mkdir()
    torch.save({"state_dict": torch.nn.Linear(1, 1)}, tmp_path / "code.ckpt")
    (tmp_path / "a.safetensors").touch()
    cases = {
        "none.ckpt": "does not exist",
        "empty.ckpt": "is not a whole checkpoint: it is empty",
        "text.ckpt": "is not a whole checkpoint: it was cut off, or it is something else",
        "folder.ckpt": "it is a directory without the files of one",
        "code.ckpt": "cannot be read",
        "a.safetensors": "holds weights alone.*srcflow export",
        "n" * 300: "cannot be read",
    }
    for name, match in cases.items():
        refused("test", parts.make(codec), tmp_path / name, tmp_path, match)


def test_weights_without_an_optimizer_are_evaluated_but_not_trained_on(tmp_path: Path, codec: str, whole: Path) -> None:
    light = whole.with_name("light.ckpt")
    refused("fit", parts.make(codec), light, tmp_path, r"without the state of the optimizer.*model\.initial")
    checkpoint.check(parts.make(codec), light, fitting=False)
    assert trainer(tmp_path).predict(parts.make(codec), datamodule=parts.SquaresData(), ckpt_path=str(light))


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_a_sound_one_is_taken_by_all_commands_and_by_any_trainer(tmp_path: Path, codec: str, whole: Path) -> None:
    run = trainer(tmp_path, limit_val_batches=1)
    run.fit(parts.make(codec), datamodule=parts.SquaresData(), ckpt_path=str(whole))
    assert run.global_step == 4
    assert trainer(tmp_path, limit_val_batches=1).validate(parts.make(codec), datamodule=parts.SquaresData(), ckpt_path=str(whole))
    other = parts.trainer(tmp_path)
    with pytest.raises(ForeignCheckpointError, match="FlowTask of other settings"):  # also where no command looked at it before
        other.validate(wider(codec), parts.SquaresData(), ckpt_path=str(whole), weights_only=True)


def test_shards_are_looked_at_too(tmp_path: Path, codec: str, whole: Path) -> None:
    from torch.distributed import checkpoint as shards

    content = torch.load(whole, weights_only=True)
    place = tmp_path / "step-3.ckpt"
    with pytest.warns(UserWarning, match="torch.distributed is"):
        shards.save({"state_dict": content.pop("state_dict"), "optimizer_0": {"a": torch.zeros(1)}}, checkpoint_id=place, no_dist=True)
    content.pop("optimizer_states")
    torch.save(content, place / "meta.pt")
    checkpoint.check(parts.make(codec), place, fitting=True)
    with pytest.raises(ForeignCheckpointError, match=r"has shape \(.*64.*\) there, \(.*96.*\) here"):
        checkpoint.check(wider(codec), place, fitting=False)
    with pytest.raises(CheckpointError, match=r"step-3\.ckpt"):
        artifact.export(parts.make(codec), str(place), str(tmp_path / "out"))


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_best_is_no_checkpoint_of_a_new_start(command: str) -> None:
    with pytest.raises(ConfigError, match=r"ckpt_path = 'best': a start knows no best.*write last"):
        main(["--debug", command, "--config", str(ROOT / "configs/smoke/flow.yaml"), "--ckpt_path", "best"])


def test_export_tries_its_target_before_it_reads(tmp_path: Path, codec: str, whole: Path) -> None:
    (tmp_path / "notes").write_text("x")
    with pytest.raises(ConfigError, match=r"out = .*cannot be written"):
        artifact.export(parts.make(codec), str(tmp_path / "none.ckpt"), str(tmp_path / "notes" / "model"))
    with pytest.raises(ArtifactError, match="is not an artifact"):
        artifact.export(parts.make(codec), str(whole), str(whole.parent))
    assert artifacts.read_manifest(artifact.export(parts.make(codec), str(whole), str(tmp_path / "new")))["steps"] == 3


def test_fit_tries_the_artifacts_place_at_its_start(tmp_path: Path, codec: str) -> None:
    (tmp_path / "notes").write_text("x")
    with pytest.raises(ConfigError, match=r"model\.artifact = .*cannot be written"):
        trainer(tmp_path).fit(parts.make(codec, artifact=str(tmp_path / "notes" / "model")), datamodule=parts.SquaresData())


def test_fit_says_at_its_start_that_commands_will_not_import_a_part(
    tmp_path: Path, autoencoder: Make, pictures: Make, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    task = stage_0(autoencoder(), artifact=str(tmp_path / "model"))
    run = trainer(tmp_path, callbacks=[], fast_dev_run=True)
    with caplog.at_level("INFO"):
        run.fit(task, datamodule=pictures())
    assert "PatchEncoder, which is of no distribution that registers parts" in capfd.readouterr().err + caplog.text
