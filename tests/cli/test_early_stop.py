"""Signals that come before the first step: status 75 and one line, whatever they interrupt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.callbacks.stop_signals import StopSignals
from srcflow.cli import main, ranks
from srcflow.errors import StoppedError

ROOT = Path(__file__).parents[2]
LINE = "stopped by SIGTERM before the first step; the same command starts again."


def come(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


def after(action: Callable[[], object]) -> StoppedError:
    """What ends a command that does this."""
    with pytest.raises(StoppedError, match="before the first step") as stopped, ranks.stoppable():
        action()
    return stopped.value


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_block_with_status_75(number: signal.Signals) -> None:
    error = after(lambda: (come(number), pytest.fail("the signal did not interrupt")))
    assert (error.status, error.signum) == (75, number)


def test_code_that_catches_every_exception_does_not_catch_the_signal() -> None:
    caught = []

    def library() -> None:
        try:
            come()
        except Exception as e:
            caught.append(e)

    after(library)
    assert not caught


def test_a_signal_that_got_lost_explains_what_fails_after_it() -> None:
    def lost() -> None:
        with suppress(BaseException):  # as in a destructor
            come()
        raise RuntimeError("DataLoader worker is killed")

    assert isinstance(after(lost).__cause__, RuntimeError)


def test_without_a_signal_errors_are_left_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="mine"), ranks.stoppable():
        raise RuntimeError("mine")


def test_a_second_signal_does_not_disturb_the_way_out() -> None:
    done = []

    def cleaning_up() -> None:
        try:
            come()
        finally:
            come()
            done.append("cleaned up")

    after(cleaning_up)
    assert done


@pytest.mark.parametrize("composed", [False, True])
def test_a_signal_that_got_lost_stops_the_run_at_its_first_step(composed: bool) -> None:
    signals = StopSignals()
    with ranks.stoppable():
        early = signal.getsignal(signal.SIGTERM)
        if composed:
            signal.signal(signal.SIGTERM, _HandlersCompose([lambda *_: None, early]))  # type: ignore[list-item]
        with suppress(BaseException):
            come()
        signals.install()
        assert signals.caught == signal.SIGTERM
        signals.restore()


def test_the_command_prints_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("srcflow.cli.trainer.run_trainer", come)
    with pytest.raises(SystemExit) as status:
        main(["fit"])
    assert status.value.code == 75
    assert capsys.readouterr().err == f"{LINE}\n"


WORKERS = """
import os, signal, threading, time
from pathlib import Path
import torch
from srcflow.data.workers import SteadyLoader, worker_start

class Numbers(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return i

def shoot():
    shot = set()
    while True:
        for task in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
            for child in set(task.read_text().split()) - shot:
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():  # a loader process, not yet at its first line
                    os.kill(int(child), signal.SIGTERM)
                    shot.add(child)
                    print("shot", flush=True)
        time.sleep(0.001)

if __name__ == "__main__":
    threading.Thread(target=shoot, daemon=True).start()
    loader = SteadyLoader(Numbers(), batch_size=2, num_workers=1, multiprocessing_context="spawn", worker_init_fn=worker_start())
    print([batch.tolist() for batch in loader], flush=True)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_processes_that_load_data_survive_a_signal_while_they_start(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(WORKERS)
    out = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
                         text=True, timeout=120)  # fmt: skip
    assert "shot" in out.stdout
    assert out.stdout.endswith("[[0, 1], [2, 3], [4, 5], [6, 7]]\n"), out.stderr[-2000:]


# --- through the command line --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on pixels whose loader processes are spawned."""
    here = tmp_path_factory.mktemp("early")
    subprocess.run([sys.executable, ROOT / "tools/synthetic.py", "--out", here, "--train", "32", "--eval", "8"], check=True,
                   env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    artifacts.save(here / "codec", PixelPatches(32, 8))
    content = yaml.safe_load((ROOT / "configs/smoke/flow.yaml").read_text())
    content["model"]["init_args"].update(artifact=None, codec=str(here / "codec"), evaluation={"samples": 0})
    content["model"]["init_args"]["flow"]["init_args"].update(channels=192, layers=[1])
    content["data"]["init_args"].update({s: str(here / f"{s}-*.tar") for s in ("train", "val", "test")}, batch_size=4)
    content["data"]["init_args"].update(num_workers=2, start_method="spawn")
    content["trainer"].update(
        max_steps=1_000_000, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[{"class_path": "Checkpoints"}],
    )  # fmt: skip
    (here / "run.yaml").write_text(yaml.safe_dump(content))
    return here


def loading(pid: int) -> int:
    """How many processes that load data this one has started."""
    children = [c for task in Path(f"/proc/{pid}/task").glob("*/children") for c in task.read_text().split()]
    return sum(b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes() for c in children if Path(f"/proc/{c}").exists())


@pytest.mark.slow
@pytest.mark.parametrize("everyone", [False, True], ids=["the process", "its group"])
@pytest.mark.parametrize(("wanted", "later"), [(0, 1.0), (1, 0.0), (2, 0.5), (2, 3.0), (4, 0.5)])
def test_a_signal_at_any_moment_of_the_start(run: Path, tmp_path: Path, wanted: int, later: float, everyone: bool) -> None:
    """Some seconds after the start, or after that many processes that load data were started (two for validation, two for training)."""
    log, command = tmp_path / "log", [sys.executable, "-m", "srcflow", "fit", "--config", str(run / "run.yaml")]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--trainer.default_root_dir", str(tmp_path / "run")],
            stdout=file, stderr=file, start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        try:
            end = time.monotonic() + 240
            while loading(process.pid) < wanted and process.poll() is None and time.monotonic() < end:
                time.sleep(0.005)
            time.sleep(later)
            if everyone:
                os.killpg(process.pid, signal.SIGTERM)
            else:
                process.terminate()
            status = process.wait(timeout=120)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    text = log.read_text()
    assert status == 75, text[-5000:]
    assert "Traceback" not in text, text[-5000:]
    assert text.splitlines()[-1].startswith((LINE, "stopped by SIGTERM at step"))


def test_a_signal_in_a_destructor_is_kept_for_later() -> None:
    """Nothing can be raised from one: Python would print the traceback and go ahead."""

    class Dying:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)  # where the handler runs

    seen = []

    def start() -> None:
        with ranks.stoppable():
            dying = Dying()
            del dying
            seen.append(signal.getsignal(signal.SIGTERM).came)  # type: ignore[union-attr]  # an Early
            raise RuntimeError("what fails later is a consequence")

    with pytest.raises(StoppedError) as stopped:
        start()
    assert seen == [signal.SIGTERM]
    assert stopped.value.status == 75
