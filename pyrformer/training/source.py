"""From the files of a run to its batches: documents, tokenizer, corpus, what is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyrformer.data import Batches, Masking, read_documents, tokenize
from pyrformer.errors import ConfigError
from pyrformer.supervised import Labelled, LabelledBatches, PermutationBatches, labelled, read_labelled
from pyrformer.tokenizers import Ragged, Tokenizer
from pyrformer.training.config import TrainConfig

AnyBatches = Batches | PermutationBatches | LabelledBatches

#: The tokenizer of an objective where none is configured.
DEFAULT_TOKENIZERS: dict[str, dict[str, Any]] = {
    "ar": {"preset": "gpt2", "vocab_size": 4096},
    "mlm": {"preset": "bert-uncased", "vocab_size": 4096},
    "plm": {"preset": "gpt2", "vocab_size": 4096},
    "sentence": {"preset": "bert-uncased", "vocab_size": 4096},
}


@dataclass(frozen=True)
class _Documents:
    """Texts and, for "sentence", their labels."""

    texts: list[str]
    labels: list[str]

    def where(self, keep: Callable[[int], bool]) -> _Documents:
        """Those whose number is kept."""
        texts = [t for i, t in enumerate(self.texts) if keep(i)]
        return _Documents(texts, [x for i, x in enumerate(self.labels) if keep(i)])


class Source:
    """The text of a run.

    Attributes:
        labels: the classes, for "sentence".
        tokenizer: the one given, or one trained on the text.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer | None, stage: Callable[[str], None]):
        """
        Args:
            tokenizer: of the run to go on with; None: as the options say.
            stage: told what is being done.

        Raises:
            ConfigError, DataError, FileError, TokenizerError: something given is wrong.
        """
        self.config, self.stage = config, stage
        stage("reading")
        self.documents, self.held_out = self._documents()
        self.labels = sorted(set(self.documents.labels))
        self.tokenizer = tokenizer or self._tokenizer(self.documents.texts, self.held_out.texts)

    def batches(self, seq_len: int) -> tuple[AnyBatches, AnyBatches, dict[str, Any]]:
        """Batches to learn from, batches to measure on, and what identifies both: counts of tokens and SHA-256 of the
        ids."""
        self.stage("tokenizing")
        made: list[AnyBatches] = []
        facts: dict[str, Any] = {}
        for name, documents in (("train", self.documents), ("valid", self.held_out)):
            corpus = self._tokenized(documents, seq_len)
            texts = corpus.texts if isinstance(corpus, Labelled) else corpus
            sha = hashlib.sha256("\n".join(documents.labels).encode())
            for array in (texts.ids, texts.offsets):
                sha.update(np.ascontiguousarray(array).data)
            facts[f"{name}_tokens"], facts[f"{name}_sha256"] = len(corpus.ids), sha.hexdigest()
            made.append(self._batches(corpus, seq_len, shuffle=name == "train"))
        return made[0], made[1], facts

    def _documents(self) -> tuple[_Documents, _Documents]:
        """What to learn from and what to measure on."""
        c = self.config
        documents = self._read(c.files)
        if c.valid:
            return documents, self._read(c.valid)
        if len(documents.texts) > 1:
            # Every k-th document, so that ordered files are represented.
            every = max(2, round(1 / c.valid_fraction))
            return documents.where(lambda i: i % every > 0), documents.where(lambda i: i % every == 0)
        text = documents.texts[0]
        cut = int(len(text) * (1 - c.valid_fraction))
        return _Documents([text[:cut]], []), _Documents([text[cut:]], [])

    def _read(self, files: list[str]) -> _Documents:
        c = self.config
        if c.objective == "sentence":
            return _Documents(*read_labelled(files, column=c.column, label_column=c.label_column))
        return _Documents(read_documents(files, column=c.column, errors=c.errors, clean=c.clean), [])

    def _tokenized(self, documents: _Documents, seq_len: int) -> Ragged | Labelled:
        c, texts = self.config, documents.texts
        if c.objective == "sentence":
            return labelled(self.tokenizer, texts, documents.labels, self.labels, seq_len)
        kind = "mlm" if c.objective == "mlm" else "ar"
        return tokenize(self.tokenizer, texts, objective=kind, threads=c.threads or None)

    def _tokenizer(self, documents: list[str], held_out: list[str]) -> Tokenizer:
        options = dict(self.config.tokenizer)
        if self.config.init_from and not options:
            return Tokenizer.load(self.config.init_from)
        if not {"path", "kind", "preset"} & options.keys():
            options = {**DEFAULT_TOKENIZERS[self.config.objective], **options}
        known = {"path", "kind", "vocab_size", "preset", "min_frequency", "special_tokens"}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise ConfigError(
                f"[train] unknown tokenizer option {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        for name in ("vocab_size", "min_frequency"):
            value = options.get(name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(
                    f"[train] the tokenizer's {name} must be a whole number of 1 or more, got {value!r}"
                )
        for name in ("path", "kind", "preset"):
            if not isinstance(options.get(name, ""), str):
                raise ConfigError(f"[train] the tokenizer's {name} must be a string, got {options[name]!r}")
        if "path" in options:
            return Tokenizer.load(options["path"])
        self.stage("training the tokenizer")
        defaults = {"kind": "bpe", "vocab_size": 4096, "threads": self.config.threads or None}
        if "char" in (options.get("kind"), options.get("preset")):
            # An alphabet is not learned: characters of the held-out text alone would be unknown.
            documents = documents + held_out
        return Tokenizer.train(iter(documents), **{**defaults, **options})

    def _batches(self, corpus: Ragged | Labelled, seq_len: int, *, shuffle: bool) -> AnyBatches:
        c = self.config
        shared: dict[str, Any] = {
            "seq_len": seq_len,
            "batch_size": c.batch_size,
            "seed": c.seed,
            "shuffle": shuffle,
        }
        if isinstance(corpus, Labelled):
            return LabelledBatches(corpus, pad_token_id=self.tokenizer.pad_token_id, **shared)
        if c.objective == "plm":
            return PermutationBatches(
                corpus, **shared, plm_probability=c.plm_probability, max_span_length=c.max_span_length
            )
        return Batches(
            corpus,
            c.objective,
            **shared,
            tokenizer=self.tokenizer,
            cross_documents=c.cross_documents,
            masking=Masking(c.mlm_probability, whole_word=c.whole_word_mask),
        )
