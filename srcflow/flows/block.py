"""One causal transformer block of a flow, readable in one file.

A block predicts the coupling's parameters of token i from the tokens before it. The sequence it runs over is

    shift:  [prefix, u_1, u_2, ..., u_N]      the output at u_i is the parameter of token i+1; token 1 gets zeros (the identity)
    sos:    [prefix, sos, u_1, ..., u_{N-1}]  the output in slot i is the parameter of token i

Three methods walk over it, all in the block's own order: `params` (training: every token at once), `start` and `extend` (sampling: with a
key/value cache that belongs to the caller).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from srcflow.couplings.base import Coupling
from srcflow.errors import ConfigError, ShapeError, one_of
from srcflow.flows.conditioners import Conditioner
from srcflow.flows.positions import Positions
from srcflow.nn.attention import Attention, Cache, without_autocast
from srcflow.nn.mlp import MLP, GatedMLP, MLPName
from srcflow.nn.norm import NormName, RMSNorm, make_norm
from srcflow.nn.permutation import Order
from srcflow.registry import Recorded
from srcflow.types import Condition, Context, Grid, State


class Layer(nn.Module):
    """A pre-norm transformer layer: x += attention(norm(x)); x += mlp(norm(x)); each branch may be normalised again before it is added."""

    def __init__(
        self,
        width: int,
        head_dim: int,
        heads: int,
        kv_heads: int,
        expansion: float,
        norm: NormName,
        mlp: MLPName,
        qk_norm: bool,
        post_norm: bool,
        bias: bool,
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(norm, width)
        self.attn = Attention(width, head_dim, heads, kv_heads, bias=bias, qk_norm=qk_norm)
        self.post_norm1 = RMSNorm(width) if post_norm else nn.Identity()
        self.norm2 = make_norm(norm, width)
        hidden = round(width * expansion)
        self.mlp = GatedMLP(width, hidden, bias) if mlp == "gated" else MLP(width, hidden, bias)
        self.post_norm2 = RMSNorm(width) if post_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        temperature: float | Tensor = 1.0,
        causal: bool = True,
        cache: Cache | None = None,
        at: int = 0,
    ) -> Tensor:
        """(B, m, width) to (B, m, width); arguments as `Attention.forward`."""
        x = x + self.post_norm1(self.attn(self.norm1(x), rotation=rotation, causal=causal, temperature=temperature, cache=cache, at=at))
        return x + self.post_norm2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]  # torch is untyped here


class _Prepared(NamedTuple):
    """What a call derives from its context once."""

    prefix: Tensor | None  # (B, L, width)
    added: Tensor | None  # (B, 1, width)
    table: Tensor | None  # (1, N, width)
    rotation: tuple[Tensor, Tensor] | None  # (L + N, head_dim / 2)
    temperature: float | Tensor


@dataclass
class _Run:
    """State of a sampling call."""

    caches: list[Cache]
    prepared: _Prepared
    tokens: int


class TransformerBlock(nn.Module, metaclass=Recorded):
    """A causal transformer that predicts a coupling's parameters (TARFlow arXiv 2412.06329, STARFlow arXiv 2506.06276, E17).

    Args:
        channels: width d of a token.
        width: width of the transformer.
        layers: number of layers; 0 makes the identity block, without parameters.
        positions: learned or rotary positions.
        coupling: the invertible map of a token.
        conditioner: how the block sees the condition; None for a block that does not.
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
    """

    coupling: Coupling
    place: Tensor

    def __init__(
        self,
        channels: int,
        width: int,
        layers: int,
        positions: Positions,
        coupling: Coupling,
        conditioner: Conditioner | None = None,
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
    ) -> None:
        super().__init__()
        one_of("block.start", start, ("shift", "sos"))
        one_of("block.order", order, ("raster", "reverse"))
        one_of("block.clip_what", clip_what, ("log_scale", "both"))
        one_of("block.norm", norm, ("layer", "rms"))
        one_of("block.mlp", mlp, ("gelu", "gated"))
        for key, number in (("layers", layers), ("clip", clip)):
            if number < 0:
                raise ConfigError(f"block.{key}", number, "must not be negative.", "Write 0 for none.")
        if heads is None and width % head_dim:
            raise ConfigError("block.width", width, f"is not a multiple of head_dim = {head_dim}.", "Change one, or give heads.")
        heads = width // head_dim if heads is None else heads
        self.channels, self.width, self.layer_count, self.head_dim = channels, width, layers, head_dim
        self.coupling, self.start_kind, self.order = coupling, start, order
        self.clip, self.clip_what = clip, clip_what
        self.checkpoint_every = 0
        self.register_buffer("place", torch.empty(0), persistent=False)  # where the block is, also without parameters
        p = coupling.params_per_channel
        if layers == 0:
            self.positions, self.conditioner = None, None
            self.grid: Grid = positions.grid
            return
        self.grid = positions.grid
        self.positions, self.conditioner = positions, conditioner
        self.proj_in = nn.Linear(channels, width)
        self.sos = nn.Parameter(torch.randn(channels)) if start == "sos" else None
        self.layers = nn.ModuleList(
            Layer(width, head_dim, heads, heads if kv_heads is None else kv_heads, expansion, norm, mlp, qk_norm, post_norm, bias)
            for _ in range(layers)
        )
        self.final_norm = RMSNorm(width) if final_norm else nn.Identity()
        self.head = nn.Linear(width, p * channels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def conditioned(self) -> bool:
        """Whether the block sees the condition."""
        return self.conditioner is not None

    def params(self, u: Tensor, ctx: Context) -> Tensor:
        """Parameters (B, N, p, d) of every token of u (B, N, d), at least float32. See `CausalBlock.params`."""
        batch, tokens, _ = u.shape
        if self.layer_count == 0:
            return self._zeros(u, tokens)
        prepared = self._prepare(ctx, tokens, u.device)
        inputs = u if self.sos is None else torch.cat([self.sos.to(u.dtype).expand(batch, 1, -1), u[:, :-1]], dim=1)
        h = self._embed(inputs, prepared, 0)
        if prepared.prefix is not None:
            h = torch.cat([prepared.prefix.to(h.dtype), h], dim=1)
        h = self._run(h, prepared.rotation, prepared.temperature)
        out = self._head(h[:, h.shape[1] - tokens :])
        if self.sos is None:
            out = torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], dim=1)
        return out

    def start(self, ctx: Context, batch: int, tokens: int, dtype: torch.dtype) -> tuple[State, Tensor]:
        """A fresh state and the first token's parameters (B, 1, p, d). See `CausalBlock.start`."""
        if self.layer_count == 0:
            like = torch.empty(batch, 1, self.channels, dtype=dtype, device=self.place.device)
            return _Run([], _Prepared(None, None, None, None, 1.0), tokens), self._zeros(like, 1)
        device = self.proj_in.weight.device
        prepared = self._prepare(ctx, tokens, device)
        prefix = 0 if prepared.prefix is None else prepared.prefix.shape[1]
        run = _Run([Cache(prefix + tokens) for _ in self.layers], prepared, tokens)
        parts = [] if prepared.prefix is None else [prepared.prefix]
        if self.sos is not None:
            parts.append(self._embed(self.sos.to(dtype).expand(batch, 1, -1), prepared, 0))
        if parts:
            h = self._run_cached(torch.cat([t.to(parts[-1].dtype) for t in parts], dim=1), run, 0)
            if self.sos is not None:
                return run, self._head(h[:, -1:])
        return run, self._zeros(torch.empty(batch, 1, self.channels, dtype=dtype, device=device), 1)

    def extend(self, u_new: Tensor, at: int, state: State) -> Tensor:
        """Feed tokens at .. at+m-1 (B, m, d); parameters (B, m, p, d) of tokens at+1 .. at+m. See `CausalBlock.extend`.

        The last token of the sequence determines no other: where u_new holds it, the parameters past the end are zeros.
        """
        run: _Run = state
        m = u_new.shape[1]
        if self.layer_count == 0:
            return self._zeros(u_new, m)
        used = min(m, run.tokens - 1 - at)
        if used <= 0:
            return self._zeros(u_new, m)
        slot = at + (self.sos is not None)
        prefix = 0 if run.prepared.prefix is None else run.prepared.prefix.shape[1]
        h = self._run_cached(self._embed(u_new[:, :used], run.prepared, slot), run, prefix + slot)
        out = self._head(h)
        return out if used == m else torch.cat([out, self._zeros(u_new, m - used).to(out.dtype)], dim=1)

    def _prepare(self, ctx: Context, tokens: int, device: torch.device) -> _Prepared:
        grid = self.grid if ctx.grid is None else ctx.grid
        if grid[0] * grid[1] != tokens:
            raise ShapeError(f"{tokens} tokens do not fill the grid {tuple(grid)}; pass grid=(rows, columns) of this call.")
        prefix = added = None
        if self.conditioner is not None:
            condition = Condition() if ctx.condition is None else ctx.condition
            prefix, added = self.conditioner.prefix(condition), self.conditioner.added(condition)
        if self.positions is None:  # layers == 0 never comes here
            return _Prepared(prefix, added, None, None, ctx.attention_temperature)
        rotation = self.positions.rotation(grid, 0 if prefix is None else prefix.shape[1], self.head_dim, device)
        temperature = ctx.attention_temperature
        if isinstance(temperature, Tensor):  # once, not at every layer and token
            temperature = temperature.to(device)
        return _Prepared(prefix, added, self.positions.table(grid, self.order), rotation, temperature)

    def _embed(self, inputs: Tensor, prepared: _Prepared, slot: int) -> Tensor:
        """Input map, positions and added condition of the image slots slot .. slot+m-1."""
        if inputs.is_meta or not torch.is_autocast_enabled(inputs.device.type):
            inputs = inputs.to(self.proj_in.weight.dtype)
        h = self.proj_in(inputs)
        if prepared.table is not None:
            h = h + prepared.table[:, slot : slot + inputs.shape[1]].to(h.dtype)
        if prepared.added is not None:
            h = h + prepared.added.to(h.dtype)
        return h  # type: ignore[no-any-return]  # torch is untyped here

    def _run(self, h: Tensor, rotation: tuple[Tensor, Tensor] | None, temperature: float | Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            if self.checkpoint_every and torch.is_grad_enabled() and i % self.checkpoint_every == 0:
                h = checkpoint(layer, h, rotation, temperature, use_reentrant=False)
            else:
                h = layer(h, rotation, temperature)
        return h

    def _run_cached(self, h: Tensor, run: _Run, at: int) -> Tensor:
        rotation = run.prepared.rotation
        if rotation is not None:
            rotation = (rotation[0][at : at + h.shape[1]], rotation[1][at : at + h.shape[1]])
        for layer, cache in zip(self.layers, run.caches, strict=True):
            h = layer(h, rotation, run.prepared.temperature, cache=cache, at=at)
        return h

    def _head(self, h: Tensor) -> Tensor:
        """Final norm, linear map and clip, in at least float32 whatever the autocast."""
        with without_autocast(h):
            dtype = torch.promote_types(torch.promote_types(h.dtype, self.head.weight.dtype), torch.float32)
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
