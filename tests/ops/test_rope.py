"""The kernel of rotary positions against its form in PyTorch, in Triton's interpreter."""

import pytest
import torch
from helpers import assert_close

from nsa_train.ops.rope import rotate, rotate_kernel

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_poison")


@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 3, 6), (40, 2, 64), (33, 5, 192)])
def test_rotation_and_its_gradient(shape):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    angle = 10 * torch.randn(shape[0], shape[2] // 2, generator=generator)
    cos, sin = 1.3 * angle.cos(), 1.3 * angle.sin()  # YaRN makes them larger than 1
    leaf = x.clone().requires_grad_()
    want = rotate(leaf, cos, sin)
    assert_close("rotated", rotate_kernel(x, cos, sin, 1.0), want, rms=1e-6)
    (wanted,) = torch.autograd.grad(want, leaf, grad)
    assert_close("gradient", rotate_kernel(grad, cos, sin, -1.0), wanted, rms=1e-6)
