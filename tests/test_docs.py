"""The README and docs/ are executed and checked: code blocks run, configurations build, commands parse, links and numbers hold."""

from __future__ import annotations

import importlib
import itertools
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from lightning.pytorch import cli as lightning_cli

from srcflow import Pipeline, cli, presets, registry
from srcflow.autoencoders.representation import RepresentationAutoencoder
from srcflow.autoencoders.vit_decoder import ViTDecoder
from srcflow.cli.export import task_of
from srcflow.cli.parser import Parser
from srcflow.compressors.linear import Linear
from srcflow.encoders.efficientnet_lite import EfficientNetLite
from srcflow.testing import perturb

ROOT = Path(__file__).parents[1]
FILES = ["README.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))]
PLUGIN = ROOT / "tests/plugins/goodplugin"
# what the demo leaves behind, with a tiny pipeline in its place
DEMO = "runs/demo/flow/artifact"
# what a fragment of a flow's configuration leaves out
FLOW = {
    "codec": "runs/codec",
    "flow": {"class_path": "srcflow.flows.presets.srcflow", "init_args": {"grid": 4, "channels": 4, "width": 64, "layers": [1]}},
}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str
    text: str
    line: int


def blocks(name: str, *languages: str) -> list[Block]:
    """A page's fenced blocks in these languages, in order."""
    found = []
    pattern = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)
    text = (ROOT / name).read_text(encoding="utf-8")
    for match in pattern.finditer(text):
        found.append(Block(match[1], match[2] or "", match[3], text[: match.start()].count("\n") + 2))
    assert text.count("```") == 2 * len(found), f"{name}: a fence is not closed, or names no language"
    return [b for b in found if b.language in languages]


def pages_with(*languages: str) -> list[str]:
    return [name for name in FILES if blocks(name, *languages)]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of the demo's kind: ten classes, 32 px."""
    torch.manual_seed(0)
    encoder = EfficientNetLite(image_size=32, stage=2, weights=None)
    decoder = ViTDecoder(latent_dim=encoder.dim, dim=32, depth=1, heads=2, mlp_dim=64, patch=8, grid=4)
    autoencoder = RepresentationAutoencoder(encoder, decoder)
    autoencoder.set_statistics(torch.zeros(encoder.dim), torch.ones(encoder.dim))
    flow = presets.srcflow(grid=4, channels=4, width=32, layers=[1, 2], head_dim=16, num_classes=10)
    pipeline = Pipeline(autoencoder, perturb(Linear(encoder.dim, 4, start="random")), perturb(flow))
    return pipeline.save_pretrained(tmp_path_factory.mktemp("demo") / "artifact")


@pytest.fixture
def place(tmp_path: Path, demo: Path) -> Path:
    """A working directory with the demo's result."""
    shutil.copytree(demo, tmp_path / DEMO)
    os.chdir(tmp_path)
    return tmp_path


# --- code blocks ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", pages_with("python"))
def test_python_blocks_run(name: str, place: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "docs"}
    for block in blocks(name, "python"):
        if block.title:  # a file of the example plug-in, compared below
            continue
        code = "\n" * (block.line - 1) + block.text  # so that a traceback has the page's line numbers
        exec(compile(code, str(ROOT / name), "exec"), namespace)


def test_the_plugin_page_shows_the_plugin_that_is_tested() -> None:
    shown = [b for b in blocks("docs/howto/own-encoder.md", "python", "toml") if b.title]
    assert [b.language for b in shown] == ["toml", "python", "python", "python"]
    for block in shown:
        assert block.text.strip() in (PLUGIN / block.title).read_text(encoding="utf-8"), f"line {block.line}: {block.title} has changed"


# --- configurations -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", pages_with("yaml"))
def test_yaml_blocks_parse_and_name_parts_that_exist(name: str, tmp_path: Path) -> None:
    cli.load_parts()
    for block in blocks(name, "yaml"):
        content = yaml.safe_load(block.text)
        assert isinstance(content, dict), f"{name}, line {block.line}"
        if content.get("model", {}).get("class_path") == "FlowTask":  # a fragment is completed
            content["model"]["init_args"] = {**FLOW, **content["model"]["init_args"]}
        file = tmp_path / "block.yaml"
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        if "model" in content:
            with torch.device("meta"):
                task = task_of(str(file))
            assert type(task).__name__ == content["model"]["class_path"]
        if "encoder" in content:
            parser = Parser(prog="srcflow encode")
            importlib.import_module("srcflow.cli.encode").configure(parser)
            with torch.device("meta"):
                parser.instantiate(parser.parse_args(["--config", str(file), "--out", "store"]))
        for path in [c["class_path"] if isinstance(c, dict) else c for c in content.get("trainer", {}).get("callbacks", [])]:
            rooms = ("checkpoints", "ema", "sample_grid", "spike_monitor", "throughput")
            callbacks = [importlib.import_module(f"srcflow.callbacks.{m}") for m in rooms]
            assert any(hasattr(m, path) for m in callbacks), path


def test_the_runs_for_own_images_fit_each_other() -> None:
    content = {Path(b.title).stem: yaml.safe_load(b.text) for b in blocks("docs/howto/own-images.md", "yaml")}
    stages = {k: content[k]["model"]["init_args"] for k in ("autoencoder", "compressor", "flow")}
    assert stages["compressor"]["autoencoder"] == stages["autoencoder"]["artifact"]
    assert stages["flow"]["codec"] == stages["compressor"]["artifact"]
    compressor, flow = stages["compressor"]["compressor"]["init_args"], stages["flow"]["flow"]["init_args"]
    decoder = stages["autoencoder"]["autoencoder"]["init_args"]["decoder"]["init_args"]
    assert compressor["dim"] == decoder["latent_dim"]
    assert flow["channels"] == compressor["code_dim"]
    assert flow["grid"] == compressor["grid"] == decoder["grid"]
    assert decoder["grid"] * decoder["patch"] == content["encode"]["data"]["init_args"]["size"]
    encoder = content["encode"]["encoder"]
    assert stages["autoencoder"]["autoencoder"]["init_args"]["encoder"] == encoder
    for stage in stages:
        data = content[stage]["data"]
        assert data["init_args"]["path_train"] == "runs/photos/features/train"
        assert data["init_args"]["num_classes"] == flow["num_classes"] == content["encode"]["data"]["init_args"]["num_classes"]


# --- commands -------------------------------------------------------------------------------------------------------------------------


def commands(name: str) -> Iterator[tuple[int, list[str]]]:
    """(line, words) of every command in a page's bash and console blocks."""
    for block in blocks(name, "bash", "console"):
        for i, line in enumerate(block.text.splitlines()):
            if words := shlex.split(line.removeprefix("$ "), comments=True):
                yield block.line + i, words


@pytest.fixture(scope="module")
def trainer_parser() -> Any:
    """The parser of fit, validate, test and predict: that of the command line, stopped before it makes anything."""
    made: list[Any] = []

    class Stopped(lightning_cli.LightningCLI):
        def instantiate_classes(self) -> None:
            made.append(self.parser)

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srcflow.cli.trainer.LightningCLI", Stopped)
        cli.main(["--debug", "fit", "--config", str(ROOT / "configs/smoke/flow.yaml")])
    return made[0]


def parse(words: list[str], trainer_parser: Any) -> None:
    """Parse a command of srcflow as the command line does, in the repository's place; raises if it is refused."""
    name, arguments = words[0], words[1:]
    if name.startswith("--"):
        assert words in (["--help"], ["--version"])
    elif name in cli.TRAINER_COMMANDS:
        files = [value for option, value in itertools.pairwise(arguments) if option == "--config"]
        assert all(Path(file).is_file() for file in files)
        options = {a for a in arguments if a.startswith("--")}
        if options & {"--model.help", "--print_config"}:  # these print and exit
            return
        if options - {"--config", "--ckpt_path"} or not all(f.startswith("configs/") for f in files):  # else test_configs.py parses it
            trainer_parser.parse_args(words)
    else:
        assert name in cli.COMMANDS
        parser = Parser(prog=f"srcflow {name}", exit_on_error=False)
        importlib.import_module(f"srcflow.cli.{name}").configure(parser)
        parser.parse_args(arguments)


def test_commands_are_accepted_and_the_files_they_name_exist(place: Path, trainer_parser: Any) -> None:
    cli.load_parts()
    shutil.copytree(ROOT / "configs", place / "configs")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    seen: set[tuple[str, ...]] = set()
    for name in pages_with("bash", "console"):
        for block in blocks(name, "yaml"):
            if block.title:  # a file that the page tells the reader to write
                (place / block.title).parent.mkdir(exist_ok=True)
                (place / block.title).write_text(block.text, encoding="utf-8")
        for line, words in commands(name):
            if tuple(words) in seen:
                continue
            seen.add(tuple(words))
            where = f"{name}, line {line}: {shlex.join(words)}"
            if words[0] == "make":
                assert re.search(rf"^{words[1]}:", makefile, re.M), where
            elif words[0] == "python":
                script = (ROOT / words[1]).read_text(encoding="utf-8")
                assert all(f'"{w}"' in script for w in words[2:] if w.startswith("--")), where
            elif words[0] == "srcflow":
                try:
                    parse(words[1:], trainer_parser)
                except (Exception, SystemExit) as e:
                    pytest.fail(f"{where}\n{e}")
            else:
                assert words[0] in ("pip", "tensorboard", "hf"), where  # other projects' commands
    assert len(seen) > 30


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_of_a_command_is_described(command: str) -> None:
    parser = Parser(prog=f"srcflow {command}")
    importlib.import_module(f"srcflow.cli.{command}").configure(parser)
    text = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {command}\n")[2].partition("\n## ")[0]
    options = {o for a in parser._actions for o in a.option_strings if o.startswith("--") and not o.endswith((".help", "--help"))}
    missing = sorted(o for o in options if "." not in o and f"`{o}`" not in section and "print_" not in o)
    assert not missing, f"docs/reference/cli.md does not describe {missing} of srcflow {command}"


# --- links and numbers ----------------------------------------------------------------------------------------------------------------


def slug(title: str) -> str:
    """A heading's anchor, as GitHub and Python-Markdown make it."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title.strip().lower()))


@pytest.mark.parametrize("name", FILES)
def test_links_lead_somewhere(name: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), f"{name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {slug(h) for h in headings}, f"{name}: {target}"


def test_equations_that_are_cited_exist() -> None:
    text = (ROOT / "docs/reference/equations.md").read_text(encoding="utf-8")
    numbers = re.findall(r"^\*\*(E\d+),", text, re.M)
    assert len(set(numbers)) == len(numbers) > 0
    cited: dict[str, str] = {}
    for path in [*(ROOT / "srcflow").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]:
        for number in re.findall(r"\bE\d+\b", path.read_text(encoding="utf-8")):
            cited[number] = path.name
    unknown = {n: where for n, where in cited.items() if n not in numbers}
    assert not unknown, f"cited, but not in equations.md: {unknown}"
    assert len(cited) >= len(numbers)


def test_places_that_equations_name_exist() -> None:
    text = (ROOT / "docs/reference/equations.md").read_text(encoding="utf-8")
    sources = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "srcflow").rglob("*.py"))
    for sentence in re.findall(r"\bIn (`.*?)\.(?:\s|$)", text, re.S):
        for place in re.findall(r"`([^`]+)`", sentence):
            for part in place.split(".")[-1:]:
                assert re.search(rf"^\s*(class|def) {part}\b", sources, re.M), f"equations.md names {place}"


def test_every_module_has_a_place_in_the_reference() -> None:
    pages = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs/reference").glob("*.md"))
    listed = re.findall(r"^::: ([\w.]+)$", pages, re.M)
    assert len(set(listed)) == len(listed)
    modules = set()
    for path in (ROOT / "srcflow").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not any(part.startswith("_") for part in module.split(".")) and not module.startswith("srcflow.cli."):
            modules.add(module)
    assert set(listed) == modules


def test_pages_are_in_the_navigation() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(f"docs/{p}" for p in listed) == sorted(FILES[1:])


def test_the_readme_lists_every_registered_part() -> None:
    rows = re.findall(r"^\| (\w+) \| `([\w.]+)` \| (.*?) \| `([\w.]+)` \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert [r[0] for r in rows] == list(registry.FAMILIES)
    for family, base, members, group in rows:
        assert base.replace(":", ".") == registry.FAMILIES[family].replace(":", ".")
        assert group == f"srcflow.{family}"
        own = {m.name for m in registry.registered(family).values() if m.distribution == "srcflow"}
        assert set(re.findall(r"`(\w+)`", members)) == own


@pytest.fixture(scope="module")
def rows() -> list[str]:
    """The table of docs/reference/configs.md as it is to be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        table: list[str] = importlib.import_module("config_table").rows()
        return table


def test_the_table_of_configurations_says_what_their_headers_say(rows: list[str]) -> None:
    text = (ROOT / "docs/reference/configs.md").read_text(encoding="utf-8")
    shown = [line for line in text.splitlines() if line.startswith("| `configs/") and line.count("|") == 5]
    assert shown == rows, "run: python tools/config_table.py --write"
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"`{path.relative_to(ROOT).as_posix()}`" in text


def test_sizes_in_the_imagenet_page_are_the_headers(rows: list[str]) -> None:
    text = (ROOT / "docs/howto/imagenet.md").read_text(encoding="utf-8")
    counts = {r.split("`")[1]: [c.strip() for c in r.split("|")[2:4]] for r in rows}
    for size, parameters, flops in re.findall(r"^\| (S|B|L|XL) \| (\d+) M \| ([\d.]+) \|$", text, re.M):
        trained, counted = counts[f"configs/flow/imagenet256_dinov2b_src32_{size.lower()}.yaml"]
        number, unit = counted.split()
        assert round(int(trained.replace(",", "")) / 1e6) == int(parameters)
        assert round(float(number) * {"TFLOP": 1, "GFLOP": 1e-3}[unit], 2) == float(flops)
