"""Which files are kept, what `last` stands for, and how a run stops."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import AsyncCheckpointIO
from torch import Tensor

from srcflow.callbacks import checkpoint_files
from srcflow.callbacks.checkpoints import Checkpoints
from srcflow.callbacks.stop_signals import StopSignals
from srcflow.errors import CheckpointError, ConfigError, StoppedError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is not resumable.*"),
    pytest.mark.filterwarnings("ignore:.*not in the list of .*"),
]


class Model(BoringModel):
    """Lightning's, and something to do in some step."""

    def __init__(self, at: int = -1, call: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.at, self.call = at, call

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        if self.global_step == self.at:
            self.call()
        return super().training_step(batch, batch_idx)


class Told(Exception):
    """Stands for the death of the process."""


def fit(root: Path, callback: Checkpoints, model: Model | None = None, ckpt: str | None = None, **more: Any) -> L.Trainer:
    settings: dict[str, Any] = {"max_steps": 14, "limit_val_batches": 0, "limit_train_batches": 5, **more}
    trainer = L.Trainer(
        accelerator="cpu", devices=1, default_root_dir=root, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback], **settings,
    )  # fmt: skip
    trainer.fit(model or Model(), ckpt_path=ckpt, weights_only=True)
    return trainer


def names(root: Path) -> set[str]:
    return {p.name for p in (root / "checkpoints").iterdir()}


def step_of(path: Path) -> int:
    return int(torch.load(path, weights_only=True)["global_step"])


def test_the_newest_and_every_nth_are_kept(tmp_path: Path) -> None:
    trainer = fit(tmp_path, Checkpoints(every_n_steps=2, keep=2, keep_every_n_steps=6))
    assert names(tmp_path) == {"step-6.ckpt", "step-12.ckpt", "step-14.ckpt", "last.ckpt"}
    assert os.readlink(tmp_path / "checkpoints/last.ckpt") == "step-14.ckpt"
    assert step_of(tmp_path / "checkpoints/last.ckpt") == 14
    assert trainer.checkpoint_callback.best_model_path.endswith("step-14.ckpt")  # type: ignore[union-attr]


def test_without_steps_there_is_one_for_each_epoch_and_one_for_the_end(tmp_path: Path) -> None:
    fit(tmp_path, Checkpoints(keep=9))
    assert names(tmp_path) == {"step-5.ckpt", "step-10.ckpt", "step-14.ckpt", "last.ckpt"}


def test_a_step_of_several_batches_is_saved_once_and_the_newest_survives_going_back(tmp_path: Path) -> None:
    more: dict[str, Any] = {"max_steps": 4, "accumulate_grad_batches": 3, "limit_train_batches": 9}
    fit(tmp_path, Checkpoints(every_n_steps=1, keep=3), **more)
    assert names(tmp_path) == {"step-2.ckpt", "step-3.ckpt", "step-4.ckpt", "last.ckpt"}
    fit(tmp_path, Checkpoints(every_n_steps=1, keep=1), ckpt=str(tmp_path / "checkpoints/step-2.ckpt"), **{**more, "max_steps": 3})
    assert names(tmp_path) == {"step-3.ckpt", "last.ckpt"}
    assert step_of(tmp_path / "checkpoints/last.ckpt") == 3


def test_a_trial_run_writes_nothing(tmp_path: Path) -> None:
    fit(tmp_path, Checkpoints(every_n_steps=1), fast_dev_run=True)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"keep": 0}, "keep"),
        ({"keep_every_n_steps": 10}, "keep_every_n_steps"),
        ({"every_n_steps": 4, "keep_every_n_steps": 10}, "keep_every_n_steps"),
        ({"every_n_steps": 4, "keep_every_n_steps": 0}, "keep_every_n_steps"),
    ],
)
def test_numbers_that_cannot_be_are_refused(arguments: dict[str, int], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        Checkpoints(**arguments)  # type: ignore[arg-type]


def test_files_that_are_written_behind_the_back_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="AsyncCheckpointIO"):
        fit(tmp_path, Checkpoints(), plugins=[AsyncCheckpointIO()])


@pytest.mark.parametrize("moment", range(4))
def test_a_death_while_files_are_written_leaves_a_whole_last(moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the file is whole, before it has its name, before last.ckpt names it, before older ones go."""
    fit(tmp_path, Checkpoints(every_n_steps=4, keep=1), max_steps=4)
    place = ["_Watched", "replace", "link", "remove"][moment]
    original = getattr(checkpoint_files, place)

    def dying(*args: Any) -> Any:
        if place == "remove" and not args[0].name.startswith("step-"):
            return original(*args)
        raise Told

    monkeypatch.setattr(checkpoint_files, place, dying)
    with pytest.raises(Told):
        fit(tmp_path, Checkpoints(every_n_steps=4, keep=1), ckpt="last")
    monkeypatch.undo()
    assert step_of(tmp_path / "checkpoints/last.ckpt") == (8 if place == "remove" else 4)
    fit(tmp_path, Checkpoints(every_n_steps=4, keep=1), ckpt="last")
    assert names(tmp_path) == {"step-14.ckpt", "last.ckpt"}


def test_last_is_the_newest_file_where_the_link_leads_nowhere(tmp_path: Path) -> None:
    fit(tmp_path, Checkpoints(every_n_steps=4, keep=3))
    (tmp_path / "checkpoints/step-14.ckpt").unlink()
    assert fit(tmp_path, Checkpoints(every_n_steps=4, keep=3), ckpt="last").ckpt_path == str(tmp_path / "checkpoints/step-12.ckpt")


def test_last_is_refused_where_it_is_damaged_or_there_is_nothing_to_evaluate(tmp_path: Path) -> None:
    fit(tmp_path, Checkpoints(every_n_steps=4, keep=3))
    newest = tmp_path / "checkpoints/step-14.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"last\.ckpt \(a link to .*step-14\.ckpt\) is not a whole checkpoint.*step-12\.ckpt\.$"):
        fit(tmp_path, Checkpoints(), ckpt="last")
    trainer = L.Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path / "other", callbacks=[Checkpoints()])
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        trainer.test(Model(), ckpt_path="last")


# --- signals -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """A run leaves the handlers of signals as they were. (A shell's background jobs ignore SIGINT.)"""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(n) for n in numbers]
    yield
    after = [signal.getsignal(n) for n in numbers]
    signal.signal(signal.SIGINT, outer)
    assert after == before


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_behind_the_checkpoint_of_its_step(number: int, status: int, tmp_path: Path) -> None:
    with pytest.raises(StoppedError, match=rf"^stopped by {signal.Signals(number).name} at step 7; --ckpt_path last goes on from") as e:
        fit(tmp_path, Checkpoints(every_n_steps=5), Model(6, send(number)))
    assert e.value.status == status
    assert names(tmp_path) == {"step-5.ckpt", "step-7.ckpt", "last.ckpt"}
    assert fit(tmp_path, Checkpoints(every_n_steps=5), ckpt="last").global_step == 14


def test_a_signal_in_the_last_step_lets_the_run_end(tmp_path: Path) -> None:
    assert fit(tmp_path, Checkpoints(), Model(13, send(signal.SIGTERM))).global_step == 14


def test_a_second_interrupt_stops_at_once_without_a_checkpoint(tmp_path: Path) -> None:
    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit) as e:
        fit(tmp_path, Checkpoints(every_n_steps=5), Model(6, twice))
    assert isinstance(e.value.__context__, KeyboardInterrupt)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores further ones for good
    assert names(tmp_path) == {"step-5.ckpt", "last.ckpt"}


@pytest.mark.parametrize(("requeue", "array", "works"), [(1, 0, 1), (1, 1, 1), (1, 0, 0), (0, 0, 1)])
def test_slurm_is_asked_to_start_the_job_again(
    requeue: int, array: int, works: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"NTASKS": 1, "JOB_NAME": "flow", "JOB_ID": 123, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "NNODES": 1}
    if array:
        environment.update(ARRAY_JOB_ID=100, ARRAY_TASK_ID=7)
    for name, value in environment.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    command = tmp_path / "bin/scontrol"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked\nexit {0 if works else 1}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    with pytest.raises(StoppedError) as e:
        fit(tmp_path, Checkpoints(), Model(6, send(signal.SIGUSR1)), plugins=[SLURMEnvironment(auto_requeue=bool(requeue))])
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert asked == (["requeue 123\n", "requeue 100_7\n"][array] if requeue else "")
    assert ("queued again" in str(e.value)) == bool(requeue and works)
    assert not list(tmp_path.glob("hpc_ckpt*"))
    assert step_of(tmp_path / "checkpoints/last.ckpt") == 7


class Ranks:
    """A trainer of several ranks, as far as an agreement needs it; `reduce` keeps what this rank said."""

    world_size = 2
    strategy: Any

    def __init__(self) -> None:
        self.strategy, self.root_device, self.said = self, torch.device("cpu"), []
        self.others = 0.0

    def reduce(self, tensor: Tensor, reduce_op: str) -> Tensor:
        assert reduce_op == "max"
        self.said.append(tensor.tolist())
        return torch.maximum(tensor, torch.tensor([self.others, 1.0]))


def test_ranks_ask_each_other_about_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    from srcflow.callbacks import stop_signals

    ranks, listener, clock = Ranks(), stop_signals.StopSignals(), [100.0]
    monkeypatch.setattr(stop_signals.time, "monotonic", lambda: clock[0])
    for _ in range(400):
        clock[0] += 0.01
        assert listener.agreed(ranks) == 0  # type: ignore[arg-type]
    assert len(ranks.said) in range(4, 8)
    ranks.others = 15.0  # another rank was told
    told = [listener.agreed(ranks) for _ in range(100)]  # type: ignore[arg-type]
    assert told.count(15) == 1


def test_the_signal_that_requeues_is_not_hidden_by_another() -> None:
    signals = StopSignals()
    signals.counts = signal.SIGUSR1
    two: Any = SimpleNamespace(
        world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu"), reduce=lambda tensor, reduce_op: tensor)
    )
    assert signals.agreed(two) == 0
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signals._note(number, None)
    assert signals.caught == signal.SIGUSR1
    found = [signals.agreed(two) for _ in range(1001)]  # asked now and then
    assert set(found) == {0, signal.SIGUSR1}
    other = StopSignals()
    for number in (signal.SIGUSR1, signal.SIGTERM):
        other._note(number, None)
    assert other.caught == signal.SIGTERM


def test_the_result_is_not_lost_to_a_signal_after_the_last_step(tmp_path: Path) -> None:
    """A task's `on_train_end`, which writes it, follows the callbacks'."""
    written: list[int] = []

    class Writing(Model):
        def on_train_end(self) -> None:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)
            written.append(self.global_step)

    fit(tmp_path, Checkpoints(), Writing())
    assert written == [14]
