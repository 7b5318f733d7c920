from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from srcflow.callbacks.ema import EMA
from srcflow.errors import ConfigError


class Line(L.LightningModule):
    """A model with a frozen parameter, a buffer and a shared parameter, whose trained weight is logged."""

    weights = "ema"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.frozen = nn.Linear(3, 1), nn.Linear(3, 3).requires_grad_(False)
        self.twin = self.net
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.seen: list[Tensor] = []
        self.trail: list[Tensor] = []
        self.fail_at = -1

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.count += 1
        return (self.net(self.frozen(batch)) - 1).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        self.trail.append(self.net.weight.detach().clone())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(self.net.weight.detach().clone())
        if len(self.seen) - 1 == self.fail_at:
            raise RuntimeError("broken")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(self.net.weight.detach().clone())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 0.05)


def loader() -> Any:
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(x, batch_size=4)  # type: ignore[arg-type]


def trainer(path: Path, ema: EMA | None, **more: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1,
        "default_root_dir": path,
        "callbacks": [ema] if ema else [],
    }
    return L.Trainer(**{**settings, **more})


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning", "ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`:UserWarning"),
    # Lightning's reminder; a test without the callback is what is tested here
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning"),
]


def reference(trail: list[Tensor], start: Tensor, decay: float, warmup: bool) -> list[Tensor]:
    out, mean = [], start
    for n, w in enumerate(trail, 1):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        mean = d * mean + (1 - d) * w
        out.append(mean)
    return out


@pytest.mark.parametrize("warmup", [True, False])
def test_validation_sees_the_average_and_training_does_not(tmp_path: Path, warmup: bool) -> None:
    model, ema = Line(), EMA(0.9, warmup)
    start, plain = model.net.weight.detach().clone(), Line()
    trainer(tmp_path, ema).fit(model, loader(), loader())
    trainer(tmp_path, None).fit(plain, loader())
    assert torch.equal(torch.stack(model.trail), torch.stack(plain.trail))
    expected = reference(model.trail, start, 0.9, warmup)
    torch.testing.assert_close(torch.stack(model.seen), torch.stack([expected[3], expected[7]]))
    assert torch.equal(model.net.weight, model.trail[-1])
    assert not torch.allclose(model.seen[-1], model.trail[-1])
    assert set(ema.weights(model, "ema")) == {"net.weight", "net.bias"}
    torch.testing.assert_close(ema.weights(model, "ema")["net.weight"], expected[-1])
    with ema.averaged(model):
        torch.testing.assert_close(model.net.weight.detach(), expected[-1])
        assert torch.equal(ema.weights(model, "raw")["net.weight"], model.trail[-1])
    assert torch.equal(model.net.weight, model.trail[-1])


def test_raw_weights_are_evaluated_when_asked_for(tmp_path: Path) -> None:
    model = Line()
    model.weights = "raw"
    trainer(tmp_path, EMA(0.9)).fit(model, loader(), loader())
    assert torch.equal(model.seen[-1], model.trail[-1])


def test_accumulated_batches_count_as_one_step(tmp_path: Path) -> None:
    ema = EMA(0.9)
    trainer(tmp_path, ema, accumulate_grad_batches=2).fit(Line(), loader())
    assert ema.updates == 4


def test_checkpoint_holds_both_and_a_resumed_run_is_the_straight_one(tmp_path: Path) -> None:
    straight, ema = Line(), EMA(0.9)
    trainer(tmp_path, ema).fit(straight, loader(), loader())

    half, half_ema = Line(), EMA(0.9)
    t = trainer(tmp_path, half_ema, max_epochs=1)
    t.fit(half, loader(), loader())
    t.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert torch.equal(saved["raw_state"]["net.weight"], half.net.weight)
    assert torch.equal(saved["state_dict"]["net.weight"], half_ema.weights(half, "ema")["net.weight"])
    assert torch.equal(saved["state_dict"]["twin.weight"], saved["state_dict"]["net.weight"])
    assert saved["state_dict"]["count"] == 4
    assert torch.equal(saved["state_dict"]["frozen.weight"], half.frozen.weight)

    resumed, resumed_ema = Line(), EMA(0.9)
    trainer(tmp_path, resumed_ema).fit(resumed, loader(), loader(), ckpt_path=str(tmp_path / "half.ckpt"))
    assert torch.equal(torch.stack(half.trail + resumed.trail), torch.stack(straight.trail))
    assert torch.equal(resumed.seen[-1], straight.seen[-1])
    assert resumed_ema.updates == ema.updates == 8

    tested = Line()
    trainer(tmp_path, None).test(tested, loader(), ckpt_path=str(tmp_path / "half.ckpt"), verbose=False)
    assert torch.equal(tested.seen[0], saved["state_dict"]["net.weight"])
    after = Line()
    t = trainer(tmp_path, EMA(0.9), max_epochs=1)
    t.fit(after, loader())
    t.test(after, loader(), verbose=False)
    assert torch.equal(after.seen[0], saved["state_dict"]["net.weight"])
    assert torch.equal(after.net.weight, half.net.weight)


def test_an_exception_during_validation_puts_the_trained_weights_back(tmp_path: Path) -> None:
    model = Line()
    model.fail_at = 0
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, EMA(0.9)).fit(model, loader(), loader())
    assert torch.equal(model.net.weight, model.trail[-1])


def test_bad_decay() -> None:
    with pytest.raises(ConfigError, match="decay"):
        EMA(1.0)
