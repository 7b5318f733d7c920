"""`srcflow index`: read the headers of tar shards strictly, and write beside them how much each holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from srcflow.errors import ConfigError, DataError, Problems

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from srcflow.cli.parser import Parser
    from srcflow.data.shard_sources import Entry

HELP = "Check local tar shards and write index.json beside them: samples, sizes, sha256."


def configure(parser: Parser) -> None:
    """Add the command's arguments."""
    parser.add_argument("shards", nargs="+", type=str, help="Local shards: paths, brace ranges or globs.")
    parser.add_argument("--sha256", action="store_true", help="Record (or, with --check, compare) the hash of each file.")
    parser.add_argument("--check", action="store_true", help="Write nothing; compare the shards with their index.")


def run(config: Namespace) -> int:
    """Write, or compare with, the index of each folder.

    Raises:
        ConfigError: a shard that is not local.
        SrcflowError: everything that is wrong with the shards, at once.
    """
    from tqdm import tqdm

    from srcflow.data.shard_sources import expand, is_remote, write_index

    paths = expand(config.shards, "shards")
    if remote := [p for p in paths if is_remote(p)]:
        raise ConfigError("shards", remote[0], "is no local file.", "Run this where the shards are local.")
    problems, folders = Problems(), dict[Path, list["Entry"]]()
    for path in tqdm(paths, unit="shards", disable=len(paths) < 10):
        with problems.collect():
            folders.setdefault(Path(path).parent, []).append(_entry(path, config.sha256))
    if config.check:
        _compare(folders, problems)
    problems.raise_if_any()
    for folder, entries in folders.items():
        place = "agrees with" if config.check else f"written to {write_index(folder, entries)}, for"
        print(f"{'index.json ' if config.check else ''}{place} {len(entries)} shards with {sum(e.nsamples for e in entries)} samples.")
    return 0


def _entry(path: str, sha256: bool) -> Entry:
    from srcflow.artifacts import file_hash
    from srcflow.data.shard_index import scan_shard
    from srcflow.data.shard_sources import Entry, file_name

    return Entry(file_name(path), len(scan_shard(path)), Path(path).stat().st_size, file_hash(Path(path)) if sha256 else None)


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
                for name in ("nsamples", "filesize", *(("sha256",) if entry.sha256 else ())):
                    if getattr(stored, name) != getattr(entry, name):
                        lines.append(f"{folder / entry.url}: {name} is {getattr(entry, name)}, the index says {getattr(stored, name)}")
            if lines:
                raise DataError(f"{unusable('shards', lines)}\nWithout --check, `srcflow index` writes what it finds.")
