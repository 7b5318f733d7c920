"""Two processes through the command line: 2N steps are N steps, a kill, and N steps, bit for bit; on one node and on two."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from srcflow.cli import main

HERE = Path(__file__).parent


def one_rank() -> Any:
    """The helpers of test_resume.py."""
    spec = importlib.util.spec_from_file_location("resume_test", HERE / "test_resume.py")
    if spec is None or spec.loader is None:
        raise ImportError("test_resume.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def overlay(name: str, **more: Any) -> dict[str, Any]:
    """The strategy of configs/trainer, for two processes."""
    strategy = yaml.safe_load((HERE.parents[1] / "configs/trainer" / f"{name}.yaml").read_text())["trainer"]["strategy"]
    return {"strategy": {**strategy, "init_args": {**strategy["init_args"], **more}}, "devices": 2}


R = one_rank()
data = R.data  # the fixture
HALF = R.HALF
DDP, FSDP2 = overlay("ddp8"), overlay("fsdp2", data_parallel_size=2)
ACCUMULATED = {"accumulate_grad_batches": 2, "limit_val_batches": 1}
TARFLOW = {"grid": 4, "channels": 192, "width": 32, "blocks": 2, "layers": 1, "head_dim": 16, "num_classes": 4, "volume_preserving": True}
PRIOR = {**R.FLOW, "flow": {"class_path": "srcflow.flows.presets.tarflow", "init_args": TARFLOW}}
pytestmark = R.pytestmark


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]), **more}


def finish(*processes: subprocess.Popen[str], status: int = 0) -> None:
    """Wait for processes; none is left behind."""
    try:
        errors = [p.communicate(timeout=400)[1] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [status] * len(processes), "\n".join(e[-4000:] for e in errors)


def start(command: list[str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment(**more), cwd=HERE.parents[1],
    )  # fmt: skip


def srcflow(arguments: list[str], status: int = 0) -> None:
    """Run the command line; Lightning starts the second rank."""
    finish(start(["-m", "srcflow", *arguments]), status=status)


def with_callbacks(here: Path, name: str, *callbacks: dict[str, Any], ema: dict[str, Any] | None = None) -> list[str]:
    """The overlay of a run again, with more callbacks, or other settings of its EMA."""
    settings = yaml.safe_load((here / "overlay.yaml").read_text())
    present = settings["trainer"]["callbacks"]
    present[0]["init_args"].update(ema or {})
    present += callbacks
    (here / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", str(here / f"{name}.yaml")]


def compare(
    stage: str, model: dict[str, Any], data: Path, here: Path, trainer: dict[str, Any], ema: dict[str, Any] | None = None
) -> dict[str, Any]:
    """As in test_resume.py, with processes that end at once in a later step than the checkpoint's. Gives the last checkpoint."""
    straight, broken = here / "straight", here / "broken"
    command = R.configuration(data, straight, stage, model, trainer)
    records = {"class_path": "dying.Records", "init_args": {"folder": str(straight)}}
    srcflow([*command, *with_callbacks(straight, "straight", records, ema=ema)])
    command = R.configuration(data, broken, stage, model, trainer)
    dies = {"class_path": "dying.Dies", "init_args": {"at": HALF + 2}}
    srcflow([*command, *with_callbacks(broken, "dying", dies, ema=ema)], status=9)
    checkpoint = R.kept(broken, HALF)
    assert list(R.differences(R.load(R.kept(straight, HALF)), R.load(checkpoint))) == []
    assert not list(broken.glob(f"kept/*step={2 * HALF}.ckpt"))
    srcflow([*command, *with_callbacks(broken, "resumed", ema=ema), "--ckpt_path", str(checkpoint)])
    end, other = R.load(R.kept(straight, 2 * HALF)), R.load(R.kept(broken, 2 * HALF))
    assert {"state_dict", "raw_state", "averages", "optimizer_states", "lr_schedulers", "loops", "callbacks"} <= end.keys()
    assert list(R.differences(end, other)) == []
    return dict(end)


@pytest.fixture(scope="module")
def ddp(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flow under DDP, two batches to a step, straight and killed: step 8 is in the middle of an epoch (16 of its 5 batches a rank)."""
    here = tmp_path_factory.mktemp("ddp")
    end = compare("flow", {**R.FLOW, "codec": str(data / "codec")}, data, here, {**DDP, **ACCUMULATED})
    assert end["global_step"] == 2 * HALF
    return here


def test_a_flow_under_ddp_goes_on_bit_for_bit(ddp: Path) -> None:
    assert R.kept(ddp / "broken", 2 * HALF).exists()


def seen(here: Path) -> dict[int, set[int]]:
    """The samples of every global batch."""
    batches: dict[int, set[int]] = defaultdict(set)
    for file in here.glob("rank-*.txt"):
        for line in file.read_text().splitlines():
            number, *indices = map(int, line.split())
            assert not batches[number] & set(indices)
            batches[number] |= set(indices)
    return dict(batches)


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
def test_a_checkpoint_of_two_ranks_goes_on_on_one(ddp: Path, data: Path, tmp_path: Path) -> None:
    """With twice the batch: equal samples in every global batch, steps, rates and counts; sums are taken in another order."""
    model = {**R.FLOW, "codec": str(data / "codec")}
    command = R.configuration(data, tmp_path, "flow", model, ACCUMULATED, batch_size=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        records = with_callbacks(tmp_path, "records", {"class_path": "dying.Records", "init_args": {"folder": str(tmp_path)}})
        main([*command, *records, "--ckpt_path", str(R.kept(ddp / "straight", HALF))])
    wanted, found = seen(ddp / "straight"), seen(tmp_path)
    assert min(found) > 0
    assert found == {number: wanted[number] for number in found}
    assert max(found) == max(wanted)
    two, one = (R.load(R.kept(p, 2 * HALF)) for p in (ddp / "straight", tmp_path))
    for key in ("global_step", "epoch", "lr_schedulers"):
        assert two[key] == one[key]
    counts = [c["callbacks"]["EMA"]["updates"] for c in (two, one)]
    assert counts == [2 * HALF, 2 * HALF]
    loaders = [c["loops"]["fit_loop"]["state_dict"]["combined_loader"] for c in (two, one)]
    assert loaders[0] == loaders[1]
    for kind in ("state_dict", "raw_state"):
        for name, value in two[kind].items():
            torch.testing.assert_close(one[kind][name], value, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_a_flow_under_fsdp2_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    """With a learned prior, two averages, and snapshots of both."""
    model = {**PRIOR, "codec": str(data / "codec")}
    ema = {"decay": [0.9, 0.5], "snapshot_every": HALF // 2}
    end = compare("flow", model, data, tmp_path, {**FSDP2, **ACCUMULATED}, ema)
    assert not torch.equal(end["state_dict"]["flow.prior_std"], torch.ones(16, 192))
    names = sorted(p.name for p in (tmp_path / "straight/snapshots").iterdir())
    assert names == [f"step-{n:08d}-ema-{d}.safetensors" for n in (4, 8, 12, 16) for d in (0.5, 0.9)]
    for name in names:
        a, b = (load_file(tmp_path / run / "snapshots" / name) for run in ("straight", "broken"))
        assert a.keys() == b.keys()
        assert all(torch.equal(v, b[k]) for k, v in a.items())
    last = load_file(tmp_path / "straight/snapshots" / names[-1])
    assert all(torch.equal(v, last[k]) for k, v in end["state_dict"].items())
    config = yaml.safe_load((HERE.parents[1] / "configs/smoke/flow.yaml").read_text())["model"]
    config["init_args"].update({"artifact": None, **model})
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": config}))
    command = ["export", "--config", str(tmp_path / "model.yaml")]
    checkpoint, snapshot = R.kept(tmp_path / "straight", 2 * HALF), tmp_path / "straight/snapshots" / names[-2]
    main([*command, "--ckpt_path", str(checkpoint), "--ema", "0.5", "--out", str(tmp_path / "one")])
    main([*command, "--ckpt_path", str(snapshot), "--out", str(tmp_path / "two")])
    main([*command, "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "first")])
    one, two, first = (load_file(tmp_path / place / "model.safetensors") for place in ("one", "two", "first"))
    assert all(torch.equal(v, two[k]) for k, v in one.items())
    assert not all(torch.equal(v, first[k]) for k, v in one.items())


@pytest.mark.slow
def test_a_learned_prior_under_ddp_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    end = compare("flow", {**PRIOR, "codec": str(data / "codec")}, data, tmp_path, {**DDP, **ACCUMULATED})
    assert not torch.equal(end["state_dict"]["flow.prior_std"], torch.ones(16, 192))


@pytest.mark.slow
def test_an_autoencoder_and_its_discriminator_under_ddp_go_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    end = compare("autoencoder", {}, data, tmp_path, {**DDP, "limit_val_batches": 1})
    assert end["discriminator"]["optimizer"]["state"][0]["step"] == 2 * HALF - 4  # train_from


@pytest.mark.slow
def test_a_compressor_under_ddp_goes_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    model = {
        "autoencoder": str(data / "codec"),
        "compressor": {"class_path": "srcflow.compressors.linear.Linear", "init_args": {"dim": 192, "code_dim": 4}},
    }
    compare("compressor", model, data, tmp_path, {**DDP, **ACCUMULATED})


# --- two nodes -----------------------------------------------------------------------------------------------------------------------


def port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def nodes(here: Path, data: Path) -> list[str]:
    """The run of `ddp`, for two nodes of one process."""
    trainer = {**DDP, "devices": 1, "num_nodes": 2, **ACCUMULATED}
    return list(R.configuration(data, here, "flow", {**R.FLOW, "codec": str(data / "codec")}, trainer))


def test_two_nodes_under_torchrun_give_the_numbers_of_one(ddp: Path, data: Path, tmp_path: Path) -> None:
    command, place = nodes(tmp_path, data), port()
    launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={place}"]
    finish(*(start([*launch, f"--node_rank={rank}", "-m", "srcflow", *command]) for rank in (0, 1)))
    end = R.load(R.kept(tmp_path, 2 * HALF))
    assert list(R.differences(R.load(R.kept(ddp / "straight", 2 * HALF)), end)) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["environment", "slurm"])
def test_two_nodes_by_environment_variables_give_the_numbers_of_one(kind: str, ddp: Path, data: Path, tmp_path: Path) -> None:
    """Lightning's own variables, and SLURM's."""
    command, shared = nodes(tmp_path, data), {"MASTER_PORT": port()}

    def variables(rank: int) -> dict[str, str]:
        if kind == "environment":
            return {"MASTER_ADDR": "127.0.0.1", "NODE_RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", **shared}
        ranks = {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURM_LOCALID": "0"}
        job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1"}
        return {**ranks, **job, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", **shared}

    finish(*(start(["-m", "srcflow", *command], **variables(rank)) for rank in (0, 1)))
    end = R.load(R.kept(tmp_path, 2 * HALF))
    assert list(R.differences(R.load(R.kept(ddp / "straight", 2 * HALF)), end)) == []
