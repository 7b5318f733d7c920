"""The keys of transformers' vision encoders: which model a state dict is of, in which layout, and how its tensors are called in timm."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srcflow.convert.rae_decoder import BUFFERS
from srcflow.convert.state import Rule, Tensors, linear, rename, reshape, stacked
from srcflow.encoders.dinov2 import DINOv2
from srcflow.encoders.mae import MAE
from srcflow.encoders.siglip2 import SigLIP2
from srcflow.errors import WeightsError


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
class Kind:
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


KINDS = {
    "dinov2": Kind(
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
    "siglip2": Kind(
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
    "mae": Kind(
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
class Layout:
    """The names in one state dict."""

    kind: Kind
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


def layout_of(state: Mapping[str, Tensor], registers: int | None) -> tuple[str, Layout]:
    """The kind of encoder that the keys show, and their names. DINOv2 has registers unless `registers` is 0."""
    ends = sorted({f"{kind.patch}.weight" for kind in KINDS.values()})
    found = [(k.removesuffix(end), end, v) for k, v in state.items() for end in ends if k == end or k.endswith(f".{end}")]
    if len(found) > 1:
        places = ", ".join(repr(at) for at, _, _ in found)
        raise WeightsError(f"the weights hold several encoders, at {places}. Leave one of them.")
    if found:
        at, end, patches = found[0]
        if patches.ndim == 2:
            raise WeightsError(f"{at}{end} is a linear map: NaFlex models take images in their own shape and are not supported.")
        name = "siglip2" if end == f"{KINDS['siglip2'].patch}.weight" else ""
    else:
        name, at = _guess(state, ends)
    inner = [k.removeprefix(at) for k in state if k.startswith(at)]
    if not name:
        dino = any(".norm1." in k or ".layer_scale1." in k or k == "embeddings.register_tokens" for k in inner)
        name = "dinov2" if dino else "mae"
    kind = KINDS[name]
    layers = next((root for root in kind.layers if any(k.startswith(root) for k in inner)), kind.layers[0])
    parts = {m[1] for k in inner if (m := re.match(rf"{re.escape(layers)}\d+\.(.+)\.\w+$", k))}
    attention = next((a for a in kind.attention if parts.intersection(a)), kind.attention[0])
    mlp = next((m for m in kind.mlp if parts.intersection((*m.first, m.last))), kind.mlp[0])
    has_registers = name == "dinov2" and (registers != 0 or "embeddings.register_tokens" in inner)
    return name, Layout(kind, at, layers, attention, mlp, has_registers)


def _guess(state: Mapping[str, Tensor], ends: Sequence[str]) -> tuple[str, str]:
    """Kind and prefix of weights without the patches' projection: those under which most keys have the kind's names.

    Raises:
        WeightsError: no kind explains half of the keys under any prefix; lists all of them.
    """
    votes = Counter[tuple[str, str]]()
    for name, kind in KINDS.items():
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


def hint_of(state: Mapping[str, Tensor], layout: Layout) -> str:
    """What may be the matter if keys are missing or unknown."""
    hints = []
    if layout.registers and layout.registers_key not in state:
        hints.append("RAE's DINOv2 has registers; one without them is read by `encoder` with registers=0.")
    if any(k in state for k in BUFFERS):
        hints.append("A folder of diffusers' AutoencoderRAE is read by rae_diffusers.")
    return " ".join(hints)
