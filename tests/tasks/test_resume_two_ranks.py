"""2N steps are N steps, a kill, and N steps, bit for bit, on two processes: through the command line, for every task."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

HERE = Path(__file__).parent


def overlay(name: str, **more: Any) -> dict[str, Any]:
    """The strategy of configs/trainer, for two processes."""
    strategy = yaml.safe_load((HERE.parents[1] / "configs/trainer" / f"{name}.yaml").read_text())["trainer"]["strategy"]
    return {"strategy": {**strategy, "init_args": {**strategy["init_args"], **more}}, "devices": 2}


DDP, FSDP2 = overlay("ddp8"), overlay("fsdp2", data_parallel_size=2)


def one_rank() -> Any:
    """The helpers of test_resume.py."""
    spec = importlib.util.spec_from_file_location("resume_test", HERE / "test_resume.py")
    if spec is None or spec.loader is None:
        raise ImportError("test_resume.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


R = one_rank()
data = R.data  # the fixture
HALF = R.HALF


def srcflow(arguments: list[str], *, fails: int | None = None, **environment: str) -> None:
    """Run the command line; Lightning starts the second rank."""
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    out = subprocess.run(
        [sys.executable, "-m", "srcflow", *arguments],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path, **environment}, cwd=HERE.parents[1],
    )  # fmt: skip
    assert out.returncode == (fails or 0), out.stderr[-5000:]


def compare(stage: str, model: dict[str, Any], data: Path, here: Path, trainer: dict[str, Any], **more: Any) -> dict[str, Any]:
    """As in test_resume.py, with processes that end at once in a later step than the checkpoint's. Gives the last checkpoint."""
    trainer = {"limit_val_batches": 1, **trainer}
    straight, broken = here / "straight", here / "broken"
    srcflow(R.configuration(data, straight, stage, model, trainer, **more))
    command = R.configuration(data, broken, stage, model, trainer, **more)
    settings = yaml.safe_load((broken / "overlay.yaml").read_text())
    settings["trainer"]["callbacks"].append({"class_path": "dying.Dies", "init_args": {"at": HALF + 2}})
    (broken / "dying.yaml").write_text(yaml.safe_dump(settings))
    srcflow([*command, "--config", str(broken / "dying.yaml")], fails=9)
    checkpoint = R.kept(broken, HALF)
    assert list(R.differences(R.load(R.kept(straight, HALF)), R.load(checkpoint))) == []
    assert not list(broken.glob(f"kept/*step={2 * HALF}.ckpt"))
    srcflow([*command, "--ckpt_path", str(checkpoint)])
    end, other = R.load(R.kept(straight, 2 * HALF)), R.load(R.kept(broken, 2 * HALF))
    assert {"state_dict", "raw_state", "optimizer_states", "lr_schedulers", "loops", "callbacks"} <= end.keys()
    assert list(R.differences(end, other)) == []
    return dict(end)


def test_a_flow_under_ddp_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """Two batches to a step, in the second epoch (5 batches in one of two ranks)."""
    model = {**R.FLOW, "codec": str(data / "codec")}
    end = compare("flow", model, data, tmp_path, {**DDP, "accumulate_grad_batches": 2})
    assert end["global_step"] == 2 * HALF
    assert torch.equal(end["state_dict"]["flow.prior_std"], torch.ones(16, 192))


@pytest.mark.slow
def test_a_flow_under_fsdp2_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    model = {**R.FLOW, "codec": str(data / "codec")}
    compare("flow", model, data, tmp_path, {**FSDP2, "accumulate_grad_batches": 2})


@pytest.mark.slow
def test_an_autoencoder_and_its_discriminator_under_ddp_go_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    end = compare("autoencoder", {}, data, tmp_path, DDP)
    assert end["discriminator"]["optimizer"]["state"][0]["step"] == 2 * HALF - 4  # train_from


@pytest.mark.slow
def test_a_compressor_under_ddp_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    model = {
        "autoencoder": str(data / "codec"),
        "compressor": {"class_path": "srcflow.compressors.linear.Linear", "init_args": {"dim": 192, "code_dim": 4}},
    }
    compare("compressor", model, data, tmp_path, {**DDP, "accumulate_grad_batches": 2})
