"""A guided block: two streams in one batch behind the interface of a single causal block, so that solvers need not know of guidance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srcflow.couplings.affine import Affine
from srcflow.errors import ConfigError
from srcflow.guidance.base import Guidance
from srcflow.types import NULL_LABEL, AffineParams, CausalBlock, Condition, Context, State


@dataclass
class _Streams:
    """State of a guided block. `joint` holds both streams in one batch; otherwise each has its own state."""

    joint: State | None
    positive: State | None
    negative: State | None
    progress: Tensor


class GuidedBlock:
    """`block` under `guidance`: its parameters are the guided (log_scale, shift), its coupling is `Affine`.

    Args:
        block: the positive stream's block.
        guidance: the rule.
        negative_block: the negative stream's block, if it is another flow's (autoguidance).
        negative_condition: the negative condition, resolved (nulls filled in) by the flow; None means the rule's own.

    Raises:
        ConfigError: a coupling has no affine view.
    """

    coupling = Affine()

    def __init__(
        self,
        block: CausalBlock,
        guidance: Guidance,
        *,
        negative_block: CausalBlock | None = None,
        negative_condition: Condition | None = None,
    ) -> None:
        if guidance.negative.flow is not None and negative_block is None:
            why = "a block on its own does not know another flow's blocks."
            raise ConfigError("guidance.negative.flow", type(guidance.negative.flow).__name__, why, "Use Flow.inverse.")
        self.block, self.guidance = block, guidance
        self.negative_block = block if negative_block is None else negative_block
        self.negative_condition = guidance.negative.condition if negative_condition is None else negative_condition
        for b in (self.block, self.negative_block):
            if b.coupling.affine(torch.zeros(1, 1, b.coupling.params_per_channel, 1)) is None:
                raise ConfigError(
                    "guidance",
                    type(guidance).__name__,
                    f"the coupling {type(b.coupling).__name__} has no affine view, which guidance works on.",
                    "Sample without guidance, or use a coupling whose `affine` is not None.",
                )

    def params(self, u: Tensor, ctx: Context) -> Tensor:
        """Guided parameters (B, N, 2, d) of every token of u (B, N, d)."""
        both = self._joint_context(ctx, u.shape[0])
        progress = _progress(u.shape[1], u)
        if both is not None:
            positive, negative = self.block.params(torch.cat([u, u]), both).chunk(2)
        else:
            positive, negative = self.block.params(u, ctx), self.negative_block.params(u, self._negative_context(ctx, u.shape[0]))
        return self._combine(positive, negative, progress)

    def start(self, ctx: Context, batch: int, tokens: int, dtype: torch.dtype) -> tuple[State, Tensor]:
        """See `CausalBlock.start`; one batch of 2B rows where both streams allow it."""
        both = self._joint_context(ctx, batch)
        if both is not None:
            joint, first = self.block.start(both, 2 * batch, tokens, dtype)
            positive, negative = first.chunk(2)
            streams = _Streams(joint, None, None, _progress(tokens, first))
        else:
            p_state, positive = self.block.start(ctx, batch, tokens, dtype)
            n_state, negative = self.negative_block.start(self._negative_context(ctx, batch), batch, tokens, dtype)
            streams = _Streams(None, p_state, n_state, _progress(tokens, positive))
        return streams, self._combine(positive, negative, streams.progress[:1])

    def extend(self, u_new: Tensor, at: int, state: State) -> Tensor:
        """See `CausalBlock.extend`."""
        streams: _Streams = state
        if streams.joint is not None:
            positive, negative = self.block.extend(torch.cat([u_new, u_new]), at, streams.joint).chunk(2)
        else:
            positive = self.block.extend(u_new, at, streams.positive)
            negative = self.negative_block.extend(u_new, at, streams.negative)
        m = positive.shape[1]
        progress = streams.progress[at + 1 : at + 1 + m]
        if progress.shape[0] < m:  # parameters past the last token belong to no token
            progress = torch.cat([progress, progress.new_ones(m - progress.shape[0])])
        return self._combine(positive, negative, progress)

    def _combine(self, positive: Tensor, negative: Tensor, progress: Tensor) -> Tensor:
        p, n = self.block.coupling.affine(positive), self.negative_block.coupling.affine(negative)
        if p is None or n is None:  # refused by __init__
            raise ConfigError("guidance", type(self.guidance).__name__, "the coupling has no affine view.")
        guided: AffineParams = self.guidance(p, n, progress)
        return torch.stack([guided.log_scale, guided.shift], dim=-2)

    def _negative_context(self, ctx: Context, batch: int) -> Context:
        own = self.guidance.negative.attention_temperature
        warm = ctx.replace(attention_temperature=ctx.attention_temperature * own)
        if self.negative_block is not self.block and not getattr(self.negative_block, "fields", True):
            return warm.replace(condition=None)  # it reads no condition
        condition = self.negative_condition
        if condition is None and ctx.condition is not None and ctx.condition.fields:
            labels = {name: torch.full_like(t, NULL_LABEL) for name, t in ctx.condition.fields.items() if _is_index(t)}
            if unknown := [name for name in ctx.condition.fields if name not in labels]:
                why = f"a block on its own does not know the null {unknown[0]}."
                raise ConfigError("guidance.negative", None, why, "Use Flow.inverse, or give Negative(condition=...).")
            condition = Condition(**labels)
        return warm.replace(condition=condition)

    def _joint_context(self, ctx: Context, batch: int) -> Context | None:
        """Both streams as one context of 2B rows, or None if they differ in a way that forbids it."""
        if self.negative_block is not self.block:
            return None
        negative = self._negative_context(ctx, batch)
        joined: Condition | None = None
        if ctx.condition is not None or negative.condition is not None:
            a, b = ctx.condition or Condition(), negative.condition or Condition()
            if not a.joins(b):
                return None
            joined = a.cat(b)
        t, tn = ctx.attention_temperature, negative.attention_temperature
        if isinstance(t, Tensor) and isinstance(tn, Tensor):
            temperature: float | Tensor = torch.cat([t, tn])
        elif t == tn:
            temperature = t
        else:
            temperature = torch.tensor([float(t)] * batch + [float(tn)] * batch, dtype=torch.float64)
        return ctx.replace(condition=joined, attention_temperature=temperature)


def _is_index(value: Tensor) -> bool:
    """Whether a field of a condition holds class ids, whose null is -1."""
    return value.ndim == 1 and not value.is_floating_point() and value.dtype != torch.bool


def _progress(tokens: int, like: Tensor) -> Tensor:
    return torch.linspace(0.0, 1.0, tokens, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
