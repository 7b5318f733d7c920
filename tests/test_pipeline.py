"""The chain behind one object: what it computes, what it refuses, and that it survives being saved and moved."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from srcflow import Condition, Pipeline, artifacts, registry
from srcflow.autoencoders.base import Autoencoder
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.autoencoders.representation import RepresentationAutoencoder
from srcflow.autoencoders.vit_decoder import ViTDecoder
from srcflow.codec import Codec
from srcflow.compressors.identity import Identity
from srcflow.compressors.linear import Linear
from srcflow.compressors.semantic import Semantic
from srcflow.encoders.timm_vit import TimmViT
from srcflow.errors import ArtifactError, ConfigError, ManifestMismatchError, ShapeError
from srcflow.flows import presets
from srcflow.flows.block import TransformerBlock
from srcflow.flows.denoiser import Denoiser
from srcflow.flows.flow import Flow
from srcflow.flows.positions import Learned
from srcflow.guidance.base import Negative
from srcflow.guidance.gaussian import Gaussian
from srcflow.metrics.non_finite import NonFiniteImagesWarning
from srcflow.noise import Constant
from srcflow.pipeline import load_negative
from srcflow.testing import perturb
from srcflow.testing.expect import finite
from srcflow.types import Features

SMALL = {"embed_dim": 32, "depth": 1, "num_heads": 2}


def representation() -> RepresentationAutoencoder:
    encoder = TimmViT("vit_tiny_patch16_224", image_size=32, weights=None, timm_args=SMALL)
    autoencoder = RepresentationAutoencoder(encoder, ViTDecoder(32, 32, 1, 2, 64, patch=8, grid=2))
    g = torch.Generator().manual_seed(1)
    autoencoder.set_statistics(torch.randn(4, 32, generator=g) * 0.1, torch.rand(4, 32, generator=g) + 0.5)
    return autoencoder


def pixels() -> PixelPatches:
    return PixelPatches(4, 2, scale="linear")


def pixel_flow(denoiser: Denoiser | None = None) -> Flow:
    """A class-conditional flow on `pixels()`, with trained-like weights."""
    flow = presets.srcflow(2, 12, 32, [1, 1], num_classes=3, head_dim=16, normalization="none")
    return perturb(Flow([b for b in flow.blocks if isinstance(b, TransformerBlock)], denoiser=denoiser), 0.1)


def make(num_classes: int = 3) -> Pipeline:
    torch.manual_seed(0)
    autoencoder = representation()
    compressor = perturb(Semantic(32, 4, width=32, layers=1, head_dim=16, grid=2))
    flow = perturb(presets.srcflow(2, 4, 32, [1, 2], num_classes=num_classes, head_dim=16))
    return Pipeline(autoencoder, compressor, flow)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return make()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (4, 3, 16, 16), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


def test_encode_follows_the_chain(pipeline: Pipeline, images: torch.Tensor) -> None:
    codes = pipeline.encode(images)
    raw, grid = pipeline.autoencoder.features(images.float() / 255)
    expected = pipeline.compressor.compress(pipeline.autoencoder.normalize(raw), grid)
    assert torch.equal(codes, expected)
    assert codes.shape == (4, *pipeline.code_shape)
    assert torch.equal(pipeline.encode(images.float() / 255), codes)
    assert pipeline.decode(codes).shape == (4, 3, 16, 16)


def test_noise_is_keyed_by_sample_not_by_batch(pipeline: Pipeline, images: torch.Tensor) -> None:
    whole = pipeline.encode(images, noise=Constant(0.4), seed=1, indices=[5, 6, 7, 8])
    part = pipeline.encode(images[2:], noise=Constant(0.4), seed=1, indices=[7, 8])
    torch.testing.assert_close(whole[2:], part)
    assert not torch.allclose(whole, pipeline.encode(images, noise=Constant(0.4), seed=2, indices=[5, 6, 7, 8]))


def test_samples_may_be_made_in_parts(pipeline: Pipeline) -> None:
    labels = Condition(labels=torch.tensor([0, 1, 2, -1]))
    whole = pipeline.sample(labels, seed=3, guidance=Gaussian(1.0))
    part = pipeline.sample(labels.index(slice(2, 4)), seed=3, indices=[2, 3], guidance=Gaussian(1.0))
    finite(whole, pipeline, "guided samples")
    torch.testing.assert_close(whole[2:], part, atol=1e-5, rtol=0)
    assert float(whole.min()) >= 0
    assert float(whole.max()) <= 1
    assert pipeline.sample(2, seed=0).shape == (2, 3, 16, 16)
    assert not torch.allclose(whole, pipeline.sample(labels, seed=3))


def test_a_negative_flow_is_named_by_its_directory(pipeline: Pipeline, tmp_path: Path) -> None:
    other = perturb(presets.srcflow(2, 4, 32, [1, 2], num_classes=3, head_dim=16), seed=5)
    place = str(artifacts.save(tmp_path / "other", other))
    labels = Condition(labels=torch.tensor([0, 1]))
    by_name, by_hand, plain = (
        pipeline.sample_codes(labels, seed=0, guidance=Gaussian(1.0, blocks="all", negative=negative))
        for negative in (Negative(flow=place), Negative(flow=other.eval()), Negative())
    )
    finite(torch.stack([by_name, by_hand, plain]), pipeline, "guided codes")
    assert torch.equal(by_name, by_hand)
    assert not torch.allclose(by_name, plain)
    ends = torch.rand(2, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    frames = [
        pipeline.interpolate(*ends, 2, condition=labels, guidance=Gaussian(1.0, blocks="all", negative=Negative(flow=flow)))
        for flow in (place, other.eval())
    ]
    assert torch.equal(*frames)


def test_a_rule_that_names_a_negative_flow_stays_as_it_was(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = str(artifacts.save(tmp_path / "weak", perturb(copy.deepcopy(pipeline.flow))))  # type: ignore[type-var]
    rule, reads = Gaussian(1.0, blocks="all", negative=Negative(attention_temperature=1.5, flow=place)), []
    load = artifacts.load
    monkeypatch.setattr(artifacts, "load", lambda *given: reads.append(given) or load(*given))
    loaded = [load_negative(rule, "cpu") for _ in range(3)]
    assert rule.negative.flow == place
    assert len(reads) == 1, "read again for every batch"
    for other in loaded:
        assert other is not None
        assert other is not rule
        assert isinstance(other.negative.flow, Flow)
        assert (other.negative.attention_temperature, other.blocks) == (1.5, "all")
        assert registry.spec_of(other) == registry.spec_of(rule)
    assert load_negative(None, "cpu") is None
    plain = Gaussian(1.0)
    assert load_negative(plain, "cpu") is plain


def test_a_negative_flow_on_another_device_is_not_moved(pipeline: Pipeline) -> None:
    weak = copy.deepcopy(pipeline.flow)
    assert weak is not None
    rule = Gaussian(1.0, negative=Negative(flow=weak))
    assert load_negative(rule, "cpu") is rule
    moved = load_negative(rule, "meta")
    assert moved is not None
    assert moved.negative.flow is not weak
    assert {p.device.type for p in weak.parameters()} == {"cpu"}
    assert {p.device.type for p in moved.negative.flow.parameters()} == {"meta"}  # type: ignore[union-attr]


def test_log_prob_is_the_mean_over_draws(pipeline: Pipeline, images: torch.Tensor) -> None:
    labels = Condition(labels=torch.tensor([0, 1, 2, 0]))
    assert pipeline.flow is not None
    expected = torch.stack(
        [pipeline.flow.log_prob(pipeline.encode(images, noise=Constant(0.4), seed=1, draw_number=k), labels) for k in range(3)]
    ).mean(0)
    torch.testing.assert_close(pipeline.log_prob(images, labels, noise=Constant(0.4), draws=3, seed=1), expected)


def test_classify_is_bayes_rule(pipeline: Pipeline, images: torch.Tensor) -> None:
    found = pipeline.classify(images, noise=Constant(0.4), draws=2, seed=1)
    each = [pipeline.log_prob(images, Condition(labels=torch.full((4,), y)), noise=Constant(0.4), draws=2, seed=1) for y in range(3)]
    torch.testing.assert_close(found, torch.stack(each, 1).log_softmax(1), atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="class-conditional"):
        make(num_classes=0).classify(images, noise=None)


def test_interpolation_ends_at_its_ends(pipeline: Pipeline, images: torch.Tensor) -> None:
    frames = pipeline.interpolate(images[:2], images[2:], 5)
    assert frames.shape == (2, 5, 3, 16, 16)
    torch.testing.assert_close(frames[:, 0], pipeline.reconstruct(images[:2]), atol=1e-3, rtol=0)
    torch.testing.assert_close(frames[:, -1], pipeline.reconstruct(images[2:]), atol=1e-3, rtol=0)
    assert not torch.allclose(frames[:, 2], frames[:, 0], atol=1e-3)


def test_pixels_have_a_density_that_integrates_over_grey_levels() -> None:
    autoencoder = PixelPatches(2, 2)
    pipeline = Pipeline(autoencoder, flow=presets.tarflow(1, 12, 32, 1, 1, head_dim=16))
    image = torch.randint(0, 256, (1, 3, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes = pipeline.encode(image, noise=autoencoder.default_noise(), seed=0)
    expected = (-0.5 * codes.square() - 0.5 * math.log(2 * math.pi)).sum()  # a fresh flow is the identity
    torch.testing.assert_close(pipeline.log_prob(image, noise=autoencoder.default_noise(), seed=0)[0], expected)
    assert torch.equal((pipeline.decode(codes) * 255).round().to(torch.uint8), image)


def test_denoising_shrinks_what_a_standard_normal_gives() -> None:
    pipeline = Pipeline(pixels(), flow=presets.tarflow(2, 12, 32, 1, 1, head_dim=16))  # a fresh flow is the identity
    noisy = pipeline.sample_codes(3, seed=0)
    torch.testing.assert_close(pipeline.sample_codes(3, seed=0, denoise=0.5), noisy * 0.75)
    images = pipeline.sample(3, seed=0, denoise=0.5)
    torch.testing.assert_close(images, pipeline.decode(noisy * 0.75))
    assert not torch.allclose(images, pipeline.sample(3, seed=0), atol=1e-3)
    assert torch.equal(pipeline.sample_codes(3, seed=0, denoise=0.0), noisy)


def test_samples_are_denoised_under_their_condition_and_without_guidance() -> None:
    flow = pixel_flow()
    pipeline, labels, guidance = Pipeline(pixels(), flow=flow), Condition(labels=torch.tensor([0, 2])), Gaussian(1.5)
    noisy = pipeline.sample_codes(labels, seed=0, guidance=guidance)
    found = pipeline.sample_codes(labels, seed=0, guidance=guidance, denoise=0.3)
    finite(torch.stack([noisy, found]), pipeline, "guided codes, with and without their noise")
    assert torch.equal(found, flow.denoise(noisy, 0.3, labels))
    assert torch.equal(found, pipeline.denoise_codes(noisy, labels, denoise=0.3))
    assert not torch.allclose(found, flow.denoise(noisy, 0.3), atol=1e-4)
    assert not found.requires_grad


def test_the_learned_denoiser_predicts_the_unit_noise() -> None:
    flow = pixel_flow(Denoiser(12, 32, Learned((2, 2), 32), layers=1, head_dim=16))
    pipeline, labels = Pipeline(pixels(), flow=flow), Condition(labels=torch.tensor([0, 2]))
    noisy = pipeline.sample_codes(labels, seed=0)
    with torch.no_grad():
        expected = noisy - 0.3 * flow.denoiser(noisy, labels)
    found = pipeline.sample_codes(labels, seed=0, denoise=0.3, denoiser="learned")
    finite(torch.stack([noisy, found]), pipeline, "codes, with and without their noise")
    assert torch.equal(found, expected)
    assert not torch.allclose(found, pipeline.sample_codes(labels, seed=0, denoise=0.3), atol=1e-4)


def test_raw_features_are_denoised_in_the_units_of_the_noise(images: torch.Tensor) -> None:
    autoencoder = representation()
    pipeline = Pipeline(autoencoder, Identity(32), presets.srcflow(2, 32, 32, [1], num_classes=0, head_dim=16, normalization="none"))
    codes = pipeline.encode(images, noise=Constant(0.4))
    variance = 0.4**2 / (autoencoder.var + 1e-5)  # of the noise in the codes, per position and channel; the flow is the identity
    torch.testing.assert_close(pipeline.denoise_codes(codes, denoise=0.4), codes - variance * codes)


@pytest.mark.parametrize(("autoencoder", "width"), [(representation, 32), (pixels, 12), (lambda: PixelPatches(4, 2), 12)])
def test_noise_scale_is_what_normalize_does_to_noise(autoencoder: Any, width: int) -> None:
    a: Autoencoder = autoencoder()
    raw, noise = torch.randn(2, 2, 4, width).unbind(0)
    torch.testing.assert_close(a.normalize(raw, noise) - a.normalize(raw), a.noise_scale() * noise, atol=1e-5, rtol=0)


def test_denoising_is_refused_where_it_does_not_hold(monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline) -> None:
    assert pipeline.flow is not None
    monkeypatch.setattr(pipeline.flow, "inverse", lambda *a, **k: pytest.fail("work was done before the refusal"))
    for draw in (pipeline.sample, pipeline.sample_codes):
        with pytest.raises(ConfigError, match=r"denoise = 0.4: the noise was added to the features before the compressor \(Semantic\)"):
            draw(2, seed=0, denoise=0.4)
    with pytest.raises(ConfigError, match=r"before the compressor \(Linear\).*trained under noise"):
        Pipeline(pixels(), Linear(12, 12), pixel_flow()).denoise_codes(torch.zeros(1, 4, 12), denoise=0.1)
    raw = Pipeline(pixels(), flow=pixel_flow())
    with pytest.raises(ConfigError, match=r"denoiser = 'learned': this flow has no learnable denoiser"):
        raw.sample(2, seed=0, denoise=0.1, denoiser="learned")
    with pytest.raises(ConfigError, match="does nothing without denoise"):
        raw.sample(2, seed=0, denoiser="learned")
    with pytest.raises(ConfigError, match="Known: score, learned"):
        raw.sample(2, seed=0, denoise=0.1, denoiser="both")  # type: ignore[arg-type]
    for bad in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="finite and not negative"):
            raw.sample(2, seed=0, denoise=bad)
    with pytest.raises(ConfigError, match="codec without a flow"):
        Pipeline(pixels()).denoise_codes(torch.zeros(1, 4, 12), denoise=0.1)


def test_a_flow_that_records_no_codec_is_given_one(tmp_path: Path) -> None:
    flow, codec = pixel_flow(), pixels()
    place, base = artifacts.save(tmp_path / "flow", flow), artifacts.save(tmp_path / "pixels", codec)
    with pytest.raises(ArtifactError, match=r"does not record what autoencoder.*\(autoencoder: DIRECTORY\)"):
        Pipeline.from_pretrained(place)
    expected = Pipeline(codec, flow=flow).sample(2, seed=0, denoise=0.1)
    finite(expected, flow, "denoised samples")
    assert torch.equal(Pipeline.from_pretrained(place, autoencoder=base).sample(2, seed=0, denoise=0.1), expected)
    compressor = perturb(Linear(12, 12))
    between = artifacts.save(tmp_path / "linear", compressor)
    with pytest.raises(ArtifactError, match="does not record what autoencoder"):
        Pipeline.from_pretrained(place, compressor=between)
    found = Pipeline.from_pretrained(place, autoencoder=base, compressor=between).sample(2, seed=0)
    assert torch.equal(found, Pipeline(codec, compressor, flow).sample(2, seed=0))
    with pytest.raises(ArtifactError, match="nowhere does not exist"):
        Pipeline.from_pretrained(place, autoencoder="nowhere")


def test_what_a_flow_records_is_not_overruled(tmp_path: Path) -> None:
    base, place = artifacts.save(tmp_path / "pixels", pixels()), tmp_path / "flow"
    artifacts.save(place, pixel_flow(), manifest={"built_on": {"autoencoder": artifacts.reference(base, start=place)}})
    assert isinstance(Pipeline.from_pretrained(place).compressor, Identity)
    with pytest.raises(ManifestMismatchError, match="another autoencoder"):
        Pipeline.from_pretrained(place, autoencoder=artifacts.save(tmp_path / "levels", PixelPatches(4, 2)))
    with pytest.raises(ArtifactError, match="does not say what compressor"):
        Pipeline.from_pretrained(place, compressor=artifacts.save(tmp_path / "linear", Linear(12, 12)))


def test_saved_moved_and_loaded_it_gives_bit_equal_samples(tmp_path: Path, pipeline: Pipeline) -> None:
    labels = Condition(labels=torch.tensor([0, 1, 2]))
    before = pipeline.sample(labels, seed=0, guidance=Gaussian(1.0))
    finite(before, pipeline, "guided samples")
    path = pipeline.save_pretrained(tmp_path / "bundle")
    path.rename(tmp_path / "moved")
    again = Pipeline.from_pretrained(tmp_path / "moved")
    assert torch.equal(again.sample(labels, seed=0, guidance=Gaussian(1.0)), before)
    again.save_pretrained(tmp_path / "moved")  # onto itself
    assert torch.equal(Pipeline.from_pretrained(tmp_path / "moved").sample(labels, seed=0, guidance=Gaussian(1.0)), before)


def test_a_tampered_bundle_is_refused(tmp_path: Path, pipeline: Pipeline) -> None:
    path = pipeline.save_pretrained(tmp_path / "bundle")
    artifacts.save(path / "flow", perturb(presets.srcflow(2, 4, 32, [1, 2], num_classes=3, head_dim=16), seed=9))
    with pytest.raises(ManifestMismatchError, match="changed or damaged"):
        Pipeline.from_pretrained(path)


def test_parts_that_do_not_fit_are_named(pipeline: Pipeline, images: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"flow.channels = 5.*code_dim = 4"):
        Pipeline(pipeline.autoencoder, pipeline.compressor, presets.srcflow(2, 5, 32, [1], num_classes=0, head_dim=16))
    with pytest.raises(ConfigError, match=r"compressor.dim = 8.*dim = 32"):
        Pipeline(pipeline.autoencoder, Semantic(8, 4, width=32, layers=1, head_dim=16, grid=2))
    with pytest.raises(ConfigError, match="codec without a flow"):
        Pipeline(pipeline.autoencoder, pipeline.compressor).sample(2, seed=0)
    with pytest.raises(ShapeError, match="3 indices for 4"):
        pipeline.encode(images, noise=Constant(0.4), indices=[1, 2, 3])
    with pytest.raises(ShapeError, match=r"\(B, 3, H, W\)"):
        pipeline.encode(images[:, :1])


def test_an_unfitted_autoencoder_is_refused() -> None:
    encoder = TimmViT("vit_tiny_patch16_224", image_size=32, weights=None, timm_args=SMALL)
    with pytest.raises(ConfigError, match="statistics were never fitted"):
        Pipeline(RepresentationAutoencoder(encoder, ViTDecoder(32, 32, 1, 2, 64, patch=8, grid=2)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_ran_away_is_not_turned_into_pixels(pipeline: Pipeline, bad: float) -> None:
    codes = torch.randn(3, *pipeline.code_shape, generator=torch.Generator().manual_seed(0))
    expected = pipeline.decode(codes)
    codes[1, 0, 0] = bad
    with pytest.warns(NonFiniteImagesWarning, match="1 of 3 images are not finite"):
        found = pipeline.decode(codes)
    assert found[1].isnan().all()
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
    levels = Pipeline(PixelPatches(4, 2))  # whose decoder would turn an infinite code into a white pixel
    with pytest.warns(NonFiniteImagesWarning, match="1 of 1"):
        assert levels.decode(torch.full((1, 4, 12), bad)).isnan().all()


def test_samples_under_runaway_guidance_are_nan(pipeline: Pipeline) -> None:
    with pytest.warns(NonFiniteImagesWarning, match=r"of 3 images are not finite.*Lower the guidance"):
        images = pipeline.sample(Condition(labels=torch.arange(3)), seed=0, guidance=Gaussian(1e30))
    assert not bool(images.isinf().any())
    assert bool(images.isnan().any())


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("key", ["temperature", "attention_temperature"])
def test_samples_have_a_temperature(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, key: str, bad: float) -> None:
    monkeypatch.setattr(pipeline.flow, "inverse", lambda *a, **k: pytest.fail("work was done before the refusal"))
    with pytest.raises(ConfigError, match=rf"{key} = .*positive and finite"):
        pipeline.sample(2, seed=0, **{key: bad})  # type: ignore[arg-type]


@pytest.mark.parametrize(("height", "width"), [(8, 2), (6, 6), (4, 10)])  # as many tokens in another order; more tokens; wide
def test_images_of_another_size_work_where_every_part_can_take_them(height: int, width: int) -> None:
    chain, x = Pipeline(pixels(), flow=pixel_flow()), (torch.rand(2, 3, height, width) * 255).round() / 255
    codes = chain.codes(x)
    assert codes.grid == (height // 2, width // 2)
    assert codes.x.shape == (2, height * width // 4, 12)
    torch.testing.assert_close(chain.reconstruct(x), x, atol=1e-6, rtol=0)
    by_hand = chain.flow.log_prob(chain.encode(x), grid=codes.grid)  # type: ignore[union-attr]  # there is a flow
    torch.testing.assert_close(chain.log_prob(x, noise=None), by_hand)
    assert chain.classify(x, noise=None).shape == (2, 3)
    frames = chain.interpolate(x, x.flip(0), 3)
    assert frames.shape == (2, 3, 3, height, width)
    torch.testing.assert_close(frames[:, 0], x, atol=1 / 255, rtol=0)


def test_images_of_another_size_are_refused_by_the_part_that_cannot_take_them(pipeline: Pipeline) -> None:
    with pytest.raises(ShapeError, match="images of 5 x 5 pixels cannot be encoded: PixelPatches is built for 4 x 4"):
        Pipeline(pixels(), flow=pixel_flow()).encode(torch.rand(1, 3, 5, 5))
    learned = Pipeline(pixels(), flow=presets.tarflow(2, 12, 32, 1, 1, head_dim=16))
    with pytest.raises(ShapeError, match="learned positions were built for the grid"):
        learned.log_prob(torch.rand(1, 3, 6, 6), noise=None)
    features = Features(torch.zeros(1, 6, pipeline.autoencoder.dim), None, (2, 3), torch.tensor([0]))
    with pytest.raises(
        ShapeError, match=r"2 x 3 tokens cannot be normalised: the statistics of RepresentationAutoencoder are per position"
    ):
        Codec(pipeline.autoencoder, pipeline.compressor).codes(features)
    assert pipeline.encode(torch.rand(1, 3, 24, 20)).shape == (1, *pipeline.code_shape)  # this encoder resizes


def test_the_noise_that_a_flow_was_trained_under_is_recorded(tmp_path: Path) -> None:
    known = Pipeline(pixels(), flow=pixel_flow(), noise=Constant(0.3))
    x, labels = torch.rand(2, 3, 4, 4), Condition(labels=torch.tensor([0, 2]))
    again = Pipeline.from_pretrained(known.save_pretrained(tmp_path / "bundle"))
    for chain in (known, again):
        assert torch.equal(chain.log_prob(x, labels, draws=2), known.log_prob(x, labels, noise=Constant(0.3), draws=2))
        assert torch.equal(chain.classify(x), known.classify(x, noise=Constant(0.3)))
        assert not torch.equal(chain.log_prob(x, labels), known.log_prob(x, labels, noise=None))
    unknown = Pipeline.from_pretrained(Pipeline(pixels(), flow=pixel_flow()).save_pretrained(tmp_path / "older"))
    with pytest.raises(ConfigError, match=r"noise = 'recorded'.*does not record what noise.*Give noise="):
        unknown.log_prob(x, labels)


def test_a_recorded_law_of_unknown_code_is_refused(tmp_path: Path) -> None:
    path = Pipeline(pixels(), flow=pixel_flow(), noise=Constant(0.3)).save_pretrained(tmp_path / "bundle")
    manifest = json.loads((path / "manifest.json").read_text())
    for noise, message in (({"class_path": "evil.Law"}, "not a law"), ({"class_path": "Constant", "init_args": {"sigma": -1}}, "sigma")):
        (path / "manifest.json").write_text(json.dumps({**manifest, "noise": noise}))
        with pytest.raises(ArtifactError, match=message):
            Pipeline.from_pretrained(path)


def test_the_encoder_runs_once_however_many_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    chain, calls = Pipeline(pixels(), flow=pixel_flow(), noise=Constant(0.3)), []
    encode = chain.autoencoder.features
    monkeypatch.setattr(chain.autoencoder, "features", lambda images: (calls.append(len(images)), encode(images))[1])
    chain.log_prob(torch.rand(2, 3, 4, 4), draws=3)
    chain.classify(torch.rand(2, 3, 4, 4), draws=4)
    assert calls == [2, 2]


class Blurred(PixelPatches):
    """Pixels with a posterior of deviation 0.1."""

    def posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[int, int]]:
        mean, grid = self.features(images)
        return mean, torch.full_like(mean, 0.1), grid


def test_draws_from_a_posterior_are_keyed_by_epoch_and_sample() -> None:
    codec, images = Codec(Blurred(4, 2, scale="linear"), seed=3), torch.rand(4, 3, 4, 4)
    batch = {"images": images, "indices": torch.tensor([7, 1, 5, 9])}
    features = codec.features(batch)
    whole = codec.codes(features, 0, "train", epoch=2).x
    part = codec.codes({"images": images[1:3], "indices": torch.tensor([1, 5])}, 4, "other", epoch=2).x
    assert torch.equal(whole[1:3], part)  # the step and the purpose key the noise, of which there is none
    assert not torch.equal(whole, codec.codes(features, 0, "train", epoch=3).x)
    assert not torch.equal(whole[0] - features.mean[0], whole[1] - features.mean[1])
    drawn = torch.stack([codec.codes(features, 0, "train", epoch=e).x - features.mean for e in range(200)])
    assert abs(float(drawn.std()) - 0.1) < 0.002
    assert abs(float(drawn.mean())) < 0.002
    stored = codec.codes({"features": features.mean, "deviation": features.deviation, "grid": (2, 2), "indices": batch["indices"]}, epoch=2)
    assert torch.equal(stored.x, whole)


def test_a_pipeline_leaves_its_parts_in_the_mode_they_were_in() -> None:
    flow = pixel_flow().train()
    flow.blocks[0].eval()
    chain = Pipeline(pixels().train(), flow=flow)
    modes = [m.training for part in (chain.autoencoder, flow) for m in part.modules()]
    assert True in modes
    assert False in modes
    seen = []
    flow.blocks[1].register_forward_pre_hook(lambda module, given: seen.append(module.training))
    chain.sample(1, seed=0)
    chain.log_prob(torch.rand(1, 3, 4, 4), noise=None)
    chain.reconstruct(torch.rand(1, 3, 4, 4))
    assert [m.training for part in (chain.autoencoder, flow) for m in part.modules()] == modes
    assert not any(seen)


@pytest.mark.parametrize("part", ["autoencoder", "compressor", "flow"])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path: Path, part: str) -> None:
    broken = make()
    path = broken.save_pretrained(tmp_path / "bundle")
    name, weight = list(getattr(broken, part).named_parameters())[-1]
    with torch.no_grad():
        weight.view(-1)[0] = math.nan
    with pytest.raises(ArtifactError, match=rf"{part}: the weights are not finite: NaN or infinity in {name} \(1 of .* earlier checkpoint"):
        broken.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    artifacts.save(path / part, getattr(broken, part))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["parts"][part] = artifacts.content_hash(path / part)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=rf"{part}: the weights are not finite: NaN or infinity in {name}"):
        Pipeline.from_pretrained(path)


def test_a_flow_in_float64_works_on_a_codec_in_float32(images: torch.Tensor) -> None:
    single, double = make(), make()
    assert double.flow is not None
    double.flow.double()
    labels = Condition(labels=torch.tensor([0, 1, 2, 0]))
    for call in (
        lambda p: p.sample(labels, seed=0),
        lambda p: p.log_prob(images, labels, noise=Constant(0.4)),
        lambda p: p.reconstruct(images),
        lambda p: p.interpolate(images[:2], images[2:], 3),
    ):
        torch.testing.assert_close(call(double).double(), call(single).double(), atol=2e-3, rtol=1e-4)
    assert double.log_prob(images, labels, noise=None).dtype == torch.float64
    assert double.sample(labels, seed=0).dtype == torch.float32
