"""A tiny codec and tiny data, and a trainer for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from srcflow.autoencoders.representation import RepresentationAutoencoder
from srcflow.autoencoders.vit_decoder import ViTDecoder
from srcflow.encoders.base import Encoder
from srcflow.types import Batch, Grid


class PatchEncoder(Encoder):
    """A random projection of 4 x 4 patches, after a nonlinearity."""

    def __init__(self, dim: int = 16, fill: int = 0) -> None:
        super().__init__(dim=dim, patch_size=4)
        self.conv = nn.Conv2d(3, dim, 4, stride=4)
        self.fill = fill
        self.setups = 0
        self.train(False)

    def setup(self) -> None:
        self.setups += 1
        generator = torch.Generator().manual_seed(self.fill)
        with torch.no_grad():
            self.conv.weight.copy_(torch.randn(self.conv.weight.shape, generator=generator) * 0.2)

    def tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        x = F.gelu(self.conv(images))
        return x.flatten(2).mT, (x.shape[2], x.shape[3])


class Pictures(L.LightningDataModule):
    """Smooth random images; the last one of each evaluation is padding."""

    num_classes = 3

    def __init__(self, train: int = 32, test: int = 8, batch_size: int = 8, poison: int = -1) -> None:
        super().__init__()
        self.sizes, self.batch_size, self.poison = (train, test), batch_size, poison

    def samples(self, n: int, seed: int) -> list[dict[str, Tensor]]:
        coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        images = (F.interpolate(coarse, size=(16, 16), mode="bilinear") * 255).to(torch.uint8)
        return [
            {"images": images[i], "labels": torch.tensor(i % 3), "indices": torch.tensor(i), "valid": torch.tensor(True)} for i in range(n)
        ]

    def train_dataloader(self) -> Any:
        return DataLoader(self.samples(self.sizes[0], 0), batch_size=self.batch_size)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        rows = self.samples(self.sizes[1], 1)
        rows.append({**rows[0], "images": torch.zeros(3, 16, 16, dtype=torch.uint8), "valid": torch.tensor(False)})
        return DataLoader(rows, batch_size=3)  # type: ignore[arg-type]

    test_dataloader = val_dataloader

    def fingerprint(self) -> dict[str, Any]:
        return {"class": "Pictures", "train": self.sizes[0]}


class FeatureBatches(Pictures):
    """The same as stored features; images only where they are asked for."""

    def __init__(self, autoencoder: RepresentationAutoencoder, with_images: bool = False) -> None:
        super().__init__()
        self.autoencoder, self.with_images = autoencoder, with_images

    def train_dataloader(self) -> Any:
        def features(batch: Any) -> Batch:
            out = torch.utils.data.default_collate(batch)
            out["features"], out["grid"] = self.autoencoder.features(out["images"].float() / 255)
            if not self.with_images:
                del out["images"]
            return out  # type: ignore[return-value]

        return DataLoader(self.samples(self.sizes[0], 0), batch_size=self.batch_size, collate_fn=features)  # type: ignore[arg-type]


def tiny_autoencoder(dim: int = 16, fill: int = 0) -> RepresentationAutoencoder:
    torch.manual_seed(1)
    return RepresentationAutoencoder(PatchEncoder(dim, fill), ViTDecoder(dim, dim=16, depth=1, heads=2, mlp_dim=32, patch=4, grid=4))


def make_trainer(path: Path, **more: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 8,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": path,
        "log_every_n_steps": 1,
    }
    return L.Trainer(**{**settings, **more})


@pytest.fixture
def autoencoder() -> Callable[..., RepresentationAutoencoder]:
    return tiny_autoencoder


@pytest.fixture
def encoder() -> type[PatchEncoder]:
    return PatchEncoder


@pytest.fixture
def pictures() -> type[Pictures]:
    return Pictures


@pytest.fixture
def feature_batches() -> type[FeatureBatches]:
    return FeatureBatches


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., L.Trainer]:
    def make(**more: Any) -> L.Trainer:
        return make_trainer(tmp_path, **more)

    return make


ALLOWED_WARNINGS = {
    "ignore:.*LeafSpec.*:FutureWarning": "Lightning 2.6 under torch 2.15",
    "ignore:.*module\\(s\\) in eval mode:UserWarning": "frozen encoders stay in eval mode on purpose",
    "ignore:.*callbacks used to create the checkpoint:UserWarning": "evaluation works without the EMA callback",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for line in ALLOWED_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(line))
