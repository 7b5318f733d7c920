"""A network that predicts the noise in a flow's input, trained on the flow's own score."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from srcflow.conditioners.base import Conditioner
from srcflow.flows.positions import Positions
from srcflow.flows.trunk import Trunk, recomputed
from srcflow.nn.attention import without_autocast
from srcflow.nn.mlp import MLPName
from srcflow.nn.norm import NormName
from srcflow.types import Context


class Denoiser(Trunk):
    """STARFlow's learnable denoiser (arXiv 2506.06276, E20): transformer layers over all tokens at once, in raster order and not causal.

    It is trained to predict -s grad log p(x), about the unit noise in x = clean + s noise, so that one forward pass replaces the score's
    forward and backward pass.

    Args:
        channels: width d of a token.
        width: width of the transformer.
        positions: learned or rotary positions.
        layers: number of layers.
        conditioner: how the condition is seen, text in front of the tokens included; several compose. None for an unconditional denoiser.
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
    """

    causal = False

    def __init__(
        self,
        channels: int,
        width: int,
        positions: Positions,
        layers: int = 8,
        conditioner: Conditioner | list[Conditioner] | None = None,
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
    ) -> None:
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
        )
        self.head = nn.Linear(width, channels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """The predicted noise (B, N, d), at least float32, of tokens x (B, N, d) in raster order.

        Args:
            x: noisy tokens.
            ctx: condition (resolved), grid and attention temperature.
        """
        prepared = self.prepare(ctx, x.shape[1], x.device)
        h = self.run(self.embed(x, prepared, 0), prepared)
        return recomputed(self._head, h) if self.recompute_head else self._head(h)

    def _head(self, h: Tensor) -> Tensor:
        """Final norm and linear map, in at least float32 whatever the autocast."""
        with without_autocast(h):
            h = self.final_norm(h.to(self.head_dtype(h)))
            return F.linear(h, self.head.weight.to(h.dtype), self.head.bias.to(h.dtype))
