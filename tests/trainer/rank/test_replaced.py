"""Damaged samples of all ranks in one list of the run, and counted together."""

import pytest

from data.storage.location import DataError
from data.stream.batches import BadSampleLimit, Replaced
from tests.launch import run_ranks
from trainer.engine.ranks import Ranks
from trainer.rank.replaced import FILE_NAME, ReplacedSamples
from trainer.tracking.tracker import NullTracker


def bad(number: int) -> Replaced:
    return Replaced("00000.tar", "next", f"shard 00000.tar, key {number}: the image is damaged")


@pytest.fixture
def ranks():
    joined = Ranks.join("cpu", 60)
    yield joined
    joined.leave()


def test_each_is_named_once_in_the_file_however_often_it_is_met_and_after_a_restart(ranks, tmp_path):
    for first in (0, 1):
        samples = ReplacedSamples(tmp_path, ranks, BadSampleLimit(max_percent=100, num_samples=10))
        for _ in range(3):
            samples.note([bad(first), bad(first + 1)])
            samples.publish(NullTracker())
    assert (tmp_path / FILE_NAME).read_text().splitlines() == [str(bad(number)) for number in range(3)]


def test_file_that_cannot_be_written_ends_no_run_but_too_many_samples_do(ranks, tmp_path):
    samples = ReplacedSamples(tmp_path / "none", ranks, BadSampleLimit(max_percent=10, num_samples=10))
    samples.note([bad(0)])
    samples.publish(NullTracker())
    samples.note([bad(1)])
    with pytest.raises(DataError, match=r"2 of 10 samples are unusable, more than data\.max_bad_percent of 10"):
        samples.publish(NullTracker())


RANK = """
import sys
from pathlib import Path
from data.stream.batches import BadSampleLimit, Replaced
from data.storage.location import DataError
from trainer.engine.ranks import Ranks
from trainer.rank.replaced import ReplacedSamples
from trainer.tracking.tracker import NullTracker
ranks = Ranks.join("cpu", 60)
samples = ReplacedSamples(Path(sys.argv[1]), ranks, BadSampleLimit(max_percent=2, num_samples=100))
samples.note([Replaced("s.tar", "next", f"key {number} is bad") for number in (0, 1 + ranks.rank)])
try:
    samples.publish(NullTracker())
except DataError as error:
    Path(sys.argv[1], f"rank-{ranks.rank}").write_text(str(error))
ranks.leave()
"""


@pytest.mark.slow
@pytest.mark.multirank
def test_ranks_that_are_each_below_the_limit_end_the_run_together_when_their_sum_is_not(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    done = run_ranks(2, [str(script), str(tmp_path)], timeout_s=60)
    assert done.returncode == 0, done.stderr
    said = [(tmp_path / f"rank-{rank}").read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert said[0].startswith("at least 3 of 100 samples are unusable, more than data.max_bad_percent of 2 allows: key")
    assert len((tmp_path / FILE_NAME).read_text().splitlines()) == 3
