"""Where a training batch is extreme on its way through the flow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srcflow.nn.attention import watch_logits
from srcflow.objectives.flow import likelihood
from srcflow.types import Batch

if TYPE_CHECKING:
    from srcflow.tasks.flow import FlowTask


@torch.no_grad()
def extremes(task: FlowTask, batch: Batch) -> dict[str, dict[str, Tensor]]:
    """One pass of a batch, under the noise and the labels of the present step.

    Returns:
        `blocks`: per block the least and greatest log-scale, the largest absolute attention logit (0 without attention) and output.
        `samples`: per sample the largest absolute code and `nll` in nats per dimension, under the standard prior (what is trained).
    """
    codes = task.codes(batch, "train")
    with watch_logits() as seen:
        found = likelihood(task.flow, codes.x, task.condition(batch, dropout=True), grid=codes.grid)
    outputs = found.steps.blocks
    logits = iter(seen)  # one per layer
    layers = [getattr(block, "layer_count", 0) for block in task.flow.blocks]
    zero = found.logdet.new_zeros(())
    largest = [torch.stack([zero, *(next(logits).to(zero) for _ in range(n))]).amax() for n in layers]
    blocks = {
        "log_scale_min": torch.stack([(-o.logdet).amin() for o in outputs]),
        "log_scale_max": torch.stack([(-o.logdet).amax() for o in outputs]),
        "attention_logit_max": torch.stack(largest),
        "z_abs_max": torch.stack([o.z.abs().amax() for o in outputs]),
    }
    return {"blocks": blocks, "samples": {"code_abs_max": codes.x.abs().flatten(1).amax(1), "nll": found.nll}}
