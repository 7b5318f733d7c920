"""Perceptual distances: values, gradients, and what they leave out of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from srcflow.errors import ConfigError, ShapeError
from srcflow.losses.perceptual import LPIPS, EncoderPerceptual
from srcflow.registry import spec_of


def images(n: int = 2, size: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_encoder_distance_is_lpips_without_weights(pyramid: Any) -> None:
    loss = EncoderPerceptual(pyramid)
    a, b = images(seed=1), images(seed=2)
    expected = 0.0
    for x, y in zip(pyramid.intermediates(a), pyramid.intermediates(b), strict=True):
        cosine = nn.functional.cosine_similarity(x, y, dim=1, eps=1e-12)
        expected += (2 - 2 * cosine).mean().item() / 2  # |x/|x| - y/|y||^2 = 2 - 2 cos
    assert loss(a, b).item() == pytest.approx(expected, rel=1e-4)
    assert loss(a, a).item() == 0


def test_gradient_reaches_the_prediction_only(pyramid: Any) -> None:
    a, b = images(seed=1).requires_grad_(), images(seed=2).requires_grad_()
    EncoderPerceptual(pyramid)(a, b).backward()
    assert a.grad is not None
    assert a.grad.abs().sum() > 0
    assert b.grad is None
    assert all(p.grad is None for p in pyramid.parameters())


def test_layers_are_chosen(pyramid: Any) -> None:
    a, b = images(seed=1), images(seed=2)
    each = [EncoderPerceptual(pyramid, layers=[i])(a, b) for i in (0, 1)]
    torch.testing.assert_close(EncoderPerceptual(pyramid, layers=[1, 0])(a, b), torch.stack(each).mean())
    assert each[0] != each[1]


def test_final_tokens_where_there_are_no_intermediates(tokens_only: Any) -> None:
    a, b = images(seed=1), images(seed=2)
    x, y = tokens_only(a)[0], tokens_only(b)[0]
    expected = (2 - 2 * nn.functional.cosine_similarity(x, y, dim=-1)).mean()
    torch.testing.assert_close(EncoderPerceptual(tokens_only)(a, b), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match="final tokens only"):
        EncoderPerceptual(tokens_only, layers=[1])


def test_resizes_inside(pyramid: Any) -> None:
    EncoderPerceptual(pyramid, image_size=8)(images(size=16), images(size=16, seed=3))
    EncoderPerceptual(pyramid, image_size=8)(torch.rand(1, 3, 16, 32), torch.rand(1, 3, 16, 32))
    assert pyramid.sizes == [(2, 3, 8, 8)] * 2 + [(1, 3, 8, 16)] * 2
    pyramid.input_size = (8, 8)
    with pytest.raises(ConfigError, match="resizes its input"):
        EncoderPerceptual(pyramid, image_size=8)


def test_is_not_part_of_its_owner_and_stays_float32(pyramid: Any) -> None:
    owner = nn.Module()
    owner.loss = EncoderPerceptual(pyramid)
    owner.train().to(torch.bfloat16)
    assert not owner.state_dict()
    assert not list(owner.parameters())
    assert not pyramid.training
    value = owner.loss(images().bfloat16(), images(seed=1).bfloat16())
    assert value.dtype == torch.float32
    assert "Pyramid" in spec_of(owner.loss)["init_args"]["encoder"]["class_path"]


def test_setup_is_passed_on(pyramid: Any) -> None:
    EncoderPerceptual(pyramid).setup()
    assert pyramid.loaded


def test_refuses_different_shapes(pyramid: Any) -> None:
    with pytest.raises(ShapeError, match=r"\(2, 3, 16, 16\).*\(1, 3, 16, 16\)"):
        EncoderPerceptual(pyramid)(images(2), images(1))


def test_float64_stays(pyramid: Any) -> None:
    loss = EncoderPerceptual(pyramid).double()
    assert loss(images().double(), images(seed=1).double()).dtype == torch.float64


@pytest.fixture(params=["alex", "squeeze"])
def lpips(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LPIPS:
    """LPIPS whose backbone file holds random weights, found in a hub directory."""
    import torchvision

    torch.manual_seed(0)
    name = {"alex": "alexnet", "squeeze": "squeezenet1_1"}[request.param]
    backbone = getattr(torchvision.models, name)(weights=None)
    state = {k: v for k, v in backbone.state_dict().items() if k.startswith("features.")}
    (tmp_path / "checkpoints").mkdir()
    torch.save(state, tmp_path / "checkpoints" / LPIPS._FILES[request.param][1])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    loss = LPIPS(request.param)
    loss.setup()
    return loss


def test_lpips_equals_the_network_inside_torchmetrics(lpips: LPIPS) -> None:
    a, b = images(size=64, seed=1), images(size=64, seed=2)
    assert lpips.network is not None
    network = lpips.network.module
    network.lins = torch.nn.ModuleList(getattr(network, f"lin{i}") for i in range(network.L))
    expected = network(a, b, normalize=True).mean()
    assert expected > 0
    torch.testing.assert_close(lpips(a, b), expected)


def test_lpips_takes_unclamped_images_and_passes_gradients(lpips: LPIPS) -> None:
    a = (images(size=64, seed=1) * 3 - 1).requires_grad_()
    lpips(a, images(size=64)).backward()
    assert a.grad is not None
    assert torch.isfinite(a.grad).all()
    assert a.grad.abs().sum() > 0
    assert not lpips.state_dict()
    assert not list(lpips.parameters())


def test_lpips_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("went to the network"))
    with pytest.raises(ConfigError, match=r"checkpoints/vgg16-397923af\.pth, where no file is.*EncoderPerceptual"):
        LPIPS().setup()
    with pytest.raises(ConfigError, match="nowhere"):
        LPIPS(weights=str(tmp_path / "nowhere.pth"), allow_download=True).setup()
    (tmp_path / "damaged.pth").write_bytes(b"not a file of tensors")
    with pytest.raises(ConfigError, match=r"damaged\.pth.*not a readable state dict"):
        LPIPS(weights=str(tmp_path / "damaged.pth")).setup()
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match=r"features\.\d+\.\w+ is missing"):
        LPIPS(weights=str(tmp_path / "other.pth")).setup()
    with pytest.raises(ConfigError, match="setup"):
        LPIPS()(images(), images())


def test_lpips_downloads_when_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **k: asked.append(url) or {})
    with pytest.raises(ConfigError, match="is missing"):
        LPIPS("alex", allow_download=True).setup()
    assert asked[0].endswith(LPIPS._FILES["alex"][1])


def test_published_names_are_torchvisions() -> None:
    import torchvision

    for enum, name in LPIPS._FILES.values():
        assert getattr(torchvision.models, enum).DEFAULT.url.endswith(name)


def test_on_a_registered_encoder() -> None:
    from srcflow.encoders.efficientnet_lite import EfficientNetLite

    torch.manual_seed(0)
    loss = EncoderPerceptual(EfficientNetLite("lite0", image_size=32, stage=2, weights=None), layers=[0, 1, 2])
    loss.setup()
    a = images(seed=1, size=24).requires_grad_()
    loss(a, images(seed=2, size=24)).backward()
    assert a.grad is not None
    assert a.grad.abs().sum() > 0
