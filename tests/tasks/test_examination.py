"""What is said of a step that was dropped, and what a run that drops steps goes on from."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from srcflow.callbacks.non_finite import NonFiniteWarning
from srcflow.callbacks.spike_monitor import SpikeMonitor
from srcflow.cli.replay import report
from srcflow.data.feature_store import FeatureStoreDataset
from srcflow.tasks import dump as dumps
from srcflow.tasks.examination import attempt, names_of, verdict
from srcflow.tasks.replay import differences, replay

SCRIPT = Path(__file__).with_name("bad_step.py")


@pytest.fixture(scope="module")
def parts() -> Any:
    spec = importlib.util.spec_from_file_location("bad_step", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def said(record: Any) -> str:
    (text,) = [str(w.message) for w in record if issubclass(w.category, NonFiniteWarning)]
    return text


def test_the_block_whose_log_scale_overflows_is_named(parts: Any, tmp_path: Path) -> None:
    """Block 1 stretches its input by exp(60) in one channel: its output overflows when it is squared."""
    parts.prepare(tmp_path, spoiled=False)
    task = parts.make(tmp_path, learn_prior=False)
    with torch.no_grad():
        task.flow.blocks[1].head.weight.zero_()
        task.flow.blocks[1].head.bias[:48] = 0.25
        task.flow.blocks[1].head.bias[7] = -60.0
    with pytest.warns(NonFiniteWarning) as record:
        parts.fit(tmp_path, task=task, max_steps=1)
    text = said(record)
    assert "step 0 was skipped (1 in a row, 1 in all): loss inf, gradient norm " in text
    assert "The most extreme of all: log-scale -60 to 0.25 in block 1, attention logit " in text
    assert "no finite likelihood: samples " in text
    assert "and 4 more." in text
    result = replay(dump := dumps.read(tmp_path / "nonfinite-step000000"), parts.make(tmp_path, seed=1, learn_prior=False))
    assert differences(dump, result) == []
    assert result.forward == ["the loss, after the last module"]
    assert math.isfinite(result.findings[0]["blocks"]["z_abs_max"][1])


def test_the_block_where_values_stop_to_be_finite_is_named(parts: Any, tmp_path: Path) -> None:
    """exp(200) is no float32; what lies before is reported too, the attention of block 0 with its logits."""
    parts.prepare(tmp_path, spoiled=False)
    task = parts.make(tmp_path, learn_prior=False)
    with torch.no_grad():
        task.flow.blocks[0].layers[0].attn.qkv.weight.mul_(40)
        task.flow.blocks[0].head.weight.zero_()
        task.flow.blocks[1].head.bias[7] = -200.0
    with pytest.warns(NonFiniteWarning) as record:
        parts.fit(tmp_path, task=task, max_steps=1)
    text = said(record)
    found = re.search(
        r"Block 1 is the first that is not finite \(log-scale (\S+) to \S+, attention logit (\S+)\); the most extreme before it: "
        r"log-scale \S+ to \S+ in block 0, attention logit (\S+) in block 0",
        text,
    )
    assert found is not None, text
    low, logit, before = (float(x) for x in found.groups())
    assert low == pytest.approx(-200, abs=5)
    assert before > 50 > logit


@pytest.mark.parametrize(
    ("finding", "severity", "words"),
    [
        (
            {"loss": 1.0, "terms": {"train/l1": 0.25, "train/perceptual": math.nan}},
            (True, 0.25),
            "not finite: train/perceptual; loss terms: l1 0.25",
        ),
        ({"loss": math.inf, "terms": {"train/l1": 0.25}}, (False, 0.25), "loss terms: l1 0.25"),
        (
            {
                "loss": 1.0,
                "terms": {},
                "indices": [4, 9],
                "blocks": {
                    "log_scale_min": [-3.0, -1.0, math.nan],
                    "log_scale_max": [1.0, 2.0, math.nan],
                    "attention_logit_max": [5.0, 70.0, 1.0],
                    "z_abs_max": [1.0, 1.0, math.nan],
                },
                "samples": {"code_abs_max": [1.0, 2.0], "nll": [1.0, math.nan]},
            },
            (True, 3.0),
            "block 2 is the first that is not finite (log-scale nan to nan, attention logit 1); the most extreme before it: "
            "log-scale -3 to 1 in block 0, attention logit 70 in block 1; no finite likelihood: sample #9",
        ),
    ],
)
def test_what_is_extreme_is_said_in_words(finding: dict[str, Any], severity: tuple[int, float], words: str) -> None:
    assert verdict(finding, lambda i: f"#{i}") == (severity, words)


@pytest.mark.filterwarnings("ignore::srcflow.callbacks.non_finite.NonFiniteWarning")
def test_a_batch_that_cannot_be_examined_ends_no_run(parts: Any, tmp_path: Path) -> None:
    parts.prepare(tmp_path)
    task = parts.make(tmp_path)
    step, steps = task.training_step, []

    def broken(batch: Any, batch_idx: int) -> Any:
        steps.append(batch_idx)
        if steps.count(batch_idx) == 2:
            raise RuntimeError("no room for it")
        return step(batch, batch_idx)

    task.training_step = broken
    with pytest.warns(NonFiniteWarning) as record:
        parts.fit(tmp_path, task=task, max_steps=6)
    assert (task.guard.skipped, task.global_step) == (1, 6)
    text = said(record)
    assert "Batch could not be examined: RuntimeError: no room for it. Dumped; " in text
    assert "log" not in task.__dict__
    assert task.apart is False
    dump = dumps.read(tmp_path / "nonfinite-step000002")
    (finding,) = [b.finding for b in dump.batches]
    assert finding["problem"] == "could not be examined: RuntimeError: no room for it"
    assert f"key{parts.POISONED}" in " ".join(finding["names"])
    result = replay(dump, parts.make(tmp_path, seed=1))
    assert differences(dump, result)[0] == f"batch 2: {finding['problem']} in the run; there is nothing to compare with"
    assert f"sample {parts.POISONED} (key{parts.POISONED}) are not finite" in report(dump, result)


def test_a_sample_whose_name_cannot_be_found_goes_by_its_number(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts.prepare(tmp_path)

    def lost(*args: Any, **more: Any) -> Any:
        raise OSError("disk gone")

    monkeypatch.setattr(FeatureStoreDataset, "key", lost)
    with pytest.warns(NonFiniteWarning) as record:
        parts.fit(tmp_path, max_steps=3)
    assert f"sample {parts.POISONED} (no name: OSError: disk gone) are not finite, before the flow. Dumped; " in said(record)
    task: Any = SimpleNamespace(trainer=SimpleNamespace(datamodule=SimpleNamespace(dataset=lost)))
    assert names_of(task)(3) == "3 (no name: OSError: disk gone)"


def test_a_batch_is_examined_without_the_other_ranks(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The learned prior follows the mean over all ranks in training, and only there."""
    parts.prepare(tmp_path, spoiled=False)
    task, calls = parts.make(tmp_path), []
    reduce = SingleDeviceStrategy.reduce
    monkeypatch.setattr(SingleDeviceStrategy, "reduce", lambda self, x, *a, **k: calls.append(task.apart) or reduce(self, x, *a, **k))

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            before = len(calls)
            assert before > 0
            assert "problem" not in attempt(pl_module, batch, batch_idx)
            assert len(calls) == before

    parts.fit(tmp_path, Look(), task=task, max_steps=2)
    assert calls


def test_an_unexamined_batch_is_worse_than_a_sound_one_and_better_than_a_bad_one() -> None:
    unknown = verdict({"loss": math.nan, "terms": {}, "problem": "could not be examined: E: x"})
    assert unknown[1] == "batch could not be examined: E: x"
    sound = verdict({"loss": 1.0, "terms": {"train/l1": 1e9}})
    bad = verdict({"loss": 1.0, "terms": {"train/l1": math.nan}})
    assert sound[0] < unknown[0] < bad[0]


class Save(L.Callback):
    """A checkpoint before a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path
        self.indices: list[list[int]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.indices.append(batch["indices"].tolist())

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore::srcflow.callbacks.non_finite.NonFiniteWarning", "ignore::srcflow.callbacks.spike_monitor.SpikeWarning")
def test_a_run_that_dropped_a_step_goes_on_bit_for_bit(parts: Any, tmp_path: Path) -> None:
    """Counters and windows too; with another seed of the data it goes on elsewhere."""
    parts.prepare(tmp_path)
    ends = []
    for ckpt in (None, tmp_path / "4.ckpt"):
        save = Save(4, tmp_path / "4.ckpt")
        task = parts.fit(tmp_path, save, SpikeMonitor(window=4), ckpt=ckpt, max_steps=10, max_epochs=-1)
        task.trainer.save_checkpoint(tmp_path / "end.ckpt")
        end = torch.load(tmp_path / "end.ckpt", weights_only=True)
        assert end["callbacks"]["NonFiniteGuard"] == {"skipped": 2, "in_a_row": 0}  # one in each epoch
        assert len(end["callbacks"]["SpikeMonitor"]["loss"]["kept"]) == 4
        ends.append((end, save.indices))
    (straight, seen), (resumed, again) = ends
    assert again == seen[4:]
    assert straight["callbacks"] == resumed["callbacks"]
    for name, value in straight["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    for i, moments in straight["optimizer_states"][0]["state"].items():
        assert all(torch.equal(v, resumed["optimizer_states"][0]["state"][i][k]) for k, v in moments.items())

    save = Save(-1, tmp_path)
    task = parts.fit(tmp_path, save, SpikeMonitor(window=4), ckpt=tmp_path / "4.ckpt", max_steps=12, max_epochs=-1, seed=1)
    assert [len(b) for b in save.indices] == [8] * 8
    assert not any(mine in seen for mine in save.indices)
    assert sorted(i for batch in save.indices[2:] for i in batch) == list(range(parts.SAMPLES))  # every later epoch is complete
