"""A property test fails if a feature is never drawn, and as always if the property does not hold."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st

from .drawn import covering, every

FEW = settings(max_examples=5, deadline=None, database=None, derandomize=True)


def shown(n: int) -> list[tuple[str, object]]:
    return [("n", n)]


def test_what_is_never_drawn_is_named() -> None:
    @covering(FEW, st.integers(0, 3), features=shown, needed=every(n=range(6)))
    def test_small(n: int) -> None:
        """Numbers."""
        assert n < 4

    assert (test_small.__name__, test_small.__doc__) == ("test_small", "Numbers.")
    with pytest.raises(AssertionError, match=r"never drawn: n = 4, n = 5\."):
        test_small()


def test_what_the_first_examples_leave_out_is_looked_for_and_tested() -> None:
    seen: list[int] = []

    @covering(FEW, st.integers(0, 11), features=shown, needed=every(n=range(12)))
    def test_numbers(n: int) -> None:
        seen.append(n)

    test_numbers()
    assert set(seen) == set(range(12))
    assert len(seen) <= 5 + 12  # of the others only what was missing is tested


def test_a_property_that_fails_on_a_rare_example_fails_with_it() -> None:
    @covering(FEW, st.integers(0, 11), features=shown, needed=every(n=range(12)))
    def test_numbers(n: int) -> None:
        assert n != 7, f"seven: {n}"

    with pytest.raises(AssertionError, match="seven: 7"):
        test_numbers()
