"""Segments of packed documents: the d = cmp_stride tokens that r = l // d neighbouring compression blocks share.

T  tokens, packed    l  cmp_block    d  cmp_stride    rows = T // d  room for all segments, and for all blocks
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa_train.ops.documents import compressed_lengths
from nsa_train.ops.reference import NSASpec


class Segments:
    """Where segments and blocks of packed documents lie: indices for all layers, computed without asking the device.

    Documents shorter than l have none. Segments and blocks are numbered document after document; unused numbers at the
    end carry valid indices and are marked.

    first_token    [rows]     int64  packed index of each block's first token
    used           [rows]     bool   is a block
    any_used       []         bool   there is a block
    is_segment     [rows]     bool   is a segment
    tokens         [rows, d]  int64  packed tokens of each segment; unused ones repeat those of segment 0
    first_segment  [rows]     int64  first segment of each block
    block          [rows, r]  int64  block that has the segment as its i-th
    in_block       [rows, r]  bool   there is such a block
    place          [T]        int64  segment * d + place in it, of each token
    in_segment     [T]        bool   the token lies in a segment
    """

    def __init__(self, cu_seqlens: Tensor, T: int, spec: NSASpec) -> None:
        l, d, device = spec.cmp_block, spec.cmp_stride, cu_seqlens.device  # noqa: E741
        self.length, self.stride, self.count = l, d, l // d
        rows = T // d
        start = cu_seqlens[:-1].long()
        lengths = cu_seqlens.diff().long()
        blocks = compressed_lengths(cu_seqlens, spec).long()  # of each document
        segments = torch.where(blocks > 0, lengths // d, 0)
        block_end, segment_end = blocks.cumsum(0), segments.cumsum(0)
        first_block, first_segment = block_end - blocks, segment_end - segments
        row, last = torch.arange(rows, device=device), len(start) - 1

        document = torch.searchsorted(block_end, row, right=True).clamp(max=last)
        self.used = row < block_end[-1]
        self.any_used = block_end[-1] > 0
        local = row - first_block[document]
        self.first_segment = torch.where(self.used, first_segment[document] + local, 0)
        self.first_token = torch.where(self.used, start[document] + local * d, 0)

        document = torch.searchsorted(segment_end, row, right=True).clamp(max=last)
        self.is_segment = there = row < segment_end[-1]
        local = row - first_segment[document]
        token = torch.where(there, start[document] + local * d, 0)
        self.tokens = torch.where(there, token, token[:1])[:, None] + torch.arange(d, device=device)
        behind = local[:, None] - torch.arange(self.count, device=device)  # block of the document
        self.in_block = there[:, None] & (behind >= 0) & (behind < blocks[document][:, None])
        self.block = torch.where(self.in_block, first_block[document][:, None] + behind, 0)

        token = torch.arange(T, device=device)
        document = torch.searchsorted(cu_seqlens[1:].long(), token, right=True).clamp(max=last)
        local = token - start[document]
        self.in_segment = local < segments[document] * d
        self.place = torch.where(self.in_segment, first_segment[document] * d + local, 0)
