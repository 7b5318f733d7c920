"""What `srcflow test` measures of a flow: likelihood, invertibility, distances between sets of images, generative accuracy."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from tqdm import tqdm

from srcflow import randomness
from srcflow.chain import DenoiserName, check_denoise, check_denoising
from srcflow.compressors.base import Compressor
from srcflow.compressors.identity import Identity
from srcflow.errors import ConfigError, DataError, Problems
from srcflow.flows.flow import Flow
from srcflow.metrics.features.base import Extractor
from srcflow.metrics.frechet import FrechetDistance, sized_name
from srcflow.metrics.likelihood import GaussianBaseline, bits_per_dim
from srcflow.metrics.reconstruction import ReconstructionMetrics
from srcflow.noise import Constant, Dequantisation, Noise
from srcflow.registry import spec_of
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
        samples: N, images on each side of every Frechet distance; 0 switches the distances and the sampling off.
        extractor: network whose features the distances compare; never the one that made the codes. null: no distances.
        reference: npz with mu and sigma (ADM's format) of the real images for gfid, made with the same extractor; null: the test images.
        labels: classes of the samples, "equal" numbers of each or "random".
        classified: test images for the accuracy argmax_y log p(x|y) and the marginal likelihood; 0 switches both off.
        baseline_batches: training batches that the Gaussian baseline is fitted on; null: all; 0 switches it off.
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
    baseline_batches: int | None = None
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
        if self.labels not in ("equal", "random"):
            problems.add(ConfigError("evaluation.labels", self.labels, "unknown.", 'Write "equal" or "random".'))
        with problems.collect():
            check_denoise(self.denoise, self.denoiser, key="evaluation.")
        problems.raise_if_any()

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
        compared = self.settings.samples if self.extractor is not None else 0
        if compared > self._total:
            raise ConfigError(
                "evaluation.samples",
                compared,
                f"there are {self._total} test images to compare with, and every distance has the same N on both sides.",
                f"Write {self._total} or less.",
            )
        self._compared = self._subset("compared", compared)
        self._classified = self._subset("classified", self.settings.classified if self.flow.num_classes else 0)
        names = ("nll", "logdet", "gaussian", "nll_marginal", "gaussian_classified", "accuracy")
        self._sums = {name: torch.zeros(2, dtype=torch.float64, device=task.device) for name in names}  # sum and count
        self._distances: dict[str, FrechetDistance] = {}
        self._reconstructions: dict[str, ReconstructionMetrics] = {}
        self._baseline_samples = 0
        self._baseline = self._fit_baseline()
        self._settings = self._protocol()  # what cannot be written down is found before hours of sampling
        if compared:  # every rank holds every distance, so that all of them meet in the same collectives; references are read now
            for name in ("gfid", "rfid", "rfid_noisy", "fd_decoded", *(["floor"] if self.settings.floor else [])):
                self._distance(name)
            for name in ("rfid", "rfid_noisy"):
                self._reconstructions[name] = ReconstructionMetrics().to(task.device)

    # --- over the test set -----------------------------------------------------------------------------------------------------

    def update(self, batch: Batch) -> None:
        """Take in a batch of the test set."""
        valid = batch["valid"].to(self.task.device)
        labels = batch["labels"].to(self.task.device)
        condition = self.task.condition(batch, dropout=False)
        chosen, compared = (valid & s[batch["indices"].cpu()].to(valid.device) for s in (self._classified, self._compared))
        joint = torch.zeros((), device=self.task.device)
        # under sharding every forward is a collective: a rank without a chosen image goes through with one that is not counted
        classify = self._anywhere(bool(chosen.any()))
        rows = chosen if bool(chosen.any()) else torch.arange(len(valid), device=valid.device) == 0
        for k in range(self.settings.draws):
            codes = self.task.codes(batch, "test", k)
            out = self.flow(codes, condition)
            self._add("nll", -self.task.log_prob_of(out) / self.dims, valid)
            self._add("logdet", out.logdet / self.dims, valid)
            gaussian = self._baseline.nll(codes) if self._baseline is not None else None
            if gaussian is not None:
                self._add("gaussian", gaussian, valid)
            if classify:
                densities = self.flow.class_log_probs(codes[rows])
                joint = joint + densities
                marginal = torch.logsumexp(densities, 1) - math.log(self.flow.num_classes)
                self._add("nll_marginal", -marginal / self.dims, chosen[rows])
                if gaussian is not None:
                    self._add("gaussian_classified", gaussian, chosen)
        if classify:
            self._add("accuracy", (joint.argmax(1) == labels[rows]).double(), chosen[rows] & (labels[rows] >= 0))
        if self._anywhere(bool(compared.any())):
            self._compare_reconstructions(batch, compared)

    def _dequantised(self) -> bool:
        """Whether the density is one of discrete pixels: uniform noise of one grey level, and only patches before the flow."""
        noise, width = self.task.noise, self.autoencoder.bin_width
        if not isinstance(noise, Dequantisation) or not isinstance(self.compressor, Identity) or width is None:
            return False
        return self.autoencoder.pixel_density and 2 / noise.levels == width

    def _anywhere(self, here: bool) -> bool:
        """Whether any rank says so."""
        return bool(self.task.trainer.strategy.reduce_boolean_decision(here, all=False))

    def _compare_reconstructions(self, batch: Batch, keep: Tensor) -> None:
        images = self.task.images_from(batch)
        raw, grid = self.task.features_from(batch, self.autoencoder)
        noise = self.task.noise_for(self.task.noise, raw, batch["indices"], "test", 0)
        real = self._features(images)
        for side in ("gfid", "rfid", "rfid_noisy", "floor"):
            if side in self._distances and not (side == "gfid" and self.settings.reference):
                self._distance(side).update(real, real=True, valid=keep)
        for name, eps in (("rfid", None), ("rfid_noisy", noise)):
            codes = self.compressor.compress(self.autoencoder.normalize(raw, eps), grid)
            if name == "rfid_noisy" and self.settings.denoise is not None:
                codes = self.task.pipeline.denoise_codes(
                    codes, self.task.condition(batch, dropout=False), denoise=self.settings.denoise, denoiser=self.settings.denoiser
                )
            decoded = self.autoencoder.decode(self.compressor.expand(codes, grid), grid).float().clamp(0, 1)
            features = self._features(decoded)
            self._distance(name).update(features, valid=keep)
            if name == "rfid_noisy":
                self._distance("fd_decoded").update(features, real=True, valid=keep)
            self._reconstructions[name].update(decoded, images, valid=keep)

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
        if classified and self._reduced("accuracy")[1] > 0:  # a test set without labels has a likelihood all the same
            numbers["accuracy"] = self._mean("accuracy")
        if self.settings.round_trip:
            numbers["round_trip_error"] = self._round_trip()
        if bool(self._compared.any()):
            numbers.update(self._compare_samples())
        protocol = self._settings
        judge = f", distances judged by {protocol['extractor']}" if protocol["extractor"] else ""
        self.task.report(numbers, protocol, f"{type(self.task).__name__}: {self._total} test images{judge} ({protocol['weights']} weights)")
        return numbers

    def _compare_samples(self) -> dict[str, Any]:
        rank, world = self.task.global_rank, self.task.trainer.world_size
        n = self.settings.samples
        labels = self._labels(n)
        batch = self._batch_size()
        if self.settings.floor:  # first, since it may find the training set too small
            self._compare_training_images(_share(n, rank, world))
        seconds = torch.zeros((), dtype=torch.float64)
        steps = -(-n // (world * batch))  # the same on every rank; what is past the end is sampled, but not counted
        for step in tqdm(range(steps), desc="sample", unit="batch", disable=rank > 0, mininterval=1.0):
            wanted = torch.arange(batch) + (step * world + rank) * batch
            indices = wanted.clamp(max=n - 1) if steps > 1 or world > 1 else wanted[:n]
            start = time.perf_counter()
            images = self._sample(indices, None if labels is None else labels[indices]).cpu()
            seconds += time.perf_counter() - start
            features = self._features(images.to(self.task.device))
            counted = (wanted[: len(indices)] < n).to(features.device)
            self._distance("gfid").update(features, valid=counted)
            self._distance("fd_decoded").update(features, valid=counted)
        slowest = float(cast(Tensor, self.task.trainer.strategy.reduce(seconds.to(self.task.device), reduce_op="max")))
        numbers: dict[str, Any] = {"images_per_second": n / slowest}
        for name, distance in self._distances.items():
            vectors = int(cast(Tensor, self.task.trainer.strategy.reduce(distance.fake_count.clone(), reduce_op="sum")))
            numbers[sized_name(name, vectors)] = float(distance.compute())
        for name, metrics in self._reconstructions.items():
            suffix = "_noisy" if name == "rfid_noisy" else ""
            numbers.update({f"reconstruction_{k}{suffix}": v for k, v in metrics.compute().items()})
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

    def _sample(self, indices: Tensor, labels: Tensor | None) -> Tensor:
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
            )

    def _labels(self, n: int) -> Tensor | None:
        classes = self.flow.num_classes
        if not classes:
            return None
        if self.settings.labels == "equal":
            return torch.arange(n) % classes
        return (randomness.uniform((), seed=self.task.seed, purpose="sample_labels", step=0, indices=range(n)) * classes).long()

    def _batch_size(self) -> int:
        return int(getattr(cast(Any, self.task.trainer).datamodule, "batch_size", 64))

    def _compare_training_images(self, count: int) -> None:
        """Put `count` training images, as training draws them, on the judged side of the floor."""
        cast(Any, self.task.trainer).datamodule.setup("fit")
        for batch in self.task.training_batches():
            images = self.task.images_from(batch)[batch["valid"].to(self.task.device)][:count]
            self._distance("floor").update(self._features(images))
            count -= len(images)
            if count <= 0:
                return
        raise DataError(f"the training set has {count} images too few for the real-against-real floor; lower evaluation.samples.")

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
            codes = self.task.codes(batch, "baseline", 0)
            count += batch["valid"].sum()
            for fit in fits.values():
                fit.update(codes, batch["valid"])
        self._baseline_samples = int(cast(Tensor, self.task.trainer.strategy.reduce(count, reduce_op="sum")))
        if "full" in fits and self._baseline_samples >= FULL_GAUSSIAN_SAMPLES * self.dims:
            return fits["full"].fit()
        return fits["token"].fit()

    def _subset(self, purpose: str, n: int) -> Tensor:
        """Which samples of the test set belong to a random subset of n, (total,) bool: the same for any batch size and rank count."""
        chosen = torch.zeros(self._total, dtype=torch.bool)
        chosen[randomness.permutation(self._total, seed=self.task.seed, purpose=f"subset.{purpose}")[:n]] = True
        return chosen

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

    def _features(self, images: Tensor) -> Tensor:
        if self.extractor is None:
            raise ConfigError("evaluation.extractor", None, "Frechet distances need one.")
        with torch.autocast(images.device.type, enabled=False):
            return self.extractor(images.float())  # type: ignore[no-any-return]  # torch is untyped here

    def _distance(self, name: str) -> FrechetDistance:
        if name not in self._distances:
            if self.extractor is None:
                raise ConfigError("evaluation.extractor", None, "Frechet distances need one.")
            reference = self.settings.reference if name == "gfid" else None
            distance = FrechetDistance(self.extractor.dim, reference=reference, small_sample=True).to(self.task.device)
            distance.setup()
            self._distances[name] = distance
        return self._distances[name]

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


def _share(n: int, rank: int, world: int) -> int:
    return n // world + (rank < n % world)
