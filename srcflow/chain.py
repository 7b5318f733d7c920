"""What the parts of a chain are to each other: which fit together, where their directories are, and where denoising holds."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from torch import nn

import srcflow
from srcflow import artifacts
from srcflow.autoencoders.base import Autoencoder
from srcflow.compressors.base import Compressor
from srcflow.compressors.identity import Identity
from srcflow.errors import ArtifactError, ConfigError, ManifestMismatchError, SrcflowError, one_of
from srcflow.flows.flow import Flow
from srcflow.noise import Noise
from srcflow.registry import build, spec_of
from srcflow.trust import foreign

PARTS: dict[str, type[nn.Module]] = {"autoencoder": Autoencoder, "compressor": Compressor, "flow": Flow}
"""Role -> base class of the parts, in the order of the chain."""

BUNDLE = "pipeline"
"""What the manifest of a directory with all parts gives as its kind."""

DenoiserName = Literal["score", "learned"]
"""What takes the noise out of codes: the flow's own score, or its learnable denoiser."""


def check_chain(autoencoder: Autoencoder, compressor: Compressor, flow: Flow | None) -> None:
    """Refuse parts that do not fit together.

    Raises:
        ConfigError: names the two keys and values that disagree.
    """
    rows, columns = autoencoder.grid
    if compressor.dim != autoencoder.dim:
        raise ConfigError("compressor.dim", compressor.dim, f"the autoencoder's features have dim = {autoencoder.dim}.")
    tokens, channels = compressor.out_shape((rows * columns, autoencoder.dim))
    if flow is None:
        return
    if flow.channels != channels:
        raise ConfigError("flow.channels", flow.channels, f"the compressor's codes have code_dim = {channels}.")
    if tokens != rows * columns or tuple(flow.grid) != (rows, columns):
        raise ConfigError("flow.grid", flow.grid, f"the autoencoder's grid is {autoencoder.grid}: {tokens} tokens.")


def check_denoise(denoise: float | None, denoiser: str = "score", *, key: str = "") -> None:
    """Refuse values that ask for no denoising.

    Args:
        denoise: standard deviation of the noise in units of the raw features; None: no denoising.
        denoiser: "score" or "learned".
        key: where the two values stand in a configuration, with its dot.

    Raises:
        ConfigError: `denoise` is no deviation, or `denoiser` is unknown or without effect.
    """
    one_of(f"{key}denoiser", denoiser, get_args(DenoiserName))
    if denoise is None:
        if denoiser != "score":
            cure = "Give the deviation of the noise, or leave denoiser out."
            raise ConfigError(f"{key}denoiser", denoiser, f"does nothing without {key}denoise.", cure)
    elif not (denoise >= 0 and math.isfinite(denoise)):
        raise ConfigError(f"{key}denoise", denoise, "a standard deviation is finite and not negative.")


def check_denoising(compressor: Compressor, flow: Flow, denoise: float | None, denoiser: str = "score", *, key: str = "") -> None:
    """Refuse denoising (E16) where it does not hold: it needs Gaussian noise of a known deviation in the flow's own space.

    Args:
        compressor: what stands between the features, which got the noise, and the flow.
        flow: the flow.
        denoise: as for `check_denoise`, like the other two.
        denoiser: "score" or "learned".
        key: where the two values stand in a configuration, with its dot.

    Raises:
        ConfigError: the noise went through a compressor, the flow has no such denoiser, or as `check_denoise`.
    """
    check_denoise(denoise, denoiser, key=key)
    if denoise is None:
        return
    if not isinstance(compressor, Identity):
        raise ConfigError(
            f"{key}denoise",
            denoise,
            f"the noise was added to the features before the compressor ({type(compressor).__name__}); in the codes it is no longer "
            "Gaussian noise of a known deviation, so x + s^2 grad log p is not its mean.",
            "Sample without denoise: the compressor and the decoder were trained under noise.",
        )
    if denoiser == "learned" and flow.self_denoiser is None:
        cure = 'Use "score", the flow\'s own, or a flow that was trained with a denoiser.'
        raise ConfigError(f"{key}denoiser", denoiser, "this flow has no learnable denoiser.", cure)


def locate(
    path: str | os.PathLike[str],
    *,
    autoencoder: str | os.PathLike[str] | None = None,
    compressor: str | os.PathLike[str] | None = None,
) -> dict[str, Path]:
    """The directory of every part of the chain that ends in `path`, in the order autoencoder, compressor, flow; hashes checked.

    A flow that records nothing (a converted one) is alone, unless its codec is named: then those directories are taken as they are, as
    there is no hash to check.

    Args:
        path: a bundle, or the directory of a stage.
        autoencoder: where the autoencoder is now, if it moved or is not recorded.
        compressor: where the compressor is now, likewise.

    Raises:
        ArtifactError: a directory is missing, incomplete or damaged.
        ManifestMismatchError: a part is not what the others were built on.
    """
    root = Path(path)
    if (root / artifacts.MANIFEST).is_file():
        artifacts.read_json(root / artifacts.MANIFEST)  # a damaged one says so, whatever the directory was
    if is_bundle(root):
        recorded = _recorded_parts(root)
        for role, wanted in recorded.items():
            found = artifacts.content_hash(artifacts.check(root / role))
            if found != wanted:
                if artifacts.read_manifest(root / role)["hash"] == wanted:
                    artifacts.verify(root / role)  # the right part, but damaged: says which file is
                raise ManifestMismatchError(
                    f"{root / role}", {"hash": (wanted, found)}, "The directory was changed or damaged after it was written."
                )
        return {role: root / role for role in PARTS if role in recorded}
    manifest = artifacts.read_manifest(root)
    built_on = manifest.get("built_on", {})
    named = {"autoencoder": autoencoder, "compressor": compressor}
    if manifest["class"] == "Flow":
        if built_on:
            places = {k: artifacts.built_on(root, k, place) for k, place in named.items() if k in built_on or place is not None}
        else:
            places = {k: artifacts.check(place) for k, place in named.items() if place is not None}
        return {**places, "flow": root}
    places = {k: artifacts.built_on(root, k, place) for k, place in named.items() if k in built_on}
    return {**places, "compressor" if "autoencoder" in built_on else "autoencoder": root}


def recorded_noise(path: str | os.PathLike[str]) -> Noise | None:
    """The noise law that a flow was trained under, as its directory or bundle records it; None if it does not, or there is no flow.

    Raises:
        ArtifactError: what is recorded cannot be used.
    """
    file = Path(path) / artifacts.MANIFEST
    spec = artifacts.read_json(file).get("noise") if file.is_file() else None
    if spec is None:
        return None
    if not isinstance(spec, dict) or foreign(spec, artifacts.GROUPS):
        raise ArtifactError(
            f"{file}: noise = {spec!r} is not a law of srcflow or of a distribution that registers parts. {artifacts.AGAIN}"
        )
    try:
        return build(spec, Noise, key="noise")
    except SrcflowError as e:
        raise ArtifactError(f"{file}: {e}") from e


def save_bundle(path: str | os.PathLike[str], parts: Mapping[str, nn.Module], noise: Noise | None = None) -> Path:
    """Write parts (role -> module) into one self-contained directory, which may be moved anywhere; returns it.

    Args:
        path: the directory.
        parts: role -> module.
        noise: the noise law that the flow was trained under, to be recorded.

    Raises:
        ArtifactError: the directory exists and is not a bundle.
    """
    target = check_bundle_target(path)
    work = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        hashes = {}
        for role, part in parts.items():
            artifacts.save(work / role, part)
            hashes[role] = artifacts.content_hash(work / role)
        manifest = {
            "format": artifacts.FORMAT,
            "kind": BUNDLE,
            "srcflow": srcflow.__version__,
            "revision": artifacts.revision(),
            "parts": hashes,
            **({} if noise is None else {"noise": spec_of(noise)}),
        }
        (work / artifacts.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        if target.exists():
            shutil.rmtree(target)
        work.rename(target)
    except OSError as e:
        raise ArtifactError(f"{target} could not be written: {e.strerror or e}. Make room, or name another place.") from e
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def check_bundle_target(path: str | os.PathLike[str], key: str = "path") -> Path:
    """Refuse a place that `save_bundle` would refuse, before its parts are loaded; returns the directory.

    Args:
        path: the directory.
        key: the option that names it, for the message.

    Raises:
        ArtifactError: the directory exists and is not a bundle.
        ConfigError: nothing can be written there.
    """
    target = Path(path)
    artifacts.check_writable(target, key, directory=True)
    if target.exists() and any(target.iterdir()) and not is_bundle(target):
        raise ArtifactError(f"{key} = {str(target)!r} exists and is not a pipeline; name another directory.")
    artifacts.check_writable(target.absolute().parent, key, directory=True)
    return target


def _recorded_parts(root: Path) -> dict[str, str]:
    """Role -> hash, as a bundle's manifest has them.

    Raises:
        ArtifactError: the manifest is of an unknown format, or damaged.
    """
    file = root / artifacts.MANIFEST
    manifest = artifacts.read_json(file)
    artifacts.check_format(file, manifest.get("format"), artifacts.FORMAT, "pipeline")
    parts = manifest.get("parts")
    if (
        not isinstance(parts, dict)
        or not {"autoencoder"} <= set(parts) <= set(PARTS)
        or not all(isinstance(h, str) for h in parts.values())
    ):
        raise ArtifactError(f"{file} is damaged: its parts are {parts!r}. {artifacts.AGAIN}")
    return parts


def is_bundle(root: Path) -> bool:
    """Whether a directory holds all parts of a chain, as `save_bundle` writes it."""
    try:
        return bool(artifacts.read_json(root / artifacts.MANIFEST).get("kind") == BUNDLE)
    except ArtifactError:
        return False
