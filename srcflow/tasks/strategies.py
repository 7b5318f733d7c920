"""Which of Lightning's strategies train a task, and what sharding (FSDP2) asks for besides.

One process and DDP take every task. `ModelParallelStrategy` (FSDP2) takes tasks that shard their product in `configure_model`, as FlowTask
does. FSDP1 and DeepSpeed flatten or own the parameters, which the moving average, the checkpoints and the artifacts here go by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from srcflow.errors import ConfigError

if TYPE_CHECKING:
    from srcflow.tasks.base import Task

KEY = "trainer.strategy"
FSDP1 = "FSDP1 flattens the parameters, so the average, checkpoints that every strategy reads, and artifacts cannot be had from it."
DEEPSPEED = "DeepSpeed owns optimizer and parameters, so the average, checkpoints that every strategy reads, and artifacts cannot be had."
CURE = "Use ddp, or FSDP2: class_path: ModelParallelStrategy, as in configs/trainer/fsdp2.yaml."


def check_name(strategy: Any) -> None:
    """Refuse by its name what cannot train a task, before Lightning looks for a GPU for it.

    Args:
        strategy: what stands under trainer.strategy: a name, an object with a `class_path`, or a strategy.

    Raises:
        ConfigError: FSDP1 or DeepSpeed; says what to use.
    """
    name = strategy if isinstance(strategy, str) else str(getattr(strategy, "class_path", type(strategy).__name__))
    kind = name.rpartition(".")[2].lower()
    for start, why in (("fsdp", FSDP1), ("deepspeed", DEEPSPEED)):
        if kind.startswith(start):
            raise ConfigError(KEY, name, why, CURE)


def check_strategy(task: Task) -> None:
    """Refuse a strategy under which the task's parameters would not be what they are taken for.

    Raises:
        ConfigError: says why, and what to use.
    """
    strategy: Any = task.trainer.strategy
    check_name(strategy)
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):  # a subclass of another name
        raise ConfigError(KEY, type(strategy).__name__, FSDP1 if isinstance(strategy, FSDPStrategy) else DEEPSPEED, CURE)
    if isinstance(strategy, ModelParallelStrategy):
        if type(task).configure_model is L.LightningModule.configure_model:
            why = f"{type(task).__name__} shards nothing, so every rank would train a model of its own."
            raise ConfigError(KEY, type(strategy).__name__, why, "Use ddp; the models of stages 0 and 1 fit one GPU.")
        split = task.device_mesh["tensor_parallel"].size() if task.device_mesh is not None else 1
        if split > 1:
            why = "no layer is split over ranks, so these would repeat each other's work."
            raise ConfigError(f"{KEY}.tensor_parallel_size", split, why, "Write 1, and data_parallel_size: number of all GPUs.")
    elif isinstance(strategy, DDPStrategy):
        if strategy._ddp_kwargs.get("static_graph") and task.trainer.accumulate_grad_batches > 1:
            why = "torch cannot record the graph in a batch whose gradients are not reduced."
            raise ConfigError(f"{KEY}.static_graph", True, why, "Leave it out, or set trainer.accumulate_grad_batches: 1.")
    elif not isinstance(strategy, SingleDeviceStrategy):
        raise ConfigError(KEY, type(strategy).__name__, "is not known to keep a task's parameters in step.", CURE)


def check_sharded(task: Task) -> None:
    """Refuse trained parameters that FSDP2 does not know: nothing would average their gradients over the ranks.

    Raises:
        ConfigError: names them.
    """
    if isinstance(task.trainer.strategy, ModelParallelStrategy):
        outside = [name for name, p in task.named_parameters() if p.requires_grad and not isinstance(p, DTensor)]
        if outside:
            names = ", ".join(outside[:5]) + (" ..." if outside[5:] else "")
            why = f"outside of what {type(task).__name__}.configure_model shards: {names}. Every rank would train its own."
            raise ConfigError(KEY, "ModelParallelStrategy", why, "Shard them with fully_shard, put them into the product, or freeze them.")


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside this block every part of a module sharded by FSDP2 stays gathered after its first use; nothing happens to others.

    Without it each forward gathers each layer anew: 1,500 times for a sample of as many tokens. Each rank then holds all weights. For
    evaluation only: no gradients, no change of weights inside. On every rank alike.
    """
    parts = [(name, part) for name, part in module.named_modules() if isinstance(part, FSDPModule)]
    inner = {name for name, _ in parts for other, _ in parts if name != other and name.startswith(f"{other}." if other else "")}
    for _, part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for name, part in parts:
            part.reshard()
            part.set_reshard_after_forward(name in inner, recurse=False)  # as fully_shard has it
