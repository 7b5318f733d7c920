"""`validate`, `predict` and `test` of a flow against formulae written out in `by_hand.py`, in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.callbacks.ema import EMA
from srcflow.flows import presets
from srcflow.flows.flow import Flow
from srcflow.metrics.features.base import Extractor
from srcflow.noise import Constant, Uniform
from srcflow.tasks.flow import FlowTask
from srcflow.tasks.flow_evaluation import Evaluation
from srcflow.tasks.optimization import Optimization
from srcflow.testing import perturb
from srcflow.types import Codes, Condition

from . import by_hand
from .by_hand import CHANNELS, CLASSES, DIMS, SIGMA, TOKENS, Rows

EXACT = {"atol": 1e-10, "rtol": 1e-10}


@pytest.fixture
def codec(tmp_path: Path) -> str:
    return str(artifacts.save(tmp_path / "codec", by_hand.pixels()))


def fitted(**kwargs: Any) -> Flow:
    """A flow whose normalisation is one."""
    flow = by_hand.tiny_flow(**kwargs)
    flow.normalization.fit(torch.tensor([0.5, -0.2, 0.1, 1.0]).double(), torch.diag(torch.tensor([0.4, 1.0, 4.0, 8.0]).double()))
    return flow


def task_of(codec: str, flow: Flow, **kwargs: Any) -> FlowTask:
    settings: dict[str, Any] = {"noise": Constant(SIGMA), "optimization": Optimization(learning_rate=1e-2), "seed": 5, **kwargs}
    return FlowTask(flow, codec, **settings)


def rows_of(loader: Any) -> dict[str, Any]:
    """All samples of a loader that are not padding, as one batch."""
    batches = list(loader)
    return {k: torch.cat([b[k][b["valid"]] for b in batches]) for k in ("features", "labels", "indices")}


@torch.no_grad()
def expected_validation(flow: Flow, batch: Any) -> dict[str, float]:
    w = by_hand.way(flow, by_hand.noisy(batch, 5, "validation", 0), batch["labels"])
    prior = -by_hand.prior_log_prob(w.zs[-1], flow.prior_std if flow.learn_prior else None).mean() / DIMS
    logdet = w.logdet.mean() / DIMS
    return {"val/nll": float(prior - logdet), "val/prior": float(prior), "val/logdet": float(logdet)}


# --- validation -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_prior", [False, True])
def test_validation_is_the_mean_over_images_that_count_under_its_own_noise(tmp_path: Path, codec: str, learn_prior: bool) -> None:
    flow, data = fitted(learn_prior=learn_prior), Rows()
    t = by_hand.trainer(tmp_path)
    for _ in range(2):  # the same noise both times
        got = t.validate(task_of(codec, flow, label_dropout=1.0), data, verbose=False)[0]
        for name, value in expected_validation(flow, rows_of(data.val_dataloader())).items():
            assert got[name] == pytest.approx(value, rel=1e-6), name


def test_what_is_logged_of_the_blocks_is_of_the_first_batch(tmp_path: Path, codec: str) -> None:
    flow, data = fitted(), Rows()
    got = by_hand.trainer(tmp_path).validate(task_of(codec, flow), data, verbose=False)[0]
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        w = by_hand.way(flow, by_hand.noisy(batch, 5, "validation", 0), batch["labels"])
    for k, z in enumerate(w.zs):
        assert got[f"val/z_mean_{k}"] == pytest.approx(float(z.mean()), rel=1e-6)
        assert got[f"val/z_var_{k}"] == pytest.approx(float(((z - z.mean()) ** 2).sum() / (z.numel() - 1)), rel=1e-6)
    scales = torch.stack(w.log_scales)
    assert got["val/log_scale_min"] == pytest.approx(float(scales.min()), rel=1e-6)
    assert got["val/log_scale_max"] == pytest.approx(float(scales.max()), rel=1e-6)


class Noises(FlowTask):
    """Keeps the noise that is added to the features, by where it is asked for, and the validations' numbers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.where = ""
        self.noises: list[tuple[str, int, Tensor]] = []
        self.numbers: list[float] = []

    def codes(self, batch: Any, *args: Any, **kwargs: Any) -> Codes:
        codes = super().codes(batch, *args, **kwargs)
        self.noises += [(self.where, int(i), e) for i, e in zip(batch["indices"], codes.x - batch["features"], strict=True)]
        return codes

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.where = f"train {self.global_step}"
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.where = f"validation {len(self.numbers)}"
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.numbers.append(float(self.trainer.callback_metrics["val/nll"]))

    def of(self, where: str) -> dict[int, Tensor]:
        return {i: e for w, i, e in self.noises if w == where}


def test_validation_has_noise_of_its_own_the_same_every_time_and_training_other_noise_at_every_step(tmp_path: Path, codec: str) -> None:
    """The validation set holds the training samples' indices, so that only purpose and step tell the numbers apart."""
    task = Noises(fitted(), codec, noise=Constant(SIGMA), seed=5)
    data = Rows(train=8, batch_size=8, held_out=8)
    by_hand.trainer(tmp_path, max_steps=4, val_check_interval=1, check_val_every_n_epoch=1).fit(task, datamodule=data)
    first, last = task.of("validation 0"), task.of("validation 3")
    steps = [task.of(f"train {k}") for k in range(4)]
    assert set(first) == set(last) == set(steps[0])
    for i in first:
        torch.testing.assert_close(first[i], last[i], **EXACT)
        several = [first[i], *(s[i] for s in steps)]
        assert all(float((a - b).abs().max()) > 0.1 for k, a in enumerate(several) for b in several[:k])
    everything = torch.stack([e for _, _, e in task.noises])
    assert float(everything.std()) == pytest.approx(SIGMA, rel=0.1)


def test_validation_during_fit_is_of_the_averaged_weights(tmp_path: Path, codec: str) -> None:
    ema, data, flow = EMA(0.5, warmup=False), Rows(), fitted()
    task = task_of(codec, flow)
    t = by_hand.trainer(tmp_path, callbacks=[ema], max_steps=4)
    t.fit(task, datamodule=data)
    batch = rows_of(data.val_dataloader())
    raw = expected_validation(flow, batch)
    with ema.averaged(task):
        averaged = expected_validation(flow, batch)
    assert abs(raw["val/nll"] - averaged["val/nll"]) > 1e-4
    for name, value in averaged.items():
        assert float(t.callback_metrics[name]) == pytest.approx(value, rel=1e-6), name


# --- prediction and classes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_prior", [False, True])
def test_predictions_are_nats_per_dimension_and_the_classes_log_probabilities(tmp_path: Path, codec: str, learn_prior: bool) -> None:
    flow, data = fitted(learn_prior=learn_prior), Rows()
    out: Any = by_hand.trainer(tmp_path).predict(task_of(codec, flow, label_dropout=1.0), data)
    loader = list(data.predict_dataloader())
    assert len(out) == len(loader)
    for got, batch in zip(out, loader, strict=True):
        assert torch.equal(got["indices"], batch["indices"])
        assert torch.equal(got["valid"], batch["valid"])
        x = by_hand.noisy(batch, 5, "predict", 0)
        with torch.no_grad():
            torch.testing.assert_close(got["nll"], -by_hand.log_prob(flow, x, batch["labels"]) / DIMS, **EXACT)
            joint = by_hand.per_class(flow, x)
        shares = torch.exp(joint - joint.amax(1, keepdim=True))
        torch.testing.assert_close(got["log_probs"], torch.log(shares / shares.sum(1, keepdim=True)), **EXACT)
        assert got["nll"].shape == (len(x),)
        assert got["log_probs"].shape == (len(x), CLASSES)


@pytest.mark.parametrize("learn_prior", [False, True])
def test_densities_per_class_stand_under_the_flows_own_prior(learn_prior: bool) -> None:
    flow = fitted(learn_prior=learn_prior)
    x = torch.randn(5, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        expected = by_hand.per_class(flow, x)
        torch.testing.assert_close(flow.class_log_probs(x), expected, **EXACT)
        told = torch.tensor([0, 2, -1, 1, 1])
        torch.testing.assert_close(flow.log_prob(x, Condition(labels=told)), by_hand.log_prob(flow, x, told), **EXACT)
    assert float((expected[:, 0] - expected[:, 1]).abs().min()) > 1e-3  # the classes differ
    if learn_prior:
        plain = by_hand.way(flow, x, torch.zeros(5).long())
        standard = by_hand.prior_log_prob(plain.zs[-1]) + plain.logdet
        assert float((expected[:, 0] - standard).abs().min().detach()) > 1e-2


def test_samples_are_drawn_from_the_learned_prior(tmp_path: Path, codec: str) -> None:
    """z = temperature x deviation x normal numbers of (seed, sample, 0, index); found again by running the sampled codes forward."""
    flow = fitted(learn_prior=True)
    task = task_of(codec, flow)
    by_hand.trainer(tmp_path).validate(task, Rows(), verbose=False)
    labels = torch.tensor([0, 2, -1])
    x = task.pipeline.sample_codes(Condition(labels=labels), seed=11, indices=[4, 9, 2], temperature=0.8)
    z = by_hand.noise(11, "sample", 0, torch.tensor([4, 9, 2]), sigma=1.0).double() * flow.prior_std * 0.8
    with torch.no_grad():
        torch.testing.assert_close(by_hand.way(flow, x, labels).zs[-1], z, atol=1e-8, rtol=1e-8)


# --- test -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_prior", [False, True])
def test_the_likelihoods_of_a_test_are_means_over_images_and_draws(tmp_path: Path, codec: str, learn_prior: bool) -> None:
    flow, data, draws = fitted(learn_prior=learn_prior), Rows(held_out=11), 3
    evaluation = Evaluation(draws=draws, samples=0, classified=11, round_trip=2, baseline_batches=2)
    task = task_of(codec, flow, evaluation=evaluation, label_dropout=1.0, metrics_file=str(tmp_path / "m.json"))
    by_hand.trainer(tmp_path).test(task, data, verbose=False)
    found = json.loads((tmp_path / "m.json").read_text())["metrics"]
    batch = rows_of(data.test_dataloader())
    train = list(data.train_dataloader())[:2]
    fit = torch.cat([by_hand.noisy(b, 5, "baseline", 0) for b in train]).reshape(-1, CHANNELS)
    gaussian = torch.distributions.MultivariateNormal(fit.mean(0), torch.cov(fit.T, correction=0))
    nll, logdet, marginal, baseline, joint = 0.0, 0.0, 0.0, 0.0, torch.zeros(11, CLASSES, dtype=torch.float64)
    with torch.no_grad():
        for k in range(draws):
            x = by_hand.noisy(batch, 5, "test", k)
            nll -= float(by_hand.log_prob(flow, x, batch["labels"]).mean()) / DIMS / draws
            logdet += float(by_hand.way(flow, x, batch["labels"]).logdet.mean()) / DIMS / draws
            each = by_hand.per_class(flow, x)
            marginal -= float(torch.log(torch.exp(each).mean(1)).mean()) / DIMS / draws
            baseline -= float(gaussian.log_prob(x).sum(1).mean()) / DIMS / draws
            joint += each
    assert found["nll"] == pytest.approx(nll, rel=1e-9)
    assert found["nll_logdet"] == pytest.approx(-logdet, rel=1e-9)
    assert found["nll_prior"] == pytest.approx(nll + logdet, rel=1e-9)
    assert found["nll_marginal"] == pytest.approx(marginal, rel=1e-9)
    assert found["nll_gaussian"] == found["nll_gaussian_classified"] == pytest.approx(baseline, rel=1e-9)
    assert found["accuracy"] == pytest.approx(float((joint.argmax(1) == batch["labels"]).double().mean()), abs=1e-12)
    assert found["round_trip_error"] < 1e-6


def test_the_class_is_decided_by_all_draws(tmp_path: Path, codec: str) -> None:
    """Under so much noise that the draws disagree."""
    flow, data, draws, sigma = fitted(), Rows(held_out=40), 3, 1.5
    evaluation = Evaluation(draws=draws, samples=0, classified=40, round_trip=0, baseline_batches=0)
    task = task_of(codec, flow, evaluation=evaluation, noise=Constant(sigma), metrics_file=str(tmp_path / "m.json"))
    by_hand.trainer(tmp_path).test(task, data, verbose=False)
    batch = rows_of(data.test_dataloader())
    with torch.no_grad():
        noises = [by_hand.noise(5, "test", k, batch["indices"], sigma=sigma).double() for k in range(draws)]
        each = [by_hand.per_class(flow, batch["features"] + e) for e in noises]
    right = [float((d.argmax(1) == batch["labels"]).double().mean()) for d in (sum(each), *each)]
    assert right[0] not in right[1:]
    assert json.loads((tmp_path / "m.json").read_text())["metrics"]["accuracy"] == pytest.approx(right[0], abs=1e-12)


class Colours(Extractor):
    """Mean colours of the four quadrants."""

    name, dim = "colours", 12

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1).float()


class Images(L.LightningDataModule):
    """12 x 12 images of random grey levels around a class's own."""

    num_classes, batch_size = CLASSES, 8

    def loader(self, n: int, seed: int) -> Any:
        g = torch.Generator().manual_seed(seed)
        rows = [
            {
                "images": (torch.rand(3, 12, 12, generator=g) * 90 + 50 * (i % CLASSES)).to(torch.uint8),
                "labels": torch.tensor(i % CLASSES),
                "indices": torch.tensor(i),
                "valid": torch.tensor(True),
            }
            for i in range(n)
        ]
        return torch.utils.data.DataLoader(rows, batch_size=self.batch_size)  # type: ignore[arg-type]

    def train_dataloader(self) -> Any:
        return self.loader(32, 0)

    def test_dataloader(self) -> Any:
        return self.loader(24, 1)


def distance(a: Tensor, b: Tensor) -> float:
    """The Frechet distance by scipy's matrix square root."""
    x, y = a.double().numpy(), b.double().numpy()
    sx, sy = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(sx @ sy).real
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(sx + sy - 2 * root))


def test_the_distances_and_reconstructions_of_a_test_are_the_formulae(tmp_path: Path) -> None:
    """On pixels of the linear scale with noise that is uniform in level: what is reconstructed under noise differs from the image by it."""
    codec = str(artifacts.save(tmp_path / "codec", PixelPatches(12, 6, scale="linear")))
    torch.manual_seed(3)
    flow = perturb(presets.tarflow((2, 2), 108, 16, 2, 1, num_classes=CLASSES, head_dim=8), 0.02).double()
    evaluation = Evaluation(samples=24, extractor=Colours(), classified=0, round_trip=0, baseline_batches=0)
    noise = Uniform(0.3)
    task = FlowTask(flow, codec, noise=noise, evaluation=evaluation, seed=5, metrics_file=str(tmp_path / "m.json"))
    data, judge = Images(), Colours()
    by_hand.trainer(tmp_path).test(task, data, verbose=False)
    found = json.loads((tmp_path / "m.json").read_text())["metrics"]
    images = torch.cat([b["images"] for b in data.test_dataloader()]).float() / 255
    train = (torch.cat([b["images"] for b in data.train_dataloader()]).float() / 255)[:24]
    samples = task.pipeline.sample(Condition(labels=torch.arange(24) % CLASSES), seed=5, indices=torch.arange(24))
    assert bool(torch.isfinite(samples).all())
    levels = torch.tensor([float(by_hand.generator(5, "test.level", 0, i).random((), dtype=np.float32)) for i in range(24)]) * 0.3
    eps = by_hand.noise(5, "test", 0, torch.arange(24), (4, 108), sigma=1.0) * levels[:, None, None]
    tokens = eps.reshape(24, 2, 2, 3, 6, 6).permute(0, 3, 1, 4, 2, 5).reshape(24, 3, 12, 12)  # channel slowest
    noisy = (images + tokens / 2).clamp(0, 1)
    mse = ((noisy - images) ** 2).flatten(1).mean(1)
    assert found["gfid_24"] == pytest.approx(distance(judge(samples), judge(images)), rel=1e-5)
    assert found["floor_24"] == pytest.approx(distance(judge(train), judge(images)), rel=1e-5)
    assert found["rfid_noisy_24"] == pytest.approx(distance(judge(noisy), judge(images)), rel=1e-3, abs=1e-7)
    assert found["fd_decoded_24"] == pytest.approx(distance(judge(samples), judge(noisy)), rel=1e-4)
    assert found["reconstruction_l1_noisy"] == pytest.approx(float((noisy - images).abs().mean()), rel=1e-4)
    assert found["reconstruction_psnr_noisy"] == pytest.approx(float((-10 * torch.log10(mse)).mean()), rel=1e-4)
    assert found["reconstruction_l1"] < 1e-6
    assert found["reconstruction_psnr"] > 99  # exact, up to rounding


def test_bits_per_dimension_of_pixels_count_the_width_of_a_grey_level(tmp_path: Path) -> None:
    """256 grey levels on [-1, 1): log2 of the density per dimension, and 7 bits."""
    codec = str(artifacts.save(tmp_path / "codec", PixelPatches(12, 6)))
    flow = presets.tarflow((2, 2), 108, 16, 1, 1, num_classes=CLASSES, head_dim=8).double()  # the identity
    evaluation = Evaluation(samples=0, classified=0, round_trip=0, baseline_batches=0)
    task = FlowTask(flow, codec, evaluation=evaluation, seed=5, metrics_file=str(tmp_path / "m.json"))
    by_hand.trainer(tmp_path).test(task, Images(), verbose=False)
    found = json.loads((tmp_path / "m.json").read_text())["metrics"]
    images = torch.cat([b["images"] for b in Images().test_dataloader()]).double()
    rows = [by_hand.generator(5, "test", 0, i).random((4, 108), dtype=np.float32) for i in range(24)]
    uniform = torch.from_numpy(np.stack(rows)).double().reshape(24, 2, 2, 3, 6, 6).permute(0, 3, 1, 4, 2, 5).reshape(24, 3, 12, 12)
    x = (images + uniform) / 128 - 1
    nll = float(0.5 * (x**2).mean()) + 0.5 * math.log(2 * math.pi)
    assert found["nll"] == pytest.approx(nll, rel=1e-6)
    assert found["bits_per_dim"] == pytest.approx(nll / math.log(2) + 7, rel=1e-6)
