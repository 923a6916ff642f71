"""A training run says once how it compares with its plan, where the kind of its GPU is known."""

import re
from functools import partial

import launch
import pytest

from nsa_train.plan.check import STEPS
from nsa_train.plan.speed import GPUS

pytestmark = pytest.mark.process
LONG = ["trainer.dtype=bf16", f"trainer.steps={2 * STEPS + 2}", "trainer.val_every=100", "trainer.checkpoint_every=25"]
LINE = r"^step +(\d+): [\d,]+ tok/s, planned [\d,]+; peak \d+\.\d GiB, planned \d+\.\d$"


def test_it_is_said_once_a_launch_and_leaves_the_metrics_alone(train, tmp_path):
    name = partial(launch.name_device, GPUS["h100"].name)
    first = train(*LONG, before=name)
    assert first.wait() == 0, first.text
    assert re.findall(LINE, first.text, re.MULTILINE) == [str(STEPS)]
    assert not any("seconds" in row for row in launch.rows(tmp_path / "run"))
