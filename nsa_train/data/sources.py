"""Where documents come from: one reader per kind of source, and all documents of a corpus in a fixed order."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nsa_train.config.data_schema import DataConfig, SourceConfig
from nsa_train.data.files import Document, file_documents, input_files, record_document
from nsa_train.data.heldout import hash_of, held_out
from nsa_train.data.ledger import Ledger
from nsa_train.data.recall import Haystack, read_recall
from nsa_train.data.trees import tar_documents, tree_documents, tree_files
from nsa_train.errors import DataError

# Codec tables, the bundled pip, and the programs and grammar tools that nobody imports.
NOT_CORPUS = {"encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
TEST_FOLDERS = {"test", "tests"}
NAMED = ("hub", "recall")  # kinds whose paths are names, of data sets, which may also be folders here, or of splits


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A document that the filters let pass, of the source with the number `origin`."""

    document: Document
    origin: int
    heldout: bool  # it stands in a file of heldout_paths


def candidates(data: DataConfig, ledger: Ledger) -> Iterator[Candidate]:
    """All documents of a corpus, duplicates included: first what the sources declare as held out, then the rest.

    The same inputs give the same order. What is empty, too short or too long is counted in `ledger` and left out.
    Raises DataError for inputs that cannot be read, unless `data.on_error` says to skip them.
    """
    _check_haystacks(data)
    haystacks: dict[tuple[str, ...], Haystack] = {}
    for heldout in (True, False):
        for origin, (name, source) in enumerate(data.named_sources.items()):
            paths = source.heldout_paths if heldout else source.paths
            if heldout and not paths:
                continue
            if source.kind == "recall":
                if source.haystack not in haystacks:
                    haystacks[source.haystack] = Haystack(_training_texts(data, source.haystack))
                made = read_recall(source, paths, haystacks[source.haystack])
                documents: Iterator[Document] = (d for d in made if _passes(d, source, ledger))
            else:
                documents = _read(source, heldout, ledger)
            for document in documents:
                named = {"source": name} if data.sources else {}
                licence = document.licence or source.licence
                yield Candidate(dataclasses.replace(document, licence=licence, **named), origin, heldout)


def _read(source: SourceConfig, heldout: bool, ledger: Ledger) -> Iterator[Document]:
    """The documents in `paths` or `heldout_paths` that the filters let pass; `ledger` counts the others."""
    paths = source.heldout_paths if heldout else source.paths
    read = file_documents if heldout and source.kind == "stdlib" else READERS[source.kind]
    return (document for document in read(source, paths, ledger) if _passes(document, source, ledger))


def _check_haystacks(data: DataConfig) -> None:
    """Raises DataError where a source of recall documents does not name other sources, with all that is wrong."""
    there, wrong = [name for name, source in data.sources.items() if source.kind != "recall"], []
    for name, source in data.named_sources.items():
        if source.kind == "recall" and not source.haystack:
            wrong.append(f"{name}: kind=recall hides facts in the text of other sources; name some in its haystack")
        unknown = [other for other in source.haystack if other not in there]
        if source.kind == "recall" and unknown:
            wrong.append(
                f"{name}: haystack names {', '.join(unknown)}, but other sources are {', '.join(there) or 'none'}"
            )
    if wrong:
        raise DataError("data.sources:\n" + "\n".join(f"  {line}" for line in wrong))


def _training_texts(data: DataConfig, names: Sequence[str]) -> Iterator[str]:
    """Of the sources' documents that are not held out, nor are copies of what stands in a file of `heldout_paths`.

    Reads each source twice: by its hashes it is split.
    """

    def hashes(source: SourceConfig, heldout: bool) -> np.ndarray:
        texts = (document.text for document in _read(source, heldout, Ledger(data.on_error)))
        return np.array([hash_of(text.encode()) for text in texts], np.uint64)

    named = [source for source in data.sources.values() if source.kind != "recall" and source.heldout_paths]
    declared = np.concatenate([np.empty(0, np.uint64), *(hashes(source, heldout=True) for source in named)])
    for source in (data.sources[name] for name in names):
        mine = hashes(source, heldout=False)
        held = np.isin(mine, declared)
        if not source.heldout_paths:
            held |= held_out(mine, source.heldout_share)
        documents = _read(source, False, Ledger(data.on_error))  # counted where they are candidates
        yield from (document.text for document, away in zip(documents, held.tolist(), strict=True) if not away)


def input_stats(data: DataConfig) -> list[tuple[str, int, int]]:
    """Name, size and time of change of every input file, to notice a changed one.

    Raises DataError for a path that does not exist, or leads out of its root by a link.
    """
    found = []
    for source in data.named_sources.values():
        paths = (*source.heldout_paths, *(() if source.kind == "stdlib" else source.paths))
        if source.kind == "tree":
            files = [file for path in paths for file in tree_files(source, path)]
        else:
            if source.kind in NAMED:
                paths = tuple(path for path in paths if (Path(source.root) / path).is_dir())
            files = input_files(source.root, paths)
        for file in files:
            stat = file.stat()
            found.append((str(file.relative_to(source.root)), stat.st_size, stat.st_mtime_ns))
    return found


def _passes(document: Document, source: SourceConfig, ledger: Ledger) -> bool:
    size = len(document.text)
    if size == 0:
        ledger.leave_out("empty")
    elif size < source.min_chars:
        ledger.leave_out("too short")
    elif source.max_chars is not None and size > source.max_chars:
        ledger.leave_out("too long")
    else:
        return True
    return False


def _stdlib(source: SourceConfig, paths: Sequence[str], ledger: Ledger) -> Iterator[Document]:
    """One document per top-level module or package, and one of the language reference's topics."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names - NOT_CORPUS):
        package = root / name
        if package.is_dir():
            files = sorted(file for file in package.rglob("*.py") if not _is_test(file.relative_to(root)))
        else:
            files = [file] if (file := root / f"{name}.py").is_file() else []
        if files:
            text = "\n".join(f"# {file.relative_to(root).as_posix()}\n{file.read_text('utf-8')}" for file in files)
            yield Document(text, "stdlib", name)
    from pydoc_data.topics import topics

    yield Document("\n".join(topics[key] for key in sorted(topics)), "stdlib", "pydoc_data.topics")


def _is_test(path: Path) -> bool:
    return path.name.startswith("test_") or not TEST_FOLDERS.isdisjoint(path.parts[:-1])


def _hub(source: SourceConfig, paths: Sequence[str], ledger: Ledger) -> Iterator[Document]:
    """Records of data sets, by their names on the Hugging Face Hub or as folders under `root`, read as a stream."""
    for path in paths:
        yield from ledger.guard(_hub_records(source, path, ledger), path)


def _hub_records(source: SourceConfig, path: str, ledger: Ledger) -> Iterator[Document]:
    import datasets

    local = Path(source.root) / path
    folder = source.subset is not None and "/" in source.subset
    try:
        records: Any = datasets.load_dataset(
            str(local) if local.is_dir() else path, name=None if folder else source.subset,
            data_dir=source.subset if folder else None, split=source.hub_split, revision=source.revision,
            streaming=True,
        )  # fmt: skip
        for number, record in enumerate(itertools.islice(records, source.take)):
            place = f"{path}: record {number}"
            yield from record_document(record, source, place, Path(path).name, ledger)
    except DataError:
        raise
    except Exception as error:  # the library and what it calls raise many kinds, for a lost network too
        raise DataError(f"{path}: cannot be read as a data set ({type(error).__name__}: {error})") from error


READERS: dict[str, Callable[[SourceConfig, Sequence[str], Ledger], Iterator[Document]]] = {
    "stdlib": _stdlib,
    "files": file_documents,
    "tree": tree_documents,
    "tar": tar_documents,
    "hub": _hub,
}
