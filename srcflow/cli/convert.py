"""`srcflow convert`: published weights to the directory of a stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from srcflow.errors import ConfigError, Problems

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from srcflow.cli.parser import Parser

HELP = "Convert published weights (RAE, diffusers, transformers, TARFlow, STARFlow) to a directory."


def configure(parser: Parser) -> None:
    """Add the command's arguments."""
    from srcflow.formats import KINDS

    parser.add_argument("kind", choices=list(KINDS), help="What the weights are of.")
    parser.add_argument("path", type=str, help="The file: safetensors, or torch's format (no code in it is run); for some kinds a folder.")
    parser.add_argument("--out", type=str, required=True, help="Directory to write.")
    parser.add_argument(
        "--config", type=str | None, default=None, help="JSON or YAML file with the published model's configuration, under its own names."
    )
    parser.add_argument(
        "--set", type=str, nargs="+", default=[], metavar="KEY=VALUE", help="Further values, e.g. head_dim=64 decoder.heads=16."
    )
    parser.add_argument(
        "--encoder", type=str | None, default=None, help="rae: the encoder's weights, where the file holds the decoder only."
    )
    parser.add_argument("--statistics", type=str | None, default=None, help="rae: file with the latent statistics (stat.pt).")
    parser.add_argument(
        "--autoencoder", type=str | None, default=None, help="tarflow, starflow: directory of what turns images into the flow's tokens."
    )


def run(config: Namespace) -> int:
    """Convert and write the directory."""
    from srcflow import artifacts
    from srcflow.convert.files import convert_file, defaults, read_config

    artifacts.check_writable(config.out, "out", directory=True)
    artifacts.check_target(config.out)
    settings: dict[str, Any] = {} if config.config is None else read_config(config.config)
    for key, value in values_of(config.set).items():
        both = isinstance(value, dict) and isinstance(settings.get(key), dict)
        settings[key] = {**settings[key], **value} if both else value
    target = convert_file(
        config.kind,
        config.path,
        config.out,
        settings,
        encoder=config.encoder,
        statistics=config.statistics,
        autoencoder=config.autoencoder,
    )
    print(f"Wrote {target}.")
    if unseen := defaults(config.kind, settings):
        values = ", ".join(f"{k}={'64 or what q/k norms show' if v is None else v}" for k, v in unseen.items())
        print(f"note: the weights do not show these, so they have the published defaults: {values}. Give what the model was built with.")
    return 0


def values_of(pairs: list[str]) -> dict[str, Any]:
    """Values of `key=value` pairs, read as JSON or YAML; a key with dots reaches into a mapping.

    Raises:
        ConfigError: a pair has no `=`, or a value is neither.
    """
    from srcflow.convert.files import parsed

    problems, values = Problems(), dict[str, Any]()
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            problems.add(ConfigError("set", pair, "is no key=value.", "Write e.g. --set head_dim=64 sos=true."))
            continue
        try:
            place: Any
            place, (*outer, last) = values, key.split(".")
            for name in outer:  # decoder.heads=4
                place = place.setdefault(name, {})
                if not isinstance(place, dict):
                    raise ConfigError(f"set {key}", value, f"{name} is a value already.")
            place[last] = parsed(value, f"set {key}")
        except ConfigError as e:
            problems.add(e)
    problems.raise_if_any()
    return values
