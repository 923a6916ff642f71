"""The whole op on a GPU: every gradient at the paper's shapes in bf16, documents, leaks, bits, selection, long rows."""

from itertools import pairwise

import pytest
import torch

from nsa_train.bench.exact import attention_of_rows
from nsa_train.bench.inputs import realistic_lengths
from nsa_train.ops.nsa import NSASpec, compressed_lengths, nsa_attention
from nsa_train.ops.reference import attend, cmp_visible, importance, select_blocks
from nsa_train.packing import Packing

pytestmark = pytest.mark.gpu

SPEC = NSASpec()
NAMES = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
SHAPES = {  # Hq, Hk, D, Dv
    "192/128, G=16": (64, 4, 192, 128), "128/128, G=16": (32, 2, 128, 128), "64/64, G=16": (16, 1, 64, 64),
    "96/64, G=16": (32, 2, 96, 64), "192/128, G=4": (8, 2, 192, 128), "64/64, G=4": (8, 2, 64, 64),
    "128/128, G=1": (2, 2, 128, 128), "96/64, G=1": (2, 2, 96, 64), "128/96, G=16": (16, 1, 128, 96),
}  # fmt: skip
PACKS = {
    "1": [1], "short": [1, 31, 32, 63, 64, 65], "17": [17], "513": [513], "2047": [2047], "odd": [333, 1, 700, 47, 129],
    "4095": [4095],
}  # fmt: skip


def arguments(lengths, Hq, Hk, D, Dv, dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    packing = Packing.from_lengths(lengths).to("cuda")
    T = packing.tokens
    C = max(1, int(compressed_lengths(packing.cu_seqlens, SPEC).sum()))
    sizes = [(T, Hq, D), (C, Hk, D), (C, Hk, Dv), *[(T, Hk, D), (T, Hk, Dv)] * 2, (T, Hq, 3)]
    case = {name: torch.randn(size, device="cuda", dtype=dtype) for name, size in zip(NAMES, sizes, strict=True)}
    case["gates"] = case["gates"].sigmoid()
    return {name: x.requires_grad_() for name, x in case.items()} | {"spec": SPEC, "cu_seqlens": packing.cu_seqlens}


def relative_error(got, want):
    got, want = got.double(), want.double()
    assert got.isfinite().all()
    return float((got - want).norm() / want.norm().clamp(min=1e-30)) if want.any() else float(got.abs().max())


def outputs_and_gradients(case, weight, **options):
    o = nsa_attention(**case, **options)
    return [o, *torch.autograd.grad(o, [case[name] for name in NAMES], weight)]


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_every_gradient_are_those_of_fp32_with_the_same_blocks(shape, pack):
    Hq, Hk, D, Dv = SHAPES[shape]
    case = arguments(PACKS[pack], Hq, Hk, D, Dv)
    _, details = nsa_attention(**case, return_details=True)
    T = case["q"].shape[0]
    rows = torch.arange(T, device="cuda") if T <= 1200 else torch.randperm(T, device="cuda")[:600].sort().values
    weight = torch.zeros(T, Hq, Dv, device="cuda", dtype=torch.bfloat16)
    weight[rows] = torch.randn(len(rows), Hq, Dv, device="cuda", dtype=torch.bfloat16)
    got = outputs_and_gradients(case, weight, blocks=details.blocks)
    want = attention_of_rows(rows, **case, scale=D**-0.5, blocks=details.blocks)
    gradients = torch.autograd.grad(want, [case[n] for n in NAMES], weight[rows].float(), allow_unused=True)
    assert relative_error(got[0][rows], want) < 1e-2
    for name, a, b in zip(NAMES, got[1:], gradients, strict=True):
        assert relative_error(a, b) < 1e-2, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("docs", ["one", "many"])
def test_64k_tokens_are_right_in_sampled_rows(docs, dtype):
    T = 65536
    case = arguments([T] if docs == "one" else realistic_lengths(T), 64, 4, 192, 128, dtype)
    _, details = nsa_attention(**case, return_details=True)
    rows = torch.randperm(T, device="cuda")[:24].sort().values
    weight = torch.zeros(T, 64, 128, device="cuda", dtype=dtype)
    weight[rows] = torch.randn(24, 64, 128, device="cuda", dtype=dtype)
    got = outputs_and_gradients(case, weight, blocks=details.blocks)
    want = attention_of_rows(rows, **case, scale=192**-0.5, blocks=details.blocks)
    gradients = torch.autograd.grad(want, [case[n] for n in NAMES], weight[rows].float())
    assert relative_error(got[0][rows], want) < 1e-2
    for name, a, b in zip(NAMES, got[1:], gradients, strict=True):
        assert relative_error(a, b) < 1e-2, name


@pytest.mark.parametrize("shape", ["192/128, G=16", "64/64, G=16", "64/64, G=4", "96/64, G=1"])
def test_chosen_blocks_are_the_references_except_at_ties(shape):
    Hq, Hk, D, Dv = SHAPES[shape]
    lengths = [1800, 31, 1100, 65]
    case = arguments(lengths, Hq, Hk, D, Dv)
    _, details = nsa_attention(**case, return_details=True)
    row = 0
    for (a, b), L in zip(pairwise(case["cu_seqlens"].tolist()), lengths, strict=True):
        C = int(compressed_lengths(torch.tensor([0, L]), SPEC))
        q, k, v = case["q"][a:b].float(), case["k_cmp"][row : row + C].float(), case["v_cmp"][row : row + C].float()
        row += C
        _, p = attend(q, k, v, cmp_visible(L, SPEC, q.device), D**-0.5)
        scores = importance(p, L, SPEC)
        want, got = select_blocks(scores, SPEC), details.blocks[a:b]
        assert ((got >= 0) == (want >= 0)).all()
        value = lambda blocks: scores.gather(-1, blocks.clamp(min=0).long()).masked_fill(blocks < 0, 0)  # noqa: B023, E731
        worst = (value(got).sum(-1) - value(want).sum(-1)).abs().max()
        assert worst < 1e-4, "another choice than the reference's is worse by more than rounding"
        assert (got == want).all(-1).float().mean() > 0.98


def test_packed_documents_equal_separate_ones_bitwise():
    lengths = [700, 33, 1, 290]
    case = arguments(lengths, 16, 1, 64, 64)
    whole = nsa_attention(**case)
    row = 0
    for a, b in pairwise(case["cu_seqlens"].tolist()):
        C = int(compressed_lengths(torch.tensor([0, b - a]), SPEC))
        cut = {n: case[n][row : row + C] if n in ("k_cmp", "v_cmp") else case[n][a:b] for n in NAMES}
        row += C
        bounds = torch.tensor([0, b - a], dtype=torch.int32, device="cuda")
        assert torch.equal(nsa_attention(**cut, spec=SPEC, cu_seqlens=bounds), whole[a:b])


@pytest.mark.parametrize("t", [15, 16, 31, 32, 63, 64, 511, 512, 777, 1000])
def test_a_later_token_changes_nothing_before_it(t):
    case = arguments([1024], 16, 1, 192, 128)
    before = nsa_attention(**case)
    with torch.no_grad():
        for name in ("q", "k_slc", "v_slc", "k_win", "v_win", "gates"):
            case[name][t:] = 2.0
        first = max(0, (t - SPEC.cmp_block) // SPEC.cmp_stride + 1)
        case["k_cmp"][first:], case["v_cmp"][first:] = 2.0, 2.0
    assert torch.equal(nsa_attention(**case)[:t], before[:t])


@pytest.mark.parametrize("shape", ["192/128, G=16", "64/64, G=16", "64/64, G=4"])
def test_two_runs_give_the_same_bits_gradients_included(shape):
    case = arguments([3000, 1, 1095], *SHAPES[shape])
    weight = torch.randn(4096, *case["gates"].shape[1:2], SHAPES[shape][3], device="cuda", dtype=torch.bfloat16)
    first, second = (outputs_and_gradients(case, weight) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_is_read_that_nobody_wrote(request):
    """Every buffer that the op allocates starts as NaN (or a huge integer): results and gradients stay."""
    case = arguments([900, 65, 1, 58], 16, 1, 192, 128)
    weight = torch.randn(1024, 16, 128, device="cuda", dtype=torch.bfloat16)
    before = outputs_and_gradients(case, weight)
    request.getfixturevalue("unwritten_memory_is_poison")
    after = outputs_and_gradients(case, weight)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_compiled_and_checkpointed_code_gives_the_same_bits():
    case = arguments([500, 524], 16, 1, 64, 64)

    def double(q):
        return nsa_attention(**{**case, "q": q * 2})

    compiled = torch.compile(double, fullgraph=True)
    weight = torch.randn(1024, 16, 64, device="cuda", dtype=torch.bfloat16)
    plain, fast = (torch.autograd.grad(f(case["q"]), case["q"], weight)[0] for f in (double, compiled))
    again = torch.utils.checkpoint.checkpoint(double, case["q"], use_reentrant=False)
    assert relative_error(plain, fast) < 1e-6
    assert torch.equal(plain, torch.autograd.grad(again, case["q"], weight)[0])
