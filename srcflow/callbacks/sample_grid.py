"""Pictures while training: samples of a flow, and reconstructions of an autoencoder or a compressor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor

from srcflow.errors import ConfigError
from srcflow.metrics.non_finite import NonFiniteImagesWarning, finite_rows, without_non_finite
from srcflow.types import NULL_LABEL

NOT_FINITE = (255, 0, 255)
"""Colour of an image that is not finite."""


def grid_of(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """One picture (3, H', W') uint8 of images (n, 3, H, W) in [0, 1], row by row, with white gaps.

    Args:
        images: clamped here; one that is not finite everywhere becomes a magenta square.
        columns: images in a row; a last row that is not full is filled with white.
        gap: pixels between images.
    """
    n, c, h, w = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    images, finite = without_non_finite(images.detach().float())
    pixels = (images.clamp(0, 1) * 255 + 0.5).floor().to("cpu", torch.uint8)
    pixels[~finite.cpu()] = torch.tensor(NOT_FINITE[:c], dtype=torch.uint8).reshape(-1, 1, 1)
    sheet = torch.full((c, rows * (h + gap) - gap, columns * (w + gap) - gap), 255, dtype=torch.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (h + gap), (i % columns) * (w + gap)
        sheet[:, top : top + h, left : left + w] = image
    return sheet


def publish(trainer: L.Trainer, tag: str, sheet: Tensor, step: int) -> Path:
    """Write a picture (3, H, W) uint8 to `<root>/<tag>/step-<step>.png`, and to every logger that takes images (TensorBoard).

    The root is the first logger's directory, or trainer.default_root_dir. Call it on every rank: rank zero writes, but Lightning asks all
    of them for the directory.
    """
    root = Path(trainer.log_dir or trainer.default_root_dir)
    path = root / tag / f"step-{step:08d}.png"
    if not trainer.is_global_zero:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(path)
    for logger in trainer.loggers:
        add = getattr(getattr(logger, "experiment", None), "add_image", None)
        if add is not None:
            add(tag, sheet, step)
    return path


def report(trainer: L.Trainer, tag: str, images: Tensor) -> int:
    """Warn of images (n, 3, H, W) that are not finite, and hand their number to the loggers as `<tag>_non_finite`; returns it."""
    bad = int((~finite_rows(images)).sum())
    if bad:
        where = f"step {trainer.global_step}: {bad} of {len(images)} {tag.replace('_', ' ')} are not finite, and magenta in the picture."
        cure = "Look at the loss and the guidance's strength; `srcflow test` counts such images."
        rank_zero_warn(f"{where} {cure}", category=NonFiniteImagesWarning, stacklevel=3)
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics({f"{tag}_non_finite": float(bad)}, step=trainer.global_step)
    return bad


class SampleGrid(L.Callback):
    """Draws samples every so many steps: one row per class, or rows without a class for unconditional data.

    The task must offer `sample_images(labels (n,) int64, seed) -> (n, 3, H, W) in [0, 1]`, as FlowTask does. The same seed is used every
    time, so that pictures of different steps compare. Samples come from the averaged weights where there is an EMA. Those that are not
    finite are magenta squares, counted in a warning and logged as `samples_non_finite`.

    Args:
        every_n_steps: optimizer steps between two pictures.
        columns: samples in a row.
        classes: the rows' class ids; null: the first ten (or all, if there are fewer).
        rows: number of rows without classes.
        seed: key of the samples.
    """

    def __init__(
        self, every_n_steps: int = 5000, columns: int = 8, classes: Sequence[int] | None = None, rows: int = 4, seed: int = 0
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("columns", columns), ("rows", rows)):
            if value < 1:
                raise ConfigError(f"sample_grid.{name}", value, "must be at least 1.")
        self.every_n_steps, self.columns, self.rows, self.seed = every_n_steps, columns, rows, seed
        self.classes = None if classes is None else list(classes)
        self._last = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the task can sample, and that the classes exist.

        Raises:
            ConfigError: it cannot, or they do not.
        """
        if not hasattr(pl_module, "sample_images"):
            raise ConfigError("trainer.callbacks", "SampleGrid", f"{type(pl_module).__name__} draws no samples.", "Use ReconstructionGrid.")
        known = self._num_classes(trainer)
        wrong = [c for c in self.classes or [] if not 0 <= c < known]
        if wrong:
            raise ConfigError("sample_grid.classes", wrong, f"data.num_classes = {known}.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do not repeat the picture of the step a run resumes at."""
        self._last = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Draw, if it is time. Every rank samples, since sharded weights need all; rank zero writes."""
        step = trainer.global_step
        if step == self._last or step % self.every_n_steps:
            return
        self._last = step
        publish(trainer, "samples", self.draw(trainer, pl_module), step)

    @torch.no_grad()
    def draw(self, trainer: L.Trainer, pl_module: Any) -> Tensor:
        """The picture (3, H, W) uint8 of the present weights."""
        known = self._num_classes(trainer)
        rows = (self.classes if self.classes is not None else list(range(min(10, known)))) if known else [NULL_LABEL] * self.rows
        labels = torch.tensor(rows, device=pl_module.device).repeat_interleave(self.columns)
        modes = {m: m.training for m in pl_module.modules()}
        pl_module.eval()
        try:
            with pl_module.evaluation_weights():
                images = pl_module.sample_images(labels, self.seed)
        finally:
            for module, mode in modes.items():
                module.training = mode
        report(trainer, "samples", images)
        return grid_of(images, self.columns)

    @staticmethod
    def _num_classes(trainer: Any) -> int:
        return int(getattr(trainer.datamodule, "num_classes", 0))


class ReconstructionGrid(L.Callback):
    """Shows the first validation images and their reconstructions after every validation: a row each.

    The task must offer `reconstruction_images(batch, limit) -> {row name: (n, 3, H, W) in [0, 1]}`, as AutoencoderTask and CompressorTask
    do. Pictures of `srcflow test` go to a folder of their own. Reconstructions that are not finite are shown, counted and logged as samples
    are (see `SampleGrid`).

    Args:
        count: images in a row.
    """

    def __init__(self, count: int = 8) -> None:
        if count < 1:
            raise ConfigError("reconstruction_grid.count", count, "must be at least 1.")
        self.count = count

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Check that the task can reconstruct.

        Raises:
            ConfigError: it cannot.
        """
        if not hasattr(pl_module, "reconstruction_images"):
            name = type(pl_module).__name__
            raise ConfigError("trainer.callbacks", "ReconstructionGrid", f"{name} reconstructs no images.", "Use SampleGrid.")

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw the first batch, with the weights that are validated."""
        self._show(trainer, pl_module, batch, batch_idx + dataloader_idx, "reconstructions")

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw the first batch of a test."""
        self._show(trainer, pl_module, batch, batch_idx + dataloader_idx, "test_reconstructions")

    def _show(self, trainer: L.Trainer, pl_module: Any, batch: Any, number: int, tag: str) -> None:
        if number or trainer.sanity_checking:
            return
        rows = pl_module.reconstruction_images(batch, self.count)
        images = torch.cat(list(rows.values()))
        report(trainer, tag, images)
        publish(trainer, tag, grid_of(images, len(next(iter(rows.values())))), trainer.global_step)
