"""An optimizer is configured in YAML and changed on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml

from srcflow.cli.parser import Parser
from srcflow.learning_rates import WSD
from srcflow.tasks.optimization import Optimization


class Trained:
    """Something that is optimized."""

    def __init__(self, optimization: Optimization) -> None:
        self.optimization = optimization


SGD = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
KEY = "--model.optimization.optimizer"


def parsed(folder: Path, *args: str) -> Optimization:
    """What a configuration with stochastic gradient descent and these arguments gives."""
    content = {"model": {"class_path": f"{__name__}.Trained", "init_args": {"optimization": {"optimizer": SGD}}}}
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    parser = Parser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(Trained, "model")
    config = parser.parse_args(["--config", str(folder / "run.yaml"), *args])
    return parser.instantiate(config).model.optimization  # type: ignore[no-any-return]


def adam(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "torch.optim.Adam", **({"init_args": arguments} if arguments else {})}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], SGD),
        ([KEY, "torch.optim.Adam"], "torch.optim.Adam"),
        ([f"{KEY}=null"], None),
        ([KEY, '{"class_path": "torch.optim.Adam", "init_args": {"eps": 1e-3}}'], adam(eps=1e-3)),
        ([f"{KEY}.class_path", "torch.optim.Adam"], adam()),
        ([f"{KEY}.class_path", "torch.optim.Adam", f"{KEY}.init_args.eps", "1e-3"], adam(eps=1e-3)),
        ([f"{KEY}.init_args", "{momentum: 0.5, nesterov: true}"], {**SGD, "init_args": {"momentum": 0.5, "nesterov": True}}),
        ([f"{KEY}.init_args.nesterov", "true"], {**SGD, "init_args": {"momentum": 0.9, "nesterov": True}}),
        ([f"{KEY}.momentum=0.5"], {**SGD, "init_args": {"momentum": 0.5}}),
        (["--model.optimization", '{"optimizer": {"class_path": "torch.optim.Adam"}}'], adam()),
    ],
)
def test_arguments_change_what_stands_in_the_file(tmp_path: Path, arguments: list[str], expected: Any) -> None:
    assert parsed(tmp_path, *arguments).optimizer == expected


def test_a_schedule_is_named_by_its_class(tmp_path: Path) -> None:
    key = "--model.optimization.schedule"
    schedule = parsed(tmp_path, key, "WSD", f"{key}.decay_steps", "5").schedule
    assert isinstance(schedule, WSD)
    assert schedule.decay_steps == 5


def test_an_argument_that_the_optimizer_refuses_is_named(tmp_path: Path) -> None:
    for value in ("-1", "much"):
        with pytest.raises((jsonargparse.ArgumentError, ValueError), match="SGD refuses this"):
            parsed(tmp_path, f"{KEY}.init_args.momentum", value)
