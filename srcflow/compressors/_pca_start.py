"""What compressors that start from a principal component analysis share."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srcflow.compressors.base import Compressor
from srcflow.errors import ConfigError, ShapeError
from srcflow.types import Grid

Start = Literal["pca", "random"]


class PCAStarted(Compressor):
    """A learned compressor that starts as PCA (`start="pca"`), exactly, or from random weights (`start="random"`).

    Args:
        dim: feature width D.
        code_dim: code width d.
        start: "pca" or "random".
    """

    pca_started: Tensor

    def __init__(self, dim: int, code_dim: int, start: Start) -> None:
        super().__init__()
        if not 1 <= code_dim <= dim:
            raise ConfigError("compressor.code_dim", code_dim, f"must lie between 1 and compressor.dim = {dim}.")
        if start not in ("pca", "random"):
            raise ConfigError("compressor.start", start, "no such start.", "Known: pca, random.")
        self.dim, self.code_dim, self.start = dim, code_dim, start
        self.register_buffer("pca_started", torch.tensor(False), persistent=True)

    @property
    def needs_pca(self) -> bool:
        """See `Compressor.needs_pca`."""
        return self.start == "pca" and (self.pca_started.is_meta or not bool(self.pca_started))

    @torch.no_grad()
    def init_from_pca(self, mean: Tensor, components: Tensor) -> None:
        """See `Compressor.init_from_pca`; with `start="random"` nothing happens.

        Raises:
            ShapeError: the shapes are not (D,) and (d, D).
        """
        check_pca(mean, components, self.dim, self.code_dim)
        if self.start == "pca":
            self._start(mean.to("cpu", torch.float64), components.to("cpu", torch.float64))
            self.pca_started.fill_(True)

    @abstractmethod
    def _start(self, mean: Tensor, components: Tensor) -> None:
        """Set the parameters so that compress and expand are this PCA; both arguments float64 on the CPU."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in at least float32, under autocast too: codes and features are not rounded to half precision."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


class Float32Linear(nn.Linear):
    """A linear layer computed in at least float32 (see `linear`)."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return linear(input, self.weight, self.bias)


@torch.no_grad()
def start_maps_from_pca(
    enc_in: nn.Linear, enc_out: nn.Linear, dec_in: nn.Linear, dec_out: nn.Linear, mean: Tensor, components: Tensor
) -> None:
    """Set D -> width -> d -> width -> D so that the first two compose to PCA's projection and the last two to its reconstruction.

    The components (d, D) are completed to r = min(width, D) orthonormal directions B, and Q (width, r) with orthonormal columns embeds
    those in the width: in = Q B, out = (first d columns of Q)^T, and the transposes on the way back. So layers between see (and may
    write) more than the d directions that reach the codes, and no channel of the width is idle. Q is random, with a fixed seed.
    """
    d, dim = components.shape
    width = enc_in.out_features
    generator = torch.Generator("cpu").manual_seed(0)
    rank = min(width, dim)
    extra = torch.randn(dim, rank - d, dtype=torch.float64, device="cpu", generator=generator)
    for _ in range(2):  # twice is enough for orthogonality to rounding
        extra = extra - components.T @ (components @ extra)
    basis = torch.cat([components, torch.linalg.qr(extra).Q.T])
    for first, last, inwards in ((enc_in, enc_out, True), (dec_in, dec_out, False)):
        q = torch.linalg.qr(torch.randn(width, rank, dtype=torch.float64, device="cpu", generator=generator)).Q
        if inwards:
            first.weight.copy_(q @ basis)
            first.bias.copy_(-(q @ basis @ mean))
            last.weight.copy_(q[:, :d].T)
            last.bias.zero_()
        else:
            first.weight.copy_(q[:, :d])
            first.bias.zero_()
            last.weight.copy_(basis.T @ q.T)
            last.bias.copy_(mean)


def check_pca(mean: Tensor, components: Tensor, dim: int, code_dim: int) -> None:
    """Raise ShapeError unless mean is (D,) and components (d, D)."""
    if tuple(mean.shape) != (dim,) or tuple(components.shape) != (code_dim, dim):
        raise ShapeError(
            f"PCA of mean {tuple(mean.shape)} and components {tuple(components.shape)} was given to a compressor with dim = {dim} and "
            f"code_dim = {code_dim}."
        )


def check_tokens(x: Tensor, width: int, grid: Grid, what: str) -> None:
    """Raise ShapeError unless x is (B, rows * columns, width)."""
    if x.ndim != 3 or x.shape[2] != width or x.shape[1] != grid[0] * grid[1]:
        raise ShapeError(f"{what} of shape {tuple(x.shape)} were given to a compressor that expects (B, {grid[0]} * {grid[1]}, {width}).")


def rounded_width(dim: int, width: int | None, code_dim: int, multiple: int = 64) -> int:
    """`width`, or `dim` rounded up to a multiple. Raises ConfigError if it is less than `code_dim`: PCA would not fit."""
    width = -(-dim // multiple) * multiple if width is None else width
    if width < code_dim:
        raise ConfigError("compressor.width", width, f"is less than compressor.code_dim = {code_dim}.")
    return width
