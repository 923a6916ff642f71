"""Selected attention on the GPU in half precision, plain and Hopper kernels, against the reference in float32."""

import pytest
import torch
from helpers import assert_close
from selected_cases import DEVICE, NAMES, computed, expected, inputs

from nsa_train.ops import selected, selected_hopper
from nsa_train.ops.nsa import NSASpec
from nsa_train.ops.selected_plan import ITEM_TOKENS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("unwritten_memory_is_poison")]
PATHS = {"plain": selected, "hopper": selected_hopper}
SPEC = NSASpec()
MIXED = [1, 31, 1000, 8, 9, 2113, 63, 64, 65, 127, 512, 513]
BOTH = [(192, 128, 16), (128, 128, 16), (64, 64, 16)]
PLAIN_ONLY = [(96, 64, 16), (192, 128, 4), (128, 128, 1), (64, 64, 3)]
CASES = [*(("plain", *c) for c in [*BOTH, *PLAIN_ONLY]), *(("hopper", *c) for c in BOTH)]


def module_for(path, case, sizes=SPEC):
    if path == "hopper" and not selected_hopper.takes(*case[:3], sizes):
        pytest.skip("needs a Hopper GPU")
    return PATHS[path]


def compare(got, want, rms=1e-2):
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert_close(name, a, b, rms)


@pytest.mark.parametrize("lengths", [MIXED, [8191], [1]], ids=str)
@pytest.mark.parametrize(("path", "D", "Dv", "G"), CASES)
def test_outputs_and_gradients_are_those_of_the_reference(path, D, Dv, G, lengths):
    Hk = 1 if lengths == [8191] else 2  # the reference holds every score
    case = inputs(lengths, SPEC, Hk=Hk, G=G, D=D, Dv=Dv, dtype=torch.bfloat16)
    got = computed(lengths, SPEC, *case, D**-0.5, empty=3, module=module_for(path, case))
    want = expected(lengths, SPEC, *case, D**-0.5, dtype=torch.float32)
    for name, a, b in zip(NAMES, got, want, strict=True):
        if lengths == [1] and name in ("dq", "dk"):
            assert a.abs().max() < 0.1  # zero but for the rounding of o in delta
        else:
            assert_close(name, a, b, rms=1e-2)


@pytest.mark.parametrize("count", [3, 5, 24])
def test_other_counts_of_blocks(count):
    sizes = NSASpec(slc_count=count)
    case = inputs(MIXED, sizes, Hk=2, G=16, D=192, Dv=128, dtype=torch.bfloat16)
    got = computed(MIXED, sizes, *case, 0.07, module=module_for("hopper", case, sizes))
    compare(got, expected(MIXED, sizes, *case, 0.07, dtype=torch.float32))


@pytest.mark.parametrize("path", PATHS)
def test_half_precision_of_the_other_kind(path):
    case = inputs(MIXED, SPEC, Hk=2, G=16, D=192, Dv=128, dtype=torch.float16)
    got = computed(MIXED, SPEC, *case, 0.07, module=module_for(path, case))
    compare(got, expected(MIXED, SPEC, *case, 0.07, dtype=torch.float32))


@pytest.mark.parametrize("path", PATHS)
def test_blocks_behind_the_own_one_and_missing_ones_are_not_read(path):
    case = list(inputs([1500], SPEC, Hk=2, G=16, D=128, Dv=128, dtype=torch.bfloat16))
    case[3] = case[3].clone()
    case[3][:, :, 8:] = torch.arange(16, 24, dtype=torch.int32, device=DEVICE)  # behind most tokens
    own = (torch.arange(1500, dtype=torch.int32, device=DEVICE) // 64)[:, None]
    case[3][:, :, 7] = torch.where((case[3][:, :, :7] == own[..., None]).any(-1), -1, own)
    got = computed([1500], SPEC, *case, 0.1, module=module_for(path, case))
    compare(got, expected([1500], SPEC, *case, 0.1, dtype=torch.float32))


@pytest.mark.parametrize("path", PATHS)
def test_dq_is_added_to_what_is_there(path):
    case = inputs(MIXED, SPEC, Hk=2, G=16, D=192, Dv=128, dtype=torch.bfloat16)
    module = module_for(path, case)
    before = torch.randn_like(case[0])
    want = before.float() + computed(MIXED, SPEC, *case, 0.07, module=module)[2].float()
    assert_close("dq", computed(MIXED, SPEC, *case, 0.07, dq=before, module=module)[2], want, rms=5e-3)


@pytest.mark.parametrize("path", PATHS)
def test_two_runs_give_the_same_bits(path):
    lengths = [2 * ITEM_TOKENS + 4095, 50]  # block 0 is read by all: partial sums
    case = inputs(lengths, SPEC, Hk=4, G=16, D=192, Dv=128, dtype=torch.bfloat16)
    module = module_for(path, case)
    first, second = (computed(lengths, SPEC, *case, 0.07, module=module) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_packed_documents_give_the_bits_of_separate_ones(path):
    case = inputs(MIXED, SPEC, Hk=2, G=16, D=128, Dv=128, dtype=torch.bfloat16)
    module = module_for(path, case)
    together = computed(MIXED, SPEC, *case, 0.1, module=module)
    for n, one in zip(MIXED, torch.arange(sum(MIXED), device=DEVICE).split(MIXED), strict=True):
        alone = computed([n], SPEC, *(x[one] for x in case), 0.1, module=module)
        assert all(torch.equal(a, b[one]) for a, b in zip(alone, together, strict=True))


def test_both_paths_agree_on_long_sequences():
    lengths = [20000, 12768]
    case = inputs(lengths, SPEC, Hk=2, G=16, D=192, Dv=128, dtype=torch.bfloat16)
    hopper = computed(lengths, SPEC, *case, 0.07, module=module_for("hopper", case))
    compare(hopper, computed(lengths, SPEC, *case, 0.07), rms=5e-3)
