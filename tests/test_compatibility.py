"""What revision 4b9018b wrote is still read: its bundle, its stages' artifacts, its checkpoint and its YAML.

The files in tests/reference/revision_4b9018b were made there by `tools/synthetic.py`, the three smoke fits and `Pipeline.save_pretrained`;
`expected.safetensors` holds what the bundle computed.
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srcflow.cli import main
from srcflow.flows.block import TransformerBlock
from srcflow.guidance.gaussian import Gaussian
from srcflow.noise import Constant
from srcflow.pipeline import Pipeline
from srcflow.types import Condition

ROOT = Path(__file__).parents[1]
OLD = Path(__file__).parent / "reference" / "revision_4b9018b"


def test_an_old_bundle_computes_what_it_computed() -> None:
    pipeline, expected = Pipeline.from_pretrained(OLD / "bundle"), load_file(OLD / "expected.safetensors")
    images, condition, noise = expected["images"], Condition(labels=torch.tensor([0, 3, -1])), Constant(0.4)
    computed = {
        "codes": pipeline.encode(images, noise=noise, seed=1),
        "log_prob": pipeline.log_prob(images, condition, noise=noise, draws=2, seed=1),
        "reconstruction": pipeline.reconstruct(images),
        "samples": pipeline.sample(condition, seed=0, guidance=Gaussian(1.0)),
    }
    for name, value in computed.items():
        torch.testing.assert_close(value, expected[name], atol=1e-3, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_old_stages_are_found_by_their_hashes() -> None:
    assert Pipeline.from_pretrained(OLD / "flow/model").flow is not None
    raw = Pipeline.from_pretrained(OLD / "flow/model", weights="raw")
    assert raw.flow is not None
    assert isinstance(raw.flow.blocks[-1], TransformerBlock)


@pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode:UserWarning")
@pytest.mark.filterwarnings("ignore:.*exif.*this run began before there was a choice:UserWarning")
def test_an_old_checkpoint_resumes_under_its_old_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.chdir(tmp_path)
    importlib.import_module("synthetic").main([])
    for stage in ("autoencoder", "compressor"):
        shutil.copytree(OLD / stage / "model", f"runs/smoke/{stage}/model")
    Path("runs/smoke/flow/checkpoints").mkdir(parents=True)
    shutil.copy(OLD / "flow/step-16.ckpt", "runs/smoke/flow/checkpoints")
    shutil.copy(OLD / "flow/run.json", "runs/smoke/flow")
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false", "--trainer.accelerator", "cpu"]
    main(["--debug", "fit", "--config", str(OLD / "flow/smoke.yaml"), "--ckpt_path", "last", *quiet])
    for name in ("model", "raw"):
        ours, theirs = load_file(f"runs/smoke/flow/model/{name}.safetensors"), load_file(OLD / f"flow/model/{name}.safetensors")
        assert set(ours) == set(theirs)
        for key, value in theirs.items():  # eight steps of learning rate 2e-3 apart, up to rounding
            torch.testing.assert_close(ours[key], value, atol=1e-4, rtol=1e-3, msg=lambda m, k=f"{name} {key}": f"{k}: {m}")
