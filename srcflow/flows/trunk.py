"""The transformer that blocks and the denoiser share: layers over [condition; tokens], with positions and an input map."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from srcflow.conditioners.base import Conditioner, Field, joined
from srcflow.errors import ConfigError, ShapeError, one_of
from srcflow.flows.positions import Positions
from srcflow.nn.attention import Attention, Cache
from srcflow.nn.mlp import MLP, GatedMLP, MLPName
from srcflow.nn.norm import NormName, RMSNorm, make_norm
from srcflow.nn.permutation import Order
from srcflow.registry import Recorded
from srcflow.types import Condition, Context, Grid

T = TypeVar("T")


def recomputed(function: Callable[..., T], *tensors: Tensor) -> T:
    """function(*tensors), of which autograd keeps the tensors alone: everything in between is computed again in the backward pass.

    Values and gradients are those of the plain call, bit for bit. The function must draw no random numbers. Within transforms of
    `torch.func` (jacrev, vmap, ...), which know no hooks on what autograd keeps, it is the plain call.
    """
    if not _graph_is_made():
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def _graph_is_made() -> bool:
    """Whether autograd keeps anything, and lets itself be told what."""
    return torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()


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


class Prepared(NamedTuple):
    """What a call derives from its context once."""

    prefix: Tensor | None  # (B, L, width)
    added: Tensor | None  # (B, 1, width)
    table: Tensor | None  # (1, N, width)
    rotation: tuple[Tensor, Tensor] | None  # (L + N, head_dim / 2)
    temperature: float | Tensor


class Trunk(nn.Module, metaclass=Recorded):
    """Input map, positions, condition, transformer layers and final norm; what is made of their output is a subclass's affair.

    Args:
        channels: width d of a token.
        width: width of the transformer.
        layers: number of layers.
        positions: learned or rotary positions.
        conditioner: how the condition is seen; several compose, and None is for a trunk that does not see it.
        head_dim: width of an attention head.
        heads: query heads; None means width / head_dim.
        kv_heads: key/value heads; None means heads.
        expansion: inner width of the MLP over `width`.
        norm: "layer" or "rms".
        mlp: "gelu" or "gated".
        qk_norm: normalise queries and keys.
        post_norm: normalise each branch before it is added.
        bias: biases of attention and MLP; the input, output and text maps always have one.
        final_norm: RMSNorm after the layers.
        empty: no parameters at all.
    """

    causal: bool = True

    def __init__(
        self,
        channels: int,
        width: int,
        layers: int,
        positions: Positions,
        conditioner: Conditioner | list[Conditioner] | None,
        head_dim: int,
        heads: int | None,
        kv_heads: int | None,
        expansion: float,
        norm: NormName,
        mlp: MLPName,
        qk_norm: bool,
        post_norm: bool,
        bias: bool,
        final_norm: bool,
        empty: bool = False,
    ) -> None:
        super().__init__()
        one_of("block.norm", norm, ("layer", "rms"))
        one_of("block.mlp", mlp, ("gelu", "gated"))
        if layers < 0:
            raise ConfigError("block.layers", layers, "must not be negative.", "Write 0 for none.")
        if heads is None and width % head_dim:
            raise ConfigError("block.width", width, f"is not a multiple of head_dim = {head_dim}.", "Change one, or give heads.")
        heads = width // head_dim if heads is None else heads
        kv_heads = heads if kv_heads is None else kv_heads
        self.channels, self.width, self.layer_count = channels, width, layers
        self.head_dim, self.heads, self.kv_heads, self.bias = head_dim, heads, kv_heads, bias
        self.grid: Grid = positions.grid
        self.checkpoint_every = 0
        self.recompute_head = True
        self.positions: Positions | None = None if empty else positions
        self.conditioner: Conditioner | None = None if empty else joined(conditioner)
        if empty:
            return
        self.proj_in = nn.Linear(channels, width)
        self.layers = nn.ModuleList(
            Layer(width, head_dim, heads, kv_heads, expansion, norm, mlp, qk_norm, post_norm, bias) for _ in range(layers)
        )
        self.final_norm = RMSNorm(width) if final_norm else nn.Identity()

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields of the condition that it reads."""
        return () if self.conditioner is None else self.conditioner.fields

    @property
    def conditioned(self) -> bool:
        """Whether it sees the condition."""
        return bool(self.fields)

    def recompute(self, every: int, heads: bool) -> None:
        """Choose what the backward pass computes again; see `Flow.set_checkpointing`."""
        self.checkpoint_every, self.recompute_head = every, heads

    def compile_layers(self) -> None:
        """torch.compile each layer; parameter names stay as they are."""
        if self.layer_count:
            for layer in self.layers:
                layer.compile()

    def prepare(self, ctx: Context, tokens: int, device: torch.device, order: Order = "raster") -> Prepared:
        """What `tokens` tokens under `ctx` need besides themselves.

        Raises:
            ShapeError: the tokens do not fill the grid.
        """
        grid = self.grid if ctx.grid is None else ctx.grid
        if grid[0] * grid[1] != tokens:
            raise ShapeError(f"{tokens} tokens do not fill the grid {tuple(grid)}; pass grid=(rows, columns) of this call.")
        prefix = added = None
        if self.conditioner is not None:
            condition = Condition() if ctx.condition is None else ctx.condition
            prefix, added = self.conditioner.prefix(condition), self.conditioner.added(condition)
        if self.positions is None:  # an empty trunk never comes here
            return Prepared(prefix, added, None, None, ctx.attention_temperature)
        rotation = self.positions.rotation(grid, 0 if prefix is None else prefix.shape[1], self.head_dim, device)
        if rotation is not None:  # once, not at every layer and token
            high = torch.promote_types(self.proj_in.weight.dtype, torch.float32)
            rotation = (rotation[0].to(high), rotation[1].to(high))
        temperature = ctx.attention_temperature
        if isinstance(temperature, Tensor):
            temperature = temperature.to(device)
        return Prepared(prefix, added, self.positions.table(grid, order), rotation, temperature)

    def embed(self, inputs: Tensor, prepared: Prepared, slot: int) -> Tensor:
        """Input map, positions and added condition (B, m, width) of the image slots slot .. slot+m-1 from their inputs (B, m, d)."""
        if inputs.is_meta or not torch.is_autocast_enabled(inputs.device.type):
            inputs = inputs.to(self.proj_in.weight.dtype)
        h = self.proj_in(inputs)
        if prepared.table is not None:
            # not rounded to autocast's type, which it lifts the residual stream out of (as in published TARFlow)
            h = h + prepared.table[:, slot : slot + inputs.shape[1]]
        if prepared.added is not None:
            h = h + prepared.added.to(h.dtype)
        return h  # type: ignore[no-any-return]  # torch is untyped here

    def run(self, h: Tensor, prepared: Prepared) -> Tensor:
        """All layers over [prefix; h]; the outputs (B, N, width) at h (B, N, width)."""
        tokens = h.shape[1]
        if prepared.prefix is not None:
            h = torch.cat([prepared.prefix.to(h.dtype), h], dim=1)
        for i, layer in enumerate(self.layers):
            if self.checkpoint_every and _graph_is_made() and i % self.checkpoint_every == 0:
                h = checkpoint(layer, h, prepared.rotation, prepared.temperature, self.causal, use_reentrant=False)
            else:
                h = layer(h, prepared.rotation, prepared.temperature, self.causal)
        return h[:, h.shape[1] - tokens :]

    def head_dtype(self, h: Tensor) -> torch.dtype:
        """In which precision the final norm and the head act on h, whatever the autocast: at least float32."""
        return torch.promote_types(torch.promote_types(h.dtype, self.proj_in.weight.dtype), torch.float32)

    def run_cached(self, h: Tensor, prepared: Prepared, caches: list[Cache], at: int) -> Tensor:
        """All layers over the slots at .. at+m-1 of [prefix; tokens], given the earlier slots' keys and values."""
        rotation = prepared.rotation
        if rotation is not None:
            rotation = (rotation[0][at : at + h.shape[1]], rotation[1][at : at + h.shape[1]])
        for layer, cache in zip(self.layers, caches, strict=True):
            h = layer(h, rotation, prepared.temperature, cache=cache, at=at)
        return h
