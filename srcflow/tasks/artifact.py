"""The artifact of a stage: written at the end of its training, or from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from srcflow import artifacts
from srcflow.callbacks.averages import choose, read_weights
from srcflow.callbacks.ema import RAW_STATE, full, trained
from srcflow.errors import ArtifactError, ForeignCheckpointError
from srcflow.registry import build, spec_of
from srcflow.tasks.checkpoint import FACTS, refuse_foreign

if TYPE_CHECKING:
    from srcflow.tasks.base import Task


def write(task: Task, path: str) -> Path:
    """Write a trained task's product: averaged weights to model.safetensors and the trained ones beside it. To be called on every rank.

    Args:
        task: in a trainer.
        path: the artifact's directory.

    Raises:
        ArtifactError: something else is there, or the weights are not finite.
    """
    ema = task.ema
    raw: dict[str, Tensor] | None = None
    if ema is not None and ema.updates > 0:
        raw = _of_product(task, ema.weights(task, "raw"))
    with ema.averaged(task) if ema is not None else nullcontext():
        return _save(task, path, raw, task.facts(), here=task.trainer.is_global_zero)


def steps_of(path: str) -> int | None:
    """How many optimizer steps an artifact was trained for; None if there is none."""
    try:
        return int(artifacts.read_manifest(path)["steps"])
    except (ArtifactError, KeyError):
        return None


def export(task: Task, checkpoint: str, path: str, *, ema: float | None = None) -> Path:
    """Write the artifact of a checkpoint, without a trainer: what `srcflow export` calls.

    Args:
        task: as the run's configuration describes it; its weights are replaced.
        checkpoint: a file that `srcflow fit` wrote: a checkpoint, or a snapshot of an average.
        path: the artifact's directory.
        ema: decay of the average to take, of several; None: the first.

    Raises:
        ForeignCheckpointError: the file is no checkpoint of this task, or its weights do not fit the configured modules.
        ArtifactError: its weights are not finite, or something else is at `path`.
        CheckpointError: the file is damaged.
        ConfigError: it has no such average, or nothing can be written at `path`.
    """
    artifacts.check_target(path, "out")
    content = read_weights(checkpoint)
    refuse_foreign(task, content, checkpoint)
    facts = content.get(FACTS)
    if not isinstance(facts, Mapping) or facts.get("task") != type(task).__name__ or not isinstance(facts.get("built_on"), Mapping):
        other = f", but of {facts['task']}" if isinstance(facts, Mapping) and "task" in facts else ""
        raise ForeignCheckpointError(f"ckpt_path = {checkpoint!r} is not a checkpoint of {type(task).__name__}{other}.")
    state = choose(content, ema, what=checkpoint)
    artifacts.load_state(artifacts.widened(task, state), state, what=checkpoint)
    raw = content.get(RAW_STATE)
    return _save(task, path, _of_product(task, raw) if raw is not None else None, facts, here=True)


def _of_product(task: Task, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = task.product + "."
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _save(task: Task, path: str, raw: Mapping[str, Tensor] | None, facts: Mapping[str, Any], *, here: bool) -> Path:
    target, module = Path(path), task.made
    trained(task)  # reshards what a forward has left gathered
    state = module.state_dict()
    if any(isinstance(p, DTensor) for p in module.parameters()):
        state = {k: full(v) for k, v in state.items()}  # a collective
        if here:
            module = artifacts.widened(build(spec_of(module), nn.Module), state)
            artifacts.load_state(module, state, what=type(module).__name__)
    for weights in (state, raw or {}):
        artifacts.check_finite(weights, f"the artifact {target} of {type(task).__name__} is not written")
    if here:
        start = target.resolve()
        built_on = {r: {"path": os.path.relpath(b["path"], start), "hash": b["hash"]} for r, b in facts["built_on"].items()}
        artifacts.save(target, module, raw=raw, manifest={**facts, "built_on": built_on})
        rank_zero_info(f"Wrote {target}.")
    return target
