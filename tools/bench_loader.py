"""How fast images are loaded, per core, against the bare decode limit: `python tools/bench_loader.py`.

The limit decodes, resizes and crops images that lie in memory, in a loop. Beside it stand the loaders of `ImageShards`, at random ("map")
and from front to back ("stream"), without worker processes and with one. Images are made up: JPEGs whose short side is 500 px, cropped at
256, and of 32 px. All are measured in turn, several times, so that a busy machine slows them alike; the table shows medians, and shares of
the limit by the clock and by CPU time (of this process and the worker, where the system tells), which others disturb less.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from make_shards import write_shards
from PIL import Image

from srcflow.data.transforms import ImageTransform, decode
from srcflow.datamodules.image_shards import ImageShards

SHARDS = 8
BATCH = 32


class Timing(NamedTuple):
    """One pass over the images, in seconds."""

    wall: float
    cpu: float


def jpeg(size: int, rng: np.random.Generator) -> bytes:
    """A JPEG (quality 90) of 4:3 with a short side of `size`: smooth colours, edges and some grain."""
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((size * 4 // 3, size), Image.Resampling.BICUBIC)
    y, x = np.mgrid[:size, : size * 4 // 3]
    stripes = 24 * np.sign(np.sin(x * rng.uniform(0.05, 0.2) + y * rng.uniform(-0.2, 0.2)))
    pixels = np.asarray(coarse, np.float32) + stripes[..., None] + rng.normal(0, 6, (*y.shape, 1))
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def cpu_seconds(processes: Sequence[int]) -> float:
    """CPU time of this process and others so far; theirs counts as 0 where the system has no /proc."""
    total = time.process_time()
    for process in processes:
        stat = Path(f"/proc/{process}/stat")
        if stat.is_file():
            user, system = stat.read_text().rpartition(")")[2].split()[11:13]
            total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def timed(run: Callable[[], None], processes: Sequence[int] = ()) -> Timing:
    """Run once."""
    wall, cpu = time.perf_counter(), cpu_seconds(processes)
    run()
    return Timing(time.perf_counter() - wall, cpu_seconds(processes) - cpu)


def measure(size: int, crop: int, images: int, repeats: int, folder: Path) -> dict[str, list[Timing]]:
    """Timings of the limit and of the loaders, by name.

    Args:
        size: short side of the images.
        crop: side of what comes out.
        images: how many, a multiple of `BATCH`.
        repeats: passes of each.
        folder: where the shards go.
    """
    rng = np.random.default_rng(0)
    files = [jpeg(size, rng) for _ in range(images)]
    samples = ({"__key__": f"{i:06d}", "jpg": data} for i, data in enumerate(files))
    write_shards(samples, folder, f"bench{size}", -(-images // SHARDS))
    transform = ImageTransform(crop, "random", max(crop, size * 3 // 4), True)

    def limit() -> None:
        for i, data in enumerate(files):
            transform(decode(data, ""), epoch=0, index=i)

    def once(loader: Any) -> Callable[[], None]:
        def run() -> None:
            if sum(len(batch["indices"]) for batch in loader) != images:
                raise RuntimeError("the loader gave another number of images")

        return run

    runs: dict[str, tuple[Callable[[], None], list[int]]] = {"decode, resize, crop": (limit, [])}
    loaders = []
    for mode in ("map", "stream"):
        for workers in (0, 1):
            data = ImageShards(
                f"{folder}/bench{size}-*.tar", size=crop, crop="random", resize=max(crop, size * 3 // 4), flip=True, batch_size=BATCH,
                mode=mode, num_workers=workers, shuffle_buffer=images // 4,
            )  # fmt: skip
            loader = data.loader("train", training=True)
            before = set(torch.multiprocessing.active_children())
            once(loader)()  # starts the worker, warms the page cache
            loaders.append(loader)  # keeps the worker
            processes = [int(c.pid or 0) for c in set(torch.multiprocessing.active_children()) - before]
            runs[f"{mode}, {workers} worker{'s' * (workers != 1)}"] = once(loader), processes
    limit()
    found: dict[str, list[Timing]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (run, processes) in runs.items():
            found[name].append(timed(run, processes))
    return found


def table(found: dict[str, list[Timing]], images: int) -> list[str]:
    """Rows of a Markdown table: images per second, and shares of the limit in the same round."""
    limit = next(iter(found.values()))
    rows = ["| what | images/s | images per CPU second | of the limit, clock | of the limit, CPU |", "|---|---|---|---|---|"]
    for name, timings in found.items():
        wall, cpu = (statistics.median(getattr(t, clock) for t in timings) for clock in ("wall", "cpu"))
        shares = [
            statistics.median(getattr(a, clock) / max(getattr(b, clock), 1e-9) for a, b in zip(limit, timings, strict=True))
            for clock in ("wall", "cpu")
        ]
        rows.append(f"| {name} | {images / wall:.0f} | {images / max(cpu, 1e-9):.0f} | {shares[0]:.1%} | {shares[1]:.1%} |")
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=64, help="per pass, made up in whole batches of 32 (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="passes of each, in turn (default: %(default)s)")
    parser.add_argument("--sizes", default="500:256,32:32", help="short side of the files : crop, several (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.images < BATCH or args.repeats < 1:
        parser.error(f"--images must be at least {BATCH}, and --repeats 1")
    try:
        sizes = [(int(size), int(crop)) for size, crop in (pair.split(":") for pair in args.sizes.split(","))]
        if not all(1 <= crop <= size for size, crop in sizes):
            raise ValueError("the crop is above the size")
    except ValueError as e:
        parser.error(f"--sizes {args.sizes}: wanted like 500:256,32:32 ({e})")
    torch.set_num_threads(1)
    images = args.images // BATCH * BATCH
    for size, crop in sizes:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(size, crop, images, args.repeats, Path(folder))
        print(f"\n{size} px to {crop} px, {images} images, median of {args.repeats} passes each:\n")
        print("\n".join(table(found, images)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
