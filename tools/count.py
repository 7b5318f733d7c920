"""Count a configuration's trained parameters and its FLOPs per image: `python tools/count.py configs/flow/*.yaml [--write]`.

Everything is built on the meta device, so no weights are needed and the largest model takes seconds. FLOPs are those of one image in one
training step, as torch.utils.flop_counter has them: 2 per multiply-add of every matrix product, convolution and attention product; causal
attention counts as full, what activation checkpointing computes twice counts once, and everything else (norms, activations, resizing)
counts nothing. All losses are on, as late in training. `--write` puts the lines `# Parameters:` and `# FLOPs:` into each file's header.

What a run reads from an earlier stage (`codec`, `autoencoder`) is found among the configurations by its `artifact`.
"""

from __future__ import annotations

import argparse
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from srcflow.autoencoders.base import Autoencoder
from srcflow.cli import load_parts
from srcflow.cli.export import task_of
from srcflow.compressors.base import Compressor
from srcflow.compressors.identity import Identity
from srcflow.plan.flops import count_flops
from srcflow.plan.step import Stage
from srcflow.tasks.compressor import CompressorTask
from srcflow.tasks.flow import FlowTask

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@cache
def stages() -> dict[str, Path]:
    """Artifact directory -> the configuration that writes it."""
    found: dict[str, Path] = {}
    for path in sorted(CONFIGS.rglob("*.yaml")):
        model = yaml.safe_load(path.read_text(encoding="utf-8")).get("model", {})
        artifact = model.get("init_args", {}).get("artifact") if isinstance(model, dict) else None
        if artifact is not None:
            if artifact in found:
                raise SystemExit(f"{path} and {found[artifact]} write the same artifact, {artifact}.")
            found[artifact] = path
    return found


parts = cache(load_parts)


def built(path: Path) -> Any:
    """A configuration's task on the meta device."""
    parts()
    with torch.device("meta"):
        return task_of(str(path))


shared = cache(built)
"""As `built`, once per file: not to be changed."""


def part(artifact: str) -> Any:
    """The untrained product of the configuration that writes `artifact`, on the meta device; shared, not to be changed."""
    if artifact not in stages():
        raise SystemExit(f"No configuration in {CONFIGS} writes {artifact}.")
    return shared(stages()[artifact]).made


def codec_of(task: FlowTask) -> tuple[Autoencoder, Compressor]:
    """The frozen parts that a flow's configuration names."""
    product = part(task.codec)
    if isinstance(product, Autoencoder):
        return product, Identity(product.dim)
    return part(shared(stages()[task.codec]).place_of_autoencoder), product


def parameters(task: Any) -> tuple[int, int]:
    """(parameters of the product that are trained, parameters of the discriminator's heads)."""
    game = getattr(task, "discriminator", None)
    heads = 0 if game is None else sum(p.numel() for p in game.adversarial.parameters() if p.requires_grad)
    return sum(p.numel() for p in task.parameters() if p.requires_grad), heads


def flops(task: Any) -> dict[str, int]:
    """FLOPs of one image in one training step, by part (see the module)."""
    if isinstance(task, FlowTask):
        return count_flops(Stage(task, *codec_of(task)))
    if isinstance(task, CompressorTask):
        return count_flops(Stage(task, part(task.place_of_autoencoder)))
    return count_flops(Stage(task))


def header(path: Path) -> dict[str, str]:
    """The two computed lines of a configuration's header."""
    task = built(path)
    trained, heads = parameters(task)
    counted = flops(task)
    more = f", and {heads:,} in the discriminator's heads" if heads else ""
    lines = {"Parameters": f"{trained:,} trained{more}."}
    if counted:
        split = ", ".join(f"{name} {number(n)}" for name, n in counted.items() if n)
        lines["FLOPs"] = f"{number(sum(counted.values()))} per image and training step ({split})."
    else:
        lines["FLOPs"] = "0 per image: nothing is trained."
    return lines


def number(n: int) -> str:
    """FLOPs in the largest unit that leaves at least 1."""
    for unit, scale in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n} FLOP"


def main(argv: list[str] | None = None) -> int:
    """Count, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("configs", nargs="+", type=Path, help="complete runs")
    parser.add_argument("--write", action="store_true", help="replace the lines in the files' headers")
    args = parser.parse_args(argv)
    for path in args.configs:
        lines = header(path)
        print(path, *(f"  {name}: {text}" for name, text in lines.items()), sep="\n", flush=True)
        if args.write:
            content = path.read_text(encoding="utf-8")
            for name, text in lines.items():
                content, n = re.subn(rf"^# {name}:.*$", f"# {name}: {text}", content, count=1, flags=re.M)
                if not n:  # a new line at the end of the header
                    content = re.sub(r"^(?!#)", f"# {name}: {text}\n", content, count=1, flags=re.M)
            path.write_text(content, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
