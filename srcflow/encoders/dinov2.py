"""DINOv2 with registers."""

from __future__ import annotations

from typing import Any, Literal

from srcflow.encoders.timm_vit import TimmViT
from srcflow.errors import ConfigError


class DINOv2(TimmViT):
    """DINOv2 with four registers (or none), patch 14 (Oquab et al. 2023, Darcet et al. 2024): the encoder of RAE and SRC-Flow.

    Images of 256 px are resized to 224 and give 16 x 16 tokens; 512 px go with `image_size: 448` and give 32 x 32.

    Args:
        size: the model's size.
        image_size: what images are resized to inside, one number or [height, width], multiples of 14.
        weights: "hub" (timm's copy of the published weights), the path of a safetensors file in timm's layout, the directory that
            `srcflow convert encoder` wrote, or null for random weights.
        last_layers: the tokens are the sum of the last k blocks' outputs (see TimmViT).
        timm_args: further arguments of the timm model, e.g. to build a small one.
        norm_eps: epsilon of every LayerNorm; null: 1e-6.
        act_layer: activation of the MLPs as timm calls it ("gelu", "gelu_tanh"); null: the published model's, "gelu" (giant: SwiGLU).
        registers: 4, or 0 for the models without registers, whose position table is resampled without antialias.
    """

    def __init__(
        self,
        size: Literal["small", "base", "large", "giant"] = "base",
        image_size: int | tuple[int, int] = 224,
        weights: str | None = "hub",
        last_layers: int = 1,
        timm_args: dict[str, Any] | None = None,
        norm_eps: float | None = None,
        act_layer: str | None = None,
        registers: Literal[0, 4] = 4,
    ) -> None:
        sizes = ("small", "base", "large", "giant")
        if size not in sizes:
            raise ConfigError("encoder.size", size, "no such size of DINOv2.", f"Known: {', '.join(sizes)}.")
        if registers not in (0, 4):
            raise ConfigError("encoder.registers", registers, "there is no such DINOv2.", "Known: 0, 4.")
        super().__init__(
            f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2.lvd142m",
            image_size,
            weights,
            last_layers,
            norm_eps=norm_eps,
            antialias=bool(registers),
            act_layer=act_layer,
            timm_args=timm_args,
        )
        self.registers = registers
