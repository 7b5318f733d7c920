"""Every option of TARFlow's and STARFlow's constructors: converted flows against a second, plain reading of the formulae (published.py).

The vectors of tests/reference pin what the published code computes for three configurations; the reference agrees with them and carries
that over to the others. Weights are random; float64 is compared to 1e-9, float32 at the tolerances of the vectors.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from srcflow import convert
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.compressors.identity import Identity
from srcflow.errors import ConfigError, SrcflowError
from srcflow.flows.flow import Flow
from srcflow.guidance.base import Guidance, Negative
from srcflow.guidance.gaussian import Gaussian
from srcflow.guidance.linear import Linear
from srcflow.guidance.schedules import Annealed
from srcflow.nn import patchify, unpatchify
from srcflow.noise import Constant
from srcflow.tasks.flow import FlowTask
from srcflow.types import Condition

from . import published
from .published import Grid, State, Stream
from .vectors import read

EXACT, FORWARD, INVERSE = 1e-9, 1e-5, 5e-5
DTYPES = (torch.float64, torch.float32)
ROWS, SIGMA = 2, 0.3

STARFLOW = {"in_channels": 3, "img_size": 3, "patch_size": 1, "channels": 32, "num_blocks": 2, "layers_per_block": [1, 2]}
STARFLOW |= {"head_dim": 16, "rope": True}
TARFLOW = {"in_channels": 2, "img_size": 6, "patch_size": 2, "channels": 32, "num_blocks": 2, "layers_per_block": 1, "head_dim": 16}
TEXT = {"head_dim": 24, "channels": 48, "txt_size": 4, "txt_dim": 10}
RELEASED = {"sos": True, "use_softplus": True, "use_final_norm": True, "seq_order": "L2R"}
THREE = {"num_blocks": 3, "layers_per_block": [1, 1, 2]}
ALL = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "norm_type": "rms_norm",
    "use_qk_norm": True,
    "use_post_norm": True,
    "use_swiglu": True,
    "use_bias": False,
    "soft_clip": 1.0,
    "top_block_channels": 40,
}


@dataclass(frozen=True)
class Case:
    """A configuration, and what a model of it is given.

    Args:
        kind: "tarflow" or "starflow".
        config: the constructor's arguments.
        grid: of the tokens, where it is not the one the model is built for.
        text: tokens of the text, where they are not as many as the model is built for.
        padded: the text's last tokens are padding.
        onehot: the text is a class as a single one-hot token.
    """

    kind: str
    config: dict[str, Any]
    grid: Grid | None = None
    text: int | None = None
    padded: bool = False
    onehot: bool = False


def star(grid: Grid | None = None, text: int | None = None, *, padded: bool = False, onehot: bool = False, **config: Any) -> Case:
    return Case("starflow", {**STARFLOW, **config}, grid, text, padded, onehot)


def tar(**config: Any) -> Case:
    return Case("tarflow", {**TARFLOW, **config})


CASES = {
    # one option each
    "plain": star(),
    "sos": star(sos=True),
    "softplus": star(use_softplus=True),
    "soft clip": star(soft_clip=0.3),
    "rms norm": star(norm_type="rms_norm"),
    "q/k norm": star(use_qk_norm=True),
    "post norm": star(use_post_norm=True),
    "gated MLP": star(use_swiglu=True),
    "no bias": star(use_bias=False),
    "final norm": star(use_final_norm=True),
    "L2R": star(seq_order="L2R", **THREE),
    "expansion": star(expansion=2),
    "gated expansion": star(expansion=3, use_swiglu=True),
    "more heads than width": star(num_heads=3),
    "grouped queries": star(num_heads=4, num_kv_heads=2),
    "one key": star(channels=48, num_kv_heads=1),
    "wide deep block": star(top_block_channels=48),
    "deep block of given heads": star(top_block_channels=40, num_heads=2),
    "rope side": star(pt_seq_len=7),
    "patches": star(in_channels=2, patch_size=2, img_size=6),
    "rectangle": star(grid=(2, 5)),
    "larger": star(grid=(4, 4)),
    "no layers in a lower block": star(num_blocks=3, layers_per_block=[1, 0, 2]),
    "no layers in the first block": star(num_blocks=3, layers_per_block=[0, 1, 1], seq_order="L2R"),
    "no layers in the deep block": star(num_blocks=3, layers_per_block=[2, 1, 0]),
    "no layers in the deep block, sos": star(layers_per_block=[1, 0], sos=True, use_final_norm=True, top_block_channels=40),
    "no layers but in the first block": star(num_blocks=3, layers_per_block=[1, 0, 0], use_softplus=True),
    "layers in the deep block only": star(num_blocks=3, layers_per_block=[0, 0, 1], top_block_channels=48, seq_order="L2R"),
    "no layers at all": star(layers_per_block=[0, 0], sos=True, seq_order="L2R"),
    "one number of layers": star(layers_per_block=1),
    "list of one": star(layers_per_block=[1], num_blocks=3),
    "one block": star(layers_per_block=2, num_blocks=1),
    # text
    "text in all blocks": star(**TEXT),
    "text in all blocks, sos": star(**TEXT, sos=True),
    "text in the deep block": star(**TEXT, cond_top_only=True),
    "padded text": star(**TEXT, cond_top_only=True, sos=True, padded=True),
    "padded text in all blocks": star(**TEXT, padded=True),
    "shorter text": star(**TEXT, text=2),
    "longer text on a rectangle": star(**TEXT, text=6, grid=(4, 2), pt_seq_len=5, sos=True),
    "text, softplus and clip, shifted": star(**TEXT, use_softplus=True, soft_clip=0.4, use_final_norm=True),
    "text and a deep block without layers": star(**TEXT, cond_top_only=True, layers_per_block=[1, 0]),
    "text in all blocks but an empty one": star(**TEXT, num_blocks=3, layers_per_block=[1, 0, 1]),
    "class": star(**{**TEXT, "txt_size": 1, "txt_dim": 6}, cond_top_only=True, sos=True, onehot=True),
    "text, wide heads": star(**{**TEXT, "head_dim": 32, "channels": 32}),
    # denoiser
    "denoiser": star(learnable_self_denoiser=True, layers_per_block=[1, 1]),
    "denoiser beside text": star(**TEXT, learnable_self_denoiser=True, cond_top_only=True, use_final_norm=True, layers_per_block=[1, 1]),
    "conditional denoiser": star(**TEXT, learnable_self_denoiser=True, conditional_denoiser=True, padded=True, grid=(2, 4)),
    # together
    "released": star(**TEXT, **RELEASED, **THREE, soft_clip=4.0, cond_top_only=True),
    "released without text": star(**RELEASED, soft_clip=4.0, grid=(3, 4)),
    "all": star(**TEXT, **RELEASED, **ALL, cond_top_only=True, padded=True, learnable_self_denoiser=True, conditional_denoiser=True),
    "all, in all blocks": star(**TEXT, **ALL, use_softplus=True, seq_order="L2R", grid=(2, 3), pt_seq_len=4),
    "all, without text": star(**{**RELEASED, **ALL, "in_channels": 1, "patch_size": 2, "img_size": 6, "learnable_self_denoiser": True}),
    # TARFlow
    "tarflow": tar(),
    "tarflow, classes": tar(num_blocks=3, layers_per_block=2, num_classes=4),
    "tarflow, volume-preserving": tar(nvp=False),
    "tarflow, volume-preserving, classes": tar(nvp=False, num_classes=3, expansion=2, patch_size=1, img_size=3),
    "tarflow, heads of 64": tar(channels=64, head_dim=64),
    "tarflow, one block": tar(num_blocks=1, layers_per_block=[2], num_classes=2, head_dim=8, expansion=3),
}


class Model:
    """A case with its weights and inputs in float64, and what the reference makes of them; converted flows of both precisions."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.config = case, case.config
        self.o = (published.tarflow_options if case.kind == "tarflow" else published.options)(case.config)
        self.state: State = published.random_state(case.kind, case.config, seed)
        self.grid: Grid = case.grid or (self.o["side"], self.o["side"])
        self.draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.x, self.noise = (self.draw(ROWS, math.prod(self.grid), self.o["D"]) for _ in range(2))
        self.positive = Stream(self.state, case.config)
        self.negative: Stream | None = None  # what guidance pushes away from; None where there is nothing to be told
        if case.kind == "tarflow" and self.o["num_classes"]:
            self.positive = self.positive._replace(labels=torch.tensor([1, -1]))
            self.negative = self.positive._replace(labels=None)
        elif case.onehot:
            ids = torch.eye(self.o["txt_dim"], dtype=torch.float64)
            self.positive = self.positive._replace(text=ids[[2, 4], None])
            self.negative = self.positive._replace(text=ids[[-1, -1], None])
        elif self.o["txt_size"]:
            length, size = case.text or self.o["txt_size"], self.o["txt_dim"]
            mask = torch.arange(length) < torch.tensor([[length - 1], [length - 2]]) if case.padded else None
            self.positive = self.positive._replace(text=self.draw(ROWS, length, size), mask=mask)
            null = None if mask is None else mask[:1].expand(ROWS, -1)
            self.negative = self.positive._replace(text=self.draw(1, length, size).expand(ROWS, -1, -1), mask=null)

    def forward(self, x: Tensor, stream: Stream | None = None) -> list[published.Block]:
        stream = stream or self.positive
        return published.tarflow_forward(stream, x) if self.case.kind == "tarflow" else published.starflow_forward(stream, x, self.grid)

    def steps(self, stream: Stream | None = None, **how: Any) -> list[Tensor]:
        stream = stream or self.positive
        with torch.no_grad():
            if self.case.kind == "tarflow":
                return published.tarflow_reverse(stream, self.noise, **how)
            return published.starflow_reverse(stream, self.noise, self.grid, **how)

    def reverse(self, stream: Stream | None = None, **how: Any) -> Tensor:
        return self.steps(stream, **how)[-1]

    @functools.cached_property
    def blocks(self) -> list[published.Block]:
        with torch.no_grad():
            return self.forward(self.x)

    @functools.cached_property
    def gradient(self) -> Tensor:
        return published.gradient(self.forward, self.x)

    @functools.cached_property
    def plain(self) -> Tensor:
        return self.plain_steps[-1]

    @functools.cached_property
    def plain_steps(self) -> list[Tensor]:
        return self.steps()

    @functools.cached_property
    def flows(self) -> dict[torch.dtype, Flow]:
        make = getattr(convert, self.case.kind)
        return {dtype: make({k: v.to(dtype) for k, v in self.state.items()}, **self.config) for dtype in DTYPES}

    def conditions(self, stream: Stream | None) -> Iterator[tuple[Flow, torch.dtype, Condition | None]]:
        """The flow of either precision, and what it is told for the stream."""
        for dtype, flow in self.flows.items():
            given = None
            if stream is not None and (stream.labels is not None or stream.text is not None):
                text = None if stream.text is None else stream.text.to(dtype)
                given = Condition(labels=stream.labels, text=text, mask=stream.mask)
            yield flow, dtype, given

    def start(self, flow: Flow, dtype: torch.dtype) -> Tensor:
        """The noise that a flow's inverse is given."""
        return self.noise.to(dtype) * (flow.prior_std if self.case.kind == "tarflow" else 1)


@functools.cache
def model(name: str) -> Model:
    return Model(CASES[name], seed=1 + list(CASES).index(name))


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """`tolerance` for float32, 1e-9 for float64."""
    assert actual.dtype in DTYPES
    atol = EXACT if actual.dtype == torch.float64 else tolerance
    torch.testing.assert_close(actual.detach().double(), expected.double(), atol=atol, rtol=0)


HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
"""What the likelihood per dimension has more than the published losses, which leave constants out."""


class Trained(FlowTask):
    """A flow as `training_step` trains it, on tokens that stand as features in the batch, without noise.

    Args:
        flow: the flow; a copy is used, without its denoiser, whose loss would be added.
        grid: of the tokens, where it is not the one the flow is built for.
        told: the condition, where the batch's labels do not tell it.
        latent_norm_weight: as for the task.
    """

    def __init__(self, flow: Flow, grid: Grid, told: Condition | None = None, latent_norm_weight: float = 0.0) -> None:
        super().__init__(copy.deepcopy(flow), "", noise=Constant(0.0), label_dropout=0.0, latent_norm_weight=latent_norm_weight)
        self.flow.self_denoiser = None
        self.told, self.tokens_grid = told, grid
        self.logged: dict[str, Tensor] = {}
        self.given: list[Tensor] = []
        self.set_outside("autoencoder", PixelPatches(8, 1, channels=flow.channels, scale="linear"))
        self.set_outside("compressor", Identity(flow.channels))
        strategy = SimpleNamespace(reduce=lambda value, reduce_op: value)
        self._trainer: Any = SimpleNamespace(global_step=0, current_epoch=0, log_every_n_steps=1, strategy=strategy)
        steps = self.flow.steps

        def watched(codes: Tensor, condition: Condition | None = None, *, grid: Grid | None = None) -> Any:
            self.given.append(codes.requires_grad_(True))
            return steps(codes, condition, grid=self.tokens_grid)

        self.flow.steps = watched  # type: ignore[method-assign,assignment]

    def loss(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss of tokens x (B, N, d), and its gradient with respect to them."""
        none = torch.full((len(x),), -1)
        batch: Any = {"features": x, "grid": self.tokens_grid, "indices": torch.arange(len(x)), "valid": none < 0}
        loss = self.training_step({**batch, "labels": none if labels is None else labels}, 0)
        (gradient,) = torch.autograd.grad(loss, self.given[-1])
        return loss, gradient

    def condition(self, batch: Any, *, dropout: bool) -> Condition | None:
        return super().condition(batch, dropout=dropout) if self.told is None else self.told

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        self.logged[name] = value

    def log_dict(self, dictionary: Any, *args: Any, **kwargs: Any) -> None:
        self.logged.update(dictionary)


# ---- the reference itself


def test_the_reference_computes_the_published_tarflow_numbers() -> None:
    config, state, given, out = read("tarflow_class")
    x, stream = published.tokens(given["x"], 2, "cpp"), Stream(state, config, labels=given["y"])
    pictures = functools.partial(published.images, p=2, order="cpp", grid=(4, 4))
    blocks = published.tarflow_forward(stream, x)
    gradient = published.gradient(functools.partial(published.tarflow_forward, stream), x)
    close(blocks[-1].z, out["z"], FORWARD)
    close(sum(b.logdet.mean((1, 2)) for b in blocks), out["logdet"], FORWARD)
    close(published.loss(blocks), out["loss"].squeeze(), FORWARD)
    close(pictures(gradient), out["grad_x"], FORWARD)
    close(pictures(published.denoised(x, SIGMA, gradient)), out["denoised"], FORWARD)
    stream = stream._replace(labels=given["y_reverse"])
    null = stream._replace(labels=None)
    for name, how in {"temp07": {"negative": null._replace(temperature=0.7)}, "a": {"what": "a"}, "annealed": {"annealed": True}}.items():
        steps = published.tarflow_reverse(stream, given["noise"], guidance=1.5, **{"negative": null, **how})
        close(pictures(steps[-1]), out[f"rev_g15_{name}"], INVERSE)


@pytest.mark.parametrize("name", ["starflow_uncond", "starflow_text_top"])
def test_the_reference_computes_the_published_starflow_numbers(name: str) -> None:
    config, state, given, out = read(name)
    grid = (config["img_size"], config["img_size"])
    pictures = functools.partial(published.images, p=1, order="ppc", grid=grid)
    x, noise = (published.tokens(given[k], 1, "ppc") for k in ("x", "noise"))
    stream = Stream(state, config, text=given.get("text"))
    blocks = published.starflow_forward(stream, x, grid)
    gradient = published.gradient(lambda x: published.starflow_forward(stream, x, grid), x)
    close(pictures(blocks[-1].z), out["z"], FORWARD)
    for k, block in enumerate(blocks):
        close(block.logdet, out[f"logdet{k}"], FORWARD)
    close(published.loss(blocks), out["loss"].squeeze(), FORWARD)
    close(published.latent_norm(x, blocks), out["reg_sum_mean_sq"].squeeze(), FORWARD)
    close(pictures(gradient), out["grad_x"], FORWARD)
    close(pictures(published.denoised(x, SIGMA, gradient)), out["denoised"], FORWARD)
    if stream.text is None:
        steps = published.starflow_reverse(stream._replace(temperature=0.8), noise, grid)
        close(pictures(steps[-1]), out["rev_plain_temp08"], INVERSE)
    else:
        null = stream._replace(text=given["text_null"])
        close(pictures(published.starflow_reverse(stream, noise, grid, guidance=2.0, negative=null)[-1]), out["rev_g2"], INVERSE)


def test_the_random_models_exercise_what_they_are_to_test() -> None:
    for name in CASES:
        m = model(name)
        for k, block in enumerate(m.blocks):
            if m.case.kind == "starflow" and published.is_identity(m.o, k):
                continue
            spread = float((block.logdet if m.config.get("nvp", True) else block.m).std())
            assert 0.04 < spread < 0.8, (name, k, spread)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("sos", {"sos": False}),
        ("softplus", {"use_softplus": False}),
        ("soft clip", {"soft_clip": 0.0}),
        ("L2R", {"seq_order": "R2L"}),
        ("rope side", {"pt_seq_len": None}),
        ("q/k norm", {"use_qk_norm": False}),
        ("post norm", {"use_post_norm": False}),
        ("final norm", {"use_final_norm": False}),
        ("grouped queries", {"head_dim": 8, "num_heads": 8, "num_kv_heads": 4}),
        ("text in all blocks", {"txt_size": 0}),
        ("text in all blocks", {"cond_top_only": True}),
        ("shorter text", {"pt_seq_len": 5}),
    ],
)
def test_the_reference_feels_its_options(name: str, change: dict[str, Any]) -> None:
    m = model(name)
    other = m.forward(m.x, m.positive._replace(config={**m.config, **change}))
    assert float((other[-1].z - m.blocks[-1].z).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["padded text", "padded text in all blocks", "all"])
def test_the_reference_feels_the_mask(name: str) -> None:
    m = model(name)
    assert float((m.forward(m.x, m.positive._replace(mask=None))[-1].z - m.blocks[-1].z).abs().max()) > 1e-3


# ---- every case


@pytest.mark.parametrize("name", CASES)
def test_data_to_noise(name: str) -> None:
    """Outputs, parameters and log-determinants of every block; the denoised sample, the likelihood."""
    m = model(name)
    dims = m.x[0].numel()
    for flow, dtype, told in m.conditions(m.positive):
        with torch.no_grad():
            steps = flow.blocks_forward(m.x.to(dtype), told, grid=m.grid)
        assert len(steps) == len(m.blocks)
        for k, (step, expected) in enumerate(zip(steps, m.blocks, strict=True)):
            close(step.z, expected.z, FORWARD)
            close(step.logdet, expected.logdet, FORWARD)
            wanted = [expected.a, expected.m] if m.config.get("nvp", True) else [expected.m]
            close(step.params, torch.stack(wanted, 2), FORWARD)
            assert step.params.shape[2] == len(wanted), k
        close(flow.denoise(m.x.to(dtype), SIGMA, told, grid=m.grid), published.denoised(m.x, SIGMA, m.gradient), FORWARD)
        with torch.no_grad():
            whole = flow(m.x.to(dtype), told, grid=m.grid)
        total = sum(b.logdet.sum((1, 2)) for b in m.blocks)
        close(whole.z, m.blocks[-1].z, FORWARD)
        close(whole.logdet / dims, total / dims, FORWARD)
        if m.case.kind == "tarflow":  # whose prior may have a variance of its own
            var = m.state["var"]
            prior = -0.5 * (m.blocks[-1].z.square() / var + var.log() + math.log(2 * math.pi)).sum((1, 2))
            close(flow.log_prob(m.x.to(dtype), told) / dims, (prior + total) / dims, FORWARD)


@pytest.mark.parametrize("name", CASES)
def test_the_training_step_has_the_published_loss_its_gradient_and_the_latent_norm(name: str) -> None:
    m = model(name)
    norm = published.latent_norm(m.x, m.blocks)
    for flow, dtype, told in m.conditions(m.positive):
        plain, task = (Trained(flow, m.grid, told, weight) for weight in (0.0, 0.25))
        loss, gradient = plain.loss(m.x.to(dtype))
        regularised, _ = task.loss(m.x.to(dtype))
        close(loss - HALF_LOG_2PI, published.loss(m.blocks), FORWARD)
        close(gradient, m.gradient, FORWARD)
        close(task.logged["train/latent_norm"], norm, FORWARD)
        close(regularised - loss, 0.25 * norm, FORWARD)
        close(task.logged["train/nll"], plain.logged["train/nll"], FORWARD)


def test_the_training_step_computes_the_published_tarflow_numbers() -> None:
    """The labels come from the batch, the null class among them."""
    vector = read("tarflow_class")
    assert (vector.given["y"] == -1).any()
    task = Trained(convert.tarflow(vector.state, **vector.config), (4, 4))
    loss, gradient = task.loss(published.tokens(vector.given["x"], 2, "cpp"), vector.given["y"])
    close(loss - HALF_LOG_2PI, vector.out["loss"].squeeze(), FORWARD)
    close(published.images(gradient, 2, "cpp", (4, 4)), vector.out["grad_x"], FORWARD)
    close(task.logged["train/logdet"], vector.out["logdet"].mean(), FORWARD)
    close(task.logged["train/prior"] - HALF_LOG_2PI, 0.5 * vector.out["z"].square().mean(), FORWARD)


@pytest.mark.parametrize("name", ["starflow_uncond", "starflow_text_top"])
def test_the_training_step_computes_the_published_starflow_numbers(name: str) -> None:
    vector = read(name)
    grid = (vector.config["img_size"], vector.config["img_size"])
    told = Condition(text=vector.given["text"]) if "text" in vector.given else None
    flow = convert.starflow(vector.state, **vector.config)
    task = Trained(flow, grid, told, latent_norm_weight=0.5)
    x, norm = published.tokens(vector.given["x"], 1, "ppc"), vector.out["reg_sum_mean_sq"].squeeze()
    loss, _ = task.loss(x)
    close(loss - HALF_LOG_2PI - 0.5 * norm, vector.out["loss"].squeeze(), FORWARD)
    close(task.logged["train/latent_norm"], norm, FORWARD)
    close(published.images(Trained(flow, grid, told).loss(x)[1], 1, "ppc", grid), vector.out["grad_x"], FORWARD)


@pytest.mark.parametrize("name", CASES)
def test_noise_to_data(name: str) -> None:
    """Every block undone; where there is something to be told also with guidance, TARFlow's rule or STARFlow's as they are by default."""
    m = model(name)
    for flow, dtype, told in m.conditions(m.positive):
        for actual, expected in zip(flow.blocks_inverse(m.start(flow, dtype), told, grid=m.grid), m.plain_steps, strict=True):
            close(actual, expected, INVERSE)
    if m.negative is None:
        return
    guided = m.reverse(guidance=1.5, negative=m.negative)
    moved = float((guided - m.plain).abs().max())
    told_matters = m.case.kind == "tarflow" or m.o["layers"][-1] > 0  # without layers the text never meets the image
    assert moved > 1e-2 if told_matters else moved < 1e-12
    nulls = {dtype: null for _, dtype, null in m.conditions(m.negative)}
    for flow, dtype, told in m.conditions(m.positive):
        away = Negative(condition=nulls[dtype])
        rule = Linear(1.5) if m.case.kind == "tarflow" else Gaussian(1.5, negative=away)
        close(flow.inverse(m.start(flow, dtype), told, grid=m.grid, guidance=rule), guided, INVERSE)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.config.get("learnable_self_denoiser")])
def test_learnable_denoisers(name: str) -> None:
    m = model(name)
    with torch.no_grad():
        expected = published.starflow_denoiser(m.positive, m.x, m.grid)
        assert float(expected.std()) > 0.04
        for flow, dtype, told in m.conditions(m.positive):
            close(flow.denoiser(m.x.to(dtype), told, grid=m.grid), expected, FORWARD)


# ---- streams


@pytest.mark.parametrize("name", ["tarflow, classes", "all", "text in all blocks"])
def test_attention_temperature_per_row(name: str) -> None:
    m, heat = model(name), torch.tensor([0.5, 1.7])
    expected = m.reverse(m.positive._replace(temperature=heat))
    assert float((expected - m.plain).abs().amax((1, 2)).min()) > 1e-3
    for flow, dtype, told in m.conditions(m.positive):
        close(flow.inverse(m.start(flow, dtype), told, grid=m.grid, attention_temperature=heat.to(dtype)), expected, INVERSE)


def test_attention_temperature_acts_in_both_streams_of_a_guided_starflow() -> None:
    m = model("released")
    assert m.negative is not None
    expected = m.reverse(m.positive._replace(temperature=0.5), guidance=1.5, negative=m.negative._replace(temperature=0.5))
    nulls = {dtype: null for _, dtype, null in m.conditions(m.negative)}
    for flow, dtype, told in m.conditions(m.positive):
        rule = Gaussian(1.5, negative=Negative(condition=nulls[dtype]))
        close(flow.inverse(m.noise.to(dtype), told, guidance=rule, attention_temperature=0.5), expected, INVERSE)


@pytest.mark.parametrize("name", ["tarflow", "tarflow, volume-preserving", "tarflow, heads of 64"])
@pytest.mark.parametrize(
    ("how", "rule"),
    [
        ({}, Linear(1.5, negative=Negative(attention_temperature=0.4))),
        ({"what": "a"}, Linear(1.5, what="log_scale", negative=Negative(attention_temperature=0.4))),
        ({"what": "b"}, Linear(1.5, what="shift", negative=Negative(attention_temperature=0.4))),
        ({"annealed": True}, Linear(Annealed(1.5), negative=Negative(attention_temperature=0.4))),
    ],
    ids=["both", "log_scale", "shift", "annealed"],
)
def test_unconditional_tarflows_are_guided_by_attention_temperature(name: str, how: dict[str, Any], rule: Guidance) -> None:
    m = model(name)
    expected = m.reverse(guidance=1.5, negative=m.positive._replace(temperature=0.4), **how)
    inert = not m.config.get("nvp", True) and how.get("what") == "a"
    moved = float((expected - m.plain).abs().max())
    assert moved == 0 if inert else moved > 1e-3
    for flow, dtype, _ in m.conditions(None):
        close(flow.inverse(m.start(flow, dtype), guidance=rule), expected, INVERSE)


def test_another_tarflow_is_the_negative_stream() -> None:
    m = model("tarflow, classes")
    weak = Model(tar(**{**m.config, "channels": 16, "layers_per_block": 1}), seed=99)
    negative = Stream(weak.state, weak.config, labels=torch.tensor([2, 0]), temperature=0.6)
    expected = m.reverse(guidance=0.3, negative=negative)
    for flow, dtype, told in m.conditions(m.positive):
        away = Negative(condition=Condition(labels=negative.labels), attention_temperature=0.6, flow=weak.flows[dtype])
        close(flow.inverse(m.start(flow, dtype), told, guidance=Linear(0.3, negative=away)), expected, INVERSE)


@pytest.mark.parametrize("blocks", ["deep", "all"])
@pytest.mark.parametrize("name", ["text in all blocks", "released without text"])
def test_another_starflow_is_the_negative_stream(name: str, blocks: Any) -> None:
    m = model(name)
    weak = Model(Case("starflow", {**m.config, "layers_per_block": [1, 1], "use_swiglu": True}, m.case.grid), seed=98)
    negative = Stream(weak.state, weak.config, text=m.positive.text)
    expected = m.reverse(guidance=0.8, negative=negative, top=blocks == "deep")
    for flow, dtype, told in m.conditions(m.positive):
        rule = Gaussian(0.8, blocks=blocks, negative=Negative(condition=told, flow=weak.flows[dtype]))
        close(flow.inverse(m.start(flow, dtype), told, grid=m.grid, guidance=rule), expected, INVERSE)


@pytest.mark.parametrize("layers", [[1, 2], [2, 1], [1, 1]], ids=str)
def test_guidance_of_the_top_block_alone_is_that_of_the_last_however_many_layers_it_has(layers: list[int]) -> None:
    m = Model(star(**TEXT, layers_per_block=layers), seed=97)
    expected, everywhere = (m.reverse(guidance=1.5, negative=m.negative, top=top) for top in (True, False))
    assert float((expected - everywhere).abs().max()) > 1e-3
    nulls = {dtype: null for _, dtype, null in m.conditions(m.negative)}
    for flow, dtype, told in m.conditions(m.positive):
        rule = Gaussian(1.5, blocks="deep", negative=Negative(condition=nulls[dtype]))
        close(flow.inverse(m.start(flow, dtype), told, guidance=rule), expected, INVERSE)


@pytest.mark.parametrize("name", ["text in all blocks", "padded text"])
def test_the_null_text_of_the_flow_is_the_default_negative_and_the_default_condition(name: str) -> None:
    m = Model(CASES[name], seed=96)
    assert m.negative is not None
    assert m.negative.text is not None
    mask = None if m.negative.mask is None else m.negative.mask[0]
    guided, null = m.reverse(guidance=1.5, negative=m.negative), m.forward(m.x, m.negative)[-1].z
    for flow, dtype, told in m.conditions(m.positive):
        flow.set_null(m.negative.text[0].to(dtype), mask)
        close(flow.inverse(m.start(flow, dtype), told, guidance=Gaussian(1.5)), guided, INVERSE)
        with torch.no_grad():
            close(flow(m.x.to(dtype)).z, null, FORWARD)


def test_labels_in_place_of_one_hot_texts_reach_every_block_and_the_denoiser() -> None:
    config = {**TEXT, "txt_size": 1, "txt_dim": 6, "learnable_self_denoiser": True, "conditional_denoiser": True}
    m = Model(star(**config, onehot=True), seed=95)
    expected = published.starflow_denoiser(m.positive, m.x, m.grid)
    for dtype in DTYPES:
        flow = convert.starflow({k: v.to(dtype) for k, v in m.state.items()}, **m.config, num_classes=5)
        told, x = Condition(labels=torch.tensor([2, 4])), m.x.to(dtype)
        with torch.no_grad():
            close(flow(x, told).z, m.blocks[-1].z, FORWARD)
            close(flow.denoiser(x, told), expected, FORWARD)
            close(flow(x).z, m.forward(m.x, m.negative)[-1].z, FORWARD)
        rule = Gaussian(1.5)
        close(flow.inverse(m.noise.to(dtype), told, guidance=rule), m.reverse(guidance=1.5, negative=m.negative), INVERSE)


# ---- what stands around the model


@pytest.mark.parametrize(("kind", "order"), [("tarflow", "cpp"), ("starflow", "ppc")])
def test_images_become_tokens_in_the_published_order(kind: str, order: Any) -> None:
    images = torch.randn(2, 3, 4, 6)
    tokens = published.tokens(images, 2, order)
    assert torch.equal(patchify(images, 2, order=order), tokens)
    assert torch.equal(unpatchify(tokens, 2, grid=(2, 3), order=order), images)


@pytest.mark.parametrize("name", ["all", "plain", "tarflow, classes"])
def test_buffers_that_nothing_reads_may_be_in_the_file_or_not(name: str) -> None:
    m = model(name)
    n = math.prod(m.grid)
    extra = {f"blocks.{k}.attn_mask": torch.ones(n, n).tril() for k in range(m.o["num_blocks"])}
    if m.case.kind == "starflow":
        extra |= {f"feat_rope.freqs_{part}": torch.zeros(n, m.o["head_dim"]) for part in ("cos", "sin")} | {"attn_mask": torch.ones(n, n)}
    flow = getattr(convert, m.case.kind)({k: v.float() for k, v in {**m.state, **extra}.items()}, **m.config)
    assert all(torch.equal(v, m.flows[torch.float32].state_dict()[k]) for k, v in flow.state_dict().items())


ACCEPTED = [
    ("hf_style_rope", False, True),
    ("use_mm_attn", False, True),
    ("shallow_block_local", False, True),
    ("use_pretrained_lm", None, "gemma2_2b"),
    ("denoiser_window", None, 4),
    ("local_attn_window", None, 4),
    ("temporal_causal", 0, 1),
    ("norm_type", "layer_norm", "none"),
    ("seq_order", "R2L", "R2R"),
]


@pytest.mark.parametrize(("argument", "accepted", "refused"), ACCEPTED)
def test_arguments_that_are_converted_at_one_value_only(argument: str, accepted: Any, refused: Any) -> None:
    m = model("plain")
    flow = convert.starflow(m.state, **{**m.config, argument: accepted, "use_checkpoint": 1, "use_checkpoint_mlp": 2})
    with torch.no_grad():
        close(flow(m.x).z, m.blocks[-1].z, FORWARD)
    with pytest.raises(SrcflowError, match=argument):
        convert.starflow(m.state, **{**m.config, argument: refused})


# ---- the way back


@pytest.mark.parametrize("name", [name for name in CASES if "expansion" not in name])
def test_the_way_back_returns_every_tensor_and_a_configuration_that_means_the_same(name: str) -> None:
    m = model(name)
    given, flow = {k: v.float() for k, v in m.state.items()}, m.flows[torch.float32]
    if m.case.kind == "tarflow":
        state, config = convert.to_tarflow(flow, in_channels=m.config["in_channels"])
        masks = {f"blocks.{k}.attn_mask" for k in range(m.o["num_blocks"])}
    else:
        state, config = convert.to_starflow(flow, in_channels=m.config["in_channels"], txt_size=m.config.get("txt_size"))
        masks = set()
    assert state.keys() == given.keys() | masks
    for key, value in given.items():
        assert torch.equal(state[key], value), key
    assert meaning(m.case.kind, config) == meaning(m.case.kind, m.config)
    again = getattr(convert, m.case.kind)(state, **config)
    assert again.state_dict().keys() == flow.state_dict().keys()
    told = next(told for _, dtype, told in m.conditions(m.positive) if dtype == torch.float32)
    with torch.no_grad():
        assert torch.equal(again(m.x.float(), told, grid=m.grid).z, flow(m.x.float(), told, grid=m.grid).z)


def meaning(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the several ways to write one thing."""
    o = (published.tarflow_options if kind == "tarflow" else published.options)(config)
    blocks = range(o["num_blocks"])
    by_block = {"width": published.width, "reads": published.reads_text, "heads": lambda o, k: published.heads(o, published.width(o, k))}
    if o["conditional_denoiser"] or o["learnable_self_denoiser"]:
        o["denoiser"] = (o["channels"], published.heads(o, o["channels"]))
    ways = ("num_heads", "num_kv_heads", "top_block_channels", "pt_seq_len", "layers_per_block", "cond_top_only", "channels")
    same = {k: [f(o, k) for k in blocks if o["layers"][k]] for k, f in by_block.items()}
    return {k: v for k, v in o.items() if k not in ways} | same


@pytest.mark.parametrize("name", ["expansion", "gated expansion"])
def test_another_expansion_than_four_cannot_be_written_as_starflow(name: str) -> None:
    with pytest.raises(ConfigError, match="expansion"):
        convert.to_starflow(model(name).flows[torch.float32], in_channels=3)
