"""A dropped step leaves nothing behind, says what was extreme, and is made again from its dump."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.callbacks.non_finite import NonFiniteWarning
from srcflow.errors import ArtifactError, ConfigError, ManifestMismatchError
from srcflow.losses.adversarial import Adversarial
from srcflow.noise import Uniform
from srcflow.tasks import dump as dumps
from srcflow.tasks.autoencoder import AutoencoderTask
from srcflow.tasks.discriminator import Discriminator
from srcflow.tasks.optimization import Optimization
from srcflow.tasks.replay import differences, replay

SCRIPT = Path(__file__).with_name("bad_step.py")
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def parts() -> Any:
    spec = importlib.util.spec_from_file_location("bad_step", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dump_of(root: Path, step: int) -> dumps.Dump:
    return dumps.read(root / f"nonfinite-step{step:06d}")


@pytest.mark.parametrize(("accumulate", "precision"), [(1, "32-true"), (2, "32-true"), (1, "bf16-mixed")])
def test_a_step_with_a_spoiled_sample_leaves_nothing_behind_and_is_made_again(
    accumulate: int, precision: str, parts: Any, tmp_path: Path
) -> None:
    """48 samples in 6 batches; under accumulation the other batch of the step is sound, and its part in the learned prior is undone."""
    parts.prepare(tmp_path)
    watch = parts.Watch(dumped=0)
    with pytest.warns(NonFiniteWarning) as said:
        task = parts.fit(tmp_path, watch, max_steps=6, accumulate_grad_batches=accumulate, precision=precision)
    assert [bool(c) for c in watch.changed].count(False) == 1
    bad = [bool(c) for c in watch.changed].index(False)
    for changed in (c for c in watch.changed if c):  # what a good step changes
        assert {"updates", "flow.prior_var", "flow.prior_std", "moment.0.step", "moment.0.exp_avg"} <= set(changed)
    assert (task.guard.skipped, task.guard.in_a_row, task.ema.updates) == (1, 0, 6 // accumulate - 1)
    (text,) = [str(w.message) for w in said if issubclass(w.category, NonFiniteWarning)]
    assert text.startswith(f"optimizer step {bad} was skipped (1 in a row, 1 in all): loss nan, gradient norm nan. The codes of sample")
    assert f"sample {parts.POISONED} (key{parts.POISONED}) are not finite, before the flow" in text
    assert f"srcflow replay {tmp_path / f'nonfinite-step{bad:06d}'}" in text

    assert bad == {1: 2, 2: 1}[accumulate]
    for step in (0, bad):  # in a good step every number is finite
        dump = dump_of(tmp_path, step)
        assert len(dump.batches) == accumulate
        result = replay(dump, parts.make(tmp_path, seed=1))
        assert differences(dump, result) == []
        where = [f for f in result.forward if f is not None]
        assert where == (["between the batch and the input of flow.blocks.0.proj_in"] if step == bad else [])
        assert (result.backward is not None) == (step == bad)


def spoil(file: Path, name: str) -> None:
    tensors = load_file(file)
    tensors[name] = tensors[name] * 1.001
    save_file(tensors, file)


def test_a_dump_that_is_not_the_step_is_found_out(parts: Any, tmp_path: Path) -> None:
    parts.prepare(tmp_path)
    with pytest.warns(NonFiniteWarning):
        parts.fit(tmp_path, parts.Watch(dumped=0), max_steps=6)
    place = tmp_path / "nonfinite-step000000"
    facts = (place / "dump.json").read_text()
    (place / "dump.json").write_text(facts.replace('"seed": 7', '"seed": 8'))
    found = differences(dumps.read(place), replay(dumps.read(place), parts.make(tmp_path)))
    assert any(line.startswith("batch 0: loss: recorded ") and ", now " in line for line in found)  # other noise, other labels dropped
    (place / "dump.json").write_text(facts)
    assert differences(dumps.read(place), replay(dumps.read(place), parts.make(tmp_path))) == []
    spoil(place / "weights.safetensors", "flow.blocks.1.head.weight")
    found = differences(dumps.read(place), replay(dumps.read(place), parts.make(tmp_path)))
    assert any(line.startswith("batch 0: nll[3]: recorded ") for line in found)
    assert any(line.startswith("batch 0: z_abs_max[1]: recorded ") for line in found)
    assert not any("z_abs_max[0]" in line for line in found)  # the block before is as it was


def test_a_dump_that_cannot_be_used_is_refused(parts: Any, tmp_path: Path) -> None:
    parts.prepare(tmp_path)
    with pytest.warns(NonFiniteWarning):
        parts.fit(tmp_path, parts.Watch(), max_steps=6)
    (place,) = tmp_path.glob("nonfinite*")
    artifacts.save(tmp_path / "codec", PixelPatches(8, 4, levels=128))
    with pytest.raises(ManifestMismatchError, match="Name the artifacts it was trained on"):
        replay(dumps.read(place), parts.make(tmp_path))
    with pytest.raises(ArtifactError, match="is a step of FlowTask, the configuration describes object"):
        replay(dumps.read(place), object())  # type: ignore[arg-type]
    (place / "dump.json").write_text((place / "dump.json").read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(ArtifactError, match="has format 2; this version of srcflow reads 1"):
        dumps.read(place)
    (place / "dump.json").write_text((place / "dump.json").read_text().replace('"format": 2', '"format": 1'))
    (place / "rank0.json").unlink()
    with pytest.raises(ArtifactError, match="is damaged: FileNotFoundError"):
        dumps.read(place)
    with pytest.raises(ArtifactError, match=r"is no dump of a training step: it has no dump\.json"):
        dumps.read(tmp_path)


def test_a_dump_that_cannot_be_written_does_not_end_the_run(parts: Any, tmp_path: Path) -> None:
    parts.prepare(tmp_path)
    (tmp_path / "nonfinite-step000002").write_text("in the way")
    with pytest.warns() as said:
        task = parts.fit(tmp_path, parts.Watch(), max_steps=6)
    texts = [str(w.message) for w in said]
    assert any("dump of a step: FileExistsError" in t for t in texts)
    assert any(f"It could not be dumped to {tmp_path / 'nonfinite-step000002'}." in t for t in texts)
    assert (task.guard.skipped, task.global_step) == (1, 6)


def two_ranks(mode: str, root: Path, parts: Any) -> None:
    parts.prepare(root)
    out = subprocess.run([sys.executable, str(SCRIPT), mode, str(root)], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-3000:]
    line = next(x for x in out.stdout.splitlines() if x.startswith("RESULT"))
    result = json.loads(line.removeprefix("RESULT"))
    assert result["same"]
    assert (result["skipped"], result["updates"]) == (1, 2)
    assert result["changed"].count(0) == 1
    bad = result["changed"].index(0)
    (text,) = result["said"]
    assert text.startswith(f"optimizer step {bad} was skipped (1 in a row, 1 in all): loss nan, gradient norm nan. Rank ")
    rank = int(text.partition("Rank ")[2][0])
    assert f"Rank {rank}: the codes of sample {parts.POISONED} (key{parts.POISONED}) are not finite" in text
    assert bad > 0
    for step in (0, bad):
        dump = dump_of(root, step)
        assert [(r.rank, r.number) for r in dump.batches] == [(0, step), (1, step)]
        again = replay(dump, parts.make(root, seed=1))
        assert differences(dump, again) == []
        assert [f is not None for f in again.forward] == [step == bad and r == rank for r in (0, 1)]
        assert step == bad or again.grad_norm == pytest.approx(dump.facts["grad_norm"], rel=1e-5)


def test_under_ddp_all_ranks_drop_the_step_alike(parts: Any, tmp_path: Path) -> None:
    two_ranks("ddp", tmp_path, parts)


@pytest.mark.slow
def test_under_fsdp2_all_ranks_drop_the_step_alike(parts: Any, tmp_path: Path) -> None:
    two_ranks("fsdp2", tmp_path, parts)


# --- the discriminator ---------------------------------------------------------------------------------------------------------------


class Spoiled(AutoencoderTask):
    """The second batch of an epoch has an infinite loss, from step 2 on."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if int(batch["indices"][0]) == 8 and self.global_step >= 2 else loss


def stage_0(autoencoder: Any, encoder: Make, kind: type[AutoencoderTask] = AutoencoderTask, **more: Any) -> AutoencoderTask:
    torch.manual_seed(5)
    game = Adversarial(encoder(8, 7), layers=None, kernel=3)
    return kind(autoencoder, noise=Uniform(0.8), eval_noise=None, adversarial=game, **more)


def heads(task: AutoencoderTask) -> dict[str, Any]:
    assert task.discriminator is not None
    state = task.discriminator.state_dict()
    moments = {f"{i}.{k}": v for i, row in state["optimizer"]["state"].items() for k, v in row.items()}
    return {k: v.clone() for k, v in {**state["heads"], **moments}.items()}


@pytest.mark.filterwarnings("ignore::srcflow.callbacks.non_finite.NonFiniteWarning")
def test_an_image_that_is_not_a_number_does_not_reach_the_discriminator(
    autoencoder: Make, pictures: Make, trainer: Make, encoder: Make
) -> None:
    task = stage_0(autoencoder(), encoder)
    decode, trail = task.reconstruct, []

    def spoiled(*args: Any) -> Any:
        trail.append(heads(task))
        return decode(*args) * (float("nan") if len(trail) in (2, 3) else 1.0)  # step 1, and when it is looked at again

    task.reconstruct = spoiled  # type: ignore[method-assign]
    trainer(max_steps=3).fit(task, datamodule=pictures())
    assert len(trail) == 4
    game = task.discriminator
    assert game is not None
    assert (task.guard.skipped, game.skipped, game.in_a_row) == (1, 1, 0)
    steps = [t.get("0.step", 0) for t in trail]
    assert steps == [0, 1, 1, 1]
    unchanged = [k for k in trail[1] if torch.equal(trail[1][k], trail[3][k])]
    assert {k for k in trail[1] if "._u" not in k and "._v" not in k and "parametrizations.weight.0" not in k} <= set(unchanged)
    assert all(torch.isfinite(v).all() for v in heads(task).values())


def test_a_loss_that_is_not_finite_drops_the_discriminators_step_whatever_its_gradient() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(2))
            self.heads = self

        def discriminator_loss(self, real: Any, fake: Any, generator: Any = None) -> Any:
            return self.w.sum() + real, {}

    odd: Any = Odd()
    game = Discriminator(odd, Optimization(0.1, max_bad_steps=3))
    for value in (0.0, float("inf"), float("inf")):
        game.update(torch.tensor(value), torch.tensor(0.0), rate=0.1, share=1.0, finish=True)
    assert (game.skipped, game.in_a_row) == (2, 2)
    assert torch.allclose(odd.w, torch.full((2,), 0.9))
    game.paused = True
    assert game.update(torch.tensor(0.0), torch.tensor(0.0), rate=0.1, share=1.0, finish=True) == {}
    assert torch.allclose(odd.w, torch.full((2,), 0.9))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.filterwarnings("ignore::srcflow.callbacks.non_finite.NonFiniteWarning")
def test_a_step_against_a_discriminator_is_made_again(
    accumulate: int, autoencoder: Make, pictures: Make, trainer: Make, encoder: Make, tmp_path: Path
) -> None:
    def task() -> AutoencoderTask:
        settings = {"optimization": Optimization(dump_bad_steps=1), "discriminator": Optimization(1e-2)}
        return stage_0(autoencoder(), encoder, Spoiled, **settings)

    trainer(max_steps=6 // accumulate, accumulate_grad_batches=accumulate).fit(task(), datamodule=pictures())
    (place,) = tmp_path.glob("nonfinite*")
    dump = dumps.read(place)
    assert dump.heads
    assert dump.config is None
    result = replay(dump, task())
    assert differences(dump, result, heads_moved=accumulate == 2) == []
    # the first batch's loss was against the heads of the step before; these are the step's own
    assert [line.partition(" in the step")[0].rpartition(" ")[0] for line in differences(dump, result)] == ["batch 0: loss:"] * (
        accumulate - 1
    )
    spoil(place / "discriminator.safetensors", "heads.0.read.bias")
    assert any(": adversarial: recorded " in line for line in differences(dump, replay(dumps.read(place), task())))


def test_a_discriminator_cannot_ask_for_dumps(autoencoder: Make, encoder: Make) -> None:
    with pytest.raises(ConfigError, match=r"discriminator\.dump_bad_steps = 1: only steps of the task's own optimizer are dumped"):
        stage_0(autoencoder(), encoder, discriminator=Optimization(dump_bad_steps=1))
    with pytest.raises(ConfigError, match=r"optimization\.dump_bad_steps = -1"):
        Optimization(dump_bad_steps=-1)
