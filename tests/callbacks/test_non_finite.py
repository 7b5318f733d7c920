from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from srcflow.callbacks.ema import EMA
from srcflow.callbacks.non_finite import NonFiniteGuard
from srcflow.errors import NonFiniteError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning", "ignore:.*LeafSpec.*:FutureWarning"),
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
