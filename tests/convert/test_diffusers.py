"""Folders of diffusers' AutoencoderRAE, written here by hand; test_diffusers_reference.py has those that diffusers writes."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from srcflow import artifacts
from srcflow.autoencoders.representation import RepresentationAutoencoder
from srcflow.autoencoders.vit_decoder import ViTDecoder, sincos_table
from srcflow.convert.diffusers import FIELDS, rae_diffusers, to_diffusers
from srcflow.convert.encoder import encoder
from srcflow.convert.rae import rae, to_rae
from srcflow.convert.rae_decoder import to_rae_decoder
from srcflow.encoders.dinov2 import DINOv2
from srcflow.encoders.efficientnet_lite import EfficientNetLite
from srcflow.encoders.mae import MAE
from srcflow.errors import ArtifactError, ConfigError, ProblemsError, ShapeError, UnknownNameError, WeightsError
from srcflow.pipeline import Pipeline

State = dict[str, Tensor]
DIM, DEPTH = 64, 2
WEIGHTS = "diffusion_pytorch_model.safetensors"
KINDS = {  # patch, side of the position table, inner width of the MLPs
    "dinov2": (14, 37, 256),
    "siglip2": (16, 16, 3072),
    "mae": (16, 14, 3072),
}


def noise(*shape: int) -> Tensor:
    return 0.1 * torch.randn(shape)


def published_encoder(kind: str) -> State:
    """An encoder as transformers 4 writes it, without its final norm."""
    patch, side, hidden = KINDS[kind]
    siglip = kind == "siglip2"
    state = {f"embeddings.patch_embedding{'' if siglip else 's.projection'}.{k}": v for k, v in affine(DIM, 3, patch, patch).items()}
    if siglip:
        state |= {"embeddings.position_embedding.weight": noise(side**2, DIM), "head.probe": noise(1, 1, DIM)}
    else:
        state |= {"embeddings.position_embeddings": noise(1, 1 + side**2, DIM), "embeddings.cls_token": noise(1, 1, DIM)}
    if kind == "dinov2":
        state |= {"embeddings.register_tokens": noise(1, 4, DIM), "embeddings.mask_token": noise(1, DIM)}
    parts = {
        "dinov2": ("norm1", "attention.attention.{}", "attention.output.dense", "norm2", "mlp.fc1", "mlp.fc2"),
        "siglip2": ("layer_norm1", "self_attn.{}", "self_attn.out_proj", "layer_norm2", "mlp.fc1", "mlp.fc2"),
        "mae": (
            "layernorm_before",
            "attention.attention.{}",
            "attention.output.dense",
            "layernorm_after",
            "intermediate.dense",
            "output.dense",
        ),
    }[kind]
    for i in range(DEPTH):
        at = f"encoder.layer{'s' if siglip else ''}.{i}."
        for part in ("q_proj", "k_proj", "v_proj") if siglip else ("query", "key", "value"):
            state |= {f"{at}{parts[1].format(part)}.{k}": v for k, v in affine(DIM, DIM).items()}
        for name, shape in ((parts[2], (DIM, DIM)), (parts[4], (hidden, DIM)), (parts[5], (DIM, hidden))):
            state |= {f"{at}{name}.{k}": v for k, v in affine(*shape).items()}
        for name in (parts[0], parts[3]):
            state |= {f"{at}{name}.weight": 1 + noise(DIM), f"{at}{name}.bias": noise(DIM)}
        if kind == "dinov2":
            state |= {f"{at}layer_scale{k}.lambda1": 1 + noise(DIM) for k in (1, 2)}
    return state


def affine(*shape: int) -> State:
    return {"weight": noise(*shape), "bias": noise(shape[0])}


def in_version_5(state: State) -> State:
    """The names that transformers 5 has in memory."""
    mae = any("layernorm_before" in k for k in state)
    names = {f"attention.attention.{a}": f"attention.{b}_proj" for a, b in (("query", "q"), ("key", "k"), ("value", "v"))}
    names["attention.output.dense"] = "attention.o_proj"
    if mae:
        names |= {"encoder.layer.": "layers.", ".intermediate.dense": ".mlp.fc1", ".output.dense": ".mlp.fc2"}
    out = {}
    for key, tensor in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        out[key] = tensor
    return out


def published_decoder(decoder: ViTDecoder) -> State:
    """A decoder in diffusers' names."""
    out = {}
    for key, tensor in to_rae_decoder(decoder).items():
        key = re.sub(r"attention\.attention\.([qkv])\w+", r"attention.to_\1", key).replace("attention.output.dense", "attention.to_out.0")
        out[key] = tensor
    del out["decoder_pos_embed"]
    return out


class Folder:
    """A folder and what it was made of."""

    def __init__(self, path: Path, kind: str = "dinov2", grid: int = 4, version: int = 4, **config: Any) -> None:
        torch.manual_seed(0)
        self.path, self.grid = path, grid
        patch = KINDS[kind][0]
        size = grid * patch
        self.encoder_state = published_encoder(kind)
        colours = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
        self.encoder = encoder(self.encoder_state, encoder_input_size=size, encoder_heads=1, **colours)
        self.decoder = ViTDecoder(DIM, 16, 2, 2, 24, patch=2, grid=grid).eval()
        with torch.no_grad():
            for p in self.decoder.parameters():
                p += 0.3 * torch.randn_like(p)
        theirs = self.encoder_state if version == 4 else in_version_5(self.encoder_state)
        outer = "encoder.vision_model." if kind == "siglip2" else "encoder."
        self.state = {outer + k: v for k, v in theirs.items()}
        self.state |= {f"decoder.{k}": v for k, v in published_decoder(self.decoder).items()}
        for name in ("mean", "std"):
            self.state[f"encoder_{name}"] = torch.tensor(colours[f"image_{name}"]).reshape(1, 3, 1, 1)
        self.mean, self.std = noise(DIM, grid, grid), 0.3 + torch.rand(DIM, grid, grid)
        self.state |= {"_latents_mean": self.mean, "_latents_std": self.std}
        self.config = {
            **FIELDS,
            "_class_name": "AutoencoderRAE",
            "_diffusers_version": "0.42.1",
            "encoder_type": kind,
            "encoder_hidden_size": DIM,
            "encoder_patch_size": patch,
            "encoder_num_hidden_layers": DEPTH,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 24,
            "patch_size": 2,
            "encoder_input_size": size,
            "latents_mean": self.mean.tolist(),
            "latents_std": self.std.tolist(),
            "encoder_norm_mean": colours["image_mean"],
            "encoder_norm_std": colours["image_std"],
            **config,
        }
        self.write()

    def write(self) -> None:
        self.path.mkdir(exist_ok=True)
        save_file({k: v.contiguous() for k, v in self.state.items()}, self.path / WEIGHTS)
        (self.path / "config.json").write_text(json.dumps(self.config))

    def latents(self, images: Tensor) -> Tensor:
        """Maps (B, C, H, W), as diffusers computes them."""
        tokens, _ = self.encoder(images)
        maps = tokens.transpose(1, 2).reshape(-1, DIM, self.grid, self.grid)
        return (maps - self.mean) / (self.std + 1e-5) * self.config["scaling_factor"]

    def images(self, latents: Tensor) -> Tensor:
        """As diffusers computes them, but for its positions."""
        maps = latents / self.config["scaling_factor"] * (self.std + 1e-5) + self.mean
        out = self.decoder.unpatchify(self.decoder(maps.flatten(2).transpose(1, 2)))
        return out * self.state["encoder_std"] + self.state["encoder_mean"]


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Folder]:
    return lambda *args, **kwargs: Folder(tmp_path / "folder", *args, **kwargs)


def check_numbers(folder: Folder, atol: float = 0.0) -> RepresentationAutoencoder:
    """Hold what is read against diffusers' formulae; exactly, unless `atol` is given."""
    autoencoder = rae_diffusers(folder.path)
    images = torch.rand(2, 3, 30, 20)
    latents = folder.latents(images)
    ours = autoencoder.normalize(autoencoder.features(images)[0])
    torch.testing.assert_close(ours.transpose(1, 2).reshape(latents.shape), latents, atol=atol, rtol=0)
    decoded = autoencoder.decode(latents.flatten(2).transpose(1, 2))
    torch.testing.assert_close(decoded, folder.images(latents), atol=max(atol, 1e-6), rtol=0)
    return autoencoder


@pytest.mark.parametrize(("kind", "version"), [("dinov2", 4), ("dinov2", 5), ("siglip2", 4), ("mae", 4), ("mae", 5)])
def test_folders_of_both_versions_of_transformers(made: Callable[..., Folder], kind: str, version: int) -> None:
    folder = made(kind, 16 if kind != "dinov2" else 4, version)
    assert any(".to_q." in k for k in folder.state)
    autoencoder = check_numbers(folder)
    assert not autoencoder.training
    assert type(autoencoder.encoder).__name__.lower() == kind


@pytest.mark.parametrize("grid", [4, 16, 32])
def test_positions_count_tokens_at_every_grid(made: Callable[..., Folder], grid: int) -> None:
    """diffusers has i * 16 / g, which is right at g = 16 only; the models were trained with 0, 1, 2, ..."""
    autoencoder = rae_diffusers(made("dinov2", grid).path)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    columns = torch.cat([angles.sin(), angles.cos()], 1).float()
    table = autoencoder.decoder.pos_embed[0, 1:].reshape(grid, grid, 16)
    assert torch.equal(table[..., :8], columns.expand(grid, grid, 8))
    assert torch.equal(table[..., 8:], columns[:, None].expand(grid, grid, 8))
    spread = angles * 16 / grid
    assert torch.equal(torch.cat([spread.sin(), spread.cos()], 1).float(), columns) == (grid == 16)


def test_a_table_in_the_file_is_used(made: Callable[..., Folder]) -> None:
    folder = made()
    table = sincos_table(16, (4, 4)) + noise(1, 17, 16)
    folder.decoder.pos_embed.copy_(table)
    folder.state["decoder.decoder_pos_embed"] = table
    folder.write()
    assert torch.equal(check_numbers(folder).decoder.pos_embed, table)


def test_the_epsilon_is_added_to_the_deviation_exactly(made: Callable[..., Folder]) -> None:
    folder = made()
    folder.std = folder.state["_latents_std"] = 10.0 ** torch.linspace(-9, 4, DIM * 16).reshape(DIM, 4, 4)
    folder.write()
    autoencoder = check_numbers(folder)
    assert autoencoder.eps_convention == "std"
    assert torch.equal(1 / autoencoder.noise_scale(), 1 / (1 / (folder.std + 1e-5)).flatten(1).t())


@pytest.mark.parametrize("factor", [0.5, 2.5, 1.3])
def test_scaling_factor_is_folded_into_the_statistics(made: Callable[..., Folder], factor: float, tmp_path: Path) -> None:
    autoencoder = check_numbers(made(scaling_factor=factor), atol=1e-5)
    with pytest.warns(UserWarning, match="positions"):
        to_diffusers(autoencoder, tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["scaling_factor"] == pytest.approx(factor, rel=1e-12)
    again = rae_diffusers(tmp_path / "back")
    torch.testing.assert_close(again.noise_scale(), autoencoder.noise_scale(), rtol=1e-6, atol=0)


def test_statistics_come_from_the_file_before_the_configuration(made: Callable[..., Folder]) -> None:
    folder = made()
    folder.config |= {"latents_mean": [1.0], "latents_std": [2.0], "encoder_norm_mean": [0.0] * 3, "encoder_norm_std": [1.0] * 3}
    folder.write()
    check_numbers(folder)
    for name in ("_latents_mean", "_latents_std", "encoder_mean", "encoder_std"):
        del folder.state[name]
    folder.write()
    autoencoder = rae_diffusers(folder.path)
    assert (float(autoencoder.mean.unique()), float(autoencoder.var.unique())) == (1.0, 4.0)
    assert (autoencoder.encoder.mean.tolist(), autoencoder.encoder.std.tolist()) == ([0.0] * 3, [1.0] * 3)
    folder.config |= {"latents_mean": None, "latents_std": None, "encoder_norm_mean": None, "encoder_norm_std": None}
    folder.write()
    autoencoder = rae_diffusers(folder.path)
    assert torch.equal(autoencoder.normalize(torch.ones(1, 16, DIM)), torch.ones(1, 16, DIM) / (torch.ones(()) + 1e-5))
    torch.testing.assert_close(autoencoder.encoder.mean, torch.tensor([0.485, 0.456, 0.406]))  # also of SigLIP, if nothing is said


def test_latents_that_are_no_maps(made: Callable[..., Folder]) -> None:
    folder = made(reshape_to_2d=False)
    as_tokens = {f"_latents_{k}": getattr(folder, k).flatten(1).t() for k in ("mean", "std")}
    folder.state |= as_tokens
    folder.write()
    check_numbers(folder)
    folder.config["reshape_to_2d"] = True
    folder.write()
    with pytest.raises(ShapeError, match=r"latents_mean of shape \(16, 64\)"):
        rae_diffusers(folder.path)


def test_shards_with_an_index(made: Callable[..., Folder]) -> None:
    folder = made()
    (folder.path / WEIGHTS).unlink()
    keys = sorted(folder.state)
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, part in zip(names, (keys[:40], keys[40:]), strict=True):
        save_file({k: folder.state[k].contiguous() for k in part}, folder.path / name)
    where = {k: names[i >= 40] for i, k in enumerate(keys)}
    (folder.path / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    check_numbers(folder)
    with pytest.raises(ArtifactError, match="something else"):
        to_diffusers(rae_diffusers(folder.path), folder.path)


@pytest.mark.parametrize("kind", ["dinov2", "siglip2", "mae"])
def test_round_trip_bit_for_bit(made: Callable[..., Folder], kind: str, tmp_path: Path) -> None:
    """But for what changes nothing: the class token's position goes into the token, DINOv2's mask token and SigLIP's pooling head are 0."""
    folder = made(kind, 16)
    autoencoder = rae_diffusers(folder.path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a grid of 16 is the same in diffusers
        back = to_diffusers(artifacts.load(artifacts.save(tmp_path / "a", autoencoder), RepresentationAutoencoder), tmp_path / "back")
    state, config = load_file(back / WEIGHTS), json.loads((back / "config.json").read_text())
    assert {k for k in state if ".head." not in k} == {k for k in folder.state if ".head." not in k}
    changed = [k for k in folder.state if not torch.equal(state[k], folder.state[k])]
    folded = ["encoder.embeddings." + k for k in ("cls_token", "mask_token", "position_embeddings")]
    assert sorted(changed) == {"dinov2": folded, "siglip2": ["encoder.vision_model.head.probe"], "mae": []}[kind]
    if kind == "dinov2":
        assert torch.equal(state[folded[2]][:, 1:], folder.state[folded[2]][:, 1:])
        cls = [s[folded[0]] + s[folded[2]][:, :1] for s in (state, folder.state)]
        assert torch.equal(*cls)
    assert config.keys() == folder.config.keys()
    rounded = ("encoder_norm_mean", "encoder_norm_std")
    assert {k: v for k, v in config.items() if k not in rounded} == {
        **{k: folder.config[k] for k in config if k not in rounded},
        "image_size": 32,
    }
    assert torch.tensor(config["encoder_norm_std"]).tolist() == folder.state["encoder_std"].flatten().tolist()
    again = rae_diffusers(back)
    images = torch.rand(1, 3, 30, 20)
    assert torch.equal(again.features(images)[0], autoencoder.features(images)[0])
    assert all(torch.equal(v, autoencoder.state_dict()[k]) for k, v in again.state_dict().items())
    to_diffusers(again, back)  # over what it wrote itself


def test_pipeline_of_a_folder(made: Callable[..., Folder], tmp_path: Path) -> None:
    folder = made()
    autoencoder = check_numbers(folder)
    pipeline = Pipeline.from_pretrained(artifacts.save(tmp_path / "artifact", autoencoder))
    images = torch.rand(2, 3, 30, 20)
    with torch.no_grad():
        assert torch.equal(pipeline.encode(images), autoencoder.normalize(autoencoder.features(images)[0]))
        assert torch.equal(pipeline.reconstruct(images), autoencoder.decode(pipeline.encode(images)).clamp(0, 1))


def test_between_both_formats(made: Callable[..., Folder], tmp_path: Path) -> None:
    """RAE's variances become sqrt(var + 1e-5), to which diffusers adds another 1e-5: latents are 1e-5 / std smaller, images the same."""
    folder = made("dinov2", 16)
    source = rae_diffusers(folder.path)
    state, _ = to_rae(source)
    var = 0.1 + torch.rand(DIM, 16, 16)
    official = rae(state, {"mean": folder.mean, "var": var}, encoder_heads=1, decoder={"heads": 2})
    back = to_diffusers(official, tmp_path / "back")
    assert torch.equal(load_file(back / WEIGHTS)["_latents_std"], (var + 1e-5).sqrt())
    ours, images = rae_diffusers(back), torch.rand(1, 3, 30, 20)
    raw = official.features(images)[0]
    z, there = official.normalize(raw), ours.normalize(ours.features(images)[0])
    torch.testing.assert_close(there, z, rtol=5e-5, atol=1e-6)
    assert 1e-5 < float((there - z).abs().max()) < 3e-4
    torch.testing.assert_close(ours.decode(there), official.decode(z), atol=1e-5, rtol=0)
    again = rae(*to_rae(ours), encoder_heads=1, decoder={"heads": 2})  # and to RAE's format, where the divisors are kept
    torch.testing.assert_close(again.normalize(raw), there, rtol=1e-6, atol=1e-6)


def test_warnings_of_positions_that_diffusers_will_not_have(made: Callable[..., Folder], tmp_path: Path) -> None:
    autoencoder = rae_diffusers(made("dinov2", 4).path)
    with pytest.warns(UserWarning, match=r"i \* 16 / 4"):
        to_diffusers(autoencoder, tmp_path / "a")
    autoencoder.decoder.pos_embed += 0.1
    with pytest.warns(UserWarning, match="is not the sin-cos one"):
        to_diffusers(autoencoder, tmp_path / "b")
    assert "decoder.decoder_pos_embed" not in load_file(tmp_path / "b" / WEIGHTS)


def own(encoder: Any, **decoder: Any) -> RepresentationAutoencoder:
    """An autoencoder that was not converted."""
    side = encoder.input_size[0] // encoder.patch_size
    sizes: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "mlp_dim": 24, "patch": 2, "grid": side, **decoder}
    made = RepresentationAutoencoder(encoder, ViTDecoder(encoder.dim, **sizes))
    made.set_statistics(torch.zeros(()), torch.ones(()))
    return made


def test_an_encoder_of_our_own_gets_a_table_of_the_published_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": DIM, "depth": DEPTH, "num_heads": 1}
    autoencoder = own(DINOv2(image_size=224, weights=None, timm_args=sizes))
    autoencoder.encoder.model.pos_embed.copy_(torch.randn(1, 256, DIM))
    state = load_file(to_diffusers(autoencoder, tmp_path / "dinov2") / WEIGHTS)
    assert state["encoder.embeddings.position_embeddings"].shape == (1, 1370, DIM)
    images = torch.rand(1, 3, 30, 20)
    again = rae_diffusers(tmp_path / "dinov2")
    torch.testing.assert_close(again.features(images)[0], autoencoder.features(images)[0], atol=1e-5, rtol=0)
    # 16 x 16 positions of MAE are 14 x 14 made larger, which not every table is
    small: dict[str, Any] = {"embed_dim": DIM, "depth": 1, "num_heads": 1, "mlp_ratio": 48}
    mae = own(MAE(image_size=256, weights=None, timm_args=small))
    mae.encoder.model.pos_embed.copy_(torch.randn(1, 257, DIM))
    with pytest.raises(ConfigError, match=r"no table of 14 x 14 positions"):
        to_diffusers(mae, tmp_path / "mae")
    assert not (tmp_path / "mae").exists()
    mae.encoder.model.pos_embed[:, 1:] = mae.encoder.resampled(torch.randn(1, 197, DIM))[:, 1:]
    to_diffusers(mae, tmp_path / "mae")
    torch.testing.assert_close(rae_diffusers(tmp_path / "mae").features(images)[0], mae.features(images)[0], atol=1e-5, rtol=0)


def test_what_diffusers_cannot_express_is_named(tmp_path: Path) -> None:
    sizes = {"embed_dim": DIM, "depth": 1, "num_heads": 2, "mlp_ratio": 3.0}
    encoder = DINOv2(image_size=28, weights=None, timm_args=sizes, norm_eps=1e-3, act_layer="gelu_tanh")
    with pytest.raises(ProblemsError) as e:
        to_diffusers(own(encoder, grid=4, norm_eps=1e-6, qkv_bias=False), tmp_path / "a")
    keys = {p.key for p in e.value.problems}  # type: ignore[attr-defined]
    assert keys >= {"encoder.head_dim", "encoder.mlp", "encoder.norm_eps", "encoder.act_layer"}
    assert keys >= {"decoder.grid", "decoder.norm_eps", "decoder.qkv_bias"}
    rectangle = DINOv2(image_size=(28, 42), weights=None, timm_args={"embed_dim": DIM, "depth": 1, "num_heads": 1}, registers=0)
    with pytest.raises(ProblemsError, match=r"encoder\.registers = 0[\s\S]*encoder\.image_size = \(28, 42\)[\s\S]*decoder\.grid"):
        to_diffusers(own(rectangle, grid=(2, 3)), tmp_path / "a")
    other = own(EfficientNetLite(image_size=32, stage=2, weights=None))
    with pytest.raises(ConfigError, match="diffusers knows DINOv2, SigLIP2 and MAE only"):
        to_diffusers(other, tmp_path / "a")
    other.statistics_fitted.fill_(False)
    with pytest.raises(ConfigError, match="have not been fitted"):
        to_diffusers(other, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_folder_of_something_else_is_left_alone(made: Callable[..., Folder], tmp_path: Path) -> None:
    autoencoder = rae_diffusers(made("dinov2", 16).path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("")
    for place in ("other", "file"):
        with pytest.raises(ArtifactError, match="something else"):
            to_diffusers(autoencoder, tmp_path / place)
    assert [f.name for f in (tmp_path / "other").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    assert to_diffusers(autoencoder, str(tmp_path / "empty")) == tmp_path / "empty"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("encoder_hidden_size", 128, "encoder_dim = 128"),
        ("encoder_num_hidden_layers", 3, "encoder_depth = 3"),
        ("decoder_hidden_size", 32, r"decoder\.dim = 32"),
        ("decoder_num_hidden_layers", 1, r"decoder\.depth = 1"),
        ("decoder_num_attention_heads", 3, r"decoder\.heads = 3"),
        ("decoder_intermediate_size", 48, r"decoder\.mlp = 48"),
        ("patch_size", 4, r"decoder\.patch = 4"),
        ("num_channels", 1, r"decoder\.channels = 1"),
        ("encoder_type", "siglip2", "siglip2"),
        ("encoder_type", "clip", "Known: dinov2, mae, siglip2"),
        ("encoder_input_size", 57, "no multiple of encoder_patch_size = 14"),
        ("image_size", 9, "make 8"),
        ("encoder_hidden_size", "64", "positive integer"),
        ("scaling_factor", 0, "scaling_factor = 0"),
        ("latents_shift", 1, "no such name"),
        ("_class_name", "AutoencoderKL", "AutoencoderKL, not an AutoencoderRAE"),
        ("_class_name", None, r"config\.json: has no _class_name; expected AutoencoderRAE"),
    ],
)
def test_configurations_that_are_refused(made: Callable[..., Folder], field: str, value: Any, message: str) -> None:
    folder = made()
    folder.config[field] = value
    folder.write()
    with pytest.raises((ConfigError, ProblemsError, ArtifactError), match=message):
        rae_diffusers(folder.path)


def test_several_wrong_fields_and_keys_at_once(made: Callable[..., Folder]) -> None:
    folder = made(latents_shift=1, patch_size=0, scaling_factor=-1.0)
    with pytest.raises(ProblemsError) as several:
        rae_diffusers(folder.path)
    assert {type(p) for p in several.value.problems} == {UnknownNameError, ConfigError}
    assert len(several.value.problems) == 3
    folder = made()
    del folder.state["decoder.decoder_norm.bias"], folder.state["encoder.encoder.layer.0.norm1.bias"]
    folder.state |= {"quant_conv.weight": torch.zeros(1), "decoder.mask_token": torch.zeros(2)}
    folder.write()
    with pytest.raises(WeightsError) as e:
        rae_diffusers(folder.path)
    for part in ("missing decoder_norm.bias", "norm1.bias", "unknown quant_conv.weight", "unknown mask_token"):
        assert part in str(e.value)


def test_lost_registers_are_missed(made: Callable[..., Folder]) -> None:
    folder = made()
    del folder.state["encoder.embeddings.register_tokens"]
    folder.write()
    with pytest.raises(WeightsError, match=r"missing encoder\.embeddings\.register_tokens \(1, 4, 64\)"):
        rae_diffusers(folder.path)


def test_negative_deviations_and_missing_files(made: Callable[..., Folder], tmp_path: Path) -> None:
    folder = made()
    folder.state["_latents_std"] = -folder.std
    folder.write()
    with pytest.raises(ConfigError, match="latents_std"):
        rae_diffusers(folder.path)
    for maps in (True, False):  # also those of the configuration
        folder.config |= {"reshape_to_2d": maps, "latents_std": [0.5, math.inf], "latents_mean": None}
        folder.state.pop("_latents_std", None)
        folder.state["_latents_mean"] = torch.zeros(())
        folder.write()
        with pytest.raises(ConfigError, match=r"latents_std = inf: 1 of 2 numbers are not finite"):
            rae_diffusers(folder.path)
    folder.config["latents_std"] = [[1.0], [1.0, 2.0]]
    folder.write()
    with pytest.raises(ConfigError, match=r"latents_std = .*is no array of numbers"):
        rae_diffusers(folder.path)
    (folder.path / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match="holds no weights"):
        rae_diffusers(folder.path)
    (folder.path / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        rae_diffusers(folder.path)
    with pytest.raises(ArtifactError, match=r"config\.json: there is no such file"):
        rae_diffusers(tmp_path)
