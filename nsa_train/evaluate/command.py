"""`nsa-train eval RUN task=needle`: a finished run's export under test, into <run>/eval/<task>.json and .png."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nsa_train import runtime
from nsa_train.bench import results
from nsa_train.config.schema import Config
from nsa_train.data.loader import Loader
from nsa_train.data.prepare import prepare
from nsa_train.data.stages import Stage, stages_of
from nsa_train.data.store import TokenStore
from nsa_train.data.tokenizer import MODEL_FILE, Tokenizer
from nsa_train.errors import ConfigError, RunFolderError
from nsa_train.evaluate.grid import answers, cells, plot_grid, summary
from nsa_train.evaluate.questions import KINDS, make_documents
from nsa_train.model.transformer import Transformer
from nsa_train.parallel.engine import start_processes, stop_processes
from nsa_train.train.evaluate import evaluate
from nsa_train.train.folder import read_config

HELDOUT = "heldout"
TASKS = (*KINDS, HELDOUT)


@dataclass(frozen=True)
class Options:
    """task; lengths in tokens (default: a quarter, a half and the whole of the run's rows); depths; samples of each."""

    task: str = ""
    lengths: tuple[int, ...] = ()
    depths: int = 21
    samples: int = 20

    @staticmethod
    def parse(words: Sequence[str]) -> Options:
        known, found = [field.name for field in fields(Options)], {}
        for word in words:
            key, _, value = word.partition("=")
            if key not in known:
                raise ConfigError(f"eval: {word!r} is none of {', '.join(f'{name}=' for name in known)}")
            numbers = value.strip("[]").split(",")
            if key != "task" and not all(number.isdecimal() and int(number) > 0 for number in numbers):
                raise ConfigError(f"eval: {word} must be {'numbers' if key == 'lengths' else 'a number'} from 1 on")
            found[key] = value if key == "task" else tuple(map(int, numbers)) if key == "lengths" else int(value)
        options = Options(**found)  # type: ignore[arg-type]
        if options.task not in TASKS:
            raise ConfigError(f"eval: task={options.task} is no task; say task= one of {', '.join(TASKS)}")
        return options


def main(arguments: list[str]) -> int:
    """Evaluate and write the findings; the exit code."""
    if not arguments or "=" in arguments[0]:
        raise ConfigError("eval: name the folder of a run first, like `nsa-train eval runs/tiny-nsa task=needle`")
    folder, options = Path(arguments[0]), Options.parse(arguments[1:])
    config = read_config(folder)
    last = stages_of(config)[-1].seq_len
    lengths = options.lengths or (last // 4, last // 2, last)
    if max(lengths) > config.model.max_seq_len:
        raise ConfigError(f"eval: lengths={max(lengths)} is beyond the model's max_seq_len={config.model.max_seq_len}")
    model, tokenizer = _opened(folder)
    if options.task == HELDOUT:
        rows = list(_heldout(model, config, lengths, folder))
    else:
        rows = list(_grid(model, tokenizer, config, lengths, options))
    target = folder / "eval"
    path = results.write_result(options.task, "eval", rows, folder=target)
    if options.task != HELDOUT:
        plot_grid(
            [row for row in rows if row["what"] == "cell"], f"{config.name}: {options.task}", path.with_suffix(".png")
        )
    runtime.log.info("%s", path)
    return 0


def _opened(folder: Path) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of the run's export, on this machine's device."""
    export = folder / "export"
    if not (export / "config.json").is_file():
        raise RunFolderError(f"{export}: no export of a finished run; train with trainer.export=true")
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    import nsa_train.model.pretrained  # noqa: F401

    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(export).transformer.to(runtime.device()).eval()
    return model, Tokenizer.load(export / MODEL_FILE if (export / MODEL_FILE).is_file() else export)


def _stretch(model: Transformer, length: int, trained: float) -> float:
    """Set and give YaRN's factor for a length: the run's own, or more where rows are longer than those it served."""
    model.rope_factor = max(trained, math.ceil(length / model.config.rope_trained_len))
    return model.rope_factor


def _grid(
    model: Transformer, tokenizer: Tokenizer, config: Config, lengths: Sequence[int], options: Options
) -> Iterator[dict[str, Any]]:
    """Rows of cells, and a summary of each length."""
    batch_tokens, trained = config.trainer.micro_rows * config.trainer.seq_len, model.rope_factor
    for length in lengths:
        factor = _stretch(model, length, trained)
        documents = make_documents(options.task, tokenizer, length, options.depths, options.samples)
        found = list(answers(model, documents, config.attention, batch_tokens))
        yield from ({"what": "cell", "task": options.task, **cell} for cell in cells(found, length, options.depths))
        whole = summary(found, length, options.depths)
        yield {"what": "summary", "task": options.task, "arm": config.arm, "rope_factor": factor, **whole}
        runtime.log.info("%s", _line(options.task, whole))


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


def _heldout(model: Transformer, config: Config, lengths: Sequence[int], folder: Path) -> Iterator[dict[str, Any]]:
    """Held-out loss in rows of each length, as many tokens as the run's own validation."""
    corpus = prepare(config.data, config.model.vocab, runtime.log.info)
    store = TokenStore.open(corpus, "heldout")
    trained, device = model.rope_factor, runtime.device()
    runtime.launch_alone()
    start_processes(device, config.parallel.timeout_s)
    try:
        for length in lengths:
            factor = _stretch(model, length, trained)
            stage = Stage(f"{length} tokens", 0, length, 1, {}, factor)
            loader = Loader(store, (stage,), config.data, config.seed)
            found = evaluate(model, loader, config.trainer, store.manifest["sources"], device)
            runtime.log.info(
                "held-out loss %.4f in rows of %s tokens, by position %s", found["loss"], f"{length:,}",
                "  ".join(f"{bucket} {loss:.3f}" for bucket, loss in found["by_position"].items()),
            )  # fmt: skip
            facts = {"arm": config.arm, "length": length, "rope_factor": factor, "corpus_hash": store.hash}
            yield {"what": "summary", "task": HELDOUT, **facts, **found}
    finally:
        stop_processes()
