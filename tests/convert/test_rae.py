"""RAE's published weights: the published numbers from them, what contradicts them is refused, and the way back is bit for bit."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from srcflow import artifacts
from srcflow.autoencoders.representation import RepresentationAutoencoder
from srcflow.autoencoders.vit_decoder import ViTDecoder, sincos_table, vit_xl
from srcflow.convert.encoder import encoder
from srcflow.convert.rae import rae, to_rae
from srcflow.convert.rae_decoder import rae_decoder, to_rae_decoder
from srcflow.convert.state import unwrap
from srcflow.encoders.dinov2 import DINOv2
from srcflow.encoders.efficientnet_lite import EfficientNetLite
from srcflow.errors import ConfigError, ProblemsError, ShapeError, SrcflowError, UnknownNameError, WeightsError
from srcflow.pipeline import Pipeline

from .vectors import Vector, read

State = dict[str, Tensor]
WHOLE = ("rae_dinov2", "rae_siglip2")


@pytest.fixture(scope="module")
def vector() -> Vector:
    return read("rae_decoder_grid16")


@pytest.fixture(scope="module", params=WHOLE)
def whole(request: pytest.FixtureRequest) -> tuple[Vector, RepresentationAutoencoder]:
    v = read(request.param)
    return v, rae(v.state, statistics(v), **v.config)


def statistics(v: Vector) -> State:
    return {"mean": v.given["stat_mean"], "var": v.given["stat_var"]}


def small(**changes: Any) -> ViTDecoder:
    torch.manual_seed(0)
    sizes = {"latent_dim": 6, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 24, "patch": 2, "grid": 4, **changes}
    decoder = ViTDecoder(**sizes).eval()
    with torch.no_grad():
        for p in decoder.parameters():
            p += 0.3 * torch.randn_like(p)
    return decoder


def in_diffusers_names(state: State) -> State:
    """The official decoder's state dict as diffusers writes it: other names in attention, no position table."""
    names = {"attention.attention.query": "attention.to_q", "attention.attention.key": "attention.to_k"}
    names |= {"attention.attention.value": "attention.to_v", "attention.output.dense": "attention.to_out.0"}
    out = {}
    for key, tensor in state.items():
        for official, theirs in names.items():
            key = key.replace(official, theirs)
        out[key] = tensor
    del out["decoder_pos_embed"]
    return out


def same(a: State, b: State) -> bool:
    return sorted(a) == sorted(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# --- the decoder -----------------------------------------------------------------------------------------------------------------


def test_decoder_gives_the_published_patches_and_images(vector: Vector) -> None:
    decoder = rae_decoder(vector.state, **vector.config)
    assert not decoder.training
    logits = decoder(vector.given["tokens"])
    torch.testing.assert_close(logits, vector.out["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(decoder.unpatchify(logits), vector.out["image"], atol=1e-5, rtol=0)
    torch.testing.assert_close(decoder(vector.given["tokens_6x6"]), vector.out["logits_6x6"], atol=1e-5, rtol=0)


def test_weights_show_all_but_the_heads(vector: Vector) -> None:
    decoder, known = rae_decoder(vector.state, heads=3), rae_decoder(vector.state, **vector.config)
    assert same(decoder.state_dict(), known.state_dict())
    assert torch.equal(decoder(vector.given["tokens"]), known(vector.given["tokens"]))
    assert not torch.allclose(rae_decoder(vector.state, heads=4)(vector.given["tokens"]), vector.out["logits"], atol=1e-3)
    with pytest.raises(ConfigError, match=r"rae_decoder\.heads = None.*width 48"):
        rae_decoder(vector.state)


def test_published_widths_have_their_heads() -> None:
    for width, heads in ((768, 12), (1024, 16), (1152, 16)):
        source = ViTDecoder(4, width, 1, heads, 8, patch=1, grid=1)
        assert rae_decoder(to_rae_decoder(source)).heads == heads


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize("grid", [16, 6])
def test_both_key_layouts_are_one_decoder(layout: str, grid: int) -> None:
    """Files of diffusers hold no positions: they count tokens at every grid (diffusers itself makes them i * 16 / g)."""
    source = small(grid=grid)
    state = to_rae_decoder(source)
    decoder = rae_decoder(in_diffusers_names(state), grid=grid, heads=2) if layout == "diffusers" else rae_decoder(state, heads=2)
    x = torch.randn(2, grid**2, 6)
    assert torch.equal(decoder.pos_embed, sincos_table(16, (grid, grid)))
    assert torch.equal(decoder(x), source(x))
    with pytest.raises(ConfigError, match="no position table"):
        rae_decoder(in_diffusers_names(state), heads=2)


def test_the_position_table_is_the_files(vector: Vector) -> None:
    """Training can change it; what the file holds is used and goes back, in either layout."""
    table = vector.state["decoder_pos_embed"] + 0.1 * torch.randn(1, 257, 48)
    state = {**vector.state, "decoder_pos_embed": table}
    decoder = rae_decoder(state, **vector.config)
    assert torch.equal(decoder.pos_embed, table)
    assert not torch.allclose(decoder(vector.given["tokens"]), vector.out["logits"], atol=1e-2)
    assert same(to_rae_decoder(decoder), state)
    assert torch.equal(rae_decoder({**in_diffusers_names(state), "decoder_pos_embed": table}, heads=3).pos_embed, table)


def test_keys_of_a_whole_autoencoder_and_of_wrappers(vector: Vector) -> None:
    prefixed = {f"decoder.{k}": v for k, v in vector.state.items()}
    assert same(rae_decoder(prefixed, **vector.config).state_dict(), rae_decoder(vector.state, **vector.config).state_dict())
    beside = {**prefixed, "encoder.x": torch.zeros(1), "encoder_mean": torch.zeros(1), "_latents_std": torch.zeros(1)}
    assert rae_decoder(beside, **vector.config).depth == 2
    with pytest.raises(WeightsError, match=r"unknown x \(1,\)"):
        rae_decoder({**prefixed, "x": torch.zeros(1)}, **vector.config)


def test_epsilon_and_missing_biases_take_effect() -> None:
    source, x = small(norm_eps=0.5, qkv_bias=False), torch.randn(1, 16, 6)
    state = to_rae_decoder(source)
    assert not [k for k in state if k.endswith("query.bias")]
    decoder = rae_decoder(state, heads=2, layer_norm_eps=0.5)
    assert not decoder.qkv_bias
    assert torch.equal(decoder(x), source(x))
    assert not torch.allclose(rae_decoder(state, heads=2)(x), source(x), atol=1e-3)
    assert same(to_rae_decoder(decoder), state)
    lost = to_rae_decoder(small())
    for part in ("query", "key", "value"):  # one of three
        name = f"attention.attention.{part}.bias"
        with pytest.raises(WeightsError, match=rf"missing decoder_layers\.1\.{name}") as e:
            rae_decoder({k: v for k, v in lost.items() if not k.endswith(name)}, heads=2)
        assert "unknown" not in str(e.value)
    with pytest.raises(ConfigError, match="qkv_bias = True"):
        rae_decoder(state, heads=2, qkv_bias=True)
    with pytest.raises(ConfigError, match="qkv_bias = False"):
        rae_decoder(to_rae_decoder(small()), heads=2, qkv_bias=False)


def test_mlp_width_is_not_rounded_down() -> None:
    assert int(448 * (3904 / 448)) == 3903
    source = ViTDecoder(4, 448, 1, 7, 3904, patch=1, grid=1)
    state = to_rae_decoder(source)
    assert state["decoder_layers.0.intermediate.dense.weight"].shape == (3904, 448)
    assert same(to_rae_decoder(rae_decoder(state, heads=7, mlp=3904)), state)


def test_rectangles() -> None:
    source = small(grid=(2, 8))
    state = {**to_rae_decoder(small()), "decoder_pos_embed": source.pos_embed.clone()}
    decoder = rae_decoder(state, heads=2, grid=[2, 8])
    assert decoder.image_size == (4, 16)
    x = torch.randn(1, 16, 6)
    assert torch.equal(decoder(x), source(x))
    with pytest.raises(ConfigError, match=r"decoder\.grid"):
        to_rae_decoder(decoder)
    table = {**state, "decoder_pos_embed": torch.zeros(1, 13, 16)}
    with pytest.raises(ConfigError, match=r"12 positions.*no square"):
        rae_decoder(table, heads=2)
    assert rae_decoder(table, heads=2, grid=(3, 4)).grid == (3, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_of_the_weights(vector: Vector, dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) for k, v in vector.state.items()}
    decoder = rae_decoder(state, **vector.config)
    want = torch.float64 if dtype == torch.float64 else torch.float32
    assert {v.dtype for v in decoder.state_dict().values()} == {want}
    if dtype == torch.float64:
        torch.testing.assert_close(decoder(vector.given["tokens"].double()).float(), vector.out["logits"], atol=1e-5, rtol=0)
    assert all(torch.equal(v.to(dtype), state[k]) for k, v in to_rae_decoder(decoder).items())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("latent_dim", 23),
        ("dim", 49),
        ("depth", 3),
        ("heads", 5),
        ("heads", 0),
        ("mlp", 97),
        ("grid", 15),
        ("grid", [8, 16]),
        ("patch", 1),
        ("channels", 2),
        ("channels", 0),
        ("layer_norm_eps", "1e-12"),
        ("layer_norm_eps", 0.0),
        ("act", "gelu_tanh"),
        ("act", "silu"),
        ("qkv_bias", False),
    ],
)
def test_configurations_that_the_weights_contradict(vector: Vector, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"rae_decoder\.{key} = "):
        rae_decoder(vector.state, **{**vector.config, key: value})


def test_several_contradictions_and_unknown_names_at_once(vector: Vector) -> None:
    with pytest.raises(ProblemsError) as e:
        rae_decoder(vector.state, dim=1, mlp=2, act="relu")
    assert [p.key for p in e.value.problems] == [f"rae_decoder.{k}" for k in ("dim", "mlp", "heads", "act")]  # type: ignore[attr-defined]
    with pytest.raises(UnknownNameError, match="layer_norm_eps"):
        rae_decoder(vector.state, layer_norm_epsilon=1e-12)  # type: ignore[call-arg]


def test_every_wrong_key_is_in_one_error(vector: Vector) -> None:
    state = dict(vector.state)
    del state["decoder_layers.1.attention.output.dense.bias"], state["trainable_cls_token"]
    state["decoder_norm.weight"] = torch.zeros(47)
    state["mask_token"] = torch.zeros(1, 48)
    with pytest.raises(WeightsError) as e:
        rae_decoder(state, **vector.config)
    for line in (
        "missing decoder_layers.1.attention.output.dense.bias (48,)",
        "missing trainable_cls_token (1, 1, 48)",
        "unknown mask_token (1, 48)",
        "decoder_norm.weight: shape (47,), expected (48,)",
    ):
        assert line in str(e.value)
    del state["decoder_pos_embed"], state["decoder_pred.weight"]  # what shows the sizes
    state["decoder_embed.weight"] = torch.zeros(48)
    with pytest.raises(WeightsError) as e:
        rae_decoder(state, **vector.config)
    for line in ("missing decoder_pos_embed", "missing trainable_cls_token", "unknown mask_token", "decoder_embed.weight: shape (48,)"):
        assert line in str(e.value)
    with pytest.raises(WeightsError, match=r"missing decoder_embed\.weight"):
        rae_decoder({})


# --- whole autoencoders ----------------------------------------------------------------------------------------------------------


def tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


def test_encode_and_decode_are_the_published_ones(whole: tuple[Vector, RepresentationAutoencoder]) -> None:
    v, autoencoder = whole
    raw, grid = autoencoder.features(v.given["image_u8"] / 255)
    assert grid == (16, 16)
    assert not autoencoder.training
    # latents reach 8, and both sides are float32: in float64 they would be up to 3e-5 from the published ones
    torch.testing.assert_close(autoencoder.normalize(raw), tokens(v.out["latent"]), atol=5e-5, rtol=0)
    noise = v.config["noise_tau"] * v.given["train_u"] * v.given["train_noise"]
    torch.testing.assert_close(autoencoder.normalize(raw, noise), tokens(v.out["latent_train"]), atol=5e-5, rtol=0)
    bound = 1e-5 * float(v.out["image"].std())
    torch.testing.assert_close(autoencoder.decode(tokens(v.out["latent"])), v.out["image"], atol=bound, rtol=0)


def test_the_way_back_keeps_decoder_and_statistics_bit_for_bit(whole: tuple[Vector, RepresentationAutoencoder]) -> None:
    v, autoencoder = whole
    state, stats = to_rae(autoencoder)
    assert state.keys() == v.state.keys()
    assert same(stats, statistics(v))
    # the class token's position was added to it; the mask token changes nothing
    folded = ("cls_token", "mask_token", "position_embeddings")
    assert all(torch.equal(state[k], v.state[k]) for k in state if not k.endswith(folded))
    for k in state:
        if k.endswith("position_embeddings"):
            assert torch.equal(state[k][:, 1:], v.state[k][:, 1:])
    again, images = rae(state, stats, **v.config), v.given["image_u8"] / 255
    assert torch.equal(again.features(images)[0], autoencoder.features(images)[0])
    assert same(dict(again.state_dict()), dict(autoencoder.state_dict()))


def test_artifacts_and_the_pipeline_keep_every_bit(whole: tuple[Vector, RepresentationAutoencoder], tmp_path: Path) -> None:
    v, autoencoder = whole
    pipeline = Pipeline.from_pretrained(artifacts.save(tmp_path / "rae", autoencoder))
    assert same(dict(pipeline.autoencoder.state_dict()), dict(autoencoder.state_dict()))
    images = v.given["image_u8"] / 255
    assert torch.equal(pipeline.encode(images), autoencoder.normalize(autoencoder.features(images)[0]))
    latent = tokens(v.out["latent"])
    loaded = pipeline.autoencoder
    assert torch.equal(loaded.decode(latent), autoencoder.decode(latent))
    with torch.no_grad():
        assert torch.equal(pipeline.decode(latent), autoencoder.decode(latent).clamp(0, 1))
    assert isinstance(loaded, RepresentationAutoencoder)
    for ours, theirs in zip(to_rae(loaded), to_rae(autoencoder), strict=True):
        assert same(ours, theirs)


@pytest.mark.parametrize("name", WHOLE)
def test_weights_show_all_but_the_heads_of_a_whole_autoencoder(name: str) -> None:
    v = read(name)
    autoencoder, known = rae(v.state, statistics(v), encoder_heads=4, decoder={"heads": 4}), rae(v.state, statistics(v), **v.config)
    images = v.given["image_u8"] / 255
    assert torch.equal(autoencoder.features(images)[0], known.features(images)[0])
    assert torch.equal(autoencoder.decode(tokens(v.out["latent"])), known.decode(tokens(v.out["latent"])))


def enlarged(v: Vector, side: int) -> State:
    """A RAE whose decoder has side * side positions."""
    return {**v.state, "decoder.decoder_pos_embed": sincos_table(48, (side, side))}


def test_the_decoder_shows_the_encoders_input_size() -> None:
    v = read("rae_dinov2")
    heads: dict[str, Any] = {"encoder_heads": 4, "decoder": {"heads": 4}}
    autoencoder = rae(enlarged(v, 32), **heads)
    assert (autoencoder.grid, autoencoder.encoder.input_size, autoencoder.image_size) == ((32, 32), (448, 448), (128, 128))
    with pytest.raises(ConfigError, match=r"rae\.encoder_input_size = 224: gives 16 x 16 tokens, and the decoder decodes 32 x 32"):
        rae(enlarged(v, 32), encoder_input_size=224, **heads)


@pytest.mark.parametrize("shape", [(48, 16, 16), (1, 48, 16, 16), (48, 1, 1), (1, 16), (16, 1), ()])
def test_statistics_broadcast_to_maps(shape: tuple[int, ...]) -> None:
    v = read("rae_siglip2")
    stats = {"mean": torch.randn(shape), "var": torch.rand(shape, dtype=torch.float64) + 0.1}
    autoencoder = rae(v.state, stats, **v.config)
    raw, _ = autoencoder.features(v.given["image_u8"] / 255)
    maps = raw.transpose(1, 2).reshape(1, 48, 16, 16)
    want = (maps - stats["mean"]) / torch.sqrt(stats["var"] + 1e-5)
    torch.testing.assert_close(autoencoder.normalize(raw), tokens(want.float()), atol=1e-5, rtol=1e-5)


def test_without_statistics_nothing_is_normalised() -> None:
    v = read("rae_siglip2")
    for eps in (1e-5, 1e-3):
        autoencoder = rae(v.state, **{**v.config, "stat_eps": eps})
        raw, _ = autoencoder.features(v.given["image_u8"] / 255)
        assert not autoencoder.needs_statistics
        assert torch.equal(autoencoder.normalize(raw), raw)
        assert torch.equal(autoencoder.denormalize(raw), raw)


def test_the_epsilon_belongs_to_the_variance() -> None:
    v = read("rae_siglip2")
    stats = {"mean": torch.zeros(()), "var": torch.tensor(3.0)}
    autoencoder = rae(v.state, stats, **{**v.config, "stat_eps": 1.0})
    raw, _ = autoencoder.features(v.given["image_u8"] / 255)
    torch.testing.assert_close(autoencoder.normalize(raw), raw / 2)


def test_statistics_of_the_other_convention_become_variances() -> None:
    v = read("rae_siglip2")
    autoencoder = rae(v.state, statistics(v), **v.config)
    autoencoder.eps_convention = "std"
    again = rae(*to_rae(autoencoder), **v.config)
    raw, _ = autoencoder.features(v.given["image_u8"] / 255)
    torch.testing.assert_close(again.normalize(raw), autoencoder.normalize(raw), rtol=1e-6, atol=1e-6)
    assert not torch.equal(again.var, autoencoder.var)
    autoencoder.set_statistics(torch.zeros(()), torch.zeros(()))
    with pytest.raises(ConfigError, match="smaller than its root"):
        to_rae(autoencoder)


def test_refusals_of_a_whole_autoencoder() -> None:
    v = read("rae_siglip2")
    stats = statistics(v)
    with pytest.raises(ConfigError, match="statistics"):
        rae(v.state, {"mean": stats["mean"]}, **v.config)
    with pytest.raises(ConfigError, match="std"):
        rae(v.state, {"mean": stats["mean"], "std": stats["var"]}, **v.config)
    with pytest.raises(ShapeError, match=r"statistics\.var of shape \(48, 4, 4\)"):
        rae(v.state, {**stats, "var": torch.ones(48, 4, 4)}, **v.config)
    with pytest.raises(ConfigError, match=r"rae\.stat_eps"):
        rae(v.state, stats, **{**v.config, "stat_eps": "1e-5"})
    with pytest.raises(ConfigError, match=r"rae\.decoder"):
        rae(v.state, stats, **{**v.config, "decoder": 4})
    with pytest.raises(ConfigError, match=r"^statistics = 'Tensor': latent statistics are a mapping"):
        rae(v.state, stats["mean"], **v.config)  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match=r"decoder = 'widht'"):
        rae(v.state, stats, **{**v.config, "decoder": {"widht": 48}})
    with pytest.raises(UnknownNameError, match="encoder_width"):
        rae(v.state, stats, encoder_width=48)  # type: ignore[call-arg]
    with pytest.raises(ProblemsError) as several:
        rae(v.state, stats, **{**v.config, "encoder_dim": 47, "decoder": {**v.config["decoder"], "depth": 2}})
    assert {"decoder.depth", "encoder.encoder_dim"} <= {p.key for p in several.value.problems}  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
def test_statistics_that_would_give_no_latents(value: float) -> None:
    v = read("rae_siglip2")
    for name in ("mean", "var"):
        stats = {k: t.clone() for k, t in statistics(v).items()}
        stats[name][3, 2, 1] = value
        if value < 0 and name == "mean":
            rae(v.state, stats, **v.config)
            continue
        what = "1 of 12288 numbers are " + ("negative" if value < 0 else "not finite")
        with pytest.raises(ConfigError, match=rf"statistics\.{name} = .*: {what}"):
            rae(v.state, stats, **v.config)
    with pytest.raises(ConfigError, match=r"statistics\.var = 'x': is no array"):
        rae(v.state, {**statistics(v), "var": "x"}, **v.config)  # type: ignore[dict-item]


def test_without_a_mean_it_is_zero() -> None:
    """Some published stat.pt have none."""
    v = read("rae_siglip2")
    var = v.given["stat_var"]
    absent: dict[str, Any]
    for absent in ({}, {"mean": None}):
        with pytest.warns(UserWarning, match="no mean: it is taken to be 0") as found:
            autoencoder = rae(v.state, {"var": var, **absent}, **v.config)
        assert found[0].filename == __file__
        assert not autoencoder.mean.any()
        assert torch.equal(autoencoder.var, rae(v.state, statistics(v), **v.config).var)


def test_a_setting_is_named_as_the_whole_autoencoder_has_it() -> None:
    v = read("rae_siglip2")
    with pytest.raises(ConfigError, match=r'^decoder\.heads = None: .*decoder=\{"heads": \.\.\.\}'):
        rae(v.state, encoder_heads=4)
    with pytest.raises(ConfigError, match=r"^decoder\.heads = '4': must be a whole number"):
        rae(v.state, encoder_heads=4, decoder={"heads": "4"})
    with pytest.raises(ProblemsError) as several:
        rae(v.state, encoder_heads=4, decoder={"dim": 1, "mlp": 2})
    assert [p.key for p in several.value.problems] == ["decoder.dim", "decoder.mlp", "decoder.heads"]  # type: ignore[attr-defined]


def test_numbers_of_another_type() -> None:
    v = read("rae_siglip2")
    config = {**v.config, "decoder": {**v.config["decoder"], "grid": 16.0, "heads": 4.0}}
    assert same(dict(rae(v.state, **config).state_dict()), dict(rae(v.state, **v.config).state_dict()))
    with pytest.raises(ConfigError, match=r"decoder\.grid = 16\.5"):
        rae(v.state, **{**config, "decoder": {"heads": 4, "grid": 16.5}})


def test_lost_registers_are_missed_and_none_go_out() -> None:
    """RAE's DINOv2 has four: without them the position table would be resampled in another way."""
    v = read("rae_dinov2")
    with pytest.raises(WeightsError, match=r"missing encoder\.encoder\.embeddings\.register_tokens \(1, 4, 48\)"):
        rae({k: t for k, t in v.state.items() if "register" not in k}, **v.config)
    sizes = {"embed_dim": 48, "depth": 1, "num_heads": 4}
    own = RepresentationAutoencoder(DINOv2(image_size=56, weights=None, timm_args=sizes, registers=0), small(latent_dim=48))
    own.set_statistics(torch.zeros(()), torch.ones(()))
    with pytest.raises(ConfigError, match=r"encoder\.registers = 0"):
        to_rae(own)


def test_checkpoints_and_foreign_encoders() -> None:
    v = read("rae_siglip2")
    for convert in (rae, rae_decoder):
        with pytest.raises(WeightsError, match=r"(?s)model \(dict\)\n  epoch \(int\).*srcflow\.convert\.state\.unwrap"):
            convert({"model": v.state, "epoch": 1})  # type: ignore[dict-item]
    assert same(
        dict(rae(unwrap({"model": v.state, "epoch": 1}, what="x"), **v.config).state_dict()), dict(rae(v.state, **v.config).state_dict())
    )
    foreign = {f"encoder.blocks.{i}.attn.qkv.weight": torch.zeros(3, 1) for i in range(5)}
    decoder = {k: t for k, t in v.state.items() if k.startswith("decoder.")}
    with pytest.raises(WeightsError) as e:
        rae({**decoder, **foreign}, **v.config)
    assert all(f"unknown {k} (3, 1)" in str(e.value) for k in foreign)
    with pytest.raises(WeightsError, match="no keys at all"):
        rae(decoder, **v.config)


def test_wrong_keys_of_all_parts_are_in_one_error() -> None:
    v = read("rae_siglip2")
    state = {**v.state, "x": torch.zeros(2), "decoder.y": torch.zeros(1), "encoder.model.z": torch.zeros(1), "encoder_mean": torch.zeros(3)}
    del state["decoder.decoder_norm.bias"], state["encoder.model.encoder.layers.0.mlp.fc2.bias"]
    with pytest.raises(WeightsError) as e:
        rae(state, **v.config)
    for part in ("unknown x (2,)", "unknown y", "z", "missing decoder_norm.bias", "encoder.layers.0.mlp.fc2.bias", "rae_diffusers"):
        assert part in str(e.value)


def test_what_the_published_code_cannot_express() -> None:
    autoencoder = RepresentationAutoencoder(
        EfficientNetLite(image_size=32, stage=2, weights=None), ViTDecoder(40, 16, 1, 2, 24, patch=4, grid=(2, 8))
    )
    with pytest.raises(ConfigError, match="have not been fitted"):
        to_rae(autoencoder)
    autoencoder.set_statistics(torch.zeros(()), torch.ones(()))
    with pytest.raises(ProblemsError, match=r"EfficientNetLite[\s\S]*decoder\.grid"):
        to_rae(autoencoder)


def test_an_encoder_of_our_own_goes_out_with_the_positions_in_use() -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 4}
    own = RepresentationAutoencoder(DINOv2(image_size=56, weights=None, timm_args=sizes), small(latent_dim=48))
    own.set_statistics(torch.zeros(()), torch.ones(()))
    state, stats = to_rae(own)
    assert state["encoder.encoder.embeddings.position_embeddings"].shape == (1, 17, 48)
    again = rae(state, stats, encoder_heads=4, decoder={"heads": 2})
    images = torch.rand(1, 3, 20, 30)
    assert torch.equal(again.features(images)[0], own.features(images)[0])
    alone = encoder({k: v for k, v in state.items() if k.startswith("encoder.")}, encoder_heads=4, encoder_input_size=56)
    assert torch.equal(alone(images)[0], own.features(images)[0])


def test_errors_are_srcflows(vector: Vector) -> None:
    for bad in ({"decoder_embed.weight": torch.zeros(())}, {"a.b": torch.zeros(2)}):
        with pytest.raises(SrcflowError):
            rae(bad)
        with pytest.raises(SrcflowError):
            rae_decoder(bad)


@pytest.mark.slow
def test_vit_xl_of_full_size(tmp_path: Path) -> None:
    """Convert, save, load: bit-equal. Prints the time and the process's peak memory (`pytest -s`)."""
    torch.manual_seed(0)
    state = to_rae_decoder(vit_xl(768))
    x = torch.randn(1, 256, 768)
    start = time.perf_counter()
    decoder = rae_decoder(state, latent_dim=768, dim=1152, depth=28, heads=16, mlp=4096, grid=16, patch=16)
    converted = time.perf_counter()
    path = artifacts.save(tmp_path / "decoder", decoder)
    saved = time.perf_counter()
    loaded = artifacts.load(path, ViTDecoder)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"convert {converted - start:.1f} s, save {saved - converted:.1f} s, load {done - saved:.1f} s, peak {peak:.1f} GiB")
    assert same(to_rae_decoder(loaded), state)
    with torch.no_grad():
        out = decoder(x)
        assert torch.equal(loaded(x), out)
    assert decoder.unpatchify(out).shape == (1, 3, 256, 256)
    assert sum(p.numel() for p in decoder.parameters()) > 410e6
