"""The published models as compositions of the same parts. Each returns an untrained `Flow` (zero heads: the identity).

In YAML a preset is named by its full path: `class_path: srcflow.flows.presets.srcflow`.
"""

from __future__ import annotations

from typing import Literal

from srcflow.conditioners.base import Conditioner
from srcflow.conditioners.class_table import ClassTable
from srcflow.conditioners.class_token import ClassToken
from srcflow.conditioners.text_prefix import TextPrefix
from srcflow.couplings.additive import Additive
from srcflow.couplings.affine import Affine
from srcflow.couplings.base import Coupling
from srcflow.couplings.softplus_affine import SoftplusAffine
from srcflow.errors import ConfigError, one_of
from srcflow.flows.block import TransformerBlock
from srcflow.flows.denoiser import Denoiser
from srcflow.flows.flow import Flow
from srcflow.flows.normalization import ChannelNormalization, Normalization, Whitening
from srcflow.flows.positions import Learned, Rotary
from srcflow.nn.permutation import Order
from srcflow.registry import preset
from srcflow.types import Grid


def _grid(grid: int | Grid) -> Grid:
    return (grid, grid) if isinstance(grid, int) else (int(grid[0]), int(grid[1]))


@preset
def tarflow(
    grid: int | tuple[int, int],
    channels: int,
    width: int,
    blocks: int = 8,
    layers: int | list[int] = 8,
    num_classes: int = 0,
    head_dim: int = 64,
    expansion: float = 4.0,
    volume_preserving: bool = False,
) -> Flow:
    """TARFlow (arXiv 2412.06329): learned positions, shift start, exp scale, alternating orders, the class on every token of every block.

    Args:
        grid: token grid, a side or (rows, columns).
        channels: width d of a token (image channels times patch area).
        width: transformer width.
        blocks: number of blocks.
        layers: layers of each block, one number for all or a list.
        num_classes: classes; 0 for an unconditional model. The null class is the mean of the table.
        head_dim: width of an attention head.
        expansion: inner width of the MLP over `width`.
        volume_preserving: additive couplings with a learned prior (`nvp=False`).
    """
    g = _grid(grid)
    depths = _depths(layers, blocks)
    return Flow(
        [
            TransformerBlock(
                channels,
                width,
                depth,
                Learned(g, width),
                Additive() if volume_preserving else Affine(),
                ClassTable(num_classes, width, null="mean") if num_classes else None,
                start="shift",
                order="reverse" if k % 2 else "raster",
                head_dim=head_dim,
                expansion=expansion,
            )
            for k, depth in enumerate(depths)
        ],
        learn_prior=volume_preserving,
    )


@preset
def starflow(
    grid: int | tuple[int, int],
    channels: int,
    width: int = 3072,
    layers: list[int] | None = None,
    head_dim: int = 64,
    text_dim: int = 0,
    num_classes: int = 0,
    condition_blocks: Literal["deep", "all"] = "deep",
    clip: float = 4.0,
    deep_width: int | None = None,
    denoiser_layers: int = 0,
) -> Flow:
    """STARFlow (arXiv 2506.06276) as released: rotary positions, SOS, softplus scale, clip on both parameters, final norm, L2R orders.

    Args:
        grid: token grid, a side or (rows, columns).
        channels: width d of a token.
        width: transformer width.
        layers: layers of each block; None means the released image model's 2 2 2 2 2 24.
        head_dim: width of an attention head.
        text_dim: width of the text features put in front of the image; 0 for none.
        num_classes: classes, as a one-token prefix with a learned null; exclusive with text_dim.
        condition_blocks: whether the deep block or every block sees the condition.
        clip: soft clip of log-scale and shift.
        deep_width: width of the last block; None means `width`.
        denoiser_layers: layers of the learnable denoiser, which does not see the condition (published: 8); 0 for none.
    """
    one_of("starflow.condition_blocks", condition_blocks, ("deep", "all"))
    if text_dim and num_classes:
        raise ConfigError(
            "starflow.text_dim, num_classes", (text_dim, num_classes), "a model takes text or classes.", "Set one of the two to 0."
        )
    g = _grid(grid)
    depths = [2, 2, 2, 2, 2, 24] if layers is None else layers
    built = []
    for k, depth in enumerate(depths):
        last = k == len(depths) - 1
        w = deep_width if last and deep_width is not None else width
        conditioner: Conditioner | None = None
        if last or condition_blocks == "all":
            conditioner = TextPrefix(text_dim, w) if text_dim else ClassToken(num_classes, w) if num_classes else None
        built.append(
            TransformerBlock(
                channels,
                w,
                depth,
                Rotary(g, text_axis=bool(text_dim or num_classes)),
                SoftplusAffine(),
                conditioner,
                start="sos",
                order=_l2r(k),
                head_dim=head_dim,
                final_norm=True,
                clip=clip,
                clip_what="both",
            )
        )
    denoiser = None
    if denoiser_layers:
        denoiser = Denoiser(channels, width, Rotary(g, bool(text_dim or num_classes)), denoiser_layers, head_dim=head_dim, final_norm=True)
    return Flow(built, denoiser=denoiser)


@preset
def srcflow(
    grid: int | tuple[int, int],
    channels: int = 32,
    width: int = 2048,
    layers: list[int] | None = None,
    num_classes: int = 1000,
    head_dim: int = 64,
    condition: Literal["table", "token"] = "table",
    normalization: Literal["channel", "whitening", "none"] = "channel",
    coupling: Coupling | None = None,
    clip: float = 4.0,
    qk_norm: bool = False,
    mlp: Literal["gelu", "gated"] = "gelu",
    expansion: float = 4.0,
) -> Flow:
    """SRC-Flow's second stage (arXiv 2605.18267): STARFlow's deep-shallow flow over compact codes; the defaults are the 1.41B model.

    Differs from `starflow` in a normalisation of the codes as first layer, in clipping the log-scale only, and in adding the class to every
    token of the deep block.

    Args:
        grid: token grid, a side or (rows, columns).
        channels: code width d.
        width: transformer width.
        layers: layers of each block; None means 2 2 2 2 2 18. The last block is on the noise side.
        num_classes: classes; 0 for an unconditional model. Label -1 is a learned null.
        head_dim: width of an attention head.
        condition: the class as a "table" added to every token of the deep block, or as a one-"token" prefix.
        normalization: norm2 per "channel", full-covariance "whitening", or "none".
        coupling: the coupling of every block; None means `SoftplusAffine()`.
        clip: soft clip of the log-scale; 0 means none.
        qk_norm: normalise queries and keys.
        mlp: "gelu" or "gated".
        expansion: inner width of the MLP over `width`.
    """
    g = _grid(grid)
    depths = [2, 2, 2, 2, 2, 18] if layers is None else layers
    one_of("srcflow.condition", condition, ("table", "token"))
    makers = {"channel": ChannelNormalization, "whitening": Whitening}
    name = one_of("srcflow.normalization", normalization, (*makers, "none"))
    norm2: Normalization | None = makers[name](channels) if name in makers else None
    built = []
    for k, depth in enumerate(depths):
        conditioner: Conditioner | None = None
        if num_classes and k == len(depths) - 1:
            conditioner = ClassTable(num_classes, width, null="learned") if condition == "table" else ClassToken(num_classes, width)
        built.append(
            TransformerBlock(
                channels,
                width,
                depth,
                Rotary(g, text_axis=bool(num_classes) and condition == "token"),
                SoftplusAffine() if coupling is None else coupling,
                conditioner,
                start="sos",
                order=_l2r(k, len(depths)),
                head_dim=head_dim,
                final_norm=True,
                clip=clip,
                qk_norm=qk_norm,
                mlp=mlp,
                expansion=expansion,
            )
        )
    return Flow(built, norm2)


def _depths(layers: int | list[int], blocks: int) -> list[int]:
    if isinstance(layers, int):
        return [layers] * blocks
    if len(layers) == 1:
        return list(layers) * blocks
    if len(layers) != blocks:
        raise ConfigError("layers", layers, f"names {len(layers)} blocks, blocks = {blocks}.", "Give one number, or one per block.")
    return list(layers)


def _l2r(k: int, blocks: int | None = None) -> Order:
    """Alternating orders; reversed for even k (the released L2R), or, given `blocks`, such that the last block runs in raster order."""
    if blocks is None:
        return "raster" if k % 2 else "reverse"
    return "raster" if (blocks - 1 - k) % 2 == 0 else "reverse"
