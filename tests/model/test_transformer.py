"""The whole model: what its arms share, what a token can see, and that every parameter learns."""

import dataclasses
import math
from itertools import combinations

import pytest
import torch
from cases import ARMS, LENGTHS, MODEL, MOE, NSA, build, grow, loss_of, nsa, rows
from helpers import assert_close

from nsa_train.config.load import load_config, options
from nsa_train.model.counts import count_parameters, meta_model
from nsa_train.model.layers import SwiGLU, apply_rope
from nsa_train.packing import Packing

EVERY_ARM = pytest.mark.parametrize("arm", ARMS)


def values(model):
    return dict(model.named_parameters())


def gradients_of(model, case):
    model.zero_grad()
    loss, out = loss_of(model, case)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, out


# Initial values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), combinations(ARMS, 2))
def test_arms_start_with_the_same_bits_in_every_parameter_they_share(one, other):
    a, b = values(build(ARMS[one])), values(build(ARMS[other]))
    shared = [name for name in a if name in b and ".phi_" not in name]  # another kind of phi is another parameter
    assert {"embed.weight", "head.weight", "layers.1.mlp.gate_up", "layers.1.mlp.router.weight"} <= set(shared)
    assert sum(".attention." in name for name in shared) >= 4
    for name in shared:
        assert a[name].shape != b[name].shape or torch.equal(a[name], b[name]), name
        assert a[name].shape == b[name].shape or ".gate." in name, f"{name}: one gate per branch, all else is equal"


def test_nsa_has_every_parameter_of_full_attention():
    full, sparse = values(build(ARMS["full"])), values(build(NSA))
    assert set(full) < set(sparse)
    extra = {name.split(".attention.")[1] for name in set(sparse) - set(full)}
    assert extra == {
        "gate.weight", "gate.bias", *(f"phi_{x}.{p}" for x in "kv" for p in ("w1", "w2", "bias")),
        *(f"kv.{b}.{x}.weight" for b in ("cmp", "win") for x in "kv"),
    }  # fmt: skip


def test_another_seed_gives_other_values():
    a, b = values(build(seed=0)), values(build(seed=1))
    same = {name for name in a if torch.equal(a[name], b[name])}
    fixed = ("norm.weight", "gate.weight", "gate.bias", ".bias", ".w2")
    assert same == {name for name in a if name.endswith(fixed)}


def test_a_parameters_start_depends_on_no_other_parameter():
    base, other = build(), build(vocab=97, dense_layers=0, moe={"experts": 6}, tied_embeddings=True)
    a, b = values(base), values(other)
    same_shape = [name for name in a if name in b and a[name].shape == b[name].shape]
    assert len(same_shape) > 30
    for name in same_shape:
        assert torch.equal(a[name], b[name]), name
    assert not torch.equal(a["layers.0.attention.q.weight"], a["layers.1.attention.q.weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_projections_into_the_stream_start_smaller_and_embeddings_larger(tied):
    model = values(build(width=64, layers=8, tied_embeddings=tied, embedding_std=0.5))
    assert ("head.weight" in model) is not tied
    for name, parameter in model.items():
        if name.endswith(("o.weight", "down.weight", ".down")):
            assert float(parameter.detach().std()) == pytest.approx(0.02 / 4, rel=0.1), name
        elif name.endswith(("q.weight", "gate_up", "gate_up.weight", "head.weight")):
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.1), name
        elif name == "embed.weight":
            assert float(parameter.detach().std()) == pytest.approx(0.02 if tied else 0.5, rel=0.1)


@EVERY_ARM
def test_initial_loss_is_that_of_a_guess(arm):
    tokens, labels, packing = rows()
    out = build(ARMS[arm])(tokens, labels, packing, 16)
    labelled = int((labels >= 0).sum())
    assert float(out.token_losses.sum().detach()) / labelled == pytest.approx(math.log(MODEL.vocab), abs=0.05)
    assert not out.token_losses[labels < 0].any()


def test_with_a_prior_the_initial_guess_is_the_tokens_frequency():
    """Also where it is no weight: the shares of both kinds of logits, and no parameter for it."""
    tokens, labels, packing = rows()
    model = build()
    names, counts = set(values(model)), torch.arange(MODEL.vocab) ** 2
    model.head.set_prior(counts)
    shares = (counts + 1) / (counts + 1).sum()
    probability = model.logits(tokens, packing).detach().softmax(-1).mean(0)
    torch.testing.assert_close(probability, shares, rtol=0.1, atol=1e-4)
    want = -shares[labels[labels >= 0]].log().mean()
    losses = model(tokens, labels, packing, 16).token_losses.detach()
    assert float(losses.sum() / (labels >= 0).sum()) == pytest.approx(float(want), abs=0.1)
    assert set(values(model)) == names
    assert torch.equal(model.head.prior, model.head.prior.bfloat16().float())
    model.head.set_prior(torch.ones(MODEL.vocab))
    assert not model.head.prior.any()


# Gradients ------------------------------------------------------------------------------------------------------------


@EVERY_ARM
def test_every_parameter_gets_a_gradient(arm):
    """phi of kind mlp starts with w2 = 0, behind which w1 and its bias learn from the second step on."""
    model, case = build(ARMS[arm], init_std=0.1), rows()
    found, out = gradients_of(model, case)
    assert out.load.min() > 0, "an expert without tokens proves nothing"
    behind_w2 = {name for name in found if ".phi_" in name and name.endswith((".w1", ".bias"))}
    still = {name for name, gradient in found.items() if not gradient.any()}
    assert still == (behind_w2 if ARMS[arm].phi == "mlp" else set())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter -= 0.1 * found[name]
    found, out = gradients_of(model, case)
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all(), name
        assert gradient.any(), name
        if name.endswith((".mlp.gate_up", ".mlp.down")):
            assert gradient.abs().amax((1, 2))[out.load[0] > 0].min() > 0, name


@pytest.mark.parametrize("parts", [("attention",), ("mlp",), ("attention", "mlp")], ids=",".join)
@pytest.mark.parametrize("arm", ["full", "nsa", "nsa-random"])
def test_recomputing_changes_no_bit_and_runs_the_named_parts_twice_and_all_else_once(arm, parts):
    plain, again = (build(ARMS[arm], layers=3).train() for _ in range(2))
    again.recompute_activations(parts)
    calls = {"router": 0, "attention": 0, "mlp": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    for layer in again.layers:
        layer.attention.register_forward_pre_hook(count("attention"))
        layer.mlp.register_forward_pre_hook(count("mlp"))
    for router in again.routers():
        router.register_forward_pre_hook(count("router"))
    want, want_out = gradients_of(plain, rows())
    got, got_out = gradients_of(again, rows())
    assert calls == {"router": 2} | {part: 6 if part in parts else 3 for part in ("attention", "mlp")}
    assert torch.equal(got_out.token_losses, want_out.token_losses)
    assert torch.equal(got_out.load, want_out.load)
    assert got_out.load.sum(1).tolist() == [sum(LENGTHS) * MOE.top_k] * 2
    for name, gradient in want.items():
        assert torch.equal(got[name], gradient), name


def test_two_runs_give_the_same_bits():
    (want, want_out), (got, got_out) = (gradients_of(build(), rows()) for _ in range(2))
    assert torch.equal(got_out.token_losses, want_out.token_losses)
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_size_of_a_loss_chunk_does_not_matter(chunk):
    model = grow(build())
    assert_close("losses", model(*rows(), chunk).token_losses, model(*rows(), 16).token_losses, rms=1e-6)


# What a token can see -------------------------------------------------------------------------------------------------


@EVERY_ARM
def test_packed_documents_give_what_they_give_alone(arm):
    model = grow(build(ARMS[arm]))
    tokens, labels, packing = rows()
    found, packed = gradients_of(model, (tokens, labels, packing))
    parts, losses, balance, load = [], [], 0.0, 0.0
    for a, b in packing.cu_seqlens.unfold(0, 2, 1).tolist():
        alone = (tokens[a:b], labels[a:b], Packing.from_lengths([b - a]))
        gradient, out = gradients_of(model, alone)
        parts.append(gradient)
        losses.append(out.token_losses)
        balance, load = balance + out.balance, load + out.load
    assert_close("losses", packed.token_losses, torch.cat(losses), rms=1e-5)
    assert_close("balance", packed.balance, balance, rms=1e-5)
    assert torch.equal(packed.load, load)
    for name, gradient in found.items():
        want = sum(part[name] for part in parts if part[name] is not None)  # 3 tokens alone never meet phi
        assert_close(name, gradient, want, rms=1e-4)


@EVERY_ARM
def test_no_hidden_state_depends_on_a_later_token_or_another_document(arm):
    """Bit for bit. Every MLP is dense: an expert's matrix product has another shape when another token comes to it."""
    model = grow(build(ARMS[arm], dense_layers=2))
    tokens, _, packing = rows()
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    t = torch.arange(len(tokens))
    with torch.no_grad():
        before = model.hidden(tokens, packing)[0]
        for s in range(len(tokens)):
            other = tokens.index_fill(0, torch.tensor([s]), int(tokens[s] + 7) % MODEL.vocab)
            after = model.hidden(other, packing)[0]
            untouched = (t < s) | (document != document[s])
            assert torch.equal(before[untouched], after[untouched]), f"token {s} reached another"
            assert not torch.equal(before[s], after[s])


@pytest.mark.parametrize("arm", ["full", "nsa"])
def test_experts_do_not_mix_tokens(arm):
    model = grow(build(ARMS[arm], dense_layers=0))
    tokens, _, packing = rows()
    with torch.no_grad():
        before, _, load = model.hidden(tokens, packing)
        for s in (5, 20, 30, 47):
            after, _, load_after = model.hidden(torch.cat([tokens[:s], (tokens[s:] * 3 + 5) % MODEL.vocab]), packing)
            assert not torch.equal(load, load_after)
            assert_close("before", after[:s], before[:s], rms=1e-5)


@pytest.mark.parametrize("arm", ["full", "nsa"])
def test_random_tokens_cannot_be_predicted(arm):
    """New random tokens in every step: a loss below ln V means that a token saw its own label.

    Planted leaks of one token through cmp, slc or win bring this loss 0.6 to 2 nats below ln V.
    """
    vocab, steps, length = 8, 40, 64
    model = build(ARMS[arm], vocab=vocab, init_std=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        tokens, labels, packing = rows((length,) * 16, vocab, seed=step)
        loss = model(tokens, labels, packing, 1024).token_losses.sum() / (labels >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    last = sum(losses[-10:]) / 10
    assert math.log(vocab) - 0.02 <= last <= math.log(vocab) + 0.1


@pytest.mark.parametrize("arm", ["full", "nsa"])
def test_a_repeated_row_is_learned(arm):
    model, case = build(ARMS[arm]), rows()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss, _ = loss_of(model, case)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) / sum(LENGTHS) < 1


# Parts ----------------------------------------------------------------------------------------------------------------


def test_tied_embeddings_are_one_parameter():
    tied, free = build(tied_embeddings=True), build()
    assert tied.head.weight is tied.embed.weight
    assert "head.weight" not in values(tied)
    assert count_parameters(free)["total"] - count_parameters(tied)["total"] == MODEL.vocab * MODEL.width


def test_first_layers_are_dense_and_as_wide_as_a_tokens_experts():
    model = build(layers=3, dense_layers=2)
    assert [isinstance(layer.mlp, SwiGLU) for layer in model.layers] == [True, True, False]
    assert model.layers[0].mlp.down.in_features == (MOE.top_k + MOE.shared) * MOE.expert_width


def test_balancing_moves_each_layers_bias_by_its_own_load():
    model = build(layers=3)
    model.balance_experts(torch.tensor([[9.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 9.0]]))
    assert [int(router.bias.argmin()) for router in model.routers()] == [0, 3]


def test_probes_report_every_layer_and_change_nothing():
    model, probes = grow(build()), []
    with torch.no_grad():
        want, got = model(*rows(), 16), model(*rows(), 16, probes)
    assert torch.equal(want.token_losses, got.token_losses)
    assert [set(probe) for probe in probes] == [{"common", "gates", "selection"}] * MODEL.layers


@pytest.mark.parametrize("arm", ["nsa", "nsa-random", "nsa-no_slc", "full"])
def test_selected_blocks_are_kept_while_somebody_asks(arm):
    model, kept = build(ARMS[arm]), []
    with torch.no_grad():
        model.keep_blocks(kept)
        model.hidden(*rows()[::2])
        model.keep_blocks(None)
        model.hidden(*rows()[::2])
    shape = (sum(LENGTHS), MODEL.kv_heads, NSA.slc_count)
    selects = "slc" in ARMS[arm].branches  # without it the op gets the forced blocks, which nobody reads
    assert [tuple(blocks.shape) for blocks in kept] == ([shape] * MODEL.layers if selects else [])


def blocks_of(model, packing):
    """[layers, T, Hk, n] that a pass reads."""
    kept = []
    model.keep_blocks(kept)
    with torch.no_grad():
        model.hidden(torch.zeros(packing.tokens, dtype=torch.int64), packing)
    model.keep_blocks(None)
    return torch.stack(kept)


def test_random_blocks_differ_between_layers_and_seeds_but_not_between_passes_and_documents():
    lengths, sizes = (200, 31, 120), {"layers": 8, "max_seq_len": 512}
    one, again, other = (build(ARMS["nsa-random"], seed=seed, **sizes) for seed in (3, 3, 4))
    packing = Packing.from_lengths(lengths)
    found = blocks_of(one, packing)
    assert torch.equal(found, blocks_of(one, packing))
    assert torch.equal(found, blocks_of(again, packing))
    late = packing.positions >= 60  # 12 free blocks and more, of which n has room for one
    for a, b in [*combinations(found, 2), (found[0], blocks_of(other, packing)[0])]:
        assert float((a == b)[late].all(-1).float().mean()) < 0.15
    read = [set(found[:, t].flatten().tolist()) for t in range(190, 200)]  # of 47 free blocks, 16 draws
    assert min(map(len, read)) > 3 + 8
    alone = torch.cat([blocks_of(one, Packing.from_lengths([length])) for length in lengths], 1)
    assert torch.equal(found, alone)


@pytest.mark.parametrize("arm", ["nsa", "nsa-shared_kv", "nsa-no_win", "full", "full_gated"])
def test_a_watcher_sees_rotated_queries_and_token_keys_of_every_layer(arm):
    model, inputs, seen = grow(build(ARMS[arm])), [], []
    for layer in model.layers:
        layer.attention.register_forward_pre_hook(lambda attention, given: inputs.append((attention, *given[:2])))
    with torch.no_grad():
        model.watch(lambda layer, attended: seen.append((layer, attended)))
        model.hidden(*rows()[::2])
        model.watch(None)
        model.hidden(*rows()[::2])
        assert [layer for layer, _ in seen] == list(range(MODEL.layers))
        for (_, attended), (attention, x, layout) in zip(seen, inputs, strict=False):
            q, k = attention.q(x).unflatten(-1, (MODEL.heads, -1)), attention.project(x)[0]["token"][0]
            assert torch.equal(attended.q, apply_rope(q, layout.angles))
            assert torch.equal(attended.k, apply_rope(k, layout.angles))
            assert (attended.blocks is None) == arm.startswith("full")


@EVERY_ARM
def test_bf16_weights_give_nearly_the_fp32_loss(arm):
    model, half = build(ARMS[arm]), build(ARMS[arm]).bfloat16()
    for router in half.routers():
        router.bias = router.bias.float()
    losses = half(*rows(), 16).token_losses
    assert losses.dtype == torch.float32
    assert_close("losses", losses, model(*rows(), 16).token_losses, rms=5e-3)


@pytest.mark.parametrize(
    ("arm", "total", "active"), [("full", 27.75e9, 4.51e9), ("nsa", 28.0e9, 4.77e9)], ids=["full", "nsa"]
)
def test_the_papers_model_has_the_papers_size(arm, total, active):
    counts = count_parameters(meta_model(load_config(["experiment=paper_27b", f"attention={arm}"])))
    assert counts["total"] == pytest.approx(total, rel=0.01)
    assert counts["active"] == pytest.approx(active, rel=0.01)


@pytest.mark.parametrize("experiment", options("experiment"))
def test_the_wide_baseline_has_as_many_active_parameters_as_nsa(experiment):
    arms = ("full_gated", "full_gated_wide", "nsa")
    narrow, wide, sparse = (
        count_parameters(meta_model(load_config([f"experiment={experiment}", f"attention={arm}"])))["active"]
        for arm in arms
    )
    assert wide == pytest.approx(sparse, rel=0.01)
    assert narrow < 0.97 * sparse


def test_counts_are_those_of_the_parameters():
    config = dataclasses.replace(load_config(), model=MODEL, attention=nsa(), moe=MOE)
    model = build()
    assert count_parameters(meta_model(config))["total"] == sum(p.numel() for p in model.parameters())
    idle = MOE.experts - MOE.top_k
    unused = idle * 3 * MODEL.width * MOE.expert_width + 2 * MODEL.vocab * MODEL.width
    assert count_parameters(model)["active"] == count_parameters(model)["total"] - unused
