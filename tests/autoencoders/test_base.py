from __future__ import annotations

import torch

from srcflow.autoencoders.pixels import PixelPatches
from srcflow.data.manifest import made_by, weights_hash
from srcflow.registry import spec_of

from .half_means import HalfMeans


def test_features_without_a_deviation_are_their_own_mean() -> None:
    p = PixelPatches((8, 12), 4, scale="linear")
    images = torch.rand(2, 3, 8, 12, requires_grad=True)
    mean, deviation, grid = p.posterior(images)
    assert deviation is None
    assert grid == (2, 3)
    assert torch.equal(mean, p.features(images)[0])
    assert not mean.requires_grad


def test_stored_features_belong_to_an_autoencoder_of_equal_settings_and_weights() -> None:
    a, b = HalfMeans(), HalfMeans()
    assert made_by(a) == {"autoencoder": {"spec": spec_of(a), "weights": weights_hash(a)}}
    assert made_by(a) == made_by(b)
    b.setup()
    assert made_by(a)["autoencoder"]["weights"] != made_by(b)["autoencoder"]["weights"]
    assert made_by(a)["autoencoder"]["spec"] != made_by(HalfMeans(0.5))["autoencoder"]["spec"]
