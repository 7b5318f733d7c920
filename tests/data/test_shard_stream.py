"""Shards read from front to back: what comes, in which order, from where, and what is an error."""

from __future__ import annotations

import functools
import http.server
import io
import shutil
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srcflow.data import shard_stream
from srcflow.data.sampler import Draw
from srcflow.data.shard_index import ShardIndex
from srcflow.data.shard_plan import Piece, ShardPlan, global_indices
from srcflow.data.shard_sources import Entry, ShardList
from srcflow.data.shard_stream import EvaluationStream, ShardImages, TrainingStream
from srcflow.data.transforms import ImageTransform
from srcflow.errors import DataError, UndecodableError

from .made_shards import damaged, png, shards, special, write

SIZES = [9, 1, 5, 2, 2, 4]


def images(urls: list[str], sizes: list[int] | None = None, **options: Any) -> ShardImages:
    """With counts from an index, or from the headers."""
    if sizes is None:
        listed = ShardList.scanned(ShardIndex.scan(urls))
    else:
        listed = ShardList.of(urls, {u: Entry(u, n) for u, n in zip(urls, sizes, strict=True)})
    return ShardImages(listed, ImageTransform(4), **{"num_classes": 10, **options})


def everything(source: ShardImages) -> list[int]:
    pieces = [Piece(s, 0, int(n)) for s, n in enumerate(source.shards.counts)]
    found = list(source.samples(pieces, np.arange(len(source)), 0))
    assert all(s["image"][0, 0, 0] == s["index"] and s["label"] == s["index"] % 10 for s in found)
    return [s["index"] for s in found]


def test_a_stream_gives_what_its_plan_says_from_any_point_on(tmp_path: Path) -> None:
    source = images(shards(tmp_path, SIZES))
    plan = ShardPlan(source.shards.counts, 2, 11, 4, seed=3)
    for stream in range(2):
        pieces, order = plan.pieces(1, stream), plan.order(1, stream)
        for start in range(12):
            found = list(source.samples(pieces, order, 1, start))
            assert [s["index"] for s in found] == plan.indices(1, stream).tolist()[start:]
            assert all(s["image"][0, 0, 0] == s["index"] and s["label"] == s["index"] % 10 for s in found)


def test_only_what_is_needed_is_opened_kept_and_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = images(shards(tmp_path, SIZES))
    plan = ShardPlan(source.shards.counts, 1, 23, 3)
    opened: list[str] = []
    decoded: list[int] = []
    open_shard, sample = shard_stream.open_shard, ShardImages.sample
    monkeypatch.setattr(shard_stream, "open_shard", lambda url: opened.append(url) or open_shard(url))

    def counted(self: ShardImages, raw: Any, draw: Draw, shard: int) -> Any:
        decoded.append(draw.index)
        return sample(self, raw, draw, shard)

    monkeypatch.setattr(ShardImages, "sample", counted)
    pieces, order = plan.pieces(0, 0), plan.order(0, 0)
    left = plan.indices(0, 0)[15:]
    list(source.samples(pieces, order, 0, 15))
    assert decoded == left.tolist()
    needed = {p.shard for p in pieces if set(global_indices([p], source.shards.counts)) & set(left)}
    assert opened == [source.shards.urls[p.shard] for p in pieces if p.shard in needed]
    assert len(needed) < len(pieces)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The folder over HTTP."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset opens URLs with curl")
def test_urls_and_pipes_are_read_like_files(tmp_path: Path, server: str) -> None:
    paths = shards(tmp_path, SIZES)
    expected = list(range(sum(SIZES)))
    assert everything(images(paths, SIZES)) == expected
    assert everything(images([f"pipe:cat {p}" for p in paths], SIZES)) == expected
    assert everything(images([f"{server}/{Path(p).name}" for p in paths], SIZES)) == expected
    missing = images([f"{server}/none.tar"], [3])
    with pytest.raises(DataError, match=r"none.tar: cannot be read"):
        everything(missing)


def test_a_command_that_fails_is_an_error(tmp_path: Path) -> None:
    path = shards(tmp_path, [4])[0]
    with pytest.raises(DataError, match=r"cannot be read: .*exit 3"):
        everything(images([f"pipe:cat {path}; exit 3"], [4]))
    with pytest.raises(DataError, match=r"cannot be read: .*\(exit status 1\)"):
        everything(images([f"pipe:cat {path}.gone 2>&-"], [4]))
    stream = images([f"pipe:cat {path}; sleep 60"], [4]).samples([Piece(0, 0, 2)], np.arange(2), 0)
    assert [s["index"] for s in stream] == [0, 1]  # and the command is not waited for


def test_a_command_that_ignores_sigterm_is_not_waited_for(tmp_path: Path) -> None:
    """Commands of a loader worker inherit the signals that it ignores."""
    path = shards(tmp_path, [4])[0]
    stream = images([f"pipe:trap '' TERM; cat {path}; sleep 20"], [4]).samples([Piece(0, 0, 2)], np.arange(2), 0)
    assert next(stream)["index"] == 0
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("kind", ["cut at a header", "cut in a header", "cut in data", "zeroed header", "garbage header"])
def test_a_shard_that_ends_early_is_named(kind: str, tmp_path: Path) -> None:
    """All but one of these end a plain webdataset without an error."""
    paths = shards(tmp_path, [10, 3])
    source = images(paths, [10, 3])
    Path(paths[0]).write_bytes(damaged(Path(paths[0]))[kind])
    message = "cannot be read" if kind == "cut in data" else "gave 5 samples, its index says 10"
    with pytest.raises(DataError, match=rf"s-000.tar: {message}"):
        everything(source)


def test_a_wrong_index_is_named(tmp_path: Path) -> None:
    paths = shards(tmp_path, [4, 3])
    with pytest.raises(DataError, match=r"s-000.tar: holds more samples than the 3 its index says: 'a/0003'"):
        everything(images(paths, [3, 3]))
    with pytest.raises(DataError, match=r"s-001.tar: gave 3 samples, its index says 4"):
        everything(images(paths, [4, 4]))
    source = images(paths)
    shutil.copy(paths[0], paths[1])
    with pytest.raises(DataError, match=r"s-001.tar: gave 'a/0000' where its headers promised another"):
        everything(source)


def test_names_that_webdataset_would_merge_skip_or_split_are_errors(tmp_path: Path) -> None:
    for files, message in [
        (["img_0.5.png", "img_0.6.png"], r"'img_0' has no image"),
        (["a.png", "b.png", "a.cls"], "do not follow each other"),
        (["a.png", "noextension", "b.png"], "not KEY.EXTENSION"),
        (["a.png", "a.PNG"], "occurs twice"),
    ]:
        path = write(tmp_path / "names.tar", [(f, png(0) if f.lower().endswith("png") else b"0") for f in files])
        with pytest.raises(DataError, match=message):
            everything(images([str(path)], [2], num_classes=0))


def test_labels_and_images_that_cannot_be_used(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.tar", [("a.png", png(0)), ("b.png", b"no image"), ("b.cls", b"1")]))
    with pytest.raises(DataError, match=r"a.tar: a: has no label"):
        everything(images([path], [2]))
    with pytest.raises(UndecodableError, match=r"a.tar: b: cannot be decoded"):
        list(images([path], [2], num_classes=0).samples([Piece(0, 0, 2)], np.arange(2), 0))
    tolerant = images([path], [2], num_classes=0, tolerant=True)
    errors = [s.get("error", "") for s in tolerant.samples([Piece(0, 0, 2)], np.arange(2), 0)]
    assert errors[0] == ""
    assert "a.tar: b: cannot be decoded" in errors[1]


def test_names_and_fingerprints(tmp_path: Path) -> None:
    paths = shards(tmp_path, [3, 2])
    scanned, listed = images(paths), images([f"pipe:cat {p}" for p in paths], [3, 2])
    assert [scanned.key(i) for i in (0, 4)] == ["a/0000", "a/0004"]
    assert [listed.key(i) for i in (0, 3, 4)] == ["s-000.tar/0", "s-001.tar/0", "s-001.tar/1"]
    sizes = [Path(p).stat().st_size for p in paths]
    entries = {p: Entry(p, n, size) for p, n, size in zip(paths, [3, 2], sizes, strict=True)}
    assert ShardList.of(paths, entries).fingerprint() == scanned.fingerprint()
    assert scanned.fingerprint() != images(paths[::-1]).fingerprint() != images(paths, [3, 3]).fingerprint()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_holds_the_same_samples_on_any_number_of_ranks(world: int, tmp_path: Path) -> None:
    source = images(shards(tmp_path, SIZES))
    plan = ShardPlan(source.shards.counts, 4, 4, 3)
    chunks = [[plan.indices(2, s)[t * 2 : t * 2 + 2].tolist() for s in range(4)] for t in range(2)]
    ranks = []
    for rank in range(world):
        stream = TrainingStream(source, plan, chunk=2, rank=rank, world_size=world)
        stream.seek(2, 0)
        ranks.append([batch["indices"].tolist() for batch, bad in stream if not bad])
    assert [[i for rank in ranks for i in rank[t]] for t in range(2)] == [[i for c in step for i in c] for step in chunks]


@pytest.mark.parametrize(("world", "batch", "limit"), [(1, 4, None), (2, 3, None), (3, 5, None), (4, 2, 9), (4, 4, 2)])
def test_evaluation_sees_each_sample_once_in_equal_steps(world: int, batch: int, limit: int | None, tmp_path: Path) -> None:
    source = images(shards(tmp_path, SIZES))
    ranks = [list(EvaluationStream(source, batch_size=batch, rank=r, world_size=world, limit=limit)) for r in range(world)]
    assert len({tuple(len(b["indices"]) for b, _ in rank) for rank in ranks}) == 1
    valid = [i for rank in ranks for b, _ in rank for i in b["indices"][b["valid"]].tolist()]
    assert valid == list(range(limit or sum(SIZES)))
    assert all((b["images"][:, 0, 0, 0] == b["indices"]).all() for rank in ranks for b, _ in rank)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE])
def test_members_that_are_no_files_are_errors(kind: bytes, tmp_path: Path) -> None:
    path = special(tmp_path / "a.tar", "b.png", kind)
    with pytest.raises(DataError, match=r"a\.tar: b\.png is a .*lost in silence"):
        everything(images([str(path)], [2]))


def test_names_in_latin_1_are_names(tmp_path: Path) -> None:
    raw = "caf\xe9"
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in ((f"{raw}.png", png(0)), (f"{raw}.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    path = str(tmp_path / "a.tar")
    assert everything(images([path])) == everything(images([path], [1])) == [0]
    assert images([path]).key(0).encode(errors="surrogateescape") == raw.encode("latin-1")
