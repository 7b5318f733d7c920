"""Further keys of a feature store: what samples hold besides image and label, by the rules of their batches.

Each key has two files, of which the first is a run of bytes and the second says where each image's are:

    extra_<key>.bin         values one after the other: numbers in this machine's order, or UTF-8
    extra_<key>_spans.npy   (n, 2) int64: first byte and number of bytes, of each image (a mirror image has its original's values)

The manifest's `extras` say how they are read: {key: {"rule": "Stack" | "Pad" | "Keep", "dtype", "shape" (of a value; of an entry, for Pad),
"mask", "fill"}}; Keep holds strings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from srcflow.data.rules import Columns, Keep, Pad, Rule, Rules, Stack
from srcflow.errors import ArtifactError, DataError

Kinds = dict[str, dict[str, Any]]
_BYTES = 8  # of the alignment of numbers


def fits(kind: Any) -> bool:
    """Whether a manifest's `extras` can be those of a store."""
    return isinstance(kind, dict) and all(k.isidentifier() and _fits(v) for k, v in kind.items())


def _fits(kind: Any) -> bool:
    if not isinstance(kind, dict) or kind.get("rule") not in ("Stack", "Pad", "Keep"):
        return False
    if kind["rule"] == "Keep":
        return set(kind) == {"rule"}
    sizes, names = kind.get("shape"), {"rule", "dtype", "shape"} | ({"mask", "fill"} if kind["rule"] == "Pad" else set())
    whole = isinstance(sizes, list) and all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 2**40 for s in sizes)
    mask = kind["rule"] == "Stack" or (isinstance(kind.get("mask"), str) and isinstance(kind.get("fill"), int | float))
    return whole and mask and set(kind) == names and isinstance(getattr(torch, str(kind.get("dtype")), None), torch.dtype)


def rules_in(kinds: Mapping[str, Mapping[str, Any]]) -> dict[str, Rule]:
    """The rules by which stored values become batches."""
    return {k: Keep() if v["rule"] == "Keep" else Stack() if v["rule"] == "Stack" else Pad(v["mask"], v["fill"]) for k, v in kinds.items()}


class ExtrasWriter:
    """Appends the further keys of batches.

    Args:
        folder: of the store.
        n: images.
        rules: of the batches.

    Attributes:
        kinds: for the manifest; known after the first `write`.
    """

    def __init__(self, folder: Path, n: int, rules: Rules) -> None:
        self.folder, self.n, self.rules = folder, n, rules
        self.kinds: Kinds | None = None
        self._files: dict[str, BinaryIO] = {}
        self._spans: dict[str, NDArray[np.int64]] = {}

    def write(self, indices: Tensor, columns: Mapping[str, Any]) -> None:
        """Store the values of some images.

        Args:
            indices: (B,) positions 0 .. n - 1.
            columns: of the declared keys, B rows each.

        Raises:
            DataError: values that cannot be stored, or of other keys, types or sizes than those before; or the disk is full.
        """
        rows = range(len(indices))
        values = {
            key: [rule.value(key, columns, row) for row in rows]
            for key, rule in self.rules.extra.items()
            if rule.names(key) and key in columns
        }
        kinds = {key: self._kind(key, self.rules.extra[key], found) for key, found in values.items()}
        if self.kinds is None:
            self.kinds = kinds
            for key in kinds:
                self._files[key] = (self.folder / f"extra_{key}.bin").open("wb")
                self._spans[key] = np.full((self.n, 2), -1, np.int64)
        if kinds != self.kinds:
            odd = next(k for k in {**self.kinds, **kinds} if kinds.get(k) != self.kinds.get(k))
            now, before = kinds.get(odd, "nothing"), self.kinds.get(odd, "nothing")
            raise DataError(f"key {odd!r}: {now} after {before}. All images of a store need the same keys, types and sizes.")
        for key, found in values.items():
            file, spans = self._files[key], self._spans[key]
            for index, value in zip(indices.tolist(), found, strict=True):
                data = value.encode(errors="surrogateescape") if isinstance(value, str) else _bytes(value)
                try:
                    start = file.tell()
                    file.write(data + b"\0" * (-len(data) % _BYTES))
                except OSError as e:
                    raise DataError(f"{file.name}: no room: {e.strerror or e}. Make room, or name a folder on another disk.") from e
                spans[index] = start, len(data)

    def close(self) -> Kinds:
        """Finish the files. Returns the manifest's `extras`. Raises OSError if the disk is full."""
        for key, file in self._files.items():
            file.close()
            np.save(self.folder / f"extra_{key}_spans.npy", self._spans[key])
        return self.kinds or {}

    def abandon(self) -> None:
        """Close what is open."""
        for file in self._files.values():
            file.close()

    @staticmethod
    def _kind(key: str, rule: Rule, values: Sequence[Any]) -> dict[str, Any]:
        if isinstance(rule, Keep):
            if odd := next((v for v in values if not isinstance(v, str)), None):
                cure = "Declare Drop() for the key, or give strings or tensors."
                raise DataError(f"key {key!r}: a feature store keeps lists of strings, not of {type(odd).__name__}. {cure}")
            return {"rule": "Keep"}
        if isinstance(rule, Stack | Pad) and all(isinstance(v, Tensor) for v in values):
            like = values[0]
            kind: dict[str, Any] = {"rule": "Stack", "dtype": str(like.dtype).removeprefix("torch."), "shape": list(like.shape)}
            if isinstance(rule, Pad):
                kind |= {"rule": "Pad", "shape": list(like.shape[1:]), "mask": rule.names(key)[1], "fill": rule.fill}
            return kind
        cure = "Declare Stack(), Pad(), Keep() or Drop()."
        raise DataError(f"key {key!r}: a feature store cannot hold what {type(rule).__name__} makes of it. {cure}")


class StoredExtras:
    """Reads them; files are mapped when first needed, once in each process.

    Args:
        folder: of the store.
        n: images.
        kinds: the manifest's `extras`.

    Raises:
        ArtifactError: files that are missing or damaged.
    """

    def __init__(self, folder: Path, n: int, kinds: Mapping[str, Mapping[str, Any]]) -> None:
        self.folder, self.n, self.kinds = folder, n, kinds
        self.rules = rules_in(kinds)
        self._spans: dict[str, NDArray[np.int64]] = {}
        self._blobs: dict[str, NDArray[np.uint8]] = {}
        for key, kind in kinds.items():
            self._open(key)
            unit, lengths = _unit(kind), self._spans[key][:, 1]
            wrong = lengths != unit if kind["rule"] == "Stack" else lengths % max(unit, 1) != 0
            if bool(wrong.any()):
                raise self._damaged(key, f"its values do not have the manifest's size of {unit} bytes")

    def _open(self, key: str) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        if key not in self._blobs:
            file = self.folder / f"extra_{key}.bin"
            try:
                spans = np.load(self.folder / f"extra_{key}_spans.npy", allow_pickle=False)
                size = file.stat().st_size
                blob = np.asarray(np.memmap(file, np.uint8, "r")) if size else np.zeros(0, np.uint8)
            except Exception as e:  # a damaged header can raise anything
                raise self._damaged(key, f"it cannot be read: {e or type(e).__name__}") from e
            if spans.shape != (self.n, 2) or spans.dtype != np.int64:
                raise self._damaged(key, f"its spans are {spans.dtype} {spans.shape}, not int64 {(self.n, 2)}")
            if bool((spans < 0).any()) or bool((spans.sum(1) > size).any()):
                raise self._damaged(key, "its spans lie outside its values")
            self._spans[key], self._blobs[key] = spans, blob
        return self._spans[key], self._blobs[key]

    def _damaged(self, key: str, why: str) -> ArtifactError:
        return ArtifactError(f"{self.folder}/extra_{key}: {why}. Encode again with `srcflow encode`.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_spans": {}, "_blobs": {}}  # workers map the files themselves

    def columns(self, images: Sequence[int]) -> Columns:
        """The columns of some images, as the rules of the encoded data made them.

        Args:
            images: positions 0 .. n - 1.
        """
        found: Columns = {}
        for key, kind in self.kinds.items():
            spans, blob = self._open(key)
            pieces = [blob[start : start + length] for start, length in spans[np.asarray(images, np.int64)].tolist()]
            values = [bytes(p).decode(errors="surrogateescape") if kind["rule"] == "Keep" else _tensor(p, kind) for p in pieces]
            found.update(self.rules[key].collate(key, values))
        return found


def _unit(kind: Mapping[str, Any]) -> int:
    """Bytes of a value, or of an entry of it."""
    if kind["rule"] == "Keep":
        return 1
    dtype: torch.dtype = getattr(torch, kind["dtype"])
    return int(math.prod(kind["shape"])) * dtype.itemsize


def _bytes(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""


def _tensor(piece: NDArray[np.uint8], kind: Mapping[str, Any]) -> Tensor:
    dtype, shape = getattr(torch, kind["dtype"]), list(kind["shape"])
    if kind["rule"] == "Pad":
        unit = _unit(kind)
        shape = [len(piece) // unit if unit else 0, *shape]
    if not len(piece):
        return torch.zeros(shape, dtype=dtype)
    return torch.from_numpy(np.array(piece)).view(dtype).reshape(shape)
