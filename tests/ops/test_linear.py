"""Several linear layers as one product are what they are one by one."""

import torch
import torch.nn.functional as F
from helpers import assert_close

from nsa_train.ops.linear import linears


def test_outputs_and_gradients_are_those_of_separate_layers():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(13, 6, generator=generator, requires_grad=True)
    weights = [torch.randn(n, 6, generator=generator, requires_grad=True) for n in (4, 1, 7)]
    into = [torch.randn(13, len(w), generator=generator) for w in weights]
    together, apart = linears(x, weights), [F.linear(x, w) for w in weights]
    for got, want in zip(together, apart, strict=True):
        assert_close("output", got, want, rms=1e-6)
    got = torch.autograd.grad(together, (x, *weights), into)
    for g, w in zip(got, torch.autograd.grad(apart, (x, *weights), into), strict=True):
        assert_close("gradient", g, w, rms=1e-6)
    dx, *others = torch.autograd.grad(linears(x, weights)[1].sum(), (x, *weights))  # the others' results are not used
    assert_close("dx", dx, weights[1].expand(13, 6), rms=1e-6)
    assert [bool(other.any()) for other in others] == [False, True, False]
