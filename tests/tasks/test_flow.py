"""FlowTask through a real Trainer on tiny codecs: training, evaluation, pixels, artifacts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.callbacks.ema import EMA
from srcflow.callbacks.non_finite import NonFiniteWarning
from srcflow.compressors.identity import Identity
from srcflow.compressors.linear import Linear as LinearCompressor
from srcflow.errors import ArtifactError, ConfigError, NonFiniteError, SrcflowError
from srcflow.flows import presets
from srcflow.flows.flow import Flow
from srcflow.guidance.linear import Linear
from srcflow.metrics.features.base import Extractor
from srcflow.metrics.frechet import save_reference
from srcflow.noise import Constant
from srcflow.pipeline import Pipeline
from srcflow.tasks import flow_evaluation
from srcflow.tasks.flow import FlowTask
from srcflow.tasks.flow_evaluation import Evaluation
from srcflow.tasks.optimization import Optimization
from srcflow.testing import perturb
from srcflow.types import Codes, Condition


class Squares(Dataset[dict[str, Any]]):
    """12 x 12 images of three classes: a bright half whose side tells the class, with noise."""

    def __init__(self, n: int, offset: int) -> None:
        g = torch.Generator().manual_seed(offset)
        self.labels = torch.arange(n) % 3
        images = torch.randint(0, 60, (n, 3, 12, 12), generator=g)
        images[self.labels == 0, :, :6] += 160
        images[self.labels == 1, :, 6:] += 160
        images[self.labels == 2, :, :, :6] += 160
        self.images, self.indices = images.to(torch.uint8), torch.arange(n)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"images": self.images[i], "labels": self.labels[i], "indices": self.indices[i], "valid": torch.tensor(True)}


class SquaresData(L.LightningDataModule):
    num_classes, batch_size = 3, 16

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Squares(480, 0), batch_size=self.batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Squares(32, 1000), batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader

    def fingerprint(self) -> dict[str, Any]:
        return {"name": "squares"}


class Means(Extractor):
    """Mean colour of each quadrant: enough of a judge."""

    name, dim = "means", 12

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1).float()


@pytest.fixture
def codec(tmp_path: Path) -> str:
    return str(artifacts.save(tmp_path / "codec", PixelPatches(12, 6)))


def trainer(tmp_path: Path, steps: int = 12, **kwargs: Any) -> L.Trainer:
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "callbacks": [EMA(0.9)], **kwargs}
    return L.Trainer(
        accelerator="cpu", max_steps=steps, default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False, **settings
    )


def make(codec: str, **kwargs: Any) -> FlowTask:
    torch.manual_seed(0)
    flow = kwargs.pop("flow", None) or presets.srcflow((2, 2), 108, 64, [1, 2], num_classes=3, head_dim=32)
    return FlowTask(flow, codec, optimization=Optimization(learning_rate=2e-3, warmup_steps=2), **kwargs)


def test_fit_then_test(tmp_path: Path, codec: str) -> None:
    task = make(codec, artifact=str(tmp_path / "flow"), latent_norm_weight=1e-4)
    run = trainer(tmp_path, steps=90)
    run.fit(task, SquaresData())
    assert bool(task.flow.normalization.fitted)
    assert {"val/nll", "val/prior", "val/logdet", "val/z_var_1", "val/z_mean_0", "val/log_scale_max", "val/attention_logit_max"} <= set(
        run.callback_metrics
    )
    parts = run.callback_metrics
    assert float(parts["val/nll"]) == pytest.approx(float(parts["val/prior"] - parts["val/logdet"]), abs=1e-5)

    evaluation = Evaluation(draws=2, samples=24, extractor=Means(), classified=32, round_trip=3, baseline_batches=0)
    tester = make(
        codec,
        flow=artifacts.load(tmp_path / "flow", Flow),
        evaluation=evaluation,
        guidance=Linear(0.5),
        metrics_file=str(tmp_path / "m.json"),
    )
    trainer(tmp_path, callbacks=[]).test(tester, SquaresData(), verbose=False)
    written = json.loads((tmp_path / "m.json").read_text())
    numbers, protocol = written["metrics"], written["protocol"]
    assert numbers["accuracy"] > 0.5  # chance is a third; a few hundred images, a few epochs
    assert numbers["nll_marginal"] <= numbers["nll"] + math.log(3) / 432 + 1e-6  # a third of the true class's density is in the mixture
    assert numbers["nll"] == pytest.approx(numbers["nll_prior"] + numbers["nll_logdet"], abs=1e-9)
    assert numbers["round_trip_error"] < 1e-4
    assert numbers["bits_per_dim"] == pytest.approx(
        (numbers["nll"] + torch.log(torch.tensor(128.0)).item()) / torch.log(torch.tensor(2.0)).item(), abs=1e-6
    )
    for name in ("gfid_24", "rfid_24", "rfid_noisy_24", "fd_decoded_24", "floor_24", "images_per_second", "reconstruction_l1"):
        assert numbers[name] >= 0
    assert numbers["rfid_24"] < 1e-6  # pixels are reconstructed exactly
    assert protocol["extractor"] == "means"
    assert protocol["guidance"]["init_args"]["strength"] == 0.5
    assert protocol["samples"] == 24


def test_guidance_and_sample_count_change_at_test_time(tmp_path: Path, codec: str) -> None:
    numbers = []
    for guidance, samples in ((None, 24), (Linear(3.0), 24), (None, 16)):
        torch.manual_seed(0)
        flow = perturb(presets.srcflow((2, 2), 108, 64, [1, 2], num_classes=3, head_dim=32, normalization="none"), 0.1)
        evaluation = Evaluation(samples=samples, extractor=Means(), baseline_batches=0, classified=0)
        file = tmp_path / "m.json"
        task = make(codec, flow=flow, evaluation=evaluation, guidance=guidance, metrics_file=str(file))
        trainer(tmp_path, callbacks=[]).test(task, SquaresData(), verbose=False)
        numbers.append(json.loads(file.read_text())["metrics"])
    assert numbers[0]["nll"] == numbers[1]["nll"]
    assert numbers[0]["gfid_24"] != numbers[1]["gfid_24"]
    assert "gfid_16" in numbers[2]
    assert "accuracy" not in numbers[0]
    assert "nll_gaussian" not in numbers[0]


@pytest.mark.parametrize("codes_per_dimension", [2, 10])
def test_the_baseline_is_the_gaussian_of_the_training_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes_per_dimension: int
) -> None:
    monkeypatch.setattr(flow_evaluation, "FULL_GAUSSIAN_SAMPLES", codes_per_dimension)
    codec = str(artifacts.save(tmp_path / "codec", PixelPatches(12, 12)))
    flow = perturb(presets.srcflow((1, 1), 432, 32, [1], num_classes=3, head_dim=32, normalization="none"), 0.01)

    class Plenty(SquaresData):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Squares(900, 0), batch_size=50)

    task = make(codec, flow=flow, evaluation=Evaluation(samples=0, classified=20), metrics_file=str(tmp_path / "m.json"))
    trainer(tmp_path, callbacks=[]).test(task, Plenty(), verbose=False)
    written = json.loads((tmp_path / "m.json").read_text())

    def codes(loader: Any, purpose: str) -> Tensor:
        return torch.cat([task.codes(b, purpose, 0).x for b in loader]).flatten(1).double()

    train, test = codes(Plenty().train_dataloader(), "baseline"), codes(Plenty().test_dataloader(), "test")
    # one token: both kinds have the same covariance, and the name says which was asked for
    gaussian = torch.distributions.MultivariateNormal(train.mean(0), torch.cov(train.T, correction=0))
    found, chosen = written["metrics"], task._evaluator._classified
    assert written["protocol"]["gaussian"] == {"covariance": "full" if codes_per_dimension == 2 else "token", "samples": 900}
    assert found["nll_gaussian"] == pytest.approx(float(-gaussian.log_prob(test).mean() / 432), rel=1e-3)
    assert int(chosen.sum()) == 20
    on_chosen = float(-gaussian.log_prob(test[chosen]).mean() / 432)
    assert found["nll_gaussian_classified"] == pytest.approx(on_chosen, rel=1e-3)
    joint = flow.class_log_probs(test[chosen].float().reshape(-1, 1, 432)).detach()
    marginal = torch.logsumexp(joint, 1) - torch.log(torch.tensor(3.0))
    assert found["nll_marginal"] == pytest.approx(float(-marginal.mean() / 432), rel=1e-4)


@pytest.mark.parametrize(
    ("evaluation", "words"),
    [
        ({"samples": 33}, "evaluation.samples = 33: there are 32 test images"),
        ({"samples": 24, "reference": "nowhere.npz"}, "no file nowhere.npz"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_sampling(tmp_path: Path, codec: str, evaluation: dict[str, Any], words: str) -> None:
    flow = presets.srcflow((2, 2), 108, 64, [1, 2], num_classes=3, head_dim=32, normalization="none")
    task = make(codec, flow=flow, evaluation=Evaluation(extractor=Means(), baseline_batches=0, **evaluation))
    task.sample_images = None  # type: ignore[method-assign,assignment]
    with pytest.raises(SrcflowError, match=words):
        trainer(tmp_path, callbacks=[]).test(task, SquaresData(), verbose=False)


def test_a_reference_file_replaces_the_real_side_of_gfid(tmp_path: Path, codec: str) -> None:
    save_reference(tmp_path / "ref.npz", torch.zeros(12), torch.eye(12))
    values = []
    for reference in (None, str(tmp_path / "ref.npz")):
        torch.manual_seed(0)
        flow = perturb(presets.srcflow((2, 2), 108, 64, [1, 2], num_classes=3, head_dim=32, normalization="none"), 0.1)
        evaluation = Evaluation(samples=24, extractor=Means(), reference=reference, baseline_batches=0, classified=0, labels="random")
        task = make(codec, flow=flow, evaluation=evaluation, metrics_file=str(tmp_path / "m.json"))
        trainer(tmp_path, callbacks=[]).test(task, SquaresData(), verbose=False)
        values.append(json.loads((tmp_path / "m.json").read_text())["metrics"])
    assert values[0]["gfid_24"] != values[1]["gfid_24"]
    assert values[0]["rfid_24"] == values[1]["rfid_24"]


def test_a_test_set_without_labels_has_a_likelihood_and_no_accuracy(tmp_path: Path, codec: str) -> None:
    class Unlabelled(SquaresData):
        def test_dataloader(self) -> DataLoader[Any]:
            data = Squares(32, 1000)
            data.labels = torch.full((32,), -1)
            return DataLoader(data, batch_size=16)

    flow = perturb(presets.srcflow((2, 2), 108, 64, [1, 2], num_classes=3, head_dim=32, normalization="none"), 0.1)
    task = make(codec, flow=flow, evaluation=Evaluation(samples=0, baseline_batches=0), metrics_file=str(tmp_path / "m.json"))
    trainer(tmp_path, callbacks=[]).test(task, Unlabelled(), verbose=False)
    found = json.loads((tmp_path / "m.json").read_text())["metrics"]
    assert "accuracy" not in found
    assert {"nll", "nll_marginal"} <= set(found)


def test_an_untrained_flow_is_not_evaluated(tmp_path: Path, codec: str) -> None:
    with pytest.raises(ConfigError, match="--ckpt_path FILE"):
        trainer(tmp_path, callbacks=[]).test(make(codec), SquaresData(), verbose=False)


def test_statistics_batches_limit_what_the_normalisation_sees(tmp_path: Path, codec: str) -> None:
    means = []
    for limit in (1, None):
        task = make(codec, statistics_batches=limit)
        trainer(tmp_path, steps=3).fit(task, SquaresData())
        means.append(task.flow.normalization.mean.clone())
    assert not torch.allclose(means[0], means[1], atol=1e-6)
    torch.testing.assert_close(means[0], means[1], atol=0.2, rtol=0)


def test_a_moved_codec_is_named(tmp_path: Path) -> None:
    base = artifacts.save(tmp_path / "codec", PixelPatches(12, 6))
    top = tmp_path / "identity"
    artifacts.save(top, Identity(108), manifest={"built_on": {"autoencoder": artifacts.reference(base, start=top)}})
    base.rename(tmp_path / "moved")
    with pytest.raises(SrcflowError, match="Name its new place"):
        trainer(tmp_path, steps=3).fit(make(str(top)), SquaresData())
    trainer(tmp_path, steps=3).fit(make(str(top), autoencoder=str(tmp_path / "moved")), SquaresData())


def test_validation_does_not_depend_on_the_batch_size(tmp_path: Path, codec: str) -> None:
    values = []
    for size in (16, 5):
        data = SquaresData()
        data.batch_size = size
        torch.manual_seed(0)
        task = make(
            codec, flow=perturb(presets.srcflow((2, 2), 108, 64, [1, 2], num_classes=3, head_dim=32, normalization="none")).double()
        )
        values.append(trainer(tmp_path, callbacks=[], precision="64-true").validate(task, data, verbose=False)[0]["val/nll"])
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_label_dropout_reaches_the_null_class(codec: str, tmp_path: Path) -> None:
    for probability in (0.0, 1.0):
        torch.manual_seed(0)
        flow = perturb(presets.srcflow((2, 2), 108, 64, [1, 1], num_classes=3, head_dim=32))
        before = dict(flow.named_parameters())["blocks.1.conditioner.weight"].detach().clone()
        task = FlowTask(flow, codec, label_dropout=probability, optimization=Optimization(learning_rate=1e-2))
        trainer(tmp_path, steps=3, callbacks=[]).fit(task, SquaresData())
        moved = (dict(flow.named_parameters())["blocks.1.conditioner.weight"] - before).abs().amax(1) > 1e-6
        assert moved.tolist() == ([True, True, True, False] if probability == 0 else [False, False, False, True])


def test_non_finite_steps_are_skipped_counted_and_fatal(codec: str, tmp_path: Path) -> None:
    flow = presets.srcflow((2, 2), 108, 64, [1, 1], num_classes=3, head_dim=32)
    task = FlowTask(flow, codec, optimization=Optimization(max_bad_steps=3))
    original = task.codes

    def poisoned(batch: Any, purpose: str, step: int | None = None) -> Codes:
        codes = original(batch, purpose, step)
        return codes._replace(x=codes.x * float("nan")) if purpose == "train" else codes

    task.codes = poisoned  # type: ignore[method-assign]
    said = pytest.warns(
        NonFiniteWarning, match=r"step [01] was skipped .*The codes of samples .* and 12 more are not finite, before the flow"
    )
    with said, pytest.raises(NonFiniteError, match="3 steps in a row"):
        trainer(tmp_path, steps=10).fit(task, SquaresData())
    assert task.guard.skipped == 3
    assert all(torch.isfinite(p).all() for p in flow.parameters())


def test_predict(codec: str, tmp_path: Path) -> None:
    flow = presets.srcflow((2, 2), 108, 64, [1, 2], num_classes=3, head_dim=32, normalization="none")
    out = trainer(tmp_path, callbacks=[]).predict(make(codec, flow=flow), SquaresData())
    assert out is not None
    first: Any = out[0]
    assert first["nll"].shape == (16,)
    torch.testing.assert_close(first["log_probs"].exp().sum(1), torch.ones(16))
    assert torch.equal(first["indices"], torch.arange(16))


def test_an_artifact_saved_moved_and_loaded_gives_bit_equal_samples(tmp_path: Path, codec: str) -> None:
    task = make(codec, artifact=str(tmp_path / "flow"))
    trainer(tmp_path, steps=6).fit(task, SquaresData())
    labels = Condition(labels=torch.tensor([0, 1, 2, -1]))
    first = Pipeline.from_pretrained(tmp_path / "flow")
    images = first.sample(labels, seed=3)
    first.save_pretrained(tmp_path / "bundle")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "bundle").rename(tmp_path / "elsewhere" / "moved")
    again = Pipeline.from_pretrained(tmp_path / "elsewhere" / "moved")
    assert torch.equal(again.sample(labels, seed=3), images)
    assert not torch.equal(again.sample(labels, seed=4), images)
    raw = Pipeline.from_pretrained(tmp_path / "flow", weights="raw")
    assert not torch.equal(raw.sample(labels, seed=3), images)  # the average is not the last step


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"flow": presets.srcflow((2, 2), 107, 32, [1], num_classes=3, head_dim=32)}, r"flow.channels = 107.*code_dim = 108"),
        ({"flow": presets.srcflow((2, 3), 108, 32, [1], num_classes=3, head_dim=32)}, r"flow.grid.*4 tokens"),
        ({"flow": presets.srcflow((2, 2), 108, 32, [1], num_classes=4, head_dim=32)}, r"num_classes = 4.*data.num_classes = 3"),
    ],
)
def test_sizes_that_disagree_are_named(tmp_path: Path, codec: str, kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        trainer(tmp_path).fit(make(codec, **kwargs), SquaresData())


def test_noise_is_the_codecs_own_for_pixels_and_asked_for_elsewhere(tmp_path: Path, codec: str) -> None:
    task = make(codec)
    trainer(tmp_path, steps=3).fit(task, SquaresData())
    assert type(task.noise).__name__ == "Dequantisation"
    constant = make(codec, noise=Constant(0.1))
    trainer(tmp_path, steps=3).fit(constant, SquaresData())
    assert isinstance(constant.noise, Constant)


def test_judging_codes_by_their_own_encoder_is_refused() -> None:
    from srcflow.autoencoders.representation import RepresentationAutoencoder
    from srcflow.autoencoders.vit_decoder import ViTDecoder
    from srcflow.encoders.efficientnet_lite import EfficientNetLite
    from srcflow.metrics.features.encoder import EncoderFeatures
    from srcflow.tasks.reconstruction import check_judge

    encoder = EfficientNetLite("lite0", image_size=64)
    autoencoder = RepresentationAutoencoder(encoder, ViTDecoder(encoder.dim, 32, 1, 2, 64, patch=2, grid=4))
    with pytest.raises(ConfigError, match="made the features"):
        check_judge(EncoderFeatures(EfficientNetLite("lite0", image_size=96)), autoencoder)
    check_judge(EncoderFeatures(EfficientNetLite("lite1", image_size=64)), autoencoder)


def denoising(codec: str, **kwargs: Any) -> FlowTask:
    flow = presets.starflow((2, 2), 108, 64, [1, 2], head_dim=32, denoiser_layers=2)
    return make(codec, flow=kwargs.pop("flow", flow), label_dropout=0.0, **{"noise": Constant(0.3), **kwargs})


def test_the_denoiser_learns_the_score(tmp_path: Path, codec: str) -> None:
    task = denoising(codec)
    task.flow.blocks.requires_grad_(False)  # the identity, whose score -x is soon learned
    run = trainer(tmp_path, steps=60, callbacks=[])
    run.fit(task, SquaresData())
    assert float(run.callback_metrics["train/denoiser"]) > 0
    x = task.codes(next(iter(SquaresData().val_dataloader())), "validation", 0).x
    with torch.no_grad():
        predicted = task.flow.denoiser(x)
    torch.testing.assert_close((x - task.flow.denoise(x, 0.3)) / 0.3, 0.3 * x)
    assert float((0.3 * x - predicted).square().mean() / (0.3 * x).square().mean()) < 0.5  # on held-out images


def test_training_the_denoiser_leaves_the_flow_alone(tmp_path: Path, codec: str) -> None:
    task = denoising(codec)
    plain = denoising(codec, flow=presets.starflow((2, 2), 108, 64, [1, 2], head_dim=32))
    plain.flow.load_state_dict({k: v for k, v in task.flow.state_dict().items() if not k.startswith("self_denoiser")})
    for each in (task, plain):
        each.optimization = Optimization(learning_rate=2e-3, gradient_clip=None)  # the norm is taken over both parts
        trainer(tmp_path, steps=3, callbacks=[]).fit(each, SquaresData())
    for name, value in plain.flow.state_dict().items():
        torch.testing.assert_close(task.flow.state_dict()[name], value, atol=1e-6, rtol=1e-5)
    assert float(task.flow.self_denoiser.head.weight.detach().abs().max()) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [({"noise": None}, "Dequantisation"), ({"compressor": True}, "compressor")],
)
def test_a_denoiser_is_trained_only_where_its_noise_is_known(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    place = str(artifacts.save(tmp_path / "codec", PixelPatches(12, 6)))
    if "compressor" in change:
        built_on = {"autoencoder": artifacts.reference(place, start=tmp_path / "compressor")}
        place = str(artifacts.save(tmp_path / "compressor", LinearCompressor(108, 108), manifest={"built_on": built_on}))
    task = denoising(place, **({"noise": None} if "noise" in change else {}))
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, steps=1, callbacks=[]).fit(task, SquaresData())


def test_a_sharded_flow_trains_no_denoiser(codec: str) -> None:
    task = denoising(codec)
    task.set_outside("compressor", Identity(108))
    task._trainer = SimpleNamespace(strategy=object.__new__(ModelParallelStrategy))  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="ModelParallelStrategy"):
        task._check_denoiser()


def test_a_run_starts_from_another_flows_weights(tmp_path: Path, codec: str) -> None:
    first = perturb(presets.starflow((2, 2), 108, 64, [1, 2], head_dim=32), 0.1)
    artifacts.save(tmp_path / "first", first)
    numbers = []
    for start in (str(tmp_path / "first"), None):
        torch.manual_seed(1)
        task = make(codec, flow=presets.starflow((2, 2), 108, 64, [1, 2], head_dim=32), noise=Constant(0.3), initial=start)
        run = trainer(tmp_path, callbacks=[])
        numbers.append(run.validate(task, SquaresData(), verbose=False)[0]["val/nll"])
        if start is not None:
            assert all(torch.equal(v, first.state_dict()[k]) for k, v in task.flow.state_dict().items())
    assert numbers[0] != numbers[1]


def test_another_configurations_weights_are_refused(tmp_path: Path, codec: str) -> None:
    artifacts.save(tmp_path / "first", presets.starflow((2, 2), 108, 32, [1, 2], head_dim=32))
    task = make(codec, flow=presets.starflow((2, 2), 108, 64, [1, 2], head_dim=32), noise=Constant(0.3), initial=str(tmp_path / "first"))
    with pytest.raises(ArtifactError, match=r"(?s)model.initial.*blocks.0.proj_in.weight: shape"):
        trainer(tmp_path, callbacks=[]).validate(task, SquaresData(), verbose=False)
    with pytest.raises(ArtifactError, match="holds no flow"):
        trainer(tmp_path, callbacks=[]).validate(make(codec, initial=codec), SquaresData(), verbose=False)


def test_predictions_are_in_nats_per_dimension_under_noise_of_their_own(codec: str, tmp_path: Path) -> None:
    flow = perturb(presets.srcflow((2, 2), 108, 64, [1, 2], num_classes=3, head_dim=32, normalization="none"), 0.05)
    task = make(codec, flow=flow, noise=Constant(0.2), seed=7)
    first, second = (trainer(tmp_path, callbacks=[]).predict(task, SquaresData()) for _ in range(2))
    assert first is not None
    assert second is not None
    data = Squares(32, 1000)
    pixels = PixelPatches(12, 6)
    raw, _ = pixels.features(data.images.float() / 255)
    noise = Constant(0.2).sample((4, 108), seed=7, purpose="predict", step=0, indices=range(32))
    with torch.no_grad():
        out = flow(pixels.normalize(raw, noise), Condition(labels=data.labels))
    expected = (0.5 * out.z.square() + 0.5 * math.log(2 * math.pi)).sum((1, 2)) - out.logdet
    found, again = (torch.cat([b["nll"] for b in batches]) for batches in (first, second))  # type: ignore[call-overload]
    torch.testing.assert_close(found, expected / 432, atol=1e-5, rtol=1e-5)
    assert torch.equal(found, again)


def test_float64_on_a_codec_in_float32(tmp_path: Path, autoencoder: Any) -> None:
    """trainer.precision 64-true: the flow is in float64, the frozen codec and the judge stay as they are."""
    stage0 = autoencoder()
    stage0.set_statistics(torch.zeros(16, 16), torch.ones(16, 16))
    base = artifacts.save(tmp_path / "stage0", stage0)
    top = tmp_path / "stage1"
    torch.manual_seed(1)
    artifacts.save(top, LinearCompressor(16, 4), manifest={"built_on": {"autoencoder": artifacts.reference(base, start=top)}})

    class Larger(SquaresData):  # 16 x 16 pixels
        def data(self, n: int, seed: int) -> DataLoader[Any]:
            data = Squares(n, seed)
            data.images = nn.functional.pad(data.images, (2, 2, 2, 2))
            return DataLoader(data, batch_size=self.batch_size)

        def train_dataloader(self) -> DataLoader[Any]:
            return self.data(96, 0)

        def val_dataloader(self) -> DataLoader[Any]:
            return self.data(32, 1000)

        test_dataloader = predict_dataloader = val_dataloader

    numbers: list[Any] = []
    for precision in ("32-true", "64-true"):
        torch.manual_seed(0)
        flow = presets.srcflow((4, 4), 4, 32, [1, 2], num_classes=3, head_dim=16)
        evaluation = Evaluation(samples=24, extractor=Means(), baseline_batches=2, classified=8, round_trip=4)
        file = tmp_path / "m.json"
        task = FlowTask(flow, str(top), Constant(0.4), evaluation=evaluation, metrics_file=str(file), guidance=Linear(0.5))
        run = trainer(tmp_path, steps=4, precision=precision)
        run.fit(task, Larger())
        (validated,) = run.validate(task, Larger(), verbose=False)
        run.test(task, Larger(), verbose=False)
        predicted = run.predict(task, Larger())
        assert task.sample_images(3, seed=0).dtype == torch.float32
        assert predicted is not None
        assert predicted[0]["nll"].dtype == flow.prior_std.dtype == (torch.float64 if precision == "64-true" else torch.float32)  # type: ignore[call-overload,index]
        numbers.append({**json.loads(file.read_text())["metrics"], "val/nll": validated["val/nll"]})
    for each in numbers:
        assert each.pop("images_per_second") > 0
    assert numbers[1].pop("round_trip_error") < 1e-12 < numbers[0].pop("round_trip_error")
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-5)


def test_the_baseline_does_not_read_the_whole_training_set_by_default(tmp_path: Path, codec: str) -> None:
    class Many(SquaresData):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Squares(404, 0), batch_size=4)

    flow = presets.srcflow((2, 2), 108, 32, [1], num_classes=3, head_dim=32, normalization="none")
    task = make(codec, flow=flow, evaluation=Evaluation(samples=0, classified=0, round_trip=0), metrics_file=str(tmp_path / "m.json"))
    trainer(tmp_path, callbacks=[]).test(task, Many(), verbose=False)
    assert json.loads((tmp_path / "m.json").read_text())["protocol"]["gaussian"] == {"covariance": "token", "samples": 400}


def test_initial_weights_that_are_not_finite_are_refused(tmp_path: Path, codec: str) -> None:
    first = presets.starflow((2, 2), 108, 64, [1, 2], head_dim=32)
    with torch.no_grad():
        next(first.parameters()).view(-1)[0] = math.inf
    task = make(codec, flow=presets.starflow((2, 2), 108, 64, [1, 2], head_dim=32), noise=Constant(0.3))
    task.initial = str(artifacts.save(tmp_path / "first", first))
    with pytest.raises(ArtifactError, match=r"model.initial = '.*first': the weights are not finite"):
        trainer(tmp_path, callbacks=[]).fit(task, SquaresData())


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_a_task_has_a_temperature(codec: str, bad: float) -> None:
    with pytest.raises(SrcflowError, match=r"temperature = .*positive and finite"):
        make(codec, temperature=bad)
