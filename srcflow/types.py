"""What crosses borders between the rooms of the package: plain containers of tensors, no behaviour of their own.

Shapes use the package's letters: B batch, N tokens, m a run of tokens, D feature width, d code width, p parameters per channel,
L text length, T text width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypedDict, runtime_checkable

import torch
from torch import Tensor

Grid = tuple[int, int]
"""(rows, columns) of the token grid; tokens are row-major, N = rows * columns."""

State = Any
"""What a block keeps between `start` and `extend` (its key/value cache). Opaque to everybody but the block that made it."""

NULL_LABEL = -1
"""The label of a dropped condition."""


class Batch(TypedDict, total=False):
    """What a datamodule yields. `images` or `features` (or both) is present; `labels`, `indices` and `valid` always are."""

    images: Tensor  # (B, 3, H, W) uint8
    features: Tensor  # (B, N, D) raw features of unit RMS, from a feature store
    grid: Grid  # of `features`
    labels: Tensor  # (B,) int64, -1 where there is none
    indices: Tensor  # (B,) int64, global sample index: the key of a sample's random numbers
    valid: Tensor  # (B,) bool, False for padding that evaluation must not count
    flipped: Tensor  # (B,) bool, whether the sample was mirrored


@dataclass(frozen=True)
class Condition:
    """What a flow is conditioned on. `None` everywhere (or no Condition at all) means the flow's null condition.

    Args:
        labels: (B,) int64 class ids, -1 for the null class of that row.
        text: (B, L, T) text features.
        mask: (B, L) bool, True where `text` is a real token.
    """

    labels: Tensor | None = None
    text: Tensor | None = None
    mask: Tensor | None = None

    def index(self, i: Tensor | slice) -> Condition:
        """Rows `i` of every field."""
        return Condition(*(None if t is None else t[i] for t in (self.labels, self.text, self.mask)))

    def to(self, device: torch.device | str) -> Condition:
        """Every field on `device`."""
        return Condition(*(None if t is None else t.to(device) for t in (self.labels, self.text, self.mask)))

    def __len__(self) -> int:
        for t in (self.labels, self.text):
            if t is not None:
                return int(t.shape[0])
        return 0


class AffineParams(NamedTuple):
    """An elementwise affine map from noise to data: u = z * exp(log_scale) + shift. Both (B, m, d), at least float32."""

    log_scale: Tensor
    shift: Tensor


class FlowOutput(NamedTuple):
    """z (B, N, d) in raster order and the summed log-determinant (B,) in nats, at least float32."""

    z: Tensor
    logdet: Tensor


class BlockOutput(NamedTuple):
    """One block's result: z (B, N, d) in raster order; params (B, N, p, d) (the coupling's input, after clip and shift, p ordered (a, m))
    and logdet (B, N, d), both in the block's own order."""

    z: Tensor
    params: Tensor
    logdet: Tensor


class Solution(NamedTuple):
    """A solver's result in the block's own order: u (B, N, d), iterations (B,) int64, residual (B,), fallback (B,) bool."""

    u: Tensor
    iterations: Tensor
    residual: Tensor
    fallback: Tensor


@dataclass(frozen=True)
class Context:
    """Everything a block needs besides its tokens.

    Args:
        condition: the condition, already resolved by the flow (nulls filled in), or None for an unconditional block.
        grid: (rows, columns) of the tokens; None means the grid the block was built for.
        attention_temperature: attention logits are divided by it; a number, or (B,) for one per row.
    """

    condition: Condition | None = None
    grid: Grid | None = None
    attention_temperature: float | Tensor = 1.0

    def replace(self, **changes: Any) -> Context:
        """A copy with some fields changed."""
        return replace(self, **changes)


class CouplingLike(Protocol):
    """What `CausalBlock.coupling` offers (see couplings.base.Coupling)."""

    params_per_channel: int

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]: ...

    def inverse(self, z: Tensor, params: Tensor) -> Tensor: ...

    def affine(self, params: Tensor) -> AffineParams | None: ...


@runtime_checkable
class CausalBlock(Protocol):
    """One causal block. All methods work in the block's own order; the flow permutes."""

    @property
    def coupling(self) -> CouplingLike: ...

    def params(self, u: Tensor, ctx: Context) -> Tensor:
        """Parameters (B, N, p, d) of every token from the tokens before it."""

    def start(self, ctx: Context, batch: int, tokens: int, dtype: torch.dtype) -> tuple[State, Tensor]:
        """A fresh state and the first token's parameters (B, 1, p, d)."""

    def extend(self, u_new: Tensor, at: int, state: State) -> Tensor:
        """Feed tokens at .. at+m-1 (B, m, d); the parameters (B, m, p, d) of tokens at+1 .. at+m. A smaller `at` overwrites the cache."""
