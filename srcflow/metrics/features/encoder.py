"""Features of any registered encoder, for Frechet distances where Inception is not at hand, or as a second opinion."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor

from srcflow.encoders.base import Encoder
from srcflow.errors import ConfigError, ShapeError
from srcflow.metrics.features.base import Extractor
from srcflow.metrics.features.quantisation import to_uint8
from srcflow.nn.unregistered import Unregistered
from srcflow.registry import spec_of


class EncoderFeatures(Extractor):
    """One vector per image from an encoder's tokens. It must not be the network that made the codes it judges.

    Images are quantised to 8 bits first; the network runs in float32, without autocast. The name is written from the encoder's whole
    specification, so two settings never share one, nor do they share Inception's.

    Args:
        encoder: the frozen encoder.
        pool: "mean" over tokens, or "mean_std": mean and standard deviation over tokens side by side, which also sees how features spread.
    """

    def __init__(self, encoder: Encoder, pool: Literal["mean", "mean_std"] = "mean") -> None:
        super().__init__()
        if pool not in ("mean", "mean_std"):
            raise ConfigError("extractor.pool", pool, "no such pooling.", "Known: mean, mean_std.")
        self.encoder, self.pool = Unregistered(encoder), pool
        self.dim = encoder.dim * (2 if pool == "mean_std" else 1)
        self.name = _name_of(encoder) + ("" if pool == "mean" else f"/{pool}")

    def setup(self) -> None:
        """See `Extractor.setup`."""
        self.encoder.module.setup()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """See `Extractor.forward`."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ShapeError(f"images have shape {tuple(images.shape)}; (B, 3, H, W) is wanted.")
        quantised = to_uint8(images).to(self.encoder.dtype) / 255
        with torch.autocast(images.device.type, enabled=False):
            tokens, _ = self.encoder(quantised)
            tokens = tokens.float()
            mean = tokens.mean(1)
            return mean if self.pool == "mean" else torch.cat([mean, tokens.std(1, correction=0)], dim=1)


def _name_of(encoder: Encoder) -> str:
    """The encoder's specification as `Name(key=value,...)`: its first argument, and the others that differ from their defaults."""
    spec = spec_of(encoder)
    cls = type(encoder)
    defaults = {}
    if spec["class_path"] == f"{cls.__module__}.{cls.__qualname__}":  # not a preset's
        parameters = list(inspect.signature(cls.__init__).parameters.values())[2:]  # without self and the first
        defaults = {p.name: _listed(p.default) for p in parameters}
    given = {k: v for k, v in spec["init_args"].items() if k not in defaults or v != defaults[k]}
    return _written({"class_path": spec["class_path"], "init_args": given})


def _written(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        path = str(value["class_path"])
        name = path.rpartition(".")[2] if path.startswith("srcflow.") else path  # another distribution's class may have our class's name
        return f"{name}({','.join(f'{k}={_written(v)}' for k, v in value['init_args'].items())})"
    return str(value).replace(" ", "")


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
