"""The reference of NSA against the rules as loops, the limits where it is plain attention, and what must not leak."""

import math

import pytest
import torch
from helpers import (
    COMPRESSED,
    DIFFERENTIABLE,
    SMALL,
    WIDE,
    alone,
    assert_close,
    changed,
    gradients,
    packed_case,
    run,
    sdpa,
    slices,
    start_fixed,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from nsa_train.model.branches import PHI
from nsa_train.ops import reference
from nsa_train.ops.nsa import NSASpec, nsa_attention
from nsa_train.ops.segments import Segments

SPECS = [SMALL, WIDE, NSASpec(6, 2, 4, 5, 2, 2, 3), NSASpec(8, 2, 4, 3, 0, 1, 1), NSASpec(1, 1, 1, 4, 1, 1, 4)]
ODD_LENGTHS = (1, 3, 4, 5, 7, 8, 9)  # 1, l - 1, l, l + 1, l' - 1, l', l' + 1 of WIDE


# What the rules say, as loops -----------------------------------------------------------------------------------------


def chosen_by_rule(scores, t, spec):
    """Blocks of query t, ascending, from one row of scores."""
    m = t // spec.slc_block
    chosen = [j for j in range(m + 1) if j < spec.slc_init or j > m - spec.slc_local]
    free = [j for j in range(m + 1) if j not in chosen]
    free.sort(key=lambda j: (-float(scores[j]), j))
    return sorted(chosen + free[: spec.slc_count - len(chosen)])


def shared_tokens(c, j, spec):
    compressed = set(range(c * spec.cmp_stride, c * spec.cmp_stride + spec.cmp_block))
    return len(compressed & set(range(j * spec.slc_block, (j + 1) * spec.slc_block)))


def attention_of_one(q, keys, values):
    """q [D], lists of k [D] and v [Dv] -> o [Dv] and the probabilities."""
    scores = [float(q @ k) / math.sqrt(len(q)) for k in keys]
    top = max(scores)
    weights = [math.exp(s - top) for s in scores]
    p = [w / sum(weights) for w in weights]
    return sum(share * v for share, v in zip(p, values, strict=True)), p


def nsa_by_loops(case):
    """The whole op for one document, a query and a head at a time."""
    spec = case["spec"]
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = (case[name].detach() for name in DIFFERENTIABLE)
    T, Hq, _ = q.shape
    Hk, Dv = v_slc.shape[1:]
    G, J = Hq // Hk, math.ceil(T / spec.slc_block)
    o, blocks = torch.zeros(T, Hq, Dv, dtype=q.dtype), torch.full((T, Hk, spec.slc_count), -1)
    for t in range(T):
        seen = [c for c in range(len(k_cmp)) if c * spec.cmp_stride + spec.cmp_block - 1 <= t]
        for g in range(Hk):
            scores = [0.0] * J
            for h in range(g * G, (g + 1) * G):
                if seen:
                    o_cmp, p = attention_of_one(q[t, h], [k_cmp[c, g] for c in seen], [v_cmp[c, g] for c in seen])
                    o[t, h] += gates[t, h, 0] * o_cmp
                    for c, share in zip(seen, p, strict=True):
                        for j in range(J):
                            scores[j] += shared_tokens(c, j, spec) / spec.cmp_stride * share
            chosen = chosen_by_rule(scores, t, spec)
            blocks[t, g, : len(chosen)] = torch.tensor(chosen)
            tokens = [s for s in range(t + 1) if s // spec.slc_block in chosen]
            window = range(max(0, t - spec.window + 1), t + 1)
            for h in range(g * G, (g + 1) * G):
                o[t, h] += gates[t, h, 1] * attention_of_one(q[t, h], k_slc[tokens, g], v_slc[tokens, g])[0]
                o[t, h] += gates[t, h, 2] * attention_of_one(q[t, h], k_win[window, g], v_win[window, g])[0]
    return o, blocks


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_op_equals_loops_over_queries_heads_and_tokens(spec):
    case = packed_case([27], spec)
    o, details = run(case)
    want, blocks = nsa_by_loops(case)
    assert torch.equal(details.blocks.long(), blocks)
    assert_close("o", o, want, rms=1e-12)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_importance_counts_the_tokens_that_blocks_share(spec):
    L, Hk, G = 21, 2, 3
    C, J = reference.compressed_length(L, spec), math.ceil(L / spec.slc_block)
    p = torch.rand(Hk, G, L, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = torch.zeros(L, Hk, J, dtype=torch.float64)
    for c in range(C):
        for j in range(J):
            want[:, :, j] += shared_tokens(c, j, spec) / spec.cmp_stride * p[:, :, :, c].sum(1).T
    assert_close("importance", reference.importance(p, L, spec), want, rms=1e-12)
    assert not reference.importance(p.requires_grad_(), L, spec).requires_grad


def test_the_papers_sizes_weigh_1_2_2_2_1():
    weights = reference.block_overlap(1024, NSASpec())
    for j in range(1, 15):
        found = {c: float(weights[c, j]) for c in range(len(weights)) if weights[c, j]}
        assert found == {4 * j - 1: 1, 4 * j: 2, 4 * j + 1: 2, 4 * j + 2: 2, 4 * j + 3: 1}


@st.composite
def quantised_scores(draw):
    """A rule set and scores of a document with so few different values that ties are everywhere."""
    slc_block, init, local = draw(st.integers(1, 4)), draw(st.integers(0, 3)), draw(st.integers(1, 3))
    spec = NSASpec(1, 1, slc_block, init + local + draw(st.integers(0, 4)), init, local, 1)
    L, Hk = draw(st.integers(1, 30)), draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    levels = draw(st.integers(1, 4))
    return spec, torch.randint(levels, (L, Hk, math.ceil(L / slc_block)), generator=generator).float() / levels


@settings(max_examples=60, deadline=None, derandomize=True)
@given(quantised_scores())
def test_selection_is_the_rule(drawn):
    spec, scores = drawn
    got = reference.select_blocks(scores, spec)
    assert got.dtype == torch.int32
    assert got.shape == (*scores.shape[:2], spec.slc_count)
    for t in range(scores.shape[0]):
        for g in range(scores.shape[1]):
            want = chosen_by_rule(scores[t, g], t, spec)
            assert got[t, g].tolist() == want + [-1] * (spec.slc_count - len(want))


def test_compressed_blocks_hold_the_tokens_of_every_block_of_every_document():
    lengths, spec = (9, 3, 4, 11), SMALL
    x = torch.arange(27.0)[:, None, None] + torch.tensor([0.0, 100.0])[None, :, None]
    want, first = [], 0
    for n in lengths:
        want += [list(range(first + s, first + s + 4)) for s in range(0, n - 3, 2)]
        first += n
    got = reference.compressed_blocks(x, torch.tensor([0, 9, 12, 16, 27], dtype=torch.int32), spec, rows=len(want) + 2)
    assert got[: len(want), :, 0, 0].tolist() == want
    assert got[: len(want), :, 1, 0].tolist() == [[i + 100 for i in row] for row in want]
    assert not got[len(want) :].any()


# phi ------------------------------------------------------------------------------------------------------------------


def phi_of(kind, block=4, dim=3):
    return PHI[kind](block, dim).double()


def of_blocks(phi, blocks, *parameters):
    """What `reference.phi_<kind>` makes of blocks with the parameters of a phi (or the ones given)."""
    (kind,) = (kind for kind, made in PHI.items() if type(phi) is made)
    return getattr(reference, f"phi_{kind}")(blocks, *(parameters or phi.parameters()))


def randomised(phi):
    with torch.no_grad():
        for parameter in phi.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return phi


@pytest.mark.parametrize("kind", PHI)
def test_every_phi_starts_as_mean_pooling(kind):
    phi = randomised(phi_of(kind))
    start_fixed(phi)
    blocks = torch.randn(5, 4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(kind, of_blocks(phi, blocks), blocks.mean(1), rms=1e-14)


@pytest.mark.parametrize("kind", ["mlp", "linear", "gated_pool"])
def test_a_trained_phi_knows_the_order_of_its_tokens(kind):
    phi = randomised(phi_of(kind))
    blocks = torch.randn(5, 4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert (of_blocks(phi, blocks) - of_blocks(phi, blocks.flip(1))).abs().max() > 1e-3


def test_phi_reads_token_i_at_columns_i_times_d():
    blocks = torch.randn(5, 4, 2, 3, generator=torch.Generator().manual_seed(0))
    for i in range(4):
        weight = torch.zeros(3, 12)
        weight[:, 3 * i : 3 * i + 3] = torch.eye(3)
        assert torch.equal(reference.phi_linear(blocks, weight, torch.zeros(3)), blocks[:, i])
        want = blocks.mean(1) + torch.nn.functional.silu(blocks[:, i])
        assert_close("mlp", reference.phi_mlp(blocks, weight, torch.zeros(3), torch.eye(3)), want, rms=1e-6)


@pytest.mark.parametrize("kind", PHI)
def test_gradients_of_phi_are_right(kind):
    phi = randomised(phi_of(kind))
    blocks = torch.randn(2, 4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda *values: of_blocks(phi, *values), (blocks, *phi.parameters()))


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fixed", [True, False], ids=["blocks given", "blocks chosen"])
def test_gradients_of_the_op_are_right(fixed):
    case = packed_case([10, 5], Hq=2, Hk=1, D=2, Dv=3)
    blocks = run(case)[1].blocks if fixed else None

    def op(*values):
        return nsa_attention(**{**case, **dict(zip(DIFFERENTIABLE, values, strict=True))}, blocks=blocks)

    assert torch.autograd.gradcheck(op, tuple(case[name] for name in DIFFERENTIABLE))


def test_no_gradient_flows_through_the_selection():
    case = packed_case([21])
    _, details = run(case)
    found = torch.autograd.grad(details.o_slc.sum(), [case["k_cmp"], case["v_cmp"]], allow_unused=True)
    assert found == (None, None)


def test_a_query_that_sees_no_compressed_block_outputs_zero_and_passes_zero_gradient():
    case = packed_case([13, 2])
    o_cmp = run(case)[1].o_cmp
    blind = torch.cat([o_cmp[:3], o_cmp[13:]])
    assert not blind.any()
    for name, gradient in gradients(case, blind).items():
        assert gradient is None or not gradient.any(), name
    assert o_cmp[3:13].abs().amin((1, 2)).min() > 0


# Leaks ----------------------------------------------------------------------------------------------------------------


def from_tokens(raw, phi, spec, cu_seqlens):
    """The op with its compressed keys and values made of tokens too, so that every input belongs to a token."""
    segments = Segments(cu_seqlens, len(raw["q"]), spec)
    k_cmp, v_cmp = (phi[x](raw[x], segments) for x in COMPRESSED)
    return nsa_attention(
        **{**raw, "k_cmp": k_cmp, "v_cmp": v_cmp}, spec=spec, cu_seqlens=cu_seqlens, return_details=True
    )


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_no_token_reads_its_future_or_another_document_bitwise(spec, dtype):
    lengths = (23, 9)
    T, generator = sum(lengths), torch.Generator().manual_seed(0)
    widths = {"q": (4, 8), "gates": (4, 3), **{f"k_{b}": (2, 8) for b in ("cmp", "slc", "win")}}
    widths |= {f"v_{b}": (2, 6) for b in ("cmp", "slc", "win")}
    raw = {name: torch.randn(T, *width, generator=generator).to(dtype) for name, width in widths.items()}
    phi = {x: randomised(PHI["mlp"](spec.cmp_block, widths[x][1]).to(dtype)) for x in COMPRESSED}
    cu_seqlens = torch.tensor([0, 23, 32], dtype=torch.int32)
    with torch.no_grad():
        before, details = from_tokens(raw, phi, spec, cu_seqlens)
        for s in range(T):
            other = {name: x.index_copy(0, torch.tensor([s]), x[s : s + 1] * -3 + 1) for name, x in raw.items()}
            after, after_details = from_tokens(other, phi, spec, cu_seqlens)
            t = torch.arange(T)
            untouched = (t < s) | ((t >= 23) != (s >= 23))
            assert torch.equal(before[untouched], after[untouched]), f"token {s} reached another"
            assert torch.equal(details.blocks[untouched], after_details.blocks[untouched]), f"token {s} chose"
            assert not torch.equal(before[s], after[s])


def test_values_that_are_not_numbers_stay_in_their_document():
    lengths = (11, 14)
    case = packed_case(lengths)
    o, _ = run(case)
    want = gradients(case, o[11:])
    (tokens, rows), _ = slices(lengths, SMALL)
    poisoned = changed(case)
    with torch.no_grad():
        for name in DIFFERENTIABLE:
            poisoned[name][rows if name in COMPRESSED else tokens] = torch.nan
    after, _ = run(poisoned)
    assert after[:11].isnan().all()
    assert torch.equal(after[11:], o[11:])
    for name, gradient in gradients(poisoned, after[11:]).items():
        kept = slice(rows.stop, None) if name in COMPRESSED else slice(11, None)
        assert torch.equal(gradient[kept], want[name][kept]), name


def test_rows_behind_the_compressed_keys_are_ignored():
    case = packed_case([11, 14], spare=4)
    o, _ = run(case)
    want = gradients(case, o)
    poisoned = changed(case)
    with torch.no_grad():
        for name in COMPRESSED:
            poisoned[name][-4:] = torch.nan
    after, _ = run(poisoned)
    assert torch.equal(after, o)
    for name, gradient in gradients(poisoned, after).items():
        assert torch.equal(gradient, want[name]), name
    for name in COMPRESSED:
        assert not want[name][-4:].any()


# Packing --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(23, 9, 14), ODD_LENGTHS], ids=str)
@pytest.mark.parametrize("spec", [SMALL, WIDE], ids=str)
def test_packed_documents_give_what_they_give_alone(lengths, spec):
    case = packed_case(lengths, spec)
    o, details = run(case)
    weight = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(3))
    packed = torch.autograd.grad((o * weight).sum(), [case[name] for name in DIFFERENTIABLE])
    packed = dict(zip(DIFFERENTIABLE, packed, strict=True))
    for tokens, rows in slices(lengths, spec):
        one = alone(case, tokens, rows)
        o_one, details_one = run(one)
        assert_close("o", o[tokens], o_one, rms=1e-12)
        assert torch.equal(details.blocks[tokens], details_one.blocks)
        used = [name for name in DIFFERENTIABLE if one[name].numel()]
        found = torch.autograd.grad((o_one * weight[tokens]).sum(), [one[name] for name in used])
        for name, gradient in zip(used, found, strict=True):
            torch.testing.assert_close(packed[name][rows if name in COMPRESSED else tokens], gradient)


@pytest.mark.parametrize("L", ODD_LENGTHS)
def test_short_documents_have_finite_outputs_and_gradients(L):
    case = packed_case([L], WIDE)
    o, details = run(case)
    assert torch.isfinite(o).all()
    for name, gradient in gradients(case, o).items():
        assert torch.isfinite(gradient).all(), name
    assert (details.blocks[..., 0] == 0).all()
    assert (details.o_cmp.abs().sum() > 0) == (WIDE.cmp_block <= L)


def test_empty_documents_at_the_end_change_nothing():
    o, details = run(packed_case([11, 14]))
    padded, padded_details = run(packed_case([11, 14], empty=5))
    assert torch.equal(o, padded)
    assert torch.equal(details.blocks, padded_details.blocks)


# Limits in which a branch is plain attention --------------------------------------------------------------------------


@pytest.mark.parametrize("L", [1, 11, 12])
def test_selecting_every_block_is_full_attention(L):
    case = packed_case([L])
    assert_close("o_slc", run(case)[1].o_slc, sdpa(case["q"], case["k_slc"], case["v_slc"]), rms=1e-12)


def test_selecting_fewer_blocks_than_there_are_is_not_full_attention():
    case = packed_case([17])
    difference = run(case)[1].o_slc - sdpa(case["q"], case["k_slc"], case["v_slc"])
    assert difference[:12].abs().max() < 1e-12  # three blocks of four tokens
    assert difference[16].abs().max() > 1e-3


@pytest.mark.parametrize("L", [1, 4, 5])
def test_a_window_of_the_whole_document_is_full_attention(L):
    case = packed_case([L])
    assert_close("o_win", run(case)[1].o_win, sdpa(case["q"], case["k_win"], case["v_win"]), rms=1e-12)


def test_the_window_holds_w_tokens_with_the_querys_own():
    t = torch.arange(12)
    visible = (t[:, None] - t >= 0) & (t[:, None] - t < 5)
    assert visible.sum(1).max() == SMALL.window
    case = packed_case([12])
    assert_close("o_win", run(case)[1].o_win, sdpa(case["q"], case["k_win"], case["v_win"], visible), rms=1e-12)


def test_compression_of_single_tokens_is_full_attention():
    spec = NSASpec(1, 1, 4, 3, 1, 1, 5)
    case = packed_case([13], spec)
    cu_seqlens = case["cu_seqlens"]
    k, v = (reference.phi_mean(reference.compressed_blocks(case[x], cu_seqlens, spec, 13)) for x in ("k_slc", "v_slc"))
    o_cmp = run({**case, "k_cmp": k, "v_cmp": v})[1].o_cmp
    assert_close("o_cmp", o_cmp, sdpa(case["q"], case["k_slc"], case["v_slc"]), rms=1e-12)


# Arguments ------------------------------------------------------------------------------------------------------------


def test_given_blocks_are_read_instead_of_chosen_ones():
    case = packed_case([21])
    o, details = run(case)
    m = (torch.arange(21) // 4)[:, None, None].expand(21, 2, 1)
    own_only = torch.cat([m, torch.full((21, 2, 2), -1)], -1).to(torch.int32)
    after, given_details = run(case, blocks=own_only)
    assert torch.equal(given_details.blocks, own_only)
    assert torch.equal(given_details.o_cmp, details.o_cmp)
    assert torch.equal(given_details.o_win, details.o_win)
    t = torch.arange(21)
    visible = (t[:, None] // 4 == t // 4) & (t <= t[:, None])
    assert_close("o_slc", given_details.o_slc, sdpa(case["q"], case["k_slc"], case["v_slc"], visible), rms=1e-12)
    assert not torch.equal(after, o)


def test_the_scale_is_one_over_root_d_unless_given():
    case = packed_case([21])
    assert torch.equal(run(case)[0], run(case, scale=8**-0.5)[0])
    assert_close("o", run(case, scale=0.7)[0], run({**case, "q": case["q"] * 0.7 * 8**0.5})[0], rms=1e-12)


def test_gates_weigh_the_branches():
    case = packed_case([21])
    o, details = run(case)
    want = sum(case["gates"][..., b, None] * details[1 + b] for b in range(3))
    assert_close("o", o, want, rms=1e-14)


def test_two_runs_give_the_same_bits():
    case = packed_case([23, 9, 14], dtype=torch.float32)
    again = changed(case)
    o, o_again = run(case)[0], run(again)[0]
    assert torch.equal(o, o_again)
    want, got = gradients(case, o), gradients(again, o_again)
    for name in DIFFERENTIABLE:
        assert torch.equal(got[name], want[name]), name


def test_bf16_is_close_to_fp32():
    half = packed_case([40, 9], WIDE, dtype=torch.bfloat16)
    single = changed(half, **{name: half[name].detach().float().requires_grad_() for name in DIFFERENTIABLE})
    (o, details), (want, want_details) = run(half), run(single)
    assert o.dtype == torch.bfloat16
    assert torch.equal(details.blocks, want_details.blocks)
    assert_close("o", o, want, rms=5e-3)
    got, wanted = gradients(half, o), gradients(single, want)
    for name in DIFFERENTIABLE:
        assert got[name].dtype == torch.bfloat16
        assert_close(name, got[name], wanted[name], rms=1e-2)
