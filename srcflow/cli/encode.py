"""`srcflow encode`: run an encoder over a data set once and store its features, for the stages that train on them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

from srcflow.errors import ConfigError, Problems

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from srcflow.cli.parser import Parser

FAMILIES = ("encoders", "autoencoders")
HELP = "Encode a data set once: images -> memory-mapped feature store."


def configure(parser: Parser) -> None:
    """Add the command's arguments."""
    from srcflow.encoders.base import Encoder

    DataModule = _type_of_data()
    parser.bases = {"encoder": Encoder, "data": DataModule}
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments.")
    parser.add_argument("--encoder", type=Encoder, required=True, help="The network, e.g. EfficientNetLite --encoder.stage 3.")
    parser.add_argument("--data", type=DataModule, required=True, help="ImageFolder or ImageShards; read without crops at random or flips.")
    parser.add_argument("--split", type=Literal["train", "val", "test"], default="train", help="Which split of the data.")
    parser.add_argument("--out", type=str, required=True, help="The store's folder; must not exist.")
    parser.add_argument("--dtype", type=Literal["float16", "bfloat16", "float32"], default="float16", help="Of the stored features.")
    parser.add_argument("--flip", action="store_true", help="Store each image a second time, mirrored.")
    parser.add_argument("--limit", type=int | None, default=None, help="The first images only.")
    parser.add_argument("--batch_size", type=int | None, default=None, help="Images per call; default: data.batch_size.")
    parser.add_argument("--device", type=str | None, default=None, help="Default: cuda if there is one, else cpu.")
    parser.add_argument("--precision", type=Literal["float32", "bfloat16"], default="float32", help="bfloat16: autocast.")


def _type_of_data() -> Any:
    """DataModule, with its classes loaded; anything where only help is asked for, as datamodules need Lightning, which takes seconds."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        return Any
    from srcflow.cli import load_parts
    from srcflow.datamodules.base import DataModule

    load_parts((), packages=("datamodules",))
    return DataModule


def run(config: Namespace) -> int:
    """Encode and write.

    Raises:
        ConfigError: arguments that cannot be used (all problems at once).
        SrcflowError: what the encoder's `setup`, the data or the writer raise.
    """
    import numpy
    import torch

    import srcflow
    from srcflow import artifacts
    from srcflow.cli.devices import device_of
    from srcflow.data.encode import encode_images
    from srcflow.data.feature_store import FeatureStoreWriter, check_target
    from srcflow.data.manifest import weights_hash
    from srcflow.registry import spec_of

    data, encoder = config.data, config.encoder
    problems = Problems()
    for name in ("limit", "batch_size"):
        if config[name] is not None and config[name] < 1:
            problems.add(ConfigError(name, config[name], "must be at least 1."))
    with problems.collect():
        device = device_of(config.device)
    with problems.collect():
        artifacts.check_writable(config.out, "out", directory=True)
    with problems.collect():
        source = data.dataset(config.split)
        if not hasattr(source, "transform"):
            raise ConfigError("data", type(data).__name__, "holds features already.", "Known: ImageFolder, ImageShards.")
    with problems.collect():
        check_target(config.out, "out")
    problems.raise_if_any()

    encoder.setup()
    encoder.to(device)
    size = (source.transform.size, source.transform.size)
    with torch.no_grad():
        probe, grid = encoder(torch.zeros(1, 3, *size, device=device))
    manifest: dict[str, Any] = {
        "grid": grid,
        "encoder": {"spec": spec_of(encoder), "weights": weights_hash(encoder)},
        "transform": source.transform.describe(),
        "source": {"class": type(data).__name__, "split": config.split, "content": source.fingerprint(), "num_classes": data.num_classes},
        "precision": config.precision,
        "versions": {"srcflow": srcflow.__version__, "torch": str(torch.__version__), "numpy": numpy.__version__},
    }
    n = len(source) if config.limit is None else min(config.limit, len(source))
    with FeatureStoreWriter(
        config.out, n=n, tokens=probe.shape[1], dim=probe.shape[2], image_size=size, dtype=config.dtype, manifest=manifest, flip=config.flip
    ) as writer:
        encode_images(
            encoder,
            data.loader(config.split, limit=n, batch_size=config.batch_size),
            writer,
            source.key,
            device=device,
            autocast=torch.bfloat16 if config.precision == "bfloat16" else None,
        )
    mirrored = f" + {n} mirrored" if config.flip else ""
    print(f"Wrote {n}{mirrored} images, {probe.shape[1]} x {probe.shape[2]} {config.dtype}, to {config.out}.")
    return 0
