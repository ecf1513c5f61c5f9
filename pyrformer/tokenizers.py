"""Tokenizers: text to ids and back, and their training. Files are Hugging Face's ``tokenizer.json``.

Letters: N ids of a batch, B texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike, cpu_count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pyrformer import _core
from pyrformer.errors import DataError, TokenizerError
from pyrformer.fields import MOST, checked

#: Characters whose words are counted at a time.
COUNTED = 1 << 23


@dataclass(frozen=True)
class Encoding:
    """One encoded text (or pair).

    Attributes:
        ids: token ids.
        tokens: their strings.
        offsets: where each token stands in its text, (start, end) in Unicode code points; (0, 0) for special tokens.
        type_ids: 0 for the first text, 1 for the second.
        special_tokens_mask: 1 for tokens that the template added.
        attention_mask: 0 for padding.
    """

    ids: list[int]
    tokens: list[str]
    offsets: list[tuple[int, int]]
    type_ids: list[int]
    special_tokens_mask: list[int]
    attention_mask: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    def _repr_html_(self) -> str:
        from pyrformer import display

        return display.encoding(self)


@dataclass(frozen=True)
class Ragged:
    """Many encoded texts without padding: text i is ``ids[offsets[i]:offsets[i + 1]]``.

    Attributes:
        ids: uint32 [N].
        offsets: int64 [B + 1].
    """

    ids: npt.NDArray[np.uint32]
    offsets: npt.NDArray[np.int64]

    def to_arrow(self) -> Any:
        """A ``pyarrow.LargeListArray`` of the texts' ids, over the same memory.

        Raises:
            InputError: pyarrow is not installed.
        """
        from pyrformer.arrow import import_arrow

        return import_arrow("an array").LargeListArray.from_arrays(self.offsets, self.ids)

    def __arrow_c_array__(self, requested_schema: object = None) -> object:
        return self.to_arrow().__arrow_c_array__(requested_schema)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> npt.NDArray[np.uint32]:
        return self.ids[self.offsets[i] : self.offsets[i + 1]]


class Tokenizer:
    """A tokenizer; it does not change, and any number of threads may use it.

    Attributes:
        core: the one in Rust.
    """

    def __init__(self, core: _core.Tokenizer):
        self.core = core
        self._special: dict[str, int] = core.special_ids()
        self._whole: Tokenizer | None = None

    @classmethod
    def load(cls, path: str | PathLike[str], *, split: str | None = None) -> Tokenizer:
        """Reads a tokenizer.

        Args:
            path: a ``tokenizer.json``, ``vocab.txt`` (BERT), ``vocab.json`` with ``merges.txt`` beside it (GPT-2), a
                ``.tiktoken``, ``.gguf`` or ``.model`` file; or a folder with one of them.
            split: how text falls into words, for a ``.tiktoken`` file: "gpt2", "cl100k", "o200k" or "qwen2".
                Default: as the published file with as many ranks.

        Raises:
            FileError: the file cannot be read.
            TokenizerError: it holds something that is not known here; the message names it.
        """
        return cls(_core.Tokenizer.load(Path(path), split))

    @classmethod
    @checked("tokenizer", vocab_size=1, threads=1)
    def train(
        cls,
        texts: Sequence[str | PathLike[str]] | Iterable[str],
        kind: str = "bpe",
        vocab_size: int = 8192,
        *,
        preset: str | None = None,
        min_frequency: int = 2,
        special_tokens: Sequence[str] | None = None,
        threads: int | None = None,
        column: str = "text",
        errors: str = "strict",
        clean: Sequence[str] = (),
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Tokenizer:
        """Learns a vocabulary; the same text gives the same bytes, whatever the number of threads. Texts are counted as
        they are read: memory grows with the different words in them, not with their length.

        Args:
            texts: a list of ``.txt`` or ``.jsonl`` files, or any other iterable of texts.
            kind: "bpe" (byte-level, as preset "gpt2"), "wordpiece" (as preset "bert-uncased"), "unigram" (as preset
                "xlnet") or "char".
            vocab_size: how many tokens at most, special ones included; "char" takes every character and ignores it.
            preset: instead of a kind: "bert-uncased", "bert-cased", "multilingual", "gpt2", "llama", "xlnet" or "char";
                normalization, splitting, template and special tokens.
            min_frequency: pairs seen less often are not merged.
            special_tokens: instead of the preset's.
            threads: default: all cores.
            column, errors, clean: for files, as in :func:`pyrformer.data.documents.read_documents`.
            progress: called with the stage ("count", in bytes of the files; "merge", in tokens; "prune"), what is done,
                and how much there is.

        Raises:
            TokenizerError: no text, an unknown kind or preset, or a vocabulary smaller than its alphabet.
            DataError: a file cannot be used.
        """
        from pyrformer.data.documents import Documents, size_of

        special = None if special_tokens is None else list(special_tokens)
        trainer = _core.Trainer(kind, preset, vocab_size, min_frequency, special, threads or 0)
        files = texts if isinstance(texts, (list, tuple)) else None
        documents = Documents(
            map(str, texts) if files is None else files, column=column, errors=errors, clean=clean
        )
        total = 0 if files is None else size_of(files)
        batch: list[str] = []
        size, counted = 0, False
        for chunk in documents.chunks():
            batch += documents.clean(chunk)
            size += sum(map(len, chunk))
            if size >= COUNTED:
                trainer.add(batch)
                counted |= bool(batch)
                batch, size = [], 0
                if progress is not None and total:
                    progress("count", min(documents.bytes_read, total), total)
        trainer.add(batch)
        if files is not None and not counted and not batch:
            raise DataError(
                "[data] no document is left to learn from; check the source and the cleaning steps"
            )
        if progress is not None:
            progress("count", total or 1, total or 1)
        return cls(trainer.finish(progress))

    def save(self, path: str | PathLike[str]) -> None:
        """Writes a ``tokenizer.json`` that Hugging Face's library reads too; into an existing folder also
        ``tokenizer_config.json``, which says which tokens have which role. Each file appears whole or not at all."""
        self.core.save(Path(path))

    def special_tokens(self) -> dict[str, str]:
        """The tokens that have a role, by ``tokenizer_config.json``'s names: "bos_token", "eos_token", …"""
        return {f"{role}_token": self.id_to_token(i) or "" for role, i in self._special.items()}

    def to_json(self) -> str:
        """The contents of ``tokenizer.json``."""
        return self.core.to_json()

    def encode(self, text: str, pair: str | None = None, add_special_tokens: bool = True) -> Encoding:
        """Encodes a text, or a pair of texts, with offsets.

        Raises:
            TokenizerError: a character is unknown and there is no unknown token, or half a character is there.
        """
        with _whole_characters():
            return Encoding(**self.core.encode(text, pair, add_special_tokens))

    @checked("tokenizer", threads=1)
    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True, threads: int | None = None
    ) -> Ragged:
        """Encodes many texts on all cores into flat arrays; no Python object per token. Errors as in :meth:`encode`."""
        with _whole_characters():
            return Ragged(
                *self.core.encode_batch(list(texts), add_special_tokens, threads or cpu_count() or 1)
            )

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """
        return self.core.decode(list(ids), skip_special_tokens)

    def decode_after(
        self, before: Iterable[int], ids: Iterable[int], skip_special_tokens: bool = True
    ) -> str:
        """The text that ``ids`` add where they follow ``before``: with WordPiece and Unigram the space between the two
        is part of it.

        Raises:
            TokenizerError: an id is outside the vocabulary.
        """
        pieces = self.stream_decoder(skip_special_tokens)
        for i in before:
            pieces.push(i)
        text = "".join(pieces.push(i) or "" for i in ids)
        return text + (pieces.finish() or "")

    def without_truncation(self) -> Tokenizer:
        """The same tokenizer without the greatest length that its file may set: what trains and measures wants whole
        texts."""
        if self._whole is None:
            self._whole = Tokenizer(self.core.without_truncation())
        return self._whole

    def stream_decoder(self, skip_special_tokens: bool = True) -> _core.StreamDecoder:
        """A decoder that takes one id at a time (``push``, then ``finish``) and never gives half a character."""
        return self.core.stream_decoder(skip_special_tokens)

    @property
    def kind(self) -> str:
        """What the model is: "bpe", "wordpiece", "unigram", "wordlevel" or "char"."""
        return self.core.kind

    @property
    def fallback(self) -> str | None:
        """What the file asks for that the fast path does not know, so that the ``tokenizers`` library (built in) does
        the work: the ids are the same, encoding is slower. None: the fast path."""
        return self.core.fallback

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return self.core.vocab_size

    def token_to_id(self, token: str) -> int | None:
        """The id of a token."""
        return self.core.token_to_id(token)

    @checked("tokenizer", token_id=-MOST)
    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id."""
        return self.core.id_to_token(token_id)

    @checked("tokenizer", token_id=-MOST)
    def is_special(self, token_id: int) -> bool:
        """Whether an id is a special token."""
        return self.core.is_special(token_id)

    @property
    def unk_token_id(self) -> int | None:
        """Id of [UNK]."""
        return self._special.get("unk")

    @property
    def mask_token_id(self) -> int | None:
        """Id of [MASK]."""
        return self._special.get("mask")

    @property
    def pad_token_id(self) -> int | None:
        """Id of [PAD]."""
        return self._special.get("pad")

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text."""
        return self._special.get("bos")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text."""
        return self._special.get("eos")

    def masking_ids(self) -> tuple[int, int, int, int]:
        """Ids of [CLS], [SEP], [PAD] and [MASK].

        Raises:
            TokenizerError: one is missing.
        """
        roles = ("cls", "sep", "pad", "mask")
        missing = [f"[{role.upper()}]" for role in roles if role not in self._special]
        if missing:
            raise TokenizerError(
                f"[tokenizer] masked training needs {', '.join(missing)}; train with a preset like bert-uncased"
            )
        return tuple(self._special[role] for role in roles)  # type: ignore[return-value]

    def begins_word(self, ids: Iterable[int]) -> npt.NDArray[np.bool_]:
        """For each token of a sequence, whether a word begins with it, as the pre-tokenizer cuts the text: at spaces
        and, where it does so, at punctuation and digits. WordPiece's ``##`` goes on with a word; where nothing splits a
        text, words begin at spaces (``▁``). Special tokens, and what follows one, always begin one."""
        return self.core.begins_word(list(ids))

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size})"

    def _repr_html_(self) -> str:
        from pyrformer import display

        return display.tokenizer(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_json, (self.to_json(),)


@contextmanager
def _whole_characters() -> Iterator[None]:
    """Surrogates without their other half, which a command line that is no UTF-8 leads to, are no text."""
    try:
        yield
    except UnicodeEncodeError as e:
        raise TokenizerError(
            f"[tokenizer] character {e.start} of the text is half a surrogate pair (was its source UTF-8?)"
        ) from None


def _from_json(text: str) -> Tokenizer:
    return Tokenizer(_core.Tokenizer.from_json(text))
