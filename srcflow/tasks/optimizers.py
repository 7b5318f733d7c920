"""Any optimizer by its class path: found, and tried on one small parameter, before anything is trained."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from srcflow.errors import CheckpointError, ConfigError, SrcflowError, UnknownNameError

ELSEWHERE = {"lr": "learning_rate", "weight_decay": "weight_decay", "params": None}
"""Arguments of an optimizer, and the option of `optimization` that gives them."""
HARDWARE = ("capturable", "fused")
"""Arguments that say which kernels run; the trial is on the CPU, the training need not be."""
UNUSABLE = ("Optimizer", "LBFGS", "SparseAdam")
"""Names in torch.optim that no message proposes: they are refused for what they do."""
MARK = "srcflow_class"
"""Key of a parameter group, and so of a checkpoint, under which the class's name stands where it is not AdamW."""


@dataclass(frozen=True)
class Choice:
    """An optimizer class and its arguments, besides parameters, learning rate and weight decay."""

    cls: type[torch.optim.Optimizer]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        """Import path; the public one for PyTorch's own."""
        own = getattr(torch.optim, self.cls.__name__, None) is self.cls
        return f"torch.optim.{self.cls.__name__}" if own else f"{self.cls.__module__}.{self.cls.__qualname__}"

    @property
    def decays(self) -> bool:
        """Whether it knows weight decay."""
        return "weight_decay" in inspect.signature(self.cls).parameters

    def build(self, groups: list[dict[str, Any]], learning_rate: float) -> torch.optim.Optimizer:
        """The optimizer over parameter groups; it refuses the state of another class (see `check_state`)."""
        if not self.decays:
            groups = [{k: v for k, v in g.items() if k != "weight_decay"} for g in groups]
        if self.cls is not torch.optim.AdamW:
            groups = [{**g, MARK: self.name} for g in groups]
        cls: Any = self.cls
        optimizer: torch.optim.Optimizer = cls(groups, lr=learning_rate, **self.arguments)
        optimizer.register_load_state_dict_pre_hook(check_state)
        return optimizer

    def check(self, key: str, learning_rate: float, weight_decay: float) -> None:
        """Build it on one small matrix and make a step.

        Raises:
            ConfigError: that cannot be done, or it needs more than one evaluation of the loss per step.
        """
        closure = inspect.signature(self.cls.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            why = "evaluates the loss several times in one step, and training here does it once."
            raise ConfigError(key, self.name, why, "Name another optimizer.")
        try:
            with torch.device("cpu"), torch.enable_grad(), torch.inference_mode(False):
                parameter = nn.Parameter(torch.ones(2, 2))
                parameter.grad = torch.ones(2, 2)
                group = {"params": [parameter], "weight_decay": weight_decay}
                portable = {k: v for k, v in self.arguments.items() if k not in HARDWARE}
                Choice(self.cls, portable).build([group], learning_rate).step()
        except Exception as e:  # whatever a class raises for arguments that do not suit it
            given = self.arguments or self.name
            place = f"{key}.init_args" if self.arguments else key
            raise ConfigError(place, given, f"{self.name} refuses this: {_text(e)}.", f"See the documentation of {self.name}.") from e


def choose(spec: str | Mapping[str, Any], key: str) -> Choice:
    """The class and the arguments that a specification names.

    Args:
        spec: a class path, or `{"class_path": ..., "init_args": {...}}`; the name alone will do for the classes of torch.optim.
        key: where it stands in the configuration, for messages.

    Raises:
        UnknownNameError: torch.optim has no such class.
        ConfigError: no optimizer, or arguments that it does not take or that stand elsewhere in the configuration.
    """
    given: Mapping[str, Any] = {"class_path": spec} if isinstance(spec, str) else spec
    unknown = sorted(set(given) - {"class_path", "init_args"})
    if unknown or not isinstance(given.get("class_path"), str):
        cure = f"Move {', '.join(unknown)} into init_args." if unknown else "Name the class in class_path, e.g. torch.optim.SGD."
        raise ConfigError(key, spec, "a specification has the keys class_path and init_args.", cure)
    arguments = given.get("init_args") or {}
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"{key}.init_args", arguments, "arguments are a mapping of names to values.", "Write e.g. {momentum: 0.9}.")
    choice = Choice(_import(given["class_path"], key), dict(arguments))
    taken = inspect.signature(choice.cls).parameters
    if "lr" not in taken:
        raise ConfigError(key, choice.name, "takes no lr, so no schedule could act on it.", "Name another optimizer.")
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    for name, value in choice.arguments.items():
        where = f"{key}.init_args.{name}"
        if name in ELSEWHERE:
            section, option = key.rpartition(".")[0], ELSEWHERE[name]
            raise ConfigError(where, value, "is not given here.", f"Set {section}.{option}." if option else "Remove it.")
        if name not in taken and not open_ended:
            options = [n for n in taken if n not in ELSEWHERE]
            near = "".join(f"Did you mean {n}? " for n in difflib.get_close_matches(name, options, n=1))
            raise ConfigError(where, value, f"{choice.name} takes no such argument.", f"{near}It takes: {', '.join(options)}.")
    return choice


def _import(path: str, key: str) -> type[torch.optim.Optimizer]:
    module, _, name = path.rpartition(".")
    if module in ("", "torch.optim") and not hasattr(torch.optim, name):
        known = [n for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)]
        raise UnknownNameError(key, path, [f"{module}.{n}" if module else n for n in known if n not in UNUSABLE])
    try:
        found = getattr(importlib.import_module(module or "torch.optim"), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise ConfigError(key, path, f"cannot be imported: {e}.", "Write the import path of a class, e.g. torch.optim.SGD.") from e
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)) or found is torch.optim.Optimizer:
        raise ConfigError(key, path, "is not an optimizer.", "Name a subclass of torch.optim.Optimizer, e.g. torch.optim.SGD.")
    return found


def check_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Refuse a checkpoint's state of another class: PyTorch would take it, and fail or compute something else later.

    Raises:
        CheckpointError: it is.
    """
    default = "torch.optim.AdamW"
    stored, own = (next((g.get(MARK, default) for g in groups), default) for groups in (state["param_groups"], optimizer.param_groups))
    if stored != own:
        raise CheckpointError(
            f"the checkpoint holds the state of {stored}, and this run trains with {own}. Write the optimizer that the run began with "
            "(optimization.optimizer; null is AdamW), or begin a new run."
        )


def refused(error: Exception, choice: Choice, key: str) -> SrcflowError:
    """What to say where an optimizer that passed its trial does not take a model's parameters."""
    return ConfigError(key, choice.name, f"does not take the parameters of this model: {_text(error)}.", "Name another optimizer.")


def _text(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().rstrip(".")
