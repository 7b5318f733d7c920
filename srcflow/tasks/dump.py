"""A training step on disk: everything that `srcflow replay` needs to make it again. No pickles.

dump.json               what the step was; written last, so a directory that has it is complete
weights.safetensors     the task's state: trained (not averaged) weights and buffers
discriminator.safetensors   the heads of an adversarial loss (where there is one)
config.yaml             the resolved configuration of the run (where the command line made it)
rank0.json, rank1.json ...  per batch of the step: number, samples (index and name), and what it was like
rank0.safetensors ...       the batches' tensors, as the loader gave them
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

import srcflow
from srcflow import artifacts
from srcflow.callbacks.ema import full, trained
from srcflow.callbacks.non_finite import BadStep
from srcflow.errors import ArtifactError
from srcflow.tasks import examination
from srcflow.tasks.discriminator import Discriminator

if TYPE_CHECKING:
    from srcflow.tasks.base import Task

SUMMARY, WEIGHTS, HEADS, CONFIG = "dump.json", "weights.safetensors", "discriminator.safetensors", "config.yaml"
FORMAT = 1


@dataclass(frozen=True)
class DumpedBatch:
    """A batch of a dumped step: its rank, its number in the epoch, the batch itself, and what it was like in the run."""

    rank: int
    number: int
    batch: dict[str, Any]
    finding: examination.Finding


@dataclass(frozen=True)
class Dump:
    """A dump as it was read: `facts` of dump.json, the task's state, the discriminator's heads (or none), and the batches of all ranks."""

    path: Path
    facts: dict[str, Any]
    weights: dict[str, Tensor]
    heads: dict[str, Tensor]
    batches: list[DumpedBatch]

    @property
    def config(self) -> Path | None:
        """The run's configuration, if the dump has it."""
        return self.path / CONFIG if (self.path / CONFIG).exists() else None


def account(task: Task, step: BadStep) -> str:
    """Examine the batches of a dropped step, dump them if that is asked for, and say it in words. To be called on every rank."""
    name = examination.names_of(task)
    findings = [examination.attempt(task, batch, number) for batch, number in step.batches]
    found = max((examination.verdict(f, name) for f in findings), key=lambda v: v[0])
    text = f"{examination.worst(found)}."
    text = text[0].upper() + text[1:]
    if step.dump:
        path = Path(task.trainer.default_root_dir) / f"nonfinite-step{task.global_step:06d}"
        written = write(path, task, step, findings, name)
        text += f" Dumped; `srcflow replay {path}` makes the step again." if written else f" It could not be dumped to {path}."
    return text


def write(path: Path, task: Task, step: BadStep, findings: list[examination.Finding], name: Callable[[int], str]) -> bool:
    """Write a dump, replacing an older one; on every rank. Returns whether all could.

    Args:
        path: the directory.
        task: at the step.
        step: what was dropped.
        findings: what each of its batches is like.
        name: a sample's name by its index.
    """
    trainer = task.trainer
    strategy, rank, first = trainer.strategy, trainer.global_rank, trainer.is_global_zero
    trained(task)  # reshards what a forward has left gathered
    weights: dict[str, Tensor] = {}
    for k, v in task.state_dict().items():  # gathering shards is a collective
        whole = full(v)
        if first:
            weights[k] = whole.to("cpu")
    done = True
    if first:
        done = _tried(lambda: _clear(path))
    strategy.barrier("dump: made")
    done = done and _tried(lambda: _write_rank(path, rank, step, findings, name))
    if first and done:
        done = _tried(lambda: _write_common(path, task, weights))
    done = bool(strategy.reduce_boolean_decision(done, all=True))
    if first and done:
        done = _tried(lambda: _write_json(path / SUMMARY, _facts(task, step)))
    return bool(strategy.broadcast(done))


def read(path: str | os.PathLike[str]) -> Dump:
    """Read a dump.

    Raises:
        ArtifactError: there is none, it is of another format, or a file of it is missing or damaged.
    """
    root = Path(path)
    if not (root / SUMMARY).is_file():
        raise ArtifactError(f"{root} is no dump of a training step: it has no {SUMMARY}.")
    try:
        facts = unplain(json.loads((root / SUMMARY).read_text()))
        if facts["format"] != FORMAT:
            raise ArtifactError(f"{root} has format {facts['format']}; this version of srcflow reads {FORMAT}.")
        batches = [b for r in range(facts["world_size"]) for b in _read_rank(root, r)]
    except (OSError, ValueError, KeyError) as e:
        raise ArtifactError(f"{root} is damaged: {type(e).__name__}: {e}.") from e
    heads = artifacts.read_tensors(root / HEADS) if (root / HEADS).exists() else {}
    return Dump(root, facts, artifacts.read_tensors(root / WEIGHTS), heads, batches)


def plain(value: Any) -> Any:
    """A number that is not finite becomes its name, which strict JSON can hold; floats keep every bit."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def unplain(value: Any) -> Any:
    """The inverse of `plain`.

    >>> unplain(plain({"a": [0.1, float("-inf")]}))
    {'a': [0.1, -inf]}
    """
    if value in ("nan", "inf", "-inf"):
        return float(value)
    if isinstance(value, dict):
        return {k: unplain(v) for k, v in value.items()}
    return [unplain(v) for v in value] if isinstance(value, list) else value


def _clear(path: Path) -> None:
    if (path / SUMMARY).exists():
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)


def _write_rank(path: Path, rank: int, step: BadStep, findings: list[examination.Finding], name: Callable[[int], str]) -> None:
    path.mkdir(parents=True, exist_ok=True)  # on a node with a disk of its own
    tensors: dict[str, Tensor] = {}
    rows = []
    for i, ((batch, number), finding) in enumerate(zip(step.batches, findings, strict=True)):
        parts = batch if isinstance(batch, dict) else {}
        tensors.update({f"{i}.{k}": v for k, v in parts.items() if isinstance(v, Tensor)})
        rest = {k: v for k, v in parts.items() if not isinstance(v, Tensor)}
        names = [name(index) for index in finding.get("indices", [])]
        rows.append({"number": number, "rest": rest, "names": names, "backward": float(step.losses[i]), "finding": plain(finding)})
    artifacts.write_tensors(path / f"rank{rank}.safetensors", tensors)
    _write_json(path / f"rank{rank}.json", rows)


def _write_common(path: Path, task: Task, weights: dict[str, Tensor]) -> None:
    artifacts.write_tensors(path / WEIGHTS, weights)
    game = getattr(task, "discriminator", None)
    if isinstance(game, Discriminator):
        artifacts.write_tensors(path / HEADS, game.adversarial.state_dict())
    for callback in cast(Any, task.trainer).callbacks:
        parser, config = getattr(callback, "parser", None), getattr(callback, "config", None)
        if parser is not None and config is not None:  # Lightning's SaveConfigCallback, on every rank
            (path / CONFIG).write_text(parser.dump(config, skip_none=False))


def _facts(task: Task, step: BadStep) -> dict[str, Any]:
    trainer = cast(Any, task.trainer)
    return {
        "format": FORMAT,
        "srcflow": srcflow.__version__,
        "revision": artifacts.revision(),
        "torch": str(torch.__version__),
        "task": type(task).__name__,
        "step": task.global_step,
        "epoch": task.current_epoch,
        "seed": task.seed,
        "total_steps": task.total_steps,
        "log_every_n_steps": trainer.log_every_n_steps,
        "world_size": trainer.world_size,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "precision": str(trainer.precision),
        "device": task.device.type,
        "learning_rate": [g["lr"] for o in trainer.optimizers for g in o.param_groups],
        "loss": step.loss,
        "grad_norm": step.norm,
        "in_a_row": step.in_a_row,
        "skipped": step.skipped,
        "built_on": dict(task._built_on),
    }


def _read_rank(root: Path, rank: int) -> list[DumpedBatch]:
    rows = json.loads((root / f"rank{rank}.json").read_text())
    tensors = artifacts.read_tensors(root / f"rank{rank}.safetensors")
    found = []
    for i, row in enumerate(rows):
        batch = {**row["rest"], **{k.removeprefix(f"{i}."): v for k, v in tensors.items() if k.startswith(f"{i}.")}}
        if "grid" in batch:
            batch["grid"] = tuple(batch["grid"])
        finding = {**unplain(row["finding"]), "names": row["names"], "backward": unplain(row["backward"])}
        found.append(DumpedBatch(rank, int(row["number"]), batch, finding))
    return found


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n")


def _tried(do: Callable[[], None]) -> bool:
    """Whether it could be done; a dump that fails hides neither the step nor, on one rank, stops the others."""
    try:
        do()
    except Exception as e:  # whatever it is, the run's own error is the one to report
        rank_zero_warn(f"dump of a step: {type(e).__name__}: {e}")
        return False
    return True
