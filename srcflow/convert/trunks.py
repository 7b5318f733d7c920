"""What TARFlow's and STARFlow's state dicts share: the names in a block, and what they show of the model."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor

from srcflow.conditioners.class_table import ClassTable
from srcflow.conditioners.class_token import ClassToken
from srcflow.conditioners.text_prefix import TextPrefix
from srcflow.convert.config import Sizes
from srcflow.convert.state import Rule, load, rename
from srcflow.errors import ConfigError, WeightsError
from srcflow.flows.block import TransformerBlock
from srcflow.flows.flow import Flow
from srcflow.flows.positions import Learned
from srcflow.flows.trunk import Layer, Trunk
from srcflow.nn.mlp import GatedMLP
from srcflow.nn.norm import RMSNorm

State = Mapping[str, Tensor]
UNUSED = ("*.attn_mask", "attn_mask", "feat_rope*.freqs_*")
"""Buffers of the published models that their code does not read."""


def trunk_rules(trunk: Trunk, ours: str, theirs: str | None = None) -> list[Rule]:
    """The names of a block's (or the denoiser's) tensors; the two projects share the names of blocks.

    Args:
        trunk: the block.
        ours: our prefix.
        theirs: their prefix; None: the same.
    """
    theirs = ours if theirs is None else theirs
    if isinstance(trunk, TransformerBlock) and trunk.identity:
        return []
    pairs = [(f"{a}.{kind}", f"{b}.{kind}") for a, b in (("proj_in", "proj_in"), ("head", "proj_out")) for kind in ("weight", "bias")]
    if isinstance(trunk.positions, Learned):
        pairs.append(("positions.weight", "pos_embed"))
    if isinstance(trunk.final_norm, RMSNorm):
        pairs.append(("final_norm.weight", "final_norm.weight"))
    rules = [rename(f"{ours}.{a}", f"{theirs}.{b}") for a, b in pairs]
    if isinstance(trunk, TransformerBlock) and trunk.sos is not None:
        rules.append(_unsqueezed(f"{ours}.sos", f"{theirs}.sos_embed", (0, 0)))
    conditioner = trunk.conditioner
    if isinstance(conditioner, ClassTable):
        rules.append(_unsqueezed(f"{ours}.conditioner.weight", f"{theirs}.class_embed", (1,)))
    elif isinstance(conditioner, TextPrefix):
        rules += [rename(f"{ours}.conditioner.proj.{kind}", f"{theirs}.proj_txt.{kind}") for kind in ("weight", "bias")]
    elif isinstance(conditioner, ClassToken):
        rules.append(Rule((f"{ours}.conditioner.weight",), (f"{theirs}.proj_txt.weight",), _transposed, _transposed))
        if conditioner.bias is not None:
            rules.append(rename(f"{ours}.conditioner.bias", f"{theirs}.proj_txt.bias"))
    for i, layer in enumerate(cast("Sequence[Layer]", trunk.layers)):
        kinds = ("weight", "bias") if trunk.bias else ("weight",)
        norms = ("weight",) if isinstance(layer.norm1, RMSNorm) else ("weight", "bias")
        gated = isinstance(layer.mlp, GatedMLP)
        mlp = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"} if gated else {"fc1": "main.0", "fc2": "main.2"}
        pairs = [(f"norm1.{n}", f"attention.norm.{n}") for n in norms] + [(f"norm2.{n}", f"mlp.norm.{n}") for n in norms]
        pairs += [(f"attn.{part}.{n}", f"attention.{part}.{n}") for part in ("qkv", "proj") for n in kinds]
        pairs += [(f"mlp.{a}.{n}", f"mlp.{b}.{n}") for a, b in mlp.items() for n in kinds]
        if isinstance(layer.attn.q_norm, RMSNorm):
            pairs += [("attn.q_norm.weight", "attention.query_norm.weight"), ("attn.k_norm.weight", "attention.key_norm.weight")]
        if isinstance(layer.post_norm1, RMSNorm):
            pairs += [("post_norm1.weight", "attention.post_norm.weight"), ("post_norm2.weight", "mlp.post_norm.weight")]
        rules += [rename(f"{ours}.layers.{i}.{a}", f"{theirs}.attn_blocks.{i}.{b}") for a, b in pairs]
    return rules


class Shown:
    """What a published state dict shows of the model. Where tensors disagree about a size, most of them are believed, so that the odd one
    is reported as misshaped.

    Args:
        state: the state dict.
        what: the model's name, for errors.
    """

    def __init__(self, state: State, what: str) -> None:
        self.what = what
        self.shapes = {k: tuple(v.shape) for k, v in state.items() if not any(fnmatch.fnmatch(k, p) for p in UNUSED)}
        found = [int(m[1]) for k in self.shapes if (m := re.match(r"blocks\.(\d+)\.", k))]
        if not found:
            raise WeightsError(f"{what}: no key starts with `blocks.`; is it a state dict of {what}? It has {sorted(state)[:4]} ... {BARE}")
        self.blocks = max(found) + 1

    def has(self, name: str, prefix: str = "blocks.*") -> bool:
        """Whether a tensor is there; both may hold `*`."""
        return any(fnmatch.fnmatch(k, f"{prefix}.{name}") for k in self.shapes)

    def size(self, *places: tuple[str, int], prefix: str = "blocks.*") -> int | None:
        """The size that most tensors have at one of `places`, pairs of a name (which may hold `*`) and an axis; the first place where
        there is any tensor decides. None if there is none."""
        for name, axis in places:
            sizes = [v[axis] for k, v in self.shapes.items() if fnmatch.fnmatch(k, f"{prefix}.{name}") and len(v) > axis]
            if sizes:
                return max(sizes, key=sizes.count)
        return None

    def layers(self, prefix: str) -> int:
        """Number of a block's transformer layers."""
        return 1 + max((int(m[1]) for k in self.shapes if (m := re.match(re.escape(prefix) + r"\.attn_blocks\.(\d+)\.", k))), default=-1)

    def hidden(self, prefix: str) -> int | None:
        """Inner width of a block's MLPs."""
        layer = f"{prefix}.attn_blocks.*.mlp"
        return self.size(*((n, 0) for n in _UP), *((n, 1) for n in _DOWN), prefix=layer)

    def heads(self, sizes: Sizes, prefix: str, width: int, head_dim: int, given: int | None) -> tuple[int, int]:
        """Query and key/value heads of a block.

        Raises:
            ConfigError: its tensors do not divide into heads of this width (with what `sizes` has collected).
        """
        layer = f"{prefix}.attn_blocks.*.attention"
        queries = self.size(("proj.weight", 1), prefix=layer) or (width if given is None else given * head_dim)
        rows = self.size(("qkv.weight", 0), ("qkv.bias", 0), prefix=layer) or 3 * queries
        if head_dim < 1 or queries % head_dim or (rows - queries) % (2 * head_dim) or rows <= queries:
            shown = f"{prefix} has {queries} query channels of {rows} in all"
            key = f"{self.what.lower()}.head_dim"
            sizes.problems.add(ConfigError(key, head_dim, f"{shown}.", "Give the head_dim the model was built with."))
            sizes.raise_if_any()
        return queries // head_dim, (rows - queries) // (2 * head_dim)

    def sure(self, shown: int | None, given: int | None, key: str) -> int:
        """A size that the weights show, or else the configuration gives.

        Raises:
            WeightsError: neither does.
        """
        if shown is None and given is None:
            raise WeightsError(f"{self.what}: the weights lack every tensor that would show {key}, and the configuration does not give it.")
        return shown if shown is not None else cast(int, given)


BARE = "The state dict is wanted as it is, without what wraps it or stands before its keys (srcflow.convert.state.unwrap finds it)."
_UP = ("main.0.weight", "main.0.bias", "gate_proj.weight", "up_proj.weight")
_DOWN = ("main.2.weight", "down_proj.weight")


def layers_of(sizes: Sizes, given: int | Sequence[int] | None, shown: list[int]) -> None:
    """A given number of layers, or a list of one, stands for all blocks."""
    if given is not None:
        wanted = [given] if isinstance(given, int) else list(given)
        sizes.take("layers_per_block", wanted * len(shown) if len(wanted) == 1 else wanted, shown)


def patch_size_of(sizes: Sizes, in_channels: int | None, patch_size: int | None, token: int) -> int | None:
    """Side of a patch, as far as it is known: tokens of `token` numbers are patches of `in_channels` channels."""
    if patch_size is not None and (patch_size < 1 or token % patch_size**2):
        why = f"does not divide tokens of {token} numbers into channels."
        sizes.problems.add(ConfigError(f"{sizes.what}.patch_size", patch_size, why, "Give the side the model was built with."))
        return None
    if in_channels is None:
        return patch_size
    p = patch_size or math.isqrt(token // in_channels if in_channels > 0 else 0)
    if in_channels < 1 or in_channels * p**2 != token:
        why = f"tokens of the weights have {token} numbers" + (f", patches a side of {patch_size}." if patch_size else ".")
        sizes.problems.add(ConfigError(f"{sizes.what}.in_channels", in_channels, why, "Give what the model was built with."))
        return patch_size
    return p


def check_side(sizes: Sizes, img_size: int | None, patch: int | None, token: int, side: int) -> None:
    """A given side of the images (or latents) must be `side` patches; where the patch is not known, of any that tokens allow."""
    fitting = [patch] if patch is not None else [p for p in range(1, math.isqrt(token) + 1) if token % p**2 == 0]
    if img_size is not None and img_size not in [side * p for p in fitting]:
        why = f"the weights have {side} x {side} tokens of " + (f"patches of side {patch}." if patch else f"{token} numbers.")
        sizes.problems.add(ConfigError(f"{sizes.what}.img_size", img_size, why, "Give the side the model was built for."))


def check_expansion(sizes: Sizes, given: float | None, width: int, hidden: int) -> None:
    """A given expansion must give the MLP's inner width, cut to a whole number as the published code does."""
    if given is not None and int(width * given) != hidden:
        sizes.take("expansion", float(given), hidden / width)


def load_with(sizes: Sizes, flow: Flow, state: State, rules: list[Rule], *, what: str, ignore: Sequence[str] = (), hint: str = "") -> None:
    """`load`, whose complaints are told together with those about the configuration.

    Raises:
        ConfigError: a configured value contradicts the weights.
        WeightsError: keys are missing, unknown or misshaped (ProblemsError where both is so).
    """
    try:
        load(flow, state, rules, what=what, ignore=ignore, hint=hint)
    except WeightsError as e:
        sizes.raise_if_any(e)
    sizes.raise_if_any()


def used(state: State) -> State:
    """The tensors whose precision counts: not the buffers that hold no weights."""
    return {k: v for k, v in state.items() if k != "var" and not any(fnmatch.fnmatch(k, p) for p in UNUSED)}


def _unsqueezed(ours: str, theirs: str, axes: tuple[int, ...]) -> Rule:
    def more(t: Tensor) -> tuple[Tensor, ...]:
        for axis in axes:
            t = t.unsqueeze(axis)
        return (t,)

    def fewer(t: Tensor) -> tuple[Tensor, ...]:
        for axis in reversed(axes):
            t = t.squeeze(axis)
        return (t,)

    return Rule((ours,), (theirs,), fewer, more)


def _transposed(t: Tensor) -> tuple[Tensor, ...]:
    return (t.t(),)
