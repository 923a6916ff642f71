"""`Packing`: where the documents lie in a packed sequence of T tokens.

Everything below the loader works on packed tokens `[T, ...]` and never on a batch dimension. The loader builds one
Packing per micro-batch on the CPU, so nobody has to ask the device how long a document is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Packing:
    """Document bounds of T packed tokens.

    cu_seqlens  [N + 1]  int32, bounds 0 ... T; equal bounds at the end are empty documents (they keep N fixed)
    positions   [T]      int32, place of each token inside its document
    lengths              the same bounds as Python numbers, without the empty documents; none in a recorded pass
    """

    cu_seqlens: torch.Tensor
    positions: torch.Tensor
    lengths: tuple[int, ...]

    @staticmethod
    def from_lengths(lengths: Sequence[int], documents: int | None = None) -> Packing:
        """Documents of the given lengths, one behind the other; `documents` pads the bounds to a fixed number."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"document lengths must be positive, got {list(lengths)}")
        documents = documents or len(lengths)
        if documents < len(lengths):
            raise ValueError(f"{len(lengths)} documents do not fit the fixed number {documents}")
        cu_seqlens = np.full(documents + 1, sum(lengths), np.int32)
        cu_seqlens[: len(lengths) + 1] = np.cumsum([0, *lengths])
        positions = np.arange(cu_seqlens[-1], dtype=np.int32)
        positions -= np.repeat(cu_seqlens[: len(lengths)], lengths)
        return Packing(torch.from_numpy(cu_seqlens), torch.from_numpy(positions), tuple(int(n) for n in lengths))

    @property
    def tokens(self) -> int:
        return self.positions.numel()

    def to(self, device: torch.device | str) -> Packing:
        return Packing(to_device(self.cu_seqlens, device), to_device(self.positions, device), self.lengths)


def to_device(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A copy there; to a GPU by way of pinned memory, so that nobody waits for what the GPU has yet to do."""
    on_gpu = torch.device(device).type == "cuda"
    return (x.pin_memory() if on_gpu and not x.is_cuda else x).to(device, non_blocking=on_gpu)
