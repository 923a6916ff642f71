"""Routing of tokens to experts, in Triton: scores, choice, weights and balance loss in one pass, and its gradient.

PyTorch would take some thirty kernels over [T, E] in each direction. The plain form stands in `ops/routing.py`.

    T  tokens    N  documents    E  experts    K  experts of a token

A program owns CHUNK tokens and goes through the documents that have a part of them. What it sums over the part of
chunk c and document n it leaves in row c + n: along the tokens c or n grows from part to part, so no two parts share a
row. A second kernel sums each document's rows in a fixed order. No atomics: the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_train.ops.tiles import power_of_two

MOST_EXPERTS, MOST_CHOSEN = 256, 16  # that a tile is made for
CHUNK = 64  # tokens
ELEMENTS = 512  # of a tile: 4 a thread
BOUNDS = 128  # of documents, looked through at once
WARPS = 4
SMALLEST = tl.constexpr(1e-20)  # a sum of scores that is divided by


@triton.jit
def _documents(cu_seqlens, N, CHUNK: tl.constexpr, BOUNDS: tl.constexpr):
    """(first, behind the last) of the documents that have a token of this program's chunk."""
    begin = tl.program_id(0) * CHUNK
    stop = tl.minimum(begin + CHUNK, tl.load(cu_seqlens + N))  # empty documents at the end are nobody's
    first = 0
    behind = 0
    for at in range(0, N, BOUNDS):
        doc = at + tl.arange(0, BOUNDS)
        start = tl.load(cu_seqlens + doc, mask=doc < N, other=2**31 - 1)
        end = tl.load(cu_seqlens + doc + 1, mask=doc < N, other=2**31 - 1)
        first += tl.sum((end <= begin).to(tl.int32), 0)
        behind += tl.sum((start < stop).to(tl.int32), 0)
    return first, behind


@triton.jit
def _part(cu_seqlens, doc, CHUNK: tl.constexpr):
    """(first token, behind the last, length of the document) of the part of a document in this program's chunk."""
    begin = tl.program_id(0) * CHUNK
    start = tl.load(cu_seqlens + doc)
    end = tl.load(cu_seqlens + doc + 1)
    return tl.maximum(start, begin), tl.minimum(end, begin + CHUNK), end - start


@triton.jit
def _scores(logits, token, there, expert, E: tl.constexpr, SOFTMAX: tl.constexpr):
    """Scores of a tile of tokens, 0 behind expert E."""
    x = tl.load(logits + token.to(tl.int64)[:, None] * E + expert, mask=there[:, None] & (expert < E), other=0.0)
    x = tl.where(expert < E, x, float("-inf"))
    if SOFTMAX:
        x = tl.exp(x - tl.max(x, 1)[:, None])
        return x / tl.sum(x, 1)[:, None]
    return tl.sigmoid(x)


@triton.jit
def _route_fwd(
    logits,  # [T, E]  fp32
    bias,  # [E]
    cu_seqlens,  # [N + 1]  int32
    experts,  # [T, K]  int64
    weights,  # [T, K]  fp32
    sums,  # [chunks + N, 2, E]  fp32: of each part, the tokens of each expert and the sum of its shares of the score
    N, scale, E: tl.constexpr, K: tl.constexpr, SOFTMAX: tl.constexpr, NORMALISE: tl.constexpr, TOKENS: tl.constexpr,
    E_PAD: tl.constexpr, K_PAD: tl.constexpr, CHUNK: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, E_PAD)[None, :]
    k_of = tl.arange(0, K_PAD)[None, :]
    steer = tl.load(bias + expert, mask=expert < E, other=0.0).to(tl.float32)
    head, behind = _documents(cu_seqlens, N, CHUNK, BOUNDS)
    for doc in range(head, behind):
        first, last, _ = _part(cu_seqlens, doc, CHUNK)
        count = tl.zeros([TOKENS, E_PAD], tl.float32)
        shares = tl.zeros([TOKENS, E_PAD], tl.float32)
        for at in range(first, last, TOKENS):
            token = at + tl.arange(0, TOKENS)
            there = token < last
            score = _scores(logits, token, there, expert, E, SOFTMAX)
            left = tl.where(expert < E, score + steer, float("-inf"))
            index = tl.zeros([TOKENS, K_PAD], tl.int32)
            weight = tl.zeros([TOKENS, K_PAD], tl.float32)
            for k in tl.static_range(K):
                best = tl.minimum(tl.argmax(left, 1), E - 1)[:, None]  # an expert's number even where scores are NaN
                picked = expert == best
                left = tl.where(picked, float("-inf"), left)
                index = tl.where(k_of == k, best, index)
                weight = tl.where(k_of == k, tl.sum(tl.where(picked, score, 0.0), 1)[:, None], weight)
            if NORMALISE:
                weight /= tl.maximum(tl.sum(weight, 1), SMALLEST)[:, None]
            place = token.to(tl.int64)[:, None] * K + k_of
            mask = there[:, None] & (k_of < K)
            tl.store(experts + place, index.to(tl.int64), mask=mask)
            tl.store(weights + place, weight * scale, mask=mask)
            chosen = (left == float("-inf")) & (expert < E) & there[:, None]
            count += tl.where(chosen, 1.0, 0.0)
            share = score / tl.maximum(tl.sum(score, 1), SMALLEST)[:, None]
            shares += tl.where(there[:, None], share, 0.0)
        own = (tl.program_id(0) + doc) * (2 * E) + tl.arange(0, E_PAD)
        tl.store(sums + own, tl.sum(count, 0), mask=tl.arange(0, E_PAD) < E)
        tl.store(sums + own + E, tl.sum(shares, 0), mask=tl.arange(0, E_PAD) < E)


@triton.jit
def _balance(
    sums,  # [chunks + N, 2, E]  fp32
    cu_seqlens,  # [N + 1]  int32
    counts,  # [N, E]  fp32
    losses,  # [N]  fp32
    E: tl.constexpr, K: tl.constexpr, E_PAD: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    doc = tl.program_id(0)
    expert = tl.arange(0, E_PAD)[None, :]
    start = tl.load(cu_seqlens + doc)
    end = tl.load(cu_seqlens + doc + 1)
    behind = tl.where(start < end, (end - 1) // CHUNK + 1, 0)
    count = tl.zeros([ROWS, E_PAD], tl.float32)
    share = tl.zeros([ROWS, E_PAD], tl.float32)
    for at in range(start // CHUNK, behind, ROWS):
        chunk = at + tl.arange(0, ROWS)[:, None]
        place = sums + (chunk + doc) * (2 * E) + expert
        mask = (chunk < behind) & (expert < E)
        count += tl.load(place, mask=mask, other=0.0)
        share += tl.load(place + E, mask=mask, other=0.0)
    f = tl.sum(count, 0)
    tl.store(counts + doc * E + tl.arange(0, E_PAD), f, mask=tl.arange(0, E_PAD) < E)
    tl.store(losses + doc, tl.sum(f * tl.sum(share, 0), 0) * (E / K) / tl.maximum(end - start, 1))


@triton.jit
def _route_bwd(
    logits,  # [T, E]  fp32
    experts,  # [T, K]  int64
    counts,  # [N, E]  fp32
    cu_seqlens,  # [N + 1]  int32
    d_weights,  # [T, K]  fp32
    d_balance,  # []  fp32
    d_logits,  # [T, E]  fp32
    N, scale, E: tl.constexpr, K: tl.constexpr, SOFTMAX: tl.constexpr, NORMALISE: tl.constexpr, TOKENS: tl.constexpr,
    E_PAD: tl.constexpr, CHUNK: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, E_PAD)[None, :]
    head, behind = _documents(cu_seqlens, N, CHUNK, BOUNDS)
    for doc in range(head, behind):
        first, last, length = _part(cu_seqlens, doc, CHUNK)
        count = tl.load(counts + doc * E + expert, mask=expert < E, other=0.0)
        d_share = tl.load(d_balance) * (E / K) / length * count  # [1, E], the same for all tokens of a document
        for at in range(first, last, TOKENS):
            token = at + tl.arange(0, TOKENS)
            there = token < last
            score = _scores(logits, token, there, expert, E, SOFTMAX)
            d_weight = tl.zeros([TOKENS, E_PAD], tl.float32)
            chosen = tl.zeros([TOKENS, E_PAD], tl.float32)
            for k in tl.static_range(K):
                place = token.to(tl.int64) * K + k
                picked = expert == tl.load(experts + place, mask=there, other=0)[:, None]
                d = tl.load(d_weights + place, mask=there, other=0.0)[:, None] * scale
                d_weight = tl.where(picked, d, d_weight)
                chosen = tl.where(picked, score, chosen)
            total = tl.sum(score, 1)[:, None]
            safe = tl.maximum(total, SMALLEST)
            common = tl.where(total >= SMALLEST, tl.sum(d_share * score, 1)[:, None] / safe, 0.0)
            d_score = (d_share - common) / safe
            if NORMALISE:
                total = tl.sum(chosen, 1)[:, None]
                safe = tl.maximum(total, SMALLEST)
                common = tl.where(total >= SMALLEST, tl.sum(d_weight * chosen, 1)[:, None] / safe, 0.0)
                d_weight = tl.where(chosen > 0.0, d_weight - common, 0.0) / safe
            d_score += d_weight
            if SOFTMAX:
                grad = score * (d_score - tl.sum(d_score * score, 1)[:, None])
            else:
                grad = d_score * score * (1.0 - score)
            place = d_logits + token.to(tl.int64)[:, None] * E + expert
            tl.store(place, grad, mask=there[:, None] & (expert < E))


def _sizes(E: int) -> dict[str, int]:
    """Of a tile and of the search for documents."""
    padded = power_of_two(E, 16)
    return {"TOKENS": ELEMENTS // padded, "E_PAD": padded, "CHUNK": CHUNK, "BOUNDS": BOUNDS}


def route(
    logits: Tensor, bias: Tensor, cu_seqlens: Tensor, top_k: int, softmax: bool, normalise: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(experts [T, K] int64, weights [T, K], tokens of each expert and document [N, E], balance losses [N])."""
    (T, E), N, sizes = logits.shape, cu_seqlens.shape[0] - 1, _sizes(logits.shape[1])
    chunks = triton.cdiv(T, CHUNK)
    experts, weights = cu_seqlens.new_empty(T, top_k, dtype=torch.int64), logits.new_empty(T, top_k)
    sums, counts, losses = logits.new_empty(chunks + N, 2, E), logits.new_empty(N, E), logits.new_empty(N)
    _route_fwd[(chunks,)](
        logits, bias, cu_seqlens, experts, weights, sums, N, scale, E=E, K=top_k, SOFTMAX=softmax,
        NORMALISE=normalise, K_PAD=power_of_two(top_k), num_warps=WARPS, **sizes,
    )  # fmt: skip
    _balance[(N,)](
        sums, cu_seqlens, counts, losses, E=E, K=top_k, E_PAD=sizes["E_PAD"], CHUNK=CHUNK, ROWS=4 * sizes["TOKENS"],
        num_warps=WARPS,
    )  # fmt: skip
    return experts, weights, counts, losses


def route_backward(
    logits: Tensor, experts: Tensor, counts: Tensor, cu_seqlens: Tensor, d_weights: Tensor, d_balance: Tensor,
    softmax: bool, normalise: bool, scale: float,
) -> Tensor:  # fmt: skip
    """Gradient of logits [T, E], from those of weights [T, K] and of the sum of losses."""
    (T, E), N, d_logits = logits.shape, cu_seqlens.shape[0] - 1, torch.empty_like(logits)
    _route_bwd[(triton.cdiv(T, CHUNK),)](
        logits, experts, counts, cu_seqlens, d_weights, d_balance, d_logits, N, scale, E=E, K=experts.shape[1],
        SOFTMAX=softmax, NORMALISE=normalise, num_warps=WARPS, **_sizes(E),
    )  # fmt: skip
    return d_logits
