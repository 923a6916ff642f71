"""`nsa-train eval RUN task=needle,mqar`: a finished run's export under test, into <run>/eval/<task>.json and .png.

Answers at further lengths are added to a task's file; asked with other settings, they replace what it held.
`task=blocks` also leaves the blocks that the model chose, for `nsa-train bench attention --blocks`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nsa_train import runtime
from nsa_train.bench import results
from nsa_train.bench.figures import plot_grids
from nsa_train.bench.trained import BLOCKS_FILE, TrainedBlocks
from nsa_train.config.schema import AttentionConfig, Config
from nsa_train.data.loader import Loader
from nsa_train.data.prepare import prepare
from nsa_train.data.recall import WORDS, Words
from nsa_train.data.recall import answers as asked_in
from nsa_train.data.stages import Stage, stages_of
from nsa_train.data.store import TokenStore
from nsa_train.data.tokenizer import MODEL_FILE, Tokenizer
from nsa_train.errors import ConfigError, DataError, RunFolderError
from nsa_train.evaluate.blocks import count_blocks, plot_blocks
from nsa_train.evaluate.grid import answers, cells, summary
from nsa_train.evaluate.heldout import longest_documents, losses_in_rows
from nsa_train.evaluate.maps import attention_maps, cell_tokens, plot_maps
from nsa_train.evaluate.questions import HELDOUT_WORDS, KINDS, Quizzes
from nsa_train.model.branches import spec_of
from nsa_train.model.transformer import Transformer
from nsa_train.train.answers import added, read_answers, settings_of
from nsa_train.train.folder import read_config

HELDOUT, BLOCKS, MAPS = "heldout", "blocks", "maps"
TASKS = (*KINDS, HELDOUT, BLOCKS, MAPS)
HAYSTACK_DOCUMENTS = 32  # of max_seq_len tokens, or as many tokens of shorter ones


@dataclass(frozen=True)
class Options:
    """What is asked.

    task     names of TASKS, done in this order
    lengths  tokens; default: a quarter, a half and the whole of the run's rows, of blocks the whole; maps: the longest
    depths   of quizzes
    samples  quizzes of each depth; of blocks and maps: held-out rows, at most; of heldout: tokens, at most, in units of
             the model's max_seq_len
    words    of quizzes: `heldout`, or `train`, which tell a format that was not learnt from one that is not transferred
    """

    task: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    depths: int = 21
    samples: int = 20
    words: str = HELDOUT_WORDS

    @staticmethod
    def parse(words: Sequence[str]) -> Options:
        known = [field.name for field in fields(Options)]
        found: dict[str, Any] = {}
        for word in words:
            key, _, value = word.partition("=")
            if key not in known:
                raise ConfigError(f"eval: {word!r} is none of {', '.join(f'{name}=' for name in known)}")
            several = key in ("task", "lengths")
            numbers = value.strip("[]").split(",") if several else [value]
            if key == "task":
                found[key] = tuple(numbers)
            elif key == "words":
                found[key] = value
            elif not all(number.isdecimal() and int(number) > 0 for number in numbers):
                raise ConfigError(f"eval: {word} must be {'numbers' if several else 'a number'} from 1 on")
            else:
                found[key] = tuple(map(int, numbers)) if several else int(value)
        options = Options(**found)
        if unknown := [task for task in options.task or ("",) if task not in TASKS]:
            raise ConfigError(f"eval: task={','.join(unknown)} is no task; say task= some of {', '.join(TASKS)}")
        if options.words not in WORDS:
            raise ConfigError(f"eval: words={options.words} must be {' or '.join(WORDS)}")
        return options

    def name_of(self, task: str) -> str:
        """Of its file and in its rows: answers in the words of training stand by themselves."""
        return task if task not in KINDS or self.words == HELDOUT_WORDS else f"{task}_{self.words}"

    def lengths_of(self, task: str, row_tokens: int) -> tuple[int, ...]:
        """Of a run with rows of so many tokens."""
        if task == MAPS:
            return (max(self.lengths or (row_tokens,)),)
        return self.lengths or ((row_tokens,) if task == BLOCKS else (row_tokens // 4, row_tokens // 2, row_tokens))


def misfit(task: str, attention: AttentionConfig) -> str | None:
    """Why a task cannot be asked of a model with this attention; None: it can."""
    branches = f"which branches=[{','.join(attention.branches)}] has not"
    if task == BLOCKS and "slc" not in attention.branches:
        return f"needs a branch that selects blocks, {branches}"
    if task == BLOCKS and attention.selection != "topn":
        return f"needs blocks that the model chooses, not selection={attention.selection}"
    if task == MAPS and not {"full", "slc"} & set(attention.branches):
        return f"needs a branch with a key for every token before, {branches}"
    return None


def check_lengths(options: Options, config: Config) -> None:
    """Raises ConfigError where the model has no positions for a length."""
    longest = max(options.lengths, default=0)
    if longest > config.model.max_seq_len:
        raise ConfigError(f"eval: lengths={longest} is beyond the model's max_seq_len={config.model.max_seq_len}")


def check_fits(folder: Path, config: Config, options: Options) -> None:
    """Raises ConfigError where a task or a length cannot be asked of the run in this folder."""
    for task in options.task:
        if reason := misfit(task, config.attention):
            raise ConfigError(f"eval: {folder} is of the arm {config.arm}, and task={task} {reason}")
    check_lengths(options, config)


def main(arguments: list[str]) -> int:
    """Evaluate and write the findings; the exit code."""
    if not arguments or "=" in arguments[0]:
        raise ConfigError("eval: name the folder of a run first, like `nsa-train eval runs/tiny-nsa task=needle`")
    folder, options = Path(arguments[0]), Options.parse(arguments[1:])
    config = read_config(folder)
    check_fits(folder, config, options)
    for task in options.task:
        answers_there(folder / "eval" / f"{options.name_of(task)}.json")
    try:
        (folder / "eval").mkdir(exist_ok=True)
    except FileExistsError as error:
        raise RunFolderError(f"{folder / 'eval'}: a file, where answers have their folder; move it") from error
    model, tokenizer = opened(folder)
    trained = model.rope_factor
    if {*options.task} & {*KINDS}:
        store = heldout_store(config)
        quizzes = Quizzes(tokenizer, real_texts(store, tokenizer, config.model.max_seq_len))
    for task in options.task:
        lengths = options.lengths_of(task, stages_of(config)[-1].seq_len)
        path = folder / "eval" / f"{options.name_of(task)}.json"
        figure = path.with_suffix(".png")
        model.rope_factor = trained
        answered: Iterable[list[dict[str, Any]]]
        if task == HELDOUT:
            answered = _by_length(_heldout(model, config, lengths, options.samples))
        elif task == BLOCKS:
            found, chosen = _blocks(model, config, lengths, options.samples)
            answered = [found]
        elif task == MAPS:
            answered = [_maps(model, config, lengths[0], options.samples, figure)]
        else:
            name, words = options.name_of(task), WORDS[options.words]
            answered = _by_length(ask(task, name, words, model, quizzes, store.hash, config, lengths, options))
        for found in answered:  # written one by one: who stops here loses nothing that is answered
            rows = _with_earlier(path, found)
            written = results.write_result(path.stem, "eval", rows, folder=path.parent)
        if task in KINDS:
            plot_grids({f"{config.name}: {path.stem}": [row for row in rows if row["what"] == "cell"]}, figure)
        elif task == BLOCKS:
            longest = max(row["length"] for row in rows)
            title = f"{config.name}: selected blocks in held-out rows of {longest:,} tokens"
            plot_blocks([row for row in rows if row["length"] == longest], title, figure)
            if found[-1]["length"] == longest:
                chosen.save(figure.with_name(BLOCKS_FILE))
        runtime.log.info("%s", written)
    return 0


def _by_length(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Rows of a length, each time that a summary ends them."""
    found = []
    for row in rows:
        found.append(row)
        if row["what"] == "summary":
            yield found
            found = []


def answers_there(path: Path) -> list[dict[str, Any]]:
    """Rows of an earlier answer; none where there is no file. Raises RunFolderError."""
    return read_answers(path) if path.exists() else []


def _with_earlier(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the file of a task is to hold; says so where earlier answers go because they were asked in another way."""
    earlier = answers_there(path)
    before, now = (settings_of(some).get(rows[0]["task"], {}) for some in (earlier, rows))
    if earlier and before != now:
        changed = (f"{key}={now.get(key)} ({before.get(key, 'unknown')} before)" for key in now | before
                   if now.get(key) != before.get(key))  # fmt: skip
        runtime.log.info("%s: asked with %s, so earlier answers are replaced as a whole", path, ", ".join(changed))
    return added(earlier, rows)


def opened(folder: Path) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of the run's export, on this machine's device; in fp32 on a CPU, which is slow in bf16.

    Raises RunFolderError where there is no whole export.
    """
    export = folder / "export"
    if not (export / "config.json").is_file():
        raise RunFolderError(f"{export}: no export of a finished run; train with trainer.export=true")
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    import nsa_train.model.pretrained  # noqa: F401

    transformers_logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(export)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise RunFolderError(
            f"{export}: is damaged ({error}); copy it from where it is whole, or train and export again"
        ) from error
    device = runtime.device()
    model = loaded.transformer.to(device).eval()
    if device.type == "cpu":
        model.float()
    return model, Tokenizer.load(export / MODEL_FILE if (export / MODEL_FILE).is_file() else export)


def _stretch(model: Transformer, config: Config, length: int, trained: float) -> float:
    """Set and give YaRN's factor for a length: the run's own, or more where rows are longer than those of training."""
    longer = length > stages_of(config)[-1].seq_len
    model.rope_factor = max(trained, math.ceil(length / model.config.rope_trained_len)) if longer else trained
    return model.rope_factor


def ask(
    task: str, name: str, words: Words, model: Transformer, quizzes: Quizzes, corpus_hash: str, config: Config,
    lengths: Sequence[int], options: Options,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Answers to quizzes of a task in these words: rows of cells, and a summary of each length, all under `name`."""
    batch_tokens, trained = config.trainer.micro_rows * config.trainer.seq_len, model.rope_factor
    settings = {"depths": options.depths, "samples": options.samples, "corpus_hash": corpus_hash}
    for length in lengths:
        factor = _stretch(model, config, length, trained)
        documents = quizzes.documents(task, length, options.depths, options.samples, words)
        count = options.samples * (1 if task == "mqar" else options.depths)
        runtime.log.info("%s, %s tokens: asking %d documents", name, f"{length:,}", count)
        found = list(answers(model, documents, config.attention, batch_tokens))
        yield from ({"what": "cell", "task": name, **cell} for cell in cells(found, length, options.depths))
        whole = summary(found, length)
        facts = {"arm": config.arm, "settings": settings, "rope_factor": factor}
        yield {"what": "summary", "task": name, **facts, **whole}
        runtime.log.info("%s", _line(name, whole))


def real_texts(store: TokenStore, tokenizer: Tokenizer, most: int) -> Iterator[str]:
    """Of the longest held-out documents, of each `most` tokens; those that ask for facts themselves are left out."""
    chosen = longest_documents(store.lengths, most, HAYSTACK_DOCUMENTS * most)
    bounds = zip(store.offsets[chosen].tolist(), store.offsets[chosen + 1].tolist(), strict=True)
    texts = (tokenizer.decode(store.tokens[start : min(end, start + most)]) for start, end in bounds)
    return (text for text in texts if not any(asked_in(text, words) for words in WORDS.values()))


def _line(task: str, row: dict[str, Any]) -> str:
    start = f"{task}, {row['length']:,} tokens: "
    if not row["samples"]:
        return f"{start}every depth lies in a forced block or the window; nothing to count"
    recall = row["selection_recall"]
    return (
        f"{start}{row['accuracy']:.1%} right ({row['low']:.1%} to {row['high']:.1%}), loss {row['loss']:.3f}, in "
        f"{row['samples']} questions at {row['cells']} depths outside of forced blocks and window"
        + ("" if recall is None else f"; the blocks read held {recall:.1%} of the facts")
    )


def heldout_store(config: Config) -> TokenStore:
    """The held-out tokens of the run's corpus."""
    return TokenStore.open(prepare(config.data, config.model.vocab, runtime.log.info), "heldout")


def _loader(store: TokenStore, config: Config, length: int, rope_factor: float) -> Loader:
    """Rows of a length, in the order of the run's seed."""
    return Loader(store, (Stage(f"{length} tokens", 0, length, 1, {}, rope_factor),), config.data, config.seed)


def _heldout(model: Transformer, config: Config, lengths: Sequence[int], samples: int) -> Iterator[dict[str, Any]]:
    """The loss of the same documents in rows of each length."""
    store, trained, most = heldout_store(config), model.rope_factor, config.model.max_seq_len
    documents = longest_documents(store.lengths, most, samples * most)
    settings = {"samples": samples, "corpus_hash": store.hash}
    for length in lengths:
        factor = _stretch(model, config, length, trained)
        found = losses_in_rows(model, store, documents, most, length, config.trainer)
        runtime.log.info(
            "held-out loss %.4f in rows of %s tokens, %s labels of %d documents, by position %s", found["loss"],
            f"{length:,}", f"{found['labels']:,}", len(documents),
            "  ".join(f"{bucket} {loss:.3f}" for bucket, loss in found["by_position"].items()),
        )  # fmt: skip
        facts = {"arm": config.arm, "settings": settings, "length": length, "rope_factor": factor}
        yield {"what": "summary", "task": HELDOUT, **facts, **found}
    if max(lengths) > (longest := int(store.lengths[documents].max())):
        runtime.log.info(
            "no held-out document is longer than %s tokens: longer rows show no more of one", f"{longest:,}"
        )


def _blocks(
    model: Transformer, config: Config, lengths: Sequence[int], samples: int
) -> tuple[list[dict[str, Any]], TrainedBlocks]:
    """Rows of each length, and the chosen blocks of the longest. Raises DataError where nothing is chosen."""
    store, spec, trained, rows = heldout_store(config), spec_of(config.attention), model.rope_factor, []
    settings = {"samples": samples, "corpus_hash": store.hash}
    for length in sorted(lengths):
        factor = _stretch(model, config, length, trained)
        batches = _loader(store, config, length, factor).sequential(samples, 0, 1, 1)
        counts, chosen = count_blocks(model, batches, length, spec)
        if not counts.queries:
            runtime.log.info("rows of %s tokens: every query reads all blocks, nothing is chosen", f"{length:,}")
            continue
        facts = {"task": BLOCKS, "settings": settings, "length": length, "rope_factor": factor}
        whole, *heads = counts.rows()
        rows += [{"what": row["what"], "arm": config.arm, **facts, **row} for row in (whole, *heads)]
        longest = chosen
        runtime.log.info(
            "blocks, %s tokens: they hold %.1f%% of full attention (the best as many %.1f%%, random ones %.1f%%); "
            "2, 4 and 8 neighbours read %s different ones of %d each", f"{length:,}",
            100 * whole["selection_recall"], 100 * whole["best_recall"], 100 * whole["random_recall"],
            ", ".join(f"{value:.1f}" for value in whole["distinct_blocks"].values()), spec.slc_count,
        )  # fmt: skip
    if not rows:
        raise DataError(
            f"no document of the first {samples} held-out rows is longer than n l' = {spec.slc_count * spec.slc_block} "
            "tokens, after which blocks are chosen; ask for longer rows (lengths=) or for more (samples=)"
        )
    return rows, longest


def _maps(model: Transformer, config: Config, length: int, samples: int, figure: Path) -> list[dict[str, Any]]:
    """Of the longest document of the first rows."""
    store = heldout_store(config)
    factor = _stretch(model, config, length, model.rope_factor)
    rows = _loader(store, config, length, factor).sequential(samples, 0, 1, 1)
    document = max((row.tokens[span] for row in rows for span in row.document_spans()), key=len)
    found = attention_maps(model, document, spec_of(config.attention))
    kind = (
        "full attention" if "full" in config.attention.branches else "full softmax over the keys of the selected branch"
    )
    cell = cell_tokens(len(document))
    title = f"{config.name}: {kind}, a held-out document of {len(document):,} tokens, {cell} x {cell} a cell"
    plot_maps(found, title, figure)
    settings = {"length": length, "samples": samples}  # one document's figure: no other stands beside it
    facts = {"task": MAPS, "arm": config.arm, "settings": settings, "length": len(document), "cell_tokens": cell}
    return [
        {"what": "map", **facts, "rope_factor": factor, "layer": one.layer, "heads": list(one.heads)} for one in found
    ]
