"""Quizzes of `data.recall` as tokens of a wanted number, and what NSA sees of their facts without selecting them."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nsa_train import runtime
from nsa_train.config.schema import AttentionConfig
from nsa_train.data.recall import WORDS, Haystack, Query, Quiz, Words, make_quiz
from nsa_train.data.tokenizer import Tokenizer
from nsa_train.errors import ConfigError

KINDS = {"needle": "needle", "multikey": "multikey", "vartrace": "tracing", "mqar": "mqar"}  # task -> kind of quiz
HELDOUT_WORDS = "heldout"  # of `data.recall`, which training never saw
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


class Quizzes:
    """Quizzes in the tokens of a tokenizer, hidden in lines of `texts`. Raises DataError where these have none."""

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self._line = functools.cache(lambda line: tokenizer.encode(f"{line}\n"))  # every quiz has lines of others
        self._haystack = Haystack(texts, lambda line: len(self._line(line)))

    def documents(
        self, task: str, length: int, depths: int, samples: int, words: Words = WORDS[HELDOUT_WORDS]
    ) -> Iterator[Document]:
        """Of nearly but at most `length` tokens; the same arguments give the same ones.

        `samples` of each of `depths` depths; of mqar `samples` in all, whose questions ask at every depth.
        """
        everywhere = task == "mqar"
        for depth in range(1 if everywhere else depths):
            for sample in range(samples):
                size = length
                while True:
                    draw = random.Random(runtime.seed_of("eval", task, length, depth, sample))
                    share = depth / max(1, depths - 1)
                    quiz = make_quiz(KINDS[task], draw, words, self._haystack, size, share)
                    found = self._document(quiz, depths, None if everywhere else depth)
                    if (over := len(found.tokens) - length) <= 0:
                        break
                    if size == 0:
                        needed = len(found.tokens)
                        raise ConfigError(f"lengths: task={task} needs {needed} tokens, {length} are too few")
                    size = max(0, size - over)  # a question may have more tokens in parts than as a line
                yield found

    def _document(self, quiz: Quiz, depths: int, depth: int | None) -> Document:
        """Line by line, to know which tokens tell and which ask; depth None: that of each question's fact."""
        newline = self._tokenizer.encode("\n")
        parts = [self._line(line) for line in quiz.lines]
        ends = np.cumsum([0, *map(len, parts)]).tolist()
        at, asked = ends[-1], []
        for query in quiz.queries:
            question, answer = self._asked(query)
            begin = at + len(question)
            place = query.facts[0] * depths // len(quiz.lines) if depth is None else depth
            facts = tuple((ends[line], ends[line + 1]) for line in query.facts)
            asked.append(Asked((begin, begin + len(answer)), facts, place))
            parts += [question, answer, newline]
            at = begin + len(answer) + len(newline)
        return Document(np.concatenate(parts).astype(np.int64), tuple(asked))

    def _asked(self, query: Query) -> tuple[np.ndarray, np.ndarray]:
        """Question and answer, tokens [n] each. A token of space alone is the question's: it is no part of recall
        whether a model expects a space there or, as in much code, a tab."""
        question, answer = self._tokenizer.encode(query.question), self._tokenizer.encode(query.answer)
        spaces = next((i for i in range(len(answer)) if self._tokenizer.decode(answer[: i + 1]).strip()), 0)
        return np.concatenate([question, answer[:spaces]]), answer[spaces:]
