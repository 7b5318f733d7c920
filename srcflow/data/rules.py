"""How the values of a batch's keys become columns: one rule per key, declared where the key is made.

The package's own keys (`types.Batch`) have rules already. A data set or a datamodule that adds keys to its samples declares theirs in its
attribute `rules`; a key without a rule is refused. The same rules hold in loader processes, in the joining of streams, and where a sample
that does not decode is replaced, so that a batch does not depend on who made it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from srcflow.errors import ConfigError, DataError
from srcflow.types import Batch

ABSENT: Any = object()
"""In place of the value of a sample that could not be decoded; it will be replaced by another sample's."""

Columns = dict[str, Any]
OWN = frozenset({"image", "label", "index", "valid", "flipped", "error"})
"""Keys of a sample that become the batch's `images`, `labels`, `indices`, `valid` and `flipped`."""


class Rule(ABC):
    """What becomes of a key's values. Subclasses do not change their arguments."""

    def names(self, key: str) -> tuple[str, ...]:
        """The batch's keys that come of a sample's."""
        return (key,)

    @abstractmethod
    def collate(self, key: str, values: Sequence[Any]) -> Columns:
        """Columns of B rows from B values, of which some, but not all, may be `ABSENT`.

        Raises:
            DataError: the rule does not fit the values.
        """

    @abstractmethod
    def join(self, key: str, parts: Sequence[tuple[Columns | None, int]], *, pin: bool = False) -> Columns:
        """Columns of several parts, one below the other.

        Args:
            key: the sample's.
            parts: columns and number of rows of each; None where all rows were `ABSENT`, but not in all parts.
            pin: into page-locked memory.

        Raises:
            DataError: the parts do not fit each other.
        """

    @abstractmethod
    def value(self, key: str, columns: Mapping[str, Any], row: int) -> Any:
        """A row's value as `collate` takes it, in memory of its own."""


class Stack(Rule):
    """Tensors, arrays or numbers of one shape and type become a tensor (B, ...)."""

    def collate(self, key: str, values: Sequence[Any]) -> Columns:
        """See `Rule.collate`; rows without a value are zero."""
        tensors = _tensors(key, values, "Declare Keep() for what is not a number.")
        present = [t for t in tensors if t is not None]
        like = present[0]
        for t in present:
            if t.shape != like.shape:
                cure = "Make them equal, or declare Pad() for lengths that differ."
                raise DataError(f"batch key {key!r}: values of shapes {tuple(like.shape)} and {tuple(t.shape)} cannot be stacked. {cure}")
        return {key: default_collate([torch.zeros_like(like) if t is None else t for t in tensors])}

    def join(self, key: str, parts: Sequence[tuple[Columns | None, int]], *, pin: bool = False) -> Columns:
        """See `Rule.join`."""
        like = _first(key, parts)
        columns = [like.new_zeros((rows, *like.shape[1:])) if part is None else cast(Tensor, part[key]) for part, rows in parts]
        for c in columns:
            _alike(key, like, c)
        if len(columns) == 1 and not pin:
            return {key: like}
        shape = (sum(len(c) for c in columns), *like.shape[1:])
        return {key: torch.cat(columns, out=torch.empty(shape, dtype=like.dtype, pin_memory=True) if pin else None)}

    def value(self, key: str, columns: Mapping[str, Any], row: int) -> Any:
        """See `Rule.value`."""
        return columns[key][row].clone()


class Pad(Rule):
    """Tensors (L, ...) of different lengths become (B, max L, ...), with a mask (B, max L) bool that is True where an entry is real.

    Args:
        mask: the mask's key; None: the key's own name with "_mask".
        value: what stands where the mask is False.
    """

    def __init__(self, mask: str | None = None, value: float = 0) -> None:
        self.mask, self.fill = mask, value

    def names(self, key: str) -> tuple[str, ...]:
        """The key and its mask."""
        return (key, self.mask or f"{key}_mask")

    def collate(self, key: str, values: Sequence[Any]) -> Columns:
        """See `Rule.collate`; rows without a value have length 0."""
        tensors = _tensors(key, values, "Declare Keep() for what is not a number.")
        like = next(t for t in tensors if t is not None)
        for t in tensors:
            if t is not None and (t.ndim == 0 or t.shape[1:] != like.shape[1:]):
                shapes = f"{tuple(like.shape)} and {tuple(t.shape)}"
                raise DataError(f"batch key {key!r}: values of shapes {shapes} cannot be padded. They need a length L, then equal sizes.")
        lengths = torch.tensor([0 if t is None else len(t) for t in tensors])
        longest = int(lengths.max())
        padded = like.new_full((len(tensors), longest, *like.shape[1:]), self.fill)
        for row, t in zip(padded, tensors, strict=True):
            if t is not None:
                row[: len(t)] = t
        name, mask = self.names(key)
        return {name: padded, mask: torch.arange(longest) < lengths[:, None]}

    def join(self, key: str, parts: Sequence[tuple[Columns | None, int]], *, pin: bool = False) -> Columns:
        """See `Rule.join`: as long as the longest part."""
        like = _first(key, parts)
        name, mask = self.names(key)
        rows = sum(n for _, n in parts)
        longest = max(int(part[name].shape[1]) for part, _ in parts if part is not None)
        padded = torch.empty((rows, longest, *like.shape[2:]), dtype=like.dtype, pin_memory=pin).fill_(self.fill)
        real = torch.zeros((rows, longest), dtype=torch.bool, pin_memory=pin)
        at = 0
        for part, n in parts:
            if part is not None:
                _alike(key, like[0], part[name][0])
                padded[at : at + n, : part[name].shape[1]] = part[name]
                real[at : at + n, : part[name].shape[1]] = part[mask]
            at += n
        return {name: padded, mask: real}

    def value(self, key: str, columns: Mapping[str, Any], row: int) -> Any:
        """See `Rule.value`: without the padding."""
        name, mask = self.names(key)
        return columns[name][row, : int(columns[mask][row].sum())].clone()


class Keep(Rule):
    """Values of any kind stay a list of B entries, in the order of the rows; between processes they are pickled.

    Tensors in it are moved to the device. Where memory is pinned (on GPUs) torch turns tuples into lists.
    """

    def collate(self, key: str, values: Sequence[Any]) -> Columns:
        """See `Rule.collate`; rows without a value hold None."""
        return {key: [None if v is ABSENT else v for v in values]}

    def join(self, key: str, parts: Sequence[tuple[Columns | None, int]], *, pin: bool = False) -> Columns:
        """See `Rule.join`."""
        return {key: [v for part, rows in parts for v in ([None] * rows if part is None else part[key])]}

    def value(self, key: str, columns: Mapping[str, Any], row: int) -> Any:
        """See `Rule.value`."""
        return columns[key][row]


class Drop(Rule):
    """The key does not enter batches."""

    def names(self, key: str) -> tuple[str, ...]:
        """None."""
        return ()

    def collate(self, key: str, values: Sequence[Any]) -> Columns:
        """See `Rule.collate`."""
        return {}

    def join(self, key: str, parts: Sequence[tuple[Columns | None, int]], *, pin: bool = False) -> Columns:
        """See `Rule.join`."""
        return {}

    def value(self, key: str, columns: Mapping[str, Any], row: int) -> Any:
        """See `Rule.value`."""
        return None


class Common(Rule):
    """One value for all samples of a batch, such as the token grid."""

    def collate(self, key: str, values: Sequence[Any]) -> Columns:
        """See `Rule.collate`."""
        present = [v for v in values if v is not ABSENT]
        for v in present:
            if v != present[0]:
                raise DataError(f"batch key {key!r}: {present[0]!r} and {v!r} in one batch; all of its samples need the same.")
        return {key: present[0]}

    def join(self, key: str, parts: Sequence[tuple[Columns | None, int]], *, pin: bool = False) -> Columns:
        """See `Rule.join`."""
        return self.collate(key, [ABSENT if part is None else part[key] for part, _ in parts])

    def value(self, key: str, columns: Mapping[str, Any], row: int) -> Any:
        """See `Rule.value`."""
        return columns[key]


_COLUMNS: dict[str, Rule] = {name: Stack() for name in ("images", "labels", "indices", "valid", "flipped")}
_MORE: dict[str, Rule] = {"features": Stack(), "deviation": Stack(), "grid": Common()}


class Rules:
    """The rules of a data set's keys, the package's own among them.

    Args:
        declared: rules by key; of two for one key the later one holds (a datamodule's, after its data set's).

    Attributes:
        extra: the declared rules.
        samples: rules of what a sample may hold besides `OWN`.
        columns: rules of everything a batch may hold, by the sample's key, or the batch's own.

    Raises:
        ConfigError: a key that is not a name, is one of the package's own, or stands for two things; or what is declared is not a rule.

    >>> sorted(Rules({"caption": Keep(), "text": Pad(mask="mask")}).names - Rules().names)
    ['caption', 'mask', 'text']
    """

    def __init__(self, *declared: Mapping[str, Rule]) -> None:
        self.extra: dict[str, Rule] = {key: rule for rules in declared for key, rule in rules.items()}
        taken = {*OWN, *_COLUMNS, *_MORE}
        for key, rule in cast("dict[str, Any]", self.extra).items():
            if not isinstance(rule, Rule):
                cure = "Write Stack(), Pad(), Keep() or Drop() of srcflow.data.rules."
                raise ConfigError(f"rules.{key}", rule, "is not a rule.", cure)
            for name in {key, *rule.names(key)}:
                if not name.isidentifier():
                    raise ConfigError(f"rules.{key}", name, "a batch's key is a name of letters, digits and underscores.")
                if name in taken or (name != key and name in self.extra) or rule.names(key).count(name) > 1:
                    raise ConfigError(f"rules.{key}", name, "stands for something else in a batch already.", "Choose another name.")
                taken.add(name)
        self.samples = {**_MORE, **self.extra}
        self.columns = {**_COLUMNS, **self.samples}
        self.names = frozenset(name for key, rule in self.columns.items() for name in rule.names(key))

    def checked(self, batch: Batch) -> Batch:
        """A batch that a data set has made whole, without what is to be dropped.

        Raises:
            DataError: a key without a rule.
        """
        columns = cast(Columns, batch)
        if self.names.issuperset(columns):
            return batch
        for key in columns:
            if key not in self.names and key not in self.columns:
                raise self.unknown(key)
        return cast(Batch, {key: column for key, column in columns.items() if key in self.names})

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> Columns:
        """What samples hold besides `OWN`, by its rules; nothing where none of them could be decoded.

        Raises:
            DataError: a key without a rule, or one that some of the samples lack.
        """
        good = [s for s in samples if "error" not in s]
        if not good:
            return {}
        keys = [k for k in good[0] if k not in OWN]
        if not keys and all(s.keys() <= OWN for s in good):
            return {}
        for key in keys:
            if key not in self.samples:
                raise self.unknown(key, f" of sample {good[0]['index']}")
        for s in good:
            if odd := sorted(({*s} - OWN) ^ {*keys}):
                if odd[0] not in self.samples:
                    raise self.unknown(odd[0], f" of sample {s['index']}")
                have, lack = (s, good[0]) if odd[0] in s else (good[0], s)
                raise _lacking(odd[0], f"sample {have['index']} has it, sample {lack['index']} of the same batch does not")
        found: Columns = {}
        for key in keys:
            found.update(self.samples[key].collate(key, [ABSENT if "error" in s else s[key] for s in samples]))
        return found

    def join(self, shares: Sequence[tuple[Columns, int, bool]], *, pin: bool = False) -> Columns:
        """Columns of several parts of a batch, one below the other.

        Args:
            shares: columns, number of rows, and whether any of them could be decoded.
            pin: into page-locked memory.

        Raises:
            DataError: parts that do not fit each other.
        """
        whole = next((columns for columns, _, some in shares if some), shares[0][0])
        for columns, _, some in shares:
            if some and (odd := sorted({*columns} ^ {*whole})):
                raise _lacking(odd[0], "some parts of a batch have it, others do not")
        joined: Columns = {}
        for key, rule in self.columns.items():
            if key in whole:
                joined.update(rule.join(key, [(columns if key in columns else None, rows) for columns, rows, _ in shares], pin=pin))
        return joined

    def rows(self, batch: Batch, which: Tensor) -> Columns:
        """The declared columns of some rows.

        Args:
            batch: of B rows.
            which: (B,) bool.
        """
        kept: list[bool] = which.tolist()
        found: Columns = {}
        for key, rule in self.extra.items():
            for name in rule.names(key):
                column = cast(Columns, batch).get(name)
                if isinstance(column, Tensor):
                    found[name] = column[which]
                elif column is not None:
                    found[name] = column if isinstance(rule, Common) else [v for v, k in zip(column, kept, strict=True) if k]
        return found

    def unknown(self, key: str, where: str = "") -> DataError:
        """What to raise for a key without a rule."""
        cure = f"Declare one in the data set's or the datamodule's `rules`: {{{key!r}: Keep()}}, or Stack(), Pad(), Drop()"
        return DataError(f"key {key!r}{where} has no rule for batches. {cure} (srcflow.data.rules).")


BUILT_IN = Rules()
"""Those of the package's own keys."""


def rules_of(data: Any, *more: Mapping[str, Rule]) -> Rules:
    """The rules of a data set's keys: what its attribute `rules` declares, and more.

    Raises:
        ConfigError: as `Rules` does.
    """
    declared = getattr(data, "rules", {})
    return Rules(declared, *more) if declared or any(more) else BUILT_IN


def _tensors(key: str, values: Sequence[Any], cure: str) -> list[Tensor | None]:
    """Values as tensors of one type; None for those that are absent."""
    found: list[Tensor | None] = []
    like: Tensor | None = None
    for v in values:
        try:
            t = None if v is ABSENT else v if isinstance(v, Tensor) else torch.as_tensor(np.array(v) if isinstance(v, np.ndarray) else v)
        except (TypeError, ValueError, RuntimeError) as e:
            raise DataError(f"batch key {key!r}: a value of type {type(v).__name__} is not a tensor, array or number. {cure}") from e
        like = t if like is None else like
        if t is not None and like is not None and t.dtype != like.dtype:
            raise DataError(f"batch key {key!r}: values of {like.dtype} and {t.dtype} in one batch. Give all the same type.")
        found.append(t)
    return found


def _first(key: str, parts: Sequence[tuple[Columns | None, int]]) -> Tensor:
    return next(cast(Tensor, part[key]) for part, _ in parts if part is not None)


def _alike(key: str, a: Tensor, b: Tensor) -> None:
    if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
        kinds = f"{a.dtype} (B, {str(tuple(a.shape[1:]))[1:]} and {b.dtype} (B, {str(tuple(b.shape[1:]))[1:]}"
        raise DataError(f"batch key {key!r}: {kinds} in one batch. Give all samples the same type and sizes.")


def _lacking(key: str, how: str) -> DataError:
    return DataError(f"key {key!r}: {how}. Give it to all samples, with an empty value where there is nothing to say.")
