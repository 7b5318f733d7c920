"""Ranks that die, and signals that reach one of them: through the command line, on two processes."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.cli import ranks

ROOT = Path(__file__).parents[2]
SOON = 60  # seconds; a quiet machine takes about one


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        importlib.import_module("synthetic").main(["--out", str(root), "--train", "43", "--eval", "8"])
    artifacts.save(root / "codec", PixelPatches(32, 8))
    return root


class Run:
    """A flow in training on two processes, endlessly, with a checkpoint every five steps."""

    def __init__(self, data: Path, here: Path, workers: int = 0) -> None:
        content = yaml.safe_load((ROOT / "configs/smoke/flow.yaml").read_text())
        content["model"]["init_args"].update(artifact=None, codec=str(data / "codec"), evaluation={"samples": 0})
        content["model"]["init_args"]["flow"]["init_args"].update(channels=192, layers=[1, 1])
        content["data"]["init_args"].update({s: str(data / f"{s}-*.tar") for s in ("train", "val", "test")}, batch_size=4)
        content["data"]["init_args"]["num_workers"] = workers
        content["trainer"].update(
            max_steps=1_000_000, accelerator="cpu", devices=2, strategy="ddp", limit_val_batches=0, logger=False,
            default_root_dir=str(here), enable_progress_bar=False, enable_model_summary=False,
            callbacks=[{"class_path": "Checkpoints", "init_args": {"every_n_steps": 5}}],
        )  # fmt: skip
        (here / "run.yaml").write_text(yaml.safe_dump(content))
        self.here, self.log = here, here / "log"
        command = [sys.executable, "-m", "srcflow", "fit", "--config", str(here / "run.yaml"), "--ckpt_path", "last"]
        with self.log.open("a") as log:
            self.first = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def processes(self) -> list[int]:
        """Of this run, still alive."""
        alive = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, group, state = stat.parent.name, *_stat(stat.read_text())
            except OSError:
                continue
            if group == self.first.pid and state != "Z":
                alive.append(int(pid))
        return sorted(alive)

    def second(self) -> int:
        """The process of local rank 1."""
        return next(p for p in self.processes() if b"LOCAL_RANK=1" in Path(f"/proc/{p}/environ").read_bytes())

    def until(self, name: str) -> None:
        """Wait for a checkpoint."""
        end = time.monotonic() + 240
        while not (self.here / "checkpoints" / name).exists():
            assert self.first.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.1)

    def ended(self) -> int:
        """The status, once all processes have gone."""
        end = time.monotonic() + SOON
        while self.first.poll() is None or self.processes():
            assert time.monotonic() < end, f"{self.processes()} still run\n{self.log.read_text()[-3000:]}"
            time.sleep(0.05)
        return self.first.returncode

    def stop(self) -> None:
        """For a test that failed."""
        if self.processes():
            os.killpg(self.first.pid, signal.SIGKILL)


def _stat(text: str) -> tuple[int, str]:
    """Process group and state."""
    fields = text.rpartition(")")[2].split()
    return int(fields[2]), fields[0]


def test_a_killed_rank_ends_the_other_and_is_named(data: Path, tmp_path: Path) -> None:
    run = Run(data, tmp_path)
    try:
        run.until("step-5.ckpt")
        second = run.second()
        os.kill(second, signal.SIGKILL)
        assert run.ended() == 1
    finally:
        run.stop()
    reason = f"rank 1 (process {second}) was killed by SIGKILL, so the others cannot go on."
    assert run.log.read_text().endswith(f"error: {reason}\n")
    assert json.loads((tmp_path / "run.json").read_text())["starts"][0]["ended"]["how"] == f"LostRankError: {reason}"
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] % 5 == 0


@pytest.mark.slow
def test_the_death_of_the_first_rank_ends_the_other_which_says_so(data: Path, tmp_path: Path) -> None:
    run = Run(data, tmp_path)
    try:
        run.until("step-5.ckpt")
        run.first.kill()
        assert run.ended() == -signal.SIGKILL
    finally:
        run.stop()
    assert f"error: process {run.first.pid}, local rank 0, has gone, so rank 1 cannot go on." in run.log.read_text()


@pytest.mark.slow
def test_a_signal_to_one_rank_or_to_all_processes_stops_all_at_one_step_and_the_run_goes_on(data: Path, tmp_path: Path) -> None:
    """All processes: the loaders' too, which a scheduler and a terminal do not spare."""
    wanted = ["step-5.ckpt"]
    for number, everyone, status in (
        (signal.SIGTERM, False, 75),
        (signal.SIGUSR1, True, 75),
        (signal.SIGTERM, True, 75),
        (signal.SIGINT, True, 130),
    ):
        run = Run(data, tmp_path, workers=1)
        try:
            run.until(wanted[-1])
            if everyone:
                os.killpg(run.first.pid, number)
            else:
                os.kill(run.second(), number)
            assert run.ended() == status, run.log.read_text()[-3000:]
        finally:
            run.stop()
        step = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"]
        way = f"--ckpt_path last goes on from {tmp_path}/checkpoints/step-{step}.ckpt."
        assert run.log.read_text().endswith(f"stopped by {signal.Signals(number).name} at step {step}; {way}\n")
        wanted.append(f"step-{5 * (step // 5 + 2)}.ckpt")
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [s["step"] for s in starts[1:]] == [s["ended"]["step"] for s in starts[:-1]]


# --- without training ----------------------------------------------------------------------------------------------------------------

ORPHAN = """
import os, subprocess, sys, time
from srcflow.cli import ranks
ranks.POLL, ranks.GRACE = 0.05, float(sys.argv[2])
if "LOCAL_RANK" in os.environ:
    time.sleep(float(sys.argv[3]))  # as an interpreter that starts slowly
    assert ranks.launched()
    with ranks.company():
        print(os.getpid(), flush=True)
        time.sleep(float(sys.argv[1]))  # as in a collective that never ends
    print("ended by itself", flush=True)
else:
    with ranks.company():
        subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env={**os.environ, "LOCAL_RANK": "1"})
        time.sleep(1)
    os._exit(9)
"""


@pytest.mark.parametrize(
    ("sleep", "grace", "late", "message"),
    [
        (60, 0.2, 0, "has gone; rank 1 hangs and is ended"),
        (60, 0.2, 2, "has gone; rank 1 hangs and is ended"),
        (3, 30, 0, "ended by itself"),
    ],
)
def test_a_rank_that_hangs_ends_after_its_launcher(sleep: float, grace: float, late: float, message: str) -> None:
    """Also where the launcher had gone before the rank came to look for it."""
    out = subprocess.run([sys.executable, "-c", ORPHAN, str(sleep), str(grace), str(late)], capture_output=True, text=True, timeout=30)
    assert out.returncode == 9
    assert message in out.stdout + out.stderr


def test_nobody_is_blamed_without_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    try:
        assert ranks.lost([sleeper, done], patience=0.2) is None
        assert ranks.lost([]) is None
    finally:
        sleeper.kill()
        sleeper.wait()
    lost = ranks.lost([done, sleeper])
    assert lost is not None
    assert (str(lost), lost.status) == (f"rank 2 (process {sleeper.pid}) was killed by SIGKILL, so the others cannot go on.", 1)
    told = subprocess.Popen([sys.executable, "-c", "raise SystemExit(75)"])  # stopped by a signal before the first step
    lost = ranks.lost([told], patience=20)
    assert lost is not None
    assert lost.status == 75
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ranks.lost([]) is None  # torchrun launched it
    with ranks.company():
        assert not ranks.launched()
    monkeypatch.setenv(ranks.LAUNCHER, str(os.getpid()))  # the launcher of a node with one rank, whose peers are elsewhere
    assert ranks.lost([]) is None


def test_a_launcher_is_known_inside_a_command_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with ranks.company():
        assert os.environ[ranks.LAUNCHER] == str(os.getpid())
    assert ranks.LAUNCHER not in os.environ
