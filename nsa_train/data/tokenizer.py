"""The SentencePiece tokenizer: trained once on a corpus, then text to token numbers and back."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nsa_train.errors import DataError

CHUNK_CHARACTERS = 2048  # SentencePiece is 2-3 times faster on such pieces than on whole books
TRAINING_LINE_CHARACTERS = 8192  # longer lines are cut, so that none exceeds SentencePiece's limit in bytes
MAX_SENTENCE_BYTES = 65536
ERRORS_ONLY = 2  # of SentencePiece's log levels
PROBE = "def f(a):\n\n    return  a\n\ttail \n x"


class Tokenizer:
    """A SentencePiece model. `encode` never adds an end-of-document token; whoever joins documents does."""

    def __init__(self, model: bytes, name: str) -> None:
        import sentencepiece

        sentencepiece.set_min_log_level(ERRORS_ONLY + 1)  # a damaged model is reported here, once
        try:
            self._processor: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise DataError(f"{name}: not a SentencePiece model") from error
        self.vocab: int = self._processor.get_piece_size()
        self.eos: int = self._processor.eos_id()
        self.sha256: str = hashlib.sha256(model).hexdigest()
        if self.eos < 0:
            raise DataError(f"{name}: has no end-of-sentence piece, which must close every document")
        self._cuts_at_newlines = self._newline_is_a_border()

    @staticmethod
    def load(path: Path | str) -> Tokenizer:
        """The tokenizer of a .model file. Raises DataError when there is none."""
        try:
            return Tokenizer(Path(path).read_bytes(), str(path))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); set data.tokenizer") from error

    def encode(self, text: str) -> np.ndarray:
        """Token numbers of a text, int32 [n], computed piece by piece between newlines.

        For BPE they are those of the whole text at once. A unigram model breaks ties between equally likely splits by
        rounding, so there some (4 in 100,000) differ from the whole text's, never their number.
        """
        chunks = _chunks(text) if self._cuts_at_newlines else [text]
        return self._encode(chunks)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token numbers; the end of a document gives nothing.

        Exact for every text without U+2581 (▁), which is how SentencePiece writes a space and so comes back as one.
        """
        return self._processor.decode([int(token) for token in ids])

    def _encode(self, chunks: list[str]) -> np.ndarray:
        parts = self._processor.encode(chunks, out_type=int)
        return np.fromiter((token for part in parts for token in part), np.int32, sum(map(len, parts)))

    def _newline_is_a_border(self) -> bool:
        """Whether pieces of text cut at newlines encode alone as they do together; not so in every foreign model."""
        pieces = (self._processor.id_to_piece(token) for token in range(self.vocab))
        if any("\n" in piece and piece != "\n" for piece in pieces):
            return False
        return np.array_equal(self._encode([PROBE]), self._encode(PROBE.splitlines(keepends=True)))


def train_tokenizer(
    texts: Iterable[str], vocab: int, kind: Literal["bpe", "unigram"], sample_mb: int, seed: int, path: Path
) -> Tokenizer:
    """Train on about `sample_mb` MB of random lines of `texts` and write the model to `path`.

    The same texts and arguments give the same bytes. Raises DataError when the text cannot fill the vocabulary.
    """
    import sentencepiece

    lines = _sample_lines(texts, sample_mb * 1_000_000, seed)
    if not lines:
        raise DataError("there is no text to train a tokenizer on")
    sentencepiece.set_min_log_level(ERRORS_ONLY)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type=kind, vocab_size=vocab,
            minloglevel=ERRORS_ONLY, num_threads=1, input_sentence_size=0, shuffle_input_sentence=False,
            max_sentence_length=MAX_SENTENCE_BYTES, unk_id=0, eos_id=1, bos_id=-1, pad_id=-1,
            # Nothing of the text may be lost: no rewriting, no collapsing of spaces, bytes for rare characters.
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, byte_fallback=True, split_digits=True, user_defined_symbols=["\n"],
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        size = sum(len(line.encode()) for line in lines)
        reason = str(error).split("] ")[-1].strip()
        raise DataError(
            f"{size} bytes of text cannot fill a vocabulary of {vocab} ({reason}); set model.vocab or give more text"
        ) from error
    path.write_bytes(model.getvalue())
    return Tokenizer(model.getvalue(), str(path))


def _chunks(text: str) -> list[str]:
    """The text in pieces of at least CHUNK_CHARACTERS that end behind a newline."""
    chunks, start = [], 0
    while start < len(text):
        newline = text.find("\n", start + CHUNK_CHARACTERS - 1)
        stop = newline + 1 if newline >= 0 else len(text)
        chunks.append(text[start:stop])
        start = stop
    return chunks


def _sample_lines(texts: Iterable[str], limit_bytes: int, seed: int) -> list[str]:
    """Random lines of about `limit_bytes` in random order, in memory for twice that, whatever the corpus weighs.

    Every line draws a number; only lines below a ceiling are kept, and the ceiling halves when they get too many.
    """
    generator = np.random.default_rng(seed)
    kept: list[tuple[float, int, str]] = []  # draw, running number (breaks ties), line
    ceiling, size, count = 1.0, 0, 0
    for text in texts:
        lines = [
            line[start : start + TRAINING_LINE_CHARACTERS]
            for line in text.split("\n")
            for start in range(0, len(line), TRAINING_LINE_CHARACTERS)
        ]
        for draw, line in zip(generator.random(len(lines)).tolist(), lines, strict=True):
            count += 1
            if draw < ceiling:
                kept.append((draw, count, line))
                size += len(line.encode())
        while size > 2 * limit_bytes and len(kept) > 1:
            ceiling /= 2
            kept = [entry for entry in kept if entry[0] < ceiling]
            size = sum(len(line.encode()) for _, _, line in kept)
    chosen, size = [], 0
    for _, _, line in sorted(kept):
        if size >= limit_bytes:
            break
        chosen.append(line)
        size += len(line.encode())
    return chosen
