"""Claims about batches: a function of the step alone, every token once, labels inside documents."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from loaders import BATCH_ROWS, MAX_DOCUMENTS, SEQ_LEN, make_loader, stage

from nsa_train.bench.data import realistic_lengths
from nsa_train.data import loader as loader_module
from nsa_train.data.loader import NO_DOCUMENT, NO_LABEL, NO_SOURCE, deal
from nsa_train.data.mixture import Mixture, Stream
from nsa_train.data.pack import Stretches, make_plan
from nsa_train.data.prepare import prepare
from nsa_train.data.stages import largest_divisor
from nsa_train.data.store import TokenStore
from nsa_train.errors import ConfigError, DataError
from nsa_train.packing import Packing


@pytest.fixture
def loader(store):
    return make_loader(store)


def rows_of(loader, step, world, micro_rows=2):
    """The step's rows, from all ranks, in an order that does not depend on the ranks."""
    seq_len = loader.stage(step).seq_len
    rows = [
        row.numpy().tobytes()
        for rank in range(world)
        for batch in loader.micro_batches(step, rank, world, micro_rows)
        for row in torch.cat([batch.tokens, batch.labels]).view(2, -1, seq_len).transpose(0, 1)
    ]
    return sorted(rows)


def numbers_of(loader, step):
    return [row.number for row in loader.step_rows(step)]


@pytest.mark.parametrize("packing", ["best_fit", "concat", "long"])
def test_a_step_has_the_same_rows_for_any_number_of_ranks(packing, store):
    loader = make_loader(store, packing=packing, align=16)
    for step in range(12):
        one = rows_of(loader, step, 1)
        assert len(one) == BATCH_ROWS
        assert all(rows_of(loader, step, world, micro_rows) == one for world, micro_rows in ((2, 1), (4, 2), (8, 4)))


def test_a_step_is_the_same_whatever_was_read_before(store, loader):
    for step in (0, 3, 40, 7):
        list(loader.micro_batches(step, 0, 1, 4))
    (after,) = loader.micro_batches(5, 0, 1, BATCH_ROWS)
    (fresh,) = make_loader(store).micro_batches(5, 0, 1, BATCH_ROWS)
    assert torch.equal(after.tokens, fresh.tokens)
    assert torch.equal(after.labels, fresh.labels)
    assert after.packing.lengths == fresh.packing.lengths


def rows_in_epoch(loader):
    (stream,) = loader.streams(0)
    return stream.whole.rows


def test_label_counts_are_those_of_the_rows_that_are_read(store, loader):
    """Of every step where there are few, of evenly spaced ones where there are many."""
    vocab = store.manifest["vocab"]

    def count(steps):
        labels = torch.cat([batch.labels for step in steps for batch in loader.micro_batches(step, 0, 1, 2)])
        return torch.bincount(labels[labels != NO_LABEL], minlength=vocab).numpy()

    assert (loader.label_counts(3, vocab) == count(range(3))).all()
    assert (loader.label_counts(31, vocab) == count(range(0, 31, 2))).all()


def test_every_epoch_visits_every_row_once_in_another_order(store):
    loader = make_loader(store, batch_rows=1)
    rows = rows_in_epoch(loader)
    epochs = [[numbers_of(loader, epoch * rows + i)[0] for i in range(rows)] for epoch in range(3)]
    assert all(sorted(numbers) == list(range(rows)) for numbers in epochs)
    other_seed = make_loader(store, batch_rows=1, seed=2)
    epochs.append([numbers_of(other_seed, i)[0] for i in range(rows)])
    assert len({tuple(rows) for rows in epochs}) == 4


def test_rows_run_on_across_epochs_even_when_a_step_is_longer_than_one(store):
    one, many = make_loader(store, batch_rows=1), make_loader(store, batch_rows=10_000)
    assert rows_in_epoch(many) < 5_000
    assert numbers_of(many, 1)[:200] == [numbers_of(one, 10_000 + i)[0] for i in range(200)]


def test_an_epoch_holds_every_token_of_every_document_once(store):
    loader = make_loader(store, batch_rows=1)
    seen = []
    for step in range(rows_in_epoch(loader)):
        (batch,) = loader.micro_batches(step, 0, 1, 1)
        seen.append(batch.tokens[batch.sources != NO_SOURCE])
    found = torch.cat(seen).bincount(minlength=store.manifest["vocab"])
    wanted = np.bincount(store.tokens, minlength=store.manifest["vocab"])
    assert np.array_equal(found.numpy(), wanted)
    assert loader.utilisation(0) == pytest.approx(len(store.tokens) / (rows_in_epoch(loader) * SEQ_LEN), rel=1e-12)
    assert set(loader.epochs(rows_in_epoch(loader)).values()) == {1.0}


@pytest.mark.parametrize("place", [0, 16, 40])
def test_the_share_of_late_tokens_is_that_of_an_epoch(place, store):
    loader = make_loader(store, batch_rows=1)
    late = total = 0
    for step in range(rows_in_epoch(loader)):
        (batch,) = loader.micro_batches(step, 0, 1, 1)
        real = batch.sources != NO_SOURCE
        late, total = late + int((batch.packing.positions[real] >= place).sum()), total + int(real.sum())
    assert loader.share_past(0, place) == pytest.approx(late / total)
    assert place == 0 or 0 < late < total


def test_a_label_is_the_next_token_of_its_document_and_never_of_another(store, loader):
    eos = int(store.tokens[-1])
    for step in range(10):
        for batch in loader.micro_batches(step, 0, 1, 4):
            ends = np.cumsum(batch.packing.lengths) - 1
            assert (batch.labels[ends] == NO_LABEL).all()
            assert (batch.labels[(batch.tokens == eos) & (batch.sources != NO_SOURCE)] == NO_LABEL).all()
            labelled = batch.labels != NO_LABEL
            assert torch.equal(batch.labels[labelled], batch.tokens.roll(-1)[labelled])
            inside = torch.ones_like(labelled)
            inside[ends] = False
            assert torch.equal(labelled, inside & (batch.sources != NO_SOURCE))


def test_every_piece_is_a_stretch_of_a_document_of_its_source(store, loader):
    content = np.asarray(store.tokens).astype(np.int64).tobytes()
    (batch,) = loader.micro_batches(2, 0, 1, BATCH_ROWS)
    end = 0
    for length in batch.packing.lengths:
        begin, end = end, end + length
        sources = set(batch.sources[begin:end].tolist())
        assert len(sources) == 1
        if sources == {NO_SOURCE}:
            assert end % SEQ_LEN == 0
            continue
        at = content.find(batch.tokens[begin:end].numpy().tobytes()) // 8
        document = np.searchsorted(store.offsets, at, side="right") - 1
        assert at >= 0
        assert at + length <= store.offsets[document + 1]
        assert sources == {store.sources[document]}


def test_shapes_and_the_number_of_bounds_are_fixed(loader):
    for step in range(6):
        for batch in loader.micro_batches(step, 1, 2, 2):
            assert batch.packing.cu_seqlens.shape == (2 * (MAX_DOCUMENTS + 1) + 1,)
            assert batch.packing.cu_seqlens[-1] == 2 * SEQ_LEN == batch.packing.tokens
            assert [x.shape for x in (batch.tokens, batch.labels, batch.sources)] == [(2 * SEQ_LEN,)] * 3
            assert [x.dtype for x in (batch.tokens, batch.labels, batch.sources)] == [
                torch.int64,
                torch.int64,
                torch.int32,
            ]


def test_every_rank_knows_the_labels_of_the_whole_step(loader):
    for step in (0, 1, 5, 30):
        labels = sum(
            int((batch.labels != NO_LABEL).sum())
            for rank in range(4)
            for batch in loader.micro_batches(step, rank, 4, 1)
        )
        assert loader.label_tokens(step) == labels


@pytest.mark.parametrize(
    ("number", "limit", "size"), [(8, 3, 2), (8, 8, 8), (8, 100, 8), (7, 6, 1), (12, 6, 6), (9, 4, 3)]
)
def test_micro_batches_are_the_largest_equal_ones(number, limit, size, store):
    assert largest_divisor(number, limit) == size
    batches = list(make_loader(store, batch_rows=number).micro_batches(0, 0, 1, limit))
    assert [batch.tokens.numel() for batch in batches] == [size * SEQ_LEN] * (number // size)


def test_ranks_that_cannot_share_a_step_evenly_are_refused(loader):
    with pytest.raises(ConfigError, match="8 rows of 512 tokens in a step are not a multiple of the 3 ranks"):
        list(loader.micro_batches(0, 0, 3, 1))


def test_validation_reads_the_same_rows_for_any_number_of_ranks(loader):
    def rows(world, micro_rows):
        found, sizes = [], []
        for rank in range(world):
            batches = list(loader.sequential(13, rank, world, micro_rows))
            sizes.append([batch.tokens.numel() // SEQ_LEN for batch in batches])
            for batch in batches:
                both = zip(batch.tokens.view(-1, SEQ_LEN), batch.labels.view(-1, SEQ_LEN), strict=True)
                found += [bytes(tokens.numpy().tobytes()) for tokens, labels in both if (labels != NO_LABEL).any()]
        assert sizes == [sizes[0]] * world  # as ZeRO 3 needs: every forward pass is one of all ranks
        assert max(sizes[0]) <= micro_rows
        return sorted(found)

    assert len(rows(1, 4)) == 13
    assert rows(1, 4) == rows(2, 4) == rows(4, 3) == rows(16, 2)
    assert sum(batch.tokens.numel() for batch in loader.sequential(10**6, 0, 1, 4)) == rows_in_epoch(loader) * SEQ_LEN


def test_few_validation_rows_hold_many_documents(prepared):
    store = TokenStore.open(prepared[1], "heldout")
    loader = make_loader(store, seq_len=128)
    content = np.asarray(store.tokens).astype(np.int64).tobytes()
    documents = set()
    for batch in loader.sequential(rows_in_epoch(loader) // 2, 0, 1, 1):
        begin = content.find(batch.tokens[: batch.packing.lengths[0]].numpy().tobytes()) // 8
        documents.add(int(np.searchsorted(store.offsets, begin, side="right")))
    assert len(documents) == len(store.lengths)


def test_a_corpus_smaller_than_a_row_is_refused_for_training_and_mostly_padding_for_validation(prepared, store):
    with pytest.raises(DataError, match=r"the corpus has \d+ tokens, less than one row of 200000; shorten"):
        make_loader(store, seq_len=200_000)
    heldout = TokenStore.open(prepared[1], "heldout")
    (batch,) = make_loader(heldout, seq_len=200_000, max_documents=64).sequential(9, 0, 1, 1)
    assert (batch.sources != NO_SOURCE).sum() == len(heldout.tokens)
    assert batch.packing.lengths[-1] == 200_000 - len(heldout.tokens)


def test_moving_a_batch_keeps_its_content(loader):
    (batch,) = loader.micro_batches(0, 0, 1, BATCH_ROWS)
    moved = batch.to("cpu")
    assert torch.equal(moved.tokens, batch.tokens)
    assert (moved.packing.lengths, moved.documents) == (batch.packing.lengths, batch.documents)


def test_a_checkpoint_of_the_same_run_is_accepted(store, loader):
    state = loader.state(12, 40)
    assert (state["step"], state["stage"], state["rows_consumed"], state["seed"]) == (12, "all", 96, 1)
    assert state["epoch"] == pytest.approx(96 / rows_in_epoch(loader), rel=0.05)
    make_loader(store).check_state(state, 40)
    del state["sample_sha256"]  # of an older version
    make_loader(store).check_state(state, 40)


@pytest.mark.parametrize(
    "change",
    [{"seq_len": 256}, {"max_documents": 5}, {"batch_rows": 4}, {"seed": 2}, {"packing": "long"}, {"align": 8}],
)
def test_a_checkpoint_of_another_packing_is_refused(change, store, loader):
    with pytest.raises(DataError, match=r"step 12 read other rows.*trainer\.seq_len"):
        make_loader(store, **change).check_state(loader.state(12, 40), 40)


def test_a_checkpoint_of_another_corpus_is_refused(prepared, loader):
    data, _ = prepared
    other = TokenStore.open(prepare(data, 390, lambda line: None), "train")
    with pytest.raises(DataError, match="the corpus"):
        make_loader(other).check_state(loader.state(3, 40), 40)


def other_packing(patch):
    patch.setattr(loader_module, "make_plan", lambda stretches, seq_len, limit, kind, *rest: make_plan(
        stretches, seq_len, limit, "concat", *rest))  # fmt: skip


def other_order(patch):
    patch.setattr(Stream, "_permutation", lambda self, epoch, rows: np.random.default_rng(epoch).permutation(rows))


def other_mixture(patch):
    sound = Mixture.row
    patch.setattr(Mixture, "row", lambda self, number: sound(self, number + 1))


def other_bounds(patch):
    sound = Packing.from_lengths
    patch.setattr(Packing, "from_lengths", lambda lengths, **rest: sound([sum(lengths[:2]), *lengths[2:]], **rest))


@pytest.mark.parametrize("code", [other_packing, other_order, other_mixture, other_bounds])
def test_code_that_makes_other_rows_shows_in_a_sample_and_goes_on_from_no_checkpoint(code, store, monkeypatch):
    before = make_loader(store)
    state = before.state(12, 40)
    assert make_loader(store).sample_sha256(40) == state["sample_sha256"]
    code(monkeypatch)
    after = make_loader(store)
    assert after.fingerprint == before.fingerprint
    assert after.sample_sha256(40) != state["sample_sha256"]
    with pytest.raises(DataError, match="step 12 is of a version of nsa_train that packs or orders these rows"):
        after.check_state(state, 40)


def test_a_sample_is_of_steps_from_the_whole_run(store):
    """A stage that begins late shows in it, too."""
    stages = [[stage(0, 512, 8), stage(36, seq_len, rows)] for seq_len, rows in ((512, 8), (1024, 4))]
    (short, short_39), (long, long_39) = (
        [make_loader(store, stages=one).sample_sha256(steps) for steps in (36, 40)] for one in stages
    )
    assert short == long
    assert short_39 != long_39


# Where tokens stand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("packing", "align"), [("best_fit", 1), ("concat", 1), ("long", 16), ("concat", 16)])
def test_a_token_stands_at_its_true_place_in_its_document(packing, align, store):
    loader = make_loader(store, packing=packing, align=align)
    for step in range(4):
        for batch in loader.micro_batches(step, 0, 1, 4):
            real, end = batch.sources != NO_SOURCE, 0
            assert (batch.places[~real] == 0).all()
            for length, number in zip(batch.packing.lengths, batch.documents, strict=True):
                begin, end = end, end + length
                assert length % align == 0 or end % SEQ_LEN == 0
                tokens, places = batch.tokens[begin:end][real[begin:end]], batch.places[begin:end][real[begin:end]]
                if not len(tokens):
                    assert number == NO_DOCUMENT
                    continue
                matches = [
                    document
                    for document, offset in enumerate(store.offsets[:-1])
                    if offset + places[-1] < store.offsets[document + 1]
                    and np.array_equal(store.tokens[offset + places[0] :][: len(tokens)], tokens)
                ]
                assert number in matches
                assert torch.equal(places, torch.arange(len(tokens)) + places[0])


def test_padding_behind_a_document_has_no_label_and_no_source(store):
    loader = make_loader(store, align=64)
    for batch in loader.micro_batches(0, 0, 1, 4):
        assert (batch.labels[batch.sources == NO_SOURCE] == NO_LABEL).all()
        assert all(n % 64 == 0 for n in batch.packing.lengths)
    labels = sum(int((batch.labels != NO_LABEL).sum()) for batch in loader.micro_batches(0, 0, 1, 4))
    assert labels == loader.label_tokens(0)


# Ranks ----------------------------------------------------------------------------------------------------------------


def test_rows_are_dealt_so_that_the_work_of_ranks_and_micro_batches_is_alike():
    plan = make_plan(Stretches.whole(realistic_lengths(20_000)), 65536, 512)
    costs = np.random.default_rng(0).permutation(plan.row_cost)[:64].tolist()
    hands = deal(costs, 8)
    assert sorted(i for hand in hands for i in hand) == list(range(64))
    assert {len(hand) for hand in hands} == {8}
    dealt = [sum(costs[i] for i in hand) for hand in hands]
    in_order = [sum(costs[rank::8]) for rank in range(8)]
    assert max(dealt) / np.mean(dealt) < 1.1 < 1.2 < max(in_order) / np.mean(in_order)
    rounds = [[costs[hand[k]] for hand in hands] for k in range(8)]
    assert all(min(before) >= max(after) for before, after in pairwise(rounds))
