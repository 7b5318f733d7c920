"""Vision encoders of transformers as ours, and back: DINOv2, SigLIP's vision tower, and the encoder of masked autoencoders.

Their tokens come out bit for bit (float32, CPU): the last hidden state without prefix tokens, through a LayerNorm without affine. Both
key layouts are read, transformers 4's (every file on the hub) and what transformers 5 has in memory; 4's is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from srcflow.convert.config import Sizes, known
from srcflow.convert.encoder_keys import KINDS, Layout, hint_of, layout_of
from srcflow.convert.rae_decoder import check_epsilon, check_tensors, unsized
from srcflow.convert.state import exported, load, precision
from srcflow.encoders.base import Encoder
from srcflow.encoders.dinov2 import DINOv2
from srcflow.encoders.mae import MAE
from srcflow.encoders.siglip2 import SigLIP2
from srcflow.errors import ConfigError, Problems, WeightsError, one_of
from srcflow.nn.patchify import pair
from srcflow.registry import spec_of

_ACTIVATIONS = {"gelu": "gelu", "gelu (erf)": "gelu", "gelu_tanh": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
"""Names of activations in transformers' configurations and in RAE's -> timm's."""
_EXPRESSIBLE = {"embed_dim", "depth", "num_heads", "mlp_ratio", "patch_size", "act_layer"}
"""Which `timm_args` have a counterpart in transformers."""


@known
def encoder(
    state_dict: Mapping[str, Tensor],
    *,
    encoder: str | None = None,
    encoder_dim: int | None = None,
    encoder_depth: int | None = None,
    encoder_heads: int | None = None,
    encoder_mlp: int | None = None,
    encoder_input_size: int | Sequence[int] | None = None,
    encoder_patch: int | None = None,
    encoder_trained_at: int | Sequence[int] | None = None,
    layer_norm_eps: float | None = None,
    act: str | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    registers: int | None = None,
    decoder: Mapping[str, Any] | None = None,
    noise_tau: float | None = None,
    stat_eps: float | None = None,
) -> Encoder:
    """Our encoder of transformers' weights: a `DINOv2`, `SigLIP2` or `MAE` whose specification and state build it again without a file.

    The class token's position goes into the token; the final norm loses its affine part, as in RAE; SigLIP's text tower and pooling head
    and MAE's decoder are left out. The position table is resampled to the input's grid as the model would do it: bicubic, with antialias
    for DINOv2 with registers only. `encoder_input_size` = the size it was trained at keeps the table as it is.

    Args:
        state_dict: their weights, under any outer prefix (`vit.`, `vision_model.`, `encoder.encoder.`, ...); or a whole RAE's, of which
            the keys `decoder.*` are left out.
        encoder: "dinov2", "siglip2" (also SigLIP) or "mae"; null: what the keys show.
        encoder_dim: width D; this and the other sizes are checked against the weights.
        encoder_depth: number of layers.
        encoder_heads: attention heads, which the weights do not show; null: the published model's of these sizes, else D / 64.
        encoder_mlp: width of the MLPs, of a gated one after the gate.
        encoder_input_size: what images are resized to, one number or [height, width], multiples of the patch; null: 224 (DINOv2) or 256.
        encoder_patch: patch size in pixels.
        encoder_trained_at: image size of the position table, one number or two equal ones.
        layer_norm_eps: epsilon of every LayerNorm; null: 1e-6 (MAE: 1e-12).
        act: "gelu" (or "gelu (erf)") or "gelu_tanh"; null: the published model's (SigLIP: gelu_tanh). A gated MLP has SiLU, whichever of
            these or "silu" stands here.
        image_mean: RGB mean of images in [0, 1]; null: ImageNet's (SigLIP: 0.5).
        image_std: standard deviation, likewise.
        registers: of DINOv2: 4, or 0 for the models without registers; null: 4, as RAE has it.
        decoder: of a RAE's configuration; changes nothing here, nor do the next two.
        noise_tau: likewise.
        stat_eps: likewise.

    Returns:
        The encoder in eval mode on the CPU, in float32, or in float64 if the weights are.

    Raises:
        WeightsError: the keys are of no such encoder, or unknown, missing or misshaped; lists all of them.
        ConfigError: a value is not possible, or the weights contradict it (several problems: ProblemsError).
    """
    del decoder, noise_tau, stat_eps
    if encoder is not None:
        one_of("encoder.encoder", encoder, KINDS)
    check_tensors("encoder", state_dict)
    given = _encoder_part(state_dict)
    dtype = precision(given)
    # numbers that were rounded (to bfloat16, say) must not be added up in their own precision
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    shown, layout = layout_of(state, registers)
    kind, at = layout.kind, layout.prefix
    hint = hint_of(state, layout)
    layers = _depth(state, at + layout.layers)
    width = _mlp(state, layout, layers)
    _check_shown(state, layout, layers, width, what=shown, hint=hint)

    sizes = Sizes("encoder")
    problems = sizes.problems
    sizes.take("encoder", encoder, shown)
    patches = state[layout.patches]
    dim, patch = sizes.take("encoder_dim", encoder_dim, patches.shape[0]), sizes.take("encoder_patch", encoder_patch, patches.shape[-1])
    depth, mlp = sizes.take("encoder_depth", encoder_depth, layers), sizes.take("encoder_mlp", encoder_mlp, width)
    if registers not in (None, 0, 4):
        problems.add(ConfigError("encoder.registers", registers, "there is no such DINOv2.", "Known: 0, 4."))
    elif registers == 4 and kind.cls is not DINOv2:
        problems.add(ConfigError("encoder.registers", registers, f"{shown} has none.", "Leave it out."))
    elif registers == 0 and layout.registers:
        why = f"the weights have registers, {layout.registers_key}."
        problems.add(ConfigError("encoder.registers", registers, why, "Write 4, or leave it out."))
    fits = {k: v for k, v in kind.sizes.items() if (v[1], v[2], v[4]) == (dim, depth, mlp) and (k == "giant") == layout.mlp.gated}
    size, published = next(iter(fits.items()), ("giant" if layout.mlp.gated else "base", None))
    heads, input_size = 0, (0, 0)
    with problems.collect():
        heads = _heads(encoder_heads, dim, published[3] if published else None)
    with problems.collect():
        input_size = _input_size(kind.input_size if encoder_input_size is None else encoder_input_size, patch)
    with problems.collect():
        _check_grid(state.get(layout.positions), layout, patch, encoder_trained_at)
    with problems.collect():
        _check_numbers(layer_norm_eps, image_mean, image_std)
    with problems.collect():
        _check_activation(act, layout.mlp.gated)
    if not heads or not input_size[0]:
        problems.raise_if_any()  # there is nothing to load the weights into

    arguments: dict[str, Any] | None = None
    if published != (patch, dim, depth, heads, mlp):
        ratio = ((2 if layout.mlp.gated else 1) * mlp + 0.5) / dim  # timm takes int(dim * ratio), which would round 447.99 down
        arguments = {"embed_dim": dim, "depth": depth, "num_heads": heads, "mlp_ratio": ratio, "patch_size": patch}
    image_size = input_size[0] if input_size[0] == input_size[1] else input_size
    options: dict[str, Any] = {"timm_args": arguments, "norm_eps": layer_norm_eps}
    options["act_layer"] = None if act is None or layout.mlp.gated else _ACTIVATIONS.get(act)  # others were refused above
    if kind.cls is DINOv2:
        options["registers"] = 4 if layout.registers else 0
    with problems.collect():
        with torch.device("meta"):  # every number comes from the weights
            ours: Any = kind.cls(size, image_size, None, **options)
        ours = ours.to(dtype).to_empty(device="cpu")
        state.update(_resampled(ours, state.get(layout.positions), layout))
        load(ours.model, state, layout.rules(depth, ours.model.pos_embed.shape), what=shown, ignore=layout.ignored(), hint=hint)
    problems.raise_if_any()
    for name, colours in (("mean", image_mean), ("std", image_std)):
        getattr(ours, name).copy_(torch.tensor(colours if colours is not None else ours.model.pretrained_cfg[name]))
    return ours.eval()  # type: ignore[no-any-return]  # torch is untyped here


def to_transformers(encoder: Encoder) -> dict[str, Tensor]:
    """The weights of a `DINOv2`, `SigLIP2` or `MAE` in transformers' format: transformers 4's keys without an outer prefix.

    A model of transformers whose `image_size` is the encoder's input size gives the same tokens. What the format has and we do not is
    written so that it changes nothing: the final norm's affine part as ones and zeros, DINOv2's mask token and the class token's position
    (which is in the token) as zeros. Head count, epsilon, activation and the images' mean and std belong into config.json and
    preprocessor_config.json there; SigLIP's pooling head does not exist here (`vision_use_head: false`).

    Args:
        encoder: the encoder.

    Raises:
        ConfigError: it cannot be expressed there; names the part.
    """
    kind = next((k for k in KINDS.values() if type(encoder) is k.cls), None)
    if kind is None or not isinstance(encoder, DINOv2 | SigLIP2 | MAE):
        raise ConfigError("encoder", type(encoder).__name__, "transformers' format is written of DINOv2, SigLIP2 and MAE only.")
    if encoder.last_layers != 1:
        raise ConfigError("encoder.last_layers", encoder.last_layers, "transformers' models give the last layer only.")
    arguments = spec_of(encoder)["init_args"]["timm_args"] or {}
    if other := sorted(arguments.keys() - _EXPRESSIBLE):
        raise ConfigError("encoder.timm_args", other, "transformers' models have nothing that corresponds.")
    rows, columns = encoder.model.patch_embed.grid_size
    if rows != columns:
        cure = "Convert with a square size; transformers resamples for other shapes itself."
        raise ConfigError("encoder.image_size", encoder.input_size, "transformers' position tables are square.", cure)
    mlp = encoder.model.blocks[0].mlp
    gated = mlp.fc1.out_features != mlp.fc2.in_features
    activation = type(mlp.act).__name__
    if activation not in (("SiLU",) if gated else ("GELU", "GELUTanh")):
        raise ConfigError("encoder.act_layer", activation, "transformers' model of this kind does not have it.")
    names = next(m for m in kind.mlp if m.gated == gated)
    registers = isinstance(encoder, DINOv2) and encoder.registers > 0
    layout = Layout(kind, "", kind.layers[0], kind.attention[0], names, registers)
    state = exported(encoder.model, layout.rules(len(encoder.model.blocks), encoder.model.pos_embed.shape))
    ones = torch.ones(encoder.dim, dtype=precision(state))
    state.update({f"{kind.final}.weight": ones, f"{kind.final}.bias": torch.zeros_like(ones)})
    if kind.cls is DINOv2:
        state["embeddings.mask_token"] = torch.zeros_like(ones)[None]
    return state


def _encoder_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's own keys; of a whole RAE all but the decoder's, so that what belongs to no part of one is still found."""
    whole = any(k.startswith("encoder.") and ".embeddings." in k for k in state)
    return {k: v for k, v in state.items() if not (whole and k.startswith("decoder."))}


def _mlp(state: Mapping[str, Tensor], layout: Layout, depth: int) -> int:
    """Width of the MLPs as the first layer that has one shows it, of a gated one after the gate; 0 if none does."""
    names = layout.mlp
    for i in range(depth):
        at = f"{layout.prefix}{layout.layers}{i}."
        down, up = state.get(f"{at}{names.last}.weight"), state.get(f"{at}{names.first[0]}.weight")
        if down is not None and down.ndim == 2:
            return down.shape[1]
        if up is not None and up.ndim == 2:
            return up.shape[0] // (2 if names.gated and len(names.first) == 1 else 1)
    return 0


def _check_shown(state: Mapping[str, Tensor], layout: Layout, depth: int, mlp: int, *, what: str, hint: str) -> None:
    """Refuse weights that do not show the encoder's sizes, listing every key that is wrong."""
    patches = state.get(layout.patches)
    good = patches is not None and patches.ndim == 4 and patches.shape[1] == 3 and patches.shape[2] == patches.shape[3] and patches.numel()
    if good and depth and mlp:
        return
    lines = []
    if patches is not None and not good:
        lines.append(f"{layout.patches}: shape {tuple(patches.shape)}, expected (D, 3, patch, patch)")
    for i in range(depth):
        for name in (*layout.mlp.first, layout.mlp.last):
            key = f"{layout.prefix}{layout.layers}{i}.{name}.weight"
            if key in state and state[key].ndim != 2:
                lines.append(f"{key}: shape {tuple(state[key].shape)}, expected 2 axes")
    if not depth:
        roots = " or ".join(f"{layout.prefix}{root}0. ..." for root in layout.kind.layers)
        hint = f"The weights hold no layers ({roots})." + f" {hint}" * bool(hint)
    names = [k for rule in layout.rules(depth or 1) for k in rule.theirs]
    raise unsized(what, state, names, lines, ignore=layout.ignored(), hint=hint)


def _depth(state: Mapping[str, Tensor], root: str) -> int:
    """One more than the highest layer number."""
    return 1 + max((int(m[1]) for k in state if (m := re.match(rf"{re.escape(root)}(\d+)\.", k))), default=-1)


def _heads(given: int | None, dim: int, published: int | None) -> int:
    """The number of heads: given, the published model's, or of 64 channels each."""
    if given is not None:
        if given < 1 or dim % given:
            raise ConfigError("encoder.encoder_heads", given, f"the weights' width, {dim}, does not divide into so many heads.")
        return given
    if published is None and dim % 64:
        raise ConfigError("encoder.encoder_heads", None, f"a width of {dim} is not a multiple of 64.", "Write the number of heads.")
    return published or dim // 64


def _input_size(value: int | Sequence[int], patch: int) -> tuple[int, int]:
    """(height, width) of the resized images."""
    size = pair(value, "encoder.encoder_input_size")
    if size[0] % patch or size[1] % patch:
        raise ConfigError("encoder.encoder_input_size", value, f"the sides must be multiples of the weights' patch, {patch}.")
    return size


def _check_grid(table: Tensor | None, layout: Layout, patch: int, trained_at: int | Sequence[int] | None) -> None:
    """Refuse a position table that is no square, or not of the size named."""
    if table is None or table.ndim < 2:
        return  # said when the weights are loaded
    n = table.shape[-2] - (layout.kind.cls is not SigLIP2)
    side = math.isqrt(max(0, n))
    if side * side != n or side == 0:
        raise WeightsError(f"{layout.positions}: shape {tuple(table.shape)} holds {n} positions of patches, which are no square grid.")
    if trained_at is None:
        return
    height, width = pair(trained_at, "encoder.encoder_trained_at")
    if (height // patch, width // patch) != (side, side) or height != width:
        shown = f"the weights have a table of {side} x {side} positions, of patches of {patch} pixels."
        raise ConfigError("encoder.encoder_trained_at", trained_at, shown, f"Write {side * patch}, or leave it out.")


def _check_numbers(eps: float | None, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
    """Refuse values that make no sense."""
    problems = Problems()
    with problems.collect():
        if eps is not None:
            check_epsilon("encoder.layer_norm_eps", eps)
    for name, values in (("image_mean", mean), ("image_std", std)):
        if values is not None and len(values) != 3:
            problems.add(ConfigError(f"encoder.{name}", values, "images have three channels."))
        elif values is not None and not all(map(math.isfinite, values)):
            problems.add(ConfigError(f"encoder.{name}", values, "must be finite numbers."))
    if std is not None and not min(std, default=1) > 0:
        problems.add(ConfigError("encoder.image_std", std, "standard deviations are positive."))
    problems.raise_if_any()


def _check_activation(act: str | None, gated: bool) -> None:
    """Refuse an activation that no such encoder has."""
    if act == "silu" and not gated:
        raise ConfigError("encoder.act", act, "only a gated MLP has SiLU, and the weights' is none.", f"Known: {', '.join(_ACTIVATIONS)}.")
    if act is not None:
        one_of("encoder.act", act, (*_ACTIVATIONS, "silu"))


def _resampled(ours: Any, table: Tensor | None, layout: Layout) -> dict[str, Tensor]:
    """The position table for our grid, under its key; nothing if there is nothing to do, or if it is misshaped."""
    flat = layout.kind.cls is SigLIP2
    if table is None or table.ndim != (2 if flat else 3) or table.shape[-1] != ours.dim:
        return {}
    before = table[None] if flat else table[:, 1:] if layout.registers else table  # as our model has it
    if layout.kind.cls is DINOv2:
        before = before.float()  # it resamples in single precision, whatever its weights are
    after = ours.resampled(before)
    if after is before:
        return {}
    if flat:
        return {layout.positions: after[0]}
    patches = after if layout.registers else after[:, 1:]
    return {layout.positions: torch.cat([table[:, :1], patches.to(table.dtype)], 1)}
