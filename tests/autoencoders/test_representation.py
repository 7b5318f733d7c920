from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from srcflow import artifacts
from srcflow.autoencoders.base import Autoencoder
from srcflow.autoencoders.representation import RepresentationAutoencoder
from srcflow.autoencoders.vit_decoder import ViTDecoder, vit_xl
from srcflow.encoders.dinov2 import DINOv2
from srcflow.encoders.efficientnet_lite import EfficientNetLite
from srcflow.errors import ConfigError, ShapeError
from srcflow.registry import build, spec_of
from srcflow.statistics import Moments

SMALL = {"embed_dim": 24, "depth": 1, "num_heads": 2}


def autoencoder(**changes: Any) -> RepresentationAutoencoder:
    torch.manual_seed(0)
    encoder = DINOv2(image_size=(28, 42), weights=None, timm_args=SMALL)
    return RepresentationAutoencoder(encoder, ViTDecoder(24, 16, 1, 2, 24, patch=4, grid=(2, 3)), **changes)


def images(n: int = 5) -> Tensor:
    return torch.rand(n, 3, 8, 12, generator=torch.Generator().manual_seed(1))


def fitted(**changes: Any) -> RepresentationAutoencoder:
    r = autoencoder(**changes)
    moments = Moments((6, 24))
    moments.update(r.features(images())[0])
    r.fit_statistics(moments)
    return r


def test_sizes() -> None:
    r = autoencoder()
    assert (r.grid, r.dim, r.image_size, r.needs_statistics, r.pixel_density) == ((2, 3), 24, (8, 12), True, False)
    assert r.default_noise() is None


def test_statistics_normalise_each_position() -> None:
    r = fitted()
    assert not r.needs_statistics
    raw, grid = r.features(images())
    assert grid == (2, 3)
    assert not raw.requires_grad
    x = r.normalize(raw)
    torch.testing.assert_close(x.mean(0), torch.zeros(6, 24), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.var(0, correction=0), torch.ones(6, 24), rtol=5e-3, atol=0)
    torch.testing.assert_close(r.denormalize(x), raw, rtol=1e-5, atol=1e-5)


def test_noise_is_added_before_the_statistics() -> None:
    r = fitted()
    raw, _ = r.features(images())
    noise = 0.4 * torch.randn_like(raw)
    torch.testing.assert_close(r.normalize(raw, noise) - r.normalize(raw), noise / (r.var + 1e-5).sqrt())


@pytest.mark.parametrize("shape", [(24,), (1, 24), (6, 1), (6, 24), ()])
def test_statistics_broadcast(shape: tuple[int, ...]) -> None:
    r = autoencoder()
    r.set_statistics(torch.full(shape, 2.0, dtype=torch.float64), torch.full(shape, 9.0))
    torch.testing.assert_close(r.normalize(torch.full((1, 6, 24), 5.0)), torch.ones(1, 6, 24), rtol=1e-5, atol=0)


def test_both_conventions_of_epsilon() -> None:
    x = torch.ones(1, 6, 24)
    for convention, divisor in (("variance", (4 + 0.5) ** 0.5), ("std", 2.5)):
        r = autoencoder(statistics_eps=0.5, eps_convention=convention)
        r.set_statistics(torch.zeros(()), torch.tensor(4.0))
        torch.testing.assert_close(r.normalize(x), x / divisor)


def test_decode_undoes_the_normalisations() -> None:
    r = fitted()
    raw, grid = r.features(images())
    x = r.normalize(raw).requires_grad_()
    out = r.decode(x, grid)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    torch.testing.assert_close(out, r.decoder.unpatchify(r.decoder(raw)) * std + mean, rtol=1e-4, atol=1e-5)
    assert out.shape == (5, 3, 8, 12)
    assert torch.equal(out, r.decode(x))
    with torch.no_grad():
        r.decoder.head.bias += 100
    assert float(r.decode(x).detach().min()) > 10  # not clamped
    with torch.autocast("cpu", torch.bfloat16):
        assert r.decode(x).dtype == torch.float32
    out.sum().backward()
    assert x.grad is not None
    assert bool((x.grad.abs().sum(-1) > 0).all())


def test_only_the_decoder_is_trained() -> None:
    r = fitted().train()
    assert r.decoder.training
    assert not any(m.training for m in r.encoder.modules())
    trainable = {id(p) for p in r.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in r.decoder.parameters()}
    assert id(r.last_layer()) in trainable


def test_state_is_self_contained() -> None:
    r = fitted()
    again = build(spec_of(r), Autoencoder)
    assert again.needs_statistics
    again.load_state_dict(r.state_dict())
    assert not again.needs_statistics
    x, _ = r.features(images())
    assert torch.equal(again.normalize(again.features(images())[0]), r.normalize(x))
    assert torch.equal(again.decode(r.normalize(x)), r.decode(r.normalize(x)))


def test_published_position_table_is_kept_where_there_is_one(tmp_path: Path) -> None:
    r = fitted()
    assert "published_positions" not in r.state_dict()
    plain = artifacts.load(artifacts.save(tmp_path / "plain", r), Autoencoder)
    assert isinstance(plain, RepresentationAutoencoder)
    assert plain.published_positions is None
    r.published_positions = torch.randn(1, 16, 24)
    again = artifacts.load(artifacts.save(tmp_path / "a", r), Autoencoder)
    assert isinstance(again, RepresentationAutoencoder)
    assert again.published_positions is not None
    assert torch.equal(again.published_positions, r.published_positions)
    artifacts.load_state(again, plain.state_dict(), what="a")
    assert again.published_positions is None


def test_setup_loads_the_decoder(tmp_path: Path) -> None:
    source = fitted()
    save_file(source.decoder.state_dict(), tmp_path / "d.safetensors")
    torch.manual_seed(1)
    r = RepresentationAutoencoder(
        DINOv2(image_size=(28, 42), weights=None, timm_args=SMALL),
        ViTDecoder(24, 16, 1, 2, 24, patch=4, grid=(2, 3)),
        decoder_weights=str(tmp_path / "d.safetensors"),
    )
    assert not torch.equal(r.decoder.head.weight, source.decoder.head.weight)
    r.setup()
    assert torch.equal(r.decoder.head.weight, source.decoder.head.weight)
    save_file({"x": torch.ones(1)}, tmp_path / "d.safetensors")
    with pytest.raises(ConfigError, match="decoder_weights"):
        r.setup()


def test_grid_of_encoder_and_decoder_may_differ() -> None:
    encoder = EfficientNetLite(image_size=32, stage=2, weights=None)  # 4 x 4 tokens
    r = RepresentationAutoencoder(encoder, ViTDecoder(40, 16, 1, 2, 24, patch=4, grid=8), image_size=32)
    assert (r.grid, r.image_size) == ((4, 4), (32, 32))
    r.set_statistics(torch.zeros(()), torch.ones(()))
    assert r.decode(torch.randn(1, 16, 40)).shape == (1, 3, 32, 32)


def test_meta_device() -> None:
    with torch.device("meta"):
        r = RepresentationAutoencoder(DINOv2(image_size=448), vit_xl(768, grid=32), image_size=512)
        assert (r.grid, r.needs_statistics) == ((32, 32), True)
        assert all(t.is_meta for t in r.state_dict().values())
        assert spec_of(build(spec_of(r), Autoencoder)) == spec_of(r)


def test_errors() -> None:
    encoder, decoder = EfficientNetLite(image_size=32, weights=None), ViTDecoder(112, 16, 1, 2, 24, patch=4, grid=2)
    with pytest.raises(ConfigError, match=r"decoder\.latent_dim = 8.*112"):
        RepresentationAutoencoder(encoder, ViTDecoder(8, 16, 1, 2, 24))
    with pytest.raises(ConfigError, match=r"grid = 3.*encoder\.image_size"):
        RepresentationAutoencoder(encoder, decoder, grid=3)
    with pytest.raises(ConfigError, match=r"image_size = 32.*decoder\.grid"):
        RepresentationAutoencoder(encoder, decoder, image_size=32)
    with pytest.raises(ConfigError, match="channels"):
        RepresentationAutoencoder(encoder, ViTDecoder(112, 16, 1, 2, 24, channels=1))
    r = RepresentationAutoencoder(encoder, decoder)
    with pytest.raises(ConfigError, match="fit_statistics"):
        r.normalize(torch.zeros(1, 4, 112))
    with pytest.raises(ShapeError, match=r"\(4, 112\)"):
        r.set_statistics(torch.zeros(5, 112), torch.ones(4, 112))
    assert r.needs_statistics
    r.set_statistics(torch.zeros(()), torch.ones(()))
    with pytest.raises(ShapeError, match="2 x 2"):
        r.normalize(torch.zeros(1, 9, 112))
