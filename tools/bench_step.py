"""One training step of a flow's configuration with bfloat16 weights: `python tools/bench_step.py [CONFIG] [--batch-size 1]`.

Forward, backward, gradient clipping, AdamW and the moving average, as the configuration has them, on random codes (no codec, no data):
a proof that the model trains on a machine of that size, not a way to train it. Weights, gradients and AdamW's moments are bfloat16, which
rounds small updates away; real runs keep them in float32 (`bf16-mixed`). Heads start at zero, which would leave most gradients zero; here
they start small and random. Prints the seconds and the peak memory of every part, and the loss of the batch before and after the step.

The step needs 8 bytes per parameter and 2 (or 4) for the average, plus activations: it is refused where that much is not free.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from srcflow import artifacts
from srcflow.cli import load_parts
from srcflow.cli.export import task_of
from srcflow.flows.flow import Flow
from srcflow.objectives.flow import flow_objective
from srcflow.tasks.flow import FlowTask
from srcflow.types import Condition

XL = Path(__file__).resolve().parents[1] / "configs/flow/imagenet256_dinov2b_src32_xl.yaml"
GB = 1e9


def available() -> float:
    """Bytes that can be had on this machine; infinite where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("inf")
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), float("inf"))


def peak() -> float:
    """Largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


@contextmanager
def part(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Time a part of the step and print what it took."""
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
    print(f"{name:<28} {seconds[name]:8.1f} s   peak so far {peak() / GB:6.2f} GB", flush=True)


def build(config: Path) -> FlowTask:
    """The configuration's task with bfloat16 weights and small random heads."""
    load_parts()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        task = task_of(str(config))
    finally:
        torch.set_default_dtype(torch.float32)
    if not isinstance(task, FlowTask):
        raise SystemExit(f"{config} trains no flow.")
    for block in task.flow.blocks:
        if (head := getattr(block, "head", None)) is not None:
            nn.init.normal_(head.weight, std=0.01)
    return task


def main(argv: list[str] | None = None) -> int:
    """Make the step and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", nargs="?", type=Path, default=XL, help="a flow's run; default: the one of 1.41 billion parameters")
    parser.add_argument("--batch-size", type=int, default=1, help="images of the batch")
    parser.add_argument("--ema", choices=["bfloat16", "float32"], default="bfloat16", help="type of the moving average")
    parser.add_argument("--checkpoint-every", type=int, default=None, help="overrides the configuration's checkpoint_every")
    parser.add_argument("--decay", type=float, default=0.18, help="of the average; (1 + 1) / (10 + 1), the first of a warm-up, by default")
    args = parser.parse_args(argv)

    load_parts()
    with torch.device("meta"):
        count = sum(p.numel() for p in task_of(str(args.config)).parameters())
    wide = getattr(torch, args.ema)
    needed = count * (8 + torch.finfo(wide).bits // 8) + 1.5 * GB
    print(f"{count:,} parameters, {torch.get_num_threads()} threads; needs about {needed / GB:.1f} GB, {available() / GB:.1f} GB are there")
    print(f"torch {torch.__version__}, revision {artifacts.revision()}", flush=True)
    if available() < needed + 1 * GB:
        print("error: not enough memory is free.", file=sys.stderr)
        return 1

    seconds: dict[str, float] = {}
    with part("build", seconds):
        task = build(args.config)
        flow: Flow = task.flow
        if args.checkpoint_every is not None:
            flow.set_checkpointing(args.checkpoint_every)
        optimizer = task.optimization.build_optimizer(flow.parameters())
        average = [p.detach().to(wide, copy=True) for p in flow.parameters()]
    codes = torch.randn(args.batch_size, flow.grid[0] * flow.grid[1], flow.channels)
    condition = Condition(labels=torch.arange(args.batch_size) % flow.num_classes) if flow.num_classes else None

    def loss_of() -> Tensor:
        return flow_objective(flow, codes, condition).total

    with part("forward", seconds):
        loss = loss_of()
    before = float(loss.detach())
    with part("backward", seconds):
        loss.backward()
    del loss
    silent = sum(1 for p in flow.parameters() if p.grad is None or not bool(p.grad.any()))
    with part("gradient norm and clipping", seconds):
        clip = task.optimization.gradient_clip
        norm = float(nn.utils.clip_grad_norm_(flow.parameters(), float("inf") if clip is None else clip))
    with part("AdamW", seconds):
        optimizer.step()
    with part("moving average", seconds), torch.no_grad():
        for a, p in zip(average, flow.parameters(), strict=True):
            a.lerp_(p.detach().to(wide), 1 - args.decay)
    step = sum(v for k, v in seconds.items() if k != "build")
    optimizer.zero_grad(set_to_none=True)
    with part("forward again, no gradient", seconds), torch.no_grad():
        after = float(loss_of())
    moved = sum(1 for a, p in zip(average, flow.parameters(), strict=True) if not torch.equal(a, p.detach().to(wide)))
    print(f"step {step:.1f} s, peak {peak() / GB:.2f} GB; gradient norm {norm:.4g}, {silent} parameter tensors without a gradient")
    print(f"nll {before:.6f} before, {after:.6f} after; {moved} of {len(average)} averaged tensors differ from the weights")
    return 0


if __name__ == "__main__":
    sys.exit(main())
