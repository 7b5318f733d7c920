"""`srcflow convert` and `srcflow export --format`, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from srcflow import Pipeline, artifacts, convert, presets
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.autoencoders.vit_decoder import ViTDecoder
from srcflow.cli import main
from srcflow.cli.convert import values_of
from srcflow.convert.files import read_statistics, starflow_arguments
from srcflow.encoders.base import Encoder
from srcflow.encoders.dinov2 import DINOv2
from srcflow.errors import ArtifactError
from srcflow.flows.flow import Flow
from srcflow.testing import perturb
from srcflow.types import Condition

REFERENCE = Path(__file__).parents[1] / "reference"


def published(name: str) -> dict[str, Tensor]:
    """The published state dict of a vector."""
    return {k.removeprefix("sd."): v for k, v in load_file(REFERENCE / f"{name}.safetensors").items() if k.startswith("sd.")}


@pytest.fixture
def tarflow(tmp_path: Path) -> Path:
    """A TARFlow on colour images as a training checkpoint of the published code."""
    torch.manual_seed(0)
    state, _ = convert.to_tarflow(perturb(presets.tarflow(4, 12, 64, 2, 1, num_classes=3)))
    torch.save({"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "tarflow.pth")
    return tmp_path / "tarflow.pth"


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_a_converted_tarflow_samples_at_once_and_goes_back_bit_for_bit(
    tarflow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "flow"
    main(["convert", "tarflow", str(tarflow), "--out", str(out)])
    printed = capsys.readouterr().out
    assert f"Wrote {out}" in printed
    assert "head_dim=64" in printed  # what the weights do not show is told
    source = artifacts.read_manifest(out)["converted_from"]
    assert (source["kind"], source["file"]) == ("tarflow", "tarflow.pth")
    moved = out.rename(tmp_path / "moved")  # the codec is inside
    pipeline = Pipeline.from_pretrained(moved)
    assert isinstance(pipeline.autoencoder, PixelPatches)
    assert pipeline.autoencoder.image_size == (8, 8)
    images = pipeline.sample(Condition(labels=torch.tensor([0, 2])), seed=0)
    assert images.shape == (2, 3, 8, 8)
    main(["sample", "--pipeline", str(moved), "--n", "2", "--out", str(tmp_path / "s.png"), "--device", "cpu"])
    main(["export", "--pipeline", str(moved), "--format", "tarflow", "--out", str(tmp_path / "back")])
    again = torch.load(tmp_path / "back" / "tarflow.pth", weights_only=True)
    before = torch.load(tarflow, weights_only=True)["model"]
    assert {f"module.{k}" for k in again} == before.keys()
    assert all(torch.equal(v, before[f"module.{k}"]) for k, v in again.items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["img_size"], config["patch_size"], config["in_channels"], config["num_classes"]) == (8, 2, 3, 3)


def test_starflow_by_its_sidecar_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = published("starflow_text_top")
    save_file(state, tmp_path / "starflow.safetensors")
    config = REFERENCE / "starflow_text_top.json"
    out = tmp_path / "flow"
    arguments = ["convert", "starflow", str(tmp_path / "starflow.safetensors"), "--config", str(config), "--out", str(out)]
    main([*arguments, "--set", "use_checkpoint=1"])
    assert "note" not in capsys.readouterr().out  # everything that the weights do not show was given
    assert isinstance(artifacts.load(out, Flow), Flow)
    main(["export", "--pipeline", str(out), "--format", "starflow", "--out", str(tmp_path / "back")])
    again = torch.load(tmp_path / "back" / "starflow.pth", weights_only=True)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[k], v) for k, v in state.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["in_channels"] == 8  # remembered from the conversion
    assert json.loads((tmp_path / "back" / "config.json").read_text())["txt_size"] == 5


def test_starflow_by_the_configuration_of_its_release(tmp_path: Path) -> None:
    torch.manual_seed(0)
    flow = perturb(presets.starflow(4, 4, 64, [1, 2], head_dim=64, text_dim=5))
    state, _ = convert.to_starflow(flow)
    torch.save(state, tmp_path / "starflow.pth")
    lines = (
        "no_flip: 1,img_size: 32,txt_size: 128,channel_size: 4,patch_size: 1,channels: 64,blocks: 2,layers_per_block: 1 2,nvp: 1,adaln: 0"
    )
    lines += (
        ",rope: 1,sos: 1,seq_order: L2R,use_softplus: 1,cond_top_only: 1,use_final_norm: 1,soft_clip: 4,vae: x/sd-vae,cfg: 2.5,lr: 6.4e-05"
    )
    (tmp_path / "c.yaml").write_text("arguments:\n" + "".join(f"- {line}\n" for line in lines.split(",")))
    main(["convert", "starflow", str(tmp_path / "starflow.pth"), "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "flow")])
    again, x = artifacts.load(tmp_path / "flow", Flow), torch.randn(2, 16, 4)
    text = Condition(text=torch.randn(2, 3, 5))
    assert torch.equal(again(x, text).z, flow.eval()(x, text).z)


@pytest.mark.parametrize(
    ("change", "message"),
    [("vid_size: '81:16'", "video"), ("nvp: 0", "nvp"), ("chanels: 3", "Did you mean channels")],
)
def test_a_release_configuration_of_another_model_is_refused(
    tmp_path: Path, change: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(f"arguments:\n- img_size: 32\n- {change}\n")
    torch.save({"blocks.0.proj_in.weight": torch.ones(1, 1)}, tmp_path / "w.pth")
    error = fails(
        ["convert", "starflow", str(tmp_path / "w.pth"), "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "o")], capsys
    )
    assert message in error


def test_what_cannot_be_converted_is_refused_and_nothing_is_written(
    tarflow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "o")]

    def error(*arguments: str) -> str:
        return fails(["convert", *arguments, *out], capsys)

    assert "no such file" in error("tarflow", str(tmp_path / "nothing.pth"))
    assert "no such file" in error("tarflow", str(tarflow), "--config", str(tmp_path / "nothing.json"))
    assert "key=value" in error("tarflow", str(tarflow), "--set", "head_dim")
    assert "Did you mean head_dim" in error("tarflow", str(tarflow), "--set", "head_dims=64")
    assert "does not go with tarflow" in error("tarflow", str(tarflow), "--statistics", str(tarflow))
    assert "channels = 32" in error("tarflow", str(tarflow), "--set", "channels=32")
    (tmp_path / "bad.pth").write_bytes(b"not a checkpoint")
    assert "bad.pth cannot be read" in error("tarflow", str(tmp_path / "bad.pth"))
    torch.save({"args": {"lr": 1}}, tmp_path / "args.pth")
    assert "holds no state dict" in error("tarflow", str(tmp_path / "args.pth"))
    (tmp_path / "list.json").write_text("[1]")
    assert "maps names to values" in error("tarflow", str(tarflow), "--config", str(tmp_path / "list.json"))
    assert not (tmp_path / "o").exists()
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine.txt").write_text("keep")
    assert "is not an artifact" in error("tarflow", str(tarflow))
    assert (tmp_path / "o" / "mine.txt").read_text() == "keep"


class Evil:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_no_code_in_a_file_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    error = fails(["convert", "tarflow", str(tmp_path / "evil.pth"), "--out", str(tmp_path / "o")], capsys)
    assert "would run code" in error
    assert not (tmp_path / "ran").exists()


def test_an_autoencoder_may_be_named(tarflow: Path, tmp_path: Path) -> None:
    artifacts.save(tmp_path / "pixels", PixelPatches(8, 2))
    main(["convert", "tarflow", str(tarflow), "--out", str(tmp_path / "flow"), "--autoencoder", str(tmp_path / "pixels")])
    assert Pipeline.from_pretrained(tmp_path / "flow").autoencoder.pixel_density


def test_export_refuses_what_the_format_cannot_express(tarflow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["convert", "tarflow", str(tarflow), "--out", str(tmp_path / "flow")])
    capsys.readouterr()

    def error(*arguments: str) -> str:
        return fails(["export", "--out", str(tmp_path / "x"), *arguments], capsys)

    flow = ["--pipeline", str(tmp_path / "flow")]
    assert "blocks[0].positions" in error(*flow, "--format", "starflow")
    assert "can only express a RepresentationAutoencoder" in error(*flow, "--format", "rae")
    assert "no square patches" in error(*flow, "--format", "tarflow", "--in_channels", "5")
    assert "does nothing for rae" in error(*flow, "--format", "rae", "--in_channels", "3")
    assert "needs --pipeline" in error("--format", "tarflow")
    assert "does nothing without --format" in error(*flow, "--in_channels", "3")
    assert "holds no flow" in error("--pipeline", str(tmp_path / "flow" / "autoencoder"), "--format", "tarflow")
    assert not (tmp_path / "x").exists()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("keep")
    assert "is not empty" in error(*flow, "--format", "tarflow")


def test_a_truncated_file_is_told(tarflow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tarflow.read_bytes()
    for name, part in (("start.pth", whole[: len(whole) // 2]), ("end.pth", whole[len(whole) // 2 :])):
        (tmp_path / name).write_bytes(part)
        assert f"{name} cannot be read" in fails(["convert", "tarflow", str(tmp_path / name), "--out", str(tmp_path / "o")], capsys)
    save_file({"blocks.0.proj_in.weight": torch.ones(8, 8)}, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-16])
    assert "cut.safetensors cannot be read" in fails(["convert", "tarflow", str(tmp_path / "cut.safetensors"), "--out", "o"], capsys)


def test_values_reach_into_mappings(tmp_path: Path) -> None:
    assert values_of(["decoder.heads=4", "decoder.dim=8", "stat_eps=1e-5", "sos=true"]) == {
        "decoder": {"heads": 4, "dim": 8},
        "stat_eps": 1e-5,
        "sos": True,
    }


def test_what_a_release_configuration_leaves_out_is_what_its_script_takes() -> None:
    assert starflow_arguments({"img_size": 32})["patch_size"] == 4
    config = starflow_arguments({"img_size": 256, "vae": "x", "layers_per_block": "2 2 24", "blocks": 6, "noise_type": "gaussian"})
    assert (config["num_blocks"], config["layers_per_block"], config["img_size"]) == (3, [2, 2, 24], 32)


def test_statistics_may_lack_a_mean(tmp_path: Path) -> None:
    torch.save({"mean": None, "var": torch.ones(3)}, tmp_path / "stat.pt")
    assert read_statistics(tmp_path / "stat.pt").keys() == {"var"}
    torch.save({"mean": torch.ones(3)}, tmp_path / "stat.pt")
    with pytest.raises(ArtifactError, match="mean and var"):
        read_statistics(tmp_path / "stat.pt")


def test_rae_from_its_released_pieces_and_back_in_every_format(tmp_path: Path) -> None:
    """The decoder's file, a folder of the hub with the encoder, and stat.pt; then RAE's files, which convert to the same again."""
    tensors = load_file(REFERENCE / "rae_dinov2.safetensors")
    state = published("rae_dinov2")
    torch.save({k.removeprefix("decoder."): v for k, v in state.items() if k.startswith("decoder.")}, tmp_path / "decoder.pt")
    start = "encoder.encoder."
    (tmp_path / "dinov2").mkdir()
    save_file({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}, tmp_path / "dinov2" / "model.safetensors")
    torch.save({"mean": tensors["in.stat_mean"], "var": tensors["in.stat_var"]}, tmp_path / "stat.pt")
    heads = ["--set", "encoder_heads=4", "decoder.heads=4"]
    whole = [
        "convert",
        "rae",
        str(tmp_path / "decoder.pt"),
        "--encoder",
        str(tmp_path / "dinov2"),
        "--statistics",
        str(tmp_path / "stat.pt"),
    ]
    main([*whole, *heads, "--out", str(tmp_path / "rae")])
    autoencoder = Pipeline.from_pretrained(tmp_path / "rae").autoencoder
    raw, grid = autoencoder.features(tensors["in.image_u8"].float() / 255)
    latent = autoencoder.normalize(raw)
    torch.testing.assert_close(latent.mT.reshape(1, 48, 16, 16), tensors["out.latent"], atol=5e-5, rtol=0)  # as in test_rae.py
    torch.testing.assert_close(autoencoder.decode(latent, grid), tensors["out.image"], atol=1e-5, rtol=0)

    main(["export", "--pipeline", str(tmp_path / "rae"), "--format", "rae", "--out", str(tmp_path / "back")])
    back = torch.load(tmp_path / "back" / "decoder.pt", weights_only=True)
    assert all(torch.equal(v, state[f"decoder.{k}"]) for k, v in back.items())
    stat = torch.load(tmp_path / "back" / "stat.pt", weights_only=True)
    assert torch.equal(stat["var"], tensors["in.stat_var"])
    again = ["convert", "rae", str(tmp_path / "back" / "rae.pt"), "--statistics", str(tmp_path / "back" / "stat.pt")]
    main([*again, *heads, "--out", str(tmp_path / "again")])
    files = [(tmp_path / name / artifacts.MODEL).read_bytes() for name in ("rae", "again")]
    assert files[0] == files[1]

    main(["convert", "rae_decoder", str(tmp_path / "back" / "decoder.pt"), "--set", "heads=4", "--out", str(tmp_path / "d")])
    decoder = artifacts.load(tmp_path / "d", ViTDecoder)
    assert all(torch.equal(v, autoencoder.decoder.state_dict()[k]) for k, v in decoder.state_dict().items())
    main(["convert", "encoder", str(tmp_path / "dinov2"), "--set", "encoder_heads=4", "--out", str(tmp_path / "e")])
    encoder = artifacts.load(tmp_path / "e", Encoder)
    assert torch.equal(encoder(tensors["in.image_u8"].float() / 255)[0], raw)


def test_rae_through_a_folder_of_diffusers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = DINOv2(image_size=224, weights=None, timm_args={"embed_dim": 64, "depth": 1, "num_heads": 1})
    state = {f"encoder.{k}": v for k, v in convert.to_transformers(convert.encoder(convert.to_transformers(encoder))).items()}
    decoder = perturb(ViTDecoder(64, dim=32, depth=1, heads=2, mlp_dim=64, patch=4, grid=16))
    # a table of the published size, of which diffusers' folders keep the whole
    state["encoder.embeddings.position_embeddings"] = torch.randn(1, 1 + 37 * 37, 64)
    state |= {f"decoder.{k}": v for k, v in convert.to_rae_decoder(decoder).items()}
    torch.save(state, tmp_path / "rae.pt")
    main(["convert", "rae", str(tmp_path / "rae.pt"), "--set", "decoder.heads=2", "--out", str(tmp_path / "rae")])
    main(["export", "--pipeline", str(tmp_path / "rae"), "--format", "diffusers", "--out", str(tmp_path / "folder")])
    main(["convert", "rae_diffusers", str(tmp_path / "folder"), "--out", str(tmp_path / "again")])
    x = torch.rand(1, 3, 256, 256)
    outputs = []
    for name in ("rae", "again"):
        autoencoder = Pipeline.from_pretrained(tmp_path / name).autoencoder
        raw, grid = autoencoder.features(x)
        outputs.append((raw, autoencoder.decode(autoencoder.normalize(raw), grid)))
    assert torch.equal(outputs[0][0], outputs[1][0])
    torch.testing.assert_close(outputs[1][1], outputs[0][1], atol=1e-4, rtol=0)


def test_an_image_flow_of_other_channels_gets_no_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    state, _ = convert.to_tarflow(perturb(presets.tarflow(4, 12, 64, 1, 1)), in_channels=12)
    torch.save(state, tmp_path / "w.pth")
    main(["convert", "tarflow", str(tmp_path / "w.pth"), "--set", "in_channels=12", "--out", str(tmp_path / "flow")])
    assert not (tmp_path / "flow" / "autoencoder").exists()
    assert "in_channels = 0" in fails(
        ["export", "--pipeline", str(tmp_path / "flow"), "--format", "tarflow", "--in_channels", "0", "--out", str(tmp_path / "x")], capsys
    )
