"""Documents that ask for what they said long before: needles, many keys, chains of variables, MQAR.

Facts, constants of made-up names and five digits, stand as lines in text of the corpus, the haystack. A question
repeats the words of its fact up to the value, so a model answers it by induction: it copies what followed the same
words before. What small models copy from context are rare names and numbers, as in code: facts in which two common
words are the value, or whose haystack is made up of random words, they do not learn (docs/design.md).

Documents of the words `train` and `heldout` share neither keys nor templates. Values are drawn anew for each fact:
nothing but the document tells them, so an answer shows recall and not memory, and one of 90,000 is right by chance.

Each document ends with one or more questions whose answers can be read off its text; `answers` finds them again. The
same split, haystack, number and sizes give the same document.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from nsa_train import runtime
from nsa_train.config.data_schema import SourceConfig
from nsa_train.data.files import Document
from nsa_train.errors import DataError

CONSONANTS, VOWELS = "BCDFGHJKLMNPRSTVWZ", "AEIOU"  # of keys
LEAST_VALUE, MOST_VALUE = 10_000, 99_999


def constant(draw: random.Random, first: str = CONSONANTS) -> str:
    """A name of two made-up words of three syllables, which begins with one of the letters `first`."""
    consonants = [draw.choice(first), *draw.choices(CONSONANTS, k=5)]
    syllables = [consonant + draw.choice(VOWELS) for consonant in consonants]
    return "".join([*syllables[:3], "_", *syllables[3:]])


def five_digits(draw: random.Random) -> str:
    return str(draw.randint(LEAST_VALUE, MOST_VALUE))


class Words(NamedTuple):
    """What facts are made of. Of the two splits no key and no template occurs in the other one.

    A key stands behind a space or a tab wherever it is told or asked for, and a value behind it and a space at the end
    of its line, so that a tokenizer which splits there gives both the same tokens in a question as in its fact.
    """

    keys: str  # first letters of keys and variables
    needle: str  # template of a line that is to be recalled, and of its question
    assign: str  # template of a variable with a value
    copy: str  # template of a variable that is another's, in the words of `assign`
    trace: str  # question for a variable at the end of a chain: its first hop is what followed the key before
    key: Callable[[random.Random, str], str] = constant  # one, by its first letters
    value: Callable[[random.Random], str] = five_digits


WORDS = {
    "train": Words("BCGHJLNRTW", "const {key} {value}", "let {key} {value}", "let {key} {other}", "say {key} {value}"),
    "heldout": Words(
        "DFKMPSVZ", "#define {key} {value}", "set {key} {value}", "set {key} {other}", "get {key} {value}"
    ),
}
KEY, VALUE = "(?P<key>[A-Z_]+)", "(?P<value>[0-9]{5})"

LONGEST_LINE = 200  # of a haystack; longer ones are cut
MOST_HAYSTACK = 64_000_000  # characters that are kept in memory, the first ones, so that any source will do


def characters(line: str) -> int:
    """Of a line in a document."""
    return len(line) + 1


class Haystack:
    """Lines of text to hide facts in; `measure` tells the size of one. Raises DataError where there are none."""

    def __init__(self, texts: Iterable[str], measure: Callable[[str], int] = characters) -> None:
        self.measure = measure
        self._lines: list[str] = []
        room = MOST_HAYSTACK
        for text in texts:
            for line in text[:room].split("\n"):
                self._lines += [line[at : at + LONGEST_LINE] for at in range(0, max(1, len(line)), LONGEST_LINE)]
            room -= len(text)
            if room <= 0:
                break
        if not any(self._lines):
            raise DataError("a haystack without text: nothing to hide facts in")

    def lines(self, draw: random.Random, room: float) -> list[str]:
        """Lines that follow each other, from a random one on, of nearly but at most the size `room`."""
        at, found = draw.randrange(len(self._lines)), []
        while (room := room - self.measure(line := self._lines[at % len(self._lines)])) >= 0:
            found.append(line)
            at += 1
        return found


# Characters of a haystack that have the tokens of one of a line with a fact, whose key is dear: by the tokenizer of
# data=comparison a token has 2.9 to 3.7 of those and 1.5 of these.
FACT_WEIGHT = 2.0
TYPICAL = {"key": "RUDEKA_LOMITO", "value": "48213"}  # of the length of all
MOST_PAIRS = 4096  # few beside the keys that there are


def recall_documents(
    split: str, haystack: Haystack, documents: int, least_chars: int, most_chars: int
) -> Iterator[Document]:
    """Documents of all kinds in turn, none longer and hardly one shorter; long ones are as frequent as short ones.

    A kind's `size` is in characters of the haystack, from FACT_WEIGHT * least_chars to most_chars: documents of one
    size have about as many tokens, those full of facts in fewer characters.
    """
    kinds = [*KINDS, "mqar"]  # twice, for it asks for most
    least = min(FACT_WEIGHT * (least_chars + 2 * _pair_chars(WORDS[split])), most_chars)  # so much may be rounded off
    for number in range(documents):
        kind = kinds[number % len(kinds)]
        draw = random.Random(runtime.seed_of("recall", split, number, least_chars, most_chars))
        size = round(least * (most_chars / least) ** draw.random())
        yield Document(KINDS[kind](draw, WORDS[split], haystack, size), f"recall-{kind}", f"{split} {number}")


def read_recall(source: SourceConfig, paths: Sequence[str], haystack: Haystack) -> Iterator[Document]:
    """A source of such documents: `paths` name splits, `take` says how many, `min_chars` and `max_chars` how long."""
    for split in paths:
        if split not in WORDS:
            raise DataError(f"kind=recall: paths={list(paths)} must be {' or '.join(WORDS)}, whose words they have")
        assert source.take is not None
        assert source.max_chars is not None
        yield from recall_documents(split, haystack, source.take, source.min_chars, source.max_chars)


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
    return re.compile(re.escape(template).replace(r"\{key\}", KEY).replace(r"\{value\}", VALUE))


def _needle(draw: random.Random, words: Words, haystack: Haystack, size: int) -> str:
    """A few lines in the haystack, all asked for at the end."""
    return _hidden(draw, words, haystack, size, draw.randint(1, 4))


def _multikey(draw: random.Random, words: Words, haystack: Haystack, size: int) -> str:
    """Many lines of one form in the haystack, all asked for: no line stands out by its form."""
    return _hidden(draw, words, haystack, size, draw.randint(16, 128))


def _hidden(draw: random.Random, words: Words, haystack: Haystack, size: int, needles: int) -> str:
    """At most so many needles: as many as leave room for their questions."""
    pairs = _pairs(draw, words, min(needles, _most_pairs(words, size)))
    lines = [words.needle.format(key=key, value=value) for key, value in pairs]
    return _among(haystack, draw, lines, draw.sample(lines, len(lines)), size, in_order=False)


def _tracing(draw: random.Random, words: Words, haystack: Haystack, size: int) -> str:
    """Chains of assignments, two to four hops each, mixed but each in its order, and asked for by its last variable."""
    chain_chars = 6 * len(words.trace.format(**TYPICAL))  # five lines and the question, at most
    chains = min(draw.randint(4, 32), max(1, int(size / (FACT_WEIGHT * chain_chars))))
    names = _keys(draw, words, chains * 5)
    lines: list[list[str]] = []
    questions = []
    for chain in range(chains):
        mine = names[5 * chain : 5 * chain + draw.randint(3, 5)]
        value = words.value(draw)
        first = words.assign.format(key=mine[0], value=value)
        lines.append([first, *(words.copy.format(key=b, other=a) for a, b in pairwise(mine))])
        questions.append(words.trace.format(key=mine[-1], value=value))
    turns = [chain for chain, own in enumerate(lines) for _ in own]
    draw.shuffle(turns)
    draw.shuffle(questions)
    rest = [iter(own) for own in lines]
    return _among(haystack, draw, [next(rest[turn]) for turn in turns], questions, size, in_order=True)


def _mqar(draw: random.Random, words: Words, haystack: Haystack, size: int) -> str:
    """Multi-query associative recall: pairs without a haystack, then all of them again in another order."""
    told = [words.needle.format(key=key, value=value) for key, value in _pairs(draw, words, _most_pairs(words, size))]
    return "\n".join([*told, *draw.sample(told, len(told))]) + "\n"


def _most_pairs(words: Words, size: int) -> int:
    """How many pairs have room in a document, told and asked for; one at least."""
    return max(1, min(int(size / (FACT_WEIGHT * _pair_chars(words))), MOST_PAIRS))


def _pair_chars(words: Words) -> int:
    """Characters of a pair, told and asked for."""
    return 2 * len(words.needle.format(**TYPICAL) + "\n")


def _among(
    haystack: Haystack, draw: random.Random, lines: list[str], questions: list[str], size: int, in_order: bool
) -> str:
    """The lines at random depths of a haystack, the questions at the end: the tokens of `size` characters."""
    filler = haystack.lines(draw, size - FACT_WEIGHT * sum(len(line) + 1 for line in lines + questions))
    depths = [draw.randint(0, len(filler)) for _ in lines]
    if in_order:
        depths.sort()
    return "\n".join([*_inserted(filler, lines, depths), *questions]) + "\n"


def _inserted(filler: list[str], lines: list[str], depths: Sequence[int]) -> list[str]:
    """The filler with each line before its filler line of that number; of lines at one depth the first comes first."""
    placed = list(filler)
    for depth, number in sorted(zip(depths, range(len(lines)), strict=True), reverse=True):
        placed.insert(depth, lines[number])
    return placed


def _pairs(draw: random.Random, words: Words, count: int) -> list[tuple[str, str]]:
    return [(key, words.value(draw)) for key in _keys(draw, words, count)]


def _keys(draw: random.Random, words: Words, count: int) -> list[str]:
    """Different ones."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[words.key(draw, words.keys)] = None
    return list(found)


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


def make_quiz(kind: str, draw: random.Random, words: Words, haystack: Haystack, size: int, depth: float) -> Quiz:
    """Nearly of `size`, as the haystack measures; the first line that tells the answer stands at `depth` of it, 0 to 1.

    needle    one fact in a haystack  multikey  one of 32 alike
    tracing   a variable at the end of a chain of 3 copies, among 4 chains
    mqar      facts without a haystack, all of which are asked for again; their depths are those of their lines

    Facts and questions are there in full, whatever the size.
    """
    if kind == "mqar":
        return _quiz_pairs(draw, words, haystack, size)
    if kind == "tracing":
        facts, other, asked = _quiz_chains(draw, words)
    else:
        pairs = _pairs(draw, words, 1 if kind == "needle" else QUIZ_NEEDLES)
        told = [words.needle.format(key=key, value=value) for key, value in pairs]
        facts, other, asked = told[:1], told[1:], (words.needle, *pairs[0])
    template, key, value = asked
    spoken = [*facts, *other, template.format(key=key, value=value)]
    filler = haystack.lines(draw, size - sum(map(haystack.measure, spoken)))
    ends = list(accumulate(map(haystack.measure, filler), initial=0))
    first = bisect_left(ends, depth * ends[-1])
    depths = [first, *sorted(draw.randint(first, len(filler)) for _ in facts[1:])]
    chains = sorted(draw.randint(0, len(filler)) for _ in other)
    lines = _inserted(filler, [*facts, *other], [*depths, *chains])
    return Quiz(lines, [_query(*asked, tuple(lines.index(fact) for fact in facts))])


def _quiz_pairs(draw: random.Random, words: Words, haystack: Haystack, size: int) -> Quiz:
    """As many as fit, each told and asked for; two at least."""
    pairs: dict[str, str] = {}
    while True:
        (key,) = _keys(draw, words, 1)
        fact = words.needle.format(key=key, value=(value := words.value(draw)))
        size -= 2 * haystack.measure(fact)
        if size < 0 and len(pairs) >= 2:
            break
        pairs[key] = value
    order = draw.sample(range(len(pairs)), len(pairs))
    told = list(pairs.items())
    return Quiz([words.needle.format(key=key, value=value) for key, value in told],
                [_query(words.needle, *told[i], (i,)) for i in order])  # fmt: skip


def _quiz_chains(draw: random.Random, words: Words) -> tuple[list[str], list[str], tuple[str, str, str]]:
    """Lines of the chain that is asked for, those of the others, and (template, variable, value) of the question."""
    names, chains, values = _keys(draw, words, QUIZ_CHAINS * (QUIZ_HOPS + 1)), [], []
    for number in range(QUIZ_CHAINS):
        mine = names[number * (QUIZ_HOPS + 1) :][: QUIZ_HOPS + 1]
        values.append(words.value(draw))
        first = words.assign.format(key=mine[0], value=values[-1])
        chains.append([first, *(words.copy.format(key=b, other=a) for a, b in pairwise(mine))])
    return chains[0], [line for chain in chains[1:] for line in chain], (words.trace, names[QUIZ_HOPS], values[0])


def _query(template: str, key: str, value: str, facts: tuple[int, ...]) -> Query:
    """Templates end with the value; a space before it goes with it, as in the words of a tokenizer."""
    question = template.format(key=key, value="").rstrip(" ")
    return Query(question, template.format(key=key, value=value).removeprefix(question), facts)


KINDS: dict[str, Callable[[random.Random, Words, Haystack, int], str]] = {
    "needle": _needle, "multikey": _multikey, "tracing": _tracing, "mqar": _mqar,
}  # fmt: skip
