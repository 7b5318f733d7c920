"""Attention against its formula, written out head by head and token by token."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from srcflow.errors import ConfigError
from srcflow.nn.attention import Attention, Cache, watch_logits
from srcflow.nn.rope import angles
from srcflow.testing import perturb
from srcflow.testing.expect import normal

from ..drawn import Feature, covering, every

GRID, TOKENS = (2, 3), 6
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"heads": 2},
    "wider than its width": {"heads": 4},
    "no biases": {"heads": 2, "bias": False},
    "grouped queries": {"heads": 4, "kv_heads": 2},
    "one key head": {"heads": 3, "kv_heads": 1},
    "normalised queries and keys": {"heads": 2, "qk_norm": True},
    "normalised, grouped": {"heads": 4, "kv_heads": 2, "qk_norm": True, "bias": False},
}


def attention(**arguments: Any) -> Attention:
    torch.manual_seed(0)
    return perturb(Attention(10, 8, **arguments), 0.3).double()


def rotation(tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    a = angles(8, 3.0, GRID, 0, False, torch.device("cpu")).double()[:tokens]
    return a.cos(), a.sin()


def normalised(x: Tensor, norm: nn.Module) -> Tensor:
    return x / torch.sqrt((x * x).sum() / len(x) + 1e-6) * (1 + norm.weight) if hasattr(norm, "weight") else x


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = [(c * a - s * b, s * a + c * b) for a, b, c, s in zip(x[0::2], x[1::2], cos, sin, strict=True)]
    return torch.stack(list(itertools.chain.from_iterable(pairs)))


def by_hand(net: Attention, x: Tensor, turn: tuple[Tensor, Tensor] | None, causal: bool, temperatures: list[float]) -> tuple[Tensor, float]:
    """The output, and the largest absolute logit."""
    rows, largest = [], 0.0
    d, n, kv = net.head_dim, net.heads, net.kv_heads
    for row, temperature in zip(x, temperatures, strict=True):
        projected = row @ net.qkv.weight.T + (0 if net.qkv.bias is None else net.qkv.bias)
        tokens = []
        for i in range(len(row)):
            heads = []
            for h in range(n):
                g = h // (n // kv)  # consecutive query heads share a key head

                def part(start: int, head: int, j: int, norm: nn.Module | None, projected: Tensor = projected) -> Tensor:
                    y = projected[j, start + head * d : start + (head + 1) * d]
                    if norm is None:
                        return y
                    y = normalised(y, norm)
                    return y if turn is None else turned(y, turn[0][j], turn[1][j])

                q = part(0, h, i, net.q_norm)
                seen = range(i + 1 if causal else len(row))
                logits = torch.stack([q @ part(n * d, g, j, net.k_norm) / math.sqrt(d) / temperature for j in seen])
                largest = max(largest, float(logits.abs().max()))
                weights = logits.exp() / logits.exp().sum()
                heads.append(sum(w * part((n + kv) * d, g, j, None) for w, j in zip(weights, seen, strict=True)))
            tokens.append(torch.cat(heads))  # type: ignore[arg-type]  # sum() starts at the integer 0
        rows.append(torch.stack(tokens) @ net.proj.weight.T + (0 if net.proj.bias is None else net.proj.bias))
    return torch.stack(rows), largest


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("turns", [True, False])
@torch.no_grad()
def test_formula(name: str, causal: bool, turns: bool) -> None:
    net, x = attention(**SHAPES[name]), normal(2, TOKENS, 10, seed=1)
    turn = rotation() if turns else None
    with watch_logits() as watched:
        got = net(x, rotation=turn, causal=causal)
    expected, largest = by_hand(net, x, turn, causal, [1.0, 1.0])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert float(watched[0]) == pytest.approx(largest, rel=1e-5)


@pytest.mark.parametrize("name", ["plain", "normalised, grouped"])
@torch.no_grad()
def test_a_temperature_divides_the_logits(name: str) -> None:
    net, x = attention(**SHAPES[name]), normal(2, TOKENS, 10, seed=1)
    for given_one, rows in (
        (0.5, [0.5, 0.5]),
        (torch.tensor([0.5, 1.7], dtype=torch.float64), [0.5, 1.7]),
        (torch.tensor([2.0]), [2.0, 2.0]),
    ):
        expected, largest = by_hand(net, x, rotation(), True, rows)
        with watch_logits() as watched:
            torch.testing.assert_close(net(x, rotation=rotation(), temperature=given_one), expected, rtol=0, atol=1e-12)
        assert float(watched[0]) == pytest.approx(largest, rel=1e-5)
    assert (net(x) - net(x, temperature=0.5)).abs().max() > 1e-3


def shown(name: str, runs: list[tuple[float, int]], turns: bool) -> Iterator[Feature]:
    yield from (("name", name), ("turns", turns))
    yield from (("length", m) for _, m in runs)
    yield from (("where", where) for where, _ in runs[1:])


@covering(
    settings(max_examples=60, deadline=None),
    st.sampled_from(sorted(SHAPES)),
    st.lists(st.tuples(st.sampled_from([1.0, 1.0, 0.0, 0.5]), st.integers(1, TOKENS)), min_size=1, max_size=6),
    st.booleans(),
    features=shown,
    needed=every(name=SHAPES, turns=[False, True], length=range(1, TOKENS + 1), where=[0.0, 0.5, 1.0]),
)
def test_a_cache_gives_the_same_in_any_split_and_after_overwriting(name: str, runs: list[tuple[float, int]], turns: bool) -> None:
    net, x, cache, end = attention(**SHAPES[name]), normal(2, TOKENS, 10, seed=1), Cache(TOKENS), 0
    temperature = torch.tensor([0.7, 1.3], dtype=torch.float64)
    cos, sin = rotation()
    with torch.no_grad():
        for n, (where, m) in enumerate(runs):
            at = min(round(where * end), TOKENS - 1)
            end = min(at + m, TOKENS)
            x = torch.cat([x[:, :at], normal(2, TOKENS - at, 10, seed=2 + n)], 1)  # other tokens than at the first time
            turn = (cos[at:end], sin[at:end]) if turns else None
            got = net(x[:, at:end], rotation=turn, temperature=temperature, cache=cache, at=at)
            whole = net(x[:, :end], rotation=(cos[:end], sin[:end]) if turns else None, temperature=temperature)
            torch.testing.assert_close(got, whole[:, at:], rtol=0, atol=1e-12)


@torch.no_grad()
def test_rows_do_not_see_each_other_and_tokens_not_what_follows() -> None:
    net, x = attention(heads=2), normal(3, TOKENS, 10, seed=1)
    base = net(x)
    other = x.clone()
    other[1, 3] += 1.0
    moved = (net(other) - base).abs().amax(-1) > 0
    assert moved.tolist() == [[False] * TOKENS, [False] * 3 + [True] * 3, [False] * TOKENS]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 3), (0, None), (2, 0), (1, 2)])
def test_heads_that_cannot_be_grouped_are_refused(heads: int, kv_heads: int | None) -> None:
    with pytest.raises(ConfigError, match="kv_heads"):
        Attention(8, 4, heads, kv_heads)


@torch.no_grad()
def test_few_tokens_in_bfloat16_stay_close() -> None:
    net, x = attention(heads=4, kv_heads=2).float(), normal(2, TOKENS, 10, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = net(x, rotation=rotation())
    assert low.dtype == torch.bfloat16
    assert (low.float() - net(x, rotation=rotation())).abs().max() < 0.05
