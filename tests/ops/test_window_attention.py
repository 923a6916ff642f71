"""The window branch by itself: the kernels give what dense attention with a window gives."""

import pytest
import torch
from helpers import assert_close
from window_cases import DEVICE, inputs, spec

from nsa_train.ops.dense import dense_attention
from nsa_train.ops.window_attention import window_attention
from nsa_train.packing import Packing


@pytest.mark.parametrize("lengths", [(1,), (9, 1, 30, 5)], ids=str)
@pytest.mark.parametrize("window", [1, 7, 100])
def test_output_and_gradients_are_those_of_dense_attention(lengths, window):
    q, k, v, do, _ = inputs(lengths, Hk=2)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    cu_seqlens = Packing.from_lengths(lengths, len(lengths) + 1).cu_seqlens.to(DEVICE)
    got, want = window_attention(*leaves, spec(window), cu_seqlens), dense_attention(*leaves, lengths, window=window)
    assert_close("o", got, want, rms=1e-5)
    found, wanted = (torch.autograd.grad(o, leaves, do, materialize_grads=True) for o in (got, want))
    for name, a, b in zip(("dq", "dk", "dv"), found, wanted, strict=True):
        if b.any():  # a lone token's score does not matter
            assert_close(name, a, b, rms=1e-5)
        else:
            assert a.abs().max() < 1e-5


def test_the_op_is_registered_as_torch_demands():
    q, k, v, _, _ = inputs((9, 12))
    arguments = q, k, v, Packing.from_lengths([9, 12]).cu_seqlens.to(DEVICE), [4, 2, 4, 3, 1, 1, 5], 0.3
    torch.library.opcheck(
        torch.ops.nsa_train.window_forward.default, tuple(x.requires_grad_() if x is q else x for x in arguments),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip
