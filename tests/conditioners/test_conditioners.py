"""Conditions and conditioners: declared fields, nulls, composition, and a member that srcflow has never heard of."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from srcflow.conditioners.base import Conditioner, Field, Joint, resolve
from srcflow.conditioners.class_table import ClassTable
from srcflow.conditioners.class_token import ClassToken
from srcflow.conditioners.text_prefix import TextPrefix
from srcflow.couplings.affine import Affine
from srcflow.errors import ConfigError, ShapeError
from srcflow.flows.block import TransformerBlock
from srcflow.flows.flow import Flow
from srcflow.flows.positions import Rotary
from srcflow.guidance.linear import Linear
from srcflow.testing import check_conditioner, perturb
from srcflow.types import Condition


class Pose(Conditioner):
    """A dense field, added to every token."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.fields = (Field("pose", "dense", size),)
        self.proj = nn.Linear(size, width)

    def added(self, condition: Condition) -> Tensor:
        pose = condition.get("pose")
        assert pose is not None
        return self.proj(pose.to(self.proj.weight.dtype))[:, None]


class Style(Conditioner):
    """Class ids under a name of their own, in front of the tokens."""

    def __init__(self, styles: int, width: int) -> None:
        super().__init__()
        self.fields = (Field("style", "index", styles),)
        self.table = nn.Embedding(styles + 1, width)

    def prefix(self, condition: Condition) -> Tensor:
        style = condition.get("style")
        assert style is not None
        return self.table(torch.where(style < 0, self.table.num_embeddings - 1, style))[:, None]


class Deaf(Style):
    """Declares a field and does not look at it."""

    def prefix(self, condition: Condition) -> Tensor:
        return self.table.weight[:1].expand(len(condition), -1)[:, None]


class Muddled(Style):
    """Takes the null for class 0."""

    def prefix(self, condition: Condition) -> Tensor:
        style = condition.get("style")
        assert style is not None
        return self.table(style.clamp(min=0))[:, None]


MEMBERS = [
    ClassTable(5, 8),
    ClassTable(5, 8, null="learned"),
    ClassToken(5, 8),
    ClassToken(5, 8, bias=True),
    TextPrefix(6, 8),
    Pose(3, 8),
    Style(5, 8),
    Joint([ClassTable(5, 8, null="learned"), TextPrefix(6, 8), Pose(3, 8)]),
]


@pytest.mark.parametrize("member", MEMBERS, ids=lambda m: type(m).__name__)
def test_members_pass_the_contract(member: Conditioner) -> None:
    check_conditioner(member)


@pytest.mark.parametrize(
    ("member", "message"), [(Deaf(5, 8), "changes nothing"), (Muddled(2, 8), "null of style is not told from the value of row 0")]
)
def test_broken_members_fail_the_contract(member: Conditioner, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_conditioner(member)


def flow(conditioner: list[Conditioner], *, prefix: bool = True) -> Flow:
    blocks: list[nn.Module] = [
        TransformerBlock(2, 40, 1, Rotary((2, 2), text_axis=prefix), Affine(), conditioner if k else None, head_dim=20) for k in range(2)
    ]
    return perturb(Flow(blocks)).double()


def test_conditioners_of_a_third_party_compose_in_a_flow() -> None:
    model = flow([Style(3, 40), Pose(4, 40), ClassTable(5, 40)])
    assert set(model.fields) == {"style", "pose", "labels"}
    assert model.num_classes == 5
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 2, dtype=torch.float64, generator=generator)
    full = {
        "style": torch.tensor([0, 2]),
        "pose": torch.randn(2, 4, dtype=torch.float64, generator=generator),
        "labels": torch.tensor([4, 1]),
    }
    base = model(x, Condition(**full)).z
    for name in full:
        without = model(x, Condition(**{k: v for k, v in full.items() if k != name})).z
        assert not torch.allclose(without, base), name
    torch.testing.assert_close(model.inverse(base, Condition(**full)), x, atol=1e-10, rtol=0)
    null = Condition(style=torch.tensor([-1, -1]), pose=torch.zeros(2, 4, dtype=torch.float64), labels=torch.tensor([-1, -1]))
    assert torch.equal(model(x).z, model(x, null).z)
    assert not torch.allclose(model.inverse(x, Condition(**full), guidance=Linear(1.0)), model.inverse(x, Condition(**full)))


def test_dropped_rows_are_null_in_every_field() -> None:
    model = flow([Style(3, 40), ClassTable(5, 40)])
    x = torch.zeros(2, 4, 2, dtype=torch.float64)
    fields = {"style": torch.tensor([0, 2]), "labels": torch.tensor([4, 1])}
    half = model(x, Condition(**fields, dropped=torch.tensor([True, False]))).z
    assert torch.equal(half[0], model(x).z[0])
    assert torch.equal(half[1], model(x, Condition(**fields)).z[1])


def test_a_dense_field_takes_another_null() -> None:
    model = flow([Pose(4, 40)], prefix=False)
    x = torch.zeros(1, 4, 2, dtype=torch.float64)
    model.set_null(pose=torch.ones(4))
    assert torch.equal(model(x).z, model(x, Condition(pose=torch.ones(1, 4, dtype=torch.float64))).z)
    state = model.state_dict()
    again = flow([Pose(4, 40)], prefix=False)
    again.prepare_state(state)
    again.load_state_dict(state)
    assert torch.equal(again(x).z, model(x).z)
    with pytest.raises(ShapeError, match=r"null pose is \(4,\)"):
        model.set_null(pose=torch.ones(3))
    with pytest.raises(ConfigError, match="no null value"):
        model.set_null(style=torch.ones(3))


def test_prefixes_follow_each_other_in_the_declared_order() -> None:
    first, second = Style(3, 16), TextPrefix(6, 16)
    condition = Condition(style=torch.tensor([1]), text=torch.randn(1, 2, 6))
    parts = [first.prefix(condition), second.prefix(condition)]
    assert torch.equal(Joint([first, second]).prefix(condition), torch.cat(parts, 1))  # type: ignore[arg-type]  # there is a prefix
    assert torch.equal(Joint([second, first]).prefix(condition), torch.cat(parts[::-1], 1))  # type: ignore[arg-type]  # likewise


def test_one_field_is_declared_in_one_way() -> None:
    with pytest.raises(ConfigError, match="declare the same field differently"):
        Joint([ClassTable(5, 8), ClassToken(4, 8)])
    assert Joint([ClassTable(5, 8), ClassToken(5, 8)]).fields == (Field("labels", "index", 5),)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Condition(labels=torch.tensor([0, 9])), r"-1 \.\. 4"),
        (Condition(labels=torch.tensor([0.5, 1.0])), "of integers"),
        (Condition(style=torch.tensor([0, 1])), "conditioned on labels, pose"),
        (Condition(pose=torch.zeros(2, 3)), r"\(2, 4\)"),
        (Condition(labels=torch.tensor([0])), "1 rows for a batch of 2"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(given: Condition, message: str) -> None:
    fields = {"labels": Field("labels", "index", 5), "pose": Field("pose", "dense", 4)}
    with pytest.raises((ConfigError, ShapeError), match=message):
        resolve(given, 2, fields=fields, nulls={}, device=torch.device("cpu"))


def test_what_a_user_gives_becomes_fields() -> None:
    assert ClassTable(5, 8).from_user(3)["labels"].tolist() == [3]
    assert ClassTable(5, 8).from_user([3, 1])["labels"].tolist() == [3, 1]
    assert Pose(3, 8).from_user([0.0, 1.0, 2.0])["pose"].shape == (1, 3)
    for value in ("cat", [0.5], [True]):
        with pytest.raises(ConfigError, match="class ids"):
            ClassTable(5, 8).from_user(value)
    with pytest.raises(ConfigError, match="Give a Condition"):
        Joint([ClassTable(5, 8), Pose(3, 8)]).from_user([1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Field("labels", "index", 0), "at least one class"),
        (lambda: Field("pose", "dense", 0), "positive width"),
        (lambda: Field("pose", "dense", 3, mask="m"), "not a sequence"),
        (lambda: Field("dropped", "index", 3), "dropped rows"),
    ],
)
def test_fields_that_cannot_be_are_refused(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]  # a lambda


def test_a_condition_is_a_frozen_set_of_named_rows() -> None:
    condition = Condition(labels=torch.tensor([1, 2, 3]), pose=torch.zeros(3, 4), text=None)
    assert len(condition) == 3
    assert condition.text is None
    assert condition.index(slice(1, 2)).labels.tolist() == [2]  # type: ignore[union-attr]  # there are labels
    assert len(condition.cat(condition)) == 6
    for again in (copy.deepcopy(condition), pickle.loads(pickle.dumps(condition))):
        assert repr(again) == repr(condition) == "Condition(labels=(3,), pose=(3, 4))"
    with pytest.raises(AttributeError, match="does not change"):
        condition.labels = None  # type: ignore[misc]  # on purpose
    with pytest.raises(ShapeError, match="a row per sample"):
        Condition(labels=torch.tensor([1]), pose=torch.zeros(3, 4))
    with pytest.raises(ShapeError, match="cannot be joined"):
        condition.cat(Condition(labels=torch.tensor([1])))
