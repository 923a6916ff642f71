"""Promises of the files around the package: README's commands run, pins fit their ranges, the image is not root."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from helpers import load_script
from packaging.requirements import Requirement

from nsa_train.cli import EXIT_CODES, main
from nsa_train.config import load
from nsa_train.config.load import load_config
from nsa_train.plan.report import plan

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PINS = dict(
    line.lower().split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line[:60] and line[0] != "#"
)


def commands_in(page: str) -> list[list[str]]:
    """Words of every command on a page: lines of its shell blocks, and what stands in backticks and can be run."""
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", page, re.DOTALL)).replace("\\\n", " ").splitlines()
    inline = re.findall(
        r"`((?:make|nsa-train|python|torchrun) [^`]+)`", re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    )
    lines = [line.partition(" #")[0].strip() for line in blocks if line.strip() and not line.startswith("#")]
    return [shlex.split(line) for line in [*lines, *inline] if "..." not in line]


def own_command(words: list[str]) -> list[str]:
    """What follows `nsa-train` or `-m nsa_train`; nothing for a foreign command."""
    return next((words[i + 1 :] for i, word in enumerate(words) if word in ("nsa-train", "nsa_train")), [])


def test_readme_names_the_two_commands_on_its_first_screen():
    first = "\n".join(README.splitlines()[:40])
    assert "make train" in first
    assert "make test" in first


def test_readme_lists_the_exit_codes_that_help_lists():
    listed = re.search(r"\*\*Exit codes\*\* of `python -m nsa_train`: ([^.]*)\.", README)[1]
    codes = {int(code) for code in re.findall(r"(?:^|\s)(\d+) ", EXIT_CODES.rpartition("torchrun")[0])}
    assert {int(code) for code in re.findall(r"\d+", listed)} == codes >= {0, 1, 19, 75}


COMMANDS_OF_README = [words for words in commands_in(README) if own_command(words)]


def test_every_make_command_in_readme_has_a_target_and_composes():
    used = [words for words in commands_in(README) if words[0] == "make"]
    assert {words[1] for words in used} >= {"train", "test"}
    for words in used:
        subprocess.run([*words, "--dry-run"], cwd=ROOT, check=True, capture_output=True)
        load_config([word for part in words[2:] for word in part.removeprefix("ARGS=").split()])


@pytest.mark.parametrize("words", COMMANDS_OF_README, ids=" ".join)
def test_every_own_command_in_readme_runs_or_composes_and_plans(words, capsys):
    command, *overrides = own_command(words)
    if command == "bench":
        with pytest.raises(SystemExit, match="0"):
            main([command, *overrides, "--help"])
    elif command in ("train", "prepare"):  # they run in tests/train and .ci/run; here with README's own values
        assert "all" in plan(load_config(overrides))
    else:
        assert main([command, *overrides]) == 0


def test_the_recipe_in_readme_composes(tmp_path, monkeypatch):
    shutil.copytree(load.CONFIG_DIR, tmp_path / "configs")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "configs" / "experiment" / "mine.yaml").write_text(recipe)
    monkeypatch.setattr(load, "CONFIG_DIR", tmp_path / "configs")
    config = load_config(["experiment=mine"])
    assert (config.attention.slc_count, config.data.name, config.trainer.steps) == (24, "mine", 2000)


def test_readme_shows_every_kind_of_command_that_it_should():
    assert len(COMMANDS_OF_README) >= 9
    assert {own_command(words)[0] for words in COMMANDS_OF_README} >= {"train", "prepare", "config", "plan", "doctor"}


@pytest.mark.parametrize(
    "words", [words for words in commands_in(README) if words[0] == "python" and "-m" not in words]
)
def test_every_script_in_readme_can_be_asked_for_help(words):
    subprocess.run([sys.executable, words[1], "--help"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    "words", [w for w in commands_in((ROOT / "docs" / "comparison.md").read_text()) if "--set" in w], ids=" ".join
)
def test_what_the_comparison_sets_composes_with_its_arms(words):
    arms = words[words.index("--arms") + 1 :]
    for arm in arms[: next(i for i, word in enumerate(arms) if word.startswith("--"))]:
        load_config([f"attention={arm}", *words[words.index("--set") + 1 :]])


def test_ci_runs_the_two_commands_of_the_first_screen():
    parts = [line.split()[1:] for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("part ")]
    assert [part[1] for part in parts if part[0] == "make"] == ["install", "check", "test", "train"]


def test_reliability_names_tests_that_exist():
    table = [line for line in (ROOT / "docs" / "reliability.md").read_text().splitlines() if line.startswith("| ")][1:]
    for line in table:
        named = re.findall(r"`(tests/[^`]+)`", line.split("|")[3])
        assert named, f"no test: {line}"
        assert [path for path in named if not (ROOT / path).is_file()] == []


def test_pins_lie_in_the_ranges_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    outside = [r for r in map(Requirement, wanted) if not r.specifier.contains(PINS[r.name.lower().replace("_", "-")])]
    assert outside == []


def test_the_image_runs_as_a_plain_user_on_a_pinned_base():
    lines = (ROOT / "docker" / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    bases = [line.split()[1] for line in lines if line.startswith("FROM ")]
    assert users
    assert users[-1] not in ("root", "0")
    assert all(re.search(r":\d+\.\d+", base) for base in bases)


def test_the_tables_of_readme_are_made_from_the_results():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "readme_tables.py", "--check"], check=False)
    assert done.returncode == 0


def test_the_table_of_corpora_is_made_from_the_results():
    done = subprocess.run([sys.executable, ROOT / "scripts" / "corpora.py", "--check"], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("readme_tables", ["--chek"], "unrecognized arguments: --chek"),
        ("planted_faults", ["nosuchfault"], "'nosuchfault' in its name; there are combine, compress, "),
        ("corpora", ["--chek"], "unrecognized arguments: --chek"),
        ("corpora", ["/nope"], "/nope/manifest.json: no manifest of a prepared corpus"),
        ("corpora", ["--check", "prepared"], "not allowed with argument"),
        ("fit_speed", ["docs/results/gates_r1.json"], "its name must begin with training_ or attention_"),
        ("fit_speed", ["/training_nope.json"], "/training_nope.json: cannot be read"),
        ("first_run", ["a/b"], "machine 'a/b' may hold letters"),
        ("first_run", ["cpu", "--processes", "0"], "--processes 0 must be 1 or more"),
        ("first_run", ["cpu", "trainer.step=1"], "trainer.step"),
        ("loss_parity", ["--at-once", "0"], "--at-once 0 must be 1 or more"),
        ("loss_parity", ["--steps", "1"], "--steps 1 must be 20 or more"),
        ("loss_parity", ["r9"], "there is no preset 'r9' here; there are r1, tiny"),
        pytest.param(
            "loss_parity", ["tiny"], "no CUDA device here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)  # fmt: skip
def test_a_script_refuses_bad_input_before_it_does_anything(script, words, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [f"scripts/{script}.py", *words])
    with pytest.raises(SystemExit, match="2"):
        load_script(script, monkeypatch).main()
    assert said in capsys.readouterr().err
