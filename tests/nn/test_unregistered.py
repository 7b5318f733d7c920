"""A held network follows its owner's device and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from srcflow.nn.unregistered import Unregistered


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(3, 3)
        self.judge = Unregistered(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))


def test_adds_nothing_to_its_owner() -> None:
    owner = Owner()
    assert set(owner.state_dict()) == {"own.weight", "own.bias"}
    assert sum(p.numel() for p in owner.parameters()) == 12
    assert not any(isinstance(m, nn.BatchNorm1d) for m in owner.modules())
    owner.load_state_dict(owner.state_dict())


def test_stays_frozen_and_in_eval_mode() -> None:
    owner = Owner().train()
    assert owner.training
    assert not owner.judge.module.training
    assert not any(p.requires_grad for p in owner.judge.module.parameters())
    x = torch.randn(5, 3, requires_grad=True)
    owner.judge(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_follows_the_device() -> None:
    owner = Owner().to("meta")
    assert {t.device.type for t in owner.judge.module.state_dict().values()} == {"meta"}
    owner.to_empty(device="cpu")
    assert {t.device.type for t in owner.judge.module.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_never_rounded_below_float32(dtype: torch.dtype) -> None:
    owner = Owner()
    before = copy.deepcopy(owner.judge.module.state_dict())
    owner.to(dtype)
    assert owner.own.weight.dtype == dtype
    assert owner.judge.dtype == torch.float32
    for name, value in owner.judge.module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_follows_to_float64() -> None:
    assert Owner().double().judge.dtype == torch.float64


def test_copies_are_independent() -> None:
    owner = Owner()
    other = copy.deepcopy(owner)
    with torch.no_grad():
        other.judge.module[0].weight.zero_()
    assert owner.judge.module[0].weight.abs().sum() > 0
