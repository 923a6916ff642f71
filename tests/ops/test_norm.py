"""The kernels of RMSNorm against PyTorch's form, in Triton's interpreter."""

import pytest
import torch
from helpers import assert_close

from nsa_train.ops import norm

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_poison")
EPS = 1e-2  # large enough to be missed


def drawn(R, M, dtype=torch.float32):
    """x, y, weight, and the gradients of the sum and of its norm."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((R, M), (R, M), (M,), (R, M), (R, M))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def alone(case):
    """The norm and its gradients."""
    x, _, weight, _, grad = case
    leaves = [leaf.clone().requires_grad_() for leaf in (x, weight)]
    out = norm.rms_norm(*leaves, EPS)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def of_sum(case):
    """Sum, norm and gradients, of the sum used by others too."""
    leaves = [leaf.clone().requires_grad_() for leaf in case[:3]]
    outs = norm.sum_and_norm(*leaves, EPS)
    return [*outs, *torch.autograd.grad(outs, leaves, case[3:])]


@pytest.fixture
def on_kernels(monkeypatch):
    return lambda on: monkeypatch.setattr(norm, "on_kernels", lambda x: on)


@pytest.mark.parametrize("R", [1, 7, 300])
@pytest.mark.parametrize("M", [1, 6, 96, 2048 + 2])
@pytest.mark.parametrize("form", [alone, of_sum])
def test_norms_and_gradients_are_the_plain_ones(form, R, M, on_kernels, monkeypatch):
    """With 3 programs in the backward pass some have several tiles, the last of them none."""
    monkeypatch.setattr(norm, "PROGRAMS", 3)
    case = drawn(R, M)
    found = []
    for on in (True, False):
        on_kernels(on)
        found.append(form(case))
    for i, (got, want) in enumerate(zip(*found, strict=True)):
        assert_close(str(i), got, want, rms=1e-5)


def test_the_sum_is_rounded_before_it_is_normed_and_the_norm_once(on_kernels):
    x, y, weight, *_ = drawn(40, 24, torch.bfloat16)
    on_kernels(True)
    total, out = norm.sum_and_norm(x, y, weight, EPS)
    exact = (x.double() + y.double()).float()
    cut = (exact.view(torch.int32) & -65536).view(torch.float32)  # the interpreter cuts off what bf16 does not hold
    assert torch.equal(total.float(), cut)
    want = torch.nn.functional.rms_norm(total.double(), (24,), weight.double(), EPS)
    assert ((out.double() - want).abs() <= 2**-7 * want.abs()).all()


@pytest.mark.parametrize("form", [alone, of_sum])
def test_no_rows_have_gradients_of_zero(form, on_kernels):
    on_kernels(True)
    *others, d_weight = form(drawn(0, 24))
    assert all(x.shape == (0, 24) for x in others)
    assert torch.equal(d_weight, torch.zeros(24))


@pytest.mark.parametrize("form", [alone, of_sum])
def test_a_nan_gradient_reaches_its_row_and_the_weight(form, on_kernels):
    on_kernels(True)
    case = drawn(9, 24)
    case[-1][4] = torch.nan
    *_, d_x, d_weight = form(case)
    assert d_x.isnan().all(1).tolist() == [row == 4 for row in range(9)]
    assert d_weight.isnan().all()


def test_a_row_that_is_too_wide_takes_the_plain_form(on_kernels, monkeypatch):
    on_kernels(True)
    monkeypatch.setattr(norm, "WIDEST", 16)
    monkeypatch.setattr(norm, "norm_kernel", None)
    case = drawn(3, 17)
    assert_close("sum", of_sum(case)[0], case[0] + case[1], rms=1e-6)
    assert alone(case)[0].shape == (3, 17)


def test_it_compiles_as_one_graph():
    case = drawn(7, 24)
    x, y, weight = (leaf.requires_grad_() for leaf in case[:3])
    compiled = torch.compile(norm.sum_and_norm, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, y, weight, EPS), norm.sum_and_norm(x, y, weight, EPS), strict=True):
        assert_close("norm", got, want, rms=1e-6)
