"""Stage 0: the decoder of a representation autoencoder, over its frozen encoder."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from srcflow.autoencoders.base import Autoencoder
from srcflow.statistics import Moments
from srcflow.tasks.reconstruction import ReconstructionTask
from srcflow.types import Batch, Grid


class AutoencoderTask(ReconstructionTask):
    """Fits the latent statistics on clean features, then trains the decoder to reconstruct clean images from noisy ones (RAE).

    An autoencoder without trainable parts (PixelPatches) is written as it is. See `ReconstructionTask` for losses and evaluation.

    Args:
        autoencoder: the autoencoder; its pretrained weights are loaded at the start.
        kwargs: the arguments of ReconstructionTask.
    """

    product: ClassVar[str] = "autoencoder"

    def __init__(self, autoencoder: Autoencoder, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.autoencoder = autoencoder

    @property
    def codec(self) -> Autoencoder:
        """See `ReconstructionTask.codec`."""
        return self.autoencoder

    def last_layer(self) -> nn.Parameter | None:
        """The decoder's last layer."""
        return self.autoencoder.last_layer()

    def setup(self, stage: str) -> None:
        """Load pretrained weights, once.

        Raises:
            ConfigError: they are not at hand.
        """
        super().setup(stage)
        if "autoencoder" not in self._loaded:
            self.autoencoder.setup()
            self._loaded.add("autoencoder")

    def on_fit_start(self) -> None:
        """Fit the latent statistics on clean features of the training set, unless they are there."""
        super().on_fit_start()
        if self.restoring or not self.autoencoder.needs_statistics:
            return
        rows, columns = self.autoencoder.grid
        moments = Moments((rows * columns, self.autoencoder.dim))
        for batch in self.training_batches(self.statistics_batches, augmented=False):
            raw, _ = self.features_from(batch, self.autoencoder)
            moments.update(raw, batch["valid"])
        total = moments.all_reduced()
        cast(Any, self.autoencoder).fit_statistics(total)  # what says that it needs statistics takes them
        rank_zero_info(f"Latent statistics fitted on {total.count} images.")

    def reconstruct(self, raw: Tensor, grid: Grid, noise: Tensor | None) -> Tensor:
        """See `ReconstructionTask.reconstruct`."""
        return self.autoencoder.decode(self.autoencoder.normalize(raw, noise), grid)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The image losses of reconstructions from noisy features."""
        images = self.images_from(batch)
        raw, grid = self.features_from(batch, self.autoencoder)
        noise = self.noise_for(self.noise, raw, batch["indices"], "train")
        loss = self.image_loss(self.reconstruct(raw, grid, noise), images, batch, batch_idx)
        self.log("train/loss", loss.detach())
        return loss
