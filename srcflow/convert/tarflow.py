"""TARFlow's published weights as a `Flow`, and back. GS-Jacobi's weights have the same form."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from srcflow.convert.config import Sizes, known
from srcflow.convert.state import Rule, load, precision
from srcflow.convert.trunks import (
    UNUSED,
    Shown,
    State,
    check_expansion,
    check_patches,
    layers_of,
    trunk_rules,
)
from srcflow.couplings.additive import Additive
from srcflow.couplings.affine import Affine
from srcflow.errors import WeightsError
from srcflow.flows.block import TransformerBlock
from srcflow.flows.conditioners import ClassTable
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
    """TARFlow (arXiv 2412.06329) from a state dict of its published code.

    Its tokens are `patchify(images, patch_size, order="cpp")` of images in [-1, 1]; published `reverse(noise)` is
    `flow.inverse(noise * flow.prior_std)`.

    Args:
        state_dict: the published weights.
        in_channels: image channels; None: 3 if the tokens' width allows it.
        img_size: side of the images.
        patch_size: side of a patch.
        channels: width of the transformers.
        num_blocks: number of blocks.
        layers_per_block: layers of every block.
        nvp: False for volume-preserving models with a learned prior variance.
        num_classes: classes; 0 for an unconditional model.
        head_dim: width of an attention head.
        expansion: inner width of the MLP over the outer.

    Raises:
        ConfigError: a value contradicts the weights.
        WeightsError: keys are missing, unknown or misshaped.
    """
    sizes, show = Sizes("tarflow"), Shown(state_dict, "TARFlow")
    blocks = sizes.take("num_blocks", num_blocks, show.blocks)
    layers = layers_of(sizes, layers_per_block, [show.layers(k) for k in range(blocks)])
    width = sizes.take("channels", channels, show.size("proj_in.weight", 0))
    token = show.size("proj_in.weight", 1)
    positions = show.size("pos_embed", 0)
    side = math.isqrt(positions)
    if side * side != positions:
        raise WeightsError(f"TARFlow: the position tables have {positions} rows, which is no square grid.")
    check_patches(sizes, in_channels, patch_size, img_size, token, side)
    classes = sizes.take("num_classes", num_classes, show.size("class_embed", 0) if show.has("class_embed") else 0)
    hidden = show.size("attn_blocks.0.mlp.main.0.weight", 0)
    check_expansion(sizes, expansion, width, hidden)
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
                for k, depth in enumerate(layers)
            ],
            learn_prior=not nvp,
        )
    flow.to(precision(state_dict))
    hint = "" if _rows(show, 1 if not nvp else 2) else f"The heads look like a model with nvp={not nvp}."
    load(flow, state_dict, tarflow_rules(flow), what="TARFlow", ignore=UNUSED, hint=hint)
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


def _rows(show: Shown, params: int) -> bool:
    """Whether the heads give `params` numbers per channel."""
    if not (show.has("proj_out.weight") and show.has("proj_in.weight")):
        return True
    return show.size("proj_out.weight", 0) == params * show.size("proj_in.weight", 1)
