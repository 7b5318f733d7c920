"""Files: places that can be written, JSON objects, tensors, hashes; whatever is wrong with one is an error that names it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import srcflow
from srcflow.errors import ArtifactError, ConfigError

AGAIN = "Copy the directory again from where it came from, or make it again with `srcflow export`."
"""What cures a stage's directory that was damaged."""


def check_writable(path: str | os.PathLike[str], key: str, *, directory: bool) -> None:
    """Try a target before the work whose result it gets; afterwards everything is as it was.

    A file is made and removed in the directory, or in the nearest parent that there is.

    Args:
        path: the file or directory to be written.
        key: the option that names it, for the message.
        directory: whether `path` becomes a directory; otherwise it becomes a file.

    Raises:
        ConfigError: the wrong kind of thing is there, a parent is a file, or nothing can be written (rights, read-only or full disk).
    """
    cure = "Name another place."
    try:
        place = Path(path).absolute()
        there = place.exists()
        if there and place.is_dir() != directory:
            kinds = "a file, and a directory" if directory else "a directory, and a file"
            raise ConfigError(key, str(path), f"is {kinds} is to be written there.", cure)
        if there and not directory:
            if place.is_file():  # not a device or a pipe, which opening could block or disturb
                place.open("ab").close()
            return
        while not there:
            if place.is_symlink():
                raise ConfigError(key, str(path), f"{place} is a link to {os.readlink(place)}, which does not exist.", cure)
            with suppress(FileNotFoundError, NotADirectoryError):
                os.lstat(place)  # says what `exists` keeps to itself: rights, or a name that is too long
            place = place.parent
            there = place.exists()
        if not place.is_dir():
            raise ConfigError(key, str(path), f"cannot be written, since {place} is not a directory.", cure)
        handle, probe = tempfile.mkstemp(prefix=".srcflow-", suffix=".probe", dir=place)
        try:
            with open(handle, "wb") as f:
                f.write(bytes(4096))  # a full disk may take the name, but not the content
        finally:
            os.unlink(probe)
    except OSError as e:
        raise ConfigError(key, str(path), f"cannot be written: {e.strerror or e}.", cure) from e
    except ValueError as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(key, str(path), f"cannot be written: {e}.", cure) from e


def read_json(file: Path, cure: str = AGAIN) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ArtifactError: the file is missing, empty or cut off, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ArtifactError(f"{file} cannot be read: {'it is empty' if _is_empty(file) else e}. {cure}") from e
    if not isinstance(content, dict):
        raise ArtifactError(f"{file} is damaged: it holds a {type(content).__name__} instead of keys and values. {cure}")
    return content


def _is_empty(file: Path) -> bool:
    return file.is_file() and file.stat().st_size == 0


def check_format(file: Path, found: Any, known: int, what: str) -> None:
    """Refuse a file that another version of srcflow wrote in another layout.

    Raises:
        ArtifactError: `found` is not `known`.
    """
    if found is None:
        raise ArtifactError(f"{file} is damaged: it names no format. {AGAIN}")
    if isinstance(found, bool) or found != known:
        raise ArtifactError(
            f"{file}: this {what} has format {found!r}, and this srcflow ({srcflow.__version__}) reads format {known}. "
            "Use the version of srcflow that wrote it, or a newer one."
        )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        with safe_open(str(file), framework="pt", device="cpu") as f:
            return {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  # safe_open is no mapping
    except Exception as e:  # a damaged header can raise anything
        raise ArtifactError(f"{file} cannot be read: {e}. Copy it again from where it came from.") from e


def check_tensors(file: Path) -> None:
    """Refuse a safetensors file that is cut off or something else; takes no time, since only its header is read.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        with safe_open(str(file), framework="pt", device="cpu"):
            pass
    except Exception as e:  # as in `read_tensors`
        raise ArtifactError(f"{file} cannot be read: {e}. Copy it again from where it came from.") from e


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device and layout to a safetensors file."""
    save_file(plain(tensors), str(file))


def file_hash(*files: Path) -> str:
    """SHA-256 over the bytes of files, one after another."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as f:
            while chunk := f.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory, which safetensors refuses; copied only where they have to be."""
    plain: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in state.items():
        t = tensor.detach().to("cpu").contiguous()
        if t.numel() and t.untyped_storage().data_ptr() in taken:
            t = t.clone()
        taken.add(t.untyped_storage().data_ptr())
        plain[name] = t
    return plain
