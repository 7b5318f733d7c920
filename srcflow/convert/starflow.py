"""STARFlow's published weights as a `Flow`, and back.

The names of the arguments are those of the published constructor; sizes that the weights show may be left out. What they cannot show
(`head_dim`, `soft_clip`, `seq_order`, `use_softplus`, `rope`) has the constructor's default: give what the model was built with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor

from srcflow.conditioners.base import Conditioner
from srcflow.conditioners.class_token import ClassToken
from srcflow.conditioners.text_prefix import TextPrefix
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
from srcflow.couplings.affine import Affine
from srcflow.couplings.base import Coupling
from srcflow.couplings.softplus_affine import SoftplusAffine
from srcflow.errors import ConfigError
from srcflow.flows.block import TransformerBlock
from srcflow.flows.denoiser import Denoiser
from srcflow.flows.flow import Flow
from srcflow.flows.positions import Learned, Positions, Rotary

DENOISER = "learnable_self_denoiser"

_FLAGS = {  # key of a block -> (the argument that makes it, its value then)
    "sos_embed": ("sos", True),
    "pos_embed": ("rope", False),
    "final_norm.weight": ("use_final_norm", True),
    "attn_blocks.*.mlp.gate_proj.weight": ("use_swiglu", True),
    "attn_blocks.*.attention.query_norm.weight": ("use_qk_norm", True),
    "attn_blocks.*.attention.post_norm.weight": ("use_post_norm", True),
    "attn_blocks.*.attention.norm.bias": ("norm_type", "layer_norm"),
    "attn_blocks.*.attention.qkv.bias": ("use_bias", True),
}
_WIDTH = (("proj_in.weight", 0), ("proj_in.bias", 0), ("proj_out.weight", 1))
"""What shows the width of a block."""


@known
def starflow(
    state_dict: State,
    *,
    in_channels: int | None = None,
    img_size: int | None = None,
    patch_size: int | None = None,
    channels: int | None = None,
    num_blocks: int | None = None,
    layers_per_block: int | Sequence[int] | None = None,
    head_dim: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    rope: bool = False,
    pt_seq_len: int | None = None,
    sos: bool = False,
    txt_size: int | None = None,
    txt_dim: int | None = None,
    num_classes: int | None = None,
    cond_top_only: bool = False,
    use_softplus: bool = False,
    soft_clip: float = 0.0,
    norm_type: Literal["layer_norm", "rms_norm"] = "layer_norm",
    use_qk_norm: bool = False,
    use_post_norm: bool = False,
    use_swiglu: bool = False,
    expansion: float | None = None,
    use_bias: bool = True,
    use_final_norm: bool = False,
    seq_order: Literal["R2L", "L2R"] = "R2L",
    top_block_channels: int | None = None,
    learnable_self_denoiser: bool = False,
    conditional_denoiser: bool = False,
    hf_style_rope: bool = False,
    use_mm_attn: bool = False,
    shallow_block_local: bool = False,
    use_pretrained_lm: str | None = None,
    denoiser_window: int | None = None,
    local_attn_window: int | None = None,
    temporal_causal: int = 0,
    use_checkpoint: int | None = None,
    use_checkpoint_mlp: int | None = None,
) -> Flow:
    """STARFlow (arXiv 2506.06276; E6, E12, E17, E18, E20) from a state dict of its published code; images only, not STARFlow-V.

    Its tokens are `patchify(latents, patch_size, order="ppc")`. The released model is built with rope, sos, use_softplus, use_final_norm,
    cond_top_only, soft_clip 4 and seq_order "L2R", none of which is the constructor's default.

    Args:
        state_dict: the published weights.
        in_channels: channels of the latents.
        img_size: side of the latents.
        patch_size: side of a patch; None: what in_channels leaves, else 1.
        channels: width of the transformers.
        num_blocks: number of blocks; the last is the deep one.
        layers_per_block: layers of the blocks, one number for all or one each; blocks without layers are the identity, but for the last.
        head_dim: width of an attention head; None: what q/k norms show, else 64.
        num_heads: query heads; None: width / head_dim.
        num_kv_heads: key/value heads.
        rope: rotary positions; without, learned ones.
        pt_seq_len: side that rotary coordinates are rescaled to; None: img_size / patch_size.
        sos: a learned first input instead of a shift.
        txt_size: text length the model was built for; only whether it is 0 matters.
        txt_dim: width of the text features.
        num_classes: the text is one class id as one-hot vector of this many classes and an empty one: the flow then takes labels.
        cond_top_only: only the last block sees the text.
        use_softplus: scale softplus(a + ln(e - 1)) instead of exp(a).
        soft_clip: limit s of s tanh(x / s) on both parameters; 0: none.
        norm_type: norms of the layers.
        use_qk_norm: RMSNorm of queries and keys.
        use_post_norm: RMSNorm of each branch.
        use_swiglu: gated MLP.
        expansion: inner width of the MLP over the outer.
        use_bias: biases of attention and MLP.
        use_final_norm: RMSNorm before the head.
        seq_order: "R2L": odd blocks are reversed; "L2R": even ones.
        top_block_channels: width of the last block.
        learnable_self_denoiser: the model has the learnable denoiser.
        conditional_denoiser: which sees the text.
        hf_style_rope: only False.
        use_mm_attn: only False.
        shallow_block_local: only False (video).
        use_pretrained_lm: only None.
        denoiser_window: only None (video).
        local_attn_window: only None (video).
        temporal_causal: only 0 (video).
        use_checkpoint: any; it saves memory in training.
        use_checkpoint_mlp: any.

    Returns:
        The flow in eval mode on the CPU, in float32, or in float64 if the weights are.

    Raises:
        ConfigError: a value contradicts the weights, or is of a kind that is not converted.
        WeightsError: keys are missing, unknown or misshaped.
    """
    sizes, show = Sizes("starflow"), Shown(state_dict, "STARFlow")
    not_ours = "is a part of STARFlow-V or of language models that srcflow does not have."
    sizes.only("hf_style_rope", hf_style_rope, (False,), not_ours)
    sizes.only("use_mm_attn", use_mm_attn, (False,), not_ours)
    sizes.only("shallow_block_local", shallow_block_local, (False,), not_ours)
    sizes.only("use_pretrained_lm", use_pretrained_lm, (None,), not_ours)
    for key, value in (("denoiser_window", denoiser_window), ("local_attn_window", local_attn_window)):
        sizes.only(key, value, (None, 0), not_ours)
    sizes.only("temporal_causal", temporal_causal, (0,), not_ours)
    blocks = sizes.take("num_blocks", num_blocks, show.blocks)
    layers = [show.layers(f"blocks.{k}") for k in range(blocks)]
    layers_of(sizes, layers_per_block, layers)
    last = blocks - 1
    top_name, lower = f"blocks.{last}", [f"blocks.{k}" for k in range(last)]
    token = show.sure(
        show.size(("proj_in.weight", 1)), None if in_channels is None else in_channels * (patch_size or 1) ** 2, "in_channels"
    )
    shown = show.size(*_WIDTH, prefix=top_name)
    top = show.sure(
        sizes.take("top_block_channels", top_block_channels, shown) if shown else None, top_block_channels or channels, "channels"
    )
    widths = [w for name in (*lower, DENOISER) if (w := show.size(*_WIDTH, prefix=name)) is not None]
    if widths:
        width = sizes.take("channels", channels, max(widths, key=widths.count))
    else:  # nothing but the last block
        width = channels if channels is not None and top_block_channels is not None else sizes.take("channels", channels, top)
    patch = patch_size_of(sizes, in_channels, patch_size, token)
    side = _side(sizes, show, img_size, patch, pt_seq_len, token, state_dict.get("var"))
    texts = show.has("proj_txt.*")
    dim = sizes.take("txt_dim", txt_dim, show.size(("proj_txt.weight", 1)) or (txt_dim or 0 if texts else 0))
    if texts and txt_size == 0:
        sizes.problems.add(
            ConfigError("starflow.txt_size", 0, "the weights are of a model with text.", "Give the length it was built for.")
        )
    if cond_top_only and not texts and not txt_size:
        sizes.problems.add(ConfigError("starflow.cond_top_only", True, "the weights are of a model without text.", "Leave it out."))
    if num_classes is not None:
        if not dim:
            sizes.problems.add(ConfigError("starflow.num_classes", num_classes, "the weights are of an unconditional model."))
        else:
            sizes.take("num_classes", num_classes, dim - 1)
    if learnable_self_denoiser and not rope:
        sizes.only("rope", rope, (True,), "the published denoiser has no other positions.")
    text_axis = texts if txt_size is None else txt_size > 0
    normed = show.size(("attn_blocks.*.attention.query_norm.weight", 0), ("attn_blocks.*.attention.key_norm.weight", 0))
    size = (64 if head_dim is None else head_dim) if normed is None else sizes.take("head_dim", head_dim, normed)
    grid = (side, side)

    def conditioner(w: int) -> Conditioner:
        return TextPrefix(dim, w) if num_classes is None else ClassToken(num_classes, w, bias=True)

    def positions(w: int) -> Positions:
        return Rotary(grid, text_axis, None if pt_seq_len is None else float(pt_seq_len)) if rope else Learned(grid, w)

    def options(w: int, name: str, depth: int) -> dict[str, Any]:
        heads, kv_heads, hidden = num_heads or 1, num_kv_heads, 4 * w
        if depth:
            heads, kv_heads = show.heads(sizes, name, w, size, num_heads)
            sizes.take("num_heads", num_heads, heads, f"the weights of {name}")
            sizes.take("num_kv_heads", num_kv_heads, kv_heads, f"the weights of {name}")
            hidden = show.hidden(name) or hidden
            check_expansion(sizes, expansion, w, hidden)
        return {
            "head_dim": size,
            "heads": heads,
            "kv_heads": kv_heads,
            "expansion": hidden / w,
            "norm": "rms" if norm_type == "rms_norm" else "layer",
            "mlp": "gated" if use_swiglu else "gelu",
            "qk_norm": use_qk_norm,
            "post_norm": use_post_norm,
            "bias": use_bias,
            "final_norm": use_final_norm,
        }

    with torch.device("meta"):
        built = []
        for k, depth in enumerate(layers):
            w = top if k == last else width
            empty = depth == 0 and k != last
            coupling: Coupling = SoftplusAffine() if use_softplus else Affine()
            built.append(
                TransformerBlock(
                    token,
                    w,
                    depth,
                    positions(w),
                    coupling,
                    conditioner(w) if dim and not empty and (k == last or not cond_top_only) else None,
                    start="sos" if sos else "shift",
                    order="reverse" if k % 2 == (seq_order == "R2L") else "raster",
                    clip=soft_clip,
                    clip_what="both",
                    identity=empty,
                    **(options(w, f"blocks.{k}", depth) if not empty else {"head_dim": size, "heads": num_heads or 1}),
                )
            )
        denoiser = None
        if learnable_self_denoiser:
            depth = show.layers(DENOISER)
            seen = conditioner(width) if conditional_denoiser and dim else None
            denoiser = Denoiser(token, width, positions(width), depth, seen, **options(width, DENOISER, depth))
        flow = Flow(built, denoiser=denoiser)
    flow.to(precision(used(state_dict)))
    given = {
        "sos": sos,
        "rope": rope,
        "use_final_norm": use_final_norm,
        "use_swiglu": use_swiglu,
        "use_qk_norm": use_qk_norm,
        "use_post_norm": use_post_norm,
        "norm_type": norm_type,
        "use_bias": use_bias,
    }
    hint = _hint(show, last, given, cond_top_only=cond_top_only, denoiser=learnable_self_denoiser)
    state = dict(state_dict)
    state.setdefault("var", torch.ones(side * side, token))  # unused there
    rules = starflow_rules(flow, var=tuple(state["var"].shape))
    load_with(sizes, flow, state, rules, what="STARFlow", ignore=UNUSED, hint=hint)
    return flow.eval()


def starflow_rules(flow: Flow, var: tuple[int, ...] | None = None) -> list[Rule]:
    """How a flow's tensors are named in STARFlow's state dict.

    Args:
        flow: the flow.
        var: shape of the published model's unused buffer `var`, all ones; None: (N, d).
    """
    own = tuple(flow.prior_std.shape)
    rules = [Rule(("prior_std",), ("var",), lambda _: (torch.ones(own),), lambda std: (std.new_ones(own if var is None else var),))]
    # the published code asks for the null text at every call
    rules += [Rule((name,), (), lambda: (), lambda _: ()) for name in ("null_text", "null_mask") if getattr(flow, name) is not None]
    for k, block in enumerate(flow.blocks):
        rules += trunk_rules(block, f"blocks.{k}")  # type: ignore[arg-type]  # only TransformerBlocks are put in
    if flow.self_denoiser is not None:
        rules += trunk_rules(flow.self_denoiser, "self_denoiser", DENOISER)
    return rules


def _side(
    sizes: Sizes, show: Shown, img_size: int | None, patch: int | None, pt_seq_len: int | None, token: int, var: Tensor | None
) -> int:
    """Side of the token grid: what learned positions show, else the configuration, else the unused buffer `var` of pt_seq_len^2 rows."""
    learned = show.size(("pos_embed", 0))
    shown = None if var is None else math.isqrt(var.shape[0])
    if pt_seq_len is not None and shown is not None:
        sizes.take("pt_seq_len", pt_seq_len, shown)
    if learned is not None or (shown is not None and pt_seq_len is None):
        side = math.isqrt(learned) if learned is not None else cast(int, shown)
        check_side(sizes, img_size, patch, token, side)
        return side
    if img_size is None:
        sizes.problems.add(ConfigError("starflow.img_size", None, "the weights do not show it.", "Give the side of the latents."))
        return 1
    p = 1 if patch is None else patch
    if img_size % p:
        sizes.problems.add(ConfigError("starflow.img_size", img_size, f"is no whole number of patches of side {p}."))
    return max(img_size // p, 1)


def _hint(show: Shown, last: int, given: dict[str, Any], *, cond_top_only: bool, denoiser: bool) -> str:
    """Which arguments the keys speak for, where they were not given so."""
    top = f"blocks.{last}"
    other = {"rope": (True, False), "norm_type": ("rms_norm", "layer_norm")}
    wrong = []
    for key, (name, value) in _FLAGS.items():
        if key.startswith("attn_blocks") and not show.layers(top):
            continue
        negative, positive = other.get(name, (False, value))
        shown = positive if show.has(key, top) else negative
        if shown != given[name]:
            wrong.append(f"{name}={shown!r}")
    lower = [f"blocks.{k}" for k in range(last) if show.has("proj_in.*", f"blocks.{k}")]
    below = any(show.has("proj_txt.*", name) for name in lower)
    if lower and show.has("proj_txt.*", top) and below == cond_top_only:
        wrong.append(f"cond_top_only={not below!r}")
    if show.has("proj_in.*", DENOISER) != denoiser:
        wrong.append(f"learnable_self_denoiser={not denoiser!r}")
    return f"The keys are those of a model with {', '.join(wrong)}." if wrong else ""
