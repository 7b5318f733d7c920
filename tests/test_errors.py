"""Messages name the key, the value and the cure."""

from __future__ import annotations

import pytest

from srcflow.errors import (
    ArtifactError,
    ConfigError,
    ManifestMismatchError,
    Problems,
    ProblemsError,
    ShapeError,
    SrcflowError,
    UnknownNameError,
)


def test_config_error_names_key_value_and_cure() -> None:
    error = ConfigError("flow.width", 100, "is no multiple of head_dim = 64.", "Write 64 or 128.")
    assert str(error) == "flow.width = 100: is no multiple of head_dim = 64. Write 64 or 128."
    assert (error.key, error.value, error.problem, error.cure) == (
        "flow.width",
        100,
        "is no multiple of head_dim = 64.",
        "Write 64 or 128.",
    )
    assert str(ConfigError("a", "x", "bad.")) == "a = 'x': bad."
    assert isinstance(error, ValueError), "jsonargparse reports ValueErrors with the key they came from"


def test_unknown_name_lists_the_known_and_the_nearest() -> None:
    error = UnknownNameError("model.coupling", "Affin", ["SoftplusAffine", "Affine", "Additive"])
    assert "model.coupling = 'Affin'" in str(error)
    assert "Did you mean Affine" in str(error)
    assert "Known: Additive, Affine, SoftplusAffine." in str(error)
    far = UnknownNameError("model.coupling", "xyz", ["Affine"])
    assert "Did you mean" not in str(far)
    assert "Known: Affine." in str(far)
    assert "Known: none." in str(UnknownNameError("model.coupling", "xyz", []))


def test_mismatch_lists_every_field() -> None:
    error = ManifestMismatchError("the feature store /x", {"encoder": ("A", "B"), "transform.size": (32, 64)}, "Encode again.")
    assert "  encoder: stored 'A', this run 'B'\n" in str(error)
    assert "  transform.size: stored 32, this run 64\n" in str(error)
    assert str(error).endswith("Encode again.")
    assert error.differences == {"encoder": ("A", "B"), "transform.size": (32, 64)}
    assert isinstance(error, ArtifactError)


def test_one_problem_is_raised_as_it_is() -> None:
    problems = Problems()
    with problems.collect():
        raise ConfigError("a", 1, "bad.")
    with pytest.raises(ConfigError, match="a = 1: bad"):
        problems.raise_if_any()


def test_several_problems_are_raised_together() -> None:
    problems = Problems()
    with problems.collect():
        raise ConfigError("a", 1, "bad.")
    problems.add(ShapeError("N = 3 and grid = (2, 2)"))
    inner = Problems()
    for key in "bc":
        inner.add(ConfigError(key, 2, "worse."))
    with problems.collect():
        inner.raise_if_any()
    with pytest.raises(ProblemsError) as raised:
        problems.raise_if_any()
    assert len(raised.value.problems) == 4, "nested problems are flattened"
    assert str(raised.value).splitlines() == [
        "4 problems:",
        "  1. a = 1: bad.",
        "  2. N = 3 and grid = (2, 2)",
        "  3. b = 2: worse.",
        "  4. c = 2: worse.",
    ]


def test_bugs_are_not_collected() -> None:
    problems = Problems()
    with pytest.raises(KeyError), problems.collect():
        raise KeyError("a bug")
    assert problems.found == []
    problems.raise_if_any()


@pytest.mark.parametrize("error", [ConfigError("a", 1, "b"), ShapeError("a"), ManifestMismatchError("a", {}), ProblemsError([])])
def test_every_error_is_srcflows(error: Exception) -> None:
    assert isinstance(error, SrcflowError)
