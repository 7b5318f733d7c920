"""Stage 1: the compressor, between a frozen autoencoder's encoder and decoder."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from srcflow.autoencoders.base import Autoencoder
from srcflow.codec import Codec
from srcflow.compressors.base import Compressor
from srcflow.errors import ConfigError, Problems
from srcflow.metrics.codes import EIGENVALUE_FLOOR, KURTOSIS_CEILING, NOISE_STD_FLOOR, CodeHealth, warnings_for
from srcflow.metrics.non_finite import finite_rows
from srcflow.noise import Noise
from srcflow.objectives.reconstruction import feature_objective
from srcflow.statistics import Moments, principal_components
from srcflow.tasks.reconstruction import ReconstructionTask
from srcflow.types import Batch, Features


class CompressorTask(ReconstructionTask):
    """Trains a compressor with the autoencoder's own objective on decoded images, and a feature loss (SRC-Flow, arXiv 2605.18267).

    Encoder and decoder stay as they are. The feature loss (mean squared error and cosine) compares the expanded codes of noisy features
    with the clean normalised features: as for the images, what is asked for is the clean signal. A learned compressor starts from a PCA of
    clean normalised features, unless told otherwise; one that is only fitted (PCA) or needs no fitting (Identity) is written without a
    training step. Evaluation adds the health of the codes over several noise draws, and warns below the stated floors; images whose codes
    are not finite are counted (`codes/non_finite`), and then there are no numbers of health (NaN in validation). See `ReconstructionTask`
    for the other losses and metrics.

    Args:
        autoencoder: directory of the autoencoder's stage.
        compressor: the compressor.
        feature_weight: factor of the feature loss.
        health_draws: noise draws per image of the code health; it needs `eval_noise`.
        noise_share_floor: warn if a channel's std over noise draws is below this share of its whole std.
        eigenvalue_floor: warn if the smallest eigenvalue of the code covariance is below this share of the mean one.
        kurtosis_ceiling: warn if a channel's kurtosis is above.
        kwargs: the arguments of ReconstructionTask.
    """

    product: ClassVar[str] = "compressor"
    place_options: ClassVar[frozenset[str]] = frozenset({"autoencoder"})

    def __init__(
        self,
        autoencoder: str,
        compressor: Compressor,
        feature_weight: float = 0.5,
        health_draws: int = 4,
        noise_share_floor: float = NOISE_STD_FLOOR,
        eigenvalue_floor: float = EIGENVALUE_FLOOR,
        kurtosis_ceiling: float = KURTOSIS_CEILING,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        problems = Problems()
        if feature_weight < 0:
            problems.add(ConfigError("feature_weight", feature_weight, "a weight is not negative."))
        if health_draws < 2:
            problems.add(ConfigError("health_draws", health_draws, "a spread needs at least 2 draws."))
        if compressor.trainable and feature_weight == 0 and not self.decodes:
            problems.add(ConfigError("feature_weight", 0.0, "no loss has a weight.", "Set this one, pixel_weight or another."))
        problems.raise_if_any()
        self.place_of_autoencoder = autoencoder
        self.compressor = compressor
        self.feature_weight, self.health_draws = feature_weight, health_draws
        self.limits = {"noise_share": noise_share_floor, "eigenvalue_ratio": eigenvalue_floor, "kurtosis": kurtosis_ceiling}
        self._health: CodeHealth | None = None
        self._bad_codes = torch.zeros((), dtype=torch.long)

    @property
    def codec(self) -> Autoencoder:
        """See `ReconstructionTask.codec`."""
        return cast(Autoencoder, self.outside["autoencoder"])

    def last_layer(self) -> nn.Parameter | None:
        """The compressor's last layer."""
        return self.compressor.last_layer()

    def setup(self, stage: str) -> None:
        """Load the autoencoder.

        Raises:
            ArtifactError: there is no usable artifact.
            ConfigError: its width is not the compressor's.
        """
        autoencoder = self.load_artifact("autoencoder", self.place_of_autoencoder, Autoencoder)
        if autoencoder.dim != self.compressor.dim:
            raise ConfigError(
                "compressor.dim", self.compressor.dim, f"the features of {self.place_of_autoencoder} have width {autoencoder.dim}."
            )
        super().setup(stage)

    def on_fit_start(self) -> None:
        """Fit a PCA on clean normalised features of the training set, if the compressor starts from one."""
        super().on_fit_start()
        if self.restoring or not self.compressor.needs_pca:
            return
        moments = Moments(self.compressor.dim, covariance=True)
        for batch in self.training_batches(self.statistics_batches, augmented=False):
            moments.update(self.codec.normalize(self.features_of(batch).mean), batch["valid"])
        components = principal_components(moments.all_reduced(), self.compressor.code_dim)
        self.compressor.init_from_pca(components.mean, components.components)
        rank_zero_info(
            f"PCA: {self.compressor.code_dim} of {self.compressor.dim} components keep {components.explained:.1%} of the variance."
        )

    @property
    def chain(self) -> Codec:
        """The frozen autoencoder and the compressor that is trained."""
        return Codec(self.codec, self.compressor, self.noise, self.seed)

    def reconstruct(self, features: Features, noise: Noise | None, draw: int, purpose: str) -> Tensor:
        """See `ReconstructionTask.reconstruct`."""
        _, expanded = self.compressor(self.chain.under(noise).normalized(features, draw, purpose), features.grid)
        return self.chain.decoded(expanded, features.grid)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The image losses of decoded codes, and the feature loss."""
        features, chain = self.features_of(batch), self.chain
        noisy = chain.normalized(features, self.global_step, "train", epoch=self.current_epoch)
        _, expanded = self.compressor(noisy, features.grid)
        loss = expanded.new_zeros((), dtype=torch.promote_types(expanded.dtype, torch.float32))
        if self.decodes:
            loss = loss + self.image_loss(chain.decoded(expanded, features.grid), self.images_from(batch), batch, batch_idx)
        if self.feature_weight > 0:
            clean = chain.under(None).normalized(features, self.global_step, "train", epoch=self.current_epoch)
            term, terms = feature_objective(expanded, clean, self.feature_weight)
            self.log("train/feature", terms["feature"], prog_bar=True)
            loss = loss + term
        self.log("train/loss", loss.detach())
        return loss  # type: ignore[no-any-return]  # torch is untyped here

    # --- evaluation ----------------------------------------------------------------------------------------------------------------

    def begin_evaluation(self) -> None:
        """Fresh streaming metrics, those of the codes included."""
        super().begin_evaluation()
        self._health = CodeHealth(self.compressor.code_dim).to(self.device) if self.eval_noise is not None else None
        self._bad_codes = torch.zeros((), dtype=torch.long, device=self.device)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> None:
        """Count a batch in every metric."""
        super().evaluate(batch)
        if self._health is None:
            return
        codec, features = self.chain.under(self.eval_noise), self.features_of(batch)
        draws = [codec.codes(features, draw, "evaluation").x for draw in range(self.health_draws)]
        codes, valid = torch.stack(draws), batch["valid"].to(self.device)
        finite = finite_rows(codes.transpose(0, 1))
        self._bad_codes += (valid & ~finite).sum()
        self._health.update(codes, valid & finite)

    def numbers(self) -> tuple[dict[str, float], int]:
        """Adds `codes/...`, and warns of unhealthy codes."""
        found, count = super().numbers()
        if self._health is not None:
            bad = found["codes/non_finite"] = self.total(self._bad_codes)
            health = {} if bad == count > 0 else self._health.compute()
            if bad:
                health = {} if self.trainer.testing else dict.fromkeys(health, float("nan"))
                lines = [f"the codes of {bad} of {count} images are not finite, and not measured: the compressor has diverged."]
            else:
                lines = warnings_for(health, **self.limits)
            found.update({f"codes/{k}": v for k, v in health.items()})
            if not self.trainer.sanity_checking:
                for line in lines:
                    rank_zero_warn(f"code health: {line}", stacklevel=2)
        return found, count
