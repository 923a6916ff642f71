"""Cross-entropy of a linear head, in chunks: logits of all tokens never exist at once.

At 64k tokens and 129k vocabulary whole fp32 logits would take 34 GB, forward alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each token in nats, 0 where the label is -100. The plain form of `chunked_token_losses`.

    hidden [T, M]    weight [V, M]    labels [T] int64    gives [T] fp32 (fp64 for fp64 input)
    """
    logits = F.linear(hidden, weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, ignore_index=-100, reduction="none")


def chunked_token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int) -> Tensor:
    """`token_losses`, a chunk at a time; the backward pass recomputes each chunk's logits."""
    losses = [
        checkpoint(token_losses, h, weight, y, use_reentrant=False)
        for h, y in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
    ]
    return torch.cat(losses)
