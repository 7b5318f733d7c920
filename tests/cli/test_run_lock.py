"""Two starts in one run directory: the second is refused while the first lives, and only then."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from srcflow.cli import run_lock
from srcflow.errors import RunningError

HOLD = """
import sys, time
from pathlib import Path
from srcflow.cli import run_lock
with run_lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""
HOLD_AND_FORK = """
import os, sys, time
from pathlib import Path
from srcflow.cli import run_lock
with run_lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    ready, done = os.pipe()
    worker = os.fork()
    if worker == 0:  # it says nothing on stdout, where its parent's number is awaited
        os.write(done, b"x")
        time.sleep(120)
        os._exit(0)
    os.read(ready, 1)
    print(worker, flush=True)
    time.sleep(120)
"""


def start(folder: Path, code: str = HOLD) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_second_start_is_refused_until_the_first_is_gone_even_by_a_kill(tmp_path: Path) -> None:
    first = start(tmp_path / "run")
    try:
        with pytest.raises(RunningError, match=rf"in use by a start that still runs: process {first.pid} on .*since 20.*Wait for it"):
            run_lock.held(tmp_path / "run").__enter__()
        with run_lock.held(tmp_path / "other"):
            pass
    finally:
        end(first)
    with run_lock.held(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run/run.lock").read_text()


def test_workers_that_outlive_a_killed_start_do_not_hold_the_lock(tmp_path: Path) -> None:
    first = start(tmp_path, HOLD_AND_FORK)
    assert first.stdout is not None
    worker = int(first.stdout.readline())
    assert worker > 0  # 0 would be this process and all of its group
    try:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        os.kill(worker, 0)  # lives
        with run_lock.held(tmp_path):
            pass
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
        end(first)


def test_it_is_released_at_the_end_and_after_an_error(tmp_path: Path) -> None:
    def fails() -> None:
        with run_lock.held(tmp_path):
            with pytest.raises(RunningError):
                run_lock.held(tmp_path).__enter__()
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fails()
        assert (tmp_path / "run.lock").read_text() == ""


def test_a_holder_that_has_not_signed_yet_is_respected(tmp_path: Path) -> None:
    with run_lock.held(tmp_path):
        (tmp_path / "run.lock").write_text("[")
        with pytest.raises(RunningError, match=r"still runs\. Wait"):
            run_lock.held(tmp_path).__enter__()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    with run_lock.held(tmp_path), run_lock.held(tmp_path):
        pass
    monkeypatch.setattr(run_lock, "fcntl", None)
    with run_lock.held(tmp_path):
        pass


def test_a_start_is_refused_before_its_data_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With data and a codec that are not there: neither is asked for."""
    from srcflow.cli import main

    run = tmp_path / "run"
    config = Path(__file__).parents[2] / "configs/smoke/flow.yaml"
    options = ["--trainer.default_root_dir", str(run), "--trainer.accelerator", "cpu", "--data.train", str(tmp_path / "none-*.tar")]
    with run_lock.held(run), pytest.raises(RunningError, match=f"process {os.getpid()}"):
        main(["--debug", "fit", "--config", str(config), *options, "--trainer.logger", "false"])
    assert sorted(p.name for p in run.iterdir()) == ["run.lock"]
    began = time.monotonic()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"trainer.default_root_dir = .*cannot be written"):
        main(["--debug", "fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / "file/run"), *options[2:]])
    assert time.monotonic() - began < 60
