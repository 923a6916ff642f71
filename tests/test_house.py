"""Promises of the files around the package: README's commands exist, pins fit their ranges, the image is not root."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from nsa_train.cli import COMMANDS
from nsa_train.config.load import load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line[:60] and line[0] != "#"
)


def readme_commands() -> list[str]:
    """Lines of README's shell blocks, without comments and continuations."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def test_readme_names_the_two_commands_on_its_first_screen():
    first = "\n".join(README.splitlines()[:40])
    assert "make train" in first
    assert "make test" in first


def test_every_make_target_in_readme_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {line.split()[1] for line in readme_commands() if line.startswith("make ")}
    assert used
    assert used <= targets


def test_every_training_command_in_readme_composes():
    composed = 0
    for line in readme_commands():
        words = [word for part in shlex.split(line) for word in part.removeprefix("ARGS=").split()]
        if "nsa_train" in words:
            command = words[words.index("nsa_train") + 1]
            assert command in COMMANDS, line
        elif not line.startswith("make train"):
            continue
        load_config([word for word in words if re.fullmatch(r"[a-z_.0-9]+=\S+", word)])
        composed += 1
    assert composed >= 5


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
