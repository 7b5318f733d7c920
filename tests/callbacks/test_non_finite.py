from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from srcflow.callbacks.ema import EMA
from srcflow.callbacks.non_finite import BadStep, NonFiniteGuard
from srcflow.errors import ConfigError, NonFiniteError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning", "ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::srcflow.callbacks.non_finite.NonFiniteWarning"),
]


class Weight(L.LightningModule):
    """One weight vector; the batch is the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))
        self.trail: list[Tensor] = []
        self.grads: list[Tensor | None] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.w * batch[0, :2]).sum() + batch[0, 2]

    def on_train_batch_end(self, *args: Any) -> None:
        self.trail.append(self.w.detach().clone())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 0.1, weight_decay=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 100), "interval": "step"},
        }


nan, inf = float("nan"), float("inf")


def run(path: Path, rows: list[list[float]], guard: NonFiniteGuard | None = None, ema: EMA | None = None, **more: Any) -> Weight:
    model = Weight()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        callbacks=[c for c in (guard, ema) if c is not None],
        **more,
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.tensor(rows), batch_size=1))  # type: ignore[arg-type]
    return model


good = [[1.0, -2.0, 0.0], [0.5, 1.0, 0.0], [2.0, 0.1, 0.0]]


@pytest.mark.parametrize("bad", [[nan, 1.0, 0.0], [1.0, inf, 0.0], [1.0, 1.0, nan]], ids=["nan gradient", "inf gradient", "nan loss only"])
def test_a_bad_step_changes_nothing_and_the_next_one_proceeds(tmp_path: Path, bad: list[float]) -> None:
    guard, ema = NonFiniteGuard(max_bad_steps=3), EMA(0.5)
    model = run(tmp_path, [good[0], bad, bad, good[1], good[2]], guard, ema)
    clean, clean_ema = NonFiniteGuard(), EMA(0.5)
    reference = run(tmp_path, good, clean, clean_ema)
    assert torch.equal(model.trail[0], model.trail[2])
    # neither weights nor Adam's moments nor the average know of the bad steps
    assert torch.equal(torch.stack([model.trail[i] for i in (0, 3, 4)]), torch.stack(reference.trail))
    assert torch.equal(ema.weights(model, "ema")["w"], clean_ema.weights(reference, "ema")["w"])
    assert (guard.skipped, guard.in_a_row, ema.updates) == (2, 0, 3)
    assert clean.skipped == 0


def test_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    bad = [nan, 0.0, 0.0]
    guard = NonFiniteGuard(max_bad_steps=2)
    run(tmp_path, [bad, good[0], bad, good[1], bad], guard)
    assert guard.skipped == 3
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        run(tmp_path, [good[0], bad, bad, good[1]], NonFiniteGuard(max_bad_steps=2))


def test_one_bad_batch_of_several_accumulated_ones_drops_the_step(tmp_path: Path) -> None:
    guard = NonFiniteGuard()
    model = run(tmp_path, [good[0], [1.0, 1.0, nan], good[1], good[2]], guard, accumulate_grad_batches=2)
    assert torch.equal(model.trail[1], torch.ones(2))
    assert not torch.equal(model.trail[3], torch.ones(2))
    assert guard.skipped == 1


def test_clipping_is_by_global_norm(tmp_path: Path) -> None:
    class Watch(L.Callback):
        def on_before_zero_grad(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
            pl_module.grads.append(None if pl_module.w.grad is None else pl_module.w.grad.clone())

    model = Weight()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[NonFiniteGuard(gradient_clip=1.0), Watch()], default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(torch.tensor([[3.0, 4.0, 0.0], [0.3, 0.4, 0.0]]), batch_size=1))  # type: ignore[arg-type]
    assert model.w.grad is not None
    torch.testing.assert_close(model.grads[-1], torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(model.w.grad, torch.tensor([0.3, 0.4]))
    assert float(trainer.callback_metrics["train/grad_norm"]) == pytest.approx(0.5)


def test_the_counters_survive_a_checkpoint() -> None:
    guard = NonFiniteGuard()
    guard.skipped, guard.in_a_row = 5, 2
    other = NonFiniteGuard()
    other.load_state_dict(guard.state_dict())
    assert (other.skipped, other.in_a_row) == (5, 2)


class Examined(Weight):
    """Keeps what it is told of bad steps."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[BadStep] = []

    def on_bad_step(self, step: BadStep) -> str:
        self.told.append(step)
        return "It was the weather."


def fit(path: Path, model: L.LightningModule, guard: NonFiniteGuard, rows: list[list[float]], **more: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[guard], default_root_dir=path, **more,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(torch.tensor(rows), batch_size=1))  # type: ignore[arg-type]
    return trainer


@pytest.mark.filterwarnings("error::srcflow.callbacks.non_finite.NonFiniteWarning")
def test_the_module_is_asked_what_was_wrong(tmp_path: Path) -> None:
    model, guard = Examined(), NonFiniteGuard(max_bad_steps=2, dump_bad_steps=1)
    bad = [1.0, 1.0, nan]
    with (
        pytest.warns(UserWarning, match=r"step 1 was skipped \(1 in a row, 1 in all\): loss nan, gradient norm .*\. It was the weather\.$"),
        pytest.raises(NonFiniteError, match=r"2 steps in a row .*optimizer step 4, 3 skipped in all\)\. It was the weather\. Lower"),
    ):
        fit(tmp_path, model, guard, [good[0], good[1], bad, good[2], good[0], good[0], bad, bad, bad, bad], accumulate_grad_batches=2)
    assert [(s.in_a_row, s.skipped, s.dump) for s in model.told] == [(1, 1, True), (1, 2, False), (2, 3, True)]
    first = model.told[0]
    assert [i for _, i in first.batches] == [2, 3]
    assert torch.equal(first.batches[1][0], torch.tensor([good[2]]))
    assert torch.isnan(first.losses[0])
    assert torch.isfinite(first.losses[1])


def test_the_loss_is_the_mean_over_the_steps_batches(tmp_path: Path) -> None:
    guard = NonFiniteGuard()
    fit(tmp_path, Weight(), guard, [[0.0, 0.0, 3.0], [0.0, 0.0, 5.0]], accumulate_grad_batches=2)
    assert (guard.loss, guard.norm) == (4.0, 0.0)


def test_a_good_step_waits_for_the_device_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way of a number to the host is counted while the guard looks at a step."""
    waits: list[str] = []
    for name in ("tolist", "item", "__bool__", "__float__"):
        plain = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, *a, name=name, plain=plain: (waits.append(name), plain(self, *a))[1])

    class Counted(NonFiniteGuard):
        def on_before_optimizer_step(self, *args: Any) -> None:
            waits.clear()
            super().on_before_optimizer_step(*args)
            counts.append(list(waits))

    counts: list[list[str]] = []
    fit(tmp_path, Weight(), Counted(), good)
    assert counts == [["tolist"]] * 3


def test_settings_that_cannot_be() -> None:
    for settings in ({"max_bad_steps": 0}, {"dump_bad_steps": -1}):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))} = "):
            NonFiniteGuard(**settings)
