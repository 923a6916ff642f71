"""FlashAttention-4 as a dense backend, its kernels played by PyTorch: what they are given, what becomes of results."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import assert_close

from nsa_train.ops import flash4
from nsa_train.ops.dense import choose_backend, dense_attention, flash4_takes, recorded_attention
from nsa_train.packing import Packing

LENGTHS = (9, 1, 6, 5, 14)


def probabilities(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, left):
    """[Hq, T, T], and their log-sum-exp [Hq, T]."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q.dtype == torch.int32
    assert causal
    recorded = cu_seqlens_q.diff()[-1] == 0  # empty documents at the end, and no length on the host
    assert max_seqlen_q == max_seqlen_k == (len(q) if recorded else cu_seqlens_q.diff().max())
    t = torch.arange(len(q))
    document = torch.searchsorted(cu_seqlens_q[1:].contiguous(), t, right=True)
    visible = (document[:, None] == document) & (t <= t[:, None])
    if left is not None:
        visible &= t[:, None] - t <= left
    scores = torch.einsum("thd,shd->hts", q, k) * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    scores = scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1), scores.logsumexp(-1)


def grouped(q, x):
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def played_forward(q, k, v, *, window_size, return_lse, **options):
    assert return_lse
    left, right = window_size
    assert right in (None, 0)
    p, lse = probabilities(q, grouped(q, k), left=left, **options)
    return torch.einsum("hts,shd->thd", p, grouped(q, v)), lse


def played_backward(q, k, v, out, dout, lse, *, window_size_left, **options):
    assert q.shape[1] == k.shape[1] or q.shape[2] == v.shape[2], "GQA backward requires head_dim == head_dim_v"
    assert dout.is_contiguous()
    p, same_lse = probabilities(q, grouped(q, k), left=window_size_left, **options)
    assert torch.equal(same_lse, lse)
    dp = torch.einsum("thd,shd->hts", dout, grouped(q, v))
    ds = (
        p * (dp - torch.einsum("thd,thd->ht", dout, out)[..., None]) * (options["softmax_scale"] or q.shape[-1] ** -0.5)
    )
    dq = torch.einsum("hts,shd->thd", ds, grouped(q, k))
    dk, dv = torch.einsum("hts,thd->shd", ds, q), torch.einsum("hts,thd->shd", p, dout)
    return dq, *(d.unflatten(1, (x.shape[1], -1)).sum(2) for d, x in ((dk, k), (dv, v)))


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(flash4, "kernels", lambda: flash4.Kernels(played_forward, played_backward))


def case(heads, widths):
    generator = torch.Generator().manual_seed(0)
    sizes = [(heads[0], widths[0]), (heads[1], widths[0]), (heads[1], widths[1])]
    return [torch.randn(sum(LENGTHS), *s, generator=generator, dtype=torch.float64).requires_grad_() for s in sizes]


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("widths", [(8, 8), (12, 8)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
def test_flash4_equals_attention_by_pytorch(installed, heads, widths, window):
    q, k, v = case(heads, widths)
    got, want = (dense_attention(q, k, v, LENGTHS, window=window, backend=name) for name in ("flash4", "torch"))
    assert_close("o", got, want, rms=1e-12)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for g, w in zip(torch.autograd.grad(got, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad), strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("widths", [(8, 8), (12, 8)], ids=str)
def test_where_only_the_device_knows_the_documents_they_are_the_same_ones(installed, widths):
    inputs = case((4, 2), widths)
    bounds = torch.tensor([*Packing.from_lengths(LENGTHS).cu_seqlens, sum(LENGTHS), sum(LENGTHS)], dtype=torch.int32)
    got, want = recorded_attention(*inputs, bounds), dense_attention(*inputs, LENGTHS, backend="torch")
    assert_close("o", got, want, rms=1e-12)
    pairs = zip(torch.autograd.grad(got.sum(), inputs), torch.autograd.grad(want.sum(), inputs), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_what_can_be_recorded_is_what_was_measured(installed, monkeypatch):
    assert [flash4_takes(*widths) for widths in ((64, 64), (192, 128), (96, 96))] == [True, True, False]
    monkeypatch.setattr(flash4, "kernels", lambda: None)
    assert not flash4_takes(64, 64)


def test_its_scale_is_the_callers(installed):
    q, k, v = case((4, 2), (8, 8))
    got, want = (dense_attention(q, k, v, LENGTHS, scale=0.7, backend=name) for name in ("flash4", "torch"))
    assert_close("o", got, want, rms=1e-12)


def test_gradients_pass_recomputation_and_a_gradient_that_is_one_number_everywhere(installed):
    inputs = case((4, 2), (12, 8))

    def attend(*x):
        return dense_attention(*x, LENGTHS, backend="flash4")

    again = torch.utils.checkpoint.checkpoint(attend, *inputs, use_reentrant=False)
    pairs = zip(
        torch.autograd.grad(again.sum(), inputs), torch.autograd.grad(attend(*inputs).sum(), inputs), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)


def test_forced_without_the_package_it_says_so(monkeypatch):
    monkeypatch.setattr(flash4, "kernels", lambda: None)
    with pytest.raises(RuntimeError, match="flash-attn-4 does not import"):
        dense_attention(*case((4, 2), (8, 8)), LENGTHS, backend="flash4")


def inputs_on_a_gpu(D, Dv, dtype=torch.bfloat16):
    return (SimpleNamespace(is_cuda=True, dtype=dtype, shape=(35, heads, width)) for heads, width in ((4, D), (2, Dv)))


@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (192, 128)], ids=str)
def test_it_is_chosen_where_it_was_measured_as_the_fastest_and_imports(monkeypatch, widths):
    windowed = "varlen" if widths[0] == widths[1] else "efficient"
    for found, name in ((flash4.Kernels(played_forward, played_backward), "flash4"), (None, "cudnn")):
        monkeypatch.setattr(flash4, "kernels", lambda found=found: found)
        assert choose_backend(*inputs_on_a_gpu(*widths), (512, 1024), None) == name
        assert choose_backend(*inputs_on_a_gpu(*widths), (512, 1024), 512) == windowed
        assert choose_backend(*inputs_on_a_gpu(96, 96), (512, 1024), None) == "cudnn"
        assert choose_backend(*inputs_on_a_gpu(*widths, dtype=torch.float32), (512, 1024), None) == "torch"


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    flash4.kernels.cache_clear()
    yield monkeypatch
    flash4.kernels.cache_clear()


def package(**names):
    """Modules of a made-up flash_attn.cute."""
    return {
        "flash_attn": ModuleType("flash_attn"),
        "flash_attn.cute": SimpleNamespace(flash_attn_varlen_func=played_forward),
        "flash_attn.cute.interface": SimpleNamespace(**names),
    }


def test_a_package_that_imports_works_on_hopper_and_not_on_older_gpus(hopper):
    for name, module in package(_flash_attn_bwd=played_backward).items():
        hopper.setitem(sys.modules, name, module)
    assert flash4.kernels() == (played_forward, played_backward)
    flash4.kernels.cache_clear()
    hopper.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert not flash4.kernels()


def test_a_package_that_is_missing_is_no_news(hopper, caplog):
    hopper.setitem(sys.modules, "flash_attn", None)
    hopper.setitem(sys.modules, "flash_attn.cute", None)
    with caplog.at_level(logging.INFO, "nsa_train"):
        assert not flash4.kernels()
    assert caplog.messages == []


def test_a_package_that_is_broken_is_said_once(hopper, caplog):
    for name, module in package().items():  # without the backward
        hopper.setitem(sys.modules, name, module)
    with caplog.at_level(logging.INFO, "nsa_train"):
        assert not flash4.kernels()
        assert not flash4.kernels()
    assert len(caplog.messages) == 1
    assert "_flash_attn_bwd" in caplog.text
