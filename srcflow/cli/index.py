"""`srcflow index`: read the headers of tar shards strictly, and write beside them how much each holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from srcflow.errors import ConfigError, DataError, Problems, printable

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from srcflow.cli.parser import Parser
    from srcflow.data.shard_sources import Entry

HELP = "Check local tar shards and write index.json beside them: samples, sizes, sha256."


def configure(parser: Parser) -> None:
    """Add the command's arguments."""
    parser.add_argument("shards", nargs="+", type=str, help="Local shards: paths, brace ranges or globs.")
    parser.add_argument("--sha256", action="store_true", help="Record (or, with --check, compare) the hash of each file.")
    parser.add_argument("--labels", action="store_true", help="Read all labels, and record (or compare) how many samples have which.")
    parser.add_argument("--num_classes", type=int | None, default=None, help="With --labels: labels must be 0 .. num_classes - 1.")
    parser.add_argument("--check", action="store_true", help="Write nothing; compare the shards with their index.")


def run(config: Namespace) -> int:
    """Write, or compare with, the index of each folder.

    Raises:
        ConfigError: a shard that is not local; a number of classes that cannot be.
        SrcflowError: everything that is wrong with the shards, at once.
    """
    from tqdm import tqdm

    from srcflow.data.shard_labels import add_counts
    from srcflow.data.shard_sources import expand, is_remote, write_index

    if config.num_classes is not None and (config.num_classes < 1 or not config.labels):
        problem = "must be at least 1." if config.num_classes < 1 else "has no effect without --labels."
        raise ConfigError("num_classes", config.num_classes, problem, "" if config.num_classes < 1 else "Add --labels.")
    paths = expand(config.shards, "shards")
    if remote := [p for p in paths if is_remote(p)]:
        raise ConfigError("shards", remote[0], "is no local file.", "Run this where the shards are local.")
    problems, folders = Problems(), dict[Path, list["Entry"]]()
    for path in tqdm(paths, unit="shards", disable=len(paths) < 10):
        with problems.collect():
            folders.setdefault(Path(path).parent, []).append(_entry(path, config.sha256, config.labels, config.num_classes))
    if config.check:
        _compare(folders, problems)
    problems.raise_if_any()
    for folder, entries in folders.items():
        place = "agrees with" if config.check else f"written to {write_index(folder, entries)}, for"
        said = f"{'index.json ' if config.check else ''}{place} {len(entries)} shards with {sum(e.nsamples for e in entries)} samples."
        print(printable(said))
    if config.labels:
        counts = add_counts([e.labels for entries in folders.values() for e in entries if e.labels is not None])
        print(_histogram(counts, config.num_classes or max(counts) + 1))
    return 0


def _histogram(counts: dict[int, int], num_classes: int) -> str:
    """What labels there are, in a few lines."""
    from srcflow.data.shard_labels import without_samples

    least, most = min(counts, key=lambda c: counts[c]), max(counts, key=lambda c: counts[c])
    lines = [
        f"labels {min(counts)} .. {max(counts)}: {len(counts)} classes with samples, from {counts[least]} (class {least}) "
        f"to {counts[most]} (class {most}) in each."
    ]
    if len(counts) <= 100:
        lines.append("  " + ", ".join(f"{label}: {n}" for label, n in counts.items()))
    if never := without_samples(counts, num_classes):
        lines.append(f"{num_classes - len(counts)} of {num_classes} classes have no samples: {never}")
    return "\n".join(lines)


def _entry(path: str, sha256: bool, labels: bool, num_classes: int | None) -> Entry:
    from srcflow.artifacts import file_hash
    from srcflow.data.shard_index import scan_shard
    from srcflow.data.shard_sources import Entry, file_name, labels_of

    counts = labels_of(path, num_classes) if labels else None
    samples = len(scan_shard(path)) if counts is None else sum(counts.values())
    return Entry(file_name(path), samples, Path(path).stat().st_size, file_hash(Path(path)) if sha256 else None, counts)


def _compare(folders: dict[Path, list[Entry]], problems: Problems) -> None:
    """Note every difference between shards and their folder's index."""
    from srcflow.data.shard_sources import INDEX, read_index, unusable

    for folder, entries in folders.items():
        with problems.collect():
            known = read_index(str(folder / INDEX))
            lines = []
            for entry in entries:
                stored = known.get(entry.url)
                if stored is None:
                    lines.append(f"{folder / entry.url}: is not in {folder / INDEX}")
                    continue
                optional = [name for name in ("sha256", "labels") if getattr(entry, name) is not None]
                for name in ("nsamples", "filesize", *optional):
                    if getattr(stored, name) != getattr(entry, name):
                        lines.append(f"{folder / entry.url}: {name} is {getattr(entry, name)}, the index says {getattr(stored, name)}")
            if lines:
                raise DataError(f"{unusable('shards', lines)}\nWithout --check, `srcflow index` writes what it finds.")
