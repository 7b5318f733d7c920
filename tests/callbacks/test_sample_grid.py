from __future__ import annotations

import csv
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch import Tensor, nn

from srcflow.callbacks.sample_grid import ReconstructionGrid, SampleGrid, grid_of
from srcflow.callbacks.throughput import Throughput
from srcflow.errors import ConfigError
from srcflow.metrics.non_finite import NonFiniteImagesWarning

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore:.*no `val_dataloader`:UserWarning"),
]


class Data(L.LightningDataModule):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def train_dataloader(self) -> Any:
        rows = [{"indices": torch.tensor(i), "images": torch.full((3, 4, 4), 0.25)} for i in range(12)]
        return torch.utils.data.DataLoader(rows, batch_size=2)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


class Painter(L.LightningModule):
    """Samples are of the label's grey."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5).eval())
        self.calls: list[tuple[list[int], int, bool]] = []

    def evaluation_weights(self) -> AbstractContextManager[None]:
        return nullcontext()

    def sample_images(self, labels: Tensor, seed: int) -> Tensor:
        self.calls.append((labels.tolist(), seed, self.net.training))
        return (labels.float() / 10).clamp(0, 1).reshape(-1, 1, 1, 1).expand(-1, 3, 4, 4)

    def reconstruction_images(self, batch: Any, limit: int) -> dict[str, Tensor]:
        return {"original": batch["images"][:limit], "reconstruction": 1 - batch["images"][:limit]}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(torch.ones(1, 1)).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(path: Path, model: L.LightningModule, callbacks: list[L.Callback], num_classes: int = 3, **more: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=6, callbacks=callbacks, default_root_dir=path, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, **{"logger": False, **more},
    )  # fmt: skip
    trainer.fit(model, datamodule=Data(num_classes))
    return trainer


@pytest.mark.filterwarnings("ignore:.*module\\(s\\) in eval mode:UserWarning")
def test_samples_are_drawn_per_class_in_eval_mode_and_written(tmp_path: Path) -> None:
    model = Painter()
    fit(tmp_path, model, [SampleGrid(every_n_steps=3, columns=2, seed=7)], logger=TensorBoardLogger(tmp_path / "tb"))
    assert model.calls == [([0, 0, 1, 1, 2, 2], 7, False)] * 2
    assert model.net.training
    assert not model.net[1].training  # what was in eval mode stays so
    written = sorted((tmp_path / "tb").rglob("samples/*.png"))
    assert [p.name for p in written] == ["step-00000003.png", "step-00000006.png"]
    pixels = np.asarray(Image.open(written[0]))
    assert pixels.shape == (3 * 6 - 2, 2 * 6 - 2, 3)
    assert [int(pixels[r, 0, 0]) for r in (0, 6, 12)] == [0, 26, 51]


@pytest.mark.filterwarnings("ignore:.*module\\(s\\) in eval mode:UserWarning")
def test_unconditional_samples_and_reconstructions(tmp_path: Path) -> None:
    model = Painter()
    fit(tmp_path, model, [SampleGrid(every_n_steps=6, columns=3, rows=2), ReconstructionGrid(count=2)], num_classes=0)
    assert model.calls == [([-1] * 6, 0, False)]
    (picture,) = (tmp_path / "reconstructions").glob("*.png")
    pixels = np.asarray(Image.open(picture))
    assert pixels.shape == (10, 10, 3)
    assert (pixels[0, 0, 0], pixels[6, 0, 0]) == (64, 191)


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    plain: Any = L.LightningModule()
    with pytest.raises(ConfigError, match="draws no samples"):
        SampleGrid().setup(L.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False), plain, "fit")
    with pytest.raises(ConfigError, match="reconstructs no images"):
        ReconstructionGrid().setup(L.Trainer(logger=False, accelerator="cpu", enable_checkpointing=False), plain, "fit")
    with pytest.raises(ConfigError, match="num_classes = 3"):
        fit(tmp_path, Painter(), [SampleGrid(classes=[1, 3])])
    with pytest.raises(ConfigError, match="every_n_steps"):
        SampleGrid(every_n_steps=0)


def test_a_last_row_is_filled_with_white() -> None:
    sheet = grid_of(torch.zeros(3, 3, 2, 2), columns=2, gap=1)
    assert sheet.shape == (3, 5, 5)
    assert (sheet[:, 3:, 3:] == 255).all()
    assert (sheet[:, 3:, :2] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_image_that_is_not_finite_is_magenta(bad: float) -> None:
    images = torch.zeros(2, 3, 2, 2)
    images[1, 0, 0, 0] = bad
    sheet = grid_of(images, columns=2, gap=1)
    assert (sheet[:, :, :2] == 0).all()
    assert (sheet[:, :, 3:] == torch.tensor([255, 0, 255], dtype=torch.uint8).reshape(3, 1, 1)).all()


@pytest.mark.filterwarnings("ignore:.*module\\(s\\) in eval mode:UserWarning")
def test_images_that_are_not_finite_are_counted_and_logged(tmp_path: Path) -> None:
    class Runaway(Painter):
        def sample_images(self, labels: Tensor, seed: int) -> Tensor:
            return torch.where(labels.reshape(-1, 1, 1, 1) == 1, torch.nan, super().sample_images(labels, seed))

        def reconstruction_images(self, batch: Any, limit: int) -> dict[str, Tensor]:
            return {"original": batch["images"][:limit], "reconstruction": torch.full_like(batch["images"][:limit], torch.inf)}

    logger = CSVLogger(tmp_path / "csv")
    callbacks: list[L.Callback] = [SampleGrid(every_n_steps=6, columns=2), ReconstructionGrid(count=2)]
    with pytest.warns(NonFiniteImagesWarning) as caught:
        fit(tmp_path, Runaway(), callbacks, logger=logger)
    said = " ".join(str(w.message) for w in caught)
    assert "step 6: 2 of 6 samples are not finite" in said
    assert "step 6: 2 of 4 reconstructions are not finite" in said
    logger.save()
    rows = list(csv.DictReader(next((tmp_path / "csv").rglob("metrics.csv")).read_text().splitlines()))
    assert {float(r["samples_non_finite"]) for r in rows if r["samples_non_finite"]} == {2.0}
    assert {float(r["reconstructions_non_finite"]) for r in rows if r["reconstructions_non_finite"]} == {2.0}


@pytest.mark.filterwarnings("ignore:.*module\\(s\\) in eval mode:UserWarning")
def test_throughput_counts_images_and_not_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("srcflow.callbacks.throughput.time.perf_counter", lambda: float(next(clock)))
    trainer = fit(tmp_path, Painter(), [Throughput(window=2)])
    assert float(trainer.callback_metrics["train/images_per_second"]) == 2.0  # two images a batch, one second a batch
