"""Compression on a GPU, in half precision against the reference in float32, and how many kernels it launches."""

import pytest
import torch
from helpers import assert_close

from nsa_train.ops import reference
from nsa_train.ops.compress import KINDS, compress
from nsa_train.ops.nsa import NSASpec
from nsa_train.ops.segments import Segments
from nsa_train.packing import Packing

pytestmark = pytest.mark.gpu
SPEC = NSASpec()
LENGTHS = [31, 1, 1000, 32, 47, 2113, 48]
NAMES = ("y", "x", "w1", "bias", "w2")
LAUNCHES = {"mlp": (4, 7), "linear": (3, 5), "mean": (2, 1)}


def case(kind, width):
    """Segments, cu_seqlens, and x in bf16 (not contiguous) with the parameters."""
    torch.manual_seed(0)
    shapes = {
        "mlp": [(width, 32 * width), (width,), (width, width)], "linear": [(width, 32 * width), (width,)],
        "gated_pool": [(width,), (32,)], "mean": [],
    }[kind]  # fmt: skip
    drawn = [torch.randn(4, sum(LENGTHS), width), *(torch.randn(shape) * shape[-1] ** -0.5 for shape in shapes)]
    x, *weights = (leaf.to("cuda", torch.bfloat16).requires_grad_() for leaf in drawn)
    cu_seqlens = Packing.from_lengths(LENGTHS, 9).cu_seqlens.cuda()
    return Segments(cu_seqlens, sum(LENGTHS), SPEC), cu_seqlens, [x.detach().transpose(0, 1).requires_grad_(), *weights]


@pytest.mark.usefixtures("unwritten_memory_is_poison")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [50, 64, 96, 128, 192])
def test_blocks_and_gradients_are_those_of_the_reference(kind, width):
    segments, cu_seqlens, leaves = case(kind, width)
    used = int(segments.used.sum())
    dy = torch.randn(len(segments.used), 4, width, device="cuda", dtype=torch.bfloat16)

    def computed():
        y = compress(leaves[0], segments, kind, *leaves[1:])
        return [y, *torch.autograd.grad(y, leaves, dy)]

    got = computed()
    assert all(torch.equal(a, b) for a, b in zip(got, computed(), strict=True))
    assert not got[0][used:].any()
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    blocks = reference.compressed_blocks(wide[0], cu_seqlens, SPEC, len(segments.used))
    y = getattr(reference, f"phi_{kind}")(blocks, *wide[1:])[:used]
    want = [y, *torch.autograd.grad(y, wide, dy[:used].float())]
    for name, a, b in zip(NAMES, [got[0][:used], *got[1:]], want, strict=False):
        assert_close(name, a, b, rms=1e-2)


@pytest.mark.parametrize("kind", LAUNCHES)
def test_there_are_a_handful_of_launches_and_no_copies(kind):
    """A matrix product may take two: it and the sum of its parts."""
    segments, _, leaves = case(kind, 192)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    y = compress(leaves[0], segments, kind, *leaves[1:])
    dy = torch.randn_like(y)
    torch.autograd.grad(y, leaves, dy)
    with torch.profiler.profile(activities=activities) as forward:
        y = compress(leaves[0], segments, kind, *leaves[1:])
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as backward:
        torch.autograd.grad(y, leaves, dy)
        torch.cuda.synchronize()
    products = {"mlp": (2, 4), "linear": (1, 2), "mean": (0, 0)}[kind]
    for profile, launches, extra in zip((forward, backward), LAUNCHES[kind], products, strict=True):
        events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        names = [e.name for e in events if not e.name.startswith("Memset")]
        assert launches <= len(names) <= launches + extra, names
        assert [name for name in names if "elementwise_kernel" in name] == []  # PyTorch's copies are such
