"""Run by test_two_ranks.py: trains straight and with a resume on two CPU processes, and prints weights and counters."""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from srcflow.callbacks.ema import EMA, full
from srcflow.callbacks.non_finite import NonFiniteGuard


class Regression(L.LightningModule):
    """Two layers; rank 0 alone meets one infinite loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net: Any = None
        self.kept: list[int] = []

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 1))
            if self.device_mesh is not None:
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = (self.net(batch[0]) - 1).square().mean()
        return loss * float("inf") if batch_idx == 1 and self.global_rank == 0 and self.current_epoch == 0 else loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("mean", self.net(batch[0]).mean(), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count the whole tensors that each rank holds for the file, besides the weights; called behind the callbacks."""
        whole = [checkpoint["raw_state"], *checkpoint["averages"]["further"]]
        self.kept = self.all_gather(torch.tensor(sum(map(len, whole)))).tolist()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.02)


def fit(mode: str, root: str, epochs: int, resume: str | None = None) -> tuple[L.Trainer, dict[str, Any]]:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
    strategy: Any = "ddp"
    if mode != "ddp":
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=mode == "sharded")
    ema, guard, model = EMA([0.8, 0.5]), NonFiniteGuard(1.0), Regression()
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[ema, guard], default_root_dir=root, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, loader, loader, ckpt_path=resume)
    sets = {kind: ema.weights(model, kind)["net.0.weight"].flatten().tolist() for kind in ("ema", "raw")}  # type: ignore[arg-type]
    sets["further"] = full(ema._shadows[1]["net.0.weight"]).flatten().tolist()
    return trainer, {**sets, "mean": float(trainer.callback_metrics["mean"]), "updates": ema.updates, "skipped": guard.skipped}


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    mode, root = sys.argv[1:]
    _, straight = fit(mode, root, 4)
    half, _ = fit(mode, root, 2)
    half.save_checkpoint(f"{root}/half.ckpt")
    kept = half.lightning_module.kept
    last, resumed = fit(mode, root, 4, f"{root}/half.ckpt")
    if last.is_global_zero:
        print("RESULT" + json.dumps({"straight": straight, "resumed": resumed, "kept": kept}))
