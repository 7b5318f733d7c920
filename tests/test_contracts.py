"""Every registered member of every family that has a contract, srcflow's own and third-party ones alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from srcflow import registry
from srcflow.conditioners.base import Conditioner
from srcflow.conditioners.class_table import ClassTable
from srcflow.conditioners.class_token import ClassToken
from srcflow.conditioners.text_prefix import TextPrefix
from srcflow.couplings.base import Coupling
from srcflow.flows.block import TransformerBlock
from srcflow.flows.positions import Learned, Rotary
from srcflow.guidance.base import Guidance
from srcflow.guidance.schedules import Schedule
from srcflow.noise import Noise
from srcflow.registry import Member
from srcflow.solvers.sequential import Sequential
from srcflow.testing import (
    ReferenceBlock,
    check_block,
    check_compressor,
    check_conditioner,
    check_coupling,
    check_encoder,
    check_guidance,
    check_solver,
)
from srcflow.types import Condition

SMALL_VIT = {"depth": 2, "embed_dim": 24, "num_heads": 2}
ARGUMENTS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "encoders": {
        "TimmViT": [
            {"model": "vit_tiny_patch16_224", "image_size": 32, "weights": None, "timm_args": SMALL_VIT},
            {"model": "vit_tiny_patch16_224", "image_size": [32, 48], "weights": None, "last_layers": 2, "timm_args": SMALL_VIT},
            {"model": "vit_tiny_patch16_224", "weights": None, "dynamic": True, "image_size": 32, "timm_args": SMALL_VIT},
        ],
        "DINOv2": [{"size": "small", "image_size": 28, "weights": None, "timm_args": SMALL_VIT}],
        "SigLIP2": [{"image_size": 32, "weights": None, "timm_args": SMALL_VIT}],
        "MAE": [{"image_size": 32, "weights": None, "timm_args": SMALL_VIT}],
        "EfficientNetLite": [{"image_size": 64, "weights": None}, {"image_size": [32, 64], "stage": 1, "weights": None}],
        "PatchProjection": [{}, {"image_size": 32, "dim": 10}],
    },
    "compressors": {
        "Semantic": [
            {"dim": 12, "code_dim": 4, "width": 16, "layers": 1, "head_dim": 8, "grid": 4},
            {"dim": 12, "code_dim": 4, "width": 16, "layers": 1, "head_dim": 8, "grid": 4, "start": "random"},
        ],
        "Conv": [
            {"dim": 12, "code_dim": 4, "width": 8, "layers": 1},
            {"dim": 12, "code_dim": 4, "width": 8, "layers": 1, "start": "random"},
        ],
        "Linear": [{"dim": 12, "code_dim": 4}, {"dim": 12, "code_dim": 4, "start": "random"}],
        "PCA": [{"dim": 12, "code_dim": 4}],
        "Identity": [{"dim": 12}],
    },
    "conditioners": {
        "ClassTable": [{"num_classes": 5, "width": 8}, {"num_classes": 5, "width": 8, "null": "learned"}],
        "ClassToken": [{"num_classes": 5, "width": 8}, {"num_classes": 5, "width": 8, "bias": True}],
        "TextPrefix": [{"text_dim": 6, "width": 8}],
        "LabelDirections": [{"num_classes": 5, "width": 8}],
    },
    "solvers": {"PerBlock": [{"default": Sequential()}, {"default": Sequential(), "blocks": {-1: Sequential()}}]},
    "schedules": {
        "Constant": [{"strength": 1.5}],
        "Annealed": [{"strength": 1.5}],
        "Interval": [{"strength": 1.5, "start": 0.25, "stop": 0.75}],
    },
}
"""Arguments to try members with; a member that is not listed is built without any."""


def members(family: str) -> list[Any]:
    """(member, arguments) for every registered member of a family."""
    table = ARGUMENTS.get(family, {})
    return [
        pytest.param(member, arguments, id=f"{name}{i or ''}")
        for name, member in sorted(registry.registered(family).items())
        for i, arguments in enumerate(table.get(name, [{}]))
    ]


@pytest.mark.parametrize("family", registry.FAMILIES)
def test_arguments_name_registered_members(family: str) -> None:
    unknown = set(ARGUMENTS.get(family, {})) - set(registry.registered(family))
    assert not unknown, f"not registered: {unknown} (third-party parts are installed by `make test`)"


@pytest.mark.parametrize(("member", "arguments"), members("encoders"))
def test_encoders(member: Member, arguments: dict[str, Any]) -> None:
    check_encoder(member.cls(**arguments))


@pytest.mark.parametrize(("member", "arguments"), members("compressors"))
def test_compressors(member: Member, arguments: dict[str, Any]) -> None:
    check_compressor(member.cls(**arguments), (4, 4))


@pytest.mark.parametrize(("member", "arguments"), members("conditioners"))
def test_conditioners(member: Member, arguments: dict[str, Any]) -> None:
    check_conditioner(member.cls(**arguments))


@pytest.mark.parametrize(("member", "arguments"), members("couplings"))
def test_couplings(member: Member, arguments: dict[str, Any]) -> None:
    check_coupling(member.cls(**arguments))


@pytest.mark.parametrize(("member", "arguments"), members("guidance"))
def test_guidance(member: Member, arguments: dict[str, Any]) -> None:
    assert issubclass(member.cls, Guidance)
    check_guidance(member.cls, alternatives=arguments)


@pytest.mark.parametrize(("member", "arguments"), members("solvers"))
def test_solvers(member: Member, arguments: dict[str, Any]) -> None:
    check_solver(member.cls(**arguments))


@pytest.mark.parametrize(("member", "arguments"), members("solvers"))
@pytest.mark.parametrize("coupling", sorted(registry.registered("couplings")))
def test_solvers_on_every_coupling(member: Member, arguments: dict[str, Any], coupling: str) -> None:
    block = ReferenceBlock(registry.build(coupling, Coupling), dim=2)
    check_solver(member.cls(**arguments), block, shape=(2, 4, 2))


@pytest.mark.parametrize(("member", "arguments"), members("schedules"))
def test_schedules(member: Member, arguments: dict[str, Any]) -> None:
    schedule = member.cls(**arguments)
    assert isinstance(schedule, Schedule)
    for dtype in (torch.float32, torch.float64):
        progress = torch.linspace(0, 1, 9, dtype=dtype)
        strength = schedule(progress)
        assert strength.shape == progress.shape
        assert strength.dtype == dtype
        assert bool((strength >= 0).all())
        assert float(strength.max()) == pytest.approx(arguments["strength"])
        torch.testing.assert_close(schedule(progress[3:5]), strength[3:5])
    assert not schedule.is_zero
    zero = member.cls(**{**arguments, "strength": 0.0})
    assert zero.is_zero
    assert not zero(progress).any()
    assert registry.spec_of(registry.build(registry.spec_of(schedule), Schedule)) == registry.spec_of(schedule)


@pytest.mark.parametrize(("member", "arguments"), members("noises"))
def test_noises(member: Member, arguments: dict[str, Any]) -> None:
    noise = member.cls(**arguments)
    assert isinstance(noise, Noise)
    key: dict[str, Any] = {"seed": 1, "purpose": "train", "step": 2}
    eps = noise.sample((5, 3), indices=[4, 9, 2], **key)
    assert eps.shape == (3, 5, 3)
    assert eps.dtype == torch.float32
    assert eps.std() > 0
    assert torch.equal(noise.sample((5, 3), indices=torch.tensor([9]), **key), eps[1:2]), "a row depends on the batch it is drawn in"
    for change in ({"seed": 2}, {"purpose": "validate"}, {"step": 3}):
        assert not torch.equal(noise.sample((5, 3), indices=[4, 9, 2], **{**key, **change}), eps), f"{change} changes nothing"
    assert noise.sample((5, 3), indices=[], **key).shape == (0, 5, 3)
    assert registry.spec_of(registry.build(registry.spec_of(noise), Noise)) == registry.spec_of(noise)


GRID = (2, 3)
LABELS = Condition(labels=torch.tensor([0, 2, -1]))
TEXT = Condition(
    text=torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    mask=torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool(),
)


def transformer(conditioner: Conditioner | None = None, rotary: bool = False, coupling: str = "Affine", **changes: Any) -> TransformerBlock:
    """A tiny block."""
    positions = Rotary(GRID, text_axis=isinstance(conditioner, TextPrefix | ClassToken)) if rotary else Learned(GRID, 32)
    arguments: dict[str, Any] = {"channels": 3, "width": 32, "layers": 2, "head_dim": 32, "expansion": 1.0, **changes}
    return TransformerBlock(positions=positions, coupling=registry.build(coupling, Coupling), conditioner=conditioner, **arguments)


BLOCKS = {
    "tarflow": lambda: (transformer(ClassTable(3, 32), start="shift"), LABELS),
    "unconditional": lambda: (transformer(), None),
    "starflow": lambda: (
        transformer(
            TextPrefix(5, 32),
            rotary=True,
            coupling="SoftplusAffine",
            norm="rms",
            mlp="gated",
            qk_norm=True,
            post_norm=True,
            final_norm=True,
            bias=False,
            clip=4.0,
            clip_what="both",
        ),
        TEXT,
    ),
    "class token": lambda: (transformer(ClassToken(3, 32), rotary=True, clip=3.0), LABELS),
    "grouped queries, reversed": lambda: (transformer(ClassTable(3, 32, "learned"), head_dim=8, kv_heads=2, order="reverse"), LABELS),
    "a third party's coupling": lambda: (transformer(ClassTable(3, 32), coupling="BoundedAffine"), LABELS),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_transformer_blocks(name: str) -> None:
    block, condition = BLOCKS[name]()
    check_block(block, shape=(3, 6, 3), condition=condition, grid=GRID)


@pytest.mark.parametrize("name", BLOCKS)
def test_solving_transformer_blocks(name: str) -> None:
    block, condition = BLOCKS[name]()
    negative = None if condition is None else condition.index(torch.tensor([1, 0, 1]))
    for parameter in members("solvers"):
        member, arguments = parameter.values
        check_solver(member.cls(**arguments), block, shape=(3, 6, 3), condition=condition, negative=negative, grid=GRID)
