"""Images in a folder, with one sub-folder per class or without classes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from srcflow.data.folder_walk import class_names, walk
from srcflow.data.images import ImageDataset, hash_of
from srcflow.data.strings import StringTable
from srcflow.data.transforms import EXTENSIONS, ImageTransform
from srcflow.errors import ConfigError, DataError
from srcflow.types import NULL_LABEL


class ImageFolderDataset(ImageDataset):
    """Every image below a folder, in sorted order; `folder_walk` says what counts as one.

    Args:
        folder: `folder/<class>/**/image.png`, or, without classes, any images below it.
        transform: from RGB image to tensor.
        classes: class names in the order of their labels; None: no labels.
        tolerant: as in `ImageSource`.

    Attributes:
        labels: of every image.
        sizes: of every image's file, in bytes.
        unused: one line about the files that are not used; empty where there are none.

    Raises:
        DataError: no such folder, files or folders that cannot be read (lists them), no image in it, images beside the class folders, or
            class folders that `classes` does not have or that have no images.
    """

    def __init__(
        self, folder: str | os.PathLike[str], transform: ImageTransform, classes: Sequence[str] | None = None, tolerant: bool = False
    ) -> None:
        super().__init__(transform, len(classes) if classes else 0, tolerant)
        self.folder = Path(folder)
        found = walk(folder)
        self.unused = found.summary()
        if classes and (unknown := [c for c in found.classes if c not in classes]):
            raise DataError(
                f"{folder}: the classes {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''} ({len(unknown)} in all) are not among "
                f"this run's {len(classes)}: {', '.join(list(classes)[:5])} ..."
            )
        if not found.names:
            beside = f" {self.unused}" if self.unused else ""
            raise DataError(f"{folder}: no image in it or below it (known endings: {', '.join(EXTENSIONS)}).{beside}")
        if classes:
            found.check_classes()
        label = {name: i for i, name in enumerate(classes or [])}
        self.names = StringTable.of(found.names)
        self.labels = [label[name.partition("/")[0]] if classes else NULL_LABEL for name in found.names]
        self.sizes = found.sizes

    def __len__(self) -> int:
        return len(self.names)

    def label_counts(self) -> dict[int, int] | None:
        """How many images have which label; None without labels."""
        return dict(Counter(self.labels)) if self.num_classes else None

    def key(self, index: int) -> str:
        return self.names[index]

    def where(self, index: int) -> str:
        return str(self.folder / self.names[index])

    def read(self, index: int) -> tuple[bytes, int]:
        try:
            return (self.folder / self.names[index]).read_bytes(), self.labels[index]
        except OSError as e:
            raise DataError(f"{self.where(index)}: cannot be read: {e}. The folder changed while it was in use.") from e

    def fingerprint(self) -> str:
        return hash_of((self.names[i], self.sizes[i], self.labels[i]) for i in range(len(self)))


def resolve_classes(folders: Sequence[str | os.PathLike[str]], num_classes: int) -> list[str] | None:
    """The class names of a data set whose first folder has all of them.

    Args:
        folders: those of the splits in use, training first.
        num_classes: how many there must be; 0: no labels, None is returned.

    Raises:
        DataError: no such folder, or class folders without images account for the difference.
        ConfigError: another number of class folders than `num_classes`.
    """
    if num_classes == 0:
        return None
    found = class_names(folders[0])
    if len(found) != num_classes:
        whole = walk(folders[0])
        if whole.names and found:
            whole.check_classes()
        what = f"{len(found)} class folders" if found else "no class folders"
        cure = f"Set data.num_classes: {len(found)}" + (
            "" if found else " for images without labels, or sort them into one folder per class"
        )
        raise ConfigError(
            "data.num_classes", num_classes, f"{folders[0]} has {what}" + (f" ({', '.join(found[:5])} ...)." if found else "."), cure + "."
        )
    return found
