"""A checkpoint's name holds a whole file or nothing, whatever happens while it is written; what is damaged is refused."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint

from srcflow.callbacks import checkpoint_files as files
from srcflow.errors import CheckpointError

CONTENT = {"weights": torch.arange(50_000.0), "step": 3}
IO = files.CheckpointFiles()


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can grow beyond so many bytes: what a full disk looks like to torch."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def saved(path: Path, when: int = 0) -> Path:
    IO.save_checkpoint(CONTENT, path)
    os.utime(path, (when, when))
    return path


def test_a_checkpoint_is_written_and_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "new" / "a.ckpt")
    assert names(path.parent) == ["a.ckpt"]
    read = IO.load_checkpoint(path)
    assert torch.equal(read["weights"], CONTENT["weights"])  # type: ignore[arg-type]
    assert read["step"] == 3


@pytest.mark.parametrize("size", [0, 100, 100_000])
def test_a_full_disk_leaves_the_last_good_file_and_says_so(size: int, tmp_path: Path) -> None:
    good, other = saved(tmp_path / "step-1.ckpt"), saved(tmp_path / "step-2.ckpt", when=1)
    before = good.read_bytes()
    for place in (tmp_path / "step-3.ckpt", good):
        with room_for(size), pytest.raises(CheckpointError, match=rf"could not be written: File too large.*{other}"):
            IO.save_checkpoint(CONTENT, place)
    assert names(tmp_path) == ["step-1.ckpt", "step-2.ckpt"]
    assert good.read_bytes() == before


def test_what_is_no_fault_of_the_disk_is_raised_as_it_is(tmp_path: Path) -> None:
    with pytest.raises((AttributeError, TypeError), match=r"pickle|local object"):
        IO.save_checkpoint({"unpicklable": lambda: None}, tmp_path / "a.ckpt")
    assert names(tmp_path) == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_file_that_was_cut_off_is_refused_and_the_newest_whole_one_named(share: float, tmp_path: Path) -> None:
    older, whole, broken = (saved(tmp_path / f"step-{i}.ckpt", when=i) for i in (1, 2, 3))
    data = broken.read_bytes()
    broken.write_bytes(data[: int(share * len(data))])
    (tmp_path / "last.ckpt").symlink_to(broken.name)
    os.utime(older, (1, 1))
    for path in (broken, tmp_path / "last.ckpt"):
        with pytest.raises(CheckpointError, match=rf"is not a whole checkpoint.* go on from it with --ckpt_path {whole}\.$"):
            IO.load_checkpoint(path)


def test_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    whole, broken = saved(tmp_path / "step-1.ckpt", when=1), saved(tmp_path / "step-2.ckpt", when=2)
    data = bytearray(broken.read_bytes())
    data[len(data) // 2] ^= 1
    broken.write_bytes(data)
    assert torch.load(broken, weights_only=True)["step"] == 3  # torch does not notice
    with pytest.raises(CheckpointError, match=rf"a checksum is wrong.*{whole}"):
        IO.load_checkpoint(broken)


def test_what_is_missing_foreign_or_a_pickle_of_code_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist\. There is no other beside it"):
        IO.load_checkpoint(tmp_path / "none" / "a.ckpt")
    text = tmp_path / "a.ckpt"
    text.write_text("seed_everything: 0\n")
    with pytest.raises(CheckpointError, match="is something else"):
        IO.load_checkpoint(text)
    torch.save({"module": nn.Linear(1, 1)}, text)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Weights only load failed"):
        IO.load_checkpoint(text, weights_only=False)


def test_a_link_is_replaced_in_one_step_and_a_copy_does_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, last = saved(tmp_path / "1.ckpt"), saved(tmp_path / "2.ckpt"), tmp_path / "last.ckpt"
    last.mkdir()  # as a sharded checkpoint of Lightning's
    files.link(last, first)
    assert os.readlink(last) == "1.ckpt"
    files.link(last, second)
    assert os.readlink(last) == "2.ckpt"

    def no_links(*args: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(Path, "symlink_to", no_links)
    files.link(last, first)
    assert not last.is_symlink()
    assert last.read_bytes() == first.read_bytes()
    assert names(tmp_path) == ["1.ckpt", "2.ckpt", "last.ckpt"]


def shards(path: Path) -> Path:
    """A directory as FSDP2 writes it under `save_distributed_checkpoint`."""
    path.mkdir()
    checkpoint.save({"weights": torch.arange(50_000.0), "step": 3}, checkpoint_id=path, no_dist=True)
    torch.save({"global_step": 3}, path / "meta.pt")
    return path


def cut(file: Path, to: int) -> None:
    file.write_bytes(file.read_bytes()[:to])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_directory_of_shards_that_lacks_something_is_refused(tmp_path: Path) -> None:
    good = shards(tmp_path / "step-1.ckpt")
    files.check(good)
    assert files.whole(good)
    (data,) = good.glob("*.distcp")
    damages: dict[str, Callable[[Path], None]] = {
        "no meta": lambda d: (d / "meta.pt").unlink(),
        "cut meta": lambda d: cut(d / "meta.pt", -30),
        "no list": lambda d: (d / ".metadata").unlink(),
        "empty list": lambda d: cut(d / ".metadata", 0),
        "cut list": lambda d: cut(d / ".metadata", -10),
        "no shard": lambda d: (d / data.name).unlink(),
        "cut shard": lambda d: cut(d / data.name, -1),
    }
    for name, damage in damages.items():
        broken = tmp_path / "step-2.ckpt"
        shutil.copytree(good, broken)
        files.check(broken)
        damage(broken)
        with pytest.raises(CheckpointError, match=rf"is not a whole checkpoint.* go on from it with --ckpt_path {good}\.$"):
            files.check(broken)
        assert files.newest(tmp_path) == good, name
        shutil.rmtree(broken)


def test_a_directory_is_replaced_without_a_moment_that_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "step-1.ckpt"
    place.mkdir()
    (place / "meta.pt").write_text("old")

    def half() -> Path:
        partial = files.hidden(place)
        partial.mkdir()
        (partial / "meta.pt").write_text("new")
        return partial

    def killed(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    replace, rmtree, synced = Path.replace, shutil.rmtree, []
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        files.replace(half(), place)
    monkeypatch.setattr(Path, "replace", replace)
    files.sweep(tmp_path)  # the next start
    assert names(tmp_path) == ["step-1.ckpt"]
    assert (place / "meta.pt").read_text() == "old"

    def noted(path: Path, **more: object) -> None:  # what is old goes when the new is there
        assert (place / "meta.pt").read_text() == "new"
        rmtree(path)

    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    monkeypatch.setattr(shutil, "rmtree", noted)
    files.replace(half(), place)
    assert synced == ["meta.pt", ".step-1.ckpt.partial", tmp_path.name]
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        files.replace(half(), place)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert len(names(tmp_path)) == 2
    files.sweep(tmp_path)
    assert names(tmp_path) == ["step-1.ckpt"]
    assert (place / "meta.pt").read_text() == "new"


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path: Path) -> None:
    place = saved(tmp_path / "a.ckpt")
    files.hidden(place).write_bytes(b"half")
    files.hidden(tmp_path / "b.ckpt").mkdir()
    (tmp_path / "notes.partial").touch()
    assert files.newest(tmp_path) == place
    files.sweep(tmp_path)
    assert names(tmp_path) == ["a.ckpt", "notes.partial"]
