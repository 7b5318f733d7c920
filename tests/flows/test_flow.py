"""The flow's contracts, on perturbed parameters: exact inverse, exact log-determinant, densities, gradients, conditions, guidance."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from srcflow import artifacts
from srcflow.conditioners.class_table import ClassTable
from srcflow.conditioners.class_token import ClassToken
from srcflow.conditioners.text_prefix import TextPrefix
from srcflow.couplings.additive import Additive
from srcflow.couplings.affine import Affine
from srcflow.errors import ConfigError, ShapeError
from srcflow.flows import presets
from srcflow.flows.block import TransformerBlock, soft_clip
from srcflow.flows.flow import Flow, GuidanceWarning
from srcflow.flows.normalization import ChannelNormalization, Whitening
from srcflow.flows.positions import Learned, Rotary
from srcflow.guidance.base import Negative
from srcflow.guidance.gaussian import Gaussian
from srcflow.guidance.linear import Linear
from srcflow.guidance.schedules import Annealed, Interval
from srcflow.testing import check_block, perturb
from srcflow.testing.expect import finite
from srcflow.types import Condition, Context

GRID = (2, 3)


def fitted(flow: Flow) -> Flow:
    """With a normalisation that is not the identity."""
    if flow.normalization is not None:
        d = flow.channels
        root = torch.randn(d, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 0.3 + torch.eye(d, dtype=torch.float64)
        flow.normalization.fit(torch.linspace(-1, 1, d), (root @ root.T).to(torch.get_default_dtype()))
    return flow


def text(batch: int = 2, length: int = 4, width: int = 5, seed: int = 3) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def block(**kwargs: object) -> TransformerBlock:
    settings: dict = {"channels": 3, "width": 32, "layers": 1, "positions": Rotary(GRID), "coupling": Affine(), "head_dim": 16, **kwargs}
    return TransformerBlock(**settings)


FLOWS = {
    "tarflow": lambda: presets.tarflow(GRID, 3, 32, 3, 1, num_classes=4, head_dim=16),
    "tarflow-unconditional": lambda: presets.tarflow(GRID, 3, 32, 2, 1, head_dim=16),
    "tarflow-volume-preserving": lambda: presets.tarflow(GRID, 3, 32, 2, 1, head_dim=16, volume_preserving=True),
    "starflow": lambda: presets.starflow(GRID, 3, 32, [1, 0, 2], head_dim=16),
    "starflow-text": lambda: presets.starflow(GRID, 3, 64, [1, 1, 2], head_dim=32, text_dim=5),
    "starflow-text-everywhere": lambda: presets.starflow(
        GRID, 3, 64, [1, 2], head_dim=32, text_dim=5, condition_blocks="all", deep_width=96
    ),
    "starflow-class": lambda: presets.starflow(GRID, 3, 64, [1, 1], head_dim=32, num_classes=4),
    "srcflow": lambda: fitted(presets.srcflow(GRID, 3, 32, [1, 1, 2], num_classes=4, head_dim=16)),
    "srcflow-token-whitening": lambda: fitted(
        presets.srcflow(
            GRID, 3, 64, [1, 2], num_classes=4, head_dim=32, condition="token", normalization="whitening", qk_norm=True, mlp="gated"
        )
    ),
    "options": lambda: fitted(
        Flow(
            [
                block(start="shift", norm="rms", mlp="gated", post_norm=True, bias=False, kv_heads=1, heads=3, clip=2.0, clip_what="both"),
                block(positions=Learned(GRID, 32), order="reverse", coupling=Additive(), qk_norm=True, final_norm=True),
                block(positions=Learned(GRID, 32), start="shift", order="reverse", conditioner=ClassTable(4, 32, null="learned")),
            ],
            ChannelNormalization(3),
        )
    ),
}


def condition_for(flow: Flow) -> Condition | None:
    if "labels" in flow.fields:
        return Condition(labels=torch.tensor([1, -1]))
    if "text" in flow.fields:
        return Condition(text=text().to(flow.prior_std.dtype), mask=torch.tensor([[True] * 4, [True, True, False, False]]))
    return None


def data(flow: Flow, batch: int = 2, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, flow.grid[0] * flow.grid[1], flow.channels, generator=g, dtype=torch.float64).to(flow.prior_std.dtype)


@pytest.fixture(params=FLOWS, ids=str)
def flow(request: pytest.FixtureRequest) -> Flow:
    torch.manual_seed(0)
    return perturb(FLOWS[request.param]()).eval()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_inverse(flow: Flow, dtype: torch.dtype, bound: float) -> None:
    flow = flow.to(dtype)
    x, condition = data(flow), condition_for(flow)
    z = flow(x, condition).z
    assert (z - x).abs().max() > 0.1  # the flow is not the identity
    back = flow.inverse(z, condition)
    finite(torch.stack([z, back]), flow, "z and its inverse")
    assert (back - x).abs().max() < bound


def test_log_det_is_the_jacobians(flow: Flow) -> None:
    flow = flow.double()
    x, condition = data(flow), condition_for(flow)
    out = flow(x, condition)
    for b in range(2):
        one = None if condition is None else condition.index(torch.tensor([b]))
        jacobian = torch.autograd.functional.jacobian(lambda t, one=one: flow(t, one).z.flatten(), x[b : b + 1])
        n = out.z[0].numel()
        expected = torch.linalg.slogdet(jacobian.reshape(n, n))[1]
        assert (out.logdet[b] - expected).abs() < 1e-8


def test_blocks_invert_one_by_one(flow: Flow) -> None:
    flow = flow.double()
    x, condition = data(flow), condition_for(flow)
    forward = [flow.normalize(x)[0]] + [o.z for o in flow.blocks_forward(x, condition)]
    backward = flow.blocks_inverse(forward[-1], condition)
    for a, b in zip(backward, forward[-2::-1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_extend_agrees_with_params_in_any_split(flow: Flow) -> None:
    flow = flow.double()
    x, condition = data(flow), flow.resolve(condition_for(flow), 2)
    ctx = Context(condition, None, 0.7)
    for b in flow.blocks:
        expected = b.params(x, ctx)
        for split in ([1] * 6, [6], [2, 1, 3], [4, 2]):
            state, first = b.start(ctx, 2, 6, x.dtype)
            parts, at = [first], 0
            for m in split:
                parts.append(b.extend(x[:, at : at + m], at, state))
                at += m
            torch.testing.assert_close(torch.cat(parts, 1)[:, :6], expected, atol=1e-10, rtol=0)
        # going back overwrites the cache
        state, _ = b.start(ctx, 2, 6, x.dtype)
        b.extend(x.flip(1)[:, :4], 0, state)
        torch.testing.assert_close(b.extend(x[:, :5], 0, state), expected[:, 1:], atol=1e-10, rtol=0)


def test_every_block_keeps_the_protocol(flow: Flow) -> None:
    condition = flow.resolve(condition_for(flow), 2)
    if condition is not None and condition.text is not None:
        condition = Condition(text=condition.text.double())
    for b in (b for b in flow.blocks if b.layer_count):
        check_block(b, shape=(2, 6, 3), condition=condition, grid=GRID)


def test_every_parameter_gets_a_gradient(flow: Flow) -> None:
    flow = flow.double()
    labels = Condition(labels=torch.tensor([0, 1, 2, 3, -1])) if "labels" in flow.fields else None
    condition = Condition(text=text(5).double()) if "text" in flow.fields else labels
    (-flow.log_prob(data(flow, 5), condition).mean()).backward()
    silent = [k for k, p in flow.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert not silent


def test_rows_do_not_see_each_other(flow: Flow) -> None:
    flow = flow.double()
    x, condition = data(flow), condition_for(flow)
    whole = flow.log_prob(x, condition)
    for b in range(2):
        one = None if condition is None else condition.index(slice(b, b + 1))
        torch.testing.assert_close(flow.log_prob(x[b : b + 1], one)[0], whole[b], atol=1e-12, rtol=0)


@pytest.mark.parametrize(("grid", "channels"), [((1, 1), 1), ((1, 2), 1), ((1, 1), 2)])
@pytest.mark.parametrize("coupling", ["exp", "softplus"])
def test_density_integrates_to_one(grid: tuple[int, int], channels: int, coupling: str) -> None:
    torch.manual_seed(0)
    make = presets.starflow if coupling == "softplus" else presets.tarflow
    layers = {"layers": [1, 1]} if coupling == "softplus" else {"blocks": 2, "layers": 1}
    flow = perturb(make(grid, channels, 32, head_dim=16, **layers), 0.1).double()
    dims, n, reach = grid[0] * grid[1] * channels, 1201, 12.0
    axis = torch.linspace(-reach, reach, n if dims == 1 else 161, dtype=torch.float64)
    points = torch.cartesian_prod(*[axis] * dims).reshape(-1, grid[0] * grid[1], channels)
    with torch.no_grad():
        mass = flow.log_prob(points).exp().sum() * (axis[1] - axis[0]) ** dims
    assert abs(float(mass) - 1.0) < 1e-3


def test_a_fresh_flow_is_the_identity() -> None:
    flow = presets.srcflow(GRID, 3, 32, [1, 1], num_classes=4, head_dim=16)
    x = data(flow)
    out = flow(x, Condition(labels=torch.tensor([0, 1])))
    assert torch.equal(out.z, x)
    assert not out.logdet.any()
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum((1, 2))
    torch.testing.assert_close(flow.log_prob(x, None), normal)


# --- conditions ----------------------------------------------------------------------------------------------------------------------


def test_null_class_is_the_mean_of_the_table_or_a_vector_of_its_own() -> None:
    table = ClassTable(3, 8, null="mean")
    torch.testing.assert_close(table.added(Condition(labels=torch.tensor([-1])))[0, 0], table.weight.mean(0))
    learned = ClassTable(3, 8, null="learned")
    assert torch.equal(learned.added(Condition(labels=torch.tensor([-1])))[0, 0], learned.weight[3])
    token = ClassToken(3, 8)
    assert torch.equal(token.prefix(Condition(labels=torch.tensor([-1, 2])))[:, 0], token.weight[[3, 2]])


@pytest.mark.parametrize("name", ["tarflow", "srcflow", "starflow-class"])
def test_no_condition_is_the_null_class(name: str) -> None:
    flow = perturb(FLOWS[name]())
    x = data(flow)
    assert torch.equal(flow.log_prob(x), flow.log_prob(x, Condition(labels=torch.tensor([-1, -1]))))
    assert not torch.allclose(flow.log_prob(x), flow.log_prob(x, Condition(labels=torch.tensor([0, 0]))))


def test_null_text_fills_in_for_missing_text() -> None:
    flow = perturb(FLOWS["starflow-text"]())
    x = data(flow)
    with pytest.raises(ConfigError, match="set_null"):
        flow(x)
    null = text(1, seed=9)[0]
    flow.set_null(null)
    explicit = flow.log_prob(x, Condition(text=null.expand(2, -1, -1)))
    assert torch.equal(flow.log_prob(x), explicit)
    mixed = flow.log_prob(x, Condition(labels=torch.tensor([-1, 0]), text=text()))
    assert torch.equal(mixed[0], explicit[0])
    assert torch.equal(mixed[1], flow.log_prob(x, Condition(text=text()))[1])


def test_masked_text_is_multiplied_before_the_map() -> None:
    prefix = TextPrefix(5, 8)
    t, mask = text(), torch.tensor([[True] * 4, [True, False, False, False]])
    expected = prefix.proj(t * mask[..., None])
    assert torch.equal(prefix.prefix(Condition(text=t, mask=mask)), expected)


def test_the_null_text_survives_being_saved(tmp_path: Path) -> None:
    flow = perturb(FLOWS["starflow-text"]())
    flow.set_null(text(1, seed=9)[0], torch.tensor([True, True, False, True]))
    again = artifacts.load(artifacts.save(tmp_path / "flow", flow), Flow)
    assert torch.equal(again.log_prob(data(flow)), flow.log_prob(data(flow)))
    plain = artifacts.load(artifacts.save(tmp_path / "plain", FLOWS["starflow-text"]()), Flow)
    assert plain.null_text is None


def test_class_log_probs_equal_one_by_one() -> None:
    flow = perturb(FLOWS["srcflow"]()).double()
    x = data(flow)
    expected = torch.stack([flow.log_prob(x, Condition(labels=torch.full((2,), y))) for y in range(4)], 1)
    torch.testing.assert_close(flow.class_log_probs(x), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("name", "condition", "words"),
    [
        ("starflow", Condition(labels=torch.tensor([0, 1])), "unconditional"),
        ("srcflow", Condition(labels=torch.tensor([0, 4])), r"-1 \.\. 3"),
        ("srcflow", Condition(labels=torch.tensor([0])), "1 rows for a batch of 2"),
        ("srcflow", Condition(text=text()), "conditioned on labels"),
    ],
)
def test_wrong_conditions_are_refused(name: str, condition: Condition, words: str) -> None:
    flow = FLOWS[name]()
    with pytest.raises((ConfigError, ShapeError), match=words):
        flow(data(flow), condition)


def test_wrong_shapes_are_refused() -> None:
    flow = FLOWS["starflow"]()
    with pytest.raises(ShapeError, match="channels = 3"):
        flow(torch.zeros(1, 6, 4))
    with pytest.raises(ShapeError, match="2 x 3"):
        flow(torch.zeros(1, 5, 3))
    with pytest.raises(ShapeError, match="learned positions"):
        FLOWS["tarflow-unconditional"]()(torch.zeros(1, 6, 3), grid=(3, 2))


def test_rotary_flows_take_other_grids() -> None:
    flow = perturb(FLOWS["starflow"]()).double()
    x = torch.randn(2, 12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = flow(x, grid=(4, 3)).z
    torch.testing.assert_close(flow.inverse(z, grid=(4, 3)), x, atol=1e-10, rtol=0)
    assert not torch.allclose(z, flow(x, grid=(3, 4)).z)


# --- guidance and temperature --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guidance",
    [
        Gaussian(1.5),
        Gaussian(1.5, blocks="deep"),
        Gaussian(Interval(1.5, 0.3, 0.9)),
        Gaussian(1.5, negative=Negative(condition=Condition(labels=torch.tensor([3])))),
        Gaussian(1.5, negative=Negative(attention_temperature=0.5)),
        Gaussian(1.5, blocks="all", negative=Negative(attention_temperature=0.5)),
        Linear(1.5),
        Linear(1.5, what="log_scale"),
        Linear(1.5, what="shift"),
        Linear(Annealed(1.5)),
        Linear(3.0),
    ],
    ids=repr,
)
def test_each_knob_of_guidance_changes_the_result(guidance: Gaussian | Linear) -> None:
    flow = perturb(FLOWS["options" if guidance.blocks == "deep" else "srcflow"](), 0.1).double()
    z, condition = data(flow), Condition(labels=torch.tensor([1, 2]))
    results = [flow.inverse(z, condition, guidance=g) for g in (None, Gaussian(1.5), Linear(1.5), guidance)]
    finite(torch.stack(results), flow, "guided and plain inverses")
    same = [float((results[-1] - r).abs().max()) for r in results[:-1]]
    assert same[0] > 1e-6
    if repr(guidance) not in (repr(Gaussian(1.5)), repr(Linear(1.5))) and guidance.blocks != "deep":
        assert min(same) > 1e-6


def test_deep_guides_only_the_last_block_on_the_noise_side() -> None:
    flow = perturb(presets.tarflow(GRID, 3, 32, 3, [1, 2, 1], num_classes=4, head_dim=16), 0.1).double()
    assert flow.deep == 2
    z, condition = data(flow), Condition(labels=torch.tensor([1, 2]))
    plain, deep, everywhere = (flow.blocks_inverse(z, condition, guidance=g) for g in (None, Linear(1.5, blocks="deep"), Linear(1.5)))
    finite(torch.stack([*plain, *deep, *everywhere]), flow, "guided and plain inverses of every block")
    assert torch.equal(deep[0], everywhere[0])
    assert not torch.allclose(plain[0], deep[0])
    assert not torch.allclose(deep[1], everywhere[1])


def test_autoguidance_uses_the_other_flow() -> None:
    flow, other = (perturb(FLOWS["starflow"](), 0.1, seed=s).double() for s in (0, 1))
    z = data(flow)
    guided = flow.inverse(z, guidance=Gaussian(1.0, blocks="all", negative=Negative(flow=other)))
    finite(guided, flow, "the guided inverse")
    assert not torch.allclose(guided, flow.inverse(z))
    itself = flow.inverse(z, guidance=Gaussian(1.0, blocks="all", negative=Negative(flow=flow)))
    torch.testing.assert_close(itself, flow.inverse(z), atol=1e-10, rtol=0)
    with pytest.raises(ConfigError, match="same blocks"):
        flow.inverse(z, guidance=Gaussian(1.0, blocks="all", negative=Negative(flow=FLOWS["tarflow-unconditional"]())))


def test_guidance_that_cannot_act_warns_and_does_nothing() -> None:
    flow = perturb(FLOWS["starflow"]()).double()
    z = data(flow)
    with pytest.warns(GuidanceWarning, match="no block sees a condition"):
        assert torch.equal(flow.inverse(z, guidance=Linear(2.0)), flow.inverse(z))


def test_guidance_needs_an_affine_view() -> None:
    class Opaque(Affine):
        def affine(self, params: Tensor) -> None:
            return None

    flow = Flow([block(coupling=Opaque(), conditioner=ClassTable(4, 32))])
    with pytest.raises(ConfigError, match="no affine view"):
        flow.inverse(data(flow), Condition(labels=torch.tensor([0, 1])), guidance=Linear(1.0))


def test_attention_temperature_per_row() -> None:
    flow = perturb(FLOWS["starflow"](), 0.3).double()
    z = data(flow)
    both = flow.inverse(z, attention_temperature=torch.tensor([1.0, 0.5]))
    finite(both, flow, "the inverse")
    torch.testing.assert_close(both[:1], flow.inverse(z[:1]), atol=1e-10, rtol=0)
    torch.testing.assert_close(both[1:], flow.inverse(z[1:], attention_temperature=0.5), atol=1e-10, rtol=0)
    assert not torch.allclose(both[1:], flow.inverse(z[1:]))


def test_temperature_multiplies_the_noise() -> None:
    flow = perturb(FLOWS["starflow"]()).double()
    z = data(flow)
    assert torch.equal(flow.inverse(z, temperature=0.7), flow.inverse(0.7 * z))


# --- parts ---------------------------------------------------------------------------------------------------------------------------


def test_learned_prior_enters_log_prob_only() -> None:
    flow = perturb(FLOWS["tarflow-volume-preserving"]()).double()
    x = data(flow)
    before, z = flow.log_prob(x), flow(x).z
    flow.update_prior(z, rate=0.5)
    expected = (0.5 + 0.5 * z.square().mean(0)).sqrt()
    torch.testing.assert_close(flow.prior_std, expected)
    assert torch.equal(flow(x).z, z)
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), flow.prior_std)
    torch.testing.assert_close(flow.log_prob(x), normal.log_prob(z).sum((1, 2)))
    assert not torch.allclose(flow.log_prob(x), before)


@pytest.mark.parametrize("make", [ChannelNormalization, Whitening])
def test_normalisation_gives_unit_covariance(make: type[ChannelNormalization] | type[Whitening]) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 4, 3, generator=g, dtype=torch.float64) @ torch.randn(3, 3, generator=g, dtype=torch.float64) + 2.0
    rows = x.flatten(0, 1)
    covariance = torch.cov(rows.T, correction=0)
    norm = make(3).double()
    norm.fit(rows.mean(0), covariance)
    y, _ = norm(x)
    found, expected = torch.cov(y.flatten(0, 1).T, correction=0), torch.eye(3, dtype=torch.float64)
    if make is ChannelNormalization:  # leaves the correlations
        found, expected = found.diagonal(), expected.diagonal()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(norm.inverse(y), x)


def test_normalisation_refuses_a_constant_channel() -> None:
    covariance = torch.diag(torch.tensor([1.0, 0.0]))
    for make in (ChannelNormalization, Whitening):
        with pytest.raises(ConfigError, match="does not vary"):
            make(2).fit(torch.zeros(2), covariance)


def test_a_bad_batch_does_not_spoil_the_learned_prior() -> None:
    flow = FLOWS["tarflow-volume-preserving"]()
    flow.update_prior(torch.full((2, 6, 3), float("nan")))
    assert torch.equal(flow.prior_std, torch.ones(6, 3))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: presets.srcflow(GRID, 3, 32, [1], condition="tabel", head_dim=16), "srcflow.condition = 'tabel'"),
        (lambda: presets.srcflow(GRID, 3, 32, [1], normalization="Channel", head_dim=16), "Known: channel, whitening, none"),
        (lambda: presets.srcflow(GRID, 3, 32, [1], num_classes=-1, head_dim=16), "num_classes = -1"),
        (lambda: presets.starflow(GRID, 3, 32, [1], condition_blocks="al", head_dim=16), "Known: deep, all"),
        (lambda: block(norm="layr"), "block.norm = 'layr'"),
        (lambda: block(mlp="gatd"), "block.mlp = 'gatd'"),
        (lambda: block(layers=-1), "block.layers = -1"),
        (lambda: block(clip=-1.0), "block.clip = -1.0"),
        (lambda: ClassTable(3, 8, null="lerned"), "Known: mean, learned"),
        (lambda: Gaussian(-3.0), "at least 0"),
        (lambda: Linear(Annealed(-1.0)), "at least 0"),
    ],
)
def test_typing_errors_are_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_shapes_can_be_tried_on_the_meta_device() -> None:
    with torch.device("meta"):
        flow = presets.srcflow(4, 8, 64, [1, 2], num_classes=3)
        out = flow(torch.empty(2, 16, 8), Condition(labels=torch.zeros(2, dtype=torch.long)))
    assert out.z.shape == (2, 16, 8)


def test_soft_clip_touches_what_it_names() -> None:
    p = torch.full((1, 1, 2, 3), 10.0)
    assert torch.equal(soft_clip(p, 0.0, (0,)), p)
    clipped = soft_clip(p, 4.0, (0,))
    assert float(clipped[0, 0, 0, 0]) == pytest.approx(4 * math.tanh(2.5))
    assert torch.equal(clipped[..., 1, :], p[..., 1, :])
    assert float(soft_clip(p, 4.0, None).max()) < 4.0


def test_denoise_moves_towards_the_mode() -> None:
    flow = presets.tarflow(GRID, 3, 32, 2, 1, head_dim=16).double()  # the identity: p is standard normal, grad log p = -x
    x = data(flow)
    torch.testing.assert_close(flow.denoise(x, 0.5), x - 0.25 * x)


def test_bf16_autocast_keeps_the_logdet_in_float32() -> None:
    flow = perturb(FLOWS["srcflow"]())
    x, condition = data(flow), condition_for(flow)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flow(x, condition)
        back = flow.inverse(out.z, condition)
    assert out.logdet.dtype == out.z.dtype == torch.float32
    exact = flow(x, condition)
    assert (out.logdet - exact.logdet).abs().max() < 0.05
    assert (back - x).abs().max() < 0.1


def test_checkpointing_and_compilation_leave_gradients_alone() -> None:
    x = data(FLOWS["srcflow"]())
    gradients = []
    for every in (0, 1, 2):
        torch.manual_seed(0)
        flow = perturb(FLOWS["srcflow"]())
        flow.set_checkpointing(every)
        flow.log_prob(x).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in flow.parameters() if p.grad is not None]))
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_the_imagenet_model_has_1_41_billion_parameters() -> None:
    with torch.device("meta"):
        flow = presets.srcflow(16)
    assert round(sum(p.numel() for p in flow.parameters()) / 1e9, 2) == 1.41
    assert [b.layer_count for b in flow.blocks] == [2, 2, 2, 2, 2, 18]
    assert flow.blocks[-1].order == "raster"
    assert flow.deep == 5


def test_presets_round_trip_through_their_specification(flow: Flow) -> None:
    from srcflow.registry import build, spec_of

    again = build(spec_of(flow), Flow)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in flow.state_dict().items()}
    again.load_state_dict(flow.state_dict())
    x, condition = data(flow), condition_for(flow)
    assert torch.equal(again(x, condition).z, flow(x, condition).z)


def test_blocks_agree_on_the_number_of_classes() -> None:
    with pytest.raises(ConfigError, match="declare the same field differently"):
        Flow([block(conditioner=ClassTable(5, 32)), block(conditioner=ClassTable(3, 32))])


def test_a_text_flow_refuses_labels_without_text() -> None:
    flow = perturb(presets.starflow(GRID, 3, 64, [1, 1], head_dim=32, text_dim=5))
    flow.set_null(text(1)[0])
    with pytest.raises(ConfigError, match="conditioned on text"):
        flow(data(flow), Condition(labels=torch.tensor([0, -1])))
    assert torch.equal(flow(data(flow), Condition(labels=torch.tensor([-1, -1]))).z, flow(data(flow)).z)


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_attention_temperature_may_be_any_tensor_of_one_or_a_number_per_row(shape: tuple[int, ...]) -> None:
    flow = perturb(FLOWS["srcflow"](), 0.1)
    z, condition, t = data(flow), Condition(labels=torch.tensor([1, 2])), torch.full(shape, 0.7)
    for guidance in (None, Gaussian(1.5, negative=Negative(attention_temperature=1.3))):
        expected = flow.inverse(z, condition, guidance=guidance, attention_temperature=0.7)
        finite(expected, flow, "the inverse")
        torch.testing.assert_close(flow.inverse(z, condition, guidance=guidance, attention_temperature=t), expected)
    with pytest.raises(ShapeError, match="one per row"):
        flow.inverse(z, condition, attention_temperature=torch.ones(3))


def test_text_of_other_shapes_is_refused() -> None:
    flow = perturb(presets.starflow(GRID, 3, 64, [1, 1], head_dim=32, text_dim=5))
    x, good = data(flow), text()
    for condition in (
        Condition(text=text(width=6)),
        Condition(text=good[0]),
        Condition(text=good, mask=torch.ones(2, 3, dtype=torch.bool)),
        Condition(text=good[..., 0]),
    ):
        with pytest.raises(ShapeError):
            flow(x, condition)
    with pytest.raises(ShapeError, match=r"the null text is \(L, 5\)"):
        flow.set_null(text(width=6)[0])


def test_published_residuals_are_not_rounded_to_autocasts_type() -> None:
    flow = perturb(FLOWS["tarflow"](), 0.1)
    seen = []
    flow.blocks[0].layers[0].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        flow(data(flow), Condition(labels=torch.tensor([1, 2])))
    assert seen == [torch.float32]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, about what its compiler looks at
def test_compiled_layers_give_the_same_and_sample_without_compiling_anew() -> None:
    flow = perturb(FLOWS["srcflow"](), 0.1)
    z, condition = data(flow), Condition(labels=torch.tensor([1, 2]))
    plain, sampled = flow(z, condition), flow.inverse(z, condition)
    flow.compile_layers()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(flow.inverse(z, condition), sampled)
    compiled = flow(z, condition)
    torch.testing.assert_close(compiled.z, plain.z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compiled.logdet, plain.logdet, atol=1e-4, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_a_learned_prior_written_without_its_variance_is_read(tmp_path: Path) -> None:
    flow = perturb(FLOWS["tarflow-volume-preserving"]())
    flow.set_prior(torch.full_like(flow.prior_std, 3.0))
    place = artifacts.save(tmp_path / "flow", flow)
    state = artifacts.read_tensors(place / artifacts.MODEL)
    del state["prior_var"]
    save_file(state, str(place / artifacts.MODEL))
    manifest = artifacts.read_manifest(place)
    del manifest["files"]
    (place / artifacts.MANIFEST).write_text(json.dumps({**manifest, "hash": artifacts.content_hash(place)}))
    again = artifacts.load(place, Flow)
    assert torch.equal(again.prior_std, flow.prior_std)
    assert again.prior_var is None
    again.update_prior(torch.zeros(2, *again.prior_std.shape))
    torch.testing.assert_close(again.prior_variance, torch.full_like(again.prior_std, 2.7))
    with pytest.raises(ConfigError, match="learn_prior"):
        FLOWS["tarflow"]().set_prior(again.prior_std)
    old = artifacts.load(place, Flow)
    artifacts.load_state(old, flow.state_dict(), what="a newer one")
    assert torch.equal(old.prior_variance, torch.full_like(old.prior_std, 3.0))


def test_the_prior_moves_in_place() -> None:
    """What holds on to the buffer (an average, DDP) sees it move."""
    flow = perturb(FLOWS["tarflow-volume-preserving"]())
    before = flow.prior_var
    flow.update_prior(torch.zeros(2, *flow.prior_std.shape))
    assert flow.prior_var is before
    torch.testing.assert_close(before, 0.9 * torch.ones_like(before))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("key", ["temperature", "attention_temperature"])
def test_what_is_no_temperature_is_refused(key: str, bad: float) -> None:
    flow, z = FLOWS["tarflow"](), torch.zeros(2, 6, 3)
    for value in (bad, torch.tensor([1.0, bad])) if key == "attention_temperature" else (bad,):
        for draw in (flow.inverse, flow.blocks_inverse):
            with pytest.raises(ConfigError, match=rf"^{key} = .*positive and finite"):
                draw(z, **{key: value})
