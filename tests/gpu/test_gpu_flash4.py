"""FlashAttention-4's own kernels against the reference in fp64; its first run compiles them, seconds each."""

import pytest
import torch

from nsa_train.ops import flash4
from nsa_train.ops.dense import choose_backend, dense_attention
from nsa_train.ops.reference import attend, win_visible

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not flash4.kernels(), reason="flash-attn-4 does not import, or the GPU is no Hopper"),
]
LENGTHS = {
    "one": (700,),
    "pack": (300, 64, 1, 147, 129),
    "more than 256 documents": (200, *[1] * 280, 131),  # the package looks documents up in another way
}


def relative_error(got, want):
    assert got.isfinite().all()
    return float((got.double() - want).norm() / want.norm())


def case(heads, widths, tokens):
    torch.manual_seed(0)
    sizes = [(heads[0], widths[0]), (heads[1], widths[0]), (heads[1], widths[1])]
    return [torch.randn(tokens, *s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in sizes]


@pytest.mark.parametrize("heads", [(16, 1), (64, 4)], ids=str)
@pytest.mark.parametrize("widths", [(128, 128), (192, 128), (64, 64)], ids=str)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("documents", LENGTHS)
def test_output_and_gradients_equal_the_reference(heads, widths, window, documents):
    lengths = LENGTHS[documents]
    inputs = case(heads, widths, sum(lengths))
    got = dense_attention(*inputs, lengths, window=window, backend="flash4")
    want = torch.cat(
        [
            attend(q, k, v, win_visible(len(q), window or len(q), q.device), widths[0] ** -0.5)[0]
            for q, k, v in zip(*(x.double().split(lengths) for x in inputs), strict=True)
        ]
    )
    assert relative_error(got, want) < 5e-3
    grad = torch.randn_like(got)
    pairs = zip(torch.autograd.grad(got, inputs, grad), torch.autograd.grad(want, inputs, grad.double()), strict=True)
    for name, (a, b) in zip("qkv", pairs, strict=True):
        assert relative_error(a, b.double()) < 1e-2, name


@pytest.mark.parametrize("widths", [(128, 128), (192, 128)], ids=str)
def test_it_is_chosen_and_goes_through_compilation_and_recomputation(widths):
    lengths = LENGTHS["pack"]
    inputs = case((16, 1), widths, sum(lengths))
    assert choose_backend(inputs[0], inputs[2], lengths, None) == "flash4"

    def attend_all(q, k, v):
        return dense_attention(q, k, v, lengths)

    plain, compiled = attend_all(*inputs), torch.compile(attend_all)(*inputs)
    again = torch.utils.checkpoint.checkpoint(attend_all, *inputs, use_reentrant=False)
    assert torch.equal(plain, compiled)
    assert torch.equal(plain, again)
    want = torch.autograd.grad(plain.square().sum(), inputs)
    for other in (compiled, again):
        for a, b in zip(torch.autograd.grad(other.square().sum(), inputs), want, strict=True):
            assert relative_error(a, b.double()) < 1e-2  # sums of another order, rounded to bf16
