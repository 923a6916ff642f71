"""A DeepSpeed that scales gradients wrongly is found before the first step."""

from functools import partial

import pytest
from launch import summary

pytestmark = pytest.mark.process


def scale_losses(factor):
    """As releases did that forgot, or divided twice by, the number of processes or of micro-batches."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    backward = DeepSpeedEngine.backward
    DeepSpeedEngine.backward = lambda self, loss, *rest, **named: backward(self, loss * factor, *rest, **named)


@pytest.mark.parametrize(("layout", "factor"), [("zero1", 2), ("zero2", 0.5), ("zero3", 1.001)])
def test_a_wrong_scale_stops_every_process_before_training(layout, factor, train_ranks, tmp_path):
    jobs = train_ranks(2, f"parallel={layout}", before=partial(scale_losses, factor))
    assert [job.wait() for job in jobs] == [2, 2], jobs[0].text
    assert "gives a tiny layer the gradient norm" in jobs[0].text
    assert "Traceback" not in "".join(job.text for job in jobs)
    assert summary(tmp_path / "run")["exit_code"] == 2
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_rounding_in_bf16_is_no_wrong_scale(train):
    job = train("trainer.dtype=bf16", "trainer.steps=1", "trainer.micro_rows=1", "parallel.reduce_dtype=bf16")
    assert job.wait() == 0, job.text
