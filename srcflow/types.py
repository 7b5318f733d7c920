"""What crosses borders between the parts of the package: plain containers of tensors.

Shapes use the package's letters: B batch, N tokens, m a run of tokens, D feature width, d code width, p parameters per channel,
L text length, T text width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypedDict, runtime_checkable

import torch
from torch import Tensor

from srcflow.errors import ShapeError

Grid = tuple[int, int]
"""(rows, columns) of the token grid; tokens are row-major, N = rows * columns."""

State = Any
"""What a block keeps between `start` and `extend` (its key/value cache). Opaque to everybody but the block that made it."""

NULL_LABEL = -1
"""The label of a dropped condition."""


class Batch(TypedDict, total=False):
    """What a datamodule yields. `images` or `features` (or both) is present; `labels`, `indices` and `valid` always are.

    Data sets and datamodules may add keys, by rules that they declare (`data.rules`).
    """

    images: Tensor  # (B, 3, H, W) uint8
    features: Tensor  # (B, N, D) raw features, from a feature store
    deviation: Tensor  # (B, N, D) standard deviation of `features`, where the autoencoder that made them has one
    grid: Grid  # of `features`
    labels: Tensor  # (B,) int64, -1 where there is none
    indices: Tensor  # (B,) int64, global sample index: the key of a sample's random numbers
    valid: Tensor  # (B,) bool, False for padding that evaluation must not count
    flipped: Tensor  # (B,) bool, whether the sample was mirrored


class Condition:
    """What a flow is conditioned on: named tensors with a row per sample, as the flow's conditioners declare them (`conditioners.Field`).

    A missing field, None, and -1 in a field of class ids mean the null condition; so does None in place of a Condition.

    Args:
        fields: tensors of B rows each. Built-in conditioners read `labels` (B,) int64 class ids (-1: null), `text` (B, L, T) features and
            `mask` (B, L) bool, True where `text` is a real token. `dropped` (B,) bool marks rows whose every field is null.

    Raises:
        ShapeError: the fields have different numbers of rows.

    >>> condition = Condition(labels=torch.tensor([3, -1]))
    >>> len(condition), condition.labels.tolist(), condition.text
    (2, [3, -1], None)
    """

    __slots__ = ("_fields",)
    _fields: dict[str, Tensor]

    def __init__(self, **fields: Tensor | None) -> None:
        given = {name: value for name, value in fields.items() if value is not None}
        rows = {name: int(value.shape[0]) if value.ndim else 0 for name, value in given.items()}
        if len(set(rows.values())) > 1:
            raise ShapeError(f"the fields of a condition have a row per sample, not {rows}.")
        object.__setattr__(self, "_fields", given)

    @property
    def fields(self) -> dict[str, Tensor]:
        """The fields that are there, by name."""
        return dict(self._fields)

    @property
    def labels(self) -> Tensor | None:
        """(B,) int64 class ids, -1 for the null class, or None."""
        return self._fields.get("labels")

    @property
    def text(self) -> Tensor | None:
        """(B, L, T) text features, or None."""
        return self._fields.get("text")

    @property
    def mask(self) -> Tensor | None:
        """(B, L) bool, True where `text` is a real token, or None."""
        return self._fields.get("mask")

    def get(self, name: str) -> Tensor | None:
        """A field, or None if it is missing."""
        return self._fields.get(name)

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """The condition with `function` applied to every field."""
        return Condition(**{name: function(value) for name, value in self._fields.items()})

    def index(self, i: Tensor | slice) -> Condition:
        """Rows `i` of every field."""
        return self.map(lambda value: value[i])

    def to(self, device: torch.device | str) -> Condition:
        """Every field on `device`."""
        return self.map(lambda value: value.to(device))

    def joins(self, other: Condition) -> bool:
        """Whether `cat` can put the rows of `other` below these."""
        mine, theirs = self._fields, other._fields
        return set(mine) == set(theirs) and all(mine[name].shape[1:] == theirs[name].shape[1:] for name in mine)

    def cat(self, other: Condition) -> Condition:
        """The rows of both, field by field.

        Raises:
            ShapeError: they have different fields, or fields of different widths.
        """
        if not self.joins(other):
            raise ShapeError(f"{self!r} and {other!r} cannot be joined: they need the same fields, of equal widths and lengths.")
        return Condition(**{name: torch.cat([value, other._fields[name]]) for name, value in self._fields.items()})

    def __len__(self) -> int:
        return next((int(value.shape[0]) for value in self._fields.values()), 0)

    def __bool__(self) -> bool:
        return True  # a condition without fields is still one: the null condition

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a Condition does not change; make another one (Condition({name}=...)).")

    def __reduce__(self) -> Any:
        return _condition, (self._fields,)

    def __repr__(self) -> str:
        return f"Condition({', '.join(f'{name}={tuple(value.shape)}' for name, value in self._fields.items())})"


def _condition(fields: dict[str, Tensor]) -> Condition:
    return Condition(**fields)


class Codes(NamedTuple):
    """Codes x (B, N, d) and their token grid (rows, columns)."""

    x: Tensor
    grid: Grid


class Features(NamedTuple):
    """Raw features of a batch, before noise and latent statistics.

    Args:
        mean: (B, N, D), at least float32: the features, or the mean of their posterior.
        deviation: (B, N, D) standard deviation of a posterior, None for an encoder without.
        grid: (rows, columns) of the tokens.
        indices: (B,) global sample indices, which key what is drawn for them.
    """

    mean: Tensor
    deviation: Tensor | None
    grid: Grid
    indices: Tensor


class AffineParams(NamedTuple):
    """An elementwise affine map from noise to data: u = z * exp(log_scale) + shift. Both (B, m, d), at least float32."""

    log_scale: Tensor
    shift: Tensor


class FlowOutput(NamedTuple):
    """z (B, N, d) in raster order and the summed log-determinant (B,) in nats, at least float32."""

    z: Tensor
    logdet: Tensor


class BlockOutput(NamedTuple):
    """One block's result.

    z (B, N, d) is in raster order. params (B, N, p, d) (the coupling's input, after clip and shift, p ordered (a, m)) and logdet (B, N, d)
    are in the block's own order. A `ParallelBlock` has no params (None), and its logdet is (B, 1, 1).
    """

    z: Tensor
    params: Tensor | None
    logdet: Tensor


class Solution(NamedTuple):
    """A solver's result in the block's own order: u (B, N, d), iterations (B,) int64, residual (B,), fallback (B,) bool."""

    u: Tensor
    iterations: Tensor
    residual: Tensor
    fallback: Tensor


class Inversion(NamedTuple):
    """A flow's inverse and how it was found: data x (B, N, d) in raster order, and one `Solution` per block, noise side first."""

    x: Tensor
    solutions: list[Solution]


@dataclass(frozen=True)
class Context:
    """Everything a block or a solver needs besides the tokens.

    Args:
        condition: the condition, already resolved by the flow (nulls filled in), or None for an unconditional block.
        grid: (rows, columns) of the tokens; None means the grid the block was built for.
        attention_temperature: attention logits are divided by it; a number, or (B,) for one per row.
        block: the block's position in its flow; 0 is the data side, the first of `forward`.
        blocks: how many blocks the flow has, so that positions can be counted from the noise side.
    """

    condition: Condition | None = None
    grid: Grid | None = None
    attention_temperature: float | Tensor = 1.0
    block: int = 0
    blocks: int = 1

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
    """One causal block. All methods work in the block's own order; the flow permutes.

    A flow also looks at these attributes, if the block has them: `channels` (d) and `grid` (rows, columns) that it is built for; `order`
    ("raster" or "reverse", default raster); `fields`, the `conditioners.Field`s that it reads (default none); `identity` (default False),
    whether it changes nothing.
    """

    @property
    def coupling(self) -> CouplingLike: ...

    def params(self, u: Tensor, ctx: Context) -> Tensor:
        """Parameters (B, N, p, d) of every token from the tokens before it."""

    def start(self, ctx: Context, batch: int, tokens: int, dtype: torch.dtype) -> tuple[State, Tensor]:
        """A fresh state and the first token's parameters (B, 1, p, d)."""

    def extend(self, u_new: Tensor, at: int, state: State) -> Tensor:
        """Feed tokens at .. at+m-1 (B, m, d); the parameters (B, m, p, d) of tokens at+1 .. at+m. A smaller `at` overwrites the cache."""


@runtime_checkable
class ParallelBlock(Protocol):
    """A block whose both directions take one pass, such as one that splits channels or space. It works in raster order, without a cache.

    A flow looks at the same further attributes as of a `CausalBlock`, except `order`.
    """

    def forward(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Data x (B, N, d) to noise z (B, N, d), and the exact log-determinant (B,) in nats, at least float32."""

    def inverse(self, z: Tensor, ctx: Context) -> Tensor:
        """Noise (B, N, d) to data (B, N, d)."""
