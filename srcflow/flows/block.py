"""One causal transformer block of a flow, readable in one file (its layers are in trunk.py).

A block predicts the coupling's parameters of token i from the tokens before it. The sequence it runs over is

    shift:  [prefix, u_1, u_2, ..., u_N]      the output at u_i is the parameter of token i+1; token 1 gets zeros (the identity)
    sos:    [prefix, sos, u_1, ..., u_{N-1}]  the output in slot i is the parameter of token i

Three methods walk over it, all in the block's own order: `params` (training: every token at once), `start` and `extend` (sampling: with a
key/value cache that belongs to the caller).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srcflow.conditioners.base import Conditioner
from srcflow.couplings.base import Coupling
from srcflow.errors import ConfigError, one_of
from srcflow.flows.positions import Positions
from srcflow.flows.trunk import Prepared, Trunk, recomputed
from srcflow.nn.attention import Cache, without_autocast
from srcflow.nn.mlp import MLPName
from srcflow.nn.norm import NormName
from srcflow.nn.permutation import Order
from srcflow.types import Context, State


@dataclass
class _Run:
    """State of a sampling call; `prepared` is None for the identity."""

    caches: list[Cache]
    prepared: Prepared | None
    tokens: int


class TransformerBlock(Trunk):
    """A causal transformer that predicts a coupling's parameters (TARFlow arXiv 2412.06329, STARFlow arXiv 2506.06276, E17).

    Args:
        channels: width d of a token.
        width: width of the transformer.
        layers: number of layers.
        positions: learned or rotary positions.
        coupling: the invertible map of a token.
        conditioner: how the block sees the condition; several compose, their prefixes in the given order. None for a block that
            does not.
        start: how the first token gets its parameters: "shift" (it stays as it is) or "sos" (a learned first input).
        order: the order in which the tokens are visited; Flow permutes.
        head_dim: width of an attention head.
        heads: query heads; None means width / head_dim.
        kv_heads: key/value heads; None means heads.
        expansion: inner width of the MLP over `width`.
        norm: "layer" or "rms".
        mlp: "gelu" or "gated".
        qk_norm: normalise queries and keys.
        post_norm: normalise each branch before it is added.
        bias: biases of attention and MLP; the input, output and text maps always have one.
        final_norm: RMSNorm before the head.
        clip: soft clip s * tanh(x / s) of the parameters; 0 means none.
        clip_what: clip only the "log_scale" or "both" log-scale and shift (published STARFlow).
        identity: the identity, without parameters; None means that a block without layers is one. False with `layers: 0` makes a block of
            its input and output maps alone (STARFlow's last block without layers).
    """

    coupling: Coupling
    anchor: Tensor

    def __init__(
        self,
        channels: int,
        width: int,
        layers: int,
        positions: Positions,
        coupling: Coupling,
        conditioner: Conditioner | list[Conditioner] | None = None,
        start: Literal["shift", "sos"] = "sos",
        order: Order = "raster",
        head_dim: int = 64,
        heads: int | None = None,
        kv_heads: int | None = None,
        expansion: float = 4.0,
        norm: NormName = "layer",
        mlp: MLPName = "gelu",
        qk_norm: bool = False,
        post_norm: bool = False,
        bias: bool = True,
        final_norm: bool = False,
        clip: float = 0.0,
        clip_what: Literal["log_scale", "both"] = "log_scale",
        identity: bool | None = None,
    ) -> None:
        one_of("block.start", start, ("shift", "sos"))
        one_of("block.order", order, ("raster", "reverse"))
        one_of("block.clip_what", clip_what, ("log_scale", "both"))
        if clip < 0:
            raise ConfigError("block.clip", clip, "must not be negative.", "Write 0 for none.")
        if identity and layers:
            raise ConfigError("block.identity", identity, f"a block of layers = {layers} is not the identity.", "Leave it out.")
        identity = layers == 0 if identity is None else identity
        super().__init__(
            channels,
            width,
            layers,
            positions,
            conditioner,
            head_dim,
            heads,
            kv_heads,
            expansion,
            norm,
            mlp,
            qk_norm,
            post_norm,
            bias,
            final_norm,
            empty=identity,
        )
        self.coupling, self.start_kind, self.order, self.identity = coupling, start, order, identity
        self.clip, self.clip_what = clip, clip_what
        self.register_buffer("anchor", torch.empty(0), persistent=False)  # tells the device, also without parameters
        if identity:
            return
        self.sos = nn.Parameter(torch.randn(channels)) if start == "sos" else None
        self.head = nn.Linear(width, coupling.params_per_channel * channels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def params(self, u: Tensor, ctx: Context) -> Tensor:
        """Parameters (B, N, p, d) of every token of u (B, N, d), at least float32. See `CausalBlock.params`."""
        batch, tokens, _ = u.shape
        if self.identity:
            return self._zeros(u, tokens)
        prepared = self.prepare(ctx, tokens, u.device, self.order)
        inputs = u if self.sos is None else torch.cat([self.sos.to(u.dtype).expand(batch, 1, -1), u[:, :-1]], dim=1)
        h = self.run(self.embed(inputs, prepared, 0), prepared)
        out = recomputed(self._head, h) if self.recompute_head else self._head(h)
        if self.sos is None:
            out = torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1)
        return out

    def start(self, ctx: Context, batch: int, tokens: int, dtype: torch.dtype) -> tuple[State, Tensor]:
        """A fresh state and the first token's parameters (B, 1, p, d). See `CausalBlock.start`."""
        if self.identity:
            like = torch.empty(batch, 1, self.channels, dtype=dtype, device=self.anchor.device)
            return _Run([], None, tokens), self._zeros(like, 1)
        device = self.proj_in.weight.device
        prepared = self.prepare(ctx, tokens, device, self.order)
        prefix = 0 if prepared.prefix is None else prepared.prefix.shape[1]
        run = _Run([Cache(prefix + tokens) for _ in self.layers], prepared, tokens)
        parts = [] if prepared.prefix is None else [prepared.prefix]
        if self.sos is not None:
            parts.append(self.embed(self.sos.to(dtype).expand(batch, 1, -1), prepared, 0))
        if parts:
            h = self.run_cached(torch.cat([t.to(parts[-1].dtype) for t in parts], dim=1), prepared, run.caches, 0)
            if self.sos is not None:
                return run, self._head(h[:, -1:])
        return run, self._zeros(torch.empty(batch, 1, self.channels, dtype=dtype, device=device), 1)

    def extend(self, u_new: Tensor, at: int, state: State) -> Tensor:
        """Feed tokens at .. at+m-1 (B, m, d); parameters (B, m, p, d) of tokens at+1 .. at+m. See `CausalBlock.extend`.

        The last token of the sequence determines no other: where u_new holds it, the parameters past the end are zeros.
        """
        run: _Run = state
        m = u_new.shape[1]
        if run.prepared is None:
            return self._zeros(u_new, m)
        used = min(m, run.tokens - 1 - at)
        if used <= 0:
            return self._zeros(u_new, m)
        slot = at + (self.sos is not None)
        prefix = 0 if run.prepared.prefix is None else run.prepared.prefix.shape[1]
        h = self.run_cached(self.embed(u_new[:, :used], run.prepared, slot), run.prepared, run.caches, prefix + slot)
        out = self._head(h)
        return out if used == m else torch.cat([out, self._zeros(u_new, m - used).to(out.dtype)], dim=1)

    def _head(self, h: Tensor) -> Tensor:
        """Final norm, linear map and clip, in at least float32 whatever the autocast."""
        with without_autocast(h):
            dtype = self.head_dtype(h)
            h = self.final_norm(h.to(dtype))
            out = F.linear(h, self.head.weight.to(dtype), self.head.bias.to(dtype))
            out = out.reshape(*out.shape[:-1], self.coupling.params_per_channel, self.channels)
            return soft_clip(out, self.clip, None if self.clip_what == "both" else self.coupling.scale_rows)

    def _zeros(self, like: Tensor, tokens: int) -> Tensor:
        dtype = torch.promote_types(like.dtype, torch.float32)
        return like.new_zeros(like.shape[0], tokens, self.coupling.params_per_channel, self.channels, dtype=dtype)


def soft_clip(params: Tensor, limit: float, rows: tuple[int, ...] | None) -> Tensor:
    """limit * tanh(params / limit) on the given rows of params (..., p, d) (None: all); the identity for limit 0."""
    if not limit or rows == ():
        return params
    clipped = limit * torch.tanh(params / limit)
    if rows is None or len(rows) == params.shape[-2]:
        return clipped
    chosen = torch.zeros(params.shape[-2], 1, dtype=torch.bool, device=params.device)
    chosen[list(rows)] = True
    return torch.where(chosen, clipped, params)
