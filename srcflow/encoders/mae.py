"""Masked autoencoders' encoder."""

from __future__ import annotations

from typing import Any, Literal

from srcflow.encoders.timm_vit import TimmViT
from srcflow.errors import ConfigError

_NAMES = {"base": "vit_base_patch16_224.mae", "large": "vit_large_patch16_224.mae", "huge": "vit_huge_patch14_224.mae"}


class MAE(TimmViT):
    """The encoder of a masked autoencoder (He et al. 2022) without masking: patch 16 (huge: 14), one class token, removed.

    The weights were trained at 224 px; their position table is resampled without antialias, and LayerNorms have epsilon 1e-12.

    Args:
        size: the model's size.
        image_size: what images are resized to inside, one number or [height, width], multiples of the patch.
        weights: "hub" (timm's copy of the published weights), the path of a safetensors file in timm's layout, the directory that
            `srcflow convert encoder` wrote, or null for random weights.
        last_layers: the tokens are the sum of the last k blocks' outputs (see TimmViT).
        timm_args: further arguments of the timm model, e.g. to build a small one.
        norm_eps: epsilon of every LayerNorm; null: 1e-12.
        act_layer: activation of the MLPs as timm calls it ("gelu", "gelu_tanh"); null: the published model's, "gelu".
    """

    def __init__(
        self,
        size: Literal["base", "large", "huge"] = "base",
        image_size: int | tuple[int, int] = 256,
        weights: str | None = "hub",
        last_layers: int = 1,
        timm_args: dict[str, Any] | None = None,
        norm_eps: float | None = None,
        act_layer: str | None = None,
    ) -> None:
        if size not in _NAMES:
            raise ConfigError("encoder.size", size, "no such size of MAE.", f"Known: {', '.join(_NAMES)}.")
        super().__init__(
            _NAMES[size],
            image_size,
            weights,
            last_layers,
            norm_eps=1e-12 if norm_eps is None else norm_eps,
            antialias=False,
            act_layer=act_layer,
            timm_args=timm_args,
        )
