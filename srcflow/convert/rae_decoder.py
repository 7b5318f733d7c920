"""The decoder of representation autoencoders (RAE, arXiv 2510.11690): published weights in and out (E3)."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from srcflow.autoencoders.vit_decoder import ViTDecoder, sincos_table
from srcflow.convert.config import Sizes, known
from srcflow.convert.state import Rule, Tensors, exported, linear, load, precision, rename, stacked
from srcflow.errors import ConfigError, WeightsError
from srcflow.nn.patchify import pair
from srcflow.types import Grid

State = Mapping[str, Tensor]
Layout = Literal["official", "diffusers"]
HEADS = {768: 12, 1024: 16, 1152: 16}
"""Width -> attention heads of the published decoders (ViT-B, ViT-L, ViT-XL); weights do not show the heads."""
ACTIVATIONS = ("gelu", "gelu (erf)")
BUFFERS = ("encoder_mean", "encoder_std", "_latents_mean", "_latents_std")
"""What diffusers' AutoencoderRAE keeps beside `encoder.*` and `decoder.*`."""
TABLE = "decoder_pos_embed"


@known
def rae_decoder(
    state_dict: State,
    *,
    latent_dim: int | None = None,
    dim: int | None = None,
    depth: int | None = None,
    heads: int | None = None,
    mlp: int | None = None,
    grid: int | Sequence[int] | None = None,
    patch: int | None = None,
    channels: int = 3,
    layer_norm_eps: float = 1e-12,
    act: str = "gelu",
    qkv_bias: bool | None = None,
) -> ViTDecoder:
    """RAE's decoder (arXiv 2510.11690, E3) from a state dict of its published code, or in the keys of diffusers.

    The position table is the file's, which in a trained checkpoint may be no sin-cos table any more. Files of diffusers do not hold it:
    they get sin-cos positions that count tokens (0, 1, 2, ...), as the official code has them for every grid; `grid` must be given.

    Args:
        state_dict: the decoder's weights; or a whole RAE's, of which the keys `decoder.*` are taken.
        latent_dim: width of the tokens it decodes.
        dim: width of the transformer.
        depth: layers.
        heads: attention heads; None: as published for this width (768: 12, 1024: 16, 1152: 16).
        mlp: inner width of the MLPs.
        grid: token grid, one side or [rows, columns]; None: the position table's, which must be square.
        patch: side of a token's patch of output pixels.
        channels: of the images.
        layer_norm_eps: epsilon of every LayerNorm.
        act: activation of the MLPs: "gelu" or "gelu (erf)", which are the same.
        qkv_bias: whether queries, keys and values have a bias.

    Returns:
        The decoder in eval mode, on the CPU.

    Raises:
        ConfigError: a value contradicts the weights, or is needed and not given.
        WeightsError: lists every missing, unknown and misshaped key.
    """
    check_tensors("RAE decoder", state_dict)
    state = _decoder_part(state_dict)
    sizes = Sizes("rae_decoder")
    layout: Layout = "diffusers" if any(".attention.to_" in k for k in state) else "official"
    layer = r"decoder_layers\.(\d+)\."
    layers = sizes.take("depth", depth, 1 + max((int(m[1]) for k in state if (m := re.match(layer, k))), default=-1)) or 1
    qkv = layer + r"attention\." + ("to_[qkv]" if layout == "diffusers" else r"attention\.(query|key|value)")
    bias = sizes.take("qkv_bias", qkv_bias, any(re.fullmatch(qkv + r"\.bias", k) for k in state))  # one of many shows what is lost
    in_file = layout == "official" or TABLE in state
    needed = {"decoder_embed.weight": 2, "decoder_layers.0.intermediate.dense.weight": 2, "decoder_pred.weight": 2}
    _check_needed(state, _decoder_names(layers, bias, layout, in_file), {**needed, **({TABLE: 3} if in_file else {})})
    width = sizes.take("dim", dim, state["decoder_embed.weight"].shape[0])
    latent = sizes.take("latent_dim", latent_dim, state["decoder_embed.weight"].shape[1])
    hidden = sizes.take("mlp", mlp, state["decoder_layers.0.intermediate.dense.weight"].shape[0])
    side = _patch(sizes, patch, channels, state["decoder_pred.weight"].shape[0])
    cells = _grid(sizes, grid, state[TABLE].shape[1] - 1 if in_file else None)
    if heads is None and width not in HEADS:
        why = f"the weights do not show it, and no published decoder has the width {width}."
        sizes.problems.add(ConfigError("rae_decoder.heads", None, why, "Give the number of heads."))
    elif heads is not None and (heads < 1 or width % heads):
        sizes.problems.add(ConfigError("rae_decoder.heads", heads, f"the width {width} does not divide into so many heads."))
    sizes.only("act", act, ACTIVATIONS, "another activation than the published decoders'.")
    with sizes.problems.collect():
        check_epsilon("rae_decoder.layer_norm_eps", layer_norm_eps)
    sizes.raise_if_any()
    with torch.device("meta"):  # no random numbers are drawn for weights that are replaced
        decoder = ViTDecoder(
            latent,
            width,
            layers,
            HEADS[width] if heads is None else heads,
            hidden,
            side,
            cells,
            channels,
            norm_eps=layer_norm_eps,
            qkv_bias=bias,
        )
    decoder = decoder.to(precision(state)).to_empty(device="cpu")
    load(decoder, state, decoder_rules(decoder, layout, in_file), what="RAE decoder")
    return decoder.eval()


def decoder_rules(decoder: ViTDecoder, layout: Layout = "official", table: bool = True) -> list[Rule]:
    """How a decoder's tensors are named in RAE's state dict, or diffusers'.

    Args:
        decoder: the decoder.
        layout: whose names.
        table: whether the position table is in the file; if not, it is the sin-cos table of integer positions.
    """
    if table:
        positions = rename("pos_embed", TABLE)
    else:
        positions = Rule(("pos_embed",), (), lambda: (sincos_table(decoder.dim, decoder.grid),), _nothing)
    return [*_decoder_rules(decoder.depth, decoder.qkv_bias, layout), positions]


def to_rae_decoder(decoder: ViTDecoder) -> dict[str, Tensor]:
    """The state dict of RAE's published decoder class, tensors on the CPU, bit for bit; its position table goes along.

    Heads, epsilon and patch are not in a state dict: they go to the configuration of the published code.

    Raises:
        ConfigError: the published decoder has no such form: its grid is square.
    """
    if decoder.grid[0] != decoder.grid[1]:
        raise ConfigError("decoder.grid", decoder.grid, "RAE's published decoder takes square grids only.")
    return exported(decoder, decoder_rules(decoder))


def check_tensors(what: str, state: Any) -> None:
    """Refuse what is no state dict, e.g. a training checkpoint.

    Raises:
        WeightsError: names what stands there, and how to come by the state dict.
    """
    if not isinstance(state, Mapping):
        raise WeightsError(f"{what}: a {type(state).__name__} is no state dict. Files are read by srcflow.convert.state.read.")
    if other := [f"{k} ({type(v).__name__})" for k, v in state.items() if not isinstance(v, Tensor)]:
        cure = "Of a training checkpoint, srcflow.convert.state.unwrap gives the state dict."
        raise WeightsError(f"{what}: a state dict holds tensors only; these are none:\n  " + "\n  ".join(other) + f"\n{cure}")


def unsized(
    what: str, state: State, expected: Sequence[str], misshaped: Sequence[str], *, ignore: Sequence[str] = (), hint: str = ""
) -> WeightsError:
    """The error of weights without the tensors that show the sizes: every missing and unknown key, and the lines `misshaped`.

    Args:
        what: what the weights are called.
        state: the weights.
        expected: the keys of such a model.
        misshaped: further lines.
        ignore: patterns (`fnmatch`) of keys that hold nothing that matters.
        hint: a sentence at the end.
    """
    names = set(expected)
    lines = [f"missing {k}" for k in expected if k not in state]
    lines += [
        f"unknown {k} {tuple(v.shape)}" for k, v in state.items() if k not in names and not any(fnmatch.fnmatch(k, p) for p in ignore)
    ]
    lines += misshaped
    return WeightsError(f"{what}: the weights do not show its sizes:\n  " + "\n  ".join(lines) + f"\n{hint}" * bool(hint))


def check_epsilon(key: str, value: float) -> None:
    """Refuse an epsilon that is no positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(key, value, "must be a positive number.", "YAML takes 1e-5 for a word; write 1.0e-5.")


def _nothing(*_: Tensor) -> Tensors:
    return ()


def _decoder_rules(depth: int, qkv_bias: bool, layout: Layout) -> list[Rule]:
    rules = [rename("cls_token", "trainable_cls_token")]
    for ours in ("embed", "norm", "head"):
        rules += linear(ours, f"decoder_{'pred' if ours == 'head' else ours}")
    inner, parts, out = ("attention.attention", ("query", "key", "value"), "attention.output.dense")
    if layout == "diffusers":
        inner, parts, out = "attention", ("to_q", "to_k", "to_v"), "attention.to_out.0"
    for i in range(depth):
        block, layer = f"blocks.{i}", f"decoder_layers.{i}"
        rules += linear(f"{block}.norm1", f"{layer}.layernorm_before")
        rules += stacked(f"{block}.attn.qkv", [f"{layer}.{inner}.{part}" for part in parts], qkv_bias)
        rules += linear(f"{block}.attn.proj", f"{layer}.{out}")
        rules += linear(f"{block}.norm2", f"{layer}.layernorm_after")
        rules += linear(f"{block}.mlp.fc1", f"{layer}.intermediate.dense")
        rules += linear(f"{block}.mlp.fc2", f"{layer}.output.dense")
    return rules


def _decoder_names(depth: int, qkv_bias: bool, layout: Layout, table: bool) -> list[str]:
    return [k for rule in _decoder_rules(depth, qkv_bias, layout) for k in rule.theirs] + ([TABLE] if table else [])


def _decoder_part(state: State) -> dict[str, Tensor]:
    """The decoder's own keys; of a whole RAE those under `decoder.`, and whatever belongs to no part of one."""
    if not any(k.startswith("decoder.") for k in state):
        return dict(state)
    return {k.removeprefix("decoder."): v for k, v in state.items() if not k.startswith("encoder.") and k not in BUFFERS}


def _check_needed(state: State, expected: Sequence[str], needed: Mapping[str, int]) -> None:
    """Refuse a state dict that lacks the tensors which show the sizes (name -> number of axes), listing every key that is wrong."""
    if all(k in state and state[k].ndim == axes for k, axes in needed.items()):
        return
    lines = [f"{k}: shape {tuple(state[k].shape)}, expected {n} axes" for k, n in needed.items() if k in state and state[k].ndim != n]
    raise unsized("RAE decoder", state, expected, lines)


def _patch(sizes: Sizes, given: int | None, channels: int, rows: int) -> int:
    """Side of a patch of `channels` that the head's rows make."""
    side = math.isqrt(rows // channels) if channels > 0 else 0
    if side < 1 or channels * side * side != rows:
        why = f"the head predicts {rows} numbers, which are no square patch of so many channels."
        sizes.problems.add(ConfigError("rae_decoder.channels", channels, why, "Give the number of channels."))
        return max(side, 1)
    return sizes.take("patch", given, side)


def _grid(sizes: Sizes, given: int | Sequence[int] | None, positions: int | None) -> Grid:
    """The decoder's grid, which has as many cells as the position table has positions (None: there is no table)."""
    if given is None and positions is None:
        why = "the weights hold no position table that shows it."
        sizes.problems.add(ConfigError("rae_decoder.grid", None, why, "Give the side of the token grid, e.g. 16."))
        return (1, 1)
    if given is not None:
        grid = pair(given, "rae_decoder.grid")
        if positions is not None and grid[0] * grid[1] != positions:
            sizes.problems.add(ConfigError("rae_decoder.grid", given, f"the position table has {positions} positions."))
        return grid
    side = math.isqrt(positions or 0)
    if side * side != positions:
        why = f"the position table has {positions} positions, which are no square."
        sizes.problems.add(ConfigError("rae_decoder.grid", None, why, "Give [rows, columns]."))
    return (side, side)
