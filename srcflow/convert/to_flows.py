"""Flows in the formats of the published code of TARFlow and STARFlow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from srcflow.conditioners.class_table import ClassTable
from srcflow.conditioners.class_token import ClassToken
from srcflow.conditioners.text_prefix import TextPrefix
from srcflow.convert.starflow import starflow_rules
from srcflow.convert.state import exported
from srcflow.convert.tarflow import tarflow_rules
from srcflow.couplings.additive import Additive
from srcflow.couplings.affine import Affine
from srcflow.couplings.base import Coupling
from srcflow.couplings.softplus_affine import SoftplusAffine
from srcflow.errors import ConfigError, Problems
from srcflow.flows.block import TransformerBlock
from srcflow.flows.flow import Flow
from srcflow.flows.positions import Learned, Rotary
from srcflow.flows.trunk import Trunk
from srcflow.registry import spec_of


def to_tarflow(flow: Flow, *, in_channels: int = 3) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A flow as TARFlow's published code loads it (strictly): its state dict, buffers included, and the constructor's arguments.

    Args:
        flow: the flow.
        in_channels: channels of the images it models.

    Raises:
        ConfigError: names every part of the flow that TARFlow cannot express (ProblemsError for several).
    """
    check = Expressible("TARFlow", flow)
    check.whole(prior=True, denoiser=False)
    specs = [spec_of(b)["init_args"] for b in check.blocks]
    for k, (block, spec) in enumerate(zip(check.blocks, specs, strict=True)):
        own = f"blocks[{k}]"
        check.need(not block.identity, f"{own}.layers", 0, "its blocks have layers.")
        check.need(block.start_kind == "shift", f"{own}.start", block.start_kind, "it shifts.")
        check.need(isinstance(block.positions, Learned | None), f"{own}.positions", type(block.positions).__name__, "its are learned.")
        kind: type[Coupling] = Additive if flow.learn_prior else Affine
        why = "a flow with learn_prior is volume-preserving there." if flow.learn_prior else "its scale is exp(a)."
        check.need(type(block.coupling) is kind, f"{own}.coupling", type(block.coupling).__name__, why)
        conditioner = block.conditioner
        is_table = conditioner is None or (isinstance(conditioner, ClassTable) and conditioner.null == "mean")
        check.need(is_table, f"{own}.conditioner", type(conditioner).__name__, "its classes are tables whose mean is the null.")
        heads = (block.heads, block.kv_heads)
        full = (block.width // block.head_dim,) * 2
        check.need(heads == full, f"{own}.heads, kv_heads", heads, "they are width / head_dim.")
        plain = {"norm": "layer", "mlp": "gelu", "qk_norm": False, "post_norm": False, "bias": True, "final_norm": False, "clip": 0.0}
        for key, value in plain.items():
            check.need(spec[key] == value, f"{own}.{key}", spec[key], f"only {value!r}.")
    check.need(
        check.orders([bool(k % 2) for k in range(len(check.blocks))]), "blocks order", [s["order"] for s in specs], "they alternate."
    )
    width = check.shared("width", [b.width for b in check.blocks])
    layers = check.shared("layers", [b.layer_count for b in check.blocks])
    head_dim = check.shared("head_dim", [b.head_dim for b in check.blocks])
    expansion = check.shared("expansion", [s["expansion"] for s in specs])
    classes = check.shared("num_classes", [getattr(b.conditioner, "num_classes", 0) for b in check.blocks])
    with check.problems.collect():
        patch = patch_of(flow, in_channels)
    check.problems.raise_if_any()
    tokens = flow.prior_std.shape[0]
    state = exported(flow, tarflow_rules(flow))
    state.update({f"blocks.{k}.attn_mask": torch.tril(torch.ones(tokens, tokens)) for k in range(len(check.blocks))})
    config = {
        "nvp": not flow.learn_prior,
        "in_channels": in_channels,
        "img_size": flow.grid[0] * patch,
        "patch_size": patch,
        "channels": width,
        "num_blocks": len(check.blocks),
        "layers_per_block": layers,
        "num_classes": classes,
        "head_dim": head_dim,
        "expansion": exact_expansion(expansion, width),
    }
    return state, config


def to_starflow(flow: Flow, *, in_channels: int = 4, txt_size: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A flow as STARFlow's published code loads it: its state dict, without the buffers that are not read, and the constructor's arguments.

    Args:
        flow: the flow.
        in_channels: channels of the latents it models.
        txt_size: text length to build the published model for; None: the null text's, else 1 (any works, what counts is not 0).

    Raises:
        ConfigError: names every part of the flow that STARFlow cannot express (ProblemsError for several).
    """
    check = Expressible("STARFlow", flow)
    check.whole(prior=False, denoiser=True)
    last = len(check.blocks) - 1
    check.need(not check.blocks[last].identity, f"blocks[{last}].identity", True, "its last block has an input and an output map.")
    check.problems.raise_if_any()
    live = [b for b in check.blocks if not b.identity]
    named: dict[str, Trunk] = {f"blocks[{k}]": b for k, b in enumerate(check.blocks) if not b.identity}
    if flow.self_denoiser is not None:
        named["denoiser"] = flow.self_denoiser
    trunks = list(named.values())
    specs = [spec_of(t)["init_args"] for t in trunks]
    expansion = check.shared("expansion", [s["expansion"] for s in specs])
    check.need(expansion == 4.0, "expansion", expansion, "its MLPs are 4 times as wide.")
    for name, trunk in named.items():
        rotary, seen = isinstance(trunk.positions, Rotary), trunk.conditioner
        check.need(rotary, f"{name}.positions", type(trunk.positions).__name__, "its positions are rotary.")
        fits = seen is None or isinstance(seen, TextPrefix) or (isinstance(seen, ClassToken) and seen.bias is not None)
        check.need(fits, f"{name}.conditioner", type(seen).__name__, "it knows text, or classes as ClassToken with bias: true.")
    side = check.shared("positions.side", [getattr(t.positions, "side", 0.0) for t in trunks])
    check.need(float(side).is_integer(), "positions.side", side, "it is a whole number.")
    text_axis = check.shared("positions.text_axis", [getattr(t.positions, "text_axis", False) for t in trunks])
    option = {k: check.shared(k, [s[k] for s in specs]) for k in ("norm", "mlp", "qk_norm", "post_norm", "bias", "final_norm")}
    head_dim = check.shared("head_dim", [t.head_dim for t in trunks])
    coupling = check.shared("coupling", [type(b.coupling) for b in live])
    check.need(coupling in (SoftplusAffine, Affine), "coupling", coupling.__name__, "its scale is a softplus or an exponential.")
    start = check.shared("start", [b.start_kind for b in live])
    clip = check.shared("clip", [b.clip for b in live])
    check.need(not clip or all(b.clip_what == "both" for b in live), "clip_what", "log_scale", "it clips both parameters.")
    order = next((o for o, odd in (("R2L", 1), ("L2R", 0)) if check.orders([k % 2 == odd for k in range(last + 1)])), None)
    check.need(order is not None, "blocks order", [b.order for b in check.blocks], "they alternate.")
    top = check.blocks[last].width
    lower = [t.width for t in trunks if t is not check.blocks[last]]
    width = check.shared("width (but the last)", lower or [top])
    conditioned = [b.conditioned for b in live]
    top_only = conditioned[-1] and not any(conditioned[:-1])
    uniform = top_only or len(set(conditioned)) == 1
    check.need(uniform, "blocks conditioner", conditioned, "the last block or all of them see the condition.")
    heads, kv_heads = _published_heads(check, trunks, head_dim)
    with check.problems.collect():
        patch = patch_of(flow, in_channels)
    check.problems.raise_if_any()
    conditioner = cast("TextPrefix | ClassToken | None", next((t.conditioner for t in trunks if t.conditioner is not None), None))
    dim = conditioner.num_classes + 1 if isinstance(conditioner, ClassToken) else conditioner.text_dim if conditioner else 0
    length = 0 if not text_axis else txt_size or (1 if flow.null_text is None else flow.null_text.shape[0])
    config: dict[str, Any] = {
        "in_channels": in_channels,
        "img_size": flow.grid[0] * patch,
        "patch_size": patch,
        "channels": width,
        "num_blocks": last + 1,
        "layers_per_block": [b.layer_count for b in check.blocks],
        "head_dim": head_dim,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "rope": True,
        "pt_seq_len": None if int(side) == flow.grid[0] else int(side),
        "sos": start == "sos",
        "txt_size": length,
        "txt_dim": dim,
        "cond_top_only": top_only and len(live) > 1,
        "use_softplus": coupling is SoftplusAffine,
        "soft_clip": clip,
        "norm_type": "rms_norm" if option["norm"] == "rms" else "layer_norm",
        "use_qk_norm": option["qk_norm"],
        "use_post_norm": option["post_norm"],
        "use_swiglu": option["mlp"] == "gated",
        "use_bias": option["bias"],
        "use_final_norm": option["final_norm"],
        "seq_order": order,
        "top_block_channels": None if top == width else top,
        "learnable_self_denoiser": flow.self_denoiser is not None,
        "conditional_denoiser": flow.self_denoiser is not None and flow.self_denoiser.conditioned,
    }
    return exported(flow, starflow_rules(flow, var=(int(side) ** 2, flow.channels))), config


def _published_heads(check: Expressible, trunks: list[Trunk], head_dim: int) -> tuple[int | None, int | None]:
    """num_heads and num_kv_heads as the published constructor wants them: None for what follows from widths and head_dim."""
    layered = [t for t in trunks if t.layer_count]
    heads: int | None = None
    if any(t.heads * head_dim != t.width for t in layered):
        heads = check.shared("heads", [t.heads for t in layered])
    kv_heads: int | None = None
    if any(t.kv_heads != t.heads for t in layered):
        kv_heads = check.shared("kv_heads", [t.kv_heads for t in layered])
    return heads, kv_heads


def exact_expansion(expansion: float, width: int) -> int | float:
    """The expansion whose product with `width`, cut to a whole number as the published code does, is our rounded inner width."""
    hidden = round(width * expansion)
    if hidden % width == 0:
        return hidden // width
    return hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width


class Expressible:
    """Collects the parts of a flow that a published format cannot express, and what all blocks must share there."""

    def __init__(self, format_name: str, flow: Flow) -> None:
        self.format, self.flow = format_name, flow
        self.blocks = cast("list[TransformerBlock]", list(flow.blocks))
        self.problems = Problems()

    def need(self, holds: bool, key: str, value: Any, why: str) -> None:
        """Note that `key` = `value` has no place in the format, unless `holds`."""
        if not holds:
            self.problems.add(ConfigError(f"flow.{key}", value, f"{self.format} cannot express it: {why}"))

    def whole(self, *, prior: bool, denoiser: bool) -> None:
        """What is said of the flow as a whole: its normalisation, null text, grid; a learned prior or a denoiser where there is none."""
        flow = self.flow
        self.need(flow.normalization is None, "normalization", type(flow.normalization).__name__, "it has no normalisation of its input.")
        self.need(prior or not flow.learn_prior, "learn_prior", flow.learn_prior, "its prior is standard normal.")
        self.need(denoiser or flow.self_denoiser is None, "denoiser", type(flow.self_denoiser).__name__, "it has no denoiser.")
        self.need(flow.grid[0] == flow.grid[1], "grid", flow.grid, "it is built for squares.")

    def orders(self, reverse: list[bool]) -> bool:
        """Whether the blocks' orders are these."""
        return [b.order == "reverse" for b in self.blocks] == reverse

    def shared(self, key: str, values: Sequence[Any]) -> Any:
        """The one value that all blocks have; noted, and the first returned, if they differ."""
        self.need(all(v == values[0] for v in values), f"blocks {key}", list(values), "all blocks have the same.")
        return values[0]


def patch_of(flow: Flow, in_channels: int) -> int:
    """Side of the patches of a flow on images of `in_channels` channels.

    Raises:
        ConfigError: tokens of this width are no patches of such images.
    """
    patch = math.isqrt(flow.channels // in_channels) if in_channels > 0 else 0
    if not patch or in_channels * patch**2 != flow.channels:
        why = f"tokens of {flow.channels} numbers are no square patches of {in_channels} channels."
        raise ConfigError("in_channels", in_channels, why, "Give the channels of the images (or latents) the flow models.")
    return patch
