"""The contract of conditioners."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srcflow.conditioners.base import Conditioner, Field, resolve
from srcflow.errors import SrcflowError
from srcflow.testing.expect import check_construction, check_dead_parameters, close, device_of, differ, fail, finite, require
from srcflow.testing.perturbation import perturb
from srcflow.types import NULL_LABEL, Condition


def check_conditioner(conditioner: Conditioner, *, rows: int = 4, length: int = 3, seed: int = 0) -> None:
    """Check everything that `Conditioner` promises.

    Its fields are declared, and read from a batch and from a user's value; what it makes of a condition has a row per sample and depends on
    that row alone; every field matters, and so does its null; gradients reach every parameter; the constructor opens no file.

    Args:
        conditioner: the member.
        rows: B of the trial, at least 2.
        length: L of sequences.
        seed: of the trial values and of the perturbation.

    Raises:
        AssertionError: what is broken, and by how much.
    """
    require(len(conditioner.fields) > 0, conditioner, "declares no fields; set `fields` in the constructor.")
    require(all(isinstance(f, Field) for f in conditioner.fields), conditioner, "fields are not all of type Field.")
    names = [n for f in conditioner.fields for n in (f.name, f.mask) if n is not None]
    require(len(set(names)) == len(names), conditioner, f"declares a field twice: {names}.")
    trial = perturb(check_construction(conditioner, Conditioner).double(), seed=seed)
    device = device_of(trial)
    generator = torch.Generator().manual_seed(seed)
    values = {name: value.to(device) for f in trial.fields for name, value in _values(f, rows, length, generator).items()}
    condition = _resolved(trial, Condition(**values), rows, length)
    out = _outputs(trial, condition, rows)
    for row in range(rows):
        for kind, alone in _outputs(trial, condition.index(slice(row, row + 1)), 1).items():
            close(alone, out[kind][row : row + 1], 1e-12, conditioner, f"{kind} of a row alone and in a batch")
    for f in trial.fields:
        _field_matters(conditioner, trial, f, values, out, rows, length)
    _readers(conditioner, trial, values)
    trial.zero_grad()
    null = _outputs(trial, _resolved(trial, Condition(), rows, length), rows)
    total = sum((t.square().sum() for t in (*out.values(), *null.values())), start=torch.zeros((), dtype=torch.float64, device=device))
    total.backward()  # type: ignore[no-untyped-call]  # torch is untyped here
    check_dead_parameters(trial, conditioner)


def _values(field: Field, rows: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    if field.kind == "index":
        return {field.name: torch.arange(rows) % field.size}
    if field.kind == "dense":
        return {field.name: torch.randn(rows, field.size, generator=generator, dtype=torch.float64)}
    value = {field.name: torch.randn(rows, length, field.size, generator=generator, dtype=torch.float64)}
    return value if field.mask is None else {**value, field.mask: torch.arange(length)[None] <= torch.arange(rows)[:, None] % length}


def _resolved(trial: Conditioner, condition: Condition, rows: int, length: int) -> Condition:
    """As a flow resolves it; sequences have a null of ones."""
    fields = {f.name: f for f in trial.fields}
    nulls = {f.name: torch.ones(length, f.size, dtype=torch.float64) for f in trial.fields if f.kind == "sequence"}
    found = resolve(condition, rows, fields=fields, nulls=nulls, device=device_of(trial))
    if found is None:
        fail(trial, "its fields are not resolved.")
    return found


def _outputs(trial: Conditioner, condition: Condition, rows: int) -> dict[str, Tensor]:
    found = {}
    for kind, value in (("added", trial.added(condition)), ("prefix", trial.prefix(condition))):
        if value is None:
            continue
        require(value.ndim == 3 and value.shape[0] == rows, trial, f"{kind} has shape {tuple(value.shape)}, expected ({rows}, L, width).")
        require(kind == "prefix" or value.shape[1] == 1, trial, f"added has shape {tuple(value.shape)}, expected ({rows}, 1, width).")
        finite(value, trial, kind)
        found[kind] = value
    require(bool(found), trial, "gives neither `added` nor `prefix`.")
    return found


def _joined(outputs: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.flatten(1) for t in outputs.values()], dim=1)


def _field_matters(
    conditioner: Conditioner, trial: Conditioner, field: Field, values: dict[str, Tensor], out: dict[str, Tensor], rows: int, length: int
) -> None:
    with torch.no_grad():
        if field.kind != "index" or field.size > 1:
            rolled = {**values, field.name: values[field.name].roll(1, 0)}
            other = _outputs(trial, _resolved(trial, Condition(**rolled), rows, length), rows)
            differ(_joined(other), _joined(out), conditioner, f"the field {field.name} changes nothing.")
        kept = {k: v for k, v in values.items() if k not in (field.name, field.mask)}
        missing = _joined(_outputs(trial, _resolved(trial, Condition(**kept), rows, length), rows))
        for row in range(rows):
            differ(missing[row], _joined(out)[row], conditioner, f"the null of {field.name} is not told from the value of row {row}.")
        if field.kind == "index":
            null = {**values, field.name: torch.full_like(values[field.name], NULL_LABEL)}
            marked = _joined(_outputs(trial, _resolved(trial, Condition(**null), rows, length), rows))
            close(marked, missing, 0.0, conditioner, f"{field.name} = -1 and a missing {field.name}")


def _readers(conditioner: Conditioner, trial: Conditioner, values: dict[str, Tensor]) -> None:
    batch: dict[str, Any] = {**values, "indices": torch.arange(1), "unrelated": "text"}
    got = trial.from_batch(batch)
    require(set(got) == set(values), conditioner, f"from_batch gives {sorted(got)} of a batch with {sorted(values)}.")
    for name, value in values.items():
        close(got[name].double(), value.double(), 0.0, conditioner, f"from_batch's {name} and the batch's")
    require(trial.from_batch({}) == {}, conditioner, "from_batch of an empty batch is not empty.")
    if len(trial.fields) == 1 and trial.fields[0].kind == "index":
        name = trial.fields[0].name
        got = trial.from_user([0])
        require(list(got) == [name] and got[name].tolist() == [0], conditioner, f"from_user([0]) gives {got}, expected {name} = [0].")
        try:
            trial.from_user([0.5])
        except SrcflowError:
            return
        fail(conditioner, "from_user takes 0.5 for a class id.")
