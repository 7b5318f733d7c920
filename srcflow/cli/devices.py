"""The device that a command computes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcflow.errors import ConfigError

if TYPE_CHECKING:
    import torch


def device_of(name: str | None, key: str = "device") -> torch.device:
    """The device with this name; without one a GPU, if there is one, or else the CPU.

    Args:
        name: as torch writes it: cpu, cuda, cuda:1.
        key: the option, for messages.

    Raises:
        ConfigError: there is no such device on this machine.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError) as e:
        raise ConfigError(key, name, "is not a device.", "Write cpu, cuda, or cuda:0 for the first of several GPUs.") from e
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ConfigError(key, name, "there is no GPU that torch can use.", "Write cpu, or leave it out.")
        if (device.index or 0) >= count:
            have, last = ("1 GPU", "cuda:0") if count == 1 else (f"{count} GPUs", f"a number up to cuda:{count - 1}")
            raise ConfigError(key, name, f"this machine has {have}.", f"Write {last}.")
    elif device.type != "cpu":
        try:
            torch.zeros(1, device=device).cpu()
        except Exception as e:  # every backend has its own
            raise ConfigError(key, name, "torch cannot compute on it here.", "Write cpu or cuda, or leave it out.") from e
    return device
