"""A small causal block to try solvers on, and the contract of causal blocks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from srcflow.conditioners.base import Field
from srcflow.couplings.affine import Affine
from srcflow.couplings.base import Coupling
from srcflow.testing.expect import close, device_of, differ, finite, normal, require
from srcflow.testing.perturbation import perturb
from srcflow.types import CausalBlock, Condition, Context, ParallelBlock, State


@dataclass
class _Cache:
    keys: Tensor  # (B, N, width)
    values: Tensor  # (B, N, width)
    condition: Tensor  # (B, 1, width)
    temperature: Tensor  # (B or 1, 1, 1)


class ReferenceBlock(nn.Module):
    """A `CausalBlock` of one attention head, short enough to be checked by eye.

    Token i's parameters depend on tokens 0 .. i-1, on the class and on the attention temperature, and every token matters.

    Args:
        coupling: the coupling; `Affine` if None.
        dim: code width d.
        width: width of the hidden layer.
        classes: number of classes; labels of -1 and a missing condition use one more, the null class.
        seed: of the weights.
    """

    def __init__(self, coupling: Coupling | None = None, *, dim: int = 3, width: int = 8, classes: int = 5, seed: int = 0) -> None:
        super().__init__()
        self.coupling: Coupling = coupling if coupling is not None else Affine()
        self.channels, self.width = dim, width
        self.fields = (Field("labels", "index", classes),)
        self.embed = nn.Linear(dim, width)
        self.classes = nn.Embedding(classes + 1, width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, self.coupling.params_per_channel * dim)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.6 / p.shape[-1] ** 0.5)
            self.query.weight.mul_(4.0)  # attention that is far from uniform, so that its temperature matters
            self.key.weight.mul_(4.0)

    def params(self, u: Tensor, ctx: Context) -> Tensor:
        """See `CausalBlock.params`."""
        state, first = self.start(ctx, u.shape[0], u.shape[1], u.dtype)
        return torch.cat([first, self.extend(u, 0, state)[:, :-1]], dim=1)

    def start(self, ctx: Context, batch: int, tokens: int, dtype: torch.dtype) -> tuple[State, Tensor]:
        """See `CausalBlock.start`."""
        weight = self.head.weight
        labels = ctx.condition.labels if ctx.condition is not None else None
        if labels is None:
            labels = torch.full((batch,), -1, device=weight.device)
        condition = self.classes(labels % self.classes.num_embeddings)[:, None]  # -1 wraps to the last row, the null class
        temperature = torch.as_tensor(ctx.attention_temperature, dtype=weight.dtype, device=weight.device).reshape(-1, 1, 1)
        empty = weight.new_zeros(batch, tokens, self.width)
        return _Cache(empty, empty.clone(), condition, temperature), self._split(self.head(torch.tanh(condition)))

    def extend(self, u_new: Tensor, at: int, state: State) -> Tensor:
        """See `CausalBlock.extend`."""
        cache: _Cache = state
        end = at + u_new.shape[1]
        place = torch.arange(at, end, device=u_new.device)
        angles = place[:, None] * torch.linspace(1.0, 0.2, self.width, dtype=cache.keys.dtype, device=u_new.device)
        hidden = torch.tanh(self.embed(u_new.to(cache.keys.dtype)) + torch.sin(angles) + cache.condition)
        cache.keys = torch.cat([cache.keys[:, :at], self.key(hidden), cache.keys[:, end:]], dim=1)
        cache.values = torch.cat([cache.values[:, :at], self.value(hidden), cache.values[:, end:]], dim=1)
        logits = self.query(hidden) @ cache.keys[:, :end].transpose(1, 2) / (self.width**0.5 * cache.temperature)
        future = torch.arange(end, device=u_new.device) > place[:, None]
        attention = logits.masked_fill(future, float("-inf")).softmax(-1)
        return self._split(self.head(hidden + attention @ cache.values[:, :end]))

    def _split(self, x: Tensor) -> Tensor:
        shaped: Tensor = x.reshape(*x.shape[:-1], self.coupling.params_per_channel, -1)
        return shaped


def trial_block(block: nn.Module, dtype: torch.dtype, seed: int) -> nn.Module:
    """A perturbed copy of `block` in `dtype` and eval mode."""
    return perturb(copy.deepcopy(block).double(), seed=seed).to(dtype).eval()


def check_block(
    block: nn.Module,
    *,
    shape: tuple[int, int, int] = (3, 6, 3),
    condition: Condition | None = None,
    grid: tuple[int, int] | None = None,
    seed: int = 0,
) -> None:
    """Check everything that `CausalBlock` or `ParallelBlock` promises, whichever the block follows.

    Of a causal block: causality, and that `start` and `extend` give the parameters that `params` gives, whether tokens are fed one by one,
    in runs, or again. Of a parallel one: that `inverse` undoes `forward`, the log-determinant against autograd, and that rows are
    independent.

    Args:
        block: a module that follows one of the protocols; a perturbed float64 copy of it is tried.
        shape: (B, N, d) of the trial tokens; N at least 4.
        condition: of the trial, B rows.
        grid: of the trial tokens.
        seed: of the trial tokens and of the perturbation.

    Raises:
        AssertionError: what is broken, and by how much.
    """
    if isinstance(block, ParallelBlock) and not isinstance(block, CausalBlock):
        _check_parallel(block, shape, Context(condition, grid), seed)
        return
    require(
        isinstance(block, CausalBlock),
        block,
        "lacks one of coupling, params, start and extend (or, if it is parallel, of forward and inverse).",
    )
    trial = trial_block(block, torch.float64, seed)
    if not isinstance(trial, CausalBlock):  # for the type checker: a copy has what the original has
        return
    batch, tokens, dim = shape
    ctx = Context(condition, grid)
    u = normal(batch, tokens, dim, seed=seed + 1).to(device_of(block))
    with torch.no_grad():
        full = trial.params(u, ctx)
        wanted = (batch, tokens, trial.coupling.params_per_channel, dim)
        require(tuple(full.shape) == wanted, block, f"params have shape {tuple(full.shape)}, expected {wanted}.")
        require(full.dtype == torch.float64, block, f"params of float64 tokens are {full.dtype}.")
        finite(full, block, "params")
        for i in range(tokens):
            other = u.clone()
            other[:, i] += 1.0
            changed = trial.params(other, ctx)
            close(
                changed[:, : i + 1],
                full[:, : i + 1],
                1e-12,
                block,
                f"is not causal: params of tokens 0 .. {i} before and after token {i} changed",
            )
            if i + 1 < tokens:
                differ(changed[:, i + 1], full[:, i + 1], block, f"token {i} has no influence on the next one's params.", least=1e-9)

        state, first = trial.start(ctx, batch, tokens, u.dtype)
        close(first, full[:, :1], 1e-10, block, "start's parameters and the first of params")
        for i in range(tokens - 1):
            step = trial.extend(u[:, i : i + 1], i, state)
            close(step, full[:, i + 1 : i + 2], 1e-10, block, f"extend, token by token: parameters of token {i + 1} and params")
        sweep, _ = trial.start(ctx, batch, tokens, u.dtype)
        close(trial.extend(u[:, : tokens - 1], 0, sweep), full[:, 1:], 1e-10, block, "extend in one sweep and params")
        whole = trial.extend(u, 0, sweep)
        require(whole.shape == full.shape, block, f"extend over all tokens gives shape {tuple(whole.shape)}, expected {tuple(full.shape)}.")
        close(whole[:, :-1], full[:, 1:], 1e-10, block, "extend in a sweep that includes the last token, and params")
        again, _ = trial.start(ctx, batch, tokens, u.dtype)
        trial.extend(u[:, :2], 0, again)
        trial.extend(-u[:, 2 : tokens - 1], 2, again)  # a wrong guess, to be overwritten
        close(
            trial.extend(u[:, 2 : tokens - 1], 2, again),
            full[:, 3:],
            1e-10,
            block,
            "extend after a wrong guess was overwritten, and params",
        )


def _check_parallel(block: nn.Module, shape: tuple[int, int, int], ctx: Context, seed: int) -> None:
    trial: Any = trial_block(block, torch.float64, seed)
    x = normal(*shape, seed=seed + 1).to(device_of(block))
    with torch.no_grad():
        z, logdet = trial.forward(x, ctx)
        require(z.shape == x.shape, block, f"forward gives shape {tuple(z.shape)}, expected {tuple(x.shape)}.")
        require(tuple(logdet.shape) == shape[:1], block, f"the log-determinant has shape {tuple(logdet.shape)}, expected {shape[:1]}.")
        require(logdet.dtype == torch.float64, block, f"the log-determinant of float64 tokens is {logdet.dtype}.")
        finite(z, block, "forward")
        differ(z, x, block, "a perturbed block changes nothing.")
        close(trial.inverse(z, ctx), x, 1e-8, block, "inverse of forward, and the tokens")
        other = x.clone()
        other[0] += 1.0
        close(trial.forward(other, ctx)[0][1:], z[1:], 1e-12, block, "rows are not independent: the others before and after one changed")
    first = ctx if ctx.condition is None else ctx.replace(condition=ctx.condition.index(slice(0, 1)))

    def flat(v: Tensor) -> Tensor:
        out: Tensor = trial.forward(v.reshape(1, *shape[1:]), first)[0]
        return out.reshape(-1)

    jacobian = torch.autograd.functional.jacobian(flat, x[:1].reshape(-1))  # type: ignore[no-untyped-call]  # torch is untyped here
    close(logdet[:1], torch.linalg.slogdet(jacobian).logabsdet.reshape(1), 1e-8, block, "the log-determinant and autograd's")
