from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from srcflow.callbacks import averages
from srcflow.callbacks.averages import choose, read_weights
from srcflow.callbacks.checkpoint_files import CheckpointFiles
from srcflow.callbacks.ema import EMA
from srcflow.errors import ArtifactError, CheckpointError, ConfigError


class Line(L.LightningModule):
    """A model with a frozen parameter, a buffer and a shared parameter, whose trained weight is logged."""

    weights = "ema"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.frozen = nn.Linear(3, 1), nn.Linear(3, 3).requires_grad_(False)
        self.twin = self.net
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.seen: list[Tensor] = []
        self.trail: list[Tensor] = []
        self.fail_at = -1

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.count += 1
        return (self.net(self.frozen(batch)) - 1).square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        self.trail.append(self.net.weight.detach().clone())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(self.net.weight.detach().clone())
        if len(self.seen) - 1 == self.fail_at:
            raise RuntimeError("broken")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.seen.append(self.net.weight.detach().clone())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 0.05)


def loader() -> Any:
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(x, batch_size=4)  # type: ignore[arg-type]


def trainer(path: Path, ema: EMA | None, **more: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1,
        "default_root_dir": path,
        "callbacks": [ema] if ema else [],
    }
    return L.Trainer(**{**settings, **more})


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning", "ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`:UserWarning"),
    # Lightning's reminder; a test without the callback is what is tested here
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning"),
]


def reference(trail: list[Tensor], start: Tensor, decay: float, warmup: bool) -> list[Tensor]:
    out, mean = [], start
    for n, w in enumerate(trail, 1):
        d = min(decay, (1 + n) / (10 + n)) if warmup else decay
        mean = d * mean + (1 - d) * w
        out.append(mean)
    return out


@pytest.mark.parametrize("warmup", [True, False])
def test_validation_sees_the_average_and_training_does_not(tmp_path: Path, warmup: bool) -> None:
    model, ema = Line(), EMA(0.9, warmup)
    start, plain = model.net.weight.detach().clone(), Line()
    trainer(tmp_path, ema).fit(model, loader(), loader())
    trainer(tmp_path, None).fit(plain, loader())
    assert torch.equal(torch.stack(model.trail), torch.stack(plain.trail))
    expected = reference(model.trail, start, 0.9, warmup)
    torch.testing.assert_close(torch.stack(model.seen), torch.stack([expected[3], expected[7]]))
    assert torch.equal(model.net.weight, model.trail[-1])
    assert not torch.allclose(model.seen[-1], model.trail[-1])
    assert set(ema.weights(model, "ema")) == {"net.weight", "net.bias"}
    torch.testing.assert_close(ema.weights(model, "ema")["net.weight"], expected[-1])
    with ema.averaged(model):
        torch.testing.assert_close(model.net.weight.detach(), expected[-1])
        assert torch.equal(ema.weights(model, "raw")["net.weight"], model.trail[-1])
    assert torch.equal(model.net.weight, model.trail[-1])


def test_raw_weights_are_evaluated_when_asked_for(tmp_path: Path) -> None:
    model = Line()
    model.weights = "raw"
    trainer(tmp_path, EMA(0.9)).fit(model, loader(), loader())
    assert torch.equal(model.seen[-1], model.trail[-1])


def test_accumulated_batches_count_as_one_step(tmp_path: Path) -> None:
    ema = EMA(0.9)
    trainer(tmp_path, ema, accumulate_grad_batches=2).fit(Line(), loader())
    assert ema.updates == 4


def test_checkpoint_holds_both_and_a_resumed_run_is_the_straight_one(tmp_path: Path) -> None:
    straight, ema = Line(), EMA(0.9)
    trainer(tmp_path, ema).fit(straight, loader(), loader())

    half, half_ema = Line(), EMA(0.9)
    t = trainer(tmp_path, half_ema, max_epochs=1)
    t.fit(half, loader(), loader())
    t.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert torch.equal(saved["raw_state"]["net.weight"], half.net.weight)
    assert torch.equal(saved["state_dict"]["net.weight"], half_ema.weights(half, "ema")["net.weight"])
    assert torch.equal(saved["state_dict"]["twin.weight"], saved["state_dict"]["net.weight"])
    assert saved["state_dict"]["count"] == 4
    assert torch.equal(saved["state_dict"]["frozen.weight"], half.frozen.weight)

    resumed, resumed_ema = Line(), EMA(0.9)
    trainer(tmp_path, resumed_ema).fit(resumed, loader(), loader(), ckpt_path=str(tmp_path / "half.ckpt"))
    assert torch.equal(torch.stack(half.trail + resumed.trail), torch.stack(straight.trail))
    assert torch.equal(resumed.seen[-1], straight.seen[-1])
    assert resumed_ema.updates == ema.updates == 8

    tested = Line()
    trainer(tmp_path, None).test(tested, loader(), ckpt_path=str(tmp_path / "half.ckpt"), verbose=False)
    assert torch.equal(tested.seen[0], saved["state_dict"]["net.weight"])
    after = Line()
    t = trainer(tmp_path, EMA(0.9), max_epochs=1)
    t.fit(after, loader())
    t.test(after, loader(), verbose=False)
    assert torch.equal(after.seen[0], saved["state_dict"]["net.weight"])
    assert torch.equal(after.net.weight, half.net.weight)


def test_an_exception_during_validation_puts_the_trained_weights_back(tmp_path: Path) -> None:
    model = Line()
    model.fail_at = 0
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, EMA(0.9)).fit(model, loader(), loader())
    assert torch.equal(model.net.weight, model.trail[-1])


def test_bad_decay() -> None:
    with pytest.raises(ConfigError, match="decay"):
        EMA(1.0)


def test_several_averages_follow_the_weights_each_and_resume(tmp_path: Path) -> None:
    """The first is evaluated; a run may go on with fewer, in another order, or with one the checkpoint does not know."""
    straight, ema = Line(), EMA([0.9, 0.5], warmup=False)
    start = straight.net.weight.detach().clone()
    trainer(tmp_path, ema).fit(straight, loader(), loader())
    expected = {d: reference(straight.trail, start, d, warmup=False) for d in (0.9, 0.5)}
    torch.testing.assert_close(straight.seen[-1], expected[0.9][-1])

    half = Line()
    t = trainer(tmp_path, EMA([0.9, 0.5], warmup=False), max_epochs=1)
    t.fit(half, loader())
    t.save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert saved["averages"]["decays"] == [0.9, 0.5]
    torch.testing.assert_close(saved["state_dict"]["net.weight"], expected[0.9][3])
    torch.testing.assert_close(saved["averages"]["further"][0]["net.weight"], expected[0.5][3])
    torch.testing.assert_close(choose(saved, 0.5, what="it")["net.weight"], expected[0.5][3])
    assert choose(saved, None, what="it") is saved["state_dict"]
    with pytest.raises(ConfigError, match=r"ema = 0.7: it keeps averages of decay 0.9, 0.5"):
        choose(saved, 0.7, what="it")

    for decays, ends in (([0.9, 0.5], [0.9, 0.5]), (0.5, [0.5]), ([0.5, 0.9], [0.5, 0.9])):
        resumed, other = Line(), EMA(decays, warmup=False)
        t = trainer(tmp_path, other)
        t.fit(resumed, loader(), ckpt_path=str(tmp_path / "half.ckpt"))
        t.save_checkpoint(tmp_path / "end.ckpt")
        end = torch.load(tmp_path / "end.ckpt", weights_only=True)
        for d in ends:
            torch.testing.assert_close(choose(end, d, what="it")["net.weight"], expected[d][-1])
        if decays == [0.9, 0.5]:
            assert torch.equal(other.weights(resumed, "ema")["net.weight"], ema.weights(straight, "ema")["net.weight"])

    resumed, other = Line(), EMA([0.9, 0.2], warmup=False)
    trainer(tmp_path, other).fit(resumed, loader(), ckpt_path=str(tmp_path / "half.ckpt"))
    mean = expected[0.9][3]
    for w in resumed.trail:
        mean = 0.2 * mean + 0.8 * w
    torch.testing.assert_close(other._shadows[1]["net.weight"], mean)


def test_snapshots_are_kept_on_schedule_and_not_written_again(tmp_path: Path) -> None:
    def run(epochs: int, ckpt: str | None = None) -> L.Trainer:
        t = trainer(tmp_path, EMA([0.9, 0.5], warmup=False, snapshot_every=3), max_epochs=epochs)
        t.fit(Line(), loader(), ckpt_path=ckpt)
        return t

    def files() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in (tmp_path / "snapshots").iterdir()}

    run(1).save_checkpoint(tmp_path / "half.ckpt")
    first = files()
    assert set(first) == {"step-00000003-ema-0.9.safetensors", "step-00000003-ema-0.5.safetensors"}
    saved = read_weights(tmp_path / "snapshots/step-00000003-ema-0.5.safetensors")
    assert (saved["step"], saved["ema"]) == (3, 0.5)
    model = Line()
    start = model.net.weight.detach().clone()
    trainer(tmp_path, None).fit(model, loader())
    torch.testing.assert_close(saved["state_dict"]["net.weight"], reference(model.trail, start, 0.5, warmup=False)[2])
    assert set(saved["state_dict"]) == set(model.state_dict())
    assert torch.equal(saved["state_dict"]["frozen.weight"], model.frozen.weight)

    (tmp_path / "snapshots/step-00000003-ema-0.9.safetensors").unlink()
    del first["step-00000003-ema-0.9.safetensors"]
    run(2, str(tmp_path / "half.ckpt"))  # steps 4 to 8
    assert {k: v for k, v in files().items() if "00000003" in k} == first
    run(2)
    assert {k: v for k, v in files().items() if k in first} == first
    assert sorted(files()) == [f"step-0000000{n}-ema-{d}.safetensors" for n in (3, 6) for d in (0.5, 0.9)]


@pytest.mark.parametrize("size", [0, 100, 100_000])
def test_a_full_disk_leaves_the_last_good_snapshot_and_no_part(size: int, tmp_path: Path) -> None:
    place, checkpoints = tmp_path / "snapshots/step.safetensors", tmp_path / "checkpoints"
    state = {"weights": torch.arange(50_000.0)}
    averages.write_snapshot(place, state, {})
    before = place.read_bytes()
    CheckpointFiles().save_checkpoint({"step": 3}, checkpoints / "step-3.ckpt")
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(CheckpointError) as e:
            averages.write_snapshot(place, state, {}, checkpoints)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert str(e.value).startswith(f"snapshot {place} could not be written: ")
    assert "File too large" in str(e.value)
    assert str(e.value).endswith(f" go on from it with --ckpt_path {checkpoints / 'step-3.ckpt'}.")
    assert e.value.status == 2
    assert [p.name for p in place.parent.iterdir()] == [place.name]
    assert place.read_bytes() == before


def test_a_folder_that_cannot_be_made_and_a_damaged_snapshot_are_reported(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"part")
    with pytest.raises(CheckpointError, match=r"could not be written: (File exists|Not a directory)\.$"):
        averages.write_snapshot(broken / "step.safetensors", {}, {})
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_weights(broken)


def test_a_snapshot_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, synced = tmp_path / "step.safetensors", []
    fsync = os.fsync

    def noted(fd: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{fd}")).name, place.exists()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    averages.write_snapshot(place, {"w": torch.zeros(3)}, {})
    assert synced == [(".step.safetensors.partial", False), (tmp_path.name, True)]


def test_leftovers_of_a_killed_run_are_removed_from_the_snapshots(tmp_path: Path) -> None:
    for name in (".step-00000001-ema-0.9.safetensors.partial", "notes.partial"):
        (tmp_path / name).write_bytes(b"half")
    trainer(tmp_path, EMA(0.9, snapshot_every=100, snapshots=str(tmp_path))).fit(Line(), loader())
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["notes.partial"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": [0.9, 1.0]}, "ema.decay = 1.0"),
        ({"decay": []}, "is empty"),
        ({"decay": [0.9, 0.9]}, "twice"),
        ({"snapshot_every": 0}, "ema.snapshot_every = 0"),
        ({"snapshots": "here"}, "does nothing without snapshot_every"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EMA(**arguments)
