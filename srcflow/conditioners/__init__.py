"""Conditioners: how a block reads a label or a text.

The names below are imported on first use; importing the package alone loads neither torch nor Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcflow.lazy import lazy

if TYPE_CHECKING:
    from srcflow.conditioners.base import Conditioner as Conditioner
    from srcflow.conditioners.base import Field as Field
    from srcflow.conditioners.base import Joint as Joint
    from srcflow.conditioners.class_table import ClassTable as ClassTable
    from srcflow.conditioners.class_token import ClassToken as ClassToken
    from srcflow.conditioners.text_prefix import TextPrefix as TextPrefix

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "base": ["Conditioner", "Field", "Joint"],
        "class_table": ["ClassTable"],
        "class_token": ["ClassToken"],
        "text_prefix": ["TextPrefix"],
    },
)
