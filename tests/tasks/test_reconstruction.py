"""What stages 0 and 1 do with images and weights that are not finite, with a part of the test set, and in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from srcflow import artifacts
from srcflow.autoencoders.representation import RepresentationAutoencoder
from srcflow.compressors.linear import Linear
from srcflow.errors import ArtifactError, ConfigError
from srcflow.metrics.features.encoder import EncoderFeatures
from srcflow.metrics.non_finite import NonFiniteImagesWarning
from srcflow.noise import Constant, Uniform
from srcflow.tasks import artifact
from srcflow.tasks.autoencoder import AutoencoderTask
from srcflow.tasks.compressor import CompressorTask
from srcflow.tasks.optimization import Optimization
from srcflow.tasks.reconstruction import ReconstructionTask

Make = Callable[..., Any]
pytestmark = pytest.mark.filterwarnings("ignore:code health. a channel:UserWarning", "ignore:code health. the smallest:UserWarning")


@pytest.fixture
def stage0(autoencoder: Make, pictures: Make, trainer: Make, tmp_path: Path) -> str:
    """An artifact of stage 0, hardly trained."""
    path = str(tmp_path / "stage0")
    trainer(max_steps=3).fit(AutoencoderTask(autoencoder(), noise=None, eval_noise=None, artifact=path), datamodule=pictures())
    return path


@pytest.fixture
def stages(autoencoder: Make, encoder: Make, stage0: str) -> dict[str, Callable[..., ReconstructionTask]]:
    """Stage -> a fresh task of it."""

    def settings(**more: Any) -> dict[str, Any]:
        fast = Optimization(learning_rate=1e-3)
        torch.manual_seed(4)
        judge = EncoderFeatures(encoder(8, 3))
        return {"noise": Uniform(0.8), "eval_noise": Constant(0.4), "extractor": judge, "optimization": fast, **more}

    def zero(**more: Any) -> AutoencoderTask:
        model = autoencoder()
        return AutoencoderTask(model, **settings(**more))

    def one(**more: Any) -> CompressorTask:
        return CompressorTask(stage0, Linear(16, 4), **settings(**more))

    return {"autoencoder": zero, "compressor": one}


def trained(task: ReconstructionTask, trainer: Make, pictures: Make, path: Path, **more: Any) -> str:
    run = trainer(max_steps=2, limit_val_batches=0, **more)
    run.fit(task, datamodule=pictures())
    run.save_checkpoint(path)
    return str(path)


@pytest.mark.parametrize("stage", ["autoencoder", "compressor"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_reconstructions_that_are_not_finite_are_counted_and_in_no_number(
    stages: dict[str, Any], stage: str, bad: float, trainer: Make, pictures: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = trained(stages[stage](), trainer, pictures, tmp_path / "a.ckpt")
    original = RepresentationAutoencoder.decode

    def decode(self: RepresentationAutoencoder, x: Tensor, grid: Any = None) -> Tensor:  # one pixel of the first image of each batch
        images = original(self, x, grid)
        images[0, 0, 5, 5] = bad
        return images

    trainer().test(stages[stage](metrics_file=str(tmp_path / "m.json")), datamodule=pictures(), ckpt_path=checkpoint, verbose=False)
    sound = json.loads((tmp_path / "m.json").read_text())
    assert (sound["metrics"]["reconstructions_non_finite"], sound["metrics"]["noisy_reconstructions_non_finite"]) == (0, 0)
    assert sound["protocol"]["counts"] == {"rfid": {"real": 8, "fake": 8}, "noisy_rfid": {"real": 8, "fake": 8}}

    monkeypatch.setattr(RepresentationAutoencoder, "decode", decode)
    with pytest.warns(NonFiniteImagesWarning, match=r"3 of 8 (noisy )?reconstructions are not finite"):
        trainer().test(stages[stage](metrics_file=str(tmp_path / "m.json")), datamodule=pictures(), ckpt_path=checkpoint, verbose=False)
    written = json.loads((tmp_path / "m.json").read_text())
    found = written["metrics"]
    assert (found["reconstructions_non_finite"], found["noisy_reconstructions_non_finite"]) == (3, 3)
    plain = ("l1", "psnr", "ssim", "rfid")
    assert not {f"{kind}{name}" for kind in ("", "noisy_") for name in (*plain, "rfid_8")} & set(found)
    assert {f"{kind}{name}_5_finite_of_8" for kind in ("", "noisy_") for name in plain} <= set(found)
    assert written["protocol"]["counts"]["rfid"] == {"real": 8, "fake": 5}
    run = trainer()
    with pytest.warns(NonFiniteImagesWarning):  # names stay in validation, for what monitors them
        run.validate(stages[stage](), datamodule=pictures(), ckpt_path=checkpoint, verbose=False)
    values = run.callback_metrics
    assert all(math.isnan(values[f"val/{kind}{name}"]) for kind in ("", "noisy_") for name in ("l1", "psnr", "ssim", "rfid_8"))
    assert float(values["val/reconstructions_non_finite"]) == 3
    assert not [name for name in values if "finite_of" in name]


def test_if_no_reconstruction_is_finite_nothing_is_averaged(
    stages: dict[str, Any], trainer: Make, pictures: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = trained(stages["autoencoder"](), trainer, pictures, tmp_path / "a.ckpt")
    original = RepresentationAutoencoder.decode
    monkeypatch.setattr(RepresentationAutoencoder, "decode", lambda *args: original(*args) * math.nan)
    with pytest.warns(NonFiniteImagesWarning, match=r"8 of 8 (noisy )?reconstructions"):
        trainer().test(
            stages["autoencoder"](metrics_file=str(tmp_path / "m.json")), datamodule=pictures(), ckpt_path=checkpoint, verbose=False
        )
    assert set(json.loads((tmp_path / "m.json").read_text())["metrics"]) == {
        "reconstructions_non_finite", "noisy_reconstructions_non_finite",
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::srcflow.metrics.non_finite.NonFiniteImagesWarning")
def test_codes_that_are_not_finite_have_no_health(
    stages: dict[str, Any], trainer: Make, pictures: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = trained(stages["compressor"](), trainer, pictures, tmp_path / "a.ckpt")
    original = Linear.compress

    def compress(self: Linear, x: Tensor, grid: Any) -> Tensor:
        codes = original(self, x, grid)
        codes[0, 0, 0] = math.inf
        return codes

    monkeypatch.setattr(Linear, "compress", compress)
    with pytest.warns(UserWarning, match="code health: the codes of 3 of 8 images are not finite"):
        trainer().test(
            stages["compressor"](metrics_file=str(tmp_path / "m.json")), datamodule=pictures(), ckpt_path=checkpoint, verbose=False
        )
    found = json.loads((tmp_path / "m.json").read_text())["metrics"]
    assert {k: v for k, v in found.items() if k.startswith("codes/")} == {"codes/non_finite": 3}


@pytest.mark.parametrize("stage", ["autoencoder", "compressor"])
@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ({"limit_test_batches": 1}, "trainer.limit_test_batches = 1: "),
        ({"limit_test_batches": 0.5}, r"trainer.limit_test_batches = 0\.5: "),
        ({"fast_dev_run": True}, "trainer.fast_dev_run = True: "),
    ],
)
def test_a_part_of_the_test_set_is_not_tested(
    stages: dict[str, Any], stage: str, limit: dict[str, Any], words: str, trainer: Make, pictures: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ReconstructionTask, "evaluate", lambda *a: pytest.fail("work was done before the refusal"))
    with pytest.raises(ConfigError, match=words + "a test of some batches .*smaller test set"):
        trainer(**limit).test(stages[stage](), datamodule=pictures(), verbose=False)


@pytest.mark.parametrize("stage", ["autoencoder", "compressor"])
def test_weights_that_are_not_finite_are_neither_tested_nor_written(
    stages: dict[str, Any], stage: str, trainer: Make, pictures: Make, tmp_path: Path
) -> None:
    class Poison(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
            with torch.no_grad():
                next(p for p in pl_module.parameters() if p.requires_grad).view(-1)[0] = math.nan

    task = stages[stage](artifact=str(tmp_path / "written"))
    with pytest.raises(ArtifactError, match=r"written of \w+ is not written: the weights are not finite: NaN .*\(1 of \d+ tensors"):
        trained(task, trainer, pictures, tmp_path / "a.ckpt", callbacks=[Poison()])
    assert not (tmp_path / "written").exists()
    checkpoint = trained(stages[stage](), trainer, pictures, tmp_path / "b.ckpt", callbacks=[Poison()])
    with pytest.raises(ArtifactError, match=r"ckpt_path = '.*b.ckpt': the weights are not finite: NaN or infinity in (auto|comp)"):
        trainer().test(stages[stage](), datamodule=pictures(), ckpt_path=checkpoint, verbose=False)
    with pytest.raises(ArtifactError, match=r"exported .* is not written: the weights are not finite.*earlier checkpoint"):
        artifact.export(stages[stage](), checkpoint, str(tmp_path / "exported"))
    assert not (tmp_path / "exported").exists()


def test_a_codec_that_is_not_finite_is_not_built_on(stage0: str, trainer: Make, pictures: Make) -> None:
    module = artifacts.load(stage0, RepresentationAutoencoder)
    with torch.no_grad():
        module.decoder.head.bias[0] = math.inf
    artifacts.save(stage0, module)
    with pytest.raises(ArtifactError, match=r"stage0: the weights are not finite: NaN or infinity in decoder.head.bias"):
        trainer(max_steps=1).fit(CompressorTask(stage0, Linear(16, 4), noise=None, eval_noise=None), datamodule=pictures())


@pytest.mark.parametrize("stage", ["autoencoder", "compressor"])
def test_float64_trains_and_tests(stages: dict[str, Any], stage: str, trainer: Make, pictures: Make, tmp_path: Path) -> None:
    """The frozen parts stay in float32."""
    numbers = []
    for precision in ("32-true", "64-true"):
        checkpoint = trained(stages[stage](), trainer, pictures, tmp_path / "a.ckpt", precision=precision)
        task = stages[stage](metrics_file=str(tmp_path / "m.json"))
        trainer(precision=precision).test(task, datamodule=pictures(), ckpt_path=checkpoint, verbose=False)
        assert next(task.parameters()).dtype == (torch.float64 if precision == "64-true" else torch.float32)
        numbers.append(json.loads((tmp_path / "m.json").read_text())["metrics"])
    assert numbers[0] == pytest.approx(numbers[1], rel=2e-2, abs=1e-3)
