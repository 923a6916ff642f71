"""On one rank gradients in bf16 are added at once: to the very sums that DeepSpeed makes through its buckets."""

import pytest
from launch import rows

pytestmark = pytest.mark.process


def refuse_buckets():
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    def average_tensor(self, *arguments):
        raise AssertionError("a gradient went through a bucket")

    DeepSpeedZeroOptimizer.average_tensor = average_tensor


def leave_deepspeed_as_it_is():
    from nsa_train.parallel import one_rank

    one_rank.add_gradients_at_once = lambda zero: None


def test_sums_are_bitwise_those_of_deepspeed(train, tmp_path):
    found = []
    for before in (refuse_buckets, leave_deepspeed_as_it_is):
        runs = tmp_path / before.__name__
        job = train("trainer.dtype=bf16", "trainer.steps=4", "optim.clip=0.2", runs=runs, before=before)
        assert job.wait() == 0, job.text
        found.append(rows(runs / "run"))
    at_once, buckets = found
    assert len(at_once) >= 4
    assert at_once == buckets


def test_buckets_would_be_seen(train, tmp_path):
    job = train("trainer.dtype=fp32", "trainer.steps=1", before=refuse_buckets)
    assert job.wait() != 0
    assert "went through a bucket" in job.text
