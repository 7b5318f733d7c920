"""The `srcflow` command: LightningCLI for fit, validate, test and predict, and one module beside this file per further command.

A command's module offers `HELP` (one line), `configure(parser)` (its arguments) and `run(config) -> int` (its exit status). Where
arguments name parts, `FAMILIES` lists the families that these are from. Nothing heavy is imported before a command needs it: `--help`, and
commands that make no task and read no data, load no Lightning.
"""

from __future__ import annotations

import difflib
import importlib
import os
import pkgutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

from srcflow import __version__
from srcflow.cli import ranks
from srcflow.errors import SrcflowError, StoppedError

TRAINER_COMMANDS = {
    "fit": "Train a stage (autoencoder, compressor or flow) from a configuration.",
    "validate": "Run a stage's validation once.",
    "test": "Evaluate a stage's checkpoint: one table, and metrics.json beside the logs.",
    "predict": "Run a stage's prediction over a data set.",
}
COMMANDS = ("plan", "index", "sample", "encode", "export", "convert", "replay", "plugins")
TRACEBACK = "SRCFLOW_TRACEBACK"
OVERVIEW = """usage: srcflow [--help | --version] [--debug] COMMAND [options]

Transformer normalizing flows over images and compressed features. --debug shows errors with tracebacks.
Options of a command: srcflow COMMAND --help. Of a part: srcflow fit --model.help FlowTask

commands:
"""


def main(args: list[str] | None = None) -> None:
    """Run one command.

    Args:
        args: what follows `srcflow` on the command line; None takes it from there.

    Raises:
        SystemExit: the status was not 0. Errors of the user (any `SrcflowError`, any wrong argument) have been printed as one
            `error: ...` message and have status 2; with `--debug` or SRCFLOW_TRACEBACK=1 they are raised as they are. A run that a
            signal stopped has status 75 (130 for an interrupt from the keyboard) and goes on if it is started again.
    """
    args = sys.argv[1:] if args is None else list(args)
    debug = "--debug" in args[:1]
    args = args[1:] if debug else args
    with _process(args, debug), ranks.company():
        try:
            status = _dispatch(args)
        except KeyboardInterrupt:
            status = 130
            print("interrupted", file=sys.stderr)
        except SystemExit as e:  # Lightning's own way to end an interrupted run
            if not isinstance(e.__context__, KeyboardInterrupt):
                raise
            status = 130
        except StoppedError as e:
            status = 0 if e.agreed and ranks.launched() else e.status  # Lightning kills all where a launched rank ends with another status
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(e, file=sys.stderr)
        except Exception as e:
            from srcflow.cli.foreign import explained
            from srcflow.cli.parser import located, traceback_wanted, user_error

            error = user_error(e) or explained(e)
            if error is None or traceback_wanted():
                raise
            status = error.status
            print(f"error: {located(error)}", file=sys.stderr)
    if status:
        raise SystemExit(status)


_reported: set[str] = set()
"""Families whose broken plug-ins this command has reported."""


def load_parts(families: Iterable[str] | None = None, packages: Iterable[str] = ("tasks", "datamodules", "callbacks")) -> None:
    """Import parts, so that their class names resolve; report broken plug-ins, each family's once in a command.

    Args:
        families: the families of which every registered part is imported; None: all.
        packages: packages of srcflow of which every module is imported.
    """
    from srcflow import registry

    wanted = list(registry.FAMILIES if families is None else families)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", registry.PluginWarning)  # printed below, as one readable line each
        registry.load_plugins(wanted)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        for broken in (b for family in wanted if family not in _reported for b in registry.broken(family)):
            print(f"warning: plug-in {broken.distribution}: {broken.family} {broken.name} is left out: {broken.error}", file=sys.stderr)
    _reported.update(wanted)
    for name in packages:
        package = importlib.import_module(f"srcflow.{name}")
        for module in pkgutil.iter_modules(package.__path__, f"srcflow.{name}."):
            importlib.import_module(module.name)


def _dispatch(args: list[str]) -> int:
    _reported.clear()
    name = args[0] if args else "--help"
    if name in ("-h", "--help"):
        further = {command: importlib.import_module(f"srcflow.cli.{command}").HELP for command in COMMANDS}
        print(OVERVIEW + "\n".join(f"  {command:<10} {text}" for command, text in {**TRAINER_COMMANDS, **further}.items()))
    elif name == "--version":
        print(f"srcflow {__version__}")
    elif name in TRAINER_COMMANDS:
        with ranks.stoppable() if name == "fit" else nullcontext():
            from srcflow.cli.trainer import run_trainer

            run_trainer()
    elif name in COMMANDS:
        from srcflow.cli import sources
        from srcflow.cli.parser import Parser

        sources.forget()
        command = importlib.import_module(f"srcflow.cli.{name}")
        load_parts(getattr(command, "FAMILIES", ()), packages=())
        parser = Parser(prog=f"srcflow {name}", description=command.HELP)
        command.configure(parser)
        return int(command.run(parser.instantiate(parser.parse_args(args[1:]))))
    else:
        known = (*TRAINER_COMMANDS, *COMMANDS)
        options = ("--help", "--version", "--debug")
        hint = "".join(f" Did you mean {near}?" for near in difflib.get_close_matches(name, (*known, *options), n=1))
        raise SrcflowError(f"{name!r} is not a command.{hint} Known: {', '.join(known)}.")
    return 0


@contextmanager
def _process(args: list[str], debug: bool) -> Iterator[None]:
    """LightningCLI reads sys.argv, and the processes it starts inherit it and the environment; both are restored."""
    argv, traceback = sys.argv, os.environ.get(TRACEBACK, "0")
    sys.argv = [argv[0], *args]
    os.environ[TRACEBACK] = "1" if debug else traceback
    try:
        yield
    finally:
        sys.argv, os.environ[TRACEBACK] = argv, traceback
