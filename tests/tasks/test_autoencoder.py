from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from srcflow import artifacts
from srcflow.autoencoders.base import Autoencoder
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.callbacks.ema import EMA
from srcflow.callbacks.non_finite import NonFiniteWarning
from srcflow.codec import Codec
from srcflow.errors import ArtifactError, ConfigError, NonFiniteError
from srcflow.losses.adversarial import Adversarial
from srcflow.losses.perceptual import EncoderPerceptual
from srcflow.metrics.features.encoder import EncoderFeatures
from srcflow.noise import Constant, Uniform
from srcflow.statistics import Moments
from srcflow.tasks import artifact
from srcflow.tasks.autoencoder import AutoencoderTask
from srcflow.tasks.optimization import Optimization
from srcflow.types import Features

Make = Callable[..., Any]
fast = Optimization(learning_rate=3e-3, min_learning_rate=1e-4)


def stage_0(autoencoder: Any, **more: Any) -> AutoencoderTask:
    return AutoencoderTask(autoencoder, **{"noise": Uniform(0.8), "eval_noise": Constant(0.4), **more})


class Trail(L.Callback):
    """Losses and trained weights after every batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *args: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.weights.append(pl_module.autoencoder.decoder.head.weight.detach().clone())


def test_the_decoder_learns_the_encoder_does_not_and_the_artifact_is_complete(
    autoencoder: Make, pictures: Make, trainer: Make, tmp_path: Path
) -> None:
    task = stage_0(autoencoder(), optimization=fast, artifact=str(tmp_path / "ae"))
    trail, ema = Trail(), EMA(0.9)
    trainer(max_steps=60, callbacks=[trail, ema]).fit(task, datamodule=pictures())
    assert sum(trail.losses[-5:]) < 0.7 * sum(trail.losses[:5])
    encoder = autoencoder().encoder
    encoder.setup()
    assert torch.equal(task.autoencoder.encoder.conv.weight, encoder.conv.weight)

    # the statistics are those of clean features over the whole training set
    moments = Moments((16, 16))
    for batch in pictures().train_dataloader():
        moments.update(encoder(batch["images"].float() / 255)[0])
    torch.testing.assert_close(task.autoencoder.mean, moments.mean.float())
    torch.testing.assert_close(task.autoencoder.var, moments.var.float())

    loaded = artifacts.load(tmp_path / "ae", Autoencoder)
    raw = artifacts.load(tmp_path / "ae", Autoencoder, weights="raw")
    assert torch.equal(raw.decoder.head.weight, trail.weights[-1])
    assert torch.equal(loaded.decoder.head.weight, ema.weights(task, "ema")["autoencoder.decoder.head.weight"])
    assert not torch.equal(loaded.decoder.head.weight, raw.decoder.head.weight)
    manifest = artifacts.read_manifest(tmp_path / "ae")
    assert manifest["steps"] == 60
    assert manifest["data"] == {"class": "Pictures", "train": 32}


def test_noise_is_keyed_by_step_and_sample_not_by_batch_size(autoencoder: Make, trainer: Make, pictures: Make) -> None:
    task = stage_0(autoencoder(), seed=3)
    task.autoencoder.statistics_fitted.fill_(True)
    raw, indices = torch.zeros(4, 16, 16), torch.tensor([5, 2, 9, 7])

    def noise(law: Uniform | None, rows: slice, purpose: str, step: int, seed: int = 3) -> Tensor:
        chain = Codec(task.autoencoder, None, law, seed)
        return chain.normalized(Features(raw[rows], None, (4, 4), indices[rows]), step, purpose)

    law, everything = Uniform(0.8), slice(0, 4)
    whole = noise(law, everything, "train", 4)
    assert torch.equal(whole[2:3], noise(law, slice(2, 3), "train", 4))
    assert not torch.equal(whole, noise(law, everything, "train", 5))
    assert not torch.equal(whole, noise(law, everything, "evaluation", 4))
    assert not torch.equal(whole, noise(law, everything, "train", 4, seed=4))
    assert torch.equal(noise(None, everything, "train", 4), task.autoencoder.normalize(raw))


def test_a_resumed_run_is_the_straight_one(autoencoder: Make, pictures: Make, trainer: Make, encoder: Make, tmp_path: Path) -> None:
    def run(steps: int, resume: str | None = None) -> tuple[AutoencoderTask, Trail, EMA, L.Trainer]:
        torch.manual_seed(5)
        game = Adversarial(encoder(8, 7), layers=None, kernel=3, train_from=1, count_from=2)
        task = stage_0(autoencoder(), adversarial=game, optimization=fast)
        trail, ema = Trail(), EMA(0.9)
        t = trainer(max_steps=8, callbacks=[trail, ema, Stop(steps)])
        t.fit(task, datamodule=pictures(), ckpt_path=resume)
        return task, trail, ema, t

    class Stop(L.Callback):
        def __init__(self, at: int) -> None:
            self.at = at

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == self.at:
                trainer.should_stop = True

    straight, trail, ema, _ = run(8)
    _, first, _, t = run(4)
    t.save_checkpoint(tmp_path / "half.ckpt")
    resumed, second, resumed_ema, _ = run(8, str(tmp_path / "half.ckpt"))
    assert len(first.weights) == 4
    assert torch.equal(torch.stack(first.weights + second.weights), torch.stack(trail.weights))
    assert all(
        torch.equal(a, b) for a, b in zip(ema.weights(straight, "ema").values(), resumed_ema.weights(resumed, "ema").values(), strict=True)
    )
    for name, value in straight.outside["adversarial"].state_dict().items():
        assert torch.equal(value, resumed.outside["adversarial"].state_dict()[name]), name
    assert torch.equal(resumed.autoencoder.mean, straight.autoencoder.mean)


def test_the_discriminator_stays_out_of_the_module_and_follows_its_start_steps(
    autoencoder: Make, pictures: Make, trainer: Make, encoder: Make
) -> None:
    game = Adversarial(encoder(8, 7), layers=None, kernel=3, train_from=2, count_from=4)
    task = stage_0(autoencoder(), adversarial=game, optimization=fast)

    class Watch(L.Callback):
        heads: list[Tensor] = []  # noqa: RUF012
        counted: list[bool] = []  # noqa: RUF012

        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            self.heads.append(game.heads[0].read.parametrizations.weight.original.detach().clone())
            self.counted.append("train/adversarial_weight" in trainer.callback_metrics)

    start = game.heads[0].read.parametrizations.weight.original.detach().clone()
    watch = Watch()
    t = trainer(max_steps=6, callbacks=[watch])
    t.fit(task, datamodule=pictures())
    moved = [not torch.equal(a, b) for a, b in zip([start, *watch.heads[:-1]], watch.heads, strict=True)]
    assert moved == [False, False, True, True, True, True]
    assert watch.counted == [False] * 4 + [True] * 2
    assert t.global_step == 6
    assert not [k for k in task.state_dict() if "heads" in k]
    assert float(t.callback_metrics["train/adversarial_weight"]) > 0


def test_accumulation_clips_and_steps_both_sides_once(autoencoder: Make, pictures: Make, trainer: Make, encoder: Make) -> None:
    def heads(batch_size: int, accumulate: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        game = Adversarial(encoder(8, 7), layers=None, kernel=3)
        gan = Optimization(learning_rate=1e-2, min_learning_rate=1e-2)
        task = stage_0(autoencoder(), noise=None, adversarial=game, discriminator=gan, optimization=fast, perceptual_weight=0)
        trainer(max_steps=1, accumulate_grad_batches=accumulate).fit(task, datamodule=pictures(batch_size=batch_size))
        return game.heads[0].read.parametrizations.weight.original.detach(), task.autoencoder.decoder.head.weight.detach()

    whole, halves = heads(16, 1), heads(8, 2)
    torch.testing.assert_close(whole[0], halves[0], rtol=1e-3, atol=1e-5)


def test_zero_weights_cost_nothing(autoencoder: Make, pictures: Make, trainer: Make, encoder: Make) -> None:
    class Refuses(EncoderPerceptual):
        def setup(self) -> None:
            raise AssertionError("weights were loaded for a loss of weight 0")

    game = Adversarial(encoder(8, 7), layers=None, kernel=3, weight=0.0)
    task = stage_0(autoencoder(), perceptual=Refuses(encoder(8, 3)), perceptual_weight=0.0, adversarial=game)
    trainer(max_steps=1).fit(task, datamodule=pictures())
    assert task.discriminator is None


def test_a_perceptual_loss_may_set_in_late(autoencoder: Make, pictures: Make, trainer: Make, encoder: Make) -> None:
    class Counted(EncoderPerceptual):
        calls = 0

        def distance(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            Counted.calls += 1
            return super().distance(pred, target)

    trainer(max_steps=4).fit(stage_0(autoencoder(), perceptual=Counted(encoder(8, 3)), perceptual_from=3), datamodule=pictures())
    assert Counted.calls == 1
    with pytest.raises(ConfigError, match="perceptual_from = -1"):
        stage_0(autoencoder(), perceptual_from=-1)


def test_a_perceptual_loss_is_added(autoencoder: Make, pictures: Make, trainer: Make, encoder: Make) -> None:
    task = stage_0(autoencoder(), perceptual=EncoderPerceptual(encoder(8, 3)), perceptual_weight=2.0)
    t = trainer(max_steps=1)
    t.fit(task, datamodule=pictures())
    m = t.callback_metrics
    assert float(m["train/loss"]) == pytest.approx(float(m["train/l1"]) + 2 * float(m["train/perceptual"]), rel=1e-5)
    assert not [k for k in task.state_dict() if k.startswith(("perceptual", "outside"))]


def test_test_writes_the_table_and_the_protocol(
    autoencoder: Make, pictures: Make, trainer: Make, encoder: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def task(**more: Any) -> AutoencoderTask:
        return stage_0(autoencoder(), extractor=EncoderFeatures(encoder(8, 3)), optimization=fast, **more)

    trained = task()
    t = trainer(max_steps=6, callbacks=[EMA(0.9)])
    t.fit(trained, datamodule=pictures())
    t.save_checkpoint(tmp_path / "last.ckpt")
    ckpt = str(tmp_path / "last.ckpt")
    numbers = {}
    for weights in ("ema", "raw"):
        path = tmp_path / f"{weights}.json"
        trainer().test(task(weights=weights, metrics_file=str(path)), datamodule=pictures(), ckpt_path=ckpt, verbose=False)
        written = json.loads(path.read_text())
        numbers[weights] = written["metrics"]
        assert written["protocol"]["weights"] == weights
        assert written["protocol"]["images"] == 8  # the padding was not counted
        assert written["protocol"]["extractor"].startswith("tests") or "PatchEncoder" in written["protocol"]["extractor"]
        assert written["protocol"]["noise"]["init_args"] == {"sigma": 0.4}
    assert {"l1", "psnr", "ssim", "rfid_8", "noisy_l1", "noisy_rfid_8"} <= set(numbers["ema"])
    assert numbers["ema"]["l1"] != numbers["raw"]["l1"]
    assert "rfid_8" in capsys.readouterr().out

    # by hand: the averaged weights, noise 0
    model = trained.autoencoder
    with t.callbacks[0].averaged(trained) if isinstance(t.callbacks[0], EMA) else pytest.fail("no EMA"):
        images = torch.stack([s["images"] for s in pictures().samples(8, 1)]).float() / 255
        raw, grid = model.features(images)
        pred = model.decode(model.normalize(raw), grid).clamp(0, 1)
    assert numbers["ema"]["l1"] == pytest.approx(float((pred - images).abs().mean().detach()), rel=1e-4)


def test_export_gives_what_fit_wrote(autoencoder: Make, pictures: Make, trainer: Make, tmp_path: Path) -> None:
    task = stage_0(autoencoder(), artifact=str(tmp_path / "fit"), optimization=fast)
    t = trainer(max_steps=3, callbacks=[EMA(0.9)])
    t.fit(task, datamodule=pictures())
    t.save_checkpoint(tmp_path / "a.ckpt")
    t.save_checkpoint(tmp_path / "light.ckpt", weights_only=True)
    for name in ("a", "light"):
        artifact.export(stage_0(autoencoder()), str(tmp_path / f"{name}.ckpt"), str(tmp_path / name))
        assert artifacts.read_manifest(tmp_path / name)["hash"] == artifacts.read_manifest(tmp_path / "fit")["hash"]
        assert artifacts.read_manifest(tmp_path / name)["data"] == {"class": "Pictures", "train": 32}
        one, two = (artifacts.read_tensors(tmp_path / d / "raw.safetensors") for d in ("fit", name))
        assert set(one) == set(two)
        assert all(torch.equal(one[k], two[k]) for k in one)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ArtifactError, match="is not a checkpoint of AutoencoderTask"):
        artifact.export(stage_0(autoencoder()), str(tmp_path / "other.ckpt"), str(tmp_path / "x"))


def test_resuming_averaged_weights_without_the_callback_is_refused(
    autoencoder: Make, pictures: Make, trainer: Make, tmp_path: Path
) -> None:
    t = trainer(max_steps=2, callbacks=[EMA(0.9)])
    t.fit(stage_0(autoencoder()), datamodule=pictures())
    t.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match="Add the EMA callback"):
        trainer(max_steps=4).fit(stage_0(autoencoder()), datamodule=pictures(), ckpt_path=str(tmp_path / "a.ckpt"))


def test_an_autoencoder_without_training_is_written_as_it_is(pictures: Make, trainer: Make, tmp_path: Path) -> None:
    task = stage_0(PixelPatches(16, 4), eval_noise=None, artifact=str(tmp_path / "pixels"))
    t = trainer(max_steps=5)
    with pytest.warns(UserWarning, match="returned `None`"):
        t.fit(task, datamodule=pictures())
    assert t.global_step == 0
    assert isinstance(artifacts.load(tmp_path / "pixels", Autoencoder), PixelPatches)


def test_stored_features_train_too_and_missing_images_are_named(
    autoencoder: Make, feature_batches: Make, pictures: Make, trainer: Make
) -> None:
    def train(data: Callable[[Any], Any]) -> Tensor:
        model = autoencoder()
        model.encoder.setup()
        task = stage_0(model, optimization=fast)
        trainer(max_steps=2, limit_val_batches=0).fit(task, datamodule=data(model))
        return task.autoencoder.decoder.head.weight.detach()

    torch.testing.assert_close(train(lambda m: feature_batches(m, with_images=True)), train(lambda m: pictures()))
    with pytest.raises(ConfigError, match="with_images"):
        train(lambda m: feature_batches(m))


def test_settings_that_cannot_work_are_refused(autoencoder: Make, pictures: Make, trainer: Make, encoder: Make) -> None:
    with pytest.raises(ConfigError, match=r"optimization\.gradient_clip"):
        trainer(gradient_clip_val=1.0).fit(stage_0(autoencoder()), datamodule=pictures())
    half = stage_0(autoencoder())
    half._trainer = SimpleNamespace(precision="16-mixed", gradient_clip_val=None, strategy=SingleDeviceStrategy())  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="bf16-mixed"):
        half.setup("fit")
    with pytest.raises(ConfigError, match="would judge"):
        trainer().validate(stage_0(autoencoder(), extractor=EncoderFeatures(encoder(16, 0))), datamodule=pictures(), verbose=False)
    with pytest.raises(ConfigError, match="weights"):
        stage_0(autoencoder(), weights="swa")


def test_an_unusable_place_of_the_artifact_is_refused_before_training(
    autoencoder: Make, pictures: Make, trainer: Make, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("")
    with pytest.raises(ArtifactError, match="is not an artifact"):
        trainer().fit(stage_0(autoencoder(), artifact=str(tmp_path / "notes")), datamodule=pictures())
    checkpoints = ModelCheckpoint(str(tmp_path / "run" / "checkpoints"))
    with pytest.raises(ConfigError, match=r"the run writes .*checkpoints into it"):
        trainer(enable_checkpointing=True, callbacks=[checkpoints]).fit(
            stage_0(autoencoder(), artifact=str(tmp_path / "run")), datamodule=pictures()
        )
    (tmp_path / "empty").mkdir()
    trainer(max_steps=1).fit(stage_0(autoencoder(), artifact=str(tmp_path / "empty")), datamodule=pictures())


def test_mixed_precision_keeps_float32_weights(autoencoder: Make, pictures: Make, trainer: Make) -> None:
    task = stage_0(autoencoder(), optimization=fast)
    trainer(max_steps=3, precision="bf16-mixed").fit(task, datamodule=pictures())
    assert torch.isfinite(task.autoencoder.decoder.head.weight).all()
    assert task.autoencoder.decoder.head.weight.dtype == torch.float32


def test_every_task_brings_its_guard(autoencoder: Make, pictures: Make, trainer: Make) -> None:
    class Poison(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.pixel_weight = float("inf") if batch_idx == 1 else 1.0

    task = stage_0(autoencoder(), optimization=fast)
    trail = Trail()
    t = trainer(max_steps=3, callbacks=[Poison(), trail])
    with pytest.warns(
        NonFiniteWarning, match=r"step 1 was skipped .*Loss terms: l1 0\.\d+|Not finite: train/loss; loss terms: l1 0\.\d+\."
    ):
        t.fit(task, datamodule=pictures())
    assert task.guard.skipped == 1
    assert torch.equal(trail.weights[0], trail.weights[1])
    assert not torch.equal(trail.weights[1], trail.weights[2])
    assert float(t.callback_metrics["train/skipped_steps"]) == 1

    patient = stage_0(autoencoder(), pixel_weight=float("inf"), optimization=Optimization(max_bad_steps=2))
    with pytest.warns(NonFiniteWarning), pytest.raises(NonFiniteError, match="2 steps in a row"):
        trainer().fit(patient, datamodule=pictures())
