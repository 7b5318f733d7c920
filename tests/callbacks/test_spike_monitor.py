"""Jumps of the loss and the gradient's norm."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from srcflow.callbacks.non_finite import NonFiniteGuard
from srcflow.callbacks.spike_monitor import Jumps, SpikeMonitor, SpikeWarning
from srcflow.errors import ConfigError

pytestmark = [pytest.mark.filterwarnings("ignore::srcflow.callbacks.non_finite.NonFiniteWarning")]


class Given(L.LightningModule):
    """Each batch is (loss, gradient norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))
        self.counts: list[tuple[float, float]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss, norm = batch[0]
        return self.w * norm - (self.w * norm).detach() + loss

    def on_train_batch_end(self, *args: Any) -> None:
        metrics = self.trainer.callback_metrics
        self.counts.append((float(metrics["train/loss_spikes"]), float(metrics["train/grad_norm_spikes"])))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def steady(n: int) -> list[list[float]]:
    draw = random.Random(0)
    return [[draw.gauss(-1.0, 0.01), draw.lognormvariate(0.0, 0.2)] for _ in range(n)]


def fit(path: Path, monitor: SpikeMonitor, rows: list[list[float]], guard: bool = True, ckpt: Path | None = None) -> Given:
    model = Given()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, max_steps=len(rows), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=path,
        callbacks=[monitor, *([NonFiniteGuard()] if guard else [])],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.tensor(rows, dtype=torch.float64), batch_size=1)  # type: ignore[arg-type]
    trainer.fit(model, loader, ckpt_path=ckpt, weights_only=True)
    trainer.save_checkpoint(path / "end.ckpt")
    return model


def test_jumps_are_counted_and_named_and_a_steady_run_has_none(tmp_path: Path) -> None:
    rows = steady(60)
    with pytest.warns() as said:
        model = fit(tmp_path, SpikeMonitor(window=20), [*rows[:30], [-0.5, 1.0], *rows[30:40], [-1.0, 90.0], *rows[40:]])
    texts = [str(w.message) for w in said if issubclass(w.category, SpikeWarning)]
    assert len(texts) == 2
    assert texts[0].startswith("optimizer step 30: train/loss jumped to -0.5, ")
    assert texts[0].endswith("deviations above the median of the last 20 steps (1 jumps so far).")
    assert texts[1].startswith("optimizer step 41: train/grad_norm jumped to 90, ")
    assert model.counts[29] == (0, 0)
    assert model.counts[30] == (1, 0)
    assert model.counts[-1] == (1, 1)


def test_a_drop_a_dropped_step_and_the_first_steps_are_no_jumps(tmp_path: Path) -> None:
    rows = steady(30)
    nan = float("nan")
    model = fit(tmp_path, SpikeMonitor(window=20), [[9.0, 5.0], [70.0, 3.0], *rows, [-5.0, 0.01], [nan, 1.0], [-1.0, nan], *rows[:2]])
    assert model.counts[-1] == (0, 0)


def test_a_lasting_change_is_soon_no_news() -> None:
    jumps = Jumps(20, 8.0)
    draw = random.Random(0)
    for i in range(80):
        jumps.height((1.0 if i < 40 else 2.0) + draw.gauss(0, 0.01))
    assert 8 <= jumps.count <= 12
    level = Jumps(20, 8.0)  # a constant has no spread; a thousandth of it is assumed
    assert [level.height(x) > 8 for x in [1.0] * 12 + [1.007, 1.009]][-2:] == [False, True]
    assert Jumps(20, 8.0, ratios=True).height(0.0) == 0.0


def test_the_state_goes_through_a_checkpoint(tmp_path: Path) -> None:
    rows = steady(25)
    with pytest.warns(SpikeWarning):
        fit(tmp_path, SpikeMonitor(window=20), [*rows, [3.0, 1.0]])
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    other = SpikeMonitor(window=20)
    other.load_state_dict(saved["callbacks"]["SpikeMonitor"])
    assert other.jumps["loss"].count == 1
    assert list(other.jumps["loss"].kept)[-1] == 3.0
    assert len(other.jumps["grad_norm"].kept) == 20
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)
    assert torch.load(io.BytesIO(buffer.getvalue()), weights_only=True) == saved["callbacks"]["SpikeMonitor"]
    assert other.jumps["loss"].height(3.0) > 8  # judges at once


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"spike_monitor\.window = 3"):
        SpikeMonitor(window=3)
    with pytest.raises(ConfigError, match=r"spike_monitor\.threshold = 0"):
        SpikeMonitor(threshold=0)
    with pytest.raises(ConfigError, match="needs the NonFiniteGuard"):
        fit(tmp_path, SpikeMonitor(), steady(2), guard=False)
