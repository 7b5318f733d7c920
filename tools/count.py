"""Count a configuration's trained parameters and its FLOPs per image: `python tools/count.py configs/flow/*.yaml [--write]`.

Everything is built on the meta device, so no weights are needed and the largest model takes seconds. FLOPs are those of one image in one
training step, as torch.utils.flop_counter has them: 2 per multiply-add of every matrix product, convolution and attention product; causal
attention counts as full, what activation checkpointing computes twice counts once, and everything else (norms, activations, resizing)
counts nothing. All losses are on, as late in training. `--write` puts the lines `# Parameters:` and `# FLOPs:` into each file's header.

What a run reads from an earlier stage (`codec`, `autoencoder`) is found among the configurations by its `artifact`.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from srcflow.autoencoders.base import Autoencoder
from srcflow.cli import load_parts
from srcflow.cli.export import task_of
from srcflow.compressors.base import Compressor
from srcflow.compressors.identity import Identity
from srcflow.losses.perceptual import LPIPS
from srcflow.losses.reconstruction import feature_loss, pixel_loss
from srcflow.tasks.autoencoder import AutoencoderTask
from srcflow.tasks.compressor import CompressorTask
from srcflow.tasks.flow import FlowTask
from srcflow.tasks.reconstruction import ReconstructionTask
from srcflow.types import Condition

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


class Phases:
    """FLOPs of named parts of a step."""

    def __init__(self) -> None:
        self.flops: dict[str, int] = {}

    def __call__(self, name: str, function: Callable[[], Any]) -> Any:
        """Run `function`, and add what it costs to `name`."""
        with FlopCounterMode(display=False) as counter:
            result = function()
        self.flops[name] = self.flops.get(name, 0) + counter.get_total_flops()
        return result


def flops(task: Any) -> dict[str, int]:
    """FLOPs of one image in one training step, by phase (see the module)."""
    # autocast does not know the meta device, and changes no count
    off = {"autocast": lambda *args, **kwargs: nullcontext(), "is_autocast_enabled": lambda *args: False}
    with mock.patch.multiple(torch, **off):
        if isinstance(task, FlowTask):
            return _flow(task)
        if isinstance(task, ReconstructionTask):
            return _reconstruction(task)
    raise SystemExit(f"{type(task).__name__} is no stage that this script knows.")


def _fitted(module: nn.Module) -> None:
    """Let fitted parts be used; their statistics on the meta device have no values anyway."""
    for name in ("statistics_fitted", "fitted", "pca_started"):
        for m in module.modules():
            if name in m._buffers:
                m.register_buffer(name, torch.tensor(True))


def _image(autoencoder: Autoencoder) -> Tensor:
    return torch.zeros(1, 3, *autoencoder.image_size, device="meta")


def _flow(task: FlowTask) -> dict[str, int]:
    autoencoder, compressor = (copy.deepcopy(p) for p in codec_of(task))
    for module in (autoencoder, compressor, task):
        _fitted(module)
    task.flow.set_checkpointing(0)
    phases = Phases()

    def codes() -> Tensor:
        with torch.no_grad():
            raw, grid = autoencoder.features(_image(autoencoder))
            return compressor.compress(autoencoder.normalize(raw), grid)

    x = phases("frozen parts", codes)
    labels = torch.zeros(1, dtype=torch.int64, device="meta")
    out = phases("forward", lambda: task.flow(x, Condition(labels=labels) if task.flow.num_classes else None))
    loss = out.z.square().mean() - out.logdet.mean()
    phases("backward", loss.backward)
    return phases.flops


def _reconstruction(task: ReconstructionTask) -> dict[str, int]:
    if not any(p.requires_grad for p in task.parameters()):
        return {}
    if isinstance(task, AutoencoderTask):
        autoencoder = task.autoencoder
    else:
        assert isinstance(task, CompressorTask)
        autoencoder = task.set_outside("autoencoder", copy.deepcopy(part(task.place_of_autoencoder)))
        _fitted(task.compressor)
    _fitted(autoencoder)
    perceptual = task.outside.get("perceptual")
    if isinstance(perceptual, LPIPS):
        name = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}[perceptual.net]
        with torch.device("meta"):
            perceptual._install(torchvision.models.get_model(name).state_dict())
        perceptual.to("meta")
    images = _image(autoencoder)
    phases = Phases()
    raw, grid = phases("frozen parts", lambda: autoencoder.features(images))
    clean = autoencoder.normalize(raw)

    def reconstruct() -> tuple[Tensor | None, Tensor | None]:
        if isinstance(task, AutoencoderTask):
            return None, task.reconstruct(raw, grid, None)
        _, features = task.compressor(clean, grid)
        return features, autoencoder.decode(features, grid) if task.decodes else None

    features, fake = phases("forward", reconstruct)

    def losses() -> Tensor:
        loss = torch.zeros((), device="meta")
        if fake is not None:
            loss = loss + pixel_loss(fake, images, task.pixel_kind)
            if perceptual is not None:
                loss = loss + perceptual(fake, images)
            if task.discriminator is not None:
                game = task.discriminator.adversarial
                game.discriminator_loss(images, fake)[0].backward()
                last = task.last_layer()
                assert last is not None
                term = game.generator_loss(fake)
                loss = loss + game.adaptive_weight(loss, term, last) * term
        if features is not None and isinstance(task, CompressorTask) and task.feature_weight > 0:
            loss = loss + feature_loss(features, clean)
        return loss

    loss = phases("losses", losses)
    phases("backward", loss.backward)
    return phases.flops


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
