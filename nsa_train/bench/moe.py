"""`nsa-train bench moe`: our routed experts beside transformers' grouped ones and DeepSpeed's AutoEP layer.

All have the same router weights, experts and tokens; a pass is router, experts and the weighted sum, forward and
backward, without shared experts. `load` is `even`, or `skewed`: a few experts are chosen far more often.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from nsa_train import runtime
from nsa_train.bench import results
from nsa_train.bench.figures import plot_bars
from nsa_train.bench.timing import Timed, relative_error, side_by_side
from nsa_train.config.schema import MoEConfig
from nsa_train.errors import NsaTrainError
from nsa_train.model.router import Router
from nsa_train.ops.experts import routed_experts
from nsa_train.packing import Packing

CHECKED_TOKENS = 256
SKEW = 2.0  # added to the scores of an eighth of the experts, as logits
Layer = Callable[[Tensor], Tensor]  # [T, M] -> [T, M]


class Case:
    """Weights and tokens that all layers share, on one device."""

    def __init__(self, moe: MoEConfig, width: int, tokens: int, load: str, device: str, dtype: torch.dtype) -> None:
        self.moe, self.width = moe, width
        generator = torch.Generator().manual_seed(0)

        def drawn(*size: int, std: float) -> Tensor:
            return (torch.randn(*size, generator=generator) * std).to(device, dtype)

        E, F = moe.experts, moe.expert_width
        self.router = drawn(E, width, std=width**-0.5)
        self.gate_up, self.down = drawn(E, width, 2 * F, std=width**-0.5), drawn(E, F, width, std=F**-0.5)
        self.x = drawn(tokens, width, std=1.0)
        if load == "skewed":  # one channel is 1 everywhere and raises the favoured experts
            self.x[:, 0] = 1.0
            self.router[: E // 8, 0] += SKEW
        self.grad = drawn(tokens, width, std=1.0)
        self.cu_seqlens = Packing.from_lengths([tokens]).cu_seqlens.to(device)

    def in_fp32(self, tokens: int) -> Case:
        """The same weights and the first tokens, each of which stands for itself."""
        one = copy.copy(self)
        one.router, one.gate_up, one.down = self.router.float(), self.gate_up.float(), self.down.float()
        one.x, one.grad = self.x[:tokens].float(), self.grad[:tokens].float()
        one.cu_seqlens = self.cu_seqlens.clamp(max=tokens)
        return one

    def ours(self) -> tuple[Layer, list[nn.Parameter]]:
        router = Router(self.width, self.moe).to(self.x.device)
        router.weight = nn.Parameter(self.router.clone())
        experts = [nn.Parameter(weight.clone()) for weight in (self.gate_up, self.down)]

        def layer(x: Tensor) -> Tensor:
            routing = router(x, self.cu_seqlens)
            return routed_experts(x, routing.experts, routing.weights, *experts)

        return layer, [router.weight, *experts]

    def transformers(self) -> tuple[Layer, list[nn.Parameter]]:
        """Its grouped experts behind our router; weights lie [E, out, in] there."""
        from transformers.integrations.moe import grouped_mm_experts_forward

        router = Router(self.width, self.moe).to(self.x.device)
        router.weight = nn.Parameter(self.router.clone())
        gate_up, down = (nn.Parameter(weight.transpose(1, 2).contiguous()) for weight in (self.gate_up, self.down))
        module = SimpleNamespace(
            num_experts=self.moe.experts, gate_up_proj=gate_up, down_proj=down, has_gate=True, has_bias=False,
            has_post_expert_norm=False, is_transposed=False, is_concatenated=True, _is_expert_parallel=False,
            _apply_gate=lambda h: nn.functional.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
        )  # fmt: skip

        def layer(x: Tensor) -> Tensor:
            routing = router(x, self.cu_seqlens)
            return grouped_mm_experts_forward(module, x, routing.experts, routing.weights.to(x.dtype))

        return layer, [router.weight, gate_up, down]

    def autoep(self) -> tuple[Layer, list[nn.Parameter]]:
        """DeepSpeed's layer on one rank, with its own router of the same kind and, on a GPU, its fused kernels."""
        runtime.quiet_deepspeed(self.x.device.type)
        from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
        from deepspeed.module_inject.auto_ep_presets.base import AutoEPConfig, MoELayerSpec

        source = nn.Module()
        source.gate = nn.Linear(self.width, self.moe.experts, bias=False)
        source.gate.weight = nn.Parameter(self.router.clone())
        source.experts = nn.Module()
        source.experts.gate_up_proj = nn.Parameter(self.gate_up.transpose(1, 2).contiguous())
        source.experts.down_proj = nn.Parameter(self.down.transpose(1, 2).contiguous())
        spec = MoELayerSpec(
            moe_module_name="moe", model_family="custom", router_name="gate", experts_name="experts",
            expert_storage="fused_3d", expert_w1_name="gate_up_proj", expert_w2_name="down_proj", expert_w3_name=None,
            num_experts=self.moe.experts, top_k=self.moe.top_k, hidden_size=self.width,
            ffn_hidden_size=self.moe.expert_width, score_func="sigmoid", score_apply="post", route_norm=True,
            gate_bias=False, return_router_logits=False, router_logits_capture_target="none",
            router_logits_capture_index=None, router_logits_capture_layer_name=None, has_shared_experts=False,
            shared_experts_name="", route_scale=self.moe.routed_scale,
        )  # fmt: skip
        fused = self.x.is_cuda
        config = AutoEPConfig(
            enabled=True, load_balance_coeff=None, use_grouped_mm=fused, gate_up_impl="fused" if fused else "separate",
            combine_impl="fused_weighted_sum" if fused else "weighted_sum",
        )  # fmt: skip
        made = AutoEPMoELayer(spec, source, ep_size=1, ep_rank=0, config=config).to(self.x.device, self.x.dtype)
        return lambda x: made(x[None])[0], list(made.parameters())


LAYERS = {"nsa_train": Case.ours, "transformers grouped_mm": Case.transformers, "deepspeed AutoEP": Case.autoep}


def one_pass(layer: Layer, parameters: list[nn.Parameter], x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, and the gradient of x; the gradients of the parameters are computed too."""
    x = x.detach().requires_grad_()
    out = layer(x)
    return [out, torch.autograd.grad(out, [x, *parameters], grad)[0]]


def rows_of(case: Case, head: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    """A row for each layer; one that cannot run has `error` in place of figures."""
    exact = case.in_fp32(CHECKED_TOKENS)
    want = one_pass(*exact.ours(), exact.x, exact.grad)

    def error_of(got: list[Tensor]) -> float:
        return max(relative_error(one[:CHECKED_TOKENS], exactly) for one, exactly in zip(got, want, strict=True))

    found = side_by_side({impl: partial(_passes, make, case) for impl, make in LAYERS.items()}, error_of, seconds)
    return [{"impl": impl, **head, **row} for impl, row in found.items()]


def _passes(make: Callable[[Case], tuple[Layer, list[nn.Parameter]]], case: Case) -> Timed:
    return partial(one_pass, *make(case), case.x, case.grad)


def main(arguments: list[str]) -> int:
    """Run the benchmark and write <out>/moe_<gpu>.json and a figure beside it; the exit code."""
    parser = argparse.ArgumentParser(prog="nsa-train bench moe", description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--width", type=int, default=2560)
    parser.add_argument("--experts", type=int, default=72)
    parser.add_argument("--expert-width", type=int, default=1536)
    parser.add_argument("--top-k", type=int, default=6)
    parser.add_argument("--loads", nargs="+", default=["even", "skewed"], choices=["even", "skewed"])
    parser.add_argument("--seconds", type=float, default=5.0, help="time for the turns of one load")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of JSON and figure")
    parser.add_argument("--commit", help="source commit, where the checkout does not know it")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise NsaTrainError("bench moe: no CUDA device here; it measures layers on a GPU")
    moe = MoEConfig(
        experts=args.experts, shared=0, top_k=args.top_k, expert_width=args.expert_width, router="sigmoid",
        normalise=True, routed_scale=1.0, bias_rate=0.0, aux_weight=0.0,
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for load in args.loads:
        head = {
            "T": args.tokens, "width": args.width, "experts": args.experts, "expert_width": args.expert_width,
            "top_k": args.top_k, "dtype": "bfloat16", "load": load,
        }  # fmt: skip
        rows += rows_of(Case(moe, args.width, args.tokens, load, "cuda", torch.bfloat16), head, args.seconds)
        runtime.log.info("%s", "\n".join(map(str, rows[-len(LAYERS) :])))
        written = results.write_result(f"moe_{results.gpu_label()}", "moe", rows, args.commit, args.out)
        torch.cuda.empty_cache()
    about = f"{torch.cuda.get_device_name()}, MoE layer, forward + backward of {args.tokens:,} tokens by load, ms"
    plot_bars(rows, written.with_suffix(".png"), about, "load", "impl", "ms")
    runtime.log.info("%s", written)
    return 0
