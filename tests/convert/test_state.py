"""State dicts of other projects: what is unwrapped, renamed, covered and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from srcflow.convert.state import Rule, exported, linear, load, precision, read, rename, reshape, stacked, unwrap
from srcflow.errors import ArtifactError, WeightsError

BARE = {"a.weight": torch.ones(2)}


@pytest.mark.parametrize(
    "wrapped",
    [
        BARE,
        {"model": BARE, "epoch": 3},
        {"model": {"a.weight": torch.zeros(2)}, "ema": BARE},  # the average is preferred
        {"ema": {"state_dict": BARE}},
        {f"module._orig_mod.{k}": v for k, v in BARE.items()},
        {"state_dict": {f"_orig_mod.{k}": v for k, v in BARE.items()}},
        {**BARE, "nothing": None},
    ],
)
def test_what_wraps_a_state_dict_is_removed(wrapped: dict[str, Any]) -> None:
    found = unwrap(wrapped, what="x")
    assert found.keys() == BARE.keys()
    assert torch.equal(found["a.weight"], BARE["a.weight"])


def test_a_prefix_that_only_some_keys_have_is_theirs() -> None:
    assert unwrap({"module.a": torch.ones(1), "b": torch.ones(1)}, what="x").keys() == {"module.a", "b"}


@pytest.mark.parametrize("content", [{}, {"epoch": 1}, [torch.ones(1)], {"a": torch.ones(1), "lr": 0.1}, {"model": {"optimizer": {}}}])
def test_what_is_no_state_dict_is_refused(content: Any) -> None:
    with pytest.raises(ArtifactError, match=r"^x"):
        unwrap(content, what="x")


def test_files_in_every_form_hold_the_same(tmp_path: Path) -> None:
    state = {"a": torch.randn(3), "b": torch.randn(2)}
    save_file(state, tmp_path / "whole.safetensors")
    for name in state:
        save_file({name: state[name]}, tmp_path / f"{name}.safetensors")
    index = {"weight_map": {name: f"{name}.safetensors" for name in state}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("whole.safetensors", "model.safetensors.index.json", "new.pt", "old.pt"):
        found = read(tmp_path / name)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[k], v) for k, v in state.items())


class Theirs(nn.Module):
    """A module whose tensors are called and shaped otherwise there."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.table = nn.Linear(2, 6), nn.Linear(2, 2), nn.Parameter(torch.randn(4, 2))


def rules() -> list[Rule]:
    return [*stacked("qkv", ["q", "k", "v"]), *linear("out", "proj"), reshape("table", "embed", (1, 4, 2), (4, 2))]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rules_lead_there_and_back(device: str) -> None:
    first = Theirs()
    state = exported(first, rules())
    assert list(state) == ["q.weight", "k.weight", "v.weight", "q.bias", "k.bias", "v.bias", "proj.weight", "proj.bias", "embed"]
    assert torch.equal(state["k.weight"], first.qkv.weight[2:4])
    assert state["embed"].shape == (1, 4, 2)
    with torch.device(device):
        second = Theirs()
    load(second, {**state, "unused.mask": torch.ones(1)}, rules(), what="x", ignore=["*.mask"])
    assert all(torch.equal(v, first.state_dict()[k]) for k, v in second.state_dict().items())


def test_everything_that_does_not_fit_is_told_and_nothing_is_written() -> None:
    module = Theirs()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state: dict[str, Tensor] = {**exported(Theirs(), rules()), "proj.bias": torch.ones(3), "stray": torch.ones(1)}
    del state["k.bias"]
    with pytest.raises(WeightsError) as caught:
        load(module, state, rules(), what="x", hint="Look again.")
    lines = str(caught.value).splitlines()
    assert [line.strip() for line in lines[1:]] == [
        "missing k.bias (2,)",
        "unknown stray (1,)",
        "proj.bias: shape (3,), expected (2,)",
        "Look again.",
    ]
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_a_tensor_without_a_rule_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"no place for out\.bias, out\.weight, table"):
        exported(Theirs(), [rename("qkv.weight", "a"), rename("qkv.bias", "b")])


def test_precision_is_what_loses_nothing() -> None:
    assert precision({"a": torch.ones(1, dtype=torch.bfloat16), "b": torch.ones(1)}) == torch.float32
    assert precision({"a": torch.ones(1, dtype=torch.float64), "b": torch.ones(1)}) == torch.float64


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is empty"),
        (b"{", "cannot be read"),
        (b"[]", "holds a list"),
        (b"{}", "weight_map does not map"),
        (b'{"weight_map": []}', "weight_map does not map"),
        (b'{"weight_map": {}}', "weight_map does not map"),
        (b'{"weight_map": {"a": 3}}', "weight_map does not map"),
        (b'{"weight_map": {"a": "../secret.safetensors"}}', "weight_map does not map"),
        (b'{"weight_map": {"a": "gone.safetensors"}}', r"names gone\.safetensors, which is not beside it"),
    ],
)
def test_indexes_that_lead_nowhere(tmp_path: Path, content: bytes, problem: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"index\.json.*{problem}.*Copy"):
        read(index)
