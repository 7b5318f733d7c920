"""What a run directory says it is: `run.json` in trainer.default_root_dir, with the run's configuration and every start of it."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

import srcflow
from srcflow import artifacts
from srcflow.callbacks import checkpoint_files
from srcflow.callbacks.checkpoints import Checkpoints
from srcflow.cli import ranks, run_lock
from srcflow.cli.run_identity import LATER, complete, differences, essential, identity
from srcflow.errors import ArtifactError, ManifestMismatchError, SrcflowError
from srcflow.tasks import artifact, checkpoint
from srcflow.tasks.base import Task

FILE, FORMAT = "run.json", 1
COLLECTIVE = re.compile("gloo|nccl|connection|peer|timed out", re.IGNORECASE)
"""What torch's error says if a collective failed."""


class RunTrainer(L.Trainer):
    """Lightning's Trainer; `fit` starts afresh where there is nothing to go on from, and takes `change_config`."""

    def fit(  # type: ignore[override]
        self,
        model: L.LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        change_config: bool = False,
    ) -> None:
        """Run the full optimization routine.

        Args:
            model: the task.
            train_dataloaders: instead of a datamodule.
            val_dataloaders: instead of a datamodule.
            datamodule: the data.
            ckpt_path: checkpoint to go on from, or "last" for the newest of this run, if there is one.
            change_config: let this start differ from the earlier ones in trainer.default_root_dir; the difference is recorded there.

        Raises:
            RunningError: another start in trainer.default_root_dir still runs.
            ConfigError: nothing can be written there.
        """
        with self._locked():
            self._fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path)

    def _locked(self) -> AbstractContextManager[None]:
        """The lock of a configured run directory; ranks of one run share it, so only the first takes it."""
        record = next((c for c in cast(Any, self).callbacks if isinstance(c, RunRecord)), None)
        folder = record.config.get("trainer.default_root_dir") if record is not None else None
        if folder is None or not self.is_global_zero:
            return nullcontext()
        artifacts.check_writable(folder, "trainer.default_root_dir", directory=True)
        return run_lock.held(Path(folder))

    def _fit(self, model: L.LightningModule, train: Any, val: Any, datamodule: L.LightningDataModule | None, ckpt_path: str | None) -> None:
        ours = [c for c in self.checkpoint_callbacks if isinstance(c, Checkpoints)]
        if ckpt_path == "last" and len(ours) == len(self.checkpoint_callbacks) and not any(c.last(self) for c in ours):
            rank_zero_info(f"--ckpt_path last: no checkpoint in {', '.join(str(c.folder(self)) for c in ours)} yet; this is a fresh start.")
            ckpt_path = None
        super().fit(model, train, val, datamodule, ckpt_path, weights_only=True)

    def _run(self, model: L.LightningModule, ckpt_path: Any = None, weights_only: bool | None = None) -> Any:
        """As Lightning, for all four commands; a checkpoint of something else is refused before data and artifacts are opened."""
        if isinstance(model, Task) and ckpt_path is not None and "://" not in str(ckpt_path):
            checkpoint.check(model, Path(ckpt_path), fitting=self.state.fn == "fit")
        return super()._run(model, ckpt_path=ckpt_path, weights_only=weights_only)

    def _run_stage(self) -> Any:
        """As Lightning; a run that was stopped between its last step and its artifact, and has no step left, still writes that."""
        result = super()._run_stage()
        task = self.lightning_module
        wanted = task.artifact if isinstance(task, Task) and self.state.fn == "fit" and not self.fast_dev_run else None  # type: ignore[attr-defined]
        if wanted is not None and self.global_step > 0 and self.strategy.broadcast(artifact.steps_of(wanted)) != self.global_step:
            task = cast(Task, task)
            if task.ema is not None:
                task.ema.on_train_start(self, task)  # weights and average as they were at the end
            artifact.write(task, wanted)
        return result


class RunRecord(SaveConfigCallback):
    """Keeps `run.json`, and refuses a start that is another run than the directory's. Writes config.yaml beside the logs, as its base.

    Nothing is kept or refused where no trainer.default_root_dir is configured.
    """

    _identity: dict[str, Any] | None = None
    _config: dict[str, Any]
    _recorded = False
    _changing = False

    # --- Lightning's hooks -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse another configuration than the directory's before anything in it is touched.

        Raises:
            ManifestMismatchError: names every key that differs, with both values.
            ArtifactError: run.json is damaged.
        """
        # allowed for this start only, and no option of the other commands that read config.yaml
        self._changing = bool(self.config.pop("change_config", False))
        if stage == "fit" and self.config.get("trainer.default_root_dir") is not None:
            self._config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            self._identity = identity(self._config, trainer)
            self._compare(trainer)
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse other data and other artifacts.

        Raises:
            ManifestMismatchError: names them.
        """
        if self._identity is not None:
            facts = json.loads(json.dumps(pl_module.facts())) if isinstance(pl_module, Task) else {}
            self._identity["data"]["content"] = (facts.get("data") or {}).get("train")
            self._identity["built_on"] = {role: was["hash"] for role, was in facts.get("built_on", {}).items()}
            self._compare(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record this start."""
        if self._identity is None or not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / FILE
        record = read(path) or {"format": FORMAT, "identity": {}, "config": self._config, "starts": []}
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": shlex.join(["srcflow", *sys.argv[1:]]),
            "step": trainer.global_step,
            "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            **environment(trainer),
            "changed": {k: list(v) for k, v in differences(record["config"], self._config).items()},
        }
        record["starts"].append(start)
        record.update(identity=self._identity, config=self._config)
        write(path, record)
        self._recorded = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that it is done."""
        self._end(trainer, "finished")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Record why it ended; that another rank has gone becomes the cause of an error that knows none."""
        if isinstance(exception, RuntimeError) and exception.__cause__ is None and COLLECTIVE.search(str(exception)):
            exception.__cause__ = ranks.lost(getattr(trainer.strategy.launcher, "procs", []))
        reason = exception.__cause__ if isinstance(exception.__cause__, SrcflowError) else exception
        self._end(trainer, f"{type(reason).__name__}: {reason}"[:1000])

    def _end(self, trainer: L.Trainer, how: str) -> None:
        path = Path(trainer.default_root_dir) / FILE
        if self._recorded and (record := read(path)):
            record["starts"][-1]["ended"] = {"step": trainer.global_step, "how": how}
            write(path, record)

    def _compare(self, trainer: L.Trainer) -> None:
        found: Any = None
        path = Path(trainer.default_root_dir) / FILE
        if trainer.is_global_zero:
            try:
                record = None if self._changing else read(path)
                if record is not None:
                    stored = essential(record["identity"])
                    for line in complete(stored, self._identity or {}):
                        rank_zero_warn(f"{line} It continues with the new value; add the old one to keep everything as it was.")
                    same = record["starts"][-1]["srcflow"] == srcflow.__version__
                    found = differences(stored, self._identity or {}, one_sided=same)
                    found = {k: v for k, v in found.items() if not (v[1] is None and k in LATER)}
            except ArtifactError as e:
                found = str(e)
            except (KeyError, IndexError, TypeError, AttributeError) as e:
                found = f"{path} lacks what it should hold ({type(e).__name__}: {e}). Move it away to start without a history."
        found = trainer.strategy.broadcast(found)
        if isinstance(found, str):
            raise ArtifactError(found)
        if found:
            cure = "Name another trainer.default_root_dir, or add --change_config true to go on with these changes."
            raise ManifestMismatchError(str(path.parent), found, cure)


# --- what it runs with -------------------------------------------------------------------------------------------------------------


def environment(trainer: L.Trainer) -> dict[str, Any]:
    """What the run runs with: versions, revision, machine, devices, ranks."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "srcflow": srcflow.__version__,
        "revision": artifacts.revision(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lightning": L.__version__,
        "host": platform.node(),
        "device": f"{device.type} ({name})",
        "ranks": trainer.world_size,
        "nodes": trainer.num_nodes,
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
    }


# --- the file -----------------------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any] | None:
    """The record, or None if there is none.

    Raises:
        ArtifactError: it cannot be read.
    """
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise ArtifactError(f"{path} cannot be read: {e}. Move it away to start without a history.") from e
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = f"it has format {record['format']!r}" if isinstance(record, dict) and "format" in record else "it holds something else"
        raise ArtifactError(f"{path} is not a record of format {FORMAT}: {found}. Move it away to start without a history.")
    return record


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write the record in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{checkpoint_files.PARTIAL}")
    with partial.open("w") as f:
        f.write(json.dumps(record, indent=1) + "\n")
        f.flush()
        os.fsync(f.fileno())
    checkpoint_files.replace(partial, path)
