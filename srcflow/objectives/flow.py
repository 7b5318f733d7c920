"""The flow's objective: exact maximum likelihood, STARFlow's latent-norm penalty, and the learnable denoiser's error."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from srcflow.flows.flow import Flow, Steps
from srcflow.flows.likelihood import normal_log_prob
from srcflow.types import Condition, Grid


class Likelihood(NamedTuple):
    """The way of a batch through a flow, and its two parts of the negative log-likelihood, (B,) nats each: nll = prior - logdet."""

    steps: Steps
    prior: Tensor
    logdet: Tensor

    @property
    def dims(self) -> int:
        """Dimensions N d of a sample."""
        return int(self.steps.blocks[-1].z.shape[1:].numel())

    @property
    def nll(self) -> Tensor:
        """(B,) nats per dimension."""
        return (self.prior - self.logdet) / self.dims


class FlowObjective(NamedTuple):
    """A scalar loss with its graph, its terms by name (detached scalars, unweighted), and what was computed on the way."""

    total: Tensor
    terms: dict[str, Tensor]
    likelihood: Likelihood


def likelihood(
    flow: Flow, codes: Tensor, condition: Condition | None = None, *, grid: Grid | None = None, std: Tensor | None = None
) -> Likelihood:
    """Negative log-likelihood of codes, constant included (E13).

    Args:
        flow: the flow.
        codes: (B, N, d) in the flow's input space.
        condition: labels, text or other fields of the codes; None means the null condition.
        grid: (rows, columns) of the codes; None means the flow's own.
        std: (N, d) standard deviation of the prior; None means standard normal, which flows are trained under.
    """
    steps = flow.steps(codes, condition, grid=grid)
    return Likelihood(steps, -normal_log_prob(steps.blocks[-1].z, std), steps.logdet)


def flow_objective(
    flow: Flow,
    codes: Tensor,
    condition: Condition | None = None,
    *,
    grid: Grid | None = None,
    latent_norm_weight: float = 0.0,
    noise_deviation: float | Tensor | None = None,
) -> FlowObjective:
    """What a flow is trained on (E15): the mean negative log-likelihood in nats per dimension, and what the flow adds to it.

    Args:
        flow: the flow.
        codes: (B, N, d) noisy codes. They need a gradient if there is a denoiser (`noise_deviation`).
        condition: of the codes, with dropped rows null.
        grid: (rows, columns) of the codes; None means the flow's own.
        latent_norm_weight: weight of the sum of mean squares of the flow's input and of every block's output but the last (STARFlow: 1e-4).
        noise_deviation: standard deviation of the noise in the codes, a number or (N, d), which the flow's learnable denoiser is trained
            for (E20); None: no denoiser is trained.

    Returns:
        the total, and the terms nll, prior and logdet (nats per dimension, nll = prior - logdet), latent_norm, denoiser.
    """
    found = likelihood(flow, codes, condition, grid=grid)
    prior, logdet = found.prior.mean() / found.dims, found.logdet.mean() / found.dims
    total = nll = prior - logdet
    terms = {"nll": nll.detach(), "prior": prior.detach(), "logdet": logdet.detach()}
    if latent_norm_weight > 0:
        penalty = latent_norm(found.steps)
        total = nll + latent_norm_weight * penalty
        terms["latent_norm"] = penalty.detach()
    if noise_deviation is not None:
        error = denoiser_error(flow, codes, condition, found, noise_deviation, grid=grid)
        total = total + error
        terms["denoiser"] = error.detach()
    return FlowObjective(total, terms, found)


def latent_norm(steps: Steps) -> Tensor:
    """Sum of the mean squares of the flow's (normalised) input and of every block's output but the last (STARFlow, appendix B)."""
    return sum((o.z.square().mean() for o in steps.blocks[:-1]), start=steps.y.square().mean())


def denoiser_error(
    flow: Flow, codes: Tensor, condition: Condition | None, found: Likelihood, deviation: float | Tensor, *, grid: Grid | None = None
) -> Tensor:
    """Mean squared error of the denoiser's prediction against -s grad log p(x), about the unit noise in x (E20); trains nothing else.

    Args:
        flow: with a learnable denoiser.
        codes: (B, N, d) noisy codes x that need a gradient.
        condition: of the codes.
        found: their `likelihood`, with its graph.
        deviation: s, a number or (N, d).
        grid: of the codes.
    """
    (score,) = torch.autograd.grad((found.logdet - found.prior).sum(), codes, retain_graph=True)
    return F.mse_loss(flow.denoiser(codes.detach(), condition, grid=grid), -deviation * score.detach())
