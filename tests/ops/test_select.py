"""Importance and the choice of blocks in Triton equal the reference: same scores, same blocks, same order."""

import pytest
import torch
from compressed_cases import DEVICE, inputs
from helpers import assert_close, slices

from nsa_train.ops import reference, select
from nsa_train.ops.compressed import forward
from nsa_train.ops.documents import Documents
from nsa_train.ops.nsa import NSASpec
from nsa_train.packing import Packing

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_poison")

SPEC = NSASpec(cmp_block=4, cmp_stride=2, slc_block=4, slc_count=4, slc_init=1, slc_local=1)
SPECS = [
    SPEC,
    NSASpec(4, 2, 8, 5, 1, 2),
    NSASpec(1, 1, 1, 3, 0, 1),
    NSASpec(9, 3, 6, 7, 2, 3),
    NSASpec(8, 1, 2, 5, 0, 3),
    NSASpec(2, 2, 6, 2, 1, 1),
    NSASpec(6, 2, 4, 40, 1, 2),
]


def block_scores(scores, T):
    """[pieces, Hk, blocks, TOKENS, PLANES] of one document -> [T, Hk, blocks]."""
    total = scores[..., 0].clone()
    for r in range(1, scores.shape[-1]):
        total[:, :, r:] += scores[:, :, :-r, :, r]
    return total.permute(0, 3, 1, 2).flatten(0, 1)[:T]


def split_scores(s, tokens, planes):
    """[T, Hk, blocks] of one document -> scores of pieces; plane 1 holds a share of the next block's score."""
    T, Hk, blocks = s.shape
    pieces = -(-T // 64) * 64 // tokens
    padded = torch.zeros(pieces * tokens, Hk, blocks, device=s.device)
    padded[:T] = s
    out = torch.zeros(pieces, Hk, blocks, tokens, planes, device=s.device)
    out[..., 0] = padded.view(pieces, tokens, Hk, blocks).permute(0, 2, 3, 1)
    if planes > 1:
        moved = out[:, :, 1:, :, 0] // 2
        out[:, :, :-1, :, 1] = moved
        out[:, :, 1:, :, 0] -= moved
    return out


def wanted_blocks(x, lengths, spec, scale):
    parts = []
    for tokens, rows in slices(lengths, spec):
        L = tokens.stop - tokens.start
        visible = reference.cmp_visible(L, spec, DEVICE)
        p = reference.attend(x["q"][tokens], x["k"][rows], x["v"][rows], visible, scale)[1]
        parts.append(reference.select_blocks(reference.importance(p, L, spec), spec))
    return torch.cat(parts)


def choose(x, documents, spec, scale=0.3):
    _, lse = forward(x["q"], x["k"], x["v"], documents, spec, scale)
    return select.select_blocks(x["q"], x["k"], lse, documents, spec, scale)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_scores_of_the_blocks_before_the_local_ones_equal_the_reference(spec):
    L = 70
    x, documents = inputs([L], spec, Hq=6, D=20)
    _, lse = forward(x["q"], x["k"], x["v"], documents, spec, 0.3)
    scores = torch.full((4, 2, -(-L // spec.slc_block), 32, select.planes(spec)), torch.nan, device=DEVICE)
    select.importance(x["q"], x["k"], lse, documents, spec, 0.3, scores, 0)
    C = reference.compressed_length(L, spec)
    p = reference.attend(x["q"], x["k"][:C], x["v"][:C], reference.cmp_visible(L, spec, DEVICE), 0.3)[1]
    want = reference.importance(p, L, spec)
    m = torch.arange(L, device=DEVICE)[:, None, None] // spec.slc_block
    used = (torch.arange(want.shape[2], device=DEVICE) <= m - spec.slc_local).expand_as(want)
    assert_close("scores", block_scores(scores, L)[used], want[used], 1e-5)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_chosen_blocks_equal_the_reference(spec):
    lengths = [n for n in (1, spec.cmp_block - 1, spec.cmp_block, 65, spec.slc_block + 1) if n]
    x, documents = inputs(lengths, spec, Hq=2, Hk=1, empty=1)
    got = choose(x, documents, spec)
    assert got.dtype == torch.int32
    assert torch.equal(got, wanted_blocks(x, lengths, spec, 0.3))


@pytest.mark.parametrize(("Hq", "Hk", "D"), [(3, 1, 9), (1, 1, 16), (16, 1, 48), (6, 2, 4)])
def test_any_group_size_and_width(Hq, Hk, D):
    lengths = [40, 23]
    x, documents = inputs(lengths, SPEC, Hq=Hq, Hk=Hk, D=D)
    assert torch.equal(choose(x, documents, SPEC), wanted_blocks(x, lengths, SPEC, 0.3))


def test_chunks_of_tokens_give_what_one_chunk_gives(monkeypatch):
    x, documents = inputs([70, 9], SPEC, Hq=16, Hk=1)
    whole = choose(x, documents, SPEC)
    piece = 20 * 8 * 2 * 4  # blocks, tokens, planes, bytes
    monkeypatch.setattr(select, "SCRATCH_BYTES", 5 * piece)
    assert torch.equal(choose(x, documents, SPEC), whole)


@pytest.mark.parametrize(
    ("spec", "L"),
    [(NSASpec(2, 1, 1, 7, 1, 2), 400), (NSASpec(1, 1, 1, 16, 0, 1), 300), (NSASpec(2, 1, 1, 3, 1, 2), 64)],
    ids=str,
)
def test_ties_go_to_the_lower_block(spec, L):
    s = torch.randint(0, 6, (L, 1, L), generator=torch.Generator().manual_seed(0)).float().to(DEVICE)
    documents = Documents(Packing.from_lengths([L]).to(DEVICE).cu_seqlens, L, spec)
    chosen = torch.empty(L, 1, spec.slc_count, dtype=torch.int32, device=DEVICE)
    select.topn(split_scores(s, 8, select.planes(spec)), documents, spec, chosen, 0)
    assert torch.equal(chosen, reference.select_blocks(s, spec))


def test_scores_that_are_not_numbers_still_give_blocks_that_exist():
    L = 64
    s = torch.full((L, 1, L), torch.nan, device=DEVICE)
    spec = NSASpec(1, 1, 1, 5, 1, 2)
    documents = Documents(Packing.from_lengths([L]).to(DEVICE).cu_seqlens, L, spec)
    chosen = torch.empty(L, 1, 5, dtype=torch.int32, device=DEVICE)
    select.topn(split_scores(s, 8, 1), documents, spec, chosen, 0)
    assert torch.equal(chosen, reference.select_blocks(torch.zeros_like(s), spec))


def test_no_choice_depends_on_a_later_key_or_on_another_document():
    x, documents = inputs([20, 60], SPEC)
    before = choose(x, documents, SPEC)
    C, t = reference.compressed_length(20, SPEC), 20 + 40
    c = C + (40 - SPEC.cmp_block) // SPEC.cmp_stride + 1
    x["k"][c:] = torch.randn_like(x["k"][c:])
    x["k"][:C] = torch.randn_like(x["k"][:C])
    after = choose(x, documents, SPEC)
    assert torch.equal(before[20 : t + 1], after[20 : t + 1])
    assert not torch.equal(before[t + 1 :], after[t + 1 :])
