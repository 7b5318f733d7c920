"""The sets of images that `srcflow test` compares for a flow: samples, reconstructions, test and training images."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from tqdm import tqdm

from srcflow import randomness
from srcflow.errors import ConfigError, DataError
from srcflow.metrics.features.base import Extractor
from srcflow.metrics.frechet import FrechetDistance, check_counts, sized_name
from srcflow.metrics.non_finite import NonFiniteImagesWarning, counted_by_caller, finite_name, without_non_finite
from srcflow.metrics.reconstruction import ReconstructionMetrics
from srcflow.solvers.report import SolverReport
from srcflow.types import Batch, Condition, Features

if TYPE_CHECKING:
    from srcflow.tasks.flow import FlowTask

RECONSTRUCTIONS = {"rfid": "", "rfid_noisy": "_noisy"}
"""Distance of a kind of reconstructions -> ending of the names of their other numbers."""


class FlowDistances:
    """Frechet distances between sets of images, and how well images are reconstructed.

    Images that are not finite (samples under too much guidance) are no images: they are counted and left out, and a number that should be
    of them as well does not get its plain name (`non_finite.finite_name`).

    Args:
        task: the task, set up, with the weights to evaluate in place.
        extractor: the judge.
        total: images of the test set.

    Raises:
        ConfigError: more samples than test images to compare with are asked for.
        DataError: the reference cannot be used.
    """

    def __init__(self, task: FlowTask, extractor: Extractor, total: int) -> None:
        self.task, self.settings, self.extractor = task, task.evaluation, extractor
        self.samples = self.settings.samples
        if self.samples > total and self.settings.reference is None:
            raise ConfigError(
                "evaluation.samples",
                self.samples,
                f"there are {total} test images to compare with, and every distance has the same N on both sides.",
                f"Write {total} or less, or name an evaluation.reference.",
            )
        self.compared = min(self.samples, total)
        """How many test images are compared; fewer than `samples` only beside a reference."""
        self.chosen = subset("compared", self.compared, total, task.seed)
        self._distances: dict[str, FrechetDistance] = {}
        self._lost: dict[tuple[str, bool], Tensor] = {}  # (distance, real side) -> images left out
        self._bad_samples = torch.zeros((), dtype=torch.long, device=task.device)
        # every rank holds every distance, so that all of them meet in the same collectives
        for name in ("gfid", *RECONSTRUCTIONS, "fd_decoded", *(["floor"] if self.settings.floor else [])):
            reference = self.settings.reference if name == "gfid" else None
            distance = FrechetDistance(extractor.dim, reference=reference, small_sample=True).to(task.device)
            distance.setup()
            self._distances[name] = distance
            for real in (False, True):
                self._lost[name, real] = torch.zeros((), dtype=torch.long, device=task.device)
        self.report = SolverReport()
        self._reconstructions = {name: ReconstructionMetrics().to(task.device) for name in RECONSTRUCTIONS}

    # --- over the test set -------------------------------------------------------------------------------------------------------

    def update(self, batch: Batch, features: Features, keep: Tensor) -> None:
        """Take in a batch of the test set and its reconstructions.

        Args:
            batch: the batch.
            features: its raw features.
            keep: (B,) bool, the images that are compared.
        """
        task, chain = self.task, self.task.chain
        images = task.images_from(batch)
        real = self._features(images)
        for name, distance in self._distances.items():
            if name != "fd_decoded" and distance.reference is None:
                distance.update(real, real=True, valid=keep)
        for name, codec in (("rfid", chain.under(None)), ("rfid_noisy", chain)):
            codes = codec.codes(features, 0, "test")
            if name == "rfid_noisy" and self.settings.denoise is not None:
                clean = task.pipeline.denoise_codes(
                    codes.x, task.condition(batch, dropout=False), denoise=self.settings.denoise, denoiser=self.settings.denoiser
                )
                codes = codes._replace(x=clean)
            decoded, finite = without_non_finite(codec.images(codes))
            judged = self._features(decoded)
            self._update(name, judged, keep, finite)
            if name == "rfid_noisy":
                self._update("fd_decoded", judged, keep, finite, real=True)
            self._reconstructions[name].update(decoded, images, valid=keep & finite)

    # --- after it ----------------------------------------------------------------------------------------------------------------

    def finish(self, labels: Tensor | None) -> dict[str, Any]:
        """Sample, and compute every number.

        Args:
            labels: (samples,) classes of the samples; None for a flow without.
        """
        task, n = self.task, self.samples
        rank, world = task.global_rank, task.trainer.world_size
        batch = int(getattr(cast(Any, task.trainer).datamodule, "batch_size", 64))
        if self.settings.floor:  # first, since it may find the training set too small
            self._compare_training_images(self.compared // world + (rank < self.compared % world))
        seconds = torch.zeros((), dtype=torch.float64)
        steps = -(-n // (world * batch))  # the same on every rank; what is past the end is sampled, but not counted
        for step in tqdm(range(steps), desc="sample", unit="batch", disable=rank > 0, mininterval=1.0):
            wanted = torch.arange(batch) + (step * world + rank) * batch
            indices = wanted.clamp(max=n - 1) if steps > 1 or world > 1 else wanted[:n]
            start = time.perf_counter()
            with counted_by_caller():
                images = self._sample(indices, None if labels is None else labels[indices], wanted[: len(indices)] < n).cpu()
            seconds += time.perf_counter() - start
            drawn, finite = without_non_finite(images.to(task.device))
            features = self._features(drawn)
            number = wanted[: len(indices)].to(task.device)
            self._bad_samples += (~finite & (number < n)).sum()
            self._update("gfid", features, number < n, finite)
            self._update("fd_decoded", features, number < self.compared, finite)
        slowest = float(cast(Tensor, task.trainer.strategy.reduce(seconds.to(task.device), reduce_op="max")))
        return {"images_per_second": n / slowest, **self._numbers()}

    def solved(self) -> dict[str, Any]:
        """How the blocks were inverted for the samples, over all ranks (`SolverReport.summary`). A collective."""

        def reduce(x: Tensor, how: Literal["sum", "max"]) -> Tensor:
            return cast(Tensor, self.task.trainer.strategy.reduce(x.to(self.task.device), reduce_op=how)).cpu()

        return self.report.summary(reduce)

    def counts(self) -> dict[str, dict[str, int | None]]:
        """How many images are on both sides of every distance, over all ranks; None for a reference."""
        return {
            name: {"real": self._total(d.real_count) if d.reference is None else None, "fake": self._total(d.fake_count)}
            for name, d in self._distances.items()
        }

    def _numbers(self) -> dict[str, Any]:
        bad = self._total(self._bad_samples)
        numbers: dict[str, Any] = {"samples_non_finite": bad}
        if bad:
            cure = "Lower the guidance's strength or the temperature, or test an earlier checkpoint."
            _warn(f"{bad} of {self.samples} samples are not finite. {cure}")
        for name, sides in self.counts().items():
            wanted = self.samples if name == "gfid" else self.compared
            lost = [self._total(self._lost[name, real]) for real in (False, True)]
            check_counts(name, sides["real"], sides["fake"] or 0, wanted, lost_fake=lost[0], lost_real=lost[1])
            left = wanted - max(lost)
            if left >= 2:  # of fewer there is no covariance
                numbers[finite_name(name, left, wanted) if left < wanted else sized_name(name, wanted)] = float(
                    self._distances[name].compute()
                )
        for name, metrics in self._reconstructions.items():
            ending = RECONSTRUCTIONS[name]
            lost_here = self._total(self._lost[name, False])
            numbers[f"reconstructions{ending}_non_finite"] = lost_here
            if lost_here:
                _warn(f"{lost_here} of {self.compared} {'noisy ' if ending else ''}reconstructions are not finite. Examine the codec.")
            if lost_here < self.compared:
                for key, value in metrics.compute().items():
                    numbers[finite_name(f"reconstruction_{key}{ending}", self.compared - lost_here, self.compared)] = value
        return numbers

    def _update(self, name: str, features: Tensor, counted: Tensor, finite: Tensor, *, real: bool = False) -> None:
        self._lost[name, real] += (counted & ~finite).sum()
        self._distances[name].update(features, real=real, valid=counted & finite)

    def _sample(self, indices: Tensor, labels: Tensor | None, counted: Tensor) -> Tensor:
        task = self.task
        with task.trainer.precision_plugin.forward_context():
            condition: int | Condition = len(indices) if labels is None else Condition(labels=labels)
            return task.pipeline.sample(
                condition,
                seed=task.seed,
                indices=indices,
                guidance=task.guidance,
                solver=task.solver,
                temperature=task.temperature,
                denoise=self.settings.denoise,
                denoiser=self.settings.denoiser,
                report=self.report,
                counted=counted,
            )

    def _compare_training_images(self, count: int) -> None:
        """Put `count` training images, as training draws them, on the judged side of the floor."""
        cast(Any, self.task.trainer).datamodule.setup("fit")
        for batch in self.task.training_batches():
            images = self.task.images_from(batch)[batch["valid"].to(self.task.device)][:count]
            self._distances["floor"].update(self._features(images))
            count -= len(images)
            if count <= 0:
                return
        raise DataError(f"the training set has {count} images too few for the real-against-real floor; lower evaluation.samples.")

    def _features(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return self.extractor(images.float())  # type: ignore[no-any-return]  # torch is untyped here

    def _total(self, count: Tensor) -> int:
        """A count summed over all ranks: a collective. A copy, since the reduction is in place."""
        return int(cast(Tensor, self.task.trainer.strategy.reduce(count.clone(), reduce_op="sum")))


def subset(purpose: str, n: int, total: int, seed: int) -> Tensor:
    """Which samples of a set belong to a random subset of n, (total,) bool: the same for any batch size and rank count."""
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[randomness.permutation(total, seed=seed, purpose=f"subset.{purpose}")[:n]] = True
    return chosen


def _warn(message: str) -> None:
    rank_zero_warn(f"{message} No number has them in it under its plain name.", category=NonFiniteImagesWarning, stacklevel=4)
