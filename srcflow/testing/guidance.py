"""The contract of guidance rules."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any, Literal

import torch
from torch import Tensor

from srcflow.errors import ConfigError
from srcflow.guidance.base import Guidance, Negative
from srcflow.guidance.schedules import Annealed, Constant, Interval
from srcflow.testing.expect import check_specification, close, distance, fail, finite, normal, require
from srcflow.types import AffineParams

BLOCKS = ("conditioned", "deep", "all")


def check_guidance(rule: Callable[..., Guidance], *, alternatives: Mapping[str, Sequence[Any]] | None = None, seed: int = 0) -> None:
    """Check everything that `Guidance` promises, above all that every knob of the constructor does something.

    Args:
        rule: the class (or a factory) that takes `strength`, `blocks`, `negative` and knobs of its own by keyword.
        alternatives: for each knob at least two values that must give different results. Not needed for a knob annotated `Literal[...]`,
            or whose default is a bool or a number.
        seed: of the trial streams.

    Raises:
        AssertionError: what is broken, and by how much.
    """
    knobs = _knobs(rule, dict(alternatives or {}))
    fixed = {k: v[0] for k, v in knobs.items()}
    positive, negative = _streams(seed), _streams(seed + 2)
    progress = torch.linspace(0, 1, positive.shift.shape[1], dtype=torch.float64)

    def make(strength: Any, **changes: Any) -> Guidance:
        return rule(strength=strength, **{**fixed, **changes})

    _base_arguments(rule, make)
    check_specification(make(0.7), Guidance)
    check_specification(make(Annealed(0.7)), Guidance)
    for changes in _each(knobs):
        _neutral(make, changes, positive, negative, progress)
        _schedules(make, changes, positive, negative, progress)
        _elementwise(make(1.5, **changes), positive, negative, progress)
        _extremes(make, changes)
    for a, b in combinations((0.5, 1.0, 2.0), 2):
        _moves(rule, "strength", a, b, make(a)(positive, negative, progress), make(b)(positive, negative, progress))
    for name, values in knobs.items():
        results = [make(1.5, **{name: v})(positive, negative, progress) for v in values]
        for (a, ra), (b, rb) in combinations(zip(values, results, strict=True), 2):
            _moves(rule, name, a, b, ra, rb)


def _streams(seed: int) -> AffineParams:
    return AffineParams(0.5 * normal(2, 6, 3, seed=seed), normal(2, 6, 3, seed=seed + 1))


def _gap(a: AffineParams, b: AffineParams) -> float:
    return max(distance(a.log_scale, b.log_scale), distance(a.shift, b.shift))


def _moves(rule: object, name: str, a: Any, b: Any, ra: AffineParams, rb: AffineParams) -> None:
    require(_gap(ra, rb) > 1e-6, rule, f"the knob {name} does nothing: {a!r} and {b!r} give the same result.")


def _same(a: AffineParams, b: AffineParams, tolerance: float, subject: object, what: str) -> None:
    close(a.log_scale, b.log_scale, tolerance, subject, f"{what}: log_scale")
    close(a.shift, b.shift, tolerance, subject, f"{what}: shift")


def _knobs(rule: Callable[..., Guidance], alternatives: dict[str, Sequence[Any]]) -> dict[str, list[Any]]:
    constructor = rule.__init__ if isinstance(rule, type) else rule  # type: ignore[misc]
    parameters = {n: p for n, p in inspect.signature(constructor).parameters.items() if n != "self"}
    for name in ("strength", "blocks", "negative"):
        require(name in parameters, rule, f"takes no argument {name}.")
        del parameters[name]
    variadic = [n for n, p in parameters.items() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    require(not variadic, rule, f"takes *{', *'.join(variadic)}, which swallows misspelt arguments.")
    unknown = sorted(set(alternatives) - set(parameters))
    require(not unknown, rule, f"alternatives are given for {unknown}, which it does not take.")
    hints = typing.get_type_hints(constructor)
    return {n: list(alternatives[n]) if n in alternatives else _values(rule, n, p, hints.get(n)) for n, p in parameters.items()}


def _values(rule: Callable[..., Guidance], name: str, parameter: inspect.Parameter, hint: Any) -> list[Any]:
    default = parameter.default
    if typing.get_origin(hint) is Literal:
        options = list(typing.get_args(hint))
        return sorted(options, key=lambda v: v != default)
    if isinstance(default, bool):
        return [default, not default]
    if isinstance(default, int | float):
        whole = (default + 1, default - 1, 2 * default)
        steps = whole if isinstance(default, int) else (default / 2, 2 * default, default + 0.5, default - 0.5)
        for value in steps:
            if value == default:
                continue
            try:
                rule(strength=1.0, **{name: value})
            except ConfigError:
                continue
            return [default, value]
    return fail(rule, f"its knob {name} is not checked: give check_guidance two values of it, alternatives={{{name!r}: [...]}}.")


def _each(knobs: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """The defaults, then every knob on its own."""
    yield {}
    for name, values in knobs.items():
        for value in values[1:]:
            yield {name: value}


def _base_arguments(rule: Callable[..., Guidance], make: Callable[..., Guidance]) -> None:
    for blocks in BLOCKS:
        require(
            make(1.0, blocks=blocks).blocks == blocks, rule, f"blocks={blocks!r} is not kept: it says {make(1.0, blocks=blocks).blocks!r}."
        )
    try:
        make(1.0, blocks="none of these")
    except ConfigError:
        pass
    else:
        fail(rule, "an unknown value of blocks is not refused with a ConfigError.")
    negative = Negative(attention_temperature=1.5)
    require(make(1.0, negative=negative).negative is negative, rule, "the argument negative is not kept.")
    require(isinstance(make(1.0).negative, Negative), rule, "without the argument, negative is not a Negative().")
    require(make(0.0).strength.is_zero, rule, "strength 0 does not give a schedule that is zero.")
    require(not make(0.5).strength.is_zero, rule, "strength 0.5 gives a schedule that is zero.")


def _neutral(
    make: Callable[..., Guidance], changes: dict[str, Any], positive: AffineParams, negative: AffineParams, progress: Tensor
) -> None:
    where = f" ({changes})" if changes else ""
    off = make(0.0, **changes)
    _same(off(positive, negative, progress), positive, 1e-12, off, f"strength 0 changes the positive stream{where}")
    for strength in (0.5, 3.0):
        on = make(strength, **changes)
        _same(on(positive, positive, progress), positive, 1e-10, on, f"equal streams are changed by strength {strength}{where}")
        finite(torch.cat(list(on(positive, negative, progress))), on, f"the result at strength {strength}{where}")


def _schedules(
    make: Callable[..., Guidance], changes: dict[str, Any], positive: AffineParams, negative: AffineParams, progress: Tensor
) -> None:
    w = 1.5
    constant, number = make(Constant(w), **changes), make(w, **changes)
    _same(
        constant(positive, negative, progress),
        number(positive, negative, progress),
        1e-12,
        number,
        "a number and Constant(number) as strength",
    )
    for schedule in (Annealed(w), Interval(w, 0.3, 0.7)):
        rule = make(schedule, **changes)
        got = rule(positive, negative, progress)
        for i, strength in enumerate(schedule(progress).tolist()):
            token = slice(i, i + 1)
            alone = make(strength, **changes)(_run(positive, token), _run(negative, token), progress[token])
            what = f"{type(schedule).__name__} at progress {progress[i]:.2f} and the constant strength {strength:.3g} there"
            _same(_run(got, token), alone, 1e-10, rule, what)


def _run(params: AffineParams, tokens: slice) -> AffineParams:
    return AffineParams(params.log_scale[:, tokens], params.shift[:, tokens])


def _elementwise(rule: Guidance, positive: AffineParams, negative: AffineParams, progress: Tensor) -> None:
    before = [t.clone() for t in (*positive, *negative)]
    got = rule(positive, negative, progress)
    require(isinstance(got, AffineParams), rule, f"returns a {type(got).__name__}, not AffineParams.")
    same = all(bool((a == b).all()) for a, b in zip(before, (*positive, *negative), strict=True))
    require(same, rule, "changes its inputs in place.")
    for tokens in (slice(0, 1), slice(2, 5)):
        alone = rule(_run(positive, tokens), _run(negative, tokens), progress[tokens])
        _same(alone, _run(got, tokens), 1e-12, rule, "a run of tokens alone and the same tokens among others")
    row = rule(AffineParams(*(t[1:] for t in positive)), AffineParams(*(t[1:] for t in negative)), progress)
    _same(row, AffineParams(*(t[1:] for t in got)), 1e-12, rule, "a row alone and the same row in a batch")
    for dtype in (torch.float64, torch.float32):
        for at in (torch.float64, torch.float32):
            low = rule(AffineParams(*(t.to(dtype) for t in positive)), AffineParams(*(t.to(dtype) for t in negative)), progress.to(at))
            for what, t in (("log_scale", low.log_scale), ("shift", low.shift)):
                require(t.dtype == dtype, rule, f"{what} is {t.dtype} for streams of {dtype} and progress of {at}.")
                require(
                    t.shape == positive.shift.shape, rule, f"{what} has shape {tuple(t.shape)}, expected {tuple(positive.shift.shape)}."
                )


def _extremes(make: Callable[..., Guidance], changes: dict[str, Any]) -> None:
    corners = torch.tensor(list(product((-10.0, 0.0, 10.0), (-10.0, 10.0), (-10.0, 0.0, 10.0), (-10.0, 10.0))), dtype=torch.float32)
    positive = AffineParams(corners[:, 0].reshape(1, -1, 1), corners[:, 1].reshape(1, -1, 1))
    negative = AffineParams(corners[:, 2].reshape(1, -1, 1), corners[:, 3].reshape(1, -1, 1))
    progress = torch.linspace(0, 1, corners.shape[0])
    for strength in (0.5, 3.0):
        rule = make(strength, **changes)
        got = rule(positive, negative, progress)
        finite(torch.cat(list(got)), rule, f"the result at strength {strength} for log-scales and shifts up to 10")
