"""What stages 0 and 1 share: image losses, the adversarial game, and the evaluation of reconstructions."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from srcflow import randomness
from srcflow.autoencoders.base import Autoencoder
from srcflow.errors import ConfigError, Problems
from srcflow.losses.adversarial import Adversarial
from srcflow.losses.perceptual import Perceptual
from srcflow.metrics.features.base import Extractor
from srcflow.metrics.frechet import FrechetDistance, check_counts, sized_name
from srcflow.metrics.non_finite import NonFiniteImagesWarning, finite_name, to_unit_range, without_non_finite
from srcflow.metrics.reconstruction import ReconstructionMetrics
from srcflow.noise import Noise
from srcflow.objectives.reconstruction import ImageWeights, adversarial_objective, image_objective
from srcflow.registry import spec_of
from srcflow.tasks import image_sizes
from srcflow.tasks.base import Task, Weights
from srcflow.tasks.discriminator import Discriminator
from srcflow.tasks.optimization import DEFAULT, Optimization
from srcflow.types import Batch, Features

STATE = "discriminator"
"""Key of a checkpoint under which the discriminator's heads and optimizer stand."""


class ReconstructionTask(Task):
    """Base of the tasks that learn to reconstruct images from noisy features, with RAE's objective (arXiv 2510.11690).

    The loss is `pixel_weight` * L1 + `perceptual_weight` * perceptual + adversarial, of the clean images; a term of weight 0 costs nothing,
    and if all of them are 0 no image is decoded. Evaluation reconstructs at noise 0 and, under names that start with `noisy_`, at
    `eval_noise`: L1, PSNR and SSIM per image, and the Frechet distance of reconstructions to images if there is an `extractor`.
    Reconstructions that are not finite are counted (`reconstructions_non_finite`) and left out; no number that would include them has its
    plain name then (in validation it is NaN).

    Args:
        noise: noise law of training, in units of the raw features' unit RMS (RAE: Uniform, maximum 0.8); null: none.
        eval_noise: the noise a flow will be trained under (SRC-Flow: Constant, sigma 0.4); null: evaluate at noise 0 only.
        pixel_weight: factor of the pixel loss.
        pixel_kind: mean absolute ("l1") or mean squared ("l2") difference.
        perceptual: a perceptual distance; null: none.
        perceptual_weight: its factor.
        perceptual_from: optimizer step from which it counts; before it costs nothing.
        adversarial: an adversarial loss (its weight and start steps are its own arguments); null: none.
        discriminator: optimizer of the adversarial loss's heads.
        extractor: judge of the Frechet distance, not the network that makes the features; null: none.
        statistics_batches: how many training batches latent statistics and PCA are fitted on; null: the whole training set once.
        optimization: optimizer, schedule, clipping and the limit of non-finite steps.
        seed: key of all random numbers of the task.
        artifact: directory the result is written to at the end of fit; null: none.
        weights: which weights are evaluated, "ema" or "raw".
        metrics_file: where `srcflow test` writes its numbers; null: metrics.json in trainer.default_root_dir.
    """

    def __init__(
        self,
        noise: Noise | None,
        eval_noise: Noise | None,
        pixel_weight: float = 1.0,
        pixel_kind: Literal["l1", "l2"] = "l1",
        perceptual: Perceptual | None = None,
        perceptual_weight: float = 1.0,
        perceptual_from: int = 0,
        adversarial: Adversarial | None = None,
        discriminator: Optimization = DEFAULT,
        extractor: Extractor | None = None,
        statistics_batches: int | None = None,
        optimization: Optimization = DEFAULT,
        seed: int = 0,
        artifact: str | None = None,
        weights: Weights = "ema",
        metrics_file: str | None = None,
    ) -> None:
        super().__init__(optimization, seed, artifact, weights, metrics_file)
        problems = Problems()
        for name, weight in (("pixel_weight", pixel_weight), ("perceptual_weight", perceptual_weight)):
            if weight < 0:
                problems.add(ConfigError(name, weight, "a weight is not negative."))
        if perceptual_from < 0:
            problems.add(ConfigError("perceptual_from", perceptual_from, "a step is not negative."))
        if pixel_kind not in ("l1", "l2"):
            problems.add(ConfigError("pixel_kind", pixel_kind, "unknown.", 'Write "l1" or "l2".'))
        if discriminator.dump_bad_steps:
            why = "only steps of the task's own optimizer are dumped."
            cure = "Set optimization.dump_bad_steps."
            problems.add(ConfigError("discriminator.dump_bad_steps", discriminator.dump_bad_steps, why, cure))
        if statistics_batches is not None and statistics_batches < 1:
            problems.add(ConfigError("statistics_batches", statistics_batches, "must be at least 1.", "Write null for the whole set."))
        if adversarial is not None and adversarial.weight > 0 and pixel_weight == 0:
            late = perceptual is None or perceptual_weight == 0 or perceptual_from > adversarial.count_from
            if late:
                why = "its adaptive weight compares it with a reconstruction loss, and none counts by then."
                problems.add(
                    ConfigError("adversarial.count_from", adversarial.count_from, why, "Give pixel_weight or perceptual_weight a value.")
                )
        problems.raise_if_any()
        self.noise, self.eval_noise, self.statistics_batches = noise, eval_noise, statistics_batches
        self.pixel_weight, self.pixel_kind, self.perceptual_weight = pixel_weight, pixel_kind, perceptual_weight
        self.perceptual_from = perceptual_from
        if perceptual is not None and perceptual_weight > 0:
            self.set_outside("perceptual", perceptual)
        self.discriminator: Discriminator | None = None
        if adversarial is not None and adversarial.weight > 0:
            self.outside["adversarial"] = adversarial  # its heads are trained, but not by this module's optimizer
            self.discriminator = Discriminator(adversarial, discriminator)
        if extractor is not None:
            self.set_outside("extractor", extractor)
        self._loaded: set[str] = set()
        self._restored: dict[str, Any] | None = None
        self._measures: dict[str, ReconstructionMetrics] = {}
        self._seen = torch.zeros((), dtype=torch.long)  # images that counted
        self._lost: dict[str, Tensor] = {}  # by kind: how many of their reconstructions were not finite
        self._distances: dict[str, FrechetDistance] = {}

    # --- what the stages define ------------------------------------------------------------------------------------------------------

    @abstractmethod
    def reconstruct(self, features: Features, noise: Noise | None, draw: int, purpose: str) -> Tensor:
        """Images (B, 3, H, W) of nominal range [0, 1] from raw features under a noise law; `draw` and `purpose` key the noise."""

    @property
    @abstractmethod
    def codec(self) -> Autoencoder:
        """The autoencoder that makes the features and decodes them."""

    @abstractmethod
    def last_layer(self) -> nn.Parameter | None:
        """Where the adaptive weight of the adversarial loss compares gradients."""

    # --- Lightning's hooks -------------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Load the weights of losses and judge.

        Raises:
            ConfigError: weights are not at hand, the judge is the network that makes the features, the data have images of another size
                than the decoder, or there is nothing to learn from.
        """
        super().setup(stage)
        problems = Problems()
        with problems.collect():
            image_sizes.check_data(cast(Any, self.trainer).datamodule, self.codec)
        for name in ("perceptual", "adversarial") if stage == "fit" else ():
            if name in self.outside and name not in self._loaded:
                with problems.collect():
                    cast("Perceptual | Adversarial", self.outside[name]).setup()
                    self._loaded.add(name)
        extractor = self.extractor
        if extractor is not None and "extractor" not in self._loaded:
            with problems.collect():
                check_judge(extractor, self.codec)
                extractor.setup()
                self._loaded.add("extractor")
        problems.raise_if_any()

    @property
    def extractor(self) -> Extractor | None:
        """The judge of the Frechet distance."""
        return cast("Extractor | None", self.outside.get("extractor"))

    @property
    def decodes(self) -> bool:
        """Whether any image loss has a weight, so that training decodes images at all."""
        return self.pixel_weight > 0 or "perceptual" in self.outside or self.discriminator is not None

    def configure_optimizers(self) -> Any:
        """See `Task.configure_optimizers`; the heads' schedule must fit into the run, too."""
        if self.discriminator is not None and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.discriminator.optimization.check(self.total_steps, "discriminator")
        return super().configure_optimizers()

    def on_train_start(self) -> None:
        """Start the discriminator, or end a fit that has nothing to train (what is fitted by statistics is ready by now)."""
        if self.discriminator is not None:
            if self._restored is None and self.restoring:
                rank_zero_info("The checkpoint has no discriminator: its heads start untrained.")
            self.discriminator.start(self._restored)
            self._restored = None
        super().on_train_start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the discriminator."""
        super().on_save_checkpoint(checkpoint)
        if self.discriminator is not None:
            checkpoint[STATE] = self.discriminator.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the discriminator's state until the training starts."""
        super().on_load_checkpoint(checkpoint)
        self._restored = checkpoint.get(STATE)

    # --- training ------------------------------------------------------------------------------------------------------------------------

    def image_loss(self, fake: Tensor, real: Tensor, batch: Batch, batch_idx: int) -> Tensor:
        """The weighted image losses of reconstructions, after the discriminator's own update on them.

        Args:
            fake: (B, 3, H, W) reconstructions, not clamped.
            real: (B, 3, H, W) in [0, 1].
            batch: the batch they come from.
            batch_idx: its number in the epoch.
        """
        perceptual = self.outside.get("perceptual") if self.global_step >= self.perceptual_from else None
        weights = ImageWeights(self.pixel_weight, self.pixel_kind, self.perceptual_weight)
        loss, terms = image_objective(fake, real, weights, cast("Perceptual | None", perceptual))
        for name, value in terms.items():
            self.log(f"train/{name}", value, prog_bar=True)
        return loss if self.discriminator is None else loss + self._adversarial(self.discriminator, loss, fake, real, batch, batch_idx)

    def _adversarial(self, game: Discriminator, loss: Tensor, fake: Tensor, real: Tensor, batch: Batch, batch_idx: int) -> Tensor:
        step, adversarial = self.global_step, game.adversarial
        if step >= adversarial.train_from:
            accumulated = self.trainer.accumulate_grad_batches
            logs = game.update(
                real,
                fake,
                rate=game.optimization.learning_rate_at(step, self.total_steps),
                share=1 / accumulated,
                finish=(batch_idx + 1) % accumulated == 0 or self.trainer.is_last_batch,
                generator=self._generator("discriminator", batch),
            )
            self.log_dict({f"discriminator/{k}": v for k, v in logs.items()})
            self.log("discriminator/skipped_steps", float(game.skipped))
        last = self.last_layer()
        if step < adversarial.count_from or last is None:
            return loss.new_zeros(())
        found = adversarial_objective(adversarial, loss, fake, last, self._generator("generator", batch))
        self.log_dict({f"train/{name}": value for name, value in found.terms.items()})
        return found.total

    def _generator(self, purpose: str, batch: Batch) -> torch.Generator:
        """The augmentation's numbers: keyed by the step and the batch's first sample."""
        key = randomness.key(self.seed, f"augment.{purpose}", self.global_step, int(batch["indices"][0]))
        return torch.Generator().manual_seed(key % 2**63)

    # --- evaluation ----------------------------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self.begin_evaluation()

    def on_test_epoch_start(self) -> None:
        """Begin a test."""
        self.begin_evaluation()

    def begin_evaluation(self) -> None:
        """Fresh streaming metrics."""
        kinds = [""] if self.eval_noise is None else ["", "noisy_"]
        self._measures = {k: ReconstructionMetrics().to(self.device) for k in kinds}
        self._seen = torch.zeros((), dtype=torch.long, device=self.device)
        self._lost = {k: torch.zeros_like(self._seen) for k in kinds}
        if self.extractor is not None:
            dim = self.extractor.dim
            self._distances = {k: FrechetDistance(dim, small_sample=True).to(self.device) for k in kinds}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Reconstruct at noise 0 and at the flow's noise."""
        self.evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As in validation."""
        self.evaluate(batch)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> None:
        """Count a batch in every metric."""
        images = self.images_from(batch)
        features = self.features_of(batch)
        valid = batch["valid"].to(self.device)
        judged = self.extractor(images) if self.extractor is not None else None
        self._seen += valid.sum()
        for kind, measure in self._measures.items():
            pred, finite = without_non_finite(self._reconstruct(features, noisy=kind != ""))
            self._lost[kind] += (valid & ~finite).sum()
            measure.update(pred, images, valid & finite)
            if judged is not None and self.extractor is not None:
                self._distances[kind].update(judged, real=True, valid=valid)
                self._distances[kind].update(self.extractor(pred), valid=valid & finite)

    def _reconstruct(self, features: Features, *, noisy: bool) -> Tensor:
        return to_unit_range(self.reconstruct(features, self.eval_noise if noisy else None, 0, "evaluation"))

    def total(self, count: Tensor) -> int:
        """A count summed over all ranks; a collective."""
        return int(cast(Tensor, self.trainer.strategy.reduce(count.clone(), reduce_op="sum")))

    def numbers(self) -> tuple[dict[str, float], int]:
        """The results so far, by name (a distance's name says how many images it is of), and the number of images. On every rank.

        A number that leaves out reconstructions which are not finite has a name that says so (`non_finite.finite_name`).
        """
        count = self.total(self._seen)
        found: dict[str, float] = {}
        for kind, measure in self._measures.items():
            lost = self.total(self._lost[kind])
            found[f"{kind}reconstructions_non_finite"] = lost
            values = {} if lost == count > 0 else measure.compute()
            found.update({kind + finite_name(name, count - lost, count): float(v) for name, v in values.items()})
            if kind in self._distances and count - lost >= 2:
                sides = self.counts()[kind + "rfid"]
                check_counts(kind + "rfid", sides["real"], sides["fake"], count, lost_fake=lost)
                name = finite_name("rfid", count - lost, count) if lost else sized_name("rfid", count)
                found[kind + name] = float(self._distances[kind].compute())
            if lost and not self.trainer.sanity_checking:
                cure = "No number has them in it under its plain name. Look at the training's loss, or take an earlier checkpoint."
                noisy = "noisy " if kind else ""
                rank_zero_warn(f"{lost} of {count} {noisy}reconstructions are not finite. {cure}", category=NonFiniteImagesWarning)
        return found, count

    def counts(self) -> dict[str, dict[str, int]]:
        """How many vectors are on both sides of every distance. On every rank."""
        return {f"{kind}rfid": {"real": self.total(d.real_count), "fake": self.total(d.fake_count)} for kind, d in self._distances.items()}

    def on_validation_epoch_end(self) -> None:
        """Log the results, as `val/...`; NaN for what would include reconstructions that are not finite, so that names stay the same."""
        found, count = self.numbers()
        for kind in self._measures:
            if found[f"{kind}reconstructions_non_finite"]:
                found = {k: v for k, v in found.items() if "_finite_of_" not in k}
                found.update(dict.fromkeys((f"{kind}l1", f"{kind}psnr", f"{kind}ssim"), float("nan")))
                if kind in self._distances:
                    found[kind + sized_name("rfid", count)] = float("nan")
        self.log_dict({f"val/{k}": float(v) for k, v in found.items()}, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Report the numbers."""
        found, count = self.numbers()
        protocol = self.protocol(
            images=count,
            counts=self.counts(),
            extractor=self.extractor.name if self.extractor is not None else None,
            noise=spec_of(self.eval_noise) if self.eval_noise is not None else None,
        )
        self.report(found, protocol, f"{type(self).__name__}: reconstruction of {count} images ({protocol['weights']} weights)")

    @torch.no_grad()
    def reconstruction_images(self, batch: Batch, limit: int) -> dict[str, Tensor]:
        """The first images (n, 3, H, W) of a batch and their reconstructions, clamped to [0, 1], by name: rows of a picture."""
        few = cast(Batch, {k: v[:limit] if isinstance(v, Tensor) else v for k, v in batch.items()})
        with self.trainer.precision_plugin.forward_context():  # callbacks call this outside of it
            features = self.features_of(few)
            rows = {"original": self.images_from(few), "reconstruction": self._reconstruct(features, noisy=False)}
            if self.eval_noise is not None:
                rows["noisy"] = self._reconstruct(features, noisy=True)
        return rows


def check_judge(extractor: Extractor, codec: Autoencoder) -> None:
    """Refuse a judge that is the network whose features are judged, at whatever image size.

    Raises:
        ConfigError: it is.
    """
    held, encoder = getattr(extractor, "encoder", None), getattr(codec, "encoder", None)
    judge = getattr(held, "module", held)
    if encoder is not None and judge is not None and _network(encoder) == _network(judge):
        raise ConfigError("extractor", extractor.name, "made the features that it would judge.", "Name another network.")


def _network(encoder: nn.Module) -> tuple[str, Any]:
    """What makes two encoders the same network, whatever their image size, layer or class: timm's name where there is one."""
    arguments = spec_of(encoder)["init_args"]
    if isinstance(getattr(encoder, "name", None), str):
        return str(encoder.name), arguments.get("timm_args")
    return type(encoder).__qualname__, {k: v for k, v in arguments.items() if k not in ("image_size", "weights")}
