"""Fetch Fashion-MNIST and write it as WebDataset shards: `python tools/fashion_mnist.py --out data/fashion_mnist`.

Sources, tried in this order unless `--source` or `--folder` says otherwise: Debian's package dataset-fashion-mnist (downloaded and unpacked
without root), then the mirror that torchvision uses. The content of every file is checked against recorded sha256 sums, wherever it is
from.

Output: train (55,000), val (the other 5,000 of the training set, a fixed choice) and test (10,000) as `<split>-NNNNNN.tar` of 32x32 RGB
PNGs (grey replicated, 2 black pixels added on each side) with `.cls` labels, `classes.json`, and `manifest.json` with a checksum per shard.
Keys are the split of origin and the position there, so a sample can be traced back. A second run verifies what is there and does nothing.

Fashion-MNIST: Xiao, Rasul, Vollgraf (2017), MIT licence.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from make_shards import prepare, verified, write_json, write_shards
from PIL import Image
from tqdm import tqdm

VERSION = 1
PACKAGE = "dataset-fashion-mnist"
MIRROR = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
CONTENT_SHA256 = {  # of the decompressed files; recompressed with the original header they have the published md5 sums below
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
GZIP_MD5 = {  # of the compressed files as published (the mirror's); Debian compresses them anew
    "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
}
CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
VALIDATION = 5000
PER_SHARD = 1000


class SourceError(Exception):
    """One source could not deliver; the next may."""


def from_folder(folder: Path) -> dict[str, bytes]:
    """The four decompressed files, verified, from a folder that holds them with or without .gz.

    Raises:
        SourceError: a file is missing or is not what it should be; lists all such files.
    """
    contents, problems = {}, []
    for name, wanted in CONTENT_SHA256.items():
        packed, plain = folder / f"{name}.gz", folder / name
        try:
            data = gzip.decompress(packed.read_bytes()) if packed.is_file() else plain.read_bytes()
        except (OSError, EOFError) as e:
            problems.append(f"{packed if packed.is_file() else plain}: {e}")
            continue
        if (got := hashlib.sha256(data).hexdigest()) != wanted:
            problems.append(f"{name}: sha256 of the content is {got}, not {wanted}")
        contents[name] = data
    if problems:
        raise SourceError("; ".join(problems))
    return contents


def from_debian() -> dict[str, bytes]:
    """Download Debian's package with apt-get and unpack it in a temporary folder; needs no root.

    Raises:
        SourceError: no apt-get or dpkg here, or the download failed.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise SourceError("no apt-get and dpkg on this machine")
    with tempfile.TemporaryDirectory(prefix="fashion_mnist_") as temp:
        try:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=temp, check=True, capture_output=True, text=True, timeout=600)
            (package,) = Path(temp).glob("*.deb")
            subprocess.run(["dpkg", "-x", str(package), "content"], cwd=temp, check=True, capture_output=True, text=True, timeout=600)
        except subprocess.CalledProcessError as e:
            raise SourceError(f"{' '.join(e.cmd)}: {e.stderr.strip()} (an outdated package list? try: sudo apt-get update)") from e
        except (subprocess.TimeoutExpired, ValueError) as e:
            raise SourceError(f"apt-get download {PACKAGE}: {e}") from e
        return from_folder(Path(temp) / "content" / "usr" / "share" / "datasets" / "fashion-mnist")


def from_mirror(mirror: str = MIRROR) -> dict[str, bytes]:
    """Download the four files as published.

    Raises:
        SourceError: no connection, or a file that is not what it should be.
    """
    with tempfile.TemporaryDirectory(prefix="fashion_mnist_") as temp:
        for name, wanted in GZIP_MD5.items():
            url = f"{mirror}/{name}.gz"
            try:
                with urllib.request.urlopen(url, timeout=60) as response, (Path(temp) / f"{name}.gz").open("wb") as f:
                    total = int(response.headers.get("Content-Length", 0)) or None
                    with tqdm(total=total, unit="B", unit_scale=True, desc=name) as bar:
                        while block := response.read(1 << 16):
                            f.write(block)
                            bar.update(len(block))
            except OSError as e:
                raise SourceError(f"{url}: {e}") from e
            got = hashlib.md5((Path(temp) / f"{name}.gz").read_bytes(), usedforsecurity=False).hexdigest()
            if got != wanted:
                raise SourceError(f"{url}: md5 {got}, not {wanted}")
        return from_folder(Path(temp))


def fetch(source: str, folder: Path | None) -> tuple[dict[str, bytes], str]:
    """The four files and the name of the source that gave them.

    Raises:
        SourceError: none of the sources could; lists what each said.
    """
    if folder is not None:
        return from_folder(folder), "folder"
    sources = {"debian": from_debian, "mirror": from_mirror}
    said = []
    for name in sources if source == "auto" else [source]:
        print(f"Fashion-MNIST from {name} ...", flush=True)
        try:
            return sources[name](), name
        except SourceError as e:
            said.append(f"  {name}: {e}")
    raise SourceError(
        "no source could deliver Fashion-MNIST:\n" + "\n".join(said) + "\nPut the four .gz files into a folder and name it with --folder."
    )


def read_idx(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An array from the IDX format (unsigned bytes)."""
    rank = data[3]
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(rank)]
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def fixed_order(n: int, purpose: str) -> list[int]:
    """A fixed shuffled order of 0 .. n-1, by hash, so that it depends on no library's version."""
    return sorted(range(n), key=lambda i: hashlib.blake2b(f"fashion_mnist/{purpose}/{i}".encode(), digest_size=16).digest())


def splits(train: int = 60000, test: int = 10000, validation: int = VALIDATION) -> dict[str, tuple[str, list[int]]]:
    """Split -> (file it is from, positions there, in the order they are stored)."""
    order = fixed_order(train, "train")
    return {"train": ("train", order[:-validation]), "val": ("train", order[-validation:]), "test": ("t10k", fixed_order(test, "test"))}


def png(grey: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """(28, 28) -> a 32x32 RGB PNG: 2 black pixels on each side, grey replicated."""
    buffer = io.BytesIO()
    Image.fromarray(np.repeat(np.pad(grey, 2)[..., None], 3, axis=2)).save(buffer, "PNG")
    return buffer.getvalue()


def is_done(out: Path, limit: int | None) -> bool:
    """Whether `out` holds this very data set, checked shard by shard."""
    path = out / "manifest.json"
    if not path.is_file():
        return False
    try:
        manifest = json.loads(path.read_text())
    except ValueError:
        return False
    return (
        isinstance(manifest, dict)
        and manifest.get("version") == VERSION
        and manifest.get("limit") == limit
        and all(verified(out, s["shards"]) for s in manifest["splits"].values())
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/fashion_mnist"), help="where the shards go (default: data/fashion_mnist)")
    parser.add_argument("--source", choices=["auto", "debian", "mirror"], default="auto", help="where to fetch the data (default: auto)")
    parser.add_argument("--folder", type=Path, default=None, help="take the four idx files from this folder instead")
    parser.add_argument("--limit", type=int, default=None, help="at most this many samples per split, for quick trials")
    args = parser.parse_args(argv)
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit {args.limit}: at least 1")
    if is_done(args.out, args.limit):
        print(f"{args.out}: already there, checksums right")
        return 0
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out}: is no folder")
    if args.out.exists() and any(args.out.iterdir()) and not (args.out / "manifest.json").is_file():
        parser.error(f"--out {args.out}: holds other files and no manifest.json of this tool. Choose another folder or empty it.")
    partial = args.out.with_name(args.out.name + ".partial")
    try:  # before the download
        shutil.rmtree(partial, ignore_errors=True)
        prepare(partial)
    except OSError as e:
        parser.error(f"--out {args.out}: cannot be written: {e}")
    try:
        contents, source = fetch(args.source, args.folder)
    except SourceError as e:
        print(e, file=sys.stderr)
        shutil.rmtree(partial)
        return 1
    manifest: dict[str, Any] = {"version": VERSION, "limit": args.limit, "source": source, "content_sha256": CONTENT_SHA256, "splits": {}}
    for split, (origin, order) in splits().items():
        images, labels = read_idx(contents[f"{origin}-images-idx3-ubyte"]), read_idx(contents[f"{origin}-labels-idx1-ubyte"])

        def samples(
            images: np.ndarray[Any, Any] = images,
            labels: np.ndarray[Any, Any] = labels,
            origin: str = origin,
            order: list[int] = order,
            split: str = split,
        ) -> Iterator[dict[str, Any]]:
            for i in tqdm(order[: args.limit], unit="images", desc=split):
                yield {"__key__": f"{origin}-{i:05d}", "png": png(images[i]), "cls": str(int(labels[i])).encode()}

        shards = write_shards(samples(), partial, split, PER_SHARD)
        manifest["splits"][split] = {"samples": sum(s["samples"] for s in shards), "shards": shards}
    write_json(partial / "classes.json", CLASSES)
    write_json(partial / "manifest.json", manifest)
    if args.out.exists():
        shutil.rmtree(args.out)
    os.replace(partial, args.out)
    for split, s in manifest["splits"].items():
        print(f"{split}: {s['samples']} images in {len(s['shards'])} shards: {args.out}/{split}-{{000000..{len(s['shards']) - 1:06d}}}.tar")
    return 0


if __name__ == "__main__":
    sys.exit(main())
