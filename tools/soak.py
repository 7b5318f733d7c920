"""Train under a random kill every minute, and end with the weights of a run that nobody disturbed: `make soak`.

    python tools/soak.py                           a small flow on made-up images, 30 minutes of kills
    python tools/soak.py --config configs/flow/fashion_mnist.yaml --root runs/soak    the demo's flow (after `make demo`), in float32

Two CPU processes under DDP through the command line. After a random time (--every seconds on average) one of these happens to the run:
kill -9 of rank 0, of rank 1, or of both, SIGTERM to one rank, or SIGUSR1 to all. Then the same command is started again with
`--ckpt_path last`, until the steps that --minutes of undisturbed training take are done. The report goes to stdout and ROOT/soak.json; exit
status 1 if any tensor of weights, averages or optimizer differs in a bit, or if a process outlived its run by more than a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
KILLS = ("kill -9 of rank 0", "kill -9 of rank 1", "kill -9 of all", "SIGTERM to rank 0", "SIGTERM to rank 1", "SIGUSR1 to all")
NEEDED = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step")
COMPARED = (*NEEDED, "raw_state", "averages", "discriminator")
MARK = "soak.yaml"  # a folder that has it is the soak's own
PATIENCE = 60.0  # seconds that processes have to end


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="how long the run is disturbed (default: %(default)s)")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two kills, on average (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps of the run (default: so many that the kills fit in, by a short trial)")
    parser.add_argument("--save", type=int, help="steps between two checkpoints (default: a hundredth of the steps)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills (default: %(default)s)")
    parser.add_argument("--config", type=Path, help="a complete run (default: configs/smoke/flow.yaml on made-up images)")
    parser.add_argument("--root", type=Path, default=Path("runs/soak"), help="where everything goes; emptied first (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.root.exists() and any(args.root.iterdir()) and not (args.root / MARK).exists():
        parser.error(f"--root {args.root}: holds something else than an earlier soak. Name another folder.")
    shutil.rmtree(args.root, ignore_errors=True)
    args.root.mkdir(parents=True)
    (args.root / MARK).write_text(yaml.safe_dump({k: v if v is None else str(v) for k, v in vars(args).items()}))
    config = args.config or made_up(args.root)
    steps = args.steps
    if steps is None:
        steps = int(args.minutes * 60 / seconds_per_step(config, args.root))
    save = args.save or max(steps // 100, 1)
    print(f"{steps} steps, a checkpoint every {save}, a kill every {args.every:g} s for {args.minutes:g} minutes", flush=True)
    began = time.monotonic()
    straight = Run(config, args.root / "straight", steps, save)
    straight.start()
    if straight.wait(None) != 0:
        raise SystemExit(f"error: the undisturbed run failed, see {straight.log}")
    took = time.monotonic() - began
    print(f"undisturbed: {took:.0f} s", flush=True)
    kills, statuses, late = disturb(Run(config, args.root / "disturbed", steps, save), random.Random(args.seed), args.every, args.minutes)
    differing = compare(args.root, steps)
    report = {
        "steps": steps,
        "save": save,
        "seed": args.seed,
        "undisturbed_seconds": round(took, 1),
        "seconds": round(time.monotonic() - began - took, 1),
        "starts": len(statuses),
        "kills": dict(Counter(kills)),
        "statuses": statuses,
        "outlived": late,
        "differing": differing,
    }
    (args.root / "soak.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    print("DIFFERENT" if differing else "equal in every bit")
    return 1 if differing or late else 0


def made_up(root: Path) -> Path:
    """configs/smoke/flow.yaml on pixel patches of made-up images, all below `root`."""
    from srcflow import artifacts
    from srcflow.autoencoders.pixels import PixelPatches

    data = root / "data"
    subprocess.run([sys.executable, str(ROOT / "tools/synthetic.py"), "--out", str(data)], check=True)
    artifacts.save(root / "codec", PixelPatches(32, 8))
    content = yaml.safe_load((ROOT / "configs/smoke/flow.yaml").read_text())
    content["model"]["init_args"]["codec"] = str(root / "codec")
    content["model"]["init_args"]["flow"]["init_args"]["channels"] = 192
    content["data"]["init_args"].update({split: str(data / f"{split}-*.tar") for split in ("train", "val", "test")}, batch_size=8)
    path = root / "flow.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


class Run:
    """One run directory, and the processes that are at work in it.

    Args:
        config: the run.
        here: its directory.
        steps: its length.
        save: steps between two checkpoints.
    """

    def __init__(self, config: Path, here: Path, steps: int, save: int) -> None:
        here.mkdir()
        content = yaml.safe_load(config.read_text())
        content["model"]["init_args"].update(artifact=None, evaluation={"samples": 0})
        kept = [c for c in content["trainer"].get("callbacks", []) if isinstance(c, dict) and c["class_path"] == "EMA"]
        checkpoints = {"dirpath": str(here / "checkpoints"), "every_n_steps": save}
        content["trainer"].update(
            accelerator="cpu", devices=2, strategy="ddp", precision="32-true", max_steps=steps, limit_val_batches=0, logger=False,
            default_root_dir=str(here), enable_progress_bar=False, enable_model_summary=False,
            callbacks=[*kept, {"class_path": "Checkpoints", "init_args": checkpoints}],
        )  # fmt: skip
        (here / "run.yaml").write_text(yaml.safe_dump(content))
        self.here, self.log, self.last = here, here / "log.txt", here / "checkpoints" / f"step-{steps}.ckpt"
        self.first: subprocess.Popen[Any] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "srcflow", "fit", "--config", str(self.here / "run.yaml"), "--ckpt_path", "last"]
        env = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **os.environ}
        with self.log.open("a") as log:
            self.first = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=env)

    def wait(self, seconds: float | None) -> int | None:
        """The status of rank 0, or None if it still runs."""
        assert self.first is not None
        try:
            return self.first.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def processes(self) -> list[int]:
        """All that still run, rank 0 first, then rank 1 where there is one."""
        assert self.first is not None
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == self.first.pid and fields[0] != "Z":
                found.append(int(stat.parent.name))
        return sorted(found)

    def ranks(self) -> list[int]:
        """The processes of rank 0 and, once it is there, rank 1."""
        assert self.first is not None
        second = []
        for pid in self.processes():
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"LOCAL_RANK=1" in environment:
                second.append(pid)
        return [self.first.pid, *second[:1]]

    def strike(self, kill: str) -> None:
        """Do to the run what `kill` says, once both ranks are there; nothing if it ends before."""
        while len(found := self.ranks()) < 2 and self.wait(0) is None:
            time.sleep(0.1)
        number = signal.SIGKILL if "-9" in kill else signal.SIGTERM if "TERM" in kill else signal.SIGUSR1
        for pid in self.processes() if kill.endswith("all") else found[:1] if kill.endswith("0") else found[1:]:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


def disturb(run: Run, rng: random.Random, every: float, minutes: float) -> tuple[list[str], list[int], int]:
    """Start, strike, start again, until the run is done.

    Returns:
        What was done, the statuses, and how often processes outlived their run.
    """
    kills: list[str] = []
    statuses: list[int] = []
    late = 0
    end = time.monotonic() + 60 * minutes
    while True:
        run.start()
        calm = rng.uniform(0.5, 1.5) * every
        status = run.wait(calm if time.monotonic() + calm < end else None)
        if status is None:
            kills.append(rng.choice(KILLS))
            run.strike(kills[-1])
            status = run.wait(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while run.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        if left := run.processes():
            late += 1
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            status = run.wait(None)
        statuses.append(-1000 if status is None else status)
        print(f"start {len(statuses)}: {kills[-1] if kills else 'nothing'}; status {status}; newest {newest(run.here)}", flush=True)
        if status == 0 and run.last.exists():
            return kills, statuses, late
        if status in (1, 2) and not (kills and "-9" in kills[-1]):
            raise SystemExit(f"error: the run ended with status {status} by itself, see {run.log}")


def newest(here: Path) -> str:
    link = here / "checkpoints" / "last.ckpt"
    return link.resolve().stem if link.exists() else "none"


def seconds_per_step(config: Path, root: Path) -> float:
    """Of an undisturbed run, by the times at which two of its checkpoints were written."""
    trial = Run(config, root / "trial", 60, 20)
    trial.start()
    if trial.wait(None) != 0:
        raise SystemExit(f"error: the trial run failed, see {trial.log}")
    times = [(trial.here / "checkpoints" / f"step-{n}.ckpt").stat().st_mtime for n in (40, 60)]
    return max((times[1] - times[0]) / 20, 1e-3)


def compare(root: Path, steps: int) -> list[str]:
    """Names of what differs between the last checkpoints of both runs."""
    a, b = (torch.load(root / name / "checkpoints" / f"step-{steps}.ckpt", weights_only=True) for name in ("straight", "disturbed"))
    missing = [f"{key} (missing)" for key in NEEDED if key not in a or key not in b]
    return missing + [d for key in COMPARED for d in differences(a.get(key), b.get(key), key)]


def differences(a: Any, b: Any, name: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for k in dict.fromkeys([*a, *b]) for d in differences(a.get(k), b.get(k), f"{name}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{name}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [name]
    return [] if a == b else [name]


if __name__ == "__main__":
    sys.exit(main())
