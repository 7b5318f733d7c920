"""A stage's directory: how one stage hands its result to the next.

    config.json          {"class_path", "init_args"}: what `registry.build` needs
    model.safetensors    weights and buffers (statistics included); EMA weights where there are any
    raw.safetensors      the weights without averaging (optional)
    manifest.json        versions, hashes, the data's fingerprint, what it was built on

No pickles, and no foreign code: only modules of srcflow and of distributions that register parts for it are imported (`srcflow.trust`).
This module knows nothing of what the artifacts mean.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import srcflow
from srcflow.errors import ArtifactError, ConfigError, ManifestMismatchError, SrcflowError
from srcflow.files import (
    AGAIN,
    check_format,
    check_tensors,
    check_writable,
    file_hash,
    plain,
    read_json,
    read_tensors,
    write_tensors,
)
from srcflow.registry import FAMILIES, build, spec_of
from srcflow.trust import foreign

__all__ = ["AGAIN", "check_format", "check_writable", "file_hash", "read_json", "read_tensors", "write_tensors"]
M = TypeVar("M", bound=nn.Module)

CONFIG, MODEL, RAW, MANIFEST = "config.json", "model.safetensors", "raw.safetensors", "manifest.json"
FORMAT = 1
GROUPS = tuple(f"srcflow.{family}" for family in FAMILIES)


def save(
    path: str | os.PathLike[str],
    module: nn.Module,
    *,
    raw: Mapping[str, Tensor] | None = None,
    manifest: Mapping[str, Any] | None = None,
) -> Path:
    """Write an artifact, replacing an older one in a single step: a reader sees the old directory or the new one, never a part.

    Args:
        path: the directory.
        module: a member of a family (its class and arguments go to config.json, its state to model.safetensors).
        raw: state dict of the weights without averaging; entries that equal the module's own need not be in it.
        manifest: JSON-able facts to record besides the format, versions and content hash.

    Returns:
        The directory.

    Raises:
        ArtifactError: `path` exists and is not an artifact, or the disk is full; what was there before stays.
        ConfigError: nothing can be written there.
    """
    target = check_target(path)
    spec = spec_of(module)
    work, old = (target.with_name(f".{target.name}.{os.getpid()}.{end}") for end in ("partial", "old"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        (work / CONFIG).write_text(json.dumps(spec, indent=1) + "\n")
        save_file(plain(module.state_dict()), str(work / MODEL))
        if raw is not None:
            save_file(plain(raw), str(work / RAW))
        facts = {
            "format": FORMAT,
            "class": type(module).__name__,
            "srcflow": srcflow.__version__,
            "revision": revision(),
            "torch": str(torch.__version__),
            **(manifest or {}),
            "hash": content_hash(work),
            "files": {file.name: file_hash(file) for file in sorted(work.iterdir())},
        }
        (work / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n")
        if target.exists():
            target.rename(old)
        try:
            work.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except (OSError, SafetensorError) as e:
        reason = (e.strerror if isinstance(e, OSError) else None) or e
        cure = "Make room or name another place; `srcflow export` writes a stage's directory from its checkpoint."
        raise ArtifactError(f"{target} could not be written: {reason}. {cure}") from e
    finally:
        shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return target


def check_target(path: str | os.PathLike[str], key: str = "path") -> Path:
    """Refuse a place that `save` would refuse, before a run has spent its time; returns the directory.

    Args:
        path: the directory.
        key: the option that names it, for the message.

    Raises:
        ArtifactError: `path` exists and is not an artifact.
        ConfigError: nothing can be written there (see `check_writable`).
    """
    target = Path(path)
    if _exists(target) and not (target.is_dir() and ((target / MANIFEST).exists() or not any(target.iterdir()))):
        raise ArtifactError(f"{key} = {str(target)!r} exists and is not an artifact; name another directory, or move it away.")
    check_writable(target, key, directory=True)
    if target.exists():  # it is replaced as a whole
        if target.is_mount():
            raise ConfigError(key, str(target), "is where a file system is mounted, which cannot be replaced.", "Name a directory in it.")
        check_writable(target.absolute().parent, key, directory=True)
    return target


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # `check_writable` says what is wrong with it
        return False


def load(path: str | os.PathLike[str], base: type[M], *, weights: Literal["model", "raw"] = "model") -> M:
    """Build the module of an artifact and load its weights, in eval mode and on the CPU.

    Args:
        path: the directory.
        base: the family's base class that it must be.
        weights: "model" (averaged where there is an average) or "raw".

    Raises:
        ArtifactError: the directory is missing, incomplete, damaged or not what its manifest records, it names code that is not imported
            for it, keys or shapes do not fit, or weights are not finite.
    """
    root = Path(path)
    spec = read_spec(root)
    state = read_weights(root, weights=weights)
    check_finite(state, str(root))
    module = build_spec(spec, base, root / CONFIG)
    load_state(widened(module, state), state, what=str(root))
    return module.eval()


def read_spec(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The specification of an artifact's module, whose class paths may all be imported; imports none of them.

    Raises:
        ArtifactError: the directory is incomplete or damaged, or config.json names a module that is neither srcflow's nor of a distribution
            that registers parts for it.
    """
    return read_spec_file(check(path) / CONFIG)


def read_spec_file(file: Path) -> dict[str, Any]:
    """As `read_spec`, of a config.json by itself.

    Raises:
        ArtifactError: as `read_spec`.
    """
    spec = read_json(file)
    if "class_path" not in spec or set(spec) - {"class_path", "init_args"} or not isinstance(spec.get("init_args") or {}, dict):
        raise ArtifactError(f"{file} is damaged: it has the keys {sorted(spec)} for class_path and init_args. {AGAIN}")
    if found := foreign(spec, GROUPS):
        where, name = found
        raise ArtifactError(
            f"{file}: {f'{where}.' if where else ''}class_path = {name!r} is not imported. Opening a directory runs only code of srcflow "
            "and of distributions that register parts for it, since a file may come from anybody. If the class is yours, register it as an "
            "entry point of your distribution (docs/howto/own-encoder.md), or import its module in your program first."
        )
    return spec


def build_spec(spec: Mapping[str, Any], base: type[M], file: Path) -> M:
    """Build the module that `read_spec` described.

    Args:
        spec: the specification.
        base: the family's base class that it must be.
        file: where it comes from, for messages.

    Raises:
        ArtifactError: it cannot be built, or is not a `base`.
    """
    try:
        return build(dict(spec), base, key=str(file))
    except SrcflowError as e:
        raise ArtifactError(str(e) if str(file) in str(e) else f"{file}: {e}") from e
    except Exception as e:  # a constructor may raise anything for values it never gets from a configuration that was checked
        raise ArtifactError(f"{file}: {spec['class_path']} cannot be built from it ({type(e).__name__}: {e}). {AGAIN}") from e


def read_weights(path: str | os.PathLike[str], *, weights: Literal["model", "raw"] = "model") -> dict[str, Tensor]:
    """The state dict of an artifact's module, on the CPU, after comparing its files with the hashes that its manifest records.

    Args:
        path: the directory.
        weights: "model" or "raw", as `load`.

    Raises:
        ArtifactError: the directory is missing, incomplete, damaged or not what its manifest records.
    """
    root = verify(path, raw=weights == "raw")
    state = read_tensors(root / MODEL)
    if weights == "raw":
        state.update(read_tensors(root / RAW))
    return state


def verify(path: str | os.PathLike[str], *, raw: bool = False) -> Path:
    """Compare an artifact's files with the hashes that its manifest records; returns the directory.

    Args:
        path: the directory.
        raw: also the weights without averaging (whose hash older artifacts do not record).

    Raises:
        ArtifactError: it is incomplete, a file is damaged or was changed; names it.
    """
    root = check(path)
    manifest = read_manifest(root)
    if raw and not (root / RAW).exists():
        raise ArtifactError(f"{root} holds no raw weights; use weights: model.")
    check_tensors(root / MODEL)
    files = manifest.get("files") or {}
    changed = []
    if content_hash(root) != manifest["hash"]:
        changed = [f for f in (CONFIG, MODEL) if f in files and file_hash(root / f) != files[f]] or [f"{CONFIG} or {MODEL}"]
    if raw and RAW in files and file_hash(root / RAW) != files[RAW]:
        changed.append(RAW)
    if changed:
        raise ArtifactError(
            f"{', '.join(str(root / f) for f in changed)} is not what {MANIFEST} records: damaged, or changed after it was written. {AGAIN}"
        )
    return root


def check_finite(state: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that are not finite: nothing made with them means anything.

    Args:
        state: tensors by name.
        what: whose they are, for the message.

    Raises:
        ArtifactError: some are NaN or infinite; names the first.
    """
    bad = [k for k, v in state.items() if v.is_floating_point() and not bool(v.isfinite().all())]
    if bad:
        which = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
        raise ArtifactError(
            f"{what}: the weights are not finite: NaN or infinity in {which} ({len(bad)} of {len(state)} tensors). "
            "The training diverged, or the file was damaged: take an earlier checkpoint, or train again with a lower learning rate."
        )


def widened(module: M, state: Mapping[str, Tensor]) -> M:
    """The module in float64, if that is what a state dict is of: float32 would round it."""
    if all(v.dtype == torch.float64 for v in state.values() if v.is_floating_point()):
        module.to(torch.float64)
    return module


def load_state(module: nn.Module, state: Mapping[str, Tensor], *, what: str) -> None:
    """Load a state dict, refusing unknown, missing and misshaped keys in one message.

    Raises:
        ArtifactError: lists every key that does not fit.
    """
    if lines := misfits(module, state):
        raise ArtifactError(f"{what}: the weights do not fit {type(module).__name__}:\n  " + "\n  ".join(lines))
    module.load_state_dict(dict(state))


def misfits(module: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """What of a state dict does not fit a module: missing, unknown and misshaped keys; parts with optional tensors make room for them."""
    for prefix, part in module.named_modules():
        prepare = getattr(part, "prepare_state", None)
        if prepare is not None:  # a part whose optional tensors are in the file makes room for them
            start = f"{prefix}." if prefix else ""
            prepare({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)})
    own = module.state_dict()
    lines = [f"missing {k}" for k in own if k not in state] + [f"unknown {k}" for k in state if k not in own]
    lines += [
        f"{k}: shape {tuple(state[k].shape)}, expected {tuple(own[k].shape)}" for k in own if k in state and state[k].shape != own[k].shape
    ]
    return lines


def check(path: str | os.PathLike[str]) -> Path:
    """The directory as a Path, if it is a complete artifact.

    Raises:
        ArtifactError: it is not; names what is missing.
    """
    root = Path(path)
    if not root.is_dir():
        raise ArtifactError(
            f"{root} does not exist. A stage writes it at the end of `srcflow fit`; `srcflow export` makes one from a checkpoint."
        )
    missing = [f for f in (CONFIG, MODEL, MANIFEST) if not (root / f).exists()]
    if missing:
        raise ArtifactError(f"{root} is not a complete artifact: {', '.join(missing)} missing.")
    return root


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of an artifact.

    Raises:
        ArtifactError: the directory is incomplete, the manifest damaged or of an unknown format.
    """
    file = check(path) / MANIFEST
    manifest = read_json(file)
    check_format(file, manifest.get("format"), FORMAT, "artifact")
    kinds: dict[str, type] = {"class": str, "hash": str, "built_on": dict, "files": dict, "converted_from": dict}
    wrong = [k for k, kind in kinds.items() if not isinstance(manifest.get(k, None if k in ("class", "hash") else {}), kind)]
    wrong += [f"built_on.{r}" for r, b in manifest.get("built_on", {}).items() if not _is_reference(b)] if "built_on" not in wrong else []
    if wrong:
        raise ArtifactError(f"{file} is damaged: {', '.join(wrong)} missing or of the wrong kind. {AGAIN}")
    return manifest


def _is_reference(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(k), str) for k in ("path", "hash"))


def content_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 over the configuration and the weights of an artifact, read from the files."""
    return file_hash(Path(path) / CONFIG, Path(path) / MODEL)


def reference(path: str | os.PathLike[str], *, start: str | os.PathLike[str]) -> dict[str, str]:
    """What to put under `manifest["built_on"][role]`: the artifact's path relative to `start` (the new artifact) and its hash."""
    return {"path": os.path.relpath(Path(path).resolve(), Path(start).resolve()), "hash": content_hash(path)}


def built_on(path: str | os.PathLike[str], role: str, override: str | os.PathLike[str] | None = None) -> Path:
    """The directory of the artifact that `path` was built on, found by path and checked by content hash.

    Args:
        path: the artifact.
        role: its part in the chain, e.g. "autoencoder".
        override: where to look instead of the recorded place (after a move).

    Raises:
        ArtifactError: nothing is recorded or found there, or it is damaged.
        ManifestMismatchError: what is there is not what `path` was built on.
    """
    recorded = read_manifest(path).get("built_on", {}).get(role)
    if recorded is None:
        raise ArtifactError(f"{path} does not say what {role} it was built on.")
    place = Path(override) if override is not None else Path(path).resolve() / recorded["path"]
    if not place.is_dir():
        raise ArtifactError(f"{path} was built on the {role} at {place}, which does not exist. Name its new place ({role}: DIRECTORY).")
    found = content_hash(check(place))
    if found != recorded["hash"]:
        if read_manifest(place)["hash"] == recorded["hash"]:
            verify(place)  # the right one, but damaged: says which file is
        raise ManifestMismatchError(
            f"{role} {place}",
            {"hash": (recorded["hash"], found)},
            f"{path} was built on another {role}; name the right one or train again.",
        )
    return place


def revision() -> str | None:
    """The git revision of the source tree srcflow runs from (with "+changes" if it was edited), or None outside a checkout."""
    root = Path(srcflow.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=root, capture_output=True, text=True, check=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+changes" if dirty.strip() else "")
