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
from srcflow import artifacts, registry
from srcflow.callbacks import checkpoint_files
from srcflow.callbacks.checkpoints import Checkpoints
from srcflow.cli import ranks, run_lock
from srcflow.errors import ArtifactError, ManifestMismatchError, SrcflowError
from srcflow.tasks import artifact, checkpoint
from srcflow.tasks.base import Task

FILE, FORMAT = "run.json", 1
COLLECTIVE = re.compile("gloo|nccl|connection|peer|timed out", re.IGNORECASE)
"""What torch's error says if a collective failed."""
TRAINER = ("max_steps", "max_epochs", "precision", "limit_train_batches", "overfit_batches")
"""Keys of `trainer` that belong to what a run is; besides them, the EMA among its callbacks."""
MODEL_FREE = (
    "artifact",
    "metrics_file",
    "weights",
    "evaluation",
    "guidance",
    "solver",
    "temperature",
    "initial",
    "checkpoint_every",
    "compile_layers",
)
"""Options of a task that do not: where and how it is evaluated, written and computed, and weights that a checkpoint replaces."""
MODEL_PLACES = ("codec", "autoencoder")
"""Options that name an earlier stage's directory, where they are a path: its content counts, not its place."""
LATER = ("data.content", "built_on")
"""What is known of a run only once its data and artifacts are open."""
DATA_FREE = ("batch_size", "num_workers", "index", "start_method", "max_bad_fraction")
"""Options of a datamodule that do not; the global batch counts instead of `batch_size`, the data instead of their place."""
EARLIER = {"data.init_args.exif": "ignore", "data.content.transform.exif": "ignore"}
"""What was done before there were these options, which older records lack."""
OPTIMIZATION_FREE = ("max_bad_steps", "dump_bad_steps")
"""Options of a task's `optimization` that do not."""


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
                    for line in _complete(record["identity"], self._identity or {}):
                        rank_zero_warn(f"{line} It continues with the new value; add the old one to keep everything as it was.")
                    same = record["starts"][-1]["srcflow"] == srcflow.__version__
                    found = differences(record["identity"], self._identity or {}, one_sided=same)
                    found = {k: v for k, v in found.items() if not (v[1] is None and k in LATER)}
            except ArtifactError as e:
                found = str(e)
            except (KeyError, IndexError, TypeError) as e:
                found = f"{path} lacks what it should hold ({type(e).__name__}: {e}). Move it away to start without a history."
        found = trainer.strategy.broadcast(found)
        if isinstance(found, str):
            raise ArtifactError(found)
        if found:
            cure = "Name another trainer.default_root_dir, or add --change_config true to go on with these changes."
            raise ManifestMismatchError(str(path.parent), found, cure)


# --- what makes a run ---------------------------------------------------------------------------------------------------------------


def identity(config: Mapping[str, Any], trainer: Any) -> dict[str, Any]:
    """What must stay the same between two starts of one run: model, optimisation and data, but not how and where they are computed.

    Args:
        config: the resolved configuration of `fit`.
        trainer: for the number of ranks and the datamodule.
    """
    model, settings = dict(config["model"]), config["trainer"]
    options = model.get("init_args") or {}
    model["init_args"] = {k: v for k, v in options.items() if k not in MODEL_FREE and not (k in MODEL_PLACES and isinstance(v, str | None))}
    if isinstance(optimization := model["init_args"].get("optimization"), Mapping):
        model["init_args"]["optimization"] = {k: v for k, v in optimization.items() if k not in OPTIMIZATION_FREE}
    data = dict(config.get("data") or {})
    module = trainer.datamodule
    places = [p for p in (module.place(s) for s in ("train", "val", "test")) if p is not None] if hasattr(module, "place") else []
    options = data.get("init_args") or {}
    data["init_args"] = {k: v for k, v in options.items() if k not in DATA_FREE and v not in places and not (v is None and "path" in k)}
    batch = getattr(module, "batch_size", None)
    data["global_batch"] = None if batch is None else batch * trainer.world_size * trainer.accumulate_grad_batches
    callbacks = settings.get("callbacks") or []
    averages = [c for c in (callbacks if isinstance(callbacks, list) else [callbacks]) if str(c.get("class_path")).endswith(".EMA")]
    kept = {"seed_everything": config.get("seed_everything"), "model": model, "data": data}
    kept["trainer"] = {**{k: settings.get(k) for k in TRAINER}, "ema": [c.get("init_args") for c in averages]}
    return dict(json.loads(json.dumps(kept)))


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


def differences(stored: Any, wanted: Any, key: str = "", *, one_sided: bool = True) -> dict[str, tuple[Any, Any]]:
    """Where two configurations differ: dotted key -> (stored, wanted).

    Args:
        stored: the one.
        wanted: the other.
        key: where both stand.
        one_sided: whether a key that only one has is a difference.

    >>> differences({"a": {"b": 1, "c": [2]}}, {"a": {"b": 3, "c": [2]}, "d": None})
    {'a.b': (1, 3)}
    """
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        names = dict.fromkeys([*stored, *wanted])
        found: dict[str, tuple[Any, Any]] = {}
        for name in names if one_sided else (n for n in names if n in stored and n in wanted):
            found.update(differences(stored.get(name), wanted.get(name), f"{key}.{name}" if key else name, one_sided=one_sided))
        return found
    if isinstance(stored, list) and isinstance(wanted, list) and len(stored) == len(wanted):
        found = {}
        for i, (a, b) in enumerate(zip(stored, wanted, strict=True)):
            found.update(differences(a, b, f"{key}.{i}", one_sided=one_sided))
        return found
    if key.rpartition(".")[2] == "class_path" and isinstance(stored, str) and isinstance(wanted, str):
        return {} if registry.canonical(stored) == registry.canonical(wanted) else {key: (stored, wanted)}
    return {} if stored == wanted else {key: (stored, wanted)}


def _complete(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Add to `stored` what older records lack (`EARLIER`), where the run in hand has it.

    Returns:
        a line for each option of the run in hand that does something else than the run did before there was a choice.
    """
    lines = []
    for key, value in EARLIER.items():
        *path, name = key.split(".")
        both: list[Any] = [stored, wanted]
        for part in path:
            both = [d.get(part) if isinstance(d, Mapping) else None for d in both]
        if isinstance(both[0], dict) and isinstance(both[1], Mapping) and name in both[1] and name not in both[0]:
            both[0][name] = both[1][name]
            if both[1][name] != value and "init_args" in path:
                lines.append(f"{key} = {both[1][name]!r}: this run began before there was a choice, with what is now {value!r}.")
    return lines


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
        raise ArtifactError(f"{path} is no record of format {FORMAT}: {found}. Move it away to start without a history.")
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
