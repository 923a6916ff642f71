"""Sliding window and gated sum on the GPU, in half precision, against the reference in float32."""

import pytest
import torch
from helpers import assert_close
from window_cases import DEVICE, NAMES, computed, expected, inputs, spec

from nsa_train.ops import combine, reference, window, window_hopper
from nsa_train.ops.dense import dense_attention
from nsa_train.ops.window_attention import window_attention
from nsa_train.packing import Packing

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("unwritten_memory_is_poison")]
PATHS = {"plain": window, "hopper": window_hopper}
MIXED = [31, 1, 1000, 8, 9, 2113, 64, 65, 127, 512, 513, 519, 520]
BOTH = [(192, 128, 16), (128, 128, 16), (64, 64, 16)]
PLAIN_ONLY = [(96, 64, 16), (192, 128, 4), (128, 128, 1), (64, 64, 3)]
CASES = [*(("plain", *c) for c in [*BOTH, *PLAIN_ONLY]), *(("hopper", *c) for c in BOTH)]


def module_for(path, case, w):
    if path == "hopper" and not window_hopper.takes(*case[:3], spec(w)):
        pytest.skip("needs a Hopper GPU")
    return PATHS[path]


@pytest.mark.parametrize("lengths", [MIXED, [8191], [1]], ids=str)
@pytest.mark.parametrize(("path", "D", "Dv", "G"), CASES)
def test_outputs_and_gradients_are_those_of_the_reference(path, D, Dv, G, lengths):
    Hk = 1 if lengths == [8191] else 2  # the reference holds every score
    case = inputs(lengths, Hk=Hk, G=G, D=D, Dv=Dv, dtype=torch.bfloat16)
    got = computed(lengths, 512, *case, D**-0.5, empty=3, module=module_for(path, case, 512))
    want = expected(lengths, 512, *case, D**-0.5, dtype=torch.float32)
    for name, a, b in zip(NAMES, got, want, strict=True):
        if lengths == [1] and name in ("dq", "dk"):
            assert a.abs().max() < 0.1  # zero but for the rounding of o in delta
        else:
            assert_close(name, a, b, rms=1e-2)


@pytest.mark.parametrize("w", [64, 128, 192, 1024])
def test_other_windows_of_the_hopper_path(w):
    case = inputs(MIXED, G=16, D=192, Dv=128, dtype=torch.bfloat16)
    got = computed(MIXED, w, *case, 0.07, module=module_for("hopper", case, w))
    for name, a, b in zip(NAMES, got, expected(MIXED, w, *case, 0.07, dtype=torch.float32), strict=True):
        assert_close(name, a, b, rms=1e-2)


@pytest.mark.parametrize("path", PATHS)
def test_half_precision_of_the_other_kind(path):
    case = inputs(MIXED, G=16, D=192, Dv=128, dtype=torch.float16)
    got = computed(MIXED, 512, *case, 0.07, module=module_for(path, case, 512))
    for name, a, b in zip(NAMES, got, expected(MIXED, 512, *case, 0.07, dtype=torch.float32), strict=True):
        assert_close(name, a, b, rms=1e-2)


@pytest.mark.parametrize("path", PATHS)
def test_dq_is_added_to_what_is_there(path):
    case = inputs(MIXED, G=16, D=192, Dv=128, dtype=torch.bfloat16)
    module = module_for(path, case, 512)
    before = torch.randn_like(case[0])
    want = before.float() + computed(MIXED, 512, *case, 0.07, module=module)[2].float()
    assert_close("dq", computed(MIXED, 512, *case, 0.07, dq=before, module=module)[2], want, rms=5e-3)


@pytest.mark.parametrize("path", PATHS)
def test_two_runs_give_the_same_bits(path):
    case = inputs([8191, 50], Hk=4, G=16, D=192, Dv=128, dtype=torch.bfloat16)
    module = module_for(path, case, 512)
    first, second = (computed([8191, 50], 512, *case, 0.07, module=module) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_packed_documents_give_the_bits_of_separate_ones(path):
    case = inputs(MIXED, Hk=2, G=16, D=128, Dv=128, dtype=torch.bfloat16)
    module = module_for(path, case, 512)
    together = computed(MIXED, 512, *case, 0.1, module=module)
    for n, one in zip(MIXED, torch.arange(sum(MIXED), device=DEVICE).split(MIXED), strict=True):
        alone = computed([n], 512, *(x[one] for x in case), 0.1, module=module)
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, together, strict=True))


def test_both_paths_agree_on_long_sequences():
    lengths = [20000, 12768]
    case = inputs(lengths, Hk=2, G=16, D=192, Dv=128, dtype=torch.bfloat16)
    hopper = computed(lengths, 512, *case, 0.07, module=module_for("hopper", case, 512))
    for name, a, b in zip(NAMES, hopper, computed(lengths, 512, *case, 0.07), strict=True):
        assert_close(name, a, b, rms=5e-3)


def test_the_branch_by_itself_is_dense_attention_with_a_window():
    q, k, v, do, _ = inputs(MIXED, G=16, D=64, Dv=64, dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    cu_seqlens = Packing.from_lengths(MIXED).cu_seqlens.to(DEVICE)
    got = window_attention(*leaves, spec(512), cu_seqlens)
    wide = [x.detach().float().requires_grad_() for x in leaves]
    want = dense_attention(*wide, MIXED, window=512)
    assert_close("o", got, want, rms=1e-2)
    found, wanted = torch.autograd.grad(got, leaves, do), torch.autograd.grad(want, wide, do.float())
    for name, a, b in zip(NAMES[2:], found, wanted, strict=True):
        assert_close(name, a, b, rms=1e-2)


@pytest.mark.parametrize(("Hq", "Dv"), [(64, 128), (16, 64), (3, 48)])
def test_gated_sum(Hq, Dv):
    T = 1537
    do, *outputs = (torch.randn(T, Hq, Dv, device=DEVICE, dtype=torch.bfloat16) for _ in range(4))
    gates = torch.rand(T, Hq, 3, device=DEVICE, dtype=torch.bfloat16)
    lses = [torch.randn(T, Hq, device=DEVICE) for _ in range(3)]
    wide = [o.float() for o in outputs]
    assert_close("out", combine.forward(gates, *outputs), reference.gated_sum(gates.float(), wide), rms=5e-3)
    dgates, delta, lse_gated = combine.backward(do, gates, tuple(outputs), tuple(lses))
    want = torch.stack([(do.float() * o).sum(-1) for o in wide])
    assert_close("delta", delta, want, rms=1e-5)
    assert_close("dgates", dgates, want.permute(1, 2, 0), rms=5e-3)
    lowered = torch.stack(lses) - gates.float().permute(2, 0, 1).log2()
    seen = lowered.isfinite()
    assert torch.equal(lse_gated.isfinite(), seen)
    assert_close("lse_gated", lse_gated[seen], lowered[seen], rms=1e-5)
