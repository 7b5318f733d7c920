"""Write a small made-up data set: `python tools/synthetic.py [--out data/smoke]`.

Each class is one shape (disc, square, triangle, ring) of a random colour, size and place on a dark ground, 32 x 32 pixels. It stands in for
images where a run must be quick and needs no download: configs/smoke and the tests. Equal arguments give equal files, bit for bit.

Output: `train-000000.tar`, `val-000000.tar`, `test-000000.tar` (png + cls) and `synthetic.json` (class names, shards with their sha256).
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from make_shards import prepare, write_json, write_shards
from numpy.typing import NDArray
from PIL import Image

CLASSES = ("disc", "square", "triangle", "ring")
SPLITS = ("train", "val", "test")
SUPERSAMPLING = 4  # soft edges: shapes are drawn at four times the size and averaged


def draw(label: int, rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """An image (size, size, 3) of the class `label`."""
    y, x = (np.mgrid[: size * SUPERSAMPLING, : size * SUPERSAMPLING] + 0.5) / (size * SUPERSAMPLING)
    radius = rng.uniform(0.22, 0.36)
    cx, cy = rng.uniform(radius, 1 - radius, size=2)
    dx, dy = (x - cx) / radius, (y - cy) / radius
    distance = np.hypot(dx, dy)
    inside = {
        "disc": distance < 1,
        "square": np.maximum(abs(dx), abs(dy)) < 0.85,
        "triangle": (dy < 0.8) & (dy > 2 * abs(dx) - 1),
        "ring": (distance < 1) & (distance > 0.55),
    }[CLASSES[label]]
    cover = inside.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING).mean((1, 3))[..., None]
    ground, colour = rng.uniform(0, 0.25, size=3), rng.uniform(0.45, 1, size=3)
    return ((ground * (1 - cover) + colour * cover) * 255).round().astype(np.uint8)


def samples(split: str, n: int, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """`n` samples of a split, the classes in turn; sample i depends on the seed, the split and i only."""
    for i in range(n):
        label = i % len(CLASSES)
        buffer = io.BytesIO()
        Image.fromarray(draw(label, np.random.default_rng([seed, SPLITS.index(split), i]), size)).save(buffer, format="PNG")
        yield {"__key__": f"{split}{i:06d}", "png": buffer.getvalue(), "cls": str(label).encode()}


def main(argv: list[str] | None = None) -> int:
    """Write the splits."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/smoke"), help="folder of the shards (default: %(default)s)")
    parser.add_argument("--train", type=int, default=256, help="training images (default: %(default)s)")
    parser.add_argument("--eval", type=int, default=64, help="validation images, and test images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=32, help="side in pixels (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    args = parser.parse_args(argv)
    for name, least in (("train", 1), ("eval", 1), ("size", 8)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    try:
        prepare(args.out)
    except OSError as e:
        parser.error(f"--out {args.out}: cannot be written: {e}")
    written = {}
    for split in SPLITS:
        n = args.train if split == "train" else args.eval
        written[split] = write_shards(samples(split, n, args.size, args.seed), args.out, split, per_shard=n)
    write_json(args.out / "synthetic.json", {"classes": CLASSES, "size": args.size, "seed": args.seed, "shards": written})
    print(f"Wrote {args.train} + 2 x {args.eval} images of {len(CLASSES)} classes to {args.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
