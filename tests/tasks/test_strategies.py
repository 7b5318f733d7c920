from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import nn

from srcflow.autoencoders.pixels import PixelPatches
from srcflow.cli import main
from srcflow.compressors.linear import Linear
from srcflow.errors import ConfigError
from srcflow.flows import presets
from srcflow.tasks.autoencoder import AutoencoderTask
from srcflow.tasks.base import Task
from srcflow.tasks.compressor import CompressorTask
from srcflow.tasks.flow import FlowTask
from srcflow.tasks.strategies import check_name, check_sharded, check_strategy, gathered

ROOT = Path(__file__).parents[2]


def flow_task() -> FlowTask:
    return FlowTask(presets.srcflow((2, 2), 12, 32, [1], head_dim=16), "nowhere")


def under(task: Task, strategy: Any, accumulate: int = 1) -> Task:
    task._trainer = SimpleNamespace(strategy=strategy, accumulate_grad_batches=accumulate)  # type: ignore[assignment]
    return task


@pytest.mark.parametrize(
    "name",
    ["fsdp", "fsdp_cpu_offload", "FSDPStrategy", "deepspeed_stage_2", "deepspeed", SimpleNamespace(class_path="a.b.DeepSpeedStrategy")],
)
def test_what_owns_the_parameters_is_refused_by_name(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"ModelParallelStrategy, as in configs/trainer/fsdp2.yaml"):
        check_name(name)


@pytest.mark.parametrize("name", ["auto", "ddp", "ddp_find_unused_parameters_true", "DDPStrategy", "ModelParallelStrategy"])
def test_other_names_go_on_to_lightning(name: str) -> None:
    check_name(name)


def test_the_command_line_says_so_before_it_looks_for_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["fit", "--config", str(ROOT / "configs/smoke/flow.yaml"), "--trainer.accelerator=cpu", "--trainer.strategy=fsdp"])
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert "error: trainer.strategy = " in error
    assert "Use ddp, or FSDP2: class_path: ModelParallelStrategy" in error
    assert "GPU" not in error


def test_a_strategy_is_checked_by_its_kind() -> None:
    class Renamed(FSDPStrategy):
        pass

    class Unknown(SimpleNamespace):
        pass

    for strategy in (SingleDeviceStrategy("cpu"), DDPStrategy(), DDPStrategy(static_graph=True), DDPStrategy(find_unused_parameters=True)):
        check_strategy(under(flow_task(), strategy))
    check_strategy(under(flow_task(), ModelParallelStrategy()))
    with pytest.raises(ConfigError, match=r"Renamed.*FSDP1"):
        check_strategy(under(flow_task(), Renamed()))
    with pytest.raises(ConfigError, match="is not known to keep"):
        check_strategy(under(flow_task(), Unknown()))
    with pytest.raises(ConfigError, match="static_graph"):
        check_strategy(under(flow_task(), DDPStrategy(static_graph=True), accumulate=2))


def test_stages_that_shard_nothing_are_not_trained_apart(tmp_path: Path) -> None:
    tasks = (
        AutoencoderTask(PixelPatches(12, 6), noise=None, eval_noise=None),
        CompressorTask("nowhere", Linear(108, 4), noise=None, eval_noise=None),
    )
    for task in tasks:
        check_strategy(under(task, DDPStrategy()))
        with pytest.raises(ConfigError, match=f"{type(task).__name__} shards nothing.*Use ddp"):
            check_strategy(under(task, ModelParallelStrategy()))


def test_setup_refuses(tmp_path: Path) -> None:
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, default_root_dir=tmp_path)
    task = AutoencoderTask(PixelPatches(12, 6), noise=None, eval_noise=None)
    task._trainer = trainer
    trainer.strategy._lightning_module = task
    task.setup("fit")
    trainer._accelerator_connector.strategy = ModelParallelStrategy()  # type: ignore[assignment]
    assert isinstance(trainer.strategy, Strategy)
    with pytest.raises(ConfigError, match="shards nothing"):
        task.setup("fit")


def test_parameters_outside_of_the_shards_are_named_under_fsdp2_alone() -> None:
    task = flow_task()
    task.extra = nn.Parameter(torch.zeros(2))
    check_sharded(under(task, DDPStrategy()))
    with pytest.raises(ConfigError, match=r"outside of what FlowTask.configure_model shards: extra, flow.blocks.0"):
        check_sharded(under(task, ModelParallelStrategy()))


def test_nothing_is_gathered_of_what_is_not_sharded() -> None:
    flow = flow_task().flow
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    with gathered(flow):
        flow.inverse(torch.zeros(1, 4, 12))
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())
