"""Synthetic documents that ask for what they said long before: needles, many keys, chains of variables, MQAR.

A question repeats the words of its fact up to the value, so a model answers it by induction: it copies what followed
the same words before. Small models learn that from any text, but must have met the format before they can be asked.
Documents of the words `train` and `heldout` share neither keys nor templates. Values are an adjective and a noun of
lists that both share, drawn anew for each fact: nothing but the document tells them, so an answer shows recall and not
memory, and one of 4,096 is right by chance.

A value follows its key at once, and its words are a token each. So to look where the last token stood before finds the
answer: the last piece of a key is that of few others, and then comes the adjective. With digits it does not: the space
before them is a token and they are ten others, the same in every fact.

Each document ends with one or more questions whose answers can be read off its text; `answers` finds them again. The
same split, number and sizes give the same document.
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
    """What the documents of one split are made of; no key and no template occurs in the other split.

    A key stands behind a space wherever it is told or asked for, and a value behind it at the end of its line, so that
    a tokenizer gives both the same tokens in a question as in its fact.
    """

    keys: str  # first letters of keys and variables; what follows them is alike, so that both have the same last pieces
    needle: str  # template of a line that is to be recalled, and of its question
    assign: str  # template of a variable with a value
    copy: str  # template of a variable that is another's, in the words of `assign`
    trace: str  # question for a variable at the end of a chain: its first hop is what followed the key before


WORDS = {
    "train": Words("bcghjlnrtw", "code {key} {value}", "let {key} {value}", "let {key} {other}", "trace {key} {value}"),
    "heldout": Words(
        "dfkmpsvz", "remember {key} {value}", "now {key} {value}", "now {key} {other}", "at last {key} {value}"
    ),
}
CONSONANTS = "bcdfghjklmnprstvwz"  # of keys after their first letter
VOWELS = "aeiou"
# Of values, in both splits. All 128 are one token behind a space in the tokenizer of data=comparison, common words that
# they are: also in one that was trained before the documents had them.
ADJECTIVES = """
    silver golden purple yellow green blue brown white black red grey hidden broken frozen gentle clever brave proud
    noble royal secret sacred wooden iron rapid steady sudden tender bitter sweet silent happy careful curious ancient
    modern foreign central public private common rare smooth rough thick thin sharp solid empty full deep broad wide
    tall short round square flat straight wild calm busy wise honest
""".split()  # noqa: SIM905
NOUNS = """
    horse bear dog cat bird cow sheep castle palace church prison kitchen island valley desert sword candle mirror king
    queen prince knight priest soldier servant judge poet wine salt ring wheel engine carriage coat boot hat tree leaf
    branch flower moon star cloud thunder rain snow wind bell clock pipe pen book heart lamp gold cup chair box gate
    roof rock sand sea boat
""".split()  # noqa: SIM905
FILLER = """
    the a this that some every one river road house garden table window letter morning evening winter summer market
    bridge village mountain ship captain teacher doctor farmer sister brother friend stranger child crowd silence
    story voice colour shadow light stone water fire bread paper door room street hill field forest journey answer
    was is seemed stood lay went came turned looked waited spoke began ended stayed grew fell rose left old young
    quiet bright heavy narrow distant early late warm cold small great strange familiar simple open near behind
    under over across after without between toward slowly again never always often there
""".split()  # noqa: SIM905


# Characters of filler that have the tokens of one of a line with a fact, whose key is dear: by the tokenizer of
# data=comparison a token has 5.4 of those and 3.6 of these.
FACT_WEIGHT = 1.5
TYPICAL = {"key": "rudeka", "value": "silver bell"}  # of mean length
MOST_PAIRS = 4096  # few beside the keys that there are


def recall_documents(split: str, documents: int, least_chars: int, most_chars: int) -> Iterator[Document]:
    """Documents of all kinds in turn, none longer and hardly one shorter; long ones are as frequent as short ones.

    A kind's `size` is in characters of filler, from FACT_WEIGHT * least_chars to most_chars: documents of one size have
    about as many tokens, those full of facts in fewer characters.
    """
    kinds = [*KINDS, "mqar"]  # twice, for it asks for most
    least = min(FACT_WEIGHT * (least_chars + 2 * _pair_chars(WORDS[split])), most_chars)  # so much may be rounded off
    for number in range(documents):
        kind = kinds[number % len(kinds)]
        draw = random.Random(runtime.seed_of("recall", split, number, least_chars, most_chars))
        size = round(least * (most_chars / least) ** draw.random())
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
    """(key, value) of each line of a document that asks: a fact's words for a key that was told before, or a trace."""
    needle, trace = _pattern(words.needle), _pattern(words.trace)
    told: set[str] = set()
    found = []
    for line in text.split("\n"):
        if match := needle.fullmatch(line) or trace.fullmatch(line):
            key, value = match["key"], match["value"]
            if match.re is trace or key in told:
                found.append((key, value))
            told.add(key)
    return found


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(
        re.escape(template).replace(r"\{key\}", "(?P<key>[a-z]+)").replace(r"\{value\}", "(?P<value>[a-z]+ [a-z]+)")
    )


def _needle(draw: random.Random, words: Words, size: int) -> str:
    """A few lines among filler, all asked for at the end."""
    return _hidden(draw, words, size, draw.randint(1, 4))


def _multikey(draw: random.Random, words: Words, size: int) -> str:
    """Many lines of one form among filler, all asked for: no line stands out by its form."""
    return _hidden(draw, words, size, draw.randint(16, 128))


def _hidden(draw: random.Random, words: Words, size: int, needles: int) -> str:
    """At most so many needles: as many as leave room for their questions."""
    pairs = _pairs(draw, words, min(needles, _most_pairs(words, size)))
    lines = [words.needle.format(key=key, value=value) for key, value in pairs]
    return _among_filler(draw, lines, draw.sample(lines, len(lines)), size, in_order=False)


def _tracing(draw: random.Random, words: Words, size: int) -> str:
    """Chains of assignments, two to four hops each, mixed but each in its order, and asked for by its last variable."""
    chain_chars = 6 * len(words.trace.format(**TYPICAL))  # five lines and the question, at most
    chains = min(draw.randint(4, 32), max(1, int(size / (FACT_WEIGHT * chain_chars))))
    names = _keys(draw, words, chains * 5)
    lines: list[list[str]] = []
    questions = []
    for chain in range(chains):
        mine = names[5 * chain : 5 * chain + draw.randint(3, 5)]
        value = _value(draw)
        first = words.assign.format(key=mine[0], value=value)
        lines.append([first, *(words.copy.format(key=b, other=a) for a, b in pairwise(mine))])
        questions.append(words.trace.format(key=mine[-1], value=value))
    turns = [chain for chain, own in enumerate(lines) for _ in own]
    draw.shuffle(turns)
    draw.shuffle(questions)
    rest = [iter(own) for own in lines]
    return _among_filler(draw, [next(rest[turn]) for turn in turns], questions, size, in_order=True)


def _mqar(draw: random.Random, words: Words, size: int) -> str:
    """Multi-query associative recall: pairs without filler, then all of them again in another order."""
    told = [words.needle.format(key=key, value=value) for key, value in _pairs(draw, words, _most_pairs(words, size))]
    return "\n".join([*told, *draw.sample(told, len(told))]) + "\n"


def _most_pairs(words: Words, size: int) -> int:
    """How many pairs have room in a document, told and asked for; one at least."""
    return max(1, min(int(size / (FACT_WEIGHT * _pair_chars(words))), MOST_PAIRS))


def _pair_chars(words: Words) -> int:
    """Characters of a pair, told and asked for."""
    return 2 * len(words.needle.format(**TYPICAL) + "\n")


def _among_filler(draw: random.Random, lines: list[str], questions: list[str], size: int, in_order: bool) -> str:
    """The lines at random depths of filler, the questions at the end; together of the tokens of `size` characters."""
    filler = _filler(draw, size - FACT_WEIGHT * sum(len(line) + 1 for line in lines + questions))
    depths = [draw.randint(0, len(filler)) for _ in lines]
    if in_order:
        depths.sort()
    return "\n".join([*_inserted(filler, lines, depths), *questions]) + "\n"


def _filler(draw: random.Random, room: float) -> list[str]:
    """Lines of words without facts, of nearly but at most `room` characters."""
    filler: list[str] = []
    while True:
        line = " ".join(draw.choices(FILLER, k=draw.randint(6, 16))).capitalize() + "."
        room -= len(line) + 1
        if room < 0:
            return filler
        filler.append(line)


def _inserted(filler: list[str], lines: list[str], depths: Sequence[int]) -> list[str]:
    """The filler with each line before its filler line of that number; of lines at one depth the first comes first."""
    placed = list(filler)
    for depth, number in sorted(zip(depths, range(len(lines)), strict=True), reverse=True):
        placed.insert(depth, lines[number])
    return placed


def _pairs(draw: random.Random, words: Words, count: int) -> list[tuple[str, str]]:
    return [(key, _value(draw)) for key in _keys(draw, words, count)]


def _keys(draw: random.Random, words: Words, count: int) -> list[str]:
    """Different made-up words of three syllables."""
    found: dict[str, None] = {}
    while len(found) < count:
        consonants = draw.choice(words.keys), draw.choice(CONSONANTS), draw.choice(CONSONANTS)
        found["".join(consonant + draw.choice(VOWELS) for consonant in consonants)] = None
    return list(found)


def _value(draw: random.Random) -> str:
    return f"{draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}"


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
        pairs = _pairs(draw, words, max(2, size // _pair_chars(words)))
        order = draw.sample(range(len(pairs)), len(pairs))
        return Quiz([words.needle.format(key=key, value=value) for key, value in pairs],
                    [_query(words.needle, *pairs[i], (i,)) for i in order])  # fmt: skip
    if kind == "tracing":
        facts, other, asked = _quiz_chains(draw, words)
    else:
        pairs = _pairs(draw, words, 1 if kind == "needle" else QUIZ_NEEDLES)
        told = [words.needle.format(key=key, value=value) for key, value in pairs]
        facts, other, asked = told[:1], told[1:], (words.needle, *pairs[0])
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
        values.append(_value(draw))
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
