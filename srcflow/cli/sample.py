"""`srcflow sample`: images from a trained flow, as a grid, a folder of PNG files, or the array file that FID evaluators read."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from srcflow.errors import ConfigError, DataError, Problems

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from torch import Tensor

    from srcflow.cli.parser import Parser
    from srcflow.pipeline import Pipeline
    from srcflow.solvers.report import SolverReport

Labels = NDArray[np.int64]
Images = NDArray[np.uint8]
Batches = Iterator[tuple[int, Images]]

HELP = "Draw images from a trained flow: a grid, a folder of PNG files, or one .npz."
FAMILIES = ("guidance", "schedules", "solvers")
FORMATS = {".png": "grid", ".npz": "npz"}
OTHER_FILES = (".npy", ".zip", ".tar", ".gz", ".pt", ".pth", ".safetensors", ".h5", ".hdf5", ".mp4", ".pdf", ".csv", ".json", ".parquet")
"""Endings of files that are not images; with those of images, nobody means a folder by them."""


def configure(parser: Parser) -> None:
    """Add the command's arguments."""
    from srcflow.guidance.base import Guidance
    from srcflow.solvers.base import Solver

    parser.bases = {"guidance": Guidance, "solver": Solver}
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments.")
    parser.add_argument("--pipeline", type=str, required=True, help="A flow's artifact, or a Pipeline directory.")
    parser.add_argument("--autoencoder", type=str | None, default=None, help="Where the autoencoder is, if it moved or is not recorded.")
    parser.add_argument("--compressor", type=str | None, default=None, help="Where the compressor is, likewise.")
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema", help="Averaged or last weights of the last stage.")
    parser.add_argument("--out", type=str, required=True, help="File (.png, .npz) or folder to write.")
    parser.add_argument(
        "--format",
        choices=["grid", "folder", "npz"],
        help="grid: one PNG; folder: a PNG per image, named by its index; npz: arr_0 uint8 (n, H, W, 3) and arr_1 labels, as ADM's "
        "evaluator reads them. Default: by the ending of --out.",
    )
    what = parser.add_argument_group("how many, and of which class")
    what.add_argument("--n", type=int | None, default=None, help="Number of images, over all classes.")
    what.add_argument("--labels", choices=["equal", "random"], default="equal", help="With --n: all classes equally often, or at random.")
    what.add_argument("--classes", type=str | None, default=None, help='Class ids, e.g. "0,3,7", or "all"; one row of a grid per class.')
    what.add_argument("--per_class", type=int, default=8, help="With --classes: images per class.")
    how = parser.add_argument_group("how")
    how.add_argument("--seed", type=int, default=0, help="Image i depends on the seed and on i, not on the batch size.")
    how.add_argument("--guidance", type=Guidance | None, default=None, help="Guidance rule, e.g. Linear --guidance.strength 1.5.")
    how.add_argument("--solver", type=Solver | None, default=None, help="How the flow is inverted; default: Sequential.")
    how.add_argument("--temperature", type=float, default=1.0, help="Factor of the flow's input noise.")
    how.add_argument("--attention_temperature", type=float, default=1.0, help="Divides every attention logit.")
    how.add_argument(
        "--denoise",
        type=float | None,
        default=None,
        help="Deviation of the Gaussian noise that a flow without compressor was trained under, to take out of the samples; e.g. 0.05.",
    )
    how.add_argument(
        "--denoiser", choices=["score", "learned"], default="score", help="With --denoise: by the flow's score, or its learnable denoiser."
    )
    how.add_argument("--batch_size", type=int, default=64, help="Images per call.")
    how.add_argument("--device", type=str | None, default=None, help="Default: cuda if there is one, else cpu.")
    how.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast; scales stay float32.")


def run(config: Namespace) -> int:
    """Draw and write."""
    out = Path(config.out)
    form = config.format or FORMATS.get(out.suffix.lower(), "folder")
    _check(config, out, form)
    from srcflow.chain import check_denoising
    from srcflow.cli.devices import device_of
    from srcflow.pipeline import Pipeline
    from srcflow.solvers.report import SolverReport

    device = device_of(config.device)
    pipeline = Pipeline.from_pretrained(
        config.pipeline, weights=config.weights, autoencoder=config.autoencoder, compressor=config.compressor
    ).to(device)
    if pipeline.flow is not None and config.denoise is not None:  # before a file is written
        check_denoising(pipeline.compressor, pipeline.flow, config.denoise, config.denoiser)
    labels = wanted_labels(config, 0 if pipeline.flow is None else pipeline.flow.num_classes)
    n = config.n if labels is None else len(labels)
    broken: list[int] = []
    report = SolverReport()
    batches = drawn(pipeline, n, labels, config, device, broken, report)
    WRITERS[form](out, batches, n, labels, columns(config, n))
    print(f"Wrote {n} images to {out}.")
    _say(report.summary())
    if broken:
        which = ", ".join(map(str, broken[:8])) + (", ..." if len(broken) > 8 else "")
        cure = "Lower the guidance, or draw with another --seed."
        print(
            f"warning: {len(broken)} of {n} images ({which}) ran away to numbers that are not finite and are black. {cure}", file=sys.stderr
        )
    return 0


def _say(solved: dict[str, Any]) -> None:
    """One line on how the blocks were inverted."""
    if solved["samples"]:
        steps = ", ".join(f"{i:.4g}" for i in solved["iterations"])
        line = f"Inversion, noise-side block first: {steps} iterations per sample, largest residual {max(solved['residual']):.2g}"
        print(f"{line}, {solved['fallbacks']} fallbacks.")


def wanted_labels(config: Namespace, num_classes: int) -> Labels | None:
    """(n,) int64 class of every image, None for a flow without classes.

    Args:
        config: the command's arguments.
        num_classes: of the flow, 0 if it has none.

    Raises:
        ConfigError: classes that the flow does not have.
    """
    if config.classes is None:
        if num_classes == 0:
            return None
        if config.labels == "equal":
            return np.arange(config.n, dtype=np.int64) % num_classes
        from srcflow.randomness import generator

        drawn_labels = (generator(config.seed, "sample labels", index=i).integers(num_classes) for i in range(config.n))
        return np.fromiter(drawn_labels, dtype=np.int64, count=config.n)
    if num_classes == 0:
        raise ConfigError("classes", config.classes, "the flow has no classes.", "Use --n.")
    try:
        classes = list(range(num_classes)) if config.classes == "all" else [int(c) for c in config.classes.split(",")]
    except ValueError as e:
        raise ConfigError("classes", config.classes, "is no list of class ids.", 'Write e.g. "0,3,7", or "all".') from e
    if outside := [c for c in classes if not 0 <= c < num_classes]:
        raise ConfigError("classes", config.classes, f"{outside} are not among the flow's classes 0 to {num_classes - 1}.")
    return np.repeat(np.asarray(classes, dtype=np.int64), config.per_class)


def columns(config: Namespace, n: int) -> int:
    """Images per row of a grid: classes in rows where they were asked for, else about a square."""
    return int(config.per_class) if config.classes is not None else math.ceil(math.sqrt(n))


def drawn(
    pipeline: Pipeline, n: int, labels: Labels | None, config: Namespace, device: Any, broken: list[int], report: SolverReport
) -> Batches:
    """Batches of images as (index of the first, uint8 (b, H, W, 3)), in order; the indices of those that are not finite go to `broken`."""
    import torch

    from srcflow.metrics.non_finite import counted_by_caller
    from srcflow.types import Condition

    with tqdm(total=n, unit="image", desc="sample") as bar:
        for start in range(0, n, config.batch_size):
            stop = min(start + config.batch_size, n)
            what = stop - start if labels is None else Condition(labels=torch.from_numpy(labels[start:stop]).to(device))
            with torch.no_grad(), counted_by_caller(), torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                images = pipeline.sample(
                    what,
                    seed=config.seed,
                    indices=torch.arange(start, stop),
                    guidance=config.guidance,
                    solver=config.solver,
                    temperature=config.temperature,
                    attention_temperature=config.attention_temperature,
                    denoise=config.denoise,
                    denoiser=config.denoiser,
                    report=report,
                )
            finite = images.isfinite().flatten(1).all(1)
            broken += [start + i for i in (~finite).nonzero().flatten().tolist()]
            yield start, to_uint8(torch.where(finite[:, None, None, None], images, 0.0))
            bar.update(stop - start)


def to_uint8(images: Tensor) -> Images:
    """Images (B, 3, H, W) in [0, 1], rounded to the nearest of 256 levels: (B, H, W, 3) uint8."""
    levels = images.detach().float().clamp(0, 1).mul(255).round()
    array: Images = levels.permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8)
    return array


def write_grid(out: Path, batches: Batches, n: int, labels: Labels | None, columns: int) -> None:
    """One PNG with `columns` images per row."""
    import torch
    from torchvision.utils import make_grid

    images = torch.from_numpy(np.concatenate([batch for _, batch in batches])).permute(0, 3, 1, 2)
    grid = make_grid(images, nrow=columns, padding=2, pad_value=255)
    with _whole(out, n) as partial:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(partial, format="PNG")


def write_folder(out: Path, batches: Batches, n: int, labels: Labels | None, columns: int) -> None:
    """`<index>.png` per image, written as they are drawn."""
    digits = max(6, len(str(n - 1)))
    for start, batch in batches:
        for i, image in enumerate(batch, start):
            file = out / f"{i:0{digits}d}.png"
            there = f"The first {i} of {n} images are there" if i else f"None of the {n} images is there"
            with _writing(out, f"{there}.", file):
                out.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(file)


def write_npz(out: Path, batches: Batches, n: int, labels: Labels | None, columns: int) -> None:
    """arr_0 uint8 (n, H, W, 3), and arr_1 int64 (n,) labels where there are classes."""
    images: Images | None = None
    for start, batch in batches:
        if images is None:
            images = np.empty((n, *batch.shape[1:]), dtype=np.uint8)
        images[start : start + len(batch)] = batch
    arrays: list[Any] = [images] if labels is None else [images, labels]
    with _whole(out, n) as partial, partial.open("wb") as file:  # an open file keeps numpy from adding an ending to the name
        np.savez(file, *arrays)


@contextmanager
def _whole(out: Path, n: int) -> Iterator[Path]:
    """A file that takes the place of `out` once it is complete, so that a failure leaves neither a part nor an older file spoilt."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    with _writing(out, f"None of the {n} images is there.", partial):
        out.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(out)


@contextmanager
def _writing(out: Path, done: str, file: Path) -> Iterator[None]:
    """Say what was written before a disk is full or a right is lost; what there is of `file` is removed."""
    try:
        yield
    except OSError as e:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        cure = "Make room or name another place; the same --seed draws the same images."
        raise DataError(f"out = {str(out)!r}: cannot be written: {e.strerror or e}. {done} {cure}") from e


WRITERS: dict[str, Callable[[Path, Batches, int, Labels | None, int], None]] = {
    "grid": write_grid,
    "folder": write_folder,
    "npz": write_npz,
}


def _check(config: Namespace, out: Path, form: str) -> None:
    """Everything that can be checked before a model is loaded.

    Raises:
        ConfigError: an argument that cannot be used, or ProblemsError for several.
    """
    from srcflow import artifacts
    from srcflow.chain import check_denoise
    from srcflow.cli.devices import device_of

    problems = Problems()
    with problems.collect():
        device_of(config.device)
    if (config.n is None) == (config.classes is None):
        problems.add(ConfigError("n", config.n, "give either a number of images or classes.", "Write --n 64, or --classes all."))
    for key, least in (("n", 1), ("per_class", 1), ("batch_size", 1)):
        if config[key] is not None and config[key] < least:
            problems.add(ConfigError(key, config[key], f"must be at least {least}."))
    for key in ("temperature", "attention_temperature"):
        if not config[key] > 0:
            problems.add(ConfigError(key, config[key], "a temperature is positive."))
    with problems.collect():
        check_denoise(config.denoise, config.denoiser)
    needed = {"grid": ".png", "npz": ".npz"}.get(form)
    if needed is not None and out.suffix.lower() != needed:
        problems.add(ConfigError("out", str(out), f"a {form} is a {needed} file.", f"Write --out {out.with_suffix(needed)}."))
    if form == "folder" and out.is_dir() and any(out.iterdir()):
        problems.add(DataError(f"out = {str(out)!r}: the folder is not empty, and old images would mix with new ones. Name another."))
    ending = out.suffix.lower()
    if config.format is None and form == "folder" and not out.is_dir() and ending in (*Image.registered_extensions(), *OTHER_FILES):
        cure = (
            f"Write {out.with_suffix('.png')} for a grid, {out.with_suffix('.npz')} for arrays, or a name without an ending for a folder."
        )
        problems.add(ConfigError("out", str(out), f"no {ending} files are written.", cure))
    elif form == "folder" and out.is_file():
        problems.add(ConfigError("out", str(out), "is a file, and a folder is wanted."))
    else:
        with problems.collect():
            artifacts.check_writable(out, "out", directory=form == "folder")
    problems.raise_if_any()
