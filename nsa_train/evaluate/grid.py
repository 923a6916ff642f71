"""Answers of a model to quizzes, by length and depth: one row a cell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F

from nsa_train.config.schema import AttentionConfig
from nsa_train.evaluate.questions import Asked, Document
from nsa_train.model.transformer import Transformer
from nsa_train.packing import Packing

Z_95 = 1.959964


@dataclass(frozen=True)
class Answer:
    """right   every token of the answer is the likeliest one, so greedy decoding gives it
    loss       nats per token of the answer
    zone       as in `Asked.zone`
    selected   share of the facts held by the blocks that the question reads, mean over layers and KV heads; None: none
    document   number of the document that asks, which may ask more
    """

    right: bool
    loss: float
    zone: str | None
    selected: float | None
    depth: int
    document: int


@torch.no_grad()
def answers(
    model: Transformer, documents: Iterable[Document], attention: AttentionConfig, batch_tokens: int
) -> Iterator[Answer]:
    """One for each question, in order; documents are packed into batches of at most so many tokens, one at least."""
    device, number = model.embed.weight.device, 0
    for group in _grouped(documents, batch_tokens):
        packing = Packing.from_lengths([len(document.tokens) for document in group]).to(device)
        tokens = torch.cat([torch.from_numpy(document.tokens) for document in group]).to(device)
        kept: list[torch.Tensor] = []
        model.keep_blocks(kept)
        states = model.hidden(tokens, packing)[0]
        model.keep_blocks(None)
        first = 0
        for document in group:
            places = [torch.arange(*asked.answer) + first for asked in document.asked]
            place = torch.cat(places).to(device)
            logits = model.head(states[place - 1]).float()
            losses = F.cross_entropy(logits, tokens[place], reduction="none").split([len(p) for p in places])
            right = (logits.argmax(-1) == tokens[place]).split([len(p) for p in places])
            for asked, nats, hits in zip(document.asked, losses, right, strict=True):
                query = first + asked.answer[0] - 1
                chosen = torch.stack([blocks[query] for blocks in kept]) if kept else None
                yield Answer(
                    bool(hits.all()), float(nats.mean()), asked.zone(attention), _selected(chosen, asked, attention),
                    asked.depth, number,
                )  # fmt: skip
            first, number = first + len(document.tokens), number + 1


def _grouped(documents: Iterable[Document], batch_tokens: int) -> Iterator[list[Document]]:
    group: list[Document] = []
    for document in documents:
        if group and sum(len(d.tokens) for d in group) + len(document.tokens) > batch_tokens:
            yield group
            group = []
        group.append(document)
    if group:
        yield group


def _selected(chosen: torch.Tensor | None, asked: Asked, attention: AttentionConfig) -> float | None:
    """chosen [layers, Hk, n]; a fact is held when one of the blocks has a token of it."""
    if chosen is None:
        return None
    start, size = chosen * attention.slc_block, attention.slc_block
    held = [((start < end) & (start + size > begin)).any(-1) for begin, end in asked.facts]
    return float(torch.stack(held).float().mean())


def cells(found: Sequence[Answer], length: int, depths: int) -> Iterator[dict[str, Any]]:
    """A row for each depth that was asked for: of the questions that need selection, or, where none does, of all.

    `zone` is where the facts of the latter lie.
    """
    for depth in range(depths):
        mine = [answer for answer in found if answer.depth == depth]
        if mine:
            counted = [answer for answer in mine if not answer.zone]
            share, zone = depth / max(1, depths - 1), None if counted else mine[0].zone
            yield {"length": length, "depth": share, "zone": zone, **_scores(counted or mine)}


def summary(found: Sequence[Answer], length: int) -> dict[str, Any]:
    """Of a length, over the questions that need selection."""
    counted = [answer for answer in found if not answer.zone]
    cells = len({answer.depth for answer in counted})
    return {"length": length, "cells": cells, **(_scores(counted) if counted else {"samples": 0})}


def _scores(found: Sequence[Answer]) -> dict[str, Any]:
    """The interval counts documents, as if all questions of one were answered alike: it is never too narrow."""
    share, documents = mean(answer.right for answer in found), len({answer.document for answer in found})
    low, high = wilson(share * documents, documents)
    selected = [answer.selected for answer in found if answer.selected is not None]
    return {
        "samples": len(found), "accuracy": share, "low": low, "high": high,
        "loss": mean(answer.loss for answer in found), "selection_recall": mean(selected) if selected else None,
    }  # fmt: skip


def wilson(right: float, samples: int) -> tuple[float, float]:
    """95% interval of a share (Wilson's score interval)."""
    share, square = right / samples, Z_95**2 / samples
    centre, half = share + square / 2, Z_95 * math.sqrt(share * (1 - share) / samples + square / (4 * samples))
    return max(0.0, (centre - half) / (1 + square)), min(1.0, (centre + half) / (1 + square))
