"""The command line: `nsa-train COMMAND [key=value ...]`, the same as `python -m nsa_train COMMAND`.

Heavy packages are imported inside the commands, so that --help and a wrong configuration answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable

from nsa_train import runtime
from nsa_train.errors import ConfigError, Interrupted, NsaTrainError, StorageError

EXIT_CODES = """exit codes:
  0 done    2 wrong input    17 no valid checkpoint    18 diverged    19 hung    20 storage full or unwritable
  75 interrupted, the same command goes on    1 anything else: a bug, with its traceback
torchrun turns every code into 1; runs/<name>/summary.json has the real one."""


def _train(overrides: list[str]) -> int:
    """pretrain, or go on with an interrupted run; launch it with torchrun for several processes"""
    from nsa_train.train.guards import StopSignals

    signals = StopSignals()
    signals.listen()
    config = _config(overrides)
    from nsa_train.train.loop import train

    return train(config, signals)


def _prepare(overrides: list[str]) -> int:
    """tokenise the corpus of the configuration (training does it too, when it is missing)"""
    config = _config(overrides)
    from nsa_train.data.prepare import prepare
    from nsa_train.data.store import read_manifest

    folder = prepare(config.data, config.model.vocab, lambda line: runtime.log.info("%s", line))
    facts = read_manifest(folder)
    for split in ("train", "heldout"):
        numbers = facts[split]
        shares = " / ".join(f"{share:.0%}" for share in numbers["share_in_long"].values())
        runtime.log.info(
            "%-8s %9s documents  %15s tokens, %s of them in documents of 8k / 32k / 64k or more",
            split, f"{numbers['documents']:,}", f"{numbers['tokens']:,}", shares,
        )  # fmt: skip
    runtime.log.info("unigram entropy of the held-out text: %.4f nats per token", facts["unigram_entropy"])
    runtime.log.info("hash %s\n%s", facts["hash"], folder)
    return 0


def _tokenizer(overrides: list[str]) -> int:
    """train the tokenizer of the configuration and show how it cuts the held-out text"""
    config = _config(overrides)
    from nsa_train.data.prepare import prepare
    from nsa_train.data.store import read_manifest

    folder = prepare(config.data, config.model.vocab, lambda line: runtime.log.info("%s", line))
    facts = read_manifest(folder)
    heldout = facts["heldout"]
    runtime.log.info(
        "%d pieces, %.2f bytes a token on held-out text, sha256 %s\n%s",
        facts["vocab"], heldout["bytes"] / heldout["tokens"], facts["tokenizer_sha256"], folder / facts["tokenizer"],
    )  # fmt: skip
    return 0


def _show_config(overrides: list[str]) -> int:
    """print the resolved configuration, or everything that is wrong with it"""
    from nsa_train.config.load import to_yaml

    _show([to_yaml(_config(overrides)).rstrip()])
    return 0


def _plan(words: list[str]) -> int:
    """parameters, FLOPs, speed and memory of a run before it starts: `plan [gpu=h100] [gpus=N,N] [key=value ...]`"""
    from nsa_train.plan.report import Machine, plan

    machine, overrides = Machine.parse(words)
    _show([plan(_config(overrides, on_gpu=lambda: True), machine)])
    return 0


def _doctor(overrides: list[str]) -> int:
    """versions and devices of this machine, and what will be slow or fail, one line each"""
    config = _config(overrides)
    from nsa_train.doctor import examine

    return examine(config)


def _data(words: list[str]) -> int:
    """look at the corpus of the configuration: `data inspect [step=N] [row=N] [show=TOKENS] [key=value ...]`"""
    if words[:1] != ["inspect"]:
        raise ConfigError("data: name what to do, like `nsa-train data inspect step=1 row=1`")
    from nsa_train.data.inspect import Question, inspect

    question, overrides = Question.parse(words[1:])
    _show(inspect(_config(overrides), question))
    return 0


def _bench(arguments: list[str]) -> int:
    """measure this machine: `bench attention`, `layers`, `moe`, `training`, `memory` or `data`, with --help each"""
    from nsa_train.bench import attention, data, layers, memory, moe, training

    benchmarks = {
        "attention": attention.main, "layers": layers.main, "moe": moe.main, "training": training.main,
        "memory": memory.main, "data": data.main,
    }  # fmt: skip
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"usage: nsa-train bench {{{','.join(benchmarks)}}} [options]\n\n{_bench.__doc__}")
        return 0
    if not arguments or arguments[0] not in benchmarks:
        raise NsaTrainError(f"bench: name one of {', '.join(benchmarks)}, like `nsa-train bench attention --help`")
    return benchmarks[arguments[0]](arguments[1:])


def _compare(arguments: list[str]) -> int:
    """set finished runs of several arms side by side: `compare RUN RUN ...`, with --help for its options"""
    from nsa_train.compare.command import main

    return main(arguments)


def _eval(arguments: list[str]) -> int:
    """ask a run: `eval RUN task=needle,multikey,vartrace,mqar,heldout,blocks,maps [lengths=N,N]`, docs/comparison.md"""
    from nsa_train.evaluate.command import main

    return main(arguments)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "tokenizer": _tokenizer,
    "prepare": _prepare,
    "config": _show_config,
    "plan": _plan,
    "doctor": _doctor,
    "data": _data,
    "bench": _bench,
    "compare": _compare,
    "eval": _eval,
}
OWN_OPTIONS = ("bench", "compare")  # commands that are not about one configuration and parse their own arguments


def _show(lines: Iterable[str]) -> None:
    """Print for a reader who, like `head`, may have seen enough before the end."""
    try:
        for line in lines:
            print(line, flush=True)
    except BrokenPipeError:
        sys.stdout = None


def _config(overrides: list[str], on_gpu: Callable[[], bool] = runtime.on_gpu):
    from nsa_train.config.load import load_config

    return load_config(overrides, runtime.world_size(), on_gpu)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nsa-train",
        description="Pretrain long-context language models with Native Sparse Attention.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        sub.add_argument(
            "overrides", nargs="*", metavar="key=value",
            help="group=option (attention=full) or key.path=value (trainer.steps=100); `nsa-train config` shows all",
        )  # fmt: skip
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit code. A user's mistake is one message on rank 0, without traceback."""
    words = sys.argv[1:] if arguments is None else arguments
    if words and words[0] in OWN_OPTIONS:
        command, overrides = words[0], words[1:]
    else:
        args = _parser().parse_args(words)
        command, overrides = args.command, args.overrides
    try:
        runtime.setup_console()
        return COMMANDS[command](overrides)
    except NsaTrainError as error:
        code, message = error.exit_code, str(error)
    except OSError as error:
        if error.errno not in runtime.STORAGE_ERRORS:
            raise
        code, message = StorageError.exit_code, runtime.storage_message(error)
    except KeyboardInterrupt:
        code, message = Interrupted.exit_code, "stopped; the same command starts again"
    if runtime.speaks():
        print(f"error: {message}" if code != 75 else message, file=sys.stderr)
    return code
