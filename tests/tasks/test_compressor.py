from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from srcflow import artifacts
from srcflow.autoencoders.base import Autoencoder
from srcflow.callbacks.ema import EMA
from srcflow.compressors.base import Compressor
from srcflow.compressors.identity import Identity
from srcflow.compressors.linear import Linear
from srcflow.compressors.pca import PCA
from srcflow.errors import ConfigError, ManifestMismatchError
from srcflow.noise import Constant, Uniform
from srcflow.statistics import Moments, principal_components
from srcflow.tasks.autoencoder import AutoencoderTask
from srcflow.tasks.compressor import CompressorTask
from srcflow.tasks.optimization import Optimization

Make = Callable[..., Any]
fast = Optimization(learning_rate=3e-3, min_learning_rate=1e-4)
pytestmark = pytest.mark.filterwarnings("ignore:code health:UserWarning")  # a few images through an untrained codec


def stage_0(autoencoder: Any, **more: Any) -> AutoencoderTask:
    return AutoencoderTask(autoencoder, **{"noise": Uniform(0.8), "eval_noise": Constant(0.4), **more})


def stage_1(place: str, compressor: Compressor, **more: Any) -> CompressorTask:
    return CompressorTask(place, compressor, **{"noise": Uniform(0.8), "eval_noise": Constant(0.4), **more})


@pytest.fixture
def stage0(autoencoder: Make, pictures: Make, trainer: Make, tmp_path: Path) -> str:
    """An artifact of stage 0, hardly trained."""
    path = str(tmp_path / "stage0")
    trainer(max_steps=4).fit(stage_0(autoencoder(), optimization=fast, artifact=path), datamodule=pictures())
    return path


def clean_features(path: str, data: Any) -> Tensor:
    model = artifacts.load(path, Autoencoder)
    images = torch.cat([b["images"] for b in data.train_dataloader()]).float() / 255
    return model.normalize(model.features(images)[0])


class Losses(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def test_it_starts_from_pca_learns_and_chains(stage0: str, pictures: Make, trainer: Make, tmp_path: Path) -> None:
    moments = Moments(16, covariance=True)
    moments.update(clean_features(stage0, pictures()))
    pca = principal_components(moments, 4)

    class Start(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            torch.testing.assert_close(pl_module.compressor.enc.weight, pca.components.float(), rtol=1e-3, atol=1e-4)

    task = stage_1(stage0, Linear(16, 4), optimization=fast, artifact=str(tmp_path / "stage1"))
    losses, ema = Losses(), EMA(0.9)
    t = trainer(max_steps=40, callbacks=[Start(), losses, ema])
    t.fit(task, datamodule=pictures())
    assert sum(losses.losses[-4:]) < sum(losses.losses[:4])
    # only the compressor is in the checkpoint, the average and the optimizer
    assert {k.split(".")[0] for k in task.state_dict()} == {"compressor"}
    frozen, original = task.outside["autoencoder"], artifacts.load(stage0, Autoencoder)
    assert all(torch.equal(a, b) for a, b in zip(frozen.state_dict().values(), original.state_dict().values(), strict=True))
    assert artifacts.load(tmp_path / "stage1", Compressor).code_dim == 4
    assert artifacts.built_on(tmp_path / "stage1", "autoencoder").resolve() == Path(stage0).resolve()
    assert float(t.callback_metrics["val/codes/std_min"]) > 0
    assert {"val/l1", "val/noisy_l1", "val/codes/kurtosis_max"} <= set(t.callback_metrics)


@pytest.mark.parametrize("kind", [PCA, Identity])
def test_compressors_without_training_are_fitted_and_written(
    kind: type[Compressor], stage0: str, pictures: Make, trainer: Make, tmp_path: Path
) -> None:
    compressor = PCA(16, 4) if kind is PCA else Identity(16)
    task = stage_1(stage0, compressor, artifact=str(tmp_path / "stage1"))
    t = trainer(max_steps=10)
    with pytest.warns(UserWarning, match="returned `None`"):
        t.fit(task, datamodule=pictures())
    loaded = artifacts.load(tmp_path / "stage1", Compressor)
    x = clean_features(stage0, pictures())
    back = loaded(x, (4, 4))[1]
    if kind is PCA:
        moments = Moments(16, covariance=True)
        moments.update(x)
        pca = principal_components(moments, 4)
        assert float((x - back).square().mean()) * 16 == pytest.approx(pca.total - float(pca.variances.sum()), rel=1e-3)
    else:
        assert torch.equal(back, x)


def test_without_image_losses_nothing_is_decoded(stage0: str, autoencoder: Make, feature_batches: Make, trainer: Make) -> None:
    model = autoencoder()
    model.encoder.setup()
    task = stage_1(stage0, Linear(16, 4), pixel_weight=0.0, optimization=fast)

    def refuse(*args: Any) -> Tensor:
        raise AssertionError("an image was decoded")

    task.load_artifact("autoencoder", stage0, Autoencoder).decode = refuse  # type: ignore[assignment, method-assign]
    losses = Losses()
    # batches of features alone are enough then
    trainer(max_steps=20, callbacks=[losses], limit_val_batches=0).fit(task, datamodule=feature_batches(model))
    assert losses.losses[-1] < losses.losses[0]
    with pytest.raises(ConfigError, match="no loss has a weight"):
        stage_1(stage0, Linear(16, 4), pixel_weight=0.0, feature_weight=0.0)


def test_another_autoencoder_is_refused(stage0: str, autoencoder: Make, pictures: Make, trainer: Make, tmp_path: Path) -> None:
    t = trainer(max_steps=2)
    t.fit(stage_1(stage0, Linear(16, 4)), datamodule=pictures())
    t.save_checkpoint(tmp_path / "a.ckpt")
    other = str(tmp_path / "other")
    trainer(max_steps=1).fit(stage_0(autoencoder(fill=3), artifact=other), datamodule=pictures())
    with pytest.raises(ManifestMismatchError, match="autoencoder"):
        trainer().test(stage_1(other, Linear(16, 4)), datamodule=pictures(), ckpt_path=str(tmp_path / "a.ckpt"), verbose=False)
    with pytest.raises(ConfigError, match=r"compressor\.dim"):
        trainer().fit(stage_1(stage0, Linear(8, 4)), datamodule=pictures())


def test_unhealthy_codes_are_warned_of_and_all_is_written(stage0: str, pictures: Make, trainer: Make, tmp_path: Path) -> None:
    t = trainer(max_steps=2)
    t.fit(stage_1(stage0, Linear(16, 4)), datamodule=pictures())
    t.save_checkpoint(tmp_path / "a.ckpt")
    task = stage_1(stage0, Linear(16, 4), noise_share_floor=0.999)
    with pytest.warns(UserWarning, match="floor 0.999"):
        trainer().test(task, datamodule=pictures(), ckpt_path=str(tmp_path / "a.ckpt"), verbose=False)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["protocol"]["built_on"]["autoencoder"] == artifacts.read_manifest(stage0)["hash"]
    assert 0 < written["metrics"]["codes/noise_share_min"] < 0.999
