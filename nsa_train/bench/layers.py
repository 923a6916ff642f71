"""`nsa-train bench layers`: our kernels of a layer's small parts beside PyTorch's operations, compiled, and Liger's.

Forward and backward pass in the sizes of a preset: `norm` is the residual's addition and the RMSNorm behind it, `rope`
turns all query heads, `swiglu` the shared experts' hidden values, `loss` is the linear head with its cross-entropy.
Liger's kernels count where the package `liger-kernel` is installed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa_train import runtime
from nsa_train.bench import results
from nsa_train.bench.figures import plot_bars
from nsa_train.bench.timing import Timed, relative_error, side_by_side
from nsa_train.config.load import load_config
from nsa_train.config.schema import Config
from nsa_train.errors import NsaTrainError
from nsa_train.model.layers import rope_angles
from nsa_train.ops.experts import plain_swiglu, swiglu
from nsa_train.ops.loss import chunked_token_losses, token_losses
from nsa_train.ops.norm import plain_sum_and_norm, sum_and_norm
from nsa_train.ops.rope import plain_rotate, rotate

Outputs = tuple[Tensor, ...]
Work = Callable[..., Outputs]


class Part(NamedTuple):
    """leaves take gradients; the three functions take them and give the same outputs"""

    leaves: tuple[Tensor, ...]
    ours: Work
    plain: Work  # operations of PyTorch
    liger: Callable[[], Work]  # imports it


def parts(config: Config, tokens: int, device: str, dtype: torch.dtype) -> dict[str, Part]:
    """The parts in the sizes of a configuration, with values of one generator."""
    model, moe, eps = config.model, config.moe, config.model.norm_eps
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * std).to(device, dtype)

    T, M, V = tokens, model.width, model.vocab
    x, y, head = drawn(T, M), drawn(T, M), drawn(V, M, std=M**-0.5)
    q, gate_up = drawn(T, model.heads, model.key_dim), drawn(T, 2 * moe.shared * moe.expert_width)
    labels = torch.randint(V, (T,), generator=generator).to(device)
    cos, sin = rope_angles(torch.arange(T, device=device), model.key_dim, model.rope_theta)
    chunk = config.trainer.loss_chunk_tokens

    def liger_norm() -> Work:
        from liger_kernel.ops import LigerFusedAddRMSNormFunction

        return lambda x, y, weight: LigerFusedAddRMSNormFunction.apply(x, y, weight, eps)[::-1]

    def liger_rope() -> Work:
        from liger_kernel.ops import LigerRopeFunction

        tables = [torch.cat([table, table], -1)[None].to(dtype) for table in (cos, sin)]
        other = drawn(1, 1, T, model.key_dim)  # it turns queries and keys in one call, and in place: comes last

        def turn(x: Tensor) -> Outputs:
            turned, _ = LigerRopeFunction.apply(x.transpose(0, 1)[None], other, *tables)
            return (turned[0].transpose(0, 1),)

        return turn

    def liger_swiglu() -> Work:
        from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction

        return lambda gate_up: (LigerFusedGateUpSiLUMulFunction.apply(gate_up),)

    def liger_loss() -> Work:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
        return lambda hidden, weight: (loss(weight, hidden, labels),)

    return {
        "norm": Part(
            (x, y, drawn(M)), lambda x, y, weight: sum_and_norm(x, y, weight, eps),
            lambda x, y, weight: plain_sum_and_norm(x, y, weight, eps), liger_norm,
        ),
        "rope": Part((q,), lambda x: (rotate(x, cos, sin),), lambda x: (plain_rotate(x, cos, sin),), liger_rope),
        "swiglu": Part((gate_up,), lambda x: (swiglu(x),), lambda x: (plain_swiglu(x),), liger_swiglu),
        "loss": Part(
            (x, head),
            lambda hidden, weight: (chunked_token_losses(hidden, weight, labels, chunk).sum(),),
            lambda hidden, weight: (token_losses(hidden, weight, labels).sum(),),
            liger_loss,
        ),
    }  # fmt: skip


def implementations(part: Part) -> dict[str, Callable[[], Work]]:
    """What makes each of them ready."""
    return {
        "nsa_train": lambda: part.ours, "torch": lambda: part.plain,
        "torch.compile": lambda: torch.compile(part.plain, dynamic=False), "liger": part.liger,
    }  # fmt: skip


def one_pass(work: Work, leaves: tuple[Tensor, ...]) -> Outputs:
    """Outputs and the gradients of their sum, weighted by themselves: every element's gradient is another."""
    fresh = [leaf.detach().requires_grad_() for leaf in leaves]
    outputs = work(*fresh)
    return (*outputs, *torch.autograd.grad(outputs, fresh, [out.detach() for out in outputs]))


def rows_of(name: str, part: Part, head: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    """A row for each implementation; one that cannot run has `error` in place of figures."""
    want = one_pass(part.plain, tuple(leaf.float() for leaf in part.leaves))

    def error_of(got: Outputs) -> float:
        return max(relative_error(one, exactly) for one, exactly in zip(got, want, strict=True))

    makes = {impl: partial(_passes, make, part) for impl, make in implementations(part).items()}
    found = side_by_side(makes, error_of, seconds)
    return [{"part": name, "impl": impl, **head, **row} for impl, row in found.items()]


def _passes(make: Callable[[], Work], part: Part) -> Timed:
    return partial(one_pass, make(), part.leaves)


def main(arguments: list[str]) -> int:
    """Run the benchmark and write <out>/layers_<gpu>.json and a figure beside it; the exit code."""
    parser = argparse.ArgumentParser(prog="nsa-train bench layers", description=__doc__)
    parser.add_argument("--preset", default="m", help="whose sizes")
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--seconds", type=float, default=4.0, help="time for the turns of one part")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of JSON and figure")
    parser.add_argument("--commit", help="source commit, where the checkout does not know it")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise NsaTrainError("bench layers: no CUDA device here; it measures kernels on a GPU")
    config = load_config([f"experiment={args.preset}"])
    head = {"preset": args.preset, "T": args.tokens, "dtype": "bfloat16"}
    rows: list[dict[str, Any]] = []
    for name, part in parts(config, args.tokens, "cuda", torch.bfloat16).items():
        rows += rows_of(name, part, head, args.seconds)
        runtime.log.info("%s", "\n".join(str(row) for row in rows if row["part"] == name))
        written = results.write_result(f"layers_{results.gpu_label()}", "layers", rows, args.commit, args.out)
        torch.cuda.empty_cache()
    about = f"{torch.cuda.get_device_name()}, forward + backward of {args.tokens:,} tokens, preset {args.preset}, ms"
    plot_bars(rows, written.with_suffix(".png"), about, "part", "impl", "ms")
    runtime.log.info("%s", written)
    return 0
