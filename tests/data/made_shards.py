"""Small shards for tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import webdataset as wds
from PIL import Image


def png(value: int, size: int = 4) -> bytes:
    """A plain image of red `value`."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, files: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar file of names and contents."""
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def special(path: Path, name: str, kind: bytes, to: str = "a.png", form: int = tarfile.GNU_FORMAT) -> Path:
    """A tar file of one plain sample and a member of another kind."""
    with tarfile.open(path, "w", format=form) as tar:
        for plain, data in (("a.png", png(1)), ("a.cls", b"1")):
            info = tarfile.TarInfo(plain)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, to if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE) else ""
        tar.addfile(info)
    return path


def shards(folder: Path, sizes: list[int], bad: tuple[int, ...] = (), name: str = "s") -> list[str]:
    """Shards whose sample i is a plain image of red i with label i % 10 (or, if it is bad, no image)."""
    paths, i = [], 0
    for number, size in enumerate(sizes):
        path = folder / f"{name}-{number:03d}.tar"
        with wds.TarWriter(str(path)) as writer:
            for _ in range(size):
                writer.write({"__key__": f"a/{i:04d}", "png": b"no image" if i in bad else png(i), "cls": i % 10})
                i += 1
        paths.append(str(path))
    return paths


def damaged(path: Path) -> dict[str, bytes]:
    """Contents of a shard of 10 samples that is damaged behind its fifth, by the kind of damage."""
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        sixth = tar.getmembers()[10]  # its pax header stands before it
    return {
        "cut at a header": whole[: sixth.offset],
        "cut in a header": whole[: sixth.offset + 300],
        "cut in data": whole[: sixth.offset_data + 20],
        "zeroed header": whole[: sixth.offset] + bytes(512) + whole[sixth.offset + 512 :],
        "garbage header": whole[: sixth.offset] + b"\x07" * 512 + whole[sixth.offset + 512 :],
    }
