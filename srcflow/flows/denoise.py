"""One-step denoising by the flow's own score."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from srcflow.errors import ConfigError, ShapeError
from srcflow.flows.likelihood import normal_log_prob
from srcflow.types import Condition, Grid

if TYPE_CHECKING:
    from srcflow.flows.flow import Flow


def tweedie(flow: Flow, x: Tensor, sigma: float | Tensor, condition: Condition | None = None, *, grid: Grid | None = None) -> Tensor:
    """x + sigma^2 grad log p(x) (TARFlow's denoising, arXiv 2412.06329, E16), under the standard normal prior and without guidance.

    Valid only where Gaussian noise of standard deviation `sigma` was added in the flow's own input space (pixels, VAE latents), not for
    codes whose noise went through a compressor. It costs a forward and a backward pass, under `no_grad` and `inference_mode` too.

    Args:
        flow: the flow.
        x: (B, N, d) noisy tokens.
        sigma: standard deviation of the noise in x: a number, or a tensor that broadcasts to (N, d), one per element.
        condition: labels or text of x.
        grid: token grid of the call.

    Returns:
        (B, N, d), at least float32.

    Raises:
        ConfigError: a deviation is negative or not finite.
        ShapeError: sigma does not broadcast to (N, d), or x does not fit the flow.
    """
    deviation = _checked(sigma, x)
    with torch.inference_mode(False), torch.enable_grad(), _without_weight_cache(x):
        leaf = x.detach().to(torch.promote_types(x.dtype, torch.float32), copy=True).requires_grad_(True)
        given = None if condition is None else _usable(condition)  # autograd keeps what the flow looks up by it
        out = flow(leaf, given, grid=grid)
        (score,) = torch.autograd.grad((normal_log_prob(out.z) + out.logdet).sum(), leaf)
    return leaf.detach() + deviation**2 * score


def _checked(sigma: float | Tensor, x: Tensor) -> float | Tensor:
    """A deviation that fits tokens x (B, N, d): a number as it is, a tensor on x's device and in its type, at least float32.

    Raises:
        ConfigError: it is negative or not finite.
        ShapeError: it does not broadcast to (N, d).
    """
    if isinstance(sigma, Tensor):
        tokens = x.shape[-2:]
        try:
            sigma.broadcast_to(tokens)
        except RuntimeError as e:
            raise ShapeError(f"sigma of shape {tuple(sigma.shape)} does not broadcast to the tokens' (N, d) = {tuple(tokens)}.") from e
        bad = sigma[~((sigma >= 0) & sigma.isfinite())]
        if len(bad):
            raise ConfigError("sigma", float(bad[0]), "a standard deviation is finite and not negative.")
        return sigma.detach().to(x.device, torch.promote_types(x.dtype, torch.float32))
    if not 0 <= sigma < float("inf"):
        raise ConfigError("sigma", sigma, "a standard deviation is finite and not negative.")
    return sigma


def _usable(condition: Condition) -> Condition:
    """The condition in tensors that autograd may keep, which those made under `inference_mode` are not."""
    return condition.map(lambda t: t.clone() if t.is_inference() else t)


def _without_weight_cache(x: Tensor) -> AbstractContextManager[None]:
    """Autocast as it is, but without the copies of the weights that sampling left: autograd cannot keep those of `inference_mode`.

    Only older versions of torch make copies there.
    """
    kind = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)
