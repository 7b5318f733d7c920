"""Checkpoints that survive what happens to a run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from srcflow.callbacks import checkpoint_files
from srcflow.callbacks.checkpoint_files import SUFFIX, CheckpointFiles
from srcflow.callbacks.stop_signals import StopSignals
from srcflow.errors import CheckpointError, ConfigError, StoppedError


class Checkpoints(ModelCheckpoint):
    """Writes `step-N.ckpt` every so many steps, at the end of training, and when a signal asks the run to stop.

    A file has its name only once it is whole. `last.ckpt` is a link to the one written last, and `--ckpt_path last` goes on from it, or
    starts afresh where there is none. On SIGTERM, SIGUSR1 or an interrupt from the keyboard, all ranks finish the same optimizer step,
    write a checkpoint and end with status 75 (130 for the keyboard), so that the same command goes on from there; on SLURM's warning
    (SIGUSR1) the job is requeued, too, unless Lightning's SLURMEnvironment has `auto_requeue: false`.

    For the best by a metric, add Lightning's ModelCheckpoint as well.

    Args:
        dirpath: folder of the files; null: `checkpoints` in trainer.default_root_dir.
        every_n_steps: optimizer steps between two files; null: one at the end of each epoch.
        keep: how many of the newest stay.
        keep_every_n_steps: those whose step is a multiple of this stay for good; null: none.

    Raises:
        ConfigError: numbers that cannot be.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_steps: int | None = None,
        keep: int = 2,
        keep_every_n_steps: int | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigError("every_n_steps", every_n_steps, "must be at least 1.", "Write null for the end of each epoch.")
        if keep < 1:
            raise ConfigError("keep", keep, "must be at least 1.")
        if keep_every_n_steps is not None and (every_n_steps is None or keep_every_n_steps < 1 or keep_every_n_steps % every_n_steps):
            raise ConfigError("keep_every_n_steps", keep_every_n_steps, f"is no multiple of every_n_steps = {every_n_steps}.")
        super().__init__(dirpath, save_top_k=-1, save_last="link", enable_version_counter=False)
        self.every_n_steps, self.keep, self.keep_every_n_steps = every_n_steps, keep, keep_every_n_steps
        self.signals = StopSignals()
        self._saved: int | None = None  # the step of the last file
        self._step = 0  # of the last batch

    # --- Lightning's hooks -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Find the folder, and see to it that files are written whole.

        Raises:
            ConfigError: something else writes the files later than it is asked to.
        """
        self.dirpath = trainer.strategy.broadcast(str(self.folder(trainer)))
        io = trainer.strategy.checkpoint_io
        if isinstance(io, AsyncCheckpointIO):
            raise ConfigError("trainer.plugins", "AsyncCheckpointIO", "last.ckpt would name files that are not yet whole.", "Leave it out.")
        if type(io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()
        if stage == "fit" and trainer.is_global_zero:
            checkpoint_files.sweep(Path(self.dirpath))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse to begin anew where checkpoints are.

        Raises:
            ConfigError: a run starts afresh among the files of another, which it would remove one by one.
        """
        there = trainer.strategy.broadcast([p.name for p in self.written()])
        if there and trainer.ckpt_path is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ConfigError(
                "ckpt_path",
                None,
                f"{self.dirpath} holds {there[-1]} of an earlier start, and this one would begin at step 0.",
                "Go on from it: --ckpt_path last. To begin anew, remove that folder or name another.",
            )

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note signals from here on."""
        self._listen(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note signals from here on."""
        self._listen(trainer)
        self._saved, self._step = None, trainer.global_step

    def _listen(self, trainer: L.Trainer) -> None:
        if trainer.state.fn == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            slurm = self._slurm(trainer)
            if slurm is not None and slurm.requeue_signal is not None:
                self.signals.numbers = tuple({*self.signals.numbers, slurm.requeue_signal})
                self.signals.counts = slurm.requeue_signal
            self.signals.install()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write a checkpoint if one is due, and stop if that was asked for.

        Raises:
            StoppedError: on all ranks, behind the checkpoint.
        """
        step = trainer.global_step
        if step == self._step or trainer.fast_dev_run:  # type: ignore[attr-defined]  # inside a step of several batches
            return
        self._step = step
        if self.every_n_steps is not None and step % self.every_n_steps == 0:
            self.save(trainer)
        signum = self.signals.agreed(trainer)
        if signum and step != trainer.max_steps:
            self.save(trainer)
            requeued = signum == self._requeue_signal(trainer) and self._requeue(trainer)
            way = "the job is queued again and" if requeued else "--ckpt_path last"
            raise StoppedError(signum, f"at step {step}; {way} goes on from {self.path(step)}.")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write a checkpoint, unless steps say when."""
        if self.every_n_steps is None and trainer.global_step > 0:
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Nothing: see the steps."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the last checkpoint. What is written of the result after it is not interrupted by signals."""
        self.save(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        self.signals.restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back. Nothing is written: weights may be half-way through a step, and other ranks may be gone."""
        self.signals.restore()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the folder says what there is."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""

    # --- writing ---------------------------------------------------------------------------------------------------------------

    def path(self, step: int) -> Path:
        """The file of a step."""
        return Path(str(self.dirpath)) / f"step-{step}{SUFFIX}"

    def save(self, trainer: L.Trainer) -> None:
        """Write the checkpoint of this step, if it is not there yet; to be called on every rank.

        Raises:
            CheckpointError: it cannot be written, e.g. because the disk is full.
        """
        step = trainer.global_step
        if step == self._saved or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        place, strategy = self.path(step), trainer.strategy
        shards = isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint
        written = checkpoint_files.hidden(place) if shards else place
        trainer.save_checkpoint(written, weights_only=False)  # all ranks leave it together
        if trainer.is_global_zero:
            if shards:
                checkpoint_files.replace(written, place)
            checkpoint_files.link(place.with_name(f"{self.CHECKPOINT_NAME_LAST}{SUFFIX}"), place)
            self._thin_out(place)
        self._saved = step
        self.best_model_path = self._last_checkpoint_saved = str(place)  # what Lightning's ckpt_path="best" and loggers ask for
        self.last_model_path = str(place.with_name(f"{self.CHECKPOINT_NAME_LAST}{SUFFIX}"))

    def _thin_out(self, newest: Path) -> None:
        older = sorted((p for p in self.written() if p != newest), key=lambda p: p.stat().st_mtime_ns)
        for path in older[: max(len(older) - (self.keep - 1), 0)]:
            if self.keep_every_n_steps is None or _step_of(path) % self.keep_every_n_steps:
                checkpoint_files.remove(path)

    def written(self) -> list[Path]:
        """The files of steps, by step."""
        found = [p for p in Path(str(self.dirpath)).glob(f"step-*{SUFFIX}") if _step_of(p) >= 0]
        return sorted(found, key=_step_of)

    # --- going on --------------------------------------------------------------------------------------------------------------

    def folder(self, trainer: L.Trainer) -> Path:
        """Where the files are."""
        return Path(self.dirpath) if self.dirpath is not None else Path(trainer.default_root_dir) / "checkpoints"

    def last(self, trainer: L.Trainer) -> Path | None:
        """What `--ckpt_path last` stands for: last.ckpt, or else the file written last."""
        folder = self.folder(trainer)
        link = folder / f"{self.CHECKPOINT_NAME_LAST}{SUFFIX}"
        files = sorted(folder.glob(f"step-*{SUFFIX}"), key=lambda p: p.stat().st_mtime_ns)
        return link if link.exists() else files[-1] if files else None

    def _find_last_checkpoints(self, trainer: L.Trainer) -> set[str]:
        """Lightning asks this for `last`.

        Raises:
            CheckpointError: it is damaged, or there is none to evaluate.
        """
        last = self.last(trainer)
        if last is not None:
            checkpoint_files.check(last)
            return {str(last)}
        if trainer.state.fn != "fit":
            raise CheckpointError(f"--ckpt_path last: there is no checkpoint in {self.folder(trainer)}.")
        return set()

    # --- SLURM -----------------------------------------------------------------------------------------------------------------

    def _slurm(self, trainer: L.Trainer) -> SLURMEnvironment | None:
        environment = trainer._accelerator_connector.cluster_environment
        return environment if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None

    def _requeue_signal(self, trainer: L.Trainer) -> int | None:
        slurm = self._slurm(trainer)
        return slurm.requeue_signal if slurm is not None else None

    def _requeue(self, trainer: L.Trainer) -> bool:
        """Ask SLURM to start the job again; whether it will."""
        job = os.environ.get("SLURM_JOB_ID", "")
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        done = False
        if trainer.is_global_zero:
            try:
                done = subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0
            except OSError as e:
                rank_zero_warn(f"scontrol could not be run: {e}.")
            rank_zero_info(f"SLURM job {job} {'is' if done else 'could not be'} requeued.")
        return bool(trainer.strategy.broadcast(done))


def _step_of(path: Path) -> int:
    """The step of a file by its name, -1 for another name."""
    number = path.name.removeprefix("step-").removesuffix(SUFFIX)
    return int(number) if number.isdecimal() else -1
