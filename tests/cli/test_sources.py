"""Configurations that are wrong: the message names the file and the line, in every command that reads one."""

from __future__ import annotations

from pathlib import Path

import lightning  # noqa: F401  # before a test: its log keeps the stderr that it finds
import pytest

from srcflow.cli import main, sources
from srcflow.cli.parser import Parser
from srcflow.conditioners import Conditioner
from srcflow.registry import MOVED

ROOT = Path(__file__).parents[2]
FLOW = (ROOT / "configs/smoke/flow.yaml").read_text(encoding="utf-8")


def line_of(text: str, part: str) -> int:
    return next(i for i, line in enumerate(text.splitlines(), 1) if part in line)


def error_of(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as status:
        main(args)
    assert status.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error[error.index("error: ") :]


def written(folder: Path, text: str, name: str = "run.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


TWICE = FLOW + "trainer:\n  max_steps: 2\n"


@pytest.mark.parametrize(
    "command",
    [
        ["fit", "--config", "FILE"],
        ["test", "--config", "FILE"],
        ["sample", "--config", "FILE", "--pipeline", "x", "--out", "x.png", "--n", "1"],
        ["encode", "--config", "FILE", "--out", "x"],
        ["plan", "FILE"],
        ["plan", "configs/smoke/flow.yaml", "--stages", "FILE"],
        ["export", "--config", "FILE", "--ckpt_path", "FILE", "--out", "x"],
        ["convert", "tarflow", "x.pth", "--config", "FILE", "--out", "x"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_every_command_refuses_a_section_that_stands_twice(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    file = written(tmp_path, TWICE)
    command = [file if word == "FILE" else str(tmp_path / word) if word in ("x", "x.png") else word for word in command]
    error = error_of(command, capsys)
    first, second = line_of(TWICE, "trainer:"), len(TWICE.splitlines()) - 1
    assert f"{file}': the key trainer stands in line {first} and again in line {second}" in error


def test_a_part_in_a_file_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = written(tmp_path, FLOW)
    part = written(tmp_path, "class_path: Gaussian\ninit_args:\n  strength: 1\n  strength: 2\n", "guidance.yaml")
    error = error_of(["fit", "--config", run, "--model.guidance", part], capsys)
    assert f"config = '{part}': the key init_args.strength stands in line 3 and again in line 4" in error
    part = written(tmp_path, "class_path: [\n", "guidance.yaml")
    assert f"{part}': line 2, column 1: is not YAML" in error_of(["fit", "--config", run, "--model.guidance", part], capsys)


def test_a_value_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(["fit", "--config", written(tmp_path, FLOW), "--model.guidance={class_path: Linear, class_path: Gaussian}"], capsys)
    assert "the key class_path stands twice in line 1" in error


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("max_steps: 24", "max_steps: 1e2", "trainer.max_steps: expected int, got 100.0."),
        ("learning_rate: 2.0e-3", "learning_rate: fast", "model.optimization.learning_rate: expected float, got fast."),
        ("learning_rate: 2.0e-3", "learning_rate: -2.0", "2 problems"),
        ("class_path: Gaussian", "class_path: Gausian", "model.guidance = 'Gausian': no such name. Did you mean Gaussian"),
        ("max_steps: 24", "max_stpes: 24", "trainer.max_stpes: no such option. Did you mean trainer.max_steps?"),
        ("label_dropout: 0.1", "label_dropuot: 0.1", "model.label_dropuot: FlowTask has no such option. Did you mean label_dropout?"),
        ("label_dropout: 0.1", "label_dropout: 7.0", "label_dropout = 7.0: "),
        ("decay: 0.9", "decay: quick", "trainer.callbacks.decay: expected float or list, got quick."),
        ("max_steps: 24", "max_steps: -24", "trainer.max_steps = -24: must be at least -1"),
        ("\ntrainer:", "\ntrianer: {}\ntrainer:", "trianer: no such option. Did you mean trainer?"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(old: str, new: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = FLOW.replace(old, new)
    assert text != FLOW
    error = error_of(["fit", "--config", written(tmp_path, text)], capsys)
    assert words in error
    line = line_of(text, "guidance:" if "model.guidance" in words else new.strip().splitlines()[0])
    assert f"{tmp_path}/run.yaml, line {line}: " in error


def test_a_value_that_the_command_line_replaces_is_not_looked_for_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(["fit", "--config", written(tmp_path, FLOW), "--trainer.max_steps", "many"], capsys)
    assert error.startswith("error: trainer.max_steps: expected int, got many.")


def test_the_later_of_two_files_has_the_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (
        written(tmp_path, FLOW, "first.yaml"),
        written(tmp_path, "model:\n  init_args:\n    label_dropout: 7.0\n", "second.yaml"),
    )
    assert f"{second}, line 3: label_dropout = 7.0" in error_of(["fit", "--config", first, "--config", second], capsys)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"), (b"# nothing\n", "is empty"), (b"- a\n", "holds a list"), (b"hello\n", "holds a single value"),
        (b"# caf\xe9\n", "line 1: is not text in UTF-8"), (b"model:\n\tx: 1\n", "line 2, column 1: is not YAML"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["fit", "plan", "export"])
def test_files_that_are_no_configuration(
    content: bytes, words: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    more = {"fit": ["--config", str(file)], "plan": [str(file)], "export": ["--config", str(file), "--ckpt_path", str(file), "--out", "x"]}
    error = error_of([command, *more[command]], capsys)
    assert f"run.yaml': {words}" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("change", [lambda t: t.replace("2.0e-3", "2e-3"), lambda t: t.replace("\n", "\r\n"), lambda t: "\ufeff" + t])
def test_numbers_line_endings_and_byte_order_marks(
    change: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(change)
    (tmp_path / "run.yaml").write_bytes(change(FLOW).encode())
    with pytest.raises(SystemExit) as status:
        main(["fit", "--config", str(tmp_path / "run.yaml"), "--print_config"])
    assert status.value.code == 0
    assert "learning_rate: 0.002\n" in capsys.readouterr().out


def test_null_reaches_options_at_every_depth(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--model.optimization.gradient_clip", "null", "--model.evaluation.denoise=null", "--model.statistics_batches", "null",
             "--model.artifact", "null", "--model.guidance", "null"]  # fmt: skip
    with pytest.raises(SystemExit) as status:
        main(["fit", "--config", str(ROOT / "configs/smoke/flow.yaml"), *given, "--print_config"])
    assert status.value.code == 0
    printed = capsys.readouterr().out
    for key in ("gradient_clip", "denoise", "statistics_batches", "artifact", "guidance"):
        assert f" {key}: null\n" in printed


# --- class paths of earlier versions ------------------------------------------------------------------------------------------------------


FORMER, TODAY = "srcflow.flows.conditioners.ClassTable", "srcflow.conditioners.class_table.ClassTable"
OLD_RUN = f"""
model:
  class_path: FlowTask
  init_args:
    codec: nowhere
    flow:
      class_path: Flow
      init_args:
        blocks:
        - class_path: srcflow.flows.TransformerBlock
          init_args:
            channels: 2
            width: 8
            layers: 1
            heads: 1
            positions: {{class_path: Rotary, init_args: {{grid: [2, 2]}}}}
            coupling: Affine
            conditioner: {{class_path: {FORMER}, init_args: {{num_classes: 3, width: 8}}}}
data: {{class_path: ImageFolder, init_args: {{train: images, size: 8, num_classes: 3}}}}
"""


def test_fit_reads_a_configuration_of_an_earlier_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["fit", "--config", written(tmp_path, OLD_RUN), "--print_config"])
    assert not status.value.code
    printed = capsys.readouterr().out
    assert f"class_path: {TODAY}\n" in printed or "class_path: srcflow.conditioners.ClassTable\n" in printed
    assert FORMER not in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["--part", FORMER, "--part.num_classes", "3", "--part.width", "4"],
        [f"--part={FORMER}", "--part.num_classes=3", "--part.width=4"],
        ["--part.class_path", FORMER, "--part.num_classes", "3", "--part.width", "4"],
        [f'--part={{"class_path": "{FORMER}", "init_args": {{"num_classes": 3, "width": 4}}}}'],
    ],
    ids=["value", "equals", "class_path", "json"],
)
def test_the_command_line_takes_a_class_path_of_an_earlier_version(arguments: list[str]) -> None:
    parser = Parser()
    parser.add_argument("--part", type=Conditioner)
    assert parser.parse_args(arguments).part.class_path in (TODAY, "srcflow.conditioners.ClassTable")


def test_a_file_that_is_read_for_its_sections_has_todays_paths(tmp_path: Path) -> None:
    content = sources.read(written(tmp_path, OLD_RUN))
    block = content["model"]["init_args"]["flow"]["init_args"]["blocks"][0]
    assert block["init_args"]["conditioner"] == {"class_path": TODAY, "init_args": {"num_classes": 3, "width": 8}}
    assert MOVED[FORMER] == TODAY
