"""Which files of a folder are images: the one rule for data sets and for what makes shards of them.

Links are followed. Hidden entries and what systems leave in folders are left out, files of other kinds too; both are counted. What
cannot be read, links to nothing and links in a circle are an error that lists them all: no image is lost in silence.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from srcflow.data.transforms import EXTENSIONS
from srcflow.errors import DataError

LEFT_BY_SYSTEMS = frozenset(
    {"__macosx", "@eadir", "lost+found", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "#recycle", "@recycle"}
)
"""Names of files and folders that no user made, in lower case; names that begin with a dot count as such, too."""
SHOWN = 20


def is_left_out(name: str) -> bool:
    """Whether an entry of that name is hidden, or what a system leaves in folders.

    >>> is_left_out("._x.png"), is_left_out("__MACOSX"), is_left_out("Thumbs.db"), is_left_out("cat")
    (True, True, True, False)
    """
    return name.startswith(".") or name.lower() in LEFT_BY_SYSTEMS


def ending(name: str) -> str:
    """What follows the last dot of a file's name, in lower case; empty where there is none."""
    return name.rpartition(".")[2].lower() if "." in name else ""


@dataclass
class Walk:
    """What is in a folder and below it. Names are relative to it, with slashes.

    Args:
        folder: which.
        names: images, in sorted order.
        sizes: of these, in bytes.
        classes: sub-folders of the folder itself, in sorted order.
        others: files of other kinds.
        left_out: hidden and system entries, such as .DS_Store or __MACOSX; what is in such a folder is not looked at.
    """

    folder: Path
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def empty_classes(self) -> list[str]:
        """A line for each sub-folder without images: its name, and what it holds instead."""
        filled = {name.partition("/")[0] for name in self.names}
        lines = []
        for name in (c for c in self.classes if c not in filled):
            inside = _kinds(o for o in self.others if o.startswith(f"{name}/"))
            if hidden := sum(o.startswith(f"{name}/") for o in self.left_out):
                inside = f"{inside + ', ' if inside else ''}{hidden} hidden"
            lines.append(f"{name} ({inside or 'nothing in it'})")
        return lines

    def check_classes(self) -> None:
        """Refuse folders whose sub-folders are not classes: each must have images, and no image may stand beside them.

        Raises:
            DataError: says which.
        """
        if empty := self.empty_classes():
            more = f" and {len(empty) - SHOWN} more" if len(empty) > SHOWN else ""
            raise DataError(
                f"{self.folder}: {len(empty)} of {len(self.classes)} class folders have no images: {', '.join(empty[:SHOWN])}{more}. "
                f"A class that is never seen would be trained and sampled. Fill or remove them (known endings: {', '.join(EXTENSIONS)})."
            )
        if stray := next((name for name in self.names if "/" not in name), None):
            raise DataError(
                f"{self.folder}: {stray} lies beside the class folders and has no label. Move it, or set data.num_classes: 0 "
                "for images without labels."
            )

    def summary(self) -> str:
        """One line about what is not used; empty where there is nothing."""
        parts = []
        if self.others:
            parts.append(f"{len(self.others)} files of other kinds ({_kinds(self.others)}), e.g. {self.others[0]}")
        if self.left_out:
            parts.append(f"{len(self.left_out)} hidden or system entries, e.g. {self.left_out[0]}")
        return f"{self.folder}: not used: {'; '.join(parts)}." if parts else ""


def _kinds(names: Iterable[str]) -> str:
    """How many files have which ending."""
    counts = Counter(ending(name.rpartition("/")[2]) for name in names)
    shown = [f"{n} .{kind}" if kind else f"{n} without an ending" for kind, n in counts.most_common(5)]
    rest = sum(counts.values()) - sum(n for _, n in counts.most_common(5))
    return ", ".join([*shown, *([f"{rest} more"] if rest else [])])


def class_names(folder: str | os.PathLike[str]) -> list[str]:
    """Sub-folders in sorted order, without those that are hidden or of systems; a class's label is its position.

    Raises:
        DataError: no such folder, or it cannot be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder.")
    try:
        return sorted(d.name for d in root.iterdir() if d.is_dir() and not is_left_out(d.name))
    except OSError as e:
        raise DataError(f"{root}: cannot be read: {e}.") from e


def walk(folder: str | os.PathLike[str]) -> Walk:
    """Find the images in a folder and below it.

    Args:
        folder: where to look.

    Raises:
        DataError: no such folder; entries that cannot be read, links to nothing or to a folder around them (lists them).
    """
    found = Walk(Path(folder))
    if not found.folder.is_dir():
        raise DataError(f"{found.folder}: no such folder.")
    problems: list[str] = []
    sizes: dict[str, int] = {}
    _enter(found, "", (), sizes, problems)
    if problems:
        shown = [*problems[:SHOWN], *([f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else [])]
        raise DataError(f"{found.folder}: {len(problems)} files or folders cannot be read:\n  " + "\n  ".join(shown))
    found.names = sorted(sizes)
    found.sizes = [sizes[name] for name in found.names]
    for names in (found.classes, found.others, found.left_out):
        names.sort()
    return found


def _enter(found: Walk, inside: str, around: Sequence[tuple[int, int]], sizes: dict[str, int], problems: list[str]) -> None:
    """Add what is in one folder (`inside`, relative, with a slash at its end) and below it.

    Args:
        around: device and inode of the folders that this one is in.
    """
    try:
        at = os.stat(found.folder / inside)
        if (here := (at.st_dev, at.st_ino)) in around:
            problems.append(f"{found.folder / inside}: is a link to a folder that it is in")
            return
        with os.scandir(found.folder / inside) as entries:
            listed = list(entries)
    except OSError as e:
        problems.append(str(e))
        return
    for entry in listed:
        name = inside + entry.name
        if is_left_out(entry.name):
            found.left_out.append(name)
            continue
        try:
            if entry.is_dir():
                if not inside:
                    found.classes.append(entry.name)
                _enter(found, f"{name}/", (*around, here), sizes, problems)
                continue
            size = entry.stat().st_size  # fails for a link to nothing
            if ending(entry.name) not in EXTENSIONS:
                found.others.append(name)
            elif entry.is_file():
                sizes[name] = size
            else:
                problems.append(f"{entry.path}: is neither a file nor a folder")
        except OSError as e:
            problems.append(str(e))
