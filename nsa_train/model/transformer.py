"""The model: a pre-norm decoder over packed tokens. Single-device; parallelism is put around it from outside."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.checkpoint import checkpoint

from nsa_train.config.schema import AttentionConfig, LayerPart, ModelConfig, MoEConfig
from nsa_train.model.attention import Attended, Attention, Layout, Probe
from nsa_train.model.layers import Head, RMSNorm, SumNorm, SwiGLU, fixed_starts, normal, rope_angles
from nsa_train.model.moe import MoE
from nsa_train.model.router import Router, Routing, update_bias
from nsa_train.ops.loss import chunked_token_losses
from nsa_train.packing import Packing
from nsa_train.runtime import seed_of


class Output(NamedTuple):
    """token_losses [T] fp32 nats, 0 without label; balance: sum over tokens and layers; load [MoE layers, E] tokens.

    A tuple, because ZeRO 3 looks for tensors in tuples to gather the head's weight before the backward pass.
    """

    token_losses: Tensor
    balance: Tensor
    load: Tensor


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); the MLP is dense or a mixture of experts.

    The names under which a profile counts the time stand here, in `Attention`, `Transformer` and the engine.
    """

    def __init__(self, model: ModelConfig, attention: AttentionConfig, moe: MoEConfig, dense: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(model.width, model.norm_eps)
        self.attention = Attention(model, attention)
        self.mlp_norm = SumNorm(model.width, model.norm_eps)
        self.mlp = SwiGLU(model.width, (moe.top_k + moe.shared) * moe.expert_width) if dense else MoE(model.width, moe)
        self.recomputed: Collection[LayerPart] = ()

    def forward(self, x: Tensor, layout: Layout, probe: Probe | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[T, M] -> [T, M], and the balance loss and load of a mixture of experts."""
        attended = self._maybe_again("attention", self._attend, x, layout, probe)
        with record_function("norms"):
            x, h = self.mlp_norm(x, attended)
        if isinstance(self.mlp, SwiGLU):
            return x + self._maybe_again("mlp", self._dense, h), None, None
        with record_function("router"):
            routing = self.mlp.router(h, layout.packing.cu_seqlens)
        # ZeRO 3 keeps a module's weights until gradients have come for all of its inputs; experts give balance none.
        given = routing._replace(balance=routing.balance.detach())
        return x + self._maybe_again("mlp", self._experts, h, given), routing.balance, routing.load

    def _attend(self, x: Tensor, *rest: Any) -> Tensor:
        with record_function("norms"):
            h = self.attention_norm(x)
        with record_function("attention"):
            return self.attention(h, *rest)

    def _dense(self, x: Tensor) -> Tensor:
        with record_function("dense MLP"):
            return self.mlp(x)

    def _experts(self, x: Tensor, routing: Routing) -> Tensor:
        with record_function("experts"):
            return self.mlp(x, routing)

    def _maybe_again(self, part: LayerPart, run: Callable[..., Tensor], *inputs: Any) -> Tensor:
        """Activation checkpointing; non-reentrant is the only kind that ZeRO takes."""
        again = part in self.recomputed and self.training
        return checkpoint(run, *inputs, use_reentrant=False) if again else run(*inputs)


class Transformer(nn.Module):
    """Decoder-only language model with GQA, NSA or full attention, and MoE."""

    def __init__(self, model: ModelConfig, attention: AttentionConfig, moe: MoEConfig) -> None:
        super().__init__()
        self.config, self.moe = model, moe
        self.rope_factor = model.rope_factor  # a stage of the run may set another
        self.embed = nn.Embedding(model.vocab, model.width)
        self.layers = nn.ModuleList(
            Layer(model, attention, moe, dense=i < model.dense_layers) for i in range(model.layers)
        )
        self.norm = RMSNorm(model.width, model.norm_eps)
        self.head = Head(model.width, model.vocab)
        if model.tied_embeddings:
            self.head.weight = self.embed.weight

    def initial_values(self, seed: int) -> dict[str, Callable[[], Tensor]]:
        """By parameter, what makes its initial values: fp32, in host memory; the model may be on the meta device.

        Keyed by (seed, name, shape), so equal in every arm that has the parameter. Normal with `init_std`; projections
        back into the residual stream are smaller by sqrt(2 layers); embeddings have their own width, unless they are
        the head's weight too; what is not random, modules name in `STARTS`.
        """
        config, fixed = self.config, fixed_starts(self)

        def std_of(name: str) -> float:
            if name == "embed.weight" and not config.tied_embeddings:
                return config.embedding_std
            into_stream = name.endswith((".o.weight", ".down.weight", ".down"))
            return config.init_std / (2 * config.layers) ** 0.5 if into_stream else config.init_std

        def make(name: str, shape: torch.Size) -> Tensor:
            return fixed[name](shape) if name in fixed else normal(shape, name, seed, std_of(name))

        return {name: partial(make, name, parameter.shape) for name, parameter in self.named_parameters()}

    def start(self, seed: int) -> None:
        """Set every parameter to its initial values, and what is drawn beside them."""
        self.draw_blocks(seed)
        made = self.initial_values(seed)
        with ThreadPoolExecutor() as threads:  # each parameter has its own generator, which one core runs
            list(threads.map(lambda item: item[1].detach().copy_(made[item[0]]()), self.named_parameters()))

    def draw_blocks(self, seed: int) -> None:
        """Where `attention.selection` is random, draw which free blocks queries read: others in every layer."""
        for number, layer in enumerate(self.layers):
            if layer.attention.draw is not None:
                layer.attention.draw.fill_(seed_of(seed, "blocks", number) % 2**32)

    def recompute_activations(self, parts: Collection[LayerPart]) -> None:
        """In training, have the backward pass compute these parts of every layer again instead of keeping them."""
        for layer in self.layers:
            layer.recomputed = parts

    def compile_attention(self) -> None:
        """Compile each layer's attention: norms, projections, positions and gates around the op fuse."""
        for layer in self.layers:
            layer.attention.compile(dynamic=False)

    def force_balance(self) -> None:
        """From here on every expert gets as many tokens, whatever the routers say."""
        for router in self.routers():
            router.forced = True

    def keep_blocks(self, kept: list[Tensor] | None) -> None:
        """A list receives the selected blocks [T, Hk, n] of every layer in every call from here on; None ends that."""

        def keep(layer: int, attended: Attended) -> None:
            if attended.blocks is not None:
                kept.append(attended.blocks)  # type: ignore[union-attr]

        self.watch(None if kept is None else keep)

    def watch(self, watcher: Callable[[int, Attended], None] | None) -> None:
        """Have `watcher(layer, what it attends to)` called by every layer in every call from here on; None ends that.

        There is one watcher at a time.
        """
        for number, layer in enumerate(self.layers):
            layer.attention.watcher = watcher and partial(watcher, number)

    def hidden(
        self, tokens: Tensor, packing: Packing, probes: list[Probe] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Final normed states [T, M], the balance loss, and the load [MoE layers, E]."""
        with record_function("embedding"):
            x = self.embed(tokens)
        config = self.config
        angles = rope_angles(
            packing.positions, config.key_dim, config.rope_theta, self.rope_factor, config.rope_trained_len
        )
        layout = self.layers[0].attention.layout(packing, angles)
        balance, loads = x.new_zeros((), dtype=torch.float32), []
        for layer in self.layers:
            if probes is not None:
                probes.append({})
            x, layer_balance, load = layer(x, layout, probes[-1] if probes is not None else None)
            if load is not None:
                balance = balance + layer_balance
                loads.append(load)
        load = torch.stack(loads) if loads else x.new_zeros(0, self.moe.experts, dtype=torch.float32)
        with record_function("norms"):
            x = self.norm(x)
        return x, balance, load.detach()

    def logits(self, tokens: Tensor, packing: Packing) -> Tensor:
        """[T] -> [T, V], dtype of the weights. For evaluation and export; training never holds all logits."""
        return self.head(self.hidden(tokens, packing)[0])

    def forward(
        self, tokens: Tensor, labels: Tensor, packing: Packing, chunk_tokens: int, probes: list[Probe] | None = None
    ) -> Output:
        """tokens, labels [T] int64 (label -100: none). A list given as `probes` receives each layer's statistics."""
        x, balance, load = self.hidden(tokens, packing, probes)
        with record_function("head"):
            losses = chunked_token_losses(x, self.head.weight, labels, chunk_tokens, self.head.prior)
        return Output(losses, balance, load)

    def routers(self) -> list[Router]:
        return [layer.mlp.router for layer in self.layers if isinstance(layer.mlp, MoE)]

    def balance_experts(self, load: Tensor) -> None:
        """One step of loss-free balancing; load [MoE layers, E] of the whole global step."""
        for router, layer_load in zip(self.routers(), load, strict=True):
            update_bias(router.bias, layer_load, self.moe.bias_rate)
