"""`srcflow encode`: run an encoder or autoencoder over a data set once and store the features, for the stages that train on them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

from srcflow.errors import ConfigError, Problems

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from srcflow.autoencoders.base import Autoencoder
    from srcflow.cli.parser import Parser

FAMILIES = ("encoders", "autoencoders")
HELP = "Encode a data set once: images -> memory-mapped feature store."


def configure(parser: Parser) -> None:
    """Add the command's arguments."""
    from srcflow.autoencoders.base import Autoencoder
    from srcflow.encoders.base import Encoder

    DataModule = _type_of_data()
    parser.bases = {"encoder": Encoder, "autoencoder": Autoencoder, "data": DataModule}
    parser.add_argument("--config", action="config", help="YAML file with any of these arguments.")
    parser.add_argument("--encoder", type=Encoder | None, default=None, help="A frozen encoder, e.g. EfficientNetLite --encoder.stage 3.")
    parser.add_argument("--autoencoder", type=Autoencoder | None, default=None, help="In its place: an autoencoder, as its files give it.")
    parser.add_argument("--artifact", type=str | None, default=None, help="In its place: the directory of an autoencoder (stage 0).")
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
        SrcflowError: what the part's `setup`, the data or the writer raise.
    """
    import numpy
    import torch

    import srcflow
    from srcflow import artifacts
    from srcflow.cli.devices import device_of
    from srcflow.data.encode import encode_images
    from srcflow.data.feature_store import FeatureStoreWriter, check_target
    from srcflow.data.manifest import made_by, weights_hash
    from srcflow.registry import spec_of

    data = config.data
    problems = Problems()
    given = [name for name in ("encoder", "autoencoder", "artifact") if config[name] is not None]
    if len(given) != 1:
        key = given[1] if given else "encoder"
        problem = f"does not go with --{given[0]}." if given else "nothing is there that makes features."
        shown = config[key] if key == "artifact" or not given else type(config[key]).__name__
        problems.add(ConfigError(key, shown, problem, "Give one of --encoder, --autoencoder and --artifact."))
    if config.artifact is not None:
        with problems.collect():
            artifacts.read_spec(config.artifact)
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

    part = _autoencoder(config.artifact) if config.artifact is not None else config.encoder or config.autoencoder
    if config.artifact is None:
        part.setup()
    part.to(device).eval()
    size = (source.transform.size, source.transform.size)
    encode = part if config.encoder is not None else part.posterior
    with torch.no_grad():
        probe, *deviation, grid = encode(torch.zeros(1, 3, *size, device=device))
    identity = {"encoder": {"spec": spec_of(part), "weights": weights_hash(part)}} if config.encoder is not None else made_by(part)
    deviates = bool(deviation) and deviation[0] is not None
    manifest: dict[str, Any] = {
        "grid": grid,
        **identity,
        "transform": source.transform.describe(),
        "source": {"class": type(data).__name__, "split": config.split, "content": source.fingerprint(), "num_classes": data.num_classes},
        "precision": config.precision,
        "versions": {"srcflow": srcflow.__version__, "torch": str(torch.__version__), "numpy": numpy.__version__},
    }
    n = len(source) if config.limit is None else min(config.limit, len(source))
    with FeatureStoreWriter(
        config.out,
        n=n,
        tokens=probe.shape[1],
        dim=probe.shape[2],
        image_size=size,
        dtype=config.dtype,
        manifest=manifest,
        flip=config.flip,
        deviation=deviates,
        rules=data.rules_for(source),
    ) as writer:
        encode_images(
            encode,
            data.loader(config.split, limit=n, batch_size=config.batch_size),
            writer,
            source.key,
            device=device,
            autocast=torch.bfloat16 if config.precision == "bfloat16" else None,
        )
    mirrored = f" + {n} mirrored" if config.flip else ""
    more = ", ".join([*(["deviation"] if deviates else []), *writer.manifest.extras])
    beside = f" with {more}" if more else ""
    print(f"Wrote {n}{mirrored} images, {probe.shape[1]} x {probe.shape[2]} {config.dtype}{beside}, to {config.out}.")
    return 0


def _autoencoder(path: str) -> Autoencoder:
    """The autoencoder in a directory that stage 0 or `srcflow convert` wrote."""
    from srcflow import artifacts
    from srcflow.autoencoders.base import Autoencoder

    return artifacts.load(path, Autoencoder)
