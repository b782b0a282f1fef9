"""Samples that cannot be used: others stand in for them, the same for any rank, and too many end the run."""

from itertools import islice

import pytest
import torch

from data.shards.index import ShardIndex
from data.storage.location import DataError
from tests.data.damage import change_label, damage, key_of
from tests.data.streams import keys, same, stream, take


@pytest.mark.slow
@pytest.mark.parametrize("loader_workers", [0, 2])
def test_bad_sample_is_replaced_by_the_next_good_one_of_its_shard_and_named(
    own_copy: ShardIndex, loader_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    good = take(20, stream(own_copy))
    first, second, last = damage(own_copy, (4, 2), (4, 3), (6, 4))
    stands_in = {first: key_of(own_copy, 4, 4), second: key_of(own_copy, 4, 4), last: key_of(own_copy, 6, 0)}
    caplog.clear()
    found = take(20, stream(own_copy, loader_workers=loader_workers))
    assert keys(found) == [tuple(stands_in.get(key, key) for key in batch.keys) for batch in good]
    pixels = {key: image for batch in good for key, image in zip(batch.keys, batch.images, strict=True)}
    for batch in found:
        assert all(torch.equal(image, pixels[key]) for key, image in zip(batch.keys, batch.images, strict=True))
    # Each is met once in each of the two epochs, and named once in the log.
    reasons = [replaced.reason for batch in found for replaced in batch.replaced]
    assert len(reasons) == 6
    for shard, key in ((4, first), (4, second), (6, last)):
        words = f"shard 0000{shard}.tar, key {key}: the image is damaged"
        assert sum(words in reason for reason in reasons) == 2
        assert sum(words in line and f"key {stands_in[key]} is read" in line for line in caplog.messages) == 1


def test_replacements_are_the_same_from_any_batch_and_for_any_share(own_copy: ShardIndex) -> None:
    damage(own_copy, (0, 0), (0, 1), (3, 4))
    whole = take(24, stream(own_copy))
    assert same(take(10, stream(own_copy, first_batch=7)), whole[14:])
    halves = [take(12, stream(own_copy, share=share)) for share in ((0, 4), (4, 8))]
    assert [key for pair in zip(*halves, strict=True) for half in pair for key in half.keys] == [
        key for batch in whole for key in batch.keys
    ]


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_too_many_bad_samples_end_the_run_with_their_names(own_copy: ShardIndex, loader_workers: int) -> None:
    bad = damage(own_copy, (1, 0), (5, 3))
    # Two of forty are five per cent of an epoch.
    assert len(take(30, stream(own_copy, loader_workers=loader_workers, max_bad_percent=5))) == 30
    with stream(own_copy, loader_workers=loader_workers, max_bad_percent=4) as batches:
        with pytest.raises(DataError) as caught:
            list(islice(batches, 30))
        assert "2 of 40 samples are unusable" in str(caught.value)
        assert "more than data.max_bad_percent of 4 allows" in str(caught.value)
        assert all(key in str(caught.value) for key in bad)
        # It is over: a run must not continue.
        assert list(batches) == []


def test_shard_without_any_good_sample_is_an_error_in_its_place(own_copy: ShardIndex) -> None:
    good = take(10, stream(own_copy))
    whole_shard = damage(own_copy, *((2, number) for number in range(5)))
    place = next(number for number, batch in enumerate(good) if set(batch.keys) & set(whole_shard))
    with stream(own_copy) as batches:
        assert same(list(islice(batches, place)), good[:place])
        with pytest.raises(
            DataError, match=r"shard 00002\.tar, key .*; none of the 5 samples of this shard can be used"
        ):
            next(batches)


def test_sample_with_a_bad_label_is_replaced_by_the_next_good_one(version_1: ShardIndex) -> None:
    own_copy = version_1  # with offsets the label in the tar is not read
    good = take(10, stream(own_copy))
    garbage, outside = change_label(own_copy, 3, 1, b"\xff"), change_label(own_copy, 6, 4, b"7")
    stands_in = {garbage: key_of(own_copy, 3, 2), outside: key_of(own_copy, 6, 0)}
    found = take(10, stream(own_copy))
    assert keys(found) == [tuple(stands_in.get(key, key) for key in batch.keys) for batch in good]
    # The red channel is 200 times the label.
    assert all(torch.equal(batch.images[:, 0, 0, 0].long(), batch.labels * 200) for batch in found)
    reasons = sorted(replaced.reason for batch in found for replaced in batch.replaced)
    assert reasons[0].startswith(f"shard 00003.tar, key {garbage}: label b'\\xff' is no number")
    assert reasons[1].startswith(f"shard 00006.tar, key {outside}: label is 7, the index has 2 classes")
    assert len(reasons) == 2
