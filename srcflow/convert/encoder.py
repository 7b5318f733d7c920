"""Vision encoders of transformers as ours, and back: DINOv2, SigLIP's vision tower, and the encoder of masked autoencoders.

Their tokens come out bit for bit (float32, CPU): the last hidden state without prefix tokens, through a LayerNorm without affine. Both
key layouts are read, transformers 4's (every file on the hub) and what transformers 5 has in memory; 4's is written.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srcflow.convert.config import Sizes, known
from srcflow.convert.rae_decoder import BUFFERS, check_epsilon, check_tensors, unsized
from srcflow.convert.state import Rule, Tensors, exported, linear, load, precision, rename, reshape, stacked
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


@dataclass(frozen=True)
class _Mlp:
    """Their names of an MLP: the maps whose rows are put on top of each other in ours, and the last one."""

    first: tuple[str, ...]
    last: str
    gated: bool = False


_ATTENTION_4 = ("attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense")
_ATTENTION_5 = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
_PLAIN = _Mlp(("mlp.fc1",), "mlp.fc2")


@dataclass(frozen=True)
class _Kind:
    """One kind of encoder: how its parts are called (of alternatives, transformers 4's name first), and what the weights do not show."""

    cls: Any  # DINOv2, SigLIP2 or MAE
    patch: str
    positions: str
    layers: tuple[str, ...]
    attention: tuple[tuple[str, str, str, str], ...]
    mlp: tuple[_Mlp, ...]
    norms: tuple[str, str]
    final: str  # the final norm, whose affine part is dropped
    dropped: tuple[str, ...]  # patterns of keys that do not change the tokens
    beside: tuple[str, ...]  # such patterns beside the encoder's prefix
    sizes: Mapping[str, tuple[int, int, int, int, int]]  # published: patch, dim, depth, heads, mlp
    input_size: int


_KINDS = {
    "dinov2": _Kind(
        cls=DINOv2,
        patch="embeddings.patch_embeddings.projection",
        positions="embeddings.position_embeddings",
        layers=("encoder.layer.", "layers."),
        attention=(_ATTENTION_4, _ATTENTION_5),
        mlp=(
            _PLAIN,
            _Mlp(("mlp.weights_in",), "mlp.weights_out", gated=True),
            _Mlp(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", gated=True),
        ),
        norms=("norm1", "norm2"),
        final="layernorm",
        dropped=("embeddings.mask_token", "layernorm.*"),
        beside=("classifier.*",),
        sizes={
            "small": (14, 384, 12, 6, 1536),
            "base": (14, 768, 12, 12, 3072),
            "large": (14, 1024, 24, 16, 4096),
            "giant": (14, 1536, 40, 24, 4096),
        },
        input_size=224,
    ),
    "siglip2": _Kind(
        cls=SigLIP2,
        patch="embeddings.patch_embedding",
        positions="embeddings.position_embedding.weight",
        layers=("encoder.layers.",),
        attention=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),),
        mlp=(_PLAIN,),
        norms=("layer_norm1", "layer_norm2"),
        final="post_layernorm",
        dropped=("embeddings.position_ids", "post_layernorm.*", "head.*"),
        beside=("text_model.*", "logit_scale", "logit_bias", "classifier.*"),
        sizes={
            "base": (16, 768, 12, 12, 3072),
            "large": (16, 1024, 24, 16, 4096),
            "so400m": (16, 1152, 27, 16, 4304),
            "giantopt": (16, 1536, 40, 16, 6144),
        },
        input_size=256,
    ),
    "mae": _Kind(
        cls=MAE,
        patch="embeddings.patch_embeddings.projection",
        positions="embeddings.position_embeddings",
        layers=("encoder.layer.", "layers."),
        attention=(_ATTENTION_4, _ATTENTION_5),
        mlp=(_Mlp(("intermediate.dense",), "output.dense"), _PLAIN),
        norms=("layernorm_before", "layernorm_after"),
        final="layernorm",
        dropped=("embeddings.mask_token", "layernorm.*"),
        beside=("decoder.*",),
        sizes={"base": (16, 768, 12, 12, 3072), "large": (16, 1024, 24, 16, 4096), "huge": (14, 1280, 32, 16, 5120)},
        input_size=256,
    ),
}


@dataclass(frozen=True)
class _Layout:
    """The names in one state dict."""

    kind: _Kind
    prefix: str
    layers: str
    attention: tuple[str, str, str, str]
    mlp: _Mlp
    registers: bool

    @property
    def positions(self) -> str:
        """Key of the position table."""
        return self.prefix + self.kind.positions

    @property
    def patches(self) -> str:
        """Key of the patches' projection."""
        return f"{self.prefix}{self.kind.patch}.weight"

    @property
    def registers_key(self) -> str:
        """Key of the register tokens."""
        return f"{self.prefix}embeddings.register_tokens"

    def rules(self, depth: int, table: Sequence[int] = (1, 1, 1)) -> list[Rule]:
        """What covers the timm model of `depth` layers; `table` is the shape of its position table (needless where names are all)."""
        at, kind = self.prefix, self.kind
        rules = linear("patch_embed.proj", at + kind.patch)
        if kind.cls is SigLIP2:
            _, n, dim = table
            rules.append(reshape("pos_embed", self.positions, (n, dim), (1, n, dim)))
        elif self.registers:
            rules.append(Rule(("cls_token", "pos_embed"), (f"{at}embeddings.cls_token", self.positions), _fold, _unfold))
            rules.append(rename("reg_token", self.registers_key))
        else:
            rules += [rename("cls_token", f"{at}embeddings.cls_token"), rename("pos_embed", self.positions)]
        for i in range(depth):
            ours, theirs = f"blocks.{i}.", f"{at}{self.layers}{i}."
            *qkv, proj = self.attention
            rules += linear(f"{ours}norm1", theirs + kind.norms[0])
            rules += stacked(f"{ours}attn.qkv", [theirs + name for name in qkv])
            rules += linear(f"{ours}attn.proj", theirs + proj)
            rules += linear(f"{ours}norm2", theirs + kind.norms[1])
            rules += stacked(f"{ours}mlp.fc1", [theirs + name for name in self.mlp.first])
            rules += linear(f"{ours}mlp.fc2", theirs + self.mlp.last)
            if kind.cls is DINOv2:
                rules += [rename(f"{ours}ls{k}.gamma", f"{theirs}layer_scale{k}.lambda1") for k in (1, 2)]
        return rules

    def ignored(self) -> list[str]:
        """Patterns of keys that hold nothing that matters."""
        beside = self.prefix.removesuffix(self.prefix.rstrip(".").rpartition(".")[2] + ".") if self.prefix else ""
        return [self.prefix + p for p in self.kind.dropped] + [beside + p for p in self.kind.beside]


def _fold(cls: Tensor, positions: Tensor) -> Tensors:
    """The class token's position belongs to the token here: (1, 1, D), (1, 1 + N, D) -> (1, 1, D), (1, N, D)."""
    return cls + positions[:, :1], positions[:, 1:]


def _unfold(cls: Tensor, positions: Tensor) -> Tensors:
    """The sum cannot be split again; a position of zero says the same."""
    return cls, torch.cat([torch.zeros_like(cls), positions], 1)


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
        one_of("encoder.encoder", encoder, _KINDS)
    check_tensors("encoder", state_dict)
    given = _encoder_part(state_dict)
    dtype = precision(given)
    # numbers that were rounded (to bfloat16, say) must not be added up in their own precision
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    shown, layout = _layout(state, registers)
    kind, at = layout.kind, layout.prefix
    hint = _hint(state, layout)
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
    kind = next((k for k in _KINDS.values() if type(encoder) is k.cls), None)
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
    layout = _Layout(kind, "", kind.layers[0], kind.attention[0], names, registers)
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


def _layout(state: Mapping[str, Tensor], registers: int | None) -> tuple[str, _Layout]:
    """The kind of encoder that the keys show, and their names. DINOv2 has registers unless `registers` is 0."""
    ends = sorted({f"{kind.patch}.weight" for kind in _KINDS.values()})
    found = [(k.removesuffix(end), end, v) for k, v in state.items() for end in ends if k == end or k.endswith(f".{end}")]
    if len(found) > 1:
        places = ", ".join(repr(at) for at, _, _ in found)
        raise WeightsError(f"the weights hold several encoders, at {places}. Leave one of them.")
    if found:
        at, end, patches = found[0]
        if patches.ndim == 2:
            raise WeightsError(f"{at}{end} is a linear map: NaFlex models take images in their own shape and are not supported.")
        name = "siglip2" if end == f"{_KINDS['siglip2'].patch}.weight" else ""
    else:
        name, at = _guess(state, ends)
    inner = [k.removeprefix(at) for k in state if k.startswith(at)]
    if not name:
        dino = any(".norm1." in k or ".layer_scale1." in k or k == "embeddings.register_tokens" for k in inner)
        name = "dinov2" if dino else "mae"
    kind = _KINDS[name]
    layers = next((root for root in kind.layers if any(k.startswith(root) for k in inner)), kind.layers[0])
    parts = {m[1] for k in inner if (m := re.match(rf"{re.escape(layers)}\d+\.(.+)\.\w+$", k))}
    attention = next((a for a in kind.attention if parts.intersection(a)), kind.attention[0])
    mlp = next((m for m in kind.mlp if parts.intersection((*m.first, m.last))), kind.mlp[0])
    has_registers = name == "dinov2" and (registers != 0 or "embeddings.register_tokens" in inner)
    return name, _Layout(kind, at, layers, attention, mlp, has_registers)


def _guess(state: Mapping[str, Tensor], ends: Sequence[str]) -> tuple[str, str]:
    """Kind and prefix of weights without the patches' projection: those under which most keys have the kind's names.

    Raises:
        WeightsError: no kind explains half of the keys under any prefix; lists all of them.
    """
    votes = Counter[tuple[str, str]]()
    for name, kind in _KINDS.items():
        parts = {*kind.norms, *(p for names in kind.attention for p in names), *(p for m in kind.mlp for p in (*m.first, m.last))}
        tails = [rf"{root}\d+\.{part}\.(?:weight|bias)" for root in kind.layers for part in (*parts, "layer_scale[12]")]
        tails += [rf"{kind.patch}\.bias", kind.positions, "embeddings.cls_token", "embeddings.register_tokens", *kind.dropped]
        pattern = re.compile(rf"((?:.+\.)?)(?:{'|'.join(t.replace('.*', '[.].*') for t in tails)})")
        votes.update((name, m[1]) for k in state if "text_model." not in k and (m := pattern.fullmatch(k)))
    for (name, at), count in votes.most_common(1):
        if 2 * count >= sum(k.startswith(at) for k in state):
            return name, at
    lines = [f"unknown {k} {tuple(v.shape)}" for k, v in state.items()] or ["there are no keys at all"]
    timm = any(k.endswith("patch_embed.proj.weight") for k in state)
    cure = "\nThey look like timm's; an encoder takes those as weights: PATH." if timm else ""
    why = f"the weights hold no vision encoder of transformers ({' or '.join(ends)})"
    raise WeightsError(f"{why}:\n  " + "\n  ".join(lines) + cure)


def _hint(state: Mapping[str, Tensor], layout: _Layout) -> str:
    """What may be the matter if keys are missing or unknown."""
    hints = []
    if layout.registers and layout.registers_key not in state:
        hints.append("RAE's DINOv2 has registers; one without them is read by `encoder` with registers=0.")
    if any(k in state for k in BUFFERS):
        hints.append("A folder of diffusers' AutoencoderRAE is read by rae_diffusers.")
    return " ".join(hints)


def _mlp(state: Mapping[str, Tensor], layout: _Layout, depth: int) -> int:
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


def _check_shown(state: Mapping[str, Tensor], layout: _Layout, depth: int, mlp: int, *, what: str, hint: str) -> None:
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


def _check_grid(table: Tensor | None, layout: _Layout, patch: int, trained_at: int | Sequence[int] | None) -> None:
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


def _resampled(ours: Any, table: Tensor | None, layout: _Layout) -> dict[str, Tensor]:
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
