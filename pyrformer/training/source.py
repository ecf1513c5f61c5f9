"""From the files of a run to its batches: documents, tokenizer, corpus, what is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyrformer import _core
from pyrformer.data import Batches, Masking, read_documents, tokenize
from pyrformer.errors import ConfigError
from pyrformer.pairs import PairBatches, Sentences, sentences
from pyrformer.prepared import Prepared, is_prepared
from pyrformer.supervised import (
    Labelled,
    LabelledBatches,
    PermutationBatches,
    PrefixBatches,
    labelled,
    read_labelled,
)
from pyrformer.tokenizers import Ragged, Tokenizer
from pyrformer.training.config import TrainConfig

AnyBatches = Batches | PrefixBatches | PermutationBatches | PairBatches | LabelledBatches
AnyCorpus = Ragged | Sentences | Labelled
#: A corpus, its number of tokens, and the SHA-256 of what it was made of.
_Identified = tuple[AnyCorpus | _core.Corpus, int, str]

#: The tokenizer of an objective where none is configured.
DEFAULT_TOKENIZERS: dict[str, dict[str, Any]] = {
    "ar": {"preset": "gpt2", "vocab_size": 4096},
    "prefix": {"preset": "gpt2", "vocab_size": 4096},
    "mlm": {"preset": "bert-uncased", "vocab_size": 4096},
    "mlm+nsp": {"preset": "bert-uncased", "vocab_size": 4096},
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
        self.prepared = self._prepared(config.files)
        self.documents = self.held_out = _Documents([], [])
        #: Each so many-th document is held out; 0: none of those to learn from.
        self._every = 0
        if self.prepared:
            self.tokenizer = self._tokenizer_of(self.prepared, tokenizer)
        else:
            self.documents, self.held_out = self._documents()
            self.tokenizer = tokenizer or self._tokenizer(self.documents.texts, self.held_out.texts)
        self.labels = sorted(set(self.documents.labels))

    def batches(self, seq_len: int) -> tuple[AnyBatches, AnyBatches, dict[str, Any]]:
        """Batches to learn from, batches to measure on, and what identifies both: counts of tokens and SHA-256 of the
        ids."""
        if self.prepared:
            train, valid = self._from_prepared(self.prepared, seq_len)
        else:
            self.stage("tokenizing")
            train, valid = (
                self._identified(self._tokenized(d, seq_len)) for d in (self.documents, self.held_out)
            )
        made: list[AnyBatches] = []
        facts: dict[str, Any] = {}
        for name, (corpus, tokens, sha256) in (("train", train), ("valid", valid)):
            facts[f"{name}_tokens"], facts[f"{name}_sha256"] = tokens, sha256
            made.append(self._batches(corpus, seq_len, shuffle=name == "train"))
        return made[0], made[1], facts

    def number(self, document: int) -> int:
        """The number of a document to learn from among all that the files hold, from 0; of pairs of texts, its number
        among the paragraphs to learn from."""
        if self.config.objective == "mlm+nsp" or not self._every:
            return document
        rest = self._every - 1
        return document // rest * self._every + document % rest + 1

    def _identified(self, corpus: AnyCorpus) -> _Identified:
        texts = corpus if isinstance(corpus, Ragged) else corpus.texts
        labels = corpus.classes.tolist() if isinstance(corpus, Labelled) else []
        sha = hashlib.sha256("\n".join(self.labels[i] for i in labels).encode())
        documents = [corpus.documents] if isinstance(corpus, Sentences) else []
        for array in (texts.ids, texts.offsets, *documents):
            sha.update(np.ascontiguousarray(array).data)
        return corpus, len(texts.ids), sha.hexdigest()

    # -- Prepared folders ---------------------------------------------------------------------------------------------

    def _prepared(self, files: list[str]) -> Prepared | None:
        """The prepared folder that files name, if they name one."""
        if not any(map(is_prepared, files)):
            return None
        if len(files) > 1:
            raise ConfigError(
                "[train] a prepared folder is the only thing to learn from; prepare all text into one"
            )
        prepared = Prepared.open(files[0])
        wanted = {"ar": "ar", "prefix": "ar", "plm": "ar", "mlm": "mlm"}.get(self.config.objective)
        made = prepared.manifest["options"].get("objective")
        if wanted != made:
            needs = (
                f"run `pyrformer prepare` with --objective {wanted}"
                if wanted
                else "it learns from text files"
            )
            raise ConfigError(
                f"[train] {files[0]} was prepared for objective {made!r}, not for "
                f"{self.config.objective!r}: {needs}"
            )
        if self.config.clean:
            raise ConfigError(
                "[train] prepared text was cleaned when it was prepared; give clean to `pyrformer prepare`"
            )
        return prepared

    def _tokenizer_of(self, prepared: Prepared, tokenizer: Tokenizer | None) -> Tokenizer:
        """The tokenizer of a prepared folder, after a look at what else was asked for."""
        c = self.config
        others = [tokenizer] if tokenizer else []
        if c.init_from and not others:
            others.append(Tokenizer.load(c.init_from))
        if c.tokenizer:
            if "path" not in c.tokenizer:
                raise ConfigError(
                    "[train] prepared text has its tokenizer; leave out the tokenizer's options"
                )
            others.append(Tokenizer.load(c.tokenizer["path"]))
        if any(other.to_json() != prepared.tokenizer.to_json() for other in others):
            raise ConfigError(
                f"[train] {prepared.folder} was prepared with another tokenizer than the model's; prepare it again "
                "with that one"
            )
        return prepared.tokenizer

    def _from_prepared(self, prepared: Prepared, seq_len: int) -> tuple[_Identified, _Identified]:
        c = self.config
        if not c.valid:
            head, tail = prepared.corpus.split(c.valid_fraction)
            return (head, head.tokens, prepared.sha256), (tail, tail.tokens, prepared.sha256)
        held_out: _Identified
        other = self._prepared(c.valid)
        if other is None:
            held_out = self._identified(self._tokenized(self._read(c.valid), seq_len))
        else:
            self._tokenizer_of(other, self.tokenizer)
            held_out = (other.corpus, other.corpus.tokens, other.sha256)
        return (prepared.corpus, prepared.corpus.tokens, prepared.sha256), held_out

    # -- Text ---------------------------------------------------------------------------------------------------------

    def _documents(self) -> tuple[_Documents, _Documents]:
        """What to learn from and what to measure on."""
        c = self.config
        documents = self._read(c.files)
        if c.valid:
            return documents, self._read(c.valid)
        if len(documents.texts) > 1:
            # Every k-th document, so that ordered files are represented.
            self._every = every = max(2, round(1 / c.valid_fraction))
            return documents.where(lambda i: i % every > 0), documents.where(lambda i: i % every == 0)
        text = documents.texts[0]
        cut = int(len(text) * (1 - c.valid_fraction))
        return _Documents([text[:cut]], []), _Documents([text[cut:]], [])

    def _read(self, files: list[str]) -> _Documents:
        c = self.config
        if c.objective == "sentence":
            return _Documents(*read_labelled(files, column=c.column, label_column=c.label_column))
        return _Documents(read_documents(files, column=c.column, errors=c.errors, clean=c.clean), [])

    def _tokenized(self, documents: _Documents, seq_len: int) -> AnyCorpus:
        c, texts = self.config, documents.texts
        if c.objective == "sentence":
            return labelled(self.tokenizer, texts, documents.labels, self.labels, seq_len)
        if c.objective == "mlm+nsp":
            return sentences(self.tokenizer, texts, c.threads or None)
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

    def _batches(self, corpus: AnyCorpus | _core.Corpus, seq_len: int, *, shuffle: bool) -> AnyBatches:
        c = self.config
        shared: dict[str, Any] = {
            "seq_len": seq_len,
            "batch_size": c.batch_size,
            "seed": c.seed,
            "shuffle": shuffle,
        }
        if isinstance(corpus, Labelled):
            return LabelledBatches(corpus, pad_token_id=self.tokenizer.pad_token_id, **shared)
        rates = (c.mlm_probability, c.mask_replace_prob, c.random_replace_prob)
        masking = Masking(*rates, c.whole_word_mask, c.span_p, c.span_max_length)
        if isinstance(corpus, Sentences):
            return PairBatches(corpus, tokenizer=self.tokenizer, masking=masking, **shared)
        if c.objective == "plm":
            return PermutationBatches(
                corpus, **shared, plm_probability=c.plm_probability, max_span_length=c.max_span_length
            )
        prefix = c.objective == "prefix"
        batches = Batches(
            corpus,
            "ar" if prefix else c.objective,
            **shared,
            tokenizer=self.tokenizer,
            cross_documents=c.cross_documents,
            masking=masking,
        )
        return PrefixBatches(batches, c.seed) if prefix else batches
