"""The executable contracts of srcflow's families, for whoever writes a member of one.

Each `check_*` takes a member, exercises everything its base class promises, and raises an `AssertionError` that says what is broken and by
how much. They need no test framework: call them from a test of your own.

>>> from srcflow.couplings.affine import Affine
>>> from srcflow.testing import check_coupling
>>> check_coupling(Affine())

Parameters are perturbed where a fresh member would pass vacuously (heads start at zero), on a copy: the member you hand in is left alone.
`perturb` bounds what blocks predict, so that a flow with random weights can be inverted on every processor.
"""

from __future__ import annotations

from srcflow.testing.blocks import ReferenceBlock, check_block
from srcflow.testing.compressors import check_compressor
from srcflow.testing.conditioners import check_conditioner
from srcflow.testing.couplings import check_coupling
from srcflow.testing.encoders import check_encoder
from srcflow.testing.guidance import check_guidance
from srcflow.testing.perturbation import perturb
from srcflow.testing.solvers import check_solver

__all__ = [
    "ReferenceBlock",
    "check_block",
    "check_compressor",
    "check_conditioner",
    "check_coupling",
    "check_encoder",
    "check_guidance",
    "check_solver",
    "perturb",
]
