"""Rotary positions against their formula (E18), written out number by number."""

from __future__ import annotations

import math

import pytest
import torch

from srcflow.errors import ConfigError
from srcflow.nn.rope import angles, rotate
from srcflow.testing.expect import normal
from srcflow.types import Grid

CPU = torch.device("cpu")


def by_hand(head_dim: int, side: float, grid: Grid, text: int, text_axis: bool) -> list[list[float]]:
    """One angle per pair of channels, for every slot: pairs that turn with the row, with the column, and with the text."""
    spatial = head_dim // 2 - (8 if text_axis else 0)
    own = [10000 ** (-2 * j / spatial) for j in range(spatial // 2)]
    third = [10000 ** (-j / 8) for j in range(8)] if text_axis else []
    coordinates = [(0.0, 0.0, t * side / text) for t in range(text)]
    scale = side / math.sqrt(grid[0] * grid[1])
    coordinates += [(r * scale, c * scale, 0.0) for r in range(grid[0]) for c in range(grid[1])]
    return [[row * f for f in own] + [column * f for f in own] + [t * f for f in third] for row, column, t in coordinates]


@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (3, 2), (1, 5), (8, 8)])
@pytest.mark.parametrize(
    ("head_dim", "text", "text_axis"),
    [(4, 0, False), (8, 0, False), (64, 0, False), (20, 0, True), (32, 3, True), (64, 1, True), (64, 7, True)],
)
@pytest.mark.parametrize("side", [4.0, 5.5])
def test_angles(grid: Grid, head_dim: int, text: int, text_axis: bool, side: float) -> None:
    got = angles(head_dim, side, grid, text, text_axis, CPU)
    assert got.shape == (text + grid[0] * grid[1], head_dim // 2)
    torch.testing.assert_close(
        got.double(), torch.tensor(by_hand(head_dim, side, grid, text, text_axis), dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_numbers_of_a_released_shape() -> None:
    def close(actual: torch.Tensor, expected: list[float]) -> None:
        assert actual.tolist() == pytest.approx(expected, rel=1e-12)

    a = angles(64, 16.0, (16, 16), 0, False, CPU)  # 16 frequencies for each axis
    close(a[3 * 16 + 5, [0, 1, 16, 31]], [3.0, 3 * 10000 ** (-1 / 16), 5.0, 5 * 10000 ** (-15 / 16)])
    b = angles(64, 16.0, (8, 32), 4, True, CPU)  # 12 for each axis, 8 for the text
    close(b[3, [0, 12, 24, 25]], [0.0, 0.0, 12.0, 12 * 10000 ** (-1 / 8)])
    close(b[4 + 2 * 32 + 31, [0, 1, 12, 24]], [2.0, 2 * 10000 ** (-1 / 12), 31.0, 0.0])


def test_another_shape_keeps_the_mean_side() -> None:
    """Rows and columns are equally far apart, and the grid covers an area of side^2."""
    for grid in ((16, 16), (8, 32), (32, 32), (5, 7)):
        last = angles(8, 16.0, grid, 0, False, CPU)[-1]
        spacing = [float(last[0]) / (grid[0] - 1), float(last[2]) / (grid[1] - 1)]
        assert spacing[0] == pytest.approx(spacing[1])
        assert grid[0] * spacing[0] * grid[1] * spacing[1] == pytest.approx(256)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbouring_channels_turn(dtype: torch.dtype, compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x, a = normal(2, 3, 5, 8, seed=0, dtype=dtype), normal(5, 4, seed=1, dtype=dtype)
    expected = torch.empty_like(x)
    for b in range(2):
        for h in range(3):
            for slot in range(5):
                for i in range(4):
                    c, s = math.cos(a[slot, i]), math.sin(a[slot, i])
                    even, odd = float(x[b, h, slot, 2 * i]), float(x[b, h, slot, 2 * i + 1])
                    expected[b, h, slot, 2 * i] = c * even - s * odd
                    expected[b, h, slot, 2 * i + 1] = s * even + c * odd
    got = rotate(x, a.cos(), a.sin())
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected)


def test_low_precision_turns_in_float32() -> None:
    x, a = normal(1, 1, 4, 8, seed=0), normal(4, 4, seed=1)
    low = x.to(torch.bfloat16)
    got = rotate(low, a.cos(), a.sin())
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, rotate(low.double(), a.cos(), a.sin()).to(torch.bfloat16))


def test_a_product_of_query_and_key_depends_on_the_way_between_their_slots() -> None:
    a = angles(16, 4.0, (4, 4), 0, False, CPU).double()
    q, k = (normal(16, seed=s).expand(1, 1, 16, 16) for s in (0, 1))
    logits = (rotate(q, a.cos(), a.sin()) @ rotate(k, a.cos(), a.sin()).mT)[0, 0].reshape(4, 4, 4, 4)
    torch.testing.assert_close(logits[1:, 1:, 1:, 1:], logits[:-1, :-1, :-1, :-1], rtol=0, atol=1e-12)
    assert (logits[0, 0, 0, 1] - logits[0, 0, 1, 0]).abs() > 1e-2


def test_text_turns_the_third_axis_alone() -> None:
    a = angles(32, 4.0, (2, 2), 3, True, CPU)
    assert not a[:3, :8].any()  # text: no row, no column
    assert not a[3:, 8:].any()  # image: no third axis
    assert not a[[0, 3]].any()  # the first of each
    assert torch.equal(a[3:], angles(32, 4.0, (2, 2), 0, True, CPU))


@pytest.mark.parametrize(
    ("head_dim", "text", "text_axis", "words"),
    [(6, 0, False, "multiple of 4"), (16, 0, True, "at least 20 with a text axis"), (8, 2, False, "text_axis")],
)
def test_what_cannot_be_is_refused(head_dim: int, text: int, text_axis: bool, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        angles(head_dim, 4.0, (2, 2), text, text_axis, CPU)
