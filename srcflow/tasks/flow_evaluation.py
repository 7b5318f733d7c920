"""What `srcflow test` measures of a flow: likelihood, invertibility, distances between sets of images, generative accuracy."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from srcflow import randomness
from srcflow.chain import DenoiserName, check_denoise, check_denoising
from srcflow.compressors.base import Compressor
from srcflow.compressors.identity import Identity
from srcflow.errors import ConfigError, DataError, Problems
from srcflow.flows.flow import Flow
from srcflow.metrics.features.base import Extractor
from srcflow.metrics.frechet import load_reference
from srcflow.metrics.likelihood import GaussianBaseline, bits_per_dim
from srcflow.metrics.non_finite import finite_name
from srcflow.noise import Constant, Dequantisation, Noise
from srcflow.registry import spec_of
from srcflow.tasks.flow_distances import FlowDistances, subset
from srcflow.types import Batch, Condition

if TYPE_CHECKING:
    from srcflow.tasks.flow import FlowTask

FULL_GAUSSIAN_DIMS = 8192
"""Above so many dimensions N * d the baseline's covariance is per token (a full one would be half a gigabyte)."""

FULL_GAUSSIAN_SAMPLES = 10
"""Codes per dimension below which a full covariance overfits (by 0.03 nats per dimension at 10, by 0.7 at 1.5)."""


@dataclass(frozen=True)
class Evaluation:
    """What `srcflow test` measures. Every number that is switched off costs nothing.

    Args:
        draws: noise draws per image for the likelihood.
        samples: N, images on each side of every Frechet distance; 0 switches the distances and the sampling off. Not more than the test set
            has, unless there is a reference; what is then compared with test images (all but gfid) is of as many as there are.
        extractor: network whose features the distances compare; never the one that made the codes. null: no distances.
        reference: npz with mu and sigma (ADM's format) of the real images for gfid, made with the same extractor; null: the test images.
            Read and checked before anything is measured.
        labels: classes of the samples, "equal" numbers of each or "random".
        classified: test images for the accuracy argmax_y log p(x|y) and the marginal likelihood; 0 switches both off.
        baseline_batches: training batches that the Gaussian baseline is fitted on; null: all, which encodes the whole training set; 0
            switches it off.
        round_trip: samples for the round-trip error.
        floor: whether to measure the real-against-real floor (reads N training images).
        denoise: deviation of the flow's Gaussian noise, to take out of samples and of noisy reconstructions before they are decoded; for
            flows without a compressor (TARFlow on pixels). null: they are decoded as they are.
        denoiser: by the flow's own "score", or its "learned" denoiser.
    """

    draws: int = 1
    samples: int = 50_000
    extractor: Extractor | None = None
    reference: str | None = None
    labels: Literal["equal", "random"] = "equal"
    classified: int = 2_000
    baseline_batches: int | None = 100
    round_trip: int = 16
    floor: bool = True
    denoise: float | None = None
    denoiser: DenoiserName = "score"

    def __post_init__(self) -> None:
        problems = Problems()
        if self.draws < 1:
            problems.add(ConfigError("evaluation.draws", self.draws, "an expectation needs at least one draw."))
        if self.baseline_batches is not None and self.baseline_batches < 0:
            problems.add(
                ConfigError("evaluation.baseline_batches", self.baseline_batches, "must not be negative.", "Write 0 to switch it off.")
            )
        for key in ("samples", "classified", "round_trip"):
            if getattr(self, key) < 0:
                problems.add(ConfigError(f"evaluation.{key}", getattr(self, key), "must not be negative.", "Write 0 to switch it off."))
        if self.samples == 1:
            cure = "Write 2 or more, or 0 to switch the distances off."
            problems.add(ConfigError("evaluation.samples", self.samples, "one image has no covariance.", cure))
        if self.reference is not None and self.extractor is None:
            cure = "Name the extractor that made the reference, or write null."
            problems.add(ConfigError("evaluation.reference", self.reference, "has no effect without evaluation.extractor.", cure))
        if self.labels not in ("equal", "random"):
            problems.add(ConfigError("evaluation.labels", self.labels, "unknown.", 'Write "equal" or "random".'))
        with problems.collect():
            check_denoise(self.denoise, self.denoiser, key="evaluation.")
        problems.raise_if_any()

    def check_reference(self) -> None:
        """Read the reference, if there are distances, and refuse one that cannot be compared with.

        Raises:
            DataError: see `load_reference`.
        """
        if self.reference is not None and self.extractor is not None and self.samples:
            load_reference(self.reference, self.extractor.dim, key="evaluation.reference")

    def check(self, compressor: Compressor, flow: Flow, noise: Noise | None) -> None:
        """Refuse what cannot be measured of a flow on these codes, under this noise of the features.

        Raises:
            ConfigError: the noise cannot be taken out of the codes; says why.
        """
        check_denoising(compressor, flow, self.denoise, self.denoiser, key="evaluation.")
        if self.denoise is not None and not isinstance(noise, Constant):
            law = f"the flow's noise, {type(noise).__name__}, is not Gaussian of one deviation."
            raise ConfigError("evaluation.denoise", self.denoise, law, "Write null; a flow trained under Constant is denoised.")


STANDARD = Evaluation()
"""What a configuration gets that names nothing: 50,000 samples, no extractor."""


class FlowEvaluator:
    """One run of `srcflow test`; every rank sees its own share of the test set.

    Args:
        task: the task, set up, with the weights to evaluate in place.
    """

    def __init__(self, task: FlowTask) -> None:
        self.task, self.settings = task, task.evaluation
        self.extractor: Extractor | None = task.outside.get("extractor")  # type: ignore[assignment]
        self.autoencoder, self.compressor, self.flow = task.autoencoder, task.compressor, task.flow
        self.settings.check(self.compressor, self.flow, task.noise)
        self.dims = self.flow.channels * self.flow.grid[0] * self.flow.grid[1]
        self._total = _test_size(task)
        compares = self.extractor is not None and self.settings.samples > 0
        self._distances = FlowDistances(task, self.extractor, self._total) if compares and self.extractor is not None else None
        self._classified = subset("classified", self.settings.classified if self.flow.num_classes else 0, self._total, task.seed)
        names = ("nll", "logdet", "gaussian", "nll_marginal", "gaussian_classified", "accuracy", "unclassified")
        self._sums = {name: torch.zeros(2, dtype=torch.float64, device=task.device) for name in names}  # sum and count
        self._bad_densities = torch.zeros((), dtype=torch.long, device=task.device)
        self._baseline_samples = 0
        self._baseline = self._fit_baseline()
        self._settings = self._protocol()  # what cannot be written down is found before hours of sampling

    # --- over the test set -----------------------------------------------------------------------------------------------------

    def update(self, batch: Batch) -> None:
        """Take in a batch of the test set."""
        valid = batch["valid"].to(self.task.device)
        labels = batch["labels"].to(self.task.device)
        condition = self.task.condition(batch, dropout=False)
        chosen = self._among(batch, self._classified)
        joint = torch.zeros((), device=self.task.device)
        # under sharding every forward is a collective: a rank without a chosen image goes through with one that is not counted
        classify = self._anywhere(bool(chosen.any()))
        rows = chosen if bool(chosen.any()) else torch.arange(len(valid), device=valid.device) == 0
        features = self.task.features_of(batch)  # once, however many draws
        for k in range(self.settings.draws):
            codes = self.task.codes(features, "test", k)
            out = self.flow(codes.x, condition, grid=codes.grid)
            log_prob = self.task.log_prob_of(out)
            self._bad_densities += (valid & ~log_prob.isfinite()).sum()
            self._add("nll", -log_prob / self.dims, valid)
            self._add("logdet", out.logdet / self.dims, valid)
            gaussian = self._baseline.nll(codes.x) if self._baseline is not None else None
            if gaussian is not None:
                self._add("gaussian", gaussian, valid)
            if classify:
                densities = self.flow.class_log_probs(codes.x[rows], grid=codes.grid)
                joint = joint + densities
                marginal = torch.logsumexp(densities, 1) - math.log(self.flow.num_classes)
                self._add("nll_marginal", -marginal / self.dims, chosen[rows])
                if gaussian is not None:
                    self._add("gaussian_classified", gaussian, chosen)
        if classify:
            known, usable = chosen[rows] & (labels[rows] >= 0), joint.isfinite().all(1)  # NaN would win every comparison
            self._add("accuracy", (joint.argmax(1) == labels[rows]).double(), known & usable)
            self._add("unclassified", known.double(), known & ~usable)
        if self._distances is not None:
            compared = self._among(batch, self._distances.chosen)
            if self._anywhere(bool(compared.any())):
                self._distances.update(batch, features, compared)

    def _among(self, batch: Batch, which: Tensor) -> Tensor:
        """(B,) bool: the valid images of a batch that are among `which` of the test set."""
        valid = batch["valid"].to(self.task.device)
        return valid & which[batch["indices"].cpu()].to(valid.device)

    def _dequantised(self) -> bool:
        """Whether the density is one of discrete pixels: uniform noise of one grey level, and only patches before the flow."""
        noise, width = self.task.noise, self.autoencoder.bin_width
        if not isinstance(noise, Dequantisation) or not isinstance(self.compressor, Identity) or width is None:
            return False
        return self.autoencoder.pixel_density and 2 / noise.levels == width

    def _anywhere(self, here: bool) -> bool:
        """Whether any rank says so."""
        return bool(self.task.trainer.strategy.reduce_boolean_decision(here, all=False))

    # --- after it ----------------------------------------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        """Sample, compare and report; returns the numbers."""
        numbers: dict[str, Any] = {"nll": self._mean("nll")}
        numbers["nll_prior"] = numbers["nll"] + self._mean("logdet")
        numbers["nll_logdet"] = -self._mean("logdet")
        classified = bool(self._classified.any())
        if classified:
            numbers["nll_marginal"] = self._mean("nll_marginal")
        if self._baseline is not None:
            numbers["nll_gaussian"] = self._mean("gaussian")
            if classified:
                numbers["nll_gaussian_classified"] = self._mean("gaussian_classified")
        if self._dequantised() and self.autoencoder.bin_width is not None:
            log_prob = torch.tensor(-numbers["nll"] * self.dims, dtype=torch.float64)
            numbers["bits_per_dim"] = float(bits_per_dim(log_prob, self.dims, bin_width=self.autoencoder.bin_width))
        right, unclassified = int(self._reduced("accuracy")[1]), int(self._reduced("unclassified")[1])
        if classified and right > 0:  # a test set without labels has a likelihood all the same
            numbers[finite_name("accuracy", right, right + unclassified)] = self._mean("accuracy")
        bad = numbers["nll_non_finite"] = int(cast(Tensor, self.task.trainer.strategy.reduce(self._bad_densities.clone(), reduce_op="sum")))
        if bad or unclassified:
            rank_zero_warn(
                f"{bad} densities of {self._total} test images ({self.settings.draws} draws each), and the densities per class of "
                f"{unclassified}, are not finite, so that nll is not a number. Test an earlier checkpoint.",
                stacklevel=3,
            )
        if self.settings.round_trip:
            numbers["round_trip_error"] = self._round_trip()
        protocol = self._settings
        if self._distances is not None:
            numbers.update(self._distances.finish(self._labels(self.settings.samples)))
            protocol["counts"] = self._distances.counts()
            protocol["inversion"] = self._distances.solved()
        judge = f", distances judged by {protocol['extractor']}" if protocol["extractor"] else ""
        self.task.report(numbers, protocol, f"{type(self.task).__name__}: {self._total} test images{judge} ({protocol['weights']} weights)")
        return numbers

    def _round_trip(self) -> float:
        """Largest |f(f^-1(u)) - u| over samples, in float32."""
        n = self.settings.round_trip
        u = randomness.normal(
            (self.dims // self.flow.channels, self.flow.channels), seed=self.task.seed, purpose="round_trip", step=0, indices=range(n)
        )
        u = u.to(self.task.device, torch.promote_types(u.dtype, self.flow.prior_std.dtype))
        condition = None
        if self.flow.num_classes:
            condition = Condition(labels=torch.arange(n, device=u.device) % self.flow.num_classes)
        with torch.autocast(u.device.type, enabled=False):
            x = self.flow.inverse(u, condition, solver=self.task.solver)
            return float((self.flow(x, condition).z - u).abs().max())

    def _labels(self, n: int) -> Tensor | None:
        classes = self.flow.num_classes
        if not classes:
            return None
        if self.settings.labels == "equal":
            return torch.arange(n) % classes
        return (randomness.uniform((), seed=self.task.seed, purpose="sample_labels", step=0, indices=range(n)) * classes).long()

    def _fit_baseline(self) -> GaussianBaseline | None:
        """The Gaussian of the noisy training codes: of all dimensions where there are enough codes to determine it, else of each token."""
        limit = self.settings.baseline_batches
        if limit == 0:
            return None
        datamodule = cast(Any, self.task.trainer).datamodule
        datamodule.setup("fit")
        most = _samples(datamodule.train_dataloader(), limit)
        possible = self.dims <= FULL_GAUSSIAN_DIMS and (most is None or most >= FULL_GAUSSIAN_SAMPLES * self.dims)
        kinds: tuple[Literal["full", "token"], ...] = ("full", "token") if possible else ("token",)
        fits = {kind: GaussianBaseline(self.dims // self.flow.channels, self.flow.channels, kind) for kind in kinds}
        count = torch.zeros((), dtype=torch.float64, device=self.task.device)
        for batch in self.task.training_batches(limit):
            codes = self.task.codes(batch, "baseline", 0).x
            count += batch["valid"].sum()
            for fit in fits.values():
                fit.update(codes, batch["valid"])
        self._baseline_samples = int(cast(Tensor, self.task.trainer.strategy.reduce(count, reduce_op="sum")))
        if "full" in fits and self._baseline_samples >= FULL_GAUSSIAN_SAMPLES * self.dims:
            return fits["full"].fit()
        return fits["token"].fit()

    def _protocol(self) -> dict[str, Any]:
        settings = {f.name: getattr(self.settings, f.name) for f in fields(self.settings) if f.name != "extractor"}
        return self.task.protocol(
            **settings,
            extractor=None if self.extractor is None else self.extractor.name,
            noise=None if self.task.noise is None else spec_of(self.task.noise),
            guidance=None if self.task.guidance is None else spec_of(self.task.guidance),
            solver="Sequential" if self.task.solver is None else spec_of(self.task.solver),
            temperature=self.task.temperature,
            gaussian=None if self._baseline is None else {"covariance": self._baseline.kind, "samples": self._baseline_samples},
            units={"nll": "nats per dimension of the noisy code", "images_per_second": "sampled images, all ranks"},
        )

    # --- sums ----------------------------------------------------------------------------------------------------------------------

    def _add(self, name: str, values: Tensor, counted: Tensor) -> None:
        kept = values[counted].double()
        self._sums[name] += torch.stack([kept.sum(), kept.new_tensor(float(len(kept)))])

    def _reduced(self, name: str) -> Tensor:
        """Sum and count over all ranks; a copy, since the reduction is in place."""
        return cast(Tensor, self.task.trainer.strategy.reduce(self._sums[name].clone(), reduce_op="sum"))

    def _mean(self, name: str) -> float:
        total = self._reduced(name)
        if total[1] == 0:
            raise DataError(f"{name}: no sample was measured; the test set is empty.")
        return float(total[0] / total[1])


def _test_size(task: FlowTask) -> int:
    """Samples of the test set; their indices are 0 .. n - 1."""
    loaders = task.trainer.test_dataloaders
    loader = loaders[0] if isinstance(loaders, list) else loaders
    return len(cast(Any, loader).dataset)


def _samples(loader: Any, limit: int | None) -> int | None:
    """How many samples `limit` batches of a loader hold at most; None if it does not tell (a stream)."""
    try:
        size = len(loader.dataset)
    except (AttributeError, TypeError):
        return None
    return size if limit is None or loader.batch_size is None else min(size, limit * int(loader.batch_size))
