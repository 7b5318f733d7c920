"""What a set of WebDataset tar shards holds, found by reading the tar headers once, strictly.

WebDataset's own reader is lenient: an archive cut at a header, or with a damaged header, ends early without an error; names without an
extension, second halves of split samples and merged keys pass unnoticed. Here each of these is an error that names the shard.
"""

from __future__ import annotations

import mmap
import os
import re
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from srcflow.data.images import hash_of
from srcflow.data.shard_labels import read_labels, unusable_labels
from srcflow.data.strings import StringTable
from srcflow.data.transforms import EXTENSIONS
from srcflow.errors import DataError, Problems

LABELS = ("cls", "json")
USUAL = 4  # so many of EXTENSIONS come first: a jpg beside a tif is the image, and the tif something else
BLOCK = 512
PAX = re.compile(rb" (?:path|linkpath|size|GNU\.sparse[^=]*)=")  # pax records that matter here; webdataset writes one with the time
Content = TypeVar("Content")
METADATA = re.compile(r"__[^/]*__($|/)")  # names that WebDataset keeps for itself
ENCODING: Any = {"encoding": "utf-8", "errors": "surrogateescape"}  # of names, some of which may be in another one
NOT_FILES = (tarfile.DIRTYPE, b"V", b"D")  # folders, GNU tar's volume label and lists of folders
KINDS = {
    tarfile.LNKTYPE: ("a hard link to {0}", "Pack it again with `tar --hard-dereference`, which stores the file itself"),
    tarfile.SYMTYPE: ("a symbolic link to {0}", "Pack it again with `tar -h`, which stores what it points to"),
    tarfile.FIFOTYPE: ("a named pipe", "Leave it out"),
    tarfile.CHRTYPE: ("a device", "Leave it out"),
    tarfile.BLKTYPE: ("a device", "Leave it out"),
    tarfile.GNUTYPE_SPARSE: ("a sparse file", "Pack it again without `--sparse`"),
}


@dataclass(frozen=True)
class ShardIndex:
    """Where every sample lies. Sample i is the i-th in the order of the paths and, within a shard, of the archive: the global sample index.

    Args:
        paths: the shards.
        starts: (shards + 1,) global index of each shard's first sample, and the total.
        spans: (n, 4) int64: image offset, image size, label offset, label size (bytes; -1 offset where there is no label).
        json_label: (n,) whether the label stands in a json file.
        keys: WebDataset keys.
        labels: (n,) int64, where they were read.
    """

    paths: tuple[str, ...]
    starts: NDArray[np.int64]
    spans: NDArray[np.int64]
    json_label: NDArray[np.bool_]
    keys: StringTable
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.spans)

    def shard_of(self, index: int) -> int:
        """Position in `paths` of the shard that holds a sample."""
        return int(np.searchsorted(self.starts, index, side="right")) - 1

    def name(self, index: int) -> str:
        """Shard and key of a sample, for messages."""
        return f"{self.paths[self.shard_of(index)]}: {self.keys[index]}"

    def fingerprint(self) -> str:
        """Hash of the shards' file names, keys and sizes."""
        names = [Path(p).name for p in self.paths]
        return hash_of((names[self.shard_of(i)], self.keys[i], *self.spans[i].tolist()) for i in range(len(self)))

    @classmethod
    def scan(cls, paths: Sequence[str], expected: Mapping[str, int] | None = None, num_classes: int = 0) -> ShardIndex:
        """Read the headers of all shards, and the labels.

        Args:
            paths: local files.
            expected: how many samples some of them are said to hold.
            num_classes: labels must be below it; 0: they are not read.

        Raises:
            DataError: a shard is damaged, breaks WebDataset's rules for names, holds another number, or has labels that are missing, no
                integers or out of range; ProblemsError where several are.
        """
        problems = Problems()
        starts, rows, as_json, keys = [0], [], [], []
        labels: list[NDArray[np.int64]] = []
        unusable: list[str] = []
        for path in paths:
            with problems.collect():
                samples = scan_shard(path)
                said = (expected or {}).get(path, len(samples))
                if said != len(samples):
                    cure = "Run `srcflow index` on it, if it is the shard that is right."
                    raise DataError(f"{path}: holds {len(samples)} samples, its index says {said}. {cure}")
                for key, span, is_json in samples:
                    rows.append(span)
                    as_json.append(is_json)
                    keys.append(key)
                if num_classes:
                    at = starts[-1]
                    read, lines = read_labels(path, keys[at:], rows[at:], as_json[at:], num_classes)
                    labels.append(read)
                    unusable += lines
            starts.append(len(rows))
        if unusable:
            problems.add(unusable_labels(unusable, f"{len(paths)} shards"))
        problems.raise_if_any()
        spans = np.array(rows, np.int64).reshape(-1, 4)
        table, read_ones = StringTable.of(keys), np.concatenate(labels) if labels else None
        return cls(tuple(paths), np.array(starts, np.int64), spans, np.array(as_json, np.bool_), table, read_ones)


def split_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key ends at the first dot of the base name; extension in lower case.

    >>> split_name("a.b/img_0.5.PNG")
    ('a.b/img_0', '5.png')
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def grouped(path: str, files: Iterable[tuple[str, Content]]) -> Iterator[tuple[str, dict[str, Content]]]:
    """Samples of an archive: key, and what stands under each extension. WebDataset's rules for names, strictly.

    Args:
        path: of the shard, for messages.
        files: names and contents (or what stands for them) in the archive's order.

    Raises:
        DataError: names that WebDataset would skip, merge or split in silence.
    """
    seen: set[str] = set()
    current: str | None = None
    found: dict[str, Content] = {}
    for name, content in files:
        if METADATA.match(name):
            continue
        key, extension = split_name(name)
        if not extension or not key.rpartition("/")[2]:
            raise DataError(f"{path}: {name!r} is not KEY.EXTENSION; WebDataset would skip it in silence.")
        if key != current:
            if current is not None:
                yield current, found
            if key in seen:
                raise DataError(f"{path}: the files of sample {key!r} do not follow each other; WebDataset would make two samples of them.")
            seen.add(key)
            current, found = key, {}
        if extension in found:
            raise DataError(f"{path}: {name!r} occurs twice.")
        found[extension] = content
    if current is not None:
        yield current, found


def parts(path: str, key: str, extensions: Collection[str]) -> tuple[str, str | None]:
    """Which of a sample's files is the image, and which, if any, the label.

    Raises:
        DataError: not exactly one image.
    """
    images = [e for e in extensions if e in EXTENSIONS[:USUAL]] or [e for e in extensions if e in EXTENSIONS]
    if len(images) != 1:
        what = f"has {len(images)} images" if images else f"has no image ({', '.join(EXTENSIONS)})"
        raise DataError(f"{path}: sample {key!r} {what}, but {', '.join(extensions)}. A key ends at the first dot of the file name.")
    return images[0], next((e for e in LABELS if e in extensions), None)


def scan_shard(path: str) -> list[tuple[str, tuple[int, int, int, int], bool]]:
    """Samples of one shard: key, (image offset, image size, label offset, label size), whether the label is in a json.

    Raises:
        DataError: the shard cannot be trusted; says why.
    """
    samples = []
    for key, files in grouped(path, ((name, (offset, size)) for name, offset, size in members(path))):
        image, label = parts(path, key, files)
        samples.append((key, (*files[image], *(files[label] if label else (-1, 0))), label == "json"))
    if not samples:
        raise DataError(f"{path}: holds no samples.")
    return samples


def is_file(path: str, member: tarfile.TarInfo) -> bool:
    """Whether a member of an archive is a file with its content; folders and labels of archives are not.

    Args:
        path: of the shard, for messages.
        member: with its header.

    Raises:
        DataError: it is a link, or something else that holds no image but may stand for one.
    """
    if member.type in NOT_FILES:
        return False
    if member.isreg() and not member.issparse():
        return True
    kind = tarfile.GNUTYPE_SPARSE if member.issparse() else member.type
    what, cure = KINDS.get(kind, (f"of the unknown kind {kind!r}", "Pack it again as plain files"))
    raise DataError(f"{path}: {member.name} is {what.format(member.linkname)}, and would be a sample lost in silence. {cure}.")


class _Extended(Exception):
    """The archive has headers beyond plain ustar (long names, pax)."""


def members(path: str) -> list[tuple[str, int, int]]:
    """Regular files of an archive: name, offset of the data, size. The archive must be complete, and end in zeros.

    Raises:
        DataError: it cannot be read, is no tar file, is compressed, cut or damaged, or has links or the like in place of files.
    """
    try:
        found, rest = _checked_members(path)
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e}.") from e
    if rest < BLOCK:
        raise DataError(f"{path}: is cut after {found[-1][0] if found else 'its start'}: the end-of-archive marker is missing.")
    return found


def _checked_members(path: str) -> tuple[list[tuple[str, int, int]], int]:
    """Members of an archive, and how many zeros end it."""
    size = os.path.getsize(path)
    if size == 0:
        raise DataError(f"{path}: is empty.")
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            found, end = _plain_members(path, data)
        except _Extended:
            found, end = _extended_members(path, size)
        rest = 0
        for at in range(end, size, 1 << 20):
            chunk = data[at : at + (1 << 20)]
            rest += len(chunk)
            if chunk.count(0) != len(chunk):
                raise DataError(f"{path}: damaged: data behind the end-of-archive marker at byte {end} of {size}.")
    return found, rest


def _plain_members(path: str, data: mmap.mmap) -> tuple[list[tuple[str, int, int]], int]:
    """Members of a ustar archive, several times as fast as tarfile reads them, and where they end."""
    found: list[tuple[str, int, int]] = []
    at, size = 0, len(data)
    while at < size:
        header = data[at : at + BLOCK]
        if header.count(0) == len(header):
            break
        try:
            if len(header) < BLOCK or int(header[148:156].rstrip(b" \0"), 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
                raise ValueError("wrong checksum")
            kind = header[156:157]
            if kind not in (b"0", b"\0", b"5", b"x") or header[124] & 0x80:
                raise _Extended
            length = int(header[124:136].rstrip(b" \0") or b"0", 8)
            if kind == b"x" and PAX.search(data[at + BLOCK : at + BLOCK + length]):
                raise _Extended
            name = header[:100].split(b"\0", 1)[0].decode(**ENCODING)
            if header[257:263] == b"ustar\0" and header[345]:
                name = header[345:500].split(b"\0", 1)[0].decode(**ENCODING) + "/" + name
        except ValueError as e:
            what = "not an uncompressed tar archive" if at == 0 else f"cut or damaged after {found[-1][0] if found else 'its start'}"
            raise DataError(f"{path}: {what}: no readable header at byte {at} of {size} ({e}).") from e
        start = at + BLOCK
        if start + length > size:
            raise DataError(f"{path}: is cut: {name} ends at byte {start + length} of {size}.")
        if kind in (b"0", b"\0"):
            found.append((name, start, length))
        at = start + -(-length // BLOCK) * BLOCK
    return found, at


def _extended_members(path: str, size: int) -> tuple[list[tuple[str, int, int]], int]:
    """The same through tarfile, which knows all kinds of headers."""
    try:
        with tarfile.open(path, "r:", **ENCODING) as tar:
            all_members = tar.getmembers()
    except Exception as e:  # damaged headers make tarfile raise of every kind
        raise DataError(f"{path}: not an uncompressed tar archive, or damaged: {str(e) or type(e).__name__}.") from e
    if not all_members:
        raise DataError(f"{path}: holds no samples.")
    files = [m for m in all_members if not METADATA.match(m.name) and is_file(path, m)]
    for member in files:
        if member.offset_data + member.size > size:
            raise DataError(f"{path}: is cut: {member.name} ends at byte {member.offset_data + member.size} of {size}.")
    last = all_members[-1]
    end = last.offset_data + (-(-last.size // BLOCK) * BLOCK if last.isreg() or last.type in (b"V", b"D") else 0)
    return [(m.name, m.offset_data, m.size) for m in files], end


def read_span(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a file from `offset` on.

    Raises:
        DataError: they are not there (any more).
    """
    try:
        with open(path, "rb") as f:
            f.seek(offset)
            data = f.read(size)
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e}. The shards changed while they were in use.") from e
    if len(data) != size:
        raise DataError(f"{path}: is shorter than it was. The shards changed while they were in use.")
    return data
