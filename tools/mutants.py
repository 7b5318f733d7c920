"""Put one wrong line after another into a copy of the package, and see that the tests named for it fail.

    python tools/mutants.py                 # all of mutant_list.py; some minutes
    python tools/mutants.py --list
    python tools/mutants.py --only "latent norm" --jobs 1

A mutant is killed if its tests pass on the unchanged copy and one of them fails on the changed one. It survives if they pass; a mutant
whose snippet is not found once, that cannot be imported, or that runs for ever is an error. The working tree is only read. Exit status 1
if any mutant survives or is in error; they are named at the end.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import cache_from_source
from pathlib import Path
from typing import NamedTuple, TypeVar

from mutant_list import MUTANTS, Mutant

ROOT = Path(__file__).parents[1]
COPIED = ("srcflow", "tests", "tools", "configs", "pyproject.toml")
LIMIT = 20.0
"""Seconds a mutant's tests may take; three times what they take unchanged where that is more."""

LIBRARIES = (
    "numpy",
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "lightning.pytorch",
    "torchmetrics.functional.image",
    "safetensors.torch",
    "scipy.linalg",
    "PIL.Image",
    "jsonargparse",
    "hypothesis.strategies",
    "pytest",
)
"""What the tests import that is not the package: read once for all mutants."""
SERVER = Path(__file__).with_name("mutant_server.py")

T = TypeVar("T")
R = TypeVar("R")


class MutantError(Exception):
    """A mutant that means nothing: it does not fit the source, or its tests do not pass without it."""


class Run(NamedTuple):
    """What some tests did.

    Args:
        outcome: "passed", "failed", "error" (nothing was tested) or "timeout".
        first: node id of the first test that failed, or what was said of an error.
        seconds: wall time.
    """

    outcome: str
    first: str
    seconds: float


def mutated(mutant: Mutant, root: Path) -> str:
    """The source of the mutant's file with its one wrong line.

    Raises:
        MutantError: the snippet does not occur exactly once, spans lines or changes nothing, or the result is no Python.
    """
    path = root / mutant.file
    if not path.is_file():
        raise MutantError(f"{mutant.name!r}: there is no file {mutant.file}.")
    source = path.read_text(encoding="utf-8")
    if (found := source.count(mutant.old)) != 1:
        raise MutantError(f"{mutant.name!r}: its snippet occurs {found} times in {mutant.file}, not once: {mutant.old!r}.")
    if "\n" in mutant.old + mutant.new or mutant.old == mutant.new:
        raise MutantError(f"{mutant.name!r}: a mutant changes part of one line.")
    changed = source.replace(mutant.old, mutant.new)
    try:
        if ast.dump(ast.parse(changed)) == _meaning(source):
            raise MutantError(f"{mutant.name!r}: the changed line means the same.")
    except SyntaxError as e:
        raise MutantError(f"{mutant.name!r}: the changed line is no Python: {e}.") from e
    return changed


def missing_tests(tests: Iterable[str], root: Path) -> list[str]:
    """The node ids that name no test function of their file."""
    return [t for t in tests if t.partition("::")[2] not in _functions(root / t.partition("::")[0])]


@functools.cache
def _meaning(source: str) -> str:
    return ast.dump(ast.parse(source))


def _functions(path: Path) -> frozenset[str]:
    return _tests_of(path.read_text(encoding="utf-8")) if path.is_file() else frozenset()


@functools.cache
def _tests_of(source: str) -> frozenset[str]:
    tree = ast.parse(source)
    return frozenset(n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test"))


def copied(root: Path, target: Path) -> Path:
    """A copy of what the tests need."""
    target.mkdir(parents=True)
    for name in COPIED:
        if (root / name).is_dir():
            shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        elif (root / name).is_file():
            shutil.copy2(root / name, target / name)
    return target


def write(path: Path, text: str) -> None:
    """Replace a module's source and drop its bytecode: Python takes it for current if size and second of the change are the same."""
    path.write_text(text, encoding="utf-8")
    Path(cache_from_source(str(path))).unlink(missing_ok=True)


class Copy:
    """A copy of the tree, and the process that runs its tests (see `mutant_server.py`).

    Args:
        root: the tree.
        folder: where the copy goes.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder, self.output, self.scratch = copied(root, folder / "tree"), folder / "output.txt", folder / "scratch"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "SRCFLOW_", "PYTHON"))}
        # as tests/conftest.py sets them before it imports anything
        kept |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "JSONARGPARSE_DEPRECATION_WARNINGS": "off"}
        self.server = subprocess.Popen(
            [sys.executable, str(SERVER), *LIBRARIES],
            cwd=self.folder,
            env={**kept, "PYTHONPATH": str(self.folder)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def run(self, tests: Sequence[str], limit: float | None = None) -> Run:
        """Run tests, up to the first that fails.

        Args:
            tests: node ids.
            limit: seconds after which they are killed, with all that they started; None: none.
        """
        options = ["-q", "-x", "-p", "no:cacheprovider", "--no-header", "--tb=no", "--assert=plain", f"--basetemp={self.scratch}"]
        order = {"arguments": [*options, *tests], "output": str(self.output)}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        child = int(self.server.stdout.readline())
        start, late = time.perf_counter(), threading.Event()

        def kill() -> None:
            late.set()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)

        timer = threading.Timer(limit, kill) if limit is not None else None
        if timer is not None:
            timer.start()
        status = int(self.server.stdout.readline())
        if timer is not None:
            timer.cancel()
        return outcome(status, self.output.read_text(encoding="utf-8", errors="replace"), time.perf_counter() - start, late.is_set())

    def close(self) -> None:
        """End the process."""
        if self.server.stdin is not None:
            self.server.stdin.close()
        self.server.wait()
        if self.server.stdout is not None:
            self.server.stdout.close()


def outcome(status: int, output: str, seconds: float, late: bool = False) -> Run:
    """What pytest's exit status and output mean."""
    if late:
        return Run("timeout", f"killed after {seconds:.0f} s", seconds)
    if status == 0:
        return Run("passed", "", seconds)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+::[^\[\s]+)", output, re.MULTILINE)
    if status == 1 and failed is not None:
        return Run("failed", failed[1], seconds)
    return Run("error", " / ".join(output.strip().splitlines()[-3:]), seconds)


class Copies:
    """Copies of the tree, one for each job."""

    def __init__(self, root: Path, folder: Path, jobs: int) -> None:
        self.all = [Copy(root, folder / f"copy{k}") for k in range(jobs)]
        self.free: queue.Queue[Copy] = queue.Queue()
        for copy in self.all:
            self.free.put(copy)

    def __enter__(self) -> Copies:
        return self

    def __exit__(self, *error: object) -> None:
        for copy in self.all:
            copy.close()

    def map(self, work: Callable[[T, Copy], R], items: Sequence[T]) -> list[R]:
        """`work(item, copy)` of every item, as many at a time as there are copies; results in order."""

        def one(item: T) -> R:
            copy = self.free.get()
            try:
                return work(item, copy)
            finally:
                self.free.put(copy)

        with ThreadPoolExecutor(len(self.all)) as pool:
            return list(pool.map(one, items))


def unchanged(tests: Sequence[str], copy: Copy) -> Run:
    """Tests on the copy as it is."""
    return copy.run(tests)


def judge(mutant: Mutant, copy: Copy, limit: float) -> Run:
    """The mutant's tests on a copy with its wrong line, which is put back afterwards."""
    path = copy.folder / mutant.file
    source = path.read_text(encoding="utf-8")
    try:
        write(path, mutated(mutant, copy.folder))
        return copy.run(mutant.tests, limit)
    finally:
        write(path, source)


VERDICTS = {"failed": "killed", "passed": "SURVIVED", "error": "ERROR", "timeout": "TIMEOUT"}


def examine(mutants: Sequence[Mutant], root: Path, jobs: int) -> list[str]:
    """Judge mutants and print the table; returns what is wrong, a line each.

    Raises:
        MutantError: a mutant does not fit the source, or its tests are not there.
    """
    for m in mutants:
        mutated(m, root)
        if absent := missing_tests(m.tests, root):
            raise MutantError(f"{m.name!r}: no such tests: {', '.join(absent)}.")
    problems: list[str] = []
    groups = list(dict.fromkeys(m.tests for m in mutants))
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, Copies(root, Path(folder), jobs) as copies:
        print(f"{len(mutants)} mutants, {len(groups)} sets of tests on the unchanged copy first", flush=True)
        before = dict(zip(groups, copies.map(unchanged, groups), strict=True))
        problems += [
            f"{', '.join(tests)}: {r.outcome} without any mutant: {r.first}" for tests, r in before.items() if r.outcome != "passed"
        ]
        sound = [m for m in mutants if before[m.tests].outcome == "passed"]
        width = max((len(m.name) for m in mutants), default=0)

        def one(mutant: Mutant, copy: Copy) -> Run:
            result = judge(mutant, copy, max(LIMIT, 3 * before[mutant.tests].seconds))
            print(f"{mutant.name:{width}}  {VERDICTS[result.outcome]:8}  {result.seconds:5.1f} s  {result.first}", flush=True)
            return result

        for mutant, result in zip(sound, copies.map(one, sound), strict=True):
            if result.outcome != "failed":
                what = "" if result.outcome == "passed" else f": {result.first}"
                problems.append(f"{mutant.name!r} ({mutant.file}): {VERDICTS[result.outcome]}{what}; tests: {', '.join(mutant.tests)}")
    return problems


def main(arguments: Sequence[str] | None = None, mutants: Sequence[Mutant] = MUTANTS, root: Path = ROOT) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="See that the tests notice one wrong line after another.")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    parser.add_argument("--only", metavar="TEXT", action="append", help="the mutants whose name contains TEXT; may be given again")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least one process is needed.")
    chosen = [m for m in mutants if not options.only or any(text in m.name for text in options.only)]
    if not chosen:
        parser.error(f"--only {' '.join(options.only or [])}: no mutant has such a name; --list shows them.")
    if options.list:
        for m in chosen:
            print(f"{m.name}\n    {m.file}: {m.old.strip()}  ->  {m.new.strip()}\n    {' '.join(m.tests)}")
        return 0
    start = time.perf_counter()
    try:
        problems = examine(chosen, root, options.jobs)
    except MutantError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(f"{len(chosen)} mutants in {time.perf_counter() - start:.0f} s, {len(problems)} problems")
    for line in problems:
        print(f"error: {line}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
