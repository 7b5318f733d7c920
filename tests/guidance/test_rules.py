"""The rules of guidance on numbers, and the place of each token on their schedules."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from srcflow.couplings.affine import Affine
from srcflow.guidance.base import Guidance, Negative
from srcflow.guidance.gaussian import Gaussian
from srcflow.guidance.guided import GuidedBlock
from srcflow.guidance.linear import Linear
from srcflow.guidance.schedules import Annealed
from srcflow.types import AffineParams, Context

HALF = torch.tensor([0.5])


def params(log_scale: list[float], shift: list[float]) -> AffineParams:
    return AffineParams(*(torch.tensor(v, dtype=torch.float64).reshape(1, 1, -1) for v in (log_scale, shift)))


def test_gaussian_guidance_is_the_product_of_densities_where_the_positive_one_is_narrower() -> None:
    """log p_c + w (log p_c - log p_u) on three points gives the parabola's curvature and top."""
    positive, negative, w = params([-0.7, -0.1], [0.3, -1.2]), params([0.2, 0.4], [-0.5, 0.9]), 1.5
    guided = Gaussian(w)(positive, negative, HALF)

    def log_density(x: Tensor, p: AffineParams) -> Tensor:
        return -0.5 * ((x - p.shift) / torch.exp(p.log_scale)) ** 2

    low, middle, high = (
        (1 + w) * log_density(torch.tensor(x, dtype=torch.float64), positive) - w * log_density(torch.tensor(x), negative)
        for x in (-1.0, 0.0, 1.0)
    )
    precision = -(low - 2 * middle + high)
    assert bool((precision > 0).all())
    torch.testing.assert_close(guided.log_scale, -0.5 * torch.log(precision))
    torch.testing.assert_close(guided.shift, 0.5 * (high - low) / precision)


def test_gaussian_guidance_takes_a_wider_positive_density_for_as_wide_as_the_negative_one() -> None:
    positive, negative = params([0.9], [2.0]), params([-0.4], [0.5])
    guided = Gaussian(2.0)(positive, negative, HALF)
    torch.testing.assert_close(guided.log_scale, positive.log_scale)
    torch.testing.assert_close(guided.shift, positive.shift + 2.0 * (positive.shift - negative.shift))


def test_linear_guidance_extrapolates_what_it_names() -> None:
    positive, negative = params([0.5, -0.2], [1.0, 3.0]), params([0.1, 0.3], [0.5, 4.0])
    for what, log_scale, shift in (
        ("both", [1.1, -0.95], [1.75, 1.5]),
        ("log_scale", [1.1, -0.95], [1.0, 3.0]),
        ("shift", [0.5, -0.2], [1.75, 1.5]),
    ):
        guided = Linear(1.5, what=what)(positive, negative, HALF)  # type: ignore[arg-type]
        torch.testing.assert_close(guided.log_scale, params(log_scale, shift).log_scale)
        torch.testing.assert_close(guided.shift, params(log_scale, shift).shift)


class Heated:
    """A block without weights: every token's log-scale is 0 and its shift the attention temperature."""

    coupling = Affine()
    conditioned = False

    def params(self, u: Tensor, ctx: Context) -> Tensor:
        return self._of(ctx, *u.shape[:2])

    def start(self, ctx: Context, batch: int, tokens: int, dtype: torch.dtype) -> tuple[Context, Tensor]:
        return ctx, self._of(ctx, batch, 1)

    def extend(self, u_new: Tensor, at: int, state: Context) -> Tensor:
        return self._of(state, *u_new.shape[:2])

    def _of(self, ctx: Context, batch: int, tokens: int) -> Tensor:
        heat = torch.as_tensor(ctx.attention_temperature, dtype=torch.float64).reshape(-1, 1, 1).expand(batch, tokens, 1)
        return torch.stack([0 * heat, heat], dim=-2)


def test_token_i_of_n_is_guided_at_progress_i_over_n_less_one() -> None:
    """Positive shift 1, negative 3: guided shift 1 - 2 w."""
    n, rule = 5, Linear(Annealed(4.0), negative=Negative(attention_temperature=3.0))
    expected = [1 - 2 * 4.0 * i / (n - 1) for i in range(n)]
    assert shifts(rule, n, None) == expected
    for sizes in ([1, 1, 1, 1], [2, 2], [3, 1], [4]):
        assert shifts(rule, n, sizes) == expected
    assert math.isclose(shifts(rule, 1, None)[0], 1.0)  # a single token is the first


def shifts(rule: Guidance, n: int, sizes: list[int] | None) -> list[float]:
    """Guided shifts of n tokens, all at once or in runs of these sizes."""
    block, ctx, u = GuidedBlock(Heated(), rule), Context(), torch.zeros(1, n, 1, dtype=torch.float64)  # type: ignore[arg-type]
    if sizes is None:
        return [float(v) for v in block.params(u, ctx)[0, :, 1, 0]]
    state, first = block.start(ctx, 1, n, torch.float64)
    found, at = [first], 0
    for m in sizes:
        found.append(block.extend(u[:, at : at + m], at, state))
        at += m
    return [float(v) for v in torch.cat(found, 1)[0, :, 1, 0]]
