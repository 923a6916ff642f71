"""Values for a model on the meta device, parameter by parameter: one rank makes it, in fp32 on its host, all get it.

At ZeRO stage 3 it is partitioned before the next one comes, so that no rank ever holds the whole model.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nsa_train import runtime
from nsa_train.parallel.engine import on_rank

AHEAD_BYTES = 4 * 2**30  # of fp32 values that a rank makes before their turn comes: two large parameters, or many small


class Made(NamedTuple):
    """A parameter's values in the dtype of the run, and the sha256 of what they were in fp32."""

    values: Tensor
    sha256: str


def materialise(
    model: nn.Module, make: dict[str, Callable[[], Tensor]], dtype: torch.dtype, settings: dict[str, Any]
) -> dict[str, str]:
    """Put every parameter on the device in `dtype`, at stage 3 only this rank's partition; sha256 of each by name.

    make: by name, what makes the fp32 values; called on one rank, in a thread. An NsaTrainError of it is raised by all.
    Empty: all are zeros without hashes, for a checkpoint to fill. Buffers go to the device as they are.
    """
    parameters, device = dict(model.named_parameters()), runtime.device()
    makers = _makers(parameters) if make else {}
    own = (name for name, maker in makers.items() if maker == runtime.rank())
    partition = _partition(settings)
    hashes = {}
    with ThreadPoolExecutor() as threads:
        made = _Ahead(threads, ((4 * parameters[name].numel(), partial(_made, make[name], dtype)) for name in own))
        for name, parameter in parameters.items():
            whole = nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=device))
            if makers:
                hashes[name] = on_rank(makers[name], partial(_take, made, whole))
                dist.broadcast(whole.data.view(torch.uint8), makers[name])
            torch.utils.swap_tensors(parameter, whole)  # in place: modules may share it
            partition(parameter)
    for buffer in model.buffers():
        buffer.data = buffer.to(device)
    return hashes


def _makers(parameters: dict[str, nn.Parameter]) -> dict[str, int]:
    """The rank that makes each parameter: the one with the least to make so far."""
    loads, makers = [0] * dist.get_world_size(), {}
    for name, parameter in parameters.items():
        makers[name] = loads.index(min(loads))
        loads[makers[name]] += parameter.numel()
    return makers


def _made(make: Callable[[], Tensor], dtype: torch.dtype) -> Made:
    values = make()
    sha256 = hashlib.sha256(values.numpy()).hexdigest()
    return Made(values.to(dtype), sha256)  # rounded here: no fp32 copy on the device


def _take(made: _Ahead, whole: Tensor) -> str:
    values, sha256 = made.next()
    whole.data.copy_(values)
    return sha256


class _Ahead:
    """Results of tasks (bytes, work) in their order; threads work ahead as far as AHEAD_BYTES go, one in any case."""

    def __init__(self, threads: Executor, tasks: Iterable[tuple[int, Callable[[], Made]]]) -> None:
        self._threads, self._tasks = threads, deque(tasks)
        self._begun: deque[tuple[int, Future[Made]]] = deque()
        self._begin()

    def _begin(self) -> None:
        while self._tasks:
            size, work = self._tasks[0]
            if self._begun and size + sum(begun for begun, _ in self._begun) > AHEAD_BYTES:
                return
            self._tasks.popleft()
            self._begun.append((size, self._threads.submit(work)))

    def next(self) -> Made:
        result = self._begun.popleft()[1].result()
        self._begin()
        return result


def _partition(settings: dict[str, Any]) -> Callable[[nn.Parameter], None]:
    """What leaves this rank its partition of a parameter at stage 3, as DeepSpeed would of a whole model's."""
    if settings["zero_optimization"]["stage"] < 3:
        return lambda parameter: None
    import deepspeed

    # A context manager for constructors, too, but that would round every buffer to bf16.
    zero = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=settings)
    return lambda parameter: zero._convert_to_zero_parameters([parameter])
