"""What `srcflow test` compares: as many images as it says, finite ones only, and real ones from where it was told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.errors import ArtifactError, ConfigError, DataError
from srcflow.flows import presets
from srcflow.flows.flow import Flow
from srcflow.guidance.gaussian import Gaussian
from srcflow.metrics.features.base import Extractor
from srcflow.metrics.frechet import frechet_distance, save_reference
from srcflow.metrics.non_finite import NonFiniteImagesWarning
from srcflow.noise import Constant
from srcflow.pipeline import Pipeline
from srcflow.tasks.flow import FlowTask
from srcflow.tasks.flow_evaluation import Evaluation
from srcflow.testing import perturb
from srcflow.types import Condition

TOTAL = 20  # test images


def greys(n: int, seed: int) -> Tensor:
    return torch.randint(0, 256, (n, 3, 12, 12), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


class Greys(L.LightningDataModule):
    num_classes = 3

    def __init__(self, batch_size: int = 8, leave_out: int = 0) -> None:
        super().__init__()
        self.batch_size, self.leave_out = batch_size, leave_out

    def rows(self, n: int, seed: int) -> list[Any]:
        images = greys(n, seed)
        images[3] = 255
        return [
            {"images": x, "labels": torch.tensor(i % 3), "indices": torch.tensor(i), "valid": torch.tensor(i >= self.leave_out)}
            for i, x in enumerate(images)
        ]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows(48, 2), batch_size=self.batch_size)  # type: ignore[arg-type]

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.rows(TOTAL, 1), batch_size=self.batch_size)  # type: ignore[arg-type]


class Means(Extractor):
    """Mean colours of the quadrants. It must not be shown what is not finite."""

    name, dim = "means", 12

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        assert bool(images.isfinite().all())
        self.calls += 1
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1).float()


def flow() -> Flow:
    torch.manual_seed(0)
    return perturb(presets.srcflow(2, 108, 32, [1, 1], num_classes=3, head_dim=16, normalization="none"), 0.05)


def codec() -> PixelPatches:
    return PixelPatches(12, 6, scale="linear")


def measured(root: Path, data: L.LightningDataModule | None = None, **more: Any) -> dict[str, Any]:
    """metrics.json of a test; arguments of the task, and those of its evaluation."""
    place = artifacts.save(root / "codec", codec())
    settings = {"samples": TOTAL, "classified": 0, "baseline_batches": 0, "round_trip": 0, "extractor": Means()}
    evaluation = Evaluation(**{**settings, **{k: more.pop(k) for k in list(more) if k in Evaluation.__dataclass_fields__}})
    task = FlowTask(
        more.pop("flow", None) or flow(),
        str(place),
        Constant(0.3),
        evaluation=evaluation,
        metrics_file=str(root / "m.json"),
        seed=3,
        **more,
    )
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=root)
    trainer.test(task, data or Greys(), verbose=False)
    written: dict[str, Any] = json.loads((root / "m.json").read_text())
    return written


def distance(one: Tensor, other: Tensor) -> float:
    sides = [Means()(x).double() for x in (one, other)]
    return float(frechet_distance(*(m for x in sides for m in (x.mean(0), x.T.cov()))))


def drawn(n: int, **more: Any) -> Tensor:
    return Pipeline(codec(), flow=flow()).sample(Condition(labels=torch.arange(n) % 3), seed=3, **more)


def test_both_sides_of_every_distance_are_counted(tmp_path: Path) -> None:
    written = measured(tmp_path, samples=18)
    both = {"real": 18, "fake": 18}
    assert written["protocol"]["counts"] == dict.fromkeys(("gfid", "rfid", "rfid_noisy", "fd_decoded", "floor"), both)
    inversion = written["protocol"]["inversion"]
    assert inversion["samples"] == both["fake"]
    assert inversion["fallbacks"] == 0
    assert all(r == 0 for r in inversion["residual"])
    assert all(i > 0 for i in inversion["iterations"])
    found = written["metrics"]
    assert {k: v for k, v in found.items() if k.endswith("_non_finite")} == {
        "nll_non_finite": 0, "samples_non_finite": 0, "reconstructions_non_finite": 0, "reconstructions_noisy_non_finite": 0,
    }  # fmt: skip


def test_a_test_set_that_is_not_given_whole_is_found_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gfid compares 20 images with 18, not 20 on either side"):
        measured(tmp_path, Greys(leave_out=2))


def test_runaway_samples_are_counted_and_in_no_distance(tmp_path: Path) -> None:
    with pytest.warns(NonFiniteImagesWarning):
        images = drawn(TOTAL, guidance=Gaussian(1e30))
    finite = images.isfinite().flatten(1).all(1)
    k = int(finite.sum())
    assert 0 <= k < TOTAL
    with pytest.warns(NonFiniteImagesWarning, match=rf"{TOTAL - k} of {TOTAL} samples are not finite.*Lower the guidance"):
        found = measured(tmp_path, guidance=Gaussian(1e30), floor=False)["metrics"]
    assert found["samples_non_finite"] == TOTAL - k
    assert {name for name in found if name.startswith(("gfid", "fd_"))} == (
        {f"gfid_{k}_finite_of_{TOTAL}", f"fd_decoded_{k}_finite_of_{TOTAL}"} if k > 1 else set()
    )
    assert "rfid_20" in found


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_left_of_the_samples_is_measured_under_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    """Batches of 8 for 20 samples: the last one is padded, with a sample that ran away, which must not be counted again."""
    original = Pipeline.sample

    def sample(self: Pipeline, condition: Any, *, indices: Tensor, **more: Any) -> Tensor:
        images = original(self, condition, indices=indices, **more)
        images[(indices % 5 == 4) | (indices == 7), 0, 2, 3] = bad
        return images

    monkeypatch.setattr(Pipeline, "sample", sample)
    with pytest.warns(NonFiniteImagesWarning, match="5 of 20 samples"):
        written = measured(tmp_path, floor=False)
    found = written["metrics"]
    assert found["samples_non_finite"] == 5
    assert not {"gfid_20", "fd_decoded_20"} & set(found)
    kept = [i for i in range(TOTAL) if i % 5 != 4 and i != 7]
    monkeypatch.undo()
    real = torch.stack([r["images"] for r in Greys().rows(TOTAL, 1)]).float() / 255
    assert found["gfid_15_finite_of_20"] == pytest.approx(distance(drawn(TOTAL)[kept], real), rel=1e-4)
    assert written["protocol"]["counts"]["gfid"] == {"real": 20, "fake": 15}
    assert written["protocol"]["counts"]["fd_decoded"] == {"real": 20, "fake": 15}


def test_too_few_finite_samples_have_no_distance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Pipeline.sample
    monkeypatch.setattr(Pipeline, "sample", lambda self, *a, **k: original(self, *a, **k) * math.nan)
    with pytest.warns(NonFiniteImagesWarning, match="20 of 20 samples"):
        found = measured(tmp_path, floor=False)["metrics"]
    assert not [name for name in found if name.startswith(("gfid", "fd_"))]


def test_reconstructions_that_are_not_finite_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PixelPatches.decode

    def decode(self: PixelPatches, x: Tensor, grid: Any = None) -> Tensor:  # of the white image, an infinite pixel
        images = original(self, x, grid)
        images[x.mean((1, 2)) > 0.9, 1, 0, 0] = math.inf
        return images

    monkeypatch.setattr(PixelPatches, "decode", decode)
    with pytest.warns(NonFiniteImagesWarning) as caught:
        written = measured(tmp_path, floor=False)
    found, counts = written["metrics"], written["protocol"]["counts"]
    said = " ".join(str(w.message) for w in caught)
    assert "1 of 20 reconstructions" in said
    assert "1 of 20 noisy reconstructions" in said
    assert (found["reconstructions_non_finite"], found["reconstructions_noisy_non_finite"], found["samples_non_finite"]) == (1, 1, 0)
    assert {"gfid_20", "rfid_19_finite_of_20", "rfid_noisy_19_finite_of_20", "fd_decoded_19_finite_of_20"} <= set(found)
    assert {"reconstruction_l1_19_finite_of_20", "reconstruction_psnr_noisy_19_finite_of_20"} <= set(found)
    assert not {"rfid_20", "fd_decoded_20", "reconstruction_l1", "reconstruction_ssim_noisy"} & set(found)
    assert counts["fd_decoded"] == {"real": 19, "fake": 20}
    assert found["reconstruction_l1_19_finite_of_20"] < 1e-6


def test_a_reference_frees_the_number_of_samples_from_the_test_set(tmp_path: Path) -> None:
    mu, sigma = torch.full((12,), 0.5, dtype=torch.float64), 0.01 * torch.eye(12, dtype=torch.float64)
    save_reference(tmp_path / "ref.npz", mu, sigma)
    with pytest.raises(ConfigError, match=r"evaluation.samples = 30: there are 20 test images.*evaluation.reference"):
        measured(tmp_path, samples=30)
    written = measured(tmp_path, samples=30, reference=str(tmp_path / "ref.npz"))
    found = written["metrics"]
    assert {"gfid_30", "rfid_20", "rfid_noisy_20", "fd_decoded_20", "floor_20"} <= set(found)
    features = Means()(drawn(30)).double()
    assert found["gfid_30"] == pytest.approx(float(frechet_distance(features.mean(0), features.T.cov(), mu, sigma)), rel=1e-4)
    counts = written["protocol"]["counts"]
    assert counts["gfid"] == {"real": None, "fake": 30}
    assert counts["fd_decoded"] == counts["rfid"] == counts["floor"] == {"real": 20, "fake": 20}
    first = measured(tmp_path, samples=20, reference=str(tmp_path / "ref.npz"))["metrics"]
    assert first["fd_decoded_20"] == pytest.approx(found["fd_decoded_20"], rel=1e-5)  # of the first 20 of the 30


def test_a_reference_that_cannot_be_compared_with_is_refused_before_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlowTask, "on_test_start", lambda self: pytest.fail("the test has begun"))
    good = torch.zeros(12), torch.eye(12)
    for name, (mu, sigma), words in (
        ("wide", (torch.zeros(13), torch.eye(13)), "width 13, the extractor gives 12"),
        ("nan", (good[0] * math.nan, good[1]), "mu are not finite"),
        ("negative", (good[0], -good[1]), "not a covariance"),
    ):
        save_reference(tmp_path / f"{name}.npz", mu, sigma)
        with pytest.raises(DataError, match=rf"evaluation.reference = '.*{name}.npz': .*{words}"):
            measured(tmp_path, reference=str(tmp_path / f"{name}.npz"))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "wide.npz").read_bytes()[:300])
    with pytest.raises(DataError, match=r"evaluation.reference = '.*cut.npz': .*not an npz file"):
        measured(tmp_path, reference=str(tmp_path / "cut.npz"))


def test_weights_that_are_not_finite_are_not_tested(tmp_path: Path) -> None:
    broken, judge = flow(), Means()
    with torch.no_grad():
        broken.blocks[1].proj_in.weight[0, 0] = math.nan  # type: ignore[union-attr,index]
    with pytest.raises(ArtifactError, match=r"Flow: the weights are not finite: NaN or infinity in flow.blocks.1.proj_in.weight \(1 of"):
        measured(tmp_path, flow=broken, extractor=judge)
    assert judge.calls == 0
    assert not (tmp_path / "m.json").exists()


def test_densities_that_are_not_finite_win_no_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Flow.class_log_probs

    def class_log_probs(self: Flow, x: Tensor, **more: Any) -> Tensor:
        densities = original(self, x, **more)
        densities[0, 1] = math.nan  # of one image per batch
        return densities

    before = measured(tmp_path, extractor=None, classified=TOTAL)["metrics"]
    assert "accuracy" in before
    monkeypatch.setattr(Flow, "class_log_probs", class_log_probs)
    with pytest.warns(UserWarning, match=r"0 densities of 20 test images .*densities per class of 3, are not finite"):
        found = measured(tmp_path, extractor=None, classified=TOTAL)["metrics"]
    assert "accuracy" not in found
    assert 0 <= found["accuracy_17_finite_of_20"] <= 1
    assert found["nll_marginal"] is None
    assert found["nll"] == before["nll"]


def test_a_distance_of_one_sample_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"evaluation.samples = 1: one image has no covariance"):
        Evaluation(samples=1)


def test_a_reference_needs_the_network_that_made_it() -> None:
    with pytest.raises(ConfigError, match=r"evaluation.reference = 'ref.npz': has no effect without evaluation.extractor"):
        Evaluation(reference="ref.npz")
