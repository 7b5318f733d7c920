"""Encoders against transformers itself: random small models of its own classes, both directions, no network.

In float32 the difference is 0 where a product of stacked matrices is computed as the products of the parts are, which holds for the
libraries this was written with (transformers 4.56.2 and 5.23.0, torch 2.15); the bounds leave room for others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from srcflow.convert.encoder import encoder, to_transformers
from srcflow.convert.state import read
from srcflow.encoders.base import Encoder

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def dinov2(size: int, **config: Any) -> nn.Module:
    config = {**SMALL, "image_size": size, "patch_size": 14, **config}
    return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**config))


def dinov2_without(size: int, **config: Any) -> nn.Module:
    return transformers.Dinov2Model(transformers.Dinov2Config(**{**SMALL, "image_size": size, "patch_size": 14, **config}))


def siglip(size: int, **config: Any) -> nn.Module:
    config = {**SMALL, "intermediate_size": 100, "image_size": size, "patch_size": 16, **config}
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**config))


def mae(size: int, **config: Any) -> nn.Module:
    config = {**SMALL, "intermediate_size": 100, "image_size": size, "patch_size": 16, "mask_ratio": 0.0, **config}
    return transformers.ViTMAEModel(transformers.ViTMAEConfig(**config))


Make = Callable[..., nn.Module]
CASES: dict[str, tuple[Make, dict[str, Any], int, int]] = {  # model, its config, trained at, used at
    "dinov2": (dinov2, {}, 70, 56),
    "dinov2, larger": (dinov2, {}, 56, 112),
    "dinov2, gated": (dinov2, {"use_swiglu_ffn": True}, 70, 56),
    "dinov2, tanh": (dinov2, {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-3}, 56, 56),
    "dinov2 without registers": (dinov2_without, {}, 70, 56),
    "siglip": (siglip, {}, 64, 64),
    "siglip, larger": (siglip, {"vision_use_head": False}, 64, 96),
    "siglip, smaller": (siglip, {}, 96, 64),
    "mae": (mae, {}, 64, 64),
    "mae, larger": (mae, {"layer_norm_eps": 1e-5}, 64, 80),
}


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, at a size at which each matters; the final norm without an effect of its own, as RAE uses it."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            wide = p.ndim > 1 and "position" not in name and "token" not in name
            p.copy_(torch.randn(p.shape, generator=g, dtype=p.dtype) * (0.15 if wide else 0.5))
        for name, m in model.named_modules():
            if name.endswith("layernorm") and "head" not in name:
                nn.init.ones_(m.weight)
                nn.init.zeros_(m.bias)
    return model.eval()


@torch.no_grad()
def their_tokens(model: nn.Module, pixels: Tensor) -> Tensor:
    kind = model.config.model_type
    if kind == "vit_mae":
        noise = torch.arange(pixels.shape[-1] ** 2 // 256, dtype=pixels.dtype).expand(len(pixels), -1)
        return model(pixels, noise=noise, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    if kind == "siglip_vision_model":
        return model(pixels, interpolate_pos_encoding=True).last_hidden_state
    return model(pixels).last_hidden_state[:, 1 + getattr(model.config, "num_register_tokens", 0) :]


def images(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def settings(config: dict[str, Any]) -> dict[str, Any]:
    names = {"hidden_act": "act", "layer_norm_eps": "layer_norm_eps"}
    return {names[k]: v for k, v in config.items() if k in names}


def registers(make: Make) -> dict[str, Any]:
    return {"registers": 0} if make is dinov2_without else {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_tokens_are_transformers_own(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """From the model in memory, and from the file it saves (the two are named differently in transformers 5)."""
    make, config, trained_at, size = CASES[case]
    model = randomised(make(trained_at, **config).to(dtype))
    model.save_pretrained(tmp_path)
    x = images(size, dtype)
    for state in (model.state_dict(), read(tmp_path / "model.safetensors")):
        ours = encoder(
            state, encoder_heads=4, encoder_input_size=size, encoder_trained_at=trained_at, **settings(config), **registers(make)
        )
        tokens, _ = ours(x)
        theirs = their_tokens(model, ours.prepare(x))
        assert tokens.dtype == dtype
        torch.testing.assert_close(tokens, theirs, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-13)
        assert float(theirs.std()) > 0.5


@pytest.mark.parametrize("case", CASES)
def test_exported_weights_give_the_same_tokens(case: str, tmp_path: Path) -> None:
    make, config, trained_at, size = CASES[case]
    source = randomised(make(trained_at, **config))
    ours: Any = encoder(source.state_dict(), encoder_heads=4, encoder_input_size=size, **settings(config), **registers(make))
    fresh = make(size, **{**config, **({"vision_use_head": False} if make is siglip else {})})
    fresh.save_pretrained(tmp_path)
    saved = {k: v.shape for k, v in load_file(tmp_path / "model.safetensors").items()}
    prefix = "vision_model." if all(k.startswith("vision_model.") for k in saved) else ""  # transformers 4 puts it before SigLIP's
    state = {f"{prefix}{k}": v for k, v in to_transformers(ours).items()}
    assert {k: v.shape for k, v in state.items()} == saved
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    again = type(fresh).from_pretrained(tmp_path).eval()
    x = images(size)
    torch.testing.assert_close(their_tokens(again, ours.prepare(x)), ours(x)[0], rtol=0, atol=1e-6)


def test_both_towers_of_a_siglip_file(tmp_path: Path) -> None:
    vision = {**SMALL, "intermediate_size": 100, "image_size": 64, "patch_size": 16}
    text = {**SMALL, "intermediate_size": 100, "vocab_size": 32, "max_position_embeddings": 8, "projection_size": 48}
    model = randomised(transformers.SiglipModel(transformers.SiglipConfig(vision_config=vision, text_config=text)))
    model.save_pretrained(tmp_path)
    ours: Encoder = encoder(read(tmp_path / "model.safetensors"), encoder_heads=4, encoder_input_size=64)
    x = images(64)
    torch.testing.assert_close(ours(x)[0], their_tokens(_Vision(model), ours.prepare(x)), rtol=0, atol=1e-6)


class _Vision(nn.Module):
    """The vision tower of a SigLIP model, called as a vision model is."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model.vision_model, model.config.vision_config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def test_a_masked_autoencoder_with_its_decoder(tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(
        **SMALL, intermediate_size=100, image_size=64, patch_size=16, mask_ratio=0.0, decoder_hidden_size=32,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32,
    )  # fmt: skip
    model = randomised(transformers.ViTMAEForPreTraining(config))
    model.save_pretrained(tmp_path)
    x = images(64)
    for state in (model.state_dict(), read(tmp_path / "model.safetensors")):
        ours = encoder(state, encoder_heads=4, encoder_input_size=64)
        torch.testing.assert_close(ours(x)[0], their_tokens(model.vit, ours.prepare(x)), rtol=0, atol=1e-6)
