"""From command-line overrides to a checked `Config`: `load_config(["experiment=tiny", "attention=full"])`.

Hydra composes the YAML, the dataclasses of `schema` say what is legal. Every unknown, missing and ill-typed key and
every broken rule is reported at once. Recipes are data: no `_target_`, no resolver such as an environment look-up.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from nsa_train.config import schema
from nsa_train.errors import ConfigError

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
FILLED_BY_LOADER = ("experiment", "arm")
GROUPS = (
    "model", "attention", "moe", "data", "optim", "schedule", "parallel", "trainer", "stages", "logging", "profile",
    "experiment",
)  # fmt: skip


def load_config(
    overrides: Sequence[str] = (), processes: int = 1, on_gpu: Callable[[], bool] | None = None
) -> schema.Config:
    """Compose `configs/` with Hydra overrides (`group=option`, `key.path=value`) into a Config for so many processes.

    on_gpu: whether they have GPUs, asked only where a rule depends on it; None: nobody knows yet.
    Raises ConfigError with one line per problem.
    """
    tree, choices = _compose(list(overrides))
    experiment, arm = choices["experiment"], choices["attention"]
    written = {path.stem for path in (CONFIG_DIR / "arms").glob(f"*_{arm}.yaml")}
    if written and f"{experiment}_{arm}" not in written:
        raise ConfigError(
            f"attention={arm} sets more than attention, for each experiment by itself: write configs/arms/{experiment}_"
            f"{arm}.yaml, like {min(written)}.yaml there"
        )
    tree["experiment"], tree["arm"] = experiment, arm
    if tree.get("name") is None:
        tree["name"] = f"{experiment}-{arm}"
    return config_from_tree(tree, processes, on_gpu)


def config_from_tree(
    tree: dict[str, Any], processes: int = 1, on_gpu: Callable[[], bool] | None = None
) -> schema.Config:
    """A checked Config from plain data, such as a run folder's config.yaml."""
    problems: list[str] = []
    config = _build(schema.Config, tree, "", problems)
    if config:
        problems += config.sharing_problems(processes)
        if on_gpu and (found := config.gpu_problems()) and on_gpu():
            problems += found
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{count} in the configuration:\n" + "\n".join(f"  {line}" for line in problems))
    return config


def to_tree(config: object) -> dict[str, Any]:
    """Plain data (dicts, lists, numbers, strings) of a config dataclass."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))  # type: ignore[call-overload]


def to_yaml(config: schema.Config) -> str:
    return yaml.safe_dump(to_tree(config), sort_keys=False)


def options(group: str) -> list[str]:
    """Names of the YAML files of a group."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def _compose(overrides: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    from hydra import compose, initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not CONFIG_DIR.is_dir():
        raise ConfigError(f"{CONFIG_DIR} is missing; install from a checkout with `pip install -e .`")
    problems = [line for text in overrides if (line := _bad_override(text))]
    if problems:
        raise ConfigError("wrong command-line override:\n" + "\n".join(f"  {line}" for line in problems))
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            cfg = compose("config", [text for text in overrides if _is_choice(text)], return_hydra_config=True)
        choices = dict(cfg.hydra.runtime.choices)
        OmegaConf.set_struct(cfg, False)  # a misspelt key is to reach our own check
        values = OverridesParser.create().parse_overrides([text for text in overrides if not _is_choice(text)])
        if several := [override.input_line for override in values if override.is_sweep_override()]:
            raise ConfigError(f"{', '.join(several)}: a key has one value; write a list as [a,b]")
        for override in values:  # compose would merge a table into the one there
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=False)
        cfg.pop("hydra")
        tree = typing.cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=False))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:  # the last: 5,000 digits
        reason = " ".join(str(error.__cause__ or error).strip().splitlines()[:1])
        raise ConfigError(
            f"the configuration does not compose: {reason}\nput values with other signs than letters, digits and /_.-: "
            "into quotes of their own, like \"data.root='/my texts/ä'\""
        ) from error
    if found := re.search(r"\$\{[^'\"]*", str(tree)):
        raise ConfigError(f"{found[0]} is not allowed: recipes are data; write the value itself")
    return tree, choices


def _bad_override(text: str) -> str | None:
    key, equals, value = text.partition("=")
    if not equals:
        return f"{text!r} is no key=value; see `nsa-train config` for all keys"
    if key.partition(".")[0] in FILLED_BY_LOADER and key not in GROUPS:
        return f"{text!r}: {key} follows from the groups; set attention= or experiment="
    if text[0] in "+~-" or key.startswith("hydra") or "@" in key:
        return f"{text!r}: only plain key=value is accepted"
    if key in GROUPS and value not in options(key):
        return f"{text}: no such option{_did_you_mean(value, options(key))}; there are {', '.join(options(key))}"
    return None


def _is_choice(text: str) -> bool:
    """Of an option of a group, not of a value."""
    return text.partition("=")[0] in GROUPS


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _build(cls: type, tree: Any, place: str, problems: list[str]) -> Any:
    """An instance of the dataclass `cls`; what does not fit is appended to `problems`."""
    if not isinstance(tree, dict):
        problems.append(f"{place.rstrip('.') or 'the configuration'}={tree!r} must be a group of keys")
        return None
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            known = [k for k in hints if k not in FILLED_BY_LOADER]
            problems.append(f"{place}{key}: no such key{_did_you_mean(str(key), known) or '; see `nsa-train config`'}")
    values: dict[str, Any] = {}
    for key, kind in hints.items():
        if key not in tree:
            problems.append(f"{place}{key}: missing")
        elif dataclasses.is_dataclass(kind):
            values[key] = _build(kind, tree[key], f"{place}{key}.", problems)  # type: ignore[arg-type]
        elif typing.get_origin(kind) is dict and dataclasses.is_dataclass(typing.get_args(kind)[1]):
            values[key] = _build_entries(typing.get_args(kind)[1], key, tree, place, problems)
        else:
            try:
                values[key] = _convert(kind, tree[key])
            except TypeError as error:
                problems.append(f"{place}{key}={tree[key]!r} must be {error}")
    unbuilt = [
        key
        for key, value in values.items()
        if (value is None and dataclasses.is_dataclass(hints[key]))
        or (isinstance(value, dict) and None in value.values())
    ]
    if len(values) < len(hints) or unbuilt:
        return None
    section = cls(**values)
    problems += [f"{place}{line}" for line in section.problems()]
    return section


def _build_entries(cls: type, key: str, tree: dict[str, Any], place: str, problems: list[str]) -> dict[str, Any]:
    """A table of named sections. Each takes from its neighbours, the keys beside the table, what it does not say."""
    table = tree[key]
    if not isinstance(table, dict):
        problems.append(f"{place}{key}={table!r} must be a table of names")
        return {"": None}
    known, entries = typing.get_type_hints(cls), {}
    common = {name: tree[name] for name in known if name in tree}
    for name, entry in table.items():
        inside = f"{place}{key}.{name}."
        if isinstance(entry, dict):
            shared = [word for word in entry if word in tree and word not in known]
            problems += [f"{inside}{word}: all of {place}{key} share one; set {place}{word}" for word in shared]
            entry = common | {word: value for word, value in entry.items() if word not in shared}
        entries[name] = _build(cls, entry, inside, problems)
    return entries


def _convert(kind: Any, value: Any) -> Any:
    """`value` as `kind`, or TypeError saying what was wanted."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        wanted = []
        for one in (a for a in args if a is not type(None)):
            try:
                return _convert(one, value)
            except TypeError as error:
                wanted.append(str(error))
        raise TypeError(", or ".join(wanted))
    if origin is Literal:
        if value not in args or isinstance(value, bool):
            raise TypeError("one of " + ", ".join(map(str, args)) + _did_you_mean(str(value), args))
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError("a list")
        return tuple(_convert(args[0], item) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise TypeError("a table of names and values")
        return {str(name): _convert(args[1], item) for name, item in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < sys.float_info.max else math.inf
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError({int: "an integer", float: "a number", bool: "true or false", str: "text"}[kind])
    if kind is float and not math.isfinite(value):
        raise TypeError("a finite number")
    return value
