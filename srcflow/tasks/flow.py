"""Stage 2: the flow on the codes of a frozen codec, under constant noise."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from srcflow import artifacts, randomness
from srcflow.autoencoders.base import Autoencoder
from srcflow.chain import check_chain, check_denoising, locate
from srcflow.codec import Codec
from srcflow.compressors.base import Compressor
from srcflow.compressors.identity import Identity
from srcflow.errors import ArtifactError, ConfigError, Problems
from srcflow.flows.flow import Flow
from srcflow.flows.likelihood import normal_log_prob
from srcflow.flows.temperatures import check_temperature
from srcflow.guidance.base import Guidance
from srcflow.metrics.non_finite import counted_by_caller
from srcflow.nn.attention import watch_logits
from srcflow.noise import Constant, Noise
from srcflow.objectives.flow import flow_objective, likelihood
from srcflow.pipeline import Pipeline
from srcflow.registry import spec_of
from srcflow.solvers.base import Solver
from srcflow.statistics import Moments
from srcflow.tasks import image_sizes
from srcflow.tasks.base import Task, Weights
from srcflow.tasks.flow_evaluation import STANDARD, Evaluation, FlowEvaluator
from srcflow.tasks.flow_extremes import extremes
from srcflow.tasks.optimization import DEFAULT, Optimization
from srcflow.tasks.reconstruction import check_judge
from srcflow.tasks.strategies import gathered
from srcflow.types import NULL_LABEL, Batch, BlockOutput, Codes, Condition, Features, FlowOutput


class FlowTask(Task):
    """Trains a flow by exact maximum likelihood on noisy codes (SRC-Flow arXiv 2605.18267, E13 and E15), and evaluates it.

    Logs `train/nll` and `val/nll` in nats per dimension of the codes, constant included, with their two parts (`prior`, `logdet`), the mean
    and variance of z after every block, the extremes of the log-scale, and the largest attention logit.

    Args:
        flow: the flow; `srcflow.flows.presets` has the published ones. One with a learnable denoiser trains it along, on the flow's own
            score (E20), for another backward pass through the flow.
        codec: directory of the compressor stage (or of the autoencoder stage, or a bundle): what turns images into codes.
        noise: noise law of the features, in units of unit-RMS tokens; null takes the autoencoder's own (dequantisation for pixels).
        label_dropout: probability that a label is replaced by the flow's null class.
        latent_norm_weight: weight of the sum of mean squares of the flow's input and of every block's output but the last (STARFlow: 1e-4).
        statistics_batches: training batches to fit the flow's normalisation on; null: all.
        guidance: guidance of every sample that the task draws.
        solver: how blocks are inverted; null: sequentially.
        temperature: multiplies the noise of samples.
        evaluation: what `srcflow test` measures.
        checkpoint_every: recompute every so many layers' activations in the backward pass; 0: keep all.
        compile_layers: torch.compile every transformer layer.
        autoencoder: where the codec's autoencoder is now, if its directory moved.
        initial: directory of a flow of the same configuration (a stage's, or from `srcflow convert`) whose weights the run starts from;
            null: fresh ones. A checkpoint goes before it.
        optimization: optimizer, schedule, clipping and the limit of non-finite steps.
        seed: key of all random numbers of the task.
        artifact: directory the result is written to at the end of fit.
        weights: which weights are evaluated, "ema" or "raw".
        metrics_file: where `srcflow test` writes its numbers; null: metrics.json in trainer.default_root_dir.
    """

    product: ClassVar[str] = "flow"
    shorter_test: ClassVar[str] = (
        "For a shorter test set evaluation.samples (the images of every distance), evaluation.classified and evaluation.baseline_batches, "
        "or name a smaller test set."
    )

    free_options: ClassVar[frozenset[str]] = frozenset(
        {"evaluation", "guidance", "solver", "temperature", "initial", "checkpoint_every", "compile_layers"}
    )
    place_options: ClassVar[frozenset[str]] = frozenset({"codec", "autoencoder"})

    def __init__(
        self,
        flow: Flow,
        codec: str,
        noise: Noise | None = None,
        label_dropout: float = 0.1,
        latent_norm_weight: float = 0.0,
        statistics_batches: int | None = 100,
        guidance: Guidance | None = None,
        solver: Solver | None = None,
        temperature: float = 1.0,
        evaluation: Evaluation = STANDARD,
        checkpoint_every: int = 0,
        compile_layers: bool = False,
        autoencoder: str | None = None,
        initial: str | None = None,
        optimization: Optimization = DEFAULT,
        seed: int = 0,
        artifact: str | None = None,
        weights: Weights = "ema",
        metrics_file: str | None = None,
    ) -> None:
        super().__init__(optimization, seed, artifact, weights, metrics_file)
        problems = Problems()
        if not 0 <= label_dropout <= 1:
            problems.add(ConfigError("label_dropout", label_dropout, "is a probability."))
        if latent_norm_weight < 0:
            problems.add(ConfigError("latent_norm_weight", latent_norm_weight, "must not be negative."))
        if statistics_batches is not None and statistics_batches < 1:
            problems.add(ConfigError("statistics_batches", statistics_batches, "must be at least 1.", "Write null for the whole set."))
        with problems.collect():
            check_temperature("temperature", temperature)
        if checkpoint_every < 0:
            problems.add(ConfigError("checkpoint_every", checkpoint_every, "must not be negative.", "Write 0 to keep all activations."))
        problems.raise_if_any()
        self.flow = flow
        self.codec, self.moved_autoencoder, self.initial = codec, autoencoder, initial
        self.noise = noise
        self.label_dropout, self.latent_norm_weight, self.statistics_batches = label_dropout, latent_norm_weight, statistics_batches
        self.guidance, self.solver, self.temperature, self.evaluation = guidance, solver, temperature, evaluation
        self.compile_layers = compile_layers
        flow.set_checkpointing(checkpoint_every)
        self._totals: dict[str, Tensor] = {}

    # --- set-up ------------------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Load the codec and check that it fits the flow and the data.

        Raises:
            ConfigError: two sizes (of the images, too), or the number of classes, disagree.
            ArtifactError: the codec cannot be loaded, or its weights are not finite.
            DataError: for a test, evaluation.reference cannot be used.
        """
        super().setup(stage)
        places = locate(self.codec, autoencoder=self.moved_autoencoder)
        if "flow" in places:
            raise ConfigError("model.codec", self.codec, "is a flow.", "Name the directory of the compressor stage.")
        problems = Problems()
        autoencoder = self.load_artifact("autoencoder", str(places["autoencoder"]), Autoencoder)
        if "compressor" in places:
            self.load_artifact("compressor", str(places["compressor"]), Compressor)
        elif "compressor" not in self.outside:
            self.set_outside("compressor", Identity(autoencoder.dim))
        with problems.collect():
            check_chain(autoencoder, self.compressor, self.flow)
        with problems.collect():
            image_sizes.check_data(cast(Any, self.trainer).datamodule, autoencoder)
        if self.noise is None:
            self.noise = autoencoder.default_noise()
            if self.noise is None:
                problems.add(ConfigError("model.noise", None, "a flow on features is trained under noise.", f"Write {Constant.__name__}."))
        classes = getattr(cast(Any, self.trainer).datamodule, "num_classes", None)
        if self.flow.num_classes and classes is not None and classes != self.flow.num_classes:
            problems.add(
                ConfigError(
                    "model.flow num_classes",
                    self.flow.num_classes,
                    f"data.num_classes = {classes}.",
                    "Make them equal; 0 for an unconditional flow.",
                )
            )
        if not problems.found:
            with problems.collect():
                self.evaluation.check(self.compressor, self.flow, self.noise)
        if self.flow.self_denoiser is not None and stage == "fit":
            with problems.collect():
                self._check_denoiser()
        if self.initial is not None:
            with problems.collect():
                self._start_from(self.initial)
        if self.evaluation.extractor is not None:
            with problems.collect():
                check_judge(self.evaluation.extractor, autoencoder)
        if stage == "test":
            with problems.collect():
                self.evaluation.check_reference()
        problems.raise_if_any()
        if stage == "test" and self.evaluation.extractor is not None and "extractor" not in self.outside:
            self.evaluation.extractor.setup()
            self.set_outside("extractor", self.evaluation.extractor)
        if self.compile_layers:
            self.flow.compile_layers()
            self.compile_layers = False

    def _check_denoiser(self) -> None:
        """Refuse to train a denoiser on a score that is not that of known noise."""
        if not isinstance(self.noise, Constant):
            why = "the flow's denoiser is trained for Gaussian noise of one deviation."
            raise ConfigError("model.noise", type(self.noise).__name__, why, f"Write {Constant.__name__}.")
        check_denoising(self.compressor, self.flow, self.noise.sigma, "learned", key="model.flow.")
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            why = "the score of a sharded flow cannot be taken before its loss is."
            raise ConfigError("trainer.strategy", "ModelParallelStrategy", why, "Use ddp, or a flow without denoiser.")

    def _start_from(self, directory: str) -> None:
        """Load another flow's weights.

        Raises:
            ArtifactError: there is no flow, its keys or shapes do not fit (lists them), or its weights are not finite.
        """
        places = locate(directory)
        if "flow" not in places:
            raise ArtifactError(f"model.initial = {directory!r} holds no flow.")
        state, what = artifacts.read_weights(places["flow"]), f"model.initial = {directory!r}"
        artifacts.check_finite(state, what)
        artifacts.load_state(self.flow, state, what=what)
        self.initial = None  # setup is called again for another loop

    @property
    def autoencoder(self) -> Autoencoder:
        """The codec's frozen autoencoder."""
        return cast(Autoencoder, self.outside["autoencoder"])

    @property
    def compressor(self) -> Compressor:
        """The codec's frozen compressor."""
        return cast(Compressor, self.outside["compressor"])

    @property
    def pipeline(self) -> Pipeline:
        """The chain with the flow as it is now."""
        return Pipeline(self.autoencoder, self.compressor, self.flow, self.noise)

    def facts(self) -> dict[str, Any]:
        """Also the noise law, so that likelihoods can be computed under it later."""
        return {**super().facts(), "noise": None if self.noise is None else spec_of(self.noise)}

    def prepare_outside(self) -> None:
        """See `Task.prepare_outside`; also refuses to evaluate a flow that was never trained.

        Raises:
            ConfigError: outside of fit, the flow's normalisation was never fitted.
        """
        super().prepare_outside()
        norm2 = self.flow.normalization
        if norm2 is not None and not self.trainer.state.fn == "fit" and not bool(norm2.fitted):
            raise ConfigError("ckpt_path", None, "this flow was never trained.", "Name the checkpoint: --ckpt_path FILE.")

    def on_fit_start(self) -> None:
        """Fit the flow's normalisation on noisy codes of the training set."""
        super().on_fit_start()
        norm2 = self.flow.normalization
        if norm2 is None or bool(norm2.fitted) or self.restoring:
            return
        moments = Moments(self.flow.channels, covariance=True)
        for batch in self.training_batches(self.statistics_batches):
            moments.update(self.codes(batch, "norm2", 0).x, batch.get("valid"))
        total = moments.all_reduced()
        norm2.fit(total.mean.to(self.device), total.covariance.to(self.device))
        rank_zero_info(f"Normalisation of the codes fitted on {total.count} tokens.")

    def configure_model(self) -> None:
        """Shard the flow, one wrap per transformer layer, under ModelParallelStrategy (FSDP2); nothing under one process or DDP."""
        mesh = self.device_mesh
        if mesh is None or any(isinstance(p, DTensor) for p in self.flow.parameters()):
            return
        ranks = mesh["data_parallel"]
        for trunk in (*self.flow.blocks, self.flow.self_denoiser):
            for layer in getattr(trunk, "layers", []):
                fully_shard(layer, mesh=ranks)
        fully_shard(self.flow, mesh=ranks)
        for name in ("steps", "log_prob", "class_log_probs", "blocks_inverse", "solve", "inverse", "denoiser"):
            register_fsdp_forward_method(self.flow, name)

    # --- data --------------------------------------------------------------------------------------------------------------------

    @property
    def chain(self) -> Codec:
        """The codec's parts under the flow's noise."""
        return Codec(self.autoencoder, self.compressor, self.noise, self.seed)

    @torch.no_grad()
    def codes(self, batch: Batch | Features, purpose: str, step: int | None = None) -> Codes:
        """Noisy codes (B, N, d), at least float32, float64 for such a flow, and their grid.

        Args:
            batch: a batch, or its `features`.
            purpose: names the use, so that two uses never share numbers.
            step: None in training: the optimizer step; in evaluation: the number of the draw.
        """
        features = batch if isinstance(batch, Features) else self.features_of(batch)
        codes = self.chain.codes(features, self.global_step if step is None else step, purpose, epoch=self.epoch_of(step))
        return codes._replace(x=codes.x.to(torch.promote_types(codes.x.dtype, self.flow.prior_std.dtype)))

    def condition(self, batch: Batch, *, dropout: bool) -> Condition | None:
        """The condition of a batch, with labels dropped at random in training."""
        if "labels" not in self.flow.fields:
            return None
        labels = batch["labels"]
        if dropout and self.label_dropout > 0:
            dropped = randomness.bernoulli(
                self.label_dropout, seed=self.seed, purpose="label_dropout", step=self.global_step, indices=batch["indices"]
            )
            labels = torch.where(dropped.to(labels.device), NULL_LABEL, labels)
        return Condition(labels=labels)

    def log_prob_of(self, out: FlowOutput) -> Tensor:
        """Log-density (B,) in nats of codes whose way through the flow is `out`."""
        return normal_log_prob(out.z, self.flow.prior_std if self.flow.learn_prior else None) + out.logdet

    # --- training ----------------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean negative log-likelihood in nats per dimension, plus the latent-norm penalty."""
        trains_denoiser = self.flow.self_denoiser is not None
        codes = self.codes(batch, "train")
        found = flow_objective(
            self.flow,
            codes.x.requires_grad_(trains_denoiser),
            self.condition(batch, dropout=True),
            grid=codes.grid,
            latent_norm_weight=self.latent_norm_weight,
            noise_deviation=cast(Constant, self.noise).sigma * self.autoencoder.noise_scale() if trains_denoiser else None,
        )
        outputs = found.likelihood.steps.blocks
        if self.flow.learn_prior and not self.apart:  # one batch whose square is the mean over all ranks
            moments = cast(Tensor, self.trainer.strategy.reduce(outputs[-1].z.detach().square().mean(0), reduce_op="mean"))
            self.flow.update_prior(moments.sqrt()[None])
        for name, value in found.terms.items():
            self.log(f"train/{name}", value, prog_bar=name == "nll")
        if (self.global_step + 1) % cast(Any, self.trainer).log_every_n_steps == 0:
            self.log_dict(self._block_statistics(outputs, "train"))
        return found.total

    def moving(self) -> dict[str, Tensor]:
        """The learned prior's running average."""
        return {f"flow.{k}": v for k, v in self.flow.named_buffers() if k in ("prior_std", "prior_var")} if self.flow.learn_prior else {}

    def statistics_of(self, batch: Batch) -> dict[str, dict[str, Tensor]]:
        """See `Task.statistics_of`, and `flow_extremes.extremes`."""
        return extremes(self, batch)

    @torch.no_grad()
    def _block_statistics(self, outputs: list[BlockOutput], stage: str) -> dict[str, Tensor]:
        """Mean and variance of z per block and the extremes of the log-scale over all blocks."""
        values: dict[str, Tensor] = {}
        low, high = [], []
        for k, o in enumerate(outputs):
            values[f"{stage}/z_mean_{k}"] = o.z.mean()
            values[f"{stage}/z_var_{k}"] = o.z.var()
            low.append((-o.logdet).amin())
            high.append((-o.logdet).amax())
        values[f"{stage}/log_scale_min"] = torch.stack(low).amin()
        values[f"{stage}/log_scale_max"] = torch.stack(high).amax()
        return values

    # --- validation --------------------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation's sums."""
        self._totals = {k: torch.zeros((), dtype=torch.float64, device=self.device) for k in ("count", "prior", "logdet")}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Negative log-likelihood under fixed noise, and its parts."""
        codes = self.codes(batch, "validation", 0)
        valid = batch["valid"].to(self.device)
        std = self.flow.prior_std if self.flow.learn_prior else None
        watch: AbstractContextManager[list[Tensor]] = watch_logits() if batch_idx == 0 else nullcontext([])
        with watch as logits:
            found = likelihood(self.flow, codes.x, self.condition(batch, dropout=False), grid=codes.grid, std=std)
        prior, logdet, outputs = found.prior, found.logdet, found.steps.blocks
        self._totals["count"] += valid.sum()
        self._totals["prior"] += prior[valid].double().sum()
        self._totals["logdet"] += logdet[valid].double().sum()
        if batch_idx == 0:
            largest = {"val/attention_logit_max": torch.stack(logits).amax()} if logits else {}
            self.log_dict({**self._block_statistics(outputs, "val"), **largest}, sync_dist=True, batch_size=len(valid))

    def on_validation_epoch_end(self) -> None:
        """Log the means over the validation set."""
        totals = {k: cast(Tensor, self.trainer.strategy.reduce(v, reduce_op="sum")) for k, v in self._totals.items()}
        dims = self.flow.channels * self.flow.grid[0] * self.flow.grid[1]
        per_dim = totals["count"].clamp_min(1) * dims
        prior, logdet = totals["prior"] / per_dim, totals["logdet"] / per_dim
        values = {"val/nll": prior - logdet, "val/prior": prior, "val/logdet": logdet}
        self.log_dict({k: v.float() for k, v in values.items()}, prog_bar=True, rank_zero_only=True)

    def sample_images(self, labels: int | Tensor, seed: int) -> Tensor:
        """Images (n, 3, H, W) in [0, 1] for n samples or the given labels (n,), drawn and denoised as the task is set to.

        What is not finite is NaN, and the caller's to report.
        """
        with gathered(self.flow), counted_by_caller(), self.trainer.precision_plugin.forward_context():
            condition: int | Condition = labels if isinstance(labels, int) else Condition(labels=labels)
            if not isinstance(condition, int) and "labels" not in self.flow.fields:
                condition = len(condition)
            return self.pipeline.sample(
                condition,
                seed=seed,
                guidance=self.guidance,
                solver=self.solver,
                temperature=self.temperature,
                denoise=self.evaluation.denoise,
                denoiser=self.evaluation.denoiser,
            )

    # --- test and prediction -----------------------------------------------------------------------------------------------------

    def on_test_epoch_start(self) -> None:
        """Begin an evaluation."""
        self._evaluator = FlowEvaluator(self)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """See `FlowEvaluator`."""
        with gathered(self.flow):
            self._evaluator.update(batch)

    def on_test_epoch_end(self) -> None:
        """Finish the evaluation and report the numbers."""
        with gathered(self.flow):
            self._evaluator.finish()

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Per image: `indices`, `valid` (False: padding), `nll` (B,) in nats per dimension and, given classes, `log_probs` (B, classes)."""
        codes = self.codes(batch, "predict", 0)
        out: dict[str, Tensor] = {"indices": batch["indices"], "valid": batch["valid"]}
        with gathered(self.flow):
            log_prob = self.flow.log_prob(codes.x, self.condition(batch, dropout=False), grid=codes.grid)
            out["nll"] = -log_prob / codes.x.shape[1:].numel()
            if self.flow.num_classes:
                out["log_probs"] = self.flow.class_log_probs(codes.x, grid=codes.grid).log_softmax(1)
        return out
