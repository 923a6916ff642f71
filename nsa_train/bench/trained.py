"""Blocks that a trained model chose, as a file: `nsa-train eval` writes it, `nsa-train bench attention` reads it."""

from __future__ import annotations

import zipfile
from dataclasses import astuple, dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nsa_train.errors import NsaTrainError
from nsa_train.ops.nsa import NSASpec

BLOCKS_FILE = "blocks.npz"  # in <run>/eval
UNREADABLE = (OSError, ValueError, TypeError, KeyError, IndexError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class TrainedBlocks:
    """Selected blocks of some packed rows.

    blocks      [layers, T, Hk, n]  int16 or int32, inside the document, ascending, -1 last
    cu_seqlens  [N + 1]             int32, document bounds 0 ... T
    layers      [layers]            int32, their numbers in the model
    spec                            of the model
    """

    blocks: np.ndarray
    cu_seqlens: np.ndarray
    layers: np.ndarray
    spec: NSASpec

    def save(self, path: Path) -> None:
        spec = np.array(astuple(self.spec), np.int64)
        np.savez_compressed(path, blocks=self.blocks, cu_seqlens=self.cu_seqlens, layers=self.layers, spec=spec)

    @staticmethod
    def load(path: Path, spec: NSASpec) -> TrainedBlocks:
        """Raises NsaTrainError for a file that cannot be read, and for blocks that were not chosen with `spec`."""
        try:
            with np.load(path, allow_pickle=False) as file:
                found = TrainedBlocks(
                    file["blocks"], file["cu_seqlens"], file["layers"], NSASpec(*file["spec"].tolist())
                )
            if found.blocks.ndim != 4 or found.cu_seqlens[-1] != found.blocks.shape[1]:
                raise ValueError(f"blocks are {found.blocks.shape}, documents end at {found.cu_seqlens[-1:]}")
        except UNREADABLE as error:
            raise NsaTrainError(
                f"{path}: cannot be read ({error}); `nsa-train eval RUN task=blocks` writes RUN/eval/{BLOCKS_FILE}"
            ) from error
        if found.spec != spec:
            raise NsaTrainError(f"{path}: blocks of {found.spec}, but {spec} is what runs here")
        return found

    def lengths(self, T: int) -> list[int]:
        """The file's documents one behind the other, again and again, until T tokens are full; the last one is cut."""
        lengths: list[int] = []
        again = cycle(np.diff(self.cu_seqlens).tolist())
        while sum(lengths) < T:
            lengths.append(min(next(again), T - sum(lengths)))
        return lengths

    def cut(self, T: int, Hk: int) -> Tensor:
        """Blocks [T, Hk, n] int32 of the documents of `lengths`: the file's tokens again and again, cut at T.

        The file has layers x its KV heads sets. The Hk wanted ones are spread evenly over these, the first layer's
        first; where there are fewer, they come again.
        """
        _, tokens, heads, _ = self.blocks.shape
        sets = len(self.blocks) * heads
        chosen = [i * sets // Hk if sets >= Hk else i % sets for i in range(Hk)]
        found = np.stack([self.blocks[i // heads, :, i % heads] for i in chosen], 1)
        return torch.from_numpy(found[np.arange(T) % tokens].astype(np.int32))
