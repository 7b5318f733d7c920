"""A plan against a tiny run that is really made, and what it says of other runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.callbacks.ema import EMA
from srcflow.compressors.identity import Identity
from srcflow.datamodules.image_folder import ImageFolder
from srcflow.errors import ConfigError, ProblemsError, UnknownNameError
from srcflow.flows import presets
from srcflow.noise import Constant
from srcflow.plan.estimate import Run, plan
from srcflow.plan.flops import count_flops
from srcflow.plan.hardware import ACCELERATORS, accelerator
from srcflow.plan.step import Stage
from srcflow.tasks import artifact
from srcflow.tasks.flow import FlowTask
from srcflow.tasks.optimization import Optimization

H100 = ACCELERATORS["h100"]


def task_of(codec: str = "nowhere", every: int = 0) -> FlowTask:
    flow = presets.srcflow(grid=4, channels=48, width=96, layers=[1, 2], num_classes=2, head_dim=32)
    return FlowTask(flow, codec=codec, noise=Constant(0.1), checkpoint_every=every, optimization=Optimization(warmup_steps=1))


def stage_of(every: int = 0) -> Stage:
    with torch.device("meta"):
        return Stage(task_of(every=every), PixelPatches(16, 4), Identity(48))


class Seen(L.Callback):
    """Bytes of gradients and of the optimizer's state."""

    gradients = optimizer = 0

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.gradients = sum(p.grad.nbytes for p in pl_module.parameters() if p.grad is not None)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        values = [v for state in trainer.optimizers[0].state.values() for v in state.values()]
        self.optimizer = sum(v.nbytes for v in values if isinstance(v, torch.Tensor))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_a_plan_holds_in_a_run(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    artifacts.save(tmp_path / "pixels", PixelPatches(16, 4))
    task, seen, ema = task_of(str(tmp_path / "pixels")), Seen(), EMA(0.9)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[ema, seen, ModelCheckpoint(tmp_path, filename="run")],
    )
    trainer.fit(task, datamodule=ImageFolder(tmp_path / "images", size=16, num_classes=2, batch_size=4))
    made = plan(stage_of(), Run(batch_size=4, steps=2, averages=1, like="cpu"), H100)
    memory = made["memory"]["strategies"]["one process"]
    assert memory["weights"] == sum(p.nbytes for p in task.parameters())
    assert memory["gradients"] == seen.gradients
    assert memory["optimizer"] == seen.optimizer
    assert memory["ema"] == sum(v.nbytes for v in ema.weights(task, "ema").values())
    assert memory["frozen"] == sum(b.nbytes for b in task.buffers())
    assert made["disk"]["checkpoint"] == pytest.approx((tmp_path / "run.ckpt").stat().st_size, rel=0.05)
    artifact.write(task, str(tmp_path / "model"))
    files = (tmp_path / "model").glob("*.safetensors")
    assert made["disk"]["artifact"] == pytest.approx(sum(f.stat().st_size for f in files), rel=0.02)


@pytest.mark.parametrize("every", [0, 1])
def test_flops_are_those_of_a_real_step(every: int) -> None:
    counted = count_flops(stage_of(every), recomputed=True)
    real = Stage(task_of(every=every), PixelPatches(16, 4), Identity(48))
    found: dict[str, int] = {}

    def watch(name: str, function: Any) -> Any:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # whose products the counter knows on a CPU, too
            result = function()
        found[name] = counter.get_total_flops()
        return result

    real.copied().run(watch, 1, "cpu")
    assert counted == found
    assert sum(counted.values()) > sum(count_flops(stage_of(every)).values())  # heads are always computed again


def test_hours_and_totals_follow_from_the_parts() -> None:
    run = Run(batch_size=4, accumulate=3, ranks=8, steps=1000, mixed=True)
    made = plan(stage_of(every=1), run, H100, mfu=0.25)
    assert run.global_batch == 96
    flops = made["flops"]
    assert flops["image"] == sum(flops["parts"].values())
    assert flops["recomputed"] > 0
    assert flops["all"] == (flops["image"] + flops["recomputed"]) * 96_000
    assert made["hours"]["wall"] == pytest.approx(flops["all"] / (8 * 0.25 * 989.4e12) / 3600)
    assert made["hours"]["device"] == pytest.approx(8 * made["hours"]["wall"])
    exact = plan(stage_of(), Run(batch_size=4, steps=1000), H100, mfu=1.0)
    assert exact["hours"]["wall"] == pytest.approx(exact["flops"]["all"] / 66.9e12 / 3600)  # float32
    assert plan(stage_of(), Run(batch_size=4), H100)["hours"] is None


def test_ranks_share_what_fsdp2_shards_and_ddp_adds_buckets() -> None:
    made = plan(stage_of(), Run(batch_size=2, ranks=4, averages=1), H100)["memory"]
    ddp, fsdp2 = made["strategies"]["ddp"], made["strategies"]["fsdp2"]
    for part in ("weights", "gradients", "optimizer", "ema"):
        assert fsdp2[part] == -(-ddp[part] // 4)
    assert ddp["buckets"] == ddp["gradients"]
    assert fsdp2["buckets"] == 0 < fsdp2["gathered"]
    assert fsdp2["activations"] == ddp["activations"]
    assert made["chosen"] == "ddp"
    views = plan(stage_of(), Run(batch_size=2, ranks=4, averages=1, bucket_views=True), H100)["memory"]["strategies"]["ddp"]
    assert views["buckets"] == 0
    assert views["peak"] < ddp["peak"]
    assert plan(stage_of(), Run(batch_size=2, ranks=4, sharded=True), H100)["memory"]["chosen"] == "fsdp2"
    alone = plan(stage_of(), Run(batch_size=2, averages=1), H100)["memory"]["strategies"]
    assert list(alone) == ["one process"]
    held = plan(stage_of(), Run(batch_size=2, averages=1, accumulate=2), H100)["memory"]["strategies"]["one process"]
    assert held["peak"] >= alone["one process"]["peak"]  # gradients of the batch before wait


def test_what_does_not_fit_is_said_with_a_cure_that_works() -> None:
    stage, run = stage_of(), Run(batch_size=512, ranks=2, mixed=True)
    peak = plan(stage, run, H100)["memory"]["strategies"]["ddp"]["peak"]
    small = accelerator("toy", tflops=1.0, memory=0.6 * peak)
    made = plan(stage, run, small)
    (warning,) = made["warnings"]
    assert "do not fit" in warning
    assert "model.checkpoint_every: 1" in warning
    assert not plan(stage_of(every=1), run, small)["warnings"]
    assert "data.batch_size: 256 and trainer.accumulate_grad_batches: 2" in warning
    halved = Run(batch_size=256, accumulate=2, ranks=2, mixed=True)
    assert halved.global_batch == run.global_batch
    assert not plan(stage, halved, small)["warnings"]
    assert not plan(stage, run, accelerator("toy", 1.0, 1.2 * peak))["warnings"]
    assert "larger device" in plan(stage, Run(batch_size=1), accelerator("toy", 1.0, 1e6))["warnings"][0]


def test_features_and_frozen_encoders() -> None:
    stage = stage_of()
    assert "features" not in plan(stage, Run(batch_size=2), H100)["disk"]  # pixels are not stored
    unknown = plan(Stage(copy.deepcopy(stage.task)), Run(batch_size=2), H100)
    assert not unknown["codec_known"]
    assert unknown["flops"]["parts"]["frozen parts"] == 0


def test_devices() -> None:
    assert accelerator("h100") == H100
    assert accelerator("h100", tflops=500.0).peak(True) == 500e12
    assert accelerator("mine", 10.0, 1e9).memory == 1e9
    with pytest.raises(UnknownNameError, match="h100"):
        accelerator("h10")
    with pytest.raises(ConfigError, match="positive"):
        accelerator("h100", tflops=0.0)


def test_runs_that_cannot_be_are_refused() -> None:
    with pytest.raises(ProblemsError, match="ranks"):
        Run(batch_size=0, ranks=0)
    with pytest.raises(ConfigError, match="mfu"):
        plan(stage_of(), Run(batch_size=2), H100, mfu=40)
