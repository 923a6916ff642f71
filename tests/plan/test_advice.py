"""What to change where a run does not fit a GPU: it fits then, and nothing that comes before it does."""

from dataclasses import replace
from itertools import combinations

import pytest

from nsa_train.config.load import load_config
from nsa_train.plan.advice import GIB, first_that_fits, largest_part, need, room
from nsa_train.plan.report import Machine, plan
from nsa_train.plan.speed import GPUS

H100 = GPUS["h100"]
# In the order of the advice, each with all its values, for runs of 32 rows.
CHOICES = [
    [f"trainer.micro_rows={rows}" for rows in (16, 8, 4, 2, 1)], ["trainer.activation_checkpointing=true"],
    ["parallel=zero3"], [f"gpus={ranks}" for ranks in (2, 4, 8, 16, 32)], ["parallel.offload_optimizer=cpu"],
    [f"trainer.loss_chunk_tokens={tokens}" for tokens in (2048, 1024, 512)],
]  # fmt: skip


def needed(options, words, ranks=1):
    """Bytes, from the words as a person would type them."""
    machine, overrides = Machine.parse([*options, *words])
    return need(load_config(overrides), *(machine.gpus or (ranks,))).total


def first_of_all(options, gpu, ranks=1):
    """Trying all changes of at most two keys, one after another."""
    tries = [(word,) for words in CHOICES for word in words]
    tries += [(a, b) for one, other in combinations(CHOICES, 2) for a in one for b in other]
    return next((words for words in tries if needed(options, words, ranks) <= room(gpu)), None)


@pytest.mark.parametrize(
    ("options", "gib"),
    [
        *((["experiment=r1", "trainer.micro_rows=32"], gib) for gib in (30, 12, 8)),
        (["experiment=m", "trainer.batch_rows=32"], 35),
        (["experiment=paper_27b", "trainer.batch_rows=32", "trainer.micro_rows=32"], 120),
    ],
    ids=str,
)
def test_the_advice_is_the_first_of_all_that_fit(options, gib):
    gpu, config = replace(H100, memory_gib=gib), load_config(options)
    assert need(config, 1).total > room(gpu)
    found, wanted = first_that_fits(config, 1, gpu), first_of_all(options, gpu)
    assert needed(options, found.words) == need(found.config, found.ranks).total <= room(gpu)
    assert wanted in (found.words, None)
    assert wanted or len(found.words) > 2


def test_rows_are_made_fewer_one_divisor_at_a_time():
    config = load_config(["experiment=r1", "trainer.batch_rows=12", "trainer.micro_rows=4"])
    gpu = replace(H100, memory_gib=need(config, 1).total / GIB + 1.9)
    assert first_that_fits(config, 1, gpu).words == ("trainer.micro_rows=3",)


def test_what_fits_needs_no_advice_and_what_cannot_fit_gets_none():
    assert "fits 1 x h100" in plan(load_config(["experiment=r1"]), Machine(gpus=(1,)))
    assert "no key makes it fit" in plan(
        load_config(["experiment=paper_27b", "trainer.batch_rows=1", "model.layers=200"]), Machine(gpus=(1,))
    )


def test_the_report_names_the_largest_part_and_the_change():
    config = load_config(["experiment=m", "trainer.micro_rows=32"])
    found, change = need(config, 1), first_that_fits(config, 1, H100)
    part, size = largest_part(found)
    assert size == max(*found.states.values(), *found.kept.values(), *found.passing.values())
    text = plan(config, Machine(gpus=(1,)))
    assert f"largest: {part}, {size / GIB:.1f} GiB. {' '.join(change.words)} fits, with" in text
