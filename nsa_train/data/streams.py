"""Files as streams of bytes, decompressed by their suffix, where a cut file never passes for a complete one."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from nsa_train.errors import DataError

CHUNK_BYTES = 1 << 16
ZSTD_WINDOW_BYTES = 1 << 31  # what `zstd --long=31` writes; the library's own limit is smaller
DEB_MAGIC = b"!<arch>\n"
DEB_HEADER_BYTES = 60


def file_chunks(path: Path, name: str) -> Iterator[bytes]:
    """Content of a file, decompressed where its suffix says so. Raises DataError where it is cut or damaged."""
    with path.open("rb") as file:
        yield from decompressed(_reads(file), path.suffix, name)


def deb_payload(path: Path, name: str) -> Iterator[bytes]:
    """The tar stream of the files in a Debian package, which is an `ar` archive with a member data.tar.*."""
    with path.open("rb") as file:
        if file.read(len(DEB_MAGIC)) != DEB_MAGIC:
            raise DataError(f"{name}: not a Debian package")
        while len(header := file.read(DEB_HEADER_BYTES)) == DEB_HEADER_BYTES:
            member, digits = header[:16].decode("latin-1").strip(" /"), header[48:58].strip()
            if not digits.isdigit():
                raise DataError(f"{name}: the size of {member!r} is no number; copy the file again")
            size = int(digits)
            if member.startswith("data.tar"):
                yield from decompressed(_range(file, size, name), Path(member).suffix, name)
                return
            file.seek(size + size % 2, 1)
    raise DataError(f"{name}: ends before its data.tar; copy the file again")


def lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their newline. A line may be as long as a book."""
    held: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        held.append(first)
        if others:
            yield b"".join(held)
            yield from others[:-1]
            held = [others[-1]]
    if rest := b"".join(held):
        yield rest


class Stream:
    """Chunks as a file object to read from. `last` are the last bytes read, at most 512."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks, self._chunk, self._at, self.last = chunks, b"", 0, b""

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; none at the end."""
        if self._at == len(self._chunk):
            self._chunk, self._at = next((chunk for chunk in self._chunks if chunk), b""), 0
        found = self._chunk[self._at : self._at + size]
        self._at += len(found)
        self.last = (self.last + found[-512:])[-512:]
        return found


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES).decompressobj()


DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".tgz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": _zstd,
}


def decompressed(chunks: Iterator[bytes], suffix: str, name: str) -> Iterator[bytes]:
    """The content behind `chunks`, frame after frame; as it is for a suffix that names no compression."""
    if suffix not in DECOMPRESSORS:
        yield from chunks
        return
    import zstandard

    frame = DECOMPRESSORS[suffix]()
    try:
        for chunk in chunks:
            while chunk:
                if frame.eof:
                    chunk = chunk.lstrip(b"\0")  # padding between frames
                    if not chunk:
                        break
                    frame = DECOMPRESSORS[suffix]()
                yield frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
    except (zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError) as error:
        raise DataError(f"{name}: not {suffix[1:]}, or damaged ({error})") from error
    if not frame.eof:
        raise DataError(f"{name}: ends inside its {suffix[1:]} data; copy the file again")


def _reads(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _range(file: BinaryIO, size: int, name: str) -> Iterator[bytes]:
    while size > 0:
        chunk = file.read(min(size, CHUNK_BYTES))
        if not chunk:
            raise DataError(f"{name}: ends inside its data.tar; copy the file again")
        size -= len(chunk)
        yield chunk
