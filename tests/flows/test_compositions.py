"""Random compositions of `Flow`, in float64 and on perturbed parameters: what holds for every one of them.

A failing example prints as a `Trial` of plain values. The examples are the same in every run; `SRCFLOW_EXAMPLES=20 python -m pytest
tests/flows/test_compositions.py` draws twenty times as many, and others in every run.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from srcflow.conditioners.base import Conditioner
from srcflow.conditioners.class_table import ClassTable
from srcflow.conditioners.class_token import ClassToken
from srcflow.conditioners.text_prefix import TextPrefix
from srcflow.couplings.additive import Additive
from srcflow.couplings.affine import Affine
from srcflow.couplings.softplus_affine import SoftplusAffine
from srcflow.flows.block import TransformerBlock
from srcflow.flows.denoiser import Denoiser
from srcflow.flows.flow import Flow, GuidanceWarning
from srcflow.flows.normalization import ChannelNormalization, Whitening
from srcflow.flows.positions import Learned, Rotary
from srcflow.guidance.base import Guidance, Negative
from srcflow.guidance.gaussian import Gaussian
from srcflow.guidance.guided import GuidedBlock
from srcflow.guidance.linear import Linear
from srcflow.guidance.schedules import Annealed, Interval
from srcflow.nn.attention import Attention, Cache
from srcflow.nn.permutation import permute
from srcflow.registry import build, spec_of
from srcflow.solvers.base import Solver
from srcflow.testing import perturb
from srcflow.testing.expect import distance, finite, normal
from srcflow.types import CausalBlock, Condition, Context, Grid, Solution

from ..drawn import Feature, covering, every

FACTOR = int(os.environ.get("SRCFLOW_EXAMPLES", "1"))
CLASSES, TEXT_DIM, BATCH = 3, 2, 3
COUPLINGS = {"exp": Affine, "softplus": SoftplusAffine, "additive": Additive}
CONDITIONERS: dict[str, Callable[[int], Conditioner]] = {
    "mean table": lambda width: ClassTable(CLASSES, width, null="mean"),
    "learned table": lambda width: ClassTable(CLASSES, width, null="learned"),
    "token": lambda width: ClassToken(CLASSES, width),
    "biased token": lambda width: ClassToken(CLASSES, width, bias=True),
    "text": lambda width: TextPrefix(TEXT_DIM, width),
}
KINDS: dict[str | None, list[str | None]] = {
    None: [None],
    "labels": ["mean table", "learned table", "token", "biased token", "learned table", "token", None],
    "text": ["text", "text", None],
}


GRIDS: tuple[Grid, ...] = ((2, 3), (2, 2), (1, 4), (5, 1), (1, 1))
OTHER_CALL: Grid = (3, 2)
# what is drawn of a part's layers, of a block, of a flow and of a guidance rule: every value has to occur among a property's examples
LAYERS: dict[str, list[Any]] = {
    "expansion": [1.0, 1.7],
    "norm": ["layer", "rms"],
    "mlp": ["gelu", "gated"],
    "qk_norm": [False, True],
    "post_norm": [False, True],
    "bias": [False, True],
}
BLOCK: dict[str, list[Any]] = {
    "coupling": sorted(COUPLINGS),
    "start": ["sos", "shift"],
    "order": ["raster", "reverse"],
    "clip": [0.0, 0.5, 4.0],
    "clip_what": ["log_scale", "both"],
}
NORMALIZATIONS, TEMPERATURES = [None, "channel", "whitening"], [0.5, 1.0, 1.7]
RULES: dict[str, list[Any]] = {
    "name": ["linear", "gaussian"],
    "strength": [0.4, 1.5],
    "schedule": ["number", "annealed", "interval"],
    "what": ["both", "log_scale", "shift"],
    "blocks": ["conditioned", "deep", "all"],
    "temperature": [1.0, 0.6, 1.8],
    "condition": ["null", "one", "rows"],
}


def examples(n: int) -> settings:
    return settings(max_examples=n * FACTOR, derandomize=FACTOR == 1, deadline=None, database=None)


# --- what is drawn -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A flow and a batch for it."""

    blocks: list[dict[str, Any]]
    denoiser: dict[str, Any] | None
    grid: Grid  # the flow is built for
    call: Grid  # and called with
    channels: int
    kind: str | None
    normalization: str | None
    learn_prior: bool
    labels: list[int] | None
    lengths: list[int] | None  # of the rows' texts; None for no mask
    null_lengths: tuple[int, int | None]  # of the null text, and how much of it is not masked (None for no mask)
    temperatures: list[float]
    seed: int

    @property
    def tokens(self) -> int:
        return self.call[0] * self.call[1]

    def flow(self, seed: int = 0, std: float = 0.1) -> Flow:
        """Perturbed, its normalisation fitted, its null text set."""
        torch.manual_seed(self.seed + seed)
        norm = {None: None, "channel": ChannelNormalization(self.channels), "whitening": Whitening(self.channels)}[self.normalization]
        blocks = [TransformerBlock(self.channels, **self.parts(**s)) for s in self.blocks]
        denoiser = None if self.denoiser is None else Denoiser(self.channels, **self.parts(**self.denoiser))
        flow = Flow(blocks, norm, self.learn_prior, denoiser).double().eval()
        if norm is not None:
            root = torch.eye(self.channels, dtype=torch.float64) + 0.3 * normal(self.channels, self.channels, seed=self.seed)
            norm.fit(normal(self.channels, seed=self.seed + 1), root @ root.T)
        if self.learn_prior:
            flow.update_prior(normal(5, self.grid[0] * self.grid[1], self.channels, seed=self.seed + 2), rate=0.5)
        if "text" in flow.fields:
            length, kept = self.null_lengths
            flow.set_null(normal(length, TEXT_DIM, seed=self.seed + 3), None if kept is None else torch.arange(length) < kept)
        return perturb(flow, std, seed=self.seed + seed)

    def parts(self, *, positions: str, text_axis: bool, side: float | None, conditioner: str | None, **rest: Any) -> dict[str, Any]:
        """A block's or the denoiser's arguments."""
        rest["positions"] = Learned(self.grid, rest["width"]) if positions == "learned" else Rotary(self.grid, text_axis, side)
        rest["conditioner"] = None if conditioner is None else CONDITIONERS[conditioner](rest["width"])
        return {**rest, "coupling": COUPLINGS[rest["coupling"]]()} if "coupling" in rest else rest

    def data(self, seed: int = 0) -> Tensor:
        return normal(BATCH, self.tokens, self.channels, seed=self.seed + 10 + seed)

    def condition(self, flow: Flow, seed: int = 0) -> Condition | None:
        labels = None if self.labels is None else torch.tensor(self.labels).roll(seed)
        if "labels" in flow.fields:
            return None if labels is None else Condition(labels=labels)
        if not flow.fields or (labels is None and self.lengths is None):
            return None
        length = self.null_lengths[0] if labels is not None else max(self.lengths or [1])
        text = normal(BATCH, length, TEXT_DIM, seed=self.seed + 20 + seed)
        mask = None if self.lengths is None else torch.arange(length) < torch.tensor(self.lengths)[:, None]
        return Condition(labels=labels, text=text, mask=mask)


@st.composite
def layers(draw: st.DrawFn, kind: str | None, positions: list[str]) -> dict[str, Any]:
    """What a block and the denoiser have in common."""
    conditioner = draw(st.sampled_from(KINDS[kind]))
    where = draw(st.sampled_from(positions))
    prefix = conditioner in ("token", "biased token", "text")
    text_axis = where == "rotary" and (prefix or draw(st.integers(0, 5)) == 0)
    head_dim = draw(st.sampled_from([3, 8] if where == "learned" else [20, 24] if text_axis else [4, 8]))
    heads = draw(st.sampled_from([1, 2, 4]))
    own = draw(st.booleans())  # heads that do not fill the width
    return {
        "layers": draw(st.sampled_from([1, 2, 1, 0])),
        "width": draw(st.sampled_from([6, 10])) if own else heads * head_dim,
        "heads": heads if own else None,
        "kv_heads": draw(st.sampled_from([None, *(k for k in (1, 2) if heads % k == 0)])),
        "head_dim": head_dim,
        "positions": where,
        "text_axis": text_axis,
        "side": draw(st.sampled_from([None, None, 5.0])),
        "conditioner": conditioner,
        **{name: draw(st.sampled_from(values)) for name, values in LAYERS.items()},
        "final_norm": draw(st.booleans()),
    }


@st.composite
def block_settings(draw: st.DrawFn, kind: str | None, positions: list[str], order: str | None) -> dict[str, Any]:
    common = draw(layers(kind, positions))
    return {
        **common,
        "identity": draw(st.sampled_from([None, False])) if common["layers"] == 0 else None,
        **{name: draw(st.sampled_from(values)) for name, values in BLOCK.items() if name != "order" or order is None},
        **({} if order is None else {"order": order}),
    }


@st.composite
def trials(
    draw: st.DrawFn,
    grids: tuple[Grid, ...] = GRIDS,
    kinds: tuple[str | None, ...] = ("labels", "text", "labels", "text", None),
    channels: tuple[int, ...] = (1, 2, 3),
    learn_prior: bool | None = None,
    denoiser: bool = False,
    like: Trial | None = None,
) -> Trial:
    """Flows over grids of these shapes; those that are `like` another could be its negative."""
    kind, d = draw(st.sampled_from(kinds)), draw(st.sampled_from(channels))
    grid: Grid = draw(st.sampled_from(grids))
    call = draw(st.sampled_from([grid, grid, (grid[1], grid[0]), OTHER_CALL])) if learn_prior is None else grid
    orders: list[str | None] = [None] * draw(st.integers(1, 3))
    if like is not None:
        d, grid, call, orders = like.channels, like.grid, like.call, [s["order"] for s in like.blocks]
    positions = ["rotary"] if call != grid else ["learned", "rotary"]
    row, told = st.integers(0, CLASSES - 1), kind is not None
    labels = draw(st.lists(row, min_size=BATCH, max_size=BATCH)) if told and draw(st.sampled_from([True, True, False])) else None
    if labels is not None and draw(st.booleans()):
        labels[draw(st.integers(0, BATCH - 1))] = -1
    masked = kind == "text" and draw(st.sampled_from([True, True, False]))
    lengths = draw(st.lists(st.integers(1, 3), min_size=BATCH, max_size=BATCH)) if masked else None
    if lengths is not None and draw(st.booleans()):
        lengths[draw(st.integers(0, BATCH - 1))] = 0
    blocks = [draw(block_settings(kind, positions, order)) for order in orders]
    return Trial(
        blocks=blocks,
        denoiser=draw(layers(kind, positions)) if denoiser else None,
        grid=grid,
        call=call,
        channels=d,
        kind=kind,
        normalization=draw(st.sampled_from(NORMALIZATIONS)),
        learn_prior=draw(st.booleans()) if learn_prior is None else learn_prior,
        labels=labels,
        lengths=lengths,
        null_lengths=(draw(st.integers(1, 3)), draw(st.none() | st.integers(0, 2))) if kind == "text" else (1, None),
        temperatures=draw(st.lists(st.sampled_from(TEMPERATURES), min_size=BATCH, max_size=BATCH)),
        seed=draw(st.integers(0, 99)),
    )


def shown_by_layers(settings: dict[str, Any]) -> Iterator[Feature]:
    """What a block or a denoiser shows of `layers`; of what has no effect without layers, nothing if it has none."""
    yield "layers", settings["layers"]
    if not settings["layers"]:
        return
    yield from ((name, settings[name]) for name in (*LAYERS, "final_norm", "positions", "conditioner"))
    yield "heads", "own" if settings["heads"] else "of the width"
    if settings["heads"] != 1:
        yield "kv_heads", "fewer" if settings["kv_heads"] and settings["kv_heads"] != settings["heads"] else "as many"
    if settings["positions"] == "rotary":
        yield "side", "given" if settings["side"] else "the grid's"
        yield "text_axis", settings["text_axis"]


def shown(trial: Trial, *_: Any) -> Iterator[Feature]:
    """Every feature of a trial."""
    for s in trial.blocks:
        yield from shown_by_layers(s)
        if s["layers"] or s["identity"] is False:
            yield from ((name, s[name]) for name in BLOCK if name != "clip_what" or s["clip"])
        if not s["layers"]:
            yield "without layers", "no identity" if s["identity"] is False else "the identity"
    if trial.denoiser is not None:
        yield from ((f"denoiser's {name}", value) for name, value in shown_by_layers(trial.denoiser))
    yield from (("kind", trial.kind), ("channels", trial.channels), ("blocks", len(trial.blocks)))
    yield from (("normalization", trial.normalization), ("learn_prior", trial.learn_prior), ("grid", trial.grid))
    yield "call", "the grid" if trial.call == trial.grid else "other"
    yield from (("temperatures", t) for t in trial.temperatures)
    if trial.kind is not None:
        yield "labels", "none" if trial.labels is None else "a null row" if -1 in trial.labels else "rows"
    if trial.kind == "text":
        yield "lengths", "no mask" if trial.lengths is None else "an empty row" if 0 in trial.lengths else "a mask"
        yield "null text", "no mask" if trial.null_lengths[1] is None else "a mask"


def needed(
    grids: tuple[Grid, ...] = GRIDS,
    kinds: tuple[str | None, ...] = ("labels", "text", None),
    channels: tuple[int, ...] = (1, 2, 3),
    learn_prior: bool | None = None,
    denoiser: bool = False,
) -> set[Feature]:
    """What the examples of `trials` with the same arguments have to show."""
    of_layers: dict[str, Iterable[Any]] = {
        **LAYERS,
        "layers": [0, 1, 2],
        "final_norm": [False, True],
        "heads": ["own", "of the width"],
        "kv_heads": ["fewer", "as many"],
        "positions": ["learned", "rotary"],
        "side": ["given", "the grid's"],
        "text_axis": [False, True],
        "conditioner": {c for kind in kinds for c in KINDS[kind]},
    }
    found = every(**of_layers, **BLOCK, kind=kinds, channels=channels, blocks=[1, 2, 3], normalization=NORMALIZATIONS, grid=grids)
    found |= every(**{"without layers": ["no identity", "the identity"]}, temperatures=TEMPERATURES)
    found |= every(learn_prior=[False, True] if learn_prior is None else [learn_prior])
    found |= every(call=["the grid", "other"] if learn_prior is None else ["the grid"])
    if denoiser:
        found |= {(f"denoiser's {name}", value) for name, value in every(**of_layers)}
    if any(kind is not None for kind in kinds):
        found |= every(labels=["none", "a null row", "rows"])
    if "text" in kinds:
        found |= every(lengths=["no mask", "an empty row", "a mask"], **{"null text": ["no mask", "a mask"]})
    return found


def property_of(n: int, *more: Any, **arguments: Any) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """A property of `trials(**arguments)` and of `more`, that sees every feature in n examples."""
    return covering(examples(n), trials(**arguments), *more, features=shown, needed=needed(**arguments))


def close(actual: Tensor, expected: Tensor, bound: float = 1e-9) -> None:
    """Relative to the largest expected value, if that is above 1."""
    assert actual.shape == expected.shape
    assert distance(actual, expected) <= bound


def contexts(trial: Trial, flow: Flow) -> Context:
    resolved = flow.resolve(trial.condition(flow), BATCH)
    return Context(resolved, trial.call, torch.tensor(trial.temperatures, dtype=torch.float64))


def one_row(condition: Condition | None, i: int) -> Condition | None:
    return None if condition is None else condition.index(slice(i, i + 1))


# --- properties ----------------------------------------------------------------------------------------------------------------------


def inverts(trial: Trial) -> None:
    flow, x = trial.flow(), trial.data()
    condition = trial.condition(flow)
    with torch.no_grad():
        z = flow(x, condition, grid=trial.call).z
        finite(z, flow, "z")
        close(flow.inverse(z, condition, grid=trial.call), x)
        close(flow(flow.inverse(x, condition, grid=trial.call), condition, grid=trial.call).z, x)
    acts = [not b.identity and (b.start_kind == "sos" or trial.tokens > 1) for b in flow.blocks]
    assert (distance(z, flow.normalize(x)[0]) > 1e-3) == any(acts)


@property_of(80)
def test_inverse_undoes_forward_and_forward_the_inverse(trial: Trial) -> None:
    inverts(trial)


def has_the_jacobians_log_det(trial: Trial) -> None:
    flow, x = trial.flow(), trial.data().requires_grad_()
    out = flow(x, trial.condition(flow), grid=trial.call)
    columns = [torch.autograd.grad(y.sum(), x, retain_graph=True)[0].flatten(1) for y in out.z.flatten(1).unbind(1)]
    close(out.logdet, torch.linalg.slogdet(torch.stack(columns, 1))[1])


@property_of(30, channels=(1, 2))
def test_log_det_is_the_jacobians(trial: Trial) -> None:
    has_the_jacobians_log_det(trial)


def is_triangular(trial: Trial) -> None:
    flow, u = trial.flow(), trial.data().requires_grad_()
    ctx = contexts(trial, flow)
    for b in flow.blocks:
        params = b.params(u, ctx)
        z, logdet = b.coupling.forward(u, params)
        if b.identity:
            assert not params.any()
            continue
        for i in range(trial.tokens):
            probe = (params[:, i] * normal(*params[:, i].shape, seed=i)).sum()
            seen = torch.autograd.grad(probe, u, retain_graph=True)[0].abs().amax(-1) if probe.requires_grad else torch.zeros(BATCH, 1)
            assert not seen[:, i:].any(), f"token {i}'s parameters see tokens that do not come before it"
            if i:
                assert bool((seen[:, i - 1] > 0).all()), f"token {i}'s parameters do not see the one before it"
            columns = [torch.autograd.grad(y.sum(), u, retain_graph=True)[0] for y in z[:, i].unbind(-1)]
            close(logdet[:, i].sum(-1), torch.linalg.slogdet(torch.stack(columns, 1)[:, :, i])[1])
            assert not torch.stack(columns, 1)[:, :, i + 1 :].any()


@property_of(25)
def test_each_blocks_jacobian_is_triangular_in_its_own_order(trial: Trial) -> None:
    is_triangular(trial)


def extends(trial: Trial, runs: list[tuple[float, int]]) -> None:
    """A run (where, m) feeds m tokens, new ones, from somewhere in what has been fed so far (1: its end)."""
    flow = trial.flow()
    ctx = contexts(trial, flow)
    with torch.no_grad():
        for b in flow.blocks:
            state, first = b.start(ctx, BATCH, trial.tokens, torch.float64)
            close(first, b.params(trial.data(), ctx)[:, :1])
            u, end = trial.data(), 0
            for n, (where, m) in enumerate(runs):
                at = min(round(where * end), trial.tokens - 1)
                end = min(at + m, trial.tokens)
                u = torch.cat([u[:, :at], trial.data(n)[:, at:]], 1)
                got = b.extend(u[:, at:end], at, state)
                wanted = b.params(u, ctx)[:, at + 1 : end + 1]
                assert got.shape[1] == end - at
                close(got[:, : wanted.shape[1]], wanted)


@property_of(60, st.lists(st.tuples(st.sampled_from([1.0, 1.0, 0.0, 0.3, 0.7]), st.integers(1, 6)), min_size=1, max_size=8))
def test_extend_gives_what_params_gives_in_any_split_and_after_overwriting(trial: Trial, runs: list[tuple[float, int]]) -> None:
    extends(trial, runs)


class Chunks(Solver):
    """Inverts a block chunk by chunk: fixed-point sweeps over a chunk until it is exact, then the next."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    def __call__(self, block: CausalBlock, z: Tensor, ctx: Context) -> Solution:
        batch, tokens, _ = z.shape
        state, first = block.start(ctx, batch, tokens, z.dtype)
        u, at = torch.zeros_like(z), 0
        for m in itertools.cycle(self.sizes):
            end = min(at + m, tokens)
            for _ in range(end - at + 1):
                after = block.extend(u[:, at:end], at, state)
                u[:, at:end] = block.coupling.inverse(z[:, at:end], torch.cat([first, after[:, :-1]], 1))
            first, at = after[:, -1:], end
            if at == tokens:
                break
        rows = z.new_zeros(batch)
        return Solution(u, rows.long(), rows, rows.bool())


@property_of(30, st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_the_inverse_by_fixed_points_over_any_chunks_is_the_same(trial: Trial, sizes: list[int]) -> None:
    flow, z = trial.flow(), trial.data()
    arguments: dict[str, Any] = {
        "condition": trial.condition(flow),
        "grid": trial.call,
        "attention_temperature": torch.tensor(trial.temperatures, dtype=torch.float64),
    }
    close(flow.inverse(z, solver=Chunks(sizes), **arguments), flow.inverse(z, **arguments))


def keeps_rows_apart(trial: Trial) -> None:
    flow, x = trial.flow(), trial.data()
    condition, temperatures = trial.condition(flow), torch.tensor(trial.temperatures, dtype=torch.float64)
    with torch.no_grad():
        out = flow(x, condition, grid=trial.call)
        back = flow.inverse(x, condition, grid=trial.call, attention_temperature=temperatures)
        for i in range(BATCH):
            alone = flow(x[i : i + 1], one_row(condition, i), grid=trial.call)
            close(alone.z, out.z[i : i + 1])
            close(alone.logdet, out.logdet[i : i + 1])
            t = trial.temperatures[i]
            close(flow.inverse(x[i : i + 1], one_row(condition, i), grid=trial.call, attention_temperature=t), back[i : i + 1])


@property_of(30)
def test_rows_are_independent_each_at_its_own_temperature(trial: Trial) -> None:
    keeps_rows_apart(trial)


@property_of(20, st.booleans(), learn_prior=True)
def test_log_prob_is_the_priors_density_of_z_and_the_log_det(trial: Trial, learned: bool) -> None:
    trial = trial if learned else dataclasses.replace(trial, learn_prior=False)
    flow, x = trial.flow(), trial.data()
    condition = trial.condition(flow)
    with torch.no_grad():
        z, logdet = flow(x, condition)
        prior = torch.distributions.Normal(0.0, flow.prior_std if learned else torch.ones_like(flow.prior_std))
        close(flow.log_prob(x, condition), prior.log_prob(z).sum((1, 2)) + logdet)
    assert (distance(flow.prior_std, torch.ones_like(z[0])) > 1e-3) == learned


@property_of(15, grids=((1, 2), (2, 1), (1, 1)), channels=(1,), learn_prior=True, kinds=(None, "labels"))
def test_densities_integrate_to_one(trial: Trial) -> None:
    flow = dataclasses.replace(trial, blocks=[{**s, "clip": 0.5} for s in trial.blocks]).flow()  # no heavy tails
    axis = torch.linspace(-12, 12, 161, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * trial.tokens).reshape(-1, trial.tokens, 1)
    with torch.no_grad():
        mass = flow.log_prob(points).exp().sum() * (axis[1] - axis[0]) ** trial.tokens
    assert abs(float(mass) - 1.0) < 2e-3


@property_of(15, kinds=("labels",))
def test_densities_per_class_are_those_of_each_class(trial: Trial) -> None:
    trial = dataclasses.replace(trial, learn_prior=trial.learn_prior and trial.call == trial.grid)
    flow, x = trial.flow(), trial.data()
    if not flow.fields:
        return
    with torch.no_grad():
        each = [flow.log_prob(x, Condition(labels=torch.full((BATCH,), y)), grid=trial.call) for y in range(CLASSES)]
        close(flow.class_log_probs(x, grid=trial.call), torch.stack(each, 1))


def denoises_rows(trial: Trial) -> None:
    flow, x = trial.flow(), trial.data().requires_grad_()
    condition = trial.condition(flow)
    out = flow.denoiser(x, condition, grid=trial.call)
    with torch.no_grad():
        for i in range(BATCH):
            close(flow.denoiser(x[i : i + 1], one_row(condition, i), grid=trial.call), out[i : i + 1])
    one = torch.eye(trial.tokens, dtype=torch.bool)
    for i in range(trial.tokens):
        seen = torch.autograd.grad((out[:, i] * normal(*out[:, i].shape, seed=i)).sum(), x, retain_graph=True)[0].abs().amax(-1) > 0
        assert seen.all() if trial.denoiser is not None and trial.denoiser["layers"] else torch.equal(seen, one[i].expand(BATCH, -1))


@property_of(20, denoiser=True)
def test_the_denoiser_sees_every_token_of_its_row(trial: Trial) -> None:
    denoises_rows(trial)


@property_of(20, denoiser=True)
def test_specification_and_state_make_the_same_flow(trial: Trial) -> None:
    flow, x = trial.flow(), trial.data()
    again = build(json.loads(json.dumps(spec_of(flow))), Flow).double().eval()
    assert spec_of(again) == spec_of(flow)
    again.prepare_state(flow.state_dict())
    again.load_state_dict(flow.state_dict())
    condition = trial.condition(flow)
    with torch.no_grad():
        for a, b in zip(again(x, condition, grid=trial.call), flow(x, condition, grid=trial.call), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(again.inverse(x, condition, grid=trial.call), flow.inverse(x, condition, grid=trial.call))
        assert torch.equal(again.denoiser(x, condition, grid=trial.call), flow.denoiser(x, condition, grid=trial.call))


# --- guidance ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """A guidance rule, and its negative stream."""

    name: str
    strength: float
    schedule: str
    what: str
    blocks: str
    temperature: float
    condition: str  # of the negative stream: "null", "one" row for all, "rows"
    other: Trial | None  # the negative flow; the trial itself for one of the same composition

    def build(self, trial: Trial, flow: Flow) -> Guidance:
        schedules: dict[str, Any] = {
            "number": self.strength,
            "annealed": Annealed(self.strength),
            "interval": Interval(self.strength, 0.3, 0.7),
        }
        other = None if self.other is None else self.other.flow(seed=1)
        source, owner = (trial, flow) if self.other is None or other is None else (self.other, other)
        condition = None if self.condition == "null" else source.condition(owner, seed=1)
        if condition is not None and self.condition == "one":
            condition = condition.index(slice(0, 1))
        negative = Negative(condition, self.temperature, other)
        if self.name == "gaussian":
            return Gaussian(schedules[self.schedule], self.blocks, negative)  # type: ignore[arg-type]
        return Linear(schedules[self.schedule], self.what, self.blocks, negative)  # type: ignore[arg-type]


@st.composite
def guided_trials(draw: st.DrawFn) -> tuple[Trial, Rule]:
    trial = draw(trials())
    other = draw(st.sampled_from(["none", "none", "same", "different"]))
    rule = Rule(
        **{name: draw(st.sampled_from(values)) for name, values in RULES.items()},
        other={"none": None, "same": trial}[other] if other != "different" else draw(trials(like=trial)),
    )
    return trial, rule


def shown_by_both(case: tuple[Trial, Rule], *_: Any) -> Iterator[Feature]:
    """Every feature of a guided trial; what a rule does not look at it does not show."""
    trial, rule = case
    yield from shown(trial)
    for name in RULES:
        if (name != "what" or rule.name == "linear") and (name != "condition" or (rule.other or trial).kind is not None):
            yield f"rule's {name}", getattr(rule, name)
    yield "rule's other", "none" if rule.other is None else "same" if rule.other is trial else "different"


def guided_property_of(n: int, *more: Any) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """A property of `guided_trials` and of `more`, that sees every feature in n examples."""
    rules = {(f"rule's {name}", value) for name, value in every(**RULES, other=["none", "same", "different"])}
    return covering(examples(n), guided_trials(), *more, features=shown_by_both, needed=needed() | rules)


def log_scale_and_shift(block: TransformerBlock, params: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(block.coupling, Additive):
        return torch.zeros_like(params[..., 0, :]), params[..., 0, :]
    a, m = params.unbind(-2)
    return (F.softplus(a + 0.541324854612918).log() if isinstance(block.coupling, SoftplusAffine) else a), m


def by_hand(flow: Flow, k: int, u: Tensor, rule: Rule, guidance: Guidance, ctx: Context) -> tuple[Tensor, Tensor, Context]:
    """Guided log-scale and shift of every token of u in block k, and the negative stream's context."""
    other = guidance.negative.flow if isinstance(guidance.negative.flow, Flow) else flow
    given = guidance.negative.condition
    if given is not None and len(given) == 1:
        given = given.map(lambda t: torch.cat([t] * BATCH))
    below = Context(other.resolve(given, BATCH), ctx.grid, ctx.attention_temperature * rule.temperature)
    ac, mc = log_scale_and_shift(flow.blocks[k], flow.blocks[k].params(u, ctx))  # type: ignore[arg-type,operator]
    au, mu = log_scale_and_shift(other.blocks[k], other.blocks[k].params(u, below))  # type: ignore[arg-type,operator]
    n = u.shape[1]
    progress = torch.arange(n, dtype=torch.float64) / max(1, n - 1)
    inside = (progress >= 0.3) & (progress <= 0.7)
    w = {"number": torch.ones_like(progress), "annealed": progress, "interval": inside.double()}[rule.schedule]
    w = rule.strength * w[:, None]
    if rule.name == "gaussian":
        s = (torch.exp(ac) / torch.exp(au)).clamp(max=1.0) ** 2
        d = 1 + w - w * s
        return torch.log(torch.exp(ac) / d.sqrt()), ((1 + w) * mc - w * s * mu) / d, below
    a = ac + w * (ac - au) if rule.what in ("both", "log_scale") else ac
    return a, (mc + w * (mc - mu) if rule.what in ("both", "shift") else mc), below


def guided_blocks(flow: Flow, rule: Rule, other: Flow | None) -> set[int]:
    against = flow.blocks if other is None else other.blocks
    return {
        "all": {i for i, (b, o) in enumerate(zip(flow.blocks, against, strict=True)) if not (b.identity and o.identity)},
        "deep": {len(flow.blocks) - 1},
        "conditioned": {i for i, b in enumerate(flow.blocks) if b.conditioned},
    }[rule.blocks]


def is_the_guided_forwards_inverse(trial: Trial, rule: Rule) -> None:
    flow, z = trial.flow(), trial.data()
    guidance, condition = rule.build(trial, flow), trial.condition(flow)
    ctx = Context(flow.resolve(condition, BATCH), trial.call, 0.9)
    arguments: dict[str, Any] = {"condition": condition, "grid": trial.call, "guidance": guidance, "attention_temperature": 0.9}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GuidanceWarning)
        outputs = flow.blocks_inverse(z, temperature=0.8, **arguments)
    if caught:  # the caller is told that nothing is guided
        plain = flow.blocks_inverse(z, condition, grid=trial.call, temperature=0.8, attention_temperature=0.9)
        assert all(torch.equal(a, b) for a, b in zip(outputs, plain, strict=True))
    guided = guided_blocks(flow, rule, guidance.negative.flow)
    x = 0.8 * z
    with torch.no_grad():
        for k, out in zip(reversed(range(len(outputs))), outputs, strict=True):
            block: Any = flow.blocks[k]
            u, wanted = permute(out, block.order), permute(x, block.order)
            x = out
            if k not in guided:
                close(block.coupling.forward(u, block.params(u, ctx))[0], wanted)
                continue
            a, m, below = by_hand(flow, k, u, rule, guidance, ctx)
            close((u - m) * torch.exp(-a), wanted)
            if not caught:
                other = guidance.negative.flow.blocks[k] if isinstance(guidance.negative.flow, Flow) else None
                stream = GuidedBlock(block, guidance, negative_block=other, negative_condition=below.condition)
                close(stream.params(u, ctx), torch.stack([a, m], -2))


@guided_property_of(120)
def test_the_guided_inverse_solves_the_guided_forward_written_by_hand(case: tuple[Trial, Rule]) -> None:
    is_the_guided_forwards_inverse(*case)


@guided_property_of(30, st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_the_guided_inverse_is_the_same_over_any_chunks_and_row_by_row(case: tuple[Trial, Rule], sizes: list[int]) -> None:
    trial, rule = case
    flow, z = trial.flow(), trial.data()
    if rule.condition == "rows":
        rule = dataclasses.replace(rule, condition="one")
    condition = trial.condition(flow)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GuidanceWarning)
        rest: dict[str, Any] = {"grid": trial.call, "guidance": rule.build(trial, flow)}
        whole = flow.inverse(z, condition, **rest)
        close(flow.inverse(z, condition, solver=Chunks(sizes), **rest), whole)
        for i in range(BATCH):
            close(flow.inverse(z[i : i + 1], one_row(condition, i), **rest), whole[i : i + 1])


@guided_property_of(15)
def test_guidance_of_strength_zero_is_none(case: tuple[Trial, Rule]) -> None:
    trial, rule = case
    flow, z = trial.flow(), trial.data()
    condition = trial.condition(flow)
    guidance = dataclasses.replace(rule, strength=0.0).build(trial, flow)
    assert torch.equal(
        flow.inverse(z, condition, grid=trial.call, guidance=guidance, attention_temperature=0.9),
        flow.inverse(z, condition, grid=trial.call, attention_temperature=0.9),
    )


# --- and that they can fail ----------------------------------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {
    "layers": 1,
    "width": 8,
    "head_dim": 4,
    "positions": "rotary",
    "text_axis": False,
    "side": None,
    "coupling": "exp",
    "conditioner": "learned table",
}
ORDINARY = Trial(
    blocks=[
        {**PLAIN, "coupling": "softplus", "order": "reverse", "start": "shift", "positions": "learned"},
        {**PLAIN, "layers": 2, "heads": 4, "kv_heads": 2},
    ],
    denoiser={k: v for k, v in PLAIN.items() if k != "coupling"},
    grid=(2, 3),
    call=(2, 3),
    channels=2,
    kind="labels",
    normalization="whitening",
    learn_prior=False,
    labels=[0, 2, -1],
    lengths=None,
    null_lengths=(1, None),
    temperatures=[0.5, 1.0, 1.7],
    seed=0,
)
RULE = Rule("linear", 1.5, "annealed", "both", "all", 0.6, "rows", None)
GAUSSIAN = dataclasses.replace(RULE, name="gaussian", schedule="interval")


def stale(self: Cache, k: Tensor, v: Tensor, at: int, write: Any = Cache.write) -> tuple[Tensor, Tensor]:
    end = at + k.shape[2]
    if self.k is not None and self.v is not None and at < getattr(self, "end", 0):
        k, v = self.k[:, :, at:end].clone(), self.v[:, :, at:end].clone()
    self.end = end  # type: ignore[attr-defined]
    return write(self, k, v, at)  # type: ignore[no-any-return]


def altered(cls: type, name: str, change: Callable[..., Any]) -> tuple[type, str, Callable[..., Any]]:
    """A method whose result is changed."""
    original = getattr(cls, name)
    return cls, name, lambda self, *args, **kwargs: change(original(self, *args, **kwargs))


def replaced(cls: type, name: str, **wrong: Any) -> tuple[type, str, Callable[..., Any]]:
    """A method that is called with other arguments."""
    original = getattr(cls, name)
    return cls, name, lambda self, *args, **kwargs: original(self, *args, **{**kwargs, **wrong})


FAULTS = {
    "an inverse without its shift": (altered(Affine, "inverse", lambda x: x * 1.001), inverts),
    "a log-det of the wrong sign": (altered(SoftplusAffine, "forward", lambda out: (out[0], -out[1])), has_the_jacobians_log_det),
    "a normalisation without log-det": (altered(Whitening, "forward", lambda out: (out[0], 0 * out[1])), has_the_jacobians_log_det),
    "attention to what comes after": (replaced(Attention, "forward", causal=False), is_triangular),
    "a causal denoiser": (replaced(Attention, "forward", causal=True), denoises_rows),
    "a cache that is not overwritten": ((Cache, "write", stale), lambda t: extends(t, [(1.0, 4), (0.0, 3), (1.0, 2)])),
    "a token that sees one too few": (
        altered(TransformerBlock, "extend", lambda p: p.roll(1, 1)),
        lambda t: extends(t, [(1.0, 2), (1.0, 3)]),
    ),
    "rows that are mixed": (altered(ClassTable, "added", lambda h: h.mean(0, keepdim=True).expand_as(h)), keeps_rows_apart),
    "a negative temperature that is ignored": (
        altered(GuidedBlock, "_negative_context", lambda ctx: ctx.replace(attention_temperature=0.9)),
        lambda t: is_the_guided_forwards_inverse(t, RULE),
    ),
    "a wrong strength": (altered(Annealed, "__call__", lambda w: w.flip(0)), lambda t: is_the_guided_forwards_inverse(t, RULE)),
    "a wrong rule": (
        altered(Gaussian, "__call__", lambda p: p._replace(log_scale=p.log_scale + 1e-6)),
        lambda t: is_the_guided_forwards_inverse(t, GAUSSIAN),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (cls, method, wrong), holds = FAULTS[name]
    holds(ORDINARY)
    monkeypatch.setattr(cls, method, wrong)
    with pytest.raises(AssertionError):
        holds(ORDINARY)


def test_a_denoiser_alone_may_be_conditioned_on_classes() -> None:
    trial = dataclasses.replace(ORDINARY, blocks=[{**PLAIN, "conditioner": None}])
    flow = trial.flow()
    assert flow.denoiser(trial.data(), trial.condition(flow)).shape == (BATCH, 6, 2)
