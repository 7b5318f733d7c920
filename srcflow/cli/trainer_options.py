"""What Lightning refuses of `trainer` and `seed_everything`, as errors that name the key, the value and the cure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from srcflow.cli.foreign import sentence
from srcflow.errors import ConfigError, Problems

SEEDS = 2**32 - 1
"""The largest seed that NumPy takes."""
LEAST = {"accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "num_nodes": 1, "max_steps": -1, "max_epochs": -1}
"""Numbers that Lightning takes and divides by, or loops over."""
CURES = {
    "accelerator": "Write cpu or auto, or gpu on a machine that has one.",
    "devices": 'Write a number of at least 1, or "auto"; on GPUs also a list of their numbers.',
    "strategy": "Write auto, ddp, or class_path: ModelParallelStrategy (configs/trainer/).",
    "precision": "Write 32-true or bf16-mixed.",
    "num_nodes": "Write how many machines take part, at least 1.",
}
SIGNS = (
    (r"gpu backend|CUDA|MPS|accelerator|torch_xla|TPU", "accelerator"),
    (r"Timer|duration", "max_time"),
    (r"device", "devices"),
    (r"strateg", "strategy"),
    (r"precision|dtype", "precision"),
)
"""What Lightning's messages say of a key that they do not name."""


def check(config: Mapping[str, Any]) -> None:
    """Refuse numbers that Lightning would stumble over later, or with a traceback.

    Args:
        config: the configuration of one of the trainer's commands.

    Raises:
        ConfigError: names the key, or ProblemsError for several.
    """
    problems = Problems()
    seed = config.get("seed_everything")
    if isinstance(seed, int) and not isinstance(seed, bool) and not 0 <= seed <= SEEDS:
        problems.add(ConfigError("seed_everything", seed, f"a seed lies between 0 and {SEEDS}.", "Write another, or true to draw one."))
    trainer = config.get("trainer") or {}
    for key, least in LEAST.items():
        value = trainer.get(key)
        if isinstance(value, int) and value < least:
            cure = " (-1: without an end)" if least < 0 else ""
            problems.add(ConfigError(f"trainer.{key}", value, f"must be at least {least}{cure}."))
    problems.raise_if_any()


def refused(error: Exception, trainer: Mapping[str, Any]) -> ConfigError:
    """Lightning's refusal of an option of the Trainer, as an error that names the key.

    Args:
        error: what the Trainer's constructor raised.
        trainer: the constructor's arguments.
    """
    text = sentence(error)
    places = [
        (rank, found.start(), key)
        for key in trainer
        for rank, pattern in enumerate((rf"\b{key}=", rf"`{key}`", rf"\b{key}\b"))
        if (found := re.search(pattern, text))
    ]
    key = min(places)[2] if places else next((k for sign, k in SIGNS if re.search(sign, text, re.I)), "")
    if not key:
        return ConfigError("trainer", "its options", text)
    value = trainer.get(key)
    return ConfigError(f"trainer.{key}", value.get("class_path", "...") if isinstance(value, dict) else value, text, CURES.get(key, ""))
