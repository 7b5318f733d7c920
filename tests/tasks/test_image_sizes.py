"""Images of another size than the autoencoder decodes are refused at the start, in every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.compressors.linear import Linear
from srcflow.data.feature_store import FeatureStoreWriter
from srcflow.datamodules.feature_store import FeatureStore
from srcflow.datamodules.image_folder import ImageFolder
from srcflow.errors import ConfigError
from srcflow.flows import presets
from srcflow.tasks.autoencoder import AutoencoderTask
from srcflow.tasks.base import Task
from srcflow.tasks.compressor import CompressorTask
from srcflow.tasks.flow import FlowTask


def tasks(root: Path) -> dict[str, Task]:
    """Every stage on pixels of 12 x 12."""
    codec = str(artifacts.save(root / "codec", PixelPatches(12, 6)))
    return {
        "autoencoder": AutoencoderTask(PixelPatches(12, 6), noise=None, eval_noise=None),
        "compressor": CompressorTask(codec, Linear(108, 4), noise=None, eval_noise=None),
        "flow": FlowTask(presets.srcflow(2, 108, 32, [1], num_classes=0, head_dim=16), codec),
    }


def folder(root: Path) -> ImageFolder:
    for i in range(8):
        (root / "images").mkdir(exist_ok=True)
        Image.fromarray(np.full((20, 20, 3), 30 * i, np.uint8)).save(root / "images" / f"{i}.png")
    return ImageFolder(*[str(root / "images")] * 3, size=18, batch_size=4)


def store(root: Path) -> FeatureStore:
    facts = {"grid": (3, 3), "encoder": {"spec": {"class_path": "E", "init_args": {}}, "weights": "x"}, "transform": {"size": 18}}
    with FeatureStoreWriter(str(root / "store"), n=4, tokens=9, dim=108, image_size=(18, 18), dtype="float32", manifest=facts) as writer:
        writer.write(
            torch.arange(4), torch.zeros(4, 9, 108), torch.zeros(4, 3, 18, 18, dtype=torch.uint8), torch.zeros(4).long(), list("abcd")
        )
    return FeatureStore(*[str(root / "store")] * 3, batch_size=2)


class Own(L.LightningDataModule):
    """A datamodule that does not tell its size."""

    num_classes, batch_size = 0, 4

    def train_dataloader(self) -> DataLoader[Any]:
        row = {"images": torch.zeros(3, 18, 18, dtype=torch.uint8), "labels": -1, "indices": 0, "valid": torch.tensor(True)}
        return DataLoader([row] * 8, batch_size=4)  # type: ignore[arg-type]

    val_dataloader = test_dataloader = train_dataloader


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (folder, r"data.size = 18: the autoencoder \(PixelPatches\) decodes images of 12 x 12 pixels. Write data.size: 12, or"),
        (store, r"image_size of data.path_\w+ = \(18, 18\): .*12 x 12 pixels. Encode images of that size \(srcflow encode\), or"),
        (Own, r"size of the images = \(18, 18\): .*12 x 12 pixels"),
    ],
)
@pytest.mark.parametrize(("stage", "command"), [(s, c) for s in ("autoencoder", "compressor", "flow") for c in ("fit", "test")])
def test_another_size_is_refused(tmp_path: Path, stage: str, data: Any, words: str, command: str) -> None:
    if (data, stage, command) == (Own, "autoencoder", "fit"):
        return  # pixels are not trained, so that no batch is looked at
    trainer = L.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, default_root_dir=tmp_path,
    )  # fmt: skip
    task = tasks(tmp_path)[stage]
    if stage == "flow":
        task.flow.normalization = None  # type: ignore[union-attr,assignment]  # as if it were trained
    with pytest.raises(ConfigError, match=words):
        getattr(trainer, command)(task, datamodule=Own() if data is Own else data(tmp_path))
