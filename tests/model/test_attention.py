"""The attention layer: which blocks the ablations read, what a branch is wired to, what a probe sees."""

import dataclasses

import pytest
import torch
from cases import ARMS, FULL, LENGTHS, MODEL, NSA, grow, nsa
from helpers import assert_close, sdpa, start_fixed

from nsa_train.model.attention import Attention
from nsa_train.model.layers import apply_rope, rope_angles
from nsa_train.packing import Packing

PACKING = Packing.from_lengths(LENGTHS)


def layer(attention):
    torch.manual_seed(0)
    made = Attention(MODEL, attention)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    start_fixed(made)
    return grow(made)


def inputs(attention, packing=PACKING, seed=0):
    x = torch.randn(packing.tokens, MODEL.width, generator=torch.Generator().manual_seed(seed))
    return x, attention.layout(packing, rope_angles(packing.positions, MODEL.key_dim, MODEL.rope_theta))


@pytest.mark.parametrize("selection", ["random", "none"])
def test_ablations_read_legal_blocks(selection):
    spec_n, Hk = NSA.slc_count, 2
    blocks = Attention(MODEL, nsa(selection=selection))._fixed_blocks(PACKING)
    assert blocks.shape == (PACKING.tokens, Hk, spec_n)
    assert blocks.dtype == torch.int32
    for t, position in enumerate(PACKING.positions.tolist()):
        m = position // NSA.slc_block
        forced = {j for j in range(m + 1) if j < NSA.slc_init or j > m - NSA.slc_local}
        for row in blocks[t].tolist():
            real = [j for j in row if j >= 0]
            assert row == real + [-1] * (spec_n - len(real))
            assert real == sorted(set(real))
            assert forced <= set(real) <= set(range(m + 1))
            assert len(real) == (len(forced) if selection == "none" else min(spec_n, m + 1))


def test_random_blocks_differ_between_queries_and_heads_but_not_between_calls():
    attention = Attention(MODEL, nsa(selection="random"))
    packing = Packing.from_lengths([200])
    blocks = attention._fixed_blocks(packing)
    assert torch.equal(blocks, attention._fixed_blocks(packing))
    late = blocks[100:]
    assert (late[:, 0] != late[:, 1]).any(-1).float().mean() > 0.5
    assert (late[1:] != late[:-1]).any(-1).float().mean() > 0.5
    free = torch.cat([late[i, 0][(late[i, 0] >= 1) & (late[i, 0] <= (100 + i) // 4 - 2)] for i in range(100)])
    assert len(free.unique()) > 20  # of the 23 to 48 that are free


def test_topn_lets_the_op_choose():
    assert Attention(MODEL, NSA)._fixed_blocks(PACKING) is None


def test_full_attention_is_rotated_attention_of_each_document():
    attention = layer(FULL)
    x, layout = inputs(attention)
    packing, angles = layout.packing, layout.angles
    q = apply_rope(attention.q(x).unflatten(-1, (4, 8)), angles)
    k, v = attention.project(x)[0]["token"]
    k = apply_rope(k, angles)
    parts = [sdpa(*(y[a:b] for y in (q, k, v))) for a, b in packing.cu_seqlens.unfold(0, 2, 1).tolist()]
    want = attention.o(torch.cat(parts).flatten(1))
    assert_close("attention", attention(x, layout), want, rms=1e-5)


def test_rope_turns_pairs_by_position_and_restarts_with_each_document():
    cos, sin = rope_angles(PACKING.positions, 8, 100.0)
    x = torch.randn(PACKING.tokens, 1, 8, generator=torch.Generator().manual_seed(0))
    turned = apply_rope(x, (cos, sin))
    for t, position in enumerate(PACKING.positions.tolist()):
        for i in range(4):
            angle = torch.tensor(position * 100.0 ** (-2 * i / 8))
            pair = torch.complex(x[t, 0, i], x[t, 0, i + 4]) * torch.polar(torch.tensor(1.0), angle)
            torch.testing.assert_close(torch.complex(turned[t, 0, i], turned[t, 0, i + 4]), pair)


def test_scores_of_two_rotated_tokens_depend_on_their_distance_only():
    angles = rope_angles(torch.arange(50), 8, 100.0)
    drawn = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0)).expand(50, 2, 1, 8)
    q, k = (apply_rope(drawn[:, i], angles)[:, 0] for i in range(2))
    scores = q @ k.T
    torch.testing.assert_close(scores[10:, 10:], scores[:-10, :-10], rtol=1e-4, atol=1e-5)


def test_a_compressed_key_is_rotated_to_its_blocks_first_position():
    attention = layer(nsa(phi="mean"))
    x, layout = inputs(attention)
    k, v = attention.project(x)[0]["cmp"]
    k_cmp, v_cmp = attention._compressed(k, v, layout)
    row, first = 0, 0
    for length in LENGTHS:
        for start in range(0, length - 3, 2):
            block = slice(first + start, first + start + 4)
            own = rope_angles(torch.tensor([start]), 8, MODEL.rope_theta)
            torch.testing.assert_close(k_cmp[row], apply_rope(k[block].mean(0, keepdim=True), own)[0])
            torch.testing.assert_close(v_cmp[row], v[block].mean(0))
            row += 1
        first += length
    assert row <= len(k_cmp) == sum(LENGTHS) // 2


@pytest.mark.parametrize("arm", ["full_gated", "nsa"])
def test_gates_start_at_one_half(arm):
    made = Attention(MODEL, ARMS[arm])
    start_fixed(made)
    gates = made.project(torch.randn(7, MODEL.width))[1]
    assert gates.shape == (7, MODEL.heads, len(ARMS[arm].branches))
    assert (gates == 0.5).all()


def test_gates_are_eq_5_of_a_linear_map():
    made, x = layer(NSA), torch.randn(7, MODEL.width)
    want = torch.sigmoid(x @ made.gate.weight.T + made.gate.bias)
    got = made.project(x)[1]
    assert got.std() > 0
    torch.testing.assert_close(got, want.view(7, MODEL.heads, 3))


def test_each_branch_reads_its_own_projection():
    attention = layer(NSA)
    case = inputs(attention)
    before = attention(*case)
    for name in ("token", "cmp", "win"):
        for part in ("k", "v"):
            weight = getattr(attention.kv[name], part).weight
            kept = weight.detach().clone()
            with torch.no_grad():
                weight.mul_(1.5)
            assert (attention(*case) - before).abs().max() > 1e-4, f"{name}.{part}"
            with torch.no_grad():
                weight.copy_(kept)
    assert torch.equal(attention(*case), before)


def test_shared_kv_has_one_projection():
    assert set(Attention(MODEL, nsa(shared_kv=True)).kv) == {"token"}
    assert set(Attention(MODEL, NSA).kv) == {"token", "cmp", "win"}


@pytest.mark.parametrize(("arm", "missing"), [("nsa-no_slc", 1), ("nsa-no_win", 2)])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_an_arm_without_a_branch_is_nsa_with_that_gate_closed(arm, missing, backend):
    """Output and gradients, on the reference and on the kernels; the arm has the parameters of its branches only."""
    config = dataclasses.replace(ARMS[arm], backend=backend)
    ablated, whole = layer(config), layer(NSA)
    branches = len(NSA.branches)
    kept = [i for i in range(branches * MODEL.heads) if i % branches != missing]
    state = whole.state_dict()
    mine = {name: state[name][kept] if name.startswith("gate.") else state[name] for name in ablated.state_dict()}
    ablated.load_state_dict(mine)
    assert {name.split(".")[1] for name in mine if name.startswith("kv.")} == {"cmp", ("win", "token")[missing - 1]}
    with torch.no_grad():
        whole.gate.weight.view(MODEL.heads, branches, -1)[:, missing] = 0
        whole.gate.bias.view(MODEL.heads, branches)[:, missing] = -200  # whose sigmoid is 0
    outputs = []
    for one in (ablated, whole):
        x, layout = inputs(one)
        own = x.clone().requires_grad_()
        outputs.append((one(own, layout), own))
        outputs[-1][0].square().sum().backward()
    (got, got_x), (want, want_x) = outputs
    assert_close("o", got, want, rms=1e-5)
    assert_close("x", got_x.grad, want_x.grad, rms=1e-4)
    expected = dict(whole.named_parameters())
    for name, parameter in ablated.named_parameters():
        gradient = expected[name].grad
        assert_close(name, parameter.grad, gradient[kept] if name.startswith("gate.") else gradient, rms=1e-4)


def test_without_selected_blocks_no_block_is_scored():
    blocks = Attention(MODEL, ARMS["nsa-no_slc"])._fixed_blocks(PACKING)
    assert torch.equal(blocks, Attention(MODEL, nsa(selection="none"))._fixed_blocks(PACKING))


def test_a_large_window_and_all_blocks_make_nsas_branches_full_attention():
    """With equal projections and gates of one, slc and win give full attention each; cmp is gated away."""
    sizes = {"slc_count": 16, "window": 64}
    sparse, dense = layer(nsa(**sizes)), layer(FULL)
    with torch.no_grad():
        sparse.q.weight.copy_(dense.q.weight)
        sparse.o.weight.copy_(dense.o.weight)
        for name in ("token", "win"):
            sparse.kv[name].load_state_dict(dense.kv["token"].state_dict())
        sparse.gate.weight.zero_()
        sparse.gate.bias.copy_(torch.tensor([-200.0, 200.0, 200.0]).repeat(MODEL.heads))
    assert_close("o", sparse(*inputs(sparse)), 2 * dense(*inputs(dense)), rms=1e-5)


def test_a_probe_reports_gates_and_selection():
    attention, probe = layer(NSA), {}
    case = inputs(attention)
    with torch.no_grad():
        attention(*case, probe)
    x = case[0].double()
    assert probe["common"] == pytest.approx(float(x.mean(0).norm() ** 2 / (x.norm(dim=1) ** 2).mean()), rel=1e-5)
    assert set(probe["gates"]) == {"cmp", "slc", "win"}
    for b, branch in enumerate(NSA.branches):
        assert probe["gates"][branch] == pytest.approx(float(attention.project(case[0])[1].detach()[..., b].mean()))
    assert 0 < probe["selection"]["forced_mass"] < 1
    assert set(probe["selection"]) == {"forced_mass", "distance_tokens", "neighbour_overlap"}


def test_an_arm_without_the_selected_branch_reports_no_selection():
    attention, probe = layer(ARMS["nsa-no_slc"]), {}
    with torch.no_grad():
        attention(*inputs(attention), probe)
    assert set(probe) == {"common", "gates"}


def test_the_arms_wire_the_window():
    narrow, wide = (layer(nsa(branches=("win",), gate=False, window=w)) for w in (NSA.window, 100))
    full = layer(FULL)
    full.load_state_dict({k.replace("kv.win", "kv.token"): x for k, x in wide.state_dict().items()})
    assert_close("window", wide(*inputs(wide)), full(*inputs(full)), rms=1e-6)
    assert (narrow(*inputs(narrow)) - wide(*inputs(wide))).abs().max() > 1e-3
