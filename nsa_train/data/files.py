"""Documents in files of records or text: jsonl (plain, gzip, zstd), parquet, Arrow, plain text, folders of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_train.config.data_schema import SourceConfig
from nsa_train.data.ledger import Ledger
from nsa_train.data.streams import file_chunks, lines
from nsa_train.errors import DataError

JSONL = tuple(kind + packed for kind in (".jsonl", ".ndjson") for packed in ("", ".gz", ".zst", ".xz", ".bz2"))
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"  # of the stream format
TABLE_ROWS = 256  # a row may be a whole book


@dataclass(frozen=True)
class Document:
    """One text. `source` groups documents in reports (an author, a repository, a file), `title` names this one."""

    text: str
    source: str
    title: str
    licence: str | None = None


def input_files(root: str, paths: Sequence[str]) -> list[Path]:
    """The files behind `paths`, relative to `root`: folders are searched below, hidden names are skipped, sorted.

    Raises DataError for a path that does not exist, or leads out of `root` by a link.
    """
    base, found = Path(root), []
    for path in sorted(paths):
        full = base / path
        if full.is_dir():
            inside = (file for file in full.rglob("*") if file.is_file())
            found += sorted(file for file in inside if not _hidden(file.relative_to(full)))
        elif full.is_file():
            found.append(full)
        else:
            raise DataError(f"{full}: no such file or folder; data.paths and data.heldout_paths lie under data.root")
    real = base.resolve()
    for file in found:
        if file.is_symlink() and not file.resolve().is_relative_to(real):
            raise DataError(f"{file}: links to {file.resolve()}, outside data.root={root}; set data.root above both")
    return list(dict.fromkeys(found))


def file_documents(source: SourceConfig, paths: Sequence[str], ledger: Ledger) -> Iterator[Document]:
    """Documents of all files, in the order of `input_files`."""
    for path in input_files(source.root, paths):
        name = path.relative_to(source.root).as_posix()
        kind = name.lower()
        if kind.endswith(JSONL):
            documents = _jsonl(path, name, source, ledger)
        elif kind.endswith(".parquet"):
            documents = _table(_parquet_batches(path, name, source.text_field), path, name, source, ledger)
        elif kind.endswith(".arrow"):
            documents = _table(_arrow_batches(path, name, source.text_field), path, name, source, ledger)
        else:
            documents = _plain(path, name)
        yield from ledger.guard(documents, name)


def record_document(
    record: dict[str, Any], source: SourceConfig, place: str, group: str, ledger: Ledger
) -> Iterator[Document]:
    """The record's document, or nothing where its text is null or its language another."""
    for field in (source.text_field, *([source.language_field] if source.languages else [])):
        if field not in record:
            ledger.refuse(_no_field(place, field, record))
            return
    text = record[source.text_field]
    if source.languages and record[source.language_field] not in source.languages:
        ledger.leave_out("language")
    elif text is not None and not isinstance(text, str):
        ledger.refuse(f"{place}: field {source.text_field!r} is a {type(text).__name__}, not text")
    else:
        licence = record.get("licence") or record.get("license")
        document = Document(
            text or "",
            str(record.get("source") or group),
            str(record.get("title") or place),
            licence if isinstance(licence, str) else None,
        )
        words = {"text": document.text, "source": document.source, "title": document.title, "licence": document.licence}
        if problems := [problem for field, word in words.items() if (problem := _surrogate(word or "", field))]:
            ledger.refuse(f"{place}: {problems[0]}")
        else:
            yield document


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _plain(path: Path, name: str) -> Iterator[Document]:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not UTF-8 (byte {error.start} of the file)") from error
    yield Document(text, path.stem, name)


def _jsonl(path: Path, name: str, source: SourceConfig, ledger: Ledger) -> Iterator[Document]:
    group = path.name.split(".")[0]
    for number, line in enumerate(lines(file_chunks(path, name)), start=1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            ledger.refuse(f"{place}: not UTF-8 (byte {error.start} of the line)", error)
        except (ValueError, RecursionError) as error:
            ledger.refuse(f"{place}: not JSON ({error})", error)
        else:
            if isinstance(record, dict):
                yield from record_document(record, source, place, group, ledger)
            else:
                kind = type(record).__name__
                ledger.refuse(f"{place}: a JSON {kind}, not a record with a field {source.text_field!r}")


def _table(batches: Iterable[Any], path: Path, name: str, source: SourceConfig, ledger: Ledger) -> Iterator[Document]:
    """Documents of the rows of Arrow record batches."""
    import pyarrow

    wanted = {source.text_field, source.language_field, "source", "title", "licence", "license"}
    row = 0
    try:
        for batch in batches:
            columns = [column for column in batch.schema.names if column in wanted]
            if twice := [column for column in columns if columns.count(column) > 1]:
                raise DataError(f"{name}: {len(twice)} columns are called {twice[0]!r}; rename all but one")
            for start in range(0, batch.num_rows, TABLE_ROWS):
                for record in batch.select(columns).slice(start, TABLE_ROWS).to_pylist():
                    row += 1
                    yield from record_document(record, source, f"{name}: row {row}", path.stem, ledger)
    except pyarrow.ArrowException as error:
        raise DataError(f"{name}: not {path.suffix[1:]}, or damaged ({error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 behind row {row} ({error.reason})") from error


def _parquet_batches(path: Path, name: str, text_field: str) -> Iterator[Any]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        _need_column(name, text_field, file.schema_arrow.names)
        yield from file.iter_batches(batch_size=TABLE_ROWS)


def _arrow_batches(path: Path, name: str, text_field: str) -> Iterator[Any]:
    """Record batches of an Arrow file in either of its two formats; `datasets` writes the stream format."""
    from pyarrow import ipc, memory_map

    with memory_map(str(path)) as file:
        if file.read(6) == b"ARROW1":
            reader = ipc.open_file(file)
            _need_column(name, text_field, reader.schema.names)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            file.seek(file.size() - len(ARROW_END) if file.size() > len(ARROW_END) else 0)
            cut = file.read() != ARROW_END
            file.seek(0)
            stream = ipc.open_stream(file)
            _need_column(name, text_field, stream.schema.names)
            yield from stream
            if cut:
                raise DataError(f"{name}: ends without an Arrow stream's end mark; copy the file again")


def _need_column(name: str, text_field: str, columns: Sequence[str]) -> None:
    if text_field not in columns:
        raise DataError(_no_field(name, text_field, columns))


def _no_field(place: str, field: str, fields: Iterable[str]) -> str:
    found = ", ".join(sorted(fields)) or "an empty record"
    return f"{place}: no field {field!r}, only {found}; set data.text_field or data.language_field"


def _surrogate(word: str, field: str) -> str | None:
    """JSON may spell half of a surrogate pair, which no UTF-8 has."""
    try:
        word.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"not UTF-8 (character {error.start} of the {field} is half a surrogate pair)"
    return None
