"""What an objective gives: a total to be minimised, and its terms by name."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Objective(NamedTuple):
    """A scalar loss with its graph, and its terms by name: scalars, detached, before they are weighted."""

    total: Tensor
    terms: dict[str, Tensor]
