"""How the keys of samples become columns of batches."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from srcflow.data.batches import Bad, BadSamples, Sample, as_batch, as_training_batch, collate, collate_tolerantly, join
from srcflow.data.rules import BUILT_IN, Drop, Keep, Pad, Rule, Rules, Stack, rules_of
from srcflow.errors import ConfigError, DataError
from srcflow.types import Batch

RULES = Rules({"caption": Keep(), "words": Pad(mask="real", value=-1), "size": Stack(), "path": Drop()})


def sample(i: int, bad: bool = False, **more: Any) -> Sample:
    """Sample i has i % 4 words, which may be none."""
    own: dict[str, Any] = {"image": torch.full((3, 2, 2), i, dtype=torch.uint8), "label": i, "index": i, "valid": True, "flipped": False}
    if bad:
        return {**own, "error": f"{i} is damaged"}  # type: ignore[return-value, typeddict-item]
    words = torch.arange(i % 4 * 2, dtype=torch.float32).reshape(-1, 2) + 10 * i
    return {**own, "caption": f"number {i}", "words": words, "size": np.array([i, 2 * i]), "path": f"/{i}", **more}  # type: ignore[return-value, typeddict-item]


def plain(batch: Any) -> dict[str, Any]:
    return {k: (v.dtype, v.tolist()) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def test_each_key_by_its_rule() -> None:
    batch: Any = collate([sample(3), sample(4), sample(1)], RULES)
    assert batch["caption"] == ["number 3", "number 4", "number 1"]
    assert batch["words"].tolist() == [[[30, 31], [32, 33], [34, 35]], [[-1, -1]] * 3, [[10, 11], [-1, -1], [-1, -1]]]
    assert batch["real"].tolist() == [[True, True, True], [False] * 3, [True, False, False]]
    assert batch["size"].tolist() == [[3, 6], [4, 8], [1, 2]]
    assert {batch["words"].dtype, batch["real"].dtype, batch["size"].dtype} == {torch.float32, torch.bool, torch.int64}
    assert set(batch) == {"images", "labels", "indices", "valid", "flipped", "caption", "words", "real", "size"}


def test_features_of_samples_need_no_declaration() -> None:
    one = {"features": torch.ones(2, 3), "deviation": torch.zeros(2, 3), "grid": (1, 2)}
    bare = [{k: v for k, v in sample(i).items() if k in ("image", "label", "index", "valid", "flipped")} | one for i in range(2)]
    batch = collate(bare)  # type: ignore[arg-type]
    assert batch["features"].shape == batch["deviation"].shape == (2, 2, 3)
    assert batch["grid"] == (1, 2)
    with pytest.raises(DataError, match=r"'grid': \(1, 2\) and \(2, 1\) in one batch"):
        collate([bare[0], {**bare[1], "grid": (2, 1)}])  # type: ignore[list-item]


def test_numbers_and_flags_are_stacked_with_their_types() -> None:
    rules = Rules({"score": Stack(), "count": Stack(), "sure": Stack()})
    own = [{k: v for k, v in sample(i).items() if k not in ("caption", "words", "size", "path")} for i in range(2)]
    batch: Any = collate([{**s, "score": 0.5, "count": i, "sure": i == 1} for i, s in enumerate(own)], rules)  # type: ignore[list-item, typeddict-unknown-key]
    assert (batch["score"].tolist(), batch["count"].tolist(), batch["sure"].tolist()) == ([0.5, 0.5], [0, 1], [False, True])
    assert (batch["score"].dtype, batch["count"].dtype, batch["sure"].dtype) == (torch.float32, torch.int64, torch.bool)


def test_a_key_without_a_rule_is_refused() -> None:
    for make in (collate, collate_tolerantly):
        with pytest.raises(DataError, match=r"key 'mood' of sample 2 has no rule.*\{'mood': Keep\(\)\}, or Stack\(\), Pad\(\), Drop\(\)"):
            make([sample(2, mood="good"), sample(3)], RULES)
        with pytest.raises(DataError, match=r"key 'mood' of sample 3 has no rule"):
            make([sample(2), sample(3, mood="good")], RULES)
        with pytest.raises(DataError, match=r"key 'caption' of sample 2 has no rule"):
            make([sample(2)])
    with pytest.raises(DataError, match=r"key 'mood' has no rule"):
        as_batch({**collate([sample(1)], RULES), "mood": [1]}, RULES)


def test_a_batch_made_by_its_data_set_loses_what_is_dropped() -> None:
    whole: Any = {**collate([sample(1)], RULES), "path": ["/1"]}
    for make in (as_batch, as_training_batch):
        assert "path" not in make(whole, RULES)
    assert as_batch(collate([sample(1)], RULES), RULES)["caption"] == ["number 1"]  # type: ignore[typeddict-item]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": np.array([1, 2, 3])}, r"'size': values of shapes \(2,\) and \(3,\) cannot be stacked.*Pad\(\)"),
        ({"size": np.array([1.0, 2.0])}, r"'size': values of torch.int64 and torch.float64"),
        ({"size": "large"}, r"'size': a value of type str is not a tensor, array or number. Declare Keep\(\)"),
        ({"words": torch.ones(2, 3)}, r"'words': values of shapes \(2, 2\) and \(2, 3\) cannot be padded"),
        ({"words": torch.ones(())}, r"'words': values of shapes .* cannot be padded"),
        ({"words": torch.ones(1, 2).half()}, r"'words': values of torch.float32 and torch.float16"),
    ],
)
def test_values_that_their_rule_does_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        collate([sample(2), {**sample(3), **change}], RULES)  # type: ignore[list-item, typeddict-item]


def test_all_samples_of_a_batch_have_the_same_keys() -> None:
    less: Any = sample(5)
    del less["caption"]
    for pair, have, lack in (([sample(4), less], 4, 5), ([less, sample(4)], 4, 5)):
        with pytest.raises(DataError, match=rf"'caption': sample {have} has it, sample {lack} of the same batch does not"):
            collate(pair, RULES)
    with pytest.raises(DataError, match=r"'caption': some parts of a batch have it"):
        join([collate_tolerantly([sample(4)], RULES), collate_tolerantly([less], RULES)], rules=RULES)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"images": Stack()}, "rules.images = 'images': stands for something else"),
        ({"image": Keep()}, "rules.image = 'image'"),
        ({"a": Pad(mask="valid")}, "rules.a = 'valid'"),
        ({"a": Pad(mask="b"), "b": Stack()}, "rules.a = 'b'"),
        ({"b": Stack(), "a": Pad(mask="b")}, "rules.a = 'b'"),
        ({"a": Pad(mask="m"), "b": Pad(mask="m")}, "rules.b = 'm'"),
        ({"a": Pad(mask="a")}, "rules.a = 'a'"),
        ({"a b": Stack()}, "rules.a b = 'a b': a batch's key is a name"),
        ({"a": "stack"}, r"rules.a = 'stack': is not a rule. Write Stack\(\)"),
        ({"a": Stack}, r"rules.a = <class .*is not a rule"),
    ],
)
def test_rules_that_cannot_be(declared: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Rules(declared)


def test_a_later_declaration_takes_the_place_of_an_earlier_one() -> None:
    class Data:
        rules: Mapping[str, Rule] = {"caption": Keep(), "size": Stack()}

    rules = rules_of(Data(), {"caption": Drop()})
    assert isinstance(rules.extra["caption"], Drop)
    assert isinstance(rules.extra["size"], Stack)
    assert rules_of(object()) is BUILT_IN
    copy = pickle.loads(pickle.dumps(RULES))  # as a spawned worker gets it
    assert plain(collate([sample(2), sample(3)], copy)) == plain(collate([sample(2), sample(3)], RULES))


# --- parts and damaged samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(2, 5), (1, 7), (0, 8), (3, 4)])
def test_joined_parts_are_the_batch_of_all_samples(cuts: tuple[int, int]) -> None:
    """Parts have paddings of their own lengths; a part of nothing but samples without words has length 0."""
    samples = [sample(i) for i in (4, 1, 8, 3, 2, 0, 7, 5)]
    shares = [samples[: cuts[0]], samples[cuts[0] : cuts[1]], samples[cuts[1] :]]
    joined, bad = join([collate_tolerantly(s, RULES) for s in shares if s], rules=RULES)
    assert plain(joined) == plain(collate(samples, RULES))
    assert bad == []


def mended(samples: list[Sample], cuts: list[int], bad_samples: BadSamples) -> Batch:
    shares = [collate_tolerantly(samples[a:b], RULES) for a, b in zip([0, *cuts], [*cuts, len(samples)], strict=True)]
    batch, bad = join(shares, rules=RULES)
    return bad_samples.mend(batch, bad, epoch=0, samples=100)


@pytest.mark.filterwarnings("ignore:bad sample:UserWarning")
@pytest.mark.parametrize("cuts", [[], [2], [1, 2, 4]])
def test_a_damaged_sample_takes_all_keys_of_its_replacement(cuts: list[int]) -> None:
    """However the batch was divided: parts 1 and 3 of the last division have nothing that decodes."""
    samples = [sample(2), sample(90, bad=True), sample(1), sample(91, bad=True), sample(4), sample(92, bad=True)]
    wanted = plain(collate([sample(i) for i in (2, 1, 1, 4, 4, 2)], RULES))
    assert plain(mended(samples, cuts, BadSamples(1.0, RULES))) == wanted


@pytest.mark.filterwarnings("ignore:bad sample:UserWarning")
@pytest.mark.parametrize("cuts", [[], [1]])
def test_a_batch_in_which_nothing_decodes_repeats_the_last_sample_before_it(cuts: list[int]) -> None:
    bad_samples = BadSamples(1.0, RULES)
    mended([sample(3), sample(1)], [], bad_samples)
    batch = mended([sample(90, bad=True), sample(91, bad=True)], cuts, bad_samples)
    assert plain(batch) == plain(collate([sample(1), sample(1)], RULES))  # with its own length, not that of its batch
    with pytest.raises(DataError, match="no good one before them"):
        mended([sample(93, bad=True)], [], BadSamples(1.0, RULES))


@pytest.mark.filterwarnings("ignore:bad sample:UserWarning")
def test_the_spare_sample_does_not_change_with_its_batch() -> None:
    bad_samples = BadSamples(1.0, RULES)
    before: Any = mended([sample(3), sample(1)], [], bad_samples)
    before["words"].fill_(7)
    before["size"].fill_(7)
    batch = mended([sample(90, bad=True)], [], bad_samples)
    assert plain(batch) == plain(collate([sample(1)], RULES))


def test_a_grid_is_not_taken_for_rows() -> None:
    """Pinned memory holds it as a list."""
    rows = {"features": torch.arange(2.0).reshape(2, 1, 1), "grid": [1, 2], "indices": torch.arange(2)}
    bad: Bad = [(0, "damaged")]
    with pytest.warns(UserWarning, match="bad sample 1"):
        batch = BadSamples(1.0).mend(rows, bad, epoch=0, samples=9)  # type: ignore[arg-type]
    assert batch["grid"] == [1, 2]  # type: ignore[comparison-overlap]
    assert batch["features"].flatten().tolist() == [1, 1]
