"""`trainer.cuda_graphs`: forward and backward pass of a micro-batch as a CUDA graph each, recorded once and replayed.

A pass of a small model is thousands of short kernels, and launching one takes the host longer than it takes the GPU to
run it. A graph is launched as a whole. To autograd the two graphs are one operation on the weights, so DeepSpeed's
hooks, accumulation, clipping and sharding are those of any other pass. What that rests on:

- Shapes do not depend on data, nothing in a pass asks the device, and what it derives from a batch (tables of
  documents, segments, angles) is computed on the device: it is in the graph. `Packing.lengths` is not, so a recorded
  pass has none, and full attention takes a kernel that reads none. Other numbers of the host belong to the kind of a
  pass.
- A graph reads and writes the memory of its recording. A micro-batch is copied there; weights and router biases are
  changed in place, once DeepSpeed has laid them out, which is before the first pass.
- Outputs and gradients lie there too, until the next pass. The loop is done with them by then, and so is DeepSpeed: in
  the backward pass itself it adds a bf16 gradient to fp32 sums of its own. (An fp32 one it might keep.)
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nsa_train.model.attention import Probe
from nsa_train.model.transformer import Output, Transformer
from nsa_train.ops.dense import flash4_takes
from nsa_train.packing import Packing

T = TypeVar("T")
WARM_UP = 3  # passes before a recording: kernels are compiled and libraries start, which no recording may hold


def replay_passes(model: Transformer, device: torch.device) -> str:
    """Have the model's training passes replayed from here on, where they can be; what is said of it."""
    if against := against_replays(model, device):
        return f"trainer.cuda_graphs has no effect here: {against}"
    model.forward = ReplayedPasses(model, CudaRecorder)  # type: ignore[method-assign]
    return "forward and backward passes are CUDA graphs from here on"


def against_replays(model: Transformer, device: torch.device) -> str | None:
    """Why this model's passes cannot be recorded on this machine; None: they can.

    PyTorch's grouped product, of the experts, asks a GPU before Hopper for its rows.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return "it needs a Hopper GPU or a later one"
    widths = model.config.key_dim, model.config.value_dim
    if model.layers[0].attention.config.branches == ("full",) and not flash4_takes(*widths):
        return f"full attention of widths {widths[0]}/{widths[1]} needs FlashAttention-4 for it, on a Hopper GPU"
    return None


class Recorder(Protocol):
    """Does work, or records it. Recordings are replayed in the order in which they were made."""

    def warm_up(self, work: Callable[[], Any]) -> None: ...

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """What the work gives, without values yet, and what fills it."""
        ...


class CudaRecorder:
    """CUDA graphs that share a pool of memory, recorded on a stream of their own."""

    def __init__(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Any]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        gc.collect()  # else an older graph might be destroyed during the recording, which ends that
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog, a thread of its own, may ask for the state of earlier work meanwhile.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            result = work()
        return result, graph.replay


class RecordedPass:
    """Forward and backward pass of a module, recorded for tensors like `inputs`.

    Called with such tensors it gives what the module gives: in the same memory each time, until the next call.
    Gradients reach the module's weights only, each of which must have one. A backward pass follows each forward pass.

    Recorded are passes on leaves of their own with the weights' memory. The weights' gradients are tied to the stream
    that first used them, because DeepSpeed keeps views of them that autograd knows: a recording may not wait for that.
    """

    def __init__(self, module: nn.Module, inputs: Sequence[Tensor], recorder: Recorder) -> None:
        self._module, self._weights = module, tuple(module.parameters())
        self._leaves = {name: weight.detach().requires_grad_() for name, weight in module.named_parameters()}
        self._inputs = tuple(x.clone() for x in inputs)
        self._live: tuple[Tensor, ...] = ()  # outputs of a forward pass with what autograd keeps, until the backward
        recorder.warm_up(self._both)
        self.outputs, self.forward = recorder.record(self._forward)
        self.output_gradients = self._room()
        self.gradients, self.backward = recorder.record(self._backward)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for own, x in zip(self._inputs, inputs, strict=True):
            own.copy_(x)
        return _Replay.apply(self, *self._weights)

    def _both(self) -> None:
        self._forward()
        self.output_gradients = self._room()
        self._backward()

    def _forward(self) -> tuple[Tensor, ...]:
        self._live = tuple(functional_call(self._module, self._leaves, self._inputs))
        return tuple(x.detach() for x in self._live)

    def _room(self) -> tuple[Tensor | None, ...]:
        """For the gradient of each output; None: it has none."""
        return tuple(torch.zeros_like(x) if x.requires_grad else None for x in self._live)

    def _backward(self) -> tuple[Tensor, ...]:
        live, self._live = self._live, ()
        pairs = [(x, grad) for x, grad in zip(live, self.output_gradients, strict=True) if grad is not None]
        return torch.autograd.grad([x for x, _ in pairs], list(self._leaves.values()), [grad for _, grad in pairs])


class _Replay(torch.autograd.Function):
    """Gives other tensors on the same memory each time: autograd and DeepSpeed write on tensors that they are given."""

    @staticmethod
    def forward(ctx, recorded: RecordedPass, *weights: Tensor) -> tuple[Tensor, ...]:
        recorded.forward()
        ctx.recorded = recorded
        outputs = tuple(x.detach() for x in recorded.outputs)
        without = (x for x, room in zip(outputs, recorded.output_gradients, strict=True) if room is None)
        ctx.mark_non_differentiable(*without)
        return outputs

    @staticmethod
    def backward(ctx, *grads: Tensor):
        recorded, ctx.recorded = ctx.recorded, None  # once; and whoever still holds the loss holds no graph
        for room, grad in zip(recorded.output_gradients, grads, strict=True):
            if room is not None:
                room.copy_(grad)
        recorded.backward()
        return None, *(x.detach() for x in recorded.gradients)


class _Plain(nn.Module):
    """The model as a module of tensors alone, without what was put around its `forward`."""

    def __init__(self, model: Transformer, forward: Callable[..., Output], chunk_tokens: int) -> None:
        super().__init__()
        self.model, self._forward, self._chunk_tokens = model, forward, chunk_tokens

    def forward(self, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor, positions: Tensor) -> Output:
        return self._forward(tokens, labels, Packing(cu_seqlens, positions, lengths=()), self._chunk_tokens)


class ReplayedPasses:
    """In place of a model's `forward`: passes that will run backward are replayed, the others run as ever.

    A pass is recorded when the first micro-batch of its kind comes, and forgotten with the first one of another kind:
    a stage of the run has one.
    """

    def __init__(self, model: Transformer, new_recorder: Callable[[], Recorder]) -> None:
        self._model, self._forward, self._new_recorder = model, model.forward, new_recorder
        self._kind: tuple[Any, ...] = ()
        self._recorded: RecordedPass | None = None

    def __call__(
        self, tokens: Tensor, labels: Tensor, packing: Packing, chunk_tokens: int, probes: list[Probe] | None = None
    ) -> Output:
        """As `Transformer.forward`."""
        if not torch.is_grad_enabled():
            return self._forward(tokens, labels, packing, chunk_tokens, probes)
        inputs = (tokens, labels, packing.cu_seqlens, packing.positions)
        kind = (*(x.shape for x in inputs), chunk_tokens, self._model.rope_factor)
        if self._recorded is None or kind != self._kind:
            self._recorded = None  # frees its memory for the next one
            plain = _Plain(self._model, self._forward, chunk_tokens)
            self._recorded, self._kind = RecordedPass(plain, inputs, self._new_recorder()), kind
        return Output(*self._recorded(*inputs))
