"""Native Sparse Attention in plain PyTorch, equation by equation: the specification every kernel is tested against.

Read it beside arXiv 2502.11089, section 3. All functions but the last two speak about ONE document of L tokens: NSA
restarts positions, compression blocks and selection blocks at each document's first token, so packed documents are
a loop around them. It runs in any dtype on any device, in time and memory O(L^2).

    T  tokens, packed     L  tokens of one document    Hq, Hk  query and KV heads    G = Hq // Hk
    D, Dv  key and value width     C  compressed keys  J  selection blocks of a document, ceil(L / l')
    l  cmp_block     d  cmp_stride     l'  slc_block     n  slc_count     w  window      (letters of the paper)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class NSASpec:
    """The sizes of NSA (paper section 4.1). ValueError names every broken rule."""

    cmp_block: int = 32
    cmp_stride: int = 16
    slc_block: int = 64
    slc_count: int = 16
    slc_init: int = 1
    slc_local: int = 2
    window: int = 512

    def __post_init__(self) -> None:
        found = [
            f"{name}={getattr(self, name)} must be a positive integer"
            for name in ("cmp_block", "cmp_stride", "slc_block", "slc_count", "slc_local", "window")
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1
        ]
        if not isinstance(self.slc_init, int) or self.slc_init < 0:
            found.append(f"slc_init={self.slc_init} must be an integer of at least 0")
        wrong = {line.partition("=")[0] for line in found}
        for name in ("cmp_block", "slc_block"):
            if not wrong & {name, "cmp_stride"} and getattr(self, name) % self.cmp_stride:
                found.append(f"cmp_stride={self.cmp_stride} must divide {name}={getattr(self, name)}")
        if not wrong & {"slc_count", "slc_init", "slc_local"} and self.slc_count < self.slc_init + self.slc_local:
            found.append(
                f"slc_count={self.slc_count} must be at least slc_init + slc_local = {self.slc_init + self.slc_local}"
            )
        if found:
            raise ValueError("NSASpec: " + "; ".join(found))


class NSADetails(NamedTuple):
    """What the branches did.

    blocks               [T, Hk, n]   int32, chosen blocks inside the document, ascending, -1 last
    o_cmp, o_slc, o_win  [T, Hq, Dv]  outputs of the branches before the gates
    """

    blocks: Tensor
    o_cmp: Tensor
    o_slc: Tensor
    o_win: Tensor


# Attention over what a mask leaves visible ----------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query over its visible keys; a query that sees none gives 0 and passes no gradient.

    q        [L, Hq, D]
    k, v     [S, Hk, D], [S, Hk, Dv]
    visible  [L, S] or [L, Hk, S]  bool
    gives o  [L, Hq, Dv]  dtype of q, and p [Hk, G, L, S]  probabilities in fp32 (fp64 for fp64 input)
    """
    L, Hq, D = q.shape
    S, Hk, Dv = v.shape
    G = Hq // Hk
    wide = torch.promote_types(q.dtype, torch.float32)
    q_heads = q.to(wide).view(L, Hk, G, D).permute(1, 2, 0, 3).reshape(Hk, G * L, D)
    scores = (q_heads @ k.to(wide).permute(1, 2, 0)).view(Hk, G, L, S) * scale
    seen = visible[None, None] if visible.ndim == 2 else visible.permute(1, 0, 2)[:, None]  # [Hk|1, 1, L, S]
    p = scores.masked_fill(~seen, torch.finfo(wide).min).softmax(-1) * seen.any(-1, keepdim=True)
    o = (p.view(Hk, G * L, S) @ v.to(wide).permute(1, 0, 2)).view(Hk, G, L, Dv)
    return o.permute(2, 0, 1, 3).reshape(L, Hq, Dv).to(q.dtype), p


# Compression: eq. 7 ---------------------------------------------------------------------------------------------------


def compressed_length(L: int, spec: NSASpec) -> int:
    """C(L): blocks of l tokens, one every d tokens, that fit into L tokens."""
    return (L - spec.cmp_block) // spec.cmp_stride + 1 if spec.cmp_block <= L else 0


def cmp_visible(L: int, spec: NSASpec, device: torch.device | None = None) -> Tensor:
    """[L, C] bool: query t sees block c once the block's last token c d + l - 1 is not in its future."""
    t = torch.arange(L, device=device)
    last = torch.arange(compressed_length(L, spec), device=device) * spec.cmp_stride + spec.cmp_block - 1
    return last <= t[:, None]


def phi_mean(blocks: Tensor) -> Tensor:
    """[C, l, Hk, D] -> [C, Hk, D]: mean pooling, which the learned kinds start as."""
    return blocks.mean(1)


def phi_mlp(blocks: Tensor, w1: Tensor, bias: Tensor, w2: Tensor) -> Tensor:
    """Mean + W2 SiLU(W1 concat(block) + bias); the learned intra-block positions enter as the bias.

    w1  [D, l * D]
    bias [D]
    w2  [D, D]   0 at the start
    """
    concat = blocks.transpose(1, 2).flatten(2)  # [C, Hk, l * D]
    return blocks.mean(1) + F.linear(F.silu(F.linear(concat, w1, bias)), w2)


def phi_linear(blocks: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W concat(block) + bias; weight [D, l * D] starts as l copies of I / l, side by side."""
    return F.linear(blocks.transpose(1, 2).flatten(2), weight, bias)


def phi_gated_pool(blocks: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Softmax-weighted mean over the block; the logit of token i is weight . x_i + bias_i, all 0 at the start.

    weight [D], bias [l]
    """
    share = (blocks @ weight + bias[:, None]).softmax(1)  # [C, l, Hk]
    return (blocks * share[..., None]).sum(1)


# Importance and selection: eq. 8 to 11 --------------------------------------------------------------------------------


def block_overlap(L: int, spec: NSASpec, device: torch.device | None = None) -> Tensor:
    """[C, J]: tokens that compression block c and selection block j share, in units of d.

    With the paper's sizes the weights are 1, 2, 2, 2, 1 for c = 4j - 1 ... 4j + 3. (Eq. 9 read literally sums blocks
    whose tokens lie before those of block j.)
    """
    C, J = compressed_length(L, spec), -(-L // spec.slc_block)
    c = torch.arange(C, device=device)[:, None] * spec.cmp_stride
    j = torch.arange(J, device=device)[None, :] * spec.slc_block
    shared = torch.minimum(c + spec.cmp_block, j + spec.slc_block) - torch.maximum(c, j)
    return shared.clamp(min=0) / spec.cmp_stride


def importance(p: Tensor, L: int, spec: NSASpec) -> Tensor:
    """Score of each block for each query and KV head (eq. 9, 10), no gradient: p [Hk, G, L, C] -> [L, Hk, J]."""
    by_group = p.detach().sum(1).transpose(0, 1)  # [L, Hk, C]
    return by_group @ block_overlap(L, spec, p.device).to(p.dtype)


def select_blocks(scores: Tensor, spec: NSASpec) -> Tensor:
    """The blocks each query reads (eq. 11), from scores [L, Hk, J]: int32 [L, Hk, n], ascending, -1 last.

    Query t lies in block m = t // l'. It takes the first `slc_init` blocks and the last `slc_local` blocks up to m,
    counted in n, then the best of the other blocks before them; equal scores go to the lower index.
    """
    L, _, J = scores.shape
    m = torch.arange(L, device=scores.device)[:, None, None] // spec.slc_block
    j = torch.arange(J, device=scores.device)
    forced = (j < spec.slc_init) | (j > m - spec.slc_local)
    rank_by = scores.masked_fill(forced, torch.inf).masked_fill(j > m, -torch.inf)
    best, order = rank_by.sort(dim=-1, descending=True, stable=True)  # stable: ties keep the lower index first
    chosen = order.masked_fill(best == -torch.inf, J)[..., : spec.slc_count].sort(-1).values
    chosen = F.pad(chosen, (0, spec.slc_count - chosen.shape[-1]), value=J)
    return chosen.masked_fill(chosen == J, -1).to(torch.int32)


# The three branches and their sum: eq. 5 and 12 -----------------------------------------------------------------------


def slc_visible(blocks: Tensor, L: int, spec: NSASpec) -> Tensor:
    """[L, Hk, L] bool: token s is visible to t if its block was chosen and s <= t."""
    J = -(-L // spec.slc_block)
    taken = torch.zeros(*blocks.shape[:2], J + 1, dtype=torch.bool, device=blocks.device)
    taken.scatter_(-1, torch.where(blocks < 0, J, blocks).long(), True)
    s = torch.arange(L, device=blocks.device)
    return taken[..., s // spec.slc_block] & (s <= s[:, None])[:, None]


def win_visible(L: int, window: int, device: torch.device | None = None) -> Tensor:
    """[L, L] bool: the last w tokens, the query's own included."""
    s = torch.arange(L, device=device)
    return (s <= s[:, None]) & (s > s[:, None] - window)


def nsa_document(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
    spec: NSASpec, scale: float, blocks: Tensor | None,
) -> NSADetails:  # fmt: skip
    """The three branches for one document; shapes as in `nsa_reference` with T = L and C = C(L)."""
    L = q.shape[0]
    o_cmp, p = attend(q, k_cmp, v_cmp, cmp_visible(L, spec, q.device), scale)
    if blocks is None:
        blocks = select_blocks(importance(p, L, spec), spec)
    o_slc, _ = attend(q, k_slc, v_slc, slc_visible(blocks, L, spec), scale)
    o_win, _ = attend(q, k_win, v_win, win_visible(L, spec.window, q.device), scale)
    return NSADetails(blocks, o_cmp, o_slc, o_win)


def gated_sum(gates: Tensor, outputs: list[Tensor]) -> Tensor:
    """Eq. 5: gates [T, Hq, branches] times each branch's output [T, Hq, Dv], summed."""
    return sum(g[..., None] * o for g, o in zip(gates.unbind(-1), outputs, strict=True)).to(outputs[0].dtype)


# Packed documents -----------------------------------------------------------------------------------------------------


def compressed_blocks(x: Tensor, cu_seqlens: Tensor, spec: NSASpec, rows: int) -> Tensor:
    """The tokens of every compression block, document after document: [T, Hk, D] -> [rows, l, Hk, D], zeros behind."""
    bounds = cu_seqlens.tolist()
    found = [
        x[a:b].unfold(0, spec.cmp_block, spec.cmp_stride).permute(0, 3, 1, 2)  # [C(L), l, Hk, D]
        for a, b in pairwise(bounds)
        if b - a >= spec.cmp_block
    ]
    used = sum(block.shape[0] for block in found)
    return torch.cat([*found, x.new_zeros(rows - used, spec.cmp_block, *x.shape[1:])])


def nsa_reference(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
    gates: Tensor, spec: NSASpec, cu_seqlens: Tensor, scale: float, blocks: Tensor | None,
) -> tuple[Tensor, NSADetails]:  # fmt: skip
    """The whole op over packed documents; arguments as in `nsa_train.ops.nsa.nsa_attention`."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != len(q) or bounds != sorted(bounds):
        raise ValueError(f"cu_seqlens={bounds} must ascend from 0 to T={len(q)}")
    needed = sum(compressed_length(b - a, spec) for a, b in pairwise(bounds))
    if len(k_cmp) < needed:
        raise ValueError(f"k_cmp has {len(k_cmp)} rows, but the documents have {needed} compressed keys")
    parts, first = [], 0
    for a, b in pairwise(bounds):
        if a == b:
            continue
        rows = slice(first, first + compressed_length(b - a, spec))
        first = rows.stop
        own = None if blocks is None else blocks[a:b]
        parts.append(
            nsa_document(
                q[a:b], k_cmp[rows], v_cmp[rows], k_slc[a:b], v_slc[a:b], k_win[a:b], v_win[a:b], spec, scale, own
            )
        )
    details = NSADetails(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return gated_sum(gates, [details.o_cmp, details.o_slc, details.o_win]), details
