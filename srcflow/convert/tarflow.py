"""TARFlow's published weights as a `Flow`, and back. GS-Jacobi's weights have the same form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from srcflow.conditioners.class_table import ClassTable
from srcflow.convert.config import Sizes, known
from srcflow.convert.state import Rule, precision
from srcflow.convert.trunks import (
    UNUSED,
    Shown,
    State,
    check_expansion,
    check_side,
    layers_of,
    load_with,
    patch_size_of,
    trunk_rules,
    used,
)
from srcflow.couplings.additive import Additive
from srcflow.couplings.affine import Affine
from srcflow.errors import ConfigError, WeightsError
from srcflow.flows.block import TransformerBlock
from srcflow.flows.flow import Flow
from srcflow.flows.positions import Learned


@known
def tarflow(
    state_dict: State,
    *,
    in_channels: int | None = None,
    img_size: int | None = None,
    patch_size: int | None = None,
    channels: int | None = None,
    num_blocks: int | None = None,
    layers_per_block: int | Sequence[int] | None = None,
    nvp: bool = True,
    num_classes: int | None = None,
    head_dim: int = 64,
    expansion: float | None = None,
) -> Flow:
    """TARFlow (arXiv 2412.06329; E5, E7, E11, E17) from a state dict of its published code.

    Its tokens are `patchify(images, patch_size, order="cpp")` of images in [-1, 1]; published `reverse(noise)` is
    `flow.inverse(noise * flow.prior_std)`.

    Args:
        state_dict: the published weights.
        in_channels: image channels; checked against the tokens' width.
        img_size: side of the images.
        patch_size: side of a patch.
        channels: width of the transformers.
        num_blocks: number of blocks.
        layers_per_block: layers of every block.
        nvp: False for volume-preserving models with a learned prior variance.
        num_classes: classes; 0 for an unconditional model.
        head_dim: width of an attention head.
        expansion: inner width of the MLP over the outer.

    Returns:
        The flow in eval mode on the CPU, in float32, or in float64 if the weights are.

    Raises:
        ConfigError: a value contradicts the weights.
        WeightsError: keys are missing, unknown or misshaped.
    """
    sizes, show = Sizes("tarflow"), Shown(state_dict, "TARFlow")
    blocks = sizes.take("num_blocks", num_blocks, show.blocks)
    depth = max(show.layers(f"blocks.{k}") for k in range(blocks))  # all have the same number
    layers_of(sizes, layers_per_block, [depth] * blocks)
    shown = show.size(("proj_in.weight", 0), ("proj_out.weight", 1), ("pos_embed", 1))
    width = show.sure(sizes.take("channels", channels, shown) if shown else None, channels, "channels")
    shown = show.size(("proj_in.weight", 1))
    given = None if in_channels is None or patch_size is None else in_channels * patch_size**2
    token = show.sure(shown, given, "in_channels")
    patch = patch_size_of(sizes, in_channels, patch_size, token)
    positions = show.sure(show.size(("pos_embed", 0)), (img_size // patch) ** 2 if img_size and patch else None, "img_size")
    side = math.isqrt(positions)
    if side * side != positions:
        raise WeightsError(f"TARFlow: the position tables have {positions} rows, which is no square grid.")
    check_side(sizes, img_size, patch, token, side)
    classes = sizes.take("num_classes", num_classes, show.size(("class_embed", 0)) or 0)
    if not nvp:
        var = state_dict.get("var")
        if var is not None and not bool((var > 0).all()):
            raise WeightsError("TARFlow: var holds numbers that are not positive; it is the prior's variance.")
    hidden = show.hidden("blocks.*") or 4 * width
    check_expansion(sizes, expansion, width, hidden)
    if head_dim < 1 or width % head_dim:
        sizes.problems.add(ConfigError("tarflow.head_dim", head_dim, f"does not divide the weights' width {width}."))
        sizes.raise_if_any()
    grid = (side, side)
    with torch.device("meta"):
        flow = Flow(
            [
                TransformerBlock(
                    token,
                    width,
                    depth,
                    Learned(grid, width),
                    Affine() if nvp else Additive(),
                    ClassTable(classes, width, null="mean") if classes else None,
                    start="shift",
                    order="reverse" if k % 2 else "raster",
                    head_dim=head_dim,
                    expansion=hidden / width,
                )
                for k in range(blocks)
            ],
            learn_prior=not nvp,
        )
    flow.to(precision(used(state_dict)))
    state = dict(state_dict)
    if nvp:
        state.setdefault("var", torch.ones(positions, token))
    rows = show.size(("proj_out.weight", 0), ("proj_out.bias", 0))
    hint = "" if rows != token * (1 if nvp else 2) else f"The heads are those of a model with nvp={not nvp}."
    load_with(sizes, flow, state, tarflow_rules(flow), what="TARFlow", ignore=UNUSED, hint=hint)
    return flow.eval()


def tarflow_rules(flow: Flow) -> list[Rule]:
    """How a flow's tensors are named in TARFlow's state dict (method: `blocks.k.` and our block's own names)."""
    if flow.learn_prior:

        def root(var: Tensor) -> tuple[Tensor, ...]:
            return var.sqrt(), var

        def square(std: Tensor, var: Tensor) -> tuple[Tensor, ...]:
            return (var if var.is_meta or torch.equal(var.sqrt(), std) else std.square(),)

        rules = [Rule(("prior_std", "prior_var"), ("var",), root, square)]
    else:
        rules = [Rule(("prior_std",), ("var",), lambda var: (var.sqrt(),), lambda std: (std.square(),))]
    for k, block in enumerate(flow.blocks):
        rules += trunk_rules(block, f"blocks.{k}")  # type: ignore[arg-type]  # only TransformerBlocks are put in
    return rules
