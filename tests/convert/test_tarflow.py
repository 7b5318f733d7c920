"""TARFlow: the published numbers from the published weights, and what contradicts the weights is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from srcflow import artifacts, convert
from srcflow.couplings.additive import Additive
from srcflow.errors import ConfigError, ProblemsError, SrcflowError, UnknownNameError, WeightsError
from srcflow.flows.flow import Flow
from srcflow.guidance.base import Guidance, Negative
from srcflow.guidance.linear import Linear
from srcflow.guidance.schedules import Annealed
from srcflow.nn import patchify, unpatchify
from srcflow.types import Condition

from .vectors import Vector, read


@pytest.fixture(scope="module")
def vector() -> Vector:
    return read("tarflow_class")


@pytest.fixture(scope="module")
def flow(vector: Vector) -> Flow:
    return convert.tarflow(vector.state, **vector.config)


def tokens(images: Tensor) -> Tensor:
    return patchify(images, 2, order="cpp")


def images(x: Tensor) -> Tensor:
    return unpatchify(x, 2, grid=(4, 4), order="cpp")


def test_noise_log_determinants_loss_and_gradient_are_the_published_ones(vector: Vector, flow: Flow) -> None:
    x = tokens(vector.given["x"]).requires_grad_(True)
    condition = Condition(labels=vector.given["y"])
    assert (vector.given["y"] == -1).any()  # the mean of the table
    out = flow(x, condition)
    dims = out.z[0].numel()
    loss = 0.5 * out.z.square().mean() - out.logdet.mean() / dims
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(out.z, vector.out["z"], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.logdet / dims, vector.out["logdet"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, vector.out["loss"].squeeze(), atol=1e-5, rtol=0)
    torch.testing.assert_close(images(gradient), vector.out["grad_x"], atol=1e-5, rtol=0)
    torch.testing.assert_close(images(flow.denoise(tokens(vector.given["x"]), 0.3, condition)), vector.out["denoised"], atol=1e-5, rtol=0)


def test_every_block_is_the_published_one(vector: Vector, flow: Flow) -> None:
    for k, o in enumerate(flow.blocks_forward(tokens(vector.given["x"]), Condition(labels=vector.given["y"]))):
        torch.testing.assert_close(o.z, vector.out[f"block{k}"], atol=1e-5, rtol=0)
        torch.testing.assert_close(o.params[:, :, 0], vector.out[f"block{k}_log_sigma"], atol=1e-5, rtol=0)
        torch.testing.assert_close(o.params[:, :, 1], vector.out[f"block{k}_mu"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("case", "guidance"),
    [
        ("plain", None),
        ("g15", Linear(1.5)),
        ("g15_a", Linear(1.5, what="log_scale")),
        ("g15_b", Linear(1.5, what="shift")),
        ("g15_annealed", Linear(Annealed(1.5))),
        ("g15_temp07", Linear(1.5, negative=Negative(attention_temperature=0.7))),
    ],
)
def test_inverses_with_and_without_guidance_are_the_published_ones(
    vector: Vector, flow: Flow, case: str, guidance: Guidance | None
) -> None:
    x = flow.inverse(vector.given["noise"] * flow.prior_std, Condition(labels=vector.given["y_reverse"]), guidance=guidance)
    torch.testing.assert_close(images(x), vector.out[f"rev_{case}"], atol=5e-5, rtol=0)


def test_no_label_is_the_mean_of_the_table(vector: Vector, flow: Flow) -> None:
    torch.testing.assert_close(images(flow.inverse(vector.given["noise"])), vector.out["rev_no_label"], atol=5e-5, rtol=0)


def test_sizes_are_taken_from_the_weights(vector: Vector) -> None:
    inferred = convert.tarflow(vector.state)
    told = convert.tarflow(vector.state, **vector.config)
    x = tokens(vector.given["x"])
    assert torch.equal(inferred(x).z, told(x).z)
    assert inferred.num_classes == 5


def test_the_way_back_is_exact(vector: Vector, flow: Flow) -> None:
    state, config = convert.to_tarflow(flow, in_channels=2)
    assert config == vector.config
    masks = {k: v for k, v in state.items() if k.endswith("attn_mask")}
    assert state.keys() - masks.keys() == vector.state.keys()
    for k, v in vector.state.items():
        assert torch.equal(state[k], v), k
    assert len(masks) == 3  # the published code loads strictly, and its buffer is in its files
    for mask in masks.values():
        assert torch.equal(mask, torch.tril(torch.ones(16, 16)))


def volume_preserving(vector: Vector) -> dict[str, Tensor]:
    """The vector's weights with the shift's half of every head, and a prior variance that is not one."""
    state = dict(vector.state)
    for k in range(3):
        for kind in ("weight", "bias"):
            state[f"blocks.{k}.proj_out.{kind}"] = state[f"blocks.{k}.proj_out.{kind}"][8:]
    state["var"] = torch.rand(16, 8, generator=torch.Generator().manual_seed(0)) * 3 + 0.1
    return state


def test_a_volume_preserving_model_keeps_its_prior_variance_bit_for_bit(vector: Vector) -> None:
    state = volume_preserving(vector)
    flow = convert.tarflow(state, **{**vector.config, "nvp": False})
    assert isinstance(flow.blocks[0].coupling, Additive)
    x = tokens(vector.given["x"])
    out = flow(x)
    assert (out.logdet == 0).all()
    expected = torch.distributions.Normal(0.0, state["var"].sqrt()).log_prob(out.z).flatten(1).sum(1)
    torch.testing.assert_close(flow.log_prob(x), expected, atol=1e-3, rtol=1e-5)
    back, config = convert.to_tarflow(flow, in_channels=2)
    assert torch.equal(back["var"], state["var"])
    assert config["nvp"] is False


def test_a_prior_that_was_set_by_hand_is_what_is_written(vector: Vector) -> None:
    flow = convert.tarflow(volume_preserving(vector), **{**vector.config, "nvp": False})
    flow.prior_std.fill_(2.0)
    assert (convert.to_tarflow(flow, in_channels=2)[0]["var"] == 4.0).all()


def test_an_artifact_of_a_converted_flow_is_bit_equal(vector: Vector, flow: Flow, tmp_path: Any) -> None:
    artifacts.save(tmp_path / "flow", flow)
    again = artifacts.load(tmp_path / "flow", Flow)
    x, condition = tokens(vector.given["x"]), Condition(labels=vector.given["y"])
    assert torch.equal(again(x, condition).z, flow(x, condition).z)


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 128},
        {"num_classes": 7},
        {"num_classes": 0},
        {"num_blocks": 4},
        {"layers_per_block": 3},
        {"layers_per_block": [2, 2, 1]},
        {"in_channels": 3},
        {"patch_size": 4},
        {"img_size": 16},
        {"expansion": 2},
        {"head_dim": 24},
        {"nvp": False},
    ],
    ids=str,
)
def test_a_configuration_that_the_weights_contradict_is_refused(vector: Vector, change: dict[str, Any]) -> None:
    with pytest.raises(SrcflowError) as caught:
        convert.tarflow(vector.state, **{**vector.config, **change})
    assert isinstance(caught.value, ConfigError | WeightsError | ProblemsError)
    (name,) = change
    assert name in str(caught.value)


def test_several_contradictions_are_told_at_once(vector: Vector) -> None:
    with pytest.raises(ProblemsError, match=r"(?s)channels.*num_classes"):
        convert.tarflow(vector.state, **{**vector.config, "channels": 32, "num_classes": 3})


def test_an_unknown_name_is_refused_and_the_nearest_named(vector: Vector) -> None:
    with pytest.raises(UnknownNameError, match="num_classes"):
        convert.tarflow(vector.state, num_clases=5)


def test_missing_unknown_and_misshaped_keys_are_told_in_one_error(vector: Vector) -> None:
    state = dict(vector.state)
    del state["blocks.1.attn_blocks.1.mlp.main.2.bias"]
    state["blocks.2.final_norm.weight"] = torch.ones(64)
    state["blocks.0.proj_out.bias"] = torch.zeros(3)
    with pytest.raises(WeightsError) as caught:
        convert.tarflow(state, **vector.config)
    text = str(caught.value)
    assert "missing blocks.1.attn_blocks.1.mlp.main.2.bias (64,)" in text
    assert "unknown blocks.2.final_norm.weight (64,)" in text
    assert "blocks.0.proj_out.bias: shape (3,), expected (16,)" in text


def test_another_models_weights_are_refused() -> None:
    with pytest.raises(WeightsError, match="TARFlow"):
        convert.tarflow({"encoder.weight": torch.ones(1)})


def test_float64_weights_stay_float64(vector: Vector) -> None:
    flow = convert.tarflow({k: v.double() for k, v in vector.state.items()}, **vector.config)
    assert {p.dtype for p in flow.parameters()} == {torch.float64}


def lost(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    """The state without `key`, with a stray key and a misshaped one."""
    changed = {k: v for k, v in state.items() if k != key}
    return {**changed, "foo.bar": torch.ones(1), "blocks.1.proj_out.bias": torch.ones(3)}


@pytest.mark.parametrize(
    "key",
    [
        "blocks.0.proj_in.weight",
        "blocks.0.proj_in.bias",
        "blocks.0.pos_embed",
        "blocks.0.class_embed",
        "blocks.2.class_embed",
        "blocks.0.attn_blocks.0.mlp.main.0.weight",
        "blocks.0.attn_blocks.0.attention.qkv.weight",
        "blocks.2.attn_blocks.1.attention.proj.weight",
        "blocks.2.proj_out.weight",
    ],
)
@pytest.mark.parametrize("told", [True, False])
def test_a_lost_key_is_told_with_all_others_even_if_it_shows_a_size(vector: Vector, key: str, told: bool) -> None:
    with pytest.raises(WeightsError) as caught:
        convert.tarflow(lost(vector.state, key), **(vector.config if told else {}))
    text = str(caught.value)
    assert f"missing {key} {tuple(vector.state[key].shape)}" in text
    assert "unknown foo.bar" in text
    assert "blocks.1.proj_out.bias: shape (3,), expected (16,)" in text
    assert text.count("\n") == 3


def test_a_misshaped_key_that_shows_a_size_is_the_odd_one_out(vector: Vector) -> None:
    state = {**vector.state, "blocks.0.proj_in.weight": torch.ones(7, 8), "blocks.0.class_embed": torch.ones(9, 1, 64)}
    with pytest.raises(WeightsError) as caught:
        convert.tarflow(state, **vector.config)
    assert str(caught.value).count("shape") == 2


@pytest.mark.parametrize("told", [{}, {"num_blocks": 3}])
def test_a_lost_block_or_layer_is_not_taken_for_the_identity(vector: Vector, told: dict[str, int]) -> None:
    for start in ("blocks.1.", "blocks.2.attn_blocks.1."):
        with pytest.raises(WeightsError, match=f"missing {start}"):
            convert.tarflow({k: v for k, v in vector.state.items() if not k.startswith(start)}, **told)


def test_a_stray_buffer_makes_no_block_and_no_precision(vector: Vector) -> None:
    state = {**vector.state, "blocks.9.attn_mask": torch.ones(2, 2, dtype=torch.float64)}
    flow = convert.tarflow(state)
    assert len(flow.blocks) == 3
    assert {p.dtype for p in flow.parameters()} == {torch.float32}


def test_var_is_ones_where_it_is_left_out_and_must_be_positive(vector: Vector) -> None:
    state = {k: v for k, v in vector.state.items() if k != "var"}
    assert (convert.tarflow(state).prior_std == 1).all()
    state = volume_preserving(vector)
    with pytest.raises(WeightsError, match="missing var"):
        convert.tarflow({k: v for k, v in state.items() if k != "var"}, nvp=False)
    with pytest.raises(WeightsError, match="not positive"):
        convert.tarflow({**state, "var": -state["var"]}, nvp=False)


@pytest.mark.parametrize(
    "change", [{"img_size": 999}, {"in_channels": 5}, {"patch_size": 3}, {"patch_size": 0}, {"head_dim": 0}, {"in_channels": 0}], ids=str
)
def test_a_contradiction_slips_through_no_gap_in_the_configuration(vector: Vector, change: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        convert.tarflow(vector.state, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": "64"}, "whole number"),
        ({"head_dim": 64.5}, "whole number"),
        ({"layers_per_block": "1 2"}, "whole number or a list"),
        ({"nvp": 2}, "true or false"),
        ({"expansion": "4"}, "a number"),
        ({"channels": True}, "whole number"),
    ],
    ids=str,
)
def test_values_of_another_type_are_refused(vector: Vector, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert.tarflow(vector.state, **{**vector.config, **change})


def test_none_is_the_default_and_whole_floats_and_bits_are_taken(vector: Vector, flow: Flow) -> None:
    given = {"head_dim": None, "nvp": 1, "channels": 64.0, "layers_per_block": [2.0], "expansion": 4, "img_size": None}
    again = convert.tarflow(vector.state, **given)  # type: ignore[arg-type]
    x = tokens(vector.given["x"])
    assert torch.equal(again(x).z, flow(x).z)


def test_a_wrapped_state_dict_is_told_how_to_be_unwrapped(vector: Vector) -> None:
    with pytest.raises(WeightsError, match="unwrap"):
        convert.tarflow({f"module.{k}": v for k, v in vector.state.items()})
