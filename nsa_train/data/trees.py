"""Long documents out of source trees and tar archives: the files of a folder, each behind a line with its path.

Archives are read as streams and never unpacked: a member's name is only a title.
"""

from __future__ import annotations

import fnmatch
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import IO, Self

from nsa_train.config.data_schema import SourceConfig
from nsa_train.data.files import Document
from nsa_train.data.ledger import Ledger
from nsa_train.data.streams import DECOMPRESSORS, Stream, deb_payload, decompressed, file_chunks
from nsa_train.errors import DataError

TAR_SUFFIXES = (".tar", ".tgz", *(f".tar{suffix}" for suffix in DECOMPRESSORS))
LARGEST_FILE_BYTES = 1 << 30
READ_BYTES = 1 << 20


def tree_documents(source: SourceConfig, paths: Sequence[str], ledger: Ledger) -> Iterator[Document]:
    """Documents of folders under `root`; files in the order of their paths, links and hidden names left out.

    Raises DataError for a path that is no folder.
    """
    for path in sorted(paths):
        top = Path(source.root) / path
        if not top.is_dir():
            raise DataError(f"{top}: no such folder; data.paths of a tree are folders under data.root")
        yield from _grouped(ledger.guard(_tree_files(top, source, ledger), path), source, Path(path).name)


def tar_documents(source: SourceConfig, paths: Sequence[str], ledger: Ledger) -> Iterator[Document]:
    """Documents of archives under `root`; files in the archive's order.

    Raises DataError for a path that is no file, and through `ledger` for cut, damaged and hostile archives.
    """
    for path in sorted(paths):
        file = Path(source.root) / path
        if not file.is_file():
            raise DataError(f"{file}: no such file; data.paths of kind tar are archives under data.root")
        chunks = (deb_payload if file.suffix == ".deb" else file_chunks)(file, path)
        yield from _grouped(ledger.guard(_tar_files(chunks, path, source, ledger), path), source, file.name)


def tree_files(source: SourceConfig, path: str) -> list[Path]:
    """The files that decide the documents of the folder `path`, in their order."""
    wanted, top = _wanted(source), Path(source.root) / path
    found = [file for file in top.rglob("*") if file.is_file() and not file.is_symlink()]
    return sorted(file for file in found if wanted(file.relative_to(top).as_posix()))


def _tree_files(top: Path, source: SourceConfig, ledger: Ledger) -> Iterator[tuple[str, str]]:
    for file in tree_files(source, str(top.relative_to(source.root))):
        name = file.relative_to(top).as_posix()
        if (text := _text(file.read_bytes(), name, ledger)) is not None:
            yield name, text


def _tar_files(
    chunks: Iterator[bytes], name: str, source: SourceConfig, ledger: Ledger, nested: bool = False
) -> Iterator[tuple[str, str]]:
    """(path, text) of the members that count. An archive among them is read too, one level deep."""
    wanted, stream = _wanted(source), Stream(chunks)
    try:
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Member) as tar:  # type: ignore[call-overload]
            while (member := tar.next()) is not None:
                tar.members.clear()  # the library would keep them all
                path = member.name.removeprefix("./")
                if member.isdir():
                    continue
                if member.issym() or member.islnk():
                    ledger.leave_out("link")  # never followed
                elif problem := _hostile(member, path):
                    ledger.refuse(f"{name}: member {member.name!r} {problem}; do not trust this archive")
                elif wanted(path):
                    content = tar.extractfile(member)
                    assert content is not None  # a plain file
                    if path.endswith(TAR_SUFFIXES) and not nested:
                        inner = decompressed(_reads(content), Path(path).suffix, path)
                        yield from _tar_files(inner, f"{name}: {path}", source, ledger, nested=True)
                    elif (text := _text(content.read(), path, ledger)) is not None:
                        yield path, text
    except tarfile.TarError as error:
        raise DataError(f"{name}: not a tar archive, cut or damaged ({error})") from error
    while stream.read(READ_BYTES):  # behind the end mark there may be padding, and the end of the compressed data
        pass
    if stream.last != bytes(512):
        raise DataError(f"{name}: ends without a tar archive's end mark; copy the file again")


class _Member(tarfile.TarInfo):
    """A damaged header between members is an error; the library takes it for the archive's end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, ValueError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(str(error)) from error


def _reads(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(READ_BYTES):
        yield chunk


def _grouped(files: Iterator[tuple[str, str]], source: SourceConfig, name: str) -> Iterator[Document]:
    """Documents of folders `depth` levels deep, in the order in which the walk leaves the folders.

    A folder holds its files until the walk has left it, so memory follows the longest documents, not the archive.
    """
    held: list[tuple[tuple[str, ...], list[str]]] = []

    def close() -> Document:
        key, texts = held.pop()
        return Document("\n".join(texts), name, "/".join((name, *key)))

    for path, text in files:
        key = PurePosixPath(path).parts[:-1][: source.depth]
        while held and key[: len(held[-1][0])] != held[-1][0]:
            yield close()
        if not held or held[-1][0] != key:
            held.append((key, []))
        held[-1][1].append(f"==== {path} ====\n{text}")
    while held:
        yield close()


def _wanted(source: SourceConfig) -> Callable[[str], bool]:
    """Whether a path, relative to its tree or archive, counts."""
    include, exclude = (
        re.compile("|".join(map(fnmatch.translate, patterns or [nothing])))
        for patterns, nothing in ((source.include, "*"), (source.exclude, ""))
    )

    def wanted(path: str) -> bool:
        hidden = path.startswith(".") or "/." in path
        return not hidden and bool(include.match(path)) and not exclude.match(path)

    return wanted


def _hostile(member: tarfile.TarInfo, path: str) -> str | None:
    if path.startswith("/") or ".." in path.split("/"):
        return "leaves the archive"
    if not member.isfile():
        return "is a device or a pipe"
    return f"is {member.size} bytes long" if member.size > LARGEST_FILE_BYTES else None


def _text(content: bytes, path: str, ledger: Ledger) -> str | None:
    """A file's text; None, counted, where it holds none."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        ledger.leave_out("not text")
        return None
    try:
        return html_text(text) if path.endswith((".html", ".htm")) else text
    except AssertionError:  # of the library, for a declaration that is none
        ledger.leave_out("not HTML")
        return None


class _Page(HTMLParser):
    """Collects what a reader of the page sees."""

    UNSEEN = ("script", "style", "head")
    BLOCKS = ("p", "div", "br", "li", "tr", "pre", "dt", "dd", "table", *(f"h{n}" for n in range(1, 7)))

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self._unseen = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._unseen = 0 if tag == "body" else self._unseen + (tag in self.UNSEEN)  # </head> may be left out
        if tag in self.BLOCKS:
            self.seen.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self._unseen -= tag in self.UNSEEN and self._unseen > 0
        self.handle_starttag("p" if tag in self.BLOCKS else "", ())

    def handle_data(self, data: str) -> None:
        if not self._unseen:
            self.seen.append(data)


def html_text(page: str) -> str:
    """The text of an HTML page, without its tags, scripts and styles."""
    parser = _Page()
    parser.feed(page)
    parser.close()
    return re.sub(r"\s*\n\s*\n\s*\n+", "\n\n", "".join(parser.seen)).strip() + "\n"
