"""From published files to our directories, and from our directories to published files: what `srcflow convert` and `srcflow export` do."""

from __future__ import annotations

import inspect
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor, nn

from srcflow import artifacts, convert, yaml_files
from srcflow.autoencoders.base import Autoencoder
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.autoencoders.representation import RepresentationAutoencoder
from srcflow.chain import locate
from srcflow.convert.config import check_names, names
from srcflow.convert.state import read
from srcflow.errors import ArtifactError, ConfigError, Problems, UnknownNameError, one_of
from srcflow.flows.flow import Flow
from srcflow.formats import FLOWS, FORMATS, KINDS

UNSEEN = {"tarflow": ("head_dim",), "starflow": ("head_dim", "use_softplus", "soft_clip", "seq_order")}
"""What weights do not show of a model: left out, it has the published constructor's default."""
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
"""What a folder of the hub calls its weights, the preferred first."""

STARFLOW_NAMES = {"channel_size": "in_channels", "blocks": "num_blocks"}
"""Names in STARFlow's training configurations that its constructor calls otherwise."""
STARFLOW_VAE_STRIDE = 8
STARFLOW_SCRIPT = {"patch_size": 4, "layers_per_block": 8, "blocks": 4}
"""What STARFlow's training script takes for arguments that its configuration leaves out, where its constructor has no default."""
STARFLOW_TRAINING = frozenset(
    {"acc", "adaln", "batch_size", "caption_column", "cfg", "compile", "cond_noise_level", "data", "dataset", "drop_image", "drop_label"}
    | {"dry_run", "epoch_length", "epochs", "finetuned_vae", "fp8", "fsdp", "fsdp_text_encoder", "gradient_checkpoint", "grad_clip"}
    | {"gradient_checkpoint_mlp", "grad_skip", "img_size", "last_frame_cond", "latent_norm_regularization", "logdir", "loss_scaling", "lr"}
    | {"min_lr", "mix_aspect", "model_config_path", "no_flip", "noise_embed_denoiser", "noise_std", "noise_type", "num_samples", "nvp"}
    | {"resume_epoch", "resume_path", "sample_batch_size", "sample_freq", "save_every", "secondary_batch_size", "secondary_dataset", "text"}
    | {
        "secondary_img_size",
        "secondary_ratio",
        "secondary_vid_size",
        "target_noise_std",
        "train_seed",
        "use_8bit_adam",
        "vae",
        "wandb_name",
    }
    | {"vae_decoder_factor", "video_to_video", "warmup_steps", "wds", "num_workers"}
)
"""Names in STARFlow's training configurations that say nothing about the network."""


def convert_file(
    kind: str,
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: Mapping[str, Any] | None = None,
    *,
    encoder: str | os.PathLike[str] | None = None,
    statistics: str | os.PathLike[str] | None = None,
    autoencoder: str | os.PathLike[str] | None = None,
) -> Path:
    """Convert a published file (or folder) and write the artifact; returns its directory.

    Args:
        kind: one of `srcflow.formats.KINDS`.
        path: the file; for `rae_diffusers` the folder; for `encoder` also a folder of the hub.
        out: directory to write.
        config: the published model's configuration, under its own names.
        encoder: `rae`: file or folder of the encoder's weights, where `path` holds the decoder only.
        statistics: `rae`: file with the latent statistics, a dict of `mean` and `var` (published as stat.pt).
        autoencoder: flows: directory of the autoencoder that makes its tokens; None: for TARFlow on three channels its own scaling of
            pixels, which is written into `out`.

    Raises:
        ArtifactError: a file is missing or damaged, or `out` exists and is not an artifact.
        ConfigError: a configuration name is unknown, contradicted by the weights, or a file does not go with this kind.
        WeightsError: keys are missing, unknown or misshaped.
    """
    one_of("kind", kind, KINDS)
    config = dict(config or {})
    problems = Problems()
    for key, value, kinds in (("encoder", encoder, ("rae",)), ("statistics", statistics, ("rae",)), ("autoencoder", autoencoder, FLOWS)):
        if value is not None and kind not in kinds:
            problems.add(ConfigError(key, str(value), f"does not go with {kind}.", f"It is for {' and '.join(kinds)}."))
    function = getattr(convert, kind)
    with problems.collect():  # before the file, which may be large, is read
        check_names(function, config)
    with problems.collect():
        artifacts.check_target(out, "out")
    problems.raise_if_any()
    module: nn.Module
    if kind == "rae_diffusers":
        module = function(path, **config)
    elif kind == "rae":
        state = read_weights(path)
        if encoder is not None:
            state = _with_encoder(state, read_weights(encoder), path)
        module = function(state, None if statistics is None else read_statistics(statistics), **config)
    else:
        module = function(read_weights(path), **config)
    facts = {
        "kind": kind,
        "file": Path(path).name,
        "sha256": None if Path(path).is_dir() else artifacts.file_hash(Path(path)),
        "config": config,
    }
    return save(module, out, facts, _codec(kind, module, config) if autoencoder is None else autoencoder)


def defaults(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a model's weights do not show: what `config` leaves to the default, and that default."""
    takes = inspect.signature(getattr(convert, kind)).parameters
    return {name: takes[name].default for name in UNSEEN.get(kind, ()) if name not in config}


def save(
    module: nn.Module, out: str | os.PathLike[str], facts: Mapping[str, Any], codec: Autoencoder | str | os.PathLike[str] | None
) -> Path:
    """Write a converted module as an artifact.

    Args:
        module: the module.
        out: the directory.
        facts: where it comes from; recorded in the manifest under `converted_from`.
        codec: a flow's autoencoder: a module, which is written into the directory's subfolder `autoencoder`, or where one already is.
    """
    target = artifacts.check_target(out, "out")
    manifest: dict[str, Any] = {"converted_from": dict(facts)}
    if codec is None:
        return artifacts.save(target, module, manifest=manifest)
    if not isinstance(codec, Autoencoder):
        manifest["built_on"] = {"autoencoder": artifacts.reference(artifacts.check(codec), start=target)}
        return artifacts.save(target, module, manifest=manifest)
    beside = target.with_name(f".{target.name}.{os.getpid()}.autoencoder")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        artifacts.save(beside, codec)
        manifest["built_on"] = {"autoencoder": {"path": "autoencoder", "hash": artifacts.content_hash(beside)}}
        artifacts.save(target, module, manifest=manifest)
        beside.rename(target / "autoencoder")
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return target


def read_weights(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights in a file, or in a folder as the hub has them.

    Raises:
        ArtifactError: there are none.
    """
    root = Path(path)
    if not root.is_dir():
        return read(root)
    found = next((root / name for name in WEIGHT_FILES if (root / name).is_file()), None)
    if found is None:
        raise ArtifactError(f"{root} holds no weights; looked for {', '.join(WEIGHT_FILES)}.")
    return read(found)


def read_statistics(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Latent statistics from a file: `var` and, mostly, `mean` (without which `rae` takes 0 and says so).

    Raises:
        ArtifactError: the file is missing or holds something else.
    """
    found = read(Path(path))
    if not {"var"} <= set(found) <= {"mean", "var"}:
        raise ArtifactError(f"{path} holds {sorted(found)[:4]}; latent statistics are a dict of mean and var.")
    return found


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A model's configuration from a JSON or YAML file: a mapping of names to values, also under `config` (beside reference numbers), or a
    training configuration as STARFlow publishes them (a list under `arguments`).

    Raises:
        ArtifactError: the file holds no mapping.
        ConfigError: it cannot be read, has a key twice or an unknown name of STARFlow's training configuration, or is one for video.
    """
    file = Path(path)
    content = parsed(yaml_files.read(file), source=file)
    if isinstance(content, dict) and isinstance(content.get("arguments"), list):
        if not all(isinstance(entry, dict) for entry in content["arguments"]):
            raise ArtifactError(f"{file}: every entry of arguments is one `name: value`.")
        return starflow_arguments({k: v for entry in content["arguments"] for k, v in entry.items()})
    if isinstance(content, dict) and isinstance(content.get("config"), dict):
        content = content["config"]
    if not isinstance(content, dict):
        raise ArtifactError(f"{file} holds a {type(content).__name__}; a configuration maps names to values.")
    return {str(k): v for k, v in content.items()}


def parsed(text: str, key: str = "config", source: Path | None = None) -> Any:
    """A value written as JSON or YAML.

    Args:
        text: the value.
        key: the option that it stands in, or that names its file.
        source: its file.

    Raises:
        ConfigError: it is neither, or has a key twice.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return yaml_files.parse(text, key, source)
    with suppress(yaml.YAMLError):  # JSON that YAML cannot read, e.g. indented with tabs
        yaml_files.check_keys(text, key, source)
    return value


def starflow_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments from those of STARFlow's training script, which gives the side in pixels of the image.

    Raises:
        ConfigError: a name is unknown, or the model is one for video.
    """
    problems, config = Problems(), dict[str, Any]()
    for name, value in {**STARFLOW_SCRIPT, **arguments}.items():
        if name in ("vid_size", "fps_cond", "temporal_causal") and value not in (None, 0, "none"):
            problems.add(ConfigError(f"config.{name}", value, "is of STARFlow-V; srcflow has no models for video."))
        elif name in ("nvp", "adaln") and bool(value) != (name == "nvp"):
            problems.add(ConfigError(f"config.{name}", value, f"only {name}: {int(name == 'nvp')} can be converted."))
        elif name == "layers_per_block":
            config[name] = [parsed(n) for n in value.split()] if isinstance(value, str) else value
        elif name == "img_size":
            latent = isinstance(value, int) and arguments.get("vae") not in (None, "none")
            config[name] = value // STARFLOW_VAE_STRIDE if latent else value
        elif name in STARFLOW_NAMES or name in names(convert.starflow):
            config[STARFLOW_NAMES.get(name, name)] = value
        elif name not in STARFLOW_TRAINING:
            problems.add(UnknownNameError("config", name, [*names(convert.starflow), *STARFLOW_NAMES], paths=False))
    problems.raise_if_any()
    layers = config["layers_per_block"]
    if isinstance(layers, list) and len(layers) > 1:  # which then counts the blocks
        config["num_blocks"] = len(layers)
    return config


def export_file(
    form: str,
    pipeline: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weights: Literal["ema", "raw"] = "ema",
    in_channels: int | None = None,
) -> list[Path]:
    """Write a part of a chain in a published format; returns the files.

    Args:
        form: one of `FORMATS`.
        pipeline: directory of a flow, an autoencoder, or a bundle.
        out: folder to write; must be empty or missing.
        weights: averaged or last weights.
        in_channels: flows: channels of the images or latents it models; None: those it was converted with, else 3 for TARFlow and 4 for
            STARFlow.

    Raises:
        ConfigError: the part has no place in the format; names what has none (ProblemsError for several).
        ArtifactError: there is no such part, or `out` is not empty.
    """
    one_of("format", form, FORMATS)
    role = "flow" if form in FLOWS else "autoencoder"
    if in_channels is not None and role != "flow":
        raise ConfigError("in_channels", in_channels, f"does nothing for {form}.", "It is for tarflow and starflow.")
    places = locate(pipeline)
    if role not in places:
        raise ArtifactError(f"{pipeline} holds no {role}, which --format {form} writes; it holds {', '.join(places)}.")
    folder = Path(out)
    artifacts.check_writable(folder, "out", directory=True)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder} exists and is not empty; name another folder.")
    kind: Literal["model", "raw"] = "raw" if weights == "raw" else "model"
    if form in FLOWS:
        flow = artifacts.load(places["flow"], Flow, weights=kind)
        source = artifacts.read_manifest(places["flow"]).get("converted_from", {}).get("config", {})
        if in_channels is None:
            in_channels = source.get("in_channels") or (3 if form == "tarflow" else 4)
        length = {"txt_size": source.get("txt_size")} if form == "starflow" else {}
        exporter: Callable[..., tuple[dict[str, Tensor], dict[str, Any]]] = getattr(convert, f"to_{form}")
        state, config = exporter(flow, in_channels=in_channels, **length)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, folder / f"{form}.pth")
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        return [folder / f"{form}.pth", folder / "config.json"]
    autoencoder = artifacts.load(places["autoencoder"], Autoencoder, weights=kind)
    if not isinstance(autoencoder, RepresentationAutoencoder):
        raise ConfigError("autoencoder", type(autoencoder).__name__, f"{form} can only express a RepresentationAutoencoder.")
    if form == "diffusers":
        convert.to_diffusers(autoencoder, folder)
        return sorted(folder.iterdir())
    state, statistics = convert.to_rae(autoencoder)
    folder.mkdir(parents=True, exist_ok=True)
    decoder = {k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")}
    for name, content in (("rae.pt", state), ("decoder.pt", decoder), ("stat.pt", statistics)):
        torch.save(content, folder / name)
    return [folder / name for name in ("rae.pt", "decoder.pt", "stat.pt")]


def _codec(kind: str, module: nn.Module, config: Mapping[str, Any]) -> Autoencoder | None:
    """The pixels that a TARFlow on colour images takes."""
    if kind != "tarflow" or not isinstance(module, Flow):
        return None
    patch = math.isqrt(module.channels // 3)
    if config.get("in_channels") not in (None, 3) or config.get("patch_size") not in (None, patch) or 3 * patch**2 != module.channels:
        return None
    return PixelPatches(module.grid[0] * patch, patch, scale="linear")


def _with_encoder(state: Mapping[str, Tensor], encoder: Mapping[str, Tensor], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    if any(k.startswith("encoder.") for k in state):
        raise ConfigError("encoder", str(path), "holds an encoder already.", "Leave --encoder out.")
    decoder = state if any(k.startswith("decoder.") for k in state) else {f"decoder.{k}": v for k, v in state.items()}
    return {**{f"encoder.{k}": v for k, v in encoder.items()}, **decoder}
