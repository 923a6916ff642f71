"""What to change where a run does not fit a GPU: it fits then, and nothing that comes before it does."""

from dataclasses import replace
from itertools import combinations

import pytest

from nsa_train.config.load import load_config
from nsa_train.plan.advice import GIB, Run, first_that_fits, largest_part, need, recomputation, room
from nsa_train.plan.report import Machine, plan
from nsa_train.plan.speed import GPUS, run_seconds

H100 = GPUS["h100"]
OFF, ON = (f"trainer.activation_checkpointing={on}" for on in ("false", "true"))
MLP, ATTENTION = (f"trainer.recomputed=[{part}]" for part in ("mlp", "attention"))


def choices_of(options):
    """In the order of the advice, each with all its values, for runs of 32 rows."""
    one, other = ((ON, words) for words in (MLP, ATTENTION))
    quick = sorted([one, other], key=lambda words: run_seconds(load_config([*options, *words]), "h100", 1))
    singles = [
        [f"trainer.micro_rows={rows}" for rows in (16, 8, 4, 2, 1)], ["parallel=zero3"],
        [f"gpus={ranks}" for ranks in (2, 4, 8, 16, 32)], ["parallel.offload_optimizer=cpu"],
        [f"trainer.loss_chunk_tokens={tokens}" for tokens in (2048, 1024, 512)],
    ]  # fmt: skip
    rows, *others = ([(word,) for word in words] for words in singles)
    return [rows, [*quick, (ON,)], *others]


@pytest.fixture
def smaller(monkeypatch):
    """Makes an H100 have so much memory."""

    def make(gib):
        gpu = replace(H100, memory_gib=gib)
        monkeypatch.setitem(GPUS, "h100", gpu)
        return gpu

    return make


def needed(options, words, ranks=1):
    """Bytes, from the words as a person would type them."""
    machine, overrides = Machine.parse([*options, *words])
    return need(load_config(overrides), *(machine.gpus or (ranks,))).total


def first_of_all(options, gpu, ranks=1):
    """Trying all changes of at most two keys, one after another."""
    choices = choices_of(options)
    tries = [words for choice in choices for words in choice]
    tries += [(*a, *b) for one, other in combinations(choices, 2) for a in one for b in other]
    return next((words for words in tries if needed(options, words, ranks) <= room(gpu)), None)


@pytest.mark.parametrize(
    ("options", "gib"),
    [
        *((["experiment=r1", "trainer.batch_rows=32", "trainer.micro_rows=32"], gib) for gib in (30, 12, 8)),
        (["experiment=m", "trainer.batch_rows=32"], 35),
        (["experiment=paper_27b", "trainer.batch_rows=32", "trainer.micro_rows=32", OFF], 120),
    ],
    ids=str,
)
def test_the_advice_is_the_first_of_all_that_fit(options, gib, smaller):
    gpu, config = smaller(gib), load_config(options)
    assert need(config, 1).total > room(gpu)
    found, wanted = first_that_fits(config, 1, "h100"), first_of_all(options, gpu)
    assert needed(options, found.words) == need(found.config, found.ranks).total <= room(gpu)
    assert wanted in (found.words, None)
    assert wanted or len(found.words) > 2


@pytest.mark.parametrize(
    ("options", "order"),
    [
        (["experiment=m", "trainer.seq_len=65536"], [(ON, MLP), (ON, ATTENTION), (ON,)]),  # attention grows with rows
        (["experiment=m", "attention=full", "trainer.seq_len=1024"], [(ON, ATTENTION), (ON, MLP), (ON,)]),
        (["experiment=m", ON, MLP], [(ATTENTION,), ("trainer.recomputed=[attention,mlp]",)]),
        (["experiment=m", ON], []),
    ],
    ids=str,
)
def test_what_costs_least_time_to_recompute_is_tried_first(options, order):
    assert [run.words for run in recomputation(Run(load_config(options), 1, "h100"))] == order


def test_rows_are_made_fewer_one_divisor_at_a_time(smaller):
    config = load_config(["experiment=r1", "trainer.batch_rows=12", "trainer.micro_rows=4"])
    smaller(need(config, 1).total / GIB + 1.9)
    assert first_that_fits(config, 1, "h100").words == ("trainer.micro_rows=3",)


def test_what_fits_needs_no_advice_and_what_cannot_fit_gets_none():
    assert "fits 1 x h100" in plan(load_config(["experiment=r1"]), Machine(gpus=(1,)))
    assert "no key makes it fit" in plan(
        load_config(["experiment=paper_27b", "trainer.batch_rows=1", "model.layers=200"]), Machine(gpus=(1,))
    )


def test_the_report_names_the_largest_part_and_the_change():
    config = load_config(["experiment=m", "trainer.micro_rows=32"])
    found, change = need(config, 1), first_that_fits(config, 1, "h100")
    part, size = largest_part(found)
    assert size == max(*found.states.values(), *found.kept.values(), *found.passing.values())
    text = plan(config, Machine(gpus=(1,)))
    assert f"largest: {part}, {size / GIB:.1f} GiB. {' '.join(change.words)} fits, with" in text
