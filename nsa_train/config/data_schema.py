"""What every key of configs/data/ means, and of a source in it, like the other sections in `schema`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nsa_train.config.rules import SAFE_NAME, mixture_problems, not_positive

READ_BY = {"include": ("tree", "tar"), "exclude": ("tree", "tar"), "take": ("hub", "recall")}  # key -> kinds


@dataclass(frozen=True)
class SourceConfig:
    """One origin of documents."""

    kind: Literal["stdlib", "files", "tree", "tar", "hub", "recall"]
    root: str  # folder under which `paths` and `heldout_paths` lie
    paths: tuple[str, ...]  # files: files or folders; tree: folders; tar: archives; hub: names of data sets
    heldout_paths: tuple[str, ...]  # empty: a share of the documents is held out
    heldout_share: float  # of the documents, chosen by a hash of their text
    licence: str | None  # of documents that do not name theirs
    text_field: str  # of a record in a jsonl, parquet or Arrow file or a data set
    language_field: str  # of a record
    languages: tuple[str, ...]  # what `language_field` must say; empty: anything
    min_chars: int  # of a document; shorter ones are left out
    max_chars: int | None  # longer ones are left out; null: no limit
    include: tuple[str, ...]  # tree, tar: patterns of paths that count, such as *.py; empty: every file of text
    exclude: tuple[str, ...]  # tree, tar: patterns of paths that do not
    depth: int | None  # tree, tar: folders so many levels deep become one document each; null: every folder by itself
    subset: str | None  # hub: part of the data set: its name, or, with a slash, its folder
    hub_split: str  # hub: split of the data set
    revision: str | None  # hub: commit or tag; null: what is newest when it is read
    take: int | None  # hub: the first so many records; null: all; recall: so many documents
    haystack: tuple[str, ...]  # recall: names of data.sources in whose training text facts are hidden

    def problems(self) -> list[str]:
        sizes = {key: getattr(self, key) for key in ("min_chars", "max_chars", "depth")}
        found = [f"{key}={size} must not be negative" for key, size in sizes.items() if size is not None and size < 0]
        if self.kind != "stdlib" and not self.paths:
            found.append("paths is empty; name files or folders under data.root, like data.paths=[books.jsonl.zst]")
        if not self.heldout_paths and not 0 < self.heldout_share < 1:
            found.append(f"heldout_share={self.heldout_share} must lie between 0 and 1")
        if self.languages and self.kind not in ("files", "hub"):
            found.append(f"languages={list(self.languages)} needs records, which kind={self.kind} has not")
        if self.kind == "recall" and (self.take is None or self.max_chars is None or self.min_chars < 1):
            found.append("kind=recall needs take (documents), min_chars and max_chars: it makes documents so long")
        if self.take is not None and self.take <= 0:
            found.append(f"take={self.take} must be positive, or null for all")
        root, real, hub = Path(self.root), Path(self.root).resolve(), self.kind == "hub"  # as spelt, and behind links
        for path in (*self.paths, *self.heldout_paths):
            if not ((root / path).is_relative_to(root) and (hub or (root / path).resolve().is_relative_to(real))):
                found += [f"paths: {path} leaves data.root={self.root}; name it from there, or set data.root above it"]
        return found


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """Where text comes from and how it becomes packed rows.

    The keys of a source describe the only one, or, where `sources` names several, what these have in common.
    """

    name: str  # what the prepared corpus is called
    sources: dict[str, SourceConfig]  # name -> keys that differ from those beside it; empty: one source
    on_error: Literal["stop", "skip"]  # at a record or file that cannot be read: end, or go on and count
    near_duplicates: float | None  # leave out documents at least so alike, 0 to 1; null: exact duplicates only
    workers: int  # processes that tokenise; 0: one per core
    corpus: str | None  # a prepared corpus, in place of the sources; null: prepared from them
    prepared_dir: str  # tokenised corpora and their tokenizers
    tokenizer: str | None  # a SentencePiece .model, a tokenizer.json or its folder; null: trained on the corpus
    tokenizer_kind: Literal["bpe", "unigram"]
    tokenizer_sample_mb: int  # text that the tokenizer is trained on
    packing: Literal["best_fit", "concat", "long"]  # how documents share rows
    max_documents: int  # in a packed row of 8192 tokens; in proportion in longer ones
    align: int  # documents are padded at their end to a multiple of this; 1: not at all
    long_copies: int  # packing=long: how often an epoch holds a document that is longer than a row
    mixture: dict[str, float]  # source, or pattern of sources -> share of the tokens; empty: as the corpus has them

    def problems(self) -> list[str]:
        found = not_positive(self, "tokenizer_sample_mb", "max_documents", "align", "long_copies")
        found += mixture_problems(self.mixture)
        names = [("name", self.name), *(("sources", name) for name in self.sources)]
        found += [
            f"{key}={name!r} may hold letters, digits and . _ - only, 100 at most"
            for key, name in names
            if not SAFE_NAME.fullmatch(name)
        ]
        if self.workers < 0:
            found.append(f"workers={self.workers} must not be negative; 0 is one per core")
        if self.near_duplicates is not None and not 0 < self.near_duplicates < 1:
            found.append(f"near_duplicates={self.near_duplicates} must lie between 0 and 1")
        return found if self.sources else found + super().problems() + self._not_read()

    def _not_read(self) -> list[str]:
        """Keys that were set in vain: the only source is of another kind. Several may share them."""
        found = []
        if self.kind == "stdlib" and (named := [*self.paths, *self.heldout_paths]):
            found.append(f"paths={named} are not read by kind=stdlib; choose data=files, or the group of your source")
        set_here = {"include": list(self.include) or None, "exclude": list(self.exclude) or None, "take": self.take}
        return found + [
            f"{key}={value} is for {' and '.join(f'kind={kind}' for kind in READ_BY[key])}, not kind={self.kind}"
            for key, value in set_here.items()
            if value is not None and self.kind not in READ_BY[key]
        ]

    @property
    def named_sources(self) -> dict[str, SourceConfig]:
        """`sources`, or this section itself as the only one."""
        return self.sources or {self.name: self}
