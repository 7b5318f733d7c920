from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from srcflow.autoencoders.vit_decoder import ViTDecoder, sincos_table, vit_b, vit_l, vit_xl
from srcflow.errors import ConfigError, ShapeError
from srcflow.registry import build, spec_of


def decoder(**changes: Any) -> ViTDecoder:
    torch.manual_seed(0)
    made = ViTDecoder(**{"latent_dim": 6, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 24, "patch": 2, "grid": (3, 4), **changes})
    with torch.no_grad():
        for p in made.parameters():
            p += 0.05 * torch.randn_like(p)
    return made


def test_positions_column_first_sines_before_cosines() -> None:
    rows, columns, dim = 3, 5, 24
    table = sincos_table(dim, (rows, columns))
    assert table.dtype == torch.float32
    assert not bool(table[0, 0].any())
    frequency = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    for r in range(rows):
        for c in range(columns):
            want = np.concatenate([f(p * frequency) for p in (c, r) for f in (np.sin, np.cos)])
            np.testing.assert_array_equal(table[0, 1 + r * columns + c].numpy(), want.astype(np.float32))


@pytest.mark.parametrize(("eps", "qkv_bias"), [(1e-12, True), (0.5, False)])
def test_forward_follows_the_equations(eps: float, qkv_bias: bool) -> None:
    """Against a plain transcription of the published forward pass."""
    d, x = decoder(norm_eps=eps, qkv_bias=qkv_bias).double(), torch.randn(2, 12, 6, dtype=torch.float64)
    h = torch.cat([d.cls_token.expand(2, 1, 16), nn.functional.linear(x, d.embed.weight, d.embed.bias)], 1) + d.pos_embed
    for block in d.blocks:
        n = nn.functional.layer_norm(h, (16,), block.norm1.weight, block.norm1.bias, eps)
        q, k, v = (n @ block.attn.qkv.weight.T + (block.attn.qkv.bias if qkv_bias else 0)).reshape(2, 13, 3, 2, 8).permute(2, 0, 3, 1, 4)
        a = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v
        h = h + a.transpose(1, 2).reshape(2, 13, 16) @ block.attn.proj.weight.T + block.attn.proj.bias
        n = nn.functional.layer_norm(h, (16,), block.norm2.weight, block.norm2.bias, eps)
        n = nn.functional.gelu(n @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
        h = h + n @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    want = nn.functional.layer_norm(h, (16,), d.norm.weight, d.norm.bias, eps) @ d.head.weight.T + d.head.bias
    assert ("blocks.0.attn.qkv.bias" in d.state_dict()) == qkv_bias
    patches = d(x)
    torch.testing.assert_close(patches, want[:, 1:], rtol=1e-10, atol=1e-10)
    image = d.unpatchify(patches)
    assert image.shape == (2, 3, 6, 8)
    assert torch.equal(image[1, :, 2:4, 6:8], patches[1, 7].reshape(2, 2, 3).permute(2, 0, 1))  # row 1, column 3; channel fastest


def test_other_grids_are_resampled_after_the_embedding() -> None:
    d = decoder(grid=4)
    x = torch.randn(2, 9, 6)
    h = d.embed(x).transpose(1, 2).reshape(2, 16, 3, 3)
    h = nn.functional.interpolate(h, (4, 4), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    bare = decoder(grid=4, latent_dim=16)
    bare.load_state_dict({**d.state_dict(), "embed.weight": torch.eye(16), "embed.bias": torch.zeros(16)})
    torch.testing.assert_close(d(x), bare(h), rtol=1e-4, atol=1e-5)
    assert torch.equal(d(x), d(x, (3, 3)))
    wide = decoder(grid=(2, 6))
    tokens = torch.randn(1, 12, 6)
    assert not torch.allclose(wide(tokens, (3, 4)), wide(tokens))  # as many tokens, but another shape
    with pytest.raises(ShapeError, match="pass their grid"):
        d(torch.randn(1, 10, 6))
    with pytest.raises(ShapeError, match="2 x 4"):
        d(x, (2, 4))
    with pytest.raises(ShapeError, match="latent_dim = 6"):
        d(torch.randn(1, 16, 5))


def test_every_parameter_gets_a_gradient() -> None:
    d = decoder()
    x = torch.randn(2, 12, 6, requires_grad=True)
    d(x).square().sum().backward()
    assert not [n for n, p in d.named_parameters() if p.grad is None or not bool(p.grad.abs().max() > 0)]
    assert x.grad is not None
    assert bool((x.grad.abs().sum(-1) > 0).all())
    assert "pos_embed" in d.state_dict()
    assert "pos_embed" not in dict(d.named_parameters())


def test_mlp_width_is_not_rounded_down() -> None:
    with torch.device("meta"):
        d = ViTDecoder(8, 448, 1, 7, 3904)
    assert d.blocks[0].mlp.fc1.out_features == 3904


@pytest.mark.parametrize(("make", "millions", "head_dim"), [(vit_b, 86, 64), (vit_l, 304, 64), (vit_xl, 414, 72)])
def test_presets_on_the_meta_device(make: Any, millions: float, head_dim: int) -> None:
    with torch.device("meta"):
        d = make(768, grid=32)
        assert d.image_size == (512, 512)
        assert sum(p.numel() for p in d.parameters()) == pytest.approx(millions * 1e6, rel=0.02)
        assert d.blocks[0].attn.head_dim == head_dim
        assert all(t.is_meta for t in d.state_dict().values())
        spec = spec_of(d)
        assert spec["init_args"] == {"latent_dim": 768, "patch": 16, "grid": 32}
        assert build(spec, ViTDecoder).depth == d.depth
        assert spec_of(build(spec, ViTDecoder)) == spec


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"decoder\.heads = 3"):
        decoder(heads=3)
    with pytest.raises(ConfigError, match="multiple of 4"):
        decoder(dim=18)
