"""What `srcflow test` measures of flows under Gaussian noise: denoised samples, and no bits per dimension."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.compressors.linear import Linear
from srcflow.errors import ConfigError, ProblemsError
from srcflow.flows import presets
from srcflow.flows.flow import Flow
from srcflow.metrics.features.base import Extractor
from srcflow.noise import Constant, Dequantisation, Noise
from srcflow.pipeline import Pipeline
from srcflow.tasks.flow import FlowTask
from srcflow.tasks.flow_evaluation import Evaluation
from srcflow.testing import perturb
from srcflow.testing.expect import finite
from srcflow.types import Condition

SAMPLES = 16


class Greys(L.LightningDataModule):
    """16 images of 12 x 12 pixels, of three classes."""

    num_classes, batch_size = 3, 8

    def test_dataloader(self) -> DataLoader[Any]:
        images = torch.randint(0, 256, (SAMPLES, 3, 12, 12), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
        rows = [
            {"images": x, "labels": torch.tensor(i % 3), "indices": torch.tensor(i), "valid": torch.tensor(True)}
            for i, x in enumerate(images)
        ]
        return DataLoader(rows, batch_size=self.batch_size)  # type: ignore[arg-type]


class Watching(Extractor):
    """Mean colours of the quadrants, and a record of the images that were judged."""

    name, dim = "watching", 12

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1).float()


def flow() -> Flow:
    torch.manual_seed(0)
    return perturb(presets.srcflow(2, 108, 32, [1, 1], num_classes=3, head_dim=16, normalization="none"), 0.1)


def measured(root: Path, codec: Path, noise: Noise | None, **evaluation: Any) -> tuple[dict[str, Any], FlowTask]:
    settings = Evaluation(samples=SAMPLES, classified=0, baseline_batches=0, round_trip=0, floor=False, **evaluation)
    task = FlowTask(flow(), str(codec), noise=noise, evaluation=settings, metrics_file=str(root / "m.json"), seed=3)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=root)
    trainer.test(task, Greys(), verbose=False)
    return json.loads((root / "m.json").read_text()), task


@pytest.fixture
def codec(tmp_path: Path) -> Path:
    return artifacts.save(tmp_path / "pixels", PixelPatches(12, 6, scale="linear"))


def test_distances_are_of_denoised_samples(tmp_path: Path, codec: Path) -> None:
    judge = Watching()
    written, _ = measured(tmp_path, codec, Constant(0.3), extractor=judge, denoise=0.3)
    pipeline = Pipeline(PixelPatches(12, 6, scale="linear"), flow=flow())
    labels = Condition(labels=torch.arange(SAMPLES) % 3)
    drawn = torch.cat(judge.seen[-2:])  # the last ones are the samples
    finite(drawn, "samples", "denoised images")
    torch.testing.assert_close(drawn, pipeline.sample(labels, seed=3, denoise=0.3), atol=1e-5, rtol=0)
    assert not torch.allclose(drawn, pipeline.sample(labels, seed=3), atol=1e-2)
    assert (written["protocol"]["denoise"], written["protocol"]["denoiser"]) == (0.3, "score")


def test_denoising_touches_what_has_noise_and_nothing_else(tmp_path: Path, codec: Path) -> None:
    plain, denoised = (measured(tmp_path, codec, Constant(0.3), extractor=Watching(), denoise=s)[0]["metrics"] for s in (None, 0.3))
    changed = {k for k in plain if k != "images_per_second" and plain[k] != denoised[k]}
    noisy = {k for k in plain if k.endswith("_noisy")}
    assert changed == {"gfid_16", "rfid_noisy_16", "fd_decoded_16", *noisy}
    assert {"nll", "rfid_16", "reconstruction_l1"} <= set(plain) - changed


def test_gaussian_noise_has_no_bits_per_dimension(tmp_path: Path, codec: Path) -> None:
    levels = artifacts.save(tmp_path / "levels", PixelPatches(12, 6))
    assert "bits_per_dim" in measured(tmp_path, levels, None)[0]["metrics"]
    assert "bits_per_dim" not in measured(tmp_path, levels, Constant(0.05))[0]["metrics"]
    for noise in (Constant(0.05), Dequantisation()):
        assert "bits_per_dim" not in measured(tmp_path, codec, noise)[0]["metrics"]
    with pytest.raises(ConfigError, match=r"model.noise = None.*Write Constant"):
        measured(tmp_path, codec, None)


def test_what_cannot_be_denoised_is_refused_before_the_run_starts(tmp_path: Path, codec: Path) -> None:
    coded = tmp_path / "linear"
    artifacts.save(coded, Linear(108, 108, start="random"), manifest={"built_on": {"autoencoder": artifacts.reference(codec, start=coded)}})
    judge = Watching()
    for place, noise, how, words in (
        (coded, Constant(0.3), {}, r"evaluation.denoise = 0.3: the noise was added to the features before the compressor \(Linear\)"),
        (codec, Dequantisation(), {}, r"evaluation.denoise = 0.3: the flow's noise, Dequantisation, is not Gaussian"),
        (codec, Constant(0.3), {"denoiser": "learned"}, r"evaluation.denoiser = 'learned': this flow has no learnable denoiser"),
    ):
        with pytest.raises(ConfigError, match=words):
            measured(tmp_path, place, noise, extractor=judge, denoise=0.3, **how)
    assert not judge.seen


def test_settings_that_ask_for_no_denoising_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluation.denoise = -0.1: a standard deviation"):
        Evaluation(denoise=-0.1)
    with pytest.raises(ConfigError, match=r"evaluation.denoiser = 'learned': does nothing without evaluation.denoise"):
        Evaluation(denoiser="learned")
    with pytest.raises(ProblemsError, match="2 problems"):
        Evaluation(denoise=-0.1, draws=0)
