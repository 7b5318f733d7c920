"""Turn a folder of images into WebDataset tar shards: `python tools/make_shards.py --folder images/train --out data/mine --prefix train`.

A folder with class sub-folders gives labelled samples (`cls` = position of the sub-folder's name in sorted order; the names go to
`classes.json`); a flat folder gives unlabelled ones. Links are followed. Files are copied byte for byte, with their EXIF data, unless
`--size` asks for resizing and cropping; then images are first turned upright as their EXIF orientation says.

Nothing is dropped in silence: every image is decoded, and what cannot be read is listed before anything counts as done (`--skip-bad` leaves
the listed files out and records them in the manifest). Hidden files and files of other kinds are counted, and class folders without images
are refused.

Output: `<prefix>-000000.tar`, ..., `<prefix>.json` (shards with sample counts, sizes and sha256), and the same in `index.json`, which all
prefixes of a folder share and which `ImageShards` reads.
"""

from __future__ import annotations

import argparse
import glob
import hashlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import webdataset as wds
from tqdm import tqdm

from srcflow.artifacts import file_hash
from srcflow.data.folder_walk import ending, walk
from srcflow.data.resize import centre_crop
from srcflow.data.transforms import EXIF, EXTENSIONS, decode, undecodable
from srcflow.errors import DataError, UndecodableError, printable

SAME = {"jpeg": "jpg"}  # endings that are stored under another one


def write_shards(samples: Iterable[dict[str, Any]], out: Path, prefix: str, per_shard: int) -> list[dict[str, Any]]:
    """Write samples (`__key__` plus bytes by extension) to `<prefix>-NNNNNN.tar`; equal samples give equal files, bit for bit.

    Returns:
        one entry per shard: file, samples, bytes, sha256.
    """
    shards: list[dict[str, Any]] = []

    def close(writer: wds.TarWriter, path: Path, count: int) -> None:
        writer.close()
        shards.append({"file": path.name, "samples": count, "bytes": path.stat().st_size, "sha256": file_hash(path)})

    writer, path, count = None, out, 0
    for sample in samples:
        if "." in sample["__key__"]:
            raise ValueError(f"key {sample['__key__']!r}: a dot would end the key there and merge samples")
        if writer is None or count == per_shard:
            if writer is not None:
                close(writer, path, count)
            path, count = out / f"{prefix}-{len(shards):06d}.tar", 0
            writer = wds.TarWriter(str(path), user="srcflow", group="srcflow", mtime=0, encoder=False)
        writer.write(sample)
        count += 1
    if writer is not None:
        close(writer, path, count)
    return shards


def verified(out: Path, shards: list[dict[str, Any]]) -> bool:
    """Whether every listed shard is there with the recorded content."""
    return all((out / s["file"]).is_file() and file_hash(out / s["file"]) == s["sha256"] for s in shards)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)


def image_files(folder: Path) -> tuple[list[tuple[Path, int]], list[str], str]:
    """Images with their labels (-1 without classes), the class names, and a line about what is not used.

    Raises:
        DataError: files that cannot be read, no images, class folders without images, or images beside class folders.
    """
    found = walk(folder)
    if not found.names:
        raise DataError(f"{folder}: no image found (known endings: {', '.join(EXTENSIONS)}). {found.summary()}".rstrip())
    if found.classes:
        found.check_classes()
    label = {name: i for i, name in enumerate(found.classes)}
    return [(folder / name, label[name.partition("/")[0]] if label else -1) for name in found.names], found.classes, found.summary()


def encode(path: Path, size: int | None, exif: Literal["transpose", "ignore"] = "transpose") -> tuple[str, bytes]:
    """Extension and bytes to store.

    Raises:
        UndecodableError: the image cannot be decoded, resized or stored, whatever it raised.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    image = decode(data, str(path), exif)
    if size is None:
        kind = ending(path.name)
        return SAME.get(kind, kind), data
    try:
        buffer = io.BytesIO()
        centre_crop(image, size).save(buffer, "PNG", exif=b"")
        return "png", buffer.getvalue()
    except Exception as e:
        raise undecodable(str(path), e) from e


def known_classes(place: Path) -> list[str]:
    """Class names from a `classes.json`.

    Raises:
        DataError: it is not one.
    """
    try:
        names = json.loads(place.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"cannot be read: {e}") from e
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(set(names)) != len(names):
        raise DataError("is not a list of class names, each once, as this tool writes it")
    return names


def prepare(folder: Path) -> None:
    """Make a folder, and try that files can be written there, before the work.

    Raises:
        OSError: they cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / ".probe"
    probe.write_bytes(b"1")
    probe.unlink()


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="images, or one sub-folder per class")
    parser.add_argument("--out", type=Path, required=True, help="where the shards go")
    parser.add_argument("--prefix", default="train", help="shards are called PREFIX-000000.tar ... (default: train)")
    parser.add_argument("--per-shard", type=int, default=1000, help="samples per shard (default: 1000)")
    parser.add_argument(
        "--size", type=int, default=None, help="resize the short side and crop the middle square, stored as PNG; default: files as they are"
    )
    parser.add_argument(
        "--exif",
        choices=EXIF,
        default=None,
        help="with --size: turn images upright as their EXIF orientation says, or take the pixels as stored (default: transpose)",
    )
    parser.add_argument("--seed", type=int, default=0, help="order of the samples (shards should hold a mixture of classes)")
    parser.add_argument("--no-shuffle", action="store_true", help="keep the sorted order of the files")
    parser.add_argument(
        "--classes", type=Path, default=None, help="classes.json of another split, so that labels agree; unknown folders are refused"
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out undecodable files; they are listed on screen and in the manifest"
    )
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        parser.error(f"--folder {args.folder}: no such folder")
    if args.per_shard < 1:
        parser.error(f"--per-shard {args.per_shard}: at least 1")
    if args.size is not None and args.size < 1:
        parser.error(f"--size {args.size}: at least 1")
    if args.exif is not None and args.size is None:
        parser.error(f"--exif {args.exif}: has no effect without --size; files are copied with their EXIF data")
    if stale := sorted(args.out.glob(f"{glob.escape(args.prefix)}-[0-9]*.tar")):
        parser.error(
            f"--out {args.out}: there are already {len(stale)} shards called {args.prefix}-*.tar. Remove them or choose another --prefix."
        )
    try:
        files, classes, unused = image_files(args.folder)
    except DataError as e:
        parser.error(f"--folder {e}")
    if args.classes is not None:
        try:
            names = known_classes(args.classes)
            if unknown := [c for c in classes if c not in names]:
                raise DataError(f"knows no {', '.join(unknown)}")
        except DataError as e:
            parser.error(f"--classes {args.classes}: {e}")
        files = [(p, names.index(classes[label]) if label >= 0 else -1) for p, label in files]
        classes = names
    partial = args.out / f".{args.prefix}.partial"
    try:
        prepare(args.out)
        shutil.rmtree(partial, ignore_errors=True)
        prepare(partial)
    except OSError as e:
        parser.error(f"--out {args.out}: cannot be written: {e}")
    if unused:
        print(printable(unused), file=sys.stderr)
    if not args.no_shuffle:  # order by hash: the same for every numpy version
        files.sort(key=lambda f: hashlib.blake2b(f"{args.seed}/{f[0].relative_to(args.folder)}".encode(errors="surrogateescape")).digest())
    bad: list[str] = []

    def samples() -> Iterator[dict[str, Any]]:
        for i, (path, label) in enumerate(tqdm(files, unit="images")):
            try:
                extension, data = encode(path, args.size, args.exif or "transpose")
            except UndecodableError as e:
                bad.append(str(e))
                continue
            except OSError as e:
                bad.append(printable(f"{path}: {e}"))
                continue
            sample: dict[str, Any] = {"__key__": f"{i:09d}", extension: data}
            if label >= 0:
                sample["cls"] = str(label).encode()
            yield sample

    try:
        shards = write_shards(samples(), partial, args.prefix, args.per_shard)
    except OSError as e:
        shutil.rmtree(partial, ignore_errors=True)
        print(f"--out {args.out}: cannot be written: {e}; no shard was kept.", file=sys.stderr)
        return 1
    for line in bad:
        print(f"cannot be read: {line}", file=sys.stderr)
    if bad and not args.skip_bad:
        print(
            f"{len(bad)} of {len(files)} files cannot be read; nothing written. Repair or remove them, or add --skip-bad.", file=sys.stderr
        )
        shutil.rmtree(partial)
        return 1
    if not shards:
        print(f"none of {len(files)} files can be read; nothing written.", file=sys.stderr)
        shutil.rmtree(partial)
        return 1
    for shard in shards:
        os.replace(partial / shard["file"], args.out / shard["file"])
    partial.rmdir()
    if classes:
        write_json(args.out / "classes.json", classes)
    from srcflow.data.shard_sources import Entry, write_index

    write_index(args.out, [Entry(s["file"], s["samples"], s["bytes"], s["sha256"]) for s in shards])
    total = sum(s["samples"] for s in shards)
    write_json(
        args.out / f"{args.prefix}.json",
        {
            "version": 1,
            "samples": total,
            "classes": len(classes),
            "size": args.size,
            "exif": (args.exif or "transpose") if args.size else None,
            "skipped": bad,
            "shards": shards,
        },
    )
    print(f"{total} images in {len(shards)} shards: {args.out}/{args.prefix}-{{000000..{len(shards) - 1:06d}}}.tar")
    return 0


if __name__ == "__main__":
    sys.exit(main())
