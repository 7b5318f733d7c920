"""Whether a checkpoint belongs to a task: looked at before anything is opened or computed, and said in one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from srcflow import artifacts
from srcflow.callbacks import checkpoint_files
from srcflow.errors import ForeignCheckpointError

if TYPE_CHECKING:
    from srcflow.tasks.base import Task

FACTS = "srcflow"
"""Key of a checkpoint under which the task notes what an artifact's manifest needs."""
VERSION = "pytorch-lightning_version"
STATE = "state_dict"
OPTIMIZERS = "optimizer_states"


def check(task: Task, path: Path, *, fitting: bool) -> None:
    """Refuse a local checkpoint that does not fit a task. Reads names and shapes only, so it takes no time.

    Args:
        task: as configured.
        path: a file, or a directory of shards.
        fitting: whether training is to go on from it, which takes more than weights.

    Raises:
        CheckpointError: it is not there, cut off, or no checkpoint.
        ForeignCheckpointError: it is of something else, or of another size; names the first difference.
    """
    checkpoint_files.check(path)
    try:
        content = _outline(path)
    except Exception as e:  # a damaged file can raise anything
        raise checkpoint_files.refusal(path, f"cannot be read ({checkpoint_files.first_line(e)})") from e
    refuse_foreign(task, content, path, fitting=fitting)


def refuse_foreign(task: Task, content: Any, path: str | Path, *, fitting: bool = False) -> None:
    """Refuse what a file holds if it is not a checkpoint of a task.

    Args:
        task: as configured.
        content: what the file holds; its tensors may be on the meta device.
        path: the file.
        fitting: whether training is to go on from it.

    Raises:
        ForeignCheckpointError: says what is in the file, the first difference, and the cure.
    """
    name = type(task).__name__
    what = f"ckpt_path = {str(path)!r}"
    if problem := _not_a_checkpoint(content):
        cure = "Name a file that `srcflow fit` wrote; published weights are read by `srcflow convert`."
        raise ForeignCheckpointError(f"{what} is not a checkpoint of {name}: {problem}. {cure}")
    state, facts = content[STATE], content.get(FACTS)
    made_by = str(facts.get("task")) if isinstance(facts, Mapping) else None
    if found := artifacts.misfits(task, state):
        own = task.state_dict()
        shaped = [k for k in own if k in state and state[k].shape != own[k].shape]
        first = f"{shaped[0]} has shape {tuple(state[shaped[0]].shape)} there, {tuple(own[shaped[0]].shape)} here" if shaped else found[0]
        more = f" (the first of {len(found)} differences)" if len(found) > 1 else ""
        if made_by not in (None, name):
            problem = f"it holds one of {made_by} (the {_stage(str(made_by))} stage)"
            cure = f"Name a checkpoint of this stage, or start with the configuration of the {_stage(str(made_by))} stage."
        else:
            problem = "it holds one of another model" if made_by is None else f"it holds a {name} of other settings"
            cure = "Use the configuration that it was trained with (config.yaml beside the run's logs), or name another checkpoint."
        raise ForeignCheckpointError(f"{what} is not a checkpoint of {name} as configured: {problem}; {first}{more}. {cure}")
    if fitting and OPTIMIZERS not in content:
        cure = "Name a whole checkpoint; to begin anew with these weights, leave ckpt_path out and give them as model.initial (flows)."
        raise ForeignCheckpointError(f"{what} holds weights without the state of the optimizer: training cannot go on from it. {cure}")


def _not_a_checkpoint(content: Any) -> str | None:
    """What else something is."""
    if not isinstance(content, Mapping):
        return f"it holds a {type(content).__name__}"
    keys = ", ".join(map(str, list(content)[:4])) + (", ..." if len(content) > 4 else "") or "nothing"
    if content and all(isinstance(v, Tensor) for v in content.values()):
        return f"it holds bare weights ({keys})"
    state = content.get(STATE)
    if state is None:
        kind = " of an optimizer" if {OPTIMIZERS, "optimizer", "param_groups"} & set(content) else ""
        return f"it holds no {STATE}, only something{kind} ({keys})"
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        return f"its {STATE} holds no weights"
    if FACTS not in content and VERSION not in content:
        return f"it holds weights, but not what goes with them ({keys})"
    return None


def _stage(task: str) -> str:
    return task.removesuffix("Task").lower()


def _outline(path: Path) -> Any:
    """A checkpoint with tensors that have names, shapes and types only."""
    if not path.is_dir():
        return torch.load(path, map_location="meta", weights_only=True, mmap=True)
    content = torch.load(path / checkpoint_files.META, map_location="meta", weights_only=True, mmap=True)
    items = FileSystemReader(path).read_metadata().state_dict_metadata
    shapes = {k.removeprefix(f"{STATE}."): v.size for k, v in items.items() if k.startswith(f"{STATE}.") and hasattr(v, "size")}
    content[STATE] = {k: torch.empty(size, device="meta") for k, size in shapes.items()}
    if any(k.startswith("optimizer") for k in items):
        content.setdefault(OPTIMIZERS, [])
    return content
