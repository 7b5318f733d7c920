"""Memory of a training step: exact for what lives through it, simulated for what comes and goes.

The step is run on fake tensors, which have shapes, types and storages but no values, with the real forward pass, autocast, autograd and
activation checkpointing. What every operation allocates and frees is followed, so nothing is modelled that PyTorch knows. What the kernels
use inside themselves, the allocator's rounding and the framework (CUDA's context alone is some hundred MB) come on top.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srcflow.plan.step import Stage, mark_fitted
from srcflow.tasks.flow import FlowTask

T = TypeVar("T")
Like = Literal["cuda", "cpu"]


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


@dataclass(frozen=True)
class Lasting:
    """Bytes of one process that live through a whole step, without sharding.

    Args:
        weights: parameters that are trained, the discriminator's heads included.
        gradients: theirs.
        optimizer: AdamW's two moments and step counts.
        ema: the moving average (of the task's own parameters only).
        frozen: parameters that are not trained, and buffers: of the task, of earlier stages and of losses.
        trained: how many parameters the task itself trains.
        heads: how many the discriminator's heads have.
        state: of the parameters and buffers in the task's state_dict.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    frozen: int
    trained: int
    heads: int
    state: int


def lasting(stage: Stage, averages: int) -> Lasting:
    """What lives through a step.

    Args:
        stage: the task and its frozen parts.
        averages: how many moving averages are kept.
    """
    ready = stage.copied()  # so that losses have their networks
    own = [p for p in ready.task.parameters() if p.requires_grad]
    game = getattr(ready.task, "discriminator", None)
    heads = [] if game is None else [p for p in game.adversarial.parameters() if p.requires_grad]
    trained = {id(p) for p in own + heads}
    every = [t for m in ready.modules() for t in (*m.parameters(), *m.buffers())]
    wide = sum(p.numel() * torch.promote_types(p.dtype, torch.float32).itemsize for p in own)
    return Lasting(
        weights=nbytes(own + heads),
        gradients=nbytes(own + heads),
        optimizer=2 * nbytes(own + heads) + 4 * len(own + heads),
        ema=averages * wide,
        frozen=nbytes(t for t in every if id(t) not in trained),
        trained=sum(p.numel() for p in own),
        heads=sum(p.numel() for p in heads),
        state=nbytes(ready.task.state_dict().values()),
    )


@dataclass
class Passing:
    """Bytes that a forward and a backward pass allocate on top of what lasts.

    Args:
        activations: alive when the backward pass begins: what autograd keeps, the input, and outputs that the task still holds.
        work: largest sum at one moment, without gradients of parameters.
        peak: largest sum at one moment, gradients included, if none are there when the pass begins.
        phases: largest sum within each part of the step, as `work`.
    """

    activations: int = 0
    work: int = 0
    peak: int = 0
    phases: dict[str, int] = field(default_factory=dict)


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch is untyped here
    """Follows the storages that operations allocate, until they are freed."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seen: set[int] = {id(t.untyped_storage()) for t in known}
        self._held = list(known)  # so that their ids stay theirs
        self.now = self.gradients = 0
        self.found = Passing()
        self.phase = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._note(t.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.now += size
        weakref.finalize(storage, self._freed, key, size).atexit = False
        found, work = self.found, self.now - self.gradients
        found.peak, found.work = max(found.peak, self.now), max(found.work, work)
        found.phases[self.phase] = max(found.phases.get(self.phase, 0), work)

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def gradient(self, parameter: Tensor) -> None:
        """A parameter's gradient is complete."""
        if parameter.grad is not None:
            self.gradients += parameter.grad.untyped_storage().nbytes()


def passing(stage: Stage, batch: int, *, mixed: bool, like: Like = "cuda", backward: bool = True) -> Passing:
    """Run a step's forward and backward pass over `batch` images on fake tensors, and follow the memory.

    Args:
        stage: the task and its frozen parts on the meta device; not changed. `Flow.set_checkpointing` says what is recomputed.
        batch: images of one process and one accumulated batch.
        mixed: bf16-mixed; otherwise float32.
        like: whose rules of autocast and attention. "cuda": norms in float32 under autocast and fused attention always, as on GPUs.
        backward: False stops before the backward pass, where `activations` are known: that takes a third of the time.
    """
    ready = stage.copied()
    with FakeTensorMode(allow_non_fake_inputs=True), _rules(like):
        for module in ready.modules():
            mark_fitted(module)  # with a value that fake tensors can be asked for
        tensors = _faked(ready.modules())
        live = _Live(tensors)
        parameters = [p for p in tensors if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(live.gradient) for p in parameters]  # type: ignore[no-untyped-call]

        def phase(name: str, function: Callable[[], T]) -> T:
            live.phase = name
            if name == "backward":
                live.found.activations = live.now - live.gradients
                return function() if backward else cast(T, None)
            with torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext():
                return function()

        with live:
            ready.run(phase, batch, "cpu")
        for hook in hooks:
            hook.remove()
    return live.found


@contextmanager
def _rules(like: Like) -> Iterator[None]:
    """PyTorch on fake CPU tensors, by the rules of another device, and without looks at values that fake tensors do not have."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch("srcflow.conditioners.base._index", lambda field, value, *_: value))
        if like == "cuda":
            stack.enter_context(mock.patch("srcflow.nn.attention.SMALL", 0))
            for name in ("layer_norm", "group_norm"):
                stack.enter_context(mock.patch.object(F, name, _in_float32(getattr(F, name))))
        yield


def _in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_autocast_enabled("cpu") or x.dtype != torch.bfloat16:
            return function(x, *args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return function(x.float(), *args, **kwargs)

    return call


def _faked(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Put fake CPU tensors in the place of all parameters and buffers; called inside a FakeTensorMode. Returns them, each once."""
    made: dict[int, Tensor] = {}
    kept = []  # the originals, so that their ids stay theirs
    for part in (m for module in modules for m in module.modules()):
        for k, p in part._parameters.items():
            if p is not None:
                kept.append(p)
                if id(p) not in made:
                    made[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
                part._parameters[k] = made[id(p)]  # type: ignore[assignment]  # a Parameter
        for k, b in part._buffers.items():
            if b is not None and b.is_meta:
                kept.append(b)  # type: ignore[arg-type]  # a tensor, too
                if id(b) not in made:
                    made[id(b)] = torch.empty(b.shape, dtype=b.dtype)
                part._buffers[k] = made[id(b)]
    return list(made.values())


def largest_wraps(task: FlowTask) -> tuple[int, int]:
    """FSDP2 (`FlowTask.configure_model`) gathers while it computes: bytes of what belongs to no layer, and of the two largest layers."""
    trunks = [t for t in (*task.flow.blocks, task.flow.self_denoiser) if t is not None]
    layers = sorted((nbytes(layer.parameters()) for t in trunks for layer in getattr(t, "layers", [])), reverse=True)
    return nbytes(task.flow.parameters()) - sum(layers), sum(layers[:2])
