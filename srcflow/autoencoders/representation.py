"""Representation autoencoders (RAE, arXiv 2510.11690): a frozen encoder, latent statistics, and a trained decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from srcflow.autoencoders.base import Autoencoder
from srcflow.autoencoders.vit_decoder import ViTDecoder
from srcflow.encoders.base import Encoder
from srcflow.encoders.timm_vit import load_exactly, read_safetensors
from srcflow.errors import ConfigError, ShapeError
from srcflow.nn.patchify import pair
from srcflow.statistics import EpsConvention, Moments, scale
from srcflow.types import Grid


class RepresentationAutoencoder(Autoencoder):
    """A frozen encoder's tokens, normalised by statistics of their own, and a ViT that decodes them.

    The statistics are kept per position and channel (N, D); like the frozen encoder they are part of the state, so an artifact needs
    nothing else.

    Args:
        encoder: the frozen encoder.
        decoder: decodes the tokens; `latent_dim` must be the encoder's dim.
        image_size: size of the decoded images, one number or [height, width]; null: what the decoder gives (its grid times its patch).
        grid: token grid of the features, one number or [rows, columns]; null: the encoder's where its input size tells, else the
            decoder's.
        statistics_eps: epsilon of the normalisation.
        eps_convention: "variance" divides by sqrt(var + eps) (RAE), "std" by sqrt(var) + eps (diffusers).
        decoder_weights: safetensors file with a ViTDecoder's state, loaded by `setup`; null: train from scratch.

    Attributes:
        published_positions: (1, n, D) position table of a converted encoder at the grid it was trained at, where that is not the grid in
            use (the encoder holds the resampled one). Nothing here reads it: the way back to the published format does.

    Raises:
        ConfigError: sizes of encoder and decoder disagree; both keys are named.
    """

    mean: Tensor
    var: Tensor
    statistics_fitted: Tensor
    published_positions: Tensor | None

    def __init__(
        self,
        encoder: Encoder,
        decoder: ViTDecoder,
        image_size: int | tuple[int, int] | None = None,
        grid: int | tuple[int, int] | None = None,
        statistics_eps: float = 1e-5,
        eps_convention: EpsConvention = "variance",
        decoder_weights: str | None = None,
    ) -> None:
        super().__init__()
        if encoder.dim != decoder.latent_dim:
            raise ConfigError(
                "decoder.latent_dim", decoder.latent_dim, f"the encoder's tokens have width {encoder.dim}.", f"Write {encoder.dim}."
            )
        if decoder.channels != 3:
            raise ConfigError("decoder.channels", decoder.channels, "the encoder's images have 3 channels.", "Write 3.")
        own = None
        if encoder.input_size is not None and not any(s % encoder.patch_size for s in encoder.input_size):
            own = (encoder.input_size[0] // encoder.patch_size, encoder.input_size[1] // encoder.patch_size)
        self.grid: Grid = pair(grid, "grid") if grid is not None else own or decoder.grid
        if own is not None and own != self.grid:
            cure = f"Write {list(own)}, or change encoder.image_size."
            raise ConfigError("grid", grid, f"encoder.image_size = {encoder.input_size} gives a grid of {own[0]} x {own[1]} tokens.", cure)
        self.image_size = decoder.image_size if image_size is None else pair(image_size, "image_size")
        if self.image_size != decoder.image_size:
            given = f"decoder.grid = {decoder.grid} times decoder.patch = {decoder.patch} gives images of {decoder.image_size}"
            raise ConfigError("image_size", image_size, f"{given}.", "Change one of the three.")
        scale(torch.ones(()), statistics_eps, eps_convention)  # refuses an unknown convention
        self.dim = encoder.dim
        self.encoder, self.decoder = encoder, decoder
        self.statistics_eps, self.eps_convention, self.decoder_weights = statistics_eps, eps_convention, decoder_weights
        shape = (self.grid[0] * self.grid[1], self.dim)
        self.register_buffer("mean", torch.zeros(shape), persistent=True)
        self.register_buffer("var", torch.ones(shape), persistent=True)
        self.register_buffer("statistics_fitted", torch.tensor(False), persistent=True)
        self.register_buffer("published_positions", None, persistent=True)
        self._ready = False  # spares `normalize` a look at the device

    def setup(self) -> None:
        """Load the encoder's weights, and the decoder's if `decoder_weights` names them. Raises ConfigError if a file does not fit."""
        self.encoder.setup()
        if self.decoder_weights is not None:
            load_exactly(self.decoder, read_safetensors(self.decoder_weights, "decoder_weights"), self.decoder_weights, "decoder_weights")

    def prepare_state(self, state: Mapping[str, Tensor]) -> None:
        """Make room for the published position table that a state dict holds; called before it is loaded."""
        table = state.get("published_positions")
        self.published_positions = None if table is None else torch.empty_like(table, device=self.mean.device)

    @property
    def needs_statistics(self) -> bool:
        """Whether latent statistics still have to be fitted or set."""
        return self.statistics_fitted.is_meta or not bool(self.statistics_fitted)

    def fit_statistics(self, moments: Moments) -> None:
        """Take the latent statistics from moments of clean raw features, per position (N, D) or per channel (D,)."""
        self.set_statistics(moments.mean, moments.var)

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, var: Tensor) -> None:
        """Set the latent statistics.

        Args:
            mean: anything that broadcasts to (N, D).
            var: biased variance, likewise.

        Raises:
            ShapeError: a shape does not broadcast to (N, D).
        """
        for name, target, value in (("mean", self.mean, mean), ("var", self.var, var)):
            try:
                target.copy_(value.to(target.device).broadcast_to(target.shape))
            except RuntimeError as e:
                raise ShapeError(f"the {name} of shape {tuple(value.shape)} does not fit statistics of shape {tuple(target.shape)}.") from e
        self.statistics_fitted.fill_(True)

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, Grid]:
        """See `Autoencoder.features`: the encoder's tokens of unit RMS."""
        return self.encoder(images)  # type: ignore[no-any-return]  # torch is untyped here

    def feature_source(self) -> tuple[str, nn.Module]:
        """See `Autoencoder.feature_source`: the frozen encoder, whatever decodes."""
        return "encoder", self.encoder

    def normalize(self, raw: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `Autoencoder.normalize`: (raw + noise - mean) / sqrt(var + eps), at least float32.

        Raises:
            ConfigError: the statistics have not been fitted.
            ShapeError: the tokens are not those of the nominal grid.
        """
        x = raw if noise is None else raw + noise
        divisor = self._scale(x)  # checks the shape
        return (x - self.mean) / divisor

    def noise_scale(self) -> Tensor:
        """See `Autoencoder.noise_scale`: 1 / sqrt(var + eps), (N, D). Raises ConfigError if the statistics have not been fitted."""
        return self._scale(self.mean).reciprocal()

    def denormalize(self, x: Tensor) -> Tensor:
        """Raw features (B, N, D) of normalised ones: the inverse of `normalize`. Raises as `normalize` does."""
        return x * self._scale(x) + self.mean

    def decode(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """See `Autoencoder.decode`; the image always has the nominal size (E3). At least float32. Raises as `normalize` does."""
        patches = self.decoder(self.denormalize(x), self.grid if grid is None else grid)
        images = self.decoder.unpatchify(patches.to(torch.promote_types(patches.dtype, torch.float32)))
        return images * self.encoder.std.reshape(1, -1, 1, 1) + self.encoder.mean.reshape(1, -1, 1, 1)

    def last_layer(self) -> nn.Parameter:
        """See `Autoencoder.last_layer`: the weight of the decoder's head."""
        return cast("nn.Parameter", self.decoder.head.weight)

    def _scale(self, x: Tensor) -> Tensor:
        if not self._ready:
            if self.needs_statistics:
                cure = "Train stage 0, or call fit_statistics or set_statistics."
                raise ConfigError("autoencoder.statistics", None, "the latent statistics have not been fitted.", cure)
            self._ready = True
        if tuple(x.shape[-2:]) != tuple(self.mean.shape):
            rows, columns = self.grid
            raise ShapeError(
                f"features (B, {x.shape[-2]}, {x.shape[-1]}) do not fit the statistics of grid = {rows} x {columns}, width {self.dim}."
            )
        return scale(self.var, self.statistics_eps, self.eps_convention)
