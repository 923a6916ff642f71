"""Which facts a trained model copies from held-out text, by their form: what to ask small models for.

python scripts/recall_forms.py runs/r1-full-seed0 runs/r1-nsa-seed0

As `nsa-train eval task=needle,multikey`, with facts of other forms, beside those that recall documents teach (`train`)
and quizzes ask for (`heldout`). Findings go into <out>/recall_by_form.json, a run's in place of its earlier ones.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nsa_train.config.schema import Config
from nsa_train.data.recall import CONSONANTS, WORDS, Words, constant, five_digits
from nsa_train.errors import ConfigError
from nsa_train.evaluate.about_runs import about_runs
from nsa_train.evaluate.command import Options, ask, heldout_store, opened, real_texts
from nsa_train.evaluate.questions import Quizzes

NAME = "recall_by_form"


def digits(count: int) -> Callable[[random.Random], str]:
    return lambda draw: str(draw.randrange(10 ** (count - 1), 10**count))


def variable(draw: random.Random, first: str = CONSONANTS) -> str:
    return constant(draw, first).lower()


def person(draw: random.Random, first: str = CONSONANTS) -> str:
    return constant(draw, first).split("_")[0].capitalize()


def hexadecimal(draw: random.Random) -> str:
    return f"0x{draw.getrandbits(32):08x}"


def told_as(
    line: str, key: Callable[[random.Random, str], str] = constant, value: Callable[[random.Random], str] = five_digits
) -> Words:
    return Words(CONSONANTS, line, "", "", "", key, value)


FORMS = {
    **WORDS,
    "define, 2 digits": told_as("#define {key} {value}", value=digits(2)),
    "define, 7 digits": told_as("#define {key} {value}", value=digits(7)),
    "define, hexadecimal": told_as("#define {key} {value}", value=hexadecimal),
    "define, name": told_as("#define {key} {value}", value=constant),
    "assignment": told_as("\t{key} = {value}", variable),
    "assignment of a name": told_as("\t{key} = {value}", variable, variable),
    "structure": told_as("struct {key} {value}", variable, variable),
    "sentence": told_as("One of the special magic numbers for {key} is: {value}", person, digits(7)),
    "person": told_as("My name is {key} {value}", person, person),
}


def rows(run: Path, config: Config, options: Options) -> Iterator[dict[str, Any]]:
    """A summary of each form, task and length; `error` in its place where a document of that form does not fit."""
    model, tokenizer = opened(run)
    store = heldout_store(config)
    quizzes = Quizzes(tokenizer, real_texts(store, tokenizer, config.model.max_seq_len))
    trained = model.rope_factor
    for form, words in FORMS.items():
        fact = words.needle.format(key=words.key(draw := random.Random(0), words.keys), value=words.value(draw))
        for task in ("needle", "multikey"):
            for length in options.lengths:
                model.rope_factor = trained
                facts = {"run": str(run), "form": form, "fact": fact, "task": task}
                name = f"{run}, {form}: {task}"
                try:
                    found = list(ask(task, name, words, model, quizzes, store.hash, config, (length,), options))
                except ConfigError as error:
                    yield facts | {"arm": config.arm, "length": length, "error": str(error)}
                else:
                    yield found[-1] | facts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,2048,4096,8192", metavar="N,N")
    parser.add_argument("--depths", default="11", metavar="N")
    parser.add_argument("--samples", default="3", metavar="N", help="questions of each depth")

    def words(args: argparse.Namespace) -> list[str]:
        return ["task=needle", *(f"{key}={getattr(args, key)}" for key in ("lengths", "depths", "samples"))]

    return about_runs(NAME, parser, words, rows)


if __name__ == "__main__":
    sys.exit(main())
