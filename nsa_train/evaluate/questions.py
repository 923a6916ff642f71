"""Quizzes of `data.recall` as tokens of a wanted number, and what NSA sees of their facts without selecting them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nsa_train import runtime
from nsa_train.config.schema import AttentionConfig
from nsa_train.data.recall import WORDS, Haystack, Quiz, make_quiz
from nsa_train.data.tokenizer import Tokenizer
from nsa_train.errors import ConfigError

KINDS = {"needle": "needle", "multikey": "multikey", "vartrace": "tracing", "mqar": "mqar"}  # task -> kind of quiz
HELDOUT_WORDS = "heldout"  # of `data.recall`, which training never saw
CHARS_PER_TOKEN = 8.0  # a first guess, more than any tokenizer reaches: a quiz is only ever made smaller
SHRINK = 0.995  # of a quiz that came out too long
Span = tuple[int, int]  # tokens of a document, the end excluded


@dataclass(frozen=True)
class Asked:
    """A question: which tokens are its answer, which ones tell it, and the depth that this counts for, from 0."""

    answer: Span
    facts: tuple[Span, ...]
    depth: int

    def zone(self, attention: AttentionConfig) -> Literal["forced", "window"] | None:
        """Where every fact is seen without being selected: in forced blocks or the window. None: one must be selected.

        The same for every arm, so that arms are scored on the same cells.
        """
        t = self.answer[0] - 1  # the query that predicts the answer's first token
        block, zones = attention.slc_block, []
        for start, end in self.facts:
            forced = end <= attention.slc_init * block or start >= (t // block - attention.slc_local + 1) * block
            window = start > t - attention.window
            if not forced and not window:
                return None
            zones.append("window" if window else "forced")
        return "window" if "window" in zones else "forced"


@dataclass(frozen=True)
class Document:
    """tokens [n] int64, questions and answers included."""

    tokens: np.ndarray
    asked: tuple[Asked, ...]


def make_documents(
    task: str, tokenizer: Tokenizer, haystack: Haystack, length: int, depths: int, samples: int,
    words: str = HELDOUT_WORDS,
) -> Iterator[Document]:  # fmt: skip
    """Documents of nearly but at most `length` tokens, of the words of a split; the same arguments give the same ones.

    `samples` of each of `depths` depths; of mqar `samples` in all, whose questions ask at every depth.
    """
    chars_per_token, everywhere = CHARS_PER_TOKEN, task == "mqar"
    for depth in range(1 if everywhere else depths):
        for sample in range(samples):
            size = round(length * chars_per_token)
            while True:
                draw = random.Random(runtime.seed_of("eval", task, length, depth, sample))
                quiz = make_quiz(KINDS[task], draw, WORDS[words], haystack, size, depth / max(1, depths - 1))
                found = _document(quiz, tokenizer, depths, None if everywhere else depth)
                if len(found.tokens) <= length:
                    break
                if size == 0:
                    needed = len(found.tokens)
                    raise ConfigError(f"lengths: task={task} needs {needed} tokens, {length} are too few")
                chars_per_token *= SHRINK * length / len(found.tokens)
                size = max(0, min(size - 1, round(length * chars_per_token)))
            yield found


def _document(quiz: Quiz, tokenizer: Tokenizer, depths: int, depth: int | None) -> Document:
    """Line by line, so that it is known which tokens tell and which ask; depth None: that of each question's fact."""
    parts = [tokenizer.encode(line + "\n") for line in quiz.lines]
    ends = np.cumsum([0, *map(len, parts)]).tolist()
    newline, at, asked = tokenizer.encode("\n"), ends[-1], []
    for query in quiz.queries:
        question, answer = tokenizer.encode(query.question), tokenizer.encode(query.answer)
        begin = at + len(question)
        place = query.facts[0] * depths // len(quiz.lines) if depth is None else depth
        facts = tuple((ends[line], ends[line + 1]) for line in query.facts)
        asked.append(Asked((begin, begin + len(answer)), facts, place))
        parts += [question, answer, newline]
        at = begin + len(answer) + len(newline)
    return Document(np.concatenate(parts).astype(np.int64), tuple(asked))
