from __future__ import annotations

import pytest
import torch

from srcflow.errors import ConfigError, ShapeError
from srcflow.nn import patchify, unpatchify
from srcflow.nn.patchify import Order, pair


@pytest.mark.parametrize("order", ["cpp", "ppc"])
@pytest.mark.parametrize(("size", "p", "c"), [((4, 6), 2, 3), ((8, 8), 4, 1), ((3, 9), 3, 2), ((4, 2), 1, 3)])
def test_round_trip(order: Order, size: tuple[int, int], p: int, c: int) -> None:
    x = torch.arange(2 * c * size[0] * size[1], dtype=torch.float32).reshape(2, c, *size)
    tokens = patchify(x, p, order)
    assert tokens.shape == (2, size[0] * size[1] // p**2, c * p * p)
    assert torch.equal(unpatchify(tokens, p, (size[0] // p, size[1] // p), order), x)


def test_order_of_numbers_and_tokens() -> None:
    x = torch.randn(1, 3, 4, 6)
    unfolded = torch.nn.functional.unfold(x, 2, stride=2).transpose(1, 2)  # TARFlow's order
    assert torch.equal(patchify(x, 2, "cpp"), unfolded)
    token = patchify(x, 2, "ppc")[0, 4]  # row 1, column 1
    assert torch.equal(token, x[0, :, 2:4, 2:4].permute(1, 2, 0).flatten())


def test_errors() -> None:
    with pytest.raises(ShapeError, match="patch_size = 3"):
        patchify(torch.zeros(1, 3, 4, 6), 3)
    with pytest.raises(ShapeError, match="2 x 3"):
        unpatchify(torch.zeros(1, 5, 12), 2, (2, 3))
    with pytest.raises(ShapeError):
        unpatchify(torch.zeros(1, 6, 13), 2, (2, 3))
    with pytest.raises(ConfigError, match="cpp, ppc"):
        patchify(torch.zeros(1, 3, 4, 4), 2, "pcp")  # type: ignore[arg-type]


def test_pair() -> None:
    assert pair(3, "k") == (3, 3)
    assert pair([2, 5], "k") == (2, 5)
    for bad in (0, [1], [1, 2, 3], [1, 0], [1.5, 2], [True, 1]):
        with pytest.raises(ConfigError, match=r"a\.b"):
            pair(bad, "a.b")  # type: ignore[arg-type]
