"""Attention: one q and o projection, optional gates, and a list of branches. Full attention is the list [full]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from nsa_train.config.schema import AttentionConfig, ModelConfig
from nsa_train.model.branches import PHI, KeyValue, kv_name, spec_of
from nsa_train.model.layers import apply_rope
from nsa_train.ops.dense import dense_attention, recorded_attention
from nsa_train.ops.fixed_blocks import fixed_blocks
from nsa_train.ops.linear import linears
from nsa_train.ops.nsa import chosen_backend, nsa_attention
from nsa_train.ops.segments import Segments
from nsa_train.ops.statistics import selection_statistics
from nsa_train.ops.window_attention import window_attention
from nsa_train.packing import Packing

Angles = tuple[Tensor, Tensor]
KV = tuple[Tensor, Tensor]
Probe = dict[str, Any]  # "common": value, "gates": {branch: mean}, "selection": {statistic: value}
PROBED_TOKENS = 2048  # of the first document: enough for statistics, and quadratic
OP_BRANCHES = ("cmp", "slc", "win")  # of NSA's op, in the order of its gates


class Attended(NamedTuple):
    """What the queries of a layer are compared with, for whoever watches.

    q       [T, Hq, D]          rotated
    k       [T, Hk, D]          rotated keys of `full` or `slc`; of another branch in an arm that has neither
    blocks  [T, Hk, n]  int32   blocks of `k` that are read; None: not selected
    """

    q: Tensor
    k: Tensor
    blocks: Tensor | None


class Layout(NamedTuple):
    """What the attention of every layer knows of a batch, computed once.

    segments    where the compression blocks lie; None without compression
    cmp_angles  of each block's first token
    """

    packing: Packing
    angles: Angles
    segments: Segments | None
    cmp_angles: Angles | None


def common_share(x: Tensor) -> float:
    """Share of the energy of normed states [T, M] that all tokens have in common, 0 to 1: |mean|^2 over the mean |x|^2.

    Near 1 the tokens look alike to attention and routers (docs/design.md). Padding counts as tokens.
    """
    x = x.detach().float()
    return float(x.mean(0).square().sum() / x.square().sum(1).mean())


class Gate(nn.Linear):
    """Eq. 5 before its sigmoid: starts at 0, a gate of one half."""

    STARTS: ClassVar = {"weight": torch.zeros, "bias": torch.zeros}


class Attention(nn.Module):
    """[T, M] -> [T, M], documents kept apart by the packing.

    draw  of the free blocks where `selection` is random, else None: of `fixed_blocks`, see `Transformer.draw_blocks`.
          A buffer, so that checkpoints and exports know which blocks the weights were trained with
    """

    draw: Tensor | None

    def __init__(self, model: ModelConfig, attention: AttentionConfig) -> None:
        super().__init__()
        self.config = attention
        self.heads, self.kv_heads = model.heads, model.kv_heads
        self.spec = spec_of(attention)
        self.watcher: Callable[[Attended], None] | None = None  # see Transformer.watch
        self.q = nn.Linear(model.width, model.heads * model.key_dim, bias=False)
        self.kv = nn.ModuleDict({kv_name(branch, attention): KeyValue(model) for branch in attention.branches})
        if "cmp" in attention.branches:
            phi = PHI[attention.phi]
            self.phi_k = phi(attention.cmp_block, model.key_dim)
            self.phi_v = phi(attention.cmp_block, model.value_dim)
        if attention.gate:
            self.gate = Gate(model.width, model.heads * len(attention.branches))
        self.o = nn.Linear(model.heads * model.value_dim, model.width, bias=False)
        drawn = "slc" in attention.branches and attention.selection == "random"
        draw = torch.zeros((), dtype=torch.int64, device="cpu")  # real, even in a model on the meta device
        self.register_buffer("draw", draw if drawn else None)

    def project(self, x: Tensor) -> tuple[dict[str, KV], Tensor | None]:
        """K [T, Hk, D] and V [T, Hk, Dv] by name, and eq. 5's gates [T, Hq, branches] in the order of `branches`."""
        projections = [projection for kv in self.kv.values() for projection in (kv.k, kv.v)]
        projections += [self.gate] if self.config.gate else []
        parts = linears(x, [projection.weight for projection in projections])
        heads = [part.unflatten(-1, (self.kv_heads, -1)) for part in parts]
        raw = {name: (heads[2 * i], heads[2 * i + 1]) for i, name in enumerate(self.kv)}
        if not self.config.gate:
            return raw, None
        return raw, (parts[-1] + self.gate.bias).sigmoid().unflatten(-1, (self.heads, -1))

    def layout(self, packing: Packing, angles: Angles) -> Layout:
        """Of a batch, for all layers of the model."""
        if "cmp" not in self.config.branches:
            return Layout(packing, angles, None, None)
        segments = Segments(packing.cu_seqlens, packing.tokens, self.spec)
        cos, sin = angles
        cmp_angles = cos[segments.first_token], sin[segments.first_token]
        return Layout(packing, angles, segments, cmp_angles)

    def forward(self, x: Tensor, layout: Layout, probe: Probe | None = None) -> Tensor:
        """x [T, M] normed layer input -> [T, M]; a probe is filled with this layer's statistics."""
        packing, angles = layout.packing, layout.angles
        if probe is not None:
            probe["common"] = common_share(x)
        q = apply_rope(self.q(x).unflatten(-1, (self.heads, -1)), angles)
        raw, gates = self.project(x)
        if probe is not None and gates is not None:
            probe["gates"] = dict(zip(self.config.branches, gates.float().mean((0, 1)).tolist(), strict=True))
        if len(self.config.branches) > 1:
            assert gates is not None  # a rule of the configuration
            o = self._sparse(q, raw, gates, layout, probe)
        else:
            (branch,) = self.config.branches
            k, v = raw[kv_name(branch, self.config)]
            k = apply_rope(k, angles)
            if self.watcher is not None:
                self.watcher(Attended(q, k, None))
            if branch == "win" and chosen_backend(self.config.backend, q) == "triton":
                o = window_attention(q, k, v, self.spec, packing.cu_seqlens)
            else:
                o = self._dense(branch, q, k, v, packing)
            o = o if gates is None else o * gates
        return self.o(o.flatten(1))

    @torch.compiler.disable  # as `dense_attention`, so that the name is not around a break of the graph
    def _dense(self, branch: str, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        window = self.config.window if branch == "win" else None
        with record_function(f"attention, {branch}"):  # a part of a profile, beside projections and positions
            if not packing.lengths and window is None:
                return recorded_attention(q, k, v, packing.cu_seqlens)
            return dense_attention(q, k, v, packing.lengths, window=window)

    def _sparse(self, q: Tensor, raw: dict[str, KV], gates: Tensor, layout: Layout, probe: Probe | None) -> Tensor:
        (k_cmp, v_cmp), (k_slc, v_slc), (k_win, v_win) = (
            self._keys_values(branch, raw, layout) for branch in OP_BRANCHES
        )
        packing = layout.packing
        o, details = nsa_attention(
            q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, self._op_gates(gates), self.spec, packing.cu_seqlens,
            blocks=self._fixed_blocks(packing), backend=self.config.backend, return_details=True,
        )  # fmt: skip
        if self.watcher is not None:
            self.watcher(Attended(q, k_slc, details.blocks if "slc" in self.config.branches else None))
        if probe is not None and "slc" in self.config.branches:
            one = slice(0, min(packing.lengths[0], PROBED_TOKENS))
            probe["selection"] = selection_statistics(q[one], k_slc[one], v_slc[one], details.blocks[one], self.spec)
        return o

    def _keys_values(self, branch: str, raw: dict[str, KV], layout: Layout) -> KV:
        """What a branch of the op attends to; where this arm has no `slc` or `win`, anything: its gate is 0."""
        k, v = raw[kv_name(branch if branch in self.config.branches else "cmp", self.config)]
        return self._compressed(k, v, layout) if branch == "cmp" else (apply_rope(k, layout.angles), v)

    def _op_gates(self, gates: Tensor) -> Tensor:
        """[T, Hq, branches] -> [T, Hq, 3]; the gate of a branch that this arm does not have is 0."""
        if self.config.branches == OP_BRANCHES:
            return gates
        own = dict(zip(self.config.branches, gates.unbind(-1), strict=True))
        none = gates.new_zeros(gates.shape[:-1])
        return torch.stack([own.get(branch, none) for branch in OP_BRANCHES], -1)

    def _compressed(self, k: Tensor, v: Tensor, layout: Layout) -> KV:
        """Keys and values of all compression blocks; a key is rotated to its block's first position (eq. 7)."""
        assert layout.cmp_angles is not None
        return apply_rope(self.phi_k(k, layout.segments), layout.cmp_angles), self.phi_v(v, layout.segments)

    def _fixed_blocks(self, packing: Packing) -> Tensor | None:
        """Blocks that the ablations of `selection` read; None: the op picks the best (topn).

        Without the branch that reads them, only the forced ones, so that none are scored. Made in each layer, and again
        where it is recomputed: 4 T Hk n bytes, which the op keeps for its backward pass like blocks that it chose.
        """
        if "slc" in self.config.branches and self.config.selection == "topn":
            return None
        return fixed_blocks(packing.positions, self.kv_heads, self.spec, self.draw)
