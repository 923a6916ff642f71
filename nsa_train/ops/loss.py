"""Cross-entropy of a linear head, in chunks: logits of all tokens never exist at once.

At 64k tokens and 129k vocabulary whole fp32 logits would take 34 GB, forward alone.

    T  tokens    M  width    V  vocabulary
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_train.ops import loss_triton
from nsa_train.ops.tiles import on_kernels

NO_LABEL: int = loss_triton.NO_LABEL.value


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, prior: Tensor | None = None) -> Tensor:
    """Cross-entropy of each token in nats, 0 where the label is -100. The plain form of `chunked_token_losses`.

    hidden [T, M]    weight [V, M]    labels [T] int64    gives [T] fp32 (fp64 for fp64 input)
    prior  [V]  added to the logits, a constant
    """
    logits = F.linear(hidden, weight, _like(hidden, prior))
    return F.cross_entropy(logits.to(_wide(logits)), labels, ignore_index=NO_LABEL, reduction="none")


def _like(hidden: Tensor, prior: Tensor | None) -> Tensor | None:
    return None if prior is None else prior.to(hidden.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def row_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy, log-sum-exp), [T] fp32 each (fp64 for fp64 input), of logits [T, V] and labels [T] int64."""
    if on_kernels(logits):
        return loss_triton.row_losses(logits, labels)
    wide, without = logits.to(_wide(logits)), labels == NO_LABEL
    lse = wide.logsumexp(1)
    of_label = wide.gather(1, labels.masked_fill(without, 0)[:, None])[:, 0]
    return (lse - of_label).masked_fill(without, 0), lse


def row_gradients(logits: Tensor, labels: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    """Gradient [T, V] of the logits from that of their losses [T]. May overwrite the logits."""
    if on_kernels(logits):
        return loss_triton.row_gradients(logits, labels, lse, grad)
    without = labels == NO_LABEL
    p = (logits.to(_wide(logits)) - lse[:, None]).exp()
    p.scatter_add_(1, labels.masked_fill(without, 0)[:, None], -torch.ones_like(lse)[:, None])
    return (p * grad.masked_fill(without, 0)[:, None]).to(logits.dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; total may be fp32 where a and b are bf16: nothing is rounded to bf16 on the way."""
    if on_kernels(a) and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class _TokenLosses(torch.autograd.Function):
    """Keeps the inputs and a number a token.

    The backward pass computes the logits once more, one product of four. Gradients made in the forward pass would save
    it, but only for a loss whose weight on each token is known by then; these losses take any, and a NaN as well.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int, prior: Tensor | None) -> Tensor:
        chunks = zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
        rows = [row_losses(F.linear(h, weight, prior), y) for h, y in chunks]
        losses, lse = (torch.cat(parts) for parts in zip(*rows, strict=True))
        ctx.save_for_backward(hidden, weight, labels, lse, prior)
        ctx.chunk_tokens = chunk_tokens
        return losses

    @staticmethod
    def backward(ctx, grad: Tensor):
        hidden, weight, labels, lse, prior = ctx.saved_tensors
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=lse.dtype)
        parts = (x.split(ctx.chunk_tokens) for x in (hidden, labels, lse, grad.contiguous(), d_hidden))
        for h, y, s, g, d_h in zip(*parts, strict=True):
            d_logits = row_gradients(F.linear(h, weight, prior), y, s, g)
            torch.mm(d_logits, weight, out=d_h)
            add_product(d_weight, d_logits.T, h)
            del d_logits  # before the next chunk's
        return d_hidden, d_weight.to(weight.dtype), None, None, None


def chunked_token_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int, prior: Tensor | None = None
) -> Tensor:
    """`token_losses`, a chunk at a time; the backward pass recomputes each chunk's logits.

    Logits and their gradient are rounded to the dtype of the input; softmax and the sum of the weight's gradient over
    the chunks are fp32 (fp64 for fp64 input).
    """
    return _TokenLosses.apply(hidden, weight, labels, chunk_tokens, _like(hidden, prior))
