"""The codec of a flow: images to noisy codes and codes to images. The only place that knows this chain.

autoencoder.posterior (+ deviation * eps) + noise -> autoencoder.normalize -> compressor.compress
compressor.expand -> autoencoder.decode
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from srcflow import noise as noises
from srcflow import randomness
from srcflow.autoencoders.base import Autoencoder
from srcflow.compressors.base import Compressor
from srcflow.compressors.identity import Identity
from srcflow.errors import ConfigError, ShapeError
from srcflow.metrics.non_finite import to_unit_range
from srcflow.noise import Noise
from srcflow.types import Codes, Features, Grid


class Codec:
    """Autoencoder, compressor and noise law as one object; it holds no weights of its own, so it costs nothing to make.

    Args:
        autoencoder: images <-> normalised features.
        compressor: features <-> codes; None means Identity.
        noise: noise law of the features, in units of unit-RMS tokens; None: no noise.
        seed: key of what is drawn.
    """

    def __init__(self, autoencoder: Autoencoder, compressor: Compressor | None = None, noise: Noise | None = None, seed: int = 0) -> None:
        self.autoencoder = autoencoder
        self.compressor = Identity(autoencoder.dim) if compressor is None else compressor
        self.noise, self.seed = noise, seed

    def under(self, noise: Noise | None) -> Codec:
        """The same parts under another noise law."""
        return Codec(self.autoencoder, self.compressor, noise, self.seed)

    def features(self, batch: Mapping[str, Any]) -> Features:
        """Raw features of a batch, as a store gives them or from its images: the encoder runs once, however often they are drawn from.

        Args:
            batch: `features` (B, N, D) with `grid` (and `deviation`), or `images` (B, 3, H, W), uint8 or float in [0, 1]; and `indices`.

        Raises:
            ConfigError: it has neither features nor images.
            ShapeError: the autoencoder cannot take images of this size; names both.
        """
        if "features" in batch:
            mean, deviation = self._moved(batch["features"]), batch.get("deviation")
            deviation = None if deviation is None else self._moved(deviation)
            grid: Grid = (int(batch["grid"][0]), int(batch["grid"][1]))
        elif "images" in batch:
            mean, deviation, grid = self._encoded(self._moved(batch["images"]))
        else:
            raise ConfigError("batch", sorted(batch), "has neither images nor features.", "Give it one of them.")
        exact = torch.promote_types(mean.dtype, torch.float32)
        return Features(mean.to(exact), None if deviation is None else deviation.to(exact), grid, batch["indices"])

    def normalized(self, features: Features, draw: int, purpose: str, *, epoch: int | None = None) -> Tensor:
        """Noisy normalised features (B, N, D), in the compressor's precision.

        Args:
            features: of a batch.
            draw: number of the noise draw: the optimizer step in training.
            purpose: names the use, so that two uses never share numbers.
            epoch: key of the draw from the posterior, where there is one; None means `draw`.
        """
        raw, indices = features.mean, features.indices
        if features.deviation is not None:
            eps = randomness.normal(
                raw.shape[1:], seed=self.seed, purpose="posterior", step=draw if epoch is None else epoch, indices=indices
            )
            raw = raw + features.deviation * eps.to(raw)
        added = noises.draw(self.noise, raw, seed=self.seed, purpose=purpose, step=draw, indices=indices)
        return like_weights(self._normalize(raw, added, features.grid), self.compressor)

    def codes(
        self, batch: Features | Mapping[str, Any], draw: int = 0, purpose: str = "pipeline.noise", *, epoch: int | None = None
    ) -> Codes:
        """Noisy codes, at least float32, and their grid.

        Args:
            batch: a batch, or its `features`.
            draw: as `normalized`.
            purpose: as `normalized`.
            epoch: as `normalized`.
        """
        features = batch if isinstance(batch, Features) else self.features(batch)
        x = self.compressor.compress(self.normalized(features, draw, purpose, epoch=epoch), features.grid)
        return Codes(x.to(torch.promote_types(x.dtype, torch.float32)), features.grid)

    def images(self, codes: Codes) -> Tensor:
        """Images (B, 3, H, W), float32, clamped to [0, 1], of codes; what is not finite is NaN."""
        features = self.compressor.expand(like_weights(codes.x, self.compressor), codes.grid)
        return to_unit_range(self.decoded(features, codes.grid), codes.x)

    def decoded(self, features: Tensor, grid: Grid) -> Tensor:
        """Images (B, 3, H, W) of nominal range [0, 1], not clamped, of normalised features (B, N, D)."""
        return self.autoencoder.decode(like_weights(features, self.autoencoder), grid)

    def _moved(self, x: Tensor) -> Tensor:
        for part in (self.autoencoder, self.compressor):
            for t in (*part.parameters(), *part.buffers()):
                return x.to(t.device)
        return x

    def _encoded(self, images: Tensor) -> tuple[Tensor, Tensor | None, Grid]:
        (height, width), nominal = images.shape[-2:], tuple(self.autoencoder.image_size)
        try:
            return self.autoencoder.posterior(images.float() / 255 if images.dtype == torch.uint8 else images)
        except (ValueError, AssertionError) as e:
            if (height, width) == nominal:
                raise
            name = type(self.autoencoder).__name__
            why = f"images of {height} x {width} pixels cannot be encoded: {name} is built for {nominal[0]} x {nominal[1]}"
            raise ShapeError(f"{why} ({e}) Resize or crop them.") from e

    def _normalize(self, raw: Tensor, noise: Tensor | None, grid: Grid) -> Tensor:
        try:
            return self.autoencoder.normalize(raw, noise)
        except (ShapeError, RuntimeError) as e:
            (rows, columns), (height, width) = self.autoencoder.grid, self.autoencoder.image_size
            if tuple(grid) == (rows, columns):
                raise
            name = type(self.autoencoder).__name__
            why = f"{grid[0]} x {grid[1]} tokens cannot be normalised: the statistics of {name} are per position, for {rows} x {columns}."
            raise ShapeError(f"{why} Resize or crop the images to {height} x {width}.") from e


def like_weights(x: Tensor, part: nn.Module) -> Tensor:
    """x in the precision of a part's weights, which may be another than its neighbour's (a flow in float64 on a codec in float32)."""
    for t in (*part.parameters(), *part.buffers()):
        if t.is_floating_point():
            return x.to(t.dtype)
    return x
