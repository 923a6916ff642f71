"""Compressed attention and selection on the GPU, in half precision, against the reference in float32."""

import pytest
import torch
from compressed_cases import DEVICE, check, expected, inputs, run
from helpers import slices

from nsa_train.ops import compressed, compressed_hopper, reference, select, select_hopper
from nsa_train.ops.documents import Documents
from nsa_train.ops.nsa import NSASpec

PATHS = {"plain": (compressed, select), "hopper": (compressed_hopper, select_hopper)}

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("unwritten_memory_is_poison")]
SPEC = NSASpec()
MIXED = [31, 1, 1000, 32, 47, 63, 2113, 64, 65, 33]
PLAIN_ONLY = [(96, 64, 16), (192, 128, 4), (128, 128, 1), (64, 64, 3)]
BOTH = [(192, 128, 16), (128, 128, 16), (64, 64, 16)]
CASES = [*(("plain", *c) for c in [*BOTH, *PLAIN_ONLY]), *(("hopper", *c) for c in BOTH)]


def case(path, D, Dv, G, lengths, dtype=torch.bfloat16, Hk=2):
    """Inputs, documents, modules; rows behind the last key are zeros where the Hopper path reads them."""
    x, documents = inputs(lengths, SPEC, Hk * G, Hk, D, Dv, empty=3, dtype=dtype)
    if path == "hopper":
        x["k"], x["v"] = x["k"].nan_to_num(0.0), x["v"].nan_to_num(0.0)
        if not compressed_hopper.takes(x["q"], x["k"], x["v"], SPEC):
            pytest.skip("needs a Hopper GPU")
    return x, documents, *PATHS[path]


@pytest.mark.parametrize("lengths", [MIXED, [8191], [4097, 777]], ids=str)
@pytest.mark.parametrize(("path", "D", "Dv", "G"), CASES)
def test_outputs_and_gradients_equal_the_reference(path, D, Dv, G, lengths):
    x, documents, module, _ = case(path, D, Dv, G, lengths)
    check(run(x, documents, SPEC, D**-0.5, module=module), expected(x, lengths, SPEC, D**-0.5), rms=1e-2)


@pytest.mark.parametrize("path", ["plain", "hopper"])
def test_half_precision_of_the_other_kind(path):
    x, documents, module, _ = case(path, 192, 128, 16, MIXED, torch.float16)
    check(run(x, documents, SPEC, 0.07, module=module), expected(x, MIXED, SPEC, 0.07), rms=1e-2)


@pytest.mark.parametrize("path", ["plain", "hopper"])
def test_dq_is_added_to_what_is_there(path):
    x, documents, module, _ = case(path, 192, 128, 16, MIXED)
    before = torch.randn_like(x["q"])
    want = before.float() + run(x, documents, SPEC, 0.07, module=module)[2].float()
    got = run(x, documents, SPEC, 0.07, dq=before.clone(), module=module)[2]
    assert ((got.float() - want).norm() / want.norm()) < 5e-3


@pytest.mark.parametrize("path", ["plain", "hopper"])
def test_two_runs_give_the_same_bits(path):
    x, documents, module, selection = case(path, 192, 128, 16, [8191, 50])
    first, second = (run(x, documents, SPEC, 0.07, module=module) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    chosen = [selection.select_blocks(x["q"], x["k"], first[1], documents, SPEC, 0.07) for _ in range(2)]
    assert torch.equal(*chosen)


@pytest.mark.parametrize("path", ["plain", "hopper"])
def test_packed_documents_give_the_bits_of_separate_ones(path):
    x, documents, module, selection = case(path, 128, 128, 16, MIXED)
    together = run(x, documents, SPEC, 0.1, module=module)
    blocks = selection.select_blocks(x["q"], x["k"], together[1], documents, SPEC, 0.1)
    for tokens, rows in slices(MIXED, SPEC):
        if rows.start == rows.stop:
            continue
        own = {name: y[rows if name in "kv" else tokens].contiguous() for name, y in x.items()}
        L = tokens.stop - tokens.start
        alone = Documents(torch.tensor([0, L], dtype=torch.int32, device=DEVICE), L, SPEC)
        got = run(own, alone, SPEC, 0.1, module=module)
        for i, part in enumerate((tokens, tokens, tokens, rows, rows)):
            assert torch.equal(got[i], together[i][part])
        assert torch.equal(selection.select_blocks(own["q"], own["k"], got[1], alone, SPEC, 0.1), blocks[tokens])


@pytest.mark.parametrize("lengths", [MIXED, [8191]], ids=str)
@pytest.mark.parametrize(("path", "D", "Dv", "G"), CASES)
def test_chosen_blocks_are_the_best_by_the_reference(path, D, Dv, G, lengths):
    """Rounding may swap blocks of nearly equal score, so what is compared is the sum of the chosen scores."""
    x, documents, module, selection = case(path, D, Dv, G, lengths)
    _, lse = module.forward(x["q"], x["k"], x["v"], documents, SPEC, D**-0.5)
    got = selection.select_blocks(x["q"], x["k"], lse, documents, SPEC, D**-0.5)
    for tokens, rows in slices(lengths, SPEC):
        L = tokens.stop - tokens.start
        q, k, v = (x[n][part].float() for n, part in (("q", tokens), ("k", rows), ("v", rows)))
        p = reference.attend(q, k, v, reference.cmp_visible(L, SPEC, DEVICE), D**-0.5)[1]
        scores = reference.importance(p, L, SPEC)
        want = reference.select_blocks(scores, SPEC)
        mine = got[tokens]
        assert torch.equal(mine < 0, want < 0)
        assert ((mine[..., 1:] > mine[..., :-1]) | (mine[..., 1:] < 0)).all()
        m = torch.arange(L, device=DEVICE)[:, None] // SPEC.slc_block
        for forced in (m * 0, m, (m - 1).clamp(min=0)):
            assert (mine == forced[..., None]).any(-1).all()
        total = [scores.gather(-1, b.clamp(min=0).long()).masked_fill(b < 0, 0).sum(-1) for b in (mine, want)]
        assert (total[0] >= total[1] * (1 - 1e-4)).all()
        assert (mine == want).float().mean() > 0.999


def test_both_paths_agree_on_long_sequences():
    x, documents, *_ = case("hopper", 192, 128, 16, [20000, 12768], Hk=1)
    plain, hopper = (run(x, documents, SPEC, 0.07, module=m) for m in (compressed, compressed_hopper))
    for a, b in zip(plain, hopper, strict=True):
        seen = a.isfinite()
        assert ((a[seen].float() - b[seen].float()).norm() / a[seen].float().norm()) < 5e-3
    blocks = [s.select_blocks(x["q"], x["k"], plain[1], documents, SPEC, 0.07) for s in (select, select_hopper)]
    assert (blocks[0] == blocks[1]).float().mean() > 0.999
