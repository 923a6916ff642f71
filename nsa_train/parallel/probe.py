"""A tiny layer through the engine's settings before the model: its gradient norm must be that of plain PyTorch.

Releases of DeepSpeed have scaled gradients wrongly without a word. Adam hides a factor; clipping and norms do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsa_train import runtime
from nsa_train.errors import NsaTrainError
from nsa_train.parallel.engine import Engine

WIDTH, ROWS = 16, 4
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative, of sums over ranks and micro-batches


def probe_engine(settings: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    """Raises NsaTrainError on every rank unless the engine's gradient norm is the right one. Takes about a second."""
    world, accumulation = dist.get_world_size(), settings["gradient_accumulation_steps"]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 3, (world, accumulation, ROWS, WIDTH), generator=generator).to(device, dtype)
    layer = nn.utils.skip_init(
        nn.Linear, WIDTH, WIDTH, bias=False, device=device, dtype=dtype
    )  # draws no random number
    nn.init.constant_(layer.weight, 1 / 8)
    (gradient,) = torch.autograd.grad(_loss_share(layer, rows, rows), [layer.weight])
    wanted = float(gradient.float().norm())
    engine = Engine(layer, torch.optim.AdamW(layer.parameters()), settings)
    for micro_batch in rows[runtime.rank()]:
        engine.backward(_loss_share(engine, micro_batch, rows))
    found = engine.gradient_norm
    engine.close()
    if not abs(found / wanted - 1) <= TOLERANCE[dtype]:
        raise NsaTrainError(
            f"DeepSpeed {runtime.versions()['deepspeed']} gives a tiny layer the gradient norm {found:.6g}, PyTorch "
            f"alone {wanted:.6g}: a run would be clipped wrongly. Install the version that constraints.txt names, or "
            "choose another option of parallel="
        )


def _loss_share(layer: Callable[[Tensor], Tensor], part: Tensor, whole: Tensor) -> Tensor:
    return layer(part).float().square().sum() / whole.numel()
