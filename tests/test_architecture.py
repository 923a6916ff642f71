"""The layers of the house: an import goes down, never sideways. Changing the picture is a visible decision."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nsa_train"
LONGEST_FILE = 500

GROUND = {"errors", "runtime", "packing", "config"}
# part -> parts it may import. A part is a folder or a file of the package.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "packing": set(),
    "runtime": {"errors"},
    "config": {"errors"},
    "ops": set(),
    "model": GROUND | {"ops"},
    "data": GROUND,
    "parallel": GROUND | {"ops"},
    "plan": GROUND | {"ops", "model", "data", "parallel"},
    "train": GROUND | {"ops", "model", "data", "parallel", "plan"},
    "doctor": GROUND | {"ops", "model", "data", "parallel", "train"},
    "bench": GROUND | {"ops", "model", "data", "parallel", "train", "plan"},
    "compare": GROUND | {"ops", "model", "data", "parallel", "train", "plan", "bench"},
    "evaluate": GROUND | {"ops", "model", "data", "parallel", "train", "bench"},
    "cli": GROUND | {"model", "data", "parallel", "train", "plan", "doctor", "bench", "compare", "evaluate"},
    "__main__": {"cli"},
}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """Parts of the package that a file imports anywhere in it, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("nsa_train.")}


def test_every_import_goes_down():
    breaches = [
        f"{path.relative_to(ROOT)} imports nsa_train.{part}"
        for path in FILES
        for part in imported_parts(path)
        if part != part_of(path) and part not in MAY_IMPORT[part_of(path)]
    ]
    assert breaches == []


def test_the_picture_names_every_part_and_no_other():
    assert {part_of(path) for path in FILES} == set(MAY_IMPORT)


def test_the_picture_has_no_circle():
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        free = [part for part, below in MAY_IMPORT.items() if part not in order and below <= set(order)]
        assert free, f"circle among {set(MAY_IMPORT) - set(order)}"
        order += free


@pytest.mark.parametrize("folder", ["nsa_train", "tests", "scripts"])
def test_no_file_is_too_long(folder):
    long = {str(p): n for p in (ROOT / folder).rglob("*.py") if (n := len(p.read_text().splitlines())) > LONGEST_FILE}
    assert long == {}


def test_every_module_says_what_it_is_for():
    silent = [str(p) for p in FILES if p.name != "__init__.py" and not ast.get_docstring(ast.parse(p.read_text()))]
    assert silent == []


def test_only_runtime_reads_the_environment():
    readers = {p.name for p in FILES if "os.environ" in p.read_text() or "getenv" in p.read_text()}
    assert readers == {"runtime.py"}


def test_ops_run_without_the_rest_of_the_project():
    foreign = {f"{p.name}: {part}" for p in (PACKAGE / "ops").glob("*.py") for part in imported_parts(p) - {"ops"}}
    assert foreign == set()
