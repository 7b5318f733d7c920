"""STARFlow: the published numbers from the published weights, and what contradicts the weights is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from srcflow import artifacts, convert
from srcflow.conditioners.class_token import ClassToken
from srcflow.couplings.additive import Additive
from srcflow.errors import ConfigError, ProblemsError, SrcflowError, WeightsError
from srcflow.flows import presets
from srcflow.flows.flow import Flow, GuidanceWarning
from srcflow.guidance.base import Negative
from srcflow.guidance.gaussian import Gaussian
from srcflow.guidance.schedules import Annealed
from srcflow.nn import patchify, unpatchify
from srcflow.testing import perturb
from srcflow.types import Condition

from .vectors import Vector, read


class Case(NamedTuple):
    """A vector, its flow, and the way between images and tokens."""

    vector: Vector
    flow: Flow
    side: int

    def tokens(self, images: Tensor) -> Tensor:
        return patchify(images, 1, order="ppc")

    def images(self, x: Tensor) -> Tensor:
        return unpatchify(x, 1, grid=(self.side, self.side), order="ppc")

    @property
    def condition(self) -> Condition | None:
        return Condition(text=self.vector.given["text"]) if "text" in self.vector.given else None


@pytest.fixture(scope="module", params=["starflow_uncond", "starflow_text_top"])
def case(request: pytest.FixtureRequest) -> Case:
    vector = read(request.param)
    return Case(vector, convert.starflow(vector.state, **vector.config), vector.config["img_size"])


@pytest.fixture(scope="module")
def text() -> Case:
    vector = read("starflow_text_top")
    return Case(vector, convert.starflow(vector.state, **vector.config), vector.config["img_size"])


def test_noise_log_determinants_loss_and_gradient_are_the_published_ones(case: Case) -> None:
    given, expected, flow = case.vector.given, case.vector.out, case.flow
    x = case.tokens(given["x"]).requires_grad_(True)
    steps = flow.steps(x, case.condition)
    z, dims = steps.blocks[-1].z, x[0].numel()
    loss = 0.5 * z.square().mean() - steps.logdet.mean() / dims
    penalty = sum((o.z.square().mean() for o in steps.blocks[:-1]), start=steps.y.square().mean())
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(case.images(z), expected["z"], atol=1e-5, rtol=0)
    torch.testing.assert_close(steps.logdet / dims, expected["logdet_per_dim"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, expected["loss"].squeeze(), atol=1e-5, rtol=0)
    torch.testing.assert_close(penalty, expected["reg_sum_mean_sq"].squeeze(), atol=1e-5, rtol=0)
    torch.testing.assert_close(case.images(gradient), expected["grad_x"], atol=1e-5, rtol=0)
    denoised = case.images(flow.denoise(case.tokens(given["x"]), 0.3, case.condition))
    torch.testing.assert_close(denoised, expected["denoised"], atol=1e-5, rtol=0)


def test_every_block_is_the_published_one(case: Case) -> None:
    outputs = case.flow.blocks_forward(case.tokens(case.vector.given["x"]), case.condition)
    for k, o in enumerate(outputs):
        torch.testing.assert_close(o.logdet, case.vector.out[f"logdet{k}"], atol=1e-5, rtol=0)
        if k < len(outputs) - 1:
            torch.testing.assert_close(case.images(o.z), case.vector.out[f"block{k}"], atol=1e-5, rtol=0)


def test_inverses_without_guidance_are_the_published_ones(case: Case) -> None:
    z, flow, expected = case.tokens(case.vector.given["noise"]), case.flow, case.vector.out
    torch.testing.assert_close(case.images(flow.inverse(z, case.condition)), expected["rev_plain"], atol=5e-5, rtol=0)
    cool = flow.inverse(z, case.condition, attention_temperature=0.8)
    torch.testing.assert_close(case.images(cool), expected["rev_plain_temp08"], atol=5e-5, rtol=0)
    after_deep = flow.blocks_inverse(z, case.condition)[0]
    torch.testing.assert_close(case.images(after_deep), expected["rev_plain_after_deep"], atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("rev_g2", lambda null: Gaussian(2.0, negative=Negative(condition=null))),
        ("rev_g2_guide_top", lambda null: Gaussian(2.0, blocks="deep", negative=Negative(condition=null))),
        ("rev_g2_annealed", lambda null: Gaussian(2.0, blocks="all", negative=Negative(condition=null))),  # ignored there
    ],
)
def test_guided_inverses_are_the_published_ones(text: Case, name: str, guidance: Callable[[Condition], Gaussian]) -> None:
    z, null = text.tokens(text.vector.given["noise"]), Condition(text=text.vector.given["text_null"])
    x = text.flow.inverse(z, text.condition, guidance=guidance(null))
    torch.testing.assert_close(text.images(x), text.vector.out[name], atol=5e-5, rtol=0)


def test_annealed_guidance_which_published_code_ignores_acts_here(text: Case) -> None:
    z, null = text.tokens(text.vector.given["noise"]), Negative(condition=Condition(text=text.vector.given["text_null"]))
    x = text.flow.inverse(z, text.condition, guidance=Gaussian(Annealed(2.0), negative=null))
    assert float((text.images(x) - text.vector.out["rev_g2_annealed"]).abs().max()) > 1e-2


def test_the_null_text_may_belong_to_the_flow(text: Case) -> None:
    flow = convert.starflow(text.vector.state, **text.vector.config)
    flow.set_null(text.vector.given["text_null"][0])  # one text for both rows
    x = flow.inverse(text.tokens(text.vector.given["noise"]), text.condition, guidance=Gaussian(2.0))
    torch.testing.assert_close(text.images(x), text.vector.out["rev_g2"], atol=5e-5, rtol=0)


def test_guidance_of_an_unconditional_model_does_nothing_and_says_so() -> None:
    vector = read("starflow_uncond")
    flow = convert.starflow(vector.state, **vector.config)
    z = patchify(vector.given["noise"], 1, order="ppc")
    with pytest.warns(GuidanceWarning, match="no effect"):
        x = flow.inverse(z, guidance=Gaussian(2.0))
    torch.testing.assert_close(unpatchify(x, 1, grid=(6, 6), order="ppc"), vector.out["rev_plain"], atol=5e-5, rtol=0)


def test_the_way_back_is_exact(case: Case) -> None:
    state, config = convert.to_starflow(case.flow, in_channels=8, txt_size=case.vector.config.get("txt_size"))
    assert {k: config[k] for k in case.vector.config} == case.vector.config
    assert state.keys() == case.vector.state.keys()
    assert all(torch.equal(state[k], v) for k, v in case.vector.state.items())
    again = convert.starflow(state, **config)
    x = case.tokens(case.vector.given["x"])
    assert torch.equal(again(x, case.condition).z, case.flow(x, case.condition).z)


def test_an_artifact_of_a_converted_flow_is_bit_equal_and_keeps_the_null_text(text: Case, tmp_path: Any) -> None:
    flow = convert.starflow(text.vector.state, **text.vector.config)
    flow.set_null(text.vector.given["text_null"][0])
    artifacts.save(tmp_path / "flow", flow)
    again = artifacts.load(tmp_path / "flow", Flow)
    x = text.tokens(text.vector.given["x"])
    assert torch.equal(again(x).z, flow(x).z)
    assert convert.to_starflow(again, in_channels=8)[1]["txt_size"] == 5


def test_a_class_is_a_text_of_one_one_hot_token(text: Case) -> None:
    vector, dim = text.vector, 24
    as_text = convert.starflow(vector.state, **vector.config)
    as_class = convert.starflow(vector.state, **vector.config, num_classes=dim - 1)
    labels = torch.tensor([3, -1])
    one_hot = torch.eye(dim)[torch.where(labels < 0, dim - 1, labels)][:, None]
    x = text.tokens(vector.given["x"])
    torch.testing.assert_close(as_class(x, Condition(labels=labels)).z, as_text(x, Condition(text=one_hot)).z, atol=1e-5, rtol=0)
    state, config = convert.to_starflow(as_class, in_channels=8)
    assert all(torch.equal(state[k], v) for k, v in vector.state.items())
    assert (config["txt_size"], config["txt_dim"]) == (1, dim)
    assert isinstance(as_class.blocks[-1].conditioner, ClassToken)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sos": False}, "sos=True"),
        ({"use_swiglu": True}, "use_swiglu=False"),
        ({"use_final_norm": False}, "use_final_norm=True"),
        ({"use_qk_norm": True}, "use_qk_norm=False"),
        ({"use_post_norm": True}, "use_post_norm=False"),
        ({"norm_type": "rms_norm"}, "norm_type='layer_norm'"),
        ({"use_bias": False}, "use_bias=True"),
        ({"cond_top_only": False}, "cond_top_only=True"),
        ({"rope": False}, "rope=True"),
        ({"learnable_self_denoiser": True}, "learnable_self_denoiser=False"),
        ({"num_kv_heads": 1}, "num_kv_heads"),
        ({"num_heads": 4}, "num_heads"),
        ({"head_dim": 48}, "head_dim"),
        ({"channels": 128}, "channels"),
        ({"top_block_channels": 96}, "top_block_channels"),
        ({"layers_per_block": [1, 2, 3]}, "layers_per_block"),
        ({"num_blocks": 4}, "num_blocks"),
        ({"txt_dim": 25}, "txt_dim"),
        ({"txt_size": 0}, "txt_size"),
        ({"num_classes": 24}, "num_classes"),
        ({"in_channels": 4}, "in_channels"),
        ({"img_size": 8}, "img_size"),
        ({"pt_seq_len": 8}, "pt_seq_len"),
        ({"hf_style_rope": True}, "hf_style_rope"),
        ({"temporal_causal": 1}, "temporal_causal"),
        ({"seq_order": "L2L"}, "seq_order"),
        ({"conditional_denoisr": True}, "conditional_denoiser"),
    ],
    ids=str,
)
def test_a_configuration_that_the_weights_contradict_is_refused(text: Case, change: dict[str, Any], named: str) -> None:
    with pytest.raises(SrcflowError) as caught:
        convert.starflow(text.vector.state, **{**text.vector.config, **change})
    assert isinstance(caught.value, ConfigError | WeightsError | ProblemsError)
    assert named in str(caught.value)


def test_names_that_change_nothing_are_accepted(text: Case) -> None:
    flow = convert.starflow(text.vector.state, **text.vector.config, use_checkpoint=1, use_checkpoint_mlp=2, hf_style_rope=False)
    x = text.tokens(text.vector.given["x"])
    assert torch.equal(flow(x, text.condition).z, text.flow(x, text.condition).z)


@pytest.mark.parametrize("name", ["tarflow-like", "normalised", "table", "additive", "clip"])
def test_a_flow_that_starflow_cannot_express_is_refused_by_its_part(name: str) -> None:
    flow, part = {
        "tarflow-like": lambda: (presets.tarflow(4, 3, 32, 2, 1, head_dim=16), "positions"),
        "normalised": lambda: (presets.srcflow(4, 4, 32, [1, 1], num_classes=0, head_dim=16), "normalization"),
        "table": lambda: (presets.srcflow(4, 4, 32, [1, 1], num_classes=3, head_dim=16, normalization="none"), "conditioner"),
        "additive": lambda: (presets.srcflow(4, 4, 32, [1, 1], 0, 16, normalization="none", coupling=Additive()), "coupling"),
        "clip": lambda: (presets.srcflow(4, 4, 32, [1, 1], 0, 16, normalization="none"), "clip_what"),
    }[name]()
    with pytest.raises((ConfigError, ProblemsError), match=part):
        convert.to_starflow(perturb(flow), in_channels=4)


@pytest.mark.parametrize(
    "key",
    [
        "blocks.2.proj_in.weight",
        "blocks.0.proj_in.weight",
        "blocks.2.attn_blocks.0.attention.qkv.weight",
        "blocks.2.attn_blocks.0.attention.proj.weight",
        "blocks.1.attn_blocks.0.mlp.main.0.weight",
        "blocks.2.proj_txt.weight",
        "blocks.2.proj_txt.bias",
        "blocks.2.sos_embed",
        "blocks.2.final_norm.weight",
    ],
)
def test_a_lost_key_is_told_with_all_others_even_if_it_shows_a_size(text: Case, key: str) -> None:
    state = {k: v for k, v in text.vector.state.items() if k != key}
    state |= {"foo.bar": torch.ones(1), "blocks.1.proj_out.bias": torch.ones(3)}
    with pytest.raises(WeightsError) as caught:
        convert.starflow(state, **text.vector.config)
    message = str(caught.value)
    assert f"missing {key} {tuple(text.vector.state[key].shape)}" in message
    assert "unknown foo.bar" in message
    assert "blocks.1.proj_out.bias: shape (3,), expected (16,)" in message


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"in_channels": 4, "patch_size": None}, "in_channels"),
        ({"patch_size": 3}, "patch_size"),
        ({"img_size": 7, "patch_size": None, "in_channels": None}, "img_size"),
        ({"num_classes": 3}, "num_classes"),
    ],
    ids=str,
)
def test_a_contradiction_slips_through_no_gap_in_the_configuration(text: Case, change: dict[str, Any], named: str) -> None:
    with pytest.raises(SrcflowError, match=named):
        convert.starflow(text.vector.state, **{**text.vector.config, **change})


def test_a_model_without_text_is_not_conditioned() -> None:
    vector = read("starflow_uncond")
    for change in ({"cond_top_only": True}, {"num_classes": 10}, {"txt_dim": 5}):
        with pytest.raises(ConfigError, match=next(iter(change))):
            convert.starflow(vector.state, **{**vector.config, **change})


def test_none_stands_for_every_default(text: Case) -> None:
    config = {**dict.fromkeys(convert.config.names(convert.starflow)), **text.vector.config}
    flow = convert.starflow(text.vector.state, **config)
    x = text.tokens(text.vector.given["x"])
    assert torch.equal(flow(x, text.condition).z, text.flow(x, text.condition).z)
    bits = {k: int(v) if isinstance(v, bool) else v for k, v in text.vector.config.items()}
    assert torch.equal(convert.starflow(text.vector.state, **bits)(x, text.condition).z, text.flow(x, text.condition).z)
