"""Stages 0 and 1 through a Trainer, against formulae written out here: losses, statistics, keyed noise, and what evaluation reports."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from srcflow import artifacts
from srcflow.autoencoders.base import Autoencoder
from srcflow.compressors.linear import Linear
from srcflow.losses.perceptual import Perceptual
from srcflow.noise import Constant, Uniform
from srcflow.tasks.autoencoder import AutoencoderTask
from srcflow.tasks.compressor import CompressorTask
from srcflow.tasks.optimization import Optimization

from . import by_hand

Make = Callable[..., Any]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SLOW = Optimization(learning_rate=1e-3)
pytestmark = pytest.mark.filterwarnings("ignore:code health:UserWarning")  # a few images through an untrained codec


class Edges(Perceptual):
    """Squared differences of horizontal gradients."""

    def distance(self, pred: Tensor, target: Tensor) -> Tensor:
        return (pred.diff(dim=-1) - target.diff(dim=-1)).square().flatten(1).mean(1)


def uniform_noise(purpose: str, step: int, indices: Tensor, shape: tuple[int, int], maximum: float) -> Tensor:
    """Noise of a level that is drawn per sample under a key of its own."""
    levels = [float(by_hand.generator(5, f"{purpose}.level", step, int(i)).random((), dtype=np.float32)) * maximum for i in indices]
    return by_hand.noise(5, purpose, step, indices, shape, sigma=1.0) * torch.tensor(levels)[:, None, None]


def recorded(kind: type[Any], part: str) -> type[Any]:
    """The task, which keeps every step: the trained part as it was, the batch, the optimizer step, the loss and what was logged."""

    class Recording(kind):  # type: ignore[misc]
        def on_train_start(self) -> None:
            self.steps: list[tuple[Any, Any, int, Tensor]] = []
            self.logged: list[dict[str, float]] = []
            super().on_train_start()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            before = copy.deepcopy(getattr(self, part))
            loss: Tensor = super().training_step(batch, batch_idx)
            self.steps.append((before, batch, self.global_step, loss.detach()))
            return loss

        def on_train_batch_end(self, *args: Any) -> None:
            self.logged.append({k: float(v) for k, v in self.trainer.callback_metrics.items()})

    Recording.__name__ = Recording.__qualname__ = kind.__name__
    return Recording


def normalised(model: Any, raw: Tensor, eps: float | Tensor = 0.0) -> Tensor:
    """RAE's latent normalisation of raw features under noise."""
    return (raw + eps - model.mean) / torch.sqrt(model.var + 1e-5)


def pixels_of(batch: Any) -> Tensor:
    return batch["images"].float() / 255


def test_the_decoders_loss_is_that_of_clean_images_from_noisy_features(
    autoencoder: Make, pictures: Make, trainer: Make, tmp_path: Path
) -> None:
    weights = {"pixel_weight": 0.7, "perceptual": Edges(), "perceptual_weight": 3.0, "perceptual_from": 2}
    task = recorded(AutoencoderTask, "autoencoder")(
        autoencoder(), noise=Uniform(0.8), eval_noise=None, seed=5, optimization=SLOW, **weights
    )
    trainer(max_steps=4).fit(task, datamodule=pictures())
    assert len(task.steps) == 4
    for (model, batch, step, loss), logged in zip(task.steps, task.logged, strict=True):
        images = pixels_of(batch)
        with torch.no_grad():
            raw, grid = model.encoder(images)
            x = normalised(model, raw, uniform_noise("train", step, batch["indices"], (16, 16), 0.8))
            pred = model.decode(x, grid)
            l1 = (pred - images).abs().mean()
            expected = 0.7 * l1
            if step >= 2:
                edges = ((pred.diff(dim=-1) - images.diff(dim=-1)) ** 2).mean()
                expected = expected + 3.0 * edges
                assert logged["train/perceptual"] == pytest.approx(float(edges), rel=1e-4)
        torch.testing.assert_close(loss, expected, **CLOSE)
        assert logged["train/l1"] == pytest.approx(float(l1), rel=1e-4)
        assert logged["train/loss"] == pytest.approx(float(expected), rel=1e-4)
        assert ("train/perceptual" in logged) == (step >= 2)


def test_the_squared_pixel_loss(autoencoder: Make, pictures: Make, trainer: Make) -> None:
    arguments = {"pixel_kind": "l2", "pixel_weight": 2.0, "seed": 5, "optimization": SLOW}
    task = recorded(AutoencoderTask, "autoencoder")(autoencoder(), noise=None, eval_noise=None, **arguments)
    trainer(max_steps=1).fit(task, datamodule=pictures())
    model, batch, _, loss = task.steps[0]
    with torch.no_grad():
        raw, grid = model.encoder(pixels_of(batch))
        expected = 2 * ((model.decode(normalised(model, raw), grid) - pixels_of(batch)) ** 2).mean()
    torch.testing.assert_close(loss, expected, **CLOSE)


def test_latent_statistics_are_the_moments_of_clean_features(autoencoder: Make, pictures: Make, trainer: Make) -> None:
    task = AutoencoderTask(autoencoder(), noise=Uniform(0.8), eval_noise=None, seed=5, optimization=SLOW)
    trainer(max_steps=1).fit(task, datamodule=pictures())
    encoder = task.autoencoder.encoder
    with torch.no_grad():
        raw = torch.cat([encoder(pixels_of(b))[0] for b in pictures().train_dataloader()]).double()
    torch.testing.assert_close(task.autoencoder.mean.double(), raw.mean(0), **CLOSE)
    torch.testing.assert_close(task.autoencoder.var.double(), ((raw - raw.mean(0)) ** 2).mean(0), **CLOSE)


def test_evaluation_of_the_autoencoder_counts_every_image_once_with_and_without_noise(
    autoencoder: Make, pictures: Make, trainer: Make
) -> None:
    """The last image of the set is padding."""
    task = AutoencoderTask(autoencoder(), noise=None, eval_noise=Constant(0.4), seed=5, optimization=SLOW)
    t = trainer(max_steps=1)
    t.fit(task, datamodule=pictures())
    found = t.validate(task, datamodule=pictures(), verbose=False)[0]
    batches = list(pictures().val_dataloader())
    images = torch.cat([pixels_of(b)[b["valid"]] for b in batches])
    indices = torch.cat([b["indices"][b["valid"]] for b in batches])
    assert len(images) == 8
    model = task.autoencoder
    with torch.no_grad():
        raw, grid = model.encoder(images)
        for kind, eps in (("", 0.0), ("noisy_", by_hand.noise(5, "evaluation", 0, indices, (16, 16), sigma=0.4))):
            pred = model.decode(normalised(model, raw, eps), grid).clamp(0, 1)
            error = ((pred - images) ** 2).flatten(1).mean(1)
            assert found[f"val/{kind}l1"] == pytest.approx(float((pred - images).abs().mean()), rel=1e-4)
            assert found[f"val/{kind}psnr"] == pytest.approx(float((-10 * torch.log10(error)).mean()), rel=1e-4)


@pytest.mark.parametrize("images", [True, False])
def test_the_compressors_loss_asks_for_clean_features_and_images(
    images: bool, autoencoder: Make, pictures: Make, trainer: Make, tmp_path: Path
) -> None:
    place = str(tmp_path / "stage0")
    trainer(max_steps=2).fit(
        AutoencoderTask(autoencoder(), noise=None, eval_noise=None, optimization=SLOW, artifact=place), datamodule=pictures()
    )
    torch.manual_seed(4)
    weights = {"pixel_weight": 0.6 if images else 0.0, "feature_weight": 0.25}
    task = recorded(CompressorTask, "compressor")(
        place, Linear(16, 4, start="random"), noise=Uniform(0.8), eval_noise=Constant(0.4), seed=5, optimization=SLOW, **weights
    )
    trainer(max_steps=3, limit_val_batches=0).fit(task, datamodule=pictures())
    model: Any = artifacts.load(place, Autoencoder)
    for (compressor, batch, step, loss), logged in zip(task.steps, task.logged, strict=True):
        with torch.no_grad():
            raw, grid = model.encoder(pixels_of(batch))
            noisy = normalised(model, raw, uniform_noise("train", step, batch["indices"], (16, 16), 0.8))
            codes = noisy @ compressor.enc.weight.T + compressor.enc.bias
            features, clean = codes @ compressor.dec.weight.T + compressor.dec.bias, normalised(model, raw)
            cosine = (features * clean).sum(-1) / (features.norm(dim=-1) * clean.norm(dim=-1))
            term = ((features - clean) ** 2).mean() + (1 - cosine).mean()
            expected = 0.25 * term
            if images:
                expected = expected + 0.6 * (model.decode(features, grid) - pixels_of(batch)).abs().mean()
        torch.testing.assert_close(loss, expected, **CLOSE)
        assert logged["train/feature"] == pytest.approx(float(term), rel=1e-4)
        assert ("train/l1" in logged) == images
