"""The whole job on real images, on a laptop's CPU: `make demo`.

Fashion-MNIST -> features of an ImageNet network (EfficientNet-Lite0) -> decoder (stage 0) -> compressor (stage 1) -> flow (stage 2)
-> evaluation by another network (EfficientNet-Lite1). Every step is a command that a user would type; it is printed first.

    python tools/demo.py                   everything, into runs/demo
    python tools/demo.py --from flow       only from a stage on (the earlier results must be there)
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STAGES = ("data", "encode", "autoencoder", "compressor", "flow", "test", "pictures")
DATA, RUN = Path("data/fashion_mnist"), Path("runs/demo")
IMAGES = {"train": 40_000, "val": 1_000, "test": 2_000}
CONFIGS = {stage: f"configs/{stage}/fashion_mnist.yaml" for stage in ("autoencoder", "compressor", "flow")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--from", dest="first", choices=STAGES, default="data", help="skip the steps before this one")
    parser.add_argument("--precision", choices=("auto", "bf16-mixed", "32-true"), default="auto", help="auto: what multiplies faster here")
    args = parser.parse_args()
    start = time.perf_counter()
    precision = faster_precision() if args.precision == "auto" else args.precision
    todo = STAGES[STAGES.index(args.first) :]
    times: dict[str, float] = {}
    for stage in todo:
        began = time.perf_counter()
        print(f"\n=== {stage} ===", flush=True)
        run_stage(stage, precision)
        times[stage] = time.perf_counter() - began
    summary(times, time.perf_counter() - start, precision)


def faster_precision() -> str:
    """bf16-mixed if a bfloat16 matrix product is at least 1.5 times as fast as a float32 one on this machine."""
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(1024, 512, dtype=dtype)
        b = torch.randn(512, 512, dtype=dtype)
        a @ b
        began = time.perf_counter()
        for _ in range(20):
            a @ b
        seconds[dtype] = (time.perf_counter() - began) / 20
    choice = "bf16-mixed" if seconds[torch.bfloat16] * 1.5 < seconds[torch.float32] else "32-true"
    slow, fast = (seconds[d] * 1e3 for d in (torch.float32, torch.bfloat16))
    print(f"One 1024 x 512 x 512 matrix product: float32 {slow:.2f} ms, bfloat16 {fast:.2f} ms; training in {choice}.")
    return choice


def run_stage(stage: str, precision: str) -> None:
    if stage == "data":
        run(sys.executable, "tools/fashion_mnist.py", "--out", str(DATA))
    elif stage == "encode":
        for split, images in IMAGES.items():
            out = RUN / "features" / split
            if (out / "manifest.json").exists():
                stored = json.loads((out / "manifest.json").read_text())["count"]
                if stored != images:
                    raise SystemExit(f"error: {out} holds {stored} images, the demo wants {images}; delete it, or use --from autoencoder")
                print(f"{out} is there already")
                continue
            srcflow(
                "encode",
                "--config=configs/encode/fashion_mnist.yaml",
                f"--split={split}",
                f"--limit={images}",
                f"--out={out}",
                f"--precision={'bfloat16' if precision == 'bf16-mixed' else 'float32'}",
            )
    elif stage in CONFIGS:
        for part in ("logs", "checkpoints"):  # or TensorBoard would draw two runs as one, and fit refuse to begin anew
            shutil.rmtree(RUN / stage / part, ignore_errors=True)
        srcflow("fit", f"--config={CONFIGS[stage]}", f"--trainer.precision={precision}", "--change_config=true")  # or 32-true after bf16
    elif stage == "test":
        for name, config in CONFIGS.items():
            checkpoint = RUN / name / "checkpoints" / "last.ckpt"
            srcflow("test", f"--config={config}", f"--trainer.precision={precision}", f"--ckpt_path={checkpoint}")
    elif stage == "pictures":
        pictures()


def srcflow(*arguments: str) -> None:
    run(sys.executable, "-m", "srcflow", *arguments, shown=("srcflow", *arguments))


def run(*command: str, shown: tuple[str, ...] | None = None) -> None:
    print("$ " + shlex.join(shown or ("python", *command[1:])), flush=True)
    status = subprocess.run(command).returncode
    if status:
        raise SystemExit(f"error: the command above ended with status {status}")


def pictures() -> None:
    """samples.png: ten garments in rows; reconstructions.png: originals, RAE, RAE + SRC under the flow's noise."""
    import torch

    from srcflow import Condition, Pipeline
    from srcflow.callbacks.sample_grid import grid_of
    from srcflow.data.feature_store import FeatureStoreDataset
    from srcflow.guidance.gaussian import Gaussian
    from srcflow.noise import Constant

    protocol = json.loads((RUN / "flow" / "metrics.json").read_text())["protocol"]
    pipeline = Pipeline.from_pretrained(RUN / "flow" / "artifact")
    guidance = Gaussian(protocol["guidance"]["init_args"]["strength"]) if protocol["guidance"] else None
    labels = torch.arange(10).repeat_interleave(10)
    samples = torch.cat(
        [
            pipeline.sample(Condition(labels=labels[i : i + 50]), seed=0, indices=range(i, i + 50), guidance=guidance)
            for i in range(0, 100, 50)
        ]
    )
    save(grid_of(torch.nn.functional.interpolate(samples, scale_factor=2, mode="nearest"), columns=10), RUN / "samples.png")

    images = FeatureStoreDataset(str(RUN / "features" / "test")).__getitems__(range(16))["images"]
    autoencoder = Pipeline(pipeline.autoencoder)
    noise = Constant(protocol["noise"]["init_args"]["sigma"])
    rows = torch.cat([images.float() / 255, autoencoder.reconstruct(images), pipeline.reconstruct(images, noise=noise)])
    save(grid_of(torch.nn.functional.interpolate(rows, scale_factor=2, mode="nearest"), columns=16), RUN / "reconstructions.png")


def save(sheet: Any, path: Path) -> None:
    from PIL import Image

    Image.fromarray(sheet.permute(1, 2, 0).numpy()).save(path)
    print(f"Wrote {path}.")


def summary(times: dict[str, float], total: float, precision: str) -> None:
    """The table on the screen, and runs/demo/metrics.json with the three stages' numbers and protocols."""
    found = {}
    for stage in CONFIGS:
        path = RUN / stage / "metrics.json"
        if not path.exists():
            raise SystemExit(f"error: {path} is missing; run: python tools/demo.py --from test")
        found[stage] = json.loads(path.read_text())
    rae, src, flow = (found[s]["metrics"] for s in ("autoencoder", "compressor", "flow"))
    rows: list[tuple[str, float, str, bool | None]] = [
        ("L1 of reconstructions, RAE", rae["l1"], "", None),
        ("L1 of reconstructions, RAE + SRC", src["l1"], "at most 1.1 x the RAE's", src["l1"] <= 1.1 * rae["l1"]),
        ("FD floor: 2,000 training / test images", flow["floor_2k"], "", None),
        ("rFID of RAE", rae["rfid_2k"], "", None),
        ("rFID of RAE + SRC", flow["rfid_2k"], "below 3 x the floor", flow["rfid_2k"] < 3 * flow["floor_2k"]),
        ("rFID of RAE + SRC at the flow's noise", flow["rfid_noisy_2k"], "", None),
        ("gFID of 2,000 samples", flow["gfid_2k"], "", None),
        ("FD of samples to decoded noisy test codes", flow["fd_decoded_2k"], "", None),
        ("nll given the class, nats/dim", flow["nll"], "", None),
        ("nll, marginal over classes", flow["nll_marginal"], "below the Gaussian's", flow["nll_marginal"] < flow["nll_gaussian"]),
        ("nll of a full-covariance Gaussian", flow["nll_gaussian"], "", None),
        ("accuracy of argmax_y log p(x|y)", flow["accuracy"], "at least 0.75", flow["accuracy"] >= 0.75),
        ("round trip |f(f^-1(u)) - u|", flow["round_trip_error"], "at most 1e-4", flow["round_trip_error"] <= 1e-4),
        ("samples per second", flow["images_per_second"], "", None),
    ]
    width = max(len(r[0]) for r in rows)
    judge = found["flow"]["protocol"]["extractor"]
    print(f"\nFashion-MNIST, 2,000 held-out test images; Frechet distances (FD) by {judge}; {precision}")
    for name, value, wanted, met in rows:
        verdict = "" if met is None else "met" if met else "NOT MET"
        print(f"  {name:<{width}}  {value:>9.4g}  {wanted:<24}{verdict}".rstrip())
    print("  minutes: " + ", ".join(f"{k} {v / 60:.1f}" for k, v in times.items()) + f"; in all {total / 60:.1f}")
    found["demo"] = {"seconds": {k: round(v, 1) for k, v in times.items()}, "precision": precision}
    (RUN / "metrics.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"Pictures, numbers and logs are in {RUN} (tensorboard --logdir {RUN}).")


if __name__ == "__main__":
    main()
