"""One-step denoising by the flow's own score."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srcflow.errors import ConfigError
from srcflow.flows.likelihood import normal_log_prob
from srcflow.types import Condition, Grid

if TYPE_CHECKING:
    from srcflow.flows.flow import Flow


def tweedie(flow: Flow, x: Tensor, sigma: float, condition: Condition | None = None, *, grid: Grid | None = None) -> Tensor:
    """x + sigma^2 grad log p(x) (TARFlow's denoising, arXiv 2412.06329, E16), under the standard normal prior and without guidance.

    Valid only where Gaussian noise of standard deviation `sigma` was added in the flow's own input space (pixels, VAE latents), not for
    codes whose noise went through a compressor.

    Args:
        flow: the flow.
        x: (B, N, d) noisy tokens.
        sigma: standard deviation of the noise in x.
        condition: labels or text of x.
        grid: token grid of the call.
    """
    if sigma < 0:
        raise ConfigError("sigma", sigma, "a standard deviation is not negative.")
    with torch.inference_mode(False), torch.enable_grad():
        leaf = x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True).requires_grad_(True)
        out = flow(leaf, condition, grid=grid)
        (score,) = torch.autograd.grad((normal_log_prob(out.z) + out.logdet).sum(), leaf)
    return leaf.detach() + sigma**2 * score
