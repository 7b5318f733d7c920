"""What accelerators can do, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from srcflow.errors import ConfigError, UnknownNameError


@dataclass(frozen=True)
class Accelerator:
    """One device.

    Args:
        name: how it is called on the command line.
        tflops: peak of dense matrix products in bfloat16, in 1e12 FLOP per second.
        tflops32: the same in float32 without tensor cores (PyTorch's default for float32).
        memory: bytes.
    """

    name: str
    tflops: float
    tflops32: float
    memory: float

    def peak(self, mixed: bool) -> float:
        """FLOP per second under bf16-mixed, or in float32."""
        return (self.tflops if mixed else self.tflops32) * 1e12


# Dense (not sparse) peaks of NVIDIA's data sheets; GeForce: the "Ada GPU architecture" and "GA102" white papers, bfloat16 with float32
# accumulation. Memory in the sheets' GB, of which drivers and the allocator leave a little less: taken as 1e9 bytes, not 2^30.
_SHEETS = (
    ("b200", 2250.0, 80.0, 180e9),
    ("h200", 989.4, 66.9, 141e9),
    ("h100", 989.4, 66.9, 80e9),  # SXM5
    ("h100-pcie", 756.0, 51.0, 80e9),
    ("a100", 312.0, 19.5, 80e9),
    ("a100-40", 312.0, 19.5, 40e9),
    ("l40s", 362.0, 91.6, 48e9),
    ("a6000", 154.8, 38.7, 48e9),  # RTX A6000 (Ampere)
    ("a10", 125.0, 31.2, 24e9),
    ("l4", 121.0, 30.3, 24e9),
    ("rtx4090", 165.2, 82.6, 24e9),
    ("rtx3090", 71.0, 35.6, 24e9),
)
ACCELERATORS = {sheet[0]: Accelerator(*sheet) for sheet in _SHEETS}


def accelerator(name: str, tflops: float | None = None, memory: float | None = None) -> Accelerator:
    """The device of that name, with other numbers where they are given; any name, if both are.

    Args:
        name: one of `ACCELERATORS`, or another.
        tflops: its peak, in 1e12 FLOP per second, of the run's precision.
        memory: its memory in bytes.

    Raises:
        UnknownNameError: the name is unknown and a number is missing.
        ConfigError: a number is not positive.
    """
    for key, value in (("tflops", tflops), ("memory", memory)):
        if value is not None and not value > 0:
            raise ConfigError(key, value, "must be positive.")
    known = ACCELERATORS.get(name)
    if known is None and (tflops is None or memory is None):
        raise UnknownNameError("gpu (or give --tflops and --memory)", name, ACCELERATORS, paths=False)
    return Accelerator(
        name,
        tflops if tflops is not None or known is None else known.tflops,  # type: ignore[arg-type]  # not None where `known` is
        tflops if tflops is not None or known is None else known.tflops32,  # type: ignore[arg-type]
        memory if memory is not None or known is None else known.memory,  # type: ignore[arg-type]
    )
