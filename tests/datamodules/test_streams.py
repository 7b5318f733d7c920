"""Streams of shards through the datamodule: workers, ranks, places, and everything that is wrong with them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from srcflow.cli import main
from srcflow.data import shard_sources
from srcflow.data.shard_index import ShardIndex
from srcflow.data.shard_sources import Entry, write_index
from srcflow.datamodules.base import DataModule
from srcflow.datamodules.image_folder import ImageFolder
from srcflow.datamodules.image_shards import ImageShards
from srcflow.datamodules.stream_loader import EvaluationLoader, StreamLoader
from srcflow.errors import ConfigError, DataError, ProblemsError, UndecodableError

from ..data.made_shards import png, shards, write

SIZES = [9, 1, 5, 8, 2, 4, 6]  # 35 samples; 4 steps of 8
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # more workers than cores
Content = tuple[list[int], list[int], list[bool], bytes]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with an index."""
    root = tmp_path_factory.mktemp("streams")
    shards(root, SIZES)
    main(["--debug", "index", f"{root}/s-*.tar"])
    return root


def make(place: Path, pattern: str = "s-{000..006}.tar", **options: Any) -> ImageShards:
    where = pattern if ":" in pattern else str(place / pattern)
    options = {"size": 4, "num_classes": 10, "batch_size": 8, "flip": True, "mode": "stream", "shuffle_buffer": 12, **options}
    return ImageShards(where, val=where, **options)


def content(batch: Any) -> Content:
    return batch["indices"].tolist(), batch["labels"].tolist(), batch["flipped"].tolist(), batch["images"].numpy().tobytes()


def epochs(data: DataModule, n: int = 2) -> list[Content]:
    loader = data.train_dataloader()
    found = [content(batch) for _ in range(n) for batch in loader]
    assert len(found) == n * len(loader)
    return found


def error_of(loader: Any) -> DataError:
    """What a pass raises, without its frames: a traceback keeps the workers alive, and torch then waits for them in vain."""
    try:
        list(loader)
    except DataError as e:
        return e.with_traceback(None)
    pytest.fail("nothing was raised")


def test_workers_however_started_change_nothing(place: Path) -> None:
    expected = epochs(make(place))
    assert len(expected) == 2 * 4
    assert sorted(len({i for e in expected[k : k + 4] for i in e[0]}) for k in (0, 4)) == [32, 32]
    assert {f for _, _, flipped, _ in expected for f in flipped} == {True, False}
    for workers in (1, 2, 4):
        assert epochs(make(place, num_workers=workers)) == expected, workers
    assert epochs(make(place, num_workers=1, start_method="spawn")) == expected
    assert epochs(make(place, seed=1)) != expected


def test_three_workers_share_four_streams(place: Path) -> None:
    assert epochs(make(place, num_workers=3)) == epochs(make(place))


@pytest.mark.parametrize("world", [2, 4])
def test_a_global_batch_holds_the_same_samples_on_any_number_of_ranks(world: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [dict(zip(i, zip(labels, flips, strict=True), strict=True)) for i, labels, flips, _ in epochs(make(place))]
    ranks = []
    for rank in range(world):
        data = make(place, batch_size=8 // world)
        monkeypatch.setattr(data, "share", lambda rank=rank: (rank, world))
        ranks.append(epochs(data))
    assert {len(r) for r in ranks} == {len(alone)}
    for step, together in enumerate(alone):
        found: dict[int, Any] = {}
        for rank in ranks:
            indices, labels, flips, _ = rank[step]
            found |= dict(zip(indices, zip(labels, flips, strict=True), strict=True))
        assert found == together


def test_an_odd_number_of_ranks_has_streams_too(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for rank in range(3):
        data = make(place, batch_size=4)
        monkeypatch.setattr(data, "share", lambda rank=rank: (rank, 3))
        seen += [i for indices, *_ in epochs(data, 1) for i in indices]
    assert len(set(seen)) == len(seen) == 24


@pytest.mark.parametrize("workers", [0, 2, 5])
@pytest.mark.parametrize("world", [1, 3])
def test_streamed_evaluation_sees_each_sample_once(workers: int, world: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make(place, f"pipe:cat {place}/s-{{000..006}}.tar", index=str(place / "index.json"), num_workers=workers, mode="stream")
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(data, "share", lambda rank=rank: (rank, world))
        loader = data.loader("val")
        assert isinstance(loader, EvaluationLoader)
        assert len(loader.dataset) == sum(SIZES)
        ranks.append([list(loader), list(loader)][1])  # a second time, too
        assert len(ranks[-1]) == len(loader)
    assert len({tuple(len(b["indices"]) for b in rank) for rank in ranks}) == 1 or workers  # workers may give short batches early
    assert len({len(rank) for rank in ranks}) == 1
    valid = sorted(i for rank in ranks for b in rank for i in b["indices"][b["valid"]].tolist())
    assert valid == list(range(sum(SIZES)))
    first = next(iter(make(place, mode="map").loader("val", batch_size=sum(SIZES))))
    images = {int(i): image for rank in ranks for b in rank for i, image in zip(b["indices"], b["images"], strict=True)}
    assert all(torch.equal(images[i], image) for i, image in enumerate(first["images"]))


def test_local_shards_with_an_index_are_not_scanned_for_streaming(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(place, tmp_path / "plain")
    (tmp_path / "plain" / "index.json").unlink()
    expected = epochs(make(tmp_path / "plain"))
    scanned = make(tmp_path / "plain").dataset("train", training=True).fingerprint()
    monkeypatch.setattr(ShardIndex, "scan", lambda paths: pytest.fail("headers were read"))
    assert epochs(make(place)) == expected
    assert make(place).dataset("train", training=True).fingerprint() == scanned
    piped = make(place, f"pipe:cat {place}/s-{{000..006}}.tar", index=str(place / "index.json"))
    assert epochs(piped) == expected


def test_a_local_shard_without_an_index_beside_remote_ones_is_scanned(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(place / "s-000.tar", tmp_path)
    remote = [f"pipe:cat {place}/s-00{i}.tar" for i in range(1, 7)]
    beside = shard_sources.index_of
    monkeypatch.setattr(shard_sources, "index_of", lambda url: str(place / "index.json") if url in remote else beside(url))
    options: dict[str, Any] = {"size": 4, "num_classes": 10, "batch_size": 8, "flip": True, "mode": "stream", "shuffle_buffer": 12}
    assert epochs(ImageShards([str(tmp_path / "s-000.tar"), *remote], **options)) == epochs(make(place))


# --- what is wrong, before training ----------------------------------------------------------------------------------------------------


def test_everything_is_said_in_one_error(tmp_path: Path) -> None:
    """Missing and resized shards, a wrong count, dotted and doubled keys, an empty pattern, and too few shards."""
    shards(tmp_path, [3, 2])
    write_index(tmp_path, [Entry("s-000.tar", 3, 77), Entry("s-001.tar", 4)])
    write(tmp_path / "dotted.tar", [("a_0.5.png", png(0)), ("a_0.6.png", png(1))])
    write(tmp_path / "double.tar", [("a.png", png(0)), ("b.png", png(0)), ("a.cls", b"1")])
    train = [str(tmp_path / n) for n in ("s-{000..002}.tar", "dotted.tar", "double.tar")]
    data = ImageShards(train, str(tmp_path / "none-*.tar"), size=4, mode="stream", num_workers=9, batch_size=9)
    with pytest.raises(ProblemsError) as error:
        data.setup("fit")
    for line in (
        "s-002.tar: no such file",
        "s-000.tar: has 20480 bytes, ",
        "s-001.tar: holds 2 samples, its index says 4",
        "sample 'a_0' has no image",
        "sample 'a' do not follow each other",
        "none-*.tar: matches no file",
        "5 shards, 1 ranks x 9 workers",
    ):
        assert line in str(error.value), line


def test_remote_shards_need_an_index_and_a_stream(place: Path) -> None:
    with pytest.raises(ProblemsError, match=r"(?s)data.train: 1 .*pipe:cat a.tar: has no index.*srcflow index.*data.index.*data.val: 1 "):
        make(place, "pipe:cat a.tar").setup("fit")
    with pytest.raises(ConfigError, match=r"data.mode = 'map'.*pipe:cat .*is no local file.*stream"):
        make(place, f"pipe:cat {place}/s-000.tar", index=str(place / "index.json"), mode="map").setup("fit")


@pytest.mark.parametrize("mode", ["map", "stream"])
def test_a_configured_index_must_have_every_shard(mode: str, tmp_path: Path) -> None:
    shards(tmp_path, [8, 8])
    (tmp_path / "part.json").write_text('{"shardlist": [{"url": "s-000.tar", "nsamples": 8}]}')
    data = make(tmp_path, "s-{000..001}.tar", mode=mode, index=str(tmp_path / "part.json"))
    with pytest.raises(ProblemsError, match=r"s-001.tar: is not in .*part.json\n.*srcflow index.*data.index replaces"):
        data.setup("fit")


@pytest.mark.parametrize("content", ['{"0001": "cat"}', None], ids=["unrelated", "unreadable"])
def test_another_file_of_that_name_beside_the_shards_is_refused_with_a_way_out(content: str | None, tmp_path: Path) -> None:
    shards(tmp_path, [8, 8])
    place = tmp_path / "index.json"
    place.write_bytes(b"\xff\xfe" if content is None else content.encode())
    with pytest.raises(ProblemsError, match=r"index.json: is not an index .*Name the right one in data.index, or move this one away"):
        make(tmp_path, "s-{000..001}.tar", mode="map").setup("fit")
    (tmp_path / "mine.json").write_text('{"shardlist": [{"url": "s-000.tar", "nsamples": 8}, {"url": "s-001.tar", "nsamples": 8}]}')
    make(tmp_path, "s-{000..001}.tar", mode="map", index=str(tmp_path / "mine.json")).setup("fit")


def test_workers_and_streams_must_fit(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(make(place, streams=2, num_workers=2).train_dataloader(), StreamLoader)
    with pytest.raises(ConfigError, match=r"data.num_workers = 6: each rank reads 4 streams.*Lower it to 4.*possible: none"):
        make(place, num_workers=6).setup("fit")
    with pytest.raises(ConfigError, match=r"data.streams = 3: must be .*Possible: 1, 2, 4."):
        make(place, streams=3).setup("fit")
    with pytest.raises(ConfigError, match=r"data.num_workers = 2: each rank reads 1 streams.*possible: none"):
        make(place, batch_size=11, num_workers=2).setup("fit")
    data = make(place, streams=1)
    monkeypatch.setattr(data, "share", lambda: (0, 2))
    with pytest.raises(ConfigError, match=r"data.streams = 1: must be at least 2 ranks x 1 workers.*Possible: 2, 4"):
        data.setup("fit")
    with pytest.raises(ConfigError, match=r"limit = 3"):
        make(place).loader("train", training=True, limit=3)
    for options in ({"streams": 0}, {"shuffle_buffer": 0}, {"mode": "steam"}, {"start_method": "thread"}, {"max_bad_fraction": 2.0}):
        with pytest.raises(ConfigError, match=f"data.{next(iter(options))}"):
            make(place, **options)
    for options in ({"streams": 4, "mode": "map"}, {"start_method": "spawn", "num_workers": 0}):
        with pytest.raises(ConfigError, match=f"data.{next(iter(options))} = .*has no effect"):
            make(place, **options)


def test_the_number_of_streams_changes_the_order(place: Path) -> None:
    assert epochs(make(place, streams=2)) != epochs(make(place))
    assert epochs(make(place, shuffle_buffer=1)) != epochs(make(place))


# --- what is wrong, while training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mode", ["map", "stream", "folder"])
def test_a_sample_that_does_not_decode_is_named_counted_and_replaced(mode: str, workers: int, tmp_path: Path) -> None:
    shards(tmp_path, SIZES, bad=(13,))
    for i in range(sum(SIZES)):
        (tmp_path / f"{i:04d}.png").write_bytes(b"no image" if i == 13 else png(i))
    data: DataModule = make(tmp_path, mode=mode if mode != "folder" else "map", max_bad_fraction=0.05, num_workers=workers, batch_size=5)
    if mode == "folder":
        data = ImageFolder(str(tmp_path), str(tmp_path), size=4, batch_size=5, num_workers=workers, max_bad_fraction=0.05)
    name = "0013.png" if mode == "folder" else "s-002.tar: a/0013"
    loader = data.train_dataloader()
    with pytest.warns(UserWarning, match=f"bad sample 1 of epoch 0, replaced by another: .*{name}: cannot be decoded"):
        batches = list(loader)
    seen = [i for b in batches for i in b["indices"].tolist()]
    assert len(seen) == 35
    assert set(seen) == set(range(35)) - {13}
    assert all((b["images"][:, 0, 0, 0] == b["indices"]).all() for b in batches)
    assert all(bool(b["valid"].all()) for b in batches)
    assert list(loader.bad.messages) == [13]
    with pytest.warns(UserWarning, match="bad sample 1 of epoch 1"):
        list(loader)
    assert loader.bad.total == 2
    error = error_of(data.loader("val"))
    assert isinstance(error, UndecodableError)
    assert f"{name}: cannot be decoded" in str(error)


@pytest.mark.filterwarnings("ignore:bad sample:UserWarning")
@pytest.mark.parametrize("mode", ["map", "stream"])
def test_too_many_bad_samples_stop_the_run_and_are_listed(mode: str, tmp_path: Path) -> None:
    shards(tmp_path, SIZES, bad=(3, 13, 20))
    assert len(list(make(tmp_path, mode=mode, max_bad_fraction=3 / 32).train_dataloader())) == 4  # as many as there may be
    with pytest.raises(DataError, match=r"[123] samples of epoch 0 do not decode, more than data.max_bad_fraction = 0 of this rank's 32"):
        list(make(tmp_path, mode=mode, max_bad_fraction=0).train_dataloader())
    with pytest.raises(DataError, match=r"(?s)2 samples of epoch 0 do not decode.*= 0.05 .*\.tar: a/00\d\d: .*\.tar: a/00\d\d: cannot"):
        list(make(tmp_path, mode=mode, max_bad_fraction=0.05).train_dataloader())


@pytest.mark.filterwarnings("ignore:bad sample:UserWarning")
def test_the_run_stops_where_no_good_sample_was_met_before(tmp_path: Path) -> None:
    shards(tmp_path, [2, 2], bad=(0, 1, 2, 3))
    with pytest.raises(DataError, match="with no good one before them"):
        list(make(tmp_path, "s-{000..001}.tar", batch_size=2, max_bad_fraction=1.0).train_dataloader())


@pytest.mark.filterwarnings("ignore:bad sample:UserWarning")
@pytest.mark.parametrize("mode", ["map", "stream"])
def test_a_batch_of_bad_samples_alone_repeats_the_last_good_one(mode: str, tmp_path: Path) -> None:
    shards(tmp_path, [8, 8])
    order = [int(b["indices"]) for b in make(tmp_path, "s-{000..001}.tar", mode=mode, batch_size=1).train_dataloader()]
    bad = tuple(order[5:7])
    shards(tmp_path, [8, 8], bad=bad)
    data = make(tmp_path, "s-{000..001}.tar", mode=mode, batch_size=1, max_bad_fraction=0.5)
    batches = list(data.train_dataloader())
    assert [int(b["indices"]) for b in batches] == order[:5] + [order[4]] * 2 + order[7:]
    assert all((b["images"][:, 0, 0, 0] == b["indices"]).all() for b in batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_changes_is_named_by_the_loader(workers: int, tmp_path: Path) -> None:
    paths = shards(tmp_path, [6, 6, 6, 6])
    data = make(tmp_path, "s-{000..003}.tar", num_workers=workers)
    loader = data.train_dataloader()
    shards(tmp_path, [6, 6, 5], name="other")
    shutil.copy(tmp_path / "other-002.tar", paths[2])
    assert "s-002.tar: gave 5 samples, its index says 6" in str(error_of(loader))


def test_a_fingerprint_needs_no_other_view_than_the_one_in_use(place: Path) -> None:
    options: dict[str, Any] = {"index": str(place / "index.json")}
    data = make(place, f"pipe:cat {place}/s-{{000..006}}.tar", mode="map", **options)
    data.dataset("train")
    piped = make(place, f"pipe:cat {place}/s-{{000..006}}.tar", **options)
    assert data.describe("train") == piped.describe("train")
