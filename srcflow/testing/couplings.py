"""The contract of couplings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from srcflow.couplings.base import Coupling
from srcflow.testing.expect import check_specification, close, differ, finite, normal, require


def check_coupling(coupling: Coupling, *, dim: int = 5, tokens: int = 4, batch: int = 3, seed: int = 0) -> None:
    """Check everything that `Coupling` promises: that the map is the identity at zero, exactly invertible, and its log-determinant true.

    Args:
        coupling: the coupling.
        dim: code width d of the trial tokens.
        tokens: number of trial tokens m.
        batch: number of trial rows B.
        seed: of the trial values.

    Raises:
        AssertionError: what is broken, and by how much.
    """
    p = coupling.params_per_channel
    require(isinstance(p, int) and p >= 1, coupling, f"params_per_channel is {p!r}; a coupling has at least one parameter per channel.")
    require(all(0 <= row < p for row in coupling.scale_rows), coupling, f"scale_rows {coupling.scale_rows} do not lie in 0 .. {p - 1}.")
    weights = [k for k, v in vars(coupling).items() if isinstance(v, Tensor | nn.Module)]
    require(not weights, coupling, f"holds tensors or modules ({', '.join(weights)}); a coupling is weightless.")
    check_specification(coupling, Coupling)

    x = normal(batch, tokens, dim, seed=seed)
    params = 0.5 * normal(batch, tokens, p, dim, seed=seed + 1)
    _shapes(coupling, x, params)
    _identity(coupling, x, p)
    _inversion(coupling, x, params)
    _log_determinant(coupling, x, params)
    _tokens(coupling, x, params)
    _gradients(coupling, x, params)
    _affine(coupling, x, params)


def _identity(coupling: Coupling, x: Tensor, p: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        zeros = x.new_zeros(*x.shape[:2], p, x.shape[2], dtype=dtype)
        z, logdet = coupling.forward(x.to(dtype), zeros)
        close(z, x.to(dtype), tolerance, coupling, "zero parameters are not the identity: forward(x, 0) and x")
        close(
            logdet.sum(-1),
            torch.zeros_like(logdet.sum(-1)),
            tolerance * x.shape[2],
            coupling,
            "the log-determinant at zero parameters and 0",
        )
        close(
            coupling.inverse(x.to(dtype), zeros),
            x.to(dtype),
            tolerance,
            coupling,
            "zero parameters are not the identity: inverse(x, 0) and x",
        )


def _shapes(coupling: Coupling, x: Tensor, params: Tensor) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        wanted = torch.promote_types(dtype, torch.float32)
        xs, ps = x.to(dtype), params.to(dtype)
        before = xs.clone(), ps.clone()
        z, logdet = coupling.forward(xs, ps)
        u = coupling.inverse(z, ps)
        for what, t in (("z", z), ("the log-determinant", logdet), ("inverse", u)):
            require(t.shape == x.shape, coupling, f"{what} has shape {tuple(t.shape)}, expected {tuple(x.shape)}.")
            finite(t, coupling, f"{what} for {dtype} inputs")
        require(logdet.dtype == wanted, coupling, f"the log-determinant of {dtype} inputs is {logdet.dtype}, expected {wanted}.")
        require(bool((xs == before[0]).all() and (ps == before[1]).all()), coupling, "changes its inputs in place.")
    z, logdet = coupling.forward(x[:, :1, :1], params[:, :1, :, :1])
    require(
        z.shape == logdet.shape == (x.shape[0], 1, 1),
        coupling,
        f"one token of one channel gives shapes {tuple(z.shape)} and {tuple(logdet.shape)}.",
    )


def _inversion(coupling: Coupling, x: Tensor, params: Tensor) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        for scale in (1.0, 3.0):
            xs, ps = x.to(dtype), (scale * params).to(dtype)
            back = coupling.inverse(coupling.forward(xs, ps)[0], ps)
            close(back, xs, tolerance, coupling, f"inverse(forward(x)) and x in {dtype} (parameters of size {0.5 * scale:g})")
            forth = coupling.forward(coupling.inverse(xs, ps), ps)[0]
            close(forth, xs, tolerance, coupling, f"forward(inverse(z)) and z in {dtype} (parameters of size {0.5 * scale:g})")


def _log_determinant(coupling: Coupling, x: Tensor, params: Tensor) -> None:
    _, logdet = coupling.forward(x, params)
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):

            def token(v: Tensor, b: int = b, i: int = i) -> Tensor:
                return coupling.forward(v.reshape(1, 1, -1), params[b : b + 1, i : i + 1])[0].reshape(-1)

            jacobian = torch.autograd.functional.jacobian(token, x[b, i])  # type: ignore[no-untyped-call]  # torch is untyped here
            true = torch.linalg.slogdet(jacobian).logabsdet
            close(
                logdet[b, i].sum(),
                true,
                1e-8,
                coupling,
                f"the log-determinant of a token ({logdet[b, i].sum():.6g}) and the Jacobian's ({true:.6g})",
            )


def _tokens(coupling: Coupling, x: Tensor, params: Tensor) -> None:
    z, logdet = coupling.forward(x, params)
    u = coupling.inverse(x, params)
    other_x, other_params = x.clone(), params.clone()
    other_x[:, 1], other_params[:, 1] = 1.0 - x[:, 1], -params[:, 1]
    rest = [i for i in range(x.shape[1]) if i != 1]
    z2, logdet2 = coupling.forward(other_x, other_params)
    u2 = coupling.inverse(other_x, other_params)
    for what, a, b in (("z", z, z2), ("the log-determinant", logdet, logdet2), ("inverse", u, u2)):
        close(
            b[:, rest], a[:, rest], 1e-12, coupling, f"tokens are not independent: {what} of the others before and after one token changed"
        )
    last = slice(x.shape[1] - 1, x.shape[1])
    close(coupling.forward(x[1:, last], params[1:, last])[0], z[1:, last], 1e-12, coupling, "a token alone and the same token in a run: z")
    close(
        coupling.inverse(x[1:, last], params[1:, last]), u[1:, last], 1e-12, coupling, "a token alone and the same token in a run: inverse"
    )


def _gradients(coupling: Coupling, x: Tensor, params: Tensor) -> None:
    # at zero as well: that is where the heads start, and a row without gradient there never moves
    for where, values in (("at random parameters", params), ("at zero parameters", torch.zeros_like(params))):
        leaf = values.clone().requires_grad_()
        z, logdet = coupling.forward(x, leaf)
        (gradient,) = torch.autograd.grad((0.5 * z.square() - logdet).sum(), leaf, allow_unused=True)
        require(gradient is not None, coupling, f"no gradient of the likelihood reaches the parameters ({where}).")
        finite(gradient, coupling, f"the gradient of the likelihood in the parameters ({where})")
        dead = [row for row in range(params.shape[2]) if not bool(gradient[:, :, row].any())]
        require(not dead, coupling, f"no gradient of the likelihood reaches the parameter rows {dead} ({where}).")


def _affine(coupling: Coupling, x: Tensor, params: Tensor) -> None:
    view = coupling.affine(params)
    if view is None:
        return
    for what, t in (("log_scale", view.log_scale), ("shift", view.shift)):
        require(t.shape == x.shape, coupling, f"affine(...).{what} has shape {tuple(t.shape)}, expected {tuple(x.shape)}.")
    close(
        x * view.log_scale.exp() + view.shift,
        coupling.inverse(x, params),
        1e-10,
        coupling,
        "the affine view z * exp(log_scale) + shift and inverse(z)",
    )
    low = coupling.affine(params.to(torch.bfloat16))
    require(
        low is not None and low.log_scale.dtype == low.shift.dtype == torch.float32,
        coupling,
        "the affine view of bfloat16 parameters is not float32.",
    )
    require(view.log_scale.dtype == view.shift.dtype == torch.float64, coupling, "the affine view of float64 parameters is not float64.")
    differ(
        torch.cat(list(view)), torch.zeros_like(torch.cat(list(view))), coupling, "the affine view is the identity whatever the parameters."
    )
