"""Runs pytest in the current directory again and again, each time in a fork that has the libraries but not yet the package imported.

Started by `mutants.py` with the libraries' names, one for each copy of the tree, which is on Python's path. An order is a line of JSON on
standard input, {"arguments": pytest's, "output": a file}; the answers on standard output are the fork's process id, and its exit status
when it ends.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import traceback
from pathlib import Path

FAILED = 3


def tested(order: dict[str, object]) -> int:
    """pytest's exit status; in a fork."""
    os.setsid()
    file = os.open(str(order["output"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        import pytest

        import srcflow

        if not Path(srcflow.__file__).resolve().is_relative_to(Path.cwd().resolve()):
            print(f"srcflow is {srcflow.__file__}, not the copy in {Path.cwd()}")
            return FAILED
        return int(pytest.main(list(order["arguments"])))  # type: ignore[call-overload]  # a list of strings
    except BaseException:
        traceback.print_exc()
        return FAILED
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main() -> int:
    """Serve until standard input ends."""
    sys.path.pop(0)  # this file's folder
    for name in sys.argv[1:]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if "srcflow" in sys.modules:
        print("a library imported srcflow, whose copy must be read anew in every fork", file=sys.stderr)
        return FAILED
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(tested(json.loads(line)))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
