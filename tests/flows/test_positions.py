"""Positions in a block: learned ones go with the tokens, rotary ones with the slots; a block written out token by token (E17, E18)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from srcflow.conditioners.class_table import ClassTable
from srcflow.conditioners.class_token import ClassToken
from srcflow.conditioners.text_prefix import TextPrefix
from srcflow.couplings.affine import Affine
from srcflow.errors import ConfigError, ShapeError
from srcflow.flows.block import TransformerBlock
from srcflow.flows.flow import Flow
from srcflow.flows.positions import Learned, Positions, Rotary
from srcflow.testing import perturb
from srcflow.testing.expect import normal
from srcflow.types import Condition, Context, Grid

GRID, WIDTH, HEADS, HEAD_DIM, DIM = (2, 3), 48, 2, 24, 3
CPU = torch.device("cpu")
TEXT = Condition(text=normal(2, 4, 5, seed=7), mask=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]).bool())


def block(positions: Positions, **changes: Any) -> TransformerBlock:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"layers": 2, "coupling": Affine(), "head_dim": HEAD_DIM, "expansion": 1.5, **changes}
    return perturb(TransformerBlock(DIM, WIDTH, positions=positions, **arguments), 0.1).double()


def turned(x: Tensor, place: tuple[float, float, float], side: float, grid: Grid, text_axis: bool) -> Tensor:
    """A head's query or key at (row, column, text coordinate), the last two axes scaled already."""
    spatial = HEAD_DIM // 2 - (8 if text_axis else 0)
    scale = side / math.sqrt(grid[0] * grid[1])
    own = [10000 ** (-2 * j / spatial) for j in range(spatial // 2)]
    a = [place[0] * scale * f for f in own] + [place[1] * scale * f for f in own]
    a += [place[2] * 10000 ** (-j / 8) for j in range(8)] if text_axis else []
    out = torch.empty_like(x)
    for i, angle in enumerate(a):
        c, s = math.cos(angle), math.sin(angle)
        out[2 * i], out[2 * i + 1] = c * x[2 * i] - s * x[2 * i + 1], s * x[2 * i] + c * x[2 * i + 1]
    return out


def by_hand(b: TransformerBlock, u: Tensor, grid: Grid, condition: Condition | None, side: float) -> Tensor:
    """Parameters (N, 2, d) of one row u (N, d), in the block's own order."""
    positions, tokens = b.positions, len(u)
    inputs = [*u] if b.sos is None else [b.sos, *u[:-1]]
    h = [b.proj_in(t) for t in inputs]
    if isinstance(positions, Learned):
        at = [*range(tokens)] if b.order == "raster" else [*reversed(range(tokens))]
        h = [t + positions.weight[i] for t, i in zip(h, at, strict=True)]
    places = [(float(slot // grid[1]), float(slot % grid[1]), 0.0) for slot in range(tokens)]
    if isinstance(b.conditioner, ClassTable) and condition is not None and condition.labels is not None:
        h = [t + b.conditioner.weight[int(condition.labels)] for t in h]
    prefix: list[Tensor] = []
    if isinstance(b.conditioner, ClassToken) and condition is not None and condition.labels is not None:
        assert b.conditioner.bias is not None
        prefix = [b.conditioner.weight[int(condition.labels)] + b.conditioner.bias]
    if isinstance(b.conditioner, TextPrefix) and condition is not None and condition.text is not None and condition.mask is not None:
        prefix = [b.conditioner.proj(t * float(m)) for t, m in zip(condition.text[0], condition.mask[0], strict=True)]
    h = prefix + h
    places = [(0.0, 0.0, t * side / len(prefix)) for t in range(len(prefix))] + places
    rotary = positions if isinstance(positions, Rotary) else None
    for layer in b.layers:
        d, n = HEAD_DIM, HEADS
        qkv = [layer.attn.qkv(layer.norm1(t)) for t in h]
        attended = []
        for i in range(len(h)):
            heads = []
            for head in range(n):
                q, *keys = [
                    t if rotary is None else turned(t, places[j], side, grid, rotary.text_axis)
                    for t, j in [(qkv[i][head * d : (head + 1) * d], i)]
                    + [(qkv[j][(n + head) * d : (n + head + 1) * d], j) for j in range(i + 1)]
                ]
                w = torch.stack([q @ k / math.sqrt(d) for k in keys]).softmax(0)
                heads.append(sum(w[j] * qkv[j][(2 * n + head) * d : (2 * n + head + 1) * d] for j in range(i + 1)))
            attended.append(h[i] + layer.attn.proj(torch.cat(heads)))  # type: ignore[arg-type]  # sum() starts at the integer 0
        h = [t + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.norm2(t)))) for t in attended]
    out = [b.head(b.final_norm(t)).reshape(2, DIM) for t in h[len(prefix) :]]
    return torch.stack(out if b.sos is not None else [torch.zeros_like(out[0]), *out[:-1]])


CASES: dict[str, tuple[Any, Condition | None, Grid, float]] = {
    # block, condition, grid of the call, side
    "learned": (lambda o, s: block(Learned(GRID, WIDTH), order=o, start=s), None, GRID, 0.0),
    "learned, class on every token": (
        lambda o, s: block(Learned(GRID, WIDTH), order=o, start=s, conditioner=ClassTable(3, WIDTH)),
        Condition(labels=torch.tensor([2, 0])),
        GRID,
        0.0,
    ),
    "rotary": (lambda o, s: block(Rotary(GRID), order=o, start=s, final_norm=True), None, GRID, math.sqrt(6)),
    "rotary, another grid": (lambda o, s: block(Rotary((4, 4)), order=o, start=s), None, (3, 2), 4.0),
    "rotary, a side of its own": (lambda o, s: block(Rotary(GRID, side=7.0), order=o, start=s), None, (1, 5), 7.0),
    "rotary, axis for text, no text": (lambda o, s: block(Rotary(GRID, True), order=o, start=s), None, GRID, math.sqrt(6)),
    "rotary, text": (
        lambda o, s: block(Rotary((3, 3), True), order=o, start=s, conditioner=TextPrefix(5, WIDTH)),
        TEXT,
        GRID,
        3.0,
    ),
    "rotary, class token": (
        lambda o, s: block(Rotary(GRID, True, side=5.0), order=o, start=s, conditioner=ClassToken(3, WIDTH, bias=True)),
        Condition(labels=torch.tensor([2, 0])),
        (2, 2),
        5.0,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("order", ["raster", "reverse"])
@pytest.mark.parametrize("start", ["shift", "sos"])
@torch.no_grad()
def test_a_block_is_its_formula(name: str, order: str, start: str) -> None:
    make, condition, grid, side = CASES[name]
    b = make(order, start)
    u = normal(2, grid[0] * grid[1], DIM, seed=1)
    got = b.params(u, Context(condition, grid))
    assert got[:, 1:].abs().max() > 0.1
    for row in range(2):
        own = None if condition is None else condition.index(slice(row, row + 1))
        torch.testing.assert_close(got[row], by_hand(b, u[row], grid, own, side), rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", [lambda: Rotary(GRID), lambda: Learned(GRID, WIDTH)], ids=["rotary", "learned"])
@torch.no_grad()
def test_a_reversed_flow_is_that_of_the_reversed_image_up_to_learned_positions(make: Callable[[], Positions]) -> None:
    raster, reverse = (block(make(), order=o) for o in ("raster", "reverse"))
    reverse.load_state_dict(raster.state_dict())
    x = normal(2, 6, DIM, seed=1)
    expected = Flow([raster]).double()(x.flip(1)).z.flip(1)
    got = Flow([reverse]).double()(x).z
    if isinstance(reverse.positions, Learned):
        assert (got - expected).abs().max() > 1e-2
        reverse.positions.weight.copy_(reverse.positions.weight.flip(0))
        got = Flow([reverse]).double()(x).z
    assert torch.equal(got, expected)


def test_learned_positions_are_reversed_with_the_tokens() -> None:
    positions = Learned(GRID, 4)
    assert torch.equal(positions.table(GRID, "raster")[0], positions.weight)
    assert torch.equal(positions.table(GRID, "reverse")[0], positions.weight.flip(0))
    assert positions.rotation(GRID, 0, 8, CPU) is None
    for grid in ((3, 2), (2, 4)):
        with pytest.raises(ShapeError, match="rotary"):
            positions.table(grid, "raster")


def test_rotary_positions_add_nothing_to_the_tokens() -> None:
    positions = Rotary(GRID, text_axis=True)
    assert positions.table(GRID, "reverse") is None
    assert not positions.state_dict()
    rotation = positions.rotation((3, 4), 5, 24, CPU)
    assert [t.shape for t in rotation] == [(17, 12), (17, 12)]


def test_the_side_is_that_of_the_grid_or_a_given_one() -> None:
    for own, given in (((4, 4), 4.0), ((2, 8), 4.0), ((3, 3), 3.0)):
        for a, b in zip(Rotary(own).rotation((2, 5), 0, 8, CPU), Rotary((7, 7), side=given).rotation((2, 5), 0, 8, CPU), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ConfigError, match=r"positions\.side"):
        Rotary(GRID, side=0.0)
