"""DeepSpeed around the model: process group, engine settings made from ours, one optimizer step, and its sharded state.

The settings are written out in full, because DeepSpeed accepts misspelt keys and changes defaults between versions.
Two things are known to be wrong in 0.19 and are never used here: ZeRO stage 0 with bf16 (one extra Adam step) and
optimizers named in its JSON (compiled at run time).
"""

from __future__ import annotations

import datetime
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import record_function

from nsa_train import runtime
from nsa_train.config import schema
from nsa_train.config.deepspeed_keys import merged
from nsa_train.errors import ConfigError, NsaTrainError
from nsa_train.parallel import one_rank

T = TypeVar("T")
BUCKET_ELEMENTS = 200_000_000  # that are reduced or gathered at once
PARTS = ("master", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each weight


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


def on_rank(rank: int, work: Callable[[], T]) -> T:
    """One rank does the work, every rank gets its result, or its NsaTrainError."""
    outcome: list[Any] = [None, None]
    if runtime.rank() == rank:
        try:
            outcome[0] = work()
        except NsaTrainError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=rank)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_rank_zero(work: Callable[[], T]) -> T:
    """Rank 0 does the work, every rank gets its result, or its NsaTrainError."""
    return on_rank(0, work)


def shape_of(parameter: Tensor) -> list[int]:
    """Also of a parameter of which this rank holds a part."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def sum_over_ranks(*tensors: Tensor) -> None:
    """All-reduce in place."""
    if dist.get_world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def engine_settings(
    parallel: schema.ParallelConfig, dtype: torch.dtype, clip: float, micro_rows: int, accumulation: int, world: int
) -> dict[str, Any]:
    """The configuration that DeepSpeed is given. Raises ConfigError where `auto` became what the stage refuses."""
    bf16 = dtype == torch.bfloat16
    if bf16 and parallel.zero_stage == 1:
        raise ConfigError(schema.AUTO_AT_STAGE_1)
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "round_robin_gradients": False,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
    }
    pinned = {"pin_memory": torch.cuda.is_available()}
    if parallel.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": parallel.offload_optimizer, **pinned}
    if parallel.offload_params != "none":
        zero["offload_param"] = {"device": parallel.offload_params, **pinned}
    ours = {
        "train_batch_size": micro_rows * accumulation * world,
        "train_micro_batch_size_per_gpu": micro_rows,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": parallel.reduce_dtype if bf16 else "fp32",
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # its own is compiled at run time; torch's fused AdamW runs on CPUs too
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }
    return merged(ours, parallel.deepspeed)


@dataclass(frozen=True)
class Piece:
    """Elements [start, stop) of a flattened parameter; this rank holds them at `at` in its flat vector `group`."""

    name: str
    start: int
    stop: int
    group: int
    at: int

    @property
    def place(self) -> slice:
        return slice(self.at, self.at + self.stop - self.start)


class Engine:
    """A DeepSpeed engine with ZeRO stage 1, 2 or 3 and a torch AdamW inside.

    At stage 3 a weight is whole only while its module runs. The experts of a layer are one parameter of one module, so
    which weights are gathered never depends on the routing, and no module needs to be marked as a leaf.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any]) -> None:
        import deepspeed

        self.shapes = {name: shape_of(parameter) for name, parameter in model.named_parameters()}
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        # The norm that follows tells a non-finite gradient as well; this would ask for every parameter by itself.
        # At stage 3 DeepSpeed relies on the norm, too.
        self._zero.check_overflow = lambda partition_gradients=True: None
        zero, bf16 = settings["zero_optimization"], settings["bf16"]["enabled"]
        if one_rank.adds_at_once(dist.get_world_size(), zero["stage"], bf16, "offload_optimizer" in zero):
            one_rank.add_gradients_at_once(self._zero)
        self.module: Any = model
        self.accumulation: int = settings["gradient_accumulation_steps"]
        self._weights_sharded: bool = zero["stage"] == 3

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

    def close(self) -> None:
        """Take DeepSpeed's hooks and buffers away."""
        self._engine.destroy()

    def backward(self, loss_share: Tensor) -> None:
        """`loss_share` summed over micro-batches and ranks is the step's loss; DeepSpeed's means are undone here."""
        self._engine.backward(loss_share * (self.accumulation * dist.get_world_size()))
        with record_function("optimizer"):
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

    def whole_weights(self) -> dict[str, Tensor]:
        """Every weight and buffer by name in rank 0's host memory; nothing on other ranks. Called on all ranks."""
        import deepspeed

        found = {}
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=self._weights_sharded):
                if runtime.rank() == 0:
                    found[name] = parameter.detach().cpu().clone()
        if runtime.rank() == 0:
            found |= {name: buffer.cpu() for name, buffer in self.module.named_buffers()}
        return found

    # Sharded state: each rank holds flat fp32 vectors. Cut into pieces of parameters they fit any layout.

    def pieces(self) -> list[Piece]:
        """What this rank's flat vectors hold, without padding."""
        return list(self._pieces_of_weights() if self._weights_sharded else self._pieces_of_groups())

    def _pieces_of_groups(self) -> Iterator[Piece]:
        """Stages 1 and 2: the parameters of a group lie one behind the other, and the whole is cut in equal parts."""
        groups = zip(self._zero.round_robin_bit16_groups, self._zero.round_robin_bit16_offsets, strict=True)
        for group, ((parameters, offsets), size) in enumerate(zip(groups, self._zero.partition_size, strict=True)):
            first = runtime.rank() * size
            for parameter, offset in zip(parameters, offsets, strict=True):
                start, stop = max(offset, first), min(offset + parameter.numel(), first + size)
                if start < stop:
                    yield Piece(self._names[id(parameter)], start - offset, stop - offset, group, start - first)

    def _pieces_of_weights(self) -> Iterator[Piece]:
        """Stage 3: each parameter is cut in equal parts."""
        for group, parameters in enumerate(self._zero.fp16_groups):
            at = 0
            for parameter in parameters:
                size = parameter.partition_numel()
                start, stop = runtime.rank() * size, min((runtime.rank() + 1) * size, parameter.ds_numel)
                if start < stop:
                    yield Piece(self._names[id(parameter)], start, stop, group, at)
                at += size

    @property
    def _masters(self) -> list[Tensor]:
        """This rank's flat fp32 weights."""
        zero = self._zero
        return zero.fp32_partitioned_groups_flat if self._weights_sharded else zero.single_partition_of_fp32_groups

    def steps_taken(self) -> int:
        """Optimizer steps that AdamW has taken (skipped ones are not counted)."""
        state = self._zero.optimizer.state.get(self._masters[0])
        return int(state["step"]) if state else 0

    def _flat_state(self) -> list[dict[str, Tensor]]:
        """For each of this rank's flat vectors the PARTS; moments are zeros before the first step."""
        found = []
        for master in self._masters:
            state = self._zero.optimizer.state.get(master) or {}
            moments = {part: state[part] if state else torch.zeros_like(master) for part in PARTS[1:]}
            found.append({"master": master.detach(), **moments})
        return found

    def shard(self) -> dict[str, Tensor]:
        """This rank's pieces: `master/<name>`, `exp_avg/<name>`, `exp_avg_sq/<name>`, all flat and fp32."""
        flat = self._flat_state()
        return {
            f"{part}/{piece.name}": flat[piece.group][part][piece.place] for piece in self.pieces() for part in PARTS
        }

    def load_shard(self, read: Callable[[str, Piece], Tensor], steps_taken: int) -> None:
        """Take this rank's pieces from `read(part, piece)` and refresh the working weights of every rank."""
        fused = self._zero.optimizer.defaults.get("fused")
        for master in self._masters if steps_taken else ():
            self._zero.optimizer.state[master] = {
                "step": torch.tensor(float(steps_taken), device=master.device if fused else "cpu"),
                **{part: torch.zeros_like(master) for part in PARTS[1:]},
            }
        flat = self._flat_state()
        for piece in self.pieces():
            for part in PARTS:
                flat[piece.group][part][piece.place] = read(part, piece)
        if self._weights_sharded:
            self._zero._partition_all_parameters()
            for group in range(len(self._masters)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            self._zero._post_step([])  # gathers the small parameters that stay whole between steps
        else:
            self._zero.update_lp_params()
