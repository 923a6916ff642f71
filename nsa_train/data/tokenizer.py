"""Tokenizers: SentencePiece, trained on a corpus or given, or any of Hugging Face's; text to token numbers and back."""

from __future__ import annotations

import hashlib
import io
import re
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nsa_train.errors import DataError

TRAINING_LINE_CHARACTERS = 8192  # longer lines are cut, so that none exceeds SentencePiece's limit in bytes
MODEL_FILE = "tokenizer.model"
MAX_SENTENCE_BYTES = 65536
ERRORS_ONLY = 2  # of SentencePiece's log levels
WORD = re.compile(r" *[^ \n]+|\n| +")
SPACE = "\u2581"  # how SentencePiece writes a space
KNOWN_WORDS = 1 << 18  # about 60 MB
PROBE = "def f(a):\n\n    return  a\n\ttail \n x\n\n"


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
        self.files = {MODEL_FILE: model}  # what `load` needs, the first to be named
        if self.eos < 0:
            raise DataError(f"{name}: has no end-of-sentence piece, which must close every document")
        self._words: dict[str, bytes] = {}
        self.splits = self._words_are_independent()  # whether texts may be cut at newlines, with the same tokens

    @staticmethod
    def load(path: Path | str) -> Tokenizer:
        """The tokenizer of a SentencePiece .model file, or of Hugging Face's tokenizer.json or its folder.

        Raises DataError when there is none.
        """
        path = Path(path)
        try:
            if path.is_dir() or path.suffix == ".json":
                from nsa_train.data.huggingface import HuggingFaceTokenizer

                return HuggingFaceTokenizer(path / "tokenizer.json" if path.is_dir() else path)
            return Tokenizer(path.read_bytes(), str(path))
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be read ({error.strerror}); set data.tokenizer") from error

    @property
    def sha256(self) -> str:
        """Of all `files`."""
        return hashlib.sha256(b"".join(self.files.values())).hexdigest()

    def save(self, folder: Path) -> Path:
        """Write `files` into a folder; gives the path that `load` takes."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder / next(iter(self.files))

    def encode(self, text: str) -> np.ndarray:
        """Token numbers of a text, int32 [n].

        They are put together from its words, each of which is encoded once: several times faster than the whole text,
        and for BPE the same tokens. A unigram model breaks ties between equally likely splits by rounding, so there
        some (1 in 1,000) differ from the whole text's, never their number.
        """
        if not self.splits:
            return np.array(self._processor.encode(text, out_type=int), np.int32)
        words = WORD.findall(text)
        if len(self._words) > KNOWN_WORDS:
            self._words.clear()
        new = [word for word in dict.fromkeys(words) if word not in self._words]
        if new:  # a call costs more than a line of known words
            for word, ids in zip(new, self._processor.encode(new, out_type=int, num_threads=1), strict=True):
                self._words[word] = array("i", ids).tobytes()
        return np.frombuffer(b"".join(map(self._words.__getitem__, words)), np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token numbers; the end of a document gives nothing.

        Exact for every text without U+2581 (▁), which is how SentencePiece writes a space and so comes back as one.
        """
        return self._processor.decode([int(token) for token in ids])

    def _words_are_independent(self) -> bool:
        """Whether no piece reaches beyond a word with the spaces before it; not so in every foreign model."""
        pieces = (self._processor.id_to_piece(token) for token in range(self.vocab))
        if any(("\n" in piece and piece != "\n") or SPACE in piece.lstrip(SPACE) for piece in pieces):
            return False
        words = self._processor.encode(WORD.findall(PROBE), out_type=int)
        return self._processor.encode(PROBE, out_type=int) == [token for ids in words for token in ids]


def train_tokenizer(
    texts: Iterable[str], vocab: int, kind: Literal["bpe", "unigram"], sample_mb: int, seed: int
) -> Tokenizer:
    """Train on about `sample_mb` MB of random lines of `texts`.

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
    return Tokenizer(model.getvalue(), "the trained model")


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
