"""Time and memory of `srcflow convert` on random weights of full size, as the table of docs/howto/published-weights.md.

    python tools/bench_convert.py [--only NAME ...] [--small] [--keep DIR]

Every conversion is a process of its own: reading the file, building the model, writing the directory. A second process loads the directory
and compares it with a conversion in Python, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from srcflow import artifacts, convert, presets
from srcflow.autoencoders.vit_decoder import ViTDecoder
from srcflow.cli import main as srcflow
from srcflow.encoders.dinov2 import DINOv2

State = dict[str, Tensor]


class Case(NamedTuple):
    """A model in its published form: its name, the kind of conversion, its state dict and configuration at full and at small size."""

    title: str
    kind: str
    make: Callable[[bool], tuple[State, dict[str, Any]]]


def encoder(small: bool) -> tuple[State, dict[str, Any]]:
    sizes: dict[str, Any] = {"timm_args": {"depth": 1, "embed_dim": 64, "num_heads": 1}} if small else {}
    return convert.to_transformers(DINOv2(weights=None, **sizes)), {"encoder_heads": 1} if small else {}


def decoder(small: bool) -> tuple[State, dict[str, Any]]:
    sizes = {"dim": 48, "depth": 1, "heads": 4, "mlp_dim": 64} if small else {"dim": 1152, "depth": 28, "heads": 16, "mlp_dim": 4096}
    return convert.to_rae_decoder(ViTDecoder(768, **sizes)), {"heads": sizes["heads"]}


def tarflow(small: bool) -> tuple[State, dict[str, Any]]:
    width, blocks, layers = (64, 2, 1) if small else (1024, 8, 8)
    return convert.to_tarflow(presets.tarflow(32, 48, width, blocks, layers, num_classes=1000))


def starflow(small: bool) -> tuple[State, dict[str, Any]]:
    width, layers = (64, [1, 1]) if small else (2048, [2, 2, 2, 2, 2, 18])
    return convert.to_starflow(presets.starflow(32, 4, width, layers, text_dim=2048))


CASES = {
    "encoder": Case("DINOv2-B with registers (`encoder`)", "encoder", encoder),
    "rae_decoder": Case("RAE's ViT-XL decoder (`rae_decoder`)", "rae_decoder", decoder),
    "tarflow": Case("TARFlow 4-1024-8-8 for 128 px (`tarflow`)", "tarflow", tarflow),
    "starflow": Case("STARFlow of width 2048, layers 2 2 2 2 2 18 (`starflow`)", "starflow", starflow),
}


def write(name: str, small: bool, folder: Path) -> None:
    """Write the published form."""
    torch.manual_seed(0)
    state, config = CASES[name].make(small)
    for key, tensor in state.items():  # heads start at zero
        if tensor.is_floating_point() and key != "var":
            state[key] = tensor + 0.02 * torch.randn_like(tensor)
    save_file(state, folder / "in.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def run(name: str, folder: Path, report: Any) -> None:
    """Convert; reports seconds and peak GiB."""
    start = time.perf_counter()
    arguments = ["--config", str(folder / "config.json"), "--out", str(folder / "out")]
    with contextlib.redirect_stdout(io.StringIO()):
        srcflow(["convert", CASES[name].kind, str(folder / "in.safetensors"), *arguments])
    report.put((time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


def compare(name: str, folder: Path, report: Any) -> None:
    """Load; reports seconds, parameters, and whether every tensor is the file's."""
    from srcflow.convert.files import read_config, read_weights

    start = time.perf_counter()
    loaded = artifacts.load(folder / "out", nn.Module)
    seconds = time.perf_counter() - start
    again = getattr(convert, CASES[name].kind)(read_weights(folder / "in.safetensors"), **read_config(folder / "config.json"))
    state = again.state_dict()
    equal = all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())
    report.put((seconds, sum(p.numel() for p in loaded.parameters()), equal))


def apart(function: Callable[..., None], *arguments: Any) -> Any:
    """Run in a process of its own; what it reports."""
    context = multiprocessing.get_context("spawn")
    report = context.SimpleQueue()
    process = context.Process(target=function, args=(*arguments, report))
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"error: {function.__name__} {arguments[0]} ended with {process.exitcode}")
    return report.get()


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="which models")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--keep", help="folder for the files instead of a temporary one")
    config = parser.parse_args()
    print("| what | parameters | convert | peak memory | load |\n|---|---|---|---|---|", flush=True)
    for name in config.only:
        with tempfile.TemporaryDirectory(dir=config.keep) as folder:
            write(name, config.small, Path(folder))
            seconds, peak = apart(run, name, Path(folder))
            loading, parameters, equal = apart(compare, name, Path(folder))
        if not equal:
            raise SystemExit(f"error: {name}: what was loaded is not what was converted")
        row = (CASES[name].title, f"{parameters / 1e6:.1f} M", f"{seconds:.1f} s", f"{peak:.1f} GiB", f"{loading:.1f} s")
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
