"""Where shards are: patterns, files, URLs and pipes, and the `index.json` beside them that says how much each holds.

The index follows the wids convention of WebDataset: `{"wids_version": 1, "shardlist": [{"url": "train-000000.tar", "nsamples": 1000,
"filesize": 104857600, "sha256": "...", "labels": {"0": 512, "7": 488}}]}`; sizes in bytes, sha256 and labels (how many samples have
which) on demand. `srcflow index` writes it, after reading every header.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from numpy.typing import NDArray
from webdataset.gopen import gopen, gopen_schemes

from srcflow.artifacts import file_hash
from srcflow.data.images import hash_of
from srcflow.data.shard_index import BLOCK, ShardIndex, scan_shard
from srcflow.data.shard_labels import MOST, add_counts, count_labels, outside, read_labels, unusable_labels
from srcflow.data.strings import StringTable
from srcflow.errors import DataError, Problems

INDEX = "index.json"
SCHEME = re.compile(r"[a-z][a-z0-9+.-]+:", re.I)
CURE = (
    "`srcflow index` writes it where the shards are local; put it beside them under their URL, or name it in data.index (needed for pipes)."
)
NO_INDEX = "Name the right one in data.index, or move this one away and run `srcflow index` on the shards."


def is_remote(url: str) -> bool:
    """Whether a shard is something else than a local path: http(s), a pipe, or another scheme that webdataset opens."""
    return SCHEME.match(url) is not None


def file_name(url: str) -> str:
    """A shard's file name, as an index has it; of a pipe the last word that ends in `.tar`.

    >>> file_name("https://host/a/train-0.tar?key=1"), file_name("pipe:aws s3 cp s3://b/train-0.tar -"), file_name("d/train-0.tar")
    ('train-0.tar', 'train-0.tar', 'train-0.tar')
    """
    if url.startswith("pipe:"):
        words = [w.strip("'\"") for w in url.split()]
        return next((w for w in reversed(words) if w.endswith(".tar")), words[-1]).rpartition("/")[2]
    return (url.partition("?")[0] if is_remote(url) else url).replace(os.sep, "/").rpartition("/")[2]


def resolve(patterns: str | Sequence[str]) -> tuple[list[str], list[str]]:
    """Shards that patterns name, and a line for every one that cannot be used.

    Args:
        patterns: paths, URLs or `pipe:` commands with brace ranges (`train-{000000..000054}.tar`), globs of local files, or several.
    """
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    found: list[str] = []
    lines: list[str] = []
    for pattern in given:
        try:
            expanded = [str(p) for p in wds.shardlists.expand_urls(os.path.expanduser(pattern))]
        except ValueError as e:
            lines.append(f"{pattern}: {e}")
            continue
        for path in (p[len("file:") :].replace("//", "", 1) if p.startswith("file://") else p for p in expanded):
            if is_remote(path):
                scheme = path.partition(":")[0].lower()
                if scheme not in gopen_schemes:
                    lines.append(f"{path}: no such scheme; known: {', '.join(s for s in gopen_schemes if s[0] != '_')}")
                found.append(path)
                continue
            matches = matching(path)
            if not matches:
                brackets = " ([...] is a pattern for one of these characters; write [[] for a [ that is part of the name)"
                lines.append(f"{path}: matches no file{brackets if '[' in path else ''}")
            lines += [f"{m}: no such file" for m in matches if not os.path.isfile(m)]
            found += matches
    if not given:
        lines.append("the list is empty")
    return found, lines + _doubled(found)


def matching(path: str) -> list[str]:
    """Local files that a glob names, sorted. The folders at its start are taken as they are called, where there are such.

    Args:
        path: a glob, or a plain path, which is returned whether or not it exists.
    """
    if not glob.has_magic(path) or os.path.lexists(path):
        return [path]
    folder, slash, name = path.rpartition("/")
    rest = name
    while folder and not os.path.isdir(folder):
        folder, slash, name = folder.rpartition("/")
        rest = f"{name}/{rest}"
    if folder or slash:
        if not glob.has_magic(rest):
            return [path]
        if found := sorted(glob.glob(f"{glob.escape(folder)}{slash}{rest}")):
            return found
    return sorted(glob.glob(path))


def _doubled(found: Sequence[str]) -> list[str]:
    """A line for every shard that is named twice, under one name or under two of the same file."""
    first: dict[str, str] = {}
    lines: dict[str, None] = {}
    for path in found:
        whole = path if is_remote(path) else os.path.realpath(path)
        if whole in first:
            lines[f"{path}: named twice" + (f", also as {first[whole]}" if first[whole] != path else "")] = None
        first.setdefault(whole, path)
    return list(lines)


def expand(patterns: str | Sequence[str], key: str) -> list[str]:
    """Shards that patterns name (`resolve`).

    Args:
        patterns: one or more.
        key: configuration key, for messages.

    Raises:
        DataError: patterns that match nothing, shards that do not exist or are named twice; lists all of them.
    """
    found, lines = resolve(patterns)
    if lines:
        raise unusable(key, lines)
    return found


def unusable(key: str, lines: Sequence[str]) -> DataError:
    """One error for many shards."""
    shown = [*lines[:20], *([f"... and {len(lines) - 20} more"] if len(lines) > 20 else [])]
    return DataError(f"{key}: {len(lines)} of the shards cannot be used:\n  " + "\n  ".join(shown))


def open_shard(url: str) -> Any:
    """A binary stream of a file, URL or pipe.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        return gopen(url, "rb") if is_remote(url) else open(url, "rb")
    except (OSError, ValueError, ImportError) as e:
        raise DataError(f"{url}: cannot be opened: {e}.") from e


# --- the index -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A shard in an index.

    Args:
        url: file name, or the URL or pipe as it is configured.
        nsamples: how many samples it holds.
        filesize: bytes; None: not known.
        sha256: of the file; None: not recorded.
        labels: how many samples have which label; None: not recorded.
    """

    url: str
    nsamples: int
    filesize: int | None = None
    sha256: str | None = None
    labels: dict[int, int] | None = None

    def check(self) -> None:
        """Refuse what cannot be.

        Raises:
            ValueError: names the field.
        """
        if not is_count(self.nsamples, 1):
            raise ValueError(f"{self.url}: nsamples = {self.nsamples!r} is no number of samples")
        if self.filesize is not None and not is_count(self.filesize, 0):
            raise ValueError(f"{self.url}: filesize = {self.filesize!r} is no number of bytes")
        if not isinstance(self.sha256, str | None):
            raise ValueError(f"{self.url}: sha256 = {self.sha256!r}")
        if self.labels is not None:
            if not all(is_count(k, 0) and is_count(n, 1) for k, n in self.labels.items()):
                raise ValueError(f"{self.url}: labels are no counts of samples by label")
            if sum(self.labels.values()) != self.nsamples:
                raise ValueError(f"{self.url}: labels of {sum(self.labels.values())} samples, nsamples = {self.nsamples}")

    def as_json(self) -> dict[str, Any]:
        """The fields that are known."""
        return {k: v for k, v in asdict(self).items() if v is not None}


def is_count(value: Any, least: int) -> bool:
    """Whether a value is a whole number that samples, bytes or classes can have."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST


def parse_index(content: bytes, place: str) -> dict[str, Entry]:
    """Entries of an index by `url`.

    Raises:
        DataError: it is not one.
    """
    try:
        entries: dict[str, Entry] = {}
        for item in json.loads(content)["shardlist"]:
            labels = item.get("labels")
            counts = None if labels is None else {int(label): count for label, count in labels.items()}
            entry = Entry(str(item["url"]), item["nsamples"], item.get("filesize"), item.get("sha256"), counts)
            entry.check()
            if entry.url in entries:
                raise ValueError(f"{entry.url} occurs twice")
            entries[entry.url] = entry
        return entries
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        what = "is empty" if not content.strip() else f"{type(e).__name__}: {e}"
        raise DataError(f"{place}: is not an index of shards ({what}).") from e


def read_index(place: str) -> dict[str, Entry]:
    """Entries of an index by `url`.

    Args:
        place: file, URL or pipe.

    Raises:
        DataError: it cannot be read, or is not an index.
    """
    try:
        with open_shard(place) as stream:
            content = bytes(stream.read())
        return parse_index(content, place)
    except DataError as e:
        raise DataError(f"{e} {NO_INDEX}") from e
    except OSError as e:
        raise DataError(f"{place}: cannot be read: {e}. {NO_INDEX}") from e


def index_of(url: str) -> str | None:
    """Where the index of a shard is; None for a pipe, which has no place beside it."""
    if url.startswith("pipe:"):
        return None
    return (url.partition("?")[0] if is_remote(url) else os.path.abspath(url)).replace(os.sep, "/").rpartition("/")[0] + "/" + INDEX


def find_entries(urls: Iterable[str], index: str | None, key: str, problems: Problems) -> dict[str, Entry]:
    """What indices say of shards; local ones that the index beside them does not list are left out.

    Args:
        urls: shards.
        index: the index of all of them; None: the one beside each, which local shards need not have.
        key: configuration key, for messages.
        problems: takes remote shards without an entry, local ones that `index` lacks, indices that cannot be read, and files of another
            size than their index says.
    """
    indices: dict[str, dict[str, Entry] | None] = {}
    found: dict[str, Entry] = {}
    taken: dict[tuple[str | None, str], str] = {}
    lines: list[str] = []
    for url in urls:
        place = index or index_of(url)
        if place is not None and place not in indices:
            indices[place] = {}
            if is_remote(place) or index is not None or os.path.isfile(place):
                indices[place] = None
                with problems.collect():
                    indices[place] = read_index(place)
        known = {} if place is None else indices[place]
        if known is None:  # the index cannot be read; that is said once
            continue
        entry = known.get(url) or known.get(file_name(url))
        if entry is not None:
            found[url] = entry
            if (other := taken.setdefault((place, entry.url), url)) != url:
                lines.append(f"{url}: {place} has one entry, {entry.url}, for it and for {other}")
            size = os.path.getsize(url) if not is_remote(url) and os.path.isfile(url) else entry.filesize
            if entry.filesize not in (None, size):
                lines.append(f"{url}: has {size} bytes, {place} says {entry.filesize}")
            elif size is not None and entry.nsamples * BLOCK > size:
                lines.append(f"{url}: {entry.nsamples} samples, as {place} says, do not fit into {size} bytes")
        elif is_remote(url) or index is not None:
            lines.append(f"{url}: {'has no index' if place is None else f'is not in {place}'}")
    if lines:
        cure = CURE if any(is_remote(line) for line in lines) else "Copy the shards again, or run `srcflow index` on them."
        cure += "" if index is None else " data.index replaces the index.json beside the shards: it must name those of all splits."
        problems.add(DataError(f"{unusable(key, lines)}\n{cure}"))
    return found


def write_index(folder: str | os.PathLike[str], entries: Iterable[Entry]) -> Path:
    """Put entries into a folder's index. The file is the old or the new one; several may write at once, where folders can be locked.

    Entries of other shards stay, if they are remote or as long as their files exist. A hash and labels that were recorded before are taken
    anew.

    Raises:
        DataError: the index that is there cannot be read.
    """
    path = Path(folder, INDEX)
    with _locked(path.parent):
        old = read_index(str(path)) if path.is_file() else {}
        merged = {name: e for name, e in old.items() if is_remote(name) or (path.parent / name).is_file()}
        for e in entries:
            hashed = e.sha256 is None and e.url in old and old[e.url].sha256 is not None
            labelled = e.labels is None and e.url in old and old[e.url].labels is not None
            e = replace(e, sha256=file_hash(path.parent / e.url)) if hashed else e
            merged[e.url] = replace(e, labels=labels_of(str(path.parent / e.url))) if labelled else e
        shards = ",\n".join(json.dumps(merged[name].as_json()) for name in sorted(merged))
        partial = path.with_name(f".{INDEX}.{os.getpid()}.partial")
        partial.write_text(f'{{"wids_version": 1, "shardlist": [\n{shards}\n]}}\n', encoding="utf-8")
        os.replace(partial, path)
    return path


def labels_of(path: str, num_classes: int | None = None) -> dict[int, int]:
    """How many samples of a local shard have which label.

    Args:
        path: of the shard.
        num_classes: labels must be below it; None: any that are not negative.

    Raises:
        DataError: the shard is damaged, or labels are missing, no integers or out of range; lists them.
    """
    samples = scan_shard(path)
    labels, lines = read_labels(path, [s[0] for s in samples], [s[1] for s in samples], [s[2] for s in samples], num_classes)
    if lines:
        raise unusable_labels(lines, path)
    return count_labels(labels)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time in a folder; without effect on file systems that do not lock folders."""
    place = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_EX)
        yield
    finally:
        os.close(place)


def check_labels(urls: Sequence[str], entries: Mapping[str, Entry], num_classes: int) -> list[str]:
    """A line for every shard whose recorded labels the model has no class for.

    Args:
        urls: shards.
        entries: what indices say of them.
        num_classes: labels must be below it.
    """
    lines = []
    for url in urls:
        wrong = [label for label in entries[url].labels or {} if label >= num_classes] if url in entries else []
        if wrong:
            more = f" (and {len(wrong) - 1} other labels)" if len(wrong) > 1 else ""
            lines.append(outside(max(wrong), num_classes, f"{url}: by its index") + more)
    return lines


# --- what a split is -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardList:
    """Shards and how many samples each holds. Sample i is the i-th in the order of the shards and, within one, of the archive.

    Args:
        urls: paths, URLs or pipes.
        counts: (S,) samples of each.
        sizes: (S,) bytes of each; -1: not known.
        keys: WebDataset keys of all samples, where the headers were read.
        labels: how many of all samples have which label, where that is known.
    """

    urls: tuple[str, ...]
    counts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    keys: StringTable | None = None
    labels: dict[int, int] | None = None

    @property
    def starts(self) -> NDArray[np.int64]:
        """(S,) global index of each shard's first sample."""
        return np.cumsum(self.counts) - self.counts

    def __len__(self) -> int:
        return int(self.counts.sum())

    def fingerprint(self) -> str:
        """Hash of the shards' names, counts and sizes: the same whether they come from an index or from the headers."""
        return hash_of(zip(map(file_name, self.urls), self.counts.tolist(), self.sizes.tolist(), strict=True))

    @classmethod
    def of(cls, urls: Sequence[str], entries: Mapping[str, Entry]) -> ShardList:
        """As indices say."""
        sizes = [-1 if (size := entries[u].filesize) is None else size for u in urls]
        counted = [entry.labels for u in urls if (entry := entries[u]).labels is not None]
        labels = add_counts(counted) if len(counted) == len(urls) else None
        return cls(tuple(urls), np.array([entries[u].nsamples for u in urls], np.int64), np.array(sizes, np.int64), labels=labels)

    @classmethod
    def scanned(cls, index: ShardIndex) -> ShardList:
        """As the headers of local shards say."""
        sizes = np.array([os.path.getsize(p) for p in index.paths], np.int64)
        labels = None if index.labels is None else count_labels(index.labels)
        return cls(index.paths, np.diff(index.starts), sizes, index.keys, labels)
