"""`srcflow replay`: make a dumped training step again, and say where it goes wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

from srcflow.errors import ConfigError

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from srcflow.cli.parser import Parser
    from srcflow.tasks.dump import Dump
    from srcflow.tasks.replay import Replay

HELP = "Make a training step again from its dump: where the first non-finite value appears, and whether the numbers are the run's."
SHOWN = 12
BLOCK_COLUMNS = ("log_scale_min", "log_scale_max", "attention_logit_max", "z_abs_max")


def configure(parser: Parser) -> None:
    """Add the command's arguments."""
    parser.add_argument("dump", type=str, help="Directory that a run wrote for a step it dropped (nonfinite-step...).")
    parser.add_argument("--config", type=str | None, default=None, help="The run's configuration; default: the one in the dump.")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="Default: as in the run, if there is one.")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], help="Default: the run's.")


def run(config: Namespace) -> int:
    """Make the step, print what it is like; status 1 if it is not what the run saw."""
    from srcflow.cli import load_parts
    from srcflow.cli.devices import device_of
    from srcflow.cli.export import task_of
    from srcflow.tasks import dump as dumps
    from srcflow.tasks.discriminator import Discriminator
    from srcflow.tasks.replay import differences, replay

    dump = dumps.read(config.dump)
    path = config.config or dump.config
    if path is None:
        raise ConfigError("config", None, "is missing: the dump has none.", "Give the run's configuration: --config FILE.")
    if config.device is not None:
        device_of(config.device)
    load_parts()
    task = task_of(str(path))
    result = replay(dump, task, device=config.device, precision=config.precision)
    several = dump.facts["accumulate_grad_batches"] > 1 and isinstance(getattr(task, "discriminator", None), Discriminator)
    different = differences(dump, result, heads_moved=several)
    print(report(dump, result))
    if not different:
        print("The step is reproduced.")
        return 0
    print(f"The step is not reproduced; {len(different)} numbers differ:")
    print("\n".join(f"  {line}" for line in different[:SHOWN]) + ("\n  ..." if len(different) > SHOWN else ""))
    return 1


def report(dump: Dump, result: Replay) -> str:
    """What the step is like, in words and columns."""
    from srcflow.tasks.examination import verdict
    from srcflow.tasks.replay import where_of

    facts = dump.facts
    lines = [f"optimizer step {facts['step']} of {facts['task']}, epoch {facts['epoch']}, seed {facts['seed']}, {facts['precision']}"]
    for recorded, finding, first in zip(dump.batches, result.findings, result.forward, strict=True):
        names = dict(zip(finding.get("indices", []), recorded.finding["names"], strict=True))
        lines.append(f"{where_of(recorded, dump)}: loss {finding['loss']:.6g} (recorded {recorded.finding['loss']:.6g})")
        lines += [f"  {k.removeprefix('train/'):<20} {v:.6g}" for k, v in finding["terms"].items()]
        if blocks := finding.get("blocks"):
            lines.append(f"  {'block':<8}{'log-scale':>12}{'to':>12}{'attention logit':>18}{'largest output':>18}")
            for k, row in enumerate(zip(*(blocks[name] for name in BLOCK_COLUMNS), strict=True)):
                lines.append(f"  {k:<8}" + "".join(f"{v:>{width}.4g}" for v, width in zip(row, (12, 12, 18, 18), strict=True)))
        lines.append(f"  {verdict(finding, lambda i, names=names: names.get(i, str(i)))[1]}")  # type: ignore[misc]
        if first is not None:
            lines.append(f"  the first value that is not finite: {first}")
    lines.append(f"gradient norm {result.grad_norm:.6g} (recorded {facts['grad_norm']:.6g})")
    lines += [f"  {k:<30} {v:.6g}" for k, v in result.groups.items()]
    if result.backward is not None:
        lines.append(f"  the first gradient that is not finite: {result.backward}")
    return "\n".join(lines)
