"""DeepSpeed around the model: process group, engine settings made from ours, one optimizer step, and its sharded state.

The settings are written out in full, because DeepSpeed accepts misspelt keys and changes defaults between versions.
Two things are known to be wrong in 0.19 and are never used here: ZeRO stage 0 with bf16 (one extra Adam step) and
optimizers named in its JSON (compiled at run time).
"""

from __future__ import annotations

import datetime
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsa_train import runtime
from nsa_train.errors import NsaTrainError

T = TypeVar("T")


def start_processes(device: torch.device, timeout_s: int) -> None:
    """Join the process group: NCCL on GPUs, gloo on CPUs."""
    runtime.quiet_deepspeed(device.type)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel("ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        deepspeed.ops.__compatible_ops__ = {}  # else gloo start-up compiles a C++ op: a minute, or a silent hang
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=timeout_s), verbose=False,
        )  # fmt: skip


def stop_processes() -> None:
    """Leave the process group; NCCL complains about ranks that just go."""
    dist.destroy_process_group()


def on_rank_zero(work: Callable[[], T]) -> T:
    """Rank 0 does the work, every rank gets its result, or its NsaTrainError."""
    outcome: list[Any] = [None, None]
    if runtime.rank() == 0:
        try:
            outcome[0] = work()
        except NsaTrainError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def sum_over_ranks(*tensors: Tensor) -> None:
    """All-reduce in place."""
    if dist.get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def engine_settings(
    zero_stage: int, dtype: torch.dtype, reduce_dtype: str, clip: float, micro_rows: int, accumulation: int, world: int
) -> dict[str, Any]:
    """The configuration that DeepSpeed is given."""
    bf16 = dtype == torch.bfloat16
    return {
        "train_batch_size": micro_rows * accumulation * world,
        "train_micro_batch_size_per_gpu": micro_rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": reduce_dtype if bf16 else "fp32",
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "round_robin_gradients": False,
            "reduce_bucket_size": 200_000_000,
            "allgather_bucket_size": 200_000_000,
        },
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the flat vector of its optimizer group."""

    name: str
    offset: int
    shape: tuple[int, ...]


class Engine:
    """A DeepSpeed engine with ZeRO stage 1 or 2 and a torch AdamW inside."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> None:
        import deepspeed

        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        self.module: Any = model
        self.accumulation: int = settings["gradient_accumulation_steps"]

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def backward(self, loss_share: Tensor) -> None:
        """`loss_share` summed over micro-batches and ranks is the step's loss; DeepSpeed's means are undone here."""
        self._engine.backward(loss_share * (self.accumulation * dist.get_world_size()))
        self._engine.step()  # acts on the last micro-batch of the step

    @property
    def skipped(self) -> bool:
        """The last step had a non-finite gradient on some rank, and no rank took it."""
        return bool(self._zero.overflow)

    @property
    def gradient_norm(self) -> float:
        """Global norm of the last step before clipping."""
        return float(self._engine.get_global_grad_norm())

    def set_lr(self, lr: float) -> None:
        for group in self._zero.param_groups:
            group["lr"] = lr

    # Sharded state: each group is one flat fp32 vector, cut into equal partitions, so any world size can re-cut it.

    def layout(self) -> list[list[Slot]]:
        """Parameters of each optimizer group in the order of its flat vector."""
        return [
            [Slot(self._names[id(p)], int(at), tuple(p.shape)) for p, at in zip(group, offsets, strict=True)]
            for group, offsets in zip(
                self._zero.round_robin_bit16_groups, self._zero.round_robin_bit16_offsets, strict=True
            )
        ]

    def partition_sizes(self) -> list[int]:
        return [int(size) for size in self._zero.partition_size]

    def steps_taken(self) -> int:
        """Optimizer steps that AdamW has taken (skipped ones are not counted)."""
        state = self._zero.optimizer.state.get(self._zero.single_partition_of_fp32_groups[0])
        return int(state["step"]) if state else 0

    def shard(self) -> dict[str, Tensor]:
        """This rank's partition of each group: `<group>.master`, `.exp_avg`, `.exp_avg_sq`, all fp32."""
        tensors = {}
        for i, master in enumerate(self._zero.single_partition_of_fp32_groups):
            state = self._zero.optimizer.state.get(master) or {}
            tensors[f"{i}.master"] = master.detach()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{i}.{moment}"] = state[moment] if moment in state else torch.zeros_like(master)
        return tensors

    def load_shard(self, tensors: dict[str, Tensor], steps_taken: int) -> None:
        """Put this rank's partition back and refresh the working weights of every rank from it."""
        fused = self._zero.optimizer.defaults.get("fused")
        for i, master in enumerate(self._zero.single_partition_of_fp32_groups):
            master.data.copy_(tensors[f"{i}.master"])
            if steps_taken:
                self._zero.optimizer.state[master] = {
                    "step": torch.tensor(float(steps_taken), device=master.device if fused else "cpu"),
                    "exp_avg": tensors[f"{i}.exp_avg"].to(master.device),
                    "exp_avg_sq": tensors[f"{i}.exp_avg_sq"].to(master.device),
                }
        self._zero.update_lp_params()
