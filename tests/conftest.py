"""Test environment, set before anything imports torch: one thread, no network, the CPU unless there is a GPU.

Without a GPU, Triton kernels run in Triton's interpreter, on CPU tensors.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_make_parametrize_id(val, argname):
    """Names of tests do not hold bytes: those of a gzip file tell the time."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture
def unwritten_memory_is_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write must not matter: fresh memory holds NaN, or a huge integer."""
    import torch

    def poisoned(make):
        def call(*sizes, **options):
            x = make(*sizes, **options)
            return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(2**30) if x.dtype == torch.int32 else x

        return call

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
