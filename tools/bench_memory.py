"""Peak memory of a flow's training step, measured, beside what `srcflow plan` says: `python tools/bench_memory.py [CONFIG ...]`.

Two steps (forward, backward, AdamW, moving average) on random codes, without codec and data, with float32 weights and autocast to bfloat16,
each case in a process of its own. On a GPU the peak is what PyTorch's allocator gave out; on the CPU (Linux) the growth of the process's
resident size from before the model was built to its largest, in which the kernels' own buffers are included. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from srcflow import artifacts
from srcflow.cli import load_parts
from srcflow.cli.export import task_of
from srcflow.flows import presets
from srcflow.flows.flow import Flow
from srcflow.objectives.flow import flow_objective
from srcflow.plan.memory import lasting, passing
from srcflow.plan.step import Stage
from srcflow.tasks.flow import FlowTask
from srcflow.types import Condition

FLOWS = Path(__file__).resolve().parents[1] / "configs/flow"
SIZES = [FLOWS / f"imagenet256_dinov2b_src32_{size}.yaml" for size in "sbl"]


def flow_task(config: Path) -> FlowTask:
    """The configuration's task."""
    task = task_of(str(config))
    if not isinstance(task, FlowTask):
        raise SystemExit(f"{config} trains no flow.")
    return task


def resident(field: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at most so far (VmHWM). Linux; getrusage's maximum would begin with the parent's."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def measure(config: Path, every: int, batch: int, mixed: bool, device: str) -> int:
    """Peak bytes above what the process had before."""
    torch.manual_seed(0)
    small = presets.srcflow(grid=16, channels=32, width=64, layers=[1], head_dim=64, num_classes=0).to(device)
    steps(small, torch.optim.AdamW(small.parameters()), 1, mixed, device)  # what the libraries set up for themselves
    del small
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = resident("VmRSS") if device == "cpu" else 0
    task = flow_task(config)
    flow = task.flow.to(device)
    flow.set_checkpointing(every)
    steps(flow, task.optimization.build_optimizer(flow.parameters()), batch, mixed, device)
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM") - before


def steps(flow: Flow, optimizer: torch.optim.Optimizer, batch: int, mixed: bool, device: str) -> None:
    """Two training steps; the first makes the optimizer's state."""
    average = [p.detach().clone() for p in flow.parameters()]
    codes = torch.randn(batch, flow.grid[0] * flow.grid[1], flow.channels, device=device)
    condition = Condition(labels=torch.arange(batch, device=device) % flow.num_classes) if flow.num_classes else None
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16) if mixed else nullcontext():
            loss = flow_objective(flow, codes, condition).total
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, [p.detach() for p in flow.parameters()], weight=1e-4)


def predict(config: Path, every: int, batch: int, mixed: bool, device: str) -> float:
    """The same peak according to `srcflow.plan`."""
    with torch.device("meta"):
        task = flow_task(config)
    task.flow.set_checkpointing(every)
    rests = lasting(Stage(task), 1)
    found = passing(Stage(task), batch, mixed=mixed, like="cuda" if device == "cuda" else "cpu")
    fixed = rests.weights + rests.optimizer + rests.ema + rests.frozen
    return fixed + max(found.peak, rests.gradients + (rests.weights if device == "cuda" else 0))


def main(argv: list[str] | None = None) -> int:
    """Measure every case in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("configs", nargs="*", type=Path, default=SIZES, help="runs of flows; default: S, B and L on ImageNet")
    parser.add_argument("--batch-size", type=int, default=4, help="images per step")
    parser.add_argument("--precision", choices=["bf16-mixed", "32-true"], default="bf16-mixed")
    parser.add_argument("--checkpoint-every", type=int, nargs="+", default=[0, 2, 1], help="cases of each configuration")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a case, in this process
    args = parser.parse_args(argv)
    device, mixed = "cuda" if torch.cuda.is_available() else "cpu", args.precision == "bf16-mixed"
    load_parts()
    if args.one:
        print(measure(args.configs[0], args.checkpoint_every[0], args.batch_size, mixed, device))
        return 0
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, revision {artifacts.revision()}, {args.precision}, batch of {args.batch_size}\n")
    print("| run | checkpoint_every | measured GB | planned GB | planned / measured |\n|---|---|---|---|---|")
    # glibc gives every larger tensor pages of its own, which go back when it is freed: without holes in the heap
    exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for config in args.configs:
        for every in args.checkpoint_every:
            case = [str(config), "--batch-size", str(args.batch_size), "--precision", args.precision, "--checkpoint-every", str(every)]
            done = subprocess.run([sys.executable, __file__, *case, "--one"], env=exact, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                print(f"| {config.stem} | {every} | failed with status {done.returncode} | | |", flush=True)
                continue
            peak = int(done.stdout.splitlines()[-1])
            planned = predict(config, every, args.batch_size, mixed, device)
            row = (config.stem, every, f"{peak / 1e9:.2f}", f"{planned / 1e9:.2f}", f"{planned / peak:.2f}")
            print("| " + " | ".join(map(str, row)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
