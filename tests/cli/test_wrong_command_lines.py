"""Wrong command lines of many kinds: status 2, one message that names what is wrong, and never a traceback."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from srcflow.cli import main

ROOT = Path(__file__).parents[2]
FIT = "fit --config smoke/flow.yaml"
TEST = "test --config smoke/flow.yaml"
ENCODE = "encode --encoder EfficientNetLite --data ImageShards --data.train x.tar --data.size 32 --out store"

LINES = [
    # commands
    ("fti", "'fti' is not a command. Did you mean fit?"),
    ("--verison", "Did you mean --version?"),
    ("fit", "model and data: required, and not given. Name a configuration: srcflow fit --config FILE, e.g. --config configs/"),
    ("test --trainer.max_steps 3", "Name a configuration: srcflow test --config FILE"),
    ("fit smoke/flow.yaml", "unrecognized arguments: smoke/flow.yaml. Did you mean --config smoke/flow.yaml?"),
    ("sample --n 3", "missing: --out, --pipeline."),
    ("index", "missing: SHARDS."),
    ("convert tarflow", "missing: PATH, --out."),
    ("convert tarflo x --out o", "invalid choice: 'tarflo'"),
    # options
    (f"{FIT} --trainer.max_stpes 3", "--trainer.max_stpes 3. Did you mean --trainer.max_steps?"),
    (f"{FIT} --modle.seed 3", "Did you mean --model.seed?"),
    (f"{FIT} --model.optimization.lerning_rate 3", "Did you mean --model.optimization.learning_rate?"),
    (f"{FIT} --data.batch_sise 3", "data.batch_sise: "),
    ("sample --pipeline x --out x.png --trainer.max_steps 3", "unrecognized arguments: --trainer.max_steps 3"),
    ("plugins --famly encoders", "Did you mean --family?"),
    ("plan smoke/flow.yaml --set trainer.max_stpes=3", "Did you mean --trainer.max_steps?"),
    (f"{FIT} --trainer", "argument --trainer: expected one argument"),
    # values
    (f"{FIT} --seed_everything -1", "seed_everything = -1: a seed lies between 0 and 4294967295."),
    (f"{FIT} --seed_everything 99999999999", "seed_everything = 99999999999: a seed lies between"),
    (f"{FIT} --seed_everything abc", "seed_everything: expected bool or int, got abc."),
    (f"{FIT} --trainer.devices 0", "trainer.devices = '0': "),
    (f"{FIT} --trainer.devices two", "trainer.devices = 'two': "),
    (f"{FIT} --trainer.accelerator quantum", "trainer.accelerator = 'quantum': "),
    (f"{FIT} --trainer.strategy dpp", "trainer.strategy = 'dpp': "),
    (f"{FIT} --trainer.precision 12", "trainer.precision: expected one of 64, 32, 16 or "),
    (f"{FIT} --trainer.num_nodes 0", "trainer.num_nodes = 0: must be at least 1."),
    (f"{FIT} --trainer.accumulate_grad_batches 0 --trainer.max_steps -5", "2 problems"),
    (f"{FIT} --trainer.limit_val_batches 1.5", "trainer.limit_val_batches = 1.5: "),
    (f"{FIT} --trainer.fast_dev_run -1", "trainer.fast_dev_run = -1: "),
    (f"{FIT} --trainer.profiler fast", "trainer.profiler = 'fast': "),
    (f"{FIT} --trainer.max_time never", "trainer.max_time = 'never': "),
    (f"{FIT} --trainer.callbacks [1]", "trainer.callbacks: expected a Callback: the name of its class, or class_path and init_args."),
    (f"{FIT} --model.optimization.betas [1,2,3]", "model.optimization.betas: expected tuple with 2 elements"),
    (f"{FIT} --model.flow.head_dim 7", "is not a multiple of head_dim = 7."),
    (f"{FIT} --model 3", "model = '3': no such name."),
    ("plan smoke/flow.yaml --set trainer.max_steps=[", "error: trainer.max_steps: expected int, got [."),
    ("convert tarflow x --out o --set a=[1", "set a = '[1': line "),
    # places
    (f"{FIT} --config nowhere.yaml", "nowhere.yaml"),
    (f"{FIT} --config smoke", "Path is not a file"),
    (f"{FIT} --config file", "config = 'file': is empty."),
    ("plan smoke", "configs = 'smoke': is a directory, and a YAML file is wanted."),
    ("convert tarflow file --out file/o", "out = 'file/o': cannot be written, since "),
    ("convert tarflow file --out o --config smoke", "config = 'smoke': is a directory"),
    (f"{ENCODE} --device gpu", "device = 'gpu': is not a device. Write cpu, cuda, or cuda:0"),
    (f"{ENCODE} --device meta", "device = 'meta': torch cannot compute on it here."),
    ("encode --config smoke/flow.yaml --out store", "seed_everything: no such option."),
    ("sample --pipeline x --n 1 --out file/x.npz", "out = 'file/x.npz': cannot be written, since "),
    (
        "sample --pipeline x --n 1 --out x.jpg",
        "out = 'x.jpg': no .jpg files are written. Write x.png for a grid",
    ),
    ("replay smoke", "smoke is no dump"),
]


@pytest.mark.parametrize(("line", "words"), LINES, ids=[line for line, _ in LINES])
def test_a_wrong_line_is_one_message(
    line: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "smoke").symlink_to(ROOT / "configs/smoke")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as status:
        main(shlex.split(line))
    assert status.value.code == 2
    error = capsys.readouterr().err
    message = error[error.index("error: ") :]
    assert words in message
    assert "Traceback" not in error
    assert len([row for row in message.splitlines() if not row.startswith(("Help: ", "  "))]) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "smoke"]  # nothing is left behind


@pytest.mark.parametrize("line", [f"{FIT} --trainer.devices 0", f"{FIT} --seed_everything -1"])
def test_debug_raises(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "configs")
    with pytest.raises(Exception, match=r"devices|seed") as error:
        main(["--debug", *shlex.split(line)])
    assert not isinstance(error.value, SystemExit)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"{FIT} --trainer.accelerator gpu", "trainer.accelerator = 'gpu': No supported gpu backend found! Write cpu or auto"),
        (f"{ENCODE} --device cuda", "device = 'cuda': there is no GPU that torch can use. Write cpu, or leave it out."),
        ("sample --pipeline x --n 1 --out x.png --device cuda:9", "device = 'cuda:9': there is no GPU that torch can use."),
    ],
)
def test_without_a_gpu(line: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT / "configs")
    with pytest.raises(SystemExit):
        main(shlex.split(line))
    assert words in capsys.readouterr().err


def test_a_gpu_that_there_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit):
        main(["sample", "--pipeline=x", "--n=1", f"--out={tmp_path / 'x.png'}", "--device=cuda:2"])
    assert "device = 'cuda:2': this machine has 2 GPUs. Write a number up to cuda:1." in capsys.readouterr().err
