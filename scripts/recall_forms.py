"""Which facts a trained model copies from held-out text, by their form: what to ask small models for.

python scripts/recall_forms.py runs/r1-full-seed0 runs/r1-nsa-seed0

As `nsa-train eval task=needle,multikey`, with facts of other forms, beside those that recall documents teach (`train`)
and quizzes ask for (`heldout`). Each run's findings replace its earlier ones in --out.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nsa_train import runtime
from nsa_train.bench import results
from nsa_train.data.recall import CONSONANTS, WORDS, Words, constant
from nsa_train.errors import NsaTrainError
from nsa_train.evaluate.command import heldout_store, opened, real_texts
from nsa_train.evaluate.grid import answers, summary
from nsa_train.evaluate.questions import Quizzes
from nsa_train.train.folder import read_config


def of(needle: str, **makers: Any) -> Words:
    """Facts of one line; other letters begin no key of another form."""
    return Words(CONSONANTS, needle, "", "", "", **makers)


def digits(count: int) -> Any:
    return lambda draw: str(draw.randrange(10 ** (count - 1), 10**count))


def small(draw: random.Random, first: str = CONSONANTS) -> str:
    return constant(draw, first).lower()


def name(draw: random.Random, first: str) -> str:
    return constant(draw, first).split("_")[0].capitalize()


FORMS = {
    **WORDS,
    "define, 2 digits": of("#define {key} {value}", value=digits(2)),
    "define, 7 digits": of("#define {key} {value}", value=digits(7)),
    "define, hexadecimal": of("#define {key} {value}", value=lambda draw: f"0x{draw.getrandbits(32):08x}"),
    "define, name": of("#define {key} {value}", value=lambda draw: constant(draw, CONSONANTS)),
    "assignment": of("\t{key} = {value}", key=small),
    "assignment of a name": of("\t{key} = {value}", key=small, value=small),
    "structure": of("struct {key} {value}", key=small, value=small),
    "sentence": of("One of the special magic numbers for {key} is: {value}", key=name, value=digits(7)),
    "person": of("My name is {key} {value}", key=name, value=lambda draw: name(draw, CONSONANTS)),
}


def rows(run: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    config = read_config(run)
    model, tokenizer = opened(run)
    quizzes = Quizzes(tokenizer, real_texts(heldout_store(config), tokenizer, config.model.max_seq_len))
    for form, words in FORMS.items():
        for task in ("needle", "multikey"):
            for length in args.lengths:
                asked = quizzes.documents(task, length, args.depths, args.samples, words)
                found = summary(list(answers(model, asked, config.attention, args.batch_tokens)), length)
                fact = words.needle.format(key=words.key(draw := random.Random(0), words.keys), value=words.value(draw))
                yield {"run": run.name, "arm": config.arm, "form": form, "fact": fact.strip(), "task": task, **found}
                if found["samples"]:
                    runtime.log.info(
                        "%s, %s: %s, %s tokens: %.0f%% right, loss %.3f, of %d", run.name, form, task, f"{length:,}",
                        100 * found["accuracy"], found["loss"], found["samples"],
                    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--depths", type=int, default=11)
    parser.add_argument("--samples", type=int, default=3, help="questions of each depth")
    parser.add_argument("--batch-tokens", type=int, default=131072, help="in a forward pass, at most")
    parser.add_argument("--out", type=Path, default=Path("runs/recall_forms.json"))
    args = parser.parse_args()
    runtime.setup_console()
    try:
        for run in args.runs:
            found = results.with_earlier(args.out, list(rows(run, args)), lambda row: row["run"])
            print(results.write_result(args.out.stem, "recall_forms", found, folder=args.out.parent))
    except NsaTrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
