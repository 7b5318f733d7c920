"""What the checks share: explicit assertion errors, files that must not be touched, specifications that must come back."""

from __future__ import annotations

import copy
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

from srcflow import registry
from srcflow.errors import SrcflowError

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")


def fail(subject: object, problem: str) -> NoReturn:
    """Raise an AssertionError that names the part and the problem (`assert` would vanish under `python -O`)."""
    name = subject if isinstance(subject, str) else getattr(subject, "__name__", None) or type(subject).__name__
    raise AssertionError(f"{name}: {problem}")


def require(ok: bool, subject: object, problem: str) -> None:
    """Fail unless `ok`."""
    if not ok:
        fail(subject, problem)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference, relative to max(1, largest |expected|); infinite if anything differs by a NaN."""
    a, e = actual.detach().to(torch.float64), expected.detach().to(torch.float64)
    if a.numel() == 0:
        return 0.0
    error = float((a - e).abs().max() / e.abs().max().clamp(min=1.0))
    return error if error == error else float("inf")


def close(actual: Tensor, expected: Tensor, tolerance: float, subject: object, what: str) -> None:
    """Fail unless both tensors have one shape and agree to `tolerance` (see `distance`)."""
    require(actual.shape == expected.shape, subject, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}.")
    error = distance(actual, expected)
    require(error <= tolerance, subject, f"{what}: differ by {error:.3g}, allowed {tolerance:.3g}.")


def differ(actual: Tensor, expected: Tensor, subject: object, what: str, least: float = 1e-6) -> None:
    """Fail if both tensors agree to `least`."""
    require(distance(actual, expected) > least, subject, what)


def finite(x: Tensor, subject: object, what: str) -> None:
    """Fail if `x` holds a NaN or an infinity."""
    bad = int((~torch.isfinite(x.detach())).sum())
    require(bad == 0, subject, f"{what}: {bad} of {x.numel()} values are not finite.")


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters (or buffers) live; the CPU if it has none."""
    for t in (*module.parameters(), *module.buffers()):
        return t.device
    return torch.device("cpu")


def check_dead_parameters(module: nn.Module, subject: object) -> None:
    """Fail if a trainable parameter got no gradient, a zero one, or one that is not finite."""
    dead = [n for n, p in module.named_parameters() if p.requires_grad and (p.grad is None or not bool(p.grad.any()))]
    require(not dead, subject, f"no gradient reaches the trainable parameters {', '.join(dead)}.")
    bad = [n for n, p in module.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    require(not bad, subject, f"the gradient of {', '.join(bad)} is not finite.")


class _Watch(threading.local):
    """Files and sockets that this thread has opened while watching."""

    touched: list[str] | None = None
    installed = False


_watch = _Watch()
_hook_lock = threading.Lock()
_hooked = False
_CODE = (".py", ".pyc", ".pyi", ".so", ".pyd", ".dll")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    touched = _watch.touched
    if touched is None:
        return
    if event == "open" and isinstance(arguments[0], str | bytes):
        path = arguments[0].decode(errors="replace") if isinstance(arguments[0], bytes) else arguments[0]
        if not path.endswith(_CODE):  # importing a module is no reading of weights
            touched.append(path)
    elif event in ("socket.connect", "socket.getaddrinfo"):
        touched.append(f"{event}{arguments[-1] if event == 'socket.connect' else arguments[:2]}")


@contextmanager
def watch_files() -> Iterator[list[str]]:
    """The files that are opened (imports aside) and the network addresses that are asked for inside the block, by this thread.

    An audit hook sees them whatever library opens them in Python; safetensors, which opens files by itself, is watched at its door.
    """
    global _hooked
    import safetensors
    import safetensors.torch

    with _hook_lock:
        if not _hooked:
            sys.addaudithook(_audit)  # cannot be removed; does nothing outside this block
            _hooked = True
    touched: list[str] = []
    opened = safetensors.safe_open

    def safe_open(filename: Any, *args: Any, **kwargs: Any) -> Any:
        touched.append(str(filename))
        return opened(filename, *args, **kwargs)

    places = [m for m in (safetensors, safetensors.torch) if getattr(m, "safe_open", None) is opened]
    for place in places:
        place.safe_open = safe_open  # type: ignore[assignment,attr-defined,misc,unused-ignore]
    _watch.touched = touched
    try:
        yield touched
    finally:
        _watch.touched = None
        for place in places:
            place.safe_open = opened  # type: ignore[attr-defined,misc,unused-ignore]


def check_specification(part: T, base: type[T]) -> registry.Spec:
    """Fail unless `spec_of(part)` is plain JSON and `build` makes a part of the same class and specification from it. Returns it."""
    try:
        spec = registry.spec_of(part)
        spec = json.loads(json.dumps(spec))
    except (SrcflowError, TypeError, ValueError) as e:
        fail(part, f"has no specification that a configuration file can hold: {e}")
    try:
        again = registry.build(spec, base)
    except (SrcflowError, ImportError) as e:
        fail(part, f"cannot be built again from its specification {spec}: {e} (Is the class defined at the top level of a module?)")
    require(type(again) is type(part), part, f"its specification builds a {type(again).__name__}.")
    require(
        json.loads(json.dumps(registry.spec_of(again))) == spec,
        part,
        f"what its specification builds has another one: {registry.spec_of(again)}, not {spec}.",
    )
    return spec  # type: ignore[no-any-return]  # torch is untyped here


def check_construction(module: M, base: type[M]) -> M:
    """Fail unless `module`'s constructor touches no file, works on the meta device, and takes `module`'s weights afterwards.

    Returns:
        a second module, built from the specification, with the weights of the first.
    """
    spec = check_specification(module, base)
    with watch_files() as touched:
        again = registry.build(spec, base)
    require(not touched, module, f"its constructor opens {', '.join(touched)}; read weights in `setup`.")
    wanted = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    try:
        with torch.device("meta"):
            meta = registry.build(spec, base)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as e:
        fail(module, f"cannot be built on the meta device: {type(e).__name__}: {e}")
    on_meta = {k: tuple(v.shape) for k, v in meta.state_dict().items()}
    require(
        on_meta == wanted,
        module,
        f"on the meta device its weights have other names or shapes: {sorted(set(on_meta.items()) ^ set(wanted.items()))}.",
    )
    real = [n for n, p in meta.named_parameters() if not p.is_meta]
    require(not real, module, f"on the meta device the parameters {', '.join(real)} are allocated all the same.")
    try:
        again.load_state_dict(copy.deepcopy(module.state_dict()), strict=True)
    except RuntimeError as e:
        fail(module, f"its state_dict does not fit what its specification builds: {e}")
    return again.to(device_of(module)).train(module.training)
