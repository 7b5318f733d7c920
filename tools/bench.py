"""Speed of the parts, in images per second: `python tools/bench.py` (tiny, on a CPU in seconds), or `--config configs/flow/RUN.yaml`.

Measured, each alone and after a warm-up, on random images and untrained weights (speed does not depend on them): encoder, decoder,
compressor (there and back), a training step of the flow (forward, backward, AdamW) and sequential sampling, with its time per block. A
configuration is a flow's; its codec is found among the configurations by the directory it writes. Medians over `--repeats`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from count import built, codec_of

from srcflow.autoencoders.base import Autoencoder
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.autoencoders.representation import RepresentationAutoencoder
from srcflow.autoencoders.vit_decoder import ViTDecoder
from srcflow.compressors.base import Compressor
from srcflow.compressors.semantic import Semantic
from srcflow.encoders.efficientnet_lite import EfficientNetLite
from srcflow.flows.flow import Flow
from srcflow.flows.presets import srcflow
from srcflow.guidance.base import Guidance
from srcflow.guidance.gaussian import Gaussian
from srcflow.registry import build, spec_of
from srcflow.solvers.base import Solver
from srcflow.solvers.sequential import Sequential
from srcflow.testing import perturb
from srcflow.types import CausalBlock, Condition, Context, Solution


class Timed(Solver):
    """Sequential, with the seconds of every block."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []

    def __call__(self, block: CausalBlock, z: torch.Tensor, ctx: Context, guidance: Guidance | None = None) -> Solution:
        """See `Solver`."""
        start = now(self.device)
        solution = Sequential()(block, z, ctx, guidance)
        self.seconds.append(now(self.device) - start)
        return solution


def now(device: torch.device) -> float:
    """Seconds, when everything asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def tiny() -> tuple[Autoencoder, Compressor, Flow]:
    """A chain of the demo's kind, with narrower parts."""
    encoder = EfficientNetLite(image_size=64, weights=None)
    decoder = ViTDecoder(latent_dim=encoder.dim, dim=64, depth=2, heads=2, mlp_dim=128, patch=8, grid=4)
    compressor = Semantic(encoder.dim, code_dim=8, width=64, layers=1, head_dim=32, grid=4, start="random")
    return RepresentationAutoencoder(encoder, decoder), compressor, srcflow(4, 8, 64, [1, 1, 2], num_classes=10, head_dim=32)


def configured(path: Path) -> tuple[Autoencoder, Compressor, Flow]:
    """The parts that a flow's configuration names, with random weights."""
    task = built(path)
    if not hasattr(task, "flow"):
        raise SystemExit(f"{path} is no flow's configuration.")
    parts: list[Any] = [without_weights(spec_of(part)) for part in (*codec_of(task), task.flow)]
    bases = (Autoencoder, Compressor, Flow)
    return tuple(build(spec, base) for spec, base in zip(parts, bases, strict=True))  # type: ignore[return-value]


def without_weights(spec: Any) -> Any:
    """The specification with no pretrained weights in it: nothing is looked up."""
    if isinstance(spec, dict):
        return {k: None if k in ("weights", "decoder_weights") else without_weights(v) for k, v in spec.items()}
    return [without_weights(v) for v in spec] if isinstance(spec, list) else spec


def ready(autoencoder: Autoencoder, compressor: Compressor) -> None:
    """Stand-ins for what is fitted, so that untrained parts can be used."""
    if isinstance(autoencoder, RepresentationAutoencoder):
        autoencoder.set_statistics(torch.zeros(autoencoder.dim), torch.ones(autoencoder.dim))
    if compressor.needs_pca:
        compressor.init_from_pca(torch.zeros(compressor.dim), torch.eye(compressor.code_dim, compressor.dim))


class Bench:
    """Measures one chain.

    Args:
        parts: autoencoder, compressor and flow.
        args: the command's arguments.
    """

    def __init__(self, parts: tuple[Autoencoder, Compressor, Flow], args: argparse.Namespace) -> None:
        ready(parts[0], parts[1])
        self.device = torch.device(args.device)
        self.autoencoder, self.compressor, self.flow = (part.to(self.device) for part in parts)
        perturb(self.flow)
        self.args, self.batch = args, args.batch_size
        self.rows: dict[str, float] = {}

    def measure(self, name: str, call: Callable[[], Any]) -> Any:
        """Images per second of `call`, printed and kept; returns its last result."""
        result, seconds = None, []
        for i in range(self.args.repeats + 1):
            start = now(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bfloat16"):
                result = call()
            if i:  # the first is a warm-up
                seconds.append(now(self.device) - start)
        self.rows[name] = self.batch / statistics.median(seconds)
        print(f"  {name:<22} {self.rows[name]:>10.4g} images/s", flush=True)
        return result

    def run(self) -> None:
        """Measure everything."""
        images = torch.rand(self.batch, 3, *self.autoencoder.image_size, device=self.device)
        with torch.no_grad():
            raw, grid = self.measure("encoder", lambda: self.autoencoder.features(images))
            x = self.autoencoder.normalize(raw)
            codes = self.measure("compressor, forward", lambda: self.compressor.compress(x, grid))
            self.measure("compressor, back", lambda: self.compressor.expand(codes, grid))
            if not isinstance(self.autoencoder, PixelPatches):
                self.measure("decoder", lambda: self.autoencoder.decode(x, grid))
        codes = codes.float()
        labels = torch.arange(self.batch, device=self.device) % max(self.flow.num_classes, 1)
        condition = Condition(labels=labels) if self.flow.num_classes else None
        if not self.args.no_training:
            optimizer = torch.optim.AdamW(self.flow.parameters(), lr=1e-6)

            def step() -> None:
                optimizer.zero_grad(set_to_none=True)
                (-self.flow.log_prob(codes, condition).mean()).backward()
                optimizer.step()

            self.measure("flow, training step", step)
            optimizer.zero_grad(set_to_none=True)
        z = torch.randn_like(codes)
        for name, guidance in (("flow, sampling", None), ("flow, guided sampling", Gaussian(1.0) if condition else None)):
            if name == "flow, guided sampling" and guidance is None:
                continue
            solver = Timed(self.device)
            self.measure(name, lambda s=solver, g=guidance: self.flow.inverse(z, condition, guidance=g, solver=s))
            blocks = len(self.flow.blocks)
            for k in range(blocks):  # noise side first
                seconds = statistics.median(solver.seconds[blocks + k :: blocks])
                layers = self.flow.blocks[blocks - 1 - k].layer_count
                print(f"    block {blocks - 1 - k} ({layers} layers) {seconds * 1e3:>10.4g} ms", flush=True)
                self.rows[f"{name}, block {blocks - 1 - k}, ms"] = seconds * 1e3


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=None, help="a flow's configuration; default: a tiny chain")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    parser.add_argument("--batch-size", type=int, default=16, help="images per call (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="measured calls, after one that is not (default: %(default)s)")
    parser.add_argument("--no-training", action="store_true", help="leave out the training step, which needs the most memory")
    parser.add_argument("--json", type=Path, default=None, help="write the numbers to this file too")
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.batch_size < 1:
        parser.error("--repeats and --batch-size are at least 1")
    torch.manual_seed(0)
    parts = tiny() if args.config is None else configured(args.config)
    where = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else f"{platform.machine()} CPU"
    threads = f"{torch.get_num_threads()} threads, " if args.device == "cpu" else ""
    sizes = ", ".join(f"{type(p).__name__} {sum(t.numel() for t in p.parameters()):,}" for p in parts)
    print(f"{args.config or 'tiny chain'}: {sizes} parameters")
    print(f"{where}, {threads}{args.precision}, batch {args.batch_size}, torch {torch.__version__}", flush=True)
    bench = Bench(parts, args)
    bench.run()
    if args.json is not None:
        facts = {"config": str(args.config), "device": where, "precision": args.precision, "batch_size": args.batch_size}
        args.json.write_text(json.dumps({**facts, "torch": str(torch.__version__), "numbers": bench.rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
