"""From the files of a run to its batches: documents, tokenizer, corpus, what is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyrformer import _core
from pyrformer.data.batches import Batches, Masking
from pyrformer.data.documents import Documents, read_documents, tokenize
from pyrformer.data.pairs import Sentences, sentences
from pyrformer.data.prepared import Preparation, Prepared, describe, is_prepared
from pyrformer.data.supervised import Labelled, LabelledBatches, labelled, read_labelled, tagged
from pyrformer.data.tagging import Tagged, class_names, read_tagged
from pyrformer.errors import ConfigError
from pyrformer.tokenizers import Ragged, Tokenizer
from pyrformer.training.config import TrainConfig
from pyrformer.training.tokens import SHARD_TOKENS, Growing, Place, There, Tokens

AnyBatches = Batches | LabelledBatches | Growing
AnyCorpus = Ragged | Sentences | Labelled
#: Objectives that read all text before the first step: pairs take second texts from anywhere in it, and classes are
#: known when all labels are.
IN_MEMORY = ("mlm+nsp", "sentence", "tokens")

#: The tokenizer of an objective where none is configured.
DEFAULT_TOKENIZERS: dict[str, dict[str, Any]] = {
    "ar": {"preset": "gpt2", "vocab_size": 4096},
    "prefix": {"preset": "gpt2", "vocab_size": 4096},
    "mlm": {"preset": "bert-uncased", "vocab_size": 4096},
    "mlm+nsp": {"preset": "bert-uncased", "vocab_size": 4096},
    "plm": {"preset": "gpt2", "vocab_size": 4096},
    "sentence": {"preset": "bert-uncased", "vocab_size": 4096},
    "tokens": {"preset": "bert-uncased", "vocab_size": 4096},
}


@dataclass(frozen=True)
class _Identified:
    """A corpus, its number of tokens, and the SHA-256 of what it was made of."""

    corpus: AnyCorpus | _core.Corpus
    tokens: int
    sha256: str

    def facts(self, name: str) -> dict[str, Any]:
        """For the options of the run, under a name."""
        return {f"{name}_tokens": self.tokens, f"{name}_sha256": self.sha256}


class Once:
    """Documents in memory, as an iterable that no path is mistaken for."""

    def __init__(self, texts: list[str]):
        self._texts = texts

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)


@dataclass(frozen=True)
class _Documents:
    """Texts and, for "sentence", their labels, for "tokens" the labels of their words."""

    texts: list[str]
    labels: list[str]
    rows: list[Tagged] = field(default_factory=list)

    def where(self, keep: Callable[[int], bool]) -> _Documents:
        """Those whose number is kept."""
        texts = [t for i, t in enumerate(self.texts) if keep(i)]
        rows = [row for i, row in enumerate(self.rows) if keep(i)]
        return _Documents(texts, [x for i, x in enumerate(self.labels) if keep(i)], rows)


class Source:
    """The text of a run.

    Attributes:
        labels: the classes, for "sentence" and "tokens".
        tokenizer: the one given, or one trained on the text.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: Tokenizer | None,
        stage: Callable[[str], None],
        place: Place,
    ):
        """
        Args:
            tokenizer: of the run to go on with; None: as the options say.
            stage: told what is being done.
            place: where its tokens are put.

        Raises:
            ConfigError, DataError, FileError, TokenizerError: something given is wrong.
        """
        self.config, self.stage = config, stage
        stage("reading")
        self.documents = self.held_out = _Documents([], [])
        #: Each so many-th document is held out; 0: none of those to learn from.
        self._every = 0
        self._tokens: Tokens | None = None
        prepared = self._prepared(config.files)
        if prepared:
            self.tokenizer = self._tokenizer_of(prepared, tokenizer)
            self._tokens = There(prepared.corpus)
            self._identity: dict[str, Any] = {"train_sha256": prepared.sha256}
        elif config.objective in IN_MEMORY:
            self.documents, self.held_out = self._documents()
            self.tokenizer = tokenizer or self._tokenizer(
                lambda **options: Tokenizer.train(iter(self.documents.texts), **options)
            )
        else:
            self._begin(tokenizer, place)
        rows = self.documents.rows
        self.labels = class_names(rows) if rows else sorted(set(self.documents.labels))

    def batches(self, seq_len: int) -> tuple[AnyBatches, AnyBatches, dict[str, Any]]:
        """Batches to learn from, batches to measure on, and what identifies the text. Of text that is being tokenized,
        the first batch is there then; later ones are waited for where they are asked for."""
        if self._tokens is None:
            train, valid = (
                self._identified(self._tokenized(d, seq_len)) for d in (self.documents, self.held_out)
            )
            facts = {**train.facts("train"), **valid.facts("valid")}
            return (
                self._batches(train.corpus, seq_len, True),
                self._batches(valid.corpus, seq_len, False),
                facts,
            )
        facts = dict(self._identity)
        if self.config.valid:
            apart = self._to_measure(seq_len)
            facts |= apart.facts("valid")
            evaluation = self._batches(apart.corpus, seq_len, False)
            return (
                Growing(self._tokens, lambda all_: (all_, self._batches(all_, seq_len, True))),
                evaluation,
                facts,
            )
        return self._share(self._tokens, seq_len, 0), self._share(self._tokens, seq_len, 1), facts

    def _share(self, tokens: Tokens, seq_len: int, which: int) -> Growing:
        """Batches of what is to learn from (0), or of what is held out (1)."""

        def make(corpus: _core.Corpus) -> tuple[_core.Corpus, AnyBatches]:
            part = corpus.split(self.config.valid_fraction)[which]
            return part, self._batches(part, seq_len, which == 0)

        return Growing(tokens, make)

    def wait_until(self, interrupted: Callable[[], bool]) -> None:
        """Lets waiting for text end by :class:`pyrformer.training.tokens.Interrupted` when something is true."""
        if self._tokens is not None:
            self._tokens.interrupted = interrupted

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
        sha = hashlib.sha256("\n".join(self.labels[i] if i >= 0 else "" for i in labels).encode())
        documents = [corpus.documents] if isinstance(corpus, Sentences) else []
        for array in (texts.ids, texts.offsets, *documents):
            sha.update(np.ascontiguousarray(array).data)
        return _Identified(corpus, len(texts.ids), sha.hexdigest())

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

    def _to_measure(self, seq_len: int) -> _Identified:
        """The text of the files to measure on."""
        valid = self.config.valid
        other = self._prepared(valid)
        if other is None:
            return self._identified(self._tokenized(self._read(valid), seq_len))
        self._tokenizer_of(other, self.tokenizer)
        return _Identified(other.corpus, other.corpus.tokens, other.sha256)

    # -- Text ---------------------------------------------------------------------------------------------------------

    def _begin(self, tokenizer: Tokenizer | None, place: Place) -> None:
        """Learns a tokenizer where there is none, and begins to tokenize."""
        c = self.config
        source: Any = c.files
        reading: dict[str, Any] = {"column": c.column, "errors": c.errors, "clean": c.clean}
        if tokenizer is None and "-" in c.files and not self._is_given():
            # Standard input is read once.
            source, reading = Once(read_documents(c.files, **reading)), {**reading, "clean": []}
        self.tokenizer = tokenizer or self._tokenizer(
            lambda **options: Tokenizer.train(iter(Documents(source, **reading)), **options)
        )
        kind = "mlm" if c.objective == "mlm" else "ar"
        options = {"objective": kind, **reading, "on_corrupt": "fail", "shard_tokens": SHARD_TOKENS}
        known = describe(c.files)
        self._identity = {"text_files": len(known), "text_bytes": sum(file.get("bytes", 0) for file in known)}
        self.stage("tokenizing")
        self._tokens = place.begin(
            lambda folder: Preparation(source, folder, self.tokenizer, options, c.threads or None)
        )

    def _is_given(self) -> bool:
        """Whether a tokenizer is there, and none is to be learned."""
        options = self.config.tokenizer
        return "path" in options or bool(self.config.init_from and not options)

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
        if c.objective == "tokens":
            rows = read_tagged(files, None if c.label_column == "label" else c.label_column)
            return _Documents([row.text for row in rows], [], rows)
        return _Documents(read_documents(files, column=c.column, errors=c.errors, clean=c.clean), [])

    def _tokenized(self, documents: _Documents, seq_len: int) -> AnyCorpus:
        c, texts = self.config, documents.texts
        if c.objective == "sentence":
            return labelled(self.tokenizer, texts, documents.labels, self.labels, seq_len)
        if c.objective == "tokens":
            return tagged(self.tokenizer, documents.rows, self.labels, seq_len)
        if c.objective == "mlm+nsp":
            return sentences(self.tokenizer, texts, c.threads or None)
        kind = "mlm" if c.objective == "mlm" else "ar"
        return tokenize(self.tokenizer, texts, objective=kind, threads=c.threads or None)

    def _tokenizer(self, learn: Callable[..., Tokenizer]) -> Tokenizer:
        """The tokenizer that the options name, or one that is learned with those for :meth:`Tokenizer.train`."""
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
        return learn(**{**defaults, **options})

    def _batches(self, corpus: AnyCorpus | _core.Corpus, seq_len: int, shuffle: bool) -> AnyBatches:
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
        return Batches(
            corpus,
            c.objective,
            **shared,
            tokenizer=self.tokenizer,
            cross_documents=c.cross_documents,
            masking=masking,
            plm_probability=c.plm_probability,
            max_span_length=c.max_span_length,
        )
