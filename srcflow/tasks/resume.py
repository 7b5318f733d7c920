"""Where a run goes on from its checkpoint: the parts of Lightning's loops that decide which batch comes next."""

from __future__ import annotations

from typing import Any

import lightning as L

from srcflow.datamodules.base import Resumable


def place_loaders(trainer: L.Trainer) -> None:
    """Give the training loaders a checkpoint's positions, where Lightning has made them before it read the checkpoint.

    It does if `max_epochs` is set: the schedule's length then depends on the loader's, and loaders made so early are never told.
    """
    trainer.fit_loop._load_combined_loader_states()


def number_steps(trainer: L.Trainer) -> None:
    """Log the coming step under its own number; Lightning is one off after a checkpoint that was written in a validation."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def settle(checkpoint: dict[str, Any]) -> None:
    """Bring the counters of a checkpoint that was written at the end of an epoch to where they are after the epoch's last batch.

    Lightning ends such an epoch once more when it resumes: it counts it twice, and gives the loaders the number of the epoch after the
    next, so that a whole epoch of data would be left out.

    Args:
        checkpoint: what was read; its `loops` are changed in place.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop")
    if loop is None:
        return
    epoch, batch = loop["epoch_progress"], loop["epoch_loop.batch_progress"]
    if not (epoch["total"]["processed"] == epoch["total"]["started"] == epoch["total"]["completed"] + 1):
        return
    whole = batch["total"]["completed"] == batch["total"]["processed"]
    for span in ("total", "current"):
        epoch[span]["processed"] -= 1
        batch[span]["completed"] -= whole


def rewind(trainer: L.Trainer, checkpoint: dict[str, Any]) -> int:
    """Bring the counters and loaders of a checkpoint back to the last optimizer step.

    Gradients are not saved. A checkpoint written between two batches that share an optimizer step, or while a batch is worked on (an
    interrupt), would go on with a step that lacks a part of its batches; so the batches since the last step are given once more. What is
    drawn for them is keyed by the step and the sample, hence they are the same. Loaders that are not ours cannot be moved; then nothing is.

    Args:
        trainer: the trainer that writes.
        checkpoint: what it writes, with its `loops`.

    Returns:
        How many batches are given once more.
    """
    loop = trainer.fit_loop
    combined = loop._combined_loader
    loaders = list(combined.flattened) if combined is not None else []
    state = checkpoint.get("loops", {}).get("fit_loop")
    if state is None or not loaders or not all(isinstance(loader, Resumable) for loader in loaders):
        return 0
    progress = state["epoch_loop.batch_progress"]
    current, total = progress["current"], progress["total"]
    finished = current["processed"]
    if not (progress["is_last_batch"] and finished == current["ready"]):  # an epoch's last batch makes a step of what there is
        finished -= finished % trainer.accumulate_grad_batches
    behind = int(current["ready"] - finished)
    if behind == 0:
        return 0
    before = total["ready"] - behind
    progress.update(current=dict.fromkeys(current, finished), total=dict.fromkeys(total, before), is_last_batch=False)
    optimizer = state["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    for span in ("current", "total"):  # as many gradients were cleared as steps were made
        steps = optimizer["step"][span]["completed"]
        for counters in (optimizer["step"][span], optimizer["zero_grad"][span]):
            counters.update(dict.fromkeys(counters, steps))
    if "combined_loader" in state["state_dict"]:
        state["state_dict"]["combined_loader"] = [loader.rewound(behind) for loader in loaders]
    return behind
