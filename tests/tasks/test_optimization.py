"""Optimizers and schedules by class path, with the parameter groups, the checks and the rates that belong to them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from srcflow.errors import CheckpointError, ConfigError, ProblemsError, UnknownNameError
from srcflow.learning_rates import WSD, Constant, Cosine, LearningRateSchedule
from srcflow.tasks.optimization import DEFAULT, Optimization


class Halving(LearningRateSchedule):
    """A schedule of somebody else."""

    def share(self, step: int, *, warmup: int, total: int) -> float:
        return 0.5 ** (step - warmup)


class Sign(torch.optim.Optimizer):
    """An optimizer of somebody else, with a required argument and no weight decay."""

    def __init__(self, params: Any, lr: float, scale: float) -> None:
        super().__init__(params, {"lr": lr, "scale": scale})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * group["scale"] * p.grad.sign())


class Rateless(torch.optim.SGD):
    """One without lr."""

    def __init__(self, params: Any, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=0.1, weight_decay=weight_decay)


def ones() -> nn.Linear:
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    return model


def one_step(settings: Optimization, gradient: float) -> dict[str, float]:
    """Where a linear layer of ones is after one step."""
    model = ones()
    optimizer = settings.build_optimizer(model.parameters())
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    optimizer.step()
    return {k: float(p.detach().flatten()[0]) for k, p in model.named_parameters()}


# --- schedules ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [None, Cosine(), Constant(), WSD(decay_steps=3), Halving()], ids=str)
def test_the_scheduler_sets_the_rates_of_the_formula(schedule: LearningRateSchedule | None) -> None:
    low = None if isinstance(schedule, Constant) else 0.01
    settings = Optimization(learning_rate=0.1, min_learning_rate=low, warmup_steps=2, schedule=schedule)
    optimizer = settings.build_optimizer([nn.Parameter(torch.ones(1))])
    scheduler = settings.scheduler(optimizer, 6)
    seen = []
    for _ in range(8):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx([settings.learning_rate_at(n, 6) for n in range(8)])
    expected = (schedule or Cosine())(4, peak=0.1, minimum=low or 0.0, warmup=2, total=6)
    assert settings.learning_rate_at(4, 6) == expected


def test_without_a_minimum_the_default_is_the_schedules() -> None:
    assert DEFAULT.learning_rate_at(10, 10) == 1e-6
    assert Optimization(schedule=WSD()).learning_rate_at(10, 10) == 1e-6
    constant = Optimization(learning_rate=1e-7, warmup_steps=2, schedule=Constant())  # lower than the default minimum of others
    assert [constant.learning_rate_at(n, 4) for n in range(4)] == [0.0, 5e-8, 1e-7, 1e-7]
    with pytest.raises(ConfigError, match="min_learning_rate = 1e-06: must lie between 0 and learning_rate = 1e-07"):
        Optimization(learning_rate=1e-7)


@pytest.mark.parametrize("minimum", [0.0, 1e-6])
def test_a_minimum_that_has_no_effect_is_refused(minimum: float) -> None:
    with pytest.raises(ConfigError, match=r"optimization\.min_learning_rate = .* has no effect with the schedule Constant\. Remove it"):
        Optimization(min_learning_rate=minimum, schedule=Constant())


def test_a_schedule_longer_than_the_run_is_refused_unless_only_a_part_is_run() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], 1.0)
    warm, wsd = Optimization(warmup_steps=10), Optimization(warmup_steps=4, schedule=WSD(decay_steps=7))
    for settings, said in ((warm, r"optimization\.warmup_steps = 10"), (wsd, r"optimization\.schedule\.decay_steps = 7")):
        with pytest.raises(ConfigError, match=said):
            settings.scheduler(optimizer, 10)
        settings.scheduler(copy.deepcopy(optimizer), 11)
        settings.scheduler(copy.deepcopy(optimizer), 1, whole=False)
    with pytest.raises(ConfigError, match=r"^discriminator\.warmup_steps = 10"):
        warm.check(10, "discriminator")


# --- optimizers --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "expected"), [("all", {"weight", "bias"}), ("matrices", {"weight"})])
@pytest.mark.parametrize("optimizer", [None, "torch.optim.SGD"])
def test_what_decays(decay: str, expected: set[str], optimizer: str | None) -> None:
    model = ones()
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    settings = Optimization(learning_rate=0.1, weight_decay=0.5, decay=decay, optimizer=optimizer)  # type: ignore[arg-type]
    built = settings.build_optimizer([*model.parameters(), frozen])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    built.step()
    moved = {k for k, p in model.named_parameters() if not torch.equal(p, torch.ones_like(p))}
    assert moved == expected
    assert sum(len(g["params"]) for g in built.param_groups) == 2


def test_by_default_it_is_adamw_as_ever() -> None:
    group = Optimization(learning_rate=0.1, weight_decay=0.5).build_optimizer(ones().parameters()).state_dict()["param_groups"][0]
    old = torch.optim.AdamW([{"params": [*ones().parameters()], "weight_decay": 0.5}], lr=0.1, betas=(0.9, 0.95))
    assert group == old.state_dict()["param_groups"][0]
    assert Optimization(betas=(0.5, 0.6)).build_optimizer(ones().parameters()).param_groups[0]["betas"] == (0.5, 0.6)


def test_another_optimizer_steps_with_its_arguments_the_rate_and_the_decay() -> None:
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9, "nesterov": True}}
    moved = one_step(Optimization(learning_rate=0.1, weight_decay=0.5, decay="matrices", optimizer=sgd), gradient=2.0)
    assert moved["weight"] == pytest.approx(1 - 0.1 * 1.9 * (2 + 0.5))  # nesterov's first step is 1 + momentum gradients
    assert moved["bias"] == pytest.approx(1 - 0.1 * 1.9 * 2)
    assert one_step(Optimization(learning_rate=0.1, optimizer="SGD"), gradient=2.0)["bias"] == pytest.approx(0.8)
    own = {"class_path": f"{__name__}.Sign", "init_args": {"scale": 3.0}}
    assert Sign.__module__ == __name__
    assert one_step(Optimization(learning_rate=0.1, optimizer=own), gradient=-5.0)["weight"] == pytest.approx(1.3)


@pytest.mark.parametrize("name", ["Adam", "Adafactor", "RAdam", "NAdam", "RMSprop", "Adagrad", "Rprop", "Muon"])
def test_optimizers_of_pytorch_train_a_matrix(name: str) -> None:
    weight = nn.Parameter(torch.full((2, 3), 2.0))
    optimizer = Optimization(learning_rate=0.05, optimizer=f"torch.optim.{name}").build_optimizer([weight])
    before = float(weight.detach().square().sum())
    for _ in range(5):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    assert float(weight.detach().square().sum()) < before


def test_arguments_for_another_device_are_kept() -> None:
    optimizer = {"class_path": "Adam", "init_args": {"capturable": True}}
    with torch.device("meta"):  # as `srcflow plan` builds a run
        settings = Optimization(optimizer=optimizer)
    assert settings.build_optimizer(ones().parameters()).param_groups[0]["capturable"] is True


SGD = "torch.optim.SGD"


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        ({"class_path": SGD, "init_args": {"momentun": 0.9}}, r"init_args\.momentun = 0\.9: torch\.optim\.SGD .*Did you mean momentum"),
        ({"class_path": SGD, "init_args": {"momentum": -1}}, r"init_args = .*: torch\.optim\.SGD refuses this: Invalid momentum"),
        ({"class_path": SGD, "init_args": {"momentum": "much"}}, r"torch\.optim\.SGD refuses this"),
        ({"class_path": SGD, "init_args": {"lr": 0.1}}, r"init_args\.lr = 0\.1: is not given here\. Set optimization\.learning_rate"),
        ({"class_path": SGD, "init_args": {"weight_decay": 0.1}}, r"Set optimization\.weight_decay"),
        ({"class_path": SGD, "init_args": {"params": []}}, "Remove it"),
        ({"class_path": SGD, "init_args": [0.9]}, r"optimizer\.init_args = \[0\.9\]: arguments are a mapping"),
        ({"class_path": SGD, "momentum": 0.9}, "Move momentum into init_args"),
        ({"init_args": {}}, "Name the class in class_path"),
        ("torch.nn.Linear", "is not an optimizer"),
        ("torch.optim.Optimizer", "is not an optimizer"),
        ("srcflow_nowhere.Optimizer", "cannot be imported: No module named 'srcflow_nowhere'"),
        ("torch.optim.LBFGS", "evaluates the loss several times"),
        ("torch.optim.SparseAdam", "does not support dense gradients"),
        (f"{__name__}.Rateless", "takes no lr"),
        (f"{__name__}.Sign", "refuses this: .*missing 1 required positional argument: 'scale'"),
    ],
)  # fmt: skip
def test_an_optimizer_that_cannot_be_used_is_refused_where_it_is_named(optimizer: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as e:
        Optimization(optimizer=optimizer)
    assert e.value.key.startswith("optimization.optimizer")
    assert e.value.cure


def test_a_misspelt_optimizer_has_a_proposal() -> None:
    for name, near in (("AdanW", "Did you mean AdamW"), ("torch.optim.SDG", r"Did you mean torch\.optim\.SGD")):
        with pytest.raises(UnknownNameError, match=near) as e:
            Optimization(optimizer=name)
        assert "LBFGS" not in str(e.value)


def test_options_without_effect_on_another_optimizer_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimization\.betas = .* no effect on torch\.optim\.SGD.* Remove it, or write null"):
        Optimization(betas=(0.9, 0.95), optimizer=SGD)
    with pytest.raises(ConfigError, match=r"Set optimization\.optimizer\.init_args\.betas"):
        Optimization(betas=(0.9, 0.95), optimizer="torch.optim.AdamW")
    with pytest.raises(ProblemsError) as e:
        Optimization(weight_decay=0.1, decay="matrices", optimizer="torch.optim.Rprop")
    for key in ("weight_decay = 0.1", "decay = 'matrices'"):
        assert f"optimization.{key}: torch.optim.Rprop knows no weight decay" in str(e.value)


def test_an_optimizer_that_does_not_take_the_model_is_refused_before_training() -> None:
    settings = Optimization(optimizer="torch.optim.Muon")
    with pytest.raises(
        ConfigError, match=r"optimization\.optimizer = 'torch\.optim\.Muon': does not take the parameters of this model.*2D"
    ):
        settings.build_optimizer(ones().parameters())


def test_the_state_of_another_optimizer_is_refused_and_its_own_is_taken() -> None:
    names = (None, "torch.optim.AdamW", SGD, "torch.optim.Adamax")
    states = []
    for name in names:
        model = ones()
        optimizer = Optimization(learning_rate=0.1, optimizer=name).build_optimizer(model.parameters())
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        states.append(optimizer.state_dict())
    kinds = (0, 0, 1, 2)
    for i, a in enumerate(names):
        for j, state in enumerate(states):
            optimizer = Optimization(optimizer=a).build_optimizer(ones().parameters())
            if kinds[i] == kinds[j]:
                optimizer.load_state_dict(state)
                assert optimizer.param_groups[0]["lr"] == 0.1
            else:
                with pytest.raises(CheckpointError, match=r"the checkpoint holds the state of torch\.optim\.\w+, and this run trains with"):
                    optimizer.load_state_dict(state)


def test_bad_settings_are_named_together() -> None:
    with pytest.raises(ProblemsError) as e:
        Optimization(learning_rate=-1.0, weight_decay=-0.1, max_bad_steps=0, optimizer="AdanW")
    for key in ("learning_rate", "weight_decay", "max_bad_steps", "optimizer"):
        assert f"optimization.{key}" in str(e.value)
    with pytest.raises(ConfigError, match="min_learning_rate"):
        Optimization(learning_rate=1e-5, min_learning_rate=1e-4)
