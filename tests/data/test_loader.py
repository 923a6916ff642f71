"""Claims about batches: a function of the step alone, every token once, labels inside documents."""

import hashlib

import numpy as np
import pytest
import torch

from nsa_train.data.loader import NO_LABEL, NO_SOURCE, Loader, largest_divisor
from nsa_train.data.prepare import prepare
from nsa_train.data.store import TokenStore
from nsa_train.errors import ConfigError, DataError

SEQ_LEN, MAX_DOCUMENTS, BATCH_ROWS = 512, 4, 8


def make_loader(store, **changes):
    settings = {"seq_len": SEQ_LEN, "max_documents": MAX_DOCUMENTS, "batch_rows": BATCH_ROWS, "seed": 1}
    return Loader(store, **(settings | changes))


@pytest.fixture
def loader(store):
    return make_loader(store)


def rows_of(loader, step, world, micro_rows=2):
    """The step's rows in global order, put together from what each rank gets."""
    ranks = [
        torch.cat([batch.tokens.view(-1, SEQ_LEN) for batch in loader.micro_batches(step, rank, world, micro_rows)])
        for rank in range(world)
    ]
    return torch.stack(ranks, dim=1).flatten(0, 1)


def test_the_token_stream_is_the_same_for_any_number_of_ranks(loader):
    hashes = set()
    for world in (1, 2, 4, 8):
        digest = hashlib.sha256()
        for step in range(12):
            digest.update(rows_of(loader, step, world).numpy().tobytes())
        hashes.add(digest.hexdigest())
    assert len(hashes) == 1


def test_a_step_is_the_same_whatever_was_read_before(store, loader):
    for step in (0, 3, 40, 7):
        list(loader.micro_batches(step, 0, 1, 4))
    (after,) = loader.micro_batches(5, 0, 1, BATCH_ROWS)
    (fresh,) = make_loader(store).micro_batches(5, 0, 1, BATCH_ROWS)
    assert torch.equal(after.tokens, fresh.tokens)
    assert torch.equal(after.labels, fresh.labels)
    assert after.packing.lengths == fresh.packing.lengths


def test_every_epoch_visits_every_row_once_in_another_order(store):
    loader = make_loader(store, batch_rows=1)
    epochs = [[loader.step_rows(epoch * loader.rows + i)[0] for i in range(loader.rows)] for epoch in range(3)]
    assert all(sorted(rows) == list(range(loader.rows)) for rows in epochs)
    other_seed = make_loader(store, batch_rows=1, seed=2)
    epochs.append([other_seed.step_rows(i)[0] for i in range(loader.rows)])
    assert len({tuple(rows) for rows in epochs}) == 4


def test_rows_run_on_across_epochs_even_when_a_step_is_longer_than_one(store):
    one, many = make_loader(store, batch_rows=1), make_loader(store, batch_rows=10_000)
    assert many.rows < 5_000
    assert many.step_rows(1)[:200] == [one.step_rows(10_000 + i)[0] for i in range(200)]


def test_an_epoch_holds_every_token_of_every_document_once(store):
    loader = make_loader(store, batch_rows=1)
    seen = []
    for step in range(loader.rows):
        (batch,) = loader.micro_batches(step, 0, 1, 1)
        seen.append(batch.tokens[batch.sources != NO_SOURCE])
    found = torch.cat(seen).bincount(minlength=store.manifest["vocab"])
    wanted = np.bincount(store.tokens, minlength=store.manifest["vocab"])
    assert np.array_equal(found.numpy(), wanted)
    assert found.sum() == loader.tokens_per_epoch == len(store.tokens)
    assert loader.utilisation == loader.tokens_per_epoch / (loader.rows * SEQ_LEN)


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
    with pytest.raises(ConfigError, match=r"trainer\.batch_rows=8 is not a multiple of the 3 ranks"):
        list(loader.micro_batches(0, 0, 3, 1))


def test_validation_reads_the_same_rows_for_any_number_of_ranks(loader):
    def rows(world, micro_rows):
        found = []
        for rank in range(world):
            for batch in loader.sequential(13, rank, world, micro_rows):
                assert batch.tokens.numel() <= micro_rows * SEQ_LEN
                found += [bytes(row.numpy().tobytes()) for row in batch.tokens.view(-1, SEQ_LEN)]
        return sorted(found)

    assert len(rows(1, 4)) == 13
    assert rows(1, 4) == rows(2, 4) == rows(4, 3)
    assert sum(batch.tokens.numel() for batch in loader.sequential(10**6, 0, 1, 4)) == loader.rows * SEQ_LEN


def test_few_validation_rows_hold_many_documents(prepared):
    store = TokenStore.open(prepared[1], "heldout")
    loader = make_loader(store, seq_len=128)
    rows = loader._order("validation")[: loader.rows // 2]
    documents = {int(d) for row in rows for d in loader._plan.doc[slice(*loader._plan.row_ptr[row : row + 2])]}
    assert len(documents) == len(store.lengths)


def test_rows_longer_than_the_corpus_are_mostly_padding(store):
    (batch,) = make_loader(store, seq_len=200_000, max_documents=64, batch_rows=1).micro_batches(9, 0, 1, 1)
    assert (batch.sources != NO_SOURCE).sum() == len(store.tokens)
    assert batch.packing.lengths[-1] == 200_000 - len(store.tokens)


def test_moving_a_batch_keeps_its_content(loader):
    (batch,) = loader.micro_batches(0, 0, 1, BATCH_ROWS)
    moved = batch.to("cpu")
    assert torch.equal(moved.tokens, batch.tokens)
    assert moved.packing.lengths == batch.packing.lengths


def test_a_checkpoint_of_the_same_run_is_accepted(store, loader):
    state = loader.state(12)
    assert (state["step"], state["rows_consumed"]) == (12, 96)
    make_loader(store).check_state(state)


@pytest.mark.parametrize("change", [{"seq_len": 256}, {"max_documents": 5}, {"batch_rows": 4}, {"seed": 2}])
def test_a_checkpoint_of_another_packing_is_refused(change, store, loader):
    with pytest.raises(DataError, match=r"step 12 read other rows.*trainer\.seq_len"):
        make_loader(store, **change).check_state(loader.state(12))


def test_a_checkpoint_of_another_corpus_is_refused(prepared, loader):
    data, _ = prepared
    other = TokenStore.open(prepare(data, 390, lambda line: None), "train")
    with pytest.raises(DataError, match="the corpus"):
        make_loader(other).check_state(loader.state(3))
