"""The Frechet distance: against scipy, closed forms, and its independence of batches, precision and order."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from srcflow.errors import ConfigError, DataError, ShapeError
from srcflow.metrics.frechet import FrechetDistance, frechet_distance, load_reference, save_reference, sized_name


def sample(n: int, d: int = 6, seed: int = 0, offset: float = 0.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64) @ torch.randn(d, d, generator=g, dtype=torch.float64) + offset


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(0), x.T.cov()


def by_scipy(x: Tensor, y: Tensor) -> float:
    (m1, s1), (m2, s2) = ([t.numpy() for t in moments(z)] for z in (x, y))
    root = scipy.linalg.sqrtm(s1 @ s2)
    return float(((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real))


def test_agrees_with_a_matrix_square_root() -> None:
    x, y = sample(400, 20, seed=1), sample(300, 20, seed=2, offset=0.3)
    assert frechet_distance(*moments(x), *moments(y)).item() == pytest.approx(by_scipy(x, y), rel=1e-10)


def test_closed_forms() -> None:
    zero, eye = torch.zeros(3), torch.eye(3)
    assert frechet_distance(zero, eye, torch.tensor([1.0, 2.0, 2.0]), eye).item() == pytest.approx(9)
    # commuting covariances: the sum of (sqrt(a) - sqrt(b))^2
    assert frechet_distance(
        zero, torch.diag(torch.tensor([1.0, 4.0, 9.0])), zero, torch.diag(torch.tensor([4.0, 4.0, 0.0]))
    ).item() == pytest.approx(10)
    rotation = torch.linalg.qr(sample(3, 3)).Q
    a, b = (rotation @ torch.diag(torch.tensor(v, dtype=torch.float64)) @ rotation.T for v in ([1.0, 4.0, 9.0], [4.0, 1.0, 16.0]))
    assert frechet_distance(zero, a, zero, b).item() == pytest.approx(3)


@pytest.mark.parametrize("n", [30, 200])
def test_equal_sets_have_distance_zero_even_if_singular(n: int) -> None:
    x = sample(n, 50, offset=100)
    assert 0 <= frechet_distance(*moments(x), *moments(x)).item() < 1e-11 * moments(x)[1].trace().item()


def test_symmetric_and_invariant_to_rotation() -> None:
    x, y = sample(40, 50, seed=1), sample(45, 50, seed=2)  # both singular
    rotation = torch.linalg.qr(sample(50, 50, seed=3)).Q
    value = frechet_distance(*moments(x), *moments(y))
    torch.testing.assert_close(frechet_distance(*moments(y), *moments(x)), value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(frechet_distance(*moments(x @ rotation), *moments(y @ rotation)), value, rtol=1e-9, atol=1e-9)


def test_streaming_equals_all_at_once_for_any_batches() -> None:
    x, y = sample(500, seed=1, offset=50), sample(700, seed=2, offset=50.2)
    expected = frechet_distance(*moments(x), *moments(y))
    for batch in (1, 37, 700):
        metric = FrechetDistance(6, small_sample=True)
        for part in y.flip(0).split(batch):
            metric.update(part, real=True)
        for part in x.split(batch):
            metric.update(part)
        assert metric.samples == 500
        torch.testing.assert_close(metric.compute(), expected, rtol=1e-9, atol=1e-9)


def test_masked_rows_do_not_count() -> None:
    x, y = sample(300, seed=1), sample(300, seed=2)
    metric = FrechetDistance(6, small_sample=True)
    metric.update(y, real=True)
    metric.update(torch.cat([x, torch.full((7, 6), torch.nan)]), valid=torch.arange(307) < 300)
    torch.testing.assert_close(metric.compute(), frechet_distance(*moments(x), *moments(y)), rtol=1e-9, atol=1e-9)
    with pytest.raises(ShapeError, match=r"\[3, 4\]"):
        metric.update(x[:3], valid=torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize("cast", ["half", "bfloat16", "to", "type", "set_dtype"])
def test_states_stay_float64(cast: str) -> None:
    """Lightning's bf16-true moves the metrics of a module along; torchmetrics would round the sums."""
    x, y = sample(300, seed=1), sample(300, seed=2)
    metric = FrechetDistance(6, small_sample=True)
    metric.update(x[:150])
    owner = nn.ModuleList([metric])
    if cast == "to":
        owner.to(torch.bfloat16)
    elif cast == "type":
        owner.type(torch.bfloat16)
    elif cast == "set_dtype":
        metric.set_dtype(torch.bfloat16)
    else:
        getattr(owner, cast)()
    metric.update(x[150:])
    metric.update(y, real=True)
    assert metric.fake_outer.dtype == torch.float64
    torch.testing.assert_close(metric.compute(), frechet_distance(*moments(x), *moments(y)), rtol=1e-9, atol=1e-9)
    metric.reset()
    assert metric.fake_outer.dtype == torch.float64
    assert not owner.state_dict()


def test_states_follow_the_device() -> None:
    metric = FrechetDistance(6).to("meta")
    assert metric.fake_outer.device.type == "meta"
    assert metric._defaults["fake_outer"].device.type == "meta"


def test_features_in_low_precision_are_summed_in_float64() -> None:
    x = sample(300, seed=1, offset=3).bfloat16()
    metric = FrechetDistance(6, small_sample=True)
    metric.update(x)
    mu, sigma = metric.moments(real=False)
    torch.testing.assert_close(mu, x.double().mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma, x.double().T.cov(), rtol=1e-9, atol=1e-12)


def test_reference_file(tmp_path: Path) -> None:
    x, y = sample(300, seed=1), sample(300, seed=2)
    save_reference(tmp_path / "reference.npz", *moments(y))
    mu, _ = load_reference(tmp_path / "reference.npz")
    assert mu.dtype == torch.float64
    metric = FrechetDistance(6, reference=str(tmp_path / "reference.npz"), small_sample=True)
    metric.update(x)
    with pytest.raises(ConfigError, match=r"setup\(\)"):
        metric.compute()
    metric.setup()
    torch.testing.assert_close(metric.compute(), frechet_distance(*moments(x), *moments(y)), rtol=1e-9, atol=1e-9)
    with pytest.raises(DataError, match="cannot be added"):
        metric.update(y, real=True)
    with pytest.raises(DataError, match=r"frechet.reference = .*width 6, the extractor gives 5"):
        FrechetDistance(5, reference=str(tmp_path / "reference.npz")).setup()


def test_bad_reference_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*nowhere\.npz"):
        load_reference(tmp_path / "nowhere.npz")
    np.savez(tmp_path / "other.npz", arr_0=np.zeros(3))
    with pytest.raises(DataError, match="arrays mu and sigma"):
        load_reference(tmp_path / "other.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match="not an npz file"):
        load_reference(tmp_path / "text.npz")
    np.savez(tmp_path / "shapes.npz", mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(DataError, match=r"\(3,\).*\(2, 2\)"):
        load_reference(tmp_path / "shapes.npz")


def damaged(path: Path) -> dict[str, Path]:
    """Files of which numpy, zipfile and zlib complain in their own ways."""
    mu, sigma = np.random.default_rng(0).random(40), np.eye(40)
    np.savez_compressed(path / "whole.npz", mu=mu, sigma=sigma + np.random.default_rng(1).random((40, 40)))
    whole = (path / "whole.npz").read_bytes()
    contents = {"empty": b"", "cut": whole[: len(whole) // 2], "zeros": whole[:3000] + bytes(200) + whole[3200:], "pickle": b"\x80\x04N."}
    np.savez(path / "objects.npz", mu=np.array([None]), sigma=sigma)
    np.savez(path / "complex.npz", mu=mu, sigma=sigma + 0j)
    np.savez(path / "text.npz", mu=np.array(["a"]), sigma=sigma)
    np.save(path / "array.npy", mu)
    np.save(path / "dict.npy", np.array({"mu": mu, "sigma": sigma}), allow_pickle=True)
    head = (path / "array.npy").read_bytes()
    absurd = head.replace(b"(40,), }" + b" " * 12, b"(40000000000000,), }")
    assert absurd != head
    for name, content in contents.items():
        (path / f"{name}.npz").write_bytes(content)
    with zipfile.ZipFile(path / "members.npz", "w") as archive:
        archive.writestr("mu.npy", b"no array")
        archive.writestr("sigma.npy", head[:70])
    with zipfile.ZipFile(path / "absurd.npz", "w") as archive:
        archive.writestr("mu.npy", absurd)
        archive.writestr("sigma.npy", absurd)
    (path / "folder.npz").mkdir()
    return {p.stem: p for p in path.iterdir() if p.stem != "whole"}


def test_every_damaged_reference_is_one_error_with_key_file_and_cure(tmp_path: Path) -> None:
    files = damaged(tmp_path)
    assert len(files) == 12
    for file in [*files.values(), tmp_path / ("x" * 400)]:
        with pytest.raises(DataError) as caught:
            load_reference(file, key="evaluation.reference")
        said = str(caught.value)
        assert said.startswith(f"evaluation.reference = '{file}': "), said
        assert "null for the test images" in said


def test_moments_that_nothing_can_have_are_refused(tmp_path: Path) -> None:
    mu, sigma = torch.zeros(4), torch.diag(torch.tensor([4.0, 2, 1, 0]))
    bad_mu, skew, negative, infinite = mu.clone(), sigma.clone(), sigma.clone(), sigma.clone()
    bad_mu[1], skew[0, 1], negative[3, 3], infinite[2, 2] = torch.nan, 1e-3, -1e-3, torch.inf
    for wrong, words in (
        ((bad_mu, sigma), "1 of the 4 numbers of mu are not finite"),
        ((mu, infinite), "1 of the 16 numbers of sigma are not finite"),
        ((mu, skew), r"not symmetric: it differs from its transpose by up to 0\.001, its largest entry is 4"),
        ((mu, negative), r"not a covariance: it has the eigenvalue -0\.001 \(the largest is 4\)"),
        ((mu[:0], sigma[:0, :0]), r"\(D,\) and \(D, D\) are wanted"),
    ):
        save_reference(tmp_path / "r.npz", *wrong)
        with pytest.raises(DataError, match=words):
            load_reference(tmp_path / "r.npz")


def test_what_rounding_does_to_a_covariance_is_taken(tmp_path: Path) -> None:
    x = sample(20, seed=3)[:, [0, 1, 2, 0, 1, 2]] * torch.tensor([100.0, 1, 1, 100, 1, 1])  # singular
    mu, sigma = moments(x)
    for kept in (sigma, sigma.float(), sigma + 1e-6 * torch.triu(sigma, 1)):
        save_reference(tmp_path / "r.npz", mu, kept)
        load_reference(tmp_path / "r.npz", 6)


def test_small_samples_are_refused_unless_asked_for() -> None:
    x = sample(2000)
    metric = FrechetDistance(6)
    metric.update(x)
    metric.update(x, real=True)
    with pytest.raises(DataError, match=r"2000 fake samples; at least 2048.*small_sample: true"):
        metric.compute()
    metric.update(x)
    metric.update(x, real=True)
    assert metric.compute() < 1e-8
    tiny = FrechetDistance(6, small_sample=True)
    tiny.update(x[:1])
    with pytest.raises(DataError, match="1 fake samples; at least 2"):
        tiny.compute()


def test_fewer_samples_than_dimensions_are_warned_about() -> None:
    x = torch.randn(2048, 2048)
    metric = FrechetDistance(2048)
    metric.update(x)
    with pytest.warns(UserWarning, match="singular"):
        metric.moments(real=False)


def test_reset_can_keep_the_real_side() -> None:
    metric = FrechetDistance(6, small_sample=True, keep_real=True)
    metric.update(sample(100), real=True)
    metric.update(sample(50))
    metric.reset()
    assert (int(metric.real_count), int(metric.fake_count)) == (100, 0)
    metric.update(sample(100))
    assert metric.compute() < 1e-8


def test_features_that_are_not_finite_are_reported() -> None:
    metric = FrechetDistance(6, small_sample=True)
    metric.update(sample(10), real=True)
    for bad in (math.nan, math.inf, -math.inf):
        features = sample(10)
        features[3, 2] = bad
        with pytest.raises(DataError, match=r"1 of 10 features of the fake side are not finite"):
            metric.update(features)
        with pytest.raises(DataError, match=r"1 of 9 features of the real side are not finite"):
            metric.update(features, real=True, valid=torch.arange(10) > 0)
        metric.update(features, valid=torch.arange(10) != 3)
    assert (int(metric.real_count), int(metric.fake_count)) == (10, 27)
    assert metric.compute() >= 0


def test_names_tell_the_sample_count() -> None:
    assert [sized_name("fid", n) for n in (50_000, 10_000, 2_000, 2_048, 0)] == ["fid", "fid_10k", "fid_2k", "fid_2048", "fid_0"]
