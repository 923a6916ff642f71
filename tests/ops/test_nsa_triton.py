"""The whole op on its kernels against the reference: outputs, every gradient, documents, compile, checkpointing.

On a CPU the kernels run in Triton's interpreter in fp32; sizes are small, because a program costs milliseconds there.
"""

from dataclasses import astuple

import pytest
import torch
from helpers import DIFFERENTIABLE, SMALL, WIDE, alone, assert_close, changed, gradients, packed_case, run, slices
from torch.utils.checkpoint import checkpoint

from nsa_train.ops.nsa import NSASpec, nsa_attention
from nsa_train.ops.nsa_triton import nsa_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAPER_LIKE = NSASpec(cmp_block=8, cmp_stride=4, slc_block=16, slc_count=4, slc_init=1, slc_local=2, window=16)


def kernel_case(lengths, **sizes):
    case = packed_case(lengths, dtype=torch.float32, **sizes)
    return changed({k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in case.items()})


def exact(case):
    """The same case in fp64."""
    return {k: x.detach().double().requires_grad_() if k in DIFFERENTIABLE else x for k, x in case.items()}


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([1], {}),
        ([3, 4, 5], {"spec": SMALL}),
        ([40, 7, 33], {"spec": WIDE, "empty": 2, "spare": 3}),
        ([65, 1, 30], {"spec": PAPER_LIKE, "Hq": 4, "Hk": 1, "D": 24, "Dv": 16}),
        ([37], {"spec": SMALL, "Hq": 3, "Hk": 3, "D": 5, "Dv": 3}),
    ],
    ids=str,
)
def test_output_and_every_gradient_equal_the_reference(lengths, sizes):
    case = kernel_case(lengths, **sizes)
    wanted = exact(case)
    o, details = run(case, backend="triton")
    want, want_details = run(wanted, backend="reference")
    assert torch.equal(details.blocks, want_details.blocks)
    assert_close("o", o, want, rms=1e-5)
    for name in ("o_slc", "o_win"):
        assert_close(name, getattr(details, name), getattr(want_details, name), rms=1e-5)
    want_gradients = gradients(wanted, want)
    for name, got in gradients(case, o).items():
        exact_gradient = want_gradients[name]
        if exact_gradient is not None and exact_gradient.abs().sum() > 1e-9:
            assert_close(name, got, exact_gradient, rms=3e-5)
        else:  # a softmax over one key has no slope; rounding may leave a trace of it
            assert not got.numel() or got.abs().max() < 1e-6, name


def test_given_blocks_are_used_instead_of_selecting():
    case = kernel_case([30, 17], spec=WIDE)
    own = torch.cat([torch.arange(n) // WIDE.slc_block for n in (30, 17)])
    blocks = torch.full((47, 2, WIDE.slc_count), -1, dtype=torch.int32)
    blocks[..., 0] = own[:, None]
    blocks = blocks.to(DEVICE)
    o, details = run(case, backend="triton", blocks=blocks)
    assert torch.equal(details.blocks, blocks)
    assert_close("o", o, run(exact(case), backend="reference", blocks=blocks)[0], rms=1e-5)


def test_given_blocks_may_lie_in_memory_in_any_order():
    case = kernel_case([30, 17], spec=WIDE)
    _, details = run(case, backend="triton")
    turned = details.blocks.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not turned.is_contiguous()
    want, _ = run(case, backend="triton", blocks=details.blocks)
    o, _ = run(case, backend="triton", blocks=turned)
    assert torch.equal(o, want)


def test_packed_documents_equal_separate_ones_bitwise():
    lengths = [21, 1, 40]
    case = kernel_case(lengths, spec=WIDE)
    o, details = run(case, backend="triton")
    for tokens, rows in slices(lengths, WIDE):
        one, one_details = run(alone(case, tokens, rows), backend="triton")
        assert torch.equal(o[tokens], one)
        assert torch.equal(details.blocks[tokens], one_details.blocks)


def test_a_later_token_changes_nothing_before_it():
    lengths = [50]
    case = kernel_case(lengths, spec=WIDE)
    before = nsa_attention(**case, backend="triton")
    for t in (1, 8, 31, 49):
        later = changed(case)
        with torch.no_grad():
            for name in ("q", "k_slc", "v_slc", "k_win", "v_win", "gates"):
                later[name][t:] = 3.0
            first = max(0, (t - WIDE.cmp_block) // WIDE.cmp_stride + 1)  # blocks that hold token t or a later one
            later["k_cmp"][first:], later["v_cmp"][first:] = 3.0, 3.0
        assert torch.equal(nsa_attention(**later, backend="triton")[:t], before[:t])


def test_rows_that_belong_to_nobody_may_hold_anything():
    case = kernel_case([20, 13], spec=WIDE, spare=4)
    before = nsa_attention(**case, backend="triton")
    before_gradients = gradients(case, before)
    filled = changed(case)
    with torch.no_grad():
        filled["k_cmp"][-4:], filled["v_cmp"][-4:] = torch.nan, torch.inf
    after = nsa_attention(**filled, backend="triton")
    assert torch.equal(before, after)
    for name, got in gradients(filled, after).items():
        assert torch.equal(got, before_gradients[name]), name


def test_two_runs_give_the_same_bits_gradients_included():
    case = kernel_case([33, 18], spec=WIDE)
    first, second = (gradients(case, nsa_attention(**case, backend="triton")) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in DIFFERENTIABLE)


def test_a_gate_of_zero_silences_its_branch():
    case = kernel_case([30], spec=WIDE)
    with torch.no_grad():
        case["gates"][..., 1] = 0
    found = gradients(case, nsa_attention(**case, backend="triton"))
    wanted = exact(case)
    want = gradients(wanted, nsa_attention(**wanted, backend="reference"))
    assert not found["k_slc"].any()
    assert not found["v_slc"].any()
    for name in ("q", "gates", "k_win", "v_cmp"):
        assert_close(name, found[name], want[name], rms=3e-5)


def test_pytorch_accepts_the_op():
    case = kernel_case([9, 12], spec=SMALL)
    spec = list(astuple(case.pop("spec")))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(nsa_forward, (*case.values(), None, spec, 0.3), test_utils=checks)


def test_a_compiled_function_around_the_op_is_one_graph_with_the_same_result():
    case = kernel_case([9, 12], spec=SMALL)

    def twice(q):
        return nsa_attention(**{**case, "q": q * 2}, backend="triton") * 2

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    a, b = twice(case["q"]), compiled(case["q"])
    assert torch.equal(a, b)
    ga, gb = (torch.autograd.grad(x.sum(), case["q"])[0] for x in (a, b))
    assert torch.equal(ga, gb)


def test_activation_checkpointing_changes_no_bit():
    case = kernel_case([9, 12], spec=SMALL)
    plain = gradients(case, nsa_attention(**case, backend="triton"))
    again = gradients(case, checkpoint(lambda: nsa_attention(**case, backend="triton"), use_reentrant=False))
    assert all(torch.equal(plain[name], again[name]) for name in DIFFERENTIABLE)
