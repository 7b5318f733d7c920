"""The contract of conditioners: which fields of a condition a block reads, and what it makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from srcflow.errors import ConfigError, ShapeError, one_of
from srcflow.registry import Recorded
from srcflow.types import NULL_LABEL, Condition

Kind = Literal["index", "dense", "sequence"]
DROPPED = "dropped"
"""Field of a condition that marks rows whose every field is null."""


@dataclass(frozen=True)
class Field:
    """One field of a `Condition`, as a conditioner declares it.

    Args:
        name: of the field, in conditions and in batches.
        kind: "index": (B,) int64 class ids, -1 for null; "dense": (B, size) numbers; "sequence": (B, L, size) features.
        size: number of classes, or width.
        mask: name of the field with a sequence's mask (B, L) bool, True for real positions; None: it has none.

    Raises:
        ConfigError: a size that cannot be, or a mask of something that is not a sequence.
    """

    name: str
    kind: Kind
    size: int
    mask: str | None = None

    def __post_init__(self) -> None:
        one_of("field.kind", self.kind, ("index", "dense", "sequence"))
        if self.size < 1:
            key, what = ("num_classes", "at least one class") if self.kind == "index" else (f"{self.name} width", "a positive width")
            raise ConfigError(key, self.size, f"a conditioner needs {what}.", "Leave the conditioner out for an unconditional block.")
        if self.mask is not None and self.kind != "sequence":
            raise ConfigError("field.mask", self.mask, f"{self.name} is not a sequence.", "Only sequences have a mask.")
        if DROPPED in (self.name, self.mask):
            raise ConfigError("field.name", DROPPED, "marks dropped rows in every condition.", "Choose another name.")


class Conditioner(nn.Module, metaclass=Recorded):
    """Turns fields of a condition into a vector added to every token, tokens put in front of the sequence, or both.

    A subclass sets `fields` in its constructor and implements `added`, `prefix` or both. Conditions arrive resolved by the flow: every
    declared field is there, in B rows, with its null filled in: -1 for an index, zeros for a dense field unless `Flow.set_null` says
    otherwise, and what `Flow.set_null` says for a sequence.

    Attributes:
        fields: what it reads.
    """

    fields: tuple[Field, ...] = ()

    def added(self, condition: Condition) -> Tensor | None:
        """(B, 1, width) to add to every token, or None."""
        return None

    def prefix(self, condition: Condition) -> Tensor | None:
        """(B, L, width) to put in front, or None."""
        return None

    def from_batch(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The fields in a batch of a datamodule, by name; what the batch lacks is left out and becomes null."""
        names = [name for f in self.fields for name in (f.name, f.mask) if name is not None]
        return {name: batch[name] for name in names if isinstance(batch.get(name), Tensor)}

    def from_user(self, value: Any) -> dict[str, Tensor]:
        """The fields that a user means by one value, such as a list of class ids for a conditioner on classes.

        Raises:
            ConfigError: the value is not of the kind that the conditioner reads.
        """
        if len(self.fields) != 1:
            names = ", ".join(f.name for f in self.fields)
            raise ConfigError("condition", value, f"{type(self).__name__} reads {names}.", "Give a Condition with these fields.")
        (field,) = self.fields
        try:
            tensor = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as e:
            raise ConfigError("condition", value, f"is not {_KINDS[field.kind]} ({e}).", f"Give Condition({field.name}=...).") from e
        if field.kind == "index":
            if tensor.is_floating_point() or tensor.dtype == torch.bool:
                raise ConfigError("condition", value, f"is not {_KINDS[field.kind]}.", f"Give integers of 0 .. {field.size - 1}.")
            return {field.name: tensor.reshape(-1).long()}
        wanted = 2 if field.kind == "dense" else 3
        return {field.name: tensor if tensor.ndim == wanted else tensor[None]}


_KINDS = {"index": "a number or list of class ids", "dense": "an array of numbers (B, width)", "sequence": "features (B, L, width)"}


class Joint(Conditioner):
    """Several conditioners as one: what they add is summed, and their prefixes follow each other in the given order.

    Args:
        parts: the conditioners.
    """

    def __init__(self, parts: list[Conditioner]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.fields = tuple(merged(f for part in parts for f in part.fields).values())

    def _parts(self) -> list[Conditioner]:
        return list(self.parts)  # type: ignore[arg-type]  # only conditioners are put in

    def added(self, condition: Condition) -> Tensor | None:
        """The sum of what the parts add."""
        terms = [t for part in self._parts() if (t := part.added(condition)) is not None]
        return sum(terms[1:], start=terms[0]) if terms else None

    def prefix(self, condition: Condition) -> Tensor | None:
        """The parts' prefixes, one after another."""
        prefixes = [t for part in self._parts() if (t := part.prefix(condition)) is not None]
        return torch.cat(prefixes, dim=1) if prefixes else None

    def from_batch(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """The fields of all parts."""
        return {name: value for part in self._parts() for name, value in part.from_batch(batch).items()}


def joined(conditioner: Conditioner | list[Conditioner] | None) -> Conditioner | None:
    """One conditioner from what a block is given: none, one, or several."""
    if not isinstance(conditioner, list):
        return conditioner
    return None if not conditioner else conditioner[0] if len(conditioner) == 1 else Joint(conditioner)


def merged(fields: Iterable[Field]) -> dict[str, Field]:
    """Fields by name, each once.

    Raises:
        ConfigError: two conditioners declare one field differently.
    """
    found: dict[str, Field] = {}
    for field in fields:
        known = found.setdefault(field.name, field)
        if known != field:
            what = "num_classes" if field.kind == known.kind == "index" else field.name
            pair = sorted({known.size, field.size}) if known.size != field.size else [str(known), str(field)]
            raise ConfigError(f"flow.blocks {what}", pair, "blocks (or the denoiser) declare the same field differently.")
    return found


def resolve(
    condition: Condition | None,
    batch: int,
    *,
    fields: Mapping[str, Field],
    nulls: Mapping[str, Tensor],
    device: torch.device,
) -> Condition | None:
    """The condition with every null filled in, for `batch` rows; None for an unconditional model.

    Args:
        condition: what was given; None means the null condition. Rows are null in every field where `dropped` is True or, in a model that
            reads no labels, where `labels` is -1.
        batch: number of rows.
        fields: what the model reads.
        nulls: null values by field: (size,) for a dense one, (L, size) for a sequence, (L,) for its mask.
        device: of the result.

    Raises:
        ConfigError: a field that the model does not read, labels out of range, or a null that is needed and not known.
        ShapeError: a field whose shape does not fit.
    """
    given = Condition() if condition is None else condition
    _refuse_unknown(given, fields)
    if not fields:
        return None
    if given.fields and len(given) != batch:
        raise ShapeError(f"condition.{next(iter(given.fields))} has {len(given)} rows for a batch of {batch}.")
    given = given.to(device)
    dropped = given.get(DROPPED)
    if dropped is None and given.labels is not None and "labels" not in fields:
        dropped = given.labels < 0
    out: dict[str, Tensor | None] = {}
    for field in fields.values():
        if field.kind == "index":
            out[field.name] = _index(field, given.get(field.name), dropped, batch, device)
        elif field.kind == "dense":
            out[field.name] = _dense(field, given.get(field.name), dropped, nulls.get(field.name), batch, device)
        else:
            out.update(_sequence(field, given, dropped, nulls, batch, device))
    return Condition(**out)


def _refuse_unknown(given: Condition, fields: Mapping[str, Field]) -> None:
    known = {name for f in fields.values() for name in (f.name, f.mask) if name is not None}
    markers = {DROPPED, "labels"} if fields and "labels" not in fields else {DROPPED} if fields else set()
    unknown = [name for name in given.fields if name not in known | markers]
    if not unknown:
        return
    if not fields:
        raise ConfigError("condition", ", ".join(unknown), "this flow is unconditional.", "Pass no condition.")
    wanted = ", ".join(f"Condition({name}=...)" for name in fields)
    name = unknown[0]
    raise ConfigError(
        f"condition.{name}", tuple(given.fields[name].shape), f"this flow is conditioned on {', '.join(fields)}.", f"Give {wanted}."
    )


def _index(field: Field, value: Tensor | None, dropped: Tensor | None, batch: int, device: torch.device) -> Tensor:
    if value is None:
        return torch.full((batch,), NULL_LABEL, device=device)
    if value.ndim != 1 or value.is_floating_point():
        raise ShapeError(f"condition.{field.name} is (B,) of integers, not {tuple(value.shape)} of {value.dtype}.")
    # on an accelerator the look would wait for everything before it; indexing fails there by itself
    if value.device.type == "cpu" and value.numel() and not (int(value.min()) >= NULL_LABEL and int(value.max()) < field.size):
        bounds = (int(value.min()), int(value.max()))
        raise ConfigError(f"condition.{field.name}", bounds, f"{field.name} lie in -1 .. {field.size - 1}.")
    return value if dropped is None else torch.where(dropped, NULL_LABEL, value)


def _dense(field: Field, value: Tensor | None, dropped: Tensor | None, null: Tensor | None, batch: int, device: torch.device) -> Tensor:
    if value is not None and tuple(value.shape) != (batch, field.size):
        raise ShapeError(f"condition.{field.name} is ({batch}, {field.size}), not {tuple(value.shape)}.")
    dtype = torch.get_default_dtype() if value is None else value.dtype
    nulls = torch.zeros(field.size, device=device, dtype=dtype) if null is None else null.to(device, dtype)
    if value is None:
        return nulls.expand(batch, -1)
    return value if dropped is None else torch.where(dropped[:, None], nulls, value)


def _sequence(
    field: Field, given: Condition, dropped: Tensor | None, nulls: Mapping[str, Tensor], batch: int, device: torch.device
) -> dict[str, Tensor | None]:
    name, value = field.name, given.get(field.name)
    mask = None if field.mask is None else given.get(field.mask)
    if value is not None and (value.ndim != 3 or value.shape[2] != field.size):
        raise ShapeError(f"condition.{name} is (B, L, {field.size}), not {tuple(value.shape)}.")
    if mask is not None and (value is None or mask.shape != value.shape[:2]):
        shape = None if value is None else tuple(value.shape)
        raise ShapeError(f"condition.{field.mask} {tuple(mask.shape)} is not (B, L) of condition.{name} {shape}.")
    if value is not None and dropped is None:
        return _with_mask(field, value, mask)
    if value is None and dropped is not None and dropped.device.type == "cpu" and not bool(dropped.all()):
        raise ConfigError("condition.labels", f"without {name}", f"this flow is conditioned on {name}.", f"Give Condition({name}=...).")
    if name not in nulls:
        cure = f"Call Flow.set_null({name}), or give Condition({name}=...)."
        raise ConfigError(f"condition.{name}", None, f"the null {name} is not known.", cure)
    rows = nulls[name].to(device).expand(batch, -1, -1)
    null_mask = None if field.mask is None or field.mask not in nulls else nulls[field.mask].to(device).expand(batch, -1)
    if value is None or dropped is None:
        return _with_mask(field, rows, null_mask)
    if value.shape[1:] != rows.shape[1:]:
        theirs = tuple(nulls[name].shape)
        raise ShapeError(f"condition.{name} is {tuple(value.shape)}, the null {name} {theirs}: pad them to one length.")
    merged_rows = torch.where(dropped[:, None, None], rows.to(value.dtype), value)
    if mask is None and null_mask is None:
        return _with_mask(field, merged_rows, None)
    ones = torch.ones(value.shape[:2], dtype=torch.bool, device=device)
    merged_mask = torch.where(dropped[:, None], ones if null_mask is None else null_mask, ones if mask is None else mask)
    return _with_mask(field, merged_rows, merged_mask)


def _with_mask(field: Field, value: Tensor, mask: Tensor | None) -> dict[str, Tensor | None]:
    return {field.name: value} if field.mask is None else {field.name: value, field.mask: mask}
