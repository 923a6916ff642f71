"""Documents in the user's own files: jsonl (plain or zstd), parquet, plain text, and folders of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa_train.errors import DataError

CHUNK_BYTES = 1 << 20
PARQUET_ROWS = 256  # a row may be a whole book
ZSTD_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` writes; the library's own limit is smaller


@dataclass(frozen=True)
class Document:
    """One text. `source` groups documents in reports (an author, a repository, a file), `title` names this one."""

    text: str
    source: str
    title: str


def input_files(root: str, paths: Sequence[str]) -> list[Path]:
    """The files behind `paths`, relative to `root`: folders are searched below, hidden names are skipped, sorted.

    Raises DataError for a path that does not exist.
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
    return list(dict.fromkeys(found))


def file_documents(root: str, paths: Sequence[str], text_field: str) -> Iterator[Document]:
    """Documents of all files, in the order of `input_files`. Empty ones are skipped.

    Raises DataError with the file, and the line or row, for what cannot be read.
    """
    for path in input_files(root, paths):
        name = path.relative_to(root).as_posix()
        try:
            if name.endswith((".jsonl", ".jsonl.zst")):
                yield from _jsonl(path, name, text_field)
            elif name.endswith(".parquet"):
                yield from _parquet(path, name, text_field)
            else:
                yield from _plain(path, name)
        except OSError as error:
            raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _plain(path: Path, name: str) -> Iterator[Document]:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: not UTF-8 (byte {error.start} of the file)") from error
    if text:
        yield Document(text, path.stem, name)


def _jsonl(path: Path, name: str, text_field: str) -> Iterator[Document]:
    for number, line in enumerate(_lines(path, name), start=1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: not UTF-8 (byte {error.start} of the line)") from error
        except ValueError as error:
            raise DataError(f"{place}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise DataError(f"{place}: a JSON {type(record).__name__}, not a record with a field {text_field!r}")
        yield from _document(record, text_field, place, path.name.split(".")[0])


def _lines(path: Path, name: str) -> Iterator[bytes]:
    rest = b""
    for chunk in _zstd_chunks(path, name) if path.suffix == ".zst" else _chunks(path):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _zstd_chunks(path: Path, name: str) -> Iterator[bytes]:
    """Decompressed content, frame after frame. The library's own reader takes a cut file for a complete one."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    frame = decompressor.decompressobj()
    try:
        for chunk in _chunks(path):
            while chunk:
                if frame.eof:
                    frame = decompressor.decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as error:
        raise DataError(f"{name}: not zstd, or damaged ({error})") from error
    if not frame.eof:
        raise DataError(f"{name}: ends inside a zstd frame; copy the file again")


def _parquet(path: Path, name: str, text_field: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise DataError(_no_field(name, text_field, columns))
            wanted = [key for key in (text_field, "source", "title") if key in columns]
            row = 0
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=wanted):
                for record in batch.to_pylist():
                    row += 1
                    yield from _document(record, text_field, f"{name}: row {row}", path.stem)
    except pyarrow.ArrowException as error:
        raise DataError(f"{name}: not parquet, or damaged ({error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 behind row {row} ({error.reason})") from error


def _document(record: dict[str, Any], text_field: str, place: str, source: str) -> Iterator[Document]:
    """The record's document, or nothing where its text is null or empty."""
    if text_field not in record:
        raise DataError(_no_field(place, text_field, record))
    text = record[text_field]
    if text is None or text == "":
        return
    if not isinstance(text, str):
        raise DataError(f"{place}: field {text_field!r} is a {type(text).__name__}, not text")
    try:
        text.encode("utf-8")  # JSON may spell half of a surrogate pair
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: not UTF-8 (character {error.start} of the text is half a surrogate pair)") from error
    yield Document(text, str(record.get("source") or source), str(record.get("title") or place))


def _no_field(place: str, text_field: str, fields: Any) -> str:
    return (
        f"{place}: no field {text_field!r}, only {', '.join(sorted(fields)) or 'an empty record'}; set data.text_field"
    )
