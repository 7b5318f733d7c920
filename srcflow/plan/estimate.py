"""Cost of a run before it is made: parameters, FLOPs, hours, memory per process, disk."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from srcflow.errors import ConfigError, Problems
from srcflow.plan.flops import count_flops
from srcflow.plan.hardware import Accelerator
from srcflow.plan.memory import Lasting, Like, Passing, largest_wraps, lasting, passing
from srcflow.plan.step import Stage
from srcflow.tasks.autoencoder import AutoencoderTask
from srcflow.tasks.flow import FlowTask

STORED_BITS = 16
"""Of a stored feature (`srcflow encode --dtype float16`, the default)."""
RESERVE = 0.9
"""Share of a device's memory that a plan fills; the rest is for CUDA's context, kernels' workspace and the allocator's gaps."""


@dataclass(frozen=True)
class Run:
    """What a configuration says about its run, besides its model.

    Args:
        batch_size: images per process and accumulated batch.
        accumulate: batches per optimizer step.
        ranks: processes, one per device.
        steps: optimizer steps; None: not said.
        mixed: bf16-mixed; otherwise float32.
        sharded: FSDP2 (ModelParallelStrategy).
        bucket_views: DDP's gradients are views of its buckets (`gradient_as_bucket_view`).
        averages: moving averages kept by the EMA callback.
        kept: checkpoints that lie on disk at the end; None: the configuration does not say how many.
        snapshots: files of averaged weights that the EMA callback leaves; None: the configuration does not say how many.
        like: "cpu" for a run on the CPU.
    """

    batch_size: int
    accumulate: int = 1
    ranks: int = 1
    steps: int | None = None
    mixed: bool = False
    sharded: bool = False
    bucket_views: bool = False
    averages: int = 0
    kept: int | None = 1
    snapshots: int | None = 0
    like: Like = "cuda"

    def __post_init__(self) -> None:
        problems = Problems()
        for name in ("batch_size", "accumulate", "ranks"):
            if getattr(self, name) < 1:
                problems.add(ConfigError(name, getattr(self, name), "must be at least 1."))
        problems.raise_if_any()

    @property
    def global_batch(self) -> int:
        """Images per optimizer step."""
        return self.batch_size * self.accumulate * self.ranks


def plan(stage: Stage, run: Run, device: Accelerator, mfu: float = 0.4, images: int | None = None) -> dict[str, Any]:
    """What a run costs.

    Args:
        stage: the task and its frozen parts, on the meta device.
        run: batch, processes, precision and length.
        device: what it runs on.
        mfu: share of the device's peak that is sustained; what is computed a second time counts as work.
        images: images of the training set, for the size of a store of their features; None: of one million.

    Returns:
        JSON-able sections: run, parameters, flops, hours, memory (bytes per process, by strategy), disk (bytes), warnings.

    Raises:
        ConfigError: `mfu` is no share, or the run is none that can be.
    """
    if not 0 < mfu <= 1:
        raise ConfigError("mfu", mfu, "is a share of the peak.", "Write a number above 0 and up to 1, such as 0.4.")
    if run.sharded and not isinstance(stage.task, FlowTask):
        raise ConfigError("trainer.strategy", "ModelParallelStrategy", f"{type(stage.task).__name__} is not sharded.", "Use ddp.")
    rests = lasting(stage, run.averages)
    made: dict[str, Any] = {
        "run": {**asdict(run), "global_batch": run.global_batch, "device": asdict(device), "mfu": mfu},
        "parameters": {"trained": rests.trained, "discriminator": rests.heads, "frozen_bytes": rests.frozen},
        "codec_known": not isinstance(stage.task, FlowTask) or stage.autoencoder is not None,
        "flops": {},
        "hours": None,
        "memory": {},
        "disk": _disk(stage, run, rests, images),
        "warnings": [],
    }
    if not stage.trains:
        return made
    made["flops"] = _flops(stage, run)
    if run.steps is not None:
        seconds = made["flops"]["all"] / (run.ranks * mfu * device.peak(run.mixed))
        made["hours"] = {"wall": seconds / 3600, "device": seconds * run.ranks / 3600}
    made["memory"] = _memory(stage, run, rests)
    made["warnings"] = _warnings(stage, run, device, made["memory"])
    return made


def _flops(stage: Stage, run: Run) -> dict[str, Any]:
    parts = count_flops(stage)
    image = sum(parts.values())
    recomputed = sum(count_flops(stage, recomputed=True).values()) - image
    total = None if run.steps is None else (image + recomputed) * run.global_batch * run.steps
    return {"parts": parts, "image": image, "recomputed": recomputed, "all": total}


@contextmanager
def checkpointing(task: FlowTask, every: int | None) -> Iterator[int]:
    """The task's flow with another `checkpoint_every` inside the block (None: as it is); yields what holds there."""
    own = task.flow.blocks[0].checkpoint_every
    task.flow.set_checkpointing(own if every is None else every)  # type: ignore[arg-type]  # nn.Module hides its attributes' types
    try:
        yield int(task.flow.blocks[0].checkpoint_every)  # type: ignore[arg-type]
    finally:
        task.flow.set_checkpointing(own)  # type: ignore[arg-type]


def _memory(stage: Stage, run: Run, rests: Lasting) -> dict[str, Any]:
    """Bytes of one process under every strategy the run could use, and of its activations under other checkpointing."""
    found = passing(stage, run.batch_size, mixed=run.mixed, like=run.like)
    made: dict[str, Any] = {"passing": asdict(found), "strategies": {}, "activations": {}}
    if isinstance(stage.task, FlowTask):
        own = stage.task.flow.blocks[0].checkpoint_every
        for every in sorted({0, 1, int(own)}):  # type: ignore[arg-type]
            other = found
            if every != own:
                with checkpointing(stage.task, every):
                    other = passing(stage, run.batch_size, mixed=run.mixed, like=run.like, backward=False)
            made["activations"][str(every)] = other.activations
        made["checkpoint_every"] = own
    names = ["ddp" if run.ranks > 1 else "one process"]
    if isinstance(stage.task, FlowTask) and (run.ranks > 1 or run.sharded):
        names.append("fsdp2")
    for name in names:
        made["strategies"][name] = _strategy(name, stage, run, rests, found)
    made["chosen"] = "fsdp2" if run.sharded else names[0]
    return made


def _strategy(name: str, stage: Stage, run: Run, rests: Lasting, found: Passing) -> dict[str, int]:
    """Bytes of one process by part, and `peak`, the largest sum at one moment of a step or a validation."""
    share = run.ranks if name == "fsdp2" else 1
    parts = {
        "weights": -(-rests.weights // share),
        "gradients": -(-rests.gradients // share),
        "optimizer": -(-rests.optimizer // share),
        "ema": -(-rests.ema // share),
        "frozen": rests.frozen,
        "buckets": rests.gradients if name == "ddp" and not run.bucket_views else 0,
        "gathered": 0,
        "activations": found.activations,
    }
    fixed = parts["weights"] + parts["optimizer"] + parts["ema"] + parts["frozen"] + parts["buckets"]
    if name == "fsdp2" and isinstance(stage.task, FlowTask):
        root, layers = largest_wraps(stage.task)
        parts["gathered"] = 2 * (root + layers)  # weights, and their gradients before they are scattered
    held = name == "fsdp2" or run.accumulate > 1 or (name == "ddp" and run.bucket_views)
    step = fixed + (parts["gradients"] + parts["gathered"] + found.work if held else found.peak)
    update = fixed + parts["gradients"] + (parts["weights"] if run.like == "cuda" else 0)  # AdamW's foreach takes a temporary of that size
    # gradients are still there while the average is in the weights' place and these wait beside it; without a graph there is little else
    evaluation = fixed + parts["gradients"] + (-(-(4 * rests.trained) // share) if run.averages else 0) + parts["gathered"] // 2
    return {**parts, "peak": max(step, update, evaluation)}


def _disk(stage: Stage, run: Run, rests: Lasting, images: int | None) -> dict[str, Any]:
    """Bytes of checkpoints, of the artifact, and of the features that `srcflow encode` would store."""
    trained = 4 * rests.trained
    checkpoint = rests.state + 2 * trained + run.averages * trained + 3 * 4 * rests.heads
    product = sum(t.numel() * t.element_size() for t in stage.task.made.state_dict().values())
    made: dict[str, Any] = {
        "checkpoint": checkpoint,
        "kept": run.kept,
        "checkpoints": None if run.kept is None else run.kept * checkpoint,
        "snapshot": rests.state,
        "snapshots": run.snapshots,
        "artifact": product + (trained if run.averages else 0),
    }
    autoencoder = stage.task.autoencoder if isinstance(stage.task, AutoencoderTask) else stage.autoencoder
    if autoencoder is not None and getattr(autoencoder, "encoder", None) is not None:
        rows, columns = autoencoder.grid
        height, width = autoencoder.image_size
        row = rows * columns * autoencoder.dim * STORED_BITS // 8 + 3 * height * width + 9  # features, image, label and flip flag
        made["features"] = {"image": row, "images": images if images is not None else 1_000_000}
        made["features"]["all"] = row * made["features"]["images"]
    return made


def _warnings(stage: Stage, run: Run, device: Accelerator, memory: dict[str, Any]) -> list[str]:
    """Why the run does not fit, and what would."""
    limit = RESERVE * device.memory
    peaks = {k: v["peak"] for k, v in memory["strategies"].items()}
    peak = peaks[memory["chosen"]]
    if peak <= limit:
        return []
    over = f"{peak / 1e9:.1f} GB per process do not fit into {RESERVE:.0%} of {device.name}'s {device.memory / 1e9:.0f} GB."
    cures = []
    other = next((n for n, p in peaks.items() if n != memory["chosen"] and p <= limit), None)
    if other is not None:
        cures.append(f"use {other} (configs/trainer/{'fsdp2' if other == 'fsdp2' else 'ddp8'}.yaml)")
    room = limit - (peak - memory["passing"]["work"])
    every = memory.get("checkpoint_every")
    if isinstance(stage.task, FlowTask) and every != 1:
        with checkpointing(stage.task, 1):
            least = passing(stage, run.batch_size, mixed=run.mixed, like=run.like)
        if least.work <= room:
            cures.append("set model.checkpoint_every: 1")
    smaller = _largest_batch(copy.deepcopy(stage), run, room)
    if smaller:
        factor = run.batch_size // smaller
        cures.append(
            f"set data.batch_size: {smaller} and trainer.accumulate_grad_batches: {run.accumulate * factor} (the global batch stays)"
        )
    return [f"{over} {'Cure: ' + ', or '.join(cures) + '.' if cures else 'Take a larger device, or more of them with fsdp2.'}"]


def _largest_batch(stage: Stage, run: Run, room: float) -> int:
    """The largest batch that divides the configured one and fits into `room` bytes; 0 if none does."""
    sizes = [n for n in range(run.batch_size // 2, 0, -1) if run.batch_size % n == 0]
    if not sizes or room <= 0:
        return 0
    small = passing(stage, 1, mixed=run.mixed, like=run.like).work
    more = passing(stage, 2, mixed=run.mixed, like=run.like).work - small  # memory is linear in the batch
    return next((n for n in sizes if small + (n - 1) * more <= room), 0)
