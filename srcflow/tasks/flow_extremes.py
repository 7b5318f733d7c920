"""Where a training batch is extreme on its way through the flow."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from srcflow.flows.block import TransformerBlock
from srcflow.flows.likelihood import normal_log_prob
from srcflow.nn.attention import watch_logits
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
        _, outputs, logdet = task.flow.steps(codes, task.condition(batch, dropout=True))
    logits = iter(seen)  # one per layer
    layers = [block.layer_count for block in cast("list[TransformerBlock]", list(task.flow.blocks))]
    largest = [torch.stack([logdet.new_zeros(()), *(next(logits).to(logdet) for _ in range(n))]).amax() for n in layers]
    blocks = {
        "log_scale_min": torch.stack([(-o.logdet).amin() for o in outputs]),
        "log_scale_max": torch.stack([(-o.logdet).amax() for o in outputs]),
        "attention_logit_max": torch.stack(largest),
        "z_abs_max": torch.stack([o.z.abs().amax() for o in outputs]),
    }
    nll = -(normal_log_prob(outputs[-1].z) + logdet) / codes.shape[1:].numel()
    return {"blocks": blocks, "samples": {"code_abs_max": codes.abs().flatten(1).amax(1), "nll": nll}}
