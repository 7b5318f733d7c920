"""A stage's directory: how one stage hands its result to the next.

    config.json          {"class_path", "init_args"}: what `registry.build` needs
    model.safetensors    weights and buffers (statistics included); EMA weights where there are any
    raw.safetensors      the weights without averaging (optional)
    manifest.json        versions, hashes, the data's fingerprint, what it was built on

No pickles. This module knows nothing of what the artifacts mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import srcflow
from srcflow.errors import ArtifactError, ConfigError, ManifestMismatchError
from srcflow.registry import build, spec_of

M = TypeVar("M", bound=nn.Module)

CONFIG, MODEL, RAW, MANIFEST = "config.json", "model.safetensors", "raw.safetensors", "manifest.json"
FORMAT = 1


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
        ArtifactError: `path` exists and is not an artifact.
    """
    target = check_target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    (work / CONFIG).write_text(json.dumps(spec_of(module), indent=1) + "\n")
    save_file(_plain(module.state_dict()), str(work / MODEL))
    if raw is not None:
        save_file(_plain(raw), str(work / RAW))
    facts = {
        "format": FORMAT,
        "class": type(module).__name__,
        "srcflow": srcflow.__version__,
        "revision": revision(),
        "torch": str(torch.__version__),
        **(manifest or {}),
        "hash": content_hash(work),
    }
    (work / MANIFEST).write_text(json.dumps(facts, indent=1) + "\n")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        target.rename(old)
    work.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def check_target(path: str | os.PathLike[str]) -> Path:
    """Refuse a place that `save` would refuse, before a run has spent its time; returns the directory.

    Raises:
        ArtifactError: `path` exists and is not an artifact.
    """
    target = Path(path)
    if target.exists() and not (target.is_dir() and ((target / MANIFEST).exists() or not any(target.iterdir()))):
        raise ArtifactError(f"{target} exists and is not an artifact; name another directory, or move it away.")
    return target


def check_writable(path: str | os.PathLike[str], key: str, *, directory: bool) -> None:
    """Try a target before the work whose result it gets; afterwards everything is as it was.

    A file is made and removed in the directory, or in the nearest parent that there is.

    Args:
        path: the file or directory to be written.
        key: the option that names it, for the message.
        directory: whether `path` becomes a directory; otherwise it becomes a file.

    Raises:
        ConfigError: the wrong kind of thing is there, a parent is a file, or nothing can be written (rights, read-only or full disk).
    """
    cure = "Name another place."
    try:
        place = Path(path).absolute()
        there = place.exists()
        if there and place.is_dir() != directory:
            kinds = "a file, and a directory" if directory else "a directory, and a file"
            raise ConfigError(key, str(path), f"is {kinds} is to be written there.", cure)
        if there and not directory:
            if place.is_file():  # not a device or a pipe, which opening could block or disturb
                place.open("ab").close()
            return
        while not there:
            if place.is_symlink():
                raise ConfigError(key, str(path), f"{place} is a link to {os.readlink(place)}, which does not exist.", cure)
            with suppress(FileNotFoundError, NotADirectoryError):
                os.lstat(place)  # says what `exists` keeps to itself: rights, or a name that is too long
            place = place.parent
            there = place.exists()
        if not place.is_dir():
            raise ConfigError(key, str(path), f"cannot be written, since {place} is not a directory.", cure)
        handle, probe = tempfile.mkstemp(prefix=".srcflow-", suffix=".probe", dir=place)
        try:
            with open(handle, "wb") as f:
                f.write(bytes(4096))  # a full disk may take the name, but not the content
        finally:
            os.unlink(probe)
    except OSError as e:
        raise ConfigError(key, str(path), f"cannot be written: {e.strerror or e}.", cure) from e
    except ValueError as e:
        if isinstance(e, ConfigError):
            raise
        raise ConfigError(key, str(path), f"cannot be written: {e}.", cure) from e


def load(path: str | os.PathLike[str], base: type[M], *, weights: Literal["model", "raw"] = "model") -> M:
    """Build the module of an artifact and load its weights, in eval mode and on the CPU.

    Args:
        path: the directory.
        base: the family's base class that it must be.
        weights: "model" (averaged where there is an average) or "raw".

    Raises:
        ArtifactError: the directory is missing, incomplete or damaged, or keys or shapes do not fit.
    """
    root = check(path)
    module = build(json.loads((root / CONFIG).read_text()), base, key=str(root / CONFIG))
    state = read_tensors(root / MODEL)
    if weights == "raw":
        if not (root / RAW).exists():
            raise ArtifactError(f"{root} holds no raw weights; use weights: model.")
        state.update(read_tensors(root / RAW))
    load_state(widened(module, state), state, what=str(root))
    return module.eval()


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
    if lines:
        raise ArtifactError(f"{what}: the weights do not fit {type(module).__name__}:\n  " + "\n  ".join(lines))
    module.load_state_dict(dict(state))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        ArtifactError: the file is damaged.
    """
    try:
        with safe_open(str(file), framework="pt", device="cpu") as f:
            return {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  # safe_open is no mapping
    except (SafetensorError, OSError) as e:
        raise ArtifactError(f"{file} cannot be read: {e}.") from e


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors of any device and layout to a safetensors file."""
    save_file(_plain(tensors), str(file))


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
    """The manifest of an artifact."""
    return dict(json.loads((check(path) / MANIFEST).read_text()))


def content_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 over the configuration and the weights of an artifact, read from the files."""
    return file_hash(Path(path) / CONFIG, Path(path) / MODEL)


def file_hash(*files: Path) -> str:
    """SHA-256 over the bytes of files, one after another."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as f:
            while chunk := f.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


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
        ArtifactError: nothing is recorded or found there.
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


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU that share no memory, which safetensors refuses; copied only where they have to be."""
    plain: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in state.items():
        t = tensor.detach().to("cpu").contiguous()
        if t.numel() and t.untyped_storage().data_ptr() in taken:
            t = t.clone()
        taken.add(t.untyped_storage().data_ptr())
        plain[name] = t
    return plain
