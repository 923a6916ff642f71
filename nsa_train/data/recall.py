"""Synthetic documents that ask for what they said long before: needles, many keys, chains of variables, MQAR.

A small model must have met the format before it can be asked. Training and held-out documents share neither keys, nor
values, nor templates, so an answer shows recall and not memory. The same split and number give the same document.

Each document ends with one or more questions whose answers can be read off its text; `answers` finds them again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from nsa_train import runtime
from nsa_train.config.schema import SourceConfig
from nsa_train.data.files import Document
from nsa_train.data.ledger import Ledger
from nsa_train.errors import DataError


class Words(NamedTuple):
    """What the documents of one split are made of; no entry occurs in the other split."""

    keys: str  # first letters of keys and variables
    digits: str  # of values
    needle: str  # template of a line that is to be recalled
    question: str  # its question, answered on the same line
    assign: str  # template of a variable with a value
    copy: str  # template of a variable that is another's
    trace: str  # question for a variable at the end of a chain


WORDS = {
    "train": Words(
        "bcdfghjklm", "02468", "The code of {key} is {value}.", "What is the code of {key}? {value}",
        "let {key} = {value}", "let {key} = {other}", "value of {key}: {value}",
    ),
    "heldout": Words(
        "npqrstvwxz", "13579", "Remember that {key} stands for {value}.", "{key} stands for {value}",
        "set {key} to {value}", "set {key} to {other}", "{key} now holds {value}",
    ),
}  # fmt: skip
VOWELS = "aeiou"
FILLER = """
    the a this that some every one river road house garden table window letter morning evening winter summer market
    bridge village mountain ship captain teacher doctor farmer sister brother friend stranger child crowd silence
    story voice colour shadow light stone water fire bread paper door room street hill field forest journey answer
    was is seemed stood lay went came turned looked waited spoke began ended stayed grew fell rose left old young
    quiet bright heavy narrow distant early late warm cold small great strange familiar simple open near behind
    under over across after without between toward slowly again never always often there
""".split()  # noqa: SIM905


def recall_documents(split: str, documents: int, least_chars: int, most_chars: int) -> Iterator[Document]:
    """Documents of all kinds in turn, each of about so many characters; long ones are as frequent as short ones."""
    kinds = list(KINDS)
    for number in range(documents):
        kind = kinds[number % len(kinds)]
        draw = random.Random(runtime.seed_of("recall", split, number))
        size = round(least_chars * (most_chars / least_chars) ** draw.random())
        yield Document(KINDS[kind](draw, WORDS[split], size), f"recall-{kind}", f"{split} {number}")


def read_recall(source: SourceConfig, paths: Sequence[str], ledger: Ledger) -> Iterator[Document]:
    """A source of such documents: `paths` name splits, `take` says how many, `min_chars` and `max_chars` how long."""
    for split in paths:
        if split not in WORDS:
            raise DataError(f"kind=recall: paths={list(paths)} must be {' or '.join(WORDS)}, whose words they have")
        assert source.take is not None
        assert source.max_chars is not None
        yield from recall_documents(split, source.take, source.min_chars, source.max_chars)


def answers(text: str, words: Words) -> list[tuple[str, str]]:
    """(question, answer) for each question at the end of a document, the answer without its question's words."""
    shapes = [_pattern(shape) for shape in (words.question, words.trace)]
    found = []
    for line in text.rstrip("\n").split("\n")[::-1]:
        match = next((match for shape in shapes if (match := shape.fullmatch(line))), None)
        if match is None:
            break
        found.append((match["key"], match["value"]))
    return found[::-1]


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(
        re.escape(template).replace(r"\{key\}", "(?P<key>[a-z]+)").replace(r"\{value\}", r"(?P<value>\d+)")
    )


def _needle(draw: random.Random, words: Words, size: int) -> str:
    """One line among filler, asked for at the end."""
    return _hidden(draw, words, size, needles=1, asked=1)


def _multikey(draw: random.Random, words: Words, size: int) -> str:
    """Many lines of one form among filler, some asked for: no line stands out by its form."""
    return _hidden(draw, words, size, needles=draw.randint(8, 64), asked=draw.randint(1, 4))


def _hidden(draw: random.Random, words: Words, size: int, needles: int, asked: int) -> str:
    pairs = _pairs(draw, words, needles)
    lines = [words.needle.format(key=key, value=value) for key, value in pairs]
    questions = [words.question.format(key=key, value=value) for key, value in draw.sample(pairs, asked)]
    return _among_filler(draw, lines, questions, size, in_order=False)


def _tracing(draw: random.Random, words: Words, size: int) -> str:
    """Chains of assignments, two to four hops each, their lines mixed but each chain in its order."""
    chains = draw.randint(2, 6)
    names = _keys(draw, words, chains * 5)
    lines: list[list[str]] = []
    questions = []
    for chain in range(chains):
        mine = names[5 * chain : 5 * chain + draw.randint(3, 5)]
        value = _value(draw, words)
        first = words.assign.format(key=mine[0], value=value)
        lines.append([first, *(words.copy.format(key=b, other=a) for a, b in pairwise(mine))])
        questions.append(words.trace.format(key=mine[-1], value=value))
    turns = [chain for chain, own in enumerate(lines) for _ in own]
    draw.shuffle(turns)
    rest = [iter(own) for own in lines]
    return _among_filler(draw, [next(rest[turn]) for turn in turns], [draw.choice(questions)], size, in_order=True)


def _mqar(draw: random.Random, words: Words, size: int) -> str:
    """Multi-query associative recall: pairs without filler, then all of them again in another order."""
    pairs = _pairs(draw, words, max(2, min(size // _mqar_size(words), 4096)))
    told = [words.needle.format(key=key, value=value) for key, value in pairs]
    draw.shuffle(pairs)
    return "\n".join([*told, *(words.question.format(key=key, value=value) for key, value in pairs)]) + "\n"


def _mqar_size(words: Words) -> int:
    """Characters of a pair, told and asked for."""
    return sum(len(shape.format(key="abcdef", value="12345")) + 1 for shape in (words.question, words.needle))


def _among_filler(draw: random.Random, lines: list[str], questions: list[str], size: int, in_order: bool) -> str:
    """The lines at random depths of `size` characters of filler, the questions at the end."""
    filler = _filler(draw, size - sum(map(len, lines)) - sum(map(len, questions)))
    depths = [draw.randint(0, len(filler)) for _ in lines]
    if in_order:
        depths.sort()
    return "\n".join([*_inserted(filler, lines, depths), *questions]) + "\n"


def _filler(draw: random.Random, room: int) -> list[str]:
    """Lines of words without facts, about `room` characters of them."""
    filler: list[str] = []
    while room > 0:
        filler.append(" ".join(draw.choices(FILLER, k=draw.randint(6, 16))).capitalize() + ".")
        room -= len(filler[-1]) + 1
    return filler


def _inserted(filler: list[str], lines: list[str], depths: Sequence[int]) -> list[str]:
    """The filler with each line before its filler line of that number; of lines at one depth the first comes first."""
    placed = list(filler)
    for depth, number in sorted(zip(depths, range(len(lines)), strict=True), reverse=True):
        placed.insert(depth, lines[number])
    return placed


def _pairs(draw: random.Random, words: Words, count: int) -> list[tuple[str, str]]:
    return [(key, _value(draw, words)) for key in _keys(draw, words, count)]


def _keys(draw: random.Random, words: Words, count: int) -> list[str]:
    """Different made-up words of three syllables."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(draw.choice(words.keys) + draw.choice(VOWELS) for _ in range(3))] = None
    return list(found)


def _value(draw: random.Random, words: Words) -> str:
    return "".join(draw.choices(words.digits, k=5))


# Quizzes: the same kinds with what is asked for at a chosen depth -----------------------------------------------------

QUIZ_NEEDLES = 32  # of a multikey quiz, one asked for
QUIZ_CHAINS, QUIZ_HOPS = 4, 3


class Query(NamedTuple):
    """A question line up to its answer, the answer, and the numbers of the lines that tell it."""

    question: str
    answer: str
    facts: tuple[int, ...]


class Quiz(NamedTuple):
    """The lines of a document before its questions, and the questions."""

    lines: list[str]
    queries: list[Query]


def make_quiz(kind: str, draw: random.Random, words: Words, size: int, depth: float) -> Quiz:
    """About `size` characters; the first line that tells the answer stands at `depth`, 0 to 1, of them.

    needle    one fact in filler      multikey  one of 32 alike
    tracing   a variable at the end of a chain of 3 copies, among 4 chains
    mqar      facts without filler, all of which are asked for again; their depths are those of their lines
    """
    if kind == "mqar":
        pairs = _pairs(draw, words, max(2, size // _mqar_size(words)))
        order = draw.sample(range(len(pairs)), len(pairs))
        return Quiz([words.needle.format(key=key, value=value) for key, value in pairs],
                    [_query(words.question, *pairs[i], (i,)) for i in order])  # fmt: skip
    if kind == "tracing":
        facts, other, asked = _quiz_chains(draw, words)
    else:
        pairs = _pairs(draw, words, 1 if kind == "needle" else QUIZ_NEEDLES)
        told = [words.needle.format(key=key, value=value) for key, value in pairs]
        facts, other, asked = told[:1], told[1:], (words.question, *pairs[0])
    filler = _filler(draw, size - sum(map(len, facts)) - sum(map(len, other)) - len(asked[0]))
    first = round(depth * len(filler))
    depths = [first, *sorted(draw.randint(first, len(filler)) for _ in facts[1:])]
    chains = sorted(draw.randint(0, len(filler)) for _ in other)
    lines = _inserted(filler, [*facts, *other], [*depths, *chains])
    return Quiz(lines, [_query(*asked, tuple(lines.index(fact) for fact in facts))])


def _quiz_chains(draw: random.Random, words: Words) -> tuple[list[str], list[str], tuple[str, str, str]]:
    """Lines of the chain that is asked for, those of the others, and (template, variable, value) of the question."""
    names, chains, values = _keys(draw, words, QUIZ_CHAINS * (QUIZ_HOPS + 1)), [], []
    for number in range(QUIZ_CHAINS):
        mine = names[number * (QUIZ_HOPS + 1) :][: QUIZ_HOPS + 1]
        values.append(_value(draw, words))
        first = words.assign.format(key=mine[0], value=values[-1])
        chains.append([first, *(words.copy.format(key=b, other=a) for a, b in pairwise(mine))])
    return chains[0], [line for chain in chains[1:] for line in chain], (words.trace, names[QUIZ_HOPS], values[0])


def _query(template: str, key: str, value: str, facts: tuple[int, ...]) -> Query:
    """Templates end with the value; the space before it belongs to the answer, as tokens have it."""
    question = template.format(key=key, value="").rstrip(" ")
    return Query(question, template.format(key=key, value=value).removeprefix(question), facts)


KINDS: dict[str, Callable[[random.Random, Words, int], str]] = {
    "needle": _needle, "multikey": _multikey, "tracing": _tracing, "mqar": _mqar,
}  # fmt: skip
