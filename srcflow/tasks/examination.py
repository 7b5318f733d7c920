"""What was wrong with a training step: its batches once more, with statistics, and nothing left behind.

It is made only after a step was dropped, and by `srcflow replay`; both look at a batch through the same functions, so their numbers can be
compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from srcflow.callbacks.ema import trained
from srcflow.errors import SrcflowError
from srcflow.tasks.discriminator import Discriminator

if TYPE_CHECKING:
    from srcflow.tasks.base import Task

Finding = dict[str, Any]
"""What a batch is like: `loss`; `terms`, the logged parts of the loss by name; `indices`; and where the task has them `blocks`, lists of
one number per block, and `samples`, lists of one number per sample. Numbers only, so that it can be written as JSON. Of a batch that could
not be examined only `problem`, why, and what else is known."""


@contextmanager
def apart(task: Task) -> Iterator[dict[str, float]]:
    """A block in which `training_step` is only a function of the batch: it yields the numbers that would have been logged.

    Nothing is logged, what batches change is put back, and the discriminator is left as it is. Under the run's precision. No collective,
    unless the weights are sharded.
    """
    terms: dict[str, float] = {}

    def note(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        terms[name] = float(value)

    game = getattr(task, "discriminator", None)
    before = {k: v.detach().clone() for k, v in task.moving().items()}
    with ExitStack() as undo:
        undo.callback(restore, task, before)
        undo.callback(task.__dict__.pop, "log")
        task.__dict__["log"] = note  # also what log_dict calls
        undo.callback(setattr, task, "apart", task.apart)
        task.apart = True
        if isinstance(game, Discriminator):
            undo.callback(setattr, game, "paused", game.paused)
            game.paused = True
        undo.enter_context(task.trainer.precision_plugin.train_step_context())
        yield terms


@torch.no_grad()
def restore(task: Task, before: Mapping[str, Tensor]) -> None:
    """Give what every batch changes (`Task.moving`) its former values."""
    for name, value in task.moving().items():
        if name in before:
            value.copy_(before[name])


def examine(task: Task, batch: Any, batch_idx: int, backward: Callable[[Tensor], None] | None = None) -> Finding:
    """One batch of a training step once more. Where the weights are sharded, all ranks have to call it.

    Args:
        task: in a fit, at the step.
        batch: on the task's device.
        batch_idx: its number in the epoch.
        backward: what to do with the loss, outside of autocast, before the statistics are taken.
    """
    sharded = is_sharded(task)  # a forward of shards that no backward follows
    with apart(task) as terms, torch.set_grad_enabled(not sharded):
        loss = cast(Tensor, task.training_step(batch, batch_idx))
    if backward is not None:
        backward(loss)
    with apart(task), torch.no_grad():
        seen = task.statistics_of(batch)
    if sharded:
        trained(task)  # reshards
    finding: Finding = {"loss": float(loss.detach()), "terms": {k: v for k, v in terms.items() if k.startswith("train/")}}
    return {**finding, **_indices(batch), **{kind: {k: v.tolist() for k, v in values.items()} for kind, values in seen.items()}}


def attempt(task: Task, batch: Any, batch_idx: int) -> Finding:
    """As `examine`; what fails on this rank alone becomes a finding, since the others are going on.

    Where the weights are sharded the ranks examine together, so there an error is raised.
    """
    if is_sharded(task):
        return examine(task, batch, batch_idx)
    try:
        return examine(task, batch, batch_idx)
    except Exception as e:  # whatever it is, the dropped step is the one to report
        return {"loss": math.nan, "terms": {}, **_indices(batch), "problem": f"could not be examined: {type(e).__name__}: {e}"}


def is_sharded(task: Task) -> bool:
    """Whether a forward pass of the task is a collective."""
    return any(isinstance(p, DTensor) for p in task.parameters())


def _indices(batch: Any) -> dict[str, list[int]]:
    found = batch.get("indices") if isinstance(batch, Mapping) else None
    return {"indices": found.tolist()} if isinstance(found, Tensor) else {}


def verdict(finding: Finding, name: Callable[[int], str] = str) -> tuple[tuple[int, float], str]:
    """What is extreme about a batch: how bad it is (to be compared with other batches'), and a sentence.

    Args:
        finding: from `examine`.
        name: a sample's name by its index.
    """
    if "problem" in finding:
        return (0, math.inf), f"batch {finding['problem']}"
    blocks, samples = finding.get("blocks", {}), finding.get("samples", {})
    ids = finding.get("indices", [])
    if bad := _which(samples.get("code_abs_max", [])):
        return (2, len(bad)), f"the codes of {_names(bad, ids, name)} are not finite, before the flow"
    if not blocks:
        terms = finding["terms"]
        bad_terms = sorted(k for k, v in terms.items() if not math.isfinite(v))
        what = f"not finite: {', '.join(bad_terms)}; " if bad_terms else ""
        rest = ", ".join(f"{k.removeprefix('train/')} {v:.4g}" for k, v in terms.items() if math.isfinite(v))
        size = max((abs(v) for v in terms.values() if math.isfinite(v)), default=0.0)
        return (bool(bad_terms), size), f"{what}loss terms: {rest or 'none is finite'}"
    low, high, logit = blocks["log_scale_min"], blocks["log_scale_max"], blocks["attention_logit_max"]
    reach = [max(abs(a), abs(b)) for a, b in zip(low, high, strict=True)]
    extreme = [k for k, values in enumerate(zip(low, high, logit, blocks["z_abs_max"], strict=True)) if not all(map(math.isfinite, values))]
    seen = range(extreme[0]) if extreme else range(len(low))
    said = []
    if extreme:
        k = extreme[0]
        said.append(f"block {k} is the first that is not finite (log-scale {low[k]:.4g} to {high[k]:.4g}, attention logit {logit[k]:.4g})")
    if seen:
        widest, sharpest = max(seen, key=reach.__getitem__), max(seen, key=logit.__getitem__)
        place = "before it" if extreme else "of all"
        scale = f"log-scale {low[widest]:.4g} to {high[widest]:.4g} in block {widest}"
        said.append(f"the most extreme {place}: {scale}, attention logit {logit[sharpest]:.4g} in block {sharpest}")
    if bad := _which(samples.get("nll", [])):
        said.append(f"no finite likelihood: {_names(bad, ids, name)}")
    return (bool(extreme or bad), max((reach[k] for k in seen), default=math.inf)), "; ".join(said)


def worst(found: tuple[tuple[int, float], str]) -> str:
    """The sentence of the rank whose batch is the worst, the same on every rank (a collective)."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return found[1]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    rank = max(range(len(everyone)), key=lambda r: everyone[r][0])
    return f"rank {rank}: {everyone[rank][1]}"


def names_of(task: Task) -> Callable[[int], str]:
    """How to call a training sample: by its key, where the datamodule knows one, and by its index. Never fails."""
    try:
        data = task.trainer.datamodule.dataset("train", training=True)  # type: ignore[attr-defined]
        key = data.key
    except (AttributeError, SrcflowError):  # no datamodule of ours
        return str
    except Exception as e:
        problem = f"no name: {type(e).__name__}: {e}"
        return lambda index: f"{index} ({problem})"

    def name(index: int) -> str:
        try:
            return f"{index} ({key(index)})"
        except Exception as e:
            return f"{index} (no name: {type(e).__name__}: {e})"

    return name


def _which(values: list[float]) -> list[int]:
    return [i for i, v in enumerate(values) if not math.isfinite(v)]


def _names(rows: list[int], ids: list[int], name: Callable[[int], str], limit: int = 4) -> str:
    shown = ", ".join(name(ids[i]) if i < len(ids) else f"row {i}" for i in rows[:limit])
    return f"sample{'s' if len(rows) > 1 else ''} {shown}" + (f" and {len(rows) - limit} more" if len(rows) > limit else "")
