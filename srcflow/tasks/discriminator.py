"""How the discriminator of an adversarial loss is trained beside the task's own optimizer.

The heads live outside the task's module tree. So the task keeps Lightning's automatic optimization with its one optimizer (accumulation,
step counter and schedule mean what they always mean), DDP never waits for gradients that a generator step does not give, and the average,
the shards and the artifact know nothing of the heads. What Lightning would do for a second optimizer is done here: gradients are averaged
over the ranks, accumulated over the same batches, clipped, dropped if they are not finite, and the state goes into the checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from srcflow.errors import NonFiniteError
from srcflow.losses.adversarial import Adversarial
from srcflow.tasks.optimization import Optimization


class Discriminator:
    """An adversarial loss, its heads' optimizer, and one update of them per optimizer step of the task.

    Args:
        adversarial: the loss.
        optimization: optimizer, schedule (over the task's optimizer steps), clipping and the limit of non-finite updates of the heads.
    """

    def __init__(self, adversarial: Adversarial, optimization: Optimization) -> None:
        self.adversarial, self.optimization = adversarial, optimization
        self.optimizer = optimization.build_optimizer(adversarial.parameters())
        self.skipped = self.in_a_row = 0
        self.paused = False
        self._losses: list[Tensor] = []

    def update(
        self, real: Tensor, fake: Tensor, *, rate: float, share: float, finish: bool, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Add one batch's gradient, and make a step if the batch ends one.

        Args:
            real: (B, 3, H, W) in [0, 1].
            fake: reconstructions of the same shape; detached here.
            rate: learning rate of the step.
            share: this batch's share of the step (1 / number of accumulated batches).
            finish: whether the step is made now.
            generator: of the augmentation.

        Returns:
            Numbers for logging; none while `paused`, when nothing happens.

        Raises:
            NonFiniteError: too many steps in a row had to be dropped.
        """
        if self.paused:
            return {}
        loss, logs = self.adversarial.discriminator_loss(real, fake, generator=generator)
        with torch.autocast(loss.device.type, enabled=False):
            (loss * share).backward()  # type: ignore[no-untyped-call]  # torch is untyped here
        logs = {**logs, "loss": loss.detach()}
        self._losses.append(logs["loss"])
        if finish:
            logs["grad_norm"] = self._step(rate)
        return logs

    def _step(self, rate: float) -> Tensor:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        loss, self._losses = torch.stack(self._losses).sum(), []
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
                p.grad.div_(dist.get_world_size())
            dist.all_reduce(loss)  # what is not finite on one rank is so on all
        clip = self.optimization.gradient_clip
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip if clip is not None else float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if bool(torch.isfinite(norm) & torch.isfinite(loss)):
            self.optimizer.step()
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
            if self.in_a_row >= self.optimization.max_bad_steps:
                raise NonFiniteError(
                    f"{self.in_a_row} steps of the discriminator in a row had a non-finite loss or gradient. Lower "
                    "discriminator.learning_rate, or check the data; discriminator.max_bad_steps is the limit."
                )
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def start(self, state: dict[str, Any] | None) -> None:
        """Before training: restore a checkpoint's state, and make all ranks start from the same heads."""
        if state is not None:
            self.adversarial.load_state_dict(state["heads"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        elif dist.is_available() and dist.is_initialized():
            for t in self.adversarial.state_dict().values():
                dist.broadcast(t, src=0)

    def state_dict(self) -> dict[str, Any]:
        """Heads, optimizer and counters."""
        return {
            "heads": self.adversarial.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
        }
