"""Any tokenizer of Hugging Face's `tokenizers`, from the tokenizer.json that transformers writes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nsa_train.data.tokenizer import Tokenizer
from nsa_train.errors import DataError

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"


class HuggingFaceTokenizer(Tokenizer):
    """Texts are encoded as a whole, and words that look like special tokens as plain text."""

    splits = False

    def __init__(self, path: Path) -> None:
        import tokenizers

        if not path.is_file():
            raise DataError(
                f"{path}: no such file; write it with AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"
            )
        content, config = path.read_bytes(), path.with_name(CONFIG)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"{path}: not a tokenizer of Hugging Face's tokenizers ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        eos = _eos_token(config)
        self.files = {FILE: content, CONFIG: json.dumps({"eos_token": eos}).encode()}
        self.vocab = 1 + max(self._tokenizer.get_vocab().values())
        number = self._tokenizer.token_to_id(eos)
        if number is None:
            raise DataError(f"{config}: its eos_token {eos!r} is not in {path.name}")
        self.eos = number

    def encode(self, text: str) -> np.ndarray:
        """Token numbers of a text, int32 [n], without special tokens."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token numbers; exact where the tokenizer neither normalises nor drops anything."""
        return self._tokenizer.decode([int(token) for token in ids if token != self.eos], skip_special_tokens=False)


def _eos_token(config: Path) -> str:
    """The token that closes a document, as transformers notes it beside the tokenizer."""
    try:
        eos = json.loads(config.read_text("utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{config}: cannot be read ({error}); its eos_token closes every document") from error
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(eos, str):
        raise DataError(f"{config}: names no eos_token, which must close every document")
    return eos
