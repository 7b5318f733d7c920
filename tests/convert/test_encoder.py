"""transformers' encoders as ours and back, on random weights in their layouts, against the formulae. No transformers, no network.

`test_encoder_reference.py` holds the comparison with transformers itself.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from srcflow import artifacts
from srcflow.convert.encoder import _heads, encoder, to_transformers
from srcflow.convert.encoder_keys import KINDS
from srcflow.convert.rae import rae
from srcflow.convert.state import precision
from srcflow.encoders.base import Encoder
from srcflow.encoders.dinov2 import DINOv2
from srcflow.encoders.efficientnet_lite import EfficientNetLite
from srcflow.encoders.mae import MAE
from srcflow.encoders.siglip2 import SigLIP2
from srcflow.encoders.timm_vit import TimmViT
from srcflow.errors import ConfigError, ProblemsError, UnknownNameError, WeightsError
from srcflow.registry import spec_of
from srcflow.testing import check_encoder

from .vectors import read

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

State = dict[str, Tensor]
CLASSES = {"dinov2": DINOv2, "siglip2": SigLIP2, "mae": MAE}
PATCH = {"dinov2": 14, "siglip2": 16, "mae": 16}
SETTINGS: dict[str, dict[str, Any]] = {  # of the published models
    "dinov2": {"antialias": True, "eps": 1e-6, "gelu": "none"},
    "siglip2": {"antialias": False, "eps": 1e-6, "gelu": "tanh"},
    "mae": {"antialias": False, "eps": 1e-12, "gelu": "none"},
}


def weights(
    kind: str,
    *,
    side: int = 4,
    dim: int = 48,
    depth: int = 2,
    mlp: int = 100,
    patch: int = 0,
    registers: bool = True,
    gated: bool = False,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
) -> State:
    """Random weights under names of our own, read by `named` and `tokens_by_formula`; all of a size at which they matter."""
    g, patch = torch.Generator().manual_seed(0), patch or PATCH[kind]

    def draw(*shape: int, std: float = 0.5) -> Tensor:
        return scale * std * torch.randn(*shape, generator=g, dtype=dtype)

    w = {"patch.weight": draw(dim, 3, patch, patch, std=0.05), "patch.bias": draw(dim), "pos": draw(1, side * side, dim)}
    if kind != "siglip2":
        w |= {"cls": draw(1, 1, dim), "cls_pos": draw(1, 1, dim)}
    if kind == "dinov2" and registers:
        w["reg"] = draw(1, 4, dim)
    shapes = {"q": (dim, dim), "k": (dim, dim), "v": (dim, dim), "o": (dim, dim), "n1": (dim,), "n2": (dim,), "down": (dim, mlp)}
    shapes |= {"gate": (mlp, dim), "up": (mlp, dim)} if gated else {"up": (mlp, dim)}
    for i in range(depth):
        for name, shape in shapes.items():
            w[f"{i}.{name}.weight"] = draw(*shape, std=0.15 if len(shape) > 1 else 0.5) / scale
            w[f"{i}.{name}.bias"] = draw(shape[0])
        if kind == "dinov2":
            w |= {f"{i}.ls1": draw(dim), f"{i}.ls2": draw(dim)}
    return w


def named(kind: str, w: State, version: int = 4) -> State:
    """The weights as transformers 4 or 5 calls them, with what a file holds besides."""
    dim, out = len(w["patch.bias"]), {}
    gated = "0.gate.weight" in w
    if kind == "siglip2":
        parts = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj"}
        parts |= {"n1": "layer_norm1", "n2": "layer_norm2", "up": "mlp.fc1", "down": "mlp.fc2"}
        root, patch = "encoder.layers", "embeddings.patch_embedding"
        out["embeddings.position_embedding.weight"] = w["pos"][0]
    else:
        old = version == 4
        parts = {
            n: f"attention.attention.{long}" if old else f"attention.{n}_proj"
            for n, long in zip("qkv", ("query", "key", "value"), strict=True)
        }
        parts["o"] = "attention.output.dense" if old else "attention.o_proj"
        if kind == "dinov2":
            parts |= {
                "n1": "norm1",
                "n2": "norm2",
                "up": "mlp.fc1",
                "down": "mlp.fc2",
                "ls1": "layer_scale1.lambda1",
                "ls2": "layer_scale2.lambda1",
            }
            if gated:
                parts |= {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
            root = "encoder.layer"
        else:
            parts |= {"n1": "layernorm_before", "n2": "layernorm_after"}
            parts |= {"up": "intermediate.dense", "down": "output.dense"} if old else {"up": "mlp.fc1", "down": "mlp.fc2"}
            root = "encoder.layer" if old else "layers"
        patch = "embeddings.patch_embeddings.projection"
        out["embeddings.cls_token"] = w["cls"]
        out["embeddings.position_embeddings"] = torch.cat([w["cls_pos"], w["pos"]], 1)
        if "reg" in w:
            out["embeddings.register_tokens"] = w["reg"]
    for name, value in w.items():
        number, _, rest = name.partition(".")
        if number.isdigit():
            part, dot, end = rest.partition(".")
            out[f"{root}.{number}.{parts[part]}{dot}{end}"] = value
    if gated and version == 4:
        for i in range(sum(k.endswith(".gate.bias") for k in w)):
            at = f"{root}.{i}.mlp."
            for end in ("weight", "bias"):
                out[f"{at}weights_in.{end}"] = torch.cat([out.pop(f"{at}gate_proj.{end}"), out.pop(f"{at}up_proj.{end}")])
                out[f"{at}weights_out.{end}"] = out.pop(f"{at}down_proj.{end}")
    out |= {f"{patch}.weight": w["patch.weight"], f"{patch}.bias": w["patch.bias"]}
    final = "post_layernorm" if kind == "siglip2" else "layernorm"  # with an affine part, which must have no effect
    out |= {f"{final}.weight": torch.full((dim,), 3.0), f"{final}.bias": torch.full((dim,), 2.0)}
    if kind == "dinov2":
        out["embeddings.mask_token"] = torch.full((1, dim), 9.0)
    return out


def tokens_by_formula(
    kind: str,
    w: State,
    images: Tensor,
    *,
    heads: int = 4,
    size: int | tuple[int, int] = 0,
    antialias: bool | None = None,
    eps: float | None = None,
    gelu: str | None = None,
    cls_position: bool = True,
    mean: Any = None,
    std: Any = None,
) -> Tensor:
    """What the published model gives (before RAE's statistics), in plain torch; the arguments can make each known mistake."""
    settings = {k: SETTINGS[kind][k] if v is None else v for k, v in (("antialias", antialias), ("eps", eps), ("gelu", gelu))}
    dim, patch = len(w["patch.bias"]), w["patch.weight"].shape[-1]
    height, width = (size, size) if isinstance(size, int) else size
    if (height, width) != tuple(images.shape[-2:]):
        images = F.interpolate(images, (height, width), mode="bicubic", align_corners=False)
    mean = mean or ((0.5,) * 3 if kind == "siglip2" else (0.485, 0.456, 0.406))
    std = std or ((0.5,) * 3 if kind == "siglip2" else (0.229, 0.224, 0.225))
    x = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    x = F.conv2d(x, w["patch.weight"], w["patch.bias"], stride=patch).flatten(2).transpose(1, 2)
    side = math.isqrt(w["pos"].shape[1])
    table = w["pos"].transpose(1, 2).unflatten(2, (side, side))
    if (height // patch, width // patch) != (side, side):
        table = F.interpolate(
            table, (height // patch, width // patch), mode="bicubic", align_corners=False, antialias=settings["antialias"]
        )
    x = x + table.flatten(2).transpose(1, 2)
    n = x.shape[1]
    if kind != "siglip2":
        first = w["cls"] + (w["cls_pos"] if cls_position else 0)
        x = torch.cat([t.expand(len(x), -1, -1) for t in (first, *([w["reg"]] if "reg" in w else []))] + [x], 1)

    def norm(x: Tensor, at: str) -> Tensor:
        return F.layer_norm(x, (dim,), w[f"{at}.weight"], w[f"{at}.bias"], settings["eps"])

    def linear(x: Tensor, at: str) -> Tensor:
        return F.linear(x, w[f"{at}.weight"], w[f"{at}.bias"])

    for i in range(sum(k.endswith(".q.bias") for k in w)):
        y = norm(x, f"{i}.n1")
        q, k, v = (linear(y, f"{i}.{part}").unflatten(2, (heads, -1)).transpose(1, 2) for part in "qkv")
        y = linear(((q @ k.transpose(2, 3) / math.sqrt(dim // heads)).softmax(-1) @ v).transpose(1, 2).flatten(2), f"{i}.o")
        x = x + y * w.get(f"{i}.ls1", torch.ones(()))
        y = norm(x, f"{i}.n2")
        if f"{i}.gate.weight" in w:
            y = F.silu(linear(y, f"{i}.gate")) * linear(y, f"{i}.up")
        else:
            y = F.gelu(linear(y, f"{i}.up"), approximate=settings["gelu"])
        x = x + linear(y, f"{i}.down") * w.get(f"{i}.ls2", torch.ones(()))
    return F.layer_norm(x[:, x.shape[1] - n :], (dim,), eps=settings["eps"])


def images(size: int | tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=dtype)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def converted(kind: str, w: State, size: int | tuple[int, int], version: int = 4, **config: Any) -> Any:
    return encoder(named(kind, w, version), encoder_heads=4, encoder_input_size=size, **config)


# --- what comes out ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("kind", CLASSES)
def test_tokens_are_those_of_the_formula(kind: str, version: int) -> None:
    """At the size trained at, a larger and a smaller one, a rectangle, and one with as many positions."""
    w, p = weights(kind), PATCH[kind]
    for size in (4 * p, 7 * p, 3 * p, (2 * p, 8 * p)):
        ours = converted(kind, w, size, version)
        assert type(ours) is CLASSES[kind]
        x = images((4 * p, 5 * p))
        tokens, grid = ours(x)
        assert grid == ((size // p, size // p) if isinstance(size, int) else (2, 8))
        assert distance(tokens, tokens_by_formula(kind, w, x, size=size)) < 2e-5


@pytest.mark.parametrize("version", [4, 5])
def test_a_gated_mlp(version: int) -> None:
    """DINOv2-giant's: the gate is the upper half of the rows in transformers 4, a map of its own in 5."""
    w = weights("dinov2", gated=True)
    for act in (None, "gelu", "silu"):  # configurations say either; the gate has SiLU
        ours = converted("dinov2", w, 56, version, encoder_mlp=100, act=act)
        assert distance(ours(images(56))[0], tokens_by_formula("dinov2", w, images(56), size=56)) < 2e-5
    w["0.gate.weight"], w["0.up.weight"] = w["0.up.weight"], w["0.gate.weight"]
    assert distance(ours(images(56))[0], tokens_by_formula("dinov2", w, images(56), size=56)) > 1e-2


def test_without_registers_the_table_is_resampled_without_antialias() -> None:
    w = weights("dinov2", registers=False)
    ours = converted("dinov2", w, 84, registers=0)
    assert ours.registers == 0
    right, wrong = (tokens_by_formula("dinov2", w, images(84), size=84, antialias=a) for a in (False, True))
    assert distance(ours(images(84))[0], right) < 2e-5 < 1e-2 < distance(right, wrong)


@pytest.mark.parametrize("prefix", ["vision_model.", "vit.", "encoder.encoder.", "encoder.model.", "encoder.", "encoder.vision_model.",
                                    "dinov2.", "dinov2_with_registers.", "siglip.vision_model.", "model.encoder."])  # fmt: skip
@pytest.mark.parametrize("kind", CLASSES)
def test_outer_prefixes(kind: str, prefix: str) -> None:
    state = named(kind, weights(kind, depth=1))
    plain = encoder(state, encoder_heads=4, encoder_input_size=4 * PATCH[kind]).state_dict()
    ours = encoder({prefix + k: v for k, v in state.items()}, encoder_heads=4, encoder_input_size=4 * PATCH[kind]).state_dict()
    assert all(torch.equal(ours[k], v) for k, v in plain.items())


def test_what_does_not_change_the_tokens_is_left_out() -> None:
    one = torch.ones(1)
    besides: dict[str, Mapping[str, Tensor]] = {
        "siglip2": {
            "vision_model.head.probe": one,
            "vision_model.head.mlp.fc1.weight": one,
            "vision_model.embeddings.position_ids": one.long(),
            "text_model.encoder.layers.0.mlp.fc1.weight": one,
            "logit_scale": one,
            "logit_bias": one,
        },
        "mae": {"decoder.mask_token": one, "decoder.decoder_pred.weight": one, "decoder.decoder_layers.7.output.dense.bias": one},
        "dinov2": {"classifier.weight": one},
    }
    for kind, more in besides.items():
        prefix = {"siglip2": "vision_model.", "mae": "vit.", "dinov2": "dinov2_with_registers."}[kind]
        w, size = weights(kind), 4 * PATCH[kind]
        ours = encoder({**{prefix + k: v for k, v in named(kind, w).items()}, **more}, encoder_heads=4, encoder_input_size=size)
        assert distance(ours(images(size))[0], tokens_by_formula(kind, w, images(size), size=size)) < 2e-5


def named_in(error: BaseException) -> set[tuple[str, ...]]:
    """What an error calls missing or unknown, and the keys."""
    return {tuple(line.split()[:2]) for line in str(error).splitlines() if line.startswith(("  missing", "  unknown"))}


@pytest.mark.parametrize("prefix", ["", "vit.", "encoder.model."])
@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("kind", CLASSES)
def test_every_other_key_is_refused(kind: str, version: int, prefix: str) -> None:
    """Every key that the tokens need is missed, a strange key is named wherever it stands, and all in one error: also of keys that show
    the kind (the patches' projection, the registers) or sizes (both maps of the MLP)."""
    state = {prefix + k: v for k, v in named(kind, weights(kind, depth=1), version).items()}
    needed = [k for k in state if not k.removeprefix(prefix).startswith(("layernorm.", "post_layernorm.", "embeddings.mask_token"))]
    strange = ["extra", "encoder.extra", f"{needed[-3]}.extra"]
    for away in (needed[::3], needed[1::3], needed[2::3], [f"{prefix}{KINDS[kind].patch}.weight"]):
        with pytest.raises(WeightsError) as e:
            encoder({**{k: v for k, v in state.items() if k not in away}, **dict.fromkeys(strange, torch.ones(1))}, encoder_heads=4)
        assert named_in(e.value) == {("missing", k) for k in away} | {("unknown", k) for k in strange}


def test_keys_that_show_the_sizes_are_listed_with_the_others() -> None:
    """Missing or misshaped, beside what is missing and unknown besides."""
    state = named("siglip2", weights("siglip2"))
    for name in ("embeddings.patch_embedding.weight", *(f"encoder.layers.{i}.mlp.fc{k}.weight" for i in (0, 1) for k in (1, 2))):
        state[name] = state[name][0]
    del state["encoder.layers.1.layer_norm1.bias"]
    with pytest.raises(WeightsError) as e:
        encoder({**state, "extra": torch.ones(1)})
    for line in (
        "missing encoder.layers.1.layer_norm1.bias",
        "unknown extra (1,)",
        "patch_embedding.weight: shape (3, 16, 16), expected (D, 3, patch, patch)",
        "encoder.layers.1.mlp.fc2.weight: shape (100,), expected 2 axes",
    ):
        assert line in str(e.value)
    without = {k: v for k, v in named("mae", weights("mae")).items() if ".dense.weight" not in k and "projection" not in k}
    with pytest.raises(WeightsError) as e:
        encoder({**without, "extra": torch.ones(1)})
    lost = {k for k in named("mae", weights("mae")) if k not in without}
    assert named_in(e.value) == {("missing", k) for k in lost} | {("unknown", "extra")}


# --- traps: each test fails if the mistake is made ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "size"), [("mae", 96), ("mae", 48), ("siglip2", 96), ("siglip2", 48), ("dinov2", 84), ("dinov2", 42)])
def test_trap_antialias(kind: str, size: int) -> None:
    """The two bicubic kernels differ for enlargement too."""
    w = weights(kind)
    tokens = converted(kind, w, size)(images(size))[0]
    right = SETTINGS[kind]["antialias"]
    assert distance(tokens, tokens_by_formula(kind, w, images(size), size=size, antialias=right)) < 2e-5
    assert distance(tokens, tokens_by_formula(kind, w, images(size), size=size, antialias=not right)) > 1e-2


@pytest.mark.parametrize("kind", CLASSES)
def test_trap_activation(kind: str) -> None:
    """SigLIP's GELU is the tanh form, the others' is not; `act` overrides both, under transformers' names as well."""
    w, size = weights(kind), 4 * PATCH[kind]
    other = {"none": "tanh", "tanh": "none"}[SETTINGS[kind]["gelu"]]
    tokens = converted(kind, w, size)(images(size))[0]
    right, wrong = (tokens_by_formula(kind, w, images(size), size=size, gelu=g) for g in (SETTINGS[kind]["gelu"], other))
    assert distance(tokens, right) < 2e-5 < 2e-4 < distance(tokens, wrong)
    for act in {"none": ("gelu", "gelu (erf)"), "tanh": ("gelu_tanh", "gelu_pytorch_tanh")}[other]:
        assert distance(converted(kind, w, size, act=act)(images(size))[0], wrong) < 2e-5


@pytest.mark.parametrize("kind", ["dinov2", "mae"])
def test_trap_position_of_the_class_token(kind: str) -> None:
    w, size = weights(kind), 4 * PATCH[kind]
    tokens = converted(kind, w, size)(images(size))[0]
    assert distance(tokens, tokens_by_formula(kind, w, images(size), size=size)) < 2e-5
    assert distance(tokens, tokens_by_formula(kind, w, images(size), size=size, cls_position=False)) > 1e-2


@pytest.mark.parametrize("kind", CLASSES)
def test_trap_epsilon(kind: str) -> None:
    """On small activations, where it shows; `layer_norm_eps` takes effect in every norm."""
    w, size = weights(kind, dtype=torch.float64, scale=1e-3), 4 * PATCH[kind]
    x = images(size, torch.float64)
    for eps in (1e-12, 1e-6, 1e-4):
        by_default = eps == SETTINGS[kind]["eps"]
        ours = converted(kind, w, size, layer_norm_eps=None if by_default else eps)
        assert ours.norm_eps == eps
        for other in (1e-12, 1e-6, 1e-4):
            apart = distance(ours(x)[0], tokens_by_formula(kind, w, x, size=size, eps=other))
            assert apart < 1e-6 if other == eps else apart > 1e-3


def test_trap_width_that_rounds_down() -> None:
    """timm takes int(dim * ratio), and 448 * (3904 / 448) is 3903.99..."""
    assert int(448 * (3904 / 448)) == 3903
    state = named("mae", weights("mae", dim=448, depth=1, mlp=3904))
    assert encoder(state, encoder_input_size=64, encoder_mlp=3904).model.blocks[0].mlp.fc1.out_features == 3904  # type: ignore[union-attr]


def test_trap_sums_in_low_precision() -> None:
    """Weights stored in bfloat16 are added up in float32."""
    state = {k: v.bfloat16() for k, v in named("dinov2", weights("dinov2")).items()}
    ours: Any = encoder(state, encoder_heads=4, encoder_input_size=70)
    cls, table = state["embeddings.cls_token"].float(), state["embeddings.position_embeddings"].float()
    assert torch.equal(ours.model.cls_token, cls + table[:, :1])
    grid = table[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    want = F.interpolate(grid, (5, 5), mode="bicubic", align_corners=False, antialias=True).flatten(2).transpose(1, 2)
    assert distance(ours.model.pos_embed, want) < 1e-6


def test_trap_heads_of_published_models() -> None:
    """Where width / 64 would be wrong (so400m, giantopt, huge), the sizes tell the model; our table of them is timm's."""
    assert _heads(None, 1152, 16) == 16
    for kind, cls in CLASSES.items():
        for size, (patch, *rest) in KINDS[kind].sizes.items():
            with torch.device("meta"):
                ours = cls(size, 16 * patch, None, timm_args={"weight_init": "skip"})
            block = ours.model.blocks[0]
            assert [ours.dim, len(ours.model.blocks), block.attn.num_heads, block.mlp.fc2.in_features] == rest
            assert ours.patch_size == patch


# --- settings -----------------------------------------------------------------------------------------------------------------------


def test_a_published_size_is_named_in_the_specification() -> None:
    state = named("dinov2", weights("dinov2", dim=384, depth=12, mlp=1536, side=2))
    init = spec_of(encoder(state))["init_args"]
    assert (init["size"], init["timm_args"], init["weights"], init["image_size"]) == ("small", None, None, 224)
    assert encoder(state, encoder_heads=12).model.blocks[0].attn.num_heads == 12  # type: ignore[union-attr]


def test_heads_are_of_64_channels_by_default() -> None:
    state = named("mae", weights("mae", dim=128))
    assert encoder(state, encoder_input_size=64).model.blocks[0].attn.num_heads == 2  # type: ignore[union-attr]
    w = weights("mae", dim=128)
    assert distance(encoder(state, encoder_input_size=64)(images(64))[0], tokens_by_formula("mae", w, images(64), heads=2, size=64)) < 2e-5
    with pytest.raises(ConfigError, match=r"encoder_heads = 3.*128"):
        encoder(state, encoder_heads=3)
    with pytest.raises(ConfigError, match=r"48 is not a multiple of 64.*number of heads"):
        encoder(named("mae", weights("mae")))


@pytest.mark.parametrize("kind", CLASSES)
def test_input_sizes(kind: str) -> None:
    """By default the published ones; RAE's 512 px model has its encoder at 448, a grid of 32 x 32."""
    state = named(kind, weights(kind, depth=1))
    default = 224 if kind == "dinov2" else 256
    assert encoder(state, encoder_heads=4).input_size == (default, default)
    assert encoder(state, encoder_heads=4, encoder_input_size=[32 * PATCH[kind], 2 * PATCH[kind]])(images(64))[1] == (32, 2)
    with pytest.raises(ConfigError, match=r"encoder_input_size = 100.*multiples"):
        encoder(state, encoder_heads=4, encoder_input_size=100)
    with pytest.raises(ConfigError, match=r"encoder_input_size = 0: is not a size"):
        encoder(state, encoder_heads=4, encoder_input_size=0)


def test_448_pixels_of_a_table_of_37_by_37() -> None:
    w = weights("dinov2", side=37, depth=1)
    ours = converted("dinov2", w, 448, encoder_trained_at=518)
    tokens, grid = ours(images(64))
    assert grid == (32, 32)
    assert distance(tokens, tokens_by_formula("dinov2", w, images(64), size=448)) < 2e-5


def test_other_patches() -> None:
    w = weights("siglip2", patch=8)
    ours = converted("siglip2", w, 48, encoder_patch=8, encoder_trained_at=32)
    assert (ours.patch_size, ours(images(48))[1]) == (8, (6, 6))
    assert distance(ours(images(48))[0], tokens_by_formula("siglip2", w, images(48), size=48)) < 2e-5


def test_a_remainder_of_the_trained_size_counts_for_nothing() -> None:
    """SigLIP so400m, patch 14, was trained at 384 pixels: 27 patches, and 6 pixels left."""
    w = weights("siglip2", side=5, patch=14, depth=1)
    assert converted("siglip2", w, 70, encoder_trained_at=76).patch_size == 14
    with pytest.raises(ConfigError, match=r"encoder_trained_at = 84: the weights have a table of 5 x 5"):
        converted("siglip2", w, 70, encoder_trained_at=84)


@pytest.mark.parametrize("kind", CLASSES)
def test_mean_and_std_take_effect_and_are_kept(kind: str, tmp_path: Path) -> None:
    w, size = weights(kind), 4 * PATCH[kind]
    mean, std = [0.1, 0.2, 0.3], [0.9, 0.8, 0.7]
    ours = converted(kind, w, size, image_mean=mean, image_std=std)
    tokens = ours(images(size))[0]
    assert distance(tokens, tokens_by_formula(kind, w, images(size), size=size, mean=mean, std=std)) < 2e-5
    assert distance(tokens, tokens_by_formula(kind, w, images(size), size=size)) > 1e-2
    again = artifacts.load(artifacts.save(tmp_path / "a", ours), Encoder)
    assert torch.equal(again(images(size))[0], tokens)


def test_double_precision_stays() -> None:
    for kind in CLASSES:
        w, size = weights(kind, dtype=torch.float64), 6 * PATCH[kind]
        ours = converted(kind, w, size)
        x = images(size, torch.float64)
        assert {t.dtype for t in ours.state_dict().values()} == {ours(x)[0].dtype} == {torch.float64}
        table = w["pos"].transpose(1, 2).unflatten(2, (4, 4))
        table = table.float() if kind == "dinov2" else table  # as transformers does
        table = F.interpolate(table, (6, 6), mode="bicubic", align_corners=False, antialias=SETTINGS[kind]["antialias"]).double()
        assert distance(ours.model.pos_embed[:, -36:], table.flatten(2).transpose(1, 2)) < 1e-12
        assert distance(ours(x)[0], tokens_by_formula(kind, w, x, size=size)) < 1e-6
        at_home = converted(kind, w, 4 * PATCH[kind])
        assert torch.equal(at_home.model.pos_embed[:, -16:], w["pos"])
        assert precision(to_transformers(at_home)) == torch.float64


@pytest.mark.parametrize("kind", CLASSES)
def test_an_artifact_is_the_same_encoder_without_any_file(kind: str, tmp_path: Path) -> None:
    size = 5 * PATCH[kind]
    ours = converted(kind, weights(kind), size, act="gelu", layer_norm_eps=1e-5)
    check_encoder(ours)
    again = artifacts.load(artifacts.save(tmp_path / "a", ours), Encoder)
    again.setup()  # there is nothing to load
    assert spec_of(again)["init_args"]["weights"] is None
    assert torch.equal(again(images(size))[0], ours(images(size))[0])
    assert not any(p.requires_grad for p in ours.parameters())
    assert not ours.training


# --- what is refused ------------------------------------------------------------------------------------------------------------------


def test_contradictions_are_refused_together() -> None:
    """With the keys that do not fit, in one error."""
    state = named("dinov2", weights("dinov2"))
    state |= {"extra": torch.ones(2), "encoder.layer.1.norm1.bias": torch.ones(47)}
    del state["encoder.layer.0.norm2.weight"]
    wrong: dict[str, Any] = {"encoder": "mae", "encoder_dim": 64, "encoder_depth": 3, "encoder_mlp": 192, "encoder_patch": 16}
    wrong |= {"encoder_trained_at": 518, "layer_norm_eps": -1.0, "act": "relu", "image_mean": [0.5], "image_std": [0.5, 0.5, 0.0]}
    with pytest.raises(ProblemsError) as e:
        encoder(state, encoder_heads=4, **wrong)
    keys = [p.key for p in e.value.problems if isinstance(p, ConfigError)]
    assert sorted(keys) == sorted(f"encoder.{k}" for k in wrong)
    for line in (
        "missing encoder.layer.0.norm2.weight (48,)",
        "unknown extra (2,)",
        "encoder.layer.1.norm1.bias: shape (47,), expected (48,)",
    ):
        assert line in str(e.value)
    for name, value in wrong.items():
        with pytest.raises(ConfigError, match=rf"encoder\.{name} = "):
            encoder(named("dinov2", weights("dinov2")), encoder_heads=4, **{name: value})


def test_right_values_are_accepted() -> None:
    """Everything that a published configuration says, as the authors name it."""
    config = {"encoder_dim": 48, "encoder_depth": 2, "encoder_heads": 4, "encoder_mlp": 100, "encoder_patch": 14, "encoder_input_size": 70}
    config |= {"encoder_trained_at": 56, "layer_norm_eps": 1e-6, "encoder": "dinov2", "act": "gelu"}  # type: ignore[dict-item]
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    ours = encoder(named("dinov2", weights("dinov2")), **config, image_mean=mean, image_std=std)  # type: ignore[arg-type]
    plain = converted("dinov2", weights("dinov2"), 70)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("version", [4, 5])
def test_lost_registers_are_missed(version: int) -> None:
    """They would leave another encoder, with another resampling; only on demand are there none."""
    state = named("dinov2", weights("dinov2", registers=False), version)
    for given in (None, 4):
        with pytest.raises(WeightsError, match=r"(?s)missing embeddings\.register_tokens \(1, 4, 48\).*registers=0"):
            encoder(state, encoder_heads=4, registers=given)
    assert encoder(state, encoder_heads=4, registers=0).registers == 0  # type: ignore[attr-defined]
    whole = named("dinov2", weights("dinov2"), version)
    assert encoder(whole, encoder_heads=4, registers=4).registers == 4  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"encoder\.registers = 0: the weights have registers"):
        encoder(whole, encoder_heads=4, registers=0)
    with pytest.raises(ConfigError, match=r"encoder\.registers = 8.*Known: 0, 4"):
        encoder(whole, encoder_heads=4, registers=8)
    other = named("mae", weights("mae"))
    assert isinstance(encoder(other, encoder_heads=4, registers=0), MAE)
    with pytest.raises(ConfigError, match=r"encoder\.registers = 4: mae has none"):
        encoder(other, encoder_heads=4, registers=4)


def test_a_plain_mlp_has_no_silu() -> None:
    for kind in CLASSES:
        with pytest.raises(ConfigError, match=r"encoder\.act = 'silu': only a gated MLP"):
            encoder(named(kind, weights(kind)), encoder_heads=4, act="silu")
    with pytest.raises(ConfigError, match=r"encoder\.act = 'relu'"):
        encoder(named("dinov2", weights("dinov2", gated=True)), encoder_heads=4, encoder_mlp=100, act="relu")


@pytest.mark.parametrize("name", ["rae_dinov2", "rae_siglip2"])
def test_a_whole_autoencoder_under_its_own_configuration(name: str) -> None:
    """The encoder of a RAE: its decoder is left out, and what its sidecar says besides changes nothing."""
    v = read(name)
    assert {"decoder", "noise_tau", "stat_eps"} <= v.config.keys()
    ours, whole = encoder(v.state, **v.config), rae(v.state, **v.config).encoder
    assert {k: t.tolist() for k, t in ours.state_dict().items()} == {k: t.tolist() for k, t in whole.state_dict().items()}
    x = v.given["image_u8"] / 255
    assert torch.equal(ours(x)[0], whole(x)[0])
    with pytest.raises(WeightsError, match=r"unknown x \(1,\)"):
        encoder({**v.state, "x": torch.ones(1)}, **v.config)
    with pytest.raises(WeightsError, match=r"(?s)unknown encoder_mean \(3,\).*rae_diffusers"):  # it would be the images' mean
        encoder({**v.state, "encoder_mean": torch.ones(3)}, **v.config)


@pytest.mark.parametrize(("name", "value"), [
    ("encoder_trained_at", [56, 70]), ("encoder_trained_at", [56]), ("encoder_trained_at", "56"),
    ("image_mean", 0.5), ("image_std", [1, 1, "1"]),
    ("image_mean", [0.5, 0.5, math.nan]), ("image_std", [1.0, 1.0, math.inf]), ("layer_norm_eps", math.inf), ("layer_norm_eps", math.nan),
    ("encoder_heads", 3.5), ("encoder_input_size", [56.5, 56]), ("registers", "none"), ("decoder", 4), ("stat_eps", "1e-5"),
])  # fmt: skip
def test_values_that_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"encoder\.{name} = "):
        encoder(named("dinov2", weights("dinov2", depth=1)), **{"encoder_heads": 4, name: value})


def test_other_ways_to_write_a_value() -> None:
    state = named("dinov2", weights("dinov2", depth=1))
    plain = encoder(state, encoder_heads=4, encoder_input_size=70, encoder_trained_at=56, image_mean=[0.0, 0.5, 1.0])
    other: dict[str, Any] = {
        "encoder_heads": 4.0,
        "encoder_input_size": [70.0, 70],
        "encoder_trained_at": [56, 56],
        "image_mean": (0, 0.5, 1),
    }
    assert all(torch.equal(t, plain.state_dict()[k]) for k, t in encoder(state, **other).state_dict().items())


def test_unknown_names() -> None:
    state = named("mae", weights("mae"))
    with pytest.raises(UnknownNameError, match=r"encoder_heads"):
        encoder(state, encoder_head=4)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"dinov2, siglip2, mae"):
        encoder(state, encoder="clip")


def test_other_files_are_refused_with_a_reason() -> None:
    dino, mae = named("dinov2", weights("dinov2")), named("mae", weights("mae"))
    with pytest.raises(WeightsError, match=r"(?s)no vision encoder.*no keys at all"):
        encoder({})
    llama = [f"model.layers.{i}.{k}.weight" for i in (0, 1) for k in ("self_attn.q_proj", "self_attn.o_proj", "input_norm", "mlp.up_proj")]
    with pytest.raises(WeightsError, match="no vision encoder") as all_of_them:
        encoder({k: torch.ones(2, 3) for k in llama})
    assert named_in(all_of_them.value) == {("unknown", k) for k in llama}
    with pytest.raises(WeightsError, match=r"timm's.*weights: PATH"):
        encoder({"patch_embed.proj.weight": torch.ones(1)})
    with pytest.raises(WeightsError, match=r"several encoders, at 'a\.', 'b\.'"):
        encoder({**{f"a.{k}": v for k, v in dino.items()}, **{f"b.{k}": v for k, v in mae.items()}})
    with pytest.raises(WeightsError, match="NaFlex"):
        encoder({"vision_model.embeddings.patch_embedding.weight": torch.ones(48, 768)})
    with pytest.raises(WeightsError, match=r"expected \(D, 3, patch, patch\)"):
        encoder({**dino, "embeddings.patch_embeddings.projection.weight": torch.ones(48, 1, 14, 14)})
    with pytest.raises(WeightsError, match="no layers"):
        encoder({k: v for k, v in dino.items() if ".layer." not in k})
    with pytest.raises(ProblemsError, match="15 positions of patches, which are no square grid"):
        encoder({**dino, "embeddings.position_embeddings": torch.ones(1, 16, 48)}, encoder_heads=4)
    with pytest.raises(WeightsError, match=r"unknown decoder\.decoder_pred\.bias \(3,\)"):  # beside a bare encoder
        encoder({**dino, "decoder.decoder_pred.bias": torch.ones(3)}, encoder_heads=4)
    with pytest.raises(WeightsError, match=r"(?s)model \(dict\)\n  epoch \(int\).*srcflow\.convert\.state\.unwrap"):
        encoder({"model": dino, "epoch": 3})  # type: ignore[dict-item]
    with pytest.raises(WeightsError, match=r"a str is no state dict.*srcflow\.convert\.state\.read"):
        encoder("model.safetensors")  # type: ignore[arg-type]
    gap = {k.replace(".layer.1.", ".layer.2."): v for k, v in dino.items()}
    with pytest.raises(WeightsError, match=r"missing encoder\.layer\.1\.norm1\.weight"):
        encoder(gap, encoder_heads=4)


# --- back -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("kind", [*CLASSES, "dinov2, gated", "dinov2, no registers"])
def test_published_ours_published(kind: str, version: int) -> None:
    kind, _, variant = kind.partition(", ")
    w = weights(kind, gated=variant == "gated", registers=variant != "no registers")
    size = 4 * PATCH[kind]
    none = {"registers": 0} if variant == "no registers" else {}
    ours = converted(kind, w, size, version, **none)
    back, want = to_transformers(ours), named(kind, w)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in want.items()}
    folded = {"embeddings.cls_token", "embeddings.position_embeddings"} if kind == "dinov2" and variant != "no registers" else set()
    without_effect = {k for k in want if k.startswith(("layernorm.", "post_layernorm.", "embeddings.mask_token"))}
    assert all(torch.equal(back[k], v) for k, v in want.items() if k not in folded | without_effect)
    assert all(torch.equal(v, torch.full_like(v, k.endswith("weight"))) for k, v in back.items() if k in without_effect)
    if folded:
        table = want["embeddings.position_embeddings"]
        assert torch.equal(back["embeddings.position_embeddings"][:, 1:], table[:, 1:])
        assert torch.equal(back["embeddings.cls_token"], want["embeddings.cls_token"] + table[:, :1])
        assert not back["embeddings.position_embeddings"][:, :1].any()
    assert all(v.is_contiguous() for v in back.values())
    again = encoder(back, encoder_heads=4, encoder_input_size=size, **none)
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in again.state_dict().items())
    assert torch.equal(again(images(size))[0], ours(images(size))[0])
    back["embeddings.patch_embedding.bias" if kind == "siglip2" else "embeddings.patch_embeddings.projection.bias"].zero_()
    assert float(ours.model.patch_embed.proj.bias.abs().min()) > 0  # the tensors are copies


@pytest.mark.parametrize("kind", CLASSES)
def test_a_resampled_table_goes_back_as_it_is_used(kind: str) -> None:
    ours = converted(kind, weights(kind), 6 * PATCH[kind])
    again = encoder(to_transformers(ours), encoder_heads=4, encoder_input_size=6 * PATCH[kind], encoder_trained_at=6 * PATCH[kind])
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in again.state_dict().items())


TINY = {"embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(("make", "message"), [
    (lambda: EfficientNetLite(image_size=32, weights=None), "EfficientNetLite"),
    (lambda: TimmViT("vit_tiny_patch16_224", 32, weights=None, timm_args=TINY), "TimmViT.*DINOv2, SigLIP2 and MAE"),
    (lambda: MAE(image_size=32, weights=None, last_layers=2, timm_args=TINY), "last_layers = 2"),
    (lambda: MAE(image_size=32, weights=None, timm_args={**TINY, "dynamic_img_size": True}), "timm_args.*dynamic_img_size"),
    (lambda: MAE(image_size=32, weights=None, timm_args={**TINY, "qk_norm": True}), "timm_args.*qk_norm"),
    (lambda: SigLIP2(image_size=(32, 48), weights=None, timm_args=TINY), "image_size.*square"),
    (lambda: SigLIP2(image_size=32, weights=None, act_layer="relu", timm_args=TINY), "act_layer.*ReLU"),
    (lambda: DINOv2("giant", 28, None, act_layer="gelu", timm_args=TINY), "act_layer.*GELU"),
])  # fmt: skip
def test_what_transformers_cannot_express_is_refused(make: Callable[[], Encoder], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        to_transformers(make())


# --- full size ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_base_model_of_full_size(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """DINOv2-B with registers: convert, save, load, bit-equal tokens."""
    w = weights("dinov2", side=37, dim=768, depth=12, mlp=3072, scale=0.3)
    state, x = named("dinov2", w), images(256)
    assert sum(v.numel() for k, v in state.items()) == pytest.approx(86.6e6, rel=1e-2)

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start, result = time.perf_counter(), call()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        record_property(name, f"{time.perf_counter() - start:.2f} s, peak of the process {peak:.2f} GiB")
        print(f"{name}: {time.perf_counter() - start:.2f} s, peak of the process {peak:.2f} GiB")
        return result

    print()
    timed("before: timm imported, the weights in memory", lambda: DINOv2(image_size=28, weights=None, timm_args={"depth": 1}))
    ours = timed("convert", lambda: encoder(state))
    timed("save", lambda: artifacts.save(tmp_path / "a", ours))
    again = timed("load", lambda: artifacts.load(tmp_path / "a", Encoder))
    assert spec_of(again)["init_args"]["timm_args"] is None
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in again.state_dict().items())
    tokens, grid = timed("tokens of two images", lambda: ours(x))
    assert grid == (16, 16)
    assert torch.equal(again(x)[0], tokens)
    assert distance(tokens, tokens_by_formula("dinov2", w, x, heads=12, size=224)) < 1e-4
    back = timed("back", lambda: to_transformers(ours))
    assert all(torch.equal(v, ours.state_dict()[k]) for k, v in encoder(back, encoder_trained_at=224).state_dict().items())
