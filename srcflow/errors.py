"""Exceptions for users: each names the key, the value and the cure."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class SrcflowError(Exception):
    """Base of every error that srcflow raises on purpose.

    Attributes:
        status: exit status of a command that ends with it.
    """

    status = 2

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """Text that any UTF-8 terminal or file takes: bytes of file names that are not UTF-8 are shown as escapes.

    >>> printable(b"caf\\xe9.png".decode(errors="surrogateescape"))
    'caf\\\\xe9.png'
    """
    try:
        return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        return text.encode(errors="backslashreplace").decode()


class ConfigError(SrcflowError, ValueError):
    """A configuration value that cannot be used.

    Args:
        key: the configuration key, dotted.
        value: what stood there.
        problem: why it cannot be used.
        cure: what to write instead.
    """

    def __init__(self, key: str, value: Any, problem: str, cure: str = "") -> None:
        self.key, self.value, self.problem, self.cure = key, value, problem, cure
        super().__init__(f"{key} = {value!r}: {problem}" + (f" {cure}" if cure else ""))


class UnknownNameError(ConfigError):
    """A name that no member of the family has; lists the known ones and the nearest.

    Args:
        key: the configuration key, dotted.
        name: what stood there.
        known: what can stand there.
        paths: whether a full import path can stand there, too.
    """

    def __init__(self, key: str, name: str, known: Iterable[str], *, paths: bool = True) -> None:
        self.known = sorted(known)
        near = difflib.get_close_matches(name, self.known, n=3, cutoff=0.5)
        nearest = f"Did you mean {' or '.join(near)}? " if near else ""
        path = " A full import path works too." if paths else ""
        super().__init__(key, name, "no such name.", f"{nearest}Known: {', '.join(self.known) or 'none'}.{path}")


class DuplicateNameError(SrcflowError):
    """Two distributions register one name in one family."""


class ShapeError(SrcflowError, ValueError):
    """A tensor (or a pair of configured sizes) whose shape does not fit; names both."""


class DataError(SrcflowError):
    """Input data that are missing, damaged or not what was promised."""


class UndecodableError(DataError):
    """An image file that cannot be decoded; training counts it, evaluation stops."""


class ArtifactError(SrcflowError):
    """A stage's directory that is missing, incomplete, damaged, or not what the run was built on."""


class WeightsError(ArtifactError, ValueError):
    """Weights that do not fit the model they are meant for; lists every unknown, missing and misshaped key."""


class ManifestMismatchError(ArtifactError):
    """A stored manifest disagrees with the run; lists every field that differs."""

    def __init__(self, what: str, differences: dict[str, tuple[Any, Any]], cure: str = "") -> None:
        self.differences = differences
        lines = [f"  {k}: stored {stored!r}, this run {wanted!r}" for k, (stored, wanted) in differences.items()]
        super().__init__(f"{what} does not belong to this run:\n" + "\n".join(lines) + (f"\n{cure}" if cure else ""))


class RunningError(SrcflowError):
    """A start in the directory of a run that another process is at."""


class CheckpointError(SrcflowError):
    """A checkpoint that cannot be written or read; says what to go on from."""


class ForeignCheckpointError(CheckpointError, ArtifactError):
    """A checkpoint, or another file, that does not belong to the configured task."""


class StoppedError(SrcflowError):
    """A run that ended because a signal asked it to; no fault of anybody.

    Args:
        signum: the signal.
        what: what became of the run.
        agreed: whether all ranks end alike.
    """

    def __init__(self, signum: int, what: str, *, agreed: bool = True) -> None:
        self.agreed = agreed
        self.signum = signal.Signals(signum)
        self.status = 130 if self.signum == signal.SIGINT else 75  # EX_TEMPFAIL: start again to go on
        super().__init__(f"stopped by {self.signum.name} {what}")


class LostRankError(SrcflowError):
    """Another process of the run has gone, so this one cannot go on.

    Args:
        message: which, and how.
        status: exit status; 75 if the other was stopped by a signal.
    """

    def __init__(self, message: str, status: int = 1) -> None:
        self.status = status
        super().__init__(message)


class NonFiniteError(SrcflowError, ArithmeticError):
    """Training met too many non-finite steps in a row."""


class ProblemsError(SrcflowError, ValueError):
    """Several problems of one configuration, raised together."""

    def __init__(self, problems: list[Exception]) -> None:
        self.problems = problems
        super().__init__(self.text(map(str, problems)))

    def text(self, messages: Iterable[str]) -> str:
        """One message of many."""
        return f"{len(self.problems)} problems:\n" + "\n".join(f"  {i}. {m}" for i, m in enumerate(messages, 1))


def one_of(key: str, value: str, known: Iterable[str]) -> str:
    """`value`, if it is among `known`.

    Raises:
        ConfigError: it is not; lists what is known.
    """
    names = list(known)
    if value not in names:
        raise ConfigError(key, value, "unknown.", f"Known: {', '.join(names)}.")
    return value


class Problems:
    """Collects errors so that a user sees all of them at once.

    >>> problems = Problems()
    >>> with problems.collect():
    ...     raise ConfigError("a", 1, "bad.")
    >>> problems.found[0].key
    'a'
    """

    def __init__(self) -> None:
        self.found: list[Exception] = []

    def add(self, problem: SrcflowError) -> None:
        """Note a problem and go on."""
        self.found.append(problem)

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Note a SrcflowError raised inside the block and go on."""
        try:
            yield
        except ProblemsError as e:
            self.found.extend(e.problems)
        except SrcflowError as e:
            self.found.append(e)

    def raise_if_any(self) -> None:
        """Raise what was collected: the one error as it is, several as ProblemsError."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise ProblemsError(self.found)
