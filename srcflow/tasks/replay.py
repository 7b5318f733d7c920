"""Make a dumped training step again, in one process, and compare it with what the run saw."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from srcflow import artifacts
from srcflow.errors import ArtifactError
from srcflow.tasks import base, checkpoint, examination
from srcflow.tasks.discriminator import Discriminator
from srcflow.tasks.dump import Dump, DumpedBatch
from srcflow.tasks.reconstruction import STATE

NORM_TOLERANCE = 1e-3
"""Relative difference of the gradient's norm: several ranks' gradients are summed in another order."""

QUIET = (".*does not have many workers", ".*but have no `val_dataloader`", ".*in eval mode", ".*GPU available but not used", ".*LeafSpec")
"""Lightning's advice that does not concern a single step."""


@dataclass
class Replay:
    """What a step was like when it was made again.

    Attributes:
        findings: per batch, in the dump's order.
        grad_norm: global norm of the gradient, mean over all batches.
        groups: the norm's parts, by group of parameters.
        forward: per batch, where the first value that is not finite appeared; None where all are finite.
        backward: the first parameter, in the order of the backward pass, whose gradient was not finite; None if all are.
    """

    findings: list[examination.Finding] = field(default_factory=list)
    grad_norm: float = math.nan
    groups: dict[str, float] = field(default_factory=dict)
    forward: list[str | None] = field(default_factory=list)
    backward: str | None = None


class _Finished(Exception):
    """Ends the fit in which the step is made."""


class _Step(L.Callback):
    """Brings the weights into the task, and makes the step where the first batch would come."""

    def __init__(self, dump: Dump) -> None:
        self.dump, self.result = dump, Replay()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Load the state, before the task's own start; refuse other artifacts than the run's."""
        task = cast(base.Task, pl_module)
        artifacts.load_state(task, self.dump.weights, what=str(self.dump.path))
        restored: dict[str, Any] = {checkpoint.FACTS: {"built_on": self.dump.facts["built_on"]}}
        game = getattr(task, "discriminator", None)
        if isinstance(game, Discriminator):
            artifacts.load_state(game.adversarial, self.dump.heads, what=f"{self.dump.path}, discriminator")
            restored[STATE] = game.state_dict()
        task.on_load_checkpoint(restored)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the step, and end."""
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = self.dump.facts["step"]
        self._run(cast(base.Task, pl_module))
        raise _Finished

    def _run(self, task: base.Task) -> None:
        parameters = {k: p for k, p in task.named_parameters() if p.requires_grad}
        late: list[str] = []
        with ExitStack() as hooks:
            for name, p in parameters.items():
                hooks.callback(cast(Any, p).register_post_accumulate_grad_hook(_watch_gradient(name, late)).remove)
            for recorded in self.dump.batches:
                batch = task.trainer.strategy.batch_to_device(recorded.batch, task.device, 0)
                with first_not_finite(task) as early:
                    finding = examination.examine(task, batch, recorded.number, lambda loss: self._backward(loss, early))
                self.result.findings.append(finding)
                where = early[0] if early else None
                if where is None and not math.isfinite(finding["loss"]):
                    where = "the loss, after the last module"
                self.result.forward.append(where)
        self.result.backward = late[0] if late else None
        self._measure(parameters)

    def _backward(self, loss: Tensor, early: list[str]) -> None:
        before = list(early)
        if loss.requires_grad:
            (loss / len(self.dump.batches)).backward()  # type: ignore[no-untyped-call]  # torch is untyped here
        early[:] = before  # recomputed activations are no forward pass

    def _measure(self, parameters: Mapping[str, nn.Parameter]) -> None:
        squares: dict[str, float] = {}
        for name, p in parameters.items():
            if p.grad is not None:
                group = group_of(name)
                squares[group] = squares.get(group, 0.0) + float(p.grad.double().square().sum())
        self.result.groups = {k: math.sqrt(v) if not math.isnan(v) else v for k, v in squares.items()}
        given = [p for p in parameters.values() if p.grad is not None]
        self.result.grad_norm = float(torch.nn.utils.get_total_norm([cast(Tensor, p.grad) for p in given]))


def replay(dump: Dump, task: base.Task, *, device: str | None = None, precision: str | None = None) -> Replay:
    """Make a dumped step again: same weights, batches, noise and label dropout.

    Args:
        dump: from `dump.read`.
        task: as the run's configuration describes it, fresh.
        device: "cpu" or "cuda"; None: as in the run, or the CPU where there is none.
        precision: another precision than the run's, in Lightning's names.

    Raises:
        ArtifactError: the dump is of another task, or does not fit this one.
        ManifestMismatchError: the task is built on other artifacts than the run's.
    """
    facts = dump.facts
    if facts["task"] != type(task).__name__:
        raise ArtifactError(f"{dump.path} is a step of {facts['task']}, the configuration describes {type(task).__name__}.")
    wanted = device or facts["device"]
    if device is None and wanted == "cuda" and not torch.cuda.is_available():
        wanted = "cpu"
    task.artifact, task.replaying, task.seed = None, True, facts["seed"]
    step = _Step(dump)
    with warnings.catch_warnings():
        for message in QUIET:
            warnings.filterwarnings("ignore", message=message)
        trainer = L.Trainer(
            accelerator=wanted,
            devices=1,
            precision=cast(Any, precision or facts["precision"]),
            max_steps=facts["total_steps"],
            accumulate_grad_batches=facts["accumulate_grad_batches"],
            log_every_n_steps=facts["log_every_n_steps"],
            callbacks=[step],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        loader = DataLoader(cast(Any, [r.batch for r in dump.batches]), batch_size=None)
        try:
            trainer.fit(task, loader)
        except _Finished:
            return step.result
    raise ArtifactError(f"{dump.path}: step {facts['step']} of {facts['total_steps']} cannot be made: there is nothing to train.")


def differences(dump: Dump, result: Replay, *, heads_moved: bool = False) -> list[str]:
    """What is not as the run saw it, with both numbers; empty if the step is reproduced.

    Losses, their terms and all statistics have to be equal in every bit (or both not a number), the gradient's norm within
    `NORM_TOLERANCE`.

    Args:
        dump: what the run saw.
        result: what was seen now.
        heads_moved: whether a discriminator learned at the end of the step; then its last batch alone had the loss that is seen now.
    """
    found = []
    last = max((r.number for r in dump.batches), default=0)
    for recorded, now in zip(dump.batches, result.findings, strict=True):
        then = recorded.finding
        if "problem" in then:
            found.append(f"{where_of(recorded, dump)}: {then['problem']} in the run; there is nothing to compare with")
            continue
        for kind in ("loss", "terms", "blocks", "samples"):
            for name, a, b in _pairs(kind, then.get(kind), now.get(kind)):
                if not _same(a, b):
                    found.append(f"{where_of(recorded, dump)}: {name}: recorded {a}, now {b}")
        whole = then["backward"] * dump.facts["accumulate_grad_batches"]
        if not _near(whole, then["loss"], 1e-6) and not (heads_moved and recorded.number != last):
            found.append(f"{where_of(recorded, dump)}: loss: {whole} in the step, {then['loss']} when the run looked at it again")
    if not _near(dump.facts["grad_norm"], result.grad_norm, NORM_TOLERANCE):
        found.append(f"gradient norm: recorded {dump.facts['grad_norm']}, now {result.grad_norm}")
    return found


def where_of(recorded: DumpedBatch, dump: Dump) -> str:
    """A batch's name: its rank where there are several, its number in the epoch."""
    return (f"rank {recorded.rank}, " if dump.facts["world_size"] > 1 else "") + f"batch {recorded.number}"


def group_of(parameter: str) -> str:
    """The group a parameter is counted in: up to the first number in its name, or its module's first two names.

    >>> group_of("flow.blocks.2.layers.0.mlp.fc1.weight"), group_of("compressor.proj.weight")
    ('flow.blocks.2', 'compressor.proj')
    """
    numbered = re.match(r"(.*?\.\d+)\.", parameter)
    return numbered[1] if numbered else ".".join(parameter.split(".")[:-1][:2])


@contextmanager
def first_not_finite(task: base.Task) -> Iterator[list[str]]:
    """Inside the block, the yielded list gets one line: where a value that is not finite first appeared."""
    found: list[str] = []
    latest = "the batch"
    named = [(k, m) for k, m in task.named_modules() if k]
    named += [(f"{role}.{k}" if k else role, m) for role, part in task.outside.items() for k, m in part.named_modules()]

    def before(name: str, inputs: Any) -> None:
        if not found and not _finite(inputs):
            found.append(f"between {latest} and the input of {name}")

    def after(name: str, module: nn.Module, output: Any) -> None:
        nonlocal latest
        if not found and not _finite(output):
            found.append(f"the output of {name} ({type(module).__name__})")
        latest = name

    with ExitStack() as hooks:
        for name, module in named:
            hooks.callback(module.register_forward_pre_hook(lambda _, x, name=name: before(name, x)).remove)
            hooks.callback(module.register_forward_hook(lambda m, _, y, name=name: after(name, m, y)).remove)
        yield found


def _watch_gradient(name: str, found: list[str]) -> Any:
    def hook(p: Tensor) -> None:
        if not found and p.grad is not None and not bool(torch.isfinite(p.grad).all()):
            found.append(name)

    return hook


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(_finite(v) for v in value.values())
    return all(_finite(v) for v in value) if isinstance(value, tuple | list) else True


def _pairs(name: str, a: Any, b: Any) -> Iterator[tuple[str, Any, Any]]:
    """Numbers that belong together, by name; a missing one is None."""
    if isinstance(a, Mapping) or isinstance(b, Mapping):
        a, b = a or {}, b or {}
        for key in [*a, *(k for k in b if k not in a)]:
            yield from _pairs(str(key).removeprefix("train/"), a.get(key), b.get(key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _pairs(f"{name}[{i}]", x, y)
    else:
        yield name, a, b


def _same(a: Any, b: Any) -> bool:
    return bool(a == b) or (isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b))


def _near(a: float, b: float, tolerance: float) -> bool:
    if math.isfinite(a) and math.isfinite(b):
        return math.isclose(a, b, rel_tol=tolerance)
    return math.isfinite(a) == math.isfinite(b)
