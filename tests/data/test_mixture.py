"""Claims about mixtures and stages: weights exact in every window, nothing repeated or skipped at a change."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import make_loader, stage

from nsa_train.bench.data import realistic_lengths
from nsa_train.config.load import load_config
from nsa_train.data.loader import NO_SOURCE
from nsa_train.data.mixture import Shares, groups_of
from nsa_train.data.stages import stages_of
from nsa_train.data.store import TokenStore
from nsa_train.errors import ConfigError, DataError

NAMES = ["books/a", "books/b", "code", "web"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Four sources, each token its own number modulo 50,000; source 2 has two thirds of the tokens."""
    lengths = np.minimum(realistic_lengths(400), 20_000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = (np.arange(offsets[-1]) % 50_000).astype(np.uint16)
    sources = np.random.default_rng(0).choice(4, len(lengths), p=[0.1, 0.1, 0.65, 0.15]).astype(np.int32)
    return TokenStore(
        tmp_path_factory.mktemp("none"), "train", {"hash": "x", "sources": NAMES}, tokens, offsets, sources
    )


# Shares ---------------------------------------------------------------------------------------------------------------

weights = st.lists(st.floats(0.001, 1), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(weights, st.integers(0, 10**7), st.integers(0, 3000))
def test_any_window_of_rows_has_each_stream_by_its_weight_to_within_three_rows(weights, start, size):
    shares = Shares(weights)
    begin, end = np.array(shares.counts(start)), np.array(shares.counts(start + size))
    wanted = size * np.array(weights) / sum(weights)
    assert (end - begin).sum() == size
    assert np.abs(end - begin - wanted).max() < 3


@settings(max_examples=50, deadline=None)
@given(weights)
def test_each_stream_counts_its_own_rows_without_a_gap(weights):
    shares, seen = Shares(weights), [0] * len(weights)
    for number in range(300):
        assert shares.counts(number) == seen
        stream, place = shares.place(number)
        assert place == seen[stream]
        seen[stream] += 1


# Mixtures -------------------------------------------------------------------------------------------------------------


def tokens_of_sources(loader, steps):
    """Counted in the batches."""
    found = np.zeros(len(NAMES), int)
    for step in steps:
        for batch in loader.micro_batches(step, 0, 1, 8):
            found += np.bincount(batch.sources[batch.sources != NO_SOURCE], minlength=len(NAMES))
    return found


def test_tokens_follow_the_weights_of_the_mixture_and_stay_in_their_proportion_inside_a_group(store):
    mixture = {"books/*": 0.5, "code": 0.2, "web": 0.3}
    loader = make_loader(store, stages=[stage(0, 1024, 16, **mixture)], max_documents=64)
    for first in (0, 57):
        found = tokens_of_sources(loader, range(first, first + 60))
        share = found / found.sum()
        assert share[:2].sum() == pytest.approx(0.5, abs=0.006)
        assert share[2:] == pytest.approx([0.2, 0.3], abs=0.006)
    sizes = np.bincount(store.sources, store.lengths)
    epochs = loader.epochs(2000)
    assert epochs["books/a"] == pytest.approx(epochs["books/b"], rel=0.02)
    read = {name: epochs[name] * sizes[i] for i, name in enumerate(NAMES)}
    assert read["code"] / sum(read.values()) == pytest.approx(0.2, abs=0.002)


def test_what_was_read_of_each_source_is_what_the_batches_held(store):
    stages = [stage(0, 512, 16, web=0.5, **{"*": 0.5}), stage(3, 2048, 4)]
    loader = make_loader(store, stages=stages, max_documents=64)
    for steps in (0, 1, 3, 5, 100):
        assert loader.tokens_read(steps).tolist() == tokens_of_sources(loader, range(steps)).tolist()


def test_a_source_with_weight_0_is_never_read(store):
    loader = make_loader(store, stages=[stage(0, 512, 16, code=0.0, **{"*": 1.0})])
    assert tokens_of_sources(loader, range(30))[2] == 0


def test_without_a_mixture_the_corpus_is_read_in_its_own_proportions(store):
    loader = make_loader(store, stages=[stage(0, 512, 16)])
    epochs = loader.epochs(10**6)
    assert list(epochs) == NAMES
    assert list(epochs.values()) == pytest.approx([epochs["code"]] * 4, rel=1e-3)


def test_the_fingerprint_tells_which_pattern_comes_first(store):
    """A source belongs to the first one that it fits."""
    mixtures = {"books/*": 0.6, "*b": 0.2, "code": 0.2}, {"*b": 0.2, "books/*": 0.6, "code": 0.2}
    one, other = (make_loader(store, stages=[stage(0, 512, 16, **mixture)]) for mixture in mixtures)
    assert tokens_of_sources(one, range(4)).tolist() != tokens_of_sources(other, range(4)).tolist()
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("copies", [1, 3])
def test_validation_ignores_the_mixture_and_copies_of_long_documents(store, copies):
    heldout = TokenStore(store.folder, "heldout", store.manifest, store.tokens, store.offsets, store.sources)
    loader = make_loader(
        heldout, stages=[stage(0, 512, 16, code=1.0, **{"*": 0.0})], packing="long", long_copies=copies
    )
    found = sum(np.bincount(b.sources[b.sources >= 0], minlength=4) for b in loader.sequential(10**6, 0, 1, 64))
    assert found.tolist() == np.bincount(store.sources, store.lengths).tolist()


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"code": 1.0, "musik": 0.5}, "data.mixture names musik, but the corpus has only books/a, books/b, code, web"),
        ({"code": 1.0, "web": 1.0}, "data.mixture has no weight for books/a, books/b; give one, 0 leaves"),
    ],
)
def test_a_mixture_that_does_not_fit_the_corpus_is_refused(mixture, message):
    with pytest.raises(DataError, match=message):
        groups_of(mixture, NAMES)


def test_the_comparison_reads_long_recall_in_its_long_stage_only():
    config = load_config(["experiment=r1", "data=comparison", "stages=comparison_32k"])
    (short,) = stages_of(load_config(["experiment=r1", "data=comparison"]))
    (long,) = stages_of(config)
    names = list(config.data.sources)
    read = [{group.name: group.weight for group in groups_of(stage.mixture, names)} for stage in (short, long)]
    assert all(sum(weights.values()) == pytest.approx(1) for weights in read)
    assert set(names) - set(read[0]) == {"linux_drivers", "recall_long"}
    assert set(names) - set(read[1]) == {"linux_drivers"}
    assert read[1]["recall"] + read[1]["recall_long"] == pytest.approx(0.5)
    assert (short.seq_len, long.seq_len) == (8192, 32768)


def test_a_group_smaller_than_a_row_is_refused(store):
    stages = [stage(0, 512, 8), stage(9, 131072, 1, **{"books/a": 0.1, "*": 0.9})]
    with pytest.raises(DataError, match=r"source books/a has \d+ tokens, less than one row of 131072"):
        make_loader(store, stages=stages)


# Stages ---------------------------------------------------------------------------------------------------------------


def times_read(loader, store, steps):
    """How often each token of the corpus stood in the steps; int64 [tokens]."""
    seen = np.zeros(len(store.tokens), int)
    for step in steps:
        for row in loader.step_rows(step):
            doc, start, length = (getattr(row.plan, key)[row.pieces] for key in ("doc", "start", "length"))
            for begin, n in zip(store.offsets[doc] + start, length, strict=True):
                seen[begin : begin + n] += 1
    return seen


@pytest.mark.parametrize("packing", ["best_fit", "concat", "long"])
def test_a_change_of_length_and_mixture_repeats_and_skips_nothing_in_the_epoch(packing, store):
    parts = [stage(0, 512, 16), stage(20, 1024, 8, **{"code": 0.9, "web": 0.0, "*": 0.1}), stage(31, 4096, 2)]
    loader = make_loader(store, stages=parts, packing=packing, max_documents=64)
    seen = times_read(loader, store, range(31))
    assert 0 < seen.sum() < len(seen)
    left = loader.streams(31)[0].left.rows
    seen += times_read(loader, store, range(31, 31 + left // 2))
    assert seen.max() == 1
    seen += times_read(loader, store, range(31 + left // 2, 31 + -(-left // 2)))
    assert (seen >= 1).all()
    assert seen.sum() - len(seen) <= 4096


def test_a_stage_begins_with_the_first_step_behind_its_tokens_and_keeps_the_tokens_of_a_step():
    config = load_config([
        "stages=long_64k", "model.rope_factor=2", "trainer.steps=10", "trainer.seq_len=512", "trainer.batch_rows=8",
        "stages.parts.short.tokens=12289", "stages.parts.short.seq_len=512", "stages.parts.long.seq_len=2048",
    ])  # fmt: skip
    short, long = stages_of(config)
    assert (short.first_step, short.seq_len, short.batch_rows, short.rope_factor) == (0, 512, 8, 1.0)
    assert (long.first_step, long.seq_len, long.batch_rows, long.rope_factor) == (4, 2048, 2, 8.0)
    (only,) = stages_of(load_config(["model.rope_factor=2"]))
    assert (only.first_step, only.seq_len, only.batch_rows, only.rope_factor) == (0, 512, 8, 2.0)


def test_every_fault_of_the_stages_is_reported_at_once():
    with pytest.raises(ConfigError) as error:
        load_config([
            "stages=long_64k", "stages.parts.short.tokens=null", "stages.parts.long.tokens=5", "data.align=7",
            "stages.parts.short.seq_len=300", "stages.parts.long.seq_len=131072", "stages.parts.long.rope_factor=0.5",
            "stages.parts.short.mixture={a:-1}", "stages.parts.long.seqlen=3",
        ])  # fmt: skip
    for line in (
        "stages.parts.long.seqlen: no such key; did you mean seq_len?",
        "stages.parts.short.mixture.a=-1.0 must not be negative",
        "stages.parts.long.rope_factor=0.5 must be 1 (none) or more",
        "stages.parts.short.tokens is null, which only the last stage may be",
        "stages.parts.long.tokens=5: the last stage lasts until the run ends; set null",
        "stages.parts.short.seq_len=300 does not divide the longest stage's 131072",
        "stages.parts.long.seq_len=131072 is beyond model.max_seq_len=65536",
        "trainer.seq_len=512 is not a multiple of data.align=7",
        "stages.parts.short.seq_len=300 does not divide a step's 4096 tokens",
    ):
        assert line in str(error.value)


def test_steps_have_equally_many_places_in_every_stage(store):
    loader = make_loader(store, stages=[stage(0, 512, 16), stage(2, 4096, 2)], max_documents=64)
    for step in range(4):
        assert sum(len(batch.tokens) for batch in loader.micro_batches(step, 0, 1, 2)) == 8192
    assert torch.equal(
        torch.cat([b.tokens for b in loader.micro_batches(1, 0, 1, 16)]).sort().values,
        torch.cat([b.tokens for r in (0, 1) for b in loader.micro_batches(1, r, 2, 1)]).sort().values,
    )
