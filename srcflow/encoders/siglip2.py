"""SigLIP 2."""

from __future__ import annotations

from typing import Any, Literal

from srcflow.encoders.timm_vit import TimmViT
from srcflow.errors import ConfigError
from srcflow.nn.patchify import pair

_TRAINED_AT = {"base": (224, 256, 384, 512), "large": (256, 384, 512), "so400m": (256, 384, 512), "giantopt": (256, 384)}


class SigLIP2(TimmViT):
    """SigLIP 2, patch 16, no prefix tokens, tanh GELU (Tschannen et al. 2025).

    Args:
        size: the model's size.
        image_size: what images are resized to inside, one number or [height, width], multiples of 16. The weights trained at this size are
            taken; at another one those of 256 px, their position table resampled without antialias.
        weights: "hub" (timm's copy of the published weights), the path of a safetensors file in timm's layout, the directory that
            `srcflow convert encoder` wrote, or null for random weights.
        last_layers: the tokens are the sum of the last k blocks' outputs (see TimmViT).
        timm_args: further arguments of the timm model, e.g. to build a small one.
        norm_eps: epsilon of every LayerNorm; null: 1e-6.
        act_layer: activation of the MLPs as timm calls it ("gelu", "gelu_tanh"); null: the published model's, "gelu_tanh".
    """

    def __init__(
        self,
        size: Literal["base", "large", "so400m", "giantopt"] = "base",
        image_size: int | tuple[int, int] = 256,
        weights: str | None = "hub",
        last_layers: int = 1,
        timm_args: dict[str, Any] | None = None,
        norm_eps: float | None = None,
        act_layer: str | None = None,
    ) -> None:
        if size not in _TRAINED_AT:
            raise ConfigError("encoder.size", size, "no such size of SigLIP 2.", f"Known: {', '.join(_TRAINED_AT)}.")
        height, width = pair(image_size, "encoder.image_size")
        native = height if height == width and height in _TRAINED_AT[size] else 256
        super().__init__(
            f"vit_{size}_patch16_siglip_{native}.v2_webli",
            (height, width),
            weights,
            last_layers,
            norm_eps=norm_eps,
            antialias=False,
            act_layer=act_layer or "gelu_tanh",  # the published model's; timm's default for the base size is the erf form
            timm_args=timm_args,
        )
