"""The one loader of YAML: numbers, keys that stand twice, and errors that name file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from srcflow import yaml_files
from srcflow.errors import ConfigError


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as error:
        yaml_files.parse(text, "config", "run.yaml")
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-3", 2e-3), ("1E5", 1e5), ("-1.5e+2", -150.0), ("1.", 1.0), (".5", 0.5), ("1_000.5", 1000.5), ("-.inf", float("-inf")),
        ("7", 7), ("-3", -3), ("0x10", 16), ("1e", "1e"), ("e5", "e5"), ("1.2.3", "1.2.3"), ("2024-01-02", "2024-01-02"),
        ("true", True), ("null", None), ("", None), ("# only a remark", None), ('"1"', "1"), ("[1e-4, x]", [1e-4, "x"]),
    ],
)  # fmt: skip
def test_scalars(text: str, value: Any) -> None:
    made = yaml_files.parse(text)
    assert made == value
    assert type(made) is type(value)


@pytest.mark.parametrize(
    ("text", "key", "first", "second"),
    [
        ("a: 1\nb: 2\na: 3\n", "a", 1, 3),
        ("a:\n  b: 1\n  c: 2\n  b: 1\n", "a.b", 2, 4),
        ("a: [{x: 1}, {y: 1,\n y: 2}]\n", "a.1.y", 1, 2),
        ('{"a": 1,\n"a": 1}', "a", 1, 2),
        ("'a': 1\na: 2\n", "a", 1, 2),
        ("1: x\n0x1: y\n", "0x1", 1, 2),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_both_lines(text: str, key: str, first: int, second: int) -> None:
    message = refused(text)
    assert f"config = 'run.yaml': the key {key} stands in line {first} and again in line {second}; " in message


def test_a_key_twice_in_one_line() -> None:
    assert "the key a stands twice in line 1" in refused("{a: 1, a: 2}")


def test_equal_keys_in_different_places_and_merged_ones_are_no_repetition() -> None:
    text = "x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\nz: {a: 1}\n1: int\n'1': word\n"
    assert yaml_files.parse(text) == {"x": {"a": 1, "b": 2}, "y": {"a": 1, "b": 3}, "z": {"a": 1}, 1: "int", "1": "word"}


def test_an_alias_of_what_it_stands_in_ends() -> None:
    assert [path for path, _, _ in yaml_files.keys_of("a: &a {b: *a}")] == [("a",), ("a", "b")]
    assert yaml_files.parse("a: &a {b: *a}")["a"]["b"]["b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: [1,\nc: 2\n", "line 4, column 1: is not YAML"),
        ("a:\n\tb: 1\n", "line 2, column 1: is not YAML: while scanning for the next token. found character that cannot start any token. "
         "Indent with spaces, not with tabs."),
        ("a: b: c\n", "line 1, column 5: is not YAML"),
        ("a: !!python/object:os.system x\n", "line 1, column 4: is not YAML: could not determine a constructor"),
        ("? [1]\n: 2\n", "is not YAML"),
    ],
)  # fmt: skip
def test_what_is_not_yaml_is_one_line_with_the_place(text: str, words: str) -> None:
    message = refused(text)
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"a: 2e-3\r\nb: x\r\n", b"\xef\xbb\xbfa: 2e-3\nb: x\n", b"a: 2e-3\rb: x\r"])
def test_line_endings_and_byte_order_marks(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    assert yaml_files.load(tmp_path / "a.yaml") == {"a": 2e-3, "b": "x"}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\n# caf\xe9\n")
    for name, words in (("none.yaml", "there is no such file"), (".", "is a directory"), ("latin.yaml", "line 2: is not text in UTF-8")):
        with pytest.raises(ConfigError, match=words):
            yaml_files.load(tmp_path / name, "stages")


def test_where_keys_stand() -> None:
    text = "fit:\n  model:\n    init_args:\n      net:\n        class_path: N\n        init_args: {width: 3}\n"
    text += "  trainer:\n    callbacks+:\n    - x: 1\n"
    found = {".".join(path): (line, value) for path, line, value in yaml_files.keys_of(text)}
    assert found["model.net.width"] == (6, 3)
    assert found["trainer.callbacks"] == (8, None)
    assert found["trainer.callbacks.x"] == (9, 1)
    assert yaml_files.keys_of("a: [") == []
