"""Where results are written: tried before the work."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from srcflow import artifacts
from srcflow.errors import ConfigError


@pytest.mark.parametrize("directory", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_target_that_can_be_written_is_left_as_it_was(tmp_path: Path, directory: bool, there: bool) -> None:
    target = tmp_path / "runs" / "one"
    if there:
        target.parent.mkdir()
        target.mkdir() if directory else target.write_text("kept")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    artifacts.check_writable(target, "out", directory=directory)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    assert directory or not there or target.read_text() == "kept"


@pytest.mark.parametrize("directory", [True, False])
def test_a_target_below_a_file_is_refused(tmp_path: Path, directory: bool) -> None:
    (tmp_path / "notes").write_text("x")
    with pytest.raises(ConfigError, match=r"out = '.*notes/deep/x': cannot be written.*Name another place"):
        artifacts.check_writable(tmp_path / "notes" / "deep" / "x", "out", directory=directory)


def test_the_wrong_kind_of_thing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file, and a directory is to be written there"):
        artifacts.check_writable(tmp_path / "file", "out", directory=True)
    with pytest.raises(ConfigError, match="is a directory, and a file is to be written there"):
        artifacts.check_writable(tmp_path, "out", directory=False)


def test_a_link_to_nowhere_and_impossible_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"a link to .*gone, which does not exist"):
        artifacts.check_writable(tmp_path / "link" / "model", "out", directory=True)
    with pytest.raises(ConfigError, match="name too long"):
        artifacts.check_writable(tmp_path / ("n" * 300) / "model", "out", directory=True)
    with pytest.raises(ConfigError, match="null"):
        artifacts.check_writable(f"{tmp_path}/a\0b", "out", directory=False)


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_what_the_file_system_says_is_in_the_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    with pytest.raises(ConfigError, match=os.strerror(code)):
        artifacts.check_writable(tmp_path / "x", "out", directory=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device without space")
def test_devices_are_not_disturbed() -> None:
    artifacts.check_writable("/dev/full", "out", directory=False)
