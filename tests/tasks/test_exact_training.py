"""`FlowTask.fit` against formulae written out in `by_hand.py`: loss, parts, keyed numbers, updates, averages, rates; in float64."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from srcflow import artifacts
from srcflow.callbacks.ema import EMA
from srcflow.callbacks.non_finite import NonFiniteWarning
from srcflow.flows import presets
from srcflow.flows.flow import Flow
from srcflow.noise import Constant
from srcflow.tasks.flow import FlowTask
from srcflow.tasks.optimization import Optimization
from srcflow.testing import perturb

from . import by_hand
from .by_hand import CHANNELS, DIMS, SIGMA, TOKENS, Rows

EXACT = {"atol": 1e-10, "rtol": 1e-10}


class Recording(FlowTask):
    """Keeps every training step: the flow as it was, the batch, the optimizer step and the loss."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: list[tuple[Flow, Any, int, Tensor]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        before = copy.deepcopy(self.flow)
        loss = super().training_step(batch, batch_idx)
        self.steps.append((before, batch, self.global_step, loss.detach()))
        return loss


class Logged(L.Callback):
    """What was logged after every batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.rows.append({k: float(v) for k, v in trainer.callback_metrics.items()})


@pytest.fixture
def codec(tmp_path: Path) -> str:
    return str(artifacts.save(tmp_path / "codec", by_hand.pixels()))


def task_of(codec: str, flow: Flow | None = None, **kwargs: Any) -> Recording:
    settings: dict[str, Any] = {"noise": Constant(SIGMA), "optimization": Optimization(learning_rate=1e-2), "seed": 5, **kwargs}
    return Recording(by_hand.tiny_flow() if flow is None else flow, codec, **settings)


def run(task: FlowTask, folder: Path, data: Rows | None = None, **more: Any) -> tuple[L.Trainer, Logged]:
    logged = Logged()
    t = by_hand.trainer(folder, callbacks=[*more.pop("callbacks", []), logged], limit_val_batches=0, **more)
    t.fit(task, datamodule=data or Rows())
    return t, logged


def loss_by_hand(flow: Flow, batch: Any, step: int, dropout: float, weight: float, seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    w = by_hand.way(flow, by_hand.noisy(batch, seed, "train", step), by_hand.dropped(batch, seed, step, dropout))
    prior = -by_hand.prior_log_prob(w.zs[-1]).mean() / DIMS  # a learned prior has no part in the loss
    logdet = w.logdet.mean() / DIMS
    norm = (w.first**2).mean() + (w.zs[0] ** 2).mean() + (w.zs[1] ** 2).mean()
    parts = {"train/nll": prior - logdet, "train/prior": prior, "train/logdet": logdet, "train/latent_norm": norm}
    for k, z in enumerate(w.zs):
        parts |= {f"train/z_mean_{k}": z.mean(), f"train/z_var_{k}": ((z - z.mean()) ** 2).sum() / (z.numel() - 1)}
    scales = torch.stack(w.log_scales)
    parts |= {"train/log_scale_min": scales.min(), "train/log_scale_max": scales.max()}
    return parts["train/nll"] + weight * norm, parts


# --- the loss ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn_prior", [False, True])
def test_the_loss_and_its_parts_are_the_formulae_at_every_step(tmp_path: Path, codec: str, learn_prior: bool) -> None:
    task = task_of(codec, by_hand.tiny_flow(learn_prior=learn_prior), label_dropout=0.4, latent_norm_weight=0.3)
    _, logged = run(task, tmp_path)
    assert [step for _, _, step, _ in task.steps] == [0, 1, 2, 3]
    for (flow, batch, step, loss), row in zip(task.steps, logged.rows, strict=True):
        with torch.no_grad():
            expected, parts = loss_by_hand(flow, batch, step, 0.4, 0.3)
        assert bool(torch.isfinite(expected))
        torch.testing.assert_close(loss, expected, **EXACT)
        for name, value in parts.items():
            assert row[name] == pytest.approx(float(value), rel=1e-6, abs=1e-6), name


def test_without_a_weight_there_is_no_latent_norm(tmp_path: Path, codec: str) -> None:
    task = task_of(codec, label_dropout=0.0)
    _, logged = run(task, tmp_path, max_steps=1)
    flow, batch, _, loss = task.steps[0]
    torch.testing.assert_close(loss, loss_by_hand(flow, batch, 0, 0.0, 0.0)[0].detach(), **EXACT)
    assert "train/latent_norm" not in logged.rows[0]


def test_the_identity_has_the_entropy_of_the_normal_at_its_data(tmp_path: Path, codec: str) -> None:
    """A fresh flow without normalisation changes nothing: half the mean square and half of log 2 pi, per dimension."""
    task = task_of(codec, presets.srcflow((2, 2), 4, 8, [1, 1], num_classes=3, head_dim=4, normalization="none").double())
    _, logged = run(task, tmp_path, max_steps=1)
    x = by_hand.noisy(task.steps[0][1], 5, "train", 0)
    assert float(task.steps[0][3]) == pytest.approx(float(0.5 * (x**2).mean()) + 0.918938533204673, abs=1e-12)
    assert logged.rows[0]["train/logdet"] == 0


def test_the_normalisation_is_fitted_on_noisy_training_codes(tmp_path: Path, codec: str) -> None:
    task, data = task_of(codec, statistics_batches=3), Rows()
    run(task, tmp_path, data, max_steps=1)
    batches = list(data.train_dataloader())[:3]
    x = torch.cat([by_hand.noisy(b, 5, "norm2", 0) for b in batches]).reshape(-1, CHANNELS)
    norm = task.steps[0][0].normalization
    torch.testing.assert_close(norm.mean, x.mean(0), **EXACT)
    torch.testing.assert_close(norm.std, ((x - x.mean(0)) ** 2).mean(0).sqrt(), **EXACT)


# --- label dropout ----------------------------------------------------------------------------------------------------------------------


class Told(Recording):
    """Keeps the labels that the flow is told."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.told: list[Tensor] = []
        steps = self.flow.steps

        def spied(x: Tensor, condition: Any = None, **rest: Any) -> Any:
            self.told.append(condition.labels.clone())
            return steps(x, condition, **rest)

        object.__setattr__(self.flow, "steps", spied)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return FlowTask.training_step(self, batch, batch_idx)


def told(codec: str, folder: Path, probability: float, data: Rows, **more: Any) -> list[Tensor]:
    task = Told(by_hand.tiny_flow(), codec, noise=Constant(SIGMA), label_dropout=probability, seed=5)
    run(task, folder, data, **more)
    return task.told


def test_labels_are_dropped_with_the_probability_and_others_at_every_step(tmp_path: Path, codec: str) -> None:
    n, data = 400, Rows(train=400, batch_size=400)
    for probability in (0.25, 0.75):
        steps = torch.stack(told(codec, tmp_path, probability, data, max_steps=4))
        kept, null = steps == torch.arange(n) % 3, steps == -1
        assert bool((kept ^ null).all())
        spread = (probability * (1 - probability) / n) ** 0.5
        assert all(abs(float(row.double().mean()) - probability) < 4.5 * spread for row in null)
        for a in range(4):
            for b in range(a):  # two steps agree on as many samples as independent coins do
                agreed = probability**2 + (1 - probability) ** 2
                assert abs(float((null[a] == null[b]).double().mean()) - agreed) < 4.5 * (agreed * (1 - agreed) / n) ** 0.5


def test_what_is_dropped_depends_on_the_samples_index_not_on_its_place(tmp_path: Path, codec: str) -> None:
    whole = told(codec, tmp_path, 0.5, Rows(train=24, batch_size=24), max_steps=1)[0]
    parts = told(codec, tmp_path, 0.5, Rows(train=24, batch_size=6), max_steps=1, accumulate_grad_batches=4)
    assert torch.equal(torch.cat(parts), whole)
    assert 0 < int((whole == -1).sum()) < 24
    moved = told(codec, tmp_path, 0.5, Rows(train=24, batch_size=24, first=1000), max_steps=1)[0]
    assert not torch.equal(moved == -1, whole == -1)


def test_no_label_is_dropped_at_probability_zero_and_every_one_at_one(tmp_path: Path, codec: str) -> None:
    data = Rows()
    assert torch.equal(torch.cat(told(codec, tmp_path, 0.0, data)), torch.arange(24) % 3)
    assert bool((torch.cat(told(codec, tmp_path, 1.0, data)) == -1).all())


# --- what a step does -------------------------------------------------------------------------------------------------------------------


class Trail(L.Callback):
    """Weights and rates after every batch."""

    def __init__(self, ema: EMA) -> None:
        self.ema = ema
        self.rates: list[float] = []
        self.weights: list[Tensor] = []
        self.averages: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        names = [k for k, p in pl_module.named_parameters() if p.requires_grad]
        average = self.ema.weights(pl_module, "ema")
        self.weights.append(torch.cat([p.detach().flatten().clone() for p in pl_module.flow.parameters()]))
        self.averages.append(torch.cat([average[k].flatten() for k in names]))


def rate(finished: int, total: int, peak: float, low: float, warmup: int) -> float:
    """Linear from `low` to `peak`, then half a cosine back."""
    if finished < warmup:
        return low + (peak - low) * finished / warmup
    return low + (peak - low) * (1 + math.cos(math.pi * (finished - warmup) / (total - warmup))) / 2


def test_every_update_average_and_rate_is_the_formulas(tmp_path: Path, codec: str) -> None:
    """AdamW with decoupled decay on the mean gradient of two batches, clipped by its global norm; then the average moves."""
    total, accumulated, warmup, clip, wd, b1, b2, peak, low = 6, 2, 2, 0.4, 0.1, 0.8, 0.9, 2e-2, 1e-3
    optimization = Optimization(
        learning_rate=peak, min_learning_rate=low, warmup_steps=warmup, betas=(b1, b2), weight_decay=wd, gradient_clip=clip
    )
    ema = EMA(0.3)  # above it from the third update on, where the warm-up of the average allows 4 / 13
    task, trail = task_of(codec, optimization=optimization, label_dropout=0.3, latent_norm_weight=0.2), Trail(ema)
    run(task, tmp_path, Rows(train=72), callbacks=[ema, trail], max_steps=total, accumulate_grad_batches=accumulated)
    assert len(task.steps) == total * accumulated
    mine = copy.deepcopy(task.steps[0][0])
    parameters = list(mine.parameters())
    mean = [torch.zeros_like(p) for p in parameters]
    square = [torch.zeros_like(p) for p in parameters]
    average = torch.cat([p.detach().flatten() for p in parameters])
    norms = []
    for n in range(1, total + 1):
        batches = task.steps[(n - 1) * accumulated : n * accumulated]
        assert [step for _, _, step, _ in batches] == [n - 1] * accumulated
        loss = torch.stack([loss_by_hand(mine, batch, n - 1, 0.3, 0.2)[0] for _, batch, _, _ in batches]).mean()
        gradients = torch.autograd.grad(loss, parameters)
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        lr = rate(n - 1, total, peak, low, warmup)
        assert trail.rates[(n - 1) * accumulated] == pytest.approx(lr, rel=1e-12)
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, mean, square, strict=True):
                g = g * min(1.0, clip / (norms[-1] + 1e-6))
                m.mul_(b1).add_(g, alpha=1 - b1)
                v.mul_(b2).add_(g * g, alpha=1 - b2)
                p.mul_(1 - lr * wd)
                p.sub_(lr * (m / (1 - b1**n)) / ((v / (1 - b2**n)).sqrt() + 1e-8))
            now = torch.cat([p.flatten() for p in parameters])
            d = min(0.3, (1 + n) / (10 + n))
            average = d * average + (1 - d) * now
        last = n * accumulated - 1
        torch.testing.assert_close(trail.weights[last], now, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(trail.averages[last], average, atol=1e-8, rtol=1e-8)
        assert torch.equal(trail.weights[last - 1], trail.weights[max(last - 2, 0)]) or n == 1  # between steps nothing moves
    assert max(norms) > clip  # and clipping was seen


def test_a_clipped_and_an_unclipped_step_differ_only_above_the_limit(tmp_path: Path, codec: str) -> None:
    """AdamW's first moments are a tenth of the gradient that it is given first."""
    seen = []
    for clip in (None, 1e9, 1e-3):
        task = task_of(codec, optimization=Optimization(learning_rate=1e-2, gradient_clip=clip), label_dropout=0.0)
        t, logged = run(task, tmp_path, max_steps=1)
        moments = torch.cat([s["exp_avg"].flatten() for s in t.optimizers[0].state.values()])
        seen.append((moments, logged.rows[0]["train/grad_norm"]))
    assert torch.equal(seen[0][0], seen[1][0])
    assert seen[0][1] == seen[1][1] == seen[2][1] > 1e-3  # logged before it is clipped
    assert float(seen[2][0].norm()) == pytest.approx(0.1 * 1e-3, rel=1e-2)  # (1 - beta_1) of a gradient of that norm


def test_a_dropped_step_moves_neither_weights_nor_average(tmp_path: Path, codec: str) -> None:
    """The third batch of four is spoiled; what the average is after the last is that of three updates."""

    class Spoiled(Recording):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if batch_idx == 2 else loss

    ema = EMA(0.9)
    trail = Trail(ema)
    task = Spoiled(by_hand.tiny_flow(), codec, noise=Constant(SIGMA), optimization=Optimization(learning_rate=1e-2), seed=5)
    with pytest.warns(NonFiniteWarning, match="step 2 was skipped"):
        run(task, tmp_path, callbacks=[ema, trail], max_steps=4)
    assert torch.equal(trail.weights[2], trail.weights[1])
    assert torch.equal(trail.averages[2], trail.averages[1])
    average = torch.cat([p.detach().flatten() for p in task.steps[0][0].parameters()])
    for n, now in enumerate((trail.weights[0], trail.weights[1], trail.weights[3]), 1):
        average = average + (1 - (1 + n) / (10 + n)) * (now - average)
    torch.testing.assert_close(trail.averages[3], average, **EXACT)


def test_the_learned_prior_moves_by_a_tenth_to_the_mean_square_of_the_noise(tmp_path: Path, codec: str) -> None:
    task = task_of(codec, by_hand.tiny_flow(learn_prior=True), label_dropout=0.0)
    run(task, tmp_path, max_steps=3)
    after = [flow.prior_std for flow, _, _, _ in task.steps[1:]] + [task.flow.prior_std]
    for (flow, batch, step, _), now in zip(task.steps, after, strict=True):
        z = by_hand.way(flow, by_hand.noisy(batch, 5, "train", step), batch["labels"]).zs[-1].detach()
        expected = (0.9 * flow.prior_std**2 + 0.1 * (z**2).mean(0)).sqrt()
        torch.testing.assert_close(now, expected, **EXACT)
        assert now.shape == (TOKENS, CHANNELS)


def test_the_denoisers_error_is_that_of_the_scaled_score(tmp_path: Path, codec: str) -> None:
    """- sigma grad log p(x) at the noisy codes is what it is to predict; the deviation is in the unit of the codes."""
    flow = presets.starflow((2, 2), 4, 8, [1, 1], head_dim=4, denoiser_layers=1, clip=0.5).double()
    task = task_of(codec, perturb(flow, 0.1), label_dropout=0.0)
    _, logged = run(task, tmp_path, max_steps=1)
    before, batch, _, loss = task.steps[0]
    x = by_hand.noisy(batch, 5, "train", 0).requires_grad_()
    out = before(x)
    density = by_hand.prior_log_prob(out.z) + out.logdet
    (score,) = torch.autograd.grad(density.sum(), x)
    error = ((before.denoiser(x.detach()) + SIGMA * score) ** 2).mean()
    torch.testing.assert_close(loss, (error - density.mean() / DIMS).detach(), **EXACT)
    assert logged.rows[0]["train/denoiser"] == pytest.approx(float(error.detach()), rel=1e-6)
