"""Stage 0: the decoder of a representation autoencoder, over its frozen encoder."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from srcflow.autoencoders.base import Autoencoder
from srcflow.noise import Noise
from srcflow.statistics import Moments
from srcflow.tasks.reconstruction import ReconstructionTask
from srcflow.types import Batch, Features


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
            moments.update(self.features_of(batch).mean, batch["valid"])
        total = moments.all_reduced()
        cast(Any, self.autoencoder).fit_statistics(total)  # what says that it needs statistics takes them
        rank_zero_info(f"Latent statistics fitted on {total.count} images.")

    def reconstruct(self, features: Features, noise: Noise | None, draw: int, purpose: str, epoch: int | None = None) -> Tensor:
        """See `ReconstructionTask.reconstruct`."""
        codec = self.chain.under(noise)
        return codec.decoded(codec.normalized(features, draw, purpose, epoch=epoch), features.grid)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The image losses of reconstructions from noisy features."""
        fake = self.reconstruct(self.features_of(batch), self.noise, self.global_step, "train", self.current_epoch)
        loss = self.image_loss(fake, self.images_from(batch), batch, batch_idx)
        self.log("train/loss", loss.detach())
        return loss
