"""What every stage's training shares: optimizer, keyed noise, frozen parts, non-finite guard, artifacts.

A task is a thin LightningModule around plain modules. It saves no hyperparameters: the configuration is in the YAML that the CLI writes, so
options given at test time are never overridden by a checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DistributedSampler

import srcflow
from srcflow import artifacts
from srcflow.autoencoders.base import Autoencoder
from srcflow.callbacks.ema import EMA, RAW_STATE, aliases, like
from srcflow.callbacks.non_finite import BadStep, NonFiniteGuard
from srcflow.codec import Codec
from srcflow.datamodules.base import DataModule, Resumable
from srcflow.datamodules.feature_store import FeatureStore
from srcflow.errors import ArtifactError, ConfigError, ManifestMismatchError, Problems
from srcflow.registry import spec_of
from srcflow.tasks import artifact, dump, examination, image_sizes, resume, strategies
from srcflow.tasks.checkpoint import FACTS, refuse_foreign
from srcflow.tasks.optimization import DEFAULT, Optimization
from srcflow.tasks.report import table, write_metrics
from srcflow.trust import foreign
from srcflow.types import Batch, Features

M = TypeVar("M", bound=nn.Module)
Weights = Literal["ema", "raw"]


class Task(L.LightningModule):
    """Base of the three stages' tasks.

    Subclasses set `product`, the name of the attribute that holds the module the stage is there to make, and put what is only used by
    losses and metrics into `outside`: such parts are moved to the device, but neither trained, averaged, sharded nor saved.
    They may declare which of their own options can change between two starts of one run (`srcflow.cli.run_identity`).

    Args:
        optimization: optimizer, schedule, clipping and the limit of non-finite steps.
        seed: key of all random numbers of the task (noise, label dropout, evaluation draws).
        artifact: directory the result is written to at the end of fit; null: none (`srcflow export` makes one from a checkpoint).
        weights: which weights are evaluated: "ema", the average that the EMA callback keeps (where there is one), or "raw".
        metrics_file: where `srcflow test` writes its numbers; null: metrics.json in trainer.default_root_dir.
    """

    product: ClassVar[str]
    shorter_test: ClassVar[str] = "Name a smaller test set."  # the cure for a test of some batches only
    free_options: ClassVar[frozenset[str]] = frozenset({"artifact", "metrics_file", "weights"})

    def __init__(
        self,
        optimization: Optimization = DEFAULT,
        seed: int = 0,
        artifact: str | None = None,
        weights: Weights = "ema",
        metrics_file: str | None = None,
    ) -> None:
        super().__init__()
        if weights not in ("ema", "raw"):
            raise ConfigError("weights", weights, "unknown.", 'Write "ema" or "raw".')
        self.optimization, self.seed, self.artifact, self.metrics_file = optimization, seed, artifact, metrics_file
        self.weights: Weights = weights
        self.outside: dict[str, nn.Module] = {}
        self.guard = NonFiniteGuard(optimization.gradient_clip, optimization.max_bad_steps, optimization.dump_bad_steps)
        self.replaying = False
        self.apart = False  # in `examination.apart`: a training step is only a function of its batch
        self._built_on: dict[str, dict[str, str]] = {}
        self._raw_state: dict[str, Tensor] | None = None
        self._evaluated: Weights | None = None
        self._checked: FeatureStore | None = None
        self._before_window: dict[str, Tensor] = {}

    # --- parts -----------------------------------------------------------------------------------------------------------------

    @property
    def made(self) -> nn.Module:
        """The module the stage makes."""
        return cast(nn.Module, getattr(self, self.product))

    def set_outside(self, name: str, module: M) -> M:
        """Keep a frozen part outside the module tree (see the class); returns it frozen and in eval mode."""
        module.requires_grad_(False).eval()
        self.outside[name] = module
        return module

    def load_artifact(self, role: str, path: str, base: type[M]) -> M:
        """Load an earlier stage's artifact as a frozen part outside the tree, and note that the product is built on it.

        Raises:
            ArtifactError: there is no usable artifact at `path`.
        """
        if role not in self.outside:
            self.set_outside(role, artifacts.load(path, base))
            self._built_on[role] = {"path": str(Path(path).resolve()), "hash": str(artifacts.read_manifest(path)["hash"])}
        return cast(M, self.outside[role])

    @property
    def restoring(self) -> bool:
        """Whether this run starts from a checkpoint, which then holds every statistic of the product; known from `on_fit_start` on.

        Also where `srcflow replay` makes a step again.
        """
        return self.replaying or (self._trainer is not None and self._trainer.ckpt_path is not None)

    # --- Lightning's hooks -----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the trainer's settings against the task's. Subclasses load weights and artifacts here, after calling this."""
        problems = Problems()
        with problems.collect():
            strategies.check_strategy(self)
        if self.trainer.precision in ("16-mixed", "16-true", "bf16-true", "transformer-engine-float16"):
            why = "rounds statistics and master weights." if self.trainer.precision == "bf16-true" else "float16 overflows here."
            problems.add(ConfigError("trainer.precision", self.trainer.precision, why, "Use bf16-mixed or 32-true."))
        if self.trainer.gradient_clip_val is not None:
            problems.add(
                ConfigError(
                    "trainer.gradient_clip_val",
                    self.trainer.gradient_clip_val,
                    "the task clips, together with its guard against non-finite gradients.",
                    "Set model.optimization.gradient_clip instead.",
                )
            )
        if stage == "test":
            with problems.collect():
                self._check_whole_test()
        if stage == "fit" and self.artifact is not None:
            with problems.collect():
                self._check_artifact(Path(self.artifact))
        if stage == "test" and self.trainer.is_global_zero:
            key = "trainer.default_root_dir" if self.metrics_file is None else "model.metrics_file"
            with problems.collect():
                artifacts.check_writable(self.metrics_path(), key, directory=False)
        problems.raise_if_any()

    def _check_whole_test(self) -> None:
        """Refuse to test on a part of the test set: every number would be of fewer images than its name and protocol say."""
        trainer = cast(Any, self.trainer)
        for key, value in (("fast_dev_run", trainer.fast_dev_run), ("limit_test_batches", trainer.limit_test_batches)):
            whole = value == 0 if key == "fast_dev_run" else isinstance(value, float) and value == 1.0  # the integer 1 is one batch
            if not whole:
                why = "a test of some batches measures fewer images than its numbers are named for."
                raise ConfigError(f"trainer.{key}", value, why, f"Leave it out. {self.shorter_test}")

    def _check_artifact(self, artifact: Path) -> None:
        """Refuse a place that `artifact.write` would refuse at the end: something else is there, or this run writes into it."""
        artifacts.check_target(artifact, "model.artifact")
        if found := foreign(spec_of(self.made), artifacts.GROUPS, imported=False):  # which also says at once if nothing describes a part
            rank_zero_info(
                f"{artifact} will name {found[1]}, which is of no distribution that registers parts for srcflow: commands will refuse to "
                "import it. Register it as an entry point of your distribution (docs/howto/own-encoder.md)."
            )
        folders = [lo.log_dir for lo in self.trainer.loggers] + [getattr(c, "dirpath", None) for c in cast(Any, self.trainer).callbacks]
        for inside in (f for f in folders if f is not None and Path(f).resolve().is_relative_to(artifact.resolve())):
            raise ConfigError("artifact", str(artifact), f"the run writes {inside} into it.", "Name a directory of its own.")

    def configure_callbacks(self) -> list[L.Callback]:
        """The guard against non-finite steps."""
        return [self.guard]

    def configure_optimizers(self) -> Any:
        """The configured optimizer over the trainable parameters, and its schedule; nothing if nothing is trained."""
        strategies.check_sharded(self)
        trained = [p for p in self.parameters() if p.requires_grad]
        if not trained:
            return None
        optimizer = self.optimization.build_optimizer(trained)
        whole = not self.trainer.fast_dev_run  # type: ignore[attr-defined]  # one step, whatever the schedule
        scheduler = self.optimization.scheduler(optimizer, self.total_steps, whole=whole)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "learning_rate"}}

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run.

        Raises:
            ConfigError: the trainer sets no end.
        """
        total = self.trainer.estimated_stepping_batches
        if total == float("inf"):
            raise ConfigError(
                "trainer.max_steps", self.trainer.max_steps, "the schedule needs the length of the run.", "Set trainer.max_steps."
            )
        return int(total)

    def prepare_outside(self) -> None:
        """Bring the outside parts to the device, and the raw weights of a checkpoint into the product if those are to be evaluated.

        Raises:
            ManifestMismatchError: stored features come from another encoder than the run's.
        """
        for module in self.outside.values():
            module.to(self.device)
        self._check_store()
        if self._raw_state is not None:
            with torch.no_grad():
                parameters = dict(self.named_parameters(remove_duplicate=False))
                for name, owner in aliases(self).items():
                    if owner in self._raw_state:
                        parameters[name].copy_(like(self._raw_state[owner], parameters[name]))
            self._raw_state = None

    def check_weights(self) -> None:
        """Refuse weights that are not finite, on all ranks if on one.

        Raises:
            ArtifactError: names the first such tensors, and the cure.
        """
        what = f"ckpt_path = {str(self.trainer.ckpt_path)!r}" if self.trainer.ckpt_path else type(self.made).__name__
        problem: ArtifactError | None = None
        try:
            artifacts.check_finite({k: v.to_local() if isinstance(v, DTensor) else v for k, v in self.state_dict().items()}, what)
        except ArtifactError as e:
            problem = e
        if not self.trainer.strategy.reduce_boolean_decision(problem is None, all=True):
            raise problem or ArtifactError(f"{what}: the weights that another rank holds are not finite.")

    def _check_store(self) -> None:
        """Refuse stored features of another encoder or autoencoder; once, since it takes a hash of the weights."""
        store, codec = getattr(self._trainer, "datamodule", None), self.codec_of_run()
        if isinstance(store, FeatureStore) and isinstance(codec, Autoencoder) and self._checked is not store:
            store.check_maker(codec)
            self._checked = store

    def codec_of_run(self) -> nn.Module | None:
        """The autoencoder whose features the run uses: its own, or the frozen one."""
        return cast("nn.Module | None", self.outside.get("autoencoder", getattr(self, "autoencoder", None)))

    def on_fit_start(self) -> None:
        """Subclasses fit their statistics here, after calling this, unless `restoring`."""
        self.prepare_outside()

    def on_validation_start(self) -> None:
        """See `prepare_outside`."""
        self.prepare_outside()

    def on_test_start(self) -> None:
        """See `prepare_outside` and `check_weights`."""
        self.prepare_outside()
        self.check_weights()

    def on_predict_start(self) -> None:
        """See `prepare_outside` and `check_weights`."""
        self.prepare_outside()
        self.check_weights()

    def on_train_start(self) -> None:
        """End a fit that has nothing to train: what is fitted by statistics is ready by now."""
        resume.place_loaders(self.trainer)
        if not any(p.requires_grad for p in self.parameters()):
            self.trainer.should_stop = True

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        """Skip the epoch if there is nothing to train."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            resume.number_steps(self.trainer)
            self._before_window = {k: v.detach().clone() for k, v in self.moving().items()}
        return -1 if self.trainer.should_stop and not self.trainer.optimizers else None

    def moving(self) -> dict[str, Tensor]:
        """What every batch changes, not only every optimizer step, by its name in `state_dict`."""
        return {}

    def on_bad_step(self, step: BadStep) -> str:
        """Undo what the batches of a dropped step changed, and say what was wrong with them (see `callbacks.non_finite.Examines`)."""
        examination.restore(self, self._before_window)
        return dump.account(self, step)

    def statistics_of(self, batch: Any) -> dict[str, dict[str, Tensor]]:
        """What tells where a training batch is extreme: `blocks`, a number per block by name, and `samples`, one per sample; or nothing."""
        return {}

    def on_train_end(self) -> None:
        """Write the artifact."""
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.artifact is None:
            rank_zero_info("No artifact was written: set model.artifact, or run `srcflow export` on a checkpoint.")
        else:
            artifact.write(self, self.artifact)

    # --- random numbers and batches ----------------------------------------------------------------------------------------------

    def images_from(self, batch: Batch) -> Tensor:
        """Images (B, 3, H, W) float32 in [0, 1] of a batch.

        Raises:
            ConfigError: the batch has none, or of another size than the autoencoder's.
        """
        if "images" not in batch:
            raise ConfigError("data", "features only", f"{type(self).__name__} needs the images too.", "Use data.with_images: true.")
        codec = self.codec_of_run()
        if isinstance(codec, Autoencoder):
            image_sizes.check_images(tuple(batch["images"].shape[-2:]), codec)
        return batch["images"].to(self.device).float().div_(255)

    def features_of(self, batch: Batch) -> Features:
        """Raw features of a batch, at least float32, on the task's device: stored ones where the batch has them.

        Raises:
            ConfigError: the batch has neither features nor images.
        """
        source: dict[str, Any] = {k: v.to(self.device) if isinstance(v, Tensor) and k != "indices" else v for k, v in batch.items()}
        if "features" not in batch:
            source["images"] = self.images_from(batch)
        return self.chain.features(source)

    @property
    def chain(self) -> Codec:
        """The parts that turn a batch into codes; stages define it."""
        return Codec(cast(Autoencoder, self.codec_of_run()), None, None, self.seed)

    def epoch_of(self, step: int | None) -> int | None:
        """Key of a draw from a posterior: the epoch in training (`step` None), else the number of the draw (None: see `Codec`)."""
        return self.current_epoch if step is None else None

    def training_batches(self, limit: int | None = None, *, augmented: bool = True) -> Iterator[Batch]:
        """Batches of the training set on the device, before training starts: for statistics. Every rank gets its own share.

        Args:
            limit: how many batches over all ranks, as training draws them; None: all.
            augmented: without a limit: whether images are cropped and mirrored as in training, or each is seen once as it is.
        """
        source = cast(Any, self.trainer).datamodule
        world, rank = self.trainer.world_size, self.trainer.global_rank
        if isinstance(source, DataModule) and limit is None and not augmented:
            loader: Any = source.loader("train")
        elif source is not None:
            loader = source.train_dataloader()
        else:
            loader = self.trainer.fit_loop._data_source.dataloader()
        sampler = getattr(loader, "sampler", None)  # ours give every rank a share
        shared = isinstance(sampler, DistributedSampler) or getattr(sampler, "shares_ranks", False)
        position = loader.state_dict() if isinstance(loader, Resumable) else {}
        try:
            for i, batch in enumerate(loader):
                if limit is not None and (i * world + rank if shared else i) >= limit:
                    return
                if shared or i % world == rank:
                    yield cast(Batch, self.trainer.strategy.batch_to_device(batch, self.device, 0))
        finally:  # training may be given the same loader
            if isinstance(loader, Resumable):
                loader.load_state_dict(position)

    # --- averaged weights --------------------------------------------------------------------------------------------------------

    @property
    def ema(self) -> EMA | None:
        """The trainer's EMA callback."""
        if self._trainer is None:
            return None
        return next((c for c in cast(Any, self._trainer).callbacks if isinstance(c, EMA)), None)

    @contextmanager
    def evaluation_weights(self) -> Iterator[None]:
        """The module holds the weights that `weights` asks for inside this block (during fit: the average, unless "raw")."""
        use = self.ema if self.weights == "ema" and self.trainer.training else None
        with use.averaged(self) if use is not None else nullcontext():
            yield

    @property
    def evaluated_weights(self) -> Weights:
        """Which weights an evaluation sees: "raw" also where no average was kept."""
        if self.weights == "raw":
            return "raw"
        return "ema" if self._evaluated == "ema" or (self.ema is not None and self.ema.updates > 0) else "raw"

    # --- checkpoints and artifacts -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what an artifact's manifest needs, and both sets of weights to a weights-only file too (Lightning asks no callback then).

        What is saved in the middle of a step (of several batches, when gradients are accumulated) is the end of the step before.
        """
        if self.ema is not None:
            self.ema.write(self, checkpoint)
        if resume.rewind(self.trainer, checkpoint):
            state = checkpoint.get("state_dict", {})
            state.update({k: v for k, v in self._before_window.items() if k in state})
        checkpoint[FACTS] = self.facts()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that would be silently misused.

        Raises:
            ConfigError: training would go on from averaged weights because the EMA callback is missing.
            ForeignCheckpointError: it is of another task, or of another size.
            ManifestMismatchError: the checkpoint was built on other artifacts.
        """
        if checkpoint.get("state_dict") and not examination.is_sharded(self):  # which has loaded the state by now
            refuse_foreign(self, checkpoint, getattr(self._trainer, "ckpt_path", None) or "the checkpoint")
        resume.settle(checkpoint)
        self._evaluated = "ema" if RAW_STATE in checkpoint else "raw"
        fitting = self._trainer is not None and self._trainer.state.fn == "fit"
        if fitting and RAW_STATE in checkpoint and self.ema is None:
            raise ConfigError(
                "trainer.callbacks",
                "no EMA",
                "the checkpoint's weights are an average; training would go on from it.",
                "Add the EMA callback.",
            )
        stored = checkpoint.get(FACTS, {}).get("built_on", {})
        differing = {
            f"{role}.hash": (was["hash"], self._built_on[role]["hash"])
            for role, was in stored.items()
            if role in self._built_on and was["hash"] != self._built_on[role]["hash"]
        }
        if differing:
            raise ManifestMismatchError("the checkpoint", differences=cast(Any, differing), cure="Name the artifacts it was trained on.")
        if not fitting and self.weights == "raw":
            self._raw_state = checkpoint.get(RAW_STATE)

    def facts(self) -> dict[str, Any]:
        """What is recorded of a run in checkpoints and artifacts: JSON-able."""
        datamodule: Any = getattr(self._trainer, "datamodule", None)
        return {
            "task": type(self).__name__,
            "steps": self.global_step,
            "seed": self.seed,
            "data": datamodule.fingerprint() if hasattr(datamodule, "fingerprint") else None,
            "built_on": dict(self._built_on),
        }

    # --- evaluation ----------------------------------------------------------------------------------------------------------------

    def protocol(self, **more: Any) -> dict[str, Any]:
        """How numbers were obtained: goes into metrics.json beside them."""
        facts = self.facts()
        return {
            "task": facts["task"],
            "weights": self.evaluated_weights,
            "checkpoint": str(self.trainer.ckpt_path) if self.trainer.ckpt_path else None,
            "precision": str(self.trainer.precision),
            "seed": self.seed,
            "data": facts["data"],
            "built_on": {role: b["hash"] for role, b in facts["built_on"].items()},
            "srcflow": srcflow.__version__,
            "revision": artifacts.revision(),
            "torch": str(torch.__version__),
            "command": " ".join(sys.argv),
            **more,
        }

    def report(self, numbers: Mapping[str, Any], protocol: Mapping[str, Any], title: str) -> None:
        """Print the one table of a test, write metrics.json, and hand the numbers to the loggers as `test/...`; on rank zero only.

        Raises:
            DataError: metrics.json cannot be written; the numbers have been printed.
        """
        if not self.trainer.is_global_zero:
            return
        print(table(numbers, title), flush=True)  # first: nothing that fails later takes the numbers away
        print(f"  {write_metrics(self.metrics_path(), numbers, protocol)}")
        scalars = {f"test/{k}": float(v) for k, v in numbers.items() if isinstance(v, int | float)}
        for logger in self.loggers:
            logger.log_metrics(scalars, step=self.global_step)

    def metrics_path(self) -> Path:
        """Where the numbers of a test go."""
        return Path(self.metrics_file) if self.metrics_file is not None else Path(self.trainer.default_root_dir) / "metrics.json"
