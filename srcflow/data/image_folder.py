"""Images in a folder, with one sub-folder per class or without classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from srcflow.data.images import ImageDataset, hash_of
from srcflow.data.strings import StringTable
from srcflow.data.transforms import EXTENSIONS, ImageTransform
from srcflow.errors import ConfigError, DataError
from srcflow.types import NULL_LABEL


def class_names(folder: str | os.PathLike[str]) -> list[str]:
    """Sub-folders in sorted order, hidden ones left out; a class's label is its position.

    Raises:
        DataError: no such folder, or it cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder.")
    try:
        return sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))
    except OSError as e:
        raise DataError(f"{root}: cannot be read: {e}.") from e


class ImageFolderDataset(ImageDataset):
    """Every image below a folder, in sorted order (files of other kinds and hidden ones are no images and are ignored).

    Args:
        folder: `folder/<class>/**/image.png`, or, without classes, any images below it.
        transform: from RGB image to tensor.
        classes: class names in the order of their labels; None: no labels.
        tolerant: as in `ImageSource`.

    Raises:
        DataError: no such folder, files or folders that cannot be read (lists them), no image in it, images beside the class folders, or
            a class folder that `classes` does not have.
    """

    def __init__(
        self, folder: str | os.PathLike[str], transform: ImageTransform, classes: Sequence[str] | None = None, tolerant: bool = False
    ) -> None:
        super().__init__(transform, len(classes) if classes else 0, tolerant)
        self.folder = Path(folder)
        found = class_names(folder)
        if classes and (unknown := [c for c in found if c not in classes]):
            raise DataError(
                f"{folder}: the classes {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''} ({len(unknown)} in all) are not among "
                f"this run's {len(classes)}: {', '.join(list(classes)[:5])} ..."
            )
        names, labels, sizes = [], [], []
        unread: list[OSError] = []
        for directory, folders, files in os.walk(self.folder, onerror=unread.append, followlinks=True):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            for file in files:
                if not file.startswith(".") and file.rpartition(".")[2].lower() in EXTENSIONS:
                    path = Path(directory, file)
                    try:
                        sizes.append(path.stat().st_size)
                    except OSError as e:  # a link to nothing
                        unread.append(e)
                        continue
                    names.append(path.relative_to(self.folder).as_posix())
        if unread:
            shown = [str(e) for e in unread[:20]] + ([f"... and {len(unread) - 20} more"] if len(unread) > 20 else [])
            raise DataError(f"{folder}: {len(unread)} files or folders cannot be read:\n  " + "\n  ".join(shown))
        order = sorted(range(len(names)), key=names.__getitem__)
        if not names:
            raise DataError(f"{folder}: no image in it or below it (known extensions: {', '.join(EXTENSIONS)}).")
        for name in names:
            top, slash, _ = name.partition("/")
            if classes and not slash:
                raise DataError(f"{folder}: {name} lies beside the class folders and has no label. Move it, or set data.num_classes: 0.")
            labels.append(classes.index(top) if classes else NULL_LABEL)
        self.names = StringTable.of(names[i] for i in order)
        self.labels = [labels[i] for i in order]
        self.sizes = [sizes[i] for i in order]

    def __len__(self) -> int:
        return len(self.names)

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
        DataError: no such folder.
        ConfigError: another number of class folders than `num_classes`.
    """
    if num_classes == 0:
        return None
    found = class_names(folders[0])
    if len(found) != num_classes:
        what = f"{len(found)} class folders" if found else "no class folders"
        cure = f"Set data.num_classes: {len(found)}" + (
            "" if found else " for images without labels, or sort them into one folder per class"
        )
        raise ConfigError(
            "data.num_classes", num_classes, f"{folders[0]} has {what}" + (f" ({', '.join(found[:5])} ...)." if found else "."), cure + "."
        )
    return found
