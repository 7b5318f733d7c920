"""What names shards, and the index beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from srcflow.data.shard_index import ShardIndex
from srcflow.data.shard_sources import Entry, ShardList, expand, find_entries, index_of, labels_of, read_index, write_index
from srcflow.errors import DataError, Problems

from .made_shards import shards


def test_patterns(tmp_path: Path) -> None:
    paths = shards(tmp_path, [1, 1, 1])
    assert expand(f"{tmp_path}/s-{{000..002}}.tar", "data.train") == paths
    assert expand(f"file://{tmp_path}/s-{{000..002}}.tar", "data.train") == paths
    assert expand(f"{tmp_path}/s-*.tar", "data.train") == paths
    assert expand([paths[2], paths[0]], "data.train") == [paths[2], paths[0]]
    remote = expand(["https://host/a-{00..01}.tar?k=v", "pipe:cat b-{0..1}.tar"], "data.train")
    assert remote == ["https://host/a-00.tar?k=v", "https://host/a-01.tar?k=v", "pipe:cat b-0.tar", "pipe:cat b-1.tar"]
    with pytest.raises(
        DataError,
        match=r"(?s)data.train: 5 of the shards.*s-003.tar: no such file.*s-004.tar.*none-\*.*s3://b/c.tar: no such scheme.*twice",
    ):
        expand([f"{tmp_path}/s-{{000..004}}.tar", f"{tmp_path}/none-*.tar", "s3://b/c.tar", paths[0]], "data.train")
    with pytest.raises(DataError, match="the list is empty"):
        expand([], "data.val")


def test_where_an_index_is_looked_for(tmp_path: Path) -> None:
    assert index_of("https://host/a/b.tar?key=1") == "https://host/a/index.json"
    assert index_of(str(tmp_path / "b.tar")) == f"{tmp_path}/index.json"
    assert index_of("pipe:cat /a/b.tar") is None


def test_an_index_is_merged_and_forgets_shards_that_are_gone(tmp_path: Path) -> None:
    train, val = shards(tmp_path, [2, 3]), shards(tmp_path, [1], name="val")
    write_index(tmp_path, [Entry("s-000.tar", 2, 10, "ab"), Entry("s-001.tar", 3)])
    write_index(tmp_path, [Entry("val-000.tar", 1)])
    assert json.loads((tmp_path / "index.json").read_text()) == {
        "wids_version": 1,
        "shardlist": [
            {"url": "s-000.tar", "nsamples": 2, "filesize": 10, "sha256": "ab"},
            {"url": "s-001.tar", "nsamples": 3},
            {"url": "val-000.tar", "nsamples": 1},
        ],
    }
    Path(train[0]).unlink()
    write_index(tmp_path, [Entry("val-000.tar", 7)])
    assert {e.url: e.nsamples for e in read_index(str(tmp_path / "index.json")).values()} == {"s-001.tar": 3, "val-000.tar": 7}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.json", "s-001.tar", Path(val[0]).name]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"shardlist": [{"url": "a"}]}', '{"shardlist": [{"url": "a", "nsamples": "3"}]}', '{"shardlist": [3]}',
     '{"shardlist": [{"url": "a", "nsamples": 1}, {"url": "a", "nsamples": 1}]}', '{"shardlist": [{"url": "a", "nsamples": 1e30}]}',
     '{"shardlist": [{"url": "a", "nsamples": 1' + 30 * "0" + "}]}", '{"shardlist": [{"url": "a", "nsamples": -3}]}',
     '{"shardlist": [{"url": "a", "nsamples": 3.0}]}', '{"shardlist": [{"url": "a", "nsamples": true}]}', '{"shardlist": {"a": 1}}',
     '{"shardlist": [{"url": "a", "nsamples": 3, "filesize": "1 GB"}]}', '{"shardlist": [{"url": "a", "nsamples": 3, "filesize": -1}]}',
     '{"shardlist": [{"url": "a", "nsamples": 3, "sha256": 7}]}', '{"shardlist": [{"url": "a", "nsamples": 3, "labels": [3]}]}',
     '{"shardlist": [{"url": "a", "nsamples": 3, "labels": {"cat": 3}}]}',
     '{"shardlist": [{"url": "a", "nsamples": 3, "labels": {"0": 2}}]}',
     '{"shardlist": [{"url": "a", "nsamples": 3, "labels": {"-1": 3}}]}', 100_000 * "[", "not JSON", "\x00"],
)  # fmt: skip
def test_what_is_no_index_is_refused(content: str, tmp_path: Path) -> None:
    place = tmp_path / "index.json"
    place.write_text(content)
    with pytest.raises(DataError, match=r"index.json: is not an index of shards"):
        read_index(str(place))
    with pytest.raises(DataError, match="is not an index"):
        write_index(tmp_path, [])
    assert place.read_text() == content


def test_everything_that_an_index_has_against_shards_is_collected(tmp_path: Path) -> None:
    local = shards(tmp_path, [2, 3, 1])
    size = Path(local[0]).stat().st_size
    write_index(tmp_path, [Entry("s-000.tar", 2, size), Entry("s-001.tar", 3, size + 1)])
    problems = Problems()
    found = find_entries([*local, "pipe:cat x.tar"], None, "data.train", problems)
    assert sorted(found) == local[:2]
    (problem,) = problems.found
    assert f"s-001.tar: has {Path(local[1]).stat().st_size} bytes" in str(problem)
    assert "pipe:cat x.tar: has no index" in str(problem)
    assert "data.index" in str(problem)

    problems = Problems()
    index = str(tmp_path / "index.json")
    assert find_entries(["pipe:cat /elsewhere/s-000.tar", "pipe:gone s-009.tar"], index, "data.train", problems).keys() == {
        "pipe:cat /elsewhere/s-000.tar"
    }
    assert [f"pipe:gone s-009.tar: is not in {index}" in str(p) for p in problems.found] == [True]

    problems = Problems()
    assert find_entries(["pipe:cat a.tar", "pipe:cat b.tar"], str(tmp_path / "none.json"), "data.val", problems) == {}
    assert ["none.json: cannot be opened" in str(p) for p in problems.found] == [True]

    with pytest.raises(DataError, match=r"s-002.tar: holds 1 samples, its index says 2"):
        ShardIndex.scan(local, {local[2]: 2, local[0]: 2})


def test_one_shard_under_two_names_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the same file, or as one entry of an index that goes by file names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s-0.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of the shards .*\n  \./s-0\.tar: named twice, also as s-0\.tar"):
        expand(["s-0.tar", "./s-0.tar"], "data.train")
    with pytest.raises(DataError, match=r"1 of the shards .*\n  s-0\.tar: named twice$"):
        expand(["s-0.tar", "s-0.tar", "s-0.tar"], "data.train")
    write_index(tmp_path, [Entry("s-0.tar", 3, 0)])
    problems = Problems()
    find_entries(["https://host/a/s-0.tar", "https://host/b/s-0.tar"], str(tmp_path / "index.json"), "data.train", problems)
    with pytest.raises(DataError, match=r"b/s-0\.tar: .*index\.json has one entry, s-0\.tar, for it and for https://host/a/s-0\.tar"):
        problems.raise_if_any()


def test_more_samples_than_bytes_are_refused(tmp_path: Path) -> None:
    (path,) = shards(tmp_path, [2])
    write_index(tmp_path, [Entry("s-000.tar", 10**9, Path(path).stat().st_size)])
    for urls in ([path], [f"pipe:cat {path}"]):
        problems = Problems()
        find_entries(urls, str(tmp_path / "index.json"), "data.train", problems)
        with pytest.raises(DataError, match=r"s-000\.tar: 1000000000 samples, as .*index\.json says, do not fit into \d+ bytes"):
            problems.raise_if_any()


def test_labels_in_an_index(tmp_path: Path) -> None:
    first, second = shards(tmp_path, [12, 3])
    entries = [Entry("s-000.tar", 12, labels=labels_of(first)), Entry("s-001.tar", 3)]
    write_index(tmp_path, entries)
    known = read_index(str(tmp_path / "index.json"))
    assert known["s-000.tar"] == entries[0]
    assert known["s-000.tar"].labels == {0: 2, 1: 2, **dict.fromkeys(range(2, 10), 1)}
    assert known["s-001.tar"].labels is None
    assert ShardList.of([first, second], {first: entries[0], second: entries[1]}).labels is None
    whole = {first: entries[0], second: Entry("s-001.tar", 3, labels=labels_of(second))}
    assert ShardList.of([first, second], whole).labels == {i: 2 if i < 5 else 1 for i in range(10)}
    assert ShardList.of([first, second], whole).fingerprint() == ShardList.of([first, second], {**whole, second: entries[1]}).fingerprint()
    shards(tmp_path, [11])
    write_index(tmp_path, [Entry("s-000.tar", 11)])  # what was recorded before is counted anew
    assert read_index(str(tmp_path / "index.json"))["s-000.tar"].labels == {0: 2, **dict.fromkeys(range(1, 10), 1)}
    with pytest.raises(DataError, match=r"s-000\.tar: a/0009: label 9 is not in 0 \.\. 8"):
        labels_of(first, 9)


def test_brackets_in_names_of_folders_stand_for_themselves(tmp_path: Path) -> None:
    """Where there is such a folder; a pattern for characters is what they are otherwise."""
    odd = tmp_path / "photos [v2]" / "part*"
    odd.mkdir(parents=True)
    paths = shards(odd, [1, 1, 1])
    for pattern in (f"{odd}/s-*.tar", f"{odd}/s-{{000..002}}.tar", f"{tmp_path}/photos [v2]/*/s-*.tar"):
        assert expand(pattern, "data.val") == paths
    assert expand(f"{odd}/s-00[12].tar", "data.val") == paths[1:]
    (tmp_path / "a1").mkdir()
    (other,) = shards(tmp_path / "a1", [1])
    assert expand(f"{tmp_path}/a[123]/s-*.tar", "data.val") == [other]
    with pytest.raises(DataError, match=r"s-003\.tar: no such file"):
        expand(f"{odd}/s-003.tar", "data.val")
    with pytest.raises(DataError, match=r"b\[12\]/\*\.tar: matches no file \(\[\.\.\.\] is a pattern .*write \[\[\]"):
        expand(f"{tmp_path}/b[12]/*.tar", "data.val")
