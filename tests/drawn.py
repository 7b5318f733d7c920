"""Properties whose examples have to show every feature that can be drawn for them: what never occurs is not tested."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from hypothesis import given, seed

Feature = tuple[str, Any]
ROUNDS = 20
"""How often what is missing is looked for."""


def covering(
    settings: Callable[[Any], Any],
    *strategies: Any,
    features: Callable[..., Iterable[Feature]],
    needed: Iterable[Feature],
    **named: Any,
) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Decorates a property's function: a test that draws its arguments, and fails if a needed feature occurs in none of the examples.

    What chance leaves out of the examples is looked for among as many others, a few times over, of which only those count and are tested
    that show it: which examples there are depends on hypothesis's version.

    Args:
        settings: hypothesis's, with the number of examples.
        strategies: of the arguments, by position.
        features: what an example shows, from its arguments.
        needed: what the examples have to show, all together.
        named: strategies by name.
    """
    wanted = set(needed)

    def decorate(holds: Callable[..., None]) -> Callable[[], None]:
        counts: Counter[Feature] = Counter()
        searching = [False]

        @functools.wraps(holds)
        def counted(*args: Any, **kwargs: Any) -> None:
            found = set(features(*inspect.signature(holds).bind(*args, **kwargs).args))
            if not searching[0] or found & wanted - set(counts):
                holds(*args, **kwargs)
                counts.update(found)  # after it: what fails is run again

        def test() -> None:
            counts.clear()
            searching[0] = False
            settings(given(*strategies, **named)(counted))()
            searching[0] = True
            for number in range(ROUNDS):
                if wanted - set(counts):
                    seed(number)(settings(given(*strategies, **named)(counted)))()
            never = sorted(f"{name} = {value!r}" for name, value in wanted - set(counts))
            assert not never, f"never drawn: {', '.join(never)}. Draw more examples, or make these likelier."

        test.__name__, test.__qualname__, test.__doc__, test.__module__ = (
            holds.__name__,
            holds.__qualname__,
            holds.__doc__,
            holds.__module__,
        )
        return test

    return decorate


def every(**domain: Iterable[Any]) -> set[Feature]:
    """All values of features, by name."""
    return {(name, value) for name, values in domain.items() for value in values}
