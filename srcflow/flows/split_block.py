"""A block that splits the channels: both directions take one pass over all tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srcflow.conditioners.base import Conditioner
from srcflow.couplings.base import Coupling
from srcflow.errors import ConfigError
from srcflow.flows.positions import Positions
from srcflow.flows.trunk import Trunk, recomputed
from srcflow.nn.attention import without_autocast
from srcflow.nn.mlp import MLPName
from srcflow.nn.norm import NormName
from srcflow.types import Context


class SplitBlock(Trunk):
    """Half of every token's channels, given the other half of all tokens, through a coupling (as Jet does, arXiv 2412.15129).

    It is a `ParallelBlock`: a transformer without causal mask reads the channels that stay as they are, and predicts the coupling's
    parameters for the others. Alternate `swap` over the blocks of a flow.

    Args:
        channels: width d of a token, at least 2.
        width: width of the transformer.
        layers: number of layers.
        positions: learned or rotary positions.
        coupling: the invertible map of the changed channels.
        conditioner: how the block sees the condition; several compose. None for a block that does not.
        swap: change the first half of the channels instead of the second.
        head_dim: width of an attention head.
        expansion: inner width of the MLP over `width`.
        norm: "layer" or "rms".
        mlp: "gelu" or "gated".
        qk_norm: normalise queries and keys.

    Raises:
        ConfigError: fewer than two channels.
    """

    causal = False

    def __init__(
        self,
        channels: int,
        width: int,
        layers: int,
        positions: Positions,
        coupling: Coupling,
        conditioner: Conditioner | list[Conditioner] | None = None,
        swap: bool = False,
        head_dim: int = 64,
        expansion: float = 4.0,
        norm: NormName = "layer",
        mlp: MLPName = "gelu",
        qk_norm: bool = False,
    ) -> None:
        if channels < 2:
            raise ConfigError("block.channels", channels, "a split needs at least two channels.", "Use TransformerBlock.")
        super().__init__(
            channels, width, layers, positions, conditioner, head_dim, None, None, expansion, norm, mlp, qk_norm, False, True, True
        )
        half = channels // 2
        first, second = slice(0, half), slice(half, channels)
        self.kept, self.changed = (second, first) if swap else (first, second)
        self.coupling = coupling
        outputs = half if swap else channels - half
        self.head = nn.Linear(width, coupling.params_per_channel * outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Data x (B, N, d) to noise z (B, N, d), and the log-determinant (B,) in nats. See `ParallelBlock.forward`."""
        params = self._params(x, ctx)
        moved, logdet = (
            recomputed(self.coupling.forward, x[..., self.changed], params)
            if self.recompute_head
            else self.coupling.forward(x[..., self.changed], params)
        )
        return self._with(x, moved), logdet.flatten(1).sum(1)

    def inverse(self, z: Tensor, ctx: Context) -> Tensor:
        """Noise z (B, N, d) to data (B, N, d)."""
        return self._with(z, self.coupling.inverse(z[..., self.changed], self._params(z, ctx)))

    def _params(self, x: Tensor, ctx: Context) -> Tensor:
        """(B, N, p, changed channels), at least float32, from the channels that are kept."""
        seen = torch.zeros_like(x)
        seen[..., self.kept] = x[..., self.kept]
        prepared = self.prepare(ctx, x.shape[1], x.device)
        h = self.run(self.embed(seen, prepared, 0), prepared)
        with without_autocast(h):
            h = self.final_norm(h.to(self.head_dtype(h)))
            out = F.linear(h, self.head.weight.to(h.dtype), self.head.bias.to(h.dtype))
            return out.reshape(*out.shape[:-1], self.coupling.params_per_channel, -1)

    def _with(self, x: Tensor, moved: Tensor) -> Tensor:
        kept = x[..., self.kept].to(moved.dtype)
        return torch.cat([kept, moved] if self.kept.start == 0 else [moved, kept], dim=-1)
