"""Files that hold averaged weights: what a checkpoint says of its averages, and snapshots of them in safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from srcflow.callbacks import checkpoint_files
from srcflow.callbacks.checkpoint_files import CheckpointFiles
from srcflow.errors import ArtifactError, CheckpointError, ConfigError

AVERAGES = "averages"
"""Key of a checkpoint: `decays`, and `further`, the averages besides that of `decays[0]`, which is in `state_dict`."""

SUFFIX = ".safetensors"


def averages_of(checkpoint: Mapping[str, Any]) -> dict[float, dict[str, Tensor]]:
    """The further averages of a checkpoint by their decay; a first entry, empty, for the one in `state_dict`. Empty: it has no say."""
    stored = checkpoint.get(AVERAGES)
    return dict(zip(stored["decays"], [{}, *stored["further"]], strict=True)) if stored else {}


def choose(checkpoint: Mapping[str, Any], decay: float | None, *, what: str) -> dict[str, Tensor]:
    """A checkpoint's `state_dict` with the average of some decay; None: as it is.

    Raises:
        ConfigError: the checkpoint has no such average; lists those it has.
    """
    state: dict[str, Tensor] = checkpoint["state_dict"]
    if decay is None:
        return state
    known = averages_of(checkpoint)
    if decay not in known:
        kept = f"keeps averages of decay {', '.join(map(str, known))}" if known else "keeps one average, whose decay it does not say"
        raise ConfigError("ema", decay, f"{what} {kept}.", "Name one of them, or leave it out.")
    return {**state, **known[decay]}


def write_snapshot(path: Path, state: Mapping[str, Tensor], facts: Mapping[str, Any], checkpoints: Path | None = None) -> None:
    """Write weights in one step, and bring them to the disk: a reader finds the whole file or none.

    Args:
        path: the file; its directory is made.
        state: tensors on the CPU that share no memory.
        facts: JSON-able; what they are of.
        checkpoints: the run's checkpoints, of which an error names the newest whole one.

    Raises:
        CheckpointError: the disk is full, or the file cannot be written for another reason; what was there before stays.
    """
    partial = checkpoint_files.hidden(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in state.items()}, str(partial), metadata={"facts": json.dumps(facts)})
        with partial.open("rb+") as f:
            os.fsync(f.fileno())
        checkpoint_files.replace(partial, path)
    except (OSError, SafetensorError) as e:
        reason = (e.strerror if isinstance(e, OSError) else None) or e
        found = checkpoint_files.newest(checkpoints) if checkpoints is not None else None
        kept = f" The last whole checkpoint is {found}: go on from it with --ckpt_path {found}." if found else ""
        raise CheckpointError(f"snapshot {path} could not be written: {reason}.{kept}") from e
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def read_weights(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint, or what a snapshot has of one (`state_dict`, and the task's facts under "srcflow"); on the CPU.

    Raises:
        ArtifactError: a snapshot that cannot be read.
        CheckpointError: a checkpoint that is damaged; names the newest whole one beside it.
    """
    if Path(path).suffix != SUFFIX:
        return CheckpointFiles().load_checkpoint(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as f:
            facts = dict(json.loads((f.metadata() or {}).get("facts", "{}")))
            state = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  # safe_open is no mapping
    except Exception as e:  # a damaged header can raise anything
        raise ArtifactError(f"{path} cannot be read: {e}.") from e
    return {"state_dict": state, **facts}
