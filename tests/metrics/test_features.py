"""Feature extractors: quantisation, names, and weights that are not at hand."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from srcflow.encoders.base import Encoder
from srcflow.errors import ConfigError, ShapeError
from srcflow.metrics.features.encoder import EncoderFeatures
from srcflow.metrics.features.inception import Inception
from srcflow.metrics.features.quantisation import to_uint8
from srcflow.types import Grid


class Patches(Encoder):
    """Random patch embedding of a set size."""

    def __init__(self, dim: int = 8, scale: float = 1.0, sides: tuple[int, int] | list[int] = (4, 4)) -> None:
        super().__init__(dim, 4)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, dim, 4, stride=4)

    def tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        x = self.conv(images)
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])


def test_every_level_survives_and_halves_round_up() -> None:
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 255), levels.to(torch.uint8))
    assert torch.equal(to_uint8(levels.double() / 255), levels.to(torch.uint8))
    assert to_uint8(torch.tensor([0.5 / 255, 1.5 / 255, 2.5 / 255], dtype=torch.float64)).tolist() == [1, 2, 3]
    assert to_uint8(torch.tensor([-1.0, 2.0])).tolist() == [0, 255]


def test_features_are_pooled_tokens_of_quantised_images() -> None:
    encoder = Patches()
    extractor = EncoderFeatures(encoder)
    x = torch.rand(3, 3, 16, 16) * 1.4 - 0.2
    stored = to_uint8(x).float() / 255
    torch.testing.assert_close(extractor(x), encoder(stored)[0].mean(1))
    torch.testing.assert_close(extractor(stored + 0.3 / 255), extractor(stored))  # less than half a level: the same image
    assert extractor.dim == 8


def test_mean_and_spread() -> None:
    encoder = Patches()
    extractor = EncoderFeatures(encoder, pool="mean_std")
    x = to_uint8(torch.rand(2, 3, 16, 16)).float() / 255
    tokens = encoder(x)[0]
    torch.testing.assert_close(extractor(x), torch.cat([tokens.mean(1), tokens.std(1, correction=0)], dim=1))
    assert extractor.dim == 16
    with pytest.raises(ConfigError, match="mean_std"):
        EncoderFeatures(encoder, pool="max")  # type: ignore[arg-type]


def test_two_settings_never_share_a_name() -> None:
    made = [
        EncoderFeatures(Patches()),
        EncoderFeatures(Patches(dim=16)),
        EncoderFeatures(Patches(scale=2.0)),
        EncoderFeatures(Patches(sides=(4, 8))),
        EncoderFeatures(Patches(), pool="mean_std"),
    ]
    names = [e.name for e in made] + [Inception.name]
    assert len(set(names)) == len(names)
    assert names[1].endswith(".Patches(dim=16)")  # another distribution's class: its full path
    assert EncoderFeatures(Patches(sides=[4, 4])).name == names[0]  # as YAML writes it


def test_names_of_registered_encoders_are_short() -> None:
    from srcflow.encoders.efficientnet_lite import EfficientNetLite

    assert EncoderFeatures(EfficientNetLite()).name == "EfficientNetLite(size=lite0)"
    assert EncoderFeatures(EfficientNetLite("lite1", weights=None)).name == "EfficientNetLite(size=lite1,weights=None)"


def test_extractor_is_frozen_float32_and_not_saved() -> None:
    owner = nn.ModuleList([EncoderFeatures(Patches())])
    x = torch.rand(2, 3, 16, 16)
    before = owner[0](x)
    owner.train().to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after = owner[0](x.requires_grad_())
    assert after.dtype == torch.float32
    assert not after.requires_grad
    assert not owner.state_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_images_only() -> None:
    with pytest.raises(ShapeError, match=r"\(B, 3, H, W\)"):
        EncoderFeatures(Patches())(torch.rand(3, 16, 16))


def test_inception_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ConfigError, match=r"checkpoints/weights-inception-2015-12-05-6726825d\.pth, where no file is.*EncoderFeatures"):
        Inception().setup()
    with pytest.raises(ConfigError, match="nowhere"):
        Inception(str(tmp_path / "nowhere.pth")).setup()
    (tmp_path / "other.pth").write_bytes(b"other weights")
    with pytest.raises(ConfigError, match=r"sha256 is \w+.*6726825d"):
        Inception(str(tmp_path / "other.pth")).setup()
    with pytest.raises(ConfigError, match="setup"):
        Inception()(torch.rand(1, 3, 32, 32))


def test_inception_is_torch_fidelitys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a file of random weights under the published name, features equal those of torch-fidelity's own class."""
    module: Any = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    network_class = module.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        patch.setattr(network_class, "load_state_dict", lambda self, state: None)
        torch.manual_seed(0)
        reference = network_class("inception-v3-compat", ["2048"])
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / Inception.FILE
    torch.save(reference.state_dict(), path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(Inception, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    extractor = Inception()
    extractor.setup()
    x = torch.rand(2, 3, 32, 32)
    features = extractor.to(torch.bfloat16)(x)
    assert features.shape == (2, Inception.dim)
    torch.testing.assert_close(features, reference((x * 255 + 0.5).to(torch.uint8))[0])
    assert features.std(0).max() > 0
    assert not extractor.state_dict()
