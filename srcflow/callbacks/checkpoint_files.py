"""Checkpoint files that are whole or not there, and that are read with care."""

from __future__ import annotations

import os
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from torch.distributed.checkpoint.filesystem import FileSystemReader

from srcflow.errors import CheckpointError

SUFFIX = ".ckpt"
PARTIAL = ".partial"
ASIDE = ".aside"
META, SHARDS = "meta.pt", ".metadata"
"""Of a directory of shards: Lightning's file of what is not sharded, and torch's list of what is."""


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint to a hidden file beside its place, brings it to the disk and renames it, so that no name ever holds a part.

    The tensors go to the file one after another; there is no second copy of the checkpoint in memory. Files are read with
    `weights_only=True`. Anything but a local file is left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: the disk is full, or the file cannot be written for another reason; what was there before stays.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        place = Path(path)
        partial = hidden(place)
        watched: _Watched | None = None
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as f:
                watched = _Watched(f)
                torch.save(checkpoint, cast(IO[bytes], watched))
                f.flush()
                os.fsync(f.fileno())
            replace(partial, place)
        except Exception as e:
            error = e if isinstance(e, OSError) else watched.error if watched is not None else None
            if error is None:
                raise
            found = newest(place.parent)
            kept = f" The last whole one is {found}: go on from it with --ckpt_path {found}." if found else ""
            raise CheckpointError(f"{place} could not be written: {error.strerror or error}.{kept}") from error
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint, always with `weights_only=True`, after comparing its checksums (torch does not).

        Raises:
            CheckpointError: there is none, or it is damaged; names the newest whole one beside it.
        """
        if not _is_local_file_protocol(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        check(path)
        if not whole(Path(path)):
            raise refusal(Path(path), "is damaged: a checksum is wrong")
        try:
            return super().load_checkpoint(path, map_location, weights_only=True)
        except Exception as e:  # a damaged or foreign pickle can raise anything
            raise refusal(Path(path), f"cannot be read ({first_line(e)})") from e


class _Watched:
    """A file that remembers why a write failed: torch reports only that it did."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as e:
            self.error = e
            raise

    def flush(self) -> None:
        self.file.flush()


def hidden(place: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return place.with_name(f".{place.name}{PARTIAL}")


def replace(partial: Path, place: Path) -> None:
    """Give a finished file (or directory) its name, and bring that to the disk.

    A directory cannot be replaced in one step: the old one is moved aside and goes last. A run that is killed in between leaves it there,
    and `sweep` moves it back.
    """
    if partial.is_dir() and not partial.is_symlink():
        for file in filter(Path.is_file, partial.iterdir()):  # Lightning syncs none, torch the shards
            with file.open("rb+") as f:
                os.fsync(f.fileno())
        _sync(partial)
    aside = place.with_name(f".{place.name}{ASIDE}")
    if place.is_dir() and not place.is_symlink():
        remove(aside)
        place.rename(aside)
    partial.replace(place)
    _sync(place.parent)
    remove(aside)


def _sync(folder: Path) -> None:
    with suppress(OSError):  # some file systems do not sync directories
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def link(place: Path, target: Path) -> None:
    """Let the name `place` stand for `target`, a neighbour, in one step; by a copy where there are no symbolic links."""
    partial = hidden(place)
    remove(partial)
    try:
        partial.symlink_to(target.name)
    except (OSError, NotImplementedError):
        (shutil.copytree if target.is_dir() else shutil.copyfile)(target, partial)
    replace(partial, place)


def remove(path: Path) -> None:
    """Remove a file, a link or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep(folder: Path, suffix: str = SUFFIX) -> None:
    """Remove what a killed run left half written, and put back what it had moved aside for a directory that never came."""
    for aside in folder.glob(f".*{suffix}{ASIDE}"):
        place = aside.with_name(aside.name.removeprefix(".").removesuffix(ASIDE))
        if place.exists():
            remove(aside)
        else:
            aside.rename(place)
    for partial in folder.glob(f".*{suffix}{PARTIAL}"):
        remove(partial)


def whole(path: Path, *, content: bool = True) -> bool:
    """Whether a checkpoint is complete.

    Args:
        path: a file, or a directory of shards.
        content: read it all and compare its checksums, or look only whether its end is there. Shards have no checksums: of them only the
            sizes are compared.
    """
    if path.is_dir():
        return whole(path / META, content=content) and _shards_are_there(path)
    try:
        with zipfile.ZipFile(path) as file:
            return not content or file.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def _shards_are_there(path: Path) -> bool:
    """Whether every file that torch's list names is as long as the items in it need."""
    try:
        items = FileSystemReader(path).read_metadata().storage_data or {}
        ends: dict[str, int] = {}
        for item in items.values():
            ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
        return all((path / name).stat().st_size >= end for name, end in ends.items())
    except Exception:  # a damaged pickle can raise anything
        return False


def newest(folder: Path, but: Path | None = None) -> Path | None:
    """The last written whole checkpoint of a folder, the one at `but` left out."""
    places = [p for p in folder.glob(f"*{SUFFIX}") if p.exists() and not p.is_symlink()]
    other = but.resolve() if but is not None else None
    for place in sorted(places, key=lambda p: p.stat().st_mtime_ns, reverse=True):
        if place.resolve() != other and whole(place):
            return place
    return None


def check(path: str | os.PathLike[str]) -> None:
    """Refuse a checkpoint that is not there or cut off; takes no time, since only its end is looked at.

    Raises:
        CheckpointError: names the newest whole one beside it.
    """
    place = Path(path)
    try:
        there = place.exists()
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{place} cannot be read ({first_line(e)}).") from e
    if not there:
        raise refusal(place, "does not exist")
    if place.is_file() and place.suffix == ".safetensors":
        cure = f"`srcflow export --config FILE --ckpt_path {place}` makes a stage's directory of it"
        raise CheckpointError(f"ckpt_path = {str(path)!r} holds weights alone, as the EMA callback's snapshots do; {cure}.")
    if place.is_dir() and not (place / META).exists() and not (place / SHARDS).exists():
        raise refusal(place, "is not a whole checkpoint: it is a directory without the files of one")
    if not whole(place, content=False):
        empty = place.is_file() and place.stat().st_size == 0
        raise refusal(place, f"is not a whole checkpoint: {'it is empty' if empty else 'it was cut off, or it is something else'}")


def refusal(place: Path, problem: str) -> CheckpointError:
    """The error for a checkpoint that cannot be used."""
    target = f" (a link to {place.resolve()})" if place.is_symlink() else ""
    found = newest(place.parent, but=place) if place.parent.is_dir() else None
    cure = f"The newest whole one beside it is {found}: go on from it with --ckpt_path {found}" if found else "There is no other beside it"
    return CheckpointError(f"{place}{target} {problem}. {cure}.")


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
