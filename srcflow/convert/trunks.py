"""What TARFlow's and STARFlow's state dicts share: the names in a block, and what they show of the model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor

from srcflow.convert.config import Sizes
from srcflow.convert.state import Rule, rename
from srcflow.errors import ConfigError, WeightsError
from srcflow.flows.block import TransformerBlock
from srcflow.flows.conditioners import ClassTable, ClassToken, TextPrefix
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
    """What a published state dict shows of the model."""

    def __init__(self, state: State, what: str) -> None:
        self.state, self.what = state, what
        found = [int(m[1]) for k in state if (m := re.match(r"blocks\.(\d+)\.", k))]
        if not found:
            raise WeightsError(f"{what}: no key starts with `blocks.`; is it a state dict of {what}? It has {sorted(state)[:4]} ...")
        self.blocks = max(found) + 1

    def _key(self, name: str, block: int = 0, prefix: str | None = None) -> str:
        return f"{prefix or f'blocks.{block}'}.{name}"

    def has(self, name: str, block: int = 0, prefix: str | None = None) -> bool:
        """Whether a block has a tensor."""
        return self._key(name, block, prefix) in self.state

    def size(self, name: str, axis: int, block: int = 0, prefix: str | None = None) -> int:
        """One axis of a block's tensor.

        Raises:
            WeightsError: the tensor is not there, or has fewer axes.
        """
        tensor = self.state.get(self._key(name, block, prefix))
        if tensor is None or tensor.ndim <= axis:
            raise WeightsError(f"{self.what}: {self._key(name, block, prefix)} is missing, which shows the size of the model.")
        return int(tensor.shape[axis])

    def layers(self, block: int = 0, prefix: str | None = None) -> int:
        """Number of a block's transformer layers."""
        start = re.escape(self._key("attn_blocks.", block, prefix))
        return 1 + max((int(m[1]) for k in self.state if (m := re.match(start + r"(\d+)\.", k))), default=-1)

    def attention(self, prefix: str, head_dim: int) -> tuple[int, int, int]:
        """Query heads, key/value heads, and the MLP's inner width.

        Raises:
            ConfigError: the tensors are not made of heads of this width.
        """
        queries = self.size("attn_blocks.0.attention.proj.weight", 1, prefix=prefix)
        rows = self.size("attn_blocks.0.attention.qkv.weight", 0, prefix=prefix)
        if queries % head_dim or (rows - queries) % (2 * head_dim) or rows <= queries:
            shown = f"{prefix} has {queries} query channels of {rows} in all"
            raise ConfigError(f"{self.what.lower()}.head_dim", head_dim, f"{shown}.", "Give the head_dim the model was built with.")
        up = "main.0" if self.has("attn_blocks.0.mlp.main.0.weight", prefix=prefix) else "gate_proj"
        return queries // head_dim, (rows - queries) // (2 * head_dim), self.size(f"attn_blocks.0.mlp.{up}.weight", 0, prefix=prefix)


def layers_of(sizes: Sizes, given: int | Sequence[int] | None, shown: list[int]) -> list[int]:
    """Layers of every block; a given number, or a list of one, stands for all."""
    if given is not None:
        wanted = [given] if isinstance(given, int) else list(given)
        sizes.take("layers_per_block", wanted * len(shown) if len(wanted) == 1 else wanted, shown)
    return shown


def check_patches(sizes: Sizes, in_channels: int | None, patch_size: int | None, img_size: int | None, token: int, side: int) -> None:
    """Check image channels, patch and image side against the width of a token and the grid."""
    if in_channels is None and patch_size is None:
        return
    if in_channels is not None and patch_size is not None:
        product = in_channels * patch_size**2
        if product != token:
            why = f"makes tokens of {product} numbers; the weights have {token}."
            sizes.problems.add(ConfigError(f"{sizes.what}.in_channels, patch_size", (in_channels, patch_size), why))
    if img_size is not None and patch_size is not None:
        sizes.take("img_size", img_size, side * patch_size)


def check_expansion(sizes: Sizes, given: float | None, width: int, hidden: int) -> None:
    """A given expansion must give the MLP's inner width, cut to a whole number as the published code does."""
    if given is not None and int(width * given) != hidden:
        sizes.take("expansion", float(given), hidden / width)


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
