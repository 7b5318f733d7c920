from __future__ import annotations

import hashlib
import tarfile
import threading
from pathlib import Path

import pytest

from srcflow.cli import main
from srcflow.data import shard_sources
from srcflow.data.shard_sources import Entry, read_index, write_index
from srcflow.errors import ConfigError, DataError, ProblemsError

from ..data.made_shards import damaged, shards, special, write


def index(*arguments: str) -> None:
    main(["--debug", "index", *arguments])


def test_counts_sizes_and_hashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = shards(tmp_path, [4, 2])
    index(f"{tmp_path}/s-{{000..001}}.tar")
    place = str(tmp_path / "index.json")
    sizes = [Path(p).stat().st_size for p in paths]
    assert list(read_index(place).values()) == [Entry("s-000.tar", 4, sizes[0]), Entry("s-001.tar", 2, sizes[1])]
    assert "2 shards with 6 samples" in capsys.readouterr().out
    index(paths[1], "--sha256")
    first, second = read_index(place).values()
    assert first.sha256 is None
    assert second.sha256 == hashlib.sha256(Path(paths[1]).read_bytes()).hexdigest()


def test_check_names_every_difference_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = shards(tmp_path, [4, 2, 3])
    index(*paths[:2], "--sha256")
    index(*paths[:2], "--check", "--sha256")
    assert "agrees with 2 shards" in capsys.readouterr().out
    before = (tmp_path / "index.json").read_bytes()
    shards(tmp_path, [5, 2, 3], bad=(5,))
    with pytest.raises(DataError) as error:
        index(*paths, "--check", "--sha256")
    for line in ("s-000.tar: nsamples is 5, the index says 4", "s-001.tar: sha256 is", "s-002.tar: is not in"):
        assert line in str(error.value)
    assert (tmp_path / "index.json").read_bytes() == before


def test_bad_shards_are_all_named_and_nothing_is_written(tmp_path: Path) -> None:
    paths = shards(tmp_path, [10, 2])
    Path(paths[0]).write_bytes(damaged(Path(paths[0]))["cut at a header"])
    other = write(tmp_path / "dotted.tar", [("a_0.5.png", b"1"), ("a_0.6.png", b"1")])
    with pytest.raises(ProblemsError, match=r"(?s)s-000.tar: is cut after a/0004.*'a_0' has no image"):
        index(*paths, str(other))
    assert not (tmp_path / "index.json").exists()
    with pytest.raises(ConfigError, match="is no local file"):
        index("https://host/a.tar")
    with pytest.raises(DataError, match="no such file"):
        index(str(tmp_path / "none.tar"))


def test_recorded_hashes_are_renewed_and_entries_of_remote_shards_stay(tmp_path: Path) -> None:
    paths = shards(tmp_path, [4, 2])
    far = Entry("https://host/s-009.tar", 7)
    write_index(tmp_path, [far, Entry("gone.tar", 3)])
    index(paths[0], "--sha256")
    shards(tmp_path, [5, 2])
    index(*paths)
    known = read_index(str(tmp_path / "index.json"))
    assert set(known) == {far.url, "s-000.tar", "s-001.tar"}
    assert known[far.url] == far
    assert known["s-000.tar"].sha256 == hashlib.sha256(Path(paths[0]).read_bytes()).hexdigest()
    assert known["s-001.tar"].sha256 is None


def test_two_that_write_an_index_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, second), inside, go_on = shards(tmp_path, [4, 2]), threading.Event(), threading.Event()
    write_index(tmp_path, [Entry("https://host/s-009.tar", 7)])
    plain = shard_sources.read_index

    def slow(place: str) -> dict[str, Entry]:
        entries = plain(place)
        inside.set()
        go_on.wait(1)
        return entries

    monkeypatch.setattr(shard_sources, "read_index", slow)
    one = threading.Thread(target=write_index, args=(tmp_path, [Entry(Path(first).name, 4)]))
    one.start()
    inside.wait()
    monkeypatch.setattr(shard_sources, "read_index", plain)
    write_index(tmp_path, [Entry(Path(second).name, 2)])  # waits for the first
    go_on.set()
    one.join()
    assert len(plain(str(tmp_path / "index.json"))) == 3


def test_labels_are_counted_recorded_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = shards(tmp_path, [12, 3])
    index(*paths, "--labels", "--num_classes", "13")
    said = capsys.readouterr().out
    assert "2 shards with 15 samples" in said
    assert "labels 0 .. 9: 10 classes with samples, from 1 (class 5) to 2 (class 0) in each." in said
    assert "0: 2, 1: 2, 2: 2, 3: 2, 4: 2, 5: 1" in said
    assert "3 of 13 classes have no samples: 10-12" in said
    assert read_index(str(tmp_path / "index.json"))["s-001.tar"].labels == {2: 1, 3: 1, 4: 1}
    index(*paths, "--labels", "--check")
    assert "no samples" not in capsys.readouterr().out
    write(Path(paths[1]), [("a.png", b"1"), ("a.cls", b"5")])
    with pytest.raises(DataError, match=r"s-001\.tar: labels is \{5: 1\}, the index says \{2: 1, 3: 1, 4: 1\}"):
        index(*paths, "--labels", "--check")


def test_labels_out_of_range_are_all_named(tmp_path: Path) -> None:
    paths = shards(tmp_path, [12, 3])
    with pytest.raises(ProblemsError, match=r"(?s)a/0002: label 2 is not in 0 \.\. 1.*a/0009: label 9.*a/0014: label 4"):
        index(*paths, "--labels", "--num_classes", "2")
    plain = write(tmp_path / "plain.tar", [("a.png", b"1")])
    with pytest.raises(DataError, match=r"plain\.tar: a: has no label"):
        index(str(plain), "--labels")
    with pytest.raises(ConfigError, match=r"num_classes = 3: has no effect without --labels"):
        index(*paths, "--num_classes", "3")
    with pytest.raises(ConfigError, match=r"num_classes = 0: must be at least 1"):
        index(*paths, "--labels", "--num_classes", "0")


def test_links_in_shards_are_not_counted_away(tmp_path: Path) -> None:
    path = special(tmp_path / "a.tar", "b.png", tarfile.LNKTYPE)
    with pytest.raises(DataError, match=r"a\.tar: b\.png is a hard link to a\.png"):
        index(str(path))
    assert not (tmp_path / "index.json").exists()


def test_names_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a shard, of its folder and of what is in it."""
    name = b"caf\xe9".decode(errors="surrogateescape")
    (tmp_path / name).mkdir()
    path = write(tmp_path / name / f"{name}.tar", [(f"{name}.png", b"1")])
    index(str(path), "--sha256")
    said = capsys.readouterr().out
    assert r"caf\xe9/index.json, for 1 shards" in said
    said.encode()
    assert read_index(str(tmp_path / name / "index.json"))[f"{name}.tar"].nsamples == 1
    index(str(path), "--check", "--sha256")
