"""The contract of solvers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from srcflow.guidance.base import Guidance, Negative
from srcflow.guidance.guided import GuidedBlock
from srcflow.guidance.linear import Linear
from srcflow.guidance.schedules import Annealed
from srcflow.solvers.base import Solver
from srcflow.testing.blocks import ReferenceBlock, check_block, trial_block
from srcflow.testing.expect import check_specification, close, device_of, differ, finite, normal, require
from srcflow.types import CausalBlock, Condition, Context, Solution

_DEFAULT: Any = object()


def check_solver(
    solver: Solver,
    block: nn.Module | None = None,
    *,
    shape: tuple[int, int, int] = (3, 6, 3),
    condition: Condition | None = _DEFAULT,
    negative: Condition | None = _DEFAULT,
    grid: tuple[int, int] | None = None,
    tolerance64: float | None = None,
    tolerance32: float | None = None,
    seed: int = 0,
) -> None:
    """Check everything that `Solver` promises: it inverts a block, guided as well, leaves no state behind, and keeps rows apart.

    Args:
        solver: the solver.
        block: a module that follows the `CausalBlock` protocol (it is checked first); `ReferenceBlock` if None. Perturbed copies are tried.
        shape: (B, N, d) of the trial tokens.
        condition: of the trial, B rows; labels 0 .. B-1 by default. None for an unconditional block.
        negative: a negative condition, B rows, for one of the guided trials; labels B-1 .. 0 by default. None leaves that trial out.
        grid: of the trial tokens.
        tolerance64: largest error in float64, relative to max(1, largest value); None: the solver's own `tolerance`, or 1e-10.
        tolerance32: largest error in float32; None: the solver's own `tolerance`, or 1e-4.
        seed: of the trial tokens and of the perturbation.

    Raises:
        AssertionError: what is broken, and by how much.
    """
    check_specification(solver, Solver)
    own = solver.tolerance
    tolerance64 = tolerance64 if tolerance64 is not None else 1e-10 if own is None else own
    tolerance32 = tolerance32 if tolerance32 is not None else 1e-4 if own is None else max(own, 1e-4)
    batch = shape[0]
    block = block if block is not None else ReferenceBlock(dim=shape[2], classes=max(5, batch))
    device = device_of(block)
    condition = Condition(labels=torch.arange(batch, device=device)) if condition is _DEFAULT else condition
    negative = Condition(labels=torch.arange(batch, device=device).flip(0)) if negative is _DEFAULT else negative
    check_block(block, shape=shape, condition=condition, grid=grid, seed=seed)
    ctx = Context(condition, grid)
    with torch.no_grad():
        for dtype, tolerance in ((torch.float64, tolerance64), (torch.float32, tolerance32)):
            trial = cast(CausalBlock, trial_block(block, dtype, seed))
            u = normal(*shape, seed=seed + 1, dtype=dtype).to(device)
            z = trial.coupling.forward(u, trial.params(u, ctx))[0].to(dtype)
            solution = solver(trial, z, ctx)
            _fields(solver, solution, z)
            close(solution.u, u, tolerance, solver, f"u and what the block made z from, in {dtype}")
        double = cast(CausalBlock, trial_block(block, torch.float64, seed))
        u = normal(*shape, seed=seed + 1).to(device)
        z = double.coupling.forward(u, double.params(u, ctx))[0]
        _contexts(solver, double, z, ctx, tolerance64)
        _state(solver, double, z, ctx, tolerance64)
        if double.coupling.affine(torch.zeros(1, 1, double.coupling.params_per_channel, 1)) is not None:
            _guided(solver, double, z, ctx, negative, tolerance64)


def _fields(solver: Solver, solution: Solution, z: Tensor) -> None:
    require(isinstance(solution, Solution), solver, f"returns a {type(solution).__name__}, not a Solution.")
    require(solution.u.shape == z.shape, solver, f"u has shape {tuple(solution.u.shape)}, expected {tuple(z.shape)}.")
    require(solution.u.dtype == z.dtype, solver, f"u is {solution.u.dtype} for z of {z.dtype}.")
    finite(solution.u, solver, "u")
    rows = (z.shape[0],)
    for name, dtypes in (("iterations", (torch.int64,)), ("residual", (torch.float32, torch.float64)), ("fallback", (torch.bool,))):
        field = getattr(solution, name)
        require(tuple(field.shape) == rows, solver, f"{name} has shape {tuple(field.shape)}, expected {rows}.")
        require(field.dtype in dtypes, solver, f"{name} is {field.dtype}, expected {dtypes[0]}.")
    require(bool((solution.iterations >= 1).all()), solver, f"iterations are {solution.iterations.tolist()}; there is at least one.")
    require(bool((solution.residual >= 0).all()), solver, f"residuals are {solution.residual.tolist()}; none is negative.")


def _contexts(solver: Solver, block: CausalBlock, z: Tensor, ctx: Context, tolerance: float) -> None:
    base = solver(block, z, ctx).u
    if isinstance(block, ReferenceBlock):  # which takes any number of tokens
        one = solver(block, z[:, :1], ctx).u
        close(one, base[:, :1], tolerance, solver, "the first token alone and among the others")
    if ctx.condition is not None:
        changed = ctx.replace(condition=ctx.condition.index(torch.arange(z.shape[0]).roll(1)))
        differ(solver(block, z, changed).u, base, solver, "the condition changes nothing.")
        close(
            solver(block, z, changed).u,
            _naive(block, z, changed),
            tolerance,
            solver,
            "another condition: u and the token-by-token reference",
        )
    warm = ctx.replace(attention_temperature=1.7)
    close(
        solver(block, z, warm).u, _naive(block, z, warm), tolerance, solver, "an attention temperature: u and the token-by-token reference"
    )
    per_row = ctx.replace(attention_temperature=torch.linspace(0.5, 2.0, z.shape[0], dtype=z.dtype))
    close(
        solver(block, z, per_row).u,
        _naive(block, z, per_row),
        tolerance,
        solver,
        "a temperature per row: u and the token-by-token reference",
    )


def _state(solver: Solver, block: CausalBlock, z: Tensor, ctx: Context, tolerance: float) -> None:
    before = _attributes(solver, block)
    kept = z.clone()
    first = solver(block, z, ctx).u
    require(torch.equal(z, kept), solver, "changes z in place.")
    row = ctx if ctx.condition is None else ctx.replace(condition=ctx.condition.index(slice(1, 2)))
    alone = solver(block, z[1:2], row).u
    close(alone, first[1:2], tolerance, solver, "a row alone and in a batch")
    other = z.clone()
    other[0] = 2.0 - z[0]
    mixed = solver(block, other, ctx).u
    close(mixed[1:], first[1:], tolerance, solver, "rows are not independent: the others before and after one row changed")
    close(solver(block, z, ctx).u, first, 0.0, solver, "state is left between calls: the first call and a repetition after other calls")
    after = _attributes(solver, block)
    changed = sorted(k for k in set(before) | set(after) if before.get(k) != after.get(k))
    require(not changed, solver, f"calls leave state behind in {', '.join(changed)}; it belongs to the call.")


def _attributes(solver: Solver, block: CausalBlock) -> dict[str, tuple[int, int]]:
    """Identity and length of every attribute of the solver and of the block's modules."""
    modules = block.named_modules() if isinstance(block, nn.Module) else []
    owners: list[tuple[str, Any]] = [("the solver", solver), *((f"the block{'.' if n else ''}{n}", m) for n, m in modules)]
    found: dict[str, tuple[int, int]] = {}
    for name, owner in owners:
        values = {**vars(owner), **getattr(owner, "_buffers", {})}
        found.update({f"{name}.{k}": (id(v), len(v) if isinstance(v, list | dict | set) else 0) for k, v in values.items()})
    return found


def _guided(solver: Solver, block: CausalBlock, z: Tensor, ctx: Context, negative: Condition | None, tolerance: float) -> None:
    plain = solver(block, z, ctx).u
    if ctx.condition is None or ctx.condition.labels is not None or negative is not None:
        off = Linear(0.0, negative=Negative(condition=negative, attention_temperature=1.3))
        close(solver(GuidedBlock(block, off), z, ctx).u, plain, tolerance, solver, "guidance of strength 0 and no guidance")
    trials: list[tuple[str, Guidance]] = []
    if ctx.condition is None or ctx.condition.labels is not None:  # the null text is known to a Flow, not to a block
        trials.append(("attention temperature", Linear(0.7, negative=Negative(attention_temperature=1.3))))
    if ctx.condition is not None and ctx.condition.labels is not None:
        trials.append(("null condition", Linear(0.7)))
        trials.append(("null condition, annealed strength", Linear(Annealed(0.7), what="shift")))
    if ctx.condition is not None and negative is not None:
        trials.append(("negative condition", Linear(0.7, negative=Negative(condition=negative))))
        both = Negative(condition=negative, attention_temperature=1.3)
        trials.append(("negative condition and temperature", Linear(0.7, negative=both)))
    for what, rule in trials:
        guided = solver(GuidedBlock(block, rule), z, ctx).u
        differ(guided, plain, solver, f"guidance by {what} changes nothing.")
        close(guided, _naive(block, z, ctx, rule), tolerance, solver, f"guidance by {what}: u and the token-by-token reference")


def _naive(block: CausalBlock, z: Tensor, ctx: Context, rule: Guidance | None = None) -> Tensor:
    """Token by token without a cache: every parameter comes from the whole `params`, one stream after the other."""
    tokens = z.shape[1]
    progress = torch.arange(tokens, dtype=z.dtype, device=z.device) / max(1, tokens - 1)
    u = torch.zeros_like(z)
    for i in range(tokens):
        here = slice(i, i + 1)
        params = block.params(u, ctx)[:, here]
        if rule is None:
            u[:, here] = block.coupling.inverse(z[:, here], params)
            continue
        positive = block.coupling.affine(params)
        other = block.coupling.affine(block.params(u, _negative(ctx, rule))[:, here])
        if positive is None or other is None:
            raise TypeError("guidance needs a coupling with an affine view")
        guided = rule(positive, other, progress[here])
        u[:, here] = z[:, here] * guided.log_scale.exp() + guided.shift
    return u


def _negative(ctx: Context, rule: Guidance) -> Context:
    condition = rule.negative.condition
    if condition is None and ctx.condition is not None and ctx.condition.labels is not None:
        condition = Condition(labels=torch.full_like(ctx.condition.labels, -1))
    return ctx.replace(condition=condition, attention_temperature=ctx.attention_temperature * rule.negative.attention_temperature)
