"""`srcflow sample`, with a pipeline that draws what can be foretold."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import srcflow.pipeline
from srcflow import artifacts, presets, randomness
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.cli import main
from srcflow.cli.sample import to_uint8
from srcflow.compressors.linear import Linear
from srcflow.testing import perturb
from srcflow.testing.expect import finite
from srcflow.types import Condition

CLASSES = 3


class FakePipeline:
    """Images of 4 x 6 pixels: red is the label / 10, green noise of the index, blue the temperature / 4."""

    calls: list[dict[str, Any]]

    def __init__(self, num_classes: int) -> None:
        self.flow = SimpleNamespace(num_classes=num_classes)
        self.calls = []

    def to(self, device: torch.device) -> FakePipeline:
        return self

    def sample(self, condition: int | Condition, *, seed: int, indices: Tensor, temperature: float, **more: Any) -> Tensor:
        self.calls.append({"condition": condition, "indices": indices, **more})
        n = condition if isinstance(condition, int) else len(condition)
        assert len(indices) == n
        images = torch.zeros(n, 3, 4, 6)
        if isinstance(condition, Condition) and condition.labels is not None:
            images[:, 0] = condition.labels[:, None, None] / 10
        images[:, 1] = randomness.uniform((4, 6), seed=seed, purpose="fake", step=0, indices=indices)
        images[:, 2] = temperature / 4
        return images


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> FakePipeline:
    fake = FakePipeline(CLASSES)
    fake.loaded = []

    def load(path: str, **how: str | None) -> FakePipeline:
        fake.loaded.append({"path": path, **how})
        return fake

    monkeypatch.setattr(srcflow.pipeline.Pipeline, "from_pretrained", load)
    return fake


def sample(out: Path, *more: str) -> None:
    main(["sample", "--pipeline=somewhere", f"--out={out}", "--device=cpu", *more])


def test_moved_parts_and_raw_weights_are_asked_for(tmp_path: Path, pipeline: FakePipeline) -> None:
    sample(tmp_path / "s.npz", "--n=1", "--autoencoder=a", "--compressor=c", "--weights=raw")
    assert pipeline.loaded == [{"path": "somewhere", "weights": "raw", "autoencoder": "a", "compressor": "c"}]


def test_npz_is_what_evaluators_read(tmp_path: Path, pipeline: FakePipeline) -> None:
    sample(tmp_path / "new" / "s.npz", "--n=7", "--seed=5", "--temperature=2")
    with np.load(tmp_path / "new" / "s.npz") as data:
        images, labels = data["arr_0"], data["arr_1"]
    assert images.shape == (7, 4, 6, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    green = randomness.uniform((4, 6), seed=5, purpose="fake", step=0, indices=range(7))
    np.testing.assert_array_equal(images[..., 1], (green * 255).round().to(torch.uint8).numpy())
    np.testing.assert_array_equal(images[:, 0, 0, 0], np.round(labels / 10 * 255).astype(np.uint8))
    assert (images[..., 2] == 128).all()  # 127.5 rounds to even


def test_results_do_not_depend_on_the_batch_size(tmp_path: Path, pipeline: FakePipeline) -> None:
    for size in (1, 4, 64):
        sample(tmp_path / f"{size}.npz", "--n=9", "--labels=random", f"--batch_size={size}")
    one, four, all_at_once = (np.load(tmp_path / f"{size}.npz") for size in (1, 4, 64))
    for key in ("arr_0", "arr_1"):
        np.testing.assert_array_equal(one[key], four[key])
        np.testing.assert_array_equal(one[key], all_at_once[key])
    assert len({tuple(image.ravel()) for image in one["arr_0"]}) == 9


def test_random_labels_change_with_the_seed(tmp_path: Path, pipeline: FakePipeline) -> None:
    for seed in (1, 2):
        sample(tmp_path / f"{seed}.npz", "--n=60", "--labels=random", f"--seed={seed}")
    first, second = (np.load(tmp_path / f"{seed}.npz")["arr_1"] for seed in (1, 2))
    assert set(first) == set(range(CLASSES))
    assert (first != second).any()


def test_grid_has_classes_in_rows(tmp_path: Path, pipeline: FakePipeline) -> None:
    sample(tmp_path / "s.png", "--classes=2,0", "--per_class=5")
    grid = np.asarray(Image.open(tmp_path / "s.png"))
    assert grid.shape == (2 * (4 + 2) + 2, 5 * (6 + 2) + 2, 3)
    assert set(grid[2:6, 2:8, 0].ravel()) == {51}
    assert set(grid[8:12, -8:-2, 0].ravel()) == {0}
    assert (grid[:2] == 255).all()


def test_all_classes_and_a_square(tmp_path: Path, pipeline: FakePipeline) -> None:
    sample(tmp_path / "all.npz", "--classes=all", "--per_class=2")
    assert np.load(tmp_path / "all.npz")["arr_1"].tolist() == [0, 0, 1, 1, 2, 2]
    sample(tmp_path / "s.png", "--n=5")
    with Image.open(tmp_path / "s.png") as grid:
        assert grid.size == (3 * 8 + 2, 2 * 6 + 2)


def test_folder_names_images_by_index(tmp_path: Path, pipeline: FakePipeline) -> None:
    sample(tmp_path / "images", "--n=3", "--batch_size=2")
    sample(tmp_path / "s.npz", "--n=3")
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["000000.png", "000001.png", "000002.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "images" / "000002.png")), np.load(tmp_path / "s.npz")["arr_0"][2])


def test_a_flow_without_classes(tmp_path: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.flow.num_classes = 0
    sample(tmp_path / "s.npz", "--n=3", "--batch_size=2")
    assert [call["condition"] for call in pipeline.calls] == [2, 1]
    assert list(np.load(tmp_path / "s.npz")) == ["arr_0"]
    with pytest.raises(SystemExit):
        sample(tmp_path / "s.npz", "--classes=all")
    assert "the flow has no classes. Use --n." in capsys.readouterr().err


def test_guidance_and_solver_reach_the_pipeline(tmp_path: Path, pipeline: FakePipeline) -> None:
    how = ["--guidance=Linear", "--guidance.strength=Annealed", "--guidance.strength.strength=1.5", "--solver=Sequential"]
    sample(tmp_path / "s.npz", "--n=1", *how, "--attention_temperature=0.9")
    (call,) = pipeline.calls
    assert type(call["guidance"]).__name__ == "Linear"
    assert float(call["guidance"].strength(torch.ones(1))) == 1.5
    assert type(call["solver"]).__name__ == "Sequential"
    assert call["attention_temperature"] == 0.9


def test_bfloat16_is_autocast(tmp_path: Path, pipeline: FakePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    draw = pipeline.sample
    monkeypatch.setattr(pipeline, "sample", lambda *a, **k: (seen.append(torch.is_autocast_enabled("cpu")), draw(*a, **k))[1])
    sample(tmp_path / "a.npz", "--n=1", "--precision=bfloat16")
    sample(tmp_path / "b.npz", "--n=1")
    assert seen == [True, False]


@pytest.mark.parametrize(
    ("out", "more", "words"),
    [
        ("s.png", [], "give either a number of images or classes"),
        ("s.png", ["--n=1", "--classes=all"], "give either a number of images or classes"),
        ("s.png", ["--n=0", "--batch_size=0"], "2 problems"),
        ("s.png", ["--n=1", "--temperature=0"], "a temperature is positive"),
        ("s.png", ["--n=1", "--format=npz"], "a npz is a .npz file"),
        ("s.png", ["--n=1", "--denoise=-0.1"], "a standard deviation is finite and not negative"),
        ("s.png", ["--n=1", "--denoiser=learned"], "does nothing without denoise"),
        ("s.png", ["--n=1", "--denoise=0.1", "--denoiser=both"], "both"),
        ("s.png", ["--classes=1,3"], "[3] are not among the flow's classes 0 to 2"),
        ("s.png", ["--classes=1;2"], "is no list of class ids"),
        ("full", ["--n=1"], "the folder is not empty"),
        ("full/old.png", ["--n=1", "--format=folder"], "is a file, and a folder is wanted"),
        ("s.jpg", ["--n=1"], "no .jpg files are written. Write"),
        ("s.WEBP", ["--n=1"], "no .webp files are written"),
        ("s.tar", ["--n=1"], "no .tar files are written"),
        ("full/old.png/s.npz", ["--n=1"], "old.png is not a directory"),
        ("full/old.png/folder", ["--n=1"], "old.png is not a directory"),
        ("full.png", ["--n=1"], "is a directory, and a file is to be written there"),
        ("s.png", ["--n=1", "--guidance=Linaer"], "Did you mean Linear?"),
        ("s.png", ["--n=1", "--format=gif"], "gif"),
    ],
)
def test_refused(out: str, more: list[str], words: str, tmp_path: Path, pipeline: FakePipeline, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old.png").touch()
    (tmp_path / "full.png").mkdir()
    with pytest.raises(SystemExit) as status:
        sample(tmp_path / out, *more)
    assert status.value.code == 2
    assert words in capsys.readouterr().err
    assert not pipeline.calls


def test_a_folder_may_have_a_dot_in_its_name(tmp_path: Path, pipeline: FakePipeline) -> None:
    sample(tmp_path / "guidance-1.5", "--n=1")
    assert [p.name for p in (tmp_path / "guidance-1.5").iterdir()] == ["000000.png"]


@pytest.mark.parametrize(
    ("out", "at", "words"),
    [
        ("images", 2, "The first 2 of 4 images are there."),
        ("images", 0, "None of the 4 images is there."),
        ("s.png", 0, "None of the 4 images is there."),
        ("s.npz", 0, "None of the 4 images is there."),
    ],
)
def test_a_full_disk_says_what_was_written(
    out: str,
    at: int,
    words: str,
    tmp_path: Path,
    pipeline: FakePipeline,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    left = at

    def full(*args: Any, **kwargs: Any) -> None:
        nonlocal left
        if left == 0:
            file = args[1] if isinstance(args[0], Image.Image) else args[0].name
            Path(file).write_bytes(b"a part")
            raise OSError(errno.ENOSPC, "No space left on device")
        left -= 1
        return save(*args, **kwargs)

    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", full)
    monkeypatch.setattr(np, "savez", full)
    if "." in out:
        (tmp_path / out).write_bytes(b"an older one")
    with pytest.raises(SystemExit) as status:
        sample(tmp_path / out, "--n=4", "--batch_size=3")
    assert status.value.code == 2
    assert f"cannot be written: No space left on device. {words} Make room or name another place;" in capsys.readouterr().err
    if "." in out:
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {out: b"an older one"}
    else:
        assert len(list((tmp_path / out).iterdir())) == at


def test_denoised_pixels_of_a_flow_that_records_no_codec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels, flow = PixelPatches(4, 2, scale="linear"), perturb(presets.tarflow(2, 12, 32, 2, 1, head_dim=16), 0.1)
    place, codec = artifacts.save(tmp_path / "flow", flow), artifacts.save(tmp_path / "pixels", pixels)
    pipeline = srcflow.pipeline.Pipeline(pixels, flow=flow)
    how = [f"--pipeline={place}", f"--autoencoder={codec}", "--n=3", "--device=cpu"]
    for name, more, denoise in (("noisy", [], None), ("clean", ["--denoise=0.5"], 0.5)):
        main(["sample", *how, f"--out={tmp_path / name}.npz", *more])
        images = pipeline.sample(3, seed=0, denoise=denoise)
        finite(images, flow, f"{name} samples")
        assert "ran away" not in capsys.readouterr().err
        expected = to_uint8(images)
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npz")["arr_0"], expected)
    assert (np.load(tmp_path / "noisy.npz")["arr_0"] != np.load(tmp_path / "clean.npz")["arr_0"]).any()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--denoise=0.4"], "the noise was added to the features before the compressor (Linear)"),
        (["--denoise=0.4", "--denoiser=learned"], "before the compressor (Linear)"),
    ],
)
def test_codes_are_not_denoised(more: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flow = presets.tarflow(2, 8, 32, 2, 1, head_dim=16)
    place = srcflow.pipeline.Pipeline(PixelPatches(4, 2), Linear(12, 8, start="random"), flow).save_pretrained(tmp_path / "bundle")
    with pytest.raises(SystemExit) as status:
        main(["sample", f"--pipeline={place}", f"--out={tmp_path / 'images'}", "--n=1", "--device=cpu", *more])
    assert status.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "images").exists()


def test_rounding_to_levels() -> None:
    values = torch.tensor([-0.5, 0.0, 0.0019, 0.002, 0.5, 0.998, 0.999, 1.0, 1.5])
    expected = [0, 0, 0, 1, 128, 254, 255, 255, 255]
    assert to_uint8(values.reshape(1, 1, 1, -1)).ravel().tolist() == expected


def test_images_that_are_not_finite_are_counted_and_black(
    pipeline: FakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy = pipeline.sample

    def sick(*args: Any, indices: Tensor, **kwargs: Any) -> Tensor:
        images = healthy(*args, indices=indices, **kwargs)
        images[indices == 3, 1, 0, 0] = float("nan")
        return images

    monkeypatch.setattr(pipeline, "sample", sick)
    main(["sample", "--pipeline", "x", "--n", "5", "--batch_size", "2", "--out", str(tmp_path / "s.npz"), "--device", "cpu"])
    assert "1 of 5 images (3) ran away" in capsys.readouterr().err
    images = np.load(tmp_path / "s.npz")["arr_0"]
    assert not images[3].any()
    assert images[[0, 1, 2, 4]].reshape(4, -1).any(1).all()
