"""Exponential moving averages of the trained parameters, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from srcflow.callbacks import checkpoint_files
from srcflow.callbacks.averages import AVERAGES, SUFFIX, averages_of, write_snapshot
from srcflow.callbacks.non_finite import step_was_skipped
from srcflow.errors import ArtifactError, ConfigError, Problems

RAW_STATE = "raw_state"
"""Key of a checkpoint under which the trained (not averaged) values of the averaged parameters stand."""


class EMA(L.Callback):
    """Keeps a moving average of the trainable parameters; validation, sampling, checkpoints and artifacts use it.

    Buffers and frozen parameters are not averaged. A checkpoint's `state_dict` holds the averaged weights, so `test --ckpt_path` evaluates
    them with or without this callback, and its `raw_state` holds the trained ones, from which a resumed run goes on. After fit the module
    itself holds the trained weights. Works under one process, DDP and FSDP2 (ModelParallelStrategy), where the average is sharded as the
    weights are.

    Of several averages the first is the one evaluated; the others are in the checkpoint too, and `srcflow export --ema DECAY` writes the
    artifact of one. A run that goes on with a decay its checkpoint does not know starts that average from the checkpoint's first.

    Args:
        decay: weight of the old average at every step, e.g. 0.9999; or a list of several.
        warmup: shorten the memory at the start: the decay is at most (1 + n) / (10 + n) after n steps.
        snapshot_every: keep every average's weights after every so many optimizer steps, as files that `srcflow export --ckpt_path`
            takes; null: none. A file that is there is not written again.
        snapshots: directory of these files; null: snapshots in trainer.default_root_dir.
    """

    def __init__(
        self, decay: float | list[float] = 0.9999, warmup: bool = True, snapshot_every: int | None = None, snapshots: str | None = None
    ) -> None:
        self.decays = list(decay) if isinstance(decay, list | tuple) else [decay]
        problems = Problems()
        for value in self.decays:
            if not 0 <= value < 1:
                problems.add(ConfigError("ema.decay", value, "must lie in [0, 1)."))
        if not self.decays or len(set(self.decays)) < len(self.decays):
            problems.add(ConfigError("ema.decay", decay, "is empty or names one decay twice."))
        if snapshot_every is not None and snapshot_every < 1:
            problems.add(ConfigError("ema.snapshot_every", snapshot_every, "must be at least 1.", "Write null for no snapshots."))
        if snapshots is not None and snapshot_every is None:
            problems.add(ConfigError("ema.snapshots", snapshots, "does nothing without snapshot_every."))
        problems.raise_if_any()
        self.warmup, self.snapshot_every, self.snapshots = warmup, snapshot_every, snapshots
        self.updates = 0
        self._shadows: list[dict[str, Tensor]] = []  # as `decays`
        self._backup: dict[str, Tensor] | None = None  # the trained weights while the module holds the average
        self._restored: tuple[dict[str, Tensor], list[dict[str, Tensor]]] | None = None
        self._step = 0

    # --- following the training ------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start from the present weights, or from both sets of a checkpoint."""
        parameters = trained(pl_module)
        if self._restored is not None:
            raw, averages = self._restored
            missing = sorted(set(parameters) - set(raw))
            if missing:
                raise ArtifactError(
                    f"{trainer.ckpt_path}: the checkpoint's {RAW_STATE} lacks {missing[:5]}{' ...' if missing[5:] else ''}."
                )
            # where the state_dict is sharded it is not at hand here, but the parameters were loaded from it
            self._shadows = [{k: like(a[k], p, wide=True) if k in a else _wide(p) for k, p in parameters.items()} for a in averages]
            _copy(raw, parameters)
            self._restored = None
        elif trainer.global_step == 0 or any(set(s) != set(parameters) for s in self._shadows or [{}]):
            self._shadows = [{k: _wide(p) for k, p in parameters.items()} for _ in self.decays]
            self.updates = 0
        self._step = trainer.global_step
        if self.snapshot_every is not None and trainer.is_global_zero:
            checkpoint_files.sweep(self._folder(trainer), SUFFIX)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Average, if the optimizer made a step; keep a snapshot, if it is time."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if not self.averaging:
            return
        if not step_was_skipped(trainer):
            self.updates += 1
            parameters = trained(pl_module)
            for decay, shadow in zip(self.decays, self._shadows, strict=True):
                decay = min(decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else decay
                torch._foreach_lerp_(
                    list(shadow.values()), [parameters[k].detach().to(s.dtype) for k, s in shadow.items()], weight=1 - decay
                )
        if self.snapshot_every is not None and self._step % self.snapshot_every == 0:
            self._keep(trainer, pl_module)

    @property
    def averaging(self) -> bool:
        """Whether there is an average, and of anything."""
        return bool(self._shadows and self._shadows[0])

    def _folder(self, trainer: L.Trainer) -> Path:
        """Where the snapshots are."""
        return Path(self.snapshots) if self.snapshots is not None else Path(trainer.default_root_dir) / "snapshots"

    def _keep(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the snapshots of this step that are not there yet.

        Raises:
            CheckpointError: one cannot be written, e.g. because the disk is full.
        """
        root, checkpoints = self._folder(trainer), Path(trainer.default_root_dir) / "checkpoints"
        for decay, shadow in zip(self.decays, self._shadows, strict=True):
            path = root / f"step-{self._step:08d}-ema-{decay}{SUFFIX}"
            if trainer.strategy.broadcast(path.exists()):  # gathering shards is a collective
                continue
            values = {**pl_module.state_dict(), **{name: shadow[owner] for name, owner in aliases(pl_module).items()}}
            state = _on_host(values, trainer.is_global_zero)
            if trainer.is_global_zero:
                facts: Any = getattr(pl_module, "facts", dict)  # a Task's
                write_snapshot(path, state, {"srcflow": facts(), "step": self._step, "ema": decay}, checkpoints)

    # --- using the average -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def swap_in(self, pl_module: L.LightningModule) -> None:
        """Put the average into the module (nothing happens if it is there already, or if there is none)."""
        if self._backup is None and self.averaging:
            parameters = trained(pl_module)
            self._backup = {k: p.detach().clone() for k, p in parameters.items()}
            for k, s in self._shadows[0].items():
                parameters[k].copy_(s)

    @torch.no_grad()
    def swap_out(self, pl_module: L.LightningModule) -> None:
        """Put the trained weights back."""
        if self._backup is not None:
            parameters = trained(pl_module)
            for k, p in self._backup.items():
                parameters[k].copy_(p)
            self._backup = None

    @contextmanager
    def averaged(self, pl_module: L.LightningModule) -> Iterator[None]:
        """The module holds the average inside this block."""
        outer = self._backup is not None
        self.swap_in(pl_module)
        try:
            yield
        finally:
            if not outer:
                self.swap_out(pl_module)

    def weights(self, pl_module: L.LightningModule, kind: Literal["ema", "raw"]) -> dict[str, Tensor]:
        """CPU copies of the averaged or trained values of the trainable parameters; gathered where sharded (call on every rank)."""
        if kind == "ema" and self.averaging:
            source: Mapping[str, Tensor] = self._shadows[0]
        else:
            source = self._backup if self._backup is not None else trained(pl_module)
        return {k: full(v).to("cpu", copy=True) for k, v in source.items()}

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the average, unless the task's `weights` says "raw"."""
        self._enter(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Back to the trained weights, after every `on_validation_epoch_end`."""
        self.swap_out(pl_module)

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the average of a fit that ended in this process; a checkpoint's weights are evaluated as they are."""
        self._enter(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Back to the trained weights."""
        self.swap_out(pl_module)

    def on_predict_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """As for a test."""
        self._enter(trainer, pl_module)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Back to the trained weights."""
        self.swap_out(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Back to the trained weights."""
        self.swap_out(pl_module)

    def _enter(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        fitting = trainer.state.fn == "fit"
        if getattr(pl_module, "weights", "ema") == "ema" and (fitting or trainer.ckpt_path is None):
            self.swap_in(pl_module)

    # --- checkpoints -----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The number of updates."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of updates."""
        self.updates = state_dict["updates"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write both sets of weights (see `write`)."""
        self.write(pl_module, checkpoint)

    def write(self, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Replace the averaged parameters in a checkpoint's `state_dict`, put their trained values under `raw_state`, and add `averages`.

        Runs on every rank (gathering shards is a collective); ranks that hold no `state_dict` write nothing.
        """
        if not self.averaging or RAW_STATE in checkpoint:
            return
        state: dict[str, Tensor] = checkpoint.get("state_dict", {})
        present = self._backup if self._backup is not None else trained(pl_module)
        sharded = any(isinstance(v, DTensor) for v in state.values())
        # rank zero's file has what is no state_dict, if sharded too; one parameter at a time, so that no GPU holds them all again
        keep = bool(state) and pl_module.trainer.is_global_zero
        raw = _on_host(present, keep)
        averaged = self._shadows[0] if sharded else _on_host(self._shadows[0], keep)
        names = aliases(pl_module).items()
        for name, owner in names if keep or sharded else ():
            if name in state:
                state[name] = averaged[owner].to(state[name].dtype)
        checkpoint[AVERAGES] = {"decays": list(self.decays), "further": [_on_host(s, keep) for s in self._shadows[1:]]}
        checkpoint[RAW_STATE] = raw  # empty on a rank that writes no file, which has to know, too, that this is done

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep both sets of weights until the training starts."""
        if trainer.state.fn == "fit" and RAW_STATE in checkpoint:
            raw = checkpoint[RAW_STATE]
            first = {k: v for k, v in checkpoint.get("state_dict", {}).items() if k in raw}
            known = {decay: state or first for decay, state in averages_of(checkpoint).items()}
            self._restored = raw, [known.get(decay, first) for decay in self.decays]
            for decay in set(self.decays) - set(known) if known else ():
                rank_zero_info(f"The checkpoint keeps no average of decay {decay}: it goes on from that of {next(iter(known))}.")


def _on_host(values: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """CPU copies of values, gathered one after another on every rank, kept only if wanted on this one."""
    found = {}
    for k, v in values.items():
        whole = full(v)
        if keep:
            found[k] = whole.to("cpu", copy=True)
    return found


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter that requires a gradient, by name, a shared one once; as shards where FSDP2 has sharded the module.

    FSDP2's root stays gathered after a forward without gradients: its parameters are then plain copies, and what is written to the shards
    would not be seen by the next forward. So it is resharded first.
    """
    for part in module.modules():
        if callable(reshard := getattr(part, "reshard", None)):
            reshard()
    return {k: p for k, p in module.named_parameters() if p.requires_grad}


def aliases(module: nn.Module) -> dict[str, str]:
    """Every name of every trained parameter -> the name `trained` knows it by."""
    names = {id(p): k for k, p in trained(module).items()}
    return {k: names[id(p)] for k, p in module.named_parameters(remove_duplicate=False) if id(p) in names}


def full(value: Tensor) -> Tensor:
    """A tensor of its own, gathered if it is sharded (a collective)."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def like(value: Tensor, parameter: Tensor, *, wide: bool = False) -> Tensor:
    """A copy of `value` on the device of `parameter`, sharded as it is."""
    dtype = torch.promote_types(parameter.dtype, torch.float32) if wide else parameter.dtype
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value.to(parameter.device, dtype), parameter.device_mesh, parameter.placements)
    return value.detach().to(parameter.device, dtype, copy=True)


@torch.no_grad()
def _copy(values: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    for k, p in parameters.items():
        p.copy_(like(values[k], p))


def _wide(p: Tensor) -> Tensor:
    return p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
