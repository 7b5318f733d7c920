"""Raw features of images in memory-mapped arrays: written once by `srcflow encode`, read at random by the stages that follow.

A store is a folder:

    features.npy   (M, N, D) float16 | float32 | uint16 (the bits of bfloat16)
    deviation.npy  as features, where the autoencoder has one: the standard deviation of each feature
    images.npy     (M, 3, H, W) uint8
    labels.npy     (M,) int64, -1 where there is none
    flipped.npy    (M,) bool
    keys.npy, key_offsets.npy   UTF-8 bytes of the n keys and where each begins
    extra_*        further keys of the samples, see `store_extras`
    manifest.json  see `manifest.Manifest`

M = n, or 2n where each image was also stored mirrored: row i + n is the mirror image of row i. The row is the global sample index.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from srcflow.data.manifest import AGAIN, DTYPES, Manifest, is_store
from srcflow.data.rules import BUILT_IN, Rules
from srcflow.data.sampler import Draw
from srcflow.data.store_extras import ExtrasWriter, StoredExtras
from srcflow.data.strings import StringTable
from srcflow.errors import ArtifactError, ConfigError, DataError, ShapeError
from srcflow.files import check_writable
from srcflow.types import NULL_LABEL, Batch

_STORED: dict[str, Any] = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}


class FeatureStoreWriter:
    """Writes a store into `<path>.partial` and renames it when it is complete, so that a reader never sees an unfinished one.

    Use it as a context manager: leaving it without an error closes it, leaving it with one removes what was written.

    Args:
        path: the store's folder.
        n: images.
        tokens: N.
        dim: D.
        image_size: (height, width) of the images.
        dtype: of the stored features: float16, bfloat16 or float32.
        manifest: further fields of `Manifest` (grid is required; encoder, transform, source, precision, versions).
        flip: room for the mirror images, rows n .. 2n - 1.
        deviation: room for the deviation of the features, too.
        rules: of the further keys that `write` is given.

    Raises:
        ArtifactError: `path` exists.
        ConfigError: an unknown dtype, nothing to write, or nothing can be written at `path`.
        DataError: the disk has no room for the store.
        ShapeError: the grid does not have N tokens.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        n: int,
        tokens: int,
        dim: int,
        image_size: tuple[int, int],
        dtype: str = "float16",
        manifest: Mapping[str, Any],
        flip: bool = False,
        deviation: bool = False,
        rules: Rules = BUILT_IN,
    ) -> None:
        self.path = Path(path)
        if dtype not in DTYPES:
            raise ConfigError("dtype", dtype, "features cannot be stored like this.", f"Known: {', '.join(DTYPES)}.")
        if n < 1:
            raise ConfigError("n", n, "a store has at least one image.")
        self.manifest = Manifest(
            count=n, flip=flip, tokens=tokens, dim=dim, dtype=dtype, image_size=image_size, deviation=deviation, **manifest
        )
        if self.manifest.grid[0] * self.manifest.grid[1] != tokens:
            raise ShapeError(f"grid = {self.manifest.grid} does not have tokens = {tokens}")
        check_target(self.path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        shutil.rmtree(self.partial, ignore_errors=True)  # left over from a run that was killed
        self.partial.mkdir(parents=True)
        rows = self.manifest.rows
        try:
            self._features = self._array("features", _STORED[dtype], (rows, tokens, dim))
            self._deviation = self._array("deviation", _STORED[dtype], (rows, tokens, dim)) if deviation else None
            self._images = self._array("images", np.uint8, (rows, 3, *image_size))
            self._labels = self._array("labels", np.int64, (rows,))
            self._flipped = self._array("flipped", np.bool_, (rows,))
        except BaseException:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise
        self.rules, self._extras = rules, ExtrasWriter(self.partial, n, rules)
        self._keys: list[str | None] = [None] * n
        self._written = np.zeros(rows, np.bool_)

    def _array(self, name: str, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        """An array on the disk whose whole room is taken at once: a page that finds none later would kill the process (SIGBUS)."""
        file = self.partial / f"{name}.npy"
        size = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            if size > shutil.disk_usage(self.partial).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            array = np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)
            _reserve(file)
        except (OSError, ValueError, OverflowError) as e:
            cure = "Make room, name a folder on another disk, or store less: --dtype float16, no --flip, --limit."
            raise DataError(f"{self.path}: no room for {name} {shape}, {size / 2**30:.3g} GiB: {e}. {cure}") from e
        return array

    def write(
        self,
        indices: Tensor,
        features: Tensor,
        images: Tensor,
        labels: Tensor,
        keys: Sequence[str],
        *,
        mirrored: bool = False,
        deviation: Tensor | None = None,
        extras: Mapping[str, Any] | None = None,
    ) -> None:
        """Store a run of images.

        Args:
            indices: (B,) positions 0 .. n - 1 of the images; mirror images go to position + n.
            features: (B, N, D), finite, also in the stored dtype.
            images: (B, 3, H, W) uint8, mirrored if `mirrored`.
            labels: (B,) int64.
            keys: B names.
            mirrored: these are the mirror images.
            deviation: (B, N, D), finite and not negative, of a store with room for it.
            extras: columns of further keys, B rows each; a mirror image has its original's.

        Raises:
            ShapeError: shapes that do not fit the store, or a deviation that it has no room for, or lacks.
            DataError: features that are not finite, or overflow in the stored dtype; a deviation below 0; extras that cannot be stored.
        """
        m = self.manifest
        b = len(indices)
        if m.deviation != (deviation is not None):
            have, told = ("no deviation", "deviation=True") if m.deviation else ("a deviation", "deviation=False")
            raise ShapeError(f"{have} was given to the store {self.path}, which was made with {told}")
        for name, tensor, shape in (
            ("features", features, (b, m.tokens, m.dim)),
            ("images", images, (b, 3, *m.image_size)),
            ("labels", labels, (b,)),
            ("deviation", features if deviation is None else deviation, (b, m.tokens, m.dim)),
        ):
            if tuple(tensor.shape) != shape:
                raise ShapeError(f"{name}: shape {tuple(tensor.shape)}, the store {self.path} has {shape}")
        if len(keys) != b or images.dtype != torch.uint8 or (mirrored and not m.flip):
            raise ShapeError(
                f"wanted: {b} keys, uint8 images, mirror images only with flip; got {len(keys)} keys, {images.dtype}, mirrored={mirrored}"
            )
        stored = self._stored("features", features, keys)
        deviations = None if deviation is None else self._stored("deviation", deviation, keys)
        if deviation is not None and bool((deviation < 0).any()):
            raise DataError(f"the deviation of {keys[0]} .. {keys[-1]} is negative ({float(deviation.min()):g}), not a standard deviation.")
        if not mirrored:
            self._extras.write(indices, extras or {})
        rows = indices.numpy() + (m.count if mirrored else 0)
        self._features[rows] = stored
        if self._deviation is not None:
            self._deviation[rows] = deviations
        self._images[rows] = images.cpu().numpy()
        self._labels[rows] = labels.cpu().numpy()
        self._flipped[rows] = mirrored
        self._written[rows] = True
        for i, k in zip(indices.tolist(), keys, strict=True):
            self._keys[i] = k

    def _stored(self, name: str, values: Tensor, keys: Sequence[str]) -> NDArray[Any]:
        """Values as they stand in the files."""
        dtype = self.manifest.dtype
        stored = values.detach().to("cpu", DTYPES[dtype])
        if not bool(torch.isfinite(stored).all()):
            cure = "Store them as bfloat16 or float32 if they are large."
            raise DataError(f"{name} of {keys[0]} .. {keys[-1]} are not finite as {dtype}. {cure}")
        return stored.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else stored.numpy()

    def close(self) -> Path:
        """Finish the store.

        Returns:
            Its folder.

        Raises:
            DataError: rows are missing.
        """
        missing = np.flatnonzero(~self._written)
        if len(missing):
            raise DataError(f"{self.path}: {len(missing)} of {self.manifest.rows} rows were never written, e.g. row {missing[0]}.")
        for array in (self._features, self._deviation, self._images, self._labels, self._flipped):
            if isinstance(array, np.memmap):
                array.flush()
        keys = StringTable.of(k or "" for k in self._keys)
        try:
            np.save(self.partial / "keys.npy", keys.blob)
            np.save(self.partial / "key_offsets.npy", keys.offsets)
            self.manifest = replace(self.manifest, extras=self._extras.close())
            self.manifest.save(self.partial)
            os.replace(self.partial, self.path)
        except OSError as e:
            raise DataError(f"{self.path} could not be finished: {e.strerror or e}. Make room, and encode again.") from e
        return self.path

    def __enter__(self) -> FeatureStoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self.close()
        finally:
            self._extras.abandon()
            shutil.rmtree(self.partial, ignore_errors=True)


def check_target(path: str | os.PathLike[str], key: str = "path") -> None:
    """Refuse a place where no store can be written, before anything is encoded.

    Args:
        path: the store's folder.
        key: the option that names it, for the message.

    Raises:
        ArtifactError: it exists.
        ConfigError: nothing can be written there.
    """
    check_writable(Path(path).with_name(Path(path).name + ".partial"), key, directory=True)
    if os.path.lexists(path):
        raise ArtifactError(f"{path} exists{' and is a feature store' if is_store(path) else ''}. Remove it, or name another folder.")


def _reserve(file: Path) -> None:
    """Take a file's room on the disk, where the file system can be asked for it."""
    if hasattr(os, "posix_fallocate"):
        with file.open("rb+") as f:
            try:
                os.posix_fallocate(f.fileno(), 0, file.stat().st_size)
            except OSError as e:
                if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise


class FeatureStoreDataset(Dataset[Batch]):
    """Reads a store; whole batches at a time (`__getitems__`), so that no worker is needed.

    Args:
        path: the store's folder.
        with_images: also yield the images.
        originals_only: leave the mirror images out (evaluation).

    Attributes:
        rules: of the further keys that are stored.

    Raises:
        ArtifactError: no finished store there, or arrays that disagree with the manifest.
    """

    def __init__(self, path: str | os.PathLike[str], *, with_images: bool = True, originals_only: bool = False) -> None:
        self.path, self.with_images = Path(path), with_images
        self.manifest = m = Manifest.load(self.path)
        self._length = m.count if originals_only else m.rows
        wanted: dict[str, tuple[tuple[int, ...] | None, Any]] = {
            "features": ((m.rows, m.tokens, m.dim), _STORED[m.dtype]),
            "images": ((m.rows, 3, *m.image_size), np.uint8),
            "labels": ((m.rows,), np.int64),
            "flipped": ((m.rows,), np.bool_),
            "keys": (None, np.uint8),
            "key_offsets": ((m.count + 1,), np.int64),
        }
        if m.deviation:
            wanted["deviation"] = wanted["features"]
        self._arrays: dict[str, NDArray[Any]] = {}
        for name, (shape, dtype) in wanted.items():
            array = self._open(name)
            if array.shape != (shape or (array.size,)):
                raise ArtifactError(f"{self.path / name}.npy: shape {array.shape}, its manifest says {shape or 'a row'}. {AGAIN}")
            if array.dtype != dtype:
                raise ArtifactError(f"{self.path / name}.npy: dtype {array.dtype}, it should be {np.dtype(dtype)}. {AGAIN}")
        self.labels: NDArray[np.int64] = np.array(self._open("labels"))
        self.flipped: NDArray[np.bool_] = np.array(self._open("flipped"))
        self.keys = StringTable(self._open("keys"), np.array(self._open("key_offsets")))
        ends = self.keys.offsets
        if ends[0] != 0 or ends[-1] != len(self.keys.blob) or bool((np.diff(ends) < 0).any()):
            raise ArtifactError(f"{self.path}/key_offsets.npy is damaged: it does not divide keys.npy. {AGAIN}")
        self._extras = StoredExtras(self.path, m.count, m.extras)
        self.rules = self._extras.rules

    def _open(self, name: str) -> NDArray[Any]:
        """The array, mapped once in each process."""
        if name not in self._arrays:
            file = self.path / f"{name}.npy"
            array: NDArray[Any]
            try:
                try:
                    array = np.lib.format.open_memmap(file, mode="r")
                except ValueError:
                    if name != "keys":
                        raise
                    with file.open("rb") as f:  # keys that are all empty cannot be mapped
                        array = np.lib.format.read_array(f, allow_pickle=False)
            except Exception as e:  # a damaged header can raise anything
                raise ArtifactError(f"{file} cannot be read: {e or type(e).__name__}. {AGAIN}") from e
            self._arrays[name] = np.asarray(array)
        return self._arrays[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}  # workers map the files themselves

    def __len__(self) -> int:
        return self._length

    def key(self, index: int) -> str:
        """The source's name of the image in a row; a mirror image has its original's."""
        return self.keys[index % self.manifest.count]

    def __getitem__(self, draw: Draw | int) -> Batch:
        return self.__getitems__([draw])

    def __getitems__(self, draws: Sequence[Draw | int]) -> Batch:
        """A batch of rows; `features` and `deviation`, if it is there, in the stored dtype; further keys as the encoded data had them."""
        pairs = [(d.index, d.valid) if isinstance(d, Draw) else (int(d), True) for d in draws]
        rows = np.array([i for i, _ in pairs], np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self._length):
            raise IndexError(f"rows {rows.min()} .. {rows.max()} of {self._length}")
        batch = Batch(
            features=self.features(rows),
            grid=self.manifest.grid,
            labels=torch.from_numpy(self.labels[rows]),
            indices=torch.from_numpy(rows),
            valid=torch.tensor([v for _, v in pairs], dtype=torch.bool),
            flipped=torch.from_numpy(self.flipped[rows]),
        )
        if self.manifest.deviation:
            batch["deviation"] = self._tokens("deviation", rows)
        if self.with_images:
            batch["images"] = torch.from_numpy(self._open("images")[rows])
        if self.rules:
            cast(dict[str, Any], batch).update(self._extras.columns((rows % self.manifest.count).tolist()))
        return batch

    def features(self, rows: NDArray[np.int64]) -> Tensor:
        """(B, N, D) features of some rows, in the stored dtype."""
        return self._tokens("features", rows)

    def _tokens(self, name: str, rows: NDArray[np.int64]) -> Tensor:
        taken = self._open(name)[rows]
        return torch.from_numpy(taken.view(np.int16)).view(torch.bfloat16) if self.manifest.dtype == "bfloat16" else torch.from_numpy(taken)

    def check(self, expected: Mapping[str, Any]) -> None:
        """Refuse a store that does not belong to a run.

        Args:
            expected: manifest fields, e.g. {"encoder": {"spec": ..., "weights": ...}}; fields that are left out are not compared.

        Raises:
            ManifestMismatchError: names each field that differs.
        """
        self.manifest.check(expected, f"feature store {self.path}")

    def check_labels(self, num_classes: int) -> None:
        """Refuse labels that the model has no class for.

        Raises:
            DataError: names the first such row.
        """
        bad = np.flatnonzero((self.labels < 0) | (self.labels >= num_classes)) if num_classes else np.zeros(0, np.int64)
        if len(bad):
            found = f"label {self.labels[bad[0]]} of {self.key(int(bad[0]))!r}"
            kind = "has no labels" if self.labels[bad[0]] == NULL_LABEL else "has other classes"
            raise DataError(
                f"feature store {self.path} {kind}: {found} is not in 0 .. {num_classes - 1} (data.num_classes = {num_classes})."
            )
