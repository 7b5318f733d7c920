"""State dicts of other projects: reading their files, and renaming keys in both directions with nothing lost.

A `Rule` ties some of our tensors to some of theirs. A list of rules that covers a module says everything about a format: `exported` applies
it one way, `load` the other, and both refuse what the rules do not cover.
"""

from __future__ import annotations

import fnmatch
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srcflow.errors import ArtifactError, WeightsError
from srcflow.files import read_json, read_tensors

Tensors = tuple[Tensor, ...]
WRAPPERS = ("ema", "model_ema", "ema_model", "model", "state_dict", "module", "net")
"""Under which of its keys a training checkpoint holds the weights, the preferred first."""
PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put in front of every key."""


def _same(*tensors: Tensor) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Our tensors `ours` (names in the module's state dict) are their tensors `theirs`, up to `to_ours` and `to_theirs`.

    Args:
        ours: our names.
        theirs: their names.
        to_ours: turns their tensors, in the order of `theirs`, into ours. It is only called with tensors of the shapes `to_theirs` gives.
        to_theirs: the way back.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_ours: Callable[..., Tensors] = _same
    to_theirs: Callable[..., Tensors] = _same


def rename(ours: str, theirs: str) -> Rule:
    """The rule of a tensor that only has another name."""
    return Rule((ours,), (theirs,))


def reshape(ours: str, theirs: str, shape: Sequence[int], own: Sequence[int]) -> Rule:
    """The rule of a tensor with another name and the same numbers in another `shape` there, `own` here."""
    return Rule((ours,), (theirs,), lambda t: (t.reshape(tuple(own)),), lambda t: (t.reshape(tuple(shape)),))


def linear(ours: str, theirs: str, bias: bool = True) -> list[Rule]:
    """The rules of a linear layer or a norm: weight and, if it has one, bias."""
    return [rename(f"{ours}.{k}", f"{theirs}.{k}") for k in (("weight", "bias") if bias else ("weight",))]


def stacked(ours: str, theirs: Sequence[str], bias: bool = True) -> list[Rule]:
    """The rules of a linear layer (query, key, value) whose rows are theirs put on top of each other in equal parts."""
    names = tuple(theirs)

    def join(*parts: Tensor) -> Tensors:
        return (torch.cat(parts),)

    def split(t: Tensor) -> Tensors:
        return tuple(t.chunk(len(names)))

    kinds = ("weight", "bias") if bias else ("weight",)
    return [Rule((f"{ours}.{k}",), tuple(f"{name}.{k}" for name in names), join, split) for k in kinds]


def exported(module: nn.Module, rules: Iterable[Rule]) -> dict[str, Tensor]:
    """The state of `module` under their names: contiguous tensors on the CPU, in the order of the rules.

    Raises:
        WeightsError: a tensor of the module is covered by no rule.
    """
    return {k: v.to("cpu", copy=True).contiguous() for k, v in _theirs(module, rules).items()}


@torch.no_grad()
def load(
    module: nn.Module, state: Mapping[str, Tensor], rules: Iterable[Rule], *, what: str, ignore: Sequence[str] = (), hint: str = ""
) -> None:
    """Fill every tensor of `module` from `state`.

    Args:
        module: the module, of the right sizes; on the meta device it is given memory, so that no weight is drawn only to be overwritten.
        state: their tensors.
        rules: cover the module.
        what: what the weights are called in errors.
        ignore: patterns (`fnmatch`) of their keys that hold nothing that matters.
        hint: a sentence added to the error.

    Raises:
        WeightsError: lists every missing, unknown and misshaped key.
    """
    rules = list(rules)
    expected = {k: tuple(v.shape) for k, v in _theirs(module, rules).items()}
    lines = [f"missing {k} {shape}" for k, shape in expected.items() if k not in state]
    lines += [
        f"unknown {k} {tuple(v.shape)}" for k, v in state.items() if k not in expected and not any(fnmatch.fnmatch(k, p) for p in ignore)
    ]
    lines += [
        f"{k}: shape {tuple(state[k].shape)}, expected {shape}"
        for k, shape in expected.items()
        if k in state and tuple(state[k].shape) != shape
    ]
    if lines:
        raise WeightsError(f"{what}: the weights do not fit this configuration:\n  " + "\n  ".join(lines) + (f"\n{hint}" if hint else ""))
    if any(t.is_meta for t in module.state_dict().values()):
        module.to_empty(device="cpu")
    own = module.state_dict()
    for rule in rules:
        for name, tensor in zip(rule.ours, rule.to_ours(*(state[k] for k in rule.theirs)), strict=True):
            own[name].copy_(tensor)


def _theirs(module: nn.Module, rules: Iterable[Rule]) -> dict[str, Tensor]:
    """The state of `module` under their names, as views where that is possible."""
    own, taken, out = module.state_dict(), set[str](), dict[str, Tensor]()
    for rule in rules:
        taken.update(rule.ours)
        out.update(zip(rule.theirs, rule.to_theirs(*(own[k].detach() for k in rule.ours)), strict=True))
    if left := sorted(own.keys() - taken):
        raise WeightsError(f"{type(module).__name__}: this format has no place for {_listed(left)}.")
    return out


def precision(state: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that holds all of `state` without loss: float64 if any of it is, else float32."""
    return torch.float64 if any(v.dtype == torch.float64 for v in state.values()) else torch.float32


def read(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file: safetensors (also an index of several, `*.safetensors.index.json`), or torch's format, which is read with
    `weights_only=True` so that it can run no code. A training checkpoint's averaged weights are preferred; what wrappers put in front
    of the keys is removed.

    Raises:
        ArtifactError: there is no such file, it is damaged, or holds something else than tensors.
    """
    file = Path(path)
    if not file.is_file():
        raise ArtifactError(f"{file}: there is no such file.")
    if file.name.endswith(".safetensors.index.json"):
        return unwrap({k: v for name in _parts(file) for k, v in read_tensors(file.with_name(name)).items()}, what=str(file))
    if file.suffix == ".safetensors":
        return unwrap(read_tensors(file), what=str(file))
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as e:
        if found := re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(e)):
            why = f"it holds a {found[1]}, and reading that would run code from the file"
            raise ArtifactError(f"{file} was not read: {why}. Save the bare state dict, best as safetensors.") from e
        raise ArtifactError(f"{file} cannot be read: it is no file of torch's, or damaged.") from e
    except Exception as e:  # a damaged pickle can raise anything
        raise ArtifactError(f"{file} cannot be read: {e}.") from e
    return unwrap(content, what=str(file))


def _parts(index: Path) -> list[str]:
    """The files that an index names, which stand beside it."""
    cure = "Copy the index and its files again from where they came from."
    where = read_json(index, cure).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(v, str) and Path(v).name == v for v in where.values()):
        raise ArtifactError(f"{index} is damaged: its weight_map does not map tensors to files beside it. {cure}")
    names = sorted(set(where.values()))
    if missing := [name for name in names if not index.with_name(name).is_file()]:
        raise ArtifactError(f"{index} names {_listed(missing)}, which {'is' if len(missing) == 1 else 'are'} not beside it. {cure}")
    return names


def unwrap(content: Any, *, what: str) -> dict[str, Tensor]:
    """The bare state dict inside a checkpoint (see `read`).

    Raises:
        ArtifactError: there is none.
    """
    for _ in range(3):  # e.g. {"ema": {"state_dict": {...}}}
        inner = next((k for k in WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = content[inner]
    if not isinstance(content, Mapping) or not any(isinstance(v, Tensor) for v in content.values()):
        found = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise ArtifactError(f"{what} holds no state dict; found {found}.")
    content = {k: v for k, v in content.items() if v is not None}
    if other := {k: v for k, v in content.items() if not isinstance(v, Tensor)}:
        raise ArtifactError(f"{what}: {_listed(sorted(map(str, other)))} are no tensors; is it a training checkpoint of another kind?")
    state = {str(k): v for k, v in content.items()}
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _listed(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
