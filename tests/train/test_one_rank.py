"""On one rank gradients in bf16 are added at once: to the very sums that DeepSpeed makes through its buckets."""

import pytest
from launch import contents, rows, spoil_losses

pytestmark = pytest.mark.process


def refuse_buckets():
    spoil_losses([0], [2])
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    def average_tensor(self, *arguments):
        raise AssertionError("a gradient went through a bucket")

    DeepSpeedZeroOptimizer.average_tensor = average_tensor


def leave_deepspeed_as_it_is():
    spoil_losses([0], [2])
    from nsa_train.parallel import one_rank

    one_rank.add_gradients_at_once = lambda zero: None


def weights_and_moments(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(
    "words", [[], ["model.tied_embeddings=true", "trainer.activation_checkpointing=true"]], ids=["plain", "tied"]
)
def test_sums_are_bitwise_those_of_deepspeed(words, train, tmp_path):
    """Over two micro-batches and a step that is skipped."""
    found = []
    for before in (refuse_buckets, leave_deepspeed_as_it_is):
        runs = tmp_path / before.__name__
        job = train("trainer.dtype=bf16", "trainer.steps=4", "optim.clip=0.2", *words, runs=runs, before=before)
        assert job.wait() == 0, job.text
        found.append((rows(runs / "run"), weights_and_moments(runs / "run" / "checkpoints" / "step_4")))
    (at_once, state), (buckets, their_state) = found
    assert [row["skipped"] for row in at_once if row["split"] == "train"] == [False, True, False, False]
    assert at_once == buckets
    assert len(state) > 1
    assert state == their_state


def test_buckets_would_be_seen(train, tmp_path):
    job = train("trainer.dtype=fp32", "trainer.steps=1", before=refuse_buckets)
    assert job.wait() != 0
    assert "went through a bucket" in job.text
