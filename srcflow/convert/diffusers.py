"""Folders of diffusers' AutoencoderRAE (facts of diffusers 0.42.1), read and written without diffusers or transformers (E1 to E3).

What they hold: config.json, and safetensors with `encoder.*` (transformers' names), `decoder.*` (RAE's names but for attention),
`encoder_mean`, `encoder_std`, `_latents_mean` and `_latents_std`. Their latents are scaling_factor * (tokens - mean) / (std + 1e-5).
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from srcflow.autoencoders.representation import RepresentationAutoencoder
from srcflow.autoencoders.vit_decoder import sincos_table
from srcflow.convert.rae import (
    as_maps,
    assemble,
    by_position,
    check_fitted,
    checked_numbers,
    positions_in,
    published_encoder,
    with_positions,
)
from srcflow.convert.rae_decoder import BUFFERS, decoder_rules
from srcflow.convert.state import exported, read
from srcflow.encoders.dinov2 import DINOv2
from srcflow.encoders.mae import MAE
from srcflow.encoders.siglip2 import SigLIP2
from srcflow.errors import ArtifactError, ConfigError, Problems, ShapeError, UnknownNameError
from srcflow.files import read_json

CLASS, VERSION = "AutoencoderRAE", "0.42.1"
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
EPS = 1e-5
"""What diffusers adds to the deviation."""
FIELDS: dict[str, Any] = {
    "encoder_type": "dinov2",
    "encoder_hidden_size": 768,
    "encoder_patch_size": 14,
    "encoder_num_hidden_layers": 12,
    "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 2048,
    "patch_size": 16,
    "encoder_input_size": 224,
    "image_size": None,
    "num_channels": 3,
    "encoder_norm_mean": None,
    "encoder_norm_std": None,
    "latents_mean": None,
    "latents_std": None,
    "noise_tau": 0.0,
    "reshape_to_2d": True,
    "use_encoder_loss": False,
    "scaling_factor": 1.0,
}
"""The configuration and its defaults there."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Its images' default mean and std, for every encoder."""
TRAINED_AT = {"dinov2": 518, "siglip2": 256, "mae": 224}
"""Image size of the position table its encoders have, whatever the size in use."""
HEAD_DIM, LAYER_NORM_EPS = 64, {"dinov2": 1e-6, "siglip2": 1e-6, "mae": 1e-12}


def rae_diffusers(folder: str | os.PathLike[str]) -> RepresentationAutoencoder:
    """The autoencoder in a folder of diffusers' AutoencoderRAE, written under transformers 4 or 5.

    Its numbers are those of diffusers, but for one thing: a folder holds no positions of the decoder, and diffusers makes them up as
    i * 16 / g on a grid of g x g tokens. The official models were trained with 0, 1, 2, ... for every g, and these are used here. (Only at
    g = 16 are the two the same. If the file does hold a table, that is used.)

    `scaling_factor` s is folded into the statistics: std / s, and 1e-5 / s as epsilon. Noise of the training is left out.

    Args:
        folder: a local directory with config.json and diffusion_pytorch_model.safetensors (or several, with their index).

    Returns:
        The autoencoder in eval mode, on the CPU.

    Raises:
        ArtifactError: files are missing or damaged, or of another class.
        ConfigError: the configuration is not possible, or contradicts the weights (several problems: ProblemsError).
        WeightsError: lists every missing, unknown and misshaped key.
    """
    root = Path(folder)
    config = _config(root)
    state = read(_weights(root))
    kind, dim = config["encoder_type"], config["encoder_hidden_size"]
    grid = config["encoder_input_size"] // config["encoder_patch_size"]
    encoder = {
        "encoder": kind,
        "encoder_dim": dim,
        "encoder_depth": config["encoder_num_hidden_layers"],
        "encoder_heads": dim // HEAD_DIM,
        "encoder_input_size": config["encoder_input_size"],
        "encoder_patch": config["encoder_patch_size"],
        "encoder_trained_at": TRAINED_AT[kind],
        "layer_norm_eps": LAYER_NORM_EPS[kind],
    }
    for name, colours in (("mean", MEAN), ("std", STD)):  # what the file holds comes before the configuration
        stored = state.get(f"encoder_{name}")
        encoder[f"image_{name}"] = (config[f"encoder_norm_{name}"] or colours) if stored is None else stored.flatten().tolist()
    decoder = {
        "latent_dim": dim,
        "dim": config["decoder_hidden_size"],
        "depth": config["decoder_num_hidden_layers"],
        "heads": config["decoder_num_attention_heads"],
        "mlp": config["decoder_intermediate_size"],
        "grid": grid,
        "patch": config["patch_size"],
        "channels": config["num_channels"],
    }
    factor = float(config["scaling_factor"])
    autoencoder = assemble(state, encoder, decoder, EPS / factor, "std", beside=BUFFERS)
    statistics = {}
    for name, default in (("mean", 0.0), ("std", 1.0)):
        value: Any = state.get(f"_latents_{name}", config[f"latents_{name}"])
        value = default if value is None else value
        statistics[name] = _by_position(value, autoencoder, f"latents_{name}", config["reshape_to_2d"], positive=name == "std")
    # the root of a rounded square is the number again, so the divisor is diffusers' own
    autoencoder.set_statistics(statistics["mean"], (statistics["std"].to(autoencoder.var.dtype) / factor).square())
    return autoencoder


def to_diffusers(autoencoder: RepresentationAutoencoder, folder: str | os.PathLike[str]) -> Path:
    """Write a folder of diffusers' AutoencoderRAE, with the encoder in transformers 4's names (under 5 diffusers does not know them).

    diffusers builds its encoder with a position table of a fixed size (518 px for DINOv2, 256 for SigLIP 2, 224 for MAE). An autoencoder
    that was converted still has that table. For another one it is made: the smallest table that becomes the one in use when it is
    resampled, so tokens agree to rounding.

    With RAE's statistics, latents_std is sqrt(var + eps), as diffusers' own converter stores it. As diffusers adds 1e-5 to that, its
    latents are RAE's times about 1 - 1e-5 / std. Statistics in diffusers' convention are written as they are.

    Args:
        autoencoder: what to write, with fitted statistics.
        folder: a new or empty directory, or one that holds an AutoencoderRAE, which is replaced.

    Returns:
        The folder.

    Warns:
        UserWarning: diffusers will not have the decoder's positions: its folders hold none. They are i * 16 / g there.

    Raises:
        ConfigError: diffusers' class has no such form; names every part (several: ProblemsError).
        ArtifactError: the folder holds something else.
    """
    root = _target(Path(folder))
    check_fitted(autoencoder)
    problems = Problems()
    kind = _checked_encoder(autoencoder, problems)
    _checked_decoder(autoencoder, problems)
    eps, factor, std = autoencoder.statistics_eps, 1.0, autoencoder.var.sqrt()
    if autoencoder.eps_convention == "variance":
        std = (autoencoder.var + eps).sqrt()
    elif not eps > 0:
        problems.add(ConfigError("autoencoder.statistics_eps", eps, "diffusers adds a positive number."))
    elif eps != EPS:
        factor = EPS / eps
        std = std * factor
    state = dict[str, Tensor]()
    if kind:
        with problems.collect():
            state = _sized_encoder(autoencoder, kind)
    problems.raise_if_any()
    _warn_of_positions(autoencoder)

    state = {("encoder.vision_model." if kind == "siglip2" else "encoder.") + k: v for k, v in state.items()}
    state |= {f"decoder.{k}": v for k, v in exported(autoencoder.decoder, decoder_rules(autoencoder.decoder, "diffusers", False)).items()}
    encoder, decoder = autoencoder.encoder, autoencoder.decoder
    latents = {"mean": as_maps(autoencoder.mean, autoencoder.grid), "std": as_maps(std, autoencoder.grid)}
    for name in ("mean", "std"):
        state[f"encoder_{name}"] = getattr(encoder, name).detach().to("cpu", copy=True).reshape(1, 3, 1, 1)
        state[f"_latents_{name}"] = latents[name]
    size = autoencoder.grid[0] * encoder.patch_size
    config = FIELDS | {
        "encoder_type": kind,
        "encoder_hidden_size": encoder.dim,
        "encoder_patch_size": encoder.patch_size,
        "encoder_num_hidden_layers": len(encoder.model.blocks),  # type: ignore[union-attr,arg-type]  # torch is untyped here
        "decoder_hidden_size": decoder.dim,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.heads,
        "decoder_intermediate_size": decoder.mlp_dim,
        "patch_size": decoder.patch,
        "encoder_input_size": size,
        "image_size": decoder.image_size[0],
        "encoder_norm_mean": encoder.mean.tolist(),
        "encoder_norm_std": encoder.std.tolist(),
        "latents_mean": latents["mean"].tolist(),
        "latents_std": latents["std"].tolist(),
        "scaling_factor": factor,
    }
    root.mkdir(parents=True, exist_ok=True)
    save_file(state, str(root / WEIGHTS), metadata={"format": "pt"})
    (root / CONFIG).write_text(json.dumps({"_class_name": CLASS, "_diffusers_version": VERSION, **config}, indent=2) + "\n")
    return root


def _config(root: Path) -> dict[str, Any]:
    """The configuration in a folder with what it leaves out; every unknown field and impossible value in one error."""
    file = root / CONFIG
    if not file.is_file():
        raise ArtifactError(f"{file}: there is no such file. Name the folder of the autoencoder itself, with its {CONFIG} and {WEIGHTS}.")
    found = read_json(file, "Copy it again from where it came from.")
    if found.get("_class_name") != CLASS:
        name = found.get("_class_name")
        raise ArtifactError(f"{file}: describes {name}, not an {CLASS}." if name else f"{file}: has no _class_name; expected {CLASS}.")
    problems = Problems()
    config = {**FIELDS, **{k: v for k, v in found.items() if not k.startswith("_")}}
    for name in config.keys() - FIELDS.keys():
        problems.add(UnknownNameError(str(file), name, FIELDS, paths=False))
    whole = [k for k, v in FIELDS.items() if isinstance(v, int) and not isinstance(v, bool)]
    for name in whole:
        if not isinstance(config[name], int) or isinstance(config[name], bool) or config[name] < 1:
            problems.add(ConfigError(name, config[name], "must be a positive integer."))
    if not isinstance(config["encoder_type"], str) or config["encoder_type"] not in TRAINED_AT:
        problems.add(UnknownNameError("encoder_type", str(config["encoder_type"]), TRAINED_AT, paths=False))
    factor = config["scaling_factor"]
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < math.inf:
        problems.add(ConfigError("scaling_factor", factor, "latents are multiplied by a positive number."))
    if not problems.found:
        side, rest = divmod(config["encoder_input_size"], config["encoder_patch_size"])
        if rest:
            why = f"is no multiple of encoder_patch_size = {config['encoder_patch_size']}."
            problems.add(ConfigError("encoder_input_size", config["encoder_input_size"], why))
        elif config["image_size"] not in (None, side * config["patch_size"]):
            why = f"{side} x {side} patches of {config['patch_size']} pixels make {side * config['patch_size']}."
            problems.add(ConfigError("image_size", config["image_size"], why))
    problems.raise_if_any()
    return config


def _weights(root: Path) -> Path:
    """The weights in a folder: one file, or the index of several."""
    files = [root / WEIGHTS, root / f"{WEIGHTS}.index.json"]
    found = next((f for f in files if f.is_file()), None)
    if found is None:
        raise ArtifactError(f"{root} holds no weights: there is neither {files[0].name} nor {files[1].name}.")
    return found


def _by_position(value: Any, autoencoder: RepresentationAutoencoder, name: str, maps: bool, *, positive: bool) -> Tensor:
    """Statistics (N, D) of what broadcasts to (B, C, H, W), or to (B, N, C) where latents are no maps; not negative if `positive`."""
    if maps:
        return by_position(value, autoencoder, name, positive=positive)
    value, shape = checked_numbers(value, autoencoder.var.dtype, name, positive=positive), autoencoder.mean.shape
    try:
        return value.broadcast_to(1, *shape)[0]  # type: ignore[no-any-return]  # torch is untyped here
    except RuntimeError as e:
        raise ShapeError(f"{name} of shape {tuple(value.shape)} does not broadcast to (B, {shape[0]}, {shape[1]}).") from e


def _target(root: Path) -> Path:
    """Refuse a place that holds something else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return root
    file = root / CONFIG
    try:
        ours = json.loads(file.read_text()).get("_class_name") == CLASS
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours or (root / f"{WEIGHTS}.index.json").exists():
        raise ArtifactError(f"{root} exists and holds something else; name another directory, or move it away.")
    return root


def _checked_encoder(autoencoder: RepresentationAutoencoder, problems: Problems) -> str:
    """What diffusers calls the encoder; notes what its class cannot express."""
    encoder = autoencoder.encoder
    kind = {DINOv2: "dinov2", SigLIP2: "siglip2", MAE: "mae"}.get(type(encoder))
    if kind is None or not isinstance(encoder, DINOv2 | SigLIP2 | MAE):
        problems.add(ConfigError("encoder", type(encoder).__name__, "diffusers knows DINOv2, SigLIP2 and MAE only."))
        return ""
    block = encoder.model.blocks[0]
    mlp = 4 * encoder.dim if kind == "dinov2" else 3072
    found: Sequence[tuple[str, Any, Any]] = (
        ("encoder.registers", getattr(encoder, "registers", 4), 4),
        ("encoder.head_dim", encoder.dim // block.attn.num_heads, HEAD_DIM),
        ("encoder.mlp", block.mlp.fc2.in_features, mlp),
        ("encoder.norm_eps", encoder.norm_eps, LAYER_NORM_EPS[kind]),
        ("encoder.act_layer", type(block.mlp.act).__name__, "GELUTanh" if kind == "siglip2" else "GELU"),
        ("encoder.image_size", encoder.input_size, (autoencoder.grid[0] * encoder.patch_size,) * 2),
    )
    for key, value, there in found:
        if value != there:
            problems.add(ConfigError(key, value, f"diffusers' {kind} always has {there}."))
    return kind


def _checked_decoder(autoencoder: RepresentationAutoencoder, problems: Problems) -> None:
    """Note what diffusers' decoder cannot express."""
    decoder = autoencoder.decoder
    if decoder.grid != autoencoder.grid or decoder.grid[0] != decoder.grid[1]:
        problems.add(ConfigError("decoder.grid", decoder.grid, f"diffusers' is the encoder's, a square; here that is {autoencoder.grid}."))
    for key, value, there in (("decoder.norm_eps", decoder.norm_eps, 1e-12), ("decoder.qkv_bias", decoder.qkv_bias, True)):
        if value != there:
            problems.add(ConfigError(key, value, f"diffusers' decoder always has {there}."))


def _sized_encoder(autoencoder: RepresentationAutoencoder, kind: str) -> dict[str, Tensor]:
    """The encoder's tensors, the position table of the size that diffusers builds, and zeros for what it has and does not use."""
    encoder = autoencoder.encoder
    side = TRAINED_AT[kind] // encoder.patch_size

    def fits(state: dict[str, Tensor]) -> bool:
        found = positions_in(state)
        return found is not None and found[1].shape[1] == side * side

    state = published_encoder(autoencoder)
    if not fits(state):  # nothing was kept, or of another size
        state = published_encoder(autoencoder, kept=False)
        found = positions_in(state)
        if found is not None and not fits(state):
            state = with_positions(state, enlarged(found[1], side, antialias=kind == "dinov2"))
    if kind == "siglip2":  # the pooling head
        d = encoder.dim
        shapes = {"probe": (1, 1, d), "attention.in_proj_weight": (3 * d, d), "attention.in_proj_bias": (3 * d,)}
        shapes |= {"attention.out_proj.weight": (d, d), "attention.out_proj.bias": (d,), "layernorm.weight": (d,), "layernorm.bias": (d,)}
        shapes |= {"mlp.fc1.weight": (3072, d), "mlp.fc1.bias": (3072,), "mlp.fc2.weight": (d, 3072), "mlp.fc2.bias": (d,)}
        state |= {f"head.{k}": torch.zeros(shape, dtype=encoder.mean.dtype) for k, shape in shapes.items()}
    return state


def enlarged(used: Tensor, side: int, antialias: bool) -> Tensor:
    """The smallest position table (1, side * side, D) that becomes `used` (1, g * g, D) when it is resampled (bicubic) to its grid.

    Raises:
        ConfigError: there is none: `used` is no resampled table of that size.
    """
    g = math.isqrt(used.shape[1])
    rows = torch.eye(side, dtype=torch.float64)[None, :, :, None].expand(1, side, side, side).contiguous()
    # resampling is linear, and the same for rows and columns: R T R^t with R (g, side)
    r = F.interpolate(rows, size=(g, side), mode="bicubic", align_corners=False, antialias=antialias)[0, :, :, 0].t()
    back = torch.linalg.pinv(r)
    maps = used[0].double().t().reshape(-1, g, g)
    table: Tensor = back @ maps @ back.t()
    worst, size = float((r @ table @ r.t() - maps).abs().max()), float(maps.abs().max())
    if worst > 1e-5 * max(size, 1e-12):
        why = f"it is no table of {side} x {side} positions that was resampled to {g} x {g} (it differs by {worst:.1e})."
        raise ConfigError("encoder.pos_embed", f"{g} x {g}", why, "diffusers' encoder has no other table.")
    return table.reshape(1, -1, side * side).transpose(1, 2).to(used.dtype)


def _warn_of_positions(autoencoder: RepresentationAutoencoder) -> None:
    """Say so if diffusers will decode with other positions than this decoder's."""
    decoder = autoencoder.decoder
    side = decoder.grid[0]
    if not torch.equal(decoder.pos_embed, sincos_table(decoder.dim, decoder.grid).to(decoder.pos_embed)):
        what = "the decoder's position table is not the sin-cos one, and diffusers' format has no place for it: it is lost"
    elif side != 16:
        what = f"diffusers places the decoder's positions at i * 16 / {side}, not at 0, 1, 2, ... as this decoder does"
    else:
        return
    warnings.warn(f"{what}; its images will differ. RAE's format keeps the table.", UserWarning, stacklevel=3)
