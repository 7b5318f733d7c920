"""Turn a folder of images into WebDataset tar shards: `python tools/make_shards.py --folder images/train --out data/mine --prefix train`.

A folder with class sub-folders gives labelled samples (`cls` = position of the sub-folder's name in sorted order; the names go to
`classes.json`); a flat folder gives unlabelled ones. Files are copied byte for byte unless `--size` asks for resizing and cropping. Nothing
is dropped in silence: every image is decoded, and what cannot be read is listed before anything counts as done (`--skip-bad` leaves the
listed files out and records them in the manifest).

Output: `<prefix>-000000.tar`, ..., `<prefix>.json` (shards with sample counts, sizes and sha256), and the same in `index.json`, which all
prefixes of a folder share and which `ImageShards` reads.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import webdataset as wds
from PIL import Image
from tqdm import tqdm

from srcflow.artifacts import file_hash

EXTENSIONS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}


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


def image_files(folder: Path) -> tuple[list[tuple[Path, int]], list[str], list[Path]]:
    """Images with their labels (-1 without classes), the class names, and files that are not images by their extension."""
    classes = sorted(d.name for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    roots = [(folder / c, i) for i, c in enumerate(classes)] or [(folder, -1)]
    found: list[tuple[Path, int]] = []
    other: list[Path] = [p for p in sorted(folder.iterdir()) if p.is_file()] if classes else []
    for root, label in roots:
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            if path.suffix.lower() in EXTENSIONS:
                found.append((path, label))
            else:
                other.append(path)
    return found, classes, other


def encode(path: Path, size: int | None) -> tuple[str, bytes]:
    """Extension and bytes to store. Raises OSError, SyntaxError, ValueError (PIL's) or DataError where the image cannot be decoded."""
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        if size is None:
            return EXTENSIONS[path.suffix.lower()], data
        from srcflow.data.transforms import centre_crop, to_rgb

        buffer = io.BytesIO()
        centre_crop(to_rgb(image), size).save(buffer, "PNG")
        return "png", buffer.getvalue()


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
    files, classes, other = image_files(args.folder)
    if not files:
        parser.error(f"--folder {args.folder}: no image found (known extensions: {' '.join(EXTENSIONS)})")
    if args.classes is not None:
        names = json.loads(args.classes.read_text())
        if unknown := [c for c in classes if c not in names]:
            parser.error(f"--classes {args.classes}: knows no {', '.join(unknown)}")
        files = [(p, names.index(classes[label]) if label >= 0 else -1) for p, label in files]
        classes = names
    if other:
        print(f"not images by their extension, not stored: {len(other)} files, e.g. {other[0]}", file=sys.stderr)
    if not args.no_shuffle:  # order by hash: the same for every numpy version
        files.sort(key=lambda f: hashlib.blake2b(f"{args.seed}/{f[0].relative_to(args.folder)}".encode()).digest())

    args.out.mkdir(parents=True, exist_ok=True)
    if stale := sorted(args.out.glob(f"{args.prefix}-[0-9]*.tar")):
        parser.error(
            f"--out {args.out}: there are already {len(stale)} shards called {args.prefix}-*.tar. Remove them or choose another --prefix."
        )
    bad: list[str] = []

    def samples() -> Iterator[dict[str, Any]]:
        for i, (path, label) in enumerate(tqdm(files, unit="images")):
            try:
                extension, data = encode(path, args.size)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
                bad.append(f"{path}: {e}")
                continue
            sample: dict[str, Any] = {"__key__": f"{i:09d}", extension: data}
            if label >= 0:
                sample["cls"] = str(label).encode()
            yield sample

    partial = args.out / f".{args.prefix}.partial"
    partial.mkdir(exist_ok=True)
    for old in partial.iterdir():
        old.unlink()
    shards = write_shards(samples(), partial, args.prefix, args.per_shard)
    for line in bad:
        print(f"cannot be read: {line}", file=sys.stderr)
    if bad and not args.skip_bad:
        print(
            f"{len(bad)} of {len(files)} files cannot be read; nothing written. Repair or remove them, or add --skip-bad.", file=sys.stderr
        )
        for old in partial.iterdir():
            old.unlink()
        partial.rmdir()
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
        args.out / f"{args.prefix}.json", {"version": 1, "samples": total, "classes": len(classes), "skipped": bad, "shards": shards}
    )
    print(f"{total} images in {len(shards)} shards: {args.out}/{args.prefix}-{{000000..{len(shards) - 1:06d}}}.tar")
    return 0


if __name__ == "__main__":
    sys.exit(main())
